"""Access to the records of arrays: a whole batch, of all its arrays, is copied into buffers by one call."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.held import HELD_RECORD_BYTES, HeldTable
from fcache.cache_spec.mapping import copy_all, copy_words
from fcache.cache_spec.opened import ArrayFiles, OpenShard, check_table
from fcache.cache_spec.ranges import Wanted, hold_objects, read_objects
from fcache.cache_spec.reading import ReadOptions as ReadOptions
from fcache.cache_spec.shardfile import decode_zstd
from fcache.cache_spec.shardpool import OpenShards as OpenShards
from fcache.cache_spec.storage import Storage

# Records of a batch that are asked whether they are in memory: some microseconds.
SAMPLED = 4
# Up to this an assignment is faster than `copy_words` (AMD EPYC: 0.5 us against 0.7 us for 384 bytes, equal at 20 kB).
SMALL_BYTES = 16384


class ArrayAccess:
    """Reads records of one array of one group into buffers; safe to use from several threads.

    `sizes` are the committed shards with the bytes and the SHA-256 of their files.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        spec: ArraySpec,
        *,
        shard_records: int,
        sizes: dict[int, tuple[int, str]],
        shards: OpenShards,
    ) -> None:
        self.spec, self.dtype = spec, np.dtype(spec.dtype)
        self.pool, self.num_shards = shards, max(sizes, default=-1) + 1
        found = np.full(self.num_shards, -1, dtype=np.int64)
        for shard, (size, _) in sizes.items():
            found[shard] = size
        base = storage.path(folder)
        # Kept only where they are compared: 64 characters a file.
        wanted = shards.digested is not None or (base is None and spec.layout == "table")
        digests = {shard: digest for shard, (_, digest) in sizes.items()} if wanted else {}
        self.files = ArrayFiles(storage, folder, "" if base is None else str(base), spec, shard_records, found, digests)
        self.held: HeldTable | None = None
        if spec.layout == "table" and (base is None or spec.record_bytes <= HELD_RECORD_BYTES):
            self.held = HeldTable(spec, shard_records, self.num_shards, shards.reserve)

    def read_into(self, records: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Copies records into the rows of `out`; see `read_arrays`."""
        read_arrays([(self, records, out)])

    def read(self, record: int) -> np.ndarray:
        """One record as a new array."""
        out = np.empty((1, *self.spec.shape), dtype=self.dtype)
        read_arrays([(self, [record], out)])
        return out[0]


Run = tuple[int, int, int, int]
Span = int | slice


@dataclass(frozen=True)
class _Places:
    """Where the records of a batch lie: shard and slot of each [n], and the runs of those that follow each other.

    `shards_of` has the shard of each run, `spans` its end in the shard, its slots and its rows, as numpy indexes them.
    """

    shards: np.ndarray
    slots: np.ndarray
    runs: list[Run]
    shards_of: list[int]
    spans: list[tuple[int, Span, Span]]
    lowest: int
    highest: int


Job = tuple[ArrayAccess, Sequence[int] | np.ndarray, np.ndarray]
_Rest = tuple[ArrayAccess, _Places, np.ndarray]


def read_arrays(jobs: Sequence[Job]) -> None:
    """Copies records of several arrays of one cache: each job is (array, records [n], out), as one batch.

    `out` is C-contiguous [n, *spec.shape] of the spec's type. Files that are mapped are copied from, or asked for
    ahead if they are on disk; ranges of objects are read all at once. Raises IncompleteError for a record of a shard
    that is not committed, CorruptError for a damaged one.
    """
    placed: dict[tuple[int, int], _Places] = {}
    rest: list[_Rest] = []
    for access, records, out in jobs:
        if len(records) == 0:
            continue
        # A batch has the same records of every array.
        key = (id(records), access.files.slots)
        places = placed.get(key)
        if places is None:
            places = placed[key] = _place(records, access.files.slots)
        # Numpy counts negative numbers from the end.
        access.files.size(places.lowest)
        access.files.size(places.highest)
        if access.held is None or not access.held.take(places.shards, places.slots, out):
            rest.append((access, places, out))
    if rest and rest[0][0].pool.mode == "ranges":
        _read_ranges(rest)
    elif rest:
        _read_files(rest)


def _place(records: Sequence[int] | np.ndarray, slots: int) -> _Places:
    found, within = np.divmod(np.asarray(records, dtype=np.int64), slots)
    shards, runs = found.tolist(), list[Run]()
    last, next_slot = -1, -1
    for row, (shard, slot) in enumerate(zip(shards, within.tolist(), strict=True)):
        if slot == next_slot and shard == last:
            of, slot_of, row_of, count = runs[-1]
            runs[-1] = (of, slot_of, row_of, count + 1)
        else:
            runs.append((shard, slot, row, 1))
        last, next_slot = shard, slot + 1
    spans = list[tuple[int, Span, Span]]()
    for _, slot, row, n in runs:
        # Whole numbers are a little faster than slices of one.
        one = n == 1
        spans.append((slot + n, slot if one else slice(slot, slot + n), row if one else slice(row, row + n)))
    return _Places(found, within, runs, [run[0] for run in runs], spans, min(shards), max(shards))


def _read_ranges(rest: Sequence[_Rest]) -> None:
    pool = rest[0][0].pool
    hold_objects(pool, [(a.held, a.files, p.shards) for a, p, _ in rest if a.held is not None])
    wanted = [
        Wanted(a.files, places.runs, _bytes(out))
        for a, places, out in rest
        if a.held is None or not a.held.take(places.shards, places.slots, out)
    ]
    if wanted:
        read_objects(pool, wanted)


def _read_files(rest: Sequence[_Rest]) -> None:
    large: list[_Rest] = []
    for access, places, out in rest:
        if access.held is None:
            large.append((access, places, out))
            continue
        _hold(access, access.held, places)
        if not access.held.take(places.shards, places.slots, out):
            # More tables than are kept: opened for a moment, for so many files cannot stay open.
            for shard, slot, row, count in places.runs:
                _read_run(access.pool.once(access.files, shard), access.spec, slot, _bytes(out)[row : row + count])
    if large:
        _ask_ahead(large)
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for access, places, out in large:
        files = access.pool.get(access.files, places.shards_of)
        rows = out.reshape(len(out), -1).view(access.files.word)
        small = access.files.record_bytes <= SMALL_BYTES
        for i, (file, (end, slots, to)) in enumerate(zip(files, places.spans, strict=True)):
            words = file.words
            if end > len(words):
                _, slot, row, count = places.runs[i]
                _read_run(file, access.spec, slot, rows[row : row + count].view(np.uint8))
            elif small:
                rows[to] = words[slots]
            else:
                sources.append(words[slots])
                targets.append(rows[to])
    # At last and in one go: each copy empties the processor's caches of all that the next one would need of Python.
    copy_all(sources, targets)


def _hold(access: ArrayAccess, held: HeldTable, places: _Places) -> None:
    files = access.files
    for shard in held.lacking(places.shards):
        check_table(files, shard)
        size = files.size(shard)
        if held.admits(size):
            data = np.empty(size, dtype=np.uint8)
            access.pool.once(files, shard).read(0, data)
            held.add(shard, data)


def _ask_ahead(rest: Sequence[_Rest]) -> None:
    """Asks for all records of a batch, if a sample of the largest is not in memory or that is what the options say."""
    pool = rest[0][0].pool
    if pool.options.ahead == "none":
        return
    access, places, _ = max(rest, key=lambda job: job[0].files.record_bytes)
    if pool.options.ahead == "auto":
        step = -(-len(places.runs) // SAMPLED)
        files = pool.get(access.files, places.shards_of[::step])
        if not any(f.sleeps(*f.place(run[1])) for f, run in zip(files, places.runs[::step], strict=True)):
            return
    for access, places, _ in rest:
        for file, (_, slot, _, count) in zip(pool.get(access.files, places.shards_of), places.runs, strict=True):
            for offset, length in file.places(slot, count):
                file.wake(offset, length)


def _read_run(file: OpenShard, spec: ArraySpec, slot: int, rows: np.ndarray) -> None:
    """Fills rows, uint8 [n, bytes], with the records from `slot` on, in whatever way the file allows."""
    if slot + len(rows) <= file.even and file.data is None:
        file.read(slot * rows.shape[1], rows.reshape(-1))
        return
    for row, (offset, length) in zip(rows, file.places(slot, len(rows)), strict=True):
        if spec.compression == "none":
            if file.data is None:
                file.read(offset, row)
            else:
                copy_words(file.data[offset : offset + length], row)
            continue
        if file.data is None:
            frame = np.empty(length, dtype=np.uint8)
            file.read(offset, frame)
        else:
            frame = file.data[offset : offset + length]
        decode_zstd(frame, row, file.name)


def _bytes(out: np.ndarray) -> np.ndarray:
    return out.reshape(len(out), -1).view(np.uint8)
