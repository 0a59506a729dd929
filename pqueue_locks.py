"""Locks between the processes that use a queue on SQLite, and the pipes (FIFOs) that wake up waiting ones."""

from __future__ import annotations

import errno
import math
import mmap
import os
import select
import stat
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import lru_cache
from pathlib import Path

from pqueue import POLL_SECONDS, WAIT_SECONDS
from pqueue_backend import Watch
from pqueue_files import Descriptor, closing_file, is_stopped, open_private, share_as_folder, try_lock, unlock
from pqueue_values import Job, QueueError

LOCK_TIMEOUT_SECONDS = 1.0  # the longest wait for a lock; a process that holds one for longer is not waited for
LINES = ("others", "consumers")  # in which writers wait: consumers for their batches, and all others
REPEAT_SECONDS = 0.001  # how long one process may keep acquiring the lock while a waiter is waking up
OVERTAKE_SECONDS = 0.005  # how long a waiter may be overtaken by any processes
HANDOVER_SECONDS = 0.01  # how long the lock is then reserved for the waiter, which may have died
LOOK_SECONDS = 0.01  # how often a consumer looks for the jobs of a joined transaction


class WriterLock:
    """A fair lock for writers, since SQLite's busy handler lets some of them starve.

    Consumers that take or complete jobs wait in one line, all others in a second one, and the first of each line waits
    for the lock. Releasing it wakes up the first of the other line, so an enqueue waits for one batch at most, however
    many consumers there are. The lock is advisory: a writer that has waited for `LOCK_TIMEOUT_SECONDS`, or finds that
    another process (a stopped one, for example) has held it for that long, proceeds and relies on BEGIN IMMEDIATE.

    folder: where its files are; None: the platform has no such locks, and it is never acquired.
    most_seconds: how long `acquire` waits for other threads, and then for other processes, if that is less.
    """

    def __init__(self, folder: Path | None, most_seconds: float = math.inf) -> None:
        self._most_seconds = most_seconds
        self._thread = threading.Lock()
        self._closing = False
        self._closed = folder is None
        self._kind = 0  # of the writer that holds the lock
        if folder is None:
            return
        with ExitStack() as undo:
            self._lines = [undo.enter_context(closing(FairLock(folder / name))) for name in LINES]
            self._lock = FairLock(folder / "writer", LINES)
            undo.pop_all()

    def acquire(self, *, in_batch: bool = False) -> bool:
        """Return whether the lock was acquired; if so, `release` must follow."""
        acquired = False
        if not self._thread.acquire(timeout=min(self._most_seconds, LOCK_TIMEOUT_SECONDS)):
            return False
        try:
            acquired = not self._closed and self._acquire(int(in_batch))
        finally:
            if not acquired:
                if not self._closed:
                    self._lines[self._kind].release()
                self.release()
        return acquired

    def _acquire(self, kind: int) -> bool:
        self._kind, line = kind, self._lines[kind]
        if self._lock.try_acquire():
            return True
        until = time.monotonic() + min(self._most_seconds, LOCK_TIMEOUT_SECONDS)
        in_line = line.acquire(until)  # False: a stopped process may be holding the line
        acquired = self._lock.acquire(until, kind)
        if in_line:
            line.release()
        return acquired

    def release(self) -> None:
        if not self._closed:
            self._lock.release(self._kind)
        if self._thread.locked():  # an exception from a signal handler may have interrupted a first call
            self._thread.release()
        if self._closing:
            self.close()

    def problems(self) -> list[str]:
        """Return a message for each lock held for too long, but none while a thread of this process uses the locks."""
        if not self._thread.acquire(blocking=False):
            return []
        try:
            return [] if self._closed else list(filter(None, (lock.problem() for lock in (self._lock, *self._lines))))
        finally:
            self._thread.release()
            if self._closing:
                self.close()

    def close(self) -> None:
        """Close the locks as soon as no thread uses them; afterwards they are not acquired any more."""
        self._closing = True
        if self._thread.acquire(blocking=False):
            self.abandon()
            self._thread.release()

    def abandon(self) -> None:
        """Close the locks in a forked child, as the parent may hold them."""
        if not self._closed:
            self._closed = True
            for lock in (*self._lines, self._lock):
                lock.close()


class FairLock:
    """A lock between processes with a timeout, which flock lacks; it is released when its holder dies.

    There are kinds of waiters, each with a wake-up pipe, and the mapped file records since when one of each kind has
    been waiting. Releasing the lock wakes up a waiter, preferably of another kind. While that wakes up, another process
    may acquire the lock; this saves time, but a process that writes in a loop would starve the waiter. So when one
    process has acquired it repeatedly for `REPEAT_SECONDS`, or the waiter has waited for `OVERTAKE_SECONDS`, the lock
    is reserved for the waiter's kind for `HANDOVER_SECONDS`, but not longer, as the waiter may have died.
    """

    # The fields of the file; times are monotonic, 0: none
    PID, HELD_SINCE, RESERVED_FOR, RESERVED_UNTIL, WAITING_SINCE = range(5)

    def __init__(self, path: Path, kinds: Sequence[str] = ("",)) -> None:
        self._path, self._pid = path, os.getpid()
        self._held_since = self._owned_since = 0.0  # since this process acquired it; since no other process has
        numbers = range(len(kinds))
        # guard: a released lock goes to the other line
        self._order = [[*(other for other in numbers if other != kind), kind] for kind in numbers]
        with ExitStack() as opened:
            self._file = Descriptor(open_private(path))
            opened.callback(self._file.close)
            mapped = opened.enter_context(_map_file(self._file, 8 * (self.WAITING_SINCE + len(kinds))))
            self._shared = opened.enter_context(memoryview(mapped).cast("d"))
            self._pipes: list[Descriptor] = []
            for kind in kinds:
                name = f"{path.name}-{kind}" if kind else path.name
                self._pipes.append(_open_pipe(path.with_name(f"{name}.wakeup")))
                opened.callback(self._pipes[-1].close)
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            # guard: a queue that is not closed leaves no files open
            self.close()

    def try_acquire(self, kind: int | None = None) -> bool:
        """Acquire the lock unless it is held, or reserved for another kind; return whether it was acquired."""
        shared = self._shared
        if shared[self.RESERVED_UNTIL] and shared[self.RESERVED_FOR] != kind and self._is_reserved():
            return False
        if not try_lock(self._file):
            return False
        shared[self.RESERVED_UNTIL] = 0.0
        shared[self.HELD_SINCE] = self._held_since = time.monotonic()
        if shared[self.PID] != self._pid:
            shared[self.PID], self._owned_since = self._pid, self._held_since
        return True

    def acquire(self, until: float, kind: int = 0) -> bool:
        """Wait for the lock until this monotonic time, but not for a process that has held it for too long."""
        began = time.monotonic()
        while True:
            self._shared[self.WAITING_SINCE + kind] = began
            # Asked first, as the reservation may expire.
            seconds = HANDOVER_SECONDS if self._is_reserved() else POLL_SECONDS
            acquired, left = self.try_acquire(kind), until - time.monotonic()
            # guard: a stopped process is not waited for twice
            if acquired or left <= 0 or self._held_seconds() >= LOCK_TIMEOUT_SECONDS:
                self._shared[self.WAITING_SINCE + kind] = 0.0
                return acquired
            _wait_for(self._pipes[kind], min(left, seconds), exclusive=len(self._pipes) == 1)

    def release(self, kind: int = 0) -> None:
        """Release the lock if it is held, and wake up a waiter."""
        shared = self._shared
        if shared[self.HELD_SINCE] == self._held_since:
            if (next_kind := self._next_kind(kind)) is not None:
                self._reserve(next_kind)  # while no other process can write it
            shared[self.HELD_SINCE] = 0.0
        unlock(self._file)
        next_kind = self._next_kind(kind)  # again: a waiter may have arrived
        if next_kind is not None:
            shared[self.WAITING_SINCE + next_kind] = 0.0
            # guard: releasing the lock wakes up a waiter
            wake_up(self._pipes[next_kind])
        elif len(self._pipes) == 1:  # others may wait, too: their time was cleared
            # guard: a released line wakes up the next
            wake_up(self._pipes[0])

    def _reserve(self, kind: int) -> None:
        now = time.monotonic()
        repeats = self._held_since > self._owned_since and now - self._owned_since >= REPEAT_SECONDS
        # guard: a writer that has waited long is not overtaken
        # guard: a writer in a loop does not starve a waiter
        if repeats or now - self._shared[self.WAITING_SINCE + kind] >= OVERTAKE_SECONDS:
            self._shared[self.RESERVED_FOR], self._shared[self.RESERVED_UNTIL] = kind, now + HANDOVER_SECONDS

    def _next_kind(self, kind: int) -> int | None:
        """Return which kind of waiter is woken up when this kind releases the lock; None: nobody waits."""
        for other in self._order[kind]:
            if self._shared[self.WAITING_SINCE + other]:
                return other
        return None

    def _is_reserved(self) -> bool:
        # guard: a reservation for a dead waiter expires
        # guard: a reservation is void after a reboot
        return 0 < self._shared[self.RESERVED_UNTIL] - time.monotonic() <= HANDOVER_SECONDS

    def _held_seconds(self) -> float:
        since = self._shared[self.HELD_SINCE]
        return time.monotonic() - since if since else 0.0

    def problem(self) -> str | None:
        """Return a message if a process has held the lock for too long."""
        pid, seconds = f"{self._shared[self.PID]:.0f}", self._held_seconds()
        if seconds < LOCK_TIMEOUT_SECONDS:
            return None
        # guard: only a live holder is reported for a lock
        if self.try_acquire():  # its holder is dead
            self.release()
            return None
        stopped, remedy = "", "end it if it does not continue by itself"
        if is_stopped(pid):
            stopped, remedy = "is stopped and ", f"continue it (kill -CONT {pid}) or end it (kill -KILL {pid})"
        return f"process {pid} {stopped}has held the write lock {self._path} for {seconds:.0f} s: {remedy}"


class ConsumerLocks:
    """Numbered locks of consumers: each has a lock file, a wake-up pipe, and a byte that is 1 while it waits."""

    COUNT = 4096
    PREFIX = ""  # of its files

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with closing_file(open_private(folder / f"{self.PREFIX}waiting")) as file:
            self.waiting = _map_file(file, self.COUNT)
        with closing_file(open_private(folder / "joined")) as file:
            self._joined_until = memoryview(_map_file(file, 8)).cast("d")  # monotonic seconds

    def acquire(self) -> ConsumerLock:
        return ConsumerLock(self, *self._acquire())

    def _acquire(self) -> tuple[int, Descriptor, Descriptor]:
        """Return the number of a lock, its descriptor, and that of its pipe."""
        for number in range(self.COUNT):
            with ExitStack() as undo:
                lock = Descriptor(open_private(self._folder / f"{self.PREFIX}{number}.lock"))
                undo.callback(lock.close)
                if try_lock(lock):
                    path = self._folder / f"{self.PREFIX}{number}.wakeup"
                    path.unlink(missing_ok=True)  # a former owner's may hold a wake-up
                    pipe = _open_pipe(path)
                    undo.pop_all()
                    return number, lock, pipe
        raise QueueError(f"cannot add a consumer: expected fewer than {self.COUNT} at a time")

    def has_begun(self, number: int, token: str, job_id: int) -> bool:
        """Return False if the consumer with this token publishes the jobs that it begins, without this one."""
        path = self._folder / f"{number}.lock"
        with suppress(FileNotFoundError), closing_file(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            words = array("Q", os.pread(file, BegunJobs.BYTES, 0).ljust(BegunJobs.BYTES, b"\0"))
            return BegunJobs.is_in(words, token, job_id)
        return True

    def is_held(self, number: int) -> bool:
        with closing_file(open_private(self._folder / f"{number}.lock")) as lock:
            return not try_lock(lock)

    def wake(self, wants: Callable[[int], bool] = lambda _: True) -> None:
        """Wake up all waiting consumers, or those whose numbers are wanted, except dead ones."""
        number = -1
        while (number := self.waiting.find(b"\1", number + 1)) >= 0:
            if not wants(number):
                continue
            self.waiting[number] = 0
            path = self._folder / f"{self.PREFIX}{number}.wakeup"
            with suppress(OSError), closing_file(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW)) as pipe:
                os.write(pipe, b"!")

    def expect_joined(self) -> None:
        """Let consumers look often for a while: the commit of a joined transaction wakes nobody."""
        # guard: consumers look for the jobs of a joined transaction
        self._joined_until[0] = time.monotonic() + WAIT_SECONDS
        self.wake()

    def is_joined(self) -> bool:
        return 0 < self._joined_until[0] - time.monotonic() <= WAIT_SECONDS


class ResultLocks(ConsumerLocks):
    """Numbered locks of processes that wait for results: each also has the id of the job, or 0 for several."""

    PREFIX = "result-"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with closing_file(open_private(folder / "result-jobs")) as file:
            self.jobs = memoryview(_map_file(file, 8 * self.COUNT)).cast("Q")

    def acquire(self) -> ResultLock:
        return ResultLock(self, *self._acquire())

    def wake_for(self, finished: Sequence[int]) -> None:
        """Wake up those that wait for one of these jobs."""
        wanted = {0, *finished}
        # guard: a finished job wakes up those that wait for it
        self.wake(lambda number: self.jobs[number] in wanted)


class BegunJobs:
    """Which jobs of its batch a consumer has begun, for others to read when it has died.

    They are in the consumer's lock file as 64-bit words: the boot id, the consumer's token, the number of jobs, their
    ids. The file is never synced: after a power cut the boot id differs, and the rest is ignored.
    """

    MAX_JOBS = 253
    BYTES = 8 * (3 + MAX_JOBS)

    def __init__(self, file: int, token: str) -> None:
        self._map = _map_file(file, self.BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._claim: str | None = None
        self._words[0], self._words[2], self._words[1] = 0, 0, int(token, 16)
        self._words[0] = boot_id()

    def add(self, job: Job) -> None:
        if job.lease_token != self._claim:  # a new claim: all jobs before it were completed
            self._claim, self._words[2] = job.lease_token, 0
        number = self._words[2]
        if number == self.MAX_JOBS:
            self._words[0] = 0  # full: unknown from now on
        else:
            self._words[3 + number] = job.id
            self._words[2] = number + 1

    @staticmethod
    def is_in(words: Sequence[int], token: str, job_id: int) -> bool:
        # guard: records of begun jobs are void after a reboot
        is_known = words[0] == boot_id() != 0 and words[1] == int(token, 16)
        # guard: an attempt that had begun counts
        return not is_known or job_id in words[3 : 3 + words[2]]

    def close(self) -> None:
        self._words.release()
        self._map.close()


@lru_cache
def boot_id() -> int:
    """Return a number that changes with every boot of the machine, or 0 where the system has none."""
    try:
        return int(Path("/proc/sys/kernel/random/boot_id").read_text()[:8], 16)
    except (OSError, ValueError):
        return 0


class ConsumerLock:
    """The lock that shows that a consumer is alive, and the pipe that wakes it up."""

    def __init__(self, locks: ConsumerLocks, number: int, lock: Descriptor, pipe: Descriptor) -> None:
        self._locks, self.number, self._lock, self._pipe = locks, number, lock, pipe
        self.begun: BegunJobs | None = None

    def publish(self, token: str) -> None:
        self.begun = self.begun or BegunJobs(self._lock, token)

    def sleep(self, seconds: float, due_in: Callable[[], float]) -> bool:
        until = time.monotonic() + seconds
        try:
            while True:
                self._locks.waiting[self.number] = 1
                left = min(until - time.monotonic(), due_in())
                woken = _wait_for(self._pipe, min(left, LOOK_SECONDS) if self._locks.is_joined() else left)
                if left <= 0 or not self._locks.is_joined():
                    return woken
        finally:
            self._locks.waiting[self.number] = 0

    def interrupt(self) -> None:
        """Wake up this process, which may wait in another thread."""
        wake_up(self._pipe)

    def is_linked(self) -> bool:
        """Return False if the lock file was deleted, so that it no longer shows that the consumer is alive."""
        return os.fstat(self._lock).st_nlink > 0

    def close(self) -> None:
        if self.begun:
            self.begun.close()
        self._lock.close()
        self._pipe.close()


class ResultLock(ConsumerLock, Watch):
    """Waits for jobs to finish at the wake-up pipe of a lock."""

    _locks: ResultLocks

    def wait(self, job_ids: list[int], find: Callable[[], bool]) -> None:
        self._locks.jobs[self.number] = job_ids[0] if len(job_ids) == 1 else 0
        self.sleep(WAIT_SECONDS, lambda: 0.0 if find() else math.inf)


def _map_file(file: int, size: int) -> mmap.mmap:
    """Map the first bytes of a file. Allocate them first: writing to a hole on a full disk raises SIGBUS."""
    # guard: a file that was written in part is not mapped
    if os.fstat(file).st_size < size and os.write(file, bytes(size)) < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return mmap.mmap(file, size)


def _open_pipe(path: Path) -> Descriptor:
    with suppress(FileExistsError):
        os.mkfifo(path, 0o600)
        os.chmod(path, 0o600)  # whatever the umask
    pipe = Descriptor(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW))
    share_as_folder(pipe, path.parent)
    if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
        pipe.close()
        raise OSError(errno.EINVAL, f"expected {path.name} to be a FIFO")
    return pipe


def wake_up(pipe: Descriptor) -> None:
    with suppress(BlockingIOError):  # full: wake-ups are pending
        if pipe.is_open():
            os.write(pipe, b"!")


def _wait_for(pipe: Descriptor, seconds: float, *, exclusive: bool = False) -> bool:
    """Wait for a wake-up; return whether there was one. It wakes up all waiters, or, if exclusive, the first."""
    woken = _wait_exclusively(pipe, seconds) if exclusive else None
    if woken is None:
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        woken = bool(poller.poll(max(0, math.ceil(seconds * 1000))))
    if woken:
        with suppress(BlockingIOError):  # another waiter has read it
            os.read(pipe, 65536)
    return woken


def _wait_exclusively(pipe: int, seconds: float) -> bool | None:
    """Return None where only `poll` is available; it wakes up all, the last first, and so may starve the others."""
    if not hasattr(select, "epoll"):  # not Linux
        return None
    try:
        with select.epoll() as poller:
            poller.register(pipe, select.EPOLLIN | select.EPOLLEXCLUSIVE)
            return bool(poller.poll(max(0, seconds)))
    except OSError as error:
        if error.errno is None:  # a signal handler's
            raise
        return None  # no free file descriptor
