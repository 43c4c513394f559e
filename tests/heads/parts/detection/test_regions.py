"""Stages of a cascade, one number at a time: what each trains on, how its boxes go on, and what is said in the end."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fcache.cache_spec.testing import plain_view
from fcache.heads import TrainConfig, choose_head, to_batch
from fcache.heads.detections import decode_masks
from fcache.heads.parts.detection import regions as region_parts
from fcache.heads.parts.detection.boxes import Regions
from fcache.heads.parts.detection.detector import Detector
from fcache.heads.parts.detection.masks import MaskBranch, mask_targets
from fcache.heads.parts.detection.merging import encode_masks
from fcache.heads.parts.detection.regions import Pooled
from fcache.heads.parts.detection.targets import Objects, objects_of
from fcache.heads.tasks.detection import CASCADE_OPTIONS, _cascade

CPU = torch.device("cpu")
SMALL = "width=8,box_units=16,candidates=200,100,proposals=30,rois=32,anchor_scales=4,detections=10,mask_convs=1"
SIZE = (128, 128)


def built(form: str, source) -> Detector:
    choice = choose_head(form, source.info, TrainConfig())
    torch.manual_seed(0)
    return choice.head.build(choice.inputs(source.info), choice.options)


def says(
    module: Detector, *, classes: Sequence[Sequence[float]], moves: Sequence[float], masks: Sequence[float]
) -> None:
    """Makes every stage say the same of all regions: its class logits, its delta of x, its mask logit."""
    with torch.no_grad():
        for branch, logits, move in zip(module.regions.boxes, classes, moves, strict=True):
            for layer, bias in ((branch.classify, list(logits)), (branch.regress, [move, 0.0, 0.0, 0.0])):
                layer.weight.zero_()
                layer.bias.copy_(torch.tensor(bias))
        for branch, logit in zip(module.regions.masks, masks, strict=True):
            branch.predict.mask_fcn_logits.weight.zero_()
            branch.predict.mask_fcn_logits.bias.fill_(logit)


def maps_of(module: Detector, batch) -> Pooled:
    return module._pooled(module.pyramid(batch.features))[0]


def test_stages_are_those_of_cascade_rcnn():
    stages = _cascade(CASCADE_OPTIONS).stages
    assert [s.iou for s in stages] == [0.5, 0.6, 0.7]
    assert [s.weight for s in stages] == [1, 0.5, 0.25]
    assert [s.beta for s in stages] == [1, 1, 1]
    assert [s.deltas for s in stages] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]


@pytest.mark.parametrize("form", ["cascade", "htc-without-semantic"])
def test_what_all_stages_say_is_averaged_on_boxes_that_each_moves_by_its_own_measure(form: str, objects):
    source = objects(1, size=SIZE[0])
    module = built(f"{form}:{SMALL},score_threshold=0.2", source)
    classes = [[0, 3, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [2, 0, 0, 0, 0, 0]]
    says(module, classes=classes, moves=[1.0, 1.0, 1.5], masks=[2.0, -1.0, 0.5])
    batch = to_batch(next(iter(source.blocks(0))), CPU)
    with torch.inference_mode():
        (said,) = module.eval().regions.detect(maps_of(module, batch), [torch.tensor([[20.0, 30, 60, 80]])], [SIZE])
    probabilities = torch.tensor(classes).float().softmax(dim=1).mean(dim=0)[1:]
    assert said.labels.tolist() == [0]
    torch.testing.assert_close(said.scores, probabilities[:1])
    # Deltas of x are in tenths, twentieths and thirtieths of the width, 40 pixels.
    torch.testing.assert_close(said.boxes, torch.tensor([[28.0, 30, 68, 80]]))
    mean = torch.tensor([2.0, -1.0, 0.5]).sigmoid().mean()
    torch.testing.assert_close(said.masks, mean.expand(1, 28, 28))


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[Tensor], list[Regions]]]:
    """What `sample` is given and gives in a training step, call by call."""
    calls: list = []
    real = region_parts.sample

    def spy(proposals, truth, *, iou, count):
        drawn = real(proposals, truth, iou=iou, count=count)
        calls.append((iou, list(proposals), drawn))
        return drawn

    monkeypatch.setattr(region_parts, "sample", spy)
    return calls


def step(module: Detector, batch) -> None:
    torch.manual_seed(0)
    module.train().losses(batch.features, [SIZE] * len(batch.ids), objects_of(batch))


def test_every_stage_samples_at_its_own_overlap_what_the_one_before_has_moved(objects, sampled):
    source = objects(2, size=SIZE[0], batch_size=2)
    module = built(f"cascade:{SMALL}", source)
    # Everything moves far to the right: boxes end at the edge of the view.
    says(module, classes=[[0.0] * 6] * 3, moves=[200.0, 0.0, 0.0], masks=[0.0] * 3)
    step(module, to_batch(next(iter(source.blocks(0))), CPU))
    assert [iou for iou, _, _ in sampled] == [0.5, 0.6, 0.7]
    for (_, _, before), (_, proposals, _) in pairwise(sampled):
        # The objects themselves come in anew with every stage, not moved.
        assert [len(p) for p in proposals] == [int((~r.given).sum()) for r in before]
        assert any(r.given.any() for r in before)
        for boxes in proposals:
            assert (boxes >= 0).all()
            assert (boxes <= SIZE[0]).all()
    assert all((boxes[:, 2] == SIZE[1]).all() for boxes in sampled[1][1])


def test_interleaved_masks_are_sampled_at_the_overlap_of_their_stage(objects, sampled):
    source = objects(1, size=SIZE[0], batch_size=1)
    step(built(f"htc-without-semantic:{SMALL}", source), to_batch(next(iter(source.blocks(0))), CPU))
    assert [iou for iou, _, _ in sampled] == [0.5, 0.5, 0.6, 0.6, 0.7, 0.7]


def test_mask_features_that_flow_on_pass_a_rectifier():
    torch.manual_seed(0)
    branch, x = MaskBranch(4, 2, convs=1, normalised=False, flow=True), torch.rand(3, 4, 14, 14)
    with torch.no_grad():
        branch.take_in.weight.zero_()
        branch.take_in.bias.fill_(-1.0)
        assert torch.equal(branch.features(x, x), branch.features(x))
        branch.take_in.bias.fill_(1.0)
        assert torch.equal(branch.features(x, x), branch.features(x + 1))


def test_masks_to_be_learnt_have_their_pixels_centres_at_half_integers():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[:, :10] = True
    (encoded,) = encode_masks([(mask.numpy(), 0, 0)], (40, 40))
    assert decode_masks([encoded], (40, 40))[0].sum() == 400
    objects = Objects(torch.tensor([[0.0, 0, 10, 40]]), torch.tensor([1]), (40, 40), (encoded,))
    # Cells as large as pixels, shifted by 0.3 and by 0.7 of one: each is what most of it is.
    for shift, inside in ((0.3, 10), (0.7, 9)):
        box = torch.tensor([[0.0, 2.0, 28.0, 30.0]]) + shift
        regions = Regions(box, torch.tensor([1]), torch.tensor([0]), torch.tensor([False]))
        wanted = mask_targets(regions, objects, 28)[0]
        assert wanted[5].tolist() == [1.0] * inside + [0.0] * (28 - inside)


def test_what_is_found_lies_in_the_valid_part_of_its_view(objects):
    source = objects(2, size=SIZE[0], batch_size=2)
    choice = choose_head(f"maskrcnn:{SMALL},score_threshold=0", source.info, TrainConfig())
    module = built(f"maskrcnn:{SMALL},score_threshold=0", source).eval()
    # Every box is made twenty times as large, so that it ends where the view does.
    with torch.no_grad():
        module.regions.boxes[0].regress.bias.view(-1, 4)[:, 2:] = 15.0
    batch = to_batch(next(iter(source.blocks(0))), CPU)
    views = tuple(plain_view(SIZE, valid=valid, image_size=valid) for valid in ((90, 128), (128, 70)))
    with torch.inference_mode():
        found = choice.head.outputs(module, replace(batch, views=views), choice.options)
    for said, view in zip(found, views, strict=True):
        height, width = view.valid
        assert said.boxes.max(dim=0).values[2:].tolist() == [width, height]
        assert said.boxes.min() == 0


def test_candidates_are_as_many_as_is_said_in_training_and_at_test_time(objects):
    network = built(f"maskrcnn:{SMALL}", objects(1)).proposals.network
    assert network.train().pre_nms_top_n() == 200
    assert network.eval().pre_nms_top_n() == 100
