"""The order of records: pure functions of a seed, an epoch and the records there are."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from fcache.cache_spec.errors import SpecError


def generator(*key: object) -> np.random.Generator:
    """A counter-based random generator for a key, equal on every machine."""
    state = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(state[:16], dtype="<u8")))


def span(epoch: int, epochs: int | None) -> Iterable[int]:
    """The numbers of `epochs` epochs from `epoch` on, of None without end."""
    return itertools.count(epoch) if epochs is None else range(epoch, epoch + epochs)


def subset_ids(ids: Sequence[str], fraction: float, *, seed: int = 0) -> tuple[str, ...]:
    """A fixed subset of `ids` in their order: ceil(fraction * n) of them, nested (1 % lies in 10 %)."""
    kept = subset_mask(ids, fraction, seed=seed)
    return tuple(ids[i] for i in np.flatnonzero(kept).tolist())


def subset_mask(ids: Sequence[str], fraction: float, *, seed: int = 0) -> np.ndarray:
    """Which of `ids` are in `subset_ids`, bool [n]. Raises SpecError for an impossible fraction."""
    if not 0 < fraction <= 1:
        raise SpecError(f"a subset is more than 0 % and at most 100 %, got {fraction:.4%}")
    digests = b"".join(hashlib.sha256(f"{seed}|{i}".encode()).digest() for i in ids)
    # Big-endian words sort as the digests do; the first one nearly always decides.
    words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    first = words[:, 0].astype(np.uint64)
    # Rounded first: 0.07 * 100 is a little more than 7.
    count = max(1, math.ceil(round(fraction * len(ids), 6)))
    last = np.partition(first, count - 1)[count - 1]
    kept = first < last
    equal = np.flatnonzero(first == last)
    kept[equal[np.lexsort(words[equal].T[::-1])][: count - int(kept.sum())]] = True
    return kept


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


def num_batches(sizes: Sequence[int], *, batch_size: int, drop_last: bool, world: tuple[int, int]) -> int:
    """How many batches `epoch_batches` gives."""
    total = 0
    for size in sizes:
        full, rest = divmod(size, batch_size)
        total += full + (1 if rest and not (drop_last and full) else 0)
    return total // world[1]
