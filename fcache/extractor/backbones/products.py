"""bfloat16 products on a CPU that has none: the same rounded factors, multiplied in float32.

torch multiplies bfloat16 matrices on such a CPU several times more slowly than float32 ones, and sums them in float32
too. So nothing but the order of sums differs from the products of a machine that has them, and the speed.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Rows multiplied at once: what is converted for them stays small beside the weights of a giant model.
_ROWS = 16384


def has_bf16_products(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices by itself."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def round_products(model: nn.Module) -> None:
    """Make every linear layer of `model`, and its patch embedding, multiply rounded factors in float32."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_linear, module)
        elif type(module) is nn.Conv2d:
            module.forward = MethodType(_convolution, module)


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., in], rounded to bfloat16, by `weight` [out, in], which is, plus `bias`, summed in float32; as `dtype`."""
    rows = x.reshape(-1, x.shape[-1])
    result = rows.new_empty((len(rows), len(weight)), dtype=dtype)
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = weight.float(), None if bias is None else _rounded(bias)
        for part, into in zip(rows.split(_ROWS), result.split(_ROWS), strict=True):
            into.copy_(F.linear(_rounded(part), weight, bias))
    return result.view(*x.shape[:-1], len(weight))


def _linear(module: Any, x: Tensor) -> Tensor:
    return rounded_linear(x, module.weight, module.bias, torch.bfloat16)


def _convolution(module: Any, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = _rounded(module.weight), None if module.bias is None else _rounded(module.bias)
        return module._conv_forward(_rounded(x), weight, bias).to(torch.bfloat16)


def _rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()
