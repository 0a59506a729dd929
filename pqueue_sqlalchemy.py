"""The queue on PostgreSQL through SQLAlchemy: the same verbs, states and guarantees, for many machines.

    queue = open_queue("postgresql://user:password@host/database")

The statements are those of pqueue.py; what PostgreSQL says differently is translated here. Claims skip rows that others
have locked. The clock is the server's. A consumer's life hangs on a session that holds an advisory lock; wake-ups come
by NOTIFY to the same session, one per process. Needs SQLAlchemy 2 and psycopg 3.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import lru_cache
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
from pqueue import Job, Params, PersistentQInterface, PersistentQSQLite, QueueBusy, QueueError, QueueFull, Session

log = logging.getLogger("pqueue")

SCHEMA = "pqueue"
CHANNEL = "pqueue"
LOCK_CLASS = 0x7071  # of the advisory locks by which consumers are seen to live
CLOCK_SECONDS = 30.0  # how often the server's clock is read
RETRY_SECONDS = 0.5  # between two attempts of the listener to connect
RESTART_SECONDS = 10.0  # after a restart of the server nobody is taken for dead: locks are being taken anew
KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
# How long the server bears with a host that is cut off: its consumers are not dead, and have their leases.
CUT_OFF = {"keepalives_idle": 60, "keepalives_interval": 15, "keepalives_count": 4}
CUT_OFF_MILLISECONDS = 120_000
LISTEN = f"LISTEN {CHANNEL}"

RING = f"pg_notify('{CHANNEL}', '')"

NAMED = re.compile(r"(?<!:):([a-z_]\w*)")
# A subquery for each queue is LATERAL here: "q CROSS JOIN jobs WHERE … jobs.id IN (SELECT id …)".
PER_QUEUE = re.compile(r"queues q CROSS JOIN jobs WHERE (.*?)jobs\.id IN\s*\(SELECT id(.*?LIMIT :limit)\)", re.DOTALL)
EARLIEST = re.compile(r"SELECT min\((\w+)\) FROM jobs WHERE state = ('\w+')")
# Our statements go through indexes, whatever the statistics say, and by one plan: to plan a claim takes longer than to
# run it, and the planner expects a tenth of the table from LIMIT :limit.
PLANNER = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "enable_sort", "jit")
ALIVE = (
    f"SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND classid = {LOCK_CLASS} AND objsubid = 2 AND granted"
)
WRITING = f"""
SELECT virtualtransaction FROM pg_locks WHERE relation = '{SCHEMA}.jobs'::regclass AND mode = 'RowExclusiveLock'
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
# The second is when a standby last followed the primary whose place it took; NULL: it never was a standby.
UPTIME = """
SELECT EXTRACT(EPOCH FROM clock_timestamp() - greatest(pg_postmaster_start_time(), pg_last_xact_replay_timestamp()))"""


def _setting(values: dict[str, Any], *, for_good: bool) -> str:
    """Return a statement that makes these settings, for the session or for its transaction."""
    return "SELECT " + ", ".join(f"set_config('{name}', '{value}', {not for_good})" for name, value in values.items())


# What is read for the statements after it must stay as it is until they are done; and who was cut off may be back.
ADDED = {
    pqueue.EXPIRED: " FOR UPDATE SKIP LOCKED",
    pqueue.ORPHANED: " FOR UPDATE SKIP LOCKED",
    pqueue.RECORD: " FOR UPDATE",
    pqueue.LEAVE: f" AND (:state = 'stopped' OR slot NOT IN ({ALIVE}))",
}
# A claim reads the attempts of what it takes, as that need not be what was there when others were read before.
BEST = f"candidates ORDER BY {pqueue.ORDER} LIMIT :limit)"
RANKED = "SELECT id, row_number() OVER best AS place, count(*) FILTER (WHERE attempts > 0) OVER best AS again FROM ("
TOGETHER = f"""candidates WINDOW best AS (ORDER BY {pqueue.ORDER} ROWS UNBOUNDED PRECEDING)) ranked
    WHERE place <= :limit AND (place = 1 OR again = 0)))"""
AS_USUAL = _setting({"plan_cache_mode": "auto", **dict.fromkeys(PLANNER, "on")}, for_good=False)


def _replaced(sql: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        if old not in sql:
            raise ValueError(f"expected {old!r} in {sql!r}")
        sql = sql.replace(old, new)
    return sql


# Verbs in one statement, and so in one round trip: an enqueue that rings the bell; completions together with a claim,
# which takes nothing while there is something to recover.

ENQUEUE_AND_RING = f"{pqueue.ENQUEUE}, {RING}"
ENQUEUE_MANY = _replaced(
    pqueue.ENQUEUE,
    (":payload", "substr(CAST(one AS text), 2, length(CAST(one AS text)) - 2)"),
    (
        "FROM queues\n",
        "FROM queues CROSS JOIN json_array_elements(CAST(:payloads AS json)) WITH ORDINALITY AS p (one, n)\n",
    ),
    ("max_pending > (", "max_pending - :number >= ("),
    ("\nON CONFLICT", " ORDER BY n\nON CONFLICT"),
)
COMPLETE_MANY = _replaced(
    f"{pqueue.COMPLETE} RETURNING jobs.id",
    *((f":{name}", f"done.{name}") for name in ("id", "token", "result")),
    (
        "WHERE id",
        """FROM unnest(CAST(:ids AS bigint[]), CAST(:tokens AS text[]), CAST(:results AS text[]))
           AS done (id, token, result) WHERE jobs.id""",
    ),
)
CLAIM_IN_TIME = _replaced(
    pqueue.CLAIM,
    (
        "WHERE state = 'pending' AND id IN",
        f"""WHERE NOT EXISTS (SELECT FROM ({pqueue.OVERDUE}) o (due, expired) WHERE due OR expired)
    AND state = 'pending' AND id IN""",
    ),
)
# A job that has the key already must be neither delivered nor finished before the transaction, which may write for it.
KEEP = f"SELECT 1 FROM jobs WHERE id = :id AND state IN {pqueue.UNFINISHED} FOR SHARE"
TAKE = f"""
WITH taken AS ({CLAIM_IN_TIME})
SELECT set_config('synchronous_commit', 'off', true), taken.* FROM (SELECT) one LEFT JOIN taken ON true"""
EXCHANGE = f"""
WITH done AS ({COMPLETE_MANY}), taken AS ({CLAIM_IN_TIME})
SELECT CASE WHEN (SELECT count(*) FROM done) < :number THEN ARRAY(SELECT id FROM done) END, taken.*
FROM (SELECT) one LEFT JOIN taken ON true"""


@lru_cache(maxsize=256)
def translated(sql: str) -> tuple[bytes, list[str]]:
    """Return a statement of pqueue.py as PostgreSQL has it, and the names of its parameters, $1 first."""
    sql = _in_dialect(sql)
    names = list(dict.fromkeys(NAMED.findall(sql)))
    return NAMED.sub(lambda found: f"${names.index(found[1]) + 1}", sql).encode(), names


def _in_dialect(sql: str) -> str:
    takes = "UPDATE jobs SET state = 'processing'" in sql or sql == pqueue.PRUNABLE
    if sql == pqueue.PROMOTE:
        sql = sql.replace("state = 'scheduled' AND id IN\n    (SELECT", "id = ANY (ARRAY(SELECT")
        sql = sql.replace("LIMIT :limit)", "LIMIT :limit FOR UPDATE SKIP LOCKED))")
    sql += ADDED.get(sql, "")
    sql = PER_QUEUE.sub(r"queues q CROSS JOIN LATERAL (SELECT *\2) jobs WHERE \1 true", sql)
    # A plan is made once, perhaps while jobs are few: it must not be able to go through all that come to a state.
    sql = EARLIEST.sub(r"SELECT (SELECT \1 FROM jobs WHERE state = \2 ORDER BY \1 LIMIT 1)", sql)
    sql = sql.replace("state = 'processing' AND lease_token =", "lease_token =")  # who has one is, by the CHECK
    if takes:
        sql = sql.replace("LIMIT :limit) jobs", "LIMIT :limit FOR UPDATE SKIP LOCKED) jobs")
        sql = sql.replace("LIMIT :limit) mine", "LIMIT :limit FOR UPDATE SKIP LOCKED) mine")
        sql = sql.replace("id IN (SELECT id FROM (", f"id = ANY (ARRAY(SELECT id FROM ({RANKED}").replace(
            BEST, TOGETHER
        )
    return sql


class KeyTaken(QueueBusy):
    """Another transaction, which could not be seen yet, gave the key to an unfinished job."""


class PostgresSession(Session):
    """One thread's connection, from the pool. BEGIN travels with the first statement, NOTIFY with the COMMIT."""

    def __init__(self, queue: OnPostgres) -> None:
        self._queue = queue
        self._begun = False
        self.durable = True
        self.connection = queue._engine.connect()
        self._driver = cast("psycopg.Connection[Any]", self.connection.connection.driver_connection)
        self._said = select.poll()
        self._said.register(self._driver.fileno(), select.POLLIN)
        self._cursor = psycopg.RawCursor(self._driver)
        self._cursor.format = Format.BINARY

    @property
    def busy(self) -> bool:
        return self.depth > 0

    def run(self, sql: str, params: Params = pqueue.NOTHING) -> list[Any]:
        return self._execute(sql, params).fetchall()

    def alone(self, sql: str, params: Params) -> list[Any]:
        """Run a statement that is a transaction by itself."""
        with self:
            if self._queue.pooled:
                return self.run(sql, params)
            text, names = translated(sql)
            with self._queue._telling():
                return self._cursor.execute(text, [params[name] for name in names]).fetchall()

    def change(self, sql: str, params: Params = pqueue.NOTHING) -> int:
        return self._execute(sql, params).rowcount

    def change_many(self, sql: str, rows: list[Params]) -> None:
        self.begin()
        with self._queue._telling():
            text, names = translated(sql)
            self._cursor.executemany(text, [[row[name] for name in names] for row in rows])

    def begin(self) -> None:
        if not self._begun:
            self._begun = True
            with self._queue._telling():
                self._driver.execute("BEGIN")
                if self._queue.pooled:
                    self._driver.execute(_setting(self._queue.settings, for_good=False))
                if not self.durable:
                    self._driver.execute("SET LOCAL synchronous_commit = off")

    def _execute(self, sql: str, params: Params) -> psycopg.Cursor[Any]:
        text, names = translated(sql)
        values = [params[name] for name in names]
        with self._queue._telling():
            if self._begun or not self.busy:
                return self._cursor.execute(text, values)
            with self._driver.pipeline():
                self.begin()
                return self._cursor.execute(text, values)

    def __enter__(self) -> PostgresSession:
        if self.depth:
            self.change("SAVEPOINT nested")
        else:
            self.ring, self.lost, self.tangled, self._begun = False, None, False, False
        self.depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.depth -= 1
        if self.depth:
            self._end_nested(error)
        else:
            self._end(error)

    def _end_nested(self, error: BaseException | None) -> None:
        if self._is_in_transaction():
            if error is not None:
                self.change("ROLLBACK TO nested")
            self.change("RELEASE nested")

    def _end(self, error: BaseException | None) -> None:
        try:
            if error is None and self.lost is None and self._begun:
                self._commit()
        finally:
            self._begun = False
            self._roll_back()
        if error is None and self.lost is not None:
            raise self.lost

    def _commit(self) -> None:
        if not self._is_in_transaction():
            raise QueueError("cannot commit: the transaction was ended inside its block")
        if self._driver.pgconn.transaction_status == TransactionStatus.INERROR:
            raise QueueError("cannot commit: a statement of the transaction failed")
        with self._queue._telling(), self._driver.pipeline():
            if self.ring:
                self._driver.execute(f"NOTIFY {CHANNEL}")
            self._driver.execute("COMMIT")

    def _is_in_transaction(self) -> bool:
        return self._driver.pgconn.transaction_status in (TransactionStatus.INTRANS, TransactionStatus.INERROR)

    def _roll_back(self) -> None:
        if self._driver.pgconn.transaction_status != TransactionStatus.IDLE:
            with suppress(psycopg.Error):
                self._driver.rollback()

    def is_sound(self) -> bool:
        """Return whether the connection is idle and the server has said nothing on it: that would be its good-bye."""
        return self._driver.pgconn.transaction_status == TransactionStatus.IDLE and not self._said.poll(0)

    def end_of_block(self) -> None:
        """Let SQLAlchemy forget the transaction, which has ended without it."""
        with suppress(exc.SQLAlchemyError):
            self.connection.rollback()

    def close(self) -> None:
        with suppress(exc.SQLAlchemyError):
            self.connection.invalidate()
            self.connection.close()

    def disown(self) -> None:
        """In a forked child: leave the parent's connection alone, neither used nor closed."""
        _inherited.append((self.connection, self._driver))
        self._driver = cast("psycopg.Connection[Any]", pqueue.Disowned())


class Line:
    """A process's own session to the server: it hears the bell, and holds the locks of the consumers that live here."""

    def __init__(self, queue: OnPostgres) -> None:
        self._queue = queue
        self._changed = threading.Condition()
        self._rings = 0
        self._numbers: set[int] = set()  # of the locks to hold
        self._connection: psycopg.Connection[Any] | None = None
        self._over = False
        self._cut_at = -math.inf  # monotonic seconds
        self.carries = True  # False: a pooler in between passes on no NOTIFY, and keeps no lock
        self._thread = threading.Thread(target=self._listen, name="pqueue-line", daemon=True)

    def start(self) -> None:
        self.carries = not self._queue.pooled and self._hears_itself()
        if self.carries:
            self._thread.start()
        else:
            log.warning(
                "%s passes on no NOTIFY: consumers look every %g s, leases alone tell who died",
                self._queue.name,
                pqueue.WAIT_SECONDS,
            )

    def _hears_itself(self) -> bool:
        heard: list[psycopg.Notify] = []
        self._connection = self._connect()
        self._connection.add_notify_handler(heard.append)
        with self._queue._write(durable=False) as tx:
            tx.change(f"NOTIFY {CHANNEL}")
        self._connection.execute("SELECT 1")  # before it answers, the server passes on what was said till then
        self._connection.remove_notify_handler(heard.append)
        return bool(heard)

    def hold(self, number: int) -> None:
        """Take a lock, now and after each new connection."""
        self._numbers.add(number)
        self._do("SELECT pg_advisory_lock_shared(%s::int, %s::int)", number)

    def let_go(self, number: int) -> None:
        self._numbers.discard(number)
        self._do("SELECT pg_advisory_unlock_shared(%s::int, %s::int)", number)

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
        if self._thread.is_alive():
            self._thread.join(2)
        if self._connection is not None:
            self._connection.close()

    def _connect(self) -> psycopg.Connection[Any]:
        with ExitStack() as undo:
            connection = self._queue._connect_raw()
            undo.callback(connection.close)
            connection.execute(_setting(_bearing(CUT_OFF_MILLISECONDS, CUT_OFF), for_good=True))
            for number in list(self._numbers):
                connection.execute("SELECT pg_advisory_lock_shared(%s::int, %s::int)", (LOCK_CLASS, number))
            connection.execute(LISTEN)
            undo.pop_all()
        return connection

    def was_cut(self) -> bool:
        """Return whether the connection was lost a moment ago; those of others, then, may not be back yet."""
        return time.monotonic() - self._cut_at < RESTART_SECONDS

    def _listen(self) -> None:
        while not self._over:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                    self._queue._revive()
                self._hear(self._connection)
            except (psycopg.Error, QueueError, OSError):
                self._cut_at = time.monotonic()
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


_queues: weakref.WeakSet[OnPostgres] = weakref.WeakSet()
_inherited: list[Any] = []  # connections that belong to the parent


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

    if TYPE_CHECKING:  # what the two below take

        def __init__(
            self, url: str, *, durability: str = "full", create: bool = True, busy_seconds: float = pqueue.BUSY_SECONDS
        ) -> None: ...


class OnSQLite(PersistentQSQLAlchemy, PersistentQSQLite):
    """`PersistentQSQLite` whose transactions SQLAlchemy can join."""

    def __init__(self, url: str, **options: Any) -> None:
        PersistentQSQLite.__init__(self, pqueue.sqlite_path(url), **options)
        self._over: weakref.WeakKeyDictionary[pqueue.SQLiteSession, sqlalchemy.Connection] = weakref.WeakKeyDictionary()

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:  # type: ignore[override]
        session = self._write()
        if session not in self._over:
            self._over[session] = _over(session.connection)
        try:
            with session, _in_order(session):
                yield self._over[session]
        finally:
            if not session.busy:
                self._over[session].rollback()  # lets SQLAlchemy forget the transaction, which has ended without it


@contextmanager
def _in_order(tx: Session) -> Iterator[None]:
    depth = tx.depth
    try:
        yield
    finally:
        tx.expect_depth(depth)


def _over(connection: sqlite3.Connection) -> sqlalchemy.Connection:
    """Return an SQLAlchemy connection that leaves BEGIN, COMMIT and closing to the owner of this one."""
    return sqlalchemy.create_engine(
        "sqlite://", creator=lambda: connection, poolclass=StaticPool, isolation_level="AUTOCOMMIT"
    ).connect()


class OnPostgres(PersistentQSQLAlchemy):
    """The queue in a PostgreSQL database, in a schema of its own.

    durability: "full" waits until the server has synced; "normal" may lose the last moments if the server crashes.
    create: make the schema where there is none; else raise QueueError.
    busy_seconds: how long to wait for a lock, or for an answer when connecting.
    """

    max_batch = 128  # an enqueue does not wait for the rows that a claim locks
    _LIKE = "ILIKE"

    def __init__(
        self, url: str, *, durability: str = "full", create: bool = True, busy_seconds: float = pqueue.BUSY_SECONDS
    ) -> None:
        PersistentQInterface.__init__(self)
        if durability not in ("full", "normal"):
            raise ValueError(f"expected a durability of full or normal, got {durability!r}")
        self.durability, self._busy_seconds = durability, busy_seconds
        self._milliseconds = int(busy_seconds * 1000)
        self.settings: dict[str, object] = {"search_path": f"{SCHEMA},public", "lock_timeout": self._milliseconds}
        self.settings |= {"plan_cache_mode": "force_generic_plan", **dict.fromkeys(PLANNER, "off")}
        if durability == "normal":
            self.settings["synchronous_commit"] = "off"
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
        self._line: Line | None = None
        self._starting = threading.Lock()
        self._clock = (-CLOCK_SECONDS, 0.0)  # when it was asked, and how far it is ahead, in monotonic seconds
        self._living: tuple[float, set[int] | None] = (0.0, None)
        self._closed = False
        self.pooled = False  # a pooler in between lends a process of the server for a transaction, without our settings
        try:
            self._prepare(create)
        except BaseException:
            self.close()
            raise
        _queues.add(self)

    # Opening

    def _connect_raw(self) -> psycopg.Connection[Any]:
        arguments = {"application_name": "pqueue", "connect_timeout": max(1, int(self._busy_seconds)), **KEEPALIVES}
        arguments["tcp_user_timeout"] = self._milliseconds  # a link that is cut without a word is noticed, too
        connection = psycopg.connect(autocommit=True, **{**arguments, **self._conninfo})
        connection.adapters.register_dumper(int, Int8Dumper)  # one type whatever the value: one prepared statement
        self.pooled = connection.execute("SELECT pg_backend_pid()").fetchone() != (connection.info.backend_pid,)
        connection.prepare_threshold = None if self.pooled else 3
        if not self.pooled:
            connection.execute(_setting(self.settings | _bearing(self._milliseconds, KEEPALIVES), for_good=True))
        return connection

    def _prepare(self, create: bool) -> None:
        """Check whose schema it is, and bring it up to date."""
        version = self._version()
        if version is None and not create:
            raise QueueError(f"no queue at {self.name}: a producer or a consumer creates it")
        if version is not None and version > len(pqueue.MIGRATIONS):
            raise pqueue.SchemaMismatch(
                f"cannot use {self.name}: expected schema {len(pqueue.MIGRATIONS)} or older, got {version}: "
                "use the pqueue that wrote it, or a newer one"
            )
        if version != len(pqueue.MIGRATIONS):
            self._migrate()

    def _version(self) -> int | None:
        found = self._read("SELECT to_regclass(:name)::text", {"name": f"{SCHEMA}.version"})
        if found[0][0] is None:
            return None
        return cast(int, self._read(f"SELECT number FROM {SCHEMA}.version")[0][0])

    def _migrate(self) -> None:
        with self._write() as tx:
            tx.run(f"SELECT pg_advisory_xact_lock({LOCK_CLASS})")
            tx.change(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
            tx.change(f"CREATE TABLE IF NOT EXISTS {SCHEMA}.version (number INTEGER NOT NULL)")
            done = tx.run(f"SELECT number FROM {SCHEMA}.version")
            for migration in islice(pqueue.MIGRATIONS, done[0][0] if done else 0, None):
                for statement in migration:
                    self._define(tx, statement)
            tx.change(f"DELETE FROM {SCHEMA}.version")
            tx.change(f"INSERT INTO {SCHEMA}.version VALUES (:number)", {"number": len(pqueue.MIGRATIONS)})

    def _define(self, tx: PostgresSession, statement: str) -> None:
        identity = "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY"
        tx.change(statement.format(id=identity, float="DOUBLE PRECISION"))
        if "CREATE TABLE jobs" in statement:  # every job is updated at least twice: clean up early, leave room
            hot = "fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0"
            tx.change(f"ALTER TABLE jobs SET ({hot})")

    @contextmanager
    def _telling(self) -> Iterator[None]:
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
        """Return this thread's session, on a sound connection unless it is in a transaction already."""
        if self._closed:
            raise QueueError(f"cannot use {self.name}: this queue object is closed")
        session: PostgresSession | None = getattr(self._local, "session", None)
        while session is None or not (session.busy or session.is_sound()):
            if session is not None:
                session.close()
            with self._telling():
                session = self._local.session = PostgresSession(self)
            self._sessions.add(session)
        return session

    def _write(self, *, durable: bool = True, in_batch: bool = False) -> PostgresSession:  # noqa: ARG002
        session = self._session()
        if not session.busy:
            session.durable = durable
        return session

    def _read(self, sql: str, params: Params = pqueue.NOTHING) -> list[Any]:
        session = self._session()
        if session.busy or not self.pooled:
            return session.run(sql, params)
        with session:  # which brings its settings
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
            self._clock = (ended, ahead)  # at once: other threads look, too
        return time.monotonic() + ahead

    def _add(self, row: Params) -> int:
        if not self.in_transaction:
            rows = self._write().alone(ENQUEUE_AND_RING, row)
            return cast(int, rows[0][0]) if rows else super()._add(row)
        job_id = super()._add(row)
        while row["key"] and not self._read(KEEP, {"id": job_id}):
            job_id = super()._add(row)
        return job_id

    def _add_many(self, row: Params) -> list[int]:
        rows = [] if self.in_transaction else self._write().alone(f"{ENQUEUE_MANY}, {RING}", row)
        return sorted(row[0] for row in rows) if rows else super()._add_many(row)

    def _insert_many(self, tx: Session, row: Params) -> list[int]:
        rows = tx.run(ENQUEUE_MANY, row)
        if len(rows) < row["number"]:
            raise QueueFull(f"cannot enqueue: others filled queue {row['queue']!r} at the same moment")
        return sorted(row[0] for row in rows)

    def resubmit(self, job_id: int, *, by: str | None = None, now: float | None = None) -> None:
        """As everywhere. An enqueue of the same moment, which took the key, is seen when it looks again."""
        try:
            super().resubmit(job_id, by=by, now=now)
        except KeyTaken:
            super().resubmit(job_id, by=by, now=now)

    def pause(self, queue: str) -> None:
        """As everywhere. Claims that began before, and did not see it, have ended when it returns."""
        super().pause(queue)
        until = time.monotonic() + self._busy_seconds * (not self.in_transaction)
        under_way = set(self._read(WRITING))
        while (under_way := under_way.intersection(self._read(WRITING))) and time.monotonic() < until:
            time.sleep(0.01)

    def _exchange(
        self,
        settled: list[tuple[Job, str | None]],
        me: pqueue.Registration,
        limit: int,
        queues: Sequence[str] | None,
        lease_seconds: float,
        now: float | None,
    ) -> tuple[list[Job], list[Job]]:
        """Do it in one round trip, unless it is time to look for the dead, or there is something to recover."""
        settled = sorted(settled, key=lambda done: done[0].id)  # whoever locks several jobs does it in this order
        tokens = {job.id: job.lease_token for job, _ in settled}
        looks = time.monotonic() - self._looked_for_dead >= pqueue.DEAD_CHECK_SECONDS
        if limit == 0 or looks or self.in_transaction or len(tokens) < len(settled):
            return super()._exchange(settled, me, limit, queues, lease_seconds, now)
        now = self._time(now)
        claim = pqueue.claim_params(me, limit, queues, lease_seconds, now)
        sql = pqueue.serving(EXCHANGE if settled else TAKE, queues)
        done = {"number": len(tokens), "ids": list(tokens), "tokens": list(tokens.values())}
        rows = self._write().alone(sql, {**claim, **done, "results": [result for _, result in settled]})
        with self._write() as tx:
            jobs = pqueue.claimed_jobs(tx, [row[1:] for row in rows if row[1] is not None], claim)
        lost = [job for job, _ in settled if rows[0][0] is not None and job.id not in rows[0][0]]
        with suppress(QueueBusy) if settled else nullcontext():  # which may not hide what was completed
            jobs = jobs or super()._exchange([], me, limit, queues, lease_seconds, now)[0]
        return jobs, lost

    def _open_line(self) -> Line:
        with self._starting:
            if self._line is None:
                line = Line(self)
                try:
                    with self._telling():
                        line.start()
                except BaseException:
                    line.close()
                    raise
                self._line = line
            return self._line

    def _take_slot(self) -> Place | None:
        line = self._open_line()
        if not line.carries:
            return None
        number = secrets.randbelow(2**31 - 1)
        line.hold(number)
        return Place(line, number)

    def _is_alive(self, slot: int | None) -> bool:
        if slot is None:
            return True
        at, living = self._living
        unknown = living is not None and slot not in living  # perhaps taken since
        if unknown or time.monotonic() - at > pqueue.DEAD_CHECK_SECONDS / 2:
            started = float(self._read(UPTIME, {})[0][0])
            rows = self._read(ALIVE)
            recently = started < RESTART_SECONDS or (self._line and self._line.was_cut())
            living = None if recently else {int(row[0]) for row in rows}
            self._living = (time.monotonic(), living)
        return living is None or slot in living

    def _revive(self) -> None:
        """After a lost connection others may have taken our consumers for dead: they live."""
        for me in list(self._registry.values()):
            with self._write(durable=False) as tx:
                tx.change("UPDATE consumers SET state = 'running' WHERE token = :token", {"token": me.token})

    def _sleep(self, me: pqueue.Registration, seconds: float, due_in: Callable[[], float]) -> bool:  # noqa: ARG002
        def due_at_first() -> float:  # when it is due again, it is not to be had: somebody's transaction has locked it
            left = due_in()
            self._local.was_due = left <= 0 and not getattr(self._local, "was_due", False)
            return left if left > 0 or self._local.was_due else pqueue.POLL_SECONDS

        return self._open_line().wait(seconds, due_at_first)

    @property
    def in_transaction(self) -> bool:
        session: PostgresSession | None = getattr(self._local, "session", None)
        return session is not None and session.busy

    @contextmanager
    def transaction(self) -> Iterator[sqlalchemy.Connection]:
        session = self._write()
        try:
            with session as tx, _in_order(tx):
                tx.run(AS_USUAL)  # the statements in it are not ours
                yield tx.connection
        finally:
            if not session.busy:
                session.end_of_block()

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a copy, as of one moment, that is a queue on SQLite: `open_queue(path)` opens it."""
        target = pqueue.file_path(path)
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
        return [row[0] for row in self._read(sql, {"schema": SCHEMA}) if row[0] not in (*pqueue.TABLES, "version")]

    def _lock_out_writers(self, tx: Session) -> None:
        tx.change("LOCK TABLE jobs IN EXCLUSIVE MODE")  # that every writer needs; one lock makes no deadlock

    def _lock_jobs(self, tx: Session, job_ids: list[int]) -> None:
        tx.run("SELECT id FROM jobs WHERE id = ANY (CAST(:ids AS bigint[])) ORDER BY id FOR UPDATE", {"ids": job_ids})

    def _number_on(self, tx: Session) -> None:
        for table in ("jobs", "history"):
            highest = f"(SELECT coalesce(max(id), 0) + 1 FROM {table})"
            tx.run(f"SELECT setval(pg_get_serial_sequence('{SCHEMA}.{table}', 'id'), {highest}, false)")

    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        expected: dict[str, Any] = {"fsync": "on", "full_page_writes": "on", "transaction_read_only": "off"}
        if self.durability == "full":
            expected["synchronous_commit"] = "on"
        facts: dict[str, Any] = {"path": self.name, "durability": self.durability, "user_version": self._version()}
        for setting in ("server_version", "synchronous_commit", *expected):
            facts[setting] = self._read(f"SHOW {setting}")[0][0]
        if thorough:
            facts["file_bytes"] = self._read("SELECT pg_database_size(current_database())")[0][0]
        expected["user_version"] = len(pqueue.MIGRATIONS)
        facts["problems"] = [
            f"expected {name} {value}, got {facts[name]}" for name, value in expected.items() if facts[name] != value
        ]
        return facts

    def close(self) -> None:
        if self._registry and not self._closed:
            with suppress(QueueBusy):
                self._leave()
        if self._line is not None:
            self._line.close()
        for session in list(self._sessions):
            session.close()
        self._engine.dispose()
        self._local = threading.local()
        self._line = None
        self._closed = True

    def _after_fork(self) -> None:
        """Reconnect in the child: the sockets belong to the parent."""
        for session in list(self._sessions):
            session.disown()
        self._engine.dispose(close=False)
        PersistentQInterface.__init__(self)
        _inherited.append(self._line)
        self._sessions, self._local = weakref.WeakSet(), threading.local()
        self._line, self._starting = None, threading.Lock()


def _bearing(milliseconds: int, keepalives: dict[str, int]) -> dict[str, object]:
    """Return the server's settings for how long it bears with a silent client."""
    return {"tcp_user_timeout": milliseconds, **{f"tcp_{name}": value for name, value in keepalives.items()}}


def _conninfo(url: str) -> dict[str, Any]:
    """Return what libpq reads in a URL: one host or several, target_session_attrs and the like."""
    scheme, _, rest = url.partition("://")
    with suppress(psycopg.Error):
        parts = psycopg.conninfo.conninfo_to_dict(f"postgresql://{rest}")
        ports = str(parts.get("port") or "5432").split(",")
        # A password with a / or ? that is not percent-encoded is cut there.
        cut = "@" in f"{parts.get('host')} {parts.get('dbname')}"
        known = scheme in ("postgresql", "postgresql+psycopg", "postgres")
        if known and not cut and all(port.isdigit() for port in ports):
            return dict(parts)
    raise ValueError("expected postgresql://USER@HOST:PORT/DATABASE, got another text (not shown: a password?)")
