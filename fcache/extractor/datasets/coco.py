"""COCO 2017 and any other data in its layout: objects as boxes and masks, for detection and instance segmentation.

    annotations/instances_{train,val}2017.json    images, annotations, categories (or instances_{train,val}.json)
    {train,val}2017/NAME.jpg                       photos (or images/{train,val}2017, {train,val}, images/{train,val},
                                                   images: the first of these folders that there is)

    stuffthingmaps/{train,val}2017/NAME.png        where they are: a class for every pixel, see `coco.stuff`

Categories become 0 … n-1 in the order of their ids. Masks are polygons or run lengths. Crowds stay marked as such.
Training leaves out the images without an object that is no crowd, as the papers' code does. A `dataset.toml` beside the
folders keeps them, or names the classes of maps that are not COCO-Stuff's:

    keep_empty = true
    stuff_names = ["road", "sky"]
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.spec import TargetSpec
from fcache.cache_spec.targets import IGNORE
from fcache.extractor.coco import (
    STUFF_NAMES,
    Bounds,
    CocoImage,
    load_stuff,
    read_annotations,
    read_coco,
    stuff_maps,
    truth_record,
)
from fcache.extractor.datasets.dataset import (
    DatasetSplit,
    Instances,
    RawSample,
    Sample,
    check_folder,
    palette,
    read_options,
    sample_digest,
    some,
)
from fcache.extractor.images import image_size, load_image

SPLITS: Mapping[str, str] = {"train": "training", "val": "evaluation"}
VIEW_RECIPE = "coco-lsj"


@dataclass(frozen=True, slots=True)
class _Annotated:
    """What is known of an image, and the path of its map below the root, if there are maps."""

    image: CocoImage
    stuff: str | None


def open_split(root: Path, split: str) -> DatasetSplit:
    """The annotated images of a split; ids are COCO's image ids with twelve digits.

    Raises DataError if the annotation file, the folder of photos, a photo or a map is missing or wrong.
    """
    options = _options(root / "dataset.toml")
    file = _annotation_file(root, split)
    found = read_coco(root / file)
    if not found.categories:
        raise DataError(f"{root / file}: the list of categories is empty")
    images = found.images
    if split == "train" and not options.get("keep_empty", False):
        images = tuple(i for i in images if i.plain)
        if found.images and not images:
            raise DataError(f"{root / file}: no image has an object; training needs some (or keep_empty = true)")
    folder = _photo_folder(root, split)
    sizes = _file_sizes(root, folder, file, images)
    maps = stuff_maps(root, split, [image.file_name for image in images])
    targets = [
        TargetSpec(
            kind="instances",
            dataset="coco",
            class_names=tuple(found.categories.values()),
            conversion={"category_ids": list(found.categories), "boxes_of_cut_objects": "round the mask"},
        )
    ]
    names = tuple(options.get("stuff_names", STUFF_NAMES))
    if maps is not None:
        targets.append(
            TargetSpec(
                kind="semantic", dataset="coco", class_names=names, palette=palette(len(names)), ignore=IGNORE,
                conversion={"maps": "stuff and things"},
            )
        )  # fmt: skip
    labels = {category: label for label, category in enumerate(found.categories)}
    samples = tuple(
        _sample(image, f"{folder}/{image.file_name}", size, file, None if maps is None else maps[image.file_name])
        for image, size in zip(images, sizes, strict=True)
    )
    return DatasetSplit(
        dataset="coco",
        name=split,
        role=SPLITS[split],
        root=root,
        samples=samples,
        targets=tuple(targets),
        load=partial(_load, file=file, labels=labels, stuff_classes=len(names)),
        image_size=_size,
        instances=_bounds,
    )


def _sample(image: CocoImage, path: str, size: int, file: str, stuff: tuple[str, int] | None) -> Sample:
    name = f"{image.id:012d}"
    parts = [(path, size), (file, image.annotation_bytes), *([stuff] if stuff else [])]
    return Sample(name, path, _Annotated(image, stuff[0] if stuff else None), sample_digest(name, parts))


def _options(path: Path) -> dict[str, Any]:
    options = read_options(path)
    names = options.get("stuff_names", STUFF_NAMES)
    wrong = [key for key in options if key not in ("keep_empty", "stuff_names")]
    if not isinstance(options.get("keep_empty", False), bool):
        wrong.append("keep_empty")
    if (
        not isinstance(names, (list, tuple))
        or not all(isinstance(n, str) and n.strip() for n in names)
        or not 1 <= len(set(names)) == len(names) <= IGNORE
    ):
        wrong.append("stuff_names")
    if wrong:
        raise DataError(
            f"{path}: expected keep_empty (true or false) and stuff_names (1 to {IGNORE} different texts), "
            f"found {wrong[0]} = {options[wrong[0]]!r}"
        )
    return options


def _annotation_file(root: Path, split: str) -> str:
    names = [f"annotations/instances_{split}{year}.json" for year in ("2017", "")]
    for name in names:
        if (root / name).is_file():
            return name
    raise DataError(f"{root}: expected {' or '.join(names)}, found neither; check the data root")


def _photo_folder(root: Path, split: str) -> str:
    names = [f"{split}2017", f"images/{split}2017", split, f"images/{split}", "images"]
    for name in names:
        if (root / name).is_dir():
            return name
    raise DataError(f"{root}: expected the photos in one of the folders {', '.join(names)}, found none of them")


def _file_sizes(root: Path, folder: str, file: str, images: tuple[CocoImage, ...]) -> list[int]:
    """The bytes of every photo. Raises DataError for a name that leaves the folder, and for photos that are missing."""
    inside: dict[str, dict[str, int]] = {}
    sizes: list[int] = []
    missing: list[str] = []
    for image in images:
        parts = image.file_name.split("/")
        if ".." in parts or "" in parts:
            raise DataError(f"{root / file}: image {image.id} has the file_name {image.file_name!r}, outside {folder}")
        here = "/".join([folder, *parts[:-1]])
        if here not in inside:
            inside[here] = _files(root / here)
        if parts[-1] in inside[here]:
            sizes.append(inside[here][parts[-1]])
        else:
            missing.append(image.file_name)
    if missing:
        raise DataError(
            f"{root}: images of {file} that {folder} lacks: {some(missing)}; add the photos or correct the file"
        )
    return sizes


def _files(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    with os.scandir(check_folder(folder, role="photos of COCO")) as entries:
        return {e.name: e.stat().st_size for e in entries if e.is_file()}


def _bounds(sample: Sample) -> Bounds:
    image: CocoImage = sample.annotation.image
    return Bounds(image.size, image.annotations, image.crossings)


def _size(root: Path, sample: Sample) -> tuple[int, int]:
    size = image_size(root / sample.path, apply_orientation=False)
    _check_size(root, sample, size)
    return size


def _check_size(root: Path, sample: Sample, size: tuple[int, ...]) -> None:
    if tuple(size) != sample.annotation.image.size:
        height, width = sample.annotation.image.size
        raise DataError(
            f"{root / sample.path}: the photo has {size[1]}x{size[0]} pixels as stored, the annotation file says "
            f"{width}x{height}; annotations must be those of the photo"
        )


def _load(root: Path, sample: Sample, *, file: str, labels: Mapping[int, int], stuff_classes: int) -> RawSample:
    pixels = load_image(root / sample.path, apply_orientation=False)
    _check_size(root, sample, pixels.shape[:2])
    image: CocoImage = sample.annotation.image
    records: list[dict[str, Any]] = []
    for annotation in read_annotations(root / file, image):
        try:
            records.append(truth_record(annotation, image))
        except DataError as e:
            raise DataError(f"{root / file}: annotation {annotation['id']} of image {image.id} {e}") from None
    boxes = np.array([r["bbox"] for r in records], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    targets: dict[str, Any] = {
        "instances": Instances(
            size=image.size,
            boxes=boxes,
            labels=np.array([labels[r["category_id"]] for r in records], dtype=np.int32),
            crowd=np.array([r["iscrowd"] for r in records], dtype=np.uint8),
            ids=np.array([r["id"] for r in records], dtype=np.int64),
            masks=tuple(r["segmentation"]["counts"].encode() for r in records),
            record={
                "image": {"id": image.id, "height": image.size[0], "width": image.size[1]},
                "annotations": records,
            },
        )
    }
    if sample.annotation.stuff is not None:
        targets["semantic"] = load_stuff(root / sample.annotation.stuff, image.size, classes=stuff_classes)
    return RawSample(pixels, targets)
