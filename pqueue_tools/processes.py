"""Processes as the system shows them: children, memory, and whether they have become another program. Linux."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_GET_KEEPCAPS, PR_SET_KEEPCAPS = 7, 8
PR_SET_NAME, PR_GET_NAME = 15, 16
PR_GET_SECUREBITS, PR_SET_SECUREBITS = 27, 28
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PTRACE_DETACH = 17
FORKED = 0x40  # PF_FORKNOEXEC: the process has not become another program
MARK = "PQUEUE_KEEPER"  # variable in the environment of the processes that tasks start: the pid of the keeper


def end_with_parent(parent: int) -> None:
    """Let the system kill this process when its parent ends."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans(wanted: bool) -> None:
    """Let descendants of this process whose parent has ended become its children."""
    _prctl(PR_SET_CHILD_SUBREAPER, int(wanted))


def attributes() -> tuple[int | bytes, ...]:
    """Return the signal that comes when the parent ends, whether orphans are adopted, the name, whether memory may be
    dumped, the slack of timers, and what keeps capabilities."""
    at_end, adopts, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(16)
    for option, found in ((PR_GET_PDEATHSIG, at_end), (PR_GET_CHILD_SUBREAPER, adopts), (PR_GET_NAME, name)):
        _prctl(option, ctypes.byref(found))
    others = map(_prctl, (PR_GET_DUMPABLE, PR_GET_TIMERSLACK, PR_GET_KEEPCAPS, PR_GET_SECUREBITS))
    return at_end.value, adopts.value, name.value, *others


def set_attributes(values: tuple[int | bytes, ...]) -> None:
    options = PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NAME, PR_SET_DUMPABLE, PR_SET_TIMERSLACK
    for option, value in zip((*options, PR_SET_KEEPCAPS, PR_SET_SECUREBITS), values, strict=True):
        _prctl(option, value)


def stop_tracing(pid: int, status: int) -> None:
    """Let a child that was stopped as it is traced by this process continue, with the signal that stopped it."""
    libc().ptrace(PTRACE_DETACH, pid, 0, os.WSTOPSIG(status))


def share_memory() -> None:
    """Before a fork, return free memory to the system, and keep collections in the two processes from copying the rest,
    as they write to each object that they look at."""
    gc.collect()
    with suppress(AttributeError):
        libc().malloc_trim(0)  # of glibc
    gc.freeze()


def personality() -> int:
    """Return the flags of the execution domain, such as whether addresses are random."""
    return int(libc().personality(0xFFFFFFFF)) if sys.platform == "linux" else 0


def reset_arithmetic() -> None:
    """Let the processor round as usual, and trap nothing. Some libraries change this when they are loaded."""
    libc().fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV


def _prctl(option: int, value: Any = 0) -> int:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            return int(libc().prctl(option, value, 0, 0, 0))
    return 0


@cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def environment() -> list[bytes]:
    """Return the environment that programs inherit, as C code sees it; where that is unknown, nothing."""
    with suppress(ValueError, OSError):
        variables, found = ctypes.POINTER(ctypes.c_char_p).in_dll(libc(), "environ"), list[bytes]()
        while variables and (each := variables[len(found)]) is not None:
            found.append(each)
        return found
    return []


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [
            int(child)
            for thread in os.listdir(f"/proc/{pid}/task")
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
        ]
    return []


def descendants(pid: int) -> Iterator[int]:
    for child in children(pid):
        yield child
        yield from descendants(child)


def kill(*pids: int) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def resident_mb(pid: int | str) -> float:
    """Return the resident memory of a process; 0 where the system does not show it."""
    pages = _read(f"{pid}/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if pages else 0.0


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    return _stat(pid)[:1] not in ([], [b"Z"], [b"X"])


def waits_for_disk(pid: int) -> bool:
    """Return whether a thread of a process waits where no signal reaches it, as for a disk."""
    with suppress(OSError):
        return any(_stat(f"{pid}/task/{thread}")[:1] == [b"D"] for thread in os.listdir(f"/proc/{pid}/task"))
    return False


def has_become_another(pid: int) -> bool:
    """Return whether a forked process has replaced itself by another program."""
    fields = _stat(pid)
    return len(fields) > 6 and not int(fields[6]) & FORKED


def is_of_task(pid: int) -> bool:
    """Return whether a child of this process was started by a worker of it: the program says so, or it is a fork."""
    variables = _read(f"{pid}/environ").split(b"\0")
    return _read("self/cmdline") == _read(f"{pid}/cmdline") or f"{MARK}={os.getpid()}".encode() in variables


def name(pid: int) -> str:
    return os.fsdecode(_read(f"{pid}/comm")).strip() or "?"


def _stat(pid: int | str) -> list[bytes]:
    """Return the fields of /proc/PID/stat, or PID/task/TID, from the state on."""
    return _read(f"{pid}/stat").rpartition(b")")[2].split()


def _read(name: str) -> bytes:
    """Return a file of /proc, or nothing if the process has ended or the system has no such file."""
    with suppress(OSError):
        return Path(f"/proc/{name}").read_bytes()
    return b""


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory, on this machine and in its containers."""
    found = re.search(rb"(?m)^oom_kill (\d+)", _read("vmstat"))
    return int(found[1]) if found else 0


def end_text(status: int, oom_kills_before: int) -> str:
    """Return how a process ended, given its wait status, and what `oom_kills` returned when it began."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"exited with code {code}"
    text = f"was killed by signal {-code}"
    with suppress(ValueError):
        text += f" ({signal.Signals(-code).name})"
    return f"{text}, as memory ran out" if -code == signal.SIGKILL and oom_kills() > oom_kills_before else text
