"""The worker program: take jobs, run their tasks, settle them, until told to stop.

    python consumer.py                       # all queues, the built-in task prepend_timestamp
    python consumer.py --import my_tasks --queue mail --queue default

The first TERM, INT or HUP finishes the jobs in hand and exits; the second gives them back and exits. Without the
Supervisor that started it, it ends as after a first TERM.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pqueue
import pqueue_values
from pqueue import DoNotRetry, Job, LeaseLost, PersistentQInterface, QueueBusy, QueueError
from pqueue_tools import file_task
from pqueue_tools.masking import masked_text
from pqueue_tools.process import (
    OneLineParser,
    T,
    escape_unprintable,
    expect_posix,
    folder,
    is_orphaned,
    log,
    log_line,
    on_termination,
    print_error,
    print_line,
    quoted,
    retry_while_busy,
    seconds,
    utc_now,
    whole_number,
)
from pqueue_tools.report import program_name

HOLD_SECONDS = 0.03  # the work a consumer takes at a time: one slow job, or as many quick ones as fit
TICK_SECONDS = 0.05  # how often the watch looks at a running job
HEARTBEAT_SECONDS = 10.0
GRACE_SECONDS = 5.0  # what an interrupted task gets before the process ends in its stead


# The consumer #########################################################################################################


class Interrupt(BaseException):
    """Raised in a running task from outside. Its argument is the reason: TimeoutError, LeaseLost, or Stopped."""


class Stopped(Exception):
    """The consumer was told to stop at once."""


class Consumer:
    """Runs jobs in the main thread; a second thread, the watch, keeps leases and interrupts what must not go on."""

    def __init__(
        self,
        queue: PersistentQInterface,
        name: str,
        *,
        queues: list[str] | None = None,
        lease_seconds: float = pqueue.LEASE_SECONDS,
        drain: bool = False,
        max_jobs: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.queue, self.name = queue, name
        self.options: dict[str, Any] = {"queues": queues, "lease_seconds": lease_seconds, "prefetch": True}
        self.lease_seconds, self.drain, self.max_jobs, self.quiet = lease_seconds, drain, max_jobs, quiet
        self.taken = self.completed = self.failed = 0
        self.signals = 0  # to end, that were received
        self._lock = threading.Lock()  # over what the two threads share, which follows
        self._waiting: deque[Job] = deque()
        self._finished: list[tuple[Job, Any]] = []
        self._current: Job | None = None
        self._started = self._extended = 0.0  # monotonic seconds
        self._interrupt: Exception | None = None  # why the current task must not go on
        self._can_wake = False  # asleep for want of jobs: a signal may raise
        self._run_seconds = HOLD_SECONDS  # of one job, as measured; begins with one job at a time
        self._busy, self._over = threading.Event(), threading.Event()
        self._sent = [0, 0]
        self._pid = os.getpid()

    def run(self) -> None:
        """Take, run and settle until told to stop, or drained, or `max_jobs` were taken."""
        watch = threading.Thread(target=self._watch, name="watch", daemon=True)
        watch.start()
        try:
            while self._complete_and_take():
                while job := self._next():
                    self._run_one(job)
        finally:
            self._give_back()
            self._over.set()
            self._busy.set()
            watch.join()
            self._heartbeat()

    def stop(self, *_: Any) -> None:
        """Handle a signal to end: the first finishes what is in hand, the second does not."""
        self.signals += 1
        if self.signals == 2:
            self._interrupt = Stopped()
        if self._can_wake:
            self._can_wake = False
            raise InterruptedError

    # Taking

    def _complete_and_take(self) -> bool:
        """Complete what is finished and take the next batch in one commit; return False to end the consumer."""
        while True:
            finished, limit = self._take_finished(), self._limit()
            jobs = self._complete_and_dequeue(finished, limit)
            if jobs:
                with self._lock:
                    self._waiting.extend(jobs)
                self.taken += len(jobs)
                self._busy.set()
                return True
            self._busy.clear()
            if limit == 0 or (self.drain and jobs == []):
                return False
            if jobs is not None:
                self._sleep()

    def _limit(self) -> int:
        if self.signals or is_orphaned():
            return 0
        most = self.queue.max_batch
        fit = int(HOLD_SECONDS / max(self._run_seconds, HOLD_SECONDS / most))
        return min(max(1, fit), most if self.max_jobs is None else self.max_jobs - self.taken)

    def _complete_and_dequeue(self, finished: list[tuple[Job, Any]], limit: int) -> list[Job] | None:
        def call() -> list[Job]:
            jobs, lost = self.queue.complete_and_dequeue(finished, self.name, limit, **self.options)
            self._log_completed([job for job, _ in finished], lost)
            return jobs

        return self._retry_while_busy(finished, call) if finished or limit else []

    def _retry_while_busy(self, held: list[tuple[Job, Any]], call: Callable[[], T]) -> T | None:
        """Repeat a call while the database is locked or full; give up when told to stop, or the lease is over."""
        until = time.monotonic() + self.lease_seconds if held or self.signals else None

        def pause(seconds: float) -> bool:
            if (until and time.monotonic() > until) or (self.signals and not held) or self.signals > 1:
                for job, _ in held:
                    log("left to its lease", consumer=self.name, job=job.id)
                return True
            time.sleep(seconds)
            return False

        return retry_while_busy(call, pause, consumer=self.name)

    def _sleep(self) -> None:
        with suppress(InterruptedError, QueueBusy):  # which the next dequeue will tell
            try:
                self._can_wake = True
                if not self.signals:
                    self.queue.wait(pqueue.WAIT_SECONDS, consumer=self.name, queues=self.options["queues"])
            finally:
                self._can_wake = False

    # Running

    def _next(self) -> Job | None:
        with self._lock:
            if not self._waiting or self.signals > 1:
                return None
            self._started = self._extended = time.monotonic()
            self._current = self._waiting.popleft()
            return self._current

    def _run_one(self, job: Job) -> None:
        try:
            try:
                self.queue.begin(job)
                result = pqueue.run_task(self.queue, job)
                if result is not None:
                    pqueue_values.encode_json("result", result)
            finally:
                self._end_child()
                took = self._end_current()
        except Interrupt as error:
            self._end_current()  # once more: it may have come in the midst of the first
            self._end_interrupted(job, error.args[0])
        except LeaseLost as error:
            log("lost", consumer=self.name, job=job.id, reason=error)
        except DoNotRetry as error:
            self._fail(job, error, retry=False)
        except BaseException as error:
            self._fail(job, error, retry=True)
        else:
            self._run_seconds = max(took, 0.8 * self._run_seconds + 0.2 * took)
            with self._lock:
                self._finished.append((job, result))

    def _end_child(self) -> None:
        """End a child that the task forked, as it would end elsewhere: it settles nothing, and becomes no consumer."""
        if os.getpid() == self._pid:
            return
        error = sys.exc_info()[1]
        code = error.code if isinstance(error, SystemExit) else error
        if code is not None and not isinstance(code, int):
            print(masked_text(traceback.format_exc()), end="", file=sys.stderr)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    def _end_current(self) -> float:
        with self._lock:
            self._current = None
            if self.signals < 2:
                self._interrupt = None
            return time.monotonic() - self._started

    def _end_interrupted(self, job: Job, reason: Exception) -> None:
        if self.signals > 1 and job.max_attempts == 1:
            self._fail(job, Stopped("stopped while it ran; it is not run again, as its max_attempts is 1"), retry=False)
        elif self.signals > 1:
            self._release(job)
        elif isinstance(reason, LeaseLost):
            log("lost", consumer=self.name, job=job.id, reason=reason)
        else:
            self._fail(job, reason, retry=True)

    def _fail(self, job: Job, error: BaseException, *, retry: bool) -> None:
        traceback.clear_frames(error.__traceback__)  # let go of what the task held: perhaps all memory
        entry = pqueue.TASKS.get(job.task)
        delay = pqueue.backoff_seconds(job.attempts, entry.backoff_base_seconds) if entry else None
        summary = f"{type(error).__name__}: {error}"
        text = "\n".join([summary, *traceback.format_tb(error.__traceback__)])
        try:
            state = self._retry_while_busy(
                [(job, None)], lambda: self.queue.fail(job, text, retry=retry, retry_in_seconds=delay)
            )
        except LeaseLost as lost:
            log("lost", consumer=self.name, job=job.id, reason=lost)
        else:
            if state is None:
                return  # left to its lease, as was told
            self.failed += 1
            log("failed", consumer=self.name, job=job.id, task=job.task, attempt=job.attempts, now=state, error=summary)

    # Settling

    def _take_finished(self) -> list[tuple[Job, Any]]:
        with self._lock:
            finished, self._finished = self._finished, []
            return finished

    def _log_completed(self, jobs: list[Job], lost: list[Job]) -> None:
        gone = {job.id for job in lost if not self._was_completed_by_task(job)}
        self.completed += len(jobs) - len(gone)
        at, by = utc_now(), quoted(self.name)
        lines = [
            f"{at} completed consumer={by} job={job.id} task={quoted(job.task)} attempt={job.attempts}"
            for job in jobs
            if job.id not in gone and not self.quiet
        ]
        lines += [
            log_line(at, "lost", {"consumer": self.name, "job": number, "reason": "its lease"}) for number in gone
        ]
        if lines:
            print_line("\n".join(lines))

    def _was_completed_by_task(self, job: Job) -> bool:
        """Tell a lease that was lost from one that the task gave up by completing the job in its own transaction."""
        with suppress(QueueError):
            now = self.queue.get(job.id)
            return (now.state, now.consumer, now.attempts) == ("completed", self.name, job.attempts)
        return False

    def _give_back(self) -> None:
        """On the way out: complete what is finished, release what has not begun."""
        finished = self._take_finished()
        with suppress(QueueError):
            self._complete_and_dequeue(finished, 0)
        while self._waiting:
            self._release(self._waiting.popleft())

    def _release(self, job: Job) -> None:
        with suppress(QueueError):
            self.queue.release(job)
            log("released", consumer=self.name, job=job.id)

    # The watch: a thread of its own, so that a busy task cannot starve it

    def _watch(self) -> None:
        heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
        while not self._over.is_set():
            self._busy.wait(max(0.0, heartbeat_at - time.monotonic()))
            try:
                if time.monotonic() >= heartbeat_at:
                    heartbeat_at += HEARTBEAT_SECONDS
                    self._heartbeat()
                if self._busy.is_set():
                    self._check_running()
            except (QueueError, MemoryError) as error:
                log("left to its lease", consumer=self.name, reason=str(error) or "no memory")
            if self._busy.is_set():
                self._over.wait(TICK_SECONDS)

    def _check_running(self) -> None:
        """See to the running job: nothing waits behind a slow one, its lease goes on, its time is bounded."""
        with self._lock:
            job, ran = self._current, time.monotonic() - self._started
            if job is None or ran < TICK_SECONDS:
                return
            finished, self._finished = self._finished, []
            waiting, self._waiting = self._waiting, deque()
            due = time.monotonic() - self._extended > self.lease_seconds / 3
        for other in waiting:
            self._release(other)
        if finished:
            self._complete_and_dequeue(finished, 0)
        if due:
            self._extend(job)
        self._enforce_timeout(job, ran)

    def _extend(self, job: Job) -> None:
        self._extended = time.monotonic()
        try:
            self.queue.extend(job, self.lease_seconds)
        except LeaseLost as error:
            self._set_interrupt(job, error)
        except QueueError as error:
            self._extended -= self.lease_seconds / 6  # again soon
            log("waiting", consumer=self.name, job=job.id, reason=error)

    def _enforce_timeout(self, job: Job, ran: float) -> None:
        entry = pqueue.TASKS.get(job.task)
        timeout = entry.timeout_seconds if entry else None
        if timeout is not None and ran > timeout:
            self._set_interrupt(job, TimeoutError(f"timed out after {timeout:g} s"))
        if self._interrupt and self._current is job:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        if timeout is not None and ran > timeout + GRACE_SECONDS and self._current is job:
            self._fail(job, TimeoutError(f"timed out after {timeout:g} s and could not be interrupted"), retry=True)
            os._exit(1)

    def _set_interrupt(self, job: Job, reason: Exception) -> None:
        with self._lock:
            if self._current is job and self._interrupt is None:
                self._interrupt = reason

    def interrupt(self, *_: Any) -> None:
        """Handle ALRM, which the watch repeats until the task has ended: never inside a transaction of the queue."""
        if self._current is not None and self._interrupt and not self.queue.in_transaction:
            raise Interrupt(self._interrupt)

    def _heartbeat(self) -> None:
        counts = [self.completed, self.failed]
        with suppress(QueueError):
            self.queue.heartbeat(self.name, completed=counts[0] - self._sent[0], failed=counts[1] - self._sent[1])
            self._sent = counts


# The program ##########################################################################################################


class Progress:
    """A bar on the terminal while a queue is drained."""

    def __init__(self, consumer: Consumer, total: int) -> None:
        self._consumer, self._total, self._began = consumer, total, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _draw(self) -> None:
        while not self._over.wait(0.2):
            self._print()
        self._print()
        print(file=sys.stderr)

    def _print(self) -> None:
        done, failed = self._consumer.completed, self._consumer.failed
        share = min(1.0, (done + failed) / self._total) if self._total else 1.0
        rate = (done + failed) / max(time.monotonic() - self._began, 1e-9)
        bar = "█" * round(share * 30)
        text = f"\r{bar:░<30} {share:4.0%}  {done} completed, {failed} failed  {rate:,.0f}/s "
        print(text, end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    escape_unprintable()
    options = _parser().parse_args(arguments)
    try:
        expect_posix()
        _import(options.modules)
        queue = pqueue.open_queue()
    except (QueueError, ValueError) as error:
        print_error("consumer", error)
        return 1
    file_task.files_directory = options.directory
    with _closing(queue):
        code = _consume(queue, options)
        on_termination(signal.SIG_DFL)  # a thread that a task left may keep the process, and a signal should end it
    return code


def _reset_signals_in_children() -> None:
    """Let signals end a child that a task forks, from its first moment, as they end other programs."""

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, termination.SIGNALS)

    def begin_child() -> None:
        on_termination(signal.SIG_DFL)
        unblock()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, termination.SIGNALS),
        after_in_parent=unblock,
        after_in_child=begin_child,
    )


def _consume(queue: PersistentQInterface, options: argparse.Namespace) -> int:
    bar = options.drain and sys.stderr.isatty()
    consumer = Consumer(
        queue,
        options.name,
        queues=options.queues,
        lease_seconds=options.lease_seconds,
        drain=options.drain,
        max_jobs=options.max_jobs,
        quiet=bar and sys.stdout.isatty(),
    )
    on_termination(consumer.stop)
    signal.signal(signal.SIGALRM, consumer.interrupt)
    _reset_signals_in_children()
    file_task.remove_copies()
    log("started", consumer=options.name, pid=os.getpid(), queues=",".join(options.queues or ["all"]))
    try:
        if bar:
            with Progress(consumer, _pending(queue, options.queues)):
                consumer.run()
        else:
            consumer.run()
    except (QueueError, ValueError) as error:
        print_error("consumer", error)
        return 1
    log("stopped", consumer=options.name, completed=consumer.completed, failed=consumer.failed)
    return 0


def _pending(queue: PersistentQInterface, served: list[str] | None) -> int:
    counts = queue.stats()["queues"]
    return sum(counts[name]["pending"] for name in counts if served is None or name in served)


@contextmanager
def _closing(queue: PersistentQInterface) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(QueueError):
            queue.close()


def _import(modules: list[str]) -> None:
    sys.path.insert(0, os.getcwd())
    for module in modules:
        if not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"expected a module such as my_tasks, got {module!r}")
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError) as error:
            raise ValueError(f"cannot import {module!r}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("consumer"), description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    default = os.environ.get("SUPERVISOR_PROCESS_NAME") or f"{socket.gethostname()}-{os.getpid()}"
    add("--name", default=default, help="readable name of this consumer (default: Supervisor's, or HOST-PID)")
    add("--queue", dest="queues", action="append", metavar="QUEUE", help="serve this queue; repeatable (default: all)")
    add("--import", dest="modules", action="append", default=[], metavar="MODULE", help="a module with tasks of yours")
    add(
        "--directory", type=folder, default=file_task.files_directory, help="where job files are (default: %(default)s)"
    )
    add("--drain", action="store_true", help="stop when nothing is pending")
    add("--max-jobs", type=whole_number(1), metavar="N", help="stop after N jobs")
    add(
        "--lease-seconds", type=seconds(0.001), default=pqueue.LEASE_SECONDS, metavar="S", help="(default: %(default)g)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
