"""Attack the whole system under a real Supervisor, then account for every job that was acknowledged.

    PYTHONPATH=. python tests/attack.py --seconds 600 --seed 1
    PYTHONPATH=. python tests/attack.py --without move --without rm-wal

While signals fall upon the programs, one act after the other is drawn from a deck: copies of the database inside
the programs, backups and restores, files replaced or deleted, moves, writers that stop where others must pass, and
what an operator does all day. In the end everything runs to completion. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import configparser
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attack_audit
from attack_audit import Loss

import pqueue

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
IMPORTS = "--import attack_work --import pqueue_tools.file_task"
LEASE_SECONDS = 5.0
SIGNAL_SECONDS = 0.7  # between two signals, on average
ACT_SECONDS = 0.4  # between two acts, on average
COMMAND_SECONDS = 120.0  # no command of an operator may take longer
NOTICE_SECONDS = 20.0  # in which programs must notice that their files were replaced
SLEEPERS = 3000  # scheduled jobs, so that reading all unfinished jobs takes several pages
PRUNE_SECONDS = 15
SIGNALS = {"kill": 5, "stop": 4, "term": 1, "term-twice": 1}
SWITCHES = (*SIGNALS, "copies", "copies-inside", "deadly", "sleepy")  # in addition to the acts


# The system ###########################################################################################################


@dataclass(frozen=True)
class Process:
    pid: int
    name: str  # Supervisor's; empty for what this program has started
    started: str  # in ticks since the machine was, so that a pid that is given again is another process


def processes(folder: Path) -> list[Process]:
    """Return all processes that were started for this attack, by whomever."""
    mark, found = f"ATTACK_FOLDER={folder}".encode(), []
    for path in Path("/proc").iterdir():
        with suppress(OSError, IndexError):
            variables = (path / "environ").read_bytes().split(b"\0") if path.name.isdigit() else []
            if mark in variables and int(path.name) != os.getpid():
                name = next(
                    (each[24:].decode() for each in variables if each.startswith(b"SUPERVISOR_PROCESS_NAME=")), ""
                )
                found.append(Process(int(path.name), name, (path / "stat").read_text().rpartition(")")[2].split()[19]))
    return found


def open_files(process: Process) -> set[tuple[int, int]]:
    """Return device and number of the files that it has open."""
    found = set()
    with suppress(OSError):
        for path in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):
                file = path.stat()
                found.add((file.st_dev, file.st_ino))
    return found


class Replaced:
    """Files that are about to be replaced, and the programs that have them open; the dashboard only reads."""

    def __init__(self, system: System, *paths: Path) -> None:
        self._system = system
        self._files = {(path.stat().st_dev, path.stat().st_ino) for path in paths if path.exists()}
        self.programs = self._holders()

    def _holders(self) -> set[Process]:
        return {each for each in self._system.programs() if each.name != "ops" and open_files(each) & self._files}

    def still_open(self) -> set[Process]:
        return self.programs & self._holders()


class System:
    """A copy of the programs in a folder of their own, and the Supervisor that runs them."""

    def __init__(self, folder: Path, without: set[str]) -> None:
        self.folder, self.url = folder, "data/queue.db"
        self.child: subprocess.Popen[bytes] | None = None
        self._variables = {
            "ATTACK_FOLDER": str(folder),
            "ATTACK_WITHOUT": ",".join(without),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
        }
        for name in ("var/log", "var/files", "var/supervisor.d", "ledger", "scratch", "data"):
            (folder / name).mkdir(parents=True, mode=0o700)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/attack_*.py")]:
            shutil.copy(path, folder)
        for path in ROOT.glob("*/__init__.py"):
            shutil.copytree(path.parent, folder / path.parent.name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def path(self) -> Path:
        """The database that is in use."""
        return self.folder / self.url

    def environment(self, url: str | None = None) -> dict[str, str]:
        return {**os.environ, **self._variables, "PQUEUE_URL": url or self.url}

    def configure(self, producing: bool) -> None:
        """Write the shipped configuration with our tasks and writers in it, and the plain dashboard."""
        config = configparser.RawConfigParser(delimiters="=", comment_prefixes=";")
        config.read(ROOT / "supervisord.conf")
        for old, new in {
            "python3 producer.py": "python3 producer.py --interval 0.3",
            "python3 consumer.py": f"python3 consumer.py {IMPORTS} --lease-seconds {LEASE_SECONDS}",
            "python3 ops.py --streamlit": f"python3 ops.py --port {self.port}",
        }.items():
            changed = [name for name in config if old in config[name].get("command", "")]
            assert len(changed) == 1, f"expected one program with {old}, got {changed}"
            config[changed[0]]["command"] = config[changed[0]]["command"].replace(old, new)
        config["program:writer"] = {
            **config["program:producer"],
            "command": "python3 attack_work.py write",
            "process_name": "%(program_name)s_%(process_num)02d",
            "numprocs": "2",
            "stdout_logfile": "var/log/%(program_name)s_%(process_num)02d.log",
        }
        for name in ("producer", "writer"):
            config[f"program:{name}"]["autostart"] = str(producing).lower()
        with (self.folder / "supervisord.conf").open("w") as file:
            config.write(file)

    def start(self, *, producing: bool = True) -> None:
        self.configure(producing)
        with (self.folder / "var/log/supervisord.out").open("a") as out:
            self.child = subprocess.Popen(
                [str(BIN / "supervisord"), "-n", "-c", "supervisord.conf"],
                cwd=self.folder, env=self.environment(), stdout=out, stderr=out, umask=0o077,
            )  # fmt: skip

    def programs(self) -> list[Process]:
        return [each for each in processes(self.folder) if each.name]

    def everything_runs(self) -> bool:
        return len({each.name for each in self.programs()}) >= 7

    def control(self, *arguments: str) -> None:
        command = [str(BIN / "supervisorctl"), "-c", "supervisord.conf", *arguments]
        subprocess.run(command, cwd=self.folder, env=self.environment(), capture_output=True, timeout=COMMAND_SECONDS)


class Ruined(Exception):
    """The database is damaged: what comes after it tells nothing."""


# The attack ###########################################################################################################


class Attack:
    def __init__(self, folder: Path, seed: int, without: set[str]) -> None:
        self.folder, self.without, self.random = folder, without, random.Random(seed)
        self.system = System(folder, without)
        self.figures: Counter[str] = Counter()
        self.problems: list[str] = []
        self.facts = attack_audit.Facts()
        self.signals_on = False
        self._stopped: dict[int, float] = {}  # pids, and when they continue
        self._next_signal = self._number = 0.0

    def run(self, seconds: float) -> None:
        try:
            self.begin()
            until = time.monotonic() + seconds
            for name in self.deck():
                if time.monotonic() > until:
                    break
                tell(f"{max(0, until - time.monotonic()):4.0f} s left  {name}")
                self.act(name)
                self.idle(self.random.expovariate(1 / ACT_SECONDS))
            self.note("finish")
            self.finish()
        except (sqlite3.Error, pqueue.QueueError, Ruined) as error:
            self.problem(f"the attack had to end: {error}")
        finally:
            self.end_everything()

    def deck(self) -> Iterator[str]:
        """Yield acts without end: each as often in a round as its weight."""
        cards = [name for name, (weight, _) in ACTS.items() for _ in range(weight) if name not in self.without]
        while cards:
            self.random.shuffle(cards)
            yield from cards

    def act(self, name: str) -> None:
        self.figures[f"act {name}"] += 1
        self.note(f"act {name}")
        try:
            ACTS[name][1](self)
        except sqlite3.Error as error:
            self.problem(f"{name}: a reader of the database got: {error}")

    def note(self, text: str) -> None:
        with (self.folder / "attack.log").open("a") as log:
            log.write(f"{attack_audit.clock(time.time())} {text}\n")

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.note(f"problem: {text}")

    def begin(self) -> None:
        with closing(pqueue.PersistentQSQLite(self.system.path)) as queue:
            with queue.transaction() as db:
                db.execute(attack_audit.EFFECTS)
            asked, uids = time.time(), [f"sleeper-{number}" for number in range(SLEEPERS)]
            payloads = [{"uid": uid, "seconds": 0} for uid in uids]
            queue.enqueue_many("quick", payloads, queue="later", delay_seconds=86_400)
        self.facts.stored += [(uid, asked, time.time()) for uid in uids]
        self.start()
        self.signals_on = True

    def finish(self) -> None:
        """Let everything run to completion."""
        self.signals_on = False
        self.stop_everything()
        with closing(pqueue.PersistentQSQLite(self.system.path)) as queue:
            for name in queue.stats()["queues"]:
                queue.resume(name)
                queue.limit(name, None)
            with queue.transaction():
                for job in queue.list_jobs(queue="later", state="scheduled", limit=SLEEPERS):
                    queue.cancel(job.id)
        for _ in range(6):
            self.start(producing=False)
            self.until(self.nothing_to_do, 90)
            self.stop_everything()
            if not self.hurry():
                return
        self.problem("the jobs did not come to an end: see the unfinished ones")

    def nothing_to_do(self) -> bool:
        """Whether all jobs are finished, or are put off by their failures for a while."""
        soon = time.time() + 3
        self.idle(0.5)
        return not self.read(f"SELECT 1 FROM jobs WHERE {UNFINISHED} AND (state <> 'scheduled' OR run_at < {soon})")

    def hurry(self) -> bool:
        """Make due what failed and is put off, cancel what has lost its file, and return whether there was any."""
        with closing(pqueue.PersistentQSQLite(self.system.path)) as queue:
            for job in queue.list_jobs(state="scheduled", limit=10**6):
                name = job.payload.get("file")
                if name and not (self.folder / "var/files" / name).exists():
                    self.facts.missing.append((name, time.time()))
                    queue.cancel(job.id)
            queue.dequeue("hurry", queues=["none"], now=time.time() + 1e6)
            return bool(sum(queue.count_jobs(state=state) for state in pqueue.UNFINISHED))

    # Time, and signals in it

    def tick(self) -> None:
        now = time.monotonic()
        for pid in [pid for pid, until in self._stopped.items() if now >= until]:
            self.proceed(pid)
        if self.signals_on and now >= self._next_signal:
            self._next_signal = now + self.random.expovariate(1 / SIGNAL_SECONDS)
            self.signal_one()
        time.sleep(0.02)

    def idle(self, seconds: float) -> None:
        self.until(lambda: False, seconds)

    def until(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Wait for the condition; return whether it came true in so many seconds."""
        ends_at = time.monotonic() + seconds
        while not (found := condition()) and time.monotonic() < ends_at:
            self.tick()
        return bool(found)

    def signal_one(self) -> None:
        running = [each for each in self.system.programs() if each.pid not in self._stopped]
        kinds = {name: weight for name, weight in SIGNALS.items() if name not in self.without}
        if not running or not kinds:
            return
        victim, kind = self.random.choice(running), self.random.choices([*kinds], [*kinds.values()])[0]
        self.figures[f"signal {kind} {victim.name.partition('_')[0]}"] += 1
        if kind == "stop":
            self._stopped[victim.pid] = time.monotonic() + self.random.uniform(1, 8)
        self.note(f"signal {kind} {victim.name} {victim.pid}")
        for _ in range(2 if kind == "term-twice" else 1):
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(kind, signal.SIGTERM)
            with suppress(ProcessLookupError):
                os.kill(victim.pid, number)

    def proceed(self, pid: int) -> None:
        del self._stopped[pid]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    @contextmanager
    def in_peace(self) -> Iterator[None]:
        """Send no signals, and let nobody be stopped."""
        before, self.signals_on = self.signals_on, False
        for pid in [*self._stopped]:
            self.proceed(pid)
        try:
            yield
        finally:
            self.signals_on = before

    # The system

    def start(self, *, producing: bool = True) -> None:
        self.system.start(producing=producing)
        with self.in_peace():
            if producing and not self.until(self.system.everything_runs, 60):
                self.problem("not all programs came up within 60 s")

    def stop_everything(self) -> None:
        """Stop the Supervisor with all its programs, as an operator does, and see that nothing is left."""
        child = self.system.child
        with self.in_peace():
            if child and child.poll() is None:
                child.terminate()
                if not self.until(lambda: child.poll() is not None, 90):
                    self.problem("supervisord did not end within 90 s of TERM")
            if not self.until(lambda: not processes(self.folder), 15):
                left = [each.name or "supervisord" for each in processes(self.folder)]
                self.problem(f"{', '.join(left)} outlived the end of supervisord")
        self.end_everything()

    def end_everything(self) -> None:
        while left := processes(self.folder):
            for each in left:
                with suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
            if self.system.child:
                self.system.child.poll()
            time.sleep(0.05)
        if self.system.child:
            self.system.child.wait()
        self._stopped.clear()

    def expect_restarts(self, act: str, replaced: Replaced) -> None:
        """Wait until every program that had the old files open has ended; end those that still use them."""
        with self.in_peace():
            self.until(lambda: not replaced.still_open(), NOTICE_SECONDS)
            left = replaced.still_open()
            self.figures["programs that left their replaced files"] += len(replaced.programs) - len(left)
            self.figures["programs that continued with replaced files"] += len(left)
            if left:
                names = ", ".join(sorted({each.name for each in left}))
                self.problem(f"{act}: continued for {NOTICE_SECONDS:g} s with the old files: {names}")
            for each in left:
                with suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
            self.until(self.system.everything_runs, 60)

    def command(self, *arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program while the others run and receive signals."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            began, child = (
                time.monotonic(),
                self.background(*arguments, url=url, stdin=subprocess.DEVNULL, stdout=out, stderr=err),
            )
            if not self.until(lambda: child.poll() is not None, COMMAND_SECONDS):
                child.kill()
                self.problem(f"{' '.join(arguments)} took over {COMMAND_SECONDS:g} s")
            code = child.wait()
            out.seek(0), err.seek(0)
            done = subprocess.CompletedProcess(list(arguments), code, out.read(), err.read())
        took = time.monotonic() - began
        self.figures["slowest command, ms"] = max(self.figures["slowest command, ms"], round(took * 1000))
        if "malformed" in done.stderr:
            raise Ruined(f"{' '.join(arguments)}: {done.stderr.strip()}")
        if "Traceback" in done.stderr:
            self.problem(f"{' '.join(arguments)}: a traceback: {done.stderr.strip().splitlines()[-1]}")
        self.note(f"{' '.join(arguments)}: {code} {done.stderr.strip() or done.stdout.strip()[:100]}")
        return done

    def admin(self, *arguments: object, url: str | None = None) -> subprocess.CompletedProcess[str]:
        return self.command("admin.py", *map(str, arguments), url=url)

    def background(self, *arguments: str, url: str | None = None, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.folder, env=self.system.environment(url), text=True, **options
        )

    def read(self, sql: str, path: Path | None = None) -> list[Any]:
        """Read the database for a moment, past the queue: the close may be the last of those that SQLite knows of."""
        uri = f"{(path or self.system.path).as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True, timeout=10)) as db:
            return db.execute(sql).fetchall()

    def jobs(self, where: str, limit: int = 1) -> list[int]:
        ids = [row[0] for row in self.read(f"SELECT id FROM jobs WHERE queue <> 'later' AND {where}")]
        return self.random.sample(ids, min(limit, len(ids)))

    def new_name(self, stem: str) -> str:
        self._number += 1
        return f"{stem}-{self._number:g}"

    def lose(self, act: str, since: float, until: float, *, rolls_back: bool) -> None:
        self.facts.losses.append(Loss(act, since, until, rolls_back))
        self.note(f"{act}: may undo what came after {attack_audit.clock(since)}")


UNFINISHED = f"state IN {pqueue.UNFINISHED}"
FINISHED = f"state IN {pqueue.FINISHED}"
ACTS: dict[str, tuple[int, Callable[[Attack], None]]] = {}


def act(name: str, weight: int) -> Callable[[Callable[[Attack], None]], Callable[[Attack], None]]:
    def register(function: Callable[[Attack], None]) -> Callable[[Attack], None]:
        ACTS[name] = (weight, function)
        return function

    return register


def _beside(path: Path) -> list[Path]:
    return [Path(f"{path}{suffix}") for suffix in ("-wal", "-shm")]


# What an operator does all day ########################################################################################


@act("stats", 4)
def stats(attack: Attack) -> None:
    """Open and close the database in other processes."""
    attack.admin("stats")
    attack.read("SELECT count(*) FROM jobs")


@act("dashboard", 3)
def dashboard(attack: Attack) -> None:
    for page in ("/", "/api/jobs", "/metrics"):
        with (
            suppress(OSError, ValueError),
            urllib.request.urlopen(f"http://127.0.0.1:{attack.system.port}{page}", timeout=3) as answer,
        ):
            answer.read()
            attack.figures["pages seen"] += 1


@act("prune", 4)
def prune(attack: Attack) -> None:
    """Delete finished jobs: only those that are finished before it begins, as it asks for a greater age."""
    attack.facts.prunable |= _uids(attack, FINISHED)
    attack.admin("prune", "--older-than", f"{PRUNE_SECONDS}s")


def _uids(attack: Attack, where: str, path: Path | None = None) -> set[str]:
    return {attack_audit.uid_of(row[0]) for row in attack.read(f"SELECT payload FROM jobs WHERE {where}", path)}


@act("resubmit", 4)
def resubmit(attack: Attack) -> None:
    for job_id in attack.jobs(f"{FINISHED} AND task IN ('quick', 'effect', 'copies')", 3):
        for row in attack.read(f"SELECT payload FROM jobs WHERE id = {job_id}"):
            attack.facts.resubmitted[attack_audit.uid_of(row[0])] += 1
        attack.admin("resubmit", job_id)


@act("cancel", 3)
def cancel(attack: Attack) -> None:
    for job_id in attack.jobs(UNFINISHED, 2):
        attack.admin("cancel", job_id)


@act("mark-failed", 3)
def mark_failed(attack: Attack) -> None:
    for job_id in attack.jobs(UNFINISHED, 2):
        attack.admin("mark-failed", job_id)


@act("assign", 3)
def assign(attack: Attack) -> None:
    """Give a job to another: not one that must run at most once, as that may run already."""
    for job_id in attack.jobs(f"{UNFINISHED} AND task <> 'once'", 2):
        attack.admin("assign-job", job_id, f"consumer_0{attack.random.randrange(3)}", "--yes")


@act("pause", 3)
def pause(attack: Attack) -> None:
    attack.admin("pause", "default")
    attack.idle(attack.random.uniform(0.2, 2))
    attack.admin("resume", "default")


@act("limit", 3)
def limit(attack: Attack) -> None:
    attack.admin("limit", "limited", attack.random.choice([1, 5, 30, "none"]))


@act("delete-job-files", 6)
def delete_job_files(attack: Attack) -> None:
    """Delete files while their jobs run, fail and run again; those of unfinished jobs must stay."""
    attack.command("attack_work.py", "files", "40")
    before = _files(attack)
    attack.admin("delete-job-files", "--directory", "var/files", "--yes")
    gone = before - _files(attack)
    attack.facts.deleted.update(dict.fromkeys(gone, time.time()))
    attack.figures["job files deleted"] += len(gone)
    needed = attack.read(f"SELECT json_extract(payload, '$.file') FROM jobs WHERE {UNFINISHED}")
    attack.facts.missing += [(name, time.time()) for (name,) in needed if name in gone]


def _files(attack: Attack) -> set[str]:
    return {path.name for path in (attack.folder / "var/files").glob("job_*.txt")}


# Processes that get in the way ######################################################################################


@act("hold-lock", 3)
def hold_lock(attack: Attack) -> None:
    """Stop a process that has the writers' lock, though no transaction: others must continue."""
    with attack.in_peace(), _holder(attack, "lock"):
        attack.idle(0.2)
        done = int(attack.command("attack_work.py", "probe", "6").stdout or 0)
        attack.figures["writes despite a stopped holder of the lock"] += done
        if done < 20:
            attack.problem(f"hold-lock: {done} writes in 4 s despite a stopped process that held the lock")


@act("hold-transaction", 2)
def hold_transaction(attack: Attack) -> None:
    """Stop a process inside a transaction: nobody can write, and nobody may be the worse for it afterwards."""
    with _holder(attack, "transaction"):
        attack.idle(attack.random.uniform(1, 8))


@contextmanager
def _holder(attack: Attack, what: str) -> Iterator[None]:
    with attack.background("attack_work.py", "hold", what, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        try:
            yield
        finally:
            child.send_signal(attack.random.choice([signal.SIGCONT, signal.SIGKILL]))
            child.communicate()


@act("kill-supervisord", 2)
def kill_supervisord(attack: Attack) -> None:
    """Kill the Supervisor, when all its programs have come up, and start it again: they must end by themselves."""
    with attack.in_peace():
        attack.until(attack.system.everything_runs, 30)
        attack.idle(2)
        _kill_supervisord(attack)


@act("kill-supervisord-early", 1)
def kill_supervisord_early(attack: Attack) -> None:
    """Kill it at the moment when it has started its programs, before these have looked who started them."""
    with attack.in_peace():
        for each in attack.system.programs():
            with suppress(ProcessLookupError):  # a worker ends with its keeper
                os.kill(each.pid, signal.SIGKILL)
        attack.until(lambda: any(each.name == "producer" for each in attack.system.programs()), 10)
        _kill_supervisord(attack)


def _kill_supervisord(attack: Attack) -> None:
    assert attack.system.child
    before = set(attack.system.programs())
    attack.system.child.kill()
    attack.system.child.wait()
    attack.start()
    attack.until(lambda: not before & set(attack.system.programs()), 30)
    for each in before & set(attack.system.programs()):
        attack.problem(f"{each.name.partition('_')[0]} outlived the kill of its supervisord by 30 s")
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)


# What an operator does to the files ###################################################################################


@act("restore", 3)
def restore(attack: Attack) -> None:
    """Back up, work on, and put the backup in place: refused while programs run, then done."""
    since, name = time.time(), attack.new_name("scratch/backup")
    if attack.admin("backup", name).returncode:
        attack.figures["backups that were refused"] += 1
        return
    attack.idle(attack.random.uniform(1, 8))
    early = _restored(attack, name)
    if early.returncode == 0:
        attack.problem("restore: it was not refused while programs ran")
    attack.stop_everything()
    done = _restored(attack, name)
    if done.returncode:
        attack.problem(f"restore: {done.stderr.strip() or done.stdout.strip()}")
        _put_in_place(attack, name)
    attack.lose("restore", since, time.time(), rolls_back=True)
    attack.start()


def _restored(attack: Attack, name: str) -> subprocess.CompletedProcess[str]:
    done = attack.admin("restore", name)
    return attack.admin("restore", name, "--yes") if "--yes" in done.stderr else done


def _put_in_place(attack: Attack, backup: str) -> None:
    for path in _beside(attack.system.path):
        path.unlink(missing_ok=True)
    shutil.copy(attack.folder / backup, f"{attack.system.path}.new")
    Path(f"{attack.system.path}.new").replace(attack.system.path)


@act("replace", 2)
def replace(attack: Attack) -> None:
    """Put a backup in place as one should not: while programs run."""
    since, name = time.time(), attack.new_name("scratch/backup")
    if attack.admin("backup", name).returncode:
        attack.figures["backups that were refused"] += 1
        return
    attack.idle(attack.random.uniform(0.5, 4))
    with _nobody_starts(attack):
        replaced = Replaced(attack.system, attack.system.path)
        _put_in_place(attack, name)
        for path in _beside(attack.system.path):  # of who opened the old file meanwhile
            path.unlink(missing_ok=True)
        attack.lose("replace", since, time.time(), rolls_back=True)
    attack.expect_restarts("replace", replaced)


@act("rm-both", 2)
def remove_both(attack: Attack) -> None:
    _remove(attack, "rm-both", *_beside(attack.system.path))


@act("rm-wal", 1)
def remove_log(attack: Attack) -> None:
    _remove(attack, "rm-wal", _beside(attack.system.path)[0])


@act("rm-shm", 1)
def remove_index(attack: Attack) -> None:
    _remove(attack, "rm-shm", _beside(attack.system.path)[1])


def _remove(attack: Attack, name: str, *paths: Path) -> None:
    """Delete the log under running programs; sometimes with jobs that are nowhere else, which are lost."""
    behind = attack.random.choice([0, 0, attack.random.uniform(0.2, 1.5)]) if name != "rm-shm" else 0
    with _frozen(attack, behind) as kept_until:
        if kept_until is None:
            attack.figures["acts put off: another process was copying the log"] += 1
            return
        replaced = Replaced(attack.system, *paths)
        for path in paths:
            path.unlink(missing_ok=True)
        attack.lose(name, kept_until, time.time(), rolls_back=behind > 0)
    attack.expect_restarts(name, replaced)


@act("move-folder", 2)
def move_folder(attack: Attack) -> None:
    """Move the folder of the database away and put a copy, with all that was committed, in its place."""
    data = attack.system.path.parent
    with _frozen(attack, 0) as kept_until:
        if kept_until is None:
            return
        copy, away = data.with_name(attack.new_name("copy")), data.with_name(attack.new_name("away"))
        subprocess.run(["cp", "-a", data, copy], check=True)
        replaced = Replaced(attack.system, attack.system.path)
        data.rename(away)
        while data.exists() or not _renamed(copy, data):
            data.rename(data.with_name(attack.new_name("stray")))  # a program was just starting
        attack.lose("move-folder", kept_until, time.time(), rolls_back=False)
    attack.expect_restarts("move-folder", replaced)
    shutil.rmtree(away)


def _renamed(source: Path, target: Path) -> bool:
    try:
        source.rename(target)
    except OSError:
        return False
    return True


@contextmanager
def _nobody_starts(attack: Attack) -> Iterator[None]:
    """Stop the Supervisor, when all its programs have come up: the act meets them all with their files open."""
    assert attack.system.child
    with attack.in_peace():
        attack.until(attack.system.everything_runs, 30)
        attack.idle(2)
        attack.system.child.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            attack.system.child.send_signal(signal.SIGCONT)


@contextmanager
def _frozen(attack: Attack, behind_seconds: float) -> Iterator[float | None]:
    """Keep all writers out, with a database that is whole without its log, as far as it was so many seconds ago."""
    arguments = ("attack_work.py", "freeze", str(behind_seconds))
    with (
        _nobody_starts(attack),
        attack.background(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child,
    ):
        assert child.stdout
        line = child.stdout.readline()
        try:
            yield float(line) if line else None
        finally:
            child.communicate("over\n")


@act("move", 3)
def move(attack: Attack) -> None:
    """Move the live queue to another file, start everything there, and finish; the next time it goes back."""
    old, system = attack.system.url, attack.system
    new = "data/moved.db" if old == "data/queue.db" else "data/queue.db"
    for path in (system.folder / "data").glob(f"{Path(new).name}*"):
        (shutil.rmtree if path.is_dir() else os.unlink)(path)
    if attack.random.random() < 0.5:
        system.control("stop", "producer", "writer:*")  # else they continue in the old queue, after the copy, too
    moved = attack.admin("move", "--to", new)
    if moved.returncode:
        attack.problem(f"move: {moved.stderr.strip()}")
        attack.admin("resume", "default")
        system.control("start", "producer", "writer:*")
        return
    attack.stop_everything()
    _compare(attack, system.folder / old, system.folder / new)
    system.url = new
    attack.start()
    _finish_move(attack, old, new)


def _compare(attack: Attack, old: Path, new: Path) -> None:
    """See that the table of our own was copied, and note what was enqueued or done in the old queue afterwards."""
    effects = "SELECT uid, count(*) FROM effects GROUP BY uid"
    if not attack.read("SELECT 1 FROM sqlite_master WHERE name = 'effects'", new):
        attack.problem("move: the table effects was left behind")
        with closing(sqlite3.connect(new)) as db:
            db.execute(attack_audit.EFFECTS)
            db.execute("ATTACH ? AS old", [str(old)])
            db.execute("INSERT INTO effects SELECT * FROM old.effects")
            db.commit()
    attack.facts.done_elsewhere |= dict(attack.read(effects, old)).keys() - dict(attack.read(effects, new)).keys()
    attack.facts.prunable |= _uids(attack, FINISHED, old) - _uids(attack, "1 = 1", new)


def _finish_move(attack: Attack, old: str, new: str) -> None:
    """Give --finish; where that is refused, what it offers: another option, or to move the rest."""
    finish = ["move", "--to", new, "--finish", "--yes"]
    done = attack.admin(*finish, url=old)
    if done.returncode:
        attack.figures["moves that were not finished at once"] += 1
        named = dict.fromkeys(re.findall(r"--[a-z][a-z-]+", done.stderr))
        offered = [name for name in named if name not in finish and name != "--help"]
        if not any(attack.admin(*finish, name, url=old).returncode == 0 for name in offered):
            attack.admin("move", "--to", new, url=old)
            done = attack.admin(*finish, url=old)
            if done.returncode:
                attack.problem(f"move: --finish offers no way forward: {done.stderr.strip()}")
                attack.facts.left_behind |= _uids(attack, "1 = 1", attack.folder / old)


# The program ##########################################################################################################


def tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)


def show(figures: Counter[str], problems: list[str]) -> str:
    lines = [f"{name:62}{number:>10,}" for name, number in sorted(figures.items())]
    counted = Counter(problems)
    lines += [f"problem: {text}" + (f" ({number} times)" if number > 1 else "") for text, number in counted.items()]
    return "\n".join([*lines, *([] if problems else ["every acknowledged job is accounted for"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=600, metavar="N", help="how long to attack (default: %(default)g)")
    add("--seed", type=int, default=1, metavar="N", help="of what is drawn here (default: %(default)s)")
    names = [*ACTS, *SWITCHES]
    add("--without", action="append", default=[], choices=names, metavar="ACT", help=f"leave out: {', '.join(names)}")
    add("--only", action="append", default=[], choices=[*ACTS], metavar="ACT", help="of the acts only this; repeatable")
    add("--keep", action="store_true", help="keep the folder, to look at it")
    options = parser.parse_args()
    without = {*options.without, *(set(ACTS) - set(options.only) if options.only else ())}
    folder = Path(tempfile.mkdtemp(prefix="attack-", dir=os.environ.get("ATTACK_IN")))
    attack, began = Attack(folder, options.seed, without), time.monotonic()
    attack.run(options.seconds)
    audit = attack_audit.Audit(folder, attack.system.path, attack.facts)
    problems = [*attack.problems, *audit.problems()]
    tell("")
    attack.figures["seconds, all in all"] = round(time.monotonic() - began)
    print(show(attack.figures + audit.figures, problems))
    if options.keep or problems:
        print(f"see {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
