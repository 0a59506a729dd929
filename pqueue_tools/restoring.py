"""Restores a backup of a queue on SQLite."""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path

from pqueue import is_postgres, sqlite_path
from pqueue_files import (
    IN_RESTORE,
    LOGS,
    FileLocks,
    group_of,
    has_locks,
    make_folder,
    move_into_place,
    open_private,
    part_of,
    real_path,
    status,
    sync,
    try_lock,
)
from pqueue_identity import schema_version
from pqueue_sqlite import open_paths
from pqueue_values import QueueError, SchemaMismatch, command_line, file_path

COPY_BYTES = 1 << 20


def restore(backup: str | os.PathLike[str], url: str | os.PathLike[str] | None = None) -> Path | None:
    """Replace the queue's file by a copy of this backup; return the path of the old file, if there was one.

    url: as for `open_queue`. If interrupted, this leaves either the old file or the new one, complete. Raises
    QueueError and changes nothing if a program has the file open or the backup is damaged or not a queue.
    """
    if is_postgres(url):
        raise QueueError(
            "cannot restore into PostgreSQL: set PQUEUE_URL to the backup's path, and move that queue: "
            f"{command_line()} move --to postgresql://…"
        )
    if not has_locks():
        raise QueueError("cannot restore on this platform: it cannot show whether a program has the file open")
    source, target = file_path(backup), real_path(sqlite_path(url))
    try:
        if not source.is_file():
            raise QueueError(f"cannot restore {source}: expected a file, got none")
        if target.exists() and source.samefile(target):
            raise QueueError(f"cannot restore {source}: it is the queue's file itself, not a backup of it")
        with _folder_of(target), part_of(target, group_of(target)) as part:
            _copy_pages(source, part)
            if (replaced := status(target)) and replaced.st_uid != os.geteuid():
                with suppress(PermissionError):  # only root may
                    os.chown(part, replaced.st_uid, -1)
            sync(part)
            _apply_logs(target)
            with _exclusive_access(target) as file:
                kept = _preserve(target, file)
                move_into_place(part, target, is_new=file is None)
    except OSError as error:
        raise QueueError(f"cannot restore {source} to {target}: {error.strerror}") from error
    return kept


@contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    """Create the folder of a file, and delete it again on an error."""
    missing = [each for each in target.parents if not each.exists()]
    make_folder(target.parent)
    try:
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # somebody uses it
                each.rmdir()
        raise


def _copy_pages(source: Path, part: Path) -> None:
    has_log = any(Path(f"{source}{suffix}").exists() for suffix in LOGS)
    mode = "mode=ro" if has_log else "mode=ro&immutable=1"  # works in a read-only folder
    try:
        with (
            closing(sqlite3.connect(f"{source.as_uri()}?{mode}", uri=True)) as backup,
            closing(sqlite3.connect(part, isolation_level=None)) as copy,
        ):
            backup.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # leaves no log
            if not schema_version(copy, source):
                raise SchemaMismatch(f"cannot use {source}: expected a queue, got an empty database")
            # guard: a damaged backup is not restored
            if (damage := copy.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
                raise QueueError(f"cannot restore {source}: it is damaged: {' '.join(damage.split())}")
    except sqlite3.Error as error:
        raise QueueError(f"cannot restore {source}: {error}") from error


def _apply_logs(path: Path) -> None:
    """Write the log back into the database, if it is sound and not open elsewhere, so that no log is left."""
    if path.exists() and any(Path(f"{path}{suffix}").exists() for suffix in LOGS) and path not in open_paths():
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0)) as db:
            db.execute("PRAGMA journal_mode = DELETE")


@contextmanager
def _exclusive_access(path: Path) -> Iterator[int | None]:
    """Lock this file and yield its descriptor. Raises QueueError if a program has it open."""
    if path in open_paths():  # closing a descriptor of it would release the locks of this process
        raise QueueError(f"cannot replace {path}: this process has it open")
    with ExitStack() as undo:
        folder, file = Path(f"{path}.d"), None
        make_folder(folder)
        lock = open_private(folder / "writer")
        undo.callback(os.close, lock)
        is_free = try_lock(lock)
        if path.exists():
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            undo.callback(os.close, file)
            # guard: a database that is open is not replaced
            is_free = is_free and try_lock_bytes(file) and os.path.samestat(os.fstat(file), path.stat())
        if not is_free:
            users = _users(path) or "a program"
            advice = "have it open; stop them" if ", " in users else "has it open; stop it"
            raise QueueError(f"cannot replace {path}: {users} {advice}")
        yield file


def try_lock_bytes(file: int) -> bool:
    """Lock the bytes of a database of which SQLite locks some while a connection is open."""
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *reversed(FileLocks.IN_USE))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False
    return True


def _users(path: Path) -> str:
    """Return the programs that have this file open, as far as /proc shows."""
    found = set()
    for link in Path("/proc").glob("[1-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == str(path) and link.parts[2] != str(os.getpid()):
                pid = _parent_of_same_program(link.parts[2])
                words = _command(pid).split(b"\0")
                words = words[: 3 if words[1:2] == [b"-m"] else 2]  # others may contain a password
                found.add(" ".join([*(Path(os.fsdecode(word)).name for word in words), f"(pid {pid})"]))
    return ", ".join(sorted(found))


def _parent_of_same_program(pid: str) -> str:
    """Return the process to stop for this one to end: the parent that forked it, if both run the same command."""
    parent = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1].decode()
    return _parent_of_same_program(parent) if parent != "0" and _command(parent) == _command(pid) else pid


def _command(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _preserve(path: Path, file: int | None) -> Path | None:
    """Copy the file to be replaced, with its log if any, to a new name; return that name."""
    logs = [suffix for suffix in LOGS if Path(f"{path}{suffix}").exists()]
    has_data = file is not None and os.pread(file, len(IN_RESTORE), 0) not in (b"", IN_RESTORE)
    if not logs and not has_data:
        return None
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    names = (path.with_name(f"{path.name}.replaced-{at}-{number}") for number in count(1))
    kept = next(name for name in names if not name.exists())
    for suffix in logs:
        with open(f"{path}{suffix}", "rb") as log:
            _copy_file(log.fileno(), Path(f"{kept}{suffix}"))
    if file is not None and has_data:  # by this descriptor: closing another one would release the lock
        _copy_file(file, kept)
    sync(path.parent)
    return kept


def _copy_file(source: int, target: Path) -> None:
    with part_of(target) as part:
        with part.open("wb") as copy:
            for at in range(0, os.fstat(source).st_size, COPY_BYTES):
                copy.write(os.pread(source, COPY_BYTES, at))
        sync(part)
        part.replace(target)
