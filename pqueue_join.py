"""Enqueueing within a transaction of the application's own connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from pqueue_backend import Joined
from pqueue_files import identity
from pqueue_locks import ConsumerLocks
from pqueue_schema import TABLES
from pqueue_values import NO_PARAMS, Params, QueueError, ids_up_to, short


def driver_connection(connection: Any) -> Any:
    """Return the driver's connection of a Session or Connection of SQLAlchemy, whose transaction this begins."""
    if any(each.__name__.startswith("Async") for each in type(connection).__mro__):  # of SQLAlchemy or psycopg
        raise ValueError(f"expected a synchronous connection or Session, got {short(connection)}")
    try:
        if callable(getattr(connection, "get_bind", None)):  # a Session
            connection = connection.connection()
        if not callable(getattr(connection, "exec_driver_sql", None)):
            return connection
        if not connection.in_transaction():
            connection.begin()  # otherwise its commit would do nothing
        return connection.connection.driver_connection
    except Exception as error:  # SQLAlchemy's, which this module does not import
        raise QueueError(f"cannot join {short(connection)}: {error}") from error


class JoinedSQLite(Joined):
    """A session within a transaction of an `sqlite3.Connection`."""

    def __init__(
        self, connection: Any, error: Callable[[sqlite3.Error], QueueError], consumer_locks: ConsumerLocks | None
    ) -> None:
        if not isinstance(connection, sqlite3.Connection):
            raise ValueError(
                "expected an sqlite3.Connection, or a Session or Connection of SQLAlchemy on SQLite, "
                f"got {short(connection)}"
            )
        self.connection, self._error, self._consumer_locks, self.finished = connection, error, consumer_locks, []

    def begin(self, path: Path, database: tuple[int, int] | None, durability: str) -> None:
        """Expect a connection to this database that can write, and begin its transaction unless it has begun."""
        file = next((row[2] for row in self.run("PRAGMA database_list") if row[1] == "main"), "")
        found = None
        with suppress(OSError):
            found = identity(file) if file else None
        # guard: a connection to another file is not joined
        if found is None or found != database:
            raise QueueError(f"cannot join: expected a connection to {path}, got one to {file or 'memory'}")
        if shadows := self.run(f"SELECT name FROM temp.sqlite_master WHERE name IN {TABLES}"):
            raise QueueError(f"cannot join: the connection has a temporary table {shadows[0][0]!r}, which hides ours")
        # guard: a joined enqueue is synced
        if durability == "full" and self.run("PRAGMA synchronous")[0][0] < 2:
            raise QueueError(
                "cannot join: a power cut could undo commits of this connection: run PRAGMA synchronous = FULL on it, "
                "outside a transaction, or open the queue with durability='normal'"
            )
        if not self.connection.in_transaction:
            # guard: a job is not committed before its transaction
            if self.connection.isolation_level is None or getattr(self.connection, "autocommit", None) is True:
                raise QueueError("cannot join: the connection commits each statement by itself: execute BEGIN first")
            self.run("BEGIN IMMEDIATE")
        self.change("UPDATE queues SET paused = paused WHERE false")  # fails if the connection is read-only

    def leave(self) -> None:
        if self._consumer_locks and self.wakes:
            self._consumer_locks.expect_joined()

    def _execute(self, sql: str, params: Params, read: Callable[[sqlite3.Cursor], Any]) -> Any:
        try:
            text_factory = self.connection.text_factory
            self.connection.text_factory = str  # as the queue expects; a row_factory does not apply to this cursor
            try:
                return read(sqlite3.Cursor(self.connection).execute(sql, params))
            finally:
                self.connection.text_factory = text_factory
        except sqlite3.Error as error:
            raise self._error(error) from error

    def run(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        return cast("list[Any]", self._execute(sql, params, sqlite3.Cursor.fetchall))

    read = run

    def change(self, sql: str, params: Params = NO_PARAMS) -> int:
        return cast(int, self._execute(sql, params, attrgetter("rowcount")))

    def insert(self, sql: str, params: Params) -> list[int]:
        ids = self._execute(sql, params, lambda cursor: ids_up_to(cursor.lastrowid or 0, cursor.rowcount))
        self.wakes = self.wakes or bool(ids)
        return cast("list[int]", ids)

    @property
    def has_ended(self) -> bool:
        try:
            return not self.connection.in_transaction
        except sqlite3.ProgrammingError:  # the application has closed it
            return True

    def _wake(self) -> None:
        """Do nothing: the job or its result is not visible yet."""

    _wake_waiters = _wake
