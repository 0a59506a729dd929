"""The dashboard's tests once more, on PostgreSQL."""

# ruff: noqa: F401, F811 - pytest finds tests and fixtures by their names

from __future__ import annotations

import pytest
from test_ops import (
    caches,
    queue,
    site,
    test_empty_dashboard_says_what_to_do,
    test_health_and_metrics_are_for_machines,
    test_hostile_text_is_shown_as_text,
    test_job_page_tells_its_story,
    test_operator_acts_on_the_ticked_or_on_all_that_match,
    test_operator_mends_jobs_and_queues,
    test_read_only_dashboard_offers_and_does_nothing,
    test_reader_filters_and_pages,
    test_streamlit_page_filters,
    test_streamlit_page_pauses_a_queue,
    test_streamlit_page_shows_the_same_figures,
)
from test_ops import folder as plain_folder
from test_postgres import database, server


@pytest.fixture
def folder(plain_folder, database, monkeypatch):
    monkeypatch.setenv("PQUEUE_URL", database)
    return plain_folder
