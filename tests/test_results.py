"""Waiting for results in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from conftest import PATIENCE_SECONDS, ROOT, wait_until

from pqueue_backend import Watch

# Without its timer, so that only a wake-up ends the wait.
WAITER = """
import sys, pqueue, pqueue_locks
pqueue_locks.WAIT_SECONDS = 1000.0
with pqueue.open_queue(sys.argv[1]) as queue:
    print("ready", flush=True)
    print(queue.result(int(sys.argv[2]), timeout_seconds=60))
"""
TASKS = """
from pqueue import task


@task
def double(job):
    return 2 * job.payload["n"]
"""


def is_waiting(queue, number):
    """Return whether so many processes wait at their wake-up pipes."""
    return queue._result_locks.waiting[:].count(b"\1") == number


def test_consumer_wakes_up_the_processes_that_wait_for_its_jobs(place):
    queue = place.queue()
    place.write("work.py", TASKS)
    ids = queue.enqueue_many("double", [{"n": number} for number in range(12)])
    waiters = [
        subprocess.Popen(
            [sys.executable, "-c", WAITER, queue.path, str(job_id)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for job_id in ids
    ]
    try:
        wait_until(lambda: is_waiting(queue, len(ids)))
        place.start("consumer.py", "--import", "work")
        answers = [waiter.communicate(timeout=PATIENCE_SECONDS)[0] for waiter in waiters]
    finally:
        for waiter in waiters:
            waiter.kill()
            waiter.wait()
    assert answers == [f"ready\n{2 * number}\n" for number in range(12)]


def test_dead_waiter_costs_a_completion_nothing_afterwards(place):
    queue = place.queue()
    job_id = queue.enqueue("t")
    with subprocess.Popen(
        [sys.executable, "-c", WAITER, queue.path, str(job_id)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as waiter:
        wait_until(lambda: is_waiting(queue, 1))
        waiter.kill()
    queue.complete(queue.dequeue("w"), "done")
    assert is_waiting(queue, 0)
    assert queue.result(job_id) == "done"


def test_child_forked_while_a_thread_waits_waits_on_its_own(place):
    queue = place.queue()
    first, second = queue.enqueue("t"), queue.enqueue("t")
    outcomes = []
    waiter = threading.Thread(target=lambda: outcomes.append(queue.result(first, timeout_seconds=60)))
    waiter.start()
    wait_until(lambda: is_waiting(queue, 1))
    child = os.fork()
    if not child:
        os._exit(queue.result(second, timeout_seconds=60) == "second")
    wait_until(lambda: is_waiting(queue, 2))
    for result in ("first", "second"):
        queue.complete(queue.dequeue("w"), result)
    waiter.join()
    assert outcomes == ["first"]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_waiter_that_polls_sleeps_again_after_an_interruption():
    polling = Watch()
    polling.wait([], lambda: False)
    assert polling._seconds > Watch.FIRST_SECONDS
    polling.interrupt()
    polling.wait([], lambda: False)
    assert (polling._woken.is_set(), polling._seconds) == (False, Watch.FIRST_SECONDS)
