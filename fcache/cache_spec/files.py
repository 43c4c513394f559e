"""Durable files: temporary file, fsync, rename; and one wording for full disks and read-only folders."""

import errno
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fcache.cache_spec.errors import DataError, NoSpaceError

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def explained(path: Path) -> Iterator[None]:
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
        raise


def partial_path(root: Path) -> Path:
    """A fresh temporary path of this process inside the cache (renames never cross a file system)."""
    folder = root / "partial"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"


def remove_orphans(root: Path) -> int:
    """Removes temporary files of dead processes of this host; returns how many."""
    removed = 0
    for path in (root / "partial").glob("*~*~*"):
        host, pid, _ = path.name.split("~")
        if host == socket.gethostname() and not process_alive(int(pid)):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def process_alive(pid: int) -> bool:
    """Whether a process of this host exists (and is no zombie, where /proc tells)."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
    while folder != root and not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def write_durably(root: Path, path: Path, data: bytes) -> None:
    """Writes a small file so that after a crash it is absent, old or complete, never part."""
    with explained(path):
        temporary = partial_path(root)
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            make_folders(root, path.parent)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def remove_if_empty(*folders: Path) -> None:
    """Removes folders that hold nothing, deepest first."""
    for folder in folders:
        for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            with suppress(OSError):
                path.rmdir()
        with suppress(OSError):
            folder.rmdir()
