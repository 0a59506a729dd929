"""Groups of a queue: fair share between them, and limits of each.

A claim takes the next job of the group with the lowest turn, which then increases by 1 / weight (stride scheduling). A
group that had no jobs meanwhile continues at the turn of the queue, so that it does not catch up. Jobs without a group
are a group, too. Within a group, jobs are ordered by priority, due time and id.

Limits are derived from rows: the processing jobs of a group, and its last deliveries. Both are written by the claim
itself, which holds the write lock (on PostgreSQL, a lock of the queue's row), so no crash leaves them wrong.

`queue_groups` lists where jobs may be claimed. Triggers on `jobs` mark a group when a job of it becomes pending or
ends; a claim that finds it without jobs, or at a limit, clears the mark. Thus a claim costs the same however many are
waiting. Queues without groups and limits use none of this. Consumers that delete old jobs end it for a queue whose
groups have no jobs any more; a trigger begins it again.
"""

from __future__ import annotations

import heapq
import json
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from operator import itemgetter
from types import EllipsisType
from typing import Any, NamedTuple

from pqueue_backend import Backend, Session
from pqueue_schema import (
    ADD_QUEUE,
    ADD_TASK,
    COLUMN_OF,
    COLUMNS,
    FOR_EACH,
    GROUP_PLACES,
    HAS_LIMITS,
    KNOWN,
    LEASE,
    LEASED,
    ORDER,
    OVERDUE,
    PEEK,
    PENDING_OF_TASK,
    PROMOTE,
    RETURNED,
    THESE,
)
from pqueue_values import (
    MAX_GROUP_CHARS,
    Job,
    Params,
    above_0,
    interval,
    short,
    to_job,
    to_json,
    valid_int,
    valid_list,
    valid_name,
    valid_number,
)

MAX_RATE = 100_000  # jobs
MAX_WEIGHT = 1_000.0
ATTEMPTS = Job._fields.index("attempts")
MAX_PROMOTED = 1000  # jobs, by `peek`

# Let the groups of a queue take turns.
SET_GROUPED = "UPDATE queues SET grouped = 1 WHERE name = :queue AND grouped = 0"


# guard: a queue with a pending job of a group has its groups take turns
def without_turns(new: str = "") -> str:
    """Return the queues whose groups take turns although none has a job to claim, and there is no limit. A job with a
    group that becomes pending lets them take turns again: see the triggers."""
    return f"""
SELECT name FROM queues q WHERE grouped = 1 AND max_running IS NULL AND rate_jobs IS NULL
    AND NOT EXISTS (SELECT 1 FROM queue_groups g WHERE g.queue = q.name AND next_at = 0) {new}"""


WITHOUT_TURNS = without_turns()

# Count the jobs that are processing in all queues, as if each had a limit.
# guard: a job that runs when its queue gets a limit counts
COUNT_ALL_RUNNING = "UPDATE jobs SET counted = 1 WHERE state = 'processing'"

# Count those of a queue that gets a limit, and lock no others.
COUNT_RUNNING = f"{COUNT_ALL_RUNNING} AND queue = :queue"

# Set the weight of a group.
SET_WEIGHT = """
INSERT INTO group_weights (queue, name, weight) VALUES (:queue, :name, :weight)
ON CONFLICT (queue, name) DO UPDATE SET weight = :weight"""

# Let claims look at all groups of a queue again, as when its limits have changed.
WAKE_GROUPS = "UPDATE queue_groups SET next_at = 0 WHERE queue = :queue"

# List the groups of all queues that have pending jobs.
LIST_GROUPS = """
INSERT INTO queue_groups (queue, name, task)
SELECT DISTINCT queue, "group", task FROM jobs WHERE state = 'pending' AND assigned_to IS NULL AND "group" <> ''
ON CONFLICT DO NOTHING"""


OF_GROUP = """queue = g.queue AND task = g.task AND "group" = g.name AND state = 'pending' AND assigned_to IS NULL"""
HAS_PENDING = f"EXISTS (SELECT 1 FROM jobs WHERE {OF_GROUP} {FOR_EACH})"  # a group stays listed until the next claim


def numbers_of_groups(new: str = "") -> str:
    return f"""
SELECT q.name,
    (SELECT count(DISTINCT g.name) FROM (SELECT queue, name, task FROM queue_groups {new}) g
        WHERE g.queue = q.name AND {HAS_PENDING}) AS pending,
    EXISTS (SELECT 1 FROM queue_tasks t
        WHERE t.queue = q.name AND EXISTS (SELECT 1 FROM jobs WHERE {PENDING_OF_TASK} {FOR_EACH})) AS has_unnamed,
    (SELECT count(*) FROM (SELECT 1 FROM jobs WHERE queue = q.name AND state = 'processing' AND counted = 1
        GROUP BY "group" HAVING count(*) >= q.max_running) full_ones) AS at_max_running,
    (SELECT count(DISTINCT g.name) FROM queue_groups g
        WHERE g.queue = q.name AND next_at > :now AND {HAS_PENDING}) AS at_rate
FROM queues q WHERE grouped = 1 ORDER BY 1"""


# Return, of the queues whose groups take turns: how many groups have pending jobs, whether jobs without a group are
# pending, how many groups have max_running jobs processing, and how many wait for their rate.
COUNT_GROUPS = numbers_of_groups()

# A claim

# Return whether some groups wait for a time that has come, whether jobs are assigned to the consumer, whether some
# queue has no groups, and whether some group may have a job to claim.
OUTLOOK = f"""
SELECT (SELECT min(next_at) FROM queue_groups WHERE next_at > 0) <= :now,
    EXISTS (SELECT 1 FROM jobs WHERE state = 'pending' AND assigned_to = :consumer),
    EXISTS (SELECT 1 FROM queues WHERE grouped = 0),
    EXISTS (SELECT 1 FROM queue_groups WHERE next_at = 0) OR EXISTS (
        SELECT 1 FROM queues q CROSS JOIN queue_tasks t
        WHERE q.grouped = 1 AND t.queue = q.name AND EXISTS (SELECT 1 FROM jobs WHERE {PENDING_OF_TASK} {FOR_EACH}))"""

# Mark the groups whose rate allows the next job now.
WAKE_DELAYED = "UPDATE queue_groups SET next_at = 0 WHERE next_at > 0 AND next_at <= :now"

NEXT_GROUPS = "FROM queue_groups WHERE queue = t.queue AND task = t.task AND next_at = 0 ORDER BY turn, name LIMIT"
FIRST_OF_GROUP = f"FROM jobs WHERE {OF_GROUP} ORDER BY {ORDER} LIMIT 1"
FIRST_OF_TASK = f"FROM jobs WHERE {PENDING_OF_TASK} ORDER BY {ORDER} LIMIT 1"
_WEIGHT = "(SELECT weight FROM group_weights w WHERE w.queue = g.queue AND w.name = g.name)"


def ready(groups: str) -> str:
    return f"""
SELECT q.name, t.task, g.name, g.turn, {_WEIGHT}, q.turn, q.unnamed_turn, {HAS_LIMITS},
    EXISTS (SELECT 1 FROM jobs WHERE {PENDING_OF_TASK} {FOR_EACH})
FROM queues q CROSS JOIN queue_tasks t LEFT JOIN {groups}
WHERE {GROUP_PLACES}"""


# Return the tasks of each queue whose groups take turns, each with the :width groups that are next (NULL: none), and
# whether there are jobs without a group.
READY = ready(f"queue_groups g ON g.id IN (SELECT id {NEXT_GROUPS} :width)")


def next_in_turn(group: str, job_of_group: str, job_of_task: str) -> str:
    return f"""
SELECT q.name, g.turn, g.name, coalesce(-priority, 0), coalesce(run_at, 0.0), coalesce(j.id, 0), t.task, {_WEIGHT},
    q.turn, {HAS_LIMITS}, EXISTS (SELECT 1 FROM jobs WHERE {OF_GROUP} LIMIT 1 OFFSET 1)
FROM queues q CROSS JOIN queue_tasks t CROSS JOIN {group} LEFT JOIN {job_of_group}
WHERE {GROUP_PLACES}
UNION ALL
SELECT q.name, q.unnamed_turn, '', -priority, run_at, j.id, t.task, NULL, q.turn, {HAS_LIMITS}, true
FROM queues q CROSS JOIN queue_tasks t CROSS JOIN {job_of_task}
WHERE {GROUP_PLACES}"""


# Return for each task of each queue whose groups take turns the group that is next, and for the jobs without a group,
# the first job and whether there is another; 0 for a group without jobs.
NEXT_IN_TURN = next_in_turn(
    f"queue_groups g ON g.id = (SELECT id {NEXT_GROUPS} 1)",
    f"jobs j ON j.id = (SELECT id {FIRST_OF_GROUP})",
    f"jobs j ON j.id = (SELECT id {FIRST_OF_TASK})",
)

# The groups that a statement is about, and the task of each. :groups is a JSON array of [queue, name, task] arrays.
# Without the LIMIT, SQLite would read it again at each use.
THESE_GROUPS = """
(SELECT json_extract(value, '$[0]') AS queue, json_extract(value, '$[1]') AS name, json_extract(value, '$[2]') AS task
 FROM json_each(:groups) LIMIT -1) g"""

# Return the first jobs of a task in each of these groups.
NEXT_OF_GROUPS = f"""
SELECT -priority, run_at, j.id, j.queue, "group", j.task FROM {THESE_GROUPS} CROSS JOIN jobs j ON j.id IN
    (SELECT id FROM jobs WHERE {OF_GROUP} ORDER BY {ORDER} LIMIT :share)"""

# Return the first jobs that are assigned to the consumer, in queues with limits, in order.
ASSIGNED_IN_GROUPS = f"""
SELECT -priority, run_at, id, queue, "group" FROM jobs WHERE state = 'pending' AND assigned_to = :consumer
    AND {KNOWN.format(task="task")} AND queue IN (SELECT name FROM queues WHERE paused = 0 AND ({HAS_LIMITS}))
ORDER BY {ORDER} LIMIT :limit"""


_STARTS = "FROM group_starts s WHERE s.queue = last.queue AND s.name = last.name AND"

# Return how many more jobs of each of these groups may run (NULL: any number), its rate, its last delivery, how many of
# the next :limit deliveries the rate does not allow yet, and the delivery on which the first of them waits. The
# delivery number n is allowed rate_seconds after number n - rate_jobs: so there are never more than rate_jobs within
# rate_seconds, wherever these begin.
# guard: a group never has more jobs running than its limit
# guard: a group never has more deliveries in any time than its rate
ROOMS = f"""
SELECT queue, name, room, rate_jobs, rate_seconds, coalesce(n, 0),
    (SELECT at {_STARTS} s.n = last.n),
    (SELECT count(*) {_STARTS} s.n > last.n - rate_jobs AND s.n <= last.n - rate_jobs + :limit
        AND :now - s.at < rate_seconds),
    (SELECT at {_STARTS} s.n = last.n - rate_jobs + 1), max_running
FROM (SELECT g.queue, g.name, max_running, rate_jobs, rate_seconds, max_running - (SELECT count(*) FROM jobs
          WHERE jobs.queue = g.queue AND "group" = g.name AND state = 'processing' AND counted = 1) AS room,
          (SELECT max(n) FROM group_starts s WHERE s.queue = g.queue AND s.name = g.name) AS n
      FROM {THESE_GROUPS} JOIN queues q ON q.name = g.queue) last"""

# Return these jobs as they will be after LEASE_THESE, which takes half as long as RETURNING. :ids is a JSON array.
AS_LEASED = f"""
SELECT {", ".join(f"{LEASE[name]} AS {name}" if name in LEASE else COLUMN_OF[name] for name in COLUMN_OF)} FROM jobs
WHERE id {THESE}"""

# Lease these jobs to the consumer. :ids is a JSON array; :counted is 1 in queues with limits, else NULL.
LEASE_THESE = f"UPDATE jobs SET {LEASED}, counted = :counted WHERE id {THESE}"

# Do both for a single job.
LEASE_ONE = f"UPDATE jobs SET {LEASED}, counted = :counted WHERE id = :id RETURNING {RETURNED}"

# Advance a group.
SET_TURN = "UPDATE queue_groups SET turn = :turn WHERE queue = :queue AND name = :name"

# Return these jobs. :ids is a JSON array.
THESE_JOBS = f"SELECT {COLUMNS} FROM jobs WHERE id {THESE}"

# Let claims pass over a task of a group, until a job of it becomes pending.
REST_TASK = "UPDATE queue_groups SET next_at = -1 WHERE queue = :queue AND name = :name AND task = :task"

# Let claims pass over a group until :next_at or, if that is NULL, until a job of it ends.
REST_GROUP = """
UPDATE queue_groups SET next_at = :next_at WHERE queue = :queue AND name = :name AND next_at >= 0"""

# Record a delivery of a group whose queue has a rate.
ADD_START = "INSERT INTO group_starts (queue, name, n, at) VALUES (:queue, :name, :n, :at)"

# Delete the deliveries of a group that do not matter any more.
DELETE_STARTS = "DELETE FROM group_starts WHERE queue = :queue AND name = :name AND n <= :n"

FORGOTTEN = """
    FROM queue_groups g WHERE next_at < 0 AND turn <= (SELECT turn FROM queues WHERE name = g.queue) LIMIT :limit"""

# Delete groups that have no pending job, and would continue at the turn of their queue in any case.
FORGET_GROUPS = f"DELETE FROM queue_groups WHERE id IN (SELECT id {FORGOTTEN})"

Row = Any  # a row of the database


class Room:
    """How many more jobs of a group may be claimed now."""

    queue = name = ""
    left: float = math.inf  # jobs
    running: int | None = None  # by max_running alone; None: no limit
    rate_jobs: int | None = None
    last = 0  # number of the last delivery
    last_at = -math.inf
    next_at: float | None = None  # when the rate allows the next job; None: as many jobs run as are allowed

    def __init__(self, row: Row = None, limit: int = 0) -> None:
        if row is None:
            return
        self.queue, self.name, self.running, self.rate_jobs, seconds, self.last, last_at, blocked, first_at, _ = row
        self.left = math.inf if self.running is None else self.running
        if self.rate_jobs is not None:
            self.last_at = self.last_at if last_at is None else last_at
            if self.left > 0 and blocked == min(self.rate_jobs, limit):
                self.next_at = first_at + seconds
            self.left = min(self.left, min(self.rate_jobs, limit) - blocked)


UNLIMITED = Room()


class Group:
    """A group of a queue, as a claim sees it."""

    def __init__(self, queue: str, name: str, turn: float = 0.0, weight: float | None = None) -> None:
        self.queue, self.name, self.turn, self.weight = queue, name, turn, weight or 1.0
        self.tasks: list[str] = []
        self.room = UNLIMITED
        self.jobs: deque[Row] = deque()  # the first ones, in order
        self.left: dict[str, int] = {}  # how many jobs of each task are left; not those of which there may be more
        self.taken = 0

    def fill(self, rows: list[Row], share: int) -> None:
        """Take over its first `share` jobs of each task, as far as no job that was not read may come before them: up to
        the last one of each task that may have more."""
        last: tuple[Any, ...] = (math.inf,)
        for task in self.tasks:
            found = [row for row in rows if row[5] == task]
            if len(found) < share:
                self.left[task] = len(found)
            else:
                # guard: a claim takes no job of a group before one that it has not read
                last = min(last, tuple(found[-1][:3]))
        self.is_cut = len(last) > 1  # there may be more jobs
        self.jobs = deque(row for row in sorted(rows) if tuple(row[:3]) <= last)


class Pick(NamedTuple):
    """A job that a claim has chosen, and the turns of its group and its queue (None: unchanged) when it is claimed."""

    id: int
    task: str
    room: Room
    group: Group | None = None  # None: not in turn
    turn: float = 0.0
    queue_turn: float | None = None


class Line:
    """The groups of a queue, in turn."""

    def __init__(self, queue: str, turn: float, is_limited: bool) -> None:
        self.queue, self.turn, self.is_limited = queue, turn, is_limited
        self.groups: dict[str, Group] = {}
        self.heap: list[tuple[float, str]] = []  # of the groups that have jobs

    def group(self, name: str, turn: float, weight: float | None) -> Group:
        if name not in self.groups:
            self.groups[name] = Group(self.queue, name, turn, weight)
        return self.groups[name]

    def begin(self) -> None:
        self.heap = sorted((group.turn, name) for name, group in self.groups.items() if group.jobs)

    def head(self, refill: Callable[[Group], None]) -> Row:
        """Return the next job, or None."""
        while self.heap:
            group = self.groups[self.heap[0][1]]
            if group.room.left > 0 and not group.jobs and group.is_cut:
                refill(group)
            if group.room.left > 0 and group.jobs:
                return group.jobs[0]
            heapq.heappop(self.heap)
        return None

    def take(self) -> Pick:
        """Take the job that `head` has returned."""
        turn, name = heapq.heappop(self.heap)
        group = self.groups[name]
        row = group.jobs.popleft()
        before = self.turn
        # guard: a group that had no jobs does not catch up
        self.turn = max(turn, self.turn)
        # guard: the groups of a queue take turns
        turn = self.turn + 1 / group.weight
        group.room.left -= 1
        group.taken += 1
        heapq.heappush(self.heap, (turn, name))
        return Pick(row[2], row[5], group.room, group, turn, self.turn if self.turn > before else None)


class Others:
    """The jobs that are claimed in their own order, each with the room of its group."""

    def __init__(self, jobs: list[tuple[Row, Room]]) -> None:
        self.jobs = deque(sorted(jobs, key=lambda job: tuple(job[0][:3])))

    def head(self, _: Callable[[Group], None]) -> Row:
        while self.jobs and self.jobs[0][1].left <= 0:
            self.jobs.popleft()
        return self.jobs[0][0] if self.jobs else None

    def take(self) -> Pick:
        row, room = self.jobs.popleft()
        room.left -= 1
        return Pick(row[2], "", room)


class Grouping(Backend):
    """The operations on groups, and claims from queues that have them."""

    @abstractmethod
    def _first_jobs(self, session: Session, params: Params) -> list[Row]:
        """Return rows that begin with -priority, run_at and id: the first :limit jobs that the consumer may take from
        queues without groups, or that are assigned to it, in order."""

    def limit(
        self,
        queue: str,
        max_pending: int | EllipsisType | None = ...,
        *,
        running: int | EllipsisType | None = ...,
        rate: tuple[int, float | timedelta] | EllipsisType | None = ...,
        by: str | None = None,
        now: float | None = None,
    ) -> None:
        """Limit a queue. What is not given stays as it is; None: no limit.

        max_pending: refuse to enqueue or resubmit while the queue has this many pending jobs. Those that are scheduled,
            or assigned to a consumer, do not count.
        running: deliver no job of a group while this many of it are `processing`. Jobs without a group count as one.
        rate: (jobs, seconds or timedelta): deliver at most this many jobs of a group in any period of this length.
        """
        most = max_pending if max_pending in (None, ...) else valid_int("max_pending", 1, max_pending)
        at_once = running if running in (None, ...) else valid_int("running", 1, running)
        jobs, seconds = (None, None) if rate in (None, ...) else valid_rate(rate)
        if (most, at_once, rate) == (..., ..., ...):
            raise ValueError("expected max_pending, running or rate, got none")
        with self._transaction() as session:
            if most is not ...:
                to = f"set limit of pending jobs of queue {queue} to {most or 'none'}"
                self._set_queue(queue, to, by, now, max_pending=most)
                self._count_pending(session)
            if at_once is not ...:
                to = f"set limit of running jobs of each group of queue {queue} to {at_once or 'none'}"
                self._set_queue(queue, to, by, now, max_running=at_once)
                session.change(COUNT_RUNNING, {"queue": queue})
            if rate is not ...:
                to = f"{jobs} in {interval(seconds)}" if seconds else "none"
                to = f"set rate of each group of queue {queue} to {to}"
                self._set_queue(queue, to, by, now, rate_jobs=jobs, rate_seconds=seconds)
            if at_once is not ... or rate is not ...:
                self._let_groups_take_turns(session, queue)
                session.change(WAKE_GROUPS, {"queue": queue})

    def weigh(self, queue: str, group: str, weight: float, *, by: str | None = None, now: float | None = None) -> None:
        """Give a group of a queue this share, relative to the others, which have 1."""
        weight = float(valid_number("weight", 1 / MAX_WEIGHT, weight, MAX_WEIGHT))
        params = {"queue": queue, "name": valid_group(group), "weight": weight}
        with self._transaction() as session:
            event = f"gave group {group} of queue {queue} the weight {weight:g}"
            self._set_queue(queue, event, by, now, grouped=1)
            self._start_groups(session)
            session.change(SET_WEIGHT, params)

    def limits(self, queue: str, group: str | None = None, *, now: float | None = None) -> dict[str, Any]:
        """Return the current limits of a group of a queue (None: its jobs without a group).

        It is a dict: "running", the number of its jobs that count towards "max_running", or None without that limit;
        "rate", (jobs, seconds) or None; "next_at", when that allows the next job, in Unix seconds; None: now.
        """
        name = "" if group is None else valid_group(group)
        groups = to_json([[valid_name("queue", queue), name]])
        found: dict[str, Any] = {"running": None, "max_running": None, "rate": None, "next_at": None}
        for row in self._read(ROOMS, {"groups": groups, "now": self._time(now), "limit": 1}):
            _, _, room, jobs, seconds, _, _, blocked, first_at, most = row
            found |= {"max_running": most, "running": None if most is None else most - room}
            if jobs is not None:
                found |= {"rate": (jobs, seconds), "next_at": first_at + seconds if blocked else None}
        return found

    def count_groups(self, *, now: float | None = None) -> dict[str, dict[str, int]]:
        """Return numbers of groups for each queue that has groups or limits; jobs without a group count as one.

        They are "pending", the groups that have such jobs; "at_max_running", those with as many jobs `processing` as
        the queue allows; and "at_rate", those with pending jobs of which the rate allows none now.
        """
        now, found = self._time(now), {}
        for queue, named, has_unnamed, full, waiting in self._read(COUNT_GROUPS, {"now": now}):
            waits = has_unnamed and self.limits(queue, now=now)["next_at"] is not None
            found[queue] = {"pending": named + has_unnamed, "at_max_running": full, "at_rate": waiting + waits}
        return found

    def _add_queue(self, session: Session, row: Params) -> int:
        """Create the queue of a new job unless it exists, and list the task there; return how many rows this added."""
        added = session.change(ADD_QUEUE, row) + session.change(ADD_TASK, row)
        return added + (self._let_groups_take_turns(session, row["queue"]) if row["group"] else 0)

    def _let_groups_take_turns(self, session: Session, queue: str) -> int:
        """Let the groups of a queue take turns; return 1 if they did not before."""
        if changed := session.change(SET_GROUPED, {"queue": queue}):
            self._start_groups(session)
        return changed

    def _end_turns(self) -> None:
        """End the turns of groups in the queues whose groups have no more jobs."""
        if self._read(WITHOUT_TURNS):
            with self._transaction(durable=False) as session:
                self._lock_out_writers(session)
                for (name,) in session.run(WITHOUT_TURNS):
                    session.set_columns("queues", name, grouped=0)

    def _start_groups(self, session: Session) -> None:
        """Keep `queue_groups` from now on; on PostgreSQL, that is always done."""

    # A claim

    def _claim_in_turn(self, session: Session, params: Params, prefetches: bool) -> list[Row] | None:
        """Lease up to :limit jobs, and return their rows; None if no queue with groups has one for the consumer."""
        if not self._begin_turns(session, params):
            return None if params.get("has_others", True) else []
        found = self._pick_one(session, params) if params["limit"] == 1 and not params["has_assigned"] else None
        if found is None:
            lines = self._lines(session, params)
            if lines is None:
                return None
            found = self._picks(session, params, lines)
        elif not found and params["has_others"]:
            return None
        picks = {pick.id: pick for pick in found}
        # The deliveries of a group are in order, though another server's clock may have been read before they were.
        at = max([params["now"], *(pick.room.last_at for pick in picks.values())])
        # guard: a job that is claimed in a queue with limits counts
        counted = 1 if any(pick.room is not UNLIMITED for pick in found) else None
        rows = self._lease(session, {**params, "now": at, "counted": counted}, list(picks), prefetches)
        self._advance(session, [picks[row[0]] for row in rows], at)
        return rows

    def _pick_one(self, session: Session, params: Params) -> list[Pick] | None:
        """Return what `_picks` does if it is one job; None: there may be another behind the groups that are next."""
        heads: dict[str, Row] = {}  # of each queue
        for row in sorted(session.run(NEXT_IN_TURN, params)):
            heads.setdefault(row[0], row)
        first = min(heads.values(), key=itemgetter(3, 4, 5), default=None)
        if first is None:
            return []
        queue, turn, name, *job, task, weight, queue_turn, is_limited, has_more = first
        line = Line(queue, queue_turn, bool(is_limited))
        group = line.group(name, turn, weight)
        if is_limited:
            self._read_rooms(session, params, [group])
        if group.room.left <= 0 or not all(head[5] for head in heads.values()):
            return None
        for row in self._first_jobs(session, params)[:1] if params["has_others"] else []:
            if tuple(row[:3]) < tuple(job):
                return [Pick(row[2], "", UNLIMITED)]
        group.jobs.append((*job, queue, name, task))
        group.left = {} if has_more else {task: 1}
        line.begin()
        return [line.take()]

    def _lease(self, session: Session, params: Params, ids: list[int], prefetches: bool) -> list[Row]:
        """Lease the first of these jobs, as many as are delivered together; return their rows."""
        if len(ids) < 2:
            return [row for job_id in ids for row in session.run(LEASE_ONE, {**params, "id": job_id})]
        found = {row[0]: row for row in session.run(AS_LEASED, {**params, "ids": to_json(ids)})}
        rows = [found[job_id] for job_id in ids if job_id in found]
        rows = rows[: batch_size([row[ATTEMPTS : ATTEMPTS + 2] for row in rows], prefetches)]
        session.change(LEASE_THESE, {**params, "ids": to_json([row[0] for row in rows])})
        return rows

    def _lines(self, session: Session, params: Params) -> list[Line] | None:
        """Return the queues whose groups take turns, each with the groups that are next; None if there are none, and no
        job that is assigned in one with limits."""
        limit = width = params["limit"]
        while True:
            rows = session.run(READY, {**params, "width": width})
            if not rows and not params["has_assigned"]:
                return None
            lines = _lines_of(rows)
            self._read_rooms(
                session, params, [each for line in lines if line.is_limited for each in line.groups.values()]
            )
            groups = [each for line in lines for each in line.groups.values()]
            ready = [each for each in groups if each.room.left > 0]
            self._read_jobs(session, ready, 2 * limit // max(1, len(ready)) + 1)
            rest = self._rest(session, groups)
            is_cut = len(rows) >= width  # of some task, perhaps
            # guard: a claim looks behind the groups that are at a limit
            if not (rest and is_cut and sum(min(len(each.jobs), each.room.left) for each in ready) < limit):
                return lines
            width *= 8

    def _begin_turns(self, session: Session, params: Params) -> bool:
        """Let no other transaction change the turns, and update which groups may have a job to claim. Return False if
        there certainly is none. Adds to params whether jobs are assigned to the consumer (has_assigned), and whether
        some queue has no groups (has_others)."""
        is_due, params["has_assigned"], params["has_others"], is_ready = session.run(OUTLOOK, params)[0]
        if is_due:
            session.change(WAKE_DELAYED, params)
        return bool(is_due or is_ready or params["has_assigned"])

    def _read_rooms(self, session: Session, params: Params, groups: list[Group]) -> None:
        """Find out how many jobs of these groups may be claimed."""
        these = {"groups": to_json([[group.queue, group.name] for group in groups])}
        rooms = {(row[0], row[1]): row for row in session.run(ROOMS, {**params, **these})} if groups else {}
        for group in groups:
            group.room = Room(rooms[group.queue, group.name], params["limit"])

    def _read_jobs(self, session: Session, groups: list[Group], share: int) -> None:
        """Read the first `share` jobs of each task of these groups."""
        rows: dict[tuple[str, str], list[Row]] = {(group.queue, group.name): [] for group in groups}
        these = to_json([[group.queue, group.name, task] for group in groups for task in group.tasks])
        for row in session.run(NEXT_OF_GROUPS, {"groups": these, "share": share}) if groups else ():
            rows[row[3], row[4]].append(row)
        for group in groups:
            group.fill(rows[group.queue, group.name], share)

    def _rest(self, session: Session, groups: list[Group]) -> bool:
        """Let later claims pass over groups that have no job, or are at a limit; return whether there are any."""
        changes: dict[str, list[Params]] = {}
        for group in groups:
            _add_rest(changes, group, group.room.left <= 0, group.room.next_at)
        for sql, places in changes.items():
            session.change_many(sql, places)
        return bool(changes)

    def _picks(self, session: Session, params: Params, lines: list[Line]) -> list[Pick]:
        """Return the first :limit jobs that the consumer may take, in order."""

        def refill(group: Group) -> None:
            self._read_jobs(session, [group], group.taken + params["limit"])
            for _ in range(group.taken):
                group.jobs.popleft()

        others: list[tuple[Row, Room]] = []
        if params["has_others"] or params["has_assigned"]:
            others += [(row, UNLIMITED) for row in self._first_jobs(session, params)]
        if params["has_assigned"]:
            others += self._assigned(session, params, lines)
        streams: list[Line | Others] = [*lines, Others(others)]
        for line in lines:
            line.begin()
        picks: list[Pick] = []
        while len(picks) < params["limit"]:
            heads = [(tuple(row[:3]), stream) for stream in streams if (row := stream.head(refill))]
            if not heads:
                break
            picks.append(min(heads, key=itemgetter(0))[1].take())
        return picks

    def _assigned(self, session: Session, params: Params, lines: list[Line]) -> list[tuple[Row, Room]]:
        """Return the jobs that are assigned to the consumer in queues with limits, with what these leave."""
        rows = session.run(ASSIGNED_IN_GROUPS, params)
        known = {(line.queue, name): group for line in lines for name, group in line.groups.items()}
        new = {place: Group(*place) for row in rows if (place := (row[3], row[4])) not in known}
        self._read_rooms(session, params, list(new.values()))
        known |= new
        return [(row, known[row[3], row[4]].room) for row in rows]

    def _advance(self, session: Session, picks: list[Pick], at: float) -> None:
        """Record that these jobs were claimed: advance their groups, and let later claims pass over those without jobs,
        or at a limit."""
        turns: dict[str, Params] = {}  # of queues
        last: dict[Group, Pick] = {}  # of each group
        rooms: dict[Room, int] = {}  # how many jobs were claimed of each
        for pick in picks:
            rooms[pick.room] = rooms.get(pick.room, 0) + 1
            if group := pick.group:
                last[group] = pick
                if pick.task in group.left:
                    group.left[pick.task] -= 1
                if pick.queue_turn is not None:
                    turns.setdefault(group.queue, {})["turn"] = pick.queue_turn
                if not group.name:
                    turns.setdefault(group.queue, {})["unnamed_turn"] = pick.turn
        for queue, changed in turns.items():
            session.set_columns("queues", queue, **changed)
        changes: dict[str, list[Params]] = {}
        for group, pick in last.items():
            if group.name:
                _add(changes, SET_TURN, group, turn=pick.turn)
            _add_rest(changes, group, rooms[group.room] == group.room.running)
        for room, number in rooms.items():
            if room.rate_jobs is not None:
                for n in range(room.last + 1, room.last + number + 1):
                    _add(changes, ADD_START, room, n=n, at=at)
                _add(changes, DELETE_STARTS, room, n=room.last + number - room.rate_jobs)
        for sql, rows in changes.items():
            session.change_many(sql, rows)

    def peek(
        self,
        limit: int = 10,
        *,
        queues: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        consumer: str | None = None,
        now: float | None = None,
    ) -> list[Job]:
        """Return up to `limit` jobs in the order in which they would be delivered, without taking them.

        queues, tasks: as for `dequeue`.
        consumer: include the jobs assigned to this consumer.
        """
        params = {
            **claim_filter(consumer if consumer is None else valid_name("consumer", consumer), queues, tasks),
            "limit": valid_int("limit", 1, limit),
            "now": self._time(now),
        }
        if self._read(OVERDUE, params)[0][2]:
            with self._transaction(durable=False) as session:
                session.change(PROMOTE, {**params, "limit": MAX_PROMOTED})
                lines = self._lines(session, params) if self._begin_turns(session, params) else None
                if lines is not None:
                    ids = [pick.id for pick in self._picks(session, params, lines)]
                    found = {row[0]: row for row in session.run(THESE_JOBS, {"ids": to_json(ids)})}
                    return [to_job(found[job_id]) for job_id in ids]
        return [to_job(row) for row in self._read(PEEK, params)]


def _lines_of(rows: list[Row]) -> list[Line]:
    """Return the queues of the rows of READY, with their groups."""
    lines: dict[str, Line] = {}
    for queue, task, name, turn, weight, queue_turn, unnamed_turn, is_limited, has_unnamed in rows:
        line = lines.get(queue) or lines.setdefault(queue, Line(queue, queue_turn, bool(is_limited)))
        if name is not None:
            line.group(name, turn, weight).tasks.append(task)
        if has_unnamed and task not in (unnamed := line.group("", unnamed_turn, None)).tasks:
            unnamed.tasks.append(task)
    return list(lines.values())


def _add_rest(changes: dict[str, list[Params]], group: Group, is_full: bool, next_at: float | None = None) -> None:
    """Let later claims pass over a group with a name that is at a limit, or over those of its tasks without jobs."""
    if group.name:
        if is_full:
            _add(changes, REST_GROUP, group, next_at=next_at)
        for task in [task for task, left in group.left.items() if not left]:
            _add(changes, REST_TASK, group, task=task)


def _add(changes: dict[str, list[Params]], sql: str, of: Group | Room, **values: Any) -> None:
    changes.setdefault(sql, []).append({"queue": of.queue, "name": of.name, **values})


def batch_size(attempts: list[tuple[int, int]], prefetches: bool) -> int:
    """Return how many of the next jobs to claim, given their (attempts with this one, max_attempts).

    A job that was delivered before is claimed alone: if it kills its consumer again, no other job is affected. So is a
    job with a single attempt, unless the attempt counts only when the job begins.
    """
    # guard: a job with one attempt is claimed alone
    alone = (n for n, (made, most) in enumerate(attempts) if made > 1 or (most == 1 and not prefetches))
    # guard: a redelivered job is claimed alone
    return max(1, next(alone, len(attempts)))


def claim_filter(consumer: str | None, queues: Sequence[str] | None, tasks: Sequence[str] | None) -> Params:
    known = None if tasks is None else _between_newlines(tuple(valid_list("tasks", tasks)))
    return {"consumer": consumer, "queues": name_list("queue", queues), "tasks": known}


@lru_cache(maxsize=64)
def _between_newlines(tasks: tuple[str, ...]) -> str:
    """Return the names of the tasks as KNOWN expects them."""
    return "\n".join(["", *(valid_name("task", task) for task in tasks), ""])


def name_list(what: str, names: Sequence[str] | None) -> str | None:
    """Return the names of queues or tasks as JSON."""
    return None if names is None else json.dumps([valid_name(what, name) for name in valid_list(f"{what}s", names)])


def valid_group(group: str) -> str:
    return valid_name("group", group, MAX_GROUP_CHARS)


def valid_rate(rate: Any) -> tuple[int, float]:
    if not (isinstance(rate, (tuple, list)) and len(rate) == 2):
        raise ValueError(f"expected rate to be (jobs, seconds), such as (10, 1.0), got {short(rate)}")
    return valid_int("the jobs of rate", 1, rate[0], MAX_RATE), above_0("the seconds of rate", rate[1])
