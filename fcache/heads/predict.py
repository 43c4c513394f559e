"""Predictions of a trained head, and pictures of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from fcache.cache_spec import Block, DataError
from fcache.heads.batches import to_batch
from fcache.heads.evaluate import TrainedHead
from fcache.heads.parts.classmaps import probability_strips
from fcache.heads.views import Seen

# Pixels of an overlay that are mixed at a time: some 50 MB.
OVERLAY_PIXELS = 1 << 20


@dataclass(frozen=True)
class Prediction:
    """What a head says about one sample: `value` as its task has it, on the CPU.

    `semantic`: a label map, uint8 [H, W] at original size. `classification`: logits [K, C] of its K classifiers.
    `video`: logits [1 + V, C] of the video and of each of its V views.
    `detection`: `Detections`.
    """

    id: str
    value: Any


def predict(trained: TrainedHead, block: Block[Any], *, device: torch.device | str = "cpu") -> list[Prediction]:
    """One prediction a sample of a block, whose targets are not read."""
    with torch.inference_mode():
        batch = to_batch(block, torch.device(device), levels=[level.name for level in trained.inputs.levels])
        found = trained.predict(batch)
    return [Prediction(i, value) for i, value in zip(batch.ids, found, strict=True)]


def save_probabilities(path: Path, seen: Seen) -> None:
    """Writes what a semantic head says about one image as float16 [class, row, column] in numpy's .npy format.

    The size is the image's own; probabilities of a pixel add up to 1. Written some rows at a time, into a file of
    another name that takes its place when it is whole. Raises OSError if it cannot be written.
    """
    height, width = seen.views[0].image_size
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            start = 0
            for first, strip in probability_strips(seen.outputs, seen.views):
                values = strip.half().cpu().numpy()
                if first == 0:
                    shape = (len(values), height, width)
                    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                    start = file.tell()
                for k, rows in enumerate(values):
                    file.seek(start + 2 * width * (k * height + first))
                    file.write(rows.astype("<f2").tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def best_classes(
    prediction: Prediction, class_names: Sequence[str], *, variant: int = 0, count: int = 5
) -> list[tuple[str, float]]:
    """The most probable classes of a classification and their probabilities, best first, by classifier `variant`."""
    probabilities = torch.softmax(prediction.value[variant].double(), dim=-1)
    top = torch.topk(probabilities, min(count, len(class_names)))
    return [(class_names[int(i)], float(p)) for p, i in zip(top.values, top.indices, strict=True)]


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[tuple[int, int, int]],
    class_names: Sequence[str],
    *,
    opacity: float = 0.55,
) -> np.ndarray:
    """An image, uint8 [H, W, 3], with its label map, [H, W], drawn over it and a legend at the right.

    The legend lists the classes that occur, largest first, with their share of the pixels. Labels beyond the classes
    (255) stay clear. Returns uint8 [max(H, legend), W + legend, 3]. Raises DataError if the sizes differ.
    """
    if image.shape[:2] != labels.shape:
        raise DataError(f"the image is {image.shape[:2]}, its label map {labels.shape}")
    colours = np.asarray(palette or default_palette(len(class_names)), dtype=np.float32)
    counts = np.zeros(256, dtype=np.int64)
    drawn = np.empty_like(image)
    # Some rows at a time: sums of a large photo in float32 would take many times its own memory.
    rows = max(1, OVERLAY_PIXELS // max(1, image.shape[1]))
    for first in range(0, len(image), rows):
        strip, classes = image[first : first + rows].astype(np.float32), labels[first : first + rows]
        known = classes < len(colours)
        strip[known] = (1 - opacity) * strip[known] + opacity * colours[classes[known]]
        drawn[first : first + rows] = np.round(strip)
        counts += np.bincount(classes.ravel(), minlength=256)
    present = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k] and k < len(colours)]
    lines = [f"{class_names[k]}  {100 * counts[k] / labels.size:.1f} %" for k in present]
    entries = [(tuple(int(c) for c in colours[k]), line) for k, line in zip(present, lines, strict=True)]
    return with_legend(drawn, entries)


def with_legend(picture: np.ndarray, lines: Sequence[tuple[tuple[int, ...], str]]) -> np.ndarray:
    """A picture, uint8 [H, W, 3], with a legend at its right, lines of a colour and a text; without lines, the picture.

    Returns uint8 [max(H, legend), W + legend, 3].
    """
    if not lines:
        return picture
    height, width = picture.shape[:2]
    font = legend_font((height, width), len(lines))
    size = round(font.size)
    gap = max(6, size // 3)
    step = size + gap
    wide = max(int(font.getlength(line)) for _, line in lines) + step + 3 * gap
    canvas = Image.new("RGB", (width + wide, max(height, step * len(lines) + 2 * gap)), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (colour, line) in enumerate(lines):
        x, y = width + gap, gap + row * step
        draw.rectangle((x, y, x + size, y + size), fill=colour, outline="black")
        draw.text((x + step, y), line, fill="black", font=font)
    return np.asarray(canvas)


def legend_font(size: tuple[int, int], lines: int = 1) -> ImageFont.FreeTypeFont:
    """The font of what is written on and beside a picture of (height, width), in so many lines.

    Letters grow with large pictures, which are looked at smaller than they are, as far as the lines find room.
    """
    height, width = size
    large = min(min(height, width) // 40, 3 * height // (4 * max(1, lines)))
    font = ImageFont.load_default(size=max(11, min(18, height // 20), large))
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow has FreeType"
    return font


def default_palette(count: int) -> list[tuple[int, int, int]]:
    """Colours for classes without a palette of their own: hues a golden angle apart, in three brightnesses."""
    palette = []
    for k in range(count):
        hue, value = (k * 0.61803398875) % 1.0, (1.0, 0.75, 0.55)[k % 3]
        # The three channels are one cosine, a third of the circle apart.
        channels = 0.5 + 0.5 * np.cos(2 * np.pi * (hue - np.arange(3) / 3))
        palette.append(tuple(int(c) for c in np.round(255 * value * channels)))
    return palette
