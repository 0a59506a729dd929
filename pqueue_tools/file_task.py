"""The built-in task, which prepends a timestamp to each line of a file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pqueue_files
from pqueue import DoNotRetry, Job, current_queue, task
from pqueue_tools.process import expect_posix, utc_now

MAX_FILE_BYTES = 1 << 30  # larger job files are refused

files_directory = Path(os.environ.get("PQUEUE_FILES", "var/files"))


@task(max_attempts=10)  # safe to repeat
def prepend_timestamp(job: Job) -> dict[str, Any]:
    """Prepend one ISO 8601 UTC timestamp to every line of the file that the payload names.

    The timestamp and the digest of the original file are stored before the file is replaced, so that another delivery
    of the job can tell whether that has happened, and never stamps the file twice.
    """
    with _job_file(job.payload) as (name, folder, source):
        digest = _sha256(source)
        plan = job.result if isinstance(job.result, dict) else {}
        if plan:  # otherwise no delivery of this job has started a copy
            for copy in _copies(folder, re.escape(name)):
                os.unlink(copy, dir_fd=folder)
        else:
            plan = {"file": name, "timestamp": utc_now(), "sha256": digest}
            current_queue().update(job, result=plan)
        prefix = f"{plan['timestamp']} ".encode()
        if digest == plan["sha256"]:
            _replace(name, folder, source, prefix, digest, str(job.lease_token))
        elif not all(part.startswith(prefix) for part, begins in _parts(source) if begins):
            raise DoNotRetry(f"{name} changed since its timestamp was chosen; it was left unchanged")
    return plan


def read_job_file(payload: Any, most_bytes: int) -> bytes:
    """Return the start of the file that the payload names. Raises OSError or DoNotRetry, as the task does."""
    with _job_file(payload) as (_, _, source):
        return source.read(most_bytes)


@contextmanager
def _job_file(payload: Any) -> Iterator[tuple[str, int, BinaryIO]]:
    name = _file_name(payload)
    with _open_directory() as folder, _open_file(name, folder) as source:
        yield name, folder, source


def _file_name(payload: Any) -> str:
    file = payload.get("file") if isinstance(payload, dict) else None
    if not isinstance(file, str) or not file or "\0" in file:
        # The payload is omitted, as it may contain secrets.
        raise DoNotRetry('expected a payload {"file": NAME}, got another')
    path = Path(os.path.normpath(files_directory.absolute() / file))
    if path.parent != Path(os.path.normpath(files_directory.absolute())):
        raise DoNotRetry(f"expected a file directly in {files_directory}, got {file!r:.100}")
    return path.name


def _open_directory() -> AbstractContextManager[int]:
    expect_posix()
    return pqueue_files.closing_file(os.open(files_directory, os.O_RDONLY | os.O_DIRECTORY))


def _open_file(name: str, folder: int) -> BinaryIO:
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {name} in {files_directory}") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise
        raise DoNotRetry(f"cannot open {name}, perhaps a symbolic link: {error.strerror}") from None
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_FILE_BYTES:
        return os.fdopen(file, "rb")
    os.close(file)
    raise DoNotRetry(f"expected {name} to be a regular file of at most {MAX_FILE_BYTES} bytes")


def _sha256(source: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
    source.seek(0)
    return digest.hexdigest()


def _parts(source: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines, long ones in parts, and whether each part begins a line."""
    begins = True
    while part := source.readline(1 << 16):
        yield part, begins
        begins = part.endswith(b"\n")


def _copies(folder: int, name: str) -> list[str]:
    """Return the copies of files whose names match; slow in a large folder."""
    copy = re.compile(rf"\.{name}\.[0-9a-f]{{16}}\.[0-9]+\.stamped")  # contains a lease token
    return [each for each in os.listdir(folder) if copy.fullmatch(each)]


def remove_copies() -> None:
    """Remove the copies that killed consumers left, whose jobs may never be delivered again.

    A running consumer holds a lock on its copy.
    """
    with suppress(OSError, ValueError), _open_directory() as folder:  # each job reports such an error
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        for copy in _copies(folder, ".+"):
            with suppress(OSError), pqueue_files.closing_file(os.open(copy, flags, dir_fd=folder)) as file:
                if pqueue_files.try_lock(file):
                    os.unlink(copy, dir_fd=folder)


def create_locked(path: str | Path, flags: int, folder: int | None = None) -> int:
    """Create a file and lock it. Before it is locked, a program that starts may remove it as stale: then try again."""
    while True:
        with suppress(FileExistsError):
            file = pqueue_files.open_own(path, flags | os.O_CREAT, folder)
            if pqueue_files.try_lock(file) and os.fstat(file).st_nlink:
                return file
            os.close(file)


def _replace(name: str, folder: int, source: BinaryIO, prefix: bytes, digest: str, token: str) -> None:
    """Write a stamped copy and rename it over the file, so that a reader sees either the old file or the new one."""
    copy = f".{name}.{token}.stamped"
    with os.fdopen(create_locked(copy, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, folder), "wb") as target:
        pqueue_files.share_as_folder(target.fileno(), folder)
        try:
            if _stamp(source, target, prefix) != digest:
                raise OSError(f"{name} changed while it was read")
            os.rename(copy, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(copy, dir_fd=folder)
            raise
    # guard: a stamped copy's name is synced
    pqueue_files.sync_file(folder)


def _stamp(source: BinaryIO, target: BinaryIO, prefix: bytes) -> str:
    """Copy the file durably with a prefix on each line. Return the digest of what was read."""
    copied = hashlib.sha256()
    for part, begins in _parts(source):
        target.write(prefix + part if begins else part)
        copied.update(part)
    target.flush()
    # guard: a stamped copy is synced
    pqueue_files.sync_file(target.fileno())
    return copied.hexdigest()
