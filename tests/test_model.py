"""Random operations against a plain model in memory: the same in each run; PQUEUE_SOAK=N tries N times as many."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pqueue
import pqueue_sqlite
from pqueue_outcomes import EVENTS

SOAK = int(os.environ.get("PQUEUE_SOAK", "1"))
LEASE = 60
UNFINISHED = ("waiting", "scheduled", "pending", "processing")


UNTAKEN = ("waiting", "scheduled", "pending")


@dataclass
class Entry:
    task: str
    queue: str
    priority: int
    run_at: float
    max_attempts: int
    key: str | None
    key_until: str | None
    key_expires_at: float
    assigned_to: str | None
    state: str
    attempts: int = 0
    holder: int | None = None  # number of the delivery that holds it
    expires: float = 0.0
    was_taken: bool = False
    parents: list[int] = field(default_factory=list)
    after_failed: str = "fail"
    failed_with_parent: bool = False
    finished_at: float = 0.0
    expires_at: float = math.inf

    def holds_key(self, now: float) -> bool:
        if self.key_until is None:
            return now < self.key_expires_at
        return self.state in UNFINISHED and not (self.key_until == "started" and self.was_taken)


@dataclass
class Tick:
    """The schedule."""

    every: int
    next_at: float
    paused: bool = False


class QueueMachine(RuleBasedStateMachine):
    """Consumers are alive throughout; time goes by and leases run out."""

    @initialize(count_after=st.sampled_from([2, 5]))
    def begin(self, count_after):
        pqueue_sqlite.ROLL_UP_JOBS = pqueue_sqlite.MANY_COMPLETIONS = count_after  # to see both ways of counting
        self.folder = tempfile.TemporaryDirectory()
        self.queue = pqueue.PersistentQSQLite(f"{self.folder.name}/q.db", durability="normal")
        self.now = 1_000.0
        self.entries: dict[int, Entry] = {}
        self.paused: set[str] = set()
        self.queue.on_failed("a", "h", now=self.now)
        self.handled = {"a"}  # queues that have a failure handler
        self.deliveries: list[pqueue.Job] = []
        self.gone: dict[int, Entry] = {}  # pruned
        self.kept = {(queue, state): 7 * 86400.0 for queue in "ab" for state in ("completed", "failed", "cancelled")}
        self.pruned_at = dict.fromkeys("ab", 0.0)
        self.tick: Tick | None = None
        self.last_tick = 0  # the last job of the schedule
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def count(self, entry, *events):
        self.counts.update((entry.queue, entry.task, event) for event in events)

    def teardown(self):
        self.queue.close()
        self.folder.cleanup()

    @rule(
        task=st.sampled_from("ttu"),
        queue=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
        delay=st.sampled_from([0, 0, 0, 30, 90]),
        max_attempts=st.sampled_from([1, 2, 3, None]),
        key=st.sampled_from([None, None, "k", "l"]),
        holds=st.sampled_from([{}, {"key_until": "finished"}, {"key_until": "started"}, {"key_seconds": 60}]),
        on_conflict=st.sampled_from(["keep", "replace"]),
        assigned_to=st.sampled_from([None, None, "x", "y"]),
        parents=st.one_of(st.just([]), st.lists(st.integers(0, 9), max_size=3)),
        after_failed=st.sampled_from(["fail", "fail", "run"]),
        expire=st.sampled_from([None, None, None, 20, 80]),
    )
    def enqueue(
        self, task, queue, priority, delay, max_attempts, key, holds, on_conflict, assigned_to, parents, after_failed,
        expire,
    ):  # fmt: skip
        options = {"queue": queue, "priority": priority, "max_attempts": max_attempts, "assigned_to": assigned_to}
        options["expire_seconds"] = expire
        options |= {"key": key, "on_conflict": on_conflict, **holds} if key else {}
        parents = sorted({sorted(self.entries)[-1 - n] for n in parents if n < len(self.entries)})
        if parents and not (key and on_conflict == "replace"):
            options |= {"after": parents, "after_failed": after_failed}
        else:
            parents = []
        job_id = self.queue.enqueue(task, delay_seconds=delay, now=self.now, **options)
        state, run_at = "scheduled" if delay else "pending", self.now + delay
        expires_at = math.inf if expire is None else run_at + expire
        same = self.with_key(queue, task, key)
        assert job_id.is_new == (same is None) == (job_id not in self.entries)
        if same is None:
            until = None if "key_seconds" in holds else holds.get("key_until", "finished")
            self.entries[job_id] = Entry(
                task, queue, priority, run_at, max_attempts or 3, key, until, self.now + 60, assigned_to, state,
                parents=parents, after_failed=after_failed, expires_at=expires_at,
            )  # fmt: skip
            self.count(self.entries[job_id], "enqueued")
            if parents:
                self.entries[job_id].state = "waiting"
                if self.reconsider(job_id):
                    self.handle([job_id])
            return
        assert job_id == same
        if on_conflict == "replace" and (entry := self.entries[same]).state in ("waiting", "scheduled", "pending"):
            entry.priority, entry.run_at, entry.expires_at = priority, run_at, expires_at
            entry.state = "waiting" if entry.state == "waiting" else state

    def reconsider(self, job_id):
        """Let a waiting job fail with a parent, or become pending when all have finished; return whether it failed."""
        entry = self.entries[job_id]
        states = self.parent_states(entry)
        if entry.state != "waiting":
            return False
        if entry.after_failed == "fail" and ("failed" in states or "cancelled" in states):
            entry.failed_with_parent = True
            self.end(job_id, "failed")
            return True
        if not any(state in UNFINISHED for state in states):
            entry.state = "scheduled" if entry.run_at > self.now else "pending"
        return False

    def parent_states(self, entry):
        return [self.entries[parent].state for parent in entry.parents if parent in self.entries]

    def end(self, job_id, state):
        self.entries[job_id].state, self.entries[job_id].finished_at = state, self.now
        if state != "completed":
            self.count(self.entries[job_id], state)

    def finish(self, job_id, state):
        self.end(job_id, state)
        ended = [job_id]
        while ended:
            after = sorted(other for other, entry in self.entries.items() if set(ended) & set(entry.parents))
            ended = [other for other in after if self.reconsider(other)]
            self.handle(ended)
        self.handle([job_id])

    def handle(self, job_ids):
        """Enqueue the jobs of handlers of those that failed."""
        for job_id in job_ids:
            entry = self.entries[job_id]
            if entry.state == "failed" and entry.queue in self.handled and entry.after_failed != "handle":
                own = Entry("h", entry.queue, 0, self.now, 3, None, None, 0.0, None, "scheduled")
                own.parents, own.after_failed = [job_id], "handle"
                self.entries[max(self.entries) + 1] = own
                self.count(own, "enqueued")

    def restore(self, job_id):
        for other, entry in self.entries.items():
            states = self.parent_states(entry)
            if job_id in entry.parents and entry.state == "failed" and entry.failed_with_parent:
                is_failed = entry.after_failed == "fail" and ("failed" in states or "cancelled" in states)
                if not is_failed and self.key_is_free(entry):
                    entry.state, entry.failed_with_parent = "waiting", False
                    self.restore(other)

    def key_is_free(self, entry):
        return entry.key_until is None or self.with_key(entry.queue, entry.task, entry.key) is None

    def with_key(self, queue, task, key):
        for job_id, entry in self.entries.items():
            if key and (entry.queue, entry.task, entry.key) == (queue, task, key) and entry.holds_key(self.now):
                return job_id
        return None

    @rule(seconds=st.sampled_from([0.5, 10, 40, 70]))
    def time_goes_by(self, seconds):
        self.now += seconds

    @rule(
        consumer=st.sampled_from("xyz"),
        queues=st.sampled_from([None, ["a"], ["b"], ["b", "a"]]),
        tasks=st.sampled_from([None, None, ["t", "h"], ["u", "t"], []]),
        limit=st.integers(1, 4),
    )
    def dequeue(self, consumer, queues, tasks, limit):
        options = {"queues": queues, "tasks": tasks, "lease_seconds": LEASE, "now": self.now}
        jobs = self.queue.dequeue_many(consumer, limit, **options)
        self.recover()
        expected = self.next(consumer, queues, tasks, limit)
        assert [job.id for job in jobs] == expected
        for job in jobs:
            entry = self.entries[job.id]
            entry.state, entry.attempts, entry.expires = "processing", entry.attempts + 1, self.now + LEASE
            entry.holder, entry.was_taken = len(self.deliveries), True
            assert (job.attempts, job.max_attempts) == (entry.attempts, entry.max_attempts)
            self.deliveries.append(job)

    @rule(consumer=st.sampled_from("xyz"))
    def extend_all(self, consumer):
        held = [each for each in self.entries.values() if self.holder(each) == consumer]
        assert self.queue.extend_all(consumer, LEASE, now=self.now) == len(held)
        for entry in held:
            entry.expires = self.now + LEASE

    def holder(self, entry):
        return None if entry.holder is None else self.deliveries[entry.holder].consumer

    def recover(self):
        self.fire()
        self.promote()
        for job_id, entry in sorted(self.entries.items(), key=lambda item: (item[1].expires, item[0])):
            if entry.state == "processing" and entry.expires <= self.now:
                entry.state, entry.holder = "pending", None
                again = entry.attempts < entry.max_attempts
                self.count(entry, "expired", *["retried"] * again)
                if entry.attempts >= entry.max_attempts:
                    self.finish(job_id, "failed")
        expired = [
            (entry.expires_at, job_id)
            for job_id, entry in self.entries.items()
            if entry.state in UNTAKEN and entry.expires_at <= self.now
        ]
        for _, job_id in sorted(expired):
            if self.entries[job_id].state in UNTAKEN:
                self.finish(job_id, "cancelled")
        self.promote()  # the jobs of handlers

    def promote(self):
        for entry in self.entries.values():
            if entry.state == "scheduled" and entry.run_at <= self.now:
                entry.state = "pending"

    def next(self, consumer, queues, tasks, limit):
        able = [
            (-entry.priority, entry.run_at, job_id)
            for job_id, entry in self.entries.items()
            if entry.state == "pending"
            and entry.queue not in self.paused
            and (tasks is None or entry.task in tasks)
            and (entry.assigned_to == consumer if entry.assigned_to else queues is None or entry.queue in queues)
        ]
        ids = [job_id for _, _, job_id in sorted(able)[:limit]]
        entries = [self.entries[job_id] for job_id in ids]
        alone = [number for number, entry in enumerate(entries) if entry.attempts or entry.max_attempts == 1]
        return ids[: max(1, alone[0])] if alone else ids

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data(), verb=st.sampled_from(["complete", "fail", "fail for good", "release", "extend", "fused"]))
    def settle(self, data, verb):
        number = data.draw(st.integers(0, len(self.deliveries) - 1))
        job = self.deliveries[number]
        entry = self.entries.get(job.id) or self.gone[job.id]
        try:
            self.call(verb, job)
        except pqueue.LeaseLost:
            assert entry.holder != number
            return
        assert entry.holder == number
        self.settled(verb, entry, job.id)

    def call(self, verb, job):
        if verb == "complete":
            self.queue.complete(job, now=self.now)
        elif verb == "release":
            self.queue.release(job, now=self.now)
        elif verb == "extend":
            self.queue.extend(job, LEASE, now=self.now)
        elif verb == "fused":
            _, lost = self.queue.complete_and_dequeue([(job, None)], "x", 0, now=self.now)
            self.recover_after(lost, job)
        else:
            self.queue.fail(job, "e", retry=verb == "fail", retry_in_seconds=20, now=self.now)

    def recover_after(self, lost, job):
        """The fused call recovers, too, but after it completed."""
        if lost:
            self.recover()
            raise pqueue.LeaseLost
        self.entries[job.id].expires = float("inf")
        self.recover()

    def settled(self, verb, entry, job_id):
        if verb == "extend":
            entry.expires = self.now + LEASE
            return
        entry.holder, entry.finished_at = None, self.now
        if event := {"complete": "completed", "fused": "completed", "release": "released"}.get(verb):
            self.count(entry, event)
        if verb in ("complete", "fused"):
            self.finish(job_id, "completed")
        elif verb == "release":
            entry.state, entry.attempts = "pending", entry.attempts - 1
        elif verb == "fail" and entry.attempts < entry.max_attempts:
            self.count(entry, "retried")
            entry.state, entry.run_at = "scheduled", self.now + 20
        else:
            self.finish(job_id, "failed")

    @precondition(lambda self: self.entries)
    @rule(
        data=st.data(),
        priority=st.sampled_from([None, 2]),
        delay=st.sampled_from([None, 0, 30]),
        queue=st.sampled_from([None, "a", "b"]),
        most=st.sampled_from([None, 3, 4]),
        expire=st.sampled_from([None, None, 25]),
    )
    def change(self, data, priority, delay, queue, most, expire):
        job_id = data.draw(st.sampled_from(sorted(self.entries)))
        entry = self.entries[job_id]
        options = {"priority": priority, "delay_seconds": delay, "queue": queue, "max_attempts": most}
        options["expire_seconds"] = expire
        has_attempt = most is None or most > entry.attempts
        holder = self.with_key(queue, entry.task, entry.key)
        is_free = holder in (None, job_id) or not entry.holds_key(self.now)
        try:
            self.queue.change(job_id, **options, now=self.now)
        except (pqueue.InvalidTransition, ValueError):
            assert not (
                has_attempt
                and is_free
                and entry.state in ("waiting", "scheduled", "pending")
                and any(value is not None for value in options.values())
            )
            return
        assert has_attempt and is_free and entry.state in ("waiting", "scheduled", "pending")
        entry.priority = entry.priority if priority is None else priority
        entry.queue, entry.max_attempts = queue or entry.queue, most or entry.max_attempts
        if delay is not None:
            entry.run_at = self.now + delay
            entry.state = entry.state if entry.state == "waiting" else "scheduled" if delay else "pending"
        if expire is not None:
            entry.expires_at = entry.run_at + expire

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def run_now(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.entries)))
        entry = self.entries[job_id]
        try:
            self.queue.run_now(job_id, now=self.now)
        except pqueue.InvalidTransition:
            assert entry.state not in ("waiting", "scheduled")
            return
        assert entry.state in ("waiting", "scheduled")
        entry.state, entry.run_at = "pending", self.now

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), verb=st.sampled_from(["resubmit", "cancel", "mark_failed", "assign"]))
    def operate(self, data, verb):
        job_id = data.draw(st.sampled_from(sorted(self.entries)))
        consumer = data.draw(st.sampled_from([None, "x", "y"]))
        entry = self.entries[job_id]
        arguments = [job_id, consumer] if verb == "assign" else [job_id]
        delay = data.draw(st.sampled_from([0, 0, 50])) if verb == "resubmit" else 0
        options = {"delay_seconds": delay} if delay else {}
        allowed = entry.state in UNFINISHED
        if verb == "resubmit":
            allowed = not allowed and self.key_is_free(entry)
        try:
            getattr(self.queue, verb)(*arguments, now=self.now, **options)
        except pqueue.InvalidTransition:
            assert not allowed
            return
        assert allowed
        if verb == "resubmit":
            entry.state, entry.attempts, entry.was_taken = "scheduled" if delay else "pending", 0, False
            entry.run_at = self.now + delay
            entry.failed_with_parent, entry.expires_at = False, math.inf
            self.restore(job_id)
        elif verb == "assign":
            if entry.state == "processing":
                entry.state, entry.attempts = "pending", entry.attempts - 1
            entry.assigned_to = consumer
        else:
            self.finish(job_id, {"cancel": "cancelled", "mark_failed": "failed"}[verb])
        entry.holder = None

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def ask_for_the_result(self, data):
        job_id = data.draw(st.sampled_from(sorted(self.entries)))
        state = self.entries[job_id].state
        try:
            assert self.queue.result(job_id, timeout_seconds=0) is None
            assert state == "completed"
        except pqueue.JobFailed as error:
            assert error.state == state in ("failed", "cancelled")
        except TimeoutError:
            assert state in UNFINISHED

    @rule(queue=st.sampled_from("ab"), paused=st.booleans())
    def pause_or_resume(self, queue, paused):
        (self.queue.pause if paused else self.queue.resume)(queue)
        (self.paused.add if paused else self.paused.discard)(queue)

    @rule(every=st.sampled_from([15, 40]))
    def schedule(self, every):
        self.queue.schedule("tick", "t", every_seconds=every, queue="a", priority=1, now=self.now)
        if self.tick is None or self.tick.every != every:
            self.last_tick = self.last_tick if self.tick else 0
            self.tick = Tick(every, self.now + every, bool(self.tick and self.tick.paused))

    @precondition(lambda self: self.tick)
    @rule(verb=st.sampled_from(["pause", "resume", "resume", "unschedule"]))
    def change_schedule(self, verb):
        if verb == "unschedule":
            assert self.queue.unschedule("tick")
            self.tick = None
        elif verb == "pause":
            self.queue.pause_schedule("tick")
            self.tick.paused = True
        else:
            self.queue.resume_schedule("tick", now=self.now)
            if self.tick.paused and self.tick.next_at <= self.now:
                self.tick.next_at = self.now + self.tick.every
            self.tick.paused = False

    def fire(self):
        """Enqueue a job for the last time that has passed, unless the previous job is unfinished."""
        if self.tick is None or self.tick.paused or self.tick.next_at > self.now:
            return
        missed = (self.now - self.tick.next_at) // self.tick.every
        at = self.tick.next_at + missed * self.tick.every
        self.tick.next_at = at + self.tick.every
        if self.with_key("a", "t", "schedule:tick") is None:
            entry = Entry("t", "a", 1, at, 3, "schedule:tick", "finished", 0.0, None, "pending")
            self.entries[max(self.entries, default=0) + 1] = entry
            self.last_tick = max(self.entries)
            self.count(entry, "enqueued")

    @rule(queue=st.sampled_from("ab"), task=st.sampled_from(["h", "h", None]))
    def on_failed(self, queue, task):
        self.queue.on_failed(queue, task, now=self.now)
        self.handled = self.handled - {queue} | ({queue} if task else set())

    @rule(queue=st.sampled_from("ab"), seconds=st.sampled_from([30, 60, 60, None]))
    def keep(self, queue, seconds):
        self.queue.keep(queue, completed=seconds, cancelled=seconds)
        self.kept |= {(queue, "completed"): seconds, (queue, "cancelled"): seconds}

    @rule()
    def prune_kept(self):
        assert not self.queue.prune_kept(now=self.now)
        for queue, at in self.pruned_at.items():
            old = [job_id for job_id, entry in self.entries.items() if entry.queue == queue and self.is_old(job_id)]
            if old and at < self.now - 1:
                self.pruned_at[queue] = self.now
                self.gone |= {job_id: self.entries.pop(job_id) for job_id in old}

    @rule()
    def compact(self):
        """Nothing changes."""
        self.queue.compact()

    @rule(consumer=st.sampled_from("xy"))
    def heartbeat(self, consumer):
        """Counts are added to their total."""
        self.queue.heartbeat(consumer, now=self.now)

    def is_old(self, job_id):
        entry = self.entries[job_id]
        seconds = self.kept.get((entry.queue, entry.state))
        is_over = entry.state not in UNFINISHED and seconds is not None and entry.finished_at < self.now - seconds
        needed = any(job_id in each.parents and each.state in UNFINISHED for each in self.entries.values())
        is_needed = needed or entry.holds_key(self.now) or (self.tick and job_id == self.last_tick)
        return is_over and not is_needed and job_id < max(self.entries)

    @invariant()
    def rows_equal_the_model(self):
        rows = {job.id: job for job in self.queue.list_jobs(limit=1000)}
        assert {i: (j.state, j.attempts, j.priority, j.run_at, j.assigned_to) for i, j in rows.items()} == {
            i: (e.state, e.attempts, e.priority, e.run_at, e.assigned_to) for i, e in self.entries.items()
        }
        for job_id, job in rows.items():
            if job.state == "waiting":
                states = self.parent_states(self.entries[job_id])
                assert job.waits_for == sum(state in UNFINISHED for state in states) > 0
            holder = self.entries[job_id].holder
            assert job.lease_token == (None if holder is None else self.deliveries[holder].lease_token)
        counts = {(o.queue, o.task, name): getattr(o, name) for o in self.queue.outcomes() for name in EVENTS}
        assert {key: number for key, number in counts.items() if number} == self.counts


@dataclass
class Member:
    """A job of a group."""

    group: str
    priority: int
    run_at: float
    attempts: int = 0
    delivery: pqueue.Job | None = None


@dataclass
class Shares:
    """The groups of a queue: whose job is next, with weights and limits."""

    rate: tuple[int, int] | None
    weight: float  # of group "b"
    running: int | None = None
    jobs: dict[int, Member] = field(default_factory=dict)
    turn: float = 0.0
    turns: dict[str, float] = field(default_factory=lambda: dict.fromkeys(["", "a", "b"], 0.0))
    starts: dict[str, list[float]] = field(default_factory=lambda: {group: [] for group in ["", "a", "b"]})

    def take(self, job, now):
        member = self.jobs[job.id]
        member.attempts, member.delivery = member.attempts + 1, job
        self.turn = max(self.turn, self.turns[member.group])
        self.turns[member.group] = self.after(self.turn, member.group)
        self.starts[member.group].append(now)

    def after(self, turn, group):
        return turn + 1 / (self.weight if group == "b" else 1)

    def next(self, limit, now):
        waiting = {group: [] for group in self.turns}
        for job_id, each in sorted(self.jobs.items(), key=lambda job: (-job[1].priority, job[1].run_at, job[0])):
            if each.delivery is None and each.run_at <= now:
                waiting[each.group].append(job_id)
        room = {group: min(self.room(group, now), len(ids)) for group, ids in waiting.items()}
        turn, turns, found = self.turn, dict(self.turns), []
        while len(found) < limit and any(room.values()):
            group = min((each for each in turns if room[each]), key=lambda each: (turns[each], each))
            found.append(waiting[group].pop(0))
            room[group] -= 1
            turn = max(turn, turns[group])
            turns[group] = self.after(turn, group)
        alone = [number for number, job_id in enumerate(found) if self.jobs[job_id].attempts]
        return found[: max(1, alone[0])] if alone else found

    def room(self, group, now):
        running = sum(each.group == group and each.delivery is not None for each in self.jobs.values())
        by_running = len(self.jobs) if self.running is None else max(0, self.running - running)
        if self.rate is None:
            return by_running
        return min(by_running, self.rate[0] - sum(now - at < self.rate[1] for at in self.starts[group]))


class GroupMachine(RuleBasedStateMachine):
    """Two queues with groups of the same names."""

    @initialize(rates=st.permutations([None, (1, 30), (3, 50)]), weights=st.permutations([0.5, 1, 3]))
    def begin(self, rates, weights):
        self.folder = tempfile.TemporaryDirectory()
        self.queue = pqueue.PersistentQSQLite(f"{self.folder.name}/q.db", durability="normal")
        self.now = 1_000.0
        self.shares = {name: Shares(rate, weight) for name, rate, weight in zip("xy", rates, weights, strict=False)}
        for name, each in self.shares.items():
            self.queue.weigh(name, "b", each.weight)
            self.queue.limit(name, rate=each.rate)

    def teardown(self):
        self.queue.close()
        self.folder.cleanup()

    @rule(
        queue=st.sampled_from("xy"),
        group=st.sampled_from(["", "a", "b"]),
        priority=st.integers(0, 1),
        number=st.integers(1, 4),
        task=st.sampled_from("tu"),
    )
    def enqueue(self, queue, group, priority, number, task):
        options = {"queue": queue, "group": group or None, "priority": priority, "max_attempts": 99, "now": self.now}
        for job_id in self.queue.enqueue_many(task, [None] * number, **options):
            self.shares[queue].jobs[job_id] = Member(group, priority, self.now)

    @rule(seconds=st.sampled_from([1, 29, 50]))
    def time_goes_by(self, seconds):
        self.now += seconds

    @rule(queue=st.sampled_from("xy"), running=st.sampled_from([None, 1, 2, 3]))
    def limit(self, queue, running):
        self.queue.limit(queue, running=running)
        self.shares[queue].running = running

    @rule(queue=st.sampled_from("xy"), limits=st.lists(st.sampled_from([1, 1, 2, 5]), min_size=1, max_size=5))
    def dequeue(self, queue, limits):
        shares = self.shares[queue]
        for limit in limits:
            found = self.queue.dequeue_many("w", limit, queues=[queue], lease_seconds=LEASE, now=self.now)
            for each in self.shares.values():
                for member in each.jobs.values():
                    if member.delivery and member.delivery.lease_expires_at <= self.now:
                        member.delivery = None
            assert [job.id for job in found] == shares.next(limit, self.now)
            for job in found:
                shares.take(job, self.now)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), verb=st.sampled_from(["complete", "complete", "fused", "release", "fail", "cancel"]))
    def settle(self, data, verb):
        job_id, shares = data.draw(st.sampled_from(self.held()))
        member = shares.jobs[job_id]
        job, member.delivery = member.delivery, None
        if verb == "release":
            self.queue.release(job, now=self.now)
            member.attempts -= 1
        elif verb == "fail":
            self.queue.fail(job, "e", retry_in_seconds=20, now=self.now)
            member.run_at = self.now + 20
        else:
            if verb == "fused":
                self.queue.complete_and_dequeue([(job, None)], "w", 0, now=self.now)
            else:
                getattr(self.queue, verb)(job if verb == "complete" else job_id, now=self.now)
            del shares.jobs[job_id]

    def held(self):
        return [
            (job_id, shares)
            for shares in self.shares.values()
            for job_id, each in shares.jobs.items()
            if each.delivery and each.delivery.lease_expires_at > self.now
        ]


GroupMachine.TestCase.settings = QueueMachine.TestCase.settings = settings(
    max_examples=60 * SOAK,
    stateful_step_count=40,
    deadline=None,
    derandomize=SOAK == 1,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestQueueMachine = QueueMachine.TestCase
TestGroupMachine = GroupMachine.TestCase
