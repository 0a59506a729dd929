"""Run jobs: take them from the queue, call their tasks, and record the results, until stopped.

    python consumer.py                       # all queues, the built-in task prepend_timestamp
    python consumer.py --import my_tasks --queue mail --queue default

On the first TERM, INT or HUP, the consumer finishes the jobs that it holds and exits; on the second, it returns them to
the queue and exits. If the Supervisor that started it has exited, it stops as on a first TERM.
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
    escape_unencodable,
    expect_posix,
    folder,
    is_orphaned,
    log,
    log_line,
    module_name,
    on_termination,
    open_soon,
    open_waiting,
    print_error,
    print_line,
    quoted,
    retry_while_busy,
    seconds,
    utc_now,
    whole_number,
)
from pqueue_values import program_name

BATCH_SECONDS = 0.03  # target run time of a batch of jobs; a slower job is taken alone
TICK_SECONDS = 0.05  # how often the watch thread checks the running job
HEARTBEAT_SECONDS = 10.0
GRACE_SECONDS = 5.0  # time for an interrupted task to end before the process is killed


# The consumer #########################################################################################################


class Interrupt(BaseException):
    """Raised in a running task by a signal handler. Its argument is the reason: TimeoutError, LeaseLost or Stopped."""


class Stopped(Exception):
    """The consumer received a second signal to stop."""


class Consumer:
    """Runs jobs in the main thread. A second thread, the watch, extends leases and interrupts tasks."""

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
        self.signals = 0  # number of termination signals received
        self._lock = threading.Lock()  # protects the following, which both threads use
        self._waiting: deque[Job] = deque()
        self._finished: list[tuple[Job, Any]] = []
        self._current: Job | None = None
        self._started = self._extended = 0.0  # monotonic seconds
        self._interrupt: Exception | None = None  # why the current task must be interrupted
        self._can_wake = False  # waiting for jobs: a signal handler may raise
        self._run_seconds = BATCH_SECONDS  # estimate for one job; the initial value allows one job at a time
        self._busy, self._stopped = threading.Event(), threading.Event()
        self._reported = [0, 0]  # completed and failed jobs, at the last heartbeat
        self._pid = os.getpid()

    def run(self) -> None:
        """Run jobs until stopped, or until the queue is drained or `max_jobs` jobs were taken."""
        watch = threading.Thread(target=self._watch, name="watch", daemon=True)
        watch.start()
        try:
            while self._complete_and_take():
                while job := self._next():
                    self._run_one(job)
        finally:
            self._return_jobs()
            self._stopped.set()
            self._busy.set()
            watch.join()
            self._heartbeat()

    def stop(self, *_: Any) -> None:
        """Handle a termination signal: the first lets the current jobs finish, the second interrupts them."""
        self.signals += 1
        if self.signals == 2:
            self._interrupt = Stopped()
        if self._can_wake:
            self._can_wake = False
            raise InterruptedError

    # Taking

    def _complete_and_take(self) -> bool:
        """Complete the finished jobs and take the next batch in one commit. Return False to stop."""
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
        max_batch = self.queue.max_batch
        limit = int(BATCH_SECONDS / max(self._run_seconds, BATCH_SECONDS / max_batch))
        return min(max(1, limit), max_batch if self.max_jobs is None else self.max_jobs - self.taken)

    def _complete_and_dequeue(self, finished: list[tuple[Job, Any]], limit: int) -> list[Job] | None:
        def call() -> list[Job]:
            jobs, lost = self.queue.complete_and_dequeue(finished, self.name, limit, **self.options)
            self._log_completed([job for job, _ in finished], lost)
            return jobs

        return self._retry_while_busy(finished, call) if finished or limit else []

    def _retry_while_busy(self, held: list[tuple[Job, Any]], call: Callable[[], T]) -> T | None:
        """Repeat a call while the database is locked or full. Give up if stopped, or when the leases have expired."""
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
        with suppress(InterruptedError, QueueBusy):  # the next dequeue reports QueueBusy
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
            self._end_current()  # again: the interrupt may have come during the first call
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
        """Exit if this is a child that the task forked: it must neither complete the job nor run others."""
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
            self._fail(job, Stopped("stopped while it ran; not run again because max_attempts is 1"), retry=False)
        elif self.signals > 1:
            self._release(job)
        elif isinstance(reason, LeaseLost):
            log("lost", consumer=self.name, job=job.id, reason=reason)
        else:
            self._fail(job, reason, retry=True)

    def _fail(self, job: Job, error: BaseException, *, retry: bool) -> None:
        traceback.clear_frames(error.__traceback__)  # free the task's objects, which may use all memory
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
                return  # already logged: the lease will expire
            self.failed += 1
            log("failed", consumer=self.name, job=job.id, task=job.task, attempt=job.attempts, now=state, error=summary)

    # Completing

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
        """Return whether the lease is gone because the task itself completed the job, in its own transaction."""
        with suppress(QueueError):
            now = self.queue.get(job.id)
            return (now.state, now.consumer, now.attempts) == ("completed", self.name, job.attempts)
        return False

    def _return_jobs(self) -> None:
        """Before exiting, complete the finished jobs and release those that were not started."""
        finished = self._take_finished()
        with suppress(QueueError):
            self._complete_and_dequeue(finished, 0)
        while self._waiting:
            self._release(self._waiting.popleft())

    def _release(self, job: Job) -> None:
        with suppress(QueueError):
            self.queue.release(job)
            log("released", consumer=self.name, job=job.id)

    # The watch thread

    def _watch(self) -> None:
        heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
        while not self._stopped.is_set():
            self._busy.wait(max(0.0, heartbeat_at - time.monotonic()))
            try:
                if time.monotonic() >= heartbeat_at:
                    heartbeat_at += HEARTBEAT_SECONDS
                    self._heartbeat()
                if self._busy.is_set():
                    self._check_running()
            except (QueueError, MemoryError) as error:
                log("left to its lease", consumer=self.name, reason=str(error) or "out of memory")
            if self._busy.is_set():
                self._stopped.wait(TICK_SECONDS)

    def _check_running(self) -> None:
        """Release the jobs behind a slow one, extend its lease, and enforce its timeout."""
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
            self._extended -= self.lease_seconds / 6  # retry soon
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
        """Handle ALRM: interrupt the task, except in a transaction of the queue; the watch repeats the signal."""
        if self._current is not None and self._interrupt and not self.queue.in_transaction:
            raise Interrupt(self._interrupt)

    def _heartbeat(self) -> None:
        counts = [self.completed, self.failed]
        with suppress(QueueError):
            self.queue.heartbeat(
                self.name, completed=counts[0] - self._reported[0], failed=counts[1] - self._reported[1]
            )
            self._reported = counts


# The program ##########################################################################################################


class ProgressBar:
    """Shows on the terminal how much of the queue is drained."""

    def __init__(self, consumer: Consumer, total: int) -> None:
        self._consumer, self._total, self._began = consumer, total, time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="progress", daemon=True)

    def __enter__(self) -> ProgressBar:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _draw(self) -> None:
        while not self._stopped.wait(0.2):
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
    escape_unencodable()
    options = _parser().parse_args(arguments)
    try:
        expect_posix()
        _import(options.modules)
        queue = open_soon() if options.drain else open_waiting(consumer=options.name)
    except (QueueError, ValueError) as error:
        print_error("consumer", error)
        return 1
    if queue is None:  # stopped before the server answered
        return 0
    file_task.files_directory = options.directory
    with _closing(queue):
        code = _consume(queue, options)
        on_termination(signal.SIG_DFL)  # a thread of a task may keep the process alive
    return code


def _reset_signals_in_children() -> None:
    """Restore the default signal handlers in each child that a task forks, before any signal reaches it."""

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, termination.SIGNALS)

    def reset() -> None:
        on_termination(signal.SIG_DFL)
        unblock()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, termination.SIGNALS),
        after_in_parent=unblock,
        after_in_child=reset,
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
            with ProgressBar(consumer, _pending(queue, options.queues)):
                consumer.run()
        else:
            consumer.run()
    except (QueueError, ValueError) as error:
        print_error("consumer", error)
        return 1
    log("stopped", consumer=options.name, completed=consumer.completed, failed=consumer.failed)
    return 0


def _pending(queue: PersistentQInterface, queues: list[str] | None) -> int:
    counts = queue.stats()["queues"]
    return sum(counts[name]["pending"] for name in counts if queues is None or name in queues)


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
            raise ValueError(f"expected a module name such as my_tasks, got {module!r}")
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError) as error:
            raise ValueError(f"cannot import {module!r}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("consumer"), description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    default = os.environ.get("SUPERVISOR_PROCESS_NAME") or f"{socket.gethostname()}-{os.getpid()}"
    add("--name", default=default, help="name of this consumer (default: its Supervisor name, or HOST-PID)")
    add("--queue", dest="queues", action="append", metavar="QUEUE", help="serve this queue; repeatable (default: all)")
    add(
        "--import",
        dest="modules",
        action="append",
        type=module_name,
        default=[],
        metavar="MODULE",
        help="a module with tasks; repeatable",
    )
    add(
        "--directory", type=folder, default=file_task.files_directory, help="folder of job files (default: %(default)s)"
    )
    add("--drain", action="store_true", help="stop when no job is pending")
    add("--max-jobs", type=whole_number(1), metavar="N", help="stop after N jobs")
    add(
        "--lease-seconds", type=seconds(0.001), default=pqueue.LEASE_SECONDS, metavar="S", help="(default: %(default)g)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
