"""Contact sheets: the frames of a clip in one picture, and what a head says of it."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from fcache.heads.predict import default_palette, legend_font, with_legend

# Width and height that the frames of a sheet share.
SHEET_SIDE = 1280
_GAP = 4


def contact_sheet(frames: np.ndarray, numbers: Sequence[int], classes: Sequence[tuple[str, float]]) -> np.ndarray:
    """The frames of a clip, uint8 [T, H, W, 3], row by row with their numbers; at the right classes and probabilities.

    Frames are made smaller where the sheet would exceed `SHEET_SIDE`. Returns uint8 [rows, columns, 3].
    """
    count, height, width, _ = frames.shape
    columns = min(count, max(1, math.ceil(math.sqrt(count * height / width))))
    rows = -(-count // columns)
    scale = min(1.0, SHEET_SIDE / (columns * width), SHEET_SIDE / (rows * height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    sheet = Image.new("RGB", (columns * (size[0] + _GAP) - _GAP, rows * (size[1] + _GAP) - _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), legend_font((size[1], size[0]))
    for place, (pixels, number) in enumerate(zip(frames, numbers, strict=True)):
        x, y = place % columns * (size[0] + _GAP), place // columns * (size[1] + _GAP)
        sheet.paste(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS), (x, y))
        draw.text((x + 3, y + 2), str(number), fill="white", font=font, stroke_width=2, stroke_fill="black")
    lines = [f"{name}  {probability:.3f}" for name, probability in classes]
    return with_legend(np.asarray(sheet), list(zip(default_palette(len(lines)), lines, strict=True)))
