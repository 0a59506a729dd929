"""Put millions of jobs through the queue while it is pruned; see that none is lost and that nothing grows.

    PYTHONPATH=. python tests/soak.py --jobs 10000000 [--max-jobs 1000]

Each job is a number, which its consumer marks in a map of its own. Files, memory and rates are sampled every second,
written to soak.csv and, where matplotlib is installed, drawn in soak.png. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import csv
import mmap
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pqueue
import pqueue_sqlite
from pqueue_tools import report

ROOT = Path(__file__).resolve().parent.parent
PRODUCERS, CONSUMERS = 2, 3
MAX_PENDING = 20_000
KEEP_SECONDS, PRUNE_SECONDS, SAMPLE_SECONDS = 5.0, 1.0, 1.0
HUNDRED = 100
HEADER = struct.Struct("Q")  # of a map: how many jobs ran, with those that ran again
MEGABYTE = 1_000_000
Sample = dict[str, float]


# Those who work #######################################################################################################


class Map:
    """One bit for each job, and a count, in a file that outlives its process."""

    def __init__(self, path: Path, jobs: int) -> None:
        size = HEADER.size + jobs // 8 + 1
        with path.open("a+b") as file:
            file.truncate(size)
            self._bits = mmap.mmap(file.fileno(), size)

    def mark(self, number: int) -> None:
        HEADER.pack_into(self._bits, 0, HEADER.unpack_from(self._bits)[0] + 1)
        self._bits[HEADER.size + number // 8] |= 1 << number % 8


def task_of_this_process() -> Callable[[pqueue.Job], None]:
    marked = Map(Path(os.environ["SOAK_FOLDER"]) / f"{os.getpid()}.map", int(os.environ["SOAK_JOBS"]))
    return lambda job: marked.mark(job.payload)


if "SOAK_FOLDER" in os.environ:
    pqueue.task("mark")(task_of_this_process())


def produce(url: str, first: int, last: int) -> None:
    """Enqueue these numbers: a hundred at a time, and every fiftieth hundred one by one."""
    with closing(pqueue.open_queue(url)) as queue:
        for start in range(first, last, HUNDRED):
            numbers = range(start, min(start + HUNDRED, last))
            if start // HUNDRED % 50:
                when_there_is_room(lambda n=numbers: queue.enqueue_many("mark", n))
            else:
                for number in numbers:
                    when_there_is_room(lambda n=number: queue.enqueue("mark", n))


def when_there_is_room(call: Callable[[], Any]) -> None:
    while True:
        try:
            call()
        except (pqueue.QueueFull, pqueue.QueueBusy):
            time.sleep(0.05)
        else:
            return


def prune(url: str) -> None:
    with closing(pqueue.open_queue(url)) as queue:
        while True:
            queue.prune(KEEP_SECONDS)
            time.sleep(PRUNE_SECONDS)


# The run ##############################################################################################################


class Soak:
    def __init__(self, folder: Path, jobs: int, max_jobs: int | None = None) -> None:
        self.folder, self.jobs, self.url = folder, jobs, str(folder / "queue.db")
        self.options = [] if max_jobs is None else ["--max-jobs", str(max_jobs)]  # of the consumers
        self.queue = pqueue.open_queue(self.url)
        self.queue.limit("default", MAX_PENDING)
        self.samples: list[Sample] = []
        self._began = time.monotonic()
        self._producers = [self._child(produce, *bounds) for bounds in self._shares()]
        self._pruner = self._child(prune)
        self._consumers = [self._consumer(number) for number in range(CONSUMERS)]

    def run(self) -> list[str]:
        """Return a sentence for each promise that was broken."""
        try:
            while any(each.is_alive() for each in self._producers) or self._unfinished():
                self._sample()
                self._tell()
                time.sleep(SAMPLE_SECONDS)
            self._sample()
            return [
                *self._end(),
                *lost(self.folder, self.jobs),
                *bounds_broken(self.samples),
                *map(str, report.problems(report.findings(self.queue))),
            ]
        finally:
            for each in [*self._producers, self._pruner, *self._consumers]:
                each.kill()
            self.queue.close()

    def _shares(self) -> Iterator[tuple[int, int]]:
        for number in range(PRODUCERS):
            yield self.jobs * number // PRODUCERS, self.jobs * (number + 1) // PRODUCERS

    def _child(self, work: Callable[..., None], *arguments: int) -> Any:
        child = multiprocessing.get_context("spawn").Process(target=work, args=(self.url, *arguments), daemon=True)
        child.start()
        return child

    def _consumer(self, number: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "consumer.py"), "--import", "soak", "--name", f"consumer_{number}"]
        command += self.options
        here = {"PQUEUE_URL": self.url, "SOAK_FOLDER": str(self.folder), "SOAK_JOBS": str(self.jobs)}
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return subprocess.Popen(command, env={**os.environ, **here, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)

    def _unfinished(self) -> int:
        states = self.queue.stats()["states"]
        return sum(states[state] for state in pqueue.UNFINISHED)

    def _sample(self) -> None:
        states, facts = self.queue.stats()["states"], self.queue.check(thorough=False)
        newest = self.queue.list_jobs(limit=1)
        sample = {
            "seconds": time.monotonic() - self._began,
            "enqueued": newest[0].id if newest else 0,
            "ran": sum(ran for ran, _ in maps(self.folder)),
            "pending": states["pending"],
            "rows": sum(states.values()),
            "file_mb": facts["file_bytes"] / MEGABYTE,
            "wal_mb": facts["wal_bytes"] / MEGABYTE,
        }
        processes = {"producer": self._producers, "pruner": [self._pruner], "consumer": self._consumers}
        for name, children in processes.items():
            for number, child in enumerate(children):
                sample[f"{name}_{number}_rss_mb"] = resident(child.pid) / MEGABYTE
        self.samples.append(sample)

    def _end(self) -> Iterator[str]:
        """Stop the consumers, and look at what they leave."""
        for each in self._consumers:
            each.send_signal(signal.SIGTERM)
        codes = [each.wait(60) for each in self._consumers] + [each.exitcode for each in self._producers]
        if any(codes):
            yield f"expected every program to end with 0, got {codes}"
        states = self.queue.stats()["states"]
        yield from (
            f"{states[state]} jobs are {state}" for state in pqueue.STATES if states[state] and state != "completed"
        )
        yield from self.queue.check()["problems"]

    def _tell(self) -> None:
        if sys.stderr.isatty():
            last = self.samples[-1]
            share = last["ran"] / self.jobs
            bar = "█" * round(share * 30)
            text = f"{share:4.0%} {last['ran'] / last['seconds']:,.0f} jobs/s, {last['file_mb']:.0f} MB "
            print(f"\r{bar:░<30} {text}", end="", file=sys.stderr)


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError):
        return 0  # it has ended


# The verdict ##########################################################################################################


def maps(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield how many jobs each process ran, and the bits of which."""
    for path in folder.glob("*.map"):
        content = path.read_bytes()
        if len(content) >= HEADER.size:
            yield HEADER.unpack_from(content)[0], int.from_bytes(content[HEADER.size :], "little")


def lost(folder: Path, jobs: int) -> Iterator[str]:
    union = times = 0
    for ran, bits in maps(folder):
        union |= bits
        times += ran
    if missing := jobs - union.bit_count():
        yield f"{missing} jobs never ran"
    if again := times - union.bit_count():
        yield f"{again} jobs ran again, though nobody died"


def bounds_broken(samples: list[Sample]) -> Iterator[str]:
    """Compare the last quarter of the run with the second: by then everything has found its size."""
    if len(samples) < 20:
        yield "the run was too short to tell whether anything grows: give it more jobs"
        return
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    for name in samples[0]:
        if name == "file_mb" or name.endswith("_rss_mb"):
            before, after = (max(sample[name] for sample in part) for part in (early, late))
            if after > 1.25 * before + 8:
                yield f"{name} grew from {before:.0f} to {after:.0f}"
    if (wal := max(sample["wal_mb"] for sample in samples)) > 2 * pqueue_sqlite.WAL_BYTES / MEGABYTE:
        yield f"the write-ahead log grew to {wal:.0f} MB"
    before, after = rate(early), rate(late)
    if after < before / 2:
        yield f"it slowed down from {before:,.0f} to {after:,.0f} jobs per second"


def rate(samples: list[Sample]) -> float:
    first, last = samples[0], samples[-1]
    return (last["ran"] - first["ran"]) / (last["seconds"] - first["seconds"])


def write(samples: list[Sample], folder: Path, result: str) -> None:
    with (folder / "soak.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, samples[0])
        rows.writeheader()
        rows.writerows({name: round(value, 2) for name, value in sample.items()} for sample in samples)
    try:
        import matplotlib
    except ImportError:
        print("no soak.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    draw(samples, folder / "soak.png", result)


def draw(samples: list[Sample], path: Path, result: str) -> None:
    from matplotlib import pyplot

    seconds = [sample["seconds"] for sample in samples]
    largest = {name: max(sample[name] for sample in samples) for name in samples[0]}
    memory = [name for name in samples[0] if name.endswith("_rss_mb")]
    programs = {name.split("_")[0]: [each for each in memory if each.startswith(name.split("_")[0])] for name in memory}
    panels: dict[str, dict[str, list[Any]]] = {
        f"Jobs per second: {rate(samples):,.0f} on average": {
            "run": [0.0, *(rate(list(pair)) for pair in pairwise(samples))]
        },
        f"Jobs: at most {largest['pending']:,.0f} pending and {largest['rows']:,.0f} rows": {
            name: [sample[name] for sample in samples] for name in ("pending", "rows")
        },
        f"MB on disk: at most {largest['file_mb']:.0f} in the database and {largest['wal_mb']:.0f} in its log": {
            name: [sample[f"{name}_mb"] for sample in samples] for name in ("file", "wal")
        },
        f"MB of memory: at most {max(largest[name] for name in memory):.0f} in the largest process of each program": {
            program: [max(sample[name] for name in names) or None for sample in samples]
            for program, names in programs.items()
        },
    }
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(9, 11), layout="constrained")
    figure.suptitle(result, x=0.01, ha="left", fontsize="medium", fontweight="bold")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, values in lines.items():
            axis.plot(seconds, values, label=name, linewidth=1)
        axis.set_title(title, loc="left", fontsize="medium")
        axis.set_ylim(bottom=0)
        if len(lines) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize="small")
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--max-jobs", type=int, metavar="N", help="replace each worker after N jobs (default: never)")
    parser.add_argument("--to", type=Path, default=Path("docs"), metavar="FOLDER", help="(default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir=ROOT / "var") as folder:
        soak = Soak(Path(folder), options.jobs, options.max_jobs)
        problems = soak.run()
    last = soak.samples[-1]
    result = "; ".join(problems) or "nothing was lost, nothing ran twice, nothing grew"
    write(soak.samples, options.to, f"{options.jobs:,} jobs in {last['seconds']:,.0f} s: {result}")
    largest = {name: max(sample[name] for sample in soak.samples) for name in last}
    memory = max(value for name, value in largest.items() if name.endswith("_rss_mb"))
    print(
        f"{options.jobs:,} jobs in {last['seconds']:,.0f} s, {options.jobs / last['seconds']:,.0f} per second; at most "
        f"{largest['rows']:,.0f} rows, {largest['file_mb']:.0f} MB of file, {largest['wal_mb']:.0f} MB of log, "
        f"{memory:.0f} MB of memory in one process"
    )
    print(result.replace("; ", "\n"))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
