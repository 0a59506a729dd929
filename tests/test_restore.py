"""`admin.py restore`: a backup takes the place of the database, but not while a program has it open."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, wait_until

import pqueue
from pqueue import QueueError, SchemaMismatch
from pqueue_sqlite import PAGE_BYTES
from pqueue_tools import restoring


@pytest.fixture
def path(tmp_path):
    return tmp_path / "var/queue.db"


@pytest.fixture
def backup(path):
    """A backup with jobs 1 and 2 of a queue that has jobs 1 to 5 by now."""
    with closing(pqueue.open_queue(path)) as queue:
        queue.enqueue_many("t", ["old", "old"])
        queue.backup(path.parent / "backup.db")
        queue.enqueue_many("t", ["new"] * 3)
    return path.parent / "backup.db"


def payloads(path):
    with closing(pqueue.open_queue(path, create=False)) as queue:
        assert queue.check()["problems"] == []
        return [job.payload for job in queue.list_jobs()][::-1]


OLD, NEW = ["old", "old", "new", "new", "new"], ["old", "old"]


def contents(folder):
    files = [each for each in folder.rglob("*") if each.is_file() and not each.name.endswith("-shm")]
    return {each.relative_to(folder): each.read_bytes() for each in files}


def program(code, *arguments):
    """Start a Python program and wait until it says that it is ready."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child):
    child.kill()
    child.communicate()


IDLE = """
import sys, time, pqueue
queue = pqueue.open_queue(sys.argv[1])
queue.stats()
print("ready", flush=True)
time.sleep(600)
"""
WRITER = IDLE.replace('print("ready"', 'queue.enqueue_many("t", ["late"] * 50)\nprint("ready"')
READER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1])
db.execute("SELECT count(*) FROM jobs").fetchone()
print("ready", flush=True)
time.sleep(600)
"""


def test_old_database_is_kept_in_one_file_if_its_log_is_sound(path, backup):
    kill(program(WRITER, path))
    assert Path(f"{path}-wal").exists()
    kept = restoring.restore(backup, path)
    assert list(kept.parent.glob(f"{kept.name}*")) == [kept]
    assert len(payloads(kept)) == len(OLD) + 50


def test_restored_file_and_what_it_replaces_are_synced_before_their_names(path, backup, monkeypatch):
    synced, fsync = [], os.fsync

    def recording(file):
        synced.append(re.sub(r"\.\w{8}\.(part|placeholder)$", r".\1", Path(os.readlink(f"/proc/self/fd/{file}")).name))
        fsync(file)

    monkeypatch.setattr(os, "fsync", recording)
    kept = restoring.restore(backup, path)
    # the last three: the name of the old file, that no log is left, the name of the new file
    assert synced == ["queue.db.part", f"{kept.name}.part", "var", "var", "var"]
    kill(program(WRITER, path))
    monkeypatch.setattr(restoring, "_apply_logs", lambda _: None)  # it cannot be applied
    synced.clear()
    kept = restoring.restore(backup, path)
    copies = [f"{kept.name}-wal.part", f"{kept.name}.part"]
    # that no program opens the old file before its log is deleted, too
    assert synced == ["queue.db.part", *copies, "var", "queue.db.placeholder", "var", "var", "var"]


def test_operator_restores_a_backup_and_the_replaced_database_is_kept(path, backup):
    kept = restoring.restore(backup, path)
    assert payloads(path) == NEW
    assert re.fullmatch(r"queue\.db\.replaced-\d{8}T\d{6}Z-1", kept.name)
    assert payloads(kept) == OLD
    assert payloads(backup) == NEW
    assert {each.stat().st_mode & 0o777 for each in (path, kept)} == {0o600}
    restoring.restore(kept, path)
    assert payloads(path) == OLD
    assert [each for each in path.parent.iterdir() if each.name.endswith((".part", ".placeholder"))] == []


def test_operator_is_told_of_all_programs_that_have_the_database_open(path, backup):
    children = [program(IDLE, path), program(IDLE, path)]
    try:
        with pytest.raises(QueueError, match=r"\(pid \d+\), python\S* -c \(pid \d+\) have it open; stop them"):
            restoring.restore(backup, path)
    finally:
        for child in children:
            kill(child)


@pytest.mark.parametrize("code", [IDLE, WRITER, READER])
def test_operator_cannot_restore_while_a_program_has_the_database_open(path, backup, code):
    child = program(code, path)
    try:
        before = contents(path.parent)
        with pytest.raises(QueueError, match=rf"cannot replace .*: python\S* -c \(pid {child.pid}\) has it open; stop"):
            restoring.restore(backup, path)
        assert contents(path.parent) == before
    finally:
        kill(child)
    restoring.restore(backup, path)
    assert payloads(path) == NEW


def test_operator_is_told_which_module_has_the_database_open(path, backup, tmp_path, monkeypatch):
    (tmp_path / "reader.py").write_text(READER)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    child = subprocess.Popen([sys.executable, "-m", "reader", path, "secret"], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(QueueError, match=rf"python\S* -m reader \(pid {child.pid}\) has it open"):
            restoring.restore(backup, path)
    finally:
        kill(child)


def test_operator_cannot_restore_while_a_consumer_waits(place, path, backup):
    child = place.start("consumer.py", "--name", "anna")
    wait_until(lambda: "started" in child.out.read_text())
    done = place.run("admin.py", "restore", backup, "--yes")
    assert done.returncode == 1
    assert re.search(rf"consumer\.py \(pid {child.pid}\) has it open; stop", done.stderr)
    child.send_signal(signal.SIGTERM)
    child.wait()
    done = place.run("admin.py", "restore", backup, "--yes")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"restored {backup}, verified; the replaced database is {path}\.replaced-\S+\n", done.stdout)
    assert payloads(path) == NEW


def test_process_cannot_restore_a_file_that_it_has_open(path, backup):
    with closing(pqueue.open_queue(path)) as queue:
        with pytest.raises(QueueError, match="this process has it open"):
            restoring.restore(backup, path)
        assert queue.count_jobs() == 5
    restoring.restore(backup, path)


def test_log_of_a_killed_program_is_not_applied_to_the_restored_file(path, backup):
    kill(program(WRITER, path))
    assert path.with_name("queue.db-wal").stat().st_size > 0
    kept = restoring.restore(backup, path)
    assert payloads(path) == NEW
    assert payloads(kept) == [*OLD, *["late"] * 50]


@pytest.mark.parametrize("suffix", ["-wal", "-journal", "-shm", "-wal -shm"])
def test_log_without_its_database_is_not_applied_to_the_restored_file(path, backup, suffix):
    kill(program(WRITER, path))
    log = path.with_name("queue.db-wal").read_bytes()
    for each in ("", "-wal", "-shm"):
        path.with_name(f"queue.db{each}").unlink()
    for each in suffix.split():
        path.with_name(f"queue.db{each}").write_bytes(log)
    restoring.restore(backup, path)
    assert payloads(path) == NEW


def test_database_whose_log_cannot_be_applied_is_replaced_and_kept_with_it(path, backup, monkeypatch):
    kill(program(WRITER, path))
    monkeypatch.setattr(restoring, "_apply_logs", lambda _: None)
    kept = restoring.restore(backup, path)
    assert kept.with_name(f"{kept.name}-wal").exists()
    assert payloads(path) == NEW
    assert payloads(kept) == [*OLD, *["late"] * 50]


def test_damaged_database_is_replaced_and_kept(path, backup):
    path.write_bytes(b"garbage" * 1000)
    path.with_name("queue.db-wal").write_bytes(b"more garbage" * 1000)
    kept = restoring.restore(backup, path)
    assert payloads(path) == NEW
    assert kept.read_bytes() == b"garbage" * 1000


def test_restore_makes_a_database_where_there_is_none(tmp_path, backup):
    for target in (tmp_path / "other.db", tmp_path / "new/folder/queue.db"):
        assert restoring.restore(backup, target) is None
        assert payloads(target) == NEW
    (tmp_path / "empty.db").touch()
    assert restoring.restore(backup, tmp_path / "empty.db") is None
    assert payloads(tmp_path / "empty.db") == NEW


def test_backup_is_read_with_its_own_log_and_from_a_folder_that_is_read_only(path, backup, tmp_path):
    copy = tmp_path / "copy.db"
    with closing(pqueue.open_queue(copy)) as queue:
        queue.enqueue("t", "logged")
        kept = {each: each.read_bytes() for each in (copy, copy.with_name("copy.db-wal"))}
    for each, data in kept.items():
        each.write_bytes(data)
    restoring.restore(copy, path)
    assert payloads(path) == ["logged"]
    backup.parent.chmod(0o500)
    try:
        assert restoring.restore(backup, tmp_path / "elsewhere.db") is None
    finally:
        backup.parent.chmod(0o700)
    assert payloads(tmp_path / "elsewhere.db") == NEW


def other_program(file):
    with closing(sqlite3.connect(file)) as db:
        db.execute("CREATE TABLE mine (x)")


def pragma(setting):
    def change(file):
        with closing(sqlite3.connect(file)) as db:
            db.execute(f"PRAGMA {setting}")

    return change


def damage(file):
    data = bytearray(file.read_bytes())
    data[PAGE_BYTES * 2 + 100 : PAGE_BYTES * 3] = b"\xff" * (PAGE_BYTES - 100)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda file: file.unlink(), QueueError, "expected a file, got none"),
        (lambda file: (file.unlink(), file.mkdir()), QueueError, "expected a file, got none"),
        (lambda file: file.write_bytes(b""), SchemaMismatch, "got an empty database"),
        (lambda file: file.write_bytes(b"no database at all" * 99), QueueError, "file is not a database"),
        (lambda file: (file.unlink(), other_program(file)), SchemaMismatch, "got another program's database"),
        (pragma("user_version = 999"), SchemaMismatch, "expected schema 1 or older, got 999"),
        (pragma("application_id = 1"), SchemaMismatch, "another program's"),
        (damage, QueueError, "cannot restore .*: it is damaged|malformed"),
        (lambda file: file.write_bytes(file.read_bytes()[:-5000]), QueueError, "damaged|malformed"),
    ],
)
def test_operator_cannot_restore_a_file_that_is_no_sound_queue(path, backup, spoil, error, message):
    spoil(backup)
    before = contents(path.parent)
    with pytest.raises(error, match=message) as caught:
        restoring.restore(backup, path)
    assert "\n" not in str(caught.value)
    assert contents(path.parent) == before
    assert payloads(path) == OLD


def test_operator_cannot_restore_a_database_to_itself_or_to_a_server(path, backup):
    with pytest.raises(QueueError, match="it is the queue's file itself"):
        restoring.restore(path, path)
    with pytest.raises(QueueError, match=r"cannot restore into PostgreSQL: set PQUEUE_URL .* move --to") as caught:
        restoring.restore(backup, "postgresql://ann:hunter2@host/db")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, ""),
        (["nosuch.db"], 2, "expected --yes to replace the queue by nosuch.db without a terminal"),
        (["nosuch.db", "--yes"], 1, "nosuch.db: expected a file, got none"),
        ([":memory:", "--yes"], 2, "expected a path"),
    ],
)
def test_restore_mistake_is_reported_in_one_line(place, path, backup, arguments, code, message):
    done = place.run("admin.py", "restore", *arguments)
    assert (done.returncode, done.stderr.count("\n"), message in done.stderr) == (code, 1, True), done.stderr
    assert payloads(path) == OLD


def test_restore_that_fails_changes_nothing(path, backup, monkeypatch):
    before = payloads(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("_copy_file", "sync"):
        with monkeypatch.context() as patch, pytest.raises(QueueError, match=r"cannot restore .*: No space left"):
            patch.setattr(restoring, name, full)
            restoring.restore(backup, path)
        assert payloads(path) == before
        assert {each.name for each in path.parent.iterdir()} == {"queue.db", "queue.db.d", "backup.db"}


def killed_at_line(number, backup, path):
    """Restore in a child that kills itself before the line of this number; return whether it came so far."""
    child = os.fork()
    if not child:
        lines = iter(range(10**6))

        def trace(frame, event, _):
            if not Path(frame.f_code.co_filename).name.startswith("pqueue"):
                return None
            if event == "line" and next(lines) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        restoring.restore(backup, path)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("before", ["closed", "killed", "damaged", "absent"])
def test_restore_that_is_killed_anywhere_leaves_the_old_database_or_the_new_one(backup, path, before, monkeypatch):
    number, seen = 0, set()
    old = {"closed": OLD, "killed": [*OLD, *["late"] * 50]}
    if before in ("killed", "damaged"):
        kill(program(WRITER, path))
    if before == "damaged":  # so that its log cannot be applied
        old["damaged"] = old["killed"]
        monkeypatch.setattr(restoring, "_apply_logs", lambda _: None)
    if before == "absent":
        path.unlink()
    start = contents(path.parent)
    while True:
        for each in path.parent.iterdir():
            if each.is_file():
                each.unlink()
        for name, data in start.items():
            (path.parent / name).write_bytes(data)
            (path.parent / name).chmod(0o600)
        was_killed = killed_at_line(number, backup, path)
        try:
            found = payloads(path)
        except QueueError as error:
            assert before in ("damaged", "absent")
            found = "no queue" if "no queue at" in str(error) else "not a database"
            assert found == ("no queue" if before == "absent" else "not a database"), error
        assert found in (old.get(before), NEW, "no queue", "not a database")
        assert found == NEW or was_killed
        seen.add(str(found))
        restoring.restore(backup, path)
        assert payloads(path) == NEW
        if not was_killed:
            break
        number += 1
    assert len(seen) == (3 if before == "damaged" else 2)
    assert number > 50
