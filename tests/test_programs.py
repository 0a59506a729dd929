"""The programs of docs/tasks.md that schedule, depend, limit, keep and report do what they say."""

from __future__ import annotations

import sys
import threading
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType
from unittest.mock import patch
from zoneinfo import ZoneInfo

import pytest
from test_readme import programs as blocks

import pqueue
from pqueue_tools import testing, webhook
from pqueue_tools.worker import Consumer

BERLIN = ZoneInfo("Europe/Berlin")
TASKS = ("add", "total", "report")  # of programs.py, which these programs use


def code_with(text: str) -> str:
    (block,) = (block for block in blocks() if block.language == "python" and text in block.code)
    return block.code


FAN_OUT, WEBHOOK, KEEP = 'after_failed="run"', '"webhook"', "keep("
RATE, RUNNING = "rate=(", "running=2"  # the latter also lets customers take turns


@pytest.fixture
def queue(monkeypatch):
    """The default queue, and what programs open."""
    with patch.dict(pqueue.TASKS, clear=True), testing.temporary_queue() as queue:
        monkeypatch.setattr(pqueue, "open_queue", lambda: queue)
        yield queue


@pytest.fixture
def programs(queue, monkeypatch):
    """The module programs.py, one of whose sums fails."""
    code = code_with("def add(").replace(
        "return a + b", "if a == 13:\n        raise DoNotRetry('13')\n    return a + b"
    )
    module = ModuleType("programs")
    exec(code, module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "programs", module)
    return module


def run(code: str) -> None:
    exec(code, {"__name__": "__main__"})  # noqa: S102


def berlin(*at: int) -> float:
    return datetime(*at, tzinfo=BERLIN).timestamp()


def test_programs_have_at_most_45_lines():
    codes = [code_with(text) for text in (FAN_OUT, WEBHOOK, KEEP, RATE, RUNNING)]
    parts = code_with("def add(").split("\n\n\n")
    codes += [part for part in parts if any(f"def {name}(" in part for name in TASKS)]
    lines = [line for code in codes for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(lines) <= 45


def test_report_runs_once_on_weekdays_and_once_for_times_that_were_missed(queue, programs):
    queue.declare_schedules(pqueue.TASKS.values(), now=berlin(2026, 3, 26, 12))  # a Thursday

    def times_at(*at):
        """Return the times of the jobs that three consumers get."""
        now, found = berlin(*at), []
        for consumer in ("a", "b", "c", "a"):
            if job := queue.dequeue(consumer, now=now):
                queue.complete(job, now=now)
                found.append(datetime.fromtimestamp(job.run_at, BERLIN).strftime("%d %H:%M"))
        return found

    assert times_at(2026, 3, 27, 2, 29) == []
    assert times_at(2026, 3, 27, 2, 30) == ["27 02:30"]
    assert times_at(2026, 3, 29, 23) == []  # after a weekend in which clocks were set forward
    assert times_at(2026, 3, 30, 2, 30) == ["30 02:30"]
    assert times_at(2026, 4, 9, 18) == ["09 02:30"]  # all were down for days
    assert times_at(2026, 4, 9, 18) == []


def test_last_job_gets_the_results_of_all_that_have_not_failed(queue, programs, capsys):
    consumer = Consumer(queue, "embedded")
    thread = threading.Thread(target=consumer.run)
    thread.start()
    try:
        run(code_with(FAN_OUT))
    finally:
        consumer.stop()
        thread.join()
    assert str(sum(range(1, 101)) - 14) in capsys.readouterr().out.splitlines()
    assert queue.stats()["states"]["failed"] == 1


def test_consumers_call_an_api_ten_times_a_second(queue, programs):
    run(code_with(RATE))
    now = queue.list_jobs(limit=1)[0].created_at

    def begun(seconds):
        return sum(len(queue.dequeue_many(name, 9, now=now + seconds)) for name in ("a", "b", "c"))

    assert [begun(seconds) for seconds in (0.1, 0.5, 1.05, 1.15, 2.2)] == [10, 0, 0, 10, 0]


def test_two_jobs_of_each_customer_run_at_a_time_in_turns(queue, programs):
    run(code_with(RUNNING).rpartition("print(")[0])
    running, order = [], []
    while jobs := [job for name in ("a", "b", "c") if (job := queue.dequeue(name))]:
        running += jobs
        order += [job.group for job in jobs]
        assert max(sum(job.group == group for job in running) for group in ("Ada", "Grace")) <= 2
        if len(running) == 4:
            assert queue.dequeue("d") is None
        queue.complete(running.pop(0))
    assert order[:4] == ["Ada", "Grace", "Ada", "Grace"]  # although all jobs of Ada came first
    assert sorted(order) == ["Ada"] * 9 + ["Grace"] * 9


def test_results_are_kept_for_an_hour_and_failed_jobs_for_a_week(queue, programs):
    run(code_with(KEEP))
    now = queue.now()
    done, failed, _ = programs.add.on(queue).enqueue_many([(1, 2), (3, 4), (5, 6)])
    queue.complete(queue.dequeue("w", now=now), 3, now=now)
    queue.mark_failed(failed, now=now)
    left = {}
    for seconds in (3500, 3700, 7 * 86400 - 100, 7 * 86400 + 100):
        queue.prune_kept(now=now + seconds)
        left[seconds] = [job_id for job_id in (done, failed) if queue.count_jobs(ids=[job_id])]
    assert list(left.values()) == [[done, failed], [failed], [failed], []]


def test_webhook_reports_a_job_whose_consumer_was_killed(queue, monkeypatch):
    received = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            """Print nothing."""

    monkeypatch.setitem(pqueue.TASKS, "webhook", webhook.webhook)
    run(code_with(WEBHOOK))
    queue.enqueue("charge", queue="orders", max_attempts=1)
    queue.dequeue("killed", lease_seconds=1)
    with HTTPServer(("127.0.0.1", 0), Receiver) as server:
        monkeypatch.setenv("PQUEUE_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (job,) = testing.drain(queue, now=queue.now() + 10)
        server.shutdown()
    assert (job.state, len(received)) == ("completed", 1)
    assert b'"task": "charge"' in received[0]
    assert b"let its lease run out" in received[0]
