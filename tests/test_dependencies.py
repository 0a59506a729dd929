"""Jobs that run after others: large graphs, parents that end at once, and results inside tasks."""

# ruff: noqa: F401, F811 - pytest finds fixtures by their names

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from unittest import mock

import psycopg
import pytest
from conftest import wait_until
from test_postgres import database, server

import pqueue
import pqueue_postgres
import pqueue_schema
from pqueue import Job, QueueError, task
from pqueue_sqlalchemy import PostgresSession
from pqueue_tools import testing

NOW = 1_800_000_000.0
MANY = 10_000
BATCH = 500


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, place):
    return str(place.folder / "queue.db") if request.param == "sqlite" else request.getfixturevalue("database")


@pytest.fixture
def queue(url):
    with closing(pqueue.open_queue(url, durability="normal")) as queue:
        yield queue


def complete_all(queue):
    """Complete all jobs in batches; return how many."""
    done, jobs = 0, queue.dequeue_many("w", BATCH, now=NOW)
    while jobs:
        done += len(jobs)
        jobs, _ = queue.complete_and_dequeue([(job, None) for job in jobs], "w", BATCH, now=NOW)
    return done


def test_ten_thousand_jobs_follow_one_and_precede_one(queue):
    first = queue.enqueue("first", now=NOW)
    middle = queue.enqueue_many("middle", range(MANY), after=[first], now=NOW)
    last = queue.enqueue("last", after=middle, now=NOW)
    queue.complete(queue.dequeue("w", now=NOW), now=NOW)
    assert queue.stats()["states"]["pending"] == MANY
    assert queue.get(last).waits_for == MANY
    assert complete_all(queue) == MANY + 1
    assert queue.get(last).state == "completed"


def test_ten_thousand_jobs_fail_with_one_and_are_restored_with_it(queue):
    first = queue.enqueue("first", now=NOW)
    middle = queue.enqueue_many("middle", range(MANY), after=[first], now=NOW)
    last = queue.enqueue("last", after=middle, now=NOW)
    queue.mark_failed(first, now=NOW)
    assert queue.stats()["states"]["failed"] == MANY + 2
    assert queue.get(last).error == f"job {middle[0]} failed"
    queue.resubmit(first, now=NOW)
    assert queue.get(last).waits_for == MANY
    assert complete_all(queue) == MANY + 2


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_chain_of_ten_thousand_jobs_fails_and_is_restored_at_once(queue):
    with queue.transaction():
        first = last = queue.enqueue("t", now=NOW)
        for _ in range(MANY - 1):
            last = queue.enqueue("t", after=[last], now=NOW)
    queue.cancel(first, now=NOW)
    assert queue.stats()["states"]["failed"] == MANY - 1
    queue.resubmit(first, now=NOW)
    assert queue.stats()["states"]["waiting"] == MANY - 1
    assert complete_all(queue) == MANY


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
@pytest.mark.parametrize("ends", [("complete", "complete"), ("complete", "exchange"), ("complete", "cancel")])
def test_last_two_parents_that_end_at_once_settle_their_child_once(queue, url, ends):
    """Neither sees what the other has done, until that is committed."""
    parents = [queue.enqueue("t", now=NOW) for _ in range(2)]
    children = [queue.enqueue("child", after=parents, after_failed=mode, now=NOW) for mode in ("fail", "run")]
    jobs = queue.dequeue_many("w", 2, now=NOW)
    has_ended, errors = threading.Event(), []

    def end(job, how):
        with closing(pqueue.open_queue(url)) as own:
            verbs = {
                "complete": lambda: own.complete(job, now=NOW),
                "exchange": lambda: own.complete_and_dequeue([(job, None)], "x", 1, tasks=["none"], now=NOW),
                "cancel": lambda: own.cancel(job.id, now=NOW),
            }
            verbs[how]()
            has_ended.set()

    with queue.transaction():
        queue.complete(jobs[0], now=NOW)
        other = threading.Thread(target=end, args=(jobs[1], ends[1]))
        other.start()
        assert not has_ended.wait(0.3)  # it waits for the lock of a child
    other.join()
    assert not errors
    expected = ["failed" if "cancel" in ends else "pending", "pending"]
    assert [queue.get(child).state for child in children] == expected
    assert [queue.get(child).waits_for for child in children] == [int("cancel" in ends), 0]


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
@pytest.mark.parametrize("verb", ["complete", "exchange", "cancel"])
def test_job_enqueued_while_its_parent_ends_does_not_wait_forever(queue, url, verb):
    parent = queue.enqueue("t", now=NOW)
    job = queue.dequeue("w", now=NOW)
    has_ended = threading.Event()

    def end():
        with closing(pqueue.open_queue(url)) as own:
            if verb == "complete":
                own.complete(job, now=NOW)
            elif verb == "exchange":
                own.complete_and_dequeue([(job, None)], "x", 1, tasks=["none"], now=NOW)
            else:
                own.cancel(job.id, now=NOW)
            has_ended.set()

    with queue.transaction():
        child = queue.enqueue("child", after=[parent], now=NOW)
        other = threading.Thread(target=end)
        other.start()
        assert not has_ended.wait(0.3)
    other.join()
    assert queue.get(child).state == ("failed" if verb == "cancel" else "pending")


@pytest.mark.parametrize("url", ["postgres"], indirect=True)
def test_job_enqueued_after_one_while_that_is_pruned_finds_its_result(queue, url, monkeypatch):
    """The prune waits within its first statement, which does not see what is committed meanwhile."""
    first, lock = "WHERE CAST(:queue AS text) IS NULL OR q.name = :queue", "pg_advisory_xact_lock(7)"
    waiting = f"WHERE (SELECT {lock}::text IS NOT NULL) AND (CAST(:queue AS text) IS NULL OR q.name = :queue)"
    assert first in pqueue_postgres.POSTGRES[pqueue_schema.PRUNABLE]
    statement = pqueue_postgres.POSTGRES[pqueue_schema.PRUNABLE].replace(first, waiting)
    monkeypatch.setitem(pqueue_postgres.POSTGRES, pqueue_schema.PRUNABLE, statement)
    pqueue_postgres.translated.cache_clear()
    parents = [queue.enqueue("t", now=NOW) for _ in range(2)]
    queue.complete_and_dequeue([(job, 5) for job in queue.dequeue_many("w", 2, now=NOW)], "w", now=NOW)
    queue.enqueue("newest", now=NOW)
    with psycopg.connect(url) as gate, ThreadPoolExecutor(1) as thread:
        gate.execute(f"SELECT {lock}")
        pruned = thread.submit(queue.prune, 10, now=NOW + 100)
        wait_until(lambda: gate.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall())
        child = queue.enqueue("child", after=parents[:1], now=NOW)
        gate.rollback()
        assert pruned.result() == 1
    pqueue_postgres.translated.cache_clear()
    assert [job.result for job in queue.dependencies(child)] == [5]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_job_enqueued_in_a_joined_transaction_runs_after_one_of_it(queue, url):
    with closing(sqlite3.connect(url)) as own:
        with own, queue.join(own):
            first = queue.enqueue("t", now=NOW)
            second = queue.enqueue("t", after=[first], now=NOW)
        with pytest.raises(ZeroDivisionError), own, queue.join(own):
            queue.enqueue("t", after=[first], now=NOW)
            raise ZeroDivisionError
    assert [job.id for job in queue.list_jobs()] == [second, first]
    assert complete_all(queue) == 2


def test_task_reads_the_results_of_the_jobs_before_it():
    with mock.patch.dict(pqueue.TASKS, clear=True), testing.temporary_queue() as queue:

        @task
        def number(n: int) -> int:
            if n < 0:
                raise pqueue.DoNotRetry("negative")
            return n

        @task
        def add(job: Job) -> int:
            return sum(job.results.values())

        terms = number.enqueue_many([(1,), (2,), (-1,)])
        total = add.using(after=terms, after_failed="run").enqueue()
        lost = add.using(after=terms).enqueue()
        doubled = add.using(after=[total, terms[0]], key="k").enqueue()
        testing.drain(queue)
        assert (total.result(), doubled.result()) == (3, 4)
        with pytest.raises(pqueue.JobFailed, match=f"job {terms[2]} failed"):
            lost.result()
        with testing.inline(queue):
            assert add.using(after=[terms[0], add.using(after=terms[:2]).enqueue()]).enqueue().result() == 4
        with pytest.raises(QueueError, match="no task runs"):
            _ = queue.get(total).results
