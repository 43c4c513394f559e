"""With the same weights the detector is torchvision's Mask R-CNN."""

from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from fcache.heads import TrainConfig, choose_head, to_batch
from fcache.heads.parts.detection import masks
from fcache.heads.parts.detection.fpn import FPN
from fcache.heads.parts.detection.targets import objects_of

CPU = torch.device("cpu")
SIZE, NUM_CLASSES, WIDTH = 128, 5, 256


class Features(nn.Module):
    """A "backbone" that has computed its maps before."""

    out_channels = WIDTH

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(channels, WIDTH, extra_blocks=LastLevelMaxPool())
        self.maps: OrderedDict = OrderedDict()

    def forward(self, images: torch.Tensor) -> OrderedDict:
        return self.fpn(self.maps)


class TheirPooler(nn.Module):
    """torchvision's pooler in the form of ours."""

    def forward(self, maps, boxes, size):
        names = [str(i) for i in range(len(maps))]
        pooler = MultiScaleRoIAlign(names, size, sampling_ratio=2)
        return pooler(dict(zip(names, maps, strict=True)), list(boxes), [(SIZE, SIZE)])


@pytest.fixture
def both(objects):
    """Our head with their pooler, torchvision's model with the same weights, and a batch."""
    source = objects(2, size=SIZE, strides=(4, 8, 16, 32), batch_size=2)
    choice = choose_head("maskrcnn:proposals=60,detections=12", source.info, TrainConfig())
    torch.manual_seed(1)
    ours = choice.head.build(choice.inputs(source.info), choice.options)
    # So that there are detections, of many scores and sizes.
    nn.init.normal_(ours.regions.boxes[0].classify.weight, std=0.3)
    nn.init.normal_(ours.regions.boxes[0].regress.weight, std=0.1)
    ours.regions.pooler = TheirPooler()
    batch = to_batch(next(iter(source.blocks(0))), CPU)
    features = Features([x.shape[1] for x in batch.features.values()])
    features.maps = OrderedDict((str(i), x) for i, x in enumerate(batch.features.values()))
    theirs = MaskRCNN(
        features,
        num_classes=NUM_CLASSES + 1,
        min_size=SIZE,
        max_size=SIZE,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        rpn_pre_nms_top_n_test=1000,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=60,
        box_detections_per_img=12,
    )
    with torch.no_grad():
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            yours.copy_(mine)
    return ours, theirs, batch, choice.options


IMAGES = [torch.zeros(3, SIZE, SIZE)] * 2


def test_detections_are_equal(both):
    ours, theirs, batch, _ = both
    with torch.inference_mode():
        found = ours.eval()(batch.features, [(SIZE, SIZE)] * 2)
        for mine, yours in zip(found, theirs.eval()(IMAGES), strict=True):
            assert len(mine.scores) == 12
            assert torch.equal(mine.boxes, yours["boxes"])
            assert torch.equal(mine.scores, yours["scores"])
            assert torch.equal(mine.labels + 1, yours["labels"])
            # Theirs are pasted into the image already.
            size = (SIZE, SIZE)
            assert torch.equal(paste_masks_in_image(mine.masks[:, None], mine.boxes, size), yours["masks"])


def test_losses_are_equal(both, monkeypatch):
    ours, theirs, batch, _ = both
    monkeypatch.setattr(masks, "mask_targets", partial(masks.resampled_masks, aligned=False))
    truth = objects_of(batch)
    targets = [
        {"boxes": o.boxes, "labels": o.labels, "masks": torch.stack(o.masks(range(len(o.labels))))} for o in truth
    ]
    # Its transform draws a size first.
    theirs.rpn.register_forward_pre_hook(lambda *_: torch.manual_seed(5) and None)
    torch.manual_seed(5)
    mine = ours.train().losses(batch.features, [(SIZE, SIZE)] * 2, truth)
    yours = theirs.train()(IMAGES, targets)
    names = {
        "objectness": "loss_objectness",
        "proposals": "loss_rpn_box_reg",
        "classes": "loss_classifier",
        "boxes": "loss_box_reg",
        "masks": "loss_mask",
    }
    assert set(mine) == set(names)
    for name, their_name in names.items():
        assert float(mine[name].detach()) > 0
        assert float(mine[name].detach()) == float(yours[their_name].detach()), name


def test_the_pyramid_is_theirs():
    channels = [8, 12, 16]
    theirs = FeaturePyramidNetwork(channels, 16, extra_blocks=LastLevelMaxPool())
    ours = FPN(channels, 16, extra_levels=1)
    with torch.no_grad():
        for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
            yours.copy_(mine)
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, [(20, 28), (10, 14), (5, 7)], strict=True)]
    expected = theirs(OrderedDict(zip("abc", maps, strict=True))).values()
    for found, wanted in zip(ours(maps), expected, strict=True):
        assert torch.equal(found, wanted)
