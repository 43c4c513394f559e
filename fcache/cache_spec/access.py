"""Access to the records of one array: shard files opened once, mapped or read by position."""

import mmap
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.errors import CorruptError, SpecError
from fcache.cache_spec.shardfile import ABSENT, ZSTD, index_size, parse_index, shard_key

MODES = ("auto", "mmap", "pread")
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "glusterfs", "afs")
# Kept below vm.max_map_count (65530) and the usual limit of open files (1024).
OPEN_MAPS, OPEN_FILES = 16384, 384


def choose_mode(root: Path, mode: str) -> str:
    """ "mmap" or "pread": "auto" maps on local file systems and reads by position on network ones."""
    if mode not in MODES:
        raise SpecError(f"read mode is one of {', '.join(MODES)}, got {mode!r}")
    if mode != "auto":
        return mode
    return "pread" if _file_system(root).split(".")[0] in NETWORK else "mmap"


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


class _OpenShard:
    """One open shard file; a map lasts as long as a copy still uses it."""

    def __init__(self, path: Path, spec: ArraySpec, slots: int, expected: int, mode: str) -> None:
        self.name, self.fd = str(path), -1
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing, its commit names it; run `fcache repair`") from None
        self.fd = fd
        size = os.fstat(fd).st_size
        if size != expected:
            raise CorruptError(f"{path} has {size} bytes, its commit says {expected}; run `fcache repair`")
        if spec.layout == "sharded":
            tail = index_size(slots)
            raw = os.pread(fd, tail, max(0, size - tail))
            self.index = parse_index(raw, slots, size, self.name)
        else:
            n = spec.record_bytes
            self.index = np.stack([np.arange(slots, dtype="<u8") * n, np.full(slots, n, dtype="<u8")], axis=1)
        self.offsets: list[int] = self.index[:, 0].tolist()
        self.lengths: list[int] = self.index[:, 1].tolist()
        self.bytes: np.ndarray | None = None
        if mode == "mmap":
            self.bytes = np.frombuffer(mmap.mmap(fd, size, prot=mmap.PROT_READ), dtype=np.uint8)
            os.close(fd)
            self.fd = -1

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read(self, slot: int, out: np.ndarray) -> None:
        """Copies the stored bytes of a slot into `out` (uint8, exactly as long)."""
        offset, length = self.offsets[slot], self.lengths[slot]
        if offset == ABSENT or length != len(out):
            raise CorruptError(f"{self.name}: record {slot} has {length} bytes, expected {len(out)}")
        if self.bytes is not None:
            np.copyto(out, self.bytes[offset : offset + length])
            return
        self._pread(offset, out)

    def raw(self, slot: int) -> Any:
        """The stored bytes of a slot."""
        offset, length = self.offsets[slot], self.lengths[slot]
        if offset == ABSENT:
            raise CorruptError(f"{self.name}: record {slot} is absent, its commit says it is there")
        if self.bytes is not None:
            return self.bytes[offset : offset + length]
        out = np.empty(length, dtype=np.uint8)
        self._pread(offset, out)
        return out

    def _pread(self, offset: int, out: np.ndarray) -> None:
        view, done = memoryview(out), 0
        while done < len(out):
            n = os.preadv(self.fd, [view[done:]], offset + done)
            if n == 0:
                raise CorruptError(f"{self.name} was cut short while it was read; run `fcache verify`")
            done += n


class ArrayAccess:
    """Reads records of one array of one group into buffers; safe to use from several threads."""

    def __init__(self, folder: Path, spec: ArraySpec, *, shard_records: int, sizes: dict[int, int], mode: str) -> None:
        self.spec, self._folder, self._sizes, self._mode = spec, folder, sizes, mode
        self._shard_records = shard_records
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._limit = OPEN_MAPS if mode == "mmap" else OPEN_FILES
        self.dtype = np.dtype(spec.dtype)

    def read_into(self, record: int, out: np.ndarray) -> None:
        """Copies one record into `out`, a C-contiguous array of the spec's type and shape."""
        shard, slot = divmod(record, self._shard_records)
        file = self._shard(shard)
        flat = out.reshape(-1).view(np.uint8)
        if self.spec.compression == "zstd":
            decoded = ZSTD.decode(file.raw(slot), flat)
            if len(decoded) != len(flat):
                raise CorruptError(f"{file.name}: record {slot} does not decode to {len(flat)} bytes")
        else:
            file.read(slot, flat)

    def read(self, record: int) -> np.ndarray:
        """One record as a new array."""
        out = np.empty(self.spec.shape, dtype=self.dtype)
        self.read_into(record, out.reshape(1) if out.ndim == 0 else out)
        return out

    def check(self, shard: int) -> None:
        """Opens a shard: checks its presence, size and index. Raises CorruptError."""
        self._shard(shard)

    def _shard(self, index: int) -> _OpenShard:
        with self._lock:
            file = self._open.get(index)
            if file is None:
                path = self._folder / shard_key(self.spec, index)
                file = _OpenShard(path, self.spec, self._shard_records, self._sizes[index], self._mode)
                self._open[index] = file
                if len(self._open) > self._limit:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(index)
            return file
