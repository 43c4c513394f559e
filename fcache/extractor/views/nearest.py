"""Labels of a view: those of the image's pixels that lie nearest."""

import numpy as np

from fcache.cache_spec.view import invert_affine, transform_points
from fcache.extractor.views.drawn import Drawn
from fcache.extractor.views.frames import Frame

# A centre that falls on the border of two pixels must not depend on the last bit of a division.
_TIE = 1e-7


def nearest(labels: np.ndarray, drawn: Drawn, *, fill: int) -> np.ndarray:
    """`labels` [H, W] at the image point of every pixel centre of the view, [*valid]; `fill` where there is none."""
    frame = drawn.frame
    warps = [np.reshape(step.values, (2, 3)) for step in drawn.steps if step.name == "warp"]
    if not warps:
        shown = labels[np.ix_(indices(frame, 0), indices(frame, 1))]
        return shown[:, ::-1] if frame.flipped else shown
    y, x = np.mgrid[: frame.valid[0], : frame.valid[1]] + 0.5
    points = np.stack([x, y], axis=-1)
    inside = np.ones(frame.valid, dtype=bool)
    for warp in reversed(warps):
        # What one warp moves out of the picture is gone, even if the next one moves back.
        points = transform_points(invert_affine(warp), points)
        inside &= ((points >= 0) & (points < frame.valid[::-1])).all(axis=-1)
    points = transform_points(invert_affine(frame.matrix), points)
    column, row = np.floor(points + _TIE).astype(np.int64).transpose(2, 0, 1)
    return np.where(inside, labels[row.clip(0, labels.shape[0] - 1), column.clip(0, labels.shape[1] - 1)], fill)


def indices(frame: Frame, axis: int) -> np.ndarray:
    """The image row (axis 0) or column (axis 1) nearest to each one of the frame, not mirrored."""
    start, length = frame.source[axis], frame.source[axis + 2]
    first, count = frame.window[axis], frame.window[axis + 2]
    centres = (np.arange(first, first + count) + 0.5) * (length / frame.resized[axis])
    return start + np.floor(centres + _TIE).astype(np.int64).clip(0, length - 1)
