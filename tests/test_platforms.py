"""What there is without the means of POSIX, as on Windows, and that macOS gets its own sync. Both are simulated."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until

import pqueue_files

# Load the standard library as it is here, take away what Windows lacks, then run what the arguments name.
WINDOWS = """
import os, runpy, sys
for name in sys.stdlib_module_names - {"antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter"}:
    if not name.startswith("_"):
        try:
            __import__(name)
        except ImportError:
            pass
import concurrent.futures.thread, http.client, http.server, importlib.util, multiprocessing.popen_spawn_posix
import pathlib, select, signal, socket, sqlite3, urllib.parse, xmlrpc.client
try:
    import typer, typer.main
except ImportError:
    pass
for module, names in {
    os: "O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_CLOEXEC mkfifo fork register_at_fork killpg setsid uname sysconf fchmod "
        "getuid geteuid getgid",
    signal: "SIGHUP SIGALRM SIGKILL SIGSTOP SIGCONT SIGQUIT SIGUSR1 SIG_BLOCK pthread_kill pthread_sigmask setitimer "
        "alarm",
    sys.modules["_signal"]: "SIGHUP SIGALRM SIGKILL SIGSTOP SIGCONT pthread_kill pthread_sigmask setitimer",
    select: "poll epoll",
    socket: "AF_UNIX",
}.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "posix"):
    sys.modules[name] = None
for name in ("open", "unlink", "rename", "stat", "link", "mkdir"):
    os.supports_dir_fd.discard(getattr(os, name))
pathlib.WindowsPath = pathlib.PosixPath  # else no path at all could be made here
sys.platform, os.name = "win32", "nt"
sys.path.insert(0, ROOT)
"""

LIBRARY = """
import pqueue, time
queue = pqueue.open_queue()
assert queue.enqueue("a", {"n": 1}) == 1
assert queue.enqueue_many("a", [2, 3]) == [2, 3]
job = queue.dequeue("w")
queue.update(job, progress=0.5, result="half")
queue.extend(job)
queue.complete(job, "done")
queue.fail(queue.dequeue("w"), "no", retry=False)
queue.release(queue.dequeue("w"))
queue.resubmit(2)
assert queue.wait(0.01, consumer="w")
assert [each["state"] for each in queue.consumers()] == ["running"]
queue.backup("copy.db")
assert queue.check()["problems"] == []
lost = queue.dequeue("w", lease_seconds=1, now=1e9 + time.time())
assert queue.dequeue("x", now=2e9 + time.time()).id == lost.id
queue.close()
print(pqueue.open_queue("copy.db").stats()["states"]["completed"])
"""


def on_windows(place, code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WINDOWS.replace("ROOT", repr(str(ROOT))) + code],
        cwd=place.folder,
        env=place.environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


def program(name, *arguments):
    run = "run_path(sys.argv[0]" if name.endswith(".py") else f"run_module({name!r}, alter_sys=True"
    return f"sys.argv = {[str(ROOT / name), *arguments]!r}\nrunpy.{run}, run_name='__main__')"


def test_library_works_without_the_locks_and_signals_of_posix(place):
    done = on_windows(place, LIBRARY)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


@pytest.mark.parametrize("name", ["consumer.py", "producer.py", "admin.py", "manager.py", "ops.py", "bench"])
def test_program_shows_its_help_on_windows(place, name):
    done = on_windows(place, program(name, "--help"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout.lower()


@pytest.mark.parametrize(
    "command",
    [
        ("consumer.py",),
        ("producer.py", "--count", "1"),
        ("manager.py", "--list"),
        ("bench", "--quick"),
        ("admin.py", "torture"),
        ("admin.py", "replay", "1"),
        ("admin.py", "delete-job-files", "--directory", "."),
    ],
    ids=" ".join,
)
def test_program_that_needs_posix_says_so_in_one_line_on_windows(place, command):
    place.queue().close()
    done = on_windows(place, program(*command))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{command[0]}: cannot ")
    assert done.stderr.count("\n") == 1
    assert "win32" in done.stderr


@pytest.mark.parametrize(
    "command", [("enqueue", "a"), ("list-jobs",), ("doctor",), ("monitor", "--once"), ("backup", "b.db")], ids=" ".join
)
def test_operator_can_use_the_command_line_on_windows(place, command):
    place.queue().close()
    done = on_windows(place, program("admin.py", *command))
    assert (done.returncode, done.stderr) == (0, "")


def test_operator_sees_the_page_of_a_job_with_a_file_on_windows(place):
    place.queue().enqueue("prepend_timestamp", {"file": "job_1.txt"})
    code = "from pqueue_tools.dashboard import *\ncache = FigureCache()\nprint(cache.job(1)['file'])\ncache.close()"
    done = on_windows(place, code)
    assert (done.returncode, done.stdout.startswith("(cannot read it: cannot run on win32")) == (0, True), done.stderr


def test_file_is_synced_to_the_medium_where_the_system_can(monkeypatch, tmp_path):
    """On macOS fsync leaves what was written in the drive's cache."""
    synced = []
    monkeypatch.setattr(pqueue_files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(
        pqueue_files.fcntl, "fcntl", lambda file, command: synced.append((os.fstat(file).st_ino, command))
    )
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, "fsync")))
    pqueue_files.sync(tmp_path)
    assert synced == [(tmp_path.stat().st_ino, 51)]
    synced.clear()
    monkeypatch.setattr(pqueue_files.fcntl, "fcntl", lambda *_: os.open("", 0))  # on a file system that cannot
    pqueue_files.sync(tmp_path)
    assert synced == [(tmp_path.stat().st_ino, "fsync")]


def test_no_program_syncs_past_the_means_of_macos():
    """Whatever syncs a file does it through `pqueue_files.sync_file`; bench/run.py measures the plain ones."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("pqueue_tools/*.py"), *ROOT.glob("bench/*.py")):
        expected = {"pqueue_files.py": 1, "run.py": 2}.get(path.name, 0)
        assert len(re.findall(r"os\.f(?:data)?sync\(", path.read_text())) == expected, path.name


def test_dashboard_without_streamlit_says_what_to_install_and_serves_the_page(place):
    place.write("hidden/sitecustomize.py", "import sys; sys.modules['streamlit'] = None")
    child = place.start("ops.py", "--streamlit", "--port", 0, PYTHONPATH=str(place.folder / "hidden"))
    said = wait_until(lambda: (text := child.out.read_text()).count("\n") == 2 and text)
    assert "ops.py: no Streamlit 1.55 or newer is installed, so this is the page without it" in said
    assert "dashboard at http://127.0.0.1:" in said


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.modules['sqlalchemy.dialects.postgresql.psycopg'] = None",
        "import psycopg; del psycopg.RawCursor",
    ],
    ids=["sqlalchemy", "psycopg"],
)
def test_program_says_in_one_line_that_a_package_for_postgresql_is_too_old(place, code):
    place.write("hidden/sitecustomize.py", code)
    for program in (["consumer.py"], ["admin.py", "stats"]):
        done = place.run(*program, PQUEUE_URL="postgresql://h/d", PYTHONPATH=str(place.folder / "hidden"))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "pip install -U SQLAlchemy 'psycopg[binary]'" in done.stderr


@pytest.mark.parametrize("program", ["admin", "consumer", "manager", "ops", "producer"])
def test_program_says_in_one_line_that_python_is_too_old(program):
    code = f"import runpy, sys; sys.version_info = (3, 9, 18); runpy.run_path({program + '.py'!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    version = sys.version.split()[0]
    assert (done.returncode, done.stderr) == (1, f"pqueue: expected Python 3.10 or newer, got {version}\n")


def test_library_says_that_python_is_too_old():
    code = "import sys; sys.version_info = (3, 9, 18); import pqueue"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stderr.splitlines()[-1].startswith("ImportError: pqueue: expected Python 3.10 or newer, got ")
