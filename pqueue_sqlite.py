"""The queue on SQLite."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import sqlite3
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from heapq import merge
from itertools import islice, zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

from pqueue import BUSY_SECONDS, POLL_SECONDS, PersistentQInterface
from pqueue_backend import Registration, Session, Watch
from pqueue_files import (
    LOCAL_FILE_SYSTEMS,
    SHARED_FILE_SYSTEMS,
    DatabaseFiles,
    FileLocks,
    closing_file,
    create_file,
    deleted_but_open,
    error_reason,
    file_size,
    file_system,
    group_number,
    group_of,
    has_locks,
    identity,
    is_mounted,
    make_folder,
    move_into_place,
    open_files,
    open_private,
    opening,
    part_of,
    real_path,
    replaced,
    status,
    sync,
)
from pqueue_identity import DEFINITIONS, adopt_dump, expect_ours, is_dump, schema_of, schema_version
from pqueue_join import JoinedSQLite, driver_connection
from pqueue_locks import ConsumerLock, ConsumerLocks, ResultLocks, WriterLock, boot_id
from pqueue_move import COPIED_ROWS, arrival
from pqueue_operating import count_running
from pqueue_outcomes import KEY, NEW, NEW_COMPLETIONS, NEW_JOBS, ROLL_UP_JOBS, SUM, UNTIMED, count, count_attempts
from pqueue_schema import (
    APPLICATION_ID,
    ASSIGNED,
    COMPLETED,
    ENQUEUE,
    INDEXED,
    LAST_COMPLETION,
    LAST_COUNTED,
    LIMITED,
    MIGRATIONS,
    ORDER,
    PENDING_IN_QUEUE,
    PENDING_OF_TASK,
    PLACES,
    SQLITE_TYPES,
    TABLES,
)
from pqueue_values import (
    NO_PARAMS,
    DatabaseReplaced,
    Job,
    JobId,
    LeaseLost,
    Params,
    QueueBusy,
    QueueError,
    QueueFull,
    SchemaMismatch,
    command_line,
    file_path,
    ids_up_to,
    no_queue,
    quoted_name,
    short,
    to_json,
    valid_wait,
)

PAGE_BYTES = 2048  # of a new file: a commit writes a few pages, whole
WAL_BYTES = 67_108_864  # the write-ahead log is truncated to this size when no reader needs more
MANY_COMPLETIONS = 32  # in one commit: counting them later would cost more
COMPACTED_PAGES = 50  # moved in one transaction of `compact`
LEAST_FREE_BYTES = 268_435_456  # `check` warns below this much free disk space

SYNCHRONOUS = ("off", "normal", "full", "extra")
MINIMUM_SQLITE = (3, 37)  # STRICT tables
GROUPED = "SELECT 1 FROM queues WHERE grouped = 1 LIMIT 1"
_PENDING_NOW = "(SELECT count(*) FROM jobs WHERE queue = name AND state = 'pending' AND assigned_to IS NULL)"
MISCOUNTED = f"SELECT name FROM queues WHERE max_pending IS NOT NULL AND pending <> {_PENDING_NOW}"

# Statements that only SQLite has

# Complete jobs of a claim. :results is a JSON object of their ids and results.
# guard: a batch completes under its token only
COMPLETE_MANY = f"""
UPDATE jobs SET {COMPLETED}, result = value
FROM json_each(:results) results WHERE jobs.id = CAST(results.key AS INTEGER) AND lease_token = :token
    AND has_dependents = 0"""

# Return the first job of each task in each queue that a consumer may take from, in order: the jobs' order, then queue
# and task.
FIRST_JOBS = f"""
SELECT -priority, run_at, jobs.id, t.queue, t.task {PLACES} AND jobs.id =
    (SELECT id FROM jobs WHERE {PENDING_OF_TASK} ORDER BY {ORDER} LIMIT 1)
ORDER BY {ORDER} LIMIT :limit"""

# Return the first jobs of a task in a queue, in order.
NEXT_OF_TASK = f"""
SELECT -priority, run_at, id FROM jobs
WHERE {PENDING_IN_QUEUE} AND task = :task AND "group" = '' ORDER BY {ORDER} LIMIT :limit"""

# Return the first jobs assigned to a consumer, in order.
NEXT_ASSIGNED = f"""
SELECT -priority, run_at, id FROM jobs WHERE state = 'pending' AND {ASSIGNED} ORDER BY {ORDER} LIMIT :limit"""

# Return the id of the last job that was counted and that of the newest one, and the time of the last completion that
# was counted and that of the latest one.
_COMPLETED = f"FROM jobs WHERE {INDEXED['completed'][0]} AND queue = q.name"
COUNTED = f"""
SELECT {LAST_COUNTED}, coalesce((SELECT max(id) FROM jobs), 0), {LAST_COMPLETION},
    coalesce((SELECT max((SELECT max(finished_at) {_COMPLETED})) FROM queues q), 0.0)"""

# Count the jobs and completions that were not counted yet.
COUNT_NEW_JOBS, COUNT_NEW_COMPLETIONS = (
    f"""
INSERT INTO outcomes ({NEW})
SELECT 60, at, queue, task, event, run, wait, count(*), sum(run_seconds), sum(wait_seconds) FROM {new} new
WHERE true GROUP BY at, queue, task, run, wait
{SUM}"""
    for new in (NEW_JOBS, NEW_COMPLETIONS)
)

# Return the time of the last completion that was counted.
COUNTED_UNTIL = f"SELECT {LAST_COMPLETION}"

# Record that jobs are counted up to an id, and completions up to a time; NULL leaves a value unchanged.
SET_COUNTED = f"""
INSERT INTO outcomes ({NEW})
VALUES (0, 0, '', '', 'counted', {UNTIMED}, {UNTIMED}, coalesce(:id, 0), coalesce(:at, 0.0), 0)
ON CONFLICT ({KEY}) DO UPDATE
SET number = coalesce(:id, number), run_seconds = max(run_seconds, coalesce(:at, run_seconds))"""

# Return the number of a consumer's lock.
SLOT_OF = "SELECT slot FROM consumers WHERE token = :token"

# Count the pending jobs of the queues with a limit.
COUNT_PENDING = f"UPDATE queues SET pending = {_PENDING_NOW} WHERE max_pending IS NOT NULL"

# Triggers that maintain queues.pending. They exist only while a queue has a limit: otherwise they cost nothing.
IS_PENDING = "{row}.state = 'pending' AND {row}.assigned_to IS NULL"
ADD_PENDING = "UPDATE queues SET pending = pending {change} 1 WHERE name = {row}.queue AND max_pending IS NOT NULL"
# guard: a claimed job stops counting towards the limit
# guard: a job that is pending again counts towards the limit
# guard: a deleted job stops counting towards the limit
COUNTERS = {
    f"jobs_{event.lower()}_{row}": (
        f"CREATE TRIGGER IF NOT EXISTS jobs_{event.lower()}_{row} AFTER {event} {columns} ON jobs "
        f"WHEN {IS_PENDING.format(row=row)} BEGIN {ADD_PENDING.format(row=row, change=change)}; END"
    )
    for event, columns, row, change in (
        ("INSERT", "", "NEW", "+"),
        ("UPDATE", "OF state, assigned_to, queue", "OLD", "-"),
        ("UPDATE", "OF state, assigned_to, queue", "NEW", "+"),
        ("DELETE", "", "OLD", "-"),
    )
}

# Triggers that maintain queue_groups. They exist only while a queue has groups.
HAS_GROUP = "{row}.\"group\" <> ''"
_WAKE_TASK = """
INSERT INTO queue_groups (queue, name, task, turn) VALUES (NEW.queue, NEW."group", NEW.task, coalesce(
    (SELECT max(turn) FROM queue_groups WHERE queue = NEW.queue AND name = NEW."group"), 0.0))
ON CONFLICT (queue, name, task) DO UPDATE SET next_at = 0 WHERE next_at IS NULL OR next_at < 0;
UPDATE queues SET grouped = 1 WHERE name = NEW.queue AND grouped = 0"""
_WAKE_GROUP = """
UPDATE queue_groups SET next_at = 0 WHERE queue = OLD.queue AND name = OLD."group" AND next_at IS NULL"""
BECOMES_PENDING = f"{HAS_GROUP.format(row='NEW')} AND {IS_PENDING.format(row='NEW')}"
WAS_RUNNING = f"{HAS_GROUP.format(row='OLD')} AND OLD.state = 'processing'"
# guard: a group with a new job is looked at
# guard: a group with a job that is pending again is looked at
# guard: a group of which a job ended is looked at
GROUPERS = {
    f"groups_{name}": f"""
CREATE TRIGGER IF NOT EXISTS groups_{name} AFTER {event} ON jobs WHEN {when} BEGIN {action}; END"""
    for name, event, when, action in (
        ("added", "INSERT", BECOMES_PENDING, _WAKE_TASK),
        ("pending", 'UPDATE OF state, assigned_to, queue, "group"', BECOMES_PENDING, _WAKE_TASK),
        ("ended", "UPDATE OF state", f"{WAS_RUNNING} AND NEW.state <> 'processing'", _WAKE_GROUP),
        ("deleted", "DELETE", WAS_RUNNING, _WAKE_GROUP),
    )
}

TRIGGERS = f"SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger' AND tbl_name IN {TABLES} ORDER BY name"


class SQLiteSession(Session):
    """One thread's connection. Its transactions hold the writer lock if they can."""

    wanted: str  # `synchronous` of the next transaction, "FULL" or "NORMAL"
    in_batch: bool  # whether that is a consumer's
    was_lent = False  # to user code
    _synchronous = ""  # of the connection
    _has_lock = _closed = False
    _locks: FileLocks | None = None

    def __init__(self, queue: PersistentQSQLite) -> None:
        self._queue = queue
        self.in_use = threading.RLock()  # held during calls into SQLite, so that no thread forks then
        with ExitStack() as undo:
            before = open_files()
            self.connection = undo.enter_context(closing(queue._connect()))
            self.run("PRAGMA user_version")  # SQLite opens the log at the first read, and holds its locks from then on
            self.files = DatabaseFiles(queue.path, before)
            with opening(queue.path):
                try:
                    self._locks = None if queue.is_read_only else FileLocks.acquire(queue.path)
                except FileNotFoundError:
                    raise replaced(queue.path) from None
            undo.pop_all()

    def run(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        try:
            return self.connection.execute(sql, params).fetchall()
        except sqlite3.Error as error:
            raise self._queue._error(error) from error

    def change(self, sql: str, params: Params = NO_PARAMS) -> int:
        try:
            return self.connection.execute(sql, params).rowcount
        except sqlite3.Error as error:
            raise self._queue._error(error) from error

    def change_many(self, sql: str, rows: list[Params]) -> None:
        with self._queue._sqlite_errors():
            self.connection.executemany(sql, rows)

    def read(self, sql: str, params: Params) -> list[Any]:
        with self.in_use:
            try:
                self._expect_open()
                return self.run(sql, params)
            except QueueError:
                self.expect_files_open()  # it may have read another file
                raise
            finally:
                if self._closed:
                    self._disconnect()

    @property
    def has_ended(self) -> bool:
        return not self._is_in_transaction()

    def was_closed(self) -> bool:
        """Return whether user code has closed the connection."""
        return self._is_in_transaction() is None

    def _is_in_transaction(self) -> bool | None:
        """Return None if the connection was closed: by another thread, or by user code."""
        try:
            return self.connection.in_transaction
        except sqlite3.ProgrammingError:
            return None

    def insert(self, sql: str, params: Params) -> list[int]:
        is_alone = self.depth == 0
        if is_alone:
            self._begin(alone=True)
        try:
            cursor = self.connection.execute(sql, params)
            ids = ids_up_to(cursor.lastrowid or 0, cursor.rowcount)  # RETURNING would cost more
        except sqlite3.Error as error:
            raise self._queue._error(error) from error
        finally:
            if is_alone:
                self._cleanup()
        if ids and is_alone:
            self._wake()
        self.wakes = self.wakes or bool(ids)
        return ids

    def _begin(self, *, alone: bool = False) -> None:
        """Begin a transaction; alone: a single statement, which needs no BEGIN, follows."""
        # guard: a signal handler cannot use the queue it interrupted
        if self.busy:
            raise QueueError("cannot use the queue in a signal handler that interrupted it: set a flag there")
        self.in_use.acquire()
        self._owner: FrameType | None = sys._getframe(2)  # of the function whose block the transaction is
        self.busy, self.runs_user_code = True, False  # inside `transaction`
        try:
            self._expect_open()
            self.expect_files_open()
            self._has_lock = self._queue._writer_lock.acquire(in_batch=self.in_batch)
            # guard: a replaced database is not written
            self.files.expect_in_place()
            if self._synchronous != self.wanted:
                self.run(f"PRAGMA synchronous = {self.wanted}")
                self._synchronous = self.wanted
            if not alone:
                self.run("BEGIN IMMEDIATE")
        except BaseException:
            self._cleanup()
            raise

    def _commit(self) -> None:
        self._expect_open()
        self._expect_to_go_on()
        # guard: a transaction that lost its lock is rolled back
        self._expect_lock()
        self.run("COMMIT")

    def _wake(self) -> None:
        if locks := self._queue._consumer_locks:
            locks.wake()

    def _wake_waiters(self) -> None:
        if locks := self._queue._result_locks:
            locks.wake_for(self.finished)

    def is_locked_by(self, pid: int) -> bool:
        """Return whether a process holds SQLite's write lock; False where the system does not tell."""
        return self._locks is not None and self._locks.writer() == pid

    def _expect_lock(self) -> None:
        """Raise QueueError if the write lock was lost, so that another process may have written."""
        if self._locks and (self.runs_user_code or not self._has_lock) and not self.is_locked_by(os.getpid()):
            raise QueueError(
                f"cannot commit to {self._queue.path}: its lock was lost, as code in this process closed one of its "
                "files during the transaction; use backup() to copy it"
            )

    def _cleanup(self) -> None:
        try:
            self._roll_back()
        finally:
            # guard: an interrupted call is rolled back
            self._roll_back()  # a signal handler interrupted it; an open transaction would block all writers
            if self._has_lock:
                # guard: a failed call releases the lock
                self._queue._writer_lock.release()
                self._has_lock = False
            if self._closed:
                self._disconnect()
            self.busy, self._owner = False, None
            self.in_use.release()

    def recover(self) -> None:
        """Roll back if the function whose transaction this is has ended: an exception from a signal handler can keep
        the end of a `with` block from being executed."""
        frame: FrameType | None = sys._getframe()
        while frame and frame is not self._owner:
            frame = frame.f_back
        if frame is None:
            self.depth = 0
            self._cleanup()

    def _roll_back(self) -> None:
        if not self.has_ended:
            with suppress(sqlite3.Error):
                self.connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection, if need be after the current call of its thread: during one SQLite would crash."""
        self._closed = True
        if self.in_use.acquire(blocking=False):
            self._disconnect()
            self.in_use.release()

    def _disconnect(self) -> None:
        """Close the connection. If its files were replaced, do not write its log back."""
        with _opening_lock:
            self._queue._sessions.discard(self)
            if self._has_lost_files():  # SQLite would take another one for the database, and delete a log in use
                _never_closed.add(self.connection)
                return
            try:
                self.files.expect_in_place()
            except DatabaseReplaced:
                # guard: a deleted log is not written back
                self.connection.close()  # under the locks: SQLite neither writes back nor deletes the log
            locks, self._locks = self._locks, None
            if locks:
                locks.release()
            self.connection.close()
            FileLocks.close_unused()

    def _has_lost_files(self) -> bool:
        """Return whether other code has closed a descriptor of the connection, which is open."""
        has_lost_lock = self._locks is not None and self._locks.has_lost_files()
        return not self.was_closed() and (has_lost_lock or not self.files.are_open())

    def _expect_open(self) -> None:
        if self._closed:
            raise QueueError(f"cannot use {self._queue.path}: this queue object is closed")

    def expect_files_open(self) -> None:
        """Raise DatabaseReplaced if other code has closed a descriptor of the connection."""
        # guard: a closed descriptor of the database is not written
        if not self.files.are_open() and self._has_lost_files():
            raise DatabaseReplaced(
                f"cannot use {self._queue.path}: other code of this process has closed its files; restart"
            )

    def abandon(self) -> None:
        """Close the parent's connection in a forked child, or SQLite would take the parent's locks for the child's.

        Inside a transaction closing would roll back, in the shared memory as well: keep it open and refuse the queue.
        """
        if self.busy or self not in _held_for_fork or self.connection.in_transaction:
            _inherited_open.setdefault(self._queue.path, []).append(self.connection)
        elif (self._locks and self._locks.were_lost) or not self.files.are_open():
            _never_closed.add(self.connection)
        else:
            # guard: a child closes inherited connections
            self.connection.close()
        self.connection = cast(sqlite3.Connection, ClosedInFork())

    def __del__(self) -> None:
        with suppress(Exception):
            self._disconnect()


class ClosedInFork:
    """Replaces the parent's connection in a forked child."""

    in_transaction = False

    def close(self) -> None:
        """Do nothing: it is closed, or must stay open."""

    def __getattr__(self, name: str) -> Any:
        raise QueueError("cannot continue a transaction that was begun before the fork")


_never_closed: set[sqlite3.Connection] = set()  # whose descriptors other code has closed
_inherited_open: dict[Path, list[Any]] = {}  # the parent's connections that were in a transaction
_queues: weakref.WeakSet[PersistentQSQLite] = weakref.WeakSet()
_opening_lock = threading.RLock()  # held while files and connections are opened or closed, so that no thread forks then
_held_for_fork: list[SQLiteSession] = []  # sessions whose `in_use` is held during a fork


def _release_after_fork() -> None:
    while _held_for_fork:
        _held_for_fork.pop().in_use.release()
    _opening_lock.release()


class PersistentQSQLite(PersistentQInterface):
    """The queue in an SQLite file. Its locks are in the folder FILE.d next to it.

    durability: "full" also survives a power cut; "normal" survives any crash of a process.
    create: create the file if it does not exist; if false, raise QueueError.
    group: create it for all accounts of this group (modes 0660 and 0770); None: for this account only.
    busy_seconds: how long a write waits for another writer before it raises QueueBusy.

    Raises SchemaMismatch for a file that is not a queue of this version.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durability: Literal["full", "normal"] = "full",
        create: bool = True,
        group: str | None = None,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        super().__init__()
        if durability not in ("full", "normal"):
            raise ValueError(f"expected a durability of full or normal, got {short(durability)}")
        self.path = real_path(path)  # links to it use the same locks
        self.name = str(self.path)
        self.durability, self._busy_seconds = durability, valid_wait("busy_seconds", busy_seconds)
        self._sessions: weakref.WeakSet[SQLiteSession] = weakref.WeakSet()
        self._local = threading.local()
        self._folder = Path(f"{self.path}.d")
        self._writer_lock = WriterLock(None)
        self._consumer_locks: ConsumerLocks | None = None
        self._result_locks: ResultLocks | None = None
        self._database: tuple[int, int] | None = None  # device and inode of the open file
        self._closed = False
        with opening(self.path):
            self._open_file(create, None if group is None else group_number(group))
        try:
            self._open_folder()
            if has_locks() and not self.is_read_only:
                # guard: another database's log is refused
                self._expect_matching_log()
            with _opening_lock, self._sqlite_errors(), closing(self._connect()) as connection:
                self._prepare(connection)
                self._database = identity(self.path)
        except BaseException:
            # guard: a failed opening closes its files
            self.close()
            raise
        with _opening_lock:
            _queues.add(self)

    # Opening

    def _open_file(self, create: bool, group: int | None) -> None:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise QueueError(f"expected SQLite 3.37 or newer, got {sqlite3.sqlite_version}: use a newer Python")
        found = status(self.path)
        if found:
            self._expect_database_file(found)
        self._expect_regular_files()
        if found and not self._folder.exists():
            self._expect_own_file()
        if not create and not (found and found.st_size):
            raise no_queue(self.path)
        self.is_read_only = bool(found and hasattr(os, "statvfs") and os.statvfs(self.path).f_flag & os.ST_RDONLY)
        if self.is_read_only:
            self._expect_readable_log()
            return
        if found and not os.access(self.path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        make_folder(self.path.parent, group)
        if group is not None:
            self._expect_shared(self.path.parent, group, 0o2770)
        kind = file_system(self.path.parent)
        # guard: a network drive is refused
        if kind.startswith(SHARED_FILE_SYSTEMS):
            raise QueueError(f"cannot use {self.path}: SQLite's locks fail on {kind}; use a local disk")
        with _opening_lock, suppress(FileExistsError):
            create_file(self.path, group)
        if group is not None:
            self._expect_shared(self.path, group, 0o660)

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
        # guard: a file of one byte is refused
        if found.st_size == 1:  # which SQLite takes for an empty one
            raise self._error(sqlite3.DatabaseError("file is not a database"))
        # guard: a file with two hard links is refused
        if found.st_nlink > 1:  # the log and the locks are found by name
            raise QueueError(f"cannot use {self.path}: expected a file of one name, got {found.st_nlink} hard links")
        # guard: a file that is mounted without its folder is refused
        if is_mounted(self.path):
            raise QueueError(
                f"cannot use {self.path}: its log and locks are next to it, but it is mounted alone: mount its folder"
            )

    def _expect_own_file(self) -> None:
        """Refuse another program's file before a folder is created for it. What is in its log is not seen."""
        if file_size(Path(f"{self.path}-journal")):  # a power cut left it: SQLite first undoes what was half written
            return
        try:
            with closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
                if not is_dump(connection):
                    expect_ours(connection, self.path)
        except sqlite3.Error as error:
            if "not a database" in str(error):
                raise self._error(error) from error

    def _expect_regular_files(self) -> None:
        for path in (Path(f"{self.path}{suffix}") for suffix in ("-wal", "-shm", "-journal")):
            found = status(path, follow_symlinks=False)
            if found and not stat.S_ISREG(found.st_mode):
                raise QueueError(f"cannot use {path}: expected a file of SQLite, got a folder, a pipe or a link")

    def _expect_readable_log(self) -> None:
        if file_size(Path(f"{self.path}-wal")) and not os.path.exists(f"{self.path}-shm"):
            raise QueueError(
                f"cannot read {self.path}: its file system is read-only, and its log has no {self.path.name}-shm; "
                f"copy {self.path.name} and {self.path.name}-wal to a folder that can be written, and open the copy"
            )

    def _open_folder(self) -> None:
        """Open the locks unless this process has: a child may close all files after the fork, to become a daemon."""
        with _opening_lock, opening(self._folder):
            if not has_locks() or self.is_read_only or self._closed or self._consumer_locks:
                return
            make_folder(self._folder)
            self._writer_lock = WriterLock(self._folder, self._busy_seconds)
            self._consumer_locks = ConsumerLocks(self._folder)
            self._result_locks = ResultLocks(self._folder)

    def _expect_matching_log(self) -> None:
        """Refuse a database next to the log of another one, which SQLite would apply to it."""
        self._expect_log()
        with self._log_record() as (record, files):
            known = os.pread(record, 60, 0)
            # Or the inode numbers were reused.
            seems_replaced = known[20:40] == files[20:] and known[:20] != files[:20]
            if seems_replaced and file_size(Path(f"{self.path}-wal")) and not self._fits_log(int(known[40:])):
                raise SchemaMismatch(
                    f"cannot use {self.path}: it took the place of another database, to which the log "
                    f"{self.path}-wal belongs: stop all programs and move the log away; to replace "
                    f"a queue, use {command_line()} restore"
                )

    def _expect_log(self) -> None:
        with opening(self.path):
            # guard: a deleted log is not recreated
            if FileLocks.is_log_missing(self.path):
                raise DatabaseReplaced(
                    f"cannot use {self.path}: its log was deleted while other programs have it open: "
                    "wait until they have ended"
                )

    def _fits_log(self, known: int) -> bool:
        """Return whether the database is undamaged with this log; change neither.

        known: the schema version when the log was recorded. A backup by VACUUM INTO has a higher one than its original.
        """
        with self.path.open("rb") as file:
            file.seek(40)
            version = int.from_bytes(file.read(4), "big")
        is_whole = False
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"{self.path.as_uri()}?mode=ro", uri=True)) as connection:
            is_whole = connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",)
        return version <= known and is_whole

    def _record_log(self, connection: sqlite3.Connection) -> None:
        """Record which database the log belongs to; both are open."""
        with self._sqlite_errors():
            version = connection.execute("PRAGMA schema_version").fetchone()[0]
        with self._log_record() as (record, files):
            os.pwrite(record, files + b"%20d" % version, 0)

    @contextmanager
    def _log_record(self) -> Iterator[tuple[int, bytes]]:
        """Open the record, and yield it with the inode numbers of the database and its log, of 20 digits each."""
        found = [status(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal")]
        with opening(self._folder), closing_file(open_private(self._folder / "files")) as record:
            yield record, b"".join(b"%20d" % (each.st_ino if each else 0) for each in found)

    def _connect(self) -> sqlite3.Connection:
        # guard: a child forked inside a transaction is refused
        if self.path in _inherited_open:
            raise QueueError(f"cannot use {self.path}: this process was forked inside a transaction; fork before it")
        for session in [each for queue in list(_queues) if queue.path == self.path for each in list(queue._sessions)]:
            # guard: SQLite is not given a closed descriptor that it has kept
            session.expect_files_open()
        with ExitStack() as undo, self._sqlite_errors():
            connection = sqlite3.connect(
                f"{self.path.as_uri()}?{self._open_mode()}",
                uri=True,
                timeout=self._busy_seconds,
                isolation_level=None,
                check_same_thread=False,
            )
            undo.callback(connection.close)
            connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
            connection.execute("PRAGMA cache_size = -16000")  # KB; three times as fast with a million rows
            if sqlite3.sqlite_version_info >= (3, 41):  # older ones would reject json_valid in a CHECK
                connection.execute("PRAGMA trusted_schema = OFF")
            if not FileLocks.AVAILABLE and sys.version_info >= (3, 12):
                connection.setconfig(sqlite3.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE)  # do not write a deleted log back
            connection.execute("PRAGMA fullfsync = ON")  # as `sync_file`; has an effect on macOS only
            connection.execute("PRAGMA checkpoint_fullfsync = ON")
            undo.pop_all()
        return connection

    def _open_mode(self) -> str:
        if not self.is_read_only:
            return "mode=rw"
        return "mode=ro" if file_size(Path(f"{self.path}-wal")) else "mode=ro&immutable=1"

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Verify that the file is a queue, and migrate its schema."""
        if self.is_read_only:
            if (version := schema_version(connection, self.path)) != len(MIGRATIONS):
                raise SchemaMismatch(
                    f"cannot read {self.path}: expected schema {len(MIGRATIONS)}, got {version}: "
                    "open it once where it can be written"
                )
            return
        has_lock = self._writer_lock.acquire()
        try:
            adopt_dump(connection)
            version = schema_version(connection, self.path)
            if version == 0:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # like the next, has an effect on an empty file
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # for `compact`
                connection.execute("PRAGMA journal_mode = DELETE")  # a power cut may have left a log, but not the mode
            connection.execute("PRAGMA journal_mode = WAL")
            if version < len(MIGRATIONS):
                # guard: a migration is one transaction
                connection.execute("BEGIN IMMEDIATE")
                for number in range(schema_version(connection, self.path), len(MIGRATIONS)):
                    for statement in MIGRATIONS[number]:
                        connection.execute(statement.format_map(SQLITE_TYPES))
                    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
        finally:
            if has_lock:
                self._writer_lock.release()

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._error(error) from error

    def _error(self, error: sqlite3.Error) -> QueueError:
        text = "".join(mark if mark.isprintable() else "?" for mark in str(error))  # it may quote names from the file
        name = getattr(error, "sqlite_errorname", "")  # since Python 3.11
        if "locked" in text:
            held = f"another writer held it for {self._busy_seconds:g} s"
            if name == "SQLITE_BUSY_SNAPSHOT":
                held = "another writer has committed since the transaction read: roll back, and execute BEGIN IMMEDIATE"
            elif any(each is not self and each.path == self.path and each.in_transaction for each in list(_queues)):
                held += "; it is a transaction of another queue object in this thread: use that one, and TASK.on(queue)"
            return QueueBusy(f"cannot use {self.path}: {'; '.join([held, *self._writer_lock.problems()])}")
        if name == "SQLITE_IOERR_SHMSIZE" or "disk is full" in text:  # the index of the log cannot grow
            return QueueFull(f"cannot write to {self.path}: its disk is full")
        if "not a database" in text:
            return SchemaMismatch(f"cannot use {self.path}: expected an SQLite database, got another file")
        if "readonly" in text or "unable to open" in text:
            reason = "no permission, a read-only connection, no free descriptor, or it is gone"
            if not os.access(self.path.parent, os.W_OK):  # for the log
                reason = error_reason(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), self.path.parent)
            return QueueError(f"cannot write to {self.path}: {reason} ({text})")
        if "malformed" in text:
            return QueueError(
                f"cannot use {self.path}: it is damaged ({text}): stop all programs and run {command_line()} restore "
                "with a backup"
            )
        return QueueError(f"cannot use {self.path}: {text}")

    # Implementation of Backend

    def _session(self) -> SQLiteSession:
        session: SQLiteSession | None = getattr(self._local, "session", None)
        if session is not None and not session.busy and session.was_closed():
            session.close()
            session = None
        if session is None:
            with _opening_lock:
                self._open_folder()
                if self._closed:  # looked at under the lock: `close` closes the sessions that exist afterwards
                    raise QueueError(f"cannot use {self.path}: this queue object is closed")
                for other in list(self._sessions):  # they may have replaced files open
                    # guard: a new connection opens the same files as the others
                    other.files.expect_in_place()
                self._expect_same_file()  # before SQLite would apply the log of the old one, or create a log
                self._expect_log()
                session = SQLiteSession(self)
                self._expect_same_file()
                if has_locks() and not self.is_read_only:
                    self._record_log(session.connection)  # SQLite may have started another log
                session.thread = threading.get_ident()
                self._local.session = session
                self._sessions.add(session)
        # guard: a transaction that was interrupted and not ended is rolled back
        if session.busy and not session.blocks:
            session.recover()
        return session

    def _expect_same_file(self) -> None:
        # guard: a queue that was opened stays with its file
        if not (found := status(self.path)) or found[1:3] != self._database:
            raise replaced(self.path)

    def _transaction(self, *, durable: bool = True, in_batch: bool = False) -> SQLiteSession:
        if self.is_read_only:
            raise QueueError(f"cannot write to {self.path}: its file system is read-only")
        session = self._session()
        session.in_batch = in_batch
        # guard: enqueue and complete are synced
        session.wanted = "FULL" if durable and self.durability == "full" else "NORMAL"
        return session

    def _read(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        return self._session().read(sql, params)

    def _claim(self, session: Session, params: Params, prefetches: bool) -> list[Any]:
        if params["limit"] == 1:
            return super()._claim(session, params, prefetches)
        ids = [row[2] for row in self._first_jobs(session, params)]
        return self._lease(session, {**params, "counted": None}, ids, prefetches)

    def _first_jobs(self, session: Session, params: Params) -> list[Any]:
        heads, limit = session.run(FIRST_JOBS, params), params["limit"]
        share = min(limit, 2 * limit // max(1, len(heads)) + 1)
        tasks = (_jobs_of_task(session, head, share, limit) for head in heads)
        return list(islice(merge(session.run(NEXT_ASSIGNED, params), *tasks), limit))

    def _complete_all(self, session: Session, completions: list[tuple[Job, str | None]], now: float) -> list[Job]:
        are_many = len(completions) >= MANY_COMPLETIONS
        if are_many or any(job.id % ROLL_UP_JOBS == 0 for job, _ in completions):
            self._count_new(session)
        tokens = {job.lease_token for job, _ in completions}
        if len(completions) > 1 and len(tokens) == 1:  # of one claim
            results = {job.id: result for job, result in completions}
            params = {"results": to_json(results), "token": tokens.pop(), "now": now}
            with suppress(LeaseLost), session:
                # guard: complete_and_dequeue reports a lost lease in a batch
                if session.change(COMPLETE_MANY, params) < len(completions):
                    raise LeaseLost  # roll back, and find out which
                jobs = [job for job, _ in completions]
                if are_many:
                    count_attempts(session, jobs, "completed", now)
                    # guard: many completions are counted once
                    session.change(SET_COUNTED, {"id": None, "at": now})
                else:
                    # guard: a few completions are counted although later ones were
                    self._count_completed(session, jobs, now)
                return []
        return super()._complete_all(session, completions, now)

    def _store(self, sql: str, row: Params) -> list[JobId[Any]]:
        if sql is ENQUEUE:
            return super()._store(sql, row)
        with self._transaction() as session:  # count a batch while its size is known
            self._count_new(session)
            ids = super()._store(sql, row)
            count(session, row["queue"], row["task"], "enqueued", row["now"], len(ids))
            session.change(SET_COUNTED, {"id": ids[-1], "at": None})
            return ids

    def _count_completed(self, session: Session, jobs: Sequence[Job], now: float) -> None:
        # guard: a completion that is counted later is not counted now
        if now <= session.run(COUNTED_UNTIL)[0][0]:
            super()._count_completed(session, jobs, now)

    def _count_new(self, session: Session) -> None:
        last, newest, until, latest = session.run(COUNTED)[0]
        if last != newest or until < latest:  # the newest may be lower: it was deleted, and the next gets its id
            # guard: new jobs are counted
            session.change(COUNT_NEW_JOBS)
            # guard: completions are counted
            session.change(COUNT_NEW_COMPLETIONS)
            # guard: a job is counted once
            session.change(SET_COUNTED, {"id": newest, "at": latest})

    def _reset_ids(self, session: Session) -> None:
        """Do not count jobs that were copied: their counts are copied, too."""
        _, newest, _, latest = session.run(COUNTED)[0]
        session.change(SET_COUNTED, {"id": newest, "at": latest})

    def _count_pending(self, session: Session) -> None:
        is_limited = bool(session.run(LIMITED))
        for name, statement in COUNTERS.items():
            session.change(statement if is_limited else f"DROP TRIGGER IF EXISTS {name}")
        session.change(COUNT_PENDING)

    def _start_groups(self, session: Session) -> None:
        for statement in GROUPERS.values():
            session.change(statement)

    def _take_slot(self) -> ConsumerLock | None:
        self._open_folder()
        with opening(self._folder):
            return locks.acquire() if (locks := self._consumer_locks) else None

    def _is_alive(self, slot: int | None) -> bool:
        with opening(self._folder):
            # guard: a consumer whose locks were deleted stops
            if not all(me.slot.is_linked() for me in self._registry.values() if me.slot):
                raise QueueError(f"cannot continue: the locks in {self.path}.d were deleted while in use; restart")
            # guard: a consumer that holds its lock is alive
            return not (locks := self._consumer_locks) or slot is None or locks.is_held(slot)

    def _publish_begun(self, me: Registration) -> bool:
        if is_possible := bool(me.slot and boot_id()):
            with opening(self._folder):
                me.slot.publish(me.token)
        return is_possible

    def _note_begun(self, job: Job) -> None:
        me = self._registry.get(job.consumer or "")
        if me and me.slot and me.slot.begun:
            me.slot.begun.add(job)

    def _has_begun(self, session: Session, job: Job) -> bool:
        token = (job.lease_token or "")[:16]
        rows = session.run(SLOT_OF, {"token": token})
        if not rows or rows[0][0] is None or not (locks := self._consumer_locks):
            return True
        with opening(self._folder):
            return locks.has_begun(rows[0][0], token, job.id)

    def _sleep(self, me: Registration, seconds: float, due_in: Callable[[], float]) -> bool:
        if me.slot:
            return cast(bool, me.slot.sleep(seconds, due_in))
        time.sleep(max(0.0, min(seconds, due_in(), POLL_SECONDS)))
        return False

    def _open_watch(self) -> Watch:
        self._open_folder()
        with opening(self._folder):
            return locks.acquire() if (locks := self._result_locks) else Watch()

    def is_locked_by(self, pid: int) -> bool:
        return self._session().is_locked_by(pid)

    @property
    def has_lent_connection(self) -> bool:  # type: ignore[override]
        session = getattr(self._local, "session", None)
        return isinstance(session, SQLiteSession) and session.was_lent and not session.busy

    @property
    def in_transaction(self) -> bool:
        session = getattr(self._local, "session", None)
        return session is not None and session.busy and self._session().busy

    def renew_connection(self) -> None:
        session = self._session()
        del self._local.session
        try:
            self._session()
        except QueueError:
            # guard: a connection that cannot be renewed is kept
            self._local.session = session
            raise
        session.close()  # explicitly: an exception that is being handled may keep a reference to it

    @property
    def hides_rows(self) -> bool:  # type: ignore[override]
        session = self._session()
        own = session.connection
        changed = (own.row_factory, own.text_factory, own.isolation_level) != (None, str, None)
        return changed or bool(session.run("SELECT name FROM temp.sqlite_master"))

    @property
    def connection_settings(self) -> list[Any]:
        session = self._session()
        is_synced = session.run("PRAGMA synchronous") == [(1 if session._synchronous == "NORMAL" else 2,)]
        return [self.hides_rows, is_synced, session.run("PRAGMA query_only"), session.run("PRAGMA locking_mode")]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        session = self._transaction()
        session.was_lent = True
        with session.user_transaction():
            session.runs_user_code = True
            try:
                yield session.connection
            finally:
                session.connection.row_factory, session.connection.text_factory = None, str  # as the queue expects

    def _joined(self, connection: Any) -> JoinedSQLite:
        self._session().files.expect_in_place()
        joined = JoinedSQLite(driver_connection(connection), self._error, self._consumer_locks)
        joined.begin(self.path, self._database, self.durability)
        return joined

    def backup(self, path: str | os.PathLike[str]) -> None:
        target = file_path(path)
        try:
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            with part_of(target) as part:
                self._read("VACUUM INTO :part", {"part": str(part)})
                with closing(sqlite3.connect(f"{part.as_uri()}?mode=ro", uri=True)) as copy:
                    if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                        raise QueueError(f"cannot back up to {target}: the copy is damaged")
                sync(part)  # some versions of SQLite do not
                move_into_place(part, target, is_new=True)
        except OSError as error:
            raise QueueError(f"cannot back up to {target}: {error.strerror}") from error
        except sqlite3.Error as error:
            raise self._error(error) from error

    def compact(self, *, progress: Callable[[int], None] | None = None) -> int:
        if self.in_transaction:
            raise QueueError("cannot compact in a transaction")
        if self._read("PRAGMA auto_vacuum") == [(0,)]:
            raise QueueError(
                f"cannot compact {self.path}: it was made by another program; move the queue to a new file"
            )
        page_bytes, before = self._read("PRAGMA page_size")[0][0], file_size(self.path)
        while self._read("PRAGMA freelist_count") != [(0,)]:
            with self._transaction(durable=False, in_batch=True) as session:
                session.run(f"PRAGMA incremental_vacuum({COMPACTED_PAGES})")
            if progress:
                progress(self._read("PRAGMA freelist_count")[0][0] * page_bytes)
        self._read("PRAGMA wal_checkpoint")  # without waiting for others
        return max(0, before - file_size(self.path))

    def move_to_file(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Callable[[int], None] | None = None,
        by: str | None = None,
        now: float | None = None,
    ) -> dict[str, int] | None:
        """Do what `move_to` does, into a new SQLite file, including the application's own tables.

        progress is called with the number of pages copied so far. Raises QueueError if the file exists.
        """
        target = real_path(path)
        try:
            if file_size(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            is_new = not target.exists()
            make_folder(target.parent, group := group_of(self.path))
            with part_of(target, group) as part:
                with self._transaction() as source:  # blocks other writers while the other connection reads
                    # guard: nothing is moved while a job runs
                    if count_running(source):
                        return None
                    new = closing(sqlite3.connect(part, isolation_level=None))
                    with closing(self._connect()) as reader, new as copy:
                        copied = _copy_database(reader, copy, progress)
                        _finish_copy(copy, arrival(self._mark_moved(source, str(target), by, now)))
                    sync(part)
                move_into_place(part, target, is_new=is_new)
        except (OSError, sqlite3.Error) as error:
            raise QueueError(f"cannot move to {target}: {getattr(error, 'strerror', error)}") from error
        return copied

    def other_tables(self) -> list[str]:
        """Return the names of the application's tables and views, and of its indexes and triggers on the queue's."""
        shadows = {row[1] for row in self._read("PRAGMA table_list") if row[2] == "shadow"}  # of a virtual table
        ours = {name for _, name, _ in schema_of(COUNTERS, GROUPERS)}
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

        def pragma(name: str) -> Any:
            return self._read(f"PRAGMA {name}")[0][0]

        checked: dict[str, tuple[Any, Any]] = {"schema_version": (pragma("user_version"), len(MIGRATIONS))}
        if thorough and not self.is_read_only:
            with self._transaction() as session:
                checked["synchronous"] = SYNCHRONOUS[session.run("PRAGMA synchronous")[0][0]], self.durability
        if thorough:
            checked["quick_check"] = pragma("quick_check"), "ok"
        if not self.is_read_only:
            checked["journal_mode"] = pragma("journal_mode"), "wal"
        facts |= {name: found for name, (found, _) in checked.items()}
        facts |= {"file_system": file_system(self.path.parent), "durability": self.durability}
        facts |= {"file_bytes": file_size(self.path), "wal_bytes": file_size(Path(f"{self.path}-wal"))}
        page_bytes, free = pragma("page_size"), pragma("freelist_count")
        facts |= {"used_bytes": page_bytes * (pragma("page_count") - free), "free_bytes": page_bytes * free}
        facts["disk_free_bytes"] = shutil.disk_usage(self.path.parent).free
        facts["problems"] = [
            f"expected {name} {value}, got {found}" for name, (found, value) in checked.items() if found != value
        ]
        facts["problems"] += self._writer_lock.problems()
        facts["problems"] += [*self._schema_problems(), *deleted_but_open(self.path)] if thorough else []
        facts["problems"] += self._location_problems(facts)
        return facts

    def _location_problems(self, facts: dict[str, Any]) -> list[str]:
        """Return problems of the file system, the file's mode, the log and the disk."""
        found: list[str] = []
        if facts["file_system"] not in LOCAL_FILE_SYSTEMS:
            found.append(
                f"the file system {facts['file_system']} is not known to be local: several processes may damage the "
                "database on one that is shared; use a local disk"
            )
        if hasattr(os, "getuid") and (file := status(self.path)) and file.st_mode & 0o007:
            found.append(f"every account of this machine may use it: run chmod o= {shlex.quote(str(self.path))}")
        if self.is_read_only:
            found.append("its file system is read-only: no job can be enqueued, run or changed")
        if facts["wal_bytes"] > 2 * WAL_BYTES:
            found.append(
                f"the write-ahead log has grown to {facts['wal_bytes'] // 10**6} MB: some program holds a read open"
            )
        if facts["disk_free_bytes"] < LEAST_FREE_BYTES:
            found.append(
                f"the disk has only {facts['disk_free_bytes'] // 10**6} MB left: free some, before writes fail"
            )
        return found

    def _schema_problems(self) -> list[str]:
        with self._sqlite_errors():
            triggers = [each for each, is_used in ((COUNTERS, LIMITED), (GROUPERS, GROUPED)) if self._read(is_used)]
            missing = schema_of(*triggers) - set(self._read(DEFINITIONS))
        changed = [f"{kind} {name!r} is not as this version makes it" for kind, name, _ in sorted(missing)]
        changed += [
            f"queue {name!r} counts its pending jobs wrong: set its limit again" for (name,) in self._read(MISCOUNTED)
        ]
        changed += self._unlisted_tasks()
        return changed + [
            f"trigger {name!r} on {table} is not ours"
            for name, table in self._read(TRIGGERS)
            if name not in COUNTERS | GROUPERS
        ]

    def close(self) -> None:
        if self._closed:
            return
        if self.in_transaction:
            raise QueueError(f"cannot close {self.path} inside a transaction")
        try:
            if self._registry:
                self._unregister(list(self._registry.values()))
        except QueueBusy:  # the caller may try again
            raise
        except QueueError:
            self._close()
            raise
        self._close()

    def _close(self) -> None:
        self._waits.close()
        self._closed = True
        for me in self._registry.values():
            if me.slot:
                me.slot.close()
        self._registry = {}  # consumers that could not be unregistered would keep the lock files open
        with _opening_lock:
            for session in list(self._sessions):
                session.close()
            self._writer_lock.close()  # or by itself when its holder releases it
            self._consumer_locks = self._result_locks = None
            if not self._sessions:  # otherwise a thread is inside a call, for which a fork must wait
                _queues.discard(self)
        self._local = threading.local()  # frees the session now, not when garbage is collected

    @staticmethod
    def _before_fork() -> None:
        """Wait until no thread is inside SQLite: its mutexes would stay locked in the child. Give up after a while."""
        _opening_lock.acquire()
        until = time.monotonic() + BUSY_SECONDS
        found = [session for queue in list(_queues) for session in list(queue._sessions)]
        # guard: a fork waits for threads inside SQLite
        _held_for_fork.extend(each for each in found if each.in_use.acquire(timeout=max(0, until - time.monotonic())))

    @staticmethod
    def _after_fork_in_child() -> None:
        FileLocks.abandon()
        for queue in list(_queues):
            queue._after_fork()
        _release_after_fork()

    def _after_fork(self) -> None:
        """Reconnect in the child: SQLite's handles and the locks belong to the parent."""
        for session in list(self._sessions):
            session.abandon()
        for me in self._registry.values():
            # guard: a child has the lock of a shared consumer
            if not me.is_shared:
                me.slot.close()
        self._writer_lock.abandon()
        self._waits.abandon()
        PersistentQInterface.__init__(self)
        self._sessions, self._local = weakref.WeakSet(), threading.local()
        self._consumer_locks = self._result_locks = None

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before_fork, after_in_parent=_release_after_fork, after_in_child=_after_fork_in_child
        )


def _jobs_of_task(session: Session, head: Sequence[Any], share: int, limit: int) -> Iterator[tuple[Any, ...]]:
    """Yield up to `limit` jobs of a task in a queue, in order, given the first; read `share` of them, then the rest."""
    *first, queue, task = head
    yield tuple(first)
    known = 1
    # guard: a batch has all of the first jobs, although they are of few tasks
    for number in (share, limit):
        rows = session.run(NEXT_OF_TASK, {"queue": queue, "task": task, "limit": number})
        yield from rows[known:]
        if len(rows) < number:
            break
        known = number


def _copy_database(
    source: sqlite3.Connection, copy: sqlite3.Connection, progress: Callable[[int], None] | None
) -> dict[str, int]:
    """Copy all pages and compare all rows; return the number of rows of each table of the queue."""

    def copied(_: int, remaining: int, total: int) -> None:
        if progress:
            progress(total - remaining)

    source.backup(copy, pages=10_000, progress=copied)
    source.text_factory = copy.text_factory = bytes  # the application may store text that is not UTF-8
    tables = source.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0").fetchall()
    for name in [b"sqlite_master", *(name for (name,) in tables)]:
        sql = f"SELECT * FROM {quoted_name(name.decode())}"
        if any(one != other for one, other in zip_longest(source.execute(sql), copy.execute(sql))):
            raise QueueError(f"cannot copy: what was read back by {sql} is not what was written")
    if (damage := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != b"ok":
        raise QueueError(f"cannot copy: the copy is damaged: {damage.decode()}")
    return {table: copy.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in COPIED_ROWS}


def _finish_copy(copy: sqlite3.Connection, changes: list[tuple[str, Params]]) -> None:
    """Apply these changes and delete the consumers, with triggers disabled; leave no log."""
    copy.text_factory = str
    copy.execute("PRAGMA journal_mode = DELETE")
    copy.execute("BEGIN")
    triggers = copy.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        # guard: the application's triggers do not fire in a copy
        copy.execute(f"DROP TRIGGER {quoted_name(name)}")
    for change, params in [*changes, ("DELETE FROM consumers", {})]:
        copy.execute(change, params)
    for _, definition in triggers:
        copy.execute(definition)
    copy.execute("COMMIT")


def open_paths() -> set[Path]:
    return {queue.path for queue in list(_queues)}
