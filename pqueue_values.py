"""Values of a queue: errors, the job, JSON, and the arguments that verbs accept."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

MAX_ID = 2**63 - 1
MAX_PAYLOAD_BYTES = 1_048_576
MAX_JSON_DEPTH = 100  # Python's parser gives up near 1000, less what its caller has used
MAX_ERROR_CHARS = 10_000
MAX_TEXT_CHARS = 1000  # of a text to search for

Params = dict[str, Any]
NO_PARAMS: Params = {}


class QueueError(Exception):
    """The base of all errors of the queue."""


class LeaseLost(QueueError):
    """The job was taken back or given to another consumer: drop its work, or let `transaction` roll it back."""


class JobNotFound(QueueError):
    """There is no job with this id: it was pruned, deleted, or never enqueued."""


class InvalidTransition(QueueError):
    """The state of the job does not allow this change."""


class QueueBusy(QueueError):
    """Another writer kept the database locked for longer than `busy_seconds`. Try again."""


class QueueFull(QueueError):
    """The queue has `max_pending` pending jobs, or its disk is full. Try again when there is room."""


class SchemaMismatch(QueueError):
    """The file is not a queue that this version can work with."""


class DatabaseReplaced(QueueError):
    """The database was moved, replaced, or its log deleted while it was open. Nothing more can be written: restart."""


class DoNotRetry(Exception):
    """Raise it in a task when another attempt would fail as well: the job is `failed` at once."""


class Job(NamedTuple):
    """A job as it was when it was read.

    `payload` and `result` are values decoded from JSON. The fields `..._at` are Unix seconds; `progress` is 0 to 1.
    `consumer` runs the job, or ran it last; `assigned_to` is the only one that may run it. `error` is that of the last
    attempt that failed. None stands for what does not exist (yet): a lease only while the state is "processing", a
    `started_at` from the first attempt, a `finished_at` once the job is completed, failed or cancelled.
    """

    id: int
    queue: str
    task: str
    payload: Any
    state: str
    priority: int
    run_at: float
    attempts: int
    max_attempts: int
    key: str | None
    assigned_to: str | None
    consumer: str | None
    lease_token: str | None
    lease_expires_at: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: float | None
    result: Any
    error: str | None


to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def encode_result(result: Any) -> str | None:
    return None if result is None else encode_json("result", result)


def encode_json(what: str, value: Any) -> str:
    """Return the JSON text that is stored. Raises ValueError, saying what it was."""
    try:
        text = to_json(value)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a {what} that JSON can hold, got a {type(value).__name__}: {error}") from None
    if size > MAX_PAYLOAD_BYTES:
        raise ValueError(f"expected a {what} of at most {MAX_PAYLOAD_BYTES} bytes of JSON, got {size}")
    if _is_too_deep(text, value):
        raise ValueError(f"expected a {what} nested at most {MAX_JSON_DEPTH} deep")
    if "{" in text:
        _expect_text_keys(what, value)
    return text


def _expect_text_keys(what: str, value: Any) -> None:
    """Raise ValueError for a key that is no string: JSON would make it one, and perhaps the same as another key."""
    for key in value if isinstance(value, dict) else ():
        # guard: a key is a string
        if not isinstance(key, str):
            raise ValueError(f"expected a {what} whose keys are all strings, got the key {short(key)}")
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, (dict, list, tuple)):
            _expect_text_keys(what, each)


def encode_payloads(payloads: list[Any]) -> str:
    """Return a JSON array with an array for each payload: of all together, unless one may be too large or too deep."""
    with suppress(TypeError, ValueError, RecursionError):
        text = to_json([[payload] for payload in payloads])
        nests = text.count("[") + text.count("{") > MAX_JSON_DEPTH + len(payloads)
        if len(text.encode()) <= MAX_PAYLOAD_BYTES and not (nests and _depth(payloads) > MAX_JSON_DEPTH):
            if "{" in text:
                _expect_text_keys("payload", payloads)
            return text
    return "[" + ",".join(f"[{encode_json('payload', payload)}]" for payload in payloads) + "]"


def _is_too_deep(text: str, value: Any) -> bool:
    return text.count("[") + text.count("{") > MAX_JSON_DEPTH and _depth(value) > MAX_JSON_DEPTH


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (list, tuple, dict))]:
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


_from_json = json.JSONDecoder().decode


class Excerpt(str):
    """The beginning of an error, or of the JSON text of a payload or a result, that was too long to be read whole.

    Also the whole JSON text of a payload or a result that only another program can have stored: one that is nested
    deeper than `MAX_JSON_DEPTH`, or that Python's parser refuses.
    """

    __slots__ = ()


def read_json(text: str) -> Any:
    """Return the value; or, of JSON that the database accepts but Python does not, the text as an `Excerpt`."""
    try:
        value = _from_json(text)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits; nested about a thousand deep
        return Excerpt(text)
    return Excerpt(text) if _is_too_deep(text, value) else value


def to_job(row: Sequence[Any], read: Callable[[str], Any] = read_json) -> Job:
    fields = list(row)
    fields[3] = read(row[3])
    if row[18] is not None:
        fields[18] = read(row[18])
    return Job._make(fields)


def to_excerpt(row: Sequence[Any], most: int | None) -> Job:
    if most is None:
        return to_job(row)
    if most == 0:
        return to_job(row, lambda _: None)._replace(error=None)
    job = to_job(row, lambda text: Excerpt(text[:most]) if len(text) > most else read_json(text))
    return job._replace(error=Excerpt(job.error[:most])) if job.error and len(job.error) > most else job


def valid_name(what: str, value: str) -> str:
    if isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable():
        return value
    article = "an" if what == "operator" else "a"
    raise ValueError(f"expected {article} {what} name of 1 to 255 printable characters, got {short(value)}")


def valid_int(what: str, least: int, value: int, most: int = 2**31 - 1) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise ValueError(f"expected {what} to be a whole number from {least} to {most}, got {short(value)}")


def finite(what: str, value: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"expected {what} to be a finite number of seconds, got {short(value)}")


def valid_lease(seconds: float) -> float:
    if finite("lease_seconds", seconds) > 0:
        return seconds
    raise ValueError(f"expected lease_seconds above 0, got {seconds!r}")


def valid_id(job_id: int) -> int:
    return valid_int("job id", 0, job_id, MAX_ID)


def valid_filter(what: str, value: str, most: int) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {what} to be a text, got {short(value)}")
    if len(value) > most:
        raise ValueError(f"expected {what} to be at most {most:,} characters, got {len(value):,}")
    if "\0" in value and what != "text":
        raise ValueError(f"expected {what} to be printable, got {short(value)}")  # PostgreSQL cannot look for it
    return value


def valid_state(states: Sequence[str], state: str) -> str:
    if state in states:
        return state
    raise ValueError(f"expected a state of {', '.join(states)}, got {short(state)}")


def ids_up_to(last: int, number: int) -> list[int]:
    return list(range(last - number + 1, last + 1))


def short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of more digits than Python prints, a nest of lists
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def error_text(error: str) -> str:
    text = str(error)[:MAX_ERROR_CHARS].replace("\0", "\\x00")  # which PostgreSQL cannot store
    return text.encode("utf-8", "backslashreplace").decode()


def operator_name(by: str | None) -> str:
    if by is not None:
        return valid_name("operator", by)
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user need not have an account
        return f"uid {os.getuid()}" if hasattr(os, "getuid") else "unknown"


def file_path(path: str | os.PathLike[str]) -> Path:
    """Return the path, absolute. Raises ValueError for what would make a file of a name that nobody meant."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise ValueError(f"expected a path as str or Path, got {short(path)}")
    if text == ":memory:":
        raise ValueError(
            "expected a path, got ':memory:': a queue is a file; for a test, use one in a temporary folder"
        )
    if text.startswith("~"):
        raise ValueError("expected a path without ~, got ~…: write it out, or use os.path.expanduser")
    if text.lower().startswith(("file:", "sqlite:")):
        raise ValueError(f"expected a path or sqlite:///PATH, got {text.partition(':')[0]}:…")
    return Path(text).absolute()
