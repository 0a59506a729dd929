"""The system as a whole under a real Supervisor."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Place, wait_until

BIN = Path(sys.executable).parent
FILES = ("pqueue.py", "producer.py", "consumer.py", "supervisord.conf", "Procfile")


@pytest.fixture
def system(tmp_path):
    """A checkout's copy in which to run it."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("var/log", "var/supervisor.d"):
        (tmp_path / folder).mkdir(parents=True)
    place = Place(tmp_path)
    yield place
    place.close()


def environment(**variables):
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **variables}


def control(place, *arguments):
    done = subprocess.run(
        [str(BIN / "supervisorctl"), *arguments], cwd=place.folder, env=environment(), capture_output=True, text=True
    )
    return done.stdout


def running(place):
    lines = control(place, "status").splitlines()
    return {line.split()[0]: int(line.split()[3].rstrip(",")) for line in lines if " RUNNING " in line}


def started(place, *command):
    with (place.folder / "out").open("w") as out:
        child = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], cwd=place.folder, env=environment(), stdout=out, stderr=out
        )
    child.out = place.folder / "out"
    place.children.append(child)
    return child


def completed_files(place):
    if not (place.folder / "var/queue.db").exists():
        return []
    return place.queue().list_jobs(state="completed")


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_supervisor_runs_it_all_and_leaves_nothing_behind(system):
    supervisor = started(system, "supervisord", "-n", "-c", "supervisord.conf")
    names = {"producer", "consumer:consumer_00", "consumer:consumer_01", "consumer:consumer_02"}
    pids = wait_until(lambda: set(running(system)) == names and running(system))
    job = wait_until(lambda: completed_files(system))[0]
    text = (system.folder / "var/files" / job.payload["file"]).read_text()
    assert all(line.startswith(job.result["timestamp"]) for line in text.splitlines())
    assert job.consumer in {"consumer_00", "consumer_01", "consumer_02"}

    os.kill(pids["consumer:consumer_01"], signal.SIGKILL)
    wait_until(lambda: running(system).get("consumer:consumer_01") not in (None, pids["consumer:consumer_01"]))
    assert "stopped" in control(system, "-c", "supervisord.conf", "stop", "consumer:consumer_00")
    assert set(running(system)) == names - {"consumer:consumer_00"}

    pids = running(system)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(60) == 0
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()))
    assert (system.folder / "var/log/consumer_01.log").read_text().count("started consumer=consumer_01") == 2
    modes = {path.name: path.stat().st_mode & 0o777 for path in (system.folder / "var").glob("queue.db*")}
    assert set(modes.values()) <= {0o600, 0o700}


def test_honcho_runs_the_same_programs(system):
    honcho = started(system, "honcho", "start", "-c", "consumer=2")
    wait_until(lambda: honcho.out.read_text().count("started consumer=") == 2 and completed_files(system))
    honcho.send_signal(signal.SIGINT)
    honcho.wait(60)
    out = honcho.out.read_text()
    assert "producer.1" in out
    assert out.count("stopped consumer=") == 2
