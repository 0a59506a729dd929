"""The dashboard's tables, buttons and texts as data, shared by both front ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import pqueue
from pqueue import Job
from pqueue_tools import dashboard, report, supervisor
from pqueue_values import command_line

JOBS_OF_CONSUMER_SHOWN = 3
JOBS_ASKED_FOR = 20  # of the selected jobs that the question before an action lists
BULK_ACTIONS = ("resubmit", "mark_failed", "cancel")


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

    @property
    def confirmation(self) -> str:
        return f"yes, {self.confirm or self.label}"


@dataclass(frozen=True)
class Column:
    """What a cell returns depends on the kind: text, number, time (Unix seconds), state (which has a colour), job (an
    id, or a list of ids), or progress (0 to 1)."""

    heading: str
    cell: Callable[[Any], Any]
    kind: str = "text"
    width: str = ""  # "cut": use the remaining width and cut the text; "wrap": use it and wrap
    on_phone: bool = True
    filters: Callable[[Any], dict[str, str]] | None = None  # filters of the search that a cell links to


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    empty: str
    noun: str = ""  # for a row
    most: int | None = None  # maximum number of rows shown
    rows: Callable[[dict[str, Any]], list[Any]] = list  # takes them from the figures of the dashboard
    buttons: Callable[[Any], list[Button]] = lambda _: []  # of a row
    name: Callable[[Any], str] = itemgetter("name")  # identifies a row with buttons

    def hidden(self, rows: list[Any]) -> str:
        """Return how many rows are not shown, or "" for none."""
        number = len(rows) - len(rows[: self.most])
        return f"and {report.count(number, self.noun)} more" if number else ""


def _attempts(job: Job) -> str:
    return f"{job.attempts} of {job.max_attempts}" if job.max_attempts is not None else str(job.attempts)


def _span_since(at: float | None) -> str:
    return "" if at is None else report.span(max(0.0, report.now_shown() - at))


def _lease_left(job: Job) -> str:
    now = report.now_shown()
    return report.span(max(0.0, (job.lease_expires_at or now) - now))


PROCESSING = Table(
    "Processing now",
    (
        Column("job", lambda job: job.id, "job"),
        Column("task", lambda job: job.task),
        Column("consumer", lambda job: job.consumer, on_phone=False),
        Column("elapsed", lambda job: _span_since(job.started_at), "number"),
        Column("lease left", _lease_left, "number", on_phone=False),
        Column("attempt", _attempts, on_phone=False),
        Column("progress", lambda job: job.progress, "progress", width="cut"),
    ),
    "nothing is running",
    rows=itemgetter("processing"),
)
JOBS = Table(
    "Jobs",
    (
        Column("job", lambda job: job.id, "job"),
        Column("state", lambda job: job.state, "state"),
        Column("queue", lambda job: job.queue, on_phone=False),
        Column("task", lambda job: job.task),
        Column("attempt", _attempts, on_phone=False),
        Column("consumer", lambda job: job.consumer, on_phone=False),
        Column("enqueued", lambda job: job.created_at, "time", on_phone=False),
        Column("detail", lambda job: report.cut(report.detail(job), 200), width="cut"),
    ),
    f"no jobs yet: run {command_line('producer')}",
)


def _failed_buttons(group: dict[str, Any]) -> list[Button]:
    fields = {"task": group["task"], "fingerprint": group["error"]}
    return [Button("resubmit_group", "resubmit all", fields, f"resubmit {report.count(group['jobs'], 'job')}")]


FAILED = Table(
    "Failed",
    (
        Column("jobs", itemgetter("jobs"), "number"),
        Column("task", itemgetter("task")),
        Column("last", itemgetter("last_id"), "job", on_phone=False),
        Column(
            "error",
            itemgetter("error"),
            width="cut",
            filters=lambda group: {"state": "failed", "task": group["task"], "fingerprint": group["error"]},
        ),
    ),
    "no job has failed",
    "group",
    dashboard.FAILED_GROUPS_SHOWN,
    itemgetter("failures"),
    _failed_buttons,
    lambda group: f"{group['task']}: {group['error']}",
)
CONSUMERS = Table(
    "Consumers",
    (
        Column("consumer", itemgetter("name")),
        Column("state", itemgetter("state"), "state"),
        Column("host / pid", lambda each: f"{each['host']} / {each['pid']}", on_phone=False),
        Column("jobs", itemgetter("job_ids"), "job"),
        Column("done", itemgetter("completed"), "number"),
        Column("failed", itemgetter("failed"), "number"),
        Column("seen", itemgetter("last_seen_at"), "time", width="cut"),
    ),
    f"no consumer yet: run {command_line('consumer')}",
    "consumer",
    dashboard.CONSUMERS_SHOWN,
    itemgetter("consumers"),
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


NO_GROWTH = {"grows_by": 0, "deleted_at": None}


def _queues(figures: dict[str, Any]) -> list[dict[str, Any]]:
    queues, growth = figures["overview"]["queues"], figures["growth"]
    return [{"name": name, **each, **growth.get(name, NO_GROWTH)} for name, each in queues.items()]


def _queue_buttons(queue: dict[str, Any]) -> list[Button]:
    name, verb = queue["name"], "resume" if queue["paused"] else "pause"
    limit = Button("limit", "limit", {"queue": name}, asks_for="max_pending", hint="none")
    return [Button(verb, verb, {"queue": name}), limit]


QUEUES = Table(
    "Queues",
    (
        Column("queue", itemgetter("name"), filters=lambda queue: {"queue": queue["name"]}),
        *(
            Column(state, itemgetter(state), "number", on_phone=state in ("pending", "failed"))
            for state in dashboard.STATES_SHOWN
        ),
        Column("oldest", lambda queue: _span_since(queue["oldest_pending_at"]), "number", on_phone=False),
        Column("limit", lambda queue: _number(queue["max_pending"]), "number", on_phone=False),
        Column("growth per hour", lambda queue: f"{queue['grows_by']:+,}", "number", on_phone=False),
        Column("deletes next", itemgetter("deleted_at"), "time", on_phone=False),
        Column("", lambda queue: "paused" if queue["paused"] else "", "state"),
    ),
    "no queue yet",
    rows=_queues,
    buttons=_queue_buttons,
)


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


# One job ##############################################################################################################

FACTS = (  # of what `FigureCache.job` returns
    Column("state", lambda found: found["job"].state, "state"),
    Column("why", itemgetter("why")),
    Column("queue", lambda found: found["job"].queue),
    Column("task", lambda found: found["job"].task),
    Column("priority", lambda found: found["job"].priority),
    Column("attempts", lambda found: _attempts(found["job"])),
    Column("key", lambda found: found["job"].key),
    Column("key until", lambda found: found["job"].key_until),
    Column("key expires", lambda found: found["job"].key_expires_at, "time"),
    Column("assigned to", lambda found: found["job"].assigned_to),
    Column("consumer", lambda found: found["job"].consumer),
    Column("enqueued", lambda found: found["job"].created_at, "time"),
    Column("due", lambda found: found["job"].run_at, "time"),
    Column("started", lambda found: found["job"].started_at, "time"),
    Column("finished", lambda found: found["job"].finished_at, "time"),
    Column("progress", lambda found: None if found["job"].progress is None else f"{found['job'].progress:.0%}"),
)
HISTORY = Table(
    "History",
    (
        Column("when", itemgetter("at"), "time"),
        Column("event", itemgetter("event")),
        Column("who", itemgetter("actor")),
        Column("attempt", itemgetter("attempt"), "number", on_phone=False),
        Column("error", lambda event: report.cut(report.first_line(event["error"]), 300), width="wrap"),
    ),
    "no event yet",
    rows=itemgetter("history"),
)


def job_buttons(job: Job) -> list[Button]:
    if job.state in pqueue.FINISHED:
        return [Button("resubmit", "resubmit", {"id": job.id})]
    assign = Button("assign", "assign", {"id": job.id}, "", "consumer", "any consumer", job.assigned_to or "")
    verbs = ("run_now",) * (job.state in ("scheduled", "waiting")) + ("mark_failed", "cancel")
    return [*(Button(verb, label(verb), {"id": job.id}) for verb in verbs), assign]


def label(action: str) -> str:
    return action.replace("_", " ")


def texts(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Return the title and text of each part of the job, and whether the text was cut."""
    job = found["job"]
    held = {
        "Payload": _pretty(job.payload),
        "Result": None if job.result is None else _pretty(job.result),
        "Error": job.error,
        "File": found["file"],
    }
    most = dashboard.TEXT_CHARS_SHOWN
    return [(title, text[:most], len(text) > most) for title, text in held.items() if text is not None]


def _pretty(value: Any) -> str:
    """Return indented JSON, up to somewhat more than TEXT_CHARS_SHOWN characters: indents make deep lists long."""
    parts, size = [], 0
    encoder = json.JSONEncoder(
        ensure_ascii=False, indent=2, check_circular=False
    )  # the check would keep references to the value
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        if size > dashboard.TEXT_CHARS_SHOWN:
            break
    return "".join(parts)


# The search ###########################################################################################################


def none_found(query: dict[str, str], before: int | None) -> str:
    """Return the text for an empty page of jobs; `before` is as returned by `FigureCache.jobs`."""
    if before is not None:
        return "no job found so far"
    return "no job matches" if any(query.get(name) for name in (*dashboard.FILTERS, "before_id")) else JOBS.empty


def matching(query: dict[str, str], shown: dashboard.JobPage) -> str:
    """Return the label of "all that match the filter", with their number if the page shows all of them."""
    known = len(shown[0]) if shown[1] is None and not query.get("before_id") else None
    return "all that match the filter" if known is None else f"all {known} that match the filter"


def filters_as_text(form: dashboard.Form) -> str:
    """Return the filters of a form: state failed, task mail."""
    return ", ".join(f"{name} {form[name][0]}" for name in dashboard.FILTERS if form.get(name, [""])[0])


def older_jobs(shown: dashboard.JobPage) -> str:
    """Return the label of the link to the next page."""
    jobs, before = shown
    return "older jobs" if len(jobs) == dashboard.JOBS_PER_PAGE else f"searched back to job {before:,}: continue"
