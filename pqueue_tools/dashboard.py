"""The dashboard's figures, searches and actions, shared by both front ends."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, cast
from urllib.parse import urlsplit

import pqueue
from pqueue import DoNotRetry, Job, PersistentQInterface, QueueBusy, QueueError
from pqueue_files import identity
from pqueue_outcomes import Expectation, Outcomes, Times, total
from pqueue_tools import file_task, report, supervisor
from pqueue_tools.commands import Ago, moment
from pqueue_tools.masking import masked_job
from pqueue_tools.process import whole_number
from pqueue_values import QueueNotFound, operator_name

JOBS_PER_PAGE = 50
FRESH_SECONDS = 1.0  # minimum age of figures before they are computed again
MAX_BUSY_SHARE = 0.05  # maximum share of time spent computing one kind of figures
PAGE_WAIT_SECONDS = 0.12  # how long a page waits for new figures before it shows the previous ones
FIRST_WAIT_SECONDS = 2.0  # how long it waits if there are no previous ones
MAX_STALE_SECONDS = 30.0  # how long figures are shown after they became stale
SEARCH_SECONDS = 0.1  # how long a search runs before the page offers to continue it
SEARCHES_KEPT = 20
EXCERPT_CHARS = 1000  # of a payload, result and error that a list of jobs reads
TEXT_CHARS_SHOWN = 65_536  # of a payload, result and error on the page of a job
PARENTS_SHOWN = 200  # of a job
EVENTS_SHOWN = 200  # latest events of a job
REFRESH_SECONDS = 2
PERIODS = 60  # of each chart: minutes of an hour, or longer ones of DAYS
DAYS = {"24 h": 24 * 60, "72 h": 72 * 60}  # seconds of a period of the charts; each divides the next
RANGES = ("1 h", *DAYS)
FAILED_GROUPS_SHOWN = 20
CONSUMERS_SHOWN = 100
NEWEST_SHOWN = 10  # failed jobs of a task
OPERATIONS_SHOWN = 100
FILE_BYTES_SHOWN = 65_536  # of a job's file
LOG_BYTES_READ = 1_000_000  # of the end of each log
LOG_LINES_SHOWN = 200
STATES_SHOWN = ("pending", "scheduled", "waiting", "processing", "completed", "failed")
OTHER_HOST = "refused: this is not a host name of the dashboard; PQUEUE_OPS_HOSTS can list more"
OTHER_SITE = "refused: the request comes from another site"
FILTERS = ("state", "queue", "group", "task", "consumer", "key", "text", "payload", "since", "until", "fingerprint")
CHART_COLOURS: dict[str, str] = {  # for light and dark pages; apart for all kinds of colour vision
    "enqueued": "#8a94a6",
    "completed": "#3b82d6",
    "failed": "#d9600b",
    "wait": "#d9600b",
    "run": "#3b82d6",
}

Form = dict[str, list[str]]
Query = dict[str, list[str]]  # of an address
JobPage = tuple[list[Job], "int | None"]  # a page of jobs, and the id before which to continue
Percentiles = tuple[float, float]  # p50 and p95, seconds
Tile = tuple[str, "str | float", str]  # label; value, or the time whose age it is; the state that selects the colour


HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/?#@\[\]\\,]+))(?::[0-9]{1,5})?")


def read_only() -> bool:
    return os.environ.get("PQUEUE_OPS_READONLY", "") not in ("", "0")


def site_name() -> str:
    """Return PQUEUE_OPS_NAME, the name of this system in headings and titles: shop (staging)."""
    return os.environ.get("PQUEUE_OPS_NAME", "").strip() or "pqueue"


PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*")


def prefix() -> str:
    """Return PQUEUE_OPS_PREFIX, the path under which a proxy offers the dashboard: /queue. Raises ValueError."""
    given = os.environ.get("PQUEUE_OPS_PREFIX", "").rstrip("/")
    if not PREFIX.fullmatch(given):
        raise ValueError(f"expected a path such as /queue in PQUEUE_OPS_PREFIX, got {given!r}")
    return given


def user_header() -> str | None:
    """Return PQUEUE_OPS_USER_HEADER, the header in which a proxy names the user: X-Remote-User. Raises ValueError."""
    given = os.environ.get("PQUEUE_OPS_USER_HEADER")
    if given and not re.fullmatch(r"[\w!#$%&'*+.^`|~-]+", given, re.ASCII):
        raise ValueError(f"expected a header such as X-Remote-User in PQUEUE_OPS_USER_HEADER, got {given!r}")
    return given


def operator(headers: Any, given: str = "") -> str:
    """Return who acts: the name in the header that PQUEUE_OPS_USER_HEADER names, or without that variable the name that
    was given with a password; if there is none, the user of this process. Raises ValueError."""
    header = user_header()
    name = headers.get(header) or "" if header else given
    return f"{operator_name(name.strip() or None)} (dashboard)"


def has_streamlit() -> bool:
    """Return whether Streamlit is installed, and not older than the page needs."""
    try:
        found = version("streamlit") if find_spec("streamlit") else ""
    except PackageNotFoundError:  # a folder has this name
        return False
    return [int(each) for each in re.findall("[0-9]+", found)[:2]] >= [1, 55]


def expect_url() -> None:
    """Raise ValueError if PQUEUE_URL is invalid, without opening the queue."""
    try:
        if not pqueue.is_postgres():
            pqueue.sqlite_path()
        elif find_spec("psycopg"):
            from pqueue_connections import parse_url

            parse_url(os.environ["PQUEUE_URL"])
    except ValueError as error:
        raise ValueError(f"{error}; check PQUEUE_URL") from None


def without_prefix(path: str) -> str:
    """Return the path of a request without the prefix, which a proxy may or may not have removed."""
    before = prefix()
    return path[len(before) :] or "/" if path == before or path.startswith(f"{before}/") else path


# Accepted host names, to prevent DNS rebinding ########################################################################


def host_name(host: str) -> str:
    """Return the name or the normalized address in a Host header, or "" if there is none."""
    found = HOST.fullmatch(host.lower())
    name = (found[1] or found[2]).removesuffix(".") if found else ""
    if address := address_of(name):
        return str(address)
    return name if found and found[1] is None else ""


def allowed_hosts() -> set[str]:
    """Return the names and addresses in PQUEUE_OPS_HOSTS. Raises ValueError."""
    found = set[str]()
    for each in os.environ.get("PQUEUE_OPS_HOSTS", "").replace(",", " ").split():
        name = host_name(f"[{each}]" if each.count(":") > 1 and "[" not in each else each)
        if not name:
            raise ValueError(
                f"expected names or addresses in PQUEUE_OPS_HOSTS, such as queue.example.org, got {each!r}"
            )
        found.add(name)
    return found


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(name)
    return None


def is_loopback(name: str) -> bool:
    address = address_of(name)
    return name == "localhost" or (address is not None and address.is_loopback)


def password_for(host: str) -> str | None:
    """Return the password. Raises ValueError if there is none and this host is not loopback."""
    password = os.environ.get("PQUEUE_OPS_PASSWORD") or None
    if password is None and not is_loopback(host):
        raise ValueError(f"expected a password in PQUEUE_OPS_PASSWORD to serve on {host}")
    return password


def is_ours(host: str) -> bool:
    """Return whether this Host header has a loopback or an allowed name."""
    name = host_name(host)
    return is_loopback(name) or name in allowed_hosts()


def is_same_origin(origin: str, host: str) -> bool:
    """Return whether the origin is this host, or an allowed one in case a proxy has changed the host."""
    asks = urlsplit(origin).netloc.lower()
    return bool(asks) and (asks == host.lower() or host_name(asks) in allowed_hosts())


# Figures ##############################################################################################################


class FigureCache:
    """The figures of one queue. While the queue is not available, each method raises QueueError.

    A background thread computes the figures for all viewers, so that no page waits for long.
    """

    def __init__(self) -> None:
        self._queue: PersistentQInterface | None = None
        self._identity: Any = None
        self._logs: Any = None  # those of the background thread, which keeps them open
        self._reason: QueueError | None = None  # why the queue could not be opened
        self._retry_at = 0.0  # when to try again
        self._lock = threading.RLock()
        self._reading = threading.Lock()  # one reader at a time: payloads use much memory
        self._worker = ThreadPoolExecutor(1, "pqueue-figures")
        self._parts: dict[str, Callable[[PersistentQInterface], Any]] = {
            "overview": _overview,
            "hour": _hour,
            "days": _Days(),
            "processing": lambda queue: queue.list_jobs(state="processing", limit=JOBS_PER_PAGE, excerpt=0),
            "failures": lambda queue: report.failures(queue, FAILED_GROUPS_SHOWN, EXCERPT_CHARS),
            "consumers": _consumers,
            "handlers": PersistentQInterface.handlers,
            "schedules": lambda queue: [report.schedule_row(each) for each in queue.schedules()],
            "activity": lambda queue: queue.operations(limit=OPERATIONS_SHOWN),
            "processes": lambda _: supervisor.known_processes(),
            "settings": _settings,
        }
        self._computed: dict[str, tuple[float, Any]] = {}  # expiry time, and the figures or a QueueError
        self._began: dict[str, float] = {}  # when the computation of each began
        self._stale_at: dict[str, float] = {}
        self._running: dict[str, Future[None]] = {}
        self._searches: dict[str, tuple[float, JobPage | None]] = {}

    def queue(self) -> PersistentQInterface:
        """Return the open queue. It is opened again if its file was replaced, or its log deleted."""
        with self._lock:
            database = self._file_identity()
            if self._queue is not None and (database != self._identity or self._logs not in (None, self._log_files())):
                self.forget()
            if self._queue is None:
                self._queue, self._identity = self._opened(), database  # of before: it may be replaced meanwhile
            return self._queue

    def _opened(self) -> PersistentQInterface:
        if self._reason is None or time.monotonic() > self._retry_at:  # opening a locked database takes seconds to fail
            try:
                return pqueue.open_queue(create=False)
            except (QueueError, ValueError) as error:
                is_locked = isinstance(error, QueueBusy) and not pqueue.is_postgres()
                hint = ": wait, or end the program that has locked it, which lsof shows" if is_locked else ""
                is_new = isinstance(error, QueueNotFound) and self._identity is None  # or it was there before
                kind = QueueNotFound if is_new else QueueError
                self._reason, self._retry_at = kind(f"{error}{hint}"), time.monotonic() + FRESH_SECONDS
        raise self._reason

    def forget(self) -> None:
        """Close the queue and drop its figures."""
        with self._lock:
            if self._queue is not None:
                with suppress(QueueError):
                    self._queue.close()
            self._queue = self._logs = None
            self._computed = {}
            self.expire()

    def close(self) -> None:
        """Close the queue and stop the background thread."""
        self.forget()
        self._worker.shutdown()

    def expire(self) -> None:
        """Compute all figures again, after a change."""
        with self._lock:
            self._stale_at, self._running, self._searches = {}, {}, {}

    def _file_identity(self, suffix: str = "") -> Any:
        with suppress(OSError, ValueError):
            return identity(f"{pqueue.sqlite_path()}{suffix}")
        return None

    def _log_files(self) -> list[Any]:
        return [self._file_identity(suffix) for suffix in ("-wal", "-shm")]

    def figures(self, wait_seconds: float | None = None, *, days: bool = False) -> dict[str, Any]:
        """Return the current figures, or the previous ones if computing takes longer than wait_seconds (None:
        PAGE_WAIT_SECONDS, or FIRST_WAIT_SECONDS if there are no previous ones):

        overview: states, queues and path of the queue, per_minute, oldest_pending_at, alive, wal_bytes, findings, and
        wait and run, each (p50, p95) in seconds or None; minutes: at (the start), the numbers COUNTED, wait and run of
        each minute of the last hour, including the current one; days, if asked for: the same for each of DAYS, and
        tasks: what happened to the jobs of each task within 24 hours, as row, and trend: (completed, failed) attempts
        of each period, and found: the counts of 72 hours by task; hour: minutes, found: the counts of the last hour,
        and queues: what happened to the jobs of each queue within it, as row, trend and per_minute; handlers: those of
        failures; processing: the running jobs; failures: groups of failed jobs; consumers: those alive or with jobs,
        and those that ended within the last hour; processes: those of supervisord, or a sentence that says why there
        are none; settings: of each queue, see `_settings`.
        """
        wanted = [part for part in self._parts if days or part != "days"]  # which takes long
        running, has_all = self._begin(wanted)
        if wait_seconds is None:
            wait_seconds = PAGE_WAIT_SECONDS if has_all else FIRST_WAIT_SECONDS
        wait(running, wait_seconds)
        with self._lock:
            now = time.monotonic()
            known = {part: self._computed[part] for part in wanted if part in self._computed}
            computed = {part: found for part, (until, found) in known.items() if until > now}
            age = max((now - self._began[part] for part in computed), default=0.0)
        for found in computed.values():
            if isinstance(found, Exception):
                raise found
        if not computed.keys() >= set(wanted):
            raise QueueError("counting the jobs …")
        overview = computed["overview"]
        found = report.by_severity([*overview["findings"], *report.program_findings(computed["processes"])])
        return {
            **computed,
            "minutes": computed["hour"]["minutes"],
            "overview": {**overview, "findings": found},
            "age": age,
        }

    def _begin(self, wanted: list[str]) -> tuple[list[Future[None]], bool]:
        """Begin to compute the parts that are out of date; return what is under way, and whether all were computed."""
        queue = self.queue()
        with self._lock:
            now = time.monotonic()
            for part in wanted:
                if part not in self._running and now >= self._stale_at.get(part, 0.0):
                    self._running[part] = self._worker.submit(self._compute, part, queue, self._running)
            running = [self._running[part] for part in wanted if part in self._running]
            return running, self._computed.keys() >= set(wanted)

    def of_task(self, figures: dict[str, Any], query: Query) -> dict[str, Any]:
        """Return the figures as far as they concern the task of the query, within its `last`, one of DAYS or else an
        hour; also total: what happened to its jobs, and newest: its jobs that failed last. Raises ValueError."""
        task, last = one(query, "task"), one(query, "last")
        if not task:
            raise ValueError("expected a task, as in /task?task=send_mail, got none")
        step = DAYS.get(last, 60)
        found = figures["days" if last in DAYS else "hour"]["found"]
        found = [each for each in found if each.task == task]
        starts = _starts(step)
        series = _series(found, starts)
        schedules = [each for each in figures["schedules"] if each["task"] == task]
        known = {each.queue for each in found} | {each["queue"] for each in schedules}
        queues = {name: each for name, each in figures["overview"]["queues"].items() if name in known}
        failures = [each for each in figures["failures"] if each["task"] == task]
        return {
            **figures,
            "minutes": series,
            "days": {last: series},
            "total": total((each for each in found if each.at >= starts[0]), starts[0], task=task),
            "failures": failures,
            "newest": self._failed_last(query, [each["last_id"] for each in failures[:JOBS_PER_PAGE]]),
            "schedules": schedules,
            "handler": figures["handlers"].get(f"task:{task}"),
            "overview": {**figures["overview"], "queues": queues},
        }

    def _failed_last(self, query: Query, ids: list[int]) -> list[Job]:
        """Return the failed jobs of a task that failed last, of these and of those that were enqueued last."""
        jobs = {job.id: job for job in self.jobs(newest_query(query))[0]}
        if others := [each for each in ids if each not in jobs]:
            found = self.queue().list_jobs(ids=others, limit=len(others), excerpt=EXCERPT_CHARS, shown=masked_job)
            jobs |= {job.id: job for job in found if job.state == "failed"}
        return sorted(jobs.values(), key=lambda job: job.finished_at or 0.0, reverse=True)[:NEWEST_SHOWN]

    def _compute(self, part: str, queue: PersistentQInterface, running: dict[str, Future[None]]) -> None:
        began = time.monotonic()
        found: Any
        try:
            found = self._parts[part](queue)
        except QueueError as error:
            found = error
        except Exception as error:  # the next page tries again
            found = QueueError(f"cannot count the jobs: {error}")
        with self._lock:
            if self._running is running:  # otherwise the result is already out of date
                self._logs = self._logs or self._log_files()
                self._stale_at[part], self._began[part] = _stale_at(began), began
                self._computed[part] = self._stale_at[part] + MAX_STALE_SECONDS, found
                del running[part]

    def jobs(self, query: Query) -> JobPage:
        """Return a page of the jobs that match the query's filters and are older than its before_id, newest first, or
        what was found of it in SEARCH_SECONDS; and the id before which to continue, or None at the end. Payloads,
        results and errors are excerpts."""
        queue, given, before = self.queue(), filters_of(query), one(query, "before_id")
        before_id = whole_number(0)(before) if before else None
        search = json.dumps([given, before_id])
        with self._reading:
            with self._lock:
                searches = self._searches
                stale_at, found = searches.pop(search, (0.0, None))
            began = time.monotonic()
            if found is None or began >= stale_at:
                found = queue.search_jobs(
                    cast(pqueue.Filters, {**given, "shown": masked_job}),
                    before_id=before_id,
                    limit=JOBS_PER_PAGE,
                    seconds=SEARCH_SECONDS,
                    excerpt=EXCERPT_CHARS,
                )
                stale_at = _stale_at(began)
        with self._lock:
            searches[search] = stale_at, found
            if len(searches) > SEARCHES_KEPT:
                del searches[next(iter(searches))]
        return found

    def job(self, job_id: int) -> dict[str, Any]:
        """Return job and history, masked; why; after: the ids of the jobs that it runs after; parents: their id, state,
        task, result and error; file: its text, an error message, or None for a job without a file; and log: the latest
        lines about it in the logs, or None."""
        queue, stats = self.queue(), None
        with suppress(QueueError):
            stats = self.figures()["overview"]
        with self._reading:
            why = report.why(queue, job_id, stats=stats)
            job = masked_job(queue.get(job_id))
        history = report.history(queue, job_id, limit=EVENTS_SHOWN)
        after = [each.id for each in queue.dependencies(job_id, excerpt=0)]
        before = queue.list_jobs(ids=after[:PARENTS_SHOWN], limit=PARENTS_SHOWN, excerpt=EXCERPT_CHARS) if after else []
        fields = ("id", "state", "task", "result", "error")
        parents = [{name: getattr(masked_job(each), name) for name in fields} for each in reversed(before)]
        found = {"job": job, "history": history, "why": why, "after": after}
        return {**found, "parents": parents, "file": _file_text(job.payload), "log": _log_text(job_id)}


def _stale_at(began: float) -> float:
    ended = time.monotonic()
    return ended + max(FRESH_SECONDS, (ended - began) / MAX_BUSY_SHARE)


def _overview(queue: PersistentQInterface) -> dict[str, Any]:
    report.follow_clock(queue)
    now = report.now_shown()
    stats, facts = queue.stats(), queue.check(thorough=False)
    minutes = report.recent_minutes(queue, now)
    recent = total(minutes)
    return {
        "states": stats["states"],
        "queues": stats["queues"],
        "path": facts["path"],
        "per_minute": report.per_minute(minutes),
        "oldest_pending_at": report.oldest_pending(stats),
        "alive": sum(1 for each in queue.consumers(job_ids=False) if each["state"] == "running"),
        "wal_bytes": facts.get("wal_bytes"),
        "findings": report.findings(queue, now, stats=stats, facts=facts),
        "wait": percentiles(recent.wait),
        "run": percentiles(recent.run),
    }


def _hour(queue: PersistentQInterface) -> dict[str, list[Any]]:
    starts = _starts(60)
    found = queue.outcomes(starts[0], report.now_shown(), step_seconds=60)
    return {"minutes": _series(found, starts), "found": found, "queues": _rows(found, starts, by_task=False)}


def periods(figures: dict[str, Any], last: str) -> list[dict[str, Any]]:
    """Return the figures of the periods of a range: one of DAYS, or else an hour."""
    shown: list[dict[str, Any]] = figures["days"][last] if last in DAYS else figures["minutes"]
    return shown


def _starts(step: int) -> list[float]:
    """Return when the last periods of this length began, including the current one."""
    first = report.range_start(step * PERIODS, report.now_shown())
    return [float(first + step * number) for number in range(PERIODS)]


def _series(found: Iterable[Outcomes], starts: list[float]) -> list[dict[str, Any]]:
    """Return the sums of the periods that begin at these times."""
    step = starts[1] - starts[0]
    periods: dict[float, list[Outcomes]] = {at: [] for at in starts}
    for each in found:
        if (at := each.at // step * step) in periods:
            periods[at].append(each)
    return [_period(total(those, at)) for at, those in periods.items()]


class _Days:
    """Computes the figures of DAYS. Counts of the past rarely change, so most are read once an hour."""

    def __init__(self) -> None:
        self._source: PersistentQInterface | None = None
        self._read_at = self._until = 0.0  # when _past was read, and up to which time
        self._past: list[Outcomes] = []

    def __call__(self, queue: PersistentQInterface) -> dict[str, list[Any]]:
        step, since, now = min(DAYS.values()), _starts(max(DAYS.values()))[0], report.now_shown()
        if queue is not self._source or not 0 <= now - self._read_at < 3600:
            until = _starts(step)[-2]  # a long transaction may still add to the period before the current one
            self._past = queue.outcomes(since, until, step_seconds=step)
            self._source, self._read_at, self._until = queue, now, until
        found = [*self._past, *queue.outcomes(max(since, self._until), step_seconds=step)]
        found = [each for each in found if since <= each.at <= now]
        return {
            **{name: _series(found, _starts(each)) for name, each in DAYS.items()},
            "tasks": _rows(found, _starts(step), by_task=True),
            "found": found,
        }


def _rows(found: Iterable[Outcomes], starts: list[float], *, by_task: bool) -> list[dict[str, Any]]:
    """Return what happened to the jobs of each queue, or of each task in it, since the first of these periods."""
    groups: dict[tuple[str, str], list[Outcomes]] = {}
    for each in found:
        if each.at >= starts[0]:
            groups.setdefault((each.queue, each.task if by_task else ""), []).append(each)
    rows: list[dict[str, Any]] = []
    for (queue, task), those in groups.items():
        trend = [(each["completed"], each["failed"] + each["retried"]) for each in _series(those, starts)]
        rows.append({"row": total(those, starts[0], queue, task), "trend": trend})
        if not by_task:
            rows[-1]["per_minute"] = report.per_minute([each for each in those if each.at >= starts[-2]])
    return sorted(rows, key=lambda each: report.failing_first(each["row"]))


def _period(each: Outcomes) -> dict[str, Any]:
    counts = {name: getattr(each, name) for name in report.COUNTED}
    return {"at": each.at, **counts, "wait": percentiles(each.wait), "run": percentiles(each.run)}


def _settings(queue: PersistentQInterface) -> dict[str, dict[str, Any]]:
    """Return of each queue its failure handler and thresholds, how long it keeps jobs of each state, by how many it
    grows in an hour, when the next one is deleted, or None, and what `count_groups` counts."""
    handlers, expected, groups = queue.handlers(), queue.expectations(), queue.count_groups()
    found: dict[str, dict[str, Any]] = {}
    for each in queue.retention():
        name = each["queue"]
        new: dict[str, Any] = {"grows_by": 0, "deleted_at": None, "keeps": [], "handler": handlers.get(f"queue:{name}")}
        new["groups"] = groups.get(name, {})
        settings = found.setdefault(name, {**new, "expects": expected.get(name, Expectation())})
        settings["keeps"].append(each["keep_seconds"])
        settings["grows_by"] += each["added"] - each["expiring"]
        if each["deleted_at"] is not None:
            settings["deleted_at"] = min(each["deleted_at"], settings["deleted_at"] or math.inf)
    return found


def _consumers(queue: PersistentQInterface) -> list[dict[str, Any]]:
    recent = report.now_shown() - 3600
    found = [c for c in queue.consumers() if c["state"] == "running" or c["job_ids"] or c["last_seen_at"] > recent]
    return sorted(found, key=lambda each: (each["state"] != "running", each["name"]))


def percentiles(times: Times) -> Percentiles | None:
    p50, p95 = times.quantile(0.5), times.quantile(0.95)
    return None if p50 is None or p95 is None else (p50, p95)


def expect_query(query: Query, names: tuple[str, ...]) -> None:
    """Raise ValueError unless a program's query consists of these names, each with one value that is not empty. If a
    filter were ignored, the answer would contain jobs that the program does not expect."""
    for name, values in query.items():
        if name not in names:
            raise ValueError(f"expected {', '.join(names) or 'no parameter'}, got {report.cut(name, 40)!r}")
        if (len(values) > 1 and name != "state") or not all(values):
            raise ValueError(f"expected one value of {name}, got {report.cut(', '.join(values), 40)!r}")


def one(query: Query, name: str) -> str:
    return (query.get(name) or [""])[0]


def given(query: Query) -> Query:
    """Return the filters of an address that are not empty."""
    found = {name: [each for each in query.get(name, []) if each] for name in FILTERS}
    return {name: values for name, values in found.items() if values}


def kept(query: Query) -> dict[str, Any]:
    """Return what an action leaves in the address of its page: the filters, where the list continues, and the range."""
    before = {"before_id": one(query, "before_id")} if one(query, "before_id") else {}
    return {**given(query), **before, **of_viewer(query)}


def of_viewer(query: Query) -> dict[str, str]:
    """Return what every link keeps of an address: the range that the reader chose."""
    last = one(query, "last")
    return {"last": last} if last in RANGES else {}


def newest_query(query: Query) -> Query:
    """Return the filters that find the failed jobs of the task of an address."""
    return {"state": ["failed"], "task": [one(query, "task")]}


def filters_of(query: Query) -> dict[str, Any]:
    """Return the filters of an address as options of `list_jobs`. Raises ValueError."""
    filters: dict[str, Any] = {name: values if name == "state" else values[0] for name, values in given(query).items()}
    for name, option in (("since", "created_from"), ("until", "created_before")):
        if name in filters:
            at = moment(filters.pop(name))
            filters[option] = report.now_shown() - at if isinstance(at, Ago) else at
    return filters


def _log_text(job_id: int) -> str | None:
    with suppress(OSError):
        lines = [each["line"] for each in supervisor.log_lines(supervisor.LOGS, job_id, LOG_BYTES_READ)]
        return "\n".join(lines[-LOG_LINES_SHOWN:]) or None
    return None


def _file_text(payload: Any) -> str | None:
    if not (isinstance(payload, dict) and "file" in payload):
        return None
    try:
        content = file_task.read_job_file(payload, FILE_BYTES_SHOWN + 1)
    except (DoNotRetry, QueueError, OSError) as error:  # a QueueError on Windows
        return f"(cannot read it: {getattr(error, 'strerror', None) or error})"
    text = content[:FILE_BYTES_SHOWN].decode(errors="replace")
    return text + "\n(cut)" if len(content) > FILE_BYTES_SHOWN else text


def tiles(seen: dict[str, Any]) -> list[Tile]:
    """Return the figures of the overview."""
    oldest = "none" if seen["oldest_pending_at"] is None else float(seen["oldest_pending_at"])
    found: list[Tile] = [(state, f"{seen['states'][state]:,}", state) for state in STATES_SHOWN]
    found += [(f"{name} / min", f"{seen['per_minute'][name]:,}", "") for name in ("enqueued", "completed")]
    found += [("oldest pending", oldest, "")]
    found += [("consumers alive", str(seen["alive"]), "")]
    found += [(f"{name} p50 / p95", times(seen[name]), "") for name in ("wait", "run")]
    return found


def task_tiles(found: Outcomes) -> list[Tile]:
    """Return what happened to the jobs of a task, as `tiles` does the overview."""
    tiles: list[Tile] = [("enqueued", f"{found.enqueued:,}", "")]
    tiles += [(name, f"{getattr(found, name):,}", name) for name in ("completed", "failed")]
    tiles += [("failed attempts", f"{found.failed + found.retried:,} ({found.failed_share:.1%})", "")]
    return tiles + [(f"{name} p50 / p95", times(percentiles(getattr(found, name))), "") for name in ("wait", "run")]


def times(pair: Percentiles | None) -> str:
    """Return a p50 and a p95 as text."""
    if pair is None:
        return "none"
    (low, unit), (high, same) = (_seconds(each) for each in pair)
    return f"{low} / {high} {unit}" if unit == same else f"{low} {unit} / {high} {same}"


def _seconds(value: float) -> tuple[str, str]:
    for unit, size in (("h", 3600), ("min", 60)):
        if value >= 10 * size:
            return f"{value / size:,.0f}", unit
    return (f"{value * 1000:,.0f}", "ms") if value < 1 else (f"{value:,.{int(value < 99.95)}f}", "s")
