"""View recipes: how the samples of a dataset become views, as data.

A recipe's two cuts go into a cache's identity as they are (`cache_spec.to_json`). Every view is one decoded sample, so
what mixes samples (mixup, cutmix) is not part of any recipe: it belongs to the trainer, or nowhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fcache.cache_spec.errors import SpecError, unknown_name
from fcache.cache_spec.identity import from_json
from fcache.extractor.datasets import find_dataset
from fcache.extractor.views.clips import Clip
from fcache.extractor.views.frames import (
    PLACEMENTS,
    CentreCrop,
    Fit,
    KeepRatio,
    Placement,
    ResizedCrop,
    ScaleCrop,
    check_placement,
    frame_canvas,
    resized_placement,
)
from fcache.extractor.views.looks import LOOKS, ColourJitter, Erasing, Look, PhotometricDistortion, RandAugment

Size = tuple[int, int]


@dataclass(frozen=True)
class Cut:
    """How one view is cut: where it lies and the changes of its pixels, in order.

    `revision` grows when equal parameters give other pixels. Raises SpecError for numbers without sense.
    """

    place: Placement
    looks: tuple[Look, ...] = ()
    revision: int = 1

    def __post_init__(self) -> None:
        check_placement(self.place)


@dataclass(frozen=True)
class ClipCut:
    """How one view of a video is cut: which frames it has, and where it lies, the same in all of them.

    `revision` grows when equal parameters give other pixels. Raises SpecError for numbers without sense.
    """

    place: Placement
    clip: Clip
    revision: int = 1

    def __post_init__(self) -> None:
        check_placement(self.place)

    @property
    def looks(self) -> tuple[Look, ...]:
        """None: colours of frames stay as they are."""
        return ()


AnyCut = Cut | ClipCut


@dataclass(frozen=True)
class ViewRecipe:
    """The cuts of training and evaluation splits, both of images or both of as many frames, and the usual number of
    training views.
    """

    name: str
    training: AnyCut
    evaluation: AnyCut
    views: int

    @property
    def frames(self) -> int | None:
        """Frames of a clip, None for images."""
        return self.training.clip.frames if isinstance(self.training, ClipCut) else None

    def cut(self, role: str) -> AnyCut:
        """The cut of a role ("training" or "evaluation")."""
        return self.training if role == "training" else self.evaluation


def _segmentation(name: str, side: int, views: int) -> ViewRecipe:
    """Segmentation on ADE20K as in the frozen paper, Table 12 (there `side` is 512)."""
    place = ScaleCrop(size=(side, side), long=4 * side, short=side, scale=(0.5, 2.0), flip=0.5)
    return ViewRecipe(
        name, Cut(place, (PhotometricDistortion(),)), Cut(KeepRatio(long=4 * side, short=side)), views=views
    )


def _jitter(side: int, *, scale: tuple[float, float] = (0.1, 2.0)) -> Cut:
    """Large-scale jitter: the picture scaled to fit `side` times a random factor, cut or padded to `side`, flipped."""
    return Cut(ScaleCrop(size=(side, side), long=side, short=side, scale=scale, flip=0.5))


def _clips(name: str, box: ResizedCrop, *, frames: int, interval: int) -> ViewRecipe:
    """Random boxes of random clips; the centre of the middle clip, at the shorter side of the box."""
    centre = CentreCrop(size=box.size, short=min(box.size), interpolation=box.interpolation)
    clip = Clip(frames, interval, "random")
    return ViewRecipe(name, ClipCut(box, clip), ClipCut(centre, replace(clip, start="middle")), views=4)


_RANDOM_BOX = ResizedCrop(size=(224, 224), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
_CENTRE = CentreCrop(size=(224, 224), short=256)
_WHOLE = Fit(size=(512, 512))

_RECIPES: Mapping[str, ViewRecipe] = {
    r.name: r
    for r in (
        # "Could Giant Pretrained Image Models Extract Universal Representations?", Table 12.
        _segmentation("ade20k", 512, views=4),
        # The same at a quarter of the pixels, for machines without an accelerator.
        _segmentation("ade20k-small", 256, views=4),
        ViewRecipe("imagenet", Cut(_RANDOM_BOX), Cut(_CENTRE), views=4),
        # "Revealing the Dark Secrets of Masked Image Modeling", Table 7, less mixup 0.8 and cutmix 1.0.
        ViewRecipe(
            "mim-classification",
            Cut(_RANDOM_BOX, (RandAugment(), ColourJitter(0.4), Erasing(0.25))),
            Cut(_CENTRE),
            views=8,
        ),
        # The frozen paper, Table 11: large-scale jitter, test at (1333, 800).
        ViewRecipe("coco-lsj", _jitter(1024), Cut(KeepRatio(long=1333, short=800)), views=4),
        # "Benchmarking Detection Transfer Learning with Vision Transformers": the same, test padded to the input.
        ViewRecipe("vit-det", _jitter(1024), Cut(Fit(size=(1024, 1024))), views=4),
        # The same at a sixteenth of the pixels, for machines without an accelerator; a tenth of 256 shows nothing.
        ViewRecipe("coco-small", _jitter(256, scale=(0.5, 2.0)), Cut(KeepRatio(long=256, short=256)), views=4),
        # The frozen paper, Table 13; what it leaves open is said in docs/design/views.md.
        _clips(
            "kinetics400",
            ResizedCrop((224, 224), scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, interpolation="bilinear"),
            frames=16,
            interval=4,
        ),
        # For machines without an accelerator, and without flips: there are classes of motion that these exchange.
        _clips(
            "kinetics400-small",
            ResizedCrop((128, 128), scale=(0.7, 1.0), ratio=(3 / 4, 4 / 3), flip=0.0, interpolation="bilinear"),
            frames=8,
            interval=2,
        ),
        ViewRecipe("plain", Cut(_WHOLE), Cut(_WHOLE), views=1),
    )
}


def view_recipe_names() -> tuple[str, ...]:
    """The names of all view recipes."""
    return tuple(_RECIPES)


def find_view_recipe(name: str) -> ViewRecipe:
    """The view recipe of that name. Raises SpecError with the nearest names if there is none."""
    if name not in _RECIPES:
        raise unknown_name("view recipe", name, _RECIPES)
    return _RECIPES[name]


def default_recipe(dataset: str) -> ViewRecipe:
    """The usual view recipe of a dataset. Raises SpecError for an unknown dataset."""
    return find_view_recipe(find_dataset(dataset).view_recipe)


def with_input_size(recipe: ViewRecipe, size: Size) -> ViewRecipe:
    """The recipe for another input (height, width): crops take it, and the sides to which images are resized keep
    their proportion to it. Raises SpecError for a size that is not positive.
    """
    return replace(
        recipe,
        training=replace(recipe.training, place=resized_placement(recipe.training.place, size)),
        evaluation=replace(recipe.evaluation, place=resized_placement(recipe.evaluation.place, size)),
    )


def canvas(cut: AnyCut, image_size: Size, *, multiple: int = 32) -> Size:
    """The padded (height, width) of a record: fixed by the cut, except that a keep-ratio view of an image of
    `image_size` has its own, rounded up to `multiple`.
    """
    return frame_canvas(cut.place, image_size, multiple=multiple)


def cut_from_json(data: Mapping[str, Any]) -> AnyCut:
    """The cut that `to_json` gave. Raises SpecError for unknown kinds and fields."""
    if set(data) == {"place", "clip", "revision"}:
        place = _part(data["place"], "placement", PLACEMENTS)
        return ClipCut(place, from_json(Clip, data["clip"]), data["revision"])
    if set(data) != {"place", "looks", "revision"}:
        raise SpecError(
            "a cut has the fields place, looks and revision, that of a clip place, clip and revision; found "
            f"{sorted(data)}"
        )
    return Cut(
        place=_part(data["place"], "placement", PLACEMENTS),
        looks=tuple(_part(look, "look", LOOKS) for look in data["looks"]),
        revision=data["revision"],
    )


def _part(data: Mapping[str, Any], what: str, kinds: Mapping[str, type]) -> Any:
    kind = data.get("kind", "")
    if kind not in kinds:
        raise unknown_name(what, kind, kinds)
    return from_json(kinds[kind], data)
