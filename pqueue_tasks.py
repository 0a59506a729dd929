"""Tasks: registering the functions that run jobs, and running them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from types import CoroutineType
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from pqueue import PersistentQInterface

from pqueue_values import Job, QueueError, duration, short, valid_int, valid_name

DEFAULT_MAX_ATTEMPTS = 3
MAX_BACKOFF_SECONDS = 3600.0

Backoff = float | timedelta | Sequence[float] | Callable[[int], float]
Exceptions = type[BaseException] | tuple[type[BaseException], ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A named function that takes a `Job` and returns a JSON-serializable result, with the options of `task`."""

    name: str
    function: Callable[[Job], Any]
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    timeout_seconds: float | None = None
    memory_mb: float | None = None
    retry_on: tuple[type[BaseException], ...] = (BaseException,)
    backoff: Callable[[int], float] | None = None
    max_backoff_seconds: float = MAX_BACKOFF_SECONDS
    is_async: bool = False  # a call returns a coroutine

    def __call__(self, job: Job) -> Any:
        return self.function(job)

    def retry_in_seconds(self, attempts: int) -> float:
        """Return the delay after this many attempts."""
        if self.backoff is not None:
            with suppress(Exception):  # a function of the user: then as without
                return max(0.0, min(self.max_backoff_seconds, duration("backoff", self.backoff(attempts))))
        return backoff_seconds(attempts, cap_seconds=self.max_backoff_seconds)


TASKS: dict[str, Task] = {}


@overload
def task(name: Callable[[Job], Any], /) -> Task: ...


@overload
def task(
    name: str | None = None,
    *,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    timeout_seconds: float | timedelta | None = None,
    memory_mb: float | None = None,
    retry_on: Exceptions = BaseException,
    backoff: Backoff | None = None,
    max_backoff_seconds: float | timedelta = MAX_BACKOFF_SECONDS,
) -> Callable[[Callable[[Job], Any]], Task]: ...


def task(
    name: str | Callable[[Job], Any] | None = None,
    *,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    timeout_seconds: float | timedelta | None = None,
    memory_mb: float | None = None,
    retry_on: Exceptions = BaseException,
    backoff: Backoff | None = None,
    max_backoff_seconds: float | timedelta = MAX_BACKOFF_SECONDS,
) -> Task | Callable[[Callable[[Job], Any]], Task]:
    """Register a function as a task, and replace it with the `Task`: `@task`, or `@task(…)` with options.

    name: the name of the task; None: that of the function.
    max_attempts: the default for jobs enqueued by a program that has registered this task.
    timeout_seconds: the time limit of an attempt in a consumer, also a timedelta; None: no limit.
    memory_mb: how many MB of memory an attempt may add to its process, with its subprocesses; None: no limit.
    retry_on: an exception class or a tuple of them; after any other exception, the job is `failed` at once.
    backoff: the delay before the next attempt: a number of seconds, a list of those after the first, second … attempt
        (the last one repeats), or a function of the number of attempts; None: see `backoff_seconds`.
    max_backoff_seconds: the longest such delay.

    The function may be an `async def`. Raises ValueError for an invalid option, for a generator function, or if another
    function has the name.
    """
    options: dict[str, Any] = {
        "max_attempts": valid_int("max_attempts", 1, max_attempts),
        "timeout_seconds": None if timeout_seconds is None else _above_0("timeout_seconds", timeout_seconds),
        "memory_mb": None if memory_mb is None else _above_0("memory_mb", memory_mb),
        "retry_on": _exceptions(retry_on),
        "backoff": None if backoff is None else _delays(backoff),
        "max_backoff_seconds": _above_0("max_backoff_seconds", max_backoff_seconds),
    }
    if callable(name):
        return _register(None, name, options)
    given = None if name is None else valid_name("task", name)
    return lambda function: _register(given, function, options)


def _register(name: str | None, function: Callable[[Job], Any], options: dict[str, Any]) -> Task:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        kind = "a generator function, which runs nothing when it is called"
        raise ValueError(f"expected an ordinary or async function as a task, got {short(function)}, {kind}")
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"expected a function as a task, got {short(function)}")
    is_async = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
    options["is_async"] = is_async
    entry = Task(name or valid_name("task", str(getattr(function, "__name__", ""))), function, **options)
    other = TASKS.get(entry.name)
    if other is not None and _place(other.function) != _place(function):
        places = f"{'.'.join(_place(other.function))} and {'.'.join(_place(function))}"
        raise ValueError(f"cannot register task {entry.name!r}: two functions have the name: {places}")
    TASKS[entry.name] = entry
    return entry


def _place(function: Callable[[Job], Any]) -> tuple[str, str]:
    """Return what is the same for a function whose module was reloaded."""
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", short(function))


def _above_0(what: str, value: float | timedelta) -> float:
    if (number := duration(what, value)) > 0:
        return number
    raise ValueError(f"expected {what} above 0, got {short(value)}")


def _exceptions(kinds: Exceptions) -> tuple[type[BaseException], ...]:
    found = kinds if isinstance(kinds, tuple) else (kinds,)
    for kind in found:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise ValueError(f"expected retry_on to be an exception class or a tuple of them, got {short(kinds)}")
    return found


def _delays(backoff: Backoff) -> Callable[[int], float]:
    """Return the delay as a function of the number of attempts."""
    if callable(backoff):
        return backoff
    if isinstance(backoff, str) or (isinstance(backoff, Sequence) and not backoff):
        raise ValueError(f"expected backoff to be a number of seconds, a list or a function, got {short(backoff)}")
    delays = [duration("backoff", each) for each in (backoff if isinstance(backoff, Sequence) else [backoff])]
    if min(delays) < 0:
        raise ValueError(f"expected backoff of at least 0 seconds, got {short(backoff)}")
    return lambda attempts: delays[min(attempts, len(delays)) - 1]


# The queue and the job of the task that runs in this context: a thread, or an asyncio task
_current: ContextVar[tuple[PersistentQInterface, Job] | None] = ContextVar("pqueue_current", default=None)


def current_queue() -> PersistentQInterface:
    """Return the queue of the job that this thread or asyncio task is running.

    Raises QueueError outside a task.
    """
    current = _current.get()
    if current is None:
        raise QueueError("no task runs in this thread: open a queue of your own")
    return current[0]


def current_job() -> Job | None:
    """Return the job that this thread or asyncio task is running, as it was when it was taken; None: none."""
    current = _current.get()
    return current and current[1]


def task_name(consumer: str | None) -> str:
    """Return the name by which a task that acts as an operator is recorded."""
    return f"task of {consumer}"


def call_task(queue: PersistentQInterface, job: Job) -> Any:
    """Call the job's task in this context; return its result, which is a coroutine if the task is async.

    Raises what the task raises, or LookupError for an unknown task.
    """
    if job.task not in TASKS:
        known = ", ".join(sorted(TASKS)) or "none"
        raise LookupError(f"unknown task {job.task!r}; this consumer knows {known}: give it --import MODULE")
    _current.set((queue, job))
    return TASKS[job.task](job)


def run_task(
    queue: PersistentQInterface, job: Job, *, run_coroutine: Callable[[Coroutine[Any, Any, Any]], Any] | None = None
) -> Any:
    """Run the job's task and return its result. Raises what the task raises, or LookupError for an unknown task.

    run_coroutine: runs an async task; None: asyncio.run.
    """
    before = _current.get()
    try:
        result = call_task(queue, job)
        if type(result) is not CoroutineType:
            return result
        return run_coroutine(result) if run_coroutine else _run_coroutine(result)
    finally:
        _current.set(before)


def _run_coroutine(coroutine: Coroutine[Any, Any, Any]) -> Any:
    import asyncio  # only for async tasks: it takes 30 ms

    return asyncio.run(coroutine)


def backoff_seconds(attempts: int, base_seconds: float = 5.0, cap_seconds: float = MAX_BACKOFF_SECONDS) -> float:
    """Return the delay after this many attempts: base, 2 x base, 4 x base … up to the cap; half of it is random.

    This is the "equal jitter" of Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    whole = min(cap_seconds, base_seconds * 2.0 ** min(attempts - 1, 60))
    return whole / 2 + random.uniform(0, whole / 2)
