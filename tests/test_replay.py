"""`replay` of a finished job: it reports what the task does, and changes nothing, on both backends."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until
from test_postgres import database, server  # noqa: F401 - fixtures

import pqueue
from pqueue_tools import replay as replay_tool

TASKS = """
import asyncio, logging, os, sys, threading, time
from pathlib import Path
from pqueue import DoNotRetry, Job, Snooze, current_queue, open_queue, task

mine = open_queue()

def execute(db, sql):
    return getattr(db, "exec_driver_sql", db.execute)(sql)

@task
def charge(job: Job, order: int, card: str) -> dict[str, int]:
    print("charging", order)
    queue = current_queue()
    with queue.transaction() as db:
        with queue.transaction():
            execute(db, f"INSERT INTO orders VALUES ({order}, '{card}')")
        execute(db, "DELETE FROM orders WHERE id = 0")
        queue.enqueue("mail", {"password": "hunter2"}, delay_seconds=300, key="k")
    queue.update(job, progress=0.5)
    queue.cancel(mine.enqueue("charge", {"order": 0, "card": "x"}))
    queue.weigh("default", "a", 2)
    queue.on_failed("orders", "mail")
    with open_queue() as other:
        other.enqueue("other")
    try:
        with queue.transaction():
            queue.enqueue("undone")
            raise RuntimeError
    except RuntimeError:
        pass
    if order < 0:
        raise ValueError(f"negative order {order}, try {job.attempts}, {job.meta}, {job.result}")
    return {"paid": order}

@task
async def fetch(ends: str) -> object:
    await asyncio.sleep(0.01)
    current_queue().enqueue("next")
    if ends == "snooze":
        raise Snooze(60)
    if ends == "exit":
        sys.exit(3)
    return object() if ends == "unstorable" else {"is": ends}

@task
def add(job: Job) -> int:
    if len(job.results) != 2:
        raise ValueError(job.results)
    return sum(job.results.values())

@task
def slow(seconds: float) -> None:
    with current_queue().transaction() as db:
        execute(db, "INSERT INTO orders VALUES (1, 'slow')")
    current_queue().enqueue("next")
    Path("began").touch()
    time.sleep(seconds)

class Evil(Exception):
    def __getattribute__(self, name):
        raise RuntimeError("evil")

@task
def evil():
    raise Evil

@task
def fork(how: str) -> int:
    if (child := os.fork()) == 0:
        return sys.exit(3) if how == "exit" else 5
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@task
def threaded() -> str:
    found = []
    def enqueue():
        try:
            found.append(str(current.enqueue("next")))
        except Exception as error:
            found.append(str(error))
    current = current_queue()
    thread = threading.Thread(target=enqueue)
    thread.start()
    thread.join()
    return found[0]
"""


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, place):
    place.write("tasks.py", TASKS)
    if request.param == "sqlite":
        return str(place.folder / "queue.db")
    return request.getfixturevalue("database")


@pytest.fixture
def queue(url):
    with pqueue.open_queue(url) as queue:
        with queue.transaction() as db:
            execute(db, "CREATE TABLE orders (id INTEGER, card TEXT)")
        yield queue


@pytest.fixture
def replay(place, url):
    def replay(*arguments, **options):
        command = place.command("admin.py", "replay", *arguments)
        environment = place.environment(PQUEUE_URL=url, TMPDIR=str(place.folder))
        return subprocess.run(
            command,
            cwd=place.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            **options,
        )

    return replay


def execute(db, sql):
    return getattr(db, "exec_driver_sql", db.execute)(sql)


def failed(queue, task, payload=None, **options):
    """Return a job that failed with an attempt left."""
    job_id = queue.enqueue(task, payload, **options)
    queue.fail(queue.dequeue("w", tasks=[task]), "ValueError: no\ntrace", retry=False)
    return job_id


def contents(queue):
    """Return all that a replay must not change."""
    with queue.transaction() as db:
        orders = [tuple(row) for row in execute(db, "SELECT * FROM orders")]
    consumers = [{**each, "last_seen_at": 0} for each in queue.consumers()]
    jobs = queue.list_jobs()
    return orders, jobs, [queue.history(job.id) for job in jobs], consumers, queue.stats()


def test_replay_reports_what_a_failed_job_does_and_changes_nothing(queue, replay, place):
    job_id = failed(queue, "charge", {"order": -7, "card": "c"}, max_attempts=1, key="mine")
    queue.enqueue("charge", {"order": 1, "card": "d"}, key="mine")
    assert queue.dequeue("idle", tasks=["none"]) is None
    before = contents(queue)
    done = replay(job_id, "--import", "tasks")
    assert done.returncode == 1
    assert re.sub(r"cancel\(\d+", "cancel(…", re.sub(r"\(\S+ m?s\)", "(0 s)", done.stdout)).splitlines() == [
        f"job {job_id} would be failed: ValueError: negative order -7, try 1, None, None  (0 s)",
        'enqueued: mail {"password": "…"} in queue default, due in 5 min',
        'enqueued: charge {"order": 0, "card": "x"} in queue default',
        "enqueued: other null in queue default",
        f"called: update({job_id}, progress=0.5)",
        "called: cancel(…)",
        "called: weigh('default', 'a', 2)",
        "called: on_failed('orders', 'mail')",
        "executed: INSERT INTO orders VALUES (-7, 'c')",
        "executed: DELETE FROM orders WHERE id = 0",
        "nothing was changed in the queue",
    ]
    warning, printed, *trace = done.stderr.splitlines()
    assert "warning: what the task does outside the queue's database is real" in warning
    assert printed == "charging -7"
    assert trace[0] == "Traceback (most recent call last):"
    assert trace[-1].startswith("ValueError: negative order -7")
    assert "pqueue_tools" not in done.stderr
    assert contents(queue) == before
    assert queue.wait(0.05, consumer="idle", tasks=["none"]) is False
    assert sorted(each.name for each in place.folder.iterdir() if each.name.startswith("pqueue-replay")) == []


def test_replay_of_a_completed_job_has_its_metadata_and_no_old_result(queue, replay):
    job_id = queue.enqueue("charge", {"order": 7, "card": "c"})
    queue.complete(queue.dequeue("w"), {"old": 1})
    before = contents(queue)
    done = replay(job_id, "--import", "tasks", "-o", "json")
    row = json.loads(done.stdout)
    assert (done.returncode, row["ended"], row["result"], row["error"]) == (0, "completed", {"paid": 7}, None)
    assert [each["task"] for each in row["enqueued"]] == ["mail", "charge", "other"]
    assert [each["state"] for each in row["enqueued"]] == ["scheduled", "cancelled", "pending"]
    assert (row["enqueued"][0]["key"], len(row["executed"])) == ("k", 2)
    assert contents(queue) == before


@pytest.mark.parametrize(
    ("ends", "code", "text"),
    [
        ("well", 0, 'would be completed, with result {"is": "well"}'),
        ("snooze", 0, "would be scheduled, and run again in 60 s"),
        ("exit", 1, "would be scheduled, and run again in"),
        ("unstorable", 1, "would be failed: expected a result that JSON can hold"),
    ],
)
def test_replay_settles_an_async_task_as_a_consumer_would(queue, replay, ends, code, text):
    done = replay(failed(queue, "fetch", {"ends": ends}), "--import", "tasks")
    assert (done.returncode, done.stdout.count("enqueued: next")) == (code, 1)
    assert text.replace("60 s", "1 min") in done.stdout


def test_replay_that_is_killed_has_blocked_nobody_and_changed_nothing(queue, place, url):
    job_id = failed(queue, "slow", {"seconds": 60})
    before = contents(queue)
    child = place.start("admin.py", "replay", job_id, "--import", "tasks", PQUEUE_URL=url, TMPDIR=str(place.folder))
    wait_until((place.folder / "began").exists)
    other = queue.enqueue("other")  # would raise QueueBusy if the replay held the lock of writers
    queue.complete(queue.dequeue("w", tasks=["other"]))
    with pytest.raises(pqueue.InvalidTransition):
        queue.cancel(other)
    child.kill()
    child.wait()
    queue.delete_jobs([other])
    wait_until(lambda: contents(queue)[:3] == before[:3])  # the server notices the end of the connection
    queue.resubmit(job_id)  # which nothing locks any more


def test_replay_interrupts_a_task_at_its_time_limit(queue, replay):
    done = replay(failed(queue, "slow", {"seconds": 60}), "--import", "tasks", "--timeout", "2s")
    assert done.returncode == 1
    assert "was interrupted; --timeout allows more time" in done.stdout
    assert "time.sleep(seconds)" in done.stderr


def test_replay_on_postgres_refuses_other_threads_which_are_outside_its_transaction(queue, replay):
    done = replay(failed(queue, "threaded"), "--import", "tasks", "-o", "json")
    found = json.loads(done.stdout)["result"]
    refused = "cannot enqueue in a replay on PostgreSQL: expected a call by the task's own thread"
    assert found.isdigit() if isinstance(queue, pqueue.PersistentQSQLite) else found == refused
    assert len(queue.list_jobs()) == 1


def test_saved_test_fails_as_the_job_did_until_its_task_is_fixed(queue, replay, place):
    payload = {"order": -7, "card": 'it\'s """\\\n\u2028é'}
    job_id = failed(queue, "charge", payload)
    assert replay(job_id, "--import", "tasks", "--save", "test_saved.py").returncode == 1
    path = place.folder / "test_saved.py"
    assert path.stat().st_mode & 0o777 == 0o600

    def test():
        environment = place.environment(PYTHONPATH=str(ROOT))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path.name]
        return subprocess.run(
            command, cwd=place.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )

    tasks = re.sub(r"  execute\(db, .*", "  pass", TASKS)  # the temporary queue has no table of orders
    place.write("tasks.py", tasks)
    ran = test()
    assert (ran.returncode, "ValueError: negative order -7" in ran.stdout) == (1, True), ran.stdout
    place.write("tasks.py", tasks.replace("order < 0", "order < -7"))
    assert test().returncode == 0
    again = replay(job_id, "--import", "tasks", "--save", "test_saved.py")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "cannot save test_saved.py: File exists" in again.stderr


def test_test_that_cannot_be_saved_whole_is_not_saved(queue, tmp_path):
    job = queue.get(failed(queue, "charge", {"order": "x" * 100_000}))
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(pqueue.QueueError, match="cannot save .*: File too large"):
            replay_tool.save_test(queue, job, ["tasks"], tmp_path / "test_saved.py")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


def test_replay_and_its_saved_test_have_the_results_of_the_jobs_it_ran_after(queue, replay, place):
    parents = [queue.enqueue("other") for _ in range(2)]
    job_id = queue.enqueue("add", after=parents)
    for result in (20, 22):
        queue.complete(queue.dequeue("w"), result)
    queue.fail(queue.dequeue("w"), "no", retry=False)
    child = queue.enqueue("mail", after=[job_id], after_failed="run")
    done = replay(job_id, "--import", "tasks", "--save", "test_add.py", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)["result"]) == (0, 42), done.stderr
    assert queue.get(child).state == "pending"
    ran = subprocess.run(
        [sys.executable, "test_add.py"], cwd=place.folder, env=place.environment(PYTHONPATH=str(ROOT)), check=False
    )
    assert ran.returncode == 0


def test_replay_starts_the_debugger_where_the_task_raised(queue, replay):
    done = replay(failed(queue, "charge", {"order": -7, "card": "c"}), "--import", "tasks", "--pdb", input="p order\n")
    assert done.returncode == 1
    assert "(Pdb) -7" in done.stdout


def test_replay_reports_an_error_whose_own_code_raises_another(queue, replay):
    done = replay(failed(queue, "evil"), "--import", "tasks", "--pdb", input="q\n")
    assert done.returncode == 1
    assert "would be scheduled, and run again" in done.stdout
    assert "Evil: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("exit", 3)])
def test_replay_ends_a_child_of_the_task(queue, replay, how, code):
    done = replay(failed(queue, "fork", {"how": how}), "--import", "tasks", "-o", "json")
    assert (done.returncode, json.loads(done.stdout)["result"]) == (0, code), done.stderr


def test_replay_without_typer_shows_only_the_error_of_the_task(queue, place, url):
    job_id = failed(queue, "charge", {"order": -7, "card": "c"})
    place.write("blocked/typer.py", "raise ImportError")
    environment = {"PQUEUE_URL": url, "TMPDIR": str(place.folder), "PYTHONPATH": str(place.folder / "blocked")}
    done = place.run("admin.py", "replay", job_id, "--import", "tasks", **environment)
    assert (done.returncode, done.stderr.count("Traceback"), "ImportError" in done.stderr) == (1, 1, False)


def test_replay_refuses_what_it_cannot_run(queue, replay, place):
    job_id = failed(queue, "charge", {"order": 1, "card": "c"})
    waiting = queue.enqueue("charge")
    place.write("empty.py", "")
    for arguments, code, message in [
        ([waiting, "--import", "tasks"], 1, "expected one of completed, failed, cancelled, it is pending"),
        ([999, "--import", "tasks"], 1, "no job 999"),
        ([job_id], 2, "expected --import MODULE with task 'charge', got prepend_timestamp"),
        ([job_id, "--import", "nosuch"], 2, "cannot import 'nosuch'"),
        ([job_id, "--import", "empty"], 2, "expected a module with tasks, got empty"),
        ([job_id, "--import", "tasks.py"], 2, "expected a module name such as tasks"),
        ([job_id, "--import", "tasks", "--save", "job.py"], 2, "expected a file such as test_job.py, got 'job.py'"),
        ([job_id, "--import", "tasks", "--save", "no/test_a.py"], 1, "cannot save no/test_a.py: No such file"),
        ([job_id, "--import", "tasks", "--timeout", "0s"], 2, "expected a duration from 0.1s to 1d"),
    ]:
        done = replay(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
        assert message in done.stderr
