"""The live screen of the command line: findings first, then failures, queues, consumers and processes."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any

import pqueue
from pqueue import PersistentQInterface, QueueError
from pqueue_tools import report, supervisor
from pqueue_tools.masking import masked_job
from pqueue_tools.output import cells, colours, fitted, painted, table, wrapped
from pqueue_tools.process import reporting_damage
from pqueue_values import QueueNotFound

FAILURES_SHOWN = 5
FAILURES_SEARCHED = 100  # newest failed jobs, of which the last to fail are shown
EXCERPT_CHARS = 500
KEYS = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
SCROLL = {b"\x1b[A": -1, b"\x1bOA": -1, b"k": -1, b"\x1b[B": 1, b"\x1bOB": 1, b"j": 1}  # in lines
TURN = {b"\x1b[5~": -1, b"\x1b[6~": 1, b" ": 1}  # in screens
ORDERS: dict[str, Callable[[dict[str, Any]], Any]] = {  # of the queues and consumers
    "name": lambda row: row.get("queue") or row["name"],
    "pending": lambda row: -row.get("pending", len(row.get("jobs", ""))),
    "failed": lambda row: -row["failed"],
}


def snapshot() -> dict[str, Any]:
    """Return the contents of the screen. If the queue cannot be read, that is the only finding, without "stats"."""
    now = report.now_shown()
    seen: dict[str, Any] = {"at": now, "processes": supervisor.known_processes()}
    try:
        with pqueue.open_queue(create=False) as queue, reporting_damage(queue):
            report.follow_clock(queue)
            seen["at"] = now = report.now_shown()
            found = report.findings(queue, now, processes=seen["processes"])
            seen |= {"findings": found, "per_minute": report.per_minute(report.recent_minutes(queue, now))}
            seen |= {"stats": queue.stats(), "consumers": queue.consumers(), "failed": _failures(queue)}
    except (QueueError, ValueError) as error:
        what, _, remedy = str(error).partition(": ")
        seen["findings"] = [report.Finding("warning" if isinstance(error, QueueNotFound) else "critical", what, remedy)]
    return seen


def _failures(queue: PersistentQInterface) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"excerpt": EXCERPT_CHARS, "shown": masked_job}
    jobs = queue.list_jobs(state="failed", limit=FAILURES_SEARCHED, **options)
    last = sorted(jobs, key=lambda job: job.finished_at or 0, reverse=True)[:FAILURES_SHOWN]
    names = ("id", "queue", "task", "finished_at")
    return [{**{name: getattr(job, name) for name in names}, "error": report.first_line(job.error)} for job in last]


def screen(seen: dict[str, Any], width: int, *, order: str = "name", in_colour: bool = False) -> list[str]:
    """Return the lines of the screen, of at most this width. `order` is one of ORDERS."""

    def section(title: str, rows: list[dict[str, Any]]) -> list[str]:
        shown = table(rows, width, colours=in_colour, now=seen["at"]) or "none"
        return ["", f"{title + ' ':─<{min(width, 100)}}", *shown.split("\n")]

    lines = _verdict(seen, width, in_colour)
    if "stats" in seen:
        rates = ", ".join(f"{rate:,} {name}" for name, rate in seen["per_minute"].items())
        alive = [each for each in seen["consumers"] if each["state"] == "running" or each["job_ids"]]
        queues = [{"queue": name, **each} for name, each in seen["stats"]["queues"].items()]
        lines += wrapped(f"per minute: {rates}", width)
        lines += section("last failures", seen["failed"]) if seen["failed"] else []
        lines += section("queues", sorted(queues, key=ORDERS[order]))
        lines += section("consumers", sorted(map(report.consumer_row, alive), key=ORDERS[order]))
    if isinstance(seen["processes"], str):
        return [*lines, "", *wrapped(report.printable(seen["processes"]), width)]
    return lines + section("processes", [{k: v for k, v in p.items() if k != "group"} for p in seen["processes"]])


def _verdict(seen: dict[str, Any], width: int, in_colour: bool) -> list[str]:
    """Return what an operator must know first: the time, and what is wrong."""
    at = f"{datetime.fromtimestamp(seen['at']):%Y-%m-%d %H:%M:%S}"
    number = len(report.problems(seen["findings"]))
    head = report.count(number, "problem") if number else "no problems"
    lines = [fitting([head if "stats" in seen else "queue not available", at, "pqueue monitor"], width)]
    for line in report.verdict(seen["findings"]) if seen["findings"] else ():
        severity, *rest = re.split("(?=:)", "\n".join(wrapped(report.printable(line), width)), maxsplit=1)
        lines += "".join([painted(severity, severity) if in_colour else severity, *rest]).split("\n")
    return lines


def fitting(parts: list[str], width: int) -> str:
    """Return as many of the parts on one line as fit, and at least the first."""
    lines = ["   ".join(parts[:number]) for number in range(len(parts), 0, -1)]
    return next((line for line in lines if cells(line) <= width), fitted(parts[0], width))


def run(interval: float) -> None:
    """Show the screen until q is pressed, and draw it again after each interval, each key and a change of its size."""
    order, top, seen = "name", 0, snapshot()
    until = time.monotonic() + interval
    with _terminal() as wait:
        while True:
            size = shutil.get_terminal_size()
            lines = screen(seen, size.columns, order=order, in_colour=colours())
            most = max(1, size.lines - 1)
            top = max(0, min(top, len(lines) - most))
            _draw(lines[top : top + most], fitting(_help(order, top, most, len(lines)), size.columns), most)
            for key in KEYS.findall(wait(until - time.monotonic())):
                if key in (b"q", b"Q"):
                    return
                if key in (b"s", b"S"):
                    names = list(ORDERS)
                    order = names[(names.index(order) + 1) % len(names)]
                top += SCROLL.get(key, 0) + TURN.get(key, 0) * most
            if time.monotonic() >= until:
                seen, until = snapshot(), time.monotonic() + interval


def _help(order: str, top: int, most: int, total: int) -> list[str]:
    hidden = [] if total <= most else [f"lines {top + 1} to {min(total, top + most)} of {total}"]
    return ["q quit", *hidden, "↑ ↓ scroll", f"s sort by {order}"]


def _draw(lines: list[str], status: str, most: int) -> None:
    blank = [""] * (most - len(lines))
    text = "".join(f"\x1b[2K{line}\n" for line in [*lines, *blank])  # erased first: a full line leaves the cursor in it
    print(f"\x1b[H{text}\x1b[2K\x1b[7m{status}\x1b[0m", end="", flush=True)


@contextmanager
def _terminal() -> Iterator[Callable[[float], bytes]]:
    """Switch to the alternate screen, and to input without echo or lines; switch back at the end. Yield a function that
    waits up to this many seconds for keys or a change of size, and returns the keys."""
    with ExitStack() as undo:  # each before its step: a signal may end the program between the two
        resized, notify = os.pipe()
        undo.callback(os.close, resized)
        undo.callback(os.close, notify)
        keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
        if keyboard is not None:
            _deliver_keys_at_once(keyboard, undo)
        if hasattr(signal, "SIGWINCH"):
            os.set_blocking(notify, False)
            undo.callback(signal.signal, signal.SIGWINCH, signal.SIG_DFL)
            undo.callback(signal.set_wakeup_fd, -1)
            signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
            signal.signal(signal.SIGWINCH, lambda *_: None)
        show = partial(print, end="", flush=True)
        undo.callback(show, "\x1b[?7h\x1b[?25h\x1b[?1049l")
        show("\x1b[?1049h\x1b[?25l\x1b[?7l")  # alternate screen, no cursor, no wrapping

        def wait(seconds: float) -> bytes:
            inputs = [resized] + ([] if keyboard is None else [keyboard])
            ready, _, _ = select.select(inputs, [], [], max(0.0, seconds))
            if resized in ready:
                os.read(resized, 100)
            if keyboard not in ready:
                return b""
            return os.read(sys.stdin.fileno(), 100) or b"q"  # the terminal was closed

        yield wait


def _deliver_keys_at_once(keyboard: int, undo: ExitStack) -> None:
    """Deliver each key at once, and do not show it, where that is possible."""
    with suppress(ImportError):
        import termios
        import tty

        undo.callback(termios.tcsetattr, keyboard, termios.TCSADRAIN, termios.tcgetattr(keyboard))
        tty.setcbreak(keyboard)
