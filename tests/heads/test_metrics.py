import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fcache.cache_spec import DataError
from fcache.heads.metrics import classification_metric, clip_metric, score, segmentation_metric, stack_states


def _png(labels: np.ndarray) -> torch.Tensor:
    stream = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(stream, "PNG")
    return torch.from_numpy(np.frombuffer(stream.getvalue(), np.uint8).copy())


def _states(metric, predictions, truths):
    pairs = zip(predictions, truths, strict=True)
    return stack_states([metric.observe(torch.from_numpy(p), {"semantic/truth": _png(t)}) for p, t in pairs])


def test_miou_of_a_case_worked_by_hand():
    truth = np.array([[0, 0, 1, 255], [0, 2, 1, 255]], np.uint8)
    found = np.array([[0, 1, 1, 0], [0, 2, 2, 3]], np.uint8)
    metric = segmentation_metric(5, ignore=255)
    scores = score(metric, _states(metric, [found], [truth]))
    # Class 0: 2/3; class 1: 1/3; class 2: 1/2; classes 3 and 4 have no union on labelled pixels.
    np.testing.assert_allclose(scores.per_class["iou"], [2 / 3, 1 / 3, 1 / 2, np.nan, np.nan])
    assert scores.values["miou"] == pytest.approx(0.5, abs=1e-15)
    assert scores.values["pixel_accuracy"] == pytest.approx(4 / 6, abs=1e-15)
    assert scores.values["mean_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3, abs=1e-15)


@given(seed=st.integers(0, 10_000), present=st.integers(1, 8))
def test_miou_equals_that_of_torchmetrics_also_with_absent_classes(seed: int, present: int):
    rng = np.random.default_rng(seed)
    shapes = [(11, 17), (20, 9), (13, 13)]
    truths = [rng.integers(0, present, s).astype(np.uint8) for s in shapes]
    found = [rng.integers(0, present, s).astype(np.uint8) for s in shapes]
    for t in truths:
        t[rng.random(t.shape) < 0.2] = 255
    metric = segmentation_metric(8, ignore=255)
    ours = score(metric, _states(metric, found, truths)).values
    flat_found = torch.from_numpy(np.concatenate([f.ravel() for f in found]).astype(np.int64))
    flat_truth = torch.from_numpy(np.concatenate([t.ravel() for t in truths]).astype(np.int64))
    jaccard = MulticlassJaccardIndex(8, average="macro", ignore_index=255)(flat_found, flat_truth)
    assert ours["miou"] == pytest.approx(float(jaccard), abs=1e-6)
    micro = MulticlassAccuracy(8, average="micro", ignore_index=255)(flat_found, flat_truth)
    assert ours["pixel_accuracy"] == pytest.approx(float(micro), abs=1e-6)


def test_weights_count_samples_as_often_as_repeated_states_do():
    rng = np.random.default_rng(0)
    metric = segmentation_metric(4, ignore=255)
    maps = [rng.integers(0, 4, (6, 6)).astype(np.uint8) for _ in range(6)]
    states = _states(metric, maps[:3], maps[3:])
    repeated = {k: np.repeat(v, [2, 0, 3], axis=0) for k, v in states.items()}
    assert metric.reduce(states, np.array([2, 0, 3])).values == score(metric, repeated).values


def test_a_prediction_of_another_size_than_the_truth_is_an_error():
    metric = segmentation_metric(4, ignore=255)
    with pytest.raises(DataError, match=r"\(4, 4\).*\(4, 5\)"):
        metric.observe(torch.zeros(4, 5, dtype=torch.uint8), {"semantic/truth": _png(np.zeros((4, 4)))})


def test_a_label_outside_the_classes_is_an_error():
    metric = segmentation_metric(4, ignore=255)
    with pytest.raises(DataError, match="label 7"):
        metric.observe(torch.zeros(2, 2, dtype=torch.uint8), {"semantic/truth": _png(np.full((2, 2), 7))})


def test_a_split_without_any_labelled_pixel_cannot_be_scored():
    metric = segmentation_metric(4, ignore=255)
    states = _states(metric, [np.zeros((2, 2), np.uint8)], [np.full((2, 2), 255)])
    with pytest.raises(DataError, match="no pixel"):
        score(metric, states)


def test_top1_top5_and_mean_per_class_equal_their_definitions():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(60, 1, 9)).astype(np.float32), rng.integers(0, 7, 60)
    metric = classification_metric(9)
    states = stack_states(
        [
            metric.observe(torch.from_numpy(x), {"class/label": torch.tensor(y)})
            for x, y in zip(logits, labels, strict=True)
        ]
    )
    scores = score(metric, states)
    order = np.argsort(-logits[:, 0], axis=1)
    assert scores.values["top1"] == pytest.approx(np.mean(order[:, 0] == labels), abs=1e-12)
    assert scores.values["top5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)), abs=1e-12)
    per_class = [np.mean(order[labels == c, 0] == c) for c in np.unique(labels)]
    assert scores.values["mean_per_class"] == pytest.approx(np.mean(per_class), abs=1e-12)
    assert np.isnan(scores.per_class["recall"][7:]).all()
    assert scores.chosen == ""


def test_the_best_of_several_classifiers_counts_and_each_is_reported():
    metric = classification_metric(3, names=["lr=1", "lr=2"])
    logits = torch.tensor([[[0.0, 1, 0], [1.0, 0, 0]], [[0.0, 1, 0], [0.0, 1, 0]]])
    states = stack_states(
        [metric.observe(x, {"class/label": torch.tensor(y)}) for x, y in zip(logits, [0, 1], strict=True)]
    )
    scores = score(metric, states)
    assert scores.chosen == "lr=2"
    assert scores.values == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0, "top1/lr=1": 0.5, "top1/lr=2": 1.0}


def test_top5_of_fewer_classes_takes_them_all():
    metric = classification_metric(2)
    state = metric.observe(torch.tensor([[2.0, 1.0]]), {"class/label": torch.tensor(1)})
    assert not state["top1"][0]
    assert state["top5"][0]


def test_a_sample_without_a_class_cannot_be_scored():
    with pytest.raises(DataError, match="true class is -1"):
        classification_metric(3).observe(torch.zeros(1, 3), {"class/label": torch.tensor(-1)})


def test_clips_are_scored_beside_the_videos_that_they_are_views_of():
    rng = np.random.default_rng(2)
    # 30 videos: a row for the video, and 12 for its views.
    logits, labels = rng.normal(size=(30, 13, 7)).astype(np.float32), rng.integers(0, 5, 30)
    metric = clip_metric(7)
    states = stack_states(
        [
            metric.observe(torch.from_numpy(x), {"clip/label": torch.tensor(y)})
            for x, y in zip(logits, labels, strict=True)
        ]
    )
    scores = score(metric, states)
    order = np.argsort(-logits, axis=2)
    right, among = order[:, :, 0] == labels[:, None], (order[:, :, :5] == labels[:, None, None]).any(2)
    per_class = [np.mean(right[labels == c, 0]) for c in np.unique(labels)]
    assert scores.values == {
        "top1": pytest.approx(right[:, 0].mean(), abs=1e-12),
        "top5": pytest.approx(among[:, 0].mean(), abs=1e-12),
        "mean_per_class": pytest.approx(np.mean(per_class), abs=1e-12),
        "clip/top1": pytest.approx(right[:, 1:].mean(), abs=1e-12),
        "clip/top5": pytest.approx(among[:, 1:].mean(), abs=1e-12),
    }
    assert np.isnan(scores.per_class["recall"][5:]).all()
    twice = {k: np.repeat(v, 2, axis=0) for k, v in states.items()}
    assert metric.reduce(states, np.full(30, 2)).values == pytest.approx(dict(score(metric, twice).values))


def test_a_clip_without_a_class_cannot_be_scored():
    with pytest.raises(DataError, match="true class is -1"):
        clip_metric(3).observe(torch.zeros(2, 3), {"clip/label": torch.tensor(-1)})
