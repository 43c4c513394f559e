"""Access to the records of one array: shard files opened once, mapped or read by position."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.errors import CorruptError, IncompleteError, SpecError
from fcache.cache_spec.files import unreadable
from fcache.cache_spec.mapping import copy_words, map_file, on_disk
from fcache.cache_spec.shardfile import ABSENT, decode_zstd, index_size, parse_index, shard_key
from fcache.cache_spec.storage import Storage

MODES = ("auto", "mmap", "pread")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "glusterfs", "afs")
# Half of vm.max_map_count (65530).
OPEN_MAPS = 32768
# Tables with records up to this size (index, counts, labels) are read whole and kept: they are small, and many.
HELD_RECORD_BYTES = 256
# Below this a page fault costs no more than asking whether there will be one.
PROBED_BYTES = 1 << 16


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: `mode` is "mmap" (a file cut short under a map kills the process), "pread" or "auto"."""

    mode: str = "auto"


def choose_mode(root: Path, mode: str) -> str:
    """ "mmap" or "pread": "auto" maps on local file systems and reads by position on network ones."""
    if mode not in MODES:
        raise SpecError(f"read mode is one of {', '.join(MODES)}, got {mode!r}")
    if mode != "auto":
        return mode
    return "pread" if _file_system(root).split(".")[0] in NETWORK else "mmap"


def is_held(spec: ArraySpec) -> bool:
    """Whether whole files of this array are kept in memory."""
    return spec.layout == "table" and spec.record_bytes <= HELD_RECORD_BYTES


def _file_system(path: Path) -> str:
    """The type of the file system that holds `path`, "" where the system does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    resolved, best, kind = path.resolve(), -1, ""
    for line in mounts:
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].replace("\\040", " "))
        if (resolved == point or point in resolved.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]
    return kind


def _regular(data: np.ndarray, index: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """The uncompressed records of a file as words [n, words]: of the first n slots, if these are all that it holds."""
    n, size = int((index[:, 0] != ABSENT).sum()), spec.record_bytes
    expected = np.stack([np.arange(n, dtype="<u8") * size, np.full(n, size, dtype="<u8")], axis=1)
    if spec.compression != "none" or size % 8 or not np.array_equal(index[:n], expected):
        return np.empty((0, 0), dtype=np.uint64)
    return data[: n * size].reshape(n, size).view(np.uint64)


class _OpenShard:
    """One open shard file: mapped, held in memory, or a descriptor. It lasts as long as a copy still uses it."""

    def __init__(self, path: str, spec: ArraySpec, slots: int, expected: int, how: str) -> None:
        self.name, self.fd = path, -1
        self.bytes: np.ndarray | None = None
        self.address = 0
        # Mapped records [n, words] where they lie in the order of their slots and have equal sizes, else none.
        self.words = np.empty((0, 0), dtype=np.uint64)
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._load(spec, slots, expected, how)
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing, its commit names it; run `fcache repair`") from None
        except OSError as e:
            raise unreadable(path, e) from e
        if how != "pread":
            self.close()

    def _load(self, spec: ArraySpec, slots: int, expected: int, how: str) -> None:
        size = os.fstat(self.fd).st_size
        if size != expected:
            raise CorruptError(f"{self.name} has {size} bytes, its commit says {expected}; run `fcache repair`")
        if spec.layout == "sharded":
            tail = index_size(slots)
            index = parse_index(os.pread(self.fd, tail, max(0, size - tail)), slots, size, self.name)
        else:
            n = spec.record_bytes
            if size != slots * n:
                raise CorruptError(f"{self.name} has {size} bytes, its array has {slots * n}; run `fcache repair`")
            index = np.stack([np.arange(slots, dtype="<u8") * n, np.full(slots, n, dtype="<u8")], axis=1)
        self.offsets: list[int] = index[:, 0].tolist()
        self.lengths: list[int] = index[:, 1].tolist()
        if how == "held":
            held = np.empty(size, dtype=np.uint8)
            self._pread(0, held)
            self.bytes = held
        elif how == "mmap":
            self.bytes = map_file(self.fd, size)
            self.address = self.bytes.ctypes.data
            self.words = _regular(self.bytes, index, spec)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def read(self, slot: int, out: np.ndarray, *, probe: bool) -> bool:
        """Copies the stored bytes of a slot into `out` (uint8, exactly as long).

        With `probe` a mapped record that is on disk only is read by position. Returns whether it was not in memory.
        """
        offset, length = self.offsets[slot], self.lengths[slot]
        if offset == ABSENT or length != len(out):
            raise self._wrong(slot, len(out))
        if self.bytes is not None and not (probe and length >= PROBED_BYTES and on_disk(self.address + offset, length)):
            source = self.bytes[offset : offset + length]
            if length % 8:
                np.copyto(out, source)
            else:
                copy_words(source.view(np.uint64), out.view(np.uint64))
            return False
        self._pread(offset, out)
        return True

    def table(self, spec: ArraySpec) -> np.ndarray:
        """All slots of a table that is held, [slots, *spec.shape]."""
        assert self.bytes is not None
        return self.bytes.view(spec.dtype).reshape(-1, *spec.shape)

    def decode(self, slot: int, out: np.ndarray) -> None:
        """Decompresses a slot into `out` (uint8)."""
        offset, length = self.offsets[slot], self.lengths[slot]
        if offset == ABSENT:
            raise self._wrong(slot, len(out))
        if self.bytes is not None:
            decode_zstd(self.bytes[offset : offset + length], out, self.name)
        else:
            frame = np.empty(length, dtype=np.uint8)
            self._pread(offset, frame)
            decode_zstd(frame, out, self.name)

    def _wrong(self, slot: int, expected: int) -> CorruptError:
        found = "is absent" if self.offsets[slot] == ABSENT else f"has {self.lengths[slot]} bytes"
        return CorruptError(f"{self.name}: record {slot} {found}, expected {expected} bytes; run `fcache repair`")

    def _pread(self, offset: int, out: np.ndarray) -> None:
        # A map has no descriptor: a record that is on disk only is worth opening the file again, because page faults
        # read it at half the speed.
        view, done, fd = out.data, 0, self.fd
        try:
            if fd < 0:
                fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
            while done < len(out):
                n = os.preadv(fd, [view[done:]], offset + done)
                if n == 0:
                    raise CorruptError(f"{self.name} was cut short while it was read; run `fcache verify`")
                done += n
        except OSError as e:
            raise unreadable(self.name, e) from e
        finally:
            if fd >= 0 and fd != self.fd:
                os.close(fd)


class OpenShards:
    """The shard files that one reader keeps open; the least recently used are closed beyond a limit. Thread-safe."""

    def __init__(self, storage: Storage, options: ReadOptions) -> None:
        root = storage.path()
        assert root is not None
        self.mode = mode = choose_mode(root, options.mode)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = OPEN_MAPS if soft == resource.RLIM_INFINITY else max(16, soft // 2)
        self._limit = OPEN_MAPS if mode == "mmap" else min(OPEN_MAPS, files)
        self._open: OrderedDict[str, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, spec: ArraySpec, slots: int, expected: int) -> _OpenShard:
        """The shard file at `path`, opened and checked if it is not open yet. Raises CorruptError."""
        with self._lock:
            if file := self._open.get(path):
                self._open.move_to_end(path)
                return file
        # Without the lock: opening may take long. Two threads may both open a file, one of the two is dropped.
        if is_held(spec):
            return _OpenShard(path, spec, slots, expected, "held")
        file = _OpenShard(path, spec, slots, expected, self.mode)
        with self._lock:
            file = self._open.setdefault(path, file)
            while len(self._open) > self._limit:
                self._open.popitem(last=False)
            return file


class ArrayAccess:
    """Reads records of one array of one group into buffers; safe to use from several threads."""

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
        self._folder, self._sizes = storage.path(folder), sizes
        self._shards, self._shard_records = shards, shard_records
        # All shards of an array that is held, one after another, and which of them were read.
        self._held: np.ndarray | None = None
        self._read: set[int] = set()
        if is_held(spec):
            self._held = np.empty(((max(sizes, default=-1) + 1) * shard_records, *spec.shape), dtype=self.dtype)

    def read_into(self, records: Sequence[int], out: np.ndarray) -> None:
        """Copies records into the rows of `out`, C-contiguous, [len(records), *spec.shape] of the spec's type.

        Raises IncompleteError for a record of a shard that is not committed, CorruptError for a damaged one.
        """
        if self._held is not None:
            for record in records:
                if record // self._shard_records not in self._read:
                    self._hold(record // self._shard_records, self._held)
            out[...] = self._held[records]
            return
        files: dict[int, _OpenShard] = {}
        zstd, probe = self.spec.compression == "zstd", True
        rows = out.reshape(len(records), -1).view(np.uint8)
        words = rows.view(np.uint64) if rows.shape[1] % 8 == 0 else None
        for i, record in enumerate(records):
            shard, slot = divmod(record, self._shard_records)
            file = files.get(shard)
            if file is None:
                file = files[shard] = self._open(shard)
            if words is not None and not probe and slot < len(file.words):
                copy_words(file.words[slot], words[i])
            elif zstd:
                file.decode(slot, rows[i])
            else:
                # Asking costs some microseconds: if the first record of a batch is in memory, so are the others.
                probe = file.read(slot, rows[i], probe=probe)

    def read(self, record: int) -> np.ndarray:
        """One record as a new array."""
        out = np.empty((1, *self.spec.shape), dtype=self.dtype)
        self.read_into([record], out)
        return out[0]

    def _hold(self, shard: int, held: np.ndarray) -> None:
        first = shard * self._shard_records
        held[first : first + self._shard_records] = self._open(shard).table(self.spec)
        self._read.add(shard)

    def _open(self, shard: int) -> _OpenShard:
        if shard not in self._sizes:
            raise IncompleteError(f"shard {shard} of {self._folder} is not committed; run the same `fcache extract`")
        path = f"{self._folder}/{shard_key(self.spec, shard)}"
        return self._shards.get(path, self.spec, self._shard_records, self._sizes[shard][0])
