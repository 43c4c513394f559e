"""Open shard files: mapped, or read by position, or known by their index only where they are objects of a store."""

import hashlib
import os
from functools import cache

import numpy as np

from fcache.cache_spec.errors import CorruptError, DataError
from fcache.cache_spec.reading.arrayfiles import ArrayFiles, check_digest, check_table, missing
from fcache.cache_spec.reading.mapping import map_file, on_disk, will_need
from fcache.cache_spec.shardfile import ABSENT, index_size, parse_index
from fcache.cache_spec.storage.files import read_exactly, unreadable

# Read at a time while a whole file is digested: it stays in the second-level cache, and hashing releases the GIL.
DIGEST_BYTES = 1 << 19
_ABSENT_ROW = 2**32 - 1
_NO_WORDS = np.empty((0, 0), dtype=np.uint8)


@cache
def _even_index(slots: int, record: int) -> bytes:
    """The index of a full shard whose records lie in the order of their slots."""
    places = np.arange(slots, dtype="<u8") * record
    return np.stack([places, np.full_like(places, record)], axis=1).tobytes()


class OpenShard:
    """One open shard file. It lasts as long as a copy still uses it.

    The first `even` slots lie one after another from the start of the file, uncompressed. `words` are these records
    where they are mapped, [even, n], else it is empty.
    """

    __slots__ = ("_address", "_files", "_index", "_rows", "_shard", "_told", "data", "even", "fd", "words")

    def __init__(self, files: ArrayFiles, shard: int, index: np.ndarray | None) -> None:
        self._files, self._shard, self.fd = files, shard, -1
        self.data: np.ndarray | None = None
        self._address, self._told = 0, True
        self.words = _NO_WORDS
        # A cache may have millions of records: here are eight bytes or less of each, and none where all is regular.
        self.even = files.slots
        self._rows: np.ndarray | None = None
        self._index: np.ndarray | None = None
        record, packed = files.record_bytes, files.spec.compression != "none"
        if index is None or (not packed and index.tobytes() == _even_index(files.slots, record)):
            return
        stored, self.even = index[:, 0] != ABSENT, 0
        offsets, lengths = index[stored].T
        if packed or (offsets % record).any() or (lengths != record).any():
            compact = np.uint32 if int(index[stored].max(initial=0)) < _ABSENT_ROW else np.uint64
            self._index = np.where(stored[:, None], index, np.iinfo(compact).max).astype(compact)
            return
        self._rows = np.where(stored, index[:, 0] // record, _ABSENT_ROW).astype(np.uint32)
        used = len(offsets)
        if np.array_equal(self._rows[:used], np.arange(used)):
            self.even = used

    @property
    def name(self) -> str:
        """What a user calls the file."""
        return self._files.shown(self._shard)

    def map(self, data: np.ndarray, *, told: bool) -> None:
        """Takes the mapped file; `told` is whether the system tells what of it is in memory."""
        self.data, self._address, self._told = data, data.ctypes.data, told
        record = self._files.record_bytes
        self.words = data[: self.even * record].reshape(self.even, record).view(self._files.word)

    def place(self, slot: int) -> tuple[int, int]:
        """Offset and stored bytes of a slot. Raises CorruptError if it is absent, or not as long as a record."""
        found, record = "is absent", self._files.record_bytes
        if slot < self.even:
            return slot * record, record
        if self._rows is not None:
            row = int(self._rows[slot])
            if row != _ABSENT_ROW:
                return row * record, record
        elif self._index is not None:
            offset, length = self._index[slot].tolist()
            if length != np.iinfo(self._index.dtype).max:
                if length == record or self._files.spec.compression != "none":
                    return offset, length
                found = f"has {length} bytes"
        raise CorruptError(f"{self.name}: record {slot} {found}, expected {record} bytes; run `fcache repair`")

    def places(self, slot: int, count: int) -> list[tuple[int, int]]:
        """Offset and stored bytes of the slots from `slot` on."""
        return [self.place(s) for s in range(slot, slot + count)]

    def sleeps(self, offset: int, length: int) -> bool:
        """Whether these bytes are on disk only, judged by one page; True where nobody can tell."""
        if self.data is not None and self._told:
            return on_disk(self._address + offset, length)
        flag = getattr(os, "RWF_NOWAIT", 0)
        if not flag:
            return True
        fd = self.fd
        try:
            if fd < 0:
                fd = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
            return os.preadv(fd, [bytearray(1)], offset + length // 2, flag) == 0
        except OSError:
            return True
        finally:
            if fd >= 0 and fd != self.fd:
                os.close(fd)

    def wake(self, offset: int, length: int) -> None:
        """Asks for these bytes to be read from disk, and does not wait."""
        if self.data is not None:
            will_need(self._address + offset, length)
        elif hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fills `out` (uint8) from a file that is read by position. Raises CorruptError if it ends before."""
        try:
            done = read_exactly(self.fd, offset, out.data)
        except OSError as e:
            raise unreadable(self.name, e) from e
        if done < len(out):
            raise CorruptError(f"{self.name} was cut short while it was read; run `fcache verify`")

    def close(self) -> None:
        """Closes the descriptor; a map stays until its last copy is done."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def open_local(files: ArrayFiles, shard: int, mode: str, *, fall_back: bool, digested: set[int] | None) -> OpenShard:
    """Opens a file of this machine ("mmap" or "pread") and checks its size and its index. Raises CorruptError.

    With `fall_back` a file that cannot be mapped (address space, file system) is read by position. Its digest is
    checked, too, unless `digested` is None or says that this was done.
    """
    name, expected = files.shown(shard), files.size(shard)
    fd = -1
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(fd)
        if status.st_size != expected:
            raise CorruptError(f"{name} has {status.st_size} bytes, its commit says {expected}; run `fcache repair`")
        version = hash((name, status.st_ino, status.st_mtime_ns))
        if digested is not None and version not in digested:
            check_digest(files, shard, digest_of(fd))
            digested.add(version)
        index = None
        if files.spec.layout == "sharded":
            tail = index_size(files.slots)
            raw = os.pread(fd, min(tail, expected), max(0, expected - tail))
            index = parse_index(raw, files.slots, expected, name)
        else:
            check_table(files, shard)
        opened = OpenShard(files, shard, index)
        if mode == "mmap":
            try:
                told = status.st_uid == os.geteuid() or os.access(name, os.W_OK)
                opened.map(map_file(fd, expected), told=told)
            except OSError as e:
                if not fall_back:
                    raise DataError(f"cannot map {name}: {e.strerror}; read it by position (mode pread)") from e
        if opened.data is None:
            opened.fd, fd = fd, -1
        return opened
    except FileNotFoundError:
        raise missing(name) from None
    except OSError as e:
        raise unreadable(name, e) from e
    finally:
        if fd >= 0:
            os.close(fd)


def digest_of(fd: int) -> bytes:
    """SHA-256 of a file of this machine, read from its start."""
    found, buffer, done = hashlib.sha256(), memoryview(bytearray(DIGEST_BYTES)), 0
    while n := read_exactly(fd, done, buffer):
        found.update(buffer[:n])
        done += n
    return found.digest()
