"""A frozen backbone: images in, a feature pyramid out, for any timm model with intermediate features."""

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fcache.cache_spec import BackboneSpec, LevelSpec, SpecError, to_json
from fcache.cache_spec.spec import PRECISIONS
from fcache.extractor.backbones.architecture import (
    Architecture,
    Size,
    Tap,
    build,
    choose_taps,
    every_tap,
    find_architecture,
    level_specs,
    run_taps,
)
from fcache.extractor.backbones.local import PAD_MODE as LOCAL_PAD_MODE
from fcache.extractor.backbones.local import quarter_blocks
from fcache.extractor.backbones.weights import State, Weights, adapt, load_weights
from fcache.extractor.backbones.windows import PAD_MODE, windows_in_use

# Constructions kept at once. They share their weights; each has its own shift masks and position tables.
_KEPT_SIZES = 8


@dataclass(frozen=True)
class Backbone:
    """A frozen backbone on a device.

    `levels_at(canvas)` gives the levels with their true sizes for inputs of `canvas` (height, width), whose sides are
    multiples of `size_multiple` (the model's native size is taken too); it runs no real forward, and no more does
    `offered_at(canvas)`: the levels that the model could give. `forward(images)`
    takes normalised RGB images, float32 [B, 3, H, W] on `device`, and returns float32 [B, C, h, w] by level name: raw
    stage maps without final norm and prefix tokens, or the mean of one, [B, C]; contiguous, free of gradients. Both
    raise SpecError for a size that the model cannot take.
    `random_weights` is "random:SEED" for weights that were never trained, else None.
    """

    spec: BackboneSpec
    random_weights: str | None
    size_multiple: int
    device: torch.device
    levels_at: Callable[[Size], tuple[LevelSpec, ...]]
    offered_at: Callable[[Size], tuple[LevelSpec, ...]]
    forward: Callable[[Tensor], dict[str, Tensor]]


def load_backbone(
    model: str,
    *,
    weights: str,
    input_size: Size,
    precision: str = "bf16",
    levels: Sequence[str] | None = None,
    window: int | Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """The backbone of a short name (`SHORT_NAMES`) or of any timm name, with its weights on `device`.

    `weights` is a file (.safetensors, .pth, .pt, .bin), "pretrained" (timm's hub) or "random:SEED". `input_size`
    (height, width) is the usual input; the windows in use there are part of the identity, other canvases are served
    too. `precision` "bf16" computes under autocast, "fp32" strictly (no TF32). `levels` names strides ("4"), blocks
    ("block-5"), "last" or "pooled" (see `choose_taps`); None takes strides 4 to 32, or four evenly spaced blocks of a
    plain ViT. `window` replaces the window sizes, in tokens (one, or one a stage), or gives a plain ViT windows in all
    but four blocks; None keeps the architecture's at every input size.

    Raises SpecError for an unknown model, level, precision or form of weights and for a size that does not fit,
    DataError for weights that cannot be read or that belong to another architecture.
    """
    if precision not in PRECISIONS:
        raise SpecError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
    device = torch.device(device)
    architecture = find_architecture(model, window if window is None or isinstance(window, int) else tuple(window))
    taps = choose_taps(architecture, levels)
    levels_at = _level_reader(architecture, taps)
    usual = levels_at(input_size)
    loaded = load_weights(architecture, weights)
    state = {name: tensor.to(device) for name, tensor in loaded.state.items()}
    construct = _constructor(architecture, state)

    def forward(images: Tensor) -> dict[str, Tensor]:
        canvas = (int(images.shape[-2]), int(images.shape[-1]))
        levels_at(canvas)
        network = construct(canvas)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), _exact_arithmetic(), autocast:
            maps = run_taps(network, images, taps)
        # Copied outside inference mode, so that a head may train on them.
        return {name: x.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for name, x in maps.items()}

    windows = windows_in_use(construct((int(input_size[0]), int(input_size[1]))))
    return Backbone(
        spec=_spec(architecture, loaded, windows, precision, usual),
        random_weights=loaded.random,
        size_multiple=architecture.size_multiple,
        device=device,
        levels_at=levels_at,
        offered_at=_level_reader(architecture, every_tap(architecture)),
        forward=forward,
    )


def _level_reader(architecture: Architecture, taps: tuple[Tap, ...]) -> Callable[[Size], tuple[LevelSpec, ...]]:
    skeleton = functools.lru_cache(maxsize=1)(functools.partial(_skeleton, architecture))

    @functools.cache
    def read(height: int, width: int) -> tuple[LevelSpec, ...]:
        multiple = architecture.size_multiple
        fits = height > 0 and width > 0 and not height % multiple and not width % multiple
        if not fits and (height, width) != architecture.native_size:
            near = [max(multiple, round(n / multiple) * multiple) for n in (height, width)]
            raise SpecError(
                f"{architecture.family} takes input sides that are multiples of {multiple}, got {height}x{width};"
                f" the nearest is {near[0]}x{near[1]}"
            )
        size = (height, width) if architecture.per_size else architecture.native_size
        return level_specs(skeleton(size), (height, width), taps)

    return lambda canvas: read(int(canvas[0]), int(canvas[1]))


def _skeleton(architecture: Architecture, size: Size) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(architecture, size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SpecError(f"{architecture.family} cannot be built for {size[0]}x{size[1]}: {error}") from error


def _constructor(architecture: Architecture, state: State) -> Callable[[Size], nn.Module]:
    """The model for a canvas; all canvases share the tensors of `state`, apart from resampled position tables."""

    @functools.lru_cache(maxsize=_KEPT_SIZES)
    def construct(size: Size) -> nn.Module:
        model = _skeleton(architecture, size)
        device = next(iter(state.values())).device
        # A caller's autocast must not reach the tables that are computed here and kept.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            fitted = adapt(state, model, architecture) if architecture.per_size else state
            model.load_state_dict(fitted, strict=True, assign=True)
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
def _exact_arithmetic() -> Generator[None, None, None]:
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


def _spec(
    architecture: Architecture,
    weights: Weights,
    windows: Sequence[dict[str, list[int]]],
    precision: str,
    levels: tuple[LevelSpec, ...],
) -> BackboneSpec:
    arguments: dict[str, Any] = {
        "creation": {k: v for k, v in architecture.creation.items() if k != "drop_path_rate"},
        "interpolation": architecture.data["interpolation"],
        "norm": "none",
    }
    if architecture.windowed:
        arguments["windows"] = windows
        arguments["pad_mode"] = PAD_MODE
    if architecture.plain:
        arguments["prefix_tokens"] = "dropped"
        if architecture.local_window is not None:
            arguments["prefix_tokens"] = "dropped before the blocks"
            arguments["local_window"] = architecture.local_window
            arguments["global_blocks"] = quarter_blocks(len(architecture.taps))
            arguments["pad_mode"] = LOCAL_PAD_MODE
        arguments["position_embedding"] = "resampled to the canvas"
    return BackboneSpec(
        name=architecture.family,
        arguments=to_json(arguments),
        weights_sha256=weights.sha256,
        mean=tuple(float(n) for n in architecture.data["mean"]),
        std=tuple(float(n) for n in architecture.data["std"]),
        precision=precision,
        levels=tuple(level.free() for level in levels),
    )
