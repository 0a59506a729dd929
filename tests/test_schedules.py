"""Schedules whose consumers are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from contextlib import closing

import pytest
import soak_schedule
from conftest import wait_until
from test_postgres import database, server

import pqueue

__all__ = ["database", "server"]  # fixtures

CONSUMERS, TICKS, EVERY_SECONDS, KILL_EVERY_SECONDS = 8, 1000, 0.02, 0.05


def consume(url):
    """Dequeue and complete until killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with closing(pqueue.open_queue(url, durability="normal")) as queue:
        name = f"consumer {os.getpid()}"
        while True:
            if job := queue.dequeue(name):
                queue.complete(job)
            else:
                queue.wait(1, consumer=name)


def declare(url):
    """Save the same schedule over and over, as starting consumers do."""
    with closing(pqueue.open_queue(url, durability="normal")) as queue:
        while True:
            queue.schedule("tick", "tick", every_seconds=EVERY_SECONDS, on_missed="all")


@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_each_time_of_a_schedule_gets_one_job_although_processes_are_killed(place, backend, request):
    url = str(place.folder / "queue.db") if backend == "sqlite" else request.getfixturevalue("database")
    fork = multiprocessing.get_context("fork")
    with closing(pqueue.open_queue(url)) as queue:
        queue.schedule("tick", "tick", every_seconds=EVERY_SECONDS, on_missed="all")
        programs = [consume] * CONSUMERS + [declare]
        running = []
        try:
            for program in programs:
                running.append(fork.Process(target=program, args=(url,)))
                running[-1].start()
            kills = 0
            while (jobs := queue.count_jobs()) < TICKS:
                time.sleep(KILL_EVERY_SECONDS)
                wait_until(lambda n=jobs: queue.count_jobs() > n)  # starting them may take a slow machine all its time
                victim = random.randrange(len(running))
                running[victim].kill()
                running[victim].join()
                kills += 1
                running[victim] = fork.Process(target=programs[victim], args=(url,))
                running[victim].start()
            running[-1].kill()
            running[-1].join()
            queue.unschedule("tick")
            wait_until(lambda: queue.count_jobs(state="completed") == queue.count_jobs())
        finally:
            for each in running:
                each.kill()
                each.join()
        jobs = queue.list_jobs(limit=10 * TICKS)
    times = sorted(job.run_at for job in jobs)
    gaps = {round((after - before) / EVERY_SECONDS, 3) for before, after in zip(times, times[1:], strict=False)}
    print(f"\n{len(times)} jobs, {kills} kills")
    assert gaps == {1.0}


def test_schedule_misses_no_second_although_consumers_under_supervisor_are_killed(tmp_path):
    problems, figures = soak_schedule.run(tmp_path, 8)
    assert problems == []
    assert figures["ticks"] >= 8 and figures["kills"] > 0
