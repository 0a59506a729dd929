"""What tasks leave behind in their process: found after each task, and undone where that is possible.

docs/tasks.md lists it. Everything is compared after a task that took long or has rarely run, and at least ten times a
second. After other tasks, only what costs little is compared: signal handlers, threads and sys.stdout.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _thread
import _tracemalloc
import builtins
import codecs
import fcntl
import gc
import io
import locale
import logging
import os
import resource
import signal
import sqlite3
import stat
import struct
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from time import monotonic  # which a task may replace in `time`
from types import ModuleType
from typing import Any

import pqueue
from pqueue import DatabaseReplaced, QueueError
from pqueue_files import closing_file, status
from pqueue_tools import processes
from pqueue_tools.task_output import high_copy

TRUSTED_RUNS = 20  # of a task that left nothing; then it is looked at in full only if it took long
LONG_SECONDS = 0.005
FULL_SECONDS = 0.1
MAX_DESCRIPTORS = 100  # that tasks may leave open, such as connections
MAX_LOCKED_KB = 8192  # the limit of most accounts
SIGNALS = sorted(map(int, signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}))
COMMON_SIGNALS = [
    int(getattr(signal, f"SIG{name}"))
    for name in ("HUP", "INT", "QUIT", "USR1", "USR2", "PIPE", "ALRM", "TERM", "CHLD", "VTALRM", "PROF")
]
TIMERS = [getattr(signal, name) for name in ("ITIMER_REAL", "ITIMER_VIRTUAL", "ITIMER_PROF")]
LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
OF_THREADS = 3 << 31  # signals 32 and 33, which the C library handles when a first thread starts
NAMESPACES = ("mnt", "net", "user", "ipc", "uts", "cgroup", "pid_for_children", "time_for_children")
CODEC_ERRORS = [
    *("strict", "ignore", "replace", "backslashreplace", "xmlcharrefreplace", "namereplace"),
    *("surrogateescape", "surrogatepass"),
]
HEAP_TYPE, IMMUTABLE_TYPE = 1 << 9, 1 << 8  # flags of classes


@dataclass(eq=False)
class Setting:
    """A part of the process's state."""

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], object] | None = None  # None: impossible
    is_fatal: bool = field(default=False, kw_only=True)  # if it cannot be restored, the database cannot be used

    def __post_init__(self) -> None:
        self.before = self.read()

    def has_changed(self) -> bool:
        try:
            return bool(self.read() != self.before)
        except BaseException:  # what a task has put there
            return True

    def undo(self) -> bool:
        """Restore it; return whether that succeeded."""
        if self.restore is None:
            return False
        with suppress(BaseException):
            self.restore(self.before)
        return not self.has_changed()


def kept(name: str, mapping: dict[Any, Any], wanted: Callable[[Any], bool] = bool) -> Setting:
    """Return a setting: such values of this mapping; others may be added."""
    before = {key: value for key, value in mapping.items() if wanted(value)}
    return Setting(name, lambda: before.items() <= mapping.items(), lambda _: mapping.update(before))


def each_of(
    name: str, keys: Sequence[Any], get: Callable[[Any], Any], restore: Callable[[Any, Any], object], **options: bool
) -> Setting:
    """Return a setting: what `get` returns for each of these keys, and `restore` sets again."""

    def restore_all(before: list[Any]) -> None:
        for key, value in zip(keys, before, strict=True):
            restore(key, value)

    return Setting(name, lambda: list(map(get, keys)), restore_all, **options)


class Code(Setting):
    """The functions, classes and modules that a module, a class or an object refers to by its names.

    hides: returns whether a new name would hide something.
    """

    def __init__(self, owner: Any, hides: Callable[[str], bool]) -> None:
        names = [name for name, value in vars(owner).items() if _is_code(value)]
        self._owner, self._hides, self._number = owner, hides, len(vars(owner))
        self._names = [*names, *names[:1]]  # at least two, or none, so that a tuple is read
        self._get: Callable[[Any], Any] = itemgetter(*self._names) if names else lambda _: ()
        name = f"functions of {getattr(owner, '__name__', 'the queue')}"
        super().__init__(name, lambda: self._get(vars(owner)), self._set, is_fatal=True)

    def has_changed(self) -> bool:
        try:
            values = vars(self._owner)
            return bool(self._get(values) != self.before or (len(values) > self._number and self._new()))
        except BaseException:  # deleted, or not comparable
            return True

    def _set(self, before: tuple[Any, ...]) -> None:
        for name, value in zip(self._names, before, strict=True):
            if vars(self._owner).get(name) is not value:
                setattr(self._owner, name, value)
        for name in self._new():
            delattr(self._owner, name)

    def _new(self) -> list[str]:
        known = set(self._names)
        return [
            name
            for name, value in vars(self._owner).items()
            if name not in known and _is_code(value) and self._hides(name)
        ]


def _is_code(value: Any) -> bool:
    return (
        callable(value) or isinstance(value, (ModuleType, classmethod, staticmethod, property)) or value is os.environ
    )


def _used_code(queue: pqueue.PersistentQInterface) -> Iterator[Code]:
    """Yield the code of pqueue, and of what it uses directly of the standard library."""
    ours = [module for name, module in sys.modules.items() if name.startswith("pqueue")]
    used = {each for module in ours for each in vars(module).values() if isinstance(each, ModuleType)}
    modules = [each for each in {*ours, *used, os.path} if _is_known(each.__name__)]
    for module in modules:
        yield Code(module, partial(hasattr, builtins))
    for each in {each for module in modules for each in vars(module).values() if _is_changeable(each)}:
        if _is_known(each.__module__) and any(map(_is_code, vars(each).values())):
            yield Code(each, partial(hasattr, super(each, each)))
    yield Code(queue, partial(hasattr, type(queue)))


def _is_known(module: str) -> bool:
    """Return whether a module is of pqueue or of the standard library. Others may change themselves while they run."""
    return module.startswith("pqueue") or module.partition(".")[0] in sys.stdlib_module_names


def _is_changeable(value: Any) -> bool:
    """Return whether this is a class whose attributes can be set."""
    is_class = issubclass(type(value), type)  # isinstance is true for an alias such as Callable[[], int] in Python 3.10
    return is_class and bool(value.__flags__ & HEAP_TYPE) and not value.__flags__ & IMMUTABLE_TYPE


def _settings(folder: int | None) -> Iterator[Setting]:
    """Yield what is compared. folder: a descriptor of the working directory."""
    for module in (os, sys, signal):
        yield kept(f"constants of {module.__name__}", vars(module), lambda value: isinstance(value, (int, str)))
    # before what needs descriptors and memory
    yield each_of("resource limits", LIMITS, resource.getrlimit, _set_limit, is_fatal=True)
    yield Setting("the root directory or a namespace", lambda: (os.stat("/")[1:3], _namespaces()), is_fatal=True)
    ids = [getattr(os, f"get{name}") for name in ("uid", "euid", "gid", "egid", "groups")]
    yield Setting("the account", lambda: [get() for get in ids], is_fatal=True)
    yield Setting("the working directory", _working_directory, lambda _: os.fchdir(folder or 0))
    yield Setting("the umask", _umask, os.umask)
    yield Setting("locked memory", _locks_all_memory, lambda _: processes.libc().munlockall())
    yield Setting("environment variables", _environment, _set_environment)
    yield kept("the encoding of environment variables", vars(os.environ), callable)
    yield Setting("the locale", lambda: locale.setlocale(locale.LC_ALL), lambda to: locale.setlocale(locale.LC_ALL, to))
    yield from thread_settings()
    yield Setting("signal handlers in C, capabilities or filters of system calls", _status)
    yield Setting("timers of the system", lambda: _proc("timers"))
    yield from _interpreter_settings()
    yield from _library_settings()
    priority = os.PRIO_PROCESS, 0
    yield Setting("the priority", lambda: os.getpriority(*priority), lambda to: os.setpriority(*priority, to))
    if hasattr(os, "sched_getaffinity"):
        yield Setting("the processors", lambda: os.sched_getaffinity(0), lambda to: os.sched_setaffinity(0, to))
        yield Setting("the scheduling policy", lambda: os.sched_getscheduler(0))
    yield Setting("the process group", lambda: (os.getpgrp(), os.getsid(0)))
    yield Setting("the control group", lambda: _proc("cgroup"))
    yield Setting("the personality", processes.personality, lambda flags: processes.libc().personality(flags))
    yield Setting("the weight for the OOM killer", lambda: _proc("oom_score_adj"), _set_oom_score)
    yield Setting("attributes of prctl", processes.attributes, processes.set_attributes)


def thread_settings(files: Collection[int] = ()) -> Iterator[Setting]:
    """Yield the settings of the calling thread, which must also compare and restore them. files: its descriptors."""
    files = [each for each in files if _identity(each) and _is_socket(each)]  # not what other threads open meanwhile
    yield each_of("flags of descriptors", files, _flags, _set_flags)
    mask = partial(signal.pthread_sigmask, signal.SIG_BLOCK, ()), partial(signal.pthread_sigmask, signal.SIG_SETMASK)
    yield Setting("the signal mask", *mask)
    yield Setting("a trace function", sys.gettrace, sys.settrace)
    yield Setting("a profile function", sys.getprofile, sys.setprofile)
    yield Setting(
        "hooks of asynchronous generators", sys.get_asyncgen_hooks, lambda hooks: sys.set_asyncgen_hooks(*hooks)
    )
    yield Setting("floating-point arithmetic", _arithmetic, lambda _: processes.reset_arithmetic())
    track = sys.get_coroutine_origin_tracking_depth, sys.set_coroutine_origin_tracking_depth
    yield Setting("the tracking of coroutines", *track)


def _interpreter_settings() -> Iterator[Setting]:
    traces = partial(getattr, threading), partial(setattr, threading)
    yield each_of("a trace function of threads", ("_trace_hook", "_profile_hook"), *traces)
    yield Setting("the recursion limit", sys.getrecursionlimit, sys.setrecursionlimit)
    yield Setting("the switch interval", sys.getswitchinterval, sys.setswitchinterval)
    yield Setting("the thread stack size", threading.stack_size, threading.stack_size)
    yield Setting("garbage collection", gc.isenabled, lambda enabled: (gc.enable if enabled else gc.disable)())
    yield Setting("garbage collection", gc.get_threshold, lambda numbers: gc.set_threshold(*numbers))
    yield Setting("garbage collection", gc.get_debug, gc.set_debug)
    callbacks = gc.callbacks.__setitem__
    yield Setting("garbage collection", lambda: list(gc.callbacks), partial(callbacks, slice(None)))
    if hasattr(sys, "get_int_max_str_digits"):
        yield Setting("the digits of integers", sys.get_int_max_str_digits, sys.set_int_max_str_digits)
    if monitoring := getattr(sys, "monitoring", None):
        yield Setting("a tool of sys.monitoring", lambda: [monitoring.get_tool(number) for number in range(6)])
    if is_active := getattr(sys, "is_stack_trampoline_active", None):
        stop: Any = vars(sys)["deactivate_stack_trampoline"]
        yield Setting("the trampoline of perf", is_active, lambda _: stop())
    yield Setting("sys.path", lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path))
    hooks = list(sys.meta_path), list(sys.path_hooks)
    yield Setting("import hooks", lambda: _finds_modules(hooks), lambda _: _set_import_hooks(hooks))
    yield Setting("the tracing of memory", _tracemalloc.is_tracing, lambda _: _tracemalloc.stop())
    yield Setting("sys.argv", lambda: list(sys.argv), lambda argv: setattr(sys, "argv", argv))
    yield Setting("sys.tracebacklimit", lambda: getattr(sys, "tracebacklimit", None), _set_traceback_limit)
    yield Setting("the flags of dlopen", sys.getdlopenflags, sys.setdlopenflags)
    modules, loaded = sys.modules, dict(sys.modules)
    yield Setting("sys.modules", lambda: loaded.items() <= sys.modules.items(), lambda _: _set_modules(modules, loaded))
    yield Setting("an interpreter", _count_interpreters)
    yield Setting("builtins", lambda: dict(vars(builtins)), _set_builtins)
    yield each_of("error handlers of codecs", CODEC_ERRORS, codecs.lookup_error, codecs.register_error)
    yield kept("the registered tasks", pqueue.TASKS)


def _library_settings() -> Iterator[Setting]:
    yield Setting("warning filters", lambda: list(warnings.filters), _set_filters)
    loggers = [logging.getLogger(), *map(logging.getLogger, sorted(logging.root.manager.loggerDict))]
    yield Setting("logging", lambda: _logging(loggers), lambda before: _set_logging(loggers, before))
    yield Setting("the event loop or its policy", _event_loop, _set_event_loop)
    yield Setting("the start method of multiprocessing", _start_method, _set_start_method)
    yield Setting("adapters of sqlite3", _adapters, _set_adapters)
    if socket := sys.modules.get("socket"):
        yield Setting("the default timeout of sockets", socket.getdefaulttimeout, socket.setdefaulttimeout)
    if tempfile := sys.modules.get("tempfile"):
        yield Setting("tempfile.tempdir", lambda: tempfile.tempdir, lambda to: setattr(tempfile, "tempdir", to))
    if decimal := sys.modules.get("decimal"):
        yield Setting("decimal.DefaultContext", lambda: repr(decimal.DefaultContext))


class ProcessState:
    """The state of the process that tasks must not change, as it was before the first one.

    arm: sets up what cannot be compared, after each look. ours: how the names of threads begin that may run.
    """

    def __init__(self, arm: Callable[[], object], queue: pqueue.PersistentQInterface, ours: tuple[str, ...]) -> None:
        self._arm, self._queue, self._ours = arm, queue, ours
        self.must_end = False  # this process cannot be restored
        self.is_broken = False  # and must not use the database any more
        self._clean = Counter[str]()  # runs of each task that left nothing; below 0 once it left something
        self._full_at = 0.0  # monotonic seconds
        self._threads = set(threading.enumerate())
        self._thread_count = _thread._count()
        self._children = set(processes.children(os.getpid()))
        self._copies = [high_copy(number) for number in range(3)]
        self._folder = _open_folder()
        self._streams = [sys.stdin, sys.stdout, sys.stderr]
        self._modes = list(map(_mode, self._streams))
        self._handlers = [_signal.getsignal(number) for number in SIGNALS]
        self._common_handlers = [_signal.getsignal(number) for number in COMMON_SIGNALS]
        self._raw_threads = _raw_threads()
        self._code = list(_used_code(queue))
        self._settings = list(_settings(self._folder))
        self._descriptors = _other_than_sockets()
        self._note_database()
        settings, renew = lambda: queue.connection_settings, lambda _: self.renew_connection()
        self._connection = Setting("a changed connection", settings, renew, is_fatal=True)

    def left_behind(self, task: str, seconds: float) -> list[str]:
        """Undo what a task has changed, and return what that was. seconds: how long the task ran."""
        is_short = seconds < LONG_SECONDS and monotonic() < self._full_at + FULL_SECONDS
        if is_short and self._clean[task] >= TRUSTED_RUNS and self._seems_clean():
            return []
        self._full_at = monotonic()
        try:
            left = list(self._look())
        except BaseException as error:  # what a task has put in place of functions that this uses
            self.must_end = self.is_broken = True
            left = [f"a state that cannot be read ({type(error).__name__})"]
        self._clean[task] = -(10**9) if left else self._clean[task] + 1
        return left

    def _note_database(self) -> None:
        """Note the descriptors that SQLite writes to, and their flags, which few other files have."""
        files = [found[1:3] for suffix in ("", "-wal") if (found := status(f"{self._queue.name}{suffix}"))]
        self._database = {number: found[2:] for number, found in self._descriptors.items() if found[:2] in files}

    def would_damage_database(self) -> bool:
        """Return whether what is written would not reach its place: a task has closed a descriptor of the database, put
        another file there, or set O_APPEND; or temporary tables hide those of the queue, for example."""
        try:
            return any(_flags(number) != flags for number, flags in self._database.items()) or self._queue.hides_rows
        except (OSError, QueueError):
            return True

    def repair_database(self) -> list[str]:
        """Undo that, and return what it was."""
        found = list(self._reset_descriptors())
        return found if self.is_broken else [*found, *self.undo([self._connection])]

    def _seems_clean(self) -> bool:
        return (
            list(map(_signal.getsignal, COMMON_SIGNALS)) == self._common_handlers
            and _thread._count() <= self._thread_count
            and sys.stdout is self._streams[1]
            and (sys.stdout is None or _is_usable(sys.stdout))
        )

    def _look(self) -> Iterator[str]:
        yield from self._stop_timers()  # first: a handler of the task may raise
        yield from self.undo(self._code)  # before it is called
        self._arm()
        yield from self._reset_handlers()
        yield from self._reset_descriptors()
        # guard: what a task has set on its connection is gone with it
        if self._queue.has_lent_connection and not self.is_broken:
            with suppress(DatabaseReplaced):  # no task is to blame, and the next use says so
                self.renew_connection()
        if not self.is_broken:
            yield from self.undo([self._connection])
        yield from self._reset_streams()
        yield from self.undo(self._settings)
        yield from self._new_threads()
        for pid in self._new_children():
            self.must_end = True
            yield f"the process {pid} ({processes.name(pid)})"

    def undo(self, settings: Sequence[Setting]) -> Iterator[str]:
        """Restore these settings one by one, and yield the names of those that had changed."""
        for setting in settings:
            if setting.has_changed():
                is_left = not setting.undo()
                self.must_end = self.must_end or is_left
                self.is_broken = self.is_broken or (is_left and setting.is_fatal)
                yield setting.name

    def _new_threads(self) -> Iterator[str]:
        if _raw_threads() > self._raw_threads:
            time.sleep(0.01)  # one that ends is forgotten by `threading` first
            if _raw_threads() > self._raw_threads:
                self.must_end = True
                yield "a thread"
        for thread in set(threading.enumerate()) - self._threads:
            if not thread.name.startswith(self._ours):
                self.must_end = True
                yield f"the thread {thread.name!r}"

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
        """Undo what a task has changed in the descriptors of this process, and yield what that was."""
        for number, before in self._descriptors.items():
            if (now := _identity(number)) == before:
                continue
            is_open = now is not None and now[:2] == before[:2]
            if is_open:
                _set_flags(number, before[2:])
            elif number < 3 and (copy := self._copies[number]) is not None:
                os.dup2(copy, number)
            if _identity(number) != before:
                self.must_end = self.is_broken = True
            yield f"{'flags of the' if is_open else 'the closed'} descriptor {number}"
        if (new := len(open_descriptors()) - len(self._descriptors)) > MAX_DESCRIPTORS:
            self.must_end = True
            yield f"{new} open descriptors"

    def renew_connection(self) -> None:
        """Replace the connection of this thread."""
        before = _other_than_sockets()
        self._queue.renew_connection()
        after = _other_than_sockets()
        for number, _ in before.items() - after.items():
            self._descriptors.pop(number, None)
        self._descriptors.update(after.items() - before.items())
        self._note_database()

    def _reset_streams(self) -> Iterator[str]:
        for number, (name, before) in enumerate(zip(("stdin", "stdout", "stderr"), self._streams, strict=True)):
            if before is not None and not _is_usable(before):
                self._streams[number] = self._reopened(number)
            if (other := getattr(sys, name)) is not self._streams[number]:
                _leave_buffer(other, before)
                setattr(sys, name, self._streams[number])
                setattr(sys, f"__{name}__", self._streams[number])
                yield f"sys.{name}"
            elif (mode := _mode(self._streams[number])) != self._modes[number]:
                self._streams[number].reconfigure(**self._modes[number])  # type: ignore[union-attr]
                yield f"the {', '.join(key for key in mode if mode[key] != self._modes[number][key])} of sys.{name}"

    def _reopened(self, number: int) -> Any:
        if (copy := self._copies[number]) is not None:
            os.dup2(copy, number)
        with suppress(OSError):
            file = open(number, "wb" if number else "rb", closefd=False)  # noqa: SIM115 - it replaces sys.stdout
            return io.TextIOWrapper(file, **{"errors": "backslashreplace", **self._modes[number]})
        return None

    def _new_children(self) -> list[int]:
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return []
        new = set(processes.children(os.getpid())) - self._children
        for pid in new:
            with suppress(ChildProcessError):  # one that has ended; its status is lost, as subprocess expects
                os.waitpid(pid, os.WNOHANG)
        return [pid for pid in new if processes.is_running(pid)]


def _set_limit(limit: int, values: tuple[int, int]) -> None:
    if resource.getrlimit(limit) != values:  # to set it again may be refused: a setting of the system may be lower now
        resource.setrlimit(limit, values)


def _open_folder() -> int | None:
    with suppress(OSError), closing_file(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
        return high_copy(folder)
    return None


def open_descriptors() -> list[int]:
    """Return the open descriptors; on a system without /proc, those that are in use most."""
    with suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/fd")]  # and one that is closed by now
    return [number for number in range(64) if _identity(number)]


def _other_than_sockets() -> dict[int, tuple[int, ...]]:
    """Return the open descriptors that are no sockets, with their identities."""
    found = {number: _identity(number) for number in open_descriptors() if not _is_socket(number)}
    return {number: each for number, each in found.items() if each}


def _identity(number: int) -> tuple[int, ...] | None:
    """Return to which file a descriptor refers, and its flags."""
    with suppress(OSError):
        return (*os.fstat(number)[1:3], *_flags(number))
    return None


def _flags(number: int) -> tuple[int, int]:
    return fcntl.fcntl(number, fcntl.F_GETFL), fcntl.fcntl(number, fcntl.F_GETFD)


def _set_flags(number: int, flags: Sequence[int]) -> None:
    fcntl.fcntl(number, fcntl.F_SETFL, flags[0])
    fcntl.fcntl(number, fcntl.F_SETFD, flags[1])


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


def _environment() -> tuple[dict[Any, Any], list[bytes], tuple[str, str]]:
    raw: dict[Any, Any] = vars(os.environ)["_data"]  # encoded: to decode it all would take 60 us
    return dict(raw), processes.environment(), time.tzname


def _set_environment(before: tuple[dict[Any, Any], list[bytes], tuple[str, str]]) -> None:
    for name in {*_environment()[0], *before[0]}:
        if name in before[0]:
            os.environ[os.fsdecode(name)] = os.fsdecode(before[0][name])
        else:
            del os.environ[os.fsdecode(name)]
    for each in processes.environment():  # set by os.putenv or C code
        os.unsetenv(each.partition(b"=")[0])
    for each in before[1]:
        os.putenv(*each.split(b"=", 1))
    time.tzset()


def _arithmetic() -> bytes:
    """Return results that depend on how the processor rounds, and on whether it takes tiny numbers for 0; as bytes,
    because it may also compare them so."""
    one, tiny, least = 1.0, 1e-20, sys.float_info.min
    return struct.pack("=5d", one + tiny, -one - tiny, one - tiny, least / 2, least / 2 * one)


def _namespaces() -> list[str]:
    found = list[str]()
    for name in NAMESPACES:
        with suppress(OSError):  # an older kernel does not have all
            found.append(os.readlink(f"/proc/self/ns/{name}"))
    return found


def _proc(name: str) -> bytes:
    with suppress(OSError), closing_file(os.open(f"/proc/self/{name}", os.O_RDONLY | os.O_CLOEXEC)) as file:
        return os.read(file, 8192)
    return b""


def _set_oom_score(before: bytes) -> None:
    with closing_file(os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)) as file:
        os.write(file, before)


def _locks_all_memory() -> bool:
    """Return whether more memory is locked than libraries lock to keep a secret: perhaps all, and all that is to come,
    which would take long, or fail at a limit."""
    return any(int(line.split()[1]) > MAX_LOCKED_KB for line in _proc("status").splitlines() if b"VmLck" in line)


def _status() -> list[bytes | int]:
    found = list[bytes | int]()
    for line in _proc("status").splitlines():
        if line.startswith((b"SigIgn", b"SigCgt")):
            found.append(int(line.split()[1], 16) & ~OF_THREADS)
        elif line.startswith((b"Cap", b"NoNewPrivs", b"Seccomp", b"Specul", b"THP")):
            found.append(line)
    return found


def _raw_threads() -> int:
    """Return the number of threads that `threading` does not know."""
    return _thread._count() - sum(type(each).__name__ != "_DummyThread" for each in threading.enumerate())


def _set_traceback_limit(before: int | None) -> None:
    if before is None:
        del sys.tracebacklimit
    else:
        sys.tracebacklimit = before


def _set_builtins(before: dict[str, Any]) -> None:
    names = vars(builtins)
    names.update(before)
    for name in set(names) - set(before):
        del names[name]


def _set_modules(modules: dict[str, Any], loaded: dict[str, Any]) -> None:
    modules.update(loaded)
    sys.modules = modules


def _count_interpreters() -> int:
    for name in ("_interpreters", "_xxsubinterpreters"):
        if module := sys.modules.get(name):
            return len(module.list_all())
    return 1


def _set_filters(before: list[Any]) -> None:
    warnings.filters[:] = before  # type: ignore[index]
    warnings.simplefilter("default", append=True)  # makes Python forget what it has cached
    warnings.filters[:] = before  # type: ignore[index]


def _logging(loggers: list[logging.Logger]) -> tuple[int, list[Any]]:
    return logging.root.manager.disable, [
        (each.level, each.disabled, each.propagate, [*each.handlers], [*each.filters]) for each in loggers
    ]


def _set_logging(loggers: list[logging.Logger], before: tuple[int, list[Any]]) -> None:
    logging.root.manager.disable = before[0]
    for each, (level, disabled, propagate, handlers, filters) in zip(loggers, before[1], strict=True):
        each.setLevel(level)
        each.disabled, each.propagate = disabled, propagate
        each.handlers[:], each.filters[:] = handlers, filters


def _event_loop() -> tuple[Any, Any]:
    """Return the policy of asyncio if it is not the default, and the loop that seems to run."""
    if (events := sys.modules.get("asyncio.events")) is None:
        return None, None
    policy = getattr(events, "_event_loop_policy", None)
    is_default = policy is None or "Default" in type(policy).__name__
    return None if is_default else policy, events._get_running_loop()


def _set_event_loop(before: tuple[Any, Any]) -> None:
    events: Any = sys.modules["asyncio.events"]
    events._event_loop_policy = before[0]
    events._set_running_loop(before[1])


def _start_method() -> str | None:
    """Return the start method of multiprocessing if it is not the default."""
    if (multiprocessing := sys.modules.get("multiprocessing")) is None:
        return None
    method: str | None = multiprocessing.get_start_method(allow_none=True)
    return None if method == multiprocessing.get_all_start_methods()[0] else method


def _set_start_method(before: str | None) -> None:
    multiprocessing: Any = sys.modules["multiprocessing"]
    multiprocessing.set_start_method(before, force=True)


def _finds_modules(before: tuple[list[Any], list[Any]]) -> bool:
    """Return whether modules are found as before; a library that a task imports may add hooks that work."""
    if (sys.meta_path, sys.path_hooks) == before:
        return True
    is_whole = all(each in sys.meta_path for each in before[0]) and all(each in sys.path_hooks for each in before[1])
    return is_whole and all(each.find_spec("pqueue_none", None, None) is None for each in sys.meta_path)


def _set_import_hooks(before: tuple[list[Any], list[Any]]) -> None:
    sys.meta_path[:], sys.path_hooks[:] = before
    sys.path_importer_cache.clear()


def _adapters() -> dict[Any, Any]:
    """Return what converts values that the queue stores; a library that a task imports may add others."""
    return {key: sqlite3.adapters[key] for key in sqlite3.adapters if key[0] in (int, float, str, bytes, type(None))}


def _set_adapters(before: dict[Any, Any]) -> None:
    for key in _adapters():
        del sqlite3.adapters[key]
    sqlite3.adapters.update(before)


def _is_usable(stream: Any) -> bool:
    """Return whether a stream is neither closed nor detached."""
    try:
        return not stream.closed
    except ValueError:
        return False


def _leave_buffer(other: Any, before: Any) -> None:
    """Keep a stream that a task has put around the buffer of another one from closing it at the end of its life."""
    with suppress(BaseException):  # they may be anything
        if other is not before and other.buffer is before.buffer:
            other.detach()


def _mode(stream: Any) -> dict[str, Any]:
    """Return what `reconfigure` may change in a stream."""
    names = ("encoding", "errors", "line_buffering", "write_through")
    return {name: getattr(stream, name) for name in names} if isinstance(stream, io.TextIOWrapper) else {}
