"""Errors, the job, JSON encoding, and validation of arguments."""

from __future__ import annotations

import copyreg
import getpass
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from pqueue import PersistentQInterface

if sys.version_info < (3, 10):  # noqa: UP036 - a copied file has no installer that looks at it
    raise ImportError(f"pqueue: expected Python 3.10 or newer, got {sys.version.split()[0]}")

MAX_ID = 2**63 - 1
MAX_SECONDS = 1e12  # of a time or a duration: their sums are finite, and exact to a millisecond
DEFAULT_MAX_ATTEMPTS = 3
MAX_PAYLOAD_BYTES = 1_048_576
MAX_NUMBER = 2**31 - 1  # of priorities, attempts and the like
MAX_JSON_DEPTH = 100  # Python's parser fails near 1000, less the depth of the call stack
MAX_ERROR_CHARS = 10_000
MAX_GROUP_CHARS = 128
MAX_TEXT_CHARS = 1000  # of the text of a search

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)")

EXPIRED = "expired"  # how the error of a job begins that was not started in time

Params = dict[str, Any]
NO_PARAMS: Params = {}


def _reduced(error: Exception) -> tuple[Any, ...]:
    """Let an exception be pickled and copied although its constructor takes other arguments than its message."""
    return copyreg.__newobj__, (type(error), *error.args), vars(error)  # type: ignore[attr-defined]


class QueueError(Exception):
    """The base class of the queue's errors."""


class LeaseLost(QueueError):
    """This consumer no longer holds the lease: discard the work, or let `transaction` roll it back."""


class JobNotFound(QueueError):
    """There is no job with this id: it was pruned, deleted, or never enqueued."""


class JobFailed(QueueError):
    """The job whose result was asked for is failed or cancelled.

    job: the `Job`. state: "failed" or "cancelled". error: that of the last failed attempt, or None.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.state, self.error = job, job.state, job.error
        what = "was cancelled" if job.state == "cancelled" else job.state
        lines = (job.error or "").strip().splitlines()
        super().__init__(f"job {job.id} ({job.task}) {what}{f': {lines[0]}' if lines else ''}")

    __reduce__ = _reduced


class QueueNotFound(QueueError):
    """There is no queue at this path or URL."""


class InvalidTransition(QueueError):
    """The state of the job does not allow this change."""


class QueueBusy(QueueError):
    """Another writer held the lock for longer than `busy_seconds`. Try again."""


class NoConnection(QueueBusy):
    """The server has no connection left, and this process has none."""


class QueueFull(QueueError):
    """The queue has `max_pending` pending jobs, or the disk is full. Try again later."""


class SchemaMismatch(QueueError):
    """The file is not a queue that this version can work with."""


class DatabaseReplaced(QueueError):
    """The open database was moved or replaced, or its log deleted. It can no longer be written: restart."""


class DoNotRetry(Exception):
    """Raise this in a task if another attempt would fail, too: the job becomes `failed` at once."""


class Retry(Exception):
    """Raise this in a task to end the attempt and to choose the delay before the next, whatever its `retry_on` says.

    in_seconds: the delay, also a timedelta; None: the backoff of the task.
    """

    def __init__(self, in_seconds: float | timedelta | None = None, message: str = "") -> None:
        self.in_seconds = None if in_seconds is None else _delay("in_seconds", in_seconds)
        super().__init__(message or ("" if in_seconds is None else f"in {self.in_seconds:g} s"))

    __reduce__ = _reduced


class Snooze(Exception):
    """Raise this in a task to run its job again after this many seconds (or timedelta); the attempt does not count."""

    def __init__(self, seconds: float | timedelta, message: str = "") -> None:
        self.seconds = _delay("seconds", seconds)
        super().__init__(message or f"for {self.seconds:g} s")

    __reduce__ = _reduced


class _Job(NamedTuple):
    id: int
    queue: str
    task: str
    payload: object
    state: str
    priority: int
    run_at: float
    expires_at: float | None
    attempts: int
    max_attempts: int | None
    key: str | None
    key_until: str | None
    key_expires_at: float | None
    assigned_to: str | None
    consumer: str | None
    lease_token: str | None
    lease_expires_at: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: float | None
    result: object
    error: str | None
    meta: object
    group: str | None
    waits_for: int
    has_dependents: int


class Job(_Job):
    """A job, as of when it was read.

    `payload` and `result` are decoded JSON. Fields named `..._at` are Unix seconds; `progress` is 0 to 1. `consumer` is
    the current or last consumer of the job; `assigned_to` the only one that may run it; `error` that of the last failed
    attempt. `max_attempts` is None, that of the task, until the first delivery of a job that was enqueued without it.
    A job that does not start before `expires_at` is cancelled. `key_until` and `key_expires_at` say how long the job
    holds its key: see `enqueue`. The lease is None unless the state is "processing"; `started_at` is None until the
    first attempt, and `finished_at` until the job is completed, failed or cancelled. `meta` is a dict of what functions
    marked `@metadata` returned when it was enqueued; None: nothing. `group` is its group within the queue; None: none.
    `waits_for` is the number of unfinished jobs for which it waits; `has_dependents` is 1 if jobs were enqueued that
    run after it, else 0.
    """

    __slots__ = ()
    if TYPE_CHECKING:  # With Any in the tuple itself, mypy would not choose among overloads for functions of a Job.

        @property
        def payload(self) -> Any: ...

        @property
        def result(self) -> Any: ...

        @property
        def meta(self) -> dict[str, Any] | None: ...

    @property
    def results(self) -> dict[int, Any]:
        """The results of the completed jobs that this one runs after, as JSON values, by id. Each use reads them.

        Only for its own task, while that runs: elsewhere, it raises QueueError; see the queue's `dependencies`.
        """
        from pqueue_tasks import current_queue

        found = current_queue().dependencies(self.id)
        return {job.id: job.result for job in found if job.state == "completed"}


T = TypeVar("T")
R = TypeVar("R", covariant=True)  # noqa: PLC0105 - the result of a job


class JobId(int, Generic[R]):
    """The id of a job, as `enqueue` returns it: an int that knows its queue. Pickled or copied, it is a plain int.

    `is_new` is False if `enqueue` stored no job because another one holds the key.
    """

    is_new: bool = True
    _queue: PersistentQInterface  # a strong reference: `open_queue().enqueue(…)` keeps its queue

    @classmethod
    def of_queue(cls, queue: PersistentQInterface, ids: Sequence[int], *, is_new: bool = True) -> list[JobId[Any]]:
        found: list[JobId[Any]] = []
        for number in ids:
            job_id: JobId[Any] = cls(number)  # without __init__, which would cost more
            job_id._queue = queue
            if not is_new:
                job_id.is_new = False
            found.append(job_id)
        return found

    def result(self, timeout_seconds: float | timedelta | None = None) -> R:
        """Wait until the job has finished, and return its result: see `PersistentQInterface.result`."""
        return cast(R, self._queue.result(self, timeout_seconds=timeout_seconds))

    async def aresult(self, timeout_seconds: float | timedelta | None = None) -> R:
        """Do what `result` does, without blocking the event loop."""
        return cast(R, await self._queue.aresult(self, timeout_seconds=timeout_seconds))

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


PAYLOAD, RESULT, META, GROUP = (Job._fields.index(name) for name in ("payload", "result", "meta", "group"))

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Encoded(str):
    """A result that has been encoded as JSON already."""

    __slots__ = ()


def encode_result(result: Any) -> str | None:
    return result if result is None or type(result) is Encoded else encode_json("result", result)


def encode_json(what: str, value: Any, form: Any = None) -> str:
    """Return the JSON text of the value or, if given, of `form`, which holds the same values in another structure.
    Raises ValueError, which names `what`."""
    try:
        text = to_json(value if form is None else form)
        size = len(text) if text.isascii() else len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a {what} that JSON can hold, got {type(value).__name__}: {error}") from None
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"expected a {what} of at most {MAX_PAYLOAD_BYTES} bytes of JSON, got {size}")
    if _is_too_deep(text, value):
        raise ValueError(f"expected a {what} nested at most {MAX_JSON_DEPTH} deep")
    if "{" in text:
        _expect_text_keys(what, value)
    return text


def _expect_text_keys(what: str, value: Any) -> None:
    """Raise ValueError for a key that is not a string: JSON would make it one, perhaps equal to another key."""
    for key in value if isinstance(value, dict) else ():
        # guard: a key is a string
        if not isinstance(key, str):
            raise ValueError(f"expected a {what} whose keys are all strings, got the key {short(key)}")
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, (dict, list, tuple)):
            _expect_text_keys(what, each)


def encode_payloads(payloads: list[Any]) -> str:
    """Return a JSON array of [payload] arrays. Encodes all at once unless one may be too large or too deep."""
    with suppress(ValueError):
        return encode_json("payload", payloads, [[payload] for payload in payloads])
    return "[" + ",".join(f"[{encode_json('payload', payload)}]" for payload in payloads) + "]"


def _is_too_deep(text: str, value: Any) -> bool:
    return text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(value) > MAX_JSON_DEPTH


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (list, tuple, dict))]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


_decoder = json.JSONDecoder()


class Excerpt(str):
    """The beginning of an error, or of the JSON text of a payload or a result, that was cut at a limit.

    Also the whole JSON text of one that another program stored and that Python cannot decode, or that is nested deeper
    than `MAX_JSON_DEPTH`.
    """

    __slots__ = ()


def read_json(text: str) -> Any:
    """Return the decoded value, or the text as an `Excerpt` if Python cannot decode it."""
    try:
        value = _from_json(text)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; nested too deep
        return Excerpt(text)
    return Excerpt(text) if _is_too_deep(text, value) else value


def _from_json(text: str) -> Any:
    try:
        value, end = _decoder.raw_decode(text)  # takes half as long as decode, and accepts no spaces around
    except ValueError:
        end = -1
    return value if end == len(text) else _decoder.decode(text)


def to_job(row: Sequence[Any], read: Callable[[str], Any] = read_json) -> Job:
    fields = list(row)
    fields[PAYLOAD] = read(row[PAYLOAD])
    if row[RESULT] is not None:
        fields[RESULT] = read(row[RESULT])
    if row[META] is not None:
        fields[META] = read_json(row[META])
    fields[GROUP] = row[GROUP] or None
    return Job(*fields)


def to_excerpt(row: Sequence[Any], most: int | None) -> Job:
    if most is None:
        return to_job(row)
    if most == 0:
        return to_job(row, lambda _: None)._replace(error=None)
    job = to_job(row, lambda text: Excerpt(text[:most]) if len(text) > most else read_json(text))
    return job._replace(error=Excerpt(job.error[:most])) if job.error and len(job.error) > most else job


def valid_name(what: str, value: str, most: int = 255) -> str:
    # guard: a name is not blank
    if isinstance(value, str) and 0 < len(value) <= most and value.isprintable() and not value.isspace():
        return value
    name = f"{'an' if what == 'operator' else 'a'} {what} name"
    raise ValueError(f"expected {name} of 1 to {most} printable characters, not only spaces, got {short(value)}")


def due_time(delay_seconds: float | timedelta, run_at: float | datetime | None, now: float) -> float:
    """Return when a job is due, in Unix seconds. Raises ValueError if both a delay and a time are given."""
    if run_at is None:
        return now + duration("delay_seconds", delay_seconds)
    if delay_seconds:
        raise ValueError(f"expected delay_seconds or run_at, got both: {short(delay_seconds)} and {short(run_at)}")
    return time_of("run_at", run_at)


def valid_list(what: str, values: Iterable[T]) -> list[T]:
    """Return the elements. Raises ValueError also for a text or a dict: of its characters or keys, few are meant."""
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping)):
        return list(values)
    raise ValueError(f"expected a list of {what}, got {short(values)}")


def valid_job(job: Job) -> Job:
    if isinstance(job, Job):
        return job
    raise ValueError(f"expected a job that was dequeued, got {short(job)}")


def valid_int(what: str, least: int, value: int, most: int = MAX_NUMBER) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"expected {what} to be a whole number from {least} to {most}, got {short(value)}")


def valid_priority(value: int) -> int:
    return valid_int("priority", -MAX_NUMBER - 1, value)


def valid_number(what: str, least: float, value: float, most: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"expected {what} between {least:g} and {most:g}, got {short(value)}")


def valid_wait(what: str, value: float) -> float:
    """Return a number of seconds that a database can wait: it has 31 bits for the milliseconds."""
    return valid_number(what, 0, value, MAX_NUMBER // 1000)


def finite(what: str, value: float, other: str = "") -> float:
    # guard: a sum of times does not overflow
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_SECONDS:
        return float(value)
    most = f"{MAX_SECONDS:g}{other}"
    raise ValueError(f"expected {what} to be a finite number of seconds, at most {most}, got {short(value)}")


def duration(what: str, value: float | timedelta) -> float:
    """Return a number of seconds."""
    return finite(what, value.total_seconds() if isinstance(value, timedelta) else value, ", or a timedelta")


def seconds_in(text: str) -> float:
    """Parse 90s, 15m, 12h, 7d or 2w into seconds. Raises ValueError."""
    if match := DURATION.fullmatch(text.strip()):
        return finite("a duration", float(match[1]) * UNITS[match[2]])
    raise ValueError(f"expected a duration such as 90s, 15m, 12h, 7d or 2w, got {short(text)}")


def interval(seconds: float) -> str:
    """Return a duration that somebody has set, exactly, in its largest unit: 90 s, 15 min, 36 h."""
    unit = next((unit for unit in ("d", "h", "m") if seconds >= UNITS[unit] and seconds % UNITS[unit] == 0), "s")
    return f"{seconds / UNITS[unit]:.15g} {'min' if unit == 'm' else unit}"


def long_duration(what: str, value: str | float | timedelta) -> float:
    """Return a number of seconds; also of a text such as "7d"."""
    return seconds_in(value) if isinstance(value, str) else at_least_0(what, value)


def at_least_0(what: str, value: float | timedelta) -> float:
    """Return a number of seconds."""
    if (seconds := duration(what, value)) >= 0:
        return seconds
    raise ValueError(f"expected {what} to be a duration of 0 or more, got {short(value)}")


def _delay(what: str, value: float | timedelta) -> float:
    return max(0.0, duration(what, value))


def time_of(what: str, value: float | datetime) -> float:
    """Return a time as Unix seconds."""
    if not isinstance(value, datetime):
        return finite(what, value, ", or a datetime with a time zone")
    # guard: a time has a zone
    if value.utcoffset() is None:
        raise ValueError(f"expected {what} with a time zone, such as datetime.now(timezone.utc), got {short(value)}")
    return value.timestamp()


def above_0(what: str, value: float | timedelta) -> float:
    if (number := duration(what, value)) > 0:
        return number
    raise ValueError(f"expected {what} above 0, got {short(value)}")


def valid_id(job_id: int) -> int:
    return valid_int("job id", 0, job_id, MAX_ID)


def valid_filter(what: str, value: str, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {what} to be a text, got {short(value)}")
    if len(value) > most:
        raise ValueError(f"expected {what} to be at most {most:,} characters, got {len(value):,}")
    if what != "text" and re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"expected {what} to be printable, got {short(value)}")  # no database can compare it
    return value


def valid_state(states: Sequence[str], state: str) -> str:
    if state in states:
        return state
    raise ValueError(f"expected a state of {', '.join(states)}, got {short(state)}")


def ids_up_to(last: int, number: int) -> list[int]:
    return list(range(last - number + 1, last + 1))


def quoted_name(name: str) -> str:
    """Return the name of a table, a column or a trigger as SQL has it."""
    return '"' + name.replace('"', '""') + '"'


def short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of too many digits, lists nested too deep
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


TRACEBACK = re.compile(  # in the first line; that of another process begins with a blank line and quotes
    r'(?:\s*\n)?(?:"""\r?\n)?(.{0,2000}?)(?:  \+ Exception Group )?Traceback \(most recent call last\):\r?\n'
)
EXCEPTION = re.compile(  # the line after the frames of the last traceback
    r"(?s:.*)Traceback \(most recent call last\):\r?\n(?: (?! \| \S).*\n)*(?:  \| )?(\S.*)"
)


def error_text(error: str) -> str:
    """Return the text to store. If a traceback begins in its first line, by which failures are grouped and shown, put
    one with the exception before it. Raises ValueError for anything but a text."""
    if not isinstance(error, str):
        raise ValueError(f"expected error to be a text, got {short(error)}")
    if (first := TRACEBACK.match(error)) and (found := EXCEPTION.match(error)):
        error = f"{first[1]}{found[1]}\n{error}"
    text = error[:MAX_ERROR_CHARS].replace("\0", "\\x00")  # PostgreSQL cannot store it
    return text.encode("utf-8", "backslashreplace").decode()


def operator_name(by: str | None) -> str:
    if by is not None:
        return valid_name("operator", by)
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a user of a container may have no account
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def file_path(path: str | os.PathLike[str]) -> Path:
    """Return the absolute path. Raises ValueError for text that is probably not meant as a file name."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ValueError(f"expected a path as str or Path, got {short(path)}")
    if not text.strip() or "\0" in text:
        raise ValueError(f"expected a path, got {short(text)}")
    if text.endswith(("/", "/.")):
        raise ValueError("expected a path of a file, got one that ends as that of a folder")  # it may be a mistyped URL
    if text == ":memory:":
        raise ValueError(
            "expected a path, got ':memory:': a queue is a file; for a test, use one in a temporary folder"
        )
    if text.startswith("~"):
        raise ValueError("expected a path without ~, got ~…: write it out, or use os.path.expanduser")
    if text.lower().startswith(("file:", "sqlite:")):
        raise ValueError(f"expected a path or sqlite:///PATH, got {text.partition(':')[0]}:…")
    try:
        os.fsencode(text)
        return Path(text).absolute()
    except UnicodeEncodeError:
        raise ValueError(f"expected a path, got {short(text)}") from None
    except FileNotFoundError:
        raise QueueError(f"cannot find {text}: the current folder was deleted; name an absolute path") from None


def no_queue(name: object) -> QueueError:
    return QueueNotFound(f"no queue at {name}: start a producer or a consumer, or check the path or PQUEUE_URL")


def program_name(program: str) -> str:
    """Return the name of a program as the user calls it: consumer.py in a checkout, pqueue-consumer if installed."""
    if Path(__file__).with_name("pqueue_tools").exists():  # not in the wheel, which makes a package of this module
        return f"{program}.py"
    return "pqueue" if program == "admin" else f"pqueue-{program}"


def command_line(program: str = "admin") -> str:
    """Return how to run a program from the current folder: python3 consumer.py, python3 PATH or pqueue-consumer."""
    name = program_name(program)
    if not name.endswith(".py"):
        return name
    return f"python3 {shlex.quote(_from_here(name))}"


def _from_here(name: str) -> str:
    path = Path(__file__).absolute().with_name(name)
    return name if os.path.exists(name) and path.samefile(name) else str(path)
