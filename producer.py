"""Write a random file every 5 seconds and enqueue it as a job.

    python3 producer.py                       # until stopped
    python3 producer.py --count 5 --interval 0

TERM, INT or HUP stops it between two jobs.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO

import pqueue_files
from pqueue import PersistentQInterface, QueueError
from pqueue_tools import file_task
from pqueue_tools.process import (
    OneLineParser,
    expect_posix,
    folder,
    is_orphaned,
    log,
    on_termination,
    open_waiting,
    print_error,
    report,
    retry_while_busy,
    seconds,
    whole_number,
    writes_to_stdout,
)
from pqueue_values import program_name

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty"]


class Producer:
    """Writes job files durably and enqueues each exactly once, even if the producer is killed.

    A file is written as .NAME.new, linked to NAME, and enqueued with its name as the key; then .NAME.new is deleted.
    The next producer to start completes or undoes these steps if they were interrupted.
    """

    def __init__(self, queue: PersistentQInterface, directory: Path) -> None:
        self.queue, self.directory = queue, directory
        self.stopped = threading.Event()
        pqueue_files.make_folder(directory)

    def run(self, interval_seconds: float, count: int | None) -> None:
        """Produce `count` jobs, or until stopped."""
        self.recover()
        produced = 0
        while not (self.stopped.is_set() or is_orphaned()) and (count is None or produced < count):
            if self.produce() is None:
                return
            produced += 1
            if produced != count:
                self.stopped.wait(interval_seconds)

    def produce(self) -> int | None:
        """Write and enqueue one file; return the job's id, or None if stopped while waiting for the database."""
        name = time.strftime("job_%Y%m%dT%H%M%S_", time.gmtime()) + f"{secrets.token_hex(6)}.txt"
        new = self.directory / f".{name}.new"
        file = retry_while_busy(lambda: self._write(name, new), self.stopped.wait)
        if file is None:
            return None
        with file:
            return self._enqueue(name, new, is_new=True)

    def _write(self, name: str, new: Path) -> IO[str]:
        """Write the file durably under both names and return it, locked. On failure, delete it."""
        number = file_task.create_locked(new, os.O_RDWR | os.O_EXCL)
        file = os.fdopen(number, "w", encoding="utf-8")
        try:
            pqueue_files.share_as_folder(file.fileno(), self.directory)
            for _ in range(random.randint(3, 20)):
                print(*random.choices(WORDS, k=8), file=file)
            file.flush()
            # guard: a job file is synced
            pqueue_files.sync_file(file.fileno())
            # guard: a job file's first name is synced
            pqueue_files.sync(self.directory)  # else only the other name might survive a power cut
            os.link(new, self.directory / name)
            # guard: a job file's final name is synced
            pqueue_files.sync(self.directory)
        except BaseException:
            # Before the file is closed and thereby unlocked: a producer that starts would enqueue it
            (self.directory / name).unlink(missing_ok=True)
            new.unlink()
            with suppress(OSError):
                file.close()  # flushes again
            raise
        return file

    def recover(self) -> None:
        """Complete or undo what killed producers left. The files of running producers are locked."""
        for new in self.directory.glob(".job_*.txt.new"):
            with suppress(FileNotFoundError), new.open("rb") as held:
                if not pqueue_files.try_lock(held.fileno()):
                    continue
                final = self.directory / new.name[1 : -len(".new")]
                if final.exists() and final.samefile(new):
                    self._enqueue(final.name, new, is_new=False)
                else:
                    new.unlink()

    def _enqueue(self, name: str, new: Path, *, is_new: bool) -> int | None:
        """Enqueue the job, retrying while the database is busy. If stopped before that succeeds, delete the file.

        A killed producer, or an attempt whose answer was lost, may have stored the job. It may even be finished, so
        that its key is free again. So look for the job first, except on the first attempt for a new file.
        """
        attempts = count(0 if is_new else 1)

        def store() -> int:
            stored = self.queue.list_jobs(key=name, limit=1) if next(attempts) else None
            return stored[0].id if stored else self.queue.enqueue(file_task.prepend_timestamp, {"file": name}, key=name)

        job_id = retry_while_busy(store, self.stopped.wait)
        if job_id is None:
            (self.directory / name).unlink()
        new.unlink()
        if job_id is not None:
            log("enqueued", job=job_id, file=name)
        return job_id


def expect_creatable(folder: Path) -> None:
    """Raise OSError if the folder is missing and cannot be created; create nothing."""
    parent = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if parent != folder:
        with tempfile.TemporaryDirectory(dir=parent):
            pass


@writes_to_stdout("producer")
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        expect_posix()
        expect_creatable(options.directory)
        opened = open_waiting()
        if opened is None:  # stopped before the server answered
            return 0
        with opened as queue:
            producer = Producer(queue, options.directory)
            on_termination(lambda *_: producer.stopped.set())
            producer.run(options.interval, options.count)
    except (QueueError, ValueError) as error:
        return report("producer", error)
    except OSError as error:
        print_error("producer", f"cannot write to {options.directory}: {error.strerror or error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("producer"), description=__doc__)
    add = parser.add_argument
    add("--interval", type=seconds(0), default=5.0, metavar="S", help="seconds between jobs (default: %(default)g)")
    add("--count", type=whole_number(1), metavar="N", help="stop after N jobs")
    add("--directory", type=folder, default=file_task.files_directory, help="where to write (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
