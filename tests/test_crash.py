"""Kill everything at random, and count."""

from __future__ import annotations

import operator
import os
import random
import signal
import sqlite3
import threading
import time
from contextlib import closing

import pytest
from conftest import PATIENCE_SECONDS, wait_until

PRODUCERS, CONSUMERS = 5, 8
KILL_EVERY_SECONDS = 0.1
JOBS = int(os.environ.get("PQUEUE_TEST_JOBS", "3000"))

AUDIT = """
CREATE TABLE audit (job_id INTEGER, token TEXT, was TEXT);
CREATE TRIGGER completions AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed' BEGIN
    INSERT INTO audit VALUES (OLD.id, OLD.lease_token, OLD.state);
END;
CREATE TABLE claims (job_id INTEGER, token TEXT, was TEXT);
CREATE TRIGGER deliveries AFTER UPDATE OF state ON jobs WHEN NEW.state = 'processing' BEGIN
    INSERT INTO claims VALUES (NEW.id, NEW.lease_token, OLD.state);
END;
"""


class Fleet:
    """Programs that are started again when they die."""

    def __init__(self, place, **variables):
        self.place, self.variables = place, variables
        self.running = {}
        self.kills = 0

    def add(self, name, *command):
        self.running[name] = (command, self.place.start(*command, **self.variables))

    def kill_one(self):
        name = random.choice(list(self.running))
        command, child = self.running[name]
        child.kill()
        child.wait()
        self.kills += 1
        self.add(name, *command)

    def remove(self, prefix):
        for name in [name for name in self.running if name.startswith(prefix)]:
            _, child = self.running.pop(name)
            wait_until(child.out.read_text)  # it has its signal handlers: TERM to a starting Python is just its end
            child.send_signal(signal.SIGTERM)
            assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_every_job_completes_exactly_once_whichever_process_is_killed(place, durability):
    queue = place.queue(durability=durability)
    with closing(sqlite3.connect(queue.path)) as db:
        db.executescript(AUDIT)
    fleet = Fleet(place, PQUEUE_DURABILITY=durability)
    for number in range(PRODUCERS):
        fleet.add(f"producer-{number}", "producer.py", "--interval", 0)
    for number in range(CONSUMERS):
        fleet.add(f"consumer-{number}", "consumer.py", "--name", f"consumer-{number}")
    over = threading.Event()

    def kill():
        """Kill one after the other, but let the others get on: starting them may take a slow machine all its time."""
        with closing(sqlite3.connect(queue.path)) as db:

            def done():
                return [
                    db.execute(f"SELECT coalesce(max(rowid), 0) FROM {name}").fetchone()[0]
                    for name in ("jobs", "audit")
                ]

            while not over.wait(KILL_EVERY_SECONDS):
                enqueued, completed = done()
                fleet.kill_one()
                enough = [enqueued + 1, completed + len(fleet.running)]
                wait_until(lambda n=enough: over.is_set() or all(map(operator.ge, done(), n)), seconds=900)

    began = time.monotonic()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        wait_until(lambda: queue.list_jobs(limit=1) and queue.list_jobs(limit=1)[0].id >= JOBS, seconds=900)
    finally:
        over.set()
        killer.join()
    fleet.remove("producer")
    assert place.run("producer.py", "--count", 1, PQUEUE_DURABILITY=durability).returncode == 0

    def settled():
        states = queue.stats()["states"]
        return not states["pending"] + states["processing"] + states["scheduled"]

    wait_until(settled, seconds=600)
    fleet.remove("consumer")

    states = queue.stats()["states"]
    total = sum(states.values())
    with closing(sqlite3.connect(queue.path)) as db:
        completions, jobs = db.execute(
            "SELECT count(*), count(DISTINCT job_id) FROM audit WHERE was = 'processing'"
        ).fetchone()
        deliveries = db.execute("SELECT count(*) FROM claims WHERE was = 'pending'").fetchone()[0]
        stale = db.execute(
            """SELECT count(*) FROM audit a WHERE token <>
               (SELECT token FROM claims c WHERE c.job_id = a.job_id ORDER BY c.rowid DESC LIMIT 1)"""
        ).fetchone()[0]
        integrity = db.execute("PRAGMA integrity_check").fetchall()
    files = sorted((place.folder / "var/files").iterdir())
    print(
        f"\n{durability}: {total} jobs, {fleet.kills} kills, {deliveries} deliveries, {states['failed']} set aside, "
        f"{time.monotonic() - began:.0f} s"
    )
    assert integrity == [("ok",)]
    assert states["completed"] + states["failed"] == total
    assert completions == jobs == states["completed"]
    assert stale == 0
    assert states["failed"] == 0, [job.error for job in queue.list_jobs(state="failed")]
    assert len(files) == total
    stamps = [[line.split(" ", 1)[0] for line in file.read_text().splitlines()] for file in files]
    assert all(len(set(lines)) == 1 and lines[0].endswith("Z") for lines in stamps)
    words = [line.split(" ", 2)[1] for file in files for line in file.read_text().splitlines()]
    assert not any(word.endswith("Z") for word in words)


ONCE = """
import os, time
from pqueue import task

def note(what, job):
    with open("ran", "a") as file:
        file.write(f"{what} {job.id}\\n")

@task(max_attempts=1)
def once(job):
    note("began", job)
    time.sleep(0.002)

@task(max_attempts=1)
def kill(job):
    note("began", job)
    os.kill(os.getppid(), 9)  # the consumer; its worker dies with it
    time.sleep(60)
"""


def began(place):
    return [int(line.split()[1]) for line in (place.folder / "ran").read_text().splitlines()]


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_job_that_may_run_once_never_runs_twice_and_fails_only_if_it_began(place, durability):
    place.write("tasks.py", ONCE)
    queue = place.queue(durability=durability)
    for _ in range(3):
        queue.enqueue_many("once", range(100), max_attempts=1)
        queue.enqueue("kill", max_attempts=1)
    queue.enqueue_many("once", range(100), max_attempts=1)
    killed = 0
    while queue.count_jobs(state="pending"):
        child = place.start("consumer.py", "--import", "tasks", "--drain", PQUEUE_DURABILITY=durability)
        killed += child.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    assert killed == 3
    queue.dequeue_many("last", 0)
    ran = began(place)
    assert len(ran) == len(set(ran)) == queue.count_jobs()
    assert {job.state for job in queue.list_jobs(limit=1000)} == {"completed", "failed"}
    assert queue.count_jobs(state="failed") >= 3


def test_consumers_killed_at_any_moment_fail_no_job_that_had_not_begun(place):
    place.write("tasks.py", ONCE)
    queue = place.queue()
    queue.enqueue_many("once", range(2000), max_attempts=1)
    kills = 6
    for _ in range(kills):
        child = place.start("consumer.py", "--import", "tasks")
        before = (place.folder / "ran").stat().st_size if (place.folder / "ran").exists() else 0
        wait_until(lambda b=before: (place.folder / "ran").exists() and (place.folder / "ran").stat().st_size > b + 200)
        child.kill()
        child.wait()
    assert place.start("consumer.py", "--import", "tasks", "--drain").wait(PATIENCE_SECONDS) == 0
    ran = began(place)
    assert len(ran) == len(set(ran))
    failed = {job.id for job in queue.list_jobs(state="failed", limit=5000)}
    assert len(failed - set(ran)) <= kills  # the consumer had noted that it began, and the task not
    assert {job.id for job in queue.list_jobs(limit=5000) if job.state != "pending"} - set(ran) <= failed


def test_second_signal_does_not_release_a_job_with_one_attempt(place):
    place.write("tasks.py", ONCE.replace("time.sleep(0.002)", "time.sleep(60)"))
    queue = place.queue()
    queue.enqueue("once", max_attempts=1)
    child = place.start("consumer.py", "--import", "tasks")
    wait_until((place.folder / "ran").exists)
    for number in (signal.SIGTERM, signal.SIGINT):  # two of one kind at once would be one
        child.send_signal(number)
    assert child.wait(PATIENCE_SECONDS) == 0
    assert queue.get(1).state == "failed"
    assert "not run again because max_attempts is 1" in queue.get(1).error


def test_consumer_and_producer_end_when_the_database_is_replaced(place):
    queue = place.queue()
    queue.enqueue("prepend_timestamp", {"file": "none"}, max_attempts=1)
    queue.backup(place.folder / "backup.db")
    children = [place.start("consumer.py"), place.start("producer.py", "--interval", 0.1)]
    wait_until(lambda: queue.count_jobs(state="completed"))
    (place.folder / "backup.db").replace(place.folder / "var/queue.db")
    for child in children:
        assert child.wait(PATIENCE_SECONDS) == 1
        assert "was replaced or moved, or its log deleted" in child.out.read_text()
        assert "\nTraceback" not in child.out.read_text()
    late = place.start("consumer.py", "--drain")
    assert late.wait(PATIENCE_SECONDS) == 1
    assert "it took the place of another database" in late.out.read_text()
