"""What becomes of the work when something runs out: disk, descriptors, memory, or the patience of a clock."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from conftest import ROOT, wait_until

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
