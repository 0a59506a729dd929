"""The files of a queue on SQLite: creating, syncing, locking and renaming them, and noticing their replacement."""

from __future__ import annotations

import errno
import os
import stat
import struct
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

try:
    import fcntl
except ImportError:  # Windows: no locks, no wake-up pipes; a dead consumer is noticed by its lease only
    fcntl = None  # type: ignore[assignment]

from pqueue_values import DatabaseReplaced, QueueError, QueueFull, file_path, short

# File systems by their type in /proc/self/mounts. SQLite needs locks and shared memory that all processes see.
LOCAL_FILE_SYSTEMS = (
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "nilfs2", "reiserfs", "ufs", "hfsplus"),
    *("apfs", "tmpfs", "ramfs", "rootfs", "overlay", "aufs", "squashfs", "erofs", "iso9660", "unknown"),
)
SHARED_FILE_SYSTEMS = (  # prefixes of their types
    *("nfs", "cifs", "smb", "ncp", "afs", "9p", "ceph", "coda", "glusterfs", "lustre", "beegfs", "gpfs", "ocfs2"),
    *("gfs", "pvfs2", "orangefs", "moosefs", "vboxsf", "vmhgfs", "prl_fs", "virtiofs", "davfs", "fakeowner"),
    *("drvfs", "wekafs", "fuse.sshfs", "fuse.gluster", "fuse.ceph", "fuse.s3", "fuse.rclone", "fuse.juicefs"),
    *("fuse.gcsfuse", "fuse.goofys", "fuse.vmhgfs", "fuse.grpcfuse", "fuse.osxfs", "fuse.moosefs", "fuse.mfs"),
    *("fuse.lizardfs", "fuse.seaweedfs", "fuse.blobfuse", "fuse.cephfs", "fuse.smb", "fuse.nfs", "fuse.davfs"),
    *("fuse.mount.davfs", "fuse.wslfs"),
)


class Descriptor(int):
    """A descriptor that is kept. Other code of the process may close it, and its number then belong to another file."""

    def __init__(self, number: int) -> None:
        self._identity = identity(number)

    def is_open(self) -> bool:
        try:
            return identity(self) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        if self.is_open():
            os.close(self)


class FileLocks:
    """Locks on the files of an open database that remain when other code of the process closes these files.

    SQLite's locks are POSIX locks: the process loses them as soon as any of its code closes any descriptor of the file.
    Another process may then consider the database unused, and delete its log or clear its index. Open file description
    locks, where available, replace the two locks that prevent this. Offsets are those of SQLite's os_unix.c.
    """

    IN_USE = (0x40000002, 510)  # of the database, shared while it is open: SHARED_FIRST, SHARED_SIZE
    INDEX_IN_USE = (128, 1)  # of -shm, shared while it is open: UNIX_SHM_DMS
    WRITING = (120, 1)  # of -shm, exclusive: WAL_WRITE_LOCK
    AVAILABLE = hasattr(fcntl, "F_OFD_SETLK")

    _open: ClassVar[dict[tuple[int, int], FileLocks]] = {}  # by the identity of the database

    def __init__(self, path: Path, key: tuple[int, int]) -> None:
        self._key, self._users = key, 0  # connections
        self.were_lost = False  # files, when this process was forked
        self._files: list[Descriptor] = []
        with ExitStack() as undo:
            for suffix in ("", "-shm"):
                flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
                self._files.append(Descriptor(os.open(f"{path}{suffix}", flags)))
                undo.callback(self._files[-1].close)
            undo.pop_all()

    @classmethod
    def acquire(cls, path: Path) -> FileLocks | None:
        """Lock a database that a connection has opened; return None where the system has no such locks."""
        if not cls.AVAILABLE:
            return None
        cls.close_unused()
        key = identity(path)
        locks = cls._open[key] = cls._open.get(key) or cls(path, key)
        locks._users += 1
        # guard: locks survive a copy of the database
        locks._set(fcntl.F_RDLCK)
        return locks

    def has_lost_files(self) -> bool:
        """Return whether a descriptor of a connection was closed by other code: another file may have its number."""
        found = _count_open(self._key)
        return found is not None and found <= self._users  # one for each connection, and that of the locks

    def release(self) -> None:
        """Release the locks before a connection is closed: with the last one SQLite removes the log."""
        self._users -= 1
        if not self._users:
            self._set(fcntl.F_UNLCK)

    @staticmethod
    def is_log_missing(path: Path) -> bool:
        """Return whether the log was deleted or emptied while other processes have the database open.

        SQLite would start a new log with the index of the old one. Format: https://sqlite.org/walformat.html
        """
        index = Path(f"{path}-shm")
        if not FileLocks.AVAILABLE:
            return False

        def look() -> tuple[bool, bytes, int]:
            """Return whether others have it open, the header of the index, and how many names the index has."""
            is_open = _holder(file, fcntl.F_WRLCK, FileLocks.INDEX_IN_USE) != 0
            return is_open, os.pread(file, 96, 0), os.fstat(file).st_nlink

        try:
            if _count_open(identity(index)):
                return False
            with closing_file(os.open(index, os.O_RDONLY | os.O_NOFOLLOW)) as file:
                for _ in range(100):  # others may write to it meanwhile
                    before = is_open, header, _ = look()
                    is_set, page_bytes, frames = struct.unpack("12xBxHI", header[:20].ljust(20, b"\0"))
                    expected = 32 + frames * (24 + (page_bytes if page_bytes > 1 else 65536))
                    is_short = file_size(Path(f"{path}-wal")) < expected
                    if not (is_open and is_set and frames and is_short):
                        return False
                    # guard: a log that others truncate or delete in order is not missing
                    if look() == before:
                        break
                return True
        except FileNotFoundError:  # no process has the database open
            return False

    def writer(self) -> int:
        """Return the pid of the process that holds SQLite's write lock; 0: none."""
        return _holder(self._files[1], fcntl.F_RDLCK, self.WRITING)

    def _set(self, kind: int) -> None:
        for file, where in zip(self._files, (self.IN_USE, self.INDEX_IN_USE), strict=True):
            with suppress(OSError):  # a file system without them
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, _flock(kind, where))

    @classmethod
    def close_unused(cls) -> None:
        """Close unused descriptors, unless another descriptor of the same file would lose its POSIX locks."""
        for key, locks in list(cls._open.items()):
            # guard: locks of other connections are kept
            is_unused = not locks._users and _count_open(key, locks._files) == 0
            # Meanwhile, garbage collection may have closed them for another session.
            if is_unused and cls._open.pop(key, None) is not None:
                locks.close()

    @classmethod
    def abandon(cls) -> None:
        """Close the locks in a forked child: they belong to the parent."""
        for locks in cls._open.values():
            locks.were_lost = locks.has_lost_files()
            locks.close()
        cls._open.clear()

    def close(self) -> None:
        for file in self._files:
            file.close()


FLOCK = "hhqqi0q"  # struct flock


def _flock(kind: int, where: tuple[int, int]) -> bytes:
    return struct.pack(FLOCK, kind, os.SEEK_SET, *where, 0)


def _holder(file: int, kind: int, where: tuple[int, int]) -> int:
    """Return the pid of a process whose lock excludes this one; 0: none, -1: not of a process."""
    found, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_OFD_GETLK, _flock(kind, where)))
    return 0 if found == fcntl.F_UNLCK else int(pid)


def identity(path: str | bytes | os.PathLike[str] | int) -> tuple[int, int]:
    """Return the inode and the device of a file, also of an open one."""
    return os.stat(path)[1:3]


def status(path: str | os.PathLike[str], *, follow_symlinks: bool = True) -> os.stat_result | None:
    """Return the status of a file, or None if there is none: SQLite in another process deletes logs at any moment."""
    try:
        return os.stat(path, follow_symlinks=follow_symlinks)
    except (FileNotFoundError, NotADirectoryError):
        return None


def open_files() -> dict[int, tuple[int, int]]:
    """Return the device and inode of each open descriptor of this process; none where /proc does not show them, or no
    descriptor is free to look."""
    found: dict[int, tuple[int, int]] = {}
    with suppress(OSError):
        for number in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # it listed the others
                found[number] = identity(number)
    return found


def _count_open(file: tuple[int, int], excluded: Sequence[int] = ()) -> int | None:
    """Return how many other descriptors of a file this process has; None: unknown."""
    found = open_files()
    return sum(each == file for number, each in found.items() if number not in excluded) if found else None


class DatabaseFiles:
    """The files of a connection, to notice when one is replaced, moved or deleted."""

    # The resolution of st_mtime with a margin: 10 ms, or a second where only whole seconds are stored
    FINE_SECONDS, COARSE_SECONDS = 0.03, 3.0

    def __init__(self, path: Path, before: Collection[int]) -> None:
        """before: the descriptors of the process before SQLite opened the files."""
        self._path = path
        self._folder = os.fsencode(path.parent)
        self._names = [os.fsencode(f"{path}{suffix}") for suffix in ("", "-wal", "-shm")]
        self._opened = self._identities()
        opened: dict[tuple[int, int], list[int]] = {each: [] for each in self._opened}
        for number, file in open_files().items():
            if before and number not in before and file in opened:
                opened[file].append(number)
        # Of two, one belongs to a connection that another thread has opened for itself.
        self._descriptors = [numbers[0] for numbers in opened.values() if len(numbers) == 1]
        for number in self._descriptors:
            os.set_blocking(number, False)  # a mark: on a file it has no effect
        self._changed_ns = 0  # st_mtime of the folder when all files were last found in place
        self._folder_identity: tuple[int, ...] = ()

    def are_open(self) -> bool:
        """Return False if a descriptor was closed by other code: what is written might reach another file."""
        try:
            for number in self._descriptors:
                if os.get_blocking(number):
                    return False
        except OSError:  # it is closed
            return False
        return True

    def expect_in_place(self) -> None:
        """Raise DatabaseReplaced unless all are in place. One stat suffices while the folder is unchanged."""
        try:
            folder = os.stat(self._folder)
        except OSError:
            raise replaced(self._path) from None
        if folder.st_mtime_ns != self._changed_ns or folder[1:3] != self._folder_identity:
            if self._identities() != self._opened:
                raise replaced(self._path)
            is_whole = folder.st_mtime_ns % 1_000_000_000 == 0
            if time.time() - folder.st_mtime > (self.COARSE_SECONDS if is_whole else self.FINE_SECONDS):
                # Any later change will give the folder another st_mtime.
                self._changed_ns, self._folder_identity = folder.st_mtime_ns, folder[1:3]

    def _identities(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for name in self._names:
            with suppress(OSError):
                found.append(identity(name))
        return found


def replaced(path: Path) -> DatabaseReplaced:
    return DatabaseReplaced(
        f"cannot use {path}: the database was replaced or moved, or its log deleted, while it was open; restart"
    )


def deleted_but_open(path: Path) -> Iterator[str]:
    """Yield a message for each process that has a deleted file of this database open, as far as /proc shows."""
    deleted = {f"{path}{suffix} (deleted)" for suffix in ("", "-wal", "-shm")}
    processes: list[int] = []
    with suppress(OSError):
        processes = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    for process in processes:
        with suppress(OSError):  # it has ended, or belongs to another account
            folder = f"/proc/{process}/fd"
            if any(os.readlink(f"{folder}/{file}") in deleted for file in os.listdir(folder)):
                yield f"process {process} has a deleted file of this database open and cannot write to it: restart it"


def real_path(path: str | os.PathLike[str]) -> Path:
    try:
        return file_path(path).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise QueueError(f"cannot open {path}: {error}") from error


OWN = stat.S_IRUSR | stat.S_IWUSR
SHARED = stat.S_ISGID | stat.S_IWGRP  # mode of a folder shared by a group: files created in it belong to the group


def create_file(path: Path, group: int | None = None) -> None:
    with closing_file(open_own(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)) as file:
        if group is not None:
            os.fchown(file, -1, group)
            os.fchmod(file, 0o660)


def group_of(path: Path) -> int | None:
    """Return the group that may use a file; None: only its account may, or there is no file."""
    found = status(path)
    return found.st_gid if found and found.st_mode & 0o060 == 0o060 else None


@contextmanager
def part_of(target: Path, group: int | None = None) -> Iterator[Path]:
    """Create a file next to the target, to be renamed to it when complete; delete it if it was not.

    Only this account may use it, or the group as well.
    """
    # guard: a backup is complete before it gets its name
    part = target.with_name(f"{target.name}.{os.urandom(4).hex()}.part")
    create_file(part, group)
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def closing_file(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)


def open_own(path: str | os.PathLike[str], flags: int, folder: int | None = None) -> int:
    """Open a file in a way that may create it, for this account only, and usable by it whatever the umask."""
    # guard: files are private
    file = os.open(path, flags, 0o600, dir_fd=folder)
    found = os.fstat(file)
    # guard: files are usable
    if found.st_mode & OWN != OWN and found.st_uid == os.geteuid():
        os.fchmod(file, stat.S_IMODE(found.st_mode) | OWN)
    return file


def open_private(path: Path) -> int:
    file = open_own(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
    share_as_folder(file, path.parent)
    return file


def share_as_folder(file: int, folder: int | os.PathLike[str]) -> None:
    """Let the group use a file of this account if the folder is shared by a group."""
    if os.stat(folder).st_mode & SHARED == SHARED and os.fstat(file).st_uid == os.geteuid():
        os.fchmod(file, 0o660)


def group_number(group: str) -> int:
    try:
        import grp

        return grp.getgrnam(group).gr_gid
    except (ImportError, KeyError, TypeError, ValueError):
        raise ValueError(f"expected a group of this system, got {short(group)}") from None


def error_reason(error: OSError, path: Path) -> str:
    """Return the system's message; if permission is denied, also who owns the file and what to do."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.EACCES, errno.EPERM):
        return reason
    for each in (path, *path.parents):
        with suppress(OSError, ImportError, KeyError):
            import pwd

            found = each.stat()
            if found.st_uid == os.geteuid():
                mode = stat.S_IMODE(found.st_mode)
                return f"{reason}: {each} has mode {mode:04o}; change it with chmod, or choose another path"
            owner = pwd.getpwuid(found.st_uid).pw_name
            is_readable = each != path and os.access(each, os.X_OK)  # there is no queue yet
            instead = "choose another path" if is_readable else "create the queue with PQUEUE_GROUP=GROUP"
            return f"{reason}: {each} belongs to {owner}; run this as {owner}, or {instead}"
    return reason


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Raise QueueError for an OSError."""
    try:
        yield
    except OSError as error:
        # guard: a full disk is not the end of a program that waits for room
        kind = QueueFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else QueueError
        raise kind(f"cannot open {path}: {error_reason(error, path)}") from error


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder: a power cut may undo unsynced ones."""
    if fcntl is None:
        return
    with closing_file(os.open(path, os.O_RDONLY)) as file:
        sync_file(file)


def sync_file(file: int) -> None:
    """Sync an open file or folder. On macOS fsync leaves the data in the drive's cache; F_FULLFSYNC does not."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # the file system does not support it
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def make_folder(folder: Path, group: int | None = None) -> None:
    """Create a folder and its missing parents, and sync them.

    It is accessible to this account only, unless a group is given or its parent is shared by a group.
    """
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        with suppress(FileExistsError):
            missing.mkdir(mode=0o700)
            missing.chmod(missing.stat().st_mode | stat.S_IRWXU)  # whatever the umask
        if group is not None:
            os.chown(missing, -1, group)
        if group is not None or missing.parent.stat().st_mode & SHARED == SHARED:
            missing.chmod(0o2770)
        # guard: the folder of a new queue is synced
        sync(missing.parent)


@contextmanager
def temporary_folder(prefix: str | None = None, parent: Path | None = None) -> Iterator[Path]:
    """Create a folder, for this account only, and delete it with its files at the end."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        os.chmod(name, stat.S_IRWXU)  # whatever the umask
        yield Path(name)


def file_size(path: Path) -> int:
    return found.st_size if (found := status(path)) else 0


def has_locks() -> bool:
    """Return whether the platform has locks that are released when their process ends."""
    return fcntl is not None


def try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: int) -> None:
    fcntl.flock(file, fcntl.LOCK_UN)


def is_stopped(pid: object) -> bool:
    """Return whether a process was stopped by a signal or a debugger, as far as /proc shows."""
    try:
        found = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return found.rpartition(b")")[2].split()[0] in (b"T", b"t")


def file_system(folder: Path) -> str:
    """Return the type of the folder's file system, or "unknown" where /proc does not show it."""
    real = f"{folder.resolve()}/"
    # guard: a network drive is recognized by its last mount
    under = {len(point): kind for point, kind in _mounts() if real.startswith(f"{point.rstrip('/')}/")}
    return os.fsdecode(under[max(under)]) if under else "unknown"


def is_mounted(path: Path) -> bool:
    """Return whether this very file or folder is a mount point, as far as /proc shows."""
    return any(point == str(path) for point, _ in _mounts())


def _mounts() -> list[tuple[str, bytes]]:
    """Return the mount points and the types of their file systems."""
    try:
        mounts = [line.split(b" ") for line in Path("/proc/self/mounts").read_bytes().splitlines()]
    except OSError:
        return []
    return [(os.fsdecode(mount[1].decode("unicode_escape").encode("latin-1")), mount[2]) for mount in mounts]


LOGS = ("-wal", "-journal")  # SQLite applies them to any database of that name
IN_RESTORE = b"A restore of a queue was interrupted here. Run it again.\n"


def move_into_place(part: Path, target: Path, *, is_new: bool) -> None:
    """Rename the file to the target. No log of the old target may exist by then."""
    logs = [log for suffix in LOGS if (log := Path(f"{target}{suffix}")).exists()]
    if is_new:
        create_file(target)  # reserves the name; fails if another process has created it
    elif logs:  # of a damaged database, which must not be opened without them
        placeholder = part.with_suffix(".placeholder")
        create_file(placeholder)
        placeholder.write_bytes(IN_RESTORE)
        sync(placeholder)
        placeholder.replace(target)
        sync(target.parent)
    try:
        for each in (*logs, Path(f"{target}-shm")):
            each.unlink(missing_ok=True)
        # guard: no old log reappears next to a restored file
        sync(target.parent)
        part.replace(target)
    except OSError:
        if is_new:
            target.unlink()
        raise
    # guard: a backup's name is synced
    sync(target.parent)
