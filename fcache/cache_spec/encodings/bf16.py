"""bf16: the upper half of a float32, round to nearest even, stored as uint16 (zarr has no bfloat16)."""

from collections.abc import Mapping

from fcache.cache_spec.encodings.encoding import Array, Encoding, Namespace, Part, Tables, filled
from fcache.cache_spec.spec import LevelSpec


def _encode(x: Array, level: LevelSpec, tables: Tables, xp: Namespace) -> Mapping[str, Array]:
    bits = x.view(xp.int32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Through int16: torch has few uint16 kernels, and int32 to int16 keeps the low bits in both namespaces.
    return {"": xp.asarray(rounded, dtype=xp.int16).view(xp.uint16)}


def _decode(
    stored: Mapping[str, Array], level: LevelSpec, tables: Tables, xp: Namespace, *, out: Array | None = None
) -> Array:
    return filled((xp.asarray(stored[""].view(xp.int16), dtype=xp.int32) << 16).view(xp.float32), out)


ENCODING = Encoding(
    name="bf16",
    # 0x7FC0 is NaN, so that a record that was never written reads as NaN.
    parts=lambda level: (Part("", "uint16", level.shape, 0x7FC0),),
    encode=_encode,
    decode=_decode,
    error=lambda x, level, tables, xp: abs(x) * 2.0**-8 + 2.0**-133,
    largest=3.3895313892515355e38,
)
