"""Whole files piece after piece, in little memory."""

import hashlib
from collections.abc import Iterator

import numpy as np

from fcache.cache_spec.storage.protocol import Storage

PIECE_BYTES = 4 << 20
# Read together, to hide the latency of object stores: 16 MB of memory.
PIECES = 4


def pieces(storage: Storage, name: str, size: int) -> Iterator[memoryview]:
    """The content of a file of that size; each piece holds until the next one is asked for. Raises as `read_ranges`."""
    step = PIECE_BYTES * PIECES
    buffer = np.empty(min(size, step), dtype=np.uint8)
    for start in range(0, size, step):
        length = min(step, size - start)
        parts = range(0, length, PIECE_BYTES)
        storage.read_ranges([(name, start + p, buffer[p : min(p + PIECE_BYTES, length)]) for p in parts])
        yield buffer[:length].data


def sha256_of(storage: Storage, name: str, size: int) -> bytes:
    """The SHA-256 of a file of that size. Raises as `read_ranges`."""
    found = hashlib.sha256()
    for piece in pieces(storage, name, size):
        found.update(piece)
    return found.digest()
