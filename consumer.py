"""Run jobs: take them from the queue, call their tasks, and record the results, until stopped.

    python3 consumer.py                       # all queues, the built-in task prepend_timestamp
    python3 consumer.py --import my_tasks --queue mail --queue default

On the first TERM, INT or HUP, the consumer finishes the jobs that it holds and exits; on the second, it returns them to
the queue and exits. If the Supervisor that started it has exited, it stops as on a first TERM.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import pqueue
from pqueue import PersistentQInterface, QueueError
from pqueue_tools import file_task
from pqueue_tools.process import (
    LEVELS,
    OneLineParser,
    expect_posix,
    folder,
    log,
    module_name,
    on_termination,
    open_soon,
    open_waiting,
    report,
    seconds,
    set_log,
    whole_number,
    writes_to_stdout,
)
from pqueue_tools.record import MAX_CONCURRENCY
from pqueue_tools.report import why_held_back
from pqueue_tools.worker import expect_modules
from pqueue_values import program_name, valid_name

# The program ##########################################################################################################


def progress_bar(queue: PersistentQInterface, queues: list[str] | None) -> Callable[[int, int], None]:
    """Return a function that shows on the terminal how much of the queue is drained."""
    counts, began = queue.stats()["queues"], time.monotonic()
    total = sum(each["pending"] for name, each in counts.items() if queues is None or name in queues)

    def draw(done: int, failed: int) -> None:
        share = min(1.0, (done + failed) / total) if total else 1.0
        rate = (done + failed) / max(time.monotonic() - began, 1e-9)
        bar = "█" * round(share * 30)
        text = f"\r{bar:░<30} {share:4.0%}  {done} completed, {failed} failed  {rate:,.0f}/s "
        print(text, end="", file=sys.stderr, flush=True)

    return draw


@writes_to_stdout("consumer")
def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.wait is not None and not options.drain:
        parser.error("expected --drain with --wait")
    try:
        expect_posix()
        # What a consumer would refuse, before a new queue is created
        valid_name("consumer", options.name)
        for name in options.queues or ():
            valid_name("queue", name)
        expect_modules(options.modules)
        queue = open_soon() if options.drain else open_waiting(consumer=options.name)
    except (QueueError, ValueError) as error:
        return report("consumer", error)
    if queue is None:  # stopped before the server answered
        return 0
    try:
        code = _consume(queue, options)
        on_termination(signal.SIG_DFL)  # a thread of a task may keep the process alive
    finally:
        with suppress(QueueError):
            queue.close()
    return code


def _consume(queue: PersistentQInterface, options: argparse.Namespace) -> int:
    from pqueue_tools.keeper import Keeper  # noqa: PLC0415 - not available on Windows

    has_bar = options.drain and sys.stderr.isatty()
    options.quiet = options.quiet or (has_bar and sys.stdout.isatty())
    set_log(options.log_level, options.log_format)
    try:
        bar = progress_bar(queue, options.queues) if has_bar else None
        keeper = Keeper(queue, options, bar)
        code = keeper.run()
    except (QueueError, ValueError, OSError) as error:
        return report("consumer", error)
    counts = keeper.leases.counts()
    if bar:
        bar(*counts)
        print(file=sys.stderr)
    if not keeper.is_refused:
        if options.drain:
            _report_unknown_queues(queue, options)
            _report_left(queue, options)
        log("stopped", consumer=options.name, completed=counts[0], failed=counts[1])
    return code


def _report_unknown_queues(queue: PersistentQInterface, options: argparse.Namespace) -> None:
    """Log those of the given queues that never had a job: their names may be misspelt."""
    with suppress(QueueError):
        known = queue.stats()["queues"]
        if unknown := ",".join(name for name in options.queues or () if name not in known):
            reason = f"no job was ever in this queue; there are: {', '.join(known) or 'none'}"
            log("nothing to drain", "warning", consumer=options.name, queues=unknown, reason=reason)


def _report_left(queue: PersistentQInterface, options: argparse.Namespace) -> None:
    """Log which pending jobs a drain has left: of tasks that it does not know, of paused queues, and beyond limits."""
    with suppress(QueueError, ValueError):  # the rows of consumers may be damaged
        last = next((each for each in queue.consumers(job_ids=False) if each["name"] == options.name), None)
        known = set(last["tasks"] or ()) if last else set()
        unknown, held = set(), Counter[str]()
        for (name, task), jobs in queue.pending_tasks().items():
            if options.queues is None or name in options.queues:
                held[name] += jobs if task in known else 0
                unknown |= {task} - known
        if unknown:
            tasks = ",".join(sorted(unknown))
            log("left pending", "warning", consumer=options.name, tasks=tasks, reason="no task of this name imported")
        for name in +held:
            if reason := why_held_back(queue, name):
                log("left pending", "warning", consumer=options.name, queue=name, jobs=held[name], reason=reason)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("consumer"), description=__doc__)
    add = parser.add_argument
    default = os.environ.get("SUPERVISOR_PROCESS_NAME") or f"{socket.gethostname()}-{os.getpid()}"
    add("--name", default=default, help="name of this consumer (default: its Supervisor name, or HOST-PID)")
    add("--queue", dest="queues", action="append", metavar="QUEUE", help="serve this queue; repeatable (default: all)")
    text = "a module with tasks; repeatable"
    add("--import", dest="modules", action="append", type=module_name, default=[], metavar="MODULE", help=text)
    text = "folder of job files (default: %(default)s)"
    add("--directory", type=folder, default=file_task.files_directory, help=text)
    add("--quiet", action="store_true", help="do not log completed jobs")
    text = "lowest level to log, also for tasks (default: %(default)s)"
    add("--log-level", choices=LEVELS, default="info", help=text)
    add("--log-format", choices=("text", "json"), default="text", help="format of the log (default: %(default)s)")
    add("--drain", action="store_true", help="stop when no job is pending; the exit code is 1 if jobs failed")
    text = "with --drain, also wait for retries and other scheduled jobs; with S, only for those due within S seconds"
    add("--wait", type=seconds(0), nargs="?", const=float("inf"), metavar="S", help=text)
    text = "run up to N jobs at the same time: async tasks in an event loop, others in threads (default: %(default)s)"
    add("--concurrency", type=whole_number(1, MAX_CONCURRENCY), default=1, metavar="N", help=text)
    add("--max-jobs", type=whole_number(1), metavar="N", help="start a new worker process after N jobs")
    add("--max-rss", type=whole_number(1), metavar="MB", help="start a new worker process when it uses more than this")
    text = "how long this consumer keeps a job if it hangs (default: %(default)g)"
    add("--lease-seconds", type=seconds(0.001), default=pqueue.LEASE_SECONDS, metavar="S", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
