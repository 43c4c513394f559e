"""rot:STEP: standardised channels, rotated to their principal axes, transformed over the map, one uniform step.

Channels are standardised with fitted means and deviations and rotated by a fitted orthonormal matrix; each rotated map
goes through an orthonormal cosine transform in blocks of 8 x 8 (blocks at the far edges are smaller). Neither drops
anything. Coefficients are rounded to multiples of STEP * sqrt(16 / stride), in standard deviations of a channel, so
that detail that is small everywhere costs almost nothing. How codes lie in bytes is said in `codepacking`.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fcache.cache_spec.codepacking import LARGEST_CODE, WRITTEN, pack_codes, packed_sizes, unpack_codes
from fcache.cache_spec.encodings.encoding import Array, Encoding, Fit, Namespace, Part, Tables
from fcache.cache_spec.errors import DataError, SpecError
from fcache.cache_spec.spec import LevelSpec

# The smaller points lose less, the larger ones take less; docs/design/encodings.md has what each costs a head.
POINTS = ("0.5", "1", "1.25")
BLOCK = 8
# A product of this many blocks costs few useless multiplications and is large enough for BLAS.
TILE = 4 * BLOCK


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
        parts=lambda level: (Part("", "uint8", (packed_sizes(_count(level))[-1],), 0, compression="zstd"),),
        encode=lambda x, level, tables, xp: _encode(x, level, tables, xp, step),
        decode=lambda stored, level, tables, xp, *, out=None: _decode(stored[""], level, tables, xp, step, out),
        error=lambda x, level, tables, xp: _error(x, level, tables, xp, step),
        largest=1e30,
        fit=Fit(_start, _add, _tables, _shapes),
        codes=lambda record, level: unpack_codes(record, _count(level), np),
    )


def _encode(x: Array, level: LevelSpec, tables: Tables, xp: Namespace, step: float) -> Mapping[str, Array]:
    frames, channels, height, width = _axes(level)
    mean, turn = tables["mean"][:, None], tables["rotation"] / (tables["scale"] * _step(level, step))
    rows, columns = (_constant(_cosines, (n,), xp, x.device) for n in (height, width))
    order, packed = _constant(_order, _axes(level), xp, x.device), []
    # One record at a time: a product must not depend on what else is in the batch.
    for record in x:
        maps = turn @ (record.reshape(frames, channels, -1) - mean)
        codes = xp.round(_transformed(maps.reshape(frames, channels, height, width), rows, columns, xp))
        if not bool((abs(codes) <= LARGEST_CODE).all()):
            raise DataError(
                f"level {level.name!r} lies more than {LARGEST_CODE} steps of {step:g} deviations from the mean of the "
                "sample that rot was fitted to; use --encoding int8"
            )
        packed.append(pack_codes(xp.asarray(codes.reshape(-1)[order], dtype=xp.int32), xp))
    return {"": xp.stack(packed)}


def _decode(stored: Array, level: LevelSpec, tables: Tables, xp: Namespace, step: float, out: Array | None) -> Array:
    frames, channels, height, width = _axes(level)
    mean, back = tables["mean"][:, None], (tables["rotation"] * (tables["scale"] * _step(level, step))).T
    rows, columns = (_constant(_cosines, (n,), xp, stored.device) for n in (height, width))
    place = _constant(_place, _axes(level), xp, stored.device)
    found: Array = out
    if out is None:
        found = xp.empty((len(stored), *level.shape), dtype=xp.float32, device=stored.device)
    for record, target in zip(stored, found, strict=True):
        codes = xp.asarray(unpack_codes(record, len(place), xp)[place], dtype=xp.float32)
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


@lru_cache(maxsize=64)
def _constant(make: Callable[..., np.ndarray], sizes: tuple[int, ...], xp: Namespace, device: Any) -> Array:
    """What `make` gives for these sizes, on a device: made and taken there once."""
    array = make(*sizes)
    return array if xp is np else xp.asarray(array, device=device)


def _blocks(size: int) -> list[tuple[int, int]]:
    return [(first, min(BLOCK, size - first)) for first in range(0, size, BLOCK)]


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


def _place(frames: int, channels: int, height: int, width: int) -> np.ndarray:
    """Where each value of [T, C, H, W] lies among the stored codes: the inverse of `_order`."""
    order = _order(frames, channels, height, width)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place


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
