"""Test-time views, live: the backbone runs once a view, for all heads that are asked about it."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from fcache.cache_spec import Block, DataError, ImageViews, SourceInfo, SpecError
from fcache.extractor.backbones import Backbone
from fcache.extractor.datasets import RawSample, Sample
from fcache.extractor.decoding import load_sample
from fcache.extractor.forward import features_of
from fcache.extractor.job import Job
from fcache.extractor.live import coded, live_info, stacked_targets
from fcache.extractor.prepare import UNKNOWN_SIZE, Prepared, find_recipe, image_sizes, prepare
from fcache.extractor.videos import FrameChoice
from fcache.extractor.views import (
    TTA,
    AnyCut,
    ClipCut,
    PlannedView,
    canvas,
    cut_views,
    draw_view,
    flat,
    parse_tta,
    plan_views,
    spread_clips,
    view_targets,
)

Plan = tuple[PlannedView, ...]
# Unless told otherwise, as many images go through the backbone together as have this many pixels in their largest view.
PASS_PIXELS = 1 << 20
MOST_IMAGES = 16


def image_views(
    images: Sequence[RawSample],
    plans: Sequence[Plan],
    *,
    ids: Sequence[str],
    backbone: Backbone,
    targets: Mapping[str, Any],
) -> ImageViews[Tensor]:
    """Images, or videos of which all planned clips are there, in their planned views, view by view.

    The canvases of the views are the same for all images.
    """
    canvases = [plan.canvas for plan in plans[0]]
    assert all([plan.canvas for plan in plans_of] == canvases for plans_of in plans), "images go together by canvases"

    def blocks() -> Iterator[Block[Tensor]]:
        clips = [_clips(image, plan) for image, plan in zip(images, plans, strict=True)]
        cut = zip(*(cut_views(pixels, plan) for (pixels, _), plan in zip(clips, plans, strict=True)), strict=True)
        for number, (pixels, size) in enumerate(zip(cut, canvases, strict=True)):
            yield Block(
                ids=tuple(ids),
                views=tuple(
                    replace(plan[number].view, frames=numbers[plan[number].clip])
                    for (_, numbers), plan in zip(clips, plans, strict=True)
                ),
                view_indices=(number,) * len(images),
                levels=coded(features_of(pixels, size, backbone), backbone, size),
                targets={},
            )

    return ImageViews(tuple(ids), len(canvases), blocks, targets)


def _clips(image: RawSample, plan: Plan) -> tuple[np.ndarray, tuple[tuple[int, ...], ...]]:
    """Pixels as `cut_views` takes them, and the numbers of the frames of each clip."""
    if not image.frames:
        return image.image, ((),)
    count = 1 + max(view.clip for view in plan)
    numbers = np.reshape(image.frames, (count, -1))
    return image.image.reshape(count, -1, *image.image.shape[1:]), tuple(tuple(row) for row in numbers.tolist())


def choose_clips(cut: AnyCut, tta: TTA) -> FrameChoice:
    """Chooses the frames of all clips of the test-time views of a video."""
    return lambda count: flat(spread_clips(cut.clip, count, tta.clips)) if isinstance(cut, ClipCut) else ()


@dataclass(frozen=True)
class LiveViews:
    """A `ViewSource` over an evaluation split of a job.

    Images whose views have equal canvases go together, `batch_size` at most (None: as many as `PASS_PIXELS` allow).
    """

    prepared: Prepared
    split: str
    tta: TTA
    batch_size: int | None
    # (index of the group in the manifest, sample, its views) of the images that go together
    _batches: tuple[tuple[tuple[int, Sample, Plan], ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        split = self.prepared.splits[self.split]
        if split.role != "evaluation":
            raise SpecError(f"test-time views are those of an evaluation split, {self.split!r} is a training split")
        groups, positions = self.prepared.wanted.split(self.split), self.prepared.positions[self.split]
        members = [(i, split.samples[positions[name]]) for i, group in enumerate(groups) for name in group.ids]
        # Canvases of videos are all the same, and their size is known when they are decoded.
        video = self.prepared.recipe.frames is not None
        sizes = [UNKNOWN_SIZE] * len(members) if video else image_sizes(split, tuple(s for _, s in members))
        together: dict[tuple[Any, ...], list[tuple[int, Sample, Plan]]] = {}
        for (index, sample), size in zip(members, sizes, strict=True):
            plan = self._plan(size)
            together.setdefault((index, *(p.canvas for p in plan)), []).append((index, sample, plan))
        batches: list[tuple[tuple[int, Sample, Plan], ...]] = []
        for found in together.values():
            step = self.batch_size or images_together(found[0][2], self.prepared.recipe.frames or 1)
            batches += [tuple(found[i : i + step]) for i in range(0, len(found), step)]
        object.__setattr__(self, "_batches", tuple(batches))

    @property
    def info(self) -> SourceInfo:
        """Identity, levels (free sizes: views differ), targets and extent."""
        found = live_info(self.prepared, self.split)
        levels = tuple(level.free() for level in found.levels)
        return replace(found, levels=levels, extent={**found.extent, "views": self.tta.name})

    @property
    def num_groups(self) -> int:
        """How many times `groups` gives some images."""
        return len(self._batches)

    def groups(self) -> Iterator[ImageViews[Tensor]]:
        """All images, some at a time. Raises DataError for a sample that cannot be decoded."""
        with ThreadPoolExecutor(2, "fcache-decode") as pool:
            ahead: list[Future[RawSample]] = []
            for number, batch in enumerate(self._batches):
                now = ahead or self._submit(pool, number)
                # The next images are decoded while the backbone works on these.
                ahead = self._submit(pool, number + 1)
                yield self._views(batch, [self._loaded(f, s) for f, (_, s, _) in zip(now, batch, strict=True)])

    def _plan(self, size: tuple[int, int]) -> Plan:
        cut, multiple = self.prepared.recipe.evaluation, self.prepared.backbone.size_multiple
        return plan_views(cut, self.tta, size, multiple=multiple)

    def _submit(self, pool: ThreadPoolExecutor, number: int) -> "list[Future[RawSample]]":
        split = self.prepared.splits[self.split]
        frames = choose_clips(self.prepared.recipe.evaluation, self.tta)
        batches = self._batches[number : number + 1]
        return [pool.submit(load_sample, split, s, frames) for batch in batches for _, s, _ in batch]

    def _loaded(self, future: "Future[RawSample]", sample: Sample) -> RawSample:
        try:
            return future.result()
        except (DataError, OSError) as e:
            raise DataError(f"sample {sample.id!r}: {e}") from e

    def _views(self, batch: Sequence[tuple[int, Sample, Plan]], raws: Sequence[RawSample]) -> ImageViews[Tensor]:
        group = self.prepared.wanted.split(self.split)[batch[0][0]]
        cut = self.prepared.recipe.evaluation
        records: list[Mapping[str, Any]] = []
        plans = [self._plan(raw.size) if raw.frames else plan for (_, _, plan), raw in zip(batch, raws, strict=True)]
        for (_, sample, _), plan, raw in zip(batch, plans, raws, strict=True):
            size = raw.size
            if size != plan[0].image_size:
                raise DataError(
                    f"sample {sample.id!r}: an image of {size[1]}x{size[0]} pixels, its header said "
                    f"{plan[0].image_size[1]}x{plan[0].image_size[0]}; replace the file, or start again if it changed"
                )
            # The targets are those of the evaluation record: truth does not depend on how an image is looked at.
            drawn = draw_view(cut, seed=self.prepared.job.seed, sample_id=sample.id, view=0, image_size=size)
            records.append(view_targets(drawn, raw=raw, canvas=group.canvas, role="evaluation"))
        return image_views(
            raws,
            plans,
            ids=[sample.id for _, sample, _ in batch],
            backbone=self.prepared.backbone,
            targets=stacked_targets(self.prepared, group, records),
        )


def images_together(plan: Plan, frames: int = 1) -> int:
    """How many images, or clips of so many frames, of these views go through the backbone at once, unless told
    otherwise.
    """
    return max(1, min(MOST_IMAGES, PASS_PIXELS // (frames * max(p.canvas[0] * p.canvas[1] for p in plan))))


def find_tta(text: str, job: Job) -> TTA:
    """The test-time views that a text names, see `parse_tta`; windows are as large as the job's training views.

    Raises SpecError for a text of another form.
    """
    return parse_tta(text, crop=canvas(find_recipe(job).training, UNKNOWN_SIZE))


def open_views(job: Job, split: str, *, tta: TTA, batch_size: int | None = None) -> LiveViews:
    """The images of a job's evaluation split in test-time views (its cache is not touched).

    Raises as `prepare`, and SpecError if the split or its views do not allow test-time views.
    """
    return LiveViews(prepare(job), split, tta, batch_size)
