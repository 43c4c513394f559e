"""What belongs to one image: its annotations read again, and how much room they can take."""

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fcache.cache_spec.errors import DataError
from fcache.extractor.coco.index import CocoImage


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
