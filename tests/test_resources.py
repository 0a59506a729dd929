"""What becomes of the work when something runs out: disk, descriptors, memory, or the patience of a clock."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import soak
from conftest import PATIENCE_SECONDS, ROOT, wait_until
from test_histories import memory

import pqueue
import pqueue_sqlite
from pqueue_tools import processes, report
from pqueue_tools.worker import Consumer

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk; CI is root")


# The disk


@pytest.fixture
def small_disk(place):
    """A disk of 8 MB under the folder that the programs write to."""
    image, var = place.folder / "image", place.folder / "var"
    var.mkdir()
    image.touch()
    os.truncate(image, 8_000_000)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, var], check=True)
    yield var
    place.close()
    subprocess.run(["umount", var], check=True)


@contextmanager
def full(disk):
    """Fill the disk to the last byte; free it at the end."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\1" * 1024)
    yield
    ballast.unlink()


@needs_root
def test_programs_report_a_full_disk_wait_and_continue(place, small_disk):
    queue = place.queue()
    producer = place.start("producer.py", "--interval", 0.01)
    log_there = ["sh", "-c", 'exec "$@" >var/log', "sh"]
    consumers = [place.start("consumer.py"), place.start_command([*log_there, *place.command("consumer.py")])]
    wait_until(lambda: queue.stats()["states"]["completed"] > 10)
    with full(small_disk):
        wait_until(lambda: "waiting reason=" in producer.out.read_text())
        done = queue.stats()["states"]["completed"]
        assert place.run("admin.py", "stats").returncode == 0
        assert "MB left" in place.run("admin.py", "doctor").stdout
    wait_until(lambda: queue.stats()["states"]["completed"] > done + 10)
    producer.send_signal(signal.SIGTERM)
    assert producer.wait(PATIENCE_SECONDS) == 0, producer.out.read_text()
    wait_until(lambda: not any(queue.stats()["states"][state] for state in pqueue.UNFINISHED))
    for child in consumers:
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()
    enqueued = re.findall(r"enqueued job=(\d+) file=(\S+)", producer.out.read_text())
    assert {int(job_id): "completed" for job_id, _ in enqueued} == {
        job.id: job.state for job in queue.list_jobs(limit=10_000)
    }
    assert sorted(file for _, file in enqueued) == sorted(os.listdir(small_disk / "files"))
    assert queue.check()["quick_check"] == "ok"
    assert "stopped consumer=" in (small_disk / "log").read_text()


@needs_root
def test_queue_object_bears_a_disk_that_is_full_at_any_moment(place, small_disk):
    """In a child: a write to a mapped file that finds no room would be SIGBUS."""
    code = """
import pqueue, time
queue = pqueue.open_queue()
job_id = queue.enqueue("t")
job = queue.dequeue("w")
print("ready", flush=True)
sys.stdin.readline()
waited = queue.wait(0.1, consumer="w")
for verb in (lambda: queue.enqueue("t", "x" * 100_000), lambda: queue.enqueue_many("t", ["x" * 5000] * 50)):
    try: print(verb())
    except pqueue.QueueFull as error: print(error)
try: pqueue.open_queue("var/other.db")
except pqueue.QueueError as error: print(error)
print(queue.get(job_id).state, waited, flush=True)
sys.stdin.readline()
queue.complete(job)
print(queue.enqueue("after"), queue.check()["quick_check"])
"""
    child = script(place, code)
    assert child.stdout.readline() == "ready\n"
    with full(small_disk):
        child.stdin.write("\n")
        child.stdin.flush()
        full_queue = f"cannot write to {small_disk}/queue.db: its disk is full\n"
        assert [child.stdout.readline() for _ in range(2)] == [full_queue] * 2
        assert "other.db" in child.stdout.readline()
        assert child.stdout.readline() == "processing False\n"
    assert child.communicate("\n", timeout=PATIENCE_SECONDS)[0] == "2 ok\n"


@needs_root
def test_queue_is_opened_or_the_disk_is_full_however_little_room_there_is(tmp_path):
    """Files of several pages are written in part then."""
    code = """
import pqueue
try:
    with pqueue.open_queue("queue.db") as queue:
        queue.dequeue("w")
        try: queue.enqueue("t").result(0)
        except TimeoutError: pass
except pqueue.QueueFull: pass
"""
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"]
    for kilobytes in range(0, 160, 8):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=True)
        try:
            (tmp_path / "ballast").write_bytes(bytes((1024 - kilobytes) * 1024))
            opened = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert opened.stderr == "", kilobytes
        finally:
            subprocess.run(["umount", tmp_path], check=True)


def script(place, code):
    """Start a program of its own on the queue of the place, with pipes to and from it."""
    path = place.write("script.py", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    child = subprocess.Popen(
        [sys.executable, str(path)], cwd=place.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    place.children.append(child)
    return child


# Descriptors


WITHOUT_DESCRIPTORS = """
import json, math, os, pqueue, resource, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

pqueue.DEAD_CHECK_SECONDS = math.inf  # only `look_for_dead` looks
FREE = 20
queue, other, *spare = (pqueue.open_queue() for _ in range(2 + 2 + FREE))
for each in spare: each.stats()
queue.enqueue_many("t", range(50))
held = [queue.dequeue("me") for _ in range(3)]
other.dequeue("other")
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + FREE,) * 2)

def in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(queue.enqueue, "t").result()

def look_for_dead():
    queue._dead_checked_at = -math.inf
    queue.dequeue("me")

def begin():
    queue.dequeue("new")
    queue._registry.pop("new").slot.close()

def backup():
    try: queue.backup("copy.db")
    finally: Path("copy.db").unlink(missing_ok=True)

def found():
    Path("new.db").unlink(missing_ok=True)
    pqueue.open_queue("new.db").close()

CALLS = {
    "enqueue": lambda: queue.enqueue("t"),
    "enqueue in a new thread": in_a_thread,
    "dequeue as a new consumer": begin,
    "dequeue and look for the dead": look_for_dead,
    "complete": lambda: queue.complete(queue.dequeue("me")),
    "wait": lambda: queue.wait(0.001, consumer="me"),
    "stats": queue.stats,
    "consumers": queue.consumers,
    "check": queue.check,
    "backup": backup,
    "open": lambda: pqueue.open_queue().close(),
    "found": found,
    "close": lambda: spare.pop().close(),
}

def refused(call, free):
    full = []
    try:
        while True: full.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        for _ in range(free): os.close(full.pop())
    try:
        call()
        return False
    except pqueue.QueueError as error:
        assert "open files" in str(error) or "no free descriptor" in str(error), error
        assert "\\n" not in str(error)
        return True
    finally:
        for each in full: os.close(each)

verdicts = {}
for name, call in CALLS.items():
    call()
    before = os.listdir("/proc/self/fd")
    refusals = [refused(call, free) for free in range(FREE)]
    call()
    verdicts[name] = {"refused": sum(refusals), "leaked": len(os.listdir("/proc/self/fd")) - len(before)}
for job in held: queue.complete(job)
print(json.dumps(verdicts))
"""


def test_queue_without_descriptors_raises_and_continues_when_there_are_some(place):
    child = script(place, WITHOUT_DESCRIPTORS)
    out, _ = child.communicate()
    assert child.returncode == 0
    verdicts = json.loads(out)
    assert {name for name, each in verdicts.items() if each["leaked"] > 0} == set()
    assert {name for name, each in verdicts.items() if each["refused"]} == {
        "enqueue in a new thread", "dequeue as a new consumer", "dequeue and look for the dead", "consumers", "backup",
        "open", "found",
    }  # fmt: skip
    assert place.queue().check()["problems"] == []


def test_consumer_without_descriptors_says_so_and_costs_no_job_more_than_an_attempt(place):
    limits = range(6, 46, 2)
    for limit in limits:
        assert place.run("producer.py", "--count", 1, "--interval", 0).returncode == 0
        child = place.start_command(["prlimit", f"--nofile={limit}", *place.command("consumer.py", "--drain")])
        assert child.wait(PATIENCE_SECONDS) in (0, 1)
        assert "\nTraceback" not in child.out.read_text()
    states = place.queue().stats()["states"]
    assert states["completed"]
    assert (states["failed"], sum(states.values())) == (0, len(limits))


# Memory


HUNGRY_TASKS = """
import os, resource, sys, time
from pqueue import task
resource.setrlimit(resource.RLIMIT_AS, (400_000_000, 400_000_000))

def eat(held):
    size = 1 << 24
    while size > 16:
        try: held.append(bytearray(size))
        except MemoryError: size //= 2

@task()
def huge(job): return len(bytearray(10**10))

@task()
def hungry(job):
    held = []
    eat(held)
    held.append(bytearray(10**6))

@task()
def starve(job):
    held = []
    eat(held)
    while True:
        try:
            if os.path.exists("go-on"): break
        except MemoryError: pass
        time.sleep(0.01)
    held.clear()
    return "survived"

@task()
def quick(job): return job.payload
"""


def test_consumer_without_memory_fails_the_job_and_continues(place):
    place.write("my_tasks.py", HUNGRY_TASKS)
    queue = place.queue()
    for name in ("huge", "hungry", "hungry", "huge"):
        queue.enqueue(name, max_attempts=1)
    queue.enqueue_many("quick", range(50))
    done = place.run("consumer.py", "--import", "my_tasks", "--drain")
    assert done.returncode == 1, done.stderr
    assert {job.error.split("\n")[0] for job in queue.list_jobs(state="failed")} == {"MemoryError: "}
    assert (queue.stats()["states"]["failed"], queue.stats()["states"]["completed"]) == (4, 50)


def extended(queue, job_id, seconds):
    """Wait until the lease of a job that runs is good for so much longer than at first."""
    first = wait_until(lambda: queue.get(job_id).lease_expires_at)
    wait_until(lambda: queue.get(job_id).lease_expires_at > first + seconds)


def memory_of(pid):
    """Return the memory of a process and its descendants in MB; what several share is counted once."""
    pids = [pid, *processes.descendants(pid)]
    found = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in pids]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in found) / 1024


EMBEDDED = "import pqueue, my_tasks, pqueue_tools.worker; pqueue_tools.worker.Consumer(pqueue.open_queue(), 'e').run()"


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the system does not show shared memory")
def test_consumer_takes_at_most_12_mb_more_than_one_in_an_application(place):
    place.write(
        "my_tasks.py", "from pqueue import task\n@task\ndef modules():\n import sys\n return list(sys.modules)\n"
    )
    queue, used = place.queue(), []
    for arguments in (["-c", EMBEDDED], [str(ROOT / "consumer.py"), "--import", "my_tasks"]):
        child = place.start_command([sys.executable, *arguments], PYTHONPATH=str(ROOT))
        job_id = queue.enqueue("modules")
        wait_until(lambda job_id=job_id: queue.get(job_id).state == "completed")
        used.append(memory_of(child.pid))
        child.kill()
        child.wait()
    assert used[1] < used[0] + 12, used
    assert {"asyncio", "ssl"}.isdisjoint(queue.get(job_id).result)  # 5 MB


def test_lease_outlives_a_job_that_takes_all_memory_for_longer(place):
    place.write("my_tasks.py", HUNGRY_TASKS)
    queue = place.queue()
    job_id = queue.enqueue("starve")
    place.start("consumer.py", "--import", "my_tasks", "--lease-seconds", 0.6)
    extended(queue, job_id, 5 * 0.6)
    (place.folder / "go-on").touch()
    wait_until(lambda: queue.get(job_id).state != "processing")
    assert (queue.get(job_id).result, queue.history(job_id)) == ("survived", [])


def test_watch_outlives_a_moment_without_memory(place, monkeypatch):
    queue = place.queue()
    calls, extend_all = [], queue.extend_all

    def extend(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return extend_all(*arguments, **options)

    for name in list(pqueue.TASKS):
        monkeypatch.delitem(pqueue.TASKS, name)
    monkeypatch.setattr(queue, "extend_all", extend)
    pqueue.task("slow")(lambda job: wait_until(lambda: len(calls) > 2))
    queue.enqueue("slow")
    Consumer(queue, "w", lease_seconds=0.2, max_jobs=1).run()
    assert queue.stats()["states"]["completed"] == 1


# Size and number


@pytest.fixture
def fast_queue():
    """A queue in memory, for what is large and does not look at the disk."""
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        with closing(pqueue.PersistentQSQLite(Path(folder) / "queue.db", durability="normal")) as queue:
            yield queue


def drained(queue, **options):
    """Take and complete all there is, in batches; return the jobs and how long each call took, in seconds."""
    jobs, times, batch = [], [], []
    while True:
        began = time.perf_counter()
        batch, lost = queue.complete_and_dequeue([(job, None) for job in batch], "w", 32, **options)
        times.append(time.perf_counter() - began)
        assert not lost
        if not batch:
            return jobs, times
        jobs += batch


def test_log_held_by_a_reader_is_reported_and_truncated_afterwards(fast_queue, monkeypatch):
    queue = fast_queue
    monkeypatch.setattr(pqueue_sqlite, "WAL_BYTES", 1_000_000)
    queue.enqueue("first")
    with closing(sqlite3.connect(queue.path)) as reader:
        reader.execute("BEGIN")
        seen = reader.execute("SELECT count(*) FROM jobs").fetchone()
        for _ in range(60):
            queue.enqueue_many("t", ["x" * 1000] * 100)
            drained(queue)
        assert queue.stats()["states"]["completed"] == 6001
        held = queue.check()["wal_bytes"]
        assert held > 2_000_000
        assert any("some program holds a read open" in each.text for each in report.findings(queue))
        assert reader.execute("SELECT count(*) FROM jobs").fetchone() == seen
    for _ in range(3):
        queue.enqueue("after")
    print(f"\nwrite-ahead log: {held} bytes under a reader, {queue.check()['wal_bytes']} after it")
    assert queue.check()["wal_bytes"] <= 1_000_000
    assert report.findings(queue) == []


def test_log_stays_small_while_others_only_look(fast_queue):
    queue, over = fast_queue, threading.Event()

    def look():
        while not over.is_set():
            queue.list_jobs(limit=1000)
            queue.stats()
            over.wait(0.01)

    with ThreadPoolExecutor(2) as pool:
        looks = [pool.submit(look) for _ in range(2)]
        for _ in range(200):  # would make 100 MB of log
            queue.enqueue_many("t", ["x" * 1000] * 100)
            drained(queue)
        largest = queue.check(thorough=False)["wal_bytes"]
        over.set()
        for each in looks:
            each.result()
    print(f"\nwrite-ahead log: {largest} bytes while two readers look")
    assert largest < pqueue_sqlite.WAL_BYTES


@pytest.mark.parametrize("value", ["x" * (pqueue.MAX_PAYLOAD_BYTES - 2), "ü" * (pqueue.MAX_PAYLOAD_BYTES // 2 - 1)])
def test_payload_and_result_at_the_limit_pass_and_one_byte_more_does_not(fast_queue, value):
    queue = fast_queue
    ids = queue.enqueue_many("t", [value] * 40)
    for refused in (lambda: queue.enqueue("t", value + "x"), lambda: queue.enqueue_many("t", ["x", value + "x"])):
        with pytest.raises(ValueError, match="expected a payload of at most 1048576 bytes of JSON, got 1048577"):
            refused()
    jobs = queue.dequeue_many("w", 40)
    assert [job.id for job in jobs if job.payload == value] == ids
    with pytest.raises(ValueError, match="expected a result of at most 1048576 bytes"):
        queue.complete(jobs[0], value + "x")
    queue.complete_and_dequeue([(job, value) for job in jobs], "w", 1)
    assert {job.result == value for job in queue.list_jobs(state="completed")} == {True}
    assert queue.stats()["states"]["completed"] == 40


def test_hundred_thousand_keys_hold_and_are_free_again(fast_queue):
    queue, keys = fast_queue, range(100_000)
    with queue.transaction():
        ids = [queue.enqueue("t", key=f"key {number}") for number in keys]
    with queue.transaction():
        assert [queue.enqueue("t", key=f"key {number}") for number in keys[::100]] == ids[::100]
    jobs, times = drained(queue)
    print(f"\n100,000 keys: {len(jobs) / sum(times):,.0f} jobs per second, slowest call {max(times) * 1000:.0f} ms")
    assert [job.id for job in jobs] == ids
    assert queue.enqueue("t", key="key 0") > ids[-1]


def test_thousand_queues_are_served_each_and_all(fast_queue):
    queue = fast_queue
    names = [f"queue {number}" for number in range(1000)]
    with queue.transaction():
        for name in names:
            queue.enqueue_many("t", range(20), queue=name)
    one, times = drained(queue, queues=[names[500]])
    print(f"\none of 1,000 queues: slowest call {max(times) * 1000:.0f} ms")
    assert [job.queue for job in one] == [names[500]] * 20
    everything, times = drained(queue)
    print(f"all of them: {len(everything) / sum(times):,.0f} jobs per second, slowest call {max(times) * 1000:.0f} ms")
    assert len(everything) == 999 * 20
    assert len(queue.stats()["queues"]) == 1000


def test_sixty_four_consumers_on_few_processors_all_work_and_end(place):
    place.write("my_tasks.py", "import time\nfrom pqueue import task\n@task()\ndef nap(job): time.sleep(0.02)\n")
    queue = place.queue()
    children = [place.start("consumer.py", "--import", "my_tasks", "--name", f"w{number}") for number in range(64)]
    wait_until(lambda: sum(each["state"] == "running" for each in queue.consumers()) == 64)
    queue.enqueue_many("nap", range(64 * 30))

    def all_have_worked():
        queue.enqueue_many("nap", range(64))
        return len({job.consumer for job in queue.list_jobs(state="completed", limit=100_000)}) == 64

    wait_until(all_have_worked)
    wait_until(lambda: not any(queue.count_jobs(state=state) for state in pqueue.UNFINISHED))
    shares = Counter(job.consumer for job in queue.list_jobs(limit=100_000))
    print(f"\n64 consumers: from {min(shares.values())} to {max(shares.values())} jobs each")
    assert len(shares) == 64
    assert {(job.state, job.attempts) for job in queue.list_jobs(limit=100_000)} == {("completed", 1)}
    for child in children:
        child.send_signal(signal.SIGTERM)
    assert [child.wait(PATIENCE_SECONDS) for child in children] == [0] * 64


# Time


PATIENT_TASK = """
import os, time
from pqueue import task

@task()
def patient(job):
    while not os.path.exists("go-on"): time.sleep(0.01)
"""


@pytest.mark.parametrize(("consumers", "lease_seconds", "leases"), [(1, 0.3, 10), (3, 6, 1)])
def test_job_longer_than_its_leases_is_kept_and_delivered_once(place, consumers, lease_seconds, leases):
    """Many short leases while nobody waits for their end, as a busy machine may let one run out; one among others."""
    place.write("my_tasks.py", PATIENT_TASK)
    queue = place.queue()
    job_id = queue.enqueue("patient")
    for number in range(consumers):
        place.start("consumer.py", "--import", "my_tasks", "--lease-seconds", lease_seconds, "--name", f"w{number}")
    extended(queue, job_id, leases * lease_seconds)
    (place.folder / "go-on").touch()
    wait_until(lambda: queue.get(job_id).state == "completed")
    assert (queue.get(job_id).attempts, queue.history(job_id)) == (1, [])


YEAR = 365 * 86400.0


class Before:
    """A queue with a job in every unfinished state, at a moment before the clock steps."""

    def __init__(self, place):
        self.queue, self.now = place.queue(), time.time()
        self.scheduled = self.queue.enqueue("t", delay_seconds=86400, now=self.now)
        self.queue.enqueue_many("t", range(4), now=self.now)
        self.running = self.queue.dequeue("w", now=self.now)
        self.retried = self.queue.dequeue("w", now=self.now)
        self.queue.fail(self.retried, "no", retry_in_seconds=10, now=self.now)
        other = place.queue()
        self.orphan = other.dequeue("dead", now=self.now)
        for me in other._registry.values():  # as the kernel does when it dies
            me.slot.close()
        other._registry.clear()

    def look_and_take(self, now):
        self.queue._dead_checked_at = 0.0
        jobs = []
        while job := self.queue.dequeue("w", now=now):
            jobs.append(job)
        return {job.id for job in jobs}, jobs


def test_clock_a_year_ahead_brings_jobs_early_and_loses_none(place):
    before = Before(place)
    queue, now = before.queue, before.now + YEAR
    taken, jobs = before.look_and_take(now)
    assert taken == {job.id for job in queue.list_jobs()}
    with pytest.raises(pqueue.LeaseLost):
        queue.complete(before.running, now=now)
    for job in jobs:
        queue.complete(job, now=now)
    assert queue.stats()["states"]["completed"] == 5
    assert [event["event"] for event in queue.history(before.running.id)] == ["expired"]
    assert queue.dequeue("w", now=before.now) is None  # and right again
    assert queue.enqueue("t", now=before.now) == queue.dequeue("w", now=before.now).id


def test_clock_a_year_behind_keeps_jobs_waiting_and_loses_none(place):
    before = Before(place)
    queue, now = before.queue, before.now - YEAR
    taken, jobs = before.look_and_take(now)
    assert before.orphan.id in taken  # its death is known by its lock, not by a clock
    assert len(taken) == 2
    queue.extend(before.running, 60, now=now)
    assert queue.get(before.running.id).lease_expires_at == now + 60
    for job in [before.running, *jobs]:
        queue.complete(job, now=now)
    waiting = {before.scheduled, before.retried.id}
    assert {job.id for job in queue.list_jobs(state="scheduled")} == waiting
    assert any(
        str(each) == "the newest job was enqueued in 365 d: some clock is wrong" for each in report.findings(queue, now)
    )
    assert before.look_and_take(before.now + 86401)[0] == waiting


def test_programs_whose_clocks_are_a_year_off_lose_nothing(place):
    place.write("my_tasks.py", "import time\nfrom pqueue import task\n@task()\ndef nap(job): time.sleep(0.01)\n")
    place.write(
        "sitecustomize.py",
        "import os, time\ntrue = time.time\ntime.time = lambda: true() + float(os.environ['STEP'])\n",
    )
    queue = place.queue()
    queue.keep("default", completed=None)  # for a consumer that is ahead, the others' jobs are old
    for name, step in (("right", 0.0), ("ahead", YEAR), ("behind", -YEAR)):
        place.start("consumer.py", "--import", "my_tasks", "--name", name, STEP=str(step), PYTHONPATH=str(place.folder))
    wait_until(lambda: len(queue.consumers()) == 3)
    for now in (None, time.time() + YEAR, time.time() - YEAR):
        queue.enqueue_many("nap", range(100), max_attempts=100, now=now)
        queue.enqueue("nap", delay_seconds=1, max_attempts=100, now=now)
    wait_until(lambda: queue.stats()["states"]["completed"] == 303)


# The soak, which is for longer than a test


def test_soak_reports_lost_and_repeated_jobs(tmp_path):
    one, other = (soak.Map(tmp_path / f"{number}.map", 100) for number in range(2))
    for number in range(99):
        (one if number % 2 else other).mark(number)
    assert list(soak.lost(tmp_path, 100)) == ["1 jobs never ran"]
    one.mark(99)
    assert list(soak.lost(tmp_path, 100)) == []
    one.mark(98)
    other.mark(98)
    assert list(soak.lost(tmp_path, 100)) == ["2 jobs ran again, though nobody died"]


def test_soak_reports_growth_and_slowdown():
    def sample(number, **changed):
        steady = {"seconds": number, "ran": 1000 * number, "file_mb": 30, "wal_mb": 4, "consumer_0_rss_mb": 26}
        return {**steady, **changed}

    assert list(soak.bounds_broken([sample(number) for number in range(20)])) == []
    growing = [
        sample(n, file_mb=10 * n, wal_mb=10 * n, consumer_0_rss_mb=10 * n, ran=1000 * min(n, 10)) for n in range(20)
    ]
    assert list(soak.bounds_broken(growing)) == [
        "file_mb grew from 90 to 190",
        "consumer_0_rss_mb grew from 90 to 190",
        "the write-ahead log grew to 190 MB",
        "it slowed down from 1,000 to 0 jobs per second",
    ]
    assert "too short" in next(soak.bounds_broken([sample(1)]))
