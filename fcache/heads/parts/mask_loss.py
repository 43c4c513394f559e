"""The loss of mask classification (Mask2Former): queries matched to the classes of an image, compared at points."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fcache.cache_spec import IGNORE, DataError


@dataclass(frozen=True)
class MaskLoss:
    """The loss's numbers: weights of its terms, in the matching too, and how masks are sampled.

    Masks are compared at `points` points: of `oversampling` times as many random ones the most uncertain (logits
    nearest to zero) make up the share `importance`, the rest are random. `no_object_weight` is the weight of queries
    without a class in the cross entropy.
    """

    points: int
    oversampling: float
    importance: float
    class_weight: float
    mask_weight: float
    dice_weight: float
    no_object_weight: float


@dataclass(frozen=True)
class Masks:
    """The binary masks of a batch, one for each class that an image shows, by image: [N] each, and N by image."""

    images: Tensor
    classes: Tensor
    counts: tuple[int, ...]


def mask_loss(
    classes: Sequence[Tensor], embeddings: Sequence[Tensor], features: Tensor, labels: Tensor, config: MaskLoss
) -> dict[str, Tensor]:
    """The weighted terms "class", "mask" and "dice", each summed over the outputs.

    An output has class logits [B, Q, K + 1] and mask embeddings [B, Q, C]; masks are their products with `features`
    [B, C, h, w]; `labels` is uint8 [B, H, W]. As in the reference, pixels of IGNORE belong to no mask: where they are
    sampled, they count as background of every class. An image of IGNORE alone has no mask, and its queries learn
    "no object". What masks cost is divided by the number of masks in the batch, those beyond the queries included, and
    at least by 1. All in float32 under autocast.
    Raises DataError if a label is no class.
    """
    with torch.autocast(features.device.type, enabled=False):
        dtype = torch.promote_types(features.dtype, torch.float32)
        classes = [c.to(dtype) for c in classes]
        embeddings = [e.to(dtype) for e in embeddings]
        features = features.to(dtype)
        truth = masks_of(labels, classes[0].shape[2] - 1)
        costs = matching_costs(classes, embeddings, features, labels, truth, config)
        matched = assign(costs, truth.counts, labels.device)
        terms = [
            _terms(c, e, features, labels, truth, config, pairs)
            for c, e, pairs in zip(classes, embeddings, matched, strict=True)
        ]
    weights = (config.class_weight, config.mask_weight, config.dice_weight)
    return {
        name: weight * torch.stack(values).sum()
        for name, weight, values in zip(("class", "mask", "dice"), weights, zip(*terms, strict=True), strict=True)
    }


def masks_of(labels: Tensor, num_classes: int) -> Masks:
    """The masks of label maps uint8 [B, H, W]. Raises DataError for a label that is neither a class nor IGNORE."""
    shown = torch.zeros(len(labels), 256, dtype=torch.bool, device=labels.device)
    present = shown.scatter_(1, labels.flatten(1).long(), True).cpu()
    present[:, IGNORE] = False
    if present[:, num_classes:].any():
        found = int(present.any(dim=0).nonzero().max())
        raise DataError(f"a label map holds label {found}, but there are {num_classes} classes")
    images, classes = present.nonzero(as_tuple=True)
    counts = tuple(int(n) for n in present.sum(dim=1))
    return Masks(images.to(labels.device), classes.to(labels.device), counts)


def class_shares(labels: Tensor, images: Tensor, classes: Tensor, points: Tensor) -> Tensor:
    """How much of a class is at points [N, P, 2], (x, y) in fractions of the extent: [N, P].

    Row n is of the mask of classes[n] in labels[images[n]]. It is what bilinear sampling of the binary masks gives,
    without the masks: the share of the four nearest pixels that are of the class, pixels outside being of none.
    """
    height, width = labels.shape[1:]
    column, row = points[..., 0] * width - 0.5, points[..., 1] * height - 0.5
    left, top = column.floor(), row.floor()
    of_right, of_below = column - left, row - top
    left, top = left.long(), top.long()
    flat = labels.flatten()
    total = torch.zeros_like(column)
    for x, across in ((left, 1 - of_right), (left + 1, of_right)):
        for y, down in ((top, 1 - of_below), (top + 1, of_below)):
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            line = images[:, None] * height + y.clamp(0, height - 1)
            of_class = flat[line * width + x.clamp(0, width - 1)] == classes[:, None]
            total = total + across * down * (inside & of_class)
    return total


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Maps [N, C, H, W] at points [N, P, 2], (x, y) in fractions of the extent: [N, C, P], bilinear, zero outside."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, mode="bilinear", align_corners=False).squeeze(3)


@torch.no_grad()
def matching_costs(
    classes: Sequence[Tensor],
    embeddings: Sequence[Tensor],
    features: Tensor,
    labels: Tensor,
    truth: Masks,
    config: MaskLoss,
) -> np.ndarray:
    """What each query costs for each mask of its image: [outputs, B, Q, T], T the most masks of an image.

    All outputs are compared at the same random points of an image, so that features are sampled once; columns beyond
    an image's masks mean nothing.
    """
    batch, most = len(features), max(truth.counts)
    points = torch.rand(batch, config.points, 2, device=features.device, dtype=features.dtype)
    slots = torch.cat([torch.arange(n) for n in truth.counts]).to(features.device)
    of_class = torch.zeros(batch, most, dtype=torch.long, device=features.device)
    of_class[truth.images, slots] = truth.classes
    shown = features.new_zeros(batch, most, config.points)
    shown[truth.images, slots] = class_shares(labels, truth.images, truth.classes, points[truth.images])
    seen = sample(features, points)
    costs = []
    for logits, embedding in zip(classes, embeddings, strict=True):
        masks = embedding @ seen
        probability, other = masks.sigmoid(), shown.transpose(1, 2)
        # Cross entropy with the logit x and the target t is softplus(x) - x t.
        mask = (F.softplus(masks).sum(-1, keepdim=True) - masks @ other) / config.points
        area = probability.sum(-1, keepdim=True) + shown.sum(-1)[:, None]
        dice = 1 - (2 * probability @ other + 1) / (area + 1)
        named = logits.softmax(-1).gather(2, of_class[:, None].expand(-1, logits.shape[1], -1))
        costs.append(config.mask_weight * mask + config.dice_weight * dice - config.class_weight * named)
    return torch.stack(costs).cpu().numpy()


def assign(costs: np.ndarray, counts: Sequence[int], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The cheapest one-to-one matching of queries and masks of every output, image and costs [outputs, B, Q, T].

    Gives for each output the queries and the indices of the masks of the batch, [M] each, in the order of images; an
    image has min(Q, its masks) of them. Numbers that are not finite cost nothing: the loss itself will say so.
    """
    # Loaded by the first training step: predictions do without.
    from scipy.optimize import linear_sum_assignment

    first = np.cumsum([0, *counts[:-1]])
    pairs: list[Any] = []
    for output in np.nan_to_num(costs, posinf=0.0, neginf=0.0):
        found = [linear_sum_assignment(cost[:, :n]) for cost, n in zip(output, counts, strict=True)]
        of_batch = [masks + start for (_, masks), start in zip(found, first, strict=True)]
        pairs.append([np.concatenate([queries for queries, _ in found]), np.concatenate(of_batch)])
    queries_and_masks = torch.from_numpy(np.asarray(pairs, dtype=np.int64)).to(device)
    return [(queries, masks) for queries, masks in queries_and_masks]


def _terms(
    classes: Tensor,
    embeddings: Tensor,
    features: Tensor,
    labels: Tensor,
    truth: Masks,
    config: MaskLoss,
    pairs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms of one output, without their weights."""
    queries, masks = pairs
    images, of_class = truth.images[masks], truth.classes[masks]
    num_classes = classes.shape[2] - 1
    wanted = torch.full(classes.shape[:2], num_classes, device=classes.device)
    wanted[images, queries] = of_class
    weights = classes.new_ones(num_classes + 1)
    weights[-1] = config.no_object_weight
    classification = F.cross_entropy(classes.transpose(1, 2), wanted, weights)

    # Only the masks of matched queries are made.
    counts = [min(n, classes.shape[1]) for n in truth.counts]
    chosen = embeddings[images, queries].split(counts)
    logits = torch.cat([e @ f for e, f in zip(chosen, features.flatten(2), strict=True)]).unflatten(
        1, features.shape[2:]
    )
    logits = logits[:, None]
    points = uncertain_points(logits, config)
    with torch.no_grad():
        target = class_shares(labels, images, of_class, points)
    found = sample(logits, points)[:, 0]
    count = max(1, sum(truth.counts))
    mask = F.binary_cross_entropy_with_logits(found, target, reduction="none").mean(1).sum() / count
    probability = found.sigmoid()
    overlap, area = (probability * target).sum(-1), probability.sum(-1) + target.sum(-1)
    dice = (1 - (2 * overlap + 1) / (area + 1)).sum() / count
    return classification, mask, dice


@torch.no_grad()
def uncertain_points(logits: Tensor, config: MaskLoss) -> Tensor:
    """Points [N, P, 2] at which masks [N, 1, H, W] are compared, see `MaskLoss`."""
    count, device, dtype = len(logits), logits.device, logits.dtype
    uncertain = int(config.importance * config.points)
    candidates = torch.rand(count, int(config.points * config.oversampling), 2, device=device, dtype=dtype)
    best = sample(logits, candidates)[:, 0].abs().topk(uncertain, dim=1, largest=False).indices
    kept = candidates.gather(1, best[:, :, None].expand(-1, -1, 2))
    return torch.cat([kept, torch.rand(count, config.points - uncertain, 2, device=device, dtype=dtype)], dim=1)
