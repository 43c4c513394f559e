"""Images in one folder a class: ROOT/{train,val}/CLASS/…/NAME.jpg.

Classes are the folders' names in alphabetical order. A root that holds neither `train` nor `val` is taken as the
evaluation split, its class folders directly inside. Names that begin with a dot are passed over.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.spec import TargetSpec
from fcache.extractor.datasets.dataset import DatasetSplit, RawSample, Sample, check_folder, sample_digest, some
from fcache.extractor.images import EXTENSIONS, image_size, load_image

SPLITS: Mapping[str, str] = {"train": "training", "val": "evaluation"}
VIEW_RECIPE = "imagenet"


def open_split(root: Path, split: str) -> DatasetSplit:
    """The images of a split; ids are paths inside it ("ants/0013035.jpg").

    The classes are those of `train` where there is one, so that both splits number them alike.
    Raises DataError if the folder is missing, has no class folder, `train` has a class without an image, or `val` has
    a class that `train` lacks.
    """
    bare = not (root / "train").is_dir() and not (root / "val").is_dir()
    if bare and split == "train":
        raise DataError(
            f"{root}: expected the folders train and val, found neither; such a folder opens as split 'val' only"
        )
    folder = root if bare else check_folder(root / split, role=f"split {split!r} of imagefolder")
    inside = _class_folders(folder)
    listing = root / "train" if (root / "train").is_dir() else folder
    classes = _class_folders(listing)
    if not classes:
        raise DataError(f"{listing}: expected one folder a class, found none; check the data root")
    if unknown := set(inside) - set(classes):
        raise DataError(
            f"{folder}: class folders that {listing} lacks: {some(list(unknown))}; the splits must share their classes"
        )
    samples: list[Sample] = []
    empty: list[str] = []
    for index, name in enumerate(classes):
        files = _images(folder, name) if name in inside else []
        if not files:
            empty.append(name)
        for inner, size in files:
            path = (folder / inner).relative_to(root).as_posix()
            samples.append(Sample(inner, path, {"class": index}, sample_digest(inner, [(path, size)])))
    if empty and split == "train":
        raise DataError(f"{folder}: class folders without an image: {some(empty)}; add images or remove the folders")
    target = TargetSpec(
        kind="class",
        dataset="imagefolder",
        class_names=tuple(classes),
        conversion={"label": "position of the class folder in alphabetical order"},
    )
    return DatasetSplit(
        dataset="imagefolder",
        name=split,
        role=SPLITS[split],
        root=root,
        samples=tuple(samples),
        targets=(target,),
        load=_load,
        image_size=_size,
    )


def _class_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(folder: Path, name: str) -> list[tuple[str, int]]:
    """(path relative to `folder`, bytes) of every image below folder/name."""
    found = []
    for here, folders, files in os.walk(folder / name, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS:
                path = Path(here, file)
                found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    return found


def _load(root: Path, sample: Sample) -> RawSample:
    image = load_image(root / sample.path, apply_orientation=True)
    return RawSample(image, {"class": sample.annotation["class"]})


def _size(root: Path, sample: Sample) -> tuple[int, int]:
    return image_size(root / sample.path, apply_orientation=True)
