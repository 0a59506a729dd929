"""Waiting for the results of jobs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from contextlib import closing, suppress
from datetime import timedelta
from typing import Any

from pqueue_backend import Watch
from pqueue_schema import STATES_OF, UNFINISHED
from pqueue_search import Reading
from pqueue_tasks import TASKS
from pqueue_values import Job, JobFailed, JobNotFound, QueueBusy, QueueError, duration, to_json, valid_id

LINGER_SECONDS = 1.0  # how long the thread stays for the next call of `result`
CLOSED = "cannot wait for a result: the queue object was closed"

Done = futures.Future[Job]
Finished = Callable[[list[int]], dict[int, Job | JobNotFound]]


class Waits:
    """All waits for results of a queue object. While there are any, one thread reads the states of their jobs."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[int, list[Done]] = {}  # by job
        self._thread: threading.Thread | None = None
        self._watch: Watch | None = None
        self._closed = False

    def add(self, job_id: int, open_watch: Callable[[], Watch], finished: Finished) -> Done:
        """Return a future of the job when it has finished; the other two are methods of the queue."""
        done: Done = futures.Future()
        with self._changed:
            if self._closed:
                raise QueueError(CLOSED)
            if self._thread is None:
                arguments = (open_watch, finished)
                thread = threading.Thread(target=self._serve, args=arguments, name="pqueue-results", daemon=True)
                thread.start()  # fails if the system has no more threads
                self._thread = thread
            self._waiting.setdefault(job_id, []).append(done)
            self._notify()
        return done

    def close(self) -> None:
        """End all waits with QueueError, and the thread."""
        with self._changed:
            self._closed, thread = True, self._thread
            self._notify()
        if thread and thread is not threading.current_thread():
            thread.join()

    def abandon(self) -> None:
        """Release in a forked child what the parent's thread holds."""
        if self._watch:
            self._watch.close()

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._watch:
            self._watch.interrupt()

    def _serve(self, open_watch: Callable[[], Watch], finished: Finished) -> None:
        try:
            with closing(open_watch()) as watch:
                self._watch = watch
                while job_ids := self._awaited():
                    watch.wait(job_ids, lambda: self._end_finished(job_ids, finished))
        except BaseException as error:  # each waiter raises it
            with self._changed:
                self._thread = self._watch = None
                self._end(dict.fromkeys(self._waiting, error))

    def _awaited(self) -> list[int]:
        """Return the jobs that are waited for; none: the thread must end."""
        with self._changed:
            for job_id, waits in list(self._waiting.items()):
                waits[:] = [done for done in waits if not done.cancelled()]
                if not waits:
                    del self._waiting[job_id]
            self._changed.wait_for(lambda: self._waiting or self._closed, LINGER_SECONDS)
            if self._closed:
                self._end(dict.fromkeys(self._waiting, QueueError(CLOSED)))
            if not self._waiting:
                self._thread = self._watch = None
            return list(self._waiting)

    def _end_finished(self, job_ids: list[int], finished: Finished) -> bool:
        """End the waits for the jobs that have finished; return whether there were any."""
        found: dict[int, Job | JobNotFound] = {}
        with suppress(QueueBusy):  # it reads again later
            found = finished(job_ids)
        with self._changed:
            self._end(found)
        return bool(found)

    def _end(self, outcomes: Mapping[int, Job | BaseException]) -> None:
        """End the waits for these jobs, each with the job or an error."""
        for job_id, outcome in outcomes.items():
            for done in self._waiting.pop(job_id, []):
                if not done.set_running_or_notify_cancel():
                    continue
                if isinstance(outcome, BaseException):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome)


class Waiting(Reading):
    """The waits of a queue for results."""

    _waits: Waits

    def result(self, job_id: int, timeout_seconds: float | timedelta | None = None) -> Any:
        """Wait until the job has finished, and return its result: as the type that its task is annotated to return, if
        this program has registered the task, else as JSON.

        timeout_seconds: how long to wait at most; None: as long as it takes.

        Raises JobFailed if the job is failed or cancelled, TimeoutError after the timeout, JobNotFound if there is no
        such job or it is deleted meanwhile, and QueueError inside a transaction, which would keep the job from running.
        A task must not wait for a job that only its own consumer could run.
        """
        seconds = _timeout(timeout_seconds)
        job = self.get(job_id)
        if job.state in UNFINISHED:
            done = self._wait_for(job_id)
            try:
                job = done.result(seconds)
            except futures.TimeoutError:
                raise self._timeout_error(job_id, seconds) from None
            finally:
                done.cancel()
        return _result_of(job)

    async def aresult(self, job_id: int, timeout_seconds: float | timedelta | None = None) -> Any:
        """Do what `result` does, without blocking the event loop."""
        import asyncio  # here: it takes 5 MB and 30 ms, and an async program has imported it

        seconds = _timeout(timeout_seconds)
        done = self._wait_for(valid_id(job_id))
        try:
            job = await asyncio.wait_for(asyncio.wrap_future(done), seconds)
        except (TimeoutError, asyncio.TimeoutError):
            with suppress(QueueBusy):  # the timeout may have been too short for a first look
                job = await asyncio.to_thread(self.get, job_id)
                if job.state not in UNFINISHED:
                    return _result_of(job)
            raise self._timeout_error(job_id, seconds) from None
        return _result_of(job)

    def _wait_for(self, job_id: int) -> Done:
        # guard: a wait inside a transaction is refused
        if self.in_transaction:
            raise QueueError(
                f"cannot wait for job {job_id} inside a transaction, which keeps it from running: wait after it"
            )
        return self._waits.add(job_id, self._open_watch, self._finished)

    def _finished(self, job_ids: list[int]) -> dict[int, Job | JobNotFound]:
        """Return which of these jobs have finished, and an error for each that does not exist."""
        states = dict(self._read(STATES_OF, {"ids": to_json(job_ids)}))
        found: dict[int, Job | JobNotFound] = {}
        for job_id in job_ids:
            if states.get(job_id) not in UNFINISHED:
                try:
                    job = self.get(job_id)
                except JobNotFound as error:
                    found[job_id] = error
                else:
                    if job.state not in UNFINISHED:  # resubmitted at this moment
                        found[job_id] = job
        return found

    def _timeout_error(self, job_id: int, seconds: float | None) -> TimeoutError:
        return TimeoutError(f"job {job_id} has not finished within {seconds:g} s")


def _timeout(timeout_seconds: float | timedelta | None) -> float | None:
    return None if timeout_seconds is None else max(0.0, duration("timeout_seconds", timeout_seconds))


def _result_of(job: Job) -> Any:
    # guard: only a completed job has a result
    if job.state != "completed":
        raise JobFailed(job)
    task = TASKS.get(job.task)
    return task.parameters.restored(job.result) if task else job.result
