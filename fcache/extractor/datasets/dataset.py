"""What a dataset is: samples as values, and functions that load them."""

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.errors import DataError, SpecError
from fcache.cache_spec.spec import TargetSpec
from fcache.extractor.coco import Bounds
from fcache.extractor.videos import FrameChoice


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a split.

    `id` is opaque and unique in its split; `path` is the image's, relative to the data root, with forward slashes;
    `annotation` is plain data that the dataset's own loader understands; decoding processes get that of all samples,
    so what is large stays in its file. `digest` (16 hex digits) stands for id, paths and file sizes.
    """

    id: str
    path: str
    annotation: Any
    digest: str


@dataclass(frozen=True)
class Instances:
    """The objects of an image of `size` (height, width), N of them.

    `boxes` float64 [N, 4] as (x0, y0, x1, y1) in pixels; `labels` int32 [N], class indices; `crowd` uint8 [N]; `ids`
    int64 [N] of the annotations; `masks` are compressed run lengths of COCO at the image's size. `record` is the ground
    truth as JSON data: what the source says of the image and its annotations.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    ids: np.ndarray
    masks: tuple[bytes, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class RawSample:
    """A decoded sample: uint8 RGB `image` [H, W, 3], or the `frames` of a video by their numbers, `image` [T, H, W, 3];
    and targets by kind, at the image's size.

    "semantic" is uint8 [H, W] of class indices, 255 where nothing counts; "class" and "clip" are an int; "instances"
    are `Instances`.
    """

    image: np.ndarray
    targets: Mapping[str, Any] = field(default_factory=dict)
    frames: tuple[int, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.image.shape[-3:-1]
        return height, width


@dataclass(frozen=True)
class DatasetSplit:
    """An opened split: its samples in the order of their ids, and how to load one. Picklable.

    `role` is "training" or "evaluation". `load(root, sample)` decodes one sample; it raises OSError where a read failed
    and may be tried again, DataError where the sample itself is bad. `image_size(root, sample)` is the
    (height, width) that `load` would give, read from headers only; same errors. `instances(sample)` bounds what the
    instances of a sample take, where there are such targets. Splits of videos have `load_frames(root, sample, choose)`
    in place of `load`: it decodes the frames that `choose(number of frames)` names, with the same errors. `notes` say
    what a user should know of the data.
    """

    dataset: str
    name: str
    role: str
    root: Path
    samples: tuple[Sample, ...]
    targets: tuple[TargetSpec, ...]
    load: Callable[[Path, Sample], RawSample]
    image_size: Callable[[Path, Sample], tuple[int, int]]
    instances: Callable[[Sample], Bounds] | None = None
    load_frames: Callable[[Path, Sample, FrameChoice], RawSample] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A dataset plug-in: its splits as name -> role, the name of its usual view recipe, and how to open a split."""

    name: str
    splits: Mapping[str, str]
    view_recipe: str
    open_split: Callable[[Path, str], DatasetSplit]


def no_image(root: Path, sample: Sample) -> RawSample:
    """The `load` of splits of videos. Raises SpecError: their samples are no images."""
    raise SpecError(f"{root / sample.path} is a video; a view recipe of clips, such as kinetics400, is needed")


def sample_digest(sample_id: str, files: Sequence[tuple[str, int]]) -> str:
    """16 hex digits of SHA-256 over a sample's id and its files as (relative path, bytes)."""
    text = json.dumps([sample_id, *map(list, files)], separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def check_folder(path: Path, *, role: str) -> Path:
    """`path` if it is a folder; `role` says what it is for. Raises DataError otherwise."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise DataError(f"{path}: expected a folder ({role}), found {found}; check the data root")
    return path


def read_options(path: Path) -> dict[str, Any]:
    """What a `dataset.toml` says, nothing if there is none. Raises DataError if it is no TOML."""
    if not path.exists():
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not TOML: {e}") from e


def some(names: Sequence[str], *, most: int = 3) -> str:
    """The first few names and how many there are, for messages."""
    names = sorted(names)
    return f"{', '.join(names[:most])}{', …' if len(names) > most else ''} ({len(names)} in all)"
