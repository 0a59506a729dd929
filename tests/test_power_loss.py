"""Let the power fail at any moment: keep what was synced, lose or tear the rest at random, and open the queue again.

A library that is preloaded into a child records every write and sync it does; the disk is then played back from that.
What was written but not synced may be there or not, in any order, sector by sector; a name, until its folder is synced.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from test_histories import memory

import pqueue
import pqueue_files
import producer
from pqueue import PersistentQSQLite, QueueError
from pqueue_tools import file_task

SOAK = int(os.environ.get("PQUEUE_SOAK", "1"))
ROUNDS = 1 + SOAK
OUTCOMES = 2 + SOAK  # tried for each moment
SECTOR = 512
HEADER = struct.Struct("=QIIQ")
pytestmark = pytest.mark.usefixtures("looks_at_itself_only")

WORKLOAD = """
import json, os, struct, sys
sys.path.insert(0, sys.argv[1])
import pqueue
path, durability, log = sys.argv[2], sys.argv[3], os.open(os.environ["RECORD_TO"], os.O_WRONLY | os.O_APPEND)
NOW = 1_800_000_000.0
NORMAL = ("dequeue", "release", "extend", "update", "prune", "leave")

def mark(**fact):
    data = json.dumps(fact).encode()
    os.write(log, struct.pack("=QIIQ", 0, 0, len(data), ord("M")) + data)

def open_queue():
    queue = pqueue.PersistentQSQLite(path, durability="normal" if durability == "off" else durability)
    queue._session().connection.execute("PRAGMA wal_autocheckpoint = 40")
    if durability == "off":
        transaction = queue._transaction
        def unsynced(**options):
            session = transaction(**options)
            session.wanted = "OFF"
            return session
        queue._transaction = unsynced
    return queue

def do(verb, *arguments, **options):
    mark(begin=verb)
    clock = {} if verb == "update" else {"now": NOW}
    result = getattr(queue, verb)(*arguments, **{**clock, **options})
    jobs = queue._read("SELECT * FROM jobs ORDER BY id", {})
    mark(end=verb, synced=verb not in NORMAL or "result" in options, jobs=jobs)
    return result

queue = open_queue()
for n in range(int(sys.argv[4])):
    for size in (1, 200, 9000):
        do("enqueue", "t", "x" * size)
    do("enqueue_many", "t", ["y" * 300] * 9, queue=f"queue {n}")
    first, second, third, fourth = (do("dequeue", "w") for _ in range(4))
    do("complete", first, "z" * 5000)
    do("update", second, result="half")
    do("update", second, progress=0.5)
    do("fail", second, "no", retry=False)
    do("release", third)
    do("complete_and_dequeue", [(fourth, 1)], "w")
    do("enqueue", "t", delay_seconds=100)
    last = do("enqueue", "t", key=f"key {n}")
    do("cancel", last)
    do("resubmit", last)
    if n % 2:
        do("prune", 0, states=["completed"], now=NOW + 1)
    do("leave", "w")
    queue.close()
    queue = open_queue()
"""


# A disk that forgets ##################################################################################################


@dataclass
class Record:
    kind: str
    path: str
    offset: int
    data: bytes


def records(log: bytes) -> Iterator[Record]:
    at = 0
    while at < len(log):
        offset, path_bytes, data_bytes, kind = HEADER.unpack_from(log, at)
        at += HEADER.size
        path = log[at : at + path_bytes].decode()
        at += path_bytes
        yield Record(chr(kind), path, offset, log[at : at + data_bytes])
        at += data_bytes


@dataclass
class File:
    synced: bytes = b""
    later: list[Record] = field(default_factory=list)

    def after(self, changes: list[Record]) -> bytes:
        data = bytearray(self.synced)
        for change in changes:
            end = change.offset + len(change.data)
            data.extend(bytes(max(0, end - len(data))))
            if change.kind == "T":
                del data[change.offset :]
                data.extend(bytes(change.offset - len(data)))
            else:
                data[change.offset : end] = change.data
        return bytes(data)


class Disk:
    """Files and folders: as of their last sync, and what was done to them since."""

    def __init__(self) -> None:
        self.names: dict[str, File | None] = {}  # as the process sees them; None: a folder
        self.files: list[File] = []
        self.synced: dict[str, File | None] = {}  # names whose folder was synced since they changed
        self.loose: dict[str, list[File | None | str]] = {}  # what else each name may refer to after a power cut

    def play(self, record: Record) -> None:
        path, kind = record.path, record.kind
        if kind in "CD":
            self._name(path, File() if kind == "C" else None)
        elif kind == "U":
            self._unname(path)
        elif kind == "R":
            moved = self.names[path]
            self._unname(path)
            self._name(record.data.decode(), moved)
        elif kind == "L":
            self._name(record.data.decode(), self.names[path])
        elif kind == "S":
            self._sync(path)
        elif kind in "WT" and isinstance(file := self.names.get(path), File):
            file.later.append(record)

    def _name(self, path: str, what: File | None) -> None:
        self.names[path] = what
        self.loose.setdefault(path, []).append(what)

    def _unname(self, path: str) -> None:
        del self.names[path]
        self.loose.setdefault(path, []).append("gone")

    def _sync(self, path: str) -> None:
        file = self.names.get(path)
        if isinstance(file, File):
            file.synced, file.later = file.after(file.later), []
            return
        for name in [name for name in self.loose if os.path.dirname(name) == path]:
            self.loose.pop(name)
            self.synced.pop(name, None)
            if name in self.names:
                self.synced[name] = self.names[name]

    def after_power_loss(self, chance: random.Random) -> dict[str, Left | None]:
        """Return what may be left: by path a file, or None for a folder."""
        keep = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        names: dict[str, Any] = dict(self.synced)
        for name, states in self.loose.items():
            kept = [names.get(name, "gone"), *states]
            names[name] = kept[-1] if chance.random() < keep else chance.choice(kept)
        found = {name: what for name, what in names.items() if what != "gone"}
        left: dict[str, Left | None] = {}
        data: dict[int, bytes] = {}  # one for all names of a file
        for name, what in sorted(found.items()):
            parent = os.path.dirname(name)
            if parent in self.names and parent not in left and self.names[parent] is None:
                continue  # its folder is gone, and all in it
            if what is None:
                left[name] = None
                continue
            if id(what) not in data:
                data[id(what)] = what.after(list(survivors(what.later, keep, chance)))
            left[name] = Left(list(data).index(id(what)), data[id(what)])
        return left


class Left(NamedTuple):
    """A file that is left; its names bear one number."""

    number: int
    data: bytes


def digest(left: dict[str, Left | None], fact: int) -> bytes:
    """Return what is the same only for the same files and the same fact."""
    files = sorted(left.items())
    names = [(name, file and (file.number, len(file.data))) for name, file in files]
    found = hashlib.sha256(repr((fact, names)).encode())
    for _, file in files:
        found.update(file.data if file else b"")
    return found.digest()


def survivors(changes: list[Record], keep: float, chance: random.Random) -> Iterator[Record]:
    for change in changes:
        tear = change.kind == "W" and chance.random() < 0.2
        if not tear:
            if chance.random() < keep:
                yield change
            continue
        for at in range(0, len(change.data), SECTOR):
            if chance.random() < 0.5:
                yield Record("W", change.path, change.offset + at, change.data[at : at + SECTOR])


# The child and its oracle #############################################################################################


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "record_writes.so"
    source = Path(__file__).with_name("record_writes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def place():
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        yield Path(folder).resolve()


def run(shim: Path, place: Path, code: str, *arguments: object) -> list[Record]:
    """Run the code in a folder `disk`, and return what it did there."""
    disk, log = place / "disk", place / "log"
    disk.mkdir()
    log.touch()
    variables = {"LD_PRELOAD": str(shim), "RECORD_UNDER": str(disk), "RECORD_TO": str(log)}
    command = [sys.executable, "-c", code, str(ROOT), str(disk / "var" / "queue.db"), *map(str, arguments)]
    subprocess.run(command, env={**os.environ, **variables}, check=True)
    found = list(records(log.read_bytes()))
    shutil.rmtree(disk)
    return [each for each in found if not each.path.endswith(("-shm", ".wakeup")) and ".db.d/" not in f"{each.path}/"]


def restore(place: Path, left: dict[str, Left | None], *, linked: bool = True) -> Path:
    """Lay out what is left.

    linked: two names of a file are links; else copies, as no disk keeps both names after a rename.
    """
    shutil.rmtree(place / "disk", ignore_errors=True)
    (place / "disk").mkdir()
    first: dict[int, str] = {}
    for name, file in left.items():
        (Path(name) if file is None else Path(name).parent).mkdir(parents=True, exist_ok=True)
        if file is None:
            continue
        if linked and file.number in first:
            os.link(first[file.number], name)
        else:
            first[file.number] = name
            Path(name).write_bytes(file.data)
            Path(name).chmod(0o600)
    return place / "disk" / "var" / "queue.db"


def reopened(path: Path) -> list[Any]:
    """Open what is left, as a program would that starts again, and return its jobs."""
    with closing(PersistentQSQLite(path, durability="normal")) as queue:
        problems = queue.check()["problems"]
        if problems:
            raise QueueError(", ".join(problems))
        jobs = queue._read("SELECT * FROM jobs ORDER BY id", {})
        if queue._read("PRAGMA integrity_check", {}) != [("ok",)]:
            raise QueueError("the file is damaged")
        queue.complete(queue.dequeue("w", now=2e9) if jobs and queue.stats()["states"]["pending"] else one(queue))
    return json.loads(json.dumps(jobs))


def one(queue: PersistentQSQLite) -> pqueue.Job:
    queue.enqueue("t", priority=1000)
    job = queue.dequeue("w", now=2e9)
    assert job
    return job


def losses(found: list[Record], place: Path, synced: bool) -> Iterator[str | None]:
    """Let the power fail at every moment; yield what was broken each time, or None.

    synced: every operation that returned and says it is synced must be there; else any earlier state is right.
    """
    disk, chance, seen = Disk(), random.Random(1), set()
    states: list[Any] = [[]]  # of the jobs, after each operation
    sure = begun = 0  # number of the last operation that must be there; of the last that may be
    for number, record in enumerate(found):
        if record.kind != "M":
            disk.play(record)
        elif "begin" in (fact := json.loads(record.data)):
            begun += 1
            following = (json.loads(each.data) for each in found[number + 1 :] if each.kind == "M")
            states.append(next(following)["jobs"])
        elif fact["synced"] and synced:
            sure = begun
        for _ in range(OUTCOMES):
            left = disk.after_power_loss(chance)
            image = digest(left, sure)
            if image in seen:
                continue
            seen.add(image)
            try:
                jobs = reopened(restore(place, left))
            except (QueueError, ValueError) as error:  # ValueError: a payload or a result is no JSON any more
                yield f"record {number}: {error}"
                continue
            yield None if jobs in states[sure : begun + 1] else f"record {number}: lost what had returned"


def hold(name: str, found: list[Record], place: Path, synced: bool) -> None:
    cuts = 0
    for broken in losses(found, place, synced):
        assert broken is None
        cuts += 1
    print(f"\n{name}: {cuts} power cuts")
    assert cuts > 100


def test_guarantee_1_nothing_that_returned_is_lost_to_a_power_cut(shim, place):
    hold("full", run(shim, place, WORKLOAD, "full", ROUNDS), place, synced=True)


def test_guarantee_1_normal_durability_loses_only_a_suffix_to_a_power_cut(shim, place):
    hold("normal", run(shim, place, WORKLOAD, "normal", ROUNDS), place, synced=False)


@pytest.mark.parametrize(("durability", "synced"), [("normal", True), ("off", True), ("off", False)])
def test_power_cut_reveals_unsynced_writes(shim, place, durability, synced):
    assert any(losses(run(shim, place, WORKLOAD, durability, ROUNDS), place, synced))


BEGIN = """
import os, struct, sys
sys.path.insert(0, sys.argv[1])
import pqueue
from pathlib import Path

queue = pqueue.PersistentQSQLite(sys.argv[2])
copy = sys.argv[2] + ".copy"
"""
END = """
log = os.open(os.environ["RECORD_TO"], os.O_WRONLY | os.O_APPEND)
os.write(log, struct.pack("=QIIQ", 0, 0, 4, ord("M")) + b"done")
"""


def copies_after_losses(shim: Path, place: Path, code: str) -> Iterator[tuple[Path, bool]]:
    """Let the power fail at every moment; yield the file that the code writes, and whether that had returned."""
    disk, chance, returned = Disk(), random.Random(2), False
    for record in run(shim, place, BEGIN + code + END):
        disk.play(record)
        returned = returned or record.kind == "M"
        for _ in range(OUTCOMES):
            path = restore(place, disk.after_power_loss(chance), linked=False)
            copy = path.with_name(f"{path.name}.copy")
            assert copy.exists() or not returned
            yield copy, returned


def test_backup_is_whole_or_absent_after_a_power_cut_and_there_once_it_returned(shim, place):
    cuts = 0
    code = "queue.enqueue_many('t', ['x' * 500] * 100); queue.backup(copy)"
    for copy, returned in copies_after_losses(shim, place, code):
        cuts += 1
        if copy.exists() and (returned or copy.stat().st_size):
            assert len(reopened(copy)) == 100
    print(f"\nbackup: {cuts} power cuts")


def test_move_that_returned_is_in_the_target_after_a_power_cut_whatever_the_durability(shim, place, monkeypatch):
    monkeypatch.setenv("PQUEUE_DURABILITY", "normal")
    monkeypatch.setenv("PQUEUE_URL", str(place / "disk" / "var" / "queue.db"))
    code = """
queue.enqueue_many('t', ['x'] * 10)
import admin
assert admin.main(['move', '--to', copy]) == 0
"""
    for copy, returned in copies_after_losses(shim, place, code):
        assert not returned or len(reopened(copy)) == 10


def test_manager_adds_a_group_whole_or_not_at_all_when_the_power_fails(shim, place):
    text = "x" * 2000
    code = f"from pqueue_tools import supervisor; assert supervisor._create(Path(copy), {text!r})"
    for copy, _ in copies_after_losses(shim, place, code):
        assert not copy.exists() or copy.read_text() == text


# The programs' files ##################################################################################################

PRODUCE_AND_STAMP = """
import json, os, struct, sys
from contextlib import closing
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pqueue, producer
from pqueue_tools import file_task
log = os.open(os.environ["RECORD_TO"], os.O_WRONLY | os.O_APPEND)
files = Path(sys.argv[2]).parent.parent / "jobs" / "files"
file_task.files_directory = files
ROUNDS = int(sys.argv[4])

def mark(**fact):
    data = json.dumps(fact).encode()
    os.write(log, struct.pack("=QIIQ", 0, 0, len(data), ord("M")) + data)

with closing(pqueue.PersistentQSQLite(sys.argv[2], durability=sys.argv[3])) as queue:
    maker = producer.Producer(queue, files)
    maker.recover()
    for _ in range(ROUNDS):
        name = queue.get(maker.produce()).payload["file"]
        mark(produced=name, text=(files / name).read_text())
        job = queue.dequeue("w")
        result = pqueue.run_task(queue, job)
        queue.complete(job, result)
        mark(stamped=name)
    name = queue.get(maker.produce()).payload["file"]  # delivered twice: the first is killed before it renames
    mark(produced=name, text=(files / name).read_text())
    job = queue.dequeue("w")
    if os.fork() == 0:
        os.rename = lambda *_, **__: os._exit(0)
        pqueue.run_task(queue, job)
    assert os.wait()[1] == 0
    queue.fail(job, "stopped", retry_in_seconds=0)
    job = queue.dequeue("w")
    queue.complete(job, pqueue.run_task(queue, job))
    mark(stamped=name)
"""

STAMPS = re.compile(r"(?:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z )*")


def run_again(path: Path, files: Path) -> list[pqueue.Job]:
    """Start a producer and a consumer on what is left, let them do all there is, and return the jobs."""
    file_task.files_directory = files
    with closing(PersistentQSQLite(path, durability="normal")) as queue:
        producer.Producer(queue, files).recover()
        file_task.remove_copies()
        while job := queue.dequeue("w", now=2e9):
            queue.complete(job, pqueue.run_task(queue, job))
        return queue.list_jobs()


def wrong_with_files(files: Path, jobs: list[pqueue.Job], texts: dict[str, str], exact: bool) -> Iterator[str]:
    """Yield what is wrong. exact: each file has its job and one timestamp, as at full; else its job may be missing,
    and it may have two timestamps, but each of its lines has the same and each job has its file.
    """
    left = set(os.listdir(files))
    named = {job.payload["file"] for job in jobs}
    if len(named) < len(jobs):
        yield "a file has two jobs"
    if named - left or (exact and left - named):
        yield f"expected a file for each job and a job for each file, got {sorted(left ^ named)}"
    for name in left & texts.keys():
        text = (files / name).read_text()
        stamps = STAMPS.match(text)[0]
        number = stamps.count(" ")
        whole = "".join(stamps + line for line in texts[name].splitlines(keepends=True))
        if text != whole or number not in ((1,) if exact else (1, 2) if name in named else (0, 1, 2)):
            yield f"{name} was stamped {number} times, or in part"
    if left - texts.keys():
        yield f"left behind: {sorted(left - texts.keys())}"


def file_losses(found: list[Record], place: Path, exact: bool) -> Iterator[str | None]:
    """Let the power fail at every moment; yield what was wrong with the files after the next start, or None."""
    disk, chance, seen = Disk(), random.Random(3), set()
    facts = [json.loads(each.data) for each in found if each.kind == "M"]
    texts = {fact["produced"]: fact["text"] for fact in facts if "produced" in fact}
    files, acknowledged = place / "disk" / "jobs" / "files", set[str]()
    for number, record in enumerate(found):
        if record.kind == "M":
            acknowledged |= {json.loads(record.data).get("produced")} - {None}
        else:
            disk.play(record)
        for _ in range(OUTCOMES * (8 if record.kind in "CDLRU" else 1)):  # names outlast the power in many ways
            left = disk.after_power_loss(chance)
            image = digest(left, len(acknowledged))
            if image in seen:
                continue
            seen.add(image)
            try:
                jobs = run_again(restore(place, left), files)
            except (QueueError, OSError, pqueue.DoNotRetry) as error:
                yield f"record {number}: {error}"
                continue
            wrong = list(wrong_with_files(files, jobs, texts, exact))
            lost = acknowledged - {job.payload["file"] for job in jobs}
            wrong += [f"lost {sorted(lost)}"] if lost and exact else []
            yield f"record {number}: {wrong}" if wrong else None


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_programs_leave_each_file_with_its_job_stamped_once_after_a_power_cut(shim, place, monkeypatch, durability):
    monkeypatch.setattr(file_task, "files_directory", place)
    found = run(shim, place, PRODUCE_AND_STAMP, durability, ROUNDS)
    cuts = 0
    for broken in file_losses(found, place, exact=durability == "full"):
        assert broken is None
        cuts += 1
    print(f"\nfiles, {durability}: {cuts} power cuts")
    assert cuts > 100


def test_power_cut_shows_a_plan_that_was_not_synced(shim, place, monkeypatch):
    monkeypatch.setattr(file_task, "files_directory", place)
    assert any(file_losses(run(shim, place, PRODUCE_AND_STAMP, "normal", ROUNDS), place, exact=True))


RESTORE = """
import os, struct, sys
sys.path.insert(0, sys.argv[1])
import pqueue
from pqueue_tools import restoring
log = os.open(os.environ["RECORD_TO"], os.O_WRONLY | os.O_APPEND)

def mark(text):
    os.write(log, struct.pack("=QIIQ", 0, 0, len(text), ord("M")) + text)

queue = pqueue.PersistentQSQLite(sys.argv[2])
queue.enqueue_many("t", ["x" * 500] * 100)
queue.backup(sys.argv[2] + ".copy")
queue.enqueue_many("t", ["x" * 500] * 50)
queue.close()
if sys.argv[3] != "closed":
    if not os.fork():
        pqueue.PersistentQSQLite(sys.argv[2]).enqueue_many("t", ["x" * 500] * 25)
        os._exit(0)
    os.wait()
if sys.argv[3] == "stuck":
    restoring._apply_logs = lambda _: None
mark(b"begun")
restoring.restore(sys.argv[2] + ".copy", sys.argv[2])
mark(b"done")
"""


@pytest.mark.parametrize("before", ["closed", "killed", "stuck"])
def test_restore_leaves_the_old_database_or_the_new_one_after_a_power_cut(shim, place, before):
    disk, chance, marks, cuts = Disk(), random.Random(3), [], 0
    right = [{100, 150 if before == "closed" else 175}, {100}]
    for record in run(shim, place, RESTORE, before):
        disk.play(record)
        marks += [record.data] if record.kind == "M" else []
        for _ in range(2 * OUTCOMES if marks else 0):
            path = restore(place, disk.after_power_loss(chance), linked=False)
            cuts += 1
            if before == "stuck" and path.read_bytes() == pqueue_files.IN_RESTORE:
                assert marks == [b"begun"]
                continue
            assert len(reopened(path)) in right[len(marks) - 1], record
    assert marks == [b"begun", b"done"]
    print(f"\nrestore: {cuts} power cuts")
