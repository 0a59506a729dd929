"""Write what tasks print as whole lines, so that none of it shares a line with an event of the log.

The keeper reads it from pipes, and does not block if nobody reads the log.
"""

from __future__ import annotations

import fcntl
import os
import select
import sys
import termios
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import TextIOWrapper

from pqueue_tools.process import log_line, utc_now, write_log_to
from pqueue_tools.record import FORWARDING, Record

MAX_BYTES = select.PIPE_BUF  # of a write: a ready pipe takes this many at once, and does not mix them with others
READ_BYTES = 1 << 16
ORDER_SECONDS = 0.1  # how long an event waits for the output of tasks before it
LAST_MS = 1000  # how long the last lines of a worker may wait for the reader of the log
HIGH_DESCRIPTOR = 100  # ours are above, out of the way of tasks that close low ones
STREAMS = {1: "stdout", 2: "stderr"}


def outputs(options: Namespace) -> list[TaskOutput]:
    """Return the pipes for the output of tasks. To a terminal they write themselves, unless the log is JSON."""
    is_json = options.log_format == "json"
    return [TaskOutput(number, options.name, is_json) for number in STREAMS if is_json or not os.isatty(number)]


def redirect(pipes: list[TaskOutput], record: Record) -> None:
    """In the worker: replace its standard descriptors by the pipes, and write the log to the original stdout."""
    if pipes and (number := high_copy(1)) is not None:
        log_file = os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace")
        copies = [copy for each in pipes if (copy := each.redirect()) is not None]
        write_log_to(log_file, lambda: _wait_until_written(copies, record))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _wait_until_written(pipes: list[int], record: Record) -> None:
    """Wait, if not for long, until the keeper has written what tasks wrote before."""
    until = time.monotonic() + ORDER_SECONDS
    # guard: what a task wrote comes before its end in the log
    while (any(map(_unread_bytes, pipes)) or record.fields[FORWARDING]) and time.monotonic() < until:
        time.sleep(ORDER_SECONDS / 200)


def _unread_bytes(pipe: int) -> int:
    with suppress(OSError):  # a task has closed it
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
    return 0


def high_copy(number: int) -> int | None:
    """Return a copy of a descriptor, if possible out of the way of tasks; None: it is closed, or no other is free."""
    for least in (HIGH_DESCRIPTOR, 3):  # the limit may be lower
        with suppress(OSError):
            return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, least)
    return None


class TaskOutput:
    """The pipe that replaces a standard descriptor in the worker."""

    def __init__(self, number: int, consumer: str, is_json: bool) -> None:
        self._number, self._consumer, self._is_json = number, consumer, is_json
        self._source, self._end = os.pipe()
        os.set_blocking(self._source, False)
        self._begun = b""  # a line without its end
        self.ready = deque[bytes]()  # has been read and is to be written, each at once

    def redirect(self) -> int | None:
        """In the worker: replace its descriptor by the pipe. Return a copy, if there is one."""
        os.dup2(self._end, self._number)
        os.close(self._end)
        os.close(self._source)
        return high_copy(self._number)

    def close(self) -> None:
        os.close(self._end)
        os.close(self._source)

    def register(self, poller: select.poll) -> None:
        if self.ready:  # a log that nobody reads does not stop the keeper
            poller.register(self._number, select.POLLOUT)
        else:
            poller.register(self._source, select.POLLIN)

    def forward(self, ready: Mapping[int, int]) -> None:
        """Read or write once, as the poller says that this does not wait."""
        if self.ready and self._number in ready:
            self._write()
        elif not self.ready and self._source in ready:
            self._read()

    def flush(self) -> None:
        """Write the rest, after the worker has ended; what nobody reads is dropped."""
        poller = select.poll()
        poller.register(self._number, select.POLLOUT)
        while self.ready or self._read() or self._end_line():
            if not poller.poll(LAST_MS):
                self.ready.clear()
            while self.ready and poller.poll(0):
                self._write()

    def _end_line(self) -> bool:
        """End a line that has begun; return whether there was one."""
        self.ready.extend(self._events(self._begun + b"\n" if self._begun else b""))
        return bool(self.ready)

    def _read(self) -> bool:
        """Read what there is; return whether there is something to write."""
        try:
            data = os.read(self._source, READ_BYTES)
        except BlockingIOError:
            return False
        self.ready.extend(self._events(self._begun + data))
        return True

    def _events(self, data: bytes) -> Iterator[bytes]:
        """Yield what is to be written of complete lines; a longer one is cut."""
        while (end := data.rfind(b"\n", 0, MAX_BYTES) + 1) or len(data) >= MAX_BYTES:
            lines = data[: end or MAX_BYTES - 1]
            data = data[len(lines) :]
            if self._is_json:
                for line in lines.removesuffix(b"\n").split(b"\n"):
                    yield from self._json(line)
            else:
                yield lines if end else lines + b"\n"
        self._begun = data

    def _json(self, line: bytes) -> Iterator[bytes]:
        """Yield an event with the line, or several with parts of it."""
        fields = {"consumer": self._consumer, "stream": STREAMS[self._number]}
        event = log_line(utc_now(), "output", {**fields, "text": line.decode(errors="backslashreplace")}) + "\n"
        if len(event) > MAX_BYTES and len(line) > 1:
            yield from self._json(line[: len(line) // 2])
            yield from self._json(line[len(line) // 2 :])
        else:
            yield event.encode()

    def _write(self) -> None:
        data = self.ready.popleft()
        try:
            data = data[os.write(self._number, data) :]
        except BlockingIOError:
            """Another process has filled the pipe."""
        except OSError:  # the disk is full, or nobody reads the pipe any more
            return
        if data:
            self.ready.appendleft(data)
