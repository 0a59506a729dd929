"""A persistent job queue on SQLite that needs only Python's standard library.

    queue = open_queue()                              # var/queue.db, or what $PQUEUE_URL names
    queue.enqueue("greet", {"name": "Ada"})           # on disk when this returns
    job = queue.dequeue("worker-1")                   # a lease: 60 seconds, one attempt
    print("hello", job.payload["name"])
    queue.complete(job)                               # or fail(job, error), release(job)

`open_queue` returns a `PersistentQInterface`, whose methods are the verbs below. `task` registers the function that
runs the jobs of a name; `consumer.py` calls it. Every error of the queue is a `QueueError`.

              enqueue                dequeue                complete
    (due later) │ (now)            ┌─────────► processing ───────────► completed
        ▼       ▼                  │             │  │  │
    scheduled ─────► pending ──────┘   release   │  │  │ fail, no attempt left; mark_failed
        ▲      due      ▲  ▲    lease over, dead │  │  └─────────────► failed
        │               │  └─────────────────────┘  │ cancel
        │               │                           └────────────────► cancelled
        └─ fail, backoff┼────────────── processing
                        └── resubmit ── failed, cancelled, completed

The guarantees, each with a test of its number in test_pqueue.py:

1. When `enqueue` or `complete` returns, the change is on disk (`synchronous=FULL`). With `durability="normal"` it
   survives any crash of a process, but a power cut may undo the last changes.
2. At least once: a job is delivered again only if its consumer released it, its lease expired, its consumer died, or
   the power failed before its completion was synced. With `max_attempts=1`, at most once: a job that began, and is not
   known to have finished, is `failed`.
3. Every delivery has its own lease token. `complete`, `fail`, `release`, `extend` and `update` with an old token
   change nothing and raise `LeaseLost`. A late completion is accepted if nobody else has taken the job.
4. Exactly once for what is written in one `transaction()`: the application's rows, follow-up jobs and the completion.
5. A job that kills its consumers is `failed` after `max_attempts` deliveries, and its error names them. What a
   consumer released, or had not begun when it died, does not count.
6. Order at dequeue: priority (higher first), then due time, then id.
7. A database that cannot be trusted is refused: on a network drive, of a newer schema, of another program. If it is
   replaced or moved, or its log deleted, while a process has it open, the next write raises DatabaseReplaced.
8. `lease_token` and `lease_expires_at` are set exactly while a job is `processing`.

All times are Unix seconds, UTC, as float; all durations are seconds. Every method that reads the clock takes `now`.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pqueue_backend import Registration, Session
from pqueue_move import Moving
from pqueue_schema import (
    ADD_QUEUE,
    ASSIGN,
    CANCEL,
    CLAIM,
    COMPLETE,
    ENQUEUE,
    ENQUEUE_MANY,
    EXPIRED,
    EXTEND,
    FAIL,
    FINISHED,
    FORGET,
    HEARTBEAT,
    HELD_BY,
    LEAVE,
    LOST_BY,
    MARK_FAILED,
    NEXT_ATTEMPTS,
    NEXT_EVENT,
    ORPHANED,
    OVERDUE,
    PROMOTE,
    PRUNABLE,
    RECORD,
    REGISTER,
    RELEASE,
    RESUBMIT,
    RETRY,
    ROOM,
    RUNNING,
    SET_MAX_PENDING,
    SET_PAUSED,
    STATES,
    SUCCEED,
    TAKE_BACK,
    UNFINISHED,
    UPDATE,
    WITH_KEY,
)
from pqueue_search import Filters, Reading
from pqueue_tasks import DEFAULT_MAX_ATTEMPTS, TASKS, Task, backoff_seconds, current_queue, run_task, task
from pqueue_values import (
    MAX_PAYLOAD_BYTES,
    DatabaseReplaced,
    DoNotRetry,
    Excerpt,
    InvalidTransition,
    Job,
    JobNotFound,
    LeaseLost,
    Params,
    QueueBusy,
    QueueError,
    QueueFull,
    SchemaMismatch,
    encode_json,
    encode_payloads,
    encode_result,
    error_text,
    file_path,
    finite,
    operator_name,
    short,
    to_job,
    valid_id,
    valid_int,
    valid_lease,
    valid_name,
    valid_state,
)

if TYPE_CHECKING:
    from pqueue_sqlalchemy import PersistentQSQLAlchemy as PersistentQSQLAlchemy  # noqa: PLC0414 - not part of *
    from pqueue_sqlite import PersistentQSQLite

__all__ = [  # noqa: RUF022 - by use: opening a queue and working with it, errors, tasks, values, URLs
    "open_queue",
    "task",
    "Job",
    "PersistentQInterface",
    "PersistentQSQLite",
    "QueueError",
    "LeaseLost",
    "JobNotFound",
    "InvalidTransition",
    "QueueBusy",
    "QueueFull",
    "SchemaMismatch",
    "DatabaseReplaced",
    "DoNotRetry",
    "Task",
    "TASKS",
    "run_task",
    "current_queue",
    "backoff_seconds",
    "STATES",
    "UNFINISHED",
    "FINISHED",
    "Filters",
    "Excerpt",
    "MAX_PAYLOAD_BYTES",
    "is_postgres",
    "sqlite_path",
]

__version__ = "0.1.0"

BACKENDS = {"PersistentQSQLite": "pqueue_sqlite", "PersistentQSQLAlchemy": "pqueue_sqlalchemy"}  # imported when used

DEFAULT_URL = "var/queue.db"
LEASE_SECONDS = 60.0
MAX_CONSUMERS = 256  # of one queue object; each has two descriptors
BUSY_SECONDS = 5.0  # how long a write waits for another writer before it raises QueueBusy
DEAD_CHECK_SECONDS = 1.0  # how often a dequeue looks for dead consumers
RECOVERY_BATCH = 1000  # jobs promoted or taken back in one dequeue, so that it stays short
PRUNE_BATCH = 1000
WAIT_SECONDS = 1.0  # the longest sleep of `wait`: it bounds what a missed ring or a dead consumer costs
POLL_SECONDS = 0.1  # how often to look where no ring comes: it was lost, or the platform has no bells

UNREADABLE = "cannot read the payload or the result: its JSON is nested too deep, or has too long a number, for Python"


def __getattr__(name: str) -> Any:
    if name in BACKENDS:
        return getattr(import_module(BACKENDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class NotStored(QueueError):
    """On PostgreSQL, others may have taken and freed the key meanwhile."""

    def __init__(self) -> None:
        super().__init__("cannot enqueue: the database takes no job, though nothing is in its way; run doctor")


class LastAttempt(Exception):
    """Undo a claim that was not to be synced."""


Self = TypeVar("Self", bound="PersistentQInterface")  # typing.Self needs Python 3.11


class PersistentQInterface(Reading, Moving):
    """A queue: its verbs, in SQL that SQLite and PostgreSQL share.

    One object serves many threads, and goes on working in a forked child. Close it with `close()`, or use it in a
    `with` statement, which closes it at the end.

    Bad arguments raise ValueError. Every method may raise QueueBusy, or QueueFull for a full disk. After an error
    nothing has changed. Times are Unix seconds. `now` is the time to use instead of the clock's, for tests. `by` is the
    operator to record in the job's history; None: the user who runs this process.

    A backend implements the abstract methods (sessions, wake-up, liveness, backup and check); it must keep the
    guarantees above and pass `QueueContract` in test_pqueue.py.
    """

    def __init__(self) -> None:
        self._registry: dict[str, Registration] = {}  # replaced, never changed: other threads walk through it
        self._registering = threading.Lock()
        self._looked_for_dead = -math.inf

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Producing

    def enqueue(
        self,
        task: str | Task,
        payload: Any = None,
        *,
        queue: str = "default",
        priority: int = 0,
        delay_seconds: float = 0,
        run_at: float | None = None,
        max_attempts: int | None = None,
        key: str | None = None,
        assigned_to: str | None = None,
        now: float | None = None,
    ) -> int:
        """Store a job and return its id.

        task: a `Task`, or the name of one, which this program need not have registered.
        payload: what JSON can hold: at most `MAX_PAYLOAD_BYTES`, nested at most 100 deep; keys are strings.
        queue: created by its first job.
        priority: jobs of a higher one run first.
        delay_seconds, run_at: the job does not run before so long from now, or before this time.
        max_attempts: how often the job is delivered before it is `failed`; None: the task's own.
        key: if an unfinished job of the queue has it, nothing is stored, and that job's id is returned.
        assigned_to: the only consumer that may run the job; None: any.

        Raises QueueFull when the queue holds `max_pending` pending jobs: see `limit`.
        """
        row = _new_job(task, queue, priority, delay_seconds, run_at, max_attempts, key, assigned_to, self._time(now))
        row["payload"] = encode_json("payload", payload)
        return self._store(ENQUEUE, row)[0]

    def _store(self, sql: str, row: Params) -> list[int]:
        """Insert jobs; return their ids, or that of the job that has the key. One statement, a transaction by itself,
        does it unless there is such a job, or the queue is new or full."""
        if not self.in_transaction and (ids := self._write().insert(sql, row)):
            return ids
        with self._write() as tx:
            ids = tx.insert(sql, row) or [found[0] for found in tx.run(WITH_KEY, row)]
            if not ids and tx.change(ADD_QUEUE, row):
                ids = tx.insert(sql, row)
            if ids:
                tx.ring = True
                return ids
            room, max_pending = tx.run(ROOM, row)[0]
            if room is not None and room < row["number"]:
                raise _full("enqueue", row["queue"], max_pending, row["number"])
            raise NotStored

    def enqueue_many(
        self,
        task: str | Task,
        payloads: Iterable[Any],
        *,
        queue: str = "default",
        priority: int = 0,
        delay_seconds: float = 0,
        run_at: float | None = None,
        max_attempts: int | None = None,
        assigned_to: str | None = None,
        now: float | None = None,
    ) -> list[int]:
        """Store one job per payload, all or none, and return their ids in order; the options are those of `enqueue`.

        Raises QueueFull, or ValueError for more jobs than the queue's limit, which can never fit.
        """
        row = _new_job(task, queue, priority, delay_seconds, run_at, max_attempts, None, assigned_to, self._time(now))
        found = list(payloads)
        row |= {"payloads": encode_payloads(found), "number": len(found)}
        return self._store(ENQUEUE_MANY, row) if found else []

    # Working

    def dequeue(
        self,
        consumer: str,
        *,
        queues: Sequence[str] | None = None,
        lease_seconds: float = LEASE_SECONDS,
        prefetch: bool = False,
        now: float | None = None,
    ) -> Job | None:
        """Lease the next job to this consumer, and return it; return None if there is none.

        consumer: a name for the caller. The first use of a name registers a consumer: see `leave`.
        queues: the queues to take jobs from; None: all.
        lease_seconds: how long the job is this consumer's, unless `extend` renews the lease.
        prefetch: see `complete_and_dequeue`.

        The attempt counts from now on: if this process dies, the job is delivered again while attempts are left. A job
        with `max_attempts=1` is therefore run at most once, even if the power fails.
        """
        jobs = self.dequeue_many(consumer, 1, queues=queues, lease_seconds=lease_seconds, prefetch=prefetch, now=now)
        return jobs[0] if jobs else None

    def dequeue_many(
        self,
        consumer: str,
        limit: int,
        *,
        queues: Sequence[str] | None = None,
        lease_seconds: float = LEASE_SECONDS,
        prefetch: bool = False,
        now: float | None = None,
    ) -> list[Job]:
        """Lease up to `limit` jobs to this consumer, and return them in order; the options are those of `dequeue`.

        A job that was delivered before comes alone, and so does one whose last attempt this is, unless `prefetch` is
        set.
        """
        return self.complete_and_dequeue(
            (), consumer, limit, queues=queues, lease_seconds=lease_seconds, prefetch=prefetch, now=now
        )[0]

    def complete_and_dequeue(
        self,
        finished: Iterable[tuple[Job, Any]],
        consumer: str,
        limit: int = 1,
        *,
        queues: Sequence[str] | None = None,
        lease_seconds: float = LEASE_SECONDS,
        prefetch: bool = False,
        now: float | None = None,
    ) -> tuple[list[Job], list[Job]]:
        """Complete jobs and lease others, in one commit.

        finished: pairs of a job and its result.
        limit: as for `dequeue_many`; with 0, only complete.
        queues, lease_seconds: as for `dequeue`.
        prefetch: the caller calls `begin` before it runs each job, and only then does the attempt count (on SQLite): if
            this process dies, jobs that it had not begun are delivered again as if it had never taken them.

        Return the jobs leased, and those of `finished` that were not completed because their lease was lost. Inside
        `transaction()`, raise LeaseLost for these instead.
        """
        settled = [(job, encode_result(result)) for job, result in finished]
        me = self._registered(consumer, queues, now)
        me.prefetches = prefetch and self._publish_begun(me)
        valid_int("limit", 0, limit)
        return self._exchange(settled, me, limit, queues, lease_seconds, now)

    def begin(self, job: Job, *, now: float | None = None) -> None:
        """Note that a job leased with `prefetch` is about to run. Raises LeaseLost if its lease has expired."""
        # guard: a job is noted as begun only while its lease lasts
        self._expect_lease(job, now)
        self._note_begun(job)
        self._expect_lease(job, now)  # once more: whoever takes it back from now on sees that it had begun

    def _expect_lease(self, job: Job, now: float | None) -> None:
        # guard: a job whose lease is over does not begin
        if job.lease_expires_at is None or self._time(now) >= job.lease_expires_at:
            raise LeaseLost(f"cannot begin job {job.id}: the lease of {job.consumer} on it is over")

    def _publish_begun(self, me: Registration) -> bool:  # noqa: ARG002
        """Let other processes see what this consumer begins; return False where the backend cannot."""
        return False

    def _note_begun(self, job: Job) -> None:
        """Show others that this job has begun, where the backend can."""

    def _has_begun(self, tx: Session, job: Job) -> bool:  # noqa: ARG002
        """Return whether the job may have run in its current delivery; False is certain."""
        return True

    def _exchange(
        self,
        settled: list[tuple[Job, str | None]],
        me: Registration,
        limit: int,
        queues: Sequence[str] | None,
        lease_seconds: float,
        now: float | None,
    ) -> tuple[list[Job], list[Job]]:
        dead, nested = self._look_for_dead(), self.in_transaction

        def exchange(durable: bool) -> tuple[list[Job], list[Job]]:
            with self._write(durable=durable, in_batch=True) as tx:
                at = self._time(now)
                lost = self._complete_all(tx, settled, at)
                if lost and nested:
                    raise _lost(tx, "complete", lost[0])
                self._recover(tx, dead, at)
                jobs = _claim(tx, me, limit, queues, lease_seconds, at) if limit else []
                # guard: a claim of the last attempt is synced
                if not durable and any(job.attempts == job.max_attempts for job in jobs):
                    raise LastAttempt
            return jobs, lost

        try:
            # guard: the fused call is synced
            return exchange(durable=bool(settled) or nested)
        except LastAttempt:  # the power must not give it another: take it anew, and sync
            return exchange(durable=True)

    def _complete_all(self, tx: Session, settled: list[tuple[Job, str | None]], now: float) -> list[Job]:
        """Complete these, and return those whose lease was lost."""
        # guard: the fused call tells a lost lease
        return [job for job, result in settled if not _complete(tx, job, result, now)]

    def complete(self, job: Job, result: Any = None, *, now: float | None = None) -> None:
        """Make a `processing` job `completed`, with a result that JSON can hold. Raises LeaseLost."""
        encoded = encode_result(result)
        with self._write(in_batch=True) as tx:
            # guard: complete needs a held lease
            if not _complete(tx, job, encoded, self._time(now)):
                raise _lost(tx, "complete", job)

    def fail(
        self,
        job: Job,
        error: str,
        *,
        retry: bool = True,
        retry_in_seconds: float | None = None,
        now: float | None = None,
    ) -> str:
        """End the attempt with an error, and return the job's new state, "scheduled" or "failed". Raises LeaseLost.

        retry: whether the job gets another attempt, if one is left.
        retry_in_seconds: when it is due; None: in `backoff_seconds(job.attempts)`.
        """
        now = self._time(now)
        delay = backoff_seconds(job.attempts) if retry_in_seconds is None else retry_in_seconds
        # guard: no attempt after the last
        again = retry and job.attempts < job.max_attempts
        params = {"now": now, "run_at": now + finite("retry_in_seconds", delay), "error": error_text(error)}
        # guard: fail is synced
        self._settle("fail", RETRY if again else FAIL, job, params, event="failed", durable=True)
        return "scheduled" if again else "failed"

    def release(self, job: Job, *, now: float | None = None) -> None:
        """Make a `processing` job `pending` again; the attempt does not count. Raises LeaseLost."""
        with self._write(durable=False) as tx:
            if not self._release(tx, job, self._time(now)):
                raise _lost(tx, "release", job)

    def _release(self, tx: Session, job: Job, now: float) -> bool:
        """Make a job pending again as if this delivery had not been; record it if it had begun."""
        params = {"id": job.id, "token": job.lease_token, "now": now, "error": None}
        if job.lease_token and self._has_begun(tx, job):
            tx.change(RECORD, {**params, "event": "released", "actor": job.consumer})
        tx.ring = True
        return bool(tx.change(RELEASE, params))

    def extend(self, job: Job, lease_seconds: float = LEASE_SECONDS, *, now: float | None = None) -> None:
        """Renew the lease, so that it expires this many seconds from now. Raises LeaseLost."""
        self._settle("extend", EXTEND, job, {"lease_expires_at": self._time(now) + valid_lease(lease_seconds)})

    def update(self, job: Job, *, progress: float | None = None, result: Any = None) -> None:
        """Store the progress, from 0 to 1, or a partial result of a `processing` job; None changes nothing.

        A result is on disk when this returns, so what the task does next may depend on it; progress alone is not.
        Raises LeaseLost.
        """
        if progress is not None and not (isinstance(progress, (int, float)) and 0 <= progress <= 1):
            raise ValueError(f"expected progress between 0 and 1, got {progress!r}")
        params = {"progress": progress, "result": encode_result(result)}
        # guard: a result that a task stores is synced
        self._settle("update", UPDATE, job, params, durable=result is not None)

    def _settle(
        self, verb: str, sql: str, job: Job, params: Params, event: str | None = None, durable: bool = False
    ) -> None:
        """Run a transition that needs the job's lease; record it where it ends an attempt without completing."""
        params |= {"id": job.id, "token": job.lease_token}
        with self._write(durable=durable) as tx:
            if event and job.lease_token:
                tx.change(RECORD, {**params, "event": event, "actor": job.consumer})
                tx.ring = True
            # guard: fail, release, extend, update need a held lease
            if not tx.change(sql, params):
                raise _lost(tx, verb, job)

    # Operating

    def resubmit(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """Make a finished job `pending` again, with all its attempts.

        Raises JobNotFound, QueueFull, or InvalidTransition if the job is not finished or another one has its key.
        """
        self._operate("resubmit", "resubmitted", RESUBMIT, job_id, by, now)

    def mark_failed(
        self, job_id: int, error: str = "marked as failed", *, by: str | None = None, now: float | None = None
    ) -> None:
        """Make an unfinished job `failed`, with this error; a consumer that runs it loses its lease.

        Raises JobNotFound, or InvalidTransition if the job is finished.
        """
        self._operate("mark as failed", "marked failed", MARK_FAILED, job_id, by, now, error=error_text(error))

    def cancel(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """Make an unfinished job `cancelled`; a consumer that runs it loses its lease.

        Raises JobNotFound, or InvalidTransition if the job is finished.
        """
        self._operate("cancel", "cancelled", CANCEL, job_id, by, now)

    def assign(self, job_id: int, consumer: str | None, *, by: str | None = None, now: float | None = None) -> None:
        """Let only this consumer run an unfinished job, whatever queues it serves (None: any consumer).

        A consumer that runs it loses its lease, and that attempt does not count. Raises JobNotFound, or
        InvalidTransition if the job is finished.
        """
        assigned_to = None if consumer is None else valid_name("consumer", consumer)
        self._operate("assign", f"assigned to {consumer or 'any'}", ASSIGN, job_id, by, now, assigned_to=assigned_to)

    def _operate(
        self, verb: str, event: str, sql: str, job_id: int, by: str | None, now: float | None, **values: Any
    ) -> None:
        params = {"error": None, **values, "id": valid_id(job_id), "now": self._time(now)}
        with self._write() as tx:
            tx.change(RECORD, {**params, "event": event, "actor": operator_name(by)})
            # guard: an operator is told of a refusal
            if not tx.change(sql, params):
                raise _refusal(tx, verb, job_id)
            tx.ring = True

    @contextmanager
    def exclusive(self, job_ids: Sequence[int] | None = None) -> Iterator[None]:
        """Open a transaction during which nobody else changes these jobs (None: changes or enqueues any job).

        What is read in the block is still true when the block acts on it. Keep it short: others wait.
        """
        with self._write() as tx:
            if job_ids is None:
                self._lock_out_writers(tx)
            else:
                self._lock_jobs(tx, sorted(valid_id(job_id) for job_id in job_ids))
            yield

    def pause(self, queue: str) -> None:
        """Deliver nothing from this queue until `resume`. What runs goes on."""
        self._set_queue(SET_PAUSED, queue, 1)

    def resume(self, queue: str) -> None:
        """Deliver from this queue again."""
        self._set_queue(SET_PAUSED, queue, 0)

    def limit(self, queue: str, max_pending: int | None) -> None:
        """Refuse to enqueue or resubmit while so many jobs of the queue are pending; None: never refuse.

        Jobs that are scheduled, or assigned to a consumer, do not count.
        """
        most = None if max_pending is None else valid_int("max_pending", 1, max_pending)
        with self._write() as tx:
            self._set_queue(SET_MAX_PENDING, queue, most)
            self._count_pending(tx, [queue])

    def _set_queue(self, sql: str, queue: str, value: int | None) -> None:
        with self._write() as tx:
            tx.change(ADD_QUEUE, {"queue": valid_name("queue", queue)})
            tx.change(sql, {"queue": queue, "value": value})
            tx.ring = True

    def delete_jobs(self, job_ids: Iterable[int] | None = None, *, force: bool = False) -> int:
        """Delete these jobs (None: all) and their history, all or none; return how many jobs there were.

        Raises InvalidTransition if one of them is `processing`, unless `force` is set. SQLite may give the newest id to
        the next job.
        """
        chosen = [{}] if job_ids is None else [{"id": valid_id(job_id)} for job_id in job_ids]
        where = "1 = 1" if job_ids is None else "id = :id"
        with self._write() as tx:
            self._lock_out_writers(tx)
            running = sum(len(tx.run(f"SELECT id FROM jobs WHERE state = 'processing' AND {where}", p)) for p in chosen)
            # guard: running jobs are not deleted
            if running and not force:
                raise InvalidTransition(f"cannot delete jobs: {running} of them are processing")
            for p in chosen:
                tx.change(f"DELETE FROM history WHERE job_id IN (SELECT id FROM jobs WHERE {where})", p)
            return sum(tx.change(f"DELETE FROM jobs WHERE {where}", p) for p in chosen)

    def prune(self, older_than_seconds: float, *, states: Sequence[str] = FINISHED, now: float | None = None) -> int:
        """Delete jobs of these states that finished longer ago than this, and return how many.

        Others write meanwhile: it is done in short transactions. Also delete consumers that are gone for as long.
        """
        before = self._time(now) - finite("older_than_seconds", older_than_seconds)
        with self._write(durable=False) as tx:
            tx.change(FORGET, {"before": before})
        return sum(self._prune(valid_state(FINISHED, state), before) for state in states)

    def _prune(self, state: str, before: float) -> int:
        pruned = 0
        while True:
            with self._write(durable=False) as tx:
                rows = tx.run(PRUNABLE, {"state": state, "before": before, "limit": PRUNE_BATCH})
                for row in rows:
                    tx.change("DELETE FROM history WHERE job_id = :id", {"id": row[0]})
                    tx.change("DELETE FROM jobs WHERE id = :id", {"id": row[0]})
            pruned += len(rows)
            if len(rows) < PRUNE_BATCH:
                return pruned

    # Consumers

    def consumers(self) -> list[dict[str, Any]]:
        """Return the consumers, the latest start first; those that are gone, until `prune` forgets them.

        Each is a dict: "name", "token", "host", "pid"; "queues", a list (None: all); "tasks", the list of those that
        its program has registered; "started_at" and "last_seen_at", Unix seconds; "state": running, stopped or dead;
        "completed" jobs and "failed" attempts, as of its last heartbeat; "job_ids", the list of the jobs it holds.
        """
        columns = "name, token, host, pid, slot, queues, tasks, started_at, last_seen_at, state, completed, failed"
        found = self._dicts(columns, f"SELECT {columns} FROM consumers ORDER BY id DESC", {})
        mine = {me.token for me in self._registry.values()}
        for each in found:
            each["queues"] = each["queues"] and json.loads(each["queues"])
            each["tasks"] = json.loads(each["tasks"])
            if each["state"] == "running" and each["token"] not in mine and not self._is_alive(each["slot"]):
                each["state"] = "dead"
            del each["slot"]
        held: dict[str, list[int]] = {}  # read last: what somebody held who was dead by then stays held
        for job_id, token in self._read("SELECT id, lease_token FROM jobs WHERE state = 'processing'"):
            held.setdefault(token[:16], []).append(job_id)
        return [{**each, "job_ids": sorted(held.get(each["token"], []))} for each in found]

    def wait(
        self, timeout_seconds: float, *, consumer: str, queues: Sequence[str] | None = None, now: float | None = None
    ) -> bool:
        """Sleep until this consumer may find a job, and return True; or return False, after `timeout_seconds`.

        It sleeps for at most a second whatever the timeout, so call it in a loop with `dequeue`.
        """
        me = self._registered(consumer, queues, now)
        params = _served(consumer, queues, 1)

        def due_in() -> float:
            at = self._read(NEXT_EVENT, params)[0][0]
            return math.inf if at is None else cast(float, at) - self._time(now)

        return self._sleep(me, min(timeout_seconds, WAIT_SECONDS), due_in) or due_in() <= 0

    def heartbeat(self, consumer: str, *, completed: int = 0, failed: int = 0, now: float | None = None) -> None:
        """Record that this consumer is alive, and add to its counts of completed jobs and failed attempts."""
        me = self._registered(consumer, None, now)
        params = {"token": me.token, "completed": completed, "failed": failed, "now": self._time(now)}
        with self._write(durable=False) as tx:
            tx.change(HEARTBEAT, params)

    def _register(self, name: str, queues: Sequence[str] | None, now: float | None) -> Registration:
        valid_name("consumer", name)
        if self.in_transaction:
            raise QueueError(
                f"cannot begin consumer {name!r} inside a transaction, which may undo it: dequeue before it"
            )
        with self._registering, ExitStack() as undo:
            if name in self._registry:
                return self._registry[name]
            if len(self._registry) == MAX_CONSUMERS:
                raise QueueError(
                    f"cannot begin consumer {name!r}: this object has {MAX_CONSUMERS}, each with a lock; "
                    "use a name for longer than one job, or end those that are done with leave(name)"
                )
            me = Registration(name, self._take_slot())
            if me.slot:
                undo.callback(me.slot.close)
            params = {"name": name, "token": me.token, "host": socket.gethostname(), "pid": os.getpid()}
            params |= {"slot": me.slot and me.slot.number, "queues": _queue_list(queues), "now": self._time(None)}
            params["tasks"] = json.dumps(sorted(TASKS))
            with self._write(durable=False) as tx:
                if tx.change(SUCCEED, params):
                    # guard: who takes over a slot first takes back its jobs
                    self._recover(tx, [], self._time(now))  # before this consumer publishes in the same slot
                tx.change(REGISTER, params)
            undo.pop_all()
            self._registry = {**self._registry, name: me}
            return me

    def _registered(self, name: str, queues: Sequence[str] | None, now: float | None) -> Registration:
        if isinstance(queues, str):
            raise ValueError(f"expected a list of queues, got {queues!r}")
        return (isinstance(name, str) and self._registry.get(name)) or self._register(name, queues, now)

    def _recover(self, tx: Session, dead: list[str] | None, now: float) -> None:
        """Promote what is due, and take back what expired or lost its consumer."""
        params = {"now": now, "limit": RECOVERY_BATCH}
        due, expired = tx.run(OVERDUE, params)[0]
        # guard: what is due is promoted
        if due:
            tx.change(PROMOTE, params)
            tx.ring = True
        # guard: what expired is taken back
        if expired:
            for row in tx.run(EXPIRED, params):
                self._take_back(tx, to_job(row), "expired", now)
        # guard: the dead lose their jobs at once
        if dead is not None:
            for token in dead:
                tx.change(LEAVE, {"token": token, "state": "dead"})
            for row in tx.run(ORPHANED, params):
                self._take_back(tx, to_job(row), "died", now)

    def _take_back(self, tx: Session, job: Job, event: str, now: float) -> None:
        # guard: an attempt counts when the job begins
        if not self._has_begun(tx, job):
            self._release(tx, job, now)
            return
        what = "died" if event == "died" else "let its lease run out"
        params: Params = {"id": job.id, "token": job.lease_token, "now": now}
        params["error"] = f"consumer {job.consumer} {what} in attempt {job.attempts} of {job.max_attempts}"
        tx.change(RECORD, {**params, "event": event, "actor": job.consumer})
        if not tx.change(TAKE_BACK, params):
            consumers = [row[0] for row in tx.run(LOST_BY, params)][-job.attempts :]
            params["error"] = _set_aside_error(job, consumers, params["error"])
            tx.change(FAIL, params)
        tx.ring = True

    def _look_for_dead(self) -> list[str] | None:
        """Return the tokens of consumers that died, or None when it looked a moment ago."""
        if time.monotonic() - self._looked_for_dead < DEAD_CHECK_SECONDS:
            return None
        self._looked_for_dead = time.monotonic()
        mine = {me.token for me in self._registry.values()}
        return [token for token, slot in self._read(RUNNING) if token not in mine and not self._is_alive(slot)]

    def leave(self, consumer: str, *, now: float | None = None) -> None:
        """End a consumer of this object: release the jobs that it holds, and close its files.

        Its next dequeue registers it anew. Nothing happens if this object has no consumer of this name.
        """
        if me := self._registry.get(consumer):
            self._leave([me], now)

    def _leave(self, leaving: Sequence[Registration], now: float | None = None) -> None:
        with self._write(durable=False) as tx:
            for me in leaving:
                self._release_held(tx, me, now)
                tx.change(LEAVE, {"token": me.token, "state": "stopped"})
        with self._registering:
            self._registry = {name: me for name, me in self._registry.items() if me not in leaving}
        for me in leaving:
            if me.slot:
                me.slot.close()

    def _release_held(self, tx: Session, me: Registration, now: float | None) -> None:
        for row in tx.run(HELD_BY, {"token": me.token}):
            # guard: a consumer that closes returns its jobs
            self._release(tx, to_job(row), self._time(now))


def _complete(tx: Session, job: Job, result: str | None, now: float) -> int:
    return tx.change(COMPLETE, {"id": job.id, "token": job.lease_token, "result": result, "now": now})


def _claim(
    tx: Session, me: Registration, limit: int, queues: Sequence[str] | None, lease_seconds: float, now: float
) -> list[Job]:
    params = claim_params(me, limit, queues, lease_seconds, now)
    if limit > 1:
        params["limit"] = _batch(tx.run(NEXT_ATTEMPTS, params), me.prefetches)
    return claimed_jobs(tx, tx.run(CLAIM, params), params)


def claim_params(
    me: Registration, limit: int, queues: Sequence[str] | None, lease_seconds: float, now: float
) -> Params:
    params = _served(me.name, queues, limit)
    params["now"] = now
    params["lease_expires_at"] = now + valid_lease(lease_seconds)
    # guard: each claim has a number of its own
    params["token"] = f"{me.token}.{next(me.claims)}"
    return params


def claimed_jobs(tx: Session, rows: list[Any], params: Params) -> list[Job]:
    """Return the jobs of the rows that a claim returned, in order."""
    jobs = [to_job(row) for row in rows]
    if len(jobs) > 1:
        jobs.sort(key=lambda job: (-job.priority, job.run_at, job.id))
    return [job for job in jobs if not _fail_unreadable(tx, job, params["now"])]


def _fail_unreadable(tx: Session, job: Job, now: float) -> bool:
    """Fail a job that Python's JSON parser cannot read: it must not stop the jobs behind it."""
    if not isinstance(job.payload, Excerpt) and not isinstance(job.result, Excerpt):
        return False
    params = {"id": job.id, "token": job.lease_token, "now": now, "error": UNREADABLE}
    with tx:
        tx.change(RECORD, {**params, "event": "failed", "actor": job.consumer})
        tx.change(FAIL, params)
    return True


def _batch(attempts: list[tuple[int, int]], prefetches: bool) -> int:
    """Return how many of the next jobs, by their attempts so far and at most, to deliver together.

    A job that was delivered before comes alone: when it kills its consumer again, no other job pays for it. So does one
    whose last attempt this is, unless it counts only when it begins.
    """
    # guard: a job that may run once comes alone
    alone = (n for n, (made, most) in enumerate(attempts) if made or (most == 1 and not prefetches))
    # guard: a job delivered before comes alone
    return max(1, next(alone, len(attempts)))


def _set_aside_error(job: Job, consumers: list[str], error: str) -> str:
    once = "; it may have done all its work, and is not run again, as its max_attempts is 1"
    number = f"{job.attempts} attempt{'' if job.attempts == 1 else 's'}"
    return f"failed after {number}; lost by {', '.join(consumers)}; {error}{once if job.max_attempts == 1 else ''}"


def _lost(tx: Session, verb: str, job: Job) -> QueueError | ValueError:
    """Return the error for a verb whose lease token is not the current one, and doom the transaction around it."""
    if job.lease_token is None:
        return _refusal(tx, verb, job.id)
    tx.lost = LeaseLost(f"cannot {verb} job {job.id}: the lease of {job.consumer} on it was lost")
    return tx.lost


def _refusal(tx: Session, verb: str, job_id: int) -> QueueError | ValueError:
    rows = tx.run("SELECT state, key, queue FROM jobs WHERE id = :id", {"id": job_id})
    if not rows:
        return JobNotFound(f"cannot {verb} job {job_id}: no such job")
    state, key, queue = rows[0]
    if verb == "resubmit" and state in FINISHED:
        room, max_pending = next(iter(tx.run(ROOM, {"queue": queue})), (None, None))
        if max_pending is not None and room is not None and room <= 0:
            return _full(f"resubmit job {job_id}", queue, max_pending)
        return InvalidTransition(f"cannot resubmit job {job_id}: another unfinished job has its key {key!r}")
    return InvalidTransition(f"cannot {verb} job {job_id}: it is {state}")


def _full(verb: str, queue: str, max_pending: int, jobs: int = 1) -> QueueFull | ValueError:
    if jobs > max_pending:
        return ValueError(f"expected at most {max_pending} jobs, the limit of queue {queue!r}, got {jobs} at once")
    room = "is at" if jobs == 1 else f"has no room for {jobs} jobs within"
    return QueueFull(f"cannot {verb}: queue {queue!r} {room} its limit of {max_pending} pending jobs")


def _served(consumer: str, queues: Sequence[str] | None, limit: int) -> Params:
    return {"consumer": consumer, "limit": limit, "queues": _queue_list(queues)}


def _queue_list(queues: Sequence[str] | None) -> str | None:
    return None if queues is None else json.dumps([valid_name("queue", queue) for queue in queues])


def _new_job(
    task: str | Task,
    queue: str,
    priority: int,
    delay_seconds: float,
    run_at: float | None,
    max_attempts: int | None,
    key: str | None,
    assigned_to: str | None,
    now: float,
) -> Params:
    name = valid_name("task", task.name if isinstance(task, Task) else task)
    entry = task if isinstance(task, Task) else TASKS.get(name)
    if max_attempts is None:
        max_attempts = entry.max_attempts if entry else DEFAULT_MAX_ATTEMPTS
    due = now + finite("delay_seconds", delay_seconds) if run_at is None else finite("run_at", run_at)
    return {
        "task": name,
        "queue": valid_name("queue", queue),
        "state": "scheduled" if due > now else "pending",
        "priority": valid_int("priority", -(2**31), priority),
        "run_at": due,
        "max_attempts": valid_int("max_attempts", 1, max_attempts),
        "key": None if key is None else valid_name("key", key),
        "assigned_to": None if assigned_to is None else valid_name("consumer", assigned_to),
        "now": now,
        "number": 1,
    }


def open_queue(
    url: str | os.PathLike[str] | None = None,
    *,
    create: bool = True,
    durability: str | None = None,
    group: str | None = None,
) -> PersistentQInterface:
    """Open a queue and return it.

    url: a path, sqlite:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE; None: $PQUEUE_URL, else var/queue.db.
    create: create the queue if it does not exist; else raise QueueError.
    durability: "full" or "normal", see guarantee 1; None: $PQUEUE_DURABILITY, else "full".
    group: on SQLite, the group of accounts that may use a new queue; None: $PQUEUE_GROUP, else only this account.

    Raises ValueError for a url that names neither a file nor a server, such as ":memory:"; SchemaMismatch for a file
    that is not a queue of this version; QueueError if it cannot be opened.
    """
    durability = durability or os.environ.get("PQUEUE_DURABILITY") or "full"
    if is_postgres(url):
        return _on_postgres(_url(url), create, durability)
    from pqueue_sqlite import PersistentQSQLite

    group = group or os.environ.get("PQUEUE_GROUP") or None
    return PersistentQSQLite(sqlite_path(url), create=create, durability=durability, group=group)


def _on_postgres(url: str, create: bool, durability: str) -> PersistentQInterface:
    try:
        from pqueue_sqlalchemy import OnPostgres
    except ImportError as error:
        raise QueueError(f"cannot use PostgreSQL: {error}; pip install SQLAlchemy 'psycopg[binary]'") from None
    return OnPostgres(url, create=create, durability=durability)


def is_postgres(url: str | os.PathLike[str] | None = None) -> bool:
    """Return whether this URL, by default that of `open_queue`, names a PostgreSQL server. Raises ValueError."""
    return _url(url).startswith(("postgresql:", "postgresql+", "postgres:"))


def sqlite_path(url: str | os.PathLike[str] | None = None) -> Path:
    """Return the absolute path that this URL, by default that of `open_queue`, names. Raises ValueError."""
    text = _url(url)
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "sqlite":
        server = "" if scheme.startswith("postgres") else ", or postgresql://… for a server"
        raise ValueError(f"expected a path or sqlite:///PATH{server}, got {scheme}://…")
    if separator and (rest in ("", "/") or "?" in rest):
        raise ValueError(
            f"expected sqlite:///PATH, without options, got {'one with options' if '?' in rest else 'none'}"
        )
    return file_path(rest.removeprefix("/") if separator else text)


def _url(url: str | os.PathLike[str] | None) -> str:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if text is not None and not isinstance(text, str):
        raise ValueError(f"expected a path or a URL as str or Path, got {short(url)}")
    return text or os.environ.get("PQUEUE_URL") or DEFAULT_URL
