"""Synthetic scenes as files: a data set in the layout of COCO 2017, with a box and a mask of every figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcache.extractor.coco import encode_part
from fcache.extractor.scenes.files import new_scenes
from fcache.extractor.scenes.render import Rendered, render
from fcache.extractor.scenes.scene import CLASSES, make_scene

# Sky, ground and wall are no objects.
_STUFF = 3
# Of a figure behind others that shows less than this nobody could tell what it is.
_LEAST_PIXELS = 16
_FIRST_VAL = 1_000_000


def write_coco_scenes(
    root: Path, *, train: int, val: int, size: tuple[int, int], seed: int = 0, stuff: bool = False
) -> None:
    """Writes `train` and `val` photos (JPEG) of (height, width) with the objects of seven classes to `root`.

    The photos are those of `write_scenes`, with `annotations/instances_{train,val}2017.json` in place of masks: all
    figures of which 16 pixels or more are seen, as run lengths. With `stuff` there are also maps of all ten classes, in
    `stuffthingmaps`, and a `dataset.toml` that names them, which the head htc needs. Equal arguments give equal bytes;
    a picture does not depend on how many others there are. Nothing is at `root` until all is written. Raises SpecError
    if `root` holds something already or a number makes no sense.
    """
    with new_scenes(root, train=train, val=val, size=size) as partial:
        (partial / "annotations").mkdir(parents=True)
        if stuff:
            names = ", ".join(f'"{name}"' for name in CLASSES)
            (partial / "dataset.toml").write_text(f"stuff_names = [{names}]\n", encoding="utf-8")
        for split, count in (("train", train), ("val", val)):
            (partial / f"{split}2017").mkdir()
            if stuff:
                (partial / "stuffthingmaps" / f"{split}2017").mkdir(parents=True)
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for i in range(count):
                rendered = render(make_scene(seed, i if split == "train" else -1 - i, size=size))
                number = (1 if split == "train" else _FIRST_VAL) + i
                name = f"{number:012d}.jpg"
                Image.fromarray(rendered.image).save(partial / f"{split}2017" / name, quality=92)
                if stuff:
                    labels = Image.fromarray(rendered.semantic)
                    labels.save(partial / "stuffthingmaps" / f"{split}2017" / f"{number:012d}.png")
                images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
                # A hundred numbers each: annotations of an image do not depend on other images.
                annotations += _annotations(rendered, number, first=100 * number)
            categories = [{"id": k + 1, "name": CLASSES[k]} for k in range(_STUFF, len(CLASSES))]
            text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
            (partial / "annotations" / f"instances_{split}2017.json").write_text(text, encoding="utf-8")


def _annotations(rendered: Rendered, image: int, *, first: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    size = (rendered.instances.shape[0], rendered.instances.shape[1])
    for i in np.flatnonzero((rendered.labels >= _STUFF) & (rendered.visible >= _LEAST_PIXELS)).tolist():
        left, top, right, bottom = (int(n) for n in rendered.boxes[i])
        part = rendered.instances[top:bottom, left:right] == i + 1
        found.append(
            {
                "id": first + i,
                "image_id": image,
                "category_id": int(rendered.labels[i]) + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": int(rendered.visible[i]),
                "iscrowd": 0,
                "segmentation": {"size": list(size), "counts": encode_part(part, top, left, size).decode()},
            }
        )
    return found
