"""Send each program a termination signal at any moment of its life: no traceback, and the usual exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until

MOMENTS = 12 * int(os.environ.get("PQUEUE_SOAK", "1"))

# Run the program as Python does, and say when it has done what comes first in it.
LAUNCH = """
import os, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
__file__ = sys.argv[0]
from pqueue_tools import termination

def say_ready(first=termination.reset_sigint):
    first()
    os.write(1, b"ready\\n")

termination.reset_sigint = say_ready
with open(__file__, encoding="utf-8") as file:
    exec(compile(file.read(), __file__, "exec", dont_inherit=True))
"""

COMMANDS = [
    ("consumer.py", "--import", "slow_to_import", "--drain"),
    ("producer.py", "--count", "3", "--interval", "0.02"),
    ("admin.py", "stats"),
    ("admin.py", "backup", "copy.db"),
    ("admin.py", "monitor", "--once"),
    ("manager.py", "--list"),
    ("ops.py", "--port", "0"),
    ("bench/__main__.py", "--help"),
]
# A signal handler that raises while a file is being opened leaves it to the garbage collector, and no user sees that.
WARNINGS = "error,ignore::ResourceWarning"
ENDLESS_SECONDS = 0.8  # to look at the dashboard for


SLOW_TO_IMPORT = """
import time
from pqueue import task

time.sleep(0.1)

@task()
def nothing():
    pass
"""


@pytest.fixture
def begun(place):
    place.write("slow_to_import.py", SLOW_TO_IMPORT)
    assert place.run("producer.py", "--count", 1).returncode == 0
    return place


def launched(place, program, *arguments):
    child = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ROOT / program), *arguments],
        cwd=place.folder,
        env=place.environment(PYTHONUNBUFFERED="1", PYTHONWARNINGS=WARNINGS, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    place.children.append(child)
    assert child.stdout.read1(6) == b"ready\n"
    return child


def terminated(place, command, number, seconds):
    """Run the command, send the signal after so many seconds, and return its exit code and output."""
    child = launched(place, *command)
    time.sleep(seconds)  # a moment to try, and not a wait for something
    child.send_signal(number)
    out, error = child.communicate(timeout=PATIENCE_SECONDS)
    (place.folder / "copy.db").unlink(missing_ok=True)
    return child.returncode, (out + error).decode()


def length(place, command):
    if command[0] == "ops.py":
        return ENDLESS_SECONDS
    began = time.monotonic()
    launched(place, *command).communicate(timeout=PATIENCE_SECONDS)
    (place.folder / "copy.db").unlink(missing_ok=True)
    return time.monotonic() - began


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_program_signalled_at_any_moment_ends_quietly(begun, command):
    seconds = length(begun, command)
    moments = [(signal.SIGINT, seconds * at / MOMENTS) for at in range(MOMENTS)]
    moments += [(number, seconds * at / 4) for at in range(1, 4) for number in (signal.SIGTERM, signal.SIGHUP)]
    with ThreadPoolExecutor(1 if "backup" in command else 2) as pool:
        ends = pool.map(lambda moment: (*moment, *terminated(begun, command, *moment)), moments)
        for number, at, code, said in ends:
            assert code in (0, -number, 128 + number, int(command[0] == "manager.py")), (number, at, code, said)
            assert "Traceback" not in said, (number, at, said)
            assert "Exception" not in said, (number, at, said)


def test_interrupted_torture_leaves_neither_process_nor_folder(begun):
    child = launched(begun, "admin.py", "torture", "--seconds", "600")
    wait_until(lambda: list((begun.folder / "var").glob("torture-*/*.acknowledged")))
    os.killpg(child.pid, signal.SIGINT)
    out, error = child.communicate(timeout=PATIENCE_SECONDS)
    assert (child.returncode, error) == (130, b""), out
    assert list((begun.folder / "var").glob("torture-*")) == []
    wait_until(lambda: not is_group(child.pid))


def test_first_process_of_torture_ignores_ctrl_c():
    program = """if True:
        import re, shutil, time
        from pqueue_tools import torture
        torture.consume = lambda *_: time.sleep(60)
        run = torture.Torture(None, "full")
        run._start("consumer0")
        print(re.search(r"SigBlk:\\s(.*)", open(f"/proc/{run._children['consumer0'].pid}/status").read())[1])
        run._end()
        shutil.rmtree(run.folder)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout, 16) >> (signal.SIGINT - 1) & 1, (done.stdout, done.stderr)


def is_group(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_move_resumes_the_queues(begun, number):
    queue = begun.queue()
    queue.dequeue("w")  # which move waits for
    child = launched(begun, "admin.py", "move", "--to", "new.db")
    wait_until(lambda: queue.stats()["queues"]["default"]["paused"])
    assert child.poll() is None
    child.send_signal(number)
    child.communicate(timeout=PATIENCE_SECONDS)
    assert child.returncode == 128 + number
    assert not queue.stats()["queues"]["default"]["paused"]
