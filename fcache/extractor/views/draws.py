"""Random numbers of views: a pure function of (seed, sample, view, topic), equal on every machine and version."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Step:
    """One drawn operation on the pixels: its name in `steps.STEPS` and its numbers."""

    name: str
    values: tuple[float, ...] = ()


def uniforms(*, seed: int, sample_id: str, view: int, topic: str, count: int = 128) -> np.ndarray:
    """`count` numbers in [0, 1), float64. Topics are independent, so that one operation never shifts another's draws.

    Only the raw Philox stream is used: numpy may change how its distributions turn bits into numbers.
    """
    text = json.dumps(["fcache view", seed, sample_id, view, topic])
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return (np.random.Philox(key=key).random_raw(count) >> np.uint64(11)) * 2.0**-53


def stream(numbers: np.ndarray) -> Iterator[float]:
    """The numbers one by one."""
    return iter(numbers.tolist())


def between(u: float, bounds: Sequence[float]) -> float:
    """`u` in [0, 1) stretched to [low, high)."""
    return bounds[0] + u * (bounds[1] - bounds[0])


def below(u: float, count: int) -> int:
    """`u` in [0, 1) as an integer in [0, count)."""
    return max(0, min(int(u * count), count - 1))


def normal(u: float) -> float:
    """`u` in [0, 1) as a standard normal number."""
    return _NORMAL.inv_cdf(min(max(u, 1e-12), 1 - 1e-12))
