"""What the README says, run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PROGRAM, TASKS, ENQUEUE, OPERATE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run_code(place, code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=place.folder,
        env=place.environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_program_does_what_it_says(place):
    lines = run_code(place, PROGRAM).splitlines()
    assert lines[:2] == ["hello Grace - attempt 1", "hello Ada - attempt 1"]
    assert "'scheduled': 1, 'pending': 0, 'processing': 0, 'completed': 2" in lines[2]


def test_example_tasks_run_in_the_consumer(place):
    place.write("my_tasks.py", TASKS)
    place.write("order-7.log", "ink\n" * 100)
    run_code(place, ENQUEUE)
    done = place.run("consumer.py", "--import", "my_tasks", "--drain")
    assert done.returncode == 0, done.stderr
    queue = place.queue()
    assert {job.task: job.state for job in queue.list_jobs()} == {"book_order": "completed", "compress": "completed"}
    assert queue.list_jobs(task="book_order")[0].result == "booked"
    assert queue._read("SELECT * FROM orders", {}) == [(7, "ink")]
    assert (place.folder / "order-7.log.gz").exists()
    assert "lost" not in done.stdout


def test_operating_example_runs(place):
    assert run_code(place, OPERATE).splitlines()[-1] == "[]"


def test_system_runs_without_anything_installed(place):
    commands = re.findall(r"^python3 (producer|consumer)(\.py .*)$", README, re.MULTILINE)[:2]
    for name, rest in commands:
        done = place.run(*shlex.split(name + rest))
        assert done.returncode == 0, done.stderr
    assert place.queue().stats()["states"]["completed"] == 5


@pytest.mark.parametrize("program", ["producer", "consumer"])
def test_every_option_is_in_the_readme(place, program):
    options = set(re.findall(r"--[a-z-]+", place.run(f"{program}.py", "--help").stdout)) - {"--help"}
    assert options == set(re.findall(rf"`{program}\.py (--[a-z-]+)`", README))


def test_diagram_is_the_modules():
    diagram = re.search(r"```\n( +enqueue  .*?)```", README, re.DOTALL)[1]
    assert diagram in (ROOT / "pqueue.py").read_text()
