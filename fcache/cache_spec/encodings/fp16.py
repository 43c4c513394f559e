"""fp16: IEEE half precision, round to nearest even; magnitudes above 65504 do not fit."""

from fcache.cache_spec.encodings.encoding import Encoding, Part, filled

# Half an ulp is 2^-11 of the value; subnormals step by 2^-24.
ENCODING = Encoding(
    name="fp16",
    parts=lambda level: (Part("", "float16", level.shape, float("nan")),),
    encode=lambda x, level, tables, xp: {"": xp.asarray(x, dtype=xp.float16)},
    decode=lambda stored, level, tables, xp, *, out=None: (
        xp.asarray(stored[""], dtype=xp.float32) if out is None else filled(stored[""], out)
    ),
    error=lambda x, level, tables, xp: abs(x) * 2.0**-11 + 2.0**-25,
    largest=65504.0,
)
