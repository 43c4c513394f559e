"""Contact sheets: every frame once, in order, and what was found at the right."""

import math

import numpy as np
import pytest

from fcache.heads import contact_sheet
from fcache.heads.sheets import SHEET_SIDE

CLASSES = [("abseiling", 0.9), ("yoga", 0.1)]


def frames(count: int, size: tuple[int, int]) -> np.ndarray:
    """Frames of one colour each, brighter from one to the next."""
    shades = np.linspace(40, 240, count).astype(np.uint8)
    return np.broadcast_to(shades[:, None, None, None], (count, *size, 3)).copy()


@pytest.mark.parametrize(("count", "size"), [(16, (60, 80)), (8, (90, 50)), (1, (40, 40)), (16, (720, 1280))])
def test_frames_lie_row_by_row_beside_a_legend(count: int, size: tuple[int, int]) -> None:
    sheet = contact_sheet(frames(count, size), range(0, 4 * count, 4), CLASSES)
    assert sheet.dtype == np.uint8
    without = contact_sheet(frames(count, size), range(0, 4 * count, 4), [])
    assert sheet.shape[1] > without.shape[1]
    shades = frames(count, size)[:, 0, 0, 0].tolist()
    # Numbers are written in shades of grey too, but in few pixels: the median place is a frame's.
    places = [np.median(np.argwhere((without == shade).all(axis=2)), axis=0).tolist() for shade in shades]
    high = without.shape[0] / -(-count // math.ceil(math.sqrt(count * size[0] / size[1])))
    assert sorted(places, key=lambda place: (place[0] // high, place[1])) == places
    assert max(without.shape) <= SHEET_SIDE + 100


def test_small_frames_are_not_made_larger() -> None:
    sheet = contact_sheet(frames(4, (30, 40)), range(4), [])
    grey = (sheet == 40).all(axis=2)
    # A frame less what its number covers.
    assert 30 * 40 // 2 < grey.sum() <= 30 * 40
