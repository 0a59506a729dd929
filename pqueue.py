"""A persistent job queue on SQLite that needs only Python's standard library.

    queue = open_queue()                              # var/queue.db, or what $PQUEUE_URL names
    queue.enqueue("greet", {"name": "Ada"})           # on disk when this returns
    job = queue.dequeue("worker-1")                   # a lease: 60 seconds, one attempt
    print("hello", job.payload["name"])
    queue.complete(job)                               # or fail(job, error), release(job)

`open_queue` returns a `PersistentQInterface`, whose methods change the state of a job as shown below. `task` registers
the function that runs the jobs of a name; `consumer.py` calls it. All queue errors are subclasses of `QueueError`.

              enqueue                dequeue                complete
    (due later) │ (now)            ┌─────────► processing ───────────► completed
        ▼       ▼                  │             │  │  │
    scheduled ─────► pending ──────┘   release   │  │  │ fail, no attempt left; mark_failed
        ▲      due    ▲ ▲  ▲    lease over, dead │  │  └─────────────► failed
        │             │ │  └─────────────────────┘  │ cancel             ▲
        │ parents done│ │                           └────────────► cancelled
        ├── waiting ──┘ │                                                │
        │      └────────┼─────────────── a parent failed ────────────────┘
        └─ fail, backoff┼────────────── processing
                        └── resubmit ── failed, cancelled, completed

The guarantees, each with a test of its number in test_pqueue.py:

1. When `enqueue` or `complete` returns, the change is on disk (`synchronous=FULL`). With `durability="normal"` it
   survives any crash of a process, but a power cut may undo the last changes.
2. At least once: a job is delivered again only if its consumer released it, its lease expired, its consumer died, or
   the power failed before its completion was synced. With `max_attempts=1`, at most once: a job that began and did not
   finish is `failed`.
3. Every delivery has its own lease token. `complete`, `fail`, `release`, `extend` and `update` with an old token
   change nothing and raise `LeaseLost`. A late completion is accepted if nobody else has taken the job.
4. Exactly once for everything written in one `transaction()`: rows of the application, follow-up jobs, the completion.
5. A job that kills its consumers is `failed` after `max_attempts` deliveries, and its error names them. Deliveries
   that were released, or not begun when the consumer died, do not count.
6. Dequeue order: priority (higher first), then due time, then id. The groups of a queue get fair shares; then this
   order holds within each. With `limit`, a group never has more jobs running, or more deliveries in a time, than that.
7. A database on a network drive, of a newer schema or of another program is refused. If it is replaced or moved, or
   its log deleted, while a process has it open, the next write raises DatabaseReplaced.
8. `lease_token` and `lease_expires_at` are set exactly while a job is `processing`.
9. A task cannot break its consumer (consumer.py): `timeout_seconds` and `memory_mb` end it, a healthy task keeps its
   lease, an operator's cancel reaches it within a second, and what it leaves behind does not affect the next job.
10. A consumer that names its tasks gets only their jobs, and other jobs cost it nothing, however many there are.
   `consumer.py` names those that it has imported.

All times are Unix seconds, UTC, as float; all durations are seconds. Every method that reads the clock takes `now`.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

import pqueue_schema
from pqueue_backend import Registration, Session
from pqueue_dependencies import parents_of
from pqueue_groups import claim_filter, name_list, valid_group
from pqueue_move import Moving
from pqueue_operating import queue_full, refusal
from pqueue_outcomes import ROLL_UP_JOBS, Outcomes, count, count_attempts
from pqueue_results import Waiting, Waits
from pqueue_retention import EXPIRE_BATCH, Retaining
from pqueue_schedules import Schedule, Scheduling
from pqueue_schema import FINISHED, STATES, UNFINISHED
from pqueue_search import Filters
from pqueue_tasks import (
    TASKS,
    Task,
    around,
    backoff_seconds,
    current_job,
    current_queue,
    known_attempts,
    metadata,
    new_meta,
    place,
    run_task,
    task,
)
from pqueue_values import (
    MAX_PAYLOAD_BYTES,
    DatabaseReplaced,
    DoNotRetry,
    Excerpt,
    InvalidTransition,
    Job,
    JobFailed,
    JobId,
    JobNotFound,
    LeaseLost,
    Params,
    QueueBusy,
    QueueError,
    QueueFull,
    Retry,
    SchemaMismatch,
    Snooze,
    above_0,
    command_line,
    due_time,
    duration,
    encode_json,
    encode_payloads,
    encode_result,
    error_text,
    file_path,
    short,
    time_of,
    to_job,
    valid_int,
    valid_job,
    valid_list,
    valid_name,
    valid_number,
)

if TYPE_CHECKING:
    from pqueue_sqlalchemy import PersistentQSQLAlchemy as PersistentQSQLAlchemy  # noqa: PLC0414 - not part of *
    from pqueue_sqlite import PersistentQSQLite

__all__ = ["Job", "JobId", "PersistentQInterface", "PersistentQSQLite", "is_postgres", "open_queue", "sqlite_path"]
__all__ += ["DatabaseReplaced", "InvalidTransition", "JobFailed", "JobNotFound", "LeaseLost"]
__all__ += ["QueueBusy", "QueueError", "QueueFull", "SchemaMismatch"]
__all__ += ["TASKS", "DoNotRetry", "Retry", "Snooze", "Task", "around", "metadata", "run_task", "task"]
__all__ += ["backoff_seconds", "current_job", "current_queue"]
__all__ += ["FINISHED", "MAX_PAYLOAD_BYTES", "STATES", "UNFINISHED", "Excerpt", "Filters", "Outcomes", "Schedule"]

__version__ = "0.1.0"

BACKENDS = {"PersistentQSQLite": "pqueue_sqlite", "PersistentQSQLAlchemy": "pqueue_sqlalchemy"}  # imported when used

DEFAULT_URL = "var/queue.db"
LEASE_SECONDS = 60.0
MAX_CONSUMERS = 256  # of one queue object; each has two descriptors
BUSY_SECONDS = 5.0  # how long a write waits for other writers before it raises QueueBusy
DEAD_CHECK_SECONDS = 1.0  # how often a dequeue looks for dead consumers
ORPHAN_CHECK_SECONDS = 60.0  # how often it looks for what consumers that had died before have left
RECLAIM_BATCH = 1000  # jobs promoted or reclaimed per dequeue, to keep it short
WAIT_SECONDS = 1.0  # the longest sleep of `wait`; bounds the cost of a missed wake-up or a dead consumer
POLL_SECONDS = 0.1  # the polling interval where wake-ups are not available

UNREADABLE = "cannot read the payload or the result: its JSON is nested too deep, or has too long a number, for Python"


def __getattr__(name: str) -> Any:
    if name in BACKENDS:
        return getattr(import_module(BACKENDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class NotStored(QueueError):
    """An INSERT stored nothing. On PostgreSQL, another transaction may have used and freed the key meanwhile."""

    def __init__(self) -> None:
        super().__init__(f"cannot enqueue: the database did not store the job; run {command_line()} doctor")


class ClaimAgain(Exception):
    """Roll back a claim, to repeat it with a sync, and when all jobs that have expired are cancelled."""


Self = TypeVar("Self", bound="PersistentQInterface")  # typing.Self needs Python 3.11


class PersistentQInterface(Waiting, Moving, Scheduling, Retaining):
    """A queue: its operations, in SQL that SQLite and PostgreSQL share. `pqueue_operating` has those of operators.

    An object may be used by several threads, and in a forked child. Close it with `close()`, or use it in a `with`
    statement, which closes it at the end.

    Invalid arguments raise ValueError; only a `Job` is not checked. Every method may raise QueueBusy, or QueueFull if
    the disk is full. After an error nothing has changed. Times are Unix seconds; these and durations are at most 1e12.
    `now` replaces the clock in tests. `by` is the operator to record in the job's history; None: the user who runs this
    process or, inside a task, that task.

    A backend implements the abstract methods (sessions, wake-up, liveness, backup and check); it must keep the
    guarantees above and pass `QueueContract` in test_pqueue.py.
    """

    def __init__(self) -> None:
        self._registry: dict[str, Registration] = {}  # replaced, never modified: other threads iterate over it
        self._registering = threading.Lock()
        self._waits = Waits()
        self._dead_checked_at = self._orphans_checked_at = -math.inf

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("cannot pickle or copy a queue: open it in the other process, with open_queue")

    # Producing

    def enqueue(
        self,
        task: str | Task[..., Any],
        payload: Any = None,
        *,
        queue: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        delay_seconds: float | timedelta = 0,
        run_at: float | datetime | None = None,
        max_attempts: int | None = None,
        expires_at: float | datetime | None = None,
        expire_seconds: float | timedelta | None = None,
        key: str | None = None,
        key_until: Literal["finished", "started"] | None = None,
        key_seconds: float | timedelta | None = None,
        on_conflict: Literal["keep", "replace"] = "keep",
        assigned_to: str | None = None,
        after: Iterable[int] = (),
        after_failed: Literal["fail", "run"] = "fail",
        now: float | None = None,
    ) -> JobId[Any]:
        """Store a job and return its id.

        task: a `Task`, or the name of one, which this program need not have registered.
        payload: a JSON-serializable value of at most `MAX_PAYLOAD_BYTES`, nested at most 100 deep, with string keys.
        queue: created by its first job; None: that of the `Task`, if one is given, else "default".
        group: its group in the queue, or None. Groups get equal shares unless `weigh` sets others; see also `limit`.
        priority: jobs with a higher priority run first; None: that of the `Task`, else 0.
        delay_seconds, run_at: when the job is due: relative to now (also a timedelta), or absolute (Unix seconds, or a
            datetime with a time zone).
        max_attempts: the number of deliveries before the job is `failed`; None: that of the task, as known to the
            consumer that takes the job first.
        expires_at, expire_seconds: cancel the job unless each attempt starts before this time: absolute, as `run_at`,
            or relative to when the job is due; None: the `expire_seconds` of the `Task`, if one is given.
        key: if another job of the queue and task holds this key, store nothing and return that job's id, whose
            `is_new` is False.
        key_until: when the job frees its key: "finished", the default, or "started": when it is first delivered.
        key_seconds: free the key this long after the enqueue instead, whether or not the job is finished.
        on_conflict: "replace" gives the job that holds the key this payload, priority, time and expiry, unless a
            consumer has taken it; "keep" leaves it as it is.
        assigned_to: the only consumer that may run the job; None: any.
        after: the ids of jobs that must finish first: until then, the job is `waiting`. In the task, `job.results` has
            their results.
        after_failed: if one of them is failed or cancelled, "fail" makes this job `failed`, too, until that one is
            resubmitted; "run" runs it anyway.

        Raises QueueFull when the queue holds `max_pending` pending jobs: see `limit`; JobNotFound for a job of `after`.
        """
        row = _new_job(task, queue, group, priority, delay_seconds, run_at, max_attempts, assigned_to, self._time(now))
        _set_expiry(row, expires_at, expire_seconds)
        row |= _key_options("a key", key, key_until, key_seconds, on_conflict, row["now"])
        if key is not None:
            row["key"] = valid_name("key", key)
        row["payload"] = encode_json("payload", payload)
        if (after, after_failed) == NO_PARENTS:
            return self._store(pqueue_schema.ENQUEUE, row)[0]
        return self._store_after(pqueue_schema.ENQUEUE, [row], after, after_failed)[0]

    def _store(self, sql: str, row: Params) -> list[JobId[Any]]:
        """Insert jobs; return their ids, or that of the job that has the key. This is a single statement, its own
        transaction, unless the key is taken, the queue is new or full, or the task is new in it."""
        session = self._transaction()
        if session.depth == 0 and (ids := session.insert(sql, row)):
            if ids[-1] % ROLL_UP_JOBS == 0:
                with suppress(QueueError):  # the job is stored
                    self._roll_up(row["now"])
            return JobId.of_queue(self, ids)
        with session:
            ids = session.insert(sql, row)
            if not ids and (found := self._holder(session, row)):
                # guard: the id of a job that was there is not new
                return JobId.of_queue(self, found, is_new=False)
            # Without a key, the statement would change nothing, but need the right to update jobs on PostgreSQL.
            if not ids and (
                self._add_queue(session, row) or (row["key"] and session.change(pqueue_schema.FREE_KEY, row))
            ):
                ids = session.insert(sql, row)
            if ids:
                return JobId.of_queue(self, ids)
            raise queue_full(session, "enqueue", row["queue"], row["number"]) or NotStored

    def _store_after(self, sql: str, rows: list[Params], after: Iterable[int], after_failed: str) -> list[JobId[Any]]:
        """Do what `_store` does for each row, in one transaction; let the new jobs run after the others."""
        parents = parents_of(after, after_failed)
        if not rows:
            return []
        if parents and rows[0]["replaces"]:
            raise ValueError("expected after or on_conflict='replace', got both")
        with self._transaction() as session:
            ids = [job_id for row in rows for job_id in self._store(sql, row)]
            if parents and (new := [int(job_id) for job_id in ids if job_id.is_new]):
                self._attach(session, new, parents, after_failed, rows[0]["now"])
        return ids

    def _holder(self, session: Session, row: Params) -> list[int]:
        """Return the id of the job that holds the key, if any; replace that job if requested and not taken."""
        found = session.run(pqueue_schema.WITH_KEY, row)
        if found and row["replaces"]:
            session.wakes = True
            if not session.change(pqueue_schema.REPLACE, {**row, "id": found[0][0]}):
                found = session.run(pqueue_schema.WITH_KEY, row)  # on PostgreSQL, it may have been taken in between
        return [job_id for (job_id,) in found]

    def enqueue_many(
        self,
        task: str | Task[..., Any],
        payloads: Iterable[Any],
        *,
        queue: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        delay_seconds: float | timedelta = 0,
        run_at: float | datetime | None = None,
        max_attempts: int | None = None,
        expires_at: float | datetime | None = None,
        expire_seconds: float | timedelta | None = None,
        keys: Sequence[str] | None = None,
        key_until: Literal["finished", "started"] | None = None,
        key_seconds: float | timedelta | None = None,
        on_conflict: Literal["keep", "replace"] = "keep",
        assigned_to: str | None = None,
        after: Iterable[int] = (),
        after_failed: Literal["fail", "run"] = "fail",
        now: float | None = None,
    ) -> list[JobId[Any]]:
        """Store one job per payload, all or none, and return their ids in order; the options are those of `enqueue`.

        keys: the key of each job, in the order of the payloads; a key may occur more than once.

        Raises QueueFull, or ValueError for more jobs than the queue's limit.
        """
        row = _new_job(task, queue, group, priority, delay_seconds, run_at, max_attempts, assigned_to, self._time(now))
        _set_expiry(row, expires_at, expire_seconds)
        row |= _key_options("keys", keys, key_until, key_seconds, on_conflict, row["now"])
        found = valid_list("payloads", payloads)
        if keys is None:
            row |= {"payloads": encode_payloads(found), "number": len(found)}
            return self._store_after(pqueue_schema.ENQUEUE_MANY, [row] if found else [], after, after_failed)
        if isinstance(keys, str) or not isinstance(keys, Sequence) or len(keys) != len(found):
            raise ValueError(f"expected a list of {len(found)} keys, one per payload, got {short(keys)}")
        rows = [
            {**row, "key": valid_name("key", key), "payload": encode_json("payload", payload)}
            for key, payload in zip(keys, found, strict=True)
        ]
        return self._store_after(pqueue_schema.ENQUEUE, rows, after, after_failed)

    # Working

    def dequeue(
        self,
        consumer: str,
        *,
        queues: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        lease_seconds: float | timedelta = LEASE_SECONDS,
        prefetch: bool = False,
        now: float | None = None,
    ) -> Job | None:
        """Lease the next job to this consumer and return it, or None if there is none.

        consumer: a name for the caller. Its first use registers a consumer: see `leave`.
        queues: the queues to take jobs from; None: all.
        tasks: the names of the tasks whose jobs to take; None: all. Other jobs cost this consumer nothing.
        lease_seconds: when the lease expires, unless `extend` renews it.
        prefetch: see `complete_and_dequeue`.

        This counts as an attempt: if this process dies, the job is delivered again while attempts are left. A job with
        `max_attempts=1` therefore runs at most once, even if the power fails.
        """
        jobs = self.dequeue_many(
            consumer, 1, queues=queues, tasks=tasks, lease_seconds=lease_seconds, prefetch=prefetch, now=now
        )
        return jobs[0] if jobs else None

    def dequeue_many(
        self,
        consumer: str,
        limit: int,
        *,
        queues: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        lease_seconds: float | timedelta = LEASE_SECONDS,
        prefetch: bool = False,
        now: float | None = None,
    ) -> list[Job]:
        """Lease up to `limit` jobs to this consumer, and return them in order; the options are those of `dequeue`.

        A job that was delivered before is returned on its own, and so is one on its last attempt unless `prefetch` is
        set.
        """
        return self.complete_and_dequeue(
            (), consumer, limit, queues=queues, tasks=tasks, lease_seconds=lease_seconds, prefetch=prefetch, now=now
        )[0]

    def complete_and_dequeue(
        self,
        finished: Iterable[tuple[Job, Any]],
        consumer: str,
        limit: int = 1,
        *,
        queues: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        lease_seconds: float | timedelta = LEASE_SECONDS,
        prefetch: bool = False,
        now: float | None = None,
    ) -> tuple[list[Job], list[Job]]:
        """Complete jobs and lease others, in one commit.

        finished: pairs of a job and its result.
        limit: as for `dequeue_many`; with 0, only complete.
        queues, tasks, lease_seconds: as for `dequeue`.
        prefetch: the caller calls `begin` before it runs each job, and the attempt counts only then (on SQLite): if
            this process dies, jobs that it had not begun are delivered again without losing an attempt.

        Return the leased jobs, and those of `finished` that were not completed because their lease was lost. Inside
        `transaction()`, raise LeaseLost for these instead.
        """
        completions = [(valid_job(job), encode_result(result)) for job, result in valid_list("finished jobs", finished)]
        me = self._registered(consumer, queues, tasks, now)
        me.prefetches = prefetch and self._publish_begun(me)
        valid_int("limit", 0, limit)
        return self._complete_and_claim(
            completions, me, limit, claim_filter(me.name, queues, tasks), lease_seconds, now
        )

    def begin(self, job: Job, *, now: float | None = None) -> None:
        """Record that a job leased with `prefetch` is about to run. Raises LeaseLost if its lease has expired."""
        # guard: a job is recorded as begun only during its lease
        self._expect_lease(valid_job(job), now)
        self._note_begun(job)
        self._expect_lease(job, now)  # again: a consumer that reclaims it from now on sees that it had begun

    def has_begun(self, job: Job) -> bool:
        """Return False if a job that is leased with `prefetch` certainly has not begun."""
        valid_job(job)
        with self._transaction(durable=False) as session:
            return self._has_begun(session, job)

    def _expect_lease(self, job: Job, now: float | None) -> None:
        # guard: a job whose lease has expired does not begin
        if job.lease_expires_at is None or self._time(now) >= job.lease_expires_at:
            raise LeaseLost(f"cannot begin job {job.id}: the lease of {job.consumer} on it has expired")

    def _publish_begun(self, me: Registration) -> bool:  # noqa: ARG002
        """Make visible to other processes which jobs this consumer begins; return False if that is not supported."""
        return False

    def _note_begun(self, job: Job) -> None:
        """Make visible to other processes that this job has begun, if that is supported."""

    def _has_begun(self, session: Session, job: Job) -> bool:  # noqa: ARG002
        """Return False if the job certainly has not begun in its current delivery."""
        return True

    def _complete_and_claim(
        self,
        completions: list[tuple[Job, str | None]],
        me: Registration,
        limit: int,
        wanted: Params,
        lease_seconds: float | timedelta,
        now: float | None,
    ) -> tuple[list[Job], list[Job]]:
        dead, nested = self._find_dead(), self.in_transaction
        # guard: complete_and_dequeue is synced
        durable = bool(completions) or nested
        while True:
            try:
                with self._transaction(durable=durable, in_batch=True) as session:
                    at = self._time(now)
                    lost = self._complete_all(session, completions, at)
                    if lost and nested:
                        _refuse(session, "complete", lost[0])
                    session.finished += [job.id for job, _ in completions]
                    grouped = self._reclaim(session, dead, at)
                    params = claim_params(me, limit, wanted, lease_seconds, at)
                    jobs = self._lease_next(session, params, me.prefetches, grouped) if limit else []
                    # guard: a job that has expired is not delivered
                    if has_expired := any(job.expires_at is not None and job.expires_at <= at for job in jobs):
                        raise ClaimAgain
                    # guard: a claim of the last attempt is synced
                    if not durable and any(job.attempts == job.max_attempts for job in jobs):
                        raise ClaimAgain
                return jobs, lost
            except ClaimAgain:
                durable = True  # a power cut must not add an attempt
                if has_expired:
                    self._cancel_all_expired(dead, self._time(now))

    def _lease_next(self, session: Session, params: Params, prefetches: bool, grouped: bool) -> list[Job]:
        """Lease up to :limit jobs, and return them in order. grouped: the groups of some queue take turns."""
        in_turn = self._claim_in_turn(session, params, prefetches) if grouped else None
        if in_turn is not None:
            return self._claimed_jobs(in_turn, params, in_order=True)
        return self._claimed_jobs(self._claim(session, params, prefetches), params)

    def _cancel_all_expired(self, dead: list[str] | None, now: float) -> None:
        """Cancel the jobs that have expired, in short transactions, also those whose deliveries were lost."""
        batch = EXPIRE_BATCH
        while batch == EXPIRE_BATCH:
            with self._transaction(durable=False) as session:
                self._reclaim(session, dead, now)
                batch = self._cancel_expired(session, now)

    def _claimed_jobs(self, rows: list[Any], params: Params, *, in_order: bool = False) -> list[Job]:
        """Return the jobs of the rows that a claim returned, in order; fail those that Python's JSON parser cannot
        read, so that they do not block the queue."""
        jobs = [to_job(row) for row in rows]
        if not in_order:
            jobs.sort(key=lambda job: (-job.priority, job.run_at, job.id))
        for job in [job for job in jobs if isinstance(job.payload, Excerpt) or isinstance(job.result, Excerpt)]:
            jobs.remove(job)
            with suppress(LeaseLost):  # on PostgreSQL, an operator may have ended it
                self.fail(job, UNREADABLE, retry=False, now=params["now"])
        return jobs

    def _claim(self, session: Session, params: Params, prefetches: bool) -> list[Any]:  # noqa: ARG002
        """Lease up to :limit jobs, and return their rows."""
        return session.run(pqueue_schema.CLAIM, params)

    def _complete_all(self, session: Session, completions: list[tuple[Job, str | None]], now: float) -> list[Job]:
        """Complete these jobs, and return those whose lease was lost."""
        lost: list[Job] = []
        others: list[Job] = []
        for job, result in completions:
            params = {"id": job.id, "token": job.lease_token, "result": result, "now": now}
            if session.change(pqueue_schema.COMPLETE, params):
                continue
            if session.change(pqueue_schema.COMPLETE_PARENT, params):
                others.append(job)
            else:
                # guard: complete_and_dequeue reports a lost lease
                lost.append(job)
        if others:
            # guard: a completed job is counted
            self._count_completed(session, others, now)
            # guard: completed jobs promote those that wait for them
            self._follow_up(session, [job.id for job in others], now, completed=True)
        return lost

    def complete(self, job: Job, result: Any = None, *, now: float | None = None) -> None:
        """Make a `processing` job `completed`, with a JSON-serializable result. Raises LeaseLost."""
        token, encoded = valid_job(job).lease_token, encode_result(result)
        with self._transaction(in_batch=True) as session:
            at = self._time(now)
            params = {"id": job.id, "token": token, "result": encoded, "now": at}
            # guard: complete needs a held lease
            if not session.change(pqueue_schema.COMPLETE, params) and self._complete_all(session, [(job, encoded)], at):
                _refuse(session, "complete", job)
            if job.id % ROLL_UP_JOBS == 0:
                self._count_new(session)
            session.finished.append(job.id)

    def fail(
        self,
        job: Job,
        error: str,
        *,
        retry: bool = True,
        retry_in_seconds: float | timedelta | None = None,
        now: float | None = None,
    ) -> str:
        """End the attempt with an error, and return the job's new state, "scheduled" or "failed". Raises LeaseLost.

        retry: whether to try again, if an attempt is left.
        retry_in_seconds: the delay before that; None: `backoff_seconds(job.attempts)`.
        """
        attempts, now = valid_job(job).attempts, self._time(now)
        delay = backoff_seconds(attempts) if retry_in_seconds is None else retry_in_seconds
        # guard: no attempt after the last
        again = retry and attempts < (job.max_attempts or 0)  # None: it was never delivered
        params: Params = {"now": now, "run_at": now + duration("retry_in_seconds", delay), "error": error_text(error)}
        # guard: fail is synced
        self._with_lease(
            "fail", pqueue_schema.RETRY if again else pqueue_schema.FAIL, job, params, event="failed", durable=True
        )
        return "scheduled" if again else "failed"

    def release(self, job: Job, *, delay_seconds: float | timedelta = 0, now: float | None = None) -> None:
        """Make a `processing` job `pending` again, or `scheduled` after a delay; the attempt does not count.

        Raises LeaseLost.
        """
        valid_job(job)
        delay, now = duration("delay_seconds", delay_seconds), self._time(now)
        with self._transaction(durable=False) as session:
            if not self._release(session, job, now, now + delay if delay > 0 else None):
                _refuse(session, "release", job)

    def _release(self, session: Session, job: Job, now: float, run_at: float | None = None) -> bool:
        """Make a job pending again, or schedule it for run_at, without counting this delivery; record it if it had
        begun. The history keeps the last of several delays only."""
        event = "released" if run_at is None else "snoozed"
        params = {"id": job.id, "token": job.lease_token, "now": now, "run_at": run_at}
        params |= {"event": event, "actor": job.consumer, "error": None}
        has_begun = job.lease_token is not None and (event == "snoozed" or self._has_begun(session, job))
        if has_begun and not (event == "snoozed" and session.change(pqueue_schema.SNOOZED_AGAIN, params)):
            session.change(pqueue_schema.RECORD, params)
        session.wakes = True
        if not session.change(pqueue_schema.RELEASE, params):
            return False
        # guard: a released attempt is counted
        if has_begun:
            count(session, job.queue, job.task, "released", now)
        return True

    def extend(self, job: Job, lease_seconds: float | timedelta = LEASE_SECONDS, *, now: float | None = None) -> None:
        """Renew the lease; it expires this many seconds from now. Raises LeaseLost."""
        params = {"lease_expires_at": self._time(now) + above_0("lease_seconds", lease_seconds)}
        self._with_lease("extend", pqueue_schema.EXTEND, job, params)

    def extend_all(
        self,
        consumer: str,
        lease_seconds: float | timedelta = LEASE_SECONDS,
        *,
        job_ids: Iterable[int] | None = None,
        now: float | None = None,
    ) -> int:
        """Renew the leases of all jobs that this consumer of this object holds, in one commit; return how many.

        They expire this many seconds from now. On PostgreSQL, jobs that other transactions are changing are left out.
        job_ids: only those of these; to find all, all `processing` jobs are read.
        """
        expires_at = self._time(now) + above_0("lease_seconds", lease_seconds)
        ids = None if job_ids is None else json.dumps(valid_list("job ids", job_ids))
        sql = pqueue_schema.EXTEND_ALL if ids is None else pqueue_schema.EXTEND_THESE
        me = self._registry.get(valid_name("consumer", consumer))
        if me is None:
            return 0
        with self._transaction(durable=False) as session:
            return session.change(sql, {"token": me.token, "lease_expires_at": expires_at, "ids": ids})

    def update(self, job: Job, *, progress: float | None = None, result: Any = None) -> None:
        """Store the progress (0 to 1) or a partial result of a `processing` job; None: leave it unchanged.

        A result is on disk when this returns, so that the task can rely on it; progress alone is not. Raises LeaseLost.
        """
        fraction = None if progress is None else valid_number("progress", 0, progress, 1)
        params = {"progress": fraction, "result": encode_result(result)}
        # guard: a result that a task stores is synced
        self._with_lease("update", pqueue_schema.UPDATE, job, params, durable=result is not None)

    def _with_lease(
        self, verb: str, sql: str, job: Job, params: Params, event: str | None = None, durable: bool = False
    ) -> None:
        """Execute a transition that requires the lease; record the event, if any."""
        params |= {"id": valid_job(job).id, "token": job.lease_token}
        with self._transaction(durable=durable) as session:
            if event and job.lease_token:
                session.change(pqueue_schema.RECORD, {**params, "event": event, "actor": job.consumer})
                session.wakes = True
            # guard: fail, release, extend, update need a held lease
            if not session.change(sql, params):
                _refuse(session, verb, job)
            # guard: a failed attempt is counted
            if event:
                count_attempts(session, [job], "failed" if sql is pqueue_schema.FAIL else "retried", params["now"])
            # guard: a failed attempt that was the last is followed up
            if sql is pqueue_schema.FAIL:
                self._job_ended(session, job.id, params["now"])

    # Consumers

    def consumers(self, *, job_ids: bool = True) -> list[dict[str, Any]]:
        """Return the consumers, most recently started first, including ended ones until `prune` deletes them.

        Each is a dict: "name", "token", "host", "pid"; "queues" and "tasks" that it serves and knows, lists (None:
        all); "started_at" and "last_seen_at", Unix seconds; "state": running, stopped or dead; "completed" jobs and
        "failed" attempts, as of its last heartbeat; "job_ids", a list of the jobs it holds, unless job_ids is False:
        to find these, all `processing` jobs are read.
        """
        columns = "name, token, host, pid, slot, queues, tasks, started_at, last_seen_at, state, completed, failed"
        found = self._dicts(columns, f"SELECT {columns} FROM consumers ORDER BY id DESC", {})
        own_tokens = {me.token for me in self._registry.values()}
        for each in found:
            each["queues"] = each["queues"] and json.loads(each["queues"])
            each["tasks"] = each["tasks"] and json.loads(each["tasks"])
            if each["state"] == "running" and each["token"] not in own_tokens and not self._is_alive(each["slot"]):
                each["state"] = "dead"
            del each["slot"]
        if not job_ids:
            return found
        held: dict[str, list[int]] = {}  # read last: a dead consumer still holds its jobs
        for job_id, token in self._read("SELECT id, lease_token FROM jobs WHERE state = 'processing'"):
            held.setdefault(token[:16], []).append(job_id)
        return [{**each, "job_ids": sorted(held.get(each["token"], []))} for each in found]

    def wait(
        self,
        timeout_seconds: float | timedelta,
        *,
        consumer: str,
        queues: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        now: float | None = None,
    ) -> bool:
        """Sleep until a job may be available to this consumer and return True, or until the timeout and return False.

        It sleeps for at most one second, whatever the timeout: call it in a loop with `dequeue`.
        """
        me = self._registered(consumer, queues, tasks, now)
        params = {**claim_filter(consumer, queues, tasks), "limit": 1}

        def due_in() -> float:
            at = self._read(pqueue_schema.NEXT_EVENT, params)[0][0]
            left = (math.inf if at is None else cast(float, at)) - self._time(now)
            # guard: a schedule that cannot be fired here keeps no consumer awake
            return max(left, POLL_SECONDS) if self._is_unfit else left

        return self._sleep(me, min(duration("timeout_seconds", timeout_seconds), WAIT_SECONDS), due_in) or due_in() <= 0

    def next_due(
        self, consumer: str, *, queues: Sequence[str] | None = None, tasks: Sequence[str] | None = None
    ) -> float | None:
        """Return when the next job of this consumer will be due, in Unix seconds; None: none is scheduled.

        The options are those of `dequeue`.
        """
        wanted = claim_filter(valid_name("consumer", consumer), queues, tasks)
        return cast("float | None", self._read(pqueue_schema.NEXT_DUE, wanted)[0][0])

    def heartbeat(self, consumer: str, *, completed: int = 0, failed: int = 0, now: float | None = None) -> None:
        """Record that this consumer is alive, and add to its numbers of completed jobs and failed attempts."""
        counts = {"completed": valid_int("completed", 0, completed), "failed": valid_int("failed", 0, failed)}
        me, now = self._registered(consumer, None, None, now), self._time(now)
        with self._transaction(durable=False) as session:
            session.change(pqueue_schema.HEARTBEAT, {"token": me.token, **counts, "now": now})
            self._roll_up(now)

    def _register(
        self, name: str, queues: Sequence[str] | None, tasks: Sequence[str] | None, now: float | None
    ) -> Registration:
        valid_name("consumer", name)
        if self.in_transaction:
            raise QueueError(
                f"cannot register consumer {name!r} inside a transaction, which may undo it: dequeue before it"
            )
        with self._registering, ExitStack() as undo:
            if name in self._registry:
                return self._registry[name]
            if len(self._registry) == MAX_CONSUMERS:
                raise QueueError(
                    f"cannot register consumer {name!r}: this object has {MAX_CONSUMERS}, each with a lock; "
                    "reuse names, or end consumers with leave(name)"
                )
            me = Registration(name, self._adopt_slot(self._take_slot()))
            if me.slot:
                undo.callback(me.slot.close)
            self._announce(me, os.getpid(), queues, tasks, now)
            undo.pop_all()
            self._registry = {**self._registry, name: me}
            return me

    def _announce(
        self, me: Registration, pid: int, queues: Sequence[str] | None, tasks: Sequence[str] | None, now: float | None
    ) -> None:
        params = {"name": me.name, "token": me.token, "host": socket.gethostname(), "pid": pid}
        params |= {"slot": me.slot and me.slot.number, "now": self._time(None)}
        params |= {"queues": name_list("queue", queues), "tasks": name_list("task", tasks)}
        with self._transaction(durable=False) as session:
            if session.change(pqueue_schema.MARK_DEAD, params):
                # guard: a consumer that takes a dead consumer's slot reclaims its jobs first
                self._reclaim(session, [], self._time(now))  # before this consumer writes to the same slot
            session.change(pqueue_schema.REGISTER, params)

    def share(self, consumer: str) -> Registration:
        """Take the lock of a consumer whose jobs children of this process will run, one child after another.

        Fork each child between `share` and `adopt`. The lock is held until this process and the child have ended, so
        that no other consumer takes back a job that still runs. This object may send the consumer's heartbeats, and
        unregisters it when it is closed.
        """
        me = Registration(valid_name("consumer", consumer), self._take_slot(), is_shared=True)
        self._registry = {**self._registry, consumer: me}
        return me

    def adopt(
        self,
        shared: Registration,
        *,
        queues: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        now: float | None = None,
    ) -> None:
        """Register, in a child forked for this, the consumer that its parent shares."""
        now = self._time(now)
        me = shared.adopted(self._adopt_slot(shared.slot))
        self._announce(me, os.getppid(), queues, tasks, now)
        self._registry = {**self._registry, me.name: me}

    def _adopt_slot(self, slot: Any) -> Any:
        """Make a slot that this process or its parent has taken show that this process is alive; return it."""
        return slot

    def held_jobs(self, consumer: str) -> list[Job]:
        """Return the jobs that this consumer of this object holds."""
        me = self._registry.get(valid_name("consumer", consumer))
        return [to_job(row) for row in self._read(pqueue_schema.HELD_BY, {"token": me.token})] if me else []

    def held_leases(self, consumer: str, job_ids: Iterable[int]) -> list[tuple[int, str]]:
        """Return the ids and lease tokens of those of the given jobs that this consumer of this object holds."""
        me, ids = self._registry.get(valid_name("consumer", consumer)), valid_list("job ids", job_ids)
        return self._read(pqueue_schema.LEASES, {"token": me.token, "ids": json.dumps(ids)}) if me else []

    def holds(self, job: Job) -> bool:
        """Return whether this delivery still holds the job's lease; unlike `extend`, this writes nothing."""
        return bool(self._read(pqueue_schema.HOLDS, {"id": valid_job(job).id, "token": job.lease_token}))

    def _registered(
        self, name: str, queues: Sequence[str] | None, tasks: Sequence[str] | None, now: float | None
    ) -> Registration:
        return (isinstance(name, str) and self._registry.get(name)) or self._register(name, queues, tasks, now)

    def _reclaim(self, session: Session, dead: list[str] | None, now: float) -> bool:
        """Promote scheduled jobs that are due, and end deliveries that expired or whose consumer died. Return whether
        the groups of some queue take turns."""
        params = {"now": now, "limit": RECLAIM_BATCH}
        due, expired, grouped = session.run(pqueue_schema.OVERDUE, params)[0]
        # guard: jobs that are due are promoted
        if due:
            session.change(pqueue_schema.PROMOTE, params)
            session.wakes = True
            self._fire_schedules(session, now)
        # guard: expired leases are reclaimed
        if expired:
            for row in session.run(pqueue_schema.LEASE_EXPIRED, params):
                self._end_lost_delivery(session, to_job(row), "expired", now)
        # guard: jobs of dead consumers are reclaimed at once
        if dead is not None:
            for token in dead:
                session.change(pqueue_schema.UNREGISTER, {"token": token, "state": "dead"})
            orphaned = session.run(pqueue_schema.ORPHANED, params)
            for row in orphaned:
                self._end_lost_delivery(session, to_job(row), "died", now)
            if len(orphaned) == RECLAIM_BATCH:  # there may be more
                self._orphans_checked_at = -math.inf
        # guard: jobs that have expired are cancelled
        if due or expired or dead:  # last: a delivery that was lost may have left one
            cancelled = self._cancel_expired(session, now)
            # guard: the job of a handler is delivered at once
            if cancelled or expired or dead:
                session.change(pqueue_schema.PROMOTE, params)
        # guard: a job of a group that has fallen due is delivered at once
        if due or expired or dead is not None:  # it may let the groups of its queue take turns again
            grouped = session.run(pqueue_schema.OVERDUE, params)[0][2]
        return bool(grouped)

    def _end_lost_delivery(self, session: Session, job: Job, event: str, now: float) -> None:
        # guard: an attempt counts when the job begins
        if not self._has_begun(session, job):
            self._release(session, job, now)
            return
        what = "died" if event == "died" else "let its lease run out"
        params: Params = {"id": job.id, "token": job.lease_token, "now": now}
        params["error"] = f"consumer {job.consumer} {what} in attempt {job.attempts} of {job.max_attempts}"
        session.change(pqueue_schema.RECORD, {**params, "event": event, "actor": job.consumer})
        is_last = not session.change(pqueue_schema.REDELIVER, params)
        # guard: a lost delivery is counted
        for each in (event, "failed" if is_last else "retried"):
            count(session, job.queue, job.task, each, now)
        if is_last:
            consumers = [row[0] for row in session.run(pqueue_schema.LOST_BY, params)][-job.attempts :]
            params["error"] = _last_loss_error(job, consumers, params["error"])
            session.change(pqueue_schema.FAIL, params)
            # guard: a job that was lost for good is followed up
            self._job_ended(session, job.id, now)
        session.wakes = True

    def _find_dead(self) -> list[str] | None:
        """Return the tokens of consumers that have died, once a second; None: the jobs of dead ones need no look.

        An empty list means to look for jobs that earlier dead ones have left. Hardly any are, as they are taken back
        when a consumer is found dead, and the look reads all jobs that are processing: so that is once a minute.
        """
        now = time.monotonic()
        if now - self._dead_checked_at < DEAD_CHECK_SECONDS:
            return None
        self._dead_checked_at = now
        own_tokens = {me.token for me in self._registry.values()}
        dead = [
            token
            for token, slot in self._read(pqueue_schema.RUNNING)
            if token not in own_tokens and not self._is_alive(slot)
        ]
        if not dead and now - self._orphans_checked_at < ORPHAN_CHECK_SECONDS:
            return None
        self._orphans_checked_at = now
        return dead

    def leave(self, consumer: str, *, now: float | None = None) -> None:
        """Unregister a consumer of this object: release the jobs that it holds, and its lock.

        The next dequeue registers it again. Does nothing if this object has no consumer of this name.
        """
        at = self._time(now)
        if me := self._registry.get(valid_name("consumer", consumer)):
            self._unregister([me], at)

    def _unregister(self, leaving: Sequence[Registration], now: float | None = None) -> None:
        # guard: a child leaves its consumer registered
        if own := [me for me in leaving if not me.is_adopted]:
            with self._transaction(durable=False) as session:
                self._lock_as_writer(session)
                for me in own:
                    for row in session.run(pqueue_schema.HELD_BY, {"token": me.token}):
                        # guard: a consumer that closes returns its jobs
                        self._release(session, to_job(row), self._time(now))
                    session.change(pqueue_schema.UNREGISTER, {"token": me.token, "state": "stopped"})
        with self._registering:
            self._registry = {name: me for name, me in self._registry.items() if me not in leaving}
        for me in leaving:
            if me.slot:
                me.slot.close()


def claim_params(me: Registration, limit: int, wanted: Params, lease_seconds: float | timedelta, now: float) -> Params:
    params = {**wanted, "limit": limit, "now": now, "known_attempts": known_attempts()}
    params["lease_expires_at"] = now + above_0("lease_seconds", lease_seconds)
    # guard: each claim has its own number
    params["token"] = f"{me.token}.{next(me.claims)}"
    return params


def _last_loss_error(job: Job, consumers: list[str], error: str) -> str:
    once = "; it may have done all its work, and is not run again, as its max_attempts is 1"
    number = f"{job.attempts} attempt{'' if job.attempts == 1 else 's'}"
    return f"failed after {number}; lost by {', '.join(consumers)}; {error}{once if job.max_attempts == 1 else ''}"


def _refuse(session: Session, verb: str, job: Job) -> NoReturn:
    """Raise the error for a job whose token is not the current one. A lost lease rolls back the whole transaction."""
    if job.lease_token is None:
        raise refusal(session, verb, job.id)
    session.lost = LeaseLost(f"cannot {verb} job {job.id}: the lease of {job.consumer} on it was lost")
    raise session.lost


def _new_job(
    task: str | Task[..., Any],
    queue: str | None,
    group: str | None,
    priority: int | None,
    delay_seconds: float | timedelta,
    run_at: float | datetime | None,
    max_attempts: int | None,
    assigned_to: str | None,
    now: float,
) -> Params:
    due = due_time(delay_seconds, run_at, now)
    queue, priority = place(task, queue, priority)
    return {
        "task": valid_name("task", task.name if isinstance(task, Task) else task),
        "queue": queue,
        "group": "" if group is None else valid_group(group),
        "state": "scheduled" if due > now else "pending",
        "priority": priority,
        "run_at": due,
        "expires_at": due + task.expire_seconds if isinstance(task, Task) and task.expire_seconds else None,
        "max_attempts": None if max_attempts is None else valid_int("max_attempts", 1, max_attempts),
        "assigned_to": None if assigned_to is None else valid_name("consumer", assigned_to),
        "meta": new_meta(),
        "now": now,
        "number": 1,
    }


def _set_expiry(row: Params, at: float | datetime | None, seconds: float | timedelta | None) -> None:
    if at is not None:
        if seconds is not None:
            raise ValueError(f"expected expires_at or expire_seconds, got both: {short(at)} and {short(seconds)}")
        row["expires_at"] = time_of("expires_at", at)
    elif seconds is not None:
        row["expires_at"] = row["run_at"] + above_0("expire_seconds", seconds)


NO_PARENTS = ((), "fail")  # the defaults of after and after_failed
NO_KEY: Params = {"key": None, "key_until": None, "key_expires_at": None, "replaces": False}


def _key_options(
    what: str, given: object, until: str | None, seconds: float | timedelta | None, on_conflict: str, now: float
) -> Params:
    """Return how long jobs with the keys that were given hold them, and whether they replace others."""
    if given is None:
        if (until, seconds, on_conflict) != (None, None, "keep"):
            raise ValueError(f"expected {what} together with key_until, key_seconds or on_conflict")
        return NO_KEY
    if until is not None and seconds is not None:
        raise ValueError("expected key_until or key_seconds, got both")
    if until not in (None, "finished", "started"):
        raise ValueError(f"expected key_until to be 'finished' or 'started', got {short(until)}")
    if on_conflict not in ("keep", "replace"):
        raise ValueError(f"expected on_conflict to be 'keep' or 'replace', got {short(on_conflict)}")
    return {
        "key_until": until or "finished" if seconds is None else None,
        "key_expires_at": None if seconds is None else now + above_0("key_seconds", seconds),
        "replaces": on_conflict == "replace",
    }


def open_queue(
    url: str | os.PathLike[str] | None = None,
    *,
    create: bool = True,
    durability: Literal["full", "normal"] | None = None,
    group: str | None = None,
) -> PersistentQInterface:
    """Open a queue and return it.

    url: a path, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE; None: $PQUEUE_URL, else var/queue.db.
    create: create the queue if it does not exist; else raise QueueError.
    durability: "full" or "normal", see guarantee 1; None: $PQUEUE_DURABILITY, else "full".
    group: on SQLite, the group that may use a new queue; None: $PQUEUE_GROUP, else only this account.

    Raises ValueError for an invalid url, such as ":memory:"; SchemaMismatch for a file that is not a queue of this
    version; QueueError if it cannot be opened.
    """
    given = {"URL": url, "DURABILITY": durability, "GROUP": group}
    wanted: Any = durability or os.environ.get("PQUEUE_DURABILITY") or "full"
    try:
        if is_postgres(url):
            return _on_postgres(_url(url), create, wanted)
        from pqueue_sqlite import PersistentQSQLite

        group = group or os.environ.get("PQUEUE_GROUP") or None
        return PersistentQSQLite(sqlite_path(url), create=create, durability=wanted, group=group)
    except ValueError as error:
        about = re.match("expected a (durability|group) of", str(error))
        name = about[1].upper() if about else "URL"
        if given[name] is None and os.environ.get(f"PQUEUE_{name}"):
            raise ValueError(f"{error}; check PQUEUE_{name}") from None
        raise


def _on_postgres(url: str, create: bool, durability: str) -> PersistentQInterface:
    try:
        from pqueue_sqlalchemy import OnPostgres
    except ImportError as error:
        raise QueueError(f"cannot use PostgreSQL: {error}; pip install -U SQLAlchemy 'psycopg[binary]'") from None
    return OnPostgres(url, create=create, durability=durability)


def is_postgres(url: str | os.PathLike[str] | None = None) -> bool:
    """Return whether this URL (default: as for `open_queue`) names a PostgreSQL server. Raises ValueError."""
    return _url(url).startswith(("postgresql:", "postgresql+", "postgres:"))


def sqlite_path(url: str | os.PathLike[str] | None = None) -> Path:
    """Return the absolute path that this URL (default: as for `open_queue`) names. Raises ValueError."""
    text = _url(url)
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "sqlite":
        server = "" if scheme.startswith("postgres") else ", or postgresql://… for a server"
        raise ValueError(f"expected a path or sqlite:///PATH{server}, got {scheme}://…")
    if separator and (rest in ("", "/") or "?" in rest):
        raise ValueError(f"expected sqlite:///PATH, without options, got {short(text)}")
    return file_path(rest.removeprefix("/") if separator else text)


def _url(url: str | os.PathLike[str] | None) -> str:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if text is not None and not isinstance(text, str):
        raise ValueError(f"expected a path or a URL as str or Path, got {short(url)}")
    # guard: an empty name is no path
    if text is not None and not text.strip():
        raise ValueError(f"expected a path or a URL, got {text!r}; None means $PQUEUE_URL or {DEFAULT_URL}")
    named = text or os.environ.get("PQUEUE_URL") or DEFAULT_URL
    is_path = isinstance(url, os.PathLike)
    if not is_path and (typed := re.match(r"\s*((?:sqlite|postgres)[\w+]*)//", named)):
        raise ValueError(f"expected a path or a URL such as {typed[1]}://…, got {typed[1]}//…")
    if not is_path and re.match(r"\s*(host|hostaddr|port|dbname|user|password|service|sslmode)\s*=", named):
        raise ValueError(
            "expected a path or a URL such as postgresql://USER@HOST:PORT/DATABASE, got a connection string of libpq"
        )
    return named
