"""The other contestants on PostgreSQL, for --url: bare psycopg as the limit, and other queues.

Each job appends to a file when it ran and how long ago it was put. Each peer is used as documented: with asynchronous
jobs if it is asynchronous, 16 at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

SERVER = "BENCH_SERVER"  # names the PostgreSQL server to the measuring processes
NOTES = "BENCH_NOTES"  # the file that jobs write to
SCALE = float(os.environ.get("BENCH_SCALE", "1"))
AT_A_TIME = 16
BATCH = 100


class PostgresLimit:
    """Bare psycopg doing the least: one commit per put, one per job taken and finished."""

    module, survives = "psycopg", "-"

    def __init__(self, folder: Path, durability: str) -> None:
        import psycopg  # noqa: PLC0415

        self.db = psycopg.connect(os.environ[SERVER], autocommit=True, prepare_threshold=0)
        self.db.execute(f"SET synchronous_commit = {'on' if durability == 'full' else 'off'}")
        self.db.execute("CREATE TABLE jobs (id BIGSERIAL PRIMARY KEY, state TEXT NOT NULL, payload TEXT NOT NULL)")
        self.db.execute("CREATE INDEX pending ON jobs (id) WHERE state = 'pending'")

    def put(self) -> None:
        self.db.execute("INSERT INTO jobs (state, payload) VALUES ('pending', 'null')")

    def put_many(self, number: int) -> None:
        with self.db.transaction(), self.db.cursor() as cursor:
            cursor.executemany("INSERT INTO jobs (state, payload) VALUES ('pending', %s)", [("null",)] * number)

    def process(self) -> Iterator[None]:
        take = """UPDATE jobs SET state = 'completed' WHERE id =
                  (SELECT id FROM jobs WHERE state = 'pending' ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED)"""
        while self.db.execute(take).rowcount:
            yield


# The peers ############################################################################################################


def note(sent: float) -> None:
    """Run as a job: record when it ran, and how long after it was put."""
    now = time.time()
    os.write(_notes(), struct.pack("dd", now, now - sent))


def _notes() -> int:
    if not hasattr(_notes, "file"):
        _notes.file = os.open(os.environ[NOTES], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)  # type: ignore[attr-defined]
    return _notes.file  # type: ignore[attr-defined,no-any-return]


class Peer:
    """A queue with its own worker program."""

    columns: tuple[str, ...] = ("put", "put many", "program", "share", "pickup")

    def __init__(self, folder: Path, durability: str) -> None:
        import psycopg  # noqa: PLC0415

        self.notes = folder / "notes"
        os.environ[NOTES] = str(self.notes)
        with psycopg.connect(os.environ[SERVER], autocommit=True) as server:
            name, mode = server.info.dbname, "on" if durability == "full" else "off"
            server.execute(f"ALTER DATABASE {name} SET synchronous_commit = {mode}")
        self.open()

    def open(self) -> None: ...

    def put(self) -> None:
        self.put_many(1)

    def put_many(self, number: int) -> None: ...

    @property
    def measures(self) -> dict[str, Callable[[Any], dict[str, float]]]:
        return {"program": measure_program, "share": measure_share, "pickup": measure_pickup}


class Procrastinate(Peer):
    module, package = "procrastinate", "procrastinate"

    def open(self) -> None:
        import procrastinate  # noqa: PLC0415

        self.app = self._app(procrastinate.SyncPsycopgConnector(conninfo=os.environ[SERVER]))
        self.app.open()
        self.app.schema_manager.apply_schema()

    def _app(self, connector: Any) -> Any:
        import procrastinate  # noqa: PLC0415

        app = procrastinate.App(connector=connector)

        @app.task(name="note")
        async def job(sent: float) -> None:
            note(sent)

        self.job = job
        return app

    def put(self) -> None:
        self.job.defer(sent=time.time())

    def put_many(self, number: int) -> None:
        self.job.batch_defer(*({"sent": time.time()} for _ in range(number)))

    @classmethod
    def work(cls) -> None:
        import procrastinate  # noqa: PLC0415

        peer = cls.__new__(cls)
        app = peer._app(procrastinate.PsycopgConnector(conninfo=os.environ[SERVER]))
        app.run_worker(concurrency=AT_A_TIME)


class PgQueuer(Peer):
    module, package = "pgqueuer", "pgqueuer asyncpg"
    options: ClassVar[dict[str, int]] = {}

    def open(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.queries = self.loop.run_until_complete(self._queries())
        self.loop.run_until_complete(self.queries.install())

    @staticmethod
    async def _queries() -> Any:
        import asyncpg  # noqa: PLC0415
        import pgqueuer  # noqa: PLC0415

        return pgqueuer.Queries(pgqueuer.AsyncpgDriver(await asyncpg.connect(os.environ[SERVER])))

    def put_many(self, number: int) -> None:
        payloads = [repr(time.time()).encode()] * number
        self.loop.run_until_complete(self.queries.enqueue(["note"] * number, payloads, [0] * number))

    @classmethod
    def work(cls) -> None:
        async def run() -> None:
            import pgqueuer  # noqa: PLC0415

            manager = pgqueuer.QueueManager(await cls._queries())

            @manager.entrypoint("note")
            async def job(job: Any) -> None:
                note(float(job.payload))

            await manager.run(**cls.options)

        asyncio.run(run())


class PgQueuerBatches(PgQueuer):
    """The same with batches of 100 instead of its default, 10."""

    columns = ("program", "share")
    options: ClassVar = {"batch_size": 100}


class Chancy(Peer):
    module, package = "chancy", "chancy"

    def open(self) -> None:
        import chancy  # noqa: PLC0415

        async def migrate() -> None:
            async with chancy.Chancy(os.environ[SERVER]) as app:
                await app.migrate()
                threads = chancy.Chancy.Executor.Threaded
                await app.declare(chancy.Queue("default", executor=threads, concurrency=AT_A_TIME, eager_polling=True))

        asyncio.run(migrate())
        self.app = chancy.Chancy(os.environ[SERVER])
        self.app.__enter__()
        self.job = chancy.Job.from_func(note)

    def put(self) -> None:
        self.app.sync_push(self.job.with_kwargs(sent=time.time()))

    def put_many(self, number: int) -> None:
        list(self.app.sync_push_many([self.job.with_kwargs(sent=time.time())] * number))

    @classmethod
    def work(cls) -> None:
        import chancy  # noqa: PLC0415

        async def run() -> None:
            async with chancy.Chancy(os.environ[SERVER]) as app, chancy.Worker(app) as worker:
                await worker.wait_for_shutdown()

        asyncio.run(run())


PEERS: dict[str, type[Peer]] = {
    "procrastinate": Procrastinate,
    "pgqueuer": PgQueuer,
    "pgqueuer 100": PgQueuerBatches,
    "chancy": Chancy,
}

# Their workers ########################################################################################################


def measure_program(peer: Peer) -> dict[str, float]:
    return drain(peer, 1, int(20_000 * SCALE))


def measure_share(peer: Peer) -> dict[str, float]:
    return drain(peer, 4, int(40_000 * SCALE))


def drain(peer: Peer, workers: int, jobs: int) -> dict[str, float]:
    for _ in range(0, jobs, BATCH):
        peer.put_many(BATCH)
    for _ in at_work(peer, workers):
        ran = wait_for(peer, jobs)[::2]
    return {"jobs/s": jobs / (max(ran) - min(ran))}


def measure_pickup(peer: Peer) -> dict[str, float]:
    peer.put()
    for _ in at_work(peer, 1):
        wait_for(peer, 1)
        jobs = max(20, int(100 * SCALE))
        for _ in range(jobs):
            time.sleep(0.05)
            peer.put()
        delays = wait_for(peer, 1 + jobs)[3::2]
    return milliseconds(list(delays))


def at_work(peer: Peer, number: int) -> Iterator[None]:
    code = f"import bench.postgres; bench.postgres.work({type(peer).__name__!r})"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    children = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(number)]
    try:
        yield
    finally:
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.wait()


def work(name: str) -> None:
    """Run the worker of this peer, without its log."""
    logging.disable()
    globals()[name].work()


def wait_for(peer: Peer, jobs: int, seconds: float = 300) -> array[float]:
    """Wait until this many jobs have run; return their notes: time, delay, time, delay, …"""
    until = time.monotonic() + seconds
    while not peer.notes.exists() or peer.notes.stat().st_size < 16 * jobs:
        if time.monotonic() > until:
            raise TimeoutError(f"expected {jobs} jobs to run in {seconds:g} s")
        time.sleep(0.05)
    return array("d", peer.notes.read_bytes())


def milliseconds(delays: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(delays, n=100, method="inclusive")
    return {"p50 ms": 1000 * cuts[49], "p99 ms": 1000 * cuts[98], "max ms": 1000 * max(delays)}
