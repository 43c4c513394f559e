"""View geometry: the affine map between an image and one view of it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class View:
    """Where a view lies in its image.

    `to_view` is the 2x3 affine matrix, row-major, that maps image points (x, y) in pixels of the image as the
    annotations see it to view points; pixel centres lie at half-integers, so a flip is x -> width - x.
    `canvas` is the padded input size and `valid` the part that holds image, both (height, width);
    `image_size` is the image's (height, width). `frames` numbers the source frames of a clip, else it is empty.
    """

    to_view: tuple[float, float, float, float, float, float]
    canvas: tuple[int, int]
    valid: tuple[int, int]
    image_size: tuple[int, int]
    frames: tuple[int, ...] = ()

    @property
    def matrix(self) -> np.ndarray:
        """`to_view` as a float64 array [2, 3]."""
        return np.asarray(self.to_view, dtype=np.float64).reshape(2, 3)

    @property
    def to_image(self) -> np.ndarray:
        """The inverse map, view points to image points, float64 [2, 3]."""
        return invert_affine(self.matrix)


def invert_affine(matrix: np.ndarray) -> np.ndarray:
    """The inverse of an affine map [2, 3]."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.concatenate([linear, -linear @ matrix[:, 2:]], axis=1)


def transform_points(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (x, y) [..., 2] mapped by an affine matrix [2, 3]."""
    return points @ matrix[:, :2].T + matrix[:, 2]
