"""Reading jobs: single jobs, searches, counts and timings."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

if TYPE_CHECKING:
    from typing_extensions import Unpack

import pqueue_schema
from pqueue_backend import Backend
from pqueue_schema import COLUMN_OF, COLUMNS, FAILURE_CHARS, INDEXED, STATES, THESE
from pqueue_values import (
    MAX_ID,
    MAX_NUMBER,
    MAX_TEXT_CHARS,
    PAYLOAD,
    Job,
    JobNotFound,
    Params,
    finite,
    read_json,
    short,
    to_excerpt,
    to_job,
    to_json,
    valid_filter,
    valid_id,
    valid_int,
    valid_list,
    valid_state,
)

INDEX_SCAN_JOBS = 100_000  # rows of a state to sort through its index; if it has more, walking by id is faster
OPERATION_ROWS = 10_000  # of the history that `operations` reads
TREND_HOURS = 24  # of a group of failures
WALK_IDS = 1000  # ids scanned between checks of the deadline
TEXT_SCAN_JOBS = 8  # jobs that a text search reads at once: each may have 2 MiB
LONG_COLUMNS = ("payload", "result", "error")


class Filters(TypedDict, total=False):
    """The filters of `list_jobs`. None is like one that is not given."""

    state: str | Sequence[str] | None
    queue: str | None
    group: str | None
    task: str | None
    key: str | None
    consumer: str | None
    text: str | None
    payload: str | None
    fingerprint: str | None
    created_from: float | None
    created_before: float | None
    ids: Sequence[int] | None
    shown: Callable[[Job], Job] | None


class Reading(Backend):
    """The queries of a queue."""

    def get(self, job_id: int) -> Job:
        """Return the job with this id. Raises JobNotFound."""
        rows = self._read(f"SELECT {COLUMNS} FROM jobs WHERE id = :id", {"id": valid_id(job_id)})
        if not rows:
            raise JobNotFound(f"no job {job_id}")
        return to_job(rows[0])

    def history(self, job_id: int, *, limit: int = MAX_NUMBER) -> list[dict[str, Any]]:
        """Return up to `limit` of the job's latest events, oldest first; an empty list for an unknown job.

        Each is a dict: "event", how an attempt ended (failed, expired, died or released) or what an operator did; "at",
        Unix seconds; "actor", the consumer or the operator; "attempt", its number; "error", or None. The attempt that
        completes the job is not recorded. "started_at" is when the attempt began, or None if the event ended none.
        """
        columns = "at, event, actor, attempt, error, started_at"
        last = f"SELECT {columns} FROM history WHERE job_id = :id ORDER BY +id DESC LIMIT :limit"
        return self._dicts(columns, last, {"id": valid_id(job_id), "limit": valid_int("limit", 1, limit)})[::-1]

    def operations(self, *, limit: int = 100) -> list[dict[str, Any]]:
        """Return the latest actions of operators, newest first. A call that changed many jobs is one action.

        Each is a dict: "at", Unix seconds; "actor", the operator; "event", what was done; "jobs", how many were
        changed; "job_id", the first of them, or 0 for none. If there are very many, only the latest are counted.
        """
        params = {"limit": valid_int("limit", 1, limit), "rows": OPERATION_ROWS}
        return self._dicts("at, actor, event, jobs, job_id", pqueue_schema.OPERATIONS, params)

    def unfinished_payloads(self) -> Iterator[Any]:
        """Yield the payload of every job that is unfinished at the first `next`, reading 100 jobs at a time."""
        ids = [row[0] for row in self._read(pqueue_schema.UNFINISHED_IDS)]  # in one statement, as states may change
        for start in range(0, len(ids), 100):
            chosen = ", ".join(map(str, ids[start : start + 100]))
            for row in self._read(f"SELECT payload FROM jobs WHERE id IN ({chosen})"):
                yield read_json(row[0])

    def stats(self) -> dict[str, Any]:
        """Return the numbers of jobs, as a dict:

        "states": a dict from each state to its number of jobs.
        "queues": a dict from each queue to a dict with these numbers, "paused" (bool), "max_pending" and "max_running"
            (int or None), "rate" ((jobs, seconds) or None), and "oldest_pending_at": when its oldest pending job was
            due, in Unix seconds, or None.
        "oldest_pending_at": the minimum over all queues, or None.
        """
        counts = self._read(pqueue_schema.COUNTS)
        unknown = dict.fromkeys(("max_pending", "max_running", "rate", "oldest_pending_at"))
        empty: dict[str, Any] = {**dict.fromkeys(STATES, 0), "paused": False, **unknown}
        queues: dict[str, dict[str, Any]] = {}  # read last, so that no queue of `counts` is missing
        columns = "name, paused, max_pending, max_running, rate_jobs, rate_seconds"
        for name, paused, most, running, jobs, seconds in self._read(f"SELECT {columns} FROM queues ORDER BY name"):
            rate = None if jobs is None else (jobs, seconds)
            queues[name] = {**empty, "paused": bool(paused), "max_pending": most, "max_running": running, "rate": rate}
        for name, state, jobs, oldest in counts:
            queue = queues.setdefault(name, dict(empty))  # unless another program changed jobs.queue
            queue[state] += jobs
            if state == "pending":  # in two rows: those that are assigned, and the others
                known = queue["oldest_pending_at"]
                queue["oldest_pending_at"] = oldest if known is None else min(oldest, known)
        states = {state: sum(queue[state] for queue in queues.values()) for state in STATES}
        waiting = [each["oldest_pending_at"] for each in queues.values() if each["oldest_pending_at"] is not None]
        return {"states": states, "queues": queues, "oldest_pending_at": min(waiting, default=None)}

    def pending_tasks(self) -> dict[tuple[str, str], int]:
        """Return the numbers of pending jobs that are not assigned, by queue and task."""
        return {(queue, name): jobs for queue, name, jobs in self._read(pqueue_schema.PENDING_TASKS)}

    def stalled(self, since: float) -> dict[tuple[str, str], int]:
        """Return what `pending_tasks` does, of the queues that make no progress: a job has been due, and none was
        started or finished, since this time, in Unix seconds."""
        rows = self._read(pqueue_schema.STALLED, {"before": finite("since", since)})
        return {(queue, name): jobs for queue, name, jobs in rows}

    def count_expired(self, before: float) -> int:
        """Return how many `processing` jobs have a lease that ran out before this time, in Unix seconds."""
        return cast(int, self._read(pqueue_schema.EXPIRED_LEASES, {"before": finite("before", before)})[0][0])

    def failures(self, *, now: float | None = None) -> list[dict[str, Any]]:
        """Return the failed jobs grouped by task and `fingerprint` of the error, the last to fail first.

        Each group is a dict: "task"; "error", the fingerprint; "jobs", their number; "last_hour", those that failed
        within an hour; "by_hour", those of each of the last 24 hours, of which the last one has just begun; "last_id",
        the job that failed last; "first_at" and "last_at", when they failed, in Unix seconds.
        """
        groups: dict[tuple[str, str], dict[str, Any]] = {}
        at = self._time(now)
        first = at // 3600 * 3600 - 3600 * (TREND_HOURS - 1)
        for task, line, jobs, last_hour, last_id, first_at, last_at, hours in self._read(
            pqueue_schema.FAILURES, {"since": at - 3600, "first": first}
        ):
            error = fingerprint(line)
            empty = {"task": task, "error": error, "jobs": 0, "last_hour": 0, "last_id": last_id}
            empty |= {"by_hour": [0] * TREND_HOURS, "first_at": first_at, "last_at": last_at}
            group = groups.setdefault((task, error), empty)
            for hour, number in re.findall(r"(\d+):(\d+)", hours or ""):
                group["by_hour"][min(int(hour), TREND_HOURS - 1)] += int(number)
            group["jobs"] += jobs
            group["last_hour"] += last_hour
            group["first_at"] = min(group["first_at"], first_at)
        return list(groups.values())

    def list_jobs(
        self, *, before_id: int | None = None, limit: int = 100, excerpt: int | None = None, **filters: Unpack[Filters]
    ) -> list[Job]:
        """Return up to `limit` jobs that match all filters given, newest first.

        state, queue, group, task, key, consumer: equal to the job's; the consumer is the current or last one. Several
            states may be given.
        text: contained in the task, payload, result, error or key, regardless of case and Unicode form. Strings in the
            payload or result match with or without JSON escapes.
        payload: a path in the payload and the value there: "customer=7", "address.city=Berlin" or "items.0.id=12". The
            value is compared as JSON, a string also without its quotes.
        fingerprint: that of the job's error, the "error" of a group in `failures`.
        created_from, created_before: enqueued in [created_from, created_before), Unix seconds.
        ids: only these jobs.
        before_id: only jobs with a smaller id. For the next page, pass the id of the last job of this one.
        excerpt: the number of characters to read of each payload, result and error; a longer one is returned as an
            `Excerpt`. With 0, all three are None.
        shown: a function that returns the job as it is displayed; `text` is searched for in that.

        Raises ValueError for a filter of the wrong type or length.
        """
        return self.search_jobs(filters, before_id=before_id, limit=limit, seconds=math.inf, excerpt=excerpt)[0]

    def search_jobs(
        self,
        filters: Filters,
        *,
        before_id: int | None = None,
        limit: int = 100,
        seconds: float = 0.1,
        excerpt: int | None = None,
    ) -> tuple[list[Job], int | None]:
        """Return the jobs that `list_jobs` would, as far as they are found in about `seconds`.

        The second value is the `before_id` to continue with, or None at the end.
        """
        where, params = self._matching(filters)
        params["before_id"] = MAX_ID if before_id is None else valid_int("before_id", 0, before_id, MAX_ID)
        params["limit"] = valid_int("limit", 1, limit)
        most = None if excerpt is None else valid_int("excerpt", 0, excerpt)
        ends_at = time.monotonic() + seconds
        if not _must_read_jobs(params):
            rows, before = self._find(excerpt_columns(most), where, params, ends_at)
            return [to_excerpt(row, most) for row in rows], before
        jobs: list[Job] = []
        for job_id, row in self._with_text(where, params, ends_at):
            if row is not None:
                jobs.append(to_excerpt(row, most))
            if len(jobs) == limit or time.monotonic() >= ends_at:
                return jobs, job_id
        return jobs, None

    def count_jobs(self, **filters: Unpack[Filters]) -> int:
        """Return the number of jobs that match; the filters are those of `list_jobs`."""
        where, params = self._matching(filters)
        if _must_read_jobs(params):
            params |= {"before_id": MAX_ID, "limit": WALK_IDS}
            return sum(1 for _, row in self._with_text(where, params, math.inf) if row is not None)
        conditions = index_conditions(params) or ["1 = 1"]
        counts = " + ".join(f"(SELECT count(*) FROM jobs WHERE {condition} AND {where})" for condition in conditions)
        return cast(int, self._read(f"SELECT {counts}", params)[0][0])

    def _with_text(self, where: str, params: Params, ends_at: float) -> Iterator[tuple[int | None, Any]]:
        """Yield the ids of jobs that may contain the text, newest first, each with its row if it does, else None."""
        load = f"SELECT {COLUMNS} FROM jobs WHERE id {THESE} AND {where}"
        # guard: a job that left its state is not found
        load += f" AND {_in_states(params)}"
        before: int | None = params["before_id"]
        while before is not None:
            span = {**params, "before_id": before, "limit": min(params["limit"], WALK_IDS)}
            rows, before = self._find("id", where, span, ends_at)
            for start in range(0, len(rows), TEXT_SCAN_JOBS):
                ids = [row[0] for row in rows[start : start + TEXT_SCAN_JOBS]]
                read = self._read(load, {**params, "ids": to_json(ids)})
                found = {row[0]: row for row in read if _matches(row, params)}
                last = ids[-1] if before is None or start + TEXT_SCAN_JOBS < len(rows) else before
                yield from ((last if job_id == ids[-1] else job_id, found.get(job_id)) for job_id in ids)
            if not rows:
                yield before, None

    def _find(self, columns: str, where: str, params: Params, ends_at: float) -> tuple[list[Any], int | None]:
        """Return the rows that match all filters but the text, and where to continue, as `search_jobs` does."""
        conditions = index_conditions(params)
        if not conditions:
            return self._walk(columns, where, params, ends_at)
        if not self._are_few(conditions, INDEX_SCAN_JOBS // 10 if _must_read_jobs(params) else INDEX_SCAN_JOBS):
            return self._walk(columns, f"{where} AND {_in_states(params)}", params, ends_at)
        rows = self._newest(columns, "+id", conditions, where, params)  # +: do not use the primary key
        return rows, rows[-1][0] if len(rows) == params["limit"] else None

    def _are_few(self, conditions: list[str], limit: int) -> bool:
        sql = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE {} LIMIT :limit) found"
        found: int = sum(self._read(sql.format(condition), {"limit": limit})[0][0] for condition in conditions)
        return found < limit

    def _walk(self, columns: str, where: str, params: Params, ends_at: float) -> tuple[list[Any], int | None]:
        """Scan all jobs by id, newest first, until the deadline."""
        rows: list[Any] = []
        high, span = params["before_id"], WALK_IDS if ends_at < math.inf else MAX_ID
        while (newest := self._read("SELECT max(id) FROM jobs WHERE id < :high", {"high": high})[0][0]) is not None:
            high = max(0, newest - span + 1)
            window = {**params, "before_id": newest + 1, "low": high, "limit": params["limit"] - len(rows)}
            rows += self._newest(columns, "id", ["id >= :low"], where, window)
            if len(rows) == params["limit"]:
                return rows, rows[-1][0]
            if time.monotonic() >= ends_at:
                return rows, high
        return rows, None

    def _newest(self, columns: str, by: str, conditions: list[str], where: str, params: Params) -> list[Any]:
        ids = " UNION ALL ".join(
            f"SELECT id FROM jobs WHERE {condition} AND {where} AND {by} < :before_id" for condition in conditions
        )
        newest = f"SELECT id FROM ({ids}) found ORDER BY {by} DESC LIMIT :limit"
        rows = self._read(f"SELECT {columns} FROM ({newest}) newest JOIN jobs USING (id)", params)
        return sorted(rows, key=lambda row: -row[0])

    def _matching(self, filters: Filters) -> tuple[str, Params]:
        """Return the condition of all filters but the state, and the parameters of all filters. Raises TypeError for an
        unknown one."""
        if unknown := filters.keys() - Filters.__annotations__.keys():
            raise TypeError(f"expected the filters {', '.join(Filters.__annotations__)}, got {', '.join(unknown)}")
        given: Params = {name: value for name, value in filters.items() if value is not None}
        equal = [name for name in ("queue", "group", "task", "key", "consumer") if name in given]
        params: Params = {name: valid_filter(name, given[name], 255) for name in equal}
        where = ["1 = 1", *(f"{COLUMN_OF[name]} = :{name}" for name in equal)]
        if (state := given.get("state")) is not None:
            states = [state] if isinstance(state, str) else valid_list("states", state)
            if not states:
                raise ValueError("expected one state at least, got none")
            params["state"] = ",".join(sorted({valid_state(STATES, each) for each in states}))
        if "fingerprint" in given:
            params["fingerprint"] = valid_filter("fingerprint", given["fingerprint"], FAILURE_CHARS)
            escaped = re.sub("([!%_])", r"!\1", params["fingerprint"])
            params["like"] = re.sub("[… ]+", "%", f"…{escaped}…")
            where.append(f"coalesce(substr(error, 1, {FAILURE_CHARS}), '') LIKE :like ESCAPE '!'")
        if "text" in given:
            params["text"] = _folded(valid_filter("text", given["text"], MAX_TEXT_CHARS))
            if run := max(ASCII_RUN.findall(params["text"]), key=len, default=""):
                params |= {"run": f"%{run.replace('_', '!_')}%", "escaped": "%\\u%"}
                where.append(f"({' OR '.join(map(self._may_contain, ('task', 'payload', 'result', 'error', 'key')))})")
        if "payload" in given:
            params["path"], params["value"] = path_and_value(given["payload"])
            keys = [each for each in params["path"].split(".") if not each.isdecimal()]
            runs = [run for each in [*keys, params["value"]] for run in ASCII_RUN.findall(_folded(each))]
            params |= {"inside": f"%{'%'.join(runs).replace('_', '!_')}%", "escaped": "%\\u%"}
            where.append(f"({self._may_contain('payload', 'inside')})")
        for name, sign in (("created_from", ">="), ("created_before", "<")):
            if name in given:
                params[name] = finite(name, given[name])
                where.append(f"created_at {sign} :{name}")
        if "ids" in given:
            ids = valid_list("job ids", given["ids"])
            where.append(f"id IN ({', '.join(str(valid_id(job_id)) for job_id in ids) or 'NULL'})")
        params["shown"] = given.get("shown")
        return " AND ".join(where), params

    def _may_contain(self, column: str, parts: str = "run") -> str:
        """Return a condition that is true of every text that may contain the ASCII parts of the search.

        Text with other characters or JSON escapes always passes: `_matches` compares it.
        """
        # guard: a search covers text beyond ASCII
        # guard: a search covers JSON escapes
        return (
            f"{column} {self._LIKE} :{parts} ESCAPE '!' OR {column} LIKE :escaped ESCAPE '!' "
            f"OR {self._BYTES.format(column)} <> length({column})"
        )


def index_conditions(filters: Params) -> list[str]:
    """Return the conditions by which an index finds the jobs of the states; none without a state."""
    if filters.get("state") == "failed" and "task" in filters:
        return ["state = 'failed'"]  # the index that has the task
    return [condition for state in filters.get("state", "").split(",") for condition in INDEXED.get(state, [])]


def _in_states(filters: Params) -> str:
    given = filters.get("state", "")
    return "state IN ('{}')".format(given.replace(",", "', '")) if given else "1 = 1"


def _must_read_jobs(filters: Params) -> bool:
    """Return whether the search must read the jobs: SQL only finds those that may match."""
    return not filters.keys().isdisjoint(("text", "path", "fingerprint"))


# What differs between errors of one kind: quoted text, URLs, paths, values after =, hexadecimal and other numbers. With
# these, a fingerprint contains no password.
VARIABLE = re.compile(
    r"""(?<!\w)(["'`])(?:(?!\1).)*(?:\1|$)|\S*://\S*|(?<==)[^\s,;&]+|(?<![\w.])(?:~|\.\.?)?/[^\s'"]+|[\w.-]+[/\\][\w.-]+[/\\.][^\s'"]*"""
    r"""|\b[A-Za-z]:\\[^\s'"]+|\b(?:0x[0-9a-f]+|(?=[a-f-]*\d)[0-9a-f-]{8,})\b|\d+(?:[.,:]\d+)*""",
    re.IGNORECASE,
)


def fingerprint(error: str | None) -> str:
    """Return the first line of an error, with numbers, quoted text, paths and other variable parts replaced by …"""
    line = (error or "")[:FAILURE_CHARS].split("\n", 1)[0]
    line = VARIABLE.sub("…", "".join(mark if mark.isprintable() else " " for mark in line))
    return re.sub("…+", "…", " ".join(line.split())[: FAILURE_CHARS // 2]) or "…"


def excerpt_columns(most: int | None) -> str:
    if most is None:
        return COLUMNS
    part = f"substr({{0}}, 1, {min(most + 1, MAX_NUMBER)})" if most else "NULL"  # one more shows whether it was cut
    return ", ".join(part.format(name) if name in LONG_COLUMNS else name for name in COLUMN_OF.values())


# Characters that JSON never escapes and that have one Unicode form; spaces only occur within strings.
ASCII_RUN = re.compile(r"[a-z0-9_.@+=*?$&#~^|;()<>'-]+(?: [a-z0-9_.@+=*?$&#~^|;()<>'-]+)*")


def _folded(text: str) -> str:
    """Return the text normalized for a comparison that ignores case and Unicode form."""
    if text.isascii():
        return text.lower()
    import unicodedata

    return unicodedata.normalize("NFC", text.casefold())


_show_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def _matches(row: Sequence[Any], filters: Params) -> bool:
    """Return whether the job has the error and the value in its payload, and contains the text."""
    if "path" in filters and not _has(read_json(row[PAYLOAD]), filters["path"], filters["value"]):
        return False  # early: most jobs do not have it
    job, needle = to_job(row), filters.get("text")
    # guard: a search by error finds one group
    if "fingerprint" in filters and fingerprint(job.error) != filters["fingerprint"]:
        return False
    if filters.keys().isdisjoint(("text", "path")):
        return True
    # guard: a search matches only the displayed text
    job = filters["shown"](job) if filters["shown"] else job
    # guard: a search by a path compares the value there
    if "path" in filters and not _has(job.payload, filters["path"], filters["value"]):
        return False
    return needle is None or _contains(job, needle)


def _contains(job: Job, needle: str) -> bool:
    """Return whether the text is in the JSON of the payload or result, in one of their strings, or in another field."""
    for value in (job.payload, *([] if job.result is None else [job.result])):
        if needle in _folded(_show_json(value)):
            return True
        if ESCAPED.search(needle) and any(needle in _folded(each) for each in _strings(value)):
            return True
    return any(needle in _folded(str(each)) for each in (job.task, job.error, job.key) if each is not None)


def path_and_value(given: str) -> tuple[str, str]:
    """Split the filter `payload` of `list_jobs`. Raises ValueError."""
    path, equals, value = valid_filter("payload", given, MAX_TEXT_CHARS).partition("=")
    if not (path and equals):
        raise ValueError(f"expected a path in the payload and a value, such as customer=7, got {short(given)}")
    return path, value


def _has(value: Any, path: str, wanted: str) -> bool:
    """Return whether the value at this path is the wanted one. Keys may contain dots."""
    head, _, rest = path.partition(".")
    if isinstance(value, dict) and path in value:
        return wanted in (value[path], _show_json(value[path]))
    if isinstance(value, dict) and rest and head in value:
        return _has(value[head], rest, wanted)
    if isinstance(value, list) and head.isdecimal() and int(head) < len(value):
        inner = value[int(head)]
        return _has(inner, rest, wanted) if rest else wanted in (inner, _show_json(inner))
    return False


ESCAPED = re.compile(r'["\\\x00-\x1f]')  # characters that JSON escapes


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value: keys and values."""
    level = [value]
    while level:
        each = level.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            level += [*each, *each.values()]
        elif isinstance(each, list):
            level += each
