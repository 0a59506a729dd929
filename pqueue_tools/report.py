"""Reports for operators, shared by the command line and the dashboard: findings, why a job does not run, metrics for
Prometheus, and the formatting of times and values."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from itertools import accumulate
from typing import Any, NamedTuple

import pqueue
from pqueue import Job, PersistentQInterface, Schedule
from pqueue_cron import timing
from pqueue_outcomes import BOUNDS, Expectation, Outcomes, Times, minute, total
from pqueue_search import fingerprint
from pqueue_tools.masking import masked, masked_error, masked_job
from pqueue_values import EXPIRED, UNITS, command_line, interval

FAILED_SECONDS = 900.0  # within which the failed attempts of a task are compared with what is expected of its queue
FEW_FAILED = 10  # failed attempts of a task within FAILED_SECONDS that are not reported, whatever their share
DAY_SECONDS = 24 * 3600.0  # a task that had a failed job within this time, and completed none, is reported
SILENT_SECONDS = 60.0  # a running consumer whose last heartbeat is longer ago is reported
# A queue with due jobs in which none began or ended for longer is reported, and so is a schedule that is later.
STALL_SECONDS = 60.0
LATE_SECONDS = 5.0  # a job whose lease expired longer ago is reported
MAX_NAMED = 5  # jobs that a waiting job waits for
NEARLY_ALL = 0.9  # of the attempts of a task: it does not work at all
SEVERITIES = ("info", "warning", "critical")
NO_FINDINGS = "no problem found"
COUNTED = ("enqueued", "completed", "failed", "retried")
DOCUMENTS = ("payload", "result", "meta")  # of a job
CLOCK_SECONDS = 5.0  # a larger difference between this host's clock and the server's is reported
BUILT_IN = ("prepend_timestamp",)  # tasks that a consumer knows without --import
MANY_KEPT = 100_000  # a queue that keeps more finished jobs for ever is reported
FULL_SECONDS = 7 * 86400.0  # the same as a warning, if at its growth the disk is full within this time
MANY_FREE_BYTES = 100_000_000  # a file of which more than this, and more than half, is free is reported
LATE_PRUNE_SECONDS = 3600.0  # a job that should have been deleted longer ago is reported


class Finding(NamedTuple):
    """A condition that an operator should know about."""

    severity: str  # one of SEVERITIES
    text: str  # what was found: one sentence, without a period
    remedy: str = ""  # what to do: a command to run, or the rest of a sentence
    part: str = ""  # the part of the dashboard that shows it: queues, consumers …
    at: float | None = None  # the time with which the text ends, as a duration or relative to now; Unix seconds

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}" if self.remedy else self.text


_ahead = 0.0  # seconds by which the queue's clock is ahead of this host's


def follow_clock(queue: PersistentQInterface) -> None:
    """Show times by the queue's clock, which is that of the server on PostgreSQL."""
    global _ahead
    _ahead = queue.now() - time.time()


def now_shown() -> float:
    """Return the time to compare the queue's times with."""
    return time.time() + _ahead


def findings(
    queue: PersistentQInterface,
    now: float | None = None,
    *,
    stats: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    processes: list[dict[str, Any]] | str = "",
) -> list[Finding]:
    """Return what was found, the most severe first. `stats` and `facts` are recent results of the queue's `stats` and
    `check`, if the caller has them; `processes` those of supervisord, or a sentence that says why there are none."""
    now = queue.now() if now is None else now
    stats = queue.stats() if stats is None else stats
    facts = queue.check(thorough=False) if facts is None else facts
    consumers = queue.consumers(job_ids=False)
    alive = [each for each in consumers if each["state"] == "running"]
    blocked: set[str] = set()  # queues of which a finding says why their jobs wait: how long they do is not another one
    found = [
        *(Finding("critical", sentence) for sentence in facts["problems"]),
        *program_findings(processes),
        *_lost_jobs(queue, consumers),
        *_no_consumers(queue, stats, consumers, alive, blocked, now),
        *_unserved_queues(queue, stats, alive, blocked, now),
        *_unknown_tasks(queue, stats, alive, blocked),
        *_stalled_queues(queue, stats, alive, blocked, now),
        *_duplicate_names(alive),
        *_silent_consumers(alive, now),
        *_failing_tasks(queue, stats, now),
        *(() if blocked and not alive else _expired_leases(queue, now)),
        *_queue_findings(queue, stats, blocked, now),
        *_schedule_findings(queue, now, can_run=bool(alive or not blocked)),
        *_retention_findings(queue, stats, facts, alive, now),
        *_file_findings(facts),
        *_clock_findings(queue, now),
    ]
    return by_severity(found)


def by_severity(found: list[Finding]) -> list[Finding]:
    """Return the findings, the most severe first."""
    return sorted(found, key=lambda each: -SEVERITIES.index(each.severity))


def problems(found: list[Finding]) -> list[Finding]:
    """Return the findings that are more than information: with one of these, the exit code of `doctor` is 1."""
    return [each for each in found if each.severity != "info"]


def verdict(found: list[Finding]) -> list[str]:
    """Return a line for each finding, or one that says that there is none."""
    return [f"{each.severity}: {each}" for each in found] or [NO_FINDINGS]


def program_findings(processes: list[dict[str, Any]] | str) -> Iterator[Finding]:
    """Yield the findings about supervisord's processes; `processes` is as in `findings`."""
    for each in () if isinstance(processes, str) else processes:
        if each["state"] == "FATAL":
            again = f"read its log, then run {command_line('manager')} --start {shlex.quote(each['name'])}"
            yield Finding("critical", f"Supervisor gave up on {each['name']}, which keeps ending", again, "consumers")
        elif each["state"] == "BACKOFF":
            text = f"{each['name']} ended soon after its start; Supervisor tries again"
            yield Finding("warning", text, "read its log", "consumers")


def _lost_jobs(queue: PersistentQInterface, consumers: list[dict[str, Any]]) -> Iterator[Finding]:
    """Report the consumers that ended with jobs, all in one finding. Those that stopped returned their jobs."""
    some_died = any(each["state"] == "dead" for each in consumers)
    holders = [each for each in queue.consumers() if each["job_ids"]] if some_died else []
    ended = [each for each in holders if each["state"] != "running"]
    held = count(sum(len(each["job_ids"]) for each in ended), "job")
    again = "a live consumer takes them back"
    text = f"{len(ended)} consumers ended and hold {held} ({_names(ended)})"
    if len(ended) == 1:
        text = f"consumer {ended[0]['name']} is {ended[0]['state']} and holds {held}"
    if ended:
        yield Finding("warning", text, again, "consumers")


def _names(consumers: list[dict[str, Any]]) -> str:
    """Return the names of the first three."""
    return ", ".join(each["name"] for each in consumers[:3]) + " …" * (len(consumers) > 3)


def _start(tasks: Iterable[str], options: str = "") -> str:
    """Return the command that starts a consumer of these tasks."""
    return f"run {command_line('consumer')}{options}" + " --import MODULE" * any(each not in BUILT_IN for each in tasks)


def _no_consumers(
    queue: PersistentQInterface,
    stats: dict[str, Any],
    consumers: list[dict[str, Any]],
    alive: list[dict[str, Any]],
    blocked: set[str],
    now: float,
) -> Iterator[Finding]:
    """Report that no consumer is alive, if that is not as it should be."""
    dead = [each for each in consumers if each["state"] == "dead"]
    if alive:
        return
    start = _start([task for each in consumers for task in each["tasks"] or ()])
    blocked.update(name for name, each in stats["queues"].items() if each["pending"] and not each["paused"])
    if blocked:
        start = _start([task for _, task in queue.pending_tasks()])
        text = f"{count(stats['states']['pending'], 'job')} pending and no consumer is alive"
        yield _with_age(Finding("critical", text, start, "consumers"), oldest_pending(stats), now)
    elif dead:
        last = max(each["last_seen_at"] for each in dead)
        died = f"no consumer is alive: {len(dead)} died, the last was seen {ago(last, now)}"
        yield Finding("warning", died, start, "consumers", last)
    elif stats["states"]["scheduled"]:
        scheduled = f"{count(stats['states']['scheduled'], 'job')} scheduled and no consumer is alive"
        yield Finding("info", scheduled, start, "consumers")


def _unserved_queues(
    queue: PersistentQInterface, stats: dict[str, Any], alive: list[dict[str, Any]], blocked: set[str], now: float
) -> Iterator[Finding]:
    for name, each in stats["queues"].items():
        if alive and each["pending"] and not each["paused"] and not any(_serves(one, name) for one in alive):
            blocked.add(name)
            tasks = [task for served, task in queue.pending_tasks() if served == name]
            start = _start(tasks, f" --queue {shlex.quote(name)}")
            text = f"queue {name!r}: {count(each['pending'], 'job')} pending and no live consumer serves it"
            yield _with_age(Finding("critical", text, start, "queues"), each["oldest_pending_at"], now)


def _with_age(found: Finding, oldest: float | None, now: float) -> Finding:
    """Add how long the oldest job has waited, if that is long."""
    if oldest is None or now - oldest < STALL_SECONDS:
        return found
    return found._replace(text=f"{found.text}; the oldest has waited for {span(now - oldest)}", at=oldest)


def _unknown_tasks(
    queue: PersistentQInterface, stats: dict[str, Any], alive: list[dict[str, Any]], blocked: set[str]
) -> Iterator[Finding]:
    """Report pending jobs of tasks that no running consumer of their queue knows."""
    unknown: dict[str, int] = {}
    for (name, task), jobs in queue.pending_tasks().items() if alive and stats["states"]["pending"] else ():
        serving = [each for each in alive if _serves(each, name)]
        is_paused = stats["queues"].get(name, {}).get("paused")
        if serving and not is_paused and not any(_knows(one, task) for one in serving):
            unknown[task] = unknown.get(task, 0) + jobs
            blocked.add(name)
    for task, jobs in unknown.items():
        text = f"task {task!r}: {count(jobs, 'job')} pending and no running consumer of the queue knows this task"
        yield Finding("critical", text, _start([task]), "queues")


def _stalled_queues(
    queue: PersistentQInterface, stats: dict[str, Any], alive: list[dict[str, Any]], blocked: set[str], now: float
) -> Iterator[Finding]:
    """Report queues that make no progress although jobs are due that an idle consumer should run."""
    before = now - STALL_SECONDS
    jobs: dict[str, int] = {}
    names: dict[str, str] = {}
    stalled = queue.stalled(before) if alive and (oldest_pending(stats) or now) < before else {}
    busy = {each["token"] for each in queue.consumers() if each["job_ids"]} if stalled else set()
    idle = [each for each in alive if each["token"] not in busy]
    for (name, task), number in stalled.items():
        free = [each["name"] for each in idle if _serves(each, name) and _knows(each, task)]
        if free and not stats["queues"].get(name, {}).get("paused", True):
            jobs[name], names[name] = jobs.get(name, 0) + number, free[0]
    blocked.update(jobs)
    for name, number in jobs.items():
        due = f"{count(number, 'job')} due, none begun or ended for {span(STALL_SECONDS)}"
        text = f"queue {name!r} makes no progress: {due}"
        found = Finding("critical", text, f"read the log of {names[name]}, which is idle, and restart it", "queues")
        yield _with_age(found, stats["queues"][name]["oldest_pending_at"], now)


def _serves(consumer: dict[str, Any], queue: str) -> bool:
    return consumer["queues"] is None or queue in consumer["queues"]


def _knows(consumer: dict[str, Any], task: str) -> bool:
    return consumer["tasks"] is None or task in consumer["tasks"]


def _duplicate_names(alive: list[dict[str, Any]]) -> Iterator[Finding]:
    """Report names used twice on one host: a consumer has probably outlived its Supervisor."""
    pids: dict[tuple[str, str], set[int]] = {}
    for each in alive:
        pids.setdefault((each["name"], each["host"]), set()).add(each["pid"])
    for (name, _), found in pids.items():
        if len(found) > 1:
            numbers = ", ".join(map(str, sorted(found)))
            text = f"{len(found)} processes run under the name {name} (pids {numbers})"
            yield Finding("warning", text, "stop all but one", "consumers")


def _silent_consumers(alive: list[dict[str, Any]], now: float) -> Iterator[Finding]:
    """Report consumers that sent heartbeats and stopped doing so, all in one finding; some never send any."""
    silent = [each for each in alive if each["started_at"] < each["last_seen_at"] < now - SILENT_SECONDS]
    if silent:
        last, number = max(each["last_seen_at"] for each in silent), count(len(silent), "consumer")
        text = f"{number} sent no heartbeat for a while ({_names(silent)}), the last {ago(last, now)}"
        remedy = "read the log: the process may be stopped or wait for the database"
        yield Finding("warning", text, remedy, "consumers", last)


def _failing_tasks(queue: PersistentQInterface, stats: dict[str, Any], now: float) -> Iterator[Finding]:
    """Report tasks of whose attempts more fail than expected, as critical if nearly all do; and those that run rarely,
    and failed each time."""
    expected = queue.expectations()
    reported = set()
    for each in queue.outcomes(now - FAILED_SECONDS, now):
        if each.failed + each.retried > FEW_FAILED and each.failed_share > _expected_share(expected, each):
            reported.add((each.queue, each.task))
            yield _failing_task(each, "critical" if each.failed_share > NEARLY_ALL else "warning", FAILED_SECONDS)
    for each in queue.outcomes(now - DAY_SECONDS, now) if stats["states"]["failed"] else ():
        is_new = (each.queue, each.task) not in reported and _expected_share(expected, each) < 1
        has_run = each.wait.number + each.died + each.expired > 0  # or an operator decided that it failed
        # Not once its failed jobs are deleted or resubmitted.
        jobs: dict[str, Any] = {"state": "failed", "queue": each.queue, "task": each.task}
        if is_new and has_run and each.failed and not each.completed and queue.list_jobs(**jobs, limit=1, excerpt=0):
            yield _failing_task(each, "warning", DAY_SECONDS)


def _expected_share(expected: dict[str, Expectation], of: Outcomes) -> float:
    return expected.get(of.queue, Expectation()).max_failed_share


def _failing_task(each: Outcomes, severity: str, seconds: float) -> Finding:
    failed = each.failed + each.retried
    within = "day" if seconds == DAY_SECONDS else span(seconds)
    what = f"{failed:,} of {count(failed + each.completed, 'attempt')} failed in the last {within}"
    # Attempts that are repeated are not failed jobs.
    command, part = ("failedjobs", "failed") if each.failed else ("list-jobs --status scheduled", "tasks")
    run = f"run {command_line('admin')} {command} --task {shlex.quote(each.task)}"
    return Finding(severity, f"task {each.task!r} in queue {each.queue!r}: {what}", run, part)


def _expired_leases(queue: PersistentQInterface, now: float) -> Iterator[Finding]:
    if expired := queue.count_expired(now - LATE_SECONDS):
        text = f"{count(expired, 'lease')} ran out and no consumer took the jobs back"
        yield Finding("critical", text, f"run {command_line('consumer')}", "processing")


def _queue_findings(
    queue: PersistentQInterface, stats: dict[str, Any], blocked: set[str], now: float
) -> Iterator[Finding]:
    """Report a move, paused queues, and long waits in others. A pause is information: somebody decided on it."""
    move, expected = _move(queue), queue.expectations()
    if move:
        text, _, remedy = move.partition(": ")
        yield Finding("warning", text, remedy)
    for name, each in stats["queues"].items():
        oldest, longest = each["oldest_pending_at"], expected.get(name, Expectation()).max_wait_seconds
        if each["max_pending"] is not None and each["pending"] >= each["max_pending"]:
            text = f"queue {name!r} is full, with {count(each['pending'], 'job')} pending, and refuses more"
            again = f"wait for consumers, or run {command_line('admin')} limit {shlex.quote(name)} N"
            yield Finding("info", text, again, "queues")
        if each["paused"] and not move:
            text = f"queue {name!r} is paused, with {count(each['pending'], 'job')} pending"
            yield Finding("info", text, f"run {_resume(name)}", "queues")
        elif oldest is not None and now - oldest > longest and not (each["paused"] or name in blocked):
            text = f"queue {name!r}: the oldest pending job has waited for {span(now - oldest)}"
            jobs = f"{command_line('admin')} list-jobs --status pending --queue {shlex.quote(name)}"
            yield Finding("warning", text, f"run {jobs}, then why JOB; add consumers if all are busy", "queues", oldest)


def _schedule_findings(queue: PersistentQInterface, now: float, *, can_run: bool) -> Iterator[Finding]:
    """Report schedules that are late although they can run, that their tasks no longer declare, or that are paused."""
    for each in queue.schedules():
        command = f"{command_line('admin')} {{}} {shlex.quote(each.name)}"
        if each.origin == "removed":
            text = f"schedule {each.name!r}: its task no longer declares it"
            again = f"run {command.format('unschedule')}, or save it with queue.schedule"
            yield Finding("warning", text, again, "schedules")
        if each.paused:
            text = f"schedule {each.name!r} is paused"
            yield Finding("info", text, f"run {command.format('resume-schedule')}", "schedules")
        elif now - each.next_at > STALL_SECONDS and can_run and not queue.move_status():
            text = f"schedule {each.name!r} has been due for {span(now - each.next_at)}"
            again = "start a consumer; schedules are due when one takes jobs"
            yield Finding("warning", text, again, "schedules", each.next_at)
        elif each.next_at > _next_time(each, now) + STALL_SECONDS:
            text = f"schedule {each.name!r} waits for {span(each.next_at - now)}, as a clock was set back"
            yield Finding("warning", text, f"run {command.format('resume-schedule')}", "schedules")


def _next_time(schedule: Schedule, now: float) -> float:
    """Return the next time of a schedule; if this host does not know its time zone, infinity."""
    try:
        return timing(schedule.cron, schedule.zone, schedule.every_seconds).next(now)
    except ValueError:
        return math.inf


def _retention_findings(
    queue: PersistentQInterface, stats: dict[str, Any], facts: dict[str, Any], alive: list[dict[str, Any]], now: float
) -> Iterator[Finding]:
    """Report many jobs that are kept for ever, and jobs that consumers should have deleted."""
    added: Counter[tuple[str, str]] = Counter()
    for outcomes in queue.outcomes(now - 3600, now):
        added.update({(outcomes.queue, state): getattr(outcomes, state) for state in pqueue.FINISHED})
    for each in queue.retention(within_seconds=60, now=now):
        name, state, at = each["queue"], each["state"], each["deleted_at"]
        jobs, more = stats["queues"].get(name, {}).get(state, 0), added[name, state]
        if each["keep_seconds"] is None and jobs >= MANY_KEPT:
            left = _seconds_until_full(stats, facts, more)
            # Not if they are less than those of a day: something else deletes them.
            is_soon = left < FULL_SECONDS and jobs > 24 * more
            full = f", and so fast the disk is full in {span(left)}" if is_soon else ""
            text = f"queue {name!r} keeps its {jobs:,} {state} jobs for ever; {more:,} added in the last hour{full}"
            keep = f"run {command_line('admin')} keep {shlex.quote(name)} --{state} 7d"
            yield Finding("warning" if is_soon else "info", text, keep, "queues")
        elif alive and at is not None and now - at > LATE_PRUNE_SECONDS:
            text = f"queue {name!r}: {state} jobs were to be deleted {ago(at, now)}"
            yield Finding("warning", text, f"run {command_line('consumer')}, which deletes them", "queues", at)


def _seconds_until_full(stats: dict[str, Any], facts: dict[str, Any], jobs_per_hour: int) -> float:
    """Return after how many seconds so many more jobs fill the disk; without an end, if that is not known."""
    jobs = sum(stats["states"].values())
    if not (jobs and jobs_per_hour and "disk_free_bytes" in facts):
        return math.inf
    bytes_per_hour = facts["used_bytes"] / jobs * jobs_per_hour
    return float(facts["disk_free_bytes"] / bytes_per_hour * 3600)


def _file_findings(facts: dict[str, Any]) -> Iterator[Finding]:
    """Report a file that has become much larger than what is in it."""
    free = facts.get("free_bytes", 0)
    if free > MANY_FREE_BYTES and free > facts["used_bytes"]:
        used = size(facts["used_bytes"])
        text = f"{size(free)} of the database file are free, and used for new jobs; its jobs need {used}"
        yield Finding("info", text, f"to give them back to the disk, run {command_line('admin')} compact")


def _clock_findings(queue: PersistentQInterface, now: float) -> Iterator[Finding]:
    ahead = time.time() - queue.now()
    if abs(ahead) > CLOCK_SECONDS:
        direction = "ahead of" if ahead > 0 else "behind"
        text = f"the clock of this host is {span(abs(ahead))} {direction} the server's"
        yield Finding("warning", text, "synchronize it; the queue uses the server's")
    newest = queue.list_jobs(limit=1, excerpt=0)
    if newest and newest[0].created_at > now + 60:
        at = newest[0].created_at
        yield Finding("warning", f"the newest job was enqueued {ago(at, now)}", "some clock is wrong", at=at)


def _resume(queue: str) -> str:
    return f"{command_line('admin')} resume {shlex.quote(queue)}"


def _move(queue: PersistentQInterface) -> str | None:
    """Return what to do about a move of the queue, or None if there was none."""
    found = queue.move_status()
    if not found:
        return None
    if found["event"] == "moving":
        again = f"repeat the command, or cancel it with {command_line('admin')} move --cancel"
        return f"a move to {found['to']} is in progress or was interrupted: {again}"
    finish = f"{command_line('admin')} move --to URL --finish"
    return f"the queue was moved to {found['to']}: start everything with that URL, then run {finish}"


def recent(queue: PersistentQInterface, now: float) -> Outcomes:
    """Return what happened since the beginning of the last full minute, 60 to 120 seconds ago."""
    return total(recent_minutes(queue, now), float(minute(now - 60)))


def recent_minutes(queue: PersistentQInterface, now: float) -> list[Outcomes]:
    """Return what happened in the last full minute and in the current one, to the jobs of each queue and task."""
    return queue.outcomes(minute(now - 60), now, step_seconds=60)


def per_minute(found: list[Outcomes]) -> dict[str, int]:
    """Return the counts of the last full minute, or of the current one if they are larger already. Unlike an average up
    to now, they change only when something happens."""
    minutes: dict[float, list[Outcomes]] = {}
    for each in found:
        minutes.setdefault(each.at, []).append(each)
    sums = [total(those) for those in minutes.values()]
    return {name: max((getattr(each, name) for each in sums), default=0) for name in COUNTED}


def failing_first(each: Outcomes) -> Any:
    """Sort tasks by their share of failed attempts."""
    return -each.failed_share, each.queue, each.task


def range_start(seconds: float, now: float) -> int:
    """Return when a range of time up to now begins. It consists of 60 periods of whole minutes, the current one
    included; a range of less than an hour, of fewer minutes.
    """
    step = int(max(60, seconds // 3600 * 60))
    return minute(now) // step * step - step * (max(2, math.ceil(seconds / step)) - 1)


def outcome_rows(queue: PersistentQInterface, since: float | None, by: str) -> list[dict[str, Any]]:
    """Return what happened to the jobs of each queue or task since a time (None: ever), those that failed most often
    first."""
    groups: dict[tuple[str, str], list[Outcomes]] = {}
    for each in queue.outcomes(since, None if since is None else now_shown()):
        groups.setdefault((each.queue, each.task if by == "task" else ""), []).append(each)
    minutes = None if since is None else max(1.0, (now_shown() - minute(since)) / 60)
    return [
        {
            "queue": each.queue,
            **({"task": each.task} if by == "task" else {}),
            **{name: getattr(each, name) for name in COUNTED},
            "failed_share": round(each.failed_share, 4),
            "p50_seconds": _rounded(each.run.quantile(0.5)),
            "p95_seconds": _rounded(each.run.quantile(0.95)),
            **({} if minutes is None else {"completed_per_minute": round(each.completed / minutes, 1)}),
        }
        for each in sorted((total(those, 0.0, *key) for key, those in groups.items()), key=failing_first)
    ]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def oldest_pending(stats: dict[str, Any]) -> float | None:
    """Return when the oldest pending job was due, in Unix seconds, of the queues that are not paused; None: none is."""
    due = (each["oldest_pending_at"] for each in stats["queues"].values() if not each["paused"])
    return min((at for at in due if at is not None), default=None)


def why(
    queue: PersistentQInterface, job_id: int, now: float | None = None, *, stats: dict[str, Any] | None = None
) -> str:
    """Return one sentence that says why the job is not running, or what it is doing. `stats` is a recent result of the
    queue's `stats`, if the caller has one. Raises JobNotFound."""
    now = queue.now() if now is None else now
    job = queue.get(job_id)
    if job.state in pqueue.FINISHED:
        return _why_finished(job, now)
    if job.state == "processing":
        return _why_processing(queue, job, now)
    expires_at = job.expires_at
    if expires_at is not None and expires_at <= now:
        return f"it expired {ago(expires_at, now)}: the next consumer that takes jobs cancels it"
    end = "" if expires_at is None else f"; it is cancelled unless it starts within {span(expires_at - now)}"
    return _why_not_started(queue, job, now, stats) + end


def _why_not_started(queue: PersistentQInterface, job: Job, now: float, stats: dict[str, Any] | None) -> str:
    if job.state == "waiting":
        return _why_waiting(queue, job)
    if job.run_at > now and job.state == "scheduled":
        attempt = f", for attempt {job.attempts + 1} of {job.max_attempts}, after {first_line(job.error)}"
        return f"it is due {ago(job.run_at, now)}{attempt if job.attempts else ''}"
    if stats is None or job.queue not in stats["queues"]:
        stats = queue.stats()
    pending = _why_pending(queue, job, stats["queues"][job.queue], now)
    return pending if job.state == "pending" else f"it has been due for {span(now - job.run_at)}: {pending}"


def _why_finished(job: Job, now: float) -> str:
    when = ago(job.finished_at or now, now)
    if job.state == "completed":
        return f"it was completed by {job.consumer} {when}"
    if job.state == "cancelled":
        expired = f": {first_line(job.error)}" if (job.error or "").startswith(EXPIRED) else ""
        return f"it was cancelled {when}{expired}; resubmit it to run it"
    most = "no attempt" if job.max_attempts is None else f"{job.attempts} of {count(job.max_attempts, 'attempt')}"
    again = "it waits again when its parents are resubmitted" if job.waits_for else "resubmit it to try again"
    return f"it failed permanently {when}, after {most}: {first_line(job.error)}; {again}"


def _why_processing(queue: PersistentQInterface, job: Job, now: float) -> str:
    expires = job.lease_expires_at or now
    token = (job.lease_token or "").split(".")[0]
    if not any(each["token"] == token and each["state"] == "running" for each in queue.consumers(job_ids=False)):
        return f"its consumer {job.consumer} is not alive; any live consumer takes it back at once"
    if expires < now:
        return f"its lease, held by {job.consumer}, ran out {ago(expires, now)}; any live consumer takes it back"
    return (
        f"it has been running on {job.consumer} for {span(max(0.0, now - (job.started_at or now)))}; "
        f"its lease expires {ago(expires, now)} and is extended while it runs"
    )


def _why_waiting(queue: PersistentQInterface, job: Job) -> str:
    parents = [each for each in queue.dependencies(job.id, excerpt=0) if each.state not in pqueue.FINISHED]
    names = [f"{each.id} ({each.task}, {each.state})" for each in parents[:MAX_NAMED]]
    more = f" and {len(parents) - MAX_NAMED:,} more" if len(parents) > MAX_NAMED else ""
    return f"it runs after {'jobs' if len(parents) > 1 else 'job'} {', '.join(names)}{more}"


def _why_pending(queue: PersistentQInterface, job: Job, stats: dict[str, Any], now: float) -> str:
    alive = [each for each in queue.consumers() if each["state"] == "running"]
    if stats["paused"]:
        return _why_paused(queue, job.queue)
    if job.assigned_to is not None:
        alive = [each for each in alive if each["name"] == job.assigned_to]
        if not any(_knows(each, job.task) for each in alive):
            why = f"does not know its task {job.task}" if alive else "is not alive"
            return f"it is assigned to {job.assigned_to}, which {why}: assign it elsewhere, or to any"
    elif not alive:
        return f"no consumer is alive: {_start([job.task])}"
    else:
        alive = [each for each in alive if _serves(each, job.queue)]
        if not alive:
            return f"no live consumer serves its queue {job.queue}"
    if not any(_knows(each, job.task) for each in alive):
        return f"no running consumer of its queue knows this task, {job.task}: {_start([job.task])}"
    busy = sum(1 for each in alive if each["job_ids"])
    waiting = f"it is waiting: {count(stats['pending'], 'job')} pending in queue {job.queue}"
    return _why_limited(queue, job, now) or f"{waiting}, {busy} of {count(len(alive), 'consumer')} busy"


def why_held_back(queue: PersistentQInterface, name: str) -> str | None:
    """Return why consumers take no job of a queue if it is paused, or its newest pending job is beyond a limit."""
    if queue.stats()["queues"][name]["paused"]:
        return _why_paused(queue, name)
    newest = queue.list_jobs(queue=name, state="pending", limit=1, excerpt=0)
    return _why_limited(queue, newest[0], queue.now()) if newest else None


def _why_paused(queue: PersistentQInterface, name: str) -> str:
    return f"its queue {name} is paused: {_move(queue) or _resume(name)}"


def _why_limited(queue: PersistentQInterface, job: Job, now: float) -> str | None:
    """Return which limit of its group prevents the job, if any."""
    found = queue.limits(job.queue, job.group, now=now)
    group = f"group {job.group}" if job.group else f"queue {job.queue}"
    if found["max_running"] is not None and found["running"] >= found["max_running"]:
        return f"{group} has {found['running']} of {count(found['max_running'], 'job')} running"
    if found["next_at"] is not None and found["next_at"] > now:
        jobs, seconds = found["rate"]
        next_one = f"its rate allows the next one {ago(found['next_at'], now)}"
        return f"{group} has begun {count(jobs, 'job')} within {interval(seconds)}: {next_one}"
    return None


COUNTERS = {  # an event of pqueue_outcomes, and the help of its counter
    "enqueued": "Jobs enqueued",
    "completed": "Jobs completed",
    "failed": "Jobs that became failed, because no attempt was left or an operator decided so",
    "retried": "Attempts that failed and are repeated",
    "released": "Attempts that did not count, as those of a consumer that stopped",
    "died": "Attempts whose consumer died; they are also counted as retried or failed",
    "expired": "Attempts whose lease ran out; they are also counted as retried or failed",
    "cancelled": "Jobs cancelled",
}


def metrics(
    queue: PersistentQInterface, found: list[Finding], now: float | None = None, *, stats: dict[str, Any] | None = None
) -> str:
    """Return metrics in the text format of Prometheus. `found` are recent `findings`; `stats` is as in `why`."""
    now = queue.now() if now is None else now
    stats = queue.stats() if stats is None else stats
    samples = _Samples()
    for name, each in stats["queues"].items():
        _add_queue(samples, name, each, now)
    for name, groups in queue.count_groups(now=now).items():
        for state, text in GROUPS.items():
            samples.add(f"pqueue_groups_{state}", text, groups[state], queue=name)
    _add_consumers(samples, queue.consumers())
    for outcomes in queue.outcomes():
        labels = {"queue": outcomes.queue, "task": outcomes.task}
        for name, text in COUNTERS.items():
            samples.add(f"pqueue_{name}_total", text, getattr(outcomes, name), kind="counter", **labels)
        waited = "Seconds from the due time of an attempt to its start, of attempts that completed or failed"
        samples.add_times("pqueue_wait_seconds", waited, outcomes.wait, labels)
        samples.add_times("pqueue_run_seconds", "Seconds from start to completion of a job", outcomes.run, labels)
    for schedule in queue.schedules():
        late = 0.0 if schedule.paused else max(0.0, now - schedule.next_at)
        text = "Seconds since the schedule became due, while no consumer has enqueued its job"
        samples.add("pqueue_schedule_delay_seconds", text, late, schedule=schedule.name)
    facts = queue.check(thorough=False)
    for name, text in FILES.items():
        if name in facts:
            samples.add(f"pqueue_{name}", text, facts[name])
    for severity in SEVERITIES:
        number = sum(1 for each in found if each.severity == severity)
        samples.add("pqueue_findings", "Findings of pqueue doctor by severity", number, severity=severity)
    return str(samples)


GROUPS = {
    "pending": "Groups of the queue that have pending jobs; those without a group are one",
    "at_max_running": "Groups of the queue that have as many jobs running as it allows",
    "at_rate": "Groups of the queue whose pending jobs wait for its rate",
}
FILES = {
    "file_bytes": "Size of the database file",
    "used_bytes": "Part of the database file that is in use",
    "free_bytes": "Part of the database file that is free for new jobs",
    "wal_bytes": "Size of the write-ahead log of SQLite",
    "disk_free_bytes": "Free space on the disk of the database",
}


def _add_queue(samples: _Samples, name: str, stats: dict[str, Any], now: float) -> None:
    for state in pqueue.STATES:
        samples.add("pqueue_jobs", "Jobs in the database by queue and state", stats[state], queue=name, state=state)
    age = 0.0 if stats["oldest_pending_at"] is None else max(0.0, now - stats["oldest_pending_at"])
    text = "Seconds since the oldest pending job of the queue became due; 0 if none is pending"
    samples.add("pqueue_oldest_pending_age_seconds", text, age, queue=name)
    rate = None if stats["rate"] is None else stats["rate"][0] / stats["rate"][1]
    for limit, most, text in (
        ("pending_jobs", stats["max_pending"], "Pending jobs that the queue takes at most"),
        ("running_jobs", stats["max_running"], "Jobs of each group of the queue that run at most at the same time"),
        ("rate_jobs_per_second", rate, "Jobs of each group of the queue that begin at most, on average"),
    ):
        if most is not None:
            samples.add(f"pqueue_limit_{limit}", text, most, queue=name)
    samples.add("pqueue_paused", "1 if an operator has paused the queue, else 0", int(stats["paused"]), queue=name)


def _add_consumers(samples: _Samples, consumers: list[dict[str, Any]]) -> None:
    for state in ("running", "stopped", "dead"):
        known = sum(1 for each in consumers if each["state"] == state)
        samples.add("pqueue_consumers", "Consumers by state; those that ended until pruned", known, state=state)
    alive = [bool(each["job_ids"]) for each in consumers if each["state"] == "running"]
    samples.add("pqueue_consumers_busy", "Running consumers that have jobs", sum(alive))
    samples.add("pqueue_consumers_idle", "Running consumers that have no job", len(alive) - sum(alive))


class _Samples:
    def __init__(self) -> None:
        self.lines: dict[str, list[str]] = {}

    def add(self, name: str, text: str, value: float, *, kind: str = "gauge", part: str = "", **labels: str) -> None:
        """Add a sample of a metric; its name ends with part."""
        lines = self.lines.setdefault(name, [f"# HELP {name} {text}.", f"# TYPE {name} {kind}"])
        quoted = ",".join(f'{key}="{self._escaped(label)}"' for key, label in labels.items())
        lines.append(f"{name}{part}{{{quoted}}} {value}" if quoted else f"{name}{part} {value}")

    def add_times(self, name: str, text: str, times: Times, labels: dict[str, str]) -> None:
        """Add a histogram."""
        for bound, number in zip((*BOUNDS, "+Inf"), accumulate(times.counts), strict=True):
            self.add(name, text, number, kind="histogram", part="_bucket", **labels, le=str(bound))
        self.add(name, text, times.seconds, kind="histogram", part="_sum", **labels)
        self.add(name, text, times.number, kind="histogram", part="_count", **labels)

    @staticmethod
    def _escaped(label: str) -> str:
        return printable(label).replace("\\", r"\\").replace('"', r"\"")

    def __str__(self) -> str:
        return "\n".join(line for lines in self.lines.values() for line in lines) + "\n"


# Values for people and for machines ###################################################################################


def span(seconds: float) -> str:
    """Return a duration in its largest fitting unit: 12 s, 3 min, 5 h, 2 d."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    for unit, size, most in (("min", UNITS["m"], 60), ("h", UNITS["h"], 24)):
        if (number := seconds / size) < most - 0.5:  # not rounded first: it may be infinite in a damaged row
            return f"{number:.0f} {unit}"
    return f"{seconds / UNITS['d']:.0f} d"


def size(number: int) -> str:
    """Return a number of bytes in its largest fitting unit: 4.1 kB, 12 MB."""
    value, units = float(number), iter(("kB", "MB", "GB", "TB"))
    unit = "bytes"
    while value >= 999.5 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 9.95 or unit == "bytes" else f"{value:.1f} {unit}"


def ago(at: float, now: float) -> str:
    """Return a time relative to now: 3 min ago, in 5 min."""
    return f"in {span(at - now)}" if at > now else f"{span(now - at)} ago"


def clock(at: float) -> str:
    """Return a local time, with the date if it is not today."""
    try:
        then = datetime.fromtimestamp(at)
    except (OverflowError, ValueError, OSError):  # out of range for a date
        return f"{at:g}"
    return f"{then:%H:%M:%S}" if then.date() == datetime.now().date() else f"{then:%Y-%m-%d %H:%M:%S}"


def utc(at: float) -> str:
    """Return a time for readers without a script: 2026-11-26 13:45:00 UTC."""
    return re.sub(r"T([0-9:]{8}).*", r" \1 UTC", iso(at))


def iso(at: float) -> str:
    """Return a time in ISO 8601, UTC."""
    try:
        return datetime.fromtimestamp(at, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return f"{at:g}"


def first_line(error: str | None) -> str:
    """Return the first line of an error, masked."""
    return (masked_error(error) or "").split("\n", 1)[0]


def failures(queue: PersistentQInterface, most: int, excerpt: int) -> list[dict[str, Any]]:
    """Return the groups of failed jobs. Of the first ones, `most` at most, "line" is the first line of the last error;
    of others, and of those whose last job has changed meanwhile, it is the fingerprint."""
    groups = queue.failures()
    last = [each["last_id"] for each in groups[:most]]
    found = queue.list_jobs(ids=last, limit=len(last), excerpt=excerpt) if last else []
    lines = {job.id: first_line(job.error) for job in found}
    return [
        {**each, "line": line if fingerprint(line) == each["error"] else each["error"]}
        for each in groups
        for line in [lines.get(each["last_id"], "")]
    ]


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def history(queue: PersistentQInterface, job_id: int, **options: int) -> list[dict[str, Any]]:
    """Return the job's history with masked errors; the options are those of the queue's `history`."""
    return [{**each, "error": masked_error(each["error"])} for each in queue.history(job_id, **options)]


def detail(job: Job) -> str:
    """Return one line about a job for a list: its payload, or its error if it failed."""
    if job.state == "failed":
        return first_line(job.error)
    return "" if job.payload is None else json_text(masked(job.payload))


def job_object(job: Job) -> dict[str, Any]:
    """Return a job as a dict, masked, without the lease token that could complete it."""
    return {**masked_job(job)._asdict(), "lease_token": None}


def consumer_row(each: dict[str, Any]) -> dict[str, Any]:
    """Return a consumer as a row of a table."""
    keys = ("name", "state", "host", "pid", "started_at", "last_seen_at", "completed", "failed")
    queues, held = ", ".join(each["queues"] or ["all"]), ", ".join(map(str, each["job_ids"]))
    return {**{key: each[key] for key in keys}, "queues": queues, "jobs": held}


def schedule_row(each: Schedule) -> dict[str, Any]:
    """Return a schedule as a row of a table."""
    due = f"every {interval(each.every_seconds)}" if each.every_seconds else f"{each.cron} {each.zone}"
    keys = ("task", "queue", "group", "next_at", "last_at", "last_job_id", "skipped", "paused")
    return {"name": each.name, "due": due, **{key: getattr(each, key) for key in keys}}


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def changed_text(done: str, changed: int, refused: int) -> str:
    """Return what an action such as "resubmitted {}" did: resubmitted 3 jobs; 1 not changed because of its state."""
    whose = "its" if refused == 1 else "their"
    said = done.format(count(changed, "job"))
    return said + f"; {refused:,} not changed because of {whose} state" * bool(refused)


def is_time(column: str) -> bool:
    return column == "at" or column.endswith("_at")


def for_machines(column: str, value: Any) -> Any:
    """Return a value with its times in ISO 8601; documents of users stay as they are."""
    if column in DOCUMENTS:
        return value
    if isinstance(value, dict):
        return {key: for_machines(key, each) for key, each in value.items()}
    if isinstance(value, list):
        return [for_machines("", each) for each in value]
    return iso(value) if is_time(column) and value is not None else value


def json_text(value: Any) -> str:
    """Return JSON on one line, with unprintable characters escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(mark if mark.isprintable() else json.dumps(mark)[1:-1] for mark in text)


def for_people(column: str, value: Any, now: float) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_time(column):
        return ago(value, now)
    for ending, shown in SHOWN.items():
        if column.endswith(ending):
            return shown(value)
    if isinstance(value, (dict, list)):
        return json_text(value)
    return f"{value:,}" if isinstance(value, int) and not column.endswith("id") else str(value)


BARS = ".▁▂▃▄▅▆▇█"


def bars(numbers: list[int]) -> str:
    """Return a chart of one line, in which a number of 0 is a dot."""
    most = max(1, *numbers)
    return "".join(BARS[-(-number * (len(BARS) - 1) // most)] for number in numbers)


def short_span(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if 0 < seconds < 1 else span(seconds)


def rate_text(rate: tuple[int, float]) -> str:
    return f"{rate[0]:,} in {interval(rate[1])}"


SHOWN: dict[str, Callable[[Any], str]] = {  # the ending of the name of a column, and how its values are shown
    **dict.fromkeys(("keep_seconds", "max_wait_seconds", "every_seconds", "expire_seconds"), interval),
    "_seconds": short_span,
    "_bytes": size,
    "_share": "{:.1%}".format,
    "by_hour": bars,
    "rate": rate_text,
}


def printable(text: str) -> str:
    """Return the text on one line, with control characters escaped."""
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
