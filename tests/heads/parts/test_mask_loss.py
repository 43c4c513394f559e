import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fcache.cache_spec import DataError
from fcache.heads.parts.mask_loss import (
    MaskLoss,
    assign,
    class_shares,
    mask_loss,
    masks_of,
    matching_costs,
    sample,
    uncertain_points,
)

CONFIG = MaskLoss(
    points=64,
    oversampling=3.0,
    importance=0.75,
    class_weight=1.5,
    mask_weight=4.0,
    dice_weight=3.0,
    no_object_weight=0.3,
)
CPU = torch.device("cpu")


def _labels(seed: int = 0, *, batch: int = 3, classes: int = 5, size: tuple[int, int] = (12, 17)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch, 3, 4), generator=generator, dtype=torch.uint8)
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0].to(torch.uint8)


def _outputs(*, batch: int = 3, classes: int = 5, queries: int = 9, outputs: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logits = [normal(batch, queries, classes + 1) for _ in range(outputs)]
    embeddings = [normal(batch, queries, 4) for _ in range(outputs)]
    return logits, embeddings, normal(batch, 4, 6, 8)


def test_masks_are_the_classes_that_an_image_shows():
    labels = torch.full((3, 2, 4), 255, dtype=torch.uint8)
    labels[0, 0], labels[0, 1, 0] = 3, 1
    labels[2] = 0
    masks = masks_of(labels, 4)
    assert masks.images.tolist() == [0, 0, 2]
    assert masks.classes.tolist() == [1, 3, 0]
    assert masks.counts == (2, 0, 1)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(DataError, match="holds label 4, but there are 4 classes"):
        masks_of(torch.tensor([[[0, 4]]], dtype=torch.uint8), 4)


def test_class_shares_are_bilinear_samples_of_binary_masks():
    labels = _labels()
    truth = masks_of(labels, 5)
    points = 1.2 * torch.rand(sum(truth.counts), 200, 2, dtype=torch.float64) - 0.1
    masks = (labels[truth.images] == truth.classes[:, None, None]).double()
    assert masks.any(dim=(1, 2)).all()
    expected = sample(masks[:, None], points)[:, 0]
    found = class_shares(labels, truth.images, truth.classes, points)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_costs_are_those_of_each_query_against_each_mask():
    labels = _labels()
    logits, embeddings, features = _outputs()
    truth = masks_of(labels, 5)
    torch.manual_seed(3)
    costs = matching_costs(logits, embeddings, features, labels, truth, CONFIG)
    torch.manual_seed(3)
    points = torch.rand(3, CONFIG.points, 2, dtype=torch.float64)
    first = np.cumsum([0, *truth.counts])
    for output, image in itertools.product(range(2), range(3)):
        masks = torch.einsum("qc,chw->qhw", embeddings[output][image], features[image])
        found = sample(masks[None], points[image, None])[0]
        for slot, n in enumerate(range(first[image], first[image + 1])):
            wanted = (labels[image] == truth.classes[n]).double()
            wanted = sample(wanted[None, None], points[image, None])[0].expand_as(found)
            cross = F.binary_cross_entropy_with_logits(found, wanted, reduction="none").mean(1)
            p = found.sigmoid()
            dice = 1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)
            named = logits[output][image].softmax(-1)[:, truth.classes[n]]
            expected = 4 * cross + 3 * dice - 1.5 * named
            np.testing.assert_allclose(costs[output, image, :, slot], expected, rtol=0, atol=1e-12)


def test_the_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    costs, counts = rng.normal(size=(2, 3, 5, 4)), (4, 0, 2)
    for cost, (queries, masks) in zip(costs, assign(costs, counts, CPU), strict=True):
        assert len(queries) == len(masks) == 6
        assert sorted(masks.tolist()) == [0, 1, 2, 3, 4, 5]
        for image, first, count in ((0, 0, 4), (2, 4, 2)):
            mine = [(q, m - first) for q, m in zip(queries.tolist(), masks.tolist(), strict=True)][first:][:count]
            assert all(0 <= m < count for _, m in mine)
            best = min(
                sum(cost[image][q, m] for m, q in enumerate(chosen))
                for chosen in itertools.permutations(range(5), count)
            )
            assert sum(cost[image][q, m] for q, m in mine) == pytest.approx(best, abs=1e-12)


def test_more_classes_than_queries_leave_the_dearest_without():
    costs = np.asarray([[[[0.0, 5.0, 1.0], [9.0, 4.0, 0.0]]]])
    ((queries, masks),) = assign(costs, (3,), CPU)
    assert (queries.tolist(), masks.tolist()) == ([0, 1], [0, 2])


def test_costs_that_are_not_finite_match_without_an_error():
    ((queries, masks),) = assign(np.asarray([[[[np.nan, -1.0], [np.inf, 2.0]]]]), (2,), CPU)
    assert (queries.tolist(), masks.tolist()) == ([0, 1], [1, 0])


def test_points_are_where_masks_are_least_certain():
    # Logits rise from left to right and are zero in the middle column.
    logits = (torch.arange(41.0) - 20).expand(2, 1, 400, 41)
    torch.manual_seed(0)
    points = uncertain_points(logits, replace(CONFIG, points=400, oversampling=4.0, importance=0.5))
    assert points.shape == (2, 400, 2)
    assert points.min() >= 0
    assert points.max() <= 1
    kept, free = ((part[..., 0] - 0.5).abs() for part in (points[:, :200], points[:, 200:]))
    # 200 of 1600 uniform points are the middle eighth of the width; at the borders maps fade to zero.
    assert (kept < 0.075).double().mean() > 0.98
    assert 0.75 < (free > 0.075).double().mean() < 0.95


def test_the_loss_under_autocast_is_the_same_to_the_last_bit():
    labels = _labels()
    logits, embeddings, features = _outputs()
    single = [x.float() for x in logits], [x.float() for x in embeddings], features.float()
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(mask_loss(*single, labels, CONFIG))
    assert found[0] == found[1]
    halves = [x.bfloat16() for x in logits], [x.bfloat16() for x in embeddings], features.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(term.dtype == torch.float32 for term in mask_loss(*halves, labels, CONFIG).values())


def test_masks_beyond_the_queries_count_in_what_masks_are_divided_by():
    labels = _labels(batch=1)
    logits, embeddings, features = _outputs(batch=1, queries=2, outputs=1)
    count = len(masks_of(labels, 5).classes)
    assert count > 2
    torch.manual_seed(0)
    terms = mask_loss(logits, embeddings, features, labels, replace(CONFIG, mask_weight=0.0, dice_weight=1e9))
    # Matched by overlap alone, each of the two costs less than 1.
    assert 0 < float(terms["dice"]) / 1e9 < 2 / count


def test_pixels_without_a_label_are_background_of_every_class():
    logits, embeddings, features = _outputs(batch=1, classes=2, queries=1, outputs=1)
    labels = torch.zeros(1, 12, 16, dtype=torch.uint8)
    labels[:, :, 8:] = 255
    torch.manual_seed(0)
    terms = mask_loss(logits, embeddings, features, labels, CONFIG)

    mask = torch.einsum("bqc,bchw->bqhw", embeddings[0], features)
    torch.manual_seed(0)
    torch.rand(1, CONFIG.points, 2, dtype=torch.float64)
    points = uncertain_points(mask, CONFIG)
    found, wanted = sample(mask, points)[0, 0], sample((labels == 0).double()[:, None], points)[0, 0]
    assert 0.2 < float(wanted.mean()) < 0.8
    torch.testing.assert_close(terms["mask"], 4 * F.binary_cross_entropy_with_logits(found, wanted))
    p = found.sigmoid()
    dice = 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
    torch.testing.assert_close(terms["dice"], 3 * dice)
    # One query, of class 0: the weight of "no object" does not show.
    torch.testing.assert_close(terms["class"], 1.5 * F.cross_entropy(logits[0][0], torch.tensor([0])))


def test_queries_without_a_class_count_by_their_weight():
    logits, embeddings, features = _outputs(batch=1, classes=2, queries=3, outputs=1)
    labels = torch.ones(1, 12, 16, dtype=torch.uint8)
    config = replace(CONFIG, mask_weight=0.0, dice_weight=0.0)
    terms = mask_loss(logits, embeddings, features, labels, config)
    logs = logits[0][0].log_softmax(-1)
    # By classes alone the query that is surest of class 1 has it.
    matched = int(logs[:, 1].argmax())
    others = -sum(float(logs[q, 2]) for q in range(3) if q != matched)
    assert float(terms["class"]) == pytest.approx(1.5 * (0.3 * others - float(logs[matched, 1])) / 1.6, rel=1e-12)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_images_without_any_label_teach_no_object(whole_batch: bool):
    labels = _labels()
    labels[1:] = 255
    if whole_batch:
        labels[0] = 255
    logits, embeddings, features = _outputs()
    leaves = [x.requires_grad_() for x in (*logits, *embeddings, features)]
    terms = mask_loss(logits, embeddings, features, labels, CONFIG)
    assert (float(terms["mask"].detach()) == 0.0) == whole_batch
    sum(terms.values()).backward()
    for x in leaves[:2]:
        # Every query of the image is pushed to the last class.
        assert (x.grad[1:, :, -1] < 0).all()
        assert (x.grad[1:, :, :-1] > 0).all()
    for x in leaves[2:]:
        assert not x.grad[1:].any()
        assert x.grad[0].any() != whole_batch
