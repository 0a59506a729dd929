"""The first process of a consumer. It starts the worker, which runs the tasks, and survives whatever they do.

It has a single thread, imports none of the user's modules, and needs nothing from the worker but the shared record.
"""

from __future__ import annotations

import math
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pqueue
import pqueue_tasks
from pqueue import Job, LeaseLost, PersistentQInterface, QueueError
from pqueue_files import is_stopped
from pqueue_tools import concurrency as concurrency  # noqa: PLC0414 - for workers: an upgrade may replace its file
from pqueue_tools import leftovers as leftovers  # noqa: PLC0414 - likewise
from pqueue_tools import processes, worker
from pqueue_tools import record as fields
from pqueue_tools.leases import DUMP_SIGNAL, INTERRUPT_SIGNAL, TICK_SECONDS, Leases, limit_error
from pqueue_tools.process import (
    blocked_signals,
    is_orphaned,
    log,
    on_termination,
    print_error,
    retry_soon,
    retry_while_busy,
)
from pqueue_tools.record import Record, Run, Slot
from pqueue_tools.task_output import TaskOutput, high_copy, outputs
from pqueue_values import NoConnection

IDLE_SECONDS = 1.0  # how often an idle keeper looks at the worker
GRACE_SECONDS = {  # from the interrupt of a task to the end of its process, by reason
    fields.TIMED_OUT: 5.0,
    fields.OUT_OF_MEMORY: 1.0,
    fields.LOST: 0.5,
    fields.STOP_REQUESTED: 5.0,
    fields.EXECUTED: -1.0,  # at once
}
REPEAT_SECONDS = 1.0  # how often a task that continues after an interrupt is interrupted again
DUMP_SECONDS = 0.5  # the longest wait for the traceback of a task that hangs
CLOSE_SECONDS = 5.0  # how long a worker may take to exit
STUCK_LOOKS = 60  # of TICK_SECONDS, at a worker that is stuck; then it is killed
SILENT_SECONDS = 2 * pqueue.BUSY_SECONDS  # least time that a worker may do nothing between tasks: it waits for others
BLOCKED_SECONDS = 1.0  # after which a task that blocks the event loop is reported, then after 2, 4, 8 times as long
NEIGHBOUR = "WorkerDied: another job ended the process; not run again because max_attempts is 1"
# A shell takes a tenth of the memory of a forked interpreter. Arguments: the keeper, the worker, seconds between looks,
# and how many that find the keeper stopped are needed.
WATCHDOG = """
seen=0
while [ $seen -lt "$4" ]; do
    sleep "$3" || exit
    while read -r key state _ && [ "$key" != State: ]; do :; done < "/proc/$1/status" || exit
    case $state in [Tt]) seen=$((seen + 1)) ;; *) seen=0 ;; esac
done
kill -9 "$2"
"""
LOOK_SECONDS = 10.0  # the longest pause between looks: `sleep` may outlive a keeper that is killed by as much
# Signals that a task may send to its parent; by default they would end this process
OF_USERS = [
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGXCPU),
    *(getattr(signal, name) for name in ("SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
    *(range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if hasattr(signal, "SIGRTMIN") else ()),
]
RESTART_SECONDS = 1.0  # before the next worker, if one ended without running a job, and the next watchdog


@dataclass
class Interruption:
    """An interrupted run of a slot. Times are monotonic seconds."""

    number: int  # of the run
    reason: int
    at: float
    sent_at: float = 0.0  # the last signal


class Keeper:
    """Runs the consumer that these options describe, in workers.

    draw: called a few times per second with the numbers of completed and failed jobs.
    """

    def __init__(
        self, queue: PersistentQInterface, options: Namespace, draw: Callable[[int, int], object] | None = None
    ) -> None:
        self.queue, self.options, self.name, self._draw = queue, options, options.name, draw
        self.record = Record(options.concurrency)
        self.leases = Leases(queue, self.record, self.name, options.lease_seconds, quiet=options.quiet)
        self._fields = self.record.fields
        self._pid = self._watchdog = 0  # of the worker, and of what watches this process meanwhile; 0: none
        self._watched_at = 0.0  # monotonic seconds: when that was started
        self._step_began = 0  # monotonic ns: the step of an async task that was seen last
        self._report_after = BLOCKED_SECONDS  # how long it may take until it is reported
        self._stops = 0  # requests to stop
        self._doing: list[int] = []  # what changes while the worker works
        self._runs_before = 0  # of earlier workers
        self._pipe = self._wakeup = self._dump = -1
        self._outputs: list[TaskOutput] = []
        self._others = set(processes.children(os.getpid()))
        self.is_refused = False  # the worker could not start or continue
        self._forget_worker()

    def _forget_worker(self) -> None:
        """Forget what concerned the previous worker."""
        self._status: int | None = None  # with which it ended
        self._oom_kills = processes.oom_kills()  # before the next one begins
        self._interrupted: dict[int, Interruption] = {}  # by slot
        self._closing_at = 0.0  # monotonic seconds: since when it is to exit
        self._keep_at = 0.0  # the same: when to look for a connection; at once when it is ready, as it needs one
        self._killed = self._is_damaged = False  # the worker by this process; the record by a task
        self._pulse = self._stuck_looks = 0  # of the worker; how often in succession it was found stuck
        self._stuck_as = ""  # why it was killed, if for that
        self._silent_looks = 0  # how often in succession it was found to do nothing
        for field in fields.OF_WORKER:
            self._fields[field] = 0
        for slot in self.record.slots:
            slot.clear()

    def run(self) -> int:
        """Run workers until asked to stop, or until the queue is drained; return the exit code."""
        self.shared = self.queue.share(self.name)
        failed = self._count_failed()
        if not can_watch():
            risk = "if this process is stopped, its jobs may also run elsewhere: it needs /bin/sh, sleep and /proc"
            log("no watchdog", consumer=self.name, reason=risk)
        with self._resources():
            outcome = self._run_workers()
        self.is_refused = outcome == fields.REFUSED
        if self.is_refused:
            return 2 if self._status == 2 << 8 else 1
        # guard: a drain whose jobs failed says so
        return int(self._count_failed() > failed)

    def _count_failed(self) -> int:
        """Return the number of failed jobs whose last consumer has this name, for the exit code of a drain."""
        return self.queue.count_jobs(state="failed", consumer=self.name) if self.options.drain else 0

    @contextmanager
    def _resources(self) -> Iterator[None]:
        """Open what the keeper needs, and handle signals, until the end of the block."""
        with ExitStack() as undo:
            self._pipe, self._wakeup = os.pipe()  # a signal or the worker writes to it
            for each in (self._pipe, self._wakeup):
                undo.callback(os.close, each)
                os.set_blocking(each, False)
            self._outputs = outputs(self.options)
            for output in self._outputs:
                undo.callback(output.close)
            self._dump = _unnamed_file()
            undo.callback(os.close, self._dump)
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False))
            for number in (signal.SIGCHLD, signal.SIGTSTP, *OF_USERS):
                # SIGCHLD is ignored: that it came wakes up the keeper
                handler = self._suspend if number == signal.SIGTSTP else worker.ignore
                undo.callback(signal.signal, number, signal.signal(number, handler))
            on_termination(self._stop)
            processes.adopt_orphans(True)
            undo.callback(processes.adopt_orphans, False)
            yield
            self.leases.beat(at_once=True)

    def _run_workers(self) -> int:
        while True:
            if not self._reserve():
                return fields.STOPPED
            began, self._runs_before = time.monotonic(), self._count_runs()
            self._start()
            while not self._has_ended():
                # guard: a task that writes into the shared memory does not end the keeper
                with self._distrusting(), self.leases.logging_once("left to its lease", "look"):
                    self._look()
                self._wait()
            self._end_processes()
            outcome = 0
            with self._distrusting():
                outcome = self._settle()
            if self._is_damaged:
                outcome = 0
                self._settle_all()
            # guard: a drain takes the jobs that were taken back when its worker found no more
            is_drained = outcome == fields.DRAINED and not self.leases.has_released_late
            if is_drained or outcome == fields.REFUSED or self._fields[fields.STOP]:
                return outcome
            if self._runs_before == self._count_runs() and time.monotonic() - began < RESTART_SECONDS:
                time.sleep(RESTART_SECONDS)

    @contextmanager
    def _distrusting(self) -> Iterator[None]:
        """Kill the worker if the block finds in the record what neither process writes."""
        try:
            yield
            least, stops, outcome = self._stops, self._fields[fields.STOP], self._fields[fields.OUTCOME]
            if outcome in range(fields.BROKEN_BY_ONE + 1) and least <= stops <= self._stops:  # signals may come here
                return
        except (ArithmeticError, LookupError, ValueError):
            pass
        self._is_damaged = True
        if self._status is None:
            self._kill()

    def _settle_all(self) -> None:
        """Fail the attempt of each held job that has begun, and renew the record, which a task has overwritten."""
        reason = "overwrote the memory that it shares with its keeper"
        log("worker died", consumer=self.name, reason=reason)
        self.leases.forget()
        self.record.renew(self._stops)
        until = time.monotonic() + self.options.lease_seconds
        with suppress(QueueError):
            error = f"WorkerDied: this task, or another one in its process, {reason}"
            retry_while_busy(lambda: self._fail_held(error), lambda s: _pause(s, until), consumer=self.name)

    def _fail_held(self, error: str) -> None:
        for job in self.queue.held_jobs(self.name):
            with suppress(LeaseLost):
                # guard: a job that had not begun loses no attempt by what another one has overwritten
                if not self.queue.has_begun(job):
                    self.queue.release(job)
                else:
                    self._fail(job, error)

    def _fail(self, job: Job, error: str, trace: str = "", **options: Any) -> None:
        state = self.queue.fail(job, f"{error}\n{trace}".rstrip(), **options)
        self.leases.failed += 1
        log("failed", consumer=self.name, job=job.id, task=job.task, attempt=job.attempts, now=state, error=error)

    def _count_runs(self) -> int:
        """Return how many tasks workers have begun to run."""
        return sum(slot.fields[fields.RUN] for slot in self.record.slots)

    def _reserve(self) -> bool:
        """Wait until the server has a connection for this process and one for the worker. Return False if stopped."""

        def reserve() -> bool:
            self.queue.reserve_connections(2)
            return True

        def pause(seconds: float) -> bool:
            until = time.monotonic() + seconds * random.uniform(0.5, 1)  # noqa: S311 - others wait for the same
            while not self._fields[fields.STOP] and (left := until - time.monotonic()) > 0:
                self._wait(left)
                self._stop_if_orphaned()
            return self._fields[fields.STOP] > 0

        if self.options.drain:
            return retry_soon(reserve)
        return bool(retry_while_busy(reserve, pause, consumer=self.name))

    # The worker

    def _start(self) -> None:
        """Fork a worker."""
        self._forget_worker()
        self._empty_dump()
        self.leases.has_released_late = False
        self.shared.children += 1
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # there is none, or it was closed
                stream.flush()
        processes.share_memory()
        parent = os.getpid()
        with blocked_signals(signal.valid_signals()):
            try:
                self._pid = os.fork()
            except OSError as error:
                raise QueueError(f"cannot start a process for the tasks: {error.strerror}") from error
            if self._pid == 0:
                processes.end_with_parent(parent)
                worker.run_process(
                    self.queue, self.shared, self.record, self.options, self._outputs, self._wakeup, self._dump
                )
        self.leases.pid = self._pid
        with suppress(OSError):
            os.setpgid(self._pid, 0)  # whichever of both is first
        self._start_watchdog()

    def _start_watchdog(self) -> None:
        """Start a process that kills the worker before its leases end, if this one is stopped and cannot extend them.

        It belongs to the group of the worker, so what stops or kills the group of this process spares it.
        """
        keeper, self._watched_at = os.getpid(), time.monotonic()
        with suppress(OSError), blocked_signals(signal.valid_signals() - {signal.SIGCHLD}):
            self._watchdog = os.fork()  # raises OSError if the system has no more processes
            if self._watchdog:
                return
            try:
                processes.end_with_parent(keeper)
                os.setpgid(0, self._pid)
                os.closerange(0, 1 << 20)
                seconds = min(self.options.lease_seconds / 8, LOOK_SECONDS)
                looks = math.ceil(self.options.lease_seconds * 3 / 8 / seconds)
                arguments = [str(keeper), str(self._pid), f"{seconds:f}", str(looks)]
                # guard: the worker of a stopped keeper ends before its leases
                os.execv("/bin/sh", ["sh", "-c", WATCHDOG, "pqueue-watchdog", *arguments])
            finally:
                os._exit(1)

    def _has_ended(self) -> bool:
        """Reap children; return whether the worker was among them."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if os.WIFSTOPPED(ended[1]):  # it has asked to be traced
                    processes.stop_tracing(*ended)
                elif ended[0] == self._pid:
                    self._status = ended[1]
                elif ended[0] == self._watchdog:
                    self._watchdog = 0
        return self._status is not None

    def _wait(self, most: float = math.inf) -> None:
        """Wait until something may have to be done, for at most this many seconds."""
        self._fields[fields.ASLEEP] = 1  # first: a job that begins after the next line wakes this process
        is_idle = self._fields[fields.IDLE] or not self._fields[fields.READY]
        self._fields[fields.ASLEEP] = int(is_idle)
        seconds = min(most, IDLE_SECONDS if is_idle else TICK_SECONDS)
        if self._draw:
            seconds = min(seconds, 4 * TICK_SECONDS)
        until, is_awake = time.monotonic() + seconds, False
        while not is_awake and (left := until - time.monotonic()) > 0:
            poller = select.poll()
            poller.register(self._pipe, select.POLLIN)
            for output in self._outputs:
                output.register(poller)
            ready = dict(poller.poll(left * 1000))
            self._fields[fields.FORWARDING] = 1  # before it is read
            for output in self._outputs:
                output.forward(ready)
            self._fields[fields.FORWARDING] = any(output.ready for output in self._outputs)
            if is_awake := self._pipe in ready:
                with suppress(BlockingIOError):
                    os.read(self._pipe, 65536)
        self._fields[fields.ASLEEP] = 0

    # Watching

    def _stop_if_orphaned(self) -> None:
        if is_orphaned() and not self._fields[fields.STOP]:
            self._stop()

    def _keep_connection(self) -> None:
        """Keep one connection, for the leases. If the server has none left, let the worker end after its jobs."""
        if not self._fields[fields.READY] or time.monotonic() < self._keep_at:
            return
        self._keep_at = time.monotonic() + IDLE_SECONDS
        with suppress(QueueError):  # the server is away: both wait for it
            try:
                self.queue.reserve_connections(1)
                self._fields[fields.RENEW] = 0
            except NoConnection:
                self._fields[fields.RENEW] = 1

    def _look(self) -> None:
        self._stop_if_orphaned()
        if self._draw:
            self._draw(*self.leases.counts())
        self._end_late_worker()
        self._end_silent_worker()
        # guard: a watchdog that a task has killed is started again
        if not self._watchdog and time.monotonic() - self._watched_at > RESTART_SECONDS:
            self._start_watchdog()
        slots = self.leases.running()
        runs = [run for _, run in slots]
        # guard: a task that has lost its lease is ended while others write
        self.leases.check(runs)
        for slot, run in slots:
            self._enforce(slot, run)
        self._keep_connection()
        # What follows may wait for others that write
        if self._is_stuck() or any(
            slot.fields[fields.RUNNING] == run.number and self.leases.has_lost(run) for slot, run in slots
        ):
            return
        self._report_blocked_loop()
        self.leases.extend(runs)
        self.leases.beat()
        self.leases.prune()

    def _is_stuck(self) -> bool:
        """Return whether the worker holds the write lock of the database and is stopped, or one of its threads holds
        the GIL; kill it after a while, unless it waits for a disk."""
        pulse = self._fields[fields.PULSE]
        reason = "was stopped" if is_stopped(self._pid) else "held the GIL" if 0 < pulse == self._pulse else ""
        self._pulse = pulse
        if not reason or not self._holds_write_lock() or processes.waits_for_disk(self._pid):
            self._stuck_looks = 0
            return False
        self._stuck_looks += 1
        # guard: a worker that is stuck does not keep others from writing
        if self._stuck_looks > STUCK_LOOKS and not self._killed:
            self._stuck_as = f"{reason} while it kept all others from writing, and was killed"
            self._kill(dump=bool(pulse))
        return True

    def _holds_write_lock(self) -> bool:
        with suppress(QueueError):
            return self.queue.is_locked_by(self._pid)
        return False

    def _report_blocked_loop(self) -> None:
        """Log where an async task has blocked the event loop for long."""
        stepping, since = self._fields[fields.STEPPING], self._fields[fields.STEPPED_AT]
        seconds = (time.monotonic_ns() - since) / 1e9 if stepping else 0.0
        if since != self._step_began:
            self._step_began, self._report_after = since, BLOCKED_SECONDS
        if self._killed or seconds < self._report_after:
            return
        self._report_after *= 2
        slot = self.record.slots[stepping - 1]
        reason = f"the event loop was blocked for {seconds:.0f} s in {self._place(slot)}"
        log("blocked", consumer=self.name, job=slot.fields[fields.JOB], reason=reason)

    def _place(self, slot: Slot) -> str:
        """Return the file and the line where the thread of a slot is."""
        self._write_traceback()
        lines = (line for line in self._traceback(slot) if "File" in line)
        return re.sub(r'.*"(.*)", line (\d+) in .*', r"\1:\2", next(lines, "a place unknown"))

    def _end_late_worker(self) -> None:
        """Kill a worker that is asked to stop while it imports or is stopped, or that does not exit."""
        is_closing = self._fields[fields.OUTCOME] != 0
        if is_closing and not self._closing_at:
            self._closing_at = time.monotonic()
        late = is_closing and (time.monotonic() - self._closing_at > CLOSE_SECONDS or self._fields[fields.STOP] > 1)
        rests = self._fields[fields.STOP] > 1 and not any(slot.fields[fields.RUNNING] for slot in self.record.slots)
        late = late or (rests and is_stopped(self._pid))
        if late or (self._fields[fields.STOP] and not self._fields[fields.READY]):
            self._kill()

    def _end_silent_worker(self) -> None:
        """Kill a worker that neither runs a task nor waits nor works: it executes code that a task has left behind."""
        names = fields.STORED, fields.RETRIES, fields.COMPLETED, fields.FAILED
        doing = [self._count_runs(), *(self._fields[each] for each in names)]
        rests = self._fields[fields.IDLE] or self._fields[fields.OUTCOME] or doing[0] == self._runs_before
        rests = rests or any(slot.fields[fields.RUNNING] for slot in self.record.slots)
        if rests or doing != self._doing or is_stopped(self._pid) or processes.waits_for_disk(self._pid):
            self._doing, self._silent_looks = doing, 0
            return
        self._silent_looks += 1
        stops = self._fields[fields.STOP] > 1
        least = SILENT_SECONDS if stops else max(SILENT_SECONDS, self.options.lease_seconds / 2)
        # guard: code that a task has left behind does not stop its consumer
        if self._silent_looks * TICK_SECONDS > least and not self._killed:
            place = self._place(self.record.slots[0])
            self._stuck_as = f"did not end what a task left behind, in {place}, within {least:g} s, and was killed"
            self._kill()

    def _enforce(self, slot: Slot, run: Run) -> None:
        """Interrupt the task if it must end; kill its process if it does not."""
        if slot.fields[fields.RUNNING] != run.number:  # it has ended, and its job is being settled
            return
        now, found = time.monotonic(), self._interrupted.get(slot.number)
        if (found is None or found.number != run.number) and (reason := self._reason_to_end(run)):
            self._interrupted[slot.number] = found = Interruption(run.number, reason, now)
            slot.fields[fields.REASON], slot.fields[fields.INTERRUPT] = reason, run.number
        if found is None or found.number != run.number or self._killed:
            return
        if now - found.at > GRACE_SECONDS[found.reason]:
            self._kill(dump=found.reason not in (fields.EXECUTED, fields.LOST))
        elif slot.fields[fields.INTERRUPTED] != run.number or now - found.sent_at > REPEAT_SECONDS:
            found.sent_at = now
            slot.fields[fields.INTERRUPT] = run.number  # again
            self._signal(INTERRUPT_SIGNAL)

    def _reason_to_end(self, run: Run) -> int:
        if self._fields[fields.STOP] > 1:
            return fields.STOP_REQUESTED
        if self.leases.has_lost(run):
            return fields.LOST
        # guard: a task that runs too long is ended
        if run.timeout_seconds and time.monotonic() - run.started > run.timeout_seconds:
            return fields.TIMED_OUT
        if run.memory_mb and _memory_mb(self._pid) - run.base_mb > run.memory_mb:
            return fields.OUT_OF_MEMORY
        return fields.EXECUTED if processes.has_become_another(self._pid) else 0

    # Ending

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _kill(self, *, dump: bool = False) -> None:
        """Kill the worker and the processes that it has started."""
        if self._killed:
            return
        self._killed = True
        if dump:
            self._write_traceback()
        processes.kill(*processes.descendants(self._pid), self._pid)

    def _write_traceback(self) -> None:
        """Let the worker write where it is, in a C function that needs no GIL."""
        self._empty_dump()
        self._signal(DUMP_SIGNAL)
        until, size = time.monotonic() + DUMP_SECONDS, -1
        while time.monotonic() < until and (size <= 0 or size != self._dump_size()):
            size = self._dump_size()
            time.sleep(0.02)

    def _empty_dump(self) -> None:
        os.ftruncate(self._dump, 0)
        os.lseek(self._dump, 0, os.SEEK_SET)  # also for the worker

    def _dump_size(self) -> int:
        return os.fstat(self._dump).st_size

    def _end_processes(self) -> None:
        """Kill what the worker has started and left running."""
        asleep = processes.children(self._watchdog) if self._watchdog else []
        with suppress(OSError):
            os.killpg(self._pid, signal.SIGKILL)
        for pid in set(processes.children(os.getpid())) - self._others - {self._pid}:
            # guard: no process of a task is left
            if os.getpid() != 1 or processes.is_of_task(pid):  # the first process adopts those of other programs, too
                processes.kill(*processes.descendants(pid), pid)
        with suppress(ChildProcessError):  # it has ended
            if self._watchdog and not os.waitpid(self._watchdog, os.WNOHANG)[0]:
                os.kill(self._watchdog, signal.SIGKILL)
                os.waitpid(self._watchdog, 0)
            for pid in asleep:  # which have become children of this process
                os.waitpid(pid, 0)
        self._watchdog = 0
        self._has_ended()
        for output in self._outputs:
            output.flush()

    def _settle(self) -> int:
        """Settle what a worker held when it died; return how it ended."""
        outcome = self._fields[fields.OUTCOME]
        left = {slot.number: run for slot in self.record.slots if (run := slot.run())}
        until = time.monotonic() + self.options.lease_seconds
        with suppress(QueueError):
            retry_while_busy(self.leases.settle_taken, lambda s: _pause(s, until), consumer=self.name)
        was_refused = outcome == fields.REFUSED and not left
        if was_refused or (not self._fields[fields.READY] and self._fields[fields.STOP]):
            return outcome
        if not self._fields[fields.READY]:
            print_error("consumer", f"the worker {self._end_text()} while it imported the tasks")
            return fields.REFUSED
        if outcome in (0, fields.REFUSED, fields.BROKEN, fields.BROKEN_BY_ONE):
            if outcome == 0 and (not left or self._stuck_as):
                log("worker died", consumer=self.name, reason=self._stuck_as or self._end_text())
            with suppress(QueueError):
                retry_while_busy(lambda: self._settle_held(left), lambda s: _pause(s, until), consumer=self.name)
        return outcome

    def _end_text(self) -> str:
        return processes.end_text(self._status or 0, self._oom_kills)

    def _settle_held(self, left: dict[int, Run]) -> None:
        """Settle the jobs of the dead worker. left: its runs, by slot; those whose jobs are settled are removed."""
        results = self.record.results()
        runs = {number: run for number, run in left.items() if run.key not in results}
        held = self.leases.return_held(results, [run.key for run in runs.values()])
        blamed = self._blamed(runs)
        for number, run in runs.items():
            job = held.get(run.key)
            try:
                if job:
                    self._settle_running(number, run, job, blamed)
            except LeaseLost:
                job = None
            if job is None:
                log("lost", consumer=self.name, job=run.job_id, reason=f"the lease of {self.name} was lost")
            del left[number]

    def _blamed(self, runs: dict[int, Run]) -> list[int]:
        """Return the slots of the runs that may have ended the worker: only one, if it can be known."""
        asked = [number for number, run in runs.items() if self._reason(number, run) not in (0, fields.EXECUTED)]
        if self._killed and asked:
            return asked
        if self._fields[fields.OUTCOME] == fields.BROKEN_BY_ONE:
            return [number for number, run in runs.items() if self.record.error(run) is not None]
        threads = {number: self._thread(self.record.slots[number]) for number in runs}
        if found := [number for number, thread in threads.items() if thread == self._faulty_thread()]:
            return found
        # The event loop runs one task at a time
        are_async = not any(self.record.slots[number].fields[fields.THREAD] for number in runs)
        now = [number for number, thread in threads.items() if thread == self._fields[fields.LOOP]]
        return now if are_async and now else list(runs)

    def _thread(self, slot: Slot) -> int:
        """Return the thread that runs a slot's task now; 0: the only one; -1: none, as it is async and waits."""
        thread, loop = slot.fields[fields.THREAD], self._fields[fields.LOOP]
        return thread if thread or not loop else loop if self._fields[fields.STEPPING] == slot.number + 1 else -1

    def _reason(self, number: int, run: Run) -> int:
        """Return why the run of a slot was interrupted; 0: it was not."""
        found = self._interrupted.get(number)
        return found.reason if found and found.number == run.number else 0

    def _settle_running(self, number: int, run: Run, job: Job, blamed: list[int]) -> None:
        """Settle a job that ran when the worker died."""
        reason, is_blamed = self._reason(number, run), number in blamed
        if (not is_blamed or reason == fields.STOP_REQUESTED) and job.max_attempts != 1:
            # guard: a job that another one took down loses no attempt
            self.leases.release(job)
            return
        error, trace = NEIGHBOUR, ""
        if is_blamed:
            error, _, trace = (self.record.error(run) or self._error(run, reason, len(blamed))).partition("\n")
            trace = trace or "\n".join(self._traceback(self.record.slots[number]))
        retry = is_blamed and reason != fields.STOP_REQUESTED
        # guard: a job that kills its worker loses an attempt
        self._fail(job, error, trace, retry=retry, retry_in_seconds=run.retry_in_seconds)

    def _error(self, run: Run, reason: int, blamed: int) -> str:
        """Return why the job ended with its worker, in one line. blamed: how many jobs may have ended it."""
        if reason == fields.STOP_REQUESTED:
            return "Stopped: stopped while it ran; not run again because max_attempts is 1"
        if reason in (fields.TIMED_OUT, fields.OUT_OF_MEMORY) and self._killed:
            error = limit_error(reason, run)
            return f"{type(error).__name__}: {error}, and was killed, as it did not end when it was interrupted"
        others = f", while {blamed} jobs ran in it" if blamed > 1 else ""
        if self._stuck_as:
            return f"WorkerDied: the task's process {self._stuck_as}{others}"
        if any(each.reason == fields.EXECUTED for each in self._interrupted.values()):
            return f"WorkerDied: the task replaced its process by another program{others}"
        return f"WorkerDied: the task's process {self._end_text()}{others}"

    def _traceback(self, slot: Slot) -> Iterator[str]:
        """Yield the lines of the traceback of a slot's thread that the worker wrote, without our own frames."""
        program = getattr(sys.modules["__main__"], "__file__", None)
        ours = [f'"{path}' for path in (Path(__file__).parent, pqueue_tasks.__file__, program, sys.argv[0]) if path]
        of_slot = self._thread(slot)
        before, *threads = re.split(r"(?m)^(?=(?:Current thread|Thread) 0x([0-9a-f]+))", self._dumped())
        for number, text in [("0", before), *zip(threads[::2], threads[1::2], strict=True)]:
            if of_slot in (0, int(number, 16)):
                yield from (line for line in text.splitlines() if not any(path in line for path in ours))

    def _faulty_thread(self) -> int | None:
        """Return the thread in which a fault has ended the worker; None: unknown."""
        found = re.search("Fatal Python error(?s:.*?)Current thread 0x([0-9a-f]+)", self._dumped())
        return int(found[1], 16) if found else None

    def _dumped(self) -> str:
        """Return the traceback that the worker wrote."""
        with suppress(OSError):
            return os.pread(self._dump, 1 << 20, 0).decode(errors="replace").rstrip("\0\n")
        return ""

    # Signals

    def _stop(self, *_: Any) -> None:
        """Handle a termination signal: the first lets the current jobs finish, the second interrupts them."""
        self._stops += 1
        self._fields[fields.STOP] = self._stops
        if self._pid and self._fields[fields.READY]:
            self._signal(INTERRUPT_SIGNAL)  # it may be waiting

    def _suspend(self, *_: Any) -> None:
        """Handle Ctrl-Z: stop the worker, too."""
        with suppress(OSError):
            os.killpg(self._pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        with suppress(OSError):
            os.killpg(self._pid, signal.SIGCONT)


def _unnamed_file() -> int:
    """Return a file for tracebacks, if possible in memory, as a container may have no temporary folder, and out of the
    way of tasks that close low descriptors."""
    try:
        file = os.memfd_create("pqueue-traceback")
    except (AttributeError, OSError):  # not Linux, or not allowed
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    if (copy := high_copy(file)) is None:
        return file
    os.close(file)
    return copy


def can_watch() -> bool:
    """Return whether there is what the watchdog needs."""
    return os.access("/bin/sh", os.X_OK) and shutil.which("sleep") is not None and os.path.exists("/proc/self/status")


def _pause(seconds: float, until: float) -> bool:
    time.sleep(seconds)
    return time.monotonic() > until


def _memory_mb(pid: int) -> float:
    """Return the resident memory of a process and of those that it has started."""
    return sum(map(processes.resident_mb, (pid, *processes.descendants(pid))))
