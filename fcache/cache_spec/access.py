"""Access to the records of one array: shard files opened once, mapped or read by position."""

import ctypes
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.errors import CorruptError, IncompleteError, SpecError
from fcache.cache_spec.files import unreadable
from fcache.cache_spec.shardfile import ABSENT, decode_zstd, index_size, parse_index, shard_key

MODES = ("auto", "mmap", "pread")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "glusterfs", "afs")
# Half of vm.max_map_count (65530).
OPEN_MAPS = 32768
# Tables with records up to this size (index, counts, labels) are read whole and kept: they are small, and many.
HELD_RECORD_BYTES = 256


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


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED = ctypes.c_void_p(-1).value
PAGE = mmap.PAGESIZE
# Below this a page fault costs no more than asking whether there will be one.
PROBED_BYTES = 1 << 16


def _map(fd: int, size: int) -> np.ndarray:
    """A file mapped for reading, uint8, unmapped when the last view of it is gone.

    Python's own `mmap` keeps a descriptor for every map, so that a thousand shards exhaust the usual limit.
    """
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = (ctypes.c_uint8 * size).from_address(address)
    # Not at exit: threads may still copy, and the process gives everything back anyway.
    weakref.finalize(buffer, _LIBC.munmap, address, size).atexit = False
    mapped = np.ctypeslib.as_array(buffer)
    mapped.flags.writeable = False
    return mapped


def copy_bytes(source: np.ndarray, out: np.ndarray) -> None:
    """Copies uint8 [n] to uint8 [n]."""
    if len(out) % 8:
        np.copyto(out, source)
        return
    # The identity of words is a vector loop. `copyto` calls memcpy, which below the size of the second-level cache
    # takes `rep movsb`: from page-cache pages that is 1.8 times slower (AMD EPYC, glibc 2.36).
    np.positive(source.view(np.uint64), out=out.view(np.uint64))


class _OpenShard:
    """One open shard file: mapped, held in memory, or a descriptor. It lasts as long as a copy still uses it."""

    def __init__(self, path: str, spec: ArraySpec, slots: int, expected: int, how: str) -> None:
        self.name, self.fd = path, -1
        self.bytes: np.ndarray | None = None
        self.address = 0
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
            self.bytes = _map(self.fd, size)
            self.address = self.bytes.ctypes.data

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
        if self.bytes is not None and not (probe and self._on_disk(offset, length)):
            copy_bytes(self.bytes[offset : offset + length], out)
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

    def _on_disk(self, offset: int, length: int) -> bool:
        """Whether a mapped record is not in memory, judged by the page in its middle."""
        if length < PROBED_BYTES:
            return False
        found = ctypes.create_string_buffer(1)
        page = (self.address + offset + length // 2) // PAGE * PAGE
        return _LIBC.mincore(page, PAGE, found) == 0 and not found.raw[0] & 1

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

    def __init__(self, mode: str) -> None:
        self.mode = mode
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
        self, folder: Path, spec: ArraySpec, *, shard_records: int, sizes: dict[int, int], shards: OpenShards
    ) -> None:
        self.spec, self.dtype = spec, np.dtype(spec.dtype)
        self._folder, self._sizes, self._shards, self._shard_records = folder, sizes, shards, shard_records
        self._held: dict[int, np.ndarray] | None = {} if is_held(spec) else None

    def read_into(self, records: Sequence[int], out: np.ndarray) -> None:
        """Copies records into the rows of `out`, C-contiguous, [len(records), *spec.shape] of the spec's type.

        Raises IncompleteError for a record of a shard that is not committed, CorruptError for a damaged one.
        """
        if self._held is not None:
            for i, record in enumerate(records):
                shard, slot = divmod(record, self._shard_records)
                out[i] = (self._held[shard] if shard in self._held else self._hold(shard))[slot]
            return
        files: dict[int, _OpenShard] = {}
        zstd, probe = self.spec.compression == "zstd", True
        for record, row in zip(records, out.reshape(len(records), -1).view(np.uint8), strict=True):
            shard, slot = divmod(record, self._shard_records)
            file = files.get(shard)
            if file is None:
                file = files[shard] = self._open(shard)
            if zstd:
                file.decode(slot, row)
            else:
                # Asking costs some microseconds: if the first record of a batch is in memory, so are the others.
                probe = file.read(slot, row, probe=probe)

    def read(self, record: int) -> np.ndarray:
        """One record as a new array."""
        out = np.empty((1, *self.spec.shape), dtype=self.dtype)
        self.read_into([record], out)
        return out[0]

    def _hold(self, shard: int) -> np.ndarray:
        assert self._held is not None
        self._held[shard] = self._open(shard).table(self.spec)
        return self._held[shard]

    def _open(self, shard: int) -> _OpenShard:
        if shard not in self._sizes:
            raise IncompleteError(f"shard {shard} of {self._folder} is not committed; run the same `fcache extract`")
        path = f"{self._folder}/{shard_key(self.spec, shard)}"
        return self._shards.get(path, self.spec, self._shard_records, self._sizes[shard])
