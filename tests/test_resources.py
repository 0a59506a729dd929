"""What becomes of the work when something runs out: disk, descriptors, memory, or the patience of a clock."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import ROOT, wait_until

import consumer
import pqueue

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
def test_programs_say_that_the_disk_is_full_wait_and_go_on(place, small_disk):
    queue = place.queue()
    producer = place.start("producer.py", "--interval", 0.01)
    log_there = ["sh", "-c", 'exec "$@" >var/log', "sh"]
    consumers = [place.start("consumer.py"), place.start_command([*log_there, *place.command("consumer.py")])]
    wait_until(lambda: queue.stats()["states"]["completed"] > 10)
    with full(small_disk):
        wait_until(lambda: "waiting reason=" in producer.out.read_text())
        done = queue.stats()["states"]["completed"]
        assert place.run("admin.py", "stats").returncode == 0
        assert "bytes left" in place.run("admin.py", "doctor").stdout
    wait_until(lambda: queue.stats()["states"]["completed"] > done + 10)
    producer.send_signal(signal.SIGTERM)
    assert producer.wait(20) == 0, producer.out.read_text()
    wait_until(lambda: not any(queue.stats()["states"][state] for state in pqueue.UNFINISHED), seconds=60)
    for child in consumers:
        child.send_signal(signal.SIGTERM)
        assert child.wait(20) == 0, child.out.read_text()
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
    assert child.communicate("\n", timeout=20)[0] == "2 ok\n"


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
import json, os, pqueue, resource, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

queue, other = pqueue.open_queue(), pqueue.open_queue()
queue.enqueue_many("t", range(50))
held = [queue.dequeue("me") for _ in range(3)]
other.dequeue("other")
FREE = 20
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + FREE,) * 2)

def in_a_thread():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(queue.enqueue, "t").result()

def look_for_dead():
    queue._looked_for_dead = 0.0
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
    "dequeue as somebody new": begin,
    "dequeue and look for the dead": look_for_dead,
    "complete": lambda: queue.complete(queue.dequeue("me")),
    "wait": lambda: queue.wait(0.001, consumer="me"),
    "stats": queue.stats,
    "consumers": queue.consumers,
    "check": queue.check,
    "backup": backup,
    "open": lambda: pqueue.open_queue().close(),
    "found": found,
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


def test_queue_without_descriptors_says_so_and_goes_on_when_there_are_some(place):
    child = script(place, WITHOUT_DESCRIPTORS)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    verdicts = json.loads(out)
    assert {name for name, each in verdicts.items() if each["leaked"]} == set()
    assert {name for name, each in verdicts.items() if each["refused"]} == {
        "enqueue in a new thread", "dequeue as somebody new", "dequeue and look for the dead", "consumers", "backup",
        "open", "found",
    }  # fmt: skip
    assert place.queue().check()["problems"] == []


# Memory


HUNGRY_TASKS = """
import resource, sys, time
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
    time.sleep(job.payload)
    held.clear()
    return "survived"

@task()
def quick(job): return job.payload
"""


def test_consumer_without_memory_fails_the_job_and_goes_on(place):
    place.write("my_tasks.py", HUNGRY_TASKS)
    queue = place.queue()
    for name in ("huge", "hungry", "hungry", "huge"):
        queue.enqueue(name, max_attempts=1)
    queue.enqueue_many("quick", range(50))
    done = place.run("consumer.py", "--import", "my_tasks", "--drain")
    assert done.returncode == 0, done.stderr
    assert {job.error.split("\n")[0] for job in queue.list_jobs(state="failed")} == {"MemoryError: "}
    assert (queue.stats()["states"]["failed"], queue.stats()["states"]["completed"]) == (4, 50)


def test_lease_outlives_a_job_that_takes_all_memory_for_longer(place):
    place.write("my_tasks.py", HUNGRY_TASKS)
    queue = place.queue()
    job_id = queue.enqueue("starve", 3)
    child = place.start("consumer.py", "--import", "my_tasks", "--lease-seconds", 0.6)
    wait_until(lambda: queue.get(job_id).state == "processing")
    wait_until(lambda: queue.dequeue("heir") or queue.get(job_id).state != "processing")
    assert queue.get(job_id).result == "survived", child.out.read_text()
    assert queue.history(job_id) == []


def test_watch_outlives_a_moment_without_memory(place, monkeypatch):
    queue = place.queue()
    calls = []

    def extend(*_):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    monkeypatch.setattr(pqueue, "TASKS", {})
    monkeypatch.setattr(queue, "extend", extend)
    pqueue.task("slow")(lambda job: wait_until(lambda: len(calls) > 2))
    queue.enqueue("slow")
    consumer.Consumer(queue, "w", lease_seconds=0.2, max_jobs=1).run()
    assert queue.stats()["states"]["completed"] == 1
