"""Records out of files of this machine: copied from maps, read by position, asked for ahead where they are on disk."""

from collections.abc import Sequence

import numpy as np

from fcache.cache_spec.reading.arrayfiles import check_table
from fcache.cache_spec.reading.held import HeldTable
from fcache.cache_spec.reading.mapping import copy_all, copy_words
from fcache.cache_spec.reading.opened import OpenShard
from fcache.cache_spec.reading.places import Wanted
from fcache.cache_spec.reading.shardpool import OpenShards
from fcache.cache_spec.shardfile import decode_zstd

# Records of a batch that are asked whether they are in memory: some microseconds.
SAMPLED = 4
# Up to this an assignment is faster than `copy_words` (AMD EPYC: 0.5 us against 0.7 us for 384 bytes, equal at 20 kB).
SMALL_BYTES = 16384


def read_files(pool: OpenShards, wanted: Sequence[Wanted]) -> None:
    """Fills all of `wanted` out of maps or by position; small tables are held.

    Raises CorruptError for a file that is missing, too short or damaged.
    """
    for w in wanted:
        if w.held is not None:
            _read_table(pool, w, w.held)
    large = [w for w in wanted if w.held is None]
    if large:
        _ask_ahead(pool, large)
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    frames: list[np.ndarray] = []
    for w in large:
        rows, runs = w.out.reshape(len(w.out), -1).view(w.files.word), w.places.runs
        small, packed = w.files.record_bytes <= SMALL_BYTES, w.files.spec.compression != "none"
        files = pool.get(w.files, w.places.firsts)
        for i, (file, (end, slots, to)) in enumerate(zip(files, w.places.spans, strict=True)):
            words = file.words
            if end > len(words):
                _, slot, row, count = runs[i]
                _read_run(file, packed, slot, rows[row : row + count].view(np.uint8), frames)
            elif small:
                rows[to] = words[slots]
            else:
                sources.append(words[slots])
                targets.append(rows[to])
    # At last and in one go: each copy empties the processor's caches of all that the next one would need of Python.
    copy_all(sources, targets)


def _read_table(pool: OpenShards, w: Wanted, held: HeldTable) -> None:
    files = w.files
    for shard in held.lacking(w.places.shards):
        check_table(files, shard)
        size = files.size(shard)
        if held.admits(size):
            data = np.empty(size, dtype=np.uint8)
            pool.once(files, shard).read(0, data)
            held.add(shard, data)
    if w.take():
        return
    # More tables than are kept: opened for a moment, for so many files cannot stay open.
    rows = w.rows()
    for shard, slot, row, count in w.places.runs:
        pool.once(files, shard).read(slot * rows.shape[1], rows[row : row + count].reshape(-1))


def _ask_ahead(pool: OpenShards, wanted: Sequence[Wanted]) -> None:
    """Asks for all records of a batch, if a sample of the largest is not in memory or that is what the options say."""
    if pool.options.ahead == "none":
        return
    if pool.options.ahead == "auto":
        w = max(wanted, key=lambda w: w.files.record_bytes)
        runs = w.places.runs[:: -(-len(w.places.runs) // SAMPLED)]
        files = pool.get(w.files, [run[0] for run in runs])
        if not any(f.sleeps(*f.place(run[1])) for f, run in zip(files, runs, strict=True)):
            return
    for w in wanted:
        for file, (_, slot, _, count) in zip(pool.get(w.files, w.places.firsts), w.places.runs, strict=True):
            for offset, length in file.places(slot, count):
                file.wake(offset, length)


def _read_run(file: OpenShard, packed: bool, slot: int, rows: np.ndarray, frames: list[np.ndarray]) -> None:
    """Fills rows, uint8 [n, bytes], with the records from `slot` on, in whatever way the file allows.

    `frames` keeps a buffer from one call to the next: the pages of a new one cost as much as reading into it.
    """
    if slot + len(rows) <= file.even and file.data is None:
        file.read(slot * rows.shape[1], rows.reshape(-1))
        return
    for row, (offset, length) in zip(rows, file.places(slot, len(rows)), strict=True):
        if file.data is not None:
            stored = file.data[offset : offset + length]
            if not packed:
                copy_words(stored, row)
                continue
        elif not packed:
            file.read(offset, row)
            continue
        else:
            if not frames or len(frames[0]) < length:
                frames[:] = [np.empty(length, dtype=np.uint8)]
            stored = frames[0][:length]
            file.read(offset, stored)
        decode_zstd(stored, row, file.name)
