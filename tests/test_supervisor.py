"""The system as a whole under a real Supervisor."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from conftest import PATIENCE_SECONDS, ROOT, Place, free_port, wait_until

from pqueue_tools import supervisor, termination

BIN = Path(sys.executable).parent
NAMES = ("consumer_00", "consumer_01", "consumer_02")
FILES = (*(path.name for path in ROOT.glob("*.py")), "pqueue_tools", "supervisord.conf", "Procfile", ".streamlit")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A checkout's copy in which to run it."""
    for name in FILES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PQUEUE_OPS_PORT", str(free_port()))
    for folder in ("var/log", "var/supervisor.d"):
        (tmp_path / folder).mkdir(parents=True)
    place = Place(tmp_path)
    yield place
    for child in place.children:  # let it stop what it has started
        child.terminate()
        child.wait(PATIENCE_SECONDS)
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


def started(place, *command, umask=-1, **variables):
    with (place.folder / "out").open("w") as out:
        child = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            cwd=place.folder,
            env=environment(**variables),
            stdout=out,
            stderr=out,
            umask=umask,
        )
    child.out = place.folder / "out"
    place.children.append(child)
    return child


def queue_of(place):
    """Return the queue that the programs of the place have made."""
    wait_until((place.folder / "var/queue.db").exists)
    return place.queue()


def completed_files(queue):
    return queue.list_jobs(state="completed", task="prepend_timestamp")


def states_of(queue):
    """Return the states of the consumers by name: RUNNING is what Supervisor says of a Python that begins."""
    states = {}
    for each in queue.consumers():
        states.setdefault(each["name"], []).append(each["state"])
    return states


def everything_runs(place, queue):
    """Wait until Supervisor's programs run and each consumer has begun to work; return their pids."""
    wait_until(lambda: states_of(queue) == dict.fromkeys(NAMES, ["running"]))
    return wait_until(lambda: len(found := running(place)) == 5 and found)


def is_gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_supervisor_runs_it_all_and_leaves_nothing_behind(system):
    supervisor = started(system, "supervisord", "-n", "-c", "supervisord.conf")
    names = {"producer", "ops", "consumer:consumer_00", "consumer:consumer_01", "consumer:consumer_02"}
    queue = queue_of(system)
    pids = everything_runs(system, queue)
    assert set(pids) == names
    job = wait_until(lambda: completed_files(queue))[0]
    text = (system.folder / "var/files" / job.payload["file"]).read_text()
    assert all(line.startswith(job.result["timestamp"]) for line in text.splitlines())
    assert job.consumer in NAMES

    os.kill(pids["consumer:consumer_01"], signal.SIGKILL)
    wait_until(lambda: running(system).get("consumer:consumer_01") not in (None, pids["consumer:consumer_01"]))
    wait_until(lambda: states_of(queue)["consumer_01"] == ["running", "dead"])
    assert "stopped" in control(system, "-c", "supervisord.conf", "stop", "consumer:consumer_00")
    assert set(running(system)) == names - {"consumer:consumer_00"}

    pids = running(system)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(PATIENCE_SECONDS) == 0
    wait_until(lambda: all(is_gone(pid) for pid in pids.values()))
    assert (system.folder / "var/log/consumer_01.log").read_text().count("started consumer=consumer_01") == 2
    modes = {path.name: path.stat().st_mode & 0o777 for path in (system.folder / "var").glob("queue.db*")}
    assert set(modes.values()) <= {0o600, 0o700}


def test_no_process_outlives_a_killed_supervisor(system):
    killed = started(system, "supervisord", "-n", "-c", "supervisord.conf")
    queue = queue_of(system)
    first = everything_runs(system, queue)
    killed.kill()
    killed.wait()
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    wait_until(lambda: set(first) <= set(running(system)))
    wait_until(lambda: all(map(is_gone, first.values())))
    wait_until(lambda: states_of(queue) == dict.fromkeys(NAMES, ["running", "stopped"]))
    assert "run under the name" not in system.run("admin.py", "doctor").stdout


def open_to_others(path):
    """Yield what another account can read here and below, if it gets as far."""
    with suppress(FileNotFoundError):  # programs at work make files and take them away
        mode = path.lstat().st_mode & 0o777
        if mode & 0o044:
            yield f"{path} {mode:o}"
        if path.is_dir() and mode & 0o011:
            for each in path.iterdir():
                yield from open_to_others(each)


@pytest.fixture
def cloned(system, request):
    """Leave the folders as git does under the umask."""
    for folder in ("var", "var/log", "var/supervisor.d"):
        (system.folder / folder).chmod(0o777 & ~request.param)
    return system, request.param


@pytest.mark.parametrize("cloned", [0o022, 0], indirect=True)
@pytest.mark.parametrize("daemon", [False, True])
def test_other_account_can_read_nothing_whatever_the_umask(cloned, daemon):
    system, umask = cloned
    started(system, "supervisord", *([] if daemon else ["-n"]), "-c", "supervisord.conf", umask=umask)
    try:
        queue = queue_of(system)
        everything_runs(system, queue)
        wait_until(lambda: completed_files(queue))
        assert manage(system, "--count", "1", "--size", "1").stdout == "added consumer2: 1 consumer\n"
        for folder in ("var", "var/log"):
            assert list(open_to_others(system.folder / folder)) == []
        assert "Permission" not in "".join(path.read_text() for path in (system.folder / "var/log").glob("*.log"))
    finally:
        pid = int((system.folder / "var/supervisord.pid").read_text())
        control(system, "shutdown")
        wait_until(lambda: is_gone(pid) or not daemon)


@pytest.mark.parametrize("cloned", [0o022, 0, 0o007], indirect=True)
def test_program_begins_when_its_log_is_closed_to_others_but_not_to_a_group_that_was_let_in(cloned):
    system, umask = cloned
    fake = system.write("bin/python3", "#!/bin/sh\necho $(stat -c %a var var/log) $(umask) >> modes\nexec sleep 600\n")
    fake.chmod(0o700)
    (fake.parent / "streamlit").symlink_to(fake)
    path = f"{fake.parent}:{os.environ['PATH']}"
    started(system, "supervisord", "-n", "-c", "supervisord.conf", umask=umask, PATH=path)
    modes = wait_until(lambda: (found := (system.folder / "modes")).exists() and found.read_text().splitlines()[4:])
    closed = "770 770" if umask == 0o007 else "700 700"
    assert set((system.folder / "modes").read_text().splitlines()) == {f"{closed} 0077"}, modes


def manage(place, *arguments):
    return subprocess.run(
        [sys.executable, "manager.py", *arguments], cwd=place.folder, env=environment(), capture_output=True, text=True
    )


def test_manager_reads_each_part_of_a_log_once(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "LOGS", tmp_path)
    path, log = tmp_path / "consumer2_00.log", supervisor.StartLog("consumer2_00")
    assert not log.says_that_it_started(7)
    path.write_text("2026 started consumer=consumer2_00 pid=6 database=/q.db\n" + "x" * 9000 + "\n2026 started consu")
    assert (log.says_that_it_started(6), log.says_that_it_started(7)) == (True, False)
    with path.open("r+") as file:  # what was read is not read again
        file.write("y" * 9000)
        file.seek(0, os.SEEK_END)
        file.write("mer=consumer2_00 pid=7 database=/q.db\n")
    assert (log.says_that_it_started(6), log.says_that_it_started(7)) == (True, True)
    path.write_text("2026 started consumer=consumer2_00 pid=8 database=/q.db\n")  # supervisord has begun another
    assert log.says_that_it_started(8)


def test_manager_adds_and_removes_consumers_while_others_run(system):
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    queue = queue_of(system)
    first = everything_runs(system, queue)
    done = manage(system, "--count", "1", "--queue", "default", "--queue", "50% off")
    assert (done.returncode, done.stdout) == (0, "added consumer2: 3 consumers\n"), done.stderr
    added = {f"consumer2:consumer2_0{number}" for number in range(3)}
    everything = wait_until(lambda: len(found := running(system)) == 8 and found)
    assert set(everything) == set(first) | added
    assert {name: everything[name] for name in first} == first
    names = {name.split(":")[1] for name in everything if "consumer" in name}
    wait_until(lambda: set(states_of(queue)) == names)

    def all_have_worked():
        queue.enqueue_many("prepend_timestamp", [{"file": "absent"}] * 30, max_attempts=1)
        return {job.consumer for job in failing_jobs(queue)} >= names

    wait_until(all_have_worked)
    assert {tuple(each["queues"] or ()) for each in queue.consumers()} == {(), ("default", "50% off")}

    done = manage(system, "--remove", "consumer2")
    assert (done.returncode, done.stdout) == (0, "removed consumer2\n")
    assert running(system) == first
    wait_until(lambda: {(job.state, job.attempts) for job in failing_jobs(queue)} == {("failed", 1)})
    assert [path.name for path in (system.folder / "var/supervisor.d").iterdir()] == []


def test_manager_removes_a_new_group_whose_consumers_do_not_run(system):
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    before = everything_runs(system, queue_of(system))
    done = manage(system, "--count", "2", "--import", "no_such_module")
    reason = "consumer.py: cannot import 'no_such_module': No module named 'no_such_module': expected it in .*"
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert re.fullmatch(rf"manager.py: cannot add consumer2, .*: consumer2_0\d ended: {reason}\n", done.stderr)

    system.write("late.py", "import time\ntime.sleep(5)\nimport no_such_module\n")  # when it has been RUNNING
    done = manage(system, "--count", "1", "--size", "1", "--import", "late")
    assert (done.returncode, done.stdout) == (1, "")
    assert "consumer2_00 ended: consumer.py: cannot import 'late'" in done.stderr

    system.write("slow.py", "import time\ntime.sleep(600)\n")
    with subprocess.Popen(
        [sys.executable, "manager.py", "--count", "1", "--import", "slow"], cwd=system.folder
    ) as child:
        wait_until(lambda: "consumer2:consumer2_00" in control(system, "status"))
        child.send_signal(signal.SIGINT)
    assert child.returncode == 128 + signal.SIGINT
    assert running(system) == before
    assert "consumer2" not in control(system, "status")
    assert list((system.folder / "var/supervisor.d").iterdir()) == []


@pytest.mark.parametrize(("restarts", "is_removed"), [(0, True), (2, True), (99, False)])
def test_manager_removes_a_group_although_one_of_its_processes_is_started_again(monkeypatch, restarts, is_removed):
    refused = [supervisor.ManagerError("supervisord refused removeProcessGroup: STILL_RUNNING: consumer2")] * restarts
    info = {"group": "consumer2", "name": "consumer2_00", "statename": "STARTING", "pid": 7, "now": 1, "start": 1}
    there, stops = [info], []

    def call(method, *_, **__):
        stops.extend(["stop"] * (method == "stopProcessGroup"))
        if method == "removeProcessGroup":
            if refused:
                raise refused.pop()
            there.clear()
        return list(there)

    monkeypatch.setattr(supervisor, "call", call)
    with nullcontext() if is_removed else pytest.raises(supervisor.ManagerError, match="STILL_RUNNING"):
        supervisor._stop_group("consumer2")
    assert (there, len(stops)) == (([], restarts + 1) if is_removed else ([info], 5))


def test_manager_waits_for_a_busy_supervisord_until_a_group_has_started(tmp_path, monkeypatch):
    def call(method, *_, seconds=supervisor.CALL_SECONDS):
        if (method, seconds) == ("getAllProcessInfo", supervisor.CALL_SECONDS):
            raise supervisor.ManagerError("no answer")
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "call", call)
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.0)
    with pytest.raises(supervisor.ManagerError, match="no answer"):
        supervisor.add_group()


def test_manager_that_is_ended_as_it_adds_a_group_leaves_no_file(tmp_path, monkeypatch):
    create = supervisor._create

    def create_and_end(path, text):
        created = create(path, text)
        os.kill(os.getpid(), signal.SIGTERM)
        return created

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervisor, "_create", create_and_end)
    monkeypatch.setattr(supervisor, "call", lambda *_, **__: [])
    with pytest.raises(SystemExit), termination.ExitOnSignal():
        supervisor.add_group()
    assert list((tmp_path / "var/supervisor.d").iterdir()) == []


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("first\nlast\n", "last"),
        ("first\nsegmentation fault", "segmentation fault"),
        ("", "var/log/c.log is empty"),
        (None, "cannot read var/log/c.log: No such file or directory"),
    ],
)
def test_manager_shows_the_last_line_of_a_log_or_why_there_is_none(tmp_path, monkeypatch, log, shown):
    monkeypatch.chdir(tmp_path)
    supervisor.LOGS.mkdir(parents=True)
    if log is not None:
        (supervisor.LOGS / "c.log").write_text(log)
    assert supervisor._last_log_line("c") == shown


def test_system_refuses_a_port_that_another_project_uses(system):
    port = os.environ["PQUEUE_OPS_PORT"]
    done = system.run("ops.py", "--check")
    assert (done.returncode, done.stdout) == (0, f"dashboard at http://127.0.0.1:{port}\n")
    with socket.create_server(("127.0.0.1", int(port))):
        for arguments in ([], ["--check"], ["--streamlit"]):
            done = system.run("ops.py", *arguments)
            sentence = f"ops.py: port {port} is in use: set PQUEUE_OPS_PORT to another port\n"
            assert (done.returncode, done.stdout, done.stderr) == (1, "", sentence)


def test_manager_writes_a_configuration_for_tasks_of_the_users_own(system):
    folder = system.folder / "a 'project'"
    system.write(f"{folder.name}/tasks.py", "import pqueue\n@pqueue.task()\ndef mine(job):\n    return 7\n")
    mine = Place(folder)
    program = str(system.folder / "manager.py")
    name = 'it\'s 50% "off" \\ $HOME `pwd`'
    done = mine.run(program, "--init", "--import", "tasks", "--queue", name, "--concurrency", 4)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    text = (folder / "supervisord.conf").read_text()
    assert (text.count(sys.executable), "looked up on PATH" in text) == (2, False)
    assert text.count("--concurrency 4") == 1
    done = mine.run(program, "--init")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "it already exists" in done.stderr
    queue = mine.queue()
    job = queue.enqueue("mine", queue=name)
    child = started(mine, "supervisord", "-n", "-c", "supervisord.conf")
    wait_until(lambda: queue.get(job).result == 7)
    wait_until(lambda: set(running(mine)) == {"ops", *(f"consumer:{name}" for name in NAMES)})
    child.terminate()
    assert child.wait(PATIENCE_SECONDS) == 0
    mine.close()


def failing_jobs(queue):
    return queue.list_jobs(text="absent", limit=1_000_000)


def test_added_group_is_there_again_after_a_restart_of_supervisor(system):
    supervisor = started(system, "supervisord", "-n", "-c", "supervisord.conf")
    wait_until(lambda: len(running(system)) == 5)
    assert manage(system, "--count", "2", "--size", "1").returncode == 0
    wait_until(lambda: len(running(system)) == 7)
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(PATIENCE_SECONDS) == 0
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    wait_until(lambda: {"consumer2:consumer2_00", "consumer3:consumer3_00"} <= set(running(system)))
    assert "consumer2_00" in manage(system, "--list").stdout
    assert manage(system, "--stop", "consumer2_00").stdout == "stopped consumer2_00\n"
    assert "consumer2:consumer2_00" not in running(system)
    assert manage(system, "--start", "consumer2_00").stdout == "started consumer2_00\n"


def test_manager_starts_a_consumer_or_says_why_it_has_ended(system):
    path = system.folder / "supervisord.conf"
    path.write_text(path.read_text().replace("python3 consumer.py", "python3 consumer.py --log-level warning --name w"))
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    queue = queue_of(system)
    wait_until(lambda: len(running(system)) == 5)
    assert manage(system, "--stop", "consumer_00").returncode == 0
    done = manage(system, "--start", "consumer_00")
    assert (done.returncode, done.stdout) == (0, "started consumer_00\n"), done.stderr
    pid = running(system)["consumer:consumer_00"]
    assert pid in [each["pid"] for each in queue.consumers() if each["state"] == "running"]

    assert manage(system, "--stop", "consumer_00").returncode == 0
    system.write("consumer.py", "import sys, time\ntime.sleep(4)\nsys.exit('no such table')\n")  # when it is RUNNING
    done = manage(system, "--start", "consumer_00")
    assert (done.returncode, done.stdout) == (1, "")
    reason = "cannot start consumer_00: consumer_00 ended: no such table; supervisord tries again until"
    assert done.stderr.startswith(f"manager.py: {reason} "), done.stderr


def test_manager_reports_problems_in_one_line(system):
    done = manage(system, "--list")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "start it with supervisord -c supervisord.conf" in done.stderr
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    before = everything_runs(system, queue_of(system))
    for arguments, code, message in [
        (["--remove", "consumer"], 1, "expected an added group, got 'consumer'; there are: none"),
        (["--remove", "../../etc"], 1, "expected an added group"),
        (["--stop", "nobody"], 1, "expected one of consumer:consumer_00"),
        (["--count", "1", "--queue", "a ;b"], 2, "without ; # or %("),
        (["--count", "0"], 2, "expected a whole number from 1 to 1000, got '0'"),
        ([], 2, "one of the arguments"),
    ]:
        done = manage(system, *arguments)
        assert (done.returncode, message in done.stderr) == (code, True), done
        assert "Traceback" not in done.stderr
    assert running(system) == before


def test_monitor_shows_what_supervisor_runs(system):
    started(system, "supervisord", "-n", "-c", "supervisord.conf")
    everything_runs(system, queue_of(system))
    done = subprocess.run(
        [sys.executable, "admin.py", "monitor", "--once"],
        cwd=system.folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("producer ")] == ["RUNNING"]
    assert "consumer_02  running" in done.stdout


def test_honcho_runs_the_same_programs(system):
    honcho = started(system, "honcho", "start", "-c", "consumer=2")
    queue = queue_of(system)
    wait_until(lambda: honcho.out.read_text().count("started consumer=") == 2 and completed_files(queue))
    honcho.send_signal(signal.SIGINT)
    honcho.wait(PATIENCE_SECONDS)
    out = honcho.out.read_text()
    assert "producer.1" in out
    assert out.count("stopped consumer=") == 2
