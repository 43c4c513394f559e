"""Steps: drawn operations applied to pixels. Every function takes and returns a uint8 tensor [3, H, W]."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as nn
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fcache.cache_spec.view import invert_affine
from fcache.extractor.views.draws import Step
from fcache.extractor.views.frames import Frame

# ImageNet's mean colour and spread: what a warp uncovers and what noise is made of.
_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def show(image: np.ndarray, frame: Frame) -> Tensor:
    """What a frame shows of an image uint8 [H, W, 3]: uint8 [3, *frame.valid]; of a clip [T, H, W, 3] of each picture:
    [T, 3, *frame.valid].
    """
    top, left, height, width = frame.source
    part = np.ascontiguousarray(image[..., top : top + height, left : left + width, :])
    part = torch.from_numpy(part).movedim(-1, -3)
    part = tv.resize(part, list(frame.resized), interpolation=_MODES[frame.interpolation], antialias=True)
    top, left, height, width = frame.window
    part = part[..., top : top + height, left : left + width]
    return (part.flip(-1) if frame.flipped else part).contiguous()


def apply_steps(image: Tensor, steps: Sequence[Step]) -> Tensor:
    """The steps one after the other, uint8 [3, H, W]."""
    for step in steps:
        image = STEPS[step.name](image, *step.values)
    return image


def steps_matrix(steps: Sequence[Step]) -> np.ndarray | None:
    """What the steps together do to points, float64 [2, 3], or None if they move nothing."""
    matrix = np.eye(3)
    warps = [step for step in steps if step.name == "warp"]
    for step in warps:
        matrix = np.vstack([np.reshape(step.values, (2, 3)), [0.0, 0.0, 1.0]]) @ matrix
    return matrix[:2] if warps else None


def _linear(image: Tensor, factor: float, offset: float) -> Tensor:
    return (image.float() * factor + offset).clamp_(0, 255).round_().to(torch.uint8)


def _saturate(image: Tensor, factor: float) -> Tensor:
    """HSV saturation times `factor`, at most 1; hue and value stay."""
    x = image.float()
    value = x.amax(0, keepdim=True)
    spread = value - x.amin(0, keepdim=True)
    # Saturation is spread / value: the factor may not take it above 1.
    factor_here = torch.clamp(value / spread.clamp(min=1.0), max=factor)
    return (value - (value - x) * factor_here).clamp_(0, 255).round_().to(torch.uint8)


def _solarize_add(image: Tensor, amount: float) -> Tensor:
    return torch.where(image < 128, (image.int() + int(amount)).clamp(max=255).to(torch.uint8), image)


def _warp(image: Tensor, *matrix: float) -> Tensor:
    """Bilinear resampling: `matrix` maps old points to new ones; uncovered pixels take the mean colour."""
    _, height, width = image.shape
    back = invert_affine(np.reshape(matrix, (2, 3)))
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    source_x = back[0, 0] * x + back[0, 1] * y + back[0, 2]
    source_y = back[1, 0] * x + back[1, 1] * y + back[1, 2]
    grid = torch.stack([2 * source_x / width - 1, 2 * source_y / height - 1], dim=-1)
    mean = torch.tensor(_MEAN).view(3, 1, 1)
    moved = nn.grid_sample(
        (image.float() - mean)[None], grid.float()[None], mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return (moved[0] + mean).clamp_(0, 255).round_().to(torch.uint8)


def _erase(image: Tensor, top: float, left: float, height: float, width: float, key: float) -> Tensor:
    """Box-Muller noise with ImageNet's mean and spread in a box."""
    y, x, h, w = int(top), int(left), int(height), int(width)
    u = (np.random.Philox(key=int(key)).random_raw(2 * 3 * h * w) >> np.uint64(11)) * 2.0**-53
    u = u.reshape(2, 3, h, w)
    noise = np.sqrt(-2 * np.log1p(-u[0])) * np.cos(2 * np.pi * u[1])
    pixels = noise * np.reshape(_STD, (3, 1, 1)) + np.reshape(_MEAN, (3, 1, 1))
    erased = image.clone()
    erased[:, y : y + h, x : x + w] = torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    return erased


STEPS: dict[str, Callable[..., Tensor]] = {
    "add": lambda image, offset: _linear(image, 1.0, offset),
    "multiply": lambda image, factor: _linear(image, factor, 0.0),
    "saturate": _saturate,
    "turn-hue": tv.adjust_hue,
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "colour": tv.adjust_saturation,
    "sharpness": tv.adjust_sharpness,
    "auto-contrast": tv.autocontrast,
    "equalize": tv.equalize,
    "invert": tv.invert,
    # All 8 bits may go.
    "posterize": lambda image, bits: image & (256 - 2 ** (8 - int(bits))),
    "solarize": lambda image, threshold: tv.solarize(image, threshold) if threshold < 256 else image,
    "solarize-add": _solarize_add,
    "warp": _warp,
    "erase": _erase,
}
