"""The audit after an attack: compare what the programs recorded with what the database and the files say.

What is lost legitimately, by an operator's act, was acknowledged in the time that the act took back: after the backup
that it put in place, or into the log that it deleted; or in a call that was under way at the act. All else must be
there.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pqueue
import pqueue_files

EFFECTS = "CREATE TABLE effects (uid TEXT NOT NULL, job_id INTEGER, attempt INTEGER, stale INTEGER)"
OURS = ("quick", "once", "effect", "copies", "flaky", "deadly", "sleepy")  # the tasks that record what they do
EXAMPLES = 3
STAMP = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) ")
ENQUEUED = re.compile(r"^(\S+Z) enqueued job=\d+ file=(job_(\d{8}T\d{6})_\w+\.txt)$", re.MULTILINE)


class Loss(NamedTuple):
    """An act that takes away what was acknowledged since a time, as far as it was asked for before the act."""

    act: str
    since: float
    until: float
    rolls_back: bool  # jobs that were done since then may be done again


class Stored(NamedTuple):
    uid: str
    asked: float
    acked: float


@dataclass
class Facts:
    """What the attackers know of their own acts."""

    stored: list[tuple[str, float, float]] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    prunable: set[str] = field(default_factory=set)  # finished, when they may have been pruned or left in an old file
    resubmitted: Counter[str] = field(default_factory=Counter)  # how often
    deleted: dict[str, float] = field(default_factory=dict)  # names of job files, and when they were deleted
    missing: list[tuple[str, float]] = field(default_factory=list)  # names of files that unfinished jobs had lost
    done_elsewhere: set[str] = field(default_factory=set)  # effects in the old file of a move, after the copy
    left_behind: set[str] = field(default_factory=set)  # in the old file of a move that could not be finished


class Finding(NamedTuple):
    """A promise that was broken, and for whom."""

    text: str
    examples: list[str]

    def __str__(self) -> str:
        shown = "; ".join(self.examples[:EXAMPLES])
        return f"{len(self.examples)} {self.text}: {shown}"


def uid_of(payload: str) -> str:
    """Return what tells a job from all others: ids may be given again when a backup was put in place."""
    value = json.loads(payload)
    return value.get("uid") or value.get("file") or payload if isinstance(value, dict) else payload


def load_ledger(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records by kind. The last line of a process that was killed may be torn."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().split("\n")[:-1]:
            record = json.loads(line)
            found[record.pop("kind")].append(record)
    return found


def enqueued_by_producer(folder: Path) -> Iterator[Stored]:
    """Read the log of producer.py: its acknowledgements. Each began not before the second in the file's name."""
    for path in folder.glob("producer.log*"):
        for acked, name, asked in ENQUEUED.findall(path.read_text(errors="replace")):
            began = datetime.strptime(f"{asked}+0000", "%Y%m%dT%H%M%S%z").timestamp()
            yield Stored(name, began, datetime.fromisoformat(acked.replace("Z", "+00:00")).timestamp())


class Row(NamedTuple):
    id: int
    uid: str
    task: str
    state: str
    attempts: int
    consumer: str | None
    error: str | None
    result: Any


class Audit:
    def __init__(self, folder: Path, path: Path, facts: Facts) -> None:
        self.folder, self.path, self.facts = folder, path, facts
        self.figures: Counter[str] = Counter()
        self.ledger = load_ledger(folder / "ledger")
        self.stored = [Stored(*each) for each in facts.stored]
        self.stored += [Stored(each["uid"], each["asked"], each["acked"]) for each in self.ledger["stored"]]
        self.stored += enqueued_by_producer(folder / "var/log")
        self.jobs: dict[str, Row] = {}
        self.events: dict[int, list[tuple[str, str, float]]] = defaultdict(list)
        self.effects: list[tuple[str, int]] = []

    def problems(self) -> list[str]:
        """Return a sentence for each promise that was broken."""
        self.figures["jobs acknowledged"] = len({each.uid for each in self.stored})
        self.figures["deliveries that began"] = len(self.ledger["began"])
        try:
            twice = self.load()
        except (sqlite3.Error, ValueError) as error:
            return [f"the database is damaged: {error}"]
        self.count()
        found = [
            twice, self.lost(), self.lost_effects(), self.wrong_effects(), self.stale_effects(), self.done_in_both(),
            self.ran_again(), self.never_began(), self.failed(), self.never_ended(), self.unfinished(),
            self.lost_files(), self.wrong_files(), self.held_locks(),
        ]  # fmt: skip
        return [str(each) for each in found if each.examples]

    def load(self) -> Finding:
        """Read the database, and return the jobs that are there twice. Raises sqlite3.Error for a damaged one."""
        twice = []
        with closing(sqlite3.connect(self.path)) as db:
            if (found := db.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found.splitlines()[0])
            columns = "id, payload, task, state, attempts, consumer, error, result"
            for number, payload, task, state, attempts, consumer, error, result in db.execute(
                f"SELECT {columns} FROM jobs"
            ):
                read = result and json.loads(result)
                row = Row(number, uid_of(payload), task, state, attempts, consumer, error, read)
                if row.uid in self.jobs:
                    twice.append(f"{row.uid}, {self.jobs[row.uid].id} and {row.id}")
                self.jobs[row.uid] = row
            for number, *event in db.execute("SELECT job_id, event, actor, at FROM history ORDER BY id"):
                self.events[number].append(tuple(event))
            self.effects = db.execute("SELECT uid, stale FROM effects").fetchall()
        return Finding("jobs are there twice", twice)

    def count(self) -> None:
        for row in self.jobs.values():
            self.figures[f"jobs {row.state} in the end"] += 1
        for events in self.events.values():
            for event, *_ in events:
                self.figures[f"history {event.partition(' to ')[0]}"] += 1
        self.figures["effects, each once"] = len(self.effects)
        self.figures["acts after which jobs may be gone"] = len(self.facts.losses)
        logs = [path.read_text(errors="replace") for path in (self.folder / "var/log").glob("*.log*")]
        self.figures['lines in the logs that say "replaced"'] = sum(
            "replaced" in line for log in logs for line in log.splitlines()
        )

    # What the losses of an operator's acts excuse

    def loss_of(self, asked: float, acked: float) -> Loss | None:
        return next((each for each in self.facts.losses if each.since <= acked and asked <= each.until), None)

    def was_forgotten(self, first: float, again: float, *, in_flight: bool = False) -> bool:
        """Whether an act took back what was done at one time before the other; in_flight: just then, perhaps."""
        acts = (each for each in self.facts.losses if each.rolls_back or in_flight)
        return any(each.since <= first <= each.until <= again for each in acts)

    def latest_act(self, at: float) -> str:
        before = [each for each in self.facts.losses if each.until <= at]
        return f", {at - before[-1].until:.1f} s after {before[-1].act}" if before else ""

    # Jobs

    def lost(self) -> Finding:
        """Every acknowledged job must be there, unless it was finished and pruned, or an act took it away."""
        gone = []
        for uid, asked, acked in self.stored:
            if uid in self.jobs:
                continue
            if uid in self.facts.prunable:
                self.figures["jobs pruned"] += 1
            elif loss := self.loss_of(asked, acked):
                self.figures[f"jobs lost by {loss.act}"] += 1
                self.figures[f"of them in calls under way at {loss.act}"] += acked > loss.until
            elif uid in self.facts.left_behind:
                self.figures["jobs left in the old file of a move"] += 1
            else:
                gone.append(f"{uid}, acknowledged at {clock(acked)}{self.latest_act(asked)}")
        return Finding("acknowledged jobs are gone", gone)

    def unfinished(self) -> Finding:
        left = [f"{row.uid} is {row.state}" for row in self.jobs.values() if row.state in pqueue.UNFINISHED]
        return Finding("jobs did not come to an end", left)

    def never_ended(self) -> Finding:
        """A completed job's last attempt must have run to its end, by the consumer that the row names."""
        ends = {(each["uid"], each["attempt"], each["consumer"]) for each in self.ledger["ended"]}
        return Finding(
            "jobs were completed by who had not run them",
            [
                f"{row.uid} attempt {row.attempts} by {row.consumer}"
                for row in self.jobs.values()
                if row.state == "completed" and self.is_ours(row) and (row.uid, row.attempts, row.consumer) not in ends
            ],
        )

    def is_ours(self, row: Row) -> bool:
        return row.task in OURS

    def ran_again(self) -> Finding:
        """A job with one attempt must begin once: in those processes that an act did not cut off from the others."""
        runs = Counter[tuple[str, int]]()
        for each in self.ledger["began"]:
            if each["uid"].startswith("once-"):
                runs[each["uid"], sum(loss.until <= each["since"] for loss in self.facts.losses)] += 1
        self.figures["jobs with one attempt that began"] = len(runs)
        return Finding(
            "jobs with max_attempts=1 ran again",
            [f"{uid} ran {number} times ({self.story(uid)})" for (uid, _), number in runs.items() if number > 1],
        )

    def story(self, uid: str) -> str:
        began = sorted((each["at"], each["token"]) for each in self.ledger["began"] if each["uid"] == uid)
        return ", ".join(f"{clock(at)} under {token}" for at, token in began)

    def never_began(self) -> Finding:
        """Jobs that never began must not be failed. A kill may come just before a task's first line: of each consumer
        that died only one job can have been so unlucky."""
        began = {each["uid"] for each in self.ledger["began"]}
        deaths: dict[tuple[str, float], list[str]] = defaultdict(list)
        for row in self.jobs.values():
            if row.state == "failed" and self.is_ours(row) and row.uid not in began and not self.was_marked(row):
                event, actor, at = self.events[row.id][-1] if self.events[row.id] else (str(row.error), "", 0.0)
                deaths[actor, round(at, 1)].append(f"{row.uid} ({event} by {actor})")
        self.figures["failed just before their first line"] = sum(len(jobs) == 1 for jobs in deaths.values())
        return Finding(
            "jobs never began, but are failed", [job for jobs in deaths.values() if len(jobs) > 1 for job in jobs]
        )

    def was_marked(self, row: Row) -> bool:
        return any(event == "marked failed" for event, *_ in self.events[row.id])

    def failed(self) -> Finding:
        """Jobs with many attempts must not fail by themselves, unless a backup brought them back without their file."""
        known = {name for name, _ in self.facts.missing} | {each["name"] for each in self.ledger["missing"]}
        bad = []
        for row in self.jobs.values():
            if row.state != "failed" or row.task == "once" or self.was_marked(row):
                continue
            if not any(name in (row.error or "") for name in known):
                bad.append(f"{row.uid}: {(row.error or '').splitlines()[:1]}")
        return Finding("jobs failed", bad)

    # Effects

    def lost_effects(self) -> Finding:
        """What a transaction wrote must be there when it has returned."""
        there = {uid for uid, _ in self.effects} | self.facts.done_elsewhere
        gone = [
            f"{each['uid']}, committed at {clock(each['acked'])}{self.latest_act(each['asked'])}"
            for each in self.ledger["effect"]
            if each["uid"] not in there and not self.loss_of(each["asked"], each["acked"])
        ]
        return Finding("committed effects are gone", gone)

    def wrong_effects(self) -> Finding:
        """An effect must be there once for each time that its job was completed."""
        times, bad = Counter(uid for uid, _ in self.effects), []
        for uid, number in times.items():
            if number > 1 + self.facts.resubmitted[uid]:
                bad.append(f"{uid} has {number}, and was resubmitted {self.facts.resubmitted[uid]} times")
        for row in self.jobs.values():
            if row.task == "effect" and row.state == "completed" and not times[row.uid]:
                bad.append(f"{row.uid} is completed and has none")
            again = sum(event == "resubmitted" for event, *_ in self.events[row.id])
            if row.task == "effect" and row.state != "completed" and times[row.uid] > again:
                bad.append(f"{row.uid} is {row.state} and has {times[row.uid]}")
        return Finding("jobs have not one effect", bad)

    def stale_effects(self) -> Finding:
        return Finding("effects were committed under a stale token", [uid for uid, stale in self.effects if stale])

    def done_in_both(self) -> Finding:
        both = self.facts.done_elsewhere & {uid for uid, _ in self.effects}
        return Finding("effects are in the old file of a move and in the new one", sorted(both))

    # Job files

    def lost_files(self) -> Finding:
        """No unfinished job may lose its file, unless it was finished then, and a backup made it unfinished again."""
        seen = [*self.facts.missing, *((each["name"], each["at"]) for each in self.ledger["missing"])]
        lost = {name for name, at in seen if not self.was_forgotten(self.facts.deleted.get(name, at), at)}
        return Finding("files of unfinished jobs are gone", sorted(lost))

    def wrong_files(self) -> Finding:
        """Every line of a file has the job's timestamp in front, once, or none has: unless it was stamped before a
        backup brought back the job as it was before."""
        bad = []
        for path in (self.folder / "var/files").glob("job_*.txt"):
            lines = path.read_bytes().splitlines()
            stamps = {tuple(stamps_of(line)) for line in lines}
            row = self.jobs.get(path.name)
            if len(stamps) > 1:
                bad.append(f"{path.name} is stamped in part")
            elif stamps and len(times := stamps.pop()) > 1:
                pairs = zip(times[1:], times, strict=False)
                if not all(self.was_forgotten(first, again, in_flight=True) for first, again in pairs):
                    bad.append(f"{path.name} is stamped {len(times)} times: {', '.join(map(clock, times))}")
                    continue
                self.figures["files stamped again, as an act had undone the first time"] += 1
            elif row and row.task == "prepend_timestamp" and row.state == "completed":
                first = stamps_of(f"{row.result['timestamp']} ".encode())
                if list(times) != first:
                    bad.append(f"{path.name} has not the timestamp of its job")
        return Finding("files are wrong", bad)

    def held_locks(self) -> Finding:
        held = [path.name for path in self.path.parent.glob("*.d/*") if path.is_file() and is_locked(path)]
        return Finding("locks are held by nobody knows whom", held)


def is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        return not pqueue_files.try_lock(file.fileno())


def stamps_of(line: bytes) -> list[float]:
    """Return the timestamps in front of a line, the last one first."""
    found = []
    while match := STAMP.match(line):
        found.append(datetime.fromisoformat(match[1].decode().replace("Z", "+00:00")).timestamp())
        line = line[match.end() :]
    return found


def clock(at: float) -> str:
    return datetime.fromtimestamp(at).isoformat(timespec="milliseconds").partition("T")[2]
