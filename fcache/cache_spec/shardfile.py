"""Files of zarr v3 arrays: metadata, the append-only shard writer and the shard index."""

import hashlib
import math
import struct
from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.errors import CorruptError, DataError
from fcache.cache_spec.storage.files import begin_writing
from fcache.cache_spec.storage.protocol import Storage

ABSENT = 2**64 - 1
ZSTD = Zstd(level=1)
# Where the kernel waits for an fsync, the disk idles while a shard is computed.
WRITE_BACK_BYTES = 8 << 20


def array_metadata(spec: ArraySpec, *, num_records: int, shard_records: int) -> dict[str, Any]:
    """The `zarr.json` of an array whose axis 0 are records."""
    endian = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs: list[dict[str, Any]] = [endian if np.dtype(spec.dtype).itemsize > 1 else {"name": "bytes"}]
    if spec.compression == "zstd":
        codecs.append({"name": "zstd", "configuration": {"level": 1, "checksum": False}})
    if spec.layout == "sharded":
        inner = {"chunk_shape": [1, *spec.shape], "codecs": codecs, "index_codecs": [endian, {"name": "crc32c"}]}
        codecs = [{"name": "sharding_indexed", "configuration": {**inner, "index_location": "end"}}]
    fill: Any = spec.fill
    if np.dtype(spec.dtype).kind == "f":
        fill = "NaN" if math.isnan(spec.fill) else float(spec.fill)
    dims = str(spec.attributes.get("dims", "")).split()
    named = len(dims) == len(spec.shape) and dims
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_records, *spec.shape],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_records, *spec.shape]}},
        # Dots: a folder an array, not one a shard and axis, each of which would have to be made durable.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": dict(spec.attributes),
        "dimension_names": ["record", *dims] if named else ["record", *([None] * len(spec.shape))],
        "storage_transformers": [],
    }


def shard_key(spec: ArraySpec, index: int) -> str:
    """The key of a shard's file below its array: "c.12.0.0.0"."""
    return ".".join(["c", str(index), *["0"] * len(spec.shape)])


class ShardFile:
    """One shard of one array while it is written: append records, then `close`, then `publish`.

    A table is buffered whole (it is small). Digests are computed by threads of `helpers` beside the writing: records
    must stay as they are until `close`, and `undigested` bytes of them are held.
    """

    def __init__(self, storage: Storage, name: str, spec: ArraySpec, slots: int, helpers: Executor) -> None:
        self.name = name
        self._spec = spec
        self._dtype = np.dtype(spec.dtype).newbyteorder("<")
        self._file = storage.new_file(name)
        self._hash, self._hashed = hashlib.sha256(), 0
        self._put: deque[bytes | memoryview] = deque()
        self._helpers = helpers
        self._digesting: Future[None] | None = None
        # Up to where the disk was told to begin.
        self._begun = 0
        self._size = 0
        self._index = np.full((slots, 2), ABSENT, dtype="<u8")
        if spec.layout == "table":
            self._table = np.full((slots, *spec.shape), spec.fill, dtype=self._dtype)

    def put(self, slot: int, record: np.ndarray) -> None:
        """Stores one record, whole: shape `spec.shape`, or shorter on axis 0 if the array is ragged.

        Raises DataError if an integer does not fit its type, or a ragged record its limit.
        """
        data = np.asarray(record, dtype=self._dtype, order="C")
        if data.dtype.kind in "iu" and data.dtype != record.dtype and not np.array_equal(data, record):
            raise DataError(f"{self._spec.path}: values do not fit {self._spec.dtype}, they reach {np.max(record)}")
        if self._spec.ragged and len(data) > self._spec.shape[0]:
            raise DataError(
                f"{self._spec.path}: a record has {len(data)} entries, the cache was planned for "
                f"{self._spec.shape[0]}; extract into a new --cache"
            )
        if self._spec.ragged and data.shape != self._spec.shape:
            data = data if data.size else data.reshape(0, *self._spec.shape[1:])
            padded = np.full(self._spec.shape, self._spec.fill, dtype=self._dtype)
            padded[: len(data)] = data
            data = padded
        assert data.shape == self._spec.shape, f"{self._spec.path}: record {data.shape}, expected {self._spec.shape}"
        if self._spec.layout == "table":
            self._table[slot] = data
            return
        assert self._index[slot, 0] == ABSENT, f"{self._spec.path}: slot {slot} written twice"
        raw: Any = data.reshape(-1).view(np.uint8).data
        if self._spec.compression == "zstd":
            raw = ZSTD.encode(data)
        self._index[slot] = self._size, len(raw)
        self._write(raw)

    def close(self) -> tuple[int, str]:
        """Ends the file and makes its bytes durable; returns its size and SHA-256."""
        if self._spec.layout == "table":
            self._write(self._table.reshape(-1).view(np.uint8).data)
        else:
            self._write(index_bytes(self._index))
        self.digest()
        try:
            self._file.close()
        finally:
            self.wait()
        self._digest()
        return self._size, self._hash.hexdigest()

    def publish(self) -> None:
        """Gives the closed file its name."""
        self._file.publish()

    def discard(self) -> None:
        """Removes what was written, if it was not published."""
        self._file.discard()

    @property
    def undigested(self) -> int:
        """Bytes that were put and not digested yet."""
        return self._size - self._hashed

    def digest(self) -> None:
        """Has what was put digested, and the disk begin with it, in the background."""
        if self._digesting is None or self._digesting.done():
            self._digesting = self._helpers.submit(self._digest)
        if self._size - self._begun >= WRITE_BACK_BYTES:
            self._helpers.submit(begin_writing, self._file.descriptor, self._begun, self._size - self._begun)
            self._begun = self._size

    def wait(self) -> None:
        """Waits for the digest that is running."""
        if self._digesting is not None:
            self._digesting.result()

    def _digest(self) -> None:
        while self._put:
            data = self._put.popleft()
            self._hash.update(data)
            self._hashed += len(data)

    def _write(self, data: "bytes | memoryview") -> None:
        self._file.write(data)
        self._put.append(data)
        self._size += len(data)


def index_bytes(index: np.ndarray) -> bytes:
    """A shard index [slots, 2] (offset, bytes) with its crc32c, as it ends a shard file."""
    raw = index.tobytes()
    return raw + struct.pack("<I", google_crc32c.value(raw))


def parse_index(raw: bytes, slots: int, size: int, name: str) -> np.ndarray:
    """The index [slots, 2] from the last bytes of a shard of `size` bytes. Raises CorruptError if it is damaged."""
    body, crc = raw[:-4], struct.unpack("<I", raw[-4:])[0] if len(raw) == slots * 16 + 4 else -1
    if crc != google_crc32c.value(body):
        raise CorruptError(f"{name}: the shard index is damaged (crc32c differs); run `fcache repair`")
    index = np.frombuffer(body, dtype="<u8").reshape(slots, 2)
    used = index[index[:, 0] != ABSENT]
    if len(used) and (used.max() > size or int(used.sum(axis=1).max()) > size - len(raw)):
        raise CorruptError(f"{name}: the shard index points outside the file; run `fcache repair`")
    return index


def decode_zstd(frame: np.ndarray, out: np.ndarray, name: str) -> None:
    """Decompresses `frame` into `out` (both uint8).

    Raises CorruptError if it does not hold exactly that much, MemoryError if there is none for the decoder.
    """
    try:
        size = _content_size(frame[:14].tobytes())
        if size == len(out):
            ZSTD.decode(frame, out)
    except (IndexError, RuntimeError, ValueError) as e:
        if "not enough memory" in str(e):
            raise MemoryError(f"{name}: no memory to decompress a record") from e
        raise CorruptError(f"{name}: a record is damaged ({e}); run `fcache repair`") from e
    if size != len(out):
        raise CorruptError(f"{name}: a record decodes to {size} bytes, expected {len(out)}; run `fcache repair`")


def _content_size(header: bytes) -> int:
    """The size that a zstd frame states (RFC 8878, 3.1.1.1): the decoder accepts a shorter one than its output."""
    if header[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("no zstd frame")
    descriptor = header[4]
    single, width = descriptor >> 5 & 1, (0, 2, 4, 8)[descriptor >> 6]
    if width == 0 and not single:
        raise ValueError("the zstd frame does not state its size")
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(header[start : start + max(1, width)], "little")
    return size + 256 if width == 2 else size


def index_size(slots: int) -> int:
    """Bytes of a shard index with its crc32c."""
    return slots * 16 + 4
