"""The objects of a view, as the losses of detectors read them from a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fcache.cache_spec.targets import unpack_masks
from fcache.heads.batches import Batch
from fcache.heads.detections import decode_masks


@dataclass(frozen=True)
class Objects:
    """The objects of one view that are learnt from, on the heads' device; crowds are not among them.

    `boxes` float32 [n, 4] in pixels of the canvas, `labels` int64 [n] from 1 on (0 is the background). Masks are
    decoded when they are asked for, and kept.
    """

    boxes: Tensor
    labels: Tensor
    canvas: tuple[int, int]
    encoded: tuple[bytes, ...]
    decoded: dict[int, Tensor] = field(default_factory=dict)

    def masks(self, indices: Sequence[int]) -> list[Tensor]:
        """The masks of some objects, uint8 [H, W] of the canvas each."""
        new = [i for i in dict.fromkeys(indices) if i not in self.decoded]
        if new:
            masks = decode_masks([self.encoded[i] for i in new], self.canvas)
            stacked = torch.from_numpy(masks).to(self.boxes.device)
            self.decoded.update(zip(new, stacked.unbind(), strict=True))
        return [self.decoded[i] for i in indices]


def objects_of(batch: Batch) -> list[Objects]:
    """The objects of every view of a batch that has `instances`; boxes without extent are left out as well."""
    found: list[Objects] = []
    for i, view in enumerate(batch.views):
        boxes, labels = batch.targets["instances/boxes"][i], batch.targets["instances/labels"][i]
        crowd = batch.targets["instances/crowd"][i]
        kept = ((boxes[:, 2:] > boxes[:, :2]).all(dim=1) & (crowd == 0)).nonzero()[:, 0]
        rle, ends = (batch.targets[f"instances/{name}"][i].cpu().numpy() for name in ("rle", "rle_ends"))
        encoded = unpack_masks(rle, ends)
        found.append(
            Objects(
                boxes=boxes[kept].float(),
                labels=labels[kept].long() + 1,
                canvas=view.canvas,
                encoded=tuple(encoded[k] for k in kept.tolist()),
            )
        )
    return found
