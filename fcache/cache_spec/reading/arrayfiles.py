"""The files of one array: their names, their committed sizes and digests, and what is said when they differ."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.committed import Files
from fcache.cache_spec.errors import CorruptError, IncompleteError
from fcache.cache_spec.shardfile import shard_key
from fcache.cache_spec.storage.protocol import Storage


@dataclass(frozen=True)
class ArrayFiles:
    """The shard files of one array in its folder below the cache, of `slots` records each."""

    storage: Storage
    folder: str
    spec: ArraySpec
    slots: int
    committed: Files

    @cached_property
    def base(self) -> str:
        """The folder on this machine, "" on an object store."""
        path = self.storage.path(self.folder)
        return "" if path is None else str(path)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one uncompressed record."""
        return self.spec.record_bytes

    @cached_property
    def word(self) -> type[np.unsignedinteger]:
        """The widest unsigned integer of which records are made."""
        return np.uint64 if self.record_bytes % 8 == 0 else np.uint8

    def size(self, shard: int) -> int:
        """A file's committed bytes. Raises IncompleteError without a commit."""
        sizes = self.committed.sizes
        if not 0 <= shard < len(sizes) or sizes[shard] < 0:
            where = self.base or f"{self.storage.url}/{self.folder}"
            raise IncompleteError(f"shard {shard} of {where} is not committed; run the same `fcache extract`")
        return int(sizes[shard])

    def name(self, shard: int) -> str:
        """A file's name below the cache."""
        return f"{self.folder}/{shard_key(self.spec, shard)}"

    def shown(self, shard: int) -> str:
        """What a user calls a file: its path, or its URL."""
        return f"{self.base or f'{self.storage.url}/{self.folder}'}/{shard_key(self.spec, shard)}"


def missing(name: str) -> CorruptError:
    """The error for a committed file that is not there."""
    return CorruptError(f"{name} is missing, its commit names it; run `fcache repair`")


def check_table(files: ArrayFiles, shard: int) -> None:
    """Raises CorruptError if the commit's size of a table is not that of its records."""
    expected, found = files.slots * files.record_bytes, files.size(shard)
    if found != expected:
        raise CorruptError(f"{files.shown(shard)} has {found} bytes, its array has {expected}; run `fcache repair`")


def check_digest(files: ArrayFiles, shard: int, found: bytes) -> None:
    """Raises CorruptError if the SHA-256 of a file is not the commit's."""
    if found != files.committed.digests[shard].tobytes():
        raise CorruptError(f"{files.shown(shard)}: its SHA-256 differs from its commit; run `fcache repair`")
