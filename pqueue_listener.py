"""The connection of a process to PostgreSQL that listens for NOTIFY and holds the locks of its consumers."""

from __future__ import annotations

import logging
import math
import os
import selectors
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, cast

import psycopg

import pqueue
from pqueue import QueueBusy, QueueError
from pqueue_backend import Watch
from pqueue_connections import Link, ListenLink, setting, timeout_settings
from pqueue_files import Descriptor
from pqueue_postgres import CHANNEL, LOCK_CLASS

if TYPE_CHECKING:
    from pqueue_sqlalchemy import OnPostgres

log = logging.getLogger("pqueue")

WAITING = "waiting"  # the NOTIFY of a process that waits for a result
LISTENING = "listening"  # the NOTIFY of a process that begins to listen, and so does not know who waits
AWAITED_SECONDS = 4.0  # how long those that finish jobs then send NOTIFY, too
RETRY_SECONDS = 0.5  # between the listener's attempts to connect
PAUSE_SECONDS = 0.05  # before reconnecting after a connection that was lost at once
RESTART_SECONDS = 10.0  # after a server restart, while consumers reconnect, none is considered dead
# How long the server keeps the connection of an unreachable host: its consumers still have their leases.
LISTENER_KEEPALIVES = {"keepalives_idle": 60, "keepalives_interval": 15, "keepalives_count": 4}
LISTENER_TIMEOUT_MS = 120_000
LISTEN = f'LISTEN "{CHANNEL}"'
NOTIFY = f'NOTIFY "{CHANNEL}"'
LOCK_SLOT = f"SELECT pg_advisory_lock_shared({LOCK_CLASS}, $1::int)"
UNLOCK_SLOT = f"SELECT pg_advisory_unlock_shared({LOCK_CLASS}, $1::int)"


def is_notify_queue_full(error: QueueError) -> bool:
    return getattr(error.__cause__, "sqlstate", None) == "54000"


class ListenConnection:
    """A process's connection that listens for NOTIFY, and holds the locks of the consumers of this process.

    The pool lends it for other statements. Its thread does not look at it meanwhile.
    """

    def __init__(self, queue: OnPostgres) -> None:
        self._queue = queue
        self._changed = threading.Condition()
        self._connecting = threading.Lock()  # held while the connection or the numbers change
        self._wakeups = 0
        self._numbers: set[int] = set()  # of the locks to hold
        self._link: ListenLink | None = None
        self._stopped = False
        self._selector = selectors.DefaultSelector()
        self._interrupt_reader, self._interrupt_writer = map(Descriptor, os.pipe())  # wakes the thread
        self._selector.register(self._interrupt_reader, selectors.EVENT_READ)
        self._lost_at = self._made_at = -math.inf  # monotonic seconds
        self._is_new = False  # the connection is new: the consumers must be marked as running
        self.watch: ResultWatch | None = None
        self._awaited_until = -math.inf  # monotonic seconds: whether anybody waits for a result
        self.gets_notify = False  # through a pooler, which keeps neither NOTIFY nor locks
        self._thread = threading.Thread()

    def start(self) -> None:
        if not self._queue.pooled:
            self._link = self._connect()
        if self.gets_notify:
            self._serve()
            self.keep_listening()
            return
        if self._link is not None:
            self._link.close()
        log.warning(
            "%s passes on no NOTIFY: consumers poll every %g s, and crashes are noticed only when leases expire",
            self._queue.name,
            pqueue.WAIT_SECONDS,
        )

    def keep_listening(self) -> None:
        """Start the listener, or restart it if it died: the consumers depend on it."""
        if self.gets_notify and not self._stopped and not self._thread.is_alive():
            self._thread = threading.Thread(target=self._listen, name="pqueue-listener", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:
                raise QueueBusy(f"cannot listen to {self._queue.name}: {error}") from error

    def acquire(self, number: int) -> None:
        """Acquire a lock, now and after each reconnection."""
        with self._connecting:
            self._numbers.add(number)
            self._run_if_connected(LOCK_SLOT, number)

    def release(self, number: int) -> None:
        with self._connecting:
            self._numbers.discard(number)
            self._run_if_connected(UNLOCK_SLOT, number)

    def _run_if_connected(self, sql: str, number: int) -> None:
        """Execute the statement unless the connection is lost: the listener will reconnect."""
        link = self._link
        if link is None:
            return
        with suppress(psycopg.Error, QueueError):
            self._queue._pool.take(only=link)
            try:
                link.cursor.execute(self._queue._sql(sql), [number])
            finally:
                self._queue._pool.give_back(link)

    # Called by the pool, which holds its lock

    def on_loan(self, link: Link) -> None:
        self._selector.unregister(link.driver.fileno())

    def on_return(self, link: Link) -> None:
        link.dispatch()
        self._selector.register(link.driver.fileno(), selectors.EVENT_READ)

    def interrupt(self) -> None:
        """Wake the thread."""
        with suppress(OSError):
            if self._interrupt_writer.is_open():
                os.write(self._interrupt_writer, b"!")

    def wait(self, seconds: float, due_in: Callable[[], float]) -> bool:
        before = self._wakeups
        seconds = min(seconds, due_in())
        with self._changed:
            return self._changed.wait_for(lambda: self._wakeups != before, seconds)

    def stop_listening(self) -> None:
        """Stop the listener, which would otherwise reconnect and mark the consumers as running."""
        self._stopped = True
        self.interrupt()
        if self._thread.is_alive():
            self._thread.join(2 * self._queue._busy_seconds + 2)  # it may be connecting

    def close(self) -> None:
        self.stop_listening()
        self._queue._pool.recall()
        if self._link is not None:
            self._link.close()
        self._selector.close()
        for file in (self._interrupt_reader, self._interrupt_writer):
            file.close()

    def _connect(self) -> ListenLink:
        """Listen on a free connection, or on a new one. An idle consumer needs no other."""
        with ExitStack() as undo:
            free = self._queue._pool.take_over()
            driver = free.driver if free else self._queue._connect_raw()
            undo.callback(driver.close)
            link = ListenLink(driver, self._queue._settings, pooled=self._queue.pooled)
            driver.execute(setting(timeout_settings(LISTENER_TIMEOUT_MS, LISTENER_KEEPALIVES), for_good=True))
            for number in list(self._numbers):
                link.cursor.execute(self._queue._sql(LOCK_SLOT), [number])
            driver.add_notify_handler(self._receive_notify)
            driver.execute(self._queue._sql(LISTEN))
            try:
                driver.execute(self._queue._sql(f"{NOTIFY}, '{LISTENING}'"))
            except psycopg.errors.ProgramLimitExceeded:  # the NOTIFY queue is full
                self.gets_notify = True
            undo.pop_all()
        return link

    def _serve(self) -> None:
        """Listen on the new connection, and lend it."""
        link = cast(ListenLink, self._link)
        self._selector.register(link.driver.fileno(), selectors.EVENT_READ)
        self._queue._pool.lend(link, self)

    def was_lost_recently(self) -> bool:
        """Return whether the connection was lost a moment ago; other consumers may not have reconnected yet."""
        return time.monotonic() - self._lost_at < RESTART_SECONDS

    def _listen(self) -> None:
        while not self._stopped:
            try:
                self._receive(self._link or self._reconnect())
            except Exception as error:
                self._drop(error)

    def _reconnect(self) -> ListenLink:
        with self._connecting:
            self._link = self._connect()
            self._is_new, self._made_at = True, time.monotonic()
            self._serve()
        return self._link

    def _drop(self, error: Exception) -> None:
        """Drop a failed connection; wait before the next one if this one never worked."""
        with self._connecting:
            lost, self._link = self._link, None
            self._queue._pool.recall()
        self._lost_at = time.monotonic()
        if not isinstance(error, (psycopg.Error, QueueError, OSError)):
            log.error("%s: the listener failed and reconnects: %r", self._queue.name, error)
        if lost is None:
            time.sleep(RETRY_SECONDS)
            return
        with suppress(Exception):
            self._selector.unregister(lost.driver.fileno())
        lost.close()
        if self._lost_at - self._made_at < RETRY_SECONDS:
            time.sleep(PAUSE_SECONDS)

    def _receive(self, link: ListenLink) -> None:
        if self._is_new:
            with suppress(QueueError):  # tries again in a second
                self._queue._mark_running()
                self._is_new = False
        for key, _ in self._selector.select(1.0):
            if key.fd == self._interrupt_reader:
                os.read(key.fd, 100)
        pool = self._queue._pool
        if self._stopped:
            return
        if pool.take_if_free(link):
            try:
                link.receive()
            finally:
                pool.give_back(link)

    def _receive_notify(self, notify: psycopg.Notify) -> None:
        if notify.payload == WAITING:
            self._awaited_until = time.monotonic() + AWAITED_SECONDS
        elif notify.payload == LISTENING:
            self.gets_notify = True
            if self.watch:
                self.watch.announce_again()
        elif not notify.payload:
            self._wake_waiters()
        elif self.watch:
            self.watch.wake_for(notify.payload)

    def _wake_waiters(self) -> None:
        with self._changed:
            self._wakeups += 1
            self._changed.notify_all()

    @property
    def is_awaited(self) -> bool:
        """Whether a process may wait for the result of a job."""
        return time.monotonic() < self._awaited_until

    @property
    def is_announced(self) -> bool:
        """Whether consumers will know for a while longer that a process waits for a result."""
        return time.monotonic() < self._awaited_until - AWAITED_SECONDS / 2


class ResultWatch(Watch):
    """Waits for NOTIFY with the ids of finished jobs, and keeps the processes that finish jobs sending it."""

    # At first, a process that finishes a job may not have received the announcement.
    FIRST_SECONDS, LAST_SECONDS, GROWTH = 0.005, pqueue.WAIT_SECONDS, 4

    def __init__(self, queue: OnPostgres, listener: ListenConnection) -> None:
        super().__init__()
        self._queue, self._listener = queue, listener
        self._job_ids: set[str] = set()
        self._is_unknown = False  # to a process that has begun to listen
        listener.watch = self

    def wait(self, job_ids: list[int], find: Callable[[], bool]) -> None:
        self._job_ids = set(map(str, job_ids))
        if self._is_unknown or not self._listener.is_announced:
            self._is_unknown = False
            self._queue.announce_wait()
        super().wait(job_ids, find)

    def wake_for(self, finished: str) -> None:
        if not self._job_ids.isdisjoint(finished.split(",")):
            self._woken.set()

    def announce_again(self) -> None:
        self._is_unknown = True
        self._woken.set()


class ConsumerLock:
    """The advisory lock that shows that a consumer is alive.

    listener: holds it; None: a child will, as the parent has no thread to hold one through outages.
    """

    def __init__(self, listener: ListenConnection | None, number: int) -> None:
        self.number = number
        self._listener = listener

    def close(self) -> None:
        if self._listener:
            self._listener.release(self.number)
