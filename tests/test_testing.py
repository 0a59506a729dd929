"""The helpers for tests of an application."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT

import pqueue
from pqueue import DoNotRetry, Job, QueueError, Retry, Snooze, current_job, current_queue, open_queue, task
from pqueue_tools import testing


@pytest.fixture(autouse=True)
def no_tasks():
    with mock.patch.dict(pqueue.TASKS, clear=True):
        yield


@pytest.fixture
def queue():
    with testing.temporary_queue() as queue:
        yield queue


def test_temporary_queue_is_the_default_queue_within_its_block(monkeypatch, tmp_path):
    @task
    def note(number: int): ...

    monkeypatch.setenv("PQUEUE_URL", str(tmp_path / "real.db"))
    with testing.temporary_queue() as queue:
        path = Path(os.environ["PQUEUE_URL"])
        note.enqueue(5)
        with open_queue() as same:
            same.enqueue("note", {"number": 6})
        assert [job.payload for job in testing.enqueued(queue)] == [{"number": 5}, {"number": 6}]
    assert not path.exists()
    assert os.environ["PQUEUE_URL"] == str(tmp_path / "real.db")
    assert list(tmp_path.iterdir()) == []


def test_enqueued_lists_the_jobs_of_a_task_in_order_whatever_their_state(queue):
    @task
    def note(number: int): ...

    @task
    def other(): ...

    note.enqueue(1)
    other.enqueue()
    testing.drain(queue)
    note.using(delay_seconds=60).enqueue(2)
    assert [job.payload["number"] for job in testing.enqueued(queue, note)] == [1, 2]
    assert [job.state for job in testing.enqueued(queue, "note")] == ["completed", "scheduled"]
    assert [job.task for job in testing.enqueued(queue)] == ["note", "other", "note"]


def test_drain_runs_what_is_due_at_the_given_time_and_what_that_enqueues(queue):
    @task
    def step(number: int):
        if number:
            step.enqueue(number - 1)
        return number

    step.enqueue(2)
    step.using(delay_seconds=3600).enqueue(0)
    queue.enqueue("unknown")
    ran = testing.drain(queue)
    assert [(job.state, job.result) for job in ran] == [("completed", number) for number in (2, 1, 0)]
    assert testing.drain(queue) == []
    assert [job.result for job in testing.drain(queue, now=time.time() + 3601)] == [0]
    assert queue.count_jobs(state="pending") == 1
    assert {each["state"] for each in queue.consumers()} == {"stopped"}


def test_drain_settles_a_failed_job_as_a_consumer_does(queue):
    outcomes = [ValueError("no"), Retry(in_seconds=60), Snooze(30), None]

    @task(max_attempts=5, backoff=10, retry_on=ValueError)
    def flaky():
        if outcome := outcomes.pop(0):
            raise outcome

    @task
    def final():
        raise DoNotRetry("never")

    @task
    def unstorable():
        return object()

    now = time.time()
    job_id = flaky.enqueue()
    assert [(job.state, job.attempts) for job in testing.drain(queue, now=now)] == [("scheduled", 1)]
    assert queue.get(job_id).error.startswith("ValueError: no\nTraceback")
    for delay in (9, 10, 69, 70, 99, 100):
        testing.drain(queue, now=now + delay)
    assert (queue.get(job_id).state, queue.get(job_id).attempts, outcomes) == ("completed", 3, [])
    final.enqueue()
    unstorable.enqueue()
    never, stored = testing.drain(queue)
    assert (never.state, never.error.splitlines()[0]) == ("failed", "DoNotRetry: never")
    assert (stored.state, stored.attempts) == ("failed", 1)
    assert "expected a result that JSON can hold" in stored.error


def test_drain_fails_a_job_whose_task_exits(queue):
    @task(max_attempts=1)
    def leave():
        sys.exit(3)

    leave.enqueue()
    (job,) = testing.drain(queue)
    assert (job.state, job.error.splitlines()[0]) == ("failed", "SystemExit: 3")


@pytest.mark.parametrize("run", [testing.drain, lambda queue: pqueue.run_task(queue, queue.dequeue("w"))])
def test_async_task_whose_error_raises_errors_itself_ends(queue, run):
    class Evil(Exception):
        def __getattribute__(self, name):
            raise RuntimeError("evil")

    @task(max_attempts=1)
    async def fall():
        raise Evil

    fall.enqueue()
    signal.alarm(60)  # instead of a loop that never ends
    with suppress(Evil):
        (job,) = run(queue)
        assert job.error.startswith("Evil: ")
    signal.alarm(0)


def test_drain_fails_an_async_job_whose_error_is_false(queue):
    class Nothing(Exception):
        def __len__(self):
            return 0

    @task(max_attempts=1)
    async def fall():
        raise Nothing

    fall.enqueue()
    (job,) = testing.drain(queue)
    assert (job.state, (job.error or "").splitlines()[:1]) == ("failed", ["Nothing: "])


def test_failure_handler_of_a_task_runs_as_with_a_consumer(queue):
    seen = []

    @task
    def notify(failed: dict):
        seen.append(failed["error"].split("\n")[0])

    @task(on_failed=notify, max_attempts=1)
    def charge(order: int):
        raise ValueError(f"order {order}")

    charge.enqueue(1)
    assert [job.task for job in testing.drain(queue)] == ["charge", "notify"]
    with testing.inline(queue):
        with pytest.raises(ValueError, match="order 2"):
            charge.enqueue_many([(2,), (3,)])
    assert seen == ["ValueError: order 1", "ValueError: order 2", "ValueError: order 3"]
    assert queue.stats()["states"]["pending"] == 0


def test_task_may_settle_its_own_job(queue):
    @task
    def completes(job: Job):
        current_queue().complete(job, "by itself")

    @task
    def cancels(job: Job):
        current_queue().cancel(job.id)
        raise ValueError

    completes.enqueue()
    cancels.enqueue()
    assert [(job.state, job.result) for job in testing.drain(queue)] == [
        ("completed", "by itself"),
        ("cancelled", None),
    ]


def test_inline_runs_each_job_as_soon_as_it_is_stored(queue):
    ran = []

    @task
    def note(number: int, nested: bool = False):
        if nested:
            note.enqueue(number + 1)
            ran.append(current_job().payload["number"])
        ran.append(number)

    with testing.inline(queue):
        job_id = note.enqueue(1)
        assert (ran, queue.get(job_id).state) == ([1], "completed")
        note.enqueue_many([(2,), {"number": 3}])
        queue.enqueue("note", {"number": 4})
        with queue.transaction():
            note.enqueue(5)
            with queue.transaction():
                note.enqueue(6)
            assert ran == [1, 2, 3, 4]
        note.enqueue(7, nested=True)
        note.using(delay_seconds=60).enqueue(9)
    note.enqueue(10)
    assert ran == [1, 2, 3, 4, 5, 6, 8, 7, 7]


def test_inline_raises_the_exception_of_a_task_and_fails_its_job(queue):
    @task(max_attempts=1)
    def fails():
        raise KeyError("missing")

    with testing.inline(queue):
        with pytest.raises(KeyError, match="missing"):
            fails.enqueue()
        with pytest.raises(ZeroDivisionError), queue.transaction():
            fails.enqueue()
            raise ZeroDivisionError
    assert [job.state for job in testing.enqueued(queue)] == ["failed"]


def test_async_tasks_run_also_from_an_event_loop(queue):
    import asyncio

    @task
    async def fetch(url: str) -> str:
        await asyncio.sleep(0)
        assert current_queue() is queue
        return url.upper()

    async def test() -> str:
        with testing.inline(queue):
            return queue.get(fetch.enqueue("a")).result

    assert asyncio.run(test()) == "A"


def test_function_that_uses_the_current_queue_can_be_called(queue):
    @task
    def note(number: int): ...

    @task
    def order(job: Job, number: int) -> int:
        with current_queue().transaction():
            note.enqueue(number)
            if job:
                current_queue().complete(job)
        return number

    with testing.running(queue):
        assert order(None, 5) == 5
        assert current_job() is None
    order.enqueue(6)
    job = queue.dequeue("w", tasks=["order"])
    with testing.running(queue, job):
        assert order(job, **job.payload) == 6
        assert current_job() == job
    assert queue.get(job.id).state == "completed"
    assert [each.payload for each in testing.enqueued(queue, note)] == [{"number": 5}, {"number": 6}]
    with pytest.raises(QueueError):
        current_queue()


def test_core_and_helpers_need_no_pytest():
    program = "import sys, pqueue, pqueue_tools.testing; assert not {'pytest', 'streamlit'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_fixtures_work_in_a_checkout(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["pqueue_tools.pytest_plugin"]\n')
    (tmp_path / "test_app.py").write_text(FIXTURES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


FIXTURES = """\
from pqueue import task
from pqueue_tools.testing import drain

@task
def double(number: int) -> int:
    return 2 * number

def test_later(pqueue_queue):
    job_id = double.enqueue(4)
    assert pqueue_queue.get(job_id).state == "pending"
    assert [job.result for job in drain(pqueue_queue)] == [8]

def test_at_once(pqueue_inline):
    assert pqueue_inline.get(double.enqueue(5)).result == 10
"""
