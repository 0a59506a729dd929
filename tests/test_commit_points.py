"""Kill each operation before and after every SQL statement, or make that statement fail, and look at what is left."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from test_histories import memory

import pqueue
import pqueue_identity
import pqueue_schema
import pqueue_sqlite
from pqueue import LeaseLost, PersistentQSQLite, QueueBusy, QueueError, QueueFull

NOW = 1_800_000_000.0
LATER = NOW + 1_000_000
NEVER = float("inf")
connect = sqlite3.connect
pytestmark = pytest.mark.usefixtures("looks_at_itself_only")


# Points: before and after every statement, and between the rows of executemany ########################################


def nothing(*_: Any) -> None:
    """At a point that is let be."""


class Wired(sqlite3.Connection):
    """A connection that calls `at_point` before and after each statement."""

    at_point: Callable[[sqlite3.Connection, str, str], None] = staticmethod(nothing)

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if Wired.at_point is nothing:
            return super().execute(sql, *parameters)
        Wired.at_point(self, "before", sql)
        cursor = super().execute(sql, *parameters)
        if sql.startswith("PRAGMA journal_mode ="):  # holds a lock until its row, which nobody needs, is read
            cursor.fetchall()
        with self.dropped(cursor):
            Wired.at_point(self, "after", sql)
        return cursor

    @staticmethod
    @contextmanager
    def dropped(cursor: sqlite3.Cursor) -> Iterator[None]:
        """Close the cursor after an error, as it is without this class, whose frames would hold it."""
        try:
            yield
        except BaseException:
            cursor.close()
            raise

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        def each():
            for row in rows:
                Wired.at_point(self, "row", sql)
                yield row

        Wired.at_point(self, "before", sql)
        cursor = super().executemany(sql, each())
        Wired.at_point(self, "after", sql)
        return cursor


@pytest.fixture(autouse=True)
def wires():
    with mock.patch("sqlite3.connect", lambda *a, **options: connect(*a, **{"factory": Wired, **options})):
        yield
    Wired.at_point = staticmethod(nothing)


class Countdown:
    """Does `then` at the point of this number."""

    def __init__(self, number: int, then: Callable[[sqlite3.Connection, str, str], None]) -> None:
        self.left, self.then = number, then

    def __call__(self, *point: Any) -> None:
        self.left -= 1
        if self.left == -1:
            self.then(*point)


done: collections.Counter[str] = collections.Counter()


@pytest.fixture(autouse=True, scope="module")
def tally():
    yield
    print("", *(f"{count} {what}" for what, count in done.items()), sep="\n")


# Operations ###########################################################################################################


@dataclass
class Operation:
    """`act` is attacked; `prepare` is not, and returns what `act` needs.

    states: in how many others may see the queue. opens: the attack begins with the opening of the queue.
    """

    act: Callable[[PersistentQSQLite, Any], Any]
    prepare: Callable[[PersistentQSQLite], Any] = lambda _: None
    states: int = 2
    opens: bool = False


def take(queue: PersistentQSQLite, consumer: str = "w", limit: int = 2) -> list[pqueue.Job]:
    queue._dead_checked_at = NEVER
    return queue.dequeue_many(consumer, limit, now=NOW)


def leave_free_pages(queue: PersistentQSQLite) -> None:
    """Leave more of them than `compact` gives back in one transaction."""
    queue.delete_jobs(queue.enqueue_many("t", ["x" * 5000] * 15, now=NOW))


def take_and_lose(queue: PersistentQSQLite) -> list[pqueue.Job]:
    jobs = take(queue)
    queue.cancel(jobs[0].id, now=NOW)
    return jobs


def dequeue(at: float, look_for_dead: bool = False, limit: int = 2) -> Callable[[PersistentQSQLite, Any], Any]:
    def act(queue: PersistentQSQLite, _: Any) -> None:
        queue._dead_checked_at = -NEVER if look_for_dead else NEVER
        queue.dequeue_many("w", limit, now=at)

    return act


def scheduled(queue: PersistentQSQLite) -> None:
    take(queue, limit=0)
    queue.schedule("tick", "t", every_seconds=10, on_missed="all", now=NOW)
    queue.schedule("tock", "new", queue="new", every_seconds=30, now=NOW)


def grouped(queue: PersistentQSQLite) -> None:
    take(queue, limit=0)
    for group in "ab":
        queue.enqueue_many("t", range(3), group=group, now=NOW)
    queue.limit("default", running=2, rate=(999, 60), now=NOW)


def take_from_groups(queue: PersistentQSQLite) -> list[pqueue.Job]:
    grouped(queue)
    return queue.dequeue_many("w", 9, now=NOW)


def at_that_time(queue: PersistentQSQLite, call: Callable[[], None]) -> None:
    with mock.patch.object(queue, "_time", lambda _: NOW):
        call()


def family(queue: PersistentQSQLite, *, is_failed: bool = False) -> list[pqueue.Job]:
    """Take the parent of two jobs, one of which has a dependent, too."""
    parent = queue.enqueue("parent", priority=99, now=NOW)
    child = queue.enqueue("child", after=[parent], now=NOW)
    queue.enqueue("child", after=[parent], after_failed="run", run_at=NOW + 50, now=NOW)
    queue.enqueue("grandchild", after=[child], now=NOW)
    jobs = take(queue, limit=1)
    if is_failed:
        queue.mark_failed(parent, now=NOW)
    return jobs


def once_only(queue: PersistentQSQLite) -> None:
    queue.enqueue("once", max_attempts=1, priority=99, now=NOW)
    take(queue, limit=0)


def lost(call: Callable[[], Any]) -> None:
    with suppress(LeaseLost):
        call()
        raise AssertionError("a lost lease was accepted")


def transact(queue: PersistentQSQLite, jobs: list[pqueue.Job]) -> None:
    with queue.transaction() as db:
        db.execute("INSERT INTO business VALUES (1)")
        queue.enqueue("next", now=NOW)
        with suppress(ZeroDivisionError), queue.transaction():
            queue.enqueue("never", now=NOW)
            raise ZeroDivisionError
        queue.complete(jobs[0], "done", now=NOW)


def back_up(queue: PersistentQSQLite, _: Any) -> None:
    target = queue.path.with_suffix(".backup")
    queue.backup(target)
    assert facts(target) == facts(queue.path)


def enqueue_joined(queue: PersistentQSQLite, _: Any) -> None:
    """Enqueue in a transaction of the application's own connection."""
    with closing(sqlite3.connect(queue.path)) as own:
        own.execute("PRAGMA synchronous = FULL -- for business")
        with own:
            own.execute("INSERT INTO business VALUES (2)")
            with queue.join(own):
                queue.enqueue("t", [2], now=NOW)
                queue.enqueue_many("new", range(3), queue="new", now=NOW)


OPERATIONS = {
    "enqueue": Operation(lambda q, _: q.enqueue("t", {"n": 1}, now=NOW)),
    "enqueue to a new queue": Operation(lambda q, _: q.enqueue("t", queue="new", now=NOW)),
    "enqueue later": Operation(lambda q, _: q.enqueue("t", delay_seconds=5, now=NOW)),
    "enqueue that expires": Operation(lambda q, _: q.enqueue("t", expire_seconds=5, now=NOW)),
    "enqueue with a taken key": Operation(lambda q, _: q.enqueue("t", key="k", now=NOW), states=1),
    "enqueue that replaces": Operation(lambda q, _: q.enqueue("t", 9, key="k", on_conflict="replace", now=NOW)),
    "enqueue whose key is free again": Operation(
        lambda q, _: q.enqueue("t", key="k", key_until="started", now=NOW + 60),
        lambda q: (
            q.cancel(q.enqueue("t", key="k", now=NOW), now=NOW),
            q.enqueue("t", key="k", key_seconds=60, now=NOW),
        ),
    ),
    "enqueue_many with keys": Operation(lambda q, _: q.enqueue_many("t", range(3), keys=["a", "k", "a"], now=NOW)),
    "enqueue_many": Operation(lambda q, _: q.enqueue_many("t", range(5), now=NOW)),
    "enqueue_many to a new queue": Operation(lambda q, _: q.enqueue_many("t", range(5), queue="new", now=NOW)),
    "enqueue after others": Operation(lambda q, _: q.enqueue("t", after=[FAILED, KEYED], after_failed="run", now=NOW)),
    "enqueue after a failed one": Operation(lambda q, _: q.enqueue_many("t", [1, 2], after=[FAILED, KEYED], now=NOW)),
    "complete a parent": Operation(lambda q, jobs: q.complete(jobs[0], 1, now=NOW), family),
    "complete_and_dequeue with a parent": Operation(
        lambda q, jobs: q.complete_and_dequeue([(jobs[0], 1)], "w", 2, now=NOW), family
    ),
    "fail a parent for good": Operation(lambda q, jobs: q.fail(jobs[0], "no", retry=False, now=NOW), family),
    "fail a job with a handler": Operation(
        lambda q, jobs: q.fail(jobs[0], "no", retry=False, now=NOW),
        lambda q: (q.on_failed("default", "notify", now=NOW), family(q))[1],
    ),
    "on_failed": Operation(lambda q, _: q.on_failed("default", "notify", now=NOW)),
    "on_failed that is removed": Operation(
        lambda q, _: q.on_failed("default", None, now=NOW), lambda q: q.on_failed("default", "notify", now=NOW)
    ),
    "cancel a parent": Operation(lambda q, jobs: q.cancel(jobs[0].id, now=NOW), family),
    "resubmit a parent": Operation(
        lambda q, jobs: q.resubmit(jobs[0].id, now=NOW), lambda q: family(q, is_failed=True)
    ),
    "delete a parent by force": Operation(
        lambda q, jobs: at_that_time(q, lambda: q.delete_jobs([jobs[0].id], force=True)), family
    ),
    "run_now of a waiting job": Operation(lambda q, jobs: q.run_now(jobs[0].id + 1, now=NOW), family),
    "dequeue": Operation(dequeue(NOW), lambda q: take(q, limit=0)),
    "first dequeue, which registers the consumer": Operation(dequeue(NOW), states=3),
    "dequeue of a last attempt": Operation(lambda q, _: take(q, limit=1), once_only),
    "dequeue that promotes what is due": Operation(dequeue(NOW + 30, limit=9), lambda q: take(q, limit=0)),
    "dequeue that takes expired leases back": Operation(dequeue(NOW + 100), lambda q: take(q, limit=0)),
    "dequeue that cancels expired jobs": Operation(
        dequeue(NOW + 5),
        lambda q: (take(q, limit=0), q.enqueue_many("t", range(3), expire_seconds=5, priority=50, now=NOW)),
    ),
    "dequeue that recovers from dead consumers": Operation(dequeue(NOW, True), lambda q: take(q, limit=0)),
    "complete": Operation(lambda q, jobs: q.complete(jobs[0], [1], now=NOW), take),
    "complete under a lost lease": Operation(lambda q, jobs: lost(lambda: q.complete(jobs[0])), take_and_lose, 1),
    "complete_and_dequeue": Operation(
        lambda q, jobs: q.complete_and_dequeue([(job, 1) for job in jobs], "w", 2, now=NOW + 100), take
    ),
    "complete_and_dequeue, one lease lost": Operation(
        lambda q, jobs: q.complete_and_dequeue([(job, 1) for job in jobs], "w", 2, now=NOW), take_and_lose
    ),
    "fail": Operation(lambda q, jobs: q.fail(jobs[0], "no", retry_in_seconds=9, now=NOW), take),
    "fail for good": Operation(lambda q, jobs: q.fail(jobs[0], "no", retry=False, now=NOW), take),
    "fail under a lost lease": Operation(lambda q, jobs: lost(lambda: q.fail(jobs[0], "no")), take_and_lose, 1),
    "release": Operation(lambda q, jobs: q.release(jobs[0], now=NOW), take),
    "extend": Operation(lambda q, jobs: q.extend(jobs[0], 500, now=NOW), take),
    "extend_all": Operation(lambda q, _: q.extend_all("w", 500, now=NOW), take),
    "update": Operation(lambda q, jobs: q.update(jobs[0], progress=0.5, result={"page": 1}), take),
    "assign": Operation(lambda q, jobs: q.assign(jobs[0].id, "w2", by="ann", now=NOW), take),
    "resubmit": Operation(lambda q, _: q.resubmit(FAILED, by="ann", now=NOW)),
    "mark_failed": Operation(lambda q, jobs: q.mark_failed(jobs[0].id, by="ann", now=NOW), take),
    "cancel": Operation(lambda q, jobs: q.cancel(jobs[0].id, by="ann", now=NOW), take),
    "change": Operation(lambda q, _: q.change(KEYED, payload=[9], delay_seconds=9, queue="other", by="ann", now=NOW)),
    "run_now": Operation(lambda q, _: q.run_now(DUE_SOON, by="ann", now=NOW)),
    "cancel_where": Operation(lambda q, _: q.cancel_where(task="work", by="ann", now=NOW)),
    "delete_where": Operation(lambda q, _: q.delete_where(task="finish")),
    "clear": Operation(lambda q, _: q.clear("default", by="ann", now=NOW)),
    "pause": Operation(lambda q, _: q.pause("default", now=NOW)),
    "limit": Operation(lambda q, _: q.limit("default", 500, now=NOW)),
    "limit that is removed": Operation(
        lambda q, _: q.limit("default", None, now=NOW), lambda q: q.limit("default", 500, now=NOW)
    ),
    "enqueue at a limit": Operation(lambda q, _: q.enqueue("t", now=NOW), lambda q: q.limit("default", 99, now=NOW)),
    "limit of groups": Operation(lambda q, _: q.limit("default", running=2, rate=(999, 60), now=NOW)),
    "weigh": Operation(lambda q, _: q.weigh("default", "a", 2, now=NOW)),
    "first enqueue to a group": Operation(lambda q, _: q.enqueue("t", group="a", now=NOW)),
    "enqueue_many to a group": Operation(lambda q, _: q.enqueue_many("t", range(3), group="a", now=NOW), grouped),
    "dequeue from groups": Operation(dequeue(NOW, limit=9), grouped),
    "complete_and_dequeue from groups": Operation(
        lambda q, jobs: q.complete_and_dequeue([(job, 1) for job in jobs], "w", 9, now=NOW + 40), take_from_groups
    ),
    "complete in a full group": Operation(lambda q, jobs: q.complete(jobs[0], now=NOW), take_from_groups),
    "release in a full group": Operation(lambda q, jobs: q.release(jobs[0], now=NOW), take_from_groups),
    "change of the group": Operation(lambda q, _: q.change(KEYED, group="b", by="ann", now=NOW), grouped),
    "schedule": Operation(lambda q, _: q.schedule("new", "t", [1], cron="@daily", now=NOW)),
    "schedule that is changed": Operation(lambda q, _: q.schedule("tick", "t", every_seconds=7, now=NOW), scheduled),
    "unschedule": Operation(lambda q, _: q.unschedule("tick", now=NOW), scheduled),
    "pause_schedule": Operation(lambda q, _: q.pause_schedule("tick", now=NOW), scheduled),
    "resume_schedule": Operation(lambda q, _: q.resume_schedule("tick", now=NOW + 50), scheduled),
    "dequeue that fires schedules": Operation(dequeue(NOW + 35, limit=9), scheduled),
    "begin_move": Operation(lambda q, _: q.begin_move("elsewhere", by="ann", now=NOW)),
    "cancel_move": Operation(lambda q, _: q.cancel_move(), lambda q: q.begin_move("elsewhere", by="ann", now=NOW)),
    "compact": Operation(lambda q, _: q.compact(), leave_free_pages, states=1),
    "prune": Operation(lambda q, _: q.prune(0, now=NOW + 1), states=5),
    "keep": Operation(lambda q, _: q.keep("others", completed=5, failed=None, now=NOW)),
    "keep in a new queue": Operation(lambda q, _: q.keep("new", completed="1h", now=NOW)),
    "prune_kept": Operation(
        lambda q, _: q.prune_kept(now=NOW + 1), lambda q: q.keep("others", completed=5, failed=5, now=NOW)
    ),
    "delete_jobs": Operation(lambda q, _: q.delete_jobs([1, FAILED]), states=2),
    "delete all jobs": Operation(lambda q, _: q.delete_jobs(force=True), states=2),
    "heartbeat that adds counts up": Operation(lambda q, _: q.heartbeat("w", now=NOW + 80 * 3600), take),
    "expect": Operation(lambda q, _: q.expect("new", max_wait_seconds=5, max_failed_share=0.5, now=NOW)),
    "heartbeat": Operation(lambda q, _: q.heartbeat("w", completed=3, now=NOW), take),
    "transaction": Operation(transact, take),
    "join": Operation(enqueue_joined),
    "leave": Operation(lambda q, _: q.leave("w", now=NOW), take),
    "close, which takes leave": Operation(lambda q, _: at_that_time(q, q.close), take),
    "backup": Operation(back_up, states=1),
    "check": Operation(lambda q, _: q.check(), states=1),
    "opening": Operation(lambda *_: None, states=1, opens=True),
    "first opening, which builds the schema": Operation(lambda *_: None, opens=True),
    "opening that migrates to a newer schema": Operation(lambda *_: None, opens=True),
}
FAILED, KEYED, DUE_SOON = 3, 11, 12
NEXT_MIGRATION = ["ALTER TABLE jobs ADD COLUMN color TEXT", "CREATE INDEX jobs_color ON jobs (color)"]


def build(path: Path) -> None:
    """Fill a queue with a job in every state, two leases of a consumer that died, and one that will run out."""
    queue = PersistentQSQLite(path)
    add = queue.enqueue
    for number in range(3):
        add("finish", number, queue="others", now=NOW - 100)
    jobs = queue.dequeue_many("past", 3, now=NOW - 100)
    queue.complete(jobs[0], "done", now=NOW - 90)
    queue.cancel(jobs[1].id, by="ann", now=NOW - 90)
    queue.fail(jobs[2], "broken", retry=False, now=NOW - 90)
    assert jobs[2].id == FAILED
    add("poison", max_attempts=1, priority=9, now=NOW - 100)
    add("survivor", priority=9, now=NOW - 100)
    for _ in range(2):
        assert queue.dequeue("victim", lease_seconds=150, now=NOW - 90)
    for number, priority in enumerate((0, 5, 0, -5, 5)):
        add("work", number, priority=priority, run_at=NOW - number, now=NOW)
    add("t", key="k", priority=-9, now=NOW)
    add("due soon", delay_seconds=20, priority=7, now=NOW)
    add("due late", delay_seconds=2000, now=NOW)
    add("elsewhere", assigned_to="w2", now=NOW)
    with queue.transaction() as db:
        db.execute("CREATE TABLE business (n INTEGER)")


def in_child(do: Callable[[], None]) -> int:
    """Run this in a forked child, which ends without a goodbye; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            do()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture(scope="module")
def place():
    """Return a folder in memory where there is one: a process may be killed there as well as on a disk."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def template(place):
    folder = place / "template"
    folder.mkdir()
    assert in_child(lambda: build(folder / "queue.db")) == 0
    return folder


# What is left #########################################################################################################


def facts(path: Path) -> dict[str, Any]:
    """Return every row of the database, with consumers' tokens by name and without their real times and pids."""
    if not (path.exists() and path.stat().st_size):
        return {}
    with closing(connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        found = {name: db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in tables}
        version = db.execute("PRAGMA user_version").fetchone()[0]
    if not tables:
        assert version == 0
        return {}
    names = {row[2]: row[1] for row in found["consumers"]}
    found["consumers"] = [(row[1], row[6], row[7], *row[10:]) for row in found["consumers"]]
    token = pqueue.Job._fields.index("lease_token")
    found["jobs"] = [(*row[:token], known(names, row[token]), *row[token + 1 :]) for row in found["jobs"]]
    return json.loads(json.dumps({**found, "version": version}))


def known(names: dict[str, str], token: str | None) -> str | None:
    if token is None:
        return None
    owner, _, number = token.partition(".")
    return f"{names.get(owner, 'gone')}.{number}"


def sweep(path: Path, left: dict[str, Any], swept: list[dict[str, Any]]) -> None:
    """Open the queue again and finish all jobs: none is lost, given twice, out of order or over its attempts.

    Rows from which all jobs were finished before, `swept`, are not tried again.
    """
    with closing(PersistentQSQLite(path, durability="normal", busy_seconds=0.5)) as queue:
        assert queue._writer_lock.acquire()
        queue._writer_lock.release()
        if left in swept:
            return
        swept.append(left)
        assert queue.check()["problems"] == []
        jobs = {job.id: job for job in queue.list_jobs(limit=1000)}
        for job in jobs.values():
            assert (job.state == "processing") == (job.lease_token is not None) == (job.lease_expires_at is not None)
            assert job.attempts <= (3 if job.max_attempts is None else job.max_attempts)
            if job.assigned_to and job.state in pqueue.UNFINISHED:
                queue.assign(job.id, None, now=NOW)
        queue.resume("default")
        queue.on_failed("default", None)
        for schedule in queue.schedules():
            queue.unschedule(schedule.name)
        done: dict[str | None, list[Any]] = {}
        while job := queue.dequeue("sweeper", now=LATER):
            assert jobs[job.id].state in pqueue.UNFINISHED
            assert job.attempts <= job.max_attempts
            done.setdefault(job.group, []).append((-job.priority, job.run_at, job.id))
            assert all(parent.state in pqueue.FINISHED for parent in queue.dependencies(job.id))
            queue.complete(job, now=LATER)
        for of_group in done.values():
            in_order = [each for each in of_group if jobs[each[2]].state != "waiting"]
            assert in_order == sorted(set(in_order))
        for job in jobs.values():
            after = queue.get(job.id)
            assert after.state in pqueue.FINISHED
            if job.state in pqueue.FINISHED:
                assert after == job
            if job.state == "processing":
                with pytest.raises((LeaseLost, pqueue.InvalidTransition)):
                    queue.complete(job, now=LATER)
                assert queue.get(job.id) == after
            if after.state == "failed" and job.state == "processing":
                assert f"lost by {job.consumer}" in after.error
        assert len(queue.list_jobs(limit=1000)) == len(jobs)


# Attacks ##############################################################################################################


@dataclass
class Point:
    when: str
    sql: str
    facts: dict[str, Any]

    def __repr__(self) -> str:
        return f"{self.when} {' '.join(self.sql.split())[:60]}"


def rehearse(operation: Operation, path: Path) -> list[Point]:
    """Run the operation undisturbed; return its points, with what others saw there, and after it."""
    points: list[Point] = []

    def note(_, when, sql):
        points.append(Point(when, sql, facts(path)))

    attack = Attack(operation, path)
    attack.run(note)
    points.append(Point("the end", "", facts(path)))
    attack.close()
    seen = [point.facts for number, point in enumerate(points) if not number or point.facts != points[number - 1].facts]
    assert len(seen) <= operation.states
    return points


class Attack:
    """One run of an operation in a folder of its own."""

    def __init__(self, operation: Operation, path: Path) -> None:
        self.operation, self.path = operation, path
        self.queue: PersistentQSQLite | None = None

    def run(self, at_point: Callable[[sqlite3.Connection, str, str], None]) -> None:
        prepared = None
        if not self.operation.opens:
            self.queue = PersistentQSQLite(self.path)
            prepared = self.operation.prepare(self.queue)
        Wired.at_point = staticmethod(at_point)
        try:
            self.queue = self.queue or PersistentQSQLite(self.path)
            self.operation.act(self.queue, prepared)
        finally:
            Wired.at_point = staticmethod(nothing)

    def close(self) -> None:
        if self.queue:
            self.queue.close()


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(params=OPERATIONS)
def operation(request, template, place, monkeypatch):
    """Return an operation and what makes a fresh folder for it, by number."""
    if "newer schema" in request.param:
        for module in (pqueue_identity, pqueue_sqlite, pqueue_schema):
            monkeypatch.setattr(module, "MIGRATIONS", [*module.MIGRATIONS, NEXT_MIGRATION])

    def folder(number: object) -> Path:
        path = place / request.node.name / str(number) / "queue.db"
        if "first opening" in request.param:
            path.parent.mkdir(parents=True)
        else:
            shutil.copytree(template, path.parent, ignore=shutil.ignore_patterns("*.wakeup"))
        return path

    return OPERATIONS[request.param], folder


def test_operation_killed_at_any_statement_is_done_or_not(operation):
    operation, folder = operation
    points, swept = rehearse(operation, folder("rehearsal")), []
    for number, point in enumerate(points[:-1]):
        path = folder(number)
        status = in_child(lambda: Attack(operation, path).run(Countdown(number, kill)))  # noqa: B023
        assert os.WIFSIGNALED(status), point
        assert os.WTERMSIG(status) == signal.SIGKILL, point
        assert facts(path) == point.facts, point
        sweep(path, point.facts, swept)
        shutil.rmtree(path.parent)
    done["points killed"] += len(points) - 1


def fault(message: str, ends_transaction: bool = False) -> Callable[[sqlite3.Connection, str, str], None]:
    """Fail the statement as SQLite does; after a full disk or an I/O error it may have rolled back already."""

    def fail(connection: sqlite3.Connection, *_: Any) -> None:
        if ends_transaction and connection.in_transaction:
            connection.rollback()
        raise sqlite3.OperationalError(message)

    return fail


def interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


FAULTS = {
    "locked": (fault("database is locked"), QueueBusy),
    "full": (fault("database or disk is full"), QueueFull),
    "full and rolled back": (fault("database or disk is full", ends_transaction=True), QueueFull),
    "I/O error": (fault("disk I/O error"), QueueError),
    "I/O error and rolled back": (fault("disk I/O error", ends_transaction=True), QueueError),
    "interrupt": (interrupt, KeyboardInterrupt),
}


def test_operation_that_fails_at_any_statement_is_atomic_and_the_queue_works_on(operation):
    operation, folder = operation
    points, swept = rehearse(operation, folder("rehearsal")), []
    for name, (strike, expected) in FAULTS.items():
        for number, point in enumerate(points[:-1]):
            if name != "interrupt" and point.when != "before":
                continue
            files = sorted(os.listdir("/proc/self/fd"))
            path, where = folder(number), f"{name} {point}"
            attack = Attack(operation, path)
            try:
                attack.run(Countdown(number, strike))
                left = points[-1].facts
            except (expected, sqlite3.OperationalError) as error:
                assert isinstance(error, expected) or "business" in point.sql, where  # the user's own statement
                assert "\n" not in str(error)
                left = point.facts
            assert facts(path) == left, where
            goes_on(attack.queue, path, where)
            attack.close()
            assert sorted(os.listdir("/proc/self/fd")) == files, where
            if name == "interrupt":
                sweep(path, left, swept)
            shutil.rmtree(path.parent)
            done[f"faults injected: {name}"] += 1


def goes_on(queue: PersistentQSQLite | None, path: Path, point: str) -> None:
    """See that the object works as before, and that it blocks no other."""
    if queue is None or queue._closed:
        return
    assert not queue.in_transaction, point
    if queue.move_status():
        queue.cancel_move()
    with closing(PersistentQSQLite(path, busy_seconds=0.05)) as other:
        assert other._writer_lock.acquire(), point
        other._writer_lock.release()
        job_id = other.enqueue("other", queue="another", priority=100, now=NOW)
    assert queue._writer_lock.acquire(), point
    queue._writer_lock.release()
    job = queue.dequeue("w", now=NOW)
    assert job.id == job_id, point
    queue.complete(job, now=NOW)
    with queue.transaction():
        job_id = queue.enqueue("kept", now=NOW)
    assert queue.get(job_id).task == "kept"
