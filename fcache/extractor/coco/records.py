"""What belongs to one image: its annotations read again and checked, and how much room they can take."""

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.errors import DataError
from fcache.extractor.coco.index import CocoImage
from fcache.extractor.coco.masks import mask_area, segmentation_rle

# Annotated boxes exceed their images by fractions of a pixel here and there.
_OUTSIDE = 1.0


@dataclass(frozen=True)
class Bounds:
    """What the instances of an image of `size` (height, width) can take at most: their number, and how often columns of
    pixels cross the borders of their masks.
    """

    size: tuple[int, int]
    objects: int
    crossings: int


def read_annotations(path: Path, image: CocoImage) -> list[Mapping[str, Any]]:
    """The annotations of an image as they stand in the file that `read_coco` indexed.

    Raises OSError if the file cannot be read, DataError if it is another one by now.
    """
    places = array("q", image.places)
    found: list[Mapping[str, Any]] = []
    with path.open("rb") as file:
        for begin, end in zip(places[::2], places[1::2], strict=True):
            file.seek(begin)
            try:
                annotation = json.loads(file.read(end - begin))
            except ValueError:
                annotation = None
            if not isinstance(annotation, dict) or annotation.get("image_id") != image.id:
                raise DataError(f"{path}: changed since it was opened; run the same command again")
            found.append(annotation)
    return found


def truth_record(annotation: Mapping[str, Any], image: CocoImage) -> dict[str, Any]:
    """An annotation as the ground truth holds it, with its mask as compressed run lengths: what COCO's scores read.

    Raises DataError, saying what is wrong, for a box, a mask, an area or a mark of crowds that is none.
    """
    box = _box(annotation.get("bbox"), image.size)
    counts = segmentation_rle(annotation.get("segmentation"), image.size)
    crowd = annotation.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise DataError(f"has iscrowd {crowd!r}, expected 0 or 1")
    area = annotation["area"] if "area" in annotation else mask_area(counts, image.size)
    if type(area) not in (int, float) or not np.isfinite(area) or area < 0:
        raise DataError(f"has the area {area!r}, expected a number of pixels")
    return {
        "id": annotation["id"],
        "image_id": image.id,
        "category_id": annotation["category_id"],
        "bbox": list(box),
        "area": area,
        "iscrowd": int(crowd),
        "segmentation": {"size": list(image.size), "counts": counts.decode()},
    }


def _box(box: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """(x, y, width, height). Raises DataError for what is none, or not inside the image."""
    if not isinstance(box, list) or len(box) != 4 or not all(type(n) in (int, float) and np.isfinite(n) for n in box):
        raise DataError(f"has the bbox {box!r}, expected four finite numbers: x, y, width, height")
    x, y, width, height = (float(n) for n in box)
    if width < 0 or height < 0:
        raise DataError(f"has a bbox of the size {width:g} x {height:g}")
    if min(x, y) < -_OUTSIDE or x + width > size[1] + _OUTSIDE or y + height > size[0] + _OUTSIDE:
        raise DataError(f"has the bbox {box} (x, y, width, height) outside the image of {size[1]}x{size[0]} pixels")
    return x, y, width, height
