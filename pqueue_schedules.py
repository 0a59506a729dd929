"""Schedules: jobs that are enqueued at certain times.

A schedule is a row with the time of its next job. When a consumer dequeues after that time, it inserts the job and
advances the time in one transaction, which holds the write lock (on PostgreSQL, a lock of the row). So each time gets
one job, however many consumers there are, and whenever one is killed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

from pqueue_backend import Backend, Session
from pqueue_cron import due_times, timing, valid_times
from pqueue_operating import queue_full
from pqueue_schema import COLUMN_OF, MOVES
from pqueue_tasks import Task, actor, place, without_metadata
from pqueue_values import JobId, Params, QueueError, QueueFull, above_0, encode_json, read_json, valid_name

MAX_FIRED = 100  # schedules, and times of one of them, per dequeue
KEY = "schedule:"  # and the name: the key of a schedule's unfinished job
MAX_SCHEDULE_NAME = 255 - len(KEY)


class Schedule(NamedTuple):
    """A schedule. Times are Unix seconds.

    cron, zone: when it is due; without them, every_seconds. group, on_missed, overlap: see `schedule`. next_at,
    last_at: the times of the next and the last job; last_job_id: the id of the last; None: none yet. skipped: how
    often it was due while the previous job was unfinished or the queue full. expire_seconds: see `enqueue`. origin:
    "task", for a schedule from `@task`, "removed", if that is gone, or "schedule".
    """

    name: str
    task: str
    payload: Any
    queue: str
    priority: int
    group: str | None
    cron: str | None
    zone: str
    every_seconds: float | None
    on_missed: str
    overlap: bool
    expire_seconds: float | None
    origin: str
    paused: bool
    next_at: float
    last_at: float | None
    last_job_id: int | None
    skipped: int


SCHEDULE_COLUMNS = ", ".join(COLUMN_OF.get(name, name) for name in Schedule._fields)
DEFINED = Schedule._fields[:13]  # what `schedule` sets
TIMED = slice(6, 9)  # that part of it which says when it is due
_CHANGES = ", ".join(f"{COLUMN_OF.get(name, name)} = :{name}" for name in DEFINED[1:])

# Add a schedule, or change it; its next time stays the same unless :is_retimed.
SAVE_SCHEDULE = f"""
INSERT INTO schedules ({", ".join(COLUMN_OF.get(name, name) for name in DEFINED)}, next_at)
VALUES ({", ".join(f":{name}" for name in DEFINED)}, :next_at)
ON CONFLICT (name) DO UPDATE SET {_CHANGES}, next_at = CASE WHEN :is_retimed THEN :next_at ELSE schedules.next_at END"""

# Return the schedules.
SCHEDULES = f"SELECT {SCHEDULE_COLUMNS} FROM schedules ORDER BY name"

# Return a schedule.
SCHEDULE_NAMED = f"SELECT {SCHEDULE_COLUMNS} FROM schedules WHERE name = :name"

# Return the schedules that are due. While the queue is moved, none is: they are due in the target.
# guard: a queue that is moved fires no schedule
DUE_SCHEDULES = f"""
SELECT {SCHEDULE_COLUMNS} FROM schedules WHERE paused = 0 AND next_at <= :now
    AND NOT EXISTS (SELECT 1 FROM history WHERE job_id = 0 AND event IN {MOVES})
ORDER BY next_at, name LIMIT :limit"""

# Count a time without a job.
SKIPPED = "UPDATE schedules SET skipped = skipped + 1 WHERE name = :name"

# Mark the schedule of a task that no longer has one.
MARK_REMOVED = "UPDATE schedules SET origin = 'removed' WHERE name = :name AND origin = 'task'"

# Delete a schedule.
DELETE_SCHEDULE = "DELETE FROM schedules WHERE name = :name"


class Scheduling(Backend):
    """The operations on schedules."""

    _is_unfit = False  # a schedule is due that this host cannot fire, as it does not know its time zone

    @abstractmethod
    def enqueue(self, *arguments: Any, **options: Any) -> JobId[Any]: ...

    def schedule(
        self,
        name: str,
        task: str | Task[..., Any],
        payload: Any = None,
        *,
        cron: str | None = None,
        zone: str = "UTC",
        every_seconds: float | timedelta | None = None,
        on_missed: Literal["once", "skip", "all"] = "once",
        overlap: bool = False,
        queue: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        expire_seconds: float | timedelta | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> None:
        """Enqueue a job of a task whenever the schedule is due, from now on. A schedule of this name is changed.

        task, payload, queue, group, priority, expire_seconds: as for `enqueue`. The job's `run_at` is the time of the
            schedule for which it was enqueued.
        cron: see `pqueue_cron.Cron`; zone: the time zone, a name such as "Europe/Berlin".
        every_seconds: instead of cron, the interval, at least 0.001; the first job is due one interval from now.
        on_missed: what to do about times that passed while no consumer was running: "once" enqueues one job for the
            last of them, "skip" none for times more than a minute ago, "all" one for each, which may overlap.
        overlap: also enqueue a job while the previous one is unfinished; otherwise that time is skipped.

        Raises ValueError.
        """
        times = valid_times(cron, zone, every_seconds, on_missed, overlap, group)
        values = _definition(name, task, payload, queue, priority, times, "schedule")
        if expire_seconds is not None:
            values["expire_seconds"] = above_0("expire_seconds", expire_seconds)
        self._save_schedule(values, by, now)

    def declare_schedules(self, tasks: Iterable[Task[..., Any]], *, now: float | None = None) -> None:
        """Save the schedules that `@task` gives to these tasks; mark those as removed that their tasks gave before.

        Raises ValueError for a task that cannot be called without arguments.
        """
        known, now = {task.name: task for task in tasks}, self._time(now)
        for task in known.values():
            if task.schedule:
                values = _definition(task.name, task, _no_arguments(task), None, None, task.schedule, "task")
                self._save_schedule(values, None, now)
        for found in self.schedules():
            # guard: a schedule that its task does not declare any more is marked
            if found.origin == "task" and found.task in known and not known[found.task].schedule:
                with self._transaction() as session:
                    session.change(MARK_REMOVED, {"name": found.name})

    def _save_schedule(self, values: Params, by: str | None, now: float | None) -> None:
        times, now = timing(values["cron"], values["zone"], values["every_seconds"]), self._time(now)
        defined = tuple(values[column] for column in DEFINED)
        with self._transaction() as session:
            before = [tuple(row[: len(DEFINED)]) for row in session.run(SCHEDULE_NAMED, values)]
            if before != [defined]:
                # guard: a schedule keeps its next time unless that is what changes
                is_retimed = not before or before[0][TIMED] != defined[TIMED]
                next_at = times.next(now)
                session.change(SAVE_SCHEDULE, {**values, "is_retimed": is_retimed, "next_at": next_at})
                self.record(f"saved schedule {values['name']}", by=by, now=now)
                session.wakes = True

    def unschedule(self, name: str, *, by: str | None = None, now: float | None = None) -> bool:
        """Delete a schedule; return whether there was one. Jobs that it has enqueued stay."""
        now, by = self._time(now), actor(by)
        with self._transaction() as session:
            deleted = session.change(DELETE_SCHEDULE, {"name": valid_name("schedule", name)}) > 0
            if deleted:
                self.record(f"deleted schedule {name}", by=by, now=now)
            return deleted

    def pause_schedule(self, name: str, *, by: str | None = None, now: float | None = None) -> None:
        """Enqueue no jobs of this schedule until `resume_schedule`. Raises QueueError if there is none."""
        self._set_schedule_paused(name, 1, f"paused schedule {name}", by, now)

    def resume_schedule(self, name: str, *, by: str | None = None, now: float | None = None) -> None:
        """Enqueue jobs of this schedule again, from its next time on. Raises QueueError if there is none."""
        self._set_schedule_paused(name, 0, f"resumed schedule {name}", by, now)

    def _set_schedule_paused(self, name: str, paused: int, event: str, by: str | None, now: float | None) -> None:
        now, by = self._time(now), actor(by)
        with self._transaction() as session:
            rows = session.run(SCHEDULE_NAMED, {"name": valid_name("schedule", name)})
            if not rows:
                raise QueueError(f"cannot find schedule {name!r}: expected one of schedules()")
            found = _schedule(rows[0])
            changed: Params = {"paused": paused}
            if not paused:
                first = timing(found.cron, found.zone, found.every_seconds).next(now)
                changed["next_at"] = min(found.next_at, first)  # it is later if a clock was set back
                # guard: a time while a schedule was paused gets no job
                if found.paused and found.next_at <= now:
                    changed["next_at"] = first
            session.set_columns("schedules", name, **changed)
            self.record(event, by=by, now=now)
            session.wakes = True

    def schedules(self) -> list[Schedule]:
        """Return the schedules by name."""
        return [_schedule(row) for row in self._read(SCHEDULES)]

    def _fire_schedules(self, session: Session, now: float) -> None:
        """Enqueue the jobs of schedules that are due."""
        self._is_unfit = False
        for found in map(_schedule, session.run(DUE_SCHEDULES, {"now": now, "limit": MAX_FIRED})):
            try:
                times_of = timing(found.cron, found.zone, found.every_seconds)
            except ValueError:  # this host does not know the time zone: leave it to others
                self._is_unfit = True
                continue
            times, next_at = due_times(times_of, found.next_at, found.on_missed, now, MAX_FIRED)
            # guard: a schedule fires once for each time
            session.set_columns("schedules", found.name, next_at=next_at)
            for at in times:
                self._fire(session, found, at, now)

    def _fire(self, session: Session, schedule: Schedule, at: float, now: float) -> None:
        # guard: runs of a schedule do not overlap
        key = None if schedule.overlap or schedule.on_missed == "all" else f"{KEY}{schedule.name}"
        task, payload, queue, priority = schedule.task, schedule.payload, schedule.queue, schedule.priority
        options: Params = {"run_at": at, "expire_seconds": schedule.expire_seconds, "key": key, "now": now}
        try:
            with without_metadata():
                job_id = self.enqueue(task, payload, queue=queue, group=schedule.group, priority=priority, **options)
        except QueueFull:
            if not queue_full(session, "enqueue", queue):  # the disk is full, not the queue
                raise
        else:
            if job_id.is_new:
                session.set_columns("schedules", schedule.name, last_at=at, last_job_id=job_id)
                return
        session.change(SKIPPED, {"name": schedule.name})


def _definition(
    name: str,
    task: str | Task[..., Any],
    payload: Any,
    queue: str | None,
    priority: int | None,
    times: Params,
    origin: str,
) -> Params:
    """Return the columns of a schedule. Raises ValueError."""
    queue, priority = place(task, queue, priority)
    return {
        "name": valid_name("schedule", name, MAX_SCHEDULE_NAME),
        "task": valid_name("task", task.name if isinstance(task, Task) else task),
        "payload": encode_json("payload", payload),
        "queue": queue,
        "priority": priority,
        **times,
        "expire_seconds": task.expire_seconds if isinstance(task, Task) else None,
        "origin": origin,
    }


def _no_arguments(task: Task[..., Any]) -> Any:
    try:
        return task.parameters.payload((), {})
    except TypeError as error:
        raise ValueError(f"cannot schedule a call without arguments: {error}") from None


def _schedule(row: Sequence[Any]) -> Schedule:
    found = Schedule(*row)
    return found._replace(payload=read_json(row[2]), overlap=bool(found.overlap), paused=bool(found.paused))
