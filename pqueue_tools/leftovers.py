"""What tasks leave behind in their process: found after each, and undone where that is possible.

docs/tasks.md lists it. Everything is looked at after a task that took long or has rarely run, and at least ten times a
second; after the others, only what costs little: signal handlers, threads and sys.stdout.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import builtins
import fcntl
import gc
import io
import locale
import logging
import os
import resource
import signal
import stat
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from pqueue_tools import processes

TRUSTED_RUNS = 100  # of a task that left nothing; then it is looked at in full only if it took long
LONG_SECONDS = 0.005
FULL_SECONDS = 0.1
MAX_DESCRIPTORS = 100  # that tasks may leave open, such as connections
HIGH_DESCRIPTOR = 100  # ours are above, out of the way of tasks that close low ones
SIGNALS = sorted(map(int, signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))
COMMON_SIGNALS = [
    int(getattr(signal, f"SIG{name}"))
    for name in ("HUP", "INT", "QUIT", "USR1", "USR2", "PIPE", "ALRM", "TERM", "CHLD", "VTALRM", "PROF")
]
TIMERS = [getattr(signal, name) for name in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")]
LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})


class Setting:
    """A part of the process's state: its name, how to read it, and how to restore it (None: impossible)."""

    def __init__(self, name: str, read: Callable[[], Any], restore: Callable[[Any], object] | None = None) -> None:
        self.name, self.read, self._restore = name, read, restore
        self.before = read()

    def undo(self) -> bool:
        """Restore it; return whether that succeeded."""
        if self._restore is None:
            return False
        with suppress(Exception):
            self._restore(self.before)
        return bool(self.read() == self.before)


class ProcessState:
    """The state of the process that tasks must not change, as it was before the first one.

    arm: sets up what cannot be compared, after each look. ours: how the names of threads begin that may run.
    """

    def __init__(self, arm: Callable[[], object], ours: tuple[str, ...]) -> None:
        self._arm, self._ours = arm, ours
        self.must_end = False  # this process cannot be restored
        self.is_broken = False  # and must not use the database any more
        self._clean = Counter[str]()  # runs of each task that left nothing
        self._trusted: set[str] = set()
        self._full_at = 0.0  # monotonic seconds
        self._threads = set(threading.enumerate())
        self._thread_count = _thread._count()
        self._children = set(processes.children(os.getpid()))
        self._copies = [_high_copy(number) for number in range(3)]
        self._folder = _open_folder()
        self._streams = [sys.stdin, sys.stdout, sys.stderr]
        self._handlers = [_signal.getsignal(number) for number in SIGNALS]
        self._common_handlers = [_signal.getsignal(number) for number in COMMON_SIGNALS]
        self._settings = [Setting(*each) for each in self._all_settings()]
        self._descriptors = {number: _identity(number) for number in _descriptors() if not _is_socket(number)}

    def _all_settings(self) -> Iterator[tuple[Any, ...]]:
        yield "the signal mask", lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()), _set_mask
        yield "the working directory", _working_directory, lambda _: os.fchdir(self._folder or 0)
        yield "the umask", _umask, os.umask
        yield "environment variables", _environment, _set_environment
        yield "the locale", lambda: locale.setlocale(locale.LC_ALL), lambda text: locale.setlocale(locale.LC_ALL, text)
        yield "a trace function", sys.gettrace, sys.settrace
        yield "a profile function", sys.getprofile, sys.setprofile
        yield "the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit
        yield "the switch interval", sys.getswitchinterval, sys.setswitchinterval
        yield "the thread stack size", threading.stack_size, threading.stack_size
        yield "garbage collection", lambda: (gc.isenabled(), gc.get_threshold(), gc.get_debug()), _set_gc
        yield "hooks of sys", lambda: [getattr(sys, name) for name in HOOKS], _set_hooks
        yield "hooks of asynchronous generators", sys.get_asyncgen_hooks, lambda hooks: sys.set_asyncgen_hooks(*hooks)
        yield "the hook of threading", lambda: threading.excepthook, lambda hook: setattr(threading, "excepthook", hook)
        yield "sys.path", lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)
        yield "sys.argv", lambda: list(sys.argv), lambda argv: setattr(sys, "argv", argv)
        yield "builtins", lambda: dict(vars(builtins)), _set_builtins
        yield "warning filters", lambda: list(warnings.filters), _set_filters
        yield "logging", _logging, _set_logging
        if "socket" in sys.modules:
            socket = sys.modules["socket"]
            yield "the default timeout of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout
        if hasattr(sys, "get_int_max_str_digits"):
            yield "the digits of integers", sys.get_int_max_str_digits, sys.set_int_max_str_digits
        yield "resource limits", lambda: [resource.getrlimit(limit) for limit in LIMITS], _set_limits
        yield (
            "the priority",
            lambda: os.getpriority(os.PRIO_PROCESS, 0),
            lambda to: os.setpriority(os.PRIO_PROCESS, 0, to),
        )
        if hasattr(os, "sched_getaffinity"):
            yield "the processors", lambda: os.sched_getaffinity(0), lambda to: os.sched_setaffinity(0, to)
            yield "the scheduling policy", lambda: os.sched_getscheduler(0)
        yield "the account", lambda: (os.getuid(), os.geteuid(), os.getgid(), os.getegid(), os.getgroups())
        yield "the process group", lambda: (os.getpgrp(), os.getsid(0))
        yield "the root directory", lambda: os.stat("/")[1:3]
        yield "timers of the system", _posix_timers

    def left_behind(self, task: str, seconds: float) -> list[str]:
        """Undo what a task has changed, and return what that was. seconds: how long the task ran."""
        is_short = seconds < LONG_SECONDS and time.monotonic() < self._full_at + FULL_SECONDS
        if is_short and task in self._trusted and self._seems_clean():
            return []
        self._full_at = time.monotonic()
        left = list(self._look())
        self._clean[task] = -(10**9) if left else self._clean[task] + 1
        if self._clean[task] == TRUSTED_RUNS:
            self._trusted.add(task)
        if left:
            self._trusted.discard(task)
        return left

    def has_lost_descriptors(self) -> bool:
        """Return whether a task has closed a descriptor of this process, or put another file in its place."""
        return any(_identity(number) != before for number, before in self._descriptors.items() if number > 2)

    def _seems_clean(self) -> bool:
        return (
            list(map(_signal.getsignal, COMMON_SIGNALS)) == self._common_handlers
            and _thread._count() <= self._thread_count
            and sys.stdout is self._streams[1]
            and not (sys.stdout and sys.stdout.closed)
        )

    def _look(self) -> Iterator[str]:
        yield from self._stop_timers()  # first: a handler of the task may raise
        self._arm()
        yield from self._reset_handlers()
        yield from self._reset_descriptors()
        yield from self._reset_streams()
        for setting in self._settings:
            if setting.read() != setting.before:
                self.must_end = not setting.undo() or self.must_end
                yield setting.name
        for thread in set(threading.enumerate()) - self._threads:
            if not thread.name.startswith(self._ours):
                self.must_end = True
                yield f"the thread {thread.name!r}"
        for pid in self._new_children():
            self.must_end = True
            yield f"the process {pid} ({processes.name(pid)})"

    def _stop_timers(self) -> Iterator[str]:
        for timer in TIMERS:
            if _signal.getitimer(timer) != (0.0, 0.0):
                signal.setitimer(timer, 0)
                yield "a timer"

    def _reset_handlers(self) -> Iterator[str]:
        if signal.set_wakeup_fd(-1) != -1:
            yield "the wakeup descriptor of signals"
        for number, handler in zip(SIGNALS, self._handlers, strict=True):
            if _signal.getsignal(number) != handler:
                signal.signal(number, handler)
                yield f"the handler of {signal.Signals(number).name if number in set(signal.Signals) else number}"

    def _reset_descriptors(self) -> Iterator[str]:
        for number, identity in self._descriptors.items():
            if _identity(number) == identity:
                continue
            if number < 3 and (copy := self._copies[number]) is not None:
                os.dup2(copy, number)
            if _identity(number) != identity:
                self.must_end = self.is_broken = True
            yield f"the closed descriptor {number}"
        if (new := len(_descriptors()) - len(self._descriptors)) > MAX_DESCRIPTORS:
            self.must_end = True
            yield f"{new} open descriptors"

    def _reset_streams(self) -> Iterator[str]:
        for number, (name, before) in enumerate(zip(("stdin", "stdout", "stderr"), self._streams, strict=True)):
            if before is not None and before.closed:
                self._streams[number] = self._reopened(number)
            if getattr(sys, name) is not self._streams[number]:
                setattr(sys, name, self._streams[number])
                setattr(sys, f"__{name}__", self._streams[number])
                yield f"sys.{name}"

    def _reopened(self, number: int) -> Any:
        if (copy := self._copies[number]) is not None:
            os.dup2(copy, number)
        with suppress(OSError):
            file = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115 - it replaces sys.stdout
            return io.TextIOWrapper(file, errors="backslashreplace", line_buffering=True)
        return None

    def _new_children(self) -> list[int]:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
        return [pid for pid in set(processes.children(os.getpid())) - self._children if processes.is_running(pid)]


HOOKS = ("excepthook", "unraisablehook", "displayhook", "breakpointhook")


def _high_copy(number: int) -> int | None:
    for least in (HIGH_DESCRIPTOR, 3):  # the limit may be lower
        with suppress(OSError):
            return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, least)
    return None


def _open_folder() -> int | None:
    with suppress(OSError):
        folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _high_copy(folder)
        finally:
            os.close(folder)
    return None


def _descriptors() -> list[int]:
    """Return the open descriptors; on a system without /proc, those that are in use most."""
    with suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/fd")]  # and one that is closed by now
    return [number for number in range(64) if _identity(number) is not None]


def _identity(number: int) -> tuple[int, int] | None:
    with suppress(OSError):
        return os.fstat(number)[1:3]
    return None


def _is_socket(number: int) -> bool:
    """Return whether this is a connection, which may be lost and replaced at any time."""
    with suppress(OSError):
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    return True


def _working_directory() -> str | None:
    with suppress(OSError):
        return os.getcwd()
    return None


def _umask() -> int:
    os.umask(before := os.umask(0o077))
    return before


def _set_mask(mask: set[signal.Signals]) -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _environment() -> dict[Any, Any]:
    raw: dict[Any, Any] = vars(os.environ)["_data"]  # encoded: to decode it all would take 60 us
    return dict(raw)


def _set_environment(before: dict[Any, Any]) -> None:
    for name in {*_environment(), *before}:
        if name in before:
            os.environ[os.fsdecode(name)] = os.fsdecode(before[name])
        else:
            del os.environ[os.fsdecode(name)]
    time.tzset()


def _set_gc(before: tuple[bool, tuple[int, int, int], int]) -> None:
    (gc.enable if before[0] else gc.disable)()
    gc.set_threshold(*before[1])
    gc.set_debug(before[2])


def _set_hooks(before: list[Any]) -> None:
    for name, hook in zip(HOOKS, before, strict=True):
        setattr(sys, name, hook)


def _set_builtins(before: dict[str, Any]) -> None:
    names = vars(builtins)
    names.update(before)
    for name in set(names) - set(before):
        del names[name]


def _set_filters(before: list[Any]) -> None:
    warnings.filters[:] = before  # type: ignore[index]
    warnings.simplefilter("default", append=True)  # makes Python forget what it has cached
    warnings.filters[:] = before  # type: ignore[index]


def _logging() -> tuple[int, int, list[logging.Handler]]:
    root = logging.getLogger()
    return root.manager.disable, root.level, list(root.handlers)


def _set_logging(before: tuple[int, int, list[logging.Handler]]) -> None:
    root = logging.getLogger()
    root.manager.disable = before[0]
    root.setLevel(before[1])
    root.handlers[:] = before[2]


def _set_limits(before: list[tuple[int, int]]) -> None:
    for limit, values in zip(LIMITS, before, strict=True):
        if resource.getrlimit(limit) != values:
            resource.setrlimit(limit, values)


def _posix_timers() -> bytes:
    with suppress(OSError):
        file = os.open("/proc/self/timers", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(file, 4096)
        finally:
            os.close(file)
    return b""
