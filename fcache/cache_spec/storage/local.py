"""A cache in a folder of this machine, or of a network file system."""

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fcache.cache_spec.errors import CorruptError
from fcache.cache_spec.storage.files import (
    explained,
    make_folders,
    open_partial,
    partial_path,
    read_exactly,
    read_file,
    refuse_links,
    remove_if_empty,
    remove_orphans,
    sync_folder,
    unreadable,
    write_all,
    write_durably,
)
from fcache.cache_spec.storage.protocol import Range, checked

# File systems without hard links.
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class LocalFile:
    """A temporary file inside the cache that becomes a file of the cache by a rename."""

    def __init__(self, root: Path, target: Path) -> None:
        self._root, self._target = root, target
        with explained(root):
            self._temporary, self._file = open_partial(root)

    @property
    def descriptor(self) -> int:
        """Of the temporary file."""
        return self._file.fileno()

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        with explained(self._root):
            write_all(self._file, data)

    def close(self) -> None:
        """Makes the bytes durable."""
        with explained(self._root):
            os.fsync(self._file.fileno())
            self._file.close()

    def publish(self) -> None:
        """Renames the file; the folder is made durable, too."""
        with explained(self._target):
            make_folders(self._root, self._target.parent)
            self._temporary.replace(self._target)
            sync_folder(self._target.parent)

    def discard(self) -> None:
        """Removes what was written, if it was not published."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class LocalStorage:
    """A `Storage` in a folder."""

    root: Path

    @property
    def url(self) -> str:
        """The path as it was given."""
        return str(self.root)

    def path(self, name: str = "") -> Path:
        """The file's path."""
        return self.root / checked(name) if name else self.root

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return read_file(self.path(name))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Whole files. Raises FileNotFoundError."""
        return [read_file(f"{self.root}/{checked(name)}") for name in names]

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fills each (name, offset, out). Raises FileNotFoundError, and CorruptError if a file ends before."""
        for name, offset, out in ranges:
            path = self.path(name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                raise
            except OSError as e:
                raise unreadable(path, e) from e
            try:
                if read_exactly(fd, offset, out.data) < len(out):
                    raise CorruptError(f"{path} ends before byte {offset + len(out)}; run `fcache repair`")
            except OSError as e:
                raise unreadable(path, e) from e
            finally:
                os.close(fd)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        path = self.path(name)
        try:
            return path.stat().st_size
        except (FileNotFoundError, NotADirectoryError) as e:
            raise FileNotFoundError(*e.args) from e
        except OSError as e:
            raise unreadable(path, e) from e

    def names(self, folder: str) -> list[str]:
        """The names of the files right inside a folder, sorted."""
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(e.name for e in entries if not e.is_dir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as e:
            raise unreadable(self.path(folder), e) from e

    def walk(self) -> Iterator[tuple[str, int]]:
        """Every file with its bytes."""
        for folder, _, files in os.walk(self.root):
            for name in files:
                path = Path(folder) / name
                with suppress(FileNotFoundError):
                    yield path.relative_to(self.root).as_posix(), path.lstat().st_size

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file: after a crash it is absent, old or complete, never part."""
        refuse_links(self.root, name)
        with explained(self.path(name)):
            self._make_root()
            write_durably(self.root, self.path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file if there is none of that name, else returns False."""
        path = self.path(name)
        refuse_links(self.root, name)
        with explained(path):
            self._make_root()
            # Linked under its name with its content: one that is empty for a moment would say nothing for ever, if its
            # process were killed right then.
            whole, file = open_partial(self.root)
            try:
                with file:
                    write_all(file, data)
                for _ in range(8):
                    # Another process that finished may remove the folder while it is empty.
                    with suppress(FileNotFoundError):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        return self._link(whole, path, data)
            finally:
                whole.unlink(missing_ok=True)
        return False

    def _link(self, whole: Path, path: Path, data: bytes) -> bool:
        try:
            os.link(whole, path)
        except FileExistsError:
            return False
        except OSError as e:
            if e.errno not in NO_LINKS:
                raise
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return False
            with os.fdopen(fd, "wb") as f:
                f.write(data)
        return True

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Writes a small file if it still holds `old`, else returns False."""
        path = self.path(name)
        refuse_links(self.root, name)
        # A temporary file, so that it is cleaned up after if this process is killed right now.
        retired = partial_path(self.root)
        try:
            retired.parent.mkdir(exist_ok=True)
            path.rename(retired)
        except FileNotFoundError:
            return False
        try:
            # Of several processes that saw the same file, a slow one may have renamed what the first one put there.
            if retired.read_bytes() != old:
                with suppress(OSError):
                    os.link(retired, path)
                return False
        finally:
            retired.unlink(missing_ok=True)
        return self.create(name, new)

    def touch(self, name: str) -> None:
        """Renews the age of a file."""
        with suppress(FileNotFoundError):
            os.utime(self.path(name))

    def stamp(self, name: str) -> str:
        """The time of its last change. Raises FileNotFoundError."""
        return str(self.path(name).lstat().st_mtime_ns)

    def age(self, name: str) -> float:
        """Seconds since a file was written or touched. Raises FileNotFoundError."""
        return time.time() - self.path(name).lstat().st_mtime

    def remove(self, name: str) -> None:
        """Removes a file durably; nothing happens if there is none."""
        path = self.path(name)
        refuse_links(self.root, name)
        with explained(path), suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def new_file(self, name: str) -> LocalFile:
        """A file to be published under that name."""
        refuse_links(self.root, name)
        return LocalFile(self.root, self.path(name))

    def sweep(self) -> int:
        """Removes temporary files that dead processes left behind, and empty folders; returns how many files."""
        removed = remove_orphans(self.root)
        remove_if_empty(self.root / "partial", self.root / "claims")
        return removed

    def _make_root(self) -> None:
        if not self.root.is_dir():
            self.root.mkdir(parents=True, exist_ok=True)
            sync_folder(self.root.parent)

    def free_bytes(self) -> int:
        """Free bytes for this user where the folder is or will be."""
        path = self.root
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free
