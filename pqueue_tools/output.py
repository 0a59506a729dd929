"""Output of the command line: tables that fit the terminal, tab-separated values, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from pqueue_tools.commands import OneOf, Parameter, UsageError
from pqueue_tools.process import not_blank
from pqueue_tools.report import cut, for_machines, for_people, is_time, json_text, now_shown, printable

FORMATS = ("table", "wide", "tsv", "json")
OPTIONS = (
    Parameter("--output", "table, wide (a table that is not cut), tsv or json", OneOf(*FORMATS), None, "FORMAT", "-o"),
    Parameter("--json", "short for -o json: one JSON object per line", flag=True),
    Parameter("--columns", "names of the columns, separated by commas", not_blank, metavar="NAMES"),
)
LAST_COLUMN_CELLS = 30  # of the last column, which holds the message; other columns are dropped for it
DROPPED = (
    *("first_at", "by_hour", "last_job_id", "skipped", "group", "host", "started_at", "max_running", "rate"),
    *("max_pending", "waiting", "attempts", "consumer", "pid", "cancelled", "queues", "created_at", "enqueued"),
    *("retried", "scheduled", "completed", "last_seen_at", "processing", "queue"),
)
NAME_CELLS = 12  # of the first column, if it is text
READABLE_CELLS = 5  # of any column
LEAST_CELLS = 3  # of a column that is cut because dropping others was not enough
JOINED = re.compile("[\u1160-\u11ff\ud7b0-\ud7ff]")  # vowels and finals of Hangul, shown within the first consonant
COLOURS = {
    **dict.fromkeys(("failed", "dead", "FATAL", "critical"), 31),
    **dict.fromkeys(("completed", "running", "RUNNING"), 32),
    **dict.fromkeys(("pending", "warning"), 33),
    **dict.fromkeys(("scheduled", "waiting"), 34),
    **dict.fromkeys(("stopped", "STOPPED", "info"), 90),
    "processing": 36,
    "cancelled": 35,
}


@dataclass
class CommandResult:
    """The result of a command: rows; the columns of a table, if not all; and a text for people, if a table does not
    suit."""

    rows: Iterable[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    code: int = 0
    columns: tuple[str, ...] = ()


def wants_rows(options: argparse.Namespace) -> bool:
    """Return whether the result is for a program, or was asked for as rows."""
    return bool(options.output or options.columns) or not sys.stdout.isatty()


def write(result: CommandResult, options: argparse.Namespace) -> None:
    """Print the result as the options ask, by default a table on a terminal and tab-separated values elsewhere."""
    chosen = options.output or ("table" if sys.stdout.isatty() else "tsv")
    asked = tuple(name.strip() for name in options.columns.split(",")) if options.columns else ()
    if result.text is not None and not (options.output or options.columns):
        print(
            "\n".join(_with_severity(printable(line)) for line in result.text.split("\n")), end="\n" * bool(result.text)
        )
    elif chosen == "json":
        for row in _chosen(result.rows, asked):
            print(_encodable(json_text({key: for_machines(key, value) for key, value in row.items()})))
    elif chosen == "tsv":
        for number, row in enumerate(_chosen(result.rows, asked or result.columns)):
            if number == 0:
                print("\t".join(row))
            print("\t".join(_field(key, value) for key, value in row.items()))
    else:
        rows = list(_chosen(result.rows, asked or result.columns))
        print(table(rows, sys.maxsize if chosen == "wide" else width(), colours=colours()) or "none")


def _chosen(rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> Iterable[dict[str, Any]]:
    for row in rows:
        if unknown := [name for name in columns if name not in row]:
            raise UsageError(f"--columns: expected names among {', '.join(row)}, got {cut(', '.join(unknown), 80)}")
        yield {name: row[name] for name in columns or row}


def _field(key: str, value: Any) -> str:
    shown = for_machines(key, value)
    if isinstance(shown, (dict, list, tuple, bool)):
        return _encodable(json_text(shown))
    return "" if shown is None else printable(str(shown))


def _encodable(text: str) -> str:
    """Return JSON in ASCII if the encoding of stdout cannot represent it."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return "".join(mark if mark.isascii() else json.dumps(mark)[1:-1] for mark in text)
    return text


def width() -> int:
    """Return the width of the terminal, or COLUMNS, or 80."""
    return shutil.get_terminal_size().columns


def colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _with_severity(line: str) -> str:
    severity, colon, rest = line.partition(":")
    return f"{painted(severity, severity)}{colon}{rest}" if colon and severity in COLOURS and colours() else line


def painted(text: str, name: str) -> str:
    """Return the text in the colour of a state or severity, if that has one."""
    return f"\x1b[{COLOURS[name]}m{text}\x1b[0m" if name in COLOURS else text


def agreed(options: argparse.Namespace, what: str) -> bool:
    """Ask for confirmation on the terminal. Without a terminal, require --yes."""
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError(f"expected --yes to {what} without a terminal")
    print(f"{what}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_progress(text: str) -> None:
    """Replace the last line of the terminal."""
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


# Cells of the terminal ################################################################################################


def cells(text: str) -> int:
    """Return how many cells of a terminal the text takes: wide characters take two, combining ones none."""
    return len(text) if text.isascii() else sum(map(_cells_of, text))


def _cells_of(mark: str) -> int:
    if unicodedata.category(mark) in ("Mn", "Me") or JOINED.match(mark):
        return 0
    return 2 if unicodedata.east_asian_width(mark) in ("W", "F") else 1


def fitted(text: str, most: int) -> str:
    """Return the text, cut with … if it takes more cells than `most`."""
    return text if cells(text) <= most else text[: _fitting(text, most - 1)] + "…"


def _fitting(text: str, most: int) -> int:
    """Return how many characters of the text fit into so many cells."""
    used = accumulate(map(_cells_of, text))
    return next((at for at, number in enumerate(used) if number > most), len(text))


def wrapped(text: str, most: int) -> list[str]:
    """Return the text in lines of at most this many cells, broken at spaces and, where a word is longer, within it."""
    lines: list[str] = []
    line, indent = "", "  "
    for word in text.split(" "):
        if line.strip() and cells(f"{line} {word}") > most:
            lines, line = [*lines, line], indent
        line += word if not line.strip() else f" {word}"
        while cells(line) > most > cells(indent) + 1:
            at = _fitting(line, most)
            lines, line = [*lines, line[:at]], indent + line[at:]
    return [*lines, line]


# Tables ###############################################################################################################


def table(rows: Sequence[dict[str, Any]], width: int, *, colours: bool = False, now: float | None = None) -> str:
    """Return an aligned table of at most this width, or "" without rows. What does not fit is left out: first columns,
    in the order of DROPPED and those before the last, then the ends of the longest cells."""
    if not rows:
        return ""
    now = now_shown() if now is None else now
    columns = {
        name: [
            re.sub("(_pending)?_(at|seconds)$", "", name),
            *(printable(for_people(name, row[name], now)) for row in rows),
        ]
        for name in rows[0]
    }
    whole = {name for name in columns if is_time(name) or all(isinstance(row[name], int | None) for row in rows)}
    widths = _widths({name: max(map(cells, column)) for name, column in columns.items()}, whole, width)
    numbers = {name for name in widths if name in whole and not is_time(name)}
    lines = []
    for number in range(len(rows) + 1):
        parts = [
            _cell(columns[name][number], most, name in numbers, colours and number > 0) for name, most in widths.items()
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _widths(wanted: dict[str, int], whole: set[str], width: int) -> dict[str, int]:
    """Return the width of each column that is shown. The first and the last column are always shown; `whole` are those
    of numbers and times, which are cut only if nothing else is left."""
    widths = dict(wanted)
    first, last = next(iter(widths)), next(reversed(widths))

    def least(text: int) -> int:
        """Return the width of the table with texts that are cut to so many cells."""
        most = {name: text for name in widths if name not in whole} | {first: NAME_CELLS}
        return sum(min(cells, most.get(name, cells)) for name, cells in widths.items()) + 2 * (len(widths) - 1)

    for name in (name for name in DROPPED if name in wanted and name not in (first, last)):
        if least(LAST_COLUMN_CELLS) <= width:
            break
        del widths[name]
    while len(widths) > 2 and least(READABLE_CELLS) > width:  # many columns of a few characters say nothing
        del widths[[*widths][-2]]
    while (excess := sum(widths.values()) + 2 * (len(widths) - 1) - width) > 0:
        texts = [name for name in widths if name not in whole and widths[name] > LEAST_CELLS] or list(widths)
        long = [name for name in texts if widths[name] > LAST_COLUMN_CELLS]
        others = [name for name in long if name != last] or long or texts  # the message is cut last
        longest = max(others, key=lambda name: widths[name])
        if widths[longest] <= LEAST_CELLS:
            break
        widths[longest] -= min(excess, max(1, widths[longest] - LAST_COLUMN_CELLS))
    return widths


def _cell(text: str, width: int, is_number: bool, in_colour: bool) -> str:
    shown = fitted(text, width)
    blank = " " * (width - cells(shown))
    shown = painted(shown, text) if in_colour else shown
    return blank + shown if is_number else shown + blank
