"""Cancelling expired jobs, and deleting finished jobs when the time to keep them is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from types import EllipsisType
from typing import Any

import pqueue_schema
from pqueue_backend import Session
from pqueue_dependencies import Depending
from pqueue_groups import FORGET_GROUPS, Grouping
from pqueue_outcomes import Counting, count_events
from pqueue_schema import FINISHED
from pqueue_values import (
    EXPIRED,
    Params,
    above_0,
    at_least_0,
    error_text,
    interval,
    long_duration,
    to_json,
    valid_list,
    valid_state,
)

PRUNE_BATCH = 1000  # jobs deleted in one transaction of `prune`
KEEP_BATCH = 250  # jobs of each state that a consumer deletes in one transaction
KEEP_SECONDS = 1.0  # consumers delete jobs of a queue no more often
KEEP_WORK_SECONDS = 0.05  # how long a consumer deletes without a pause if there are more
EXPIRE_BATCH = 1000  # expired jobs cancelled in one transaction
CONSUMERS_KEPT_SECONDS = 30 * 86400.0

Keep = str | float | timedelta | None | EllipsisType


class Retaining(Grouping, Depending, Counting):
    """The operations that cancel expired jobs and delete finished ones."""

    def _cancel_expired(self, session: Session, now: float) -> int:
        """Cancel jobs that have expired; return how many."""
        expired = session.run(pqueue_schema.EXPIRING, {"now": now, "limit": EXPIRE_BATCH})
        cancelled: list[int] = []
        for job_id, at, error in expired:
            params = {"id": job_id, "now": now, "state": "cancelled", "event": "cancelled", "actor": "expires_at"}
            params["error"] = _expiry_error(at, error)
            if session.change(pqueue_schema.END, params):  # it may have failed with one that it waits for
                session.change(pqueue_schema.RECORD, params)
                cancelled.append(job_id)
                # guard: a job that has expired is followed up
                self._job_ended(session, job_id, now)
        if cancelled:
            count_events(session, cancelled, "cancelled", now)
        return len(expired)

    def keep(
        self,
        queue: str,
        *,
        completed: Keep = ...,
        failed: Keep = ...,
        cancelled: Keep = ...,
        by: str | None = None,
        now: float | None = None,
    ) -> None:
        """Set how long a queue keeps its finished jobs before consumers delete them, with their history.

        completed, failed, cancelled: a text such as "90s", "15m", "12h", "7d" or "2w", a number of seconds, or a
            timedelta; None: for ever; not given: as before. A new queue keeps completed jobs for 7 days, and failed and
            cancelled ones for 30.

        A job is kept while another part of the queue needs it: see `prune`. Raises ValueError.
        """
        given = {"completed": completed, "failed": failed, "cancelled": cancelled}
        times = {
            state: None if value is None else long_duration(state, value)
            for state, value in given.items()
            if not isinstance(value, EllipsisType)
        }
        if not times:
            raise ValueError(f"expected how long to keep {', '.join(given)} jobs, got none of these")
        kept = [f"{state} {'for ever' if each is None else interval(each)}" for state, each in times.items()]
        columns = {f"keep_{state}_seconds": seconds for state, seconds in times.items()}
        self._set_queue(queue, f"set retention of queue {queue}: {', '.join(kept)}", by, now, **columns)

    def retention(self, *, within_seconds: float = 3600.0, now: float | None = None) -> list[dict[str, Any]]:
        """Return what each queue keeps, and how it grows: three dicts for each, one for each finished state.

        Each has: "queue", "state"; "keep_seconds", None: for ever; "added", the number of jobs that finished within the
        last hour (or other time); "expiring", the number to be deleted within the next; "deleted_at", when the first of
        them is to be deleted, in Unix seconds; None: none is.
        """
        columns = "queue, state, keep_seconds, added, expiring, deleted_at"
        params = {"now": self._time(now), "seconds": above_0("within_seconds", within_seconds)}
        return self._dicts(columns, pqueue_schema.RETENTION, params)

    def prune(
        self,
        older_than_seconds: float | timedelta,
        *,
        states: Sequence[str] = FINISHED,
        progress: Callable[[int], None] | None = None,
        now: float | None = None,
    ) -> int:
        """Delete jobs of these states that finished longer ago than this, and return how many.

        A job enqueued with `key_seconds` is kept until that time is over, the last job of a schedule until its next,
        one that others run after until these have finished, and the newest of all jobs.
        Uses short transactions, so as not to block other writers. Also deletes consumers that ended as long ago.
        `progress` is called after each with the number of jobs deleted so far.
        """
        now = self._time(now)
        # guard: prune deletes no job that finishes later
        before = now - at_least_0("older_than_seconds", older_than_seconds)
        chosen = [valid_state(FINISHED, state) for state in valid_list("states", states)]
        with self._transaction(durable=False) as session:
            session.change(pqueue_schema.DELETE_CONSUMERS, {"before": before})
            session.change(FORGET_GROUPS, {"limit": PRUNE_BATCH})
            self._roll_up(now)
        self._end_turns()
        pruned = 0
        for state in chosen:
            params = {"state": state, "queue": None, "before": before, "now": now, "limit": PRUNE_BATCH}
            batch = PRUNE_BATCH
            while batch == PRUNE_BATCH:
                with self._transaction(durable=False) as session:
                    batch = self._prune(session, params)
                pruned += batch
                if progress:
                    progress(pruned)
        return pruned

    def prune_kept(self, *, now: float | None = None) -> bool:
        """Delete some of the finished jobs that their queues keep no longer; return whether there may be more.

        Consumers call this regularly. In each queue, one of them deletes jobs, at most once a second, in transactions
        of a few hundred jobs.
        """
        now = self._time(now)
        until, has_more = time.monotonic() + KEEP_WORK_SECONDS, False
        params: Params = {"now": now, "since": now - KEEP_SECONDS, "before": None, "limit": KEEP_BATCH}
        for (queue,) in self._read(pqueue_schema.OUTDATED, params):
            is_full = self._prune_queue({**params, "queue": queue}, is_first=True)
            while is_full and time.monotonic() < until:
                is_full = self._prune_queue({**params, "queue": queue})
            has_more = has_more or is_full
        # guard: a queue whose groups have no jobs any more is claimed from without turns
        self._end_turns()
        return has_more

    def _prune_queue(self, params: Params, *, is_first: bool = False) -> bool:
        """Delete a batch of each state, the first one unless another consumer has; return whether one was full."""
        with self._transaction(durable=False, in_batch=True) as session:
            self._lock_as_writer(session)
            # guard: one consumer at a time prunes a queue
            if is_first and not session.change(pqueue_schema.MARK_PRUNED, params):
                return False
            session.change(pqueue_schema.DELETE_CONSUMERS, {"before": params["now"] - CONSUMERS_KEPT_SECONDS})
            if is_first:
                session.change(FORGET_GROUPS, params)
            batches = [self._prune(session, {**params, "state": state}) for state in FINISHED]
        return max(batches) == KEEP_BATCH

    def _prune(self, session: Session, params: Params) -> int:
        self._count_new(session)
        these = {"ids": to_json([row[0] for row in session.run(pqueue_schema.PRUNABLE, params)])}
        session.change(pqueue_schema.DELETE_HISTORY, these)
        session.change(pqueue_schema.DELETE_DEPENDENCIES, these)
        return session.change(pqueue_schema.DELETE_JOBS, these)


def _expiry_error(at: float, error: str | None) -> str:
    """Return why a job was cancelled, and the error of its last attempt, if any."""
    try:
        shown = datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        shown = f"{at:g}"
    return error_text(f"{EXPIRED}: it was to start before {shown}{f'; its last attempt: {error}' if error else ''}")
