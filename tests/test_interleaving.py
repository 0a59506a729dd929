"""Two verbs at once on PostgreSQL: before each statement of one, the other is done whole, or as far as it can be.

What both answer and what they leave must be as if one had been called after the other. But a claim or a
prune may find nothing, as it passes over what another has locked.
"""

# ruff: noqa: F401, F811 - pytest finds fixtures by their names

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import count, product
from typing import Any
from unittest import mock

import psycopg
import pytest
from conftest import PATIENCE_SECONDS
from test_postgres import database, server

import pqueue
from pqueue import Job, QueueError
from pqueue_postgres import MERGE_CHANGES, MISCOUNTED
from pqueue_sqlalchemy import PersistentQSQLAlchemy, PostgresSession

NOW = 1_800_000_000.0
Verb = Callable[[Any, str, Job], Any]


def claim(queue, me, *, limit=1, now=NOW, settled=(), dead=None):
    """Take jobs, in one statement; or in several, looking for the dead before; or none, and recover none."""
    if me in STARVED:
        limit, now, dead = 0, NOW, None
    queue._dead_checked_at = math.inf if dead is None else -math.inf
    late = {name: lambda *_: 0 for name in ("_fire_schedules", "_cancel_expired") if me in LATE}
    with mock.patch.object(queue, "_find_dead", lambda: dead), mock.patch.multiple(queue, **late):
        return queue.complete_and_dequeue(settled, me, limit, now=now)


def together(*verbs: Verb) -> Verb:
    def in_transaction(queue, me, job):
        with queue.transaction():
            return [verb(queue, me, job) for verb in verbs]

    return in_transaction


STARVED: set[str] = set()  # whose claims and prunes find nothing
LATE: set[str] = set()  # whose claims find no schedule that is due, and cancel no job
ANNA = "a" * 16  # the token of a consumer that holds the job

VERBS: dict[str, Verb] = {
    "enqueue": lambda queue, me, job: queue.enqueue("t", key="k", now=NOW),
    "claim": lambda queue, me, job: claim(queue, me),
    "claim step by step": lambda queue, me, job: claim(queue, me, limit=2, dead=[]),
    "recover": lambda queue, me, job: claim(queue, me, now=NOW + 1000, dead=[]),
    "reclaim": lambda queue, me, job: claim(queue, me, dead=[ANNA]),
    "exchange": lambda queue, me, job: claim(queue, me, settled=[(job, 1)]),
    "complete": lambda queue, me, job: queue.complete(job, 1, now=NOW),
    "fail": lambda queue, me, job: queue.fail(job, "no", retry_in_seconds=10, now=NOW),
    "release": lambda queue, me, job: queue.release(job, now=NOW),
    "extend": lambda queue, me, job: queue.extend(job, 5000, now=NOW),
    "update": lambda queue, me, job: queue.update(job, progress=0.5),
    "resubmit": lambda queue, me, job: queue.resubmit(job.id, by=me, now=NOW),
    "mark failed": lambda queue, me, job: queue.mark_failed(job.id, by=me, now=NOW),
    "cancel": lambda queue, me, job: queue.cancel(job.id, by=me, now=NOW),
    "assign": lambda queue, me, job: queue.assign(job.id, me, by=me, now=NOW),
    "change": lambda queue, me, job: queue.change(job.id, payload=3, delay_seconds=5, by=me, now=NOW),
    "change the queue": lambda queue, me, job: queue.change(job.id, queue="other", by=me, now=NOW),
    "run now": lambda queue, me, job: queue.run_now(job.id, by=me, now=NOW),
    "enqueue for a while": lambda queue, me, job: queue.enqueue(
        "t", key="k", key_seconds=60, on_conflict="replace", now=NOW
    ),
    "enqueue until started": lambda queue, me, job: queue.enqueue("t", key="k", key_until="started", now=NOW),
    "enqueue many": lambda queue, me, job: queue.enqueue_many("t", [1, 2], keys=["k", "l"], now=NOW),
    "prune": lambda queue, me, job: 0 if me in STARVED else queue.prune(100, now=NOW),
    "delete": lambda queue, me, job: queue.delete_jobs([job.id]),
    "delete all": lambda queue, me, job: queue.delete_jobs(force=True),
    "cancel and enqueue": together(
        lambda queue, me, job: queue.cancel(job.id, by=me, now=NOW),
        lambda queue, me, job: queue.enqueue("t", key="k", now=NOW),
    ),
}

HOLDERS = {"reclaim", "exchange", "complete", "fail", "release", "extend", "update"}  # of use while the job runs

STATES = {  # attempts, lease, finished
    "scheduled": (0, None, None),
    "pending": (0, None, None),
    "processing": (1, f"{ANNA}.1", None),
    "failed": (2, None, NOW - 1000),
}


class Stop:
    """Where a thread waits: before its n-th statement, the COMMIT among them."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        self.is_there, self.go_on = threading.Event(), threading.Event()

    def pass_by(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            self.is_there.set()
            self.go_on.wait(PATIENCE_SECONDS)


class Stage:
    """A queue for each of two callers, who have a thread each, and what they find before each play."""

    max_pending: int | None = None
    is_scheduled = False
    is_grouped = False  # job 1 and another, pending one are of a group that may have one job running
    expires_at: float | None = None

    def __init__(self, url: str, undo: ExitStack) -> None:
        self.db = undo.enter_context(psycopg.connect(url, autocommit=True, options="-c search_path=pqueue,public"))
        self.queues = {me: undo.enter_context(closing(PersistentQSQLAlchemy(url))) for me in ("first", "second")}
        self.threads = {me: undo.enter_context(ThreadPoolExecutor(1)) for me in self.queues}
        for me in self.queues:
            self.threads[me].submit(self.queues[me].heartbeat, me).result()

    def set(self, state: str) -> Job:
        attempts, token, finished = STATES[state]
        self.db.execute(
            "DELETE FROM jobs; DELETE FROM history; DELETE FROM dependencies; DELETE FROM queues;"
            "ALTER SEQUENCE jobs_id_seq RESTART;"
            "DELETE FROM pending_changes; UPDATE pending_counts SET pending = 0;"
            f"INSERT INTO queues (name, max_pending) VALUES ('default', {self.max_pending or 'NULL'});"
            "INSERT INTO queue_tasks (queue, task) VALUES ('default', 't') ON CONFLICT DO NOTHING;"
            f"DELETE FROM consumers WHERE token = '{ANNA}';"
            "INSERT INTO consumers (name, token, host, pid, slot, tasks, started_at, last_seen_at, state) "
            f"VALUES ('anna', '{ANNA}', '', 1, 1, '[]', 0, 0, 'running')"
        )
        if self.is_scheduled:
            self.db.execute(
                "DELETE FROM schedules; INSERT INTO schedules "
                "(name, task, payload, queue, priority, zone, every_seconds, on_missed, overlap, origin, next_at) "
                f"VALUES ('tick', 't', '3', 'default', 0, 'UTC', 10, 'once', 0, 'schedule', {NOW - 5})"
            )
        columns = "task, payload, priority, max_attempts, created_at, queue, key, key_until, "
        columns += "state, run_at, attempts, finished_at"
        self.db.execute(
            f"INSERT INTO jobs ({columns}, lease_token, lease_expires_at) VALUES "
            "('t', '1', 0, 2, 1, 'default', 'k', 'finished', %s, %s, %s, %s, %s, %s)",
            (state, NOW + 100 * (state == "scheduled"), attempts, finished, token, token and NOW + 60),
        )
        self.db.execute("UPDATE jobs SET expires_at = %s", (self.expires_at,))
        self.db.execute(  # which is never pruned
            f"INSERT INTO jobs ({columns}) VALUES ('t', '2', 0, 2, 1, 'default', NULL, NULL, 'completed', 1, 1, 1)"
        )
        if self.is_grouped:
            self.db.execute(
                "DELETE FROM queue_groups; UPDATE queues SET grouped = 1, max_running = 1;"
                """UPDATE jobs SET "group" = 'a', counted = 1 WHERE id = 1;"""
                f"""INSERT INTO jobs ("group", {columns}) VALUES
                    ('a', 't', '3', 0, 2, 1, 'default', NULL, NULL, 'pending', 1, 0, NULL);"""
                "DELETE FROM group_events; INSERT INTO queue_groups (queue, name, task, next_at) "
                f"VALUES ('default', 'a', 't', {'NULL' if token else '0'})"
            )
        return self.queues["first"].get(1)

    def call(self, me: str, verb: Verb, job: Job, stop: Stop | None = None) -> Future[Any]:
        def answer():
            self.queues[me]._session().stop = stop
            try:
                return str(shown(verb(self.queues[me], me, job)))
            except (QueueError, ValueError) as error:
                return repr(error)

        return self.threads[me].submit(answer)

    def found(self) -> str:
        jobs = "least(id, 3), state, attempts, consumer, substr(lease_token, 1, 16),"
        jobs += "lease_expires_at, assigned_to, run_at, error, progress, result, finished_at, waits_for FROM jobs "
        jobs += "ORDER BY least(id, 3), state"
        history = "event, actor, attempt, error FROM history ORDER BY job_id, id"  # 0: operations, such as a limit
        wrong = f"* FROM ({MISCOUNTED}) wrong"  # how many are pending in a queue that has a limit
        schedules = "name, paused, next_at, last_at, skipped FROM schedules ORDER BY name"
        return str([self.db.execute(f"SELECT {what}").fetchall() for what in (jobs, history, wrong, schedules)])

    def someone_waits(self) -> bool:
        return bool(self.db.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall())

    def in_turn(self, state: str, verbs: dict[str, Verb], order: tuple[str, ...]) -> tuple[Any, ...]:
        job = self.set(state)
        answers = {me: self.call(me, verbs[me], job).result() for me in order}
        return answers.get("first"), answers.get("second"), self.found()

    def at_once(self, state: str, verbs: dict[str, Verb]) -> Iterator[tuple[Any, ...]]:
        for at in count(2):  # before the first, the other simply comes before
            job, stop = self.set(state), Stop(at)
            first = self.call("first", verbs["first"], job, stop)
            first.add_done_callback(lambda _, stop=stop: stop.is_there.set())
            stop.is_there.wait(PATIENCE_SECONDS)
            if first.done():
                return
            second = self.call("second", verbs["second"], job)
            while not second.done() and not self.someone_waits():
                pass
            stop.go_on.set()
            yield first.result(), second.result(), self.found()


def shown(answer: Any) -> Any:
    """Tell jobs by their ids, and all new ones alike."""
    if isinstance(answer, (list, tuple)) and not isinstance(answer, Job):
        return [shown(each) for each in answer]
    job_id = answer.id if isinstance(answer, Job) else answer
    return "new" if isinstance(job_id, int) and job_id > 2 else job_id


def stopping(method):
    def stop_before(session, *arguments):
        if stop := getattr(session, "stop", None):
            stop.pass_by()
        return method(session, *arguments)

    return stop_before


def in_turn(stage: Stage, state: str, verbs: dict[str, Verb]) -> Iterator[tuple[Any, ...]]:
    """Yield what may come of it, what is likely first."""
    nobody_or_one = (set(), {"first"}, {"second"})
    for starved, late in product(nobody_or_one, nobody_or_one[: 3 if stage.is_scheduled or stage.expires_at else 1]):
        with mock.patch(f"{__name__}.STARVED", starved), mock.patch(f"{__name__}.LATE", late):
            yield stage.in_turn(state, verbs, ("first", "second"))
            yield stage.in_turn(state, verbs, ("second", "first"))


def differing(stage: Stage, plays: Iterable[tuple[str, str, str]]) -> list[tuple[Any, ...]]:
    """Return what came of these, states and the names of two verbs, that could not have come of one after the other."""
    wrong, played = [], 0
    for state, first, second in plays:
        verbs = {"first": VERBS[first], "second": VERBS[second]}
        played += len(found := list(stage.at_once(state, verbs)))
        outcomes = set(found)
        for possible in in_turn(stage, state, verbs):
            if not outcomes:
                break
            outcomes.discard(possible)
        wrong += [(state, first, second, *outcome) for outcome in outcomes]
    print(f"\n{played} interleavings")
    return wrong


@pytest.fixture
def stage(database, monkeypatch):
    for name in ("_execute", "_commit"):
        monkeypatch.setattr(PostgresSession, name, stopping(getattr(PostgresSession, name)))
    with ExitStack() as undo:
        yield Stage(database, undo)


def test_two_concurrent_verbs_have_a_serial_outcome(stage):
    of_use = (
        (state, first, second)
        for state, first, second in product(STATES, VERBS, VERBS)
        if first != "exchange"  # which looks again after its commit, when it found nothing
        and (state == "processing" or not {first, second} & HOLDERS)
    )
    assert differing(stage, of_use) == []


def test_backup_at_once_with_a_verb_is_of_one_moment(stage, tmp_path, monkeypatch):
    numbers = count()

    def backup(queue, me, job):
        path = tmp_path / f"{next(numbers)}.db"
        queue.backup(path)
        with closing(pqueue.PersistentQSQLite(path)) as copy:
            jobs = copy.list_jobs()
            return [str((jobs, [copy.history(job.id) for job in jobs], copy.stats()["queues"]))]

    def elsewhere(queue, me, job):
        return queue.enqueue("t", queue="new", now=NOW)

    monkeypatch.setitem(VERBS, "backup", backup)
    monkeypatch.setitem(VERBS, "enqueue elsewhere", elsewhere)
    monkeypatch.setitem(VERBS, "pause", lambda queue, me, job: queue.pause("default"))
    writers = ("enqueue elsewhere", "fail", "cancel", "cancel and enqueue", "prune", "delete")
    assert differing(stage, product(("processing", "failed"), writers, ("backup",))) == []
    assert differing(stage, [("pending", "backup", "pause")]) == []


def test_verbs_at_once_with_a_producer_keep_a_queue_within_its_limit(stage, monkeypatch):
    producers = {
        "enqueue another": lambda queue, me, job: queue.enqueue("t", now=NOW),
        "enqueue some": lambda queue, me, job: queue.enqueue_many("t", [1, 2], now=NOW),
        "enqueue and enqueue": together(*[lambda queue, me, job: queue.enqueue("t", now=NOW)] * 2),
        "add up": lambda queue, me, job: str(queue._read(MERGE_CHANGES))[:0],
    }
    for name, verb in producers.items():
        monkeypatch.setitem(VERBS, name, verb)
    without = ("extend", "update", "complete", "prune", "exchange", "claim step by step")  # the last may take fewer
    others = [name for name in VERBS if name not in without]
    for stage.max_pending in (1, 2):
        stage.queues["first"].limit("default", stage.max_pending)
        plays = (
            (state, first, second)
            for state, pair in product(("pending", "processing", "failed"), product(producers, others))
            for first, second in {pair, pair[::-1]}
            if state == "processing" or not {first, second} & HOLDERS
        )
        assert differing(stage, plays) == []


def test_application_enqueues_in_its_transaction_at_once_with_any_verb(stage, database, monkeypatch):
    def join(queue, me, job):
        stop = queue._session().stop
        with psycopg.connect(database) as own:
            with queue.join(own):
                queue._session().stop = stop
                job_id = queue.enqueue("t", key="k", now=NOW)
            if stop:
                stop.pass_by()  # before the application's COMMIT
        return job_id

    others = [name for name in VERBS if name not in HOLDERS]
    monkeypatch.setitem(VERBS, "join", join)
    plays = [(state, *order) for state in STATES for other in others for order in (("join", other), (other, "join"))]
    plays += [("processing", "join", other) for other in ("complete", "fail", "release")]
    assert differing(stage, plays) == []


def test_schedule_that_is_due_gets_one_job_whatever_happens_at_once(stage, monkeypatch):
    changes = {
        "save": lambda queue, me, job: queue.schedule("tick", "t", 4, every_seconds=20, now=NOW),
        "save again": lambda queue, me, job: queue.schedule("tick", "t", 3, every_seconds=10, now=NOW),
        "pause schedule": lambda queue, me, job: queue.pause_schedule("tick"),
        "resume schedule": lambda queue, me, job: queue.resume_schedule("tick", now=NOW),
        "unschedule": lambda queue, me, job: queue.unschedule("tick"),
    }
    for name, verb in changes.items():
        monkeypatch.setitem(VERBS, name, verb)
    stage.is_scheduled = True
    claims = ("claim", "claim step by step")
    plays = (
        (state, *order)
        for state, claim in product(("pending", "failed"), claims)
        for other in (*claims, *changes, "cancel", "delete all")
        for order in ((claim, other), (other, claim))
    )
    assert differing(stage, plays) == []


def test_job_enqueued_after_one_that_changes_at_once_does_not_wait_forever(stage, monkeypatch):
    monkeypatch.setitem(VERBS, "enqueue after it", lambda queue, me, job: queue.enqueue("t", after=[job.id], now=NOW))
    others = ("complete", "fail", "reclaim", "claim", "mark failed", "resubmit", "run now", "delete", "delete all")
    plays = (
        (state, *order)
        for state, other in product(("pending", "processing", "failed"), (*others, "enqueue after it"))
        for order in {("enqueue after it", other), (other, "enqueue after it")}
        if state == "processing" or other not in HOLDERS
    )
    assert differing(stage, plays) == []


def test_consumer_that_prunes_a_queue_has_a_serial_outcome_with_what_happens_at_once(stage, monkeypatch):
    month = 40 * 86400
    others = {
        "prune kept": lambda queue, me, job: 0 if me in STARVED else queue.prune_kept(now=NOW + month) * 0,
        "keep": lambda queue, me, job: queue.keep("default", failed=None, by=me, now=NOW),
        "limit": lambda queue, me, job: queue.limit("default", 5),
        "begin a move": lambda queue, me, job: queue.begin_move("elsewhere", by=me, now=NOW),
    }
    for name, verb in others.items():
        monkeypatch.setitem(VERBS, name, verb)
    others |= dict.fromkeys(("prune", "delete", "delete all", "resubmit", "claim", "claim step by step"))
    plays = (
        (state, *order)
        for state, other in product(("failed", "pending"), others)
        for order in (("prune kept", other), (other, "prune kept"))
    )
    assert differing(stage, plays) == []


def test_job_that_has_expired_does_not_start_whatever_happens_at_once(stage, monkeypatch):
    put_off = {"put off": lambda queue, me, job: queue.change(job.id, expires_at=NOW + 1000, by=me, now=NOW)}
    monkeypatch.setitem(VERBS, *put_off.popitem())
    stage.expires_at = NOW - 5
    claims = ("claim", "claim step by step")
    plays = (
        (state, *order)
        for state, claim in product(("scheduled", "pending"), claims)
        for other in (*claims, "cancel", "assign", "put off", "run now", "delete all", "enqueue")
        for order in ((claim, other), (other, claim))
    )
    assert differing(stage, plays) == []


def test_removal_of_the_last_limit_deadlocks_with_nothing(stage, monkeypatch):
    """Even if the server looks for deadlocks at once, and so would end whichever of the two waits first."""
    name = stage.db.info.dbname
    stage.db.execute(f"ALTER DATABASE {name} SET deadlock_timeout = '1ms'")
    stage.db.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database() AND "
        "pid <> pg_backend_pid()"  # waits until they have ended: else a queue uses its connection once more
    )

    def limit_and_unlimit(queue, me, job):
        queue.limit("default", 9)
        queue.limit("default", None)

    def read_and_write(queue, me, job):
        with queue.transaction():
            return [queue.count_jobs(state="failed"), queue.enqueue("t", now=NOW)]

    monkeypatch.setitem(VERBS, "limit and unlimit", limit_and_unlimit)
    monkeypatch.setitem(VERBS, "read and write", read_and_write)
    others = ("claim", "claim step by step", "recover", "exchange", "enqueue", "cancel", "read and write")
    plays = product(("pending", "processing"), product(others, ["limit and unlimit"]))
    both = ((state, *order) for state, pair in plays for order in (pair, pair[::-1]))
    assert differing(stage, (play for play in both if play[1] != "exchange")) == []


def test_claims_at_once_with_a_verb_keep_a_group_at_its_limit_and_forget_no_job(stage, monkeypatch):
    """A group with a pending job has one job running when all are done, whatever came in between."""
    stage.is_grouped = True
    names = (
        "claim",
        "claim step by step",
        "exchange",
        "recover",
        "complete",
        "fail",
        "release",
        "mark failed",
        "cancel",
    )
    verbs = {name: VERBS[name] for name in (*names, "assign", "change the queue", "delete")}
    verbs["enqueue"] = lambda queue, me, job: queue.enqueue("t", group="a", now=NOW)
    verbs["limit"] = lambda queue, me, job: queue.limit("default", running=1)
    of_group = """SELECT count(*) FILTER (WHERE state = 'processing'),
        count(*) FILTER (WHERE state = 'pending' AND assigned_to IS NULL)
        FROM jobs WHERE "group" = 'a' AND queue = 'default'"""
    wrong, played = [], 0
    claims = ("claim", "claim step by step")
    pairs = [*product(verbs, claims), *product(claims, verbs)]
    for state, (first, second) in product(("pending", "processing"), pairs):
        if state == "pending" and {first, second} & HOLDERS:
            continue
        for _ in stage.at_once(state, {"first": verbs[first], "second": verbs[second]}):
            running = stage.db.execute(of_group).fetchone()[0]
            stage.call("first", lambda queue, me, job: queue.dequeue_many(me, 2, now=NOW), None).result()
            after, pending = stage.db.execute(of_group).fetchone()
            played += 1
            if max(running, after) > 1 or (pending and not after):
                wrong.append((state, first, second, running, after, pending))
    print(f"\n{played} interleavings")
    assert wrong == []
