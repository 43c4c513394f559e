"""Kinetics-400 and any other videos with one class each.

    ROOT/{train,val}/CLASS/…/NAME.mp4        or ROOT/{videos_train,videos_val}/CLASS/…
    ROOT/{train,val}.csv                     optional: a line "path label" a video (PySlowFast, VideoMAE), or
    ROOT/kinetics400_{train,val}_list_videos.txt      the same of mmaction2
    ROOT/classes.txt                         optional: one class name a line; the first has the label 0

A list says which videos there are; its paths are relative to ROOT or to the split's folder, or absolute. Listed videos
that are missing are counted and left out: of Kinetics nobody has all. Without a list all videos of the split's folder
are taken. Class names are those of classes.txt, else the names of the class folders: in alphabetical order, or where a
list puts them. A root of videos without folders and lists opens as the evaluation split without labels.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.spec import TargetSpec
from fcache.extractor.datasets.dataset import (
    DatasetSplit,
    RawSample,
    Sample,
    check_folder,
    no_image,
    sample_digest,
    some,
)
from fcache.extractor.videos import EXTENSIONS, FrameChoice, check_decoder, read_frames, video_size

SPLITS: Mapping[str, str] = {"train": "training", "val": "evaluation"}
VIEW_RECIPE = "kinetics400"
_FOLDERS = ("{}", "videos_{}")
_LISTS = ("{}.csv", "{}.txt", "kinetics400_{}_list_videos.txt")


@dataclass(frozen=True)
class _Video:
    """A video of a split: its id (the path inside the split's folder), its path below the root, its class folder and
    the label that a list gives it.
    """

    id: str
    path: str
    folder: str
    label: int | None


def open_split(root: Path, split: str) -> DatasetSplit:
    """The videos of a split; ids are paths inside its folder ("abseiling/0347ZoDXyP0.mp4").

    Raises SpecError if videos cannot be decoded here, DataError if folders, lists and class names do not fit together.
    """
    check_decoder()
    listed = {name: _listed(root, name) for name in SPLITS}
    folders = {name: _folder(root, name) for name in SPLITS}
    if not any(listed.values()) and not any(folders.values()):
        return _unlabelled(root, split)
    found = {name: listed[name] or _inside(root, folders[name]) for name in SPLITS}
    classes = _classes(root, found)
    videos = found[split]
    if not videos:
        raise DataError(f"{root}: expected {_list_names(split)} or a folder {_folder_names(split)}, found neither")
    samples: list[Sample] = []
    missing: list[str] = []
    for video in videos:
        try:
            size = (root / video.path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            missing.append(video.path)
            continue
        label = classes.index(video.folder) if video.label is None else video.label
        samples.append(Sample(video.id, video.path, {"clip": label}, sample_digest(video.id, [(video.path, size)])))
    if not samples:
        raise DataError(f"{root}: none of the {len(videos)} videos of split {split!r} is there ({some(missing)})")
    notes = (f"{split}: {len(missing)} of {len(videos)} listed videos are missing: {some(missing)}",) if missing else ()
    target = TargetSpec(
        kind="clip",
        dataset="kinetics400",
        class_names=classes,
        conversion={"label": "position in the list of class names"},
    )
    return _split(root, split, samples, (target,), notes)


def _split(
    root: Path, split: str, samples: list[Sample], targets: tuple[TargetSpec, ...], notes: tuple[str, ...] = ()
) -> DatasetSplit:
    return DatasetSplit(
        dataset="kinetics400",
        name=split,
        role=SPLITS[split],
        root=root,
        samples=tuple(samples),
        targets=targets,
        load=no_image,
        image_size=_size,
        load_frames=_load,
        notes=notes,
    )


def _unlabelled(root: Path, split: str) -> DatasetSplit:
    if split == "train":
        raise DataError(
            f"{root}: expected {_list_names(split)} or a folder {_folder_names(split)}, found neither; "
            "a folder of videos opens as split 'val' only, without labels"
        )
    samples = []
    for inner in _videos(root):
        size = (root / inner).stat().st_size
        samples.append(Sample(inner, inner, {}, sample_digest(inner, [(inner, size)])))
    return _split(root, split, samples, ())


def _folder(root: Path, split: str) -> str | None:
    return next((name for f in _FOLDERS if (root / (name := f.format(split))).is_dir()), None)


def _folder_names(split: str) -> str:
    return " or ".join(f.format(split) for f in _FOLDERS)


def _list_names(split: str) -> str:
    return ", ".join(f.format(split) for f in _LISTS)


def _listed(root: Path, split: str) -> list[_Video]:
    """The videos of a split's list, none if it has none."""
    lists = [path for name in _LISTS if (path := root / name.format(split)).is_file()]
    if len(lists) > 1:
        raise DataError(f"{root}: expected one list of split {split!r}, found {[p.name for p in lists]}; keep one")
    return list(_parsed(root, split, lists[0])) if lists else []


def _parsed(root: Path, split: str, path: Path) -> Iterator[_Video]:
    folder = _folder(root, split)
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdecimal():
                raise DataError(
                    f"{path}, line {number}: expected 'path label' with a label from 0, found {line.strip()!r}"
                )
            name = name.strip()
            inner = Path(name).relative_to(folder).as_posix() if folder and Path(name).is_relative_to(folder) else name
            # mmaction2's paths begin inside the folder of the split, PySlowFast's where the user likes.
            inside = folder and inner == name and not (root / name).exists()
            yield _Video(inner, f"{folder}/{name}" if inside else name, Path(name).parent.name, int(label))


def _inside(root: Path, folder: str | None) -> list[_Video]:
    """The videos below a split's folder."""
    if folder is None:
        return []
    found = []
    for inner in _videos(check_folder(root / folder, role="a split of kinetics400")):
        if "/" not in inner:
            raise DataError(f"{root / folder}: expected a folder for each class, found the video {inner} beside them")
        found.append(_Video(inner, f"{folder}/{inner}", inner.partition("/")[0], None))
    return found


def _videos(folder: Path) -> list[str]:
    """The paths of all videos below a folder."""
    found: list[str] = []
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        names = (n for n in files if not n.startswith(".") and os.path.splitext(n)[1].lower() in EXTENSIONS)
        found += [Path(here, name).relative_to(folder).as_posix() for name in names]
    return found


def _classes(root: Path, found: Mapping[str, list[_Video]]) -> tuple[str, ...]:
    """The class names by label. Raises DataError if labels or folders do not fit them."""
    videos = [video for name in SPLITS for video in found[name]]
    names = _named(root) if (root / "classes.txt").exists() else _from_folders(root, found)
    if outside := sorted({v.label for v in videos if v.label is not None and v.label >= len(names)}):
        raise DataError(f"{root}: lists hold the label {outside[0]}, there are {len(names)} class names from 0 on")
    if unknown := {v.folder for v in videos if v.label is None} - set(names):
        raise DataError(
            f"{root}: class folders that {'classes.txt' if (root / 'classes.txt').exists() else 'train'} lacks: "
            f"{some(list(unknown))}; the splits must share their classes"
        )
    return names


def _named(root: Path) -> tuple[str, ...]:
    lines = (root / "classes.txt").read_text(encoding="utf-8-sig").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or len(set(names)) < len(names):
        raise DataError(f"{root / 'classes.txt'}: expected different class names, one a line, found {len(names)}")
    return names


def _from_folders(root: Path, found: Mapping[str, list[_Video]]) -> tuple[str, ...]:
    videos = [video for name in SPLITS for video in found[name]]
    if all(video.label is None for video in videos):
        return tuple(sorted({video.folder for video in found["train"] or found["val"]}))
    named: dict[int, set[str]] = {}
    for video in videos:
        if video.label is not None:
            named.setdefault(video.label, set()).add(video.folder)
    first = {label: sorted(folders)[0] for label, folders in named.items()}
    whole = sorted(named) == list(range(len(named))) and all(len(folders) == 1 for folders in named.values())
    if not whole or "" in first.values() or len(set(first.values())) < len(first):
        raise DataError(
            f"{root}: the class names cannot be told from the folders of listed videos; add a classes.txt with one "
            "name a line, the first for label 0"
        )
    return tuple(first[label] for label in sorted(first))


def _load(root: Path, sample: Sample, choose: FrameChoice) -> RawSample:
    frames = read_frames(root / sample.path, choose)
    return RawSample(frames.pixels, dict(sample.annotation), frames.numbers)


def _size(root: Path, sample: Sample) -> tuple[int, int]:
    return video_size(root / sample.path)
