"""The first process of a consumer. It starts the worker, which runs the tasks, and survives whatever they do.

It has a single thread, imports none of the user's modules, and needs nothing from the worker but the shared record.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pqueue
import pqueue_tasks
from pqueue import Job, LeaseLost, PersistentQInterface, QueueError
from pqueue_files import is_stopped
from pqueue_tools import processes, worker
from pqueue_tools import record as fields
from pqueue_tools.leases import DUMP_SIGNAL, INTERRUPT_SIGNAL, TICK_SECONDS, Leases, limit_error
from pqueue_tools.process import is_orphaned, log, on_termination, print_error, retry_while_busy
from pqueue_tools.record import Record, Run

IDLE_SECONDS = 1.0  # how often an idle keeper looks around
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
RESTART_SECONDS = 1.0  # before the next worker, if one died without running a job


class KeptLeases(Leases):
    """The leases of the worker's jobs."""

    pid = 0  # of the worker

    def _may_extend(self) -> bool:
        # guard: a stopped worker loses its lease
        return not is_stopped(self.pid)


class Keeper:
    """Runs the consumer that these options describe, in workers.

    draw: called a few times per second with the numbers of completed and failed jobs.
    """

    def __init__(
        self, queue: PersistentQInterface, options: Namespace, draw: Callable[[int, int], object] | None = None
    ) -> None:
        self.queue, self.options, self.name, self._draw = queue, options, options.name, draw
        self.record = Record()
        self.leases = KeptLeases(queue, self.record, self.name, options.lease_seconds, quiet=options.quiet)
        self._fields = self.record.fields
        self._pid = 0  # of the worker; 0: none
        self._status: int | None = None  # with which it ended
        self._run = 0  # the number of the run that was interrupted
        self._reason = 0  # why
        self._interrupted_at = self._sent_at = self._closing_at = 0.0  # monotonic seconds
        self._killed = False  # by this process
        self._pipe = self._wakeup = self._dump = -1
        self._others = set(processes.children(os.getpid()))

    is_refused = False  # the worker could not start or continue

    def run(self) -> int:
        """Run workers until asked to stop, or until the queue is drained; return the exit code."""
        self.shared = self.queue.share(self.name)
        failed = self._count_failed()
        with self._resources():
            outcome = self._run_workers()
        self.is_refused = outcome == fields.REFUSED
        # guard: a drain whose jobs failed says so
        return int(self.is_refused or self._count_failed() > failed)

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
            self._dump = _unnamed_file()
            undo.callback(os.close, self._dump)
            undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False))
            for number, handler in ((signal.SIGCHLD, _ignore), (signal.SIGTSTP, self._suspend)):
                undo.callback(signal.signal, number, signal.signal(number, handler))
            on_termination(self._stop)
            processes.adopt_orphans(True)
            undo.callback(processes.adopt_orphans, False)
            yield
            self.leases.beat(at_once=True)

    def _run_workers(self) -> int:
        while True:
            began, runs = time.monotonic(), self._fields[fields.RUN]
            self._start()
            while not self._has_ended():
                self._look()
                self._wait()
            self._end_processes()
            outcome = self._settle()
            if outcome in (fields.REFUSED, fields.DRAINED) or self._fields[fields.STOP]:
                return outcome
            if runs == self._fields[fields.RUN] and time.monotonic() - began < RESTART_SECONDS and outcome == 0:
                time.sleep(RESTART_SECONDS)

    # The worker

    def _start(self) -> None:
        """Fork a worker."""
        for field in (fields.RUNNING, fields.JOB, fields.STORED, fields.READY, fields.IDLE, fields.OUTCOME):
            self._fields[field] = 0
        self._fields[fields.WITHDRAW] = self._fields[fields.INTERRUPT] = 0
        self._run = self._reason = 0
        self._closing_at, self._killed, self._status = 0.0, False, None
        os.ftruncate(self._dump, 0)
        self.shared.children += 1
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # there is none, or it was closed
                stream.flush()
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                processes.end_with_parent(parent)
                worker.run_process(self.queue, self.shared, self.record, self.options, self._wakeup, self._dump)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.leases.pid = self._pid
        with suppress(OSError):
            os.setpgid(self._pid, 0)  # whichever of both is first

    def _has_ended(self) -> bool:
        """Reap children; return whether the worker was among them."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._pid:
                    self._status = ended[1]
        return self._status is not None

    def _wait(self) -> None:
        """Wait until something may have to be done."""
        is_idle = self._fields[fields.IDLE] or not self._fields[fields.READY]
        self._fields[fields.ASLEEP] = int(is_idle)
        seconds = TICK_SECONDS if not self._fields[fields.IDLE] and self._fields[fields.READY] else IDLE_SECONDS
        if self._draw:
            seconds = min(seconds, 4 * TICK_SECONDS)
        poller = select.poll()
        poller.register(self._pipe, select.POLLIN)
        if poller.poll(seconds * 1000):
            with suppress(BlockingIOError):
                os.read(self._pipe, 65536)
        self._fields[fields.ASLEEP] = 0

    # Watching

    def _look(self) -> None:
        if is_orphaned() and not self._fields[fields.STOP]:
            self._stop()
        if self._draw:
            self._draw(*self.leases.counts())
        self._end_late_worker()
        run = self.record.run()
        try:
            if run and self.leases.is_due(run):
                self._enforce(run)
                self.leases.check(run)
            self.leases.beat()
        except (QueueError, MemoryError) as error:
            log("left to its lease", consumer=self.name, reason=str(error) or "out of memory")

    def _end_late_worker(self) -> None:
        """Kill a worker that is asked to stop while it imports, or that does not exit."""
        is_closing = self._fields[fields.OUTCOME] != 0
        if is_closing and not self._closing_at:
            self._closing_at = time.monotonic()
        late = is_closing and (time.monotonic() - self._closing_at > CLOSE_SECONDS or self._fields[fields.STOP] > 1)
        if late or (self._fields[fields.STOP] and not self._fields[fields.READY]):
            self._kill()

    def _enforce(self, run: Run) -> None:
        """Interrupt the task if it must end; kill its process if it does not."""
        if self._fields[fields.RUNNING] != run.number:  # it has ended, and its job is being settled
            return
        now = time.monotonic()
        if run.number != self._run and (reason := self._reason_to_end(run)):
            self._run, self._reason, self._interrupted_at, self._sent_at = run.number, reason, now, 0.0
            self._fields[fields.REASON], self._fields[fields.INTERRUPT] = reason, run.number
        if run.number != self._run or self._killed:
            return
        if now - self._interrupted_at > GRACE_SECONDS[self._reason]:
            self._kill(dump=True)
        elif self._fields[fields.INTERRUPTED] != run.number or now - self._sent_at > REPEAT_SECONDS:
            self._sent_at = now
            self._signal(INTERRUPT_SIGNAL)

    def _reason_to_end(self, run: Run) -> int:
        if self._fields[fields.STOP] > 1:
            return fields.STOP_REQUESTED
        if self.leases.lost:
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
        self._signal(DUMP_SIGNAL)
        until, size = time.monotonic() + DUMP_SECONDS, -1
        while time.monotonic() < until and (size <= 0 or size != self._dump_size()):
            size = self._dump_size()
            time.sleep(0.02)

    def _dump_size(self) -> int:
        return os.fstat(self._dump).st_size

    def _end_processes(self) -> None:
        """Kill what the worker has started and left running."""
        with suppress(OSError):
            os.killpg(self._pid, signal.SIGKILL)
        # guard: no process of a task is left
        if os.getpid() != 1:  # which adopts those of other programs, too
            for pid in set(processes.children(os.getpid())) - self._others - {self._pid}:
                processes.kill(*processes.descendants(pid), pid)
        self._has_ended()

    def _settle(self) -> int:
        """Settle what a worker held when it died; return how it ended."""
        outcome, run = self._fields[fields.OUTCOME], self.record.run()
        if outcome == fields.REFUSED or (not self._fields[fields.READY] and self._fields[fields.STOP]):
            return outcome
        if not self._fields[fields.READY]:
            print_error("consumer", f"the worker {processes.end_text(self._status or 0)} while it imported the tasks")
            return fields.REFUSED
        if outcome in (0, fields.BROKEN):
            if run is None and outcome == 0:
                log("worker died", consumer=self.name, reason=processes.end_text(self._status or 0))
            until = time.monotonic() + self.options.lease_seconds
            with suppress(QueueError):
                retry_while_busy(lambda: self._settle_held(run), lambda s: _pause(s, until), consumer=self.name)
        return outcome

    def _settle_held(self, run: Run | None) -> None:
        results = self.record.results()
        running = (run.job_id, run.claim) if run and (run.job_id, run.claim) not in results else None
        job = self.leases.return_held(results, running)
        if run is None or running is None:
            return
        try:
            self._settle_running(run, job)
        except LeaseLost:
            job = None
        if job is None:
            log("lost", consumer=self.name, job=run.job_id, reason=f"the lease of {self.name} was lost")

    def _settle_running(self, run: Run, job: Job | None) -> None:
        """Settle the job that ran when the worker died."""
        if job is None:
            return
        reason = self._reason if self._run == run.number else 0
        if reason == fields.STOP_REQUESTED and job.max_attempts != 1:
            self.leases.release(job)
            return
        error, _, trace = (self.record.error(run) or self._error(run, reason)).partition("\n")
        text = "\n".join([error, trace or "\n".join(self._traceback())]).rstrip()
        delay = run.retry_in_seconds or pqueue.backoff_seconds(job.attempts)
        # guard: a job that kills its worker loses an attempt
        state = self.queue.fail(job, text, retry=reason != fields.STOP_REQUESTED, retry_in_seconds=delay)
        self.leases.failed += 1
        log("failed", consumer=self.name, job=job.id, task=job.task, attempt=job.attempts, now=state, error=error)

    def _error(self, run: Run, reason: int) -> str:
        """Return why the job ended with its worker, in one line."""
        if reason == fields.EXECUTED:
            return "WorkerDied: the task replaced its process by another program"
        if reason == fields.STOP_REQUESTED:
            return "Stopped: stopped while it ran; not run again because max_attempts is 1"
        if reason in (fields.TIMED_OUT, fields.OUT_OF_MEMORY) and self._killed:
            error = limit_error(reason, run)
            return f"{type(error).__name__}: {error}, and was killed, as it did not end when it was interrupted"
        return f"WorkerDied: the task's process {processes.end_text(self._status or 0)}"

    def _traceback(self) -> Iterator[str]:
        """Yield the lines of the traceback that the worker wrote, without our own frames."""
        with suppress(OSError):
            text = os.pread(self._dump, 65536, 0).decode(errors="replace")
            program = getattr(sys.modules["__main__"], "__file__", None)
            ours = [f'"{path}' for path in (Path(__file__).parent, pqueue_tasks.__file__, program, sys.argv[0]) if path]
            yield from (line for line in text.splitlines() if not any(path in line for path in ours))

    # Signals

    def _stop(self, *_: Any) -> None:
        """Handle a termination signal: the first lets the current jobs finish, the second interrupts them."""
        self._fields[fields.STOP] += 1
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
    """Return a file for tracebacks, if possible out of the way of tasks that close low descriptors."""
    with tempfile.TemporaryFile() as file:
        with suppress(OSError):  # the limit may be lower
            return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 100)
        return os.dup(file.fileno())


def _ignore(*_: object) -> None:
    """Handle SIGCHLD: that it came wakes up the keeper."""


def _pause(seconds: float, until: float) -> bool:
    time.sleep(seconds)
    return time.monotonic() > until


def _memory_mb(pid: int) -> float:
    """Return the resident memory of a process and of those that it has started."""
    return sum(map(processes.resident_mb, (pid, *processes.descendants(pid))))
