"""What the exception of a task means for its job, and the text of it that is stored and logged."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pqueue
from pqueue import DoNotRetry, Job, LeaseLost, PersistentQInterface, Retry, Snooze
from pqueue_values import MAX_ERROR_CHARS, Encoded, duration, encode_json

log = logging.getLogger("pqueue")

MAX_SUMMARY_CHARS = 1000  # of the first line
MAX_FRAMES = 2000  # of a traceback, the innermost ones: a million would take 20 s and 400 MB
LAST_CHARS = 6000  # of a text that is cut: it ends with the innermost frames
OURS = (  # modules whose frames tell a user nothing
    *("pqueue_fields", "pqueue_tasks", "pqueue_tools.worker", "pqueue_tools.keeper", "pqueue_tools.concurrency"),
    "pqueue_tools.replay",
    *("asyncio.runners", "asyncio.base_events"),
)


class Unstorable(ValueError):
    """The task has returned what cannot be stored as its result. It did its work, so it must not run again."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How to settle a job: release it, not counting the attempt, or fail it; after which delay; with which error."""

    verb: str
    retry: bool
    delay_seconds: float

    def settle(self, queue: PersistentQInterface, job: Job, error: str, *, now: float | None = None) -> str:
        """Settle the job; return its new state. Raises LeaseLost, also if its task has settled it."""
        if self.verb == "fail":
            return queue.fail(job, error, retry=self.retry, retry_in_seconds=self.delay_seconds, now=now)
        queue.release(job, delay_seconds=self.delay_seconds, now=now)
        return "scheduled" if self.delay_seconds else "pending"


def outcome_of(error: BaseException, job: Job, *, is_limit: bool = False) -> Outcome:
    """Return how to settle a job whose task ended with this exception.

    is_limit: the consumer interrupted the task, so that `retry_on` does not apply.
    """
    entry, kind = pqueue.TASKS.get(job.task), type(error)  # isinstance may run code of the error
    delay = delay_after(entry, job.attempts) if entry else pqueue.backoff_seconds(job.attempts)
    if issubclass(kind, (Snooze, Retry)):
        is_snooze = issubclass(kind, Snooze)
        with suppress(Exception):  # it is of a subclass that does not set it, or sets something else
            chosen = error.seconds if is_snooze else error.in_seconds  # type: ignore[attr-defined]
            delay = delay if chosen is None else duration("delay", chosen)
        return Outcome("release" if is_snooze else "fail", retry=True, delay_seconds=delay)
    # guard: an error that retry_on does not name is final
    is_final = entry is not None and not is_limit and not issubclass(kind, entry.retry_on)
    # guard: a result that cannot be stored is final
    is_final = is_final or issubclass(kind, (DoNotRetry, Unstorable))
    return Outcome("fail", retry=not is_final, delay_seconds=delay)


def delay_after(task: pqueue.Task[..., Any], attempts: int) -> float:
    """Return the delay after this many attempts; if the user's function for it fails, log that, and use the default."""
    try:
        return task.retry_in_seconds(attempts)
    except (Exception, SystemExit) as error:
        with _reporting:
            _report_backoff(task.name, summary(error))
        return pqueue.backoff_seconds(attempts, cap_seconds=task.max_backoff_seconds)


_reporting = threading.Lock()  # two threads that call a function of `lru_cache` at the same time would both run it


@lru_cache
def _report_backoff(task: str, error: str) -> None:
    """Log that the function failed: once for each error, as it is called before each attempt."""
    log.warning("backoff of task %s raised %s; the default delay is used", task, error)


def encoded_result(result: Any) -> Encoded | None:
    """Return the result as JSON at this moment: another task may change the object. Raises Unstorable."""
    try:
        return None if result is None else Encoded(encode_json("result", result))
    except ValueError as error:
        raise Unstorable(f"{error}; the task had ended, and is not run again") from None


def settle(
    queue: PersistentQInterface, job: Job, error: BaseException | None, result: Any, *, now: float | None = None
) -> BaseException | None:
    """Do what a consumer does after a task, unless the task has settled its job; return the error, if any."""
    with suppress(LeaseLost):
        if error is None:
            try:
                queue.complete(job, encoded_result(result), now=now)
            except Unstorable as unstorable:
                error = unstorable
        if error is not None:
            outcome_of(error, job).settle(queue, job, error_text(error), now=now)
    return error


def error_text(error: BaseException) -> str:
    """Return the type and the message in one line, then the tracebacks, of the error and of what caused it.

    It has at most MAX_ERROR_CHARS characters; what is too long is cut in its middle. Never raises an exception of the
    error's own code.
    """
    if type(error) is Unstorable:
        return summary(error)
    try:
        found = traceback.TracebackException.from_exception(error, limit=-MAX_FRAMES, compact=True)
        _without_our_frames(found)
        trace = "".join(found.format())
    except BaseException as broken:
        trace = f"(its traceback cannot be shown: {name_of(broken)})\n"
    first = summary(error)
    return cut(f"{first}\n{trace}".rstrip(), MAX_ERROR_CHARS)


def summary(error: BaseException) -> str:
    """Return the type and the message of an error; the first line of it identifies the error in lists."""
    try:
        message = str(error)
    except BaseException as broken:
        message = f"(its message cannot be shown: __str__ raised {name_of(broken)})"
    kind = "" if type(error) is Unstorable else f"{name_of(error)}: "
    return cut(f"{kind}{message}", MAX_SUMMARY_CHARS)


def trace_of(error: BaseException) -> Any:
    """Return the traceback, also of an error that defines `__traceback__` otherwise."""
    return vars(BaseException)["__traceback__"].__get__(error)


def name_of(error: BaseException) -> str:
    """Return the name of the type, also of one whose metaclass defines `__name__` otherwise."""
    return str(vars(type)["__name__"].__get__(type(error)))


def cut(text: str, most: int) -> str:
    """Return the text, without some of its middle if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    mark = (
        f"\n… {len(text) - most:,} more characters …\n" if "\n" in text[:most] else f" … {len(text) - most:,} more … "
    )
    last = min(LAST_CHARS, most // 2)
    return f"{text[: most - last - len(mark)]}{mark}{text[-last:]}"


def _without_our_frames(found: traceback.TracebackException) -> None:
    """Remove our frames from a traceback, from those of its causes, and from those of the members of a group."""
    left, seen, ours = [found], set[int](), _ours()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        each.stack = traceback.StackSummary.from_list([frame for frame in each.stack if frame.filename not in ours])
        inner = [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]
        left += [other for other in inner if other is not None]


def _ours() -> frozenset[str]:
    return frozenset(str(sys.modules[name].__file__) for name in OURS if name in sys.modules)
