"""pqueue: a persistent job queue in one file of Python's standard library, on SQLite.

    queue = open_queue()                              # var/queue.db, or what $PQUEUE_URL names
    queue.enqueue("greet", {"name": "Ada"})           # on disk when this returns
    job = queue.dequeue("worker-1")                   # a lease: 60 seconds, one attempt
    print("hello", job.payload["name"])
    queue.complete(job)                               # or fail(job, error), release(job)

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

1. When `enqueue` or `complete` returns, it is on disk (`synchronous=FULL`). `durability="normal"` survives any crash
   of a process, but may lose the last moments before a power cut.
2. At least once: a job is delivered again only if its consumer released it, its lease ran out, its consumer died, or
   the power failed before its completion was synced. With `max_attempts=1`, at most once: a job that began, and of
   which it is not known that it finished, is `failed`.
3. Every delivery has its own lease token. `complete`, `fail`, `release`, `extend` and `update` with an old token
   change nothing and raise `LeaseLost`. A late completion is accepted while nobody took the job back.
4. Exactly once for what is written in one `transaction()`: rows of yours, follow-up jobs and the completion.
5. A job that kills its consumers is `failed` after `max_attempts` deliveries, and its error names them. What a
   consumer released, or had not begun when it died, does not count.
6. Order at dequeue: priority (higher first), then due time, then id.
7. A database that cannot be trusted is refused: on a network drive, of a newer schema, of another program. If it is
   replaced or moved, or its log deleted, while a process has it open, the next write raises DatabaseReplaced.
8. `lease_token` and `lease_expires_at` are set exactly while a job is `processing`.

All times are Unix seconds, UTC, as float; all durations are seconds. Every method that reads the clock takes `now`.
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import math
import mmap
import os
import random
import re
import select
import shlex
import shutil
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

try:
    import fcntl
except ImportError:  # Windows: no turnstile, no doorbell, and a dead consumer is known by its lease alone
    fcntl = None  # type: ignore[assignment]

__version__ = "0.1.0"

DEFAULT_URL = "var/queue.db"
DEFAULT_MAX_ATTEMPTS = 3
LEASE_SECONDS = 60.0
MAX_CONSUMERS = 256  # of one queue object; each has two descriptors
MAX_ID = 2**63 - 1
MAX_PAYLOAD_BYTES = 1_048_576
MAX_JSON_DEPTH = 100  # Python's parser gives up near 1000, less what its caller has used
MAX_ERROR_CHARS = 10_000
MAX_TEXT_CHARS = 1000  # of a text to search for
MAX_GROUPS = 10_000  # of failed jobs
FAILURE_CHARS = 80  # of an error, by which failed jobs are grouped; an index has them
BUSY_SECONDS = 5.0  # how long a write waits for another writer before it raises QueueBusy
TURN_SECONDS = 1.0  # how long it waits of that for its turn, and how long one process may keep the others waiting
DEAD_CHECK_SECONDS = 1.0  # how often a dequeue looks for dead consumers
RECOVERY_BATCH = 1000  # jobs promoted or taken back in one dequeue, so that it stays short
PRUNE_BATCH = 1000
FEW = 100_000  # jobs of a state that are looked through by its index; more are met soon enough on the way by id
WINDOW = 1000  # ids that a search looks at between two looks at the clock
TOGETHER = 8  # jobs that a search for a text reads whole at once: each may hold 2 MiB
WAL_BYTES = 67_108_864  # the write-ahead log is cut to this when its readers allow
LEAST_FREE_BYTES = 268_435_456  # below this `check` warns of the disk
WAIT_SECONDS = 1.0  # the longest sleep of `wait`: it bounds what a missed ring or a dead consumer costs
POLL_SECONDS = 0.1  # how often to look where no ring comes: it was lost, or the platform has no bells

ENQUEUE_TRIES = 100  # while others take and free its key

LANES = ("others", "consumers")  # before the way to write
REPEAT_SECONDS = 0.001  # how long a process may write, call after call, while a writer that it woke up is waiting
OVERTAKE_SECONDS = 0.005  # how long any process may go before such a writer
HANDOVER_SECONDS = 0.01  # how long the lock is kept for a writer after that, which may have died

SYNCHRONOUS = ("off", "normal", "full", "extra")
MINIMUM_SQLITE = (3, 35)  # RETURNING
APPLICATION_ID = 0x70717565  # "pque" in the file's header
# File systems by their type in /proc/self/mounts. SQLite needs locks and shared memory that all users of a file see.
LOCAL_FILE_SYSTEMS = (
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "nilfs2", "reiserfs", "ufs", "hfsplus"),
    *("apfs", "tmpfs", "ramfs", "rootfs", "overlay", "aufs", "squashfs", "erofs", "iso9660", "unknown"),
)
SHARED_FILE_SYSTEMS = (  # or the beginning of their type
    *(
        "nfs",
        "cifs",
        "smb",
        "ncp",
        "afs",
        "9p",
        "ceph",
        "coda",
        "glusterfs",
        "lustre",
        "beegfs",
        "gpfs",
        "ocfs2",
        "gfs",
    ),
    *(
        "pvfs2",
        "orangefs",
        "moosefs",
        "vboxsf",
        "vmhgfs",
        "prl_fs",
        "virtiofs",
        "davfs",
        "fakeowner",
        "drvfs",
        "wekafs",
    ),
    *(
        "fuse.sshfs",
        "fuse.gluster",
        "fuse.ceph",
        "fuse.s3",
        "fuse.rclone",
        "fuse.juicefs",
        "fuse.gcsfuse",
        "fuse.goofys",
    ),
    *("fuse.vmhgfs", "fuse.grpcfuse", "fuse.osxfs", "fuse.moosefs", "fuse.mfs", "fuse.lizardfs", "fuse.seaweedfs"),
    *("fuse.blobfuse", "fuse.cephfs", "fuse.smb", "fuse.nfs", "fuse.davfs", "fuse.mount.davfs", "fuse.wslfs"),
)

UNFINISHED = ("scheduled", "pending", "processing")
FINISHED = ("completed", "failed", "cancelled")
STATES = UNFINISHED + FINISHED

Params = dict[str, Any]
NOTHING: Params = {}


# Errors ###############################################################################################################


class QueueError(Exception):
    """The base of all errors of the queue."""


class LeaseLost(QueueError):
    """The job belongs to somebody else by now: drop its work, or let `transaction` roll it back."""


class JobNotFound(QueueError):
    """There is no job of this id: it was pruned, deleted, or never enqueued."""


class InvalidTransition(QueueError):
    """The job's state does not allow this verb."""


class QueueBusy(QueueError):
    """Another writer held the database for longer than `BUSY_SECONDS`. Try again."""


class QueueFull(QueueError):
    """The queue is at its `max_pending`, or its disk is full. Try again when there is room."""


class SchemaMismatch(QueueError):
    """The file is not a queue that this version can work with."""


class DatabaseReplaced(QueueError):
    """The database was moved, replaced, or its log deleted while it was open. Nothing more can be written: restart."""


class DoNotRetry(Exception):
    """Raise it in a task when another attempt would fail as well: the job is `failed` at once."""


# Types ################################################################################################################


class Job(NamedTuple):
    """One row of `jobs`, as of when it was read; the schema below tells each field's meaning and unit."""

    id: int
    queue: str
    task: str
    payload: Any
    state: str
    priority: int
    run_at: float
    attempts: int
    max_attempts: int
    key: str | None
    assigned_to: str | None
    consumer: str | None
    lease_token: str | None
    lease_expires_at: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: float | None
    result: Any
    error: str | None


# Tasks ################################################################################################################


@dataclass(frozen=True, slots=True)
class Task:
    """A named function that takes the job and returns a JSON result, with what `task` was told about it."""

    name: str
    function: Callable[[Job], Any]
    max_attempts: int
    backoff_base_seconds: float
    timeout_seconds: float | None

    def __call__(self, job: Job) -> Any:
        return self.function(job)


TASKS: dict[str, Task] = {}


def task(
    name: str | None = None,
    *,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    backoff_base_seconds: float = 5.0,
    timeout_seconds: float | None = None,
) -> Callable[[Callable[[Job], Any]], Task]:
    """Register the decorated function as the task of this name (its own by default).

    `max_attempts` applies to jobs enqueued by a program that has registered the task; the backoff and the timeout
    apply in the consumer. Raises ValueError if the name is taken.
    """

    def register(function: Callable[[Job], Any]) -> Task:
        entry = Task(
            _name("task", name or function.__name__),
            function,
            _at_least("max_attempts", 1, max_attempts),
            backoff_base_seconds,
            timeout_seconds,
        )
        if entry.name in TASKS:
            raise ValueError(f"cannot register task {entry.name!r}: the name is taken")
        TASKS[entry.name] = entry
        return entry

    return register


_current = threading.local()


def current_queue() -> PersistentQInterface:
    """Return, in a task, the queue that its job came from: for `update`, `transaction` and follow-up jobs."""
    queue: PersistentQInterface | None = getattr(_current, "queue", None)
    if queue is None:
        raise QueueError("no task runs in this thread: open a queue of your own")
    return queue


def run_task(queue: PersistentQInterface, job: Job) -> Any:
    """Run the job's task and return its result. Raises what it raises, or LookupError for an unknown task."""
    if job.task not in TASKS:
        known = ", ".join(sorted(TASKS)) or "none"
        raise LookupError(f"unknown task {job.task!r}; this consumer knows {known}: give it --import MODULE")
    _current.queue = queue
    try:
        return TASKS[job.task](job)
    finally:
        _current.queue = None


def backoff_seconds(attempts: int, base_seconds: float = 5.0, cap_seconds: float = 3600.0) -> float:
    """Return how long to wait after this many attempts: base, 2 x base, 4 x base … up to the cap, half of it random.

    "Equal jitter", after Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    whole = min(cap_seconds, base_seconds * 2.0 ** min(attempts - 1, 60))
    return whole / 2 + random.uniform(0, whole / 2)


# Schema ###############################################################################################################

# {id} and {float} are the dialect's. A migration is a list of statements; the file's user_version counts the
# migrations it has had. Change the schema by adding one, never by editing one.
MIGRATIONS: list[list[str]] = [
    [
        """
CREATE TABLE jobs (
    id               {id},           -- grows with every job
    queue            TEXT NOT NULL,  -- queues.name
    task             TEXT NOT NULL,  -- name of the handler
    payload          TEXT NOT NULL,  -- JSON
    state            TEXT NOT NULL,  -- and what goes with each: see the CHECK
    priority         INTEGER NOT NULL,    -- higher first
    run_at           {float} NOT NULL,    -- not before; Unix seconds; moves with every retry
    attempts         INTEGER NOT NULL DEFAULT 0,  -- deliveries so far, counted at dequeue
    max_attempts     INTEGER NOT NULL,    -- deliveries before it is set aside
    key              TEXT,           -- unique per queue among unfinished jobs; NULL: none
    assigned_to      TEXT,           -- the only consumer that may run it; NULL: any
    consumer         TEXT,           -- who has it, or had it last; NULL: nobody yet
    lease_token      TEXT,           -- TOKEN.NUMBER: consumers.token, number of its claim; NULL unless processing
    lease_expires_at {float},        -- Unix seconds; NULL unless processing
    created_at       {float} NOT NULL,    -- Unix seconds
    started_at       {float},        -- of the last delivery, Unix seconds; NULL: never delivered
    finished_at      {float},        -- Unix seconds; NULL until completed, failed or cancelled
    progress         {float},        -- 0 to 1, as the task told; NULL: it told nothing
    result           TEXT,           -- JSON; until completed what `update` stored, for the next attempt too; NULL: none
    error            TEXT,           -- of the last attempt that failed; NULL: none did
    CHECK (CASE state
        WHEN 'pending'    THEN attempts < max_attempts AND lease_token IS NULL AND finished_at IS NULL
        WHEN 'scheduled'  THEN attempts < max_attempts AND lease_token IS NULL AND finished_at IS NULL
        WHEN 'processing' THEN attempts <= max_attempts AND lease_token IS NOT NULL AND finished_at IS NULL
        WHEN 'completed'  THEN attempts <= max_attempts AND lease_token IS NULL AND finished_at IS NOT NULL
        WHEN 'failed'     THEN attempts <= max_attempts AND lease_token IS NULL AND finished_at IS NOT NULL
        WHEN 'cancelled'  THEN attempts <= max_attempts AND lease_token IS NULL AND finished_at IS NOT NULL
        ELSE FALSE END),
    CHECK ((lease_token IS NULL) = (lease_expires_at IS NULL))
)""",
        """
CREATE TABLE queues (
    name        TEXT PRIMARY KEY,
    paused      INTEGER NOT NULL DEFAULT 0,  -- 1: by an operator, 2: by a move; nothing is delivered
    max_pending INTEGER,                     -- enqueue is refused at this many pending jobs; NULL: never
    pending     INTEGER NOT NULL DEFAULT 0   -- unassigned pending jobs, counted while max_pending is set
)""",
        """
CREATE TABLE consumers (
    id           {id},
    name         TEXT NOT NULL,  -- readable; a restarted consumer may bear it again
    token        TEXT NOT NULL UNIQUE,  -- random, new at every start
    host         TEXT NOT NULL,
    pid          INTEGER NOT NULL,
    slot         INTEGER,        -- number of its lock and bell beside the database; NULL: the platform has none
    queues       TEXT,           -- JSON list of those it serves; NULL: all
    tasks        TEXT NOT NULL,  -- JSON list of the tasks its program had registered
    started_at   {float} NOT NULL,    -- Unix seconds
    last_seen_at {float} NOT NULL,    -- of its last heartbeat, Unix seconds
    state        TEXT NOT NULL CHECK (state IN ('running', 'stopped', 'dead')),
    completed    INTEGER NOT NULL DEFAULT 0,  -- jobs, as of its last heartbeat
    failed       INTEGER NOT NULL DEFAULT 0   -- attempts, likewise
)""",
        """
CREATE TABLE history (
    id      {id},
    job_id  BIGINT NOT NULL,     -- jobs.id
    at      {float} NOT NULL,    -- Unix seconds
    event   TEXT NOT NULL,       -- failed, expired, died, released; or an operator's: resubmitted, marked failed …
    actor   TEXT NOT NULL,       -- the consumer or the operator
    attempt INTEGER NOT NULL,    -- jobs.attempts when it happened
    error   TEXT                 -- NULL: none
)""",
        """CREATE INDEX jobs_claim ON jobs (queue, priority DESC, run_at, id)
           WHERE state = 'pending' AND assigned_to IS NULL""",
        """CREATE INDEX jobs_assigned ON jobs (assigned_to, priority DESC, run_at, id)
           WHERE state = 'pending' AND assigned_to IS NOT NULL""",
        "CREATE INDEX jobs_scheduled ON jobs (run_at) WHERE state = 'scheduled'",
        "CREATE INDEX jobs_processing ON jobs (lease_expires_at) WHERE state = 'processing'",
        "CREATE INDEX jobs_finished ON jobs (state, queue, finished_at) WHERE finished_at IS NOT NULL",
        "CREATE INDEX jobs_failed ON jobs (task, substr(error, 1, 80), id) WHERE state = 'failed'",
        """CREATE UNIQUE INDEX jobs_key ON jobs (queue, key)
           WHERE key IS NOT NULL AND state IN ('scheduled', 'pending', 'processing')""",
        "CREATE INDEX history_job ON history (job_id)",
        "CREATE INDEX consumers_running ON consumers (id) WHERE state = 'running'",
    ]
]

# Statements: each transition names the state it starts from ###########################################################

COLUMNS = ", ".join(Job._fields)
LONG = ("payload", "result", "error")
ANY_OF = ", ".join(f":id{n}" for n in range(TOGETHER))
NO_LEASE = "lease_token = NULL, lease_expires_at = NULL"
HELD = "id = :id AND state = 'processing' AND lease_token = :token"
WAITING = "queue = :queue AND state = 'pending' AND assigned_to IS NULL"
HAS_ROOM = "(max_pending IS NULL OR max_pending > pending)"
ORDER = "priority DESC, run_at, id"

ENQUEUE = f"""
INSERT INTO jobs (queue, task, payload, state, priority, run_at, max_attempts, key, assigned_to, created_at)
SELECT name, :task, :payload, :state, :priority, :run_at, :max_attempts, :key, :assigned_to, :now
FROM queues
WHERE name = :queue AND {HAS_ROOM}
ON CONFLICT (queue, key) WHERE key IS NOT NULL AND state IN {UNFINISHED} DO NOTHING
RETURNING id"""
ENQUEUE_AT_ONCE = ENQUEUE.removesuffix("RETURNING id")  # SQLite's last_insert_rowid is cheaper

# :payloads is a JSON array of [payload], so that each keeps its text: one statement for all is faster than one each.
INSERT_MANY = """
INSERT INTO jobs (queue, task, payload, state, priority, run_at, max_attempts, assigned_to, created_at)
SELECT :queue, :task, substr(value, 2, length(value) - 2), :state, :priority, :run_at, :max_attempts, :assigned_to, :now
FROM json_each(:payloads)"""
INSERT_MANY_AT_ONCE = f"""
{INSERT_MANY} WHERE EXISTS (SELECT 1 FROM queues WHERE name = :queue AND max_pending IS NULL)"""

ROOM = "SELECT max_pending - pending, max_pending FROM queues WHERE name = :queue"
COUNT_PENDING = f"UPDATE queues SET pending = (SELECT count(*) FROM jobs WHERE {WAITING}) WHERE name = :queue"
LIMITED = "SELECT name FROM queues WHERE max_pending IS NOT NULL"
WITH_KEY = f"SELECT id FROM jobs WHERE queue = :queue AND key = :key AND state IN {UNFINISHED}"
MOVES = "('moving', 'moved')"
ADD_QUEUE = f"""
INSERT INTO queues (name, paused)
SELECT :queue, CASE WHEN EXISTS (SELECT 1 FROM history WHERE job_id = 0 AND event IN {MOVES}) THEN 2 ELSE 0 END
WHERE true ON CONFLICT DO NOTHING"""

# {served} limits q to the queues a consumer serves. The best :limit of each queue, then the best :limit of those:
# paused queues, other queues and jobs assigned elsewhere are never stepped over one by one. SQLite's CROSS JOIN keeps
# q the outer loop.
CANDIDATES = f"""
SELECT jobs.id, priority, run_at, attempts, max_attempts FROM queues q CROSS JOIN jobs
WHERE q.paused = 0 {{served}} AND jobs.id IN
    (SELECT id FROM jobs WHERE queue = q.name AND state = 'pending' AND assigned_to IS NULL
     ORDER BY {ORDER} LIMIT :limit)
UNION ALL
SELECT * FROM (SELECT id, priority, run_at, attempts, max_attempts FROM jobs
               WHERE state = 'pending' AND assigned_to = :consumer
               AND queue NOT IN (SELECT name FROM queues WHERE paused <> 0) ORDER BY {ORDER} LIMIT :limit) mine"""

CLAIM = f"""
UPDATE jobs SET state = 'processing', attempts = attempts + 1, consumer = :consumer, lease_token = :token,
    lease_expires_at = :lease_expires_at, started_at = :now
WHERE state = 'pending' AND id IN (SELECT id FROM ({CANDIDATES}) candidates ORDER BY {ORDER} LIMIT :limit)
RETURNING {COLUMNS}"""

NEXT_ATTEMPTS = f"SELECT attempts, max_attempts FROM ({CANDIDATES}) candidates ORDER BY {ORDER} LIMIT :limit"

OVERDUE = """
SELECT (SELECT min(run_at) FROM jobs WHERE state = 'scheduled') <= :now,
       (SELECT min(lease_expires_at) FROM jobs WHERE state = 'processing') <= :now"""

NEXT_EVENT = f"""
SELECT min(at) FROM (
    SELECT 0.0 AS at WHERE EXISTS ({CANDIDATES})
    UNION ALL SELECT min(run_at) FROM jobs WHERE state = 'scheduled'
    UNION ALL SELECT min(lease_expires_at) FROM jobs WHERE state = 'processing') events"""

PROMOTE = """
UPDATE jobs SET state = 'pending' WHERE state = 'scheduled' AND id IN
    (SELECT id FROM jobs WHERE state = 'scheduled' AND run_at <= :now ORDER BY run_at LIMIT :limit)"""

EXPIRED = f"""
SELECT {COLUMNS} FROM jobs WHERE state = 'processing' AND lease_expires_at <= :now
ORDER BY lease_expires_at LIMIT :limit"""

ORPHANED = f"""
SELECT {COLUMNS} FROM jobs WHERE state = 'processing' AND EXISTS
    (SELECT 1 FROM consumers WHERE token = substr(lease_token, 1, 16) AND consumers.state <> 'running') LIMIT :limit"""

TAKE_BACK = f"UPDATE jobs SET state = 'pending', error = :error, {NO_LEASE} WHERE {HELD} AND attempts < max_attempts"
COMPLETE = f"""
UPDATE jobs SET state = 'completed', finished_at = :now, result = :result, error = NULL, {NO_LEASE} WHERE {HELD}"""

# :settled is a JSON array of [id, lease token, result].
COMPLETE_MANY = f"""
UPDATE jobs SET state = 'completed', finished_at = :now, result = json_extract(value, '$[2]'), error = NULL, {NO_LEASE}
FROM json_each(:settled) WHERE jobs.id = json_extract(value, '$[0]') AND state = 'processing'
    AND lease_token = json_extract(value, '$[1]') RETURNING jobs.id"""

FAIL = f"UPDATE jobs SET state = 'failed', finished_at = :now, error = :error, {NO_LEASE} WHERE {HELD}"
RETRY = f"UPDATE jobs SET state = 'scheduled', run_at = :run_at, error = :error, {NO_LEASE} WHERE {HELD}"
RELEASE = f"UPDATE jobs SET state = 'pending', attempts = attempts - 1, {NO_LEASE} WHERE {HELD}"
EXTEND = f"UPDATE jobs SET lease_expires_at = :lease_expires_at WHERE {HELD}"
UPDATE = f"""
UPDATE jobs SET progress = coalesce(:progress, progress), result = coalesce(:result, result) WHERE {HELD}"""

RESUBMIT = f"""
UPDATE jobs SET state = 'pending', run_at = :now, attempts = 0, started_at = NULL, finished_at = NULL, progress = NULL,
    error = NULL WHERE id = :id AND state IN {FINISHED}
    AND NOT EXISTS (SELECT 1 FROM queues WHERE name = jobs.queue AND NOT {HAS_ROOM})
    AND NOT EXISTS (SELECT 1 FROM jobs o WHERE o.queue = jobs.queue AND o.key = jobs.key AND o.state IN {UNFINISHED})"""
MARK_FAILED = f"""
UPDATE jobs SET state = 'failed', finished_at = :now, error = :error, {NO_LEASE}
WHERE id = :id AND state IN {UNFINISHED}"""
CANCEL = f"""
UPDATE jobs SET state = 'cancelled', finished_at = :now, {NO_LEASE} WHERE id = :id AND state IN {UNFINISHED}"""
ASSIGN = f"""
UPDATE jobs SET assigned_to = :assigned_to, state = CASE state WHEN 'processing' THEN 'pending' ELSE state END,
    attempts = attempts - CASE state WHEN 'processing' THEN 1 ELSE 0 END, {NO_LEASE}
WHERE id = :id AND state IN {UNFINISHED}"""

# Run before the transition, so that it tells the attempt that ends there.
RECORD = """
INSERT INTO history (job_id, at, event, actor, attempt, error)
SELECT id, :now, :event, :actor, attempts, :error FROM jobs WHERE id = :id"""

LOST_BY = """
SELECT actor FROM history WHERE job_id = :id AND event IN ('expired', 'died')
AND id > (SELECT coalesce(max(id), 0) FROM history WHERE job_id = :id AND event = 'resubmitted') ORDER BY id"""

HELD_BY = f"SELECT {COLUMNS} FROM jobs WHERE state = 'processing' AND substr(lease_token, 1, 16) = :token"
SLOT_OF = "SELECT slot FROM consumers WHERE token = :token"

REGISTER = """
INSERT INTO consumers (name, token, host, pid, slot, queues, tasks, started_at, last_seen_at, state)
VALUES (:name, :token, :host, :pid, :slot, :queues, :tasks, :now, :now, 'running')"""
SUCCEED = "UPDATE consumers SET state = 'dead' WHERE slot = :slot AND state = 'running'"
LEAVE = "UPDATE consumers SET state = :state WHERE token = :token AND state = 'running'"
RUNNING = "SELECT token, slot FROM consumers WHERE state = 'running' ORDER BY id"
HEARTBEAT = """
UPDATE consumers SET last_seen_at = :now, completed = completed + :completed, failed = failed + :failed
WHERE token = :token"""

FORGET = "DELETE FROM consumers WHERE state <> 'running' AND last_seen_at < :before"

SET_QUEUE = """
INSERT INTO queues (name, {column}) VALUES (:queue, :value) ON CONFLICT (name) DO UPDATE SET {column} = :value"""

# Never the newest: SQLite would give its id to another job.
PRUNABLE = """
SELECT jobs.id FROM queues q CROSS JOIN jobs WHERE jobs.id IN
    (SELECT id FROM jobs WHERE state = :state AND queue = q.name AND finished_at < :before
     AND id < (SELECT max(id) FROM jobs) ORDER BY finished_at LIMIT :limit) LIMIT :limit"""

# Where the jobs of a state stand in an index.
INDEXED = {state: [f"state = '{state}'"] for state in ("scheduled", "processing")}
INDEXED["pending"] = [f"state = 'pending' AND assigned_to IS {null}" for null in ("NULL", "NOT NULL")]
INDEXED |= {state: [f"state = '{state}' AND finished_at IS NOT NULL"] for state in FINISHED}

# Counting by state and queue is a walk through an index each, a million jobs in 50 ms.
# One statement, so that no job is counted in two states or in none.
COUNT_UNFINISHED = "SELECT queue, '{state}', count(*), min(run_at) FROM jobs WHERE {place} GROUP BY queue"
COUNT_FINISHED = """
SELECT name, '{state}', (SELECT count(*) FROM jobs WHERE {place} AND queue = q.name), NULL FROM queues q"""
COUNTS = " UNION ALL ".join(
    (COUNT_UNFINISHED if state in UNFINISHED else COUNT_FINISHED).format(state=state, place=place)
    for state in STATES
    for place in INDEXED[state]
)
UNFINISHED_IDS = " UNION ALL ".join(
    f"SELECT id FROM jobs WHERE {place}" for state in UNFINISHED for place in INDEXED[state]
)
FINISHED_BETWEEN = """
SELECT count(*) FROM queues q CROSS JOIN jobs
WHERE state = :state AND queue = q.name AND finished_at >= :start AND finished_at < :end"""

LATEST_COMPLETED = """
SELECT finished_at, run_at, started_at FROM queues q CROSS JOIN jobs WHERE jobs.id IN
    (SELECT id FROM jobs WHERE state = 'completed' AND queue = q.name AND finished_at >= :start AND finished_at < :end
     ORDER BY finished_at DESC LIMIT :limit)"""

ID_RANGE = "SELECT coalesce((SELECT min(id) FROM jobs), 0), coalesce((SELECT max(id) FROM jobs), -1) + 1"

# Its LIMIT, of all there are, keeps SQLite before 3.41 from grouping the rows instead of what the index has of them.
FAILURES = f"""
SELECT task, error, count(*), max(id) FROM
    (SELECT task, substr(error, 1, {FAILURE_CHARS}) AS error, id FROM jobs WHERE state = 'failed' LIMIT {MAX_ID}) failed
GROUP BY task, error ORDER BY count(*) DESC, max(id) DESC LIMIT {MAX_GROUPS}"""


# SQLite: they keep queues.pending, and exist only while some queue has a limit, so that no other queue pays for them.
IS_PENDING = "{row}.state = 'pending' AND {row}.assigned_to IS NULL"
ADD_PENDING = "UPDATE queues SET pending = pending {change} 1 WHERE name = {row}.queue AND max_pending IS NOT NULL"
COUNTERS = {
    f"jobs_{event.lower()}_{row}": (
        f"CREATE TRIGGER jobs_{event.lower()}_{row} AFTER {event} {columns} ON jobs WHEN {IS_PENDING.format(row=row)} "
        f"BEGIN {ADD_PENDING.format(row=row, change=change)}; END"
    )
    for event, columns, row, change in (
        ("INSERT", "", "NEW", "+"),
        ("UPDATE", "OF state, assigned_to, queue", "OLD", "-"),
        ("UPDATE", "OF state, assigned_to, queue", "NEW", "+"),
        ("DELETE", "", "OLD", "-"),
    )
}

TABLES = ("jobs", "queues", "consumers", "history")
OUR_TABLES = f"SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN {TABLES}"
OUR_SCHEMA = f"SELECT type, name, sql FROM sqlite_master WHERE tbl_name IN {TABLES} AND sql IS NOT NULL"
DAMAGED = "SELECT count(*) FROM jobs WHERE " + " OR ".join(
    f"typeof({name}) IN ('text', 'blob')"
    for name in ("priority", "run_at", "attempts", "max_attempts", "created_at", "started_at", "finished_at")
)
MISCOUNTED = f"""
SELECT name FROM queues q WHERE max_pending IS NOT NULL
    AND pending <> (SELECT count(*) FROM jobs WHERE {WAITING.replace(":queue", "q.name")})"""
TRIGGERS = f"SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger' AND tbl_name IN {TABLES} ORDER BY name"

# A move leaves a mark in history, with 0 for its job and JSON in `error`. In the old queue, 'moving' while it waits for
# what runs, and 'moved' afterwards: {"token", "to"}; `attempt` counts how often it was finished. In the new one, 'moved
# here': {"token", "last_id"}, the last job that it has of those in the old one when that was finished `attempt` times.
MARK = f"SELECT id, at, event, attempt, error FROM history WHERE job_id = 0 AND event IN {MOVES} ORDER BY id DESC"
MARKS_HERE = "SELECT id, attempt, error FROM history WHERE job_id = 0 AND event = 'moved here' ORDER BY id DESC"
ADD_MARK = """
INSERT INTO history (job_id, at, event, actor, attempt, error) VALUES (0, :now, :event, :actor, :attempt, :error)"""
UNMARK = f"DELETE FROM history WHERE job_id = 0 AND event IN {MOVES}"
PAUSE_ALL = "UPDATE queues SET paused = 2 WHERE paused = 0"
RESUME_ALL = "UPDATE queues SET paused = 0 WHERE paused = 2"
CARRIED = ", ".join(Job._fields[1:])
CARRY_OVER = f"""
INSERT INTO jobs ({CARRIED}) VALUES (:{CARRIED.replace(", ", ", :")})
ON CONFLICT (queue, key) WHERE key IS NOT NULL AND state IN {UNFINISHED} DO NOTHING RETURNING id"""
STORY_COLUMNS = ("at", "event", "actor", "attempt", "error")
STORY = f"SELECT {', '.join(STORY_COLUMNS)} FROM history WHERE job_id = :id ORDER BY id"
ADD_STORY = """
INSERT INTO history (job_id, at, event, actor, attempt, error) VALUES (:id, :at, :event, :actor, :attempt, :error)"""

# What a copy carries: its first column is the key. Consumers are not among it: they belong to where they run.
COPIED = {
    "queues": "name, paused, max_pending",
    "jobs": COLUMNS,
    "history": "id, job_id, at, event, actor, attempt, error",
}


# The contract, and the verbs over it ##################################################################################


class Session(ABC):
    """One thread's connection to the database. As a context manager a transaction, and inside one a savepoint."""

    ring = False  # a job became pending or scheduled: wake consumers after the commit
    lost: LeaseLost | None = None  # a lease was lost inside: the whole transaction must roll back
    depth = 0  # of transactions in each other
    tangled = False  # one ended before another that was begun inside it: likewise

    @abstractmethod
    def run(self, sql: str, params: Params = NOTHING) -> list[Any]:
        """Execute a statement with :named parameters and return all its rows."""

    @abstractmethod
    def change(self, sql: str, params: Params = NOTHING) -> int:
        """Execute a statement and return how many rows it changed."""

    @abstractmethod
    def change_many(self, sql: str, rows: list[Params]) -> None:
        """Execute a statement once per row."""

    @abstractmethod
    def __enter__(self) -> Session: ...

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None: ...

    def expect_depth(self, depth: int) -> None:
        """Doom the transaction when a block ends before one that was begun inside it."""
        self.tangled = self.tangled or self.depth != depth
        if self.tangled:
            raise QueueError("cannot end a transaction before those begun inside it: neither await nor yield in one")


class LastAttempt(Exception):
    """Undo a claim that was not to be synced."""


class Registration:
    """A consumer of this process: its random token, its slot beside the database, and the numbers of its claims."""

    def __init__(self, name: str, slot: Any) -> None:
        self.name = name
        self.slot = slot
        self.token = os.urandom(8).hex()
        self.claims = count(1)
        self.prefetches = False  # the attempts of its jobs count when they begin


class PersistentQInterface(ABC):
    """The queue's contract: its verbs, written in SQL that SQLite and PostgreSQL share.

    A backend brings sessions, wake-up, liveness, backup and check, the abstract methods below; it must keep the
    guarantees above and pass `QueueContract` in test_pqueue.py.

    Bad arguments raise ValueError. Every method may raise QueueBusy, or QueueFull for a full disk. After an error
    nothing has changed. One object serves many threads, and goes on working in a forked child.
    """

    name: str  # of the database, without a password
    max_batch = 48  # jobs for a consumer to take at once: more would keep an enqueue waiting for more than a few ms
    _LIKE = "LIKE"  # the comparison that ignores the case of ASCII letters
    _BYTES = "length(CAST({} AS BLOB))"  # of a text in UTF-8

    def __init__(self) -> None:
        self._registry: dict[str, Registration] = {}  # replaced, never changed: other threads walk through it
        self._registering = threading.Lock()
        self._looked_for_dead = -math.inf

    # What a backend brings

    @abstractmethod
    def _write(self, *, durable: bool = True, in_batch: bool = False) -> Session:
        """Return this thread's session to enter; durable: its commit survives a power cut; in_batch: it is a
        consumer's, which may be long or one of very many, and lets others go first."""

    @abstractmethod
    def _read(self, sql: str, params: Params = NOTHING) -> list[Any]:
        """Return all rows without keeping a writer waiting."""

    @abstractmethod
    def _insert_many(self, tx: Session, row: Params) -> list[int]:
        """Insert into `jobs` this row with each of its `number` `payloads`, and return the ids in order."""

    @abstractmethod
    def _take_slot(self) -> Any:
        """Return an object with `number` and `close()`, by which others see whether this process lives."""

    @abstractmethod
    def _is_alive(self, slot: int | None) -> bool:
        """Return False when the process that took this slot is known to have died."""

    @abstractmethod
    def _sleep(self, me: Registration, seconds: float, due_in: Callable[[], float]) -> bool:
        """Sleep until a session rings (True), or for these seconds or what `due_in` returns (False).

        A ring after `due_in` was asked must not be missed.
        """

    @property
    @abstractmethod
    def in_transaction(self) -> bool:
        """Whether this thread is inside a transaction, where a signal handler had better not raise."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Any]:
        """Open a transaction that every call on this queue in this thread joins; yield its connection.

        It commits at the end of the block and rolls back on an exception. If a lease was lost inside, it rolls back
        and raises LeaseLost, even if the block caught that. Nested, it is a savepoint of the outer one.
        """

    @abstractmethod
    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a consistent, verified copy to a new file, while others go on working."""

    @abstractmethod
    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        """Return facts about the database and, as "problems", a list of sentences.

        Thorough reads the whole of it, to see that it is undamaged, and takes the way of a writer.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the jobs that this object's consumers hold, as `release` does, and close the database."""

    def _time(self, now: float | None) -> float:
        return time.time() if now is None else _finite("now", now)

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

        The payload is what JSON can hold, up to `MAX_PAYLOAD_BYTES`; `max_attempts` is by default the task's own.
        With a `key` that an unfinished job of the queue has, nothing is stored and that job's id is returned.
        Raises QueueFull when the queue holds `max_pending` pending jobs.
        """
        row = _new_job(task, queue, priority, delay_seconds, run_at, max_attempts, key, assigned_to, self._time(now))
        row["payload"] = encode_json("payload", payload)
        return self._add(row)

    def _add(self, row: Params) -> int:
        with self._write() as tx:
            for _ in range(ENQUEUE_TRIES):
                if rows := tx.run(ENQUEUE, row) or tx.run(WITH_KEY, row):
                    tx.ring = True
                    return cast(int, rows[0][0])
                if not tx.change(ADD_QUEUE, row):
                    room, max_pending = tx.run(ROOM, row)[0]
                    if room is not None and room <= 0:  # else what was in the way has gone: on PostgreSQL others go on
                        raise _full("enqueue", row["queue"], max_pending)
            raise QueueError("cannot enqueue: the database takes no job, though nothing is in its way; run doctor")

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
        """Store one job per payload, all or none, and return their ids in order.

        Raises QueueFull, or ValueError when they are more than the queue's limit, and so can never fit.
        """
        row = _new_job(task, queue, priority, delay_seconds, run_at, max_attempts, None, assigned_to, self._time(now))
        found = list(payloads)
        return self._add_many({**row, "payloads": _encode_payloads(found), "number": len(found)})

    def _add_many(self, row: Params) -> list[int]:
        with self._write() as tx:
            tx.change(ADD_QUEUE, row)
            room, max_pending = tx.run(ROOM, row)[0]
            if room is not None and room < row["number"]:
                raise _full("enqueue", row["queue"], max_pending, row["number"])
            tx.ring = True
            return self._insert_many(tx, row)

    # Working

    def dequeue(self, consumer: str, **options: Any) -> Job | None:
        """Take the next job for this consumer, or return None; the options are those of `dequeue_many`.

        The attempt counts from now on: if this process dies, the job is delivered again while attempts are left. A job
        with `max_attempts=1` is therefore run at most once, even if the power fails.
        """
        jobs = self.dequeue_many(consumer, 1, **options)
        return jobs[0] if jobs else None

    def dequeue_many(self, consumer: str, limit: int, **options: Any) -> list[Job]:
        """Take up to `limit` jobs, in order. A job that was delivered before comes alone, and so does one whose last
        attempt this is, unless `prefetch` is set.

        The options are those of `complete_and_dequeue`.
        """
        return self.complete_and_dequeue((), consumer, limit, **options)[0]

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
        """Complete these (job, result) pairs and take up to `limit` jobs of these queues (None: all) in one commit.

        prefetch: the caller calls `begin` before it runs each job, and only then does the attempt count (on SQLite): if
        this process dies, jobs that it had not begun are delivered again as if it had never taken them.

        Returns the jobs taken, and those of `finished` that were not completed because their lease was lost. Inside
        `transaction` these raise LeaseLost instead.
        """
        settled = [(job, _encode_result(result)) for job, result in finished]
        me = self._registered(consumer, queues, now)
        me.prefetches = prefetch and self._publish_begun(me)
        _at_least("limit", 0, limit)
        return self._exchange(settled, me, limit, queues, lease_seconds, now)

    def begin(self, job: Job, *, now: float | None = None) -> None:
        """Note that the job, taken with `prefetch`, is about to run. Raises LeaseLost if its lease is over."""
        self._expect_lease(job, now)
        self._note_begun(job)
        self._expect_lease(job, now)  # once more: whoever takes it back from now on sees that it had begun

    def _expect_lease(self, job: Job, now: float | None) -> None:
        if job.lease_expires_at is None or self._time(now) >= job.lease_expires_at:
            raise LeaseLost(f"cannot begin job {job.id}: the lease of {job.consumer} on it is over")

    def _publish_begun(self, me: Registration) -> bool:  # noqa: ARG002
        """Let other processes see what this consumer begins; return False where the backend cannot."""
        return False

    def _note_begun(self, job: Job) -> None:  # noqa: B027
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
                if not durable and any(job.attempts == job.max_attempts for job in jobs):
                    raise LastAttempt
            return jobs, lost

        try:
            return exchange(durable=bool(settled) or nested)
        except LastAttempt:  # the power must not give it another: take it anew, and sync
            return exchange(durable=True)

    def _complete_all(self, tx: Session, settled: list[tuple[Job, str | None]], now: float) -> list[Job]:
        """Complete these, and return those whose lease was lost."""
        return [job for job, result in settled if not _complete(tx, job, result, now)]

    def complete(self, job: Job, result: Any = None, *, now: float | None = None) -> None:
        """Finish the job with a JSON result. Raises LeaseLost."""
        encoded = _encode_result(result)
        with self._write(in_batch=True) as tx:
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
        """End the attempt with an error; return the new state, `scheduled` or `failed`. Raises LeaseLost.

        The next attempt is due in `retry_in_seconds`, by default `backoff_seconds(job.attempts)`.
        """
        now = self._time(now)
        delay = backoff_seconds(job.attempts) if retry_in_seconds is None else retry_in_seconds
        again = retry and job.attempts < job.max_attempts
        params = {"now": now, "run_at": now + _finite("retry_in_seconds", delay), "error": _error_text(error)}
        self._settle("fail", RETRY if again else FAIL, job, params, event="failed", durable=True)
        return "scheduled" if again else "failed"

    def release(self, job: Job, *, now: float | None = None) -> None:
        """Give the job back; the attempt does not count. Raises LeaseLost."""
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
        """Let the lease run out this many seconds from now. Raises LeaseLost."""
        self._settle("extend", EXTEND, job, {"lease_expires_at": self._time(now) + _lease(lease_seconds)})

    def update(self, job: Job, *, progress: float | None = None, result: Any = None) -> None:
        """Store progress (0 to 1) or a partial result while the job runs. Raises LeaseLost.

        A result is on disk when this returns, so what the task does next may depend on it; progress alone is not.
        """
        if progress is not None and not (isinstance(progress, (int, float)) and 0 <= progress <= 1):
            raise ValueError(f"expected progress between 0 and 1, got {progress!r}")
        params = {"progress": progress, "result": _encode_result(result)}
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
            if not tx.change(sql, params):
                raise _lost(tx, verb, job)

    # Reading

    def get(self, job_id: int) -> Job:
        """Return the job. Raises JobNotFound."""
        rows = self._read(f"SELECT {COLUMNS} FROM jobs WHERE id = :id", {"id": _id(job_id)})
        if not rows:
            raise JobNotFound(f"no job {job_id}")
        return _job(rows[0])

    def history(self, job_id: int, *, limit: int = 2**31 - 1) -> list[dict[str, Any]]:
        """Return the job's failed, expired, died and released attempts and what operators did, oldest first; of more
        than the limit, the last.

        Keys: at, event, actor, attempt, error, as in the table.
        """
        columns = "at, event, actor, attempt, error"
        last = f"SELECT {columns} FROM history WHERE job_id = :id ORDER BY id DESC LIMIT :limit"
        return self._dicts(columns, last, {"id": _id(job_id), "limit": _at_least("limit", 1, limit)})[::-1]

    def _dicts(self, columns: str, sql: str, params: Params) -> list[dict[str, Any]]:
        return [dict(zip(columns.split(", "), row, strict=True)) for row in self._read(sql, params)]

    def list_jobs(
        self,
        *,
        before_id: int | None = None,
        limit: int = 100,
        excerpt: int | None = None,
        shown: Callable[[Job], Job] | None = None,
        **filters: Any,
    ) -> list[Job]:
        """Return the jobs that match, newest first; page by the last id seen.

        Filters: state, queue, task, key, consumer; text, that the payload, result, error or key contains as people read
        it, in any case; created_from and created_before, Unix seconds; ids, of these jobs only.
        excerpt: read at most so many characters of each payload, result and error; of a longer one return an `Excerpt`.
        With 0, do not read them: all three are None.
        shown: what the reader sees of a job, which is less than all: `text` finds nothing that this has removed.
        """
        return self.search_jobs(
            before_id=before_id, limit=limit, seconds=math.inf, excerpt=excerpt, shown=shown, **filters
        )[0]

    def search_jobs(
        self,
        *,
        before_id: int | None = None,
        limit: int = 100,
        seconds: float = 0.1,
        excerpt: int | None = None,
        shown: Callable[[Job], Job] | None = None,
        **filters: Any,
    ) -> tuple[list[Job], int | None]:
        """Return what `list_jobs` does, as far as it is found in about so many seconds, and the id before which to
        go on, or None when there is no more."""
        where, params = self._matching(**filters)
        params["before_id"] = MAX_ID if before_id is None else _at_least("before_id", 0, before_id, MAX_ID)
        params["limit"] = _at_least("limit", 1, limit)
        most = None if excerpt is None else _at_least("excerpt", 0, excerpt)
        ends_at = time.monotonic() + seconds
        if "text" not in params:
            rows, before = self._find(_columns(most), where, params, ends_at)
            return [_shortened(row, most) for row in rows], before
        jobs: list[Job] = []
        for job_id, row in self._with_text(shown, where, params, ends_at):
            if row is not None:
                jobs.append(_shortened(row, most))
            if len(jobs) == limit or time.monotonic() >= ends_at:
                return jobs, job_id
        return jobs, None

    def _with_text(
        self, shown: Callable[[Job], Job] | None, where: str, params: Params, ends_at: float
    ) -> Iterator[tuple[int, Any]]:
        """Yield the ids of the jobs that may hold the text, newest first, each with its row if it does, else None."""
        load = f"SELECT {COLUMNS} FROM jobs WHERE id IN ({ANY_OF}) AND {where}"
        load += " AND state = :state" if "state" in params else ""
        before: int | None = params["before_id"]
        while before is not None:
            span = {**params, "before_id": before, "limit": min(params["limit"], WINDOW)}
            rows, before = self._find("id", where, span, ends_at)
            for start in range(0, len(rows), TOGETHER):
                ids = [row[0] for row in rows[start : start + TOGETHER]]
                named = {f"id{n}": ids[min(n, len(ids) - 1)] for n in range(TOGETHER)}
                found = {
                    row[0]: row for row in self._read(load, {**params, **named}) if _holds(row, params["text"], shown)
                }
                yield from ((job_id, found.get(job_id)) for job_id in ids)
            if before is not None:
                yield before, None

    def _find(self, columns: str, where: str, params: Params, ends_at: float) -> tuple[list[Any], int | None]:
        """Return the rows of jobs that match without regard to the text, as `search_jobs` does."""
        places = _places(params)
        if not places:
            return self._walk(columns, where, params, ends_at)
        if not self._are_few(places, FEW // 10 if "text" in params else FEW):
            return self._walk(columns, f"{where} AND state = :state", params, ends_at)
        rows = self._newest(columns, "+id", places, where, params)  # +: not by walking through all jobs
        return rows, rows[-1][0] if len(rows) == params["limit"] else None

    def _are_few(self, places: list[str], limit: int) -> bool:
        sql = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE {} LIMIT :limit) found"
        found: int = sum(self._read(sql.format(place), {"limit": limit})[0][0] for place in places)
        return found < limit

    def _walk(self, columns: str, where: str, params: Params, ends_at: float) -> tuple[list[Any], int | None]:
        """Go through all jobs, the newest first, with a look at the clock at times."""
        rows: list[Any] = []
        high, span = params["before_id"], WINDOW if ends_at < math.inf else MAX_ID
        while (newest := self._read("SELECT max(id) FROM jobs WHERE id < :high", {"high": high})[0][0]) is not None:
            high = max(0, newest - span + 1)
            window = {**params, "before_id": newest + 1, "low": high, "limit": params["limit"] - len(rows)}
            rows += self._newest(columns, "id", ["id >= :low"], where, window)
            if len(rows) == params["limit"]:
                return rows, rows[-1][0]
            if time.monotonic() >= ends_at:
                return rows, high
        return rows, None

    def _newest(self, columns: str, by: str, places: list[str], where: str, params: Params) -> list[Any]:
        ids = " UNION ALL ".join(
            f"SELECT id FROM jobs WHERE {place} AND {where} AND {by} < :before_id" for place in places
        )
        newest = f"SELECT id FROM ({ids}) found ORDER BY {by} DESC LIMIT :limit"
        rows = self._read(f"SELECT {columns} FROM ({newest}) newest JOIN jobs USING (id)", params)
        return sorted(rows, key=lambda row: -row[0])

    def _matching(
        self,
        *,
        state: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        key: str | None = None,
        consumer: str | None = None,
        text: str | None = None,
        created_from: float | None = None,
        created_before: float | None = None,
        ids: Sequence[int] | None = None,
    ) -> tuple[str, Params]:
        """Return the condition of these filters but the state, and the parameters of all."""
        equal = {"queue": queue, "task": task, "key": key, "consumer": consumer}
        params: Params = {name: _filter(name, value, 255) for name, value in equal.items() if value is not None}
        where = ["1 = 1", *(f"{name} = :{name}" for name in params)]
        if state is not None:
            params["state"] = _one_of(STATES, state)
        if text is not None:
            params["text"] = _folded(_filter("text", text, MAX_TEXT_CHARS))
            if run := max(ASCII_RUN.findall(params["text"]), key=len, default=""):
                params |= {"run": f"%{run.replace('_', '!_')}%", "escaped": "%\\u%"}
                where.append(f"({' OR '.join(map(self._may_hold, ('payload', 'result', 'error', 'key')))})")
        for name, value, sign in (("created_from", created_from, ">="), ("created_before", created_before, "<")):
            if value is not None:
                params[name] = _finite(name, value)
                where.append(f"created_at {sign} :{name}")
        if ids is not None:
            where.append(f"id IN ({', '.join(str(_id(job_id)) for job_id in ids) or 'NULL'})")
        return " AND ".join(where), params

    def _may_hold(self, column: str) -> str:
        """Return a condition that is true of every text in which the run of ASCII may stand.

        Only `_holds` knows how text beyond ASCII compares, or what JSON has escaped: that passes.
        """
        return (
            f"{column} {self._LIKE} :run ESCAPE '!' OR {column} LIKE :escaped ESCAPE '!' "
            f"OR {self._BYTES.format(column)} <> length({column})"
        )

    def count_jobs(self, *, shown: Callable[[Job], Job] | None = None, **filters: Any) -> int:
        """Return how many jobs match; the filters, and `shown`, are those of `list_jobs`."""
        where, params = self._matching(**filters)
        if "text" in params:
            params |= {"before_id": MAX_ID, "limit": WINDOW}
            return sum(1 for _, row in self._with_text(shown, where, params, math.inf) if row is not None)
        places = _places(params) or ["1 = 1"]
        counts = " + ".join(f"(SELECT count(*) FROM jobs WHERE {place} AND {where})" for place in places)
        return cast(int, self._read(f"SELECT {counts}", params)[0][0])

    def unfinished_payloads(self) -> Iterator[Any]:
        """Yield the payload of every job that is unfinished at the time of the first `next`, a hundred in memory."""
        ids = [row[0] for row in self._read(UNFINISHED_IDS)]  # one statement: a job may change its state meanwhile
        for start in range(0, len(ids), 100):
            chosen = ", ".join(map(str, ids[start : start + 100]))
            for row in self._read(f"SELECT payload FROM jobs WHERE id IN ({chosen})"):
                yield _read_json(row[0])

    def stats(self) -> dict[str, Any]:
        """Return {"states": {state: jobs}, "queues": {name: {state: jobs, "paused": bool, "max_pending": int or
        None, "oldest_pending_at": the earliest due time of a pending job, or None}}, "oldest_pending_at": of all}."""
        counts = self._read(COUNTS)
        empty = {**dict.fromkeys(STATES, 0), "paused": False, "max_pending": None, "oldest_pending_at": None}
        queues = {  # read last, so that none is missing
            name: {**empty, "paused": bool(paused), "max_pending": most}
            for name, paused, most in self._read("SELECT name, paused, max_pending FROM queues ORDER BY name")
        }
        waiting = []
        for name, state, jobs, oldest in counts:
            queue = queues.setdefault(name, dict(empty))  # listed, unless somebody wrote past the API
            queue[state] += jobs
            if state == "pending":
                waiting.append(oldest)
                queue["oldest_pending_at"] = min(oldest, queue["oldest_pending_at"] or oldest)
        states = {state: sum(queue[state] for queue in queues.values()) for state in STATES}
        return {"states": states, "queues": queues, "oldest_pending_at": min(waiting, default=None)}

    def activity(self, start: float, end: float) -> dict[str, int]:
        """Return how many jobs were enqueued, completed and failed for good from start to before end, Unix seconds.

        A job that was deleted since still counts as enqueued, at the time of the one after it.
        """
        counts = {"enqueued": self._first_id(end) - self._first_id(start)}
        for state in ("completed", "failed"):
            params = {"state": state, "start": _finite("start", start), "end": _finite("end", end)}
            counts[state] = self._read(FINISHED_BETWEEN, params)[0][0]
        return counts

    def _first_id(self, at: float) -> Any:
        """Return the id of the first job enqueued at or after this time: ids grow with it, so halve the range."""
        low, high = self._read(ID_RANGE)[0]
        while low < high:
            middle = (low + high) // 2
            rows = self._read("SELECT id, created_at FROM jobs WHERE id >= :id ORDER BY id LIMIT 1", {"id": middle})
            if rows and rows[0][1] < at:
                low = rows[0][0] + 1
            else:
                high = middle
        return low

    def timings(self, jobs: int = 500, *, start: float = 0.0, end: float = 1e12) -> dict[str, list[float]]:
        """Return the seconds that so many jobs, the last completed from start to before end, Unix seconds, waited
        from due to start ("wait"), and ran ("run")."""
        between = {"start": _finite("start", start), "end": _finite("end", end)}
        latest = sorted(self._read(LATEST_COMPLETED, {**between, "limit": _at_least("jobs", 1, jobs)}))[-jobs:]
        return {
            "wait": [max(0.0, started - due) for _, due, started in latest],
            "run": [finished - started for finished, _, started in latest],
        }

    def failures(self) -> list[dict[str, Any]]:
        """Return the failed jobs by task and first line of the error, most first: task, error, jobs, last_id."""
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        for task, error, jobs, last_id in self._read(FAILURES):
            line = (error or "").split("\n", 1)[0]
            group = groups.setdefault((task, line), {"task": task, "error": line, "jobs": 0, "last_id": 0})
            group["jobs"] += jobs
            group["last_id"] = max(group["last_id"], last_id)
        return sorted(groups.values(), key=lambda group: (-group["jobs"], group["task"], group["error"]))

    def consumers(self) -> list[dict[str, Any]]:
        """Return who has dequeued here, the latest start first. Keys: the columns of the table, and job_ids, what it
        holds now. One that is known to have died is `dead` before a dequeue has noticed."""
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

    # Operating; `by` is the operator to record, by default the user

    def resubmit(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """Make a finished job pending again, with all its attempts.

        Raises JobNotFound, InvalidTransition or QueueFull.
        """
        self._operate("resubmit", "resubmitted", RESUBMIT, job_id, by, now)

    def mark_failed(
        self, job_id: int, error: str = "marked as failed", *, by: str | None = None, now: float | None = None
    ) -> None:
        """Set an unfinished job aside; a running delivery loses its lease. Raises as `resubmit` does."""
        self._operate("mark as failed", "marked failed", MARK_FAILED, job_id, by, now, error=_error_text(error))

    def cancel(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """Withdraw an unfinished job; a running delivery loses its lease. Raises as `resubmit` does."""
        self._operate("cancel", "cancelled", CANCEL, job_id, by, now)

    def assign(self, job_id: int, consumer: str | None, *, by: str | None = None, now: float | None = None) -> None:
        """Let only this consumer run an unfinished job, whatever queues it serves (None: any consumer).

        A running delivery loses its lease, without counting as an attempt. Raises as `resubmit` does.
        """
        assigned_to = None if consumer is None else _name("consumer", consumer)
        self._operate("assign", f"assigned to {consumer or 'any'}", ASSIGN, job_id, by, now, assigned_to=assigned_to)

    def _operate(
        self, verb: str, event: str, sql: str, job_id: int, by: str | None, now: float | None, **values: Any
    ) -> None:
        params = {"error": None, **values, "id": _id(job_id), "now": self._time(now)}
        with self._write() as tx:
            tx.change(RECORD, {**params, "event": event, "actor": _operator(by)})
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
                self._lock_jobs(tx, sorted(_id(job_id) for job_id in job_ids))
            yield

    def pause(self, queue: str) -> None:
        """Deliver nothing from this queue until `resume`. What runs goes on."""
        self._set_queue(queue, "paused", 1)

    def resume(self, queue: str) -> None:
        """Deliver from this queue again."""
        self._set_queue(queue, "paused", 0)

    def limit(self, queue: str, max_pending: int | None) -> None:
        """Refuse to enqueue or resubmit while so many jobs of the queue are pending; None: never refuse.

        Jobs that are scheduled, or assigned to a consumer, do not count.
        """
        most = None if max_pending is None else _at_least("max_pending", 1, max_pending)
        with self._write() as tx:
            self._set_queue(queue, "max_pending", most)
            self._count_pending(tx, [queue])

    @abstractmethod
    def _count_pending(self, tx: Session, queues: Iterable[str]) -> None:
        """Count the pending jobs of these queues, and keep counting while some queue has a limit."""

    def _set_queue(self, queue: str, column: str, value: int | None) -> None:
        with self._write() as tx:
            tx.change(ADD_QUEUE, {"queue": _name("queue", queue)})
            tx.change(SET_QUEUE.format(column=column), {"queue": queue, "value": value})
            tx.ring = True

    def delete_jobs(self, job_ids: Iterable[int] | None = None, *, force: bool = False) -> int:
        """Delete these jobs (None: all), all or none, and return how many. SQLite may give the newest id again.

        Raises InvalidTransition when one is processing, unless forced.
        """
        chosen = [{}] if job_ids is None else [{"id": _id(job_id)} for job_id in job_ids]
        where = "1 = 1" if job_ids is None else "id = :id"
        with self._write() as tx:
            self._lock_out_writers(tx)
            running = sum(len(tx.run(f"SELECT id FROM jobs WHERE state = 'processing' AND {where}", p)) for p in chosen)
            if running and not force:
                raise InvalidTransition(f"cannot delete jobs: {running} of them are processing")
            for p in chosen:
                tx.change(f"DELETE FROM history WHERE job_id IN (SELECT id FROM jobs WHERE {where})", p)
            return sum(tx.change(f"DELETE FROM jobs WHERE {where}", p) for p in chosen)

    def prune(self, older_than_seconds: float, *, states: Sequence[str] = FINISHED, now: float | None = None) -> int:
        """Delete jobs that finished longer ago than this, in short transactions, and return how many.

        Consumers that are gone for as long are forgotten, too.
        """
        before = self._time(now) - _finite("older_than_seconds", older_than_seconds)
        with self._write(durable=False) as tx:
            tx.change(FORGET, {"before": before})
        return sum(self._prune(_one_of(FINISHED, state), before) for state in states)

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

    def copy_to(self, target: PersistentQInterface, tell: Callable[[int], None] | None = None) -> dict[str, int]:
        """Copy queues, jobs and history, as they are, into an empty queue of any backend; return the rows by table.

        Others wait to write until it is done; tell is called with the rows so far. The copy is read back and compared
        before it is committed. Raises QueueError when the target holds jobs, or the copy is not the same.
        """
        with self._write() as source, target._write() as copy:
            self._lock_out_writers(source)
            target._lock_out_writers(copy)
            if copy.run("SELECT 1 FROM jobs LIMIT 1"):
                raise QueueError("cannot copy: expected a target without jobs")
            copied = _copy_rows(source, copy, tell)
            target._number_on(copy)
            target._count_pending(copy, [row[0] for row in copy.run(LIMITED)])
        return copied

    # Moving: `begin_move` until nothing runs, then `move_to`, and `finish_move` when all programs use the target

    @abstractmethod
    def other_tables(self) -> list[str]:
        """Return the names of what the application keeps in this database besides, which `move_to` leaves behind."""

    def move_status(self) -> dict[str, Any] | None:
        """Return what a move has done to this queue, or None: "event", `moving` or `moved`; "at"; "to", where to."""
        rows = self._read(MARK)
        return {"event": rows[0][2], "at": rows[0][1], "to": json.loads(rows[0][4])["to"]} if rows else None

    def begin_move(self, to: str, *, by: str | None = None, now: float | None = None) -> int:
        """Pause all queues, and those that are created from now on; return how many jobs are still running.

        `to` is the name of the target. Raises QueueError when this queue was moved elsewhere.
        """
        if to == self.name:
            raise QueueError("cannot move: the target is this queue itself")
        dead = self._look_for_dead()
        with self._write() as tx:
            self._lock_out_writers(tx)
            event, known = _mark(tx)
            if event == "moved" and known["to"] != to:
                raise QueueError(
                    f"cannot move: this queue was moved to {known['to']}; finish that with --finish, or give it up "
                    "with --cancel"
                )
            self._recover(tx, dead, self._time(now))
            tx.change(PAUSE_ALL)
            if known.get("to") != to:
                self._set_mark(tx, "moving", {"to": to}, by, now)
            return _running(tx)

    def move_to(
        self,
        target: PersistentQInterface,
        *,
        without: Sequence[str] = (),
        tell: Callable[[int], None] | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> dict[str, int] | None:
        """Copy as `copy_to` does, with queues in the target paused as they were before `begin_move`.

        Returns None when jobs are running. Raises QueueError, besides, for tables that would stay behind and are not
        named in `without`. This queue commits first: cut short after that, it is to be called again.
        """
        self.expect_other_tables(without)
        with target._write() as copy, self._write() as source:
            target._lock_out_writers(copy)
            self._lock_out_writers(source)
            if _running(source):
                return None
            if copy.run("SELECT 1 FROM jobs LIMIT 1"):
                raise QueueError("cannot move: the target holds jobs; expected an empty one")
            copied = _copy_rows(source, copy, tell)
            target._number_on(copy)
            mark = self._leave_for(source, target.name, by, now)
            for sql, params in _arrival(mark):
                copy.change(sql, params)
            copy.ring = True
        return copied

    def expect_other_tables(self, names: Sequence[str]) -> None:
        """Raise QueueError unless these are all that the application keeps in this database besides."""
        others = self.other_tables()
        if left := sorted(set(others) - set(names)):
            raise QueueError(
                f"cannot move: {', '.join(left)} would stay behind; copy what you need, and give "
                + " ".join(f"--without {shlex.quote(name)}" for name in left)
            )
        if unknown := sorted(set(names) - set(others)):
            raise QueueError(f"cannot move without {', '.join(unknown)}: there is no such table")

    def _leave_for(self, tx: Session, to: str, by: str | None, now: float | None) -> Params:
        """Mark this queue as moved; return the parameters of the mark in the other one."""
        tx.change(PAUSE_ALL)
        mark = {"token": os.urandom(8).hex(), "to": to}
        self._set_mark(tx, "moved", mark, by, now)
        last_id = tx.run("SELECT coalesce(max(id), 0) FROM jobs")[0][0]
        error = json.dumps({"token": mark["token"], "last_id": last_id})
        return {"event": "moved here", "attempt": 0, "error": error, "actor": _operator(by), "now": self._time(now)}

    def _set_mark(self, tx: Session, event: str, mark: Params, by: str | None, now: float | None) -> None:
        tx.change(UNMARK)
        params = {"event": event, "attempt": 0, "actor": _operator(by), "now": self._time(now)}
        tx.change(ADD_MARK, {**params, "error": json.dumps(mark)})

    def has_moved_to(self, target: PersistentQInterface) -> bool:
        """Return whether the target holds what was moved from here."""
        rows = self._read(MARK)
        token = json.loads(rows[0][4]).get("token") if rows else None
        return token is not None and any(json.loads(row[2])["token"] == token for row in target._read(MARKS_HERE))

    def cancel_move(self) -> None:
        """Deliver here again. After `move_to`, jobs run twice if the target is in use, too."""
        with self._write() as tx:
            tx.change(RESUME_ALL)
            tx.change(UNMARK)
            tx.ring = True

    def finish_move(self, target: PersistentQInterface) -> dict[str, int]:
        """Carry over to the target the jobs that were enqueued here since, then delete all jobs here.

        May be called again while something still enqueues here. Returns the jobs "carried" over; those "known" there,
        by the key of an unfinished job; and those "deleted". Raises QueueError, with what to do.
        """
        with self._write() as source:
            self._lock_out_writers(source)
            rows = source.run(MARK)
            if not rows or rows[0][2] != "moved":
                raise QueueError("cannot finish: this queue was not moved yet; give move without --finish first")
            if running := _running(source):
                raise InvalidTransition(
                    f"cannot finish: {running} jobs run in the old queue, which was resumed; pause its queues, and try "
                    "again when they have ended"
                )
            with target._write() as copy:
                target._lock_out_writers(copy)
                carried, known = _carry_over(source, copy, json.loads(rows[0][4]), rows[0][3])
            # The target remembers what it has, so that this may be killed here and called again.
            deleted = self.delete_jobs()
            source.change("UPDATE history SET attempt = attempt + 1 WHERE id = :id", {"id": rows[0][0]})
        return {"carried": carried, "known": known, "deleted": deleted}

    @abstractmethod
    def _lock_out_writers(self, tx: Session) -> None:
        """Let nobody else write until this transaction ends."""

    @abstractmethod
    def _lock_jobs(self, tx: Session, job_ids: list[int]) -> None:
        """Let nobody else change these jobs until this transaction ends."""

    @abstractmethod
    def _number_on(self, tx: Session) -> None:
        """Give the next rows ids above those that were copied."""

    # Consumers

    def wait(
        self, timeout_seconds: float, *, consumer: str, queues: Sequence[str] | None = None, now: float | None = None
    ) -> bool:
        """Sleep until this consumer may find a job (True), or for the time given, at most a second (False)."""
        me = self._registered(consumer, queues, now)
        params = _served(consumer, queues, 1)

        def due_in() -> float:
            at = self._read(serving(NEXT_EVENT, queues), params)[0][0]
            return math.inf if at is None else cast(float, at) - self._time(now)

        return self._sleep(me, min(timeout_seconds, WAIT_SECONDS), due_in) or due_in() <= 0

    def heartbeat(self, consumer: str, *, completed: int = 0, failed: int = 0, now: float | None = None) -> None:
        """Note that this consumer is alive, and add to its counts."""
        me = self._registered(consumer, None, now)
        params = {"token": me.token, "completed": completed, "failed": failed, "now": self._time(now)}
        with self._write(durable=False) as tx:
            tx.change(HEARTBEAT, params)

    def _register(self, name: str, queues: Sequence[str] | None, now: float | None) -> Registration:
        _name("consumer", name)
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
            served = None if queues is None else json.dumps([_name("queue", queue) for queue in queues])
            me = Registration(name, self._take_slot())
            if me.slot:
                undo.callback(me.slot.close)
            params = {"name": name, "token": me.token, "host": socket.gethostname(), "pid": os.getpid()}
            params |= {"slot": me.slot and me.slot.number, "queues": served, "now": self._time(None)}
            params["tasks"] = json.dumps(sorted(TASKS))
            with self._write(durable=False) as tx:
                if tx.change(SUCCEED, params):
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
        if due:
            tx.change(PROMOTE, params)
            tx.ring = True
        if expired:
            for row in tx.run(EXPIRED, params):
                self._take_back(tx, _job(row), "expired", now)
        if dead is not None:
            for token in dead:
                tx.change(LEAVE, {"token": token, "state": "dead"})
            for row in tx.run(ORPHANED, params):
                self._take_back(tx, _job(row), "died", now)

    def _take_back(self, tx: Session, job: Job, event: str, now: float) -> None:
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
        """End a consumer of this object: release the jobs that it holds, and free its descriptors.

        It may dequeue again, as a new consumer. Nothing happens if there is no consumer of this name.
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
            self._release(tx, _job(row), self._time(now))


def _places(filters: Params) -> list[str]:
    """Return the conditions by which an index finds the jobs of a state; none for jobs of any."""
    if filters.get("state") == "failed" and "task" in filters:
        return ["state = 'failed'"]  # of the index that has the task
    return INDEXED.get(filters.get("state", ""), [])


def _copy_rows(source: Session, copy: Session, tell: Callable[[int], None] | None) -> dict[str, int]:
    """Copy the tables and compare; return the rows by table."""
    copy.change("DELETE FROM queues")
    copied: dict[str, int] = {}
    for table, columns in COPIED.items():
        insert = f"INSERT INTO {table} ({columns}) VALUES (:{columns.replace(', ', ', :')})"
        copied[table], read = 0, list[bytes]()
        for rows in _pages(source, table, columns):
            copy.change_many(insert, [dict(zip(columns.split(", "), row, strict=True)) for row in rows])
            read += map(_digest, rows)
            copied[table] = len(read)
            if tell:
                tell(sum(copied.values()))
        if sorted(read) != sorted(_digest(row) for rows in _pages(copy, table, columns) for row in rows):
            raise QueueError(f"cannot copy {table}: what was read back is not what was written")
    return copied


def _running(tx: Session) -> int:
    return cast(int, tx.run("SELECT count(*) FROM jobs WHERE state = 'processing'")[0][0])


def _mark(tx: Session) -> tuple[str | None, Params]:
    rows = tx.run(MARK)
    return (rows[0][2], json.loads(rows[0][4])) if rows else (None, {})


def _arrival(mark: Params) -> list[tuple[str, Params]]:
    """Return the statements that make a copy a queue of its own, with the mark of where it came from."""
    return [(UNMARK, {}), (ADD_MARK, mark), (RESUME_ALL, {})]


def _carry_over(source: Session, copy: Session, mark: Params, attempt: int) -> tuple[int, int]:
    """Copy the jobs that the target has not got, under new ids; return how many, and how many it knew by their key."""
    here = [(row, known) for row in copy.run(MARKS_HERE) if (known := json.loads(row[2]))["token"] == mark["token"]]
    if not here:
        raise QueueError(f"cannot finish: expected the target to be {mark['to']}, to which this queue was moved")
    (mark_id, at_attempt, _), known = here[0]
    carried = doubles = 0
    last_id = known["last_id"] if at_attempt == attempt else 0  # --finish deletes all, and ids may begin anew
    for rows in _pages(source, "jobs", COLUMNS, after=last_id):
        for row in rows:
            if _carry(source, copy, dict(zip(Job._fields, row, strict=True))):
                carried += 1
            else:
                doubles += 1
        last_id = rows[-1][0]
    error = json.dumps({**known, "last_id": last_id})
    copy.change(
        "UPDATE history SET attempt = :attempt, error = :error WHERE id = :id",
        {"id": mark_id, "attempt": attempt, "error": error},
    )
    copy.ring = True
    return carried, doubles


def _carry(source: Session, copy: Session, job: Params) -> bool:
    copy.change(ADD_QUEUE, {"queue": job["queue"]})
    for (job_id,) in copy.run(CARRY_OVER, job):
        for row in source.run(STORY, {"id": job["id"]}):
            copy.change(ADD_STORY, {"id": job_id, **dict(zip(STORY_COLUMNS, row, strict=True))})
        return True
    return False


def _pages(tx: Session, table: str, columns: str, after: Any = None) -> Iterator[list[Any]]:
    key = columns.split(", ", 1)[0]
    after = ("" if key == "name" else -1) if after is None else after
    sql = f"SELECT {columns} FROM {table} WHERE {key} > :after ORDER BY {key} LIMIT 1000"
    while rows := tx.run(sql, {"after": after}):
        yield rows
        after = rows[-1][0]


def _digest(row: Sequence[Any]) -> bytes:
    return hashlib.sha256(repr(tuple(row)).encode()).digest()


def _complete(tx: Session, job: Job, result: str | None, now: float) -> int:
    return tx.change(COMPLETE, {"id": job.id, "token": job.lease_token, "result": result, "now": now})


def _claim(
    tx: Session, me: Registration, limit: int, queues: Sequence[str] | None, lease_seconds: float, now: float
) -> list[Job]:
    params = claim_params(me, limit, queues, lease_seconds, now)
    if limit > 1:
        params["limit"] = _batch(tx.run(serving(NEXT_ATTEMPTS, queues), params), me.prefetches)
    return claimed_jobs(tx, tx.run(serving(CLAIM, queues), params), params)


def claim_params(
    me: Registration, limit: int, queues: Sequence[str] | None, lease_seconds: float, now: float
) -> Params:
    params = _served(me.name, queues, limit)
    params["now"] = now
    params["lease_expires_at"] = now + _lease(lease_seconds)
    params["token"] = f"{me.token}.{next(me.claims)}"
    return params


def claimed_jobs(tx: Session, rows: list[Any], params: Params) -> list[Job]:
    """Return the jobs of the rows that a claim returned, in order."""
    jobs = []
    for row in rows:
        try:
            jobs.append(_job(row, _decode_json))
        except NOT_JSON as error:  # somebody wrote past the API: it must not stop the jobs behind it
            _set_aside(tx, row[0], f"cannot read the payload or result, which is not JSON: {error}", params)
    if len(jobs) > 1:
        with suppress(TypeError):  # a damaged row
            jobs.sort(key=lambda job: (-job.priority, job.run_at, job.id))
    return jobs


def _set_aside(tx: Session, job_id: int, error: str, claim: Params) -> None:
    params = {"id": job_id, "token": claim["token"], "now": claim["now"], "error": _error_text(error)}
    tx.change(RECORD, {**params, "event": "failed", "actor": claim["consumer"]})
    tx.change(FAIL, params)


def _batch(attempts: list[tuple[int, int]], prefetches: bool) -> int:
    """Return how many of the next jobs, by their attempts so far and at most, to deliver together.

    A job that was delivered before comes alone: when it kills its consumer again, no other job pays for it. So does one
    whose last attempt this is, unless it counts only when it begins.
    """
    alone = (n for n, (made, most) in enumerate(attempts) if made or (most == 1 and not prefetches))
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


def _operator(by: str | None) -> str:
    if by is not None:
        return _name("operator", by)
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user need not have an account
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def _full(verb: str, queue: str, max_pending: int, jobs: int = 1) -> QueueFull | ValueError:
    if jobs > max_pending:
        return ValueError(f"expected at most {max_pending} jobs, the limit of queue {queue!r}, got {jobs} at once")
    room = "is at" if jobs == 1 else f"has no room for {jobs} jobs within"
    return QueueFull(f"cannot {verb}: queue {queue!r} {room} its limit of {max_pending} pending jobs")


def serving(sql: str, queues: Sequence[str] | None) -> str:
    return _filled(sql, None if queues is None else len(queues))


@lru_cache
def _filled(sql: str, queues: int | None) -> str:
    names = ", ".join(f":queue{number}" for number in range(queues or 0))
    return sql.format(served="" if queues is None else f"AND q.name IN ({names})")


def _served(consumer: str, queues: Sequence[str] | None, limit: int) -> Params:
    params: Params = {f"queue{i}": queue for i, queue in enumerate(queues or ())}
    params["consumer"] = consumer
    params["limit"] = limit
    return params


# Values in and out ####################################################################################################

_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _encode_result(result: Any) -> str | None:
    return None if result is None else encode_json("result", result)


def encode_json(what: str, value: Any) -> str:
    """Return the JSON text that is stored. Raises ValueError, saying what it was."""
    try:
        text = _encode_json(value)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a {what} that JSON can hold, got a {type(value).__name__}: {error}") from None
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"expected a {what} of at most {MAX_PAYLOAD_BYTES} bytes of JSON, got {size}")
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(value) > MAX_JSON_DEPTH:
        raise ValueError(f"expected a {what} nested at most {MAX_JSON_DEPTH} deep")
    if "{" in text:
        _expect_text_keys(what, value)
    return text


def _expect_text_keys(what: str, value: Any) -> None:
    """Raise ValueError for a key that is no string: JSON would make it one, and perhaps the same as another key."""
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise ValueError(f"expected a {what} whose keys are all strings, got the key {_short(key)}")
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, (dict, list, tuple)):
            _expect_text_keys(what, each)


def _encode_payloads(payloads: list[Any]) -> str:
    """Return a JSON array with an array for each payload: of all together, unless one may be too large or too deep."""
    with suppress(TypeError, ValueError, RecursionError):
        text = _encode_json([[payload] for payload in payloads])
        nests = text.count("[") + text.count("{") > MAX_JSON_DEPTH + len(payloads)
        if len(text.encode()) <= MAX_PAYLOAD_BYTES and not (nests and _depth(payloads) > MAX_JSON_DEPTH):
            if "{" in text:
                _expect_text_keys("payload", payloads)
            return text
    return "[" + ",".join(f"[{encode_json('payload', payload)}]" for payload in payloads) + "]"


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (list, tuple, dict))]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


_decode_json = json.JSONDecoder().decode
NOT_JSON = (ValueError, TypeError, RecursionError)  # what the decoder raises: for bad text, for a BLOB, for a deep nest


def _read_json(text: str) -> Any:
    """Return the value, or the text itself where somebody wrote past the API what is not JSON."""
    try:
        return _decode_json(text)
    except NOT_JSON:
        return text


def _job(row: Sequence[Any], read: Callable[[str], Any] = _read_json) -> Job:
    fields = list(row)
    fields[3] = read(row[3])
    if row[18] is not None:
        fields[18] = read(row[18])
    return Job._make(fields)


class Excerpt(str):
    """The beginning of an error, or of the JSON text of a payload or a result, that was too long to be read whole."""

    __slots__ = ()


def _columns(most: int | None) -> str:
    if most is None:
        return COLUMNS
    part = f"substr({{0}}, 1, {most + 1})" if most else "NULL"  # one more shows whether it is whole
    return ", ".join(part.format(name) if name in LONG else name for name in Job._fields)


def _shortened(row: Sequence[Any], most: int | None) -> Job:
    if not most:
        return _job(row) if most is None else _job(row)._replace(payload=None, result=None, error=None)

    def is_long(text: Any) -> bool:
        return isinstance(text, str) and len(text) > most

    job = _job(row, lambda text: Excerpt(text[:most]) if is_long(text) else _read_json(text))
    return job._replace(error=Excerpt(job.error[:most])) if job.error is not None and is_long(job.error) else job


# What stands in JSON as it is, in whatever form; a space does within a string.
ASCII_RUN = re.compile(r"[a-z0-9_.@+=*?$&#~^|;()<>'-]+(?: [a-z0-9_.@+=*?$&#~^|;()<>'-]+)*")


def _folded(text: str) -> str:
    """Return the text such that two texts that people read as the same but for the case of letters are equal."""
    if text.isascii():
        return text.lower()
    import unicodedata

    return unicodedata.normalize("NFC", text.casefold())


_show_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def _holds(row: Sequence[Any], needle: str, shown: Callable[[Job], Job] | None) -> bool:
    """Whether the text is in a job: in its payload or result as JSON shows them, or in one of their strings as it is;
    in its error or key."""
    job = _job(row) if shown is None else shown(_job(row))
    for value in (job.payload, *([] if job.result is None else [job.result])):
        if needle in _folded(_show_json(value)):
            return True
        if ESCAPED.search(needle) and any(needle in _folded(each) for each in _strings(value)):
            return True
    return any(needle in _folded(str(each)) for each in (job.error, job.key) if each is not None)


ESCAPED = re.compile(r'["\\\x00-\x1f]')  # what JSON shows in another form


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a payload: keys and values."""
    level = [value]
    while level:
        each = level.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            level += [*each, *each.values()]
        elif isinstance(each, list):
            level += each


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
    name = _name("task", task.name if isinstance(task, Task) else task)
    entry = task if isinstance(task, Task) else TASKS.get(name)
    if max_attempts is None:
        max_attempts = entry.max_attempts if entry else DEFAULT_MAX_ATTEMPTS
    due = now + _finite("delay_seconds", delay_seconds) if run_at is None else _finite("run_at", run_at)
    return {
        "task": name,
        "queue": _name("queue", queue),
        "state": "scheduled" if due > now else "pending",
        "priority": _at_least("priority", -(2**31), priority),
        "run_at": due,
        "max_attempts": _at_least("max_attempts", 1, max_attempts),
        "key": None if key is None else _name("key", key),
        "assigned_to": None if assigned_to is None else _name("consumer", assigned_to),
        "now": now,
    }


def _name(what: str, value: str) -> str:
    if isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable():
        return value
    article = "an" if what == "operator" else "a"
    raise ValueError(f"expected {article} {what} name of 1 to 255 printable characters, got {_short(value)}")


def _at_least(what: str, least: int, value: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"expected {what} to be a whole number from {least} to {most}, got {_short(value)}")


def _finite(what: str, value: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"expected {what} to be a finite number of seconds, got {_short(value)}")


def _lease(seconds: float) -> float:
    if _finite("lease_seconds", seconds) > 0:
        return seconds
    raise ValueError(f"expected lease_seconds above 0, got {seconds!r}")


def _id(job_id: int) -> int:
    return _at_least("job id", 0, job_id, MAX_ID)


def _filter(what: str, value: str, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {what} to be a text, got {_short(value)}")
    if len(value) > most:
        raise ValueError(f"expected {what} to be at most {most:,} characters, got {len(value):,}")
    if "\0" in value and what != "text":
        raise ValueError(f"expected {what} to be printable, got {_short(value)}")  # PostgreSQL cannot look for it
    return value


def _one_of(states: Sequence[str], state: str) -> str:
    if state in states:
        return state
    raise ValueError(f"expected a state of {', '.join(states)}, got {_short(state)}")


def _up_to(last: int, number: int) -> list[int]:
    return list(range(last - number + 1, last + 1))


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints, a nest of lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _error_text(error: str) -> str:
    text = str(error)[:MAX_ERROR_CHARS].replace("\0", "\\x00")  # which PostgreSQL cannot store
    return text.encode("utf-8", "backslashreplace").decode()


# SQLite: turnstile, doorbell, sessions ################################################################################


class Turnstile:
    """Lets writers through one at a time, where SQLite's busy handler would starve some.

    Consumers, when they take and complete jobs, queue in one lane, everybody else in another, and the first of each
    waits for the lock. Whoever releases it wakes up the first of the other lane: an enqueue waits for a batch or a
    turn, however many consumers there are. It is a courtesy: a writer that has waited for `TURN_SECONDS`, or finds that
    a process, stopped perhaps, has held a lock for that long, goes on and leaves it to BEGIN IMMEDIATE.
    """

    def __init__(self, folder: Path) -> None:
        self._thread = threading.Lock()
        self._closing = self._closed = False
        self._kind = 0  # of the writer that has its turn
        with ExitStack() as undo:
            self._lanes = [undo.enter_context(closing(BellLock(folder / name))) for name in LANES]
            self._lock = BellLock(folder / "way", LANES)
            undo.pop_all()

    def enter(self, *, in_batch: bool = False) -> bool:
        """Return whether the lock was acquired; then `leave` must follow."""
        if not self._thread.acquire(timeout=TURN_SECONDS):
            return False
        try:
            if not self._closed and self._acquire(int(in_batch)):
                return True
        except BaseException:
            self._turn_back()
            raise
        self._turn_back()
        return False

    def _acquire(self, kind: int) -> bool:
        self._kind, lane = kind, self._lanes[kind]
        if self._lock.try_acquire():
            return True
        until = time.monotonic() + TURN_SECONDS
        in_lane = lane.acquire(until)  # if not, a process stopped there may have had it for too long
        acquired = self._lock.acquire(until, kind)
        if in_lane:
            lane.release()
        return acquired

    def leave(self) -> None:
        if not self._closed:
            self._lock.release(self._kind)
        self._thread.release()
        if self._closing:
            self.close()

    def problems(self) -> list[str]:
        """Return a sentence for each lock that a process has held for too long, unless a thread of ours is inside."""
        if not self._thread.acquire(blocking=False):
            return []
        try:
            return [] if self._closed else list(filter(None, (lock.problem() for lock in (self._lock, *self._lanes))))
        finally:
            self._thread.release()
            if self._closing:
                self.close()

    def close(self) -> None:
        """Close the locks, when another thread that is between them has left; from then on everybody bypasses them."""
        self._closing = True
        if self._thread.acquire(blocking=False):
            self.abandon()
            self._thread.release()

    def abandon(self) -> None:
        """In a forked child: let go of the locks, which the parent may hold."""
        if not self._closed:
            self._closed = True
            for lock in (*self._lanes, self._lock):
                lock.close()

    def _turn_back(self) -> None:
        if not self._closed:
            self._lanes[self._kind].release()
        self.leave()


class BellLock:
    """A lock between processes that is waited for with a bound, which flock has not, and freed when its holder dies.

    Waiters come in kinds, each with a bell; the file, which is mapped, says since when one of each kind waits. Whoever
    releases the lock rings for one, preferably of another kind. Waking up takes a while, and a process that comes
    meanwhile may acquire the lock: no time is lost, but alongside a process that writes in a loop the waiter would
    starve. So once the same process has had it more than once, for `REPEAT_SECONDS`, or the waiter has waited for
    `OVERTAKE_SECONDS`, it is reserved for the waiter's kind: for `HANDOVER_SECONDS`, as the waiter may have died.
    """

    PID, HELD_SINCE, RESERVED_FOR, RESERVED_UNTIL, WAITING_SINCE = range(5)  # in the file; times: monotonic, 0 if not

    def __init__(self, path: Path, kinds: Sequence[str] = ("",)) -> None:
        self._path, self._pid = path, os.getpid()
        self._held_since = self._turn_began = 0.0  # what this process wrote last; when it came after another one
        numbers = range(len(kinds))
        self._order = [sorted(numbers, key=kind.__eq__) for kind in numbers]  # for each kind that releases it
        with ExitStack() as undo:
            self._file = _open_private(path)
            undo.callback(os.close, self._file)
            self._map = _share(self._file, 8 * (self.WAITING_SINCE + len(kinds)))
            self._shared = memoryview(self._map).cast("d")
            self._bells: list[int] = []
            for kind in kinds:
                self._bells.append(_open_bell(path.with_name(f"{path.name}{kind and '-'}{kind}.bell")))
                undo.callback(os.close, self._bells[-1])
            undo.pop_all()

    def try_acquire(self, kind: int | None = None) -> bool:
        """Acquire it, unless it is held or reserved for another kind of waiters; return whether it was."""
        shared = self._shared
        if shared[self.RESERVED_UNTIL] and shared[self.RESERVED_FOR] != kind and self._is_reserved():
            return False
        if not try_lock(self._file):
            return False
        shared[self.RESERVED_UNTIL] = 0.0
        shared[self.HELD_SINCE] = self._held_since = time.monotonic()
        if shared[self.PID] != self._pid:
            shared[self.PID], self._turn_began = self._pid, self._held_since
        return True

    def acquire(self, until: float, kind: int = 0) -> bool:
        """Wait for it until this time, in monotonic seconds, and for no process that has held it for too long."""
        began = time.monotonic()
        while True:
            self._shared[self.WAITING_SINCE + kind] = began
            seconds = HANDOVER_SECONDS if self._is_reserved() else POLL_SECONDS  # before the try: it may end meanwhile
            acquired, left = self.try_acquire(kind), until - time.monotonic()
            if acquired or left <= 0 or self._held_seconds() >= TURN_SECONDS:
                self._shared[self.WAITING_SINCE + kind] = 0.0
                return acquired
            _hear(self._bells[kind], min(left, seconds), in_line=len(self._bells) == 1)

    def release(self, kind: int = 0) -> None:
        """Release it, if it is held, and wake up a waiter."""
        shared = self._shared
        if shared[self.HELD_SINCE] == self._held_since:
            if (heir := self._heir(kind)) is not None:
                self._reserve(heir)  # now, as nobody else can
            shared[self.HELD_SINCE] = 0.0
        fcntl.flock(self._file, fcntl.LOCK_UN)
        heir = self._heir(kind)  # it may have come meanwhile
        if heir is not None:
            shared[self.WAITING_SINCE + heir] = 0.0
            _ring(self._bells[heir])
        elif len(self._bells) == 1:  # there may be others: one of them cleared the time when it was through
            _ring(self._bells[0])

    def _reserve(self, kind: int) -> None:
        now = time.monotonic()
        repeats = self._held_since > self._turn_began and now - self._turn_began >= REPEAT_SECONDS
        if repeats or now - self._shared[self.WAITING_SINCE + kind] >= OVERTAKE_SECONDS:
            self._shared[self.RESERVED_FOR], self._shared[self.RESERVED_UNTIL] = kind, now + HANDOVER_SECONDS

    def _heir(self, kind: int) -> int | None:
        """Return the kind of waiter that comes next, when one of this kind releases it."""
        for other in self._order[kind]:
            if self._shared[self.WAITING_SINCE + other]:
                return other
        return None

    def _is_reserved(self) -> bool:
        return 0 < self._shared[self.RESERVED_UNTIL] - time.monotonic() <= HANDOVER_SECONDS

    def _held_seconds(self) -> float:
        since = self._shared[self.HELD_SINCE]
        return time.monotonic() - since if since else 0.0

    def problem(self) -> str | None:
        """Return a sentence about who has held it for too long."""
        pid, seconds = f"{self._shared[self.PID]:.0f}", self._held_seconds()
        if seconds < TURN_SECONDS:
            return None
        if self.try_acquire():  # its holder is dead
            self.release()
            return None
        stopped, remedy = "", "end it, if it does not go on by itself"
        if is_stopped(pid):
            stopped, remedy = "is stopped and ", f"let it go on (kill -CONT {pid}) or end it (kill -KILL {pid})"
        return f"process {pid} {stopped}has held {self._path} for {seconds:.0f} s, where writers take turns: {remedy}"

    def close(self) -> None:
        self._shared.release()
        self._map.close()
        for file in (self._file, *self._bells):
            os.close(file)


class Slots:
    """Numbered places for consumers: a lock held while its owner lives, a bell, and a byte set while it waits."""

    COUNT = 4096

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        file = _open_private(folder / "waiting")
        try:
            self.waiting = _share(file, self.COUNT)
        finally:
            os.close(file)

    def take(self) -> Slot:
        for number in range(self.COUNT):
            with ExitStack() as undo:
                lock = _open_private(self._folder / f"{number}.lock")
                undo.callback(os.close, lock)
                if try_lock(lock):
                    bell = self._folder / f"{number}.bell"
                    bell.unlink(missing_ok=True)  # what another owner left may be rung
                    slot = Slot(number, lock, _open_bell(bell))
                    undo.pop_all()
                    return slot
        raise QueueError(f"cannot add a consumer: expected fewer than {self.COUNT} at a time")

    def has_begun(self, number: int, token: str, job_id: int) -> bool:
        """Return False if the slot's owner of this token publishes what it begins, and this job is not among it."""
        try:
            file = os.open(self._folder / f"{number}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            words = array("Q", os.pread(file, Begun.BYTES, 0).ljust(Begun.BYTES, b"\0"))
        finally:
            os.close(file)
        return Begun.is_in(words, token, job_id)

    def is_taken(self, number: int) -> bool:
        lock = _open_private(self._folder / f"{number}.lock")
        try:
            return not try_lock(lock)
        finally:
            os.close(lock)

    def ring(self) -> None:
        """Wake who waits. A bell whose owner is gone is left alone."""
        number = self.waiting.find(b"\1")
        while number >= 0:
            self.waiting[number] = 0
            with suppress(OSError):
                bell = os.open(self._folder / f"{number}.bell", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
                try:
                    os.write(bell, b"!")
                finally:
                    os.close(bell)
            number = self.waiting.find(b"\1", number + 1)

    def wait(self, slot: Slot, seconds: float, due_in: Callable[[], float]) -> bool:
        self.waiting[slot.number] = 1
        try:
            rung = slot.poll(min(seconds, due_in()))
        finally:
            self.waiting[slot.number] = 0
        return rung


class Begun:
    """What a consumer has begun of the jobs that it took together, for others to read when it has died.

    It is in the consumer's lock file, as 64-bit words: the boot of the machine, the consumer's token, the number of
    jobs, their ids. It is never synced: after a power cut the boot is another one, and the rest is ignored.
    """

    MOST = 253  # jobs
    BYTES = 8 * (3 + MOST)

    def __init__(self, file: int, token: str) -> None:
        self._map = _share(file, self.BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._claim: str | None = None
        self._words[0], self._words[2], self._words[1] = 0, 0, int(token, 16)
        self._words[0] = boot()

    def add(self, job: Job) -> None:
        if job.lease_token != self._claim:  # with that claim, all before it was completed
            self._claim, self._words[2] = job.lease_token, 0
        number = self._words[2]
        if number == self.MOST:
            self._words[0] = 0  # it is not known any more
        else:
            self._words[3 + number] = job.id
            self._words[2] = number + 1

    @staticmethod
    def is_in(words: Sequence[int], token: str, job_id: int) -> bool:
        is_known = words[0] == boot() != 0 and words[1] == int(token, 16)
        return not is_known or job_id in words[3 : 3 + words[2]]

    def close(self) -> None:
        self._words.release()
        self._map.close()


@lru_cache
def boot() -> int:
    """Return a number that the machine gets anew whenever it starts, or 0 where the system has none."""
    try:
        return int(Path("/proc/sys/kernel/random/boot_id").read_text()[:8], 16)
    except (OSError, ValueError):
        return 0


class Slot:
    """A consumer's place, as long as it lives."""

    def __init__(self, number: int, lock: int, bell: int) -> None:
        self.number = number
        self.begun: Begun | None = None
        self._lock, self._bell = lock, bell

    def publish(self, token: str) -> None:
        self.begun = self.begun or Begun(self._lock, token)

    def poll(self, seconds: float) -> bool:
        return _hear(self._bell, seconds)

    def is_there(self) -> bool:
        """Return False when its lock was deleted, and no longer tells anybody that the consumer lives."""
        return os.fstat(self._lock).st_nlink > 0

    def close(self) -> None:
        if self.begun:
            self.begun.close()
        os.close(self._lock)
        os.close(self._bell)


class FileLocks:
    """Locks on the files of a database that this process has open; they outlast whatever its own code closes.

    SQLite's locks are POSIX locks: the process loses them as soon as any code in it closes any descriptor of the file.
    Another process may then take the database for unused, and delete its log or clear its index. Open file description
    locks, where the system has them, stand in for the two locks that prevent this. Bytes as in SQLite's os_unix.c.
    """

    IN_USE = (0x40000002, 510)  # on the database, shared by all who have it open: SHARED_FIRST, SHARED_SIZE
    INDEX_IN_USE = (128, 1)  # on -shm, likewise: UNIX_SHM_DMS
    WRITING = (120, 1)  # on -shm, exclusive: WAL_WRITE_LOCK
    AVAILABLE = hasattr(fcntl, "F_OFD_SETLK")

    _open: ClassVar[dict[tuple[int, int], FileLocks]] = {}  # by what stat returns of the database

    def __init__(self, path: Path) -> None:
        self._users = 0  # connections
        self._files: list[int] = []
        with ExitStack() as undo:
            for suffix in ("", "-shm"):
                self._files.append(os.open(f"{path}{suffix}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))
                undo.callback(os.close, self._files[-1])
            undo.pop_all()

    @classmethod
    def acquire(cls, path: Path) -> FileLocks | None:
        """Return the locks of a database that a connection has opened, or None where the system has no such locks."""
        if not cls.AVAILABLE:
            return None
        cls.close_unused()
        key = _identity(path)
        locks = cls._open[key] = cls._open.get(key) or cls(path)
        locks._users += 1
        locks._set(fcntl.F_RDLCK)
        return locks

    def release(self) -> None:
        """Let SQLite remove the log when it closes the last connection, which is about to be closed."""
        self._users -= 1
        if not self._users:
            self._set(fcntl.F_UNLCK)

    @staticmethod
    def lack_log(path: Path) -> bool:
        """Return whether other processes have the database open whose log was deleted or emptied.

        SQLite would begin another log, and go by their index of the old one. Its format: https://sqlite.org/walformat.html
        """
        index = Path(f"{path}-shm")
        if not FileLocks.AVAILABLE or not index.exists() or _has_open(_identity(index), ()):
            return False
        file = os.open(index, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            held = struct.unpack(
                FLOCK, fcntl.fcntl(file, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, FileLocks.INDEX_IN_USE))
            )
            is_set, page_bytes, frames = struct.unpack("12xBxHI", os.pread(file, 20, 0).ljust(20, b"\0"))
        finally:
            os.close(file)
        expected = 32 + frames * (24 + (page_bytes if page_bytes > 1 else 65536))
        return bool(held[0] != fcntl.F_UNLCK and is_set and frames and _size(Path(f"{path}-wal")) < expected)

    def are_writing(self) -> bool:
        """Return whether this process still has SQLite's lock for writing."""
        asked = _flock(fcntl.F_RDLCK, self.WRITING)
        kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(self._files[1], fcntl.F_OFD_GETLK, asked))
        return bool(kind == fcntl.F_WRLCK and pid == os.getpid())

    def _set(self, kind: int) -> None:
        for file, where in zip(self._files, (self.IN_USE, self.INDEX_IN_USE), strict=True):
            with suppress(OSError):  # a file system without them
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(kind, where))

    @classmethod
    def close_unused(cls) -> None:
        """Close descriptors that no connection needs, unless another one of this process would lose its locks."""
        for key, locks in list(cls._open.items()):
            if not locks._users and not _has_open(key, locks._files):
                locks.close()
                del cls._open[key]

    @classmethod
    def abandon(cls) -> None:
        """In a forked child: leave the locks to the parent."""
        for locks in cls._open.values():
            locks.close()
        cls._open.clear()

    def close(self) -> None:
        for file in self._files:
            os.close(file)


FLOCK = "hhqqi0q"  # struct flock


def _flock(kind: int, where: tuple[int, int]) -> bytes:
    return struct.pack(FLOCK, kind, os.SEEK_SET, *where, 0)


def _identity(path: str | bytes | os.PathLike[str]) -> tuple[int, int]:
    return os.stat(path)[1:3]


def _has_open(identity: tuple[int, int], but: Sequence[int]) -> bool:
    """Return whether this process has another descriptor of a file; False where the system does not show it."""
    with suppress(FileNotFoundError):
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):
                if number not in but and os.fstat(number)[1:3] == identity:
                    return True
    return False


class DatabaseFiles:
    """The files that a connection has open, by their names: to notice when a name leads to another file, or to none."""

    SETTLED_SECONDS = (3.0, 0.1)  # where times of change are as coarse as 2 s, and where they are not

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = os.fsencode(path.parent)
        self._names = [os.fsencode(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
        self._opened = self._identities()
        self._unchanged: tuple[int, int, int] | None = None

    @property
    def database(self) -> tuple[int, int] | None:
        return self._opened[0]

    def expect_in_place(self) -> None:
        """Raise DatabaseReplaced unless all are in place. While the folder does not change, one stat shows it."""
        try:
            folder = os.stat(self._folder)
            now = (folder.st_ino, folder.st_dev, folder.st_mtime_ns)
        except OSError:
            now = None
        if now is None or now != self._unchanged:
            if self._identities() != self._opened:
                raise replaced(self._path)
            if now and time.time() - folder.st_mtime > self.SETTLED_SECONDS[now[2] % 1_000_000_000 > 0]:
                self._unchanged = now  # a later change of the folder will have another time

    def _identities(self) -> list[tuple[int, int] | None]:
        found: list[tuple[int, int] | None] = []
        for name in self._names:
            try:
                found.append(_identity(name))
            except OSError:
                found.append(None)
        return found


def replaced(path: Path) -> DatabaseReplaced:
    return DatabaseReplaced(
        f"cannot use {path}: the database was replaced or moved, or its log deleted, while it was open: restart"
    )


class SQLiteSession(Session):
    """One thread's connection, entered through the turnstile."""

    def __init__(self, queue: PersistentQSQLite) -> None:
        self._queue = queue
        self._has_turn = False
        self.busy = self._closed = False
        self._synchronous = ""
        self.wanted = "FULL"
        self.in_batch = False
        self.is_users = False  # code of the user's runs in it
        self.in_use = threading.RLock()  # held while SQLite works for it: nobody forks meanwhile
        self._locks: FileLocks | None = None
        self.connection = queue._connect()
        try:
            self._open_files()
        except BaseException:
            self.connection.close()
            raise

    def _open_files(self) -> None:
        """Have SQLite open the log, which it does at the first read, and keep its locks from then on."""
        self.run("PRAGMA user_version")
        self.files = DatabaseFiles(self._queue.path)
        try:
            self._locks = None if self._queue.is_read_only else FileLocks.acquire(self._queue.path)
        except FileNotFoundError:
            raise replaced(self._queue.path) from None
        except OSError as error:
            raise QueueError(f"cannot open {self._queue.path}: {error.strerror}") from error

    def run(self, sql: str, params: Params = NOTHING) -> list[Any]:
        try:
            return self.connection.execute(sql, params).fetchall()
        except sqlite3.Error as error:
            raise self._queue._error(error) from error

    def change(self, sql: str, params: Params = NOTHING) -> int:
        try:
            return self.connection.execute(sql, params).rowcount
        except sqlite3.Error as error:
            raise self._queue._error(error) from error

    def change_many(self, sql: str, rows: list[Params]) -> None:
        try:
            self.connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise self._queue._error(error) from error

    def read(self, sql: str, params: Params) -> list[Any]:
        self.in_use.acquire()
        try:
            self._expect_open()
            return self.run(sql, params)
        finally:
            self._let_go()

    def __enter__(self) -> SQLiteSession:
        if self.depth == 0:
            self._begin()
        elif self._in_transaction:
            self.run("SAVEPOINT nested")
        else:
            raise QueueError("cannot go on in a transaction that has ended; leave its block")
        self.depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.depth -= 1
        if self.depth:
            self._end_nested(error)
        else:
            self._end(error)

    @property
    def _in_transaction(self) -> bool:
        try:
            return self.connection.in_transaction
        except sqlite3.ProgrammingError:  # another thread has closed the queue
            return False

    def insert_at_once(self, sql: str, params: Params) -> int | None:
        """Execute an INSERT, its own transaction, and return the last row's id.

        None, when it inserted nothing, or the session is in a transaction already.
        """
        if self.busy:
            return None
        self._begin(at_once=True)
        try:
            cursor = self.connection.execute(sql, params)
            last = cursor.lastrowid if cursor.rowcount else None
        except sqlite3.Error as error:
            raise self._queue._error(error) from error
        finally:
            self._leave()
        if last is not None:
            self._queue._ring()
        return last

    def _begin(self, *, at_once: bool = False) -> None:
        if self.busy:
            raise QueueError("cannot use the queue in a signal handler that interrupted it: set a flag there")
        self.in_use.acquire()
        self.busy, self.tangled, self.ring, self.lost, self.is_users = True, False, False, None, False
        try:
            self._expect_open()
            self._has_turn = self._queue._enter(self.in_batch)
            self.files.expect_in_place()
            if self._synchronous != self.wanted:
                self.run(f"PRAGMA synchronous = {self.wanted}")
                self._synchronous = self.wanted
            if not at_once:
                self.run("BEGIN IMMEDIATE")
        except BaseException:
            self._leave()
            raise

    def _end(self, error: BaseException | None) -> None:
        ended = not self._in_transaction
        try:
            if error is None:
                self._expect_open()
            if error is None and self.lost is None and not ended:
                self._expect_lock()
                self.run("COMMIT")
        finally:
            self._leave()
        if error is None and self.lost is not None:
            raise self.lost
        if error is None and ended:
            raise QueueError("cannot commit: the transaction was ended inside its block")
        if error is None and self.ring:
            self._queue._ring()

    def _expect_lock(self) -> None:
        """Refuse to commit what another process may have written over meanwhile."""
        if self._locks and (self.is_users or not self._has_turn) and not self._locks.are_writing():
            raise QueueError(
                f"cannot commit to {self._queue.path}: its lock was lost, as code in this process closed one of its "
                "files during the transaction; use backup() to copy it"
            )

    def _end_nested(self, error: BaseException | None) -> None:
        if self._in_transaction:
            if error is not None:
                self.run("ROLLBACK TO nested")
            self.run("RELEASE nested")

    def _leave(self) -> None:
        try:
            if self._in_transaction:
                self._roll_back()
        finally:
            if self._in_transaction:  # a signal handler came between, and it would stop all others
                self._roll_back()
            self.busy = False
            self._let_go()
            if self._has_turn:
                self._has_turn = False
                self._queue._exit()

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):
            self.connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection, or leave that to its thread at the end of its call: in the midst of it is a crash."""
        self._closed = True
        if self.in_use.acquire(blocking=False):
            self._let_go()

    def _let_go(self) -> None:
        if self._closed:
            self._disconnect()
        self.in_use.release()

    def _disconnect(self) -> None:
        """Close the connection. If its files are not in place, the log that it has open must not reach the database."""
        with _opening:
            locks, self._locks = self._locks, None
            try:
                self.files.expect_in_place()
            except DatabaseReplaced:
                _keep_log(self.connection)
                self.connection.close()
                if locks:
                    locks.release()
            else:
                if locks:
                    locks.release()
                self.connection.close()
            FileLocks.close_unused()

    def _expect_open(self) -> None:
        if self._closed:
            raise QueueError(f"cannot use {self._queue.path}: this queue object is closed")

    def disown(self) -> None:
        """In a forked child: close the parent's connection, or SQLite would take the parent's locks for the child's.

        Closing rolls back, in the shared memory, too: so not inside a transaction, and the child gets no queue.
        """
        if self.busy or self not in _still or self.connection.in_transaction:
            _inherited.setdefault(self._queue.path, []).append(self.connection)
        else:
            self.connection.close()
        self._has_turn = self.busy = False
        self._locks = None
        self.connection = cast(sqlite3.Connection, Disowned())

    def __del__(self) -> None:
        with suppress(Exception):
            self._disconnect()


def _keep_log(connection: sqlite3.Connection) -> None:
    """Let SQLite neither write back nor delete the log when this connection is closed; before Python 3.12 it cannot."""
    if option := getattr(sqlite3, "SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE", None):
        with suppress(sqlite3.ProgrammingError):  # it is closed
            connection.setconfig(option, True)  # type: ignore[attr-defined]


class Disowned:
    """Stands where a forked child would find its parent's connection."""

    in_transaction = False

    def close(self) -> None:
        """Close nothing: that was done, or must not be."""

    def __getattr__(self, name: str) -> Any:
        raise QueueError("cannot go on with a transaction that was begun before the fork")


_inherited: dict[Path, list[Any]] = {}  # connections of the parent's that were in a transaction
_queues: weakref.WeakSet[PersistentQSQLite] = weakref.WeakSet()
_opening = threading.RLock()  # nobody forks while a file or a connection is opened, either
_still: list[SQLiteSession] = []  # sessions that are held while the process forks


def _before_fork() -> None:
    """Let no thread be inside SQLite: the child would find its mutexes taken by nobody. After a while, go on."""
    _opening.acquire()
    until = time.monotonic() + BUSY_SECONDS
    sessions = [session for queue in list(_queues) for session in list(queue._sessions)]
    _still.extend(each for each in sessions if each.in_use.acquire(timeout=max(0, until - time.monotonic())))


def _after_fork() -> None:
    FileLocks.abandon()
    for queue in list(_queues):
        queue._after_fork()
    _go_on()


def _go_on() -> None:
    while _still:
        _still.pop().in_use.release()
    _opening.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_go_on, after_in_child=_after_fork)


class PersistentQSQLite(PersistentQInterface):
    """The queue in an SQLite file, with its locks and bells in the folder FILE.d beside it.

    durability: "full" syncs what must survive a power cut; "normal" survives any crash of a process.
    create: make the file where there is none; else raise QueueError.
    group: make it for all accounts of this group (modes 0660 and 0770), instead of for this account alone.
    busy_seconds: how long to wait for another writer. Raises SchemaMismatch for a file that is not ours.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: str = "full",
        create: bool = True,
        group: str | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        super().__init__()
        if durability not in ("full", "normal"):
            raise ValueError(f"expected a durability of full or normal, got {durability!r}")
        self.path = _real(path)  # a link to it must find the same locks
        self.name = str(self.path)
        self.durability, self._busy_seconds = durability, busy_seconds
        self._sessions: weakref.WeakSet[SQLiteSession] = weakref.WeakSet()
        self._local = threading.local()
        self._turnstile: Turnstile | None = None
        self._slots: Slots | None = None
        self.is_read_only = False  # its file system is
        self._database: tuple[int, int] | None = None  # device and number of the file that is open
        self._closed = False
        self._open_file(create, None if group is None else _group_number(group))
        try:
            self._open_folder()
            keeps_note = fcntl is not None and not self.is_read_only
            if keeps_note:
                self._expect_own_log()
            with _opening, closing(self._connect()) as connection:
                self._prepare(connection)
                if keeps_note:
                    self._note_own_log(connection)
        except BaseException:
            self.close()
            raise
        _queues.add(self)

    # Opening

    def _open_file(self, create: bool, group: int | None) -> None:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise QueueError(f"expected SQLite 3.35 or newer, got {sqlite3.sqlite_version}: use a newer Python")
        try:
            found = self.path.stat() if self.path.exists() else None
            if found:
                self._expect_database_file(found)
            self._expect_files_beside()
            if not create and not (found and found.st_size):
                raise QueueError(f"no queue at {self.path}: a producer or a consumer creates it")
            self.is_read_only = bool(found and _is_read_only(self.path))
            if self.is_read_only:
                self._expect_readable_log()
                return
            if found and not os.access(self.path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            make_folder(self.path.parent, group)
            if group is not None:
                self._expect_shared(self.path.parent, group, 0o2770)
            kind = file_system(self.path.parent)
            if kind.startswith(SHARED_FILE_SYSTEMS):
                raise QueueError(f"cannot use {self.path}: SQLite's locks fail on {kind}; use a local disk")
            with _opening, suppress(FileExistsError):
                _create(self.path, group)
            if group is not None:
                self._expect_shared(self.path, group, 0o660)
        except OSError as error:
            raise QueueError(f"cannot open {self.path}: {_refusal_of(error, self.path)}") from error

    def _expect_shared(self, path: Path, group: int, mode: int) -> None:
        found = path.stat()
        if found.st_gid != group or found.st_mode & mode != mode:
            raise QueueError(
                f"cannot share {self.path} with a group: expected {path} to belong to the group, with mode {mode:04o}; "
                f"run chgrp GROUP {shlex.quote(str(path))} and chmod {mode:04o} {shlex.quote(str(path))}"
            )

    def _expect_database_file(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise QueueError(f"cannot open {self.path}: expected a database file, got {kind}")
        if found.st_nlink > 1:  # SQLite's log and our locks go by the name
            raise QueueError(f"cannot use {self.path}: expected a file of one name, got {found.st_nlink} hard links")

    def _expect_files_beside(self) -> None:
        for beside in (Path(f"{self.path}{suffix}") for suffix in ("-wal", "-shm", "-journal")):
            if os.path.lexists(beside) and not stat.S_ISREG(beside.lstat().st_mode):
                raise QueueError(f"cannot use {beside}: expected a file of SQLite, got a folder, a pipe or a link")

    def _expect_readable_log(self) -> None:
        if _size(Path(f"{self.path}-wal")) and not os.path.exists(f"{self.path}-shm"):
            raise QueueError(
                f"cannot read {self.path}: its file system is read-only, and its log has no {self.path.name}-shm; "
                f"copy {self.path.name} and {self.path.name}-wal to a folder that can be written, and open the copy"
            )

    def _open_folder(self) -> None:
        if fcntl is None or self.is_read_only:
            return
        folder = Path(f"{self.path}.d")
        with self._told_of_folder():
            make_folder(folder)
            self._turnstile = Turnstile(folder)
            self._slots = Slots(folder)

    def _expect_own_log(self) -> None:
        """Refuse a database that took the place of another one whose log is still there: SQLite would apply it.

        Also one whose log was deleted while others have it open.
        """
        if FileLocks.lack_log(self.path):
            raise DatabaseReplaced(
                f"cannot use {self.path}: its log was deleted while other programs have it open: "
                "wait until they have ended"
            )
        with self._note() as note:
            database, log = (_file_number(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal"))
            known, version = os.pread(note, len(database + log), 0), os.pread(note, 20, 40)
            seems_replaced = known.endswith(log) and known != database + log  # or the system gave the numbers anew
            if seems_replaced and _size(Path(f"{self.path}-wal")) and not self._fits_log(int(version or 0)):
                raise SchemaMismatch(
                    f"cannot use {self.path}: it took the place of another database, to which the log "
                    f"{self.path}-wal belongs: stop all programs and move the log away; see admin.py restore"
                )

    def _fits_log(self, known: int) -> bool:
        """Return whether the database and its log are sound together; neither is changed.

        known: the schema version when the log was noted. A backup by VACUUM INTO has a higher one than its original.
        """
        with self.path.open("rb") as file:
            version = int.from_bytes(file.read(44)[40:], "big")
        try:
            with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as connection:
                return bool(version <= known and connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
        except sqlite3.Error:
            return False

    def _note_own_log(self, connection: sqlite3.Connection) -> None:
        """Remember which file the log belongs to; both are open."""
        try:
            version = connection.execute("PRAGMA schema_version").fetchone()[0]
        except sqlite3.Error as error:
            raise self._error(error) from error
        with self._note() as note:
            numbers = [_file_number(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal")]
            os.pwrite(note, b"".join([*numbers, b"%20d" % version]), 0)

    @contextmanager
    def _note(self) -> Iterator[int]:
        with self._told_of_folder():
            note = _open_private(Path(f"{self.path}.d/files"))
            try:
                yield note
            finally:
                os.close(note)

    @contextmanager
    def _told_of_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = Path(f"{self.path}.d")
            raise QueueError(f"cannot open {folder}: {_refusal_of(error, folder)}") from error

    def _connect(self) -> sqlite3.Connection:
        if self.path in _inherited:
            raise QueueError(f"cannot use {self.path}: this process was forked inside a transaction; fork before it")
        with ExitStack() as undo:
            try:
                connection = sqlite3.connect(
                    f"{self.path.as_uri()}?{self._open_mode()}",
                    uri=True,
                    timeout=self._busy_seconds,
                    isolation_level=None,
                    check_same_thread=False,
                )
                undo.callback(connection.close)
                connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
                connection.execute("PRAGMA cache_size = -16000")  # KB; a million rows go three times as fast
                connection.execute("PRAGMA trusted_schema = OFF")
                if not FileLocks.AVAILABLE:
                    _keep_log(connection)
                connection.execute("PRAGMA fullfsync = ON")  # as `sync_file` does; elsewhere than on macOS it is fsync
                connection.execute("PRAGMA checkpoint_fullfsync = ON")
            except sqlite3.Error as error:
                raise self._error(error) from error
            undo.pop_all()
        return connection

    def _open_mode(self) -> str:
        if not self.is_read_only:
            return "mode=rw"
        return "mode=ro" if _size(Path(f"{self.path}-wal")) else "mode=ro&immutable=1"

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check whose file it is, and bring its schema up to date."""
        if self.is_read_only:
            self._expect_current(connection)
            return
        has_turn = self._enter()
        try:
            _adopt_dump(connection)
            version = self._version(connection)
            if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                connection.execute("PRAGMA journal_mode = WAL")
            if version < len(MIGRATIONS):
                connection.execute("BEGIN IMMEDIATE")
                for number in range(self._version(connection), len(MIGRATIONS)):
                    for statement in MIGRATIONS[number]:
                        connection.execute(statement.format(id="INTEGER PRIMARY KEY", float="REAL"))
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._error(error) from error
        finally:
            if has_turn:
                self._exit()

    def _expect_current(self, connection: sqlite3.Connection) -> None:
        try:
            version = self._version(connection)
        except sqlite3.Error as error:
            raise self._error(error) from error
        if version != len(MIGRATIONS):
            raise SchemaMismatch(
                f"cannot read {self.path}: expected schema {len(MIGRATIONS)}, got {version}: "
                "open it once where it can be written"
            )

    def _version(self, connection: sqlite3.Connection) -> int:
        return _schema_version(connection, self.path)

    def _error(self, error: sqlite3.Error) -> QueueError:
        text = "".join(mark if mark.isprintable() else "?" for mark in str(error))  # it may quote the file's own names
        if "locked" in text or "busy" in text:
            held = f"another writer held it for {self._busy_seconds:g} s"
            return QueueBusy(f"cannot write to {self.path}: {'; '.join([held, *self._turn_problems()])}")
        if "disk is full" in text:
            return QueueFull(f"cannot write to {self.path}: its disk is full")
        if "not a database" in text:
            return SchemaMismatch(f"cannot use {self.path}: expected an SQLite database, got another file")
        if "readonly" in text or "unable to open" in text:
            return QueueError(f"cannot write to {self.path}: no permission, no free descriptor, or it is gone ({text})")
        return QueueError(f"cannot use {self.path}: {text}")

    # What the interface asks of a backend

    def _session(self) -> SQLiteSession:
        try:
            return cast(SQLiteSession, self._local.session)
        except AttributeError:
            if self._closed:
                raise QueueError(f"cannot use {self.path}: this queue object is closed") from None
            with _opening:
                for other in self._sessions:  # in case it has the files of before open
                    other.files.expect_in_place()
                session = SQLiteSession(self)
                self._database = self._database or session.files.database
                if self._database != session.files.database:
                    raise replaced(self.path) from None
                self._local.session = session
                self._sessions.add(session)
            return session

    def _write(self, *, durable: bool = True, in_batch: bool = False) -> SQLiteSession:
        if self.is_read_only:
            raise QueueError(f"cannot write to {self.path}: its file system is read-only")
        session = self._session()
        session.in_batch = in_batch
        session.wanted = "FULL" if durable and self.durability == "full" else "NORMAL"
        return session

    def _read(self, sql: str, params: Params = NOTHING) -> list[Any]:
        return self._session().read(sql, params)

    def _add(self, row: Params) -> int:
        """Do it in one statement, unless there is more to see to."""
        job_id = self._write().insert_at_once(ENQUEUE_AT_ONCE, row)
        return super()._add(row) if job_id is None else job_id

    def _add_many(self, row: Params) -> list[int]:
        last = self._write().insert_at_once(INSERT_MANY_AT_ONCE, row)
        return super()._add_many(row) if last is None else _up_to(last, row["number"])

    def _insert_many(self, tx: Session, row: Params) -> list[int]:
        tx.change(INSERT_MANY, row)
        return _up_to(tx.run("SELECT last_insert_rowid()")[0][0], row["number"])

    def _complete_all(self, tx: Session, settled: list[tuple[Job, str | None]], now: float) -> list[Job]:
        ids = {job.id for job, _ in settled}
        if len(settled) < 2 or len(ids) < len(settled):
            return super()._complete_all(tx, settled, now)
        rows = [(job.id, job.lease_token, result) for job, result in settled]
        done = {row[0] for row in tx.run(COMPLETE_MANY, {"settled": _encode_json(rows), "now": now})}
        return [job for job, _ in settled if job.id not in done]

    def _lock_out_writers(self, tx: Session) -> None:
        """Do nothing more: whoever writes to SQLite is alone."""

    def _lock_jobs(self, tx: Session, job_ids: list[int]) -> None:
        """Do nothing more, likewise."""

    def _number_on(self, tx: Session) -> None:
        """Do nothing: SQLite counts on from the highest id."""

    def _count_pending(self, tx: Session, queues: Iterable[str]) -> None:
        is_limited = bool(tx.run(LIMITED))
        for name, statement in COUNTERS.items():
            has_trigger = bool(tx.run("SELECT 1 FROM sqlite_master WHERE name = :name", {"name": name}))
            if is_limited and not has_trigger:
                tx.change(statement)
            if has_trigger and not is_limited:
                tx.change(f"DROP TRIGGER {name}")
        for queue in queues:
            tx.change(COUNT_PENDING, {"queue": queue})

    def _enter(self, in_batch: bool = False) -> bool:
        return self._turnstile is not None and self._turnstile.enter(in_batch=in_batch)

    def _exit(self) -> None:
        if self._turnstile is not None:
            self._turnstile.leave()

    def _turn_problems(self) -> list[str]:
        return self._turnstile.problems() if self._turnstile is not None else []

    def _ring(self) -> None:
        if slots := self._slots:  # another thread may close the queue
            slots.ring()

    def _take_slot(self) -> Slot | None:
        with self._told_of_folder():
            return slots.take() if (slots := self._slots) else None

    def _is_alive(self, slot: int | None) -> bool:
        with self._told_of_folder():
            if not all(me.slot.is_there() for me in self._registry.values() if me.slot):
                raise QueueError(f"cannot go on: the locks in {self.path}.d were deleted while in use; start again")
            return not (slots := self._slots) or slot is None or slots.is_taken(slot)

    def _publish_begun(self, me: Registration) -> bool:
        with self._told_of_folder():
            if me.slot and boot():
                me.slot.publish(me.token)
        return bool(me.slot and boot())

    def _note_begun(self, job: Job) -> None:
        me = self._registry.get(job.consumer or "")
        if me and me.slot and me.slot.begun:
            me.slot.begun.add(job)

    def _has_begun(self, tx: Session, job: Job) -> bool:
        token = (job.lease_token or "")[:16]
        rows = tx.run(SLOT_OF, {"token": token})
        if not rows or rows[0][0] is None or not (slots := self._slots):
            return True
        with self._told_of_folder():
            return slots.has_begun(rows[0][0], token, job.id)

    def _sleep(self, me: Registration, seconds: float, due_in: Callable[[], float]) -> bool:
        if slots := self._slots:
            return slots.wait(me.slot, seconds, due_in)
        time.sleep(max(0.0, min(seconds, due_in(), POLL_SECONDS)))
        return False

    @property
    def in_transaction(self) -> bool:
        return self._session().busy

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write() as tx:
            depth, tx.is_users = tx.depth, True
            try:
                yield tx.connection
            finally:
                tx.connection.row_factory, tx.connection.text_factory = None, str  # as the queue reads
                tx.expect_depth(depth)

    def backup(self, path: str | os.PathLike[str]) -> None:
        target = file_path(path)
        part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
        try:
            _create(part)
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self._read("VACUUM INTO :part", {"part": str(part)})
            with closing(sqlite3.connect(f"{part.as_uri()}?mode=ro", uri=True)) as copy:
                if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    raise QueueError(f"cannot back up to {target}: the copy is damaged")
            sync(part)  # whatever this SQLite syncs
            _create(target)  # takes the name, or fails where there is one
            part.replace(target)
            sync(target.parent)
        except OSError as error:
            raise QueueError(f"cannot back up to {target}: {error.strerror}") from error
        except sqlite3.Error as error:
            raise self._error(error) from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def move_to_file(
        self,
        path: str | os.PathLike[str],
        *,
        tell: Callable[[int], None] | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> dict[str, int] | None:
        """Do what `move_to` does, into a new SQLite file, with all that the application keeps in this one besides.

        tell is called with the pages so far. Raises QueueError when there is such a file.
        """
        target = _real(path)
        part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
        try:
            if target.exists() and target.stat().st_size:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            make_folder(target.parent)
            _create(part)
            with self._write() as source:  # nobody else writes: what another connection reads is what is here
                if _running(source):
                    return None
                with closing(self._connect()) as reader, closing(sqlite3.connect(part, isolation_level=None)) as copy:
                    copied = _copy_database(reader, copy, tell)
                    _begin_anew(copy, _arrival(self._leave_for(source, str(target), by, now)))
                sync(part)
            _put_in_place(part, target, is_new=not target.exists())
        except OSError as error:
            raise QueueError(f"cannot move to {target}: {error.strerror}") from error
        except sqlite3.Error as error:
            raise QueueError(f"cannot move to {target}: {error}") from error
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)
        return copied

    def other_tables(self) -> list[str]:
        """Return the names of the tables and views that are not ours, and of indexes and triggers on those that are."""
        shadows = {row[1] for row in self._read("PRAGMA table_list") if row[2] == "shadow"}  # of a virtual table
        ours = {name for _, name, _ in _schema(has_limit=True)}
        sql = f"""
            SELECT name FROM sqlite_master WHERE (type IN ('table', 'view') OR tbl_name IN {TABLES})
            AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"""
        return [row[0] for row in self._read(sql) if row[0] not in ours | shadows]

    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        facts: dict[str, Any] = {"path": str(self.path), "sqlite": sqlite3.sqlite_version}
        try:
            self._session().files.expect_in_place()
        except DatabaseReplaced as error:
            return {**facts, "problems": [str(error)]}
        expected: dict[str, Any] = {"user_version": len(MIGRATIONS)}
        if thorough:
            expected["quick_check"] = "ok"
        if not self.is_read_only:
            expected["journal_mode"] = "wal"
        if thorough and not self.is_read_only:
            expected["synchronous"] = self.durability
            with self._write() as tx:
                facts["synchronous"] = SYNCHRONOUS[tx.run("PRAGMA synchronous")[0][0]]
        for pragma in [name for name in expected if name not in facts]:
            facts[pragma] = self._read(f"PRAGMA {pragma}")[0][0]
        facts["file_system"] = file_system(self.path.parent)
        facts["durability"] = self.durability
        facts |= {"file_bytes": _size(self.path), "wal_bytes": _size(Path(f"{self.path}-wal"))}
        facts["disk_free_bytes"] = shutil.disk_usage(self.path.parent).free
        facts["problems"] = [
            f"expected {name} {value}, got {facts[name]}" for name, value in expected.items() if facts[name] != value
        ]
        facts["problems"] += self._turn_problems()
        facts["problems"] += [*self._schema_problems(), *_deleted_but_open(self.path)] if thorough else []
        facts["problems"] += self._place_problems(facts)
        return facts

    def _place_problems(self, facts: dict[str, Any]) -> list[str]:
        """Return what is wrong with where the database is: its file system, its modes, its log, the disk."""
        found: list[str] = []
        if facts["file_system"] not in LOCAL_FILE_SYSTEMS:
            found.append(
                f"the file system {facts['file_system']} is not known to be local: several processes may damage the "
                "database on one that is shared; use a local disk"
            )
        if hasattr(os, "getuid") and self.path.stat().st_mode & 0o007:
            found.append(f"every account of this machine may use it: run chmod o= {shlex.quote(str(self.path))}")
        if self.is_read_only:
            found.append("its file system is read-only: no job can be enqueued, run or changed")
        if facts["wal_bytes"] > 2 * WAL_BYTES:
            found.append(f"the write-ahead log has grown to {facts['wal_bytes']} bytes: some program holds a read open")
        if facts["disk_free_bytes"] < LEAST_FREE_BYTES:
            found.append(f"the disk has only {facts['disk_free_bytes']} bytes left")
        return found

    def _schema_problems(self) -> list[str]:
        try:
            missing = _schema(has_limit=bool(self._read(LIMITED))) - set(self._read(OUR_SCHEMA))
        except sqlite3.Error as error:
            raise self._error(error) from error
        changed = [f"{kind} {name!r} is not as this version makes it" for kind, name, _ in sorted(missing)]
        damaged = self._read(DAMAGED)[0][0]
        changed += [f"{damaged} jobs hold text where a number belongs"] if damaged else []
        changed += [
            f"queue {name!r} counts its pending jobs wrong: set its limit again" for (name,) in self._read(MISCOUNTED)
        ]
        return changed + [
            f"trigger {name!r} on {table} is not ours" for name, table in self._read(TRIGGERS) if name not in COUNTERS
        ]

    def close(self) -> None:
        if self._closed:
            return
        if getattr(self._local, "session", None) and self.in_transaction:
            raise QueueError(f"cannot close {self.path} inside a transaction")
        try:
            if self._registry:
                self._leave(list(self._registry.values()))
        except QueueBusy:  # it may be closed later
            raise
        except QueueError:
            self._close()
            raise
        self._close()

    def _close(self) -> None:
        self._closed = True
        for me in self._registry.values():
            if me.slot:
                me.slot.close()
        self._registry = {}
        with _opening:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()
        self._sessions.clear()
        self._local = threading.local()
        with _opening:
            FileLocks.close_unused()
        if self._turnstile is not None:
            self._turnstile.close()
        self._slots = None  # but the turnstile is left to a thread that has the way

    def _after_fork(self) -> None:
        """Reconnect in the child: SQLite's handles and the locks belong to the parent."""
        if self._closed:
            return
        for session in list(self._sessions):
            session.disown()
        for me in self._registry.values():
            me.slot.close()
        if self._turnstile is not None:
            self._turnstile.abandon()
        PersistentQInterface.__init__(self)
        self._sessions, self._local = weakref.WeakSet(), threading.local()
        self._turnstile = self._slots = None
        try:
            self._open_folder()
        except QueueError:
            self.close()  # so that its next use is an error, too


def _deleted_but_open(path: Path) -> Iterator[str]:
    """Yield a sentence for each process that has a deleted file of this database open, where /proc shows it."""
    deleted = {f"{path}{suffix} (deleted)" for suffix in ("", "-wal", "-shm")}
    processes: list[int] = []
    with suppress(OSError):
        processes = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for process in processes:
        with suppress(OSError):  # it has ended, or is another account's
            folder = f"/proc/{process}/fd"
            if any(os.readlink(f"{folder}/{file}") in deleted for file in os.listdir(folder)):
                yield f"process {process} has a deleted file of this database open and cannot write to it: restart it"


def _schema(*, has_limit: bool) -> set[tuple[str, str, str]]:
    """Return what SQLite says of a new queue's schema: types, names and statements."""
    with closing(sqlite3.connect(":memory:")) as model:
        for statement in chain(*MIGRATIONS, COUNTERS.values() if has_limit else ()):
            model.execute(statement.format(id="INTEGER PRIMARY KEY", float="REAL"))
        return set(model.execute(OUR_SCHEMA))


def _adopt_dump(connection: sqlite3.Connection) -> None:
    """Mark a queue that was restored from the output of .dump, which leaves out the marks."""
    marks = connection.execute("SELECT * FROM pragma_application_id, pragma_user_version").fetchone()
    if marks == (0, 0) and _schema(has_limit=False) <= set(connection.execute(OUR_SCHEMA)):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")


def _schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return how many migrations a database has had, 0 for an empty one. Raises SchemaMismatch."""
    owner, version, tables, ours = connection.execute(
        "SELECT *, (SELECT count(*) FROM sqlite_master), "
        f"({OUR_TABLES}) FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    if owner != APPLICATION_ID and (owner or version or tables):
        raise SchemaMismatch(f"cannot use {path}: expected a queue, got another program's database")
    if version > len(MIGRATIONS):
        raise SchemaMismatch(
            f"cannot use {path}: expected schema {len(MIGRATIONS)} or older, got {version}: "
            "use the pqueue that wrote it, or a newer one"
        )
    if version and ours < len(TABLES):
        raise SchemaMismatch(f"cannot use {path}: expected the tables of a queue, got {ours} of them")
    return cast(int, version)


def _copy_database(
    source: sqlite3.Connection, copy: sqlite3.Connection, tell: Callable[[int], None] | None
) -> dict[str, int]:
    """Copy all pages, as they are, and compare all rows; return how many of ours, by table."""

    def progress(_: int, remaining: int, total: int) -> None:
        if tell:
            tell(total - remaining)

    source.backup(copy, pages=10_000, progress=progress)
    source.text_factory = copy.text_factory = bytes  # the application may keep what is no UTF-8
    schema = "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master"
    tables = [row[1].decode() for row in source.execute(schema) if row[0] == b"table" and row[3]]
    for sql in [schema, *(f"SELECT * FROM {_quoted(table)}" for table in tables)]:
        if any(one != other for one, other in zip_longest(source.execute(sql), copy.execute(sql))):
            raise QueueError(f"cannot copy: what was read back by {sql} is not what was written")
    if (damage := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != b"ok":
        raise QueueError(f"cannot copy: the copy is damaged: {damage.decode()}")
    return {table: copy.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in COPIED}


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _begin_anew(copy: sqlite3.Connection, changes: list[tuple[str, Params]]) -> None:
    """Make these changes and forget the consumers, without the application's triggers; leave no log to the file."""
    copy.text_factory = str
    copy.execute("PRAGMA journal_mode = DELETE")
    copy.execute("BEGIN")
    sql = f"SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name IN {TABLES}"
    triggers = copy.execute(sql).fetchall()
    for name, _ in triggers:
        copy.execute(f"DROP TRIGGER {_quoted(name)}")
    for change, params in [*changes, ("DELETE FROM consumers", {})]:
        copy.execute(change, params)
    for _, definition in triggers:
        copy.execute(definition)
    copy.execute("COMMIT")


def _real(path: str | os.PathLike[str]) -> Path:
    try:
        return file_path(path).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise QueueError(f"cannot open {path}: {error}") from error


SHARED = stat.S_ISGID | stat.S_IWGRP  # of a folder that accounts of a group share: what is made in it is the group's


def _create(path: Path, group: int | None = None) -> None:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if group is not None:
            os.fchown(file, -1, group)
            os.fchmod(file, 0o660)
    finally:
        os.close(file)


def _open_private(path: Path) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    share_as_folder(file, path.parent)
    return file


def share_as_folder(file: int, folder: int | os.PathLike[str]) -> None:
    """Let the group use a file of ours in a folder that a group shares."""
    if os.stat(folder).st_mode & SHARED == SHARED and os.fstat(file).st_uid == os.geteuid():
        os.fchmod(file, 0o660)


def _group_number(group: str) -> int:
    try:
        import grp

        return grp.getgrnam(group).gr_gid
    except (ImportError, KeyError):
        raise ValueError(f"expected a group of this system, got {_short(group)}") from None


def _refusal_of(error: OSError, path: Path) -> str:
    """Return the system's reason; for a lack of permission also whose file it is, and what helps."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.EACCES, errno.EPERM):
        return reason
    for place in (path, *path.parents):
        with suppress(OSError, ImportError, KeyError):
            import pwd

            owner = pwd.getpwuid(place.stat().st_uid).pw_name
            return (
                f"{reason}: {place} belongs to {owner}; run this as {owner}, or make the queue with PQUEUE_GROUP=GROUP"
            )
    return reason


def _share(file: int, size: int) -> mmap.mmap:
    """Map the first bytes of a file, and no hole: where the disk is full, filling one would be SIGBUS."""
    if os.fstat(file).st_size < size:
        os.write(file, bytes(size))
    return mmap.mmap(file, size)


def _open_bell(path: Path) -> int:
    with suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    bell = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    share_as_folder(bell, path.parent)
    if not stat.S_ISFIFO(os.fstat(bell).st_mode):
        os.close(bell)
        raise OSError(errno.EINVAL, f"expected {path.name} to be a FIFO")
    return bell


def _ring(bell: int) -> None:
    with suppress(BlockingIOError):  # rung more often than heard
        os.write(bell, b"!")


def _hear(bell: int, seconds: float, *, in_line: bool = False) -> bool:
    """Wait for a ring; return whether there was one. It wakes up all that wait, or the first of those in line."""
    rung = _hear_in_line(bell, seconds) if in_line else None
    if rung is None:
        ear = select.poll()
        ear.register(bell, select.POLLIN)
        rung = bool(ear.poll(max(0, math.ceil(seconds * 1000))))
    if rung:
        with suppress(BlockingIOError):  # another heard it first
            os.read(bell, 65536)
    return rung


def _is_read_only(path: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _hear_in_line(bell: int, seconds: float) -> bool | None:
    """Return None where only `poll` is left: it wakes up all, the last one first, and so may starve the others."""
    if not hasattr(select, "epoll"):  # not Linux
        return None
    try:
        with select.epoll() as ear:
            ear.register(bell, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            return bool(ear.poll(max(0, seconds)))
    except OSError as error:
        if error.errno is None:  # a signal handler's
            raise
        return None  # no free descriptor


def sync(path: Path) -> None:
    """Put a file on disk, or the names in a folder, which a power cut may take with all that is in them."""
    if fcntl is None:
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync_file(file)
    finally:
        os.close(file)


def _file_number(path: Path) -> bytes:
    return b"%20d" % (path.stat().st_ino if path.exists() else 0)


def sync_file(file: int) -> None:
    """Put an open file or folder on disk. On macOS fsync leaves it in the drive's cache, and F_FULLFSYNC does not."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # a file system that has none
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def make_folder(folder: Path, group: int | None = None) -> None:
    """Make a folder, and those above it that are missing, durably; for this account alone, unless a group is given, or
    the folder above is one that a group shares."""
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
        if group is not None:
            os.chown(missing, -1, group)
        if group is not None or missing.parent.stat().st_mode & SHARED == SHARED:
            missing.chmod(0o2770)
        sync(missing.parent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_stopped(pid: object) -> bool:
    """Return whether a process was stopped by a signal or a debugger, as far as /proc tells."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] in (b"T", b"t")


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds this folder, or "unknown" where /proc does not tell."""
    try:
        mounts = [line.split(b" ") for line in Path("/proc/self/mounts").read_bytes().splitlines()]
    except OSError:
        return "unknown"
    real = folder.resolve()
    under = {len(mount[1]): mount[2] for mount in mounts if real.is_relative_to(_unescape(mount[1]))}
    return os.fsdecode(under[max(under)]) if under else "unknown"


def _unescape(mount_point: bytes) -> str:
    return os.fsdecode(mount_point.decode("unicode_escape").encode("latin-1"))


def open_queue(
    url: str | os.PathLike[str] | None = None,
    *,
    create: bool = True,
    durability: str | None = None,
    group: str | None = None,
) -> PersistentQInterface:
    """Open the queue at a path, sqlite:///PATH or postgresql://…; None: $PQUEUE_URL, else var/queue.db.

    durability: "full" or "normal"; None: $PQUEUE_DURABILITY, else "full". create: make the queue where there is none,
    else raise QueueError. group: on SQLite, the group of accounts that may use a new queue; None: $PQUEUE_GROUP, else
    only the account that makes it. Raises ValueError for what names neither a file nor a server, such as ":memory:".
    """
    durability = durability or os.environ.get("PQUEUE_DURABILITY") or "full"
    if is_postgres(url):
        return _on_postgres(_url(url), create, durability)
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
        raise ValueError(f"expected a path or a URL as str or Path, got {_short(url)}")
    return text or os.environ.get("PQUEUE_URL") or DEFAULT_URL


def file_path(path: str | os.PathLike[str]) -> Path:
    """Return the path, absolute. Raises ValueError for what would make a file of a name that nobody meant."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ValueError(f"expected a path as str or Path, got {_short(path)}")
    if text == ":memory:":
        raise ValueError(
            "expected a path, got ':memory:': a queue is a file; for a test, use one in a temporary folder"
        )
    if text.startswith("~"):
        raise ValueError("expected a path without ~, got ~…: write it out, or use os.path.expanduser")
    if text.lower().startswith(("file:", "sqlite:")):
        raise ValueError(f"expected a path or sqlite:///PATH, got {text.partition(':')[0]}:…")
    return Path(text).absolute()


# Restoring a backup ###################################################################################################

LOGS = ("-wal", "-journal")  # what SQLite would apply to whatever file bears the name
SHARED_BYTES = (510, 0x40000002)  # of the file: SQLite locks some of these for as long as a connection is open
COPY_BYTES = 1 << 20
IN_RESTORE = b"A restore was interrupted here. Give it again: python admin.py restore FILE\n"


def restore(backup: str | os.PathLike[str], url: str | os.PathLike[str] | None = None) -> Path | None:
    """Put a copy of this backup in the place of the queue's file; return where the replaced one is kept, if any.

    `url` is that of `open_queue`. However this is interrupted, the file is the old one or the new one, whole. Raises
    QueueError, with nothing changed, when a program has the file open or the backup is not a sound queue.
    """
    if is_postgres(url):
        raise QueueError(
            "cannot restore into PostgreSQL: set PQUEUE_URL to the backup's path, and move that queue: "
            "python admin.py move --to postgresql://…"
        )
    if fcntl is None:
        raise QueueError("cannot restore on this platform: it does not show whether a program has the file open")
    source, target = file_path(backup), _real(sqlite_path(url))
    try:
        part = _copy_backup(source, target)
        try:
            _apply_logs(target)
            with _nobody_in(target) as file:
                kept = _keep(target, file)
                _put_in_place(part, target, is_new=file is None)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise QueueError(f"cannot restore {source} to {target}: {error.strerror}") from error
    return kept


def _copy_backup(source: Path, target: Path) -> Path:
    """Return a copy of the backup, verified and on disk, in the folder of the target."""
    if not source.is_file():
        raise QueueError(f"cannot restore {source}: expected a file, got none")
    if target.exists() and source.samefile(target):
        raise QueueError(f"cannot restore {source}: it is the queue's file itself, not a backup of it")
    make_folder(target.parent)
    part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
    _create(part)
    try:
        _copy_pages(source, part)
        sync(part)
    except BaseException:
        part.unlink()
        raise
    return part


def _copy_pages(source: Path, part: Path) -> None:
    has_log = any(Path(f"{source}{suffix}").exists() for suffix in LOGS)
    mode = "mode=ro" if has_log else "mode=ro&immutable=1"  # then it may lie in a folder that is read-only
    try:
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?{mode}", uri=True)) as backup,
            closing(sqlite3.connect(part, isolation_level=None)) as copy,
        ):
            backup.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # so that there is no log to it
            if not _schema_version(copy, source):
                raise SchemaMismatch(f"cannot use {source}: expected a queue, got an empty database")
            if (damage := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise QueueError(f"cannot restore {source}: it is damaged: {' '.join(damage.split())}")
    except sqlite3.Error as error:
        raise QueueError(f"cannot restore {source}: {error}") from error


def _apply_logs(path: Path) -> None:
    """Write into the file what its log holds, if it is sound and nobody has it open, so that it needs no log."""
    if path.exists() and any(Path(f"{path}{suffix}").exists() for suffix in LOGS) and path not in _opened():
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0)) as db:
            db.execute("PRAGMA journal_mode = DELETE")


def _opened() -> set[Path]:
    return {queue.path for queue in list(_queues) if not queue._closed}


@contextmanager
def _nobody_in(path: Path) -> Iterator[int | None]:
    """Keep everybody out of this file, and yield its descriptor. Raises QueueError when somebody is in it."""
    if path in _opened():  # and closing a descriptor of it here would release the locks of this process
        raise QueueError(f"cannot replace {path}: this process has it open")
    with ExitStack() as undo:
        folder, file = Path(f"{path}.d"), None
        folder.mkdir(mode=0o700, exist_ok=True)
        way = _open_private(folder / "way")
        undo.callback(os.close, way)
        is_free = try_lock(way)
        if path.exists():
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, file)
            is_free = is_free and _try_lock_bytes(file) and os.path.samestat(os.fstat(file), path.stat())
        if not is_free:
            raise QueueError(f"cannot replace {path}: {_users(path) or 'a program'} has it open; stop what uses it")
        yield file


def _try_lock_bytes(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *SHARED_BYTES)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _users(path: Path) -> str:
    """Return which programs have this file open, as far as /proc shows."""
    found = set()
    for link in Path("/proc").glob("[1-9]*/fd/*"):
        process = link.parent.parent
        with suppress(OSError):
            if os.readlink(link) == str(path) and process.name != str(os.getpid()):
                words = (process / "cmdline").read_bytes().split(b"\0")[:2]  # what follows may hold a password
                found.add(" ".join([*(Path(os.fsdecode(word)).name for word in words), f"(pid {process.name})"]))
    return ", ".join(sorted(found))


def _keep(path: Path, file: int | None) -> Path | None:
    """Copy what is about to be replaced, with its log if it has one, to a new name; return that."""
    logs = [suffix for suffix in LOGS if Path(f"{path}{suffix}").exists()]
    has_data = file is not None and os.pread(file, len(IN_RESTORE), 0) not in (b"", IN_RESTORE)
    if not logs and not has_data:
        return None
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (path.with_name(f"{path.name}.replaced-{at}-{number}") for number in count(1))
    kept = next(name for name in names if not name.exists())
    for suffix in logs:
        with open(f"{path}{suffix}", "rb") as log:
            _copy_file(log.fileno(), Path(f"{kept}{suffix}"))
    if file is not None and has_data:  # by this descriptor: to close another one would release the lock
        _copy_file(file, kept)
    sync(path.parent)
    return kept


def _copy_file(source: int, target: Path) -> None:
    part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
    _create(part)
    try:
        with part.open("wb") as copy:
            for at in range(0, os.fstat(source).st_size, COPY_BYTES):
                copy.write(os.pread(source, COPY_BYTES, at))
        sync(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _put_in_place(part: Path, target: Path, *, is_new: bool) -> None:
    """Give the file the target's name. No log of another file may be there when it bears it."""
    logs = [log for suffix in LOGS if (log := Path(f"{target}{suffix}")).exists()]
    if is_new:
        _create(target)  # or fail, if somebody has made it meanwhile
    elif logs:  # of a damaged file: neither may be opened without the other
        stone = part.with_suffix(".stone")
        _create(stone)
        stone.write_bytes(IN_RESTORE)
        sync(stone)
        stone.replace(target)
        sync(target.parent)
    for each in (*logs, Path(f"{target}-shm")):
        each.unlink(missing_ok=True)
    sync(target.parent)
    part.replace(target)
    sync(target.parent)
