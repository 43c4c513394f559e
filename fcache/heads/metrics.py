"""Metrics: one state per sample, so that scores can be resampled and compared sample by sample."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fcache.cache_spec import DataError

States = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Scores:
    """Scores of one set of samples: `values` by name (fractions), and one value a class, NaN where undefined.

    `chosen` names the variant that the values are of, where a head trains several ("lr=0.001"); else it is empty.
    """

    values: Mapping[str, float]
    per_class: Mapping[str, np.ndarray] = field(default_factory=dict)
    chosen: str = ""


@dataclass(frozen=True)
class Metric:
    """A metric in two steps.

    `observe(prediction, targets)` gives the state of one sample: arrays by name, of equal shapes for all samples;
    `targets` are the sample's arrays by path. `reduce(states, weights)` gives the scores of states stacked along
    axis 0, [N, …]; `weights`, integers [N], says how often each sample counts (all ones, or a bootstrap draw).
    `primary` names the score by which heads are ranked; `resample(states)` gives what makes it alone of weights, for
    metrics that have it much cheaper than by `reduce`.
    """

    primary: str
    observe: Callable[[Any, Mapping[str, Any]], States]
    reduce: Callable[[States, np.ndarray], Scores]
    larger_is_better: bool = True
    resample: Callable[[States], Callable[[np.ndarray], float]] | None = None

    def primary_of(self, states: States) -> Callable[[np.ndarray], float]:
        """What makes the primary score of weights [N]: the same number as `reduce`, and its errors."""
        if self.resample is not None:
            return self.resample(states)
        return lambda weights: self.reduce(states, weights).values[self.primary]


def stack_states(states: Sequence[States]) -> dict[str, np.ndarray]:
    """States of single samples stacked along a new axis 0."""
    return {name: np.stack([s[name] for s in states]) for name in states[0]}


def score(metric: Metric, states: States) -> Scores:
    """The scores of stacked states, every sample counted once."""
    return metric.reduce(states, np.ones(len(next(iter(states.values()))), dtype=np.int64))


@lru_cache(maxsize=32)
def _decode_map(png: bytes) -> np.ndarray:
    # Several heads score the same sample one after another; they share the decoded map.
    with Image.open(BytesIO(png)) as image:
        labels = np.array(image)
    labels.setflags(write=False)
    return labels


def decode_truth(stored: Tensor) -> np.ndarray:
    """The label map [H, W] at original size that `semantic/truth` holds as PNG bytes (uint8 [n])."""
    return _decode_map(stored.numpy().tobytes())


def segmentation_metric(num_classes: int, *, ignore: int) -> Metric:
    """mIoU, pixel accuracy and mean class accuracy of label maps at original size (ADE20K's protocol).

    Predictions are uint8 [H, W]; truth is `semantic/truth`; pixels labelled `ignore` count for nothing.
    mIoU is the mean, over classes with a non-empty union in the whole set, of total intersection over total union.
    The state of a sample is int64 [C]: `intersection`, `predicted`, `labelled` pixels. Raises DataError if a truth
    map has another size than the prediction, holds a label outside the classes, or no pixel at all is labelled.
    """

    def observe(prediction: Tensor, targets: Mapping[str, Any]) -> States:
        truth = decode_truth(targets["semantic/truth"])
        found = prediction.numpy()
        if truth.shape != found.shape:
            raise DataError(f"the true label map is {truth.shape}, the prediction {found.shape}; re-extract the split")
        valid = truth != ignore
        truth, found = truth[valid], found[valid]
        if truth.size and int(truth.max()) >= num_classes:
            raise DataError(f"a true label map holds label {truth.max()}, but there are {num_classes} classes")
        return {
            "intersection": np.bincount(truth[truth == found], minlength=num_classes),
            "predicted": np.bincount(found, minlength=num_classes),
            "labelled": np.bincount(truth, minlength=num_classes),
        }

    def reduce(states: States, weights: np.ndarray) -> Scores:
        # In float64 sums of pixel counts are exact, and its product is much faster than that of integers.
        sums = {name: weights.astype(np.float64) @ s.astype(np.float64) for name, s in states.items()}
        inter, labelled = sums["intersection"], sums["labelled"]
        if labelled.sum() == 0:
            raise DataError("no pixel of the evaluation split is labelled; there is nothing to score")
        iou = _ratio(inter, sums["predicted"] + labelled - inter)
        accuracy = _ratio(inter, labelled)
        return Scores(
            values={
                "miou": float(np.nanmean(iou)),
                "pixel_accuracy": float(inter.sum() / labelled.sum()),
                "mean_accuracy": float(np.nanmean(accuracy)),
            },
            per_class={"iou": iou, "accuracy": accuracy},
        )

    return Metric(primary="miou", observe=observe, reduce=reduce)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def classification_metric(num_classes: int, *, names: Sequence[str] = ("",)) -> Metric:
    """Top-1, top-5 and mean-per-class accuracy of K classifiers that share one pass, the best of which counts.

    Predictions are logits [K, C]; truth is `class/label`. The scores are those of the classifier with the best top-1
    on these samples; with more than one, `chosen` is its name of `names`, and "top1/<name>" gives each.
    Top-5 is top-C where there are fewer classes. Mean-per-class is over the classes present.
    The state of a sample: `label`, and `top1`, `top5` as bool [K].
    """

    def observe(prediction: Tensor, targets: Mapping[str, Any]) -> States:
        label = _true_class(targets["class/label"], num_classes)
        top1, top5 = _hits(prediction, label)
        return {"label": np.asarray(label), "top1": top1, "top5": top5}

    def reduce(states: States, weights: np.ndarray) -> Scores:
        total = weights.sum()
        top1 = weights @ states["top1"].astype(np.float64) / total
        top5 = weights @ states["top5"].astype(np.float64) / total
        best = int(np.argmax(top1))
        recall = _recall(states["label"], states["top1"][:, best], weights, num_classes)
        values = {"top1": float(top1[best]), "top5": float(top5[best]), "mean_per_class": float(np.nanmean(recall))}
        if len(names) > 1:
            values |= {f"top1/{name}": float(v) for name, v in zip(names, top1, strict=True)}
        return Scores(values=values, per_class={"recall": recall}, chosen=names[best] if len(names) > 1 else "")

    return Metric(primary="top1", observe=observe, reduce=reduce)


def clip_metric(num_classes: int) -> Metric:
    """Top-1, top-5 and mean-per-class accuracy of videos, and "clip/top1" and "clip/top5" of their single views.

    Predictions are logits [1 + V, C]: those of the video, then of each of its V views; truth is `clip/label`. Top-5 is
    top-C where there are fewer classes. Mean-per-class is over the classes present.
    The state of a sample: `label`, `top1` and `top5` as bool, `clip_top1` and `clip_top5` as the shares of its views.
    """

    def observe(prediction: Tensor, targets: Mapping[str, Any]) -> States:
        label = _true_class(targets["clip/label"], num_classes)
        top1, top5 = _hits(prediction, label)
        return {
            "label": np.asarray(label),
            "top1": top1[0],
            "top5": top5[0],
            "clip_top1": top1[1:].mean(),
            "clip_top5": top5[1:].mean(),
        }

    def reduce(states: States, weights: np.ndarray) -> Scores:
        share = {
            name: float(weights @ states[name].astype(np.float64) / weights.sum())
            for name in ("top1", "top5", "clip_top1", "clip_top5")
        }
        recall = _recall(states["label"], states["top1"], weights, num_classes)
        return Scores(
            values={
                "top1": share["top1"],
                "top5": share["top5"],
                "mean_per_class": float(np.nanmean(recall)),
                "clip/top1": share["clip_top1"],
                "clip/top5": share["clip_top5"],
            },
            per_class={"recall": recall},
        )

    return Metric(primary="top1", observe=observe, reduce=reduce)


def _true_class(label: Any, num_classes: int) -> int:
    found = int(label)
    if not 0 <= found < num_classes:
        raise DataError(f"a true class is {found}, but there are {num_classes} classes")
    return found


def _hits(logits: Tensor, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Whether the label is the first, and among the first five, of each row of logits [K, C]: bool [K] each."""
    ranked = torch.topk(logits, min(5, logits.shape[-1]), dim=-1).indices.numpy()
    return ranked[:, 0] == label, (ranked == label).any(axis=1)


def _recall(labels: np.ndarray, right: np.ndarray, weights: np.ndarray, num_classes: int) -> np.ndarray:
    """The share of the samples of each class that are right, NaN for a class without samples."""
    present = np.bincount(labels, weights=weights, minlength=num_classes)
    return _ratio(np.bincount(labels, weights=weights * right, minlength=num_classes), present)
