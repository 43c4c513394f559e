"""Indexing a COCO annotation file: which bytes belong to which image, without keeping any polygon.

`instances_train2017.json` has 860,000 objects with 25 million numbers in 450 MB: as Python objects they would take
gigabytes in every decoding process. So the file is read once, object by object, and of each object only the place is
kept; whoever needs an image's objects reads those bytes again.
"""

import json
import math
import mmap
import operator
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fcache.cache_spec.errors import DataError

_SPACE = re.compile(r"[ \t\n\r]*")
# One character a byte: positions in the text are positions in the file, and JSON's own signs are ASCII.
_BYTES = "latin-1"


@dataclass(frozen=True, slots=True)
class CocoImage:
    """One image of an annotation file.

    `size` is (height, width). `places` holds where its annotations stand in the file: int64 pairs (first byte, byte
    after the last), in their order there. `annotations` counts them, `plain` those that are no crowd; `crossings` is at
    least the number of times that all columns of pixels together cross the borders of their masks.
    """

    id: int
    file_name: str
    size: tuple[int, int]
    places: bytes
    annotations: int
    plain: int
    crossings: int

    @property
    def annotation_bytes(self) -> int:
        """The length of its annotations in the file."""
        ends = array("q", self.places)
        return sum(ends[1::2]) - sum(ends[::2])


@dataclass(frozen=True)
class CocoFile:
    """An annotation file: images in the order of their ids, and category names by id, in the order of the ids."""

    images: tuple[CocoImage, ...]
    categories: Mapping[int, str]


@dataclass
class _Found:
    places: "array[int]" = field(default_factory=lambda: array("q"))
    plain: int = 0
    crossings: int = 0


def read_coco(path: Path) -> CocoFile:
    """The index of an annotation file. Raises DataError, naming what is wrong, if it is none.

    Annotations are checked as far as they say whose they are: whole numbers `id` (each once), `image_id` and
    `category_id` of the lists of images and categories. The rest is checked where an image is loaded.
    """
    text = _text(path)
    start = 3 if text.startswith("\xef\xbb\xbf") else 0
    images: dict[int, tuple[str, tuple[int, int]]] = {}
    categories: dict[int, str] = {}
    found: dict[int, _Found] = {}
    used: dict[int, int] = {}
    ids: set[int] = set()

    def image(value: Any, begin: int, end: int) -> None:
        # Names are read again from their bytes: the text above has one character a byte.
        value = json.loads(text[begin:end].encode(_BYTES))
        number, size = whole(value, "id", "image"), (whole(value, "height", "image"), whole(value, "width", "image"))
        if number in images:
            raise DataError(f"{path}: image id {number} occurs twice; every image needs an id of its own")
        if min(size) < 1:
            raise DataError(f"{path}: image {number} has height and width {size}, expected positive numbers")
        if not isinstance(value.get("file_name"), str) or not value["file_name"]:
            raise DataError(f"{path}: image {number} has the file_name {value.get('file_name')!r}, expected a text")
        images[number] = value["file_name"], size

    def category(value: Any, begin: int, end: int) -> None:
        value = json.loads(text[begin:end].encode(_BYTES))
        number = whole(value, "id", "category")
        if number in categories:
            raise DataError(f"{path}: category id {number} occurs twice")
        if not isinstance(value.get("name"), str) or not value["name"].strip():
            raise DataError(f"{path}: category {number} has the name {value.get('name')!r}, expected a text")
        categories[number] = value["name"]

    def annotation(value: Any, begin: int, end: int) -> None:
        number = whole(value, "id", "annotation")
        if number in ids:
            raise DataError(f"{path}: annotation id {number} occurs twice; every annotation needs an id of its own")
        ids.add(number)
        used.setdefault(whole(value, "category_id", f"annotation {number}"), number)
        of = found.setdefault(whole(value, "image_id", f"annotation {number}"), _Found())
        of.places.extend((begin, end))
        of.plain += not value.get("iscrowd")
        of.crossings += _crossings(value.get("segmentation"))

    def whole(value: Any, name: str, what: str) -> int:
        number = value.get(name) if isinstance(value, dict) else None
        if type(number) is not int or not -(2**63) <= number < 2**63:
            raise DataError(f"{path}: {what} without a whole number as {name!r}: {_shown(value)}")
        return number

    lists = {"images": image, "annotations": annotation, "categories": category}
    missing = set(lists) - set(_read(path, text, start, lists))
    if missing:
        raise DataError(
            f"{path}: expected the lists images, annotations and categories, missing: {', '.join(sorted(missing))}"
        )
    if lost := set(found) - set(images):
        raise DataError(f"{path}: annotations of images that the list of images lacks: {_some(lost)}")
    if unknown := set(used) - set(categories):
        raise DataError(
            f"{path}: categories that the list of categories lacks: {_some(unknown)} (annotation "
            f"{used[min(unknown)]}); add them to the list or correct the annotations"
        )
    nothing = _Found()
    return CocoFile(
        images=tuple(
            CocoImage(number, name, size, of.places.tobytes(), len(of.places) // 2, of.plain, of.crossings)
            for number, (name, size) in sorted(images.items())
            for of in (found.get(number, nothing),)
        ),
        categories=dict(sorted(categories.items())),
    )


def _text(path: Path) -> str:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the annotation file is empty")
        # Mapped: its bytes are not in memory twice.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return str(mapped, _BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: expected an annotation file of COCO, found nothing; check the data root") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: {e}") from e


def _read(path: Path, text: str, start: int, lists: Mapping[str, Callable[[Any, int, int], None]]) -> Iterator[str]:
    """Gives every element of the named lists, with its place, to their functions; yields the names of those found."""
    decoder = json.JSONDecoder()

    def after(at: int) -> int:
        found = _SPACE.match(text, at)
        assert found is not None, "no space is a match too"
        return found.end()

    def expect(at: int, signs: str) -> int:
        at = after(at)
        if text[at : at + 1] not in signs or at >= len(text):
            raise DataError(
                f"{path}: not JSON of COCO's form: expected {' or '.join(signs)} at byte {at}, found "
                f"{text[at : at + 20]!r}; the file may be cut short"
            )
        return at

    def value(at: int) -> tuple[Any, int]:
        try:
            return decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            # The error of `json` holds the whole text.
            reason = e.msg if isinstance(e, json.JSONDecodeError) else e
            place = e.pos if isinstance(e, json.JSONDecodeError) else at
            raise DataError(f"{path}: not JSON: {reason} at byte {place}; the file may be cut short") from None

    at = after(expect(start, "{") + 1)
    while text[at : at + 1] != "}":
        expect(at, '"')
        name, at = value(at)
        at = after(expect(at, ":") + 1)
        if name not in lists:
            _, at = value(at)
        else:
            at = after(expect(at, "[") + 1)
            while text[at : at + 1] != "]":
                element, end = value(at)
                lists[name](element, at, end)
                at = expect(end, ",]")
                if text[at] == ",":
                    at = after(at + 1)
            at += 1
            yield name
        at = expect(at, ",}")
        if text[at] == ",":
            at = after(at + 1)


def _crossings(segmentation: Any) -> int:
    """At least the number of times that columns of pixels cross the border of a mask, 0 for what is no mask."""
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            # A run begins and ends once, and once more for each column that it goes on in.
            return 2 * len(counts) + 2 * int(segmentation["size"][1])
        total = 0.0
        for polygon in segmentation or ():
            x = polygon[::2]
            total += sum(map(abs, map(operator.sub, x, x[1:] + x[:1]))) + 2 * len(x)
        return math.ceil(total) if math.isfinite(total) else 0
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        return 0


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict) else repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"


def _some(numbers: set[int]) -> str:
    first = sorted(numbers)
    return ", ".join(map(str, first[:3])) + (f", … ({len(first)} in all)" if len(first) > 3 else "")
