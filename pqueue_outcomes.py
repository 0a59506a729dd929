"""Counts of what happened to jobs, by minute, queue and task, written in the commits in which it happens.

A row of the table counts the events of one kind in a period. An attempt that has ended is counted by the buckets of its
run and waiting time, so that the rows are histograms. Resubmitting, pruning and deleting jobs changes no count. After
72 hours minutes are added up to hours, which are deleted after 90 days.

The rows of period 0 are the total of all others, those deleted included, except the ones that are too recent: whose
`shard` is not 0. After two minutes these are added to the total, and merged with those of other connections.

SQLite counts new jobs and most completions later, as a commit would take up to a fifth longer if it wrote another page.
The row of the event `counted` says how far they are counted: jobs up to the id `number`, and completions up to the time
`run_seconds`. Those after it are counted by those who read, every 256 jobs, and before jobs are deleted or resubmitted.
A completion that is not after it, as when a clock was set back, and those of a large batch are counted at once. On
PostgreSQL the statements that insert and complete jobs count them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, NamedTuple

from pqueue_backend import Backend, Session
from pqueue_schema import LAST_COMPLETION, LAST_COUNTED, THESE
from pqueue_values import Job, Params, above_0, finite, interval, time_of, to_json, valid_number

BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)  # seconds, inclusive
UNTIMED = -1  # the bucket of an event without a time
MINUTE, HOUR = 60, 3600  # periods, in seconds
KEPT_SECONDS = {MINUTE: 72 * HOUR, HOUR: 90 * 24 * HOUR}
RECENT_SECONDS = 2 * MINUTE  # after which a minute is added to the total
MAX_TIME = 1e15
FOREVER = 2**60  # a period that contains all times
ROLL_UP_JOBS = 256  # between counts of new jobs and completions
EVENTS = ("enqueued", "completed", "failed", "retried", "released", "died", "expired", "cancelled")

KEY = "period, at, queue, task, event, run, wait, shard"
SUMS = "number, run_seconds, wait_seconds"
COUNT_COLUMNS = f"{KEY}, {SUMS}"
NEW = f"{KEY.removesuffix(', shard')}, {SUMS}"  # by whatever connection
SUM = f"""
ON CONFLICT ({KEY}) DO UPDATE SET number = outcomes.number + excluded.number,
    run_seconds = outcomes.run_seconds + excluded.run_seconds,
    wait_seconds = outcomes.wait_seconds + excluded.wait_seconds"""

# Count events of a task in a queue.
COUNT = f"""
INSERT INTO outcomes ({NEW})
VALUES (60, :at, :queue, :task, :event, :run, :wait, :number, :run_seconds, :wait_seconds)
{SUM}"""

# Count an event of these jobs. :ids is a JSON array.
COUNT_EVENTS = f"""
INSERT INTO outcomes ({NEW})
SELECT 60, :at, queue, task, :event, {UNTIMED}, {UNTIMED}, count(*), 0, 0 FROM jobs
WHERE id {THESE} GROUP BY queue, task
{SUM}"""


def _minute_of(time: str) -> str:
    return f"CAST(max(0.0, min({time}, {MAX_TIME})) / 60 AS INTEGER) * 60"


def _bucket_of(seconds: str) -> str:
    cases = " ".join(f"WHEN {seconds} <= {bound} THEN {bucket}" for bucket, bound in enumerate(BOUNDS))
    return f"CASE {cases} ELSE {len(BOUNDS)} END"


# The jobs and the completions that SQLite has not counted, each a row
NEW_JOBS = f"""
(SELECT {_minute_of("created_at")} AS at, queue, task, 'enqueued' AS event, {UNTIMED} AS run, {UNTIMED} AS wait,
    1 AS number, 0.0 AS run_seconds, 0.0 AS wait_seconds FROM jobs WHERE id > {LAST_COUNTED})"""
_RUN, _WAIT = "finished_at - coalesce(started_at, finished_at)", "coalesce(started_at, finished_at) - run_at"
NEW_COMPLETIONS = f"""
(SELECT {_minute_of("finished_at")} AS at, queue, task, 'completed' AS event, {_bucket_of(_RUN)} AS run,
    {_bucket_of(_WAIT)} AS wait, 1 AS number, max(0.0, {_RUN}) AS run_seconds, max(0.0, {_WAIT}) AS wait_seconds
FROM queues q CROSS JOIN jobs WHERE state = 'completed' AND queue = q.name AND finished_at > {LAST_COMPLETION})"""

EVENT = "queue, task, event, run, wait"
ALL_SUMS = "sum(number), sum(run_seconds), sum(wait_seconds)"
MINUTES_AND_HOURS = "FROM outcomes WHERE period IN (60, 3600) AND at >="


def periods(new_jobs: str) -> str:
    return f"""
SELECT at - at % :step AS step, {EVENT}, CAST(sum(number) AS bigint), sum(run_seconds), sum(wait_seconds) FROM (
    SELECT at, {EVENT}, {SUMS} {MINUTES_AND_HOURS} :since AND at < :until{new_jobs}) counts
GROUP BY at - at % :step, {EVENT} ORDER BY 1, 2, 3"""


def whole(new_jobs: str) -> str:
    return f"""
SELECT 0 AS step, {EVENT}, CAST(sum(number) AS bigint), sum(run_seconds), sum(wait_seconds) FROM (
    SELECT at, {EVENT}, {SUMS} FROM outcomes WHERE period = 0 AND event <> 'counted'
    UNION ALL SELECT at, {EVENT}, {SUMS} FROM outcomes WHERE shard <> 0 AND +period = 60 AND at < :until
    UNION ALL SELECT at, {EVENT}, -number, -run_seconds, -wait_seconds {MINUTES_AND_HOURS} :until
        AND shard = 0{new_jobs}) counts
GROUP BY {EVENT} HAVING sum(number) <> 0 ORDER BY 2, 3"""


def uncounted(condition: str) -> str:
    return "".join(f"\n    UNION ALL SELECT * FROM {new} new WHERE {condition}" for new in (NEW_JOBS, NEW_COMPLETIONS))


# Return the counts by task, and by :step seconds, in [:since, :until).
OUTCOMES = periods(uncounted("at >= :since AND at < :until"))

# Return the counts by task before :until: the total, and what is not in it yet, without what came later.
TOTAL = whole(uncounted("at < :until"))

# Return what is expected of the queues.
EXPECTATIONS = "SELECT name, max_wait_seconds, max_failed_share FROM queues ORDER BY name"

# Return the first period that is counted by itself.
FIRST_PERIOD = "SELECT min(at) FROM outcomes WHERE period = :period"

# Return whether there are minutes before :before that are not in the total.
RECENT = "FROM outcomes WHERE shard <> 0 AND +period = 60 AND at < :before"
HAS_RECENT = f"SELECT EXISTS (SELECT 1 {RECENT})"

# Add these minutes to the total.
ADD_TO_TOTAL = f"""
INSERT INTO outcomes ({COUNT_COLUMNS}) SELECT 0, 0, {EVENT}, 0, {ALL_SUMS} {RECENT} GROUP BY {EVENT}
{SUM}"""

# Mark them as added.
MERGE = f"""
INSERT INTO outcomes ({COUNT_COLUMNS}) SELECT 60, at, {EVENT}, 0, {SUMS} {RECENT}
{SUM}"""
DELETE_RECENT = f"DELETE {RECENT}"

# Add minutes before :before up to hours.
ADD_UP = f"""
INSERT INTO outcomes ({COUNT_COLUMNS})
SELECT 3600, at - at % 3600, {EVENT}, 0, {ALL_SUMS} FROM outcomes
WHERE period = 60 AND at < :before AND shard = 0 GROUP BY at - at % 3600, {EVENT}
{SUM}"""

# Delete these minutes.
DELETE_MINUTES = "DELETE FROM outcomes WHERE period = 60 AND at < :before AND shard = 0"

# Delete hours before :before.
DELETE_HOURS = "DELETE FROM outcomes WHERE period = 3600 AND at < :before"


MAX_WAIT_SECONDS = 600.0  # expected of a queue by default: how long a due job may wait
MAX_FAILED_SHARE = 0.2  # of the attempts of a task


class Expectation(NamedTuple):
    """What is expected of a queue; see `expect`."""

    max_wait_seconds: float = MAX_WAIT_SECONDS
    max_failed_share: float = MAX_FAILED_SHARE


class Times(NamedTuple):
    """A histogram of durations: how many were at most each of BOUNDS, or longer, and their sum in seconds."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    seconds: float = 0.0

    @property
    def number(self) -> int:
        """The number of durations."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Return an estimate of the duration that this share of them does not exceed; None: there are none."""
        left = share * self.number
        for bucket, number in enumerate(self.counts):
            if number and left <= number:
                low, high = (BOUNDS[bucket - 1] if bucket else 0.0), BOUNDS[min(bucket, len(BOUNDS) - 1)]
                return low + (high - low) * left / number
            left -= number
        return None

    def plus(self, other: Times) -> Times:
        """Return the histogram of both."""
        return Times(tuple(map(sum, zip(self.counts, other.counts, strict=True))), self.seconds + other.seconds)


class Outcomes(NamedTuple):
    """What happened to the jobs of a task in a queue, in a period that begins at `at`, in Unix seconds.

    enqueued: new jobs. completed: jobs. failed: jobs that became failed, as no attempt was left or an operator
    decided so. retried: attempts that failed and are repeated. released: attempts that do not count, as those of a
    consumer that stopped, and snoozes. died, expired: attempts whose consumer died or whose lease ran out, which are
    also in failed or retried. cancelled: jobs.
    wait: from the due time to the start, of attempts that completed or failed. run: of attempts that completed.
    """

    at: float
    queue: str
    task: str
    enqueued: int = 0
    completed: int = 0
    failed: int = 0
    retried: int = 0
    released: int = 0
    died: int = 0
    expired: int = 0
    cancelled: int = 0
    wait: Times = Times()
    run: Times = Times()

    @property
    def failed_share(self) -> float:
        """The share of attempts that failed, of those that completed or failed; 0 if there are none."""
        failed = self.failed + self.retried
        return failed / (failed + self.completed) if failed else 0.0

    def plus(self, other: Outcomes) -> Outcomes:
        """Return the sum of both, for the period, queue and task of this one."""
        numbers = {name: getattr(self, name) + getattr(other, name) for name in EVENTS}
        return self._replace(wait=self.wait.plus(other.wait), run=self.run.plus(other.run), **numbers)


def total(found: Iterable[Outcomes], at: float = 0.0, queue: str = "", task: str = "") -> Outcomes:
    """Return the sum of all."""
    result = Outcomes(at, queue, task)
    for each in found:
        result = result.plus(each)
    return result


def minute(at: float) -> int:
    """Return when the minute of this time began."""
    return int(min(max(at, 0.0), MAX_TIME) // MINUTE) * MINUTE


class Counting(Backend):
    """The operations on counts."""

    def outcomes(
        self,
        since: float | datetime | None = None,
        until: float | datetime | None = None,
        *,
        step_seconds: int | None = None,
    ) -> list[Outcomes]:
        """Return what happened to jobs since a time and until another, for each queue and task, the earliest first.

        since, until: Unix seconds, or datetimes with a time zone; None: from the first job on, to now. The minutes that
            begin in [since, until) are counted, the one of `since` included, and hours instead where it was more than
            72 hours ago. What happened more than 90 days ago is only part of a total, without `since`.
        step_seconds: a multiple of 60: return periods of this length, those in which something happened. None: one.
        """
        first = 0 if since is None else minute(time_of("since", since))
        if step_seconds is not None and (finite("step_seconds", step_seconds) < MINUTE or step_seconds % MINUTE):
            raise ValueError(f"expected step_seconds to be a multiple of 60, got {step_seconds!r}")
        params = {"since": first, "until": FOREVER if until is None else time_of("until", until)}
        if since is None and step_seconds is None:
            return list(_outcomes(self._read(TOTAL, params), 0.0))
        rows = self._read(OUTCOMES, {**params, "step": step_seconds or FOREVER})
        return list(_outcomes(rows, None if step_seconds else float(first)))

    def expect(
        self,
        queue: str,
        *,
        max_wait_seconds: float | timedelta | None = None,
        max_failed_share: float | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> None:
        """Set the thresholds from which `pqueue doctor` and the dashboard report a queue.

        max_wait_seconds: how long a due job may wait; None: 600.
        max_failed_share: from 0 to 1, the share of failed attempts of a task within the last 15 minutes; None: 0.2.
        """
        wait = None if max_wait_seconds is None else above_0("max_wait_seconds", max_wait_seconds)
        # guard: an expected share is one
        share = None if max_failed_share is None else valid_number("max_failed_share", 0, max_failed_share, 1)
        shown = f"wait {'default' if wait is None else interval(wait)}"
        shown += f", failed attempts {'default' if share is None else f'{share * 100:g}%'}"
        event = f"set thresholds of queue {queue}: {shown}"
        self._set_queue(queue, event, by, now, max_wait_seconds=wait, max_failed_share=share)

    def expectations(self) -> dict[str, Expectation]:
        """Return what is expected of each queue."""
        return {
            name: Expectation(MAX_WAIT_SECONDS if wait is None else wait, MAX_FAILED_SHARE if share is None else share)
            for name, wait, share in self._read(EXPECTATIONS)
        }

    def _count_completed(self, session: Session, jobs: Sequence[Job], now: float) -> None:
        """Count jobs that COMPLETE_PARENT completed."""
        count_attempts(session, jobs, "completed", now)

    def _count_new(self, session: Session) -> None:
        """Count the new jobs and the completions that were not counted yet.

        Must run before jobs are deleted, change their queue, or are completed no longer.
        """

    def _roll_up(self, now: float) -> None:
        """Count new jobs, add minutes to the total, add old ones up to hours, and delete old hours."""
        with self._transaction(durable=False) as session:
            self._count_new(session)
            before = {"before": minute(now) - RECENT_SECONDS}
            if session.run(HAS_RECENT, before)[0][0]:
                self._add_to_total(session, before)
            for period, statements in ((MINUTE, (ADD_UP, DELETE_MINUTES)), (HOUR, (DELETE_HOURS,))):
                first = session.run(FIRST_PERIOD, {"period": period})[0][0]
                # guard: recent counts stay as they are
                kept = minute(now) - KEPT_SECONDS[period]
                if first is not None and first < kept:
                    an_hour = first - first % HOUR + HOUR  # at a time, to keep it short
                    for sql in statements:
                        session.change(sql, {"before": min(kept, an_hour)})

    def _add_to_total(self, session: Session, before: Params) -> None:
        """Add the minutes before a time to the total, and mark them as added."""
        for sql in (ADD_TO_TOTAL, MERGE, DELETE_RECENT):
            session.change(sql, before)


def count(session: Session, queue: str, task: str, event: str, now: float, number: int = 1) -> None:
    """Count an event, or a number of them, without a time; event is one of EVENTS."""
    params = {"at": minute(now), "queue": queue, "task": task, "event": event, "number": number}
    session.change(COUNT, {**params, "run": UNTIMED, "wait": UNTIMED, "run_seconds": 0.0, "wait_seconds": 0.0})


def count_events(session: Session, job_ids: list[int], event: str, now: float) -> None:
    """Count an event of each of these jobs, without a time; event is one of EVENTS."""
    session.change(COUNT_EVENTS, {"at": minute(now), "ids": to_json(job_ids), "event": event})


def count_attempts(session: Session, jobs: Sequence[Job], event: str, now: float) -> None:
    """Count attempts that ended now, with their times; event is one of EVENTS."""
    alike: dict[tuple[str, str, float, int], list[float]] = {}  # when the jobs were due that are counted in one row
    for job in jobs:
        start, due = job.started_at or now, job.run_at
        alike.setdefault((job.queue, job.task, start, bisect_left(BOUNDS, start - due)), []).append(due)
    for (queue, task, start, wait), due_times in alike.items():
        number, run = len(due_times), now - start
        of = {"at": minute(now), "queue": queue, "task": task, "event": event, "number": number}
        times = {"run": bisect_left(BOUNDS, run), "run_seconds": number * max(0.0, run), "wait": wait}
        session.change(COUNT, {**of, **times, "wait_seconds": max(0.0, number * start - sum(due_times))})


def _outcomes(rows: Iterable[Sequence[Any]], at: float | None) -> Iterator[Outcomes]:
    """Yield the counts of each period, queue and task; `at` replaces the beginnings of the periods."""
    for (step, queue, task), group in groupby(rows, lambda row: tuple(row[:3])):
        numbers = dict.fromkeys(EVENTS, 0)
        runs, waits = [0] * (len(BOUNDS) + 1), [0] * (len(BOUNDS) + 1)
        run_seconds = wait_seconds = 0.0
        for _, _, _, event, run, wait, number, ran, waited in group:
            numbers[event] += number
            if wait != UNTIMED:
                waits[wait] += number
                wait_seconds += waited
            if event == "completed":
                runs[run] += number
                run_seconds += ran
        times = Times(tuple(waits), wait_seconds), Times(tuple(runs), run_seconds)
        yield Outcomes._make([float(step) if at is None else at, queue, task, *numbers.values(), *times])
