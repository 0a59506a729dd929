"""Listing jobs: by state, queue, task, time or text."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pqueue_backend import Backend
from pqueue_schema import COLUMNS, INDEXED, STATES
from pqueue_values import (
    MAX_ID,
    MAX_TEXT_CHARS,
    Job,
    Params,
    finite,
    to_excerpt,
    to_job,
    valid_filter,
    valid_id,
    valid_int,
    valid_state,
)

FEW = 100_000  # jobs of a state that are looked through by its index; more are met soon enough on the way by id
WINDOW = 1000  # ids that a search looks at between two looks at the clock
TOGETHER = 8  # jobs that a search for a text reads whole at once: each may hold 2 MiB
LONG = ("payload", "result", "error")
ANY_OF = ", ".join(f":id{n}" for n in range(TOGETHER))


class Search(Backend):
    """Lists jobs."""

    def list_jobs(
        self,
        *,
        before_id: int | None = None,
        limit: int = 100,
        excerpt: int | None = None,
        shown: Callable[[Job], Job] | None = None,
        **filters: Any,
    ) -> list[Job]:
        """Return the jobs that match, newest first; page by the last id seen.

        Filters: state, queue, task, key, consumer; text, that the payload, result, error or key contains as people read
        it, in any case; created_from and created_before, Unix seconds; ids, of these jobs only.
        excerpt: read at most so many characters of each payload, result and error; of a longer one return an `Excerpt`.
        With 0, do not read them: all three are None.
        shown: what the reader sees of a job, which is less than all: `text` finds nothing that this has removed.
        """
        return self.search_jobs(
            before_id=before_id, limit=limit, seconds=math.inf, excerpt=excerpt, shown=shown, **filters
        )[0]

    def search_jobs(
        self,
        *,
        before_id: int | None = None,
        limit: int = 100,
        seconds: float = 0.1,
        excerpt: int | None = None,
        shown: Callable[[Job], Job] | None = None,
        **filters: Any,
    ) -> tuple[list[Job], int | None]:
        """Return what `list_jobs` does, as far as it is found in about so many seconds, and the id before which to
        go on, or None when there is no more."""
        where, params = self._matching(**filters)
        params["before_id"] = MAX_ID if before_id is None else valid_int("before_id", 0, before_id, MAX_ID)
        params["limit"] = valid_int("limit", 1, limit)
        most = None if excerpt is None else valid_int("excerpt", 0, excerpt)
        ends_at = time.monotonic() + seconds
        if "text" not in params:
            rows, before = self._find(excerpt_columns(most), where, params, ends_at)
            return [to_excerpt(row, most) for row in rows], before
        jobs: list[Job] = []
        for job_id, row in self._with_text(shown, where, params, ends_at):
            if row is not None:
                jobs.append(to_excerpt(row, most))
            if len(jobs) == limit or time.monotonic() >= ends_at:
                return jobs, job_id
        return jobs, None

    def _with_text(
        self, shown: Callable[[Job], Job] | None, where: str, params: Params, ends_at: float
    ) -> Iterator[tuple[int, Any]]:
        """Yield the ids of the jobs that may hold the text, newest first, each with its row if it does, else None."""
        load = f"SELECT {COLUMNS} FROM jobs WHERE id IN ({ANY_OF}) AND {where}"
        # guard: a job that left its state is not found
        load += " AND state = :state" if "state" in params else ""
        before: int | None = params["before_id"]
        while before is not None:
            span = {**params, "before_id": before, "limit": min(params["limit"], WINDOW)}
            rows, before = self._find("id", where, span, ends_at)
            for start in range(0, len(rows), TOGETHER):
                ids = [row[0] for row in rows[start : start + TOGETHER]]
                named = {f"id{n}": ids[min(n, len(ids) - 1)] for n in range(TOGETHER)}
                found = {
                    row[0]: row for row in self._read(load, {**params, **named}) if _holds(row, params["text"], shown)
                }
                yield from ((job_id, found.get(job_id)) for job_id in ids)
            if before is not None:
                yield before, None

    def _find(self, columns: str, where: str, params: Params, ends_at: float) -> tuple[list[Any], int | None]:
        """Return the rows of jobs that match without regard to the text, as `search_jobs` does."""
        places = index_conditions(params)
        if not places:
            return self._walk(columns, where, params, ends_at)
        if not self._are_few(places, FEW // 10 if "text" in params else FEW):
            return self._walk(columns, f"{where} AND state = :state", params, ends_at)
        rows = self._newest(columns, "+id", places, where, params)  # +: not by walking through all jobs
        return rows, rows[-1][0] if len(rows) == params["limit"] else None

    def _are_few(self, places: list[str], limit: int) -> bool:
        sql = "SELECT count(*) FROM (SELECT 1 FROM jobs WHERE {} LIMIT :limit) found"
        found: int = sum(self._read(sql.format(place), {"limit": limit})[0][0] for place in places)
        return found < limit

    def _walk(self, columns: str, where: str, params: Params, ends_at: float) -> tuple[list[Any], int | None]:
        """Go through all jobs, the newest first, with a look at the clock at times."""
        rows: list[Any] = []
        high, span = params["before_id"], WINDOW if ends_at < math.inf else MAX_ID
        while (newest := self._read("SELECT max(id) FROM jobs WHERE id < :high", {"high": high})[0][0]) is not None:
            high = max(0, newest - span + 1)
            window = {**params, "before_id": newest + 1, "low": high, "limit": params["limit"] - len(rows)}
            rows += self._newest(columns, "id", ["id >= :low"], where, window)
            if len(rows) == params["limit"]:
                return rows, rows[-1][0]
            if time.monotonic() >= ends_at:
                return rows, high
        return rows, None

    def _newest(self, columns: str, by: str, places: list[str], where: str, params: Params) -> list[Any]:
        ids = " UNION ALL ".join(
            f"SELECT id FROM jobs WHERE {place} AND {where} AND {by} < :before_id" for place in places
        )
        newest = f"SELECT id FROM ({ids}) found ORDER BY {by} DESC LIMIT :limit"
        rows = self._read(f"SELECT {columns} FROM ({newest}) newest JOIN jobs USING (id)", params)
        return sorted(rows, key=lambda row: -row[0])

    def _matching(
        self,
        *,
        state: str | None = None,
        queue: str | None = None,
        task: str | None = None,
        key: str | None = None,
        consumer: str | None = None,
        text: str | None = None,
        created_from: float | None = None,
        created_before: float | None = None,
        ids: Sequence[int] | None = None,
    ) -> tuple[str, Params]:
        """Return the condition of these filters but the state, and the parameters of all."""
        equal = {"queue": queue, "task": task, "key": key, "consumer": consumer}
        params: Params = {name: valid_filter(name, value, 255) for name, value in equal.items() if value is not None}
        where = ["1 = 1", *(f"{name} = :{name}" for name in params)]
        if state is not None:
            params["state"] = valid_state(STATES, state)
        if text is not None:
            params["text"] = _folded(valid_filter("text", text, MAX_TEXT_CHARS))
            if run := max(ASCII_RUN.findall(params["text"]), key=len, default=""):
                params |= {"run": f"%{run.replace('_', '!_')}%", "escaped": "%\\u%"}
                where.append(f"({' OR '.join(map(self._may_hold, ('payload', 'result', 'error', 'key')))})")
        for name, value, sign in (("created_from", created_from, ">="), ("created_before", created_before, "<")):
            if value is not None:
                params[name] = finite(name, value)
                where.append(f"created_at {sign} :{name}")
        if ids is not None:
            where.append(f"id IN ({', '.join(str(valid_id(job_id)) for job_id in ids) or 'NULL'})")
        return " AND ".join(where), params

    def _may_hold(self, column: str) -> str:
        """Return a condition that is true of every text in which the run of ASCII may stand.

        Only `_holds` knows how text beyond ASCII compares, or what JSON has escaped: that passes.
        """
        # guard: a search looks at text beyond ASCII
        # guard: a search looks at what JSON has escaped
        return (
            f"{column} {self._LIKE} :run ESCAPE '!' OR {column} LIKE :escaped ESCAPE '!' "
            f"OR {self._BYTES.format(column)} <> length({column})"
        )


def index_conditions(filters: Params) -> list[str]:
    """Return the conditions by which an index finds the jobs of a state; none for jobs of any."""
    if filters.get("state") == "failed" and "task" in filters:
        return ["state = 'failed'"]  # of the index that has the task
    return INDEXED.get(filters.get("state", ""), [])


def excerpt_columns(most: int | None) -> str:
    if most is None:
        return COLUMNS
    part = f"substr({{0}}, 1, {most + 1})" if most else "NULL"  # one more shows whether it is whole
    return ", ".join(part.format(name) if name in LONG else name for name in Job._fields)


# What stands in JSON as it is, in whatever form; a space does within a string.
ASCII_RUN = re.compile(r"[a-z0-9_.@+=*?$&#~^|;()<>'-]+(?: [a-z0-9_.@+=*?$&#~^|;()<>'-]+)*")


def _folded(text: str) -> str:
    """Return the text such that two texts that people read as the same but for the case of letters are equal."""
    if text.isascii():
        return text.lower()
    import unicodedata

    return unicodedata.normalize("NFC", text.casefold())


_show_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def _holds(row: Sequence[Any], needle: str, shown: Callable[[Job], Job] | None) -> bool:
    """Whether the text is in a job: in its payload or result as JSON shows them, or in one of their strings as it is;
    in its error or key."""
    # guard: a search finds only what is shown
    job = to_job(row) if shown is None else shown(to_job(row))
    for value in (job.payload, *([] if job.result is None else [job.result])):
        if needle in _folded(_show_json(value)):
            return True
        if ESCAPED.search(needle) and any(needle in _folded(each) for each in _strings(value)):
            return True
    return any(needle in _folded(str(each)) for each in (job.error, job.key) if each is not None)


ESCAPED = re.compile(r'["\\\x00-\x1f]')  # what JSON shows in another form


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a payload: keys and values."""
    level = [value]
    while level:
        each = level.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            level += [*each, *each.values()]
        elif isinstance(each, list):
            level += each
