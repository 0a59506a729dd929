"""Tasks: registering the functions that run jobs, and running them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqueue import PersistentQInterface

from pqueue_values import Job, QueueError, valid_int, valid_name

DEFAULT_MAX_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Task:
    """A named function that takes a `Job` and returns a JSON-serializable result, with the options of `task`."""

    name: str
    function: Callable[[Job], Any]
    max_attempts: int
    backoff_base_seconds: float
    timeout_seconds: float | None
    memory_mb: float | None = None

    def __call__(self, job: Job) -> Any:
        return self.function(job)


TASKS: dict[str, Task] = {}


def task(
    name: str | None = None,
    *,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    backoff_base_seconds: float = 5.0,
    timeout_seconds: float | None = None,
    memory_mb: float | None = None,
) -> Callable[[Callable[[Job], Any]], Task]:
    """Return a decorator that registers a function as a task, and replaces it with the `Task`.

    name: the name of the task; None: that of the function.
    max_attempts: the default for jobs enqueued by a program that has registered this task.
    backoff_base_seconds: the delay after the first failed attempt: see `backoff_seconds`.
    timeout_seconds: the time limit of an attempt in a consumer; None: no limit.
    memory_mb: how many MB of memory an attempt may add to its process, with its subprocesses; None: no limit.

    Raises ValueError if the name is already registered.
    """

    def register(function: Callable[[Job], Any]) -> Task:
        entry = Task(
            valid_name("task", name or function.__name__),
            function,
            valid_int("max_attempts", 1, max_attempts),
            backoff_base_seconds,
            timeout_seconds,
            memory_mb,
        )
        if entry.name in TASKS:
            raise ValueError(f"cannot register task {entry.name!r}: the name is taken")
        TASKS[entry.name] = entry
        return entry

    return register


_current = threading.local()


def current_queue() -> PersistentQInterface:
    """Return the queue of the job that this thread is running.

    Raises QueueError outside a task.
    """
    queue: PersistentQInterface | None = getattr(_current, "queue", None)
    if queue is None:
        raise QueueError("no task runs in this thread: open a queue of your own")
    return queue


def run_task(queue: PersistentQInterface, job: Job) -> Any:
    """Run the job's task and return its result. Raises what the task raises, or LookupError for an unknown task."""
    if job.task not in TASKS:
        known = ", ".join(sorted(TASKS)) or "none"
        raise LookupError(f"unknown task {job.task!r}; this consumer knows {known}: give it --import MODULE")
    _current.queue = queue
    try:
        return TASKS[job.task](job)
    finally:
        _current.queue = None


def backoff_seconds(attempts: int, base_seconds: float = 5.0, cap_seconds: float = 3600.0) -> float:
    """Return the delay after this many attempts: base, 2 x base, 4 x base … up to the cap; half of it is random.

    This is the "equal jitter" of Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    whole = min(cap_seconds, base_seconds * 2.0 ** min(attempts - 1, 60))
    return whole / 2 + random.uniform(0, whole / 2)
