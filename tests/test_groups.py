"""Limits of groups with real processes that are killed, on SQLite and PostgreSQL; and the reports about them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress

import pytest
import test_feature_histories as feature_histories
from conftest import ROOT, wait_until
from test_postgres import database, server  # noqa: F401 - fixtures

import admin
import pqueue
from pqueue_tools.report import why

RUNNING, RATE, SECONDS = 2, 5, 0.5
KILLS = 6
CONSUMER = """
import sys, time, pqueue
url, name = sys.argv[1:]
with pqueue.open_queue(url, durability="normal") as queue:
    while True:
        for job in queue.dequeue_many(name, 3):
            with open(job.payload, "a") as log:
                log.write(f"{job.started_at!r}\\n")
            time.sleep(0.002)
            queue.complete(job)
        queue.wait(0.05, consumer=name)
"""


ACTOR = """
import json, os, random, sys, time
from test_feature_histories import Actor
url, name, file = sys.argv[1:]
notes = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
note = lambda seen: os.write(notes, f"{json.dumps(seen)}\\n".encode())
actor = Actor(name, url, random.Random(name), time.time, note)
while True:
    actor.step()
"""


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    return str(tmp_path / "q.db") if request.param == "sqlite" else request.getfixturevalue("database")


def test_groups_stay_within_their_limits_while_consumers_are_killed(url, tmp_path):
    chance = random.Random(7)
    logs = {group: tmp_path / f"{group}.log" for group in ("a", "b", "")}
    with closing(pqueue.open_queue(url)) as queue:
        queue.limit("default", running=RUNNING, rate=(RATE, SECONDS))
        for group, log in logs.items():
            queue.enqueue_many("t", [str(log)] * 300, group=group or None, max_attempts=99)
        consumers: dict[str, subprocess.Popen[bytes]] = {}
        killed = 0
        try:
            while killed < KILLS:
                for name in "xyz":
                    if name not in consumers:
                        consumers[name] = subprocess.Popen([sys.executable, "-c", CONSUMER, url, name], cwd=ROOT)
                running: dict[str, int] = {}
                for job in queue.list_jobs(state="processing"):
                    running[job.group or ""] = running.get(job.group or "", 0) + 1
                assert all(number <= RUNNING for number in running.values()), running
                done = queue.stats()["states"]["completed"]
                wait_until(lambda done=done: queue.stats()["states"]["completed"] > done + 2)
                name = chance.choice("xyz")
                consumers[name].send_signal(signal.SIGKILL)
                consumers.pop(name).wait()
                killed += 1
            wait_until(lambda: all(log.exists() and log.read_text().count("\n") > 2 * RATE for log in logs.values()))
        finally:
            for each in consumers.values():
                each.kill()
                each.wait()
    for group, log in logs.items():
        times = sorted({float(line) for line in log.read_text().split("\n")[:-1] if line})
        assert all(later - at >= SECONDS for at, later in zip(times, times[RATE:], strict=False)), (group, times)


def test_killed_actors_keep_limits_and_handle_each_failure_and_time_once(url, tmp_path):
    chance, file, began, seconds, every = random.Random(3), tmp_path / "notes", time.time(), 0.2, 0.05
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with closing(pqueue.open_queue(url)) as queue:
        feature_histories.begin(queue, began, seconds, every)
        actors: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(6):
                command = [sys.executable, "-c", ACTOR, url, f"actor {number}", str(file)]
                actors.append(subprocess.Popen(command, env=environment))
                if number > 2:
                    done = file.stat().st_size
                    wait_until(lambda done=done: file.stat().st_size > done + 1000)
                    actors[chance.choice([number - 1, number])].kill()
                else:
                    wait_until(file.exists)
        finally:
            for each in actors:
                each.kill()
        for each in actors:
            assert each.wait() == -signal.SIGKILL  # none failed
        notes = [json.loads(line) for line in file.read_text().splitlines()]
        assert list(feature_histories.problems(queue, notes, began, seconds, every)) == []


def test_two_consumers_never_run_more_of_a_group_than_its_limit(url):
    with closing(pqueue.open_queue(url)) as one, closing(pqueue.open_queue(url)) as other:
        one.limit("default", running=3)
        for group in "ab":
            one.enqueue_many("t", range(50), group=group)
        jobs = [*one.dequeue_many("x", 4), *other.dequeue_many("y", 4)]
        for _ in range(30):
            assert {group: sum(job.group == group for job in jobs) for group in "ab"} == {"a": 3, "b": 3}
            queue, name = (one, "x") if jobs[0].consumer == "x" else (other, "y")
            queue.complete(jobs.pop(0))
            jobs += (other if queue is one else one).dequeue_many("y" if name == "x" else "x", 9)
        with suppress(pqueue.LeaseLost):
            for job in jobs:
                one.complete(job)


def test_operator_reads_which_limit_a_job_waits_for(tmp_path):
    with closing(pqueue.open_queue(tmp_path / "q.db")) as queue:
        queue.limit("default", running=2)
        now = time.time()
        ids = queue.enqueue_many("t", range(3), group="customer-7")
        queue.dequeue_many("w", 9)
        assert why(queue, ids[2]) == "group customer-7 has 2 of 2 jobs running"
        queue.limit("api", rate=(2, 60))
        ids = queue.enqueue_many("t", range(3), queue="api")
        queue.dequeue_many("w", 9, queues=["api"], now=now)
        sentence = why(queue, ids[2], now)
        assert sentence.startswith("queue api has begun 2 jobs within 1 min: its rate allows the next one in 1 min")
        assert queue.stats()["queues"]["api"]["rate"] == (2, 60.0)
        assert queue.stats()["queues"]["default"]["max_running"] == 2


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["limit", "default", "--running", "2"], "limited to 2 running jobs of each group"),
        (["limit", "default", "9", "--rate", "10/1m"], "limited to 9 pending jobs, 10 jobs of each group in 1 min"),
        (["limit", "default", "--running", "none", "--rate", "none"], "has no limit on running jobs or the rate"),
        (["weigh", "default", "a", "2.5"], "gives group a the weight 2.5"),
        (["enqueue", "t", "--group", "a"], "2"),
        (["change", "1", "--group", "b"], "changed"),
        (["change", "1", "--no-group"], "changed"),
        (["change", "1", "--group", "a", "--no-group"], "expected --group or --no-group, got both"),
        (["limit", "default"], "expected a number of pending jobs or none, --running or --rate"),
        (["limit", "default", "--rate", "10"], "expected JOBS/DURATION, such as 10/1s, or none, got '10'"),
        (["weigh", "default", "a", "much"], "expected a number such as 2 or 0.5, got 'much'"),
    ],
)
def test_operator_limits_and_weighs_groups(tmp_path, monkeypatch, capsys, arguments, printed):
    monkeypatch.setenv("PQUEUE_URL", str(tmp_path / "q.db"))
    with closing(pqueue.open_queue()) as queue:
        queue.enqueue("t")
    code = admin.main(arguments)
    output = capsys.readouterr()
    assert printed in output.out + output.err
    assert code == (2 if "expected" in printed else 0)
