"""Encodings: how decoded float32 features become stored numbers and back.

One encoding is one file that defines `ENCODING`, or `with_parameter(text)` and `POINTS` if its name has a parameter
("rot:1.5"). Its functions are written over an array namespace `xp` (numpy or torch), so that both give equal codes.
"""

import importlib
import pkgutil
from functools import cache

from fcache.cache_spec.encodings.encoding import Encoding as Encoding
from fcache.cache_spec.encodings.encoding import Fit as Fit
from fcache.cache_spec.encodings.encoding import Part as Part
from fcache.cache_spec.errors import SpecError, unknown_name


@cache
def encoding_names() -> tuple[str, ...]:
    """The names of all encodings; of one with a parameter those that are worth having."""
    names: list[str] = []
    for kind in _kinds():
        module = importlib.import_module(f"{__name__}.{kind}")
        names += [f"{kind}:{p}" for p in module.POINTS] if hasattr(module, "POINTS") else [kind]
    return tuple(names)


def _kinds() -> tuple[str, ...]:
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name != "encoding")


@cache
def find_encoding(name: str) -> Encoding:
    """The encoding of that name. Raises SpecError with the nearest names if there is none."""
    kind, colon, parameter = name.partition(":")
    if kind not in _kinds():
        raise unknown_name("encoding", name, encoding_names())
    module = importlib.import_module(f"{__name__}.{kind}")
    takes = hasattr(module, "with_parameter")
    if takes != bool(colon):
        expected = f"a parameter, as in {kind}:{module.POINTS[0]}" if takes else "no parameter"
        raise SpecError(f"encoding {kind!r} takes {expected}, got {name!r}")
    found: Encoding = module.with_parameter(parameter) if takes else module.ENCODING
    return found
