"""Moving a live queue to another database, in steps: the command `move`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pqueue
from pqueue import PersistentQInterface, QueueError
from pqueue_files import file_size
from pqueue_tools.commands import UsageError
from pqueue_tools.output import CommandResult, agreed, show_progress
from pqueue_tools.process import print_error
from pqueue_tools.report import count


def move(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    """Do the step that the options ask for."""
    if bool(options.to) == options.cancel or (options.finish and options.cancel):
        raise UsageError("move: expected --to URL, then --to URL --finish; or --cancel")
    if options.cancel:
        return _cancel_move(queue, options)
    if options.finish:
        return _finish_move(queue, options)
    if isinstance(queue, pqueue.PersistentQSQLite) and not pqueue.is_postgres(options.to):
        return _move_to_file(queue, options)
    queue.expect_other_tables(options.without)
    with pqueue.open_queue(options.to, durability="full") as target:  # --finish depends on it
        _expect_empty(queue, target)
        queue.copy_finished_to(target, lambda n: show_progress(f"{n:,} finished jobs copied"))
        return _move(queue, target.name, partial(queue.move_to, target, without=options.without), "rows")


def _move_to_file(queue: pqueue.PersistentQSQLite, options: argparse.Namespace) -> CommandResult:
    if options.without:
        raise UsageError("move: --without is for a move to another kind of database; into an SQLite file all is copied")
    path = pqueue.sqlite_path(options.to).resolve()
    if path == queue.path:
        raise QueueError("cannot move: the target is this queue itself")
    if file_size(path):
        with pqueue.open_queue(path, create=False) as target:
            _expect_empty(queue, target)
        raise QueueError(f"cannot move: {path} exists; delete that empty queue, or choose another name")
    return _move(queue, str(path), partial(queue.move_to_file, path), "pages")


def _expect_empty(queue: PersistentQInterface, target: PersistentQInterface) -> None:
    if queue.has_moved_to(target):
        raise QueueError(
            "cannot move: the target holds jobs, which were moved from here; start everything with the new URL, then "
            "give --finish"
        )
    if target.count_jobs() and not target.is_partial_copy():
        raise QueueError("cannot move: the target holds jobs; expected an empty one")


def _move(queue: PersistentQInterface, to: str, copy: Callable[..., dict[str, int] | None], unit: str) -> CommandResult:
    def show(copied: int) -> None:
        show_progress(f"{copied:,} {unit} copied")

    try:
        while (held := queue.begin_move(to)) or (copied := copy(progress=show)) is None:
            show_progress(f"waiting for {count(held, 'running job')}")
            time.sleep(0.5)
    except BaseException:
        _cancel_failed_move(queue)
        raise
    show_progress("")
    text = f"moved {count(copied['jobs'], 'job')}, verified; the old queue is paused. Start everything with the new URL"
    return CommandResult([copied], f"{text}, then give --finish")


def _cancel_failed_move(queue: PersistentQInterface) -> None:
    """After an error, resume the old queue, unless it may have been copied."""
    with suppress(QueueError):
        found = queue.move_status()
        if found is None:
            return
        if found["event"] == "moving":
            queue.cancel_move()
            return
    print_error("admin", "note: the old queue remains paused; repeat the command, or use --cancel")


def _cancel_move(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    found = queue.move_status()
    if found is None:
        raise QueueError("cannot cancel: this queue is not being moved")
    again = f"deliver from the old queue again, although it was moved to {found['to']}, where its jobs may run, too"
    if found["event"] == "moved" and not agreed(options, again):
        return CommandResult(text="nothing done", code=1)
    queue.cancel_move()
    return CommandResult([{"done": "cancelled"}], "the move is cancelled; the old queue delivers jobs again")


def _finish_move(queue: PersistentQInterface, options: argparse.Namespace) -> CommandResult:
    with pqueue.open_queue(options.to, create=False, durability="full") as target:
        if not agreed(options, f"delete all {count(queue.count_jobs(), 'job')} of the old queue"):
            return CommandResult(text="nothing done", code=1)
        done = queue.finish_move(target)
    carried = f"carried over {count(done['carried'], 'job')} enqueued since; " if done["carried"] else ""
    known = f"{count(done['known'], 'job')} not, as the key has an unfinished job there; " if done["known"] else ""
    return CommandResult([done], f"{carried}{known}deleted {count(done['deleted'], 'job')} of the old queue")
