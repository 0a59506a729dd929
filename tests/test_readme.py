"""What the README says, run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, Place

import admin

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


def test_admin_commands_run_alike_with_and_without_typer(tmp_path):
    commands = re.findall(r"^python3 (admin\.py .*?)(?:  +#.*)?$", README, re.MULTILINE)
    outputs = []
    for front in ("with", "without"):
        place = Place(tmp_path / front)
        place.write("blocked/typer.py", "raise ImportError" if front == "without" else "")
        path = {"PYTHONPATH": str(place.folder / "blocked")} if front == "without" else {}
        assert place.run("producer.py", "--count", 2, "--interval", 0).returncode == 0
        told = {}
        for command in commands:
            done = place.run(*shlex.split(command), **path)
            assert done.returncode == (command == "admin.py doctor"), (command, done.stdout, done.stderr)
            assert "Traceback" not in done.stderr
            told[command] = re.sub(r"[0-9][0-9a-f:.,T_-]*Z?|with(out)?/", "#", done.stdout)
        outputs.append(told)
        place.close()
    assert {command.split()[1] for command in commands} == set(admin.COMMANDS)
    for command in commands:
        assert outputs[0][command].splitlines() == outputs[1][command].splitlines()


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
