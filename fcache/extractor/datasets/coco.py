"""COCO 2017 and any other data in its layout: objects as boxes and masks, for detection and instance segmentation.

    annotations/instances_{train,val}2017.json    images, annotations, categories (or instances_{train,val}.json)
    {train,val}2017/NAME.jpg                       photos (or images/{train,val}2017, {train,val}, images/{train,val},
                                                   images: the first of these folders that there is)

Categories become 0 … n-1 in the order of their ids. Masks are polygons or run lengths. Crowds stay marked as such.
Training leaves out the images without an object that is no crowd, as the papers' code does; a `dataset.toml` beside the
folders keeps them:

    keep_empty = true
"""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.spec import TargetSpec
from fcache.extractor.coco import Bounds, CocoImage, mask_area, read_annotations, read_coco, segmentation_rle
from fcache.extractor.datasets.dataset import (
    DatasetSplit,
    Instances,
    RawSample,
    Sample,
    check_folder,
    read_options,
    sample_digest,
    some,
)
from fcache.extractor.images import image_size, load_image

SPLITS: Mapping[str, str] = {"train": "training", "val": "evaluation"}
VIEW_RECIPE = "coco-lsj"

# Annotated boxes exceed their images by fractions of a pixel here and there.
_OUTSIDE = 1.0


def open_split(root: Path, split: str) -> DatasetSplit:
    """The annotated images of a split; ids are COCO's image ids with twelve digits.

    Raises DataError if the annotation file, the folder of photos or a photo is missing or wrong.
    """
    keep_empty = _keep_empty(root / "dataset.toml")
    file = _annotation_file(root, split)
    found = read_coco(root / file)
    if not found.categories:
        raise DataError(f"{root / file}: the list of categories is empty")
    images = found.images
    if split == "train" and not keep_empty:
        images = tuple(i for i in images if i.plain)
        if found.images and not images:
            raise DataError(f"{root / file}: no image has an object; training needs some (or keep_empty = true)")
    folder = _photo_folder(root, split)
    sizes = _file_sizes(root, folder, file, images)
    samples = tuple(
        Sample(
            f"{image.id:012d}",
            path := f"{folder}/{image.file_name}",
            image,
            sample_digest(f"{image.id:012d}", [(path, size), (file, image.annotation_bytes)]),
        )
        for image, size in zip(images, sizes, strict=True)
    )
    target = TargetSpec(
        kind="instances",
        dataset="coco",
        class_names=tuple(found.categories.values()),
        conversion={"category_ids": list(found.categories), "boxes_of_cut_objects": "round the mask"},
    )
    labels = {category: label for label, category in enumerate(found.categories)}
    return DatasetSplit(
        dataset="coco",
        name=split,
        role=SPLITS[split],
        root=root,
        samples=samples,
        targets=(target,),
        load=partial(_load, file=file, labels=labels),
        image_size=_size,
        instances=_bounds,
    )


def _keep_empty(path: Path) -> bool:
    options = read_options(path)
    for key, value in options.items():
        if key != "keep_empty" or not isinstance(value, bool):
            raise DataError(f"{path}: expected keep_empty (true or false), found {key} = {value!r}")
    return options.get("keep_empty", False)


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
    image: CocoImage = sample.annotation
    return Bounds(image.size, image.annotations, image.crossings)


def _size(root: Path, sample: Sample) -> tuple[int, int]:
    size = image_size(root / sample.path, apply_orientation=False)
    _check_size(root, sample, size)
    return size


def _check_size(root: Path, sample: Sample, size: tuple[int, ...]) -> None:
    if tuple(size) != sample.annotation.size:
        height, width = sample.annotation.size
        raise DataError(
            f"{root / sample.path}: the photo has {size[1]}x{size[0]} pixels as stored, the annotation file says "
            f"{width}x{height}; annotations must be those of the photo"
        )


def _load(root: Path, sample: Sample, *, file: str, labels: Mapping[int, int]) -> RawSample:
    pixels = load_image(root / sample.path, apply_orientation=False)
    _check_size(root, sample, pixels.shape[:2])
    image: CocoImage = sample.annotation
    annotations = read_annotations(root / file, image)
    boxes: list[tuple[float, float, float, float]] = []
    records: list[dict[str, Any]] = []
    for annotation in annotations:
        try:
            x, y, width, height = _box(annotation.get("bbox"), image.size)
            counts = segmentation_rle(annotation.get("segmentation"), image.size)
            boxes.append((x, y, x + width, y + height))
            records.append(_record(annotation, image, (x, y, width, height), counts))
        except DataError as e:
            raise DataError(f"{root / file}: annotation {annotation['id']} of image {image.id} {e}") from None
    return RawSample(
        pixels,
        {
            "instances": Instances(
                size=image.size,
                boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
                labels=np.array([labels[r["category_id"]] for r in records], dtype=np.int32),
                crowd=np.array([r["iscrowd"] for r in records], dtype=np.uint8),
                ids=np.array([r["id"] for r in records], dtype=np.int64),
                masks=tuple(r["segmentation"]["counts"].encode() for r in records),
                record={
                    "image": {"id": image.id, "height": image.size[0], "width": image.size[1]},
                    "annotations": records,
                },
            )
        },
    )


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


def _record(annotation: Mapping[str, Any], image: CocoImage, box: tuple[float, ...], counts: bytes) -> dict[str, Any]:
    """An annotation as the ground truth holds it: what the evaluation of COCO reads."""
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
