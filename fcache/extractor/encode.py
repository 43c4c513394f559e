"""Encoding a batch of features on the device, with the gates against numbers that cannot be stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import DataError, Group, LevelSpec, find_encoding
from fcache.cache_spec.encodings import Encoding
from fcache.extractor.transfer import HostCopies, to_host

# Tables of fitted encodings by level and name, on the device of the features.
Tables = Mapping[str, Mapping[str, Tensor]]
NO_TABLES: Tables = {}
RANGES = "ranges"


@dataclass
class LevelFacts:
    """Minimum and maximum of every level over the records of a shard."""

    smallest: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, level: str, low: float, high: float) -> None:
        """Counts one record's range."""
        self.smallest[level] = min(low, self.smallest.get(level, math.inf))
        self.largest[level] = max(high, self.largest.get(level, -math.inf))

    def as_json(self) -> dict[str, Any]:
        """What a commit stores."""
        return {"min": self.smallest, "max": self.largest, "nonfinite": 0}


@dataclass(frozen=True)
class Coded:
    """A batch that is encoded on its device and on its way to the host: it may still be computed."""

    ids: tuple[str, ...]
    encoding: Encoding
    levels: tuple[str, ...]
    copies: HostCopies

    def wait(self) -> None:
        """Returns when the arrays are on the host."""
        self.copies.wait()

    def stored(self, facts: LevelFacts) -> dict[str, np.ndarray]:
        """The stored arrays by array path; adds the ranges of the levels to `facts`.

        Raises DataError naming the sample and level if a feature is NaN or infinite, or does not fit the encoding.
        """
        arrays = self.copies.arrays()
        _check(arrays.pop(RANGES), self, facts)
        return arrays


def begin_encoding(
    features: Mapping[str, Tensor], group: Group, ids: tuple[str, ...], *, tables: Tables = NO_TABLES
) -> Coded:
    """Encodes a batch where it lies; `tables` are those that the encoding was fitted to.

    Raises as `Coded.stored`, if the encoding itself refuses a feature.
    """
    encoding = find_encoding(group.encoding)
    lowest_highest = [torch.stack([_each(x, torch.amin), _each(x, torch.amax)]) for x in features.values()]
    parts: dict[str, Tensor] = {RANGES: torch.stack(lowest_highest)}
    try:
        for level in group.levels:
            fitted = tables[level.name] if encoding.fit is not None else {}
            for suffix, part in _encoded(encoding, features[level.name], level, fitted, ids).items():
                parts[level.name + suffix] = part
    except DataError:
        # What is not finite does not fit either: say so first.
        Coded(ids, encoding, tuple(features), to_host({RANGES: parts[RANGES]})).stored(LevelFacts())
        raise
    return Coded(ids, encoding, tuple(features), to_host(parts))


def encode_batch(
    features: Mapping[str, Tensor],
    group: Group,
    ids: tuple[str, ...],
    facts: LevelFacts,
    *,
    tables: Tables = NO_TABLES,
) -> dict[str, np.ndarray]:
    """The stored arrays of a batch by array path, on the host. Raises as `Coded.stored`."""
    return begin_encoding(features, group, ids, tables=tables).stored(facts)


def _check(ranges: np.ndarray, coded: Coded, facts: LevelFacts) -> None:
    table: list[Any] = ranges.tolist()
    for name, (lows, highs) in zip(coded.levels, table, strict=True):
        for sample, low, high in zip(coded.ids, lows, highs, strict=True):
            # NaN passes through amin and amax, so both together show every non-finite number.
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError(
                    f"sample {sample!r}: level {name!r} holds NaN or infinite features; check the weights, or compute "
                    "with --precision fp32"
                )
            if max(-low, high) > coded.encoding.largest:
                raise DataError(
                    f"sample {sample!r}: level {name!r} reaches {max(-low, high):g}, encoding {coded.encoding.name} "
                    f"holds up to {coded.encoding.largest:g}; use --encoding int8 or bf16"
                )
            facts.add(name, low, high)


def tables_on(tables: Mapping[str, Mapping[str, np.ndarray]], device: torch.device | str) -> Tables:
    """Fitted tables as tensors on a device."""
    return {
        level: {name: torch.tensor(table, device=device) for name, table in named.items()}
        for level, named in tables.items()
    }


def _encoded(
    encoding: Encoding, x: Tensor, level: LevelSpec, tables: Mapping[str, Tensor], ids: tuple[str, ...]
) -> Mapping[str, Tensor]:
    try:
        return encoding.encode(x, level, tables, torch)
    except DataError:
        for i, sample in enumerate(ids):
            try:
                encoding.encode(x[i : i + 1], level, tables, torch)
            except DataError as e:
                raise DataError(f"sample {sample!r}: {e}") from e
        raise


def _each(x: Tensor, reduce: Any) -> Tensor:
    return reduce(x.flatten(1), dim=1)
