"""Consumers that run several jobs at the same time, and async tasks."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import time
from argparse import Namespace
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import PATIENCE_SECONDS, wait_until
from test_misbehaviour import SOAK, registered

import pqueue
from pqueue_files import is_stopped
from pqueue_tools import processes
from pqueue_tools import record as fields
from pqueue_tools.keeper import STUCK_LOOKS, Keeper
from pqueue_tools.worker import Consumer

TASKS = r'''
import asyncio, contextvars, ctypes, json, logging, os, signal, subprocess, sys, threading, time
from pathlib import Path
from pqueue import Job, Snooze, current_queue, task

def note(name, text):
    with open(name, "ab", buffering=0) as file: file.write(f"{text}\n".encode())

@task()
async def fetch(job):
    await asyncio.sleep(job.payload or 0)
    return job.payload

@task()
def io(job):
    time.sleep(job.payload or 0)
    return threading.current_thread() is threading.main_thread()

@task()
async def meet(job):
    """Return when so many jobs run at the same time."""
    note("met", job.id)
    while Path("met").read_bytes().count(b"\n") < job.payload: await asyncio.sleep(0.01)

@task()
def meet_in_threads(job):
    note("met", job.id)
    while Path("met").read_bytes().count(b"\n") < job.payload: time.sleep(0.01)

@task()
async def patient(job):
    note("began", job.id)
    while not Path("go-on").exists(): await asyncio.sleep(0.01)
    return os.getpid()

@task()
def patient_thread(job):
    note("began", job.id)
    while not Path("go-on").exists(): time.sleep(0.01)
    return os.getpid()

@task(max_attempts=1)
async def once(job): await patient(job)

@task()
def pid(job): return os.getpid()

@task()
async def apid(job): return os.getpid()

@task(max_attempts=1, timeout_seconds=0.3)
async def hang(job):
    try: await asyncio.sleep(600)
    except asyncio.CancelledError as error:
        note("cancelled", error)
        raise

@task(max_attempts=1, timeout_seconds=0.3)
def hang_in_python(job):
    while True: time.sleep(0.01)

@task(max_attempts=1, timeout_seconds=0.3)
def hang_in_c(job): time.sleep(600)

@task(max_attempts=1, timeout_seconds=0.3)
async def swallow(job):
    while True:
        try: await asyncio.sleep(600)
        except BaseException: pass

@task(max_attempts=1, timeout_seconds=0.3)
async def block(job): time.sleep(600)

@task(max_attempts=1, timeout_seconds=0.3)
async def hold_gil(job):
    while True: ctypes.PyDLL(None).sleep(600)  # a signal ends it

@task(max_attempts=1)
async def brief_block(job):
    while not os.access("go-on", os.F_OK): time.sleep(0.01)

@task(max_attempts=1, timeout_seconds=0.3)
async def return_late(job):
    try: await asyncio.sleep(600)
    except asyncio.CancelledError: return "late"

@task(max_attempts=1)
async def cancel_itself(job): asyncio.current_task().cancel(); await asyncio.sleep(1)

@task(max_attempts=1)
async def fall(job): raise SystemExit("leaving")

@task(max_attempts=1)
async def fall_in_a_task(job):
    async def leave(): raise SystemExit("leaving")
    await asyncio.create_task(leave())

@task(max_attempts=1)
async def group(job): return sum(await asyncio.gather(*(asyncio.sleep(0.01, number) for number in range(10))))

@task(max_attempts=1)
async def await_in_transaction(job):
    with current_queue().transaction():
        current_queue().enqueue("pid")
        await asyncio.sleep(0.1)

@task(max_attempts=1)
async def await_in_a_tasks_transaction(job): await asyncio.create_task(await_in_transaction(job))

@task()
async def use_transaction(job):
    for _ in range(20):
        with current_queue().transaction():
            current_queue().enqueue("pid")
            current_queue().update(job, progress=0.5)
        await asyncio.sleep(0)
    with current_queue().transaction(): current_queue().complete(job, "by itself")

@task()
def use_transaction_in_a_thread(job):
    with current_queue().transaction():
        current_queue().enqueue("pid")
        time.sleep(0.01)
        current_queue().complete(job, threading.get_ident())

number = contextvars.ContextVar("number", default=None)

@task()
async def context(job):
    seen = number.get()
    number.set(job.id)
    logging.getLogger("mine").warning("before")
    await asyncio.sleep(0.05)
    logging.getLogger("mine").warning("after")
    await asyncio.to_thread(logging.getLogger("mine").warning, "in a thread")
    return [seen, number.get()]

@task()
def context_in_a_thread(job):
    seen = number.get()
    number.set(job.id)
    time.sleep(0.05)
    logging.getLogger("mine").warning("after")
    return [seen, number.get()]

@task(max_attempts=1)
def leave(job): os._exit(3)

@task(max_attempts=1)
async def aleave(job): os._exit(3)

@task(max_attempts=1)
def fault(job): ctypes.string_at(0)

@task(max_attempts=1)
def fork(job):
    if os.fork() == 0: return "in the child"
    os.wait()
    return "in the parent"

@task(max_attempts=1)
async def afork(job): return fork(job)

@task(max_attempts=1)
def close_all(job):
    os.closerange(3, 60)
    kept = [open(f"reused-{number}", "wb", buffering=0) for number in range(60)]
    time.sleep(0.2)

@task(memory_mb=100, max_attempts=1)
def eat(job):
    note("alone", job.id)
    held = []
    while job.payload: held.append(bytearray(10_000_000)); time.sleep(0.01)
    time.sleep(0.2)

@task()
def grow(job):
    globals().setdefault("kept", []).append(b"x" * 30_000_000)
    return os.getpid()

@task()
def leave_process(job): subprocess.Popen(["sleep", "600"])

@task()
async def leave_signal_mask(job): os.umask(0)

@task()
def trace(job): sys.settrace(lambda *_: None)

@task()
async def trace_loop(job): sys.settrace(lambda *_: None)

@task()
def profile(job): sys.setprofile(lambda *_: None)

@task()
async def profile_loop(job): sys.setprofile(lambda *_: None)

@task()
async def replace_loop(job): asyncio._set_running_loop(object())

@task()
async def block_signals(job): signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

@task()
async def hook_generators(job): sys.set_asyncgen_hooks(lambda _: 1 / 0)

@task()
async def look_at_thread(job):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return repr([sys.gettrace(), sys.getprofile(), mask, sys.get_asyncgen_hooks()])

@task()
def use_up_descriptors(job):
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

@task(max_attempts=1)
async def close_selector(job): asyncio.get_running_loop()._selector.close()

@task(max_attempts=1)
async def close_loops_files(job): os.closerange(3, 100)

@task(max_attempts=1)
def forbid_writing(job):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

@task(max_attempts=1)
def forbid_writing_for_long(job):
    forbid_writing(job)
    time.sleep(600)

@task(max_attempts=1)
async def close_connections(job):
    import gc, sqlite3
    for each in gc.get_objects():
        if isinstance(each, sqlite3.Connection): each.close()

class Slow(Exception):
    def __str__(self): time.sleep(600)

@task(max_attempts=1, timeout_seconds=0.3)
async def describe_slowly(job): raise Slow

@task(max_attempts=1)
def become(job): os.execvp("sleep", ["sleep", "600"])

@task()
def follow(job):
    if job.payload: current_queue().enqueue("follow", job.payload - 1)

@task()
def snooze(job): raise Snooze(1000)

@task(backoff=0.1)
def good(job):
    note("good", job.id)
    return job.id

@task(backoff=0.1)
async def agood(job):
    await asyncio.sleep(0.001)
    note("good", job.id)
    return job.id
'''


@pytest.fixture
def tasks(place):
    place.write("my_tasks.py", TASKS)
    return place


def consumer(place, *arguments, concurrency=8, **variables):
    return place.start("consumer.py", "--import", "my_tasks", "--concurrency", concurrency, *arguments, **variables)


def drain(place, *arguments, concurrency=8, **variables):
    chosen = ("--import", "my_tasks", "--drain", "--concurrency", concurrency)
    return place.run("consumer.py", *chosen, *arguments, **variables)


def read(place, name):
    path = place.folder / name
    return path.read_text() if path.exists() else ""


def began(place, number):
    """Wait until so many patient jobs run, and return their ids."""
    return wait_until(lambda: len(ids := read(place, "began").split()) >= number and list(map(int, ids)))


def worker_of(child):
    return wait_until(lambda: processes.children(child.pid))[0]


def outcome(queue, job_id):
    job = wait_until(lambda: queue.get(job_id).state in pqueue.FINISHED and queue.get(job_id))
    return job.state, job.attempts, (job.error or "").split("\n")[0]


def completed(queue, *ids):
    wait_until(lambda: all(queue.get(each).state == "completed" for each in ids))


# Running at the same time


@pytest.mark.parametrize(("task", "number"), [("meet", 500), ("meet_in_threads", 20)])
def test_consumer_runs_as_many_jobs_at_the_same_time_as_it_may(tasks, task, number):
    queue = tasks.queue()
    ids = queue.enqueue_many(task, [number] * number)
    assert drain(tasks, concurrency=number).returncode == 0
    assert {queue.get(each).state for each in ids} == {"completed"}


def test_consumer_runs_async_tasks_and_ordinary_functions_side_by_side(tasks):
    queue = tasks.queue()
    ids = [queue.enqueue(task, 6) for task in ("meet", "meet_in_threads") * 3]
    assert drain(tasks, concurrency=6).returncode == 0
    completed(queue, *ids)


def test_consumer_claims_no_more_jobs_than_it_can_run(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("patient", range(10))
    consumer(tasks, concurrency=4)
    assert began(tasks, 4) == ids[:4]
    assert queue.stats()["states"]["processing"] == 4
    (tasks.folder / "go-on").touch()
    completed(queue, *ids)


@pytest.mark.parametrize("task", ["patient", "patient_thread"])
def test_consumer_takes_a_new_job_at_once_while_others_run(tasks, task):
    queue = tasks.queue()
    queue.enqueue(task)
    consumer(tasks)
    began(tasks, 1)
    for _ in range(5):
        completed(queue, queue.enqueue("pid"), queue.enqueue("apid"))
    (tasks.folder / "go-on").touch()


@pytest.mark.parametrize("concurrency", [1, 8])
def test_job_and_queue_and_context_are_those_of_each_task(tasks, concurrency):
    queue = tasks.queue()
    ids = [queue.enqueue(task) for task in ("context", "context_in_a_thread") * 4]
    done = drain(tasks, concurrency=concurrency)
    assert [queue.get(each).result for each in ids] == [[None, each] for each in ids]
    logged = re.findall(r" log .*job=(\d+) task=(\w+) logger=mine message=\"?(before|after|in a thread)", done.stdout)
    expected = [(str(each), "context", text) for each in ids[::2] for text in ("before", "after", "in a thread")]
    assert sorted(logged) == sorted(expected + [(str(each), "context_in_a_thread", "after") for each in ids[1::2]])


@pytest.mark.parametrize("concurrency", [1, 8])
def test_async_task_may_run_others(tasks, concurrency):
    queue = tasks.queue()
    job_id = queue.enqueue("group")
    assert drain(tasks, concurrency=concurrency).returncode == 0
    assert queue.get(job_id).result == 45


def test_ordinary_function_runs_in_the_main_thread_unless_there_is_concurrency(tasks):
    queue = tasks.queue()
    for concurrency in (1, 2):
        job_id = queue.enqueue("io")
        drain(tasks, concurrency=concurrency)
        assert queue.get(job_id).result == (concurrency == 1)


# Transactions


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("task", ["await_in_transaction", "await_in_a_tasks_transaction"])
def test_task_that_awaits_inside_a_transaction_fails_and_the_transaction_is_rolled_back(tasks, task, concurrency):
    queue = tasks.queue()
    bad, others = queue.enqueue(task, max_attempts=1), queue.enqueue_many("use_transaction", range(5))
    assert drain(tasks, "--wait", 0, concurrency=concurrency).returncode == 1
    error = "QueueError: cannot await inside transaction(): other tasks of the event loop would join it; end it first"
    assert outcome(queue, bad) == ("failed", 1, error)
    completed(queue, *others)
    assert {queue.get(each).result for each in others} == {"by itself"}
    assert len(queue.list_jobs(task="pid", limit=1000)) == 100


def test_threads_have_transactions_of_their_own(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("use_transaction_in_a_thread", range(40))
    assert drain(tasks).returncode == 0
    completed(queue, *ids, *(job.id for job in queue.list_jobs(task="pid", limit=100)))
    assert len(queue.list_jobs(task="pid", limit=100)) == 40


def test_idle_threads_hold_no_connection(tasks):
    queue = tasks.queue()
    worker = worker_of(consumer(tasks, concurrency=30))

    def descriptors() -> Counter[str]:
        found = Counter()
        for each in Path(f"/proc/{worker}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found[Path(os.readlink(each)).name] += 1
        return found

    def run(count: int) -> Counter[str]:
        completed(queue, *queue.enqueue_many("use_transaction_in_a_thread", range(count)))
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/task")) < 6)
        return descriptors()

    before, *_, after = [run(1), run(30), run(30), run(30)]
    assert after["queue.db-wal"] <= 3
    # SQLite keeps a descriptor of each connection that was open at the same time, to use it again.
    assert after["queue.db"] <= before["queue.db"] + 30


# Limits and operators


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("task", ["hang", "hang_in_python"])
def test_task_that_runs_too_long_is_interrupted_and_its_worker_continues(tasks, task, concurrency):
    queue = tasks.queue()
    before, bad = queue.enqueue("pid"), queue.enqueue(task, max_attempts=1)
    child = consumer(tasks, concurrency=concurrency)
    assert outcome(queue, bad) == ("failed", 1, "TimeoutError: timed out after 0.3 s")
    assert "my_tasks.py" in queue.get(bad).error
    assert not re.search(r"\b(concurrency|worker|pqueue_tasks|runners)\.py", queue.get(bad).error)
    after = queue.enqueue("pid")
    completed(queue, before, after)
    assert queue.get(before).result == queue.get(after).result
    assert task != "hang" or read(tasks, "cancelled") == "timed out after 0.3 s\n"
    assert child.poll() is None


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("return_late", ("completed", 1, "")),
        ("cancel_itself", ("failed", 1, "CancelledError: ")),
        ("fall", ("failed", 1, "SystemExit: leaving")),
        ("fall_in_a_task", ("failed", 1, "SystemExit: leaving")),
    ],
)
def test_outcome_of_an_async_task_is_what_it_does(tasks, task, expected, concurrency):
    queue = tasks.queue()
    job_id = queue.enqueue(task, max_attempts=1)
    after = queue.enqueue("apid")
    drain(tasks, concurrency=concurrency)
    assert outcome(queue, job_id) == expected
    completed(queue, after)


@pytest.mark.parametrize("task", ["hang_in_c", "swallow", "block", "hold_gil"])
def test_task_that_does_not_end_costs_its_worker_and_only_its_own_job_an_attempt(tasks, task):
    queue = tasks.queue()
    good = queue.enqueue_many("patient", range(3)) + queue.enqueue_many("patient_thread", range(3))
    child = consumer(tasks)
    began(tasks, 6)
    worker = worker_of(child)
    done, bad = queue.enqueue("apid"), queue.enqueue(task, max_attempts=1)
    error = "TimeoutError: timed out after 0.3 s, and was killed, as it did not end when it was interrupted"
    assert outcome(queue, bad) == ("failed", 1, error)
    assert ("my_tasks.py" in queue.get(bad).error) == (task != "swallow"), queue.get(bad).error
    assert "patient" not in queue.get(bad).error
    (tasks.folder / "go-on").touch()
    completed(queue, done, *good)
    assert queue.get(done).result == worker
    assert {(queue.get(each).attempts, queue.get(each).result) for each in good} == {(1, worker_of(child))}
    assert worker_of(child) != worker
    assert child.poll() is None


def test_job_with_one_attempt_is_not_run_again_if_another_one_ended_its_worker(tasks):
    queue = tasks.queue()
    once = queue.enqueue("once", max_attempts=1)
    consumer(tasks)
    began(tasks, 1)
    queue.enqueue("hang_in_c", max_attempts=1)
    error = "WorkerDied: another job ended the process; not run again because max_attempts is 1"
    assert outcome(queue, once) == ("failed", 1, error)


@pytest.mark.parametrize("task", ["patient", "patient_thread", "hang_in_c"])
@pytest.mark.parametrize("verb", ["cancel", "mark_failed", "assign"])
def test_operator_ends_one_of_many_tasks(tasks, verb, task):
    tasks.write("more.py", "from my_tasks import hang_in_c\nimport pqueue, dataclasses\n"
                "pqueue.TASKS['hang_in_c'] = dataclasses.replace(hang_in_c, timeout_seconds=None)\n")  # fmt: skip
    queue = tasks.queue()
    bad, *good = queue.enqueue(task), *queue.enqueue_many("patient", range(3))
    child = consumer(tasks, "--import", "more", "--name", "w")
    began(tasks, 3)
    worker = worker_of(child)
    wait_until(lambda: queue.get(bad).state == "processing")
    getattr(queue, verb)(bad, *(["somebody"] if verb == "assign" else []))
    wait_until(lambda: f"lost consumer=w job={bad}" in child.out.read_text())
    (tasks.folder / "go-on").touch()
    completed(queue, *good)
    assert (worker_of(child) == worker) == (task != "hang_in_c")
    state = {"cancel": "cancelled", "mark_failed": "failed", "assign": "pending"}[verb]
    assert (queue.get(bad).state, queue.get(bad).result) == (state, None)
    assert {queue.get(each).attempts for each in good} == {1}


def test_leases_of_all_jobs_are_extended_in_one_commit(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("patient", range(50))
    consumer(tasks, "--lease-seconds", 1, "--name", "w", concurrency=50)
    began(tasks, 50)
    first = max(queue.get(each).lease_expires_at for each in ids)
    wait_until(lambda: min(queue.get(each).lease_expires_at for each in ids) > first + 2)
    assert len({queue.get(each).lease_expires_at for each in ids}) == 1
    (tasks.folder / "go-on").touch()
    completed(queue, *ids)
    assert {(queue.get(each).attempts, *queue.history(each)) for each in ids} == {(1,)}


def test_stopped_worker_loses_the_leases_of_all_its_jobs(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("patient", range(3))
    child = consumer(tasks, "--lease-seconds", 1)
    began(tasks, 3)
    os.kill(worker_of(child), signal.SIGSTOP)
    wait_until(lambda: len(queue.dequeue_many("heir", 1) or []) and queue.get(ids[0]).consumer == "heir")


def test_task_that_blocks_the_event_loop_is_reported(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("brief_block")
    child = consumer(tasks, "--drain")
    wait_until(lambda: child.out.read_text().count("blocked consumer=") >= 2)
    (tasks.folder / "go-on").touch()
    assert child.wait(PATIENCE_SECONDS) == 0
    line = 1 + TASKS[: TASKS.index("os.access")].count("\n")
    found = re.findall(
        r'blocked consumer=\S+ job=(\d+) reason="the event loop was blocked for (\d+) s in (\S+)"',
        said := child.out.read_text(),
    )
    assert {(job, place) for job, _, place in found} == {(str(job_id), f"{tasks.folder}/my_tasks.py:{line}")}, said
    assert all(int(seconds) >= 2**number for number, (_, seconds, _) in enumerate(found)), said


def test_task_with_a_memory_limit_runs_alone(tasks):
    queue = tasks.queue()
    first = queue.enqueue_many("fetch", [0.2] * 5)
    limited = [
        queue.enqueue("eat", False, max_attempts=1),
        queue.enqueue("eat", True, max_attempts=1),
        queue.enqueue("eat", False, max_attempts=1),
    ]
    last = queue.enqueue_many("fetch", [0.2] * 5)
    assert drain(tasks).returncode == 1
    assert outcome(queue, limited[1]) == ("failed", 1, "MemoryError: used more than 100 MB")
    completed(queue, *first, *last, limited[0], limited[2])
    spans = [(queue.get(each).started_at, queue.get(each).finished_at) for each in limited]
    assert len({queue.get(each).attempts for each in [*first, *last]}) == 1
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


# The end of the worker


@pytest.mark.parametrize(
    ("task", "error", "others"),
    [
        ("leave", "WorkerDied: the task's process exited with code 3, while 4 jobs ran in it", 2),
        ("aleave", "WorkerDied: the task's process exited with code 3", 1),
        ("fault", "WorkerDied: the task's process was killed by signal 11 (SIGSEGV)", 1),
    ],
)
def test_task_that_ends_its_process_is_found_if_possible(tasks, task, error, others):
    queue = tasks.queue()
    kind = "patient" if task == "aleave" else "patient_thread"
    good = queue.enqueue_many(kind, range(3))
    child = consumer(tasks)
    began(tasks, 3)
    bad = queue.enqueue(task, max_attempts=1)
    assert outcome(queue, bad) == ("failed", 1, error)
    (tasks.folder / "go-on").touch()
    for each in good if others > 1 else ():
        wait_until(lambda each=each: queue.get(each).state == "scheduled")
        assert queue.get(each).error.startswith(error)
    if others == 1:
        completed(queue, *good)
        assert {queue.get(each).attempts for each in good} == {1}
    assert child.poll() is None


def test_last_attempt_of_a_job_that_lost_its_process_is_made_alone(tasks):
    tasks.write("more.py", "from my_tasks import *\n@task(backoff=0, max_attempts=2)\n"
                "def leave_twice(job):\n    note('began', job.attempts)\n"
                "    until = time.monotonic() + (600 if job.attempts == 1 else 4)\n"
                "    while Path('began').read_bytes().count(b'x') < 3 * job.attempts and time.monotonic() < until:\n"
                "        time.sleep(0.01)\n"
                "    os._exit(3)\n"
                "@task(backoff=0)\ndef other(job): note('began', 'x'); time.sleep(8)\n")  # fmt: skip
    queue = tasks.queue()
    bad, *good = queue.enqueue("leave_twice", max_attempts=2), *queue.enqueue_many("other", range(3), max_attempts=2)
    drain(tasks, "--import", "more", "--wait")
    assert outcome(queue, bad) == ("failed", 2, "WorkerDied: the task's process exited with code 3")
    completed(queue, *good)
    assert {queue.get(each).attempts for each in good} == {2}


def test_job_that_waits_until_it_can_run_alone_keeps_its_lease(tasks):
    tasks.write("more.py", "from my_tasks import *\n@task(memory_mb=9999)\ndef alone(job): note('alone', 'x')\n")
    queue = tasks.queue()
    running = queue.enqueue("patient")
    child = consumer(tasks, "--import", "more", "--lease-seconds", 1)
    began(tasks, 1)
    waiting = queue.enqueue("alone")
    for job_id in (waiting, running):
        lease = wait_until(lambda job_id=job_id: queue.get(job_id).lease_expires_at)
        wait_until(lambda job_id=job_id, lease=lease: queue.get(job_id).lease_expires_at > lease + 1)
    assert (queue.get(waiting).attempts, (tasks.folder / "alone").exists(), child.poll()) == (1, False, None)


def test_worker_that_is_killed_while_many_jobs_run_costs_each_an_attempt_but_no_finished_one(tasks):
    queue = tasks.queue()
    done, running = queue.enqueue_many("good", range(20)), queue.enqueue_many("patient", range(3))
    child = consumer(tasks)
    began(tasks, 3)
    completed(queue, *done)
    os.kill(worker_of(child), signal.SIGKILL)
    for each in running:
        wait_until(lambda each=each: queue.get(each).state == "scheduled")
        assert queue.get(each).error == (
            "WorkerDied: the task's process was killed by signal 9 (SIGKILL), while 3 jobs ran in it"
        )
    assert sorted(map(int, read(tasks, "good").split())) == done


LOCK = """
import os, signal, time
from pathlib import Path
from pqueue import current_queue, task

@task(backoff=0)
def write(job):
    with current_queue().transaction():
        Path("locked").touch()
        while job.attempts == 1: pass

@task(max_attempts=1)
def hold(job):
    while not Path("locked").exists(): time.sleep(0.01)
    sum(range(10**13))

@task(max_attempts=1)
async def hold_in_loop(job): hold.function(job)

@task(max_attempts=1)
def stop(job):
    with current_queue().transaction():
        os.kill(os.getpid(), signal.SIGSTOP)
        while True: pass  # another thread may get the signal
"""


@pytest.mark.parametrize("task", ["hold", "hold_in_loop"])
def test_task_that_holds_the_gil_while_another_one_holds_the_write_lock_is_ended(tasks, task):
    """Otherwise nobody could write for as long as it runs: writers give up after 5 s."""
    tasks.write("more.py", LOCK)
    queue = tasks.queue()
    bad, child = queue.enqueue(task), consumer(tasks, "--import", "more")
    wait_until(lambda: queue.get(bad).state == "processing")  # a job with one attempt is claimed alone
    other = queue.enqueue("write")
    wait_until(lambda: (tasks.folder / "locked").exists())
    good = queue.enqueue("pid")  # raises no QueueBusy
    assert outcome(queue, bad) == (
        "failed",
        1,
        "WorkerDied: the task's process held the GIL while it kept all others from writing, and was killed, "
        "while 2 jobs ran in it",
    )
    assert "in hold" in queue.get(bad).error
    completed(queue, other, good)
    assert child.poll() is None


@pytest.mark.parametrize("concurrency", [1, 4])
def test_worker_that_is_stopped_while_it_holds_the_write_lock_is_ended(tasks, concurrency):
    tasks.write("more.py", LOCK)
    queue = tasks.queue()
    bad, child = queue.enqueue("stop"), consumer(tasks, "--import", "more", concurrency=concurrency)
    stopped = wait_until(lambda: is_stopped(pid := worker_of(child)) and pid)
    good = queue.enqueue("pid")  # raises no QueueBusy
    error = "WorkerDied: the task's process was stopped while it kept all others from writing, and was killed"
    assert outcome(queue, bad) == ("failed", 1, error)
    completed(queue, good)
    assert not processes.is_running(stopped)


WAIT_FOR_DISK = """
import os
os.posix_spawn("/bin/true", ["true"], {}, file_actions=[(os.POSIX_SPAWN_OPEN, 0, "fifo", os.O_RDONLY, 0)])
while True: pass
"""


def test_worker_that_waits_for_a_disk_is_spared_until_it_goes_on(tasks, monkeypatch):
    """It waits for a child that opens a FIFO, in the state in which it would wait for a disk."""
    os.mkfifo(tasks.folder / "fifo")
    child = tasks.start_command([sys.executable, "-c", WAIT_FOR_DISK])
    options = Namespace(concurrency=2, name="w", lease_seconds=60, quiet=True)
    keeper = Keeper(tasks.queue(), options)
    keeper.queue, keeper._pid = SimpleNamespace(is_locked_by=child.pid.__eq__), child.pid
    keeper.record.fields[fields.PULSE] = 1
    wait_until(lambda: processes.waits_for_disk(child.pid))
    assert not any(keeper._is_stuck() for _ in range(STUCK_LOOKS + 2))
    (tasks.folder / "fifo").write_text("")
    wait_until(lambda: not processes.waits_for_disk(child.pid))
    killed = []
    monkeypatch.setattr(keeper, "_kill", lambda **how: killed.append(how))
    keeper.record.fields[fields.PULSE] = 2
    assert [keeper._is_stuck() for _ in range(STUCK_LOOKS + 1)] == [False] + [True] * STUCK_LOOKS
    assert killed == []
    assert keeper._is_stuck()
    assert killed


def test_jobs_of_a_killed_keeper_run_again_in_another_consumer(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("patient", range(4)) + queue.enqueue_many("patient_thread", range(4))
    child = consumer(tasks)
    began(tasks, 8)
    worker = worker_of(child)
    child.kill()
    wait_until(lambda: not processes.is_running(worker))
    (tasks.folder / "go-on").touch()
    other = consumer(tasks)
    completed(queue, *ids)
    assert {(queue.get(each).attempts, queue.get(each).result) for each in ids} == {(2, worker_of(other))}


@pytest.mark.parametrize("task", ["fork", "afork"])
def test_child_that_a_task_forks_runs_no_other_job(tasks, task):
    queue = tasks.queue()
    good = queue.enqueue_many("agood", range(5))
    bad = [queue.enqueue(task, max_attempts=1) for _ in range(3)]
    after = queue.enqueue_many("agood", range(5))
    assert drain(tasks).returncode == 0
    assert {queue.get(each).result for each in bad} == {"in the parent"}
    assert sorted(map(int, read(tasks, "good").split())) == [*good, *after]


def test_task_that_closes_the_files_of_the_consumer_costs_the_process_and_damages_none(tasks):
    queue = tasks.queue()
    good = queue.enqueue_many("agood", range(20))
    child = consumer(tasks)
    completed(queue, *good)
    running = queue.enqueue_many("patient_thread", range(2))
    began(tasks, 2)
    queue.enqueue("close_all", max_attempts=1)
    wait_until(lambda: 'what="the closed descriptor ' in child.out.read_text())
    (tasks.folder / "go-on").touch()
    later = queue.enqueue("pid")
    completed(queue, later, *running)
    assert {each.name: each.stat().st_size for each in tasks.folder.glob("reused-*") if each.stat().st_size} == {}
    assert queue.check()["problems"] == []


def test_leftovers_are_found_when_the_consumer_is_idle(tasks):
    queue = tasks.queue()
    child = consumer(tasks)
    worker = worker_of(child)
    completed(queue, queue.enqueue("leave_signal_mask"))
    wait_until(lambda: "left behind consumer=" in child.out.read_text() and 'what="the umask"' in child.out.read_text())
    assert worker_of(child) == worker
    completed(queue, queue.enqueue("leave_process"))
    wait_until(lambda: "(sleep)" in child.out.read_text())
    last = queue.enqueue("pid")
    completed(queue, last)
    assert queue.get(last).result != worker


def test_leftovers_are_found_even_if_the_consumer_is_never_idle(place, monkeypatch):
    monkeypatch.setattr("pqueue_tools.concurrency.BUSY_SECONDS", 0.5)
    monkeypatch.setattr("pqueue_tools.concurrency.BUSY_SHARE", 10)
    queue, begun, looked = place.queue(), [], []

    def overlap(job):
        """Run until another one has begun, but in a pause none does."""
        begun.append(job.id)
        number, until = len(begun), time.monotonic() + 1
        while len(begun) < number + 1 and time.monotonic() < until:
            time.sleep(0.001)

    def left_behind(*_):
        looked.append(len(begun))
        return []

    with registered("overlap", overlap):
        runner = Consumer(queue, "embedded", concurrency=2, drain=True)
        runner.state = SimpleNamespace(left_behind=left_behind, would_damage_database=bool, must_end=False)
        queue.enqueue_many("overlap", range(1000))
        runner.run()
    assert queue.count_jobs(state="completed") == 1000
    assert looked[0] < 1000


LITTLE_MEMORY = """
import resource, time
from pathlib import Path
from pqueue import task

def limit(to): resource.setrlimit(resource.RLIMIT_AS, (to, resource.getrlimit(resource.RLIMIT_AS)[1]))

@task(max_attempts=1)
def limit_memory(job):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(pages * resource.getpagesize() + job.payload)
    time.sleep(0.5)
"""


@pytest.mark.parametrize("left", [0, 9_000_000])
def test_task_that_leaves_no_memory_for_threads_harms_no_other_job(tasks, left):
    tasks.write("more.py", LITTLE_MEMORY)
    queue = tasks.queue()
    child = consumer(tasks, "--import", "more", concurrency=3)
    completed(queue, queue.enqueue("io"), queue.enqueue("fetch"))
    bad = queue.enqueue("limit_memory", left)
    wait_until(lambda: queue.get(bad).state != "pending")
    good = queue.enqueue_many("io", [0] * 5)
    wait_until(lambda: queue.get(bad).state in pqueue.FINISHED)
    completed(queue, *good, *queue.enqueue_many("fetch", [0] * 5))
    assert child.poll() is None


# The end of the consumer


@pytest.mark.parametrize(
    "task",
    [
        *("trace", "trace_loop", "profile", "profile_loop", "replace_loop", "block_signals", "hook_generators"),
        *("use_up_descriptors", "close_selector", "close_loops_files", "leave_signal_mask"),
        *("forbid_writing", "forbid_writing_for_long", "close_connections"),
    ],
)
def test_task_that_spoils_its_thread_or_the_event_loop_harms_no_other_job(tasks, task):
    queue = tasks.queue()
    child = consumer(tasks, "--lease-seconds", 5)
    completed(queue, first := queue.enqueue("look_at_thread"))
    before = queue.enqueue_many("fetch", [1] * 2)  # which run meanwhile
    wait_until(lambda: not queue.count_jobs(state="pending"))
    bad = queue.enqueue(task, max_attempts=1)
    wait_until(lambda: queue.get(bad).state in pqueue.FINISHED)
    completed(queue, *before, *queue.enqueue_many("fetch", [0] * 5), *queue.enqueue_many("io", [0] * 5))
    completed(queue, last := queue.enqueue("look_at_thread"))
    costly = ("close_selector", "close_loops_files", "forbid_writing", "forbid_writing_for_long", "close_connections")
    is_new = task in costly  # they cost the process, and this one has another loop
    assert is_new or queue.get(last).result == queue.get(first).result
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()


SPOIL = """
import os, threading, time
from pqueue import current_job, task

def note(): os.write(os.open("ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT), b"%d\\n" % current_job().id)

def refuse(*_): raise ValueError("no more threads")

@task
def spoil():
    note()
    threading.Thread.start = refuse
    time.sleep(600)

@task(max_attempts=1)
def single(): note()
"""


def test_task_that_makes_its_consumer_fail_ends_its_process_only(tasks):
    tasks.write("spoil.py", SPOIL)
    queue = tasks.queue()
    waiting = queue.enqueue_many("patient_thread", range(2), max_attempts=1, priority=2)
    bad = queue.enqueue("spoil", max_attempts=1, priority=1)
    single = queue.enqueue_many("single", [{}] * 20)
    done = drain(tasks, "--import", "spoil", "--wait", concurrency=4)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'what="functions of Thread" then="the worker is replaced"' in done.stdout
    reason = "WorkerDied: the task's process could not continue: no more threads"
    assert {outcome(queue, each) for each in (*waiting, bad)} == {("failed", 1, reason)}
    completed(queue, *single)
    assert len(read(tasks, "ran").split()) == 1 + len(single)


def test_drain_ends_when_jobs_and_those_that_they_enqueue_are_done(tasks):
    queue = tasks.queue()
    queue.enqueue_many("follow", [5] * 20)
    assert drain(tasks).returncode == 0
    states = queue.stats()["states"]
    assert (states["completed"], sum(states.values())) == (120, 120)
    snoozed = queue.enqueue("snooze")
    assert drain(tasks).returncode == 0
    assert (queue.get(snoozed).state, queue.get(snoozed).attempts) == ("scheduled", 0)


def test_worker_is_replaced_after_its_number_of_jobs(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("pid", range(25)) + queue.enqueue_many("apid", range(25))
    assert drain(tasks, "--max-jobs", 10).returncode == 0
    pids = [queue.get(each).result for each in ids]
    assert sorted(pids.count(each) for each in set(pids)) == [10] * 5


def test_worker_is_replaced_when_it_uses_too_much_memory(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("grow", range(8))
    assert drain(tasks, "--max-rss", 100, concurrency=2).returncode == 0
    assert len({queue.get(each).result for each in ids}) > 1


@pytest.mark.parametrize("concurrency", [1, 2])
def test_worker_that_uses_too_much_memory_from_its_beginning_runs_jobs(tasks, concurrency):
    queue = tasks.queue()
    ids = queue.enqueue_many("pid", range(3))
    assert drain(tasks, "--max-rss", 1, concurrency=concurrency).returncode == 0
    assert [queue.get(each).state for each in ids] == ["completed"] * 3


def test_first_signal_lets_the_jobs_finish_that_run(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("patient", range(3)) + queue.enqueue_many("patient_thread", range(2))
    child = consumer(tasks, concurrency=5)
    began(tasks, 5)
    child.send_signal(signal.SIGTERM)
    later = queue.enqueue("pid")
    time.sleep(0.3)  # it must not take it
    (tasks.folder / "go-on").touch()
    assert child.wait(PATIENCE_SECONDS) == 0
    completed(queue, *ids)
    assert (queue.get(later).state, queue.get(later).attempts) == ("pending", 0)


def test_second_signal_ends_the_tasks_and_returns_their_jobs(tasks):
    queue = tasks.queue()
    ids = queue.enqueue_many("patient", range(3)) + queue.enqueue_many("patient_thread", range(2))
    once = queue.enqueue("once", max_attempts=1)
    child = consumer(tasks)
    began(tasks, 6)
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert {(queue.get(each).state, queue.get(each).attempts) for each in ids} == {("pending", 0)}
    assert outcome(queue, once)[2] == "Stopped: stopped while it ran; not run again because max_attempts is 1"


def test_idle_consumer_stops_at_once(tasks):
    queue = tasks.queue()
    child = consumer(tasks)
    completed(queue, queue.enqueue("pid"), queue.enqueue("apid"))
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert "Traceback" not in child.out.read_text()


def test_paused_queue_delivers_nothing_until_it_is_resumed(tasks):
    queue = tasks.queue()
    queue.enqueue("patient")
    consumer(tasks)
    began(tasks, 1)
    queue.pause("default")
    job_id = queue.enqueue("pid")
    time.sleep(0.3)  # it must not take it
    assert queue.get(job_id).state == "pending"
    queue.resume("default")
    completed(queue, job_id)
    (tasks.folder / "go-on").touch()


@pytest.mark.parametrize("number", ["0", "1001", "x"])
def test_concurrency_out_of_its_bounds_is_refused(tasks, number):
    done = drain(tasks, concurrency=number)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected a whole number from 1 to 1000" in done.stderr
    if number != "x":
        with pytest.raises(ValueError, match="concurrency"):
            Consumer(tasks.queue(), "w", concurrency=int(number))


# All of it at once

BAD = {  # how the error of each begins
    "leave": "WorkerDied: the task's process exited with code 3",
    "aleave": "WorkerDied: the task's process exited with code 3",
    "fault": "WorkerDied: the task's process was killed by signal 11 (SIGSEGV)",
    "hang": "TimeoutError: timed out after 0.3 s",
    "hang_in_python": "TimeoutError: timed out after 0.3 s",
    "hang_in_c": "TimeoutError: timed out after 0.3 s",
    "swallow": "TimeoutError: timed out after 0.3 s",
    "block": "TimeoutError: timed out after 0.3 s",
    "hold_gil": "TimeoutError: timed out after 0.3 s",
    "fall": "SystemExit: leaving",
    "fall_in_a_task": "SystemExit: leaving",
    "cancel_itself": "CancelledError",
    "become": "WorkerDied: the task replaced its process by another program",
    "describe_slowly": "TimeoutError: timed out after 0.3 s",
    "await_in_transaction": "QueueError: cannot await inside transaction()",
}


@pytest.mark.parametrize("package", ["gevent", "eventlet"])
def test_concurrency_is_refused_when_greenlets_have_replaced_threads(tasks, package):
    patch = (
        "import _thread\n"
        "def start(*arguments, real=_thread.start_new_thread): return real(*arguments)\n"
        f"start.__module__ = '{package}.green.thread'\n"
        "_thread.start_new_thread = start\n"
    )
    tasks.write("my_tasks.py", patch + TASKS)
    tasks.queue()
    done = drain(tasks)
    assert (done.returncode, done.stderr) == (
        2,
        f"consumer.py: expected concurrency 1, or threads that {package} has not replaced by greenlets\n",
    )
    assert drain(tasks, concurrency=1).returncode == 0


def test_good_jobs_complete_among_bad_ones_that_run_at_the_same_time(tasks):
    """PQUEUE_SOAK=10 for more. A bad job may also be ended by another one before it does its own harm."""
    chosen = random.Random(SOAK)
    names = (
        ["good", "agood"] * 150 * SOAK + [*BAD] * SOAK + ["return_late", "fork", "group", "leave_signal_mask"] * SOAK
    )
    chosen.shuffle(names)
    queue = tasks.queue()
    ids = {queue.enqueue(name, 1, max_attempts=1 if name in BAD else 3): name for name in names}
    children = [consumer(tasks, "--name", f"w{number}") for number in range(2)]
    wait_until(lambda: not any(queue.count_jobs(state=state) for state in pqueue.UNFINISHED), seconds=300 * SOAK)
    jobs = {job.id: job for job in queue.list_jobs(limit=100_000)}
    good = [job_id for job_id, name in ids.items() if name not in BAD]
    assert {jobs[each].state for each in good} == {"completed"}, [jobs[each] for each in good]
    assert {jobs[each].result for each in good if "good" in ids[each]} == {each for each in good if "good" in ids[each]}
    logged = re.findall(r" completed consumer=\S+ job=(\d+)", "".join(child.out.read_text() for child in children))
    assert len(logged) == len(set(logged))
    # A bad job may end the process, or hold the GIL, after a commit and before its lines are written, all at once.
    of_commit = {job_id: (jobs[job_id].consumer, jobs[job_id].finished_at) for job_id in good}
    without_lines = {of_commit[job_id] for job_id in good if str(job_id) not in logged}
    assert without_lines.isdisjoint(of_commit[int(each)] for each in logged if int(each) in of_commit)
    assert len(without_lines) <= 2 * SOAK
    for job_id in set(ids) - set(good):
        job = jobs[job_id]
        expected = (BAD[job.task], "WorkerDied: ")
        assert (job.state, job.attempts, (job.error or "").startswith(expected)) == ("failed", 1, True), job
    assert [child.poll() for child in children] == [None] * 2
    for child in children:
        child.send_signal(signal.SIGTERM)
    assert [child.wait(PATIENCE_SECONDS) for child in children] == [0] * 2


# In an application


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queue": "var/queue.db"}, "a queue from open_queue, got 'var/queue.db'"),
        ({"queue": None}, "a queue from open_queue, got None"),
        ({"concurrency": 0}, "concurrency to be a whole number from 1 to 1000, got 0"),
        ({"queues": "default"}, "a list of queues, got 'default'"),
        ({"max_rss": "1GB"}, "max_rss to be a whole number"),
    ],
)
def test_consumer_in_an_application_is_refused_what_it_cannot_use(place, options, said):
    with closing(place.queue()) as queue, pytest.raises(ValueError, match=f"^expected {re.escape(said)}"):
        Consumer(**{"queue": queue, "name": "embedded", **options})


def test_consumer_in_a_thread_runs_jobs_at_the_same_time(place):
    queue = place.queue()
    barrier = threading.Barrier(5)

    async def later(job):
        return job.payload

    with registered("together", lambda job: barrier.wait(PATIENCE_SECONDS)), registered("later", later):
        runner = Consumer(queue, "embedded", concurrency=5, lease_seconds=0.6)
        thread = threading.Thread(target=runner.run)
        thread.start()
        ids = queue.enqueue_many("together", range(5)) + queue.enqueue_many("later", range(20))
        completed(queue, *ids)
        runner.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert (runner.completed, runner.failed) == (25, 0)
    assert [each.name for each in threading.enumerate() if each.name.startswith("pqueue-")] == []


@pytest.mark.parametrize("concurrency", [1, 2])
def test_consumer_that_has_drained_its_queue_can_run_again(place, concurrency):
    async def later(job):
        return job.payload

    queue = place.queue()
    with registered("now", lambda job: job.payload), registered("later", later):
        runner = Consumer(queue, "embedded", concurrency=concurrency, drain=True)
        for _ in range(3):
            ids = [queue.enqueue(name, 1) for name in ("now", "later")]
            runner.run()
            assert [queue.get(each).result for each in ids] == [1, 1]
            assert {each["state"] for each in queue.consumers()} == {"stopped"}


def test_result_or_error_that_a_thread_stores_is_not_removed_by_another(place, monkeypatch):
    queue, clear, guarded = place.queue(), fields.Record.clear_results, []

    def clear_results(record):
        guarded.append(runner._adding.locked())
        clear(record)

    monkeypatch.setattr(fields.Record, "clear_results", clear_results)
    with registered("quick", lambda job: None):
        runner = Consumer(queue, "embedded", concurrency=2, drain=True)
        queue.enqueue_many("quick", range(4))
        runner.run()
    assert runner.completed == 4
    assert set(guarded) == {True}


def test_async_job_for_whose_loop_the_system_has_no_thread_runs_later_and_loses_no_attempt(place, monkeypatch):
    queue, start, refused = place.queue(), threading.Thread.start, []

    def refuse_once(thread):
        if thread.name == "pqueue-loop" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    async def later(job):
        return job.payload

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    monkeypatch.setattr("pqueue_tools.concurrency.RETRY_SECONDS", 0.0)
    with registered("later", later):
        runner = Consumer(queue, "embedded", concurrency=2, drain=True, wait=60)
        job_id = queue.enqueue("later", 1)
        runner.run()
    job = queue.get(job_id)
    assert (job.state, job.attempts, len(refused)) == ("completed", 1, 1)


def test_job_whose_thread_has_no_memory_to_begin_runs_later_and_loses_no_attempt(place, monkeypatch):
    queue, begin, refused = place.queue(), threading.Thread._bootstrap, []

    def end_once(thread):
        """End before the event for which `Thread.start` waits is set, as CPython does after a MemoryError."""
        if re.fullmatch(r"pqueue-\d+", thread.name) and not refused:
            refused.append(thread)
        else:
            begin(thread)

    monkeypatch.setattr("pqueue_tools.concurrency.START_SECONDS", 2.0)
    monkeypatch.setattr(threading.Thread, "_bootstrap", end_once)
    monkeypatch.setattr("pqueue_tools.concurrency.RETRY_SECONDS", 0.0)
    with registered("now", lambda job: job.payload):
        runner = Consumer(queue, "embedded", concurrency=2, drain=True, wait=60)
        job_id = queue.enqueue("now", 1)
        thread = threading.Thread(target=runner.run, daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    threading._limbo.clear()  # where it would stay
    job = queue.get(job_id)
    assert (job.state, job.attempts, len(refused)) == ("completed", 1, 1)
