"""The shard files that one reader keeps open, and how much it may keep."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence

from fcache.cache_spec.reading.arrayfiles import ArrayFiles
from fcache.cache_spec.reading.mapping import PAGE
from fcache.cache_spec.reading.opened import OpenShard, open_local
from fcache.cache_spec.reading.options import ReadOptions, choose_mode
from fcache.cache_spec.storage.protocol import Storage

# Half of vm.max_map_count (65530).
OPEN_MAPS = 32768
# An object that is "open" is an index in memory.
OPEN_OBJECTS = 1 << 18
# The page tables of a map take a 512th of what was read of it, and stay when its pages go.
MAPPED_MEMORIES = 4
# Small tables in memory. Of local files they only save time; of an object store they save a request a record.
HELD_BYTES = {"mmap": 16 << 20, "pread": 16 << 20, "ranges": 1 << 30}


class OpenShards:
    """The shard files that one reader keeps open; the oldest are closed beyond a limit. Thread-safe."""

    def __init__(self, storage: Storage, options: ReadOptions) -> None:
        self.storage, self.options = storage, options
        self.mode = choose_mode(storage, options.mode)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        descriptors = OPEN_MAPS if soft == resource.RLIM_INFINITY else min(OPEN_MAPS, max(16, soft // 2))
        self._limit = {"mmap": OPEN_MAPS, "pread": descriptors, "ranges": OPEN_OBJECTS}[self.mode]
        self._mappable = MAPPED_MEMORIES * PAGE * os.sysconf("SC_PHYS_PAGES")
        self._mapped = 0
        self._room = HELD_BYTES[self.mode]
        self._open: OrderedDict[tuple[str, int], tuple[OpenShard, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._opening: dict[tuple[str, int], threading.Lock] = {}
        # Versions of files whose digest was compared; None if nobody wants that.
        self.digested: set[int] | None = set() if options.check == "digest" else None
        # Held while objects are opened: of two threads that lack the same one, the second finds it open.
        self.fetching = threading.Lock()

    def find(self, files: ArrayFiles, shard: int) -> OpenShard | None:
        """The open file of a shard, None if it is not open."""
        with self._lock:
            found = self._open.get((files.folder, shard))
            return found and found[0]

    def get(self, files: ArrayFiles, shards: Sequence[int]) -> list[OpenShard]:
        """The files of shards on this machine, opened and checked if they are not open yet. Raises CorruptError."""
        folder, found = files.folder, self._open
        try:
            with self._lock:
                return [found[folder, shard][0] for shard in shards]
        except KeyError:
            return [self._one(files, shard) for shard in shards]

    def _one(self, files: ArrayFiles, shard: int) -> OpenShard:
        key = (files.folder, shard)
        with self._lock:
            # Not under the one lock: comparing a digest takes long. Nor by two threads: it takes as long again.
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            try:
                return self.find(files, shard) or self.add(files, shard, self._opened(files, shard, self.mode))
            finally:
                with self._lock:
                    self._opening.pop(key, None)

    def once(self, files: ArrayFiles, shard: int) -> OpenShard:
        """The file of a shard on this machine, opened and checked for one use. Raises CorruptError."""
        return self._opened(files, shard, "pread")

    def add(self, files: ArrayFiles, shard: int, file: OpenShard) -> OpenShard:
        """Keeps an open file, and returns it."""
        size = files.size(shard) if file.data is not None else 0
        with self._lock:
            self._open[files.folder, shard] = file, size
            self._mapped += size
            while len(self._open) > self._limit or (self._mapped > self._mappable and len(self._open) > 1):
                self._mapped -= self._open.popitem(last=False)[1][1]
        return file

    def reserve(self, size: int) -> bool:
        """Grants `size` bytes to a table that is held, while there is room for all tables of the reader."""
        with self._lock:
            if size > self._room:
                return False
            self._room -= size
            return True

    def _opened(self, files: ArrayFiles, shard: int, mode: str) -> OpenShard:
        return open_local(files, shard, mode, fall_back=self.options.mode == "auto", digested=self.digested)
