"""Class maps of several views against the same sums done whole, with torch's own operations."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcache.cache_spec import SpecError, View
from fcache.cache_spec.testing import plain_view
from fcache.heads.parts import classmaps
from fcache.heads.parts.classmaps import ClassMaps, as_they_are, merge_labels, probability_strips, share_strips
from fcache.heads.parts.segmentation import labels_at_original_size

SIZE = (37, 53)
CLASSES = 7


def view_at(valid: tuple[int, int], *, flipped: bool = False, window: tuple[int, int, int, int] | None = None) -> View:
    """The view of an image of SIZE resized to `valid` and mirrored, or a window (top, left, height, width) of it."""
    top, left, height, width = window or (0, 0, *valid)
    sx, sy = valid[1] / SIZE[1], valid[0] / SIZE[0]
    x = valid[1] - left if flipped else -left
    canvas = (-(-height // 8) * 8, -(-width // 8) * 8)
    return View((-sx if flipped else sx, 0.0, float(x), 0.0, sy, float(-top)), canvas, (height, width), SIZE)


def logits_for(view: View) -> torch.Tensor:
    return 3 * torch.randn(CLASSES, view.canvas[0] // 4, view.canvas[1] // 4)


def on_canvas(logits: torch.Tensor, view: View) -> torch.Tensor:
    large = F.interpolate(logits[None], size=view.canvas, mode="bilinear", align_corners=False)
    return large[0, :, : view.valid[0], : view.valid[1]]


def at_image(scores: torch.Tensor, *, flipped: bool) -> torch.Tensor:
    scores = scores.flip(2) if flipped else scores
    return F.interpolate(scores[None], size=SIZE, mode="bilinear", align_corners=False)[0]


def shares(outputs: list[ClassMaps], views: list[View]) -> torch.Tensor:
    strips = list(share_strips(outputs, views))
    assert [first for first, _ in strips] == np.cumsum([0, *(x.shape[1] for _, x in strips)])[:-1].tolist()
    return torch.cat([x for _, x in strips], dim=1)


def assert_labels_of(labels: torch.Tensor, probabilities: torch.Tensor) -> None:
    """`labels` are the best classes, but where the best two are equal to within rounding."""
    best = probabilities.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-5
    assert clear.float().mean() > 0.99
    assert labels.dtype == torch.uint8
    assert torch.equal(labels[clear].long(), probabilities.argmax(0)[clear])


@pytest.mark.parametrize("strip", [1, 3000, classmaps.STRIP])
def test_scales_and_flips_are_the_mean_softmax_at_original_size(strip: int, monkeypatch) -> None:
    monkeypatch.setattr(classmaps, "STRIP", strip)
    views = [view_at(v, flipped=f) for v in ((19, 27), (30, 42), (37, 53), (56, 79)) for f in (False, True)]
    logits = [logits_for(view) for view in views]
    by_hand = sum(
        at_image(on_canvas(x, view), flipped=view.to_view[0] < 0).softmax(0)
        for x, view in zip(logits, views, strict=True)
    ) / len(views)
    found = shares([ClassMaps(x) for x in logits], views)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=2e-6)
    assert_labels_of(merge_labels([ClassMaps(x) for x in logits], views, {}), by_hand)


@pytest.mark.parametrize("strip", [1, classmaps.STRIP])
@pytest.mark.parametrize("flipped", [False, True])
def test_overlapping_windows_average_class_scores_before_the_softmax(strip: int, flipped: bool, monkeypatch) -> None:
    monkeypatch.setattr(classmaps, "STRIP", strip)
    size = (30, 42)
    places = [(t, x, 16, 20) for t in (0, 10, 14) for x in (0, 12, 22)]
    views = [view_at(size, flipped=flipped, window=w) for w in places]
    logits = [logits_for(view) for view in views]
    total, count = torch.zeros(CLASSES, *size), torch.zeros(size)
    for x, view, (top, left, height, width) in zip(logits, views, places, strict=True):
        total[:, top : top + height, left : left + width] += on_canvas(x, view)
        count[top : top + height, left : left + width] += 1
    assert count.min() == 1
    assert count.max() == 6
    by_hand = at_image(total / count, flipped=flipped).softmax(0)
    torch.testing.assert_close(shares([ClassMaps(x) for x in logits], views), by_hand, rtol=1e-5, atol=2e-6)
    assert_labels_of(merge_labels([ClassMaps(x) for x in logits], views, {}), by_hand)


def test_windows_of_one_map_are_that_map() -> None:
    size = (30, 42)
    whole = 3 * torch.randn(CLASSES, *size)
    places = [(t, x, 16, 20) for t in (0, 10, 14) for x in (0, 12, 22)]
    windows = []
    for top, left, height, width in places:
        # Maps as large as the canvas: resizing to it changes nothing, as for a head that looks at single pixels.
        padded = torch.full((CLASSES, 16, 24), 99.0)
        padded[:, :height, :width] = whole[:, top : top + height, left : left + width]
        windows.append(padded)
    found = shares([ClassMaps(x) for x in windows], [view_at(size, window=w) for w in places])
    padded = F.pad(whole, (0, 6, 0, 2), value=-99.0)
    one = shares([ClassMaps(padded)], [view_at(size)])
    torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)


def test_one_view_of_logits_is_labelled_as_ever() -> None:
    view = plain_view((24, 32), valid=(20, 31), image_size=SIZE)
    logits = torch.randn(CLASSES, 6, 8)
    expected = labels_at_original_size(logits, view)
    assert torch.equal(merge_labels([ClassMaps(logits)], [view], {}), expected)
    assert_labels_of(expected, shares([ClassMaps(logits)], [view]))


def test_equal_views_say_what_one_says() -> None:
    view = view_at((30, 42))
    maps = ClassMaps(logits_for(view))
    torch.testing.assert_close(shares([maps] * 3, [view] * 3), shares([maps], [view]), rtol=1e-6, atol=1e-7)


def test_the_mirrored_view_of_a_symmetric_picture_changes_nothing() -> None:
    view = View((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (32, 48), (32, 48), (32, 48))
    mirrored = View((-1.0, 0.0, 48.0, 0.0, 1.0, 0.0), (32, 48), (32, 48), (32, 48))
    half = torch.randn(CLASSES, 8, 6)
    logits = torch.cat([half, half.flip(2)], dim=2)
    one = shares([ClassMaps(logits)], [view])
    torch.testing.assert_close(shares([ClassMaps(logits)] * 2, [view, mirrored]), one, rtol=1e-5, atol=1e-6)
    # And that of another picture is where the matrix says: flipped logits mean the same in a flipped view.
    other = torch.randn(CLASSES, 8, 12)
    pair = shares([ClassMaps(other), ClassMaps(other.flip(2))], [view, mirrored])
    torch.testing.assert_close(pair, shares([ClassMaps(other)], [view]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strip", [1, classmaps.STRIP])
def test_scores_made_on_the_canvas_are_averaged_as_they_are(strip: int, monkeypatch) -> None:
    monkeypatch.setattr(classmaps, "STRIP", strip)
    views = [view_at((30, 42)), view_at((30, 42), flipped=True), view_at((19, 27))]
    masks = [torch.randn(5, 6, 9) for _ in views]
    classes = [torch.rand(5, CLASSES) for _ in views]
    outputs = [
        ClassMaps(m, lambda x, c=c: torch.einsum("qk,qhw->khw", c, x.sigmoid()), as_they_are)
        for m, c in zip(masks, classes, strict=True)
    ]
    by_hand = torch.zeros(CLASSES, *SIZE)
    for m, c, view in zip(masks, classes, views, strict=True):
        large = F.interpolate(m[None], size=view.canvas, mode="bilinear", align_corners=False)[0].sigmoid()
        scores = torch.einsum("qk,qhw->khw", c, large)[:, : view.valid[0], : view.valid[1]]
        by_hand += at_image(scores, flipped=view.to_view[0] < 0) / len(views)
    torch.testing.assert_close(shares(outputs, views), by_hand, rtol=1e-5, atol=1e-5)
    assert_labels_of(merge_labels(outputs, views, {}), by_hand)
    # A single view of such scores is no map of logits.
    assert_labels_of(merge_labels(outputs[:1], views[:1], {}), shares(outputs[:1], views[:1]))
    probabilities = torch.cat([x for _, x in probability_strips(outputs, views)], dim=1)
    torch.testing.assert_close(probabilities.sum(0), torch.ones(SIZE))
    torch.testing.assert_close(probabilities, by_hand / by_hand.sum(0), rtol=1e-4, atol=1e-5)


def test_merging_changes_no_output() -> None:
    view = View((1.0, 0.0, 0.0, 0.0, 1.0, 0.0), (8, 12), (8, 12), (8, 12))
    mirrored = View((-1.0, 0.0, 12.0, 0.0, 1.0, 0.0), (8, 12), (8, 12), (8, 12))
    maps = [torch.randn(CLASSES, 8, 12) for _ in range(2)]
    kept = [m.clone() for m in maps]
    merge_labels([ClassMaps(m, shares=as_they_are) for m in maps], [view, mirrored], {})
    assert all(torch.equal(a, b) for a, b in zip(maps, kept, strict=True))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (view_at((30, 42), window=(0, 0, 30, 21)), "50% of the image"),
        (View((1.0, 0.2, 0.0, 0.0, 1.0, 0.0), (40, 56), SIZE, SIZE), "scaled and mirrored only"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_views_that_do_not_show_the_image_are_refused(view: View, message: str, count: int) -> None:
    with pytest.raises(SpecError, match=message):
        merge_labels([ClassMaps(torch.zeros(CLASSES, 4, 4))] * count, [view] * count, {})


def test_memory_does_not_grow_with_the_image() -> None:
    # All class maps of this image at once are 960 MB; the strips, some 16 MB each, are what may come on top.
    program = """
import resource, torch
from fcache.cache_spec import View
from fcache.heads.parts.classmaps import ClassMaps, merge_labels
torch.set_num_threads(1)
size, small = (1500, 4000), (150, 400)
def view(sign):
    return View((sign * 0.1, 0.0, 400.0 if sign < 0 else 0.0, 0.0, 0.1, 0.0), (160, 416), small, size)
def merged(size_of):
    maps = [ClassMaps(torch.randn(40, 40, 104)) for _ in range(2)]
    return merge_labels(maps, [view(1), view(-1)], {})
with torch.inference_mode():
    torch.softmax(torch.randn(40, 8, 8), dim=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    labels = merged(size)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert labels.shape == size
print((after - before) / 1024)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert float(found.stdout) < 250
