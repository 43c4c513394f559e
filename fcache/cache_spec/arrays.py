"""Arrays of a cache as data: name, type and shape of one record, and how records lie in files."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fcache.cache_spec.errors import SpecError


@dataclass(frozen=True)
class ArraySpec:
    """One zarr array of a record group.

    `path` is relative to the group; `shape` is that of one record; `ragged` says that axis 0 of a record is padded
    to `shape[0]` and that the array `<path>.count` holds the used length. `layout` is "sharded" (one record an inner
    chunk) or "table" (one plain chunk a shard, for small records). `compression` is "none" or "zstd".
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    fill: float | int = 0
    layout: str = "sharded"
    compression: str = "none"
    ragged: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout == "table" and self.compression != "none":
            raise SpecError(f"array {self.path!r}: tables are never compressed")
        np.dtype(self.dtype)

    @property
    def record_bytes(self) -> int:
        """Bytes of one uncompressed record."""
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape))

    @property
    def count(self) -> "ArraySpec":
        """The array of used lengths beside a ragged one: int32, one number a record."""
        return ArraySpec(path=f"{self.path}.count", dtype="int32", shape=(), fill=-1, layout="table")


def with_counts(arrays: tuple[ArraySpec, ...]) -> tuple[ArraySpec, ...]:
    """`arrays` and, after each ragged one, its count array."""
    return tuple(spec for a in arrays for spec in ((a, a.count) if a.ragged else (a,)))
