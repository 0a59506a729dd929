"""A short attack on the whole system, and the auditor's own tests: it must see what it is there to see."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing

import pytest
from attack_audit import EFFECTS, Audit, Facts, Loss
from conftest import ROOT

import pqueue


@pytest.mark.parametrize(
    ("acts", "seed"),  # with this seed each of the acts is among the first
    [(("rm-both", "restore"), 6), (("delete-job-files", "hold-lock", "move"), 3)],
)
def test_system_under_a_short_attack_accounts_for_every_job(tmp_path, acts, seed):
    only = [word for act in acts for word in ("--only", act)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/attack.py"), "--seconds", "15", "--seed", str(seed), *only],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ATTACK_IN": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    figures = {name: int(number.replace(",", "")) for name, number in re.findall(r"(.+?) +([\d,]+)\n", done.stdout)}
    assert figures["jobs acknowledged"] > 3000
    assert any(name.startswith("act ") for name in figures)


class Scene:
    """A queue with records as an attack leaves them, in which nothing is wrong until a test makes it so."""

    def __init__(self, folder):
        self.folder, self.path, self.facts = folder, folder / "data/queue.db", Facts()
        for name in ("ledger", "var/log", "var/files"):
            (folder / name).mkdir(parents=True)
        with closing(pqueue.PersistentQSQLite(self.path)) as queue, queue.transaction() as db:
            db.execute(EFFECTS)

    def record(self, kind, **facts):
        with (self.folder / "ledger/1.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, **facts}) + "\n")

    def enqueue(self, uid, task):
        self.record("stored", uid=uid, asked=100.0, acked=100.1)
        with closing(pqueue.PersistentQSQLite(self.path)) as queue:
            queue.enqueue(task, {"uid": uid})

    def done(self, uid, task="quick"):
        """Enqueue, run and complete a job, and record it all."""
        self.enqueue(uid, task)
        with closing(pqueue.PersistentQSQLite(self.path)) as queue:
            job = queue.dequeue("consumer_00")
            self.began(uid)
            self.record("ended", uid=uid, attempt=job.attempts, consumer="consumer_00")
            queue.complete(job)

    def began(self, uid, since=50.0):
        self.record("began", uid=uid, at=100.2, since=since, token="t.1")

    def change(self, sql, *values):
        with closing(pqueue.PersistentQSQLite(self.path)) as queue, queue.transaction() as db:
            db.execute(sql, values)

    def problems(self):
        return Audit(self.folder, self.path, self.facts).problems()


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_auditor_finds_nothing_where_nothing_is_wrong(scene):
    scene.done("quick-1")
    scene.done("once-1", "once")
    scene.done("effect-1", "effect")
    scene.change("INSERT INTO effects VALUES ('effect-1', 3, 1, 0)")
    (scene.folder / "ledger/torn.jsonl").write_text('{"kind": "stored", "ui')
    assert scene.problems() == []


def test_auditor_excuses_a_lost_job_by_the_acts_that_may_have_lost_it(scene):
    scene.record("stored", uid="quick-1", asked=100.0, acked=101.0)
    assert "1 acknowledged jobs are gone: quick-1" in scene.problems()[0]
    for since, until in ((101.5, 110.0), (90.0, 99.0)):
        scene.facts.losses = [Loss("restore", since, until, True)]
        assert len(scene.problems()) == 1
    for since, until in ((90.0, 110.0), (90.0, 100.5), (100.5, 110.0)):
        scene.facts.losses = [Loss("restore", since, until, True)]
        assert scene.problems() == []
    scene.facts.losses = []
    scene.facts.prunable = {"quick-1"}
    assert scene.problems() == []


def test_auditor_reads_the_acknowledgements_in_the_log_of_the_producer(scene):
    line = "2026-01-01T00:00:02.500Z enqueued job=7 file=job_20260101T000001_0123456789ab.txt\n"
    (scene.folder / "var/log/producer.log").write_text(f"{line}2026-01-01T00:00:09.0")
    (problem,) = scene.problems()
    assert "job_20260101T000001_0123456789ab.txt" in problem
    asked = 1767225601.0
    scene.facts.losses = [Loss("replace", asked - 10, asked - 0.1, True)]
    assert len(scene.problems()) == 1
    scene.facts.losses = [Loss("replace", asked - 10, asked + 0.1, True)]
    assert scene.problems() == []


def test_auditor_sees_that_a_job_with_one_attempt_ran_again(scene):
    scene.done("once-1", "once")
    scene.began("once-1")
    assert "ran again: once-1 ran 2 times" in scene.problems()[0]
    scene.facts.losses = [Loss("replace", 10.0, 20.0, True)]
    assert len(scene.problems()) == 1


def test_auditor_lets_a_process_that_began_after_an_act_run_a_job_again(scene):
    scene.done("once-1", "once")
    scene.facts.losses = [Loss("replace", 60.0, 70.0, True)]
    scene.began("once-1", since=71.0)
    assert scene.problems() == []


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([], "effect-1 is completed and has none"),
        ([0, 0], "effect-1 has 2, and was resubmitted 0 times"),
        ([1], "under a stale token: effect-1"),
    ],
)
def test_auditor_sees_that_an_effect_is_not_there_once(scene, rows, problem):
    scene.done("effect-1", "effect")
    for stale in rows:
        scene.change("INSERT INTO effects VALUES ('effect-1', 1, 1, ?)", stale)
    assert problem in scene.problems()[0]


def test_auditor_sees_that_a_committed_effect_is_gone(scene):
    scene.record("effect", uid="effect-1", asked=100.0, acked=101.0)
    assert "committed effects are gone: effect-1" in scene.problems()[0]


def test_auditor_sees_jobs_that_are_failed_and_never_began(scene):
    for number in range(2):
        scene.enqueue(f"once-{number}", "once")
    scene.change("UPDATE jobs SET state = 'failed', attempts = 1, finished_at = 1.0")
    scene.change("INSERT INTO history (job_id, at, event, actor, attempt) SELECT id, 1.0, 'died', 'c', 1 FROM jobs")
    assert "2 jobs never began, but are failed" in scene.problems()[0]


def test_auditor_sees_a_job_completed_by_a_consumer_that_had_not_run_it(scene):
    scene.done("quick-1")
    scene.change("UPDATE jobs SET attempts = 2")
    assert scene.problems() == ["1 jobs were completed by who had not run them: quick-1 attempt 2 by consumer_00"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("2026-01-01T00:00:01.000Z 2026-01-01T00:00:00.000Z a\n", "is stamped 2 times"),
        ("2026-01-01T00:00:01.000Z a\nb\n", "is stamped in part"),
        ("2026-01-01T00:00:01.000Z a\n2026-01-01T00:00:02.000Z b\n", "is stamped in part"),
        ("a\n", None),
        ("2026-01-01T00:00:01.000Z a\n2026-01-01T00:00:01.000Z b\n", None),
    ],
)
def test_auditor_sees_a_file_that_is_stamped_twice_or_in_part(scene, text, problem):
    (scene.folder / "var/files/job_1.txt").write_text(text)
    found = scene.problems()
    assert [problem in each for each in found] == [True] * (problem is not None)


def test_auditor_sees_that_an_unfinished_job_lost_its_file(scene):
    scene.record("missing", name="job_1.txt", at=100.0)
    scene.facts.deleted["job_1.txt"] = 90.0
    assert "files of unfinished jobs are gone: job_1.txt" in scene.problems()[0]
    scene.facts.losses = [Loss("restore", 95.0, 96.0, True)]  # it was finished before the backup, and so after it
    assert len(scene.problems()) == 1
    scene.facts.losses = [Loss("restore", 85.0, 96.0, True)]
    assert scene.problems() == []


def test_auditor_sees_a_damaged_database(scene):
    scene.done("quick-1")
    scene.path.write_bytes(scene.path.read_bytes()[:5000])
    assert "the database is damaged" in scene.problems()[0]
