"""rot:STEP: standardised channels, rotated to their principal axes, transformed over the map, one uniform step.

Channels are standardised with fitted means and deviations and rotated by a fitted orthonormal matrix; each rotated map
goes through an orthonormal cosine transform in blocks of 8 x 8 (blocks at the far edges are smaller). Neither drops
anything. Coefficients are rounded to multiples of STEP * sqrt(16 / stride), in standard deviations of a channel, so
that detail that is small everywhere costs almost nothing. `_pack` says how codes lie in bytes; they are made for zstd.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fcache.cache_spec.encodings.encoding import Array, Encoding, Fit, Namespace, Part, Tables
from fcache.cache_spec.errors import DataError, SpecError
from fcache.cache_spec.spec import LevelSpec

# The smaller points lose less, the larger ones take less; docs/design/encodings.md has what each costs a head.
POINTS = ("0.5", "1", "1.25")
BLOCK = 8
# A product of this many blocks costs few useless multiplications and is large enough for BLAS.
TILE = 4 * BLOCK
# Zigzag codes from here on need a nibble more, and from there on two bytes more.
NIBBLES, BYTES = 3, 15
LARGEST_CODE = 32767
WRITTEN = 1


def with_parameter(text: str) -> Encoding:
    """The encoding with the step `text`. Raises SpecError if it is not written as Python's %g writes it."""
    try:
        step = float(text)
    except ValueError:
        step = math.nan
    if not 0.05 <= step <= 8:
        raise SpecError(f"encoding rot:STEP needs a step from 0.05 to 8 deviations, got {text!r}; try rot:{POINTS[0]}")
    if text != f"{step:g}":
        raise SpecError(f"encoding 'rot:{text}' is written rot:{step:g}: one encoding has one name")
    return Encoding(
        name=f"rot:{text}",
        parts=lambda level: (Part("", "uint8", (_sizes(_count(level))[-1],), 0, compression="zstd"),),
        encode=lambda x, level, tables, xp: _encode(x, level, tables, xp, step),
        decode=lambda stored, level, tables, xp, *, out=None: _decode(stored[""], level, tables, xp, step, out),
        error=lambda x, level, tables, xp: _error(x, level, tables, xp, step),
        largest=1e30,
        fit=Fit(_start, _add, _tables, _shapes),
    )


def _encode(x: Array, level: LevelSpec, tables: Tables, xp: Namespace, step: float) -> Mapping[str, Array]:
    frames, channels, height, width = _axes(level)
    mean, turn = tables["mean"][:, None], tables["rotation"] / (tables["scale"] * _step(level, step))
    rows, columns = (_like(_cosines(n), x, xp) for n in (height, width))
    order, packed = _like(_order(*_axes(level)), x, xp), []
    # One record at a time: a product must not depend on what else is in the batch.
    for record in x:
        maps = turn @ (record.reshape(frames, channels, -1) - mean)
        codes = xp.round(_transformed(maps.reshape(frames, channels, height, width), rows, columns, xp))
        if not bool((abs(codes) <= LARGEST_CODE).all()):
            raise DataError(
                f"level {level.name!r} lies more than {LARGEST_CODE} steps of {step:g} deviations from the mean of the "
                "sample that rot was fitted to; use --encoding int8"
            )
        packed.append(_pack(xp.asarray(codes.reshape(-1)[order], dtype=xp.int32), xp))
    return {"": xp.stack(packed)}


def _decode(stored: Array, level: LevelSpec, tables: Tables, xp: Namespace, step: float, out: Array | None) -> Array:
    frames, channels, height, width = _axes(level)
    mean, back = tables["mean"][:, None], (tables["rotation"] * (tables["scale"] * _step(level, step))).T
    rows, columns = (_like(_cosines(n), stored, xp) for n in (height, width))
    place = _like(_place(*_axes(level)), stored, xp)
    found: Array = out
    if out is None:
        found = _like(np.empty((len(stored), *level.shape), dtype=np.float32), stored, xp)
    for record, target in zip(stored, found, strict=True):
        codes = xp.asarray(_unpack(record, len(place), xp)[place], dtype=xp.float32)
        maps = _transformed(codes.reshape(frames, channels, height, width), rows.T, columns.T, xp)
        features = back @ maps.reshape(frames, channels, -1) + mean
        # A record that was never written is all zeros.
        target[...] = xp.where(record[0] == WRITTEN, features, xp.full_like(features, math.nan)).reshape(level.shape)
    return found


def _error(x: Array, level: LevelSpec, tables: Tables, xp: Namespace, step: float) -> Array:
    """Half a step in every coefficient at once, seen from one value, and what float32 loses in between."""
    frames, channels, height, width = _axes(level)
    mixed = [float(abs(_cosines(n)).sum(axis=0).max()) for n in (height, width)]
    bound = abs(tables["rotation"]).sum(0) * tables["scale"] * (_step(level, step) * (0.5 + 0.02) * mixed[0] * mixed[1])
    bound = xp.asarray(bound[:, None], dtype=xp.float64) * (1 + 1e-4) + 1e-30
    wide = abs(x.reshape(len(x), frames, channels, -1)) * 1e-5 + bound
    return wide.reshape(x.shape)


def _step(level: LevelSpec, step: float) -> float:
    """The step of a level: finer at coarse strides, where a value says more and there are few."""
    return step * math.sqrt(16 / level.stride)


def _axes(level: LevelSpec) -> tuple[int, int, int, int]:
    """Frames, channels, height and width; 1 where there is no such axis."""
    sizes = dict(zip(level.dims.split(), level.shape, strict=True))
    found = tuple(sizes.get(d, 1) for d in "TCHW")
    if [d for d in "TCHW" if d in sizes] != level.dims.split():
        raise SpecError(f"encoding rot takes the axes T C H W in this order, level {level.name!r} has {level.dims!r}")
    return found[0], found[1], found[2], found[3]


def _count(level: LevelSpec) -> int:
    return math.prod(level.shape)


def _like(array: np.ndarray, x: Array, xp: Namespace) -> Array:
    """A numpy array in the namespace and on the device of `x`."""
    return array if xp is np else xp.asarray(array, device=x.device)


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(first, min(BLOCK, size - first)) for first in range(0, size, BLOCK)]


@lru_cache(maxsize=64)
def _cosines(size: int) -> np.ndarray:
    """The orthonormal transform of an axis, float32 [size, size]: one DCT-II a block. Row: frequency of a block."""
    matrix = np.zeros((size, size))
    for first, n in _blocks(size):
        k, i = np.arange(n)[:, None], np.arange(n)[None, :]
        waves = np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
        waves[0] = math.sqrt(1 / n)
        matrix[first : first + n, first : first + n] = waves
    return matrix.astype(np.float32)


def _transformed(maps: Array, rows: Array, columns: Array, xp: Namespace) -> Array:
    """`rows` @ maps @ `columns`.T of [..., H, W]; both are zero outside the blocks, which are taken some at a time."""
    tall = [rows[i : i + TILE, i : i + TILE] @ maps[..., i : i + TILE, :] for i in range(0, len(rows), TILE)]
    maps = xp.concatenate(tall, -2)
    wide = [maps[..., i : i + TILE] @ columns[i : i + TILE, i : i + TILE].T for i in range(0, len(columns), TILE)]
    return xp.concatenate(wide, -1)


@lru_cache(maxsize=64)
def _order(frames: int, channels: int, height: int, width: int) -> np.ndarray:
    """Positions in [T, C, H, W], int64, in the order in which codes are stored.

    By frequency (that of the row and that of the column as fractions of their blocks, added), then channel, then
    frame, row and column: so that equal statistics lie together.
    """
    row, column = ([(k, n) for _, n in _blocks(size) for k in range(n)] for size in (height, width))
    # Numbers of equal fractions are equal: all over a multiple of every block size.
    common = math.lcm(*range(1, BLOCK + 1))
    rows = np.asarray([k * (common // n) for k, n in row], dtype=np.int64)
    columns = np.asarray([k * (common // n) for k, n in column], dtype=np.int64)
    frequency = np.broadcast_to(rows[:, None] + columns[None, :], (frames, channels, height, width)).reshape(-1)
    channel = np.broadcast_to(np.arange(channels)[None, :, None, None], (frames, channels, height, width)).reshape(-1)
    return np.lexsort((channel, frequency))


@lru_cache(maxsize=64)
def _place(frames: int, channels: int, height: int, width: int) -> np.ndarray:
    """Where each value of [T, C, H, W] lies among the stored codes: the inverse of `_order`."""
    order = _order(frames, channels, height, width)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place


def _sizes(count: int) -> tuple[int, int, int, int, int]:
    """Where the parts of a record of `count` codes end: mark, crumbs, nibbles, low bytes, high bytes."""
    ends = np.cumsum([1, (count + 3) // 4, (count + 1) // 2, count, count])
    return tuple(int(n) for n in ends)  # type: ignore[return-value]


def _pack(codes: Array, xp: Namespace) -> Array:
    """int32 codes to the bytes of a record: uint8, as long as the worst case, zeros where nothing is needed.

    A code is folded to 0, -1, 1, -2, 2 … -> 0, 1, 2, 3, 4 … Every one has a crumb, two bits, the first of four in the
    highest bits of a byte, that holds it up to 2; 3 says that a nibble follows, the first of two in the high half,
    that holds the rest up to 14; 15 says that two bytes follow, low ones and high ones apart, that hold what is left.
    What follows is close together, so that zeros at the end of each part are all that the worst case costs.
    """
    count = len(codes)
    ends = _sizes(count)
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


def _unpack(record: Array, count: int, xp: Namespace) -> Array:
    """The int32 codes of a record."""
    ends = _sizes(count)
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


def _start(level: LevelSpec) -> Mapping[str, np.ndarray]:
    channels = level.channels
    return {"count": np.zeros(()), "sum": np.zeros(channels), "products": np.zeros((channels, channels))}


def _add(sums: Mapping[str, np.ndarray], x: np.ndarray, level: LevelSpec) -> Mapping[str, np.ndarray]:
    frames, channels, _, _ = _axes(level)
    values = x.reshape(-1, channels, _count(level) // (frames * channels)).astype(np.float64)
    return {
        "count": sums["count"] + values.shape[0] * values.shape[2],
        "sum": sums["sum"] + values.sum(axis=(0, 2)),
        "products": sums["products"] + sum(record @ record.T for record in values),
    }


def _tables(sums: Mapping[str, np.ndarray], level: LevelSpec) -> Mapping[str, np.ndarray]:
    """Means and deviations of channels, and the eigenvectors of their correlation as rows, largest value first."""
    count = max(1.0, float(sums["count"]))
    mean = sums["sum"] / count
    covariance = sums["products"] / count - np.outer(mean, mean)
    variance = np.diag(covariance)
    # A channel that never changes is kept as it is: what float64 leaves of its variance is noise.
    steady = variance <= 1e-12 * np.diag(sums["products"]) / count
    scale = np.sqrt(np.where(steady, 1.0, variance))
    correlation = np.where(steady[:, None] | steady[None, :], np.eye(len(mean)), covariance / np.outer(scale, scale))
    _, vectors = np.linalg.eigh(correlation)
    tables: dict[str, Any] = {"mean": mean, "scale": scale, "rotation": vectors[:, ::-1].T}
    return {name: np.ascontiguousarray(table, dtype=np.float32) for name, table in tables.items()}


def _shapes(level: LevelSpec) -> Mapping[str, tuple[int, ...]]:
    channels = level.channels
    return {"mean": (channels,), "scale": (channels,), "rotation": (channels, channels)}
