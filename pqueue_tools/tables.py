"""The dashboard's tables, buttons and texts as data, shared by both front ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import pqueue
import pqueue_schema
from pqueue import Job
from pqueue_outcomes import Expectation
from pqueue_tools import dashboard, report, supervisor
from pqueue_tools.masking import HIDDEN
from pqueue_values import command_line, interval

JOBS_OF_CONSUMER_SHOWN = 3
JOBS_ASKED_FOR = 20  # of the selected jobs that the question before an action lists
TASKS_SHOWN = 200
QUEUES_SHOWN = 50  # of those with a trend
OVERVIEW_ROWS = 6  # of each table on the overview
EXAMPLES = 30  # queues and tasks that a filter suggests


@dataclass(frozen=True)
class Button:
    """Starts an action of the dashboard with these form fields, after asking for confirmation or for a value."""

    action: str
    label: str
    fields: dict[str, Any] = field(default_factory=dict)
    confirm: str = ""  # what the operator confirms, if the label does not say it all
    asks_for: str = ""  # the field that the operator fills in
    hint: str = ""  # meaning of an empty value
    value: str = ""
    is_long: bool = False  # whether the value has several lines

    @property
    def confirmation(self) -> str:
        return f"yes, {self.confirm or self.label}"


@dataclass(frozen=True)
class Column:
    """What a cell returns depends on the kind: text, number, time, since, until, clock or moment (Unix seconds, shown
    as an age, a span, a time of day, or both), left (a start and a progress, shown as an estimate), state (which has a
    colour), job (an id, or a list of ids), long (text that unfolds), progress (0 to 1), or a drawing: trend (numbers
    of completed and failed attempts) or failures (numbers of them)."""

    heading: str
    cell: Callable[[Any], Any]
    kind: str = "text"
    width: str = ""  # "cut": use the remaining width and cut the text; "wrap": use it and wrap; "fold": wrap at commas
    on_phone: bool = True
    link: Callable[[Any], tuple[str, dict[str, str]]] | None = None  # page and filters that the cell leads to
    optional: bool = False  # left out if all of its cells are empty


@dataclass(frozen=True)
class Table:
    key: str  # identifies the table on its pages
    title: str
    columns: tuple[Column, ...]
    empty: str
    noun: str = ""  # for a row
    most: int | None = None  # maximum number of rows shown
    rows: Callable[[dict[str, Any]], list[Any]] = list  # takes them from the figures of the dashboard
    buttons: Callable[[Any], list[Button]] = lambda _: []  # of a row
    name: Callable[[Any], str] = itemgetter("name")  # identifies a row


def columns_of(table: Table, rows: list[Any]) -> list[Column]:
    """Return the columns that are shown of these rows."""
    return [each for each in table.columns if not each.optional or any(each.cell(row) for row in rows)]


def more(table: Table, number: int) -> str:
    """Return the text for rows that are not shown: and 4 more groups."""
    return f"and {report.count(number, f'more {table.noun}' if table.noun else 'more row')}"


def _attempts(job: Job) -> str:
    return f"{job.attempts} of {job.max_attempts}" if job.attempts and job.max_attempts else str(job.attempts)


def _job_id(job: Job) -> str:
    return str(job.id)


def _start_and_progress(job: Job) -> tuple[float, float] | None:
    return (job.started_at, job.progress) if job.progress and job.started_at is not None else None


def left(started_at: float, progress: float) -> float:
    """Return how many seconds a job would still run if its progress went on as it did so far."""
    return max(0.0, (report.now_shown() - started_at) * (1 / progress - 1))


PROCESSING = Table(
    "processing",
    "Processing now",
    (
        Column("job", lambda job: job.id, "job"),
        Column("task", lambda job: job.task),
        Column("consumer", lambda job: job.consumer, on_phone=False),
        Column("elapsed", lambda job: job.started_at, "since"),
        Column("lease left", lambda job: job.lease_expires_at, "until", on_phone=False),
        Column("attempt", _attempts, on_phone=False),
        Column("left, estimated", _start_and_progress, "left", on_phone=False, optional=True),
        Column("progress", lambda job: job.progress, "progress", width="cut"),
    ),
    "nothing is running",
    "job",
    rows=itemgetter("processing"),
    name=_job_id,
)
JOBS = Table(
    "jobs",
    "Jobs",
    (
        Column("job", lambda job: job.id, "job"),
        Column("state", lambda job: job.state, "state"),
        Column("queue", lambda job: job.queue, on_phone=False),
        Column("task", lambda job: job.task),
        Column("attempts", _attempts, on_phone=False),
        Column("consumer", lambda job: job.consumer, on_phone=False, optional=True),
        Column("ended", lambda job: job.finished_at, "time", on_phone=False, optional=True),
        Column("enqueued", lambda job: job.created_at, "time", on_phone=False),
        Column("detail", lambda job: report.cut(report.detail(job), 200), width="cut"),
    ),
    f"no jobs yet: run {command_line('producer')}",
    name=_job_id,
)


def _of_group(group: dict[str, Any]) -> dict[str, str]:
    """Return the filters that find the jobs of a group of failures."""
    return {"state": "failed", "task": group["task"], "fingerprint": group["error"]}


def _failed_buttons(group: dict[str, Any]) -> list[Button]:
    number = report.count(group["jobs"], "job")
    return [Button("resubmit", "resubmit all", {"scope": "matching", **_of_group(group)}, f"resubmit {number}")]


FAILED = Table(
    "failed",
    "Failures",
    (
        Column("jobs", itemgetter("jobs"), "number", link=lambda group: ("failed", _of_group(group))),
        Column("task", itemgetter("task"), link=lambda group: ("task", {"task": group["task"]})),
        Column(
            "last error",
            lambda group: report.cut(group["line"], 200),
            width="wrap",
            link=lambda group: ("failed", _of_group(group)),
        ),
        Column("last hour", itemgetter("last_hour"), "number", on_phone=False),
        Column("24 hours", itemgetter("by_hour"), "failures", on_phone=False),
        Column("first", itemgetter("first_at"), "time", on_phone=False),
        Column("last", itemgetter("last_at"), "time"),
        Column("last job", itemgetter("last_id"), "job"),
    ),
    "no job has failed",
    "group",
    dashboard.FAILED_GROUPS_SHOWN,
    itemgetter("failures"),
    _failed_buttons,
    lambda group: f"{group['task']}: {group['error']}",
)
CONSUMERS = Table(
    "consumers",
    "Consumers",
    (
        Column("consumer", itemgetter("name")),
        Column("state", itemgetter("state"), "state"),
        Column("host / pid", lambda each: f"{each['host']} / {each['pid']}", on_phone=False),
        Column("jobs", itemgetter("job_ids"), "job"),
        Column("done", itemgetter("completed"), "number", on_phone=False),
        Column("failed", itemgetter("failed"), "number"),
        Column("seen", itemgetter("last_seen_at"), "time", width="cut"),
    ),
    f"no consumer yet: run {command_line('consumer')}",
    "consumer",
    dashboard.CONSUMERS_SHOWN,
    itemgetter("consumers"),
    name=itemgetter("token"),
)


def _groups(figures: dict[str, Any]) -> list[dict[str, Any]]:
    added = supervisor.added_groups()
    found: dict[str, list[str]] = {}
    for each in figures["processes"]:
        found.setdefault(each["group"], []).append(f"{each['name']} {each['state'].lower()}")
    return [{"name": name, "processes": states, "is_added": name in added} for name, states in found.items()]


def _group_buttons(group: dict[str, Any]) -> list[Button]:
    name = group["name"]
    return [Button("remove_group", f"remove {name}", {"group": name})] if group["is_added"] else []


GROUPS = Table(
    "supervisor",
    "Supervisor",
    (
        Column("group", itemgetter("name")),
        Column("processes", lambda group: ", ".join(group["processes"]), width="wrap"),
    ),
    "no process",
    rows=_groups,
    buttons=_group_buttons,
)
ADD_GROUP = Button("add_group", f"add {supervisor.GROUP_SIZE} consumers")


NEW_QUEUE: dict[str, Any] = {"grows_by": 0, "deleted_at": None, "keeps": [], "handler": None, "groups": {}}
NEW_QUEUE["expects"] = Expectation()


def _queues(figures: dict[str, Any]) -> list[dict[str, Any]]:
    queues, settings = figures["overview"]["queues"], figures["settings"]
    return [{"name": name, **each, **settings.get(name, NEW_QUEUE)} for name, each in queues.items()]


def _kept(queue: dict[str, Any]) -> str:
    """Return how long a queue keeps completed, failed and cancelled jobs."""
    return " / ".join("for ever" if each is None else interval(each) for each in queue["keeps"])


def _expected(queue: dict[str, Any]) -> str:
    wait, share = queue["expects"]
    return f"{interval(wait)} / {share * 100:g}%"


def _limits(queue: dict[str, Any]) -> str:
    """Return what a queue accepts and runs at most: 100 pending, 5 running, 10 in 1 s."""
    found = [f"{queue[name]:,} {name[4:]}" for name in ("max_pending", "max_running") if queue[name] is not None]
    if queue["rate"]:
        found.append(report.rate_text(queue["rate"]))
    return ", ".join(found)


def _group_counts(queue: dict[str, Any]) -> str:
    """Return how many groups have pending jobs, and how many are at a limit."""
    counts = {"pending": 0, "at_max_running": 0, "at_rate": 0, **queue["groups"]}
    limited = counts["at_max_running"] + counts["at_rate"]
    shown = [f"{counts['pending']:,} pending"] * bool(counts["pending"]) + [f"{limited:,} at a limit"] * bool(limited)
    return ", ".join(shown)


def _growth(queue: dict[str, Any]) -> str:
    return f"{queue['grows_by']:+,}" if queue["grows_by"] else "0"


def _queue_buttons(queue: dict[str, Any]) -> list[Button]:
    name, verb = queue["name"], "resume" if queue["paused"] else "pause"
    limit = Button("limit", "limit", {"queue": name}, asks_for="max_pending", hint="none")
    return [Button(verb, verb, {"queue": name}), limit]


def _jobs_in(state: str) -> Column:
    return Column(
        state,
        itemgetter(state),
        "number",
        on_phone=state in ("pending", "failed"),
        link=lambda queue: ("jobs", {"queue": queue["name"], "state": state}),
    )


QUEUES = Table(
    "queues",
    "Queues",
    (
        Column("queue", itemgetter("name"), link=lambda queue: ("jobs", {"queue": queue["name"]})),
        Column("state", lambda queue: "paused" if queue["paused"] else "active", "state"),
        *map(_jobs_in, dashboard.STATES_SHOWN),
        Column("oldest", itemgetter("oldest_pending_at"), "since", on_phone=False),
        Column("limits", _limits, width="fold", on_phone=False, optional=True),
        Column("groups", _group_counts, width="fold", on_phone=False, optional=True),
    ),
    f"no queue yet: run {command_line('producer')}",
    "queue",
    rows=_queues,
    buttons=_queue_buttons,
)
SETTINGS = Table(
    "settings",
    "Settings of queues",
    (
        Column("queue", itemgetter("name")),
        Column("warns at wait / failed attempts", _expected),
        Column("failure handler", lambda queue: queue["handler"] or "none", on_phone=False),
        Column("keeps completed / failed / cancelled", _kept),
        Column("stored jobs per hour", _growth, "number", on_phone=False),
        Column("deletes next", itemgetter("deleted_at"), "time", on_phone=False),
    ),
    "no queue yet",
    rows=_queues,
)


def _task_filters(task: dict[str, Any]) -> dict[str, str]:
    return {"queue": task["row"].queue, "task": task["row"].task}


def _task_page(task: dict[str, Any]) -> dict[str, str]:
    return {"task": task["row"].task, "last": next(iter(dashboard.DAYS))}


def _outcome(name: str, *, page: str = "") -> Column:
    """Return a column of a number, which leads to the jobs of the task on this page, if any."""
    link = (lambda task: (page, _task_filters(task))) if page else None
    return Column(name, lambda task: getattr(task["row"], name), "number", link=link, on_phone=name == "failed")


def _times(name: str) -> Column:
    def cell(task: dict[str, Any]) -> str:
        return dashboard.times(dashboard.percentiles(getattr(task["row"], name)))

    return Column(f"{name} p50 / p95", cell, "number", on_phone=False)


TASKS = Table(
    "tasks",
    "Tasks within 24 hours",
    (
        Column("task", lambda task: task["row"].task, link=lambda task: ("task", _task_page(task))),
        Column("queue", lambda task: task["row"].queue, on_phone=False),
        _outcome("enqueued", page="jobs"),
        _outcome("completed"),
        _outcome("failed", page="failed"),
        _outcome("retried"),
        Column("failed attempts", lambda task: f"{task['row'].failed_share:.1%}", "number"),
        _times("run"),
        _times("wait"),
        Column("trend", itemgetter("trend"), "trend", on_phone=False),
    ),
    "no job was enqueued or has ended within 24 hours",
    "task",
    TASKS_SHOWN,
    lambda figures: figures["days"]["tasks"],
    name=lambda task: f"{task['row'].queue} {task['row'].task}",
)


def _rate(name: str) -> Column:
    return Column(f"{name} / min", lambda each: each["per_minute"][name], "number", on_phone=name == "completed")


THROUGHPUT = Table(
    "throughput",
    "Throughput within an hour",
    (
        Column("queue", lambda each: each["row"].queue, link=lambda each: ("jobs", {"queue": each["row"].queue})),
        _outcome("enqueued"),
        _outcome("completed"),
        Column("failed attempts", lambda each: f"{each['row'].failed_share:.1%}", "number"),
        _rate("enqueued"),
        _rate("completed"),
        _times("wait"),
        Column("trend", itemgetter("trend"), "trend", on_phone=False),
    ),
    "no job was enqueued or has ended within an hour",
    "queue",
    QUEUES_SHOWN,
    lambda figures: figures["hour"]["queues"],
    name=lambda each: each["row"].queue,
)


NEWEST = Table(
    "newest",
    "Failed last",
    tuple(each for each in JOBS.columns if each.heading not in ("state", "task", "enqueued")),
    "no job has failed",
    rows=itemgetter("newest"),
    name=_job_id,
)


def task_title(query: dashboard.Query) -> str:
    return f"Task {dashboard.one(query, 'task')}"


def task_jobs(query: dashboard.Query, state: str) -> dict[str, str]:
    """Return the filters that find the jobs of a task in a state."""
    return {"task": dashboard.one(query, "task"), "state": state}


def handled_by(figures: dict[str, Any]) -> str:
    """Return a sentence about the handler of a task, or ""."""
    return f"each failed job is handled by the task {figures['handler']}" if figures["handler"] else ""


# One job ##############################################################################################################

FACTS = (  # of what `FigureCache.job` returns
    Column("state", lambda found: found["job"].state, "state"),
    Column("why", itemgetter("why")),
    Column("queue", lambda found: found["job"].queue),
    Column("group", lambda found: found["job"].group),
    Column("task", lambda found: found["job"].task),
    Column("runs after", lambda found: found["after"] or None, "job"),
    Column("priority", lambda found: found["job"].priority),
    Column("attempts", lambda found: _attempts(found["job"])),
    Column("key", lambda found: found["job"].key),
    Column("key until", lambda found: found["job"].key_until),
    Column("key expires", lambda found: found["job"].key_expires_at, "moment"),
    Column("assigned to", lambda found: found["job"].assigned_to),
    Column("consumer", lambda found: found["job"].consumer),
    Column("enqueued", lambda found: found["job"].created_at, "moment"),
    Column("due", lambda found: found["job"].run_at, "moment"),
    Column("expires", lambda found: found["job"].expires_at, "moment"),
    Column("started", lambda found: found["job"].started_at, "moment"),
    Column("finished", lambda found: found["job"].finished_at, "moment"),
    Column("progress", lambda found: None if found["job"].progress is None else f"{found['job'].progress:.0%}"),
)


def _outcome_of(parent: dict[str, Any]) -> str:
    """Return the error or the result of a job in one line."""
    if parent["state"] == "failed":
        return report.cut(report.first_line(parent["error"]), 200)
    return "" if parent["result"] is None else report.cut(report.json_text(parent["result"]), 200)


PARENTS = Table(
    "parents",
    "Runs after",
    (
        Column("job", itemgetter("id"), "job"),
        Column("state", itemgetter("state"), "state"),
        Column("task", itemgetter("task")),
        Column("result", _outcome_of, width="cut"),
    ),
    "no other job",
    rows=itemgetter("parents"),
    name=lambda parent: str(parent["id"]),
)


def timeline(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what happened to a job, the latest first: its history, and the attempt that runs or completed it."""
    job, events = found["job"], [{**each, "number": number} for number, each in enumerate(found["history"])]
    if job.state in ("processing", "completed") and job.started_at is not None:
        current = {"event": "running" if job.state == "processing" else "completed", "at": job.finished_at}
        last = {"actor": job.consumer, "attempt": job.attempts, "error": None, "started_at": job.started_at}
        events.append({**current, **last, "number": len(events)})
    return events[::-1]


def _duration(event: dict[str, Any]) -> str:
    began, ended = event["started_at"], event["at"]
    return "" if began is None or ended is None else report.short_span(max(0.0, ended - began))


HISTORY = Table(
    "timeline",
    "Timeline",
    (
        Column("event", itemgetter("event"), "state"),
        Column("attempt", lambda event: event["attempt"] or "", "number", on_phone=False),
        Column("who", itemgetter("actor")),
        Column("started", itemgetter("started_at"), "clock", on_phone=False),
        Column("ended", itemgetter("at"), "clock"),
        Column("took", _duration, "number"),
        Column("error", itemgetter("error"), "long", width="wrap"),
    ),
    "no event yet",
    rows=timeline,
    name=lambda event: str(event["number"]),
)


def job_buttons(found: dict[str, Any]) -> list[Button]:
    job, one = found["job"], {"id": found["job"].id}
    retry = Button("retry", "retry later", one, "retry", "when", "30m or 2026-12-24T08:00", "10m")
    clone = Button("clone", "clone", one, "enqueue a copy")
    if job.state in pqueue.FINISHED:
        change = _edit(found, "edit and resubmit")
        return [Button("resubmit", "resubmit", one), *change, retry, clone, Button("delete", "delete", one)]
    change = _edit(found, "edit payload") if job.state != "processing" else []
    assign = Button("assign", "assign", one, "assign", "consumer", "any consumer", job.assigned_to or "")
    ends = [Button("mark_failed", "mark failed", one), Button("cancel", "cancel", one)]
    run_now = [Button("run_now", "run now", one)] if job.state in ("scheduled", "waiting") else []
    retries = [retry] if job.state in ("scheduled", "pending") else []
    return [*run_now, *change, *retries, *ends, assign, clone]


def _edit(found: dict[str, Any], name: str) -> list[Button]:
    """Return a button that changes the payload, unless that is too long. Hidden values stay as they are."""
    pretty = _pretty(found["job"].payload)
    text = "".join(mark if mark.isprintable() or mark == "\n" else json.dumps(mark)[1:-1] for mark in pretty)
    if len(text) > dashboard.TEXT_CHARS_SHOWN:
        return []
    hint = "… is a hidden value, which stays as it is" if HIDDEN in text else ""
    return [
        Button("edit", name, {"id": found["job"].id}, name.replace("edit", "save"), "payload", hint, text, is_long=True)
    ]


BULK_ACTIONS = {  # the states in which each is possible
    "resubmit": pqueue.FINISHED,
    "run_now": ("scheduled", "waiting"),
    "retry": ("scheduled", "pending", *pqueue.FINISHED),
    "mark_failed": pqueue.UNFINISHED,
    "cancel": pqueue.UNFINISHED,
    "delete": (*pqueue_schema.UNTAKEN, *pqueue.FINISHED),
}


def bulk_actions(query: dashboard.Query) -> dict[str, str]:
    """Return the actions that are possible in one of the states of the filter at least, and their labels."""
    states = set(query.get("state") or pqueue.STATES)
    return {name: name.replace("_", " ") for name, possible in BULK_ACTIONS.items() if states & set(possible)}


def texts(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return the title and text of each part of the job, and whether the text was cut."""
    job = found["job"]
    held = {
        "Payload": _pretty(job.payload),
        "Result": None if job.result is None else _pretty(job.result),
        "Error": job.error,
        "File": found["file"],
        "Log": found["log"],
    }
    most = dashboard.TEXT_CHARS_SHOWN
    return [(title, text[:most], len(text) > most) for title, text in held.items() if text is not None]


def _pretty(value: Any) -> str:
    """Return indented JSON, up to somewhat more than TEXT_CHARS_SHOWN characters: indents make deep lists long."""
    parts, size = [], 0
    # A check for cycles would keep references to the value.
    encoder = json.JSONEncoder(ensure_ascii=False, indent=2, check_circular=False)
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        if size > dashboard.TEXT_CHARS_SHOWN:
            break
    return "".join(parts)


# The search ###########################################################################################################


def none_found(query: dashboard.Query, before: int | None) -> str:
    """Return the text for an empty page of jobs; `before` is as returned by `FigureCache.jobs`."""
    if before is not None:
        return "no job found so far"
    return "no job matches" if dashboard.given(query) or query.get("before_id") else JOBS.empty


def matching(query: dashboard.Query, shown: dashboard.JobPage) -> str:
    """Return the label of "all that match", with their number if the page shows all of them."""
    known = len(shown[0]) if shown[1] is None and not query.get("before_id") else None
    return "all that match" if known is None else f"all {known} that match"


def filters_as_text(form: dashboard.Form) -> str:
    """Return the filters of a form: state failed, task mail."""
    return ", ".join(f"{name} {' or '.join(values)}" for name, values in dashboard.given(form).items())


def older_jobs(shown: dashboard.JobPage) -> str:
    """Return the label of the link to the next page."""
    jobs, before = shown
    return "older jobs" if len(jobs) == dashboard.JOBS_PER_PAGE else f"searched back to job {before:,}: continue"


# The pages ############################################################################################################

SCHEDULES = Table(
    "schedules",
    "Schedules",
    (
        Column("schedule", itemgetter("name")),
        Column("state", lambda each: "paused" if each["paused"] else "active", "state"),
        Column("due", itemgetter("due"), width="fold", on_phone=False),
        Column("task", itemgetter("task"), on_phone=False),
        Column("queue", itemgetter("queue"), on_phone=False),
        Column("group", itemgetter("group"), on_phone=False, optional=True),
        Column("next", itemgetter("next_at"), "time"),
        Column("last", itemgetter("last_at"), "time", on_phone=False),
        Column("last job", itemgetter("last_job_id"), "job", on_phone=False),
        Column("skipped", itemgetter("skipped"), "number", on_phone=False),
    ),
    "no schedule: declare one with @task(cron=…), or queue.schedule(…)",
    rows=itemgetter("schedules"),
    buttons=lambda each: [_schedule_button(each["name"], "resume" if each["paused"] else "pause")],
)


def _schedule_button(name: str, verb: str) -> Button:
    return Button(f"{verb}_schedule", verb, {"schedule": name}, f"{verb} {name}")


ACTIVITY = Table(
    "activity",
    "Activity of operators",
    (
        Column("when", itemgetter("at"), "time"),
        Column("who", itemgetter("actor")),
        Column("what", itemgetter("event"), width="wrap"),
        Column("jobs", lambda each: each["jobs"] or "", "number"),
        Column("first job", lambda each: each["job_id"] or None, "job"),
    ),
    "no operator has changed anything",
    rows=itemgetter("activity"),
    name=lambda each: f"{each['at']} {each['event']}",
)


@dataclass(frozen=True)
class Page:
    name: str  # in its address
    title: str
    parts: tuple[Table | str, ...]  # tables, and by name: findings, tiles, charts, task, search
    under: str | None = None  # the page of the menu that leads to it; None: it is in the menu itself


PAGES = {
    each.name: each
    for each in (
        Page("", "Overview", ("findings", FAILED, "tiles", "charts", QUEUES, PROCESSING, CONSUMERS)),
        Page("jobs", "Jobs", ("search",)),
        Page("failed", "Failed", (FAILED, "search")),
        Page("tasks", "Tasks", (TASKS,)),
        Page("task", "Task", ("task", FAILED, NEWEST, SCHEDULES, QUEUES), under="tasks"),
        Page("queues", "Queues", (QUEUES, THROUGHPUT, SETTINGS)),
        Page("schedules", "Schedules", (SCHEDULES,)),
        Page("consumers", "Consumers", (CONSUMERS, PROCESSING, GROUPS)),
        Page("activity", "Activity", (ACTIVITY,)),
    )
}
MENU = [each for each in PAGES.values() if each.under is None]
PAGE_OF = {"processing": "consumers"}  # of the part that a finding names, unless a page has its name


def parts_of(page: Page, figures: dict[str, Any]) -> list[Table | str]:
    """Return the parts of a page; most tasks have no schedule, and there may be no findings."""
    left_out: list[Table | str] = [] if figures["overview"]["findings"] else ["findings"]
    left_out += [SCHEDULES] * (page.under is not None and not SCHEDULES.rows(figures))
    return [each for each in page.parts if each not in left_out]


def needs_days(page: Page | None, query: dashboard.Query) -> bool:
    """Return whether a page with this address shows figures of more than an hour."""
    has_range = page is not None and ("charts" in page.parts or "task" in page.parts)
    is_long = has_range and dashboard.one(query, "last") in dashboard.DAYS
    return is_long or (page is not None and TASKS in page.parts)


def page_of(part: str) -> str:
    return part if part in PAGES else PAGE_OF.get(part, "")


def search_title(page: Page) -> str:
    return "Failed jobs" if page.name == "failed" else "Jobs"


def query_of(page: Page, query: dashboard.Query) -> dashboard.Query:
    """Return the query of a page's search: the page of failures finds failed jobs."""
    return {"state": ["failed"], **query} if page.name == "failed" else query


HINTS = {  # what to write into a filter
    "since": "2h or a date",
    "payload": "customer=7",
}


# Filters that a phone, or Streamlit, does not show at first
RARE_FILTERS = ("group", "consumer", "key", "until", "fingerprint")


def suggestions(figures: dict[str, Any]) -> dict[str, list[str]]:
    """Return what the filters of a search suggest."""
    queues, consumers = figures["overview"]["queues"], figures["consumers"]
    tasks = {task for each in consumers for task in each["tasks"] or ()}
    tasks |= {each["task"] for each in figures["failures"]} | {each.task for each in figures["hour"]["found"]}
    found = {"queue": queues, "task": sorted(tasks), "consumer": sorted({each["name"] for each in consumers})}
    return {name: list(values)[:EXAMPLES] for name, values in found.items()}
