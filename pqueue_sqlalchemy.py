"""The queue on PostgreSQL through SQLAlchemy: the same verbs, states and guarantees, for many machines.

    queue = open_queue("postgresql://user:password@host/database")

The statements are those of pqueue.py; what PostgreSQL says differently is translated here. Claims skip rows that others
have locked. The clock is the server's. A consumer's life hangs on a session that holds an advisory lock; wake-ups come
by NOTIFY to the same session, one per process. Needs SQLAlchemy 2 and psycopg 3.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import psycopg
import sqlalchemy
from sqlalchemy import exc

import pqueue
from pqueue import (
    BUSY_SECONDS,
    MIGRATIONS,
    NOTHING,
    Params,
    PersistentQInterface,
    PersistentQSQLite,
    QueueBusy,
    QueueError,
    QueueFull,
    Registration,
    SchemaMismatch,
    Session,
)

SCHEMA = "pqueue"
CHANNEL = "pqueue"
LOCK_CLASS = 0x7071  # of the advisory locks by which consumers are seen to live
CLOCK_SECONDS = 30.0  # how often the server's clock is read
RETRY_SECONDS = 0.5  # between two attempts of the listener to connect
RESTART_SECONDS = 10.0  # after a restart of the server nobody is taken for dead: locks are being taken anew

# A subquery for each queue is LATERAL here: "q CROSS JOIN jobs WHERE … jobs.id IN (SELECT id …)".
PER_QUEUE = re.compile(r"queues q CROSS JOIN jobs WHERE (.*?)jobs\.id IN\s*(\(SELECT id.*?LIMIT :limit\))", re.DOTALL)
INSERT_MANY = pqueue.INSERT_MANY.format(
    payloads="unnest(CAST(:payloads AS text[])) WITH ORDINALITY AS p (payload, n) ORDER BY n RETURNING id"
)
ALIVE = "SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND classid = :lock_class AND objsubid = 2 AND granted"
UPTIME = "SELECT EXTRACT(EPOCH FROM clock_timestamp() - pg_postmaster_start_time())"


@lru_cache(maxsize=256)
def translated(sql: str) -> sqlalchemy.TextClause:
    """Return a statement of pqueue.py as PostgreSQL has it."""
    claims = sql.lstrip().startswith("UPDATE jobs SET state = 'processing'") or sql.startswith("SELECT attempts")
    sql = PER_QUEUE.sub(r"queues q CROSS JOIN LATERAL \2 best JOIN jobs USING (id) WHERE \1 true", sql)
    if claims:
        sql = sql.replace("LIMIT :limit) best", "LIMIT :limit FOR UPDATE SKIP LOCKED) best")
        sql = sql.replace("LIMIT :limit) mine", "LIMIT :limit FOR UPDATE SKIP LOCKED) mine")
    return sqlalchemy.text(sql)


class PostgresSession(Session):
    """One thread's connection, taken from the pool for each transaction."""

    def __init__(self, queue: PersistentQSQLAlchemy) -> None:
        self._queue = queue
        self._nested: list[sqlalchemy.NestedTransaction] = []
        self._depth = 0
        self.durable = True
        self.connection: sqlalchemy.Connection | None = None

    def run(self, sql: str, params: Params = NOTHING) -> list[Any]:
        return [tuple(row) for row in self._execute(sql, params).fetchall()]

    def change(self, sql: str, params: Params = NOTHING) -> int:
        return cast(int, self._execute(sql, params).rowcount)

    def current(self) -> sqlalchemy.Connection:
        """Return the connection of the transaction that is open."""
        if self.connection is None:
            raise QueueError("cannot go on in a transaction that has ended; leave its block")
        return self.connection

    def change_many(self, sql: str, rows: list[Params]) -> None:
        try:
            self.current().execute(translated(sql), rows)
        except exc.SQLAlchemyError as error:
            raise self._queue._error(error) from error

    def _execute(self, sql: str, params: Params) -> Any:
        try:
            return self.current().execute(translated(sql), params)
        except exc.SQLAlchemyError as error:
            raise self._queue._error(error) from error

    def __enter__(self) -> PostgresSession:
        if self._depth == 0:
            self._begin()
        else:
            try:
                self._nested.append(self.current().begin_nested())
            except exc.SQLAlchemyError as error:
                raise self._queue._error(error) from error
        self._depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._depth -= 1
        if self._depth:
            self._end_nested(error)
        else:
            self._end(error)

    def _begin(self) -> None:
        self.ring, self.lost = False, None
        try:
            self.connection = self._queue._engine().connect()
            self.connection.begin()
            if not self.durable:
                self.connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
        except exc.SQLAlchemyError as error:
            self._close()
            raise self._queue._error(error) from error

    def _end_nested(self, error: BaseException | None) -> None:
        nested = self._nested.pop()
        try:
            if nested.is_active:
                nested.rollback() if error is not None else nested.commit()
        except exc.SQLAlchemyError as failed:
            raise self._queue._error(failed) from failed

    def _end(self, error: BaseException | None) -> None:
        connection = self.current()
        try:
            if error is None and self.lost is None:
                if not connection.in_transaction():
                    raise QueueError("cannot commit: the transaction was ended inside its block")
                if self.ring:
                    connection.exec_driver_sql(f"NOTIFY {CHANNEL}")
                connection.commit()
        except exc.SQLAlchemyError as failed:
            raise self._queue._error(failed) from failed
        finally:
            self._close()
        if error is None and self.lost is not None:
            raise self.lost

    def _close(self) -> None:
        connection, self.connection = self.connection, None
        self._nested.clear()
        if connection is not None:
            with suppress(exc.SQLAlchemyError):
                connection.close()


class Line:
    """A process's own session to the server: it hears the bell, and holds the locks of the consumers that live here."""

    def __init__(self, queue: PersistentQSQLAlchemy) -> None:
        self._queue = queue
        self._changed = threading.Condition()
        self._rings = 0
        self._numbers: set[int] = set()  # of the locks to hold
        self._connection: psycopg.Connection[Any] | None = None
        self._over = False
        self._thread = threading.Thread(target=self._listen, name="pqueue-line", daemon=True)

    def start(self) -> None:
        self._connection = self._connect()
        self._thread.start()

    def hold(self, number: int) -> None:
        """Take a lock, now and after each new connection."""
        self._numbers.add(number)
        self._do("SELECT pg_advisory_lock(%s, %s)", number)

    def let_go(self, number: int) -> None:
        self._numbers.discard(number)
        self._do("SELECT pg_advisory_unlock(%s, %s)", number)

    def _do(self, sql: str, number: int) -> None:
        """Execute it, unless the connection is lost: the listener makes a new one. What rang meanwhile is passed on."""
        connection = self._connection
        if connection is not None:
            with suppress(psycopg.Error):
                connection.execute(sql, (LOCK_CLASS, number))
        self._ring()

    def wait(self, seconds: float, due_in: Callable[[], float]) -> bool:
        with self._changed:
            before = self._rings
        until = min(seconds, due_in())
        with self._changed:
            return self._changed.wait_for(lambda: self._rings != before, max(0.0, until))

    def close(self) -> None:
        self._over = True
        self._thread.join(2)
        if self._connection is not None:
            self._connection.close()

    def _connect(self) -> psycopg.Connection[Any]:
        connection = self._queue._connect_raw()
        for number in list(self._numbers):
            connection.execute("SELECT pg_advisory_lock(%s, %s)", (LOCK_CLASS, number))
        connection.execute(f"LISTEN {CHANNEL}")
        return connection

    def _listen(self) -> None:
        while not self._over:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    self._queue._revive()
                self._hear(self._connection)
            except (psycopg.Error, QueueError, OSError):
                connection, self._connection = self._connection, None
                if connection is not None:
                    with suppress(psycopg.Error):
                        connection.close()
                time.sleep(RETRY_SECONDS)

    def _hear(self, connection: psycopg.Connection[Any]) -> None:
        if select.select([connection.fileno()], [], [], 1.0)[0] and any(True for _ in connection.notifies(timeout=0)):
            self._ring()

    def _ring(self) -> None:
        with self._changed:
            self._rings += 1
            self._changed.notify_all()


class Place:
    """A consumer's advisory lock, as long as it lives."""

    def __init__(self, line: Line, number: int) -> None:
        self.number = number
        self._line = line

    def close(self) -> None:
        self._line.let_go(self.number)


_queues: weakref.WeakSet[PersistentQSQLAlchemy] = weakref.WeakSet()


def _after_fork() -> None:
    for queue in list(_queues):
        queue._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class PersistentQSQLAlchemy(PersistentQInterface):
    """The queue in a PostgreSQL database, in a schema of its own.

    durability: "full" waits until the server has synced; "normal" may lose the last moments if the server crashes.
    create: make the schema where there is none; else raise QueueError.
    busy_seconds: how long to wait for a lock, or for an answer when connecting.
    """

    _LIKE = "ILIKE"

    def __init__(
        self, url: str, *, durability: str = "full", create: bool = True, busy_seconds: float = BUSY_SECONDS
    ) -> None:
        super().__init__()
        if durability not in ("full", "normal"):
            raise ValueError(f"expected a durability of full or normal, got {durability!r}")
        self.durability, self._busy_seconds = durability, busy_seconds
        self._url = _url(url)
        self.name = f"{self._url.host or 'localhost'}/{self._url.database}"
        self._local = threading.local()
        self._made: sqlalchemy.Engine | None = None
        self._line: Line | None = None
        self._starting = threading.Lock()
        self._offset, self._asked = 0.0, -CLOCK_SECONDS
        self._living: tuple[float, set[int] | None] = (0.0, None)
        self._closed = False
        try:
            self._prepare(create)
        except BaseException:
            self.close()
            raise
        _queues.add(self)

    # Opening

    def _engine(self) -> sqlalchemy.Engine:
        if self._closed:
            raise QueueError(f"cannot use {self.name}: this queue object is closed")
        if self._made is None:
            self._made = sqlalchemy.create_engine(
                self._url, connect_args=self._arguments(), pool_size=5, max_overflow=50, pool_reset_on_return="rollback"
            )
        return self._made

    def _arguments(self) -> dict[str, Any]:
        milliseconds = int(self._busy_seconds * 1000)
        settings = f"-c search_path={SCHEMA},public -c lock_timeout={milliseconds}"
        if self.durability == "normal":
            settings += " -c synchronous_commit=off"
        settings += (
            " -c tcp_keepalives_idle=5 -c tcp_keepalives_interval=2 -c tcp_keepalives_count=3"  # the server's side
        )
        return {
            "options": settings,
            "application_name": "pqueue",
            "prepare_threshold": 3,
            "connect_timeout": max(1, int(self._busy_seconds)),
            "tcp_user_timeout": milliseconds,  # a link that is cut without a word is noticed, too
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
        }

    def _connect_raw(self) -> psycopg.Connection[Any]:
        url = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        return psycopg.connect(url, autocommit=True, **self._arguments())

    def _prepare(self, create: bool) -> None:
        """Check whose schema it is, and bring it up to date."""
        version = self._version()
        if version is None and not create:
            raise QueueError(f"no queue at {self.name}: a producer or a consumer creates it")
        if version is not None and version > len(MIGRATIONS):
            raise SchemaMismatch(
                f"cannot use {self.name}: expected schema {len(MIGRATIONS)} or older, got {version}: "
                "use the pqueue that wrote it, or a newer one"
            )
        if version != len(MIGRATIONS):
            self._migrate()

    def _version(self) -> int | None:
        found = self._read("SELECT to_regclass(:name)::text", {"name": f"{SCHEMA}.version"})
        if found[0][0] is None:
            return None
        return cast(int, self._read(f"SELECT number FROM {SCHEMA}.version", {})[0][0])

    def _migrate(self) -> None:
        with self._write() as tx:
            tx.run(f"SELECT pg_advisory_xact_lock({LOCK_CLASS})", {})
            tx.change(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}", {})
            tx.change(f"CREATE TABLE IF NOT EXISTS {SCHEMA}.version (number INTEGER NOT NULL)", {})
            done = tx.run(f"SELECT number FROM {SCHEMA}.version", {})
            for migration in islice(MIGRATIONS, done[0][0] if done else 0, None):
                for statement in migration:
                    self._define(tx, statement)
            tx.change(f"DELETE FROM {SCHEMA}.version", {})
            tx.change(f"INSERT INTO {SCHEMA}.version VALUES (:number)", {"number": len(MIGRATIONS)})

    def _define(self, tx: PostgresSession, statement: str) -> None:
        identity = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
        connection = tx.current()
        connection.exec_driver_sql(statement.format(id=identity, float="DOUBLE PRECISION"))
        if "CREATE TABLE jobs" in statement:  # every job is updated at least twice: clean up early, leave room
            hot = "fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0"
            connection.exec_driver_sql(f"ALTER TABLE jobs SET ({hot})")

    def _error(self, error: Exception) -> QueueError:  # noqa: PLR0911
        original = getattr(error, "orig", None) or error
        state = getattr(original, "sqlstate", None) or ""
        lines = str(original).strip().split("\n")
        text = lines[0] if lines else type(original).__name__
        if state in ("40P01", "40001", "55P03"):
            return QueueBusy(f"cannot write to {self.name}: another writer held it ({text})")
        if state == "53100":
            return QueueFull(f"cannot write to {self.name}: its disk is full")
        if state in ("25006",):
            return QueueError(f"cannot write to {self.name}: it is a read-only standby")
        if state.startswith("28") or "authentication failed" in text or "no password" in text:
            return QueueError(f"cannot open {self.name}: user or password refused")
        if state in ("3D000", "42501") or re.search('(database|role) ".*" does not exist', text):
            return QueueError(f"cannot open {self.name}: {text}")
        if isinstance(error, (exc.OperationalError, exc.InterfaceError, psycopg.OperationalError)) or state[:2] == "57":
            return QueueBusy(f"cannot reach {self.name}: {text}")
        return QueueError(f"cannot use {self.name}: {text}")

    # What the interface asks of a backend

    def _session(self) -> PostgresSession:
        if not hasattr(self._local, "session"):
            self._local.session = PostgresSession(self)
        return cast(PostgresSession, self._local.session)

    def _write(self, *, durable: bool = True, in_batch: bool = False) -> PostgresSession:  # noqa: ARG002
        session = self._session()
        session.durable = durable
        return session

    def _read(self, sql: str, params: Params = NOTHING) -> list[Any]:
        session = self._session()
        if session.connection is not None:
            return session.run(sql, params)
        try:
            with self._engine().connect() as connection:
                return [tuple(row) for row in connection.execute(translated(sql), params).fetchall()]
        except exc.SQLAlchemyError as error:
            raise self._error(error) from error

    def _time(self, now: float | None) -> float:
        if now is not None:
            return super()._time(now)
        if time.monotonic() - self._asked > CLOCK_SECONDS:
            began = time.monotonic()
            server = float(self._read("SELECT EXTRACT(EPOCH FROM clock_timestamp())", {})[0][0])
            self._asked = time.monotonic()
            self._offset = server - (began + self._asked) / 2
        return time.monotonic() + self._offset

    def _insert_many(self, tx: Session, row: Params, payloads: list[str]) -> list[int]:
        return sorted(inserted[0] for inserted in tx.run(INSERT_MANY, {**row, "payloads": payloads}))

    def _open_line(self) -> Line:
        with self._starting:
            if self._line is None:
                line = Line(self)
                try:
                    line.start()
                except psycopg.Error as error:
                    raise self._error(error) from error
                self._line = line
            return self._line

    def _take_slot(self) -> Place:
        line = self._open_line()
        number = secrets.randbelow(2**31 - 1)
        line.hold(number)
        return Place(line, number)

    def _is_alive(self, slot: int | None) -> bool:
        at, living = self._living
        if time.monotonic() - at > pqueue.DEAD_CHECK_SECONDS / 2:
            started = float(self._read(UPTIME, {})[0][0])
            rows = self._read(ALIVE, {"lock_class": LOCK_CLASS})
            living = None if started < RESTART_SECONDS else {int(row[0]) for row in rows}
            self._living = (time.monotonic(), living)
        return living is None or slot in living

    def _revive(self) -> None:
        """After a lost connection others may have taken our consumers for dead: they live."""
        for me in list(self._registry.values()):
            with self._write(durable=False) as tx:
                tx.change("UPDATE consumers SET state = 'running' WHERE token = :token", {"token": me.token})

    def _sleep(self, me: Registration, seconds: float, due_in: Callable[[], float]) -> bool:  # noqa: ARG002
        return self._open_line().wait(seconds, due_in)

    @property
    def in_transaction(self) -> bool:
        return self._session().connection is not None

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        with self._write() as tx:
            yield tx.current()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a copy, as of one moment, that is a queue on SQLite: `open_queue(path)` opens it."""
        target = Path(path).absolute()
        if target.exists() or not target.parent.is_dir():
            reason = "File exists" if target.exists() else "No such file or directory"
            raise QueueError(f"cannot back up to {target}: {reason}")
        copy = PersistentQSQLite(target)
        try:
            self.copy_to(copy)
            with closing(sqlite3.connect(target)) as db:
                if db.execute("PRAGMA integrity_check").fetchone() != ("ok",):
                    raise QueueError(f"cannot back up to {target}: the copy is damaged")
        except BaseException:
            copy.close()
            target.unlink()
            raise
        copy.close()

    def _lock_out_writers(self, tx: Session) -> None:
        tx.change("LOCK TABLE queues, jobs, history IN SHARE MODE", {})

    def _number_on(self, tx: Session) -> None:
        for table in ("jobs", "history"):
            highest = f"(SELECT coalesce(max(id), 0) + 1 FROM {table})"
            tx.run(f"SELECT setval(pg_get_serial_sequence('{SCHEMA}.{table}', 'id'), {highest}, false)", {})

    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        facts: dict[str, Any] = {"path": self.name, "durability": self.durability, "user_version": self._version()}
        for setting in ("server_version", "synchronous_commit", "fsync", "full_page_writes", "transaction_read_only"):
            facts[setting] = self._read(f"SHOW {setting}", {})[0][0]
        expected = {"fsync": "on", "full_page_writes": "on", "transaction_read_only": "off"}
        if thorough:
            facts["file_bytes"] = self._read("SELECT pg_database_size(current_database())", {})[0][0]
        if self.durability == "full":
            expected["synchronous_commit"] = "on"
        facts["problems"] = [
            f"expected {name} {value}, got {facts[name]}" for name, value in expected.items() if facts[name] != value
        ]
        if facts["user_version"] != len(MIGRATIONS):
            facts["problems"].append(f"expected schema {len(MIGRATIONS)}, got {facts['user_version']}")
        return facts

    def close(self) -> None:
        if self._registry and not self._closed:
            with suppress(QueueBusy):
                self._leave()
        if self._line is not None:
            self._line.close()
        if self._made is not None:
            self._made.dispose()
        self._line = self._made = None
        self._closed = True

    def _after_fork(self) -> None:
        """Reconnect in the child: the sockets belong to the parent."""
        if self._made is not None:
            self._made.dispose(close=False)
        PersistentQInterface.__init__(self)
        _inherited.append(self._line)
        self._line, self._local, self._starting = None, threading.local(), threading.Lock()


_inherited: list[Any] = []


def _url(text: str) -> sqlalchemy.URL:
    try:
        url = sqlalchemy.make_url(text)
        if "@" in f"{url.host} {url.database} {url.query}":  # a password, cut at a / or ? that is not percent-encoded
            raise ValueError
    except (exc.ArgumentError, ValueError):
        raise ValueError(
            "expected postgresql://USER@HOST/DATABASE, got another text (not shown: a password?)"
        ) from None
    if url.get_backend_name() != "postgresql":
        raise ValueError(f"expected a path, sqlite:///PATH or postgresql://…, got {url.drivername}://…")
    return url.set(drivername="postgresql+psycopg")
