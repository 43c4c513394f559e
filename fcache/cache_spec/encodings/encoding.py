"""What an encoding is."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fcache.cache_spec.spec import LevelSpec

Array = Any
Namespace = Any
Tables = Mapping[str, Array]

# Values that are decoded together: float32 of that many fit into a core's own cache beside their codes.
CHUNK = 1 << 16


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded level: `suffix` ("" for the codes, ".scale" …) and one record's type and shape.

    `compression` "zstd" says that the codes are made to be compressed; None leaves it to the cache's layout.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | int
    layout: str = "sharded"
    compression: str | None = None


class Decode(Protocol):
    """Stored arrays to float32 [B, *level.shape]; `out`, float32 or float16 of that shape, is filled and returned."""

    def __call__(
        self, stored: Mapping[str, Array], level: LevelSpec, tables: Tables, xp: Namespace, *, out: Array | None = None
    ) -> Array:
        """The features."""
        ...


@dataclass(frozen=True)
class Fit:
    """How the tables of an encoding come from a sample of features: sums to which batches are added.

    `start(level)` gives empty sums; `add(sums, x, level)` the sums with float32 features [B, *level.shape] added;
    `tables(sums, level)` the float32 tables by name; `shapes(level)` their shapes. Sums are float64, and equal
    batches in equal order give equal tables.
    """

    start: Callable[[LevelSpec], Mapping[str, np.ndarray]]
    add: Callable[[Mapping[str, np.ndarray], np.ndarray, LevelSpec], Mapping[str, np.ndarray]]
    tables: Callable[[Mapping[str, np.ndarray], LevelSpec], Mapping[str, np.ndarray]]
    shapes: Callable[[LevelSpec], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Encoding:
    """A pair of functions between float32 features and stored arrays.

    `parts(level)` lists the stored arrays. `encode(x, level, tables, xp)` takes float32 [B, *level.shape] and returns
    one array a suffix; `decode` is its inverse up to an error. `error(x, level, tables, xp)` bounds
    |decode(encode(x)) - x| elementwise, broadcastable to x. `largest` is the largest magnitude it can hold.
    `tables` holds fitted arrays by name and is empty for an encoding that fits nothing (`fit` is None).
    `codes(record, level)` gives a stored record's codes, where `error` is too wide to tell equal features from others:
    codes of equal features differ by 1 at most and in less than a hundredth, where a rounding fell the other way.
    """

    name: str
    parts: Callable[[LevelSpec], tuple[Part, ...]]
    encode: Callable[[Array, LevelSpec, Tables, Namespace], Mapping[str, Array]]
    decode: Decode
    error: Callable[[Array, LevelSpec, Tables, Namespace], Array]
    largest: float = 3.4028234663852886e38
    fit: Fit | None = None
    codes: Callable[[np.ndarray, LevelSpec], np.ndarray] | None = None


def filled(values: Array, out: Array | None) -> Array:
    """`values`, or `out` with them in it."""
    if out is None:
        return values
    out[...] = values
    return out


def scale_axes(level: LevelSpec) -> tuple[int, ...]:
    """The axes of [B, *level.shape] that share one scale, always the last ones: H and W where there are any, else C."""
    dims = level.dims.split()
    names = [d for d in dims if d in "HW"] or ["C"]
    return tuple(1 + dims.index(d) for d in names)


def scale_shape(level: LevelSpec) -> tuple[int, ...]:
    """The shape of one record's scales: that of the record without the axes that share one."""
    axes = scale_axes(level)
    return tuple(n for i, n in enumerate(level.shape) if i + 1 not in axes)


def scale_part(level: LevelSpec) -> Part:
    """The float32 scales beside the codes."""
    return Part(".scale", "float32", scale_shape(level), float("nan"), layout="table")


def scale_and_codes(x: Array, level: LevelSpec, largest_code: int, xp: Namespace) -> tuple[Array, Array]:
    """One scale a map, max|x| / `largest_code`, float32 [B, *scale_shape], and round(x / scale), float32 like x."""
    shape = scale_shape(level)
    largest = xp.amax(abs(x), axis=scale_axes(level))
    # By an array: CUDA divides by a number through its reciprocal, which is not the same in the last bit.
    scale = largest / xp.full_like(largest, float(largest_code))
    wide = scale.reshape(len(x), *shape, *(1,) * (len(level.shape) - len(shape)))
    # A map of zeros, or one too small to have a normal scale, is all zeros.
    codes = xp.round(xp.where(wide > 0, x / xp.where(wide > 0, wide, xp.ones_like(wide)), xp.zeros_like(x)))
    return scale, xp.clip(codes, -largest_code, largest_code)


def half_a_step(x: Array, level: LevelSpec, largest_code: int, xp: Namespace) -> Array:
    """The error of codes from `scale_and_codes`: half a step, and a little for rounding the quotient and product."""
    shape = (len(x), *scale_shape(level))
    largest = xp.amax(abs(x), axis=scale_axes(level)).reshape(*shape, *(1,) * (1 + len(level.shape) - len(shape)))
    return largest / largest_code * (0.5 + 1e-4) + 1e-38


def scaled(
    codes: Callable[[int, int], np.ndarray],
    scale: np.ndarray,
    level: LevelSpec,
    largest_code: int,
    out: np.ndarray | None,
) -> np.ndarray:
    """int8 codes times scales, with numpy, some maps at a time so that all lies in the core's own cache.

    `codes(first, last)` gives those of maps [first, last) of all records, int8 [maps, values]; `scale` is
    [B, *scale_shape]. Returns float32 [B, *level.shape], or `out`.
    """
    if out is None:
        out = np.empty((len(scale), *level.shape), dtype=np.float32)
    assert out.flags.c_contiguous, "what is filled is contiguous"
    maps, values = scale.size, math.prod(level.shape[len(scale_shape(level)) :])
    flat, wide, step = out.reshape(maps, values), scale.reshape(maps, 1), max(1, CHUNK // values)
    if out.dtype == np.float32:
        for first in range(0, maps, step):
            rows = flat[first : first + step]
            np.copyto(rows, codes(first, first + len(rows)))
            np.multiply(rows, wide[first : first + step], out=rows)
        return out
    scratch = np.empty((step, values), dtype=np.float32)
    words, signs = np.empty(scratch.shape, dtype=np.uint32), np.empty(scratch.shape, dtype=np.uint16)
    # No code but 0 gives a subnormal half, and none overflows: then float32 shifted by the exponents' difference of
    # 112 has the bits of the half at its top.
    shifted = out.dtype == np.float16 and _all_normal(scale, largest_code)
    wide = wide * np.float32(2.0**-112) if shifted else wide
    for first in range(0, maps, step):
        rows = flat[first : first + step]
        n = len(rows)
        np.copyto(scratch[:n], codes(first, first + n))
        np.multiply(scratch[:n], wide[first : first + step], out=scratch[:n])
        if shifted:
            _shifted_to_half(scratch[:n], rows, words[:n], signs[:n])
        else:
            np.copyto(rows, scratch[:n], "same_kind")
    return out


def _all_normal(scale: np.ndarray, largest_code: int) -> bool:
    """Whether all codes but 0 give halves that are neither subnormal nor too large."""
    return bool(((scale >= 2.0**-14) & (scale <= 65472.0 / largest_code) | (scale == 0)).all())


def _shifted_to_half(x: np.ndarray, out: np.ndarray, words: np.ndarray, signs: np.ndarray) -> None:
    """float32 times 2^-112 to float16, to nearest even, in whole-array steps: numpy's own cast takes three times as
    long. `words` and `signs` are scratch arrays of its shape.
    """
    bits, halves = x.view(np.uint32), out.view(np.uint16)
    np.right_shift(bits, 13, out=words)
    np.bitwise_and(words, 1, out=words)
    np.add(words, 0x0FFF, out=words)
    np.add(words, bits, out=words)
    np.right_shift(words, 13, out=words)
    np.copyto(halves, words, "unsafe")
    # The sign is in bit 18 now.
    np.right_shift(words, 3, out=words)
    np.bitwise_and(words, 0x8000, out=words)
    np.copyto(signs, words, "unsafe")
    np.bitwise_or(halves, signs, out=halves)
