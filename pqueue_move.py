"""Copying a queue, and moving it to another backend."""

from __future__ import annotations

import json
import os
import shlex
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import pqueue_schema
from pqueue_backend import Session
from pqueue_groups import COUNT_ALL_RUNNING, LIST_GROUPS
from pqueue_operating import Operating, count_running
from pqueue_outcomes import COUNT_COLUMNS, HOUR
from pqueue_schedules import SCHEDULE_COLUMNS
from pqueue_schema import COLUMN_OF, COLUMNS, FINISHED, MOVES, UNLESS_HELD
from pqueue_values import MAX_ID, InvalidTransition, Job, Params, QueueError, command_line, operator_name, valid_list

# A move is marked in history by a row with job_id 0 and JSON in `error`. In the source: 'moving' while it waits for
# running jobs, then 'moved', with {"token", "to"}; `attempt` is the number of calls of `finish_move`. In the target:
# 'moved here', with {"token", "last_id"}: the last job of the source copied as of the call number `attempt`.
_MARKS = "SELECT id, at, event, attempt, error FROM history WHERE job_id = 0 AND event"
MARK = f"{_MARKS} IN {MOVES} ORDER BY +id DESC"
MARKS_HERE = f"{_MARKS} = 'moved here' ORDER BY +id DESC"
UNMARK = f"DELETE FROM history WHERE job_id = 0 AND event IN {MOVES}"
PAUSE_ALL = "UPDATE queues SET paused = 2 WHERE paused = 0"
RESUME_ALL = "UPDATE queues SET paused = 0 WHERE paused = 2"
COPY_JOB = f"""
INSERT INTO jobs ({COLUMNS.removeprefix("id, ")}) VALUES (:{", :".join(Job._fields[1:])})
{UNLESS_HELD} RETURNING id"""
HISTORY = "at, event, actor, attempt, error, started_at"
HISTORY_OF = f"SELECT {HISTORY} FROM history WHERE job_id = :id ORDER BY +id"
COPY_HISTORY = f"INSERT INTO history (job_id, {HISTORY}) VALUES (:id, :{HISTORY.replace(', ', ', :')})"

# The tables and columns to copy. Consumers are not copied: they are local processes.
COPIED = {
    "queues": "name, paused, max_pending, keep_completed_seconds, keep_failed_seconds, keep_cancelled_seconds, "
    "grouped, max_running, rate_jobs, rate_seconds, turn, unnamed_turn, max_wait_seconds, max_failed_share",
    "queue_groups": "queue, name, task, turn",  # before the jobs, for which triggers may add rows
    "group_weights": "queue, name, weight",
    "group_starts": "queue, name, n, at",
    "jobs": COLUMNS,
    "history": "id, job_id, at, event, actor, attempt, error, started_at",
    "schedules": SCHEDULE_COLUMNS,
    "handlers": "name, task",
    "dependencies": "id, job_id, parent_id, after_failed",
    "outcomes": COUNT_COLUMNS,
}
SMALL_TABLES = ("queues", "queue_groups", "group_weights", "group_starts", "schedules", "handlers")
COPIED_ROWS = ("queues", "jobs", "history", "schedules", "handlers", "dependencies")  # that are worth reporting
PAGE = 1000  # rows
# The columns by which a job is compared with its copy: all but the long ones, which do not change alone
OUTLINE = ", ".join(column for column in COLUMN_OF.values() if column not in ("payload", "result", "error"))
# A row in the history of a target that `copy_finished_to` has begun to fill, and whose jobs may be replaced.
PARTIAL = "SELECT 1 FROM history WHERE id = -1"
MARK_PARTIAL = "INSERT INTO history (id, job_id, at, event, actor, attempt) VALUES (-1, 0, 0, 'copying', '', 0)"
UNMARK_PARTIAL = "DELETE FROM history WHERE id = -1"
FORGET_OPERATIONS = "DELETE FROM history WHERE job_id = 0 AND id > 0"  # in a target, whose ids they would take
IS_USED = "SELECT 1 FROM queue_tasks LIMIT 1"  # a job was enqueued; a partial copy has no tasks
# Without those that hold a key for a time: another job may have it before they are copied.
FINISHED_JOBS = f"""
SELECT {COLUMNS} FROM jobs WHERE id > :after AND finished_at IS NOT NULL AND key_expires_at IS NULL
ORDER BY id LIMIT {PAGE}"""


class Mark(NamedTuple):
    """A mark of a move: a row of MARK or MARKS_HERE. `facts` is the JSON in its `error`."""

    id: int
    at: float
    event: str
    attempt: int
    facts: Params


def _marks(rows: list[Any]) -> list[Mark]:
    return [Mark(*row)._replace(facts=json.loads(row[4])) for row in rows]


class Moving(Operating):
    """The operations that copy or move a queue to another backend."""

    @abstractmethod
    def _find_dead(self) -> list[str] | None: ...

    @abstractmethod
    def _reclaim(self, session: Session, dead: list[str] | None, now: float) -> bool: ...

    def _identity(self) -> object:
        """Return what no other queue has; a server has several names."""
        return self.name

    def copy_to(self, target: Moving, progress: Callable[[int], None] | None = None) -> dict[str, int]:
        """Copy queues, jobs and history into a queue of any backend that has no jobs.

        Return the number of rows of each table. The copy is read back and compared before it is committed; until then
        the target is locked for writing, and this queue is, too, on SQLite. `progress` is called with the number of
        rows copied so far.

        Raises QueueError if the target has jobs, or if the copy differs.
        """
        with self._transaction() as source, target._transaction() as copy:
            self._begin_snapshot(source)
            self._count_new(source)
            target._lock_out_writers(copy)
            return target._fill(copy, source, progress)

    def _fill(self, copy: Session, source: Session, progress: Callable[[int], None] | None) -> dict[str, int]:
        """Copy all rows of the source into this queue, whose session is `copy`."""
        _expect_unused(copy)
        copied = _copy_rows(source, copy, progress)
        if copy.run("""SELECT 1 FROM queues WHERE grouped = 1 OR EXISTS (SELECT 1 FROM jobs WHERE "group" <> '')"""):
            self._start_groups(copy)
        self._reset_ids(copy)
        # guard: a copy counts what is pending
        self._count_pending(copy)
        return copied

    def copy_finished_to(self, target: Moving, progress: Callable[[int], None] | None = None) -> int:
        """Copy finished jobs and their history into a queue that has no jobs, while both queues are in use; return how
        many. `move_to` and `copy_to` then copy only what is missing or has changed, and lock out writers for less long.

        Each step of 1,000 jobs is a transaction. If interrupted, call it again, or discard the target: this queue
        does not depend on it, and it has no job to run. `progress` is called with the number of jobs copied so far.

        Raises QueueError if the target has other jobs, or is this queue.
        """
        _expect_elsewhere(self._identity(), target._identity())
        with target._transaction() as copy:
            target._lock_out_writers(copy)
            _expect_unused(copy)
            if not copy.run(PARTIAL):
                copy.change("DELETE FROM queue_tasks")
                copy.change(FORGET_OPERATIONS)
                copy.change(MARK_PARTIAL)
            last, copied = copy.run("SELECT coalesce(max(id), -1) FROM jobs")[0][0], 0
        while rows := self._read(FINISHED_JOBS, {"after": last}):
            last = rows[-1][0]
            with target._transaction(durable=False) as copy:
                # guard: a partial copy that is used is left alone
                _expect_unused(copy)
                ids = [row[0] for row in rows]
                _write(copy, "jobs", rows, _among("id", ids))
                events = self._read(f"SELECT {COPIED['history']} FROM history WHERE {_among('job_id', ids)}")
                _write(copy, "history", events, _among("job_id", ids))
                target._reset_ids(copy)  # if somebody uses it
            copied += len(rows)
            if progress:
                progress(copied)
        return copied

    def is_partial_copy(self) -> bool:
        """Return whether `copy_finished_to` has copied all jobs of this queue from another one."""
        return bool(self._read(PARTIAL)) and not self._read(IS_USED)

    # Moving: `begin_move` until nothing runs, then `move_to`, and `finish_move` when all programs use the target

    def move_status(self) -> dict[str, Any] | None:
        """Return the move that this queue is part of, or None.

        It is a dict: "event", "moving" until `move_to`, then "moved"; "at", Unix seconds; "to", the name of the target.
        """
        marks = _marks(self._read(MARK))
        return {"event": marks[0].event, "at": marks[0].at, "to": marks[0].facts["to"]} if marks else None

    def begin_move(self, to: str, *, by: str | None = None, now: float | None = None) -> int:
        """Pause all queues, including those created later, and return how many jobs are still `processing`.

        to: the `name` of the target.

        Raises QueueError if this queue was moved elsewhere, or is the target.
        """
        _expect_elsewhere(self.name, to)
        dead = self._find_dead()
        with self._transaction() as session:
            self._lock_out_writers(session)
            marks = _marks(session.run(MARK))
            known_to = marks[0].facts["to"] if marks else None
            if marks and marks[0].event == "moved" and known_to != to:
                raise QueueError(
                    f"cannot move: this queue was moved to {known_to}; finish that with {command_line()} move "
                    "--to URL --finish, or cancel it with --cancel"
                )
            self._reclaim(session, dead, self._time(now))
            session.change(PAUSE_ALL)
            if known_to != to:
                self._set_mark(session, "moving", {"to": to}, by, now)
            return count_running(session)

    def move_to(
        self,
        target: Moving,
        *,
        without: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> dict[str, int] | None:
        """Copy this queue as `copy_to` does; in the target, queues are paused as they were before `begin_move`.

        without: the application's tables in this database, which are not moved; see `other_tables`.

        Return the number of rows of each table, or None while jobs are `processing`. Raises QueueError as `copy_to`
        does, and for tables that `without` does not name. If interrupted, call it again.
        """
        self.expect_other_tables(without)
        with target._transaction() as copy, self._transaction() as source:
            target._lock_out_writers(copy)
            self._lock_out_writers(source)
            if count_running(source):
                return None
            self._count_new(source)
            copied = target._fill(copy, source, progress)
            mark = self._mark_moved(source, target.name, by, now)
            for sql, params in arrival(mark):
                copy.change(sql, params)
            copy.wakes = True
        return copied

    def expect_other_tables(self, names: Sequence[str]) -> None:
        """Raise QueueError unless these are exactly the `other_tables`."""
        others, names = self.other_tables(), valid_list("tables", names)
        if left := sorted(set(others) - set(names)):
            raise QueueError(
                f"cannot move: {', '.join(left)} would stay behind; copy what you need, and give "
                + " ".join(f"--without {shlex.quote(name)}" for name in left)
            )
        if unknown := sorted(set(names) - set(others)):
            raise QueueError(f"cannot move without {', '.join(unknown)}: there is no such table")

    def _mark_moved(self, session: Session, to: str, by: str | None, now: float | None) -> Params:
        """Mark this queue as moved; return the parameters of the target's mark."""
        session.change(PAUSE_ALL)
        mark = {"token": os.urandom(8).hex(), "to": to}
        self._set_mark(session, "moved", mark, by, now)
        last_id = session.run("SELECT coalesce(max(id), 0) FROM jobs")[0][0]
        error = json.dumps({"token": mark["token"], "last_id": last_id})
        return {"event": "moved here", "error": error, "actor": operator_name(by), "now": self._time(now)}

    def _set_mark(self, session: Session, event: str, mark: Params, by: str | None, now: float | None) -> None:
        session.change(UNMARK)
        params = {"event": event, "actor": operator_name(by), "now": self._time(now)}
        session.change(pqueue_schema.RECORD_OPERATION, {**params, "error": json.dumps(mark)})

    def has_moved_to(self, target: Moving) -> bool:
        """Return whether this queue was moved to the target."""
        tokens = {mark.facts.get("token") for mark in _marks(self._read(MARK))}
        return any(mark.facts["token"] in tokens for mark in _marks(target._read(MARKS_HERE)))

    def cancel_move(self) -> None:
        """Resume the queues that the move paused.

        After `move_to`, the jobs are in both queues, and run twice if consumers serve both.
        """
        with self._transaction() as session:
            session.change(RESUME_ALL)
            session.change(UNMARK)
            session.wakes = True

    def finish_move(self, target: Moving, *, now: float | None = None) -> dict[str, int]:
        """Copy jobs enqueued here since `move_to` to the target, under new ids; delete all jobs here.

        Call it again if a producer still enqueues here. Return a dict of numbers of jobs: "carried", those copied;
        "known", those not copied, as another job in the target holds their key; "deleted", those deleted here.

        Raises QueueError, or InvalidTransition if jobs are `processing` here.
        """
        with self._transaction() as source:
            self._lock_out_writers(source)
            marks = _marks(source.run(MARK))
            if not marks or marks[0].event != "moved":
                raise QueueError("cannot finish: this queue was not moved yet; run move without --finish first")
            if running := count_running(source):
                raise InvalidTransition(
                    f"cannot finish: jobs run in the old queue ({running}), which was resumed; pause its queues, and "
                    "try again when they have ended"
                )
            with target._transaction() as copy:
                target._lock_out_writers(copy)
                carried, known = _copy_new_jobs(source, copy, target, marks[0], self._time(now))
            # The target has recorded what it copied, so that after a crash here this can be called again.
            deleted = self.delete_jobs()
            source.change("UPDATE history SET attempt = attempt + 1 WHERE id = :id", {"id": marks[0].id})
        return {"carried": carried, "known": known, "deleted": deleted}


def _expect_elsewhere(here: object, to: object) -> None:
    if to == here:
        raise QueueError("cannot move: the target is this queue itself")


def _expect_unused(copy: Session) -> None:
    if copy.run("SELECT 1 FROM jobs LIMIT 1") and (not copy.run(PARTIAL) or copy.run(IS_USED)):
        raise QueueError("cannot copy: expected a target without jobs")


def _copy_rows(source: Session, copy: Session, progress: Callable[[int], None] | None) -> dict[str, int]:
    """Copy and compare the tables; return the number of rows of each."""
    for table in (*SMALL_TABLES, "dependencies", "outcomes"):
        copy.change(f"DELETE FROM {table}")
    copy.change(FORGET_OPERATIONS)
    missing = _update_partial_copy(source, copy) if copy.run(PARTIAL) else None
    copy.change(UNMARK_PARTIAL)
    done = 0
    for table, columns in COPIED.items():
        for where in _parts(source, table, missing):
            rows = source.run(f"SELECT {columns} FROM {table} WHERE {where}")
            _write(copy, table, rows, where)
            if table in COPIED_ROWS:
                done += len(rows)
            if progress:
                progress(done)
    copy.change("INSERT INTO queue_tasks SELECT DISTINCT queue, task FROM jobs WHERE true ON CONFLICT DO NOTHING")
    copy.change(LIST_GROUPS)
    copy.change(COUNT_ALL_RUNNING)
    return {table: copy.run(f"SELECT count(*) FROM {table}")[0][0] for table in COPIED_ROWS}


def _write(copy: Session, table: str, rows: list[Any], where: str) -> None:
    """Insert the rows that are selected by a condition, read them back, and compare them."""
    columns = COPIED[table]
    names = _names(columns)
    sql = f"INSERT INTO {table} ({columns}) VALUES (:{', :'.join(names)})"
    copy.change_many(sql, [dict(zip(names, row, strict=True)) for row in rows])
    written = copy.run(f"SELECT {columns} FROM {table} WHERE {where}")
    if not {repr(tuple(row)) for row in rows} <= {repr(tuple(row)) for row in written}:
        raise QueueError(f"cannot copy {table}: what was read back is not what was written")


def _names(columns: str) -> list[str]:
    return columns.replace('"', "").split(", ")


def _update_partial_copy(source: Session, copy: Session) -> list[int]:
    """Delete from the copy the jobs that are not in the source, or have changed there; return the ids of those that the
    copy lacks."""
    missing: list[int] = []
    low = -1
    for rows in chain(_pages(source, "jobs", OUTLINE), [[]]):
        high = rows[-1][0] if rows else MAX_ID
        sql = f"SELECT {OUTLINE} FROM jobs WHERE id > :low AND id <= :high"
        there = {row[0]: tuple(row) for row in copy.run(sql, {"low": low, "high": high})}
        # guard: a job that changed is copied again
        same = {row[0] for row in rows if there.get(row[0]) == tuple(row)}
        for ids in _in_pages(sorted(there.keys() - same)):
            copy.change(f"DELETE FROM history WHERE {_among('job_id', ids)}")
            copy.change(f"DELETE FROM jobs WHERE {_among('id', ids)}")
        missing += [row[0] for row in rows if row[0] not in same]
        low = high
    return missing


def _parts(source: Session, table: str, missing: list[int] | None) -> Iterator[str]:
    """Yield conditions that together select what is to be copied of a table: all, or only the missing jobs."""
    if table in SMALL_TABLES:
        yield "true"
    elif table == "outcomes":
        hours = f"SELECT DISTINCT period, at - at % {HOUR} FROM outcomes WHERE event <> 'counted' ORDER BY 1, 2"
        for period, hour in source.run(hours):
            yield f"event <> 'counted' AND period = {period} AND at BETWEEN {hour} AND {hour + HOUR - 1}"
    elif missing is not None and table in ("jobs", "history"):
        column, ids = ("id", missing) if table == "jobs" else ("job_id", [0, *missing])  # 0: the history of no job
        for page in _in_pages(ids):
            yield _among(column, page)
    else:
        for rows in _pages(source, table, "id"):
            yield f"id BETWEEN {rows[0][0]} AND {rows[-1][0]}"


def _among(column: str, ids: Iterable[int]) -> str:
    return f"{column} IN ({', '.join(map(str, ids))})"


def _in_pages(ids: list[int]) -> Iterator[list[int]]:
    return (ids[start : start + PAGE] for start in range(0, len(ids), PAGE))


def arrival(mark: Params) -> list[tuple[str, Params]]:
    """Return the statements that turn a copy into an independent queue with a mark of its source."""
    return [(UNMARK, {}), (pqueue_schema.RECORD_OPERATION, mark), (RESUME_ALL, {})]


def _copy_new_jobs(source: Session, copy: Session, target: Moving, mark: Mark, now: float) -> tuple[int, int]:
    """Copy new jobs to the target, under new ids; return how many, and how many were skipped by key."""
    here = next((m for m in _marks(copy.run(MARKS_HERE)) if m.facts["token"] == mark.facts["token"]), None)
    if here is None:
        raise QueueError(f"cannot finish: expected the target to be {mark.facts['to']}, to which this queue was moved")
    new_ids: dict[int, int] = {}
    doubles = 0
    # guard: ids may restart after a finished move
    last_id = here.facts["last_id"] if here.attempt == mark.attempt else 0  # after a --finish, ids may start at 1 again
    for rows in _pages(source, "jobs", COLUMNS, after=last_id):
        for row in rows:
            job = dict(zip(Job._fields, row, strict=True))
            new_id = _copy_job(source, copy, target, job, now)
            if new_id is None:
                doubles += 1
            else:
                new_ids[job["id"]] = new_id
                _copy_dependencies(source, copy, target, job, new_ids, now)
        last_id = rows[-1][0]
    params = {"id": here.id, "attempt": mark.attempt, "error": json.dumps({**here.facts, "last_id": last_id})}
    copy.change("UPDATE history SET attempt = :attempt, error = :error WHERE id = :id", params)
    copy.wakes = True
    return len(new_ids), doubles


def _copy_dependencies(
    source: Session, copy: Session, target: Moving, job: Params, new_ids: dict[int, int], now: float
) -> None:
    """Let the copy of a job run after the copies of its parents, as far as they exist."""
    rows = source.run("SELECT parent_id, after_failed FROM dependencies WHERE job_id = :id", {"id": job["id"]})
    parents = sorted(new_ids.get(parent, parent) for parent, _ in rows)
    if parents := [each for (each, _) in copy.run(pqueue_schema.STATES_OF, {"ids": json.dumps(parents)})]:
        # guard: a job carried to the target waits for its parents there
        target._attach(copy, [new_ids[job["id"]]], parents, rows[0][1], now)


def _copy_job(source: Session, copy: Session, target: Moving, job: Params, now: float) -> int | None:
    """Copy a job unless another one holds its key, and return its id; a finished one does not need its key."""
    if job["state"] == "waiting":
        job = {**job, "state": "scheduled", "waits_for": 0}
    copy.change(pqueue_schema.ADD_QUEUE, {"queue": job["queue"]})
    copy.change(pqueue_schema.ADD_TASK, {"queue": job["queue"], "task": job["task"]})
    if job["group"]:
        target._let_groups_take_turns(copy, job["queue"])
    copy.change(pqueue_schema.FREE_KEY, {**job, "now": now})
    keyless = {**job, "key_expires_at": None}
    is_over = job["key_expires_at"] is not None and job["key_expires_at"] <= now
    found = copy.run(COPY_JOB, keyless if is_over else job)
    if not found and job["state"] in FINISHED:
        found = copy.run(COPY_JOB, keyless)
    for (job_id,) in found:
        for row in source.run(HISTORY_OF, {"id": job["id"]}):
            copy.change(COPY_HISTORY, {"id": job_id, **dict(zip(_names(HISTORY), row, strict=True))})
        return cast(int, job_id)
    return None


def _pages(session: Session, table: str, columns: str, after: int = -1) -> Iterator[list[Any]]:
    """Yield the rows of a table with an id above `after`, in order; the first of the columns is the id."""
    sql = f"SELECT {columns} FROM {table} WHERE id > :after ORDER BY id LIMIT {PAGE}"
    while rows := session.run(sql, {"after": after}):
        yield rows
        after = rows[-1][0]
