"""What surfaces of scenes are painted with: noise, and mixtures of two colours."""

import numpy as np

from fcache.extractor.scenes.scene import Surface, generator


def mix(surface: Surface, share: np.ndarray) -> np.ndarray:
    """RGB [..., 3] in 0..1 between the colours of a surface, by the share [...] of the second."""
    a, b = (np.array(c, dtype=np.float32) for c in surface.colours)
    return a + share[..., None] * (b - a)


def noise(texture: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Value noise in 0..1 with one random number a unit square, bilinear between them."""
    cells = generator(texture).random((32, 32), dtype=np.float32)
    x0, y0 = np.floor(x), np.floor(y)
    fx, fy = x - x0, y - y0
    i, j = x0.astype(np.int64) % 32, y0.astype(np.int64) % 32
    i1, j1 = (i + 1) % 32, (j + 1) % 32
    top = cells[j, i] * (1 - fx) + cells[j, i1] * fx
    return top * (1 - fy) + (cells[j1, i] * (1 - fx) + cells[j1, i1] * fx) * fy
