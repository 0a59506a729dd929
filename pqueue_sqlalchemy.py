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
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import psycopg
import sqlalchemy.dialects.postgresql.psycopg  # which SQLAlchemy 1 does not have
from psycopg import RawCursor  # which psycopg 3.1 does not have
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8Dumper
from sqlalchemy import exc
from sqlalchemy.pool import NullPool, StaticPool

import pqueue
import pqueue_backend
import pqueue_listener
import pqueue_postgres
import pqueue_schema
import pqueue_values
from pqueue import Job, NotStored, PersistentQInterface, PersistentQSQLite, QueueBusy, QueueError, QueueFull
from pqueue_backend import Joined, Session
from pqueue_connections import KEEPALIVES, RESTORE, UNLOCK_ALL, Link, Pool, Settings, connection_error, parse_url
from pqueue_files import temporary_folder
from pqueue_join import driver_connection
from pqueue_listener import NOTIFY, WAITING, ConsumerLock, ListenConnection, ResultWatch, is_notify_queue_full
from pqueue_postgres import GRACE_SECONDS, LOCKED_SLOTS, PG_NOTIFY, PG_NOTIFY_JOBS, SCHEMA, TABLES, Part, translated
from pqueue_sqlite import SQLiteSession
from pqueue_values import JobId, Params

log = logging.getLogger("pqueue")
# The driver raises the error of a lost connection, and then logs that it cannot end its pipeline.
logging.getLogger("psycopg").addFilter(lambda record: not record.getMessage().startswith("error ignored terminating"))

# Parameters of libpq, whatever the URL or a service says: a connection for replication executes no statements of ours.
ALWAYS = {"client_encoding": "UTF8", "replication": ""}
CLOCK_SECONDS = 30.0  # how often the server's clock is read
# When that was (monotonic), and how far the server's clock and that of the host were ahead, in seconds
UNREAD = (-math.inf, 0.0, 0.0)
BRIEFLY = 0.1  # seconds to wait for what is not needed
LOCK_BRIEFLY = f"SET LOCAL lock_timeout = '{BRIEFLY}s'"
ENQUEUE_TRIES = 100  # while other transactions use and free the key
SAFE = ["fsync", "full_page_writes"]  # settings of the server that must be on, or "full" holds for no job
UNSAFE = f"SELECT name || ' is off' FROM unnest(ARRAY{SAFE}) name WHERE current_setting(name) = 'off'"
# Return what no two databases have in common, as numbers: texts would depend on the settings.
SAME_DATABASE = f"""
SELECT (SELECT oid FROM pg_database WHERE datname = current_database())::bigint,
    CAST(EXTRACT(EPOCH FROM pg_postmaster_start_time()) * 1000000 AS bigint),
    to_regclass('{SCHEMA}.jobs')::oid::bigint"""
# Return the size of the queue's tables in bytes, and whether this role owns them.
SIZE = f"""
SELECT sum(pg_total_relation_size(oid))::bigint, bool_and(pg_has_role(relowner, 'USAGE')) FROM pg_class
WHERE relkind = 'r' AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('{SCHEMA}.jobs'))"""
# What an operation may need of each kind of object.
RIGHTS = {
    "table": ["SELECT", "INSERT", "UPDATE", "DELETE"],
    "sequence": ["UPDATE"],
    "schema": ["USAGE", "CREATE"],
    "database": ["CREATE"],
    "function": ["EXECUTE"],
}
TRANSACTION_SETTINGS = """
SELECT current_setting('transaction_read_only'), current_setting('synchronous_commit')"""
BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED"  # a pooler's session may have another default
BEGIN_SNAPSHOT = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
# A commit fails if the server's NOTIFY queue has no room.
IF_ROOM = "WHERE pg_notification_queue_usage() < 0.9"
SLOW_COMMIT_SECONDS = 0.002  # much longer than a round trip
# How SQLSTATE begins: limits of the settings or the server, a state of a table, an error of the disk
LASTING_STATES = ("534", "54", "55", "58")
MISSING = ("42P01", "42703", "42883")  # a table, a column or a function does not exist
# A prepared statement is invalid: its table was altered, or the application deallocated it.
PLAN_LOST = (psycopg.errors.FeatureNotSupported, psycopg.errors.InvalidSqlStatementName)


class NoRoom(QueueFull):
    """The queue is at its limit."""


class Conflict(QueueBusy):
    """Another transaction was in the way, or has altered a table; the same transaction will succeed if repeated."""


class PostgresSession(Session):
    """One thread's transactions. Each takes a connection from the pool, and returns it at its end.

    BEGIN is sent with the first statement, NOTIFY after the COMMIT.
    """

    durable = True
    for_application = False  # the transaction is the application's
    seconds: float | None = None  # how long to wait for a connection; None: as long as for a lock
    _begin_with: str
    _link: Link | None = None  # from the first statement of a transaction to its end

    def __init__(self, queue: OnPostgres) -> None:
        self._queue = queue

    @property
    def connection(self) -> sqlalchemy.Connection:
        return cast("sqlalchemy.Connection", cast(Link, self._link).connection)

    def run(self, sql: str, params: Params = pqueue_values.NO_PARAMS) -> list[Any]:
        return cast("list[Any]", self._execute(sql, params, RawCursor.fetchall))

    def change(self, sql: str, params: Params = pqueue_values.NO_PARAMS) -> int:
        return cast(int, self._execute(sql, params, attrgetter("rowcount")))

    def insert(self, sql: str, params: Params) -> list[int]:
        rows: list[Any] = []
        if self.depth:
            rows = self.run(sql, params)
            self.wakes = self.wakes or bool(rows)
        else:
            with suppress(NoRoom):  # concurrent producers filled the queue
                rows = self._insert_and_notify(pqueue_postgres.ALONE[sql], params)
        return sorted(row[0] for row in rows)

    def _insert_and_notify(self, sql: str, params: Params) -> list[Any]:
        """Execute an INSERT as its own transaction, and wake consumers.

        Commits with a NOTIFY wait for each other, while the disk syncs, too. If that takes long, the NOTIFY is sent
        afterwards, for which the time of another round trip is small.
        """
        began, is_quick = time.monotonic(), self._queue.commit_seconds < SLOW_COMMIT_SECONDS
        with_commit = is_quick and not self._queue.cannot_wake
        try:
            rows = self.alone(pqueue_postgres.WAKING[sql] if with_commit else sql, params)
        except QueueError as error:
            if not is_notify_queue_full(error):
                raise
            rows, with_commit = self.alone(sql, params), False
        self._queue.has_enqueued = True
        self._queue.commit_seconds += (time.monotonic() - began - self._queue.commit_seconds) / 8
        if rows and not with_commit:
            self._wake()
        return rows

    def alone(self, sql: str, params: Params) -> list[Any]:
        """Execute a statement as its own transaction, unless one has begun."""
        if self.depth or not self._queue.pooled:
            return self.run(sql, params)
        with self:  # which has our settings
            return self.run(sql, params)

    def change_many(self, sql: str, rows: list[Params]) -> None:
        """Do it in one round trip, in a transaction that has begun."""
        with self._queue._db_errors(self):
            link = cast(Link, self._link)
            text, names = translated(sql, self._queue.schema)
            with link.ours() if self.for_application else nullcontext():
                link.cursor.executemany(text, [[row[name] for name in names] for row in rows])

    def _execute(self, sql: str, params: Params, read: Callable[[Any], Any]) -> Any:
        """Execute a statement and return what `read` reads from the cursor."""
        text, names = translated(sql, self._queue.schema)
        values = [params[name] for name in names]
        with self._queue._db_errors(self):
            if self._link is None:
                run = self._execute_first if self.depth else self._execute_alone
                return run(text, values, read)
            with self._link.ours() if self.for_application else nullcontext():
                self._link.cursor.execute(text, values)
            return read(self._link.cursor)

    def _execute_alone(self, text: bytes, values: list[Any], read: Callable[[Any], Any]) -> Any:
        self.busy = True
        try:
            link = self._queue._pool.take()
            try:
                return read(link.cursor.execute(text, values))
            except PLAN_LOST:
                link.forget_plans()
                return read(link.cursor.execute(text, values))
            finally:
                self._queue._pool.give_back(link)
        finally:
            self.busy = False

    def _execute_first(self, text: bytes, values: list[Any], read: Callable[[Any], Any]) -> Any:
        """Begin a transaction with this statement, in one round trip."""
        link = self._take()
        try:
            with link.driver.pipeline():
                self._send_begin(link)
                link.cursor.execute(text, values)
        except PLAN_LOST:
            link.forget_plans()
            self._send_begin(link)
            link.cursor.execute(text, values)
        return read(link.cursor)

    def _take(self) -> Link:
        self._link = self._queue._pool.take(for_application=self.for_application, seconds=self.seconds)
        return self._link

    def _send_begin(self, link: Link) -> None:
        settings = self._queue._settings
        link.driver.execute(self._begin_with)
        if self._queue.pooled:
            if self.for_application:
                link.note_path()
            link.driver.execute(settings.of_transaction)

    def as_application(self) -> None:
        """Begin a transaction whose statements have the settings of the role."""
        with self._queue._db_errors():
            link, settings = self._take(), self._queue._settings.for_application
            link.connection = _again(link.connection) or self._queue._wrap(link.driver)
            if self._queue.pooled:
                self._send_begin(link)
                link.send(settings)
            else:
                link.send(BEGIN, settings)

    @property
    def has_ended(self) -> bool:
        return self._link is not None and (self._link.status == TransactionStatus.IDLE or self.was_closed)

    @property
    def was_closed(self) -> bool:
        """Whether this program has closed the connection."""
        return self._link is not None and self._link.driver.closed and not self._link.driver.broken

    def _begin(self) -> None:
        self._begin_with = BEGIN  # the first statement sends it

    def begin_snapshot(self) -> None:
        """Read what is committed now, and no later changes, until the transaction ends. Takes no locks."""
        if self._link is not None:
            raise QueueError("cannot copy in a transaction that has begun")
        self._begin_with = BEGIN_SNAPSHOT

    def _commit(self) -> None:
        if self._link is None:
            return
        self._expect_to_go_on()
        link = self._link
        if link.status == TransactionStatus.INERROR:
            raise QueueError("cannot commit: a statement of the transaction failed")
        settings = self._queue._settings
        commands = [*RESTORE, settings.synced if self._queue.pooled else settings.of_session]
        if not self.for_application:
            commands = [] if self.durable else ["SET LOCAL synchronous_commit = off"]
        with self._queue._db_errors():
            link.send(*commands, "COMMIT")
        self._give_back()

    def _wake(self) -> None:
        """Wake consumers, if possible: they look once a second anyway."""
        try:
            self.change(NOTIFY)
            self._queue.cannot_wake = False
        except QueueError as error:
            name, reason = self._queue.name, str(error).partition(": ")[2]
            level = logging.DEBUG if self._queue.cannot_wake else logging.WARNING
            log.log(level, "%s: cannot wake consumers, which look once a second: %s", name, reason)
            self._queue.cannot_wake = True
            with suppress(QueueError):  # removes what no listener needs, which NOTIFY does only while it has room
                self.run("SELECT pg_notification_queue_usage()")

    def _wake_waiters(self) -> None:
        """Wake those who wait for results, if any: they look once a second anyway."""
        if self._queue.is_awaited:
            most = pqueue_postgres.MOST_IDS
            starts = range(0, len(self.finished), most)
            ids = [",".join(map(str, self.finished[start : start + most])) for start in starts]
            with suppress(QueueError):
                self.run(f"SELECT {PG_NOTIFY_JOBS} {IF_ROOM}", {"ids": ids})

    def _cleanup(self) -> None:
        if self._link is None:
            return
        if self.has_ended:  # by the application, whose settings may be in effect
            self._link.driver.close()
        else:
            with suppress(psycopg.Error):
                self._link.driver.rollback()
                if self.for_application:
                    self._link.driver.execute(UNLOCK_ALL)
        self._give_back()

    def _give_back(self) -> None:
        """Return the connection to the pool."""
        link, self._link = cast(Link, self._link), None
        link.driver.row_factory = psycopg.rows.tuple_row  # the application may have changed it
        self._queue._pool.give_back(link)

    def abandon(self) -> None:
        """Close the connection, which undoes the transaction."""
        if self._link is not None:
            self._link.driver.close()


class JoinedPostgres(Joined, PostgresSession):
    """A session within a transaction of a `psycopg.Connection`."""

    for_application = True

    def __init__(self, queue: OnPostgres, driver: Any) -> None:
        PostgresSession.__init__(self, queue)
        if not isinstance(driver, psycopg.Connection):
            raise ValueError(
                "expected a psycopg.Connection, or a Session or Connection of SQLAlchemy on one, "
                f"got {pqueue_values.short(driver)}"
            )
        if driver.closed:
            raise QueueError("cannot join: the connection is closed")
        self._link = Link(driver, queue._settings, pooled=True)  # whose settings stay as they are
        self._link.cursor.row_factory = psycopg.rows.tuple_row
        self._link.cursor.adapters.register_dumper(int, Int8Dumper)
        self.finished = []

    def begin(self, durability: str) -> None:
        """Expect a connection to this database that can write, and whose transaction has begun or will."""
        link = cast(Link, self._link)
        if link.status == TransactionStatus.IDLE and link.driver.autocommit:
            raise QueueError("cannot join: the connection commits each statement by itself: open a transaction first")
        if link.status not in (TransactionStatus.IDLE, TransactionStatus.INTRANS):
            raise QueueError("cannot join: the transaction of the connection has failed, or a statement is under way")
        link.note_path()
        (ours,), (theirs,) = self._queue._read(SAME_DATABASE), self.run(SAME_DATABASE)
        if ours != theirs:
            raise QueueError(f"cannot join: expected a connection to {self._queue.name}, got one to another database")
        ((read_only, synced),) = self.run(TRANSACTION_SETTINGS)
        if read_only == "on":
            raise QueueError("cannot join: the transaction of the connection is read-only")
        if durability == "full" and synced == "off":
            self.run("SELECT set_config('synchronous_commit', 'on', true)")  # for this transaction

    def end(self) -> None:
        """Let the commit of the application send NOTIFY, unless it has two phases, which allow none. After a commit in
        the block, send it."""
        super().end()
        if getattr(cast(Link, self._link).driver, "_tpc", None):
            return
        by = PostgresSession(self._queue) if self.has_ended else self  # its connection may serve others by now
        by.finished = self.finished
        if self.wakes:
            by.run(f"SELECT {PG_NOTIFY} {IF_ROOM}")
        if self.finished:
            by._wake_waiters()


_queues: weakref.WeakSet[OnPostgres] = weakref.WeakSet()
_inherited: list[Any] = []  # connections of the parent process


def _after_fork() -> None:
    for queue in list(_queues):
        queue._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _completed(completions: list[tuple[Job, str | None]]) -> Params:
    """Return parameters of the statements that complete several jobs."""

    def once(values: list[str | None]) -> list[str | None]:
        return values[:1] if len(set(values)) == 1 else values

    return {
        "ids": sorted({job.id for job, _ in completions}),
        "tokens": once([job.lease_token for job, _ in completions]),
        "results": once([result for _, result in completions]),
    }


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
        if not session.busy:
            self._wrapped[session] = _again(self._wrapped.get(session)) or _wrap(session.connection)
        with super().transaction():
            yield self._wrapped[session]


def _wrap(connection: sqlite3.Connection) -> sqlalchemy.Connection:
    """Return an SQLAlchemy connection that leaves BEGIN, COMMIT and closing to the owner of `connection`."""
    return sqlalchemy.create_engine(
        "sqlite://",
        creator=lambda: connection,
        poolclass=StaticPool,
        pool_reset_on_return=None,
        isolation_level="AUTOCOMMIT",
    ).connect()


def _again(known: sqlalchemy.Connection | None) -> sqlalchemy.Connection | None:
    """Return SQLAlchemy's view of a connection, without what the application has set there; None if it closed it."""
    return sqlalchemy.Connection(known.engine, known.connection) if known and not known.closed else None


class OnPostgres(PersistentQSQLAlchemy):
    """The queue in a schema of a PostgreSQL database.

    url: postgresql://USER@HOST:PORT/DATABASE, with parameters of libpq and two of ours: schema=NAME (default: pqueue)
        holds the queue, so that a database can hold several; max_connections=N (default: 20) is how many connections
        this object opens at most. Threads wait for one, and raise QueueBusy after busy_seconds.
    durability: "full" waits until the server has synced; "normal" may lose the last changes if the server crashes.
    create: create the schema if it does not exist; else raise QueueError.
    busy_seconds: how long to wait for a lock or a connection.
    """

    max_batch = pqueue_postgres.MAX_BATCH
    _AMONG = pqueue_postgres.AMONG
    _LIKE = 'COLLATE "C" ILIKE'
    _BYTES = "octet_length(convert_to({}, 'UTF8'))"

    def __init__(
        self, url: str, *, durability: str = "full", create: bool = True, busy_seconds: float = pqueue.BUSY_SECONDS
    ) -> None:
        PersistentQInterface.__init__(self)
        if durability not in ("full", "normal"):
            raise ValueError(f"expected a durability of full or normal, got {pqueue_values.short(durability)}")
        self.durability, self._busy_seconds = durability, pqueue_values.valid_wait("busy_seconds", busy_seconds)
        self._milliseconds = int(busy_seconds * 1000)
        parsed = parse_url(url)
        self._conninfo, self.schema, self.name = parsed.conninfo, parsed.schema, parsed.name
        self._max_connections = parsed.max_connections
        self._engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=lambda: self._local.driver,
            isolation_level="AUTOCOMMIT",  # BEGIN and COMMIT are the session's
            poolclass=NullPool,
        )
        self._listener: ListenConnection | None = None
        self._listener_lock = threading.Lock()
        self._clock = UNREAD
        self._reset_connections()
        self.commit_seconds = 0.0  # a moving average
        self.cannot_wake = False  # the last attempt failed, and was reported
        self.has_enqueued = False
        self._reach = pqueue_postgres.Reach()
        self._takes_turns = False  # at the last claim, some group might have had a job; that takes several statements
        self._parts: list[Part] = []  # of a new schema
        self.pooled = False  # connected through a pooler, which does not keep our settings between transactions
        self._is_open = False
        try:
            self._prepare(create)
        except BaseException:
            self.close()
            raise
        self._is_open = True
        _queues.add(self)

    def _reset_connections(self) -> None:
        self._sessions: weakref.WeakSet[PostgresSession] = weakref.WeakSet()
        self._local = threading.local()
        self._pool = Pool(self.name, self._max_connections, self._busy_seconds, self._new_link)
        self._liveness_at, self._living = -math.inf, cast("set[int] | None", None)  # monotonic seconds; slots
        self._missing: dict[int, float] = {}  # slots without a lock, since when, monotonic seconds

    # Opening

    def _connect_raw(self) -> psycopg.Connection[Any]:
        arguments = {"application_name": "pqueue", "connect_timeout": max(1, int(self._busy_seconds)), **KEEPALIVES}
        arguments["tcp_user_timeout"] = self._milliseconds  # detects a broken network link
        try:
            connection = psycopg.connect(autocommit=True, **{**arguments, **self._conninfo, **ALWAYS})
        except (psycopg.Error, UnicodeError) as error:  # UnicodeError: a host name that cannot be
            hosts = "" if self._conninfo.get("hostaddr") else self._conninfo.get("host") or os.environ.get("PGHOST", "")
            failure = connection_error(self.name, error, hosts)
            # A running program waits until a password or a right is corrected
            busy = self._is_open and not isinstance(failure, QueueBusy)
            raise (QueueBusy(str(failure)) if busy else failure) from error
        with ExitStack() as undo, self._db_errors():
            undo.callback(connection.close)
            self._expect_usable(connection)
            undo.pop_all()
        return connection

    def _expect_usable(self, connection: psycopg.Connection[Any]) -> None:
        encoding = connection.info.parameter_status("server_encoding")
        if encoding != "UTF8":
            raise QueueError(f"cannot use {self.name}: expected a database with ENCODING 'UTF8', got {encoding}")
        connection.adapters.register_dumper(int, Int8Dumper)  # one type for all values, so one prepared statement
        pid = connection.execute("SELECT pg_catalog.pg_backend_pid()").fetchone()
        self.pooled = pid != (connection.info.backend_pid,)
        if self.pooled:
            connection.prepare_threshold = None
            # Not in a pipeline, which would hide the answer of a pooler that forbids it
            connection.execute("BEGIN")
            connection.execute("ROLLBACK")
        self._settings = Settings(self.durability, self._milliseconds, connection.info.server_version)
        if self._is_open:  # it may be another server, whose tables another program has migrated
            self._clock = UNREAD
            found = connection.execute(self._sql("SELECT number FROM version")).fetchall()
            pqueue_schema.expect_known(self.name, self._number(found))

    def _new_link(self) -> Link:
        with ExitStack() as undo, self._db_errors():
            driver = self._connect_raw()
            undo.callback(driver.close)
            link = Link(driver, self._settings, pooled=self.pooled)
            undo.pop_all()
        return link

    def _wrap(self, driver: psycopg.Connection[Any]) -> sqlalchemy.Connection:
        """Return an SQLAlchemy connection that leaves BEGIN, COMMIT and closing to the owner of `driver`."""
        self._local.driver = driver
        return self._engine.connect()

    def _sql(self, sql: str) -> bytes:
        return translated(sql, self.schema)[0]

    def _prepare(self, create: bool) -> None:
        """Check the version of the schema, and migrate it."""
        version = self._version()
        if version is None and not create:
            raise pqueue_values.no_queue(self.name)
        pqueue_schema.expect_known(self.name, version or 0)
        if version != len(pqueue_schema.MIGRATIONS):
            self._migrate()
        tests = (UNSAFE, pqueue_postgres.NOT_LOGGED) if self.durability == "full" else ()
        if unsafe := [row[0] for sql in tests for row in self._read(sql)]:
            log.warning("%s: a crash of the server may lose jobs: %s", self.name, ", ".join(unsafe))

    def _version(self) -> int | None:
        found = self._read(f"SELECT to_regclass('{SCHEMA}.version')::text")
        if found[0][0] is None:
            return None
        return self._number(self._read("SELECT number FROM version"))

    def _number(self, rows: list[Any]) -> int:
        """Return the number of the schema in the row of its table."""
        if not rows:
            raise QueueError(
                f"cannot use {self.name}: expected a row in table {self.schema}.version, got none: row-level security "
                "may hide it"
            )
        return cast(int, rows[0][0])

    def _migrate(self) -> None:
        with self._transaction() as session:
            session.run(f"SELECT pg_advisory_xact_lock({pqueue_postgres.LOCK_CLASS})")
            if session.run(f"SELECT to_regnamespace('{SCHEMA}')::text")[0][0] is None:
                session.change(f"CREATE SCHEMA {SCHEMA}")  # even IF NOT EXISTS needs a right on the database
            # Another program may have done it while this one waited.
            for statement in chain(*pqueue_postgres.MIGRATIONS[self._version() or 0 :]):
                session.change(statement)
            session.change("DELETE FROM version")
            session.change("INSERT INTO version VALUES (:number)", {"number": len(pqueue_schema.MIGRATIONS)})

    @contextmanager
    def _db_errors(self, session: PostgresSession | None = None) -> Iterator[None]:
        try:
            yield
        except (exc.SQLAlchemyError, psycopg.Error) as error:
            raise self._error(error, session) from error

    def _error(self, error: Exception, session: PostgresSession | None) -> QueueError:  # noqa: PLR0911
        original: Any = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None) or ""
        text = str(original).strip().partition("\n")[0]
        if original.diag.constraint_name == "jobs_key":
            return Conflict(f"cannot write to {self.name}: another writer took the key at the same moment")
        if state == pqueue_postgres.IS_FULL:
            return NoRoom(f"cannot enqueue: {text}")
        if state in ("40P01", "40001", "55P03") and "conflict with recovery" not in text:  # a standby's
            return (Conflict if state == "40P01" else QueueBusy)(
                f"cannot write to {self.name}: another writer held it ({text})"
            )
        if state == "53100":
            return QueueFull(f"cannot write to {self.name}: its disk is full")
        if state == "25006":
            # What a running program could do before, it waits for. A setting of its role concerns new connections.
            could_write = self._registry or self.has_enqueued
            failure = (QueueBusy if could_write else QueueError)(
                f"cannot write to {self.name}: {self._why_read_only()}"
            )
            self._pool.renew()
            return failure
        if state == "42501":
            return QueueError(
                f"cannot {'use' if self._is_open else 'open'} {self.name}: {text}{self._lacks(original.diag, session)}"
            )
        if "pooling mode" in text:  # of PgBouncer
            return QueueError(f"cannot use {self.name}: expected pool_mode = transaction or session, got: {text}")
        # A sequence may be behind, or a table, a column or a function be missing.
        if state in MISSING or (state.startswith("23") and original.diag.schema_name == self.schema):
            return QueueError(f"cannot use {self.name}: {text}; run {pqueue_values.command_line()} doctor")
        if state == "26000" or original.diag.source_function == "RevalidateCachedQuery":
            why = "its tables were altered" if state == "0A000" else "the application removed prepared statements"
            return Conflict(f"cannot use {self.name}: {why}; try again ({text})")
        if session and session.was_closed:
            return QueueError(f"cannot use {self.name}: the connection of the transaction was closed inside its block")
        if isinstance(original, psycopg.OperationalError) and not state.startswith(LASTING_STATES):
            verb = "reach" if state[:2] in ("", "08", "57") and state != "57014" else "use"  # that one was cancelled
            return QueueBusy(f"cannot {verb} {self.name}: {text}")
        return QueueError(f"cannot use {self.name}: {text}")

    def _why_read_only(self) -> str:
        with suppress(QueueError):
            if self._ask("SELECT pg_is_in_recovery()")[0]:
                return "it is a read-only standby"
            if self._ask("SHOW default_transaction_read_only")[0] == "on":
                return "default_transaction_read_only is on, for the role, the database or the server"
        return "its transactions are read-only"

    def _lacks(self, diag: psycopg.errors.Diagnostic, session: PostgresSession | None) -> str:
        """Return, as the end of a sentence, which right is missing."""
        kind, _, name = (diag.message_primary or "").removeprefix("permission denied for ").partition(" ")
        if kind not in RIGHTS:
            return ""
        is_ours = kind in ("table", "sequence", "function")
        shown = f"{self.schema}.{name}" if is_ours else name
        if function := re.search(r"function \S*\b(note_group|note_pending|count_pending)\(", diag.context or ""):
            return f": the owner of function {function[1]} lacks a right on {kind} {shown}"
        what = "%s::regproc" if kind == "function" else "%s"
        sql = f"""
SELECT quote_ident(current_user), (SELECT string_agg(one, ', ') FROM unnest(%s::text[]) one
    WHERE NOT has_{kind}_privilege({what}, one))"""
        try:
            role, missing = self._ask(sql, RIGHTS[kind], f'"{self.schema}".{name}' if is_ours else name)
        except QueueError:
            return ""
        if session and session.for_application and (not missing or isinstance(session, Joined)):  # after SET ROLE
            return f": the role of this transaction lacks a right on {kind} {shown}"
        if not missing:  # such as a trigger, for which grants do not suffice
            return f": role {role} does not own {kind} {shown}"
        hint = f": grant it, or run CREATE SCHEMA {pqueue_postgres.names_in(self.schema)[SCHEMA]} AUTHORIZATION {role}"
        return f": role {role} lacks {missing} on {kind} {shown}{hint if kind == 'database' else ''}"

    def _ask(self, sql: str, *values: Any) -> Any:
        """Return a row, read on a separate connection: that of this thread may be in a failed transaction."""
        link = self._pool.take(seconds=BRIEFLY)
        try:
            return link.driver.execute(sql, values).fetchone()
        except psycopg.Error as error:
            raise QueueError(str(error)) from error
        finally:
            self._pool.give_back(link)

    # Methods of Backend

    def _session(self) -> PostgresSession:
        """Return this thread's session."""
        session: PostgresSession | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = PostgresSession(self)
            session.thread = threading.get_ident()
            self._sessions.add(session)
        return session

    def _transaction(self, *, durable: bool = True, in_batch: bool = False) -> PostgresSession:  # noqa: ARG002
        session = self._session()
        if not session.depth:
            session.durable, session.for_application = durable, False
        return session

    def _read(self, sql: str, params: Params = pqueue_values.NO_PARAMS) -> list[Any]:
        return self._session().alone(sql, params)

    def _time(self, now: float | None) -> float:
        if now is not None:
            return super()._time(now)
        asked, ahead, host_ahead = self._clock
        began = time.monotonic()
        # time.monotonic may not advance while the machine is suspended.
        if began - asked > CLOCK_SECONDS or abs(time.time() - began - host_ahead) > 1:
            server = float(self._read("SELECT EXTRACT(EPOCH FROM clock_timestamp())")[0][0])
            ended = time.monotonic()
            ahead = server - (began + ended) / 2
            self._clock = (ended, ahead, time.time() - ended)  # one assignment: other threads read it
        return time.monotonic() + ahead

    def _store(self, sql: str, row: Params) -> list[JobId[Any]]:
        """Store jobs; try again while concurrent transactions use and free the key."""
        for _ in range(ENQUEUE_TRIES):
            with suppress(NotStored):
                ids = super()._store(sql, row)
                if not (self.in_transaction and row["key"]) or self._read(pqueue_postgres.LOCK_HOLDER, {"id": ids[0]}):
                    return ids
        raise NotStored

    def _add_queue(self, session: Session, row: Params) -> int:
        """Do it in a separate transaction: until that of the application ends, other producers would wait."""
        application = self._session()
        # With another isolation, it would not see what another transaction adds.
        if application.for_application and application.run("SHOW transaction_isolation")[0][0] == "read committed":
            other = PostgresSession(self)
            other.seconds = BRIEFLY
            with suppress(QueueBusy):  # no other connection is available, or the application has changed the queue
                with other:
                    other.change(LOCK_BRIEFLY)
                    super()._add_queue(other, row)
                return 1
        return super()._add_queue(session, row)

    def _operator_verb(self, *arguments: Any, **values: Any) -> None:
        """See the base class. On a conflict with a concurrent enqueue, the second call sees which job has the key.

        Operators who resubmit two parents of a job at once may wait for each other: one of them tries again, twice if
        it was faster than the other one.
        """
        for _ in range(2):
            with suppress(Conflict):
                return super()._operator_verb(*arguments, **values)
        return super()._operator_verb(*arguments, **values)

    def limit(self, *arguments: Any, **options: Any) -> None:
        """See the base class. Locks out writers, to count the pending jobs, or those that are processing."""
        with self._transaction() as session:
            self._lock_out_writers(session)
            super().limit(*arguments, **options)
        if not self.in_transaction and self._read(pqueue_postgres.IS_COUNTED) and not self._read(pqueue_schema.LIMITED):
            self._stop_counting()

    def _stop_counting(self) -> None:
        """Drop the triggers if no queue has a limit. This waits for readers and blocks new ones: give up soon. What is
        left costs little, and the next removal of a limit tries again. The transaction must hold no lock on jobs: one
        that reads jobs before it writes, as a claim does, would wait for it, and the two would be deadlocked."""
        with suppress(QueueError), self._transaction() as session:  # only the owner may; an event trigger may forbid it
            session.change(LOCK_BRIEFLY)
            session.change("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
            for name in pqueue_postgres.LIMIT_TRIGGERS if not session.run(pqueue_schema.LIMITED) else ():
                session.change(f"DROP TRIGGER {name} ON jobs")

    def _count_pending(self, session: Session) -> None:
        """Recount all queues while writers are locked out; create the triggers if a queue has a limit."""
        for statement in pqueue_postgres.RECOUNT:
            session.change(statement)
        if session.run(pqueue_schema.LIMITED) and not session.run(pqueue_postgres.IS_COUNTED):
            try:
                for statement in pqueue_postgres.START_COUNTING:
                    session.change(statement)
            except QueueBusy:
                raise
            except QueueError as error:
                raise QueueError(f"{error} (the first limit of pending jobs adds triggers to table jobs)") from error

    def pause(self, queue: str, *, by: str | None = None, now: float | None = None) -> None:
        """See the base class. Waits for claims that began before."""
        super().pause(queue, by=by, now=now)
        until = time.monotonic() + self._busy_seconds * (not self.in_transaction)
        under_way = set(self._read(pqueue_postgres.WRITERS))
        while (under_way := under_way.intersection(self._read(pqueue_postgres.WRITERS))) and time.monotonic() < until:
            time.sleep(0.01)

    def _complete_and_claim(
        self,
        completions: list[tuple[Job, str | None]],
        me: pqueue_backend.Registration,
        limit: int,
        wanted: Params,
        lease_seconds: float | timedelta,
        now: float | None,
    ) -> tuple[list[Job], list[Job]]:
        """Do it in one round trip unless it is time to check for dead consumers, or there are jobs to reclaim."""
        completions = sorted(completions, key=lambda done: done[0].id)  # rows are always locked in this order
        done = _completed(completions)
        ids = done["ids"]
        looks = time.monotonic() - self._dead_checked_at >= pqueue.DEAD_CHECK_SECONDS
        if looks and not self.in_transaction:
            self._open_listener()  # restarts its thread if it died
            with self._transaction(durable=False) as session:
                session.run(pqueue_postgres.MERGE_CHANGES)
        if limit == 0 or looks or self._takes_turns or self.in_transaction or len(ids) < len(completions):
            return self._step_by_step(completions, me, limit, wanted, lease_seconds, now)
        now = self._time(now)
        claim = pqueue.claim_params(me, limit, wanted, lease_seconds, now)
        reach = self._reach
        width = reach.width()
        sql = pqueue_postgres.complete_and_claim(width) if completions else pqueue_postgres.claim_alone(width)
        claim["share"] = reach.share(limit)
        session = self._transaction()
        rows = session.alone(sql, {**claim, **done, "number": len(ids)})
        taken = [row[3:] for row in rows if row[3] is not None]
        reach.adapt(width, limit, tasks=rows[0][1], looked_at=rows[0][2], taken=len(taken))
        self.max_batch = reach.max_batch()
        jobs = self._claimed_jobs(taken, claim)
        # Those whose lease was lost, or that others wait for. If there are any, nothing was claimed.
        left = [each for each in completions if rows[0][0] is not None and each[0].id not in rows[0][0]]
        if completions and self.is_awaited:
            session.finished = ids
            session._wake_waiters()
        if left:
            return self._step_by_step(left, me, limit, wanted, lease_seconds, now)
        with suppress(QueueBusy) if completions else nullcontext():  # an error must not hide what was completed
            jobs = jobs or self._step_by_step([], me, limit, wanted, lease_seconds, now)[0]
        return jobs, []

    def _step_by_step(self, *arguments: Any) -> tuple[list[Job], list[Job]]:
        """Do it in several statements; once more if the tables were altered since they were prepared."""
        with suppress(Conflict) if not self.in_transaction else nullcontext():
            return super()._complete_and_claim(*arguments)
        return super()._complete_and_claim(*arguments)

    def _complete_all(self, session: Session, completions: list[tuple[Job, str | None]], now: float) -> list[Job]:
        """Do it in one statement."""
        params = _completed(completions)
        if len(params["ids"]) < len(completions):
            return super()._complete_all(session, completions, now)
        done = dict(session.run(pqueue_postgres.COMPLETE_ALL, {**params, "now": now})) if completions else {}
        parents = [job_id for job_id, has_dependents in done.items() if has_dependents]
        self._follow_up(session, parents, now, completed=True)
        return [job for job, _ in completions if job.id not in done]

    def _reclaim(self, session: Session, dead: list[str] | None, now: float) -> bool:
        self._lock_as_writer(session)
        return super()._reclaim(session, dead, now)

    def _begin_turns(self, session: Session, params: Params) -> bool:
        found = session.run(pqueue_postgres.LOCK_QUEUES, params)
        if found:
            params["locked"] = [row[0] for row in found]
            session.change(pqueue_postgres.MERGE_EVENTS, params)
        self._takes_turns = bool(found) and super()._begin_turns(session, params)
        return self._takes_turns

    def _first_jobs(self, session: Session, params: Params) -> list[Any]:
        return session.run(pqueue_postgres.FIRST_JOBS, params)

    def _lock_as_writer(self, session: Session) -> None:
        session.change(pqueue_postgres.LOCK_AS_WRITER)

    def _prune(self, session: Session, params: Params) -> int:
        locked = [row[0] for row in session.run(pqueue_schema.PRUNABLE, params)]
        return cast(int, session.run(pqueue_postgres.PRUNE, {"ids": locked})[0][0]) if locked else 0

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

    def _take_slot(self) -> ConsumerLock:
        return ConsumerLock(None, secrets.randbelow(2**31 - 1))

    def _adopt_slot(self, slot: ConsumerLock) -> ConsumerLock | None:
        listener = self._open_listener()
        if not listener.gets_notify:
            return None
        listener.acquire(slot.number)
        return ConsumerLock(listener, slot.number)

    def _open_watch(self) -> pqueue_backend.Watch:
        listener = self._open_listener()
        return ResultWatch(self, listener) if listener.gets_notify else pqueue_backend.Watch()

    @property
    def is_awaited(self) -> bool:
        """Whether a process may wait for the result of a job; without a listener that is unknown."""
        return self._listener is None or self._listener.is_awaited

    def announce_wait(self) -> None:
        """Tell the processes that finish jobs that this one waits for a result."""
        with suppress(QueueError):
            self._session().change(f"{NOTIFY}, '{WAITING}'")

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
        started = float(self._read(pqueue_postgres.UPTIME)[0][0])
        living = {int(row[0]) for row in self._read(LOCKED_SLOTS)}
        recently = started < pqueue_listener.RESTART_SECONDS or (self._listener and self._listener.was_lost_recently())
        self._missing = {slot: at for slot, at in self._missing.items() if slot not in living}
        self._liveness_at, self._living = time.monotonic(), None if recently else living

    def _mark_running(self) -> None:
        """Mark our consumers as running: others may have considered them dead while the connection was lost."""
        for me in self._registry.values():
            self._session().change(pqueue_postgres.MARK_RUNNING, {"token": me.token, "now": self._time(None)})

    def _sleep(self, me: pqueue_backend.Registration, seconds: float, due_in: Callable[[], float]) -> bool:  # noqa: ARG002
        def due_at_first() -> float:  # still due after a dequeue: another transaction has locked the job
            left = due_in()
            self._local.was_due = left <= 0 and not getattr(self._local, "was_due", False)
            return left if left > 0 or self._local.was_due else pqueue.POLL_SECONDS

        return self._open_listener().wait(seconds, due_at_first)

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        session = self._transaction()
        is_outermost = session.depth == 0
        if not is_outermost and not session.for_application:  # its connection may be the one that listens
            raise QueueError("cannot open a transaction inside exclusive(): open it around that")
        session.for_application = True
        with session.user_transaction():
            if is_outermost:
                session.as_application()
            yield session.connection

    def _joined(self, connection: Any) -> JoinedPostgres:
        with self._db_errors():
            joined = JoinedPostgres(self, driver_connection(connection))
            joined.begin(self.durability)
        return joined

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a consistent copy as a queue on SQLite: `open_queue(path)` opens it."""
        target = pqueue_values.file_path(path)
        try:
            if target.exists():
                raise QueueError(f"cannot back up to {target}: {os.strerror(errno.EEXIST)}")
            with (
                temporary_folder(f"{target.name}.", target.parent) as folder,
                closing(PersistentQSQLite(folder / "copy.db")) as copy,
            ):
                self.copy_to(copy)
                copy.backup(target)
        except OSError as error:
            raise QueueError(f"cannot back up to {target}: {error.strerror}") from error

    def compact(self, *, progress: Callable[[int], None] | None = None) -> int:
        if self.in_transaction:
            raise QueueError("cannot compact in a transaction")
        (before, is_owner), *_ = self._read(SIZE)
        if not is_owner:  # VACUUM would only warn
            raise QueueError(f"cannot compact {self.name}: expected the owner of the tables")
        for table in TABLES:
            self._session().change(f"VACUUM {SCHEMA}.{table}")
            if progress:
                progress(int(self._read(SIZE)[0][0]))
        return max(0, int(before - self._read(SIZE)[0][0]))

    def _identity(self) -> object:
        return self._read(SAME_DATABASE)

    def other_tables(self) -> list[str]:
        """Return the names of the tables and views in the queue's schema that are not ours."""
        sql = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = :schema ORDER BY 1"
        return [row[0] for row in self._read(sql, {"schema": self.schema}) if row[0] not in TABLES]

    def _lock_out_writers(self, session: Session) -> None:
        session.change(f"SET LOCAL {pqueue_postgres.COPYING} = on")
        session.change("LOCK TABLE jobs IN EXCLUSIVE MODE")  # excludes every writer; one lock cannot deadlock

    def _begin_snapshot(self, session: Session) -> None:
        cast("PostgresSession", session).begin_snapshot()

    def _lock_jobs(self, session: Session, job_ids: list[int]) -> None:
        sql = "SELECT id FROM jobs WHERE id = ANY (CAST(:ids AS bigint[])) ORDER BY id FOR UPDATE"
        session.run(sql, {"ids": job_ids})

    def _count_completed(self, session: Session, jobs: Sequence[Job], now: float) -> None:
        """Do nothing: the statement that completes a job counts it."""

    def _add_to_total(self, session: Session, before: Params) -> None:
        session.change(pqueue_postgres.ADD_TO_TOTAL, before)

    def _reset_ids(self, session: Session) -> None:
        for table in ("jobs", "history", "dependencies"):
            sequence = f"pg_get_serial_sequence('{SCHEMA}.{table}', 'id')"
            # Only positive ids: a copy that is under way is marked by another one.
            session.run(f"SELECT setval({sequence}, greatest(max(id), 1), coalesce(max(id) > 0, false)) FROM {table}")

    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        expected: dict[str, Any] = {**dict.fromkeys(SAFE, "on"), "schema_version": len(pqueue_schema.MIGRATIONS)}
        facts: dict[str, Any] = {"path": self.name, "durability": self.durability, "schema_version": self._version()}
        for name in ("server_version", "synchronous_commit", *SAFE):
            facts[name] = self._read(f"SHOW {name}")[0][0]
        if thorough:
            facts["file_bytes"] = self._read("SELECT pg_database_size(current_database())")[0][0]
        facts["problems"] = [
            f"expected {name} {value}, got {facts[name]}" for name, value in expected.items() if facts[name] != value
        ]
        unexplained: list[str] = []
        for problems in (self._server_problems, self._schema_problems, *([self._count_problems] if thorough else ())):
            try:
                for problem in problems():
                    facts["problems"].append(problem)  # one by one: the next may raise
            except QueueBusy as error:  # a table is locked
                facts["problems"].append(str(error))
                break
            except QueueError as error:  # a table or a column is missing, which another problem says
                unexplained.append(str(error))
        facts["problems"] = facts["problems"] or unexplained[:1]
        return facts

    def _server_problems(self) -> Iterator[str]:
        for sql in pqueue_postgres.HEALTH.values():
            yield from (row[0] for row in self._read(sql))

    def _schema_problems(self) -> list[str]:
        if self._version() != len(pqueue_schema.MIGRATIONS) or not (model := self._model()):
            return []
        try:
            has_limits = bool(self._read(pqueue_schema.LIMITED))
        except QueueBusy:
            raise
        except QueueError:  # what it reads is missing
            has_limits = False
        found = self._read(pqueue_postgres.CATALOG, {"temporary": False})
        return pqueue_postgres.drift(model, found, self.schema, has_limits=has_limits)

    def _count_problems(self) -> list[str]:
        miscounted = [
            f"expected {found} pending jobs of queue {name!r}, counted {counted}: set its limit again"
            for name, counted, found in self._read(pqueue_postgres.MISCOUNTED)
        ]
        return miscounted + self._unlisted_tasks()

    def _model(self) -> list[Part]:
        """Return the parts of a new schema, which the server describes; none if this role may not make temporary
        tables there."""
        if not self._parts:
            with suppress(QueueError), self._transaction(durable=False) as session:
                for statement in pqueue_postgres.MODEL:
                    session.change(pqueue_postgres.temporary(statement))
                self._parts = session.run(pqueue_postgres.CATALOG, {"temporary": True})
                raise QueueError("undo it")
        return self._parts

    def reserve_connections(self, number: int) -> None:
        self._pool.reserve(number)

    def close(self) -> None:
        self._waits.close()
        if self._listener is not None:
            self._listener.stop_listening()
        if self._registry:
            self._unregister_all()
        if self._listener is not None:
            self._listener.close()
        self._pool.close()
        self._listener = None

    def _unregister_all(self) -> None:
        """Unregister all consumers; try again if a connection was lost or a transaction of ours held a job."""
        if self.in_transaction:
            self._local.session.abandon()
            self._local = threading.local()
        for _ in range(2):
            with suppress(QueueError):
                self._unregister(list(self._registry.values()))
                return
            for session in list(self._sessions):  # of threads in a transaction, which may have locked a job
                session.abandon()

    def _after_fork(self) -> None:
        """Reconnect in the child: the sockets belong to the parent."""
        _inherited.append((self._pool.disown(), self._listener))
        PersistentQInterface.__init__(self)
        self._listener, self._listener_lock = None, threading.Lock()
        self._reset_connections()
