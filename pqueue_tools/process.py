"""What every program needs: its log, its signals, its parser, and whether its parent is there."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from contextlib import suppress
from datetime import datetime, timezone
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from pqueue import QueueError
from pqueue_tools import endings
from pqueue_tools.masking import masked_text

RETRY_PAUSE_SECONDS = (0.1, 5.0)  # first and longest pause while the database is locked or full

PARENT = os.getppid()

Answer = TypeVar("Answer")


def is_orphaned() -> bool:
    """Tell whether the Supervisor that started this program is gone: the next one will start another in its place."""
    return "SUPERVISOR_ENABLED" in os.environ and (os.getppid() != PARENT or _was_adopted())


@lru_cache
def _was_adopted() -> bool:
    """Tell whether the Supervisor was gone before this program could note who it was: then init is its parent."""
    with suppress(OSError):
        return PARENT == 1 and b"supervisord" not in Path("/proc/1/cmdline").read_bytes()
    return False


def expect_posix() -> None:
    """Raise QueueError on Windows, which lacks the signals, locks and folder descriptors that the programs need."""
    if not hasattr(os, "O_DIRECTORY"):
        raise QueueError(f"cannot run on {sys.platform}: this needs Linux or macOS; the library, pqueue.py, works here")


def log(event: str, **fields: Any) -> None:
    """Write one line: time in UTC, event, key=value; a value with a space or a quote is quoted."""
    print_line(log_line(utc_now(), event, fields))


def print_line(text: str) -> None:
    """Print, and go on working when nobody reads it any more, or the disk that the log is on is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def escape_unprintable() -> None:
    """Let a terminal or a log file show escapes for the characters that its encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")


def log_line(at: str, event: str, fields: dict[str, Any]) -> str:
    return " ".join([at, event, *(f"{key}={quoted(value)}" for key, value in fields.items())])


def quoted(value: Any) -> str:
    text = masked_text(str(value))
    plain = text and text.isprintable() and not any(mark in text for mark in ' "=')
    return text if plain else '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"'


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def on_end(handler: Any) -> None:
    """Call it upon TERM, INT and HUP, except for a HUP that nohup has the program ignore."""
    for number in endings.ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN or number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: {message}; see {self.prog} --help\n")


def positive(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")


def folder(text: str) -> Path:
    if os.path.isdir(text) or not os.path.exists(text):  # unlike Path's, they bear any text
        return Path(text)
    raise argparse.ArgumentTypeError(f"expected a folder, got {text!r}")


def seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
