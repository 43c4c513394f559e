import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from fcache.cache_spec import DataError
from fcache.cache_spec.testing import plain_view
from fcache.heads import Prediction, TrainConfig, best_classes, choose_head, load_head, overlay, predict, train
from fcache.heads.predict import default_palette

# The package has a function of the module's name.
predict_module = sys.modules["fcache.heads.predict"]


def test_label_maps_have_the_size_of_the_original_images(scenes, tmp_path):
    source = scenes(8)
    config = TrainConfig(iterations=2, batch_size=4)
    run = train(source, [choose_head("linear", source.info, config)], config, out=tmp_path)[0]
    view = plain_view((64, 64), valid=(48, 64), image_size=(96, 128))
    photos = replace(scenes(2), views=(view,) * 2, targets={})
    found = predict(load_head(run), next(iter(photos.blocks(0))))
    assert [p.value.shape for p in found] == [(96, 128)] * 2
    assert {p.id for p in found} == set(photos.ids)


def test_the_best_classes_come_with_probabilities():
    prediction = Prediction("x", torch.tensor([[0.0, 2.0, 1.0], [9.0, 0.0, 0.0]]))
    found = best_classes(prediction, ["a", "b", "c"], count=2)
    assert [name for name, _ in found] == ["b", "c"]
    assert found[0][1] == pytest.approx(np.exp(2) / (1 + np.exp(1) + np.exp(2)))
    assert best_classes(prediction, ["a", "b", "c"], variant=1, count=1)[0][0] == "a"


def test_an_overlay_mixes_the_colours_of_classes_and_leaves_the_rest_clear():
    image = np.full((40, 60, 3), 100, np.uint8)
    labels = np.full((40, 60), 255, np.uint8)
    labels[:, :20], labels[:, 20:30] = 0, 1
    drawn = overlay(image, labels, [(200, 0, 0), (0, 200, 0)], ["road", "car"], opacity=0.5)
    assert drawn.dtype == np.uint8
    assert tuple(drawn[5, 5]) == (150, 50, 50)
    assert tuple(drawn[5, 25]) == (50, 150, 50)
    assert tuple(drawn[5, 50]) == (100, 100, 100)


def test_the_legend_lists_the_classes_that_occur_largest_first():
    image, labels = np.zeros((100, 50, 3), np.uint8), np.ones((100, 50), np.uint8)
    labels[:10] = 2
    palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    legend = overlay(image, labels, palette, ["a", "b", "c"])[:, 50:]
    rows = {c: np.flatnonzero((legend == c).all(-1).any(1)) for c in palette}
    assert len(rows[palette[0]]) == 0
    assert rows[palette[1]].max() < rows[palette[2]].min()


def test_many_classes_get_a_legend_that_is_as_high_as_they_need():
    labels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    drawn = overlay(np.zeros((8, 8, 3), np.uint8), labels, [], [f"class {k}" for k in range(64)])
    assert drawn.shape[0] > 64 * 11


def test_an_overlay_is_mixed_some_rows_at_a_time(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (900, 1000, 3)).astype(np.uint8)
    labels = rng.integers(0, 6, (900, 1000)).astype(np.uint8)
    labels[labels == 5] = 255
    whole = overlay(image, labels, [], ["a", "b", "c", "d", "e"])
    monkeypatch.setattr(predict_module, "OVERLAY_PIXELS", 17_000)
    tracemalloc.start()
    try:
        drawn = overlay(image, labels, [], ["a", "b", "c", "d", "e"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(drawn, whole)
    # In float32 the picture alone is four times its own size.
    assert peak < 4 * image.nbytes


@pytest.mark.parametrize("side", [300, 700, 2000])
def test_a_legend_can_be_read_beside_a_picture_of_any_size(side: int) -> None:
    labels = np.zeros((side, side), np.uint8)
    labels[0, :10] = np.arange(10)
    legend = overlay(np.zeros((side, side, 3), np.uint8), labels, [(0, 0, 255)] * 10, ["name"] * 10)[:, side:]
    # The boxes of the ten classes are squares as high as letters.
    box = np.flatnonzero((legend[:, : legend.shape[1] // 3] == (0, 0, 255)).all(-1).any(0)).size
    assert side / 50 <= box <= side / 15
    assert legend.shape[0] == side


def test_many_lines_beside_a_large_picture_have_smaller_letters() -> None:
    labels = np.zeros((3000, 500), np.uint8)
    labels[0, :150] = np.arange(150)
    drawn = overlay(np.zeros((3000, 500, 3), np.uint8), labels, [], [f"class {k}" for k in range(150)])
    assert drawn.shape[0] <= 150 * 24 + 12


def test_an_overlay_of_another_size_is_refused():
    with pytest.raises(DataError, match=r"\(4, 4\).*\(4, 5\)"):
        overlay(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint8), [], ["a"])


def test_default_colours_are_all_different():
    assert len(set(default_palette(150))) == 150
