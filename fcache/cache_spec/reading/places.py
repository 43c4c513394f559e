"""Where the records of a batch lie, and what a batch wants of one array."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fcache.cache_spec.reading.arrayfiles import ArrayFiles
from fcache.cache_spec.reading.held import HeldTable

Span = int | slice


@dataclass(frozen=True)
class Places:
    """Shard and slot of each record [n], and the runs (shard, slot, row, count) of those that follow each other.

    `firsts` has the shard of each run, `spans` its end in the shard, its slots and its rows as numpy indexes them.
    """

    shards: np.ndarray
    slots: np.ndarray
    runs: list[tuple[int, int, int, int]]
    firsts: list[int]
    spans: list[tuple[int, Span, Span]]
    lowest: int
    highest: int


def find_places(records: Sequence[int] | np.ndarray, slots: int) -> Places:
    """The places of at least one record in shards of `slots` records."""
    found, within = np.divmod(np.asarray(records, dtype=np.int64), slots)
    shards, runs = found.tolist(), list[tuple[int, int, int, int]]()
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
    return Places(found, within, runs, [run[0] for run in runs], spans, min(shards), max(shards))


@dataclass(frozen=True)
class Wanted:
    """Records of one array and where they go: `out`, C-contiguous [n, *shape]."""

    files: ArrayFiles
    held: HeldTable | None
    places: Places
    out: np.ndarray

    def rows(self) -> np.ndarray:
        """`out` as bytes [n, bytes of a record]."""
        return self.out.reshape(len(self.out), -1).view(np.uint8)

    def take(self) -> bool:
        """Fills `out` from memory if all of it is held there, else returns False."""
        return self.held is not None and self.held.take(self.places.shards, self.places.slots, self.out)
