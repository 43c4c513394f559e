"""int8: symmetric, one float32 scale a record and map (channel; frame and channel for clips).

A map is quantised to round(x / scale) with scale = max|x| / 127; -128 is never a code, it marks what was not written.
"""

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
    scaled,
)
from fcache.cache_spec.spec import LevelSpec


def _encode(x: Array, level: LevelSpec, tables: Tables, xp: Namespace) -> Mapping[str, Array]:
    scale, codes = scale_and_codes(x, level, 127, xp)
    return {"": xp.asarray(codes, dtype=xp.int8), ".scale": scale}


def _decode(
    stored: Mapping[str, Array], level: LevelSpec, tables: Tables, xp: Namespace, *, out: Array | None = None
) -> Array:
    codes, scale = stored[""], stored[".scale"]
    if xp is np:
        maps = codes.reshape(scale.size, -1)
        return scaled(lambda first, last: maps[first:last], scale, level, 127, out)
    wide = scale.reshape(*scale.shape, *(1,) * (codes.ndim - scale.ndim))
    return filled(xp.asarray(codes, dtype=xp.float32) * wide, out)


ENCODING = Encoding(
    name="int8",
    parts=lambda level: (Part("", "int8", level.shape, -128), scale_part(level)),
    encode=_encode,
    decode=_decode,
    error=lambda x, level, tables, xp: half_a_step(x, level, 127, xp),
    # A little less than the largest float32: 127 times a rounded scale must not overflow.
    largest=3.4e38,
)
