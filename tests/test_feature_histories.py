"""Let actors use groups with limits, failure handlers and a schedule at random, die, and see that all limits were kept,
each failure was handled once, and each time of the schedule got one job."""

from __future__ import annotations

import math
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from test_histories import BASE, SOAK, memory

import pqueue

RUNNING, RATE, SECONDS, EVERY, LEASE = 2, 3, 10.0, 7.0, 30.0
ENDS = ("failed", "died", "expired", "marked failed")  # of jobs with one attempt: each makes the job failed


class Actor:
    """Calls the queue at random, by a clock; `note` gets each delivery and what it saw to be wrong."""

    def __init__(
        self,
        name: str,
        url: str,
        chance: random.Random,
        clock: Callable[[], float],
        note: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.name, self.chance, self.clock, self.note = name, chance, clock, note
        self.queue = pqueue.open_queue(url, durability="normal")
        self.held: list[pqueue.Job] = []
        self.ids: list[int] = []

    def step(self) -> None:
        kinds = [self.enqueue] * 3 + [self.claim] * 5 + [self.settle] * 5 + [self.operate]
        with suppress(pqueue.LeaseLost, pqueue.InvalidTransition):
            self.chance.choice(kinds)()
        self.look()

    def enqueue(self) -> None:
        options: dict[str, Any] = {"max_attempts": 1, "group": self.chance.choice([None, "a", "b"])}
        if self.ids and self.chance.random() < 0.3:
            options["after"] = [self.chance.choice(self.ids[-3:])]
        if self.chance.random() < 0.2:
            options["assigned_to"] = self.name
        queue = self.chance.choice("gr")
        self.ids += self.queue.enqueue_many("t", [None] * 3, queue=queue, now=self.clock(), **options)

    def claim(self) -> None:
        self.queue._dead_checked_at = -math.inf if self.chance.random() < 0.3 else math.inf  # by no clock
        limit = self.chance.randint(1, 3)
        if self.held and self.chance.random() < 0.4:
            finished = [(self.held.pop(), None)]
            jobs, _ = self.queue.complete_and_dequeue(finished, self.name, limit, lease_seconds=LEASE, now=self.clock())
        else:
            jobs = self.queue.dequeue_many(self.name, limit, lease_seconds=LEASE, now=self.clock())
        self.held += jobs
        for job in jobs:
            self.note({"group": job.group, "queue": job.queue, "at": job.started_at})

    def settle(self) -> None:
        if self.held:
            job, now = self.held.pop(self.chance.randrange(len(self.held))), self.clock()
            fails = ["fail"] * 2 * (job.queue != "s")  # a tick that failed would be scheduled for another time
            verb = self.chance.choice(["complete", "complete", "release", *fails])
            getattr(self.queue, verb)(*[job, "no"][: 1 + (verb == "fail")], now=now)

    def operate(self) -> None:
        if self.ids:
            verb = self.chance.choice(["mark_failed", "cancel", "resubmit", "assign"])
            arguments = [None] if verb == "assign" else []
            getattr(self.queue, verb)(self.chance.choice(self.ids[-9:]), *arguments, now=self.clock())

    def look(self) -> None:
        """Count what runs at this moment."""
        running = Counter(job.group for job in self.queue.list_jobs(state="processing", queue="g", limit=1000))
        if too_many := {group: number for group, number in running.items() if number > RUNNING}:
            self.note({"wrong": f"more than {RUNNING} jobs of a group run: {too_many}"})

    def die(self) -> None:
        for me in self.queue._registry.values():
            me.slot.close()
        self.queue._registry.clear()
        self.queue.close()


def begin(queue: Any, now: float, seconds: float = SECONDS, every: float = EVERY) -> None:
    """Set the limits, the handler and the schedule."""
    queue.limit("g", running=RUNNING)
    queue.limit("r", rate=(RATE, seconds))
    for name in "gr":
        queue.on_failed(name, "handle")
    queue.schedule("tick", "tick", queue="s", every_seconds=every, on_missed="all", overlap=True, now=now)


def problems(
    queue: Any, notes: list[dict[str, Any]], first: float, seconds: float = SECONDS, every: float = EVERY
) -> Iterator[str]:
    """Yield what went wrong."""
    yield from [note["wrong"] for note in notes if "wrong" in note]
    for group in (None, "a", "b"):
        starts = sorted(note["at"] for note in notes if note.get("queue") == "r" and note["group"] == group)
        for one, other in zip(starts, starts[RATE:], strict=False):
            if other - one < seconds - 1e-6:
                yield f"group {group} had {RATE + 1} deliveries in {other - one} s"
    jobs = [job for name in "gr" for job in queue.list_jobs(queue=name, limit=1_000_000)]
    handled = Counter(job.payload["failed"]["id"] for job in jobs if job.task == "handle")
    for job in jobs:
        failures = sum(event["event"] in ENDS for event in queue.history(job.id)) if job.task == "t" else 0
        if handled[job.id] != failures:
            yield f"job {job.id} failed {failures} times, and was handled {handled[job.id]} times"
    ticks = sorted(job.run_at for job in queue.list_jobs(queue="s", limit=1_000_000))
    if not ticks or any(abs(at - first - every * n) > every / 9 for n, at in enumerate(ticks, 1)):
        yield f"expected a job each {every} s after {first}, got {ticks}"


def in_turn(seed: int, folder: Path, steps: int = 250) -> list[str]:
    """Let three actors of one process take turns, the same for the same seed; return what went wrong."""
    chance, notes, now = random.Random(seed), [], [BASE]
    url = str(folder / f"{seed}.db")
    actors = [Actor(f"actor {n}", url, chance, lambda: now[0], notes.append) for n in range(3)]
    begin(actors[0].queue, BASE)
    for _ in range(steps):
        now[0] += chance.uniform(-3, 40) if chance.random() < 0.05 else chance.choice([0.2, 0.5, 1.0, 1.0, 5.0])
        actor = chance.choice(actors)
        if chance.random() < 0.02:
            actor.die()
            actors.remove(actor)
            actors.append(Actor(f"{actor.name}'", url, chance, lambda: now[0], notes.append))
            actors[-1].ids = actor.ids
        else:
            actor.step()
    found = list(problems(actors[0].queue, notes, BASE))
    for actor in actors:
        actor.queue.close()
    return found


def test_actors_in_turn_keep_limits_and_handle_each_failure_and_time_once():
    with tempfile.TemporaryDirectory(dir=memory()) as folder:
        for seed in range(6 * SOAK):
            assert in_turn(seed, Path(folder)) == [], seed
