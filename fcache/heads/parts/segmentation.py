"""What every semantic head needs, whatever its form: pixel loss, labels at original size, metric."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fcache.cache_spec import IGNORE, View
from fcache.heads.head import HeadInput, Options
from fcache.heads.metrics import Metric, segmentation_metric
from fcache.heads.parts.conv import resize
from fcache.heads.parts.levels import fine_to_coarse

# Elements of one resized chunk of class maps: 64 MB of float32, whatever the number of classes and the image's size.
CHUNK = 1 << 24


def check_segmentation(inputs: HeadInput, options: Options) -> None:
    """`Head.check` of every semantic head: raises SpecError if a level is no map, or if the classes have no names."""
    fine_to_coarse(inputs)
    inputs.num_classes("semantic")


def pixel_loss(logits: Tensor, labels: Tensor, *, ignore: int, over_valid: bool) -> Tensor:
    """Cross entropy of logits [B, K, h, w], resized to the labels [B, H, W], over pixels not labelled `ignore`.

    The mean is over these pixels, or over all if not `over_valid` (the default of mmsegmentation, which weighs
    pixels of sparsely labelled images less). Without any labelled pixel it is 0.
    """
    labels = labels.long()
    logits = resize(logits.float(), (labels.shape[1], labels.shape[2]))
    total = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
    count = (labels != ignore).sum() if over_valid else torch.tensor(labels.numel(), device=labels.device)
    return total / count.clamp(min=1)


def labels_at_original_size(logits: Tensor, view: View) -> Tensor:
    """The label map uint8 [H, W] of one image from logits [K, h, w] of its canvas.

    Logits are resized to the canvas, cropped to the valid part, resized to the original size, and then compared.
    Classes are resized a few at a time: those of a large image do not fit into memory at once.
    """
    height, width = view.image_size
    step = max(1, CHUNK // max(height * width, view.canvas[0] * view.canvas[1]))
    best = torch.full((height, width), float("-inf"), device=logits.device)
    labels = torch.zeros((height, width), dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), step):
        on_canvas = resize(logits[None, first : first + step].float(), view.canvas)
        chunk = resize(on_canvas[:, :, : view.valid[0], : view.valid[1]], view.image_size)[0]
        value, index = chunk.max(dim=0)
        # Only strictly larger values win, so that of equal classes the first is taken, as argmax does.
        better = value > best
        best = torch.where(better, value, best)
        labels = torch.where(better, (index + first).to(torch.uint8), labels)
    return labels.cpu()


def segmentation_metrics(inputs: HeadInput, options: Options) -> Metric:
    """`Head.metrics` of every semantic head: mIoU at original size, see `segmentation_metric`."""
    return segmentation_metric(inputs.num_classes("semantic"), ignore=IGNORE)
