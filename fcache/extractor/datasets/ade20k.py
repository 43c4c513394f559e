"""ADE20K in the layout of the scene parsing challenge, and any other data in that layout.

    images/{training,validation}/NAME.jpg        photos
    annotations/{training,validation}/NAME.png   masks, one channel: 0 = other, class k of the list = k
    objectInfo150.txt                            the class list (any objectInfo*.txt): a header, then number and name

Labels become 0 … n-1, and 255 where nothing counts. A `dataset.toml` beside the folders overrides what it names:

    class_names = ["road", "car"]    # instead of objectInfo*.txt
    zero_is_ignored = true           # true: 0 counts for nothing and class k is stored as k (the default)
                                     # false: class k is stored as k - 1, so 0 is the first class
    ignore_value = 255               # one more stored value that counts for nothing (by default none, or 255
                                     # where zero_is_ignored is false)
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.identity import to_json
from fcache.cache_spec.spec import TargetSpec
from fcache.cache_spec.targets import IGNORE
from fcache.extractor.datasets.dataset import (
    DatasetSplit,
    RawSample,
    Sample,
    check_folder,
    palette,
    read_options,
    sample_digest,
    some,
)
from fcache.extractor.images import EXTENSIONS, image_size, load_image, load_mask

SPLITS: Mapping[str, str] = {"train": "training", "val": "evaluation"}
VIEW_RECIPE = "ade20k"
_FOLDERS = {"train": "training", "val": "validation"}
_KEYS = {"class_names": list, "zero_is_ignored": bool, "ignore_value": int}


@dataclass(frozen=True)
class Conversion:
    """How stored mask values become labels: `labels` classes, is 0 ignored, and another ignored value or None."""

    labels: int
    zero_is_ignored: bool
    ignore_value: int | None

    def table(self) -> np.ndarray:
        """Label of each stored value, int16 [65536]; -1 marks a value outside the class list."""
        table = np.full(65536, -1, dtype=np.int16)
        first = 1 if self.zero_is_ignored else 0
        table[first : first + self.labels] = np.arange(self.labels)
        if self.zero_is_ignored:
            table[0] = IGNORE
        if self.ignore_value is not None:
            table[self.ignore_value] = IGNORE
        return table


def open_split(root: Path, split: str) -> DatasetSplit:
    """The photos and masks of a split, paired by name; ids are file names without ending.

    Raises DataError if a folder, a partner or the class list is missing or wrong.
    """
    names, conversion = _classes(root)
    photos = _files(root, f"images/{_FOLDERS[split]}", EXTENSIONS)
    masks = _files(root, f"annotations/{_FOLDERS[split]}", frozenset({".png"}))
    if lonely := set(photos) - set(masks):
        raise DataError(
            f"{root}: images without a mask in annotations/{_FOLDERS[split]}: {some(list(lonely))}; "
            "add the masks or move the images away"
        )
    if lonely := set(masks) - set(photos):
        raise DataError(
            f"{root}: masks without an image in images/{_FOLDERS[split]}: {some(list(lonely))}; "
            "add the images or move the masks away"
        )
    samples = tuple(
        Sample(name, photos[name][0], {"mask": masks[name][0]}, sample_digest(name, [photos[name], masks[name]]))
        for name in photos
    )
    target = TargetSpec(
        kind="semantic",
        dataset="ade20k",
        class_names=names,
        palette=palette(len(names)),
        ignore=IGNORE,
        conversion=to_json(conversion),
    )
    return DatasetSplit(
        dataset="ade20k",
        name=split,
        role=SPLITS[split],
        root=root,
        samples=samples,
        targets=(target,),
        load=partial(_load, conversion=conversion),
        image_size=_size,
    )


def _files(root: Path, folder: str, extensions: frozenset[str]) -> dict[str, tuple[str, int]]:
    """Name without ending -> (path relative to root, bytes)."""
    found: dict[str, tuple[str, int]] = {}
    with os.scandir(check_folder(root / folder, role="challenge layout of ADE20K")) as entries:
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            if entry.name.startswith(".") or extension.lower() not in extensions:
                continue
            if stem in found:
                raise DataError(
                    f"{root}: {found[stem][0]} and {folder}/{entry.name} share a name; keep one of the files"
                )
            found[stem] = (f"{folder}/{entry.name}", entry.stat().st_size)
    return found


def _load(root: Path, sample: Sample, conversion: Conversion) -> RawSample:
    image = load_image(root / sample.path, apply_orientation=False)
    path = root / sample.annotation["mask"]
    mask = load_mask(path)
    _check_sizes(root, sample, image.shape[:2], mask.shape)
    if mask.min() < 0 or mask.max() > 65535:
        raise DataError(f"{path}: values from {mask.min()} to {mask.max()}, expected class indices")
    labels = conversion.table()[mask]
    if wrong := np.unique(mask[labels < 0]).tolist():
        first = 1 if conversion.zero_is_ignored else 0
        raise DataError(
            f"{path}: the value {wrong[0]} is not in the class list ({first} to {first + conversion.labels - 1}); "
            "correct the mask, the class list or dataset.toml"
        )
    return RawSample(image, {"semantic": labels.astype(np.uint8)})


def _size(root: Path, sample: Sample) -> tuple[int, int]:
    size = image_size(root / sample.path, apply_orientation=False)
    _check_sizes(root, sample, size, image_size(root / sample.annotation["mask"], apply_orientation=False))
    return size


def _check_sizes(root: Path, sample: Sample, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
    if tuple(image) != tuple(mask):
        raise DataError(
            f"{root / sample.path}: the image has {image[1]}x{image[0]} pixels as stored, its mask "
            f"{sample.annotation['mask']} has {mask[1]}x{mask[0]}; an image and its mask must have one size"
        )


def _classes(root: Path) -> tuple[tuple[str, ...], Conversion]:
    options = _options(root / "dataset.toml")
    names = tuple(options["class_names"]) if "class_names" in options else _listed_classes(root)
    zero = options.get("zero_is_ignored", True)
    ignore = options.get("ignore_value", None if zero else IGNORE)
    stored = range(1 if zero else 0, len(names) + (1 if zero else 0))
    if ignore is not None and (ignore in stored or not 0 <= ignore <= 65535):
        raise DataError(
            f"{root / 'dataset.toml'}: ignore_value is {ignore}, expected a value from 0 to 65535 that stands for "
            f"no class (classes are {stored[0]} to {stored[-1]})"
        )
    if not 1 <= len(names) <= IGNORE or len(set(names)) < len(names):
        raise DataError(f"{root}: expected 1 to {IGNORE} different class names, found {len(names)}: {some(names)}")
    return names, Conversion(len(names), zero, ignore)


def _options(path: Path) -> dict[str, Any]:
    options = read_options(path)
    for key, value in options.items():
        # bool is an int to Python, not to a reader of the file.
        if key not in _KEYS or type(value) is not _KEYS[key]:
            expected = ", ".join(f"{k} ({t.__name__})" for k, t in _KEYS.items())
            raise DataError(f"{path}: expected {expected}; found {key} = {value!r}")
    if bad := [n for n in options.get("class_names", []) if not isinstance(n, str) or not n.strip()]:
        raise DataError(f"{path}: class_names are texts, found {bad[0]!r}")
    return options


def _listed_classes(root: Path) -> tuple[str, ...]:
    lists = sorted(root.glob("objectInfo*.txt"))
    if len(lists) != 1:
        raise DataError(
            f"{root}: expected one objectInfo*.txt with the class list, found {[p.name for p in lists] or 'none'}; "
            "add it, or a dataset.toml with class_names"
        )
    return _parse_classes(lists[0])


def _parse_classes(path: Path) -> tuple[str, ...]:
    """First synonyms of a class list whose columns are split by tabs, or by commas if it has no tab."""
    rows = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    split = "\t" if rows and "\t" in rows[0] else ","
    columns = [c.strip().lower() for c in rows[0].split(split)] if rows else []
    header = "idx" in columns and "name" in columns
    number = columns.index("idx") if header else 0
    # Names may hold the separator themselves, so that the last column takes all that is left.
    last = len(columns) - 1 if header else 1
    name = columns.index("name") if header else 1
    found: dict[int, str] = {}
    for row in rows[1:] if header else rows:
        cells = [c.strip().strip('"') for c in row.split(split, last)]
        if len(cells) <= max(name, number) or not cells[number].isdecimal() or not cells[name]:
            raise DataError(f"{path}: expected a class number and a name in each line, found {row!r}")
        if int(cells[number]) in found:
            raise DataError(f"{path}: class number {cells[number]} occurs twice")
        found[int(cells[number])] = cells[name]
    if not found or sorted(found) != list(range(1, len(found) + 1)):
        raise DataError(f"{path}: expected the class numbers 1 to n without a gap, found {sorted(found) or 'none'}")
    whole = [found[k] for k in sorted(found)]
    short = [text.replace(";", ",").split(",")[0].strip() or text for text in whole]
    # Two classes may share their first synonym; then both keep all of theirs.
    return tuple(s if short.count(s) == 1 else w for s, w in zip(short, whole, strict=True))
