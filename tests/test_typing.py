"""mypy and pyright check a user's program against the signatures of the queue and its tasks."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """\
from datetime import datetime, timedelta, timezone
from typing import Any

from pqueue import Filters, Job, JobId, LeaseLost, PersistentQSQLAlchemy, PersistentQSQLite, open_queue, task


@task(max_attempts=5)
def greet(job: Job) -> str:
    return f"hello {job.payload}"


queue = open_queue("queue.db", durability="normal")
first: int = queue.enqueue(greet, {"name": "Ada"}, priority=5, delay_seconds=1.5, key="ada")
rest: list[JobId[Any]] = queue.enqueue_many("greet", [1, 2], queue="greetings")
job: Job | None = queue.dequeue("worker", queues=["greetings"], lease_seconds=30)
jobs: list[Job] = queue.dequeue_many("worker", 10, prefetch=True)
taken, lost = queue.complete_and_dequeue([(job, "done") for job in jobs], "worker", now=1.0)
failed: list[Job] = queue.list_jobs(state="failed", limit=10)
found, before_id = queue.search_jobs(Filters(text="ada", group="a"), seconds=0.5)
number: int = queue.count_jobs(task="greet", created_from=1.0)
queue.change(first, payload=[1], run_at=datetime.now(timezone.utc), by="ann")
queue.enqueue("greet", key_seconds=timedelta(hours=1))
queue.enqueue("greet", expire_seconds=timedelta(hours=1))
queue.keep("default", completed="7d", failed=timedelta(days=30), cancelled=None)
queue.resubmit(first, delay_seconds=timedelta(minutes=5))
resubmitted: int = queue.resubmit_where(ids=rest, rate=(10, 1.0))
cancelled: int = queue.cancel_where(consumer="worker", ids=rest)
payloads = list(queue.unfinished_payloads())
queue.close()
"""
MISSPELLED = {
    "durability": "durable",
    "max_attempts": "attempts",
    "priority": "prio",
    "queue": "queues",
    "lease_seconds": "lease",
    "prefetch": "pre_fetch",
    "now": "at",
    "state": "status",
    "text": "words",
    "seconds": "timeout",
    "created_from": "created_after",
    "run_at": "at_time",
    "key_seconds": "key_for",
    "consumer": "worker",
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Return a function that checks a program and returns the lines and texts of its errors; one cache for all."""
    folder = tmp_path_factory.mktemp("typing")

    def check(program: str) -> list[tuple[int, str]]:
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary", "-c", program],
            cwd=folder,
            env={"MYPYPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        found = [line.split(":", 2) for line in done.stdout.splitlines() if ": note: " not in line]
        assert all(file == "<string>" for file, _, _ in found), done.stdout
        return [(int(line), text.strip()) for _, line, text in found]

    return check


def test_program_with_sound_options_passes_strict_checks(errors):
    assert errors(PROGRAM) == []


@pytest.mark.parametrize("option", MISSPELLED)
def test_program_with_a_misspelled_option_gets_one_error_that_names_it(errors, option):
    (right,) = re.finditer(rf"\b{option}=", PROGRAM)
    program = f"{PROGRAM[: right.start()]}{MISSPELLED[option]}={PROGRAM[right.end() :]}"
    (line, text), *others = errors(program)
    assert line == PROGRAM[: right.start()].count("\n") + 1
    assert [each for _, each in others if not each.startswith("error: Untyped decorator makes ")] == []
    said = "Extra key" if option == "text" else "Unexpected keyword argument"  # of the TypedDict Filters
    assert text.startswith(f'error: {said} "{MISSPELLED[option]}" for ')


# Calls of tasks: each line that is wrong says so.
CALLS = """\
from collections.abc import Sequence
from datetime import date
from typing import Any

from pqueue import Job, JobId, open_queue, task


@task
def resize(path: str, width: int = 200) -> dict[str, int]:
    return {"width": width}


@task(max_attempts=5)
def report(job: Job, day: date, *, full: bool = False) -> str:
    return f"{job.id} {day} {full}"


@task
async def fetch(url: str, headers: dict[str, Any]) -> bytes:
    return url.encode()


@task()
async def follow(job: Job, url: str) -> int:
    return len(url)


@task
def old(job: Job) -> dict[str, Any]:
    return {"payload": job.payload}


@task
def anything(data: Any) -> None: ...


async def call(job: Job) -> int:
    text: bytes = await fetch("x", {})
    return len(text) + await follow(job, "x")


queue = open_queue()
size: JobId[dict[str, int]] = resize.enqueue("a.png", width=3)
size = resize.using(queue="images", priority=5, key="a").on(queue).enqueue(path="a.png")
sizes: Sequence[JobId[dict[str, int]]] = resize.enqueue_many([("a.png",), {"path": "b.png"}])
text: JobId[str] = report.enqueue(date.today(), full=True)
numbers: list[JobId[int]] = follow.enqueue_many([("x",)], keys=["x"])
data: JobId[bytes] = fetch.enqueue("x", {})
number: JobId[int] = follow.enqueue("x")
old.enqueue()
anything.enqueue(5)
anything.enqueue(data=5)
width: int = resize("a.png")["width"]
width = resize.enqueue("a.png").result(timeout_seconds=1)["width"]
follow.enqueue("x").result().bit_length()
queue.enqueue(resize, {"path": "a.png"})
plain: int = resize.enqueue("a.png")
resize.enqueue(5)  # wrong
resize.enqueue("a.png", widht=5)  # wrong
resize.enqueue()  # wrong
text = resize.enqueue("a.png")  # wrong
text = resize.using(priority=5).enqueue("a.png")  # wrong
name: str = resize.enqueue("a.png").result()  # wrong
name = follow.enqueue("x").result()  # wrong
resize.using(prioritty=5)  # wrong
resize(5)  # wrong
report.enqueue("today")  # wrong
text = follow.enqueue("x")  # wrong
follow.enqueue(5)  # wrong
fetch.using(priority=1).on(queue).enqueue(5, {})  # wrong
old.enqueue("x")  # wrong, which mypy does not see: it cannot choose an overload for a function of a Job and of Any
resize.on("queue.db")  # wrong
resize.using(on_conflict="replace", key_until="started", after_failed="run").enqueue("a.png")
resize.using(on_conflict="keeps")  # wrong
queue.enqueue(resize, key="a", key_until="begun")  # wrong
queue.enqueue_many(resize, [], after_failed="ignore")  # wrong
queue.schedule("s", resize, cron="@daily", on_missed="all")
queue.schedule("s", resize, cron="@daily", on_missed="none")  # wrong
open_queue("queue.db", durability="none")  # wrong


@task(cron="@daily", on_missed="skip")
def nightly() -> None: ...


@task(cron="@daily", on_missed="never")  # wrong
def weekly() -> None: ...
"""


def wrong_lines(mark):
    return [number for number, line in enumerate(CALLS.splitlines(), 1) if re.search(mark, line)]


def test_mypy_finds_each_wrong_call_of_a_task_and_no_other(errors):
    assert sorted({line for line, _ in errors(CALLS)}) == wrong_lines("# wrong$")


def test_pyright_finds_each_wrong_call_of_a_task_and_no_other(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    settings = {"extraPaths": [str(ROOT)], "typeCheckingMode": "strict", "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson"]  # pyright with the Node.js that it needs
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert sorted({each["range"]["start"]["line"] + 1 for each in found}) == wrong_lines("# wrong"), done.stdout
