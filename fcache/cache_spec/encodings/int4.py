"""int4: symmetric, two codes a byte, one float32 scale a record and map, as int8 has it.

A map is quantised to round(x / scale) with scale = max|x| / 7 and stored as code + 8, the first of two values in the
low half of a byte; 0 is never stored, it marks what was not written. A map with an odd number of values ends with a
code of 0.
"""

import math
from collections.abc import Mapping

import numpy as np

from fcache.cache_spec.encodings.encoding import (
    Array,
    Encoding,
    Namespace,
    Part,
    Tables,
    filled,
    half_a_step,
    scale_and_codes,
    scale_part,
    scale_shape,
    scaled,
)
from fcache.cache_spec.spec import LevelSpec


def _map_size(level: LevelSpec) -> int:
    """Values that share one scale."""
    return math.prod(level.shape[len(scale_shape(level)) :])


def _parts(level: LevelSpec) -> tuple[Part, ...]:
    packed = (*scale_shape(level), (_map_size(level) + 1) // 2)
    return (Part("", "uint8", packed, 0, compression="zstd"), scale_part(level))


def _encode(x: Array, level: LevelSpec, tables: Tables, xp: Namespace) -> Mapping[str, Array]:
    scale, codes = scale_and_codes(x, level, 7, xp)
    maps = xp.asarray(codes, dtype=xp.uint8 if xp is np else xp.int8).reshape(*scale.shape, _map_size(level))
    low, high = maps[..., 0::2] + 8, maps[..., 1::2] + 8
    if _map_size(level) % 2:
        high = xp.concatenate([high, xp.full_like(low[..., :1], 8)], -1)
    return {"": xp.asarray(low | high << 4, dtype=xp.uint8), ".scale": scale}


def _halves(packed: np.ndarray, size: int) -> np.ndarray:
    """Codes, int8 [maps, size], from bytes [maps, (size + 1) // 2]; many at a time, without a loop over values."""
    words = packed.astype("<u2", order="C")
    words |= words << 4
    words &= 0x0F0F
    codes = words.view(np.int8)
    codes -= 8
    return codes[:, :size]


def _decode(
    stored: Mapping[str, Array], level: LevelSpec, tables: Tables, xp: Namespace, *, out: Array | None = None
) -> Array:
    packed, scale, size = stored[""], stored[".scale"], _map_size(level)
    if xp is np:
        rows = packed.reshape(scale.size, -1)
        return scaled(lambda first, last: _halves(rows[first:last], size), scale, level, 7, out)
    codes = xp.stack([packed & 15, packed >> 4], -1).reshape(*scale.shape, -1)[..., :size]
    values = (xp.asarray(codes, dtype=xp.float32) - 8) * scale[..., None]
    return filled(values.reshape(len(packed), *level.shape), out)


ENCODING = Encoding(
    name="int4",
    parts=_parts,
    encode=_encode,
    decode=_decode,
    error=lambda x, level, tables, xp: half_a_step(x, level, 7, xp),
    # As int8: 7 times a rounded scale must not overflow.
    largest=3.4e38,
)
