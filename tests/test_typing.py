"""mypy checks a user's program against the queue's signatures."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """\
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
found, before_id = queue.search_jobs(Filters(text="ada"), seconds=0.5)
number: int = queue.count_jobs(task="greet", created_from=1.0)
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
    assert text.startswith(f'error: Unexpected keyword argument "{MISSPELLED[option]}" for ')
