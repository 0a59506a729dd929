"""The consumer and the producer, as processes and by their words."""

from __future__ import annotations

import errno
import grp
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
from collections import Counter
from contextlib import closing, suppress
from datetime import datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest
from conftest import PATIENCE_SECONDS, ROOT, parent, wait_until

import consumer
import pqueue
import pqueue_files
import producer
from pqueue_tools import file_task, report
from pqueue_tools import worker as worker_module

TASKS = """
import os, sys, time
from pathlib import Path
from pqueue import DoNotRetry, current_queue, task
from pqueue_tools import file_task

@task()
def quick(job): return job.payload

@task()
def pid(job): return os.getpid()

@task()
def slow(job):
    Path("slow-started").write_text(str(os.getpid()))
    deadline = time.monotonic() + job.payload
    while time.monotonic() < deadline: time.sleep(0.01)
    return os.getpid()

@task()
def patient(job):
    Path("slow-started").write_text(str(os.getpid()))
    while not Path("go-on").exists(): time.sleep(0.01)
    return os.getpid()

@task()
def die(job): os.kill(os.getpid(), 9)

@task(max_attempts=1)
def leave(job): sys.exit("leaving")

@task(max_attempts=1)
def boom(job): raise ValueError(f"no {job.payload}")

@task()
def hopeless(job): raise DoNotRetry("never")

@task(max_attempts=1)
def unstorable(job): return {1, 2}

@task(max_attempts=1, timeout_seconds=0.2)
def hang(job):
    while True: time.sleep(0.01)

@task()
def chain(job):
    with current_queue().transaction():
        current_queue().enqueue("quick", "next")
        current_queue().update(job, progress=0.5)
    return "chained"
"""

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")


@pytest.fixture
def tasks(place):
    place.write("my_tasks.py", TASKS)
    return place


def drain(place, *arguments, **environment):
    return place.run("consumer.py", "--import", "my_tasks", "--drain", *arguments, **environment)


def jobs_by_task(queue):
    return {job.task: job for job in queue.list_jobs()}


def test_consumer_does_right_by_all_jobs_whatever_their_handlers_do(tasks):
    queue = tasks.queue()
    for name in ("leave", "boom", "hopeless", "unstorable", "hang", "chain", "unknown"):
        queue.enqueue(name, "x", max_attempts=1)
    queue.enqueue_many("quick", range(50))
    done = drain(tasks)
    assert done.returncode == 1, done.stderr
    jobs = jobs_by_task(queue)
    errors = {name: jobs[name].error.splitlines()[0] for name in jobs if jobs[name].state == "failed"}
    assert errors == {
        "leave": "SystemExit: leaving",
        "boom": "ValueError: no x",
        "hopeless": "DoNotRetry: never",
        "unstorable": "expected a result that JSON can hold, got set: Object of type set is not JSON serializable; "
        "the task had ended, and is not run again",
        "hang": "TimeoutError: timed out after 0.2 s",
    }
    assert (jobs["unknown"].state, jobs["unknown"].attempts) == ("pending", 0)
    assert jobs["chain"].result == "chained"
    assert len(queue.list_jobs(task="quick", state="completed")) == 51
    assert "raise ValueError" in jobs["boom"].error


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("name", ["quick", "chain"])
def test_consumer_whose_log_is_deleted_ends_and_does_not_blame_a_task(tasks, name, concurrency):
    queue = tasks.queue()
    child = tasks.start("consumer.py", "--import", "my_tasks", "--concurrency", concurrency)
    first = queue.enqueue(name)
    wait_until(lambda: queue.get(first).state == "completed")
    queue.enqueue(name, delay_seconds=0.5)
    for suffix in ("-wal", "-shm"):
        Path(f"{queue.path}{suffix}").unlink()
    assert child.wait(PATIENCE_SECONDS) == 1
    said = child.out.read_text()
    assert "replaced" in said
    assert "left behind" not in said and "worker died" not in said, said


FORK = """
import os, sys
from pqueue import task

class Evil(Exception):
    def __getattribute__(self, name): raise RuntimeError("evil")

def fail(error): raise error

ENDS = {
    "return": lambda: None, "code": lambda: sys.exit(3), "text": lambda: sys.exit("no"),
    "large": lambda: sys.exit(1 << 40), "evil": lambda: fail(Evil()),
    "closed": lambda: sys.stderr.close() or fail(ValueError()),
}

@task(max_attempts=1)
def fork(how: str) -> int:
    if (child := os.fork()) == 0:
        return ENDS[how]()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@task(max_attempts=1)
async def afork(how: str) -> int: return fork(how)
"""


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("task", ["fork", "afork"])
def test_child_of_a_task_runs_no_jobs_however_it_ends(place, task, concurrency):
    place.write("forks.py", FORK)
    queue, codes = place.queue(), {"return": 0, "code": 3, "text": 1, "large": 0, "evil": 1, "closed": 1}
    queue.enqueue_many(task, [{"how": how} for how in codes])
    done = place.run("consumer.py", "--import", "forks", "--drain", "--concurrency", concurrency)
    assert {job.payload["how"]: job.result for job in queue.list_jobs()} == codes, done.stdout + done.stderr
    assert done.stdout.count(" stopped ") == 1


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        ("good.ok", "", "No module named 'good.ok': 'good' is {here}/good\n"),
        ("flat.ok", "", "No module named 'flat.ok'; 'flat' is not a package: 'flat' is {here}/flat.py\n"),
        ("sys.ok", "", "No module named 'sys.ok'; 'sys' is not a package: 'sys' is built in\n"),
        ("tasks", "import good.ok", "No module named 'good.ok' (tasks.py, line 1): 'good' is {here}/good\n"),
        ("tasks", "import nosuch.ok", "No module named 'nosuch' (tasks.py, line 1): expected it in {here}, on PYTHON"),
        ("tasks", f"{FORK}\nfail(Evil())", "Evil (tasks.py, line "),
    ],
)
def test_consumer_says_in_one_line_why_a_module_cannot_be_imported(place, module, code, said):
    place.write("good/__init__.py", "")
    place.write("flat.py", "")
    place.write("tasks.py", code)
    done = place.run("consumer.py", "--import", module, "--drain")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"consumer.py: cannot import {module!r}: {said.format(here=place.folder)}")


@pytest.mark.parametrize(
    "command",
    [("admin.py", "stats"), ("consumer.py", "--import", "tasks"), ("manager.py", "--list"), ("ops.py", "--check")],
    ids=" ".join,
)
def test_program_whose_folder_was_deleted_says_so_in_one_line(place, command):
    (place.folder / "gone").mkdir()
    shell = f"cd gone && rmdir ../gone && exec {shlex.join(place.command(*command))}"
    done = subprocess.run(
        ["sh", "-c", shell], cwd=place.folder, env=place.environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"\w+\.py: cannot find .*folder.* was deleted.*\n", done.stderr), done.stderr


def test_jobs_of_a_new_task_wait_for_the_first_consumer_that_knows_it(tasks):
    """Producers are deployed first: old consumers leave the jobs as they are."""
    tasks.write("new_tasks.py", "from pqueue import task\n@task()\ndef new(job): return job.payload\n")
    queue = tasks.queue()
    old = [tasks.start("consumer.py", "--import", "my_tasks", "--name", f"old{number}") for number in range(3)]
    wait_until(lambda: len(queue.consumers()) == 3)
    ids = queue.enqueue_many("new", range(1000), priority=1)
    quick = queue.enqueue("quick")
    wait_until(lambda: queue.get(quick).state == "completed")
    assert {(job.state, job.attempts) for job in queue.list_jobs(task="new", limit=2000)} == {("pending", 0)}
    assert "no running consumer of its queue knows this task, new" in report.why(queue, ids[0])
    found = [str(each) for each in report.findings(queue) if "knows this task" in str(each)]
    assert len(found) == 1
    assert found[0].startswith("task 'new': 1,000 jobs pending and no running consumer of the queue knows this task")
    tasks.start("consumer.py", "--import", "new_tasks", "--name", "new")
    wait_until(lambda: queue.count_jobs(task="new", state="completed") == 1000)
    assert {(job.consumer, job.attempts) for job in queue.list_jobs(task="new", limit=2000)} == {("new", 1)}
    assert [queue.history(job_id) for job_id in ids] == [[]] * 1000
    assert all(child.poll() is None for child in old)


def test_consumer_whose_modules_have_no_task_is_refused(tasks):
    tasks.write("empty.py", "def task_without_decorator(job): return None\n")
    done = tasks.run("consumer.py", "--import", "empty")
    assert (done.returncode, done.stderr) == (
        2,
        "consumer.py: expected a module with tasks, got empty, without a function marked @task\n",
    )


NO_PROCESS = """
import errno, os
def fork(): raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = fork
"""
NO_THREAD = """
import threading
def start(_): raise RuntimeError("can't start new thread")
threading.Thread.start = start
"""


@pytest.mark.parametrize(
    "patch, why",
    [
        (NO_PROCESS, "cannot start a process for the tasks: Resource temporarily unavailable"),
        (NO_THREAD, "cannot run jobs concurrently: can't start new thread"),
    ],
)
def test_consumer_that_the_system_gives_no_process_or_thread_says_so_and_ends(tasks, patch, why):
    tasks.write("patched/sitecustomize.py", patch)
    done = drain(tasks, "--concurrency", "2", PYTHONPATH=str(tasks.folder / "patched"))
    assert (done.returncode, done.stderr) == (1, f"consumer.py: {why}\n")


NO_THREAD_AT_FIRST = r"""
import os, re, threading
start = threading.Thread.start
def start_later(thread):
    if re.fullmatch(r"pqueue-\d+", thread.name) and not os.path.exists("refused"):
        open("refused", "w").close()
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_later
"""


def test_consumer_without_a_thread_for_a_job_waits_a_second_before_it_tries_again(tasks):
    job_id = tasks.queue().enqueue("quick")
    tasks.write("patched/sitecustomize.py", NO_THREAD_AT_FIRST)
    done = drain(tasks, "--concurrency", "2", PYTHONPATH=str(tasks.folder / "patched"))
    job = tasks.queue().get(job_id)
    assert (done.returncode, job.state, job.attempts) == (0, "completed", 1)
    lines = [line.split() for line in done.stdout.splitlines()]
    at = {line[1]: datetime.fromisoformat(line[0].rstrip("Z")) for line in lines}
    assert at["completed"] - at["released"] > timedelta(seconds=0.9)


def test_consumer_says_that_a_task_was_killed_as_memory_ran_out(tasks):
    job_id = tasks.queue().enqueue("die")
    code = "import itertools, pqueue_tools.processes as p; p.oom_kills = itertools.count().__next__"
    tasks.write("patched/sitecustomize.py", code)  # no test can make the kernel do that everywhere
    drain(tasks, PYTHONPATH=f"{tasks.folder / 'patched'}:{ROOT}")
    error = "WorkerDied: the task's process was killed by signal 9 (SIGKILL), as memory ran out"
    assert tasks.queue().get(job_id).error == error


def test_job_that_kills_its_process_is_set_aside_and_the_others_complete(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("die", priority=1)
    queue.enqueue_many("quick", range(100))
    for number in range(3):
        assert drain(tasks, "--name", f"c{number}").returncode == (number == 2)
        if number < 2:
            poison = queue.get(job_id)
            assert (poison.state, poison.attempts) == ("scheduled", number + 1)
            with queue.transaction() as db:
                db.execute("UPDATE jobs SET run_at = 0 WHERE state = 'scheduled'")
    poison = queue.get(job_id)
    assert (poison.state, poison.attempts) == ("failed", 3)
    assert poison.error == "WorkerDied: the task's process was killed by signal 9 (SIGKILL)"
    assert [(event["event"], event["error"]) for event in queue.history(job_id)] == [("failed", poison.error)] * 3
    assert {(job.state, job.attempts) for job in queue.list_jobs(task="quick", limit=200)} == {("completed", 1)}


def test_first_term_finishes_the_job_and_the_second_gives_it_back(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("slow", 0.5)
    child = tasks.start("consumer.py", "--import", "my_tasks")
    wait_until(lambda: (tasks.folder / "slow-started").exists())
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert queue.get(job_id).state == "completed"

    (tasks.folder / "slow-started").unlink()
    job_id = queue.enqueue("slow", 600)
    child = tasks.start("consumer.py", "--import", "my_tasks")
    wait_until(lambda: (tasks.folder / "slow-started").exists())
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)  # two of one kind at once would be one
    assert child.wait(PATIENCE_SECONDS) == 0
    job = queue.get(job_id)
    assert (job.state, job.attempts) == ("pending", 0)


def test_idle_consumer_ends_at_once_on_a_signal(tasks):
    child = tasks.start("consumer.py", "--name", "idle")
    wait_until(lambda: "started" in child.out.read_text())
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert "stopped consumer=idle completed=0 failed=0" in child.out.read_text()


def test_signal_that_comes_as_an_idle_consumer_wakes_ends_it_as_at_any_other_moment(place, monkeypatch):
    worker = worker_module.Consumer(place.queue(), "w")

    class Late(suppress):
        """A block at whose end the signal comes."""

        def __exit__(self, *error):
            worker.stop()
            return super().__exit__(*error)

    monkeypatch.setattr(worker_module, "suppress", Late)
    worker._sleep()
    assert worker._stops == 1


def test_job_of_a_killed_consumer_runs_elsewhere_before_its_lease_is_over(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("slow", 600)
    children = {c.pid: c for c in (tasks.start("consumer.py", "--import", "my_tasks") for _ in range(2))}
    first = int(wait_until(lambda: (tasks.folder / "slow-started").exists() and read(tasks, "slow-started")))
    children[parent(first)].kill()
    wait_until(lambda: read(tasks, "slow-started") not in ("", str(first)))
    (event,) = queue.history(job_id)
    assert event["event"] == "died"
    assert event["at"] < queue.get(job_id).created_at + pqueue.LEASE_SECONDS


def read(place, name):
    return (place.folder / name).read_text()


def stop(pid, queue):
    """Stop a process where it holds nothing that others wait for."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: " T " in Path(f"/proc/{pid}/stat").read_text())
        with closing(sqlite3.connect(queue.path, isolation_level=None, timeout=0)) as db:
            with suppress(sqlite3.OperationalError):
                db.execute("BEGIN IMMEDIATE")
                return
        os.kill(pid, signal.SIGCONT)


def test_consumer_stopped_past_its_lease_loses_the_job_and_changes_nothing(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("patient")
    stopped = tasks.start("consumer.py", "--import", "my_tasks", "--lease-seconds", 1, "--name", "stopped")
    wait_until(lambda: (tasks.folder / "slow-started").exists() and read(tasks, "slow-started"))
    stop(worker := int(read(tasks, "slow-started")), queue)
    heir = tasks.start("consumer.py", "--import", "my_tasks", "--name", "heir")
    wait_until(lambda: queue.get(job_id).consumer == "heir")
    with suppress(ProcessLookupError):  # its keeper may have killed it
        os.kill(worker, signal.SIGCONT)
    wait_until(lambda: "lost consumer=stopped job=1" in stopped.out.read_text())
    (tasks.folder / "go-on").touch()
    job = wait_until(lambda: queue.get(job_id).state == "completed" and queue.get(job_id))
    assert (job.consumer, job.attempts, parent(job.result)) == ("heir", 2, heir.pid)


def test_long_job_keeps_its_lease_and_a_cancelled_one_is_interrupted(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("slow", 600)
    child = tasks.start("consumer.py", "--import", "my_tasks", "--lease-seconds", 0.6)
    wait_until(lambda: (tasks.folder / "slow-started").exists())
    first = queue.get(job_id).lease_expires_at
    wait_until(lambda: queue.get(job_id).lease_expires_at > first + 1)
    queue.cancel(job_id)
    wait_until(lambda: f"lost consumer={socket.gethostname()}-{child.pid} job={job_id}" in child.out.read_text())
    queue.enqueue("quick")
    wait_until(lambda: queue.stats()["states"]["completed"] == 1)


def test_quick_jobs_do_not_wait_behind_a_slow_one(tasks):
    queue = tasks.queue()
    queue.enqueue_many("quick", range(500))
    queue.enqueue("slow", 600)
    queue.enqueue_many("quick", range(500))
    for _ in range(2):
        tasks.start("consumer.py", "--import", "my_tasks")
    wait_until(lambda: queue.stats()["states"]["completed"] == 1000)


def test_consumer_starts_a_new_worker_after_max_jobs_and_serves_its_queues_only(tasks):
    queue = tasks.queue()
    queue.enqueue_many("pid", range(9), queue="a")
    queue.enqueue_many("quick", range(9), queue="b")
    assert drain(tasks, "--queue", "a", "--queue", "c", "--max-jobs", 4).returncode == 0
    workers = Counter(job.result for job in queue.list_jobs(task="pid"))
    assert sorted(workers.values()) == [1, 4, 4]
    assert len(queue.consumers()) == 1
    assert queue.stats()["queues"]["b"]["pending"] == 9


def test_consumer_waits_for_a_locked_database_and_says_so(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("quick")
    with closing(sqlite3.connect(queue.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        child = tasks.start("consumer.py", "--import", "my_tasks", "--drain")
        wait_until(lambda: "waiting" in child.out.read_text())
        db.execute("ROLLBACK")
    assert child.wait(PATIENCE_SECONDS) == 0
    assert queue.get(job_id).state == "completed"


def test_consumer_outlives_a_lock_that_is_longer_than_its_lease(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("patient")
    child = tasks.start("consumer.py", "--import", "my_tasks", "--lease-seconds", 1)
    wait_until(lambda: (tasks.folder / "slow-started").exists())
    with closing(sqlite3.connect(queue.path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        (tasks.folder / "go-on").touch()
        wait_until(lambda: f"job={job_id}" in child.out.read_text() and "left to its lease" in child.out.read_text())
        db.execute("ROLLBACK")
    wait_until(lambda: queue.get(job_id).state == "completed")
    assert child.poll() is None


def test_consumer_continues_when_its_log_is_not_read(tasks):
    queue = tasks.queue()
    queue.enqueue_many("quick", range(500))
    reader, writer = os.pipe()
    os.close(reader)
    command = tasks.command("consumer.py", "--import", "my_tasks", "--drain")
    done = subprocess.run(
        command,
        cwd=tasks.folder,
        env=tasks.environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=PATIENCE_SECONDS,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert queue.stats()["states"]["completed"] == 500


@pytest.mark.parametrize(
    ("program", "arguments", "code", "message"),
    [
        ("consumer.py", ["--import", "no_such_module"], 2, "No module named 'no_such_module': expected it in "),
        ("consumer.py", ["--import", "lacking"], 2, "No module named 'absent' (lacking.py, line 2): expected it in "),
        ("consumer.py", ["--import", "notes.py"], 2, "expected a module name such as tasks, without a folder and .py"),
        ("manager.py", ["--init", "--import", "./notes"], 2, "expected a module name such as tasks, without a folder"),
        ("consumer.py", ["--max-jobs", "0"], 2, "argument --max-jobs: expected a whole number of at least 1, got '0'"),
        ("consumer.py", ["--lease-seconds", "soon"], 2, "expected a number of seconds from 0.001 to 1e+12, got 'soon'"),
        ("consumer.py", ["--directory", "notes"], 2, "argument --directory: expected a folder, got 'notes'"),
        (
            "consumer.py",
            ["--name", ""],
            2,
            "expected a consumer name of 1 to 255 printable characters, not only spaces, got ''",
        ),
        ("consumer.py", ["--queue", "a\nb"], 2, "expected a queue name of 1 to 255 printable characters"),
        ("consumer.py", ["--no-such"], 2, "unrecognized arguments: --no-such; see consumer.py --help"),
        ("producer.py", ["--interval", "-1"], 2, "expected a number of seconds from 0 to 1e+12, got '-1'"),
        ("producer.py", ["--directory", "notes"], 2, "argument --directory: expected a folder, got 'notes'"),
        ("manager.py", [], 2, "one of the arguments --count --list --init --remove --start --stop is required"),
        ("ops.py", ["--port", "x"], 2, "argument --port: expected a whole number from 0 to 65535, got 'x'"),
    ],
)
def test_wrong_arguments_get_one_line(place, program, arguments, code, message):
    place.write("notes", "a file")
    place.write("lacking.py", "import os\nimport absent\n")
    done = place.run(program, *arguments)
    assert done.returncode == code
    assert re.fullmatch(f"{program}: .*{re.escape(message)}.*\n", done.stderr)
    # To know what a module lacks, it must be imported.
    assert (place.folder / "var").exists() == ("lacking" in arguments)


@pytest.mark.parametrize(
    ("program", "variable", "value"),
    [
        ("consumer.py", "PQUEUE_URL", "mysql://h/d"),
        ("producer.py", "PQUEUE_DURABILITY", "fast"),
        ("consumer.py", "PQUEUE_GROUP", "no such group"),
        ("ops.py", "PQUEUE_URL", "mysql://h/d"),
        ("ops.py", "PQUEUE_OPS_PORT", "x"),
        ("ops.py", "PQUEUE_OPS_PREFIX", "queue"),
        ("ops.py", "PQUEUE_OPS_HOSTS", "http://h"),
    ],
)
def test_program_names_the_variable_whose_value_it_refuses_and_no_other(place, program, variable, value):
    valid = {"PQUEUE_URL": "other.db", "PQUEUE_DURABILITY": "normal", "PQUEUE_GROUP": grp.getgrgid(os.getgid()).gr_name}
    done = place.run(program, **{**valid, variable: value})
    assert done.returncode == 2
    assert re.fullmatch(rf"{program}: .*expected .*\n", done.stderr)
    assert re.findall("PQUEUE_[A-Z_]+", done.stderr) == [variable]


def test_drain_on_a_terminal_says_in_one_line_that_it_cannot_count_the_jobs(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    queue = mock.Mock(stats=mock.Mock(side_effect=pqueue.QueueError("no answer")))
    assert consumer._consume(queue, consumer._parser().parse_args(["--drain"])) == 1
    assert re.fullmatch(r"\S+: no answer\n", capsys.readouterr().err)


@pytest.mark.parametrize("program", ["admin.py", "consumer.py", "manager.py", "ops.py", "producer.py"])
def test_program_that_runs_without_docstrings_explains_its_options(place, program):
    done = place.run(program, "--help", PYTHONOPTIMIZE="2")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {program}" in done.stdout


def test_drain_of_a_queue_that_never_had_a_job_says_so(place):
    place.queue().enqueue("prepend_timestamp", {}, queue="mail")
    place.queue().pause("mail")
    done = place.run("consumer.py", "--drain", "--queue", "malis", "--queue", "mail", "--name", "anna")
    warning = 'nothing to drain consumer=anna queues=malis reason="no job was ever in this queue; there are: mail"'
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{warning} level=warning\n" in done.stdout
    done = place.run("consumer.py", "--drain", "--queue", "mail", "--name", "anna")
    assert "nothing to drain" not in done.stdout


def test_programs_refuse_a_file_that_is_no_queue_in_one_line(place):
    place.write("var/queue.db", "this is a diary, and no database at all\n" * 100)
    for program in ("producer.py", "consumer.py"):
        done = place.run(program)
        assert done.returncode == 1
        assert re.fullmatch(rf"{program}: cannot use .*: expected an SQLite database, got another file\n", done.stderr)


# The built-in task


def stamped(place, payload, **options):
    """Enqueue and run one prepend_timestamp; return the job."""
    queue = place.queue()
    job_id = queue.enqueue("prepend_timestamp", payload, **options)
    drained = place.run("consumer.py", "--drain")
    job = queue.get(job_id)
    assert drained.returncode == int(job.state == "failed"), drained.stderr
    return job


def test_each_line_of_the_file_gets_the_same_timestamp(place):
    file = place.write("var/files/job_1.txt", "one\n\nthree\r\nlast without end")
    job = stamped(place, {"file": "job_1.txt"})
    text = file.read_bytes().decode()
    stamp = job.result["timestamp"]
    assert STAMP.fullmatch(f"{stamp} ")
    assert text == f"{stamp} one\n{stamp} \n{stamp} three\r\n{stamp} last without end"
    assert os.listdir(file.parent) == ["job_1.txt"]


def test_second_delivery_never_stamps_twice(place, monkeypatch):
    file = place.write("var/files/job_1.txt", "one\ntwo\n")
    monkeypatch.setattr(file_task, "files_directory", file.parent)
    queue = place.queue()
    queue.enqueue("prepend_timestamp", {"file": "job_1.txt"}, now=1000)
    first = queue.dequeue("w", now=1000)
    pqueue.run_task(queue, first)  # and dies before it completes
    once = file.read_text()
    second = queue.dequeue("w", now=2000)
    queue.complete(second, pqueue.run_task(queue, second))
    assert file.read_text() == once
    assert once.count("Z ") == 2
    with pytest.raises(pqueue.LeaseLost):
        pqueue.run_task(queue, first)
    assert file.read_text() == once


@pytest.fixture
def file_job(place, monkeypatch):
    """Return a queue, the folder of its files, and a job of it that was delivered."""
    files = place.write("var/files/job_1.txt", "one\n").parent
    monkeypatch.setattr(file_task, "files_directory", files)
    queue = place.queue()
    queue.enqueue("prepend_timestamp", {"file": "job_1.txt"}, now=1000)
    return queue, files, queue.dequeue("w", now=1000)


@pytest.fixture
def killed(file_job):
    """Let the delivery be killed before it renames its copy; return the queue, the folder and the job's id."""
    queue, files, job = file_job
    if os.fork() == 0:
        os.rename = lambda *_, **__: os._exit(0)
        pqueue.run_task(queue, job)
    assert os.wait()[1] == 0
    assert len(os.listdir(files)) == 2
    return queue, files, job.id


def test_next_delivery_removes_the_copy_of_a_killed_one_and_no_other(killed):
    queue, files, job_id = killed
    other = f".job_1.txt.old.{'0' * 16}.1.stamped"  # of a file job_1.txt.old
    (files / other).touch()
    again = queue.dequeue("w", now=2000)
    queue.complete(again, pqueue.run_task(queue, again))
    assert sorted(os.listdir(files)) == [other, "job_1.txt"]
    assert (files / "job_1.txt").read_text() == f"{queue.get(job_id).result['timestamp']} one\n"


@pytest.mark.parametrize("end", ["mark_failed", "cancel"])
def test_starting_consumer_removes_abandoned_copies(place, killed, end):
    queue, files, job_id = killed
    getattr(queue, end)(job_id)
    assert place.run("consumer.py", "--drain").returncode == 0
    assert os.listdir(files) == ["job_1.txt"]


def test_starting_consumer_leaves_the_copy_of_a_living_one(place, killed):
    queue, files, _ = killed
    (copy,) = set(os.listdir(files)) - {"job_1.txt"}
    links = [files / f".link.{'0' * 16}.1.stamped", files / f".{'0' * 16}.1.stamped"]
    for link in links:
        link.symlink_to("job_1.txt")
    with (files / copy).open("rb") as held:
        assert pqueue_files.try_lock(held.fileno())
        place.run("consumer.py", "--drain", "--queue", "other")
    assert set(os.listdir(files)) == {copy, "job_1.txt", *(link.name for link in links)}


def test_copy_that_another_consumer_removed_as_stale_is_created_again(file_job, monkeypatch):
    queue, files, job = file_job
    locked = []

    def try_lock(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".stamped"):
            locked.append(file)
            if len(locked) == 1:
                file_task.remove_copies()
        return lock(file)

    lock = pqueue_files.try_lock
    monkeypatch.setattr(pqueue_files, "try_lock", try_lock)
    pqueue.run_task(queue, job)
    assert os.listdir(files) == ["job_1.txt"]
    assert len(locked) == 3


def test_failed_attempt_leaves_no_copy(file_job, monkeypatch):
    queue, files, job = file_job
    monkeypatch.setattr(pqueue_files, "sync_file", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pqueue.run_task(queue, job)
    assert os.listdir(files) == ["job_1.txt"]


def test_first_delivery_does_not_list_the_folder(file_job, monkeypatch):
    queue, files, job = file_job
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", lambda _: 1 / 0)
        pqueue.run_task(queue, job)
    assert os.listdir(files) == ["job_1.txt"]


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc/hostname", "a/b.txt", "", "..", "link.txt", "fifo.txt", 5, "\0"]
)
def test_path_outside_or_through_a_link_is_refused_for_good(place, name):
    secret = place.write("var/secret.txt", "secret\n")
    (place.folder / "var/files").mkdir()
    (place.folder / "var/files/link.txt").symlink_to(secret)
    os.mkfifo(place.folder / "var/files/fifo.txt")
    job = stamped(place, {"file": name})
    assert (job.state, job.attempts) == ("failed", 1)
    assert job.error.startswith("DoNotRetry: ")
    assert secret.read_text() == "secret\n"


def test_missing_file_fails_with_its_name(place):
    (place.folder / "var/files").mkdir(parents=True)
    job = stamped(place, {"file": "gone.txt"}, max_attempts=1)
    assert job.error.startswith("FileNotFoundError: no file gone.txt in var/files")


# The producer


def names(place, pattern):
    return sorted(path.name for path in (place.folder / "var/files").glob(pattern))


def test_producer_creates_the_requested_number_of_files_and_jobs(place):
    done = place.run("producer.py", "--count", 5, "--interval", 0)
    assert done.returncode == 0
    assert len(re.findall(r"enqueued job=\d+ file=job_\w+\.txt", done.stdout)) == 5
    jobs = place.queue().list_jobs(state="pending")
    assert sorted(job.payload["file"] for job in jobs) == names(place, "*")


def test_producer_says_where_it_cannot_write(place):
    place.write("notes", "a file")
    done = place.run("producer.py", "--directory", "notes/files", "--count", 1)
    assert (done.returncode, done.stderr) == (1, "producer.py: cannot write to notes/files: Not a directory\n")


def test_producer_ends_between_jobs_on_a_signal(place):
    child = place.start("producer.py", "--interval", 600)
    wait_until(lambda: "enqueued" in child.out.read_text())
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("hold", ["lock", "limit"])
def test_producer_waits_for_room_and_leaves_nothing_half_done(place, hold):
    queue = place.queue()
    queue.enqueue("other")
    queue.limit("default", 1 if hold == "limit" else None)
    with closing(sqlite3.connect(queue.path, isolation_level=None)) as db:
        if hold == "lock":
            db.execute("BEGIN IMMEDIATE")
        child = place.start("producer.py", "--count", 1)
        wait_until(lambda: "waiting" in child.out.read_text())
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_SECONDS) == 0
    assert names(place, "*") == []
    queue.limit("default", None)
    assert place.run("producer.py", "--count", 1).returncode == 0
    assert len(names(place, "*")) == 1


def test_producer_completes_the_work_of_a_killed_one(place):
    queue = place.queue()
    files = place.folder / "var/files"
    place.write("var/files/.job_unlinked.txt.new", "x\n")
    place.write("var/files/.job_linked.txt.new", "x\n")
    os.link(files / ".job_linked.txt.new", files / "job_linked.txt")
    place.write("var/files/.job_done.txt.new", "x\n")
    place.write("var/files/job_done.txt", "stamped x\n")
    place.run("producer.py", "--count", 1)
    assert sorted(job.payload["file"] for job in queue.list_jobs()) == sorted({*names(place, "*")} - {"job_done.txt"})
    assert "job_unlinked.txt" not in names(place, "*")
    assert names(place, ".*") == []


def test_producer_that_lost_the_answer_enqueues_a_file_once(place):
    queue = place.queue()
    enqueue = queue.enqueue

    def answer_lost(*arguments, **options):
        job_id = enqueue(*arguments, **options)
        queue.complete(queue.dequeue("quick"))
        if job_id == 1:
            raise pqueue.QueueBusy("cannot reach the server")
        return job_id

    maker = producer.Producer(queue, place.folder / "var/files")
    with mock.patch.object(queue, "enqueue", answer_lost):
        made = maker.produce()
    assert [job.id for job in queue.list_jobs()] == [made]


def test_producer_writes_its_file_again_if_one_that_starts_has_deleted_it(place):
    queue = place.queue()
    maker, starting = (producer.Producer(queue, place.folder / "var/files") for _ in range(2))
    lock, calls = pqueue_files.try_lock, []

    def late(file):
        calls.append(file)
        if len(calls) == 1:
            starting.recover()  # which locks and deletes the new file
        return lock(file)

    with mock.patch.object(pqueue_files, "try_lock", late):
        job = queue.get(maker.produce())
    assert len(calls) == 3
    assert [each.name for each in (place.folder / "var/files").iterdir()] == [job.payload["file"]]


def test_producer_that_starts_enqueues_no_file_that_another_one_gives_up(place):
    queue = place.queue()
    maker, starting = (producer.Producer(queue, place.folder / "var/files") for _ in range(2))
    unlink, sync = Path.unlink, pqueue_files.sync

    def fail_when_linked(folder):
        sync(folder)
        if names(place, "*"):
            raise OSError(errno.EIO, "broken")

    def unlink_after_a_start(path, **options):
        with mock.patch.object(Path, "unlink", unlink):
            starting.recover()
        unlink(path, **options)

    broken = mock.patch.object(pqueue_files, "sync", fail_when_linked)
    with broken, mock.patch.object(Path, "unlink", unlink_after_a_start), pytest.raises(OSError, match="broken"):
        maker.produce()
    assert (queue.count_jobs(), names(place, "*"), names(place, ".*")) == (0, [], [])


def test_consumer_deletes_jobs_that_their_queue_keeps_no_longer(tasks):
    queue = tasks.queue()
    queue.keep("default", cancelled=60)
    old, young = queue.enqueue("quick", now=100), queue.enqueue("quick")
    queue.cancel(old, now=100)
    queue.cancel(young)
    queue.enqueue("quick")
    tasks.start("consumer.py", "--import", "my_tasks")
    wait_until(lambda: old not in {job.id for job in queue.list_jobs()})
    assert queue.get(young).state == "cancelled"


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("consumer.py", ["--drain", "--import", "nosuch"]),
        ("consumer.py", ["--drain", "--queue", ""]),
        ("producer.py", ["--count", "1", "--directory", "/proc/nosuch/files"]),
        ("producer.py", ["--count", "1", "--directory", "junk.txt/files"]),
        ("admin.py", ["enqueue", "t"]),
        ("admin.py", ["restore", "junk.txt", "--yes"]),
        ("admin.py", ["logs", "1"]),
        ("manager.py", ["--count", "1"]),
        ("manager.py", ["--init", "--concurrency", "0"]),
        ("manager.py", ["--init", "--queue", ""]),
        ("manager.py", ["--count", "1", "--queue", " "]),
        ("manager.py", ["--stop", ""]),
        ("consumer.py", ["--drain", "--directory", ""]),
        ("producer.py", ["--count", "1", "--directory", " "]),
        ("ops.py", ["--check", "--host", ""]),
        ("manager.py", ["--init"]),
        ("ops.py", ["--port", "99999"]),
    ],
)
def test_refused_command_leaves_nothing_behind(place, program, arguments):
    place.write("junk.txt", "junk")
    if program == "manager.py":
        place.write("supervisord.conf", "of somebody else")
    before = set(place.folder.rglob("*"))
    done = place.run(program, *arguments, PQUEUE_URL="new/queue.db")
    assert (done.returncode in (1, 2), len(done.stderr.splitlines())) == (True, 1), done.stderr
    assert set(place.folder.rglob("*")) == before
