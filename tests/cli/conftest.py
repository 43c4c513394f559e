"""A small cache written through the public writer, for the commands that only look."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcache.cache_spec import (
    BackboneSpec,
    FeatureSpec,
    Group,
    LevelSpec,
    Manifest,
    SplitRecipe,
    TargetSpec,
    View,
    find_encoding,
    index_arrays,
    open_writer,
)

LEVEL = LevelSpec("level-8", "C H W", (3, 4, 4), 8)


def small_cache(root: Path, *, shards: int = 99, random_weights: str | None = None) -> Path:
    """Nine class-labelled training samples and three evaluation ones; only the first `shards` shards are committed."""
    backbone = BackboneSpec("tiny", {"window": 8}, "ab" * 32, (0.5,) * 3, (0.5,) * 3, "fp32", (LEVEL.free(),))
    recipe = SplitRecipe({"kind": "resize", "size": [32, 32]}, "int8")
    spec = FeatureSpec(backbone, recipe, recipe, seed=0)
    target = TargetSpec("class", "imagefolder", ("ant", "bee"))
    groups = tuple(
        Group(path, split, role, (32, 32), (LEVEL,), "int8", 4, 2, ids, tuple("0" * 16 for _ in ids), 1, ())
        for path, split, role, ids in (
            ("train", "train", "training", tuple(f"t{i}" for i in range(9))),
            ("val/32x32", "val", "evaluation", tuple(f"v{i}" for i in range(3))),
        )
    )
    writer = open_writer(root, Manifest(spec, (target,), groups, random_weights=random_weights))
    encoding, rng = find_encoding("int8"), np.random.default_rng(0)
    for part in ("features", "class"):
        for shard in writer.pending(part)[:shards]:
            view = View((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (32, 32), (32, 32), (32, 32))
            arrays = {"class/label": np.arange(shard.count, dtype=np.int32) % 2}
            if part == "features":
                coded = encoding.encode(rng.normal(size=(shard.count, 3, 4, 4)).astype(np.float32), LEVEL, {}, np)
                samples = range(shard.sample, shard.sample + shard.count)
                arrays = {LEVEL.name + suffix: x for suffix, x in coded.items()}
                arrays |= index_arrays([view] * shard.count, list(samples), [shard.view] * shard.count)
            open_shard = writer.write(shard, part)
            open_shard.append(range(shard.count), arrays)
            open_shard.commit(facts={}, fingerprint={})
    writer.finish()
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A complete small cache."""
    return small_cache(tmp_path / "small.fcache")


@pytest.fixture
def make_cache() -> Callable[..., Path]:
    """`small_cache`, for tests that need several or unusual ones."""
    return small_cache
