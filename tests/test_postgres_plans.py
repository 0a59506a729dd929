"""What a verb about one job, queue or group reads does not grow with the tables, whenever the plans were made."""

from __future__ import annotations

import json
import math
from contextlib import closing, suppress

import psycopg
import pytest
from test_postgres import database, explain, server  # noqa: F401 - fixtures

import pqueue
import pqueue_groups
import pqueue_postgres
import pqueue_schema
from pqueue import InvalidTransition
from pqueue_sqlalchemy import PostgresSession
from pqueue_tools import report

ROWS = 8_000  # in each table that grows; a verb may look at a small part of them
MOST = 400
# They read all groups, with `prune`; and the catalog
EXEMPT = (pqueue_groups.FORGET_GROUPS, *pqueue_postgres.HEALTH.values(), pqueue_postgres.CATALOG)
MANY = f"""
INSERT INTO pqueue.jobs (queue, task, payload, state, priority, run_at, attempts, max_attempts, key, key_until,
    key_expires_at, assigned_to, created_at, started_at, finished_at, error, "group", waits_for, has_dependents)
SELECT 'q' || n % 4, 't' || n % 2, 'null', state, 0, CASE state WHEN 'scheduled' THEN 4e9 ELSE 1000 - n END, 1, 5,
    CASE n % 3 WHEN 0 THEN 'k' || state || n END, CASE n % 3 WHEN 0 THEN 'finished' END, CASE n % 6 WHEN 0 THEN 4e9 END,
    CASE WHEN state = 'pending' AND n % 9 = 0 THEN 'absent' END, n, n,
    CASE WHEN state IN ('completed', 'failed', 'cancelled') THEN 4e9 - n END, 'ValueError: no', '',
    CASE state WHEN 'waiting' THEN 1 ELSE 0 END, 1
FROM generate_series(1, {ROWS}) n CROSS JOIN unnest(ARRAY['completed', 'failed', 'cancelled', 'pending', 'scheduled',
    'waiting']) state;
INSERT INTO pqueue.dependencies (job_id, parent_id, after_failed)
SELECT id, id + 1, 'fail' FROM pqueue.jobs WHERE id > 1000;
INSERT INTO pqueue.history (job_id, at, event, actor, attempt) SELECT id, n, event, 'w', 1 FROM pqueue.jobs
CROSS JOIN (VALUES (1, 'failed'), (2, 'died')) events (n, event) WHERE id > 1000;
INSERT INTO pqueue.outcomes (period, at, queue, task, event, run, wait, shard, number, run_seconds, wait_seconds)
SELECT period, 60 * n, 'q1', 't1', 'completed', -1, -1, 0, 1, 0, 0
FROM generate_series(1, {ROWS}) n CROSS JOIN unnest(ARRAY[60, 3600]) period ON CONFLICT DO NOTHING;
INSERT INTO pqueue.queue_groups (queue, name, task, next_at)
SELECT 'grouped', 'other' || n, 't0', CASE n % 2 WHEN 0 THEN 4e9 END FROM generate_series(1, {ROWS}) n;
INSERT INTO pqueue.group_starts SELECT 'grouped', 'other' || n, 1, 4e9 FROM generate_series(1, {ROWS}) n;
INSERT INTO pqueue.schedules (name, task, payload, queue, priority, every_seconds, zone, on_missed, overlap, origin,
    next_at, last_job_id) SELECT 's' || n, 't0', 'null', 'q0', 0, 60, 'UTC', 'once', 0, 'schedule', 4e9, n
FROM generate_series(1, 50) n"""


def work(queue):
    """Produce and consume, with and without groups, keys and dependencies."""
    first = {"priority": 9}
    queue.enqueue("t0", key="one", queue="q0", **first)
    queue.enqueue("t0", key="one", queue="q0", on_conflict="replace", **first)
    queue.enqueue("t0", key="for a time", key_seconds=9, queue="q0", **first)
    queue.enqueue("t0", queue="q0", run_at=1.0, expire_seconds=1, **first)
    queue.enqueue_many("t0", range(30), queue="q0", **first)
    queue.enqueue("t0", queue="grouped", group="mine", **first)
    for looks_for_dead in (-math.inf, math.inf):
        queue._dead_checked_at = looks_for_dead
        jobs = queue.dequeue_many("w", 8, queues=["q0"])
        while len(jobs) < 8:  # a job that was delivered before is alone
            jobs += queue.dequeue_many("w", 8, queues=["q0"])
        queue.begin(jobs[0])
        queue.extend(jobs[0], 60)
        queue.update(jobs[0], progress=0.5)
        assert queue.held_leases("w", [jobs[0].id])
        queue.complete(jobs[0])
        queue.fail(jobs[1], "ValueError: no")
        queue.release(jobs[2], delay_seconds=60)
        queue.fail(jobs[3], "ValueError: no", retry=False)
        more, _ = queue.complete_and_dequeue([(job, None) for job in jobs[4:]], "w", 4, queues=["q0"])
        queue.complete_and_dequeue([(job, None) for job in more], "w", 0)
        if job := queue.dequeue("w", queues=["grouped"]):
            queue.complete(job)
    lost = queue.dequeue("w", queues=["q0"], lease_seconds=1)
    queue.dequeue("w", queues=["q0"], now=queue.now() + 30)  # reclaims it
    queue.history(lost.id)
    queue.wait(0, consumer="w")
    queue.next_due("w")
    queue.heartbeat("w", completed=1)
    queue.peek(consumer="w", queues=["q0"])
    queue.prune_kept()
    queue.prune(1e6)


PROCESSING = f"""
INSERT INTO pqueue.jobs (queue, task, payload, state, priority, run_at, attempts, max_attempts, created_at, started_at,
    consumer, lease_token, lease_expires_at)
SELECT 'q0', 't0', 'null', 'processing', 0, 0, 1, 5, 0, 0, 'other', 'other00000000000.' || n, 4e9
FROM generate_series(1, {ROWS}) n"""


def operate(queue, name):
    """Do what an operator does with one job, queue or group."""
    parents = [queue.enqueue("t0", queue="q1", key=f"{name} {number}") for number in range(2)]
    child = queue.enqueue("t0", queue="q1", key=name, key_seconds=100, after=parents)
    grandchild = queue.enqueue("t0", queue="q1", after=[child])
    for parent in parents:
        queue.cancel(parent)
    for parent in parents:
        queue.resubmit(parent)
    assert queue.get(child).state == "waiting"
    queue.dependencies(child)
    queue.dependencies(child, excerpt=10)
    for verb in (
        lambda: queue.change(parents[0], priority=1, queue="q2"),
        lambda: queue.change(parents[0], run_at=queue.now() + 100),
        lambda: queue.run_now(parents[0]),
        lambda: queue.assign(parents[0], "absent"),
        lambda: queue.mark_failed(parents[0]),
        lambda: queue.lease_again(parents[0], "w"),
        lambda: queue.delete_jobs([grandchild]),
    ):
        with suppress(InvalidTransition, TypeError):
            verb()
    for job_id in (*parents, child):
        queue.get(job_id)
        queue.history(job_id, limit=5)
    queue.pause("q1")
    queue.resume("q1")
    queue.on_failed("q3", "t1")
    queue.mark_failed(queue.enqueue("t0", queue="q3"))
    queue.on_failed("q3", None)
    queue.schedule("mine", "t0", every_seconds=60)
    queue.pause_schedule("mine")
    queue.unschedule("mine")
    queue.weigh("grouped", "mine", 2.0)
    queue.limits("grouped", "mine")
    queue.move_status()
    queue.check(thorough=False)
    queue.leave("w")


def test_leases_of_given_jobs_are_extended_without_reading_those_of_others(database):  # noqa: F811
    with closing(pqueue.open_queue(database)) as queue, psycopg.connect(database, autocommit=True) as admin:
        job_ids = queue.enqueue_many("t0", range(5), queue="q0")
        assert len(queue.dequeue_many("w", 5)) == 5
        admin.execute(PROCESSING)
        (me,) = queue._registry.values()
        params = {"token": me.token, "lease_expires_at": 4e9, "ids": json.dumps(job_ids)}
        assert explain(queue, pqueue_schema.EXTEND_THESE, params, "ANALYZE,")[0] <= MOST
        assert explain(queue, pqueue_schema.EXTEND_ALL, params, "ANALYZE,")[0] > ROWS
        assert queue.extend_all("w", 60, job_ids=job_ids) == queue.extend_all("w", 60) == 5


def test_doctor_reads_no_processing_jobs_while_nothing_is_wrong(database, monkeypatch):  # noqa: F811
    """To find those of one consumer, all are read."""
    recorded, execute = {}, PostgresSession._execute

    def record(session, sql, params, read):
        recorded.setdefault(sql, dict(params))
        return execute(session, sql, params, read)

    with closing(pqueue.open_queue(database)) as queue, psycopg.connect(database, autocommit=True) as admin:
        queue.enqueue("t0", queue="q0")
        assert queue.dequeue("w")
        admin.execute(PROCESSING)
        known = {"stats": queue.stats(), "facts": queue.check(thorough=False)}
        monkeypatch.setattr(PostgresSession, "_execute", record)
        assert report.findings(queue, **known) == []
        queue.consumers(job_ids=False)
        monkeypatch.undo()
        assert pqueue_schema.EXPIRED_LEASES in recorded
        del recorded[pqueue_schema.RETENTION]
        assert {sql for sql, params in recorded.items() if explain(queue, sql, params, "ANALYZE,")[0] > MOST} == set()


@pytest.mark.parametrize(
    "planned", ["while there are none", "while there are few", "without statistics", "with statistics"]
)
def test_verb_about_one_job_or_queue_reads_only_that(database, monkeypatch, planned):  # noqa: F811
    recorded, execute = {}, PostgresSession._execute

    def record(session, sql, params, read):
        text = pqueue_postgres.translated(sql)[0].lstrip()
        if text.startswith((b"SELECT", b"WITH", b"INSERT", b"UPDATE", b"DELETE")):
            recorded.setdefault(sql, dict(params))
        return execute(session, sql, params, read)

    with closing(pqueue.open_queue(database)) as queue, psycopg.connect(database, autocommit=True) as admin:
        for table in pqueue_postgres.TABLES:
            admin.execute(f"ALTER TABLE pqueue.{table} SET (autovacuum_enabled = off)")
        monkeypatch.setattr(PostgresSession, "_execute", record)
        for number in range(4):
            queue.enqueue("t1", queue=f"q{number}")
        work(queue)
        operate(queue, "before")
        if planned == "while there are none":
            admin.execute("TRUNCATE pqueue.jobs, pqueue.history, pqueue.dependencies, pqueue.queue_groups")
        if planned.startswith("while"):
            admin.execute("ANALYZE")
            for sql, params in dict(recorded).items():
                with suppress(psycopg.Error):
                    explain(queue, sql, params)
        admin.execute(MANY)
        if planned == "with statistics":
            admin.execute("ANALYZE")
        recorded.clear()
        work(queue)
        operate(queue, "after")
        monkeypatch.undo()
        assert len(recorded) > 100
        for in_one_statement in (pqueue_postgres.claim_alone, pqueue_postgres.complete_and_claim):
            assert any(in_one_statement(width) in recorded for width in (0, *pqueue_postgres.WIDTHS))
        read = {}
        for sql, params in recorded.items():
            with suppress(psycopg.errors.IntegrityError):  # done before
                read[sql] = explain(queue, sql, params, "ANALYZE,")[0]
        too_many = {sql: rows for sql, rows in read.items() if rows > MOST and sql not in EXEMPT}
        assert too_many == {}
