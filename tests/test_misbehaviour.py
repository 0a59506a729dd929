"""Tasks that do to their process whatever they can: neither the consumer nor the next jobs are affected."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from conftest import PATIENCE_SECONDS, ROOT, parent, wait_until

import pqueue
from pqueue import QueueBusy, QueueError
from pqueue_tools import keeper, leftovers, processes
from pqueue_tools.leases import Leases, claim_number
from pqueue_tools.record import Record, Slot
from pqueue_tools.worker import Consumer

SOAK = int(os.environ.get("PQUEUE_SOAK", "1"))

TASKS = r'''
import _thread, asyncio, builtins, codecs, contextlib, ctypes, decimal, faulthandler, fcntl, gc, io, json, locale
import logging, logging.config
import multiprocessing, os, random, re, resource, signal, socket, sqlite3, subprocess, sys, tempfile, threading, time
import tracemalloc, warnings
from pathlib import Path
from pqueue import DoNotRetry, Retry, Snooze, current_queue, task

LIMIT = 2.0

class Unprintable(Exception):
    def __str__(self): return self.args[1]

class Untruthful(Exception):
    def __repr__(self): raise RuntimeError("no repr")
    def __str__(self): raise SystemExit("no str")

def raise_alarm(*_): raise ValueError("another task's alarm")

def nothing(*_): pass

def leave_loop():
    async def main(): asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, nothing)
    asyncio.run(main())

def leave_alarm():
    signal.signal(signal.SIGALRM, raise_alarm)
    signal.alarm(1)

def leave_c_alarm():
    faulthandler.dump_traceback_later(1, exit=True)

def leave_wakeup():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

def leave_thread(daemon=True):
    threading.Thread(target=time.sleep, args=[600], daemon=daemon).start()

def leave_spinning_thread():
    def spin():
        while True: pass
    threading.Thread(target=spin, daemon=True).start()

def leave_process(): subprocess.Popen(["sleep", "600"])

def leave_daemon(): subprocess.Popen(["sleep", "600"], start_new_session=True)

def leave_orphan():
    subprocess.run(["sh", "-c", "setsid sleep 600 & :"], check=True)

def leave_fork():
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)

def close_low(): os.closerange(0, 3)

def close_all(): os.closerange(3, 100)

def close_and_reuse():
    os.closerange(3, 60)
    for number in range(60): open(f"reused-{number}", "wb", buffering=0)

def leak_descriptors(): globals().setdefault("kept", []).extend(open(os.devnull) for _ in range(300))

def limit_descriptors(): resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))

def limit_memory(): resource.setrlimit(resource.RLIMIT_AS, (300_000_000, resource.getrlimit(resource.RLIMIT_AS)[1]))

def recurse():
    def deeper(): deeper()
    deeper()

def overflow():
    sys.setrecursionlimit(10**9)
    def deeper(): return "%s" % sorted([1], key=lambda _: deeper())
    deeper()

C = ctypes.CDLL(None)
INTERPRETERS = "_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters"
LIBRARY = logging.getLogger("a.library")

def leave_policy():
    class Policy:  # whose base is deprecated in Python 3.14
        def new_event_loop(self): raise RuntimeError("no loop")
    asyncio.events._event_loop_policy = Policy()

def leave_environment():
    os.putenv("SNEAKY", "1")
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    if before is None: del os.environ["TZ"]
    else: os.environ["TZ"] = before

def leave_handler_in_c():
    C.signal(int(signal.SIGTERM), ctypes.c_void_p(1))

class NoImports:
    def find_spec(self, *_): raise RuntimeError("no imports")

def leave_zombies():
    for _ in range(3):
        if (child := os.fork()) == 0: os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

def signal_parent():
    names = "USR1 USR2 ALRM VTALRM PROF IO PWR XCPU XFSZ STKFLT PIPE WINCH URG CONT".split()
    numbers = [getattr(signal, f"SIG{name}") for name in names if hasattr(signal, f"SIG{name}")]
    for number in [*numbers, *range(signal.SIGRTMIN, signal.SIGRTMAX + 1)]: os.kill(os.getppid(), number)

def leave_rounding(*modes):
    """Let the processor round up, and take tiny numbers for 0, as libraries built with -ffast-math do."""
    C.fesetround(0x800)
    if os.uname().machine == "x86_64":
        found = ctypes.create_string_buffer(64)
        C.fegetenv(found)
        control = int.from_bytes(found.raw[28:32], "little") | 0x8040
        found[28:32] = control.to_bytes(4, "little")
        C.fesetenv(found)

class Exiting:
    def __getattribute__(self, name): sys.exit("of an object that was left behind")
    def __eq__(self, other): sys.exit("of an object that was left behind")
    __ne__, __hash__ = __eq__, object.__hash__
    def __call__(self, *_): pass

LEAVE = {  # what the next job must not find
    "nothing": nothing,
    "loop": leave_loop,
    "alarm": leave_alarm,
    "c alarm": leave_c_alarm,
    "timer": lambda: signal.setitimer(signal.ITIMER_PROF, 0.01),
    "ignored": lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGRTMIN + 1)],
    "blocked": lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()),
    "wakeup": leave_wakeup,
    "thread": leave_thread,
    "waiting thread": lambda: leave_thread(daemon=False),
    "spinning thread": leave_spinning_thread,
    "process": leave_process,
    "daemon": leave_daemon,
    "orphan": leave_orphan,
    "fork": leave_fork,
    "pool": lambda: globals().setdefault("kept", []).append(multiprocessing.get_context("fork").Pool(2)),
    "low descriptors": close_low,
    "all descriptors": close_all,
    "reused descriptors": close_and_reuse,
    "leaked descriptors": leak_descriptors,
    "few descriptors": limit_descriptors,
    "little memory": limit_memory,
    "folder": lambda: os.chdir("/"),
    "deleted folder": lambda: (os.mkdir("gone"), os.chdir("gone"), os.rmdir("../gone")),
    "umask": lambda: os.umask(0),
    "environment": lambda: os.environ.update(TZ="Asia/Tokyo", HOME="/nowhere") or time.tzset(),
    "no environment": lambda: os.environ.clear(),
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "closed streams": lambda: (sys.stdout.close(), sys.stderr.close(), sys.stdin.close()),
    "other streams": lambda: (setattr(sys, "stdout", io.StringIO()), setattr(sys, "stderr", None)),
    "trace": lambda: sys.settrace(lambda *_: None),
    "profile": lambda: sys.setprofile(lambda *_: None),
    "hooks": lambda: setattr(sys, "excepthook", nothing),
    "recursion limit": lambda: sys.setrecursionlimit(60),
    "switch interval": lambda: sys.setswitchinterval(100),
    "garbage": lambda: (gc.disable(), gc.set_threshold(1, 1, 1)),
    "path": lambda: sys.path.clear(),
    "builtins": lambda: setattr(builtins, "open", nothing),
    "warnings": lambda: warnings.simplefilter("once"),
    "logging": lambda: (logging.disable(), logging.getLogger().setLevel(1)),
    "sockets": lambda: socket.setdefaulttimeout(0.001),
    "decimals": lambda: setattr(decimal.getcontext(), "prec", 3),
    "priority": lambda: os.nice(1),
    "processors": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    "handlers of faults": faulthandler.disable,
    "raw thread": lambda: (_thread.start_new_thread(time.sleep, (600,)), time.sleep(0.1)),
    "waiting streams": lambda: [os.set_blocking(number, False) for number in (1, 2)],
    "detached stream": lambda: globals().setdefault("kept", []).append(sys.stdout.detach()),
    "encoding of a stream": lambda: sys.stdout.reconfigure(encoding="ascii", errors="strict"),
    "policy": leave_policy,
    "running loop": lambda: asyncio._set_running_loop(object()),
    "modules": lambda: [sys.modules.pop(name) for name in ("json", "time")],
    "codecs": lambda: codecs.register_error("strict", lambda error: ("?", error.end)),
    "loggers": lambda: logging.config.dictConfig({"version": 1}),
    "records": lambda: logging.setLogRecordFactory(nothing),
    "captured warnings": lambda: logging.captureWarnings(True),
    "clock": lambda: setattr(time, "monotonic", lambda: 1.0),
    "functions": lambda: (setattr(os, "fstat", None), setattr(os, "environ", {})),
    "hidden environment": leave_environment,
    "namespace": lambda: C.unshare(0x04000000),
    "tasks": lambda: sys.modules["pqueue"].TASKS.clear(),
    "end of the parent": lambda: C.prctl(1, 0, 0, 0, 0),
    "dumps": lambda: C.prctl(4, 0, 0, 0, 0),
    "locked memory": lambda: C.mlockall(1),
    "privileges": lambda: C.prctl(38, 1, 0, 0, 0),
    "handler in C": leave_handler_in_c,
    "faults of others": lambda: faulthandler.register(signal.SIGRTMIN + 1),
    "collections": lambda: gc.callbacks.append(nothing),
    "trace of threads": lambda: threading.settrace(nothing),
    "traceback limit": lambda: setattr(sys, "tracebacklimit", 0),
    "start method": lambda: multiprocessing.set_start_method("spawn", force=True),
    "default decimals": lambda: setattr(decimal.DefaultContext, "prec", 3),
    "temporary folder": lambda: setattr(tempfile, "tempdir", "/nowhere"),
    "wrapped stream": lambda: setattr(sys, "stdout", io.TextIOWrapper(sys.stdout.buffer)),
    "zombies": leave_zombies,
    "traced": lambda: C.ptrace(0, 0, 0, 0),
    "signals to the parent": signal_parent,
    "adapters": lambda: [sqlite3.register_adapter(kind, repr) for kind in (int, float, str)],
    "import hook": lambda: sys.meta_path.insert(0, NoImports()),
    "no import hooks": lambda: (sys.meta_path.clear(), sys.path_hooks.clear()),
    "traced memory": tracemalloc.start,
    "constants": lambda: (setattr(os, "O_CLOEXEC", 0), setattr(sys, "platform", "none")),
    "json": lambda: setattr(json, "dumps", nothing),
    "connecting": lambda: setattr(sqlite3, "connect", nothing),
    "methods": lambda: [setattr(threading.Thread, name, raise_alarm) for name in ("start", "run")],
    "paths": lambda: setattr(os.path, "exists", nothing),
    "blocks": lambda: setattr(contextlib.suppress, "__exit__", raise_alarm),
    "contexts": lambda: setattr(sys.modules["pqueue_tools.worker"], "copy_context", raise_alarm),
    "running": lambda: setattr(sys.modules["pqueue"], "run_task", raise_alarm),
    "completing": lambda: setattr(type(current_queue()), "complete_and_dequeue", raise_alarm),
    "completing by one": lambda: setattr(current_queue(), "complete_and_dequeue", raise_alarm),
    "lost modules": lambda: setattr(sys.modules["pqueue_tools.worker"], "pqueue", None),
    "name": lambda: C.prctl(15, b"renamed", 0, 0, 0),
    "kept capabilities": lambda: C.prctl(8, 1, 0, 0, 0),
    "other modules": lambda: setattr(sys, "modules", {}),
    "interpreter": lambda: globals().setdefault("kept", []).append(__import__(INTERPRETERS).create()),
    "hard limit": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    "namespace of processes": lambda: C.unshare(0x20000000),
    "root": lambda: (os.mkdir("jail"), os.chroot("jail")),
    "account": lambda: os.seteuid(65534),
    "rounding": leave_rounding,
    "personality": lambda: C.personality(0x0040000),
    "huge pages": lambda: C.prctl(41, 1, 0, 0, 0),
    "clocks of children": lambda: C.unshare(0x80),
    "exiting stream": lambda: setattr(sys, "stdin", Exiting()),
    "exiting handler": lambda: signal.signal(signal.SIGUSR1, Exiting()),
    "exiting path": lambda: sys.path.insert(0, Exiting()),
    "environment that fails": lambda: setattr(os.environ, "encodekey", nothing),
}

def status(*names):
    return [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(names)]

def state():
    """Return the state of the process, as far as tasks are expected to leave it alone."""
    os.umask(mask := os.umask(0o77))
    return {
        "handlers": [repr(signal.getsignal(number)).partition(" at ")[0] for number in range(1, 32)],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "timers": [signal.getitimer(timer) for timer in range(3)],
        "threads": threading.active_count(),
        "folder": os.getcwd(), "umask": mask, "environment": dict(os.environ), "zone": time.tzname,
        "streams": [stream is None or stream.closed for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "locale": locale.setlocale(locale.LC_ALL),
        "hooks": [repr(sys.gettrace()), repr(sys.getprofile()), repr(sys.excepthook)],
        "limits": [resource.getrlimit(limit) for limit in range(16)],
        "interpreter": [sys.getrecursionlimit(), sys.getswitchinterval(), gc.isenabled(), gc.get_threshold()],
        "path": sys.path, "open": repr(open), "filters": len(warnings.filters),
        "logging": [logging.root.manager.disable, logging.root.level, LIBRARY.disabled],
        "records": logging.getLogRecordFactory().__name__,
        "warnings": warnings.showwarning.__module__,
        "flags": [fcntl.fcntl(number, fcntl.F_GETFL) for number in range(3)],
        "encodings": [(stream.encoding, stream.errors) for stream in (sys.stdout, sys.stderr)],
        "asyncio": [type(asyncio.events._event_loop_policy).__name__ == "Policy", asyncio._get_running_loop() is None],
        "modules": [name in sys.modules for name in ("json", "time")],
        "codecs": codecs.lookup_error("strict").__name__,
        "functions": [time.monotonic() > 1, os.fstat(1)[1], json.dumps([1]), os.path.exists("/")],
        "names": [each.__name__ for each in (sqlite3.connect, threading.Thread.start, threading.Thread.run)],
        "inherited": subprocess.run(["env"], capture_output=True, text=True).stdout,
        "namespaces": [os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))],
        "prctl": [C.prctl(number, 0, 0, 0, 0) for number in (3, 7)],
        "status": status("Name", "NoNewPrivs", "THP", "SigIgn", "Cap", "VmLck"),
        "collections": len(gc.callbacks), "trace of threads": repr(threading._trace_hook),
        "traceback limit": getattr(sys, "tracebacklimit", None),
        "start method": multiprocessing.get_start_method(allow_none=True) == "spawn",
        "default decimals": decimal.DefaultContext.prec, "temporary folder": tempfile.tempdir, "euid": os.geteuid(),
        "sockets": socket.getdefaulttimeout(), "decimals": decimal.getcontext().prec,
        "hooks of imports": [len(sys.meta_path), len(sys.path_hooks)], "traced": tracemalloc.is_tracing(),
        "tracer": status("TracerPid"), "constants": [os.O_CLOEXEC, sys.platform],
        "priority": [os.nice(0), len(os.sched_getaffinity(0))],
        "faults": faulthandler.is_enabled(), "personality": C.personality(0xffffffff),
        "arithmetic": [repr(sys.float_info.min / 2), 1 + sys.float_info.min * 1e9 == 1],
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    }

END = {  # how the process ends, or would without help
    "leave": lambda: os._exit(0),
    "leave with 3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "fault": lambda: ctypes.string_at(0),
    "jump": lambda: ctypes.CFUNCTYPE(None)(1)(),
    "become": lambda: os.execvp("sleep", ["sleep", "600"]),
    "overflow": overflow,
    "gil": lambda: sum(range(10**11)),
    "c sleep": lambda: ctypes.PyDLL(None).sleep(600),
    "blocked sleep": lambda: (signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()), time.sleep(600)),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}

def swallow():
    while True:
        try: time.sleep(600)
        except BaseException: pass

RUN_ON = {  # until the limit
    "loop": lambda: [None for _ in iter(int, 1)],
    "sleep": lambda: time.sleep(600),
    "message": lambda: fail(Slow()),
    "expression": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
    "swallow": swallow,
    "subprocess": lambda: subprocess.run(["sleep", "600"]),
    "lock": lambda: threading.Lock().acquire() and (lock := threading.Lock()).acquire() and lock.acquire(),
    "join": lambda: (thread := threading.Thread(target=time.sleep, args=[600], daemon=True)).start() or thread.join(),
    "input": lambda: os.read(os.pipe()[0], 1),
}

def fail(error): raise error

class Evil(BaseException):
    def __getattribute__(self, name): raise RuntimeError("evil")

class Nothing(Exception):
    def __bool__(self): return False

class Hidden(Exception):
    __traceback__ = __cause__ = __context__ = property(lambda self: sys.exit("hidden"))

class Nameless(type):
    __name__ = property(lambda cls: sys.exit("no name"))

class OfNameless(Exception, metaclass=Nameless): pass

class Slow(Exception):
    def __str__(self): time.sleep(600)

class LongSnooze(Snooze):
    def __init__(self): pass

class OddRetry(Retry):
    def __init__(self): self.in_seconds = "soon"

RAISE = {
    "lost lease": lambda: fail(sys.modules["pqueue"].LeaseLost("of another queue")),
    "evil": lambda: fail(Evil()),
    "nothing": lambda: fail(Nothing()),
    "hidden": lambda: fail(Hidden("the reason")),
    "nameless": lambda: fail(OfNameless("the reason")),
    "retry": lambda: fail(OddRetry()),
    "notes": lambda: (setattr(error := ValueError("the reason"), "__notes__", 3), fail(error)),
    "unprintable": lambda: fail(Unprintable("one")),
    "untruthful": lambda: fail(Untruthful()),
    "huge": lambda: fail(ValueError("x" * 20_000_000)),
    "recursion": recurse,
    "exit": lambda: sys.exit("leaving"),
    "interrupt": lambda: fail(KeyboardInterrupt()),
    "generator": lambda: fail(GeneratorExit()),
    "surrogates": lambda: fail(ValueError("\udcff\0")),
    "memory": lambda: bytearray(10**15),
}

@task(max_attempts=1)
def leave(job): LEAVE[job.payload]()

@task(max_attempts=1, timeout_seconds=LIMIT)
def end(job): END[job.payload]()

@task(max_attempts=1, timeout_seconds=LIMIT)
def run_on(job): RUN_ON[job.payload]()

@task(max_attempts=1)
def fall(job): RAISE[job.payload]()

@task(max_attempts=1)
async def fall_async(job): RAISE[job.payload]()

@task(max_attempts=1, memory_mb=200, timeout_seconds=30)
def eat(job):
    held = []
    while True:
        held.append(bytearray(10_000_000))
        time.sleep(0.005)

@task()
def look(job): return state()

@task()
def good(job):
    with open("good", "ab", buffering=0) as file: file.write(f"{job.id}\n".encode())
    return job.id

@task()
def pid(job): return os.getpid()

@task(max_attempts=1)
def spawn(job):
    processes = [subprocess.Popen(["sleep", "600"]), subprocess.Popen(["sleep", "600"], start_new_session=True)]
    Path("spawned").write_text(" ".join(str(process.pid) for process in processes))
    time.sleep(600)

@task(max_attempts=1, timeout_seconds=1)
def spawn_and_hang(job):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    spawn(job)

@task(max_attempts=1)
def patient(job):
    Path("began").write_text(str(os.getpid()))
    while not Path("go-on").exists(): time.sleep(0.01)
    return "finished"

@task()
def hog(job):
    Path("began").write_text(str(os.getpid()))
    sum(range(10**13))

@task(max_attempts=3)
def hold_gil(job):
    """Hold the GIL for so many seconds."""
    Path("began").write_text(str(os.getpid()))
    sleep = ctypes.PyDLL(None).usleep
    for _ in range(int(job.payload)): sleep(999_999)
    return os.getpid()
'''


def names(kind):
    """Return the names of the misbehaviours of a kind."""
    table = TASKS.partition(f"\n{kind} = {{")[2].partition("\n}")[0]
    return [line.split('"')[1] for line in table.splitlines() if line.startswith('    "')]


@pytest.fixture
def tasks(place):
    place.write("my_tasks.py", TASKS)
    return place


def consumer(place, *arguments, **variables):
    return place.start("consumer.py", "--import", "my_tasks", *arguments, **variables)


def drain(place, *arguments, **variables):
    return place.run("consumer.py", "--import", "my_tasks", "--drain", *arguments, **variables)


def read(place, name):
    path = place.folder / name
    return path.exists() and path.read_text()


# A clean process for every task


UNREPORTED = ("nothing", "decimals", "c alarm", "handlers of faults", "faults of others", "orphan", "zombies", "traced",
              "signals to the parent")  # fmt: skip
AS_ROOT = ("namespace", "namespace of processes", "root", "account", "clocks of children")


@pytest.mark.parametrize("part", range(6))
def test_next_job_finds_the_process_as_the_first_one_did(tasks, part):
    queue = tasks.queue()
    left = [name for name in names("LEAVE")[part::6] if os.geteuid() == 0 or name not in AS_ROOT]
    first, *jobs = queue.enqueue("look"), *[(queue.enqueue("leave", name), queue.enqueue("look")) for name in left]
    slow = queue.enqueue("run_on", "sleep", max_attempts=1)  # which a timer left behind would end
    done = drain(tasks)
    assert done.returncode == 1, done.stderr
    expected = queue.get(first).result
    for name, (bad, look) in zip(left, jobs, strict=True):
        assert (name, queue.get(bad).error) == (name, None)
        assert (name, queue.get(look).result, queue.get(look).attempts) == (name, expected, 1)
        reports = [
            line
            for line in done.stdout.splitlines()
            if f"left behind consumer={queue.get(bad).consumer} job={bad} " in line
        ]
        assert (name, len(reports)) == (name, name not in UNREPORTED), done
    assert queue.get(slow).error.startswith("TimeoutError: timed out after 2 s\n"), done


def test_worker_takes_an_alias_that_claims_to_be_a_class_for_none():
    """As `Callable[[], int]` does in Python 3.10."""

    class Alias:
        __class__ = property(lambda self: type)

    assert isinstance(Alias(), type)
    assert not leftovers._is_changeable(Alias())


def test_worker_finds_a_method_that_hides_that_of_an_object_without_functions():
    class Owner:
        def act(self):
            """Do nothing."""

    owner = Owner()
    code = leftovers.Code(owner, lambda name: hasattr(Owner, name))
    assert not code.has_changed()
    owner.other, owner.act = print, print
    assert code.has_changed()
    assert code.undo()
    assert vars(owner) == {"other": print}


def test_leftovers_of_a_task_that_fails_are_found_as_well(tasks):
    tasks.write("more.py", "import os, sys\nfrom pqueue import task\n@task(max_attempts=1)\ndef both(job):\n"
                " os.umask(0); os.closerange(3, 100); raise ValueError('the reason')\n")  # fmt: skip
    queue = tasks.queue()
    ids = [queue.enqueue("both", max_attempts=1), queue.enqueue("good")]
    assert drain(tasks, "--import", "more").returncode == 1
    assert queue.get(ids[0]).error.startswith("ValueError: the reason\n")
    assert queue.get(ids[1]).state == "completed"


OPEN = """
import asyncio, os, sqlite3, time
from pqueue import current_queue, task
kept = []

def leave_open(block):
    block.__enter__()
    kept.append(block)

@task(max_attempts=1)
def begin(job):
    leave_open(current_queue().transaction())
    current_queue().enqueue("good")

@task(max_attempts=1)
def begin_and_raise(job):
    leave_open(current_queue().transaction())
    raise ValueError("the reason")

@task(max_attempts=1)
async def begin_in_loop(job): begin.function(job)

@task(max_attempts=1)
def join(job):
    kept.append(sqlite3.connect("var/queue.db", isolation_level=None))
    kept[-1].execute("BEGIN IMMEDIATE")
    leave_open(current_queue().join(kept[-1]))

@task
def lock(job):
    kept.append(sqlite3.connect("var/queue.db", isolation_level=None))
    kept[-1].execute("BEGIN IMMEDIATE")

@task
def close(job):
    with current_queue() as queue: return queue.name

@task
def lock_beside(job):
    while not os.path.exists("began"): time.sleep(0.01)
    lock.function(job)
"""

OPENED = "QueueError: the task left a transaction() open, which was rolled back"


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("begin", OPENED),
        ("begin_and_raise", "ValueError: the reason"),
        ("begin_in_loop", OPENED),
        ("join", OPENED),
        ("lock", None),
        ("close", None),
    ],
)
def test_transaction_that_a_task_leaves_open_costs_its_job_only(tasks, task, error, concurrency):
    tasks.write("more.py", OPEN)
    queue = tasks.queue()
    bad, *good = queue.enqueue(task), *queue.enqueue_many("good", range(5))
    assert drain(tasks, "--import", "more", "--concurrency", concurrency).returncode == int(error is not None)
    assert queue.get(bad).state == ("failed" if error else "completed")
    assert error is None or queue.get(bad).error.partition("\n")[0] == error or "cannot await" in queue.get(bad).error
    assert [(queue.get(each).state, queue.get(each).attempts) for each in good] == [("completed", 1)] * 5
    assert queue.count_jobs() == 6


def test_transaction_that_a_task_leaves_open_beside_a_long_job_does_not_lock_others_out(tasks):
    tasks.write("more.py", OPEN)
    queue = tasks.queue()
    ids = [queue.enqueue("patient", max_attempts=2), queue.enqueue("lock_beside")]
    child = consumer(tasks, "--import", "more", "--concurrency", 2, "--lease-seconds", 2)
    wait_until(lambda: "completed" in child.out.read_text())  # which needs the lock
    (tasks.folder / "go-on").touch()
    wait_until(lambda: {queue.get(each).state for each in ids} == {"completed"})
    assert 'what="an open transaction of another connection"' in child.out.read_text()


CLOCK = """
import asyncio, time
from pqueue import task

@task
def stop_clock(job): time.monotonic = lambda: 0.0

@task
async def nap(job): await asyncio.sleep(0.5)

@task(max_attempts=1, timeout_seconds=60)
def look_at_clock(job): return time.monotonic()
"""


@pytest.mark.parametrize("concurrency", [1, 5])
def test_worker_restores_the_clock_by_which_it_looks_for_what_tasks_leave_behind(tasks, concurrency):
    tasks.write("more.py", CLOCK)
    queue = tasks.queue()
    queue.enqueue_many("nap", range(concurrency - 1))
    queue.enqueue("stop_clock")
    child = consumer(tasks, "--import", "more", "--concurrency", concurrency, "--name", "w")
    wait_until(lambda: {job.state for job in queue.list_jobs()} == {"completed"})
    assert wait_until(lambda: queue.result(queue.enqueue("look_at_clock")))
    assert "functions of time" in child.out.read_text()


UNUSABLE = """
import fcntl, gc, os, resource, sqlite3
from pqueue import task

def lower(limit, to): resource.setrlimit(limit, (to, resource.getrlimit(limit)[1]))

def change_flags(flags):
    for number in map(int, os.listdir("/proc/self/fd")):
        try: fcntl.fcntl(number, fcntl.F_SETFL, flags ^ fcntl.fcntl(number, fcntl.F_GETFL))
        except OSError: pass

def reopen():
    other = os.open("other", os.O_RDWR | os.O_CREAT)
    for number in map(int, os.listdir("/proc/self/fd")):
        if ".db" in os.path.realpath(f"/proc/self/fd/{number}"): os.dup2(other, number)

def connections(change):
    for each in gc.get_objects():
        if isinstance(each, sqlite3.Connection): change(each)

WAYS = {
    "no writing": lambda: lower(resource.RLIMIT_FSIZE, 0),
    "little writing": lambda: lower(resource.RLIMIT_FSIZE, 20000),
    "no more files": lambda: lower(resource.RLIMIT_NOFILE, 0),
    "closed connections": lambda: connections(lambda db: db.close()),
    "other root": lambda: os.geteuid() or os.chroot("/dev"),
    "appending": lambda: change_flags(os.O_APPEND),
    "other waits": lambda: change_flags(os.O_NONBLOCK),
    "other files": reopen,
    "no access": lambda: connections(lambda db: db.set_authorizer(lambda *_: 1)),
    "no updates": lambda: connections(lambda db: db.set_authorizer(lambda action, *_: int(action in (18, 23)))),
    "progress": lambda: connections(lambda db: db.set_progress_handler(lambda: 1, 1)),
    "rows": lambda: connections(lambda db: setattr(db, "row_factory", sqlite3.Row)),
    "no rows": lambda: connections(lambda db: setattr(db, "row_factory", lambda *_: None)),
    "texts": lambda: connections(lambda db: setattr(db, "text_factory", bytes)),
    "transactions": lambda: connections(lambda db: setattr(db, "isolation_level", "IMMEDIATE")),
    "limits": lambda: connections(lambda db: hasattr(db, "setlimit") and db.setlimit(1, 10)),
    "functions": lambda: connections(lambda db: db.create_function("json_valid", 1, lambda _: 0)),
    "read only": lambda: connections(lambda db: db.execute("PRAGMA query_only = 1")),
    "other tables": lambda: connections(lambda db: db.execute("CREATE TEMP TABLE jobs AS SELECT * FROM main.jobs")),
}

def add_tasks(name, spoil):  # one for each way, as a task that left something is not trusted any more
    @task(name, max_attempts=1)
    def in_thread(job): return job.payload and spoil() and None

    @task(f"async {name}", max_attempts=1)
    async def in_loop(job): return job.payload and spoil() and None

for name in WAYS: add_tasks(name, WAYS[name])
"""


AT_ONCE = (
    *("no writing", "little writing", "no more files", "closed connections", "other root", "other files"),
    *("read only", "other tables"),
)


# A trusted task is looked at in full only if it took long, or after a time; here, never.
TRUSTING = """
import pqueue_tools.leftovers
pqueue_tools.leftovers.FULL_SECONDS = pqueue_tools.leftovers.LONG_SECONDS = 1e9
"""


@pytest.mark.parametrize(
    ("kind", "concurrency", "alone"), [("", 1, ""), ("async ", 3, ""), ("", 1, "other root"), ("", 1, "other tables")]
)
def test_task_that_makes_the_database_unusable_costs_its_process_only(tasks, kind, concurrency, alone):
    tasks.write("more.py", UNUSABLE + (TRUSTING if alone else ""))
    queue = tasks.queue()
    ways = [alone] if alone else re.findall(r'^    "(.*)": ', UNUSABLE, re.MULTILINE)
    if concurrency > 1:  # leave out what may harm a job that still runs
        ways = [way for way in ways if way not in AT_ONCE]
    trusted = [*[False] * 25, True]
    ids = [each for way in ways for each in queue.enqueue_many(f"{kind}{way}", trusted)]
    done = drain(tasks, "--import", "more", "--concurrency", concurrency)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {(queue.get(each).state, queue.get(each).attempts) for each in ids} == {("completed", 1)}
    assert done.stdout.count(" completed consumer=") == len(ids)  # none twice
    assert queue.check()["problems"] == []


AT_THAT_MOMENT = """
import asyncio, os, pqueue_sqlite
from pqueue import task

expect_files_open, to_change = pqueue_sqlite.SQLiteSession.expect_files_open, []

def change_first(session):
    if to_change:
        to_change.clear()
        for each in list(session._queue._sessions):
            for number in each.files._descriptors: os.set_blocking(number, True)
    expect_files_open(session)

pqueue_sqlite.SQLiteSession.expect_files_open = change_first

@task(max_attempts=1)
def change(job): to_change.append("at the next write")

@task(max_attempts=1)
async def wait(job): await asyncio.sleep(0.2)
"""


@pytest.mark.parametrize("concurrency", [1, 3])
def test_task_that_changes_a_descriptor_during_a_write_costs_its_process_only(tasks, concurrency):
    tasks.write("more.py", AT_THAT_MOMENT)
    queue = tasks.queue()
    ids = [queue.enqueue(name) for _ in range(3) for name in ("wait", "change", "good", "good")]
    done = drain(tasks, "--import", "more", "--concurrency", concurrency)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {(queue.get(each).state, queue.get(each).attempts) for each in ids} == {("completed", 1)}


UNLOCKABLE = """
import os, pqueue_locks
from pqueue import task

unlock, closed = pqueue_locks.unlock, []

def unlock_unless_closed(file):
    if closed: os.close(-1)
    unlock(file)

pqueue_locks.unlock = unlock_unless_closed

@task(max_attempts=1)
def close_lock(job): closed.append("as if another thread had the lock at that moment")
"""


@pytest.mark.parametrize("concurrency", [1, 3])
def test_task_that_closes_a_lock_costs_its_process_only(tasks, concurrency):
    tasks.write("more.py", UNLOCKABLE)
    queue = tasks.queue()
    ids = [each for _ in range(3) for each in (queue.enqueue("close_lock"), queue.enqueue("good"))]
    done = drain(tasks, "--import", "more", "--concurrency", concurrency)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {queue.get(each).state for each in ids} == {"completed"}
    assert "an unusable descriptor" in done.stdout


UNWRITABLE = """
import resource
from pqueue import task

def lower(limit): resource.setrlimit(limit, (0, 0))

@task(max_attempts=1)
def spoil(limits: list[str]): print("the output", *map(lower, [getattr(resource, f"RLIMIT_{each}") for each in limits]))
"""


@pytest.mark.parametrize("pipe", ["", " | true"])
def test_task_that_makes_the_log_unwritable_ends_no_consumer(tasks, pipe):
    tasks.write("more.py", UNWRITABLE)
    queue = tasks.queue()
    bad = [queue.enqueue("spoil", {"limits": limits}) for limits in (["FSIZE"], ["NOFILE"], ["NOFILE", "FSIZE"])]
    ids = [*bad, *queue.enqueue_many("good", range(3))]
    command = tasks.command("consumer.py", "--import", "my_tasks", "--import", "more", "--drain")
    child = tasks.start_command(["sh", "-c", f'"$@"{pipe}', "sh", *map(str, command)])
    assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()
    assert {(queue.get(each).state, queue.get(each).attempts) for each in ids} == {("completed", 1)}
    lines = child.out.read_text().splitlines()
    assert pipe or ("stopped" in lines[-1] and sum("task=good" in line for line in lines) == 3), lines


SETTINGS = """
from pqueue import current_queue, task

WAYS = {
    "read only": lambda db: db.execute("PRAGMA query_only = 1"),
    "locked for others": lambda db: db.execute("PRAGMA locking_mode = EXCLUSIVE"),
    "other jobs": lambda db: db.execute("CREATE TEMP TABLE jobs AS SELECT * FROM main.jobs WHERE 0"),
    "implicit transactions": lambda db: setattr(db, "isolation_level", "DEFERRED"),
    "other functions": lambda db: db.create_function("json_valid", 1, lambda _: 0),
    "no access": lambda db: db.set_authorizer(lambda *_: 1),
}

@task(max_attempts=1)
async def spoil(job):
    with current_queue().transaction() as db: kept = db
    WAYS[job.payload](kept)

@task
async def enqueue(job): return int(current_queue().enqueue("good"))
"""


@pytest.mark.parametrize("concurrency", [1, 2])
def test_settings_that_a_task_leaves_on_its_connection_harm_no_other_job(tasks, concurrency):
    tasks.write("more.py", SETTINGS)
    queue = tasks.queue()
    ways = re.findall(r'^    "(.*)": lambda db', SETTINGS, re.MULTILINE)
    child = consumer(tasks, "--import", "more", "--concurrency", concurrency)
    for way in ways:
        bad = queue.enqueue("spoil", way)
        wait_until(lambda bad=bad: queue.get(bad).state in pqueue.FINISHED)
        next_one = queue.enqueue("enqueue")
        job = wait_until(lambda job=next_one: queue.get(job).state in pqueue.FINISHED and queue.get(job))
        assert (way, job.state, job.attempts, queue.get(job.result).task) == (way, "completed", 1, "good")
    assert child.poll() is None
    assert "left behind" not in child.out.read_text()


SHARED = """
from pqueue import current_job, task
seen = []

@task
def collect(job):
    seen.append(job.payload)
    return seen

@task
def spoil(job): seen.append(object())
"""


@pytest.mark.parametrize("concurrency", [1, 3])
def test_result_is_that_of_the_moment_when_the_task_returned(tasks, concurrency):
    tasks.write("more.py", SHARED)
    queue = tasks.queue()
    ids = queue.enqueue_many("collect", range(20))
    queue.enqueue("spoil")
    drain(tasks, "--import", "more", "--concurrency", concurrency)
    results = [queue.get(each).result for each in ids]
    assert sorted(map(len, results)) == list(range(1, 21))
    assert {(job.state, job.attempts) for job in queue.list_jobs()} == {("completed", 1)}


# The end of the process


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        ("end", "leave", "WorkerDied: the task's process exited with code 0"),
        ("end", "leave with 3", "WorkerDied: the task's process exited with code 3"),
        ("end", "kill", r"WorkerDied: the task's process was killed by signal 9 \(SIGKILL\)"),
        ("end", "abort", r"WorkerDied: .* signal 6 \(SIGABRT\)\n(.|\n)*my_tasks.py"),
        ("end", "fault", r"WorkerDied: .* signal 11 \(SIGSEGV\)\n(.|\n)*in string_at\n(.|\n)*my_tasks.py"),
        ("end", "jump", r"WorkerDied: .* signal 11 \(SIGSEGV\)"),
        ("end", "become", "WorkerDied: the task replaced its process by another program"),
        ("end", "overflow", "RecursionError|WorkerDied: .* signal 11"),
        ("end", "gil", r"TimeoutError: timed out after 2 s, and was killed(.|\n)*my_tasks.py"),
        ("end", "c sleep", "TimeoutError: timed out after 2 s"),
        ("end", "blocked sleep", "TimeoutError: timed out after 2 s, and was killed"),
        ("end", "stop", "TimeoutError: timed out after 2 s, and was killed"),
        ("run_on", "loop", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("run_on", "sleep", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("run_on", "expression", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("run_on", "swallow", r"TimeoutError: timed out after 2 s, and was killed(.|\n)*in swallow"),
        ("run_on", "subprocess", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("run_on", "lock", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("run_on", "join", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("run_on", "input", r"TimeoutError: timed out after 2 s(.|\n)*my_tasks.py"),
        ("eat", None, r"MemoryError: used more than 200 MB(.|\n)*my_tasks.py"),
        ("run_on", "message", r"Slow: \(its message cannot be shown: __str__ raised Interrupt\)"),
        ("fall", "evil", "Evil"),
        ("fall", "hidden", "Hidden: the reason"),
        ("fall", "nameless", "OfNameless: the reason"),
        ("fall", "retry", "OddRetry"),
        ("fall", "notes", r"ValueError: the reason(.|\n)*my_tasks.py"),
        ("fall", "exit", "SystemExit: leaving"),
        ("fall", "recursion", "RecursionError"),
        ("fall", "interrupt", "KeyboardInterrupt"),
        ("fall", "generator", "GeneratorExit"),
        ("fall", "memory", "MemoryError"),
        ("fall", "lost lease", "LeaseLost: of another queue"),
    ],
)  # fmt: skip
def test_job_fails_with_the_true_reason_and_the_next_one_runs(tasks, kind, name, error):
    queue = tasks.queue()
    bad, after = queue.enqueue(kind, name, max_attempts=1), queue.enqueue("good")
    done = drain(tasks)
    assert done.returncode == 1, done.stderr
    job = queue.get(bad)
    assert (job.state, job.attempts) == ("failed", 1)
    assert re.match(error, job.error), job.error
    assert not re.search(r"\b(consumer|keeper|worker|pqueue_tasks)\.py", job.error), job.error
    assert queue.get(after).state == "completed"
    assert len(queue.consumers()) == 1


@pytest.mark.parametrize("concurrency", [1, 2])
def test_async_job_fails_with_the_same_reason_as_another(tasks, concurrency):
    queue = tasks.queue()
    for name in names("RAISE"):
        queue.enqueue("fall", name)
        queue.enqueue("fall_async", name)
    done = drain(tasks, "--concurrency", concurrency)
    assert done.returncode == 1, done.stderr
    found = {(job.payload, job.task): (job.state, job.error.partition("\n")[0]) for job in queue.list_jobs()}
    assert {name: found[name, "fall_async"] for name in names("RAISE")} == {
        name: found[name, "fall"] for name in names("RAISE")
    }


FREED = """
import contextvars, gc, signal, time
from pqueue import task

class Slow:
    def __del__(self): time.sleep(600)

class Endless:
    def __del__(self):
        while True: pass

class SlowDict(dict, Slow): pass

class SlowToCompare:
    def __call__(self, *_): pass
    def __eq__(self, other): time.sleep(600)
    __ne__, __hash__ = __eq__, object.__hash__

def local(kind):
    held = kind()
    raise ValueError("the reason")

def argument(kind): raise ValueError("the reason", kind())

def cause(kind):
    try: argument(kind)
    except ValueError as error: raise ValueError("the reason") from error

def variable(kind):
    contextvars.ContextVar("v").set(kind())
    raise ValueError("the reason")

def cycle(kind):
    gc.disable()
    held = [kind()]
    held.append(held)

def result(kind): return SlowDict() if kind is Slow else None

@task
def allocate(job): held = [[] for _ in range(2000)]  # which makes Python collect garbage

@task(max_attempts=1, timeout_seconds=0.5)
def free(job): return globals()[job.payload[0]](globals()[job.payload[1]])

@task(max_attempts=1, timeout_seconds=0.5)
async def free_in_loop(job): return free.function(job)

@task(max_attempts=1)
def leave_slow_handler(job):
    signal.signal(signal.SIGUSR1, SlowToCompare())
    with open("began", "w") as file: file.write("now")
"""


@pytest.mark.parametrize(
    ("concurrency", "task", "kinds", "ways"),
    [
        (1, "free", "Slow Endless", "local argument cause variable result cycle"),
        (1, "free_in_loop", "Slow Endless", "local argument result"),
        (3, "free", "Endless", "local argument cause variable result cycle"),
        (3, "free_in_loop", "Endless", "local"),
    ],
)
def test_limit_of_a_task_includes_the_code_that_frees_its_objects(tasks, concurrency, task, kinds, ways):
    tasks.write("more.py", FREED)
    queue = tasks.queue()
    bad = [queue.enqueue(task, [way, kind]) for way in ways.split() for kind in kinds.split()]
    good = queue.enqueue_many("allocate", range(5))
    assert drain(tasks, "--import", "more", "--concurrency", concurrency).returncode == 1
    for job in map(queue.get, bad):
        assert job.state == ("completed" if job.payload[0] in ("result", "cycle") else "failed"), (job.payload, job)
        assert not job.error or re.match("ValueError: .*the reason|TimeoutError: ", job.error), (job.payload, job.error)
    assert [(queue.get(each).state, queue.get(each).attempts) for each in good] == [("completed", 1)] * 5


IMPATIENT = """
import sys, consumer
from pqueue_tools import keeper
keeper.SILENT_SECONDS = 2.0
sys.exit(consumer.main(sys.argv[1:]))
"""


def impatient(tasks, *arguments):
    """Start a consumer that kills a worker soon that does nothing."""
    modules = ["--import", "my_tasks", "--import", "more", "--lease-seconds", "1"]
    tasks.write("impatient.py", IMPATIENT)
    return tasks.start("-m", "impatient", *modules, *arguments, PYTHONPATH=str(ROOT))


def test_worker_that_executes_what_a_task_left_behind_is_replaced(tasks):
    tasks.write("more.py", FREED)
    queue = tasks.queue()
    first, bad, after = queue.enqueue("good"), queue.enqueue("leave_slow_handler"), queue.enqueue("good")
    child = impatient(tasks)
    wait_until(lambda: queue.get(after).state == "completed")
    states = [(job.state, job.attempts, job.error) for job in map(queue.get, [first, bad, after])]
    assert states == [("completed", 1, None)] * 3
    out = child.out.read_text()
    assert re.search('worker died .*reason="did not end what a task left behind, in .*more.py:16, within 2 s', out), out
    assert sorted(read(tasks, "good").split()) == [str(first), str(after)]


DAMAGE = """
import os, sys
from pqueue import task

@task(max_attempts=1, timeout_seconds=5)
def overwrite(job):
    frame = sys._getframe()
    while not hasattr(frame.f_locals.get("self"), "record"): frame = frame.f_back
    memory = frame.f_locals["self"].record._map
    memory[:] = {"ones": b"\\xff", "small": b"\\1"}.get(job.payload, b"?") * len(memory)
    if job.payload == "random": memory[:] = os.urandom(len(memory))
    while True: pass
"""


@pytest.mark.parametrize("concurrency", [1, 3])
def test_task_that_overwrites_the_shared_memory_costs_its_worker_only(tasks, concurrency):
    tasks.write("more.py", DAMAGE)
    queue = tasks.queue()
    child = consumer(tasks, "--import", "more", "--concurrency", concurrency)
    for what in ("ones", "small", "random"):
        bad = queue.enqueue("overwrite", what)
        wait_until(lambda bad=bad: queue.get(bad).state in pqueue.FINISHED)
        assert re.match("WorkerDied: .*overwrote the memory|TimeoutError", queue.get(bad).error), queue.get(bad).error
        good = queue.enqueue("good")
        wait_until(lambda good=good: queue.get(good).state == "completed")
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert "Traceback" not in child.out.read_text()


def test_jobs_that_had_not_begun_when_a_task_overwrote_the_shared_memory_run_once(tasks):
    tasks.write("more.py", DAMAGE)
    queue = tasks.queue()
    queue.enqueue_many("good", range(300))  # so that batches become large
    queue.enqueue("overwrite", "ones")
    later = queue.enqueue_many("good", range(20), max_attempts=1)
    assert drain(tasks, "--import", "more").returncode == 1
    assert {(queue.get(each).state, queue.get(each).attempts) for each in later} == {("completed", 1)}
    assert read(tasks, "good").split()[-20:] == list(map(str, later))


WATCH = """
import fcntl, os
from pqueue import task

@task
def watch(job): fcntl.fcntl(os.open(".", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
"""


def test_descriptor_that_asks_for_signals_ends_no_later_job(tasks):
    tasks.write("more.py", WATCH)
    queue = tasks.queue()
    ids = [queue.enqueue("watch"), *queue.enqueue_many("good", range(3))]  # which create a file
    done = drain(tasks, "--import", "more")
    assert (done.returncode, "worker died" in done.stdout) == (0, False), done
    assert {(queue.get(each).state, queue.get(each).attempts) for each in ids} == {("completed", 1)}


def test_second_signal_ends_a_worker_that_executes_what_a_task_left_behind(tasks):
    tasks.write("more.py", FREED)
    queue = tasks.queue()
    bad = queue.enqueue("leave_slow_handler")
    child = impatient(tasks, "--lease-seconds", 60)
    wait_until(lambda: read(tasks, "began"))
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)  # two of one kind at once would be one
    assert child.wait(PATIENCE_SECONDS) == 0
    assert (queue.get(bad).state, queue.get(bad).attempts) == ("completed", 1)


def test_second_signal_ends_a_consumer_whose_worker_is_stopped(tasks):
    queue = tasks.queue()
    child = consumer(tasks)
    worker = wait_until(lambda: processes.children(child.pid))[0]
    job_id = queue.enqueue("pid")
    wait_until(lambda: queue.get(job_id).state == "completed")
    os.kill(worker, signal.SIGSTOP)
    later = queue.enqueue("pid")
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert (queue.get(later).state, queue.get(later).attempts) == ("pending", 0)


def test_worker_that_is_killed_between_jobs_costs_no_attempt(tasks):
    queue = tasks.queue()
    child = consumer(tasks)
    worker = wait_until(lambda: processes.children(child.pid))[0]
    wait_until(lambda: queue.consumers())
    os.kill(worker, signal.SIGKILL)
    job_id = queue.enqueue("pid")
    job = wait_until(lambda: queue.get(job_id).state == "completed" and queue.get(job_id))
    assert (job.attempts, queue.history(job_id)) == (1, [])
    assert parent(job.result) == child.pid
    assert job.result != worker
    assert len(queue.consumers()) == 1


def test_jobs_that_finished_before_their_worker_died_do_not_run_again(tasks):
    queue = tasks.queue()
    queue.enqueue_many("good", range(300))
    for _ in range(3):
        queue.enqueue("end", "kill", max_attempts=1)
        queue.enqueue_many("good", range(100))
    assert drain(tasks).returncode == 1
    ran = read(tasks, "good").split()
    assert len(ran) == len(set(ran)) == 600
    assert queue.stats()["states"] == {**dict.fromkeys(queue.stats()["states"], 0), "completed": 600, "failed": 3}
    assert {(job.attempts, job.result) for job in queue.list_jobs(task="good", limit=1000)} == {
        (1, int(number)) for number in ran
    }


def test_result_of_a_finished_job_outlives_a_worker_that_cannot_complete_it(place, monkeypatch):
    """Otherwise the keeper would return the job, which would run again for ever, as no attempt counts."""
    queue, record = place.queue(), Record()
    job_id, complete, calls = queue.enqueue("quick"), queue.complete_and_dequeue, []

    def fail_once(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("replaced by a task")
        return complete(*arguments, **options)

    monkeypatch.setattr(queue, "complete_and_dequeue", fail_once)
    with registered("quick", lambda: 7), pytest.raises(RuntimeError):
        Consumer(queue, "w", record=record).run()
    assert queue.get(job_id).state == "processing"
    assert [(key[0], result) for key, result in record.results().items()] == [(job_id, 7)]


def test_worker_dies_with_its_keeper_before_anybody_takes_the_job(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("hog")
    child = consumer(tasks)
    worker = int(wait_until(lambda: read(tasks, "began")))
    child.kill()
    job = wait_until(lambda: queue.dequeue("heir"))
    assert (job.id, job.attempts) == (job_id, 2)
    assert not processes.is_running(worker)


@pytest.mark.parametrize("task", ["patient", "hog"])
def test_worker_of_a_stopped_keeper_dies_before_anybody_takes_the_job(tasks, task):
    queue = tasks.queue()
    job_id = queue.enqueue(task, max_attempts=3)
    child = consumer(tasks, "--lease-seconds", 3, "--name", "w")
    worker = int(wait_until(lambda: read(tasks, "began")))
    child.send_signal(signal.SIGSTOP)
    wait_until(lambda: not processes.is_running(worker))
    assert queue.get(job_id).consumer == "w"  # nobody else has taken it yet
    job = wait_until(lambda: queue.dequeue("heir"))
    assert (job.id, job.attempts) == (job_id, 2)
    child.send_signal(signal.SIGCONT)
    later = queue.enqueue("pid")
    wait_until(lambda: queue.get(later).state == "completed")
    queue.complete(job)
    assert child.poll() is None


def group_of(child):
    """Return the pids of a consumer: keeper, worker, watchdog, and what that has started."""
    return [child.pid, *processes.descendants(child.pid)]


OVERRUN = """
import asyncio, ctypes
from pathlib import Path
from pqueue import task

def note(name): Path(name).write_text(str(__import__("os").getpid()))

@task(max_attempts=3)
def overrun(job):
    note("began")
    try:
        while True: __import__("time").sleep(0.01)
    except BaseException: note("interrupted")

@task(max_attempts=3)
def overrun_with_gil(job):
    __import__("time").sleep(1)  # while its consumer, which may be in a transaction, looks for other jobs
    note("began")
    try:
        while True: ctypes.PyDLL(None).sleep(600)
    finally: note("interrupted")

@task(max_attempts=3)
async def overrun_in_loop(job):
    note("began")
    try: await asyncio.sleep(600)
    finally: note("interrupted")

@task(max_attempts=3)
async def block_the_loop(job):
    note("began")
    try: __import__("time").sleep(600)
    finally: note("interrupted")
"""


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("task", ["overrun", "overrun_with_gil", "overrun_in_loop", "block_the_loop"])
@pytest.mark.parametrize("stopped", ["worker", "all"])
def test_task_that_has_lost_its_lease_ends_although_the_database_is_locked(tasks, stopped, task, concurrency):
    """Otherwise it would run at the same time as the next delivery of its job, for as long as others write."""
    tasks.write("more.py", OVERRUN)
    queue = tasks.queue()
    job_id = queue.enqueue(task)
    child = consumer(tasks, "--import", "more", "--lease-seconds", 3, "--name", "w", "--concurrency", concurrency)
    worker = int(wait_until(lambda: read(tasks, "began")))
    pids = group_of(child) if stopped == "all" else [worker]
    with locked_while_stopped(tasks, queue, pids, lambda: queue.dequeue("heir")) as job:
        assert (job.id, job.attempts) == (job_id, 2)
        for pid in pids:
            with suppress(ProcessLookupError):  # its keeper may have killed it
                os.kill(pid, signal.SIGCONT)
        wait_until(lambda: read(tasks, "interrupted") or not processes.is_running(worker))
    later = queue.enqueue("pid")
    wait_until(lambda: queue.get(later).state == "completed")
    queue.complete(job)
    assert child.poll() is None


@contextmanager
def locked_while_stopped(place, queue, pids, take):
    """Stop these processes, wait for the job that `take` then returns, and lock the database during the block."""
    with closing(sqlite3.connect(place.folder / "var/queue.db", isolation_level=None, timeout=1)) as other:
        wait_until(lambda: is_stopped_outside_a_transaction(pids, other))
        job = wait_until(take)
        other.execute("BEGIN IMMEDIATE")
        yield job
        other.execute("ROLLBACK")


def is_stopped_outside_a_transaction(pids, other):
    """Stop these processes; let them continue if one holds the lock of the database, which nobody else could get."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
    except sqlite3.OperationalError:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        return False
    return True


def test_watchdog_that_a_task_has_killed_is_started_again(tasks):
    tasks.write("more.py", "import os, signal\nfrom pqueue import task\n"
                "@task\ndef end_group(job): os.killpg(0, signal.SIGTERM)\n")  # fmt: skip
    queue = tasks.queue()
    child = consumer(tasks, "--import", "more")

    def worker_and_watchdog():
        found = [pid for pid in processes.children(child.pid) if command(pid)[:5] not in (b"", b"sleep")]
        return len(found) == 2 and found

    def command(pid):
        """b"sleep": of a watchdog that has ended; the keeper adopts it."""
        with suppress(OSError):
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        return b""

    before = wait_until(worker_and_watchdog)
    ended = queue.enqueue("end_group")
    wait_until(lambda: queue.get(ended).state == "completed")
    wait_until(lambda: set(before) - set(processes.children(child.pid)))
    after = wait_until(worker_and_watchdog)
    assert len(set(before) & set(after)) == 1  # the worker
    child.terminate()
    assert child.wait(PATIENCE_SECONDS) == 0
    assert not any(map(processes.is_running, after))


def test_consumer_has_the_same_processes_and_descriptors_after_many_signals(tasks):
    """PQUEUE_SOAK=10 for more."""
    chosen, queue = random.Random(SOAK), tasks.queue()
    child = consumer(tasks, "--lease-seconds", 3)

    def settled():
        job_id = queue.enqueue("good")
        wait_until(lambda: queue.get(job_id).state == "completed")
        pids = wait_until(lambda: len(found := processes.children(child.pid)) == 2 and [child.pid, *found])
        return sorted(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids), len(os.listdir(tasks.folder / "var"))

    settled()
    os.kill(processes.children(child.pid)[0], signal.SIGKILL)  # whose jobs the keeper settles, so it opens the database
    before = settled()
    for _ in range(20 * SOAK):
        queue.enqueue_many("good", range(50))
        settled()  # else the worker may import its tasks: then its end is that of the consumer
        number = chosen.choice([signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
        pid = chosen.choice(processes.children(child.pid) or [0])
        if pid:
            os.kill(pid, number)
        time.sleep(chosen.uniform(0, 0.1))  # a moment to try, and not a wait for something
        if pid and number == signal.SIGSTOP:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    wait_until(lambda: not queue.count_jobs(state="processing") + queue.count_jobs(state="pending"))
    wait_until(lambda: settled() == before)
    child.terminate()
    assert child.wait(PATIENCE_SECONDS) == 0
    wait_until(lambda: not any(is_in(pid, tasks.folder) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))))
    ran = read(tasks, "good").split()
    assert len(set(ran)) == queue.count_jobs(state="completed") == queue.count_jobs()


def test_keeper_needs_no_temporary_folder(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    file = keeper._unnamed_file()
    os.write(file, b"a traceback")
    assert (os.fstat(file).st_size, file >= 100) == (11, True)
    os.close(file)


def test_consumer_says_that_it_can_have_no_watchdog(tasks):
    queue = tasks.queue()
    queue.enqueue("good")
    done = drain(tasks, PATH="/nowhere")
    assert (done.returncode, done.stdout.count(" no watchdog ")) == (0, 1)
    assert queue.count_jobs(state="completed") == 1
    assert " no watchdog " not in drain(tasks).stdout


def test_watchdog_spares_a_worker_whose_keeper_works(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("patient")
    child = consumer(tasks, "--lease-seconds", 0.5)
    worker = int(wait_until(lambda: read(tasks, "began")))
    (watchdog,) = set(processes.children(child.pid)) - {worker}
    expires_at = queue.get(job_id).lease_expires_at
    wait_until(lambda: queue.get(job_id).lease_expires_at > expires_at + 2)
    tasks.write("go-on", "")
    wait_until(lambda: queue.get(job_id).state == "completed")
    child.terminate()
    assert child.wait(PATIENCE_SECONDS) == 0
    assert not processes.is_running(watchdog)


IN_A_PROGRAM = """
import os
import consumer
from pqueue_tools import processes

for _ in range(40):
    consumer.main(["--drain", "--quiet"])
    left = processes.children(os.getpid())
    assert not left, left
"""


def test_program_that_has_run_a_consumer_has_no_process_left(tasks):
    tasks.write("program.py", IN_A_PROGRAM)
    done = tasks.run("-m", "program", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done


def test_worker_that_cannot_import_the_tasks_ends_the_consumer(place):
    option = "from pqueue import task\n@task(max_atempts=3)\ndef f(): ..."
    for name, text, code, message in (
        ("dies", "import os; os.kill(os.getpid(), 11)", 1, "was killed by signal 11 (SIGSEGV) while it imported"),
        ("raises", "1 / 0", 2, "ZeroDivisionError: division by zero (raises.py, line 1)"),
        ("lacks", "import none", 2, "No module named 'none' (lacks.py, line 1)"),
        ("leaves", "import sys\nsys.exit('no arguments')", 2, "SystemExit: no arguments (leaves.py, line 2)"),
        ("interrupts", "raise KeyboardInterrupt", 2, "KeyboardInterrupt (interrupts.py, line 1)"),
        ("ends", "raise GeneratorExit('ended')", 2, "GeneratorExit: ended (ends.py, line 1)"),
        (
            "odd",
            "class Odd(Exception):\n def __str__(self): return 5\nraise Odd",
            2,
            "Odd: (its message cannot be shown",
        ),
        ("own", "class Own(BaseException): ...\nraise Own('mine')", 2, "Own: mine (own.py, line 2)"),
        ("wrong", "def f(:", 2, "invalid syntax (wrong.py, line 1)"),
        ("option", option, 2, "unexpected keyword argument 'max_atempts'"),
        ("value", "from pqueue import task\ntask(max_attempts=0)(len)", 2, "(value.py, line 2)"),
    ):
        place.write(f"{name}.py", text)
        done = place.run("consumer.py", "--import", name)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done
        assert done.stderr.startswith("consumer.py: "), done.stderr
        assert message in done.stderr


# Leases and operators


def test_keeper_takes_back_no_job_of_a_later_claim(place):
    """The worker may finish the slow job and claim others while the keeper takes back what waits behind it."""
    queue = place.queue()
    ids = queue.enqueue_many("good", range(4))
    slow, done, waiting = queue.dequeue_many("w", 3)
    later = queue.dequeue("w")
    leases = Leases(queue, Record(), "w", 60)
    first = claim_number(slow.lease_token)
    running = (slow.id, first)
    assert leases.return_held({(done.id, first): "result"}, [running], claim=first) == {running: slow}
    assert [queue.get(each).state for each in ids] == ["processing", "completed", "pending", "processing"]
    assert (queue.get(done.id).result, queue.get(waiting.id).attempts) == ("result", 0)
    assert queue.holds(later)


def test_keeper_that_can_delete_no_jobs_says_why_once(capsys):
    """As when a foreign key of the application keeps them; but others may hold the database for a moment."""
    said = [QueueBusy("wait"), QueueError("a foreign key"), QueueError("a foreign key")]
    leases = Leases(mock.Mock(prune_kept=mock.Mock(side_effect=said)), Record(), "w", 60)
    for _ in said:
        leases._prune_at = 0.0
        leases.prune()
    (line,) = capsys.readouterr().out.splitlines()
    assert 'not pruned consumer=w reason="a foreign key"' in line


def test_keeper_reads_a_run_as_a_whole():
    """At any moment of its beginning the worker may be suspended; then the keeper finds the run, or none."""
    record = Record()
    slot = record.slots[0]
    if (worker := os.fork()) == 0:
        for number in range(1, 100_001):
            slot.begin(number, number, number, 0.0, number, number)
            slot.end()
        os._exit(0)
    while os.waitpid(worker, os.WNOHANG)[0] == 0:
        for run in filter(None, (slot.run() for _ in range(100))):
            assert (run.number,) * 5 == (run.job_id, run.claim, run.timeout_seconds, run.base_mb, run.retry_in_seconds)


def test_keeper_reads_a_run_as_a_whole_although_another_one_begins_meanwhile(monkeypatch):
    slot, details = Record().slots[0], Slot._DETAILS
    slot.begin(1, 1, 0.0, 0.0, 0.0, 0.0)

    def unpack_later(*place):
        slot.end()
        slot.begin(2, 2, 0.0, 0.0, 0.0, 0.0)
        return details.unpack_from(*place)

    monkeypatch.setattr(Slot, "_DETAILS", mock.Mock(pack_into=details.pack_into, unpack_from=unpack_later))
    assert slot.run() is None
    monkeypatch.undo()
    assert slot.run().job_id == 2


def test_keeper_takes_nothing_back_for_a_run_that_it_has_misread():
    record = Record()
    record.slots[0].begin(3, 5, 0.0, 0.0, 0.0, 0.0)
    run = record.slots[0].run()
    assert record.withdraw(run._replace(claim=0)) is None
    assert not record.fields[12]  # WITHDRAW
    assert record.withdraw(run) == {}


def test_jobs_taken_from_a_worker_are_settled_although_the_slow_one_has_ended(place, monkeypatch):
    queue, record = place.queue(), Record()
    queue.enqueue_many("good", range(3))
    done, slow, waiting = queue.dequeue_many("w", 3)
    leases, claim, complete = Leases(queue, record, "w", 60), claim_number(slow.lease_token), queue.complete_and_dequeue
    record.add_result(done.id, claim, "7")
    record.slots[0].begin(slow.id, claim, 0.0, 0.0, 0.0, 0.0)

    def fail(*arguments, **options):
        monkeypatch.setattr(queue, "complete_and_dequeue", complete)
        raise pqueue.QueueBusy("locked")

    monkeypatch.setattr(queue, "complete_and_dequeue", fail)
    leases.extend([record.slots[0].run()])
    assert record.was_withdrawn()  # now the worker forgets the others
    record.clear_results()
    record.slots[0].end()
    leases.extend([])
    assert [queue.get(job.id).state for job in (done, slow, waiting)] == ["completed", "processing", "pending"]
    assert queue.get(done.id).result == 7
    assert leases.has_released_late


LATE = """
import sys, time, consumer
from pqueue_tools import leases, record
give_back = leases.Leases.return_held

def give_back_late(self, *arguments, **options):
    until = time.monotonic() + 10
    while not self.record.fields[record.OUTCOME] and time.monotonic() < until: time.sleep(0.01)
    return give_back(self, *arguments, **options)

leases.Leases.return_held = give_back_late
sys.exit(consumer.main(sys.argv[1:]))
"""


def test_drain_runs_the_jobs_that_its_keeper_returns_after_its_worker_has_ended(tasks):
    tasks.write("late.py", LATE)
    tasks.write("more.py", "import time\nfrom pqueue import task\n@task\ndef slow(job): time.sleep(2)\n")
    queue = tasks.queue()
    queue.enqueue_many("good", range(500))
    queue.enqueue("slow")
    queue.enqueue_many("good", range(500))
    modules = ["--import", "my_tasks", "--import", "more"]
    done = tasks.run("-m", "late", "--drain", *modules, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "released" in done.stdout
    assert queue.count_jobs(state="completed") == 1001
    assert len(read(tasks, "good").split()) == 1000


def test_job_that_holds_the_gil_for_ten_lease_periods_is_delivered_once(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("hold_gil", 15)
    quick = queue.enqueue_many("good", range(20))
    for number in range(2):
        consumer(tasks, "--lease-seconds", 1.5, "--name", f"w{number}")
    wait_until(lambda: all(queue.get(each).state == "completed" for each in quick))
    job = wait_until(lambda: queue.get(job_id).state != "processing" and queue.get(job_id))
    assert (job.state, job.attempts, queue.history(job_id)) == ("completed", 1, [])


@pytest.mark.parametrize("task", ["patient", "hog"])
@pytest.mark.parametrize("verb", ["cancel", "mark_failed", "assign"])
def test_operator_ends_a_task_at_once_even_if_it_holds_the_gil(tasks, verb, task):
    queue = tasks.queue()
    job_id = queue.enqueue(task)
    child = consumer(tasks, "--name", "w")
    worker = int(wait_until(lambda: read(tasks, "began")))
    wait_until(lambda: queue.get(job_id).state == "processing")
    getattr(queue, verb)(job_id, *(["somebody"] if verb == "assign" else []))
    later = queue.enqueue("pid")
    after = wait_until(lambda: queue.get(later).state == "completed" and queue.get(later))
    assert f"lost consumer=w job={job_id}" in child.out.read_text()
    assert (after.result == worker) == (task == "patient")
    state = {"cancel": "cancelled", "mark_failed": "failed", "assign": "pending"}[verb]
    assert (queue.get(job_id).state, queue.get(job_id).result) == (state, None)


def test_second_signal_ends_a_task_that_holds_the_gil_and_returns_its_job(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("hog")
    child = consumer(tasks)
    wait_until(lambda: read(tasks, "began"))
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert (queue.get(job_id).state, queue.get(job_id).attempts) == ("pending", 0)


# Processes that tasks start


def test_processes_of_a_task_are_killed_with_it(tasks):
    queue = tasks.queue()
    queue.enqueue("spawn_and_hang", max_attempts=1)
    drain(tasks)
    wait_until(lambda: not any(map(processes.is_running, map(int, read(tasks, "spawned").split()))))


def test_processes_of_a_task_are_killed_with_its_consumer(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("spawn", max_attempts=1)
    child = consumer(tasks)
    wait_until(lambda: read(tasks, "spawned"))
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_SECONDS) == 0
    wait_until(lambda: not any(map(processes.is_running, map(int, read(tasks, "spawned").split()))))
    assert queue.get(job_id).state == "failed"  # as its max_attempts is 1


RUN = """
import subprocess
from pqueue import task

@task()
def run(job):
    return subprocess.run(["sh", "-c", "touch began; until test -e go-on; do sleep 0.05; done"]).returncode
"""


def test_ctrl_c_reaches_neither_the_task_nor_its_processes(tasks):
    tasks.write("more.py", RUN)
    queue = tasks.queue()
    job_id = queue.enqueue("run")
    command = tasks.command("consumer.py", "--import", "more")
    child = subprocess.Popen(command, cwd=tasks.folder, env=tasks.environment(), start_new_session=True)
    tasks.children.append(child)
    wait_until(lambda: (tasks.folder / "began").exists())
    os.killpg(child.pid, signal.SIGINT)
    time.sleep(0.2)
    (tasks.folder / "go-on").touch()
    assert child.wait(PATIENCE_SECONDS) == 0
    assert (queue.get(job_id).state, queue.get(job_id).result) == ("completed", 0)


# All of it at once


def random_jobs(seed, good, bad):
    """Return (task, payload) of good and bad jobs in random order."""
    chosen = random.Random(seed)
    kinds = {"leave": names("LEAVE"), "end": names("END"), "run_on": names("RUN_ON"), "fall": names("RAISE")}
    weights = {"leave": 12, "end": 5, "fall": 6, "run_on": 1}  # those that run until their limit take it
    quick = {"end": [name for name in kinds["end"] if name not in SLOW]}
    jobs = [("good", number) for number in range(good)]
    for _ in range(bad):
        (kind,) = chosen.choices(list(weights), list(weights.values()))
        of_kind = quick.get(kind, kinds[kind]) if chosen.random() < 0.9 else kinds[kind]
        jobs.append((kind, chosen.choice(of_kind)))
    chosen.shuffle(jobs)
    return jobs


SLOW = ("gil", "c sleep", "blocked sleep", "stop", "overflow")
GOOD, BAD = 5000 * SOAK // 10, 500 * SOAK // 10


@pytest.mark.parametrize("seed", range(1))
def test_good_jobs_complete_once_among_bad_ones(tasks, seed):
    """PQUEUE_SOAK=10 for the full number. Random misbehaviours among good jobs, with three consumers."""
    queue = tasks.queue()
    jobs = random_jobs(seed, GOOD, BAD)
    ids = {queue.enqueue(*job, max_attempts=3 if job[0] == "good" else 1): job for job in jobs}
    children = [consumer(tasks, "--name", f"w{number}", PYTHONFAULTHANDLER="") for number in range(3)]
    wait_until(lambda: not any(queue.count_jobs(state=state) for state in pqueue.UNFINISHED), seconds=BAD * 4)
    states = {job.id: job for job in queue.list_jobs(limit=len(jobs))}
    good = [job_id for job_id, (task, _) in ids.items() if task == "good"]
    assert {(states[each].state, states[each].attempts) for each in good} == {("completed", 1)}
    ran = read(tasks, "good").split()
    assert sorted(map(int, ran)) == sorted(good)
    for job_id, (task, payload) in ids.items():
        if task in ("end", "run_on", "fall"):
            job = states[job_id]
            assert (job.state, job.attempts) == ("failed", 1), job
            assert job.error.startswith(EXPECTED.get(payload, "TimeoutError: timed out after 2 s")), job
    assert [child.poll() for child in children] == [None] * 3
    workers = [wait_until(lambda child=child: processes.children(child.pid))[0] for child in children]
    for pid in [*workers, *(child.pid for child in children)]:
        assert len(os.listdir(f"/proc/{pid}/fd")) < 200
    for child in children:
        child.send_signal(signal.SIGTERM)
    assert [child.wait(PATIENCE_SECONDS) for child in children] == [0] * 3
    wait_until(lambda: not any(is_in(pid, tasks.folder) for pid in map(int, filter(str.isdigit, os.listdir("/proc")))))


def is_in(pid, folder):
    """Return whether a process works in this folder."""
    with suppress(OSError):
        return processes.is_running(pid) and os.readlink(f"/proc/{pid}/cwd") == str(folder)
    return False


EXPECTED = {
    "leave": "WorkerDied: the task's process exited with code 0",
    "leave with 3": "WorkerDied: the task's process exited with code 3",
    "kill": "WorkerDied: the task's process was killed by signal 9 (SIGKILL)",
    "abort": "WorkerDied: the task's process was killed by signal 6 (SIGABRT)",
    "fault": "WorkerDied: the task's process was killed by signal 11 (SIGSEGV)",
    "jump": "WorkerDied: the task's process was killed by signal 11 (SIGSEGV)",
    "become": "WorkerDied: the task replaced its process by another program",
    "overflow": ("RecursionError", "WorkerDied: the task's process was killed by signal 11 (SIGSEGV)"),
    "unprintable": "Unprintable",
    "untruthful": "Untruthful",
    "huge": "ValueError: xxxx",
    "recursion": "RecursionError",
    "exit": "SystemExit: leaving",
    "interrupt": "KeyboardInterrupt",
    "generator": "GeneratorExit",
    "surrogates": "ValueError",
    "evil": "Evil",
    "hidden": "Hidden: the reason",
    "nameless": "OfNameless: the reason",
    "retry": "OddRetry",
    "notes": "ValueError: the reason",
    "message": "Slow: (its message cannot be shown",
    "memory": "MemoryError",
    "lost lease": "LeaseLost: of another queue",
}


# Termination


def test_consumer_that_is_told_to_end_at_any_moment_loses_no_job_and_no_attempt(tasks):
    """During the imports, a claim, a commit, a wake-up, the close; PQUEUE_SOAK=10 for hundreds of moments."""
    chosen = random.Random(SOAK)
    tasks.write("slow_import.py", "import time\ntime.sleep(0.1)\n")
    queue = tasks.queue()
    for _ in range(24 * SOAK):
        queue.enqueue_many("good", range(chosen.choice([0, 1, 200])))
        child = consumer(tasks, "--import", "slow_import")
        time.sleep(chosen.uniform(0, 0.7))  # a moment to try, and not a wait for something
        if chosen.random() < 0.5:
            queue.enqueue("good")  # wakes it up
        child.send_signal(chosen.choice([signal.SIGTERM, signal.SIGHUP]))  # INT: tests/test_termination.py
        code = child.wait(PATIENCE_SECONDS)
        said = child.out.read_text()
        assert code == 0 or (code in (-signal.SIGTERM, -signal.SIGHUP) and said == ""), (code, said)
        assert "Traceback" not in said, said
        assert not queue.count_jobs(state="processing")
    assert {job.attempts for job in queue.list_jobs(state="pending", limit=10**6)} <= {0}
    completed = queue.list_jobs(state="completed", limit=10**6)
    assert {job.attempts for job in completed} <= {1}
    assert sorted(map(int, (read(tasks, "good") or "").split())) == sorted(job.id for job in completed)


# In an application


def test_consumer_in_a_thread_works_without_signals_and_stops_when_asked(place):
    queue = place.queue()
    before = [signal.getsignal(number) for number in range(1, 65) if number not in (32, 33)]
    go_on = place.folder / "go-on"
    with registered("slow", lambda: wait_until(go_on.exists)), registered("quick", lambda job: job.payload):
        runner = Consumer(queue, "embedded", lease_seconds=0.6)
        thread = threading.Thread(target=runner.run)
        thread.start()
        ids = queue.enqueue_many("quick", range(100)) + [queue.enqueue("slow"), queue.enqueue("quick", 100)]
        first = wait_until(lambda: queue.get(ids[100]).lease_expires_at)
        wait_until(lambda: queue.get(ids[100]).lease_expires_at > first + 1.2)
        go_on.touch()
        wait_until(lambda: queue.stats()["states"]["completed"] == 102)
        runner.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert (runner.completed, runner.failed) == (102, 0)
    assert [signal.getsignal(number) for number in range(1, 65) if number not in (32, 33)] == before
    assert {(job.state, job.attempts) for job in queue.list_jobs(limit=200)} == {("completed", 1)}


def test_job_whose_lease_has_expired_before_it_begins_loses_no_attempt(place, monkeypatch):
    queue, ahead = place.queue(), []
    take = queue.complete_and_dequeue

    def take_and_sleep(*arguments, **options):
        found = take(*arguments, **options)
        ahead.extend([3600.0] if found[0] and not ahead else [])
        return found

    monkeypatch.setattr(queue, "_time", lambda now: time.time() + sum(ahead) if now is None else now)
    monkeypatch.setattr(queue, "complete_and_dequeue", take_and_sleep)
    with registered("quick", lambda job: job.payload):
        job_id = queue.enqueue("quick", max_attempts=1)
        Consumer(queue, "embedded", drain=True).run()
    assert (ahead, queue.get(job_id).state, queue.get(job_id).attempts) == ([3600.0], "completed", 1)


@pytest.mark.parametrize("concurrency", [1, 2])
def test_consumer_runs_in_a_child_of_the_process_that_created_it(place, concurrency):
    queue = place.queue()
    with registered("quick", lambda job: job.payload):
        ids = queue.enqueue_many("quick", range(3))
        runner = Consumer(queue, "embedded", drain=True, concurrency=concurrency)
        if (child := os.fork()) == 0:
            os._exit(runner.run())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == Consumer(queue, "other", drain=True).run()
    assert [queue.get(each).consumer for each in ids] == ["embedded"] * 3
    assert [queue.get(each).state for each in ids] == ["completed"] * 3


@pytest.mark.parametrize("error", [SystemExit("no"), KeyboardInterrupt(), GeneratorExit(), MemoryError()])
def test_consumer_in_a_thread_never_ends_the_application(place, error):
    queue = place.queue()

    def fall():
        raise error

    def cancelled(job):
        queue.cancel(job.id)

    with registered("fall", fall), registered("cancelled", cancelled):
        ids = [queue.enqueue("fall", max_attempts=1), queue.enqueue("cancelled")]
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(Consumer(queue, "embedded", drain=True).run).result()
    assert [queue.get(each).state for each in ids] == ["failed", "cancelled"]
    assert queue.get(ids[0]).error.startswith(type(error).__name__)


@pytest.mark.parametrize(
    "options",
    [
        *({"wait": value} for value in ("x", float("nan"), True)),
        *({"lease_seconds": value} for value in ("x", 0, -1, float("inf"), None)),
        *({name: value} for name in ("max_jobs", "max_rss", "concurrency") for value in ("x", 0, -1, 1.5, True)),
        *({name: value} for name in ("queues", "tasks") for value in ("mail", 5, [5], [""])),
    ],
)
def test_consumer_refuses_an_option_when_it_is_created(place, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"expected (a |a list of )?{name[:-1]}"):
        Consumer(place.queue(), "embedded", **options)


def test_consumer_needs_a_name_when_it_is_created(place):
    for name in ("", 5, None, "a\nb"):
        with pytest.raises(ValueError, match="expected a consumer name"):
            Consumer(place.queue(), name)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("attempts", [1, 3])
def test_ctrl_c_ends_a_consumer_in_the_main_thread_of_an_application(place, is_async, attempts):
    async def interrupted():
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)

    queue = place.queue()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    with (
        registered("busy", interrupted if is_async else lambda: signal.raise_signal(signal.SIGINT)),
        ExitStack() as undo,
    ):
        undo.callback(signal.signal, signal.SIGINT, before)
        ids = [queue.enqueue("busy", max_attempts=attempts) for _ in range(2)]
        runner = Consumer(queue, "embedded", drain=True)
        with pytest.raises(KeyboardInterrupt):
            runner.run()
    job, other = map(queue.get, ids)
    if attempts == 1:
        assert job.error.startswith("Stopped: stopped while it ran; not run again because max_attempts is 1")
    else:
        assert (job.state, job.attempts) == ("pending", 0)
    assert (other.state, other.attempts) == ("pending", 0)
    with registered("busy", lambda: None):
        assert runner.run()  # again
    assert queue.get(other.id).state == "completed"


def test_consumer_accepts_durations(place):
    options = {"lease_seconds": timedelta(seconds=0.3), "wait": timedelta(0), "drain": True}
    with registered("rest", lambda: time.sleep(0.7)):
        job_id = place.queue().enqueue("rest")
        assert Consumer(place.queue(), "embedded", **options).run()
    assert (place.queue().get(job_id).state, place.queue().get(job_id).attempts) == ("completed", 1)


@contextmanager
def registered(name, function):
    pqueue.task(name)(function)
    try:
        yield
    finally:
        del pqueue.TASKS[name]


ORPHANS = """
import subprocess
from pqueue import task

@task()
def orphan(job):
    subprocess.run(["sh", "-c", "for _ in 1 2 3 4 5; do sleep 0.1 & done"], check=True)
"""


def test_consumer_that_is_the_first_process_of_a_container_reaps_orphans(tasks):
    tasks.write("more.py", ORPHANS)
    queue = tasks.queue()
    ids = queue.enqueue_many("orphan", range(3))
    command = tasks.command("consumer.py", "--import", "more")
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    outer = tasks.start_command([*unshare, *command])
    wait_until(lambda: all(queue.get(each).state == "completed" for each in ids))
    (keeper,) = processes.children(outer.pid)
    wait_until(lambda: len(processes.children(keeper)) == 2)  # the worker and its watchdog
    os.kill(keeper, signal.SIGTERM)
    assert outer.wait(PATIENCE_SECONDS) == 0


DAEMONS = """
import os, signal, subprocess
from pathlib import Path
from pqueue import task

@task(max_attempts=1)
def daemons(job):
    subprocess.run(["sh", "-c", "setsid sleep 600 & echo $! > program"], check=True)
    if (child := os.fork()) == 0:
        if (grandchild := os.fork()) == 0:
            os.setsid()
            signal.pause()
        Path("fork").write_text(str(grandchild))
        os._exit(0)
    os.waitpid(child, 0)
    os.kill(os.getpid(), signal.SIGKILL)
"""
# As a program that began in the container by itself, and outlives what started it
STRANGER = '(until test -e fork; do sleep 0.05; done; setsid sleep 600 & echo $! > stranger) & exec "$@"'


def test_consumer_that_is_the_first_process_of_a_container_ends_the_daemons_of_its_tasks_only(tasks):
    tasks.write("more.py", DAEMONS)
    queue = tasks.queue()
    unshare = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command = ["sh", "-c", STRANGER, "sh", *tasks.command("consumer.py", "--import", "more")]
    outer = tasks.start_command([*unshare, *command])
    (keeper,) = wait_until(lambda: processes.children(outer.pid))
    bad = queue.enqueue("daemons")
    wait_until(lambda: queue.get(bad).state == "failed" and read(tasks, "stranger"))
    assert "SIGKILL" in queue.get(bad).error
    wait_until(lambda: sorted(map(processes.name, processes.children(keeper))) == ["python", "sh", "sleep"])
    os.kill(keeper, signal.SIGTERM)
    assert outer.wait(PATIENCE_SECONDS) == 0
