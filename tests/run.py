"""Run checks and tests, two more at a time than there are processors, and show the output of those that fail.

python tests/run.py quick | contract | all [PYTHON …]

quick: format, lint, types, the contract suite on SQLite and the model test. contract: the contract suite on every
backend. all: each file of tests in its own process, and the contract suite and the programs under each PYTHON, bare;
without a PYTHON, the contract suite under pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MEMORY_BYTES = 4 << 30
# What takes longest begins first, and what mostly waits (misbehaviour, concurrency) together with what computes. Two of
# these that need a PostgreSQL server do not begin at once: on a new machine both would add the account that it runs as.
LONGEST = ["mutants", "misbehaviour", "concurrency", "commit_points", "power_loss", "postgres", "browser", "supervisor"]
BARE = """
import sys, runpy
sys.path.insert(0, ".")
sys.argv = ["test_pqueue.py"]
runpy.run_path("test_pqueue.py", run_name="__main__")
"""
# Do the whole work of an example with the programs, and with a task that is one of the user's.
PROGRAMS = """
import pathlib, subprocess, sys, tempfile
from unittest import TestCase

def run(program, *arguments):
    command = [sys.executable, "-S", "-W", "error", str(root / program), *arguments]
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

root = pathlib.Path.cwd()
with tempfile.TemporaryDirectory() as folder:
    tasks = "from pqueue import task\\n\\n@task(timeout_seconds=9)\\ndef double(n: int) -> int:\\n    return 2 * n"
    pathlib.Path(folder, "tasks.py").write_text(tasks)
    run("producer.py", "--count", "3", "--interval", "0")
    run("consumer.py", "--drain")
    run("admin.py", "enqueue", "double", '{"n": 21}')
    run("consumer.py", "--import", "tasks", "--drain", "--concurrency", "2")
    TestCase().assertIn('"result": 42', run("admin.py", "show", "4", "--json"))
    TestCase().assertIn("no problem found", run("admin.py", "doctor"))
print("OK")
"""

Command = list[object]


def quick() -> dict[str, Command]:
    return {
        "contract suite on SQLite": pytest("test_pqueue.py", "-k", "SQLiteContract"),
        "contract suite on SQLite, other tests": pytest("test_pqueue.py", "-k", "not SQLiteContract"),
        "types": [BIN / "mypy"],
        "model test": pytest("tests/test_model.py"),
        "format": [BIN / "ruff", "format", "--check", "."],
        "lint": [BIN / "ruff", "check", "."],
    }


def contract() -> dict[str, Command]:
    return {
        "contract suite on PostgreSQL": pytest("tests/test_postgres.py", "-k", "Contract and not SQLite"),
        "contract suite on SQLite": [sys.executable, "-W", "error", "test_pqueue.py"],
        "contract suite on SQLite through SQLAlchemy": pytest("tests/test_postgres.py", "-k", "OnSQLiteContract"),
    }


def everything(*pythons: str) -> dict[str, Command]:
    first = [ROOT / f"tests/test_{name}.py" for name in LONGEST]
    contract = [] if pythons else [ROOT / "test_pqueue.py"]
    files = [*first, *contract, *sorted(set(ROOT.glob("tests/test_*.py")) - set(first))]
    names = [str(file.relative_to(ROOT)) for file in files]
    bare: dict[str, Command] = {
        f"contract suite, bare, under {python}": [python, "-I", "-S", "-W", "error", "-c", BARE] for python in pythons
    }
    programs: dict[str, Command] = {f"programs, bare, under {python}": [python, "-c", PROGRAMS] for python in pythons}
    return {name: pytest(name) for name in names} | bare | programs


def pytest(*arguments: str) -> Command:
    return [sys.executable, "-m", "pytest", *arguments]


def run(name: str, command: Command, folder: Path) -> tuple[str, int, float, str]:
    """Return the name, the exit code, the seconds and the output."""
    began = time.monotonic()
    folder.mkdir()
    words = [*map(str, command), *([f"--basetemp={folder / 'base'}"] if "pytest" in command else [])]
    with (folder / "output").open("wb") as output:  # and no pipe, which a process left behind would keep open
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    text = (folder / "output").read_text(errors="replace").rstrip()
    return name, done.returncode, time.monotonic() - began, text


def run_all(commands: dict[str, Command]) -> Iterator[str]:
    """Run these, say how each ended, and yield the names of those that failed."""
    with (
        tempfile.TemporaryDirectory(prefix="pq", dir=memory(), ignore_cleanup_errors=True) as folder,
        ThreadPoolExecutor(2 + (os.cpu_count() or 1)) as pool,  # most of them also wait
    ):
        running = [
            pool.submit(run, name, command, Path(folder, str(number)))
            for number, (name, command) in enumerate(commands.items())
        ]
        for future in as_completed(running):
            name, code, seconds, text = future.result()
            if code:
                print(f"\n{text}\n")
                yield name
            last = text.rpartition("\n")[2]
            print(f"{'FAILED' if code else 'ok':6} {seconds:6.1f} s  {name}: {last}", flush=True)


def compile_once(*pythons: str) -> None:
    """Compile what thousands of processes import; none of them keeps it where PYTHONDONTWRITEBYTECODE is set."""
    for python in pythons:
        subprocess.run([python, "-m", "compileall", "-q", "-j0", "-l", ROOT, ROOT / "pqueue_tools"], check=False)


def memory() -> str | None:
    """Return a folder in memory, where nobody waits for a disk; None, for the usual place, where it has little room."""
    place = "/dev/shm"
    return place if os.access(place, os.W_OK) and shutil.disk_usage(place).free > MEMORY_BYTES else None


def main(kind: str, *pythons: str) -> int:
    commands = {"quick": quick, "contract": contract, "all": lambda: everything(*pythons)}[kind]()
    began = time.monotonic()
    compile_once(sys.executable, *pythons)
    failed = list(run_all(commands))
    print(f"{len(commands) - len(failed)} of {len(commands)} passed in {time.monotonic() - began:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
