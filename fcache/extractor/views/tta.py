"""Test-time augmentation: which views of an image a head is asked about, as data, and how they are cut."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fcache.cache_spec.errors import SpecError, unknown_name
from fcache.cache_spec.view import View
from fcache.extractor.views.frames import CentreCrop, Frame, draw_frame, frame_canvas, scaled_placement
from fcache.extractor.views.recipes import AnyCut, ClipCut
from fcache.extractor.views.steps import show

Size = tuple[int, int]
# "Could Giant Pretrained Image Models Extract Universal Representations?", Tables 5, 9 and 10, with and without flip.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# What each option of a text belongs to.
_OPTIONS = {"scales": "ms", "window": "slide", "stride": "slide"}
WORDS = ("ms", "flip", "slide")
# The number of clips and that of crops, as in "4x3".
_CLIPS = re.compile(r"([1-9]\d?)x([13])")


@dataclass(frozen=True)
class TTA:
    """Test-time views: the evaluation view at every one of `scales`, and each mirrored left to right if `flip`.

    With a `window` (height, width) these are not seen whole but through windows of that size, which begin `stride`
    apart; the last of a row or column is shifted inside. A side shorter than the window is taken whole.
    Of a video `clips` clips are seen, spread over it, each in `crops` crops: 1, the centre, or 3, both ends of the
    longer side too.
    Raises SpecError for numbers without sense.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: Size | None = None
    stride: Size | None = None
    clips: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        if not self.scales or len(set(self.scales)) < len(self.scales) or min(self.scales) <= 0:
            raise SpecError(f"test-time scales are different positive numbers, got {self.scales}")
        if not all(math.isfinite(s) for s in self.scales):
            raise SpecError(f"test-time scales are finite, got {self.scales}")
        if self.clips < 1 or self.crops not in (1, 3):
            raise SpecError(
                f"test-time views are those of 1 or more clips in 1 or 3 crops, got {self.clips}x{self.crops}"
            )
        if (self.window is None) != (self.stride is None):
            raise SpecError(f"sliding windows need a window and a stride, got {self.window} and {self.stride}")
        if self.window and self.stride:
            if min(*self.window, *self.stride) < 1:
                raise SpecError(f"window and stride are at least 1, got {self.window} and {self.stride}")
            if self.stride[0] > self.window[0] or self.stride[1] > self.window[1]:
                raise SpecError(f"a stride of {self.stride} leaves gaps between windows of {self.window}")

    @property
    def name(self) -> str:
        """The text that `parse_tta` takes for these views, "plain" for the evaluation view alone."""
        words = [
            word
            for word, on in zip(WORDS, (self.scales != (1.0,), self.flip, self.window is not None), strict=True)
            if on
        ]
        if (self.clips, self.crops) != (1, 1):
            words.insert(0, f"{self.clips}x{self.crops}")
        options: list[str] = []
        if self.scales not in ((1.0,), SCALES):
            options.append("scales=" + ",".join(_scale_text(s) for s in self.scales))
        if self.window and self.stride:
            options += [f"window={_size_text(self.window)}", f"stride={_size_text(self.stride)}"]
        return "-".join(words or ["plain"]) + (":" + ",".join(options) if options else "")


def parse_tta(text: str, *, crop: Size) -> TTA:
    """The views that a text such as "ms-flip", "slide:window=512,stride=341" or "ms-flip:scales=0.5,1" names.

    The words "ms", "flip" and "slide" are joined by "-"; "plain" is the evaluation view alone. "4x3" before them is 4
    clips of a video in 3 crops each. Scales are `SCALES`
    unless given. Windows (N, or HxW) are `crop` unless given, the size of training views; strides two thirds of them.
    Raises SpecError, with the nearest names, for a text of another form.
    """
    name, colon, rest = text.strip().partition(":")
    words = name.split("-")
    counted = _CLIPS.fullmatch(words[0])
    clips, crops = (int(counted[1]), int(counted[2])) if counted else (1, 1)
    words = words[1:] if counted else words
    for word in words:
        if word not in (*WORDS, "plain"):
            raise unknown_name("test-time view", word, (*WORDS, "plain", "4x3"))
    if len(set(words)) < len(words) or ("plain" in words and len(words) > 1):
        raise SpecError(f"test-time views are ms, flip and slide, each at most once and joined by '-', got {name!r}")
    options = _options(rest) if colon else {}
    for option in options:
        if option not in _OPTIONS:
            raise unknown_name("option of test-time views:", option, _OPTIONS)
        if _OPTIONS[option] not in words:
            raise SpecError(
                f"{option}= belongs to {_OPTIONS[option]}, as in '{_OPTIONS[option]}:{option}=…'; got {text!r}"
            )
    scales = _scales(options["scales"]) if "scales" in options else SCALES
    window = _size("window", options["window"]) if "window" in options else crop
    stride = (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
    if "stride" in options:
        stride = _size("stride", options["stride"])
    sliding = "slide" in words
    return TTA(
        scales=scales if "ms" in words else (1.0,),
        flip="flip" in words,
        window=window if sliding else None,
        stride=stride if sliding else None,
        clips=clips,
        crops=crops,
    )


def _options(text: str) -> dict[str, str]:
    """ "a=1,2,b=3" by name: a value may hold commas. Raises SpecError if the text has another form."""
    found: dict[str, str] = {}
    last = ""
    for piece in text.split(","):
        name, equals, value = piece.partition("=")
        if equals and name.strip():
            last = name.strip()
            if last in found:
                raise SpecError(f"{last}= is given twice, got {text!r}")
            found[last] = value.strip()
        elif last and piece.strip():
            found[last] += f",{piece.strip()}"
        else:
            raise SpecError(f"options of test-time views are option=value,option=value, got {text!r}")
    return found


def _scales(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(s) for s in text.split(","))
    except ValueError:
        raise SpecError(f"scales are numbers such as 0.5,1,1.5, got {text!r}") from None


def _scale_text(scale: float) -> str:
    # The shortest text that is the same number again: two scales must not share a name.
    return f"{scale:g}" if float(f"{scale:g}") == scale else repr(scale)


def _size(name: str, text: str) -> Size:
    height, cross, width = text.partition("x")
    width = width if cross else height
    if not (height.isdecimal() and width.isdecimal()):
        raise SpecError(f"{name} is a number of pixels or HEIGHTxWIDTH, got {text!r}")
    return int(height), int(width)


def _size_text(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


@dataclass(frozen=True)
class PlannedView:
    """A view before it is cut: its frame in an image of `image_size`, and its canvas, both (height, width); of a video
    also which of its clips is seen.
    """

    frame: Frame
    canvas: Size
    image_size: Size
    clip: int = 0

    @property
    def view(self) -> View:
        """The geometry; the numbers of frames are known when the video is decoded."""
        to_view = tuple(self.frame.matrix.ravel().tolist())
        return View(to_view=to_view, canvas=self.canvas, valid=self.frame.valid, image_size=self.image_size)


def plan_views(cut: AnyCut, tta: TTA, image_size: Size, *, multiple: int) -> tuple[PlannedView, ...]:
    """The test-time views of an image of (height, width): scale by scale, plain then flipped, windows row by row or
    crops along the longer side; of a video clip by clip.

    Canvases are rounded up to `multiple`; that of the plain view at scale 1 is the evaluation record's.
    Windows of a flipped image are those of the mirrored picture, as in mmsegmentation.
    Raises SpecError for an evaluation cut that is random, and for windows of one that shows a part of the image only.
    """
    if cut.looks:
        raise SpecError(f"an evaluation view with random looks ({cut.looks[0].kind}) has no test-time views")
    if tta.window and isinstance(cut.place, CentreCrop):
        raise SpecError("sliding windows need an evaluation view of the whole image; this recipe crops the centre")
    if not isinstance(cut, ClipCut) and (tta.clips, tta.crops) != (1, 1):
        raise SpecError(f"{tta.name!r} are clips and crops of a video; this view recipe is one of images")
    planned: list[PlannedView] = []
    for scale in tta.scales:
        place = scaled_placement(cut.place, scale)
        frame = draw_frame(place, image_size, np.zeros(1))
        canvas = frame_canvas(place, image_size, multiple=multiple)
        if scale != 1:
            canvas = _rounded(canvas, multiple)
        for flipped in (False, True)[: 1 + tta.flip]:
            if tta.window is None or tta.stride is None:
                shown = replace(frame, flipped=flipped)
                planned += [PlannedView(crop, canvas, image_size) for crop in _crops(shown, tta.crops)]
                continue
            for window in _windows(frame.valid, tta.window, tta.stride):
                shown = replace(frame, window=_mirrored(window, frame.valid) if flipped else window, flipped=flipped)
                planned.append(PlannedView(shown, _rounded(shown.valid, multiple), image_size))
    return tuple(replace(view, clip=clip) for clip in range(tta.clips) for view in planned)


def _crops(frame: Frame, crops: int) -> tuple[Frame, ...]:
    """A centre crop alone, or between those at both ends of the side along which it can move."""
    _, _, height, width = frame.window
    down, right = frame.resized[0] - height, frame.resized[1] - width
    ends = ((0, 0, height, width), (down, right, height, width))
    return (frame,) if crops == 1 else tuple(replace(frame, window=w) for w in (ends[0], frame.window, ends[1]))


def _rounded(size: Size, multiple: int) -> Size:
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def _mirrored(window: tuple[int, int, int, int], size: Size) -> tuple[int, int, int, int]:
    top, left, height, width = window
    return top, size[1] - left - width, height, width


def _windows(size: Size, window: Size, stride: Size) -> Iterator[tuple[int, int, int, int]]:
    height, width = min(window[0], size[0]), min(window[1], size[1])
    for top in _starts(size[0], window[0], stride[0]):
        for left in _starts(size[1], window[1], stride[1]):
            yield top, left, height, width


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin on a side: `stride` apart, the last shifted inside."""
    count = -(-max(length - window, 0) // stride) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def cut_views(image: np.ndarray, planned: tuple[PlannedView, ...]) -> Iterator[Tensor]:
    """The planned views of an image uint8 [H, W, 3], in order: uint8 [3, *view.valid]; those of the clips of a video
    [clip, T, H, W, 3]: [T, 3, *view.valid].

    Equal to `apply_view` of each frame; views of one scale share the resized picture.
    """
    resized: Tensor | None = None
    last: tuple[int, Frame] | None = None
    for plan in planned:
        whole = replace(plan.frame, window=(0, 0, *plan.frame.resized), flipped=False)
        if resized is None or (plan.clip, whole) != last:
            resized, last = show(image if image.ndim == 3 else image[plan.clip], whole), (plan.clip, whole)
        top, left, height, width = plan.frame.window
        part = resized[..., top : top + height, left : left + width]
        yield (part.flip(-1) if plan.frame.flipped else part).contiguous()
