"""What an encoding is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fcache.cache_spec.spec import LevelSpec

Array = Any
Namespace = Any


@dataclass(frozen=True)
class Part:
    """One stored array of an encoded level: `suffix` ("" for the codes, ".scale" …) and one record's type and shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | int
    layout: str = "sharded"


@dataclass(frozen=True)
class Encoding:
    """A pair of functions between float32 features and stored arrays.

    `parts(level)` lists the stored arrays. `encode(x, level, tables, xp)` takes float32 [B, *level.shape] and returns
    one array a suffix; `decode(stored, level, tables, xp)` returns float32 [B, *level.shape].
    `error(x, level, xp)` bounds |decode(encode(x)) - x| elementwise, broadcastable to x.
    `largest` is the largest magnitude it can hold. `tables` holds fitted arrays by name and is empty for an encoding
    that fits nothing (`fit` is None).
    """

    name: str
    parts: Callable[[LevelSpec], tuple[Part, ...]]
    encode: Callable[[Array, LevelSpec, Mapping[str, Array], Namespace], Mapping[str, Array]]
    decode: Callable[[Mapping[str, Array], LevelSpec, Mapping[str, Array], Namespace], Array]
    error: Callable[[Array, LevelSpec, Namespace], Array]
    largest: float = 3.4028234663852886e38
    fit: Callable[[Array, LevelSpec], Mapping[str, Array]] | None = None
