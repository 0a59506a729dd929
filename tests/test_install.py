"""The wheel in a virtual environment of its own, used in a project whose modules have the names of ours."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import PATIENCE_SECONDS, ROOT, Place, free_port, wait_until

from pqueue_tools import dashboard_actions

BIN = Path(sys.executable).parent
COMMANDS = ("pqueue", "pqueue-consumer", "pqueue-manager", "pqueue-ops", "pqueue-producer")
TASKS = """\
import report
from pqueue import Job, task

@task(name="sum_up")
def sum_up(job: Job) -> int:
    return report.total(job.payload)
"""
TYPED = """\
from contextlib import closing
from pqueue import JobId, PersistentQInterface, open_queue, task
from pqueue_sqlite import PersistentQSQLite

with closing(open_queue()) as queue:
    queue.enqueue("sum_up", [1], prioritty=3)
    queue.glance()
    job: int = queue.dequeue("w")
    queue.pause(["default"])
    queue.change_everything()
with closing(PersistentQSQLite("queue.db", durabillity="full")) as other:
    other.check(now="today")
    other.dequeue(consumer="w", lease_second=3)
    other.list_jobs(status="failed")

@task(max_attempts=5)
async def resize(path: str, *, width: int = 200) -> list[int]:
    return [width]

resize.enqueue(5)
resize.using(priority=5).enqueue("a.png", widht=5)
text: JobId[str] = resize.enqueue("a.png")
resize.using(prioritty=5)
sizes: list[int] = resize.enqueue("a.png", width=100).result(timeout_seconds=10)
size: int = resize.enqueue("a.png", width=100).result()
"""
FAULTS = {
    6: 'Unexpected keyword argument "prioritty"',
    7: 'has no attribute "glance"',
    8: "Incompatible types in assignment",
    9: 'has incompatible type "list[str]"',
    10: 'has no attribute "change_everything"',
    11: 'Unexpected keyword argument "durabillity"',
    12: 'Unexpected keyword argument "now"',
    13: 'Unexpected keyword argument "lease_second"',
    14: 'Unexpected keyword argument "status"',
    20: 'No overload variant of "enqueue"',
    21: 'No overload variant of "enqueue"',
    22: "Incompatible types in assignment",
    23: 'Unexpected keyword argument "prioritty"',
    25: "Incompatible types in assignment",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the commands of a new virtual environment that holds the wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    offline = ["--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, ROOT], check=True)
    (wheel,) = folder.glob("pqueue_sqlite-*.whl")
    subprocess.run([*pip, "--python", folder / "venv/bin/python", "install", *offline, wheel], check=True)
    return folder / "venv/bin"


class Project(Place):
    """A project with modules of its own."""

    def __init__(self, folder, commands):
        super().__init__(folder)
        self.commands = commands
        self.write("tasks.py", TASKS)
        self.write("report.py", "def total(numbers: list[int]) -> int:\n    return sum(numbers)\n")
        for name in ("admin", "web", "commands", "consumer", "queue", "calendar"):
            self.write(f"{name}.py", "raise ImportError('this is a module of the project')\n")

    def command(self, program, *arguments):
        return [str(self.commands / program), *map(str, arguments)]


@pytest.fixture
def project(tmp_path, installed):
    project = Project(tmp_path, installed)
    yield project
    project.close()


def test_wheel_adds_only_names_that_begin_with_pqueue(installed):
    (folder,) = installed.parent.glob("lib/python*/site-packages")
    names = {path.name for path in folder.iterdir()}
    assert {path.stem for path in ROOT.glob("pqueue*.py")} | {"pqueue_tools"} < names
    assert [name for name in names if not name.startswith("pqueue")] == []
    assert [name for name in names if not (folder / name / "py.typed").exists()] == ["pqueue_sqlite-0.1.0.dist-info"]
    assert sorted(path.name for path in installed.glob("pqueue*")) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_shows_its_help_in_a_project_with_modules_of_the_same_names(project, command):
    done = project.run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {command} " in done.stdout


def test_bash_completes_the_installed_command(project):
    project.run("pqueue-producer", "--count", 1, "--interval", 0)
    script = """
eval "$(pqueue completion)"
COMP_WORDS=(pqueue pause d); COMP_CWORD=2
_pqueue
echo "${COMPREPLY[@]}"
"""
    environment = project.environment(PATH=f"{project.commands}:{os.environ['PATH']}")
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=project.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert (done.stdout, done.stderr) == ("default\n", "")


def test_project_uses_the_queue_with_its_own_modules(project):
    assert project.run("pqueue-producer", "--count", 1, "--interval", 0).returncode == 0
    done = project.run("pqueue", "enqueue", "sum_up", "[3, 4]", "--queue", "sums")
    assert done.returncode == 0, done.stderr
    done = project.run("pqueue-consumer", "--import", "tasks", "--queue", "sums", "--drain")
    assert done.returncode == 0, done.stderr
    done = project.run("pqueue-consumer", "--queue", "default", "--drain")
    assert done.returncode == 0, done.stderr
    jobs = {job.task: job for job in project.queue().list_jobs()}
    assert {task: job.state for task, job in jobs.items()} == {"sum_up": "completed", "prepend_timestamp": "completed"}
    assert jobs["sum_up"].result == 7
    child = project.start("pqueue-ops", "--port", 0)
    address = wait_until(lambda: re.search(r"dashboard at (\S+)\n", child.out.read_text()))[1]
    assert b"sum_up" in urllib.request.urlopen(f"{address}/jobs", timeout=PATIENCE_SECONDS).read()
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()
    assert "Traceback" not in child.out.read_text()


def test_pytest_finds_the_fixtures_of_an_installed_copy(installed):
    """The plugin is registered; tests/test_testing.py runs its fixtures."""
    program = "from importlib.metadata import entry_points as e; print(*e(group='pytest11', name='pqueue'))"
    done = subprocess.run([installed / "python", "-c", program], check=True, capture_output=True, text=True)
    assert "'pqueue_tools.pytest_plugin'" in done.stdout
    subprocess.run([installed / "python", "-c", "import pqueue_tools.testing, pqueue_fields"], check=True)


def test_messages_of_an_installed_copy_name_its_commands(project):
    project.run("pqueue-producer", "--count", 1, "--interval", 0)
    assert project.run("pqueue", "why", 1).stdout == "job 1: no consumer is alive: run pqueue-consumer\n"
    assert "pqueue move --to" in project.run("pqueue", "restore", "x", "--yes", PQUEUE_URL="postgresql://h/d").stderr
    for program in COMMANDS:
        done = project.run(program, "--no-such-option")
        assert (done.returncode, done.stderr.split()[0]) == (2, f"{program}:")
    done = project.run("pqueue-consumer", "--import", "nowhere")
    where = f"expected it in {project.folder}, on PYTHONPATH, or installed for {project.commands / 'python'}"
    assert done.stderr == f"pqueue-consumer: cannot import 'nowhere': No module named 'nowhere': {where}\n"


def test_project_runs_under_supervisor_from_the_configuration_that_the_manager_writes(project, monkeypatch):
    monkeypatch.setenv("PQUEUE_OPS_PORT", port := str(free_port()))
    done = project.run("pqueue-manager", "--init", "--import", "tasks")
    assert done.returncode == 0, done.stderr
    child = project.start_command([str(BIN / "supervisord"), "-n", "-c", "supervisord.conf"], PYTHONWARNINGS="")
    wait_until((project.folder / "var/supervisor.sock").exists)
    done = project.run("pqueue-manager", "--count", 1, "--size", 2, "--import", "tasks", "--queue", "more")
    assert (done.returncode, done.stdout) == (0, "added consumer2: 2 consumers\n"), done.stderr
    queue = project.queue()
    jobs = [queue.enqueue("sum_up", [5, 6], queue=name) for name in ("default", "more")]
    wait_until(lambda: [queue.get(job).result for job in jobs] == [11, 11])
    wait_until(lambda: "dashboard at" in (project.folder / "var/log/ops.log").read_text())
    page = f"http://127.0.0.1:{port}"
    wait_until(lambda: b"consumer2_00" in urllib.request.urlopen(page, timeout=PATIENCE_SECONDS).read())
    monkeypatch.chdir(project.folder)
    assert dashboard_actions.ACTIONS["add_group"](queue, {}, "ada") == "added consumer3: 3 consumers"
    tasks = {each["name"]: each["tasks"] for each in queue.consumers()}
    assert tasks["consumer3_02"] == tasks["consumer_02"] == ["sum_up"]
    done = project.run("pqueue-manager", "--count", 1, "--size", 1)
    assert (done.returncode, done.stdout) == (0, "added consumer4: 1 consumer\n"), done.stderr
    assert {each["name"]: each["tasks"] for each in queue.consumers()}["consumer4_00"] == ["sum_up"]
    done = project.run("pqueue-manager", "--remove", "consumer2")
    assert (done.returncode, done.stdout) == (0, "removed consumer2\n"), done.stderr
    child.send_signal(signal.SIGINT)
    assert child.wait(PATIENCE_SECONDS) == 0


def test_type_checker_reports_a_users_mistakes_against_the_installed_wheel(project):
    project.write("typed.py", TYPED)
    done = subprocess.run(
        [BIN / "mypy", "--strict", "--python-executable", project.commands / "python", "typed.py"],
        cwd=project.folder,
        env={**os.environ, "MYPY_CACHE_DIR": str(project.folder / "cache")},
        capture_output=True,
        text=True,
    )
    found = dict(re.findall(r"^typed\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE))
    assert {*map(int, found)} == {*FAULTS}, done.stdout
    for line, message in FAULTS.items():
        assert message in found[str(line)]
