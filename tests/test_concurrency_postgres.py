"""Consumers on PostgreSQL that run several jobs at the same time."""

# ruff: noqa: F401, F811 - pytest finds fixtures by their names

from __future__ import annotations

import signal

import pytest
from conftest import PATIENCE_SECONDS, wait_until
from test_concurrency import TASKS, began, completed, consumer, outcome, tasks
from test_postgres import database, server

from pqueue_sqlalchemy import PersistentQSQLAlchemy


def test_consumer_on_postgresql_runs_jobs_at_the_same_time(tasks, database):
    with PersistentQSQLAlchemy(database) as queue:
        ids = queue.enqueue_many("meet", [12] * 6) + queue.enqueue_many("meet_in_threads", [12] * 6)
        ids += queue.enqueue_many("use_transaction", range(5)) + queue.enqueue_many(
            "use_transaction_in_a_thread", range(20)
        )
        bad = [
            queue.enqueue("await_in_transaction", max_attempts=1),
            queue.enqueue("hang", max_attempts=1),
            queue.enqueue("hang_in_c", max_attempts=1),
        ]
        child = consumer(tasks, "--lease-seconds", 2, concurrency=12, PQUEUE_URL=database)
        completed(queue, *ids)
        errors = [outcome(queue, each)[2].partition(":")[0] for each in bad]
        assert errors == ["QueueError", "TimeoutError", "TimeoutError"]
        running = queue.enqueue_many("patient", range(6)) + queue.enqueue_many("patient_thread", range(6))
        began(tasks, 12)
        first = max(queue.get(each).lease_expires_at for each in running)
        wait_until(lambda: min(queue.get(each).lease_expires_at for each in running) > first + 2)
        queue.cancel(running[0])
        (latest := queue.enqueue("pid")) and completed(queue, latest)
        (tasks.folder / "go-on").touch()
        completed(queue, *running[1:])
        assert {queue.get(each).attempts for each in running} == {1}
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_SECONDS) == 0
