"""What tasks write to stdout and stderr shares no line with the log of their consumer."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until
from test_supervisor import started, system  # noqa: F401

import pqueue
from pqueue_tools import task_output
from pqueue_tools.record import FORWARDING, Record

TASKS = r"""
import ctypes, os, subprocess, sys
from pqueue import task

PARTS = [b"no end", b"\0", b"\xc3", b"\r\x1b[2J", b'{"event": "completed"', b"\xff" * 9000, b"a line\n", b"\n\n"]
PARTS.append(b"x" * 70000)

@task(max_attempts=1)
def write(job):
    for stream in (1, 2): os.write(stream, PARTS[job.payload % len(PARTS)])
    print("printed", job.id, end="")
    subprocess.run(["printf", "of a child"], check=True)
    if job.payload % 20 == 7: os._exit(3)

@task(max_attempts=1, timeout_seconds=0.5)
def flood(job):
    while True: os.write(1, b"y" * 60000)

@task(max_attempts=1)
def announce(job):
    for stream, name in (sys.stdout, "out"), (sys.stderr, "err"):
        stream.write("\n".join(["x" * 3000] * 15 + [f"{name} {job.id}\n"]))
    if job.payload % 10 == 9: raise ValueError

@task
def print_in_c(job): ctypes.CDLL(None).printf(b"of C code\n")

@task(max_attempts=1)
def ask(job): return [os.isatty(1), os.isatty(2)]
"""

JOBS = 40


@pytest.fixture
def tasks(place):
    place.write("my_tasks.py", TASKS)
    return place


def settled(lines):
    """Return the events and jobs of the lines that begin as one that says how a job ended."""
    found = [re.match(r"\d{4}-\S+Z (\w+) consumer=\S+ job=(\d+)", line) for line in lines]
    return {(each[1], each[2]) for each in found if each and each[1] in pqueue.FINISHED}


def run(tasks, form, concurrency=1):
    """Run jobs that write whatever they can; return the lines of stdout and stderr, which are one file."""
    queue = tasks.queue()
    queue.enqueue_many("write", range(JOBS))
    command = ("--import", "my_tasks", "--drain", "--log-format", form, "--concurrency", concurrency)
    child = tasks.start("consumer.py", *command)
    assert child.wait(PATIENCE_SECONDS) == 1
    text = child.out.read_bytes()
    assert text.endswith(b"\n")
    return queue, text.decode(errors="replace").split("\n")[:-1]


def expected_events(queue):
    return {(job.state, str(job.id)) for job in queue.list_jobs(task="write", limit=100)}


def expect_all(found, queue, concurrency=1):
    """With concurrency, a task may end the process when another job is completed and that is not logged."""
    assert found <= expected_events(queue)
    assert concurrency > 1 or found == expected_events(queue)
    assert len(found) > JOBS / 4


@pytest.mark.parametrize("concurrency", [1, 8])
def test_log_has_one_json_object_a_line_whatever_tasks_write(tasks, concurrency):
    queue, lines = run(tasks, "json", concurrency)
    events = [json.loads(line) for line in lines]
    found = {(each["event"], str(each["job"])) for each in events if each["event"] in pqueue.FINISHED}
    expect_all(found, queue, concurrency)
    assert max(map(len, lines)) < 4096  # a pipe does not mix them
    texts = {
        stream: "".join(each["text"] for each in events if each.get("stream") == stream)
        for stream in ("stdout", "stderr")
    }
    for text in texts.values() if concurrency == 1 else ():
        assert text.count("x") >= 70000 * len([number for number in range(JOBS) if number % 9 == 8])
        assert text.count(r"\xff") >= 9000 * len([number for number in range(JOBS) if number % 9 == 5])
    assert texts["stdout"].count("of a child") >= (JOBS if concurrency == 1 else JOBS / 4)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_each_event_of_a_text_log_begins_its_line(tasks, concurrency):
    queue, lines = run(tasks, "text", concurrency)
    expect_all(settled(lines), queue, concurrency)
    assert "".join(lines).count("of a child") >= (JOBS if concurrency == 1 else JOBS / 4)


def test_consumer_whose_log_nobody_reads_enforces_limits_and_ends(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("flood")
    reader, writer = os.pipe()
    command = tasks.command("consumer.py", "--import", "my_tasks", "--drain")
    with subprocess.Popen(command, cwd=tasks.folder, env=tasks.environment(), stdout=writer, stderr=writer) as child:
        wait_until(lambda: queue.get(job_id).state == "failed")
        os.close(writer)
        while os.read(reader, 1 << 16):
            pass
        assert child.wait(PATIENCE_SECONDS) == 1
    os.close(reader)
    assert queue.get(job_id).error.startswith("TimeoutError: timed out after 0.5 s")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_consumer_with_closed_standard_descriptors_runs_its_tasks(tasks, closed):
    queue = tasks.queue()
    ids = queue.enqueue_many("write", [6] * 5)
    command = tasks.command("consumer.py", "--import", "my_tasks", "--drain")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], cwd=tasks.folder, env=tasks.environment()
    )
    assert done.returncode == 0
    assert {queue.get(each).state for each in ids} == {"completed"}
    assert queue.check()["problems"] == []


def test_log_under_supervisor_has_one_event_a_line(system):  # noqa: F811
    system.write("my_tasks.py", TASKS)
    shipped = system.folder / "supervisord.conf"
    shipped.write_text(shipped.read_text().replace("python3 consumer.py", "python3 consumer.py --import my_tasks"))
    queue = system.queue()
    queue.enqueue_many("write", range(JOBS))
    supervisor = started(system, "supervisord", "-n", "-c", "supervisord.conf")
    wait_until(lambda: {state for state, _ in expected_events(queue)} <= {"completed", "failed"})
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(PATIENCE_SECONDS) == 0
    logs = [path.read_text(errors="replace") for path in (system.folder / "var/log").glob("consumer*.log*")]
    assert expected_events(queue) <= settled("".join(logs).split("\n"))


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_a_task_writes_comes_before_its_end_in_the_log(tasks, form, concurrency):
    tasks.write("patient.py", "from pqueue_tools import task_output\ntask_output.ORDER_SECONDS = 1.0\n")
    ids = tasks.queue().enqueue_many("announce", range(100))
    command = (
        "--import",
        "patient",
        "--import",
        "my_tasks",
        "--drain",
        "--log-format",
        form,
        "--concurrency",
        concurrency,
    )
    child = tasks.start("consumer.py", *command)
    assert child.wait(PATIENCE_SECONDS) == 1
    text = child.out.read_text()
    for job_id in ids:
        lines = [line for line in text.splitlines() if str(job_id) in line]
        ends = re.compile(rf'(completed|failed) consumer=\S+ job={job_id} |"job": {job_id}, .*"(completed|failed)"|'
                          rf'"(completed|failed)".*"job": {job_id}[,}}]')  # fmt: skip
        (end,) = [number for number, line in enumerate(lines) if ends.search(line)]
        for stream in ("out", "err"):
            (written,) = [number for number, line in enumerate(lines) if re.search(rf"{stream} {job_id}\b", line)]
            assert written < end, text


def test_what_c_code_has_printed_is_written_when_the_worker_ends(tasks):
    tasks.queue().enqueue("print_in_c")
    done = tasks.run("consumer.py", "--import", "my_tasks", "--drain")
    assert (done.returncode, done.stdout.count("of C code\n")) == (0, 1), done


def test_event_waits_until_the_keeper_has_written_what_came_before(monkeypatch):
    monkeypatch.setattr(task_output, "ORDER_SECONDS", 20.0)
    record = Record(1)
    source, end = os.pipe()
    os.write(end, b"a line\n")
    waiting = threading.Thread(target=task_output._wait_until_written, args=([end], record))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    record.fields[FORWARDING] = 1
    os.read(source, 99)
    waiting.join(0.3)
    assert waiting.is_alive()
    record.fields[FORWARDING] = 0
    waiting.join(PATIENCE_SECONDS)
    assert not waiting.is_alive()
    os.close(source)
    os.close(end)


def test_worker_that_cannot_redirect_its_output_says_so_in_one_line(tasks):
    tasks.write("patched.py", """
import consumer, os, sys
from pqueue_tools import task_output
keeper, high_copy = os.getpid(), task_output.high_copy
def copy(number):
    if os.getpid() == keeper: return high_copy(number)
    raise OSError("the reason")
task_output.high_copy = copy
sys.exit(consumer.main(["--import", "my_tasks", "--drain"]))""")  # fmt: skip
    queue = tasks.queue()
    queue.enqueue("ask")
    done = tasks.run("-m", "patched", PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "consumer.py: the reason\n")
    assert queue.stats()["states"]["pending"] == 1
