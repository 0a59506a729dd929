"""Tasks: registering the functions that run jobs, and running them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import WRAPPER_ASSIGNMENTS, cached_property
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from pqueue import PersistentQInterface

from pqueue_cron import valid_times
from pqueue_fields import Parameters, is_async, read_signature, signature
from pqueue_values import (
    DEFAULT_MAX_ATTEMPTS,
    NO_PARAMS,
    Job,
    JobId,
    Params,
    QueueError,
    R,
    above_0,
    duration,
    encode_json,
    operator_name,
    short,
    valid_int,
    valid_list,
    valid_name,
    valid_number,
    valid_priority,
)

P = ParamSpec("P")
Q = ParamSpec("Q")
T = TypeVar("T")
Call = tuple[Any, ...] | dict[str, Any]

MAX_BACKOFF_SECONDS = 3600.0

Backoff = float | timedelta | Sequence[float] | Callable[[int], float]
Exceptions = type[BaseException] | tuple[type[BaseException], ...]


class Caller(Generic[P, R]):
    """Enqueues calls of a task: a `Task`, or what its `using` and `on` return."""

    _queue: PersistentQInterface | None = None
    _options: Params = NO_PARAMS

    def __init__(self, task: Task[P, R], queue: PersistentQInterface | None, options: Params) -> None:
        self._task, self._queue, self._options = task, queue, options

    @overload  # the result of an async function is that of its coroutine
    def enqueue(self: Caller[Q, Coroutine[Any, Any, T]], *args: Q.args, **kwargs: Q.kwargs) -> JobId[T]: ...
    @overload
    def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> JobId[R]: ...
    def enqueue(self, *args: Any, **kwargs: Any) -> JobId[Any]:
        """Store a job that calls the function with these arguments, and return its id.

        The queue is that given by `on`; else, inside a task, the current queue, in its transaction if there is one;
        else the one that `open_queue()` opens, once for each process.

        Raises TypeError for arguments that the function does not take, and what the queue's `enqueue` raises.
        """
        task = self._task
        queue = self._queue or queue_in_use()
        return queue.enqueue(task, task.parameters.payload(args, kwargs), **self._options)

    @overload
    def enqueue_many(
        self: Caller[Q, Coroutine[Any, Any, T]], calls: Iterable[Call], *, keys: Sequence[str] | None = None
    ) -> list[JobId[T]]: ...
    @overload
    def enqueue_many(self, calls: Iterable[Call], *, keys: Sequence[str] | None = None) -> list[JobId[R]]: ...
    def enqueue_many(self, calls: Iterable[Call], *, keys: Sequence[str] | None = None) -> list[JobId[Any]]:
        """Store one job per call, all or none, and return their ids in order; a call is a tuple of positional arguments
        or a dict of those with names.

        keys: the key of each job, in the order of the calls.
        """
        if "key" in self._options:
            raise ValueError("expected keys, one for each job, got a single key for enqueue_many")
        task = self._task
        payloads = [task.parameters.payload(*_arguments(each)) for each in valid_list("calls", calls)]
        return (self._queue or queue_in_use()).enqueue_many(task, payloads, keys=keys, **self._options)

    def using(
        self,
        *,
        queue: str | None = None,
        group: str | None = None,
        priority: int | None = None,
        delay_seconds: float | timedelta | None = None,
        run_at: float | datetime | None = None,
        max_attempts: int | None = None,
        key: str | None = None,
        key_until: Literal["finished", "started"] | None = None,
        key_seconds: float | timedelta | None = None,
        expires_at: float | datetime | None = None,
        expire_seconds: float | timedelta | None = None,
        on_conflict: Literal["keep", "replace"] | None = None,
        assigned_to: str | None = None,
        after: Iterable[int] | None = None,
        after_failed: Literal["fail", "run"] | None = None,
    ) -> Caller[P, R]:
        """Return an object whose `enqueue` passes these options, which are those of the queue's `enqueue`."""
        given = {name: value for name, value in locals().items() if name != "self" and value is not None}
        return Caller(self._task, self._queue, {**self._options, **given})

    def on(self, queue: PersistentQInterface) -> Caller[P, R]:
        """Return an object whose `enqueue` stores in this queue."""
        if not hasattr(queue, "dequeue"):
            raise ValueError(f"expected a queue from open_queue, got {short(queue)}; a name is for using(queue=…)")
        return Caller(self._task, queue, self._options)


def _arguments(call: Call) -> tuple[Sequence[Any], dict[str, Any]]:
    if isinstance(call, dict):
        return (), call
    if isinstance(call, (tuple, list)):
        return call, {}
    raise TypeError(f"expected a tuple or a dict with the arguments of each job, got {short(call)}")


@dataclass(frozen=True)
class Task(Caller[P, R]):
    """A function with a name, which jobs refer to, and the options of `task`. Called, it calls the function."""

    name: str
    function: Callable[..., R]
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    timeout_seconds: float | None = None
    memory_mb: float | None = None
    retry_on: tuple[type[BaseException], ...] = (BaseException,)
    backoff: Callable[[int], float] | None = None
    max_backoff_seconds: float = MAX_BACKOFF_SECONDS
    is_async: bool = False  # a call returns a coroutine
    expire_seconds: float | None = None  # after it is due, a job is cancelled unless it has started
    queue: str = "default"
    priority: int = 0
    schedule: Params | None = field(default=None, compare=False)  # when consumers that know it enqueue it
    on_failed: str | None = None  # the task that gets a job for each failed one

    def __post_init__(self) -> None:
        found = {name: getattr(self.function, name, None) for name in WRAPPER_ASSIGNMENTS}  # for inspect and help
        vars(self).update({name: each for name, each in found.items() if each is not None}, __wrapped__=self.function)

    def __reduce__(self) -> str:
        """Let it be pickled by its name in its module, as a function is."""
        return getattr(self, "__qualname__", self.name)

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, job: Job, /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def __call__(self, *args: Any, **kwargs: Any) -> R:  # type: ignore[misc]
        return self.function(*args, **kwargs)

    @cached_property
    def _task(self) -> Task[P, R]:  # type: ignore[override]
        return self

    # Only when first used: annotations may name what the module defines below the function.
    @cached_property
    def parameters(self) -> Parameters:
        """How arguments become a payload and back. Raises TypeError for an annotation that cannot be stored."""
        return Parameters(self.name, self.function)

    @cached_property
    def run(self) -> Callable[[Job], Any]:
        """Runs a job: calls the function with the fields of the payload."""
        return self.parameters.runner()

    def retry_in_seconds(self, attempts: int) -> float:
        """Return the delay after this many attempts. Raises what a function given as `backoff` raises."""
        if self.backoff is None:
            return backoff_seconds(attempts, cap_seconds=self.max_backoff_seconds)
        return max(0.0, min(self.max_backoff_seconds, duration("backoff", self.backoff(attempts))))


TASKS: dict[str, Task[..., Any]] = {}


class Anything:
    """No object is of this class. A function whose first parameter accepts it also accepts any other."""


class Decorator(Protocol):
    """Makes a task of a function. Its first parameter, if of the class `Job`, is no argument of `enqueue`; if it
    accepts any object, it may be either, and calls are not checked."""

    @overload
    def __call__(self, function: Callable[Concatenate[Anything, P], R], /) -> Task[..., R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Job, P], R], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


_known: tuple[list[Task[..., Any]], str | None] = ([], None)  # what `known_attempts` returned for these


def known_attempts() -> str | None:
    """Return a line of name, tab and `max_attempts` for each registered task that has not the default; None: all do.

    This is what the statement MOST_ATTEMPTS expects.
    """
    global _known
    tasks = list(TASKS.values())
    if tasks != _known[0]:
        most = [f"{each.name}\t{each.max_attempts}" for each in tasks if each.max_attempts != DEFAULT_MAX_ATTEMPTS]
        _known = tasks, "\n".join(["", *most, ""]) if most else None
    return _known[1]


@overload
def task(name: Callable[Concatenate[Anything, P], R], /) -> Task[..., R]: ...
@overload
def task(name: Callable[Concatenate[Job, P], R], /) -> Task[P, R]: ...
@overload
def task(name: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(
    name: str | None = None,
    *,
    queue: str = "default",
    priority: int = 0,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    timeout_seconds: float | timedelta | None = None,
    memory_mb: float | None = None,
    retry_on: Exceptions = BaseException,
    backoff: Backoff | None = None,
    max_backoff_seconds: float | timedelta = MAX_BACKOFF_SECONDS,
    cron: str | None = None,
    zone: str = "UTC",
    every_seconds: float | timedelta | None = None,
    on_missed: Literal["once", "skip", "all"] = "once",
    overlap: bool = False,
    group: str | None = None,
    expire_seconds: float | timedelta | None = None,
    on_failed: str | Task[..., Any] | None = None,
) -> Decorator: ...
def task(
    name: str | Callable[..., Any] | None = None,
    *,
    queue: str = "default",
    priority: int = 0,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    timeout_seconds: float | timedelta | None = None,
    memory_mb: float | None = None,
    retry_on: Exceptions = BaseException,
    backoff: Backoff | None = None,
    max_backoff_seconds: float | timedelta = MAX_BACKOFF_SECONDS,
    cron: str | None = None,
    zone: str = "UTC",
    every_seconds: float | timedelta | None = None,
    on_missed: Literal["once", "skip", "all"] = "once",
    overlap: bool = False,
    group: str | None = None,
    expire_seconds: float | timedelta | None = None,
    on_failed: str | Task[..., Any] | None = None,
) -> Any:
    """Register a function as a task, and replace it with the `Task`: `@task`, or `@task(…)` with options.

    name: the name of the task; None: that of the function.
    queue, priority: of its jobs that are enqueued without these, through the task or by its schedule.
    max_attempts: how often a job may be delivered, unless it was enqueued with another number.
    timeout_seconds: the time limit of an attempt in a consumer, also a timedelta; None: no limit.
    memory_mb: how many MB of memory an attempt may add to its process, with its subprocesses; None: no limit.
    retry_on: an exception class or a tuple of them; after any other exception, the job is `failed` at once.
    backoff: the delay before the next attempt: a number of seconds, a list of those after the first, second … attempt
        (the last one repeats), or a function of the number of attempts; None: see `backoff_seconds`.
    max_backoff_seconds: the longest such delay.
    cron, zone, every_seconds, on_missed, overlap, group: when to enqueue a job without arguments, and in which group;
        those of the queue's `schedule`. A consumer that knows the task saves the schedule, under the task's name, when
        it starts.
    expire_seconds: see `enqueue`; for jobs that are enqueued without one, through the task or by its schedule.
    on_failed: the task, or its name, that gets a job for each job of this one that becomes `failed`: see the queue's
        `on_failed`. A consumer that knows this task saves it when it starts.

    The function may be an `async def`. Raises ValueError for an invalid option, for a generator function, or if another
    function has the name.
    """
    options: dict[str, Any] = {
        "queue": valid_name("queue", queue),
        "priority": valid_priority(priority),
        "max_attempts": valid_int("max_attempts", 1, max_attempts),
        "timeout_seconds": None if timeout_seconds is None else above_0("timeout_seconds", timeout_seconds),
        "memory_mb": None if memory_mb is None else valid_number("memory_mb", 1, memory_mb, 1e6),
        "retry_on": _exceptions(retry_on),
        "backoff": None if backoff is None else _delays(backoff),
        "max_backoff_seconds": above_0("max_backoff_seconds", max_backoff_seconds),
        "expire_seconds": None if expire_seconds is None else above_0("expire_seconds", expire_seconds),
    }
    if on_failed is not None:
        options["on_failed"] = valid_name("task", on_failed.name if isinstance(on_failed, Task) else on_failed)
    times = (cron, zone, every_seconds, on_missed, overlap, group)
    if times != (None, "UTC", None, "once", False, None):
        options["schedule"] = valid_times(*times)
    if callable(name):
        return _register(None, name, options)
    given = None if name is None else valid_name("task", name)
    return lambda function: _register(given, function, options)


def _register(name: str | None, function: Callable[..., Any], options: dict[str, Any]) -> Task[..., Any]:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        kind = "a generator function, which runs nothing when it is called"
        raise ValueError(f"expected an ordinary or async function as a task, got {short(function)}, {kind}")
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"expected a function as a task, got {short(function)}")
    signature(function)
    own_name = name or str(getattr(function, "__name__", ""))
    if name is None and not own_name.isidentifier():  # all lambdas of a module would have the same
        raise ValueError(f"expected a name, as in task('NAME'), for {short(function)}, which has none")
    entry: Task[..., Any] = Task(valid_name("task", own_name), function, is_async=is_async(function), **options)
    other = TASKS.get(entry.name)
    if other is not None and _qualified_name(other.function) != _qualified_name(function):
        names = f"{'.'.join(_qualified_name(other.function))} and {'.'.join(_qualified_name(function))}"
        raise ValueError(f"cannot register task {entry.name!r}: two functions have the name: {names}")
    TASKS[entry.name] = entry
    return entry


def place(task: str | Task[..., Any], queue: str | None, priority: int | None) -> tuple[str, int]:
    """Return the queue and the priority of a job; None: those of the `Task`, if one is given. Raises ValueError."""
    own = task if isinstance(task, Task) else Task  # the class has the defaults
    return (
        own.queue if queue is None else valid_name("queue", queue),
        own.priority if priority is None else valid_priority(priority),
    )


def _qualified_name(function: Callable[..., Any]) -> tuple[str, str]:
    """Return what is the same for a function whose module was reloaded."""
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", short(function))


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
_current: ContextVar[tuple[PersistentQInterface, Job | None] | None] = ContextVar("pqueue_current", default=None)


def current_queue() -> PersistentQInterface:
    """Return the queue of the job that this thread or asyncio task is running.

    Raises QueueError outside a task.
    """
    current = _current.get()
    if current is None:
        raise QueueError("no task runs in this thread: open a queue of your own")
    return current[0]


opened: dict[str, PersistentQInterface] = {}  # "default": see `queue_in_use`


def queue_in_use() -> PersistentQInterface:
    """Return the queue of the job that runs here or, outside a task, the default queue of this process: the one that
    `open_queue()` opened when it was first needed."""
    if current := _current.get():
        return current[0]
    if "default" not in opened:
        from pqueue import open_queue

        mine = open_queue()
        # Without a lock, which a fork could leave locked: the first of several threads wins.
        # guard: a process has one default queue
        if opened.setdefault("default", mine) is not mine:
            mine.close()
    return opened["default"]


@contextmanager
def as_current(queue: PersistentQInterface, job: Job | None) -> Iterator[None]:
    """Within the block, let this queue and job be the current ones of this context."""
    token = _current.set((queue, job))
    try:
        yield
    finally:
        _current.reset(token)


def current_job() -> Job | None:
    """Return the job that this thread or asyncio task is running, as it was when it was taken; None: none."""
    current = _current.get()
    return current and current[1]


def task_name(consumer: str | None) -> str:
    """Return the name by which a task that acts as an operator is recorded."""
    return f"task of {consumer}"


def actor(by: str | None) -> str:
    """Return whom to record for an operator's action: without a name, the task that acts, or this process's user."""
    job = None if by else current_job()
    return operator_name(by) if job is None else task_name(job.consumer)


def call_task(queue: PersistentQInterface, job: Job) -> Any:
    """Call the job's task in this context; return its result, which is a coroutine if the task is async.

    Raises what the task raises, or LookupError for an unknown task.
    """
    if job.task not in TASKS:
        known = ", ".join(sorted(TASKS)) or "none"
        raise LookupError(f"unknown task {job.task!r}; this consumer knows {known}: give it --import MODULE")
    _current.set((queue, job))
    entry = TASKS[job.task]
    if not _HOOKS:
        return entry.run(job)
    return _run_async_in_hooks(entry, job) if entry.is_async else _run_in_hooks(entry, job)


Hook = TypeVar("Hook", bound=Callable[[Job], Iterator[None]])
_HOOKS: dict[tuple[str, str], Callable[[Job], AbstractContextManager[None]]] = {}  # by qualified name


def around(hook: Hook) -> Hook:
    """Run each job inside this generator function, which takes the `Job` and yields once; return it.

    The first one registered is the outermost. What it raises counts as raised by the task, and it sees, where it
    yields, what the task raises; if it does not raise that again, the job is completed without a result. Another
    function of the same module and qualified name replaces it, as when the module is reloaded.
    """
    try:
        is_hook = inspect.isgeneratorfunction(hook) and bool(read_signature(hook).bind(None))
    except TypeError:
        is_hook = False
    if not is_hook:
        raise ValueError(f"expected a generator function that takes a job and yields once, got {short(hook)}")
    _HOOKS[_qualified_name(hook)] = contextmanager(hook)
    return hook


Metadata = TypeVar("Metadata", bound=Callable[[], dict[str, Any]])
_METADATA: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}  # by qualified name


def metadata(function: Metadata) -> Metadata:
    """Store what this function returns, a dict, in the `meta` of each job that this process enqueues; return it.

    It is called once for each call of `enqueue` or `enqueue_many`, which raises what it raises. A job that is enqueued
    by a task also has the `meta` of that task's job, except for keys that the function returns. Jobs of schedules and
    failure handlers have no `meta`. Another function of the same module and qualified name replaces it, as when the
    module is reloaded.
    """
    try:
        read_signature(function).bind()
    except TypeError:
        raise ValueError(f"expected a function that takes no arguments, got {short(function)}") from None
    _METADATA[_qualified_name(function)] = function
    return function


_has_metadata: ContextVar[bool] = ContextVar("pqueue_has_metadata", default=True)


@contextmanager
def without_metadata() -> Iterator[None]:
    """Give no `meta` to new jobs: what an application's function raises must not fail a claim, nor delay it."""
    token = _has_metadata.set(False)
    try:
        yield
    finally:
        _has_metadata.reset(token)


def new_meta() -> str | None:
    """Return the `meta` of a new job as JSON; None: nothing."""
    job = current_job()
    # guard: metadata of the application is no part of a claim
    if (job is None and not _METADATA) or not _has_metadata.get():
        return None
    found = dict((job and job.meta) or {})
    for function in _METADATA.values():
        if not isinstance(value := function(), dict):
            raise ValueError(f"expected a dict from {function.__qualname__}, marked @metadata, got {short(value)}")
        found.update(value)
    return encode_json("meta", found) if found else None


@contextmanager
def _hooks(job: Job) -> Iterator[None]:
    with ExitStack() as stack:
        for hook in _HOOKS.values():
            stack.enter_context(hook(job))
        yield


def _run_in_hooks(entry: Task[..., Any], job: Job) -> Any:
    result = None  # of a task whose exception a hook ended
    with _hooks(job):
        result = entry.run(job)
    return result  # noqa: RET504 - a hook may end an exception, which ruff does not see


async def _run_async_in_hooks(entry: Task[..., Any], job: Job) -> Any:
    result = None
    with _hooks(job):
        result = await entry.run(job)
    return result  # noqa: RET504


def run_task(
    queue: PersistentQInterface, job: Job, *, run_coroutine: Callable[[Coroutine[Any, Any, Any]], Any] | None = None
) -> Any:
    """Run the job's task and return its result as `complete` takes it: as JSON values, if its type is annotated.

    Raises what the task raises, or LookupError for an unknown task.

    run_coroutine: runs an async task; None: as asyncio.run does.
    """
    before = _current.get()
    try:
        result = call_task(queue, job)
        return (run_coroutine or run_async)(result) if type(result) is CoroutineType else result
    finally:
        _current.set(before)


def run_async(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as asyncio.run does, also one that raises an error whose own code raises another.

    asyncio calls such code when a task of its loop ends with the error, and then never stops the loop. So none does.
    """
    import asyncio  # only for async tasks: it takes 30 ms

    failed: list[BaseException] = []

    async def main() -> Any:
        try:
            return await coroutine
        except BaseException as error:
            if type(error) is asyncio.CancelledError:  # by Ctrl-C, for example
                raise
            failed.append(error)

    result = asyncio.run(main())
    if failed:
        raise failed.pop()
    return result


def backoff_seconds(attempts: int, base_seconds: float = 5.0, cap_seconds: float = MAX_BACKOFF_SECONDS) -> float:
    """Return the delay after this many attempts: base, 2 x base, 4 x base … up to the cap; half of it is random.

    This is the "equal jitter" of Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    whole = min(cap_seconds, base_seconds * 2.0 ** min(attempts - 1, 60))
    return whole / 2 + random.uniform(0, whole / 2)
