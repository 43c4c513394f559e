"""fp32: the features as they are."""

from fcache.cache_spec.encodings.encoding import Encoding, Part, filled

ENCODING = Encoding(
    name="fp32",
    parts=lambda level: (Part("", "float32", level.shape, float("nan")),),
    encode=lambda x, level, tables, xp: {"": x},
    decode=lambda stored, level, tables, xp, *, out=None: filled(stored[""], out),
    error=lambda x, level, tables, xp: xp.zeros_like(x),
)
