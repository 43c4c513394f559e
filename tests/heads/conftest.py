"""Small sources whose features carry their labels: heads learn them in a few steps."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.mask import area, encode

from fcache.cache_spec import TargetSpec
from fcache.cache_spec.targets import pack_masks
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


@pytest.fixture
def clips() -> Callable[..., MemorySource]:
    """Makes sources of clips: `clips(count, role=…)`; only the order of the frames tells the class.

    Five patterns follow each other in steps of 1, 2, 3 or 4, from any of them on: the set of frames is always the same.
    """

    def make(
        count: int = 8, *, role: str = "training", batch_size: int = 4, seed: int = 0, noise: float = 0.0
    ) -> MemorySource:
        rng = np.random.default_rng(seed)
        labels = np.arange(count, dtype=np.int32) % 4
        starts = rng.integers(0, 5, count)
        order = (starts[:, None] + (labels[:, None] + 1) * np.arange(5)) % 5
        features = {}
        for name, shape in {"level-16": (6, 4, 4), "level-32": (8, 2, 3), "pooled": (8,)}.items():
            patterns = np.random.default_rng([98, *shape]).normal(size=(5, *shape))
            features[name] = (patterns[order] + noise * rng.normal(size=(count, 5, *shape))).astype(np.float32)
        return memory_source(
            features,
            {"clip/label": labels},
            strides={"level-16": 16, "level-32": 32, "pooled": 32},
            specs=(TargetSpec("clip", "steps", CLASSES[:4]),),
            batch_size=batch_size,
            role=role,
            seed=7,
        )

    return make


@dataclass(frozen=True)
class Thing:
    """An object of a picture: box in pixels, class, and whether it is a crowd."""

    box: tuple[float, float, float, float]
    label: int
    crowd: bool = False

    def mask(self, size: int) -> np.ndarray:
        """An ellipse in the box, bool [size, size]."""
        x0, y0, x1, y1 = self.box
        y, x = np.mgrid[:size, :size] + 0.5
        return ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1


def some_things(count: int, *, size: int, seed: int) -> list[Thing]:
    """Objects that hardly overlap: each in a cell of a grid of `count` by `count`, some cells empty."""
    rng = np.random.default_rng(seed)
    cell = size / count
    things = []
    for row, column in np.ndindex(count, count):
        if rng.random() < 0.25:
            continue
        width, height = cell * rng.uniform(0.5, 0.95, 2)
        x, y = cell * column + rng.uniform(0, cell - width), cell * row + rng.uniform(0, cell - height)
        things.append(Thing((x, y, x + width, y + height), int(rng.integers(len(CLASSES)))))
    return things


def object_targets(pictures: Sequence[Sequence[Thing]], *, size: int, role: str) -> dict[str, list[np.ndarray]]:
    """The arrays of `instances` of pictures whose views are themselves."""
    found: dict[str, list[np.ndarray]] = {}
    for number, things in enumerate(pictures):
        masks = [encode(np.asfortranarray(t.mask(size))) for t in things]
        arrays = {
            "instances/boxes": np.array([t.box for t in things], np.float32).reshape(-1, 4),
            "instances/labels": np.array([t.label for t in things], np.int32),
            "instances/crowd": np.array([t.crowd for t in things], np.uint8),
            "instances/area": np.array([area(m) for m in masks], np.float32),
            "instances/ids": np.arange(1, len(things) + 1, dtype=np.int64),
            **pack_masks([m["counts"] for m in masks]),
        }
        if role == "evaluation":
            arrays["instances/truth"] = object_truth(number, things, masks, size)
        for name, array in arrays.items():
            found.setdefault(name, []).append(array)
    return found


def object_truth(number: int, things: Sequence[Thing], masks: Sequence[dict], size: int) -> np.ndarray:
    """The bytes of `instances/truth`; category ids are ten times the class, from 10 on."""
    annotations = [
        {
            "id": i + 1,
            "category_id": 10 * (t.label + 1),
            "bbox": [t.box[0], t.box[1], t.box[2] - t.box[0], t.box[3] - t.box[1]],
            "area": float(area(m)),
            "iscrowd": int(t.crowd),
            "segmentation": {"size": [size, size], "counts": m["counts"].decode()},
        }
        for i, (t, m) in enumerate(zip(things, masks, strict=True))
    ]
    record = {"image": {"id": number + 1, "height": size, "width": size}, "annotations": annotations}
    return np.frombuffer(json.dumps(record).encode(), np.uint8)


@pytest.fixture
def objects() -> Callable[..., MemorySource]:
    """Makes sources of pictures with objects: `objects(count, role=…)`, or of the given `pictures`.

    A place of a level says of which class the object there is, and how far away its edges are.
    """

    def make(
        count: int = 4,
        *,
        role: str = "training",
        batch_size: int = 4,
        size: int = 64,
        strides: tuple[int, ...] = (4, 8, 16),
        blocks: int = 0,
        seed: int = 0,
        pictures: Sequence[Sequence[Thing]] | None = None,
        semantic: bool = False,
        grid: int = 2,
    ) -> MemorySource:
        found = pictures or [some_things(grid, size=size, seed=seed + i) for i in range(count)]
        levels = {f"block-{i}": 16 for i in range(blocks)} or {f"level-{s}": s for s in strides}
        features = {name: np.stack([_seen(p, size, s) for p in found]) for name, s in levels.items()}
        targets: dict[str, Any] = object_targets(found, size=size, role=role)
        conversion = {"category_ids": [10 * (k + 1) for k in range(len(CLASSES))]}
        specs = [TargetSpec("instances", "ellipses", CLASSES, conversion=conversion)]
        if semantic:
            maps = np.full((len(found), size, size), 255, np.uint8)
            for of_picture, things in zip(maps, found, strict=True):
                for thing in things:
                    of_picture[thing.mask(size)] = thing.label
            targets["semantic/map"] = maps
            specs.append(TargetSpec("semantic", "ellipses", CLASSES, ignore=255))
        return memory_source(
            features, targets, strides=levels, specs=tuple(specs), batch_size=batch_size, role=role, seed=7
        )

    return make


def _seen(things: Sequence[Thing], size: int, stride: int) -> np.ndarray:
    """float32 [C, size / stride, size / stride]: a channel a class, distances to the four edges, the mask; noise."""
    side = -(-size // stride)
    seen = 0.05 * np.random.default_rng(len(things)).normal(size=(len(CLASSES) + 5, side, side))
    places = (np.arange(side) + 0.5) * stride
    for thing in things:
        x0, y0, x1, y1 = thing.box
        inside = np.ix_((places >= y0) & (places <= y1), (places >= x0) & (places <= x1))
        x, y = np.meshgrid(places, places)
        edges = np.stack([x - x0, y - y0, x1 - x, y1 - y]) / size
        for channel, values in enumerate([np.ones_like(x), *(4 * edges)]):
            seen[thing.label if channel == 0 else len(CLASSES) + channel - 1][inside] = values[inside]
        seen[-1][inside] = thing.mask(size)[np.ix_(*(np.minimum(places.astype(int), size - 1),) * 2)][inside]
    return seen.astype(np.float32)


@pytest.fixture
def thing() -> type[Thing]:
    """What pictures with objects are made of."""
    return Thing
