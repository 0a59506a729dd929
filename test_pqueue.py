"""The contract suite: what every backend must do, and what the SQLite file adds. Needs nothing installed.

python3 test_pqueue.py
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import gc
import getpass
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import select
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import unittest
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from multiprocessing import resource_tracker
from pathlib import Path
from unittest import mock

import pqueue
import pqueue_cron
import pqueue_files
import pqueue_groups
import pqueue_locks
import pqueue_move
import pqueue_outcomes
import pqueue_schedules
import pqueue_schema
import pqueue_search
import pqueue_sqlite
import pqueue_tasks
import pqueue_values
from pqueue import (
    InvalidTransition,
    JobFailed,
    JobNotFound,
    LeaseLost,
    QueueBusy,
    QueueError,
    QueueFull,
    SchemaMismatch,
    open_queue,
)

# Some tests fork while other threads run. With -W error, Python 3.15 raises this warning; older versions print it.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

HERE = Path(__file__).resolve().parent
NOW = 1_800_000_000.0
DAY = 86400.0
# How long to wait for what must happen, which is no limit on speed
PATIENCE_SECONDS = float(os.environ.get("PQUEUE_TEST_PATIENCE", "180"))


def wait_until(condition, seconds=PATIENCE_SECONDS):
    """Return the condition's first true value; fail the test when there is none in time, however busy the machine."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > seconds:
            raise AssertionError(f"waited {seconds} s in vain")
        time.sleep(min(max(0.005, waited / 50), 0.05))


def held():
    """Return what this process holds and a test might leave behind: descriptors, threads and children."""
    found = {
        f"thread {thread.name} {thread.ident}"
        for thread in threading.enumerate()
        if not isinstance(thread, threading._DummyThread) or thread.ident in sys._current_frames()  # else it has ended
    }
    with suppress(FileNotFoundError):  # no /proc
        for number in set(os.listdir("/proc/self/fd")) - {"0", "1", "2"}:
            with suppress(FileNotFoundError):
                found.add(f"descriptor {number} of {os.readlink(f'/proc/self/fd/{number}')}")
        for thread in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError):
                found |= {f"child {pid}" for pid in Path(f"/proc/self/task/{thread}/children").read_text().split()}
    return found


@contextmanager
def nothing_left():
    """Fail when what runs in it leaves a descriptor, and so a connection, a thread or a child, or its end an error."""
    resource_tracker.ensure_running()  # which multiprocessing leaves running
    before, errors = held(), []
    with mock.patch.object(sys, "unraisablehook", errors.append):
        yield

    def is_clean():
        return held() <= before or (gc.collect() and held() <= before)

    with suppress(AssertionError):
        wait_until(is_clean)
    left = [*sorted(held() - before), *(repr(error.exc_value) for error in errors)]
    if left:
        raise AssertionError(f"left behind: {', '.join(left)}")


@contextmanager
def python(code, *arguments):
    """Run a Python child with pqueue at hand; yield it, and see to it that it is gone."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\n{code}", *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


class RolledBack(Exception):
    """Ends a transaction."""


REFUSED = (pqueue.QueueError, ValueError)


def parameters_of(method):
    """Return the parameters of a method without self, and the filters that it takes."""
    found = list(inspect.signature(method).parameters.values())[1:]
    if found and found[-1].annotation == "Unpack[Filters]":
        kinds = {name: each.__forward_arg__ for name, each in pqueue.Filters.__annotations__.items()}
        kind = inspect.Parameter.KEYWORD_ONLY
        found[-1:] = [inspect.Parameter(name, kind, default=None, annotation=each) for name, each in kinds.items()]
    return found


def finish(done):
    """Do what a method has returned as a coroutine, a generator or a context manager."""
    if inspect.iscoroutine(done):
        asyncio.run(done)
    elif inspect.isgenerator(done):
        list(done)
    elif hasattr(done, "__enter__"):
        with done:
            pass


def random_work(q):
    """Let everything happen to jobs of two queues; yield the time after each step."""
    chance, now = random.Random(5), NOW
    q.limit("b", 10**6, running=2)
    for turn in range(150):
        now += chance.choice((0, 1, 300))
        options = {"group": chance.choice("xyz") if chance.random() < 0.7 else None, "now": now}
        options |= {"queue": chance.choice("ab"), "delay_seconds": chance.choice((0, 0, 600))}
        options |= {"expire_seconds": chance.choice((None, 400)), "assigned_to": chance.choice((None, None, "v"))}
        jobs = q.list_jobs(limit=10_000, excerpt=0)
        some = chance.choice(jobs).id if jobs else 0
        verb = chance.choice(("cancel", "mark_failed", "resubmit", "run_now", "assign", "change", "delete_jobs"))
        if not jobs or chance.random() < 0.4:
            q.enqueue(chance.choice("tu"), **options)
        elif chance.random() < 0.4:
            for job in q.dequeue_many(chance.choice("vw"), chance.randrange(1, 4), lease_seconds=900, now=now):
                end = chance.choice((q.complete, q.cancel, q.release, q.fail, None))
                error = ["no"] if end == q.fail else []
                end and end(job.id if end == q.cancel else job, *error, now=now)
        else:
            with suppress(pqueue.QueueError):
                if verb == "delete_jobs":
                    q.delete_jobs([some])
                elif verb == "assign":
                    q.assign(some, chance.choice((None, "v")))
                elif verb == "change":
                    q.change(some, queue=chance.choice("ab"), group=chance.choice(("x", None)), now=now)
                else:
                    getattr(q, verb)(some, now=now)
        if turn % 25 == 24:
            q.prune(chance.choice((0, 3600)), now=now)
            q.delete_jobs([job.id for job in q.list_jobs(state="pending", group="x")])
        yield now


class QueueContract:
    """What any backend must do. The other base class says how to `open` a queue; two calls see the same jobs."""

    polls = False  # nothing wakes a consumer

    def setUp(self):
        super().setUp()
        self.queue = self.open()

    def execute(self, db, sql, **params):
        """Run a statement on what `transaction` yields."""
        return db.execute(sql, params)

    def reopen(self):
        queue = self.open()
        self.addCleanup(queue.close)
        return queue

    def another(self):
        self.queue.enqueue("t")
        return self.queue.dequeue("w")

    def taken(self, **options):
        """Enqueue and dequeue a job."""
        self.queue.enqueue("t", now=NOW, **options)
        return self.queue.dequeue("worker", now=NOW)

    # The state machine

    def in_state(self, state):
        """Return a job in this state, as its consumer holds it. "stolen": its lease went to another consumer;
        "overdue": it was to start by now; "expired": it was cancelled for that."""
        queue = self.queue
        if state in ("overdue", "expired"):
            job = queue.get(queue.enqueue("t", expires_at=NOW, now=NOW - 10))
            if state == "expired":
                queue.dequeue("worker", now=NOW)
            return queue.get(job.id)
        if state == "scheduled":
            return queue.get(queue.enqueue("t", run_at=NOW + 1000, now=NOW))
        if state == "waiting":
            return queue.get(queue.enqueue("t", after=[queue.enqueue("t", run_at=NOW + 9999, now=NOW)], now=NOW))
        job = queue.get(queue.enqueue("t", now=NOW))
        if state == "pending":
            return job
        job = queue.dequeue("worker", now=NOW)
        if state == "stolen":
            self.assertEqual(queue.dequeue("thief", now=NOW + 61).id, job.id)
        elif state == "completed":
            queue.complete(job, now=NOW)
        elif state == "failed":
            queue.fail(job, "no", retry=False, now=NOW)
        elif state == "cancelled":
            queue.cancel(job.id, now=NOW)
        return job

    def test_table_of_states_and_verbs_holds(self):
        q = self.queue
        verbs = {
            "complete": lambda job: q.complete(job, now=NOW),
            "fail": lambda job: q.fail(job, "no", now=NOW),
            "fail for good": lambda job: q.fail(job, "no", retry=False, now=NOW),
            "release": lambda job: q.release(job, now=NOW),
            "extend": lambda job: q.extend(job, 5, now=NOW),
            "update": lambda job: q.update(job, progress=0.5),
            "resubmit": lambda job: q.resubmit(job.id, now=NOW),
            "resubmit for later": lambda job: q.resubmit(job.id, delay_seconds=50, now=NOW),
            "mark_failed": lambda job: q.mark_failed(job.id, now=NOW),
            "cancel": lambda job: q.cancel(job.id, now=NOW),
            "assign": lambda job: q.assign(job.id, "w2", now=NOW),
            "change": lambda job: q.change(job.id, payload=[1], delay_seconds=0, now=NOW),
            "change its time": lambda job: q.change(job.id, delay_seconds=50, now=NOW),
            "run_now": lambda job: q.run_now(job.id, now=NOW),
            "result": lambda job: q.result(job.id, timeout_seconds=0),
            "dequeue": lambda _: q.dequeue("worker", now=NOW),
            "dequeue when due": lambda _: q.dequeue("worker", now=NOW + 2000),
        }
        lost, bad, late, ended = LeaseLost, InvalidTransition, TimeoutError, JobFailed
        table = {  # state: new state or error, in the order of the verbs above
            "scheduled": [bad] * 6
            + [
                bad,
                bad,
                "failed",
                "cancelled",
                "scheduled",
                "pending",
                "scheduled",
                "pending",
                late,
                "scheduled",
                "processing",
            ],
            "waiting": [bad] * 8
            + ["failed", "cancelled", "waiting", "waiting", "waiting", "pending", late, "waiting", "waiting"],
            "pending": [bad] * 6
            + [
                bad,
                bad,
                "failed",
                "cancelled",
                "pending",
                "pending",
                "scheduled",
                bad,
                late,
                "processing",
                "processing",
            ],
            "overdue": [bad] * 8
            + ["failed", "cancelled", "pending", "pending", "scheduled", bad, late, "cancelled", "cancelled"],
            "expired": [bad] * 6 + ["pending", "scheduled", *[bad] * 6, ended, "cancelled", "cancelled"],
            "processing": ["completed", "scheduled", "failed", "pending", "processing", "processing"]
            + [bad, bad, "failed", "cancelled", "pending", bad, bad, bad, late, "processing", "processing"],
            "stolen": [lost] * 6
            + [bad, bad, "failed", "cancelled", "pending", bad, bad, bad, late, "processing", "processing"],
            "completed": [lost] * 6 + ["pending", "scheduled", *[bad] * 6, "completed", "completed", "completed"],
            "failed": [lost] * 6 + ["pending", "scheduled", *[bad] * 6, ended, "failed", "failed"],
            "cancelled": [lost] * 6 + ["pending", "scheduled", *[bad] * 6, ended, "cancelled", "cancelled"],
        }
        for state, row in table.items():
            for (verb, call), expected in zip(verbs.items(), row, strict=True):
                with self.subTest(state=state, verb=verb):
                    q.delete_jobs(force=True)
                    job = self.in_state(state)
                    before = q.get(job.id)
                    if isinstance(expected, str):
                        call(job)
                        self.assertEqual(q.get(job.id).state, expected)
                    else:
                        with self.assertRaises(expected):
                            call(job)
                        self.assertEqual(q.get(job.id), before)

    def test_verb_changes_only_its_job(self):
        q = self.queue
        verbs = {
            "complete": lambda job: q.complete(job, now=NOW),
            "complete and dequeue": lambda job: q.complete_and_dequeue([(job, None)], "worker", 0, now=NOW),
            "fail": lambda job: q.fail(job, "no", now=NOW),
            "fail for good": lambda job: q.fail(job, "no", retry=False, now=NOW),
            "release": lambda job: q.release(job, now=NOW),
            "extend": lambda job: q.extend(job, 5, now=NOW),
            "update": lambda job: q.update(job, progress=0.5, result="half"),
            "mark_failed": lambda job: q.mark_failed(job.id, now=NOW),
            "cancel": lambda job: q.cancel(job.id, now=NOW),
            "assign": lambda job: q.assign(job.id, "w2", now=NOW),
            "delete": lambda job: q.delete_jobs([job.id], force=True),
            "resubmit": lambda job: (q.cancel(job.id, now=NOW), q.resubmit(job.id, now=NOW)),
            "change": lambda job: (q.release(job, now=NOW), q.change(job.id, payload=7, queue="new", now=NOW)),
            "run_now": lambda job: (q.release(job, delay_seconds=9, now=NOW), q.run_now(job.id, now=NOW)),
        }

        def others(job):
            return [(each, q.history(each.id)) for each in q.list_jobs() if each.id != job.id]

        for verb, call in verbs.items():
            with self.subTest(verb=verb):
                q.delete_jobs(force=True)
                for state in ("completed", "failed", "cancelled", "scheduled"):
                    self.in_state(state)
                q.enqueue_many("t", range(3), now=NOW)
                job, _ = q.dequeue_many("worker", 2, now=NOW)  # which share their token
                before = others(job)
                call(job)
                self.assertEqual(others(job), before)

    def test_operator_reads_why_a_verb_was_refused(self):
        q, finished, running = self.queue, self.in_state("completed").id, self.in_state("processing").id
        new = q.get(q.enqueue("t"))
        for message, verb in {
            f"cannot cancel job {finished}: it is completed": lambda: q.cancel(finished),
            f"cannot mark as failed job {finished}: it is completed": lambda: q.mark_failed(finished),
            f"cannot assign job {finished}: it is completed": lambda: q.assign(finished, "w"),
            f"cannot resubmit job {running}: it is processing": lambda: q.resubmit(running),
            f"cannot change job {running}: it is processing": lambda: q.change(running, priority=1),
            f"cannot advance job {finished}: it is completed": lambda: q.run_now(finished),
            f"cannot release job {new.id}: it is pending": lambda: q.release(new, delay_seconds=5),
        }.items():
            with self.assertRaisesRegex(InvalidTransition, f"^{message}$"):
                verb()

    def test_verbs_on_an_unknown_job_raise_job_not_found(self):
        self.queue.enqueue("t")
        change = functools.partial(self.queue.change, queue="other", max_attempts=2, payload=None)
        with self.assertRaises(JobNotFound):
            change(12345)
        verbs = (self.queue.get, self.queue.resubmit, self.queue.mark_failed, self.queue.cancel, self.queue.run_now)
        for verb in verbs:
            with self.subTest(verb=verb.__name__), self.assertRaises(JobNotFound):
                verb(12345)
        with self.assertRaises(JobNotFound):
            self.queue.assign(12345, "w")

    # Dependencies

    def states(self, *job_ids):
        return [self.queue.get(job_id).state for job_id in job_ids]

    def test_job_waits_until_all_its_parents_have_finished_and_reads_their_results(self):
        q = self.queue
        parents = [q.enqueue("t", n, now=NOW) for n in range(3)]
        child = q.enqueue("t", after=parents, now=NOW)
        self.assertEqual((q.get(child).state, q.get(child).waits_for), ("waiting", 3))
        jobs = q.dequeue_many("w", 5, now=NOW)
        self.assertEqual([job.id for job in jobs], parents)
        q.complete(jobs[0], "first", now=NOW)
        self.assertEqual((q.get(child).state, q.get(child).waits_for), ("waiting", 2))
        [taken], lost = q.complete_and_dequeue([(job, job.payload) for job in jobs[1:]], "w", 5, now=NOW)
        self.assertEqual((taken.id, taken.waits_for, lost), (child, 0, []))
        self.assertEqual(
            [(job.id, job.result) for job in q.dependencies(child)], list(zip(parents, ["first", 1, 2], strict=True))
        )
        with self.assertRaisesRegex(QueueError, "no task runs"):
            _ = taken.results

    def test_parent_that_finishes_in_any_way_settles_its_dependents_in_the_same_commit(self):
        q = self.queue
        ends = {
            "complete": lambda job: q.complete(job, now=NOW),
            "batch": lambda job: q.complete_and_dequeue([(job, None)], "w", 0, now=NOW),
            "fail": lambda job: q.fail(job, "no", retry=False, now=NOW),
            "lease": lambda _: q.dequeue("w", tasks=["none"], now=NOW + 61),
            "mark_failed": lambda job: q.mark_failed(job.id, now=NOW),
            "cancel": lambda job: q.cancel(job.id, now=NOW),
        }
        for name, end in ends.items():
            with self.subTest(end=name):
                q.delete_jobs(force=True)
                parent = q.enqueue("t", max_attempts=1, now=NOW)
                child = q.enqueue("u", after=[parent], now=NOW)
                anyway = q.enqueue("u", after=[parent], after_failed="run", run_at=NOW + 100, now=NOW)
                grandchild = q.enqueue("u", after=[child], now=NOW)
                job = q.dequeue("w", now=NOW)
                with self.assertRaises(ZeroDivisionError), q.transaction():
                    end(job)
                    raise ZeroDivisionError
                self.assertEqual(self.states(child, anyway, grandchild), ["waiting"] * 3)
                end(job)
                if q.get(parent).state == "completed":
                    self.assertEqual(self.states(child, anyway, grandchild), ["pending", "scheduled", "waiting"])
                else:
                    how = "was cancelled" if name == "cancel" else "failed"
                    self.assertEqual(self.states(child, anyway, grandchild), ["failed", "scheduled", "failed"])
                    self.assertEqual(q.get(child).error, f"job {parent} {how}")
                    self.assertEqual(q.get(grandchild).error, f"job {child} failed")
                    self.assertEqual(
                        [(each["event"], each["error"]) for each in q.history(child)],
                        [("failed", f"job {parent} {how}")],
                    )
                    with self.assertRaises(JobFailed):
                        q.result(grandchild, timeout_seconds=1)

    def test_resubmitted_parent_restores_the_jobs_that_failed_with_it(self):
        q = self.queue
        first, second = q.enqueue("t", now=NOW), q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[first, second], now=NOW)
        grandchild = q.enqueue("t", after=[child], now=NOW)
        both = q.enqueue("t", after=[second, child], after_failed="run", now=NOW)
        marked = q.enqueue("t", after=[first], now=NOW)
        q.mark_failed(marked, now=NOW)
        q.mark_failed(first, now=NOW)
        q.cancel(second, now=NOW)
        self.assertEqual(self.states(child, grandchild, both), ["failed", "failed", "pending"])
        q.resubmit(second, now=NOW)
        self.assertEqual(self.states(child, grandchild), ["failed", "failed"])  # first is still failed
        q.resubmit(first, now=NOW)
        self.assertEqual(self.states(child, grandchild, marked), ["waiting", "waiting", "failed"])
        self.assertEqual((q.get(child).waits_for, q.get(child).error), (2, None))
        for job in q.dequeue_many("w", 5, now=NOW):
            q.complete(job, now=NOW)
        self.assertEqual(self.states(child, grandchild), ["pending", "waiting"])

    def test_waiting_job_waits_again_for_a_parent_that_is_resubmitted(self):
        q = self.queue
        first, second = q.enqueue("t", now=NOW), q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[first, second], now=NOW)
        jobs = q.dequeue_many("w", 2, now=NOW)
        q.complete(jobs[0], now=NOW)
        q.resubmit(first, now=NOW)
        self.assertEqual(q.get(child).waits_for, 2)
        q.complete(jobs[1], now=NOW)
        self.assertEqual(self.states(child), ["waiting"])
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        self.assertEqual(self.states(child), ["pending"])

    def test_resubmitted_parent_leaves_a_job_that_ran_after_its_failure(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("u", after=[parent], after_failed="run", now=NOW)
        q.cancel(parent, now=NOW)
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        q.resubmit(parent, now=NOW)
        self.assertEqual((q.get(child).state, q.get(child).waits_for), ("completed", 0))

    def test_restored_job_does_not_take_a_key_that_another_job_holds(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[parent], key="k", now=NOW)
        self.assertEqual(q.enqueue("t", key="k", now=NOW), child)
        q.cancel(parent, now=NOW)
        other = q.enqueue("t", key="k", now=NOW)
        q.resubmit(parent, now=NOW)
        self.assertEqual(self.states(child, other), ["failed", "pending"])

    def test_job_enqueued_after_finished_jobs_is_pending_or_fails_at_once(self):
        q = self.queue
        done, failed = self.in_state("completed").id, self.in_state("failed").id
        self.assertEqual(self.states(q.enqueue("t", after=[done])), ["pending"])
        self.assertEqual(self.states(q.enqueue("t", after=[done], delay_seconds=99)), ["scheduled"])
        self.assertEqual(self.states(q.enqueue("t", after=[done, failed], after_failed="run")), ["pending"])
        lost = q.enqueue("t", after=[done, failed])
        self.assertEqual((self.states(lost), q.get(lost).error), (["failed"], f"job {failed} failed"))
        q.resubmit(failed)
        self.assertEqual((self.states(lost), q.get(lost).waits_for), (["waiting"], 1))

    def test_job_enqueued_after_a_failed_one_changes_nothing_for_those_that_wait_for_others_too(self):
        q = self.queue
        failed, open_ones = q.enqueue("t"), q.enqueue_many("t", range(2))
        waiting = q.enqueue("t", after=[failed, *open_ones], after_failed="run")
        q.mark_failed(failed)
        for _ in range(3):
            self.assertEqual(self.states(q.enqueue("t", after=[failed])), ["failed"])
            self.assertEqual((self.states(waiting), q.get(waiting).waits_for), (["waiting"], 2))
        for _ in open_ones:
            self.assertEqual(self.states(waiting), ["waiting"])
            q.complete(q.dequeue("w"))
        self.assertEqual(self.states(waiting), ["pending"])

    def test_invalid_dependency_is_refused_and_stores_nothing(self):
        q, parent = self.queue, self.queue.enqueue("t")
        with self.assertRaisesRegex(JobNotFound, "cannot enqueue after job 12345: no such job"):
            q.enqueue("t", after=[parent, 12345])
        for options in (
            {"after": parent},
            {"after": "1"},
            {"after": ["1"]},
            {"after": [True]},
            {"after": [parent], "after_failed": "skip"},
            {"after_failed": "skip"},
            {"after": None},
            {"after": [parent], "key": "k", "on_conflict": "replace"},
        ):
            with self.subTest(**options), self.assertRaises(ValueError):
                q.enqueue("t", **options)
            if "key" not in options:
                with self.subTest("no payloads", **options), self.assertRaises(ValueError):
                    q.enqueue_many("t", [], **options)
        self.assertEqual(len(q.list_jobs()), 1)

    def test_argument_that_is_no_list_is_refused(self):
        q = self.queue
        for value in (1, 1.5, "1", b"1", object()):
            for name, call in {
                "after": lambda value: q.enqueue("t", after=value),
                "payloads": lambda value: q.enqueue_many("t", value),
                "keys": lambda value: q.enqueue_many("t", [1], keys=value),
                "ids": lambda value: q.list_jobs(ids=value),
                "ids of all that match": lambda value: q.delete_where(ids=value),
                "state": lambda value: q.count_jobs(state=value),
                "states": lambda value: q.prune(1, states=value),
                "job ids": q.delete_jobs,
                "jobs to lock": lambda value: q.exclusive(value).__enter__(),
            }.items():
                with self.subTest(name, value=value), self.assertRaisesRegex(ValueError, "expected a "):
                    call(value)
        self.assertEqual(q.list_jobs(), [])

    def test_many_jobs_wait_for_one_and_one_for_many(self):
        q = self.queue
        first = q.enqueue("t", now=NOW)
        middle = q.enqueue_many("t", range(100), after=[first], now=NOW)
        keyed = q.enqueue_many("t", [1, 2, 3], keys=["a", "b", "a"], after=[first, first], now=NOW)
        self.assertEqual(len(set(keyed)), 2)
        last = q.enqueue("last", after=iter([*middle, *keyed]), now=NOW)
        self.assertEqual(q.get(last).waits_for, 102)
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        self.assertEqual(q.stats()["states"]["pending"], 102)
        jobs = q.dequeue_many("w", 48, tasks=["t"], now=NOW)
        while jobs:
            self.assertEqual(self.states(last), ["waiting"])
            jobs, _ = q.complete_and_dequeue([(job, None) for job in jobs], "w", 48, tasks=["t"], now=NOW)
        self.assertEqual(self.states(last), ["pending"])

    def test_chain_completes_one_after_the_other_and_fails_as_a_whole(self):
        q = self.queue
        chain = [q.enqueue("t", now=NOW)]
        for _ in range(30):
            chain.append(q.enqueue("t", after=chain[-1:], now=NOW))
        jobs = q.dequeue_many("w", 9, now=NOW)
        for job_id in chain[:20]:
            self.assertEqual([job.id for job in jobs], [job_id])
            jobs, _ = q.complete_and_dequeue([(jobs[0], None)], "w", 9, now=NOW)
        q.fail(jobs[0], "no", retry=False, now=NOW)
        self.assertEqual(self.states(*chain), ["completed"] * 20 + ["failed"] * 11)
        q.resubmit(chain[20], now=NOW)
        self.assertEqual(self.states(*chain), ["completed"] * 20 + ["pending"] + ["waiting"] * 10)

    def test_diamond_runs_its_last_job_once(self):
        q = self.queue
        top = q.enqueue("t", now=NOW)
        sides = q.enqueue_many("t", [1, 2], after=[top], now=NOW)
        bottom = q.enqueue("t", after=[top, *sides], now=NOW)
        order = []
        while job := q.dequeue("w", now=NOW):
            order.append(job.id)
            q.complete(job, now=NOW)
        self.assertEqual(order, [top, *sides, bottom])

    def test_job_that_an_unfinished_one_runs_after_is_neither_pruned_nor_deleted(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[parent], now=NOW)
        with self.assertRaisesRegex(InvalidTransition, f"^cannot delete job {parent}: job {child} runs after it$"):
            q.delete_jobs([parent])
        q.complete(q.dequeue("w", now=NOW), 7, now=NOW)
        job = q.dequeue("w", now=NOW)
        q.enqueue("t", run_at=NOW + 10**6, now=NOW)
        self.assertEqual(q.prune(0, now=NOW + 50), 0)
        with self.assertRaisesRegex(InvalidTransition, f"^cannot delete job {parent}: job {child} runs after it$"):
            q.delete_jobs([parent])
        q.complete(job, now=NOW + 50)
        self.assertEqual(q.prune(0, now=NOW + 100), 2)
        self.assertEqual(q.dependencies(child), [])
        with self.queue.transaction() as db:
            self.assertEqual(self.execute(db, "SELECT count(*) FROM dependencies").fetchall()[0][0], 0)

    def test_operator_is_told_of_jobs_that_no_consumer_finds(self):
        """After a restore that left out a table."""
        for table in ("queue_tasks", "queues"):
            ids = [self.queue.enqueue("t")]
            with self.subTest(table=table), self.queue.transaction() as db:
                self.execute(db, f"DELETE FROM {table}")
            self.assertIsNone(self.queue.dequeue("w"))
            problem = "no consumer finds the pending jobs of task 't' in queue 'default', which does not list it: "
            self.assertEqual(self.queue.check()["problems"], [f"{problem}enqueue another one there"])
            ids.append(self.queue.enqueue("t"))
            self.assertEqual([job.id for job in self.queue.dequeue_many("w", 9)], ids)
            self.assertEqual(self.queue.check()["problems"], [])

    def test_application_that_closes_the_connection_of_a_transaction_goes_on(self):
        for when in ("inside", "afterwards"):
            with self.subTest(when), ExitStack() as undo:
                if when == "inside":
                    undo.enter_context(self.assertRaisesRegex(QueueError, "ended inside its block"))
                with self.queue.transaction() as db:
                    connection = db.connection.driver_connection if hasattr(db, "connection") else db
                    self.queue.enqueue("t")
                    if when == "inside":
                        connection.close()
            connection.close()
            self.assertEqual(self.queue.count_jobs(), 0 if when == "inside" else 1)

    def test_job_is_deleted_when_those_after_it_have_finished(self):
        parents = self.queue.enqueue_many("t", range(2))
        children = [self.queue.enqueue("t", after=[each]) for each in parents]
        self.queue.cancel(children[0])
        self.queue.delete_jobs([parents[0]])
        self.assertEqual({job.id for job in self.queue.list_jobs()}, {parents[1], *children})
        self.assertEqual([job.id for job in self.queue.dependencies(children[1])], [parents[1]])

    def test_job_is_pruned_when_those_after_it_have_finished_whatever_others_wait_for(self):
        q = self.queue
        ids = [q.enqueue("t", now=NOW) for _ in range(2)]
        children = [q.enqueue("t", after=[each], now=NOW) for each in ids]
        for job_id in (*children[:1], *ids[:1]):
            q.cancel(job_id, now=NOW)
        self.assertEqual(q.prune(0, now=NOW + 9), 2)
        self.assertEqual({job.id for job in q.list_jobs()}, {ids[1], children[1]})
        self.assertEqual([job.id for job in q.dependencies(children[1])], [ids[1]])

    def test_job_that_is_restored_takes_no_key_whose_time_is_not_over(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("u", after=[parent], key="k", now=NOW)
        q.cancel(parent, now=NOW)
        holder = q.enqueue("u", key="k", key_seconds=60, now=NOW)
        q.resubmit(parent, now=NOW + 59)
        self.assertEqual(self.states(child), ["failed"])
        self.assertEqual(q.enqueue("u", key="k", now=NOW + 59), holder)

    def test_job_that_is_restored_takes_its_own_key_whose_time_is_over(self):
        q = self.queue
        q.enqueue("u", key="a", key_seconds=60, now=NOW)
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("u", after=[parent], key="k", now=NOW)
        q.cancel(parent, now=NOW)
        holder = q.enqueue("u", key="k", key_seconds=60, now=NOW)
        q.resubmit(parent, now=NOW + 60)
        self.assertEqual(self.states(child), ["waiting"])
        self.assertEqual([q.get(each).key_expires_at for each in (child, holder)], [None, None])

    def test_job_that_fails_with_others_names_its_own_parent(self):
        q = self.queue
        unfinished, root = q.enqueue("t", now=NOW), q.enqueue("t", now=NOW)
        first, second = (q.enqueue("t", after=[root], now=NOW) for _ in range(2))
        children = q.enqueue("t", after=[first], now=NOW), q.enqueue("t", after=[unfinished, second], now=NOW)
        q.cancel(root, now=NOW)
        self.assertEqual([q.get(child).error for child in children], [f"job {first} failed", f"job {second} failed"])

    def test_job_that_waits_no_longer_is_left_alone_when_its_parent_ends(self):
        q = self.queue
        for verb, ended in ((q.complete, "pending"), (q.cancel, "failed")):
            with self.subTest(ended):
                parent = q.enqueue("t", now=NOW)
                begun, waiting = (q.enqueue("t", after=[parent], now=NOW) for _ in range(2))
                q.run_now(begun, now=NOW)
                job, _ = q.dequeue_many("w", 2, now=NOW)
                verb(job if ended == "pending" else job.id, now=NOW)
                self.assertEqual(self.states(begun, waiting), ["processing", ended])
                q.delete_jobs(force=True)

    def test_job_deleted_by_force_is_cancelled_for_those_that_wait_for_it(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[parent], now=NOW)
        other, dependent = q.enqueue("t", now=NOW), 0
        dependent = q.enqueue("t", after=[other], now=NOW)
        self.assertEqual(q.delete_jobs([parent], force=True), 1)
        self.assertEqual((self.states(child), q.get(child).error), (["failed"], f"job {parent} was cancelled"))
        self.assertEqual(q.delete_jobs([other, dependent]), 2)  # together

    def test_waiting_job_keeps_waiting_when_it_is_changed_replaced_or_assigned(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[parent], key="k", now=NOW)
        q.change(child, run_at=NOW + 50, payload=5, now=NOW)
        q.assign(child, "w", now=NOW)
        self.assertEqual(self.states(child), ["waiting"])
        q.enqueue("t", 6, key="k", on_conflict="replace", now=NOW)
        self.assertEqual((self.states(child), q.get(child).payload), (["waiting"], 6))
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        self.assertEqual(q.dequeue("w", now=NOW).id, child)

    def test_job_that_runs_now_does_not_wait_and_is_left_alone_by_its_parents(self):
        q = self.queue
        parent = q.enqueue("t", now=NOW)
        child = q.enqueue("t", priority=1, after=[parent], now=NOW)
        q.run_now(child, by="ann", now=NOW)
        self.assertEqual((q.get(child).waits_for, q.history(child)[0]["event"]), (0, "run now"))
        q.complete(q.dequeue("w", now=NOW), "done", now=NOW)
        q.cancel(parent, now=NOW)
        q.resubmit(parent, now=NOW)
        self.assertEqual((self.states(child), q.get(child).result), (["completed"], "done"))

    def test_copy_of_a_queue_has_its_dependencies(self):
        q = self.queue
        parents = [self.in_state("completed").id, q.enqueue("t", now=NOW)]
        child = q.enqueue("t", after=parents, now=NOW)
        with tempfile.TemporaryDirectory() as folder, pqueue.PersistentQSQLite(f"{folder}/copy.db") as copy:
            self.assertEqual(q.copy_to(copy)["dependencies"], 2)
            self.assertEqual([job.id for job in copy.dependencies(child)], parents)
            copy.complete(copy.dequeue("w", now=NOW), now=NOW)
            self.assertEqual(copy.get(child).state, "pending")

    def test_job_enqueued_during_a_move_takes_a_key_whose_time_is_over(self):
        q, target = self.queue, self.target()
        q.begin_move(target.name)
        q.move_to(target, without=q.other_tables())
        target.enqueue("t", key="k", key_seconds=60, now=NOW)
        q.enqueue("t", key="k", now=NOW)
        self.assertEqual(q.finish_move(target, now=NOW + 60)["carried"], 1)

    def test_unfinished_jobs_enqueued_during_a_move_are_not_carried_over_if_their_keys_are_held(self):
        q, target = self.queue, self.target()
        q.begin_move(target.name)
        q.move_to(target, without=q.other_tables())
        for key in "ab":
            target.enqueue("t", key=key, now=NOW)
            q.enqueue("t", key=key, key_seconds=60, now=NOW)
        q.cancel(1, now=NOW)
        self.assertEqual(q.finish_move(target, now=NOW), {"carried": 1, "known": 1, "deleted": 2})
        self.assertEqual([(job.state, job.key) for job in target.list_jobs()][0], ("cancelled", "a"))

    def test_jobs_of_groups_enqueued_during_a_move_take_turns_in_the_target(self):
        q, target = self.queue, self.target()
        q.begin_move(target.name)
        q.move_to(target, without=q.other_tables())
        for group in "aab":
            q.enqueue("t", group=group)
        q.finish_move(target)
        self.assertEqual([job.group for job in target.dequeue_many("w", 9)], ["a", "b", "a"])

    def test_jobs_enqueued_during_a_move_wait_for_their_parents_in_the_target(self):
        q = self.queue
        moved = q.enqueue_many("t", range(2), now=NOW)
        with tempfile.TemporaryDirectory() as folder, pqueue.PersistentQSQLite(f"{folder}/copy.db") as target:
            q.begin_move(target.name, now=NOW)
            q.move_to(target, without=q.other_tables(), now=NOW)
            target.complete(target.dequeue("w", now=NOW), now=NOW)
            for _ in range(3):
                target.enqueue("other", now=NOW)  # takes the ids
            late = q.enqueue("late", now=NOW)
            q.enqueue("ready", after=moved[:1], now=NOW)
            q.enqueue("waits", after=[*moved, late], now=NOW)
            q.cancel(q.enqueue("gone", after=[late], now=NOW), now=NOW)
            q.finish_move(target, now=NOW)
            jobs = {job.task: job for job in target.list_jobs()}
            target.dequeue("x", tasks=["none"], now=NOW)
            self.assertEqual((target.get(jobs["ready"].id).state, jobs["ready"].waits_for), ("pending", 0))
            self.assertEqual((jobs["waits"].state, jobs["waits"].waits_for), ("waiting", 2))
            self.assertEqual(jobs["gone"].state, "cancelled")
            parents = [moved[0], moved[1], jobs["late"].id]
            self.assertEqual([job.id for job in target.dependencies(jobs["waits"].id)], parents)

    # Failure handlers

    def test_failed_job_gets_one_job_of_its_handler_in_the_same_commit_whatever_the_cause(self):
        q = self.queue
        q.on_failed("default", "notify")
        ends = {
            "fail": lambda job: q.fail(job, "no", retry=False, now=NOW),
            "last attempt": lambda job: q.fail(job, "no", now=NOW),
            "lease": lambda _: q.dequeue("w", tasks=["none"], now=NOW + 61),
            "mark_failed": lambda job: q.mark_failed(job.id, "no", now=NOW),
        }
        for name, end in ends.items():
            with self.subTest(end=name):
                q.delete_jobs(force=True)
                failed = q.enqueue("t", max_attempts=1, now=NOW)
                child = q.enqueue("u", after=[failed], now=NOW)
                job = q.dequeue("w", now=NOW)
                with self.assertRaises(ZeroDivisionError), q.transaction():
                    end(job)
                    raise ZeroDivisionError
                self.assertEqual(len(q.list_jobs()), 2)
                end(job)
                self.assertEqual(q.get(failed).state, "failed")
                jobs = q.dequeue_many("other", 9, tasks=["notify"], now=NOW + 99)
                found = {job.payload["failed"]["id"]: job.payload["failed"] for job in jobs}
                self.assertEqual((sorted(found), len(jobs)), ([failed, child], 2))
                expected = {"id": failed, "queue": "default", "task": "t", "error": q.get(failed).error}
                self.assertEqual(found[failed], {**expected, "attempts": 1, "consumer": "w"})
                self.assertEqual([job.id for job in q.dependencies(jobs[0].id)], [jobs[0].payload["failed"]["id"]])

    def test_handler_has_no_handler_and_other_ends_of_a_job_have_none(self):
        q = self.queue
        q.on_failed("default", "notify")
        q.fail(self.taken(), "no", now=NOW, retry_in_seconds=9)
        q.cancel(q.enqueue("t", now=NOW), now=NOW)
        q.complete(q.dequeue("worker", now=NOW + 10), now=NOW)
        self.assertEqual(q.count_jobs(task="notify"), 0)
        q.fail(self.taken(), "no", retry=False, now=NOW)
        q.fail(q.dequeue("w", now=NOW), "no", retry=False, now=NOW)
        self.assertEqual([job.state for job in q.list_jobs(task="notify")], ["failed"])
        q.on_failed("default", None)
        q.fail(self.taken(), "no", retry=False, now=NOW)
        self.assertEqual((q.count_jobs(task="notify"), q.handlers()), (1, {}))

    def test_handler_of_a_lost_job_is_delivered_by_the_dequeue_that_finds_it(self):
        q = self.queue
        q.on_failed("default", "notify", now=NOW)
        q.enqueue("t", max_attempts=1, now=NOW)
        q.dequeue("w", lease_seconds=5, now=NOW)
        self.assertEqual(q.dequeue("v", now=NOW + 6).task, "notify")
        parent = q.enqueue("t", expire_seconds=5, delay_seconds=5, now=NOW)
        q.enqueue("t", after=[parent], now=NOW)
        self.assertEqual(q.dequeue("v", now=NOW + 20).task, "notify")

    def test_handler_of_a_task_goes_before_that_of_its_queue_and_follows_its_decorator(self):
        q = self.queue
        with mock.patch.dict(pqueue.TASKS, clear=True):
            notify = pqueue.task("notify")(lambda failed: None)
            pqueue.task("t", on_failed=notify)(lambda: None)
            q.declare_handlers(pqueue.TASKS.values())
            q.on_failed("default", "other")
            self.assertEqual(q.handlers(), {"queue:default": "other", "task:t": "notify"})
            q.fail(self.taken(), "no", retry=False, now=NOW)
            self.assertEqual((q.count_jobs(task="notify"), q.count_jobs(task="other")), (1, 0))
            pqueue.TASKS.clear()
            pqueue.task("t")(lambda: None)
            q.declare_handlers(pqueue.TASKS.values())
        self.assertEqual(q.handlers(), {"queue:default": "other"})
        for wrong in ("", 5):
            with self.assertRaises(ValueError):
                q.on_failed("default", wrong)
            with self.assertRaises(ValueError):
                pqueue.task("wrong", on_failed=wrong)

    def test_full_queue_takes_the_job_of_a_handler_and_keeps_the_failed_one_until_it_ran(self):
        q = self.queue
        q.on_failed("default", "notify")
        job = self.taken()
        q.limit("default", 1)
        q.enqueue("t", priority=-1, now=NOW)
        q.fail(job, "no", retry=False, now=NOW)
        self.assertEqual(q.prune(0, now=NOW + 10), 0)
        q.complete(q.dequeue("w", now=NOW + 10), now=NOW + 10)
        q.enqueue("t", run_at=NOW + 9999, queue="other", now=NOW)
        self.assertEqual(q.prune(0, now=NOW + 20), 2)

    def test_copy_of_a_queue_has_its_handlers(self):
        self.queue.on_failed("default", "notify")
        with tempfile.TemporaryDirectory() as folder, pqueue.PersistentQSQLite(f"{folder}/copy.db") as copy:
            self.queue.copy_to(copy)
            self.assertEqual(copy.handlers(), {"queue:default": "notify"})

    # The guarantees, by number

    def test_guarantee_2_job_comes_again_when_its_consumer_did_not_finish(self):
        job = self.taken()
        self.assertIsNone(self.queue.dequeue("other", now=NOW + 59))
        again = self.queue.dequeue("other", now=NOW + 61)
        self.assertEqual((again.id, again.attempts), (job.id, 2))
        self.queue.complete(again, now=NOW + 62)
        self.assertIsNone(self.queue.dequeue("other", now=NOW + 10_000))

    def test_guarantee_3_stale_consumer_cannot_settle_a_reclaimed_job(self):
        stale = self.taken()
        holder = self.queue.dequeue("worker", now=NOW + 61)  # of the same name
        verbs = [self.queue.complete, self.queue.release, self.queue.extend, self.queue.update]
        for verb in [*verbs, lambda job: self.queue.fail(job, "x")]:
            with self.assertRaises(LeaseLost):
                verb(stale)
        self.assertEqual(self.queue.get(stale.id), holder)
        self.assertEqual(self.queue.complete_and_dequeue([(stale, None)], "w", now=NOW + 61), ([], [stale]))
        self.queue.complete(holder)

    def test_guarantee_3_stale_consumer_cannot_settle_a_reclaimed_job_among_others(self):
        stale = self.taken()
        holder = self.queue.dequeue("other", now=NOW + 61)
        own = self.taken()
        settled = self.queue.complete_and_dequeue([(stale, "late"), (own, "done")], "worker", now=NOW + 61)
        self.assertEqual(settled, ([], [stale]))
        self.assertEqual(self.queue.get(stale.id), holder)
        self.assertEqual(self.queue.get(own.id).result, "done")

    def test_guarantee_3_stale_consumer_cannot_settle_a_reclaimed_job_of_its_batch(self):
        self.queue.enqueue_many("t", [1, 2, 3], now=NOW)
        stale, *own = self.queue.dequeue_many("worker", 3, now=NOW)
        for job in own:
            self.queue.extend(job, 600, now=NOW)
        holder = self.queue.dequeue("other", now=NOW + 61)
        finished = [(job, f"result of {job.payload}") for job in (own[0], stale, own[1])]
        settled = self.queue.complete_and_dequeue(finished, "worker", 0, now=NOW + 61)
        self.assertEqual(settled, ([], [stale]))
        self.assertEqual(self.queue.get(stale.id), holder)
        self.assertEqual([self.queue.get(job.id).result for job in own], ["result of 2", "result of 3"])

    def test_guarantee_3_late_completion_is_accepted_while_nobody_took_the_job(self):
        job = self.taken()
        self.queue.complete(job, "late", now=NOW + 1000)
        self.assertEqual(self.queue.get(job.id).result, "late")

    def test_guarantee_4_transaction_commits_or_undoes_all_it_wrote(self):
        job = self.taken()
        with self.queue.transaction() as db:
            self.execute(db, "CREATE TABLE business (n INTEGER)")
            self.execute(db, "INSERT INTO business VALUES (1)")
            follow_up = self.queue.enqueue("next")
            self.queue.complete(job)
        self.assertEqual(self.queue.get(job.id).state, "completed")
        self.assertEqual(self.queue.get(follow_up).state, "pending")
        with self.assertRaises(ZeroDivisionError), self.queue.transaction() as db:
            self.execute(db, "INSERT INTO business VALUES (2)")
            self.queue.enqueue("never")
            raise ZeroDivisionError
        with self.queue.transaction() as db:
            self.assertEqual([tuple(row) for row in self.execute(db, "SELECT n FROM business")], [(1,)])
        self.assertEqual(self.queue.list_jobs(task="never"), [])

    def test_guarantee_5_job_that_kills_its_consumers_is_set_aside_and_names_them(self):
        job_id = self.queue.enqueue("poison", max_attempts=3, now=NOW)
        for attempt, consumer in enumerate(("ann", "bob", "cid"), 1):
            self.assertEqual(self.queue.dequeue(consumer, now=NOW + 100 * attempt).attempts, attempt)
        self.assertIsNone(self.queue.dequeue("dan", now=NOW + 400))
        job = self.queue.get(job_id)
        self.assertEqual(job.state, "failed")
        self.assertIn("lost by ann, bob, cid", job.error)

    def test_guarantee_5_error_names_the_consumers_that_lost_this_job(self):
        q = self.queue
        mine, other = q.enqueue_many("t", range(2), max_attempts=2, now=NOW)
        q.dequeue("ann", lease_seconds=10, now=NOW)
        q.dequeue("zoe", lease_seconds=30, now=NOW)
        self.assertEqual(q.dequeue("bob", lease_seconds=60, now=NOW + 20).id, mine)
        q.dequeue_many("dan", 0, now=NOW + 40)
        q.cancel(other, now=NOW + 40)
        q.resubmit(other, now=NOW + 40)
        q.dequeue_many("dan", 0, now=NOW + 100)
        self.assertIn("lost by ann, bob;", q.get(mine).error)

    def test_guarantee_6_dequeue_goes_by_priority_then_due_time_then_id(self):
        def add(task, **options):
            return self.queue.enqueue(task, now=NOW, **options)

        add("late", run_at=NOW - 1)
        add("early", run_at=NOW - 2)
        add("same time, second queue", run_at=NOW - 2, queue="b")
        add("urgent", priority=1, queue="b")
        add("not urgent", priority=-1, run_at=NOW - 100)
        add("due then", run_at=NOW + 5, priority=2)
        expected = ["urgent", "early", "same time, second queue", "late", "not urgent"]
        one_by_one = [self.queue.dequeue("w", now=NOW) for _ in expected]
        self.assertEqual([job.task for job in one_by_one], expected)
        for job in one_by_one:
            self.queue.release(job, now=NOW)
        together = self.queue.dequeue_many("w", 10, now=NOW + 6)
        self.assertEqual([job.task for job in together], ["due then", *expected])

    # Groups

    def groups(self, number, **options):
        """Return the groups of the jobs of `number` claims of one job each."""
        jobs = [self.queue.dequeue("w", now=NOW, **options) for _ in range(number)]
        return [job and job.group for job in jobs]

    def test_claim_among_many_tasks_takes_only_what_the_consumer_may_have(self):
        q = self.queue
        ids = {q.enqueue(f"t{number % 12}", now=NOW) for number in range(24)}
        ids -= {job.id for job in q.dequeue_many("w", 2, now=NOW)}
        for queue in ("paused", "other"):
            q.enqueue("t0", queue=queue, priority=9, now=NOW)
        q.pause("paused")
        q.enqueue("t1", assigned_to="x", priority=9, now=NOW)
        q.enqueue("t2", delay_seconds=60, priority=9, now=NOW)
        ids.add(q.enqueue("t3", assigned_to="w", priority=8, now=NOW))
        taken = set()
        while jobs := q.dequeue_many("w", 99, queues=["default", "paused"], now=NOW):
            taken |= {job.id for job in jobs}
        self.assertEqual(taken, ids)

    def test_guarantee_6_jobs_of_many_tasks_come_in_order(self):
        q, taken = self.queue, []
        for number in range(120):
            q.enqueue(f"t{number % 20}", priority=number * 7 % 30, now=NOW)
        q.enqueue_many("t0", range(20), priority=20, now=NOW)
        expected = [job.id for job in q.peek(140, now=NOW)]
        jobs = q.dequeue_many("w", 5, now=NOW)
        while jobs:
            taken += [job.id for job in jobs]
            if len(taken) < 60:
                q.complete_and_dequeue([(job, None) for job in jobs], "w", 0, now=NOW)
                jobs = q.dequeue_many("w", 5, now=NOW)
            else:
                jobs, _ = q.complete_and_dequeue([(job, None) for job in jobs], "w", 5, now=NOW)
        self.assertEqual(taken, expected)

    def test_guarantee_6_groups_take_turns_from_the_first_claim(self):
        q = self.queue
        q.enqueue_many("t", range(300), group="a", now=NOW - 9)
        q.enqueue_many("t", range(5), group="b", priority=-1, now=NOW)
        self.assertEqual(self.groups(12), ["a", "b"] * 5 + ["a", "a"])
        q.enqueue_many("t", range(2), group="b", now=NOW)
        self.assertEqual([job.group for job in q.dequeue_many("w", 6, now=NOW)], ["b", "a", "b", "a", "a", "a"])

    def test_guarantee_6_group_with_a_job_of_another_task_waits_for_its_turn(self):
        q = self.queue
        for group in "ab":
            q.enqueue_many("t", range(9), group=group, now=NOW)
        self.assertEqual(self.groups(3), ["a", "b", "a"])
        q.enqueue("u", group="a", now=NOW - 9)
        self.assertEqual(self.groups(4), ["b", "a", "b", "a"])

    def test_guarantee_6_jobs_without_a_group_are_one(self):
        q = self.queue
        q.enqueue_many("t", range(9), now=NOW - 9)
        self.assertEqual(self.groups(2), [None, None])
        q.enqueue_many("t", range(3), group="a", now=NOW)
        q.enqueue("u", group="b", now=NOW)
        self.assertEqual(sorted(map(str, self.groups(3))), ["None", "a", "b"])
        self.assertEqual(sorted(map(str, self.groups(4))), ["None", "None", "a", "a"])

    def test_guarantee_6_order_holds_within_a_group(self):
        q = self.queue
        for payload, options in enumerate(({}, {"priority": 2}, {"run_at": NOW - 5}, {"priority": 2}, {})):
            q.enqueue("tu"[payload % 2], payload, group="a", now=NOW, **options)
        q.enqueue("t", "b", group="b", now=NOW)
        found = q.dequeue_many("w", 9, now=NOW)
        self.assertEqual([job.payload for job in found if job.group == "a"], [1, 3, 2, 0, 4])
        for job in reversed(found):
            q.release(job, now=NOW)
        self.assertEqual([job.payload for job in q.peek(9, now=NOW) if job.group == "a"], [1, 3, 2, 0, 4])
        one_by_one = [q.dequeue("w", now=NOW) for _ in range(6)]
        self.assertEqual([job.payload for job in one_by_one if job.group == "a"], [1, 3, 2, 0, 4])
        for task, at in (("first", NOW - 2), ("second", NOW - 1)):
            q.enqueue_many(task, range(12), group="a", queue="b", now=at)
        for number in range(5):
            q.enqueue("first", group=f"g{number}", queue="b", now=NOW)
        found = q.dequeue_many("w", 12, queues=["b"], now=NOW)
        self.assertEqual([job.payload for job in found if job.group == "a" and job.task == "first"], list(range(7)))

    def test_guarantee_6_queues_with_and_without_groups_are_served_by_their_first_jobs(self):
        q = self.queue
        q.enqueue_many("t", [1, 4], queue="plain", now=NOW - 5)
        q.enqueue("t", 0, queue="fair", group="a", priority=1, now=NOW)
        q.enqueue("t", 3, queue="fair", group="b", now=NOW - 6)
        q.enqueue("t", -1, queue="urgent", group="c", priority=2, now=NOW)
        self.assertEqual([job.payload for job in q.peek(9, now=NOW)], [-1, 0, 3, 1, 4])
        self.assertEqual(q.dequeue("w", now=NOW).payload, -1)
        self.assertEqual([job.payload for job in q.dequeue_many("w", 9, now=NOW)], [0, 3, 1, 4])
        self.assertIsNone(q.dequeue("w", now=NOW))

    def test_weights_of_groups_set_their_shares(self):
        q = self.queue
        q.weigh("default", "heavy", 3)
        for group in ("light", "heavy"):
            q.enqueue_many("t", range(100), group=group, now=NOW)
        found = self.groups(40)
        self.assertEqual((found.count("heavy"), found.count("light")), (30, 10))
        batch = [job.group for job in q.dequeue_many("w", 40, now=NOW)]
        self.assertEqual((batch.count("heavy"), batch.count("light")), (30, 10))

    def test_group_has_a_weight_turn_and_rate_of_its_own_in_each_queue(self):
        q = self.queue
        q.weigh("heavy", "a", 3)
        for queue in ("heavy", "even"):
            for group in ("a", "b"):
                q.enqueue_many("t", range(20), queue=queue, group=group, now=NOW)
        for queue, shares in (("heavy", "aaab"), ("even", "aabb")):
            self.assertEqual(sorted(self.groups(4, queues=[queue])), sorted(shares))
            found = [job.group for job in q.dequeue_many("w", 8, queues=[queue], now=NOW)]
            self.assertEqual(sorted(found), sorted(2 * shares))
        q.enqueue_many("t", range(2), queue="new", group="0", now=NOW)
        self.assertEqual(self.groups(1, queues=["new"]), ["0"])
        q.enqueue("t", queue="new", group="a", now=NOW)
        self.assertEqual(self.groups(1, queues=["new"]), ["a"])
        for queue, group in (("one", "g"), ("two", "g"), ("two", "h")):
            q.limit(queue, rate=(2, 60), now=NOW)
            q.enqueue_many("t", range(3), queue=queue, group=group, now=NOW)
            self.assertEqual(self.groups(1, queues=[queue]), [group])
            self.assertEqual(len(q.dequeue_many("w", 9, queues=[queue], now=NOW)), 1)

    def test_group_that_was_idle_does_not_catch_up(self):
        q = self.queue
        q.enqueue_many("t", range(50), group="a", now=NOW)
        q.enqueue("t", group="b", now=NOW)
        self.groups(20)
        for group in ("b", "new"):
            q.enqueue_many("t", range(50), group=group, now=NOW)
        found = self.groups(30)
        self.assertTrue(all(9 <= found.count(group) <= 11 for group in ("a", "b", "new")), found)

    def test_consumer_gets_the_groups_of_its_tasks_and_queues(self):
        q = self.queue
        q.enqueue_many("unknown", range(30), group="a", now=NOW)
        q.enqueue_many("t", range(2), group="b", now=NOW)
        q.enqueue("t", group="c", queue="other", now=NOW)
        self.assertEqual(self.groups(3, tasks=["t"], queues=["default"]), ["b", "b", None])
        self.assertEqual(self.groups(2, tasks=["t"]), ["c", None])
        q.pause("default")
        self.assertEqual(self.groups(1), [None])
        q.resume("default")
        self.assertEqual(len(q.dequeue_many("w", 50, now=NOW)), 30)

    def test_group_never_has_more_jobs_running_than_the_limit(self):
        q = self.queue
        q.limit("default", running=2)
        q.enqueue_many("t", range(4), now=NOW)
        for group in "ab":
            q.enqueue_many("t", range(20), group=group, now=NOW)
        jobs = q.dequeue_many("w", 50, now=NOW)
        self.assertEqual(sorted(str(job.group) for job in jobs), ["None", "None", "a", "a", "b", "b"])
        self.assertEqual(self.groups(1), [None])
        self.assertFalse(q.wait(0, consumer="w", now=NOW) and q.wait(0, consumer="w", now=NOW))
        ends = [
            lambda job: q.complete(job, now=NOW),
            lambda job: q.complete_and_dequeue([(job, None)], "w", 0, now=NOW),
            lambda job: q.fail(job, "no", retry_in_seconds=9, now=NOW),
            lambda job: q.release(job, delay_seconds=9, now=NOW),
            lambda job: q.cancel(job.id, now=NOW),
            lambda job: q.mark_failed(job.id, now=NOW),
            lambda job: q.assign(job.id, "other", now=NOW),
            lambda job: q.delete_jobs([job.id], force=True),
        ]
        for number, end in enumerate(ends):
            with self.subTest(number=number):
                mine = next(job for job in jobs if job.group == "ab"[number % 2])
                jobs.remove(mine)
                end(mine)
                found = q.dequeue_many("w", 9, now=NOW)
                self.assertEqual([job.group for job in found], [mine.group])
                jobs += found
        self.assertEqual(q.limits("default", "a")["running"], 2)

    def test_operator_sees_how_many_groups_are_at_a_limit(self):
        q = self.queue

        def counts(now=NOW):
            found = q.count_groups(now=now)
            return {name: tuple(each.values()) for name, each in found.items()}

        q.enqueue("t", now=NOW)
        self.assertEqual(counts(), {})
        q.limit("run", running=2)
        q.limit("rate", rate=(1, 10.0))
        self.assertEqual(counts(), {"rate": (0, 0, 0), "run": (0, 0, 0)})
        for name in ("run", "rate"):
            for group in ("a", "b", None):
                for task in "tu":
                    q.enqueue_many(task, range(2), queue=name, group=group, now=NOW)
        self.assertEqual(counts(), {"rate": (3, 0, 0), "run": (3, 0, 0)})
        run, _ = (q.dequeue_many("w", 9, queues=[name], now=NOW) for name in ("run", "rate"))
        self.assertIsNone(q.dequeue("w", queues=["run", "rate"], now=NOW))
        self.assertEqual(counts(), {"rate": (3, 0, 3), "run": (3, 3, 0)})
        self.assertEqual(counts(NOW + 10), {"rate": (3, 0, 0), "run": (3, 3, 0)})
        for job in q.list_jobs(queue="rate", group="a", state="pending"):
            q.cancel(job.id, now=NOW)
        self.assertEqual(counts()["rate"], (2, 0, 2))
        for task, group in (("u", "g"), ("t", "g"), ("t", "h")):
            q.enqueue(task, queue="one", group=group, now=NOW)
        q.limit("one", running=1)
        q.complete(q.dequeue("w", queues=["one"], now=NOW), now=NOW)
        self.assertEqual({q.dequeue("w", queues=["one"], now=NOW).group for _ in range(2)}, {"g", "h"})
        self.assertEqual(counts()["one"], (0, 2, 0))
        q.enqueue_many("t", range(2), queue="both", group="g", now=NOW)
        for is_found in (True, False):
            q.limit("both", running=1, rate=(1, 10.0))  # so that the next claim looks at the group
            self.assertEqual(q.dequeue("w", queues=["both"], now=NOW) is not None, is_found)
        self.assertEqual(counts()["both"], (1, 1, 0))
        q.enqueue("t", queue="one", group="h", now=NOW)
        self.assertEqual(counts()["one"], (1, 2, 0))
        q.complete(run[0], now=NOW)
        self.assertEqual(counts()["run"], (3, 2, 0))
        q.limit("run", running=None)
        self.assertEqual(counts()["run"], (3, 0, 0))

    def test_limit_counts_the_jobs_that_run_when_it_is_set(self):
        q = self.queue
        q.enqueue_many("t", range(5), now=NOW)
        first = q.dequeue_many("w", 2, now=NOW)
        q.limit("default", running=2)
        self.assertIsNone(q.dequeue("w", now=NOW))
        self.assertEqual(q.limits("default"), {"running": 2, "max_running": 2, "rate": None, "next_at": None})
        q.complete(first[0], now=NOW)
        self.assertEqual(len(q.dequeue_many("w", 5, now=NOW)), 1)
        q.limit("default", running=None)
        self.assertEqual(len(q.dequeue_many("w", 5, now=NOW)), 2)

    def test_limit_is_derived_from_rows_when_consumers_have_died(self):
        q = self.queue
        q.limit("default", running=1)
        q.enqueue_many("t", range(4), group="a", max_attempts=2, now=NOW)
        lost = q.dequeue("w", lease_seconds=10, now=NOW)
        self.assertIsNone(q.dequeue("w", now=NOW + 9))
        again = q.dequeue("w", lease_seconds=10, now=NOW + 10)
        self.assertEqual((again.id, again.attempts), (lost.id, 2))
        self.assertNotEqual(q.dequeue("w", now=NOW + 30).id, lost.id)
        self.assertEqual(q.get(lost.id).state, "failed")
        self.assertIsNone(q.dequeue("w", now=NOW + 30))

    def test_claim_looks_behind_groups_that_are_full(self):
        q = self.queue
        q.limit("default", running=1)
        for number in range(40):
            q.enqueue_many("t", range(2), group=f"full {number}", now=NOW)
        self.assertEqual(len(q.dequeue_many("w", 99, now=NOW)), 40)
        q.enqueue_many("t", range(4), group="last", now=NOW)
        for _ in range(3):
            q.complete(q.dequeue("w", now=NOW), now=NOW)
        for number in range(40):
            q.enqueue("t", group=f"full {number}", now=NOW)
        self.assertEqual(q.dequeue("w", now=NOW).group, "last")
        self.assertIsNone(q.dequeue("w", now=NOW))

    def test_consumer_of_full_groups_and_another_queue_gets_each_job_when_it_may(self):
        q = self.queue
        q.limit("fair", running=1)
        q.enqueue_many("t", ["a1", "a2", "a3"], queue="fair", group="a", priority=5, now=NOW)
        q.enqueue_many("t", range(8), queue="plain", now=NOW)
        first = q.dequeue("w", now=NOW)
        payloads = [q.dequeue("w", now=NOW).payload for _ in range(3)]
        self.assertEqual([first.payload, *payloads], ["a1", 0, 1, 2])
        (second,), _ = q.complete_and_dequeue([(first, None)], "w", now=NOW)
        q.enqueue("t", "unnamed", queue="fair", priority=4, now=NOW)
        q.enqueue("t", "mine", queue="fair", group="b", assigned_to="w", priority=3, now=NOW)
        payloads = [q.dequeue("w", now=NOW).payload for _ in range(3)]
        self.assertEqual([second.payload, *payloads], ["a2", "unnamed", "mine", 3])
        q.limit("fair", running=None, rate=(1, 10))
        self.assertEqual([q.dequeue("w", now=NOW + at).payload for at in (0, 1, 9, 1, 10)], ["a3", 4, 5, 6, 7])

    def test_claim_takes_all_that_a_group_of_great_weight_may_run(self):
        q = self.queue
        q.limit("default", running=4)
        q.weigh("default", "a", 100)
        for group in "abcdefgh":
            q.enqueue_many("t", range(9), group=group, now=NOW)
        for job in q.dequeue_many("w", 8, now=NOW):
            q.complete(job, now=NOW)
        self.assertEqual([job.group for job in q.dequeue_many("w", 8, now=NOW)].count("a"), 4)

    def test_group_never_has_more_deliveries_than_its_rate(self):
        q = self.queue
        q.limit("default", rate=(3, 1.0))
        for group in ("a", None):
            q.enqueue_many("t", range(40), group=group, now=NOW)
        begun = {"a": [], None: []}
        for step in range(60):
            now = NOW + step * 0.1
            for job in q.dequeue_many("w", step % 3 + 1, now=now):
                begun[job.group].append(job.started_at)
                (q.complete if step % 2 else q.release)(job, now=now)
        for times in begun.values():
            self.assertGreaterEqual(len(times), 17)
            self.assertTrue(all(later - at >= 1.0 for at, later in zip(times, times[3:], strict=False)), times)

    def test_deliveries_of_a_group_with_a_rate_are_in_order_although_a_clock_was_set_back(self):
        q = self.queue
        q.limit("default", rate=(2, 60))
        q.enqueue_many("t", range(9), group="a", now=NOW)
        taken = [q.dequeue("w", lease_seconds=999, now=NOW + at) for at in (0, -50, 30, 60, 61)]
        self.assertEqual([job and job.started_at - NOW for job in taken], [0, 0, None, 60, 61])

    def test_waiting_consumer_knows_when_the_rate_allows_the_next_job(self):
        q = self.queue
        q.limit("default", rate=(2, 60))
        q.enqueue_many("t", range(3), group="a", now=NOW)
        q.enqueue_many("t", range(3), now=NOW)
        self.assertEqual(len(q.dequeue_many("w", 9, lease_seconds=999, now=NOW + 5)), 4)
        self.assertEqual(q.dequeue_many("w", 9, now=NOW + 64), [])
        params = {"consumer": "w", "queues": None, "tasks": None, "limit": 1}
        self.assertEqual(q._read(pqueue_schema.NEXT_EVENT, params)[0][0], NOW + 65)
        expected = {"running": None, "max_running": None, "rate": (2, 60.0), "next_at": NOW + 65}
        self.assertEqual(q.limits("default", "a", now=NOW + 64), expected)
        self.assertEqual(q.limits("default", now=NOW + 64), expected)
        self.assertEqual(len(q.dequeue_many("w", 9, now=NOW + 65)), 2)

    def test_waiting_consumer_sleeps_until_it_may_take_a_job(self):
        q = self.queue

        def next_event(queue, tasks=None):
            params = {"consumer": "w", "queues": json.dumps([queue]), "tasks": tasks, "limit": 1}
            at = q._read(pqueue_schema.NEXT_EVENT, params)[0][0]
            return at if at is None else at - NOW

        q.schedule("paused", "t", every_seconds=1, now=NOW)
        q.pause_schedule("paused")
        for name, seconds in (("a", 90), ("b", 60)):
            q.limit(name, rate=(2, seconds))
        for name, group, at in (("a", None, 1), ("a", None, 2), ("b", None, 5)):
            q.enqueue("t", queue=name, group=group, now=NOW)
            self.assertEqual(q.dequeue("w", queues=[name], lease_seconds=9999, now=NOW + at).group, group)
        q.enqueue("t", queue="b", now=NOW)
        self.assertEqual(next_event("b"), -NOW)  # now
        self.assertIsNotNone(q.dequeue("w", queues=["b"], lease_seconds=9999, now=NOW + 7))
        for group in ("g", "g", "g"):
            q.enqueue_many("t", range(2), queue="b", group=group, now=NOW)
        for at in (8, 9, 68, 69):
            self.assertEqual(q.dequeue("w", queues=["b"], lease_seconds=9999, now=NOW + at).group, "g")
        self.assertIsNone(q.dequeue("w", queues=["b"], now=NOW + 69))
        for name in "ab":
            q.enqueue("t", queue=name, now=NOW)
        self.assertEqual((next_event("a"), next_event("b")), (91, 65))
        self.assertEqual(next_event("b", "\nother\n"), 9999 + 1)  # the first lease
        for at in (10, 11):
            self.assertIsNone(q.dequeue("w", queues=["a"], lease_seconds=9999, now=NOW + at))

    def test_waiting_consumer_is_not_woken_by_groups_that_are_not_for_it(self):
        q = self.queue

        def next_event(queue, tasks=None):
            params = {"consumer": "w", "queues": json.dumps([queue]), "tasks": tasks, "limit": 1}
            return q._read(pqueue_schema.NEXT_EVENT, params)[0][0]

        q.limit("a", running=2)
        for name, task in (("a", "t"), ("b", "t"), ("b", "u"), ("paused", "t")):
            q.enqueue(task, queue=name, group="g", now=NOW)
        q.pause("paused")
        for _ in range(2):
            taken = q.dequeue("w", queues=["b"], tasks=["t"], lease_seconds=99, now=NOW)
            if taken:
                q.complete(taken, now=NOW)
        self.assertEqual(next_event("paused"), None)
        self.assertEqual(next_event("b"), 0)
        self.assertEqual(next_event("b", "\nt\n"), None)
        q.enqueue("t", queue="a", now=NOW)
        self.assertEqual(len(q.dequeue_many("w", 9, queues=["a"], lease_seconds=99, now=NOW)), 2)
        q.limit("c", running=1)
        q.enqueue("t", queue="c", group="g", now=NOW)
        self.assertIsNotNone(q.dequeue("w", queues=["c"], lease_seconds=99, now=NOW))
        q.enqueue("t", queue="c", now=NOW)
        self.assertEqual(next_event("c"), 0)
        self.assertEqual(next_event("a"), NOW + 99)

    def test_assigned_job_of_an_unknown_task_or_a_paused_queue_is_not_delivered_from_a_queue_with_limits(self):
        q = self.queue
        for name in ("limited", "paused"):
            q.limit(name, running=5)
            q.enqueue("t", queue=name, assigned_to="w", group="a", now=NOW)
        q.pause("paused")
        self.assertEqual(q.dequeue_many("w", 9, tasks=["u"], now=NOW), [])
        self.assertEqual([job.queue for job in q.dequeue_many("w", 9, tasks=["t"], now=NOW)], ["limited"])

    def test_assigned_job_of_a_group_is_not_taken_with_the_others_of_its_group(self):
        mine = self.queue.enqueue("t", group="a", assigned_to="x", priority=1, now=NOW)
        for group in "ab":
            self.queue.enqueue_many("t", range(2), group=group, now=NOW)
        self.assertEqual([job.group for job in self.queue.dequeue_many("w", 9, now=NOW)], ["a", "b", "a", "b"])
        self.assertEqual(self.queue.dequeue("x", now=NOW).id, mine)

    def test_assigned_job_counts_towards_the_limits_of_its_group(self):
        q = self.queue
        q.limit("default", running=1)
        q.enqueue("t", "mine", assigned_to="w", group="a", now=NOW)
        q.enqueue("t", "any", group="a", priority=-1, now=NOW)
        q.enqueue("t", "free", assigned_to="w", now=NOW)
        jobs = q.dequeue_many("w", 9, now=NOW)
        self.assertEqual([job.payload for job in jobs], ["mine", "free"])
        self.assertIsNone(q.dequeue("w", now=NOW))
        q.complete(jobs[0], now=NOW)
        self.assertEqual(q.dequeue("w", now=NOW).payload, "any")

    def test_changed_job_is_delivered_from_its_new_group_and_queue(self):
        q = self.queue
        first, second, third = q.enqueue_many("t", range(3), now=NOW)
        q.change(first, group="a", now=NOW)
        q.change(second, queue="other", group="b", now=NOW)
        q.change(third, queue="third", now=NOW)
        q.change(third, group="c", now=NOW)
        q.change(third, group=None, now=NOW)
        jobs = q.dequeue_many("w", 9, now=NOW)
        self.assertEqual(
            {(job.id, job.queue, job.group) for job in jobs},
            {(first, "default", "a"), (second, "other", "b"), (third, "third", None)},
        )
        q.release(next(job for job in jobs if job.id == second), now=NOW)
        q.change(second, queue="fourth", now=NOW)
        self.assertEqual(q.dequeue("w", now=NOW).queue, "fourth")

    def test_job_with_a_group_keeps_its_key_its_room_and_its_time(self):
        q = self.queue
        job_id = q.enqueue("t", 1, group="a", key="k", now=NOW)
        self.assertEqual(q.enqueue("t", 2, group="b", key="k", on_conflict="replace", now=NOW), job_id)
        self.assertEqual((q.get(job_id).payload, q.get(job_id).group), (2, "a"))
        q.limit("new", 1)
        q.enqueue("t", group="a", queue="new", now=NOW)
        with self.assertRaises(QueueFull):
            q.enqueue("t", group="b", queue="new", now=NOW)
        later = q.enqueue("t", group="a", delay_seconds=5, now=NOW)
        self.assertEqual({job.id for job in q.dequeue_many("w", 9, queues=["default"], now=NOW)}, {job_id})
        self.assertEqual(q.peek(1, queues=["default"], now=NOW + 5)[0].id, later)
        self.assertEqual(q.dequeue("w", queues=["default"], now=NOW + 5).id, later)

    def test_transaction_that_is_rolled_back_leaves_no_group_behind(self):
        q = self.queue
        with self.assertRaises(ZeroDivisionError), q.transaction():
            q.enqueue("t", group="a", now=NOW)
            raise ZeroDivisionError
        q.enqueue("t", group="a", now=NOW)
        self.assertEqual(self.groups(2), ["a", None])

    def test_prune_forgets_groups_without_jobs_and_they_can_come_again(self):
        q = self.queue
        for number in range(9):
            q.enqueue("t", group=f"g{number}", now=NOW)
        q.enqueue("t", group="busy", now=NOW)
        for _ in range(9):
            q.complete(q.dequeue("w", now=NOW), now=NOW)
        q.enqueue_many("t", range(3), group="busy", now=NOW)
        self.assertEqual(self.groups(2)[1], "busy")
        q.prune(0, now=NOW + 9)
        self.assertLess(q._read("SELECT count(*) FROM queue_groups")[0][0], 9)
        q.enqueue("t", group="g0", now=NOW)
        self.assertEqual(sorted(map(str, self.groups(4))), ["None", "busy", "busy", "g0"])

    def test_prune_forgets_a_group_whatever_has_its_name_in_another_queue(self):
        q = self.queue
        for group in ("g", "last", "last"):
            q.enqueue("t", queue="idle", group=group, now=NOW)
        for _ in range(3):
            q.complete(q.dequeue("w", now=NOW), now=NOW)
        self.assertIsNone(q.dequeue("w", now=NOW))
        for group in ("first", "g"):
            q.enqueue("t", queue="busy", group=group, now=NOW)
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        q.prune(0, now=NOW + 9)
        self.assertNotIn(("idle", "g"), [tuple(row) for row in q._read("SELECT queue, name FROM queue_groups")])
        self.assertEqual(q.dequeue("w", now=NOW).group, "g")

    def test_prune_keeps_a_group_that_is_ahead_of_its_queue(self):
        q = self.queue
        q.enqueue_many("t", range(9), queue="a", group="g", now=NOW)
        self.assertEqual(len(q.dequeue_many("w", 9, now=NOW)), 9)
        q.enqueue("t", queue="b", group="ahead", now=NOW)
        self.assertEqual(self.groups(2, queues=["b"]), ["ahead", None])
        q.prune(0, now=NOW)
        for group in ("ahead", "new"):
            q.enqueue("t", queue="b", group=group, now=NOW)
        self.assertEqual(self.groups(2, queues=["b"]), ["new", "ahead"])

    def test_queue_whose_groups_have_no_jobs_any_more_is_claimed_from_without_turns(self):
        q = self.queue

        def takes_turns():
            q.prune_kept(now=NOW)
            return q._read("SELECT grouped FROM queues WHERE name = 'default'") == [(1,)]

        others = {"scheduled": q.enqueue("t", group="a", run_at=NOW + 9, now=NOW)}
        job = q.get(q.enqueue("t", group="a", now=NOW))
        for state in ("finished", "assigned", "waiting", "released"):
            options = {"assigned_to": "w"} if state == "assigned" else {"after": [job.id]} if state == "waiting" else {}
            others[state] = q.enqueue("t", group="a", now=NOW, **options)
        q.enqueue_many("t", range(3), now=NOW)
        self.assertTrue(takes_turns())
        q.cancel(others["finished"], now=NOW)
        held = q.dequeue_many("v", 2, now=NOW)
        self.assertEqual({each.group for each in held}, {"a", None})
        rest = q.dequeue_many("v", 9, now=NOW)
        self.assertFalse(takes_turns())
        self.assertIsNone(q.dequeue("v", now=NOW))
        running = next(each for each in [*held, *rest] if each.id == job.id)
        for back, do in {
            "waiting": lambda: q.complete(running, now=NOW),
            "finished": lambda: q.resubmit(others["finished"], now=NOW),
            "assigned": lambda: q.assign(others["assigned"], None, now=NOW),
            "released": lambda: q.release(next(each for each in rest if each.id == others["released"]), now=NOW),
            "scheduled": lambda: q.run_now(others["scheduled"], now=NOW),
        }.items():
            with self.subTest(back):
                do()
                self.assertTrue(takes_turns())
                found = q.dequeue("v", now=NOW)
                self.assertEqual((found.id, found.group), (others[back], "a"))
                self.assertIsNone(q.dequeue("v", now=NOW))
                self.assertFalse(takes_turns())
        for limit in ({"running": 9}, {"rate": (9, 60)}):
            with self.subTest(**limit):
                for value, turns in (limit, True), (dict.fromkeys(limit), False):
                    q.limit("default", **value)
                    self.assertIsNone(q.dequeue("v", now=NOW))
                    self.assertEqual(takes_turns(), turns)
        q.enqueue("t", group="a", run_at=NOW + 20, now=NOW)
        self.assertFalse(takes_turns())
        self.assertEqual(q.dequeue("v", now=NOW + 20).group, "a")
        q.limit("default", running=1)
        self.assertTrue(takes_turns())

    def test_limit_of_groups_holds_after_their_jobs_are_deleted(self):
        q = self.queue
        for name, limit in (("running", {"running": 1}), ("rate", {"rate": (1, 100)})):
            with self.subTest(name):
                q.limit(name, **limit)
                q.prune_kept(now=NOW)
                q.enqueue_many("t", range(2), queue=name, now=NOW)
                self.assertEqual(len(q.dequeue_many("w", 9, queues=[name], now=NOW)), 1)

    def test_verb_on_a_queue_or_a_schedule_leaves_others_alone(self):
        q = self.queue
        for name, seconds in (("a", 10), ("b", 999)):
            q.limit(name, 9, running=9, rate=(2, 50))
            q.weigh(name, "g", 2)
            q.schedule(name, "t", every_seconds=seconds, queue=name, overlap=name == "b", now=NOW)
            q.enqueue_many("t", range(4), queue=name, group="g", now=NOW)
            q.enqueue_many("t", range(4), queue=name, now=NOW)
            q.dequeue_many("w", 2, queues=[name], lease_seconds=99, now=NOW)
        tables = {"schedules": "name", "queues": "name", "queue_groups": "queue", "group_weights": "queue"}
        tables |= {"group_starts": "queue"}

        def others():
            return {
                table: sorted(map(repr, q._read(f"SELECT * FROM {table} WHERE {column} = 'b'")))
                for table, column in tables.items()
            }

        before = others()
        verbs = {
            "pause": lambda: q.pause("a"),
            "resume": lambda: q.resume("a"),
            "keep": lambda: q.keep("a", completed=1, failed=2, cancelled=3),
            "expect": lambda: q.expect("a", max_wait_seconds=1),
            "weigh": lambda: q.weigh("a", "g", 3),
            "fire a schedule": lambda: q.dequeue("w", queues=["a"], lease_seconds=99, now=NOW + 11),
            "fire a schedule again": lambda: q.dequeue("w", queues=["a"], lease_seconds=99, now=NOW + 22),
            "begin deliveries": lambda: q.dequeue_many("w", 4, queues=["a"], lease_seconds=99, now=NOW + 51),
            "limit running": lambda: q.limit("a", running=1),
            "limit the rate": lambda: q.limit("a", rate=None),
            "limit": lambda: q.limit("a", None),
            "end limits": lambda: q.limit("a", running=None),
            "prune": lambda: (
                q.delete_jobs([job.id for job in q.list_jobs(queue="a")], force=True),
                q.prune(0, now=NOW),
            ),
            "pause a schedule": lambda: q.pause_schedule("a"),
            "resume a schedule": lambda: q.resume_schedule("a", now=NOW),
            "delete a schedule": lambda: q.unschedule("a"),
        }
        for verb, call in verbs.items():
            with self.subTest(verb):
                call()
                self.assertEqual(others(), before)

    def test_prune_leaves_a_queue_with_jobs_of_groups_its_turns(self):
        q = self.queue
        for name in "ab":
            q.enqueue("t", queue=name, group="g", now=NOW)
        q.complete(q.dequeue("w", queues=["a"], now=NOW), now=NOW)
        self.assertIsNone(q.dequeue("w", queues=["a"], now=NOW))
        q.prune(0, now=NOW + 9)
        self.assertEqual(q._read("SELECT name, grouped FROM queues ORDER BY name"), [("a", 0), ("b", 1)])
        self.assertEqual(q.dequeue("w", now=NOW + 9).queue, "b")

    def test_copy_of_a_queue_keeps_its_groups_and_limits(self):
        q = self.queue
        q.limit("default", running=2, rate=(3, 50))
        q.weigh("default", "a", 2)
        for group in ("a", "b", None):
            q.enqueue_many("t", range(9), group=group, now=NOW)
        self.assertEqual(len(q.dequeue_many("w", 1, now=NOW)), 1)
        with tempfile.TemporaryDirectory() as folder, pqueue.PersistentQSQLite(f"{folder}/copy.db") as copy:
            q.copy_to(copy)
            self.assertEqual(copy.check()["problems"], [])
            self.assertEqual(copy.limits("default", "a"), {**q.limits("default", "a")})
            self.assertEqual(copy.count_groups(now=NOW), q.count_groups(now=NOW))
            found = [job.group for job in copy.dequeue_many("w", 50, now=NOW + 1)]
            self.assertEqual(sorted(map(str, found)), sorted(map(str, self.groups(5))))

    def test_copy_of_a_queue_continues_with_the_turns_weights_and_rates_of_its_groups(self):
        q = self.queue
        q.limit("default", rate=(3, 50))
        q.weigh("default", "heavy", 3)
        for group in ("a", "heavy", "b", None):
            q.enqueue_many("t", range(9), group=group, now=NOW)
        self.groups(5)
        with tempfile.TemporaryDirectory() as folder, pqueue.PersistentQSQLite(f"{folder}/copy.db") as copy:
            q.copy_to(copy)
            for at, number in ((1, 7), (60, 12)):
                found, copied = ([each.dequeue("w", now=NOW + at) for _ in range(number + 1)] for each in (q, copy))
                self.assertEqual([job and job.id for job in copied], [job and job.id for job in found])
                self.assertEqual(found.index(None), number)

    def test_guarantee_5_names_are_those_since_the_last_resubmission(self):
        job_id = self.queue.enqueue("t", max_attempts=2, now=NOW)
        self.queue.dequeue("bert", now=NOW)
        self.queue.fail(self.queue.dequeue("cora", now=NOW + 100), "no", now=NOW + 100)
        self.queue.resubmit(job_id, now=NOW + 100)
        self.queue.fail(self.queue.dequeue("anna", now=NOW + 100), "no", retry_in_seconds=0, now=NOW + 100)
        self.queue.dequeue("dora", now=NOW + 101)
        self.queue.dequeue("eve", now=NOW + 300)
        self.assertIn("lost by dora;", self.queue.get(job_id).error)

    def test_guarantee_5_job_that_kills_costs_no_other_job_an_attempt(self):
        ids = self.queue.enqueue_many("t", range(5), max_attempts=2, now=NOW)
        self.assertEqual(len(self.queue.dequeue_many("victim", 9, now=NOW)), 5)
        fresh = self.queue.enqueue("t", now=NOW)
        after = [self.queue.dequeue_many("heir", 9, now=NOW + 61) for _ in range(6)]
        self.assertEqual([[job.id for job in jobs] for jobs in after], [*([job_id] for job_id in ids), [fresh]])

    # Working

    def test_batch_completes_all_but_the_job_whose_lease_was_lost(self):
        self.queue.enqueue_many("t", range(3), now=NOW)
        jobs = self.queue.dequeue_many("w", 3, now=NOW)
        self.queue.cancel(jobs[1].id)
        following = self.queue.enqueue("t", now=NOW)
        self.queue.enqueue("t", now=NOW)
        taken, lost = self.queue.complete_and_dequeue([(job, job.payload) for job in jobs], "w", now=NOW)
        self.assertEqual([job.id for job in taken], [following])
        self.assertEqual(lost, [jobs[1]])
        self.assertEqual([self.queue.get(job.id).result for job in jobs], [0, None, 2])

    def test_batch_completes_only_the_jobs_that_were_given(self):
        self.queue.enqueue_many("t", range(3), now=NOW)
        first, second, third = self.queue.dequeue_many("w", 3, now=NOW)
        self.queue.complete_and_dequeue([(first, 1), (third, 3)], "w", 0, now=NOW)
        self.assertEqual([self.queue.get(job.id).result for job in (first, third)], [1, 3])
        self.assertEqual(self.queue.get(second.id), second)

    def test_dequeue_promotes_only_jobs_that_are_due(self):
        due, later = (self.queue.enqueue("t", run_at=NOW + seconds, now=NOW) for seconds in (10, 20))
        self.queue.dequeue_many("w", 0, now=NOW + 10)
        self.assertEqual([self.queue.get(job_id).state for job_id in (due, later)], ["pending", "scheduled"])

    def test_dequeue_with_a_small_batch_promotes_in_spite_of_pending_jobs(self):
        self.queue.pause("paused")
        self.queue.enqueue("t", queue="paused", now=NOW)
        job_id = self.queue.enqueue("t", run_at=NOW + 10, now=NOW)
        with mock.patch("pqueue.RECLAIM_BATCH", 1):
            self.assertEqual(self.queue.dequeue("w", now=NOW + 10).id, job_id)

    def test_dequeue_reclaims_only_expired_leases(self):
        self.queue.enqueue_many("t", range(2), now=NOW)
        expired, held = (self.queue.dequeue("w", lease_seconds=seconds, now=NOW) for seconds in (10, 20))
        self.queue.dequeue_many("other", 0, now=NOW + 10)
        self.assertEqual(self.queue.get(expired.id).state, "pending")
        self.assertEqual(self.queue.get(held.id), held)

    def test_consumer_keeps_its_job_when_another_has_left(self):
        leaver, stayer = self.reopen(), self.reopen()
        leaver.dequeue("leaver")
        leaver.close()
        self.queue.enqueue("t")
        job = stayer.dequeue("stayer")
        self.assertIsNone(self.reopen().dequeue("newcomer"))
        self.assertEqual(self.queue.get(job.id), job)
        states = {each["name"]: each["state"] for each in self.queue.consumers()}
        self.assertEqual(states, {"leaver": "stopped", "stayer": "running", "newcomer": "running"})

    def test_consumer_that_leaves_takes_no_other_along(self):
        self.queue.enqueue_many("t", range(2), now=NOW)
        kept, returned = (self.queue.dequeue(name, now=NOW) for name in ("stayer", "leaver"))
        self.queue.heartbeat("leaver", completed=1)
        self.queue.leave("leaver")
        self.assertEqual(self.queue.get(kept.id), kept)
        self.assertEqual(self.queue.get(returned.id).state, "pending")
        seen = {each["name"]: (each["state"], each["completed"]) for each in self.queue.consumers()}
        self.assertEqual(seen, {"leaver": ("stopped", 1), "stayer": ("running", 0)})

    def test_consumer_that_was_found_dead_is_not_shown_as_stopped(self):
        self.queue.dequeue("w")
        with self.queue.transaction() as db:
            self.execute(db, "UPDATE consumers SET state = 'dead'")
        self.queue.leave("w")
        self.assertEqual([each["state"] for each in self.queue.consumers()], ["dead"])

    def test_consumer_looks_for_the_dead_once_in_a_while(self):
        self.reopen().dequeue("other")
        with mock.patch.object(self.queue, "_is_alive", return_value=True) as is_alive:
            for _ in range(3):
                self.queue.dequeue("w")
            self.assertEqual(is_alive.call_count, 1)
            clock = time.monotonic
            with mock.patch("time.monotonic", lambda: clock() + 1):
                self.queue.dequeue("w")
            self.assertEqual(is_alive.call_count, 2)

    def test_jobs_of_a_dead_consumer_are_back_however_few_at_a_time(self):
        self.queue.enqueue_many("t", range(5))
        self.reopen().dequeue_many("victim", 5)
        with self.queue.transaction() as db:
            self.execute(db, "UPDATE consumers SET state = 'dead'")
        with mock.patch.multiple(pqueue, RECLAIM_BATCH=2, DEAD_CHECK_SECONDS=0):
            for left in (3, 1, 0):
                self.queue.dequeue_many("heir", 0)
                self.assertEqual(self.queue.count_jobs(state="processing"), left)

    def test_consumer_gets_one_assigned_job_after_the_other(self):
        ids = [self.queue.enqueue("t", assigned_to="w", now=NOW) for _ in range(3)]
        for job_id in ids:
            job = self.queue.dequeue("w", now=NOW)
            self.assertEqual(job.id, job_id)
            self.queue.complete(job, now=NOW)
        self.assertFalse(self.queue.wait(0.01, consumer="w"))

    ODD = (
        None,
        False,
        0,
        -0.0,
        1e300,
        2**70,
        "",
        '"',
        "null",
        "\0\t\\",
        "é\u2028🎈",
        [],
        [[]],
        {},
        {"": {"b": [1.5, None]}},
    )

    def test_batch_with_a_job_under_two_tokens_tells_the_stale_one(self):
        stale = self.taken()
        holder = self.queue.dequeue("worker", now=NOW + 61)
        settled = self.queue.complete_and_dequeue([(stale, "late"), (holder, "done")], "worker", now=NOW + 61)
        self.assertEqual(settled, ([], [stale]))
        self.assertEqual(self.queue.get(holder.id).result, "done")

    def test_batch_stores_each_payload_as_it_is(self):
        ids = self.queue.enqueue_many("t", self.ODD, now=NOW)
        self.assertEqual([repr(self.queue.get(job_id).payload) for job_id in ids], [repr(value) for value in self.ODD])

    def test_batch_of_several_claims_stores_each_result_with_its_job(self):
        chance, expected = random.Random(5), {}
        self.queue.enqueue_many("t", range(60), now=NOW)
        while jobs := [job for _ in range(4) for job in self.queue.dequeue_many("w", chance.randint(1, 3), now=NOW)]:
            chance.shuffle(jobs)
            results = {job.id: chance.choice((None, 1, "text", [job.id])) for job in jobs}
            left, lost = self.queue.complete_and_dequeue([(job, results[job.id]) for job in jobs], "w", 0, now=NOW)
            self.assertEqual((left, lost), ([], []))
            expected |= results
        self.assertEqual({job.id: job.result for job in self.queue.list_jobs(limit=100)}, expected)
        self.assertEqual(len(expected), 60)

    def test_payload_nests_a_hundred_deep_and_no_deeper(self):
        deepest = json.loads("[[]," + "[" * 99 + "]" * 99 + "]")
        self.assertEqual(self.queue.get(self.queue.enqueue("t", deepest)).payload, deepest)
        with self.assertRaisesRegex(ValueError, "payload"):
            self.queue.enqueue("t", [deepest])

    def test_enqueue_many_refuses_the_payloads_that_enqueue_refuses(self):
        nest = 0
        for _ in range(pqueue_values.MAX_JSON_DEPTH + 1):
            nest = [nest]
        for bad in (nest, {1, 2}, float("nan"), "\ud800", "x" * pqueue.MAX_PAYLOAD_BYTES):
            with self.subTest(bad=repr(bad)[:20]), self.assertRaisesRegex(ValueError, "expected a payload"):
                self.queue.enqueue_many("t", [{}] * 200 + [bad])
        self.assertEqual(self.queue.count_jobs(), 0)
        self.queue.enqueue_many("t", [nest[0], *([nest[0]] * 200), "x" * (pqueue.MAX_PAYLOAD_BYTES - 2)])
        self.assertEqual(self.queue.get(1).payload, nest[0])

    def test_batch_stores_each_result_as_it_is(self):
        results = list(self.ODD)
        ids = self.queue.enqueue_many("t", results, now=NOW)
        jobs = self.queue.dequeue_many("w", len(results), now=NOW)
        self.assertEqual(self.queue.complete_and_dequeue(zip(jobs, results, strict=True), "w", now=NOW), ([], []))
        self.assertEqual([self.queue.get(job_id).result for job_id in ids], results)

    def test_failed_attempt_waits_its_backoff_and_the_last_one_is_final(self):
        job = self.taken(max_attempts=2)
        self.assertEqual(self.queue.fail(job, "boom", retry_in_seconds=10, now=NOW), "scheduled")
        self.assertIsNone(self.queue.dequeue("worker", now=NOW + 9))
        job = self.queue.dequeue("worker", now=NOW + 10)
        self.assertEqual((job.attempts, job.error), (2, "boom"))
        self.assertEqual(self.queue.fail(job, "bang", now=NOW + 10), "failed")
        self.assertEqual([event["error"] for event in self.queue.history(job.id)], ["boom", "bang"])

    def test_job_released_with_a_delay_is_scheduled_and_the_attempt_does_not_count(self):
        job = self.taken(max_attempts=1)
        for number in range(1, 4):
            self.queue.release(job, delay_seconds=timedelta(seconds=30), now=NOW + 100 * number)
            row = self.queue.get(job.id)
            self.assertEqual((row.state, row.attempts, row.run_at), ("scheduled", 0, NOW + 100 * number + 30))
            (event,) = self.queue.history(job.id)  # of several delays, the last
            self.assertEqual((event["event"], event["at"], event["actor"]), ("snoozed", NOW + 100 * number, "worker"))
            self.assertIsNone(self.queue.dequeue("worker", now=NOW + 100 * number + 29))
            job = self.queue.dequeue("worker", now=NOW + 100 * number + 30)
        with self.assertRaises(LeaseLost):
            self.queue.release(job._replace(lease_token="old"), delay_seconds=5, now=NOW)
        self.assertEqual(len(self.queue.history(job.id)), 1)
        other = self.taken()
        self.queue.fail(other, "no", retry_in_seconds=0, now=NOW)
        self.queue.release(self.queue.dequeue("worker", now=NOW), delay_seconds=1, now=NOW)
        self.assertEqual([event["event"] for event in self.queue.history(other.id)], ["failed", "snoozed"])
        self.queue.release(job, delay_seconds=1, now=NOW + 900)
        self.assertEqual([event["at"] for event in self.queue.history(job.id)], [NOW + 900])
        for broken in ("5", None, math.nan):
            with self.subTest(broken), self.assertRaisesRegex(ValueError, "expected delay_seconds"):
                self.queue.release(job, delay_seconds=broken)

    # Joined transactions

    @contextmanager
    def application(self):
        """A connection of the application's own to the database of the queue."""
        conninfo = getattr(self.queue, "_conninfo", None)
        if conninfo is None:
            connection = sqlite3.connect(self.queue.path)
        else:
            import psycopg

            connection = psycopg.connect(**conninfo)
        with closing(connection):
            yield connection

    def test_joined_enqueue_is_committed_with_the_transaction_of_the_application(self):
        q, other = self.queue, self.reopen()
        other.enqueue("t", key="taken")
        with self.application() as connection:
            connection.execute("CREATE TABLE orders (number INTEGER)")
            connection.execute("INSERT INTO orders VALUES (7)")
            with q.join(connection) as joined:
                self.assertIs(joined, q)
                first = q.enqueue("new task", {"n": 1}, queue="new queue", key="k")
                again = q.enqueue("new task", {"n": 2}, queue="new queue", key="k")
                self.assertEqual((again, first.is_new, again.is_new), (first, True, False))
                self.assertFalse(q.enqueue("t", key="taken").is_new)
                many = q.enqueue_many("t", range(3))
                self.assertEqual(q.get(first).payload, {"n": 1})
                q.cancel(many[0])
            self.assertEqual(other.count_jobs(), 1)
            connection.commit()
            self.assertEqual(connection.execute("SELECT count(*) FROM orders").fetchone(), (1,))
        self.assertEqual(
            [other.get(number).state for number in (first, *many)], ["pending", "cancelled"] + ["pending"] * 2
        )
        self.assertEqual(other.dequeue("w", queues=["new queue"]).id, first)

    def test_joined_jobs_are_removed_by_the_rollback_of_the_application(self):
        q = self.queue
        q.enqueue("t")
        with self.application() as connection:
            with self.assertRaises(ZeroDivisionError), q.join(connection):
                q.enqueue("t", {"n": 1}, queue="other")
                raise ZeroDivisionError
            connection.rollback()
            with q.join(connection):
                q.enqueue("t")
        self.assertEqual(q.count_jobs(), 1)  # the application closed it without a commit

    def test_consumer_sees_a_joined_job_soon_after_the_commit(self):
        self.without_timers()
        other = self.reopen()
        self.queue.enqueue("t")
        other.dequeue("w")
        found = threading.Event()

        def consume():
            while not other.wait(60, consumer="w"):
                pass
            found.set()

        consumer = threading.Thread(target=consume, daemon=True)
        with self.application() as connection:
            consumer.start()
            with self.queue.join(connection):
                self.queue.enqueue("t")
            self.assertFalse(found.wait(0.05))
            connection.commit()
        self.assertTrue(found.wait(PATIENCE_SECONDS))
        consumer.join()
        self.assertIsNotNone(other.dequeue("w"))

    def test_joined_limit_and_leases_hold(self):
        q = self.queue
        q.limit("few", 2)
        lost = self.in_state("stolen")
        with self.application() as connection:
            with q.join(connection):
                q.enqueue_many("t", range(2), queue="few")
                with self.assertRaises(QueueFull):
                    q.enqueue("t", queue="few")
            connection.rollback()
            with self.assertRaises(LeaseLost), q.join(connection):
                with suppress(LeaseLost):
                    q.complete(lost, now=NOW)
            connection.rollback()
            held = q.get(q.enqueue("t", queue="held", now=NOW))
            held = q.dequeue("worker", queues=["held"], now=NOW)
            with q.join(connection):
                q.complete(held, "done", now=NOW)
            self.assertEqual(q.get(held.id).state, "processing")
            connection.commit()
        self.assertEqual(q.result(held.id), "done")

    def test_connection_that_would_lose_or_misplace_jobs_is_not_joined(self):
        q = self.queue
        for wrong in (None, "connection", q, object()):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "^expected a"), q.join(wrong):
                pass
        with self.application() as connection:
            with self.assertRaisesRegex(QueueError, "inside a transaction"), q.transaction(), q.join(connection):
                pass
            with q.join(connection), self.assertRaisesRegex(QueueError, "inside a transaction"), q.join(connection):
                pass
            with q.join(connection), self.assertRaisesRegex(QueueError, "in a joined one"), q.transaction():
                pass
            with q.join(connection), self.assertRaisesRegex(QueueError, "inside a transaction"):
                q.enqueue("t").result(timeout_seconds=0)
            with q.join(connection):
                connection.commit()
                with self.assertRaises(QueueError):
                    q.enqueue("t")
            connection.rollback()
        with self.assertRaises(QueueError), q.join(connection):
            pass
        self.assertEqual(q.count_jobs(), 1)  # that of the commit in the block

    # Results

    def without_timers(self):
        """Let nothing but a wake-up end a wait, where there are wake-ups."""
        for module in () if self.polls else (pqueue, pqueue_locks):
            patch = mock.patch.object(module, "WAIT_SECONDS", 1000.0)
            patch.start()
            self.addCleanup(patch.stop)

    def waiting(self, job_id, number=1):
        """Start threads that wait for a job; return their outcomes, once all wait."""
        outcomes = []

        def wait():
            try:
                outcomes.append(self.queue.result(job_id, timeout_seconds=PATIENCE_SECONDS))
            except (QueueError, TimeoutError) as error:
                outcomes.append(error)

        threads = [threading.Thread(target=wait) for _ in range(number)]
        for thread in threads:
            thread.start()
            self.addCleanup(thread.join)
        wait_until(lambda: len(self.queue._waits._waiting.get(job_id, ())) == number or outcomes)
        self.let_watch_begin()
        return outcomes

    def let_watch_begin(self):
        """Wait until the thread that serves the waiters has read the states of all their jobs."""
        waits, done = self.queue._waits, threading.Event()

        def settle(*arguments):
            found = type(waits)._end_finished(waits, *arguments)
            done.set()
            return found

        with mock.patch.object(waits, "_end_finished", settle):
            with waits._changed:
                waits._notify()
            self.assertTrue(done.wait(PATIENCE_SECONDS))

    def test_waiter_is_woken_by_whatever_finishes_the_job(self):
        self.without_timers()
        q, other = self.queue, self.reopen()

        def settle_as_last_loss(job):
            return other.dequeue("thief", now=NOW + 61)

        finishes = {
            "complete": lambda job: other.complete(job, {"n": 1}, now=NOW),
            "fused": lambda job: other.complete_and_dequeue([(job, {"n": 1})], "worker", 0, now=NOW),
            "fused with a claim": lambda job: other.complete_and_dequeue([(job, {"n": 1})], "worker", now=NOW),
            "fail": lambda job: other.fail(job, "no\nwhy", retry=False, now=NOW),
            "mark_failed": lambda job: other.mark_failed(job.id, "no", now=NOW),
            "cancel": lambda job: other.cancel(job.id, now=NOW),
            "lease of the last attempt": settle_as_last_loss,
        }
        for verb, finish in finishes.items():
            with self.subTest(verb):
                q.enqueue("t", max_attempts=1, now=NOW)
                job = other.dequeue("worker", now=NOW)
                outcomes = self.waiting(job.id)
                finish(job)
                (outcome,) = wait_until(lambda outcomes=outcomes: outcomes)
                if outcome == {"n": 1}:
                    self.assertEqual(q.get(job.id).state, "completed")
                    continue
                self.assertIsInstance(outcome, JobFailed, outcome)
                self.assertEqual((outcome.job, outcome.state), (q.get(job.id), q.get(job.id).state))
                self.assertEqual(outcome.error, q.get(job.id).error)

    def test_waiter_gets_the_result_of_a_job_that_finishes_at_any_moment_of_its_call(self):
        self.without_timers()
        other = self.reopen()
        moments = [(name, when) for name in ("get", "_open_watch", "_finished") for when in ("before", "after")]
        for name, when in moments:
            with self.subTest(f"{when} {name}"):
                queue = self.reopen()
                job_id = queue.enqueue("t", now=NOW)
                job = other.dequeue("w", now=NOW)
                method, finish = getattr(queue, name), [lambda job=job: other.complete(job, 7, now=NOW)]

                def at_this_moment(*arguments, method=method, when=when, finish=finish):
                    found = method(*arguments) if when == "after" else None
                    for act in finish[:1]:
                        finish.clear()
                        act()
                    return found if when == "after" else method(*arguments)

                with mock.patch.object(queue, name, at_this_moment):
                    self.assertEqual(job_id.result(timeout_seconds=PATIENCE_SECONDS), 7)

    def test_waiter_that_comes_while_another_waits_is_woken_for_its_own_job(self):
        self.without_timers()
        self.queue.enqueue_many("t", range(2), now=NOW)
        first, second = self.queue.dequeue_many("w", 2, now=NOW)
        earlier, waits = self.waiting(first.id), self.queue._waits
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(self.queue.result, second.id, timeout_seconds=PATIENCE_SECONDS)
            wait_until(lambda: second.id in waits._waiting)
            self.queue.complete(second, 2, now=NOW)
            self.assertEqual(later.result(), 2)
        self.queue.complete(first, 1, now=NOW)
        self.assertEqual(wait_until(lambda: earlier), [1])

    def test_wait_that_was_given_up_is_forgotten(self):
        job_id = self.queue.enqueue("t", run_at=NOW + 999, now=NOW)
        with self.assertRaises(TimeoutError):
            self.queue.result(job_id, timeout_seconds=0.01)
        other = self.queue.enqueue("t", now=NOW)
        outcomes = self.waiting(other)
        self.queue.complete(self.queue.dequeue("w", now=NOW), now=NOW)
        wait_until(lambda: outcomes and not self.queue._waits._waiting)

    def test_waiter_for_one_of_a_batch_is_woken(self):
        self.without_timers()
        other = self.reopen()
        self.queue.enqueue_many("t", range(8), now=NOW)
        jobs = other.dequeue_many("worker", 8, now=NOW)
        outcomes = self.waiting(jobs[5].id)
        other.complete_and_dequeue([(job, job.payload) for job in jobs], "worker", 0, now=NOW)
        self.assertEqual(wait_until(lambda: outcomes), [5])

    def test_finished_job_gives_its_result_at_once_and_to_anyone(self):
        job_id = self.queue.enqueue("t", now=NOW)
        self.queue.complete(self.queue.dequeue("w", now=NOW), [1], now=NOW)
        self.assertEqual(job_id.result(timeout_seconds=0), [1])
        self.assertEqual(self.reopen().result(int(job_id), timeout_seconds=timedelta(0)), [1])
        with self.queue.transaction():
            self.assertEqual(job_id.result(), [1])

    def test_error_of_a_failed_job_says_which_and_why_and_can_be_pickled(self):
        job_id = self.queue.enqueue("resize", now=NOW)
        self.queue.fail(self.queue.dequeue("w", now=NOW), "ValueError: no\nTraceback", retry=False, now=NOW)
        with self.assertRaises(JobFailed) as caught:
            job_id.result()
        self.assertEqual(str(caught.exception), f"job {job_id} (resize) failed: ValueError: no")
        self.assertEqual(caught.exception.error, "ValueError: no\nTraceback")
        loaded = pickle.loads(pickle.dumps(caught.exception))  # noqa: S301
        self.assertEqual((loaded.job, str(loaded)), (caught.exception.job, str(caught.exception)))

    def test_exceptions_of_the_queue_and_of_tasks_can_be_pickled_and_copied(self):
        job = self.queue.get(self.queue.enqueue("t", now=NOW))

        class Later(pqueue.Snooze):
            def __init__(self):
                super().__init__(60, "later")

        kinds = [
            each for each in vars(pqueue_values).values() if isinstance(each, type) and issubclass(each, Exception)
        ]
        values = {JobFailed: job, pqueue.Snooze: 5, pqueue.Retry: timedelta(seconds=5)}
        errors = [kind(values.get(kind, "why")) for kind in kinds]
        for error in (*errors, pqueue.Retry(), pqueue.Retry(message="why"), Later()):
            found = [copy.copy(error), *([] if type(error) is Later else [pickle.loads(pickle.dumps(error))])]  # noqa: S301
            for each in found:
                self.assertEqual((type(each), str(each), vars(each)), (type(error), str(error), vars(error)))

    def test_waiter_waits_on_through_a_retry_and_a_resubmission(self):
        job = self.taken()
        outcomes = self.waiting(job.id, number=3)
        self.queue.fail(job, "once", retry_in_seconds=1, now=NOW)
        job = self.queue.dequeue("worker", now=NOW + 2)
        self.let_watch_begin()
        self.assertEqual(outcomes, [])
        self.queue.complete(job, "at last", now=NOW + 2)
        wait_until(lambda: len(outcomes) == 3)
        self.assertEqual(outcomes, ["at last"] * 3)
        self.queue.resubmit(job.id, now=NOW + 3)
        with self.assertRaises(TimeoutError):
            self.queue.result(job.id, timeout_seconds=0.01)

    def test_wait_ends_with_an_error_when_there_is_nothing_to_wait_for(self):
        job_id = self.queue.enqueue("t")
        with self.assertRaisesRegex(TimeoutError, f"^job {job_id} has not finished within 0.01 s$"):
            job_id.result(timeout_seconds=0.01)
        with self.assertRaises(JobNotFound):
            self.queue.result(job_id + 1000)
        for wrong in ("1", math.nan, True):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "expected timeout_seconds"):
                job_id.result(timeout_seconds=wrong)
        with self.assertRaisesRegex(QueueError, "inside a transaction"), self.queue.transaction():
            self.queue.enqueue("t").result(timeout_seconds=0.01)
        outcomes = self.waiting(job_id)
        self.reopen().delete_jobs([job_id])
        self.assertIsInstance(wait_until(lambda: outcomes)[0], JobNotFound)
        outcomes = self.waiting(self.queue.enqueue("t"), number=2)
        self.queue.close()
        wait_until(lambda: len(outcomes) == 2)
        self.assertRegex(str(outcomes[0]), "the queue object was closed")
        with self.assertRaisesRegex(QueueError, "closed"):
            self.queue.result(1)
        with self.assertRaisesRegex(QueueError, "closed"):
            asyncio.run(self.queue.aresult(1))

    def test_hundred_waiters_each_get_their_result(self):
        other, outcomes = self.reopen(), {}
        ids = self.queue.enqueue_many("t", range(100))

        def wait(job_id):
            outcomes[job_id] = self.queue.result(job_id, timeout_seconds=60)

        threads = [threading.Thread(target=wait, args=(job_id,)) for job_id in ids]
        for thread in threads:
            thread.start()
        while job := other.dequeue("w"):
            other.complete(job, job.payload)
        for thread in threads:
            thread.join()
        self.assertEqual(outcomes, dict(zip(ids, range(100), strict=True)))

    def test_waiter_for_whom_the_system_has_no_thread_is_told_and_the_next_one_waits(self):
        job_id = self.queue.enqueue("t")
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            for _ in range(2):
                with self.assertRaisesRegex(RuntimeError, "new thread"):
                    job_id.result(timeout_seconds=60)
        outcomes = self.waiting(job_id)
        self.queue.complete(self.queue.dequeue("w"), 5)
        wait_until(lambda: outcomes == [5])

    def test_coroutine_awaits_a_result_while_its_loop_runs_on(self):
        other = self.reopen()
        first, second = self.queue.enqueue_many("t", [1, 2])

        async def work():
            waits = asyncio.gather(first.aresult(), self.queue.aresult(second, timeout_seconds=60))
            impatient = asyncio.ensure_future(first.aresult(timeout_seconds=60))
            await asyncio.sleep(0)
            impatient.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await impatient
            with self.assertRaises(TimeoutError):
                await first.aresult(timeout_seconds=0.01)
            busy = mock.patch.object(self.queue, "get", side_effect=QueueBusy)
            with busy, self.assertRaises(TimeoutError):
                await first.aresult(timeout_seconds=0.01)
            while job := await asyncio.to_thread(other.dequeue, "w"):
                await asyncio.to_thread(other.complete, job, job.payload * 10)
            self.assertEqual(await waits, [10, 20])
            for seconds in (60, 0):
                self.assertEqual(await first.aresult(timeout_seconds=seconds), 10)
            with self.assertRaises(JobNotFound):
                await self.queue.aresult(second + 1000)
            with self.assertRaises(QueueError), self.queue.transaction():
                await second.aresult()

        asyncio.run(work())

    def test_progress_of_a_completed_job_is_one(self):
        jobs = [self.taken() for _ in range(4)]
        self.queue.update(jobs[0], progress=0.5)
        self.queue.complete(jobs[0], now=NOW)
        self.queue.complete_and_dequeue([(jobs[1], None)], "worker", now=NOW)
        self.queue.complete_and_dequeue([(jobs[2], None), (jobs[3], None)], "worker", 0, now=NOW)
        self.assertEqual([self.queue.get(job.id).progress for job in jobs], [1.0] * 4)
        self.queue.resubmit(jobs[0].id, now=NOW)
        self.assertIsNone(self.queue.get(jobs[0].id).progress)

    def test_released_attempt_does_not_count(self):
        job = self.taken(max_attempts=1)
        self.queue.release(job, now=NOW)
        self.assertEqual(self.queue.dequeue("worker", now=NOW).attempts, 1)
        self.assertEqual([event["event"] for event in self.queue.history(job.id)], ["released"])

    def test_extend_all_renews_the_leases_of_one_consumer_whatever_their_claim(self):
        self.queue.enqueue_many("t", range(5), now=NOW)
        mine = [*self.queue.dequeue_many("worker", 2, now=NOW), self.queue.dequeue("worker", now=NOW)]
        other = self.queue.dequeue("other", now=NOW)
        self.queue.complete(mine.pop(), now=NOW)
        self.assertEqual(self.queue.extend_all("worker", 100, now=NOW + 50), 2)
        leases = {job.id: job.lease_expires_at for job in self.queue.list_jobs(state="processing")}
        self.assertEqual(leases, {**{job.id: NOW + 150 for job in mine}, other.id: NOW + 60})
        every = [1, 2, 3, 4, 5, 99]
        self.assertEqual(sorted(self.queue.held_leases("worker", every)), [(job.id, job.lease_token) for job in mine])
        self.assertEqual(self.queue.held_leases("worker", [mine[0].id]), [(mine[0].id, mine[0].lease_token)])
        self.assertEqual((self.queue.extend_all("nobody"), self.queue.held_leases("nobody", every)), (0, []))
        self.assertEqual(self.queue.extend_all("worker", 100, job_ids=[mine[0].id, other.id, 99], now=NOW + 60), 1)
        leases = {job.id: job.lease_expires_at for job in self.queue.list_jobs(state="processing")}
        self.assertEqual(leases, {mine[0].id: NOW + 160, mine[1].id: NOW + 150, other.id: NOW + 60})
        self.assertEqual(self.queue.extend_all("worker", job_ids=[]), 0)
        with self.assertRaisesRegex(ValueError, "lease_seconds"):
            self.queue.extend_all("worker", 0)

    def test_extend_all_changes_only_jobs_that_its_consumer_holds(self):
        for state in ("scheduled", "pending", "processing", "stolen", "completed", "failed", "cancelled"):
            with self.subTest(state=state):
                self.queue.delete_jobs(force=True)
                before = self.queue.get(self.in_state(state).id)
                self.queue.heartbeat("worker")
                is_held = state == "processing"
                self.assertEqual(self.queue.extend_all("worker", 70, now=NOW), int(is_held))
                expected = before._replace(lease_expires_at=NOW + 70) if is_held else before
                self.assertEqual(self.queue.get(before.id), expected)

    def test_extended_lease_outlives_the_first_one(self):
        job = self.taken()
        self.queue.extend(job, 100, now=NOW + 50)
        self.assertIsNone(self.queue.dequeue("other", now=NOW + 149))
        self.assertEqual(self.queue.dequeue("other", now=NOW + 151).id, job.id)

    def test_progress_and_partial_result_are_seen_and_kept_for_the_next_attempt(self):
        job = self.taken()
        self.queue.update(job, progress=0.25, result={"page": 3})
        self.queue.update(job, progress=0.5)
        again = self.queue.dequeue("other", now=NOW + 61)
        self.assertEqual((again.progress, again.result), (0.5, {"page": 3}))

    def test_consumer_gets_only_from_the_queues_it_names(self):
        self.queue.enqueue("t", queue="a", now=NOW)
        self.queue.enqueue("t", queue="b", now=NOW)
        self.assertIsNone(self.queue.dequeue("w", queues=["c"], now=NOW))
        self.assertIsNone(self.queue.dequeue("w", queues=[], now=NOW))
        self.assertEqual(self.queue.dequeue("w", queues=["c", "b"], now=NOW).queue, "b")
        self.assertEqual(self.queue.dequeue("w", now=NOW).queue, "a")

    def test_guarantee_10_consumer_gets_only_the_tasks_it_names(self):
        for task in ("a", "b", "a b", "c"):
            self.queue.enqueue(task, now=NOW)
        for tasks in ([], ["d"], ["A"], ["a b c"], ["%"]):
            self.assertIsNone(self.queue.dequeue("w", tasks=tasks, now=NOW))
        self.assertEqual(self.queue.dequeue("w", tasks=["b", "a"], now=NOW).task, "a")
        self.assertEqual(self.queue.dequeue("w", tasks=("b", "a"), queues=["default"], now=NOW).task, "b")
        self.assertIsNone(self.queue.dequeue("w", tasks=["a", "b"], now=NOW))
        self.assertEqual([job.task for job in self.queue.dequeue_many("w", 5, tasks=["c", "d"], now=NOW)], ["c"])
        self.assertEqual(self.queue.complete_and_dequeue([], "w", 5, tasks=["d"], now=NOW), ([], []))
        self.assertEqual(self.queue.dequeue("w", now=NOW).task, "a b")

    def test_consumer_gets_an_assigned_job_only_of_a_task_it_names(self):
        self.queue.enqueue("t", assigned_to="w", now=NOW)
        self.assertIsNone(self.queue.dequeue("w", tasks=["u"], now=NOW))
        self.assertEqual(self.queue.dequeue_many("w", 5, tasks=["u"], now=NOW), [])
        self.assertEqual(self.queue.dequeue("w", tasks=["u", "t"], now=NOW).task, "t")

    def test_guarantee_10_job_of_a_task_that_no_consumer_knows_waits_as_it_was(self):
        job_id = self.queue.enqueue("new", now=NOW)
        for number in range(3):
            for _ in range(5):
                self.assertIsNone(self.queue.dequeue(f"old {number}", tasks=["t"], now=NOW))
        job = self.queue.get(job_id)
        self.assertEqual((job.state, job.attempts, self.queue.history(job_id)), ("pending", 0, []))
        self.assertEqual(self.queue.dequeue("new", tasks=["t", "new"], now=NOW).id, job_id)

    def test_guarantee_6_batch_has_the_first_jobs_of_all_tasks_and_queues_in_order(self):
        """Tasks that take turns, and one that has most of the first jobs."""
        chance = random.Random(17)
        for tasks, weights in ((1, [1]), (3, [1, 1, 1]), (9, [90, *range(1, 9)])):
            for number in chance.choices(range(tasks), weights, k=120):
                place = {"queue": f"q{number % 3}", "assigned_to": chance.choice([None] * 9 + ["w"])}
                priority, run_at = chance.randint(0, 1), NOW - chance.randint(0, 5)
                self.queue.enqueue(f"t{number}", priority=priority, run_at=run_at, now=NOW, **place)
            jobs = self.queue.list_jobs(state="pending", limit=1000)
            jobs.sort(key=lambda job: (-job.priority, job.run_at, job.id))
            expected = [job.id for job in jobs if job.task != "t1"]
            while expected:
                limit = chance.choice([1, 2, 5, 48])
                known = [f"t{n}" for n in range(9) if n != 1]
                got = self.queue.dequeue_many("w", limit, tasks=known, now=NOW)
                self.assertEqual([job.id for job in got], expected[:limit])
                del expected[:limit]
                for job in got:
                    self.queue.complete(job, now=NOW)
            self.queue.delete_jobs()

    def test_consumers_names_of_tasks_are_checked(self):
        for tasks, told in (
            ("t", "expected a list of tasks"),
            ([""], "expected a task name"),
            ([5], "expected a task"),
        ):
            with self.subTest(tasks=tasks), self.assertRaisesRegex(ValueError, told):
                self.queue.dequeue("w", tasks=tasks)

    def test_pending_jobs_are_counted_by_task(self):
        for task, queue, number in (("a", "p", 2), ("a", "q", 1), ("b", "q", 3)):
            self.queue.enqueue_many(task, range(number), queue=queue, now=NOW)
        self.queue.enqueue("c", delay_seconds=9, now=NOW)
        self.queue.dequeue("w", tasks=["b"], now=NOW)
        self.assertEqual(self.queue.pending_tasks(), {("p", "a"): 2, ("q", "a"): 1, ("q", "b"): 2})

    def test_paused_queue_delivers_nothing_until_resumed(self):
        self.queue.enqueue("t", now=NOW)
        self.queue.enqueue("t", assigned_to="w", now=NOW)
        self.queue.pause("default")
        self.assertIsNone(self.queue.dequeue("w", now=NOW))
        self.assertTrue(self.queue.stats()["queues"]["default"]["paused"])
        self.queue.resume("default")
        self.assertEqual(len(self.queue.dequeue_many("w", 5, now=NOW)), 2)

    def test_assigned_job_runs_on_its_consumer_only_whatever_that_serves(self):
        job_id = self.queue.enqueue("t", queue="a", assigned_to="w", now=NOW)
        self.assertIsNone(self.queue.dequeue("other", now=NOW))
        self.assertEqual(self.queue.dequeue("w", queues=["b"], now=NOW).id, job_id)

    def test_assigning_a_running_job_kills_its_token_and_gives_the_attempt_back(self):
        job = self.taken(max_attempts=1)
        self.queue.assign(job.id, "w2", by="ann", now=NOW)
        with self.assertRaises(LeaseLost):
            self.queue.complete(job)
        self.assertIsNone(self.queue.dequeue("worker", now=NOW))
        self.assertEqual(self.queue.dequeue("w2", now=NOW).attempts, 1)
        self.assertEqual(self.queue.history(job.id)[-1]["actor"], "ann")

    def test_unassigned_job_runs_anywhere(self):
        job_id = self.queue.enqueue("t", assigned_to="gone", now=NOW)
        self.queue.assign(job_id, None)
        self.assertEqual(self.queue.dequeue("w", now=NOW).id, job_id)

    # Producing

    def test_same_key_gives_the_same_job_until_it_is_finished(self):
        first = self.queue.enqueue("t", key="k", now=NOW)
        self.assertEqual(self.queue.enqueue("t", key="k", now=NOW), first)
        self.assertNotEqual(self.queue.enqueue("t", key="k", queue="other", now=NOW), first)
        self.queue.cancel(first)
        second = self.queue.enqueue("t", key="k", now=NOW)
        self.assertNotEqual(second, first)
        self.assertEqual(self.queue.enqueue("t", key="k", now=NOW), second)
        with self.assertRaisesRegex(InvalidTransition, "has its key 'k'"):
            self.queue.resubmit(first)

    def test_enqueue_says_whether_it_stored_the_job(self):
        q = self.queue
        first, again = q.enqueue("t", key="k"), q.enqueue("t", key="k")
        self.assertEqual((first.is_new, again.is_new, q.enqueue("t", key="k", queue="b").is_new), (True, False, True))
        with q.transaction():
            inside = [q.enqueue("t", key=key, queue="c").is_new for key in "kkl"]
        self.assertEqual(inside, [True, False, True])
        self.assertEqual([each.is_new for each in q.enqueue_many("t", [1, 2])], [True, True])
        q.cancel(first)
        self.assertTrue(q.enqueue("t", key="k").is_new)

    def test_queue_is_neither_pickled_nor_copied(self):
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with self.assertRaisesRegex(TypeError, "open it in the other process, with open_queue"):
                copied(self.queue)

    def test_id_of_a_job_is_an_int(self):
        job_id = self.queue.enqueue("t")
        self.assertEqual((str(job_id), repr(job_id), f"{job_id:03}", json.dumps([job_id])), ("1", "1", "001", "[1]"))
        self.assertEqual((job_id, {1: "one"}[job_id], self.queue.get(job_id).id), (1, "one", 1))
        for other in (pickle.loads(pickle.dumps(job_id)), copy.deepcopy(job_id)):  # noqa: S301
            self.assertEqual((type(other), other), (int, 1))  # the queue belongs to this process

    def test_key_holds_within_its_task_only(self):
        first, other, again, other_again = (self.queue.enqueue(name, key="k") for name in ("t", "u", "t", "u"))
        self.assertNotEqual(first, other)
        self.assertEqual((first, other), (again, other_again))
        self.queue.cancel(first)
        self.queue.resubmit(first)
        self.assertEqual([job.id for job in self.queue.list_jobs(key="k")], [other, first])

    def test_key_until_started_is_free_from_the_first_delivery_on(self):
        q = self.queue
        options = {"key": "k", "key_until": "started", "now": NOW}
        first, same = q.enqueue("t", 1, **options), q.enqueue("t", 2, **options)
        self.assertEqual((first, first.is_new, same.is_new), (same, True, False))
        job = q.dequeue("w", now=NOW)
        second = q.enqueue("t", 3, **options)
        self.assertEqual((second.is_new, q.enqueue("t", **options)), (True, second))
        q.release(job, now=NOW)  # two jobs with the key, of which the second holds it
        self.assertEqual(q.enqueue("t", **options), second)
        q.cancel(second)
        third = q.enqueue("t", **options)
        self.assertTrue(third.is_new)
        with self.assertRaisesRegex(InvalidTransition, "another job has its key 'k'"):
            q.resubmit(second)
        for job in q.dequeue_many("w", 1, now=NOW), q.dequeue_many("w", 9, now=NOW):
            q.fail(job[0], "no", retry_in_seconds=0, now=NOW)  # both are scheduled again, neither holds the key
        self.assertTrue(q.enqueue("t", **options).is_new)

    def test_key_with_a_time_is_held_until_then_whether_or_not_its_job_is_finished(self):
        q = self.queue
        enqueue = functools.partial(q.enqueue, "t", key="k", key_seconds=timedelta(minutes=1))
        first = enqueue(now=NOW)
        self.assertEqual((q.get(first).key_until, q.get(first).key_expires_at), (None, NOW + 60))
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        self.assertEqual((enqueue(now=NOW + 59.9), q.enqueue("t", key="k", now=NOW + 59.9)), (first, first))
        second = enqueue(now=NOW + 60)
        self.assertEqual((second.is_new, q.get(second).key_expires_at), (True, NOW + 120))
        self.assertEqual(enqueue(now=NOW + 119), second)
        third = q.enqueue("t", key="k", now=NOW + 120)  # although the second is pending
        self.assertEqual((third.is_new, q.get(second).state), (True, "pending"))
        self.assertEqual([job.id for job in q.list_jobs(key="k")], [third, second, first])
        q.resubmit(first, now=NOW + 120)  # holds no key any more
        q.cancel(third)
        self.assertTrue(enqueue(now=NOW + 130).is_new)

    def test_job_is_not_resubmitted_while_the_time_of_another_with_its_key_runs(self):
        q = self.queue
        first = q.enqueue("t", key="k", now=NOW)
        q.cancel(first, now=NOW)
        second = q.enqueue("t", key="k", key_seconds=60, now=NOW)
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        q.limit("default", 1)
        with self.assertRaisesRegex(InvalidTransition, "another job has its key 'k'"):
            q.resubmit(first, now=NOW + 59)
        q.resubmit(second, now=NOW + 59)  # has its key
        q.cancel(second, now=NOW + 59)
        q.resubmit(first, now=NOW + 60)
        self.assertEqual(q.enqueue("t", key="k", now=NOW + 60), first)

    def test_prune_keeps_a_job_while_it_holds_its_key(self):
        q = self.queue
        first = q.enqueue("t", key="k", key_seconds=1000, now=NOW)
        q.complete(q.dequeue("w", now=NOW), now=NOW)
        q.enqueue("t", now=NOW)  # the newest is never pruned
        self.assertEqual(q.prune(100, now=NOW + 999), 0)
        self.assertEqual(q.enqueue("t", key="k", now=NOW + 999), first)
        self.assertEqual(q.prune(100, now=NOW + 1000), 1)
        second = q.enqueue("t", key="k", key_seconds=1000, now=NOW)
        q.cancel(second, now=NOW)
        q.delete_jobs([second])  # frees its key
        self.assertTrue(q.enqueue("t", key="k", now=NOW).is_new)

    def test_job_not_yet_taken_is_replaced_on_demand(self):
        q = self.queue
        first = q.enqueue("t", 1, key="k", delay_seconds=10, now=NOW)
        again = q.enqueue("t", 2, key="k", delay_seconds=10, priority=5, on_conflict="replace", now=NOW + 9)
        job = q.get(first)
        self.assertEqual((again, again.is_new), (first, False))
        self.assertEqual((job.payload, job.priority, job.run_at, job.state), (2, 5, NOW + 19, "scheduled"))
        self.assertIsNone(q.dequeue("w", now=NOW + 11))
        q.enqueue("t", 3, key="k", on_conflict="replace", now=NOW + 11)
        self.assertEqual((q.get(first).payload, q.get(first).state, q.get(first).created_at), (3, "pending", NOW))
        job = q.dequeue("w", now=NOW + 11)
        kept = q.enqueue("t", 4, key="k", on_conflict="replace", now=NOW + 12)
        self.assertEqual((kept, kept.is_new, q.get(first).payload), (first, False, 3))
        q.complete(job, now=NOW + 12)
        new = q.enqueue("t", 5, key="k", on_conflict="replace", now=NOW + 12)
        self.assertTrue(new.is_new)

    def test_job_is_changed_in_what_is_given(self):
        q = self.queue
        job_id = q.enqueue("t", {"a": 1}, priority=3, key="k", now=NOW)
        before = q.get(job_id)
        q.change(job_id, payload=None, by="ann", now=NOW)
        self.assertEqual(q.get(job_id), before._replace(payload=None))
        later = datetime.fromtimestamp(NOW + 50, timezone.utc)
        q.change(job_id, payload=[2], priority=-1, run_at=later, queue="new", max_attempts=9, by="ann", now=NOW)
        changed = {"payload": [2], "priority": -1, "run_at": NOW + 50, "queue": "new", "max_attempts": 9}
        self.assertEqual(q.get(job_id), before._replace(**changed, state="scheduled"))
        events = [(event["event"], event["actor"]) for event in q.history(job_id)]
        self.assertEqual(
            events, [("changed payload", "ann"), ("changed payload, priority, time, queue, max_attempts", "ann")]
        )
        self.assertIsNone(q.dequeue("w", now=NOW))
        q.run_now(job_id, by="ann", now=NOW + 1)
        self.assertEqual((q.get(job_id).run_at, q.history(job_id)[-1]["event"]), (NOW + 1, "run now"))
        self.assertEqual(q.dequeue("w", queues=["new"], tasks=["t"], now=NOW + 1).payload, [2])

    def test_change_keeps_the_rules_of_the_new_queue(self):
        q = self.queue
        here, there = q.enqueue("t", key="k", now=NOW), q.enqueue("t", key="k", queue="b", now=NOW)
        with self.assertRaisesRegex(InvalidTransition, "^cannot change job 1: another job has its key 'k'$"):
            q.change(here, queue="b", now=NOW)
        q.change(here, queue="default", priority=1, now=NOW)  # where it is
        for options in ({"key": "other"}, {"task": "u", "key": "k"}):
            q.enqueue(**{"task": "t", **options}, queue="apart", now=NOW)
        q.change(here, queue="apart", now=NOW)
        q.change(here, queue="default", now=NOW)
        q.cancel(there, now=NOW)
        q.enqueue("t", key="k", key_seconds=60, queue="b", now=NOW)
        with self.assertRaisesRegex(InvalidTransition, "another job has its key 'k'"):
            q.change(here, queue="b", now=NOW + 59)
        q.limit("b", 2)
        q.change(here, queue="b", now=NOW + 60)
        self.assertEqual(q.enqueue("t", key="k", queue="b", now=NOW + 60), here)
        self.assertTrue(q.enqueue("t", key="k", now=NOW + 60).is_new)
        q.limit("full", 1)
        q.enqueue("t", queue="full")
        with self.assertRaisesRegex(pqueue.QueueFull, "^cannot move job 1: queue 'full' is at its limit"):
            q.change(here, queue="full")
        self.assertEqual(q.get(here).queue, "b")
        q.limit("b", 9)
        q.change(here, queue="c")
        self.assertEqual([problem for problem in q.check()["problems"] if "count" in problem], [])

    def test_change_leaves_the_job_an_attempt(self):
        q = self.queue
        job_id = q.enqueue("t", max_attempts=3, now=NOW)
        q.fail(q.dequeue("w", now=NOW), "no", now=NOW)
        with self.assertRaisesRegex(ValueError, "^expected max_attempts above 1, which job 1 has had, got 1$"):
            q.change(job_id, max_attempts=1)
        q.change(job_id, max_attempts=2)
        self.assertEqual((q.get(job_id).max_attempts, q.get(job_id).state), (2, "scheduled"))

    def test_operator_acts_on_all_jobs_that_match(self):
        q = self.queue
        with mock.patch("pqueue_operating.BATCH", 3):
            ids = q.enqueue_many("a", range(8), now=NOW) + q.enqueue_many("b", range(2), now=NOW)
            running = q.dequeue("w", now=NOW)
            done = q.cancel_where(task="a", by="ann", now=NOW)
            self.assertEqual((done, done.refused, q.stats()["states"]["cancelled"]), (8, 0, 8))
            self.assertEqual([event["actor"] for event in q.history(ids[3])], ["ann"])
            self.assertFalse(q.holds(running))
            done = q.resubmit_where(ids=ids[5:], now=NOW)
            self.assertEqual((done, done.refused), (3, 2))
            self.assertEqual(q.mark_failed_where("no", task="b", state="pending", now=NOW), 2)
            self.assertEqual({job.error for job in q.list_jobs(task="b")}, {"no"})
            q.enqueue_many("c", range(5), delay_seconds=50, queue="later", now=NOW)
            self.assertEqual(q.run_now_where(queue="later", created_from=NOW, now=NOW), 5)
            q.dequeue("w", queues=["later"], now=NOW)
            done = q.delete_where(queue="later")
            self.assertEqual((done, done.refused, q.count_jobs()), (4, 1, 11))
            q.enqueue("d", delay_seconds=50, queue="later", now=NOW)
            q.enqueue("d", queue="later", now=NOW)
            self.assertEqual((q.clear("later", by="ann"), q.clear("later"), q.clear("unknown")), (2, 0, 0))
            self.assertEqual([each["jobs"] for each in q.operations() if each["actor"] == "ann"], [8, 2])
            self.assertEqual(q.stats()["queues"]["later"]["processing"], 1)

    def test_verb_for_all_that_match_acts_in_the_order_of_dependencies(self):
        """Also if a job and one that runs after it are not in the same transaction."""
        q = self.queue
        for batch in (1, 2, 500):
            with self.subTest(batch=batch), mock.patch("pqueue_operating.BATCH", batch):
                q.delete_jobs()
                q.on_failed("default", "h")
                first = q.enqueue("t", now=NOW)
                ids = [first, *q.enqueue_many("t", [1, 2], after=[first], now=NOW)]
                ids.append(q.enqueue("t", after=ids, now=NOW))
                done = q.cancel_where(task="t", now=NOW)
                self.assertEqual((done, done.refused, self.states(*ids)), (4, 0, ["cancelled"] * 4))
                self.assertEqual(q.count_jobs(), 4)  # none failed with another, so that its handler would get a job
                q.on_failed("default", None)
                q.delete_jobs(ids[1:])
                ids[1:] = [q.enqueue("t", after=[first], now=NOW)]
                self.assertEqual(self.states(*ids), ["cancelled", "failed"])
                q.resubmit_where(task="t", now=NOW)
                self.assertEqual(self.states(*ids), ["pending", "waiting"])
                self.assertEqual(q.mark_failed_where("no", task="t", now=NOW), 2)
                self.assertEqual({job.error for job in q.list_jobs()}, {"no"})
                q.resubmit_where(task="t", now=NOW)
                last = q.enqueue("t", after=ids, now=NOW)
                q.enqueue("other", after=[last], now=NOW)
                done = q.delete_where(task="t")
                self.assertEqual((done, done.refused), (0, 3))
                done = q.delete_where(queue="default")
                self.assertEqual((done, done.refused, q.count_jobs()), (4, 0, 0))

    def test_jobs_that_failed_with_another_are_resubmitted_with_it(self):
        q = self.queue
        first = q.enqueue("t", now=NOW)
        child = q.enqueue("t", after=[first], now=NOW)
        last = q.enqueue("t", after=[child], now=NOW)
        key = q.enqueue("u", key="k", now=NOW)
        ids = [last, first, child, first]
        q.cancel(first, now=NOW)
        self.assertEqual(q.act_on(ids, q.resubmit, parents_first=True), [])
        self.assertEqual(self.states(first, child, last), ["pending", "waiting", "waiting"])
        self.assertEqual(len(q.act_on(ids, q.resubmit, parents_first=True)), 3)  # they were not finished before
        q.cancel(first, now=NOW)
        done = q.resubmit_where(task="t", now=NOW)
        self.assertEqual((done, done.refused), (3, 0))
        q.cancel(key, now=NOW)
        q.enqueue("u", key="k", now=NOW)
        errors = q.act_on([key, 12345], q.resubmit, parents_first=True)
        self.assertEqual([type(error) for error in errors], [pqueue.InvalidTransition, pqueue.JobNotFound])
        for job_ids in (5, "5", [[]], [-1]):
            with self.subTest(job_ids), self.assertRaisesRegex(ValueError, "job id"):
                q.act_on(job_ids, q.resubmit)

    def test_verb_for_all_that_match_needs_a_filter(self):
        q = self.queue
        q.enqueue("t")
        for verb in (q.resubmit_where, q.run_now_where, q.mark_failed_where, q.cancel_where, q.delete_where):
            for filters in ({}, {"queue": None}, {"shown": lambda job: job}):
                with self.subTest(verb.__name__, **filters), self.assertRaisesRegex(ValueError, "expected a filter"):
                    verb(**filters)
            with self.assertRaisesRegex(TypeError, "expected the filters state, queue, .*, got status"):
                verb(status="failed", queue="default")
        self.assertEqual(q.count_jobs(state="pending"), 1)

    def test_peek_shows_what_is_delivered_next(self):
        q = self.queue
        for number in range(12):
            options = {"queue": "ab"[number % 2], "priority": number % 3, "assigned_to": "w" if number == 7 else None}
            q.enqueue("tu"[number % 4 // 2], number, delay_seconds=5 * (number % 5 == 0), now=NOW, **options)
        q.enqueue("t", delay_seconds=500, priority=9, now=NOW)
        for delay in (0, 1):
            q.enqueue("t", queue="paused", priority=9, delay_seconds=delay, now=NOW)
        q.pause("paused")
        self.assertEqual(len(q.peek(99, now=NOW)), 8)  # three are due later, one is for a consumer
        for options in ({}, {"queues": ["a"]}, {"tasks": ["u"]}, {"queues": ["b"], "tasks": ["t"]}):
            with self.subTest(**options):
                now = NOW + 5
                seen = [job.id for job in q.peek(99, consumer="w", now=now, **options)]
                self.assertEqual([job.id for job in q.peek(2, consumer="w", now=now, **options)], seen[:2])
                jobs = list(iter(lambda: q.dequeue("w", now=NOW + 5, **options), None))  # noqa: B023
                self.assertEqual([job.id for job in jobs], seen)
                self.assertTrue(seen)
                for job in jobs:
                    q.release(job, now=NOW + 5)
        self.assertNotIn(7, [job.payload for job in q.peek(99, now=NOW + 5)])

    def test_many_jobs_have_a_key_each(self):
        q = self.queue
        there = q.enqueue("t", 0, key="b", now=NOW)
        ids = q.enqueue_many("t", [1, 2, 3, 4], keys=["a", "b", "c", "a"], now=NOW)
        self.assertEqual([each.is_new for each in ids], [True, False, True, False])
        self.assertEqual((ids[1], ids[3]), (there, ids[0]))
        self.assertEqual([q.get(each).payload for each in ids], [1, 0, 3, 1])
        q.enqueue_many("t", [5, 6], keys=["a", "a"], on_conflict="replace", now=NOW)
        self.assertEqual(q.get(ids[0]).payload, 6)
        q.limit("default", 4)
        with self.assertRaises(pqueue.QueueFull):
            q.enqueue_many("t", [1, 2, 3], keys=["d", "e", "a"], now=NOW)
        self.assertEqual((q.stats()["states"]["pending"], q.enqueue_many("t", [], keys=[])), (3, []))
        self.assertEqual([each.is_new for each in q.enqueue_many("t", [1, 2], keys=["d", "a"])], [True, False])

    def test_enqueued_job_has_the_attempts_of_its_task_from_the_first_delivery_on(self):
        q = self.queue
        with mock.patch.dict(pqueue.TASKS, clear=True):
            odd = 'a"b\\c ü %'
            ids = q.enqueue_many("once", [1, 2]) + [q.enqueue(each) for each in (odd, "unknown")]
            ids.append(q.enqueue("once", max_attempts=7))
            self.assertEqual([q.get(each).max_attempts for each in ids], [None] * 4 + [7])
            for name, most in (("once", 1), (odd, 99)):
                pqueue.task(name, max_attempts=most)(take)
            first, second = q.dequeue("w"), q.dequeue_many("w", 9)
            self.assertEqual((first.max_attempts, [job.max_attempts for job in second]), (1, [1]))
            self.assertEqual(
                {job.task: job.max_attempts for job in q.dequeue_many("w", 9)}, {odd: 99, "unknown": 3, "once": 7}
            )
            pqueue.TASKS.clear()
            self.assertEqual([q.get(each).max_attempts for each in ids], [1, 1, 99, 3, 7])
            self.assertEqual(q.fail(first, "no"), "failed")

    def test_call_of_a_task_is_stored_as_a_job(self):
        with mock.patch.dict(pqueue.TASKS, clear=True):
            resize = pqueue.task(max_attempts=7)(resized).on(self.queue)
            job_id = resize.enqueue("a.png", width=100)
            job = self.queue.get(job_id)
            self.assertEqual(
                (job.task, job.payload, job.queue), ("resized", {"path": "a.png", "width": 100}, "default")
            )
            self.assertEqual(
                self.queue.get(self.queue.enqueue("resized", {"path": "b"})).max_attempts, job.max_attempts
            )
            self.assertEqual(pqueue.run_task(self.queue, self.queue.dequeue("w")), {"a.png": 100})
            self.assertEqual(pqueue.run_task(self.queue, self.queue.dequeue("w")), {"b": 200})
            with self.assertRaisesRegex(TypeError, r"^resized\(\) missing a required argument: 'path'$"):
                resize.enqueue(width=5)
            self.assertEqual(resize.enqueue_many([]), [])
            many = resize.enqueue_many([("c",), {"path": "d", "width": 5}])
            self.assertEqual(
                [self.queue.get(each).payload for each in many], [{"path": "c"}, {"path": "d", "width": 5}]
            )
            for broken in ((), "e", {"paht": "e"}):
                with self.assertRaisesRegex(TypeError, "^resized|^expected a tuple or a dict"):
                    resize.enqueue_many([("c",), broken])
            with self.assertRaisesRegex(ValueError, "^expected keys, one for each job"):
                resize.using(key="k").enqueue_many([("c",)])
            self.assertEqual(self.queue.count_jobs(), 4)

    def test_call_of_a_task_takes_the_options_of_enqueue(self):
        with mock.patch.dict(pqueue.TASKS, clear=True):
            resize = pqueue.task(resized)
            options = {
                "queue": "images",
                "priority": 5,
                "run_at": 5.0,
                "key": "k",
                "max_attempts": 2,
                "assigned_to": "w",
            }
            later = resize.using(delay_seconds=60).on(self.queue)
            call = resize.using(**options).on(self.queue)
            first, again = call.enqueue("a"), call.enqueue("b")
            self.assertEqual((first, first.is_new, again.is_new), (again, True, False))
            job = self.queue.get(first)
            self.assertEqual({name: getattr(job, name) for name in options}, options)
            self.assertEqual(self.queue.get(later.enqueue("a")).state, "scheduled")
            self.assertEqual(self.queue.get(later.using(delay_seconds=0, priority=0).enqueue("a")).state, "pending")
            self.assertEqual(self.queue.get(resize.on(self.queue).enqueue("a")).state, "pending")  # unchanged
            for broken in ({"priority": "5"}, {"queue": ""}, {"max_attempts": 0}, {"run_at": 5.0}):
                with self.assertRaisesRegex(ValueError, "^expected"):
                    later.using(**broken).enqueue("a")

    def with_metadata(self, *functions):
        """Register these functions during a test."""
        patch = mock.patch.dict(pqueue_tasks._METADATA, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        for function in functions:
            pqueue.metadata(function)

    def test_job_has_the_metadata_of_its_producer(self):
        self.assertIsNone(self.queue.get(self.queue.enqueue("t")).meta)
        calls = iter(range(9))

        def trace():
            return {"trace": next(calls), "who": "Ada"}

        def who():
            return {"who": "Bob"}

        self.with_metadata(trace, who)
        self.assertEqual(self.queue.get(self.queue.enqueue("t")).meta, {"trace": 0, "who": "Bob"})
        ids = self.queue.enqueue_many("t", [1, 2])
        self.assertEqual([self.queue.get(each).meta for each in ids], [{"trace": 1, "who": "Bob"}] * 2)
        self.assertEqual(self.queue.list_jobs(excerpt=1)[0].meta, {"trace": 1, "who": "Bob"})

    def test_job_keeps_its_metadata_through_its_life(self):
        self.with_metadata(lambda: {"trace": "7"})
        job_id = self.queue.enqueue("t", max_attempts=1, now=NOW)
        job = self.queue.dequeue("worker", now=NOW)
        self.queue.fail(job, "no", now=NOW)
        self.queue.resubmit(job_id, now=NOW)
        (again,) = self.queue.dequeue_many("worker", 5, now=NOW)
        self.assertEqual((job.meta, again.meta), ({"trace": "7"}, {"trace": "7"}))
        target = self.target()
        self.queue.copy_to(target)
        self.assertEqual(target.get(job_id).meta, {"trace": "7"})

    def test_follow_up_job_inherits_the_metadata_of_the_job_that_enqueues_it(self):
        self.with_metadata(lambda: {"trace": "7", "step": 1})
        self.queue.enqueue("parent")
        self.with_metadata(lambda: {"step": 2})
        with mock.patch.dict(pqueue.TASKS, clear=True):
            pqueue.task("parent")(lambda job: pqueue.current_queue().enqueue("child"))
            child = pqueue.run_task(self.queue, self.queue.dequeue("worker"))
        self.assertEqual(self.queue.get(child).meta, {"trace": "7", "step": 2})

    def test_metadata_that_cannot_be_stored_is_refused(self):
        for value, reason in (({"at": {1}}, "expected a meta that JSON can hold"), ({1: 2}, "keys are all strings")):
            self.with_metadata(lambda value=value: value)
            with self.assertRaisesRegex(ValueError, reason):
                self.queue.enqueue("t")
        self.with_metadata(lambda: 1 / 0)
        with self.assertRaises(ZeroDivisionError):
            self.queue.enqueue("t")
        for value in (None, [("a", 1)], "a"):
            self.with_metadata(lambda value=value: value)
            with self.assertRaisesRegex(ValueError, "expected a dict from .*lambda.*, marked @metadata, got"):
                self.queue.enqueue("t")
        for wrong in (5, lambda job: {}):
            with self.assertRaisesRegex(ValueError, "expected a function that takes no arguments, got"):
                pqueue.metadata(wrong)
        self.assertEqual(self.queue.count_jobs(), 0)

    def test_caller_that_gives_a_name_or_a_number_for_an_object_is_told_what_to_give(self):
        @pqueue.task(name="mail")
        def mail(to: str = "ada") -> None: ...

        self.addCleanup(pqueue.TASKS.pop, "mail")
        for wrong in ("mail", None, mail):
            with self.assertRaisesRegex(ValueError, "expected a queue from open_queue, got .*using.queue=…"):
                mail.on(wrong)
        for wrong in (5, None, "ada"):
            with self.assertRaisesRegex(ValueError, "expected a list of calls, got"):
                mail.on(self.queue).enqueue_many(wrong)

    def test_durations_may_be_timedeltas(self):
        minute = timedelta(minutes=1)
        self.queue.enqueue("t", delay_seconds=minute, now=NOW)
        job = self.queue.dequeue("worker", lease_seconds=minute, now=NOW + 60)
        self.assertEqual((job.run_at, job.lease_expires_at), (NOW + 60, NOW + 120))
        self.queue.extend(job, minute, now=NOW + 70)
        self.assertEqual(self.queue.get(job.id).lease_expires_at, NOW + 130)
        self.queue.fail(job, "no", retry_in_seconds=minute, now=NOW + 70)
        self.assertEqual(self.queue.get(job.id).run_at, NOW + 130)
        self.assertFalse(self.queue.wait(timedelta(0), consumer="worker", now=NOW))

    def test_call_within_a_task_is_stored_in_its_queue_and_transaction(self):
        with mock.patch.dict(pqueue.TASKS, clear=True):
            resize = pqueue.task(resized)

            @pqueue.task
            def caller(fails: bool):
                with pqueue.current_queue().transaction():
                    ids.append(resize.enqueue("a"))
                    ids.extend(resize.using(queue="other").enqueue_many([("b",)]))
                    if fails:
                        raise ValueError

            ids = []
            caller.on(self.queue).enqueue(fails=True)
            with self.assertRaises(ValueError):
                pqueue.run_task(self.queue, self.queue.dequeue("w"))
            self.assertEqual((len(ids), self.queue.count_jobs()), (2, 1))
            caller.on(self.queue).enqueue(fails=False)
            pqueue.run_task(self.queue, self.queue.dequeue("w"))
            self.assertEqual([self.queue.get(each).queue for each in ids[2:]], ["default", "other"])

    def test_jobs_run_in_the_process_of_a_test(self):
        from pqueue_tools import testing

        with mock.patch.dict(pqueue.TASKS, clear=True):
            resize = pqueue.task(resized)
            resize.on(self.queue).enqueue("a")
            resize.using(run_at=NOW).on(self.queue).enqueue("b")
            self.assertEqual([job.result for job in testing.drain(self.queue)], [{"a": 200}])
            self.assertEqual([job.result for job in testing.drain(self.queue, now=NOW)], [{"b": 200}])
            with testing.inline(self.queue), self.queue.transaction():
                resize.on(self.queue).enqueue("c")
                self.assertEqual(testing.enqueued(self.queue, resize)[-1].state, "pending")
            self.assertEqual([job.state for job in testing.enqueued(self.queue, resize)], ["completed"] * 3)

    def test_key_holds_within_its_queue_only(self):
        first, other, again, other_again = (self.queue.enqueue("t", key="k", queue=name) for name in "abab")
        self.assertNotEqual(first, other)
        self.assertEqual((again, other_again), (first, other))

    def test_resubmit_needs_its_own_key_in_its_own_queue_only(self):
        first = self.queue.enqueue("t", key="k")
        second = self.queue.enqueue("t", key="l")
        self.assertEqual([self.queue.enqueue("t", key=key) for key in "lk"], [second, first])
        self.queue.cancel(first)
        self.queue.enqueue("t", key="k", queue="other")
        self.queue.resubmit(first)
        self.assertEqual(self.queue.get(first).state, "pending")

    def test_payload_that_could_not_be_read_back_is_refused(self):
        deep = []
        for _ in range(500):
            deep = [deep]
        with self.assertRaisesRegex(ValueError, "nested at most 100 deep"):
            self.queue.enqueue("t", deep)
        shallow = "[" * 5000
        self.queue.enqueue("t", shallow, now=NOW)
        self.assertEqual(self.queue.dequeue("w", now=NOW).payload, shallow)

    def test_consumer_that_closes_returns_its_jobs_uncounted(self):
        self.queue.enqueue_many("t", range(2), max_attempts=2)
        for _ in range(3):
            queue = self.reopen()
            self.assertEqual([job.attempts for job in queue.dequeue_many("embedded", 2)], [1, 1])
            queue.close()
            self.assertEqual([(job.state, job.attempts) for job in self.queue.list_jobs()], [("pending", 0)] * 2)
        self.assertEqual([each["event"] for each in self.queue.history(1)], ["released"] * 3)
        self.assertEqual({each["state"] for each in self.queue.consumers()}, {"stopped"})

    def test_queue_in_a_with_statement_is_closed_at_its_end(self):
        self.queue.enqueue("t", now=NOW)
        with self.open() as queue:
            job = queue.dequeue("w", now=NOW)
        self.assertEqual(self.queue.get(job.id).state, "pending")
        with self.assertRaises(ZeroDivisionError), self.open() as queue:
            queue.dequeue("w", now=NOW)
            raise ZeroDivisionError
        self.assertEqual(self.queue.get(job.id).state, "pending")
        with self.open() as queue:
            queue.get(job.id)
            queue.close()
        with self.application() as connection:
            for use in (
                lambda: queue.get(job.id),
                lambda: queue.enqueue("t"),
                lambda: queue.dequeue("w"),
                lambda: queue.transaction().__enter__(),
                lambda: queue.join(connection).__enter__(),
            ):
                with self.assertRaisesRegex(QueueError, "this queue object is closed"):
                    use()

    def test_consumer_that_leaves_returns_its_jobs_and_may_come_back(self):
        self.queue.enqueue("t", now=NOW)
        for _ in range(2):
            job = self.queue.dequeue("w", now=NOW)
            self.assertEqual(job.attempts, 1)
            self.queue.leave("w")
            self.assertEqual(self.queue.get(job.id).state, "pending")
        self.queue.leave("w")
        self.queue.leave("never seen")
        with self.assertRaises(LeaseLost):
            self.queue.complete(job, now=NOW)

    def test_consumer_under_too_many_names_is_refused_until_some_leave(self):
        with mock.patch("pqueue.MAX_CONSUMERS", 3):
            for number in range(9):
                self.queue.dequeue(f"request {number}")
                self.queue.leave(f"request {number}")
            for number in range(3):
                self.queue.dequeue(f"request {number}")
            with self.assertRaisesRegex(QueueError, "cannot register consumer 'one more': this object has 3.*leave"):
                self.queue.dequeue("one more")

    def test_job_with_one_attempt_is_claimed_alone(self):
        self.queue.enqueue("t", now=NOW)
        self.queue.enqueue_many("t", range(2), max_attempts=1, now=NOW)
        self.queue.enqueue("t", now=NOW)
        first = self.queue.dequeue("w", now=NOW)
        taken, _ = self.queue.complete_and_dequeue([(first, None)], "w", 9, now=NOW)
        claims = [[first], taken, *(self.queue.dequeue_many("w", 9, now=NOW) for _ in range(2))]
        self.assertEqual([[job.id for job in jobs] for jobs in claims], [[1], [2], [3], [4]])

    def test_payload_or_result_whose_keys_are_no_strings_is_refused(self):
        self.queue.enqueue("t", now=NOW)
        job = self.queue.dequeue("w", now=NOW)
        for value in ({1: "int", "1": "str"}, {None: 0}, {"a": [{True: 0}]}, [({2.5: 0},)]):
            calls = (
                lambda v=value: self.queue.enqueue("t", v),
                lambda v=value: self.queue.enqueue_many("t", ["a", v]),
                lambda v=value: self.queue.complete(job, v),
                lambda v=value: self.queue.update(job, result=v),
                lambda v=value: self.queue.complete_and_dequeue([(job, v)], "w"),
            )
            for call in calls:
                with (
                    self.subTest(value=value),
                    self.assertRaisesRegex(ValueError, "whose keys are all strings, got the"),
                ):
                    call()
        self.assertEqual(self.queue.count_jobs(), 1)

    def test_queue_with_a_limit_counts_its_pending_jobs_after_every_verb(self):
        q = self.queue
        q.limit("default", 4)

        def fill():
            """Enqueue until the queue is full; return how many it took."""
            taken = 0
            with suppress(QueueFull):
                while taken < 9:
                    q.enqueue("t", now=NOW)
                    taken += 1
            return taken

        self.assertEqual(fill(), 4)
        a, b, c, d = q.dequeue_many("w", 4, now=NOW)
        self.assertEqual(fill(), 4)  # a claim makes room
        q.release(a, now=NOW)
        self.assertEqual((fill(), q.count_jobs(state="pending")), (0, 5))  # a release needs none
        q.cancel(a.id, now=NOW)
        q.mark_failed(5, now=NOW)
        self.assertEqual(fill(), 1)  # four were pending after the cancel
        q.fail(b, "again", retry_in_seconds=1, now=NOW)
        q.assign(6, "w", now=NOW)
        self.assertEqual(fill(), 1)
        q.assign(6, None, now=NOW)
        self.assertEqual((fill(), q.count_jobs(state="pending")), (0, 5))
        q.delete_jobs([6, 7, 8])
        self.assertEqual(fill(), 2)
        q.dequeue_many("w", 0, now=NOW + 1)  # promotes b
        self.assertEqual(q.count_jobs(state="pending"), 5)
        q.complete(c, now=NOW)
        with self.assertRaisesRegex(QueueFull, f"cannot resubmit job {c.id}: queue 'default' is at its limit of 4"):
            q.resubmit(c.id, now=NOW)
        q.delete_jobs([b.id, 9])
        q.resubmit(c.id, now=NOW)
        self.assertEqual((fill(), q.count_jobs(state="pending")), (0, 4))
        q.dequeue_many("other", 0, now=NOW + 100)  # takes d back
        self.assertEqual((q.get(d.id).state, fill()), ("pending", 0))
        q.limit("default", 6)
        self.assertEqual(fill(), 1)
        q.delete_jobs()
        self.assertEqual(fill(), 6)
        q.limit("default", None)
        self.assertEqual(fill(), 9)

    def test_limit_applies_to_its_queue_only(self):
        def fill(queue):
            """Enqueue until the queue is full; return how many it took."""
            for taken in range(9):
                with suppress(QueueFull):
                    self.queue.enqueue("t", queue=queue)
                    continue
                with self.assertRaises(QueueFull):
                    self.queue.enqueue_many("t", [1], queue=queue)
                return taken
            return None

        self.queue.enqueue("t", queue="free")
        self.queue.enqueue("t", queue="tight", assigned_to="w")
        self.queue.enqueue_many("t", range(2), queue="wide")
        taken = self.queue.dequeue_many("v", 2, queues=["wide"])
        self.queue.limit("tight", 2)
        self.queue.limit("wide", 4)
        self.queue.release(taken[0])
        self.assertEqual(fill("tight"), 2)
        self.assertEqual(fill("wide"), 3)
        self.queue.limit("tight", 3)
        self.queue.release(taken[1])
        self.assertEqual((fill("tight"), fill("wide")), (1, 0))
        some = self.queue.list_jobs(queue="tight", state="pending")[0].id
        self.queue.cancel(some)
        self.queue.resubmit(some)
        self.assertIsNone(fill("free"))
        finished = self.queue.enqueue("t", queue="free")
        self.queue.cancel(finished)
        self.queue.resubmit(finished)
        self.assertEqual(self.queue.check()["problems"], [])

    def test_transaction_that_fails_leaves_the_count_of_a_limit_as_it_was(self):
        self.queue.limit("default", 2)
        self.queue.enqueue("t")
        with suppress(ZeroDivisionError), self.queue.transaction():
            self.queue.enqueue("t")
            with suppress(QueueError), self.queue.transaction():
                self.queue.enqueue("t")
            raise ZeroDivisionError
        self.queue.enqueue("t")
        with self.assertRaises(QueueFull):
            self.queue.enqueue("t")

    def test_batch_that_can_never_fit_is_a_mistake(self):
        self.queue.limit("default", 3)
        with self.assertRaisesRegex(ValueError, "expected at most 3 jobs, the limit of queue 'default', got 4 at once"):
            self.queue.enqueue_many("t", range(4))
        with self.queue.transaction(), self.assertRaisesRegex(ValueError, "expected at most 3 jobs"):
            self.queue.enqueue_many("t", range(4))
        self.queue.enqueue("t")
        with self.assertRaisesRegex(QueueFull, "no room for 3 jobs within its limit of 3"):
            self.queue.enqueue_many("t", range(3))
        self.assertEqual(self.queue.count_jobs(), 1)

    def target(self):
        """Return an empty queue elsewhere."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        target = pqueue.PersistentQSQLite(Path(folder.name) / "target.db")
        self.addCleanup(target.close)
        return target

    def test_copy_has_each_queue_job_and_event(self):
        for state in ("completed", "failed", "cancelled", "scheduled", "processing", "pending"):
            self.in_state(state)
        self.queue.enqueue("t", {"a": ["ü", 1.5]}, queue="b", key="k", priority=3, assigned_to="w")
        self.queue.pause("b")
        target, progress = self.target(), []
        copied = self.queue.copy_to(target, progress.append)
        self.assertEqual(
            copied, {"queues": 2, "jobs": 7, "history": 3, "schedules": 0, "handlers": 0, "dependencies": 0}
        )
        self.assertEqual((progress, sum(copied.values())), (sorted(progress), progress[-1]))
        self.assertEqual(target.list_jobs(), self.queue.list_jobs())
        self.assertEqual(target.stats(), self.queue.stats())
        for job in self.queue.list_jobs():
            self.assertEqual(target.history(job.id), self.queue.history(job.id))
        self.assertEqual(target.enqueue("t"), 8)
        with self.assertRaisesRegex(QueueError, "cannot copy: expected a target without jobs"):
            self.queue.copy_to(target)

    def test_moved_queue_continues_in_its_target(self):
        queue, target = self.queue, self.target()
        queue.pause("held")
        queue.enqueue("t", queue="held")
        queue.enqueue("t")
        running = queue.dequeue("w")
        for _ in range(2):  # until nothing runs
            self.assertEqual(queue.begin_move(target.name, by="ann"), 1)
        self.assertEqual(queue.move_status()["event"], "moving")
        self.assertIsNone(queue.move_to(target))
        queue.enqueue("new", queue="new")
        self.assertIsNone(queue.dequeue("w"))
        queue.complete(running)
        self.assertEqual(
            queue.move_to(target),
            {"queues": 3, "jobs": 3, "history": 2, "schedules": 0, "handlers": 0, "dependencies": 0},
        )
        self.assertEqual((queue.move_status()["event"], queue.move_status()["to"]), ("moved", target.name))
        self.assertTrue(queue.has_moved_to(target))
        self.assertIsNone(target.move_status())
        for key in "lk":
            queue.enqueue("late", {"key": key}, key=key)
        queue.mark_failed(queue.enqueue("gone"), "by hand")
        target.enqueue("late", queue="default", key="k")
        target.enqueue("t", queue="another")
        self.assertEqual(queue.finish_move(target), {"carried": 2, "known": 1, "deleted": 6})
        self.assertEqual(queue.finish_move(target), {"carried": 0, "known": 0, "deleted": 0})
        tasks = [job.task for job in target.dequeue_many("w", 9)]
        self.assertEqual(sorted(tasks), ["late", "late", "new", "t"])
        (gone,) = target.list_jobs(task="gone")
        self.assertEqual([event["error"] for event in target.history(gone.id)], ["by hand"])
        self.assertEqual({name for name, each in target.stats()["queues"].items() if each["paused"]}, {"held"})
        target.begin_move("elsewhere")
        self.assertTrue(queue.has_moved_to(target))
        target.cancel_move()
        self.assertTrue(queue.has_moved_to(target))

    def fill_with_finished_jobs(self, number):
        ids = self.queue.enqueue_many("t", range(number))
        for job_id in ids:
            (self.queue.cancel if job_id % 3 else self.queue.mark_failed)(job_id)
        return ids

    def test_move_after_a_partial_copy_brings_what_is_here_now(self):
        queue, target = self.queue, self.target()
        with mock.patch("pqueue_move.FINISHED_JOBS", pqueue_move.FINISHED_JOBS.replace("LIMIT 1000", "LIMIT 3")):
            self.fill_with_finished_jobs(20)
            queue.enqueue_many("t", range(3), queue="pending")
            progress = []
            self.assertEqual(queue.copy_finished_to(target, progress.append), 20)
        self.assertEqual(progress, [3, 6, 9, 12, 15, 18, 20])
        self.assertEqual((target.count_jobs(), target.is_partial_copy(), queue.is_partial_copy()), (20, True, False))
        self.assertIsNone(target.dequeue("w"))
        for job_id in (1, 2, 3):
            queue.resubmit(job_id)
        queue.complete(queue.dequeue("w", queues=["default"]))
        queue.cancel(2)
        queue.delete_jobs([4, 5, 20])
        queue.complete(queue.dequeue("w", queues=["pending"]))
        late = queue.enqueue("t", queue="late")
        queue.begin_move(target.name)
        copied = queue.move_to(target)
        self.assertEqual(copied["jobs"], queue.count_jobs())
        self.assertEqual(target.list_jobs(), queue.list_jobs())
        for job_id in range(1, 30):
            self.assertEqual(target.history(job_id), queue.history(job_id))
        self.assertFalse(target.is_partial_copy())
        self.assertEqual(target.enqueue("t"), late + 1)
        self.assertEqual([job.queue for job in target.dequeue_many("w", 9)].count("pending"), 2)
        self.assertEqual(queue.finish_move(target)["carried"], 0)

    def test_queue_that_was_moved_delivers_nothing_although_it_was_resumed_during_the_move(self):
        queue, target = self.queue, self.target()
        queue.enqueue("t")
        queue.begin_move(target.name)
        queue.resume("default")
        queue.move_to(target)
        self.assertIsNone(queue.dequeue("w"))
        self.assertEqual(target.dequeue("w").task, "t")

    def test_partial_copy_leaves_keys_that_are_held_for_a_time_to_the_move(self):
        queue, target = self.queue, self.target()
        queue.cancel(queue.enqueue("t", key="k", key_seconds=1000))
        queue.cancel(queue.enqueue("t", key="l"))
        self.assertEqual(queue.copy_finished_to(target), 1)
        queue.begin_move(target.name)
        queue.move_to(target)
        self.assertEqual(target.list_jobs(), queue.list_jobs())
        self.assertEqual(target.enqueue("t", key="k"), 1)

    def test_partial_copy_leaves_what_jobs_wait_for_to_the_move(self):
        queue, target = self.queue, self.target()
        first = queue.enqueue("t")
        queue.enqueue("t", after=[queue.enqueue("t", after=[first])])
        for _ in range(2):
            queue.complete(queue.dequeue("w"))
        self.assertEqual(queue.copy_finished_to(target), 2)
        queue.begin_move(target.name)
        queue.move_to(target)
        read = "SELECT id, job_id, parent_id, after_failed FROM dependencies ORDER BY id"
        self.assertEqual([tuple(row) for row in target._read(read)], [tuple(row) for row in queue._read(read)])
        self.assertEqual(target.list_jobs(), queue.list_jobs())

    def test_partial_copy_is_continued_and_forgotten(self):
        queue, target = self.queue, self.target()
        self.fill_with_finished_jobs(5)
        self.assertEqual(queue.copy_finished_to(target), 5)
        self.fill_with_finished_jobs(2)
        self.assertEqual(queue.copy_finished_to(target), 2)
        with self.assertRaisesRegex(QueueError, "cannot move: the target is this queue itself"):
            queue.copy_finished_to(queue)
        with self.assertRaisesRegex(QueueError, "cannot move: the target is this queue itself"):
            queue.begin_move(queue.name)
        queue.delete_jobs()
        self.assertEqual(queue.copy_to(target)["jobs"], 0)
        self.assertEqual((target.count_jobs(), target.history(1)), (0, []))

    def test_partial_copy_in_which_somebody_enqueues_is_left_alone(self):
        queue, target = self.queue, self.target()
        self.fill_with_finished_jobs(5)
        with mock.patch("pqueue_move.FINISHED_JOBS", pqueue_move.FINISHED_JOBS.replace("LIMIT 1000", "LIMIT 3")):
            with self.assertRaisesRegex(QueueError, "expected a target without jobs"):
                queue.copy_finished_to(target, lambda _: target.enqueue("own"))
        self.assertFalse(target.is_partial_copy())
        target.cancel(4)
        for attempt in (queue.copy_finished_to, queue.copy_to, queue.move_to):
            with self.assertRaisesRegex(QueueError, "expected a target without jobs"):
                attempt(target)
        self.assertEqual([job.task for job in target.list_jobs(state="cancelled")][:1], ["own"])

    def test_queue_that_moved_on_still_knows_what_it_has_of_its_first_place(self):
        first, second, third = self.queue, self.target(), self.target()
        first.enqueue("t")
        for source, target in ((first, second), (second, third)):
            source.begin_move(target.name)
            source.move_to(target)
        self.assertEqual(second.finish_move(third), {"carried": 0, "known": 0, "deleted": 1})
        first.enqueue("late")
        self.assertEqual(first.finish_move(second), {"carried": 1, "known": 0, "deleted": 2})

    def test_move_that_is_given_up_delivers_here_again(self):
        self.queue.pause("held")
        for name in ("default", "held"):
            self.queue.enqueue("t", queue=name)
        self.queue.begin_move("elsewhere")
        self.assertIsNone(self.queue.dequeue("w"))
        self.queue.cancel_move()
        self.assertIsNone(self.queue.move_status())
        self.assertEqual([job.queue for job in self.queue.dequeue_many("w", 9)], ["default"])

    def test_copy_counts_the_pending_jobs_of_limited_queues(self):
        self.queue.limit("default", 3)
        self.queue.enqueue_many("t", range(3))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        target = pqueue.PersistentQSQLite(Path(folder.name) / "copy.db")
        self.addCleanup(target.close)
        self.queue.copy_to(target)
        with self.assertRaises(QueueFull):
            target.enqueue("t")
        target.dequeue("w")
        target.enqueue("t")

    def test_moved_queue_keeps_its_limit(self):
        self.queue.limit("default", 3)
        self.queue.enqueue_many("t", range(3))
        target = self.target()
        self.queue.begin_move(target.name)
        self.queue.move_to(target)
        with self.assertRaises(QueueFull):
            target.enqueue("t")
        target.dequeue("w")
        target.enqueue("t")

    def test_queue_at_its_limit_refuses_all_or_nothing(self):
        self.queue.limit("default", 3)
        self.queue.enqueue_many("t", [1, 2])
        with self.assertRaisesRegex(QueueFull, "limit of 3 pending"):
            self.queue.enqueue_many("t", [3, 4])
        self.queue.enqueue("t", 3, key="k")
        with self.assertRaises(QueueFull):
            self.queue.enqueue("t", 4)
        self.assertEqual(self.queue.enqueue("t", 3, key="k"), 3)
        self.assertEqual(self.queue.stats()["states"]["pending"], 3)
        self.queue.limit("default", None)
        self.queue.enqueue("t", 4)

    def test_queue_is_not_full_because_another_one_is(self):
        for name in ("default", "other"):
            self.queue.limit(name, 3)
        for job_id in self.queue.enqueue_many("t", range(3), queue="other", delay_seconds=60):
            self.queue.run_now(job_id)
        self.queue.enqueue("t")
        self.queue.enqueue("t", key="k")
        with self.queue.transaction():
            self.queue.enqueue("t")
        for name in ("default", "other"):
            with self.assertRaisesRegex(QueueFull, f"queue '{name}' is at its limit of 3 pending jobs"):
                self.queue.enqueue("t", queue=name)

    def test_finished_job_of_a_full_queue_is_not_resubmitted(self):
        finished, _ = self.queue.enqueue_many("t", range(2))
        self.queue.cancel(finished)
        self.queue.limit("default", 1)
        with self.assertRaisesRegex(QueueFull, f"cannot resubmit job {finished}: queue 'default' is at its limit of 1"):
            self.queue.resubmit(finished)

    def test_many_jobs_get_their_ids_in_order(self):
        ids = self.queue.enqueue_many("t", ["a", "b", "c"], priority=2)
        self.assertEqual([self.queue.get(job_id).payload for job_id in ids], ["a", "b", "c"])
        self.assertEqual(self.queue.enqueue_many("t", []), [])

    def test_payload_and_result_come_back_as_json_holds_them(self):
        for value in (None, 0, -1.5, "", "ü\u0000\u2028 🙂", [1, [2]], {"a": {"b": None}}, True):
            with self.subTest(value=value):
                job_id = self.queue.enqueue("t", value, now=NOW)
                job = self.queue.dequeue("w", now=NOW)
                self.assertEqual(job.payload, value)
                self.queue.complete(job, value)
                self.assertEqual(self.queue.get(job_id).result, value)

    def test_verb_refuses_what_is_no_job(self):
        self.taken()
        q = self.queue
        for given in (1, None, "job"):
            for call in (q.complete, q.release, q.extend, q.update, q.holds, q.begin, q.has_begun):
                with self.subTest(given=given, call=call), self.assertRaises(ValueError) as caught:
                    call(given)
                self.assertEqual(str(caught.exception), f"expected a job that was dequeued, got {given!r}")
            for call in (lambda job: q.fail(job, "E"), lambda job: q.fail(job, "E", retry_in_seconds=1)):
                with self.assertRaisesRegex(ValueError, "expected a job that was dequeued"):
                    call(given)
            with self.assertRaisesRegex(ValueError, "expected a job that was dequeued"):
                q.complete_and_dequeue([(given, None)], "w", 0)
        with q.transaction():
            q.enqueue("u", now=NOW)
            with self.assertRaisesRegex(ValueError, "expected a job that was dequeued"):
                q.complete(1)
        states = q.stats()["states"]
        self.assertEqual((states["pending"], states["processing"]), (1, 1))

    def test_wrong_arguments_are_refused_in_one_line_and_nothing_is_stored(self):
        q = self.queue
        job = self.taken()
        bad = [
            (lambda: q.enqueue("t", {1, 2}), "expected a payload that JSON can hold"),
            (lambda: q.enqueue("t", float("nan")), "expected a payload that JSON can hold"),
            (lambda: q.enqueue("t", "\ud800"), "expected a payload that JSON can hold"),
            (lambda: q.enqueue("t", "x" * pqueue.MAX_PAYLOAD_BYTES), "at most 1048576 bytes"),
            (lambda: q.enqueue_many("t", [1, {2}]), "expected a payload"),
            (lambda: q.enqueue(""), "expected a task name"),
            (lambda: q.enqueue(None), "expected a task name"),
            (lambda: q.enqueue("a\nb"), "expected a task name"),
            (lambda: q.enqueue("t", queue="x" * 256), "expected a queue name"),
            (lambda: q.enqueue("t", key=""), "expected a key name"),
            (
                lambda: q.enqueue("t", key="k", key_until="begun"),
                "key_until to be 'finished' or 'started', got 'begun'",
            ),
            (lambda: q.enqueue("t", key="k", key_until="started", key_seconds=1), "key_until or key_seconds, got both"),
            (lambda: q.enqueue("t", key="k", key_seconds=0), "expected key_seconds above 0"),
            (lambda: q.enqueue("t", key="k", key_seconds="1h"), "expected key_seconds to be a finite number"),
            (lambda: q.enqueue("t", key="k", on_conflict="ignore"), "on_conflict to be 'keep' or 'replace'"),
            (lambda: q.enqueue("t", key_seconds=5), "expected a key together with"),
            (lambda: q.enqueue("t", key_until="finished"), "expected a key together with"),
            (lambda: q.enqueue("t", on_conflict="replace"), "expected a key together with"),
            (lambda: q.enqueue_many("t", {"a": 1}), "expected a list of payloads, got {'a': 1}"),
            (lambda: q.enqueue_many("t", [1], key_seconds=5), "expected keys together with"),
            (lambda: q.enqueue_many("t", [1, 2], keys=["a"]), "expected a list of 2 keys, one per payload"),
            (lambda: q.enqueue_many("t", [1, 2], keys="ab"), "expected a list of 2 keys, one per payload"),
            (lambda: q.enqueue_many("t", [1, 2], keys=["a", ""]), "expected a key name"),
            (lambda: q.enqueue("t", run_at=datetime(2026, 1, 1)), "expected run_at with a time zone"),  # noqa: DTZ001
            (
                lambda: q.change(1),
                "expected a change of payload, priority, run_at, queue, group, max_attempts, expires_at, expire_",
            ),
            (lambda: q.change(1, delay_seconds=1, run_at=1), "expected delay_seconds or run_at, got both"),
            (lambda: q.change(1, payload={1: 2}), "expected a payload"),
            (lambda: q.change(1, priority="high"), "expected priority to be a whole number"),
            (lambda: q.change(1, queue=""), "expected a queue name"),
            (lambda: q.change("1", queue="b"), "expected job id"),
            (lambda: q.change(1, priority=1, delay_seconds=""), "expected delay_seconds to be a finite number"),
            (lambda: q.peek(0), "expected limit"),
            (lambda: q.peek(consumer=""), "expected a consumer name"),
            (lambda: q.leave([]), "expected a consumer name"),
            (lambda: q.clear(""), "expected a queue name"),
            (lambda: q.enqueue("t", run_at="tomorrow"), "a finite number .* or a datetime with a time zone, got 'to"),
            (lambda: q.enqueue("t", assigned_to=7), "expected a consumer name"),
            (lambda: q.enqueue("t", priority=1.5), "expected priority to be a whole number"),
            (lambda: q.enqueue("t", max_attempts=0), "expected max_attempts to be a whole number from 1"),
            (lambda: q.enqueue("t", max_attempts=True), "expected max_attempts"),
            (lambda: q.enqueue("t", run_at=float("inf")), "expected run_at to be a finite number"),
            (lambda: q.enqueue("t", delay_seconds="5"), "a finite number of seconds, .*, or a timedelta, got '5'"),
            (lambda: q.dequeue("w", lease_seconds=0), "expected lease_seconds above 0"),
            (lambda: q.dequeue(""), "expected a consumer name"),
            (lambda: q.complete(job, object()), "expected a result that JSON can hold"),
            (lambda: q.update(job, progress=1.5), "expected progress between 0 and 1"),
            (lambda: q.get("5"), "expected job id to be a whole number"),
            (lambda: q.list_jobs(state="done"), "expected a state of waiting, scheduled, pending"),
            (lambda: q.prune(1, states=["pending"]), "expected a state of completed, failed, cancelled"),
            (lambda: q.prune(-5), "expected older_than_seconds to be a duration of 0 or more, got -5"),
            (lambda: q.prune(timedelta(days=-1)), "expected older_than_seconds to be a duration of 0 or more"),
            (lambda: q.heartbeat("w", completed=-1), "expected completed to be a whole number from 0"),
            (lambda: q.heartbeat("w", failed=0.5), "expected failed to be a whole number from 0"),
            (lambda: q.schedule("x" * 247, "t", every_seconds=1), "expected a schedule name of 1 to 246 printable"),
            (lambda: q.enqueue(["x"]), "expected a task name"),
            (lambda: q.dequeue(["x"]), "expected a consumer name"),
            (lambda: q.dequeue_many("w", -1), "expected limit to be a whole number from 0"),
            (lambda: q.dequeue_many("w", "x"), "expected limit to be a whole number from 0"),
            (lambda: q.dequeue("w", queues="default"), "expected a list of queues, got 'default'"),
            (lambda: q.dequeue("w", queues=5), "expected a list of queues, got 5"),
            (lambda: q.dequeue("w", tasks=5), "expected a list of tasks, got 5"),
            (lambda: q.dequeue(job.consumer, queues=[5]), "expected a queue name"),
            (lambda: q.update(job, progress="x"), "expected progress between 0 and 1"),
            (lambda: q.enqueue("t", run_at=10**400), "expected run_at to be a finite number"),
            (lambda: q.enqueue("t", delay_seconds=True), "expected delay_seconds to be a finite number"),
            (lambda: q.enqueue("t", now=float("nan")), "expected now to be a finite number"),
            (lambda: q.enqueue("t", priority=10**5000), "expected priority to be a whole number"),
            (lambda: q.enqueue("t", priority=-(2**31) - 1), "expected priority to be a whole number from -2147483648"),
            (lambda: q.list_jobs(limit=0), "expected limit to be a whole number from 1"),
            (lambda: q.list_jobs(before_id=2**70), "expected before_id to be a whole number"),
            (lambda: q.cancel(job.id, by="\ud800"), "expected an operator name"),
            (lambda: q.limit("default", 0), "expected max_pending to be a whole number from 1"),
            (lambda: q.limit("default"), "expected max_pending, running or rate, got none"),
            (lambda: q.limit("default", running=0), "expected running to be a whole number from 1"),
            (lambda: q.limit("default", running=True), "expected running to be a whole number from 1"),
            (lambda: q.limit("default", rate=5), "expected rate to be .jobs, seconds., such as .10, 1.0., got 5"),
            (lambda: q.limit("default", rate=(0, 1)), "expected the jobs of rate to be a whole number from 1"),
            (lambda: q.limit("default", rate=(1, 0)), "expected the seconds of rate above 0"),
            (lambda: q.enqueue("t", group=""), "expected a group name of 1 to 128 printable characters"),
            (lambda: q.enqueue("t", group="x" * 129), "expected a group name of 1 to 128 printable characters"),
            (lambda: q.enqueue_many("t", [1], group=7), "expected a group name"),
            (lambda: q.change(1, group=""), "expected a group name"),
            (lambda: q.weigh("default", "a", 0), "expected weight between 0.001 and 1000, got 0"),
            (lambda: q.weigh("default", "a", float("nan")), "expected weight between 0.001 and 1000, got nan"),
            (lambda: q.weigh("default", "", 1), "expected a group name"),
            (lambda: q.limits("default", ""), "expected a group name"),
        ]
        before = q.list_jobs()
        for call, message in bad:
            with self.subTest(message=message), self.assertRaisesRegex(ValueError, message) as caught:
                call()
            self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(q.list_jobs(), before)

    def test_number_that_no_database_holds_is_refused_by_every_method(self):
        job, now, faults = self.taken(), self.queue.now(), []
        self.queue.enqueue("t", run_at=now + 60)
        known = {"job": job, "job_id": job.id, "error": "no", "jobs": [], "limit": 1, "payloads": [], "weight": 1}
        known |= {"task": "t", "consumer": "w", "queue": "default", "name": "s", "group": "g", "event": "e"}
        known |= {"finished": [(job, None)], "tasks": [], "filters": pqueue.Filters(task="t"), "names": []}
        known |= {"target": self.queue, "shared": self.queue.share("adopted"), "thread": 1}
        self.queue.schedule("s", "t", every_seconds=60)
        self.queue.heartbeat("w")
        for name, method in inspect.getmembers(type(self.queue), inspect.isfunction):
            parameters = [] if name.startswith("_") else parameters_of(method)
            needed = [each.name for each in parameters if each.default is each.empty]
            for each in parameters:
                kind = str(each.annotation)
                if not re.search(r"^(?!Callable).*\b(int|float)\b", kind) or (name, each.name) == (
                    "search_jobs",
                    "seconds",
                ):
                    continue  # that is only compared with a clock
                for number in (10**400, 10**30, 2**63, -(2**63) - 1, -(10**30), 1e400, float("nan")):
                    values = [(number, 1), (1, number)] if "tuple" in kind else [number]
                    for value in [[number]] if re.search("Sequence|Iterable|list", kind) else values:
                        given = {other: known.get(other, now) for other in needed} | {each.name: value}
                        try:
                            finish(method(self.queue, **given))
                        except REFUSED as error:
                            self.assertNotIn("\n", str(error))
                        except Exception as error:
                            faults.append((name, each.name, str(number)[:30], repr(error)))
        self.assertFalse(faults, "\n".join(map(str, faults)))

    def test_argument_of_another_kind_is_refused_by_every_method_though_nothing_matches(self):
        known: dict[str, object] = {"job_id": 9, "error": "no", "limit": 1, "payloads": [], "weight": 1, "thread": 1}
        known |= {"task": "t", "consumer": "w", "queue": "q", "name": "s", "group": "g", "event": "e", "names": []}
        known |= {"finished": [], "tasks": [], "filters": pqueue.Filters(task="t"), "target": self.queue, "to": "x"}
        known |= {"job": self.taken(), "jobs": [], "shared": self.queue.share("adopted"), "now": self.queue.now()}
        known |= {"job_ids": [], "older_than_seconds": 1, "since": 1.0, "max_attempts": 1, "timeout_seconds": 1}
        more = {"change": {"priority": 1}, "keep": {"completed": 1}, "limit": {"max_pending": 1}}
        more |= {"schedule": {"cron": "@daily"}, "enqueue": {"key": "k"}, "enqueue_many": {"keys": []}}
        internal = r"_|.*move|is_locked_by|search_jobs|reserve_connections|uses_database"
        self.queue.delete_jobs(force=True)
        tried, faults = set(), []
        for name, method in inspect.getmembers(type(self.queue), inspect.isfunction):
            parameters = [] if re.match(internal, name) else parameters_of(method)
            needed = [each.name for each in parameters if each.default is each.empty]
            given = {each: known.get(each) for each in needed} | more.get(name, {})
            if name.endswith("_where"):
                given["task"] = "t"
            for each in parameters:
                if each.name == "every_seconds" or not re.match(
                    r"(str|float|int|Sequence\[|Iterable\[int)(?! \| os)", str(each.annotation)
                ):
                    continue
                tried.add(each.name)
                try:
                    finish(method(self.queue, **{**given, each.name: object()}))
                except ValueError as error:
                    if re.search("^expected [^\n]*got <object object", str(error)):
                        continue
                    faults.append((name, each.name, repr(error)))
                except Exception as error:
                    faults.append((name, each.name, repr(error)))
                else:
                    faults.append((name, each.name, "accepted"))
        self.assertFalse(faults, "\n".join(map(str, faults)))
        self.assertLess({"by", "now", "error", "queue", "queues", "job_ids", "delay_seconds"}, tried)

    def test_long_error_is_cut_and_a_broken_one_is_made_storable(self):
        job = self.taken()
        self.queue.fail(job, "\ud800\0" + "x" * 20_000, retry=False)
        stored = self.queue.get(job.id).error
        self.assertEqual(len(stored.replace("\\ud800", "?").replace("\\x00", "?")), pqueue_values.MAX_ERROR_CHARS)

    # Transactions

    def test_lost_lease_undoes_the_transaction_even_when_it_was_caught_inside(self):
        stale = self.taken()
        self.queue.dequeue("thief", now=NOW + 61)
        with self.assertRaises(LeaseLost), self.queue.transaction():
            self.queue.enqueue("never")
            with suppress(LeaseLost):
                self.queue.complete(stale)
        self.assertEqual(self.queue.list_jobs(task="never"), [])

    def test_new_consumer_cannot_begin_inside_a_transaction_that_may_undo_it(self):
        self.queue.enqueue("t", now=NOW)
        with self.assertRaisesRegex(QueueError, "cannot register consumer 'anna' inside a transaction"):
            with self.queue.transaction():
                self.queue.dequeue("anna", now=NOW)
        self.assertIsNotNone(self.queue.dequeue("anna", now=NOW))
        self.assertEqual([each["name"] for each in self.queue.consumers()], ["anna"])

    def test_guarantee_4_lost_lease_undoes_the_transaction_around_the_fused_call_too(self):
        stale = self.taken()
        self.queue.dequeue("thief", now=NOW + 61)
        with self.assertRaises(LeaseLost), self.queue.transaction():
            self.queue.enqueue("never")
            self.queue.complete_and_dequeue([(stale, None)], "worker", 0, now=NOW + 61)
        self.assertEqual(self.queue.list_jobs(task="never"), [])

    def test_thread_uses_the_database_while_it_is_in_a_transaction(self):
        me = threading.get_ident()
        self.queue.stats()
        with self.queue.transaction():
            self.assertTrue(self.queue.uses_database(me))
            self.assertFalse(self.queue.uses_database(me + 1))
        self.assertFalse(self.queue.uses_database(me))

    def test_nested_transaction_is_a_savepoint_of_the_outer_one(self):
        with self.queue.transaction():
            self.queue.enqueue("outer")
            with suppress(ZeroDivisionError), self.queue.transaction():
                self.queue.enqueue("inner")
                raise ZeroDivisionError
            with self.queue.transaction():
                self.queue.enqueue("inner too")
        self.assertEqual([job.task for job in self.queue.list_jobs()], ["inner too", "outer"])

    def test_transaction_is_invisible_to_others_until_its_end(self):
        other = self.reopen()
        with self.queue.transaction():
            job_id = self.queue.enqueue("t", now=NOW)
            self.assertEqual(other.list_jobs(), [])
        self.assertEqual(other.dequeue("w", now=NOW).id, job_id)

    def test_transactions_that_end_in_the_wrong_order_change_nothing(self):
        for fails in (True, False):
            queue, first, second, third = self.open(), *(ExitStack() for _ in range(3))
            for number, block in enumerate((first, second, third)):
                block.enter_context(queue.transaction())
                queue.enqueue("t", number)
            for block in (first, second, third):
                error = ZeroDivisionError() if fails and block is first else None
                with self.subTest(fails=fails), self.assertRaisesRegex(QueueError, "cannot end a transaction"):
                    block.__exit__(type(error) if error else None, error, None)
            self.assertEqual(queue.count_jobs(), 0)
            self.queue.enqueue("t")  # another writer does not wait
            self.assertEqual(queue.delete_jobs(), 1)

    # Operating

    def test_operator_actions_are_recorded_with_the_operator(self):
        job = self.taken()
        self.queue.mark_failed(job.id, "by hand", by="ann", now=NOW)
        self.queue.resubmit(job.id, by="bob", now=NOW)
        self.queue.cancel(job.id, now=NOW)
        story = [(event["event"], event["actor"], event["error"]) for event in self.queue.history(job.id)]
        me = getpass.getuser()
        self.assertEqual(
            story, [("marked failed", "ann", "by hand"), ("resubmitted", "bob", None), ("cancelled", me, None)]
        )
        with self.assertRaises(LeaseLost):
            self.queue.complete(job)

    def test_resubmitted_job_has_all_its_attempts_again(self):
        job = self.taken(max_attempts=1)
        self.queue.fail(job, "no", now=NOW)
        self.queue.resubmit(job.id, now=NOW)
        again = self.queue.dequeue("w", now=NOW)
        self.assertEqual((again.id, again.attempts, again.error), (job.id, 1, None))

    def test_resubmitted_job_waits_for_its_time(self):
        job = self.taken(max_attempts=1)
        self.queue.fail(job, "no", now=NOW)
        self.queue.resubmit(job.id, delay_seconds=60, now=NOW)
        self.assertEqual((self.queue.get(job.id).state, self.queue.get(job.id).run_at), ("scheduled", NOW + 60))
        self.assertIsNone(self.queue.dequeue("w", now=NOW + 59))
        self.assertEqual(self.queue.dequeue("w", now=NOW + 60).attempts, 1)
        self.queue.cancel(job.id, now=NOW + 61)
        self.queue.resubmit(job.id, run_at=datetime.fromtimestamp(NOW + 5, timezone.utc), now=NOW + 62)
        self.assertEqual((self.queue.get(job.id).state, self.queue.get(job.id).run_at), ("pending", NOW + 5))
        self.queue.cancel(job.id, now=NOW + 63)
        with self.assertRaisesRegex(ValueError, "expected delay_seconds or run_at, got both"):
            self.queue.resubmit(job.id, delay_seconds=5, run_at=NOW)
        self.assertEqual(self.queue.get(job.id).state, "cancelled")

    def test_jobs_are_resubmitted_at_a_rate_as_one_operation(self):
        q = self.queue
        with mock.patch("pqueue_operating.BATCH", 3):
            ids = q.enqueue_many("a", range(7), now=NOW)
            q.cancel_where(task="a", by="ann")
            done = q.resubmit_where(task="a", delay_seconds=10, rate=(2, 1.0), by="ann", now=NOW + 100)
        self.assertEqual(done, 7)
        due = {job.id: job.run_at - NOW - 110 for job in q.list_jobs(state="scheduled")}
        self.assertEqual([due[job_id] for job_id in ids], [0, 0.5, 1, 1.5, 2, 2.5, 3])
        self.assertEqual(
            sorted((each["event"], each["jobs"]) for each in q.operations()), [("cancelled", 7), ("resubmitted", 7)]
        )
        self.assertEqual(len(q.dequeue_many("w", 9, now=NOW + 111)), 3)
        q.cancel_where(task="a", state="scheduled")
        self.assertEqual(q.resubmit_where(state="cancelled", now=NOW + 200), 4)
        self.assertEqual(q.resubmit_where(state="completed", rate=(1, timedelta(minutes=1))), 0)
        for rate in (5, (0, 1.0), (1, 0), (1.5, 1.0), "10/1s"):
            with self.assertRaisesRegex(ValueError, "rate"):
                q.resubmit_where(state="cancelled", rate=rate)

    def test_running_jobs_are_not_deleted_unless_forced(self):
        job = self.taken()
        other = self.queue.enqueue("t")
        with self.assertRaisesRegex(InvalidTransition, "1 of them are processing"):
            self.queue.delete_jobs()
        with self.assertRaises(InvalidTransition):
            self.queue.delete_jobs([other, job.id])
        self.assertEqual(len(self.queue.list_jobs()), 2)
        self.assertEqual(self.queue.delete_jobs([other]), 1)
        self.assertEqual(self.queue.delete_jobs(force=True), 1)

    def test_replay_leases_a_finished_job_as_in_its_last_attempt(self):
        queue = self.open()
        failed = queue.enqueue("t", 1, key="k", max_attempts=2)
        job = queue.dequeue("w")
        queue.update(job, result="partial")
        queue.fail(job, "no", retry=False)
        holder = queue.enqueue("t", key="k")
        with self.assertRaises(RolledBack), queue.transaction():
            job = queue.lease_again(failed, "replay", max_attempts=9)
            self.assertEqual((job.state, job.attempts, job.max_attempts), ("processing", 1, 2))
            self.assertEqual((job.payload, job.result, job.error, job.consumer), (1, "partial", "no", "replay"))
            self.assertFalse(queue.enqueue("t", key="k").is_new)
            queue.complete(job, "done")
            raise RolledBack
        self.assertEqual((queue.get(failed).state, queue.get(failed).error), ("failed", "no"))
        with self.assertRaisesRegex(InvalidTransition, f"cannot replay job {holder}: it is pending"):
            queue.lease_again(holder, "replay", max_attempts=9)
        queue.cancel(holder)
        job = queue.lease_again(holder, "replay", max_attempts=9)
        self.assertEqual((job.attempts, job.max_attempts), (1, 9))
        with self.assertRaises(JobNotFound):
            queue.lease_again(99, "replay", max_attempts=9)

    def test_compact_leaves_all_jobs_and_is_refused_in_a_transaction(self):
        queue = self.open()
        queue.enqueue_many("t", [{"n": n, "text": "x" * 1000} for n in range(500)])
        kept = queue.enqueue("t", "kept")
        queue.delete_jobs(range(1, kept))
        reported: list[int] = []
        self.assertGreaterEqual(queue.compact(progress=reported.append), 0)
        self.assertGreater(len(reported), 1)
        self.assertEqual([job.payload for job in queue.list_jobs()], ["kept"])
        with self.assertRaisesRegex(QueueError, "cannot compact in a transaction"), queue.transaction():
            queue.compact()
        self.assertEqual(queue.enqueue("t"), kept + 1)

    def test_prune_deletes_old_finished_jobs_with_their_history(self):
        old, failed, young, last = (self.queue.enqueue("t", now=NOW) for _ in range(4))
        self.queue.cancel(old, now=NOW)
        self.queue.mark_failed(failed, now=NOW)
        self.queue.cancel(young, now=NOW + 50)
        self.assertEqual(self.queue.prune(60, states=["cancelled"], now=NOW + 100), 1)
        self.assertEqual(self.queue.prune(60, now=NOW + 100), 1)
        self.assertEqual([job.id for job in self.queue.list_jobs()], [last, young])
        self.assertEqual([len(self.queue.history(job_id)) for job_id in (old, failed, young)], [0, 0, 1])

    def test_prune_takes_each_job_of_each_queue_once_however_few_at_a_time(self):
        for name in "abaaa":
            self.queue.cancel(self.queue.enqueue("t", queue=name, now=NOW), now=NOW)
        self.queue.enqueue("t", now=NOW)
        with mock.patch("pqueue_retention.PRUNE_BATCH", 2):
            self.assertEqual(self.queue.prune(10, now=NOW + 10), 0)
            self.assertEqual(self.queue.prune(10, now=NOW + 11), 5)

    # Expiry

    def test_job_that_does_not_start_in_time_is_cancelled(self):
        q = self.queue
        soon = q.enqueue("t", expires_at=NOW + 10, now=NOW)
        later = q.enqueue("t", delay_seconds=50, expire_seconds=timedelta(seconds=20), now=NOW)
        at = datetime.fromtimestamp(NOW + 10, timezone.utc)
        many = q.enqueue_many("t", [1, 2], queue="other", expires_at=at, now=NOW)
        self.assertEqual(q.get(later).expires_at, NOW + 70)
        q.pause("other")
        self.assertEqual(q.dequeue("w", now=NOW + 9).id, soon)
        self.assertIsNone(q.dequeue("w", now=NOW + 10))
        self.assertEqual(
            [q.get(each).state for each in (soon, later, *many)], ["processing", "scheduled"] + ["cancelled"] * 2
        )
        self.assertIsNone(q.dequeue("w2", now=NOW + 70))  # the first one's lease is over, too
        job = q.get(later)
        self.assertEqual((job.state, job.finished_at, job.attempts), ("cancelled", NOW + 70, 0))
        self.assertEqual(job.error, "expired: it was to start before 2027-01-15T08:01:10+00:00")
        (event,) = q.history(later)
        self.assertEqual((event["event"], event["actor"], event["error"]), ("cancelled", "expires_at", job.error))
        with self.assertRaisesRegex(JobFailed, "was cancelled: expired: it was to start before"):
            q.result(later, timeout_seconds=0)
        self.assertIsNone(q.dequeue("w2", now=NOW + 1e6))
        self.assertIn("expired: it was to start before 2027-01-15T08:00:10+00:00; its last", q.get(soon).error)

    def test_job_whose_attempt_failed_is_cancelled_unless_another_starts_in_time(self):
        q = self.queue
        job = self.taken(expire_seconds=10)
        q.fail(job, "broken", retry_in_seconds=30, now=NOW + 50)  # it may run for as long as it takes
        self.assertIsNone(q.dequeue("worker", now=NOW + 80))
        found = q.get(job.id)
        self.assertEqual((found.state, found.attempts), ("cancelled", 1))
        self.assertTrue(found.error.endswith("; its last attempt: broken"))
        job = self.taken(expire_seconds=10)
        q.release(job, now=NOW + 10)
        self.assertIsNone(q.dequeue("worker", now=NOW + 10))

    def test_jobs_that_expired_are_cancelled_however_many_before_one_is_delivered(self):
        q = self.queue
        with mock.patch("pqueue_retention.EXPIRE_BATCH", 3):
            q.enqueue_many("t", range(10), expire_seconds=5, now=NOW)
            last = q.enqueue("t", now=NOW)
            self.assertEqual([job.id for job in q.dequeue_many("w", 4, now=NOW + 5)], [last])
            self.assertEqual(q.count_jobs(state="cancelled"), 10)
            q.enqueue_many("t", range(10), expire_seconds=5, now=NOW)
            job_id = q.enqueue("t", now=NOW)
            done, lost = q.complete_and_dequeue([(q.get(last), 1)], "w", now=NOW + 7)
            self.assertEqual(([job.id for job in done], lost, q.get(last).state), ([job_id], [], "completed"))
            q.enqueue_many("t", range(10), expire_seconds=5, now=NOW)
            with q.transaction():
                self.assertIsNone(q.dequeue("w", now=NOW + 6))
        self.assertEqual(q.count_jobs(state="cancelled"), 30)

    def test_jobs_that_expire_while_a_last_attempt_is_claimed_again_are_cancelled(self):
        q = self.queue
        q.enqueue_many("t", range(10), max_attempts=1, expire_seconds=5, now=NOW)
        last = q.enqueue("t", max_attempts=1, now=NOW)
        times = [NOW + 6, NOW + 4]  # the latter until a claim is rolled back, to be repeated with a sync

        def claimed(*args, **options):
            times[1:] = []
            return claimed_jobs(*args, **options)

        claimed_jobs = q._claimed_jobs
        with (
            mock.patch("pqueue_retention.EXPIRE_BATCH", 3),
            mock.patch.object(q, "_time", lambda now: times[-1]),
            mock.patch.object(q, "_claimed_jobs", claimed),
        ):
            self.assertEqual([job.id for job in q.dequeue_many("w", 2)], [last])
        self.assertEqual((q.count_jobs(state="cancelled"), q.get(last).attempts), (10, 1))

    def test_expired_job_frees_its_key(self):
        self.queue.enqueue("t", key="k", expire_seconds=5, now=NOW)
        self.assertIsNone(self.queue.dequeue("w", now=NOW + 5))
        self.assertTrue(self.queue.enqueue("t", key="k", now=NOW + 5).is_new)

    def test_job_after_one_that_expires_fails_or_runs_as_it_says_and_may_expire_itself(self):
        q = self.queue
        first = q.enqueue("t", expire_seconds=5, now=NOW)
        fails, runs = (q.enqueue("u", after=[first], after_failed=how, now=NOW) for how in ("fail", "run"))
        waits = q.enqueue("u", after=[runs], expire_seconds=20, now=NOW)
        self.assertEqual(q.dequeue("w", now=NOW + 5).id, runs)
        self.assertEqual([q.get(each).state for each in (first, fails, waits)], ["cancelled", "failed", "waiting"])
        q.dequeue("w", now=NOW + 20)
        self.assertEqual((q.get(waits).state, len(q.history(waits))), ("cancelled", 1))

    def test_job_that_expires_together_with_its_parent_fails(self):
        first = self.queue.enqueue("t", expire_seconds=5, now=NOW)
        child = self.queue.enqueue("u", after=[first], expire_seconds=5, now=NOW)
        self.assertIsNone(self.queue.dequeue("w", now=NOW + 5))
        self.assertEqual(self.states(first, child), ["cancelled", "failed"])

    def test_job_that_replaces_another_has_its_own_expiry(self):
        job_id = self.queue.enqueue("t", key="k", expire_seconds=5, now=NOW)
        self.queue.enqueue("t", key="k", expire_seconds=50, on_conflict="replace", now=NOW + 3)
        self.assertEqual(self.queue.get(job_id).expires_at, NOW + 53)
        self.queue.enqueue("t", key="k", on_conflict="replace", now=NOW + 3)
        self.assertIsNone(self.queue.get(job_id).expires_at)

    def test_operator_changes_when_a_job_expires(self):
        q = self.queue
        job_id = q.enqueue("t", now=NOW)
        q.change(job_id, expires_at=NOW + 5, now=NOW)
        self.assertEqual(q.get(job_id).expires_at, NOW + 5)
        q.change(job_id, delay_seconds=100, expire_seconds=5, by="ann", now=NOW)
        self.assertEqual((q.get(job_id).run_at, q.get(job_id).expires_at), (NOW + 100, NOW + 105))
        self.assertEqual(q.history(job_id)[-1]["event"], "changed time, expiry")
        with self.assertRaisesRegex(ValueError, "expected expires_at or expire_seconds, got both"):
            q.change(job_id, expires_at=NOW, expire_seconds=1)
        q.cancel(job_id, now=NOW)
        q.resubmit(job_id, now=NOW + 500)
        self.assertEqual(q.dequeue("w", now=NOW + 500).expires_at, None)

    def test_expiry_that_is_none_is_refused(self):
        for options, message in (
            ({"expires_at": NOW, "expire_seconds": 1}, "expected expires_at or expire_seconds, got both"),
            ({"expire_seconds": 0}, "expected expire_seconds above 0, got 0"),
            ({"expires_at": datetime(2027, 1, 1)}, "expected expires_at with a time zone"),
            ({"expires_at": math.inf}, "expected expires_at to be a finite number"),
        ):
            with self.subTest(options=options), self.assertRaisesRegex(ValueError, message):
                self.queue.enqueue("t", **options)

    def test_task_says_in_which_queue_and_with_which_priority_its_jobs_run(self):
        q = self.queue
        with mock.patch.dict(pqueue.TASKS, clear=True):
            mail = pqueue.task("mail", queue="mails", priority=7, every_seconds=60)(lambda: None)
            urgent = mail.using(queue="urgent", priority=0)
            ids = [
                mail.on(q).enqueue(),
                q.enqueue(mail, {}),
                *mail.on(q).enqueue_many([()]),
                urgent.on(q).enqueue(),
                q.enqueue(mail, {}, queue="default", priority=-1),
                q.enqueue("mail", {}),
            ]
            found = [(job.queue, job.priority) for job in map(q.get, ids)]
            self.assertEqual(found, [("mails", 7)] * 3 + [("urgent", 0), ("default", -1), ("default", 0)])
            q.delete_jobs()
            q.declare_schedules([mail], now=NOW)
            q.schedule("tick", mail, every_seconds=60, now=NOW)
            q.schedule("tock", mail, every_seconds=60, queue="other", priority=0, now=NOW)
            jobs = [q.dequeue("w", now=NOW + 60) for _ in range(3)]
            places = sorted((job.queue, job.priority) for job in jobs)
            self.assertEqual(places, [("mails", 7), ("mails", 7), ("other", 0)])
            # A changed decorator changes the schedule
            mail = dataclasses.replace(mail, queue="default")
            q.declare_schedules([mail], now=NOW)
            self.assertEqual(next(each.queue for each in q.schedules() if each.name == "mail"), "default")
            for options in ({"queue": ""}, {"queue": 5}, {"priority": 1.5}, {"priority": 2**40}):
                with self.assertRaises(ValueError):
                    pqueue.task("wrong", **options)

    def test_task_and_schedule_say_when_their_jobs_expire(self):
        q = self.queue
        with mock.patch.dict(pqueue.TASKS, clear=True):
            brief = pqueue.task("brief", expire_seconds=timedelta(minutes=1))(lambda: None)
            self.assertEqual(q.get(brief.on(q).enqueue()).expires_at - q.get(1).run_at, 60)
            self.assertEqual(q.get(q.enqueue(brief, {}, delay_seconds=9, now=NOW)).expires_at, NOW + 69)
            found = q.get(brief.using(expire_seconds=5, delay_seconds=7).on(q).enqueue())
            self.assertEqual(found.expires_at, found.run_at + 5)
            self.assertIsNone(q.get(q.enqueue("brief", {})).expires_at)
            q.delete_jobs()
            q.schedule("tick", brief, every_seconds=100, on_missed="all", now=NOW)
            q.schedule("tock", "t", every_seconds=100, expire_seconds=30, on_missed="all", now=NOW)
            self.assertEqual({each.expire_seconds for each in q.schedules()}, {60, 30})
            jobs = q.dequeue_many("w", 9, now=NOW + 350)
            self.assertEqual([(job.task, job.run_at - NOW) for job in jobs], [("brief", 300)])
            self.assertEqual(q.count_jobs(state="cancelled"), 5)

    # Retention

    def finished(self, state, queue="default", at=0):
        """Return the id of a job that came into this state at NOW + at."""
        job_id = self.queue.enqueue("t", queue=queue, now=NOW + at)
        if state == "completed":
            self.queue.complete(self.queue.dequeue("worker", queues=[queue], now=NOW + at), now=NOW + at)
        else:
            {"failed": self.queue.mark_failed, "cancelled": self.queue.cancel}[state](job_id, now=NOW + at)
        return job_id

    def ids(self):
        return {job.id for job in self.queue.list_jobs()}

    def test_queue_keeps_finished_jobs_of_each_state_as_long_as_it_says(self):
        self.queue.keep("default", completed="90s", failed=timedelta(hours=1))
        self.queue.keep("default", cancelled=None)
        done, dead, gone, other = (
            self.finished("completed"),
            self.finished("failed"),
            self.finished("cancelled"),
            self.finished("completed", "other"),
        )
        last = self.queue.enqueue("t", now=NOW)
        for seconds, kept in (
            (90, {done, dead, gone, other}),
            (91, {dead, gone, other}),
            (3601, {gone, other}),
            (7 * DAY, {gone, other}),
            (7 * DAY + 1, {gone}),
            (1e9, {gone}),
        ):
            self.assertFalse(self.queue.prune_kept(now=NOW + seconds))
            self.assertEqual(self.ids(), {*kept, last}, seconds)
        self.assertEqual(self.queue.history(dead), [])

    def test_schedule_that_has_not_fired_keeps_no_job(self):
        self.queue.schedule("tick", "t", every_seconds=1e6, now=NOW)
        for _ in range(2):
            self.finished("cancelled", at=0)
        self.assertEqual(self.queue.prune(0, now=NOW + 9), 1)

    def test_new_queue_keeps_completed_jobs_a_week_and_others_a_month(self):
        self.queue.enqueue("t", now=NOW)
        kept = {each["state"]: each["keep_seconds"] for each in self.queue.retention(now=NOW)}
        self.assertEqual(kept, {"completed": 7 * DAY, "failed": 30 * DAY, "cancelled": 30 * DAY})

    def test_queue_keeps_finished_jobs_that_are_still_needed(self):
        self.queue.keep("default", completed=0, failed=0, cancelled=0)
        keyed = self.queue.enqueue("t", key="k", key_seconds=1000, now=NOW)
        self.queue.cancel(keyed, now=NOW)
        self.queue.schedule("tick", "t", every_seconds=500, now=NOW)
        job = self.queue.dequeue("worker", now=NOW + 500)
        self.queue.complete(job, now=NOW + 500)
        self.finished("cancelled", at=600)
        newest = self.finished("cancelled", at=600)
        self.queue.prune_kept(now=NOW + 999)
        self.assertEqual(self.queue.prune(0, now=NOW + 999), 0)
        self.assertEqual(self.ids(), {keyed, job.id, newest})
        again = self.queue.dequeue("worker", now=NOW + 1000)
        self.queue.prune_kept(now=NOW + 1001)
        self.assertEqual(self.ids(), {again.id})

    def test_jobs_kept_no_longer_are_deleted_by_one_consumer_a_few_at_a_time(self):
        other = self.reopen()
        for name in ("a", "b"):
            self.queue.keep(name, cancelled=0)
            for _ in range(5):
                self.finished("cancelled", name)
        self.queue.enqueue("t", now=NOW)
        with mock.patch("pqueue_retention.KEEP_BATCH", 2), mock.patch("pqueue_retention.KEEP_WORK_SECONDS", 0):
            self.assertTrue(self.queue.prune_kept(now=NOW + 10))
            self.assertEqual(self.queue.count_jobs(state="cancelled"), 6)
            self.assertFalse(other.prune_kept(now=NOW + 11))  # a moment ago, another one did
            self.assertEqual(self.queue.count_jobs(state="cancelled"), 6)
            self.assertTrue(other.prune_kept(now=NOW + 12))
            self.assertFalse(self.queue.prune_kept(now=NOW + 14))
        self.assertEqual(self.queue.count_jobs(state="cancelled"), 0)

    def test_jobs_kept_no_longer_are_deleted_while_there_is_time(self):
        self.queue.keep("a", cancelled=0)
        for _ in range(7):
            self.finished("cancelled", "a")
        self.queue.enqueue("t", now=NOW)
        with mock.patch("pqueue_retention.KEEP_BATCH", 2), mock.patch("pqueue_retention.KEEP_WORK_SECONDS", 60):
            self.assertFalse(self.queue.prune_kept(now=NOW + 10))
        self.assertEqual(self.queue.count_jobs(state="cancelled"), 0)

    def test_jobs_kept_no_longer_are_deleted_although_a_clock_was_ahead(self):
        self.queue.keep("default", cancelled=0)
        for at in (0, 1e6, 1e6):
            self.finished("cancelled", at=at)
        self.queue.prune_kept(now=NOW + 2e6)
        job_id = self.finished("cancelled", at=5)
        self.queue.enqueue("t", now=NOW)
        self.queue.prune_kept(now=NOW + 10)
        self.assertNotIn(job_id, self.ids())

    def test_operator_sees_what_queues_keep_and_how_they_grow(self):
        self.queue.keep("default", completed="2h", cancelled=None)
        for at in (0, 5000, 5100):
            self.finished("completed", at=at)
        self.finished("cancelled", at=5200)
        keyed = self.queue.enqueue("t", key="k", key_seconds=1e6, now=NOW - 9)  # is needed
        self.queue.keep("default", failed="1h")
        self.queue.mark_failed(keyed, now=NOW - 9)
        self.queue.keep("other", completed="2h")
        for at in (-5, 1, 5000):
            self.finished("completed", at=at, queue="other")
        self.queue.enqueue("t", now=NOW)
        found = {each["state"]: each for each in self.queue.retention(now=NOW + 5400) if each["queue"] == "default"}
        self.assertEqual(
            found["completed"],
            {
                "queue": "default",
                "state": "completed",
                "keep_seconds": 7200,
                "added": 2,
                "expiring": 1,
                "deleted_at": NOW + 7200,
            },
        )
        self.assertEqual([found["cancelled"][name] for name in ("added", "expiring", "deleted_at")], [1, 0, None])
        self.assertEqual(found["failed"]["deleted_at"], None)

    def test_jobs_that_a_consumer_deletes_as_they_are_kept_no_longer_were_counted(self):
        self.queue.keep("default", completed=60)
        for _ in range(3):
            self.queue.enqueue("t", now=NOW)
        for _ in range(3):
            self.queue.complete(self.queue.dequeue("w", now=NOW), now=NOW)
        self.queue.prune_kept(now=NOW + 61)
        self.assertEqual(self.queue.count_jobs(), 1)  # the newest
        (found,) = self.queue.outcomes()
        self.assertEqual((found.enqueued, found.completed), (3, 3))

    def test_time_to_keep_jobs_that_is_none_is_refused(self):
        for value, message in (
            ("7y", "expected a duration such as 90s, 15m, 12h, 7d or 2w, got '7y'"),
            (-1, "expected completed to be a duration of 0 or more, got -1"),
            (True, "expected completed to be a finite number of seconds, at most 1e+12, or a timedelta, got True"),
            ("9" * 400 + "d", "expected a duration to be a finite number of seconds"),
        ):
            with self.subTest(value=value), self.assertRaises(ValueError) as caught:
                self.queue.keep("default", completed=value)
            self.assertIn(message, str(caught.exception))
        with self.assertRaisesRegex(ValueError, "how long to keep completed, failed, cancelled jobs, got none"):
            self.queue.keep("default")
        self.assertEqual(self.queue.stats()["queues"], {})

    def test_operator_sees_completions_counted_that_came_just_before_a_large_batch(self):
        self.queue.enqueue_many("t", range(45), now=NOW)
        jobs = self.queue.dequeue_many("w", 45, now=NOW)
        for job in jobs[:5]:
            self.queue.complete(job, now=NOW + 1)
        self.queue.complete_and_dequeue([(job, None) for job in jobs[5:]], "w", 0, now=NOW + 2)
        self.assertEqual([each.completed for each in self.queue.outcomes()], [45])

    def test_operator_sees_each_finished_job_counted_once(self):
        for name in "ab":
            self.queue.enqueue("t", queue=name, now=100)
            self.queue.complete(self.queue.dequeue("w", queues=[name], now=110), now=130)
        stats = self.queue.stats()
        self.assertEqual(stats["states"]["completed"], 2)
        self.assertEqual([stats["queues"][name]["completed"] for name in "ab"], [1, 1])
        self.assertEqual([each.completed for each in self.queue.outcomes()], [1, 1])

    def test_jobs_are_listed_newest_first_by_filter_and_page(self):
        ids = self.queue.enqueue_many("a", range(5), queue="q", now=NOW)
        self.queue.enqueue("b", now=NOW)
        self.queue.dequeue("w", queues=["q"], now=NOW)
        self.assertEqual([job.id for job in self.queue.list_jobs(task="a", limit=2)], ids[:2:-1])
        self.assertEqual([job.id for job in self.queue.list_jobs(task="a", before_id=ids[3])], ids[2::-1])
        self.assertEqual([job.id for job in self.queue.list_jobs(state="processing", consumer="w")], [ids[0]])
        self.assertEqual([job.task for job in self.queue.list_jobs(queue="default")], ["b"])

    def test_jobs_are_found_whether_many_or_few_are_in_their_state(self):
        ids = self.queue.enqueue_many("a", range(4), now=NOW)
        self.queue.assign(ids[0], "w")
        self.queue.cancel(ids[1])
        failed = [self.queue.enqueue(name, now=NOW) for name in "ab"]
        for job_id in failed:
            self.queue.mark_failed(job_id)
        for few in (100, 0):
            with self.subTest(few=few), mock.patch("pqueue_search.INDEX_SCAN_JOBS", few):
                self.assertEqual([job.id for job in self.queue.list_jobs(state="pending")], [ids[3], ids[2], ids[0]])
                self.assertEqual(
                    [job.id for job in self.queue.list_jobs(state="pending", before_id=ids[3])], [ids[2], ids[0]]
                )
                self.assertEqual([job.id for job in self.queue.list_jobs(state="cancelled", queue="default")], [ids[1]])
                self.assertEqual([job.id for job in self.queue.list_jobs(state="failed", task="b")], failed[1:])

    def test_search_stops_in_time_and_continues_where_it_stopped(self):
        ids = self.queue.enqueue_many("a", range(10), now=NOW)
        self.queue.delete_jobs(ids[2:6])
        with mock.patch("pqueue_search.WALK_IDS", 2):
            jobs, before = self.queue.search_jobs(pqueue.Filters(task="a"), seconds=0)
            self.assertEqual(([job.id for job in jobs], before), (ids[:7:-1], ids[8]))
            seen = []
            while before is not None:
                jobs, before = self.queue.search_jobs(pqueue.Filters(task="a"), seconds=0, before_id=before)
                seen += [job.id for job in jobs]
            self.assertEqual(seen, [ids[7], ids[6], ids[1], ids[0]])
            jobs, before = self.queue.search_jobs(pqueue.Filters(task="a"), limit=3, seconds=3600)
            self.assertEqual(([job.id for job in jobs], before), (ids[:6:-1], ids[7]))

    def test_search_for_a_text_continues_after_what_it_read_not_after_what_it_found(self):
        ids = self.queue.enqueue_many("a", ["needle" if number == 9 else "hay" for number in range(10)])
        with mock.patch("pqueue_search.WALK_IDS", 4):
            jobs, before = self.queue.search_jobs(pqueue.Filters(text="needle"), seconds=0)
        self.assertEqual(([job.id for job in jobs], before), (ids[9:], ids[6]))

    def test_ids_may_exceed_32_bits(self):
        old, big = self.queue.enqueue("t"), 2**40
        with self.queue.transaction() as db:
            self.execute(db, "UPDATE jobs SET id = :big WHERE id = :old", big=big, old=old)
        self.queue.cancel(big)
        self.assertEqual(self.queue.get(big).state, "cancelled")
        following = self.queue.enqueue("t")
        self.assertEqual(self.queue.list_jobs(before_id=big + 1)[0].id, big)
        self.assertEqual(self.queue.delete_jobs([big, following]), 2)

    def test_job_whose_json_python_cannot_read_fails_and_stops_no_other(self):
        for column in ("payload", "result"):
            for text in ("[" * 1000 + "]" * 1000, "[" * 101 + "]" * 101, "9" * 5000):
                unreadable, sound = self.queue.enqueue_many("t", range(2))
                with self.queue.transaction() as db:
                    self.execute(db, f"UPDATE jobs SET {column} = :text WHERE id = :id", text=text, id=unreadable)
                self.assertEqual(getattr(self.queue.get(unreadable), column), text)
                self.assertEqual([job.id for job in self.queue.dequeue_many("w", 5)], [sound])
                job = self.queue.get(unreadable)
                self.assertEqual((job.state, job.lease_token), ("failed", None))
                self.assertIn("nested too deep", job.error)
                (event,) = self.queue.history(unreadable)
                self.assertEqual((event["event"], event["actor"]), ("failed", "w"))

    def test_job_that_cannot_be_read_fails_its_dependents(self):
        parent = self.queue.enqueue("t")
        child = self.queue.enqueue("t", after=[parent])
        with self.queue.transaction() as db:
            text = "[" * 1000 + "]" * 1000
            self.execute(db, "UPDATE jobs SET payload = :text WHERE id = :id", text=text, id=parent)
        self.assertIsNone(self.queue.dequeue("w"))
        self.assertEqual(self.queue.get(child).error, f"job {parent} failed")

    def test_operator_finds_jobs_by_text_and_time(self):
        first = self.queue.enqueue("mail", {"to": "Ada"}, now=100)
        second = self.queue.enqueue("mail", {"to": "50%_off\\"}, key="spring", now=200)
        (job,) = (self.queue.dequeue("w") for _ in range(1))
        self.queue.fail(job, "ValueError: no such Address", retry=False)

        def found(**filters):
            ids = [job.id for job in self.queue.list_jobs(**filters)]
            self.assertEqual(self.queue.count_jobs(**filters), len(ids))
            return ids

        self.assertEqual(found(text="ADA"), [first])
        self.assertEqual(found(text="address"), [first])
        self.assertEqual(found(text="SPRING"), [second])
        self.assertEqual(found(key="spring"), [second])
        self.assertEqual(found(key="spring", state="pending"), [second])
        self.assertEqual(found(key="SPRING"), [])
        self.assertEqual(found(text="50%_off\\\\"), [second])
        self.assertEqual(found(text="5__"), [])
        self.assertEqual(found(created_from=200), [second])
        self.assertEqual(found(created_before=200), [first])
        self.assertEqual(found(state="failed"), [first])
        self.assertEqual(found(), [second, first])

    def find(self, text, **options):
        """Return the jobs in which the text is, each way of looking agreeing with the others."""
        ids = [job.id for job in self.queue.list_jobs(text=text, **options)]
        for few in (0, 100_000):  # by an index of the state, or on the way through all
            with mock.patch("pqueue_search.INDEX_SCAN_JOBS", few), mock.patch("pqueue_search.WALK_IDS", 3):
                self.assertEqual([job.id for job in self.queue.list_jobs(text=text, state="pending", **options)], ids)
                self.assertEqual(self.queue.count_jobs(text=text, **options), len(ids))
                self.assertEqual(self.queue.count_jobs(text=text, state="pending", **options), len(ids))
                found, before = [], pqueue_values.MAX_ID
                while before is not None:
                    jobs, before = self.queue.search_jobs(
                        pqueue.Filters(text=text, **options), seconds=0, before_id=before, limit=2
                    )
                    found += [job.id for job in jobs]
                self.assertEqual(found, ids)
        return ids

    def test_reader_finds_every_text_of_a_payload_as_it_is_read_in_any_case(self):
        texts = [
            "MÜNCHEN",
            "Mu\u0308nchen",
            "Straße",
            "ΟΔΟΣ",
            "ÎLE",
            "Kelvin \u212a",
            "\u0130zmir",
            "\ufb01x",
            "ЖУК 東京 😀",
        ]
        texts += ['say "Hi" to', "C:\\Temp\\new", "one\ntwo\tthree", "50%_off", "\u0001\u00a0", "plain Text", "a/b'c"]
        ids = self.queue.enqueue_many("t", [{"deep": [{"k" + text: [text, 1.5]}]} for text in texts])
        for job_id, text in zip(ids, texts, strict=True):
            for needle in (text, text.lower(), text.upper(), text[1:], text[:-1], json.dumps(text, ensure_ascii=False)):
                self.assertIn(job_id, self.find(needle), needle)
        for needle, found in (("münchen", 2), ("STRASSE", 1), ("strasse", 1), ("οδοσ", 1), ("kelvin k", 1), ("fix", 1)):
            self.assertEqual(len(self.find(needle)), found, needle)
        for needle, found in (("5__", 0), ("%", 1), ("\n", 1), ("\\", 2), ('"', 16), ("1.5]", 16), ("tempnew", 0)):
            self.assertEqual(len(self.find(needle)), found + (needle == "\\") * 2, needle)  # JSON shows some as \n
        self.assertEqual(len(self.find("")), 16)

    def test_search_finds_the_task(self):
        ids = [self.queue.enqueue(task) for task in ("send_mail", "Mailing", "other")]
        self.assertEqual(self.find("MAIL"), ids[1::-1])

    def test_search_finds_a_value_at_a_path(self):
        payloads = [
            {"customer": 7, "address": {"city": "Berlin"}},
            {"customer": "7", "items": [{"id": 12}, {"id": 1.5}]},
            {"customer": 77, "a.b": {"c": None}, "x": {"customer": 7}},
            {"customer": True, "address": {"city": "München"}, "items": []},
            [{"customer": 7}],
            {"list": [1, "two"], "quoted": 'say "hi"', "equal": "a=b", "": 0, "under_score": "50%_off"},
            "customer=7",
            None,
        ]
        ids = self.queue.enqueue_many("t", payloads)
        for given, places in {
            "customer=7": [0, 1],
            'customer="7"': [1],
            "customer=77": [2],
            "x.customer=7": [2],
            "customer=true": [3],
            "customer=True": [],
            "address.city=Berlin": [0],
            "address.city=berlin": [],
            "address.city=München": [3],
            'address={"city": "Berlin"}': [0],
            "items.0.id=12": [1],
            "items.1.id=1.5": [1],
            "items.2.id=12": [],
            "items.x.id=12": [],
            "items=[]": [3],
            "a.b.c=null": [],
            'a.b={"c": null}': [2],
            "0.customer=7": [4],
            'list=[1, "two"]': [5],
            "list.1=two": [5],
            'quoted=say "hi"': [5],
            "equal=a=b": [5],
            "under_score=50%_off": [5],
            "underxscore=50%_off": [],
            "customer.a.b=7": [],
            "nosuch=7": [],
            "customer=": [],
        }.items():
            with self.subTest(given):
                expected = [ids[place] for place in places]
                self.assertEqual([job.id for job in self.queue.list_jobs(payload=given)], expected[::-1])
                self.assertEqual(self.queue.count_jobs(payload=given, state="pending", text=""), len(places))
        secret = self.queue.list_jobs(payload="customer=77", shown=lambda job: job._replace(payload={"customer": "…"}))
        self.assertEqual(secret, [])
        self.assertEqual(self.queue.cancel_where(payload="customer=7"), 2)
        for wrong in ("customer", "=7", "", "customer 7"):
            with self.assertRaisesRegex(ValueError, "expected a path in the payload and a value, such as customer=7"):
                self.queue.list_jobs(payload=wrong)
        for wrong in (7, "x" * 2000):
            with self.assertRaisesRegex(ValueError, "expected payload to be"):
                self.queue.list_jobs(payload=wrong)

    def test_search_finds_the_same_jobs_as_a_plain_comparison(self):
        letters = 'aAkKiIsS1üÜßİı\u212aſ\ufb01"\\\n%_ …'
        draw = random.Random(7)
        texts = ["".join(draw.choices(letters, k=draw.randint(0, 6))) for _ in range(60)]
        ids = self.queue.enqueue_many("t", texts)
        for _ in range(60):
            needle = "".join(draw.choices(letters, k=draw.randint(1, 3)))
            expected = [
                job_id
                for job_id, text in zip(ids, texts, strict=True)
                if any(
                    unicodedata.normalize("NFC", needle.casefold()) in unicodedata.normalize("NFC", each.casefold())
                    for each in (text, json.dumps(text, ensure_ascii=False))
                )
            ]
            self.assertEqual([job.id for job in self.queue.list_jobs(text=needle)], expected[::-1], (needle, expected))

    def test_search_finds_json_that_another_program_has_formatted(self):
        job_id = self.queue.enqueue("t")
        for stored in ('{"city": "M\\u00fcn\\u0063hen"}', '{"city":\n"Mün\\u0063hen"}', '"MÜNCHEN"'):
            with self.queue.transaction() as db:
                self.execute(db, "UPDATE jobs SET payload = :text WHERE id = :id", text=stored, id=job_id)
            self.assertEqual(self.find("münchen"), [job_id])

    def test_reader_finds_no_text_that_is_not_shown(self):
        def shown(job):
            return job._replace(payload={**job.payload, "word": "…"})

        job_id = self.queue.enqueue("t", {"word": "hunter2", "name": "ada"})
        self.assertEqual(self.find("hunter2"), [job_id])
        for text in ("hunter2", "h", '"word": "h', "2"):
            self.assertEqual(self.find(text, shown=shown), [])
        for text in ("ada", '"word": "…"', "WORD"):
            self.assertEqual(self.find(text, shown=shown), [job_id])

    def test_job_that_changes_during_a_search_is_not_found(self):
        ids = self.queue.enqueue_many("t", ["find me"] * 3)
        find = self.queue._find

        def late(*arguments):
            found = find(*arguments)
            self.queue.cancel(ids[1])
            return found

        with mock.patch.object(self.queue, "_find", late):
            self.assertEqual([job.id for job in self.queue.list_jobs(text="find", state="pending")], [ids[2], ids[0]])
        self.queue.dequeue("w", now=NOW)

        def taken_over(*arguments):
            found = find(*arguments)
            self.queue.dequeue("other", now=NOW + 60)
            return found

        with mock.patch.object(self.queue, "_find", taken_over):
            self.assertEqual(self.queue.list_jobs(text="find", consumer="w"), [])

    def test_search_reads_few_jobs_at_a_time_and_those_of_a_rare_state_by_its_index(self):
        ids = self.queue.enqueue_many("t", ["find me"] * 20, now=NOW)
        self.queue.mark_failed(ids[0])
        read, rows = self.queue._read, []

        def noting(sql, *params):
            found = read(sql, *params)
            rows.append(len(found) if "payload" in sql.partition("FROM")[0] else 0)
            return found

        with mock.patch.object(self.queue, "_read", noting):
            self.assertEqual(len(self.queue.list_jobs(text="find")), 20)
            self.assertEqual(max(rows), pqueue_search.TEXT_SCAN_JOBS)
            rows.clear()
            self.assertEqual((self.queue.list_jobs(text="nowhere"), max(rows)), ([], 0))
        with mock.patch("pqueue_search.INDEX_SCAN_JOBS", 10), mock.patch.object(self.queue, "_walk") as walk:
            self.assertEqual([job.id for job in self.queue.list_jobs(state="failed")], ids[:1])
            self.assertEqual([job.id for job in self.queue.list_jobs(state="failed", task="t")], ids[:1])
        walk.assert_not_called()

    def test_reader_of_excerpts_gets_the_beginnings_of_long_values(self):
        self.queue.enqueue("t", {"n": "x" * 5000})
        job = self.queue.dequeue("w")
        self.queue.update(job, result=["y" * 500])
        self.queue.fail(job, "e" * 500, retry=False)
        short = self.queue.enqueue("t", {"n": "ü" * 92})
        for filters in ({}, {"text": '"n"'}):
            newest, oldest = self.queue.list_jobs(excerpt=100, **filters)
            self.assertEqual((newest.id, newest.payload, newest.result), (short, {"n": "ü" * 92}, None))
            for value, begins in ((oldest.payload, '{"n":"xxx'), (oldest.result, '["yyy'), (oldest.error, "eee")):
                self.assertIsInstance(value, pqueue.Excerpt)
                self.assertEqual((value[: len(begins)], len(value)), (begins, 100))
            for job in self.queue.list_jobs(excerpt=0, **filters):
                self.assertEqual((job.payload, job.result, job.error), (None, None, None))
        with self.assertRaises(ValueError):
            self.queue.list_jobs(excerpt=-1)

    def test_largest_numbers_are_accepted(self):
        most = 2**31 - 1
        job = self.queue.enqueue("t", "whole", priority=most, max_attempts=most)
        self.queue.limit("default", most, running=most)
        self.assertEqual(self.queue.list_jobs(limit=most, excerpt=most)[0].payload, "whole")
        self.assertEqual(self.queue.dependencies(self.queue.enqueue("t", after=[job]), excerpt=most)[0].id, job)
        self.assertEqual(len(self.queue.history(job, limit=most)), 0)
        self.queue.heartbeat("w")
        for _ in range(2):  # a consumer that has run for long
            self.queue.heartbeat("w", completed=most, failed=most)
        (found,) = self.queue.consumers()
        self.assertEqual((found["completed"], found["failed"]), (2 * most, 2 * most))
        self.assertEqual(len(self.queue.dequeue_many("w", most)), 1)

    def test_times_and_progress_of_a_job_are_floats_although_they_are_whole(self):
        for group in (None, "a"):
            self.queue.enqueue("t", group=group, run_at=50, expires_at=500, now=10)
            first = self.queue.dequeue("w", now=100)
            self.queue.update(first, progress=1)
            self.queue.release(first, now=100)
            again = self.queue.dequeue("w", now=100)
            self.queue.fail(again, "no", retry_in_seconds=20, now=100)
            (batch,) = self.queue.dequeue_many("w", 2, now=200)
            self.queue.complete(batch, now=300)
            for job in (first, again, batch, self.queue.get(batch.id)):
                times = (job.run_at, job.expires_at, job.lease_expires_at, job.created_at, job.started_at)
                for number in (*times, job.finished_at, job.progress):
                    with self.subTest(group=group, number=number):
                        self.assertIn(type(number), (float, type(None)))
            self.assertEqual(again.progress, 1)

    def test_filter_that_is_no_text_or_too_long_is_refused(self):
        self.assertEqual(self.find("x" * 1000), [])
        for filters, message in (
            ({"text": "x" * 1001}, "expected text to be at most 1,000 characters, got 1,001"),
            ({"text": "ü" * 60_000}, "got 60,000"),
            ({"task": "x" * 60_000}, "expected task to be at most 255 characters, got 60,000"),
            ({"queue": "a\0b"}, "expected queue to be printable"),
            *(
                ({name: "a\ud800"}, f"expected {name} to be printable, got 'a\\ud800'")
                for name in ("group", "fingerprint")
            ),
            ({"key": 5}, "expected key to be a text, got 5"),
            ({"text": b"x"}, "expected text to be a text, got b'x'"),
        ):
            for look in (self.queue.list_jobs, self.queue.count_jobs):
                with self.assertRaisesRegex(ValueError, re.escape(message)):
                    look(**filters)

    def test_blank_name_is_refused_wherever_the_interface_takes_one(self):
        names = {"consumer", "queue", "queues", "task", "tasks", "group", "key", "keys", "assigned_to", "name", "by"}
        others = {"list_jobs", "count_jobs"}  # which may look for any text
        others |= {"adopt", "declare_handlers", "declare_schedules", "move_to"}  # which take objects
        valid = {"job_id": self.queue.enqueue("t"), "job_ids": [1], "payloads": [1], "finished": []}
        valid |= {"max_pending": 5, "max_attempts": 1, "weight": 2, "max_wait_seconds": 9, "timeout_seconds": 9}
        valid |= {"completed": 9, "every_seconds": 9, "priority": 1, "keys": None}
        tested = set()
        for method, function in inspect.getmembers(self.queue, inspect.ismethod):
            parameters = inspect.signature(function).parameters
            for name in names & set(parameters) if method[0] != "_" and method not in others else ():
                tested.add(name)
                needed = {each for each, of in parameters.items() if of.default is of.empty and "**" not in str(of)}
                given = {each: valid.get(each, "x") for each in needed | (set(valid) & set(parameters))}
                for blank in (" ", "   ", "\t", "\n", "\u00a0", "\u2028", "\x00"):
                    refused = self.assertRaisesRegex(ValueError, "printable characters, not only spaces, got")
                    with self.subTest(method=method, name=name, blank=blank), refused:
                        function(**{**given, name: [blank] if name.endswith("s") else blank})
        self.assertEqual(tested, names)

    def test_handler_that_is_no_name_of_a_task_is_refused(self):
        for task in ("\ud800", "", 5):
            with self.assertRaisesRegex(
                ValueError, "expected a task name of 1 to 255 printable characters, not only spaces, got"
            ):
                self.queue.on_failed("default", task)
        self.assertEqual((self.queue.handlers(), self.queue.operations()), ({}, []))

    def test_misspelled_option_names_the_method(self):
        queue = self.queue
        for method in (queue.enqueue, queue.dequeue, queue.dequeue_many):
            message = rf"\.{method.__name__}\(\) got an unexpected keyword argument 'status'"
            with self.subTest(method=method.__name__), self.assertRaisesRegex(TypeError, message):
                method(status="failed")
        for method in (queue.list_jobs, queue.count_jobs):
            with self.assertRaisesRegex(TypeError, "expected the filters state, queue, .*, got status"):
                method(status="failed")

    def test_queue_in_which_nothing_begins_or_ends_though_jobs_are_due_is_stalled(self):
        queue = self.queue
        for number, name in enumerate(("idle", "idle", "begun", "done", "failed", "again", "late", "mine", "gone")):
            assigned_to = "w" if name == "mine" else None
            delay = 1000 if name == "late" else 0
            queue.enqueue("t", queue=name, delay_seconds=delay, assigned_to=assigned_to, now=10 + number)
            if name in ("begun", "done", "failed", "again"):
                queue.enqueue("t", queue=name, priority=1, now=10)
        queue.enqueue("u", queue="idle", now=95)
        self.assertEqual(queue.stalled(10), {})
        taken = {name: queue.dequeue("w", queues=[name], now=99) for name in ("begun", "done", "failed", "again")}
        self.assertEqual(queue.stalled(99), {("idle", "t"): 2, ("idle", "u"): 1, ("gone", "t"): 1})
        queue.complete(taken["done"], now=120)
        queue.fail(taken["failed"], "no", retry=False, now=120)
        queue.fail(taken["again"], "no", retry_in_seconds=1000, now=120)
        queue.cancel(queue.enqueue("t", queue="gone", now=20), now=120)
        idle = {("idle", "t"): 2, ("idle", "u"): 1}
        self.assertEqual(queue.stalled(120), {**idle, ("begun", "t"): 1})
        ended = dict.fromkeys([("begun", "t"), ("done", "t"), ("failed", "t"), ("again", "t"), ("gone", "t")], 1)
        self.assertEqual(queue.stalled(121), {**idle, **ended})
        for job_id in queue.enqueue_many("t", range(100), queue="events", now=50):
            queue.cancel(job_id, now=50)
        self.assertEqual(queue.stalled(120), {**idle, ("begun", "t"): 1, ("again", "t"): 1, ("gone", "t"): 1})

    def test_leases_that_ran_out_are_counted(self):
        self.queue.enqueue_many("t", range(3))
        for seconds in (10, 20, 30):
            self.queue.dequeue("w", lease_seconds=seconds, now=NOW)
        counts = [self.queue.count_expired(NOW + seconds) for seconds in (10, 11, 21, 31)]
        self.assertEqual(counts, [0, 1, 2, 3])
        consumers = [each.keys() for each in self.queue.consumers(job_ids=False)]
        self.assertEqual(consumers, [each.keys() - {"job_ids"} for each in self.queue.consumers()])

    def test_operator_sees_failures_grouped_by_task_and_error(self):
        for task, error in [("a", "ValueError: x\n  line 1"), ("a", "ValueError: x\n  line 2"), ("b", "ValueError: x")]:
            self.queue.enqueue(task)
            self.queue.fail(self.queue.dequeue("w"), error, retry=False)
        last = self.queue.enqueue("a")
        self.queue.mark_failed(last, "by hand")
        self.queue.fail(self.another(), "by hand")  # it is tried again
        groups = [(each["task"], each["error"], each["jobs"]) for each in self.queue.failures()]
        self.assertEqual(groups, [("a", "by hand", 1), ("b", "ValueError: x", 1), ("a", "ValueError: x", 2)])
        self.assertEqual(self.queue.failures()[0]["last_id"], last)
        self.assertEqual([each["last_hour"] for each in self.queue.failures()], [1, 1, 2])
        later = self.queue.now() + 3700
        self.assertEqual([each["last_hour"] for each in self.queue.failures(now=later)], [0, 0, 0])

    def test_operations_are_recorded_with_who_did_what_when_and_to_how_many_jobs(self):
        q, now = self.queue, self.queue.now()
        ids = q.enqueue_many("t", range(5))
        q.release(q.dequeue("w"))
        q.fail(q.dequeue("w"), "no")
        q.pause("default", by="ann")
        q.limit("default", 7, by="bob")
        q.limit("default", None)
        q.resume("default", by="ann")
        q.record("added consumers", by="eve", now=now + 50)
        q.cancel_where(ids=ids[:3], by="eve", now=now + 60)
        q.resubmit(ids[0], by="eve", now=now + 60)
        found = [(each["event"], each["actor"], each["jobs"], each["job_id"]) for each in q.operations()]
        self.assertEqual(
            found[:3],
            [("resubmitted", "eve", 1, ids[0]), ("cancelled", "eve", 3, ids[0]), ("added consumers", "eve", 0, 0)],
        )
        self.assertEqual(
            [each[:2] for each in found[3:]],
            [
                ("resumed queue default", "ann"),
                ("set limit of pending jobs of queue default to none", pqueue_values.operator_name(None)),
                ("set limit of pending jobs of queue default to 7", "bob"),
                ("paused queue default", "ann"),
            ],
        )
        self.assertEqual([each["at"] for each in q.operations(limit=2)], [now + 60] * 2)
        for job_id in ids[1:]:  # as a retry at a time and an edit of a finished job do
            if q.get(job_id).state == "cancelled":
                q.resubmit(job_id, by="eve", now=now + 62)
            q.change(job_id, priority=1, by="eve", now=now + 62)
        operation = q.operations(limit=1)[0]
        expected = ("changed priority, resubmitted", 4, ids[1])
        self.assertEqual((operation["event"], operation["jobs"], operation["job_id"]), expected)
        q.schedule("default", "t", every_seconds=60)
        for verb in (q.pause_schedule, q.resume_schedule, q.unschedule):
            verb("default", by="ann", now=now + 65)
        self.assertEqual({(each["actor"], each["at"]) for each in q.operations(limit=3)}, {("ann", now + 65)})
        for verb in (q.pause, q.resume, lambda *a, **o: q.limit(*a, 7, **o), lambda *a, **o: q.weigh(*a, "a", 2, **o)):
            verb("default", now=now + 70)
        self.assertEqual([each["at"] for each in q.operations(limit=4)], [now + 70] * 4)
        who = {"by": "ann", "now": now + 80}
        q.on_failed("default", "notify", **who)
        q.on_failed("default", None, **who)
        q.keep("default", completed="1h", failed=None, **who)
        q.expect("default", max_failed_share=0.5, **who)
        for _ in range(2):
            q.schedule("tick", "t", every_seconds=60, **who)
        found = [(each["event"], each["actor"], each["at"]) for each in q.operations(limit=5)]
        expected = ["saved schedule tick", "set thresholds of queue default: wait default, failed attempts 50%"]
        expected.append("set retention of queue default: completed 1 h, failed for ever")
        expected += [f"set failure handler of queue default: {each}" for each in ("none", "notify")]
        self.assertEqual(found, [(event, "ann", now + 80) for event in expected])
        q.pause("q" * 255, by="b" * 255)
        for wrong in ({"event": "x" * 2000}, {"event": "x", "by": ""}, {"event": 7}):
            with self.assertRaises(ValueError):
                q.record(**wrong)

    def test_copy_replaces_the_operations_of_its_target(self):
        job_id = self.queue.enqueue("t")
        self.queue.cancel(job_id, by="eve")
        self.queue.pause("default", by="eve")
        for in_steps in (False, True):
            target = self.target()
            for by in ("ann", "bob"):
                target.pause("old", by=by)
            if in_steps:
                self.queue.copy_finished_to(target)
            self.queue.copy_to(target)
            self.assertEqual(target.operations(), self.queue.operations())

    def test_history_says_when_each_attempt_began(self):
        job_id = self.queue.enqueue("t", now=NOW)
        self.queue.fail(self.queue.dequeue("w", now=NOW + 1), "no", retry_in_seconds=0, now=NOW + 3)
        self.queue.dequeue("w", now=NOW + 4)
        self.queue.cancel(job_id, now=NOW + 6)
        self.queue.resubmit(job_id, now=NOW + 7)
        began = [(each["started_at"], each["at"]) for each in self.queue.history(job_id)]
        self.assertEqual(began, [(NOW + 1, NOW + 3), (NOW + 4, NOW + 6), (None, NOW + 7)])

    def test_operator_sees_when_a_group_failed_first_and_last(self):
        now = self.queue.now()
        for age in (7200, 60, 600, 7000):
            self.queue.mark_failed(self.queue.enqueue("t", now=now - 9000), f"order {age} is gone", now=now - age)
        (group,) = self.queue.failures()
        shown = {"task": "t", "error": "order … is gone", "jobs": 4, "last_hour": 2, "last_id": 2}
        self.assertEqual(sum(group.pop("by_hour")), 4)
        self.assertEqual(group, {**shown, "first_at": now - 7200, "last_at": now - 60})

    def test_figures_agree_with_the_jobs_whatever_happens_to_them(self):
        for now in random_work(self.queue):
            self.compare_figures(now)

    def compare_figures(self, now):
        """Compare what the pages, the metrics and doctor count with the jobs, each read by itself."""
        q = self.queue
        jobs = q.list_jobs(limit=10_000, excerpt=0)
        states = Counter((job.queue, job.state) for job in jobs)
        stats = q.stats()
        for name, each in stats["queues"].items():
            self.assertEqual({s: each[s] for s in pqueue.STATES}, {s: states[name, s] for s in pqueue.STATES})
            due = [job.run_at for job in jobs if (job.queue, job.state) == (name, "pending")]
            self.assertEqual(each["oldest_pending_at"], min(due, default=None))
        self.assertEqual(stats["states"], {s: sum(job.state == s for job in jobs) for s in pqueue.STATES})
        free = [job for job in jobs if job.state == "pending" and job.assigned_to is None]
        self.assertEqual(q.pending_tasks(), dict(Counter((job.queue, job.task) for job in free)))
        for name, found in q.count_groups(now=now).items():
            self.assertEqual(found["pending"], len({job.group for job in free if job.queue == name}), name)
            running = Counter(job.group for job in jobs if (job.queue, job.state) == (name, "processing"))
            full = sum(number >= 2 for number in running.values()) if name == "b" else 0
            self.assertEqual(found["at_max_running"], full)
        self.assertEqual(sum(each["jobs"] for each in q.failures()), stats["states"]["failed"])
        finished = Counter((job.queue, job.state) for job in jobs if job.state in pqueue.FINISHED)
        kept = {
            (each["queue"], each["state"]): each["added"] for each in q.retention(within_seconds=10**9, now=now + 1)
        }
        self.assertEqual({key: number for key, number in kept.items() if number}, dict(finished))

    def test_last_job_of_a_group_is_the_one_that_failed_last(self):
        """Whatever its id: an older job may fail last after it was resubmitted, and errors are folded twice."""
        now, chance = self.queue.now(), random.Random(1)
        ids = self.queue.enqueue_many("t", range(30), now=now - 9000)
        at = {}
        for turn in range(60):
            job_id = chance.choice(ids)
            if job_id in at:
                self.queue.resubmit(job_id, now=now - 8000 + turn)
            at[job_id] = now - 7200 + chance.choice((turn * 100, 5000, 0.25 * turn))
            self.queue.mark_failed(
                job_id, f"order <{chance.randrange(40)}> {'in' * (turn % 2)} 0x{turn:x}", now=at[job_id]
            )
        failed = {job.id: job for job in self.queue.list_jobs(state="failed")}
        groups = {}
        for job_id, job in failed.items():
            groups.setdefault(pqueue_search.fingerprint(job.error), []).append((job.finished_at, job_id))
        found = self.queue.failures()
        self.assertEqual(
            {g["error"]: (g["last_at"], g["last_id"]) for g in found}, {k: max(v) for k, v in groups.items()}
        )
        self.assertEqual(
            [g["last_id"] for g in found], [job_id for _, job_id in sorted(map(max, groups.values()))[::-1]]
        )

    def test_operator_sees_in_which_of_the_last_hours_a_group_failed(self):
        now = 1_800_000_000.0 // 3600 * 3600
        failed = [(0.0, "row 1"), (59.0, "row 2"), (-0.001, "row 3"), (-3600.0, "row <4>"), (-86399.0, "row 5")]
        for at, error in [*failed, (-23 * 3600.0, "row 6"), (-23 * 3600.0 - 0.001, "row 7"), (7000.0, "row 8")]:
            self.queue.mark_failed(self.queue.enqueue("t", now=now - 9e4), error, now=now + at)
        self.queue.mark_failed(self.queue.enqueue("old", now=now - 9e6), "no", now=now - 9e5)
        found = {(each["task"], each["error"]): each["by_hour"] for each in self.queue.failures(now=now + 60)}
        zeros = [0] * 24
        self.assertEqual(
            found, {("t", "row …"): [1, *zeros[:21], 1, 3], ("t", "row <…>"): [*zeros[:22], 1, 0], ("old", "no"): zeros}
        )
        (moved, *_) = (each["by_hour"] for each in self.queue.failures(now=now + 3600))
        self.assertEqual(moved, [*zeros[:21], 1, 2, 1])

    def test_errors_that_differ_in_variable_parts_only_are_one_group(self):
        groups = [
            ("order … declined (…) again", "order 228 declined (1) again"),
            ("KeyError: …", "KeyError: 'ann'", 'KeyError: "it\'s"', "KeyError: 'cut"),
            ("order … declined (…)", "order 228 declined (1.5)", "order 7 declined (12:30:01)"),
            ("no file … at …", "no file /tmp/a b.txt at x/y.z".replace(" b", "b"), "no file ~/c at ../d"),
            ("no page …", "no page https://example.org/1?a=b", "no page postgres://u:secret@h/db"),
            ("id … is gone", "id 3f2a9c1d-0000-4000-8000-123456789abc is gone", "id 0xDEAD is gone"),
            (
                "can't read I/O state: retry=… later",
                "can't read I/O state: retry=no later",
                "can't read I/O state: retry=yes later\n  line 2",
            ),
            ("x" * 100, "x" * 99 + "x", "x" * 101, "x" * 300),
            ("…", "", "7", "\n  line 2", "\t"),
        ]
        ids: dict[str, list[int]] = {}
        for error, *members in groups:
            for member in members:
                ids.setdefault(error, []).append(self.queue.enqueue("t"))
                self.queue.mark_failed(ids[error][-1], member)
            self.queue.mark_failed(self.queue.enqueue("other"), members[0])
        found = {each["error"]: each["jobs"] for each in self.queue.failures() if each["task"] == "t"}
        self.assertEqual(found, {error: len(members) for error, members in ids.items()})
        for error, members in ids.items():
            self.assertEqual([job.id for job in self.queue.list_jobs(task="t", fingerprint=error)], members[::-1])
            self.assertEqual(self.queue.count_jobs(state="failed", fingerprint=error), len(members) + 1)
        error, members = next(iter(ids.items()))
        self.assertEqual(self.queue.resubmit_where(state="failed", task="t", fingerprint=error), len(members))
        self.assertEqual({job.id for job in self.queue.list_jobs(state="pending")}, set(members))

    def test_error_that_begins_with_a_traceback_is_grouped_by_its_exception(self):
        head, frame = "Traceback (most recent call last):\n", '  File "tasks.py", line 7, in mail\n    ^^^^\n'
        quoted = f"RuntimeError: {head}{frame}ValueError: row 7"  # of a task that raises what a process has printed
        of_group = (
            "  + Exception Group " + head + "  |   File x\n  | ExceptionGroup: two (2 sub-exceptions)\n  +-+---- 1\n"
        )
        groups = [
            (
                "ValueError: no …",
                f"{head}{frame}ValueError: no 7\n",
                f"{head}  File x\nValueError: no 8\n  ^ here\nand more",
                f"\n{head}{frame}ValueError: no 9\n",
                f'\n"""\n{head}{frame}ValueError: no 10\n"""\n',
                f'"""\n{head}{frame}KeyError: 1\n"""\n\nThe above exception …\n\n{head}{frame}ValueError: no 11\n',
            ),
            ("smtplib.Gone", f"{head}{frame}KeyError: 1\n\nDuring handling, another one:\n\n{head}{frame}smtplib.Gone"),
            ("ExceptionGroup: two (… sub-exceptions)", of_group),
            ("RuntimeError: ValueError: row …", quoted, f"{quoted}\n\n{head}{frame}{quoted}"),
            ("Traceback (most recent call last):", head, head + frame),  # the exception is missing
        ]
        for _, *errors in groups:
            for error in errors:
                self.queue.enqueue("t")
                self.queue.fail(self.queue.dequeue("w"), error, retry=False)
                shown = self.queue.list_jobs(limit=1)[0].error
                self.assertTrue(shown.endswith(error), shown)
        self.assertEqual(
            {each["error"]: each["jobs"] for each in self.queue.failures()}, {g[0]: len(g) - 1 for g in groups}
        )
        frames = head + frame * 1000 + "ValueError: far below"
        self.queue.mark_failed(self.queue.enqueue("t"), frames)
        self.assertEqual(self.queue.failures()[0]["error"], "ValueError: far below")

    def test_search_finds_jobs_in_any_of_several_states(self):
        ids = self.queue.enqueue_many("t", range(4))
        self.queue.cancel(ids[0])
        self.queue.mark_failed(ids[1])
        self.queue.dequeue("w")
        for states, found in [
            (["failed"], ids[1:2]),
            (["failed", "cancelled"], ids[:2]),
            (("pending", "failed", "failed"), [ids[1], ids[3]]),
            (pqueue.STATES, ids),
        ]:
            self.assertEqual([job.id for job in self.queue.list_jobs(state=states)], found[::-1])
            self.assertEqual([job.id for job in self.queue.list_jobs(state=states, text="")], found[::-1])
            self.assertEqual(self.queue.count_jobs(state=states, task="t"), len(found))
        for wrong in ([], ["failed", "nosuch"], "failed,pending", [7]):
            with self.assertRaises(ValueError):
                self.queue.list_jobs(state=wrong)

    def counted(self, *when, **options):
        """Return the numbers that are not 0, by period, queue and task."""
        found = self.queue.outcomes(*when, **options)
        return {
            (each.at, each.queue, each.task): {name: n for name in pqueue_outcomes.EVENTS if (n := getattr(each, name))}
            for each in found
        }

    def test_outcome_is_counted_in_its_minute_by_queue_and_task(self):
        queue = self.queue
        queue.enqueue("a", now=100)
        queue.enqueue_many("a", range(3), now=130)
        queue.enqueue("b", queue="other", max_attempts=2, now=130)
        queue.complete(queue.dequeue("w", now=110), now=112)
        jobs = queue.dequeue_many("w", 9, queues=["default"], now=190)
        queue.complete_and_dequeue([(job, None) for job in jobs], "w", 0, now=190.5)
        queue.fail(queue.dequeue("w", now=200), "no", retry_in_seconds=1, now=201)
        queue.fail(queue.dequeue("w", now=250), "no", now=260)
        by_minute = {
            (60.0, "default", "a"): {"enqueued": 1, "completed": 1},
            (120.0, "default", "a"): {"enqueued": 3},
            (120.0, "other", "b"): {"enqueued": 1},
            (180.0, "default", "a"): {"completed": 3},
            (180.0, "other", "b"): {"retried": 1},
            (240.0, "other", "b"): {"failed": 1},
        }
        self.assertEqual(self.counted(step_seconds=60), by_minute)
        self.assertEqual(self.counted(119, 240, step_seconds=60).keys(), set(list(by_minute)[:5]))
        whole = {(0.0, "default", "a"): {"enqueued": 4, "completed": 4}}
        whole[0.0, "other", "b"] = {"enqueued": 1, "failed": 1, "retried": 1}
        self.assertEqual(self.counted(), whole)
        one, other = queue.outcomes()
        self.assertEqual((one.wait.number, one.wait.seconds, one.run.number, one.run.seconds), (4, 190, 4, 3.5))
        self.assertEqual((other.wait.number, other.wait.seconds, other.run.number), (2, 118, 0))
        self.assertEqual((one.failed_share, other.failed_share), (0, 1))
        for wrong in (0, 59, 90):
            with self.assertRaisesRegex(ValueError, f"expected step_seconds to be a multiple of 60, got {wrong}"):
                queue.outcomes(step_seconds=wrong)

    def test_time_is_counted_in_the_first_bucket_that_holds_it(self):
        for run, wait in ((0.001, 0), (0.0011, 3), (3.1, 3000), (4000, 3001)):
            self.queue.enqueue("t", now=1000)
            self.queue.complete(self.queue.dequeue("w", now=1000 + wait, lease_seconds=9999), now=1000 + wait + run)
        (found,) = self.queue.outcomes()
        self.assertEqual(found.run.counts, (1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1))
        self.assertEqual(found.wait.counts, (1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1))
        self.assertEqual((found.run.quantile(0.5), found.wait.quantile(1)), (0.003, 3000))
        nothing = pqueue.Outcomes(0, "", "")
        self.assertIsNone(nothing.run.quantile(0.5))
        self.assertEqual(nothing.plus(nothing), nothing)

    def test_batch_of_unlike_jobs_is_counted_by_task_and_time(self):
        queue = self.queue
        for task, at in (("t", 100), ("t", 160), ("u", 170), ("t", 180)):
            queue.enqueue(task, now=at)
        jobs = queue.dequeue_many("w", 9, now=180)
        queue.complete_and_dequeue([(job, None) for job in jobs], "w", 0, now=181)
        found = {each.task: (each.completed, each.wait, each.run.seconds) for each in queue.outcomes()}
        wait = pqueue_outcomes.Times((1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0), 100.0)
        self.assertEqual(found["t"], (3, wait, 3.0))
        self.assertEqual(found["u"][0], 1)

    def test_every_end_of_an_attempt_and_of_a_job_is_counted(self):
        queue = self.queue
        queue.release(self.taken(), now=NOW)
        queue.release(queue.dequeue("worker", now=NOW), delay_seconds=5, now=NOW)
        queue.dequeue("worker", now=NOW + 5)
        queue.mark_failed(queue.dequeue("worker", now=NOW + 70).id, now=NOW + 70)  # its lease ran out
        queue.cancel(queue.enqueue("t", now=NOW), now=NOW)
        self.taken(max_attempts=1)
        self.assertIsNone(queue.dequeue("worker", now=NOW + 70))  # likewise
        with self.assertRaises(InvalidTransition):
            queue.cancel(1, now=NOW)
        queue.enqueue("t", after=[queue.enqueue("t", now=NOW, max_attempts=1, priority=9)], now=NOW)
        queue.fail(queue.dequeue("worker", now=NOW + 70), "no", now=NOW + 70)  # and so does the other
        whole = {"enqueued": 5, "failed": 4, "retried": 1, "released": 2, "expired": 2, "cancelled": 1}
        self.assertEqual(self.counted()[0.0, "default", "t"], whole)

    def test_resubmit_prune_delete_and_rollback_change_no_count(self):
        queue = self.queue
        for n in range(4):
            queue.enqueue("t", now=NOW)
            job = queue.dequeue("w", now=NOW)
            queue.complete(job, now=NOW) if n % 2 else queue.fail(job, "no", retry=False, now=NOW)
        before = self.counted(step_seconds=60)
        self.assertEqual(list(before.values()), [{"enqueued": 4, "completed": 2, "failed": 2}])
        with suppress(ZeroDivisionError), queue.transaction():
            queue.enqueue("t", now=NOW)
            queue.complete(queue.dequeue("w", now=NOW), now=NOW)
            raise ZeroDivisionError
        queue.enqueue("keep", queue="keep", now=NOW)
        queue.resubmit(1, now=NOW)
        queue.resubmit(2, now=NOW)
        queue.prune(0, now=NOW + 1)
        queue.delete_jobs([2])
        queue.enqueue("keep", queue="keep", now=NOW)
        queue.delete_jobs(force=True)
        after = self.counted(step_seconds=60)
        self.assertEqual(after.pop((NOW, "keep", "keep")), {"enqueued": 2})
        self.assertEqual(after, before)
        queue.enqueue("t", now=NOW)  # on SQLite under an id that was used before
        self.assertEqual(self.counted()[0.0, "default", "t"]["enqueued"], 5)

    def test_completion_is_counted_once_whatever_the_order_of_times_batches_and_resubmits(self):
        queue, choice = self.queue, random.Random(7)
        completed: Counter[float] = Counter()
        ids = queue.enqueue_many("t", range(400), now=0)
        for parent in ids[:110:7]:
            queue.enqueue("u", queue="other", after=[parent], now=0)
        for turn, number in enumerate((1, 40, 12, 33, 5, 31, 1, 60, 12, 90, 9, 1, 40, 12, 8)):
            if number != 9:  # which are completed at the same time as those before them
                at = NOW + 20 * turn - (200 if number == 12 else choice.choice((0, 0, 0, 10, 45, 100)))
            jobs = queue.dequeue_many("w", number, queues=["default"], now=at)
            if number > 8:
                queue.complete_and_dequeue([(job, None) for job in jobs], "w", 0, now=at)
            for job in jobs if number <= 8 else ():
                queue.complete(job, now=at)
            completed[at // 60 * 60] += len(jobs)
            done = [job.id for job in queue.list_jobs(state="completed", limit=1000)]
            if turn == 6:
                queue.delete_jobs(done, force=True)
            elif turn % 2:
                queue.resubmit(done[0], now=at)
            found = self.counted(NOW - 600, step_seconds=60).items()
            counts = {at: each["completed"] for (at, name, _), each in found if name == "default"}
            self.assertEqual(counts, completed)

    def test_job_that_changes_its_queue_stays_counted_where_it_was_enqueued(self):
        job = self.queue.enqueue("t", now=NOW)
        self.queue.change(job, queue="other", now=NOW)
        self.queue.complete(self.queue.dequeue("w", now=NOW), now=NOW)
        found = {(0.0, "default", "t"): {"enqueued": 1}, (0.0, "other", "t"): {"completed": 1}}
        self.assertEqual(self.counted(), found)

    def test_counts_are_added_up_to_hours_after_72_hours_which_are_deleted_after_90_days(self):
        queue, start = self.queue, 1_800_003_600.0 - 1_800_003_600.0 % 3600
        for minute in (0, 1, 59, 60):
            queue.enqueue("t", now=start + 60 * minute)
            queue.complete(queue.dequeue("w", now=start + 60 * minute), now=start + 60 * minute)
        minutes = self.counted(step_seconds=60)
        queue.heartbeat("w", now=start + 72 * 3600)
        self.assertEqual(self.counted(step_seconds=60), minutes)
        for later in (73 * 3600, 74 * 3600):
            queue.heartbeat("w", now=start + later)
        hours = {(start + at, "default", "t"): {"enqueued": n, "completed": n} for at, n in ((0, 3), (3600, 1))}
        self.assertEqual(self.counted(step_seconds=60), hours)
        self.assertEqual(self.counted(start, step_seconds=3600), hours)
        queue.prune(0, now=start + 90 * 86400 + 3600)
        self.assertEqual(list(self.counted(start, step_seconds=3600)), [(start + 3600, "default", "t")])
        for _ in range(2):
            queue.prune(0, now=start + 91 * 86400)
        self.assertEqual(self.counted(start), {})
        self.assertEqual(self.counted(), {(0.0, "default", "t"): {"enqueued": 4, "completed": 4}})

    def test_new_jobs_are_counted_in_their_minute_only(self):
        start = NOW - NOW % 3600
        for at in (0, 60, 120):
            self.queue.enqueue("t", now=start + at)
        for since, until, number in ((start + 60, start + 120, 1), (start, start + 120, 2), (start + 60, None, 2)):
            self.assertEqual(pqueue_outcomes.total(self.queue.outcomes(since, until)).enqueued, number)
        self.assertEqual(pqueue_outcomes.total(self.queue.outcomes(None, start + 120)).enqueued, 2)

    def test_total_is_that_of_its_minutes_however_late_they_are_counted(self):
        queue, start = self.queue, NOW - NOW % 3600

        def work(at):
            queue.enqueue_many("t", range(2), max_attempts=1, now=at)
            queue.complete(queue.dequeue("w", now=at + 1), now=at + 2)
            queue.fail(queue.dequeue("w", now=at + 1), "no", now=at + 3)

        def agree():
            for until in (None, start, start + 60, start + 3600, start + 9000):
                whole = pqueue_outcomes.total(queue.outcomes(0, until))
                self.assertEqual(pqueue_outcomes.total(queue.outcomes(until=until)), whole)
            return whole.completed

        for number, at in enumerate((0, 30, 3600, 60, 7200, 0), 1):  # some after later minutes were added to the total
            work(start + at)
            self.assertEqual(agree(), number)
            queue.heartbeat("w", now=start + at + 300)
            self.assertEqual(agree(), number)
        for _ in range(4):
            queue.heartbeat("w", now=start + 90 * 3600)
        self.assertEqual({each.at % 3600 for each in queue.outcomes(0, step_seconds=60)}, {0})
        self.assertEqual(agree(), 6)
        work(start)
        queue.heartbeat("w", now=start + 90 * 3600)
        self.assertEqual(agree(), 7)
        target = self.target()
        queue.copy_to(target)
        target.heartbeat("w", now=start + 90 * 3600)
        self.assertEqual(target.outcomes(), queue.outcomes())

    def test_total_is_read_without_its_minutes(self):
        queue = self.queue
        for n in range(5):
            queue.enqueue("t", now=NOW + 60 * n)
            queue.complete(queue.dequeue("w", now=NOW + 60 * n), now=NOW + 60 * n)
        queue.heartbeat("w", now=NOW + 600)
        with queue._transaction() as session:
            session.change("DELETE FROM outcomes WHERE period = 60")
            (found,) = queue.outcomes()
        self.assertEqual((found.enqueued, found.completed, found.run.number), (5, 5, 5))

    def test_counts_are_copied_and_go_on_in_the_copy(self):
        queue = self.queue
        queue.complete(self.taken(), now=NOW)
        for later in (60, 3600):  # in pages of an hour
            queue.enqueue("t", now=NOW + later)
        target = self.target()
        queue.copy_to(target)
        self.assertEqual(target.outcomes(step_seconds=60), queue.outcomes(step_seconds=60))
        target.enqueue("t", now=NOW + 60)
        self.assertEqual(target.outcomes()[0].enqueued, 4)

    def test_operator_says_what_is_expected_of_a_queue(self):
        queue = self.queue
        queue.expect("slow", max_wait_seconds=timedelta(hours=1), max_failed_share=0.5)
        queue.enqueue("t", now=NOW)
        expected = {"default": (600, 0.2), "slow": (3600, 0.5)}
        self.assertEqual(queue.expectations(), expected)
        target = self.target()
        queue.copy_to(target)
        self.assertEqual(target.expectations(), expected)
        queue.expect("slow")
        self.assertEqual(queue.expectations()["slow"], (600, 0.2))
        for wrong in ({"max_wait_seconds": 0}, {"max_failed_share": 1.1}, {"max_failed_share": float("nan")}):
            with self.assertRaisesRegex(ValueError, f"expected {next(iter(wrong))}"):
                queue.expect("slow", **wrong)

    def before_each_read(self, act):
        """Act before whatever the queue reads by itself from now on."""
        queue, read = self.queue, type(self.queue)._read

        def patched(*arguments):
            del queue._read
            act()
            queue._read = patched
            return read(queue, *arguments)

        queue._read = patched
        self.addCleanup(queue.__dict__.pop, "_read", None)

    def test_jobs_that_change_their_state_while_they_are_counted_are_counted_once(self):
        verbs = ["resubmit", "cancel", "assign", "mark_failed", "resubmit", "assign"]
        other = self.reopen()
        ids = other.enqueue_many("t", range(12))
        other.cancel(ids[0])
        turns = itertools.count()

        def change():
            turn = next(turns)
            for number, job_id in enumerate(ids):
                with suppress(InvalidTransition):
                    verb = verbs[(turn + number) % len(verbs)]
                    getattr(other, verb)(job_id, *([("ann", None)[turn % 2]] if verb == "assign" else []))

        self.before_each_read(change)
        for _ in range(10):
            self.assertEqual(sum(self.queue.stats()["states"].values()), len(ids))
        for flip in ("ann", None) * 5:
            for job_id in ids:
                with suppress(InvalidTransition):
                    other.resubmit(job_id)
            self.before_each_read(lambda flip=flip: [other.assign(job_id, flip) for job_id in ids])
            self.assertEqual(self.queue.count_jobs(state="pending"), len(ids))

    def test_consumer_that_completes_its_job_and_leaves_meanwhile_is_not_shown_holding_it(self):
        for ends in (1, 2, 3):
            with self.subTest(ends=ends):
                other, reads = self.open(), itertools.count(1)
                other.enqueue("t")
                job = other.dequeue("w")

                def leave(reads=reads, ends=ends, other=other, job=job):
                    if next(reads) == ends:
                        other.complete(job)
                        other.close()

                self.before_each_read(leave)
                for each in self.queue.consumers():
                    self.assertFalse(each["state"] != "running" and each["job_ids"], each)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_child_that_closes_the_queue_leaves_its_parent_its_consumer_and_job(self):
        self.queue.enqueue("t", now=NOW)
        job = self.queue.dequeue("w", now=NOW)
        child = os.fork()
        if child == 0:
            code = 1
            with suppress(Exception):
                self.queue.close()
                code = 0
            os._exit(code)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual([each["state"] for each in self.queue.consumers()], ["running"])
        self.queue.complete(job, now=NOW)

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_shared_consumer_keeps_the_jobs_of_its_children_until_it_is_closed(self):
        ids = self.queue.enqueue_many("t", range(4))
        shared = self.queue.share("w")

        def work(*, close):
            self.queue.adopt(shared)
            self.queue.dequeue("w", prefetch=True)
            if close:
                self.queue.close()

        for close in (False, True):
            shared.children += 1
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(close=close)
                    code = 0
                finally:
                    os._exit(code)
            self.assertEqual(os.waitpid(child, 0)[1], 0)
        held = sorted(self.queue.held_jobs("w"))
        self.assertEqual([job.id for job in held], ids[:2])
        self.assertEqual(len({job.lease_token for job in held}), 2)
        other = self.reopen()
        self.assertEqual(other.dequeue("other").id, ids[2])
        (mine,) = (each for each in other.consumers() if each["name"] == "w")
        self.assertEqual((mine["state"], mine["pid"], mine["job_ids"]), ("running", os.getpid(), ids[:2]))
        other.cancel(ids[0])
        self.assertEqual([self.queue.holds(job) for job in held], [False, True])
        self.queue.heartbeat("w", completed=3)
        self.queue.close()
        (mine,) = (each for each in other.consumers() if each["name"] == "w")
        self.assertEqual((mine["state"], mine["completed"]), ("stopped", 3))
        self.assertEqual((other.get(ids[1]).state, other.get(ids[1]).attempts), ("pending", 0))
        self.assertEqual(other.held_jobs("w"), [])

    @unittest.skipUnless(hasattr(os, "fork"), "needs fork")
    def test_jobs_of_a_shared_consumer_are_back_once_its_processes_have_ended(self):
        job_id = self.queue.enqueue("t")
        seconds = 1 if self.polls else 3600  # a pooler keeps no locks: only the lease ends
        parent = os.fork()
        if parent == 0:
            code = 1
            with suppress(Exception):
                shared = self.queue.share("w")
                shared.children += 1
                child = os.fork()
                if child == 0:
                    self.queue.adopt(shared)
                    os._exit(self.queue.dequeue("w", lease_seconds=seconds).id - job_id)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os._exit(code)
        self.assertEqual(os.waitpid(parent, 0)[1], 0)
        self.assertEqual(wait_until(lambda: self.queue.dequeue("other")).id, job_id)

    def test_unfinished_payloads_are_those_of_one_moment(self):
        other = self.reopen()
        ids = other.enqueue_many("t", range(250)) + [other.enqueue("t", "later", delay_seconds=60)]
        other.complete(other.dequeue("w"))
        running = other.dequeue("w")
        flip = itertools.cycle([lambda: other.assign(running.id, None), lambda: other.mark_failed(ids[200])])

        def change():
            with suppress(InvalidTransition):
                next(flip)()

        self.before_each_read(change)
        found = sorted(map(str, self.queue.unfinished_payloads()))
        self.assertEqual(found, sorted([*map(str, range(1, 250)), "later"]))

    def test_exclusive_block_keeps_what_it_has_read_unchanged(self):
        other = self.open(busy_seconds=0.1)
        for chosen in (True, False):
            job_id = self.queue.enqueue("t")
            with self.subTest(chosen=chosen), self.queue.exclusive([job_id] if chosen else None):
                before = self.queue.get(job_id)
                with self.assertRaises(QueueBusy):
                    other.cancel(job_id)
                if not chosen:
                    with self.assertRaises(QueueBusy):
                        other.enqueue("t")
                self.assertEqual(self.queue.get(job_id), before)
                self.queue.cancel(job_id)
            self.assertEqual(other.get(job_id).state, "cancelled")

    def test_jobs_are_found_by_their_ids_and_other_filters(self):
        ids = self.queue.enqueue_many("t", range(5))
        self.queue.cancel(ids[1])
        found = self.queue.list_jobs(ids=ids[:3], state="pending")
        self.assertEqual([job.id for job in found], [ids[2], ids[0]])
        self.assertEqual(self.queue.count_jobs(ids=[]), 0)
        with self.assertRaises(ValueError):
            self.queue.list_jobs(ids=["1) OR (1"])

    def test_stats_bear_a_queue_that_appears_meanwhile(self):
        read, other, names = self.queue._read, self.reopen(), itertools.count()

        def read_late(sql, *params):
            rows = read(sql, *params)
            other.enqueue("t", queue=f"queue {next(names)}")
            return rows

        with mock.patch.object(self.queue, "_read", read_late):
            self.assertLessEqual(self.queue.stats()["states"]["pending"], next(names))

    def test_stats_count_each_state_per_queue(self):
        self.queue.enqueue_many("t", range(3), queue="a", run_at=NOW - 7, now=NOW)
        self.queue.enqueue("t", run_at=NOW + 9, now=NOW)
        self.queue.dequeue("w", queues=["a"], now=NOW)
        stats = self.queue.stats()
        self.assertEqual(stats["states"]["pending"], 2)
        self.assertEqual(stats["queues"]["a"]["processing"], 1)
        self.assertEqual(stats["queues"]["default"]["scheduled"], 1)
        self.assertEqual(stats["oldest_pending_at"], NOW - 7)

    def test_stats_find_the_oldest_job_also_if_it_has_been_due_since_1970(self):
        for assigned_to, at in ((None, 0), ("w", 5)):
            self.queue.enqueue("t", run_at=at, assigned_to=assigned_to, now=NOW)
        stats = self.queue.stats()
        self.assertEqual((stats["oldest_pending_at"], stats["queues"]["default"]["oldest_pending_at"]), (0, 0))

    def test_registry_shows_which_consumer_holds_which_jobs(self):
        job_id = self.queue.enqueue("t", queue="q")
        self.queue.dequeue("w", queues=["q"], tasks=["u", "t"])
        self.queue.heartbeat("w", completed=4, failed=1, now=NOW - 1)
        self.queue.heartbeat("w", now=NOW)
        (me,) = self.queue.consumers()
        self.assertEqual(me["tasks"], ["u", "t"])
        self.assertEqual((me["name"], me["pid"], me["queues"]), ("w", os.getpid(), ["q"]))
        self.assertEqual((me["completed"], me["failed"], me["last_seen_at"]), (4, 1, NOW))
        self.assertEqual((me["state"], me["job_ids"]), ("running", [job_id]))

    def test_prune_keeps_the_newest_job_so_that_no_id_is_given_twice(self):
        ids = self.queue.enqueue_many("t", range(2), now=NOW)
        for job_id in ids:
            self.queue.cancel(job_id, now=NOW)
        self.assertEqual(self.queue.prune(0, now=NOW + 100), 1)
        self.assertEqual([job.id for job in self.queue.list_jobs()], ids[1:])

    def test_operator_without_an_account_is_recorded_by_number(self):
        job_id = self.queue.enqueue("t")
        with mock.patch("getpass.getuser", side_effect=KeyError):
            self.queue.cancel(job_id)
        self.assertEqual(self.queue.history(job_id)[0]["actor"], f"uid {os.getuid()}")

    def test_prune_forgets_consumers_that_are_long_gone(self):
        leaver = self.reopen()
        leaver.dequeue("leaver")
        leaver.close()
        self.queue.dequeue("stayer")
        self.queue.prune(0, now=time.time() + 1)
        self.assertEqual([each["name"] for each in self.queue.consumers()], ["stayer"])

    def test_prune_remembers_consumers_that_left_a_moment_ago(self):
        self.queue.dequeue("w")
        self.queue.leave("w")
        self.queue.prune(60)
        self.assertEqual([each["name"] for each in self.queue.consumers()], ["w"])

    def test_consumer_that_takes_leave_gives_its_jobs_back(self):
        queue = self.reopen()
        job_id = self.queue.enqueue("t")
        queue.dequeue("leaver")
        queue.close()
        again = wait_until(lambda: self.queue.dequeue("stayer"))
        self.assertEqual(again.id, job_id)
        self.assertIn("stopped", [each["state"] for each in self.queue.consumers()])

    # Waiting

    def test_queue_closes_at_once_after_a_wait_for_a_result(self):
        with mock.patch("pqueue_results.LINGER_SECONDS", 1000.0):
            queue = self.reopen()
            done = queue._wait_for(queue.enqueue("t"))
            self.queue.complete(self.queue.dequeue("w"))
            done.result(PATIENCE_SECONDS)
            wait_until(lambda: queue._waits._changed._waiters)  # its thread, for another call
            closing = threading.Thread(target=queue.close, daemon=True)
            closing.start()
            closing.join(PATIENCE_SECONDS)
            self.assertFalse(closing.is_alive())

    def test_waiting_consumer_wakes_for_a_job(self):
        producer = self.reopen()
        thread = threading.Timer(0.1, producer.enqueue, ["t"])
        thread.start()
        self.addCleanup(thread.join)
        self.assertTrue(any(self.queue.wait(1, consumer="w") for _ in range(20)))
        self.assertIsNotNone(wait_until(lambda: self.queue.dequeue("w")))

    def test_waiting_consumer_wakes_whatever_makes_a_job_pending(self):
        q, waiter, source = self.queue, self.reopen(), self.target()
        waiter.dequeue("w")

        def taken():
            q.enqueue("t", now=NOW)
            return q.dequeue("other", now=NOW)

        def finished():
            job = taken()
            q.complete(job, now=NOW)
            return job

        def paused():
            q.pause("default")
            q.enqueue("t", now=NOW)

        def in_transaction():
            with q.transaction():
                q.enqueue("t", now=NOW)

        def parent():
            parent = taken()
            q.enqueue("t", after=[parent.id], now=NOW)
            return parent

        def unreadable():
            q.on_failed("default", "notify")
            job_id = q.enqueue("t", assigned_to="other", now=NOW)
            with q.transaction() as db:
                self.execute(db, "UPDATE jobs SET payload = :text WHERE id = :id", text="9" * 5000, id=job_id)

        def paused_schedule():
            q.schedule("daily", "t", every_seconds=86400)
            q.pause_schedule("daily")

        cases = {  # what is done before it waits, and what wakes it
            "enqueue": (lambda: None, lambda _: q.enqueue("t", now=NOW)),
            "enqueue with a key": (lambda: None, lambda _: q.enqueue("t", key="k", now=NOW)),
            "enqueue in a new queue": (lambda: None, lambda _: q.enqueue("t", queue="new", now=NOW)),
            "enqueue_many": (lambda: None, lambda _: q.enqueue_many("t", [1], now=NOW)),
            "enqueue_many within a limit": (
                lambda: q.limit("limited", 5),
                lambda _: q.enqueue_many("t", [1], queue="limited", now=NOW),
            ),
            "enqueue in a transaction": (lambda: None, lambda _: in_transaction()),
            "release": (taken, lambda job: q.release(job, now=NOW)),
            "fail": (taken, lambda job: q.fail(job, "no", retry_in_seconds=0, now=0)),
            "lease over": (taken, lambda _: q.dequeue_many("other", 0, now=NOW + 61)),
            "due": (lambda: q.enqueue("t", run_at=NOW + 9, now=NOW), lambda _: q.dequeue_many("o", 0, now=NOW + 9)),
            "resume": (paused, lambda _: q.resume("default")),
            "resubmit": (finished, lambda job: q.resubmit(job.id, now=NOW)),
            "assign": (lambda: q.enqueue("t", assigned_to="x", now=NOW), lambda job_id: q.assign(job_id, "w")),
            "leave": (taken, lambda _: q.leave("other")),
            "replace": (
                lambda: q.enqueue("t", key="r", run_at=NOW + 9, now=NOW),
                lambda _: q.enqueue("t", key="r", on_conflict="replace", now=NOW),
            ),
            "complete the parent": (parent, lambda job: q.complete(job, now=NOW)),
            "cancel_move": (lambda: (q.enqueue("t", now=NOW), q.begin_move("elsewhere")), lambda _: q.cancel_move()),
            "move_to": (lambda: source.enqueue("t"), lambda _: source.move_to(q)),
            "finish_move": (lambda: source.enqueue("late"), lambda _: source.finish_move(q)),
        }
        if not self.polls:  # after these, no job is pending when it looks
            cases |= {
                "handler of a job that cannot be read": (unreadable, lambda _: q.dequeue("other", now=NOW)),
                "schedule": (lambda: None, lambda _: q.schedule("daily", "t", every_seconds=86400)),
                "resume_schedule": (paused_schedule, lambda _: q.resume_schedule("daily")),
            }
        longest = 0.2 if self.polls else 2 * PATIENCE_SECONDS  # so that it is not the timeout that wakes it
        for case, (prepare, wake) in cases.items():
            with self.subTest(case):
                q.delete_jobs(force=True)
                asked, woken_up, prepared = threading.Event(), [], prepare()
                read = waiter._read

                def asking(*arguments, read=read, asked=asked):
                    rows = read(*arguments)
                    asked.set()  # it is about to sleep, and hears of what happens from now on
                    return rows

                def wait(woken_up=woken_up):
                    while not (woken := waiter.wait(longest, consumer="w")) and self.polls:
                        pass
                    woken_up.append(woken)

                with mock.patch("pqueue.WAIT_SECONDS", longest), mock.patch.object(waiter, "_read", asking):
                    thread = threading.Thread(target=wait)
                    thread.start()
                    self.assertTrue(asked.wait(PATIENCE_SECONDS))
                    wake(prepared)
                    thread.join(PATIENCE_SECONDS)
                    slept_on = thread.is_alive()
                    q.enqueue("t", now=NOW)
                    thread.join()
                self.assertFalse(slept_on)
                self.assertEqual(woken_up, [True])

    def test_waiting_consumer_sleeps_on_when_others_find_nothing(self):
        def find_nothing():
            other.dequeue("other")
            other.enqueue("t", key="k")

        self.queue.pause("default")
        self.queue.enqueue("t", key="k")
        other = self.reopen()
        find_nothing()
        thread = threading.Timer(0.05, find_nothing)
        thread.start()
        self.addCleanup(thread.join)
        self.assertFalse(self.queue.wait(0.2, consumer="w"))

    def test_waiting_consumer_wakes_when_a_job_falls_due(self):
        self.queue.enqueue("t", delay_seconds=0.05)
        self.assertTrue(self.queue.wait(PATIENCE_SECONDS, consumer="w"))
        self.queue.complete(self.queue.dequeue("w"))
        self.queue.enqueue("t", run_at=NOW + 10, now=NOW)
        for seconds, is_due in ((9.5, False), (10, True)):
            self.assertEqual(self.queue.wait(0, consumer="other", now=NOW + seconds), is_due)

    def test_threads_may_begin_to_wait_under_one_name(self):
        errors, barrier = [], threading.Barrier(4)

        def wait():
            try:
                barrier.wait()
                for _ in range(20):
                    self.queue.wait(0.005, consumer="w")
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(20):
            self.queue.enqueue("t", number, queue="other", delay_seconds=1000)
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        self.assertEqual([each["name"] for each in self.queue.consumers()], ["w"])

    def test_wait_ends_without_work_when_there_is_none_to_do(self):
        self.queue.enqueue("t", queue="other")
        self.queue.enqueue("t", assigned_to="other")
        self.queue.pause("paused")
        self.queue.enqueue("t", queue="paused")
        self.queue.enqueue("new", queue="mine")
        self.assertFalse(self.queue.wait(0.02, consumer="w", queues=["mine", "paused"], tasks=["t"]))
        self.assertTrue(self.queue.wait(1, consumer="other", queues=["mine"]))

    def test_wait_ends_after_a_second_whatever_its_timeout(self):
        began = time.monotonic()
        self.assertFalse(self.queue.wait(PATIENCE_SECONDS, consumer="w"))
        self.assertLess(time.monotonic() - began, PATIENCE_SECONDS)

    # Schedules

    def fired(self, *moments, consumer="worker"):
        """Dequeue at these moments and complete what comes; return the times of the jobs."""
        times = []
        for moment in moments:
            job = self.queue.dequeue(consumer, now=NOW + moment)
            times.append(job and job.run_at - NOW)
            if job:
                self.queue.complete(job, now=NOW + moment)
        return times

    def test_schedule_enqueues_a_job_for_each_time(self):
        self.queue.schedule("tick", "t", {"a": 1}, every_seconds=10, queue="q", priority=3, now=NOW)
        self.assertIsNone(self.queue.dequeue("worker", now=NOW + 9.9))
        job = self.queue.dequeue("worker", now=NOW + 10.5)
        self.assertEqual((job.task, job.payload, job.queue, job.priority), ("t", {"a": 1}, "q", 3))
        self.assertEqual((job.run_at, job.created_at), (NOW + 10, NOW + 10.5))
        self.queue.complete(job, now=NOW + 11)
        self.assertEqual(self.fired(12, 20, 25, 31), [None, 20, None, 30])
        (found,) = self.queue.schedules()
        self.assertEqual((found.next_at, found.last_at, found.skipped), (NOW + 40, NOW + 30, 0))
        self.assertEqual(self.queue.get(found.last_job_id).run_at, NOW + 30)

    def test_schedule_enqueues_jobs_for_missed_times_as_it_says(self):
        for on_missed, expected in (
            ("once", [300, None, None, None]),
            ("skip", [None, None, None, None]),
            ("all", [100, 200, 300, None]),
        ):
            with self.subTest(on_missed):
                self.queue.schedule("tick", "t", every_seconds=100, on_missed=on_missed, now=NOW)
                self.assertEqual(self.fired(399, 399, 399, 399), expected)
                self.assertEqual(self.fired(400), [400])
                self.queue.unschedule("tick")

    def test_schedule_that_skips_takes_the_last_minute(self):
        self.queue.schedule("hourly", "t", every_seconds=3600, on_missed="skip", now=NOW)
        self.assertEqual(self.fired(3659), [3600])
        self.assertEqual(self.fired(7260), [None])
        self.assertEqual(self.fired(10_800), [10_800])

    def test_schedule_that_missed_many_times_catches_up_in_steps(self):
        self.queue.schedule("tick", "t", every_seconds=1, on_missed="all", now=NOW)
        for done in (100, 200, 250, 250):
            self.queue.dequeue("worker", now=NOW + 250)
            self.assertEqual(self.queue.count_jobs(), done)
        self.assertEqual(sorted(job.run_at - NOW for job in self.queue.list_jobs(limit=300)), list(range(1, 251)))

    def test_schedule_skips_times_while_its_job_is_unfinished(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        first = self.queue.dequeue("worker", now=NOW + 10)
        self.assertIsNone(self.queue.dequeue("worker", now=NOW + 20))
        self.assertEqual(self.queue.schedules()[0].skipped, 1)
        self.queue.fail(first, "no", retry=False, now=NOW + 25)
        self.assertEqual(self.fired(30), [30])

    def test_schedule_that_may_overlap_enqueues_each_job(self):
        self.queue.schedule("tick", "t", every_seconds=10, overlap=True, now=NOW)
        jobs = [self.queue.dequeue("worker", now=NOW + at) for at in (10, 20, 30)]
        self.assertEqual([job.run_at - NOW for job in jobs], [10, 20, 30])

    def test_schedule_of_a_full_queue_skips_the_time(self):
        self.queue.schedule("tick", "t", every_seconds=10, queue="full", now=NOW)
        self.queue.enqueue("other", queue="full", now=NOW)
        self.queue.limit("full", 1)
        self.assertIsNone(self.queue.dequeue("worker", tasks=["t"], now=NOW + 10))
        self.assertEqual((self.queue.count_jobs(), self.queue.schedules()[0].skipped), (1, 1))

    def test_schedule_skips_no_time_because_the_disk_is_full(self):
        self.queue.schedule("tick", "t", every_seconds=10, queue="one", now=NOW)
        self.queue.limit("one", 1)
        with mock.patch.object(self.queue, "enqueue", side_effect=QueueFull("no space")), self.assertRaises(QueueFull):
            self.queue.dequeue("worker", now=NOW + 10)
        self.assertEqual(self.queue.schedules()[0].skipped, 0)
        self.assertEqual(self.queue.dequeue("worker", now=NOW + 10).run_at, NOW + 10)

    def test_schedule_that_is_saved_again_keeps_its_next_time_unless_the_times_change(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW + 5)
        self.assertEqual(self.queue.schedules()[0].next_at, NOW + 10)
        self.queue.schedule("tick", "other", every_seconds=10, on_missed="all", now=NOW + 5)
        self.assertEqual(self.queue.schedules()[0][1], "other")
        self.assertEqual(self.queue.schedules()[0].next_at, NOW + 10)
        self.queue.schedule("tick", "other", every_seconds=20, now=NOW + 5)
        self.assertEqual(self.queue.schedules()[0].next_at, NOW + 25)
        self.queue.schedule("tick", "other", cron="0 0 * * *", zone="Asia/Tokyo", now=NOW + 5)
        self.assertEqual(self.queue.schedules()[0].next_at % 86400, 15 * 3600)

    def test_schedule_that_is_paused_gets_no_job_for_that_time(self):
        self.queue.schedule("tick", "t", every_seconds=10, on_missed="all", now=NOW)
        self.queue.pause_schedule("tick")
        self.assertEqual(self.fired(10, 20, 35), [None] * 3)
        self.queue.schedule("other", "t", every_seconds=1, now=NOW + 34)
        self.assertEqual(self.fired(35, 35), [35, None])
        self.queue.unschedule("other")
        self.queue.resume_schedule("tick", now=NOW + 35)
        self.assertEqual(self.fired(44, 45), [None, 45])
        self.queue.resume_schedule("tick", now=NOW + 46)  # which was not paused
        self.assertEqual(self.fired(55), [55])

    def test_paused_schedule_keeps_no_consumer_awake(self):
        q = self.queue
        q.schedule("tick", "t", every_seconds=60, now=NOW)
        q.pause_schedule("tick", now=NOW)
        self.assertFalse(any(q.wait(0, consumer="w", now=NOW + 999) for _ in range(2)))

    def test_schedule_that_waits_because_a_clock_was_set_back_is_resumed(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW + 7200)
        self.queue.schedule("noon", "t", cron="0 12 * * *", now=NOW + 86400 * 3)
        self.assertEqual(self.fired(10), [None])
        for name in ("tick", "noon"):
            self.queue.resume_schedule(name, now=NOW + 10)
        noon, tick = self.queue.schedules()
        self.assertLess(noon.next_at - NOW, 86400 + 10)
        self.assertEqual((noon.next_at % 86400, tick.next_at), (43200, NOW + 20))
        self.queue.resume_schedule("tick", now=NOW + 15)
        self.assertEqual(self.fired(20), [20])

    def test_schedule_that_is_deleted_leaves_its_jobs(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        job = self.queue.dequeue("worker", now=NOW + 10)
        self.assertTrue(self.queue.unschedule("tick"))
        self.assertFalse(self.queue.unschedule("tick"))
        self.queue.complete(job, now=NOW + 11)
        self.assertEqual((self.fired(100), self.queue.schedules()), ([None], []))

    def test_schedule_that_does_not_exist_cannot_be_paused(self):
        for call in (self.queue.pause_schedule, self.queue.resume_schedule):
            with self.assertRaisesRegex(QueueError, "cannot find schedule 'tick'"):
                call("tick")

    def test_durations_whose_sums_overflow_are_refused(self):
        q = self.queue
        job = self.taken()
        finished = q.enqueue("t", now=NOW)
        q.cancel(finished, now=NOW)
        waiting = q.enqueue("t", run_at=NOW + 60, now=NOW)
        delay = {"delay_seconds": 1e308}
        for verb, *args in (
            *((q.enqueue, "t", {name: 1e308}) for name in ("delay_seconds", "run_at", "expire_seconds", "expires_at")),
            (q.enqueue, "t", {"key": "k", "key_seconds": 1e308}),
            (q.enqueue, "t", {"now": 1e308, "expire_seconds": 1e308}),
            (q.enqueue_many, "t", [1], delay),
            *(
                (q.change, waiting, {name: 1e308})
                for name in ("delay_seconds", "run_at", "expire_seconds", "expires_at")
            ),
            (q.resubmit, finished, delay),
            (q.resubmit_where, {"task": "t", **delay}),
            (q.resubmit_where, {"task": "t", "rate": (1, 1e308)}),
            (q.dequeue, "c", {"lease_seconds": 1e308}),
            (q.complete_and_dequeue, [], "c", 1, {"lease_seconds": 1e308}),
            (q.fail, job, "no", {"retry_in_seconds": 1e308}),
            (q.release, job, delay),
            (q.extend, job, 1e308, {}),
            (q.extend_all, "c", 1e308, {}),
            (q.schedule, "s", "t", {"every_seconds": 1e308}),
            (q.schedule, "s", "t", {"every_seconds": 1, "now": 1e308}),
            (q.limit, "default", {"rate": (1, 1e308)}),
            *((q.keep, "default", {name: 1e308}) for name in ("completed", "failed", "cancelled")),
            (q.prune, 1e308, {}),
            (q.dequeue, "c", {"now": -1e308}),
            (pqueue.task, {"name": "x", "expire_seconds": 1e308}),
            (pqueue.task, {"name": "x", "backoff": 1e308}),
            (pqueue.task, {"name": "x", "backoff": [1, 1e308]}),
            (pqueue.task, {"name": "x", "max_backoff_seconds": 1e308}),
            (pqueue.Retry, {"in_seconds": 1e308}),
            (pqueue.Snooze, 1e308, {}),
        ):
            *args, options = args
            with self.subTest(verb.__name__, options=options), self.assertRaisesRegex(ValueError, "seconds, at most"):
                verb(*args, **options)
        found = q.get(q.enqueue("t", delay_seconds=1e12, expire_seconds=1e12, now=1e12))
        self.assertEqual((found.run_at, found.expires_at), (2e12, 3e12))

    def test_schedule_that_is_invalid_is_refused(self):
        for options, reason in (
            ({}, "either cron or every_seconds, got neither"),
            ({"cron": "* * * * *", "every_seconds": 5}, "either cron or every_seconds, got both"),
            ({"every_seconds": 0}, "every_seconds above 0"),
            ({"every_seconds": 1e-320}, "every_seconds of at least 0.001"),
            ({"every_seconds": 5, "zone": "Europe/Berlin"}, "expected cron together with zone"),
            ({"every_seconds": 5, "zone": None}, "expected cron together with zone"),
            ({"every_seconds": 5, "overlap": "no"}, "overlap to be True or False"),
            ({"cron": "* * * * *", "now": 1e12}, "a time of the years"),
            ({"cron": "* * * * *", "now": -1e12}, "a time of the years"),
            ({"cron": "* * * * *", "now": "now"}, "finite number"),
            ({"cron": "* * * *"}, "five fields"),
            ({"cron": "0 0 31 2 *"}, "matches some day"),
            ({"cron": "* * * * *", "zone": "Nowhere/Land"}, "time zone"),
            ({"cron": "* * * * *", "zone": (0, 1)}, "time zone"),
            ({"every_seconds": 5, "on_missed": "never"}, "on_missed to be one of"),
            ({"every_seconds": 5, "queue": ""}, "queue name"),
            ({"every_seconds": 5, "group": ""}, "group name"),
            ({"every_seconds": 5, "payload": {1: 2}}, "keys are all strings"),
        ):
            with self.subTest(options), self.assertRaisesRegex(ValueError, reason):
                self.queue.schedule("tick", "t", **options)
        with self.assertRaisesRegex(ValueError, "schedule name"):
            self.queue.schedule("", "t", every_seconds=5)
        self.assertEqual(self.queue.schedules(), [])

    def test_schedule_that_was_saved_is_refused_with_an_invalid_time(self):
        self.queue.schedule("tick", "t", every_seconds=5, now=NOW)
        with self.assertRaisesRegex(ValueError, "finite number"):
            self.queue.schedule("tick", "t", every_seconds=5, now=math.nan)

    def test_schedule_of_an_unknown_zone_leaves_consumers_asleep_and_others_on_time(self):
        q = self.queue
        q.schedule("strange", "t", cron="* * * * *", zone="Europe/Berlin", now=NOW)
        q.schedule("tick", "t", every_seconds=10, now=NOW)
        with mock.patch("pqueue_cron.time_zone", side_effect=ValueError):
            pqueue_cron.timing.cache_clear()
            self.assertEqual(q.dequeue("w", now=NOW + 100).run_at, NOW + 100)
            self.assertIsNone(q.dequeue("w", now=NOW + 100))
            self.assertFalse(q.wait(0.01, consumer="w", now=NOW + 100))
        pqueue_cron.timing.cache_clear()
        self.assertEqual(q.dequeue("w", now=NOW + 105).key, "schedule:strange")
        q.enqueue("t", now=NOW)
        self.assertTrue(q.wait(0.01, consumer="w", now=NOW + 105))

    def test_schedule_fires_whatever_the_metadata_of_the_application(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        with mock.patch.dict(pqueue_tasks._METADATA, clear=True):
            pqueue.metadata(lambda: {}["request"])
            self.assertIsNone(self.queue.dequeue("w", now=NOW + 10).meta)
            with self.assertRaises(KeyError):
                self.queue.enqueue("t")

    def test_schedule_of_a_task_follows_its_decorator(self):
        def declared(**options):
            with mock.patch.dict(pqueue.TASKS, clear=True):
                pqueue.task("nightly", **options)(lambda: None)
                self.queue.declare_schedules(pqueue.TASKS.values(), now=NOW)
            return [(each.cron, each.every_seconds, each.on_missed, each.origin) for each in self.queue.schedules()]

        self.assertEqual(declared(), [])
        with mock.patch.dict(pqueue.TASKS, clear=True):
            pqueue.task("annual", cron="@yearly")(lambda: None)
            self.queue.declare_schedules(pqueue.TASKS.values(), now=NOW)
        declared(cron="@daily")
        self.assertEqual([origin for *_, origin in declared()], ["task", "removed"])
        for name in ("annual", "nightly"):
            self.queue.unschedule(name)
        self.assertEqual(declared(cron="@daily"), [("@daily", None, "once", "task")])
        self.assertEqual(declared(every_seconds=timedelta(hours=1)), [(None, 3600.0, "once", "task")])
        self.assertEqual(declared(every_seconds=60, on_missed="all"), [(None, 60.0, "all", "task")])
        self.queue.schedule("own", "nightly", cron="@hourly", now=NOW)
        self.assertEqual([origin for *_, origin in declared()], ["removed", "schedule"])
        self.assertEqual([origin for *_, origin in declared(cron="@daily")], ["task", "schedule"])

    def test_schedule_that_another_program_has_just_defined_is_not_marked_as_removed(self):
        def declare(**options):
            with mock.patch.dict(pqueue.TASKS, clear=True):
                pqueue.task("nightly", **options)(lambda: None)
                self.queue.declare_schedules(pqueue.TASKS.values(), now=NOW)

        declare(cron="@daily")
        seen = self.queue.schedules()
        self.reopen().schedule("nightly", "nightly", cron="@hourly", now=NOW)
        with mock.patch.object(self.queue, "schedules", return_value=seen):
            declare()
        self.assertEqual(self.queue.schedules()[0].origin, "schedule")

    def test_schedule_enqueues_its_jobs_in_a_group(self):
        with mock.patch.dict(pqueue.TASKS, clear=True):
            pqueue.task("nightly", every_seconds=60, group="a")(lambda: None)
            self.queue.declare_schedules(pqueue.TASKS.values(), now=NOW)
            with self.assertRaisesRegex(ValueError, "either cron or every_seconds"):
                pqueue.task("never", group="a")(lambda: None)
        self.queue.schedule("own", "t", every_seconds=70, group="a", queue="fair", now=NOW)
        self.assertEqual([each.group for each in self.queue.schedules()], ["a", "a"])
        self.queue.schedule("own", "t", every_seconds=70, group="b", queue="fair", now=NOW + 5)
        self.queue.limit("fair", running=1)
        self.queue.enqueue("t", group="b", queue="fair", now=NOW)
        jobs = self.queue.dequeue_many("w", 9, now=NOW + 70)
        self.assertEqual([(job.task, job.group) for job in jobs], [("t", "b"), ("nightly", "a")])
        self.queue.complete(jobs[0], now=NOW + 71)
        self.assertEqual(self.queue.dequeue("w", now=NOW + 71).run_at, NOW + 70)

    def test_operator_lists_the_jobs_of_a_group(self):
        first = self.queue.enqueue("t", group="a", now=NOW)
        self.queue.enqueue("t", group="b", now=NOW)
        self.queue.enqueue("t", now=NOW)
        last = self.queue.enqueue("u", group="a", queue="other", now=NOW)
        self.assertEqual([job.id for job in self.queue.list_jobs(group="a")], [last, first])
        self.assertEqual([job.id for job in self.queue.list_jobs(group="a", state="pending", task="t")], [first])
        self.assertEqual((self.queue.count_jobs(group="a"), self.queue.count_jobs(group="none")), (2, 0))

    def test_schedule_of_a_task_that_needs_arguments_is_refused(self):
        with mock.patch.dict(pqueue.TASKS, clear=True):
            pqueue.task("nightly", cron="@daily")(lambda path: path)
            with self.assertRaisesRegex(ValueError, "cannot schedule a call without arguments: .*path"):
                self.queue.declare_schedules(pqueue.TASKS.values())

    def test_schedule_wakes_its_consumer_in_time(self):
        self.queue.schedule("soon", "t", every_seconds=0.2)
        began = time.monotonic()
        while not (job := self.queue.dequeue("worker")):
            self.queue.wait(30, consumer="worker")
        self.assertLess(time.monotonic() - began, 10)
        self.assertLess(job.run_at, time.time())

    def test_schedule_counts_as_next_due_for_its_task_and_queue(self):
        self.queue.schedule("tick", "t", every_seconds=10, queue="q", now=NOW)
        self.assertEqual(self.queue.next_due("worker"), NOW + 10)
        self.assertEqual(self.queue.next_due("worker", queues=["q"], tasks=["t"]), NOW + 10)
        self.assertIsNone(self.queue.next_due("worker", queues=["other"]))
        self.assertIsNone(self.queue.next_due("worker", tasks=["other"]))
        self.queue.pause_schedule("tick")
        self.assertIsNone(self.queue.next_due("worker"))

    def test_schedule_fires_again_if_its_transaction_was_rolled_back(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        self.queue.dequeue("worker", now=NOW)
        with self.assertRaises(ZeroDivisionError), self.queue.transaction():
            self.assertEqual(self.queue.dequeue("worker", now=NOW + 10).run_at, NOW + 10)
            raise ZeroDivisionError
        self.assertEqual(self.fired(10), [10])

    def test_schedule_fires_once_for_each_time_with_several_consumers(self):
        self.queue.schedule("tick", "t", every_seconds=1, on_missed="all", now=NOW)
        self.queue.schedule("tock", "t", every_seconds=2, on_missed="all", now=NOW)
        queues = [self.reopen() for _ in range(4)]

        def work(number):
            for at in range(1, 31):
                queues[number].dequeue(f"worker {number}", now=NOW + at)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        times = sorted(job.run_at - NOW for job in self.queue.list_jobs(limit=100))
        self.assertEqual(times, sorted([*range(1, 31), *range(2, 31, 2)]))

    def test_schedule_whose_zone_this_host_does_not_know_leaves_others_alone(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        self.queue.schedule("nightly", "t", cron="* * * * *", zone="Asia/Tokyo", now=NOW)
        with mock.patch.object(pqueue_schedules, "timing", self.without_zones(pqueue_schedules.timing)):
            self.assertEqual(self.fired(61, 62), [60, None])
        self.assertEqual(self.fired(120), [120])

    @staticmethod
    def without_zones(timing):
        def known(cron, zone, every_seconds):
            if cron:
                raise ValueError(zone)
            return timing(cron, zone, every_seconds)

        return known

    def test_queue_that_is_moved_takes_its_schedules_along(self):
        self.queue.schedule("tick", "t", every_seconds=10, now=NOW)
        target = self.target()
        self.queue.begin_move(target.name, now=NOW)
        self.assertIsNone(self.queue.dequeue("worker", now=NOW + 10))
        self.queue.move_to(target, now=NOW)
        self.assertIsNone(self.queue.dequeue("worker", now=NOW + 10))
        self.assertEqual(target.schedules(), self.queue.schedules())
        self.assertEqual(target.dequeue("worker", now=NOW + 10).run_at, NOW + 10)
        self.assertEqual(self.queue.count_jobs(), 0)

    # Threads

    def test_threads_share_one_queue_and_no_job_is_done_twice(self):
        self.queue.enqueue_many("t", range(200))
        done, errors = [], []

        def work(name):
            try:
                while job := self.queue.dequeue(name):
                    self.queue.complete(job)
                    done.append(job.id)
            except QueueError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=[f"thread-{number}"]) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        self.assertEqual(sorted(done), [job.id for job in reversed(self.queue.list_jobs(limit=200))])
        self.assertEqual(self.queue.stats()["states"]["completed"], 200)


class SQLiteCase(unittest.TestCase):
    """A folder of its own for each test."""

    def setUp(self):
        tidy = nothing_left()
        tidy.__enter__()
        self.addCleanup(tidy.__exit__, None, None, None)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.path = self.folder / "queue.db"

    def open(self, **options):
        queue = pqueue.PersistentQSQLite(self.path, **options)
        self.addCleanup(queue.close)
        return queue

    def sqlite(self):
        return closing(sqlite3.connect(self.path, isolation_level=None))


class SQLiteContract(QueueContract, SQLiteCase):
    """At full durability, the default."""

    def test_database_refuses_a_value_of_another_type_and_text_that_is_not_json(self):
        self.taken()
        for change in (
            "jobs SET payload = '{not JSON'",
            "jobs SET payload = ''",
            "jobs SET payload = x'00'",
            "jobs SET result = 'NaN'",
            "jobs SET priority = 'high'",
            "jobs SET attempts = 0.5",
            "jobs SET run_at = 'soon'",
            "jobs SET created_at = x'00'",
            "queues SET paused = 'yes'",
            "queues SET name = NULL",
            "consumers SET queues = 'default'",
            "consumers SET tasks = '{'",
            "consumers SET pid = 'none'",
            "history SET at = 'once'",
        ):
            self.queue.cancel(self.queue.enqueue("t"), by="ann")  # so that history has a row
            with self.sqlite() as db, self.subTest(change=change), self.assertRaises(sqlite3.IntegrityError):
                db.execute(f"UPDATE {change}")

    def test_queue_with_a_limit_counts_by_triggers_that_go_with_the_last_limit(self):
        def triggers():
            return [row[0] for row in self.queue._read("SELECT name FROM sqlite_master WHERE type = 'trigger'")]

        self.queue.limit("a", 5)
        self.queue.limit("b", 5)
        self.assertEqual(sorted(triggers()), sorted(pqueue_sqlite.COUNTERS))
        self.assertEqual(self.queue.other_tables(), [])
        self.queue.limit("a", None)
        self.assertEqual(sorted(triggers()), sorted(pqueue_sqlite.COUNTERS))
        self.queue.enqueue("t", queue="a")  # does not write to its row
        self.queue.enqueue("t", queue="b")
        self.queue.cancel(self.queue.enqueue("t", queue="b"))
        self.assertEqual(dict(self.queue._read("SELECT name, pending FROM queues")), {"a": 0, "b": 1})
        self.assertEqual(self.queue.check()["problems"], [])
        self.queue.limit("b", None)
        self.assertEqual(triggers(), [])
        self.assertEqual(self.queue.check()["problems"], [])

    def test_queue_that_counts_wrong_is_reported(self):
        self.queue.limit("default", 5)
        with self.queue.transaction() as db:
            db.execute("UPDATE queues SET pending = 4")
        self.assertEqual(
            self.queue.check()["problems"], ["queue 'default' counts its pending jobs wrong: set its limit again"]
        )
        self.queue.limit("default", 5)
        self.assertEqual(self.queue.check()["problems"], [])

    def test_consumer_that_prefetches_takes_last_attempts_together(self):
        self.queue.enqueue_many("t", range(3), max_attempts=1, now=NOW)
        self.assertEqual(len(self.queue.dequeue_many("w", 9, prefetch=True, now=NOW)), 3)

    def test_last_attempt_is_claimed_in_a_synced_commit(self):
        for attempts, expected in ((1, "FULL"), (3, "NORMAL")):
            with self.subTest(max_attempts=attempts):
                self.queue.enqueue("t", max_attempts=attempts, now=NOW)
                job = self.queue.dequeue("w", now=NOW)
                wanted = expected if self.queue.durability == "full" else "NORMAL"
                self.assertEqual(self.queue._session()._synchronous, wanted)
                self.assertEqual((job.state, job.attempts), ("processing", 1))
                self.queue.complete(job, now=NOW)

    def test_jobs_not_begun_when_the_lease_expires_return_uncounted(self):
        self.queue.enqueue_many("t", range(3), max_attempts=1, now=NOW)
        first, second, third = self.queue.dequeue_many("w", 3, prefetch=True, lease_seconds=60, now=NOW)
        self.queue.begin(first, now=NOW)
        self.queue.begin(second, now=NOW + 59)
        self.assertEqual([self.queue.has_begun(job) for job in (first, second, third)], [True, True, False])
        self.reopen().dequeue_many("other", 0, now=NOW + 60)  # takes nothing
        taken = self.reopen().dequeue("other", now=NOW + 60)
        self.assertEqual((taken.id, taken.attempts), (third.id, 1))
        self.assertEqual(self.queue.history(third.id), [])
        for job in (first, second):
            self.assertEqual(self.queue.get(job.id).state, "failed")
            self.assertIn("is not run again, as its max_attempts is 1", self.queue.get(job.id).error)

    def test_jobs_not_begun_by_one_of_two_consumers_return_uncounted(self):
        self.queue.enqueue_many("t", range(2), now=NOW)
        (first,) = self.queue.dequeue_many("first", 1, prefetch=True, now=NOW)
        (second,) = self.queue.dequeue_many("second", 1, prefetch=True, now=NOW)
        self.queue.begin(first, now=NOW)
        self.reopen().dequeue_many("other", 0, now=NOW + 61)
        self.assertEqual([self.queue.get(job.id).attempts for job in (first, second)], [1, 0])

    def test_job_that_was_not_prefetched_may_be_begun_by_its_consumer_and_any_process(self):
        job = self.taken()
        for queue in (self.queue, self.reopen()):
            queue.begin(job, now=NOW)
        self.assertEqual(self.queue.get(job.id), job)

    def test_job_is_not_begun_when_its_lease_is_over(self):
        self.queue.enqueue("t", now=NOW)
        (job,) = self.queue.dequeue_many("w", 5, prefetch=True, lease_seconds=60, now=NOW)
        with self.assertRaisesRegex(LeaseLost, "cannot begin job 1: the lease of w on it has expired"):
            self.queue.begin(job, now=NOW + 60)
        self.assertEqual(self.reopen().dequeue("other", now=NOW + 60).attempts, 1)  # for it had not begun
        with mock.patch("time.time", side_effect=[NOW + 59, NOW + 60]), self.assertRaises(LeaseLost):
            self.queue.begin(job)  # it ended meanwhile

    def test_reused_slot_of_a_dead_consumer_still_shows_which_jobs_had_begun(self):
        code = """
import os, pqueue
queue = pqueue.PersistentQSQLite(sys.argv[1])
queue.enqueue_many("t", range(4), max_attempts=1)
for job in queue.dequeue_many("victim", 4, prefetch=True)[:2]:
    queue.begin(job)
os._exit(0)
"""
        with python(code, self.path) as child:
            self.assertEqual(child.wait(), 0)
        queue = self.reopen()
        queue.begin(queue.dequeue_many("heir", 1, prefetch=True)[0])  # in the same slot
        self.assertEqual([job.state for job in queue.list_jobs()], ["pending", "processing", "failed", "failed"])
        self.assertEqual([job.attempts for job in queue.list_jobs()], [0, 1, 1, 1])

    def test_job_that_began_in_an_earlier_claim_has_not_begun_in_this_one(self):
        self.queue.enqueue_many("t", range(2), now=NOW)
        for begun in (0, 1):
            jobs = self.queue.dequeue_many("w", 2, prefetch=True, lease_seconds=60, now=NOW)
            self.queue.begin(jobs[begun], now=NOW)
            if begun == 0:
                for job in jobs:
                    self.queue.release(job, now=NOW)
        self.reopen().dequeue_many("other", 0, now=NOW + 60)
        self.assertEqual([self.queue.get(job.id).attempts for job in jobs], [0, 1])

    def test_job_counts_as_begun_after_a_reboot(self):
        code = """
import os, pqueue
queue = pqueue.PersistentQSQLite(sys.argv[1])
queue.enqueue("t", max_attempts=1)
queue.dequeue_many("victim", 4, prefetch=True)
os._exit(0)
"""
        with python(code, self.path) as child:
            self.assertEqual(child.wait(), 0)
        with mock.patch("pqueue_locks.boot_id", return_value=pqueue_locks.boot_id() + 1):
            self.assertIsNone(self.reopen().dequeue("w"))
        self.assertEqual(self.queue.get(1).state, "failed")

    def test_job_counts_as_begun_when_the_lock_of_its_consumer_is_gone(self):
        other = self.reopen()
        other.dequeue("other", now=NOW)
        self.queue.enqueue("t", now=NOW)
        self.queue.dequeue_many("w", 5, prefetch=True, now=NOW)
        (self.folder / "queue.db.d/1.lock").unlink()
        self.assertEqual(other.dequeue("other", now=NOW + 61).attempts, 2)

    def test_consumer_that_began_too_many_for_its_list_counts_all(self):
        self.queue.enqueue_many("t", range(pqueue_locks.BegunJobs.MAX_JOBS + 2), now=NOW)
        jobs = self.queue.dequeue_many("w", pqueue_locks.BegunJobs.MAX_JOBS + 2, prefetch=True, now=NOW)
        for job in jobs[:-1]:
            self.queue.begin(job, now=NOW)
        self.reopen().dequeue_many("other", 0, now=NOW + 60)
        self.assertEqual({job.attempts for job in self.queue.list_jobs(limit=1000)}, {1})

    def test_sqlite_connection_that_would_lose_or_misplace_jobs_is_not_joined(self):
        q, elsewhere = self.queue, self.folder / "other.db"
        refusals = [
            ("to memory", ":memory:", {}, []),
            ("other.db", elsewhere, {}, []),
            ("execute BEGIN first", self.path, {"isolation_level": None}, []),
            ("temporary table 'jobs'", self.path, {}, ["CREATE TEMP TABLE jobs (id)"]),
            ("a read-only connection", self.path, {}, ["PRAGMA query_only = 1"]),
            ("a read-only connection", f"{self.path.resolve().as_uri()}?mode=ro", {"uri": True}, []),
        ]
        if q.durability == "full":
            refusals.append(("PRAGMA synchronous = FULL", self.path, {}, ["PRAGMA synchronous = NORMAL"]))
        for message, path, options, statements in refusals:
            with self.subTest(message), closing(sqlite3.connect(path, **options)) as connection:
                for statement in statements:
                    connection.execute(statement)
                connection.commit()
                with self.assertRaisesRegex(QueueError, message), q.join(connection):
                    pass
        self.assertEqual(q.count_jobs(), 0)

    def test_transaction_that_has_read_is_told_how_to_begin_once_another_writer_has_committed(self):
        with closing(sqlite3.connect(self.path, timeout=0)) as connection:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM jobs").fetchall()
            self.queue.enqueue("t")
            said = "BEGIN IMMEDIATE" if sys.version_info >= (3, 11) else "another writer held it"
            with self.assertRaisesRegex(QueueBusy, said), self.queue.join(connection):
                self.queue.enqueue("t")
        self.assertEqual(self.queue.count_jobs(), 1)

    def test_connection_with_a_temporary_table_of_its_own_is_joined(self):
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("CREATE TEMP TABLE mine (id)")
            with self.queue.join(connection):
                self.queue.enqueue("t")
            connection.commit()
        self.assertEqual(self.queue.count_jobs(), 1)

    def test_joined_connection_keeps_its_factories(self):
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.row_factory, connection.text_factory = sqlite3.Row, bytes
            connection.execute("BEGIN")
            with self.queue.join(connection):
                job_id = self.queue.enqueue("t", "text", key="k")
                self.assertEqual(self.queue.get(job_id).payload, "text")
                self.assertEqual(connection.execute("SELECT key FROM jobs").fetchone()["key"], b"k")
            connection.execute("COMMIT")
        self.assertEqual(self.queue.get(job_id).key, "k")


class SQLiteContractAtNormalDurability(SQLiteContract):
    def open(self, **options):
        return super().open(durability="normal", **options)


class SQLiteGuarantees(SQLiteCase):
    def test_guarantee_1_enqueue_and_complete_are_synced(self):
        queue, seen = self.open(), []
        session = queue._session()

        def spied(method, commits):
            def spy(sql, *params):
                done = method(sql, *params)
                if commits(sql):
                    seen.append(session.connection.execute("PRAGMA synchronous").fetchone()[0])
                return done

            return mock.patch.object(session, method.__name__, spy)

        queue.enqueue("t")
        job = queue.dequeue("w")
        with spied(session.run, lambda sql: sql == "COMMIT"), spied(session.insert, lambda _: True):
            queue.enqueue("t")
            queue.complete(job)
            queue.complete_and_dequeue([(queue.dequeue("w"), None)], "w")
            queue.fail(self.another(queue), "no")
        full, normal = 2, 1
        self.assertEqual(seen, [full, full, normal, full, full, normal, full])

    @staticmethod
    def another(queue):
        queue.enqueue("t")
        return queue.dequeue("w")

    def test_guarantee_1_commit_is_synced_unless_its_loss_only_repeats_work(self):
        q = self.open()
        verbs = {
            "FULL": {
                "enqueue": lambda _: q.enqueue("t"),
                "enqueue_many": lambda _: q.enqueue_many("t", range(2)),
                "complete": q.complete,
                "fail": lambda job: q.fail(job, "no"),
                "update of a result": lambda job: q.update(job, result=1),
                "resubmit": lambda job: (q.cancel(job.id), q.resubmit(job.id)),
                "assign": lambda job: q.assign(job.id, "w"),
                "pause": lambda _: q.pause("other"),
                "limit": lambda _: q.limit("other", 1),
                "delete_jobs": lambda job: q.delete_jobs([job.id], force=True),
            },
            "NORMAL": {
                "dequeue": lambda _: q.dequeue("w"),
                "release": q.release,
                "extend": q.extend,
                "extend_all": lambda _: q.extend_all("w"),
                "update of progress": lambda job: q.update(job, progress=1),
                "first wait of a consumer": lambda _: q.wait(0, consumer="new"),
                "heartbeat": lambda _: q.heartbeat("w"),
                "leave": lambda _: q.leave("w"),
                "prune": lambda _: q.prune(0),
            },
        }
        for wanted, calls in verbs.items():
            for verb, call in calls.items():
                with self.subTest(verb=verb):
                    job = self.another(q)
                    q._session()._synchronous = ""
                    call(job)
                    self.assertEqual(q._session()._synchronous, wanted)

    def test_guarantee_1_database_is_synced_to_the_medium_where_the_system_can(self):
        for pragma in ("fullfsync", "checkpoint_fullfsync"):  # on macOS
            self.assertEqual(self.open()._read(f"PRAGMA {pragma}"), [(1,)])

    def test_guarantee_1_job_outlives_its_producer_killed_after_enqueue(self):
        code = (
            "import pqueue; q = pqueue.open_queue(sys.argv[1]); print(q.enqueue('t', 5), flush=True); sys.stdin.read()"
        )
        with python(code, self.path) as child:
            job_id = int(child.stdout.readline())
            child.kill()
            child.wait()
        self.assertEqual(self.open().get(job_id).payload, 5)

    def test_guarantee_7_database_on_a_network_drive_is_refused(self):
        with (
            mock.patch("pqueue_sqlite.file_system", return_value="nfs4"),
            self.assertRaisesRegex(QueueError, "locks fail on nfs4; use a local disk"),
        ):
            self.open()
        self.assertFalse(self.path.exists())

    def test_guarantee_7_network_drive_is_known_by_its_last_mount_and_any_name(self):
        for mounts in (
            b"/dev/sda1 / ext4 rw 0 0\nserver:/x %s\\040\xc3\xbc nfs4 rw 0 0\n",
            b"/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 %s\\040\xc3\xbc nfs4 rw 0 0\n/dev/\xff /media/\xff vfat rw 0 0\n",
            b"/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 %s\\040\xc3\xbc ext4 rw 0 0\nserver:/x %s\\040\xc3\xbc cifs rw 0 0\n",
        ):
            text = mounts.replace(b"%s", os.fsencode(self.folder.resolve()))
            with mock.patch.object(Path, "read_bytes", return_value=text), self.subTest(mounts=mounts):
                self.assertRegex(pqueue_files.file_system(Path(f"{self.folder} \xfc/var")), "nfs4|cifs")
                self.assertEqual(pqueue_files.file_system(self.folder), "ext4")

    def test_guarantee_7_database_of_two_names_is_refused(self):
        self.open().enqueue("t")
        os.link(self.path, self.folder / "other.db")
        with self.assertRaisesRegex(QueueError, "expected a file of one name, got 2 hard links"):
            pqueue.PersistentQSQLite(self.folder / "other.db")

    def test_guarantee_7_database_mounted_without_its_folder_is_refused(self):
        self.open().enqueue("t")
        mounts = b"/dev/sda1 / ext4 rw 0 0\n/dev/sdb1 %s ext4 rw 0 0\n" % os.fsencode(self.path.resolve())
        with mock.patch.object(Path, "read_bytes", return_value=mounts):
            with self.assertRaisesRegex(QueueError, "but it is mounted alone: mount its folder"):
                self.open()

    def test_disk_that_is_full_within_a_lock_file_is_full(self):
        self.open().close()
        shutil.rmtree(f"{self.path}.d")
        with mock.patch("os.write", return_value=1), self.assertRaisesRegex(QueueFull, "No space left"):
            self.open()

    def test_guarantee_7_file_that_only_claims_to_be_a_queue_is_refused(self):
        with self.sqlite() as db:
            db.execute(f"PRAGMA application_id = {pqueue_schema.APPLICATION_ID}")
            db.execute("PRAGMA user_version = 1")
            endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x AS id FROM n"
            for name in ("jobs", "queues", "consumers", "history"):
                db.execute(f"CREATE VIEW {name} AS {endless}")
        with self.assertRaisesRegex(SchemaMismatch, "expected the tables of a queue"):
            self.open()

    def test_guarantee_7_file_with_other_tables_than_it_claims_is_refused(self):
        with self.sqlite() as db:
            db.execute(f"PRAGMA application_id = {pqueue_schema.APPLICATION_ID}")
            db.execute("PRAGMA user_version = 1")
            for name in ("jobs", "b", "c", "d"):
                db.execute(f"CREATE TABLE {name} (x)")
        with self.assertRaisesRegex(SchemaMismatch, "missing: queues, .*, outcomes; stop all .* restore"):
            self.open()

    def test_trigger_of_the_application_may_have_the_name_of_a_table(self):
        self.open().close()
        with self.sqlite() as db:
            db.execute("CREATE TABLE business (n)")
            db.execute("CREATE TRIGGER history AFTER INSERT ON business BEGIN SELECT 1; END")
        self.assertEqual(self.open().enqueue("t"), 1)

    def test_guarantee_7_newer_schema_is_refused(self):
        self.open().close()
        with self.sqlite() as db:
            db.execute("PRAGMA user_version = 99")
        with self.assertRaisesRegex(SchemaMismatch, "or older, got 99: use the pqueue that wrote it"):
            self.open()

    def test_guarantee_7_database_created_before_0_1_is_refused_unchanged(self):
        self.open().close()
        with self.sqlite() as db:
            db.execute("PRAGMA writable_schema = ON")
            db.execute("UPDATE sqlite_master SET sql = replace(sql, 'STRICT', '') WHERE name = 'history'")
        before = self.path.read_bytes()
        with self.assertRaisesRegex(
            SchemaMismatch, "^cannot use .*: it was created by a version before 0.1: finish .*$"
        ):
            self.open()
        self.assertEqual(self.path.read_bytes(), before)

    def test_guarantee_7_database_of_another_program_is_refused_unchanged(self):
        with self.sqlite() as db:
            db.execute("CREATE TABLE theirs (x)")
        before = self.path.read_bytes()
        with self.assertRaisesRegex(SchemaMismatch, "got another program's database; choose another path"):
            self.open()
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual(list(self.folder.iterdir()), [self.path])

    def test_guarantee_8_lease_columns_are_set_exactly_while_processing(self):
        queue = self.open()
        queue.enqueue("t")
        job = queue.dequeue("w")
        queue.enqueue("t")
        with self.sqlite() as db:
            for change in (
                "lease_token = NULL WHERE state = 'processing'",
                "lease_expires_at = NULL WHERE state = 'processing'",
                "lease_token = 'x' WHERE state = 'pending'",
                "lease_expires_at = 1 WHERE state = 'pending'",
                "state = 'pending' WHERE state = 'processing'",
            ):
                with self.subTest(change=change), self.assertRaises(sqlite3.IntegrityError):
                    db.execute(f"UPDATE jobs SET {change}")
        self.assertEqual(queue.get(job.id), job)

    def test_guarantee_8_row_that_contradicts_its_state_is_refused(self):
        queue = self.open()
        states = ("waiting", "pending", "scheduled", "processing", "completed", "failed", "cancelled")
        with self.sqlite() as db:
            columns = "queue, task, payload, priority, run_at, max_attempts, created_at"
            for state in states:
                values = {"attempts": 0, "lease_token": None, "lease_expires_at": None, "finished_at": None}
                values["waits_for"] = int(state == "waiting")
                if state == "processing":
                    values |= {"attempts": 1, "lease_token": "x", "lease_expires_at": 1.0}
                elif state not in ("pending", "scheduled", "waiting"):
                    values["finished_at"] = 1.0
                wrong = [
                    {"waits_for": 0}
                    if state == "waiting"
                    else {"attempts": 3 if state in ("pending", "scheduled") else 4},
                    {"finished_at": None if values["finished_at"] else 1.0},
                    {"lease_token": None, "lease_expires_at": None}
                    if values["lease_token"]
                    else {"lease_token": "x", "lease_expires_at": 1.0},
                    {"lease_expires_at": None if values["lease_expires_at"] else 1.0},
                ]
                for changes in (*wrong, {}):
                    row = {**values, **changes, "state": state}
                    insert = (
                        f"INSERT INTO jobs ({columns}, {', '.join(row)}) "
                        f"VALUES ('q', 't', 'null', 0, 1.0, 3, 1.0, :{', :'.join(row)})"
                    )
                    with self.subTest(state=state, changes=changes):
                        if changes:
                            with self.assertRaises(sqlite3.IntegrityError):
                                db.execute(insert, row)
                        else:
                            db.execute(insert, row)
            with self.assertRaises(sqlite3.IntegrityError):
                db.execute("UPDATE jobs SET state = 'done'")
        self.assertEqual(queue.count_jobs(), len(states))


DEQUEUE_AND_SLEEP = """
import pqueue, time
queue = pqueue.open_queue(sys.argv[1])
job = queue.dequeue("victim")
print(job.id, flush=True)
time.sleep(600)
"""


class Processes(SQLiteCase):
    def test_job_of_a_killed_consumer_is_back_at_once_and_its_row_says_so(self):
        queue = self.open()
        job_id = queue.enqueue("t")
        with python(DEQUEUE_AND_SLEEP, self.path) as child:
            self.assertEqual(int(child.stdout.readline()), job_id)
            self.assertIsNone(queue.dequeue("heir"))
            child.kill()
            child.wait()
        self.assertEqual({each["name"]: each["state"] for each in queue.consumers()}["victim"], "dead")
        job = wait_until(lambda: queue.dequeue("heir"))
        self.assertEqual((job.id, job.attempts), (job_id, 2))
        self.assertIn("consumer victim died in attempt 1 of 3", job.error)
        self.assertEqual({each["name"]: each["state"] for each in queue.consumers()}["victim"], "dead")

    def test_guarantee_2_queue_opened_through_a_link_is_the_same_queue(self):
        queue = self.open()
        queue.enqueue("t")
        queue.dequeue("anna")
        link = self.folder / "link.db"
        link.symlink_to(self.path)
        with open_queue(str(link)) as other:
            self.assertIsNone(other.dequeue("bert"))
            self.assertEqual({each["state"] for each in other.consumers()}, {"running"})

    def test_closed_and_refused_queues_leave_no_descriptor_and_no_thread(self):
        def use():
            with pqueue.PersistentQSQLite(self.path, busy_seconds=0.01) as queue:
                queue.enqueue("t")
                with self.sqlite() as db:
                    db.execute("BEGIN IMMEDIATE")
                    with self.assertRaises(QueueBusy):
                        queue.dequeue("w")
                queue.dequeue("w")
            return queue

        use()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        kept = [use() for _ in range(3)]
        wait_until(lambda: threading.active_count() <= threads)
        self.assertEqual(len(os.listdir("/proc/self/fd")), files)
        del kept  # a queue object may outlive its end

    def test_stopped_consumer_is_not_taken_for_dead(self):
        queue = self.open()
        queue.enqueue("t")
        with python(DEQUEUE_AND_SLEEP, self.path) as child:
            child.stdout.readline()
            child.send_signal(signal.SIGSTOP)
            queue._dead_checked_at = 0.0
            self.assertIsNone(queue.dequeue("heir"))

    def test_forked_child_reconnects_and_leaves_the_parent_whole(self):
        queue = self.open()
        queue.enqueue_many("t", range(2))
        mine = queue.dequeue("parent")
        child = os.fork()
        if child == 0:
            job = queue.dequeue("child")
            queue.complete(job)
            os._exit(0 if job.id != mine.id and queue.enqueue("by child") else 1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        queue.complete(mine)
        self.assertEqual(queue.stats()["states"]["completed"], 2)
        self.assertEqual(len(queue.list_jobs(task="by child")), 1)

    def test_child_forked_while_another_thread_is_idle_gets_the_queue(self):
        queue = self.open()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(queue.enqueue, "t").result()
            (session,) = queue._sessions
            self.assertTrue(session.in_use.acquire(blocking=False))  # so a fork does not wait for it
            session.in_use.release()
            child = os.fork()
            if child == 0:
                with suppress(Exception):
                    enqueued = ThreadPoolExecutor(1).submit(queue.enqueue, "by child")
                    os._exit(0 if enqueued.result(PATIENCE_SECONDS) == 2 else 1)
                os._exit(2)
            self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_child_forked_while_another_thread_is_in_a_transaction_leaves_it_whole(self):
        def act():
            with queue.transaction():
                queue.enqueue("t")
                begun.set()
                forked.wait(PATIENCE_SECONDS)

        kept = self.open()
        for is_closed in (False, True):  # meanwhile
            queue, begun, forked = self.open(), threading.Event(), threading.Event()
            with ThreadPoolExecutor(1) as pool, mock.patch.object(pqueue_sqlite, "BUSY_SECONDS", 0.01):
                done = pool.submit(act)
                self.assertTrue(begun.wait(PATIENCE_SECONDS))
                if is_closed:
                    queue.close()
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        kept.enqueue("never")
                    except QueueError as error:
                        code = 0 if "forked inside a transaction" in str(error) else 2
                    os._exit(code)
                try:
                    self.assertEqual(os.waitpid(child, 0)[1], 0)
                finally:
                    forked.set()
                self.assertEqual(type(done.exception()), QueueError if is_closed else type(None))
            self.assertEqual([job.task for job in kept.list_jobs()], ["t"])
        self.assertEqual(kept.check()["problems"], [])

    def test_child_forked_inside_a_transaction_gets_no_queue(self):
        queue = self.open()
        with queue.transaction():
            queue.enqueue("kept")
            child = os.fork()
            if child == 0:
                code = 1
                with suppress(QueueError):
                    queue.stats()
                    code = 2
                with suppress(QueueError):
                    self.open()
                    code = 3
                os._exit(0 if code == 1 else code)
            self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(len(queue.list_jobs(task="kept")), 1)

    def test_child_that_leaves_the_transaction_it_was_forked_in_gets_an_error_of_the_queue(self):
        queue = self.open()
        code, child = 1, None
        try:
            with queue.transaction():
                queue.enqueue("kept")
                child = os.fork()
        except QueueError:
            code = 0
        finally:
            if child == 0:
                os._exit(code)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(len(queue.list_jobs(task="kept")), 1)

    def test_queue_closed_under_the_calls_of_threads_ends_them_with_an_error(self):
        code = """
import pqueue, threading, time
def work(queue, name):
    try:
        while True:
            queue.enqueue("t")
            job = queue.dequeue(name)
            job and queue.complete(job)
            queue.list_jobs(limit=3)
    except pqueue.QueueError as error:
        sys.stdout.write(f"{error}\\n")
for _ in range(20):
    queue = pqueue.PersistentQSQLite(sys.argv[1], durability="normal")
    threads = [threading.Thread(target=work, args=[queue, f"w{n}"]) for n in range(3)]
    for thread in threads: thread.start()
    time.sleep(0.01)
    queue.close()
    for thread in threads: thread.join()
    other = pqueue.PersistentQSQLite(sys.argv[1])
    assert other._writer_lock.acquire()
    other._writer_lock.release()
    other.close()
"""
        with python(code, self.path) as child:
            output = child.stdout.read().splitlines()
            self.assertEqual(child.wait(), 0)
        self.assertEqual(len(output), 60)
        other = [line for line in output if not line.endswith(("is closed", "on it was lost", "Bad file descriptor"))]
        self.assertEqual(other, [])

    def test_queue_closes_a_connection_although_an_error_keeps_it(self):
        def write(queue):
            with queue._transaction() as session:
                session.run("SELECT fail()")

        ways = {"after a call": lambda queue: queue._read("SELECT fail()"), "write": write}
        ways["read"] = ways["after a call"]
        for way, use in ways.items():
            with self.subTest(way), ThreadPoolExecutor(1) as thread:
                queue, reached, closed = self.open(), threading.Event(), threading.Event()

                def fail(reached=reached, closed=closed):
                    reached.set()
                    closed.wait(PATIENCE_SECONDS)
                    raise ValueError

                def call(queue=queue, use=use, fail=fail):
                    queue._session().connection.create_function("fail", 0, fail)
                    use(queue)

                if way == "after a call":
                    closed.set()
                calling = thread.submit(call)
                reached.wait(PATIENCE_SECONDS)
                if way == "after a call":
                    calling.exception()
                queue.close()
                closed.set()
                self.assertIsNotNone(calling.exception())
                self.assertFalse(Path(f"{self.path}-wal").exists())

    def test_session_that_two_threads_close_is_closed_once(self):
        queue = self.open()
        queue.enqueue("t")
        session = queue._session()
        with session.in_use:  # as by a thread that is inside a call
            session.in_use.acquire()
            queue.close()
            session._disconnect()
            session.in_use.release()
        with self.assertRaisesRegex(QueueError, "is closed"):
            queue.enqueue("t")

    def test_child_that_cannot_reconnect_gets_an_error_until_it_can(self):
        import resource  # not available on Windows

        queue = self.open()
        queue.enqueue("t")
        child = os.fork()
        if child == 0:
            with suppress(Exception):
                before = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
                self.assertRaises(QueueError, queue.enqueue, "never")
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
                os._exit(queue.enqueue("by child") != 2)
            os._exit(1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(queue.enqueue("by parent"), 3)

    def test_process_forked_while_the_lock_was_held_does_not_keep_it(self):
        queue = self.open()
        with queue.transaction():
            child = os.fork()
            if child == 0:
                time.sleep(600)
        try:
            self.assertTrue(queue._writer_lock.acquire())
            queue._writer_lock.release()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    def test_child_forked_while_threads_wait_has_none_of_their_locks(self):
        def is_waiting():
            return any(frame.f_code.co_name == "acquire" for frame in sys._current_frames().values())

        queue = self.open()
        job_id = queue.enqueue("t")
        with ThreadPoolExecutor(2) as threads:
            result = threads.submit(queue.result, job_id)
            wait_until(lambda: queue._result_locks.waiting.find(b"\1") >= 0)
            self.assertTrue(queue._writer_lock.acquire())
            waiting = threads.submit(queue._writer_lock.acquire)
            wait_until(is_waiting)
            child = os.fork()
            if child == 0:
                # It opens its own when it uses the queue.
                os._exit(bool(re.search(r"queue\.db\.d/\S*(lock|wakeup|writer)", "\n".join(held()))))
            _, status = os.waitpid(child, 0)
            queue._writer_lock.release()
            self.assertTrue(waiting.result())
            queue._writer_lock.release()
            queue.complete(queue.dequeue("w"), 5)
            self.assertEqual(result.result(), 5)
        self.assertEqual(status, 0)

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_forked_child_has_locks_of_its_own_and_none_of_its_parent(self):
        def files(*, of_consumer):
            found = re.findall(r"queue\.db\S*", "\n".join(held()))
            return sorted(name for name in found if ("/0." in name) == of_consumer)

        queue = self.open()
        queue.dequeue("w")
        before = files(of_consumer=False)
        self.assertTrue(files(of_consumer=True))
        child = os.fork()
        if child == 0:
            with suppress(Exception), queue.transaction():
                queue.enqueue("t")
                is_locked = queue.is_locked_by(os.getpid())
                os._exit(not is_locked or files(of_consumer=True) != [] or files(of_consumer=False) != before)
            os._exit(1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_daemon_that_closes_all_descriptors_after_its_fork_gets_the_queue(self):
        queue = self.open()
        queue.dequeue("w")
        first_uses = {
            "enqueue": lambda: queue.enqueue("t"),  # job 1
            "dequeue": lambda: queue.dequeue("child"),
            "wait": lambda: queue.wait(0, consumer="child"),
            "result": lambda: self.assertRaises(TimeoutError, queue.result, 1, timeout_seconds=0),
            "check": lambda: self.assertEqual(queue.check()["problems"], []),
            "close": queue.close,
        }
        for name, use in first_uses.items():
            child = os.fork()
            if child == 0:
                os.closerange(3, 1000)
                with suppress(Exception):
                    use()
                    os._exit(0)
                os._exit(1)
            with self.subTest(name):
                self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(queue.count_jobs(), 1)

    def test_queue_writes_nothing_into_files_that_took_the_numbers_of_its_descriptors(self):
        child = os.fork()
        if child == 0:
            with suppress(Exception):
                queue = self.open()
                queue.dequeue("w")
                os.closerange(3, 1000)
                for _ in range(100):
                    os.open(self.folder / "other", os.O_RDWR | os.O_CREAT)
                for use in (functools.partial(queue.enqueue, "t"), queue.close):
                    self.assertRaises(pqueue.DatabaseReplaced, use)
                del use, queue
                gc.collect()
                os._exit((self.folder / "other").stat().st_size)
            os._exit(1)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_forked_child_opens_no_file_of_a_queue_that_was_closed(self):
        def fork():
            child = os.fork()
            if child == 0:
                os._exit("queue.db" in "\n".join(held()))
            codes.append(os.waitpid(child, 0)[1])
            forked.set()

        codes, forked, close = [], threading.Event(), pqueue_sqlite.SQLiteSession.close
        queue = self.open()
        queue.enqueue("t")
        queue.close()
        fork()
        forked.clear()
        queue = self.open()
        queue.enqueue("t")
        with ThreadPoolExecutor(1) as thread:

            def fork_meanwhile(session):
                thread.submit(fork)
                forked.wait(0.1)  # it waits for the end
                close(session)

            with mock.patch.object(pqueue_sqlite.SQLiteSession, "close", fork_meanwhile):
                queue.close()
        self.assertEqual(codes, [0, 0])

    def test_queue_is_closed_although_garbage_collection_closes_its_locks_first(self):
        count, is_collecting = pqueue_files._count_open, []

        def collected(*arguments):
            if not is_collecting:
                is_collecting.append(True)
                pqueue_files.FileLocks.close_unused()  # as the end of another session that nobody refers to
                is_collecting.clear()
            return count(*arguments)

        queue = self.open()
        queue.enqueue("t")
        with mock.patch.object(pqueue_files, "_count_open", collected):
            queue.close()

    def test_forked_child_has_no_lock_of_a_queue_that_is_closed_during_a_call(self):
        queue, begun, end = self.open(), threading.Event(), threading.Event()

        def be_interrupted():
            with self.assertRaisesRegex(QueueError, "queue object is closed"), queue.transaction():
                begun.set()
                end.wait()

        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(be_interrupted)
            begun.wait()
            queue.close()
            with mock.patch.object(pqueue_sqlite, "BUSY_SECONDS", 0.1):  # the fork waits for the thread that long
                child = os.fork()
            if child == 0:
                os._exit("queue.db.d" in "\n".join(held()))
            code = os.waitpid(child, 0)[1]
            end.set()
            call.result()
        self.assertEqual(code, 0)

    def test_spawned_and_forked_consumers_share_all_jobs(self):
        queue = self.open(durability="normal")
        ids = queue.enqueue_many("t", range(300))
        for method in ("spawn", "fork"):
            context = multiprocessing.get_context(method)
            with self.subTest(method=method):
                workers = [context.Process(target=drain, args=[self.path, f"{method}-{n}"]) for n in range(3)]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
                    self.assertEqual(worker.exitcode, 0)
                    worker.close()
                self.assertEqual(queue.stats()["states"]["completed"], len(ids))
                for job_id in ids:
                    queue.resubmit(job_id)

    @contextmanager
    def stopped(self, where):
        """Have a process stopped while it holds a lock: "writer", or that of a line."""
        code = """
import pqueue, time
queue = pqueue.PersistentQSQLite(sys.argv[1])
locks = {lock._path.name: lock for lock in (queue._writer_lock._lock, *queue._writer_lock._lines)}
assert locks[sys.argv[2]].try_acquire()
print("in", flush=True)
time.sleep(600)
"""
        with python(code, self.path, where) as child:
            child.stdout.readline()
            child.send_signal(signal.SIGSTOP)
            wait_until(lambda: pqueue_files.is_stopped(child.pid))
            yield child

    @contextmanager
    def waits(self):
        """Yield a list of how long each wait for a lock was meant to be."""
        waits, original = [], pqueue_locks._wait_for

        def wait_for(pipe, seconds, **options):
            waits.append(seconds)
            return original(pipe, seconds, **options)

        with mock.patch("pqueue_locks._wait_for", wait_for):
            yield waits

    def test_process_stopped_with_the_lock_does_not_stop_the_others(self):
        queue, other = self.open(), self.open()
        with (
            self.stopped("writer") as child,
            mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.05),
            self.waits() as waits,
        ):
            self.assertEqual(queue.enqueue("t"), 1)
            paid = len(waits)
            for number in range(2, 6):  # nobody waits again for the same process, in whichever line
                self.assertEqual((queue if number % 2 else other).enqueue("t"), number)
            other.complete(other.dequeue("w"))
            self.assertEqual(len(waits), paid)
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.wait()
            self.assertEqual(queue.enqueue("t"), 6)
        self.assertTrue(queue._writer_lock.acquire())
        queue._writer_lock.release()

    def test_process_stopped_at_the_head_of_a_line_does_not_stop_the_others(self):
        queue, holder = self.open(), self.open()
        with self.stopped("others"), mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.5):
            wait_until(lambda: queue._writer_lock._lines[0]._held_seconds() >= 0.5)
            for _ in range(3):
                self.assertTrue(holder._writer_lock.acquire())
                leave = mock.Mock(side_effect=lambda *_, **__: holder._writer_lock.release())
                with mock.patch("pqueue_locks._wait_for", leave):
                    self.assertTrue(queue._writer_lock.acquire())
                leave.assert_called_once()  # it waited for the lock, and not for the line
                queue._writer_lock.release()

    def test_process_stopped_and_continued_keeps_no_writer_waiting(self):
        queue = self.open()
        code = """
import pqueue, time
queue = pqueue.PersistentQSQLite(sys.argv[1])
queue._writer_lock.acquire()
print("in", flush=True)
signal.sigwait([signal.SIGUSR1])
queue._writer_lock.release()
print("out", flush=True)
time.sleep(600)
"""
        mask = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])"
        with python(f"{mask}{code}", self.path) as child, mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.05):
            child.stdout.readline()
            child.send_signal(signal.SIGSTOP)
            self.assertEqual(queue.enqueue("t"), 1)
            self.assertFalse(queue._writer_lock.acquire())
            child.send_signal(signal.SIGUSR1)
            child.send_signal(signal.SIGCONT)
            child.stdout.readline()
            self.assertTrue(queue._writer_lock.acquire())
            queue._writer_lock.release()
            self.assertEqual(queue.check()["problems"], [])

    def test_check_names_a_process_that_is_stopped_with_the_lock(self):
        queue = self.open()
        for where in ("writer", *pqueue_locks.LINES):
            with (
                self.subTest(where),
                self.stopped(where) as child,
                mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.05),
            ):
                wait_until(lambda: queue.check(thorough=False)["problems"])
                (problem,) = queue.check(thorough=where != "writer")["problems"]
                self.assertRegex(problem, f"process {child.pid} is stopped and has held .*/{where} for ")
                self.assertIn(f"kill -CONT {child.pid}", problem)
                child.send_signal(signal.SIGCONT)
                wait_until(lambda: not pqueue_files.is_stopped(child.pid))
                (problem,) = queue.check(thorough=False)["problems"]
                self.assertRegex(problem, f"process {child.pid} has held .*: end it if it does not continue")
                child.kill()
                child.wait()
                self.assertEqual(queue.check()["problems"], [])
                with closing(pqueue_locks.WriterLock(Path(f"{self.path}.d"))) as other:  # the check has released them
                    self.assertTrue(all(lock.try_acquire() for lock in (other._lock, *other._lines)))

    def test_writer_blocked_by_a_stopped_transaction_gets_its_process_id(self):
        queue = self.open(busy_seconds=0.05)
        code = """
import pqueue, time
with pqueue.PersistentQSQLite(sys.argv[1]).transaction():
    print("in", flush=True)
    time.sleep(600)
"""
        with python(code, self.path) as child, mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.05):
            child.stdout.readline()
            child.send_signal(signal.SIGSTOP)
            wait_until(lambda: pqueue_files.is_stopped(child.pid))
            with self.assertRaisesRegex(QueueBusy, f"another writer held it for .*; process {child.pid} is stopped"):
                queue.enqueue("t")

    def test_writer_that_died_in_a_lock_leaves_it_free(self):
        writer_lock = self.open()._writer_lock
        for lock in (writer_lock._lock, *writer_lock._lines):
            with self.subTest(lock._path.name), mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.05):
                with self.stopped(lock._path.name) as child:
                    child.kill()
                    child.wait()
                wait_until(lambda: lock._held_seconds() >= 0.05)  # noqa: B023 - it says so, but nobody holds it
                self.assertTrue(lock.acquire(time.monotonic() + 60))
                lock.release()

    def test_writer_that_died_waiting_delays_the_others_once(self):
        holder, queue = self.open(), self.open()
        lock, go = queue._writer_lock._lock, self.folder / "go"
        code = """
import os, pqueue, pqueue_locks, time
pqueue_locks.LOCK_TIMEOUT_SECONDS = 60
queue = pqueue.PersistentQSQLite(sys.argv[1])
print("open", flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.001)
queue._writer_lock.acquire(in_batch=sys.argv[3] == "1")
"""
        for kind, _ in enumerate(pqueue_locks.LINES):
            place = lock.WAITING_SINCE + kind
            with python(code, self.path, go, kind) as child, self.waits() as waits:
                child.stdout.readline()
                self.assertTrue(holder._writer_lock.acquire())
                go.touch()
                wait_until(lambda: 0 < lock._shared[place] < time.monotonic() - pqueue_locks.OVERTAKE_SECONDS)  # noqa: B023
                child.kill()
                child.wait()
                go.unlink()
                holder._writer_lock.release()
                for _ in range(3):
                    self.assertTrue(queue._writer_lock.acquire(in_batch=not kind))
                    queue._writer_lock.release()
                self.assertLessEqual(waits, [pqueue_locks.HANDOVER_SECONDS] * 2)  # the dead may not have woken up

    def test_writer_interrupted_in_line_does_not_keep_the_lock(self):
        queue, other = self.open(), self.open()
        with other.transaction(), mock.patch("pqueue_locks._wait_for", side_effect=InterruptedError):
            with self.assertRaises(InterruptedError):
                queue.enqueue("never")
        for each in (other, queue):
            self.assertTrue(each._writer_lock.acquire())
            each._writer_lock.release()
        self.assertEqual(queue.enqueue("t"), 1)

    def let_through(self, calls, *, in_batch=False):
        """Hold the lock until each call waits in a thread of its own, in this order; then see all through."""
        holder, pipes = self.open(), []

        def wait_for(pipe, seconds, **options):
            pipes.append(pipe)
            return original(pipe, seconds, **options)

        original, threads = pqueue_locks._wait_for, [threading.Thread(target=call, daemon=True) for call in calls]
        with (
            mock.patch("pqueue_locks._wait_for", wait_for),
            mock.patch.multiple(pqueue_locks, POLL_SECONDS=60, LOCK_TIMEOUT_SECONDS=60),
        ):
            self.assertTrue(holder._writer_lock.acquire(in_batch=in_batch))
            for number, thread in enumerate(threads, 1):
                thread.start()
                wait_until(lambda n=number: len(pipes) == n)
            holder._writer_lock.release()
            for thread in threads:
                thread.join(PATIENCE_SECONDS)
                self.assertFalse(thread.is_alive())

    def test_writers_in_line_are_woken_one_after_the_other(self):
        queues = [self.open(busy_seconds=60) for _ in range(3)]
        self.let_through([lambda queue=queue: queue.enqueue("t") for queue in queues])
        self.assertEqual(queues[0].stats()["states"]["pending"], 3)

    def test_released_line_wakes_up_a_writer_even_if_none_is_recorded(self):
        line = self.open()._writer_lock._lines[0]
        self.assertTrue(line.try_acquire())
        line.release()
        self.assertTrue(select.select([line._pipes[0]], [], [], 0)[0])

    @unittest.skipUnless(hasattr(select, "epoll"), "needs epoll")
    def test_writer_in_line_waits_so_that_a_wake_up_is_for_one_writer_only(self):
        queue, holder = self.open(), self.open()
        line = queue._writer_lock._lines[0]
        self.assertTrue(holder._writer_lock._lines[0].try_acquire())
        pqueue_locks.wake_up(line._pipes[0])
        with mock.patch("select.poll") as poll:  # which wakes up all
            self.assertFalse(line.acquire(time.monotonic() + 0.01))
        poll.assert_not_called()

    def test_enqueue_goes_before_a_consumer_that_came_first_when_another_consumer_leaves(self):
        producer, consumer, taken = self.open(busy_seconds=60), self.open(busy_seconds=60), []
        producer.enqueue("t")
        consumer.dequeue("w")
        calls = [lambda: taken.append(consumer.dequeue("w")), lambda: producer.enqueue("t")]
        self.let_through(calls, in_batch=True)
        self.assertEqual(taken[0].task, "t")

    def test_consumer_goes_before_an_enqueue_that_came_first_when_another_producer_leaves(self):
        producer, consumer, taken = self.open(busy_seconds=60), self.open(busy_seconds=60), []
        producer.enqueue("t")
        consumer.dequeue("w")
        self.let_through([lambda: producer.enqueue("t"), lambda: taken.append(consumer.dequeue("w"))])
        self.assertEqual(taken, [None])

    def test_newcomer_does_not_overtake_a_writer_that_has_waited_for_long(self):
        queue, newcomer = self.open(), self.open()
        lock = newcomer._writer_lock._lock
        for kind, _ in enumerate(pqueue_locks.LINES):
            for seconds, overtakes in ((0.0, True), (60.0, False)):
                with self.subTest(kind=kind, seconds=seconds), mock.patch("pqueue_locks.HANDOVER_SECONDS", 60):
                    self.assertTrue(queue._writer_lock.acquire())
                    lock._shared[lock.WAITING_SINCE + kind] = time.monotonic() - seconds
                    queue._writer_lock._lock._owned_since = time.monotonic()
                    with mock.patch("pqueue_locks.OVERTAKE_SECONDS", 30):
                        queue._writer_lock.release()
                    self.assertEqual(lock.try_acquire(), overtakes)
                    self.assertEqual(lock.try_acquire(1 - kind), overtakes)
                    self.assertTrue(lock.try_acquire(kind))
                    lock.release()

    def test_writer_that_has_the_lock_is_no_longer_shown_as_waiting(self):
        lock = self.open()._writer_lock._lock
        for kind, _ in enumerate(pqueue_locks.LINES):
            self.assertTrue(lock.acquire(time.monotonic(), kind))
            self.assertEqual(list(lock._shared[lock.WAITING_SINCE :]), [0.0, 0.0])
            lock.release(kind)

    def test_lock_is_reserved_for_a_few_milliseconds(self):
        lock = self.open()._writer_lock._lock
        with mock.patch("time.monotonic", return_value=1000.0):
            for seconds, is_reserved in ((-1, False), (0, False), (0.005, True), (1, False)):
                lock._shared[lock.RESERVED_UNTIL] = 1000.0 + seconds
                self.assertEqual(lock._is_reserved(), is_reserved)

    def test_lock_file_from_before_a_reboot_delays_no_writer(self):
        queue = self.open()
        lock = queue._writer_lock._lock
        for place in (lock.HELD_SINCE, lock.RESERVED_UNTIL):
            lock._shared[place] = time.monotonic() + 1e6
        lock._shared[lock.RESERVED_FOR] = 1
        with self.waits() as waits:
            for _ in range(3):
                self.assertTrue(queue._writer_lock.acquire())
                queue._writer_lock.release()
        self.assertEqual(waits, [])
        self.assertEqual(queue.check()["problems"], [])

    def test_writer_in_a_loop_lets_one_that_waits_go_first_after_a_while(self):
        queue, waiter = self.open(), self.open()
        lock = queue._writer_lock._lock
        with mock.patch.multiple(pqueue_locks, REPEAT_SECONDS=10.0, OVERTAKE_SECONDS=60, HANDOVER_SECONDS=60):
            for seconds, repeats, goes_on in ((0.0, True, True), (11.0, False, True), (11.0, True, False)):
                self.assertTrue(queue._writer_lock.acquire())
                lock._shared[lock.WAITING_SINCE] = time.monotonic()
                lock._owned_since = time.monotonic() - seconds
                if not repeats:  # it has written for that long, but once
                    lock._held_since = lock._shared[lock.HELD_SINCE] = lock._owned_since
                queue._writer_lock.release()
                self.assertEqual(lock.try_acquire(), goes_on)
                lock.release(1)
            self.assertTrue(waiter._writer_lock._lock.acquire(time.monotonic()))
            waiter._writer_lock._lock.release()

    def test_writer_in_line_gets_through_although_a_wake_up_is_lost(self):
        queue, other = self.open(), self.open()
        waiting = threading.Thread(target=queue.enqueue, args=["t"])
        with (
            mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 60),
            mock.patch("os.write", side_effect=BlockingIOError),
            other.transaction(),
        ):
            waiting.start()
            self.assertTrue(wait_until(lambda: queue._writer_lock._lock._shared[pqueue_locks.FairLock.WAITING_SINCE]))
        waiting.join()
        self.assertEqual(queue.stats()["states"]["pending"], 1)

    def test_process_that_waits_for_results_is_woken_by_any_of_their_jobs(self):
        queue, other = self.open(), self.open()
        ids = other.enqueue_many("t", range(3))
        jobs, slot = other.dequeue_many("w", 3), queue._result_locks.acquire()
        self.addCleanup(slot.close)
        for job, waits_for in ((jobs[1], ids[1:]), (jobs[2], ids[2:])):
            slot.wait(waits_for, lambda: True)  # says what it waits for
            self.assertTrue(slot.sleep(1, lambda job=job: other.complete(job) or math.inf))

    def test_pipe_of_a_dead_waiter_gets_no_wake_up(self):
        queue = self.open()
        with python(
            "import pqueue; q = pqueue.open_queue(sys.argv[1]); q.dequeue('w'); print(1, flush=True)\n"
            "while True: q.wait(1, consumer='w')",
            self.path,
        ) as child:
            child.stdout.readline()
            wait_until(lambda: queue._consumer_locks.waiting.find(b"\1") >= 0)
            child.kill()
            child.wait()
        queue.enqueue("t")
        self.assertEqual(queue._consumer_locks.waiting.find(b"\1"), -1)

    def test_wake_ups_of_a_busy_spell_do_not_become_a_spin(self):
        queue, other = self.open(), self.open()
        for _ in range(20):
            self.assertIsNone(queue.dequeue("w"))
            other.enqueue("t")
            queue.complete(queue.dequeue("w"))
        queue.wait(0.01, consumer="w")
        self.assertFalse(queue.wait(0.01, consumer="w"))
        other.enqueue("t")  # nobody waits for it
        queue.complete(queue.dequeue("w"))
        self.assertFalse(queue.wait(0.01, consumer="w"))


def drain(path, name):
    queue = pqueue.PersistentQSQLite(path, durability="normal")
    jobs = queue.dequeue_many(name, 10)
    while jobs:
        jobs, lost = queue.complete_and_dequeue([(job, None) for job in jobs], name, 10)
        assert not lost
    queue.close()


class Files(SQLiteCase):
    def test_everything_created_is_private_and_usable_whatever_the_umask(self):
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        for umask in (0, 0o077, 0o277, 0o777):
            os.umask(umask)
            self.path = self.folder / f"new-{umask:o}" / "inner" / "queue.db"
            queue = self.open()
            queue.enqueue("t")
            queue.dequeue("w")
            queue.backup(self.path.with_name("backup.db"))
            for path in [self.path.parents[1], *self.path.parents[1].rglob("*")]:
                with self.subTest(path=path.name, umask=f"{umask:04o}"):
                    self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o700 if path.is_dir() else 0o600)

    def test_queue_is_named_by_path_url_or_environment(self):
        urls = {str(self.path): None, f"sqlite:///{self.path}": None, None: str(self.path)}
        for url, variable in urls.items():
            with self.subTest(url=url), mock.patch.dict(os.environ, {"PQUEUE_URL": variable or ""}):
                with open_queue(url) as queue:
                    self.assertEqual(queue.path, self.path)
        with self.assertRaisesRegex(ValueError, "expected a path or sqlite:///PATH, or postgresql:.*got redis"):
            open_queue("redis://secret@host")
        with self.assertRaisesRegex(ValueError, "expected a path or sqlite:///PATH, got postgresql:"):
            pqueue.sqlite_path("postgresql://secret@host")

    def test_queue_is_named_by_a_path_object(self):
        with open_queue(self.path) as queue:
            self.assertEqual(queue.path, self.path)
        with mock.patch.dict(os.environ, {"PQUEUE_URL": str(self.path)}):
            self.assertEqual(pqueue.sqlite_path(), self.path)
        self.assertEqual(pqueue.sqlite_path(Path("port=5432")), Path("port=5432").absolute())

    def test_name_that_was_not_meant_as_a_path_creates_nothing(self):
        here = os.getcwd()
        os.chdir(self.folder)
        self.addCleanup(os.chdir, here)
        wrong = [
            ":memory:",
            "~",
            "~/queue.db",
            "~ann/queue.db",
            "file:queue.db",
            "FILE:queue.db?mode=memory",
            "file::memory:",
        ]
        wrong += [
            "",
            " ",
            "a\0b",
            "sqlite:queue.db",
            "sqlite://",
            "sqlite:///",
            "sqlite:///:memory:",
            "sqlite:///~/q.db",
            "sqlite:///q.db?x=1",
            "folder/",
            "folder/.",
            "sqlite:///folder/",
            "dbname=queue host=localhost",
        ]
        for url in [*wrong, *map(Path, wrong[:7]), b"queue.db", 7, True]:
            with self.subTest(url=url), self.assertRaisesRegex(ValueError, "^expected .*, got [^\n]*$"):
                open_queue(url)
        for path in (*wrong[:10], b"queue.db", None):
            with self.subTest(path=path), self.assertRaisesRegex(ValueError, "^expected a path"):
                pqueue.PersistentQSQLite(path)
        self.assertEqual(list(self.folder.iterdir()), [])
        queue = self.open()
        before = set(self.folder.iterdir())
        for path in (":memory:", "~", "file:copy.db", b"copy.db"):
            with self.subTest(backup=path), self.assertRaisesRegex(ValueError, "^expected a path"):
                queue.backup(path)
        self.assertEqual(set(self.folder.iterdir()), before)

    def test_look_at_a_queue_that_is_not_there_creates_nothing(self):
        with self.assertRaisesRegex(
            QueueError, f"no queue at {self.path}: start a producer or a consumer, or check the path or PQUEUE_URL"
        ):
            open_queue(str(self.path), create=False)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_wrong_option_of_an_opening_creates_nothing(self):
        for busy in (-1, math.nan, math.inf, "5", None, True, 1e12):
            with self.assertRaisesRegex(ValueError, "expected busy_seconds between 0 and"):
                self.open(busy_seconds=busy)
        for options, expected in (
            ({"group": 5}, "a group"),
            ({"group": "a\0b"}, "a group"),
            ({"durability": 10**5000}, "a durability of full"),
        ):
            with self.assertRaisesRegex(ValueError, f"expected {expected}"):
                self.open(**options)
        with self.assertRaisesRegex(ValueError, "expected a path, got"):
            open_queue(f"{self.folder}/\ud800")
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_relative_path_in_a_deleted_folder_is_an_error(self):
        self.addCleanup(os.chdir, os.getcwd())
        gone = self.folder / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        for url in ("queue.db", None):
            with mock.patch.dict(os.environ, {"PQUEUE_URL": ""}):
                with self.assertRaisesRegex(QueueError, "current folder was deleted; name an absolute path"):
                    open_queue(url)
        self.open().enqueue("t")

    def test_look_at_an_empty_file_builds_nothing_in_it(self):
        self.path.touch()
        with self.assertRaisesRegex(QueueError, "no queue at"):
            open_queue(str(self.path), create=False)
        self.assertEqual([path.stat().st_size for path in self.folder.iterdir()], [0])

    def test_file_that_is_no_database_is_refused_and_left_alone_whatever_its_length(self):
        for content in (b"\n", b"x", b"\0", b"xy", b"SQLite format 3\0", bytes(512), bytes(4096), b"diary" * 2000):
            self.path.write_bytes(content)
            for create in (True, False):
                with self.subTest(content[:20], length=len(content), create=create):
                    with self.assertRaisesRegex(SchemaMismatch, "expected an SQLite database, got another file"):
                        pqueue.PersistentQSQLite(self.path, create=create)
            self.assertEqual([each.read_bytes() for each in self.folder.iterdir()], [content])

    def test_queue_of_a_group_is_open_to_its_accounts_and_no_others(self):
        import grp

        own = [each for each in grp.getgrall() if each.gr_gid in os.getgroups() or os.geteuid() == 0]
        group = max(own, key=lambda each: each.gr_gid != os.getegid(), default=None)
        if group is None:
            self.skipTest("needs a group that has a name")
        self.path = self.folder / "a" / "b" / "queue.db"
        self.open(group=group.gr_name).dequeue("w")
        for path in (self.folder / "a", *(self.folder / "a").rglob("*")):
            mode = 0o2770 if path.is_dir() else 0o660
            with self.subTest(path.name):
                self.assertEqual((path.stat().st_gid, stat.S_IMODE(path.stat().st_mode)), (group.gr_gid, mode))
        for path, mode in ((self.path, 0o640), (self.path.parent, 0o700)):
            with mock.patch("pqueue_sqlite.make_folder"), self.subTest(path.name):
                path.chmod(mode)
                with self.assertRaisesRegex(QueueError, f"expected {path} to belong to the group.* chmod"):
                    self.open(group=group.gr_name)

    def test_unusable_paths_are_refused_in_one_line(self):
        file = self.folder / "file"
        file.write_bytes(b"not a database, but long enough to be read as the header of one" * 9)
        torn = self.folder / "torn"
        self.open().enqueue("t")
        torn.write_bytes(b"garbage " + self.path.read_bytes()[8:])
        os.mkfifo(self.folder / "fifo")
        (self.folder / "loop").symlink_to("loop")
        theirs = self.folder / "theirs.db"
        with closing(sqlite3.connect(theirs)) as db:
            db.execute("CREATE TABLE theirs (x)")
        before = set(self.folder.iterdir())
        for path, message in (
            (self.folder, "got a folder"),
            (self.folder / "fifo", "expected a database file, got a pipe or a device"),
            (self.folder / "loop" / "queue.db", "cannot open .*loop"),
            (self.folder / ("x" * 300), "cannot open .*File name too long"),
            (file / "below", "Not a directory|File exists"),
            (file, "expected an SQLite database, got another file"),
            (torn, "expected an SQLite database, got another file"),
            (theirs, "got another program's database"),
        ):
            with self.subTest(path=path.name[:9]), self.assertRaisesRegex(QueueError, message) as caught:
                open_queue(str(path))
            self.assertNotIn("\n", str(caught.exception))
        self.assertEqual(set(self.folder.iterdir()), before)

    def test_unknown_durability_is_refused(self):
        with self.assertRaisesRegex(ValueError, "full or normal, got 'fast'"):
            self.open(durability="fast")
        with (
            mock.patch.dict(os.environ, {"PQUEUE_DURABILITY": "normal"}),
            self.assertRaisesRegex(ValueError, "'fast'$"),
        ):
            open_queue(self.path, durability="fast")

    def test_older_sqlite_is_refused(self):
        with (
            mock.patch("sqlite3.sqlite_version_info", (3, 36, 0)),
            self.assertRaisesRegex(QueueError, "^expected SQLite 3.37 or newer, got .*: use a newer Python$"),
        ):
            self.open()

    def test_schema_of_a_file_is_not_trusted_where_sqlite_can_do_without(self):
        queue = self.open()
        for version, is_trusted in (((3, 40, 1), 1), ((3, 41), 0)):
            with self.subTest(version), mock.patch("sqlite3.sqlite_version_info", version):
                queue.renew_connection()
                self.assertEqual(queue._read("PRAGMA trusted_schema"), [(is_trusted,)])

    def test_error_of_sqlite_is_a_queue_error_with_a_reason(self):
        queue = self.open()
        for message, expected in {
            "database is locked": "QueueBusy: cannot use .*: another writer held it for 5 s",
            "database table is locked": "QueueBusy: cannot use .*: another writer held it for 5 s",
            "database or disk is full": "QueueFull: cannot write to .*: its disk is full",
            "disk image is malformed": "QueueError: cannot use .*: it is damaged .*: stop all .* restore",
            "file is not a database": "SchemaMismatch: cannot use .*: expected an SQLite database, got another file",
            "attempt to write a readonly database": "QueueError: cannot write to .*: no permission, a read-only conn",
            "unable to open database file": "QueueError: cannot write to .*: no permission, a read-only conn",
            "no such table: a\x07b": "QueueError: cannot use .*: no such table: a.b$",
        }.items():
            with self.subTest(message):
                error = queue._error(sqlite3.OperationalError(message))
                self.assertRegex(f"{type(error).__name__}: {error}", f"^{expected}")
        with mock.patch("os.access", return_value=False):  # as in a folder that cannot be written
            error = queue._error(sqlite3.OperationalError("attempt to write a readonly database"))
            said = "cannot write to .*: Permission denied: (.*) has mode 0...; change it with chmod, or choose"
            self.assertRegex(str(error), f"^{said}")

    def test_error_of_a_permission_says_whose_the_file_is(self):
        import pwd

        denied = PermissionError(13, "Permission denied")
        owner = pwd.getpwuid(self.folder.stat().st_uid).pw_name
        folder = self.folder.stat()
        said = f"Permission denied: {self.folder} has mode {stat.S_IMODE(folder.st_mode):04o}; change it with chmod"
        self.assertIn(said, pqueue_files.error_reason(denied, self.path))
        with mock.patch("os.geteuid", return_value=folder.st_uid + 1):
            said = f"Permission denied: {self.folder} belongs to {owner}; run this as {owner}, or choose another path"
            self.assertEqual(pqueue_files.error_reason(denied, self.path), said)
            self.path.touch()
            said = f"{self.path} belongs to {owner}; run this as {owner}, or create the queue with PQUEUE_GROUP=GROUP"
            self.assertEqual(pqueue_files.error_reason(denied, self.path), f"Permission denied: {said}")
            with mock.patch("pwd.getpwuid", side_effect=KeyError):
                self.assertEqual(pqueue_files.error_reason(denied, self.path), "Permission denied")
        self.assertEqual(pqueue_files.error_reason(OSError(28, "No space left"), self.path), "No space left")

    def test_queue_without_the_locks_of_posix_polls_and_counts_every_attempt(self):
        with mock.patch("pqueue_sqlite.has_locks", return_value=False), mock.patch("time.sleep") as sleep:
            queue = self.open()
            queue.enqueue("t", now=NOW)
            queue.dequeue("w", now=NOW)
            self.assertEqual(queue.dequeue("other", now=NOW + 60).attempts, 2)
            self.assertFalse(queue.wait(0.05, consumer="w", now=NOW))
            self.assertTrue(queue.wait(1, consumer="w", now=NOW + 999))
            self.assertEqual([job.attempts for job in queue.dequeue_many("w", 9, prefetch=True, now=NOW + 999)], [3])
        self.assertEqual([call.args for call in sleep.mock_calls], [(0.05,), (0.0,)])

    def test_system_that_shows_nothing_of_itself_is_borne(self):
        with (
            mock.patch.object(Path, "read_bytes", side_effect=OSError),
            mock.patch.object(Path, "read_text", side_effect=OSError),
        ):
            self.assertEqual(pqueue_files.file_system(self.folder), "unknown")
            self.assertIs(pqueue_files.is_stopped(os.getpid()), False)
            self.assertEqual(pqueue_locks.boot_id.__wrapped__(), 0)

    def test_queue_restored_from_a_dump_is_a_queue_again(self):
        self.open().enqueue("t", [1])
        with self.sqlite() as db:
            dump = "\n".join(db.iterdump())
        self.path = self.folder / "restored.db"
        with self.sqlite() as db:
            db.executescript(dump)
        self.path.chmod(0o600)
        queue = self.open()
        self.assertEqual((queue.get(1).payload, queue.check()["problems"]), ([1], []))

    def test_full_disk_is_reported_and_waited_out(self):
        queue = self.open()
        queue.enqueue("small")
        connection = queue._session().connection
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        with self.assertRaisesRegex(QueueFull, "disk is full"):
            for _ in range(100):
                queue.enqueue("t", "x" * 5000)
        with self.assertRaises(QueueFull):
            queue.enqueue_many("many", ["x" * 5000] * 50)
        self.assertEqual(queue.list_jobs(task="many"), [])
        connection.execute("PRAGMA max_page_count = 100000")
        queue.enqueue("after", "x" * 5000)
        self.assertEqual(queue.check()["quick_check"], "ok")

    def test_writer_that_holds_the_lock_too_long_is_reported_and_waited_out(self):
        queue = self.open(busy_seconds=0.05)
        with self.sqlite() as db:
            db.execute("BEGIN IMMEDIATE")
            with self.assertRaisesRegex(QueueBusy, "another writer held it"):
                queue.enqueue("t")
            self.assertEqual(self.open(busy_seconds=0).count_jobs(), 0)  # who only looks waits for nobody
            db.execute("ROLLBACK")
        self.assertEqual(queue.enqueue("t"), 1)

    def test_transaction_that_its_block_ended_is_an_error(self):
        queue = self.open()
        with self.assertRaisesRegex(QueueError, "ended inside its block"), queue.transaction() as db:
            db.execute("COMMIT")
        with self.assertRaisesRegex(QueueError, "transaction that has ended"), queue.transaction() as db:
            db.execute("ROLLBACK")
            queue.enqueue("never")
        self.assertEqual(queue.list_jobs(), [])

    def test_backup_is_a_whole_queue_and_replaces_nothing(self):
        queue = self.open()
        job_id = queue.enqueue("t", [1])
        copy = self.folder / "copy.db"
        queue.backup(copy)
        self.assertEqual(stat.S_IMODE(copy.stat().st_mode), 0o600)
        with open_queue(str(copy), create=False) as restored:
            self.assertEqual(restored.get(job_id).payload, [1])
            self.assertEqual(restored.check()["problems"], [])
        with self.assertRaisesRegex(QueueError, "File exists"):
            queue.backup(copy)
        copy = self.folder / "theirs"
        with mock.patch("pqueue_sqlite.sync", lambda _: copy.write_text("made meanwhile")):
            with self.assertRaisesRegex(QueueError, "File exists"):
                queue.backup(copy)
        self.assertEqual(copy.read_text(), "made meanwhile")

    def test_backup_is_read_without_a_log_that_another_database_of_its_name_has_left(self):
        copy = self.folder / "copy.db"
        log = self.folder / "copy.db-wal"
        with pqueue.PersistentQSQLite(copy) as other:
            other.enqueue_many("old", range(50))
            left = log.read_bytes()
        copy.unlink()
        log.write_bytes(left)  # as by a program that was killed
        queue = self.open()
        queue.enqueue("t")
        queue.backup(copy)
        with closing(sqlite3.connect(copy)) as db:
            self.assertEqual(db.execute("SELECT task FROM jobs").fetchall(), [("t",)])

    def test_compact_shrinks_the_file_in_transactions_that_let_others_write(self):
        queue = self.open()
        queue.enqueue_many("t", ["x" * 1000] * 2000)
        queue.delete_jobs()
        before = os.path.getsize(queue.path)
        with self.open() as other:
            freed = queue.compact(progress=lambda left: other.enqueue("t", left))
        self.assertGreater(freed, 1_500_000)
        self.assertEqual(os.path.getsize(queue.path), before - freed)
        self.assertEqual(queue.check()["problems"], [])
        self.assertEqual(queue.list_jobs()[0].payload, 0)
        self.assertGreater(len(queue.list_jobs(limit=1000)), 10)
        self.assertEqual(queue.compact(), 0)

    def test_compact_is_refused_for_a_file_that_was_not_created_for_it(self):
        path = self.folder / "restored.db"
        with self.open() as queue, closing(sqlite3.connect(path)) as copy, self.sqlite() as db:
            copy.executescript("\n".join(db.iterdump()))
        with open_queue(path) as queue, self.assertRaisesRegex(QueueError, "cannot compact .*move the queue to a new"):
            queue.compact()

    def test_log_is_cut_when_no_reader_needs_more(self):
        with mock.patch("pqueue_sqlite.WAL_BYTES", 100_000):
            queue = self.open()
            queue.enqueue_many("t", ["x" * 1000] * 500)
        self.assertGreater(queue.check()["wal_bytes"], 500_000)
        queue.compact()
        queue.enqueue("t")
        self.assertLessEqual(queue.check()["wal_bytes"], 100_000)

    def test_check_names_each_problem(self):
        queue = self.open()
        facts = queue.check()
        self.assertEqual((facts["journal_mode"], facts["durability"], facts["problems"]), ("wal", "full", []))
        queue.enqueue_many("t", range(1000))
        queue.delete_jobs()
        queue.close()
        queue = self.open()
        facts = queue.check()
        self.assertEqual(facts["used_bytes"] + facts["free_bytes"], facts["file_bytes"])
        self.assertGreater(facts["free_bytes"], 0)
        with self.sqlite() as db:
            db.execute("PRAGMA user_version = 0")
        self.assertEqual(queue.check()["problems"], ["expected schema_version 1, got 0"])
        with self.sqlite() as db:
            db.execute("PRAGMA user_version = 1")
        with mock.patch.object(queue, "durability", "normal"):
            queue._session()._synchronous = "NORMAL"  # the setting of the connection is FULL
            self.assertEqual(queue.check()["problems"], ["expected synchronous normal, got full"])

    def test_check_reports_problems_of_the_location(self):
        queue = self.open()
        queue.enqueue("t")
        log_bytes = queue.check()["wal_bytes"]
        cases = {
            "the file system fuse.odd is not known to be local: .*use a local disk": mock.patch(
                "pqueue_sqlite.file_system", return_value="fuse.odd"
            ),
            "the write-ahead log has grown to [0-9]+ MB: some program holds a read open": mock.patch(
                "pqueue_sqlite.WAL_BYTES", log_bytes // 2 - 1
            ),
            "the disk has only 268 MB left: free some, before writes fail": mock.patch(
                "shutil.disk_usage", return_value=mock.Mock(free=2**28 - 1)
            ),
        }
        for sentence, cause in cases.items():
            with self.subTest(sentence), cause:
                (problem,) = queue.check()["problems"]
                self.assertRegex(problem, f"^{sentence}$")
        with (
            mock.patch("pqueue_sqlite.WAL_BYTES", log_bytes // 2),
            mock.patch("shutil.disk_usage", return_value=mock.Mock(free=2**28)),
        ):
            self.assertEqual(queue.check()["problems"], [])
        self.path.chmod(0o604)
        self.assertEqual(
            queue.check()["problems"], [f"every account of this machine may use it: run chmod o= {self.path}"]
        )
        self.path.chmod(0o600)
        self.assertEqual(queue.check()["problems"], [])

    def test_check_of_a_queue_that_cannot_be_written_says_so(self):
        self.open().close()
        shutil.rmtree(f"{self.path}.d")
        with mock.patch("os.statvfs", return_value=mock.Mock(f_flag=os.ST_RDONLY)):
            queue = self.open()
        self.assertEqual(
            queue.check()["problems"], ["its file system is read-only: no job can be enqueued, run or changed"]
        )
        with self.assertRaisesRegex(QueueError, "cannot write to .*: its file system is read-only"):
            queue.enqueue("t")
        self.assertEqual(list(self.folder.iterdir()), [self.path])

    def test_queue_on_a_read_only_file_system_is_refused_if_its_log_has_no_index(self):
        self.open().close()
        Path(f"{self.path}-wal").write_bytes(b"log")
        with mock.patch("os.statvfs", return_value=mock.Mock(f_flag=os.ST_RDONLY)):
            with self.assertRaisesRegex(QueueError, "its log has no queue.db-shm; copy queue.db and queue.db-wal to a"):
                self.open()

    def test_names_of_created_files_are_synced(self):
        synced, fsync = [], os.fsync

        def recording(file):
            synced.append(os.readlink(f"/proc/self/fd/{file}"))
            fsync(file)

        self.path = self.folder.resolve() / "a" / "b" / "queue.db"
        with mock.patch("os.fsync", recording):
            queue = self.open()
            self.assertLessEqual({str(self.folder.resolve()), str(self.path.parent.parent)}, set(synced))
            synced.clear()
            queue.backup(self.path.with_name("backup.db"))
            self.assertTrue(synced[0].endswith(".part"))
            self.assertEqual(synced[1:], [str(self.path.parent)] * 2)  # before it takes its name, and after
            synced.clear()
            queue.begin_move("elsewhere")
            queue.move_to_file(self.path.with_name("moved.db"))
        self.assertRegex(synced[0], r"moved\.db\.\w+\.part$")
        self.assertEqual(synced[1:], [str(self.path.parent)] * 2)
        self.assertEqual([path.name for path in self.path.parent.glob("*.part")], [])

    def test_backup_that_fails_leaves_nothing(self):
        queue = self.open()
        queue.enqueue("t")
        before = set(self.folder.iterdir())
        for failing in ("pqueue_sqlite.sync", "pqueue_files.sync", "pathlib.Path.replace"):
            with mock.patch(failing, side_effect=OSError(28, "No space left")), self.subTest(failing):
                with self.assertRaisesRegex(QueueError, "cannot back up to .*copy.db: No space left"):
                    queue.backup(self.folder / "copy.db")
                self.assertEqual(set(self.folder.iterdir()), before)

    def test_statement_finds_its_jobs_and_events_by_an_index(self):
        queue = self.open()
        modules = (pqueue_schema, pqueue_move, pqueue_groups, pqueue_sqlite)
        for name, statement in [each for module in modules for each in vars(module).items() if each[0][0] != "_"]:
            if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)\b[^{]*$", str(statement)):
                for queues in (None, '["default"]'):
                    params = {**dict.fromkeys(re.findall(r":(\w+)", statement), 1), "queues": queues, "payloads": "[]"}
                    rows = queue._read(f"EXPLAIN QUERY PLAN {statement}", params)
                    plan = "\n".join(row[3] for row in rows)
                    with self.subTest(statement=name):
                        read = (
                            "SCAN" if re.search(r"\(id\) FROM (jobs|history)", statement) else "SCAN|SEARCH"
                        )  # max(id) is found without an index
                        others = "" if name == "DELETE_CONSUMERS" else "|consumers"
                        self.assertNotRegex(plan, rf"({read}) (jobs|history{others})\b(?! USING)")
                        if name in ("CLAIM", "NEXT_EVENT", "FIRST_JOBS", "NEXT_OF_TASK"):
                            self.assertIn("USING INDEX jobs_claim", plan.replace("COVERING ", ""))

    def test_batch_of_any_size_is_completed_by_as_many_statements(self):
        queue, numbers = self.open(), []
        for number in (2, 20):
            at = NOW + number
            queue.enqueue_many("t", range(number), now=at)
            done = [(job, None) for job in queue.dequeue_many("w", number, now=at)]
            with queue.transaction() as db:
                statements = []
                db.set_trace_callback(statements.append)
                queue.complete_and_dequeue(done, "w", 0, now=at)
                db.set_trace_callback(None)
            numbers.append(len(statements))
        self.assertEqual(queue.stats()["states"]["completed"], 22)
        self.assertEqual(numbers[0], numbers[1])

    def test_guarantee_10_claim_takes_as_many_steps_before_many_jobs_of_other_tasks(self):
        queue, steps = self.open(durability="normal"), []
        queue.dequeue("w", tasks=["t", "u"])
        queue._dead_checked_at = math.inf  # which takes more steps
        for number in (1, 20_000):
            queue.enqueue_many("unknown", [None] * number, priority=1)
            queue.enqueue_many("t", range(200))
            for limit in (1, 48):
                with queue.transaction() as db:
                    counted = itertools.count()
                    db.set_progress_handler(lambda counted=counted: next(counted) and 0, 10)
                    self.assertEqual(len(queue.dequeue_many("w", limit, tasks=["t", "u"], prefetch=True)), limit)
                    db.set_progress_handler(None, 0)
                steps.append(next(counted))
        self.assertLess(steps[2], 1.2 * steps[0] + 10)
        self.assertLess(steps[3], 1.2 * steps[1] + 10)

    def test_guarantee_10_claim_takes_as_many_steps_with_many_groups(self):
        def count(call):
            with queue.transaction() as db:
                counted = itertools.count()
                db.set_progress_handler(lambda: next(counted) and 0, 10)
                result = call()
                db.set_progress_handler(None, 0)
            steps.append(next(counted))
            return result

        queue, steps, numbers = self.open(durability="normal"), [], []
        queue.limit("default", running=1)
        queue.dequeue("w")
        queue._dead_checked_at = math.inf  # which takes more steps
        for groups in (10, 2000):
            for group in range(groups):
                queue.enqueue_many("t", range(2), group=f"{groups} {group}", priority=1, now=NOW)
            claims = []
            for number in (1, groups - 1, 1):  # the first, the others, and one that finds all groups at their limit
                claims.append(count(lambda number=number: queue.dequeue_many("w", number, now=NOW)))
            count(lambda job=claims[1][0]: queue.complete_and_dequeue([(job, None)], "w", now=NOW))
            numbers += map(len, claims)
        self.assertEqual(numbers, [1, 9, 0, 1, 1999, 0])
        for few, many in ((steps[0], steps[4]), (steps[2], steps[6]), (steps[3], steps[7])):
            self.assertLess(many, 1.2 * few + 10)

    def test_heartbeat_takes_as_many_steps_however_many_jobs_were_enqueued_and_completed(self):
        queue, times, steps = self.open(durability="normal"), itertools.count(NOW, 0.001), []
        queue.heartbeat("w", now=NOW)
        for number in (356, 2816):  # of all jobs, those after the last multiple of 256 are not counted yet
            for work in (
                lambda: queue.enqueue("t", now=NOW),
                lambda: queue.complete(queue.dequeue("w", now=NOW), now=next(times)),
            ):
                for _ in range(number):
                    work()
                with queue.transaction() as db:
                    counted = itertools.count()
                    db.set_progress_handler(lambda counted=counted: next(counted) and 0, 10)
                    queue.heartbeat("w", now=NOW)
                    db.set_progress_handler(None, 0)
                steps.append(next(counted))
        self.assertLess(steps[2], 1.2 * steps[0] + 10)
        self.assertLess(steps[3], 1.2 * steps[1] + 10)

    def test_queue_that_moves_to_a_file_takes_the_application_tables_along(self):
        queue, target = self.open(), self.folder / "new" / "queue.db"
        job_id = queue.enqueue("t", [1])
        queue.dequeue("w")
        with queue.transaction() as db:
            db.execute("CREATE TABLE theirs (x)")
            db.execute("CREATE INDEX theirs_index ON theirs (x)")
            db.execute("CREATE INDEX theirs_too ON jobs (task)")
            db.execute("CREATE VIEW seen AS SELECT x FROM theirs")
            db.execute("CREATE TRIGGER spy AFTER UPDATE ON queues BEGIN INSERT INTO theirs VALUES (1); END")
            db.execute("ANALYZE")  # creates a table of SQLite's own
            db.execute("PRAGMA writable_schema = 1")  # a table of a module that this process has not loaded
            sql = "CREATE VIRTUAL TABLE found USING missing"
            db.execute(f"INSERT INTO sqlite_master VALUES ('table', 'found', 'found', 0, '{sql}')")
            db.execute("PRAGMA writable_schema = 0")
        self.assertEqual(queue.other_tables(), ["found", "seen", "spy", "theirs", "theirs_too"])
        queue.begin_move(str(target))
        before = queue._read("SELECT count(*) FROM theirs")
        self.assertIsNone(queue.move_to_file(target))  # a job runs
        queue.leave("w")
        progress = []
        self.assertEqual(
            queue.move_to_file(target, progress=progress.append),
            {"queues": 1, "jobs": 1, "history": 2, "schedules": 0, "handlers": 0, "dependencies": 0},
        )
        self.assertTrue(progress)
        with self.assertRaisesRegex(QueueError, "cannot move to .*: File exists"):
            queue.move_to_file(target)
        with open_queue(target, create=False) as moved:
            self.assertEqual(moved.get(job_id).payload, [1])
            self.assertEqual(moved.consumers(), [])
            self.assertEqual(moved.other_tables(), queue.other_tables())
            self.assertEqual(moved._read("SELECT count(*) FROM theirs"), before)
            self.assertTrue(queue.has_moved_to(moved))
            self.assertEqual(moved.dequeue("w").id, job_id)
        self.assertEqual([path.name for path in target.parent.glob("*.part")], [])

    def test_queue_is_not_moved_to_a_file_in_which_a_row_of_the_application_is_missing(self):
        class Losing(sqlite3.Connection):
            def backup(self, copy, **options):
                super().backup(copy, **options)
                copy.execute("DELETE FROM theirs")

        queue, target = self.open(), self.folder / "new.db"
        with queue.transaction() as db:
            db.execute("CREATE TABLE theirs AS SELECT 1")
        queue.begin_move(str(target))
        with (
            mock.patch.object(queue, "_connect", lambda: sqlite3.connect(self.path, factory=Losing)),
            self.assertRaisesRegex(QueueError, 'cannot copy: what was read back by SELECT . FROM "theirs" is not what'),
        ):
            queue.move_to_file(target)
        self.assertFalse(target.exists())

    def test_queue_is_not_moved_over_a_file_that_was_made_meanwhile(self):
        queue, target = self.open(), self.folder / "new.db"
        queue.begin_move(str(target))
        with (
            mock.patch("pqueue_sqlite.sync", lambda _: target.write_text("made meanwhile")),
            self.assertRaisesRegex(QueueError, "cannot move to .*: File exists"),
        ):
            queue.move_to_file(target)
        self.assertEqual(target.read_text(), "made meanwhile")

    def test_index_holds_only_the_rows_it_is_for(self):
        self.open().enqueue("t")
        indexes = {
            "jobs_claim": ("state = 'pending'", "assigned_to IS NULL"),
            "jobs_assigned": ("state = 'pending'", "assigned_to IS NOT NULL"),
            "jobs_scheduled": ("state = 'scheduled'",),
            "jobs_processing": ("state = 'processing'",),
            "jobs_finished": ("finished_at IS NOT NULL",),
            "jobs_failed": ("state = 'failed'",),
            "jobs_key": tuple(pqueue_schema.HOLDS_KEY.split(" AND ", 1)),
            "consumers_running": ("state = 'running'",),
        }
        with self.sqlite() as db:
            for index, terms in indexes.items():
                rows = f"SELECT 1 FROM {index.split('_')[0]} INDEXED BY {index} WHERE "
                db.execute(rows + " AND ".join(terms))
                for term in terms:  # SQLite refuses an index that lacks rows which may be asked for
                    with self.subTest(index=index, without=term), self.assertRaises(sqlite3.OperationalError):
                        db.execute(rows + " AND ".join(["1 = 1", *(each for each in terms if each != term)]))

    def test_rows_are_readable_in_the_sqlite_shell(self):
        queue = self.open()
        queue.enqueue("t", {"a": "ü"})
        with self.sqlite() as db:
            row = db.execute("SELECT task, state, payload FROM jobs").fetchone()
            comments = db.execute("SELECT sql FROM sqlite_master WHERE name = 'jobs'").fetchone()[0]
        self.assertEqual(row, ("t", "pending", '{"a":"ü"}'))
        self.assertEqual(json.loads(row[2]), {"a": "ü"})
        self.assertIn("-- deliveries so far", comments)


@unittest.skipUnless(pqueue_files.has_locks(), "needs POSIX locks")
class Replaced(SQLiteCase):
    """A database whose files are replaced, deleted, or lose their locks while a process has it open."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "var" / "queue.db"

    def other(self, code, *arguments):
        """Return what another process prints in which `q` is this queue."""
        code = f"import pqueue\nq = pqueue.PersistentQSQLite(sys.argv[1])\n{code}\nq.close()"
        with python(code, self.path, *arguments) as child:
            output = child.stdout.read().strip()
            self.assertEqual(child.wait(), 0)
        return output

    def started(self):
        """Return a queue with some jobs in its log, and a backup of it."""
        queue = self.open()
        queue.enqueue_many("t", range(100))
        queue.backup(self.folder / "backup.db")
        queue.enqueue_many("t", range(100))
        return queue

    def sibling(self, suffix):
        return Path(f"{self.path}{suffix}")

    def test_queue_that_is_replaced_before_its_first_use_leaves_the_replacement_alone(self):
        self.started()
        unused = self.open()
        replacement = (self.folder / "backup.db").read_bytes()
        (self.folder / "backup.db").replace(self.path)
        for use in (unused.stats, lambda: unused.enqueue("t")):
            with self.assertRaises(pqueue.DatabaseReplaced):
                use()
        self.assertEqual(self.path.read_bytes(), replacement)

    def test_queue_that_is_deleted_while_it_is_opened_is_not_created_anew(self):
        self.open().close()
        connect = sqlite3.connect

        def late(*arguments, **options):
            self.path.unlink(missing_ok=True)
            return connect(*arguments, **options)

        with mock.patch("sqlite3.connect", late), self.assertRaisesRegex(QueueError, "unable to open database file"):
            self.open(create=False)
        self.assertFalse(self.path.exists())

    def test_queue_that_is_replaced_while_a_thread_connects_leaves_the_replacement_alone(self):
        queue, other = self.open(), self.folder / "other.db"
        pqueue.PersistentQSQLite(other).close()
        replacement = other.read_bytes()
        connect = queue._connect

        def late():
            other.replace(self.path)
            return connect()

        with mock.patch.object(queue, "_connect", late), self.assertRaises(pqueue.DatabaseReplaced):
            queue.stats()
        queue.close()
        self.assertEqual(self.path.read_bytes(), replacement)

    def assert_locks_kept(self, queue, act):
        """No job that was acknowledged to either process is lost, or given an id twice."""
        ids = [job.id for job in queue.list_jobs()]
        before = len(ids)
        for _ in range(2):
            act()
            self.other("q.stats()")
            ids.append(queue.enqueue("t"))
            ids.append(int(self.other("print(q.enqueue('t'))")))
        self.assertEqual(len(set(ids)), before + 4)
        self.assertEqual(sorted(json.loads(self.other("print([job.id for job in q.list_jobs()])"))), ids)
        self.assertEqual(queue.check()["problems"], [])

    def copies(self):
        def read():
            for suffix in ("", "-wal", "-shm"):
                self.sibling(suffix).read_bytes()

        def in_thread():
            thread = threading.Thread(target=read)
            thread.start()
            thread.join()

        return {
            "copy of the database": lambda: shutil.copy(self.path, self.folder / "copy.db"),
            "copy of the folder": lambda: shutil.copytree(self.path.parent, self.folder / "copy", ignore=no_fifos,
                                                          dirs_exist_ok=True),
            "reading": read,
            "reading in a thread": in_thread,
            "another connection": lambda: sqlite3.connect(self.path).close(),
        }  # fmt: skip

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_process_that_copies_its_database_keeps_its_locks(self):
        for name in self.copies():
            with self.subTest(name):
                self.path = self.folder / name / "queue.db"
                queue = self.open()
                queue.enqueue("t")
                self.assert_locks_kept(queue, self.copies()[name])
                queue.close()

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_second_queue_object_that_closes_leaves_the_first_one_its_locks(self):
        queue = self.open()
        self.assert_locks_kept(queue, lambda: self.open().close())
        with sqlite3.connect(self.path, isolation_level=None) as db:  # a connection of the user's own
            db.execute("BEGIN IMMEDIATE")
            queue.close()
            self.assertEqual(self.other("import sqlite3\nprint(q._read('SELECT 1')[0][0])"), "1")
            with self.assertRaises(subprocess.CalledProcessError):
                write = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN IMMEDIATE')"
                subprocess.run([sys.executable, "-c", write, self.path], check=True, stderr=subprocess.DEVNULL)
            db.execute("ROLLBACK")
        db.close()
        self.open().stats()  # which also closes the descriptors that were kept for that connection

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_process_that_has_other_files_under_its_descriptors_deletes_no_log(self):
        reuse = """
import gc, os, sqlite3
q.enqueue("t")
with sqlite3.connect(q.path) as db: db.execute("PRAGMA wal_checkpoint").fetchall()
db.close()
os.closerange(3, 60)
kept = [open(q.path.parent / f"other-{n}", "w+b", buffering=0) for n in range(40)]
for file in kept: os.set_blocking(file.fileno(), sys.argv[2] == "True")
"""
        queue = self.open()
        for end in ("q.close()", "del q", "(child := os.fork()) and os.waitpid(child, 0)"):
            for is_blocking in (True, False):
                with self.subTest(end, is_blocking=is_blocking):
                    self.other(f"{reuse}{end}\ngc.collect()\nos._exit(0)", is_blocking)
                    queue.enqueue("t")
        self.assertEqual((queue.check()["problems"], queue.count_jobs()), ([], 12))

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_writer_whose_descriptors_other_code_has_closed_acknowledges_nothing(self):
        reuse = """
import os, threading
from contextlib import suppress
kept = []
def other():
    path = os.devnull if how == "null" else q.path.parent / "other"
    return os.open(path, os.O_RDWR | os.O_CREAT)
def is_of_queue(number):
    with suppress(OSError): return os.readlink(f"/proc/self/fd/{number}") == f"{q.path}{suffix}"
how, suffix = sys.argv[2:]
q.enqueue("t")
thread = threading.Thread(target=q.stats)
thread.start()
thread.join()
for number in [number for number in range(3, 60) if suffix == "all" or is_of_queue(number)]:
    with suppress(OSError): os.close(number)
    if how != "closed": os.dup2(other(), number)
def say(call):
    try: print(type(call()).__name__)
    except Exception as error: print(type(error).__name__)
"""
        calls = """
try: print(q.get(1).id if suffix == "" else 1)  # others let SQLite wait for its index
except Exception as error: print(type(error).__name__)
say(lambda: q.enqueue("lost"))
thread = threading.Thread(target=say, args=(lambda: q.enqueue("lost"),))
thread.start()
thread.join()
say(lambda: pqueue.PersistentQSQLite(q.path))
say(lambda: q.enqueue("lost"))
os._exit(0)
"""
        queue = self.open()
        queue.enqueue("t")
        ids = [1]
        for how in ("closed", "null", "file"):
            for suffix in ("", "-wal", "-shm", "all"):
                with self.subTest(how, suffix=suffix):
                    said = self.other(reuse + calls, how, suffix).splitlines()
                    self.assertIn(said[0], ("1", "DatabaseReplaced"))
                    self.assertEqual([*said[1:3], said[4]], ["DatabaseReplaced"] * 3)
                    ids += [ids[-1] + 1, queue.enqueue("t")]
                    self.assertEqual([job.id for job in queue.list_jobs()], ids[::-1])
                    self.assertEqual(queue.check()["problems"], [])
                    other = self.path.parent / "other"
                    self.assertEqual(other.read_bytes() if other.exists() else b"", b"")

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_last_process_does_not_apply_another_file_under_the_descriptor_of_the_log(self):
        code = """
import os
q.enqueue_many("t", ["x" * 3000] * 30)
paths = {n: f"/proc/self/fd/{n}" for n in range(3, 60)}
(log,) = [n for n, path in paths.items() if os.path.lexists(path) and os.readlink(path).endswith("-wal")]
os.dup2(os.open(q.path.parent / "other", os.O_RDWR | os.O_CREAT), log)
os.write(log, b"z" * 400_000)
"""
        for number, end in enumerate(("q.close()", "del q", "(child := os.fork()) and os.waitpid(child, 0)"), 1):
            with self.subTest(end):
                self.other(f"{code}{end}\nos._exit(0)")
                queue = self.open()
                self.assertEqual((queue.check()["problems"], queue.count_jobs()), ([], 30 * number))
                queue.close()

    def test_thread_that_opens_the_database_meanwhile_may_close_it(self):
        connect = sqlite3.connect
        own = []

        def connect_twice(*args, **options):
            own.append(connect(self.path))
            own[-1].execute("PRAGMA user_version").fetchall()
            return connect(*args, **options)

        queue = self.open()
        with mock.patch("sqlite3.connect", connect_twice):
            queue.renew_connection()
        for each in own:
            each.close()
        self.assertEqual(queue.enqueue("t"), 1)

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_connection_that_user_code_has_closed_is_replaced_and_forgotten(self):
        queue = self.open()
        with self.assertRaisesRegex(QueueError, "ended inside its block"), queue.transaction() as connection:
            connection.close()
        files = []
        for _ in range(4):
            queue.renew_connection()
            queue.enqueue("t")
            files.append(len(os.listdir("/proc/self/fd")))
        self.assertEqual(files[1], files[3])  # SQLite keeps one until the second

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_transaction_that_lost_its_lock_is_undone(self):
        queue = self.open()
        with self.assertRaisesRegex(QueueError, "cannot commit.*its lock was lost"), queue.transaction():
            queue.enqueue("t", "undone")
            self.sibling("-shm").read_bytes()
        self.assertEqual(queue.enqueue("t", "kept"), 1)
        with queue.transaction():
            queue.enqueue("t", "kept, too")
            self.path.read_bytes()
        self.assertEqual(self.other("print([job.payload for job in q.list_jobs()])"), "['kept, too', 'kept']")

    def acts(self):
        def replace():
            (self.folder / "backup.db").replace(self.path)

        def delete(*suffixes):
            for suffix in suffixes:
                self.sibling(suffix).unlink()

        def move_folder(*, copy):
            self.path.parent.rename(self.folder / "moved")
            if copy:
                shutil.copytree(self.folder / "moved", self.path.parent, ignore=no_fifos)

        def make_anew():
            shutil.rmtree(self.path.parent)
            self.other("q.enqueue('t', 'new')")

        return {
            "a backup in its place": replace,
            "a backup in its place, the log deleted": lambda: (replace(), delete("-wal", "-shm")),
            "the log deleted": lambda: delete("-wal"),
            "the index of the log deleted": lambda: delete("-shm"),
            "the log and its index deleted": lambda: delete("-wal", "-shm"),
            "the log moved away": lambda: self.sibling("-wal").rename(self.folder / "wal"),
            "everything deleted": lambda: shutil.rmtree(self.path.parent),
            "everything deleted and created again": make_anew,
            "the folder moved": lambda: move_folder(copy=False),
            "the folder moved, a copy in its place": lambda: move_folder(copy=True),
        }

    def test_thread_may_begin_while_the_last_one_that_used_the_queue_ends(self):
        queue, begun = self.open(), []

        def use():
            begun.append(queue.enqueue("t"))

        disconnect = pqueue_sqlite.SQLiteSession._disconnect

        def then_another_thread(session):
            disconnect(session)  # the last connection: SQLite deletes the log
            if len(begun) == 1:
                thread = threading.Thread(target=use)
                thread.start()
                thread.join()

        use()
        with mock.patch.object(pqueue_sqlite.SQLiteSession, "_disconnect", then_another_thread):
            del queue._local.session  # as when its thread ends
        self.assertEqual([job.id for job in queue.list_jobs()], sorted(begun, reverse=True))
        self.assertEqual(len(begun), 2)

    def test_write_to_a_database_that_was_pulled_away_is_refused(self):
        for name in self.acts():
            with self.subTest(name):
                self.path = self.folder / name / "queue.db"
                (self.folder / "backup.db").unlink(missing_ok=True)
                shutil.rmtree(self.folder / "moved", ignore_errors=True)
                queue = self.started()
                taken = queue.dequeue("w")
                self.acts()[name]()
                writes = (
                    lambda q=queue: q.enqueue("t"),
                    lambda q=queue: q.enqueue_many("t", [1, 2]),
                    lambda q=queue, job=taken: q.complete(job),
                    lambda q=queue: q.dequeue("w"),
                    lambda q=queue: q.heartbeat("w"),
                    lambda q=queue: q.prune(0),
                    lambda q=queue: q.transaction().__enter__(),
                )
                for write in writes:
                    with self.assertRaisesRegex(
                        pqueue.DatabaseReplaced, "replaced or moved, or its log deleted.*restart"
                    ):
                        write()
                self.assertIn("restart", queue.check()["problems"][0])
                errors = []
                thread = threading.Thread(target=lambda q=queue, e=errors: e.append(refusal(q)))
                thread.start()
                thread.join()
                self.assertIsInstance(errors[0], QueueError)
                self.assertNotIn("During handling", "".join(traceback.format_exception(errors[0])))
                with self.assertRaises(pqueue.DatabaseReplaced):  # it cannot release the job
                    queue.close()

    def test_connection_of_the_application_is_not_joined_after_the_log_was_deleted(self):
        queue = self.started()
        with self.sqlite() as db:
            self.sibling("-wal").unlink()
            with self.assertRaises(pqueue.DatabaseReplaced), queue.join(db):
                pass

    def test_last_queue_that_closes_leaves_no_log(self):
        first, second = self.started(), self.open()
        second.enqueue("t")
        for queue, is_left in ((first, True), (second, False)):
            queue.close()
            self.assertEqual(self.sibling("-wal").exists(), is_left)

    def test_files_are_looked_at_once_while_their_folder_does_not_change(self):
        queue = self.started()
        files = queue._session().files
        with (
            mock.patch("time.time", return_value=time.time() + 60),
            mock.patch.object(files, "_identities", wraps=files._identities) as look,
        ):
            files._changed_ns = 0  # on a slow machine it has looked already
            for _ in range(3):
                queue.enqueue("t")
            self.assertEqual(look.call_count, 1)
            self.sibling("-wal").unlink()
            with self.assertRaises(pqueue.DatabaseReplaced):
                queue.enqueue("t")

    def test_process_that_lost_its_log_does_not_write_it_back(self):
        queue = self.started()
        queue.compact()  # writes what is in the log to the database
        queue.enqueue_many("t", range(100))
        self.sibling("-wal").unlink()
        self.sibling("-shm").unlink()
        ids = [int(self.other("print(q.enqueue('t'))")) for _ in range(3)]
        with self.assertRaises(pqueue.DatabaseReplaced):
            queue.enqueue("t")
        queue.close()
        self.assertEqual(self.other("print([job.id for job in q.list_jobs(limit=3)], q.check()['problems'])"),
                         f"{ids[::-1]} []")  # fmt: skip

    @unittest.skipUnless(hasattr(sqlite3, "SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE"), "needs Python 3.12")
    def test_process_without_locks_of_open_files_does_not_write_a_log_back_that_it_lost(self):
        with mock.patch.object(pqueue_files.FileLocks, "AVAILABLE", False):  # as on macOS
            self.test_process_that_lost_its_log_does_not_write_it_back()

    def test_database_that_took_the_place_of_another_is_not_opened_with_that_ones_log(self):
        queue = self.started()
        (self.folder / "backup.db").replace(self.path)
        before = self.path.read_bytes()
        with self.assertRaisesRegex(SchemaMismatch, "took the place of another database, to which the log .* belongs"):
            self.open()
        queue.close()
        with self.assertRaises(SchemaMismatch):
            self.open()
        self.assertEqual(self.path.read_bytes(), before)
        self.sibling("-wal").unlink()
        self.assertEqual(self.open().count_jobs(), 100)

    def test_database_is_not_opened_with_a_log_that_was_begun_after_the_other_was_opened(self):
        queue = self.open()
        for number in range(50):  # these take the numbers of files that are gone, which some file systems never reuse
            (self.folder / str(number)).touch()
        queue.enqueue_many("t", range(100))
        queue.backup(self.folder / "backup.db")
        queue.enqueue_many("t", range(100))
        (self.folder / "backup.db").replace(self.path)
        with self.assertRaisesRegex(SchemaMismatch, "took the place of another database"):
            self.open()
        with self.assertRaises(pqueue.DatabaseReplaced):
            queue.enqueue("t")

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_deleted_log_is_not_recreated_while_others_have_the_old_one_open(self):
        code = "import pqueue, time\nq = pqueue.PersistentQSQLite(sys.argv[1])\nq.enqueue_many('t', range(9))\n"
        with python(f"{code}print('ready', flush=True)\ntime.sleep(600)", self.path) as child:
            self.assertEqual(child.stdout.readline(), "ready\n")
            unused = self.open()
            self.sibling("-wal").unlink()
            for use in (self.open, unused.stats, self.open, lambda: unused.enqueue("t")):
                with self.assertRaisesRegex(
                    pqueue.DatabaseReplaced, "log was deleted while other programs have it open"
                ):
                    use()
                self.sibling("-wal").touch()  # as a plain reader would
            child.kill()
            child.wait()
        self.assertEqual(self.open().enqueue("t"), 1)

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_queue_of_large_pages_is_opened_with_its_log_and_no_shorter_one(self):
        self.open().close()
        with self.sqlite() as db:
            for sql in ("journal_mode = DELETE", "page_size = 65536"):
                db.execute(f"PRAGMA {sql}")
            db.execute("VACUUM")
        queue = self.started()
        self.assertEqual(queue._read("PRAGMA page_size"), [(65536,)])
        self.assertEqual(self.other("print(q.count_jobs())"), "200")
        self.sibling("-wal").unlink()
        self.sibling("-wal").write_bytes(bytes(4096))
        code = "import pathlib, pqueue_files\nprint(pqueue_files.FileLocks.is_log_missing(pathlib.Path(sys.argv[1])))"
        with python(code, self.path) as child:
            self.assertEqual(child.stdout.read().strip(), "True")

    @unittest.skipUnless(pqueue_files.FileLocks.AVAILABLE, "needs open file description locks")
    def test_queue_opens_while_another_process_truncates_or_deletes_the_log(self):
        code = """import pqueue
q = pqueue.PersistentQSQLite(sys.argv[1])
q.enqueue_many("t", range(9))
print("ready", flush=True)
for order in sys.stdin:
    q._session().run("PRAGMA wal_checkpoint(TRUNCATE)") if order == "truncate\\n" else q.close()
    print("done", flush=True)"""
        size = pqueue_files.file_size
        for order in ("truncate", "close"):
            with self.subTest(order), python(code, self.path) as child:
                self.assertEqual(child.stdout.readline(), "ready\n")

                orders = [order]

                def size_afterwards(path, child=child, orders=orders):
                    if orders:
                        print(orders.pop(), file=child.stdin, flush=True)
                        self.assertEqual(child.stdout.readline(), "done\n")
                    return size(path)

                with mock.patch.object(pqueue_files, "file_size", size_afterwards):
                    self.assertFalse(pqueue_files.FileLocks.is_log_missing(self.path))
                self.assertEqual(orders, [])

    def test_damaged_database_is_not_opened_with_the_log_of_another(self):
        self.started()
        backup = self.folder / "backup.db"
        backup.write_bytes(b"damaged" + backup.read_bytes()[7:])
        backup.replace(self.path)
        with self.assertRaisesRegex(SchemaMismatch, "took the place of another database"):
            self.open()

    def test_damaged_copy_is_not_opened_with_a_log_that_lacks_its_first_page(self):
        queue = self.started()
        queue._session().run("PRAGMA wal_checkpoint(TRUNCATE)")
        queue.heartbeat("w")
        copied = self.folder / "copy.db"
        copied.write_bytes(b"damaged" + self.path.read_bytes()[7:])
        copied.replace(self.path)
        with self.assertRaisesRegex(SchemaMismatch, "took the place of another database"):
            self.open()
        with self.assertRaises(pqueue.DatabaseReplaced):
            queue.close()

    def test_database_is_opened_with_its_own_log_although_the_number_of_the_log_was_another_ones(self):
        self.started()
        with (self.path.parent / "queue.db.d" / "files").open("r+b") as record:
            record.write(b"0")
        self.assertEqual(self.open().count_jobs(), 200)

    def test_queue_opens_while_another_process_deletes_the_log(self):
        self.open().close()
        real = os.stat

        def last_look(path, **options):
            found = real(path, **options)
            if str(path).endswith(("-wal", "-shm")) and not found.st_size:
                os.unlink(path)
            return found

        for suffix in ("-wal", "-shm"):
            self.sibling(suffix).touch()
        with (
            mock.patch.object(os, "stat", last_look),
            mock.patch.object(os, "lstat", lambda path: last_look(path, follow_symlinks=False)),
        ):
            self.assertEqual(self.open().count_jobs(), 0)

    def test_copy_of_a_whole_folder_is_opened_with_its_log(self):
        self.started()
        shutil.copytree(self.path.parent, self.folder / "copy", ignore=no_fifos)
        self.path = self.folder / "copy" / "queue.db"
        self.assertEqual(self.open().count_jobs(), 200)

    def test_check_names_the_processes_that_have_a_deleted_file_open(self):
        with python("import pqueue\nq = pqueue.PersistentQSQLite(sys.argv[1])\nq.enqueue('t')\n"
                    "print('ready', flush=True)\nimport time\ntime.sleep(600)", self.path) as child:  # fmt: skip
            self.assertEqual(child.stdout.readline(), "ready\n")
            for suffix in ("", "-wal", "-shm"):
                self.sibling(suffix).unlink()
            problems = self.open().check()["problems"]
            if os.path.isdir("/proc"):
                self.assertIn(f"process {child.pid} has a deleted file of this database open", problems[0])
            child.kill()
            child.wait()
        self.assertEqual(self.open().check()["problems"], [])


def no_fifos(folder, names):
    return [name for name in names if name.endswith(".wakeup")]


def refusal(queue):
    try:
        return queue.enqueue("t")
    except QueueError as error:
        return error


class Misuse(SQLiteCase):
    """What a careless program does to the queue object: it gets an error, and keeps no other process waiting."""

    def others_wait_for_nothing(self):
        with self.sqlite() as db:
            db.execute("PRAGMA busy_timeout = 0")
            db.execute("BEGIN IMMEDIATE")
            db.execute("ROLLBACK")
        other = self.open()
        self.assertTrue(other._writer_lock.acquire())
        other._writer_lock.release()

    def test_writer_does_not_wait_longer_for_the_lock_than_it_was_told(self):
        queue, other = self.open(), self.open(busy_seconds=0)
        with mock.patch("pqueue_locks._wait_for", side_effect=AssertionError), queue.transaction():
            with self.assertRaises(QueueBusy):
                other.enqueue("t")

    def test_writer_that_waits_for_its_own_thread_is_told_so(self):
        queue, other = self.open(), self.open(busy_seconds=0.05)
        advice = "transaction of another queue object in this thread: use that one, and TASK.on"
        with queue.transaction(), self.assertRaisesRegex(QueueBusy, advice):
            other.enqueue("t")
        with self.sqlite() as connection:
            connection.execute("BEGIN IMMEDIATE")
            with queue.join(connection), self.assertRaisesRegex(QueueBusy, advice):
                other.enqueue("t")
            with self.assertRaisesRegex(QueueBusy, "^(?!.*in this thread)"):  # it may be any writer
                other.enqueue("t")

    def test_opening_that_fails_closes_its_files_before_its_error_is_handled(self):
        self.open().close()
        with self.sqlite() as connection:
            connection.execute("PRAGMA user_version = 99")
        for content in (self.path.read_bytes(), b"no database" * 1000):
            self.path.write_bytes(content)
            before = held()
            try:
                self.open()
            except SchemaMismatch:  # which refers to what was opened
                self.assertEqual(held(), before)
            else:
                self.fail("expected SchemaMismatch")

    def test_queue_that_is_not_closed_leaves_no_lock_files_open(self):
        def lock_files():
            found = []
            for number in os.listdir("/proc/self/fd"):
                with suppress(FileNotFoundError):  # of listdir
                    found.append(os.readlink(f"/proc/self/fd/{number}"))
            return sorted(each for each in found if each.endswith((".wakeup", "writer", "consumers", "others")))

        queue = self.open()
        queue.enqueue("t")
        before = lock_files()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Python 3.13 and newer warn of the connections
            for _ in range(5):
                open_queue(self.path).enqueue("t")
            gc.collect()
        self.assertEqual(lock_files(), before)

    def test_queue_closed_inside_its_transaction_raises_and_releases_its_locks(self):
        queue = self.open()
        with self.assertRaisesRegex(QueueError, "cannot close .* inside a transaction"), queue.transaction():
            queue.enqueue("t")
            queue.close()
        self.assertEqual(queue.count_jobs(), 0)
        self.others_wait_for_nothing()

    def test_queue_closed_while_another_thread_writes_lets_go(self):
        queue, begun, closed, raised = self.open(), threading.Event(), threading.Event(), []

        def write():
            try:
                with queue.transaction():
                    queue.enqueue("t")
                    begun.set()
                    closed.wait(PATIENCE_SECONDS)
            except QueueError as error:
                raised.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        begun.wait(PATIENCE_SECONDS)
        queue.close()
        closed.set()
        writer.join()
        self.assertEqual(len(raised), 1)
        self.others_wait_for_nothing()
        self.assertEqual(self.open().count_jobs(), 0)

    def test_rows_of_a_users_own_kind_do_not_outlive_the_transaction(self):
        queue = self.open()
        with queue.transaction() as db:
            db.row_factory = lambda cursor, row: {"first": row[0]}
            db.text_factory = bytes
            self.assertEqual(db.execute("SELECT 'x'").fetchall(), [{"first": b"x"}])
        self.assertEqual(queue.get(queue.enqueue("t")).task, "t")

    def test_queue_knows_whether_user_code_had_its_connection(self):
        queue = self.open()
        queue.enqueue("t")
        self.assertFalse(queue.has_lent_connection)
        with queue.transaction():
            self.assertFalse(queue.has_lent_connection)  # it cannot be renewed there
        self.assertTrue(queue.has_lent_connection)
        with mock.patch("sqlite3.connect", side_effect=sqlite3.OperationalError("unable to open database file")):
            with self.assertRaisesRegex(QueueError, "unable to open database file"):
                queue.renew_connection()
            self.assertTrue(queue.has_lent_connection)  # so that it is renewed later
            self.assertEqual(queue.count_jobs(), 1)
        queue.renew_connection()
        self.assertFalse(queue.has_lent_connection)

    def test_queue_sees_that_user_code_has_changed_a_setting_of_its_connection(self):
        for durability in ("full", "normal"):
            queue = self.open(durability=durability)
            queue.enqueue("t")
            before = queue.connection_settings
            for change in ("PRAGMA synchronous = OFF", "PRAGMA query_only = 1", "CREATE TEMP TABLE jobs (x)"):
                with self.subTest(change, durability=durability):
                    queue._session().connection.execute(change)
                    self.assertNotEqual(queue.connection_settings, before)
                    queue.renew_connection()
                    self.assertEqual(queue.connection_settings, before)

    def test_signal_handler_cannot_use_the_queue_it_interrupted(self):
        queue, refused = self.open(), []

        def handle(*_):
            with self.assertRaisesRegex(QueueError, "signal handler"):
                queue.enqueue("from the handler")
            refused.append(True)

        run = pqueue_sqlite.SQLiteSession.run

        def interrupted(session, sql, *params):
            if sql == "COMMIT":
                handle()
            return run(session, sql, *params)

        with mock.patch.object(pqueue_sqlite.SQLiteSession, "run", interrupted):
            queue.enqueue("t")
        self.assertEqual([job.task for job in queue.list_jobs()], ["t"])
        self.assertEqual(refused, [True])
        self.others_wait_for_nothing()

    def points(self, call):
        """Call this again and again; raise KeyboardInterrupt when the first, second … function of pqueue begins."""
        for point in itertools.count(1):
            begun = itertools.count(1)

            def trace(frame, *_, begun=begun, point=point):
                name, is_generator = Path(frame.f_code.co_filename).name, frame.f_code.co_flags & inspect.CO_GENERATOR
                if not is_generator and name.startswith(("pqueue", "contextlib")) and next(begun) == point:
                    raise KeyboardInterrupt

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                call()
                return
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(before)
            yield point

    def test_queue_works_after_an_interrupt_at_the_beginning_of_any_function(self):
        queue, other = self.open(), self.open()
        queue.enqueue_many("t", range(500))

        def in_transaction():
            with queue.transaction():
                queue.enqueue_many("t", [1, 2])

        def in_exclusive():
            with queue.exclusive():
                queue.stats()

        calls = {
            "enqueue": lambda: queue.enqueue("t"),
            "enqueue_many": lambda: queue.enqueue_many("t", [1, 2]),
            "transaction": in_transaction,
            "exclusive": in_exclusive,
            "cancel": lambda: queue.cancel(queue.enqueue("t")),
            "work": lambda: queue.complete(queue.dequeue("w")),
            "read": lambda: queue.get(1),
        }
        for name, call in calls.items():
            call()
            for point in self.points(call):
                with self.subTest(call=name, point=point):
                    self.assertFalse(queue.in_transaction)
                    self.assertEqual(other.get(queue.enqueue("t")).state, "pending")
                    self.others_wait_for_nothing()
            self.assertGreater(point, 10)

    def test_interrupted_call_does_not_keep_the_transaction_of_its_caller_open(self):
        queue, exit_block = self.open(), pqueue_sqlite.SQLiteSession.__exit__

        def interrupted(session, *error):
            if session.depth == 2:
                raise KeyboardInterrupt
            exit_block(session, *error)

        with (
            mock.patch.object(pqueue_sqlite.SQLiteSession, "__exit__", interrupted),
            self.assertRaises(KeyboardInterrupt),
            queue.transaction(),
        ):
            queue.enqueue_many("t", [1, 2])
        self.others_wait_for_nothing()
        self.assertEqual(queue.count_jobs(), 0)

    def test_consumer_whose_locks_were_deleted_stops_before_others_reclaim_its_jobs(self):
        queue = self.open()
        queue.enqueue("t")
        queue.dequeue("anna")
        shutil.rmtree(f"{self.path}.d")
        queue._dead_checked_at = -1e9
        self.open().dequeue("bert")
        with self.assertRaisesRegex(QueueError, "were deleted while in use"):
            queue.dequeue("anna")

    def test_consumer_without_a_folder_for_its_lock_gets_a_one_line_error(self):
        queue = self.open()
        shutil.rmtree(f"{self.path}.d")
        with self.assertRaisesRegex(QueueError, r"cannot open .*queue\.db\.d: No such file"):
            queue.dequeue("anna")

    def test_pipe_that_is_a_file_does_not_become_a_spin(self):
        queue = self.open()
        (self.folder / "queue.db.d/0.wakeup").write_text("ding")
        queue.dequeue("w")
        self.assertFalse(queue.wait(0.01, consumer="w"))

    def test_links_among_the_locks_lead_nowhere(self):
        self.open().close()
        precious = self.folder / "precious"
        for name in ("waiting", "writer", "others", "0.lock"):
            precious.write_text("x" * 5000)
            place = self.folder / "queue.db.d" / name
            place.unlink(missing_ok=True)
            place.symlink_to(precious)
            with self.subTest(name=name), self.assertRaisesRegex(QueueError, "cannot (use|open) .*symbolic links"):
                self.open().dequeue("w")
            self.assertEqual(precious.read_text(), "x" * 5000)
            place.unlink()

    def test_link_pipe_or_folder_in_the_place_of_a_log_is_refused(self):
        precious = self.folder / "precious"
        precious.write_text("x" * 5000)
        for suffix in ("-wal", "-shm", "-journal"):
            place = Path(f"{self.path}{suffix}")
            for make, remove in (
                (lambda place=place: place.symlink_to(precious), place.unlink),
                (lambda place=place: os.mkfifo(place), place.unlink),
                (place.mkdir, place.rmdir),
            ):
                make()
                refused = f"cannot use {place}: expected a file of SQLite, got a folder, a pipe or a link"
                with self.subTest(suffix), self.assertRaisesRegex(QueueError, refused):
                    self.open()
                remove()
        self.assertEqual({path.name: path.read_text() for path in self.folder.iterdir()}, {"precious": "x" * 5000})

    def test_file_in_the_place_of_a_pipe_is_refused(self):
        self.open().close()
        for name in ("others.wakeup", "writer-others.wakeup", "writer-consumers.wakeup"):
            pipe = self.folder / "queue.db.d" / name
            pipe.unlink()
            pipe.touch()
            with (
                self.subTest(name),
                nothing_left(),
                self.assertRaisesRegex(QueueError, f"expected {name} to be a FIFO"),
            ):
                pqueue.PersistentQSQLite(self.path)
            pipe.unlink()

    def test_writer_passes_by_a_thread_that_holds_the_lock_for_too_long(self):
        queue = self.open()
        with mock.patch("pqueue_locks.LOCK_TIMEOUT_SECONDS", 0.01):
            self.assertTrue(queue._writer_lock.acquire())
            self.assertEqual(queue.enqueue("t"), 1)
            queue._writer_lock.release()
        self.others_wait_for_nothing()

    def test_queue_closed_while_a_thread_checks_it_closes_its_locks(self):
        queue = self.open()
        with mock.patch("pqueue_locks.FairLock.problem", lambda _: queue.close()):
            self.assertEqual(queue._writer_lock.problems(), [])

    def test_call_that_begins_while_another_thread_closes_the_queue_is_refused(self):
        queue = self.open()
        session = queue._session()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(queue.close).result()
        with self.assertRaisesRegex(QueueError, "this queue object is closed"):
            session.read("SELECT 1", {})
        with self.assertRaisesRegex(QueueError, "this queue object is closed"), session:
            self.fail("it was entered")

    def test_error_that_a_signal_handler_raises_ends_a_wait(self):
        pipe = self.open()._writer_lock._lock._pipes[0]
        with mock.patch("select.epoll", side_effect=OSError("from a handler")), self.assertRaises(OSError):
            pqueue_locks._wait_for(pipe, 0, exclusive=True)
        with mock.patch("select.epoll", side_effect=OSError(24, "Too many open files")):
            self.assertFalse(pqueue_locks._wait_for(pipe, 0, exclusive=True))

    def test_trigger_that_swallows_jobs_stops_an_enqueue_and_not_the_queue(self):
        queue = self.open()
        queue.enqueue("t")
        with queue.transaction() as db:
            db.execute("CREATE TRIGGER swallow BEFORE INSERT ON jobs BEGIN SELECT RAISE(IGNORE); END")
        with self.assertRaisesRegex(QueueError, "did not store the job"):
            queue.enqueue("t")
        self.assertIsNotNone(queue.dequeue("w"))

    def test_check_names_a_trigger_and_a_table_that_are_not_ours(self):
        queue = self.open()
        with queue.transaction() as db:
            db.execute("CREATE TRIGGER spy AFTER INSERT ON jobs BEGIN UPDATE jobs SET queue = 'x'; END")
            db.execute("ALTER TABLE history ADD COLUMN x TEXT")
            db.execute("CREATE TABLE theirs (x)")
            db.execute("CREATE TRIGGER theirs_too AFTER INSERT ON theirs BEGIN DELETE FROM theirs; END")
        self.assertEqual(
            queue.check()["problems"],
            ["table 'history' is not as this version makes it", "trigger 'spy' on jobs is not ours"],
        )


class Interface(unittest.TestCase):
    def test_public_method_lists_its_options_and_says_what_it_does(self):
        for owner in (pqueue.PersistentQInterface, pqueue.PersistentQSQLite):
            for name, method in inspect.getmembers(owner, inspect.isfunction):
                if not name.startswith("_"):
                    with self.subTest(method=name):
                        options = inspect.signature(method).parameters.values()  # listed by the TypedDict: filters
                        kinds = {each.kind for each in options if each.annotation != "Unpack[Filters]"}
                        self.assertFalse(kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL})
                        self.assertTrue(inspect.getdoc(method))

    def test_import_of_all_public_names_needs_no_other_package(self):
        names = """
            DatabaseReplaced DoNotRetry Excerpt FINISHED Filters InvalidTransition Job JobFailed JobId JobNotFound
            LeaseLost MAX_PAYLOAD_BYTES Outcomes PersistentQInterface PersistentQSQLite QueueBusy QueueError QueueFull
            Retry STATES Schedule SchemaMismatch Snooze TASKS Task UNFINISHED around backoff_seconds current_job
            current_queue is_postgres metadata open_queue run_task sqlite_path task"""
        with python("sys.modules['sqlalchemy'] = None\nfrom pqueue import *\nprint(*dir())") as child:
            self.assertLessEqual(set(names.split()), set(child.communicate()[0].split()))


def resized(path: str, width: int = 200):
    return {path: width}


def take(job):
    """Do nothing, as the function of a task."""


class Tasks(unittest.TestCase):
    def setUp(self):
        for registered in (pqueue.TASKS, pqueue_tasks._HOOKS):
            patch = mock.patch.dict(registered, clear=True)
            patch.start()
            self.addCleanup(patch.stop)

    def test_task_is_registered_under_its_name_once(self):
        @pqueue.task(max_attempts=7, timeout_seconds=5)
        def mail(job):
            return job

        self.assertEqual(mail("letter"), "letter")
        self.assertEqual((pqueue.TASKS["mail"], mail.max_attempts), (mail, 7))
        with self.assertRaisesRegex(ValueError, "two functions have the name: .*mail and .*take"):
            pqueue.task("mail")(take)
        with self.assertRaisesRegex(ValueError, "expected max_attempts"):
            pqueue.task("other", max_attempts=0)(take)

    def test_function_may_name_types_that_its_module_defines_later_or_for_checkers_only(self):
        code = """
import pqueue

@pqueue.around
def hook(job: Job): yield

@pqueue.metadata
def meta() -> Unknown: return {}

@pqueue.task
def year(job: Job, day: Day) -> Unknown: return day.year

from datetime import date as Day
"""
        if sys.version_info < (3, 14):  # newer ones evaluate annotations when they are read
            code = f"from __future__ import annotations{code}"
        with mock.patch.dict(pqueue_tasks._METADATA, clear=True):
            exec(code, {"__name__": "later"})  # noqa: S102
        job = pqueue.Job(**{**dict.fromkeys(pqueue.Job._fields), "task": "year", "payload": {"day": "2024-02-29"}})
        self.assertEqual(pqueue.run_task(mock.Mock(), job), 2024)

    def test_function_without_a_name_of_its_own_needs_one(self):
        for function in (lambda: 1, functools.partial(take)):
            with self.assertRaisesRegex(ValueError, r"expected a name, as in task\('NAME'\), for "):
                pqueue.task(function)
            with self.assertRaisesRegex(ValueError, "expected a name"):
                pqueue.task(max_attempts=1)(function)
        self.assertEqual(pqueue.TASKS, {})
        self.assertEqual(pqueue.task("one")(lambda: 1)(), 1)

    def test_hooks_surround_each_job_whatever_becomes_of_it(self):
        events, queue = [], mock.Mock()

        @pqueue.around
        def outer(job):
            events.append(f"begin {job.task}")
            try:
                yield
            except ValueError as error:
                events.append(repr(error))
                raise
            finally:
                events.append("end")

        @pqueue.around
        def inner(job):
            if job.payload == {"n": 0}:
                raise ValueError("hook")
            with suppress(KeyError):
                yield

        @pqueue.task
        def divide(n: int):
            events.append("task")
            if n == 1:
                raise ValueError("task")
            return {2: 2}[n]

        @pqueue.task
        async def halve(n: int):
            await asyncio.sleep(0)
            return divide(n)

        def run(task, payload):
            job = pqueue.Job(**{**dict.fromkeys(pqueue.Job._fields), "task": task, "payload": payload})
            events.clear()
            try:
                return pqueue.run_task(queue, job), list(events)
            except (ValueError, pqueue.DoNotRetry) as error:
                return repr(error), list(events)

        for task in ("divide", "halve"):
            with self.subTest(task):
                first = f"begin {task}"
                self.assertEqual(run(task, {"n": 2}), (2, [first, "task", "end"]))
                self.assertEqual(run(task, {"n": 3}), (None, [first, "task", "end"]))  # the hook ends the KeyError
                for number, text, middle in ((1, "ValueError('task')", ["task"]), (0, "ValueError('hook')", [])):
                    self.assertEqual(run(task, {"n": number}), (text, [first, *middle, text, "end"]))
        self.assertEqual(run("divide", {"m": 1})[1], ["begin divide", "end"])  # the payload does not fit

        def without_a_job():
            yield

        def with_more_than_a_job(job, result):
            yield job, result

        for wrong in (take, without_a_job, with_more_than_a_job):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "^expected a generator function that takes a"):
                pqueue.around(wrong)

    def test_task_is_registered_without_parentheses_and_again_when_its_module_is_reloaded(self):
        for _ in range(2):

            @pqueue.task
            def mail(job):
                return job

        self.assertIs(pqueue.TASKS["mail"], mail)
        self.assertEqual((mail.max_attempts, mail("letter")), (3, "letter"))

    def test_task_looks_like_its_function_and_is_pickled_by_name(self):
        module = type(sys)("shop")
        source = """
from pqueue import task
@task
def resize(path: str, width: int = 200) -> str:
    '''Resize a picture.'''
    return f"{path}@{width}"
"""
        self.addCleanup(pqueue.TASKS.pop, "resize")
        with mock.patch.dict(sys.modules, shop=module):
            exec(source, vars(module))  # noqa: S102
            resize = module.resize
            self.assertEqual((resize.__name__, resize.__doc__), ("resize", "Resize a picture."))
            self.assertEqual(list(inspect.signature(resize).parameters), ["path", "width"])
            for same in (pickle.loads(pickle.dumps(resize)), copy.deepcopy(resize)):  # noqa: S301
                self.assertIs(same, resize)
            bound = pickle.loads(pickle.dumps(resize.using(priority=5)))  # noqa: S301
            self.assertEqual(bound._options, {"priority": 5})

    def test_options_of_a_task_are_checked_when_it_is_decorated(self):
        for options in (
            {"max_attempts": 0},
            {"max_attempts": "3"},
            {"timeout_seconds": 0},
            {"timeout_seconds": "5"},
            {"timeout_seconds": math.inf},
            {"memory_mb": -1},
            {"memory_mb": True},
            {"memory_mb": timedelta(seconds=5)},
            {"retry_on": "ValueError"},
            {"retry_on": [ValueError]},
            {"retry_on": (ValueError, 5)},
            {"retry_on": int},
            {"backoff": "5"},
            {"backoff": []},
            {"backoff": [1, None]},
            {"backoff": -1},
            {"max_backoff_seconds": 0},
            {"name": ""},
        ):
            with self.subTest(options), self.assertRaisesRegex(ValueError, f"expected .*{[*options][0]}"):
                pqueue.task(**options)
        self.assertEqual(pqueue.TASKS, {})

    def test_task_takes_a_timedelta_as_its_timeout(self):
        entry = pqueue.task("t", timeout_seconds=timedelta(minutes=5), backoff=timedelta(seconds=2))(take)
        self.assertEqual((entry.timeout_seconds, entry.retry_in_seconds(1)), (300.0, 2.0))

    def test_functions_that_do_not_run_when_they_are_called_are_refused(self):
        def generator(job):
            yield job

        async def both(job):
            yield job

        for function in (generator, both, functools.partial(generator), 5, None, Path):
            with self.subTest(function), self.assertRaisesRegex(ValueError, "expected .*function"):
                pqueue.task("t")(function)
        for function in (generator, both):
            with self.subTest(function), self.assertRaisesRegex(ValueError, "expected an ordinary or async function"):
                pqueue.task(function)
        self.assertEqual(pqueue.TASKS, {})

    def test_backoff_is_a_number_a_list_or_a_function_up_to_its_cap(self):
        def delays(**options):
            entry = pqueue.task("t", **options)(take)
            return [entry.retry_in_seconds(attempts) for attempts in (1, 2, 3, 4)]

        self.assertEqual(delays(backoff=7), [7.0] * 4)
        self.assertEqual(delays(backoff=0), [0.0] * 4)
        self.assertEqual(delays(backoff=[1, 2, 30]), [1.0, 2.0, 30.0, 30.0])
        self.assertEqual(delays(backoff=[1, 2, 30], max_backoff_seconds=9), [1.0, 2.0, 9.0, 9.0])
        self.assertEqual(delays(backoff=lambda attempts: attempts - 2), [0.0, 0.0, 1.0, 2.0])
        self.assertTrue(all(2 <= delay <= 4 for delay in delays(max_backoff_seconds=4)))

    def test_retry_and_snooze_take_seconds_or_a_timedelta(self):
        self.assertEqual(pqueue.Retry(timedelta(minutes=1)).in_seconds, 60.0)
        self.assertEqual((pqueue.Retry().in_seconds, pqueue.Retry(-3).in_seconds), (None, 0.0))
        self.assertEqual(
            [str(pqueue.Retry(5)), str(pqueue.Retry(5, "busy")), str(pqueue.Retry())], ["in 5 s", "busy", ""]
        )
        self.assertEqual((pqueue.Snooze(5).seconds, str(pqueue.Snooze(5))), (5.0, "for 5 s"))
        for broken in ("5", None, math.nan, True):
            with self.subTest(broken), self.assertRaisesRegex(ValueError, "expected seconds"):
                pqueue.Snooze(broken)

    def test_backoff_doubles_up_to_its_cap_with_half_of_it_random(self):
        for attempts, whole in ((1, 5), (2, 10), (4, 40), (99, 3600), (10**6, 3600)):
            delays = [pqueue.backoff_seconds(attempts) for _ in range(200)]
            self.assertTrue(all(whole / 2 <= delay <= whole for delay in delays))
            self.assertGreater(len(set(delays)), 1)

    def test_process_has_one_default_queue_which_its_children_use(self):
        program = """if True:
            import os, sys, threading, pqueue
            @pqueue.task
            def note(number: int): ...
            assert not os.path.exists("q.db")
            opened, closed, ready = [], [], threading.Barrier(8)
            real = pqueue.open_queue
            def slowly():
                queue = real()
                queue.close = lambda: closed.append(1)
                opened.append(queue)
                ready.wait(180)  # until each thread has opened one
                return queue
            pqueue.open_queue = slowly
            ids = []
            threads = [threading.Thread(target=lambda: ids.append(note.enqueue(1))) for _ in range(8)]
            [each.start() for each in threads]
            [each.join() for each in threads]
            assert len({id(each._queue) for each in ids}) == 1
            if not (child := os.fork()):
                note.enqueue(2)
                os._exit(0)
            os.waitpid(child, 0)
            note.enqueue(3)
            print(ids[0]._queue.count_jobs(), len(opened), len(closed))
        """
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "PQUEUE_URL": f"{folder}/q.db", "PYTHONPATH": str(HERE)}
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", program],
                env=environment,
                cwd=folder,
                capture_output=True,
                text=True,
            )
        self.assertEqual((done.stderr, done.stdout), ("", "10 8 7\n"))

    def test_task_has_its_queue_at_hand_while_it_runs(self):
        pqueue.task("t")(lambda job: (job.payload, pqueue.current_queue()))
        with tempfile.TemporaryDirectory() as folder, open_queue(f"{folder}/q.db") as queue:
            queue.enqueue("t", 1)
            job = queue.dequeue("w")
            self.assertEqual(pqueue.run_task(queue, job), (1, queue))
            with self.assertRaisesRegex(QueueError, "no task runs in this thread"):
                pqueue.current_queue()
            with self.assertRaisesRegex(LookupError, "unknown task 'u'; this consumer knows t: give it --import"):
                pqueue.run_task(queue, job._replace(task="u"))

    def test_async_task_has_its_queue_at_hand_while_it_runs_and_so_do_tasks_that_it_starts(self):
        async def look():
            await asyncio.sleep(0)
            return pqueue.current_queue(), pqueue_tasks.current_job()

        class Callable:
            async def __call__(self, job):
                return [await look(), *await asyncio.gather(look(), look())]

        with tempfile.TemporaryDirectory() as folder, open_queue(f"{folder}/q.db") as queue:
            queue.enqueue("t", 1)
            job = queue.dequeue("w")
            for function in (Callable(), functools.partial(Callable.__call__, None)):
                with mock.patch.dict(pqueue.TASKS, clear=True):
                    self.assertTrue(pqueue.task("t")(function).is_async)
                    self.assertEqual(pqueue.run_task(queue, job), [(queue, job)] * 3)
            self.assertIsNone(pqueue_tasks.current_job())

    def test_current_queue_is_for_tasks_only(self):
        with self.assertRaisesRegex(QueueError, "no task runs in this thread"):
            pqueue.current_queue()

    def test_do_not_retry_is_no_error_of_the_queue(self):
        self.assertFalse(issubclass(pqueue.DoNotRetry, QueueError))


if __name__ == "__main__":
    unittest.main()
