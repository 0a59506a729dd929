"""The actions of the dashboard, shared by both front ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pqueue
from pqueue import PersistentQInterface, QueueError
from pqueue_operating import spread
from pqueue_schema import FINISHED
from pqueue_tools import dashboard, report, supervisor
from pqueue_tools.commands import Ago, json_value, moment, rate
from pqueue_tools.dashboard import FILTERS, FigureCache, Form, one
from pqueue_tools.masking import masked_job
from pqueue_tools.process import sentence_of, whole_number
from pqueue_values import interval, short

FORM_FIELDS = ("scope", "id", "back", "confirmed", "when", "rate")  # of an action on many jobs, apart from the filters
Act = Callable[[PersistentQInterface, Form, str | None], str]
JobVerb = Callable[..., Any]  # called with the queue, the job's id, and who acts


def _jobs_action(act: JobVerb, done: str, *, parents_first: bool = False) -> Act:
    """Act on the jobs of the form's `id` fields or, with `scope` = matching, on all that match its filters."""

    def perform(queue: PersistentQInterface, form: Form, by: str | None) -> str:
        now = queue.now()  # the same time for all makes them one operation
        verb = partial(act, queue, form=form, by=by, now=now, times=_times(form, now))
        if filters := _filters(form):
            done_to = queue.act_where(verb, **filters, shown=masked_job, parents_first=parents_first)
            changed, refused = int(done_to), done_to.refused
        else:
            ids = _ids(form)
            errors = queue.act_on(ids, verb, parents_first=parents_first)
            if len(errors) == len(ids):
                raise errors[0]
            changed, refused = len(ids) - len(errors), len(errors)
        if changed and act is _delete:  # and with the jobs their history
            queue.record(f"deleted {report.count(changed, 'job')}", by=by)
        if not changed:
            raise ValueError(report.changed_text(done, 0, refused) if refused else "no job matches the filter")
        return report.changed_text(done, changed, refused)

    return perform


def _verb(name: str) -> JobVerb:
    return lambda queue, job_id, *, by, now, **_: getattr(queue, name)(job_id, by=by, now=now)


def _delete(queue: PersistentQInterface, job_id: int, **_: Any) -> None:
    if not queue.delete_jobs([job_id]):
        raise pqueue.JobNotFound(f"no job {job_id}")


def _retry(
    queue: PersistentQInterface, job_id: int, *, by: str | None, now: float, times: Iterator[float], **_: Any
) -> None:
    """Schedule a job for the next time, also if it has finished."""
    at = next(times)
    with queue.exclusive([job_id]):
        again = queue.resubmit if queue.get(job_id).state in FINISHED else queue.change
        again(job_id, run_at=at, by=by, now=now)


def _times(form: Form, now: float) -> Iterator[float]:
    """Yield when the jobs are to run, by the time and the rate in the form. Raises ValueError."""
    at = moment(one(form, "when"))
    yield from spread(now + at if isinstance(at, Ago) else at, rate(one(form, "rate")) if one(form, "rate") else None)


def _edit(queue: PersistentQInterface, job_id: int, *, form: Form, by: str | None, now: float, **_: Any) -> None:
    """Change the payload of a job; one that has finished is resubmitted."""
    with queue.exclusive([job_id]):
        job = queue.get(job_id)
        payload = json_value(one(form, "payload"), job.payload)
        if job.state in FINISHED:
            queue.resubmit(job_id, by=by, now=now)
        queue.change(job_id, payload=payload, by=by, now=now)


def _clone(queue: PersistentQInterface, form: Form, by: str | None) -> str:
    job = queue.get(whole_number(0)(one(form, "id")))
    options: dict[str, Any] = {"queue": job.queue, "group": job.group, "priority": job.priority}
    options["assigned_to"] = job.assigned_to
    new = queue.enqueue(job.task, job.payload, max_attempts=job.max_attempts, **options)
    queue.record(f"enqueued job {new}, a copy of job {job.id}", by=by)
    return f"enqueued job {new}, a copy of job {job.id}"


def _enqueue(queue: PersistentQInterface, form: Form, by: str | None) -> str:
    given, to = one(form, "payload"), one(form, "queue")
    new = queue.enqueue(one(form, "task"), json_value(given) if given.strip() else None, queue=to or "default")
    queue.record(f"enqueued job {new}", by=by)
    return f"enqueued job {new}"


def _filters(form: Form) -> dict[str, Any]:
    """Return the filters of an action on all jobs that match, or {} if the form lists jobs. Raises ValueError."""
    if one(form, "scope") != "matching":
        return {}
    if unknown := set(form) - {*FILTERS, *FORM_FIELDS}:
        raise ValueError(f"expected the filters {', '.join(FILTERS)}, got {', '.join(sorted(unknown))}")
    filters = dashboard.filters_of(form)
    if not filters:
        raise ValueError("expected a filter; to act on all jobs, use the command line")
    return filters


def _ids(form: Form) -> list[int]:
    if not form.get("id"):
        raise ValueError("expected at least one selected job")
    return sorted({whole_number(0)(each) for each in form["id"]})


QUESTIONS = {"mark_failed": "mark {} as failed", "run_now": "run {} now"}


def question(cache: FigureCache, name: str, form: Form) -> str:
    """Return what an action on many jobs would do, with their number: cancel 12 jobs. Raises QueueError, ValueError."""
    filters = _filters(form)
    if name == "retry":
        next(_times(form, 0.0))
    number = cache.queue().count_jobs(**filters, shown=masked_job) if filters else len(_ids(form))
    if not number:
        raise ValueError("no job matches the filter")
    what = QUESTIONS.get(name, f"{name} {{}}").format(report.count(number, "job"))
    return what + (_later(form, number) if name == "retry" else "")


def _later(form: Form, number: int) -> str:
    """Return when a number of jobs would run: in 10m, at 10/1s: within 10 min."""
    when, given = one(form, "when"), one(form, "rate")
    start = f" in {when}" if isinstance(moment(when), Ago) else f" at {when}"
    if not given:
        return start
    jobs, seconds = rate(given)
    ends = f"within {report.span(number / jobs * seconds)}"
    return f"{start}, {report.count(jobs, 'job')} in {interval(seconds)}, {ends}"


def _assign(queue: PersistentQInterface, form: Form, by: str | None) -> str:
    name, job_id = one(form, "consumer"), whole_number(0)(one(form, "id"))
    queue.assign(job_id, name or None, by=by)
    return f"job {job_id} assigned to {name or 'any consumer'}"


def _named(verb: str, kind: str, done: str) -> Act:
    """Act on the queue or the schedule that the form names."""

    def act(queue: PersistentQInterface, form: Form, by: str | None) -> str:
        name = _known_queue(queue, form) if kind == "queue" else one(form, kind)
        getattr(queue, verb)(name, by=by)
        return f"{kind} {name} {done}"

    return act


def _known_queue(queue: PersistentQInterface, form: Form) -> str:
    """Return the queue that the form names. Raises ValueError if there is none: the action would create it."""
    name = one(form, "queue")
    if name not in queue.stats()["queues"]:
        raise ValueError(f"no queue {short(name)}")
    return name


def _limit(queue: PersistentQInterface, form: Form, by: str | None) -> str:
    name, given = _known_queue(queue, form), one(form, "max_pending")
    most = whole_number(0)(given) if given else None
    queue.limit(name, most, by=by)
    done = "has no limit on pending jobs" if most is None else f"limited to {report.count(most, 'pending job')}"
    return f"queue {name} {done}"


def _add_group(queue: PersistentQInterface, _: Form, by: str | None) -> str:
    name = supervisor.add_group()
    queue.record(f"added consumers {name}", by=by)
    return f"added {name}: {supervisor.GROUP_SIZE} consumers"


def _remove_group(queue: PersistentQInterface, form: Form, by: str | None) -> str:
    supervisor.remove_group(one(form, "group"))
    queue.record(f"removed consumers {one(form, 'group')}", by=by)
    return f"removed {one(form, 'group')}"


ACTIONS: dict[str, Act] = {
    "resubmit": _jobs_action(_verb("resubmit"), "resubmitted {}", parents_first=True),
    "retry": _jobs_action(_retry, "scheduled {}", parents_first=True),
    "edit": _jobs_action(_edit, "changed {}"),
    "clone": _clone,
    "enqueue": _enqueue,
    "mark_failed": _jobs_action(_verb("mark_failed"), "marked {} as failed"),
    "cancel": _jobs_action(_verb("cancel"), "cancelled {}"),
    "delete": _jobs_action(_delete, "deleted {}"),
    "run_now": _jobs_action(_verb("run_now"), "made {} pending"),
    "assign": _assign,
    "pause": _named("pause", "queue", "paused"),
    "resume": _named("resume", "queue", "resumed"),
    "limit": _limit,
    "pause_schedule": _named("pause_schedule", "schedule", "paused"),
    "resume_schedule": _named("resume_schedule", "schedule", "resumed"),
    "add_group": _add_group,
    "remove_group": _remove_group,
}


def act(cache: FigureCache, name: str, form: Form, by: str | None = None) -> tuple[bool, str]:
    """Perform an action in the name of `by` (None: this process's user). Return whether it succeeded, and a message."""
    if dashboard.read_only():
        return False, "refused: this dashboard is read-only"
    try:
        done = ACTIONS[name](cache.queue(), form, by)
    except (QueueError, supervisor.ManagerError, ValueError, OSError) as error:
        return False, sentence_of(error)
    cache.expire()
    return True, done
