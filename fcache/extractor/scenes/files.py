"""Synthetic scenes as files: a data set in the challenge layout of ADE20K."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.targets import IGNORE
from fcache.extractor.scenes.render import render
from fcache.extractor.scenes.scene import CLASSES, Scene, make_scene


def write_scenes(root: Path, *, train: int, val: int, size: tuple[int, int], seed: int = 0) -> None:
    """Writes `train` and `val` photos (JPEG) of (height, width) with masks (PNG) and objectInfo10.txt to `root`.

    Equal arguments give equal bytes; a picture does not depend on how many others there are. Nothing is at `root` until
    all is written. Raises SpecError if `root` holds something already or a number makes no sense.
    """
    with new_scenes(root, train=train, val=val, size=size) as partial:
        pixels = np.zeros(len(CLASSES))
        seen: dict[str, np.ndarray] = {}
        for folder, count in (("training", train), ("validation", val)):
            seen[folder] = np.zeros(len(CLASSES), dtype=np.int64)
            (partial / "images" / folder).mkdir(parents=True)
            (partial / "annotations" / folder).mkdir(parents=True)
            for i in range(count):
                # Negative numbers for validation: more training photos never shift them.
                counts = _write(partial, folder, i, make_scene(seed, i if folder == "training" else -1 - i, size=size))
                pixels += counts
                seen[folder] += counts > 0
        lines = ["Idx\tRatio\tTrain\tVal\tName"]
        for i, name in enumerate(CLASSES):
            share = pixels[i] / pixels.sum()
            lines.append(f"{i + 1}\t{share:.4f}\t{seen['training'][i]}\t{seen['validation'][i]}\t{name}")
        (partial / f"objectInfo{len(CLASSES)}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextmanager
def new_scenes(root: Path, *, train: int, val: int, size: tuple[int, int]) -> Generator[Path]:
    """A folder beside `root` that becomes `root` at the end, or nothing after an error.

    Raises SpecError if `root` holds something already or a number makes no sense.
    """
    if train < 1 or val < 1 or min(size) < 16:
        raise SpecError(f"scenes need at least 1 photo a split and 16 pixels a side, got {train}, {val} and {size}")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise SpecError(f"{root}: expected a new or empty folder for the scenes, found something there; name another")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.parent / f".{root.name}.{os.getpid()}.partial"
    try:
        yield partial
        partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(root: Path, folder: str, number: int, scene: Scene) -> np.ndarray:
    """Writes one photo and its mask; returns the pixels of each class, int64 [classes]."""
    rendered = render(scene)
    name = f"scene_{folder}_{number:06d}"
    Image.fromarray(rendered.image).save(root / "images" / folder / f"{name}.jpg", quality=92)
    # The challenge layout: 0 for no class, then the number in the class list.
    mask = np.where(rendered.semantic == IGNORE, 0, rendered.semantic + 1).astype(np.uint8)
    Image.fromarray(mask).save(root / "annotations" / folder / f"{name}.png")
    return np.bincount(mask.ravel(), minlength=len(CLASSES) + 1)[1:]
