"""Encoding a batch of features on the device, with the gates against numbers that cannot be stored."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import DataError, Group, find_encoding


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


def encode_batch(
    features: Mapping[str, Tensor], group: Group, ids: tuple[str, ...], facts: LevelFacts
) -> dict[str, np.ndarray]:
    """The stored arrays of a batch by array path, on the host.

    Raises DataError naming the sample and level if a feature is NaN or infinite, or does not fit the encoding.
    """
    encoding = find_encoding(group.encoding)
    ranges = torch.stack([torch.stack([_each(x, torch.amin), _each(x, torch.amax)]) for x in features.values()])
    table: list[Any] = ranges.cpu().tolist()
    for (name, _), (lows, highs) in zip(features.items(), table, strict=True):
        for sample, low, high in zip(ids, lows, highs, strict=True):
            # NaN passes through amin and amax, so both together show every non-finite number.
            if not (math.isfinite(low) and math.isfinite(high)):
                raise DataError(
                    f"sample {sample!r}: level {name!r} holds NaN or infinite features; check the weights, or compute "
                    "with --precision fp32"
                )
            if max(-low, high) > encoding.largest:
                raise DataError(
                    f"sample {sample!r}: level {name!r} reaches {max(-low, high):g}, encoding {encoding.name} holds up "
                    f"to {encoding.largest:g}; use --encoding int8 or bf16"
                )
            facts.add(name, low, high)
    stored = {}
    for level in group.levels:
        for suffix, part in encoding.encode(features[level.name], level, {}, torch).items():
            stored[level.name + suffix] = part.cpu().numpy()
    return stored


def _each(x: Tensor, reduce: Any) -> Tensor:
    return reduce(x.flatten(1), dim=1)
