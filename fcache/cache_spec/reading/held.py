"""Small tables in memory: index, counts, labels; of object stores scales, too."""

import threading
from collections.abc import Callable

import numpy as np

from fcache.cache_spec.arrays import ArraySpec

# Of files on this machine: larger records are worth a map.
HELD_RECORD_BYTES = 256


class HeldTable:
    """The table of one array: each shard's file is read whole, once, and kept while `reserve` grants its bytes.

    Thread-safe. Memory grows with what was read, never beyond what was granted.
    """

    def __init__(self, spec: ArraySpec, slots: int, shards: int, reserve: Callable[[int], bool]) -> None:
        self._spec, self._slots, self._reserve = spec, slots, reserve
        # Where the records of a shard begin in the values.
        self._first = np.full(shards, -1, dtype=np.int64)
        self._values = np.empty((0, *spec.shape), dtype=spec.dtype)
        self._used = 0
        self._lock = threading.Lock()

    def lacking(self, shards: np.ndarray) -> list[int]:
        """Which of these shards are not held."""
        return np.unique(shards[self._first[shards] < 0]).tolist()

    def admits(self, size: int) -> bool:
        """Whether a file of `size` bytes may be added: ask before it is read."""
        return self._reserve(size)

    def add(self, shard: int, table: np.ndarray) -> None:
        """Keeps the records of a shard, uint8 [bytes], for which there is room."""
        with self._lock:
            if self._first[shard] >= 0:
                # Two threads read it: one share of the room is given back.
                self._reserve(-len(table))
                return
            end = self._used + self._slots
            if end > len(self._values):
                room = min(max(end, 2 * self._used), len(self._first) * self._slots)
                grown = np.empty((room, *self._spec.shape), dtype=self._values.dtype)
                grown[: self._used] = self._values[: self._used]
                self._values = grown
            self._values[self._used : end] = table.view(self._spec.dtype).reshape(-1, *self._spec.shape)
            self._first[shard], self._used = self._used, end

    def take(self, shards: np.ndarray, slots: np.ndarray, out: np.ndarray) -> bool:
        """Copies records into `out` [n, *shape] if all of them are held, else returns False."""
        with self._lock:
            first = self._first[shards]
            if first.min() < 0:
                return False
            # With "raise" numpy would make a copy of `out` first.
            self._values.take(first + slots, axis=0, out=out, mode="clip")
            return True
