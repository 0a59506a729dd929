"""Logging, signals, argument parsing and other functions that the programs share."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, wraps
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar, cast

import pqueue
from pqueue import Job, PersistentQInterface, QueueBusy, QueueError, QueueFull
from pqueue_files import part_of, sync
from pqueue_tasks import current_job
from pqueue_tools import termination
from pqueue_tools.masking import masked_text
from pqueue_tools.report import iso, printable
from pqueue_values import MAX_ID, MAX_NUMBER, MAX_SECONDS, NoConnection, program_name, short

RETRY_PAUSE_SECONDS = (0.1, 5.0)  # first and longest pause while the database is locked or full

OPEN_SECONDS = 5.0  # how long a command waits for a server to answer

PARENT = os.getppid()

T = TypeVar("T")
Main = TypeVar("Main", bound=Callable[..., int])


def is_orphaned() -> bool:
    """Return whether the Supervisor that started this program has exited. A new one starts its own programs."""
    return "SUPERVISOR_ENABLED" in os.environ and (os.getppid() != PARENT or _was_adopted())


@lru_cache
def _was_adopted() -> bool:
    """Return whether the Supervisor had exited before PARENT was read, so that PARENT is init."""
    with suppress(OSError):
        return PARENT == 1 and b"supervisord" not in Path("/proc/1/cmdline").read_bytes()
    return False


def expect_posix() -> None:
    """Raise QueueError on Windows, which lacks the signals, locks and directory descriptors that the programs use."""
    if not hasattr(os, "O_DIRECTORY"):
        raise QueueError(
            f"cannot run on {sys.platform}: the programs need Linux or macOS; only the library, pqueue.py, works here"
        )


def sentence_of(error: object) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"cannot use {error.filename}: {error.strerror}"
    if isinstance(error, FileNotFoundError):  # of os.getcwd
        return "cannot find the current folder: it was deleted"
    return str(error)


def print_error(program: str, error: object) -> None:
    print(f"{program_name(program)}: {printable(sentence_of(error))}", file=sys.stderr)


def report(program: str, error: Exception) -> int:
    """Print the error; return the exit code: 2 for a wrong argument or setting, else 1."""
    print_error(program, error)
    return 2 if isinstance(error, ValueError) else 1


LEVELS = ("debug", "info", "warning", "error")
EVENT_LEVELS = {  # of others: info
    **dict.fromkeys(("lost", "left behind", "left to its lease", "waiting", "blocked", "no watchdog"), "warning"),
    "not pruned": "warning",
    **dict.fromkeys(("failed", "worker died"), "error"),
}
MAX_FIELD_CHARS = 8000

_log: dict[str, Any] = {"level": "info", "format": "text", "file": None, "before_line": None}  # no file: stdout


def set_log(level: str, form: str) -> None:
    """Write only events of at least this level, as text or as JSON."""
    _log.update(level=level, format=form)


def log(event: str, level: str | None = None, **fields: Any) -> None:
    """Write one line: the time in UTC, the event, key=value for each field, and the level of a warning or an error; or
    all of these as a JSON object."""
    level = level or EVENT_LEVELS.get(event, "info")
    # guard: an event below the level is not logged
    if LEVELS.index(level) >= LEVELS.index(_log["level"]):
        print_line(log_line(utc_now(), event, fields, level))


def write_log_to(file: IO[str], before_line: Callable[[], object]) -> None:
    """Write the log to a file from now on, until a task closes it, and call `before_line` before each line."""
    _log.update(file=file, before_line=before_line)


class TaskLog(logging.Handler):
    """Writes what tasks log, with their job, task and consumer."""

    def __init__(self, consumer: str, level: str) -> None:
        super().__init__()
        self.consumer, self.job = consumer, cast("Job | None", None)
        logging.getLogger().addHandler(self)
        logging.getLogger().setLevel(level.upper())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            running = self.job or current_job()
            job = {} if running is None else {"job": running.id, "task": running.task}
            text = record.getMessage()
            trace = {"traceback": logging.Formatter().formatException(record.exc_info)} if record.exc_info else {}
            level = LEVELS[min(3, max(0, record.levelno // 10 - 1))]
            log("log", level, consumer=self.consumer, **job, logger=record.name, message=text, **trace)
        except Exception:
            self.handleError(record)


def print_line(text: str) -> None:
    """Print the text. Ignore a closed pipe or a full disk, so that the program continues."""
    if _log["before_line"]:
        _log["before_line"]()
    file = _log["file"] or sys.stdout
    try:
        print(text, flush=True, file=file)
    except OSError as error:
        if _log["file"] and error.errno == errno.EBADF:  # closed by a task
            _log["file"] = None
            print_line(text)
        elif error.errno not in (errno.ENOSPC, errno.EFBIG):  # a full disk, or the limit for files
            with suppress(OSError):  # a task has used up the descriptors
                discard_output(file)
    except ValueError:
        """A task has closed sys.stdout."""


def prepare_streams() -> None:
    """Open those of stdin, stdout and stderr that are closed, so that no file gets their descriptors; escape characters
    that the encoding of stdout or stderr cannot represent."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) < 3:
            os.set_inheritable(number, True)
        os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 - it stays open
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")


def writes_to_stdout(program: str) -> Callable[[Main], Main]:
    """Decorate the main function of a program: report an OSError, such as a failed write to stdout, in one line, and
    return 1. A closed pipe is not an error."""

    def decorate(main: Main) -> Main:
        @wraps(main)
        def run(arguments: list[str] | None = None) -> int:
            prepare_streams()
            try:
                try:
                    return main(arguments)
                finally:
                    sys.stdout.flush()
            except BrokenPipeError:
                discard_output()
                return 0
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EIO) and not error.filename:
                    discard_output()
                    print_error(program, f"cannot write to stdout: {error.strerror}")
                else:
                    print_error(program, error)
                return 1

        return cast(Main, run)

    return decorate


def discard_output(file: IO[str] | None = None) -> None:
    """Discard what is and what will be written to a file; None: stdout."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (file or sys.stdout).fileno())


def log_line(at: str, event: str, fields: dict[str, Any], level: str = "info") -> str:
    if _log["format"] == "json":
        values = {key: each if isinstance(each, int) else _field(each) for key, each in fields.items()}
        return json.dumps({"at": at, "level": level, "event": event, **values}, ensure_ascii=True)
    last = [f"level={level}"] if level in ("warning", "error") else []
    return " ".join([at, event, *(f"{key}={quoted(value)}" for key, value in fields.items()), *last])


def log_completed(name: str, jobs: list[Job]) -> None:
    """Log the completion of jobs: as text in one write, which takes a fifth of the time."""
    if _log["format"] == "json" or _log["level"] not in ("debug", "info"):
        for job in jobs:
            log("completed", consumer=name, job=job.id, task=job.task, attempt=job.attempts)
    elif jobs:
        start = f"{utc_now()} completed consumer={quoted(name)}"
        print_line("\n".join(f"{start} job={job.id} task={quoted(job.task)} attempt={job.attempts}" for job in jobs))


def quoted(value: Any) -> str:
    text = _field(value)
    plain = text and text.isprintable() and not (" " in text or '"' in text or "=" in text)
    return text if plain else '"' + printable(text.replace("\\", r"\\")).replace('"', r"\"") + '"'


def _field(value: Any) -> str:
    """Return the text of a field, masked, at most MAX_FIELD_CHARS. Cut its start: a traceback ends with the error."""
    text = masked_text(str(value))
    return text if len(text) <= MAX_FIELD_CHARS else "…" + text[-MAX_FIELD_CHARS:]


def utc_now() -> str:
    return iso(time.time())


def on_termination(handler: Any) -> None:
    """Call the handler on TERM, INT and HUP. An ignored HUP stays ignored, as nohup requires."""
    for number in termination.SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


def create_whole(path: Path, text: str) -> None:
    """Create a file with this text and sync it; on an error, create none. Raises OSError, also if the file exists."""
    with part_of(path) as part:
        part.write_text(text, encoding="utf-8")
        sync(part)
        os.link(part, path)  # unlike a rename, this replaces no file
        sync(path.parent)


@contextmanager
def blocked_signals(numbers: Iterable[int] = termination.SIGNALS) -> Iterator[None]:
    """Delay these signals, or TERM, INT and HUP, until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def retry_while_busy(call: Callable[[], T], pause: Callable[[float], bool], **fields: Any) -> T | None:
    """Call until it succeeds, while the database is locked or full or the disk is full. Between attempts, call `pause`
    with a number of seconds; if it returns True, give up and return None."""
    seconds, longest = RETRY_PAUSE_SECONDS
    logged: object = None
    while True:
        try:
            return call()
        except (QueueBusy, QueueFull, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.ENOSPC:
                raise
            # A server that is full says so in several ways
            reason = NoConnection if isinstance(error, NoConnection) else str(error)
            if reason != logged:
                logged = reason
                log("waiting", **fields, reason=error)
        if pause(seconds):
            return None
        seconds = min(longest, seconds * 2)


def open_waiting(**fields: Any) -> PersistentQInterface | None:
    """Open the queue. While its server is away, wait and log it. Return None if stopped meanwhile."""
    stopped = threading.Event()
    on_termination(lambda *_: stopped.set())
    queue = retry_while_busy(pqueue.open_queue, lambda pause: stopped.wait(pause) or is_orphaned(), **fields)
    on_termination(signal.SIG_DFL)
    if queue is not None and stopped.is_set():
        queue.close()
        return None
    return queue


def open_soon(*, create: bool = True) -> PersistentQInterface:
    """Open the queue for a command. If its server is away, try for OPEN_SECONDS, as someone waits for the answer."""
    return retry_soon(lambda: pqueue.open_queue(create=create))


def retry_soon(call: Callable[[], T]) -> T:
    """Call until it succeeds, for OPEN_SECONDS. Then raise QueueBusy."""
    until = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            return call()
        except QueueBusy:
            if time.monotonic() > until:
                raise
        time.sleep(RETRY_PAUSE_SECONDS[0] * random.uniform(0.5, 1.5))  # noqa: S311 - others may also wait


@contextmanager
def reporting_damage(queue: PersistentQInterface) -> Iterator[None]:
    """Report a damaged database, whose values may have the wrong types, as a QueueError."""
    try:
        yield
    except (TypeError, LookupError, ArithmeticError) as error:
        if damage := queue.check()["problems"]:
            raise QueueError(f"cannot read the database: {'; '.join(damage)}") from error
        raise


# Arguments ############################################################################################################


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one line and exits with 2. Of its description, it shows the first paragraph."""

    def __init__(self, *, description: str | None, **options: Any) -> None:
        super().__init__(description=(description or "").partition("\n\n")[0], **options)
        self._negative_number_matcher = re.compile(r"-\.?[0-9]")  # as in Python 3.14: -5m is a value, not an option

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file or sys.stderr)  # argparse would ignore an error

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: {printable(message)}; see {self.prog} --help\n")


class BadArgument(argparse.ArgumentTypeError, ValueError):
    """An invalid argument. argparse shows the message of an ArgumentTypeError, but not of a ValueError."""


def whole_number(least: int, most: int = MAX_ID) -> Callable[[str], int]:
    """Return a function that parses a whole number within these bounds, or raises BadArgument."""

    def parse(text: str) -> int:
        if re.fullmatch(r"-?0{0,100}[0-9]{1,19}", text) and least <= int(text) <= most:
            return int(text)
        is_large = re.fullmatch("[0-9]+", text) and (len(text.lstrip("0")) > 19 or int(text) > most)
        bounds = f"from {least} to {most}" if is_large or least < 0 or most < MAX_NUMBER else f"of at least {least}"
        raise BadArgument(f"expected a whole number {bounds}, got {text[:40]!r}")

    return parse


def id_list(text: str) -> list[int]:
    """Parse ids of jobs that are separated by commas. Raises BadArgument."""
    return [whole_number(0)(part) for part in text.split(",")]


def seconds(least: float) -> Callable[[str], float]:
    """Return a function that parses a number of seconds of at least this, or raises BadArgument."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= float(text) <= MAX_SECONDS:
                return float(text)
        raise BadArgument(f"expected a number of seconds from {least:g} to {MAX_SECONDS:g}, got {short(text)}")

    return parse


def not_blank(text: str) -> str:
    """Return the text. Raises BadArgument for a blank text, such as that of an unset shell variable."""
    if text.strip():
        return text
    raise BadArgument(f"expected a text that is not blank, got {text!r}")


def folder(text: str) -> Path:
    not_blank(text)
    if os.path.isdir(text) or not os.path.exists(text):  # unlike the methods of Path, these accept any string
        return Path(text)
    raise BadArgument(f"expected a folder, got {short(text)}")


def module_name(text: str) -> str:
    if all(part.isidentifier() for part in text.split(".")) and not text.endswith(".py"):
        return text
    raise BadArgument(f"expected a module name such as tasks, without a folder and .py, got {short(text)}")
