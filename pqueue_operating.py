"""The verbs of an operator: they change single jobs, all that match a filter, or queues."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from itertools import count
from types import EllipsisType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from typing_extensions import Unpack

import pqueue_schema
from pqueue_backend import Session
from pqueue_dependencies import FREE_KEYS, NEEDED, Depending
from pqueue_groups import Grouping, valid_group, valid_rate
from pqueue_outcomes import Counting, count_events
from pqueue_schema import FINISHED, UNTAKEN
from pqueue_search import Filters
from pqueue_tasks import actor
from pqueue_values import (
    InvalidTransition,
    Job,
    JobNotFound,
    Params,
    QueueError,
    QueueFull,
    above_0,
    due_time,
    duration,
    encode_json,
    error_text,
    time_of,
    to_json,
    valid_id,
    valid_int,
    valid_list,
    valid_name,
    valid_priority,
)

CHANGED = {"run_at": "time", "expires_at": "expiry", "expire_seconds": "expiry"}  # in the history
BATCH = 500  # jobs changed in one transaction
REPLAY_SECONDS = 86_400.0  # the lease of a replay, which is never renewed


class Changed(int):
    """The number of jobs changed; `refused` counts those that matched, but whose state did not allow it."""

    refused: int


def spread(start: float, rate: tuple[int, float | timedelta] | None) -> Iterator[float]:
    """Return times from `start` on, at a rate of (jobs, seconds); None: always `start`. Raises ValueError."""
    jobs, seconds = (1, 0.0) if rate is None else valid_rate(rate)
    return (start + number * seconds / jobs for number in count())


class Operating(Grouping, Depending, Counting):
    """The verbs of an operator."""

    # One job

    def resubmit(
        self,
        job_id: int,
        *,
        delay_seconds: float | timedelta = 0,
        run_at: float | datetime | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> None:
        """Make a finished job `pending` again, with all its attempts; jobs that failed with it wait for it again.

        delay_seconds, run_at: when to run it, as for `enqueue`; until then it is `scheduled`.

        Raises JobNotFound, QueueFull, or InvalidTransition if the job is not finished or another one holds its key.
        """
        now = self._time(now)
        due = due_time(delay_seconds, run_at, now)
        self._operator_verb("resubmit", "resubmitted", pqueue_schema.RESUBMIT, job_id, by, now, FINISHED, run_at=due)

    def mark_failed(
        self, job_id: int, error: str = "marked as failed", *, by: str | None = None, now: float | None = None
    ) -> None:
        """Make an unfinished job `failed`, with this error; a consumer running it loses its lease.

        Raises JobNotFound, or InvalidTransition if the job is finished.
        """
        ended = {"state": "failed", "error": error_text(error)}
        self._operator_verb("mark as failed", "marked failed", pqueue_schema.END, job_id, by, now, **ended)

    def cancel(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """Make an unfinished job `cancelled`; a consumer running it loses its lease.

        Raises JobNotFound, or InvalidTransition if the job is finished.
        """
        self._operator_verb("cancel", "cancelled", pqueue_schema.END, job_id, by, now, state="cancelled")

    def assign(self, job_id: int, consumer: str | None, *, by: str | None = None, now: float | None = None) -> None:
        """Reserve an unfinished job for this consumer, whichever queues it serves (None: for any consumer).

        A consumer running it loses its lease, and that attempt does not count. Raises JobNotFound, or InvalidTransition
        if the job is finished.
        """
        assigned_to = None if consumer is None else valid_name("consumer", consumer)
        self._operator_verb(
            "assign", f"assigned to {consumer or 'any'}", pqueue_schema.ASSIGN, job_id, by, now, assigned_to=assigned_to
        )

    def _operator_verb(
        self,
        verb: str,
        event: str,
        sql: str,
        job_id: int,
        by: str | None,
        now: float | None,
        allowed: Sequence[str] = (),
        **values: Any,
    ) -> None:
        params = {"error": None, **values, "id": valid_id(job_id), "now": self._time(now)}
        with self._transaction() as session:
            # guard: a job that is completed no longer was counted
            if allowed == FINISHED:
                self._count_new(session)
            session.change(pqueue_schema.RECORD, {**params, "event": event, "actor": actor(by)})
            # guard: a job that an operator ends is counted
            if sql is pqueue_schema.END:
                count_events(session, [job_id], params["state"], params["now"])
            done = session.change(sql, params)
            # guard: resubmit takes a key whose time is over
            if not done and allowed and session.change(FREE_KEYS, {"ids": to_json([job_id]), "now": params["now"]}):
                done = session.change(sql, params)
            # guard: a refused operator verb raises
            if not done:
                raise refusal(session, verb, job_id, allowed)
            session.wakes = True
            if sql is pqueue_schema.RESUBMIT:
                self._restore(session, job_id, params["now"])
            # guard: a job that an operator ended is followed up
            if sql is pqueue_schema.END:
                self._job_ended(session, job_id, params["now"])

    @contextmanager
    def exclusive(self, job_ids: Sequence[int] | None = None) -> Iterator[None]:
        """Open a transaction that locks these jobs (None: all jobs, and enqueueing).

        What is read in the block stays true until its end. Keep it short: it blocks other writers. On PostgreSQL,
        `transaction` may be opened around it, but not inside.
        """
        session = self._transaction()
        with session.user_transaction():
            if job_ids is None:
                self._lock_out_writers(session)
            else:
                self._lock_jobs(session, sorted(valid_id(job_id) for job_id in valid_list("job ids", job_ids)))
            yield

    def pause(self, queue: str, *, by: str | None = None, now: float | None = None) -> None:
        """Stop delivering jobs of this queue until `resume`. Running jobs continue."""
        self._set_queue(queue, f"paused queue {queue}", by, now, paused=1)

    def resume(self, queue: str, *, by: str | None = None, now: float | None = None) -> None:
        """Deliver jobs of this queue again."""
        self._set_queue(queue, f"resumed queue {queue}", by, now, paused=0)

    def delete_jobs(
        self, job_ids: Iterable[int] | None = None, *, force: bool = False, now: float | None = None
    ) -> int:
        """Delete these jobs (None: all) and their history, all or none; return how many were deleted.

        Raises InvalidTransition if one of them is `processing`, or an unfinished job runs after it, unless `force` is
        set: then the jobs that run after it fail, as if it had been cancelled. On SQLite, the next job may get the id
        of the newest one deleted.
        """
        ids = None if job_ids is None else [valid_id(job_id) for job_id in valid_list("job ids", job_ids)]
        params, now = {"ids": to_json(ids)}, self._time(now)
        with self.exclusive(ids), self._transaction() as session:
            # guard: a job that is deleted was counted
            self._count_new(session)
            states = session.run(pqueue_schema.STATES_OF, params) if ids is not None else ()
            running = count_running(session) if ids is None else [state for _, state in states].count("processing")
            # guard: running jobs are not deleted
            if running and not force:
                raise InvalidTransition(f"cannot delete jobs: {running} of them are processing")
            for job_id, dependent in session.run(NEEDED, params) if ids is not None else ():
                # guard: a job that another one needs is not deleted
                if not force:
                    raise InvalidTransition(f"cannot delete job {job_id}: job {dependent} runs after it")
                with suppress(InvalidTransition):
                    self.cancel(job_id, now=now)
            if ids is None:
                session.change("DELETE FROM dependencies")
                session.change("DELETE FROM history WHERE job_id <> 0")  # 0: the mark of a move
                deleted = session.change("DELETE FROM jobs")
            else:
                session.change(pqueue_schema.DELETE_HISTORY, params)
                session.change(pqueue_schema.DELETE_DEPENDENCIES, params)
                deleted = session.change(pqueue_schema.DELETE_JOBS, params)
            self._count_new(session)  # from the last id left
            return deleted

    def change(
        self,
        job_id: int,
        *,
        payload: Any = ...,
        priority: int | None = None,
        delay_seconds: float | timedelta | None = None,
        run_at: float | datetime | None = None,
        queue: str | None = None,
        group: str | EllipsisType | None = ...,
        max_attempts: int | None = None,
        expires_at: float | datetime | None = None,
        expire_seconds: float | timedelta | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> None:
        """Change a job that no consumer has taken. What is not given stays as it is; the options are those of enqueue.

        delay_seconds, run_at: a new time makes it `scheduled`, or `pending` if it has come; a waiting job still waits.
        queue: the queue to move the job to; it is created if it does not exist.
        group: its new group; None: none.
        max_attempts: more than the job has had.

        Raises JobNotFound; InvalidTransition if the job is in another state, or another one holds its key in the new
        queue; QueueFull if the new queue is at its limit.
        """
        now = self._time(now)
        if expires_at is not None and expire_seconds is not None:
            raise ValueError("expected expires_at or expire_seconds, got both")
        is_timed = delay_seconds is not None or run_at is not None
        values: Params = {
            "payload": None if payload is ... else encode_json("payload", payload),
            "priority": None if priority is None else valid_priority(priority),
            "run_at": due_time(0 if delay_seconds is None else delay_seconds, run_at, now) if is_timed else None,
            "queue": None if queue is None else valid_name("queue", queue),
            "group": None if group is ... else "" if group is None else valid_group(group),
            "max_attempts": None if max_attempts is None else valid_int("max_attempts", 1, max_attempts),
            "expires_at": None if expires_at is None else time_of("expires_at", expires_at),
            "expire_seconds": None if expire_seconds is None else above_0("expire_seconds", expire_seconds),
        }
        changed = ", ".join(CHANGED.get(name, name) for name, value in values.items() if value is not None)
        if not changed:
            raise ValueError(f"expected a change of {', '.join(values)} or delay_seconds, got none")
        with self.exclusive([job_id]), self._transaction() as session:
            self._prepare_change(session, job_id, values, now)
            self._operator_verb(
                "change", f"changed {changed}", pqueue_schema.CHANGE, job_id, by, now, UNTAKEN, **values
            )

    def _prepare_change(self, session: Session, job_id: int, values: Params, now: float) -> None:
        """Refuse a change that leaves no attempt or that another queue has no room for; prepare that queue for the job,
        and let its groups take turns if the job will have a group."""
        sql = 'SELECT attempts, queue, "group", task, key FROM jobs WHERE id = :id'
        for attempts, before, old_group, task, key in session.run(sql, {"id": job_id}):
            most, queue, group = values["max_attempts"], values["queue"] or before, values["group"]
            # guard: a changed job has an attempt left
            if most is not None and most <= attempts:
                raise ValueError(f"expected max_attempts above {attempts}, which job {job_id} has had, got {most}")
            if queue != before:
                self._count_new(session)
                self._add_queue(session, {"queue": queue, "task": task, "group": ""})
                # guard: a full queue refuses a job of another queue
                if full := queue_full(session, f"move job {job_id}", queue):
                    raise full
                session.change(pqueue_schema.FREE_KEY, {"queue": queue, "task": task, "key": key, "now": now})
            # guard: a job that gets a group is delivered
            if old_group if group is None else group:
                self._let_groups_take_turns(session, queue)

    def run_now(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """Make a `scheduled` or `waiting` job `pending`.

        Raises JobNotFound, or InvalidTransition if it is in another state.
        """
        self._operator_verb("advance", "run now", pqueue_schema.RUN_NOW, job_id, by, now)

    def lease_again(self, job_id: int, consumer: str, *, max_attempts: int, now: float | None = None) -> Job:
        """Make a finished job `processing` again, as in its last attempt, and return it.

        Only for a copy of the database, or in a transaction that is rolled back: `pqueue replay` runs its task there.
        max_attempts: that of its task, for a job that was never delivered. The job holds no key.

        Raises JobNotFound, or InvalidTransition if the job is not finished.
        """
        now = self._time(now)
        values = {"token": f"{os.urandom(8).hex()}.1", "lease_expires_at": now + REPLAY_SECONDS}
        values |= {
            "consumer": valid_name("consumer", consumer),
            "max_attempts": valid_int("max_attempts", 1, max_attempts),
        }
        self._operator_verb(
            "replay", "replayed", pqueue_schema.LEASE_AGAIN, job_id, None, now, allowed=FINISHED, **values
        )
        return self.get(job_id)

    # All jobs that match

    def resubmit_where(
        self,
        *,
        delay_seconds: float | timedelta = 0,
        rate: tuple[int, float | timedelta] | None = None,
        by: str | None = None,
        now: float | None = None,
        **filters: Unpack[Filters],
    ) -> Changed:
        """Do what `resubmit` does with all jobs that match; return how many were changed.

        rate: (jobs, seconds or timedelta): make this many jobs due in each period of this length, the oldest first;
            None: all are due after `delay_seconds`.

        The filters are those of `list_jobs`, of which one at least is needed. The jobs are changed in short
        transactions, so as not to block other writers: an error such as QueueFull does not undo earlier ones.
        """
        now, by = self._time(now), actor(by)
        times = spread(now + duration("delay_seconds", delay_seconds), rate)
        return self.act_where(
            lambda job_id: self.resubmit(job_id, run_at=next(times), by=by, now=now), parents_first=True, **filters
        )

    def run_now_where(self, *, by: str | None = None, now: float | None = None, **filters: Unpack[Filters]) -> Changed:
        """Do what `run_now` does with all jobs that match, as `resubmit_where` does."""
        at, who = self._time(now), actor(by)  # one time for all, by which they are one operation
        return self.act_where(lambda job_id: self.run_now(job_id, by=who, now=at), **filters)

    def mark_failed_where(
        self,
        error: str = "marked as failed",
        *,
        by: str | None = None,
        now: float | None = None,
        **filters: Unpack[Filters],
    ) -> Changed:
        """Do what `mark_failed` does with all jobs that match, as `resubmit_where` does."""
        at, who, text = self._time(now), actor(by), error_text(error)
        return self.act_where(lambda job_id: self.mark_failed(job_id, text, by=who, now=at), **filters)

    def cancel_where(self, *, by: str | None = None, now: float | None = None, **filters: Unpack[Filters]) -> Changed:
        """Do what `cancel` does with all jobs that match, as `resubmit_where` does."""
        at, who = self._time(now), actor(by)
        return self.act_where(lambda job_id: self.cancel(job_id, by=who, now=at), **filters)

    def delete_where(self, **filters: Unpack[Filters]) -> Changed:
        """Delete all jobs that match, and their history, as `resubmit_where` does; those `processing` are refused."""
        return self.act_where(lambda job_id: self.delete_jobs([job_id]), **filters)

    def clear(self, queue: str, *, by: str | None = None, now: float | None = None) -> int:
        """Cancel all jobs of a queue that no consumer has taken, and return how many. Running jobs continue."""
        return self.cancel_where(queue=valid_name("queue", queue), state=UNTAKEN, by=by, now=now)

    def act_where(
        self, act: Callable[[int], Any], *, parents_first: bool = False, **filters: Unpack[Filters]
    ) -> Changed:
        """Call act with the id of each job that matches, as `resubmit_where` does; a job that it refuses by raising
        InvalidTransition or JobNotFound is counted as refused.

        parents_first: whether jobs precede those that run after them, as they must to be resubmitted. To be ended or
            deleted, they must follow.
        """
        # guard: a verb for all jobs that match needs a filter
        if all(value is None for name, value in filters.items() if name != "shown"):
            raise ValueError("expected a filter, such as state or queue, got none")
        found: list[int] = []
        search: Params = {"limit": BATCH, "seconds": math.inf, "excerpt": 0}
        while jobs := self.search_jobs(filters, before_id=found[-1] if found else None, **search)[0]:
            found += [job.id for job in jobs]
        if parents_first:  # parents have lower ids
            found.reverse()
        changed = refused = 0
        for start in range(0, len(found), BATCH):
            ids = found[start : start + BATCH]
            with self.exclusive(ids):
                jobs, _ = self.search_jobs({**filters, "ids": ids}, **search)  # a job may no longer match
                errors = self.act_on([job.id for job in jobs], act, parents_first=parents_first)
            changed, refused = changed + len(jobs) - len(errors), refused + len(errors)
        result = Changed(changed)
        result.refused = refused
        return result

    def act_on(
        self, job_ids: Iterable[int], act: Callable[[int], Any], *, parents_first: bool = False
    ) -> list[InvalidTransition | JobNotFound]:
        """Call act with each of these ids, as `act_where` does, in one transaction; return the errors of those refused.

        A job that failed with another one, which this has resubmitted, is not refused: it waits again.
        """
        errors: list[InvalidTransition | JobNotFound] = []
        ids = sorted({valid_id(job_id) for job_id in valid_list("job ids", job_ids)})
        with self.exclusive(ids):
            states = dict(self._read(pqueue_schema.STATES_OF, {"ids": to_json(ids)}))
            # guard: a verb for all that match acts in the order of dependencies
            for job_id in ids if parents_first else reversed(ids):
                try:
                    act(job_id)
                except (InvalidTransition, JobNotFound) as error:
                    # guard: a job that is restored with its parent is not refused
                    if states.get(job_id) not in FINISHED or self.get(job_id).state in FINISHED:
                        errors.append(error)
        return errors


def refusal(session: Session, verb: str, job_id: int, allowed: Sequence[str] = ()) -> QueueError | ValueError:
    """Return the error for a job that was not changed. allowed: states in which only its key or a limit prevents it."""
    for state, key, queue in session.run("SELECT state, key, queue FROM jobs WHERE id = :id", {"id": job_id}):
        if state not in allowed:
            return InvalidTransition(f"cannot {verb} job {job_id}: it is {state}")
        if state in FINISHED and (full := queue_full(session, f"{verb} job {job_id}", queue)):
            return full
        return InvalidTransition(f"cannot {verb} job {job_id}: another job has its key {key!r}")
    return JobNotFound(f"cannot {verb} job {job_id}: no such job")


def queue_full(session: Session, verb: str, queue: str, jobs: int = 1) -> QueueFull | ValueError | None:
    """Return the error for a queue that has no room for this many jobs; None: it has."""
    ((room, most),) = session.run(pqueue_schema.ROOM, {"queue": queue}) or [(None, None)]
    if room is None or room >= jobs:
        return None
    if jobs > most:
        return ValueError(f"expected at most {most} jobs, the limit of queue {queue!r}, got {jobs} at once")
    lacks = "is at" if jobs == 1 else f"has no room for {jobs} jobs within"
    return QueueFull(f"cannot {verb}: queue {queue!r} {lacks} its limit of {most} pending jobs")


def count_running(session: Session) -> int:
    return cast(int, session.run("SELECT count(*) FROM jobs WHERE state = 'processing'")[0][0])
