"""Class maps: what a semantic head says about a view, and how those of several views become one label map.

Overlapping windows of one picture average class scores, pictures of other scales or mirrored ones average
probabilities, both at the place that the views' geometry says: mmsegmentation's order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcache.cache_spec import SpecError, View
from fcache.heads.head import Options
from fcache.heads.parts.segmentation import labels_at_original_size

# Elements of one strip of class maps: 16 MB of float32. About six such strips are in memory at once.
STRIP = 1 << 22


def over_classes(logits: Tensor) -> Tensor:
    """Softmax over axis 0."""
    return torch.softmax(logits, dim=0)


def as_they_are(scores: Tensor) -> Tensor:
    """The scores themselves, for heads whose scores are averaged as they are."""
    return scores


@dataclass(frozen=True)
class ClassMaps:
    """What a semantic head says about one view.

    `maps` [M, h, w], of any size, cover the view's canvas. Resized to it bilinearly, they become class scores by
    `scores`, [M, rows, columns] -> [K, rows, columns], pixel by pixel; without it they are class scores (logits).
    `shares` makes of class scores [K, rows, columns] at original size what is averaged over scales and flips: their
    softmax, or `as_they_are`.
    """

    maps: Tensor
    scores: Callable[[Tensor], Tensor] = as_they_are
    shares: Callable[[Tensor], Tensor] = over_classes


def logit_maps(logits: Tensor) -> list[ClassMaps]:
    """Logits [B, K, h, w] of B views as class maps."""
    return [ClassMaps(x) for x in logits]


def merge_labels(outputs: Sequence[ClassMaps], views: Sequence[View], options: Options) -> Tensor:
    """`Head.merge` of semantic heads: the label map uint8 [H, W] of one image, on the CPU.

    Raises SpecError if the views do not show the whole image.
    """
    if len(outputs) == 1 and outputs[0].scores is as_they_are:
        _frames(views)
        # One view needs no probabilities: the largest score has the largest share.
        return labels_at_original_size(outputs[0].maps, views[0])
    # In one piece: small strips that are kept between large ones that are not would tear the memory apart.
    labels = torch.empty(views[0].image_size, dtype=torch.uint8)
    for first, shares in share_strips(outputs, views):
        labels[first : first + shares.shape[1]] = shares.argmax(dim=0)
    return labels


def probability_strips(outputs: Sequence[ClassMaps], views: Sequence[View]) -> Iterator[tuple[int, Tensor]]:
    """`share_strips` divided by their sum over the classes, for heads whose scores do not add up to 1."""
    for first, shares in share_strips(outputs, views):
        yield first, shares / shares.sum(dim=0).clamp(min=torch.finfo(shares.dtype).tiny)


def share_strips(outputs: Sequence[ClassMaps], views: Sequence[View]) -> Iterator[tuple[int, Tensor]]:
    """The mean over the views of what `ClassMaps.shares` gives, at original size, some rows at a time.

    Gives (first row, float32 [K, rows, W]) from the top; a strip has about `STRIP` elements, however large image and
    views are and however many classes there are. Raises SpecError if the views do not show the whole image.
    """
    frames = _frames(views)
    height, width = views[0].image_size
    num_classes = len(outputs[0].scores(outputs[0].maps[:, :1, :1].float()))
    channels = max(num_classes, *(len(o.maps) for o in outputs))
    # Rows of a frame, or of its canvas, for one row of the image.
    widest = max(
        max(width, frame.size[1], *(views[i].canvas[1] for i, _, _ in frame.windows)) * -(-frame.size[0] // height)
        for frame in frames
    )
    rows = max(1, STRIP // (channels * widest))
    for first in range(0, height, rows):
        wanted = (first, min(height, first + rows))
        total: Tensor | None = None
        for frame in frames:
            shares = outputs[0].shares(_strip(frame, outputs, views, wanted))
            total = shares if total is None else total + shares
        assert total is not None, "an image has a view"
        yield first, total / len(frames)


@dataclass(frozen=True)
class _Frame:
    """The whole image at one scale, mirrored or not: its (height, width), and the windows (view, top, left) of it."""

    size: tuple[int, int]
    flipped: bool
    windows: tuple[tuple[int, int, int], ...]


def _frames(views: Sequence[View]) -> list[_Frame]:
    """The frames whose windows the views are: views of one scale and direction lie in one frame."""
    height, width = views[0].image_size
    together: dict[tuple[float, float], list[int]] = {}
    for i, view in enumerate(views):
        a, b, _, c, d, _ = view.to_view
        if b or c or d <= 0:
            raise SpecError(f"label maps are merged of views that are scaled and mirrored only, got {view.to_view}")
        together.setdefault((a, d), []).append(i)
    frames: list[_Frame] = []
    for (a, d), members in together.items():
        size = round(d * height), round(abs(a) * width)
        count = np.zeros(size, dtype=np.uint16)
        windows: list[tuple[int, int, int]] = []
        for i in members:
            x, y = views[i].to_view[2], views[i].to_view[5]
            # A mirrored picture begins at the right end of the image.
            top, left = round(-y), round(-x if a > 0 else size[1] - x)
            windows.append((i, top, left))
            count[max(0, top) : top + views[i].valid[0], max(0, left) : left + views[i].valid[1]] += 1
        if not count.all():
            raise SpecError(
                f"the views show {(count > 0).mean():.0%} of the image only: a label map needs an evaluation view of "
                "all of it; choose another view recipe at extraction"
            )
        frames.append(_Frame(size, a < 0, tuple(windows)))
    return frames


def _strip(frame: _Frame, outputs: Sequence[ClassMaps], views: Sequence[View], rows: tuple[int, int]) -> Tensor:
    """Class scores [K, rows, W] of some rows of the image, as one frame has them."""
    height, width = views[0].image_size
    needed = _support(rows, frame.size[0], height)
    if len(frame.windows) == 1:
        scores = _window(outputs[frame.windows[0][0]], views[frame.windows[0][0]], needed)
    else:
        scores = _overlapped(frame, outputs, views, needed)
    scores = scores.flip(2) if frame.flipped else scores
    return _resized(scores, needed[0], (frame.size[0], height), rows, width)


def _overlapped(frame: _Frame, outputs: Sequence[ClassMaps], views: Sequence[View], rows: tuple[int, int]) -> Tensor:
    """Class scores [K, rows, columns] of some rows of a frame: the mean of those of the windows over each pixel."""
    total: Tensor | None = None
    count = torch.zeros((rows[1] - rows[0], frame.size[1]), device=outputs[0].maps.device)
    for i, top, left in frame.windows:
        first, last = max(rows[0], top), min(rows[1], top + views[i].valid[0])
        if first >= last:
            continue
        scores = _window(outputs[i], views[i], (first - top, last - top))
        if total is None:
            total = scores.new_zeros((len(scores), *count.shape))
        place = (slice(first - rows[0], last - rows[0]), slice(left, left + views[i].valid[1]))
        total[:, *place] += scores
        count[place] += 1
    assert total is not None, "windows cover their frame"
    return total / count


def _window(output: ClassMaps, view: View, rows: tuple[int, int]) -> Tensor:
    """Class scores [K, rows, valid width] of some rows of a view's canvas."""
    size = output.maps.shape[1]
    needed = _support(rows, size, view.canvas[0])
    maps = output.maps[:, needed[0] : needed[1]].float()
    on_canvas = _resized(maps, needed[0], (size, view.canvas[0]), rows, view.canvas[1])
    return output.scores(on_canvas)[:, :, : view.valid[1]]


def _support(rows: tuple[int, int], source: int, target: int) -> tuple[int, int]:
    """The rows of a map of `source` rows that bilinear resizing to `target` rows reads for some of these."""
    first, last = (int(np.floor(_place(row, source, target))) for row in (rows[0], rows[1] - 1))
    return min(first, source - 1), min(last + 2, source)


def _place(row: "int | np.ndarray", source: int, target: int) -> np.ndarray:
    """Where a row of the resized map lies among those of the source, pixel centres at half-integers."""
    return np.maximum((np.asarray(row) + 0.5) * (source / target) - 0.5, 0.0)


def _resized(x: Tensor, start: int, heights: tuple[int, int], rows: tuple[int, int], width: int) -> Tensor:
    """Rows `rows` of maps resized bilinearly from heights[0] to heights[1] rows and to `width` columns.

    `x` [C, n, w] holds the rows of the source from `start` on that are needed. Equal to `resize` and a slice of it.
    """
    if heights[0] != heights[1]:
        place = _place(np.arange(*rows), *heights)
        upper = np.minimum(place.astype(np.int64), heights[0] - 1)
        lower = np.minimum(upper + 1, heights[0] - 1)
        weight = torch.from_numpy((place - upper).astype(np.float32)).to(x.device)[:, None]
        one, other = (x[:, torch.from_numpy(i - start).to(x.device)] for i in (upper, lower))
        x = torch.lerp(one, other, weight)
    else:
        x = x[:, rows[0] - start : rows[1] - start]
    if x.shape[2] != width:
        # Heights are equal: only columns are resized.
        x = F.interpolate(x[None], size=(x.shape[1], width), mode="bilinear", align_corners=False)[0]
    return x
