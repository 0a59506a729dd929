"""Helpers for tests of an application: a new queue for each test, and jobs that run in the test's process.

pytest has the fixtures of pqueue_tools/pytest_plugin.py when pqueue is installed.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any
from unittest import mock

from pqueue import TASKS, Job, PersistentQInterface, Snooze, Task, open_queue, run_task
from pqueue_files import temporary_folder
from pqueue_tasks import as_current, opened, run_async
from pqueue_tools.outcome import settle
from pqueue_values import MAX_NUMBER

_numbers = itertools.count(1)


@contextmanager
def temporary_queue() -> Iterator[PersistentQInterface]:
    """Open a queue in a temporary folder. Within the block it is the default queue, and what PQUEUE_URL names."""
    with temporary_folder() as folder:
        url = f"{folder}/queue.db"
        with (
            mock.patch.dict(os.environ, PQUEUE_URL=url),
            open_queue(url, durability="normal") as queue,
            mock.patch.dict(opened, default=queue),
        ):
            yield queue


def enqueued(queue: PersistentQInterface, task: str | Task[..., Any] | None = None) -> list[Job]:
    """Return the jobs of a task, or of all tasks, in the order in which they were enqueued, whatever their state."""
    name = task.name if isinstance(task, Task) else task
    return queue.list_jobs(task=name, limit=MAX_NUMBER)[::-1]


def drain(queue: PersistentQInterface, *, now: float | None = None) -> list[Job]:
    """Run each job that is due, and those that these enqueue, in this thread; return them as they are afterwards.

    now: the time for the queue, Unix seconds: `time.time() + 3600` also runs what is scheduled for the next hour.

    An exception of a task fails its job as in a consumer, and is not raised here: look at `error`. A job that is
    scheduled again at or before `now` runs again, and the failure handlers of tasks run, too. Time and memory limits do
    not apply. Jobs of tasks that this process has not imported are left, and schedules of tasks are not saved.
    """
    return [job for job, _ in _run_due(queue, now)]


@contextmanager
def inline(queue: PersistentQInterface) -> Iterator[None]:
    """Within the block, run each job that is due as soon as it has been enqueued or, in a transaction, committed.

    An exception of a task fails its job, and is raised, when all have run, by the call that enqueued it.
    """

    def run() -> None:
        if not queue.in_transaction:
            for error in [error for _, error in _run_due(queue, None) if error is not None]:  # after all have run
                raise error

    def then_run(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            run()
            return found

        return call

    transaction = queue.transaction

    @contextmanager
    def transaction_then_run() -> Iterator[Any]:
        with transaction() as connection:
            yield connection
        run()

    methods: dict[str, Any] = {name: then_run(getattr(queue, name)) for name in ("enqueue", "enqueue_many")}
    with mock.patch.multiple(queue, transaction=transaction_then_run, **methods):
        yield


@contextmanager
def running(queue: PersistentQInterface, job: Job | None = None) -> Iterator[None]:
    """Within the block, `current_queue()` and `current_job()` return these, as if a task ran: call its function."""
    with as_current(queue, job):
        yield


def _run_due(queue: PersistentQInterface, now: float | None) -> Iterator[tuple[Job, BaseException | None]]:
    """Run jobs; yield each as it is afterwards, and its error."""
    name = f"test-{next(_numbers)}"  # one for each, as jobs of inline calls run inside each other
    queue.declare_handlers(TASKS.values())  # as a consumer does when it starts
    try:
        while job := queue.dequeue(name, tasks=sorted(TASKS), now=now):
            error = _run(queue, job, now)
            yield queue.get(job.id), error
    finally:
        queue.leave(name)


def _run(queue: PersistentQInterface, job: Job, now: float | None) -> BaseException | None:
    result, error = None, None
    try:
        result = copy_context().run(run_task, queue, job, run_coroutine=_run_coroutine)
    except (Exception, SystemExit) as caught:
        error = caught
    raised = settle(queue, job, error, result, now=now)
    return None if issubclass(type(raised), Snooze) else raised  # isinstance may run code of the error


def _run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run it in a thread, as the test itself may run in an event loop."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(copy_context().run, run_async, coroutine)
        if (error := future.exception()) is not None:  # which `result` does not raise if it is false
            raise error
        return future.result()
