"""Makes the golden cache of the present format. A cache that was made stays as it is: later ones have to open it.

Two splits, the evaluation one in two buckets; two views; int8; semantic targets; one quarantined sample.
Usage: python tests/golden/make_format.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np

import fcache.cache_spec.writer as writer_module
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

CANVASES = {"train": (32, 32), "val/32x32": (32, 32), "val/32x64": (32, 64)}
SAMPLES = {"train": 3, "val/32x32": 2, "val/32x64": 1}
BAD = "train-1"


def levels(canvas: tuple[int, int]) -> tuple[LevelSpec, ...]:
    return tuple(
        LevelSpec(f"level-{stride}", "C H W", (channels, canvas[0] // stride, canvas[1] // stride), stride)
        for stride, channels in ((4, 3), (8, 5))
    )


def feature(level: LevelSpec, number: int, view: int) -> np.ndarray:
    """A ramp that bends, different in every sample, view and channel; exact in float32."""
    steps = np.arange(np.prod(level.shape), dtype=np.int64).reshape(level.shape)
    return ((steps * (2 * number + 3) + 11 * view) % 251 - 125).astype(np.float32) / 8


def label(canvas: tuple[int, int], number: int, view: int) -> np.ndarray:
    steps = np.arange(canvas[0] * canvas[1]).reshape(canvas)
    found = (steps // 5 + number + view) % 3
    return np.where(found == 2, 255, found).astype(np.uint8)


def geometry(canvas: tuple[int, int], number: int, view: int) -> View:
    flip = -1.0 if view else 1.0
    return View((0.5 * flip, 0.0, canvas[1] if view else 0.0, 0.0, 0.5, 0.25), canvas, (30, 31), (60, 62 + number))


def main(root: Path) -> None:
    # Nothing of the machine that made it.
    writer_module.run_facts = lambda started: {"time": 0.0, "seconds": 0.0, "host": "golden", "pid": 1}
    backbone = BackboneSpec(
        name="golden",
        arguments={"window": 8, "shifted": True, "norm": "layer"},
        weights_sha256="5a" * 32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        precision="bf16",
        levels=tuple(level.free() for level in levels((32, 32))),
    )
    recipe = SplitRecipe({"kind": "scale-crop-flip", "size": [32, 32]}, "int8")
    spec = FeatureSpec(backbone, recipe, SplitRecipe({"kind": "plain", "multiple": 32}, "int8"), seed=7)
    target = TargetSpec(
        "semantic", "golden", ("sky", "sea"), ((0, 0, 255), (0, 128, 0)), 255, {"zero_is_ignored": True}
    )
    groups = tuple(
        Group(
            path=path,
            split=path.split("/")[0],
            role="training" if path == "train" else "evaluation",
            canvas=canvas,
            levels=levels(canvas),
            encoding="int8",
            shard_records=2,
            batch=2,
            ids=tuple(f"{path.replace('/', '-')}-{i}" for i in range(SAMPLES[path])),
            digests=tuple(f"{i:064x}" for i in range(SAMPLES[path])),
            views=2 if path == "train" else 1,
            extents=(),
            limits={"semantic_truth_bytes": 64} if path != "train" else {},
        )
        for path, canvas in CANVASES.items()
    )
    writer = open_writer(root, Manifest(spec, (target,), groups, hints={"data": "made by a script"}))
    for part in writer.manifest.parts():
        for shard in writer.pending(part):
            group = writer.manifest.group(shard.group)
            shard_writer = writer.write(shard, part)
            for position, name in enumerate(writer.samples(shard)):
                number = shard.sample + position
                if name == BAD:
                    shard_writer.skip(position, "cannot identify image file")
                elif part == "semantic":
                    arrays = {"semantic/map": label(group.canvas, number, shard.view)[None]}
                    if group.role == "evaluation":
                        arrays["semantic/truth"] = [np.arange(number * 20, dtype=np.uint8)]
                    shard_writer.append([position], arrays)
                else:
                    arrays = index_arrays([geometry(group.canvas, number, shard.view)], [number], [shard.view])
                    for level in group.levels:
                        codes = find_encoding("int8").encode(feature(level, number, shard.view)[None], level, {}, np)
                        arrays |= {level.name + suffix: x for suffix, x in codes.items()}
                    shard_writer.append([position], arrays)
            shard_writer.commit(facts={"nonfinite": 0}, fingerprint={"fcache": "golden"})
    writer.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
