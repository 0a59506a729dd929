"""PostgreSQL with many queues, large tables and a network: what verbs lock, and how much they ask."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from operator import methodcaller
from unittest import mock

import postgres_server
import psycopg
import pytest
import sqlalchemy
from conftest import ROOT
from postgres_server import BINARIES
from test_postgres import database, driver_of, explain, server  # noqa: F401 - fixtures

import admin
import pqueue
import pqueue_postgres
import pqueue_retention
import pqueue_schema
import pqueue_sqlalchemy
from bench.delaying_proxy import DelayingProxy
from pqueue import PersistentQSQLite, QueueError
from pqueue_listener import NOTIFY
from pqueue_sqlalchemy import PersistentQSQLAlchemy, PostgresSession
from test_pqueue import PATIENCE_SECONDS, wait_until

DOCS = ROOT / "docs/postgres.md"


@pytest.fixture
def queue(database):  # noqa: F811
    with closing(pqueue.open_queue(database)) as queue:
        yield queue


def in_order(jobs):
    return sorted(jobs, key=lambda job: (-job.priority, job.run_at, job.id))


def fill(queue, queues, jobs, seed=0):
    """Jobs of mixed priorities and times, some of them delivered before, some on their last attempt."""
    rng = random.Random(seed)
    with queue.transaction():
        for _ in range(jobs):
            name = f"q{min(int(rng.expovariate(6) * queues), queues - 1)}"
            queue.enqueue(
                "t",
                queue=name,
                priority=rng.choice((0, 0, 0, 5)),
                run_at=rng.randrange(1, 20),
                max_attempts=rng.choice((1, 3, 3, 3, 3, 3, 3, 3)),
                assigned_to=rng.choice((None,) * 9 + ("w",)),
            )


@pytest.mark.parametrize("queues", [1, 7, 40, 200])
@pytest.mark.parametrize("limit", [1, 16, 512])
def test_consumer_of_many_queues_gets_all_jobs_in_order(queue, queues, limit):
    fill(queue, queues, 400, seed=queues)
    expected, got = in_order(queue.list_jobs(limit=1000)), []
    while jobs := queue.dequeue_many("w", limit, now=100):
        assert len(jobs) == 1 or all(job.attempts == 1 < job.max_attempts for job in jobs)
        got += jobs
    assert [job.id for job in got] == [job.id for job in expected]


@pytest.mark.parametrize("queues", [1, 7, 40, 200])
def test_consumer_skips_exactly_what_another_has_locked(queue, queues, database):  # noqa: F811
    fill(queue, queues, 300, seed=queues)
    expected = [job.id for job in in_order(queue.list_jobs(limit=1000))]
    locked = random.Random(1).sample(expected[:150], 60)
    with psycopg.connect(database) as other:
        other.execute("SELECT 1 FROM pqueue.jobs WHERE id = ANY (%s) FOR UPDATE", (locked,))
        got = []
        while jobs := queue.dequeue_many("w", 20, now=100):
            got += [job.id for job in jobs]
            assert got == [each for each in expected if each not in locked][: len(got)]
        assert len(got) >= 60
    while jobs := queue.dequeue_many("w", 20, now=100):
        got += [job.id for job in jobs]
    assert sorted(got) == sorted(expected)


@pytest.mark.parametrize(
    "run_at", ["j", "mod(abs(hashint4(100 * i + j)), 9999)", "100 * i + j"], ids=["turns", "random", "one by one"]
)
def test_consumer_of_many_queues_gets_full_batches(queue, run_at):
    for number in range(100):
        queue.enqueue("t", queue=f"q{number}", run_at=2e6)
    with queue.transaction() as db:
        db.exec_driver_sql(
            f"""INSERT INTO pqueue.jobs (queue, task, payload, state, priority, run_at, max_attempts, created_at)
                SELECT 'q' || i, 't', 'null', 'pending', 0, {run_at}, 3, 1
                FROM generate_series(0, 99) i, generate_series(1, 40) j"""
        )
    expected, got, claims = [job.id for job in in_order(queue.list_jobs(limit=4100, state="pending"))], [], 0
    while jobs := queue.dequeue_many("w", 64, now=1e6):
        got += [job.id for job in jobs]
        claims += 1
    assert got == expected
    assert claims < 1.5 * 4000 / 64


def explain_claims(queue, option, limit, share):
    """Yield the plan of a claim with each width, which is undone."""
    params = {
        "consumer": "w",
        "limit": limit,
        "queues": None,
        "tasks": None,
        "token": "t.1",
        "now": time.time(),
        "lease_expires_at": 3e9,
        "known_attempts": None,
        "share": share,
    }
    for width in (pqueue_postgres.SHARES, *pqueue_postgres.WIDTHS):
        sql, names = pqueue_postgres.translated(pqueue_postgres.claim_alone(width))
        with driver_of(queue) as driver:
            driver.execute("BEGIN")
            values = [params[name] for name in names]
            command = f"EXPLAIN (ANALYZE, {option}) ".encode()
            rows = psycopg.RawCursor(driver).execute(command + sql, values).fetchall()
            driver.execute("ROLLBACK")
        yield width, "\n".join(row[0] for row in rows)


def test_claim_reads_few_pages_unless_a_long_transaction_keeps_dead_rows(queue, database):  # noqa: F811
    """Whether or not the server vacuums: a claim marks the entries of dead rows in the index, and later ones skip them.
    docs/postgres.md has the figures."""

    def work(jobs):
        for number in range(jobs):
            producers[number % 2].enqueue("t")
            queue.complete(queue.dequeue("w"))
        queue.dequeue("w")
        return max(
            sum(map(int, re.findall(r"(?:hit|read)=(\d+)", plan.split("\n")[1])))
            for _, plan in explain_claims(queue, "BUFFERS", 8, 9)
        )

    with closing(pqueue.open_queue(database)) as other, psycopg.connect(database, autocommit=True) as admin:
        producers = queue, other
        for table in pqueue_postgres.TABLES:
            admin.execute(f"ALTER TABLE pqueue.{table} SET (autovacuum_enabled = off)")
        for _ in range(4):
            assert work(100) < 60
            queue.prune(0)
        admin.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        admin.execute("SELECT count(*) FROM pqueue.jobs")
        found = [work(100), work(100)]  # fewer than dead rows if neighbours are in one page
        assert 60 < found[0] < 60 + 2 * 100
        assert found[0] < found[1] < 60 + 2 * 200
        admin.execute("ROLLBACK")
        assert work(1) < 60


def test_consumer_looks_at_fewer_jobs_of_each_task_when_that_has_sufficed_for_a_while():
    reach, shares = pqueue_postgres.Reach(), []
    for taken in (0, 1, 1, *[8] * 2 * pqueue_postgres.SUFFICED):
        shares.append(reach.share(8))
        reach.adapt(pqueue_postgres.SHARES, 8, tasks=8, looked_at=8, taken=taken)
    assert shares == [shares[0], 3, 5, *[9] * pqueue_postgres.SUFFICED, *[5] * pqueue_postgres.SUFFICED]


def test_claim_reads_little_of_the_jobs_that_have_finished_since_the_last_vacuum(queue):
    """Of their leases nothing; of their index the pages, which are empty, only once if all are of one task."""
    with queue.transaction() as db:
        db.exec_driver_sql("ALTER TABLE pqueue.jobs SET (autovacuum_enabled = off)")
    queue.enqueue_many("t", range(20_000))
    jobs: list[pqueue.Job] = []
    for _ in range(20_000 // 250 + 1):
        jobs, _ = queue.complete_and_dequeue([(job, None) for job in jobs], "w", 250)
    assert queue.stats()["states"]["completed"] == 20_000
    _, plan = explain(queue, pqueue_schema.OVERDUE, {"now": time.time()}, "ANALYZE, BUFFERS,")
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 10
    queue.enqueue_many("t", range(600))
    assert len(queue.dequeue_many("w", 250)) == len(queue.dequeue_many("w", 250)) == 250
    plans = dict(explain_claims(queue, "BUFFERS", 1, queue._reach.share(1)))
    pages = {
        width: sum(map(int, re.findall(r"(?:hit|read)=(\d+)", plan.split("\n")[1]))) for width, plan in plans.items()
    }
    assert pages[queue._reach.width()] < 0.7 * pages[1]


def test_consumer_may_claim_more_jobs_at_once_while_they_are_of_many_queues(queue):
    for number in range(30):
        queue.enqueue_many("t", range(50), queue=f"q{number}")
    while queue.max_batch == pqueue_postgres.MAX_BATCH:
        assert queue.dequeue_many("w", 9)
    assert len(queue.dequeue_many("w", queue.max_batch)) == 2 * pqueue_postgres.MAX_BATCH
    queue.delete_jobs(force=True)
    queue.enqueue_many("t", range(600))
    queue.dequeue_many("w", 1)
    assert len(queue.dequeue_many("w", queue.max_batch)) == pqueue_postgres.MAX_BATCH


@pytest.mark.parametrize("queues", [1, 30, 200])
@pytest.mark.parametrize("limit", [1, 16, 512])
def test_claim_locks_hardly_more_rows_than_it_takes(queue, queues, limit):
    for number in range(queues):
        queue.enqueue_many("t", range(3000 // queues), queue=f"q{number}")
    for width, plan in explain_claims(queue, "WAL", limit, 1 + limit // queues + 1):
        taken = int(re.search(r"Update on jobs[^\n]*actual[^\n]* rows=(\d+)", plan)[1])
        records = int(re.search(r"LockRows.*?\n.*?WAL: records=(\d+)", plan, re.DOTALL)[1])
        assert taken >= min(limit, width), plan
        assert records <= 2 * taken, plan


@pytest.mark.parametrize("queues", [1, 30])
def test_claim_locks_no_job_that_another_consumer_has_leased_since_it_began(queue, queues, database, monkeypatch):  # noqa: F811
    """Which would make the completion of that job wait for it."""
    monkeypatch.setattr(pqueue, "DEAD_CHECK_SECONDS", 3600.0)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    locked = "SELECT count(*) FROM pqueue.jobs WHERE consumer = 'other' AND xmax <> xmin"  # its own lock remains
    for number in range(100):
        queue.enqueue("t", queue=f"q{number % queues}")
    done = [queue.dequeue("w") for _ in range(5)]  # so that the number of queues is known
    with (
        psycopg.connect(database) as holder,
        closing(pqueue.open_queue(database)) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        holder.execute("SELECT 1 FROM pqueue.jobs WHERE id = %s FOR UPDATE", [done[0].id])
        claim = pool.submit(queue.complete_and_dequeue, [(job, None) for job in done], "w", 8)
        wait_until(lambda: holder.execute(waiting).fetchone() == (1,))
        leased = other.dequeue_many("other", 5)
        assert len(leased) == 5
        holder.commit()
        jobs, lost = claim.result()
        assert (bool(jobs), lost, {job.id for job in jobs} & {job.id for job in leased}) == (True, [], set())
        assert holder.execute(locked).fetchone() == (0,)


@pytest.mark.parametrize("queues", [1, 30])
@pytest.mark.parametrize("locks", [("COMMIT",), ("ROLLBACK",), ("COMMIT", "ROLLBACK")])
def test_jobs_that_were_only_locked_are_claimed_before_later_ones(queue, queues, database, monkeypatch, locks):  # noqa: F811
    monkeypatch.setattr(pqueue, "DEAD_CHECK_SECONDS", 3600.0)
    ids = [queue.enqueue("t", queue=f"q{number % queues}") for number in range(100)]
    for _ in range(5):  # so that the number of queues is known
        queue.complete(queue.dequeue("w"))
    with ExitStack() as stack:
        holders = [stack.enter_context(psycopg.connect(database, autocommit=True)) for _ in locks]
        for command in ("BEGIN", "SELECT FROM pqueue.jobs FOR SHARE", *locks):
            for holder in holders if command not in locks else [holders[locks.index(command)]]:
                holder.execute(command)
    monkeypatch.setattr(queue, "_step_by_step", mock.Mock())  # which claims in another statement
    assert [job.id for job in queue.dequeue_many("w", 9)] == ids[5:14]


def test_claim_that_takes_all_there_is_reads_no_more_of_each_task_the_next_time(queue):
    queue.enqueue_many("t", range(100))
    queue.delete_jobs()
    for number in range(20):
        queue.enqueue(f"t{number}")
    assert [len(queue.dequeue_many("w", limit)) for limit in (1, 1, 1, 99)] == [1, 1, 1, 17]
    assert queue._reach.width() == pqueue_postgres.SHARES
    assert queue._reach.share(1) == 2


def test_compact_empties_the_table_and_is_for_its_owner(queue, database):  # noqa: F811
    queue.enqueue_many("t", ["x" * 1000] * 1000)
    queue.delete_jobs()
    role = f"worker_{random.randrange(10**9)}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        admin.execute(f"GRANT USAGE ON SCHEMA pqueue TO {role}")
        admin.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA pqueue TO {role}")
    url = sqlalchemy.make_url(database).set(username=role, password="secret")
    with closing(pqueue.open_queue(url.render_as_string(hide_password=False), create=False)) as worker:
        with pytest.raises(QueueError, match="expected the owner of the tables"):
            worker.compact()
    sizes = []
    assert queue.compact(progress=sizes.append) % 8192 == 0  # pages
    with psycopg.connect(database, autocommit=True) as admin:
        assert admin.execute("SELECT pg_relation_size('pqueue.jobs')").fetchone() == (0,)
        tables = [f"pg_total_relation_size('pqueue.{name}')" for name in pqueue_postgres.TABLES]
        assert admin.execute(f"SELECT {' + '.join(tables)}").fetchone() == (sizes[-1],)
        assert queue.compact() == 0
        admin.execute(f"DROP OWNED BY {role}")
        admin.execute(f"DROP ROLE {role}")


def test_backup_of_a_role_that_may_only_read_is_whole(queue, database, tmp_path):  # noqa: F811
    queue.enqueue_many("t", range(5))
    role = f"reader_{random.randrange(10**9)}"
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        admin.execute(f"GRANT USAGE ON SCHEMA pqueue TO {role}")
        admin.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA pqueue TO {role}")
    url = sqlalchemy.make_url(database).set(username=role, password="secret")
    with closing(pqueue.open_queue(url.render_as_string(hide_password=False), create=False)) as reader:
        reader.backup(tmp_path / "copy.db")
    with closing(PersistentQSQLite(tmp_path / "copy.db")) as copy:
        assert copy.list_jobs() == queue.list_jobs()
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"DROP OWNED BY {role}")
        admin.execute(f"DROP ROLE {role}")


def test_backup_stops_nobody_and_shows_one_moment(queue, database, tmp_path, monkeypatch):  # noqa: F811
    """While the copy is being made, a consumer completes jobs, and a producer enqueues; none of it is in the copy."""
    queue.enqueue_many("t", range(5))
    before = queue.list_jobs()
    reached, go_on = threading.Event(), threading.Event()

    def tell(copied):
        reached.set()
        assert go_on.wait(PATIENCE_SECONDS)

    def copy():
        with closing(pqueue.open_queue(database)) as source, closing(PersistentQSQLite(tmp_path / "copy.db")) as target:
            source.copy_to(target, tell)

    backup = threading.Thread(target=copy)
    backup.start()
    assert reached.wait(PATIENCE_SECONDS)
    job = queue.dequeue("w")
    queue.extend(job)
    queue.complete(job)
    queue.enqueue("late", queue="new")
    queue.limit("new", 10)
    go_on.set()
    backup.join()
    with closing(PersistentQSQLite(tmp_path / "copy.db")) as target:
        assert target.list_jobs() == before


def test_deleting_chosen_jobs_stops_nobody(queue, database):  # noqa: F811
    ids = queue.enqueue_many("t", range(4))
    with closing(pqueue.open_queue(database)) as other, queue.transaction():
        assert queue.delete_jobs(ids[:2]) == 2
        assert other.dequeue("w").id == ids[2]
        other.enqueue("t")


@pytest.mark.parametrize("batch", [1000, 7])
def test_prune_asks_twice_for_each_batch(queue, monkeypatch, batch):
    monkeypatch.setattr(pqueue_retention, "PRUNE_BATCH", batch)
    for job_id in queue.enqueue_many("t", range(50)):
        queue.cancel(job_id, now=1)
    last = queue.enqueue("t")
    asked, told = [], []
    execute = type(queue._session())._execute
    monkeypatch.setattr(
        type(queue._session()), "_execute", lambda self, sql, *more: asked.append(sql) or execute(self, sql, *more)
    )
    assert queue.prune(0, states=["cancelled"], progress=told.append) == 50
    batches = 50 // batch + 1
    assert asked.count(pqueue_schema.PRUNABLE) == asked.count(pqueue_postgres.PRUNE) == batches
    assert len(asked) < 2 * batches + 15  # the others once: consumers, groups, and the counts
    assert told == [min(50, batch * (n + 1)) for n in range(batches)]
    assert [job.id for job in queue.list_jobs()] == [last]
    assert queue._read("SELECT count(*) FROM history")[0][0] == 0


@pytest.fixture
def far(database):  # noqa: F811
    """The URL of the database through a network that takes 2 ms each way."""
    url = sqlalchemy.make_url(database)
    with psycopg.connect(database) as near:
        proxy = DelayingProxy(near.info.host, near.info.port, 0.002)
    yield url.set(host="127.0.0.1", port=proxy.port, query={}).render_as_string(hide_password=False)
    proxy.close()


def test_verbs_work_over_a_slow_network(far):
    with closing(pqueue.open_queue(far)) as queue:
        done = threading.Event()

        def work():
            jobs = []
            while not done.is_set():
                jobs = queue.complete_and_dequeue([(job, job.payload) for job in jobs], "w", 10)[0]
                if not jobs:
                    queue.wait(1, consumer="w")

        consumer = threading.Thread(target=work)
        consumer.start()
        ids = queue.enqueue_many("t", range(30)) + [queue.enqueue("t", n) for n in range(10)]
        wait_until(lambda: queue.count_jobs(state="completed") == len(ids))
        done.set()
        consumer.join()
        assert queue.prune(0, now=time.time() + 100) == len(ids) - 1


def test_bench_measures_the_network_and_counts_connections(database, place):  # noqa: F811
    columns = ("--only", "prune over 0.5 ms", "--only", "connections")
    command = ("--quick", *columns, "--json", "found.json", "--url", database)
    done = place.run("-m", "bench", *command, PYTHONPATH=str(ROOT), BENCH_SCALE="0.01")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((place.folder / "found.json").read_text())["results"]
    found = {row["column"]: row["figures"] for row in results}
    assert found["prune over 0.5 ms"]["jobs/s"][0] > 0
    assert found["connections"] == {"idle consumer": [2], "consumer at work": [2], "producer": [1], "dashboard": [1]}


FAILED = """
WITH RECURSIVE failed (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM failed WHERE n < {jobs})
INSERT INTO {jobs_table} (queue, task, payload, state, priority, run_at, max_attempts, created_at, finished_at, error)
SELECT 'default', 't', 'null', 'failed', 0, 1, 1, 1, n, 'ValueError: ' || {letters} FROM failed"""


@pytest.mark.parametrize("backend", ["PostgreSQL", "SQLite"])
def test_view_of_failures_reads_a_bounded_number_of_groups(queue, tmp_path, backend):
    """The database groups the failed jobs, and returns the groups that were last to fail."""
    jobs = pqueue_schema.MAX_GROUPS + 500
    char, name = ("chr", "pqueue.jobs") if backend == "PostgreSQL" else ("char", "jobs")
    letters = " || ".join(f"{char}(97 + n / {26**power} % 26)" for power in range(3))
    sql = FAILED.format(jobs=jobs, jobs_table=name, letters=letters)
    with ExitStack() as undo:
        if backend == "SQLite":
            queue = undo.enter_context(closing(PersistentQSQLite(tmp_path / "queue.db")))
        with queue.transaction() as db:
            db.execute(sqlalchemy.text(sql) if backend == "PostgreSQL" else sql)
        read, found = queue._read, []
        with mock.patch.object(queue, "_read", lambda *asked: found.append(read(*asked)) or found[-1]):
            groups = queue.failures()
        assert max(map(len, found)) == len(groups) == pqueue_schema.MAX_GROUPS
        assert [group["last_at"] for group in groups] == list(range(jobs, 500, -1))


@pytest.fixture(params=["PostgreSQL", "SQLite"])
def two_queues(request, tmp_path):
    """Two objects of one queue."""
    url = tmp_path / "queue.db" if request.param == "SQLite" else request.getfixturevalue("database")
    with closing(pqueue.open_queue(url)) as queue, closing(pqueue.open_queue(url)) as other:
        yield queue, other


def test_consumer_seldom_reads_all_jobs_that_are_processing(two_queues, monkeypatch):
    queue, _ = two_queues
    monkeypatch.setattr(pqueue, "DEAD_CHECK_SECONDS", 0)
    session, asked = type(queue._session()), []
    run = session.run
    monkeypatch.setattr(session, "run", lambda self, sql, *more: asked.append(sql) or run(self, sql, *more))
    for _ in range(20):
        assert queue.dequeue("w") is None
    assert asked.count(pqueue_schema.ORPHANED) == 1


def test_consumer_takes_back_all_jobs_of_a_dead_one_however_many(two_queues, monkeypatch):
    queue, other = two_queues
    monkeypatch.setattr(pqueue, "DEAD_CHECK_SECONDS", 0)
    assert queue.dequeue("w") is None  # looks, and finds none
    monkeypatch.setattr(pqueue, "RECLAIM_BATCH", 2)
    other.enqueue_many("t", range(5), max_attempts=3)
    for _ in range(5):
        assert other.dequeue("gone")
    gone = [-1, *(consumer.slot.number for consumer in other._registry.values())]
    monkeypatch.setattr(queue, "_is_alive", lambda slot: slot not in gone)
    with other.transaction() as db:  # on PostgreSQL, its lock is looked for, and when it was last seen
        if not isinstance(other, PersistentQSQLite):
            db.exec_driver_sql("UPDATE pqueue.consumers SET last_seen_at = 1, slot = -1 WHERE name = 'gone'")
    for _ in range(3):
        queue.dequeue("w")
    assert queue.list_jobs(consumer="gone", state="processing") == []


def heap_fetches(plan):
    return plan.get("Heap Fetches", 0) * plan["Actual Loops"] + sum(map(heap_fetches, plan.get("Plans", ())))


def test_stats_after_a_bulk_load_soon_read_nothing_but_the_index(tmp_path):
    """The server vacuums although the new rows are few, compared with the others: an index alone does not say which
    rows are visible."""
    own = postgres_server.Server(tmp_path / "server").create().start(autovacuum_naptime=1)
    try:
        with closing(pqueue.open_queue(own.url)) as queue, psycopg.connect(own.url, autocommit=True) as admin:
            queue.enqueue_many("t", range(40_000))
            admin.execute("VACUUM (ANALYZE) pqueue.jobs")
            queue.enqueue_many("t", range(4_000))

            def reads_only_the_index():
                _, plan = explain(queue, pqueue_schema.COUNTS, {}, "ANALYZE,")
                return heap_fetches(plan) < 100  # the last page, which is still being filled

            wait_until(reads_only_the_index)
    finally:
        own.kill()


def test_check_of_a_sound_queue_finds_nothing(queue):
    queue.enqueue("t", key="k")
    facts = queue.check()
    assert facts["problems"] == []
    assert facts["file_bytes"] > 1_000_000
    assert "file_bytes" not in queue.check(thorough=False)  # which reads little


JOBS = "ALTER TABLE pqueue.jobs"
# What a DBA may do to the schema, of each kind of its parts, and what `check` says
DRIFT = [
    (
        f"{JOBS} ALTER key TYPE varchar(99)",
        r"column key of table jobs was changed: expected text, got character varying\(99\): replace it by what docs",
    ),
    (f"{JOBS} ALTER priority TYPE bigint", "column priority .*: expected integer NOT NULL, got bigint NOT NULL"),
    (f'{JOBS} ALTER key TYPE text COLLATE "C"', "column key .*: expected text, got text COLLATE"),
    (f"{JOBS} ALTER attempts DROP DEFAULT", "column attempts .*: expected integer NOT NULL DEFAULT 0, got integer NOT"),
    (f"{JOBS} ALTER attempts SET DEFAULT 1", "column attempts .* got integer NOT NULL DEFAULT 1"),
    (f"{JOBS} ALTER payload DROP NOT NULL", "column payload .*: expected text NOT NULL, got text:"),
    (f"{JOBS} ALTER id DROP IDENTITY", "column id .*: expected bigint NOT NULL IDENTITY, got bigint NOT NULL:"),
    (f"{JOBS} ALTER id SET GENERATED ALWAYS", "column id .*, got bigint NOT NULL ALWAYS:"),
    (f"{JOBS} DROP COLUMN progress", "column progress of table jobs is missing: create it as docs/postgres.sql shows"),
    (
        f"{JOBS} ADD more int NOT NULL DEFAULT 1; {JOBS} ALTER more DROP DEFAULT",
        "column more of table jobs needs a value, so that no row can be inserted: run ALTER TABLE pqueue.jobs ALTER",
    ),
    (
        f"{JOBS} DROP CONSTRAINT jobs_check",
        r"table jobs lacks the constraint CHECK \( CASE state WHEN 'pending'::text THEN",
    ),
    (
        "ALTER TABLE pqueue.consumers DROP CONSTRAINT consumers_state_check",
        "table consumers lacks the constraint CHECK",
    ),
    (
        "ALTER TABLE pqueue.dependencies DROP CONSTRAINT dependencies_parent_id_job_id_key",
        "table dependencies lacks .*UNIQ",
    ),
    (
        "ALTER TABLE pqueue.consumers DROP CONSTRAINT consumers_token_key, ADD UNIQUE (token) DEFERRABLE",
        r"table consumers lacks the constraint UNIQUE \(token\): add it",
    ),
    ("DROP TABLE pqueue.handlers", "table handlers is missing: create it as docs/postgres.sql shows"),
    (
        "DROP INDEX pqueue.history_job; CREATE INDEX history_job ON pqueue.history (id)",
        "index history_job of table history was changed: replace it by what docs/postgres.sql shows",
    ),
    (
        "DROP INDEX pqueue.jobs_waiting; CREATE INDEX jobs_waiting ON pqueue.jobs (queue, run_at)",
        "index jobs_waiting of table jobs was changed",
    ),
    (
        "DROP TRIGGER group_delete ON pqueue.jobs; CREATE TRIGGER group_delete BEFORE DELETE ON pqueue.jobs "
        "FOR EACH ROW EXECUTE FUNCTION pqueue.note_group()",
        "trigger group_delete of table jobs was changed",
    ),
    (
        "CREATE TRIGGER spy BEFORE UPDATE ON pqueue.jobs FOR EACH ROW "
        "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        'trigger spy of table jobs is not ours, and may drop or change rows: run DROP TRIGGER "spy" ON pqueue.jobs',
    ),
    ("DROP TRIGGER pending_insert ON pqueue.jobs", "trigger pending_insert of table jobs is missing"),
    ("ALTER FUNCTION pqueue.note_group SECURITY INVOKER", "function note_group was changed: replace it by what docs"),
    ("ALTER FUNCTION pqueue.count_pending STABLE", "function count_pending was changed"),
    (
        "CREATE OR REPLACE FUNCTION pqueue.count_pending(which text) RETURNS bigint LANGUAGE sql AS 'SELECT 0'",
        "function count_pending was changed",
    ),
    (
        f"{JOBS} ENABLE ROW LEVEL SECURITY",
        "row-level security is on for table pqueue.jobs: it hides rows .*; run ALTER TABLE pqueue.jobs DISABLE ROW",
    ),
    (
        "CREATE RULE keep AS ON DELETE TO pqueue.history DO INSTEAD NOTHING",
        "table pqueue.history has a rule, which replaces statements: run DROP RULE keep ON pqueue.history",
    ),
    (
        "CREATE TABLE public.orders (job_id bigint REFERENCES pqueue.jobs (id))",
        "foreign key orders_job_id_fkey of table public.orders keeps jobs from being deleted: give it ON DELETE CASC",
    ),
]


# A table and functions of the application, or of another queue, in which none of this is a problem.
OTHERS = """
CREATE UNLOGGED TABLE public.jobs (id serial PRIMARY KEY) WITH (autovacuum_enabled = off);
SELECT setval('public.jobs_id_seq', 1);
UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'public.jobs_pkey'::regclass;
ALTER TABLE public.jobs ENABLE ROW LEVEL SECURITY;
CREATE RULE keep AS ON DELETE TO public.jobs DO INSTEAD NOTHING;
CREATE FUNCTION public.note_group() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER group_own BEFORE UPDATE ON public.jobs FOR EACH ROW EXECUTE FUNCTION public.note_group();
ALTER TABLE public.jobs DISABLE TRIGGER group_own;
CREATE FUNCTION public.count_pending(which text) RETURNS bigint LANGUAGE sql AS 'SELECT 0';
"""


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("SELECT setval('pqueue.jobs_id_seq', 1, false)", "the ids of jobs continue at 1, but 3 is taken: run SELECT"),
        (
            "ALTER SEQUENCE pqueue.jobs_id_seq RENAME TO mine; SELECT setval('pqueue.mine', 1, false)",
            r"the ids of jobs continue at 1, but 3 is taken: run SELECT setval\('pqueue.mine', 3\)",
        ),
        ("DROP INDEX pqueue.jobs_processing", "index jobs_processing of table jobs is missing: create it as docs"),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pqueue.jobs_claim'::regclass",
            "index jobs_claim is invalid: run REINDEX INDEX pqueue.jobs_claim",
        ),
        ("ALTER TABLE pqueue.jobs SET (autovacuum_enabled = false)", "autovacuum is off for table .*jobs: run ALTER"),
        ("UPDATE pqueue.version SET number = 2", "expected schema_version 1, got 2"),
        (
            "ALTER TABLE pqueue.queues SET UNLOGGED",
            "table pqueue.queues is UNLOGGED: run ALTER TABLE pqueue.queues SET LOGGED",
        ),
        (
            "ALTER SEQUENCE pqueue.jobs_id_seq SET UNLOGGED",
            "sequence pqueue.jobs_id_seq is UNLOGGED: run ALTER TABLE pqueue.jobs_id_seq SET LOGGED",
        ),
        ("DROP TRIGGER group_ended ON pqueue.jobs", "trigger group_ended of table jobs is missing: create it as"),
        (
            "ALTER TABLE pqueue.jobs DISABLE TRIGGER pending_update",
            "trigger pending_update is disabled: run ALTER TABLE pqueue.jobs ENABLE ALWAYS TRIGGER pending_update",
        ),
        ("DROP FUNCTION pqueue.count_pending", "function count_pending is missing: create it as"),
        (
            "ALTER TABLE pqueue.outcomes DROP CONSTRAINT outcomes_pkey",
            r"table outcomes lacks the constraint PRIMARY KEY \(period, at, .*: add it as docs/postgres.sql shows",
        ),
        *DRIFT,
    ],
)
def test_check_finds_what_makes_the_tables_unsound(queue, database, damage, problem):  # noqa: F811
    queue.enqueue_many("t", range(3))
    queue.limit("default", 10)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(OTHERS)
        admin.execute(damage)
    problems = queue.check(thorough=False)["problems"]
    assert len(problems) == 1
    assert re.match(problem, problems[0]), problems


def test_doctor_names_a_table_or_a_column_that_is_missing(database, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PQUEUE_URL", database)
    columns = [("jobs", "meta"), ("queues", "max_pending"), ("consumers", "token"), ("outcomes", "event")]
    with closing(pqueue.open_queue()) as queue, psycopg.connect(database, autocommit=True) as dba:
        queue.enqueue("t")
        for table, column in [*((table, None) for table in pqueue_schema.TABLES), *columns]:
            dba.execute(f"ALTER TABLE pqueue.{table} RENAME {f'COLUMN {column}' if column else ''} TO gone")
            assert admin.main(["doctor"]) == 1
            part = f"column {column} of table {table}" if column else f"table {table}"
            said = f"critical: {part} is missing: create it as docs/postgres.sql shows"
            assert said in capsys.readouterr().out.splitlines()
            back = f"{table} RENAME COLUMN gone TO {column}" if column else f"gone RENAME TO {table}"
            dba.execute(f"ALTER TABLE pqueue.{back}")
        assert queue.check()["problems"] == []


def test_program_that_misses_a_column_is_told_to_run_doctor(queue, database):  # noqa: F811
    queue.enqueue("t")
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("ALTER TABLE pqueue.jobs RENAME COLUMN meta TO gone")
    with pytest.raises(pqueue.QueueError, match=r'column "meta" .* does not exist; run python3 admin.py doctor$'):
        queue.enqueue("t")
    with pytest.raises(pqueue.QueueError, match=r'column "meta" does not exist; run python3 admin.py doctor$'):
        queue.dequeue("w")


def test_statement_that_check_advises_names_what_must_be_quoted(database):  # noqa: F811
    url = f"{database}{'&' if '?' in database else '?'}schema=Team-A"
    with closing(pqueue.open_queue(url)) as queue, psycopg.connect(database, autocommit=True) as admin:
        queue.enqueue("t")
        for sql in (
            'ALTER TABLE "Team-A".jobs ADD "It\'s" int NOT NULL DEFAULT 1',
            'ALTER TABLE "Team-A".jobs ALTER "It\'s" DROP DEFAULT, SET (autovacuum_enabled = off)',
            'CREATE TRIGGER "a ""spy""" BEFORE UPDATE ON "Team-A".jobs FOR EACH ROW '
            "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            'CREATE RULE "Keep" AS ON DELETE TO "Team-A".history DO INSTEAD NOTHING',
            'CREATE INDEX "Mine" ON "Team-A".jobs (created_at)',
            'UPDATE pg_index SET indisvalid = false WHERE indexrelid = \'"Team-A"."Mine"\'::regclass',
            'ALTER TABLE "Team-A".history ENABLE ROW LEVEL SECURITY',
            'ALTER TABLE "Team-A".jobs DISABLE TRIGGER group_insert',
            "SELECT setval('\"Team-A\".jobs_id_seq', 1, false)",
        ):
            admin.execute(sql)
        problems = queue.check()["problems"]
        assert len(problems) == 8
        for each in problems:
            admin.execute(each.rpartition(": run ")[2] if ": run " in each else each.rpartition("; run ")[2])
        assert queue.check()["problems"] == []


def parts_of(queue):
    return queue._read(pqueue_postgres.CATALOG, {"temporary": False})


@pytest.mark.parametrize("kind", ["column", "constraint", "index", "trigger", "function"])
def test_check_finds_each_part_of_the_schema_that_is_missing(queue, kind):
    queue.limit("default", 10)
    parts = parts_of(queue)
    of_kind = [each for each in parts if each[0] == kind]
    assert len(of_kind) >= {"column": 124, "constraint": 21, "index": 21, "trigger": 8, "function": 3}[kind]
    for part in of_kind:
        others = [each for each in parts if each != part]
        (problem,) = pqueue_postgres.drift(queue._model(), others, "pqueue", has_limits=True)
        assert " is missing: " in problem or " lacks the constraint " in problem


def test_check_of_a_role_without_temporary_tables_compares_no_schema(queue, database):  # noqa: F811
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC; CREATE ROLE looker LOGIN")
        admin.execute("GRANT USAGE ON SCHEMA pqueue TO looker; GRANT SELECT ON ALL TABLES IN SCHEMA pqueue TO looker")
        admin.execute(f"{JOBS} ALTER key TYPE varchar(99)")
    try:
        with closing(pqueue.open_queue(database.replace("postgres:@", "looker:@"))) as other:
            assert other.check()["problems"] == []
        assert len(queue.check()["problems"]) == 1
    finally:
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute("DROP OWNED BY looker; DROP ROLE looker")


def test_check_knows_each_sequence(queue, database):  # noqa: F811
    with psycopg.connect(database) as admin:
        sequences = "SELECT relname FROM pg_class WHERE relkind = 'S' AND relnamespace = 'pqueue'::regnamespace"
        found = [row[0] for row in admin.execute(sequences)]
        assert sorted(found) == sorted(f"{table}_id_seq" for table in pqueue_postgres.WITH_ID)


def test_check_accepts_what_a_dba_may_add(queue, database):  # noqa: F811
    """Columns with a default, indexes, triggers, storage parameters, statistics and another owner."""
    with psycopg.connect(database, autocommit=True) as admin:
        for sql in (
            f"{JOBS} ADD note text, ADD tenant int NOT NULL DEFAULT 1, ADD more bigint GENERATED ALWAYS AS IDENTITY",
            "CREATE INDEX mine ON pqueue.jobs (created_at)",
            "CREATE FUNCTION public.look() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
            "CREATE TRIGGER look AFTER INSERT ON pqueue.jobs FOR EACH ROW EXECUTE FUNCTION public.look()",
            "CREATE TRIGGER group_look AFTER INSERT ON pqueue.jobs FOR EACH ROW EXECUTE FUNCTION public.look()",
            "CREATE TABLE public.orders (job_id bigint REFERENCES pqueue.jobs (id) ON DELETE CASCADE)",
            f"{JOBS} DISABLE TRIGGER look",
            f"{JOBS} DISABLE TRIGGER group_look",
            f"{JOBS} SET (fillfactor = 70)",
            "ALTER INDEX pqueue.jobs_claim SET (fillfactor = 70)",
            f"{JOBS} ALTER payload SET STORAGE EXTERNAL, ALTER task SET STATISTICS 1000",
            "CREATE TABLE pqueue.other (id int)",
            "CREATE RULE keep AS ON DELETE TO pqueue.other DO INSTEAD NOTHING",
            "CREATE VIEW pqueue.waiting AS SELECT * FROM pqueue.jobs",
            f"ALTER DATABASE {psycopg.conninfo.conninfo_to_dict(database)['dbname']} SET quote_all_identifiers = on",
        ):
            admin.execute(sql)
    with closing(pqueue.open_queue(database)) as other:
        assert other.check()["problems"] == []
        other.complete(other.dequeue("w")) if other.enqueue("t") else None


def test_check_accepts_a_disabled_trigger_that_no_limit_needs(queue, database):  # noqa: F811
    queue.limit("default", 10)
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"UPDATE pqueue.queues SET max_pending = NULL; {JOBS} DISABLE TRIGGER pending_update")
    assert queue.check(thorough=False)["problems"] == []


@pytest.mark.parametrize("table", pqueue_postgres.WITH_ID)
def test_operator_is_told_how_to_set_the_sequence_of_each_table(queue, database, table):  # noqa: F811
    """After a switch-over to a subscriber, which has the rows but not the sequences."""
    for _ in range(2):
        parent = queue.enqueue("t", group="g")
        queue.enqueue("t", after=[parent], group="h")
        queue.fail(queue.dequeue(f"w{parent}"), "no")
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"SELECT setval('pqueue.{table}_id_seq', 1, false)")
        (problem,) = queue.check()["problems"]
        assert problem.startswith(f"the ids of {table} continue at 1, but ")
        admin.execute(problem.partition(": run ")[2])
    assert queue.check()["problems"] == []


@pytest.mark.parametrize(
    ("table", "verb"),
    [
        ("jobs", lambda queue: queue.enqueue_many("t", range(2))),
        ("history", lambda queue: queue.cancel(1)),
        ("consumers", lambda queue: queue.dequeue("another")),
    ],
)
def test_program_whose_ids_are_taken_is_told_to_run_doctor(queue, database, table, verb):  # noqa: F811
    queue.fail(queue.dequeue("w"), "no") if queue.enqueue("t") else None
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"SELECT setval('pqueue.{table}_id_seq', 1, false)")
    said = f'cannot use .*: duplicate key .* "{table}_pkey"; run python3 admin.py doctor$'
    with pytest.raises(QueueError, match=said):
        verb(queue)


def test_operator_lists_groups_anew_that_changed_without_triggers(queue, database):  # noqa: F811
    queue.limit("default", running=1)
    first = queue.enqueue("t", group="old")
    queue.enqueue("t", group="old")
    job = queue.dequeue("w")
    repair = re.search(r"^INSERT INTO pqueue.group_events.*?(?=\n```)", DOCS.read_text(), re.DOTALL | re.MULTILINE)[0]
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("ALTER TABLE pqueue.jobs DISABLE TRIGGER USER")
        queue.complete(job)
        queue.enqueue("t", group="new")
        assert (job.id, queue.dequeue("w")) == (first, None)
        for kind, _, trigger, _ in parts_of(queue):
            if kind == "trigger" and trigger.startswith("group"):
                admin.execute(f"ALTER TABLE pqueue.jobs ENABLE ALWAYS TRIGGER {trigger}")
        admin.execute(repair)
    assert {queue.dequeue(f"w{number}").group for number in range(2)} == {"old", "new"}


def test_schema_that_was_renamed_is_reported(queue, database):  # noqa: F811
    queue.enqueue("t")
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("ALTER SCHEMA pqueue RENAME TO other")
    with closing(pqueue.open_queue(f"{database}{'&' if '?' in database else '?'}schema=other")) as renamed:
        problems = renamed.check()["problems"]
        functions = ("count_pending", "note_pending", "note_group")
        remedy = "replace it by what docs/postgres.sql shows"
        assert sorted(problems) == sorted(f"function {name} was changed: {remedy}" for name in functions)


def test_publication_of_all_tables_stops_no_verb(queue, database):  # noqa: F811
    """A publication refuses to delete or update rows that it cannot identify."""
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("CREATE PUBLICATION everything FOR ALL TABLES")
        queue.limit("default", 100)
        ids = [queue.enqueue("t", group=f"g{number % 3}") for number in range(70)]
        jobs = [queue.dequeue("w") for _ in ids]
        queue.fail(jobs[0], "no")
        for job in jobs[1:]:
            queue.complete(job)
        queue.limit("default", max_pending=None)
        assert queue.delete_jobs() == 70
        tables = """SELECT relname FROM pg_class c WHERE relkind = 'r' AND relnamespace = 'pqueue'::regnamespace
            AND relreplident <> 'f' AND NOT EXISTS (SELECT 1 FROM pg_index WHERE indrelid = c.oid AND indisprimary)"""
        assert admin.execute(tables).fetchall() == []


def test_restored_dump_is_a_working_queue(queue, database, tmp_path):  # noqa: F811
    """Groups, limits, dependencies, keys, schedules and sequences, restored whole or the schema before the data."""
    queue.limit("few", 20)
    parent = queue.enqueue("t", queue="few", key="k")
    queue.enqueue("t", after=[parent])
    for number in range(6):
        queue.enqueue("t", group=f"g{number % 2}")
    queue.complete(queue.dequeue("w"))
    queue.schedule("s", "t", cron="@daily")
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    run([BINARIES / "pg_dump", "-Fc", "-f", tmp_path / "dump", database])
    expected = {job.id: job.state for job in queue.list_jobs()}
    for parts in ([[]], [["--section=pre-data"], ["--section=post-data"], ["--data-only"]]):
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {(name := f'copy_{random.randrange(10**9)}')}")
        copied = sqlalchemy.make_url(database).set(database=name).render_as_string(hide_password=False)
        for options in parts:
            run([BINARIES / "pg_restore", "--no-owner", *options, "-d", copied, tmp_path / "dump"])
        with closing(pqueue.open_queue(copied)) as copy:
            assert copy.check()["problems"] == []
            assert {job.id: job.state for job in copy.list_jobs()} == expected
            new = copy.enqueue("t", queue="few")
            assert new == max(expected) + 1
            while job := copy.dequeue("w"):
                copy.complete(job)
            assert {job.state for job in copy.list_jobs()} == {"completed"}
            assert copy.check()["problems"] == []
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_check_finds_a_changed_collation(queue, database, monkeypatch):  # noqa: F811
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("UPDATE pg_database SET datcollversion = '0.9' WHERE datname = current_database()")
        actual = "SELECT pg_database_collation_actual_version(oid) FROM pg_database WHERE datname = current_database()"
        changed = admin.execute(actual).fetchone()[0]
    problems = queue.check()["problems"]
    assert [" but the indexes were built with 0.9: run REINDEX" in each for each in problems] == [True] * (
        changed is not None
    )
    elsewhere = pqueue_postgres.HEALTH["changed collation"].replace("current_database()", "'another'")
    elsewhere = re.sub("datcollversion <> .*", "true", elsewhere)
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": elsewhere})
    assert queue.check()["problems"] == []


def test_check_names_the_transaction_that_keeps_dead_rows(queue, database, monkeypatch):  # noqa: F811
    old = pqueue_postgres.HEALTH["old transactions"].replace("secs => 60", "secs => 0")
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": old})
    with psycopg.connect(database) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 'a report'")
        (problem,) = queue.check()["problems"]
        assert f"pid {reader.info.backend_pid} " in problem
        assert "SELECT 'a report'" in problem
        monkeypatch.setattr(
            "pqueue_postgres.HEALTH",
            {"": old.replace("<> 'autovacuum worker'", "NOT IN ('autovacuum worker', 'client backend')")},
        )
        assert queue.check()["problems"] == []
        monkeypatch.setattr("pqueue_postgres.HEALTH", {"": old})
    elsewhere = psycopg.conninfo.make_conninfo(database, dbname="postgres")
    with psycopg.connect(elsewhere) as reader:  # which keeps no row of this database
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        assert queue.check()["problems"] == []
        reader.execute("SELECT pg_current_xact_id()")  # whose number is of all databases
        assert len(queue.check()["problems"]) == 1


def test_check_names_what_else_keeps_dead_rows(tmp_path, monkeypatch):
    """Slots without their user, transactions that were prepared, and standbys that report their snapshots."""
    health = {name: pqueue_postgres.HEALTH[name] for name in ("old transactions", "unused slots", "old snapshots")}
    at_once = {
        name: sql.replace("secs => 60", "secs => 0").replace("ELSE 1000000 END", "ELSE 0 END")
        for name, sql in health.items()
    }
    own = postgres_server.Server(tmp_path / "primary").create()
    standby = postgres_server.Server(tmp_path / "standby")
    own.start(wal_level="logical", max_prepared_transactions=2)
    try:
        with closing(pqueue.open_queue(own.url)) as queue:

            def problems(monkeypatch=monkeypatch):
                monkeypatch.setattr("pqueue_postgres.HEALTH", at_once)
                found = queue.check(thorough=False)["problems"]
                monkeypatch.setattr("pqueue_postgres.HEALTH", health)
                return found

            def is_found(pattern):
                return next((each for each in problems() if re.fullmatch(pattern, each)), None)

            own.ask("SELECT pg_create_physical_replication_slot('unused', true)")
            keeps = r"not in use( since \d+ s)? and keeps \d+ (bytes|kB|MB) of log"
            remedy = r": start what uses it, or run SELECT pg_drop_replication_slot\('{}'\)"
            assert is_found(f"replication slot unused is {keeps}{remedy.format('unused')}"), problems()
            for kept in (health, {name: sql.replace("'lost'", "'reserved'") for name, sql in at_once.items()}):
                monkeypatch.setattr("pqueue_postgres.HEALTH", kept)
                assert queue.check(thorough=False)["problems"] == []
            own.ask("SELECT pg_drop_replication_slot('unused')")
            own.ask("SELECT pg_create_logical_replication_slot('changes', 'pgoutput')")
            catalogs = " and dead rows of the system catalogs"
            assert is_found(f"replication slot changes is {keeps}{catalogs}{remedy.format('changes')}"), problems()
            own.ask("SELECT pg_drop_replication_slot('changes')")
            wait_until(lambda: problems() == [])

            with psycopg.connect(own.url) as stranger:
                stranger.execute("SELECT pg_current_xact_id()")
                stranger.execute("PREPARE TRANSACTION 'a b'")
            prepared = (
                r"transaction a b of postgres was prepared \d+ s ago and keeps dead rows, which slows claims: run "
            )
            assert is_found(f"{prepared}ROLLBACK PREPARED 'a b' or COMMIT PREPARED 'a b' in database postgres")
            assert queue.check(thorough=False)["problems"] == []  # it is not old
            own.ask("ROLLBACK PREPARED 'a b'")
            wait_until(lambda: problems() == [])

            standby.copy(own)
            own.ask("SELECT pg_create_physical_replication_slot('kept', true)")
            kept = (
                r"\(pid \d+\) has kept dead rows for \d+ transactions, which slows claims: end the oldest transaction "
            )
            reports = {"hot_standby_feedback": "on", "wal_receiver_status_interval": 1, "max_prepared_transactions": 2}
            for options, name in (({}, "standby standby"), ({"primary_slot_name": "kept"}, ".* replication slot kept")):
                standby.start(**reports, **options)
                with psycopg.connect(standby.url) as reader:
                    reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    reader.execute("SELECT 'a report'")
                    queue.enqueue("t")
                    assert wait_until(lambda name=name: is_found(f"{name} {kept}there, or set hot_standby_.*"))
                    with closing(pqueue.open_queue(standby.url, create=False)) as copy:
                        assert copy.check()["problems"] == []
                standby.stop_at_once()
            at_last = f"replication slot kept is {keeps} and dead rows, which slows claims{remedy.format('kept')}"
            assert wait_until(lambda: is_found(at_last))
    finally:
        standby.kill()
        own.kill()


@pytest.mark.parametrize("name", ["pqueue", "shop"])
def test_check_names_who_holds_a_lock_that_others_wait_for(queue, database, monkeypatch, name):  # noqa: F811
    health = {name: sql.replace("secs => 2", "secs => 0") for name, sql in pqueue_postgres.HEALTH.items()}
    monkeypatch.setattr("pqueue_postgres.HEALTH", health)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    url = sqlalchemy.make_url(database).update_query_dict({"application_name": name})
    url = url.render_as_string(hide_password=False)
    with psycopg.connect(database) as other, closing(PersistentQSQLAlchemy(url, busy_seconds=60)) as producer:
        other.execute("LOCK TABLE pqueue.jobs")
        enqueue = threading.Thread(target=producer.enqueue, args=("t",))
        enqueue.start()
        wait_until(lambda: other.execute(waiting).fetchone() == (1,))
        problems = queue.check(thorough=False)["problems"]  # which itself finds the table locked
        assert f"waits for a lock of pid {other.info.backend_pid} since" in problems[0]
        assert problems[-1].endswith("(canceling statement due to lock timeout)")
        other.rollback()
        enqueue.join()


@pytest.mark.parametrize(
    ("name", "is_here", "seconds", "found"),
    [("pqueue", True, 0, 1), ("pqueue", True, 3600, 0), ("psql", True, 0, 0), ("pqueue", False, 0, 0)],
)
def test_check_reports_long_waits_of_this_queue_only(queue, database, monkeypatch, name, is_here, seconds, found):  # noqa: F811
    sql = pqueue_postgres.HEALTH["long waits"].replace("secs => 2", f"secs => {seconds}")
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": sql})
    url = database if is_here else psycopg.conninfo.make_conninfo(database, dbname="postgres")
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND pid = %s"
    lock = f"SELECT pg_advisory_lock({random.getrandbits(60)})"
    with (
        psycopg.connect(url, autocommit=True, application_name="pqueue") as holder,
        psycopg.connect(url, autocommit=True, application_name=name) as waiter,
        ThreadPoolExecutor(1) as pool,
    ):
        holder.execute(lock)
        try:
            pool.submit(waiter.execute, lock)
            wait_until(lambda: holder.execute(waiting, [waiter.info.backend_pid]).fetchone() == (1,))
            assert len(queue.check(thorough=False)["problems"]) == found
        finally:
            holder.execute("SELECT pg_advisory_unlock_all()")


@pytest.mark.parametrize(
    ("statement", "condition", "problem"),
    [
        ("dead rows", "n_dead_tup > 100000 + 2 * n_live_tup", "table jobs has [0-9]+ dead rows and [0-9]+ live"),
        ("few connections", "used > 0.9 * most", "[0-9]+ of [0-9]+ connections are in use"),
        ("full NOTIFY queue", "pg_notification_queue_usage() > 0.5", "the NOTIFY queue of the server is 0 % full"),
    ],
)
def test_check_finds_what_runs_short(queue, database, monkeypatch, statement, condition, problem):  # noqa: F811
    sql = pqueue_postgres.HEALTH[statement]
    assert condition in sql
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": sql.replace(condition, "true")})
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("CREATE TABLE public.strangers (id int); INSERT INTO public.strangers VALUES (1)")
        wait_until(
            lambda: admin.execute("SELECT n_live_tup FROM pg_stat_user_tables WHERE relname = 'strangers'").fetchone()
        )
    problems = queue.check()["problems"]
    assert any(re.match(problem, each) for each in problems)
    assert not [each for each in problems if "strangers" in each]


def test_check_finds_that_no_dead_rows_are_counted(database):  # noqa: F811
    name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} SET track_counts = off")
    with closing(pqueue.open_queue(database)) as queue:
        assert queue.check(thorough=False)["problems"] == ["track_counts is off: set track_counts = on"]


@pytest.mark.parametrize(("seconds", "is_found"), [(600, False), (0, True)])
def test_check_expects_dead_rows_until_the_next_vacuum(queue, database, monkeypatch, seconds, is_found):  # noqa: F811
    sql = pqueue_postgres.HEALTH["dead rows"].replace("n_dead_tup > 100000 + 2 * n_live_tup", "relname = 'jobs'")
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": sql.replace("secs => 600", f"secs => {seconds}")})
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("VACUUM pqueue.jobs")
    assert bool(queue.check(thorough=False)["problems"]) == is_found


def test_check_of_a_role_that_sees_no_other_names_the_session_that_keeps_dead_rows(database, monkeypatch):  # noqa: F811
    pqueue.open_queue(database).close()
    sql = pqueue_postgres.HEALTH["old snapshots"].replace("ELSE 1000000 END", "ELSE 0 END")
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": sql})
    elsewhere = psycopg.conninfo.make_conninfo(database, dbname="postgres")
    with (
        psycopg.connect(database) as reader,
        psycopg.connect(elsewhere) as stranger,  # which keeps no row of this database
        psycopg.connect(database, autocommit=True) as admin,
    ):
        admin.execute("CREATE ROLE looker LOGIN; GRANT USAGE ON SCHEMA pqueue TO looker")
        admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA pqueue TO looker")
        try:
            for session in (reader, stranger):
                session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                session.execute("SELECT 'a report'")
            admin.execute("INSERT INTO pqueue.handlers VALUES ('x', 'y')")
            for url, number in ((database.replace("postgres:@", "looker:@"), 1), (database, 0)):
                with closing(pqueue.open_queue(url)) as queue:
                    found = queue.check(thorough=False)["problems"]
                assert len(found) == number, found
                kept = rf"a transaction of postgres \(pid {reader.info.backend_pid}\) has kept dead rows for \d+ trans"
                assert all(re.match(kept, each) for each in found)
        finally:
            admin.execute("DROP OWNED BY looker; DROP ROLE looker")


def test_check_finds_that_its_role_gets_no_more_connections(tmp_path):
    """Of those that are reserved, and in use by others, the role sees little."""
    own = postgres_server.Server(tmp_path / "server").create()
    own.start(max_connections=9, reserved_connections=2)  # and 3 for superusers
    with ExitStack() as undo:
        undo.callback(own.kill)
        pqueue.open_queue(own.near_url).close()
        own.ask("CREATE ROLE looker LOGIN; GRANT USAGE ON SCHEMA pqueue TO looker")
        own.ask("GRANT SELECT ON ALL TABLES IN SCHEMA pqueue TO looker; CREATE ROLE other LOGIN")
        url = own.near_url.replace("postgres@", "{}@")
        queue = undo.enter_context(closing(pqueue.open_queue(url.format("looker"))))
        assert queue.check(thorough=False)["problems"] == []
        for _ in range(3):
            undo.enter_context(psycopg.connect(url.format("other")))
        problem = "4 of 4 connections are in use: raise max_connections, or run fewer programs"
        assert queue.check(thorough=False)["problems"] == [problem]


@pytest.mark.parametrize(
    ("higher", "is_untouched"),
    [(None, True), (-1, True), (0, False), (9_000, False), (11_000, True), (2**31 - 1, True)],
)
def test_claim_takes_a_much_higher_number_than_its_own_for_one_of_several_lockers(queue, higher, is_untouched):
    """The numbers of groups of transactions that have locked a row together are counted separately."""
    number = "0" if higher is None else f"{pqueue_postgres._NEXT} + {higher}"
    row = f"(SELECT CAST(CAST({number} AS text) AS xid) AS xmax) jobs"
    assert queue._read(f"SELECT {pqueue_postgres.UNTOUCHED} true FROM {row}") == [(is_untouched,)]


def test_check_accepts_an_index_that_is_being_built(queue, database):  # noqa: F811
    building = "SELECT count(*) FROM pg_stat_progress_create_index WHERE datname = current_database()"
    with psycopg.connect(database) as other, ThreadPoolExecutor(1) as pool:
        admin = psycopg.connect(database, autocommit=True)
        other.execute("LOCK TABLE pqueue.jobs IN ROW EXCLUSIVE MODE")
        done = pool.submit(admin.execute, "REINDEX INDEX CONCURRENTLY pqueue.jobs_claim")
        wait_until(lambda: queue._read(building)[0][0])
        wait_until(lambda: queue._read("SELECT 1 FROM pg_index WHERE NOT indisvalid"))
        found = queue.check(thorough=False)["problems"]
        with psycopg.connect(database) as damage:
            damage.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pqueue.history_job'::regclass")
        of_another_table = queue.check(thorough=False)["problems"]
        admin.cancel()
        with pytest.raises(psycopg.errors.QueryCanceled):
            done.result(PATIENCE_SECONDS)
        assert found == []
        assert of_another_table == ["index history_job is invalid: run REINDEX INDEX pqueue.history_job"]
        admin.execute("REINDEX INDEX pqueue.history_job")
        (problem,) = queue.check(thorough=False)["problems"]
        remedy = problem.partition(": run ")
        assert remedy[0] == "index jobs_claim_ccnew was left by a REINDEX CONCURRENTLY that failed"
        other.rollback()
        admin.execute(remedy[2])
        admin.close()
    assert queue.check(thorough=False)["problems"] == []


def test_check_counts_connections_of_clients_only(queue, monkeypatch):
    sql = pqueue_postgres.HEALTH["few connections"].replace("'client backend'", "'none'").replace("0.9 * most", "0")
    monkeypatch.setattr("pqueue_postgres.HEALTH", {"": sql})
    assert queue.check()["problems"] == []


@pytest.fixture
def small_notify_queue(tmp_path):
    small = postgres_server.Server(tmp_path / "server").create().start(max_notify_queue_pages=64)
    with closing(pqueue.open_queue(small.near_url)) as queue:
        yield queue, small.near_url
    small.stop_at_once()


@contextmanager
def full_notify_queue(url):
    """Another session listens in a long transaction, and keeps what a third one sends."""
    with psycopg.connect(url, autocommit=True) as lazy, psycopg.connect(url, autocommit=True) as other:
        for sql in ("LISTEN x", "BEGIN", "SELECT 1"):
            lazy.execute(sql)
        with pytest.raises(psycopg.Error, match="too many notifications"):
            while True:
                other.execute("SELECT pg_notify('x', repeat('-', 7900))")
        yield


@pytest.mark.parametrize("commit_seconds", [0.0, 1.0])
def test_verbs_do_not_need_room_in_the_notify_queue(small_notify_queue, commit_seconds, caplog):
    queue, url = small_notify_queue
    queue.cancel(queue.enqueue("t"))  # the next ones are single statements
    queue.commit_seconds = commit_seconds
    with full_notify_queue(url):
        ids = [queue.enqueue("t"), *queue.enqueue_many("t", range(3))]
        jobs = [queue.dequeue("w") for _ in range(3)]
        assert [job.id for job in jobs] == ids[:3]
        queue.fail(jobs[0], "x")
        queue.release(jobs[1])
        queue.cancel(jobs[2].id)
        queue.resubmit(jobs[2].id)
        with queue.transaction():
            queue.enqueue("t")
        job = queue.dequeue("w")
        queue._listener._awaited_until = math.inf  # somebody may wait for its result
        with psycopg.connect(url) as app, queue.join(app):  # whose commit would fail
            queue.enqueue("t")
            queue.complete(job)
        assert any("the NOTIFY queue of the server is" in each for each in queue.check()["problems"])
    assert "consumers poll" not in caplog.text  # as behind a pooler
    queue.enqueue("t")
    queue.enqueue("t")
    assert queue.count_jobs() == 9
    wait_until(lambda: queue.check()["problems"] == [])


@pytest.mark.parametrize("commit_seconds", [0.0, 1.0])
def test_program_says_once_that_it_cannot_wake_consumers(small_notify_queue, commit_seconds, caplog):
    """Until it could again."""
    queue, url = small_notify_queue
    queue.commit_seconds = commit_seconds

    def warnings():
        return [record.message.count("cannot wake consumers, which look") for record in caplog.records]

    for _ in range(2):
        with full_notify_queue(url):
            for _ in range(3):
                queue.enqueue("t")
                assert warnings() == [1]
                with queue.transaction():
                    queue.enqueue("t")
        queue.enqueue("t")
        queue.enqueue("t")
        assert warnings() == [1]
        caplog.clear()


def test_producer_sends_notify_along_while_commits_are_quick(queue, monkeypatch):
    sent, execute = [], PostgresSession._execute
    monkeypatch.setattr(
        PostgresSession, "_execute", lambda self, sql, *more: sent.append(sql) or execute(self, sql, *more)
    )
    monkeypatch.setattr(pqueue_sqlalchemy, "SLOW_COMMIT_SECONDS", 0.02)

    def which_notify():
        sent.clear()
        queue.enqueue("t")
        return [NOTIFY in sql or pqueue_postgres.PG_NOTIFY in sql for sql in sent]

    wait_until(lambda: which_notify() == [True])
    with queue.transaction() as db:
        db.exec_driver_sql("""CREATE FUNCTION public.slow() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END'""")
        db.exec_driver_sql("CREATE TRIGGER slow AFTER INSERT ON pqueue.jobs EXECUTE FUNCTION public.slow()")
    which_notify()
    with queue.transaction() as db:
        db.exec_driver_sql("DROP TRIGGER slow ON pqueue.jobs")
    assert which_notify() == [False, True]
    wait_until(lambda: which_notify() == [True])


def test_warning_that_consumers_cannot_be_woken_is_one_line(queue, monkeypatch, caplog):
    change = PostgresSession.change

    def lost(self, sql, *params):
        error = psycopg.OperationalError("server closed the connection\n\tThis probably means that it terminated")
        with mock.patch.object(queue._pool, "take", side_effect=error):
            return change(self, sql, *params)

    queue.commit_seconds = 1.0  # so that NOTIFY is sent after the commit
    monkeypatch.setattr(PostgresSession, "change", lost)
    queue.enqueue("t")
    (record,) = caplog.records
    assert record.message.endswith("once a second: server closed the connection")


def test_check_of_a_copy_finds_nothing(queue, tmp_path):
    queue.check()
    with closing(PersistentQSQLite(tmp_path / "q.db")) as source:
        source.enqueue_many("t", range(3))
        source.copy_to(queue)
    assert queue.check()["problems"] == []
    assert queue.enqueue("t") == 4


@contextmanager
def joined(queue):
    with psycopg.connect(**queue._conninfo) as application, queue.join(application):
        yield


@pytest.mark.parametrize("within", [nullcontext, methodcaller("transaction"), joined])
def test_idle_consumer_is_woken_though_notify_is_sent_after_the_commit(queue, database, within):  # noqa: F811
    assert queue.dequeue("w") is None
    listener = queue._open_listener()
    woken = threading.Thread(target=listener.wait, args=(1e6, lambda: 1e6), daemon=True)
    woken.start()
    with closing(pqueue.open_queue(database)) as producer:

        def enqueue():
            producer.commit_seconds = 1.0
            with within(producer):
                return producer.enqueue("t")

        wait_until(lambda: enqueue() and not woken.is_alive())


@pytest.mark.parametrize(("seconds", "direction"), [(3600, "ahead of"), (-3600, "behind")])
def test_views_use_the_clock_of_the_server(queue, database, place, seconds, direction):  # noqa: F811
    """All programs on a host whose clock is an hour off show the same as on any other, and that it is off."""
    code = f"import time\ntrue_time = time.time\ntime.time = lambda: true_time() + {seconds}\n"
    place.write("wrong/sitecustomize.py", code)
    wrong = {"PQUEUE_URL": database, "PYTHONPATH": str(place.folder / "wrong")}
    queue.complete(queue.dequeue("w")) if queue.enqueue("t") else None
    queue.enqueue("t")
    running = queue.dequeue("w")
    queue.enqueue("t")
    done = place.run("admin.py", "doctor", **wrong)
    findings = [line for line in done.stdout.splitlines() if re.match("(info|warning|critical):", line)]
    assert len(findings) == 1, done.stdout
    assert f"the clock of this host is 1 h {direction} the server's" in findings[0]
    assert done.returncode == 1
    for since, shown in (("1m", 3), ("0s", 0)):
        listed = place.run("admin.py", "list-jobs", "--since", since, "--json", **wrong)
        assert listed.stdout.count('"task"') == shown, listed
    metrics = place.run("admin.py", "metrics", **wrong).stdout
    assert float(re.search(r"^pqueue_oldest_pending_age_seconds\S* (\S+)", metrics, re.MULTILINE)[1]) < 60
    assert re.search(r"^pqueue_completed_total\S* 1$", metrics, re.MULTILINE)
    shown = place.run("admin.py", "show", running.id, **wrong).stdout
    assert re.search(r"created_at +.*\([0-9.]+ s ago\)", shown), shown
