"""The command line's tests once more, on PostgreSQL, but for those of SQLite's file, disk and log."""

# ruff: noqa: F401, F403, F811 - pytest finds tests and fixtures by their names

from __future__ import annotations

import json

import psycopg
import pytest
from test_admin import *
from test_admin import folder as plain_folder
from test_admin import test_torture_finds_a_queue_without_its_token_guard as find_missing_guard
from test_postgres import database, server

import pqueue

del (
    test_operator_whose_folder_has_no_queue_creates_none,  # noqa: F821
    test_doctor_finds_a_dead_consumer_that_holds_jobs,  # noqa: F821 - known half a second later
    test_doctor_finds_a_log_that_a_reader_keeps_from_shrinking,  # noqa: F821
    test_doctor_reports_each_problem,  # noqa: F821
    test_doctor_takes_as_many_steps_among_many_processing_jobs,  # noqa: F821 - see test_postgres_plans.py
    test_doctor_says_how_to_shrink_a_file_that_is_mostly_free,  # noqa: F821
    test_doctor_says_when_jobs_that_are_kept_for_ever_fill_the_disk,  # noqa: F821
    test_torture_finds_a_queue_without_its_token_guard,  # noqa: F821
)


@pytest.fixture
def folder(plain_folder, database, monkeypatch):
    monkeypatch.setenv("PQUEUE_URL", database)
    return plain_folder


def test_torture_uses_a_schema_of_its_own_and_drops_it(folder, run, database, monkeypatch):
    pqueue.open_queue(database).close()
    monkeypatch.setenv("PQUEUE_URL", f"{database}&schema=other" if "?" in database else f"{database}?schema=other")
    code, out, _ = run("torture", "--seconds", "5", "--json")
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    assert min(found["acknowledged"], found["killed"], found["completed"]) > 0
    with psycopg.connect(database) as db:
        names = db.execute("SELECT nspname::text FROM pg_namespace WHERE nspname !~ '^(pg_|information)'").fetchall()
    assert sorted(names) == [("pqueue",), ("public",)]


def test_torture_finds_a_queue_on_the_server_without_its_token_guard(folder, tmp_path_factory):
    find_missing_guard(tmp_path_factory.mktemp("broken"))
