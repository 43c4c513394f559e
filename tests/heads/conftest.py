"""Small sources whose features carry their labels: heads learn them in a few steps."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import TargetSpec
from fcache.cache_spec.testing import MemorySource, memory_source

CLASSES = ("a", "b", "c", "d", "e")
CHANNELS = {4: 8, 8: 12, 16: 16, 32: 20}


def png(labels: np.ndarray) -> np.ndarray:
    """A label map as the bytes of `semantic/truth`."""
    stream = io.BytesIO()
    Image.fromarray(labels).save(stream, "PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)


def label_maps(count: int, *, size: int, seed: int) -> np.ndarray:
    """Label maps uint8 [count, size, size] of squares 16 pixels wide."""
    coarse = np.random.default_rng(seed).integers(0, len(CLASSES), (count, size // 16, size // 16))
    return np.kron(coarse, np.ones((1, 16, 16))).astype(np.uint8)


@pytest.fixture
def scenes() -> Callable[..., MemorySource]:
    """Makes semantic sources: `scenes(count, role=…, size=…)`; with `blocks` those of a plain ViT instead of levels."""

    def make(
        count: int = 8,
        *,
        role: str = "training",
        batch_size: int = 4,
        size: int = 64,
        strides: tuple[int, ...] = (4, 8, 16),
        blocks: int = 0,
        seed: int = 0,
        encoding: str = "fp32",
        random_weights: str | None = None,
        noise: float = 0.1,
    ) -> MemorySource:
        maps = label_maps(count, size=size, seed=seed)
        rng = np.random.default_rng(seed + 1)
        features: dict[str, np.ndarray] = {}
        levels = {f"block-{i}": 16 for i in range(blocks)} or {f"level-{s}": s for s in strides}
        for i, (name, s) in enumerate(levels.items()):
            seen = np.eye(len(CLASSES))[maps[:, s // 2 :: s, s // 2 :: s]].transpose(0, 3, 1, 2)
            mixing = np.random.default_rng(100 + i if blocks else s).normal(size=(CHANNELS[s], len(CLASSES)))
            x = np.einsum("ck,nkhw->nchw", mixing, seen)
            features[name] = (x + noise * rng.normal(size=x.shape)).astype(np.float32)
        targets: dict[str, np.ndarray | list[np.ndarray]] = {"semantic/map": maps}
        if role == "evaluation":
            targets["semantic/truth"] = [png(m) for m in maps]
        return memory_source(
            features,
            targets,
            strides=levels,
            specs=(TargetSpec("semantic", "squares", CLASSES, ignore=255),),
            batch_size=batch_size,
            role=role,
            seed=7,
            encoding=encoding,
            random_weights=random_weights,
        )

    return make


@pytest.fixture
def images() -> Callable[..., MemorySource]:
    """Makes classification sources: `images(count, role=…)`; the class is a shift of the last level's channels."""

    def make(
        count: int = 32, *, role: str = "training", batch_size: int = 8, seed: int = 0, num_classes: int = 5
    ) -> MemorySource:
        rng = np.random.default_rng(seed)
        labels = np.arange(count, dtype=np.int32) % num_classes
        centres = np.random.default_rng(99).normal(size=(num_classes, 12))
        last = centres[labels][:, :, None, None] + rng.normal(size=(count, 12, 2, 2))
        first = rng.normal(size=(count, 6, 4, 4))
        return memory_source(
            {"level-16": first.astype(np.float32), "level-32": last.astype(np.float32)},
            {"class/label": labels},
            strides={"level-16": 16, "level-32": 32},
            specs=(TargetSpec("class", "clusters", CLASSES[:num_classes]),),
            batch_size=batch_size,
            role=role,
            seed=7,
        )

    return make
