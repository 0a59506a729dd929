"""Hosts that are network namespaces: one loses its processes, one its link. Needs root, and `ip` of iproute2."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from postgres_server import Server

import pqueue
import pqueue_listener
import pqueue_postgres
from test_pqueue import wait_until

LEASE_SECONDS = 8  # longer than a session waits for an answer
TASKS = """
import time
from pqueue import task

@task()
def work(job): time.sleep(0.3)
"""
PRODUCER = """
import time, pqueue
queue = pqueue.open_queue()
while True:
    print(queue.enqueue("work"), flush=True)
    time.sleep(0.08)
"""


def ip(*arguments: object) -> str:
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr} (these tests need root and network namespaces)"
    return done.stdout


class Network:
    """A switch with hosts around it, each a namespace with one address."""

    def __init__(self) -> None:
        self.prefix = f"pq{os.getpid()}"
        self.switch = f"{self.prefix}-switch"
        self.hosts: dict[str, str] = {}
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")

    def add(self, name: str) -> str:
        """Return the namespace of a new host; its address is in `hosts`."""
        space, self.hosts[name] = f"{self.prefix}-{name}", f"10.77.0.{len(self.hosts) + 1}"
        ip("netns", "add", space)
        ip("-n", self.switch, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self.switch, "link", "set", name, "master", "bridge", "up")
        ip("-n", space, "address", "add", f"{self.hosts[name]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up")
        return space

    def link(self, name: str, state: str) -> None:
        ip("-n", self.switch, "link", "set", name, state)

    def kill(self, name: str) -> None:
        for pid in ip("netns", "pids", f"{self.prefix}-{name}").split():
            os.kill(int(pid), signal.SIGKILL)

    def close(self) -> None:
        for space in [f"{self.prefix}-{name}" for name in self.hosts] + [self.switch]:
            ip("netns", "delete", space)


@pytest.fixture
def network():
    network = Network()
    yield network
    network.close()


@pytest.fixture
def server(tmp_path, network):
    space = network.add("db")
    server = Server(tmp_path / "server", address=network.hosts["db"], namespace=space).create().start()
    yield server
    server.kill()


def held_by(queue, host: str) -> list[pqueue.Job]:
    """Return the jobs that run on this host."""
    return [job for job in queue.list_jobs(state="processing") if job.consumer.startswith(host)]


def waits(queue, held: list[pqueue.Job], since: float, *, for_the_lease: bool) -> list[float]:
    """Return how long these jobs waited for another consumer, once all are completed."""
    wait_until(lambda: all(queue.get(job.id).state == "completed" for job in held))
    jobs = [queue.get(job.id) for job in held]
    if for_the_lease:
        both = [(now, then) for now, then in zip(jobs, held, strict=True) if now.attempts > then.attempts]
        assert all(now.started_at >= then.lease_expires_at for now, then in both), both
    return [max(0.0, job.started_at - since) for job in jobs]


def test_jobs_of_a_lost_host_are_done_once_by_others(place, network, server, capsys):
    place.write("work_tasks.py", TASKS)
    children = {}

    def start(host: str, name: str, *command: str) -> None:
        command = ["ip", "netns", "exec", f"{network.prefix}-{host}", *command]
        children[name] = place.start_command(
            command, PQUEUE_URL=server.url, PYTHONPATH=os.path.dirname(pqueue.__file__)
        )

    def start_consumers(host: str, *numbers: int) -> None:
        for number in numbers:
            options = ["--import", "work_tasks", "--lease-seconds", LEASE_SECONDS, "--name", f"{host}-{number}"]
            start(host, f"{host}-{number}", *place.command("consumer.py", *options))

    queue = pqueue.open_queue(server.near_url)
    for host in ("one", "two", "maker"):
        network.add(host)
    start_consumers("one", 1, 2)
    start_consumers("two", 1, 2)
    start("maker", "maker", sys.executable, "-c", PRODUCER)
    wait_until(lambda: queue._read(pqueue_postgres.UPTIME)[0][0] > pqueue_listener.RESTART_SECONDS)

    held, killed_at = wait_until(lambda: held_by(queue, "two")), time.time()
    network.kill("two")
    after_kill = waits(queue, held, killed_at, for_the_lease=False)
    start_consumers("two", 3, 4)
    wait_until(lambda: held_by(queue, "two"))

    held, cut_at = wait_until(lambda: held_by(queue, "one")), time.time()
    network.link("one", "down")
    after_cut = waits(queue, held, cut_at, for_the_lease=True)  # the host is not dead
    wait_until(lambda: time.time() > cut_at + 1.5 * LEASE_SECONDS)
    restored_at = time.time()
    network.link("one", "up")
    wait_until(lambda: any(job.started_at > restored_at for job in held_by(queue, "one")))
    back_after = time.time() - restored_at

    children["maker"].kill()
    wait_until(lambda: not any(queue.stats()["states"][state] for state in pqueue.UNFINISHED))
    states = queue.stats()["states"]
    produced = {int(line) for line in children["maker"].out.read_text().split()}
    jobs = {job.id for job in queue.list_jobs(limit=10_000)}
    assert produced <= jobs
    assert states["completed"] == len(jobs) == sum(states.values())
    reported = Counter(
        re.findall(
            r" completed .*?job=(\d+)", "\n".join(c.out.read_text() for n, c in children.items() if n != "maker")
        )
    )
    assert max(reported.values()) == 1
    queue.close()
    with capsys.disabled():
        print(
            f"\n{len(jobs)} jobs, each completed once. The {len(after_kill)} of the host whose processes were killed "
            f"waited at most {max(after_kill):.1f} s; the {len(after_cut)} of the host that was cut off at most "
            f"{max(after_cut):.1f} s, with a lease of {LEASE_SECONDS} s; it worked again {back_after:.1f} s after its "
            f"link was back"
        )
