"""The base of all backends: sessions, wake-up, liveness, backup and check, and recording what operators do."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, TypeVar
from weakref import WeakSet

from pqueue_schema import ADD_QUEUE, RECORD_OPERATION, UNLISTED
from pqueue_tasks import actor
from pqueue_values import NO_PARAMS, LeaseLost, Params, QueueError, finite, valid_filter, valid_name

SomeBackend = TypeVar("SomeBackend", bound="Backend")
SomeSession = TypeVar("SomeSession", bound="Session")


class Session(ABC):
    """One thread's connection. As a context manager it is a transaction or, inside one, a savepoint."""

    wakes = False  # a job became pending or scheduled: wake consumers after the commit
    finished: list[int]  # jobs that finished: wake those who wait for their results after the commit
    lost: LeaseLost | None = None  # a lease was lost: the outermost transaction rolls back and raises this
    depth = 0  # nesting depth of transactions
    misnested = False  # a block ended before one inside it: it must roll back, too
    blocks = 0  # of user code: those of `user_transaction` that have not ended
    thread = 0  # that uses it
    busy = False  # a statement that is its own transaction is under way; on SQLite, also if another transaction is

    @abstractmethod
    def run(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        """Execute a statement with :named parameters and return all rows."""

    @abstractmethod
    def change(self, sql: str, params: Params = NO_PARAMS) -> int:
        """Execute a statement and return the number of rows it changed."""

    def change_many(self, sql: str, rows: list[Params]) -> None:
        """Execute a statement once per row."""
        for row in rows:
            self.change(sql, row)

    def set_columns(self, table: str, name: str, **columns: Any) -> None:
        """Set columns of the row of this name: of a queue or a schedule."""
        changes = ", ".join(f"{column} = :{column}" for column in columns)
        self.change(f"UPDATE {table} SET {changes} WHERE name = :name", {"name": name, **columns})

    @abstractmethod
    def insert(self, sql: str, params: Params) -> list[int]:
        """Execute an INSERT of jobs, outside a transaction in one of its own; return the new ids in order."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """Whether code in the outermost block has already ended the transaction."""

    @abstractmethod
    def _begin(self) -> None:
        """Begin the transaction."""

    @abstractmethod
    def _commit(self) -> None:
        """Commit, or raise QueueError."""

    @abstractmethod
    def _cleanup(self) -> None:
        """Roll back what was not committed, and release the write lock."""

    @abstractmethod
    def _wake(self) -> None:
        """Wake consumers after a commit that made jobs pending or scheduled."""

    @abstractmethod
    def _wake_waiters(self) -> None:
        """Wake those who wait for the results of the jobs that finished."""

    def __enter__(self: SomeSession) -> SomeSession:
        if self.depth == 0:
            self._begin()
            self.wakes, self.lost, self.misnested, self.finished = False, None, False, []
        elif self.has_ended:
            raise QueueError("cannot continue in a transaction that has ended; leave its block")
        else:
            self.change("SAVEPOINT nested")
        self.depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._end(error)
        elif not self.has_ended:
            if error is not None:
                # guard: a failed savepoint is rolled back
                self.change("ROLLBACK TO nested")
            self.change("RELEASE nested")

    def _end(self, error: BaseException | None) -> None:
        try:
            # guard: a lost lease dooms its transaction
            if error is None and self.lost is None:
                self._commit()
        finally:
            self._cleanup()
        if error is not None:
            return
        if self.lost is not None:
            raise self.lost
        if self.wakes:
            self._wake()
        if self.finished:
            self._wake_waiters()

    def _expect_to_go_on(self) -> None:
        if self.has_ended:
            raise QueueError("cannot commit: the transaction was ended inside its block")

    @contextmanager
    def user_transaction(self) -> Iterator[None]:
        """Open a transaction for user code; roll back and raise if blocks end in the wrong order."""
        with self:
            self.blocks += 1
            depth, number = self.depth, self.blocks
            try:
                yield
            finally:
                self.misnested = self.misnested or self.blocks != number
                self.blocks -= 1
                # guard: transactions end in the order in which they nest
                if self.misnested:
                    raise QueueError(
                        "cannot end a transaction before those begun inside it: neither await nor yield in one"
                    )
                # guard: a call that was interrupted does not keep the transaction of its caller open
                self.depth = depth


class Joined(Session):
    """A session within a transaction of the application, which commits it or rolls it back."""

    depth = blocks = 1
    busy = True

    def user_transaction(self) -> Any:
        raise QueueError("cannot open a transaction in a joined one: use its connection")

    def _begin(self) -> None:
        """Do nothing: the application begins, commits and rolls back."""

    _commit = _cleanup = _begin

    def leave(self) -> None:
        """Do what follows the block, also after an error: the application may still commit."""

    def end(self) -> None:
        """Leave the transaction to the application. Raises LeaseLost if a lease was lost, so that it rolls back."""
        if self.lost is not None:
            raise self.lost
        if self.depth != 1:
            raise QueueError("cannot leave a joined transaction inside another block: neither await nor yield in one")


class Registration:
    """A consumer of this process: its random token, its lock, and the numbers of its claims."""

    def __init__(self, name: str, slot: Any, *, is_shared: bool = False) -> None:
        self.name = name
        self.slot = slot
        self.token = os.urandom(8).hex()
        self.claims = count(1)
        self.prefetches = False  # an attempt counts when the job begins, not when it is claimed
        self.is_shared = is_shared  # children run its jobs: see `PersistentQInterface.share`
        self.is_adopted = False
        self.children = 0  # that have been given the registration

    def adopted(self, slot: Any) -> Registration:
        """Return the registration for a child, with claim numbers that no other child has."""
        me = Registration(self.name, slot)
        me.token, me.claims, me.is_adopted = self.token, count((self.children << 32) + 1), True
        return me


class Watch:
    """How a thread learns that a job has finished: where nothing notifies it, it looks again and again."""

    FIRST_SECONDS, LAST_SECONDS, GROWTH = 0.002, 0.05, 1.05  # between two looks

    def __init__(self) -> None:
        self._woken = threading.Event()
        self._seconds = self.FIRST_SECONDS

    def wait(self, job_ids: list[int], find: Callable[[], bool]) -> None:  # noqa: ARG002
        """Return at once if `find` finds a job that has finished, else when one may have finished, or after a while.

        Must not miss one that finishes after `find` was called.
        """
        if find() or self._woken.wait(self._seconds):
            self._woken.clear()
            self._seconds = self.FIRST_SECONDS
        else:
            self._seconds = min(self.LAST_SECONDS, self._seconds * self.GROWTH)

    def interrupt(self) -> None:
        """Let `wait`, called by another thread, return."""
        self._woken.set()

    def close(self) -> None:
        """Release what it holds."""


class Backend(ABC):
    """The part of a queue that depends on its database."""

    name: str  # of the database, without the password
    _sessions: WeakSet[Any]  # of all threads
    _local: threading.local  # its `session` is this thread's
    max_batch = 128  # jobs per claim of a consumer; on SQLite an enqueue may wait for such a claim, a few ms
    _AMONG = "IN ({})"  # the comparison with what a query returns
    _LIKE = "LIKE"  # the comparison that ignores the case of ASCII letters
    _BYTES = "length(CAST({} AS BLOB))"  # of a text in UTF-8

    @abstractmethod
    def _transaction(self, *, durable: bool = True, in_batch: bool = False) -> Session:
        """Return this thread's session, to be entered. durable: the commit survives a power cut. in_batch: it is a
        consumer's transaction, which yields to other writers."""

    @abstractmethod
    def _read(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        """Return all rows without blocking writers."""

    def _dicts(self, columns: str, sql: str, params: Params) -> list[dict[str, Any]]:
        """Return all rows as dicts."""
        return [dict(zip(columns.split(", "), row, strict=True)) for row in self._read(sql, params)]

    @abstractmethod
    def _take_slot(self) -> Any:
        """Acquire the lock of a consumer, perhaps for a child that is forked later; it has `number` and `close()`."""

    @abstractmethod
    def _is_alive(self, slot: int | None) -> bool:
        """Return False if the process that held this slot is known to be dead."""

    @abstractmethod
    def _sleep(self, me: Registration, seconds: float, due_in: Callable[[], float]) -> bool:
        """Sleep until a wake-up (True), or for `seconds` or what `due_in` returns, if less (False).

        Must not lose a wake-up that arrives after `due_in` was called.
        """

    @abstractmethod
    def _open_watch(self) -> Watch:
        """Return the means by which a thread learns that jobs have finished."""

    @abstractmethod
    def _session(self) -> Session:
        """Return this thread's session."""

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is inside a transaction, where a signal handler must not raise."""
        session: Session | None = getattr(self._local, "session", None)
        return session is not None and (session.busy or session.depth > 0)

    def uses_database(self, thread: int) -> bool:
        """Return whether this thread is inside a transaction or a statement, where it must not be interrupted."""
        try:
            return any(each.busy or each.depth > 0 for each in self._sessions if each.thread == thread)
        except RuntimeError:  # another thread has begun to use the queue: ask again
            return True

    def is_locked_by(self, pid: int) -> bool:  # noqa: ARG002
        """Return whether a process of this host keeps all others from writing; False where none can."""
        return False

    has_lent_connection = False  # to user code in this thread; on PostgreSQL, the end of a transaction undoes settings

    def renew_connection(self) -> None:  # noqa: B027 - only where connections are lent
        """Replace this thread's connection, whose settings user code may have changed."""

    connection_settings: Any = None  # of this thread's connection, as far as they can be read, to compare them
    hides_rows = False  # whether user code has changed that connection so that it hides or changes rows

    @abstractmethod
    def transaction(self) -> AbstractContextManager[Any]:
        """Open a transaction that all calls on this queue in this thread join; yield its connection.

        It commits at the end of the block and rolls back on an exception. If a lease was lost in the block, it rolls
        back and raises LeaseLost, even if the block caught that error. Nested, it is a savepoint of the outer one.
        """

    @contextmanager
    def join(self: SomeBackend, connection: Any) -> Iterator[SomeBackend]:
        """Let all calls on this queue in this thread, within the block, take part in a transaction of the application.

        connection: the application's: an `sqlite3.Connection` to the queue's file, a `psycopg.Connection` to its
            database, or a Session or Connection of SQLAlchemy on one of these. If no transaction has begun, it begins.

        The application commits, which makes new jobs visible, or rolls back, which removes them. Consumers are woken
        by the commit on PostgreSQL; on SQLite they look every 10 ms for a second, and then every second.

        Raises ValueError for another object, and QueueError for a connection to another database, or one that is closed
        or read-only, or commits each statement by itself. If the queue's durability is "full", its commit is synced; on
        SQLite, QueueError is raised if the connection's `synchronous` is below FULL.
        """
        if self.in_transaction:
            raise QueueError("cannot join a connection inside a transaction of this queue")
        own, joined = self._session(), self._joined(connection)
        self._local.session = joined
        try:
            yield self
        finally:
            self._local.session = own
            joined.leave()
        joined.end()

    @abstractmethod
    def _joined(self, connection: Any) -> Joined:
        """Return a session within the transaction of a connection, which begins unless it has begun."""

    @abstractmethod
    def backup(self, path: str | os.PathLike[str]) -> None:
        """Write a consistent, verified copy to a new file, while the queue is in use."""

    @abstractmethod
    def compact(self, *, progress: Callable[[int], None] | None = None) -> int:
        """Give free space in the database back to the disk while others use it; return by how many bytes it shrank.

        On SQLite this moves pages in short transactions, and the file shrinks when no reader needs the old pages. On
        PostgreSQL it is VACUUM, which needs the owner of the tables and frees space at their ends only. progress is
        called with the number of free bytes that are left (SQLite), or of the database, between the steps.
        Raises QueueError in a transaction, and for an SQLite file that was not created to be compacted.
        """

    @abstractmethod
    def check(self, *, thorough: bool = True) -> dict[str, Any]:
        """Return a dict of facts about the database; "problems" is a list of sentences.

        thorough: read the whole database to find damage, and take the write lock.
        """

    def _unlisted_tasks(self) -> list[str]:
        return [
            f"no consumer finds the pending jobs of task {task!r} in queue {queue!r}, which does not list it: enqueue "
            "another one there"
            for queue, task in self._read(UNLISTED)
        ]

    @abstractmethod
    def close(self) -> None:
        """Release the jobs that this object's consumers hold, and close the database."""

    def reserve_connections(self, number: int) -> None:  # noqa: B027 - SQLite has no server
        """Keep this many idle connections to the server or, if it has no more, none. Raises QueueBusy."""

    def now(self) -> float:
        """Return the time by the queue's clock, Unix seconds: the server's on PostgreSQL, else that of this host."""
        return self._time(None)

    def _time(self, now: float | None) -> float:
        return time.time() if now is None else finite("now", now)

    def record(self, event: str, *, by: str | None = None, now: float | None = None) -> None:
        """Record an operator's action that concerns no job; see `operations`. The verbs do it themselves."""
        with self._transaction() as session:
            params = {"event": valid_filter("event", event, 1000), "actor": actor(by), "now": self._time(now)}
            session.change(RECORD_OPERATION, {**params, "error": None})

    def _set_queue(self, queue: str, event: str, by: str | None, now: float | None, **columns: float | None) -> None:
        """Change the settings of a queue, which is created if it does not exist, and record it."""
        with self._transaction() as session:
            session.change(ADD_QUEUE, {"queue": valid_name("queue", queue)})
            session.set_columns("queues", queue, **columns)
            self.record(event, by=by, now=now)
            session.wakes = True

    @abstractmethod
    def _count_pending(self, session: Session) -> None:
        """Count the pending jobs of the queues with a limit, and keep the counts while there are any."""

    # SQLite, which has a single writer and continues after the highest id, needs nothing for these four.

    def _lock_as_writer(self, session: Session) -> None:  # noqa: B027
        """Acquire what a writer of jobs needs, before this transaction reads jobs to change."""

    def _lock_out_writers(self, session: Session) -> None:  # noqa: B027
        """Block all other writers until this transaction ends."""

    def _begin_snapshot(self, session: Session) -> None:  # noqa: B027
        """Let all statements of this transaction, which only reads, see the same rows."""

    def _lock_jobs(self, session: Session, job_ids: list[int]) -> None:  # noqa: B027
        """Lock these jobs until this transaction ends."""

    def _reset_ids(self, session: Session) -> None:  # noqa: B027
        """Make new rows get ids above those that were copied."""

    @abstractmethod
    def other_tables(self) -> list[str]:
        """Return the names of the application's own tables in this database, which `move_to` does not copy."""
