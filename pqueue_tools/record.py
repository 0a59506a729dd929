"""What the two processes of a consumer tell each other: which job runs, what has finished, what must be interrupted.

They share a mapped memory of 64-bit fields, each written by one of them. Writing a field costs 0.04 us. Nothing here
needs the GIL of the other process.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Iterator
from time import monotonic  # which a task may replace in `time`
from typing import Any, NamedTuple

from pqueue_values import MAX_ERROR_CHARS, read_json

# Fields of the whole record that the worker writes
STORED = 0  # bytes of results
READY, IDLE, OUTCOME = 1, 2, 3  # has imported its modules; waits for jobs; how it ended
COMPLETED, FAILED = 4, 5  # numbers of jobs and attempts, of all workers
LOOP = 6  # the thread of the event loop for async tasks, if several jobs may run at the same time
STEPPING, STEPPED_AT = 7, 8  # 1 + the slot whose async task the loop runs now, since when (monotonic ns); 0: none
PULSE = 9  # changes while threads get the GIL, if several jobs may run at the same time; 0: not yet
STARTED_ONCE = 10  # a worker of this consumer has registered
RETRIES = 17  # changes while the worker waits for the database
WAITING = 18  # jobs that are held and have no slot
# Fields of the whole record that the keeper writes
STOP = 11  # 1: finish the current jobs; 2: interrupt them
WITHDRAW, WITHDRAWN = 12, 13  # number of the run whose waiting jobs the keeper wants, or has taken
ASLEEP = 14  # the keeper waits until it is woken
FORWARDING = 15  # the keeper has read output of tasks, and not written it yet
RENEW = 16  # the worker ends after its current jobs: the keeper has no connection, and then waits for both
FIELDS = 19
OF_WORKER = (STORED, READY, IDLE, OUTCOME, WITHDRAW, RENEW, WAITING, LOOP, STEPPING, PULSE)  # 0 when a worker starts
# Fields of a slot that the worker writes
RUNNING = 0  # number of the run whose task may be interrupted; 0: none
RUN, JOB, CLAIM, STARTED, TIMEOUT, MEMORY, BASE, BACKOFF = range(1, 9)  # of a run; JOB is 0 between runs
INTERRUPTED = 9  # number of the run in which the interrupt was raised
THREAD = 10  # that runs the task; 0: the only one, or that of the event loop
# Fields of a slot that the keeper writes
INTERRUPT, REASON = 11, 12  # number of the run to interrupt (the worker resets it), and why
SLOT_FIELDS = 13

DRAINED, STOPPED, REPLACE, REFUSED = range(1, 5)  # outcomes; 0: it died
BROKEN, BROKEN_BY_ONE = 5, 6  # outcomes: by any of the jobs that ran; by one whose result or error is stored
TIMED_OUT, OUT_OF_MEMORY, LOST, STOP_REQUESTED, EXECUTED = range(1, 6)  # reasons

MAX_CONCURRENCY = 1000  # slots
RESULTS_BYTES = 1 << 18
SETTLE_SECONDS = 0.001  # after which a write of one process is certainly visible to the other

Results = dict[tuple[int, int], Any]  # of tasks, by job id and claim


class Run(NamedTuple):
    """A run of a task. Limits are None if there are none; times are monotonic seconds."""

    number: int
    job_id: int
    claim: int
    started: float
    timeout_seconds: float | None
    memory_mb: float | None
    base_mb: float  # used when it started, measured if memory_mb is set
    retry_in_seconds: float  # if the worker dies

    @property
    def key(self) -> tuple[int, int]:
        """The delivery of the job."""
        return self.job_id, self.claim


class Slot:
    """A place for one run of a task: as many run at the same time as there are slots."""

    _DETAILS = struct.Struct("=qddddd")  # CLAIM to BACKOFF

    def __init__(self, number: int, shared: mmap.mmap, at: int) -> None:
        self.number, self._map, self._at = number, shared, at + 8 * CLAIM
        self.fields = memoryview(shared)[at : at + 8 * SLOT_FIELDS].cast("q")

    def begin(self, job_id: int, claim: int, timeout: float, memory_mb: float, base_mb: float, backoff: float) -> float:
        """Publish that a task starts to run, and return when, in monotonic seconds. A limit of 0 is none."""
        number, started, own = self.fields[RUN] + 1, monotonic(), self.fields
        self._DETAILS.pack_into(self._map, self._at, claim, started, timeout, memory_mb, base_mb, backoff)
        own[RUN] = number
        own[JOB] = job_id  # only now: the keeper may read at any moment, and this process be suspended at any
        own[RUNNING] = number
        return started

    def end(self) -> None:
        """Publish that the job is settled, or its completion stored with `add_result`."""
        self.fields[JOB] = 0

    def run(self) -> Run | None:
        """Return the current run."""
        job_id, number = self.fields[JOB], self.fields[RUN]
        if not job_id:
            return None
        claim, started, timeout, memory, *others = self._DETAILS.unpack_from(self._map, self._at)
        # guard: what is read of a run is of one run
        if (self.fields[JOB], self.fields[RUN]) != (job_id, number):
            return None
        return Run(number, job_id, claim, started, timeout or None, memory or None, *others)

    def clear(self) -> None:
        """Forget the run of a worker that has ended."""
        self.fields[RUNNING] = self.fields[JOB] = self.fields[INTERRUPT] = 0


class Record:
    """The shared memory of a consumer. Embedded in an application, both sides are threads of one process.

    slots: as many as jobs may run at the same time.
    """

    _RESULT = struct.Struct("=qqii")  # id, claim, kind, length
    _RETURNED, _RAISED = range(2)  # kinds of results

    def __init__(self, slots: int = 1) -> None:
        self._results_at = 8 * (FIELDS + SLOT_FIELDS * slots)
        self._map = mmap.mmap(-1, self._results_at + RESULTS_BYTES)
        self.fields = memoryview(self._map)[: 8 * FIELDS].cast("q")
        self.slots = [Slot(number, self._map, 8 * (FIELDS + SLOT_FIELDS * number)) for number in range(slots)]

    def renew(self, stops: int) -> None:
        """Begin again, after a task has overwritten it while no worker runs."""
        self._map[:] = bytes(len(self._map))
        self.fields[STARTED_ONCE], self.fields[STOP] = 1, stops

    # Results that are not committed yet

    def add_result(self, job_id: int, claim: int, result: str | None) -> bool:
        """Store the result of a finished job, as JSON, for the keeper to commit if the worker dies.

        Return False if it does not fit.
        """
        return self._add(job_id, claim, self._RETURNED, (result or "").encode())

    def add_error(self, job_id: int, claim: int, error: str) -> bool:
        """Store the error of the current job for the keeper to settle. Return False if it does not fit."""
        data = error[:MAX_ERROR_CHARS].encode(errors="backslashreplace")
        return self._add(job_id, claim, self._RAISED, data) or self._add(job_id, claim, self._RAISED, data[:1000])

    def _add(self, job_id: int, claim: int, kind: int, data: bytes) -> bool:
        at, size = self.fields[STORED], self._RESULT.size
        end = at + size + len(data)
        if end > RESULTS_BYTES:
            return False
        self._RESULT.pack_into(self._map, self._results_at + at, job_id, claim, kind, len(data))
        self._map[self._results_at + at + size : self._results_at + end] = data
        self.fields[STORED] = end
        return True

    def clear_results(self) -> None:
        self.fields[STORED] = 0

    def results(self) -> Results:
        """Return the results by job id and claim."""
        found = {key: data for key, kind, data in self._stored() if kind == self._RETURNED}
        return {key: read_json(data.decode(errors="replace")) if data else None for key, data in found.items()}

    def error(self, run: Run) -> str | None:
        """Return the error that `add_error` stored for a run."""
        found = [data for key, kind, data in self._stored() if kind == self._RAISED and key == run.key]
        return found[-1].decode(errors="replace") if found else None

    def _stored(self) -> Iterator[tuple[tuple[int, int], int, bytes]]:
        at, end = self._results_at, self._results_at + min(self.fields[STORED], RESULTS_BYTES)
        while at + self._RESULT.size <= end:
            job_id, claim, kind, length = self._RESULT.unpack_from(self._map, at)
            at += self._RESULT.size
            if not 0 <= length <= end - at:  # a task has overwritten the memory
                return
            yield (job_id, claim), kind, self._map[at : at + length]
            at += length

    # Taking back the jobs that wait behind a slow one, if there is one slot

    def withdraw(self, run: Run) -> Results | None:
        """Take over the jobs that the worker holds besides this run; return those with results, or None if it is over.

        The worker reads WITHDRAW after it has written RUN, and this reads RUN after it has written WITHDRAW, and has
        waited until both are visible. So if the run is not over then, the worker will see WITHDRAW after it.
        """
        self.fields[WITHDRAW] = run.number
        time.sleep(SETTLE_SECONDS)
        if self.slots[0].run() != run:
            self.fields[WITHDRAW] = 0
            return None
        results = self.results()
        self.fields[WITHDRAWN] = run.number
        return results

    def was_withdrawn(self) -> bool:
        """Return, in the worker between two runs, whether the keeper has taken over what the worker holds."""
        while (number := self.fields[WITHDRAW]) > self.fields[WITHDRAWN]:
            time.sleep(SETTLE_SECONDS / 2)  # until the keeper has decided
        if number:
            self.fields[WITHDRAW] = 0
        return bool(number)
