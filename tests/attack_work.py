"""The work under attack: tasks, writers and helpers that record outside the queue what they did.

    python3 consumer.py --import attack_work          # the tasks
    python attack_work.py write                      # enqueue, and record each job when it is acknowledged
    python attack_work.py files N                    # enqueue jobs with files that fail and run again
    python attack_work.py hold lock|transaction      # stop while holding the writers' lock
    python attack_work.py probe SECONDS              # enqueue while that process runs, and print how often
    python attack_work.py freeze SECONDS             # keep writers out until a line comes on stdin

Records are lines of JSON in $ATTACK_FOLDER/ledger, one file per process; `attack_audit` reads them.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pqueue
import pqueue_files
from pqueue import DoNotRetry, Job, QueueBusy, QueueError, QueueFull, current_queue, task

MANY = 200  # attempts of the jobs that must complete, however often their consumers are killed
FILES = Path("var/files")
SINCE = time.time()  # when this process began: an operator's act after it replaced the files that it has open
EFFECT = """
INSERT INTO effects SELECT :uid, id, attempts, lease_token IS NOT :token FROM jobs WHERE id = :id"""


@cache
def _ledger(pid: int) -> int:
    folder = Path(os.environ["ATTACK_FOLDER"]) / "ledger"
    return os.open(folder / f"{pid}-{time.time_ns()}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def record(kind: str, *, sync: bool = False, **facts: Any) -> None:
    """Append one line, in one write: a kill tears at most the last line of a file, and a later process has its own."""
    file = _ledger(os.getpid())
    os.write(file, (json.dumps({"kind": kind, **facts}) + "\n").encode())
    if sync:
        os.fsync(file)


def is_on(name: str) -> bool:
    return name not in os.environ.get("ATTACK_WITHOUT", "").split(",")


# Tasks ################################################################################################################


@contextmanager
def recorded(job: Job) -> Iterator[None]:
    run = {"uid": job.payload["uid"], "attempt": job.attempts, "consumer": job.consumer, "token": job.lease_token}
    record("began", **run, at=time.time(), since=SINCE)
    yield
    record("ended", **run, at=time.time())


@task(max_attempts=MANY, backoff=0.05)
def quick(job: Job) -> None:
    with recorded(job):
        time.sleep(job.payload["seconds"])


@task(max_attempts=1)
def once(job: Job) -> None:
    """A mail or a payment: it must never run a second time."""
    with recorded(job):
        time.sleep(job.payload["seconds"])


@task(max_attempts=MANY, backoff=0.05)
def effect(job: Job) -> None:
    """Write a row in the transaction that completes the job: it must be there exactly once."""
    queue, asked = current_queue(), time.time()
    values = {"uid": job.payload["uid"], "token": job.lease_token, "id": job.id}
    with queue.transaction() as db:
        with recorded(job):
            db.execute(EFFECT, values)
            if job.payload["copies"] and is_on("copies-inside"):
                drop_locks()
        queue.complete(job)
    record("effect", uid=job.payload["uid"], asked=asked, acked=time.time())


@task(max_attempts=MANY, backoff=0.05)
def copies(job: Job) -> None:
    with recorded(job):
        drop_locks()


@task(max_attempts=MANY)
def flaky(job: Job) -> None:
    """Fail some times, each a moment after the other, then complete: until then the job's file must be there."""
    with recorded(job):
        if not (FILES / job.payload["file"]).exists():
            record("missing", name=job.payload["file"], at=time.time())
            raise DoNotRetry(f"no file {job.payload['file']}")
        if job.attempts < job.payload["tries"]:
            current_queue().fail(job, "not yet", retry_in_seconds=random.uniform(0, 0.04))
            raise RuntimeError("not yet")


@task(max_attempts=MANY, backoff=0.05)
def deadly(job: Job) -> None:
    """Kill the consumer, with whatever else it has taken."""
    with recorded(job):
        if job.attempts < 2:
            os.kill(os.getpid(), signal.SIGKILL)


@task(max_attempts=MANY, backoff=0.05)
def sleepy(job: Job) -> None:
    """Stop the consumer, with whatever else it has taken, for longer than a lease."""
    with recorded(job):
        if job.attempts < 2:
            waker = ["sh", "-c", f"sleep 7; kill -CONT {os.getpid()}"]
            with subprocess.Popen(waker, start_new_session=True, env={"PATH": os.environ["PATH"]}):
                os.kill(os.getpid(), signal.SIGSTOP)


def drop_locks() -> None:
    """Read the database's files as any program may: the close releases SQLite's POSIX locks of this process."""
    path = pqueue.sqlite_path()
    target = Path(os.environ["ATTACK_FOLDER"]) / "scratch" / f"copy-{os.getpid()}"
    reads: list[Callable[[], Any]] = [
        lambda: shutil.copy(path, target),
        lambda: path.open("rb").close(),
        *(lambda suffix=suffix: Path(f"{path}{suffix}").read_bytes() for suffix in ("", "-wal", "-shm")),  # type: ignore[misc]
    ]
    with suppress(FileNotFoundError):
        random.choice(reads)()


# Writers ##############################################################################################################

Payload = dict[str, Any]
MIX = {"quick": 300, "once": 300, "effect": 200, "copies": 50, "slow": 30, "flaky": 50, "deadly": 15, "sleepy": 5}


class Writer:
    """Enqueues in all the ways there are, and records what was acknowledged, and when it was asked for."""

    def __init__(self, queue: pqueue.PersistentQInterface) -> None:
        self.queue = queue
        self.mix = {kind: weight for kind, weight in MIX.items() if is_on(kind)}

    def run(self) -> None:
        """Write until the Supervisor that started this process is gone, even if it went before this began."""
        while b"supervisord" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            with suppress(QueueBusy, QueueFull):
                if random.random() < 0.1 and is_on("copies"):
                    drop_locks()
                self.write_some(random.choices([*self.mix], [*self.mix.values()])[0])
            time.sleep(random.expovariate(12))

    def write_some(self, kind: str) -> None:
        if kind == "flaky":
            self.write_with_file(random.randint(5, 40))
        elif kind in ("deadly", "sleepy"):
            self.write_among_others(kind)
        elif kind in ("quick", "once") and random.random() < 0.3:
            self.write_many(kind, random.randint(2, 40))
        elif random.random() < 0.2:
            self.write_together(kind)
        else:
            self.write(kind, self.queue_name())

    def write(self, kind: str, queue: str, **more: Any) -> None:
        payload, asked = {**payload_of(kind), **more}, time.time()
        self.queue.enqueue("quick" if kind == "slow" else kind, payload, queue=queue)
        acknowledge(asked, payload)

    def write_many(self, kind: str, number: int) -> None:
        payloads, asked = [payload_of(kind) for _ in range(number)], time.time()
        self.queue.enqueue_many(kind, payloads, queue=self.queue_name())
        acknowledge(asked, *payloads)

    def write_together(self, kind: str) -> None:
        """Enqueue two jobs in one transaction."""
        payloads, asked = [payload_of(kind), payload_of("quick")], time.time()
        with self.queue.transaction():
            for name, payload in zip(("quick" if kind == "slow" else kind, "quick"), payloads, strict=True):
                self.queue.enqueue(name, payload)
        acknowledge(asked, *payloads)

    def write_among_others(self, kind: str) -> None:
        """Enqueue a job that harms its consumer, before and behind some that the same consumer may take with it."""
        asked = time.time()
        before, behind = ([payload_of("once", seconds=0) for _ in range(random.randint(1, 20))] for _ in range(2))
        harmful = payload_of(kind)
        with self.queue.transaction():
            self.queue.enqueue_many("once", before)
            self.queue.enqueue(kind, harmful)
            self.queue.enqueue_many("once", behind)
        acknowledge(asked, *before, harmful, *behind)

    def write_with_file(self, tries: int) -> None:
        """Do as producer.py does: a file with a locked .NAME.new next to it is about to be enqueued."""
        name = f"job_{secrets.token_hex(8)}.txt"
        new, unlocked = FILES / f".{name}.new", FILES / f".{name}.unlocked"
        with unlocked.open("x") as file:
            pqueue_files.try_lock(file.fileno())
            unlocked.rename(new)
            (FILES / name).write_text("a line\n")
            try:
                self.write("flaky", "default", file=name, tries=tries)
            except (QueueBusy, QueueFull):
                (FILES / name).unlink()
                raise
            finally:
                new.unlink()

    def queue_name(self) -> str:
        """Return a queue that all know, the one that has a limit at times, or now and then a new one."""
        return random.choices(["default", "limited", f"tenant-{secrets.token_hex(3)}"], [8, 2, 0.5])[0]


def payload_of(kind: str, seconds: float | None = None) -> Payload:
    if seconds is None:
        seconds = random.uniform(1, 6) if kind == "slow" else random.choice([0, 0, 0, 0, 0.01, 0.3])
    return {"uid": f"{kind}-{secrets.token_hex(6)}", "seconds": seconds, "copies": random.random() < 0.2}


def acknowledge(asked: float, *payloads: Payload) -> None:
    acked = time.time()
    for payload in payloads:
        record("stored", uid=payload["uid"], asked=asked, acked=acked, sync=payload is payloads[-1])


def write() -> None:
    with closing(pqueue.open_queue()) as queue:
        Writer(queue).run()


def files(number: int) -> None:
    """Enqueue jobs with files that fail and run again for a while."""
    with closing(pqueue.open_queue()) as queue:
        for _ in range(number):
            with suppress(QueueBusy, QueueFull):
                Writer(queue).write_with_file(25)


def probe(seconds: float) -> None:
    """Print how many jobs were acknowledged after the first two seconds, in which a writer may find out."""
    with closing(pqueue.open_queue()) as queue:
        writer, began, done = Writer(queue), time.monotonic(), 0
        while (passed := time.monotonic() - began) < seconds:
            with suppress(QueueBusy, QueueFull):
                writer.write("quick", "default")
                done += passed > 2
            time.sleep(0.01)
    print(done)


# Helpers that get in the way ########################################################################################


def hold(what: str) -> None:
    """Stop inside a transaction, or when it is over but its block, which has the writers' lock, is not."""
    with closing(pqueue.open_queue()) as queue, suppress(QueueError), queue.transaction() as db:
        if what == "lock":
            db.execute("COMMIT")
        print("held", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)


def freeze(behind_seconds: float) -> None:
    """Keep writers out, with a database file that is whole without its log, until a line comes; then die, closing
    nothing. Print from when on acknowledged jobs may be in the log alone: since `behind_seconds` ago, or none.
    """
    checkpointer, reader, writer = (_connect() for _ in range(3))
    kept_until = _checkpoint(checkpointer)
    if behind_seconds:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM queues").fetchone()  # from here on no checkpoint gets further
        time.sleep(behind_seconds)
    writer.execute("BEGIN IMMEDIATE")
    if behind_seconds:
        _checkpoint(checkpointer, whole=False)  # only so that no other is under way
    else:
        kept_until = _checkpoint(checkpointer)
    print(kept_until, flush=True)
    sys.stdin.readline()
    os._exit(0)


def _connect() -> sqlite3.Connection:
    return sqlite3.connect(pqueue.sqlite_path(), isolation_level=None, timeout=5)


def _checkpoint(db: sqlite3.Connection, *, whole: bool = True) -> float:
    """Copy the log to the file, the whole of it, and return when that began."""
    for _ in range(300):
        began = time.time()
        busy, pages, copied = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if not busy and (copied == pages or not whole):
            return began
        time.sleep(0.01)
    raise TimeoutError("cannot copy the log: another program reads or copies it all the time")


def main() -> int:
    verb, *arguments = sys.argv[1:]
    programs: dict[str, Callable[[], None]] = {
        "write": write,
        "hold": lambda: hold(*arguments),
        "files": lambda: files(int(arguments[0])),
        "probe": lambda: probe(float(arguments[0])),
        "freeze": lambda: freeze(float(arguments[0])),
    }
    try:
        programs[verb]()
    except (QueueError, TimeoutError, sqlite3.Error) as error:
        print(f"attack_work.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main())
