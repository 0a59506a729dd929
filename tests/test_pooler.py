"""PgBouncer between the programs and PostgreSQL, which lends a process of the server for one transaction at a time."""

# ruff: noqa: F401, F811 - pytest finds tests and fixtures by their names

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import unittest
from contextlib import ExitStack, contextmanager, suppress
from unittest import mock

import psycopg
import pytest
from conftest import free_port
from postgres_server import ACCOUNT
from test_outage import Load
from test_postgres import PostgresContractCase, database, execute_on_tables, server, shared_database

import pqueue
import pqueue_listener
from pqueue import LeaseLost, QueueBusy, QueueError
from pqueue_sqlalchemy import PersistentQSQLAlchemy
from test_pqueue import wait_until

PGBOUNCER = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
SERVERS = {
    "transaction": 3,
    "session": 50,
    "statement": 3,
}  # fewer than there are connections, so that these must take turns


class Pooler:
    """PgBouncer before the server of this database; it trusts everybody, and is restarted by `restart`."""

    def __init__(self, folder, database: str, mode: str = "transaction") -> None:
        self.folder, self.port = folder, free_port()
        place = psycopg.conninfo.conninfo_to_dict(database)
        self.database = place["dbname"]
        target = " ".join(f"{name}={place[name]}" for name in ("host", "port", "user", "password") if place.get(name))
        (folder / "pgbouncer.ini").write_text(
            f"""[databases]
{self.database} = {target}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {SERVERS[mode]}
server_idle_timeout = 1
"""
        )
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://nobody:hunter2@127.0.0.1:{self.port}/{self.database}"

    def start(self) -> None:
        command = [PGBOUNCER, "-q", str(self.folder / "pgbouncer.ini")]
        if os.geteuid() == 0:
            command[1:1] = ["-u", ACCOUNT]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._answers)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def new_pooler(folder, database, mode="transaction"):
    folder.chmod(0o755)
    (folder / "pooler").mkdir(mode=0o755)
    pooler = Pooler(folder / "pooler", database, mode)
    yield pooler
    pooler.stop()


@pytest.fixture
def pooler(request, tmp_path, database):
    with new_pooler(tmp_path, database, getattr(request, "param", "transaction")) as pooler:
        yield pooler


@pytest.fixture(scope="class")
def shared_pooler(tmp_path_factory, shared_database):
    with new_pooler(tmp_path_factory.mktemp("pooler"), shared_database) as pooler:
        yield pooler


@pytest.fixture
def queue(pooler):
    queue = pqueue.open_queue(pooler.url)
    yield queue
    queue.close()


@pytest.fixture
def direct(database, queue):
    """The same queue without the pooler; it considers any consumer without a lock dead at once."""
    with mock.patch("pqueue_listener.RESTART_SECONDS", 0), mock.patch("pqueue.DEAD_CHECK_SECONDS", 0):
        queue = pqueue.open_queue(database)
        yield queue
        queue.close()


class PgBouncerContract(PostgresContractCase, unittest.TestCase):
    polls = True

    @pytest.fixture(autouse=True)
    def _pooler(self, shared_pooler, database):
        self.url = shared_pooler.url

    def open(self, **options):
        queue = PersistentQSQLAlchemy(self.url, **options)
        self.addCleanup(queue.close)
        return queue

    def execute(self, db, sql, **params):
        return execute_on_tables(db, sql, params)


@pytest.mark.parametrize("pooler", ["transaction", "session"], indirect=True)
def test_settings_apply_to_each_transaction_and_to_no_other_client(pooler, queue):
    ids = queue.enqueue_many("t", range(50))
    with ExitStack() as stack:
        queues = [queue, *(stack.enter_context(pqueue.open_queue(pooler.url)) for _ in range(4))]

        def work():
            for each in queues:
                with suppress(QueueBusy, LeaseLost):  # the pooler may close a connection: the jobs come once more
                    for job in each.dequeue_many("w", 3, lease_seconds=2):
                        each.complete(job)
            with suppress(QueueBusy):
                return {job.id for job in queue.list_jobs(state="completed")} == set(ids)

        wait_until(work)
        with queue.transaction() as db:
            assert db.exec_driver_sql("SHOW search_path").scalar() == '"$user", public'
        assert queue._read("SHOW search_path") == [("pg_catalog, pg_temp",)]
        for _ in range(10):
            with psycopg.connect(pooler.url) as stranger:
                assert stranger.execute("SHOW search_path").fetchone() == ('"$user", public',)
                assert stranger.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)
                assert stranger.execute("SELECT count(*) FROM pg_listening_channels()").fetchone() == (0,)


@pytest.mark.parametrize("pooler", ["statement"], indirect=True)
def test_pooler_that_forbids_transactions_is_an_error_that_names_its_mode(pooler):
    with pytest.raises(
        QueueError, match="expected pool_mode = transaction or session, got: .* in statement pooling mode"
    ):
        pqueue.open_queue(pooler.url)


def test_consumers_log_once_that_they_poll(queue, direct, caplog):
    assert queue.dequeue("anna") is None
    assert queue.dequeue("berta") is None
    assert [record.message for record in caplog.records] == [
        f"{queue.name} passes on no NOTIFY: consumers poll every 1 s, and crashes are noticed only when leases expire"
    ]
    direct.enqueue("t")
    assert wait_until(lambda: queue.wait(1, consumer="anna"))
    assert queue.dequeue("anna")


def test_consumer_behind_it_is_never_taken_for_dead_before_its_lease_is_over(pooler, queue, direct):
    direct.enqueue("t")
    job = queue.dequeue("anna", lease_seconds=60)
    assert direct.dequeue("berta") is None
    pooler.stop()  # all its connections to the server end
    assert direct.dequeue("berta") is None
    assert {each["name"]: each["state"] for each in direct.consumers()} == {"anna": "running", "berta": "running"}
    later = direct.dequeue("berta", now=direct._time(None) + 61)
    assert later.id == job.id
    pooler.start()
    with pytest.raises(pqueue.LeaseLost):
        queue.complete(job)


def test_consumer_that_dies_before_the_server_is_seen_from_behind_it(queue, direct, monkeypatch):
    monkeypatch.setattr(pqueue_listener, "RESTART_SECONDS", 0)
    direct.enqueue("t")
    job = direct.dequeue("anna")
    direct._listener._stopped = True  # as the kernel does for a process that was killed
    direct._listener._thread.join()
    direct._listener._link.driver.close()
    assert wait_until(lambda: queue.dequeue("berta")).id == job.id


def test_programs_wait_out_its_restart_and_lose_nothing(place, pooler):
    load = Load(place, pooler.url)
    wait_until(lambda: load.completed() > 50)
    pooler.stop()
    wait_until(load.has_waited)
    pooler.start()
    before = wait_until(load.completed)
    wait_until(lambda: load.completed() > before + 50)
    load.finish()
    outputs = [child.out.read_text() for child in load.consumers]
    assert {text.count("passes on no NOTIFY") for text in outputs} <= {1, 2}  # once in each process of a consumer
    assert not any("hunter2" in text for text in outputs)
