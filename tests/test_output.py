"""The tables, columns and live screen of the command line."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import tty
import unicodedata

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import admin
import pqueue
from pqueue_tools import monitor, output, report

LONG = "requests.exceptions.ConnectionError: " + "HTTPSConnectionPool(host='api.example.com', port=443)" * 4
NAMES = [*output.DROPPED, "id", "state", "task", "error", "last_seen_at", "uptime_seconds"]

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a machine that is busy


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PQUEUE_URL", raising=False)
    with pqueue.open_queue() as queue:
        yield queue


@pytest.fixture
def lines(capsys):
    """Run the program in this process and return the lines it prints."""

    def run(*arguments):
        capsys.readouterr()
        assert admin.main(list(map(str, arguments))) == 0
        return capsys.readouterr().out.splitlines()

    return run


def cells(text):
    """As many terminals count."""
    return sum(
        0 if unicodedata.combining(mark) else 2 if unicodedata.east_asian_width(mark) in "WF" else 1 for mark in text
    )


VALUE = st.one_of(st.none(), st.integers(-(10**12), 10**12), st.text(max_size=60), st.booleans())
VALUES = {"by_hour": st.lists(st.integers(0, 10**9), min_size=24, max_size=24)}
VALUES["rate"] = st.none() | st.tuples(st.integers(1, 10**6), st.floats(0.001, 1e6))


@UNTIMED
@given(st.data(), st.integers(30, 200))
def test_table_is_never_wider_than_the_terminal(data, width):
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=7, unique=True))
    values = {name: st.floats(0, 1e9) if name.endswith(("_at", "_seconds")) else VALUE for name in names} | VALUES
    rows = [{name: data.draw(values[name]) for name in names} for _ in range(data.draw(st.integers(1, 4)))]
    shown = output.table(rows, width, now=1e9).split("\n")
    assert len(shown) == len(rows) + 1
    assert max(map(output.cells, shown)) <= width


def test_table_of_many_columns_fits_and_keeps_the_first_and_the_last():
    row = {"id": 7, **{f"column_{number}": "x" * 20 for number in range(30)}, "history": "y" * 20}
    for width in (30, 40, 80, 120):
        head, line = output.table([row], width).split("\n")
        assert max(cells(head), cells(line)) <= width
        assert head.startswith("id") and len(head.split()[-1]) >= output.READABLE_CELLS


def test_narrow_terminal_drops_columns_and_keeps_the_message():
    row = {"id": 7, "state": "failed", "queue": "newsletter", "task": "send", "attempts": 1, "consumer": "consumer_00"}
    rows = [{**row, "created_at": 0.0, "detail": LONG}]
    for width in (200, 100, 80, 60, 40):
        head, line = output.table(rows, width, now=100.0).split("\n")
        assert cells(line) <= width
        assert head.startswith("id")
        assert LONG[: output.LAST_COLUMN_CELLS - 1] in line or width == 40
    assert "queue" in output.table(rows, 80, now=100.0)
    assert "consumer" not in output.table(rows, 80, now=100.0)
    assert LONG in output.table(rows, sys.maxsize, now=100.0)
    for name in ("t" * 74, "値" * 40):  # a long name makes no other column disappear
        shown = output.table([{**rows[0], "task": name}], 120, now=100.0)
        assert {"state", "queue", "task"} < set(shown.split()[:8])
        assert LONG[: output.LAST_COLUMN_CELLS - 1] in shown


@pytest.mark.parametrize("width", [30, 40, 60])
def test_narrow_table_of_queues_shows_their_names(queue, width):
    queue.enqueue("send", queue="newsletter")
    rows = [{"queue": name, **each} for name, each in queue.stats()["queues"].items()]
    head, line = output.table(rows, width).split("\n")
    assert head.split()[:2] == ["queue", "pending"]
    assert line.split()[:2] == ["newsletter", "1"]


def test_narrow_table_of_tasks_shows_the_attempts_that_its_share_of_failures_counts(queue):
    for _ in range(2):
        queue.enqueue("send_newsletter", queue="newsletter")
        queue.fail(queue.dequeue("c"), "ConnectionError")
    rows = report.outcome_rows(queue, None, "task")
    head, line = output.table(rows, 80).split("\n")
    assert {"failed", "retried", "failed_share", "p95"} < set(head.split())
    assert line.split()[3:6] == ["0", "2", "100.0%"]


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("abc", 3),
        ("日本", 4),
        ("é", 1),
        ("e\u0301", 1),
        ("😀", 2),
        ("한", 2),
        ("\u1112\u1161\u11ab", 2),
        ("ｗ", 2),
        ("ก็", 1),
        ("…", 1),
    ],
)
def test_wide_characters_take_two_cells_and_combining_ones_none(text, width):
    assert output.cells(text) == width
    rows = [{"task": text * 5, "error": "x"}, {"task": "y" * 20, "error": "x"}]
    first, second = output.table(rows, 80).split("\n")[1:]
    assert output.cells(first) == output.cells(second)
    assert output.cells(output.fitted(text * 9, 7)) <= 7


def test_program_gets_a_header_and_the_columns_it_asks_for(queue, lines):
    queue.enqueue("work", {"n": 1})
    head, line = lines("list-jobs")
    assert head.split("\t") == ["id", "state", "queue", "task", "attempts", "consumer", "created_at", "detail"]
    assert len(line.split("\t")) == 8
    assert lines("list-jobs", "--columns", "task, payload,max_attempts") == [
        "task\tpayload\tmax_attempts",
        'work\t{"n": 1}\t',
    ]
    assert json.loads(*lines("list-jobs", "-o", "json", "--columns", "id,state")) == {"id": 1, "state": "pending"}
    assert lines("stats", "-o", "table")[1].split()[:3] == ["default", "0", "1"]
    assert lines("show", "1", "-o", "tsv", "--columns", "id,why")[0] == "id\twhy"


def test_operator_who_asks_for_an_unknown_column_is_told_the_known_ones(queue, capsys):
    queue.enqueue("work")
    assert admin.main(["list-jobs", "--columns", "id,nosuch"]) == 2
    said = capsys.readouterr().err
    assert "--columns: expected names among id, queue, " in said
    assert " key, key_until, key_expires_at, " in said
    assert admin.main(["list-jobs", "-o", "xml"]) == 2
    assert "expected one of table, wide, tsv, json, got 'xml'" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["json", "tsv", "wide"])
def test_program_gets_whole_errors_payloads_and_lists(queue, lines, form):
    payload = {"text": "long " * 2000}
    for _ in range(8):
        queue.enqueue("work", payload)
    for job in queue.dequeue_many("anna", 8)[:1]:
        queue.fail(job, LONG + "\nTraceback", retry=False)
    assert LONG.rstrip() in "".join(lines("failedjobs", "-o", form))
    assert LONG.rstrip() in "".join(lines("failedjobs", "--all", "-o", form))
    assert payload["text"] in "".join(lines("list-jobs", "-o", form))
    shown = "".join(lines("consumers", "-o", form))
    assert all(str(job_id) in shown for job_id in range(2, 9))


# The live screen


def test_monitor_begins_with_the_verdict_and_fits_80_columns(queue):
    for number in range(9):
        queue.mark_failed(queue.enqueue("日本" * 9, {"n": number}, queue=f"queue-{number}" * 3), LONG)
    queue.enqueue("waits", now=time.time() - 7200)
    seen = monitor.snapshot()
    lines = monitor.screen(seen, 80)
    assert max(map(cells, lines)) <= 80
    assert lines[0].startswith("1 problem   ")
    assert lines[1].startswith("critical: 1 job pending and no consumer is alive; the oldest has waited for 2 h")
    assert next(n for n, line in enumerate(lines) if "last failures" in line) < 24 - monitor.FAILURES_SHOWN
    pending = monitor.screen(seen, 80, order="pending")
    names = [line.split()[0] for line in pending if line.startswith(("queue-", "default"))]
    assert names[0] == "default"


@pytest.mark.parametrize("width", [40, 50, 80, 200])
def test_monitor_cuts_no_sentence_number_or_heading(queue, width):
    """On narrow terminals and with wide characters, what does not fit is wrapped or left out."""
    names = ["送信メール処理タスク", "משימה_דחופה", "🎉party", "cafe\u0301", "\u1112\u1161\u11ab" * 9, "send_mail"]
    for number, name in enumerate(names):
        queue.enqueue_many(name, range(1001 + number), queue=name, now=time.time() - 7200)
        queue.mark_failed(queue.enqueue(name, queue=name), f"ValueError: {name} 接続が拒否されました " * 3)
        queue.dequeue(f"consumer_{name}", queues=[name])
    queue.pause(names[0])
    seen = monitor.snapshot()
    lines = monitor.screen(seen, width)
    assert max(map(output.cells, lines)) <= width
    title = next(number for number, line in enumerate(lines) if line.startswith("last failures"))
    top = " ".join(line.strip() for line in lines[: title - 1])
    assert "…" not in top
    assert lines[0].startswith(f"5 problems   {time.strftime('%Y-')}")
    for finding in seen["findings"]:
        assert str(finding).replace(" ", "") in top.replace(" ", "")
    queues = lines[next(number for number, line in enumerate(lines) if line.startswith("queues ─")) + 1 :][:7]
    assert "…" not in queues[0]
    assert {"queue", "pending", "failed", "oldest"} <= {*queues[0].split()}
    assert all(re.search(r" 1,00\d .* 2 h ago$", line) for line in queues[1:]), queues
    assert len({output.cells(line[: line.index(" 1,00")]) for line in queues[1:]}) == 1


def test_keys_of_the_monitor_are_named_whole_or_not_at_all(queue):
    for width in range(6, 90):
        shown = monitor.fitting(monitor._help("name", 0, 11, 42), width)
        assert output.cells(shown) <= width
        assert shown.split("   ") == monitor._help("name", 0, 11, 42)[: len(shown.split("   "))]
    assert "lines 1 to 11 of 42" in monitor.fitting(monitor._help("name", 0, 11, 42), 40)


@UNTIMED
@given(st.text(st.characters(exclude_categories=("Cs", "Cc", "Cf"))), st.integers(10, 60))
def test_wrapped_text_is_whole_and_fits(text, width):
    lines = output.wrapped(text, width)
    assert max(map(output.cells, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_monitor_shows_the_jobs_that_failed_last(queue):
    early, late = queue.enqueue("t"), queue.enqueue("t")
    queue.mark_failed(late, "first", now=time.time() - 60)
    queue.mark_failed(early, "last")
    seen = monitor.snapshot()
    assert [row["error"] for row in seen["failed"]] == ["last", "first"]


class Terminal:
    """The program on a terminal of this size, with a keyboard."""

    def __init__(self, lines, columns):
        self.leader, follower = pty.openpty()
        self.resize(lines, columns)
        self.before = termios.tcgetattr(follower)
        variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.child = subprocess.Popen(
            [sys.executable, str(ROOT / "admin.py"), "monitor", "--interval", "1d"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**variables, "TERM": "xterm"},
        )
        self.follower = follower
        self.chunks = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while self.child.poll() is None or self.chunks[-1:] != [b""]:
            try:
                self.chunks.append(os.read(self.leader, 65536))
            except OSError:
                return

    def resize(self, lines, columns):
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys):
        os.write(self.leader, keys)

    def screens(self):
        return b"".join(self.chunks).decode(errors="replace").split("\x1b[H")[1:]

    def last(self):
        """Return the lines of the last complete screen."""
        whole = [each for each in self.screens() if each.rstrip().endswith("\x1b[0m")]
        return whole[-1].replace("\x1b[2K", "").split("\r\n") if whole else []

    def close(self):
        self.child.kill()
        self.child.wait()
        os.close(self.follower)
        self.reader.join(PATIENCE_SECONDS)
        os.close(self.leader)


@pytest.fixture
def terminal(queue):
    for number in range(30):
        queue.enqueue_many("t", range(number), queue=f"q{number:02}")
    terminal = Terminal(24, 80)
    yield terminal
    terminal.close()


def test_monitor_scrolls_sorts_and_ends_with_q(terminal):
    wait_until(lambda: len(terminal.last()) == 24)
    assert "problem" in terminal.last()[0]
    assert "lines 1 to 23 of" in terminal.last()[-1]
    terminal.press(b"\x1b[B\x1b[B")
    wait_until(lambda: "lines 3 to 25 of" in terminal.last()[-1])
    terminal.press(b"\x1b[6~")
    wait_until(lambda: re.search(r"lines \d+ to (\d+) of \1", terminal.last()[-1]))
    terminal.press(b"\x1b[A")
    wait_until(lambda: not re.search(r"lines \d+ to (\d+) of \1", terminal.last()[-1]))
    terminal.press(b"\x1b[5~\x1b[5~s")
    wait_until(lambda: "sort by pending" in terminal.last()[-1])
    queues = [line.split()[0] for line in terminal.last() if line.startswith("q") and line[1].isdigit()]
    assert queues[0] == "q29"
    terminal.press(b"q")
    assert terminal.child.wait(PATIENCE_SECONDS) == 0
    wait_until(lambda: terminal.screens()[-1].endswith("\x1b[?1049l"))
    assert termios.tcgetattr(terminal.follower) == terminal.before


@pytest.mark.parametrize("step", [f"{tty.__name__}.setcbreak", "signal.signal"])
def test_monitor_that_is_ended_as_it_prepares_its_terminal_restores_it(queue, monkeypatch, step):
    leader, follower = pty.openpty()
    before, handler = termios.tcgetattr(follower), signal.getsignal(signal.SIGWINCH)
    module, name = step.split(".")
    do = getattr(sys.modules[module], name)

    def do_and_end(*given):
        do(*given)
        monkeypatch.setattr(step, do)
        raise SystemExit

    with os.fdopen(follower, "r") as keyboard, os.fdopen(leader, "rb"):
        monkeypatch.setattr(sys, "stdin", keyboard)
        monkeypatch.setattr(step, do_and_end)
        with pytest.raises(SystemExit):
            monitor.run(60)
        assert (termios.tcgetattr(keyboard), signal.getsignal(signal.SIGWINCH)) == (before, handler)


def test_monitor_draws_again_when_its_size_changes(terminal):
    wait_until(lambda: len(terminal.last()) == 24)
    terminal.resize(10, 40)
    terminal.child.send_signal(28)  # SIGWINCH: this terminal has no session that it would be sent to
    wait_until(lambda: len(terminal.last()) == 10)
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in terminal.last()]
    assert [line for line in plain if cells(line) > 40] == []
