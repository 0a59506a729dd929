"""The server goes away under load and comes back, or another takes its place: nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections import Counter
from contextlib import closing
from datetime import datetime
from unittest import mock

import psycopg
import pytest
from conftest import ROOT
from postgres_server import Server

import pqueue
import pqueue_listener
from pqueue import QueueFull
from pqueue_postgres import TABLES
from test_pqueue import PATIENCE_SECONDS, wait_until


class Load:
    """Producers and consumers at work, and what they said."""

    def __init__(self, place, url: str, producers: int = 2, consumers: int = 3) -> None:
        variables = {"PQUEUE_URL": url}
        self.queue = pqueue.open_queue(url)
        start = place.start
        self.producers = [start("producer.py", "--interval", "0.02", **variables) for _ in range(producers)]
        self.consumers = [start("consumer.py", "--lease-seconds", "5", **variables) for _ in range(consumers)]

    def completed(self) -> int:
        return self.queue.stats()["states"]["completed"]

    def acknowledged(self) -> list[tuple[float, int]]:
        """Return (Unix seconds, job id) as the producers reported."""
        lines = [line for child in self.producers for line in child.out.read_text().splitlines()]
        matches = [re.match(r"(\S+) enqueued job=(\d+)", line) for line in lines]
        return sorted(
            (datetime.fromisoformat(m[1].replace("Z", "+00:00")).timestamp(), int(m[2])) for m in matches if m
        )

    def has_waited(self) -> bool:
        return all(" waiting " in child.out.read_text() for child in [*self.producers, *self.consumers])

    def finish(self) -> None:
        """Stop producing, see all done, and check that what was acknowledged was done, once per file."""
        for child in self.producers:
            child.terminate()
            assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()
        wait_until(lambda: not any(self.queue.stats()["states"][state] for state in pqueue.UNFINISHED))
        assert [child.poll() for child in self.consumers] == [None] * len(self.consumers)
        jobs = {job.id: job for job in self.queue.list_jobs(limit=100_000)}
        assert {job.state for job in jobs.values()} == {"completed"}
        acknowledged = self.acknowledged()
        assert {job_id for _, job_id in acknowledged} <= set(jobs)
        assert len({job.key for job in jobs.values()}) == len(jobs)
        assert len(jobs) <= len(acknowledged) + len(self.producers)  # one that was stopped while it waited
        self.queue.close()


@pytest.fixture
def primary(tmp_path):
    server = Server(tmp_path / "primary").create()
    yield server
    server.kill()


@pytest.fixture
def standby(tmp_path):
    server = Server(tmp_path / "standby")
    yield server
    server.kill()


def test_programs_wait_out_a_restart_of_the_server_and_lose_nothing(place, primary):
    load = Load(place, primary.start().url)
    wait_until(lambda: load.completed() > 50)
    primary.stop_at_once()
    wait_until(load.has_waited)
    primary.start()
    before = wait_until(load.completed)
    wait_until(lambda: load.completed() > before + 50)
    load.finish()


def test_standby_takes_over_and_every_acknowledged_job_is_there(place, primary, standby, capsys):
    primary.start(synchronous_standby_names="standby")
    standby.copy(primary).start(synchronous_standby_names="")
    wait_until(lambda: primary.ask("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"))
    hosts = f"{primary.address}:{primary.port},{standby.address}:{standby.port}"
    load = Load(place, f"postgresql://postgres@{hosts}/postgres?target_session_attrs=read-write")
    wait_until(lambda: load.completed() > 50)
    primary.kill()
    wait_until(load.has_waited)
    assert standby.ask("SELECT pg_promote()")
    before = wait_until(load.completed)
    wait_until(lambda: load.completed() > before + 50)
    load.finish()
    times = [at for at, _ in load.acknowledged()]
    gap = max(later - earlier for earlier, later in zip(times, times[1:], strict=False))
    with capsys.disabled():
        print(f"\nno job could be enqueued for {gap:.1f} s while the standby took over; {len(times)} jobs, none lost")


def test_subscriber_takes_over_after_the_statements_that_doctor_names(primary):
    (disable,) = re.findall("`(ALTER .* DISABLE TRIGGER USER)`", (ROOT / "docs" / "postgres.md").read_text())
    primary.start(wal_level="logical")
    primary.ask("CREATE DATABASE copy")
    new_url = f"{primary.url.removesuffix('postgres')}copy"
    with closing(pqueue.open_queue(new_url)) as new:
        new.limit("default", 100)
    with closing(pqueue.open_queue(primary.url)) as old, psycopg.connect(new_url, autocommit=True) as copy:

        def replicate(sql):
            copy.execute(sql)
            wait_until(lambda: not copy.execute("SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r'").fetchall())

        # as pg_dump -s copies it
        copy.execute(f"TRUNCATE {', '.join('pqueue.' + name for name in TABLES)} RESTART IDENTITY; {disable}")
        old.enqueue_many("t", range(60), group="a")
        old.limit("default", 100, running=1)
        # The counts are copied before the jobs, as it is when there are many of these.
        primary.ask("CREATE PUBLICATION everything FOR TABLE pqueue.pending_counts")
        primary.ask("SELECT pg_create_logical_replication_slot('everything', 'pgoutput')")
        place = f"host={primary.address} port={primary.port} user=postgres dbname=postgres"
        replicate(
            f"CREATE SUBSCRIPTION everything CONNECTION '{place}' PUBLICATION everything WITH (create_slot = false)"
        )
        primary.ask("ALTER PUBLICATION everything ADD TABLES IN SCHEMA pqueue")
        replicate("ALTER SUBSCRIPTION everything REFRESH PUBLICATION")
        old.complete(old.dequeue("w"))
        old.enqueue("t", group="b")
        end = primary.ask("SELECT pg_current_wal_lsn()")
        wait_until(lambda: primary.ask(f"SELECT bool_and(replay_lsn >= '{end}') FROM pg_stat_replication"))
        copy.execute("DROP SUBSCRIPTION everything")
        with closing(pqueue.open_queue(new_url)) as new:
            for problem in new.check()["problems"]:
                copy.execute(problem.partition("run ")[2])
            assert new.check()["problems"] == []
            assert new.stats()["states"]["pending"] == 60
            new.enqueue_many("t", range(40), group="b")
            with pytest.raises(QueueFull):
                new.enqueue("t")
            assert {new.dequeue("w").group for _ in range(2)} == {"a", "b"}


def test_server_that_is_slow_to_pass_on_a_notify_is_not_taken_for_a_pooler(primary):
    queue, pids, stops = pqueue.open_queue(primary.start().url), [], []
    queue._pool.close_idle(0)  # so that the consumer connects anew
    connect = queue._connect_raw

    def stopped():
        """Connect, and stop the server's process from when it listens until it is asked for something."""
        connection = connect()
        pid, execute = connection.info.backend_pid, connection.execute

        def run(sql, *params, **options):
            os.kill(pid, signal.SIGCONT)
            done = execute(sql, *params, **options)
            if sql == queue._sql(pqueue_listener.LISTEN):
                os.kill(pid, signal.SIGSTOP)
                stops.append(pid)
            return done

        pids.append(pid)
        connection.execute = run
        return connection

    with mock.patch.object(queue, "_connect_raw", stopped):
        queue.dequeue("anna")
    os.kill(pids[0], signal.SIGCONT)
    assert stops == pids
    assert queue._listener.gets_notify
    queue.close()


@pytest.mark.parametrize(
    ("options", "speakers"),
    [((), 1), (("--concurrency", 2), 2)],  # the keeper, and the worker that has room for another job
)
def test_consumer_that_keeps_a_lease_says_once_that_the_server_is_away(place, primary, options, speakers):
    place.write("tasks.py", "import time\nfrom pqueue import task\n@task()\ndef long(job): time.sleep(600)\n")
    with closing(pqueue.open_queue(primary.start().url)) as queue:
        job_id = queue.enqueue("long")
        child = place.start("consumer.py", "--import", "tasks", "--lease-seconds", 1, *options, PQUEUE_URL=primary.url)
        for outage in (1, 2):
            lease = wait_until(lambda: queue.get(job_id).lease_expires_at)
            wait_until(lambda lease=lease: (queue.get(job_id).lease_expires_at or 0) > lease)
            primary.stop_at_once()
            with socket.create_server((primary.address, primary.port)) as in_its_place:
                in_its_place.settimeout(PATIENCE_SECONDS)
                for _ in range(12):
                    in_its_place.accept()[0].close()
            said = Counter(line.partition(" ")[2] for line in child.out.read_text().splitlines())
            assert max(number for line, number in said.items() if "reason=" in line) <= outage * speakers, said
            primary.start()
