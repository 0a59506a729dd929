"""Running several jobs at the same time: async tasks in an event loop, ordinary functions in threads.

The thread that calls `run` claims and settles jobs and runs none, so it works while a task blocks the event loop. Other
threads: one for the event loop, one that waits for new jobs, one that shows the keeper that threads get the GIL, and
one for each ordinary function, which ends with it.
"""

from __future__ import annotations

import _thread
import contextvars
import ctypes
import inspect
import re
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic  # which a task may replace in `time`
from types import coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio  # otherwise imported with the first async task: it takes 30 ms

    from pqueue_tools.leftovers import Setting

import pqueue
from pqueue import Job, PersistentQInterface, QueueError, Snooze
from pqueue_tasks import call_task
from pqueue_tools import record as fields
from pqueue_tools.leases import claim_number
from pqueue_tools.outcome import encoded_result, name_of, trace_of
from pqueue_tools.process import log
from pqueue_tools.record import Slot
from pqueue_tools.worker import Consumer, Failure, Interrupt, failure_of, ignore

PULSE_SECONDS = 0.25  # how often a worker shows that its threads get the GIL
LOOK_SECONDS = 0.1  # how often an idle consumer looks for what tasks have left behind
BUSY_SECONDS = 60.0  # after which a consumer that is never idle takes no jobs for a while, to look for that as well
BUSY_SHARE = 0.1  # of the time since the last look: the longest such pause
START_SECONDS = 10.0  # how long a new thread may take to begin
RETRY_SECONDS = 1.0  # before an application tries again to start a job for which there was no thread
CLOSE_SECONDS = 1.0  # how long asyncio tasks that were left behind may take to end
GREENLETS = ("gevent", "eventlet")  # packages that can replace threads by others that only take turns
LOST_ITS_WORKER = re.compile("WorkerDied: |consumer ")  # the error of such a job


class Begun(threading.Event):
    """What `Thread.start` waits for, here for START_SECONDS at most: a thread that finds no memory never sets it."""

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(START_SECONDS if timeout is None else timeout)


class Thread(threading.Thread):
    """A daemon thread whose start raises RuntimeError if it does not begin."""

    def __init__(self, name: str, target: Callable[..., object], *arguments: Any) -> None:
        super().__init__(name=name, target=target, args=arguments, daemon=True)
        self._started = Begun()

    def start(self) -> None:
        super().start()
        # guard: a thread that has no memory to begin does not stop its consumer
        if not self._started.is_set():
            raise RuntimeError(f"the thread {self.name} has not begun after {START_SECONDS:g} s")


class ActiveRun:
    """A job that runs, or has run and is not settled."""

    def __init__(self, job: Job, slot: Slot, claim: int, *, is_alone: bool) -> None:
        self.job, self.slot, self.claim, self.is_alone = job, slot, claim, is_alone
        self.thread = 0  # that runs an ordinary function
        self.task: asyncio.Task[None] | None = None
        self.lock = threading.RLock()  # held while the thread is interrupted, or leaves the task
        self.reason: Exception | None = None  # why it was interrupted
        self.encoded: str | None = None
        self.failure: Failure | None = None
        self.has_completed = False
        self.is_over = False  # handed over to be settled

    def fail(self, error: BaseException) -> None:
        """Note how the run has failed."""
        if self.reason and name_of(error) in ("Interrupt", "CancelledError"):
            error = Interrupt(self.reason).with_traceback(trace_of(error))
        self.failure = failure_of(error, self.job)

    def leave(self) -> None:
        """Let nothing interrupt the run any more."""
        with self.lock:
            self.slot.fields[fields.RUNNING] = 0
            if self.thread and self.reason:
                _catch_interrupt(self.thread)


class ConcurrentConsumer(Consumer):
    """Runs as many jobs at the same time as its record has slots."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        package = _thread.start_new_thread.__module__.partition(".")[0]
        # guard: jobs run at the same time in threads of the operating system
        if package in GREENLETS:
            raise ValueError(f"expected concurrency 1, or threads that {package} has not replaced by greenlets")
        super().__init__(*arguments, **options)
        self.options["prefetch"] = False  # every job that is claimed begins at once
        self._free = list(self.record.slots)
        self._runs: dict[int, ActiveRun] = {}  # by slot
        self._done: list[ActiveRun] = []  # to be completed
        self._events = SimpleQueue[Any]()  # a run that has ended; True: there may be jobs; False: look around
        self._asked = SimpleQueue[bool]()  # True: wait for jobs; False: end
        self._loop_thread: threading.Thread | None = None
        self._set_running_loop: Callable[[Any], object] = ignore
        self._loop_settings: list[Setting] = []  # of its thread
        self._files_of_loop = set[int]()
        self._failure: BaseException | None = None  # of the event loop or another thread
        self._looked_at, self._has_run = monotonic(), False  # since then
        self._pause_at = self._looked_at + BUSY_SECONDS

    def stop(self) -> None:
        super().stop()
        self._events.put(False)

    # The thread that calls `run`

    def _work(self) -> None:
        self._is_waiting = False  # for jobs
        self._may_find = True  # a claim may find jobs
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_to_close = False  # the loop
        with self._helper_threads():
            while not self._has_ended():
                self._start_alone()
                limit = self._limit()
                if self._done or (limit and self._may_find):
                    self._complete_and_start(limit)
                else:
                    self._wait(limit)

    def _has_ended(self) -> bool:
        if self._failure is not None:
            if not self.is_embedded:
                self._must_end = True
                self._report_left([f"an unusable thread or event loop ({type(self._failure).__name__})"])
                self._break_off(fields.BROKEN)
            raise self._failure
        if not self._runs:
            self._look_for_leftovers()
        if self._runs or (self._waiting and not self._stops):
            return False
        return bool(self._stops) or self._ends_early or (self.drain and not self._may_find and not self._may_fall_due())

    def _limit(self) -> int:
        """Return how many jobs may be claimed: as many as can begin at once."""
        # guard: a consumer that is never idle finds what tasks leave behind
        if self._stops or self._ends_early or self._waiting or self._pauses():
            return 0
        if any(run.is_alone for run in self._runs.values()):
            return 0
        left = len(self._free) if self.max_jobs is None else self.max_jobs - self.taken
        return min(len(self._free), left, self.queue.max_batch)

    def _pauses(self) -> bool:
        """Return whether to wait until no job runs, to look for what they have left behind.

        If the jobs run for longer than the pause, others are taken again, and the next pause comes later and may be
        longer. So the pauses cost at most a tenth of the throughput, and one of them is long enough.
        """
        now, busy = monotonic(), self._pause_at - self._looked_at
        if not self.state or not self._runs or now < self._pause_at:
            return False
        if now > self._pause_at + BUSY_SHARE * busy:
            self._pause_at = now + busy
            return False
        return True

    def _complete_and_start(self, limit: int) -> None:
        done, self._done = self._done[: self.queue.max_batch], self._done[self.queue.max_batch :]
        self._finished = [(run.job, run.encoded) for run in done]
        jobs = self._complete_and_dequeue(limit)
        for run in done:
            self._free_slot(run)
        self._publish_results()
        if jobs is None:  # the database is locked
            return
        self._may_find = bool(jobs) or (self._may_find and not limit)
        self.taken += len(jobs)
        for job in jobs:
            if self._must_run_alone(job):
                self._waiting.append(job)
                self._fields[fields.WAITING] = len(self._waiting)
            else:
                self._start(job)

    def _must_run_alone(self, job: Job) -> bool:
        """Return whether no other job may run meanwhile: its memory is limited, or it may end the process."""
        task = pqueue.TASKS.get(job.task)
        is_last = job.attempts == job.max_attempts and LOST_ITS_WORKER.match(job.error or "")
        # guard: the last attempt of a job that may have ended its process is made alone
        return bool(task and task.memory_mb) or bool(is_last)

    def _start_alone(self) -> None:
        if self._waiting and not self._runs and not self._stops:
            job = self._waiting.popleft()
            if self.queue.holds(job):
                self._start(job, is_alone=True)
            else:
                log("lost", consumer=self.name, job=job.id, reason=f"the lease of {self.name} was lost")
            self._fields[fields.WAITING] = len(self._waiting)

    def _start(self, job: Job, *, is_alone: bool = False) -> None:
        run = ActiveRun(job, self._free.pop(), claim_number(str(job.lease_token)), is_alone=is_alone)
        self._runs[run.slot.number], self._has_run = run, True
        task = pqueue.TASKS.get(job.task)
        try:
            if task and task.is_async:
                self._open_loop().call_soon_threadsafe(self._start_async, run, context=contextvars.Context())
            else:
                Thread(f"pqueue-{job.id}", self._run_in_thread, run).start()
        except RuntimeError as error:  # the system has no more threads, or no more memory for one
            self._fail_to_start(run, error)
        self._wake_keeper()

    def _fail_to_start(self, run: ActiveRun, error: RuntimeError) -> None:
        """Return a job for which there is no thread, and replace the process; in an application, try again later."""
        with run.lock:
            if run.thread:  # it has begun after all
                return
            run.is_over = True
        if self.is_embedded:
            run.fail(Snooze(RETRY_SECONDS, str(error)))
            self._events.put(run)
            return
        self._must_end = True
        self._report_left([str(error)])
        self._release(run.job)
        self._free_slot(run)

    def _wait(self, limit: int) -> None:
        """Wait until a run has ended or, if one may be taken, there may be a job; settle the runs that have ended."""
        if limit and not self._is_waiting:
            self._is_waiting = True
            self._asked.put(True)
        self._fields[fields.IDLE] = int(not self._runs)
        seconds = BUSY_SHARE * (monotonic() - self._looked_at) if self._pauses() else None
        event: Any = False
        try:
            with suppress(Empty):
                event = self._events.get(timeout=seconds)
        finally:
            self._fields[fields.IDLE] = 0
        self._handle(event)
        while not self._events.empty():
            self._handle(self._events.get())

    def _handle(self, event: Any) -> None:
        if event is True:
            self._is_waiting, self._may_find = False, True
        elif event is not False:
            self._may_find = True  # it may have enqueued others
            if event.failure is None:
                self._done.append(event)
            else:
                self._settle(event.job, event.failure)
                self._free_slot(event)

    def _free_slot(self, run: ActiveRun) -> None:
        run.slot.end()
        del self._runs[run.slot.number]
        self._free.append(run.slot)

    def _publish_results(self) -> None:
        """Store in the record the results that are not committed."""
        with self._adding:
            self.record.clear_results()
            for run in self._runs.values():
                if run.has_completed:
                    self.record.add_result(run.job.id, run.claim, run.encoded)

    def _look_for_leftovers(self) -> None:
        """Between jobs, look for what they have left behind in the process: no one job can be named."""
        if not self.state or not self._has_run or monotonic() - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at, self._has_run = monotonic(), False
        self._pause_at = self._looked_at + BUSY_SECONDS
        if self._has_leftovers():
            self._may_find = True  # a changed connection may have hidden jobs

    # Waiting for jobs

    @contextmanager
    def _helper_threads(self) -> Iterator[None]:
        waiter = Thread("pqueue-waiter", self._wait_for_jobs)
        try:
            waiter.start()
            if not self.is_embedded:
                Thread("pqueue-pulse", self._show_pulse, time.sleep).start()
        except RuntimeError as error:
            raise QueueError(f"cannot run jobs concurrently: {error}") from error
        try:
            yield
        finally:
            self._asked.put(False)
            self._close_loop()
            if self.is_embedded:
                waiter.join()

    def _show_pulse(self, sleep: Callable[[float], object]) -> None:
        while True:
            self._fields[fields.PULSE] += 1
            sleep(PULSE_SECONDS)

    def _wait_for_jobs(self) -> None:
        """Wait for jobs whenever asked, while other threads run some."""
        while self._asked.get():
            try:
                self.queue.wait(pqueue.WAIT_SECONDS, consumer=self.name, **self.wanted)
            except BaseException:  # the next claim reports it, unless the queue is closed or a task has raised it here
                time.sleep(LOOK_SECONDS)
            self._events.put(True)

    # Ordinary functions

    def _run_in_thread(self, run: ActiveRun) -> None:
        with run.lock:
            if run.is_over:  # it has begun too late
                return
            run.thread = run.slot.fields[fields.THREAD] = threading.get_ident()
        try:
            try:
                self._begin(run)
                run.encoded = encoded_result(pqueue.run_task(self.queue, run.job))
                self._end_child()
                self._collect_garbage()
            except BaseException as error:
                self._end_child()
                run.fail(error)
            finally:
                run.leave()
        except BaseException as error:
            run.leave()  # again: an interrupt may have come before
            run.fail(error)
        self._hand_over(run)

    def _begin(self, run: ActiveRun) -> None:
        run.slot.begin(run.job.id, run.claim, *self._limits(run.job))

    def _hand_over(self, run: ActiveRun) -> None:
        """Publish the result, and hand the run over to the thread that settles it."""
        run.is_over = True
        try:
            self._publish(run)
        except BaseException as error:  # what a task has put in place of functions that this uses
            self._failure = error
        self._events.put(run)

    def _publish(self, run: ActiveRun) -> None:
        with self._adding:
            # here: another thread would wait for it
            if self.queue.in_transaction:
                try:
                    self._break_off_in_transaction(run.job, run.claim, run.failure)
                except QueueError as error:
                    self._failure = error
            elif run.failure is None:
                run.has_completed = True
                self.record.add_result(run.job.id, run.claim, run.encoded)

    # Async tasks

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            import asyncio

            before = self._open_descriptors()
            loop = asyncio.new_event_loop()
            self._files_of_loop = self._open_descriptors() - before
            loop.time = monotonic  # type: ignore[method-assign]
            watch_tasks(loop, self._enter, self._leave)
            self._loop_thread = Thread("pqueue-loop", self._run_loop, loop)
            try:
                self._loop_thread.start()
            except RuntimeError:  # the system has no more threads
                loop.close()
                raise
            self._loop, self._set_running_loop = loop, asyncio._set_running_loop
        return self._loop

    def _run_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        import asyncio

        self._fields[fields.LOOP] = threading.get_ident()
        tasks = set[Any]()
        asyncio.set_event_loop(loop)
        loop.call_soon(self._remember_loop_thread)
        try:
            while not self._asked_to_close:
                with suppress(SystemExit, KeyboardInterrupt):  # of an asyncio task that a task has started
                    loop.run_forever()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
        except BaseException as error:  # a task has closed its descriptors, for example
            self._failure = error
            self._events.put(False)

    def _close_loop(self) -> None:
        self._asked_to_close = True
        if self._loop and self._loop_thread:
            with suppress(RuntimeError):  # it has failed
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop_thread.join(CLOSE_SECONDS)

    def _start_async(self, run: ActiveRun) -> None:
        try:
            run.slot.fields[fields.THREAD] = 0
            self._begin(run)
            _running.set(run)
            run.task = self._open_loop().create_task(self._run_async(run))
            run.task.add_done_callback(partial(self._expect_handed_over, run))
        except BaseException as error:
            run.leave()
            run.fail(error)
            self._hand_over(run)

    async def _run_async(self, run: ActiveRun) -> None:
        try:
            try:
                result = call_task(self.queue, run.job)
                run.encoded = encoded_result(await result if inspect.isawaitable(result) else result)
                del result  # here: to free it may run code of the task
                self._end_child()
                self._collect_garbage()
            except BaseException as error:
                self._end_child()
                run.fail(error)
            finally:
                run.leave()
        except BaseException as error:
            run.fail(error)
        self._restore_loop_thread(run.job)
        self._hand_over(run)

    def _restore_loop_thread(self, job: Job) -> None:
        """Undo what a task has changed in the thread of the event loop, for the tasks that continue in it."""
        if not self.state:
            return
        if self.queue.has_lent_connection:
            with suppress(QueueError):  # the next use says so
                self.queue.renew_connection()
        # guard: async tasks find the thread of the event loop as the first one did
        if left := list(self.state.undo(self._loop_settings)):
            self._report_left(left, job=job.id, task=job.task)

    def _remember_loop_thread(self) -> None:
        if self.state:
            from pqueue_tools.leftovers import thread_settings  # not available on Windows

            self._loop_settings = list(thread_settings(self._files_of_loop))

    def _open_descriptors(self) -> set[int]:
        """Return the open descriptors if their flags are to be restored."""
        if not self.state:
            return set()
        from pqueue_tools.leftovers import open_descriptors  # likewise

        return set(open_descriptors())

    def _expect_handed_over(self, run: ActiveRun, task: asyncio.Task[None]) -> None:
        """Hand over a run whose asyncio task ended before `_run_async` could, as it was cancelled before it began."""
        if run.is_over:
            return
        run.leave()
        try:
            task.result()
        except BaseException as error:
            run.fail(error)
        self._hand_over(run)

    def _enter(self) -> None:
        if run := _running.get():
            self._fields[fields.STEPPED_AT] = time.monotonic_ns()
            self._fields[fields.STEPPING] = run.slot.number + 1

    def _leave(self) -> QueueError | None:
        self._fields[fields.STEPPING] = 0
        self._end_child()
        self._set_running_loop(self._loop)
        return open_transaction(self.queue)

    # Signals

    def interrupt(self, *_: Any) -> None:
        """Handle the keeper's signal: interrupt the tasks that must end, unless they are in a transaction of the queue;
        the keeper repeats the signal."""
        for run in list(self._runs.values()):
            with run.lock:
                slot, thread = run.slot.fields, run.thread
                number = slot[fields.RUNNING]
                if number and slot[fields.INTERRUPT] == number and not (thread and self.queue.uses_database(thread)):
                    run.reason = run.reason or self._reason(run.slot)
                    slot[fields.INTERRUPTED], slot[fields.INTERRUPT] = number, 0
                    self._interrupt(run)
        self._events.put(False)

    def _interrupt(self, run: ActiveRun) -> None:
        if run.thread:
            _raise_interrupt(run.thread)
        elif run.task and self._loop:
            with suppress(RuntimeError):  # it has failed
                self._loop.call_soon_threadsafe(run.task.cancel, str(run.reason))


_running: contextvars.ContextVar[ActiveRun | None] = contextvars.ContextVar("pqueue_running", default=None)


def _raise_interrupt(thread: int) -> None:
    """Raise an Interrupt in a thread when it executes Python code again."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Interrupt))


def _catch_interrupt(thread: int) -> None:
    """Wait for an Interrupt that was raised in this thread, and catch it. To cancel it instead would make Python 3.11
    loop for ever in a thread that has a trace or profile function."""
    with suppress(Interrupt):
        _raise_interrupt(thread)
        while True:
            pass


def watch_tasks(
    loop: asyncio.AbstractEventLoop, enter: Callable[[], object], leave: Callable[[], QueueError | None]
) -> None:
    """Call `enter` before each step of the tasks of a loop, and `leave` after it, whose error is raised in the task."""
    import asyncio

    async def in_steps(inner: Coroutine[Any, Any, Any]) -> Any:
        return await _steps(inner, enter, leave)

    def new_task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(in_steps(work) if inspect.iscoroutine(work) else work, loop=loop, **options)

    loop.set_task_factory(new_task)


@coroutine
def _steps(
    inner: Coroutine[Any, Any, Any], enter: Callable[[], object], leave: Callable[[], QueueError | None]
) -> Generator[Any, Any, Any]:
    resume = partial(inner.send, None)
    while True:
        enter()
        try:
            awaited = resume()
        except StopIteration as end:
            return end.value
        finally:
            problem = leave()
        if problem is not None:
            resume = partial(inner.throw, problem)
            continue
        try:
            resume = partial(inner.send, (yield awaited))
        except BaseException as error:  # it is cancelled or closed
            resume = partial(inner.throw, error)


def open_transaction(queue: PersistentQInterface) -> QueueError | None:
    """Return an error if an async task awaits while its transaction of the queue is open."""
    # guard: no transaction is open across an await
    if queue.in_transaction:
        return QueueError(
            "cannot await inside transaction(): other tasks of the event loop would join it; end it first"
        )
    return None
