"""Photos and videos from anywhere as blocks of features: found, decoded, cut and run through the backbone of a job."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from fcache.cache_spec import DataError, ImageViews, SpecError
from fcache.extractor import videos
from fcache.extractor.backbones import Backbone
from fcache.extractor.datasets import RawSample
from fcache.extractor.images import EXTENSIONS, image_size, load_image
from fcache.extractor.job import Job
from fcache.extractor.liveviews import Plan, choose_clips, image_views
from fcache.extractor.prepare import UNKNOWN_SIZE, find_recipe, load_job_backbone
from fcache.extractor.views import TTA, ViewRecipe, plan_views


@dataclass(frozen=True)
class FoundPhoto:
    """A photo to read: its path, and the same relative to the folder that was named, or its name alone."""

    path: Path
    relative: Path


@dataclass(frozen=True)
class Photo:
    """A decoded photo: uint8 RGB `image` [H, W, 3], its EXIF orientation applied; or the `frames` of a video that are
    seen, `image` [T, H, W, 3].
    """

    path: Path
    image: np.ndarray
    frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """A photo that could not be read, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class SeenPhotos:
    """Photos whose views have equal canvases, and these views; their ids are the paths."""

    photos: tuple[Photo, ...]
    views: ImageViews[Tensor]


def endings_of(job: Job) -> frozenset[str]:
    """The endings of the files that the test view of a job is one of: photos or videos."""
    return EXTENSIONS if find_recipe(job).frames is None else videos.EXTENSIONS


def find_photos(
    paths: Iterable[Path], *, leave_out: Path | None = None, endings: frozenset[str] = EXTENSIONS
) -> tuple[FoundPhoto, ...]:
    """The photos that paths of files and folders name, each once, in the order of the paths.

    Folders are searched with all folders below them, in the order of names; only files with one of the `endings`
    count, and none whose name or folder begins with a dot, or that lie in the folder `leave_out`.
    Raises DataError if a path does not exist, or a folder holds no photo; OSError if a folder cannot be listed.
    """
    found: dict[str, FoundPhoto] = {}
    for path in paths:
        if path.is_dir():
            below = [FoundPhoto(p, p.relative_to(path)) for p in _below(path, leave_out, endings)]
            if not below:
                raise DataError(f"{path} holds no photo ({', '.join(sorted(endings))})")
        elif path.exists():
            below = [FoundPhoto(path, Path(path.name))]
        else:
            raise DataError(f"no photo at {path}")
        for photo in below:
            found.setdefault(os.path.abspath(photo.path), photo)
    return tuple(found.values())


def _below(folder: Path, leave_out: Path | None, endings: frozenset[str]) -> Iterator[Path]:
    # Links resolved: the same folder may be named in two ways.
    left_out = None if leave_out is None else os.path.realpath(leave_out)

    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) != left_out
        )
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in endings:
                yield Path(parent, name)


@dataclass(frozen=True)
class PhotoReader:
    """Turns photos into blocks as the evaluation split of a job does; the backbone is loaded once."""

    recipe: ViewRecipe
    backbone: Backbone

    def read(
        self, paths: Sequence[Path], *, tta: TTA | None = None, batch_size: int = 1
    ) -> Iterator[SeenPhotos | Unreadable]:
        """All photos in the views of `tta` (None: the evaluation view alone), and those that cannot be read.

        Up to `batch_size` photos go through the backbone together, where their canvases are equal: photos then come
        in the order of the first ones of equal canvases, else in the order of `paths`.
        Raises SpecError for views that the recipe does not allow.
        """
        views = TTA() if tta is None else tta
        if batch_size < 1:
            raise SpecError(f"batch_size must be at least 1, got {batch_size}")
        batches, unreadable = ([[p] for p in paths], []) if batch_size == 1 else self._batches(paths, views, batch_size)
        yield from unreadable
        with ThreadPoolExecutor(2, "fcache-decode") as pool:
            ahead = [pool.submit(self._load, path, views) for path in batches[0]] if batches else []
            for number in range(len(batches)):
                now, following = ahead, batches[number + 1] if number + 1 < len(batches) else []
                # The next photos are decoded while the backbone works on these.
                ahead = [pool.submit(self._load, path, views) for path in following]
                loaded = [future.result() for future in now]
                yield from (found for found in loaded if isinstance(found, Unreadable))
                yield from self._seen([found for found in loaded if isinstance(found, Photo)], views)

    def _batches(self, paths: Sequence[Path], tta: TTA, batch_size: int) -> tuple[list[list[Path]], list[Unreadable]]:
        """The paths by canvases as headers say them, and those without a header that can be read."""
        together: dict[tuple[tuple[int, int], ...], list[Path]] = {}
        unreadable: list[Unreadable] = []
        for path in paths:
            try:
                # Videos are all seen at the same size.
                video = self.recipe.frames is not None
                plan = self._plan(UNKNOWN_SIZE if video else image_size(path, apply_orientation=True), tta)
            except (DataError, OSError) as e:
                unreadable.append(Unreadable(path, _reason(path, e)))
            else:
                together.setdefault(tuple(p.canvas for p in plan), []).append(path)
        return [m[i : i + batch_size] for m in together.values() for i in range(0, len(m), batch_size)], unreadable

    def _seen(self, photos: Sequence[Photo], tta: TTA) -> Iterator[SeenPhotos]:
        """Photos that were read for one pass: by canvases again, as a header may say something else than the pixels."""
        together: dict[tuple[tuple[int, int], ...], list[tuple[Photo, Plan]]] = {}
        for photo in photos:
            plan = self._plan(RawSample(photo.image).size, tta)
            together.setdefault(tuple(p.canvas for p in plan), []).append((photo, plan))
        for members in together.values():
            seen = tuple(photo for photo, _ in members)
            views = image_views(
                [RawSample(photo.image, frames=photo.frames) for photo in seen],
                [plan for _, plan in members],
                ids=[str(photo.path) for photo in seen],
                backbone=self.backbone,
                targets={},
            )
            yield SeenPhotos(seen, views)

    def _load(self, path: Path, tta: TTA) -> Photo | Unreadable:
        try:
            if self.recipe.frames is None:
                return Photo(path, load_image(path, apply_orientation=True))
            read = videos.read_frames(path, choose_clips(self.recipe.evaluation, tta))
            return Photo(path, read.pixels, read.numbers)
        except (DataError, OSError) as e:
            return Unreadable(path, _reason(path, e))

    def _plan(self, size: tuple[int, int], tta: TTA) -> Plan:
        return plan_views(self.recipe.evaluation, tta, size, multiple=self.backbone.size_multiple)


def _reason(path: Path, error: Exception) -> str:
    # Messages of bad data name the file already.
    text = str(error)
    return text if str(path) in text else f"{path}: {text}"


def open_photos(job: Job) -> PhotoReader:
    """A reader of photos with the backbone and test view of a job. Raises SpecError or DataError."""
    recipe = find_recipe(job)
    if recipe.frames is not None:
        videos.check_decoder()
    return PhotoReader(recipe, load_job_backbone(job, recipe))
