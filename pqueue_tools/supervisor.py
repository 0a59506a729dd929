"""Manage groups of consumers through supervisord."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import socket
import sys
import sysconfig
import time
import xmlrpc.client
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pqueue_files import make_folder, sync
from pqueue_tools.process import blocked_signals, create_whole
from pqueue_tools.report import printable
from pqueue_values import command_line

HERE = Path(__file__).resolve().parent
CONFIGURATION = Path("supervisord.conf")
SOCKET = Path("var/supervisor.sock")
LOGS = Path("var/log")
INCLUDED = Path("var/supervisor.d")
GROUP_SIZE = 3  # as in supervisord.conf
PYTHON_NOTE = "; python3 is looked up on PATH: activate a virtual environment first if your tasks need one.\n"
CALL_SECONDS = 120.0  # longer than stopwaitsecs: stopping a group waits for its running jobs
STATUS_SECONDS = 5.0
START_SECONDS = 120.0  # until the consumers of a new group must have imported their tasks
CONSUMER = re.compile(r"consumer\.py|pqueue[-_.](tools\.)?consumer")  # in the command of a program
STOPS = 5  # how often the removal of a group is tried


class ManagerError(Exception):
    """The request failed; the message says why and what to do."""


class _Transport(xmlrpc.client.Transport):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if not hasattr(socket, "AF_UNIX"):
            raise ManagerError(f"cannot reach supervisord: it does not run on {sys.platform}")
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        self._connection = host, connection  # for Transport.close, also on an error
        connection.sock.settimeout(self._seconds)
        connection.sock.connect(str(SOCKET))
        return connection


def call(method: str, *arguments: Any, seconds: float = CALL_SECONDS) -> Any:
    """Call a method of supervisord's XML-RPC interface. Raises ManagerError on failure or timeout."""
    try:
        with xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(seconds)) as server:
            return getattr(server.supervisor, method)(*arguments)
    except xmlrpc.client.Fault as fault:
        raise ManagerError(f"supervisord refused {method}: {fault.faultString}") from None
    except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ManagerError(
            f"no supervisord answers at {SOCKET.absolute()} ({reason}): start it with supervisord -c {CONFIGURATION}, "
            f"which {command_line('manager')} --init writes"
        ) from None


def processes(seconds: float = STATUS_SECONDS) -> list[dict[str, Any]]:
    """Return supervisord's processes: group, name, state, pid (0: none), uptime_seconds. Raises ManagerError."""
    return [
        {
            "group": each["group"],
            "name": each["name"],
            "state": each["statename"],
            "pid": each["pid"],
            "uptime_seconds": max(0, each["now"] - each["start"]) if each["pid"] else 0,
        }
        for each in call("getAllProcessInfo", seconds=seconds)
    ]


def known_processes() -> list[dict[str, Any]] | str:
    """Return what `processes` returns, or a sentence that says why there are none."""
    if not os.path.exists(SOCKET):
        return "supervisord is not running here"
    try:
        return processes()
    except ManagerError as error:
        return str(error)


def added_groups() -> list[str]:
    """Return the names of the groups that add_group added."""
    return sorted(path.stem for path in INCLUDED.glob("consumer*.conf") if path.stem.removeprefix("consumer").isdigit())


def write_configuration(options: list[str], *, with_producer: bool) -> None:
    """Write supervisord.conf and create its folders in the current folder, to run this copy of the programs, and the
    consumers with these options. Raises ManagerError, and ValueError for a name that supervisord cannot read."""
    sections = _shipped("supervisord.conf").read_text(encoding="utf-8").split("\n\n")
    text = "\n\n".join(each for each in sections if with_producer or "[program:producer]" not in each)
    for name in ("producer", "consumer", "ops"):
        words = _command(name) + (options if name == "consumer" else [])
        command = _in_configuration(words).replace("\\", r"\\").replace('"', r"\"")
        text = text.replace(f"python3 {name}.py", command)
    text = text.replace(PYTHON_NOTE, "")
    is_new = not os.path.lexists(CONFIGURATION)
    for folder in (LOGS, INCLUDED) if is_new else ():
        make_folder(folder)
    if not (is_new and _create(CONFIGURATION, text)):
        raise ManagerError(f"cannot write {CONFIGURATION}: it already exists; remove it first")


def _consumer_command() -> str | None:
    """Return the command of the first consumer in supervisord's configuration, as it must be written in one."""
    commands = (str(each.get("command", "")) for each in call("getAllConfigInfo"))
    found = next(filter(CONSUMER.search, commands), None)
    return found and found.replace("%", "%%").replace("\n", "\n ")


def add_group(size: int = GROUP_SIZE, options: list[str] | None = None) -> str:
    """Add a group of this many consumers with these options, wait until all have started, and return its name. Without
    options, they run the command of the first consumer that is configured.

    If this fails, remove the group again. Raises ManagerError, and ValueError for a name that supervisord cannot read.
    """
    command = (None if options else _consumer_command()) or _in_configuration(_command("consumer") + (options or []))
    used = {each["group"] for each in processes()}
    make_folder(INCLUDED)
    group = None
    try:
        with blocked_signals():  # a signal must not come between the creation of the file and its assignment to group
            group = next(
                name
                for number in range(2, 10_000)
                if (name := f"consumer{number}") not in used and _create(_path(name), _section(name, size, command))
            )
        call("reloadConfig")
        call("addProcessGroup", group)
        _expect_started(lambda each: each["group"] == group, size, f"cannot add {group}, so removed it again")
    except BaseException:
        if group:
            with suppress(ManagerError):
                _stop_group(group)
            _delete_configuration(group)
        raise
    return group


def _section(group: str, size: int, command: str) -> str:
    """Return the configuration of a group: that of the consumers in the shipped one, with this size and command."""
    from configparser import RawConfigParser

    shipped = RawConfigParser()
    shipped.read_string(_shipped(CONFIGURATION.name).read_text(encoding="utf-8"))
    options = {**shipped["program:consumer"], "command": command, "numprocs": size, "startsecs": 3}
    lines = [f"{name} = {value}" for name, value in options.items()]
    hint = f"; To remove this group: {command_line('manager')} --remove {group}"
    return "\n".join([hint, f"[program:{group}]", *lines, ""])


def _expect_started(
    wanted: Callable[[dict[str, Any]], bool],
    size: int,
    failure: str,
    has_registered: Callable[[int], bool] = lambda _: False,
) -> None:
    """Wait until this many consumers among supervisord's processes take jobs: they say so in their logs, or have
    registered under their pid. Raises ManagerError, with this text before the reason.

    RUNNING only says that a process has existed for startsecs, in which a busy machine may not get to the tasks.
    """
    deadline, pids, started = time.monotonic() + START_SECONDS, dict[str, int](), set[str]()
    logs: dict[str, StartLog] = {}
    while True:
        found = [each for each in processes(CALL_SECONDS) if wanted(each)]
        for name, state, pid in ((each["name"], each["state"], each["pid"]) for each in found):
            was_restarted = pid != pids.setdefault(name, pid) if pid else False
            if was_restarted or state in ("BACKOFF", "EXITED", "FATAL", "UNKNOWN"):
                raise ManagerError(f"{failure}: {name} ended: {_last_log_line(name)}")
            log = logs.setdefault(name, StartLog(name))
            if name not in started and (log.says_that_it_started(pid) or (pid and has_registered(pid))):
                started.add(name)
        if len(started) == size and all(each["state"] == "RUNNING" for each in found):
            return
        if time.monotonic() > deadline:
            name = min({each["name"] for each in found} - started, default=failure)
            raise ManagerError(f"{failure}: {name} has not started after {START_SECONDS:g} s: {_last_log_line(name)}")
        time.sleep(0.1)


class StartLog:
    """The log of a consumer, as far as it says which processes have started. Each part is read once."""

    def __init__(self, name: str) -> None:
        self._path = LOGS / f"{name}.log"
        self._line = re.compile(rb" started consumer=\S+ pid=(\d+) ")
        self._read, self._started = 0, set[int]()

    def says_that_it_started(self, pid: int) -> bool:
        with suppress(OSError), self._path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._read:  # supervisord has begun another
                self._read = 0
            file.seek(self._read)
            new = file.read()
            lines = new[: new.rfind(b"\n") + 1]
            self._read += len(lines)
            self._started.update(map(int, self._line.findall(lines)))
        return pid in self._started


def _last_log_line(name: str) -> str:
    path = LOGS / f"{name}.log"
    try:
        last = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n")[2]
    except OSError as error:
        return f"cannot read {path}: {error.strerror}"
    return printable(last) or f"{path} is empty"


def remove_group(group: str) -> None:
    """Stop a group that was added, after its consumers have finished their jobs, and delete its configuration."""
    if group not in added_groups():
        known = ", ".join(added_groups()) or "none"
        raise ManagerError(f"expected an added group, got {group!r}; there are: {known}")
    _stop_group(group)
    _delete_configuration(group)
    call("reloadConfig")


def _stop_group(group: str) -> None:
    for left in reversed(range(STOPS)):
        if group not in {each["group"] for each in processes(CALL_SECONDS)}:
            return
        call("stopProcessGroup", group)
        try:
            call("removeProcessGroup", group)
        except ManagerError:  # one of its processes had ended, and was started again
            if not left:
                raise


def _delete_configuration(group: str) -> None:
    _path(group).unlink(missing_ok=True)
    sync(INCLUDED)


def start(name: str, has_registered: Callable[[int], bool] = lambda _: False) -> None:
    """Start a process, given by its name without the group, and wait until it runs and, if it is a consumer, takes
    jobs. has_registered: whether a consumer with this pid has registered. Raises ManagerError.
    """
    full = _full_name(name)
    commands = {f"{each['group']}:{each['name']}": str(each.get("command", "")) for each in call("getAllConfigInfo")}
    is_consumer = CONSUMER.search(commands.get(full, ""))
    call("startProcess", full, not is_consumer)
    # guard: a consumer that ends before it takes jobs is not reported as started
    if is_consumer:
        hint = f"; supervisord tries again until {command_line('manager')} --stop {name}"
        try:
            _expect_started(
                lambda each: f"{each['group']}:{each['name']}" == full, 1, f"cannot start {name}", has_registered
            )
        except ManagerError as error:
            raise ManagerError(f"{error}{hint}") from None


def stop(name: str) -> None:
    """Stop a process, given by its name without the group, after it has finished its jobs. Raises ManagerError."""
    call("stopProcess", _full_name(name))


def _full_name(name: str) -> str:
    found = [f"{each['group']}:{each['name']}" for each in processes()]
    matches = [full for full in found if name in (full, full.split(":")[1])]
    if len(matches) != 1:
        raise ManagerError(f"expected one of {', '.join(found)}, got {name!r}")
    return matches[0]


def _shipped(name: str) -> Path:
    """Return the path of a file of pqueue: in this folder if installed, in the parent folder in a checkout."""
    return path if (path := HERE / name).exists() else HERE.parent / name


def _command(program: str) -> list[str]:
    path = _shipped(f"{program}.py")
    if path.parent != HERE:
        return [sys.executable, str(path)]
    # python -m prefers modules of the current folder to those of the standard library: use it only after pip --user
    script = os.path.join(sysconfig.get_path("scripts"), f"pqueue-{program}")
    return [sys.executable, *([script] if os.path.exists(script) else ["-m", f"pqueue_tools.{program}"])]


def consumer_options(queues: list[str] | None, modules: list[str] | None, concurrency: int | None = None) -> list[str]:
    """Return the options of a consumer for its command line."""
    words = [word for queue in queues or () for word in ("--queue", queue)]
    words += ["--concurrency", str(concurrency)] if concurrency else []
    return words + [word for module in modules or () for word in ("--import", module)]


def _in_configuration(words: list[str]) -> str:
    for word in words:
        if not word.isprintable() or any(mark in word for mark in (";", "#", "%(")):
            raise ValueError(
                f"expected a printable name without ; # or %(, which supervisord cannot read, got {word!r}"
            )
    return shlex.join(words).replace("%", "%%")


def _path(group: str) -> Path:
    return INCLUDED / f"{group}.conf"


def _create(path: Path, text: str) -> bool:
    """Create a file; return False if it exists already. With a partial one, supervisord would not start."""
    with suppress(FileExistsError):
        create_whole(path, text)
        return True
    return False


def log_lines(folder: Path, job_id: int, most_bytes: int | None = None) -> list[dict[str, str]]:
    """Return what the consumers logged about a job, from the files that Supervisor writes, oldest first: "file" and
    "line". most_bytes: read only the end of each file. Raises OSError."""
    about = re.compile(rb'\bjob=%d(?= |$)|"job": %d\b' % (job_id, job_id))  # in text and in JSON
    rows = []
    for path in sorted(folder.glob("*.log*")):  # also those that were rotated
        with path.open("rb") as file:
            if most_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - most_bytes))
            lines = [line.rstrip(b"\n").decode(errors="replace") for line in file if about.search(line)]
        rows += [{"file": path.name, "line": line} for line in lines]
    return sorted(rows, key=lambda row: row["line"])
