"""Running jobs: the loop that claims, runs and completes them, and the process that runs it."""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import os
import signal
import sqlite3
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from contextvars import copy_context
from datetime import timedelta
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import pqueue
from pqueue import DatabaseReplaced, Job, LeaseLost, PersistentQInterface, QueueBusy, QueueError
from pqueue_backend import Registration
from pqueue_groups import claim_filter
from pqueue_tasks import run_async
from pqueue_tools import file_task, leases, processes, termination
from pqueue_tools import record as fields
from pqueue_tools.masking import masked_text
from pqueue_tools.outcome import Outcome, delay_after, encoded_result, error_text, outcome_of, summary, trace_of
from pqueue_tools.process import T, TaskLog, log, log_completed, on_termination, report, retry_soon, retry_while_busy
from pqueue_tools.record import MAX_CONCURRENCY, Record, Slot
from pqueue_values import Encoded, NoConnection, above_0, duration, short, valid_int, valid_name

if TYPE_CHECKING:
    from pqueue_tools.leftovers import ProcessState
    from pqueue_tools.task_output import TaskOutput

MAX_LEFT = 20  # leftovers that the log names
BATCH_SECONDS = 0.03  # target run time of a batch of jobs; a slower job is taken alone


class Interrupt(BaseException):
    """Raised in a running task by a signal handler. Its argument is the reason: TimeoutError, LeaseLost or Stopped."""


class Stopped(Exception):
    """The consumer received a second signal to stop."""


class Failure(NamedTuple):
    """How a run ended without a result: the text of its error, how to settle its job, and why it was interrupted."""

    text: str
    outcome: Outcome
    reason: Exception | None = None


def failure_of(error: BaseException, job: Job) -> Failure:
    """Describe an error, and free what its frames hold. Both run code of the task, so it may be interrupted here."""
    if type(error) is Interrupt:
        reason = error.args[0].with_traceback(error.__traceback__)
        found = Failure(error_text(reason), outcome_of(reason, job, is_limit=True), reason.with_traceback(None))
    else:
        found = Failure(error_text(error), outcome_of(error, job))
    traceback.clear_frames(trace_of(error))  # which may use all memory
    return found


def is_ctrl_c(error: BaseException) -> bool:
    """Return whether this may be Ctrl-C, for which Python raises KeyboardInterrupt in the main thread."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    is_raised = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return in_main_thread and is_raised and type(error) is KeyboardInterrupt


class Consumer:
    """Claims jobs, runs their tasks one by one in the thread that calls `run`, and completes them.

    In an application, call `run` in any thread, and `stop` to end it. It uses no signals, so it cannot interrupt a
    task: timeout_seconds and memory_mb have no effect, and a cancelled job runs to its end. A second thread extends the
    leases. Ctrl-C in the main thread returns the job that runs there, and raises KeyboardInterrupt. `consumer.py` runs
    it in a separate process, where none of this holds.

    drain: return when no job is pending and, with `wait`, none falls due within that many seconds.
    tasks: the names of the tasks to run; None: all that are registered now.
    concurrency: how many jobs may run at the same time: async tasks in an event loop, others in threads.
    record: shared with the keeper, which extends the leases; None: in an application.
    """

    state: ProcessState | None = None  # of the process, which tasks must not change
    task_log: TaskLog | None = None
    taken = 0
    _job: Job | None = None  # the last one run
    _can_wake = False  # waiting for jobs: a signal handler may raise
    _cancel: Callable[[Exception], object] | None = None  # cancels the async task that runs
    _interrupted: Exception | None = None  # why the last interrupt came
    _must_end = False  # this process must be replaced
    _had_ctrl_c = False
    _run_seconds = BATCH_SECONDS  # estimate for one job; the initial value allows one job at a time

    def __new__(cls, *_: Any, concurrency: int = 1, **__: Any) -> Consumer:
        if cls is Consumer and concurrency != 1:
            from pqueue_tools.concurrency import ConcurrentConsumer

            return super().__new__(ConcurrentConsumer)
        return super().__new__(cls)

    def __init__(
        self,
        queue: PersistentQInterface,
        name: str,
        *,
        queues: list[str] | None = None,
        tasks: list[str] | None = None,
        lease_seconds: float | timedelta = pqueue.LEASE_SECONDS,
        drain: bool = False,
        wait: float | timedelta | None = None,
        max_jobs: int | None = None,
        max_rss: int | None = None,
        quiet: bool = False,
        concurrency: int = 1,
        record: Record | None = None,
    ) -> None:
        if not hasattr(queue, "dequeue"):
            raise ValueError(f"expected a queue from open_queue, got {short(queue)}")
        valid_int("concurrency", 1, concurrency, MAX_CONCURRENCY)
        for option, value in (("max_jobs", max_jobs), ("max_rss", max_rss)):
            if value is not None:
                valid_int(option, 1, value)
        lease_seconds = above_0("lease_seconds", lease_seconds)
        self.queue, self.name, self.quiet = queue, name, quiet
        self.wanted: dict[str, Any] = {"queues": queues, "tasks": sorted(pqueue.TASKS) if tasks is None else tasks}
        claim_filter(valid_name("consumer", name), **self.wanted)
        self.options: dict[str, Any] = {**self.wanted, "lease_seconds": lease_seconds, "prefetch": True}
        self.lease_seconds, self.drain, self.max_jobs, self.max_rss = lease_seconds, drain, max_jobs, max_rss
        self._wait_seconds = float("inf") if wait == float("inf") else duration("wait", 0.0 if wait is None else wait)
        self.is_embedded = record is None
        self.record = record or Record(concurrency)
        self._leases = leases.Leases(queue, self.record, name, lease_seconds, quiet=quiet)
        self.wake_keeper: Callable[[], object] = ignore
        self._fields = self.record.fields
        self._slot = self.record.slots[0]
        self._adding = threading.Lock()  # of results and errors to the record, by several threads
        self._waiting: deque[Job] = deque()
        self._finished: list[tuple[Job, Any]] = []

    @property
    def completed(self) -> int:
        """The number of jobs completed."""
        return self._leases.counts()[0]

    @property
    def failed(self) -> int:
        """The number of attempts failed."""
        return self._leases.counts()[1]

    def run(self) -> int:
        """Run jobs until stopped, until the queue is drained, or until the process must be replaced; return which.

        First save the schedules of the tasks. Raises ValueError for one whose task needs arguments.
        """
        self._pid, self._collects = os.getpid(), gc.isenabled()
        self._wait_ends = time.monotonic() + self._wait_seconds  # when draining, for what falls due before
        tasks = [pqueue.TASKS[name] for name in self.wanted["tasks"] if name in pqueue.TASKS]
        self._retry_while_busy([], lambda: self.queue.declare_schedules(tasks))
        self._retry_while_busy([], lambda: self.queue.declare_handlers(tasks))
        with leases.in_thread(self._leases) if self.is_embedded else nullcontext():
            outcome = self._run()
        if self._had_ctrl_c:
            self._had_ctrl_c = False
            self._fields[fields.STOP] -= 2
            raise KeyboardInterrupt
        return outcome

    def _run(self) -> int:
        try:
            self._work()
            if self.drain and self.taken and not self._must_end and self._has_leftovers():  # which may have hidden jobs
                self._must_end = True
        except Exception as error:
            # guard: a task that makes the database unusable costs its process only
            self._expect_no_task_to_blame(error)
            raise
        finally:
            self._return_jobs()
        return fields.STOPPED if self._stops else fields.REPLACE if self._ends_early else fields.DRAINED

    def _work(self) -> None:
        while self._complete_and_take():
            while job := self._next():
                self._run_one(job)

    def stop(self) -> None:
        """Let `run` return when the current job has ended; if it waits for one, within a second."""
        self._fields[fields.STOP] += 1

    @property
    def _stops(self) -> int:
        """0, 1: to finish the current jobs, or 2: to return them."""
        return self._fields[fields.STOP]

    @property
    def _ends_early(self) -> bool:
        # A new process may already use more than this: it takes jobs nevertheless
        if self.max_rss is not None and self.taken and processes.resident_mb("self") > self.max_rss:
            self._must_end = True
        ends = self._must_end or bool(self._fields[fields.RENEW])
        return ends or (self.max_jobs is not None and self.taken >= self.max_jobs)

    # Taking

    def _complete_and_take(self) -> bool:
        """Complete the finished jobs and take the next batch in one commit. Return False to stop."""
        while True:
            limit = self._limit()
            jobs = self._complete_and_dequeue(limit)
            self.record.clear_results()
            if jobs:
                self._waiting.extend(jobs)
                self.taken += len(jobs)
                return True
            if limit == 0 or (self.drain and jobs == [] and not self._may_fall_due()):
                return False
            if jobs is not None:
                self._sleep()

    def _may_fall_due(self) -> bool:
        """Return whether a drain must wait for a scheduled job."""
        left = self._wait_ends - time.monotonic()
        due = self.queue.next_due(self.name, **self.wanted) if left > 0 else None
        return due is not None and due <= self.queue.now() + left

    def _limit(self) -> int:
        if self._stops or self._ends_early:
            return 0
        max_batch = self.queue.max_batch
        limit = int(BATCH_SECONDS / max(self._run_seconds, BATCH_SECONDS / max_batch))
        return min(max(1, limit), max_batch if self.max_jobs is None else self.max_jobs - self.taken)

    def _complete_and_dequeue(self, limit: int) -> list[Job] | None:
        """Complete the finished jobs and take others in one commit; return these. None: the database is locked."""
        finished, self._finished = self._finished, []

        def call() -> list[Job]:
            try:
                jobs, lost = self.queue.complete_and_dequeue(finished, self.name, limit, **self.options)
            except NoConnection:
                if finished or self.is_embedded:
                    raise
                self._must_end = True  # the keeper, which has one, then waits for both
                return []
            self._log_completed([job for job, _ in finished], lost)
            return jobs

        if not finished and not limit:
            return []
        return self._retry_while_busy(finished, call)

    def _retry_while_busy(self, held: list[tuple[Job, Any]], call: Callable[[], T]) -> T | None:
        """Repeat a call while the database is locked or full. Give up if stopped, or when the leases have expired."""
        self._expect_sound_connection()
        lease_end = time.monotonic() + self.lease_seconds
        until = lease_end if held or self._stops else None

        def pause(seconds: float) -> bool:
            self._fields[fields.RETRIES] += 1
            self._expect_to_hold_no_lock(lease_end)
            if (until and time.monotonic() > until) or (self._stops and not held) or self._stops > 1:
                for job, _ in held:
                    log("left to its lease", consumer=self.name, job=job.id)
                return True
            time.sleep(seconds)
            return False

        try:
            return retry_while_busy(call, pause, consumer=self.name)
        except LeaseLost:
            raise
        except Exception as error:
            # guard: what a task has changed in a connection costs its worker only
            if not self.state or not self.taken:
                raise
            if isinstance(error, DatabaseReplaced):  # another thread may have changed a descriptor since
                self._expect_sound_connection()
            self.state.renew_connection()
            result = retry_while_busy(call, pause, consumer=self.name)
            self._must_end = True
            self._report_left(["a changed connection"], error=error)
            return result

    def _expect_sound_connection(self) -> None:
        """Undo what tasks have changed in the connection or its descriptors; if that is impossible, end the process."""
        # guard: the database is not written through another file's descriptor
        if self.state and self.state.would_damage_database():
            self._report_left(self.state.repair_database())
            if self.state.is_broken:
                self._break_off(fields.BROKEN)

    def _expect_to_hold_no_lock(self, lease_end: float) -> None:
        """End a process in which a task has left a transaction of its own connection open, which may lock all out.

        While jobs run it may be theirs, until their leases have expired: no lease is extended in a locked database.
        """
        if self.is_embedded:
            return
        if any(slot.fields[fields.RUNNING] for slot in self.record.slots):
            locks_out = time.monotonic() >= lease_end and self.queue.is_locked_by(os.getpid())
        else:
            self._has_leftovers()
            locks_out = _other_transactions()
        if locks_out:
            self._must_end = True
            self._report_left(["an open transaction of another connection"])
            self._break_off(fields.BROKEN)

    def _sleep(self) -> None:
        with suppress(InterruptedError, QueueBusy):  # the next dequeue reports QueueBusy
            try:
                self._fields[fields.IDLE] = 1
                self._can_wake = True
                if not self._stops:
                    self.queue.wait(pqueue.WAIT_SECONDS, consumer=self.name, **self.wanted)
            finally:
                self._can_wake = False
                self._fields[fields.IDLE] = 0

    # Running

    def _next(self) -> Job | None:
        if self._fields[fields.WITHDRAW] and self.record.was_withdrawn():
            # The keeper has completed and released all others.
            self._finished = [each for each in self._finished if each[0] is self._job]
            self._waiting.clear()
        if not self._waiting or self._stops > 1 or self._must_end:
            return None
        self._job = self._waiting.popleft()
        return self._job

    def _run_one(self, job: Job) -> None:
        limits, claim = self._limits(job), leases.claim_number(str(job.lease_token))
        started = time.monotonic()
        failure: Failure | None = None
        encoded: Encoded | None = None
        try:
            try:
                try:
                    self.queue.begin(job)
                except LeaseLost:  # the computer has slept since the job was taken
                    self._release(job)
                    return
                started = self._slot.begin(job.id, claim, *limits)
                self._wake_keeper()
                if self.task_log:
                    self.task_log.job = job
                run = copy_context().run
                result = run(pqueue.run_task, self.queue, job, run_coroutine=self._run_coroutine)
                encoded = encoded_result(result)
                result = None  # here: to free it may run code of the task
                self._end_child()
                self._collect_garbage()
            except BaseException as caught:
                self._end_child()
                failure = self._failure_of(caught, job)
                self._collect_garbage()
            finally:
                self._slot.fields[fields.RUNNING] = 0
        except BaseException as caught:
            self._slot.fields[fields.RUNNING] = 0  # again: an interrupt may have come before it was set
            failure = self._failure_of(caught, job)
        self._end_run(job, claim, time.monotonic() - started, failure, encoded)

    def _failure_of(self, error: BaseException, job: Job) -> Failure:
        if self.is_embedded and is_ctrl_c(error):
            self._had_ctrl_c = True
            self._fields[fields.STOP] += 2
            error = Interrupt(Stopped()).with_traceback(error.__traceback__)
        return failure_of(error, job)

    def _end_run(self, job: Job, claim: int, took: float, failure: Failure | None, encoded: Encoded | None) -> None:
        """Settle a job that has failed, and note one to be completed. took: for how many seconds it ran."""
        # guard: nothing is written in a transaction that a task has left open
        if self.queue.in_transaction:
            self._break_off_in_transaction(job, claim, failure)
        # For the keeper to settle if this process dies
        is_stored = failure is None and self.record.add_result(job.id, claim, encoded)
        if failure:
            self.record.add_error(job.id, claim, failure.text)
        self._has_leftovers(job, took)
        if failure is None:
            self._run_seconds = max(took, 0.8 * self._run_seconds + 0.2 * took)
            self._finished.append((job, encoded))
            if not is_stored:
                self._complete_and_dequeue(0)
                self.record.clear_results()
        else:
            self._settle(job, failure)
        if self.task_log:
            self.task_log.job = None
        self._slot.end()

    def _wake_keeper(self) -> None:
        if self._fields[fields.ASLEEP]:
            self._fields[fields.ASLEEP] = 0
            self.wake_keeper()

    def _collect_garbage(self) -> None:
        """Collect garbage if the task has disabled that. This may run code of the task, to which its limits apply."""
        # guard: garbage of a task that disabled its collection is freed within the limits of the task
        if self._collects and not gc.isenabled():
            gc.collect()

    def _has_leftovers(self, job: Job | None = None, took: float = float("inf")) -> bool:
        """Undo and report what tasks have left behind; end the process if the database cannot be used in it any more.

        job: the only one that may have; it took so many seconds.
        """
        if not self.state or not (left := self.state.left_behind(job.task if job else "", took)):
            return False
        self._report_left(left, **({"job": job.id, "task": job.task} if job else {}))
        if self.state.is_broken:
            self._break_off()
        return True

    def _expect_no_task_to_blame(self, error: Exception) -> None:
        """End the process if a task has left behind what may have caused this error."""
        if not self.taken or not self.state:
            return
        is_closed = isinstance(error, OSError)
        left = ["an unusable descriptor"] if is_closed else self.state.left_behind("", float("inf"))
        if not left:  # the cause is the database: if its file was replaced, a new worker would open the other one
            return
        self._must_end = True
        self._report_left(left, error=error)
        with self._adding:
            results = self.record.results()
            for slot in self.record.slots:
                if (run := slot.run()) and run.key not in results:
                    why = f"WorkerDied: the task's process could not continue: {error}"
                    self.record.add_error(*run.key, why)
            self._break_off()

    def _run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run an async task in a separate event loop. An interrupt cancels it; a second one ends the loop."""
        import asyncio  # only for async tasks: it takes 30 ms

        from pqueue_tools.concurrency import open_transaction, watch_tasks

        async def main() -> Any:
            loop = asyncio.get_running_loop()
            watch_tasks(loop, ignore, lambda: open_transaction(self.queue))
            task = loop.create_task(coroutine)
            self._cancel = lambda reason: loop.call_soon_threadsafe(task.cancel, str(reason))
            try:
                return await task
            finally:
                self._cancel = None

        self._interrupted = None
        try:
            return run_async(main())
        except asyncio.CancelledError as error:
            if self._interrupted is None:
                raise
            raise Interrupt(self._interrupted).with_traceback(trace_of(error)) from None

    def _limits(self, job: Job) -> tuple[float, float, float, float]:
        """Return the timeout, the memory limit, the memory in use now if it is limited, and the delay before another
        attempt if this process dies; a limit of 0 is none."""
        task = pqueue.TASKS.get(job.task)
        if task is None:
            return 0.0, 0.0, 0.0, pqueue.backoff_seconds(job.attempts)
        used = processes.resident_mb("self") if task.memory_mb else 0.0
        return task.timeout_seconds or 0.0, task.memory_mb or 0.0, used, delay_after(task, job.attempts)

    def _settle(self, job: Job, failure: Failure) -> None:
        """Settle a job whose run has failed, unless its task has done so itself."""
        text, outcome, reason = failure
        if reason and self._stops > 1:
            if job.max_attempts != 1:
                self._release(job)
                return
            text = error_text(Stopped("stopped while it ran; not run again because max_attempts is 1"))
            outcome = Outcome("fail", retry=False, delay_seconds=0.0)
        elif isinstance(reason, LeaseLost):
            self._log_lost(job, reason, self._leases.settled_as(job.id, job.attempts))
            return
        try:
            state = self._retry_while_busy([(job, None)], lambda: outcome.settle(self.queue, job, text))
        except LeaseLost as lost:
            self._log_lost(job, lost, self._leases.settled_as(job.id, job.attempts))
            return
        if state is None:
            return  # already logged: the lease will expire
        self._fields[fields.FAILED] += outcome.verb == "fail"
        event = "failed" if outcome.verb == "fail" else "snoozed"
        first, _, trace = text.partition("\n")
        shown = {"error": first, **({"traceback": trace} if trace and outcome.verb == "fail" else {})}
        log(event, consumer=self.name, job=job.id, task=job.task, attempt=job.attempts, now=state, **shown)

    def _log_lost(self, job: Job, reason: object, settled: str | None) -> None:
        if settled is None:
            log("lost", consumer=self.name, job=job.id, reason=reason)
        else:
            log("settled by the task", consumer=self.name, job=job.id, task=job.task, now=settled)

    def _report_left(self, left: list[str], **by: Any) -> None:
        """Say what a task has left behind in the process."""
        self._must_end = self._must_end or bool(self.state and self.state.must_end)
        then = "the worker is replaced" if self._must_end else "restored"
        more = [f"{len(left) - MAX_LEFT} more"] if len(left) > MAX_LEFT else []
        log("left behind", consumer=self.name, **by, what=", ".join(left[:MAX_LEFT] + more), then=then)

    def _break_off_in_transaction(self, job: Job, claim: int, failure: Failure | None) -> NoReturn:
        """End the process, and with it a transaction that a job has left open; in an application, raise QueueError."""
        failure = failure or failure_of(QueueError("the task left a transaction() open, which was rolled back"), job)
        if self.is_embedded:
            raise QueueError(f"cannot continue after job {job.id}, which left a transaction() open: {failure.text}")
        self._must_end = True
        self.record.add_error(job.id, claim, failure.text)
        self._report_left(["an open transaction"], job=job.id, task=job.task)
        self._break_off()

    def _break_off(self, outcome: int = fields.BROKEN_BY_ONE) -> NoReturn:
        """End the process without using the database: a descriptor of it may be that of another file by now, or what
        is written never committed."""
        self._fields[fields.OUTCOME] = outcome
        os._exit(1)

    def _end_child(self) -> None:
        end_child(self._pid)

    # Completing

    def _log_completed(self, jobs: list[Job], lost: list[Job]) -> None:
        for job in lost:
            settled = self._leases.settled_as(job.id, job.attempts)
            if settled != "completed":
                jobs = [each for each in jobs if each != job]
                self._fields[fields.FAILED] += settled == "failed"
                self._log_lost(job, "its lease", settled)
        self._fields[fields.COMPLETED] += len(jobs)
        if not self.quiet:
            log_completed(self.name, jobs)

    def _return_jobs(self) -> None:
        """Before the end, complete the finished jobs and release those that were not started."""
        with suppress(QueueError):
            self._complete_and_dequeue(0)
        while self._waiting:
            self._release(self._waiting.popleft())

    def _release(self, job: Job) -> None:
        with suppress(QueueError):
            self._leases.release(job)

    # Signals

    def interrupt(self, *_: Any) -> None:
        """Handle the keeper's signal: wake up from waiting, or interrupt the task unless it is in a transaction of the
        queue; the keeper repeats the signal."""
        if self._can_wake:
            self._can_wake = False
            raise InterruptedError
        slot = self._slot.fields
        number = slot[fields.RUNNING]
        if number and slot[fields.INTERRUPT] == number and not self.queue.in_transaction:
            slot[fields.INTERRUPTED], slot[fields.INTERRUPT] = number, 0
            self._interrupted = self._reason(self._slot)
            if (cancel := self._cancel) is None:
                raise Interrupt(self._interrupted)
            self._cancel = None
            cancel(self._interrupted)

    def _reason(self, slot: Slot) -> Exception:
        """Return why the keeper interrupts a run."""
        run, reason = slot.run(), slot.fields[fields.REASON]
        if reason == fields.LOST:
            return LeaseLost(f"the lease of {self.name} was lost")
        if reason == fields.STOP_REQUESTED or run is None:
            return Stopped()
        return leases.limit_error(reason, run)


def _other_transactions() -> bool:
    """Return whether an SQLite connection in this process is in a transaction."""
    for each in gc.get_objects():
        with suppress(Exception):
            if issubclass(type(each), sqlite3.Connection) and each.in_transaction:
                return True
    return False


def end_child(parent: int) -> None:
    """Exit if this is a child that the task forked: it must neither complete the job nor run others."""
    if os.getpid() == parent:
        return
    error: Any = sys.exc_info()[1]
    code = 1
    try:
        found = error.code if issubclass(type(error), SystemExit) else error
        is_error = found is not None and not issubclass(type(found), int)
        code = 1 if is_error else int(found or 0) & 0xFF
        if is_error:
            print(masked_text(error_text(error).partition("\n")[2]), file=sys.stderr)
        sys.stdout.flush()
    finally:  # also if this raises, as it uses what is the task's
        os._exit(code)


# The process ##########################################################################################################


def run_process(
    queue: PersistentQInterface,
    shared: Registration,
    record: Record,
    options: Namespace,
    outputs: list[TaskOutput],
    pipe: int,
    dump: int,
) -> NoReturn:
    """Be the worker process, just forked from the keeper: run jobs, and exit.

    outputs: the pipes for what tasks print. pipe: what is written to it wakes the keeper. dump: the file for
    tracebacks.
    """
    code = 1
    try:
        from pqueue_tools.task_output import redirect  # not on Windows, where consumer.py imports this module, too

        redirect(outputs, record)
        atexit._clear()  # the keeper's
        if os.getppid() == 1:
            os.environ[processes.MARK] = "1"
        os.setpgid(0, 0)  # Ctrl-C reaches the keeper only, and neither tasks nor their subprocesses
        _set_signals(dump)
        _run(queue, shared, record, options, pipe, dump)
        code = 0
    except (QueueError, ValueError, OSError) as error:
        code = report("consumer", error)
        record.fields[fields.OUTCOME] = fields.REFUSED
    except BaseException:  # a signal handler of a task, for example
        record.fields[fields.OUTCOME] = fields.BROKEN
        traceback.print_exc()
    finally:
        _exit(code)


def _run(
    queue: PersistentQInterface, shared: Registration, record: Record, options: Namespace, pipe: int, dump: int
) -> None:
    file_task.files_directory = options.directory
    task_log = TaskLog(options.name, options.log_level)
    if outcome := _register(queue, shared, record, options, pipe):
        record.fields[fields.OUTCOME] = outcome
        return
    names = ("queues", "lease_seconds", "drain", "wait", "max_jobs", "max_rss", "quiet", "concurrency")
    consumer = Consumer(queue, options.name, record=record, **{name: getattr(options, name) for name in names})
    consumer.task_log = task_log
    signal.signal(leases.INTERRUPT_SIGNAL, consumer.interrupt)
    consumer.wake_keeper = lambda: wake(pipe)
    # A task that closes the queue, as at the end of `with current_queue()`, must not close the consumer's
    close, queue.close = queue.close, ignore  # type: ignore[method-assign]
    from pqueue_tools.leftovers import ProcessState  # not available on Windows, which has no forks either

    threads = ("pqueue-", "asyncio_") if options.concurrency > 1 else ("pqueue-",)
    consumer.state = ProcessState(lambda: _arm(dump), queue, ours=threads)
    _arm(dump)
    record.fields[fields.OUTCOME] = consumer.run()
    close()


def _register(queue: PersistentQInterface, shared: Registration, record: Record, options: Namespace, pipe: int) -> int:
    """Import the tasks, and register the consumer, which knows them; return the outcome if it must not run, else 0."""
    tasks = known_tasks(options.modules)
    record.fields[fields.READY] = 1
    wake(pipe)
    try:
        retry_soon(lambda: queue.reserve_connections(1))  # the keeper closes as many
    except QueueBusy:
        return fields.REPLACE
    retry_while_busy(
        lambda: queue.adopt(shared, queues=options.queues, tasks=tasks),
        lambda s: _pause(s, record),
        consumer=options.name,
    )
    if record.fields[fields.STOP]:
        return fields.STOPPED
    if not record.fields[fields.STARTED_ONCE]:
        record.fields[fields.STARTED_ONCE] = 1
        file_task.remove_copies()
        facts = {"database": queue.name, "queues": ",".join(options.queues or ["all"]), "tasks": ",".join(tasks)}
        log("started", consumer=options.name, pid=os.getppid(), **facts)
    return 0


def _pause(seconds: float, record: Record) -> bool:
    time.sleep(seconds)
    return record.fields[fields.STOP] > 0


def wake(pipe: int) -> None:
    with suppress(OSError):  # full, or closed by a task
        os.write(pipe, b"!")


def _exit(code: int) -> NoReturn:
    try:
        with suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                stream.flush()
        processes.libc().fflush(None)  # what C code has printed
    finally:  # also if a task has replaced what this uses: the frames below are the keeper's
        os._exit(code)


def _set_signals(dump: int) -> None:
    """Leave TERM, INT and HUP to the keeper, also if they reach this process; restore them in children of tasks."""
    signal.set_wakeup_fd(-1)
    on_termination(ignore)
    for number in signal.valid_signals() - set(termination.SIGNALS):
        if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN, None):  # the keeper's
            signal.signal(number, signal.SIG_DFL)
    signal.signal(leases.INTERRUPT_SIGNAL, ignore)
    # guard: a descriptor that a task has left behind ends no other job by SIGIO
    signal.signal(signal.SIGIO, ignore)
    _arm(dump)
    _reset_signals_in_children()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _arm(dump: int) -> None:
    """Let a fault, and the keeper's signal, write the traceback; undo what a task has set up instead."""
    faulthandler.cancel_dump_traceback_later()
    faulthandler.unregister(leases.INTERRUPT_SIGNAL)
    with suppress(OSError, ValueError):  # a task has closed the file
        faulthandler.enable(dump)
        faulthandler.register(leases.DUMP_SIGNAL, dump)


def ignore(*_: object) -> None:
    """Do nothing. As the handler of a signal, unlike SIG_IGN, it is not inherited by programs that a task starts."""


def _reset_signals_in_children() -> None:
    """Restore the default signal handlers in each child that a task forks, before any signal reaches it."""
    numbers = [*termination.SIGNALS, leases.INTERRUPT_SIGNAL]

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def reset() -> None:
        on_termination(signal.SIG_DFL)
        unblock()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers), after_in_parent=unblock, after_in_child=reset
    )


def known_tasks(modules: list[str]) -> list[str]:
    """Import the modules and return the names of their tasks; without modules, that of the built-in task.

    Raises ValueError if a module cannot be imported, none has a task, or an annotation of a task cannot be used.
    """
    if modules and file_task.__name__ not in modules:
        # guard: the built-in task is known only without --import
        del pqueue.TASKS[file_task.prepend_timestamp.name]
    import_modules(modules)
    if not pqueue.TASKS:
        raise ValueError(f"expected a module with tasks, got {', '.join(modules)}, without a function marked @task")
    try:
        return sorted(entry.parameters.name for entry in pqueue.TASKS.values())
    except TypeError as error:
        raise ValueError(str(error)) from None


def expect_modules(modules: list[str]) -> None:
    """Raise ValueError for a module that `import_modules` would not find; import none of them."""
    for module in modules:
        name = module.partition(".")[0]  # to look into a package, Python imports it
        if name not in sys.modules and not (PathFinder.find_spec(name, [os.getcwd()]) or find_spec(name)):
            missing = ModuleNotFoundError(f"No module named {name!r}", name=name)
            raise ValueError(f"cannot import {module!r}: {_import_error(missing)}")


def import_modules(modules: list[str]) -> None:
    sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except BaseException as error:
            if is_ctrl_c(error):
                raise
            raise ValueError(f"cannot import {module!r}: {_import_error(error)}") from error


def _import_error(error: BaseException) -> str:
    """Return what is wrong with a module, and in which of the user's lines."""
    kind = type(error)  # isinstance may run code of the error
    if kind in (SyntaxError, IndentationError, TabError):
        return str(error)  # with the line
    frames = [each for each in traceback.extract_tb(trace_of(error)) if _is_users(each.filename)]
    place = f" ({os.path.relpath(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    text = str(error) if kind in (ImportError, ModuleNotFoundError) else summary(error).removesuffix(": ")
    return f"{text}{place}{_where(error) if type(error) is ModuleNotFoundError else ''}"


def _where(missing: ModuleNotFoundError) -> str:
    """Return where Python looks for a module."""
    package = sys.modules.get(str(missing.name).rpartition(".")[0])
    if package is None:
        return f": expected it in {os.getcwd()}, on PYTHONPATH, or installed for {sys.executable}"
    places = [*getattr(package, "__path__", ()), getattr(package, "__file__", "built in")]
    return f": {package.__name__!r} is {places[0]}"


def _is_users(path: str) -> bool:
    """Return whether a file is below the current folder, and neither ours nor that of an installed package."""
    here = os.getcwd() + os.sep
    return path.startswith(here) and not path.startswith(here + "pqueue") and "site-packages" not in path
