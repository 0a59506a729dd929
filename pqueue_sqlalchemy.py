"""The queue on PostgreSQL, for several machines: the same operations, states and guarantees.

    queue = open_queue("postgresql://user:password@host/database")

The statements are those of pqueue_schema, or of pqueue_postgres where they differ. Claims skip rows that others have
locked. The clock is the server's. Each process has one connection that listens for NOTIFY and holds an advisory lock
for each of its consumers, which shows that they are alive. All transactions are read committed, including those of
`transaction`. Requires psycopg 3 and SQLAlchemy 2, which pools connections and is what `transaction` yields.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import secrets
import select
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psycopg
import sqlalchemy
from psycopg.pq import Format, TransactionStatus
from psycopg.types.numeric import Int8Dumper
from sqlalchemy import exc
from sqlalchemy.pool import StaticPool

import pqueue
import pqueue_backend
import pqueue_schema
import pqueue_values
from pqueue import Job, NotStored, PersistentQInterface, PersistentQSQLite, QueueBusy, QueueError, QueueFull
from pqueue_backend import Session
from pqueue_postgres import (
    ALONE,
    CHANNEL,
    CLAIM_ALONE,
    COMPLETE_AND_CLAIM,
    COPYING,
    COUNTING,
    GRACE_SECONDS,
    IS_COUNTED,
    IS_FULL,
    LOCK_AS_WRITER,
    LOCK_CLASS,
    LOCK_UNFINISHED,
    LOCKED_SLOTS,
    MARK_RUNNING,
    MERGE_CHANGES,
    MISCOUNTED,
    RECOUNT,
    SCHEMA,
    START_COUNTING,
    STOP_COUNTING,
    TIME_LIMITS,
    UPTIME,
    WRITERS,
    definitions,
    translated,
)
from pqueue_sqlite import ClosedInFork, SQLiteSession
from pqueue_values import Params

log = logging.getLogger("pqueue")

CLOCK_SECONDS = 30.0  # how often the server's clock is read
ENQUEUE_TRIES = 100  # while other transactions use and free the key
RETRY_SECONDS = 0.5  # between the listener's attempts to connect
PAUSE_SECONDS = 0.05  # before reconnecting after a connection that was lost at once
RESTART_SECONDS = 10.0  # after a server restart, while consumers reconnect, none is considered dead
KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
# How long the server keeps the connection of an unreachable host: its consumers still have their leases.
LISTENER_KEEPALIVES = {"keepalives_idle": 60, "keepalives_interval": 15, "keepalives_count": 4}
LISTENER_TIMEOUT_MS = 120_000
LISTEN = f"LISTEN {CHANNEL}"
# Our statements always use indexes and a generic plan: planning a claim takes longer than executing it, and the planner
# assumes that LIMIT :limit returns a tenth of the table.
PLANNER = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "enable_sort", "jit")
# Settings that our statements rely on. Limits set for the server, the database or the role (statement_timeout and the
# like, default_transaction_read_only) are kept; `check` reports those that interfere.
NEEDED = {
    "search_path": f"{SCHEMA},public",
    "default_transaction_isolation": "read committed",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "row_security": "on",
    "exit_on_error": "off",
    "plan_cache_mode": "force_generic_plan",
    **dict.fromkeys(("enable_indexscan", "enable_indexonlyscan", "enable_nestloop"), "on"),
    **dict.fromkeys(PLANNER, "off"),
}
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # a pooler's session may have another default
# Any value other than off waits for the server's disk; they differ in how they treat standbys.
SYNCED = """set_config('synchronous_commit', replace(current_setting('synchronous_commit'), 'off', 'on'), {})"""
NO_IDLE_TIMEOUT = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout'"


def _setting(values: dict[str, Any], *, for_good: bool) -> str:
    """Return a statement that sets these for the session (for_good) or for the transaction."""
    return "SELECT " + ", ".join(f"set_config('{name}', '{value}', {not for_good})" for name, value in values.items())


DEFAULT_PLANNER = _setting({"plan_cache_mode": "auto", **dict.fromkeys(PLANNER, "on")}, for_good=False)


class NoRoom(QueueFull):
    """The queue is at its limit."""


class KeyTaken(QueueBusy):
    """A concurrent transaction has used the key for an unfinished job."""


class PostgresSession(Session):
    """One thread's pooled connection. BEGIN is sent with the first statement, NOTIFY with the COMMIT."""

    def __init__(self, queue: OnPostgres) -> None:
        self._queue = queue
        self._begun = False
        self.durable = True
        self.connection = queue._engine.connect()
        self._driver = cast("psycopg.Connection[Any]", self.connection.connection.driver_connection)
        self._poll = select.poll()
        self._poll.register(self._driver.fileno(), select.POLLIN)
        self._cursor = psycopg.RawCursor(self._driver)
        self._cursor.format = Format.BINARY

    @property
    def busy(self) -> bool:
        return self.depth > 0

    def run(self, sql: str, params: Params = pqueue_values.NO_PARAMS) -> list[Any]:
        return self._execute(sql, params).fetchall()

    def insert(self, sql: str, params: Params) -> list[int]:
        rows: list[Any] = []
        if self.depth:
            rows = self.run(sql, params)
            self.wakes = self.wakes or bool(rows)
        else:
            with suppress(NoRoom):  # concurrent producers filled the queue
                rows = self.alone(ALONE[sql], params)
        return sorted(row[0] for row in rows)

    def alone(self, sql: str, params: Params) -> list[Any]:
        """Execute a statement as its own transaction."""
        with self:
            if self._queue.pooled:
                return self.run(sql, params)
            text, names = translated(sql)
            with self._queue._db_errors():
                return self._cursor.execute(text, [params[name] for name in names]).fetchall()

    def change(self, sql: str, params: Params = pqueue_values.NO_PARAMS) -> int:
        return self._execute(sql, params).rowcount

    def change_many(self, sql: str, rows: list[Params]) -> None:
        self._send_begin()
        with self._queue._db_errors():
            text, names = translated(sql)
            self._cursor.executemany(text, [[row[name] for name in names] for row in rows])

    def _send_begin(self) -> None:
        if not self._begun:
            self._begun = True
            with self._queue._db_errors():
                self._driver.execute(BEGIN)
                if self._queue.pooled:
                    self._driver.execute(self._queue.settings_of_transaction)

    def _execute(self, sql: str, params: Params) -> psycopg.Cursor[Any]:
        text, names = translated(sql)
        values = [params[name] for name in names]
        with self._queue._db_errors():
            if self._begun or not self.busy:
                return self._cursor.execute(text, values)
            with self._driver.pipeline():
                self._send_begin()
                return self._cursor.execute(text, values)

    @property
    def has_ended(self) -> bool:
        return self._begun and self._driver.pgconn.transaction_status == TransactionStatus.IDLE

    def _begin(self) -> None:
        self._begun = False  # until the first statement

    def _commit(self) -> None:
        if not self._begun:
            return
        self._expect_to_go_on()
        if self._driver.pgconn.transaction_status == TransactionStatus.INERROR:
            raise QueueError("cannot commit: a statement of the transaction failed")
        with self._queue._db_errors(), self._driver.pipeline():
            if not self.durable:
                self._driver.execute("SET LOCAL synchronous_commit = off")
            if self.wakes:
                self._driver.execute(f"NOTIFY {CHANNEL}")
            self._driver.execute("COMMIT")

    def _wake(self) -> None:
        """Do nothing: the commit sent the NOTIFY."""

    def _cleanup(self) -> None:
        self._begun = False
        if self._driver.pgconn.transaction_status != TransactionStatus.IDLE:
            with suppress(psycopg.Error):
                self._driver.rollback()

    def is_usable(self) -> bool:
        """Return whether the connection is idle and the server has sent nothing, such as a shutdown notice."""
        return self._driver.pgconn.transaction_status == TransactionStatus.IDLE and not self._poll.poll(0)

    def reset_sqlalchemy(self) -> None:
        """End SQLAlchemy's view of the transaction, which was ended without it."""
        with suppress(exc.SQLAlchemyError):
            self.connection.rollback()

    def close(self) -> None:
        with suppress(exc.SQLAlchemyError):
            self.connection.invalidate()
            self.connection.close()

    def disown(self) -> None:
        """In a forked child: neither use nor close the parent's connection."""
        _inherited.append((self.connection, self._driver))
        self._driver = cast("psycopg.Connection[Any]", ClosedInFork())


class ListenConnection:
    """A process's connection that listens for NOTIFY, and holds the locks of the consumers of this process."""

    def __init__(self, queue: OnPostgres) -> None:
        self._queue = queue
        self._changed = threading.Condition()
        self._connecting = threading.Lock()  # held while the connection or the numbers change
        self._wakeups = 0
        self._numbers: set[int] = set()  # of the locks to hold
        self._connection: psycopg.Connection[Any] | None = None
        self._stopped = False
        self._stop_reader, self._stop_writer = os.pipe()  # wakes the listener when it must stop
        self._lost_at = self._made_at = -math.inf  # monotonic seconds
        self._is_new = False  # the connection is new: the consumers must be marked as running
        self.gets_notify = True  # False: connected through a pooler, which keeps neither NOTIFY nor locks
        self._thread = threading.Thread()

    def start(self) -> None:
        self.gets_notify = not self._queue.pooled and self._receives_notify()
        if self.gets_notify:
            self.keep_listening()
        else:
            log.warning(
                "%s passes on no NOTIFY: consumers poll every %g s, and crashes are noticed only when leases expire",
                self._queue.name,
                pqueue.WAIT_SECONDS,
            )

    def keep_listening(self) -> None:
        """Start the listener, or restart it if it died: the consumers depend on it."""
        if self.gets_notify and not self._stopped and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._listen, name="pqueue-listener", daemon=True)
            self._thread.start()

    def _receives_notify(self) -> bool:
        heard: list[psycopg.Notify] = []
        self._connection = self._connect()
        self._connection.add_notify_handler(heard.append)
        with self._queue._transaction(durable=False) as session:
            session.change(f"NOTIFY {CHANNEL}")
        self._connection.execute("SELECT 1")  # the server sends pending notifications before its answer
        self._connection.remove_notify_handler(heard.append)
        return bool(heard)

    def acquire(self, number: int) -> None:
        """Acquire a lock, now and after each reconnection."""
        with self._connecting:
            self._numbers.add(number)
            self._run_if_connected("SELECT pg_advisory_lock_shared(%s::int, %s::int)", number)
        self._wake_waiters()

    def release(self, number: int) -> None:
        with self._connecting:
            self._numbers.discard(number)
            self._run_if_connected("SELECT pg_advisory_unlock_shared(%s::int, %s::int)", number)
        self._wake_waiters()  # for notifications received meanwhile

    def _run_if_connected(self, sql: str, number: int) -> None:
        """Execute the statement unless the connection is lost: the listener will reconnect."""
        if self._connection is not None:
            with suppress(psycopg.Error):
                self._connection.execute(sql, (LOCK_CLASS, number))

    def wait(self, seconds: float, due_in: Callable[[], float]) -> bool:
        with self._changed:
            before = self._wakeups
        until = min(seconds, due_in())
        with self._changed:
            return self._changed.wait_for(lambda: self._wakeups != before, max(0.0, until))

    def stop_listening(self) -> None:
        """Stop the listener, which would otherwise reconnect and mark the consumers as running."""
        self._stopped = True
        os.write(self._stop_writer, b"!")
        if self._thread.is_alive():
            self._thread.join(2 * self._queue._busy_seconds + 2)  # it may be connecting

    def close(self) -> None:
        self.stop_listening()
        if self._connection is not None:
            self._connection.close()
        for file in (self._stop_reader, self._stop_writer):
            os.close(file)

    def _connect(self) -> psycopg.Connection[Any]:
        with ExitStack() as undo:
            connection = self._queue._connect_raw()
            undo.callback(connection.close)
            connection.execute(_setting(_timeout_settings(LISTENER_TIMEOUT_MS, LISTENER_KEEPALIVES), for_good=True))
            connection.execute(NO_IDLE_TIMEOUT)
            for number in list(self._numbers):
                connection.execute("SELECT pg_advisory_lock_shared(%s::int, %s::int)", (LOCK_CLASS, number))
            connection.execute(LISTEN)
            undo.pop_all()
        return connection

    def was_lost_recently(self) -> bool:
        """Return whether the connection was lost a moment ago; other consumers may not have reconnected yet."""
        return time.monotonic() - self._lost_at < RESTART_SECONDS

    def _listen(self) -> None:
        while not self._stopped:
            try:
                self._receive(self._connection or self._reconnect())
            except Exception as error:
                self._drop(error)

    def _reconnect(self) -> psycopg.Connection[Any]:
        with self._connecting:
            self._connection = self._connect()
            self._is_new, self._made_at = True, time.monotonic()
        return self._connection

    def _drop(self, error: Exception) -> None:
        """Drop a failed connection; wait before the next one if this one never worked."""
        with self._connecting:
            lost, self._connection = self._connection, None
        self._lost_at = time.monotonic()
        if not isinstance(error, (psycopg.Error, QueueError, OSError)):
            log.error("%s: the listener failed and reconnects: %r", self._queue.name, error)
        if lost is None:
            time.sleep(RETRY_SECONDS)
            return
        with suppress(Exception):
            lost.close()
        if self._lost_at - self._made_at < RETRY_SECONDS:
            time.sleep(PAUSE_SECONDS)

    def _receive(self, connection: psycopg.Connection[Any]) -> None:
        if self._is_new:
            with suppress(QueueError):  # tries again in a second
                self._queue._mark_running()
                self._is_new = False
        said = select.poll()
        for file in (connection.fileno(), self._stop_reader):
            said.register(file, select.POLLIN)
        if said.poll(1000) and not self._stopped and any(True for _ in connection.notifies(timeout=0)):
            self._wake_waiters()

    def _wake_waiters(self) -> None:
        with self._changed:
            self._wakeups += 1
            self._changed.notify_all()


class ConsumerLock:
    """The advisory lock that shows that a consumer is alive."""

    def __init__(self, listener: ListenConnection, number: int) -> None:
        self.number = number
        self._listener = listener

    def close(self) -> None:
        self._listener.release(self.number)


class ReservedNumber:
    """The number of an advisory lock that a child will hold: the parent has no thread to hold one through outages."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Do nothing: this process does not hold the lock."""


_queues: weakref.WeakSet[OnPostgres] = weakref.WeakSet()
_inherited: list[Any] = []  # connections of the parent process


def _after_fork() -> None:
    for queue in list(_queues):
        queue._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class PersistentQSQLAlchemy(PersistentQInterface):
    """The queue at postgresql://…, or at sqlite:///PATH: in the same file as `PersistentQSQLite`, at the same time.

    Either way `transaction` yields a `sqlalchemy.Connection`.
    """

    def __new__(cls, url: str, **_: Any) -> PersistentQSQLAlchemy:
        if cls is not PersistentQSQLAlchemy:
            return super().__new__(cls)
        return super().__new__(OnSQLite if url.startswith("sqlite") else OnPostgres)

    if TYPE_CHECKING:  # the signature of the two subclasses

        def __init__(
            self, url: str, *, durability: str = "full", create: bool = True, busy_seconds: float = pqueue.BUSY_SECONDS
        ) -> None: ...


class OnSQLite(PersistentQSQLAlchemy, PersistentQSQLite):
    """`PersistentQSQLite` whose transactions SQLAlchemy can join."""

    def __init__(self, url: str, **options: Any) -> None:
        PersistentQSQLite.__init__(self, pqueue.sqlite_path(url), **options)
        self._wrapped = weakref.WeakKeyDictionary[SQLiteSession, sqlalchemy.Connection]()

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:  # type: ignore[override]
        session = self._transaction()
        if session not in self._wrapped:
            self._wrapped[session] = _wrap(session.connection)
        try:
            with session.user_transaction():
                session.runs_user_code = True
                yield self._wrapped[session]
        finally:
            if not session.busy:
                self._wrapped[session].rollback()  # ends SQLAlchemy's view of the transaction


def _wrap(connection: sqlite3.Connection) -> sqlalchemy.Connection:
    """Return an SQLAlchemy connection that leaves BEGIN, COMMIT and closing to the owner of `connection`."""
    return sqlalchemy.create_engine(
        "sqlite://", creator=lambda: connection, poolclass=StaticPool, isolation_level="AUTOCOMMIT"
    ).connect()


class OnPostgres(PersistentQSQLAlchemy):
    """The queue in a PostgreSQL database, in a schema of its own.

    durability: "full" waits until the server has synced; "normal" may lose the last changes if the server crashes.
    create: create the schema if it does not exist; else raise QueueError.
    busy_seconds: how long to wait for a lock or a connection.
    """

    max_batch = 128  # an enqueue does not wait for the rows that a claim locks
    _LIKE = 'COLLATE "C" ILIKE'
    _BYTES = "octet_length(convert_to({}, 'UTF8'))"

    def __init__(
        self, url: str, *, durability: str = "full", create: bool = True, busy_seconds: float = pqueue.BUSY_SECONDS
    ) -> None:
        PersistentQInterface.__init__(self)
        if durability not in ("full", "normal"):
            raise ValueError(f"expected a durability of full or normal, got {durability!r}")
        self.durability, self._busy_seconds = durability, busy_seconds
        self._milliseconds = int(busy_seconds * 1000)
        settings = {**NEEDED, "lock_timeout": self._milliseconds}
        synced = SYNCED if durability == "full" else "set_config('synchronous_commit', 'off', {})"
        connection_settings = settings | _timeout_settings(self._milliseconds, KEEPALIVES)
        self.settings_of_session = f"{_setting(connection_settings, for_good=True)}, {synced.format(False)}"
        self.settings_of_transaction = f"{_setting(settings, for_good=False)}, {synced.format(True)}"
        self._conninfo = _conninfo(url)
        self.name = f"{self._conninfo.get('host', 'localhost')}/{self._conninfo.get('dbname', '')}"
        self._sessions: weakref.WeakSet[PostgresSession] = weakref.WeakSet()
        self._local = threading.local()
        self._engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=self._connect_raw,
            isolation_level="AUTOCOMMIT",  # BEGIN and COMMIT are the session's
            pool_size=5,
            max_overflow=50,
        )
        self._listener: ListenConnection | None = None
        self._listener_lock = threading.Lock()
        self._clock = (-CLOCK_SECONDS, 0.0)  # when it was read (monotonic), and its offset, in seconds
        self._reset_liveness()
        self._closed = False
        self.pooled = False  # connected through a pooler, which does not keep our settings between transactions
        try:
            self._prepare(create)
        except BaseException:
            self.close()
            raise
        _queues.add(self)

    def _reset_liveness(self) -> None:
        self._liveness_at, self._living = -math.inf, cast("set[int] | None", None)  # monotonic seconds; slots
        self._missing: dict[int, float] = {}  # slots without a lock, since when, monotonic seconds

    # Opening

    def _connect_raw(self) -> psycopg.Connection[Any]:
        arguments = {"application_name": "pqueue", "connect_timeout": max(1, int(self._busy_seconds)), **KEEPALIVES}
        arguments["tcp_user_timeout"] = self._milliseconds  # detects a broken network link
        connection = psycopg.connect(autocommit=True, **{**arguments, **self._conninfo, "client_encoding": "UTF8"})
        connection.adapters.register_dumper(int, Int8Dumper)  # one type for all values, so one prepared statement
        self.pooled = connection.execute("SELECT pg_backend_pid()").fetchone() != (connection.info.backend_pid,)
        connection.prepare_threshold = None if self.pooled else 3
        if not self.pooled:
            connection.execute(self.settings_of_session)
        return connection

    def _prepare(self, create: bool) -> None:
        """Check the version of the schema, and migrate it."""
        version = self._version()
        if version is None and not create:
            raise QueueError(f"no queue at {self.name}: a producer or a consumer creates it")
        if version is not None and version > len(pqueue_schema.MIGRATIONS):
            raise pqueue.SchemaMismatch(
                f"cannot use {self.name}: expected schema {len(pqueue_schema.MIGRATIONS)} or older, got {version}: "
                "use the pqueue that wrote it, or a newer one"
            )
        if version != len(pqueue_schema.MIGRATIONS):
            self._migrate()

    def _version(self) -> int | None:
        found = self._read("SELECT to_regclass(:name)::text", {"name": f"{SCHEMA}.version"})
        if found[0][0] is None:
            return None
        return cast(int, self._read(f"SELECT number FROM {SCHEMA}.version")[0][0])

    def _migrate(self) -> None:
        with self._transaction() as session:
            session.run(f"SELECT pg_advisory_xact_lock({LOCK_CLASS})")
            session.change(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            session.change(f"CREATE TABLE IF NOT EXISTS {SCHEMA}.version (number INTEGER NOT NULL)")
            done = session.run(f"SELECT number FROM {SCHEMA}.version")
            for migration in islice(pqueue_schema.MIGRATIONS, done[0][0] if done else 0, None):
                for statement in definitions(migration):
                    session.change(statement)
            for statement in () if done else COUNTING:
                session.change(statement)
            session.change(f"DELETE FROM {SCHEMA}.version")
            session.change(f"INSERT INTO {SCHEMA}.version VALUES (:number)", {"number": len(pqueue_schema.MIGRATIONS)})

    @contextmanager
    def _db_errors(self) -> Iterator[None]:
        try:
            yield
        except (exc.SQLAlchemyError, psycopg.Error) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> QueueError:  # noqa: PLR0911
        original: Any = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None) or ""
        lines = str(original).strip().split("\n")
        text = lines[0] if lines else type(original).__name__
        if state == "23505" and original.diag.constraint_name == "jobs_key":
            return KeyTaken(f"cannot write to {self.name}: another writer took the key at the same moment")
        if state == IS_FULL:
            return NoRoom(f"cannot enqueue: {text}")
        if state in ("40P01", "40001", "55P03"):
            return QueueBusy(f"cannot write to {self.name}: another writer held it ({text})")
        if state == "53100":
            return QueueFull(f"cannot write to {self.name}: its disk is full")
        if state in ("25006",):
            return QueueError(
                f"cannot write to {self.name}: it is a read-only standby, or its default_transaction_read_only is on"
            )
        if state.startswith("28") or "authentication failed" in text or "no password" in text:
            return QueueError(f"cannot open {self.name}: user or password refused")
        if state in ("3D000", "42501") or re.search('(database|role) ".*" does not exist', text):
            return QueueError(f"cannot open {self.name}: {text}")
        if isinstance(error, (exc.OperationalError, exc.InterfaceError, psycopg.OperationalError)) or state[:2] == "57":
            return QueueBusy(f"cannot reach {self.name}: {text}")
        return QueueError(f"cannot use {self.name}: {text}")

    # Methods of Backend

    def _session(self) -> PostgresSession:
        """Return this thread's session, reconnected if necessary unless it is in a transaction."""
        if self._closed:
            raise QueueError(f"cannot use {self.name}: this queue object is closed")
        session: PostgresSession | None = getattr(self._local, "session", None)
        while session is None or not (session.busy or session.is_usable()):
            if session is not None:
                session.close()
            with self._db_errors():
                session = self._local.session = PostgresSession(self)
            self._sessions.add(session)
        return session

    def _transaction(self, *, durable: bool = True, in_batch: bool = False) -> PostgresSession:  # noqa: ARG002
        session = self._session()
        if not session.busy:
            session.durable = durable
        return session

    def _read(self, sql: str, params: Params = pqueue_values.NO_PARAMS) -> list[Any]:
        session = self._session()
        if session.busy or not self.pooled:
            return session.run(sql, params)
        with session:  # its transaction has our settings
            return session.run(sql, params)

    def _time(self, now: float | None) -> float:
        if now is not None:
            return super()._time(now)
        asked, ahead = self._clock
        began = time.monotonic()
        if began - asked > CLOCK_SECONDS:
            server = float(self._read("SELECT EXTRACT(EPOCH FROM clock_timestamp())")[0][0])
            ended = time.monotonic()
            ahead = server - (began + ended) / 2
            self._clock = (ended, ahead)  # one assignment: other threads read it
        return time.monotonic() + ahead

    def _store(self, sql: str, row: Params) -> list[int]:
        """Store jobs; try again while concurrent transactions use and free the key."""
        for _ in range(ENQUEUE_TRIES):
            with suppress(NotStored):
                ids = super()._store(sql, row)
                if not (self.in_transaction and row["key"]) or self._read(LOCK_UNFINISHED, {"id": ids[0]}):
                    return ids
        raise NotStored

    def resubmit(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """See the base class. On a conflict with a concurrent enqueue, the second call sees which job has the key."""
        try:
            super().resubmit(job_id, by=by, now=now)
        except KeyTaken:
            super().resubmit(job_id, by=by, now=now)

    def limit(self, queue: str, max_pending: int | None) -> None:
        """See the base class. Locks out writers, to count the pending jobs."""
        with self._transaction() as session:
            self._lock_out_writers(session)
            super().limit(queue, max_pending)

    def _count_pending(self, session: Session, queues: Iterable[str]) -> None:  # noqa: ARG002 - counts all queues
        """Recount all queues while writers are locked out; keep the triggers only while a queue has a limit."""
        for statement in RECOUNT:
            session.change(statement)
        is_limited, is_counted = session.run(pqueue_schema.LIMITED), session.run(IS_COUNTED)
        if is_counted and not is_limited:
            session.run(STOP_COUNTING)
        for statement in START_COUNTING if is_limited and not is_counted else ():
            session.change(statement)

    def pause(self, queue: str) -> None:
        """See the base class. Waits for claims that began before."""
        super().pause(queue)
        until = time.monotonic() + self._busy_seconds * (not self.in_transaction)
        under_way = set(self._read(WRITERS))
        while (under_way := under_way.intersection(self._read(WRITERS))) and time.monotonic() < until:
            time.sleep(0.01)

    def _complete_and_claim(
        self,
        completions: list[tuple[Job, str | None]],
        me: pqueue_backend.Registration,
        limit: int,
        queues: Sequence[str] | None,
        lease_seconds: float,
        now: float | None,
    ) -> tuple[list[Job], list[Job]]:
        """Do it in one round trip unless it is time to check for dead consumers, or there are jobs to reclaim."""
        completions = sorted(completions, key=lambda done: done[0].id)  # rows are always locked in this order
        tokens = {job.id: job.lease_token for job, _ in completions}
        looks = time.monotonic() - self._dead_checked_at >= pqueue.DEAD_CHECK_SECONDS
        if looks and not self.in_transaction:
            self._open_listener()  # restarts its thread if it died
            with self._transaction(durable=False) as session:
                session.run(MERGE_CHANGES)
        if limit == 0 or looks or self.in_transaction or len(tokens) < len(completions):
            return super()._complete_and_claim(completions, me, limit, queues, lease_seconds, now)
        now = self._time(now)
        claim = pqueue.claim_params(me, limit, queues, lease_seconds, now)
        sql = COMPLETE_AND_CLAIM if completions else CLAIM_ALONE
        done = {"number": len(tokens), "ids": list(tokens), "tokens": list(tokens.values())}
        session = self._transaction()
        rows = session.alone(sql, {**claim, **done, "results": [result for _, result in completions]})
        jobs = pqueue.claimed_jobs(session, [row[1:] for row in rows if row[1] is not None], claim)
        lost = [job for job, _ in completions if rows[0][0] is not None and job.id not in rows[0][0]]
        with suppress(QueueBusy) if completions else nullcontext():  # an error must not hide what was completed
            jobs = jobs or super()._complete_and_claim([], me, limit, queues, lease_seconds, now)[0]
        return jobs, lost

    def _reclaim(self, session: Session, dead: list[str] | None, now: float) -> None:
        session.change(LOCK_AS_WRITER)
        super()._reclaim(session, dead, now)

    def _release_held(self, session: Session, me: pqueue_backend.Registration, now: float | None) -> None:
        session.change(LOCK_AS_WRITER)
        super()._release_held(session, me, now)

    def _open_listener(self) -> ListenConnection:
        with self._listener_lock:
            if self._listener is None:
                listener = ListenConnection(self)
                try:
                    with self._db_errors():
                        listener.start()
                except BaseException:
                    listener.close()
                    raise
                self._listener = listener
            self._listener.keep_listening()
            return self._listener

    def _take_slot(self, reserved: int | None = None) -> ConsumerLock | None:
        listener = self._open_listener()
        if not listener.gets_notify:
            return None
        number = secrets.randbelow(2**31 - 1) if reserved is None else reserved
        listener.acquire(number)
        return ConsumerLock(listener, number)

    def _share_slot(self) -> ReservedNumber:
        return ReservedNumber(secrets.randbelow(2**31 - 1))

    def _adopt_slot(self, slot: ReservedNumber) -> ConsumerLock | None:
        return self._take_slot(slot.number)

    def _is_alive(self, slot: int | None) -> bool:
        """Return False if the lock has been missing for `GRACE_SECONDS`: the consumer may only be reconnecting."""
        if slot is None:
            return True
        if time.monotonic() - self._liveness_at > pqueue.DEAD_CHECK_SECONDS / 2:
            self._read_liveness()
        if self._living is None or slot in self._living:
            return True
        return self._liveness_at - self._missing.setdefault(slot, self._liveness_at) < GRACE_SECONDS

    def _read_liveness(self) -> None:
        """Read which consumers hold their locks (None: unknown), and since when others are missing."""
        started = float(self._read(UPTIME, {})[0][0])
        living = {int(row[0]) for row in self._read(LOCKED_SLOTS)}
        recently = started < RESTART_SECONDS or (self._listener and self._listener.was_lost_recently())
        self._missing = {} if recently else {slot: at for slot, at in self._missing.items() if slot not in living}
        self._liveness_at, self._living = time.monotonic(), None if recently else living

    def _mark_running(self) -> None:
        """Mark our consumers as running: others may have considered them dead while the connection was lost."""
        for me in list(self._registry.values()):
            params = {"token": me.token, "now": self._time(None)}
            with self._transaction(durable=False) as session:
                session.change(MARK_RUNNING, params)

    def _sleep(self, me: pqueue_backend.Registration, seconds: float, due_in: Callable[[], float]) -> bool:  # noqa: ARG002
        def due_at_first() -> float:  # still due after a dequeue: another transaction has locked the job
            left = due_in()
            self._local.was_due = left <= 0 and not getattr(self._local, "was_due", False)
            return left if left > 0 or self._local.was_due else pqueue.POLL_SECONDS

        return self._open_listener().wait(seconds, due_at_first)

    @property
    def in_transaction(self) -> bool:
        session: PostgresSession | None = getattr(self._local, "session", None)
        return session is not None and session.busy

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        session = self._transaction()
        try:
            with session.user_transaction():
                session.run(DEFAULT_PLANNER)  # for the user's statements
                yield session.connection
        finally:
            if not session.busy:
                session.reset_sqlalchemy()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a consistent copy as a queue on SQLite: `open_queue(path)` opens it."""
        target = pqueue_values.file_path(path)
        try:
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.")
            with folder as name, closing(PersistentQSQLite(Path(name) / "copy.db")) as copy:
                self.copy_to(copy)
                copy.backup(target)
        except OSError as error:
            raise QueueError(f"cannot back up to {target}: {error.strerror}") from error

    def other_tables(self) -> list[str]:
        """Return the names of the tables and views in the queue's schema that are not ours."""
        sql = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = :schema ORDER BY 1"
        ours = (*pqueue_schema.TABLES, "version", "pending_changes", "pending_counts")
        return [row[0] for row in self._read(sql, {"schema": SCHEMA}) if row[0] not in ours]

    def _lock_out_writers(self, session: Session) -> None:
        session.run(_setting({COPYING: "on"}, for_good=False))
        session.change("LOCK TABLE jobs IN EXCLUSIVE MODE")  # excludes every writer; one lock cannot deadlock

    def _lock_jobs(self, session: Session, job_ids: list[int]) -> None:
        sql = "SELECT id FROM jobs WHERE id = ANY (CAST(:ids AS bigint[])) ORDER BY id FOR UPDATE"
        session.run(sql, {"ids": job_ids})

    def _reset_ids(self, session: Session) -> None:
        for table in ("jobs", "history"):
            highest = f"(SELECT coalesce(max(id), 0) + 1 FROM {table})"
            session.run(f"SELECT setval(pg_get_serial_sequence('{SCHEMA}.{table}', 'id'), {highest}, false)")

    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        expected: dict[str, Any] = {"fsync": "on", "full_page_writes": "on", "transaction_read_only": "off"}
        expected |= {"server_encoding": "UTF8", "transaction_isolation": "read committed"}
        if self.durability == "full":
            expected["synchronous_commit"] = "on"
        facts: dict[str, Any] = {"path": self.name, "durability": self.durability, "user_version": self._version()}
        for setting in ("server_version", "synchronous_commit", *expected):
            facts[setting] = self._read(f"SHOW {setting}")[0][0]
        if thorough:
            facts["file_bytes"] = self._read("SELECT pg_database_size(current_database())")[0][0]
        expected["user_version"] = len(pqueue_schema.MIGRATIONS)
        if facts["synchronous_commit"] != "off":  # on this server's disk; the values differ only for standbys
            expected.pop("synchronous_commit", None)
        facts["problems"] = [
            f"expected {name} {value}, got {facts[name]}" for name, value in expected.items() if facts[name] != value
        ]
        facts["problems"] += self._limits_in_the_way()
        for name, counted, found in self._read(MISCOUNTED) if thorough else ():
            facts["problems"].append(
                f"expected {found} pending jobs of queue {name!r}, counted {counted}: set its limit again"
            )
        return facts

    def _limits_in_the_way(self) -> list[str]:
        """Return problems with the time limits that the server, the database or the role sets."""
        most = self._milliseconds
        return [
            f"expected {name} 0 or above {most} ms, got {value} ms"
            for name, value in self._read(TIME_LIMITS)
            if 0 < int(value) <= most
        ]

    def close(self) -> None:
        if self._listener is not None:
            self._listener.stop_listening()
        if self._registry and not self._closed:
            self._unregister_all()
        if self._listener is not None:
            self._listener.close()
        for session in list(self._sessions):
            session.close()
        self._engine.dispose()
        self._local = threading.local()
        self._listener = None
        self._closed = True

    def _unregister_all(self) -> None:
        """Unregister all consumers; try again if a connection was lost or a transaction of ours held a job."""
        if self.in_transaction:
            self._local.session.close()
            self._local = threading.local()
        for _ in range(2):
            with suppress(QueueError):
                self._unregister(list(self._registry.values()))
                return
            for session in list(self._sessions):
                session.close()

    def _after_fork(self) -> None:
        """Reconnect in the child: the sockets belong to the parent."""
        for session in list(self._sessions):
            session.disown()
        self._engine.dispose(close=False)
        PersistentQInterface.__init__(self)
        _inherited.append(self._listener)
        self._sessions, self._local = weakref.WeakSet(), threading.local()
        self._listener, self._listener_lock = None, threading.Lock()
        self._reset_liveness()


def _timeout_settings(milliseconds: int, keepalives: dict[str, int]) -> dict[str, object]:
    """Return the server's settings for how long it keeps the connection of an unreachable client."""
    return {"tcp_user_timeout": milliseconds, **{f"tcp_{name}": value for name, value in keepalives.items()}}


def _conninfo(url: str) -> dict[str, Any]:
    """Return libpq's connection parameters from a URL, which may name several hosts."""
    scheme, _, rest = url.partition("://")
    with suppress(psycopg.Error):
        parts = psycopg.conninfo.conninfo_to_dict(f"postgresql://{rest}")
        ports = str(parts.get("port") or "5432").split(",")
        # A / or ? in a password must be percent-encoded, or libpq ends the password there.
        cut = "@" in f"{parts.get('host')} {parts.get('dbname')}"
        known = scheme in ("postgresql", "postgresql+psycopg", "postgres")
        if known and not cut and all(port.isdigit() for port in ports):
            return dict(parts)
    raise ValueError("expected postgresql://USER@HOST:PORT/DATABASE, got another text (not shown: a password?)")
