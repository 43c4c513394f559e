"""From decoded views to features: padding, normalisation, the backbone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fcache.extractor.backbones import Backbone
from fcache.extractor.transfer import to_device


def normalised(images: Sequence[Tensor], canvas: tuple[int, int], backbone: Backbone) -> Tensor:
    """uint8 views [3, h, w] as one float32 batch [B, 3, H, W] on the backbone's device.

    Pixels are scaled to 0..1 and normalised, then padded with zeros at the bottom and right to the canvas.
    """
    device = torch.device(backbone.device)
    mean = torch.tensor(backbone.spec.mean, device=device).view(3, 1, 1)
    std = torch.tensor(backbone.spec.std, device=device).view(3, 1, 1)
    batch = torch.zeros(len(images), 3, *canvas, device=device)
    for out, image in zip(batch, images, strict=True):
        pixels = to_device(image, device).float() / 255.0
        h, w = image.shape[-2:]
        out[:, :h, :w] = (pixels - mean) / std
    return batch


def features_of(images: Sequence[Tensor], canvas: tuple[int, int], backbone: Backbone) -> dict[str, Tensor]:
    """The feature pyramid of uint8 views [3, h, w]: level name -> float32 [B, C, H, W] on the device."""
    return backbone.forward(normalised(images, canvas, backbone))
