"""Measure this queue on this disk, compared with bare SQLite and with other queues.

    python -m bench [--quick] [--only COLUMN …] [--rounds N] [--json FILE] [--plot FILE.png]
    python -m bench --why      # the effect of each optimization: the same figures without it
    python -m bench --redis    # Celery, RQ and Dramatiq

Each figure is measured in a new process and folder, alternating between contestants. The result is the median.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pqueue
import pqueue_files
import pqueue_locks
import pqueue_sqlite
from bench import peers, postgres, redis
from bench.peers import (
    ALONGSIDE,
    DURABILITIES,
    NOTHING,
    PICKUPS,
    SECONDS,
    SIMPLE,
    WORKERS,
    measure_put_alongside,
    note,
    now_and_then,
    put_for_a_while,
    sum_up,
)
from bench.postgres import SCALE, SERVER, PostgresLimit, milliseconds
from pqueue_tools.process import OneLineParser, expect_posix, whole_number

ROOT = Path(__file__).resolve().parent.parent
QUICK = "one round of a tenth of the work, without the columns that take long, and other queues' workers only at full"
QUICK_SCALE = 0.1  # of the work, passed to the measuring processes
PUT_MANY = 100
LEFT_OUT = "BENCH_WITHOUT"  # tells the measuring processes and their consumers which optimization to disable
# Columns with many queues: how many, and how many workers
QUEUES = {
    f"{some_queues}, {some_workers}": (queues, workers)
    for workers, some_workers in ((1, "1 worker"), (WORKERS, f"{WORKERS} workers"))
    for queues, some_queues in ((1, "1 queue"), (30, "30 queues"), (200, "200 queues"))
}
ON_SERVER = ("prune over 0.5 ms", "connections")  # columns that need --url
SCHEDULES = FULL_GROUPS = 1000  # in the column "depth"
SLOW = ("depth", "idle", *QUEUES, *ON_SERVER)  # left out by --quick
COLUMNS = [*SIMPLE, "program", "share", "put under load", *ALONGSIDE, "pickup", "prune", *SLOW]


@pqueue.task()
def noop(_: pqueue.Job) -> None:
    """Do nothing."""


@pqueue.task()
def nap(_: pqueue.Job) -> None:
    """Run for two seconds."""
    time.sleep(2)


@pqueue.task()
def note_delay(job: pqueue.Job) -> float:
    """Return the seconds since the job was put."""
    return time.time() - float(job.payload)


# The optimizations, and the figures that each affects #################################################################

IDEAS = {
    "one commit per job": [("process", "jobs/s")],
    "unsynced claims": [("pickup", "p50 ms")],
    "adaptive batches": [("program", "jobs/s")],
    "writer lock": [("share", "jobs/s"), ("share", "fewest/most"), ("put under load", "p99 ms")],
    "wake-up": [("pickup", "p50 ms")],
    "small pages": [("put", "jobs/s"), ("process", "jobs/s"), ("program", "jobs/s")],
}


def do_without(idea: str) -> None:
    """Disable an optimization in this process, for `--why`."""
    core: Any = pqueue
    locks: Any = pqueue_locks
    if idea == "one commit per job":
        core.PersistentQInterface.complete_and_dequeue = complete_then_dequeue
    elif idea == "unsynced claims":
        write = core.PersistentQSQLite._transaction
        core.PersistentQSQLite._transaction = lambda self, *, in_batch=False, **_: write(self, in_batch=in_batch)
    elif idea == "adaptive batches":
        core.PersistentQInterface.max_batch = 1
    elif idea == "writer lock":
        locks.WriterLock.acquire = lambda *_, **__: False
    elif idea == "wake-up":
        locks.ConsumerLocks.wake = lambda _: None
        core.WAIT_SECONDS = 0.1  # polling
    elif idea == "small pages":
        pqueue_sqlite.PAGE_BYTES = 4096  # SQLite's default


complete_and_dequeue = pqueue.PersistentQInterface.complete_and_dequeue


def complete_then_dequeue(queue: Any, finished: Any, name: str, limit: int = 1, **options: Any) -> Any:
    for job, result in finished:
        queue.complete(job, result)
    return complete_and_dequeue(queue, (), name, limit, **options)


if LEFT_OUT in os.environ:
    do_without(os.environ[LEFT_OUT])

# This queue; the other contestants are in peers.py and postgres.py #######################################


class Ours:
    """This queue, and `consumer.py` with its defaults."""

    module, survives = "pqueue", "back in about a second"

    def __init__(self, folder: Path, durability: Any) -> None:
        self.folder, self.durability = folder, durability
        self.url = os.environ.get(SERVER) or str(folder / "queue.db")
        self.queue = pqueue.open_queue(self.url, durability=durability)

    def put(self) -> None:
        self.queue.enqueue("noop")

    def put_many(self, number: int) -> None:
        self.queue.enqueue_many("noop", [None] * number)

    def process(self) -> Iterator[None]:
        jobs = self.queue.dequeue_many("bench", 1)
        while jobs:
            yield
            jobs, _ = self.queue.complete_and_dequeue([(job, None) for job in jobs], "bench")

    def loop(self) -> None:
        """Run a plain loop: two calls per job."""
        while job := self.queue.dequeue(f"loop-{os.getpid()}"):
            note(NOTHING)
            self.queue.complete(job)


CONTESTANTS: dict[str, Any] = {"limit": peers.Limit, "pqueue": Ours, **peers.PEERS}
ON_POSTGRES: dict[str, Any] = {"limit": PostgresLimit, "pqueue": Ours, **postgres.PEERS}

# The columns: each returns named figures ##############################################################################


def rate(step: Callable[[], Any], jobs: int = 1) -> float:
    """Return jobs per second of calling step for `SECONDS`."""
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        step()
        steps += 1
    return jobs * steps / (time.perf_counter() - began)


def measure_put(contestant: Any) -> dict[str, float]:
    return {"jobs/s": rate(contestant.put)}


def measure_put_many(contestant: Any) -> dict[str, float]:
    return {"jobs/s": rate(lambda: contestant.put_many(PUT_MANY), PUT_MANY)}


def measure_process(contestant: Any, jobs: int = int(4000 * SCALE)) -> dict[str, float]:
    contestant.put_many(jobs)
    began = time.perf_counter()
    done = sum(1 for _ in contestant.process())
    assert done == jobs, f"expected {jobs} jobs, got {done}"
    return {"jobs/s": done / (time.perf_counter() - began)}


def measure_program(ours: Ours, jobs: int = int(40_000 * SCALE)) -> dict[str, float]:
    fill(ours.queue, jobs)
    with consumers(ours, 1, "--drain") as (child,):
        child.wait()
    return {"jobs/s": jobs / took(ours.queue.list_jobs(limit=jobs))}


def measure_share(ours: Ours, jobs: int = int(100_000 * SCALE)) -> dict[str, float]:
    fill(ours.queue, jobs)
    done = run_all(ours, WORKERS, ["default"])
    shares = Counter(job.consumer for job in done).values()
    fewest = min(shares) if len(shares) == WORKERS else 0
    return {"jobs/s": jobs / took(done), "fewest/most": fewest / max(shares)}


def measure_queues(ours: Ours, queues: int, workers: int, jobs: int = int(60_000 * SCALE)) -> dict[str, float]:
    """Run jobs whose turns alternate between the queues."""
    names = [f"q{number}" for number in range(queues)]
    for name in names:
        ours.queue.enqueue("noop", queue=name)
        fill(ours.queue, max(1, jobs // queues), queue=f"'{name}'", run_at="i")
    done = run_all(ours, workers, names)
    return {"jobs/s": len(done) / took(done)}


def run_all(ours: Ours, workers: int, queues: list[str]) -> list[pqueue.Job]:
    """Let consumers that have started run all jobs, and return these."""
    jobs, (last,) = ours.queue.count_jobs(), ours.queue.list_jobs(limit=1)
    for name in queues:
        ours.queue.pause(name)
    with consumers(ours, workers):
        with ours.queue.transaction():
            for name in queues:
                ours.queue.resume(name)
        wait_until(lambda: bool(ours.queue.outcomes()) and ours.queue.get(last.id).state == "completed")
        wait_until(lambda: ours.queue.stats()["states"]["completed"] == jobs)
    return ours.queue.list_jobs(limit=jobs)


def measure_put_under_load(ours: Ours) -> dict[str, float]:
    fill(ours.queue, int(300_000 * SCALE))
    with consumers(ours, WORKERS):
        return sum_up(put_for_a_while(ours.put))


def measure_pickup(ours: Ours) -> dict[str, float]:
    with consumers(ours, 1):
        for now in now_and_then():
            ours.queue.enqueue("note_delay", now)
        wait_until(lambda: ours.queue.stats()["states"]["completed"] == PICKUPS)
    return milliseconds([job.result for job in ours.queue.list_jobs(limit=PICKUPS)])


def measure_alongside(ours: Ours, number: int) -> dict[str, float]:
    jobs = int(200_000 * SCALE)
    fill(ours.queue, jobs)
    return measure_put_alongside(ours, number, jobs)


def measure_prune(ours: Ours, jobs: int = int(60_000 * SCALE), queues: int = 30) -> dict[str, float]:
    """Prune completed jobs, a third of which have an event in their history."""
    for number in range(queues):
        ours.queue.enqueue("noop", queue=f"q{number}")
        fill(ours.queue, max(3, jobs // queues), queue=f"'q{number}'", state="completed", finished_at="1.0 + i")
    with transaction(ours.queue) as execute:
        columns = "history (job_id, at, event, actor, attempt)"
        execute(f"INSERT INTO {columns} SELECT id, 1.0, 'failed', 'c', 1 FROM jobs WHERE mod(id, 3) = 0")
    began = time.perf_counter()
    return {"jobs/s": ours.queue.prune(0, states=["completed"]) / (time.perf_counter() - began)}


def measure_prune_far(ours: Ours) -> dict[str, float]:
    """Prune through a proxy that delays each piece by 0.25 ms, in both directions."""
    import psycopg  # noqa: PLC0415

    url = urlsplit(ours.url)
    with psycopg.connect(ours.url) as near:
        server = [near.info.host, str(near.info.port)]
    command = [sys.executable, "-m", "bench.delaying_proxy", *server, "0.00025"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as proxy:
        assert proxy.stdin is not None
        assert proxy.stdout is not None
        user = f"{url.username}@" if url.username else ""
        place = f"{user}127.0.0.1:{int(proxy.stdout.readline())}"
        ours.queue.close()
        ours.queue = pqueue.open_queue(urlunsplit(url._replace(netloc=place, query="")), durability=ours.durability)
        figures = measure_prune(ours)
        ours.queue.close()
        proxy.stdin.close()
    return figures


def measure_connections(ours: Ours) -> dict[str, float]:
    """Count the connections of each program."""
    import psycopg  # noqa: PLC0415

    figures: dict[str, float] = {}
    environment = {**os.environ, "PQUEUE_URL": ours.url, "PQUEUE_DURABILITY": ours.durability}
    with psycopg.connect(ours.url, autocommit=True) as db:
        mine = "application_name = 'pqueue' AND datname = current_database()"
        own = {pid for (pid,) in db.execute(f"SELECT pid FROM pg_stat_activity WHERE {mine}")}

        def now() -> int:
            return len({pid for (pid,) in db.execute(f"SELECT pid FROM pg_stat_activity WHERE {mine}")} - own)

        def most(seconds: float) -> int:
            wait_until(lambda: now() > 0)
            until, found = time.monotonic() + seconds, [0]
            while time.monotonic() < until:
                found.append(now())
                time.sleep(0.02)
            return max(found)

        with consumers(ours, 1, "--lease-seconds", "1"):
            time.sleep(1)
            figures["idle consumer"] = most(1)
            ours.queue.enqueue("nap")
            figures["consumer at work"] = most(2)
        for name, arguments in {"producer": ["producer.py"], "dashboard": ["ops.py", "--port", "0"]}.items():
            command = [sys.executable, str(ROOT / arguments[0]), *arguments[1:]]
            child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=ours.folder)
            figures[name] = most(1)
            child.terminate()
            child.wait()
    return figures


def measure_idle(ours: Ours, seconds: float = 10.0) -> dict[str, float]:
    with consumers(ours, 1) as (child,):
        time.sleep(1)
        before = cpu_seconds(child.pid)
        time.sleep(seconds)
        status = Path(f"/proc/{child.pid}/status").read_text()
        memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
        return {"% of a core": 100 * (cpu_seconds(child.pid) - before) / seconds, "RSS MB": memory}


def measure_depth(ours: Ours, rows: int = 1_000_000) -> dict[str, float]:
    empty = measure_process(ours)["jobs/s"]
    fill(ours.queue, rows, state="completed", finished_at=1.0)
    fill(ours.queue, rows)
    fill(ours.queue, rows * 4 // 5, state="scheduled", run_at=4e9)
    fill(ours.queue, rows // 5, state="scheduled", run_at=4e9, priority=9)
    fill(ours.queue, rows // 10, assigned_to="'absent'")
    fill(ours.queue, rows // 10, state="scheduled", run_at=4e9, expires_at=5e9)
    fill_groups(ours.queue, rows)
    with ours.queue.transaction():
        for number in range(SCHEDULES):
            ours.queue.schedule(f"schedule {number}", noop, every_seconds=1e8)
    steps = ours.process()
    for _ in range(1000):  # until what was inserted directly is counted
        next(steps)
    deep = rate(lambda: next(steps))
    return {"jobs/s": deep, "deep/empty": deep / empty}


def fill_groups(queue: Any, rows: int) -> None:
    """Add jobs of groups that have as many running as they may."""
    queue.limit("full", running=1)
    queue.enqueue("noop", queue="full", group="0")
    fill(queue, rows, queue="'full'", **{'"group"': f"CAST(mod(i, {FULL_GROUPS}) AS text)"})
    while queue.dequeue_many("busy", FULL_GROUPS, queues=["full"], lease_seconds=1e6):
        pass


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "put": measure_put,
    "put many": measure_put_many,
    "process": measure_process,
    "program": measure_program,
    "share": measure_share,
    "put under load": measure_put_under_load,
    **{name: partial(measure_alongside, number=number) for name, number in ALONGSIDE.items()},
    "pickup": measure_pickup,
    "prune": measure_prune,
    "prune over 0.5 ms": measure_prune_far,
    "connections": measure_connections,
    "idle": measure_idle,
    "depth": measure_depth,
    **{name: partial(measure_queues, queues=queues, workers=workers) for name, (queues, workers) in QUEUES.items()},
}


def took(jobs: list[pqueue.Job]) -> float:
    """Return the seconds from the first start to the last end."""
    return max(job.finished_at or 0 for job in jobs) - min(job.started_at or 0 for job in jobs)


@contextlib.contextmanager
def transaction(queue: Any) -> Iterator[Callable[[str], Any]]:
    """Yield a function that executes SQL on the queue's tables."""
    with queue.transaction() as db:
        if SERVER in os.environ:
            db.exec_driver_sql("SET LOCAL search_path = pqueue")
        yield db.exec_driver_sql if SERVER in os.environ else db.execute


def fill(queue: Any, rows: int, /, **columns: object) -> None:
    """Insert rows directly with SQL, before the measurement starts."""
    values = {"queue": "'default'", "task": "'noop'", "payload": "'null'", "state": "'pending'", "priority": 0}
    values |= {"run_at": 1.0, "max_attempts": 3, "created_at": 1.0}
    values |= {name: f"'{value}'" if name == "state" else value for name, value in columns.items()}
    with transaction(queue) as execute:
        execute("INSERT INTO queues (name) VALUES ('default') ON CONFLICT DO NOTHING")
        execute("INSERT INTO queue_tasks (queue, task) VALUES ('default', 'noop') ON CONFLICT DO NOTHING")
        execute(
            f"""WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows})
                INSERT INTO jobs ({", ".join(values)}) SELECT {", ".join(map(str, values.values()))} FROM n"""
        )


@contextlib.contextmanager
def consumers(ours: Ours, number: int, *options: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run consumer.py with its default settings, and wait until each has registered."""
    environment = {**os.environ, "PQUEUE_URL": ours.url, "PQUEUE_DURABILITY": ours.durability}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "consumer.py"), "--import", "bench.run", *options]
    children = [
        subprocess.Popen([*command, "--name", f"c{i}"], env=environment, stdout=subprocess.DEVNULL, cwd=ours.folder)
        for i in range(number)
    ]
    try:
        wait_until(lambda: len(ours.queue.consumers()) >= number)
        yield children
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)
            child.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the consumers did not finish within {seconds:g} s")
        time.sleep(0.1)  # rarely: counting delays the server's cleanup


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The run ##############################################################################################################

Key = tuple[str, str, str]  # column, contestant, durability
Figures = dict[str, list[float]]


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.measure:
        column, contestant, durability, folder = options.measure
        measured = contestants()[contestant](Path(folder), durability)
        measure = getattr(measured, "measures", MEASURES).get(column, MEASURES[column])
        print(json.dumps(measure(measured)))
        return 0
    try:
        expect_posix()
    except pqueue.QueueError as error:
        sys.exit(f"bench: {error}")
    check_needs(options)
    if options.url:
        os.environ[SERVER] = options.url
    machine = describe_machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if options.redis:
        print(table_on_redis(redis.run(options.rounds, progress)))
        return 0
    if options.why:
        print(why(options.rounds))
        return 0
    columns = options.only or (
        [c for c in COLUMNS if not (options.quick and c in SLOW) and (options.url or c not in ON_SERVER)]
    )
    if options.quick:
        os.environ.setdefault("BENCH_SCALE", str(QUICK_SCALE))
    results = run(columns, 1 if options.quick else options.rounds, options.quick)
    print(table(results))
    if options.json:
        rows = [{"column": c, "contestant": n, "durability": d, "figures": f} for (c, n, d), f in results.items()]
        found = {"machine": machine, "results": rows, "killed": fates()}
        Path(options.json).write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(results, machine, options.plot)
    return 0


def check_needs(options: argparse.Namespace) -> None:
    """Refuse before anything is measured what would fail afterwards."""
    if (options.why or options.redis) and (options.only or options.url or options.json or options.plot):
        parser().error("expected no option but --rounds with --why and --redis, got another option")
    if not options.url and set(options.only or ()) & set(ON_SERVER):
        parser().error(f"expected --url with {', '.join(ON_SERVER)}, got none")
    if options.plot and not importlib.util.find_spec("matplotlib"):
        sys.exit("bench: --plot needs matplotlib: pip install matplotlib")
    if options.url and not (importlib.util.find_spec("psycopg") and importlib.util.find_spec("sqlalchemy")):
        sys.exit("bench: --url needs SQLAlchemy and psycopg: pip install SQLAlchemy 'psycopg[binary]'")
    for file in filter(None, (options.json, options.plot)):
        folder = Path(file).absolute().parent
        if Path(file).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            sys.exit(f"bench: cannot write {file!r}: expected a file in a folder that can be written to")


def parser() -> argparse.ArgumentParser:
    made = OneLineParser(prog="bench", description=__doc__)
    made.add_argument("--quick", action="store_true", help=QUICK)
    columns = "; ".join(COLUMNS)
    made.add_argument("--only", nargs="+", action="extend", choices=COLUMNS, metavar="COLUMN", help=f"of {columns}")
    made.add_argument("--rounds", type=whole_number(1), default=3, help="(default: %(default)s)")
    made.add_argument("--url", help="a PostgreSQL server to measure on instead, with a database of its own per figure")
    made.add_argument("--json", metavar="FILE", help="write all figures")
    made.add_argument("--plot", metavar="FILE.png", help="draw the bars; needs matplotlib")
    made.add_argument("--why", action="store_true", help="leave out one idea after the other")
    made.add_argument("--redis", action="store_true", help="measure Celery, RQ and Dramatiq instead")
    made.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    return made


def contestants() -> dict[str, Any]:
    return ON_POSTGRES if SERVER in os.environ else CONTESTANTS


def run(columns: list[str], rounds: int, quick: bool) -> dict[Key, Figures]:
    """Take every figure `rounds` times, the contestants of a column in random turn."""
    present = [name for name in contestants() if is_installed(name)]
    turns = [
        (column, name, durability)
        for column in columns
        for name in present
        for durability in getattr(contestants()[name], "durabilities", DURABILITIES)
        if takes_part(column, name, durability, quick)
    ]
    results: dict[Key, Figures] = {turn: {} for turn in turns}
    for number in range(rounds):
        for done, turn in enumerate(sorted(turns, key=lambda turn: (COLUMNS.index(turn[0]), random.random()))):
            progress(f"round {number + 1} of {rounds}, {done} of {len(turns)}: {' '.join(turn)}")
            for name, value in measure(turn).items():
                results[turn].setdefault(name, []).append(value)
    progress("")
    return results


def takes_part(column: str, name: str, durability: str, quick: bool) -> bool:
    if name == "pqueue":
        return True
    if column not in getattr(contestants()[name], "columns", SIMPLE):
        return False
    return not quick or column in SIMPLE or name == "limit" or durability == "full"


def why(rounds: int) -> str:
    """Return a table of medians, with each idea and without it, the sides in turn."""
    form = "{:20} {:16} {:12} {:8} {:>10} {:>10}".format
    lines = [form("idea", "column", "figure", "", "without", "with")]
    for durability in DURABILITIES:
        for idea, shown in IDEAS.items():
            values: dict[tuple[str, str, bool], list[float]] = {}
            for _ in range(rounds):
                for column in dict.fromkeys(column for column, _ in shown):
                    for left_out in (True, False):
                        progress(f"{durability}: {column} {'without' if left_out else 'with'} {idea}")
                        found = measure((column, "pqueue", durability), **({LEFT_OUT: idea} if left_out else {}))
                        for figure, value in found.items():
                            values.setdefault((column, figure, left_out), []).append(value)
            for column, figure in shown:
                sides = [number(statistics.median(values[column, figure, left_out])) for left_out in (True, False)]
                lines.append(form(idea, column, figure, durability, *sides))
    progress("")
    return "\n".join(lines)


def table_on_redis(results: dict[str, dict[str, list[float]]]) -> str:
    form = "{:14} {:16} {:>10} {:>10} {:>10}".format
    lines = [form("contestant", "figure", "median", "min", "max")]
    for name, figures in results.items():
        for figure, values in figures.items():
            lines.append(form(name, figure, *map(number, (statistics.median(values), min(values), max(values)))))
    return "\n".join(lines)


def is_installed(name: str) -> bool:
    if importlib.util.find_spec(contestants()[name].module):
        return True
    print(f"{name} is left out: pip install {getattr(contestants()[name], 'package', name)}")
    return False


def measure(turn: Key, **settings: str) -> dict[str, float]:
    folder = tempfile.mkdtemp(prefix="bench-", dir=pqueue_folder())
    try:
        command = [sys.executable, "-m", "bench", "--measure", *turn, folder]
        with database() as environment:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment | settings)
        if done.returncode:
            sys.exit(f"bench: {' '.join(turn)} failed:\n{done.stderr}")
        return dict(json.loads(done.stdout))
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def database() -> Iterator[dict[str, str]]:
    """Yield the environment of a measuring process; with a server, create a database for it."""
    if SERVER not in os.environ:
        yield dict(os.environ)
        return
    import psycopg  # noqa: PLC0415

    url = urlsplit(os.environ[SERVER])
    name = f"bench_{os.urandom(4).hex()}"
    try:
        server = psycopg.connect(os.environ[SERVER], autocommit=True)
    except psycopg.Error as error:
        sys.exit(f"bench: cannot use the server of --url: {str(error).splitlines()[0]}")
    with server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield {**os.environ, SERVER: urlunsplit(url._replace(path=f"/{name}"))}
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")


def pqueue_folder() -> Path:
    """Return a folder on the disk of the queue; /tmp may be in memory."""
    folder = Path("var").absolute()
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def describe_machine() -> dict[str, str]:
    return {
        "CPUs": f"{os.cpu_count()}, {platform.machine()}",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        "file system": pqueue_files.file_system(pqueue_folder()),
        "fdatasync": "{:.2f} ms, {:.2f} ms if the file grows (medians)".format(*map(median_sync, (False, True))),
    }


def median_sync(grows: bool, times: int = 200) -> float:
    """Return milliseconds to sync a page: SQLite's log rewrites its pages, once it has grown to its size."""
    with tempfile.TemporaryFile(dir=pqueue_folder()) as file:
        if not grows:
            file.write(bytes(4096 * times))
            file.flush()
            os.fsync(file.fileno())
        delays = []
        for place in range(times):
            os.pwrite(file.fileno(), b"x" * 4096, 4096 * place)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            delays.append(time.perf_counter() - began)
    return 1000 * statistics.median(delays)


def table(results: dict[Key, Figures]) -> str:
    """Return the medians with least and most, also as a multiple of the limit of the same run."""
    form = "{:21} {:14} {:10} {:12} {:>10} {:>10} {:>10}  {}".format
    lines = [form("column", "contestant", "durability", "figure", "median", "min", "max", "x limit")]
    for (column, name, durability), figures in results.items():
        for figure, values in figures.items():
            if figure == "errors" and not any(values):
                continue
            middle, least, most = number(statistics.median(values)), number(min(values)), number(max(values))
            times = ratio(results, (column, durability), figure, values)
            lines.append(form(column, name, durability, figure, middle, least, most, times))
    lines += ["", "x limit: more is better for jobs/s, less for ms.", "A job whose consumer is killed is:"]
    return "\n".join([*lines, *(f"  {name:14} {fate}" for name, fate in fates().items())])


def fates() -> dict[str, str]:
    """Return for each queue what happens to a job whose consumer is killed."""
    return {name: kind.survives for name, kind in contestants().items() if getattr(kind, "survives", "-") != "-"}


def ratio(results: dict[Key, Figures], work: tuple[str, str], figure: str, values: list[float]) -> str:
    """Return the ratio to the limit in the same column; for the programs, to the limit of one commit per job."""
    column, durability = work
    reference = "process" if column in ("program", "share", "depth") else column
    limit = results.get((reference, "limit", durability), {}).get(figure) if figure.endswith(("/s", "ms")) else None
    return f"{statistics.median(values) / statistics.median(limit):.2f}" if limit else ""


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(results: dict[Key, Figures], machine: dict[str, str], path: str) -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels = [panel for panel in PANELS if any(key[0] == panel[0] for key in results)]
    rows = len(panels) // 3 + 1
    figure, axes = pyplot.subplots(rows, 3, figsize=(9, 0.4 + 2.7 * rows), squeeze=False, facecolor="white")
    for axis, (column, shown, title) in zip(axes.flat, panels, strict=False):
        values = {key[1:]: figures[shown] for key, figures in results.items() if key[0] == column}
        draw_bars(axis, values)
        better = "longer is better" if shown.endswith("/s") else "shorter is better, log scale"
        axis.set_title(f"{column}: {comparison(values, shown)}\n{title}, {better}", fontsize=8, loc="left")
        axis.set_xscale("log" if "log" in better else "linear")
        axis.margins(x=0.35)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    draw_legend(axes.flat[len(panels)], machine)
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")


PANELS = [
    ("put", "jobs/s", "jobs/s"),
    ("put many", "jobs/s", "jobs/s, 100 at a time"),
    ("process", "jobs/s", "jobs/s, one at a time"),
    ("program", "jobs/s", "jobs/s, one worker"),
    ("share", "jobs/s", "jobs/s, four workers"),
    ("put under load", "p99 ms", "p99, ms"),
    ("pickup", "p50 ms", "p50, ms"),
]
BLUES, GREYS = {"full": "#1f5fa8", "normal": "#86b6e8"}, {"full": "#8a8a8a", "normal": "#cccccc"}


def comparison(values: dict[tuple[str, str], list[float]], shown: str) -> str:
    """Return how many times as good as the best of the others this queue is, at full and at normal durability."""
    found = []
    for durability in BLUES:
        medians = {name: statistics.median(each) for (name, level), each in values.items() if level == durability}
        ours = medians.pop("pqueue", None)
        others = [value for name, value in medians.items() if name != "limit"]
        if ours and others:
            ratio = ours / max(others) if shown.endswith("/s") else min(others) / ours
            found.append(f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}")
    return f"{' / '.join(found)} times the best" if found else "no other was measured"


def draw_bars(axis: Any, measured: dict[tuple[str, str], list[float]]) -> None:
    """Draw a bar for the median of each durability of each contestant, and a dot for each round: this queue in blue,
    the limit as an outline."""
    names = list(dict.fromkeys(name for name, _ in measured))
    for (name, durability), values in measured.items():
        value = statistics.median(values)
        colours = BLUES if name == "pqueue" else GREYS
        face, edge = ("none", GREYS["full"]) if name == "limit" else (colours[durability], colours[durability])
        y = -names.index(name) + (0.2 if durability == "full" else -0.2)
        axis.barh([y], [value], height=0.36, color=face, edgecolor=edge, linewidth=0.8)
        axis.annotate(number(value), (max(values), y), (4, 0), textcoords="offset points", fontsize=7, va="center")
        axis.plot(values, [y] * len(values), ".", color="black", markersize=2)
    axis.set_yticks([-place for place in range(len(names))], names, fontsize=8)
    for tick in axis.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() == "pqueue" else "normal")
    axis.set_ylim(0.6 - len(contestants()), 0.6)
    axis.tick_params(length=0)
    axis.xaxis.set_visible(False)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def draw_legend(axis: Any, machine: dict[str, str]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    said = [(BLUES["full"], "pqueue, full"), (BLUES["normal"], "pqueue, normal")]
    said += [(GREYS["full"], "other queues, full"), (GREYS["normal"], "other queues, normal")]
    handles = [Patch(color=colour, label=text) for colour, text in said]
    handles.append(Patch(facecolor="none", edgecolor=GREYS["full"], label="limit: bare SQLite, full above normal"))
    handles.append(
        Line2D([], [], color="black", marker=".", markersize=2, linestyle="", label="one round; bars: medians")
    )
    axis.legend(handles=handles, loc="upper left", fontsize=8, frameon=False, borderaxespad=0)
    text = "\n".join(f"{name}: {value}" for name, value in machine.items())
    axis.text(0.02, 0.02, text, fontsize=7, color="#555555", transform=axis.transAxes)
