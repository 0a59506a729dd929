"""What a backend brings: sessions, wake-up, liveness, backup and check."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from typing import Any, TypeVar

from pqueue_values import NO_PARAMS, LeaseLost, Params, QueueError, finite

SomeSession = TypeVar("SomeSession", bound="Session")


class Session(ABC):
    """One thread's connection to the database. As a context manager a transaction, and inside one a savepoint."""

    wakes = False  # a job became pending or scheduled: wake consumers when the transaction is committed
    lost: LeaseLost | None = None  # a lease was lost inside: the whole transaction must roll back
    depth = 0  # of transactions in each other
    misnested = False  # one ended before another that was begun inside it: likewise

    @abstractmethod
    def run(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        """Execute a statement with :named parameters and return all its rows."""

    @abstractmethod
    def change(self, sql: str, params: Params = NO_PARAMS) -> int:
        """Execute a statement and return how many rows it changed."""

    @abstractmethod
    def change_many(self, sql: str, rows: list[Params]) -> None:
        """Execute a statement once per row."""

    @abstractmethod
    def insert(self, sql: str, params: Params) -> list[int]:
        """Execute an INSERT of jobs, which outside a transaction is one by itself, and return the new ids in order."""

    @property
    @abstractmethod
    def has_ended(self) -> bool:
        """Whether code inside the outermost block has ended its transaction."""

    @abstractmethod
    def _begin(self) -> None:
        """Begin the transaction."""

    @abstractmethod
    def _commit(self) -> None:
        """Commit, or raise QueueError."""

    @abstractmethod
    def _cleanup(self) -> None:
        """Roll back what was not committed, and let others go on."""

    @abstractmethod
    def _wake(self) -> None:
        """Wake consumers after a commit that made jobs pending or scheduled."""

    def __enter__(self: SomeSession) -> SomeSession:
        if self.depth == 0:
            self._begin()
            self.wakes, self.lost, self.misnested = False, None, False
        elif self.has_ended:
            raise QueueError("cannot go on in a transaction that has ended; leave its block")
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
                # guard: a failed savepoint is undone
                self.change("ROLLBACK TO nested")
            self.change("RELEASE nested")

    def _end(self, error: BaseException | None) -> None:
        try:
            # guard: a lost lease dooms its transaction
            if error is None and self.lost is None:
                self._commit()
        finally:
            self._cleanup()
        if error is None and self.lost is not None:
            raise self.lost
        if error is None and self.wakes:
            self._wake()

    def _expect_to_go_on(self) -> None:
        if self.has_ended:
            raise QueueError("cannot commit: the transaction was ended inside its block")

    @contextmanager
    def user_transaction(self) -> Iterator[None]:
        """Open a transaction; undo it when a block ends before one that was begun inside it."""
        with self:
            depth = self.depth
            try:
                yield
            finally:
                self.misnested = self.misnested or self.depth != depth
                # guard: transactions end in the order in which they nest
                if self.misnested:
                    raise QueueError(
                        "cannot end a transaction before those begun inside it: neither await nor yield in one"
                    )


class Registration:
    """A consumer of this process: its random token, its slot beside the database, and the numbers of its claims."""

    def __init__(self, name: str, slot: Any) -> None:
        self.name = name
        self.slot = slot
        self.token = os.urandom(8).hex()
        self.claims = count(1)
        self.prefetches = False  # the attempts of its jobs count when they begin


class Backend(ABC):
    """The part of a queue that depends on its database."""

    name: str  # of the database, without a password
    max_batch = 48  # jobs for a consumer to take at once: more would keep an enqueue waiting for more than a few ms
    _LIKE = "LIKE"  # the comparison that ignores the case of ASCII letters
    _BYTES = "length(CAST({} AS BLOB))"  # of a text in UTF-8

    @abstractmethod
    def _transaction(self, *, durable: bool = True, in_batch: bool = False) -> Session:
        """Return this thread's session to enter; durable: its commit survives a power cut; in_batch: it is a
        consumer's, which may be long or one of very many, and lets others go first."""

    @abstractmethod
    def _read(self, sql: str, params: Params = NO_PARAMS) -> list[Any]:
        """Return all rows without keeping a writer waiting."""

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
        return time.time() if now is None else finite("now", now)

    @abstractmethod
    def _count_pending(self, session: Session, queues: Iterable[str]) -> None:
        """Count the pending jobs of these queues, and keep counting while some queue has a limit."""

    @abstractmethod
    def _lock_out_writers(self, session: Session) -> None:
        """Let nobody else write until this transaction ends."""

    @abstractmethod
    def _lock_jobs(self, session: Session, job_ids: list[int]) -> None:
        """Let nobody else change these jobs until this transaction ends."""

    @abstractmethod
    def _reset_ids(self, session: Session) -> None:
        """Give the next rows ids above those that were copied."""

    @abstractmethod
    def other_tables(self) -> list[str]:
        """Return the names of what the application keeps in this database besides, which `move_to` leaves behind."""
