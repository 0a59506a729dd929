"""Run the task of a finished job once more, in this process, without changing the queue.

On SQLite the task works on a private copy of the database, so that a slow task holds no lock. On PostgreSQL it runs in
a transaction that is rolled back: until then, others wait to change a row that the task has changed.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import pdb
import pprint
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pqueue
from pqueue import FINISHED, TASKS, InvalidTransition, Job, PersistentQInterface, QueueError, QueueFull, Snooze
from pqueue_files import temporary_folder
from pqueue_tasks import opened
from pqueue_tools import file_task, termination, worker
from pqueue_tools.masking import masked_job, masked_text
from pqueue_tools.outcome import error_text, settle, summary, trace_of
from pqueue_tools.output import CommandResult
from pqueue_tools.process import create_whole, print_error, utc_now
from pqueue_tools.report import ago, first_line, json_text, printable, short_span

CONSUMER = "replay"
NEW = (
    *("task", "queue", "group", "payload", "state", "priority", "run_at", "expires_at"),
    *("max_attempts", "key", "assigned_to", "meta"),
)
# The methods of a queue that change nothing themselves: the report does not list their calls.
READS = """
    aresult check close consumers count_expired count_groups count_jobs dependencies exclusive expect_other_tables
    expectations failures get handlers has_begun has_moved_to held_jobs held_leases history holds is_partial_copy
    join limits list_jobs move_status next_due now operations other_tables outcomes peek pending_tasks result
    retention schedules search_jobs stalled stats transaction unfinished_payloads uses_database wait
""".split()  # noqa: SIM905
VERBS = [
    name
    for name in dir(PersistentQInterface)
    if callable(getattr(PersistentQInterface, name)) and not name.startswith("_") and name not in READS
]
WRITES = re.compile(
    r"\s*(INSERT|UPDATE|DELETE|REPLACE|MERGE|CREATE|ALTER|DROP|TRUNCATE|COPY|WITH\b.*\b(INSERT|UPDATE|DELETE))\b",
    re.IGNORECASE | re.DOTALL,
)


class TimeLimit(BaseException):
    """The task ran for longer than the replay allows. Not an Exception, so that a task does not handle it."""


class RolledBack(Exception):
    """Ends the transaction of a replay."""


@dataclass
class Replayed:
    """What a task did, and would have changed."""

    before: Job  # as the task got it
    after: Job  # as it would have been settled
    error: BaseException | None
    seconds: float
    enqueued: list[Job]  # as they would be at the end
    called: list[str]  # other methods of the queue, by the task
    executed: list[str]  # statements that may write, by the task, on the connection of `transaction`

    @property
    def failed(self) -> bool:
        return self.error is not None and not issubclass(type(self.error), Snooze)  # isinstance may run its code


@dataclass
class Effects:
    """What the task does with its queue."""

    ids: list[int] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    depth: int = 0  # of calls of the queue inside each other
    connections: list[Any] = field(default_factory=list)  # in a transaction of the task

    def note(self, sql: str) -> None:
        """Note a statement, unless the queue itself executes it or it only reads."""
        if self.depth == 0 and WRITES.match(sql):
            self.executed.append(masked_text(" ".join(sql.split())))


def replay(mine: PersistentQInterface, job: Job, timeout_seconds: float, *, is_alone: bool) -> Replayed:
    """Run the task of a finished job of a `rehearsal` in this thread; what it prints goes to stderr.

    is_alone: only this thread is inside the transaction that is rolled back. An exception of the task is not raised.
    """
    job = mine.lease_again(job.id, CONSUMER, max_attempts=TASKS[job.task].max_attempts)
    began = time.monotonic()
    with _recorded(mine, is_alone=is_alone) as record, _time_limit(timeout_seconds):
        error, result = _run(mine, job)
    seconds, after = time.monotonic() - began, job
    if type(error) is not TimeLimit:  # which may have broken off a statement of the queue
        error = settle(mine, job, error, result)
        after = mine.get(job.id)
    return Replayed(job, after, error, seconds, _stored(mine, record.ids), record.called, record.executed)


@contextmanager
def rehearsal(queue: PersistentQInterface) -> Iterator[PersistentQInterface]:
    """Yield a queue with the same jobs, whose changes are undone at the end.

    Modules that are imported in the block, and their tasks, get it from `open_queue` with the URL of the other.
    """
    with suppress(RolledBack), temporary_folder("pqueue-replay-") as folder:
        if isinstance(queue, pqueue.PersistentQSQLite):
            copy = folder / "queue.db"
            try:
                queue.backup(copy)
            except QueueFull:
                raise QueueFull(f"cannot copy the database to {folder}: no room; set TMPDIR to another disk") from None
            with pqueue.open_queue(copy, durability="normal") as mine, _in_place_of(queue, mine):
                url = os.environ.get("PQUEUE_URL")
                os.environ["PQUEUE_URL"] = str(copy)  # for programs that the task starts
                try:
                    yield mine
                finally:
                    os.environ.pop("PQUEUE_URL") if url is None else os.environ.update(PQUEUE_URL=url)
        else:
            with _in_place_of(queue, queue), queue.transaction():
                yield queue
                raise RolledBack


@contextmanager
def _in_place_of(queue: PersistentQInterface, mine: PersistentQInterface) -> Iterator[None]:
    open_queue = pqueue.open_queue

    @functools.wraps(open_queue)
    def open_mine(url: Any = None, **options: Any) -> PersistentQInterface:
        if not isinstance(queue, pqueue.PersistentQSQLite):
            is_same = url is None or str(url) == os.environ.get("PQUEUE_URL")
        else:
            is_same = url is None or (not pqueue.is_postgres(url) and pqueue.sqlite_path(url).resolve() == queue.path)
        return mine if is_same else open_queue(url, **options)

    closes = mock.patch.object(mine, "close")  # a task closes what it opens
    with mock.patch.object(pqueue, "open_queue", open_mine), closes, mock.patch.dict(opened, default=mine):
        yield


def _run(mine: PersistentQInterface, job: Job) -> tuple[BaseException | None, Any]:
    """Run the task; return its exception and its result."""
    pid = os.getpid()
    try:
        with redirect_stdout(sys.stderr):
            result = copy_context().run(pqueue.run_task, mine, job)
        worker.end_child(pid)
        return None, result
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        worker.end_child(pid)
        if type(error) is SystemExit and error.code in [128 + number for number in termination.SIGNALS]:
            raise
        return error, None


def _stored(queue: PersistentQInterface, job_ids: list[int]) -> list[Job]:
    """Return those of these jobs whose transaction was not rolled back."""
    found = []
    for job_id in job_ids:
        with suppress(QueueError):
            found.append(queue.get(job_id))
    return found


@contextmanager
def _recorded(mine: PersistentQInterface, *, is_alone: bool) -> Iterator[Effects]:
    """Record what the task does."""
    record, thread, transaction = Effects(), threading.get_ident(), mine.transaction

    def expect_thread(name: str) -> None:
        if is_alone and threading.get_ident() != thread:
            raise QueueError(f"cannot {name} in a replay on PostgreSQL: expected a call by the task's own thread")

    def recording(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            expect_thread(name)
            record.depth += 1
            try:
                found = method(*args, **kwargs)
            finally:
                record.depth -= 1
            if record.depth == 0:
                _note_call(record, name, args, kwargs, found)
            return found

        return call

    @contextmanager
    def recorded_transaction() -> Iterator[Any]:
        expect_thread("open a transaction")
        with transaction() as connection, _recorded_statements(connection, record):
            yield connection

    methods: dict[str, Any] = {name: recording(name, getattr(mine, name)) for name in VERBS}
    with mock.patch.multiple(mine, transaction=recorded_transaction, **methods):
        yield record


def _note_call(record: Effects, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> None:
    if name in ("enqueue", "enqueue_many"):
        ids = [found] if name == "enqueue" else found
        record.ids += [int(each) for each in ids if getattr(each, "is_new", True)]
        return
    values = [repr(each.id if isinstance(each, Job) else each) for each in args]
    values += [f"{key}={each!r}" for key, each in kwargs.items()]
    record.called.append(masked_text(f"{name}({', '.join(values)})"))


@contextmanager
def _recorded_statements(connection: Any, record: Effects) -> Iterator[None]:
    if connection in record.connections:  # a transaction inside another
        yield
        return

    def note_with_values(_: Any, __: Any, sql: str, values: Any, *___: Any) -> None:
        record.note(f"{sql} {values}" if values else sql)

    record.connections.append(connection)
    with ExitStack() as undo:
        undo.callback(record.connections.remove, connection)
        if hasattr(connection, "set_trace_callback"):
            connection.set_trace_callback(record.note)
            undo.callback(connection.set_trace_callback, None)
        else:
            from sqlalchemy import event

            event.listen(connection, "before_cursor_execute", note_with_values)
            undo.callback(event.remove, connection, "before_cursor_execute", note_with_values)
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit in the task after this time, and again each second."""

    def interrupt(*_: Any) -> None:
        raise TimeLimit(f"the replay reached its limit of {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The command ##########################################################################################################


def command(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Replay a job, print the traceback of an exception, and return what the task would have changed."""
    job = queue.get(options.job_id)
    if job.state not in FINISHED:
        raise InvalidTransition(f"cannot replay job {job.id}: expected one of {', '.join(FINISHED)}, it is {job.state}")
    logging.basicConfig(level="INFO", format="%(levelname)s:%(name)s:%(message)s")  # for what the task logs
    with rehearsal(queue) as mine:
        worker.known_tasks(options.import_)
        if job.task not in TASKS:
            got = ", ".join(sorted(TASKS)) or "none"
            raise ValueError(f"cannot replay job {job.id}: expected --import MODULE with task {job.task!r}, got {got}")
        if options.save:
            save_test(queue, job, options.import_, options.save)
        print_error("admin", "warning: what the task does outside the queue's database is real: files, requests, mails")
        found = replay(mine, job, options.timeout, is_alone=mine is queue)
    if found.error is not None and found.failed:
        print(masked_text(error_text(found.error).partition("\n")[2]), file=sys.stderr)
        if options.pdb:
            pdb.post_mortem(trace_of(found.error))
    row = _row(found)
    row["saved"] = options.save and str(options.save)
    return CommandResult([row], _text(row, queue.now()), int(found.failed))


def _row(found: Replayed) -> dict[str, Any]:
    after = masked_job(found.after)
    text = None if found.error is None else masked_text(summary(found.error))
    return {
        "job": after.id,
        "task": after.task,
        "attempt": found.before.attempts,
        "ended": "interrupted" if type(found.error) is TimeLimit else after.state,
        "run_at": after.run_at if after.state == "scheduled" else None,
        "result": after.result if after.state == "completed" else None,
        "error": text,
        "seconds": round(found.seconds, 3),
        "enqueued": [{name: getattr(masked_job(job), name) for name in NEW} for job in found.enqueued],
        "called": found.called,
        "executed": found.executed,
    }


def _text(row: dict[str, Any], now: float) -> str:
    """Return the row as lines for people."""
    ended = f"job {row['job']} would be {row['ended']}"
    if row["run_at"] is not None:
        ended += f", and run again {ago(row['run_at'], now)}"
    if row["ended"] == "interrupted":
        ended = f"job {row['job']} was interrupted; --timeout allows more time"
    ended += f": {row['error']}" if row["error"] else f", with result {json_text(row['result'])}"
    lines = [f"{ended}  ({short_span(row['seconds'])})"]
    for job in row["enqueued"]:
        due = f", due {ago(job['run_at'], now)}" if job["state"] == "scheduled" else ""
        lines.append(f"enqueued: {job['task']} {json_text(job['payload'])} in queue {job['queue']}{due}")
    lines += [f"called: {each}" for each in row["called"]] + [f"executed: {each}" for each in row["executed"]]
    lines += [f"saved: {row['saved']}"] if row["saved"] else []
    return "\n".join([*lines, "nothing was changed in the queue"])


# A test of it #########################################################################################################

TEST = '''\
"""Run job {id} again; saved at {at}. Secrets in the payload are not masked."""

from pqueue import run_task
from pqueue_tools.testing import temporary_queue

{imports}

PAYLOAD = {payload}
FIELDS = {fields}  # of the job, apart from those of a new one
RESULTS = {results}  # of the jobs that it ran after


def test_job_{id}():
{error}    with temporary_queue() as queue:
        parents = []
        for result in RESULTS:
            parents.append(queue.enqueue("parent"))
            queue.complete(queue.dequeue("test"), result)
        queue.enqueue({task!r}, PAYLOAD, after=parents)
        job = queue.dequeue("test")
        run_task(queue, job._replace(**FIELDS))


if __name__ == "__main__":
    test_job_{id}()
'''


def save_test(queue: PersistentQInterface, job: Job, modules: list[str], path: Path) -> None:
    """Write a test that runs the task with the payload of this job. Raises QueueError, also if the file exists."""
    fields = {"meta": job.meta, "result": None if job.state == "completed" else job.result}
    literal = functools.partial(pprint.pformat, width=110, sort_dicts=False)
    failure = f"    # It failed: {printable(first_line(job.error))}\n" if job.error else ""
    text = TEST.format(
        id=job.id,
        task=job.task,
        at=utc_now(),
        imports="\n".join(f"import {name}  # noqa: F401 - has tasks" for name in modules or [file_task.__name__]),
        payload=literal(job.payload),
        fields=literal({name: value for name, value in fields.items() if value is not None}),
        results=literal([each.result for each in queue.dependencies(job.id) if each.state == "completed"]),
        error=failure,
    )
    try:
        create_whole(path, text)
    except OSError as error:
        raise QueueError(f"cannot save {path}: {error.strerror}") from None
