"""Connections to a PostgreSQL server: the URL, the settings of a session, a pool, and what a failure means."""

from __future__ import annotations

import os
import re
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import psycopg
import sqlalchemy
from psycopg.pq import Format, TransactionStatus
from sqlalchemy import exc

from pqueue_postgres import DEFAULT_SCHEMA
from pqueue_sqlite import ClosedInFork
from pqueue_values import NoConnection, QueueBusy, QueueError

if TYPE_CHECKING:
    from pqueue_listener import ListenConnection

MAX_CONNECTIONS = 20  # of one queue object; see `max_connections` in a URL
IDLE_SECONDS = 30.0  # an idle connection is closed after that, except the one that listens
PATIENCE_SECONDS = 0.01  # how long to wait for another's connection: opening one takes as long

# Settings of a session ################################################################################################

# Our statements always use indexes and a generic plan: planning a claim takes longer than executing it, and the planner
# assumes that LIMIT :limit returns a tenth of the table.
PLANNER = ("enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "enable_sort", "jit")
# Time limits of the role that would end a claim, a wait for a lock, or the connection that shows that a consumer is
# alive; lock_timeout bounds each wait. Each with the first version of the server that has it.
TIME_LIMITS = {
    "statement_timeout": 0,
    "idle_in_transaction_session_timeout": 0,
    "idle_session_timeout": 14_00_00,
    "transaction_timeout": 17_00_00,
}
# Settings that our statements rely on, whatever the server, the database or the role have.
NEEDED = {
    "search_path": "pg_catalog, pg_temp",  # our statements name their schema
    "default_transaction_isolation": "read committed",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "row_security": "on",
    "exit_on_error": "off",
    "plan_cache_mode": "force_generic_plan",
    **dict.fromkeys(("enable_indexscan", "enable_indexonlyscan", "enable_nestloop", "enable_tidscan"), "on"),
    **dict.fromkeys(PLANNER, "off"),
}
# Of these, the statements of the application in `transaction` get the values that the role has.
OF_THE_ROLE = ("search_path", "plan_cache_mode", *PLANNER, *TIME_LIMITS)
KEEPALIVES = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
# Any value other than off waits for the server's disk; they differ in how they treat standbys.
# (Functions are named in full where the role's search_path is in effect.)
SYNCED = (
    "pg_catalog.set_config('synchronous_commit', pg_catalog.replace(pg_catalog.current_setting('synchronous_commit'), "
    "'off', 'on'), {})"
)
NOT_SYNCED = "pg_catalog.set_config('synchronous_commit', 'off', {})"
UNLOCK_ALL = "SELECT pg_catalog.pg_advisory_unlock_all()"  # a rollback does not do that
# Undo what the application's statements may have left in the session. In the transaction, so that a rollback, which
# undoes their settings, needs nothing. Deferred triggers run first: they may rely on the settings.
RESTORE = (
    "SET CONSTRAINTS ALL IMMEDIATE",
    "RESET SESSION AUTHORIZATION",
    "RESET ROLE",
    "RESET ALL",
    "CLOSE ALL",
    "UNLISTEN *",
    "DISCARD TEMP",
    UNLOCK_ALL,
)


def setting(values: dict[str, Any], *, for_good: bool) -> str:
    """Return a statement that sets these for the session (for_good) or for the transaction."""
    return "SELECT " + ", ".join(
        f"pg_catalog.set_config('{name}', {psycopg.sql.quote(str(value))}, {not for_good})"
        for name, value in values.items()
    )


def timeout_settings(milliseconds: int, keepalives: dict[str, int]) -> dict[str, object]:
    """Return the server's settings for how long it keeps the connection of an unreachable client."""
    return {"tcp_user_timeout": milliseconds, **{f"tcp_{name}": value for name, value in keepalives.items()}}


class Settings:
    """The settings of a session, or behind a pooler of a transaction, on a server of this version."""

    def __init__(self, durability: str, milliseconds: int, server_version: int) -> None:
        limits = [name for name, since in TIME_LIMITS.items() if server_version >= since]
        values = {**NEEDED, **dict.fromkeys(limits, "0"), "lock_timeout": milliseconds}
        synced = SYNCED if durability == "full" else NOT_SYNCED
        lasting = values | timeout_settings(milliseconds, KEEPALIVES)
        self.of_session = f"{setting(lasting, for_good=True)}, {synced.format(False)}"
        self.of_transaction = f"{setting(values, for_good=False)}, {synced.format(True)}"
        self.synced = f"SELECT {synced.format(True)}"
        # Gives the application, for a transaction, the settings of its role
        self.for_application = "; ".join(f"SET LOCAL {name} TO DEFAULT" for name in OF_THE_ROLE if name in values)


# The URL ##############################################################################################################


class ParsedURL(NamedTuple):
    """The parts of a URL."""

    conninfo: dict[str, Any]  # libpq's connection parameters
    schema: str
    max_connections: int

    @property
    def name(self) -> str:
        """The hosts with their ports, or the service, and the database, without the password; the schema, unless it is
        the default."""
        given = self.conninfo
        service = given.get("service") or os.environ.get("PGSERVICE")
        hosts = str(given.get("host") or given.get("hostaddr") or os.environ.get("PGHOST") or "").split(",")
        ports = str(given.get("port") or os.environ.get("PGPORT") or "").split(",")
        shown = ["" if port in ("", "5432") else f":{port}" for port in ports] * (len(hosts) if len(ports) == 1 else 1)
        host = ",".join((name or "localhost") + port for name, port in zip(hosts, shown, strict=False))
        if service and hosts == [""]:
            host = f"service {service}"
        schema = "" if self.schema == DEFAULT_SCHEMA else f"?schema={self.schema}"
        return f"{host}/{given.get('dbname') or os.environ.get('PGDATABASE', '')}{schema}"


def parse_url(url: str) -> ParsedURL:
    """Parse a postgresql:// URL. Raises ValueError, without the URL, which may contain a password."""
    scheme, _, rest = url.strip().partition("://")  # a file of a secret often ends with a newline
    if scheme.startswith("postgresql+") and scheme != "postgresql+psycopg":
        raise ValueError(f"expected postgresql:// or postgresql+psycopg://, got the driver {scheme[11:][:40]!r}")
    rest, _, query = rest.partition("?")
    own, kept = {"schema": DEFAULT_SCHEMA, "max_connections": str(MAX_CONNECTIONS)}, []
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name in own:
            own[name] = unquote(value)
        else:
            kept.append(part)
    schema, most = own["schema"], own["max_connections"]
    if not re.fullmatch("(?!pg_|information_schema$)[A-Za-z_][A-Za-z0-9_-]{0,62}", schema):
        raise ValueError(
            "expected a schema of at most 63 letters, digits, _ and -, not pg_… or information_schema, got "
            f"{schema[:80]!r}"
        )
    if not re.fullmatch("[0-9]{1,5}", most) or int(most) < 2:
        raise ValueError(f"expected max_connections of at least 2, got {most[:40]!r}")
    return ParsedURL(_conninfo(scheme, rest + "?" * bool(kept) + "&".join(kept)), schema, int(most))


def _conninfo(scheme: str, rest: str) -> dict[str, Any]:
    """Return libpq's connection parameters from the rest of a URL, which may name several hosts."""
    try:
        parts = psycopg.conninfo.conninfo_to_dict(f"postgresql://{rest}")
    except psycopg.Error as error:
        if unknown := re.search(r'invalid URI query parameter: "(\w{1,40})"', str(error)):
            raise ValueError(
                f"expected a parameter of libpq, or schema or max_connections, in the URL, got {unknown[1]!r}"
            ) from None
        parts = {"host": "@"}
    ports = str(parts.get("port") or "5432").split(",")
    # A / or ? in a password must be percent-encoded, or libpq ends the password there.
    cut = "@" in f"{parts.get('host')} {parts.get('dbname')}"
    known = scheme in ("postgresql", "postgresql+psycopg", "postgres")
    if known and not cut and all(port.isdigit() for port in filter(None, ports)):
        return dict(parts)
    raise ValueError("expected postgresql://USER@HOST:PORT/DATABASE, got another text (not shown: a password?)")


# Failures to connect ##################################################################################################

# The server or libpq says these while a server starts, stops, is full or away. (libpq gives no SQLSTATE.)
PASSING = re.compile(
    r"starting up|shutting down|recovery|too many|slots are reserved|refused\b(?! by)|timeout expired|timed out|closed"
    r"|reset|EOF|unreachable|resolve|terminat|session is( not)? read-only|in hot standby"
    r"|failed: No such file or directory$"
)
LASTING = re.compile(
    r"SSL|certificate|GSS|password|authentication|pg_hba|invalid|bad value|unrecognized|unsupported|not supported"
    r"|[Pp]ermission denied|could not parse|not permitted|not currently accepting|definition of service|channel binding"
    r'|(database|role|user) ".*" does not exist|service file|could not access file|no such (database|user)|config error'
    r"|requires a value|cannot be (changed|set|mixed)|may not be used|could not match|too long|more than once"
    r"|only supports|private key|requirepeer|codec"
)


def answers(error: Exception) -> list[str]:
    """Return what each host answered, with its address and port."""
    text = str(error).strip()
    _, _, several = text.partition("All failures were:\n")
    # libpq tries the hosts of a service, and a host with and without TLS: its first answer says why.
    of_libpq = [text.split("\n")[0], *re.findall("^connection to server .*", text, re.MULTILINE)]
    found = re.findall(r"^- (host: .*)", several, re.MULTILINE) or of_libpq
    said = [re.sub("^(host: .*?: )?(connection failed: )?(?=connection (to|is) )", "", each) for each in found]
    return list({each.partition(" failed: ")[0]: each for each in said[::-1]}.values())[::-1]


def unresolved(hosts: str) -> list[str]:
    """Return an answer for each of several hosts without an address, which the driver passes over."""
    said = []
    for host in hosts.split(",") if "," in hosts else ():
        try:
            if host and not host.startswith("/"):
                socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            said.append(f"failed to resolve host {host!r}: {error}")
    return said


def connection_error(name: str, error: Exception, hosts: str = "") -> QueueError:
    """Return the QueueBusy or, if another attempt cannot help, the QueueError for a failure to connect."""
    said = answers(error) + unresolved(hosts)
    text = "; ".join(dict.fromkeys(said)) or type(error).__name__
    without_names = [re.sub("\"[^\"]*\"|'[^']*'", '""', each) for each in said]  # a database may be called "closed"
    if all(LASTING.search(each) and not PASSING.search(each) for each in without_names):
        pgconn = getattr(error, "pgconn", None)
        if "no password" in text or (pgconn and pgconn.needs_password and "password" in text):
            return QueueError(
                f"cannot open {name}: the server expects a password, and none was found: set PGPASSWORD, or add a "
                "line to ~/.pgpass, which only its owner may read"
            )
        if "password authentication failed" in text:
            return QueueError(f"cannot open {name}: user or password refused: {text}")
        return QueueError(f"cannot open {name}: {text}")
    is_full = all(
        re.search("too many (clients|connections)|slots are reserved|no more connections", each)
        for each in without_names
    )
    return (NoConnection if is_full else QueueBusy)(f"cannot reach {name}: {text}")


# Connections ##########################################################################################################


class Link:
    """A connection with our settings. Behind a pooler, these are those of each transaction."""

    def __init__(self, driver: psycopg.Connection[Any], settings: Settings, *, pooled: bool) -> None:
        self.driver = driver
        self.cursor = psycopg.RawCursor(driver)
        self.cursor.format = Format.BINARY
        self.used_at = time.monotonic()
        self.search_path = ""  # of the role; the application may change it
        self.is_stale = False  # another one is to take its place
        self.connection: sqlalchemy.Connection | None = None  # of SQLAlchemy, when the application has used it
        self._poll = select.poll()
        self._poll.register(driver.fileno(), select.POLLIN)
        if not pooled:
            self.note_path()
            driver.execute(settings.of_session)

    def note_path(self) -> None:
        """Read the search_path of the role, which the statements of the application have."""
        sql = "SELECT pg_catalog.convert_to(pg_catalog.current_setting('search_path'), 'UTF8')"  # whatever the encoding
        with self.driver.cursor(row_factory=psycopg.rows.scalar_row) as cursor:
            self.search_path = bytes(cursor.execute(sql).fetchone() or b"").decode()

    def send(self, *commands: str) -> None:
        """Execute commands in one round trip."""
        self.driver.execute("; ".join(commands), prepare=False)

    @property
    def status(self) -> int:
        return self.driver.pgconn.transaction_status

    def is_usable(self) -> bool:
        """Return whether the connection is idle and the server has sent nothing, such as a shutdown notice."""
        return self.status == TransactionStatus.IDLE and not self.is_stale and not self._poll.poll(0)

    @contextmanager
    def ours(self) -> Iterator[None]:
        """Execute statements of ours, whatever the application has set in its transaction: with texts in UTF-8, and
        without functions or operators that its search_path puts before those of PostgreSQL."""
        if self.driver.pgconn.parameter_status(b"client_encoding") != b"UTF8":
            self.driver.execute("SET client_encoding = 'UTF8'")
        reported = self.driver.pgconn.parameter_status(b"search_path")  # since PostgreSQL 18
        path = self.search_path if reported is None else reported.decode()
        is_shadowed = "pg_catalog" in path and not path.startswith("pg_catalog")
        if is_shadowed:
            self.driver.execute(setting({"search_path": NEEDED["search_path"]}, for_good=False))
        # In the application's pipeline, results would come later: a nested pipeline reads them when it ends.
        with self.driver.pipeline() if self.driver.pgconn.pipeline_status else nullcontext():
            yield
        if is_shadowed:
            self.driver.execute(setting({"search_path": path}, for_good=False))

    def receive(self) -> None:
        """Read what the server has sent. The driver calls its handlers of notifications."""
        self.driver.pgconn.consume_input()
        self.dispatch()

    def dispatch(self) -> None:
        """Call the handlers of the notifications that were received along with an answer."""
        while found := self.driver.pgconn.notifies():
            if self.driver.pgconn.notify_handler:
                self.driver.pgconn.notify_handler(found)

    def forget_plans(self) -> None:
        """Undo the transaction, if any, and prepare all statements again, which the driver does after a rollback."""
        if self.status == TransactionStatus.IDLE:
            self.driver.execute("BEGIN")
        self.driver.rollback()

    def close(self) -> None:
        with suppress(exc.SQLAlchemyError):
            if self.connection is not None:
                self.connection.invalidate()
                self.connection.close()
        with suppress(psycopg.Error):
            self.driver.close()


class ListenLink(Link):
    """The connection that listens. Every user of it reads the notifications that arrive."""

    def is_usable(self) -> bool:
        with suppress(psycopg.Error):
            if self._poll.poll(0):
                self.receive()
            return self.status == TransactionStatus.IDLE and not self.is_stale
        return False


class Pool:
    """The connections of a queue object. A thread takes one for each outermost transaction.

    The connection that listens is lent for our own short statements: an idle consumer needs no other.
    """

    def __init__(self, name: str, most: int, seconds: float, connect: Callable[[], Link]) -> None:
        self._name, self._most, self._seconds, self._connect = name, most, seconds, connect
        self._changed = threading.Condition()
        self._free: list[Link] = []  # the one used last at the end
        self._open = 0  # connections that are open or being opened
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._refusal: tuple[float, QueueError | None] = (0.0, None)  # until when not to try to open another, and why
        self._closed = False

    # The connection that listens, if it may be lent

    listening: Link | None = None
    _is_lent = False
    _lender: ListenConnection

    def lend(self, link: Link, lender: ListenConnection) -> None:
        """Let threads use the connection that listens."""
        with self._changed:
            self.listening, self._is_lent, self._lender = link, False, lender
            self._open += 1
            self._links.add(link)
            self._changed.notify_all()

    def recall(self) -> None:
        """Stop lending the connection that listens."""
        with self._changed:
            if self.listening is not None:
                self.listening, self._open = None, self._open - (not self._is_lent)
                self._changed.notify_all()

    def take(self, *, for_application: bool = False, only: Link | None = None, seconds: float | None = None) -> Link:
        """Return a connection for this thread alone. Wait for one if there are as many as there may be.

        for_application: one that does not listen. only: this one. seconds: how long to wait. Raises QueueBusy.
        """
        until = time.monotonic() + (self._seconds if seconds is None else seconds)
        patience = time.monotonic() + PATIENCE_SECONDS
        while True:
            with self._changed:
                link = self._find(for_application, only)
                if link is None and not self._may_open(patience, for_application, only):
                    self._wait(until, patience)
                    continue
                self._open += link is None
            if link is None:
                link = self._new(until)
            elif not link.is_usable():
                self.discard(link)
                link = None
            if link is not None:
                return link

    def take_if_free(self, link: Link) -> bool:
        """Take the connection that listens, unless it is lent."""
        with self._changed:
            return self._find(for_application=False, only=link) is link

    def _find(self, for_application: bool, only: Link | None) -> Link | None:
        if self._closed:
            raise QueueError(f"cannot use {self._name}: this queue object is closed")
        if only is not None and only is not self.listening:
            raise QueueBusy(f"cannot reach {self._name}: the connection was lost")
        if self.listening is not None and not self._is_lent and not for_application:
            self._is_lent = True
            self._lender.on_loan(self.listening)
            return self.listening
        return self._free.pop() if self._free and only is None else None

    def _may_open(self, patience: float, for_application: bool, only: Link | None) -> bool:
        others = self._open - (for_application and self.listening is not None)
        now = time.monotonic()
        return (
            only is None
            and self._open < self._most
            and now >= self._refusal[0]
            and (others == 0 or now >= patience)  # another thread may be about to return one
        )

    def _wait(self, until: float, patience: float) -> None:
        now = time.monotonic()
        if now >= until:
            refusal = self._refusal[1] if now < self._refusal[0] + self._seconds else None
            if refusal:  # as QueueBusy: this process has other connections
                raise QueueBusy(str(refusal))
            raise QueueBusy(
                f"cannot use {self._name}: {self._open} connections of this process are in use, of at most "
                f"{self._most}: end transactions sooner, or set max_connections in the URL"
            )
        self._changed.wait((patience if now < patience else min(until, now + 0.1)) - now)

    def _new(self, until: float) -> Link | None:
        """Open a connection. If the server has none left, but we have others, return None: wait for one."""
        try:
            link = self._connect()
        except BaseException as error:
            with self._changed:
                self._open -= 1
                self._changed.notify()
                if self._open and isinstance(error, QueueBusy) and time.monotonic() < until:
                    self._refusal = (time.monotonic() + 1.0, error)
                    return None
            raise
        with self._changed:
            self._links.add(link)
        return link

    def give_back(self, link: Link) -> None:
        """Return a connection to the pool, or close it if it is not usable any more."""
        link.used_at = time.monotonic()
        if link.status != TransactionStatus.IDLE or self._closed:
            self.discard(link)
            return
        with self._changed:
            if link is self.listening:
                self._is_lent = False
                self._lender.on_return(link)
            else:
                self._free.append(link)
            self._changed.notify()
        if self._free and link.used_at - self._free[0].used_at > IDLE_SECONDS:
            self.close_idle(IDLE_SECONDS)

    def discard(self, link: Link) -> None:
        """Close a connection that this thread has taken."""
        link.close()
        with self._changed:
            self._open -= 1
            if link is self.listening:
                self.listening = None
                self._lender.interrupt()
            self._changed.notify()

    def reserve(self, number: int) -> None:
        """Keep this many idle connections or, if the server has no more, none. Raises QueueBusy at once.

        Programs that each kept one and waited for a second one would wait for each other.
        """
        taken: list[Link] = []
        try:
            while len(taken) < number:
                taken.append(self._take_free() or self._add())
        except BaseException:
            for link in taken:
                self.discard(link)
            raise
        self.close_idle(0)
        for link in taken:
            self.give_back(link)

    def take_over(self) -> Link | None:
        """Return a free connection, if there is one, which is no longer the pool's; close the others."""
        link = self._take_free()
        if link is not None and link.connection is not None:  # SQLAlchemy has it, too
            self.discard(link)
            link = None
        if link is not None:
            with self._changed:
                self._links.discard(link)
                self._open -= 1
        self.close_idle(0)
        return link

    def _take_free(self) -> Link | None:
        while True:
            with self._changed:
                link = self._free.pop() if self._free else None
            if link is None or link.is_usable():
                return link
            self.discard(link)

    def _add(self) -> Link:
        link = self._connect()
        with self._changed:
            self._links.add(link)
            self._open += 1
        return link

    def renew(self) -> None:
        """Replace each connection the next time that it is taken."""
        for link in list(self._links):
            link.is_stale = True

    def close_idle(self, seconds: float) -> None:
        """Close the connections that no thread has used for this long."""
        before = time.monotonic() - seconds
        with self._changed:
            idle = [link for link in self._free if link.used_at <= before]
            self._free = [link for link in self._free if link not in idle]
            self._open -= len(idle)
        for link in idle:
            link.close()

    def close(self) -> None:
        """Close all connections, including those in use."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for link in list(self._links):
            link.close()

    def disown(self) -> list[Any]:
        """In a forked child: return all connections, which must be neither used nor closed."""
        kept: list[Any] = []
        for link in list(self._links):
            kept.append((link.connection, link.driver, link.cursor))
            link.driver = ClosedInFork()  # type: ignore[assignment]
        return kept
