"""Access to the records of arrays: a whole batch, of all its arrays, is copied into buffers by one call."""

from collections.abc import Sequence

import numpy as np

from fcache.cache_spec.reading.arrayfiles import ArrayFiles
from fcache.cache_spec.reading.disk import read_files
from fcache.cache_spec.reading.held import HELD_RECORD_BYTES, HeldTable
from fcache.cache_spec.reading.options import ReadOptions as ReadOptions
from fcache.cache_spec.reading.places import Places, Wanted, find_places
from fcache.cache_spec.reading.ranges import read_objects
from fcache.cache_spec.reading.shardpool import OpenShards as OpenShards


class ArrayAccess:
    """Reads records of one array of one group into buffers; safe to use from several threads."""

    def __init__(self, files: ArrayFiles, shards: OpenShards) -> None:
        self.files, self.pool = files, shards
        self.spec, self.dtype = files.spec, np.dtype(files.spec.dtype)
        self.held: HeldTable | None = None
        if self.spec.layout == "table" and (not files.base or self.spec.record_bytes <= HELD_RECORD_BYTES):
            self.held = HeldTable(self.spec, files.slots, len(files.committed.sizes), shards.reserve)

    def read_into(self, records: Sequence[int] | np.ndarray, out: np.ndarray) -> None:
        """Copies records into the rows of `out`; see `read_arrays`."""
        read_arrays([(self, records, out)])

    def read(self, record: int) -> np.ndarray:
        """One record as a new array."""
        out = np.empty((1, *self.spec.shape), dtype=self.dtype)
        read_arrays([(self, [record], out)])
        return out[0]


Job = tuple[ArrayAccess, Sequence[int] | np.ndarray, np.ndarray]


def read_arrays(jobs: Sequence[Job]) -> None:
    """Copies records of several arrays of one open cache: each job is (array, records [n], out), all are one batch.

    `out` is C-contiguous [n, *spec.shape] of the spec's type. Files that are mapped are copied from, or asked for
    ahead if they are on disk; ranges of objects are read all at once. Raises IncompleteError for a record of a shard
    that is not committed, CorruptError for a damaged one.
    """
    found: dict[tuple[int, int], Places] = {}
    wanted: list[Wanted] = []
    for access, records, out in jobs:
        if len(records) == 0:
            continue
        # A batch has the same records of every array.
        key = (id(records), access.files.slots)
        places = found.get(key)
        if places is None:
            places = found[key] = find_places(records, access.files.slots)
        # Numpy counts negative numbers from the end.
        access.files.size(places.lowest)
        access.files.size(places.highest)
        assert out.flags.c_contiguous, f"{access.spec.path}: the rows to fill are not contiguous"
        want = Wanted(access.files, access.held, places, out)
        if not want.take():
            wanted.append(want)
    if wanted:
        pool = jobs[0][0].pool
        (read_objects if pool.mode == "ranges" else read_files)(pool, wanted)
