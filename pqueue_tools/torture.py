"""Kill producers and consumers at random, then verify that no job was lost or done twice.

Each job inserts a row, its effect, in the transaction that completes it. Some consumers let their lease expire before
they complete a job, and must be refused. At the end, every acknowledged job must be completed, with one effect.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from pqueue import Job, LeaseLost, PersistentQInterface, QueueBusy, is_postgres, open_queue
from pqueue_tools.process import blocked_signals

PRODUCERS = 2
CONSUMERS = 4
LEASE_SECONDS = 0.5
KILL_SECONDS = 0.1  # between kills
START_SECONDS = 60.0  # how long to wait for the first job
LATE_EVERY = 20  # one delivery in this many lets its lease expire
MAX_ATTEMPTS = 10_000  # so that no job fails because its consumers were killed


def execute(db: Any, sql: str) -> Any:
    """Execute a statement on the connection that `transaction` yields, of either backend."""
    return (getattr(db, "exec_driver_sql", None) or db.execute)(sql)


def schema(queue: PersistentQInterface) -> str:
    """Return the schema of the queue's tables."""
    return f'"{getattr(queue, "schema", "main")}"'


def _insert_effect(queue: PersistentQInterface, db: Any, job: Job) -> None:
    stale = f"CASE WHEN lease_token = '{job.lease_token}' THEN 0 ELSE 1 END"
    jobs, effects = f"{schema(queue)}.jobs", f"{schema(queue)}.effects"
    execute(db, f"INSERT INTO {effects} SELECT id, {stale} FROM {jobs} WHERE id = {job.id}")


def produce(folder: Path, url: str, durability: Any, name: str) -> None:
    """Enqueue jobs forever, and record each job when `enqueue` has returned."""
    queue = open_queue(url, durability=durability)
    _started_file(folder, name).touch()
    with (folder / f"{name}.acknowledged").open("a") as acknowledged:
        while True:
            with suppress(QueueBusy):
                job_id = queue.enqueue("effect", max_attempts=MAX_ATTEMPTS)
                acknowledged.write(f"{job_id}\n")
                acknowledged.flush()
                time.sleep(0.002)


def consume(folder: Path, url: str, durability: Any, name: str, drain: bool = False) -> None:
    """Complete jobs, each with its effect in the same transaction; with `drain`, until none is left."""
    queue = open_queue(url, durability=durability)
    _started_file(folder, name).touch()
    while True:
        with suppress(QueueBusy):
            job = queue.dequeue(name, lease_seconds=LEASE_SECONDS)
            if job is None:
                if drain and not any(queue.stats()["states"][state] for state in ("pending", "processing")):
                    return queue.close()
                queue.wait(0.1, consumer=name)
                continue
            if job.attempts > 1:
                time.sleep(LEASE_SECONDS * 0.9)  # so that the late completion comes before this one
            elif not drain and random.randrange(LATE_EVERY) == 0:
                time.sleep(LEASE_SECONDS * 1.7)
            try:
                with queue.transaction() as db:
                    _insert_effect(queue, db, job)
                    queue.complete(job)
            except LeaseLost:
                with (folder / f"{name}.refused").open("a") as refused:
                    refused.write(f"{job.id}\n")


def _started_file(folder: Path, name: str) -> Path:
    """Return the file that a process creates when it has started; it is not killed before, even on a slow machine."""
    return folder / f"{name}.started"


def _in_schema_of_its_own(url: str) -> str:
    place, _, query = url.partition("?")
    kept = [each for each in query.split("&") if each and not each.startswith("schema=")]
    return f"{place}?{'&'.join([*kept, f'schema=torture_{secrets.token_hex(4)}'])}"


class Torture:
    """One run, on a temporary database in `parent`, on the same disk as the real one; or, if `server` is given, in a
    temporary schema of this database of PostgreSQL."""

    def __init__(self, parent: Path | None, durability: Any, server: str | None = None) -> None:
        self.durability = durability
        os.umask(0o077)  # another one might leave the test no rights
        self.folder = Path(tempfile.mkdtemp(prefix="torture-", dir=parent))
        self.url = str(self.folder / "queue.db") if server is None else _in_schema_of_its_own(server)
        self.kills = self.stops = 0
        # A new interpreter would prefer modules of the current folder to those of the standard library.
        self._context = multiprocessing.get_context("fork")
        self._children: dict[str, BaseProcess] = {}
        self._stopped: dict[str, float] = {}

    def _create(self) -> None:
        with closing(open_queue(self.url, durability=self.durability)) as queue, queue.transaction() as db:
            execute(db, f"CREATE TABLE {schema(queue)}.effects (job_id BIGINT NOT NULL, stale INTEGER NOT NULL)")

    def _delete(self) -> None:
        shutil.rmtree(self.folder)
        if is_postgres(self.url):
            with closing(open_queue(self.url)) as queue, queue.transaction() as db:
                execute(db, f"DROP SCHEMA {schema(queue)} CASCADE")

    def run(self, seconds: float) -> dict[str, Any]:
        """Return the results; "problems" has a sentence for each violated guarantee."""
        try:
            self._create()
            for name in self._names():
                self._start(name)
            self._wait_for_job()
            began = time.monotonic()
            while time.monotonic() - began < seconds:
                self._disturb(random.choice(self._names()))
                self._show_progress(time.monotonic() - began, seconds)
                time.sleep(KILL_SECONDS)
            self._end()
            self._start("drainer", True)
            self._children["drainer"].join()
            return {"seconds": round(time.monotonic() - began, 1), "durability": self.durability, **self._verify()}
        finally:
            self._end()
            self._delete()

    def _wait_for_job(self) -> None:
        """Wait until the processes have started: on a busy machine this takes longer than a short run."""
        until = time.monotonic() + START_SECONDS
        while not self._recorded("acknowledged") and time.monotonic() < until:
            time.sleep(KILL_SECONDS)

    def _names(self) -> list[str]:
        return [f"producer{n}" for n in range(PRODUCERS)] + [f"consumer{n}" for n in range(CONSUMERS)]

    def _start(self, name: str, *more: Any) -> None:
        """Start a process that ignores Ctrl-C on the terminal; it is killed at the end."""
        work = produce if name.startswith("producer") else consume
        _started_file(self.folder, name).unlink(missing_ok=True)
        arguments = self.folder, self.url, self.durability, name, *more
        self._children[name] = self._context.Process(target=work, args=arguments)
        with blocked_signals():
            self._children[name].start()

    def _disturb(self, name: str) -> None:
        """Kill a process and restart it, or, one time in four, stop it until its lease has expired."""
        for other, at in list(self._stopped.items()):
            if time.monotonic() > at + 2 * LEASE_SECONDS:
                del self._stopped[other]
                self._signal(other, signal.SIGCONT)
        if name in self._stopped or not _started_file(self.folder, name).exists():
            return
        if random.randrange(4) == 0:
            self._signal(name, signal.SIGSTOP)
            self._stopped[name] = time.monotonic()
            self.stops += 1
        else:
            self._kill(name)
            self._start(name)
            self.kills += 1

    def _signal(self, name: str, number: int) -> None:
        os.kill(cast(int, self._children[name].pid), number)

    def _kill(self, name: str) -> None:
        self._children[name].kill()
        self._children[name].join()

    def _end(self) -> None:
        for name in self._children:
            self._kill(name)
        self._children.clear()

    def _show_progress(self, passed: float, seconds: float) -> None:
        if sys.stderr.isatty():
            bar = "█" * round(min(1.0, passed / seconds) * 30)
            print(f"\r{bar:░<30} {passed:3.0f} s  {self.kills} killed, {self.stops} stopped ", end="", file=sys.stderr)

    def _recorded(self, kind: str) -> list[int]:
        lines = [line for path in self.folder.glob(f"*.{kind}") for line in path.read_text().split("\n")[:-1]]
        return [int(line) for line in lines if line]

    def _verify(self) -> dict[str, Any]:
        if sys.stderr.isatty():
            print(file=sys.stderr)
        acknowledged, refused = set(self._recorded("acknowledged")), self._recorded("refused")
        with closing(open_queue(self.url, create=False)) as queue:
            with queue.transaction() as db:
                jobs = execute(db, f"SELECT id, state, attempts FROM {schema(queue)}.jobs").fetchall()
                done = execute(db, f"SELECT job_id, stale FROM {schema(queue)}.effects").fetchall()
            damage = [] if is_postgres(self.url) else queue.check()["problems"]
        stored = {job_id for job_id, _, _ in jobs}
        effects = Counter(job_id for job_id, _ in done)
        completed = sum(1 for _, state, _ in jobs if state == "completed")
        checks = {
            "acknowledged jobs are lost": len(acknowledged - stored),
            "jobs are not completed": len(stored) - completed,
            "jobs have more than one effect": sum(1 for number in effects.values() if number > 1),
            "jobs have no effect": len(stored - effects.keys()),
            "effects were committed under a stale token": sum(stale for _, stale in done),
            "effects have no job": len(effects.keys() - stored),
        }
        problems = [f"{number} {what}" for what, number in checks.items() if number]
        problems += [f"the database is damaged: {each}" for each in damage]
        problems += [] if acknowledged and self.kills else ["nothing was tested: allow more seconds"]
        return {
            "acknowledged": len(acknowledged),
            "completed": completed,
            "deliveries": sum(attempts for _, _, attempts in jobs),
            "killed": self.kills,
            "stopped": self.stops,
            "late_completions_refused": len(refused),
            "problems": problems,
        }
