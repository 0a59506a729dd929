"""Record every call and its result, and prove from that alone that the queue did nothing it may not.

Actors (producers, consumers and operators at once) have clocks of their own, which step forwards and backwards, and
die at random. The checker looks for an order of the calls on each job, between their starts and ends, in which a plain
model of a job gives every result that was seen: linearizability, job by job (Wing and Gong, 1993; Horn and Kroening,
2015). Run as a program on the folder of another pqueue.py, it says what that one did wrong.
"""

from __future__ import annotations

import functools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

import pqueue
from pqueue_outcomes import EVENTS, total

SOAK = int(os.environ.get("PQUEUE_SOAK", "1"))
MEMORY_BYTES = 1 << 30
BASE = 1_800_000_000.0
LATER = BASE + 1_000_000
LEASE, RETRY = 30.0, 20.0
UNFINISHED = ("waiting", "scheduled", "pending", "processing")
Call = dict[str, Any]  # actor, verb, now, began, ended, and the arguments and the answer of the verb


# Actors ###############################################################################################################


class Actor:
    """Calls the queue at random; `note` gets each call before it begins and after it ended."""

    def __init__(self, name: str, url: str, chance: random.Random, note: Callable[[Call], None]) -> None:
        self.name, self.chance, self.note = name, chance, note
        self.queue = pqueue.open_queue(url, durability="normal")
        self.clock = BASE + chance.uniform(-20, 20)
        self.calls = 0
        self.held: list[pqueue.Job] = []  # every delivery so far, whether its lease is still its own or not
        self.ids: list[int] = []

    def step(self) -> None:
        step = self.chance.uniform(-200, 200) if self.chance.random() < 0.04 else self.chance.uniform(0, 4)
        self.clock += step
        kinds = [self.enqueue] * 4 + [self.dequeue] * 6 + [self.settle] * 8 + [self.operate] * 3 + [self.look] * 2
        self.chance.choice([*kinds, self.pause, self.prune])()

    def call(self, verb: str, do: Callable[[], Any], **arguments: Any) -> Any:
        self.calls += 1
        call = {"actor": self.name, "number": self.calls, "verb": verb, "now": self.clock, **arguments}
        self.note({**call, "began": time.monotonic_ns(), "ended": None})
        began = time.monotonic_ns()
        result = error = None
        try:
            result = do()
        except (pqueue.LeaseLost, pqueue.InvalidTransition) as refused:
            error = type(refused).__name__
        except pqueue.QueueError as failure:
            error = f"{type(failure).__name__}: {failure}"
        self.note({**call, "began": began, "ended": time.monotonic_ns(), "error": error, **answer(verb, result)})
        return None if error else result

    def enqueue(self) -> None:
        task = self.chance.choice("ttu")
        options = {
            "queue": self.chance.choice("ab"),
            "priority": self.chance.randint(-1, 1),
            "max_attempts": self.chance.choice([1, 2, 3, None]),
            "assigned_to": self.chance.choice([None, None, None, None, self.name]),
            "run_at": self.clock + self.chance.choice([-1, 0, 0, 15]),
        }
        if self.chance.random() < 0.2:
            options["expires_at"] = options["run_at"] + self.chance.choice([5, 20, 60])
        if self.chance.random() < 0.25:
            holds = self.chance.choice([{}, {"key_until": "started"}, {"key_seconds": 500.0}])
            options |= {"key": "k", **holds}
        if self.ids and self.chance.random() < 0.2:
            parents = self.chance.sample(self.ids[-5:], min(len(self.ids), self.chance.randint(1, 2)))
            options |= {"after": sorted(set(parents)), "after_failed": self.chance.choice(["fail", "run"])}
        payload = f"{self.name} {self.calls + 1}"
        job_id = self.call(
            "enqueue",
            lambda: self.queue.enqueue(task, payload, now=self.clock, **options),
            payload=payload,
            task=task,
            **options,
        )
        if job_id:
            self.ids.append(job_id)

    def dequeue(self) -> None:
        self.queue._dead_checked_at = -math.inf if self.chance.random() < 0.3 else math.inf  # by no clock
        queues = self.chance.choice([None, None, ["a"], ["b", "a"]])
        tasks = self.chance.choice([None, None, ["t"], ["u", "t"]])
        options = {"queues": queues, "tasks": tasks, "lease_seconds": LEASE, "now": self.clock}
        if self.held and self.chance.random() < 0.5:
            job = self.chance.choice(self.held[-4:])
            answered = self.call(
                "fused",
                lambda: self.queue.complete_and_dequeue([(job, None)], self.name, 1, **options),
                job=job.id,
                token=job.lease_token,
                queues=queues,
                tasks=tasks,
            )
            jobs = answered[0] if answered else []
        else:
            limit = self.chance.randint(1, 3)
            take = functools.partial(self.queue.dequeue_many, self.name, limit, **options)
            jobs = self.call("dequeue", take, queues=queues, tasks=tasks)
        self.held += jobs or []
        self.ids += [job.id for job in jobs or []]

    def settle(self) -> None:
        if not self.held:
            return
        job, now, queue = self.chance.choice(self.held[-4:]), self.clock, self.queue
        verbs: dict[str, Callable[[], Any]] = {
            "complete": lambda: queue.complete(job, now=now),
            "fail": lambda: queue.fail(job, "no", retry_in_seconds=RETRY, now=now),
            "release": lambda: queue.release(job, now=now),
            "extend": lambda: queue.extend(job, LEASE, now=now),
            "update": lambda: queue.update(job, progress=0.5),
        }
        verb = self.chance.choice(["complete", "complete", *verbs])
        self.call(verb, verbs[verb], job=job.id, token=job.lease_token)

    def operate(self) -> None:
        if not self.ids:
            return
        job_id, to = self.chance.choice(self.ids[-8:]), self.chance.choice([None, self.name, "nobody"])
        verb = self.chance.choice(["assign", "assign", "cancel", "mark_failed", "resubmit", "resubmit"])
        arguments = [job_id, to] if verb == "assign" else [job_id]
        self.call(verb, lambda: getattr(self.queue, verb)(*arguments, now=self.clock), job=job_id, to=to)

    def look(self) -> None:
        if self.ids:
            job_id = self.chance.choice(self.ids)
            self.call("get", lambda: self.queue.get(job_id), job=job_id)

    def pause(self) -> None:
        verb = self.chance.choice(["pause", "resume"])
        self.call(verb, lambda: getattr(self.queue, verb)("b"))

    def prune(self) -> None:
        verbs: dict[str, Callable[[], Any]] = {
            "prune": lambda: self.queue.prune(100_000, now=self.clock),  # also adds the counts to their total
            "prune_kept": lambda: self.queue.prune_kept(now=self.clock),
            "compact": self.queue.compact,
        }
        verb = self.chance.choice([*verbs])
        self.call(verb, verbs[verb])

    def leave(self) -> None:
        held = sorted({job.id for job in self.held})
        self.call("leave", lambda: self.queue.leave(self.name, now=self.clock), held=held)

    def die(self) -> None:
        """End as a killed process does: without a word, its locks let go by the kernel."""
        self.call("die", lambda: [me.slot.close() for me in self.queue._registry.values()] and None)
        self.queue._registry.clear()
        self.queue.close()

    def finish_all(self) -> None:
        """With everything resumed, unassigned and due, complete what is left, and look at all of it."""
        self.clock = LATER
        self.call("resume", lambda: self.queue.resume("b"))
        for job in self.queue.list_jobs(limit=1_000_000):
            if job.assigned_to and job.state in UNFINISHED:
                self.call("assign", lambda: self.queue.assign(job.id, None, now=LATER), job=job.id, to=None)  # noqa: B023
        while jobs := self.call(
            "dequeue",
            lambda: self.queue.dequeue_many(self.name, 1, lease_seconds=LEASE, now=LATER),
            queues=None,
            tasks=None,
        ):
            job = jobs[0]
            self.call("complete", lambda: self.queue.complete(job, now=LATER), job=job.id, token=job.lease_token)  # noqa: B023
        self.call("list", lambda: self.queue.list_jobs(limit=1_000_000))
        self.call("outcomes", self.queue.outcomes)


def answer(verb: str, result: Any) -> Call:
    if verb in ("dequeue", "list"):
        return {"jobs": [row(job) for job in result or []]}
    if verb == "fused":
        return {"jobs": [row(job) for job in result[0]] if result else [], "lost": bool(result and result[1])}
    if verb == "get":
        return {"jobs": [row(result)]} if result else {}
    if verb == "outcomes":
        return {"counts": {name: getattr(total(result), name) for name in EVENTS}}
    return {"result": result}


def row(job: pqueue.Job) -> dict[str, Any]:
    fields = (
        "id",
        "queue",
        "task",
        "payload",
        "state",
        "priority",
        "run_at",
        "attempts",
        "max_attempts",
        "assigned_to",
    )
    return {name: getattr(job, name) for name in (*fields, "lease_token", "lease_expires_at")}


# The model of a job, and the search ###################################################################################


@dataclass(frozen=True)
class Model:
    state: str
    attempts: int
    max_attempts: int | None
    run_at: float
    assigned_to: str | None
    key_until: str | None
    key_expires_at: float
    token: str | None = None
    expires: float = 0.0
    holder: str | None = None
    was_taken: bool = False
    expires_at: float = math.inf
    since: int = 0  # when it came into this state at the earliest
    after_failed: str | None = None  # of a job that runs after others

    def holds_key(self, now: float) -> bool:
        if self.key_until is None:
            return now < self.key_expires_at
        return self.state in UNFINISHED and not (self.key_until == "started" and self.was_taken)


class Checker:
    """Looks for what cannot have been. A call whose `ended` is None was killed, and may have done its work."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = sorted(calls, key=lambda call: call["began"])
        self.events: dict[int, list[Call]] = {}
        self.died = {call["actor"]: call["began"] for call in calls if call["verb"] == "die"}
        self.claims = [call for call in self.calls if call["verb"] in ("dequeue", "fused")]
        self.operations = 0

    def problems(self) -> Iterator[str]:
        yield from self._errors()
        yield from self._tokens()
        if lost := list(self._gather()):
            yield from lost
            return
        for job_id, events in self.events.items():
            if not self._explained(events):
                yield f"job {job_id}: no order of its {len(events)} calls explains their results"
        yield from self._order()
        yield from self._waits()
        yield from self._counts()

    def _errors(self) -> Iterator[str]:
        for call in self.calls:
            if call.get("error") not in (None, "LeaseLost", "InvalidTransition"):
                yield f"{call['verb']}: {call['error']}"

    def _tokens(self) -> Iterator[str]:
        seen: set[str] = set()
        for call in self.claims:
            for job in call.get("jobs", ()):
                token = f"{job['lease_token']} {job['id']}"
                if token in seen:
                    yield f"token {token} was given twice"
                seen.add(token)

    def _gather(self) -> Iterator[str]:
        """Sort the calls by job; yield what was lost or invented."""
        final = next(call for call in reversed(self.calls) if call["verb"] == "list")
        payloads = {job["payload"]: job["id"] for job in final["jobs"]}
        queues = {job["id"]: job["queue"] for job in final["jobs"]}
        made = {call["payload"]: call for call in self.calls if call["verb"] == "enqueue"}
        for payload in payloads.keys() - made.keys():
            yield f"job {payloads[payload]} was invented"
        for call in self.calls:
            verb, ended = call["verb"], call["ended"]
            if verb == "enqueue":
                job_id = payloads.get(call["payload"]) if ended is None else call["result"]
                if job_id is None:
                    continue  # refused, or cut off before its commit
                if job_id not in payloads.values():
                    yield f"job {job_id} was lost"
                new = payloads.get(call["payload"]) == job_id
                if (not new and "key" not in call) or queues.get(job_id) != call["queue"]:
                    yield f"job {job_id} is not what was enqueued"
                self._add(job_id, {**call, "verb": "enqueue" if new else "same key"})
            elif verb in ("dequeue", "fused", "list", "get"):
                if verb == "fused":
                    error = "LeaseLost" if call.get("lost") else None
                    self._add(call["job"], {**call, "verb": "complete", "error": error})
                for job in call.get("jobs", ()):
                    self._add(
                        job["id"], {**call, "verb": "claim" if verb in ("dequeue", "fused") else "get", "row": job}
                    )
                if ended is None and verb != "get":
                    for job_id in payloads.values():
                        self._add(job_id, {**call, "verb": "claim", "row": None})
            elif verb == "leave":
                for job_id in call["held"]:
                    self._add(job_id, call)
            elif "job" in call:
                self._add(call["job"], call)
        for job in final["jobs"]:
            if job["state"] in UNFINISHED:
                yield f"job {job['id']} is {job['state']} for ever"

    def _add(self, job_id: int, event: Call) -> None:
        self.events.setdefault(job_id, []).append(event)
        self.operations += 1

    def _explained(self, events: list[Call]) -> bool:
        """Search depth first for an order; a set of events done and the model after it are tried once."""
        everything = (1 << len(events)) - 1
        cut_off = sum(1 << n for n, event in enumerate(events) if event["ended"] is None)
        tried: set[tuple[int, Model | None]] = set()
        stack: list[tuple[int, Model | None]] = [(0, None)]
        while stack:
            done, model = stack.pop()
            if done | cut_off == everything:
                return True
            if (done, model) in tried:
                continue
            tried.add((done, model))
            left = [n for n in range(len(events)) if not done >> n & 1]
            first_end = min(events[n]["ended"] or math.inf for n in left)
            able = [n for n in left if events[n]["began"] <= first_end]
            able.sort(key=lambda n: (events[n]["ended"] is not None, -events[n]["began"]))  # the last is tried first
            for n in able:
                stack += [(done | 1 << n, after) for after in self._after(model, events[n])]
        return False

    def _after(self, model: Model | None, event: Call) -> Iterator[Model]:
        """Yield the models in which the event leaves a job, if it can answer there what it answered."""
        verb, error, now = event["verb"], event.get("error"), event["now"]
        if model is None or verb == "enqueue":
            if model is None and verb == "enqueue":
                state = "scheduled" if event["run_at"] > now else "pending"
                until = None if "key_seconds" in event else event.get("key_until", "finished")
                keys = {"key_until": until, "key_expires_at": now + event.get("key_seconds", 0)}
                keys["expires_at"] = event.get("expires_at", math.inf)
                most, due, to = (event[name] for name in ("max_attempts", "run_at", "assigned_to"))
                first = Model(state, 0, most, due, to, **keys, since=event["began"])
                if "after" not in event:
                    yield first
                    return
                first = replace(first, after_failed=event["after_failed"])  # the parents' states decide
                yield from (first, replace(first, state="waiting"))
                if event["after_failed"] == "fail":
                    yield replace(first, state="failed")
            return
        for each in self._recovered(model, event):
            yield from self._answered(each, event, verb, error, now)

    def _answered(self, each: Model, event: Call, verb: str, error: str | None, now: float) -> Iterator[Model]:
        since = event["began"]
        if verb == "get":
            if "row" not in event or agrees(each, event["row"]):
                yield each
        elif verb == "leave":
            held = each.state == "processing" and each.holder == event["actor"]
            yield settled(each, event, "release", now) if held else each
        elif verb == "same key":
            if each.holds_key(now):
                yield each
        elif verb == "claim":
            taken = replace(
                each, state="processing", attempts=each.attempts + 1, token="?", holder=event["actor"], since=since,
                expires=now + LEASE, max_attempts=each.max_attempts or 3, was_taken=True,
            )  # fmt: skip
            mine = each.assigned_to in (None, event["actor"])
            if each.state != "pending" or taken.attempts > taken.max_attempts or not mine or now >= each.expires_at:
                return
            if event["row"] is not None:
                if each.assigned_to is None and event["queues"] and event["row"]["queue"] not in event["queues"]:
                    return
                if event["tasks"] is not None and event["row"]["task"] not in event["tasks"]:
                    return
                taken = replace(taken, token=event["row"]["lease_token"])
                if not agrees(taken, event["row"]):
                    return
            yield taken
        elif "token" in event:
            held = each.state == "processing" and each.token == event["token"]
            if held != (error is None) and event["ended"] is not None:
                return
            yield settled(each, event, verb, now) if held else each
        else:
            finished = each.state not in UNFINISHED
            allowed = finished if verb == "resubmit" else not finished
            if error and (not allowed or verb == "resubmit"):  # another job may have its key
                yield each
            elif not error and allowed:
                yield operated(each, event, verb, now)

    def _recovered(self, model: Model, event: Call) -> Iterator[Model]:
        """Yield the model, and what dequeues that were under way may have made of it."""
        yield model
        if event["verb"] == "enqueue":
            return
        found = [model, *self._returned(model, event)]
        if model.after_failed:
            found += self._resolved(model)
        yield from found[1:]
        for each in found:
            if each.state in ("waiting", "scheduled", "pending") and self._was_dequeued(each, event, each.expires_at):
                yield replace(each, state="cancelled")
                return

    def _returned(self, model: Model, event: Call) -> Iterator[Model]:
        """Yield the model of a job that has fallen due, or whose delivery was lost."""
        due = model.run_at if model.state == "scheduled" else model.expires
        is_dead = model.state == "processing" and self.died.get(model.holder or "", math.inf) <= (
            event["ended"] or math.inf
        )
        if model.state in ("scheduled", "processing") and self._was_dequeued(
            model, event, -math.inf if is_dead else due
        ):
            out_of_attempts = model.state == "processing" and model.attempts >= model.max_attempts
            state = "failed" if out_of_attempts else "pending"
            yield replace(model, state=state, token=None, holder=None, expires=0.0)

    def _was_dequeued(self, model: Model, event: Call, at: float) -> bool:
        """Return whether a dequeue at this time or later may have come before the event."""
        for claim in self.claims:
            if claim["began"] > (event["ended"] or math.inf):
                return False
            if (claim["ended"] or math.inf) >= model.since and claim["now"] >= at:
                return True
        return False

    @staticmethod
    def _resolved(model: Model) -> Iterator[Model]:
        """Yield what the ends of its parents, and resubmissions of some, may have made of a job that was not taken."""
        may_fail = model.after_failed == "fail" and model.state in ("waiting", "failed")
        if model.state == "waiting" or may_fail:  # failed, and restored when a parent was resubmitted
            yield replace(model, state="scheduled")
            yield replace(model, state="pending")
        if may_fail:
            yield replace(model, state="failed" if model.state == "waiting" else "waiting")

    def _waits(self) -> Iterator[str]:
        """Look for jobs delivered before a parent can have ended."""
        ends = ("complete", "fail", "cancel", "mark_failed", "claim", "leave")
        made = {job_id: e for job_id, events in self.events.items() for e in events if e["verb"] == "enqueue"}
        for job_id, events in self.events.items():
            after = made[job_id].get("after", ()) if job_id in made else ()
            if any(e["verb"] == "resubmit" and not e.get("error") for e in events):  # which waits for nobody
                continue
            parents = [
                parent for parent in after if not {"after", "expires_at"} & made.get(parent, {}).keys()
            ]  # others may fail by themselves
            first = min((e["ended"] or math.inf for e in events if e["verb"] == "claim" and e["row"]), default=math.inf)
            for parent in parents:
                ended = (e["began"] for e in self.events.get(parent, ()) if e["verb"] in ends and not e.get("error"))
                if min(ended, default=math.inf) > first:
                    yield f"job {job_id} was delivered before job {parent}, which it waits for, ended"

    def _counts(self) -> Iterator[str]:
        """Look for outcomes that were counted too rarely or too often. A call that was cut off may count."""
        counts = self.calls[-1]["counts"]
        jobs = [job for call in self.calls if call["verb"] == "list" for job in call["jobs"]]
        done = Counter(call["verb"] for call in self.calls if call["ended"] and not call.get("error"))
        cut_off = Counter(call["verb"] for call in self.calls if not call["ended"])
        lost = sum(bool(call.get("lost")) for call in self.calls)
        made = [call for call in self.calls if call["verb"] == "enqueue"]
        children = sum("after" in call for call in made) * (1 + done["resubmit"] + cut_off["resubmit"])
        for what, number, verbs, more in (
            ("enqueued", counts["enqueued"] - len(jobs), (), 0),
            ("completed", counts["completed"] + lost, ("complete", "fused"), 0),
            ("cancelled", counts["cancelled"], ("cancel",), sum("expires_at" in call for call in made)),
            ("released", counts["released"], ("release",), math.inf),
            (
                "failed",
                counts["failed"] + counts["retried"] - counts["died"] - counts["expired"],
                ("fail", "mark_failed"),
                children,
            ),
        ):
            least = sum(done[verb] for verb in verbs)
            most = least + sum(cut_off[verb] for verb in verbs) + more
            if not least <= number <= most:
                yield f"expected {least} to {most} {what}, counted {number}"

    def _order(self) -> Iterator[str]:
        """Look for jobs passed over: pending since before the dequeue, touched by nobody until after it."""
        untouched = []
        for events in self.events.values():
            made = next((event for event in events if event["verb"] == "enqueue"), None)
            if (
                made
                and made["ended"]
                and made["run_at"] <= made["now"]
                and made["assigned_to"] is None
                and "expires_at" not in made
                and "after" not in made
            ):
                touched = min(e["began"] for e in events if e["verb"] not in ("enqueue", "get", "same key"))
                untouched.append((made, (-made["priority"], made["run_at"], made["result"]), touched))
        pauses = [call for call in self.calls if call["verb"] in ("pause", "resume")]
        for claim in self.claims:
            if claim["ended"] is None or not claim["jobs"]:
                continue
            last = max((-job["priority"], job["run_at"], job["id"]) for job in claim["jobs"])
            for made, rank, touched in untouched:
                served = made["queue"] == "a" and (claim["queues"] is None or "a" in claim["queues"])
                served = served and (claim["tasks"] is None or made["task"] in claim["tasks"])
                if served and made["ended"] < claim["began"] and touched > claim["ended"] and rank < last:
                    yield f"job {made['result']} was passed over for job {last[2]}"
            if self._paused(pauses, claim) and any(job["queue"] == "b" for job in claim["jobs"]):
                yield "a job of a paused queue was delivered"

    @staticmethod
    def _paused(pauses: list[Call], claim: Call) -> bool:
        """Say whether the queue was surely paused: by the last word, spoken before the claim and after all others."""
        before = [call for call in pauses if call["began"] <= claim["ended"]]
        if not before or any(call["ended"] is None for call in before):
            return False
        last = max(before, key=lambda call: call["began"])
        alone = all(call["ended"] < last["began"] for call in before if call is not last)
        return last["verb"] == "pause" and alone and last["ended"] < claim["began"]


def agrees(model: Model, seen: dict[str, Any]) -> bool:
    return (
        (model.state, model.attempts, model.max_attempts) == (seen["state"], seen["attempts"], seen["max_attempts"])
        and model.assigned_to == seen["assigned_to"]
        and (model.token == "?" or model.token == seen["lease_token"])
        and (model.state != "processing" or model.token == "?" or model.expires == seen["lease_expires_at"])
        and model.run_at == seen["run_at"]
    )


def settled(model: Model, event: Call, verb: str, now: float) -> Model:
    ended = replace(model, token=None, holder=None, expires=0.0, since=event["began"])
    if verb == "complete":
        return replace(ended, state="completed")
    if verb == "release":
        return replace(ended, state="pending", attempts=model.attempts - 1)
    if verb == "fail":
        again = model.attempts < model.max_attempts
        return replace(ended, state="scheduled", run_at=now + RETRY) if again else replace(ended, state="failed")
    return replace(model, expires=now + LEASE) if verb == "extend" else model


def operated(model: Model, event: Call, verb: str, now: float) -> Model:
    ended = replace(model, token=None, holder=None, expires=0.0, since=event["began"])
    if verb == "resubmit":
        return replace(ended, state="pending", attempts=0, run_at=now, was_taken=False, expires_at=math.inf)
    if verb == "assign":
        running = model.state == "processing"
        state = "pending" if running else model.state
        return replace(ended, state=state, attempts=model.attempts - running, assigned_to=event["to"])
    return replace(ended, state={"cancel": "cancelled", "mark_failed": "failed"}[verb])


# Histories ############################################################################################################


def in_turn(seed: int, url: str, steps: int = 250) -> list[Call]:
    """Let four actors of one process take turns: the same for the same seed."""
    calls: list[Call] = []
    chance = random.Random(seed)

    def note(call: Call) -> None:
        if call["ended"] is not None:
            calls.append(call)

    actors = [Actor(f"actor {n}", url, chance, note) for n in range(4)]
    for _ in range(steps):
        actor = chance.choice(actors)
        if chance.random() < 0.01:
            actor.leave()
        elif chance.random() < 0.01:
            actor.die()
            actors.remove(actor)
            actors.append(Actor(f"{actor.name}'", url, chance, note))
            actors[-1].ids, actors[-1].held = actor.ids, actor.held
        else:
            actor.step()
    last = Actor("last", url, chance, note)
    last.finish_all()
    for actor in [*actors, last]:
        actor.queue.close()
    return calls


def at_once(seed: int, url: str, folder: Path, steps: int, deaths: int) -> list[Call]:
    """Let four processes go at once, and kill some; they note their calls in the folder."""
    chance = random.Random(seed)
    pqueue.open_queue(url).close()
    running = [begin(f"process {n}", url, seed * 100 + n, steps, folder) for n in range(4)]
    killed = []
    for n in range(deaths):
        time.sleep(chance.uniform(0.05, 0.3))
        name, child = running.pop(chance.randrange(len(running)))
        at = time.monotonic_ns()  # at the earliest: others may see the death before we do
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1]:
            killed.append((name, at))
        running.append(begin(f"process {n + 4}", url, seed * 100 + n + 4, steps, folder))
    for _, child in running:
        assert os.waitpid(child, 0)[1] == 0
    calls: dict[tuple[str, int], Call] = {}
    for file in folder.glob("*.calls"):
        for line in file.read_text().split("\n")[:-1]:  # a kill may cut the last
            call = json.loads(line)
            calls[call["actor"], call["number"]] = call
    ends = [{"actor": name, "number": 0, "verb": "die", "now": 0, "began": at, "ended": at} for name, at in killed]
    history: list[Call] = []
    last = Actor("last", url, chance, history.append)
    with closing(last.queue):
        last.finish_all()
    return [*calls.values(), *ends, *(call for call in history if call["ended"] is not None)]


def begin(name: str, url: str, seed: int, steps: int, folder: Path) -> tuple[str, int]:
    child = os.fork()
    if child:
        return name, child
    try:
        file = os.open(folder / f"{seed}.calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        actor = Actor(name, url, random.Random(seed), lambda call: os.write(file, f"{json.dumps(call)}\n".encode()))
        for _ in range(steps):
            actor.step()
        actor.leave()
        actor.call("die", actor.queue.close)
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def check_in_turn(seeds: range) -> tuple[list[str], int]:
    """Return what is wrong, and how many operations were checked."""
    found: list[str] = []
    operations = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory(dir=memory()) as folder:
            checker = Checker(in_turn(seed, f"{folder}/queue.db"))
            found += [f"seed {seed}: {problem}" for problem in checker.problems()]
            operations += checker.operations
        if found:
            break
    return found, operations


def memory() -> str | None:
    """Return a folder in memory, or None, for the usual place, where there is none or it is small."""
    shared = "/dev/shm"
    return shared if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > MEMORY_BYTES else None


if __name__ == "__main__":
    wrong, _ = check_in_turn(range(int(sys.argv[2])))
    print("\n".join(wrong[:3]))
    sys.exit(bool(wrong))


def test_actors_taking_turns_see_only_what_the_model_allows():
    seeds = range(20 * SOAK)
    problems, operations = check_in_turn(seeds)
    print(f"\n{len(seeds)} histories in turn, {operations} operations")
    assert problems == []


def test_processes_at_once_see_only_what_the_model_allows(tmp_path):
    operations = 0
    for seed in range(3 * SOAK):
        folder = tmp_path / str(seed)
        folder.mkdir()
        checker = Checker(at_once(seed, f"{folder}/queue.db", folder, steps=150, deaths=3))
        assert list(checker.problems()) == []
        operations += checker.operations
    print(f"\n{3 * SOAK} histories at once, {operations} operations")
