"""Small whole numbers in bytes that zstd compresses well: most take two bits, larger ones a nibble and bytes more."""

from typing import Any

import numpy as np

Array = Any
Namespace = Any

# Folded codes from here on need a nibble more, and from there on two bytes more.
NIBBLES, BYTES = 3, 15
LARGEST_CODE = 32767
WRITTEN = 1


def packed_sizes(count: int) -> tuple[int, int, int, int, int]:
    """Where the parts of a record of `count` codes end: mark, crumbs, nibbles, low bytes, high bytes."""
    ends = np.cumsum([1, (count + 3) // 4, (count + 1) // 2, count, count])
    return tuple(int(n) for n in ends)  # type: ignore[return-value]


def pack_codes(codes: Array, xp: Namespace) -> Array:
    """int32 codes to the bytes of a record: uint8, as long as the worst case, zeros where nothing is needed.

    A code is folded to 0, -1, 1, -2, 2 … -> 0, 1, 2, 3, 4 … Every one has a crumb, two bits, the first of four in the
    highest bits of a byte, that holds it up to 2; 3 says that a nibble follows, the first of two in the high half,
    that holds the rest up to 14; 15 says that two bytes follow, low ones and high ones apart, that hold what is left.
    What follows is close together, so that zeros at the end of each part are all that the worst case costs.
    """
    count = len(codes)
    ends = packed_sizes(count)
    record = xp.zeros_like(codes[:1], dtype=xp.uint8).repeat(ends[-1])
    folded = xp.where(codes < 0, -2 * codes - 1, 2 * codes)
    rest = folded[folded >= NIBBLES] - NIBBLES
    left = rest[rest >= BYTES] - BYTES
    record[0] = WRITTEN
    _put(record, ends[0], _joined(xp.clip(folded, 0, NIBBLES), 2, xp), xp)
    _put(record, ends[1], _joined(xp.clip(rest, 0, BYTES), 4, xp), xp)
    _put(record, ends[2], left & 255, xp)
    _put(record, ends[3], left >> 8, xp)
    return record


def _put(record: Array, first: int, values: Array, xp: Namespace) -> None:
    record[first : first + len(values)] = xp.asarray(values, dtype=xp.uint8)


def _joined(values: Array, bits: int, xp: Namespace) -> Array:
    """Values of some bits, so many to a byte, the first in the highest bits; the last byte is filled with zeros."""
    each = 8 // bits
    whole = xp.concatenate([values, xp.zeros_like(values[:1]).repeat(-len(values) % each)])
    columns = whole.reshape(len(whole) // each, each)
    joined = columns[:, 0]
    for i in range(1, each):
        joined = joined << bits | columns[:, i]
    return joined


def unpack_codes(record: Array, count: int, xp: Namespace) -> Array:
    """The int32 codes of a record."""
    ends = packed_sizes(count)
    folded = xp.asarray(_parted(record[ends[0] : ends[1]], 2, xp)[:count], dtype=xp.int32)
    more = xp.argwhere(folded == NIBBLES).reshape(-1)
    nibbles = record[ends[1] : ends[1] + (len(more) + 1) // 2]
    rest = xp.asarray(_parted(nibbles, 4, xp)[: len(more)], dtype=xp.int32)
    wide = xp.argwhere(rest == BYTES).reshape(-1)
    low, high = record[ends[2] : ends[2] + len(wide)], record[ends[3] : ends[3] + len(wide)]
    rest[wide] += xp.asarray(low, dtype=xp.int32) + (xp.asarray(high, dtype=xp.int32) << 8)
    folded[more] += rest
    return (folded >> 1) ^ -(folded & 1)


def _parted(data: Array, bits: int, xp: Namespace) -> Array:
    """What `_joined` joined, uint8."""
    mask = (1 << bits) - 1
    return xp.stack([data >> shift & mask for shift in range(8 - bits, -1, -bits)], -1).reshape(-1)
