"""How many connections there are, what happens when there are no more, and what a failure to connect says."""

# ruff: noqa: F401, F811 - pytest finds fixtures by their names

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from unittest import mock

import psycopg
import pytest
import sqlalchemy
from conftest import free_port
from postgres_server import Server
from test_postgres import database, server
from test_postgres_isolation import Roles, roles, with_query

import pqueue
import pqueue_connections
import pqueue_listener
import pqueue_postgres
from pqueue import InvalidTransition, JobFailed, QueueBusy, QueueError, QueueFull
from pqueue_connections import parse_url
from pqueue_sqlalchemy import PersistentQSQLAlchemy, PostgresSession
from pqueue_tools import processes
from test_pqueue import PATIENCE_SECONDS, wait_until


@pytest.fixture
def admin(database):
    with psycopg.connect(database, autocommit=True) as admin:
        yield admin


@pytest.fixture
def queue(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        yield queue


def connections(admin):
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pqueue' AND datname = current_database()"
    return admin.execute(sql).fetchone()[0]


# How many there are


def test_connection_whose_settings_the_server_refuses_is_closed(admin, queue, monkeypatch):
    def refuse(_):
        raise psycopg.OperationalError("the server refuses")

    queue.enqueue("t")
    before = connections(admin)
    monkeypatch.setattr(pqueue_connections.Link, "note_path", refuse)
    with queue.transaction(), ThreadPoolExecutor(1) as thread:
        error = thread.submit(queue.enqueue, "t").exception()  # which keeps what its frames refer to
    assert "the server refuses" in str(error)
    wait_until(lambda: connections(admin) == before)


def test_idle_consumer_has_one_connection_and_one_in_a_transaction_two(admin, queue):
    assert queue.dequeue("w") is None
    for _ in range(3):
        queue.wait(0, consumer="w")
        queue.dequeue("w")
        queue.heartbeat("w")
        assert connections(admin) == 1
    queue.enqueue("t")
    job = queue.dequeue("w")
    extended = threading.Thread(target=queue.extend, args=(job, 60))
    with queue.transaction():
        queue.enqueue("follow-up")
        extended.start()
        extended.join()
        assert connections(admin) == 2
    queue.complete(job)


def test_thread_that_is_idle_holds_no_connection(admin, queue):
    free, done = threading.Event(), []

    def put(number):
        queue.enqueue("t", number)
        done.append(number)
        free.wait(PATIENCE_SECONDS)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(57)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(done) == 57)
    assert connections(admin) <= pqueue_connections.MAX_CONNECTIONS
    free.set()
    for thread in threads:
        thread.join()
    with mock.patch.object(pqueue_connections, "IDLE_SECONDS", 0):
        for _ in range(3):
            queue.stats()
    wait_until(lambda: connections(admin) <= 1)


def test_program_that_waits_for_a_result_on_a_closed_queue_opens_no_connection(admin, queue):
    queue.enqueue("t")
    queue.close()
    with pytest.raises(QueueError, match="^cannot wait for a result: the queue object was closed$"):
        asyncio.run(queue.aresult(1))
    assert connections(admin) == 0


def test_thread_waits_for_a_connection_and_then_raises_queue_busy(database):
    with closing(PersistentQSQLAlchemy(with_query(database, max_connections="2"), busy_seconds=1)) as queue:
        inside, over, told = threading.Barrier(3), threading.Event(), []

        def hold():
            with queue.transaction():
                inside.wait(PATIENCE_SECONDS)
                over.wait(PATIENCE_SECONDS)

        holders = [threading.Thread(target=hold) for _ in range(2)]
        for each in holders:
            each.start()
        inside.wait(PATIENCE_SECONDS)
        with pytest.raises(QueueBusy, match="2 connections of this process are in use, of at most 2") as refused:
            queue.enqueue("t")
        assert "max_connections" in str(refused.value)

        def enqueue():
            with suppress(QueueBusy):
                return queue.enqueue("t")

        waiting = threading.Thread(target=lambda: told.append(wait_until(enqueue)))
        waiting.start()
        over.set()
        for each in (*holders, waiting):
            each.join()
        assert told


def test_connection_that_could_not_be_opened_leaves_its_place_to_another(database):
    with closing(PersistentQSQLAlchemy(with_query(database, max_connections="2"), busy_seconds=1)) as queue:
        queue._pool.close_idle(0)
        for _ in range(2):
            with mock.patch.object(queue._pool, "_connect", side_effect=QueueBusy("away")), pytest.raises(QueueBusy):
                queue.enqueue("t")
        assert queue.enqueue("t")


@pytest.mark.parametrize("reserved", [0, 1, 2])
@pytest.mark.parametrize("listens", [False, True])
def test_queue_opens_as_many_connections_as_it_may_and_no_more(database, reserved, listens):
    with closing(PersistentQSQLAlchemy(with_query(database, max_connections="3"), busy_seconds=0.5)) as queue:
        queue.reserve_connections(reserved)
        if listens:
            queue.heartbeat("w")
        taken = [queue._pool.take() for _ in range(3)]
        with pytest.raises(QueueBusy, match="3 connections of this process are in use, of at most 3"):
            queue._pool.take()
        for link in taken:
            queue._pool.give_back(link)


def test_thread_that_gets_no_connection_is_told_why_the_server_opens_no_other(database):
    with closing(PersistentQSQLAlchemy(database, busy_seconds=0.5)) as queue:
        link = queue._pool.take()
        with mock.patch.object(queue._pool, "_connect", side_effect=QueueBusy("the server is full")):
            for _ in range(2):
                with pytest.raises(QueueBusy, match="the server is full"):
                    queue._pool.take()
        queue._pool.give_back(link)


def test_consumer_that_begins_closes_all_connections_but_one(queue):
    for link in [queue._pool.take() for _ in range(3)]:
        queue._pool.give_back(link)
    queue.heartbeat("w")
    assert queue._pool._open == 1


def test_consumer_whose_listener_cannot_start_leaves_no_file_open(queue):
    with (
        mock.patch.object(pqueue_listener.ListenConnection, "_connect", side_effect=QueueBusy("away")),
        mock.patch("os.pipe", wraps=os.pipe) as opened,
        mock.patch("os.close", wraps=os.close) as closed,
        pytest.raises(QueueBusy, match="away"),
    ):
        queue.heartbeat("w")
    assert closed.call_count == 2 * opened.call_count == 2


def test_connection_is_used_again(queue):
    assert queue._read("SELECT pg_backend_pid()") == queue._read("SELECT pg_backend_pid()")


def test_interruption_is_put_off_while_a_statement_is_executed_alone(queue):
    def state():
        return queue.in_transaction, queue.uses_database(threading.get_ident())

    def look(link):
        seen.append(state())
        give_back(link)

    queue.enqueue("t")
    seen, give_back = [], queue._pool.give_back
    with mock.patch.object(queue._pool, "give_back", look):
        queue.get(1)
        with pytest.raises(QueueError, match="division by zero"):
            queue._read("SELECT 1 / 0")
    assert seen == [(True, True)] * 2
    assert state() == (False, False)


@pytest.mark.parametrize("ends", [True, False])
def test_transaction_finds_none_that_sqlalchemy_left_open(queue, ends):
    for _ in range(2):
        with suppress(ZeroDivisionError), queue.transaction() as db:
            assert not db.in_transaction()
            db.exec_driver_sql("SELECT 1")
            assert db.in_transaction()
            if not ends:
                raise ZeroDivisionError


@pytest.mark.parametrize("driver", [False, True])
@pytest.mark.parametrize(
    ("then", "said"),
    [
        (lambda _: None, "cannot commit: the transaction was ended inside its block"),
        (lambda queue: queue.enqueue("t", now=1), "cannot continue in a transaction that has ended; leave its block"),
        (lambda queue: queue.get(1), "cannot use .*: the connection of the transaction was closed inside its block"),
    ],
    ids=["end", "enqueue", "read"],
)
def test_application_that_closes_the_connection_of_its_transaction_is_told_so(queue, driver, then, said):
    with pytest.raises(QueueError, match=said) as refused, queue.transaction() as db:
        queue.enqueue("t")
        (db.connection.driver_connection if driver else db).close()
        then(queue)
    assert type(refused.value) is QueueError
    assert queue.count_jobs() == 0


def test_transaction_inside_exclusive_takes_no_lock_from_a_consumer(queue):
    """The connection is perhaps the one that holds it, and the end of a transaction undoes what is set there."""
    queue.enqueue("t")
    job = queue.dequeue("w")
    with pytest.raises(QueueError, match="inside exclusive"), queue.exclusive([job.id]), queue.transaction():
        pass
    assert len(queue._read(pqueue_postgres.LOCKED_SLOTS)) == 1
    with queue.transaction() as db, queue.exclusive([job.id]), queue.transaction() as inner:
        assert inner is db
        queue.complete(job)
    assert queue.get(job.id).state == "completed"


def test_transaction_reads_rows_of_the_usual_kind_though_the_one_before_chose_another(queue):
    for _ in range(2):
        with queue.transaction() as db:
            assert db.exec_driver_sql("SELECT 7").scalar() == 7
            db.connection.driver_connection.row_factory = psycopg.rows.dict_row
            assert queue.stats()


def test_forked_child_and_parent_each_have_connections_of_their_own(admin, queue):
    queue.enqueue_many("t", range(4))
    job = queue.dequeue("w")
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            queue.complete(queue.dequeue("child"))
            queue.close()
            code = 0
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    queue.complete(job)
    assert queue.stats()["states"]["completed"] == 2


# At the limit


def limited(roles, number):
    url = roles.add("limited", "ALTER ROLE {role} SUPERUSER")
    role = sqlalchemy.make_url(url).username
    roles.admin.execute(f"ALTER ROLE {role} NOSUPERUSER CONNECTION LIMIT {number}")
    for grant in ("ALL ON SCHEMA pqueue", "ALL ON ALL TABLES IN SCHEMA pqueue"):
        roles.admin.execute(f"GRANT {grant} TO {role}")
    return url


def test_consumer_at_the_limit_keeps_the_lease_of_its_job(place, database, roles, queue):
    """Two consumers with as few connections as they need, and a job that lasts longer than its lease."""
    url = limited(roles, 4)
    place.write(
        "slow.py", "import time\nfrom pqueue import Job, task\n@task()\ndef slow(job: Job):\n    time.sleep(13)\n"
    )
    environment = {"PQUEUE_URL": url, "PYTHONPATH": str(place.folder)}
    queue.enqueue("slow", {})
    for number in range(2):
        place.start("consumer.py", "--import", "slow", "--name", f"w{number}", "--lease-seconds", "4", **environment)
    wait_until(lambda: queue.list_jobs(state="completed"))
    (job,) = queue.list_jobs()
    assert job.attempts == 1
    assert [event["event"] for event in queue.history(job.id)] == []
    assert not any(" lost " in child.out.read_text() for child in place.children)


def connected(url):
    """Return a connection, or None: the server may not have ended the session of one that was just closed."""
    with suppress(psycopg.OperationalError):
        return psycopg.connect(url)


def test_consumer_that_finds_no_connection_is_refused_before_it_takes_a_job(roles, queue):
    url = limited(roles, 1)
    queue.enqueue("t")
    with closing(pqueue.open_queue(url)) as other, ExitStack() as undo:
        other._pool.close_idle(0)
        undo.enter_context(wait_until(lambda: connected(url)))
        with pytest.raises(QueueBusy, match="too many connections for role"):
            other.dequeue("w")
        assert queue.list_jobs()[0].state == "pending"


def started(queue):
    return {each["name"] for each in queue.consumers() if each["state"] == "running"}


def expect_as_many_as_fit(place, queue, url, number, fit, reason, restart=None):
    """Start consumers at the same moment, of which only some fit, and end connections, workers and consumers."""
    place.write("quick.py", "from pqueue import Job, task\n@task()\ndef quick(job: Job):\n    pass\n")
    environment = {"PQUEUE_URL": url, "PYTHONPATH": str(place.folder)}
    names = [f"w{each}" for each in range(number)]
    programs = {
        name: place.start("consumer.py", "--import", "quick", "--name", name, "--quiet", **environment)
        for name in names
    }

    def complete(jobs):
        before = queue.count_jobs(state="completed")
        queue.enqueue_many("quick", [{}] * jobs)
        wait_until(lambda: queue.count_jobs(state="completed") == before + jobs)

    wait_until(lambda: len(started(queue)) == fit)
    waiting = set(names) - started(queue)
    wait_until(lambda: all(reason in programs[name].out.read_text() for name in waiting))
    complete(20)
    for name in waiting:  # for the first connection, or the second
        assert 1 <= programs[name].out.read_text().count("\n") <= 2
    for pid in [pid for name in started(queue) for pid in processes.children(programs[name].pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # the worker and the watchdog
    wait_until(lambda: "worker died" in "".join(each.out.read_text() for each in programs.values()))
    wait_until(lambda: len(started(queue)) == fit)
    complete(20)
    if restart is not None:
        restart()
        wait_until(lambda: len(started(queue)) == fit)
        complete(20)
        wait_until(lambda: len(started(queue)) == fit)
    for _ in range(2):
        gone = min(started(queue))
        programs[gone].terminate()
        assert programs.pop(gone).wait(PATIENCE_SECONDS) == 0
        # At the limit, it may not have been able to say that it has ended: then others find out
        wait_until(lambda gone=gone: gone not in (found := started(queue)) and len(found) == fit)
        complete(20)
    for each in programs.values():
        assert each.poll() is None
        each.terminate()
    assert [each.wait(PATIENCE_SECONDS) for each in programs.values()] == [0] * len(programs)


@pytest.mark.parametrize(("limit", "fit"), [(2, 1), (5, 2)])
def test_consumers_that_start_at_the_limit_of_a_role_do_not_block_each_other(place, roles, queue, limit, fit):
    """Each needs two connections. If each kept one and waited for another, none would run."""
    expect_as_many_as_fit(place, queue, limited(roles, limit), fit + 3, fit, "too many connections for role")


def test_consumers_that_start_at_the_limit_of_the_server_do_not_block_each_other(place, primary):
    settings = {"max_connections": 7, "superuser_reserved_connections": 2}
    primary.start(**settings)

    def restart():
        primary.stop_at_once()
        primary.start(**settings)

    with closing(pqueue.open_queue(primary.url)) as queue:
        primary.ask("CREATE ROLE worker LOGIN")
        for grant in ("ALL ON SCHEMA pqueue", "ALL ON ALL TABLES IN SCHEMA pqueue"):
            primary.ask(f"GRANT {grant} TO worker")
        url = primary.url.replace("postgres@", "worker@")
        expect_as_many_as_fit(place, queue, url, 5, 2, "connection", restart)


@pytest.mark.parametrize("uses_transactions", [False, True])
def test_consumers_in_programs_at_the_limit_need_one_connection_each(roles, queue, uses_transactions):
    url = limited(roles, 2)
    queue.enqueue_many("t", range(2))
    with closing(pqueue.open_queue(url)) as first, closing(pqueue.open_queue(url)) as second:
        for each in (first, second):
            if uses_transactions:
                with each.transaction():
                    each.stats()

            def take(each=each):
                with suppress(QueueBusy):  # the server has not yet ended the session of a closed connection
                    return each.dequeue("w")

            assert wait_until(take) if uses_transactions else each.dequeue("w")


def test_thread_at_the_limit_waits_for_the_connection_of_another(roles, queue):
    with closing(pqueue.open_queue(limited(roles, 1))) as other:
        threads, done = [], []
        for number in range(6):
            threads.append(threading.Thread(target=lambda n=number: done.append(other.enqueue("t", n))))
            threads[-1].start()
        for thread in threads:
            thread.join()
        assert len(done) == 6


def test_connection_that_listens_is_lent_and_still_hears(queue, database):
    with closing(PersistentQSQLAlchemy(database)) as other:
        assert queue.dequeue("w") is None
        for _ in range(30):
            other.enqueue("t")
            began = time.monotonic()
            queue.stats()  # the notification may arrive along with an answer
            while not (job := queue.dequeue("w")):
                assert queue.wait(10, consumer="w")
            assert time.monotonic() - began < 9
            queue.complete(job)


def test_connection_that_listens_is_lent_to_one_at_a_time(queue, database):
    queue.heartbeat("w")
    listener, pool = queue._listener, queue._pool
    with psycopg.connect(database, autocommit=True) as other:
        heard = listener._wakeups
        other.execute("NOTIFY pqueue")
        wait_until(lambda: listener._wakeups > heard)
    link = pool.take(only=listener._link)
    assert not pool.take_if_free(link)
    pool.give_back(link)


@pytest.mark.parametrize(
    ("way", "cut"), [("alone", False), ("alone", True), ("in one statement", False), ("in a joined transaction", False)]
)
def test_waiter_for_a_result_is_woken_by_a_consumer_that_began_to_listen_later(
    admin, queue, database, monkeypatch, way, cut
):
    monkeypatch.setattr(pqueue_listener.ResultWatch, "FIRST_SECONDS", 1000.0)  # does not look by itself
    monkeypatch.setattr(pqueue_listener.ResultWatch, "LAST_SECONDS", 1000.0)
    monkeypatch.setattr(pqueue_listener, "AWAITED_SECONDS", 1000.0)
    job_id, found = queue.enqueue("t"), []
    waiter = threading.Thread(target=lambda: found.append(queue.result(job_id, timeout_seconds=PATIENCE_SECONDS)))
    waiter.start()
    wait_until(lambda: queue._listener and queue._listener.is_awaited)
    with closing(pqueue.open_queue(database)) as other:
        job = other.dequeue("w")
        wait_until(lambda: other.is_awaited)
        if cut:
            other._listener._awaited_until = -math.inf
            pid = other._listener._link.driver.info.backend_pid
            admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
            wait_until(lambda: other._listener.is_awaited)
        with ExitStack() as application:
            if way == "in one statement":
                other._dead_checked_at = math.inf
                assert other.complete_and_dequeue([(job, 7)], "w") == ([], [])
            else:
                if way != "alone":
                    application.enter_context(other.join(application.enter_context(psycopg.connect(database))))
                other.complete(job, 7)
        waiter.join()
        assert found == [7]


def test_application_commits_what_ends_more_jobs_than_fit_into_a_notify(admin, queue, database, monkeypatch):
    monkeypatch.setattr(pqueue_listener.ResultWatch, "FIRST_SECONDS", 1000.0)  # does not look by itself
    monkeypatch.setattr(pqueue_listener.ResultWatch, "LAST_SECONDS", 1000.0)
    admin.execute(f"SELECT setval('pqueue.jobs_id_seq', {2**63 - 5000})")
    parent = queue.enqueue("t")
    children = queue.enqueue_many("t", range(1000), after=[parent])
    with ThreadPoolExecutor(1) as pool, closing(pqueue.open_queue(database)) as other:
        waiting = pool.submit(queue.result, children[-1], timeout_seconds=PATIENCE_SECONDS)
        wait_until(lambda: queue._listener and queue._listener.is_awaited)
        with psycopg.connect(database) as connection:
            connection.execute("CREATE TABLE orders (n int)")
            with other.join(connection):
                other.cancel(parent)
        assert isinstance(waiting.exception(), JobFailed)
    assert admin.execute("SELECT count(*) FROM orders").fetchone() == (0,)


def test_consumer_starts_without_telling_waiters_what_nobody_waits_for(queue, monkeypatch):
    sent, run = [], PostgresSession.run
    monkeypatch.setattr(PostgresSession, "run", lambda self, sql, *params: sent.append(sql) or run(self, sql, *params))
    queue.enqueue_many("t", range(3))
    queue.complete_and_dequeue([(job, None) for job in queue.dequeue_many("w", 3)], "w", 0)
    assert queue.count_jobs(state="completed") == 3
    assert not any(pqueue_postgres.PG_NOTIFY_JOBS in sql for sql in sent)


# The first job of a queue


def test_first_job_of_a_queue_in_an_open_transaction_blocks_no_other(queue, database):
    with closing(PersistentQSQLAlchemy(database)) as other:
        for name, first in (("mails", "enqueue"), ("letters", "enqueue_many")):
            with queue.transaction():
                getattr(queue, first)("t", [1], queue=name)
                assert other.enqueue("t", queue=name)
                assert other.enqueue_many("t", [2], queue=name)
            with queue.transaction():
                getattr(queue, first)("t", [3], queue=name, group="a")
                assert other.enqueue("t", queue=name, group="a")
        with suppress(ZeroDivisionError), queue.transaction():
            queue.enqueue("t", queue="undone")
            raise ZeroDivisionError
        assert [job.queue for job in queue.list_jobs(queue="undone")] == []


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("change", ["pause", "limit", "keep"])
def test_producer_does_not_wait_for_its_own_transaction_that_changed_the_queue(database, change, exists):
    stored = []

    def work():
        with suppress(QueueError), queue.transaction():
            getattr(queue, change)("mails", **{"limit": {"max_pending": 10}, "keep": {"completed": 9}}.get(change, {}))
            stored.append(queue.enqueue("t", queue="mails"))

    with closing(PersistentQSQLAlchemy(database, busy_seconds=3600)) as queue:
        if exists:
            queue.enqueue("another", queue="mails")
        producer = threading.Thread(target=work)
        producer.start()
        try:
            wait_until(lambda: stored)
        finally:
            queue.close()
            producer.join()


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_first_job_of_a_queue_is_stored_by_a_transaction_of_any_isolation(queue, level):
    with queue.transaction() as db:
        db.exec_driver_sql(f"SET TRANSACTION ISOLATION LEVEL {level}")
        db.exec_driver_sql("SELECT 1")
        job_id = queue.enqueue("t", queue="new")
    assert queue.dequeue("w").id == job_id


def test_producer_does_not_wait_for_a_second_connection_to_add_a_queue(database):
    stored = []

    def work():
        with suppress(QueueError), queue.transaction():
            stored.append(queue.enqueue("t", queue="mails"))

    with closing(PersistentQSQLAlchemy(with_query(database, max_connections="2"), busy_seconds=3600)) as queue:
        link = queue._pool.take()
        producer = threading.Thread(target=work)
        producer.start()
        try:
            wait_until(lambda: stored)
        finally:
            queue._pool.give_back(link)
            producer.join()
        assert queue.get(stored[0]).queue == "mails"


# A schema that is altered


ALTERATIONS = [
    "ALTER TABLE pqueue.jobs ALTER COLUMN priority TYPE bigint",
    "ALTER TABLE pqueue.jobs ADD COLUMN more text",
    "ALTER TABLE pqueue.jobs ALTER COLUMN attempts TYPE bigint",
    "ALTER TABLE pqueue.queues ALTER COLUMN paused TYPE bigint",
]


@pytest.mark.parametrize("step_by_step", [False, True])
def test_statements_are_prepared_anew_after_the_schema_is_altered(admin, queue, step_by_step):
    def use():
        queue._dead_checked_at = -float("inf") if step_by_step else float("inf")
        job_id = queue.enqueue("t", key="k")
        queue.enqueue("t", key="k")
        queue.enqueue_many("t", range(2))
        assert queue.get(job_id).id == job_id
        queue.list_jobs()
        queue.stats()
        jobs = queue.dequeue_many("w", 2)
        queue.fail(jobs[0], "no", retry_in_seconds=0)
        queue.complete_and_dequeue([(job, None) for job in jobs[1:]], "w", 1)
        with suppress(InvalidTransition):
            queue.cancel(job_id)
        with suppress(QueueBusy), queue.transaction():
            queue.get(job_id)
            queue.enqueue("t")

    for _ in range(8):
        use()
    for alteration in ALTERATIONS:
        admin.execute(alteration)
        use()


def test_statement_that_is_altered_within_a_transaction_works_the_next_time(admin, queue):
    for _ in range(8):
        with queue.transaction():
            queue.enqueue("t")
            queue.get(1)
    admin.execute(ALTERATIONS[0])
    with suppress(QueueBusy), queue.transaction():
        queue.enqueue("t")
        queue.get(1)
    with queue.transaction():
        queue.enqueue("t")
        queue.get(1)


def test_running_program_stops_when_it_connects_to_a_newer_schema(admin, queue):
    queue.enqueue("t")
    assert queue.dequeue("w")
    admin.execute("UPDATE pqueue.version SET number = 99")
    assert any("expected schema_version 1, got 99" in each for each in queue.check()["problems"])
    lose_connections(admin)
    for verb in (lambda: queue.enqueue("t"), lambda: queue.dequeue("w"), queue.stats):
        with pytest.raises(
            pqueue.SchemaMismatch, match="expected schema 1 or older, got 99: use the pqueue that wrote it"
        ):
            until_connected(verb)
    admin.execute("UPDATE pqueue.version SET number = 1")
    until_connected(lambda: queue.enqueue("t"))


def lose_connections(admin):
    admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
        "AND pid <> pg_backend_pid()"
    )


def until_connected(verb):
    """Repeat the verb while the connections that were lost are busy."""
    for _ in range(20):
        with suppress(QueueBusy):
            return verb()
    raise AssertionError("still busy")


def test_connection_lost_at_any_moment_is_one_error_and_nothing_in_the_log(admin, queue, caplog):
    caplog.set_level(0)

    def transaction():
        with queue.transaction():
            queue.enqueue("t")

    def chained():
        queue.complete_and_dequeue([(queue.dequeue("w"), None)], "w")

    for verb in (transaction, chained, lambda: queue.cancel(queue.enqueue("t")), lambda: queue.enqueue("t", key="k")):
        queue.enqueue("t")
        lose_connections(admin)
        with suppress(QueueBusy), mock.patch.object(pqueue_connections.Link, "is_usable", lambda _: True):
            verb()
        until_connected(lambda: queue.enqueue("t"))
    assert [each.getMessage() for each in caplog.records if each.name.startswith(("psycopg", "sqlalchemy"))] == []


def test_machine_that_was_suspended_soon_knows_the_time(queue):
    """Its monotonic clock stood still, while those of the server and the host went on."""
    queue.now()
    monotonic = time.monotonic
    with mock.patch.object(time, "monotonic", lambda: monotonic() - 3600):
        assert abs(queue.now() - time.time()) < 60


def test_program_that_connects_to_another_server_uses_its_clock(admin, queue):
    queue.now()
    asked, ahead, *host = queue._clock
    queue._clock = (asked, ahead + 3600, *host)
    assert abs(queue.now() - time.time()) > 3500
    lose_connections(admin)
    until_connected(lambda: queue.enqueue("t"))
    assert abs(queue.now() - time.time()) < 60


# What a failure to connect says


@pytest.fixture
def strict(tmp_path):
    """A server that asks for a password over TCP."""
    tmp_path.chmod(0o755)
    strict = Server(tmp_path / "strict").create()
    with (strict.data / "pg_hba.conf").open("w") as rules:
        rules.write("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
    strict.start()
    yield strict
    strict.kill()


def opening(url, **environment):
    with mock.patch.dict(os.environ, environment), pytest.raises((QueueError, ValueError)) as caught:
        pqueue.open_queue(url)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sslmode": "bogus"}, 'invalid sslmode value: "bogus"'),
        ({"options": "-cnosuch=1"}, "nosuch"),
        ({"options": "-cwork_mem=x"}, "work_mem"),
        ({"options": "--nosuch"}, "requires a value"),
        ({"options": "-cshared_buffers=1GB"}, "cannot be changed"),
        ({"hostaddr": "127.0.0.1,127.0.0.1"}, "could not match"),
        ({"host": "/" + "x" * 200}, "too long"),
        ({"host": "db..internal"}, "cannot open db..internal/.*label empty"),
        ({"gssencmode": "bogus"}, "gssencmode"),
        ({"target_session_attrs": "bogus"}, "target_session_attrs"),
        ({"channel_binding": "bogus"}, "channel_binding"),
        ({"connect_timeout": "x"}, "connect_timeout"),
        ({"service": "nosuch"}, "service"),
    ],
)
def test_option_that_can_never_work_is_an_error_that_says_so(database, parameters, message):
    error = opening(with_query(database, **parameters))
    assert not isinstance(error, QueueBusy), error
    assert re.search(message, str(error)), error


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://u:hunter2@h/d?sslmod=require", "parameter of libpq, or schema or max_connections, .*'sslmod'"),
        ("postgresql+psycopg2://u:hunter2@h/d", "got the driver 'psycopg2'"),
        ("postgresql+asyncpg://u:hunter2@h/d", "got the driver 'asyncpg'"),
        ("postgresql://u:hunter2@h/d?max_connections=x", "max_connections of at least 2, got 'x'"),
        ("postgresql://u:hunter2@h/d?max_connections=1", "max_connections of at least 2"),
        ("host=127.0.0.1 dbname=shop password=hunter2", "expected a path or a URL .* got a connection string of libpq"),
        ("dbname=shop", "connection string of libpq"),
        (
            "postgresql//worker:hunter2@127.0.0.1/shop",
            "expected a path or a URL such as postgresql://…, got postgresql//…",
        ),
        ("sqlite//queue.db", "got sqlite//…"),
    ],
)
def test_url_that_can_never_work_is_an_error_that_says_so(url, message):
    error = opening(url)
    assert isinstance(error, ValueError)
    assert re.search(message, str(error)), error


@pytest.mark.parametrize(
    "program", [("producer.py", "--count", "1"), ("admin.py", "stats"), ("consumer.py", "--drain")]
)
def test_program_whose_environment_has_a_connection_string_is_refused(place, program):
    done = place.run(*program, PQUEUE_URL="host=127.0.0.1 password=hunter2")
    assert (done.returncode, done.stdout) == (2, ""), done
    message = "expected a path or a URL .*, got a connection string of libpq; check PQUEUE_URL"
    assert re.fullmatch(rf"\S+: {message}\n", done.stderr), done


@pytest.mark.parametrize("parameters", ["sslmode=require", "sslmode=verify-full&sslrootcert=/nosuch"])
def test_server_without_tls_is_an_error_if_it_is_required(strict, parameters):
    error = opening(f"postgresql://ann@127.0.0.1:{strict.port}/postgres?{parameters}")
    assert not isinstance(error, QueueBusy)
    assert re.search("SSL|certificate", str(error))


@pytest.mark.parametrize("parameters", [{}, {"schema": "letters"}, {"sslmode": "disable"}])
def test_program_opens_a_url_that_ends_with_a_newline(database, parameters):
    url = with_query(database, **parameters) + "\n"
    with mock.patch.dict(os.environ, PQUEUE_URL=url), closing(pqueue.open_queue()) as queue:
        queue.enqueue("t")
        assert queue.name == queue.name.strip()


@pytest.mark.parametrize("value", ["database", "true", "bogus"])
def test_url_of_a_connection_for_replication_opens_a_usual_one(database, value):
    with closing(pqueue.open_queue(with_query(database, replication=value))) as queue:
        queue.enqueue("t")


def test_database_that_accepts_no_connections_is_an_error(server, database):
    name = sqlalchemy.make_url(database).database
    with psycopg.connect(server, autocommit=True) as other:
        other.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    error = opening(database)
    assert not isinstance(error, QueueBusy)
    assert "not currently accepting connections" in str(error)


@pytest.mark.parametrize("name", ["closed", "too many", "recovery", "reset", "EOF"])
def test_name_of_a_role_or_database_is_not_taken_for_an_answer(roles, database, name):
    """Without such a database or role, and with a role that may not connect."""
    url = sqlalchemy.make_url(database)
    urls = [url.set(database=name), url.set(username=name)]
    roles.names.append(name)
    roles.admin.execute(f'CREATE ROLE "{name}" NOLOGIN')
    for each in (*urls, url.set(username=name)):
        error = opening(each.render_as_string(hide_password=False))
        assert not isinstance(error, QueueBusy), error


@pytest.mark.parametrize(
    "answer",
    [
        "the database system is starting up",
        "the database system is shutting down",
        "the database system is in recovery mode",
        "the database system is not yet accepting connections\nDETAIL:  Consistent recovery state not reached.",
        "the database system is not accepting connections\nDETAIL:  Hot standby mode is disabled.",
        "sorry, too many clients already",
        "remaining connection slots are reserved for roles with the SUPERUSER attribute",
        'too many connections for database "shop"',
        'could not fork new process for connection: Cannot allocate memory for "invalid"',
    ],
)
def test_server_that_will_accept_connections_later_is_busy(answer):
    text = f'connection to server on socket "/run/password/.s.PGSQL.5432" failed: FATAL:  {answer}'
    error = pqueue_connections.connection_error("h/d", psycopg.OperationalError(text))
    assert isinstance(error, QueueBusy)
    assert str(error) == f"cannot reach h/d: {text.splitlines()[0]}"


@pytest.mark.parametrize(
    "answer",
    [
        'connection to server on socket "/run/closed/.s.PGSQL.5432" failed: Permission denied',
        'connection to server at "10.0.0.1", port 5432 failed: FATAL:  permission denied to start WAL sender',
        'could not parse network address "10.0.0.256": Name or service not known',
        'connection to server at "10.0.0.1", port 6432 failed: FATAL:  no such database: shop',  # PgBouncer
        'connection to server at "10.0.0.1", port 6432 failed: FATAL:  bouncer config error',
        'weak sslmode "prefer" may not be used with sslnegotiation=direct (use "require")',
        'requirepeer specifies "ann", but actual peer user name is "postgres"',
        'require_auth method "md5" is specified more than once',
        'negative require_auth method "!none" cannot be mixed with non-negative methods',
        'server only supports protocol version 3.0, but "min_protocol_version" was set to 3.2',
        'private key file "/k" has group or world access; file must have permissions u=rw (0600) or less',
    ],
)
def test_answer_that_no_other_attempt_changes_is_an_error(answer):
    error = pqueue_connections.connection_error("h/d", psycopg.OperationalError(f"{answer}\nDETAIL:  more"))
    assert not isinstance(error, QueueBusy)
    assert str(error) == f"cannot open h/d: {answer}"


@pytest.mark.parametrize(
    ("state", "kind", "said"),
    [
        ("58030", QueueError, "cannot use .*: it fails"),  # an input or output error of its disk
        ("58P01", QueueError, "cannot use .*: it fails"),  # a file of the table is gone
        ("XX001", QueueError, "cannot use .*: it fails"),  # it is damaged
        ("0A000", QueueError, "cannot use .*: it fails"),
        ("53100", QueueFull, "cannot write to .*: its disk is full"),
        ("53200", QueueBusy, "cannot use .*: it fails"),  # out of memory
        ("57P03", QueueBusy, "cannot reach .*: it fails"),
        ("57014", QueueBusy, "cannot use .*: it fails"),  # pg_cancel_backend
        ("23514", QueueError, "cannot use .*: it fails"),  # a constraint of the application's own table
        ("40001", QueueBusy, "cannot use .*: canceling statement due to conflict with recovery"),  # of a standby
    ],
)
def test_failure_of_a_statement_is_busy_only_if_it_passes(admin, queue, state, kind, said):
    text = said.rpartition(": ")[2]
    admin.execute(
        "CREATE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE '{text}' USING ERRCODE = '{state}'; END $$"
    )
    admin.execute("CREATE TRIGGER fail BEFORE INSERT ON pqueue.jobs FOR EACH ROW EXECUTE FUNCTION public.fail()")
    with pytest.raises(kind, match=f"^{said}$") as raised:
        queue.enqueue("t")
    assert isinstance(raised.value, QueueBusy) == (kind is QueueBusy)


def test_statement_whose_plan_the_application_removed_says_so(queue):
    for _ in range(8):
        queue.enqueue("t")
    with pytest.raises(QueueBusy, match="removed prepared statements; try again"), queue.transaction() as db:
        for _ in range(8):
            queue.enqueue("t")
        db.exec_driver_sql("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
        queue.enqueue("t")
    with queue.transaction():
        queue.enqueue("t")
    assert queue.count_jobs() == 9


def test_verb_prepares_its_statements_anew_after_the_application_removed_them(queue):
    job_ids = queue.enqueue_many("t", range(9))
    for job_id in job_ids[:8]:
        queue.cancel(job_id)
    with queue.transaction() as db:
        db.exec_driver_sql("DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$")
    queue.cancel(job_ids[8])
    assert queue.count_jobs(state="cancelled") == 9


def test_verb_prepares_its_statements_anew_each_time_they_are_lost(queue):
    deallocate = "DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$"
    for _ in range(3):
        for _ in range(8):
            queue.consumers()
        with pytest.raises(QueueBusy, match="removed prepared"), queue.transaction() as db:
            db.exec_driver_sql(deallocate)
            queue.consumers()
        for _ in range(8):
            queue.consumers()
        with queue.transaction() as db:
            db.exec_driver_sql(deallocate)
        queue.consumers()


def test_library_that_the_server_cannot_load_is_an_error(roles):
    error = opening(roles.add("library", "ALTER ROLE {role} SET session_preload_libraries = nosuch"))
    assert not isinstance(error, QueueBusy)
    assert 'could not access file "nosuch"' in str(error)


def test_role_that_may_not_log_in_is_an_error(roles):
    url = roles.add("nologin", "ALTER ROLE {role} NOLOGIN")
    error = opening(url)
    assert not isinstance(error, QueueBusy)
    assert "not permitted to log in" in str(error)


def test_connections_that_are_used_up_are_busy(roles):
    assert isinstance(opening(roles.add("full", "ALTER ROLE {role} CONNECTION LIMIT 0")), QueueBusy)


def test_server_that_is_away_is_busy(tmp_path):
    for url in (
        f"postgresql://u:hunter2@127.0.0.1:{free_port()}/d",
        f"postgresql://u:hunter2@/d?host={tmp_path}",
        f"postgresql://u:hunter2@/d?host={tmp_path}/nosuch",
    ):
        assert isinstance(opening(url), QueueBusy)


def test_wrong_and_missing_passwords_are_different_errors(strict):
    strict.ask("CREATE ROLE ann LOGIN PASSWORD 'right'")
    wrong = opening(f"postgresql://ann:hunter2@127.0.0.1:{strict.port}/postgres")
    assert not isinstance(wrong, QueueBusy)
    assert "user or password refused" in str(wrong)
    missing = opening(f"postgresql://ann@127.0.0.1:{strict.port}/postgres", PGPASSFILE="/dev/null")
    assert not isinstance(missing, QueueBusy)
    assert "none was found: set PGPASSWORD" in str(missing)
    for text, error in (("wrong", wrong), ("missing", missing)):
        assert text and f"port {strict.port}" in str(error) or "PGPASSWORD" in str(error)


REFUSE = {  # how an operator keeps a role from connecting, how it is allowed again, and what is said meanwhile
    "password": ("ALTER ROLE ann PASSWORD 'new'", "ALTER ROLE ann PASSWORD 'right'", "user or password refused"),
    "login": ("ALTER ROLE ann NOLOGIN", "ALTER ROLE ann LOGIN", "not permitted to log in"),
    "right": (
        "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC",
        "GRANT CONNECT ON DATABASE postgres TO PUBLIC",
        "permission denied for database",
    ),
    "limit": ("ALTER ROLE ann CONNECTION LIMIT 0", "ALTER ROLE ann CONNECTION LIMIT -1", "too many connections"),
}


@pytest.mark.parametrize("refused", REFUSE)
def test_running_programs_wait_until_their_role_may_connect_again(place, strict, refused):
    refuse, allow, message = REFUSE[refused]
    for statement in ("CREATE ROLE ann LOGIN PASSWORD 'right'", "CREATE SCHEMA pqueue AUTHORIZATION ann"):
        strict.ask(statement)
    url = f"postgresql://ann:right@127.0.0.1:{strict.port}/postgres"
    place.write("tasks.py", "from pqueue import task\n@task()\ndef noop(): pass\n")
    children = [
        place.start("consumer.py", "--import", "tasks", *options, PQUEUE_URL=url)
        for options in ((), ("--concurrency", 2))
    ]
    wait_until(lambda: all(" started " in child.out.read_text() for child in children))
    with closing(pqueue.open_queue(url)) as queue:
        wait_until(lambda: len(queue.consumers()) == 2)
        strict.ask(refuse)
        strict.ask("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'ann'")
        wait_until(lambda: all(message in child.out.read_text() for child in children))
        with pytest.raises(QueueBusy, match=message):
            queue.enqueue("noop")
        strict.ask(allow)
        job_ids = [queue.enqueue("noop") for _ in range(4)]
        wait_until(lambda: all(queue.get(job_id).state == "completed" for job_id in job_ids))
    assert [child.poll() for child in children] == [None, None]


READ_ONLY = {  # how an operator or a cloud lets nobody write, and undoes it
    "server": ("ALTER SYSTEM SET {} = on", "ALTER SYSTEM RESET {}"),
    "role": ("ALTER ROLE ann SET {} = on", "ALTER ROLE ann RESET {}"),
}


@pytest.mark.parametrize("of", READ_ONLY)
def test_running_programs_wait_until_they_may_write_again(place, strict, of):
    forbid, allow = (sql.format("default_transaction_read_only") for sql in READ_ONLY[of])
    for statement in ("CREATE ROLE ann LOGIN PASSWORD 'right'", "CREATE SCHEMA pqueue AUTHORIZATION ann"):
        strict.ask(statement)
    url = f"postgresql://ann:right@127.0.0.1:{strict.port}/postgres"
    place.write("tasks.py", "from pqueue import task\n@task()\ndef noop(): pass\n")
    options = [(), ("--concurrency", 2)]
    children = [place.start("consumer.py", "--import", "tasks", *each, PQUEUE_URL=url) for each in options]
    wait_until(lambda: all(" started " in child.out.read_text() for child in children))
    with closing(pqueue.open_queue(url)) as queue:
        wait_until(lambda: len(queue.consumers()) == 2)
        queue.enqueue("noop")
        wait_until(lambda: queue.count_jobs(state="completed") == 1)
        for statement in (forbid, "SELECT pg_reload_conf()"):
            strict.ask(statement)
        strict.ask("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'ann'")
        message = "default_transaction_read_only is on"
        wait_until(lambda: all(message in child.out.read_text() for child in children))
        with pytest.raises(QueueBusy, match=message):
            queue.enqueue("noop")
        with psycopg.connect(f"{strict.near_url}&options=-cdefault_transaction_read_only%3Doff", autocommit=True) as db:
            db.execute(allow)
            db.execute("SELECT pg_reload_conf()")
        wait_until(lambda: enqueued(queue))
        wait_until(lambda: queue.count_jobs(state="completed") == 2)
    assert [child.poll() for child in children] == [None, None]


def enqueued(queue):
    """Return the id of a new job, or None if there may be none yet."""
    with suppress(QueueBusy):
        return queue.enqueue("noop")
    return None


def test_each_host_is_reported_with_its_answer_and_port(strict):
    strict.ask("CREATE ROLE ann LOGIN PASSWORD 'right'")
    strict.ask("ALTER SYSTEM SET default_transaction_read_only = on")
    strict.ask("SELECT pg_reload_conf()")
    away, hosts = free_port(), "127.0.0.1,127.0.0.1"
    url = f"postgresql://ann:right@/postgres?host={hosts}&port={away},{strict.port}&target_session_attrs=read-write"
    error = opening(url)
    assert isinstance(error, QueueBusy)
    assert re.search(
        rf"port {away} failed: Connection refused; .*port {strict.port} failed: session is read-only", str(error)
    )


def test_each_host_of_a_service_is_reported(strict, tmp_path):
    ports = f"{free_port()},{strict.port}"
    file = tmp_path / "services"
    file.write_text(f"[shop]\nhost=127.0.0.1,127.0.0.1\nport={ports}\nuser=ann\npassword=hunter2\ndbname=postgres\n")
    error = opening("postgresql://?service=shop", PGSERVICEFILE=str(file))
    assert re.search(f"port {ports.replace(',', ' failed: Connection refused; .*port ')} failed: FATAL", str(error)), (
        error
    )


@pytest.mark.parametrize("away", ["127.0.0.1", "nosuch.invalid"])
def test_host_that_does_not_answer_is_reported_beside_one_that_does(away):
    """Not even a host that has no address."""
    refusing = free_port()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port, url = silent.getsockname()[1], "postgresql://u@/d?connect_timeout=1"
        error = opening(f"{url}&host={away},127.0.0.1&port={port},{refusing}")
    assert isinstance(error, QueueBusy)
    silence = f"'127.0.0.1', port: '{port}', .*: connection timeout expired"
    said = silence if away == "127.0.0.1" else "failed to resolve host 'nosuch.invalid'"
    assert re.search(f"port {refusing} failed: Connection refused", str(error))
    assert re.search(said, str(error)), error


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("one", "one/d"),
        ("one:5432", "one/d"),
        ("one:5433", "one:5433/d"),
        ("one:54321", "one:54321/d"),
        ("one,two", "one,two/d"),
        ("one,two:5433", "one,two:5433/d"),
        ("one:5433,two", "one:5433,two/d"),
        ("", "localhost/d"),
        ("%2Ftmp:5433", "/tmp:5433/d"),
    ],
)
def test_queue_is_named_by_its_hosts_with_their_ports(place, name):
    """So that two servers of one host differ: `move` compares these names."""
    assert parse_url(f"postgresql://u@{place}/d").name == name


def test_queue_of_a_service_is_named_by_it(tmp_path, database, monkeypatch):
    place = psycopg.conninfo.conninfo_to_dict(database)
    file = tmp_path / "services"
    file.write_text("[shop]\n" + "".join(f"{name}={value}\n" for name, value in place.items()))
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    with closing(pqueue.open_queue("postgresql://?service=shop")) as queue:
        assert queue.name == "service shop/"
    monkeypatch.setenv("PGSERVICE", "shop")
    with closing(pqueue.open_queue("postgresql://")) as queue:
        assert queue.name == "service shop/"


# At the start


@pytest.fixture
def primary(tmp_path):
    server = Server(tmp_path / "primary").create()
    yield server
    server.kill()


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_server_that_syncs_nothing_is_told_when_the_queue_is_opened(primary, caplog, setting):
    primary.start(**{setting: "off"})
    for durability in ("normal", "full"):
        pqueue.open_queue(primary.url, durability=durability).close()
    (record,) = caplog.records
    assert record.message.endswith(f"a crash of the server may lose jobs: {setting} is off")


def test_program_is_told_of_a_table_that_a_crash_empties(admin, queue, database, caplog):
    admin.execute("ALTER TABLE pqueue.jobs SET UNLOGGED")
    pqueue.open_queue(database).close()
    (record,) = caplog.records
    assert "a crash of the server may lose jobs: table pqueue.jobs is UNLOGGED" in record.message
    admin.execute("ALTER TABLE pqueue.jobs SET LOGGED")


def test_programs_that_begin_before_the_server_wait_for_it(place, primary):
    url = {"PQUEUE_URL": primary.url}
    producer = place.start("producer.py", "--interval", "0.05", "--count", "5", **url)
    consumer = place.start("consumer.py", **url)
    wait_until(lambda: all(" waiting " in child.out.read_text() for child in (producer, consumer)))
    primary.start()
    assert producer.wait(PATIENCE_SECONDS) == 0
    with closing(pqueue.open_queue(primary.url)) as queue:
        wait_until(lambda: queue.stats()["states"]["completed"] == 5)
    assert consumer.poll() is None


@pytest.mark.parametrize("program", [("producer.py",), ("consumer.py",)])
def test_program_that_waits_for_the_server_is_stopped_by_a_signal(place, program):
    child = place.start(*program, PQUEUE_URL=f"postgresql://postgres@127.0.0.1:{free_port()}/postgres")
    wait_until(lambda: " waiting " in child.out.read_text())
    child.terminate()
    assert child.wait(PATIENCE_SECONDS) == 0


@pytest.mark.parametrize("command", [("consumer.py", "--drain"), ("admin.py", "stats"), ("admin.py", "doctor")])
def test_command_gives_up_after_a_few_seconds_and_says_why(place, command):
    done = place.run(*command, PQUEUE_URL=f"postgresql://postgres@127.0.0.1:{free_port()}/postgres")
    assert done.returncode == 1, done
    assert re.fullmatch(r"\S+: cannot reach 127.0.0.1:[0-9]+/postgres: .*Connection refused\n", done.stderr), (
        done.stderr
    )
    assert done.stdout == ""
