"""Where a cache lies: a folder, or a prefix of an object store. Names are POSIX paths below it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fcache.cache_spec.errors import SpecError

Range = tuple[str, int, np.ndarray]


class NewFile(Protocol):
    """A file that does not exist yet: write, close, then publish under its name, or discard."""

    @property
    def descriptor(self) -> int:
        """Of the local file that takes the bytes: what was written can be read back until it is closed."""
        ...

    def write(self, data: "bytes | memoryview") -> None:
        """Appends bytes."""
        ...

    def close(self) -> None:
        """Ends the file and makes its bytes durable where that is possible; nobody sees it yet."""
        ...

    def publish(self) -> None:
        """Gives the closed file its name, whole, replacing what was there."""
        ...

    def discard(self) -> None:
        """Removes what was written, if it was not published."""
        ...


class Storage(Protocol):
    """The files of one cache. Thread-safe; errors say what to do (DataError, CorruptError, NoSpaceError)."""

    @property
    def url(self) -> str:
        """What a user calls it: a path, or s3://bucket/prefix."""
        ...

    def path(self, name: str = "") -> Path | None:
        """The file on this machine, None on an object store."""
        ...

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        ...

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Whole files, together where that saves waiting. Raises FileNotFoundError."""
        ...

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fills each (name, offset, out uint8 [n], contiguous), together where that saves waiting.

        Raises FileNotFoundError, and CorruptError if a file ends before.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names of the files right inside a folder, sorted; none if there is no such folder."""
        ...

    def walk(self) -> Iterator[tuple[str, int]]:
        """Every file with its bytes."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file: after a crash it is absent, old or complete, never part."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small file if there is none of that name, else returns False; of several processes one succeeds."""
        ...

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Writes a small file if it still holds `old`, else returns False; of several processes one succeeds."""
        ...

    def touch(self, name: str) -> None:
        """Renews the age of a file that this process wrote."""
        ...

    def stamp(self, name: str) -> str:
        """Something that changes whenever a file is written or touched. Raises FileNotFoundError."""
        ...

    def age(self, name: str) -> float:
        """Seconds since a file was written or touched. Raises FileNotFoundError."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file durably; nothing happens if there is none."""
        ...

    def new_file(self, name: str) -> NewFile:
        """A file to be published under that name."""
        ...

    def sweep(self) -> int:
        """Removes temporary files that dead processes left behind; returns how many."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that may still be written, None where nobody can tell."""
        ...


def checked(name: str) -> str:
    """A name below the cache. Raises SpecError for one that would lead elsewhere."""
    parts = name.split("/")
    if any(p in ("", ".", "..") for p in parts) or not name.isprintable() or "\\" in name:
        raise SpecError(f"a file of a cache is named a/b/c, without '..', '.', '\\' and empty parts; got {name!r}")
    return name


def is_url(where: Path | str) -> bool:
    """Whether `where` names an object store, not a path."""
    return "://" in str(where)


def open_storage(where: "Path | str | Storage") -> Storage:
    """The storage at a path or at an object-store URL (s3://bucket/prefix); nothing needs to be there yet."""
    if not isinstance(where, (Path, str)):
        return where
    if is_url(where):
        from fcache.cache_spec.storage.objects import open_objects

        return open_objects(str(where))
    if str(where).startswith("s3:"):
        raise SpecError(f"an object store is written s3://bucket/prefix, got {where}")
    from fcache.cache_spec.storage.local import LocalStorage

    return LocalStorage(Path(where))
