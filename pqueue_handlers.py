"""Failure handlers: a task that gets a job for each job of a queue, or of another task, that becomes `failed`.

The commit that makes a job `failed`, whatever the cause, inserts the job for the handler, which runs after the failed
one: see `dependencies.after_failed`. So each failure is handled once, and the failed job is kept until then. The job of
a handler has no handler itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from pqueue_backend import Backend, Session
from pqueue_schema import ADD_TASK, FOR_EACH, THESE
from pqueue_tasks import Task
from pqueue_values import encode_json, to_json, valid_name

# Set the handler of a queue ("queue:NAME") or a task ("task:NAME").
SET_HANDLER = """
INSERT INTO handlers (name, task) VALUES (:name, :task) ON CONFLICT (name) DO UPDATE SET task = excluded.task"""

# Delete a handler.
DELETE_HANDLER = "DELETE FROM handlers WHERE name = :name"

# Return the handlers.
HANDLERS = "SELECT name, task FROM handlers ORDER BY name"


# Return which of these jobs failed and have a handler; a task's handler takes precedence over its queue's.
# guard: the job of a handler has no handler
# guard: a cancelled job has no handler
UNHANDLED = f"""
SELECT id, queue, jobs.task, error, attempts, consumer, coalesce(t.task, q.task) AS handler FROM jobs
LEFT JOIN handlers t ON t.name = 'task:' || jobs.task LEFT JOIN handlers q ON q.name = 'queue:' || queue
WHERE id {THESE} AND state = 'failed' AND coalesce(t.task, q.task) IS NOT NULL
    AND NOT EXISTS (SELECT 1 FROM dependencies WHERE job_id = jobs.id AND after_failed = 'handle' {FOR_EACH})
ORDER BY id"""

# Insert the job of a handler, whatever the limit of the queue: `scheduled`, so that the next dequeue promotes it.
ADD_HANDLER_JOB = """
INSERT INTO jobs (queue, task, payload, state, priority, run_at, created_at)
VALUES (:queue, :task, :payload, 'scheduled', 0, :now, :now) RETURNING id"""


class Handling(Backend):
    """The operations on failure handlers."""

    @abstractmethod
    def _attach(self, *arguments: Any, **options: Any) -> None: ...

    def on_failed(
        self, queue: str, task: str | Task[..., Any] | None, *, by: str | None = None, now: float | None = None
    ) -> None:
        """Enqueue a job of this task for each job of the queue that becomes `failed` from now on; None: no longer.

        The task is called with `failed`, a dict: "id", "queue", "task" and "error" of the failed job, its number of
        "attempts", and its last "consumer", or None. Its job is enqueued in the same queue, whatever the limit of that.
        The handler that `@task(on_failed=…)` gives to a task takes precedence over that of the queue. The job of a
        handler has no handler itself.
        """
        handler = None if task is None else valid_name("task", task.name if isinstance(task, Task) else task)
        self._set_handler(f"queue:{valid_name('queue', queue)}", handler, by, now)

    def declare_handlers(self, tasks: Iterable[Task[..., Any]], *, now: float | None = None) -> None:
        """Save the handlers that `@task` gives to these tasks; delete those that their tasks gave before."""
        now = self._time(now)
        known, saved = {f"task:{each.name}": each.on_failed for each in tasks}, self.handlers()
        for name, handler in known.items():
            if saved.get(name) != handler:
                self._set_handler(name, handler, None, now)

    def handlers(self) -> dict[str, str]:
        """Return the task that handles failures, by "queue:NAME" and "task:NAME"."""
        return dict(self._read(HANDLERS))

    def _set_handler(self, name: str, task: str | None, by: str | None, now: float | None) -> None:
        with self._transaction() as session:
            self.record(f"set failure handler of {name.replace(':', ' ', 1)}: {task or 'none'}", by=by, now=now)
            if task is None:
                session.change(DELETE_HANDLER, {"name": name})
            else:
                session.change(SET_HANDLER, {"name": name, "task": task})

    def _handle_failures(self, session: Session, job_ids: list[int], now: float) -> None:
        """Enqueue the jobs of the handlers of these jobs, as far as they failed."""
        for *job, handler in session.run(UNHANDLED, {"ids": to_json(job_ids)}):
            facts = dict(zip(("id", "queue", "task", "error", "attempts", "consumer"), job, strict=True))
            params = {"queue": facts["queue"], "task": handler, "now": now}
            session.change(ADD_TASK, params)
            params["payload"] = encode_json("payload", {"failed": facts})
            ((job_id,),) = session.run(ADD_HANDLER_JOB, params)
            self._attach(session, [job_id], [facts["id"]], "handle", now)
