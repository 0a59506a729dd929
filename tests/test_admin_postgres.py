"""The command line's tests once more, on PostgreSQL, but for those of SQLite's file, disk and log."""

# ruff: noqa: F401, F403, F811 - pytest finds tests and fixtures by their names

from __future__ import annotations

import pytest
from test_admin import *
from test_admin import folder as plain_folder
from test_postgres import database, server

del (
    test_operator_whose_folder_has_no_queue_creates_none,  # noqa: F821
    test_doctor_finds_a_dead_consumer_that_holds_jobs,  # noqa: F821 - known half a second later
    test_doctor_finds_a_log_that_a_reader_keeps_from_shrinking,  # noqa: F821
    test_doctor_reports_each_problem,  # noqa: F821
    test_torture_finds_a_queue_without_its_token_guard,  # noqa: F821
    test_torture_proves_that_nothing_is_lost,  # noqa: F821
)


@pytest.fixture
def folder(plain_folder, database, monkeypatch):
    monkeypatch.setenv("PQUEUE_URL", database)
    return plain_folder
