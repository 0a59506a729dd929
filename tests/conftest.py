"""Real processes in a folder of their own."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pqueue  # noqa: E402
import pqueue_values  # noqa: E402
from test_pqueue import PATIENCE_SECONDS, nothing_left, wait_until  # noqa: E402, F401 - the contract suite is self-contained, so it lives there


@pytest.fixture(autouse=True)
def short_hints(monkeypatch):
    """Let hints name programs as in the folder of the checkout, wherever the test is."""
    monkeypatch.setattr(pqueue_values, "_from_here", lambda name: name)


@pytest.fixture
def looks_at_itself_only(monkeypatch):
    """Let `check` look for deleted files in this process alone, where no other has one open: there are hundreds."""
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": [str(os.getpid())] if path == "/proc" else names(path))


def own_ports() -> Iterator[int]:
    """Return ports that no other test process takes until this one ends, and the kernel for no client."""
    for first in random.SystemRandom().sample(range(20_000, 32_000, 100), 120):
        mark = socket.socket(socket.AF_UNIX)
        try:
            mark.bind(f"\0pqueue-tests-{first}")
            mark.detach()  # and stay open
            return cycle(range(first, first + 100))
        except OSError:
            mark.close()
    raise AssertionError("too many test processes at the same time")


PORTS = own_ports()


def free_port() -> int:
    """Return a free port, for a server that needs one in advance."""
    for port in PORTS:
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port
    raise AssertionError("unreachable")


for each in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(each) is signal.SIG_IGN:  # by nohup or &: the programs that are started would ignore it, too
        signal.signal(each, lambda *_: None)


def parent(pid: int) -> int:
    """Return the keeper of a worker: a consumer is the parent of the process that runs its tasks."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


class Place:
    """A working folder with the programs running in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.children: list[subprocess.Popen] = []
        self._queues: list[pqueue.PersistentQInterface] = []

    def queue(self, **options):
        queue = pqueue.PersistentQSQLite(self.folder / "var/queue.db", **options)
        self._queues.append(queue)
        return queue

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def command(self, program: str, *arguments: object) -> list[str]:
        """A program of ours by its file, or a module by "-m"."""
        return [sys.executable, program if program == "-m" else str(ROOT / program), *map(str, arguments)]

    def environment(self, **variables: str) -> dict[str, str]:
        names = ("PQUEUE_URL", "PQUEUE_DURABILITY", "PQUEUE_FILES", "SUPERVISOR_PROCESS_NAME")
        here = {k: v for k, v in os.environ.items() if k not in names}
        return {**here, "PYTHONWARNINGS": "error", **variables}

    def start(self, program: str, *arguments: object, **variables: str) -> subprocess.Popen:
        """Start a program; its output goes to a file of its own, read by `output`."""
        return self.start_command(self.command(program, *arguments), **variables)

    def start_command(self, command: list[str], **variables: str) -> subprocess.Popen:
        out = self.folder / f"out-{len(self.children)}"
        with out.open("w") as file:
            child = subprocess.Popen(
                command, cwd=self.folder, env=self.environment(**variables), stdout=file, stderr=subprocess.STDOUT
            )
        child.out = out
        self.children.append(child)
        return child

    def run(self, program: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(program, *arguments),
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )

    def dashboard(self, **variables: str) -> str:
        """Start ops.py on a port that the kernel chooses, and return its address."""
        child = self.start("ops.py", "--port", 0, **variables)
        return wait_until(lambda: re.search(r"dashboard at (\S+)\n", child.out.read_text()))[1]

    def close(self) -> None:
        for child in self.children:
            if child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.kill()
            child.wait()
        for queue in self._queues:
            queue.close()


@pytest.fixture(autouse=True)
def tidy():
    """Before all other fixtures of a test, so after them at its end."""
    with nothing_left():
        yield


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    place.close()
