"""`admin.py move`: all of a queue's file goes along, no job runs twice, and there is always a way on."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, wait_until

import pqueue
import pqueue_move
import pqueue_schema
import pqueue_sqlite
from pqueue import QueueError

SCHEMA = r"""
CREATE TABLE orders (id INTEGER PRIMARY KEY AUTOINCREMENT, item TEXT, twice INTEGER AS (id * 2) STORED);
CREATE TABLE "a ""quoted"" name" ("some column" BLOB, 'it''s' TEXT);
CREATE TABLE rowids (x);
CREATE TABLE pairs (a TEXT, b INTEGER, PRIMARY KEY (a, b)) WITHOUT ROWID;
CREATE TABLE job_notes (job_id INTEGER REFERENCES jobs (id), note TEXT);
CREATE TABLE audit (what TEXT, job_id INTEGER);
CREATE INDEX "orders by item" ON orders (item) WHERE item IS NOT NULL;
CREATE INDEX mine_on_jobs ON jobs (length(payload));
CREATE VIEW recent AS SELECT rowid AS number, x FROM rowids;
CREATE TRIGGER note_queue AFTER UPDATE ON queues BEGIN INSERT INTO audit VALUES ('queue', NULL); END;
CREATE TRIGGER "note job" AFTER INSERT ON jobs BEGIN INSERT INTO audit VALUES ('job', new.id); END;
CREATE TRIGGER note_history AFTER INSERT ON history BEGIN INSERT INTO audit VALUES ('history', new.job_id); END;
CREATE TRIGGER note_order AFTER INSERT ON orders BEGIN INSERT INTO audit VALUES ('order', new.id); END;
CREATE VIRTUAL TABLE docs USING fts5 (body, content='');
CREATE VIRTUAL TABLE texts USING fts5 (body);
INSERT INTO orders (item) VALUES ('ink'), ('pen'), (NULL);
DELETE FROM orders WHERE id = 3;
INSERT INTO "a ""quoted"" name" VALUES (x'00ff00', 'x'), (zeroblob(5000), CAST(x'ff41' AS TEXT));
INSERT INTO rowids (rowid, x) VALUES (7, 'seven'), (1000, 'thousand');
INSERT INTO pairs VALUES ('a', 2), ('a', 1);
INSERT INTO job_notes VALUES (1, 'first'), (99, 'dangling');
INSERT INTO docs (rowid, body) VALUES (5, 'hello world');
INSERT INTO texts (body) VALUES ('needle in a haystack'), ('nothing');
CREATE TABLE strict_one (n INTEGER NOT NULL) STRICT;
INSERT INTO strict_one VALUES (1);
"""
OURS = ("queues", "history", "consumers", "audit")


@pytest.fixture
def path(place):
    return place.folder / "var/queue.db"


@pytest.fixture
def new(place):
    return place.folder / "new.db"


def filled(path):
    """Make a queue of jobs in every state but processing, two of them in a queue that an operator paused."""
    with closing(pqueue.open_queue(path)) as queue:
        queue.enqueue_many("t", [{"n": number} for number in range(20)])
        queue.enqueue_many("t", ["held", "held"], queue="held")
        queue.enqueue("t", "later", delay_seconds=3600, key="k", assigned_to="anna", priority=3)
        queue.pause("held")
        queue.fail(queue.dequeue("w"), "no", retry=False)
        queue.complete(queue.dequeue("w"), [1])
        queue.cancel(5)


def rows(path):
    with closing(sqlite3.connect(path)) as db:
        db.text_factory = bytes
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0")]
        quoted = {name.decode(): '"' + name.decode().replace('"', '""') + '"' for name in names}
        return {name: db.execute(f"SELECT * FROM {quote}").fetchall() for name, quote in quoted.items()}


def state(path):
    with closing(pqueue.open_queue(path, create=False)) as queue:
        assert queue.check()["quick_check"] == "ok"
        paused = {name: each["paused"] for name, each in queue.stats()["queues"].items()}
        return queue.list_jobs(limit=9999), [queue.history(job.id) for job in queue.list_jobs(limit=9999)], paused


def test_all_that_the_application_keeps_in_the_file_goes_along(place, path, new):
    filled(path)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA)
        schema = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
    before, jobs = rows(path), state(path)
    done = place.run("admin.py", "move", "--to", new)
    assert (done.returncode, done.stderr) == (0, "")
    assert "moved 23 jobs, verified; the old queue is paused." in done.stdout
    after = rows(new)
    assert {name: each for name, each in after.items() if name not in OURS} == {
        name: each for name, each in before.items() if name not in OURS
    }
    assert after["audit"] == rows(path)["audit"][: len(after["audit"])]  # no trigger fired in the copy
    assert state(new) == jobs
    with closing(sqlite3.connect(new)) as db:
        assert db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY 1, 2").fetchall() == schema
        assert db.execute("PRAGMA user_version").fetchone() == (len(pqueue_schema.MIGRATIONS),)
        assert db.execute("SELECT number FROM recent").fetchall() == [(7,), (1000,)]
        assert db.execute("SELECT rowid FROM docs WHERE docs MATCH 'hello'").fetchall() == [(5,)]
        assert db.execute("SELECT body FROM texts WHERE texts MATCH 'needle'").fetchall() == [("needle in a haystack",)]
        db.execute("INSERT INTO orders (item) VALUES ('new')")
        assert db.execute("SELECT max(id), max(twice) FROM orders").fetchone() == (4, 8)
        db.commit()
        assert db.execute("SELECT job_id FROM audit WHERE what = 'order' ORDER BY 1 DESC").fetchone() == (4,)
    with closing(pqueue.open_queue(new)) as queue:
        fresh = queue.enqueue("t", "new")
        assert fresh == 24
        assert queue._read("SELECT what FROM audit WHERE job_id = 24") == [("job",)]
    assert (new.stat().st_mode & 0o777) == 0o600
    assert [each.name for each in place.folder.iterdir() if each.name.endswith(".part")] == []


def test_triggers_of_the_application_do_not_fire_in_the_copy(path, new):
    filled(path)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA)
    with closing(moved(path, new)):
        audit = rows(path)["audit"]
        copied = rows(new)["audit"]
    assert copied
    assert copied == audit[: len(copied)]
    assert len(audit) > len(copied)  # it did fire in the old one, which was marked


def test_move_without_tables_requires_naming_each(path):
    filled(path)
    with closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA)
    with closing(pqueue.open_queue(path)) as queue:
        names = ['a "quoted" name', "audit", "docs", "job_notes", "mine_on_jobs", "note job", "note_history"]
        names += ["note_queue", "orders", "pairs", "recent", "rowids", "strict_one", "texts"]
        assert sorted(queue.other_tables()) == names
        with pytest.raises(QueueError, match="cannot move: .*orders.* would stay behind; .*--without orders"):
            queue.expect_other_tables(names[:8])
        with pytest.raises(QueueError, match="cannot move without order: there is no such table"):
            queue.expect_other_tables([*names, "order"])
        queue.expect_other_tables(names)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "expected --to URL"),
        (["--to", "new.db", "--cancel"], 2, "expected --to URL"),
        (["--to", "new.db", "--without", "t"], 2, "into an SQLite file all is copied"),
        (["--to", "var/queue.db"], 1, "the target is this queue itself"),
        (["--to", "used.db"], 1, "the target holds jobs; expected an empty one"),
        (["--to", "empty.db"], 1, "/empty.db exists; delete that empty queue, or choose another name"),
        (["--to", "folder"], 1, "folder"),
        (["--to", ":memory:"], 2, "expected a path"),
        (["--to", "nosuch/../var/queue.db"], 1, "the target is this queue itself"),
        (["--to", "other.db", "--finish", "--yes"], 1, "no queue at"),
        (["--to", "used.db", "--finish", "--yes"], 1, "was not moved yet; run move without --finish first"),
        (["--cancel"], 1, "this queue is not being moved"),
    ],
)
def test_failed_move_is_reported_and_the_queue_keeps_running(place, path, arguments, code, message):
    filled(path)
    for name in ("used.db", "empty.db"):
        with closing(pqueue.open_queue(place.folder / name)) as queue:
            queue.enqueue("t") if name == "used.db" else None
    (place.folder / "folder").mkdir()
    before = state(path)
    done = place.run("admin.py", "move", *arguments)
    assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.stderr
    assert state(path) == before


def moved(path, new):
    """Move as the command does; return the old queue, open."""
    queue = pqueue.open_queue(path)
    assert queue.begin_move(str(new)) == 0
    assert queue.move_to_file(new)
    return queue


def test_queue_that_is_created_during_a_move_delivers_nothing_in_the_old_place(path, new):
    filled(path)
    with closing(pqueue.open_queue(path)) as queue:
        running = queue.dequeue("w")
        assert queue.begin_move(str(new)) == 1
        queue.enqueue("t", queue="tenant")
        queue.enqueue_many("t", [1, 2], queue="tenants")
        queue.enqueue("t", queue="assigned", assigned_to="w")
        queue.limit("limited", 9)
        queue.enqueue("t", queue="limited")
        assert queue.dequeue("w") is None
        assert queue.move_to_file(new) is None
        queue.complete(running)
        assert queue.begin_move(str(new)) == 0
        assert queue.move_to_file(new)["jobs"] == 28
        queue.enqueue("t", queue="later still")
        assert queue.dequeue("w") is None
        with closing(pqueue.open_queue(new)) as target:
            paused = {name for name, each in target.stats()["queues"].items() if each["paused"]}
            assert paused == {"held"}
            assert queue.finish_move(target) == {"carried": 1, "known": 0, "deleted": 29}
            assert target.stats()["queues"]["later still"]["pending"] == 1
            target.enqueue("t", queue="brand new")
            assert not target.stats()["queues"]["brand new"]["paused"]


def test_jobs_enqueued_in_the_old_queue_after_the_move_are_carried_over_once(place, path, new):
    filled(path)
    with closing(moved(path, new)) as queue, closing(pqueue.open_queue(new)) as target:
        other = target.enqueue("t", "meanwhile", key="taken")
        late = queue.enqueue("t", {"late": 1}, priority=7, max_attempts=2, queue="q")
        assert late == other
        queue.enqueue("t", "twice", key="taken")
        queue.mark_failed(queue.enqueue("t", "failed"), "by hand", by="ann")
        queue.enqueue("t", "scheduled", delay_seconds=1e6)
        count = target.count_jobs()
        assert queue.finish_move(target) == {"carried": 3, "known": 1, "deleted": 27}
        assert (queue.count_jobs(), target.count_jobs()) == (0, count + 3)
        scheduled, failed, pending = target.list_jobs(limit=3)
        assert (scheduled.payload, pending.payload, pending.priority) == ("scheduled", {"late": 1}, 7)
        assert [(each["event"], each["error"]) for each in target.history(failed.id)] == [("marked failed", "by hand")]
        queue.enqueue("t", "last")
    done = place.run("admin.py", "move", "--to", new, "--finish", "--yes")
    assert done.stdout == "carried over 1 job enqueued since; deleted 1 job of the old queue\n", done.stderr
    done = place.run("admin.py", "move", "--to", new, "--finish", "--yes")
    assert done.stdout == "deleted 0 jobs of the old queue\n", done.stderr


def test_finishing_a_move_again_carries_over_new_jobs(path, new):
    filled(path)
    with closing(moved(path, new)) as queue, closing(pqueue.open_queue(new)) as target:
        queue.finish_move(target)
        before = target.count_jobs()
        for number in (1, 2):
            assert queue.enqueue("t") == 1  # SQLite starts again
            assert queue.finish_move(target) == {"carried": 1, "known": 0, "deleted": 1}
            assert target.count_jobs() == before + number


def test_jobs_that_were_pruned_in_the_new_queue_do_not_come_back(path, new):
    filled(path)
    with closing(moved(path, new)) as queue, closing(pqueue.open_queue(new)) as target:
        target.delete_jobs()
        assert queue.finish_move(target)["carried"] == 0
        assert target.count_jobs() == 0


def test_old_queue_that_was_resumed_and_runs_jobs_is_not_finished(path, new):
    filled(path)
    with closing(moved(path, new)) as queue, closing(pqueue.open_queue(new)) as target:
        queue.resume("default")
        job = queue.dequeue("w")
        with pytest.raises(
            pqueue.InvalidTransition, match=r"jobs run in the old queue \(1\), which was resumed; pause"
        ):
            queue.finish_move(target)
        queue.release(job)
        queue.finish_move(target)


def test_queue_is_finished_only_into_where_it_went(path, new, tmp_path):
    filled(path)
    with closing(moved(path, new)) as queue, closing(pqueue.open_queue(tmp_path / "other.db")) as other:
        with pytest.raises(QueueError, match=f"expected the target to be {new}"):
            queue.finish_move(other)
        finish = "finish that with python3 admin.py move --to URL --finish, or cancel it"
        with pytest.raises(QueueError, match=f"this queue was moved to {new}; {finish}"):
            queue.begin_move(str(tmp_path / "third.db"))
        queue.cancel_move()
        assert queue.dequeue("w", queues=["default"])
        assert queue.dequeue("w", queues=["held"]) is None


def test_job_of_a_dead_consumer_does_not_keep_a_move_waiting(place, path, new):
    filled(path)
    code = "import pqueue, sys, os, signal; q = pqueue.open_queue(sys.argv[1]); q.dequeue('w'); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    done = place.run("admin.py", "move", "--to", new)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_move_that_is_stopped_while_it_waits_leaves_a_way_on(place, path, new, sign):
    filled(path)
    queue = place.queue()
    job = queue.dequeue("w")
    before = state(path)
    moving = place.start("admin.py", "move", "--to", new)
    wait_until(queue.move_status)
    moving.send_signal(sign)
    assert moving.wait() in (130, -9)
    if sign == signal.SIGINT:  # it resumed what it had paused
        assert (state(path), queue.move_status()) == (before, None)
        return
    cancel = f"python3 {ROOT}/admin.py move --cancel"
    sentence = f"a move to {new} is in progress or was interrupted: repeat the command, or cancel it with {cancel}"
    assert sentence in place.run("admin.py", "doctor").stdout
    assert sentence in place.run("admin.py", "why", "7").stdout
    done = place.run("admin.py", "move", "--cancel")
    assert (done.returncode, state(path)) == (0, before), done.stderr
    moving = place.start("admin.py", "move", "--to", new)
    wait_until(queue.move_status)
    moving.kill()
    moving.wait()
    queue.complete(job)
    done = place.run("admin.py", "move", "--to", new)
    assert (done.returncode, "moved 23 jobs" in done.stdout) == (0, True), done.stderr
    assert {name: paused for name, paused in state(new)[2].items() if paused} == {"held": True}


def test_move_onto_a_full_disk_leaves_the_old_queue_as_it_was(path, new, monkeypatch):
    import admin  # not at hand where single guards are removed

    filled(path)
    before = state(path)

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setenv("PQUEUE_URL", str(path))
    monkeypatch.setattr(pqueue_sqlite, "_copy_database", full)
    assert admin.main(["move", "--to", str(new)]) == 1
    assert state(path) == before
    assert not new.exists()


def test_move_that_cannot_begin_does_not_say_that_the_queue_is_paused(path, new, monkeypatch, capsys):
    import admin  # not at hand where single guards are removed

    def refuse(*_, **__):
        raise QueueError("its file system is read-only")

    filled(path)
    monkeypatch.setenv("PQUEUE_URL", str(path))
    monkeypatch.setattr(pqueue.PersistentQSQLite, "begin_move", refuse)
    assert admin.main(["move", "--to", str(new)]) == 1
    assert "paused" not in capsys.readouterr().err


def killed_at_line(number, call):
    """Call it in a child that kills itself before the line of this number; return whether it came so far."""
    child = os.fork()
    if not child:
        lines = iter(range(10**6))
        is_ours = cache(lambda path: Path(path).name.startswith(("pqueue", "admin", "moving")))

        def trace(frame, event, _):
            if not is_ours(frame.f_code.co_filename):
                return None
            if event == "line" and next(lines) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        call()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def start_anew(path, new, files):
    for each in [*path.parent.iterdir(), *new.parent.glob("new.db*")]:
        each.unlink() if each.is_file() else None
    for name, data in files.items():
        (path.parent / name).write_bytes(data)


def test_move_that_is_killed_anywhere_is_continued_or_given_up(path, new, monkeypatch, capsys):
    import admin  # not at hand where single guards are removed

    filled(path)
    before = state(path)
    files = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
    monkeypatch.setenv("PQUEUE_URL", str(path))
    monkeypatch.setitem(sys.modules, "typer", None)  # which takes a third of the time
    number, was_killed, seen = 0, True, set()
    while was_killed:
        start_anew(path, new, files)
        was_killed = killed_at_line(number, lambda: admin.main(["move", "--to", str(new)]))
        is_there = new.exists() and new.stat().st_size > 0
        seen.add(is_there)
        if number % 2 and not is_there:
            with closing(pqueue.open_queue(path)) as queue:
                status = queue.move_status()
            assert admin.main(["move", "--cancel", "--yes"]) == int(status is None)
            assert state(path) == before
        else:
            assert admin.main(["move", "--to", str(new)]) == int(is_there)
            assert state(new) == before
            assert admin.main(["move", "--to", str(new), "--finish", "--yes"]) == 0
            assert state(new) == before
            assert state(path)[0] == []
        number += 1 + 2 * (number > 150)
    assert seen == {True, False}
    assert number > 150
    assert "Traceback" not in capsys.readouterr().err


def test_move_in_steps_that_is_killed_anywhere_is_continued_or_given_up(path, new, monkeypatch):
    filled(path)
    with closing(pqueue.open_queue(path)) as queue:
        for job_id in range(6, 12):
            queue.cancel(job_id)
    before = state(path)
    files = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
    monkeypatch.setattr(pqueue_move, "FINISHED_JOBS", pqueue_move.FINISHED_JOBS.replace("LIMIT 1000", "LIMIT 2"))

    def move():
        with closing(pqueue.open_queue(path)) as queue, closing(pqueue.open_queue(new)) as target:
            if not queue.has_moved_to(target):
                queue.copy_finished_to(target)
                assert queue.begin_move(target.name) == 0
                queue.move_to(target)

    number, was_killed, seen = 0, True, set()
    while was_killed:
        start_anew(path, new, files)
        was_killed = killed_at_line(number, move)
        with closing(pqueue.open_queue(path)) as queue, closing(pqueue.open_queue(new)) as target:
            status, copied = queue.move_status(), target.count_jobs()
            seen.add((status and status["event"], target.is_partial_copy()))
            if number % 2 and not queue.has_moved_to(target):
                assert target.dequeue("w") is None
                queue.cancel_move()
                assert state(path) == before
        if not number % 2:
            move()
            assert state(new) == before
            with closing(pqueue.open_queue(path)) as queue, closing(pqueue.open_queue(new)) as target:
                assert queue.finish_move(target)["carried"] == 0
            assert state(new) == before
        number += 29
    assert copied == 23
    assert seen >= {(None, False), (None, True), ("moving", True), ("moved", False)}
    assert number > 500


def test_finish_that_is_killed_anywhere_carries_each_job_over_once(path, new, monkeypatch, capsys):
    import admin  # not at hand where single guards are removed

    filled(path)
    with closing(moved(path, new)) as queue:
        queue.enqueue_many("t", ["late"] * 3, queue="late")
    files = {each.name: each.read_bytes() for each in path.parent.iterdir() if each.is_file()}
    copy = new.read_bytes()
    monkeypatch.setenv("PQUEUE_URL", str(path))
    monkeypatch.setitem(sys.modules, "typer", None)  # which takes a third of the time
    number, was_killed = 0, True
    finish = ["move", "--to", str(new), "--finish", "--yes"]
    while was_killed:
        start_anew(path, new, files)
        new.write_bytes(copy)
        was_killed = killed_at_line(number, lambda: admin.main(finish))
        assert admin.main(finish) == 0
        with closing(pqueue.open_queue(new)) as target, closing(pqueue.open_queue(path)) as queue:
            assert (target.count_jobs(), target.count_jobs(queue="late"), queue.count_jobs()) == (26, 3, 0)
        number += 1 + 2 * (number > 150)
    assert number > 150


CONSUMER = """
import pqueue, sys
queue = pqueue.open_queue(sys.argv[1])
while True:
    for job in queue.dequeue_many(sys.argv[2], 4):
        print(job.payload, flush=True)
        queue.complete(job)
    queue.wait(1, consumer=sys.argv[2])
"""
PRODUCER = """
import itertools, pqueue, sys, time
queue = pqueue.open_queue(sys.argv[1])
for number in itertools.count():
    queue.enqueue("t", number, queue=f"tenant {number % 400}")
    print(number, flush=True)
    time.sleep(0.002)
"""


def test_jobs_enqueued_while_a_live_queue_is_moved_run_exactly_once(place, path, new):
    def start(code, *arguments):
        return place.start_command([sys.executable, "-c", code, *map(str, arguments)], PYTHONPATH=str(ROOT))

    queue = place.queue()
    producer, old = start(PRODUCER, path), [start(CONSUMER, path, f"old-{number}") for number in range(2)]
    wait_until(lambda: producer.out.read_text().count("\n") > 200)
    done = place.run("admin.py", "move", "--to", new)
    assert done.returncode == 0, done.stderr
    fresh = [start(CONSUMER, new, f"new-{number}") for number in range(2)]
    enqueued = producer.out.read_text().count("\n")
    wait_until(lambda: producer.out.read_text().count("\n") > enqueued + 200)  # it still uses the old queue
    producer.terminate()
    producer.wait()
    done = place.run("admin.py", "move", "--to", new, "--finish", "--yes")
    assert done.returncode == 0, done.stderr
    assert "carried over" in done.stdout
    assert queue.count_jobs() == 0
    with closing(pqueue.open_queue(new)) as target:
        wait_until(lambda: not any(target.stats()["states"][each] for each in pqueue.UNFINISHED))
    time.sleep(0.1)
    for child in [*old, *fresh]:
        child.terminate()
        child.wait()
    ran = sorted(int(line) for child in [*old, *fresh] for line in child.out.read_text().split())
    acknowledged = [int(line) for line in producer.out.read_text().split("\n") if line]
    assert len(ran) == len(set(ran))
    assert set(acknowledged) <= set(ran)
