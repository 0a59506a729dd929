"""The other contestants on SQLite: bare SQLite as the limit, and other queues, used as documented.

A peer that has a worker program is measured with it; for others a process runs the loop of their examples. Workers wait
until all are ready, then record each job in shared memory, which the measuring process reads afterwards.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import mmap
import os
import random
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.postgres import SCALE, milliseconds
from pqueue import PersistentQInterface

with contextlib.suppress(ImportError):  # Windows, where bench.py only says what it needs
    import fcntl

SECONDS = 2.0 * SCALE  # duration of each measurement of a rate
SIMPLE = ("put", "put many", "process")  # columns that need no worker
TOGETHER = ("share", "put under load", "pickup")  # columns that need several processes
ALONGSIDE = {"put alongside 1 loop": 1, "put alongside 4 loops": 4}
DURABILITIES = ("full", "normal")
WORKERS = 4
LEAST_PUTS, LONGEST_SECONDS = 20, 10.0 * SCALE  # under load: this many, unless they take longer
PICKUPS = max(10, int(100 * SCALE))
ALONGSIDE_PUTS = 2 * PICKUPS
RUN_TIMEOUT_SECONDS = 60.0  # until a worker has run all jobs
NOTHING = "0"  # the payload of a job that is not timed; else the time of its put
NOTE = struct.Struct("dd")  # when a job ran, and seconds since its put; NaN if the worker had an error
MOST_NOTES = 1 << 21


class Peer:
    """A contestant. Its constructor takes a folder and a durability, and opens an existing queue there.

    `survives` says what happens to a job whose consumer is killed. `backlog` is the number of jobs for its workers: as
    many as four of them run in the time, or 4,000, because litequeue and localqueue slow down as jobs accumulate.
    """

    module: str
    survives: str
    columns: tuple[str, ...] = (*SIMPLE, *TOGETHER, *ALONGSIDE)
    durabilities: tuple[str, ...] = DURABILITIES
    backlog = 4_000

    def __init__(self, folder: Path, durability: str) -> None:
        self.folder, self.durability = folder, durability
        self.open()

    def open(self) -> None:
        raise NotImplementedError

    def put(self, payload: str = NOTHING) -> None:
        raise NotImplementedError

    def put_and_wake(self, payload: str = NOTHING) -> None:
        """Put a job and wake a waiting worker; most workers poll."""
        self.put(payload)

    def put_many(self, number: int) -> None:
        for _ in range(number):
            self.put()

    def process(self) -> Iterator[None]:
        """Take and finish one job per step, until there is none."""
        raise NotImplementedError

    def work(self) -> None:
        """Run as a worker: take jobs, `note` each, finish it, and wait for more, forever."""
        raise NotImplementedError

    def loop(self) -> None:
        """Run a plain loop: take and finish one job after another."""
        for _ in self.process():
            note(NOTHING)

    @property
    def measures(self) -> dict[str, Callable[[Any], dict[str, float]]]:
        return {
            "program": lambda peer: drain(peer, 1),
            "share": lambda peer: drain(peer, WORKERS),
            "put under load": measure_put_under_load,
            **{name: partial(fill_and_put_alongside, number=number) for name, number in ALONGSIDE.items()},
            "pickup": measure_pickup,
        }


class Limit(Peer):
    """Bare sqlite3 doing the least a durable queue must: one commit per put, one per job taken and finished.

    Its workers finish what they hold and take up to as many more as consumer.py in one commit, which is synced only if
    it finishes some. A put under load leaves the waiting to SQLite: a busy timeout of 5 s, the default. At pickup the
    producer writes a byte into a pipe, where the worker waits.
    """

    module, survives = "sqlite3", "-"
    columns = (*SIMPLE, "put under load", *ALONGSIDE, "pickup")
    backlog = 1_200_000

    def open(self) -> None:
        self.db = sqlite3.connect(self.folder / "limit.db", isolation_level=None)
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute(f"PRAGMA synchronous = {self.durability}")
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS jobs (id INTEGER PRIMARY KEY, state TEXT NOT NULL, payload TEXT NOT NULL)"
        )
        self.db.execute("CREATE INDEX IF NOT EXISTS pending ON jobs (id) WHERE state = 'pending'")
        with contextlib.suppress(FileExistsError):
            os.mkfifo(self.folder / "wakeup")
        self.pipe = os.open(self.folder / "wakeup", os.O_RDWR)

    def put(self, payload: str = NOTHING) -> None:
        self.db.execute("INSERT INTO jobs (state, payload) VALUES ('pending', ?)", (payload,))

    def put_and_wake(self, payload: str = NOTHING) -> None:
        self.put(payload)
        os.write(self.pipe, b"!")

    def put_many(self, number: int) -> None:
        self.db.execute("BEGIN")
        self.db.executemany("INSERT INTO jobs (state, payload) VALUES ('pending', ?)", [(NOTHING,)] * number)
        self.db.execute("COMMIT")

    def process(self) -> Iterator[None]:
        take = """UPDATE jobs SET state = 'completed' WHERE state = 'pending'
                  AND id = (SELECT id FROM jobs WHERE state = 'pending' ORDER BY id LIMIT 1) RETURNING id"""
        while self.db.execute(take).fetchall():
            yield

    def work(self) -> None:
        most = PersistentQInterface.max_batch
        take = f"""UPDATE jobs SET state = 'processing'
                   WHERE id IN (SELECT id FROM jobs WHERE state = 'pending' ORDER BY id LIMIT {most})
                   RETURNING id, payload"""
        held: list[tuple[int, str]] = []
        while True:
            self.db.execute(f"PRAGMA synchronous = {self.durability if held else 'normal'}")
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany("UPDATE jobs SET state = 'completed' WHERE id = ?", [(number,) for number, _ in held])
            held = self.db.execute(take).fetchall()
            self.db.execute("COMMIT")
            for _, payload in held:
                note(payload)
            if not held:
                os.read(self.pipe, mmap.PAGESIZE)


class Huey(Peer):
    """SqliteHuey, and its Consumer with one worker thread and the defaults of `huey_consumer`; results are not stored.

    Full is `fsync=True`. Normal, which its documentation expects of SQLite by default, is set by hand: some builds of
    SQLite default to full, and `fsync=False` would be OFF. There is no put of many at once.
    """

    module, survives = "huey", "lost: it is deleted before it runs"
    columns = (*SIMPLE, "program", *TOGETHER, *ALONGSIDE)
    backlog = 60_000

    def open(self) -> None:
        import huey  # noqa: PLC0415

        full = True if self.durability == "full" else None
        self.huey = huey.SqliteHuey(filename=str(self.folder / "huey.db"), fsync=full, results=False)
        if not full:
            self.huey.storage.conn.execute("PRAGMA synchronous = NORMAL")
        self.task = self.huey.task()(note)

    def put(self, payload: str = NOTHING) -> None:
        self.task(payload)

    def process(self) -> Iterator[None]:
        while (task := self.huey.dequeue()) is not None:
            self.huey.execute(task)
            yield

    def work(self) -> None:
        self.huey.create_consumer().run()


class Litequeue(Peer):
    """It has no worker; its example of a consumer sleeps for 0.1 s when there is nothing, and so does this one.

    Normal is what it sets; full is set by hand, as it has no option. Many are put in a `transaction()`.
    """

    module, survives = "litequeue", "locked, until it is retried"

    def open(self) -> None:
        import litequeue  # noqa: PLC0415

        self.queue = litequeue.LiteQueue(str(self.folder / "litequeue.db"))
        self.queue.conn.execute(f"PRAGMA synchronous = {self.durability}")

    def put(self, payload: str = NOTHING) -> None:
        self.queue.put(payload)

    def put_many(self, number: int) -> None:
        with self.queue.transaction():
            super().put_many(number)

    def process(self) -> Iterator[None]:
        while (message := self.queue.pop()) is not None:
            self.queue.done(message.message_id)
            yield

    def work(self) -> None:
        while True:
            message = self.queue.pop()
            if message is None:
                time.sleep(0.1)
                continue
            note(message.data)
            self.queue.done(message.message_id)


class PersistQueue(Peer):
    """SQLiteAckQueue, for the threads of one process: its maintainer says that several processes are not supported.

    So it has no figures where there are any. It leaves `synchronous` to SQLite, whose default is full, and has no
    option for it. There is no put of many at once: its ack queue always commits.
    """

    module, survives = "persistqueue", "back when the queue is opened again"
    columns, durabilities = SIMPLE, ("full",)

    def open(self) -> None:
        import persistqueue  # noqa: PLC0415

        self.empty = persistqueue.Empty
        self.queue: Any = persistqueue.SQLiteAckQueue(str(self.folder / "pq"))

    def put(self, payload: str = NOTHING) -> None:
        self.queue.put(payload)

    def process(self) -> Iterator[None]:
        with contextlib.suppress(self.empty):
            while True:
                self.queue.ack(self.queue.get(block=False))
                yield


class LocalQueue(Peer):
    """Its Worker, with its defaults. Normal is RELAXED, its default, and full is DURABLE. Its core is Rust."""

    module, survives = "localqueue", "back when its lease (60 s) is over"
    columns = (*SIMPLE, "program", *TOGETHER, *ALONGSIDE)

    def open(self) -> None:
        import localqueue  # noqa: PLC0415

        mode = localqueue.DurabilityMode.RELAXED if self.durability == "normal" else localqueue.DurabilityMode.DURABLE
        self.empty = localqueue.Empty
        self.queue = localqueue.SimpleQueue(str(self.folder), durability=mode)

    def put(self, payload: str = NOTHING) -> None:
        self.queue.put(payload)

    def put_many(self, number: int) -> None:
        self.queue.put_many([NOTHING] * number)

    def process(self) -> Iterator[None]:
        with contextlib.suppress(self.empty):
            while True:
                self.queue.ack(self.queue.get_nowait())
                yield

    def work(self) -> None:
        import localqueue  # noqa: PLC0415

        localqueue.Worker(self.queue, lambda job: note(job.data)).run()


PEERS: dict[str, type[Peer]] = {
    "huey": Huey,
    "litequeue": Litequeue,
    "persist-queue": PersistQueue,
    "localqueue": LocalQueue,
}

# What is measured with workers ########################################################################################


def drain(peer: Peer, number: int) -> dict[str, float]:
    """Let workers drain a full queue for a while; return jobs per second from the first job to the last."""
    fill(peer)
    with workers(peer, number) as notes:
        time.sleep(2 * SECONDS)
    ran = [[when for when, delay in noted if not math.isnan(delay)] for noted in notes()]
    moments = sorted(itertools.chain(*ran))
    figures = {"jobs/s": (len(moments) - 1) / (moments[-1] - moments[0])}
    if number > 1:
        figures["fewest/most"] = min(map(len, ran)) / max(map(len, ran))
        figures["errors"] = float(sum(map(len, notes())) - len(moments))
    return figures


class Put(NamedTuple):
    began: float  # Unix seconds
    seconds: float
    failed: bool


def measure_put_under_load(peer: Peer) -> dict[str, float]:
    """Measure puts as long as the workers have a backlog."""
    backlog = fill(peer)
    with workers(peer, WORKERS) as notes:
        puts = put_for_a_while(peer.put_and_wake)
    ran = sorted(when for when, delay in itertools.chain(*notes()) if not math.isnan(delay))
    return sum_up_until(drained(ran, backlog), puts)


def fill_and_put_alongside(peer: Peer, number: int) -> dict[str, float]:
    return measure_put_alongside(peer, number, fill(peer))


def measure_put_alongside(contestant: Any, number: int, backlog: int) -> dict[str, float]:
    """Put a job now and then while plain loops drain a backlog; also return how evenly they share it."""
    with workers(contestant, number, "loop") as notes:
        puts = [timed(contestant.put) for _ in now_and_then(ALONGSIDE_PUTS)]
    loops = [[when for when, delay in noted if not math.isnan(delay)] for noted in notes()]
    end = drained(sorted(itertools.chain(*loops)), backlog)
    shares = [sum(puts[0].began < when < min(puts[-1].began, end) for when in loop) for loop in loops]
    figures = sum_up_until(end, puts)
    figures["jobs/s"] = sum(shares) / (min(puts[-1].began, end) - puts[0].began)
    if number > 1:
        figures["fewest/most"] = min(shares) / max(shares)
    figures["errors"] += sum(map(len, notes())) - sum(map(len, loops))
    return figures


def drained(ran: list[float], backlog: int) -> float:
    """Return when the backlog was done, from when each job ran."""
    return ran[backlog - 1] if len(ran) >= backlog else math.inf


def sum_up_until(end: float, puts: list[Put]) -> dict[str, float]:
    return sum_up([put for put in puts if put.began < end] or puts[:1])


def put_for_a_while(put: Callable[[], Any]) -> list[Put]:
    """Put a job every 3 ms."""
    puts: list[Put] = []
    start = time.monotonic()
    while (now := time.monotonic() - start) < 2 * SECONDS or (len(puts) < LEAST_PUTS and now < LONGEST_SECONDS):
        puts.append(timed(put))
        time.sleep(0.003)
    return puts


def timed(put: Callable[[], Any]) -> Put:
    began, failed = time.time(), False
    before = time.perf_counter()
    try:
        put()
    except Exception:  # each peer has its own exceptions
        failed = True
    return Put(began, time.perf_counter() - before, failed)


def sum_up(puts: list[Put]) -> dict[str, float]:
    """Return how long a put took, and how many failed, which count with the time they took."""
    delays = [put.seconds for put in puts] * 2  # twice, because quantiles need two values
    return {**milliseconds(delays), "errors": float(sum(put.failed for put in puts))}


def measure_pickup(peer: Peer) -> dict[str, float]:
    """Put a job now and then for one idle worker; return how long after the put began it ran."""
    with workers(peer, 1) as notes:
        for now in now_and_then():
            peer.put_and_wake(repr(now))
        until = time.monotonic() + RUN_TIMEOUT_SECONDS
        while len(delays := [delay for _, delay in itertools.chain(*notes()) if not math.isnan(delay)]) < PICKUPS:
            if time.monotonic() > until:
                raise TimeoutError(f"expected {PICKUPS} jobs to run, got {len(delays)}")
            time.sleep(0.05)
    return milliseconds(delays)


def now_and_then(times: int = PICKUPS) -> Iterator[float]:
    """Yield the time every 50 ms on average, at random so as not to synchronize with polling workers."""
    for _ in range(times):
        time.sleep(random.uniform(0.025, 0.075))
        yield time.time()


def fill(peer: Peer) -> int:
    """Put the backlog, unsynced, before the measurement starts; return its number of jobs."""
    jobs = int(peer.backlog * SCALE)
    type(peer)(peer.folder, "normal").put_many(jobs)
    return jobs


# Their workers ########################################################################################################


@contextlib.contextmanager
def workers(peer: Any, number: int, step: str = "work") -> Iterator[Callable[[], list[list[tuple[float, float]]]]]:
    """Run workers that begin together, yield a function that returns their notes, and kill them at the end."""
    kind, place = type(peer), (str(peer.folder), peer.durability)
    module = kind.__module__
    imports = f"from pqueue_tools import termination; termination.reset_sigint(); import bench.peers, {module}"
    code = f"{imports}; bench.peers.work({module}.{kind.__name__}, *{place!r}, {step!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with (peer.folder / "gate").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        start = partial(subprocess.Popen, [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE)
        children = [start() for _ in range(number)]
        try:
            while len(list(peer.folder.glob("*.notes"))) < number:
                if any(child.poll() is not None for child in children):
                    raise ChildProcessError(f"a worker of {kind.__name__} did not start")
                time.sleep(0.01)
            fcntl.flock(gate, fcntl.LOCK_UN)
            yield lambda: [read_notes(path) for path in peer.folder.glob("*.notes")]
        finally:
            for child in children:
                child.kill()
                child.communicate()


class Notes(logging.Handler):
    """Records each job and logged error of a worker in shared memory, without a system call."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        with path.with_suffix(".new").open("w+b") as file:
            file.truncate(MOST_NOTES * NOTE.size)
            self.memory, self.end = mmap.mmap(file.fileno(), 0), 0
        path.with_suffix(".new").rename(path)

    def add(self, delay: float) -> None:
        NOTE.pack_into(self.memory, self.end, time.time(), delay)
        self.end += NOTE.size

    def emit(self, _: logging.LogRecord) -> None:
        self.add(math.nan)


def read_notes(path: Path) -> list[tuple[float, float]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        return list(itertools.takewhile(lambda noted: noted[0], NOTE.iter_unpack(memory)))


noting: list[Notes] = []  # the notes of this worker; empty elsewhere


def note(sent: str) -> None:
    """Run as the job: record the time since it was sent."""
    for notes in noting:
        notes.add(time.time() - float(sent))


def work(kind: Any, folder: str, durability: str, step: str) -> None:
    """Run a worker, restart it after an error as a supervisor would, and exit with the parent process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    peer = kind(Path(folder), durability)
    noting.append(Notes(Path(folder) / f"{os.getpid()}.notes"))
    logging.getLogger().addHandler(noting[0])
    with (peer.folder / "gate").open() as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)
    while True:
        try:
            getattr(peer, step)()
        except Exception:  # each peer has its own exceptions
            noting[0].add(math.nan)


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)
