"""Public bug reports and newcomers' mistakes, as small scripts with the results that are right."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from conftest import ROOT

from pqueue import PersistentQSQLite, QueueError
from pqueue_schema import TABLES

# Locks that ordinary code in the same process drops ###################################################################


def in_another_process(path, code):
    """Run the code with a queue `q` of its own, and return what it prints as JSON."""
    program = f"import json, pqueue; q = pqueue.open_queue({str(path)!r}); print(json.dumps({code})); q.close()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def read(path):
    path.read_bytes()


def copy(path):
    shutil.copy(path, path.with_name("copy.db"))


def copy_folder(path):
    for each in path.parent.iterdir():
        if each.is_file():
            shutil.copy(each, path.with_name(f"copy-of-{each.name}"))


WAYS = {
    "copy": copy,
    "open and close": lambda path: path.open("rb").close(),
    "append": lambda path: path.open("ab").close(),
    "read the file": read,
    "read the log": lambda path: read(Path(f"{path}-wal")),
    "read the shared memory": lambda path: read(Path(f"{path}-shm")),
    "copy everything": copy_folder,
}


def enqueue(queue, payload):
    """Return whether it was acknowledged: if not, the error must say why."""
    try:
        queue.enqueue("t", payload)
    except QueueError as error:
        assert "replaced" in str(error)
        return False
    return True


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("between", ["q.stats() and 0", "q.enqueue('t', 'between')", "len(q.check())"])
def test_writer_whose_locks_were_dropped_acknowledges_only_visible_jobs(tmp_path, way, between):
    path, acknowledged = tmp_path / "q.db", ["first"]
    queue = PersistentQSQLite(path)
    queue.enqueue("t", "first")
    for turn in range(3):
        WAYS[way](path)
        in_another_process(path, between)
        acknowledged += ["between"] * ("between" in between)
        if enqueue(queue, mine := f"mine {turn}"):
            acknowledged.append(mine)
        in_another_process(path, f"q.enqueue('t', 'theirs {turn}')")
        acknowledged.append(f"theirs {turn}")
    with suppress(QueueError):
        queue.close()
    seen = in_another_process(path, "[[job.payload for job in q.list_jobs()], q.check()['problems']]")
    assert [sorted(seen[0]), seen[1]] == [sorted(acknowledged), []]


def test_worker_whose_locks_were_dropped_completes_only_visible_jobs(tmp_path):
    path = tmp_path / "q.db"
    queue = PersistentQSQLite(path)
    queue.enqueue("t")
    job = queue.dequeue("a")
    copy(path)
    in_another_process(path, "q.stats() and 0")
    try:
        queue.complete(job)
    except QueueError as error:
        assert "replaced" in str(error)
        expected = {"processing", "pending"}
    else:
        expected = {"completed"}
    assert in_another_process(path, f"q.get({job.id}).state") in expected
    with suppress(QueueError):
        queue.close()


# A clean stop recorded as a death #####################################################################################


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_worker_that_closes_its_queue_gives_its_jobs_back_uncounted(tmp_path, max_attempts):
    with closing(PersistentQSQLite(tmp_path / "q.db")) as queue:
        job_id = queue.enqueue("t", max_attempts=max_attempts)
    for _ in range(4):
        with closing(PersistentQSQLite(tmp_path / "q.db")) as queue:
            job = queue.dequeue("embedded")
            assert (job.id, job.attempts) == (job_id, 1)
    with closing(PersistentQSQLite(tmp_path / "q.db")) as queue:
        job = queue.get(job_id)
        assert (job.state, job.attempts, job.error) == ("pending", 0, None)
        assert {each["event"] for each in queue.history(job_id)} <= {"released"}


def test_worker_that_closes_its_queue_releases_the_jobs_of_all_its_consumers(tmp_path):
    other = PersistentQSQLite(tmp_path / "q.db")
    ids = other.enqueue_many("t", range(6))
    queue = PersistentQSQLite(tmp_path / "q.db")
    held = [*queue.dequeue_many("a", 3), *queue.dequeue_many("b", 2)]
    queue.complete(held[0])
    mine = other.dequeue("c")
    queue.close()
    states = [(job.state, job.attempts) for job in map(other.get, ids)]
    assert states == [("completed", 1), *[("pending", 0)] * 4, ("processing", 1)]
    other.complete(mine)
    other.close()


# The application's tables left behind #################################################################################

SCHEMA = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE orders (id INTEGER PRIMARY KEY AUTOINCREMENT, customer REFERENCES customers, total REAL, note BLOB);
CREATE TABLE "odd name" ("a b" TEXT, PRIMARY KEY ("a b")) WITHOUT ROWID;
CREATE TABLE empty (x);
CREATE INDEX orders_total ON orders (total DESC) WHERE total > 0;
CREATE VIEW big AS SELECT * FROM orders WHERE total > 10;
CREATE TABLE log (text);
INSERT INTO customers VALUES (1, 'Ada'), (7, 'Grace');
INSERT INTO orders VALUES (5, 1, 12.5, x'00ff'), (9, 7, NULL, NULL);
INSERT INTO "odd name" VALUES ('x'), ('ü');
CREATE TRIGGER logged AFTER INSERT ON orders BEGIN INSERT INTO log VALUES ('order ' || new.id); END;
INSERT INTO orders VALUES (10, 7, 3, 'paid');
DELETE FROM orders WHERE id = 10;
"""


def tables(path):
    """Return the schema that is not the queue's, and the rows of its tables."""
    with closing(sqlite3.connect(path)) as db:
        schema = db.execute(f"SELECT type, name, sql FROM sqlite_master WHERE tbl_name NOT IN {TABLES}").fetchall()
        names = [name for kind, name, _ in schema if kind in ("table", "view")]
        return sorted(map(repr, schema)), {name: db.execute(f'SELECT * FROM "{name}"').fetchall() for name in names}


def test_operator_who_moves_a_queue_finds_the_tables_of_the_application_there(place):
    path, new = place.folder / "var/queue.db", place.folder / "new.db"
    place.queue().enqueue("t")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMA)
    done = place.run("admin.py", "move", "--to", new)
    assert done.returncode == 0, done.stderr
    assert tables(new) == tables(path)
    with closing(sqlite3.connect(new)) as db:
        db.execute("INSERT INTO orders (total) VALUES (20)")
        assert db.execute("SELECT id FROM big WHERE total = 20").fetchall() == [
            (11,)
        ]  # not an id that was given before
        assert db.execute("SELECT text FROM log").fetchall() == [("order 10",), ("order 11",)]
