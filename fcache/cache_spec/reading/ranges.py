"""Records that are ranges of objects: all that a batch needs, of all its arrays, is asked for at once."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fcache.cache_spec.reading.arrayfiles import ArrayFiles, check_digest, check_table, missing
from fcache.cache_spec.reading.held import HeldTable
from fcache.cache_spec.reading.opened import OpenShard
from fcache.cache_spec.reading.places import Wanted
from fcache.cache_spec.reading.shardpool import OpenShards
from fcache.cache_spec.shardfile import decode_zstd, index_size, parse_index
from fcache.cache_spec.storage.pieces import sha256_of
from fcache.cache_spec.storage.protocol import Range, Storage


def read_objects(pool: OpenShards, wanted: Sequence[Wanted]) -> None:
    """Fills all of `wanted`: one range a record and array, one for records that lie in a row; small tables are held.

    Raises CorruptError for an object that is missing, too short or damaged.
    """
    _hold(pool, [(w.held, w.files, w.places.shards) for w in wanted if w.held is not None])
    _read_records(pool, [w for w in wanted if not w.take()])


def _hold(pool: OpenShards, tables: Sequence[tuple[HeldTable, ArrayFiles, np.ndarray]]) -> None:
    """Reads the files of tables that are not held yet, of these shards [n] of each, while there is room for them."""
    if not any(table.lacking(shards) for table, _, shards in tables):
        return
    # Of two threads that lack the same file, the second finds it held.
    with pool.fetching:
        lacking = [(t, files, s) for t, files, shards in tables for s in t.lacking(shards)]
        kept = [(t, files, s) for t, files, s in lacking if t.admits(files.size(s))]
        for _, files, shard in kept:
            check_table(files, shard)
        data = [np.empty(files.size(s), dtype=np.uint8) for _, files, s in kept]
        _read(pool.storage, [(files.name(s), 0, out) for (_, files, s), out in zip(kept, data, strict=True)])
        for (table, files, shard), out in zip(kept, data, strict=True):
            # The whole file is here: comparing it costs next to nothing.
            check_digest(files, shard, hashlib.sha256(out.data).digest())
            table.add(shard, out)


def _read_records(pool: OpenShards, wanted: Sequence[Wanted]) -> None:
    opened = _open(pool, wanted)
    ranges: list[Range] = []
    frames: list[tuple[str, np.ndarray, np.ndarray]] = []
    for w in wanted:
        plain, rows = w.files.spec.compression == "none", w.rows()
        for shard, slot, row, count in w.places.runs:
            file, name = opened[w.files.folder, shard], w.files.name(shard)
            if slot + count <= file.even:
                ranges.append((name, slot * rows.shape[1], rows[row : row + count].reshape(-1)))
                continue
            places = file.places(slot, count)
            if plain:
                ranges += [(name, offset, rows[row + i]) for i, (offset, _) in enumerate(places)]
                continue
            start, end = places[0][0], places[-1][0] + places[-1][1]
            if _follow(places):
                data = np.empty(end - start, dtype=np.uint8)
                ranges.append((name, start, data))
                parts = [data[offset - start :][:length] for offset, length in places]
            else:
                parts = [np.empty(length, dtype=np.uint8) for _, length in places]
                ranges += [(name, offset, part) for (offset, _), part in zip(places, parts, strict=True)]
            frames += [(file.name, part, rows[row + i]) for i, part in enumerate(parts)]
    _read(pool.storage, ranges)
    for name, frame, out in frames:
        decode_zstd(frame, out, name)


def _follow(places: Sequence[tuple[int, int]]) -> bool:
    """Whether stored records lie one after another."""
    return all(a[0] + a[1] == b[0] for a, b in pairwise(places))


def _open(pool: OpenShards, wanted: Sequence[Wanted]) -> dict[tuple[str, int], OpenShard]:
    """The shards that are wanted, by folder and number; the indices that are not known yet are read together."""
    keys = {(w.files.folder, run[0]): w.files for w in wanted for run in w.places.runs}
    found: dict[tuple[str, int], OpenShard] = {}

    def lacking() -> list[tuple[ArrayFiles, int]]:
        for key, files in keys.items():
            if key not in found and (file := pool.find(files, key[1])):
                found[key] = file
        return [(files, key[1]) for key, files in keys.items() if key not in found]

    if lacking():
        with pool.fetching:
            still = lacking()
            for (files, shard), index in zip(still, _indices(pool.storage, still), strict=True):
                name = files.shown(shard)
                if pool.digested is not None and hash(name) not in pool.digested:
                    check_digest(files, shard, _digest(pool.storage, files.name(shard), files.size(shard)))
                    pool.digested.add(hash(name))
                file = OpenShard(files, shard, index)
                found[files.folder, shard] = pool.add(files, shard, file)
    return found


def _indices(storage: Storage, shards: Sequence[tuple[ArrayFiles, int]]) -> list[np.ndarray | None]:
    """The shard indices, None for tables, which have none."""
    tails: list[np.ndarray] = []
    for files, shard in shards:
        if files.spec.layout == "table":
            check_table(files, shard)
        size = index_size(files.slots) if files.spec.layout == "sharded" else 0
        tails.append(np.empty(min(size, files.size(shard)), dtype=np.uint8))
    pairs = list(zip(shards, tails, strict=True))
    _read(storage, [(files.name(s), files.size(s) - len(t), t) for (files, s), t in pairs if len(t)])
    return [
        parse_index(t.tobytes(), files.slots, files.size(s), files.shown(s)) if files.spec.layout == "sharded" else None
        for (files, s), t in pairs
    ]


def _read(storage: Storage, ranges: Sequence[Range]) -> None:
    try:
        storage.read_ranges(ranges)
    except FileNotFoundError as e:
        raise missing(str(e.filename or e)) from None


def _digest(storage: Storage, name: str, size: int) -> bytes:
    try:
        return sha256_of(storage, name, size)
    except FileNotFoundError as e:
        raise missing(str(e.filename or e)) from None
