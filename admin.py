"""The operator's command line: inspect, repair, monitor and clean up a queue.

    python3 admin.py list-jobs --status failed
    python3 admin.py why 17
    python3 admin.py COMMAND --help

The output is a table on a terminal, tab-separated lines in a pipe, and one JSON object per line with --json. The exit
code is 0, or 1 if a problem was found, or 2 for a usage error.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pqueue
import pqueue_cron
from pqueue import PersistentQInterface, QueueError
from pqueue_files import closing_file
from pqueue_operating import spread
from pqueue_outcomes import EVENTS, Expectation
from pqueue_tools import monitor as live
from pqueue_tools import moving, report, restoring, supervisor
from pqueue_tools.commands import (
    Ago,
    Command,
    OneOf,
    Parameter,
    SeveralOf,
    UsageError,
    choice,
    dispatch,
    json_value,
    moment,
    or_word,
    path,
    rate,
    test_file,
    up_to_a_day,
)
from pqueue_tools.completion import complete, script
from pqueue_tools.masking import masked, masked_job
from pqueue_tools.output import OPTIONS, CommandResult, agreed, show_progress, table, wants_rows, width, write
from pqueue_tools.process import (
    discard_output,
    expect_posix,
    id_list,
    module_name,
    not_blank,
    open_soon,
    print_error,
    reporting_damage,
    whole_number,
    writes_to_stdout,
)
from pqueue_tools.torture import Torture
from pqueue_values import MAX_ERROR_CHARS, MAX_NUMBER, interval, program_name, short
from pqueue_values import seconds_in as duration

FILES_PER_TRANSACTION = 5000  # job files deleted in one
JOBS_COMPLETED = 200  # newest jobs whose ids and tasks completion knows
VERSION = f"pqueue {pqueue.__version__}"


COMMANDS: dict[str, Command] = {}


INSPECT, JOBS, QUEUES, DATA, SYSTEM = "Inspect", "Jobs", "Queues", "Data", "System"


def command(
    group: str, name: str, *parameters: Parameter, **more: Any
) -> Callable[[Callable[..., CommandResult]], Any]:
    """Make a function a command; `more` are other fields of the `Command`."""

    def register(function: Callable[..., CommandResult]) -> Callable[..., CommandResult]:
        COMMANDS[name] = Command(name, function, (*parameters, *OPTIONS), group, **more)
        return function

    return register


YES = Parameter("--yes", "do not ask for confirmation", flag=True)
JOB_ID = Parameter("job_id", "id of the job", whole_number(0), metavar="JOB_ID")
JOB_IDS = Parameter("job_ids", "ids of jobs; or use a filter", whole_number(0), metavar="JOB_ID", many=True)
QUEUE = Parameter("queue", "name of the queue", metavar="QUEUE")
SCHEDULE = Parameter("schedule", "name of the schedule", metavar="SCHEDULE")
EXPIRE = Parameter(
    "--expire", "cancel it unless it starts within this time after it is due: 15m", duration, metavar="DURATION"
)
_priority = whole_number(-MAX_NUMBER - 1, MAX_NUMBER)
MATCHING = (
    Parameter("--queue", "jobs of this queue", not_blank, metavar="QUEUE"),
    Parameter("--group", "jobs of this group", not_blank, metavar="GROUP"),
    Parameter("--task", "jobs of this task", not_blank, metavar="TASK"),
    Parameter("--key", "jobs enqueued with this key", not_blank, metavar="KEY"),
    Parameter("--consumer", "jobs that this consumer took last", not_blank, metavar="CONSUMER"),
    Parameter("--text", "jobs whose task, payload, result, error or key contains this text", not_blank, metavar="TEXT"),
    Parameter(
        "--payload", "jobs with this value in the payload: customer=7, address.city=Berlin", metavar="PATH=VALUE"
    ),
    Parameter("--since", "jobs enqueued since: 15m, 7d, or an ISO 8601 time", moment, metavar="TIME"),
    Parameter("--until", "jobs enqueued before this time", moment, metavar="TIME"),
)
STATUS = Parameter(
    "--status",
    f"jobs in this state, or one of several: {', '.join(pqueue.STATES)}",
    SeveralOf(*pqueue.STATES),
    metavar="STATE,...",
    short="--state",
)
FILTER_OPTIONS = (STATUS, *MATCHING)
PAGE_OPTIONS = (
    Parameter("--limit", "maximum number of rows", whole_number(1, MAX_NUMBER), "50", "N"),
    Parameter("--before-id", "only jobs older than this one: the next page", whole_number(0), metavar="JOB_ID"),
)
FILTER_NAMES = {"status": "state", "since": "created_from", "until": "created_before"}


def _filters(options: argparse.Namespace) -> dict[str, Any]:
    chosen, now = {each.key: getattr(options, each.key, None) for each in FILTER_OPTIONS}, report.now_shown()
    chosen = {key: now - value if isinstance(value, Ago) else value for key, value in chosen.items()}
    return {FILTER_NAMES.get(key, key): value for key, value in chosen.items() if value is not None}


OPTION_OF = {  # an argument of the queue, in its messages
    "either cron": "--cron",
    "every_seconds": "--every",
    "expire_seconds": "--expire",
    "key_seconds": "--key-for",
    "key_until": "--key-until",
    "max_failed_share": "--max-failed",
    "max_wait_seconds": "--max-wait",
    "on_conflict": "--replace",
}
ARGUMENT = re.compile(rf"""'[^']*'|"[^"]*"|{"|".join(OPTION_OF)}""")  # a quoted value stays as it was given
JOB_COLUMNS = ("id", "state", "queue", "task", "attempts", "consumer", "created_at", "detail")
BY = ("queue", "task")
FAILED_COLUMNS = ("id", "queue", "task", "attempts", "consumer", "finished_at", "detail")


@command(
    INSPECT,
    "list-jobs",
    *FILTER_OPTIONS,
    *PAGE_OPTIONS,
    aliases=("jobs",),
    examples=(
        "jobs --status failed --since 1h",
        "jobs --task send_mail --text ada@example.org",
        "jobs --status failed,cancelled --payload customer=7",
        "jobs --status pending -o json --columns id,queue,payload",
    ),
)
def list_jobs(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """List jobs, newest first."""
    return _listed(queue, options, JOB_COLUMNS)


def _listed(queue: PersistentQInterface, options: argparse.Namespace, columns: tuple[str, ...]) -> CommandResult:
    jobs = queue.list_jobs(**_filters(options), limit=options.limit, before_id=options.before_id, shown=masked_job)
    extra = [] if options.output == "json" and not options.columns else ["detail"]
    return CommandResult(
        [{**report.job_object(job), **{name: report.detail(job) for name in extra}} for job in jobs], columns=columns
    )


@command(
    INSPECT,
    "failedjobs",
    *MATCHING,
    *PAGE_OPTIONS,
    Parameter("--all", "list the jobs instead of counting them", flag=True),
    aliases=("failed",),
    examples=("failed", "failed --all --task send_mail --limit 5"),
)
def failedjobs(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Count the failed jobs by task and error, or list them."""
    filters = _filters(options)
    if options.all or filters or options.before_id is not None:
        options.status = "failed"
        return _listed(queue, options, FAILED_COLUMNS)
    groups = report.failures(queue, options.limit, MAX_ERROR_CHARS)[: options.limit]
    keys = ("jobs", "task", "first_at", "last_at", "by_hour", "last_id")
    return CommandResult([{**{key: each[key] for key in keys}, "error": each["line"]} for each in groups])


@command(INSPECT, "show", JOB_ID, examples=("show 17",))
def show(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Show everything about a job, including its history."""
    job, events = queue.get(options.job_id), report.history(queue, options.job_id)
    after = [parent.id for parent in queue.dependencies(job.id, excerpt=0)] or None
    facts = {**report.job_object(job), "after": after, "why": report.why(queue, job.id)}
    if wants_rows(options) and (options.output or options.columns):
        return CommandResult([{**facts, "history": events}])
    del facts["lease_token"], facts["has_dependents"]
    facts["waits_for"] = facts["waits_for"] or None
    now = report.now_shown()
    lines = [f"{key:17} {_shown(key, value, now)}" for key, value in facts.items() if value is not None]
    if events:
        lines += ["", table([{**each, "error": report.first_line(each["error"])} for each in events], width())]
    return CommandResult(text="\n".join(lines))


def _shown(key: str, value: Any, now: float) -> str:
    if report.is_time(key):
        return f"{report.clock(value)}  ({report.ago(value, now)})"
    if key == "error":
        return "\n    ".join(report.printable(line) for line in value.split("\n"))
    return report.printable(report.for_people(key, value, now))


@command(INSPECT, "why", JOB_ID, examples=("why 17",))
def why(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Explain in one sentence why a job is not running, or what it is doing."""
    sentence = report.why(queue, options.job_id)
    text = f"job {options.job_id}: {report.printable(sentence)}"
    return CommandResult([{"job": options.job_id, "why": sentence}], text)


@command(
    INSPECT,
    "logs",
    JOB_ID,
    Parameter("--directory", "folder of the logs", path, str(supervisor.LOGS), "DIR"),
    opens=False,
    examples=("logs 17",),
)
def logs(_: None, options: argparse.Namespace) -> CommandResult:
    """Print what the consumers logged about a job, from the files that Supervisor writes, oldest first."""
    if not options.directory.is_dir():
        raise QueueError(f"no folder {options.directory}: expected the logs that Supervisor writes, or --directory DIR")
    try:
        rows = supervisor.log_lines(options.directory, options.job_id)
    except OSError as error:
        raise QueueError(f"cannot read {error.filename}: {error.strerror}") from None
    if not rows:
        raise QueueError(f"no line about job {options.job_id} in {options.directory}")
    return CommandResult(rows, "\n".join(row["line"] for row in rows))


@command(
    INSPECT,
    "stats",
    choice("--by", "count by queue or by task; by queue and without --since, jobs are counted by state", BY, BY[0]),
    Parameter("--since", "what happened since then: 15m, 7d, or an ISO 8601 time", moment, metavar="TIME"),
    examples=("stats -o json", "stats --by task", "stats --by queue --since 1h"),
)
def stats(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Count jobs by queue and state, or count what happened to them, by queue or task."""
    if options.by == "task" or options.since is not None:
        since = options.since
        if isinstance(since, Ago):
            since = report.range_start(since, report.now_shown())
        return CommandResult(report.outcome_rows(queue, since, options.by))
    found = queue.stats()
    rows = [{"queue": name, **each} for name, each in found["queues"].items()]
    if wants_rows(options):
        return CommandResult(rows)
    now = report.now_shown()
    last = report.recent(queue, now)
    numbers = ", ".join(f"{getattr(last, name):,} {name}" for name in EVENTS if getattr(last, name))
    total = {"queue": "all", **found["states"], "oldest_pending_at": report.oldest_pending(found)}
    rows += [{**dict.fromkeys(rows[0]), **total}] if len(rows) > 1 else []
    return CommandResult(
        text=f"{table(rows, width()) or 'no queues'}\n\nsince {report.clock(last.at)}: {numbers or 'nothing happened'}"
    )


@command(
    JOBS,
    "enqueue",
    Parameter("task", "name of the task", metavar="TASK"),
    Parameter("payload", "JSON for the task", json_value, metavar="JSON", optional=True),
    Parameter("--queue", "queue of the job", default="default", metavar="QUEUE"),
    Parameter("--group", "its group: the groups of a queue take turns", metavar="GROUP"),
    Parameter("--priority", "higher runs first", _priority, "0", "N"),
    Parameter("--delay", "do not run before this delay: 90s, 15m, 12h, 7d", duration, "0s", "DURATION"),
    Parameter("--max-attempts", "maximum number of attempts", whole_number(1, MAX_NUMBER), metavar="N"),
    EXPIRE,
    Parameter("--key", "do nothing if another job of the queue and task holds this key", metavar="KEY"),
    Parameter("--key-until", "hold the key until the job has finished (default) or started", metavar="STATE"),
    Parameter("--key-for", "hold the key for this long instead: 90s, 15m, 12h, 7d", duration, metavar="DURATION"),
    Parameter("--replace", "give the job that holds the key this payload, priority and delay", flag=True),
    Parameter("--assign-to", "only this consumer may run it", metavar="CONSUMER"),
    Parameter("--after", "run it after these jobs have finished: 17,18", id_list, metavar="IDS"),
    Parameter(
        "--after-failed",
        "if one of those fails: fail this job, too (default), or run it",
        OneOf("fail", "run"),
        metavar="WHAT",
    ),
    examples=(
        """enqueue send_mail '{"to": "ada@example.org"}'""",
        """enqueue send_mail '{"to": "ada@example.org"}' --delay 1h --key ada""",
        "enqueue report --key nightly --key-for 20h",
        "enqueue album --after 17,18",
    ),
)
def enqueue(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Enqueue a job and print its id."""
    job_id = queue.enqueue(
        options.task,
        options.payload,
        queue=options.queue,
        group=options.group,
        priority=options.priority,
        delay_seconds=options.delay,
        max_attempts=options.max_attempts,
        expire_seconds=options.expire,
        key=options.key,
        key_until=options.key_until,
        key_seconds=options.key_for,
        on_conflict="replace" if options.replace else "keep",
        assigned_to=options.assign_to,
        after=options.after or (),
        after_failed=options.after_failed or "fail",
    )
    return CommandResult([{"job": job_id}], str(job_id))


def _act(
    queue: PersistentQInterface,
    options: argparse.Namespace,
    verb: str,
    asked: str,
    done: str,
    method: Callable[..., Any],
    *,
    parents_first: bool = False,
) -> CommandResult:
    """Call a method of the queue for the given jobs, all or none, or, after confirmation, for all that match the
    filter, in batches. Examples of `asked` and `done` are "mark {} as failed" and "marked {} as failed"."""
    filters, short_done = _filters(options), done.replace("{} ", "").replace(" {}", "")
    act = partial(method, now=queue.now())  # the same time for all makes them one operation
    if bool(filters) == bool(options.job_ids):
        given = "both" if filters else "neither"
        raise UsageError(f"{verb}: expected job ids or a filter such as --status failed, got {given}")
    if not filters:
        job_ids = list(dict.fromkeys(options.job_ids))
        with queue.exclusive(job_ids):
            if errors := queue.act_on(job_ids, act, parents_first=parents_first):
                raise errors[0]
        return CommandResult([{"job": job_id, "done": short_done} for job_id in job_ids], done.format(_ids(job_ids)))
    number = queue.count_jobs(**filters, shown=masked_job)
    if not number:
        return CommandResult([{"done": short_done, "jobs": 0, "refused": 0}], "no job matches")
    if not agreed(options, asked.format(report.count(number, "job"))):
        return CommandResult(text="nothing done", code=1)
    changed = queue.act_where(act, **filters, shown=masked_job, parents_first=parents_first)
    refused = changed.refused
    text = report.changed_text(done, changed, refused)
    rows = [{"done": short_done, "jobs": changed, "refused": refused}]
    return CommandResult(rows, text, int(changed == 0 and refused > 0))


def _ids(job_ids: list[int]) -> str:
    return f"job{'' if len(job_ids) == 1 else 's'} {', '.join(map(str, job_ids))}"


@command(
    JOBS,
    "resubmit",
    JOB_IDS,
    *FILTER_OPTIONS,
    Parameter("--delay", "run them after this delay: 90s, 15m, 12h, 7d", duration, "0s", "DURATION"),
    Parameter("--rate", "spread them over time: 10/1s runs 10 in each second", rate, metavar="N/DURATION"),
    YES,
    aliases=("retry",),
    examples=(
        "resubmit 17 18",
        "resubmit --status failed --task send_mail --since 1d",
        "resubmit --status failed --delay 10m --rate 10/1s",
    ),
)
def resubmit(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Run finished jobs again, with a full number of attempts: now, or at a rate."""
    times = spread(queue.now() + options.delay, options.rate)
    asked = "resubmit {}" if options.rate is None else f"resubmit {{}} at {options.rate[0]}/{options.rate[1]:g}s"

    def resubmit_next(job_id: int, now: float) -> None:
        queue.resubmit(job_id, run_at=next(times), now=now)

    return _act(queue, options, "resubmit", asked, "resubmitted {}", resubmit_next, parents_first=True)


@command(
    JOBS,
    "mark-failed",
    JOB_IDS,
    *FILTER_OPTIONS,
    Parameter("--error", "error to record", not_blank, "marked as failed", "TEXT"),
    YES,
    examples=("mark-failed 17 --error 'not needed'",),
)
def mark_failed(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Mark unfinished jobs as failed; a running job loses its lease."""
    mark = partial(queue.mark_failed, error=options.error)
    return _act(queue, options, "mark-failed", "mark {} as failed", "marked {} as failed", mark)


@command(
    JOBS, "cancel", JOB_IDS, *FILTER_OPTIONS, YES, examples=("cancel 17", "cancel --status pending --queue newsletter")
)
def cancel(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Cancel unfinished jobs; a running job loses its lease."""
    return _act(queue, options, "cancel", "cancel {}", "cancelled {}", queue.cancel)


@command(JOBS, "run-now", JOB_IDS, *FILTER_OPTIONS, YES, examples=("run-now 17", "run-now --queue newsletter"))
def run_now(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Make scheduled and waiting jobs pending, whenever they are due and whatever they wait for."""
    return _act(queue, options, "run-now", "run {} now", "made {} pending", queue.run_now)


@command(
    JOBS,
    "change",
    JOB_ID,
    Parameter("--payload", "new payload, JSON; what show hides as … stays as it is", metavar="JSON"),
    Parameter("--priority", "new priority", _priority, metavar="N"),
    Parameter("--delay", "new delay, from now: 90s, 15m, 12h, 7d", duration, metavar="DURATION"),
    Parameter("--to-queue", "the queue to move it to", metavar="QUEUE"),
    Parameter("--group", "new group", metavar="GROUP"),
    Parameter("--no-group", "remove it from its group", flag=True),
    Parameter("--max-attempts", "new maximum number of attempts", whole_number(1, MAX_NUMBER), metavar="N"),
    EXPIRE,
    Parameter("--resubmit", "change a finished job, and run it again", flag=True),
    examples=(
        "change 17 --priority 5 --delay 10m",
        "change 17 --to-queue slow",
        """change 17 --payload '{"amount": 7}' --resubmit""",
    ),
)
def change(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Change a job that no consumer has taken, or a finished one that is to run again."""
    given = {
        "priority": options.priority,
        "delay_seconds": options.delay,
        "queue": options.to_queue,
        "max_attempts": options.max_attempts,
        "expire_seconds": options.expire,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.group is not None or options.no_group:
        given["group"] = options.group
    if not given and options.payload is None:
        raise UsageError("change: expected an option such as --priority 5")
    if options.group is not None and options.no_group:
        raise UsageError("change: expected --group or --no-group, got both")
    now = queue.now()  # the same time for both makes them one operation
    with queue.exclusive([options.job_id]):
        job = queue.get(options.job_id)
        if options.payload is not None:
            given["payload"] = json_value(options.payload, job.payload)
        if job.state in pqueue.FINISHED:
            if not options.resubmit:
                raise QueueError(f"cannot change job {job.id}: it is {job.state}; with --resubmit, it runs again")
            queue.resubmit(job.id, now=now)
        queue.change(job.id, now=now, **given)
    return CommandResult([{"job": job.id, "done": "changed"}], f"changed job {job.id}")


@command(
    JOBS,
    "assign-job",
    JOB_ID,
    Parameter("consumer", "name of the consumer", metavar="CONSUMER_ID", optional=True),
    Parameter("--any", "allow any consumer again", flag=True),
    YES,
    examples=("assign-job 17 consumer_00", "assign-job 17 --any"),
)
def assign_job(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Allow only one consumer to run a job. If another is running it, that one loses its lease."""
    if bool(options.consumer) == options.any:
        given = "both" if options.any else "neither"
        raise UsageError(f"assign-job: expected a CONSUMER_ID, or --any, got {given}")
    job = queue.get(options.job_id)
    running = f"take job {job.id} from {job.consumer}, which runs it, and assign it"
    if job.state == "processing" and not agreed(options, running):
        return CommandResult(text="nothing done", code=1)
    if options.consumer and options.consumer not in {each["name"] for each in queue.consumers(job_ids=False)}:
        print_error("admin", f"note: no consumer named {options.consumer!r} has connected yet")
    with queue.exclusive([job.id]):
        current = queue.get(job.id)
        if current.state == "processing" and current.lease_token != job.lease_token and not options.yes:
            raise QueueError(f"cannot assign job {job.id}: {current.consumer} has just taken it; repeat the command")
        queue.assign(job.id, options.consumer)
    done = f"assigned to {options.consumer or 'any consumer'}"
    return CommandResult([{"job": job.id, "done": done}], f"job {job.id} {done}")


@command(
    JOBS,
    "replay",
    JOB_ID,
    Parameter("--import", "a module with tasks; repeatable", module_name, metavar="MODULE", many=True),
    Parameter("--timeout", "interrupt the task after this time", up_to_a_day, "60s", "DURATION"),
    Parameter("--pdb", "if the task raises, start the debugger where it did", flag=True),
    Parameter("--save", "write a test that runs the payload again, test_NAME.py", test_file, metavar="FILE"),
    examples=(
        "replay 17 --import tasks",
        "replay 17 --import tasks --pdb",
        "replay 17 --import tasks --save test_job_17.py",
    ),
)
def replay(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Run the task of a finished job here, and show what it would change. Nothing changes in the queue; other effects
    of the task are real. On SQLite it works on a copy of the database, on PostgreSQL in a transaction that is rolled
    back. The exit code is 1 if the task raises."""
    expect_posix()
    from pqueue_tools import replay as tool  # it imports what only programs that run tasks need

    return tool.command(queue, options)


@command(QUEUES, "pause", QUEUE, examples=("pause newsletter",))
def pause(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Deliver no jobs from a queue until it is resumed. Running jobs continue."""
    return _change(queue, "queue", options.queue, queue.pause, "paused")


@command(QUEUES, "resume", QUEUE, examples=("resume newsletter",))
def resume(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Deliver jobs from a paused queue again."""
    return _change(queue, "queue", options.queue, queue.resume, "resumed")


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number such as 2 or 0.5, got {short(text)}") from None


_limit = or_word("none", 0, whole_number(1, MAX_NUMBER))
_rate = or_word("none", (), rate)
_duration_or_forever = or_word("forever", [None], lambda text: [duration(text)])  # a list, as the value may be None


@command(
    QUEUES,
    "limit",
    QUEUE,
    Parameter("max_pending", "maximum number of pending jobs, or none", _limit, metavar="N|none", optional=True),
    Parameter("--running", "maximum number of running jobs of each group, or none", _limit, metavar="N|none"),
    Parameter(
        "--rate",
        "maximum number of jobs of each group that begin within this time, or none",
        _rate,
        metavar="N/DURATION|none",
    ),
    examples=("limit newsletter 100000", "limit newsletter none", "limit sync --running 2", "limit api --rate 10/1s"),
)
def limit(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Limit the pending jobs of a queue, or the running jobs or the rate of each of its groups."""
    given = {name: getattr(options, name) for name in ("max_pending", "running", "rate")}
    given = {name: value or None for name, value in given.items() if value is not None}
    if not given:
        raise UsageError("limit: expected a number of pending jobs or none, --running or --rate")
    texts: dict[str, tuple[str, Callable[[Any], str]]] = {
        "max_pending": ("pending jobs", lambda most: report.count(most, "pending job")),
        "running": ("running jobs", lambda most: f"{report.count(most, 'running job')} of each group"),
        "rate": ("the rate", lambda rate: f"{report.count(rate[0], 'job')} of each group in {interval(rate[1])}"),
    }
    limits = [text(given[name]) for name, (_, text) in texts.items() if given.get(name)]
    removed = [limited for name, (limited, _) in texts.items() if name in given and not given[name]]
    done = [f"limited to {', '.join(limits)}"] if limits else []
    done += [f"has no limit on {' or '.join(removed)}"] if removed else []
    return _change(queue, "queue", options.queue, lambda name: queue.limit(name, **given), " and ".join(done))


@command(
    QUEUES,
    "weigh",
    QUEUE,
    Parameter("group", "name of the group", metavar="GROUP"),
    Parameter("weight", "its share, relative to the others, which have 1", _weight, metavar="WEIGHT"),
    examples=("weigh sync customer-7 2",),
)
def weigh(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Give a group of a queue a larger or smaller share."""
    done = f"gives group {options.group} the weight {options.weight:g}"
    return _change(queue, "queue", options.queue, lambda name: queue.weigh(name, options.group, options.weight), done)


KEPT = "DURATION|forever"


@command(
    QUEUES,
    "keep",
    QUEUE,
    Parameter("--completed", "how long to keep completed jobs: 12h, 7d, forever", _duration_or_forever, metavar=KEPT),
    Parameter("--failed", "how long to keep failed jobs", _duration_or_forever, metavar=KEPT),
    Parameter("--cancelled", "how long to keep cancelled jobs", _duration_or_forever, metavar=KEPT),
    examples=("keep newsletter --completed 1h --failed 7d", "keep orders --completed forever"),
)
def keep(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Set how long a queue keeps its finished jobs; consumers then delete them."""
    given = {state: getattr(options, state) for state in pqueue.FINISHED if getattr(options, state)}
    if not given:
        raise UsageError("keep: expected --completed, --failed or --cancelled, such as --completed 7d")
    times = {state: value for state, (value,) in given.items()}
    shown = [
        f"{state} jobs {'for ever' if value is None else f'for {interval(value)}'}" for state, value in times.items()
    ]
    return _change(queue, "queue", options.queue, lambda name: queue.keep(name, **times), f"keeps {', '.join(shown)}")


@command(
    QUEUES,
    "on-failed",
    Parameter("queue", "name of the queue", metavar="QUEUE", optional=True),
    Parameter("task", "name of the task", metavar="TASK", optional=True),
    Parameter("--none", "remove the task", flag=True),
    examples=("on-failed", "on-failed orders webhook", "on-failed orders --none"),
)
def on_failed(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Set the task that handles the failures of a queue, with a job for each; without arguments, list these tasks."""
    if options.queue is None and not options.none:
        rows = [
            dict(zip(("of", "name"), key.split(":", 1), strict=True), task=task)
            for key, task in queue.handlers().items()
        ]
        return CommandResult(rows, None if rows else "no queue or task has a failure handler")
    if options.queue is None or bool(options.task) == options.none:
        raise UsageError("on-failed: expected QUEUE TASK, QUEUE --none, or no arguments")
    done = f"has the failure handler {options.task}" if options.task else "has no failure handler"
    return _change(queue, "queue", options.queue, lambda name: queue.on_failed(name, options.task), done)


def _share(text: str) -> float:
    """Parse a share such as 0.2 or 20%."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise ValueError(f"expected a share such as 0.2 or 20%, got {short(text)}") from None


@command(
    QUEUES,
    "expect",
    Parameter("queue", "name of the queue", metavar="QUEUE", optional=True),
    Parameter("--max-wait", "how long a due job may wait: 90s, 15m", duration, metavar="DURATION"),
    Parameter("--max-failed", "share of failed attempts of a task in 15 minutes: 0.2, 20%", _share, metavar="SHARE"),
    Parameter("--default", "the defaults: 10m and 20%", flag=True),
    examples=("expect", "expect newsletter --max-wait 2h --max-failed 50%", "expect newsletter --default"),
)
def expect(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Set the thresholds from which doctor and the dashboard report a queue; without arguments, list them."""
    known, given = queue.expectations(), {"max_wait_seconds": options.max_wait, "max_failed_share": options.max_failed}
    given = {name: value for name, value in given.items() if value is not None}
    if options.queue is None and not given and not options.default:
        return CommandResult([{"queue": name, **each._asdict()} for name, each in known.items()])
    if options.queue is None or options.default == bool(given):
        raise UsageError("expect: expected QUEUE with --max-wait and --max-failed, or --default; or no arguments")
    values = {} if options.default else {**known.get(options.queue, Expectation())._asdict(), **given}
    wait, share = Expectation(**values)
    done = f"is reported when a job has waited for {interval(wait)}, or {share * 100:g}% of attempts have failed"
    return _change(queue, "queue", options.queue, lambda name: queue.expect(name, **values), done)


@command(INSPECT, "retention")
def retention(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Show how long finished jobs are kept, how many are added and deleted per hour, and when the next is deleted."""
    return CommandResult(queue.retention())


def _change(queue: PersistentQInterface, kind: str, name: str, act: Callable[[str], Any], done: str) -> CommandResult:
    known = queue.stats()["queues"] if kind == "queue" else [each.name for each in queue.schedules()]
    if name not in known:
        raise QueueError(f"no {kind} {name!r}; there are: {', '.join(known) or 'none'}")
    act(name)
    return CommandResult([{kind: name, "done": done}], f"{kind} {name} {done}")


@command(INSPECT, "schedules")
def schedules(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """List the schedules, when each is due next, and its last job."""
    if options.output == "json":
        return CommandResult([{**each._asdict(), "payload": masked(each.payload)} for each in queue.schedules()])
    return CommandResult([report.schedule_row(each) for each in queue.schedules()])


@command(
    QUEUES,
    "schedule",
    SCHEDULE,
    Parameter("task", "name of the task", metavar="TASK"),
    Parameter("payload", "JSON for the task", json_value, metavar="JSON", optional=True),
    Parameter("--cron", "minute, hour, day, month and weekday; or @daily, for example", metavar="CRON"),
    Parameter("--zone", "time zone of the cron expression", default="UTC", metavar="ZONE"),
    Parameter("--every", "an interval instead: 90s, 15m, 12h, 7d", duration, metavar="DURATION"),
    choice("--on-missed", "which missed times get a job", pqueue_cron.ON_MISSED, "once"),
    EXPIRE,
    Parameter("--overlap", "enqueue a job even while the previous one is unfinished", flag=True),
    Parameter("--queue", "queue of the jobs", default="default", metavar="QUEUE"),
    Parameter("--group", "group of the jobs", metavar="GROUP"),
    Parameter("--priority", "higher runs first", _priority, "0", "N"),
    examples=(
        "schedule nightly clean_up --cron '30 2 * * *' --zone Europe/Berlin",
        """schedule pulse check '{"host": "db"}' --every 5m""",
    ),
)
def schedule(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Enqueue a job of a task at certain times, or change these times."""
    queue.schedule(
        options.schedule,
        options.task,
        options.payload,
        cron=options.cron,
        zone=options.zone,
        every_seconds=options.every,
        on_missed=options.on_missed,
        overlap=options.overlap,
        expire_seconds=options.expire,
        queue=options.queue,
        group=options.group,
        priority=options.priority,
    )
    return CommandResult([{"schedule": options.schedule, "done": "saved"}], f"schedule {options.schedule} saved")


@command(QUEUES, "pause-schedule", SCHEDULE, examples=("pause-schedule nightly",))
def pause_schedule(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Enqueue no jobs of a schedule until it is resumed."""
    return _change(queue, "schedule", options.schedule, queue.pause_schedule, "paused")


@command(QUEUES, "resume-schedule", SCHEDULE, examples=("resume-schedule nightly",))
def resume_schedule(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Enqueue jobs of a paused schedule again, from its next time on."""
    return _change(queue, "schedule", options.schedule, queue.resume_schedule, "resumed")


@command(QUEUES, "unschedule", SCHEDULE, examples=("unschedule nightly",))
def unschedule(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Delete a schedule; its jobs stay. One that a task declares is saved again when a consumer starts."""
    return _change(queue, "schedule", options.schedule, queue.unschedule, "deleted")


@command(INSPECT, "consumers", Parameter("--all", "include stopped and dead consumers", flag=True))
def consumers(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """List the consumers and their jobs."""
    found = [each for each in queue.consumers() if options.all or each["state"] == "running" or each["job_ids"]]
    for each in found:
        del each["token"]
    return CommandResult(found if options.output == "json" else [report.consumer_row(each) for each in found])


@command(
    DATA,
    "prune",
    Parameter("--older-than", "minimum time since the job finished (required): 12h, 7d", duration, metavar="DURATION"),
    choice("--status", "only jobs in this state", pqueue.FINISHED, short="--state"),
    examples=("prune --older-than 7d --status completed",),
)
def prune(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Delete old finished jobs, in short transactions while consumers run."""
    if options.older_than is None:
        raise UsageError("prune: expected --older-than DURATION, such as --older-than 7d")
    states = [options.status] if options.status else pqueue.FINISHED
    pruned = queue.prune(options.older_than, states=states, progress=lambda n: show_progress(f"{n:,} jobs pruned"))
    show_progress("")
    return CommandResult([{"pruned": pruned}], f"pruned {report.count(pruned, 'job')}")


@command(
    DATA, "backup", Parameter("file", "new file for the copy", path, metavar="FILE"), examples=("backup var/backup.db",)
)
def backup(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Write a consistent, verified copy of the database while other programs use it."""
    queue.backup(options.file)
    return CommandResult([{"file": str(options.file)}], report.printable(f"backed up to {options.file}, and verified"))


@command(DATA, "restore", Parameter("file", "the backup", path, metavar="FILE"), YES, opens=False)
def restore(_: None, options: argparse.Namespace) -> CommandResult:
    """Replace the database by a backup; the old one is kept under another name. Stop all programs first."""
    if not agreed(options, f"replace the queue by {options.file}"):
        return CommandResult(text="nothing done", code=1)
    kept = restoring.restore(options.file)
    text = report.printable(f"restored {options.file}, verified")
    text += f"; the replaced database is {kept}" if kept else ""
    return CommandResult([{"file": str(options.file), "replaced": kept and str(kept)}], text)


@command(
    DATA,
    "move",
    Parameter("--to", "target: a path, sqlite:///PATH or postgresql://…", metavar="URL"),
    Parameter("--without", "do not copy this table; repeatable", many=True, metavar="TABLE"),
    Parameter("--finish", "move jobs that were enqueued since, and delete the jobs of the old queue", flag=True),
    Parameter("--cancel", "cancel the move, and deliver from the old queue again", flag=True),
    YES,
    examples=("move --to var/copy.db", "move --to var/copy.db --finish"),
)
def move(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Copy a live queue into an empty one of any backend. The old one is paused; --finish deletes its jobs."""
    return moving.move(queue, options)


@command(DATA, "compact", examples=("compact",))
def compact(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Give the space of deleted jobs back to the disk, in short steps while other programs use the database."""
    freed = queue.compact(progress=lambda n: show_progress(f"{report.size(n)} left"))
    show_progress("")
    text = f"the database is {report.size(freed)} smaller" if freed else "nothing to free"
    return CommandResult([{"freed_bytes": freed}], text)


@command(DATA, "delete-db-jobs", Parameter("--force", "even while jobs are processing", flag=True), YES)
def delete_db_jobs(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Delete all jobs from the database in one transaction."""
    if not agreed(options, f"delete all {report.count(queue.count_jobs(), 'job')}"):
        return CommandResult(text="nothing done", code=1)
    deleted = queue.delete_jobs(force=options.force)
    return CommandResult([{"deleted": deleted}], f"deleted {report.count(deleted, 'job')}")


@command(
    DATA,
    "delete-job-files",
    Parameter("--directory", "folder of the job files (required)", path, metavar="DIR"),
    Parameter("--force", "include files of unfinished jobs", flag=True),
    Parameter("--dry-run", "only list what would be deleted", flag=True),
    YES,
)
def delete_job_files(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Delete the job_*.txt files in a folder, except those of unfinished jobs."""
    expect_posix()
    if options.directory is None:
        raise UsageError("delete-job-files: expected --directory DIR")
    names = _job_files(options.directory)
    doomed = sorted(names - (set() if options.force else _needed_files(queue)))
    if options.dry_run or not doomed:
        kept = len(names) - len(doomed)
        return CommandResult([{"file": name} for name in doomed], None if doomed else f"nothing to delete{_kept(kept)}")
    if not agreed(options, f"delete {report.count(len(doomed), 'file')} in {options.directory}"):
        return CommandResult(text="nothing done", code=1)
    batches = [doomed[start : start + FILES_PER_TRANSACTION] for start in range(0, len(doomed), FILES_PER_TRANSACTION)]
    deleted = sum(_delete_files(queue, options, batch) for batch in batches)
    kept = len(names) - deleted
    return CommandResult([{"deleted": deleted, "kept": kept}], f"deleted {report.count(deleted, 'file')}{_kept(kept)}")


def _kept(number: int) -> str:
    return f", {report.count(number, 'file')} kept for unfinished jobs" if number else ""


def _job_files(directory: Path) -> set[str]:
    try:
        with os.scandir(directory) as entries:
            names = {each.name for each in entries if each.is_file(follow_symlinks=False)}
    except OSError as error:
        raise QueueError(f"cannot read {directory.absolute()}: {error.strerror}") from None
    found = {name for name in names if re.fullmatch(r"job_.*\.txt", name)}
    # A producer is about to enqueue the others.
    return {name for name in found if not (directory / f".{name}.new").exists()}


def _needed_files(queue: PersistentQInterface) -> set[str]:
    payloads = (payload for payload in queue.unfinished_payloads() if isinstance(payload, dict))
    return {os.path.basename(str(payload.get("file"))) for payload in payloads}


def _delete_files(queue: PersistentQInterface, options: argparse.Namespace, names: list[str]) -> int:
    """Delete the files that no unfinished job needs, while no job can be enqueued or resubmitted."""
    if options.force:
        return _unlink(options.directory, names)
    with queue.exclusive():
        needed = _needed_files(queue)
        return _unlink(options.directory, [name for name in names if name not in needed])


def _unlink(directory: Path, names: list[str]) -> int:
    """Delete those of these names that are regular files; return how many are gone."""
    try:
        with closing_file(os.open(directory, os.O_RDONLY | os.O_DIRECTORY)) as folder:
            for name in names:
                with suppress(FileNotFoundError):
                    if stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                        os.unlink(name, dir_fd=folder)
    except OSError as error:
        raise QueueError(f"cannot delete in {directory}: {error.strerror}") from None
    return len(names)


@command(SYSTEM, "doctor", examples=("doctor -o json",))
def doctor(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Check the database and the system; the exit code is 1 if a problem is found."""
    facts = queue.check()
    try:
        found = _diagnose(queue, facts)
    except QueueError:  # a table is missing, for example
        if not facts["problems"]:
            raise
        found = [report.Finding("critical", sentence) for sentence in facts["problems"]]
    del facts["problems"]
    now = report.now_shown()
    names = {key: key.removesuffix("_bytes").removesuffix("_at").replace("_", " ") for key in facts}
    lines = [f"{names[key]:20}  {report.for_people(key, v, now)}" for key, v in facts.items() if v is not None]
    facts["findings"] = [each._asdict() for each in found]
    return CommandResult([facts], "\n".join([*report.verdict(found), "", *lines]), int(bool(report.problems(found))))


def _diagnose(queue: PersistentQInterface, facts: dict[str, Any]) -> list[report.Finding]:
    """Return the findings; add figures to the facts that `check` returned."""
    stats = queue.stats()
    found = report.findings(queue, stats=stats, facts=facts, processes=supervisor.known_processes())
    running = [each for each in queue.consumers(job_ids=False) if each["state"] == "running"]
    facts |= {"consumers_alive": len(running)}
    facts |= {"oldest_pending_at": report.oldest_pending(stats)}
    kept = queue.retention()
    facts |= {"finished_jobs": sum(stats["states"][state] for state in pqueue.FINISHED)}
    facts |= {"added_in_last_hour": sum(each["added"] for each in kept)}
    facts |= {"deleted_in_next_hour": sum(each["expiring"] for each in kept)}
    return found


@command(SYSTEM, "metrics")
def metrics(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Print metrics in the text format of Prometheus."""
    figures = report.metrics(queue, report.findings(queue, processes=supervisor.known_processes()))
    return CommandResult([{"metrics": figures}], figures.rstrip("\n"))


@command(
    SYSTEM,
    "torture",
    Parameter("--seconds", "duration of the test", whole_number(1, MAX_NUMBER), "30", "N"),
    Parameter("--durability", "full or normal", OneOf("full", "normal"), "full", "MODE"),
    opens=False,
)
def torture(_: None, options: argparse.Namespace) -> CommandResult:
    """Kill producers and consumers at random, on a temporary database next to the real one (on PostgreSQL: in a
    temporary schema), and verify that no job was lost or done twice."""
    expect_posix()
    server = os.environ["PQUEUE_URL"] if pqueue.is_postgres() else None
    parent = None if server else pqueue.sqlite_path().parent
    if parent and not parent.is_dir():
        raise QueueError(f"no folder {parent}: create it, or set PQUEUE_URL")
    found = Torture(parent, options.durability, server).run(options.seconds)
    lines = [
        f"{key.replace('_', ' '):24}  {report.for_people(key, value, 0)}"
        for key, value in found.items()
        if key != "problems"
    ]
    lines += [f"problem: {each}" for each in found["problems"]] or ["nothing was lost, nothing was done twice"]
    return CommandResult([found], "\n".join(lines), int(bool(found["problems"])))


# The live screen ######################################################################################################


@command(
    INSPECT,
    "monitor",
    Parameter("--interval", "refresh interval", up_to_a_day, "2s", "DURATION"),
    Parameter("--once", "print one screen and exit", flag=True),
    opens=False,
)
def monitor(_: None, options: argparse.Namespace) -> CommandResult:
    """Show processes, consumers, queues and failures, refreshed continuously."""
    if options.once or wants_rows(options):
        seen = live.snapshot()
        lines = live.screen(seen, width())
        row = {**seen, "findings": [each._asdict() for each in seen["findings"]]}
        return CommandResult([row], "\n".join(lines), int("stats" not in seen))
    live.run(options.interval)
    return CommandResult(text="")


# Completion ###########################################################################################################


@command(SYSTEM, "completion", opens=False, examples=("completion",))
def completion(_: None, options: argparse.Namespace) -> CommandResult:
    """Print a bash script that completes commands, options, states, queues, tasks, consumers and jobs."""
    program = program_name("admin")
    if program.endswith(".py"):
        raise QueueError(f"cannot complete {program}: install the package, and use its command pqueue")
    return CommandResult([{"script": script(program)}], script(program).rstrip("\n"))


def _known_values(metavar: str) -> Iterable[str]:
    """Return the known names of a kind of parameter, for completion; none if the database cannot be read."""
    with suppress(QueueError, ValueError), pqueue.open_queue(create=False) as queue:
        if metavar == "QUEUE":
            return list(queue.stats()["queues"])
        if metavar == "SCHEDULE":
            return [each.name for each in queue.schedules()]
        if metavar in ("CONSUMER", "CONSUMER_ID"):
            return {each["name"] for each in queue.consumers(job_ids=False)}
        if metavar in ("TASK", "JOB_ID"):
            jobs = queue.list_jobs(limit=JOBS_COMPLETED, excerpt=0)
            if metavar == "JOB_ID":
                return [str(job.id) for job in jobs]
            consumers = queue.consumers(job_ids=False)
            return {job.task for job in jobs} | {task for each in consumers for task in each["tasks"] or ()}
    return ()


# The program ##########################################################################################################


def run(entry: Command, options: argparse.Namespace) -> int:
    """Run a command, print its result, and return the exit code."""
    if options.json:
        options.output = "json"
    with termination.ExitOnSignal():
        if not entry.opens:
            return _finish(entry.function(None, options), options)
        with open_soon(create=False) as queue, reporting_damage(queue):
            report.follow_clock(queue)
            return _finish(entry.function(queue, options), options)


def _finish(result: CommandResult, options: argparse.Namespace) -> int:
    try:
        write(result, options)
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            raise QueueError(f"cannot write to stdout: {error.strerror}; the command has been carried out") from None
    return result.code


@writes_to_stdout("admin")
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:2] == ["complete", "--"]:  # of the script that `completion` prints
        for each in complete(COMMANDS, arguments[2:], _known_values):
            print(each)
        return 0
    try:
        return dispatch(program_name("admin"), (__doc__ or "").partition("\n")[0], VERSION, COMMANDS, run, arguments)
    except (UsageError, ValueError) as error:  # a UsageError names options already
        names = {} if isinstance(error, UsageError) else OPTION_OF
        print_error("admin", ARGUMENT.sub(lambda found: names.get(found[0], found[0]), str(error)))
        return 2
    except QueueError as error:
        print_error("admin", error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
