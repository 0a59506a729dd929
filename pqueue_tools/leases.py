"""Keeping the leases of the jobs that a consumer runs, without the help of the threads that run them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pqueue import Job, LeaseLost, PersistentQInterface, QueueBusy, QueueError
from pqueue_files import is_stopped
from pqueue_tasks import task_name
from pqueue_tools import record as fields
from pqueue_tools.process import log, log_completed
from pqueue_tools.record import Record, Results, Run, Slot

TICK_SECONDS = 0.05  # how often the running jobs are checked
CHECK_SECONDS = 0.25  # how often the database is asked whether they still belong to this consumer
HEARTBEAT_SECONDS = 10.0
PRUNE_SECONDS = 60.0  # how often finished jobs are deleted that are kept no longer
PRUNE_AGAIN_SECONDS = 1.0  # the same, while there are many
# Signals to the worker, which tasks and libraries are unlikely to use
INTERRUPT_SIGNAL = getattr(signal, "SIGRTMIN", getattr(signal, "SIGUSR1", 0)) + hasattr(signal, "SIGRTMIN")
DUMP_SIGNAL = getattr(signal, "SIGRTMIN", getattr(signal, "SIGUSR2", 0)) + 2 * hasattr(signal, "SIGRTMIN")


class Leases:
    """Extends the leases of the running jobs, notices their loss, and takes back jobs that wait behind a slow one."""

    def __init__(
        self, queue: PersistentQInterface, record: Record, name: str, lease_seconds: float, *, quiet: bool = False
    ) -> None:
        self.queue, self.record, self.name, self.lease_seconds = queue, record, name, lease_seconds
        self.quiet = quiet
        self.pid = os.getpid()  # of the process that runs the jobs
        self.completed = self.failed = 0  # jobs, and attempts, that this object ended
        self._lost: set[tuple[int, int]] = set()  # the runs whose lease was lost, by their keys
        self.has_released_late = False  # jobs that were taken back, when the worker may have looked for others
        self._number = 0  # of the last run whose waiting jobs were taken
        self._taken: tuple[Run, Results] | None = None  # a run, and the results of what ran before it
        self._extended = self._checked = 0.0  # monotonic seconds
        self._errors: dict[str, str] = {}  # the last error of what does not work, which was logged
        self._beat_at = time.monotonic() + HEARTBEAT_SECONDS
        self._reported = (0, 0)  # completed and failed jobs, at the last heartbeat
        self._prune_at = time.monotonic() + PRUNE_AGAIN_SECONDS

    def check(self, runs: Sequence[Run]) -> None:
        """Notice which of the runs that have lasted for a tick have lost their lease.

        This only reads, so no process that writes or was stopped as it wrote delays it.
        """
        now = time.monotonic()
        if not runs or now - self._checked <= CHECK_SECONDS:
            return
        self._checked = now
        with self.logging_once("left to its lease", "check"):
            leases = self.queue.held_leases(self.name, (run.job_id for run in runs))
            held = {(job_id, claim_number(token)) for job_id, token in leases}
            still = {run.key for slot in self.record.slots if slot.fields[fields.RUNNING] and (run := slot.run())}
            gone = still.intersection(run.key for run in runs) - held
            self._lost = {key for key in gone if key in self._lost or self.settled_as(key[0]) is None}

    @contextmanager
    def logging_once(self, event: str, what: str, **more: Any) -> Iterator[None]:
        """Log the error of the block, if it is another one than before or `what` has worked meanwhile."""
        try:
            yield
            self._errors.pop(what, None)
        except (QueueError, MemoryError) as error:
            reason = str(error) or "out of memory"
            if self._errors.get(what) != reason:
                log(event, consumer=self.name, **more, reason=reason)
            self._errors[what] = reason

    def extend(self, runs: Sequence[Run]) -> None:
        """Extend the leases of the runs that have lasted for a tick, in time."""
        if len(self.record.slots) == 1:
            self._take_waiting(runs)
        now = time.monotonic()
        # guard: a stopped worker loses its lease
        if not runs or now - self._extended <= self.lease_seconds / 3 or is_stopped(self.pid):
            return
        self._extended = now - self.lease_seconds / 6  # if it fails, retry soon
        # guard: a job that waits until it can run alone keeps its lease
        ids = None if self.record.fields[fields.WAITING] else [run.job_id for run in runs]
        with self.logging_once("waiting", "extend", **({"job": runs[0].job_id} if len(self.record.slots) == 1 else {})):
            # On PostgreSQL, jobs that others are changing are left out
            if self.queue.extend_all(self.name, self.lease_seconds, job_ids=ids) >= len(runs):
                self._extended = now

    def has_lost(self, run: Run) -> bool:
        return run.key in self._lost

    def running(self) -> list[tuple[Slot, Run]]:
        """Return the runs that have lasted for a tick, with their slots."""
        before = time.monotonic() - TICK_SECONDS
        return [(slot, run) for slot in self.record.slots if (run := slot.run()) and run.started <= before]

    def _take_waiting(self, runs: Sequence[Run]) -> None:
        """Take the jobs that wait behind a run from the worker, once, and settle them."""
        for run in runs:
            is_new = run.number != self._number and not self.has_lost(run)
            if is_new and not self._taken and (results := self.record.withdraw(run)) is not None:
                self._number, self._extended = run.number, run.started
                self._taken = run, results
        with self.logging_once("waiting", "take back"):
            self.settle_taken()

    def settle_taken(self) -> None:
        """Complete the jobs that finished before a slow one, and release those that waited behind it, if they were
        taken from the worker, which has forgotten them. Raises QueueError; then call it again."""
        # guard: jobs that were taken from a worker are settled, although the slow one has ended
        if self._taken:
            run, results = self._taken
            self.return_held(results, [run.key], claim=run.claim)
            self._taken = None
            self.has_released_late = self.has_released_late or self.record.slots[0].run() != run

    def return_held(
        self, results: Results, running: Collection[tuple[int, int]], claim: int | None = None
    ) -> dict[tuple[int, int], Job]:
        """Complete the held jobs that have results, and release the others but the running ones; return those.

        Jobs are identified by their id and the number of the claim.
        claim: only its jobs, as the worker continues and may have claimed others; None: all.
        """
        held = {(job.id, claim_number(str(job.lease_token))): job for job in self.queue.held_jobs(self.name)}
        # guard: jobs of a later claim are not taken back
        held = {key: job for key, job in held.items() if claim in (None, key[1])}
        kept = {key: held.pop(key) for key in running if key in held}
        finished = [(held.pop(key), results[key]) for key in results if key in held]
        if finished:
            _, lost = self.queue.complete_and_dequeue(finished, self.name, 0)
            self.completed += len(finished) - len(lost)
            if not self.quiet:
                log_completed(self.name, [each for each, _ in finished if each not in lost])
            for job in lost:
                log("lost", consumer=self.name, job=job.id, reason="its lease")
        for other in held.values():
            self.release(other)
        return kept

    def release(self, job: Job) -> None:
        with suppress(LeaseLost):
            self.queue.release(job)
            log("released", consumer=self.name, job=job.id)

    def settled_as(self, job_id: int, attempt: int | None = None) -> str | None:
        """Return how the task itself has settled its job, so that the lease was not taken away: completed, or the last
        event in its history; None: not. attempt: only this one."""
        with suppress(QueueError):
            job = self.queue.get(job_id)
            if job.state == "completed" and (attempt is None or (job.consumer, job.attempts) == (self.name, attempt)):
                return "completed"
            for last in self.queue.history(job_id)[-1:]:
                is_own = last["actor"] == self.name and last["event"] in ("failed", "released", "snoozed")
                if (is_own or last["actor"] == task_name(self.name)) and attempt in (None, last["attempt"]):
                    return str(last["event"])
        return None

    def beat(self, *, at_once: bool = False) -> None:
        """Send a heartbeat if one is due."""
        if time.monotonic() < self._beat_at and not at_once:
            return
        self._beat_at = time.monotonic() + HEARTBEAT_SECONDS
        counts = self.counts()
        completed, failed = (now - before for now, before in zip(counts, self._reported, strict=True))
        with suppress(QueueError):
            self.queue.heartbeat(self.name, completed=completed, failed=failed)
            self._reported = counts

    def prune(self) -> None:
        """Delete some of the jobs that their queues keep no longer, now and then."""
        if time.monotonic() < self._prune_at:
            return
        self._prune_at = time.monotonic() + PRUNE_SECONDS
        with self.logging_once("not pruned", "prune"), suppress(QueueBusy):
            if self.queue.prune_kept():
                self._prune_at = time.monotonic() + PRUNE_AGAIN_SECONDS

    def forget(self) -> None:
        """Forget what the record said, but for the last counts that were reported: a task has overwritten it."""
        self._number, self._taken, self._lost = 0, None, set()
        self.completed, self.failed = self._reported

    def counts(self) -> tuple[int, int]:
        """Return the numbers of completed jobs and failed attempts."""
        done = self.record.fields
        return done[fields.COMPLETED] + self.completed, done[fields.FAILED] + self.failed


def claim_number(lease_token: str) -> int:
    return int(lease_token.partition(".")[2])


def limit_error(reason: int, run: Run) -> Exception:
    if reason == fields.OUT_OF_MEMORY:
        return MemoryError(f"used more than {run.memory_mb:g} MB")
    return TimeoutError(f"timed out after {run.timeout_seconds:g} s")


@contextmanager
def in_thread(leases: Leases) -> Iterator[None]:
    """Keep the leases in a second thread while the block runs; then unregister the consumer."""
    stopped = threading.Event()

    def keep() -> None:
        while not stopped.wait(CHECK_SECONDS if leases.record.fields[fields.IDLE] else TICK_SECONDS):
            with leases.logging_once("left to its lease", "look"):
                runs = [run for _, run in leases.running()]
                leases.check(runs)
                leases.extend(runs)
                leases.beat()
                leases.prune()

    thread = threading.Thread(target=keep, name="pqueue-leases", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        leases.beat(at_once=True)
        with suppress(QueueError):
            if not leases.queue.held_jobs(leases.name):  # which would run again: it may have begun
                leases.queue.leave(leases.name)
