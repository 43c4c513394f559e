"""Durable files: temporary file, fsync, rename; and one wording for full disks, read-only folders, unreadable files."""

import ctypes
import errno
import os
import socket
import stat
import sys
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

from fcache.cache_spec.errors import CorruptError, DataError, NoSpaceError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BLOCKED = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
# Another host's processes cannot be asked; nothing that is being written rests for a day.
ORPHAN_SECONDS = 86400.0
LARGEST_READ = 1 << 30


@contextmanager
def explained(path: Path) -> Generator[None]:
    """Turns "disk full" into NoSpaceError and "not writable" into DataError, naming `path`."""
    try:
        yield
    except OSError as e:
        if e.errno in FULL:
            raise NoSpaceError(
                f"no space left (or quota exceeded) while writing {path}: free some space and run the same command "
                "again, it continues"
            ) from e
        if e.errno in REFUSED:
            raise DataError(f"cannot write {path}: {e.strerror}; choose a writable --cache or fix permissions") from e
        if e.errno in SCARCE:
            raise DataError(f"cannot write {path}: {_scarce(e)}") from e
        if e.errno in BLOCKED:
            raise DataError(f"cannot write {e.filename or path}: {e.strerror}; move what is there away") from e
        raise


def read_file(path: Path | str) -> bytes:
    """The bytes of a small file. Raises FileNotFoundError, DataError without permission, CorruptError if it cannot be
    read: what is no regular file (a pipe would wait for ever) or is larger than any file that is read whole.
    """
    try:
        # Not through Path: a cache of many shards has many commits.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            state = os.fstat(fd)
            if not stat.S_ISREG(state.st_mode) or state.st_size > LARGEST_READ:
                raise CorruptError(
                    f"{path} is no file of a cache (type {stat.S_IFMT(state.st_mode):o}, {state.st_size} bytes)"
                )
            found = os.read(fd, state.st_size + 1)
            while len(found) < state.st_size and (more := os.read(fd, state.st_size)):
                found += more
            return found
        finally:
            os.close(fd)
    except FileNotFoundError as e:
        if os.path.islink(path):
            raise CorruptError(f"{path} is a broken link; remove it, or restore what it points to") from e
        raise
    except OSError as e:
        raise unreadable(path, e) from e


def _scarce(e: OSError) -> str:
    what = "memory (`ulimit -v`)" if e.errno == errno.ENOMEM else "open files (`ulimit -n`)"
    return f"{e.strerror}; raise the limit of {what}"


def write_all(file: FileIO, data: bytes | memoryview) -> None:
    """Writes every byte: an unbuffered file may take fewer at a time."""
    left = memoryview(data)
    while len(left):
        left = left[file.write(left) or 0 :]


def read_exactly(fd: int, offset: int, out: memoryview) -> int:
    """Fills `out` from a descriptor; returns how many bytes there were, fewer only at the end of the file."""
    done = 0
    while done < len(out):
        n = os.preadv(fd, [out[done:]], offset + done)
        if n == 0:
            break
        done += n
    return done


def unreadable(path: Path | str, e: OSError) -> DataError | CorruptError:
    """The error for a file of a cache that is there but cannot be read."""
    if e.errno in REFUSED:
        return DataError(f"cannot read {path}: {e.strerror}; fix its permissions")
    if e.errno in SCARCE:
        return DataError(f"cannot read {path}: {_scarce(e)}")
    return CorruptError(f"{path} cannot be read: {e.strerror}")


def partial_path(root: Path) -> Path:
    """A fresh path for a temporary file of this process inside the cache: renames never cross a file system."""
    return root / "partial" / f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"


def open_partial(root: Path) -> tuple[Path, FileIO]:
    """A new temporary file of this process inside the cache, open for reading and writing, without a buffer."""
    path = partial_path(root)
    for _ in range(1000):
        # A process that finishes removes the folder while it is empty, perhaps between these two steps.
        with suppress(FileNotFoundError):
            path.parent.mkdir(exist_ok=True)
            return path, path.open("x+b", buffering=0)
    raise DataError(f"cannot write {path}: the cache was removed")


def remove_orphans(root: Path) -> int:
    """Removes temporary files of dead processes of this host, and old ones of other hosts; returns how many."""
    removed = 0
    folder = root / "partial"
    refuse_links(root, "partial/x")
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    for name in names:
        host, _, rest = name.partition("~")
        pid = rest.partition("~")[0]
        with suppress(OSError):
            if host == socket.gethostname() and pid.isdecimal():
                orphaned = not process_alive(int(pid))
            else:
                orphaned = time.time() - (folder / name).stat().st_mtime > ORPHAN_SECONDS
            if orphaned:
                (folder / name).unlink()
                removed += 1
    return removed


def process_alive(pid: int) -> bool:
    """Whether a process of this host exists (and is no zombie, where /proc tells)."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def begin_writing(fd: int, offset: int, length: int) -> None:
    """Has the disk begin with written bytes, where the system can (Linux); only an fsync makes them durable."""
    if sys.platform == "linux":
        _sync_file_range()(fd, offset, length, 2)


@cache
def _sync_file_range() -> Any:
    function = ctypes.CDLL(None).sync_file_range
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def refuse_links(root: Path, name: str) -> None:
    """Raises DataError if a folder on the way to a file of a cache is a link: what is removed there lies elsewhere."""
    path = root
    for part in name.split("/")[:-1]:
        path = path / part
        if path.is_symlink():
            raise DataError(f"{path} is a link; nothing is written or removed behind links inside a cache")


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folders(root: Path, folder: Path) -> None:
    """Creates `folder` below `root` and makes each new entry durable."""
    missing = []
    while folder != root and not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def write_durably(root: Path, path: Path, data: bytes) -> None:
    """Writes a small file so that after a crash it is absent, old or complete, never part."""
    with explained(path):
        temporary, file = open_partial(root)
        try:
            with file:
                write_all(file, data)
                os.fsync(file.fileno())
            make_folders(root, path.parent)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def remove_if_empty(*folders: Path) -> None:
    """Removes folders that hold nothing, deepest first."""
    for top in folders:
        if top.is_symlink():
            continue
        for folder, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(folder)
