"""Cutting a view: one decoded sample and (seed, sample id, view) give pixels, geometry and targets, always the same."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fcache.cache_spec.errors import DataError, unknown_name
from fcache.cache_spec.targets import IGNORE
from fcache.cache_spec.view import View
from fcache.extractor.datasets import RawSample
from fcache.extractor.views.clips import draw_clip
from fcache.extractor.views.drawn import Drawn
from fcache.extractor.views.draws import uniforms
from fcache.extractor.views.frames import draw_frame
from fcache.extractor.views.instances import view_instances
from fcache.extractor.views.looks import draw_steps
from fcache.extractor.views.nearest import nearest
from fcache.extractor.views.recipes import AnyCut, ClipCut, Size
from fcache.extractor.views.steps import apply_steps, show


@dataclass(frozen=True)
class ViewedSample:
    """One view of one sample.

    `image` is uint8 RGB [3, *view.valid], of a clip [T, 3, *view.valid]: the padding to `view.canvas`, at the bottom
    and right, is done after normalisation.
    `targets` maps array paths of `cache_spec.targets` to the arrays of one record.
    """

    image: Tensor
    view: View
    targets: Mapping[str, np.ndarray]
    drawn: Drawn


def draw_frames(cut: AnyCut, *, seed: int, sample_id: str, view: int, count: int) -> tuple[int, ...]:
    """The frames of a view of a video of `count` frames, none for an image: a pure function of its arguments."""
    if not isinstance(cut, ClipCut):
        return ()
    return draw_clip(cut.clip, count, uniforms(seed=seed, sample_id=sample_id, view=view, topic="clip"))


def draw_view(cut: AnyCut, *, seed: int, sample_id: str, view: int, image_size: Size) -> Drawn:
    """The random choices of a view of an image of (height, width): a pure function of its arguments."""

    def numbers(topic: str) -> np.ndarray:
        return uniforms(seed=seed, sample_id=sample_id, view=view, topic=topic)

    frame = draw_frame(cut.place, image_size, numbers("place"))
    steps = tuple(step for look in cut.looks for step in draw_steps(look, frame.valid, numbers(look.kind)))
    return Drawn(frame, steps)


def apply_view(drawn: Drawn, *, raw: RawSample, canvas: Size, role: str) -> ViewedSample:
    """The view that `drawn` describes; targets of evaluation splits also hold the ground truth at original size.

    Raises SpecError for a kind of target that cannot be cut, DataError if the view exceeds the canvas.
    """
    size = raw.size
    if drawn.frame.valid[0] > canvas[0] or drawn.frame.valid[1] > canvas[1]:
        # Canvases are planned from headers: the file is another one by now.
        raise DataError(
            f"an image of {size[1]}x{size[0]} pixels gives a view of {drawn.frame.valid[1]}x{drawn.frame.valid[0]}, "
            f"planned were at most {canvas[1]}x{canvas[0]}; the file changed after planning, plan again"
        )
    image = apply_steps(show(raw.image, drawn.frame), drawn.steps)
    to_view = tuple(drawn.matrix.ravel().tolist())
    view = View(to_view=to_view, canvas=canvas, valid=drawn.frame.valid, image_size=size, frames=raw.frames)
    return ViewedSample(image, view, view_targets(drawn, raw=raw, canvas=canvas, role=role), drawn)


def view_targets(drawn: Drawn, *, raw: RawSample, canvas: Size, role: str) -> dict[str, np.ndarray]:
    """The targets of the view that `drawn` describes, see `ViewedSample`.

    Raises SpecError for a kind of target that cannot be cut.
    """
    targets: dict[str, np.ndarray] = {}
    for kind, value in raw.targets.items():
        if kind not in _TARGETS:
            raise unknown_name("target kind of a view", kind, _TARGETS)
        targets |= _TARGETS[kind](value, drawn, canvas, role)
    return targets


def cut_view(
    cut: AnyCut, *, seed: int, sample_id: str, view: int, raw: RawSample, canvas: Size, role: str
) -> ViewedSample:
    """View number `view` of a sample: `draw_view`, then `apply_view`. A pure function of (seed, sample_id, view)."""
    drawn = draw_view(cut, seed=seed, sample_id=sample_id, view=view, image_size=raw.size)
    return apply_view(drawn, raw=raw, canvas=canvas, role=role)


def truth_bytes_limit(image_size: Size) -> int:
    """The most bytes that "semantic/truth" of an image of (height, width) can take: deflate's bound and PNG's frame."""
    raw = image_size[0] * (image_size[1] + 1)
    return raw + raw // 1000 + 12 * (raw // 16384 + 2) + 1024


def _semantic(labels: np.ndarray, drawn: Drawn, canvas: Size, role: str) -> dict[str, np.ndarray]:
    padded = np.full(canvas, IGNORE, dtype=np.uint8)
    padded[: drawn.frame.valid[0], : drawn.frame.valid[1]] = nearest(labels, drawn, fill=IGNORE)
    return {"semantic/map": padded} | ({"semantic/truth": _png(labels)} if role == "evaluation" else {})


def _class(label: int, drawn: Drawn, canvas: Size, role: str) -> dict[str, np.ndarray]:
    return {"class/label": np.array(label, dtype=np.int32)}


def _clip(label: int, drawn: Drawn, canvas: Size, role: str) -> dict[str, np.ndarray]:
    return {"clip/label": np.array(label, dtype=np.int32)}


_TARGETS: Mapping[str, Callable[[Any, Drawn, Size, str], dict[str, np.ndarray]]] = {
    "semantic": _semantic,
    "class": _class,
    "clip": _clip,
    "instances": view_instances,
}


def _png(labels: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(labels).save(file, format="PNG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)
