"""What is committed of one part of a group, in little memory: hundreds of thousands of shards are no rare sight."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.commits import Commit
from fcache.cache_spec.errors import CorruptError, IncompatibleError
from fcache.cache_spec.layout import FEATURES, Group, Manifest, part_arrays
from fcache.cache_spec.shardfile import shard_key

# Bytes that zstd makes of one: a run of 128 kB in four bytes.
ZSTD_MOST = 1 << 16
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Files:
    """The shard files of one array: `sizes` int64 [shards] in bytes, -1 without a commit; `digests` uint8 [shards, 32],
    their SHA-256.
    """

    sizes: np.ndarray
    digests: np.ndarray


@dataclass(frozen=True)
class Committed:
    """The valid commits of one part of one group.

    `shards` are their numbers, sorted; `files` holds one entry an array, by its path relative to the group; `contents`
    uint8 [shards, 32] digests what each shard holds; `quarantined` maps a shard to its samples without a record.
    """

    shards: np.ndarray
    files: Mapping[str, Files]
    contents: np.ndarray
    quarantined: Mapping[int, Mapping[str, str]]
    bytes: int

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[int]:
        return iter(self.shards.tolist())

    def content(self, shard: int) -> str:
        """The digest of what a shard holds: `Commit.content`."""
        return self.contents[shard].tobytes().hex()


def gather(
    manifest: Manifest, group: Group, part: str, commits: Iterable[Commit], *, tables: str, url: str
) -> Committed:
    """What these commits of a part of a group say, of which none is kept; `tables` digests the cache's fitted tables.

    Raises IncompatibleError for features of other settings, CorruptError for a commit that does not fit the manifest.
    """
    wanted, arrays = manifest.part_key(part), part_arrays(group, part)
    shards = {s.index: s for s in group.shards()}
    sizes = {path: [-1] * group.num_shards for path in arrays}
    digests = {path: bytearray(32 * group.num_shards) for path in arrays}
    keys = {path: shard_key(spec, 0).split("0", 1) for path, spec in arrays.items()}
    ends = [(path, f"{group.path}/{path}/{before}", after) for path, (before, after) in keys.items()]
    least = {path: _least_bytes(spec) for path, spec in arrays.items()}
    contents = bytearray(32 * group.num_shards)
    found: list[int] = []
    quarantined: dict[int, Mapping[str, str]] = {}
    total = 0
    for c in commits:
        if c.key != wanted and part == FEATURES:
            raise IncompatibleError(
                f"shard {c.shard} of {group.path!r} was written with other settings ({c.key[:12]}, the cache is "
                f"{wanted[:12]}); run `fcache verify`"
            )
        # A cache that grew after this reader read its manifest has more shards than the manifest says.
        if c.key != wanted or c.shard not in shards:
            continue
        if part == FEATURES and c.tables != tables:
            raise CorruptError(
                f"{url}: shard {c.shard} of {group.path!r} was coded with other tables ({c.tables[:12]!r}) than the "
                f"cache has ({tables[:12]!r}); run `fcache repair`"
            )
        if not c.fits(shards[c.shard], group.ids):
            raise CorruptError(f"{url}: commit {c.shard} of {group.path!r} ({part}) does not fit the manifest")
        place = slice(32 * c.shard, 32 * c.shard + 32)
        for path, before, after in ends:
            name = f"{before}{c.shard}{after}"
            if name not in c.files:
                raise CorruptError(f"{url}: commit {c.shard} of {group.path!r} ({part}) lacks {name}")
            size, sha = c.files[name]
            # Before anyone makes room for a record.
            small = size < least[path] and len(c.quarantined) < c.count
            if small or not 0 <= size < 2**62 or not SHA256.fullmatch(sha):
                raise CorruptError(
                    f"{url}: commit {c.shard} of {group.path!r} ({part}) says that {name} has {size} bytes and the "
                    f"SHA-256 {sha!r}; a record of {arrays[path].record_bytes} bytes cannot be in it"
                )
            sizes[path][c.shard] = size
            digests[path][place] = bytes.fromhex(sha)
            total += size
        contents[place] = bytes.fromhex(c.content)
        found.append(c.shard)
        if c.quarantined:
            quarantined[c.shard] = c.quarantined
    files = {path: Files(np.asarray(sizes[path], dtype=np.int64), _digests(digests[path])) for path in arrays}
    return Committed(np.asarray(sorted(found), dtype=np.int64), files, _digests(contents), quarantined, total)


def _least_bytes(spec: ArraySpec) -> int:
    """A file with a record of this array is at least as large."""
    return spec.record_bytes // ZSTD_MOST if spec.compression == "zstd" else spec.record_bytes


def _digests(joined: bytearray) -> np.ndarray:
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)
