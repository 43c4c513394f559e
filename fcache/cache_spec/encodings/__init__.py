"""Encodings: how decoded float32 features become stored numbers and back.

One encoding is one file that defines `ENCODING`. Its functions are written over an array namespace `xp` (numpy or
torch), so that both give equal codes.
"""

import importlib
import pkgutil
from functools import cache

from fcache.cache_spec.encodings.encoding import Encoding as Encoding
from fcache.cache_spec.encodings.encoding import Part as Part
from fcache.cache_spec.errors import unknown_name


def encoding_names() -> tuple[str, ...]:
    """The names of all encodings."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name != "encoding")


@cache
def find_encoding(name: str) -> Encoding:
    """The encoding of that name. Raises SpecError with the nearest names if there is none."""
    if name not in encoding_names():
        raise unknown_name("encoding", name, encoding_names())
    found: Encoding = importlib.import_module(f"{__name__}.{name}").ENCODING
    return found
