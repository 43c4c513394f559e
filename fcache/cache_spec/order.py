"""The order of records: pure functions of a seed, an epoch and the records there are."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np

from fcache.cache_spec.errors import SpecError


def generator(*key: object) -> np.random.Generator:
    """A counter-based random generator for a key, equal on every machine."""
    state = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(state[:16], dtype="<u8")))


def subset_ids(ids: Sequence[str], fraction: float, *, seed: int = 0) -> tuple[str, ...]:
    """A fixed subset of `ids` in their order: ceil(fraction * n) of them, nested (1 % lies in 10 %)."""
    if not 0 < fraction <= 1:
        raise SpecError(f"a subset is more than 0 % and at most 100 %, got {fraction:.4%}")
    ranked = sorted(ids, key=lambda i: hashlib.sha256(f"{seed}|{i}".encode()).digest())
    # Rounded first: 0.07 * 100 is a little more than 7.
    kept = set(ranked[: max(1, math.ceil(round(fraction * len(ids), 6)))])
    return tuple(i for i in ids if i in kept)


def parse_fraction(text: str) -> float:
    """The fraction in "1%", "10 %" or "0.1". Raises SpecError otherwise."""
    try:
        body = text.strip()
        value = float(body[:-1]) / 100 if body.endswith("%") else float(body)
    except ValueError:
        raise SpecError(f"a subset is given as 1% or 0.01, got {text!r}") from None
    if not 0 < value <= 1:
        raise SpecError(f"a subset is more than 0 % and at most 100 %, got {text!r}")
    return value


def epoch_batches(
    sizes: Sequence[int],
    *,
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    key: Sequence[object],
    world: tuple[int, int],
) -> list[tuple[int, np.ndarray]]:
    """The batches of an epoch as (group, positions in the group), never across groups.

    `sizes` are the records a group; `world` is (rank, processes): every process gets equally many batches of its own.
    With `drop_last` a batch that is not full is left out, unless the group has no full one.
    """
    rng = generator("order", *key)
    batches: list[tuple[int, np.ndarray]] = []
    for group, size in enumerate(sizes):
        positions = rng.permutation(size) if shuffle else np.arange(size)
        chunks = [positions[i : i + batch_size] for i in range(0, size, batch_size)]
        if drop_last and len(chunks) > 1 and len(chunks[-1]) < batch_size:
            chunks.pop()
        batches += [(group, chunk) for chunk in chunks]
    if shuffle and len(sizes) > 1:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    rank, processes = world
    return batches[rank::processes][: len(batches) // processes] if processes > 1 else batches
