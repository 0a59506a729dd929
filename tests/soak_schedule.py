"""Kill three consumers under Supervisor again and again; see that a schedule that fires every second misses no second.

    PYTHONPATH=. python tests/soak_schedule.py --seconds 600

The task writes the time of its tick into a table in the transaction that completes its job. In the end each second must
be there once, and have one job. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pqueue

ROOT = Path(__file__).resolve().parent.parent
CONSUMERS, KILL_EVERY_SECONDS, WAIT_SECONDS = 3, (0.5, 4.0), 180
TASKS = """
import random
import time

from pqueue import Job, current_queue, task

@task(every_seconds=1, on_missed="all", max_attempts=1000)
def tick(job: Job) -> None:
    time.sleep(random.uniform(0, 0.8))
    with current_queue().transaction() as db:
        db.execute("INSERT INTO ticks VALUES (?)", (job.run_at,))
        current_queue().complete(job)
"""
CONFIGURATION = """
[supervisord]
logfile = supervisord.log
pidfile = supervisord.pid

[program:consumer]
command = {python} {root}/consumer.py --import ticks
process_name = consumer_%(process_num)02d
numprocs = {consumers}
autorestart = true
startsecs = 0
startretries = 1000000
killasgroup = true
redirect_stderr = true
stdout_logfile = %(process_num)02d.log
"""


def run(folder: Path, seconds: float) -> tuple[list[str], dict[str, float]]:
    """Return a sentence for each promise that was broken, and what happened."""
    (folder / "ticks.py").write_text(TASKS)
    settings = {"python": sys.executable, "root": ROOT, "consumers": CONSUMERS}
    (folder / "supervisord.conf").write_text(CONFIGURATION.format(**settings))
    url = str(folder / "queue.db")
    with closing(pqueue.open_queue(url)) as queue:
        with queue.transaction() as db:
            db.execute("CREATE TABLE ticks (at REAL)")
        command = [shutil.which("supervisord", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"), "-n"]
        here = {**os.environ, "PQUEUE_URL": url, "PYTHONPATH": str(ROOT)}
        log = (folder / "out").open("w")
        supervisor = subprocess.Popen(
            [*map(str, command), "-c", "supervisord.conf"], cwd=folder, env=here, stdout=log, stderr=log
        )
        try:
            wait_while(lambda: not queue.count_jobs())
            kills = kill_for(queue, seconds)
            wait_while(lambda: queue.schedules()[0].next_at <= time.time())
            queue.pause_schedule("tick")
            last = queue.schedules()[0].next_at - 1
            wait_while(lambda: queue.count_jobs(state="completed") < queue.count_jobs())
        finally:
            supervisor.terminate()
            supervisor.wait()
            log.close()
        first = queue._read("SELECT min(run_at) FROM jobs")[0][0]
        expected = [first + number for number in range(round(last - first) + 1)]
        found = {"were completed": [row[0] for row in queue._read("SELECT at FROM ticks")]}
        found["have a job"] = [row[0] for row in queue._read("SELECT run_at FROM jobs")]
        redelivered = queue._read("SELECT count(*) FROM jobs WHERE attempts > 1")[0][0]
    return list(broken(expected, found)), {"ticks": len(expected), "kills": kills, "delivered again": redelivered}


def wait_while(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while condition() and time.monotonic() < until:
        time.sleep(0.1)


def kill_for(queue: pqueue.PersistentQInterface, seconds: float) -> int:
    """Kill consumers at random for so many seconds; return how many."""
    kills, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(random.uniform(*KILL_EVERY_SECONDS))
        if running := [each["pid"] for each in queue.consumers() if each["state"] == "running"]:
            with suppress(ProcessLookupError):
                os.kill(random.choice(running), signal.SIGKILL)
                kills += 1
    return kills


def broken(expected: list[float], found: dict[str, list[float]]) -> Iterator[str]:
    for what, times in found.items():
        counts = Counter(round(at - expected[0], 3) for at in times)
        missing = [at for at in range(len(expected)) if counts.get(float(at), 0) == 0]
        double = [at for at, number in counts.items() if number > 1]
        strange = [at for at in counts if at != round(at) or not 0 <= at < len(expected)]
        for kind, ats in (("none", missing), ("several", double), ("one at an unknown time", strange)):
            if ats:
                yield f"{len(ats)} of {len(expected)} ticks {what} not once, but {kind}: {ats[:5]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long to kill consumers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        problems, figures = run(Path(folder), options.seconds)
    print(", ".join(f"{number} {what}" for what, number in figures.items()))
    print("\n".join(problems) or "each second has one job, which was completed once")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
