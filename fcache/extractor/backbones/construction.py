"""A model with its weights for every canvas: built without memory, filled with shared tensors."""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fcache.cache_spec import SpecError
from fcache.extractor.backbones.architecture import Architecture, Size, build
from fcache.extractor.backbones.attention import prepare_attention
from fcache.extractor.backbones.products import has_bf16_products, round_products
from fcache.extractor.backbones.weights import State, adapt

# Constructions kept at once. They share their weights; each has its own shift masks and position tables.
_KEPT_SIZES = 8


def skeleton(architecture: Architecture, size: Size) -> nn.Module:
    """The model for inputs of `size` without memory, on torch's meta device. Raises SpecError if there is none."""
    try:
        with torch.device("meta"):
            return build(architecture, size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SpecError(f"{architecture.family} cannot be built for {size[0]}x{size[1]}: {error}") from error


def placed(
    architecture: Architecture, state: dict[str, Tensor], device: torch.device, precision: str
) -> dict[str, Tensor]:
    """`state` on a device, in the types that a forward in `precision` reads: taken out of `state`, which ends empty."""
    found: dict[str, Tensor] = {}
    for name in list(state):
        tensor = state.pop(name)
        if precision == "bf16" and name in architecture.products:
            rounded = tensor.to(torch.bfloat16)
            # Without bf16 products they would be converted to float32 again in every forward.
            tensor = rounded if has_bf16_products(device) or tensor.dtype == torch.bfloat16 else rounded.float()
        found[name] = tensor.to(device)
    return found


def constructor(architecture: Architecture, state: State, precision: str) -> Callable[[Size], nn.Module]:
    """The model for a canvas; all canvases share the tensors of `state`, apart from resampled position tables."""

    @functools.lru_cache(maxsize=_KEPT_SIZES)
    def construct(size: Size) -> nn.Module:
        model = skeleton(architecture, size)
        device = next(iter(state.values())).device
        # A caller's autocast must not reach the tables that are computed here and kept.
        with torch.no_grad(), exact_arithmetic(), torch.autocast(device.type, enabled=False):
            fitted = adapt(state, model, architecture) if architecture.per_size else state
            model.load_state_dict(fitted, strict=True, assign=True)
            if architecture.products:
                prepare_attention(model, precision)
                if precision == "bf16" and not has_bf16_products(device):
                    round_products(model)
            _fill_buffers(model, device)
        return model.requires_grad_(False)

    return construct if architecture.per_size else lambda size: construct(architecture.native_size)


def _fill_buffers(model: nn.Module, device: torch.device) -> None:
    """Real values for the buffers that no state dict holds: shift masks, position indices, rotary tables."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.full_like(buffer, _blank(buffer.dtype), device=device))
    for module in model.modules():
        compute: Any = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()


def _blank(dtype: torch.dtype) -> float | int:
    """A value that shows where a module forgot to compute a buffer: not a number, or an index out of range."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


@contextmanager
def exact_arithmetic() -> Generator[None, None, None]:
    """No reduced-precision float32 products and no choice of kernels by timing, whatever the process has set."""
    backends: Any = torch.backends
    wanted = (
        (backends.cuda.matmul, "fp32_precision", "ieee"),
        (backends.cudnn.conv, "fp32_precision", "ieee"),
        (backends.mkldnn.matmul, "fp32_precision", "ieee"),
        (backends.mkldnn.conv, "fp32_precision", "ieee"),
        (backends.cudnn, "benchmark", False),
        (backends.cudnn, "deterministic", True),
    )
    before = [getattr(owner, name) for owner, name, _ in wanted]
    for owner, name, value in wanted:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(wanted, before, strict=True):
            setattr(owner, name, value)
