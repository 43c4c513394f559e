"""int8: symmetric, one float32 scale a record and map (channel; frame and channel for clips).

A map is quantised to round(x / scale) with scale = max|x| / 127; -128 is never a code, it marks what was not written.
"""

from collections.abc import Mapping

from fcache.cache_spec.encodings.encoding import Array, Encoding, Namespace, Part
from fcache.cache_spec.spec import LevelSpec


def _axes(level: LevelSpec) -> tuple[int, ...]:
    """The axes of [B, *level.shape] that share one scale: H and W where there are any, else C."""
    dims = level.dims.split()
    names = [d for d in dims if d in "HW"] or ["C"]
    return tuple(1 + dims.index(d) for d in names)


def _scale_shape(level: LevelSpec) -> tuple[int, ...]:
    axes = _axes(level)
    return tuple(n for i, n in enumerate(level.shape) if i + 1 not in axes)


def _encode(x: Array, level: LevelSpec, tables: Mapping[str, Array], xp: Namespace) -> Mapping[str, Array]:
    axes = _axes(level)
    largest = xp.amax(abs(x), axis=axes)
    # By an array: CUDA divides by a number through its reciprocal, which is not the same in the last bit.
    scale = largest / xp.full_like(largest, 127.0)
    wide = scale.reshape(_wide(level, len(x)))
    # A map of zeros, or one too small to have a normal scale, is all zeros.
    codes = xp.round(xp.where(wide > 0, x / xp.where(wide > 0, wide, xp.ones_like(wide)), xp.zeros_like(x)))
    return {"": xp.asarray(xp.clip(codes, -127, 127), dtype=xp.int8), ".scale": scale}


def _wide(level: LevelSpec, batch: int) -> tuple[int, ...]:
    axes = _axes(level)
    return (batch, *(1 if i + 1 in axes else n for i, n in enumerate(level.shape)))


def _decode(stored: Mapping[str, Array], level: LevelSpec, tables: Mapping[str, Array], xp: Namespace) -> Array:
    codes = stored[""]
    return xp.asarray(codes, dtype=xp.float32) * stored[".scale"].reshape(_wide(level, len(codes)))


def _error(x: Array, level: LevelSpec, xp: Namespace) -> Array:
    # Half a step, and a little for the rounding of the division and the product.
    return xp.amax(abs(x), axis=_axes(level)).reshape(_wide(level, len(x))) / 127.0 * (0.5 + 1e-4) + 1e-38


ENCODING = Encoding(
    name="int8",
    parts=lambda level: (
        Part("", "int8", level.shape, -128),
        Part(".scale", "float32", _scale_shape(level), float("nan"), layout="table"),
    ),
    encode=_encode,
    decode=_decode,
    error=_error,
    # A little less than the largest float32: 127 times a rounded scale must not overflow.
    largest=3.4e38,
)
