"""The queue on SQLite."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import sqlite3
import stat
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, cast

from pqueue import BUSY_SECONDS, POLL_SECONDS, PersistentQInterface
from pqueue_backend import Registration, Session
from pqueue_files import (
    LOCAL_FILE_SYSTEMS,
    SHARED_FILE_SYSTEMS,
    DatabaseFiles,
    FileLocks,
    create_file,
    deleted_but_open,
    explained,
    file_number,
    file_size,
    file_system,
    group_number,
    has_locks,
    is_on_read_only,
    make_folder,
    open_private,
    put_in_place,
    real_path,
    replaced,
    sync,
)
from pqueue_locks import Slot, Slots, Turnstile, boot
from pqueue_move import COPIED, arrival, count_running
from pqueue_schema import APPLICATION_ID, LIMITED, MIGRATIONS, NO_LEASE, PENDING_IN_QUEUE, SQLITE_TYPES, TABLES
from pqueue_values import (
    NO_PARAMS,
    DatabaseReplaced,
    Job,
    Params,
    QueueBusy,
    QueueError,
    QueueFull,
    SchemaMismatch,
    file_path,
    ids_up_to,
    to_json,
)

WAL_BYTES = 67_108_864  # the write-ahead log is cut to this when its readers allow
LEAST_FREE_BYTES = 268_435_456  # below this `check` warns of the disk

SYNCHRONOUS = ("off", "normal", "full", "extra")
MINIMUM_SQLITE = (3, 37)  # STRICT tables
OUR_TABLES = f"SELECT sql LIKE '%STRICT' FROM sqlite_master WHERE type = 'table' AND name IN {TABLES}"
OUR_SCHEMA = f"SELECT type, name, sql FROM sqlite_master WHERE tbl_name IN {TABLES} AND sql IS NOT NULL"
MISCOUNTED = """
SELECT name FROM queues q WHERE max_pending IS NOT NULL AND pending <>
    (SELECT count(*) FROM jobs WHERE queue = q.name AND state = 'pending' AND assigned_to IS NULL)"""

# Statements that only SQLite has

# Finish jobs with their results. :completions is a JSON array of [id, lease token, result].
# guard: a batch completes under its tokens only
COMPLETE_MANY = f"""
UPDATE jobs SET state = 'completed', finished_at = :now, result = json_extract(value, '$[2]'), error = NULL, {NO_LEASE}
FROM json_each(:completions) WHERE jobs.id = json_extract(value, '$[0]') AND lease_token = json_extract(value, '$[1]')
RETURNING jobs.id"""

# Return the slot of a consumer.
SLOT_OF = "SELECT slot FROM consumers WHERE token = :token"

# Count the pending jobs of a queue.
COUNT_PENDING = f"UPDATE queues SET pending = (SELECT count(*) FROM jobs WHERE {PENDING_IN_QUEUE}) WHERE name = :queue"

# Triggers that keep queues.pending. They exist only while some queue has a limit, so that no other queue pays for them.
IS_PENDING = "{row}.state = 'pending' AND {row}.assigned_to IS NULL"
ADD_PENDING = "UPDATE queues SET pending = pending {change} 1 WHERE name = {row}.queue AND max_pending IS NOT NULL"
# guard: a claim makes room
# guard: what is pending again takes room
# guard: what is deleted makes room
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

TRIGGERS = f"SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger' AND tbl_name IN {TABLES} ORDER BY name"


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

    @property
    def has_ended(self) -> bool:
        try:
            return not self.connection.in_transaction
        except sqlite3.ProgrammingError:  # another thread has closed the queue
            return True

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
        """Begin a transaction; alone: a single statement will be one by itself."""
        # guard: a signal handler cannot use the queue it interrupted
        if self.busy:
            raise QueueError("cannot use the queue in a signal handler that interrupted it: set a flag there")
        self.in_use.acquire()
        self.busy, self.is_users = True, False
        try:
            self._expect_open()
            self._has_turn = self._queue._enter(self.in_batch)
            # guard: a database that was pulled away is not written
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
        # guard: a transaction that lost its lock is undone
        self._expect_lock()
        self.run("COMMIT")

    def _wake(self) -> None:
        self._queue._ring()

    def _expect_lock(self) -> None:
        """Refuse to commit what another process may have written over meanwhile."""
        if self._locks and (self.is_users or not self._has_turn) and not self._locks.are_writing():
            raise QueueError(
                f"cannot commit to {self._queue.path}: its lock was lost, as code in this process closed one of its "
                "files during the transaction; use backup() to copy it"
            )

    def _cleanup(self) -> None:
        try:
            if not self.has_ended:
                self._roll_back()
        finally:
            if not self.has_ended:  # a signal handler came between, and it would stop all others
                # guard: an interrupted call is rolled back
                self._roll_back()
            self.busy = False
            self._let_go()
            if self._has_turn:
                self._has_turn = False
                # guard: a failed call gives its turn back
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
                # guard: a log that was deleted is not written back
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
            # guard: a child closes what it inherited
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
    # guard: nobody forks while a thread is inside SQLite
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
    """The queue in an SQLite file. Its locks are in the folder FILE.d next to it.

    durability: "full" syncs what must survive a power cut; "normal" survives any crash of a process.
    create: create the file if it does not exist; else raise QueueError.
    group: create it for all accounts of this group (modes 0660 and 0770); None: for this account alone.
    busy_seconds: how long a write waits for another writer before it raises QueueBusy.

    Raises SchemaMismatch for a file that is not a queue of this version.
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
        self.path = real_path(path)  # a link to it must find the same locks
        self.name = str(self.path)
        self.durability, self._busy_seconds = durability, busy_seconds
        self._sessions: weakref.WeakSet[SQLiteSession] = weakref.WeakSet()
        self._local = threading.local()
        self._turnstile: Turnstile | None = None
        self._slots: Slots | None = None
        self.is_read_only = False  # its file system is
        self._database: tuple[int, int] | None = None  # device and number of the file that is open
        self._closed = False
        self._open_file(create, None if group is None else group_number(group))
        try:
            self._open_folder()
            keeps_note = has_locks() and not self.is_read_only
            if keeps_note:
                # guard: another database's log is refused
                self._expect_own_log()
            with _opening, closing(self._connect()) as connection:
                self._prepare(connection)
                if keeps_note:
                    self._note_own_log(connection)
        except BaseException:
            # guard: a failed opening closes what it opened
            self.close()
            raise
        _queues.add(self)

    # Opening

    def _open_file(self, create: bool, group: int | None) -> None:
        if sqlite3.sqlite_version_info < MINIMUM_SQLITE:
            raise QueueError(f"expected SQLite 3.37 or newer, got {sqlite3.sqlite_version}: use a newer Python")
        try:
            found = self.path.stat() if self.path.exists() else None
            if found:
                self._expect_database_file(found)
            self._expect_files_beside()
            if not create and not (found and found.st_size):
                raise QueueError(f"no queue at {self.path}: a producer or a consumer creates it")
            self.is_read_only = bool(found and is_on_read_only(self.path))
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
            with _opening, suppress(FileExistsError):
                create_file(self.path, group)
            if group is not None:
                self._expect_shared(self.path, group, 0o660)
        except OSError as error:
            raise QueueError(f"cannot open {self.path}: {explained(error, self.path)}") from error

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
        # guard: a file of two names is refused
        if found.st_nlink > 1:  # SQLite's log and our locks go by the name
            raise QueueError(f"cannot use {self.path}: expected a file of one name, got {found.st_nlink} hard links")

    def _expect_files_beside(self) -> None:
        for beside in (Path(f"{self.path}{suffix}") for suffix in ("-wal", "-shm", "-journal")):
            if os.path.lexists(beside) and not stat.S_ISREG(beside.lstat().st_mode):
                raise QueueError(f"cannot use {beside}: expected a file of SQLite, got a folder, a pipe or a link")

    def _expect_readable_log(self) -> None:
        if file_size(Path(f"{self.path}-wal")) and not os.path.exists(f"{self.path}-shm"):
            raise QueueError(
                f"cannot read {self.path}: its file system is read-only, and its log has no {self.path.name}-shm; "
                f"copy {self.path.name} and {self.path.name}-wal to a folder that can be written, and open the copy"
            )

    def _open_folder(self) -> None:
        if not has_locks() or self.is_read_only:
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
        # guard: a log that was deleted is not begun anew
        if FileLocks.lack_log(self.path):
            raise DatabaseReplaced(
                f"cannot use {self.path}: its log was deleted while other programs have it open: "
                "wait until they have ended"
            )
        with self._note() as note:
            database, log = (file_number(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal"))
            known, version = os.pread(note, len(database + log), 0), os.pread(note, 20, 40)
            seems_replaced = known.endswith(log) and known != database + log  # or the system gave the numbers anew
            if seems_replaced and file_size(Path(f"{self.path}-wal")) and not self._fits_log(int(version or 0)):
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
            numbers = [file_number(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal")]
            os.pwrite(note, b"".join([*numbers, b"%20d" % version]), 0)

    @contextmanager
    def _note(self) -> Iterator[int]:
        with self._told_of_folder():
            note = open_private(Path(f"{self.path}.d/files"))
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
            raise QueueError(f"cannot open {folder}: {explained(error, folder)}") from error

    def _connect(self) -> sqlite3.Connection:
        # guard: a child forked inside a transaction is refused
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
                if sqlite3.sqlite_version_info >= (3, 41):  # older ones would not let our CHECK call json_valid
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
        return "mode=ro" if file_size(Path(f"{self.path}-wal")) else "mode=ro&immutable=1"

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
                # guard: a migration is one transaction
                connection.execute("BEGIN IMMEDIATE")
                for number in range(self._version(connection), len(MIGRATIONS)):
                    for statement in MIGRATIONS[number]:
                        connection.execute(statement.format_map(SQLITE_TYPES))
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
        return schema_version(connection, self.path)

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
                    # guard: a new connection needs the files of the others
                    other.files.expect_in_place()
                session = SQLiteSession(self)
                self._database = self._database or session.files.database
                if self._database != session.files.database:
                    raise replaced(self.path) from None
                if has_locks() and not self.is_read_only:
                    self._note_own_log(session.connection)  # SQLite may have begun another since this was opened
                self._local.session = session
                self._sessions.add(session)
            return session

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

    def _complete_all(self, session: Session, completions: list[tuple[Job, str | None]], now: float) -> list[Job]:
        ids = {job.id for job, _ in completions}
        if len(completions) < 2 or len(ids) < len(completions):
            return super()._complete_all(session, completions, now)
        rows = [(job.id, job.lease_token, result) for job, result in completions]
        done = {row[0] for row in session.run(COMPLETE_MANY, {"completions": to_json(rows), "now": now})}
        return [job for job, _ in completions if job.id not in done]

    def _lock_out_writers(self, session: Session) -> None:
        """Do nothing more: whoever writes to SQLite is alone."""

    def _lock_jobs(self, session: Session, job_ids: list[int]) -> None:
        """Do nothing more, likewise."""

    def _reset_ids(self, session: Session) -> None:
        """Do nothing: SQLite counts on from the highest id."""

    def _count_pending(self, session: Session, queues: Iterable[str]) -> None:
        is_limited = bool(session.run(LIMITED))
        for name, statement in COUNTERS.items():
            has_trigger = bool(session.run("SELECT 1 FROM sqlite_master WHERE name = :name", {"name": name}))
            if is_limited and not has_trigger:
                session.change(statement)
            if has_trigger and not is_limited:
                session.change(f"DROP TRIGGER {name}")
        for queue in queues:
            session.change(COUNT_PENDING, {"queue": queue})

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
            # guard: a consumer whose locks were deleted is told
            if not all(me.slot.is_there() for me in self._registry.values() if me.slot):
                raise QueueError(f"cannot go on: the locks in {self.path}.d were deleted while in use; start again")
            # guard: who holds its lock is alive
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

    def _has_begun(self, session: Session, job: Job) -> bool:
        token = (job.lease_token or "")[:16]
        rows = session.run(SLOT_OF, {"token": token})
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
        session = self._transaction()
        with session.user_transaction():
            session.is_users = True
            try:
                yield session.connection
            finally:
                session.connection.row_factory, session.connection.text_factory = None, str  # as the queue reads

    def backup(self, path: str | os.PathLike[str]) -> None:
        target = file_path(path)
        # guard: a backup takes its name last
        part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
        try:
            create_file(part)
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self._read("VACUUM INTO :part", {"part": str(part)})
            with closing(sqlite3.connect(f"{part.as_uri()}?mode=ro", uri=True)) as copy:
                if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    raise QueueError(f"cannot back up to {target}: the copy is damaged")
            sync(part)  # whatever this SQLite syncs
            create_file(target)  # takes the name, or fails where there is one
            part.replace(target)
            # guard: a backup's name is synced
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
        target = real_path(path)
        part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
        try:
            if target.exists() and target.stat().st_size:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            make_folder(target.parent)
            create_file(part)
            with self._transaction() as source:  # nobody else writes: what another connection reads is what is here
                # guard: nothing is moved while a job runs
                if count_running(source):
                    return None
                with closing(self._connect()) as reader, closing(sqlite3.connect(part, isolation_level=None)) as copy:
                    copied = _copy_database(reader, copy, tell)
                    _begin_anew(copy, arrival(self._mark_moved(source, str(target), by, now)))
                sync(part)
            put_in_place(part, target, is_new=not target.exists())
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
            with self._transaction() as session:
                facts["synchronous"] = SYNCHRONOUS[session.run("PRAGMA synchronous")[0][0]]
        for pragma in [name for name in expected if name not in facts]:
            facts[pragma] = self._read(f"PRAGMA {pragma}")[0][0]
        facts["file_system"] = file_system(self.path.parent)
        facts["durability"] = self.durability
        facts |= {"file_bytes": file_size(self.path), "wal_bytes": file_size(Path(f"{self.path}-wal"))}
        facts["disk_free_bytes"] = shutil.disk_usage(self.path.parent).free
        facts["problems"] = [
            f"expected {name} {value}, got {facts[name]}" for name, value in expected.items() if facts[name] != value
        ]
        facts["problems"] += self._turn_problems()
        facts["problems"] += [*self._schema_problems(), *deleted_but_open(self.path)] if thorough else []
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
                self._unregister(list(self._registry.values()))
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


def _schema(*, has_limit: bool) -> set[tuple[str, str, str]]:
    """Return what SQLite says of a new queue's schema: types, names and statements."""
    with closing(sqlite3.connect(":memory:")) as model:
        for statement in chain(*MIGRATIONS, COUNTERS.values() if has_limit else ()):
            model.execute(statement.format_map(SQLITE_TYPES))
        return set(model.execute(OUR_SCHEMA))


def _adopt_dump(connection: sqlite3.Connection) -> None:
    """Mark a queue that was restored from the output of .dump, which leaves out the marks."""
    marks = connection.execute("SELECT * FROM pragma_application_id, pragma_user_version").fetchone()
    if marks == (0, 0) and _schema(has_limit=False) <= set(connection.execute(OUR_SCHEMA)):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return how many migrations a database has had, 0 for an empty one. Raises SchemaMismatch."""
    owner, version, tables = connection.execute(
        "SELECT *, (SELECT count(*) FROM sqlite_master) FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    # guard: another program's file is refused
    if owner != APPLICATION_ID and (owner or version or tables):
        raise SchemaMismatch(f"cannot use {path}: expected a queue, got another program's database")
    # guard: a newer schema is refused
    if version > len(MIGRATIONS):
        raise SchemaMismatch(
            f"cannot use {path}: expected schema {len(MIGRATIONS)} or older, got {version}: "
            "use the pqueue that wrote it, or a newer one"
        )
    ours = connection.execute(OUR_TABLES).fetchall()
    # guard: a file without our tables is refused
    if version and len(ours) < len(TABLES):
        raise SchemaMismatch(f"cannot use {path}: expected the tables of a queue, got {len(ours)} of them")
    # guard: a file from before 0.1 is refused
    if version and (0,) in ours:
        raise SchemaMismatch(
            f"cannot use {path}: it was created by a version before 0.1: finish its jobs with that version, "
            "then move the file away"
        )
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
        # guard: the application's triggers do not fire in a copy
        copy.execute(f"DROP TRIGGER {_quoted(name)}")
    for change, params in [*changes, ("DELETE FROM consumers", {})]:
        copy.execute(change, params)
    for _, definition in triggers:
        copy.execute(definition)
    copy.execute("COMMIT")


def open_paths() -> set[Path]:
    return {queue.path for queue in list(_queues) if not queue._closed}
