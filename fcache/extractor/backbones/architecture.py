"""A timm model as an architecture: how to build it for an input size, and which of its maps are levels."""

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.mvitv2 import MultiScaleVit
from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError, unknown_name
from fcache.extractor.backbones.local import attend_locally, quarter_blocks, takes_local_windows
from fcache.extractor.backbones.windows import correct_windows, pretrained_windows

SHORT_NAMES: Mapping[str, str] = {
    "swinv2-t": "swinv2_tiny_window8_256.ms_in1k",
    "swinv2-s": "swinv2_small_window8_256.ms_in1k",
    "swinv2-b": "swinv2_base_window12_192.ms_in22k",
    "swinv2-l": "swinv2_large_window12_192.ms_in22k",
    "vit-b-det": "vit_base_patch16_224.mae",
    "vit-l-det": "vit_large_patch16_224.mae",
}
# The ViT detection paper's windows.
_SHORT_WINDOWS: Mapping[str, int] = {"vit-b-det": 14, "vit-l-det": 14}
LAST, POOLED = "last", "pooled"
_PYRAMID_STRIDES = (4, 8, 16, 32)

Size = tuple[int, int]
Window = int | Sequence[int]


@dataclass(frozen=True)
class Tap:
    """One map that a model can give: its level name, its index in timm's `forward_intermediates` and its stride; or
    the mean of that map over its height and width.
    """

    name: str
    index: int
    stride: int
    pooled: bool = False


@dataclass(frozen=True)
class Architecture:
    """A timm model without weights.

    `name` is timm's name with its tag if one was given, `creation` holds the construction arguments that are the same
    for every input size. With `per_size` the model is built anew for each input size (an argument `img_size`),
    otherwise one construction, at the native size, serves all. `unused` are the parameters of the full model that no
    feature depends on: final norms and heads. `taps` are in the order of computation; `plain` means that all have the
    same stride. `data` is timm's preprocessing (mean, std, interpolation, input_size). With `local_window` a plain ViT
    attends within windows of so many tokens a side, in all but four blocks.
    """

    name: str
    creation: Mapping[str, Any]
    per_size: bool
    native_size: Size
    windowed: bool
    unused: frozenset[str]
    taps: tuple[Tap, ...]
    plain: bool
    data: Mapping[str, Any]
    local_window: int | None = None

    @property
    def family(self) -> str:
        """timm's name without the tag."""
        return self.name.split(".")[0]

    @property
    def size_multiple(self) -> int:
        """Input sides are multiples of this number of pixels: 32 where every stride divides it."""
        largest = max(tap.stride for tap in self.taps)
        if all(32 % tap.stride == 0 for tap in self.taps):
            return 32
        return math.lcm(32, largest) if largest % 32 == 0 else 2 * largest


def build(architecture: Architecture, size: Size | None) -> nn.Module:
    """The model for inputs of `size` (height, width; None: its native size), on torch's default device.

    It is in evaluation mode, frozen, without final norm and head, and its windows pad before they roll.
    """
    arguments = dict(architecture.creation)
    if architecture.per_size and size is not None:
        arguments["img_size"] = size
    return _build(architecture.name, arguments, architecture.local_window)


def _build(name: str, arguments: Mapping[str, Any], local_window: int | None) -> nn.Module:
    model: Any = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    correct_windows(model)
    if local_window is not None:
        attend_locally(model, local_window)
    model.prune_intermediate_layers(list(range(len(model.feature_info))), prune_norm=True, prune_head=True)
    return model.eval().requires_grad_(False)


def run_taps(model: nn.Module, images: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
    """The raw maps of `taps` (in the order of computation) for images [B, 3, H, W]: no final norm, no prefix tokens.

    Pooled ones are [B, C], means in float32.
    """
    network: Any = model
    indices = list(dict.fromkeys(tap.index for tap in taps))
    maps = network.forward_intermediates(
        images,
        indices=indices,
        norm=False,
        stop_early=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    found = dict(zip(indices, maps, strict=True))
    return {tap.name: found[tap.index].float().mean((2, 3)) if tap.pooled else found[tap.index] for tap in taps}


def level_specs(model: nn.Module, size: Size, taps: Sequence[Tap]) -> tuple[LevelSpec, ...]:
    """The levels of `taps` with their true sizes, read from a forward of `model` on torch's meta device.

    Raises SpecError if the model cannot take inputs of `size`.
    """
    try:
        with torch.no_grad():
            maps = run_taps(model, torch.zeros(1, 3, *size, device="meta"), taps)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise SpecError(
            f"this model does not take inputs of {size[0]}x{size[1]}: {error}; choose another input size or model"
        ) from error
    return tuple(
        LevelSpec(tap.name, "C" if tap.pooled else "C H W", tuple(maps[tap.name].shape[1:]), tap.stride) for tap in taps
    )


def every_tap(architecture: Architecture) -> tuple[Tap, ...]:
    """All maps in the order of computation, and the mean of the last one."""
    return (*architecture.taps, replace(architecture.taps[-1], name=POOLED, pooled=True))


def choose_taps(architecture: Architecture, levels: Sequence[str] | None) -> tuple[Tap, ...]:
    """The taps named by `levels`: strides ("4"), level names ("level-4") or blocks ("block-5", from 0); "last" is the
    last map, "pooled" the mean of that one over its height and width.

    None means strides 4 to 32 of a pyramid, or the blocks at a quarter, half, three quarters and the end of a plain
    model (the ViT detection paper's four taps). Raises SpecError if a level does not exist.
    """
    last, taps = architecture.taps[-1], {tap.name: tap for tap in every_tap(architecture)}
    if levels is None:
        if architecture.plain:
            return tuple(architecture.taps[i] for i in quarter_blocks(len(architecture.taps)))
        found = tuple(tap for tap in architecture.taps if tap.stride in _PYRAMID_STRIDES)
        return found or architecture.taps
    if not levels:
        raise SpecError(f"levels names at least one of {', '.join(taps)}")
    chosen = set()
    for level in levels:
        name = f"level-{level}" if level.isdecimal() else last.name if level == LAST else level
        if name not in taps:
            raise SpecError(f"{architecture.family} has no level {level!r}; it has {', '.join(taps)}")
        chosen.add(name)
    return tuple(tap for tap in taps.values() if tap.name in chosen)


@functools.lru_cache(maxsize=16)
def find_architecture(model: str, window: int | tuple[int, ...] | None = None) -> Architecture:
    """The architecture of a short name (`SHORT_NAMES`) or a timm name, with or without a tag.

    `window` replaces the windows of a windowed transformer: one size in tokens, or one a stage. For a plain ViT it is
    the window of all blocks but four (see `local`). Raises SpecError for
    an unknown name (with the nearest ones), for a model without intermediate features and for a window that does not
    fit.
    """
    name = _timm_name(model)
    window = _SHORT_WINDOWS.get(model) if window is None else window
    with torch.device("meta"):
        full: Any = timm.create_model(name, pretrained=False)
    if not hasattr(full, "forward_intermediates") or not hasattr(full, "prune_intermediate_layers"):
        raise SpecError(f"{model} gives no intermediate features in timm {timm.__version__}; choose another model")
    parameters = inspect.signature(type(full).__init__).parameters
    creation: dict[str, Any] = {}
    if "drop_path_rate" in parameters:
        creation["drop_path_rate"] = 0.0
    # Swin takes dynamic_img_size too, but keeps the windows and shifts of the size it was built for.
    dynamic = "dynamic_img_size" in parameters and "window_size" not in parameters
    if dynamic:
        creation["dynamic_img_size"] = True
    local = window if isinstance(window, int) and dynamic and takes_local_windows(full) else None
    if local is None:
        creation |= _window_arguments(full, model, parameters, window)
    elif local < 1:
        raise SpecError(f"a window is one positive size; got {window}")
    with torch.device("meta"):
        used = _build(name, creation, local)
    data = resolve_model_data_config(full)
    native = tuple(data["input_size"][-2:])
    taps, plain = _find_taps(used, native)
    architecture = Architecture(
        name=name,
        creation=creation,
        per_size=False,
        native_size=native,
        windowed=bool(getattr(full, "_ref_window_sizes", ())),
        unused=frozenset(set(full.state_dict()) - set(used.state_dict())),
        taps=taps,
        plain=plain,
        data=data,
        local_window=local,
    )
    fixed = "img_size" in parameters and not dynamic and not _takes_other_sizes(used, architecture)
    return replace(architecture, per_size=fixed)


def _takes_other_sizes(model: nn.Module, architecture: Architecture) -> bool:
    """Whether the model of the native size takes a larger input as it is, by convolution or resampled positions."""
    if isinstance(model, MultiScaleVit):
        # It would read past the end of its tables of relative positions, which shapes alone do not show.
        return False
    step = architecture.size_multiple
    height, width = (n - n % step + step * k for n, k in zip(architecture.native_size, (1, 2), strict=True))
    try:
        level_specs(model, (height, width), architecture.taps)
    except SpecError:
        return False
    return True


def _timm_name(model: str) -> str:
    name = SHORT_NAMES.get(model, model)
    family, _, tag = name.partition(".")
    known = timm.list_models()
    if family not in known:
        raise unknown_name("model", model, [*SHORT_NAMES, *known])
    tagged = timm.list_models(f"{family}.*", pretrained=True)
    if tag and name not in tagged:
        raise unknown_name("model", model, tagged or known)
    return name


def _window_arguments(
    full: Any, model: str, parameters: Mapping[str, Any], window: int | tuple[int, ...] | None
) -> dict[str, Any]:
    # timm keeps the constructor's windows, before any is clamped to its map, under this name in its three Swins.
    nominal = getattr(full, "_ref_window_sizes", None)
    if window is not None:
        sizes = (window,) if isinstance(window, int) else tuple(window)
        if "window_size" not in parameters:
            raise SpecError(f"{model} has no windows to change; leave the window out")
        if any(n < 1 for n in sizes) or (len(sizes) > 1 and len(sizes) != len(full.feature_info)):
            raise SpecError(
                f"a window is one positive size, or one for each of {len(full.feature_info)} stages; got {window}"
            )
        if nominal is None:
            return {"window_size": sizes[0] if len(sizes) == 1 else sizes}
        sizes = sizes * len(nominal) if len(sizes) == 1 else sizes
        windows = tuple((n, n) for n in sizes)
    elif nominal is None:
        return {}
    else:
        windows = tuple((int(h), int(w)) for h, w in nominal)
    # Stated even where it is the default: swinv2_cr would otherwise let its windows grow with the input.
    arguments: dict[str, Any] = {"window_size": windows}
    if "pretrained_window_sizes" in parameters:
        arguments["pretrained_window_sizes"] = pretrained_windows(full)
    return arguments


def _find_taps(model: Any, native: Size) -> tuple[tuple[Tap, ...], bool]:
    info = model.feature_info
    stated = [int(f["reduction"]) for f in info]
    if len(set(stated)) == 1:
        return tuple(Tap(f"block-{i}", i, stated[0]) for i in range(len(info))), True
    specs = level_specs(model, native, [Tap(str(i), i, s) for i, s in enumerate(stated)])
    by_stride: dict[int, Tap] = {}
    for i, (spec, stride) in enumerate(zip(specs, stated, strict=True)):
        measured = native[0] / spec.shape[1]
        # A few of timm's tables are wrong (tresnet says 2 for its maps of stride 4): the map itself decides.
        if not 0.7 < measured / stride < 1.4:
            stride = 2 ** round(math.log2(measured))
        by_stride[stride] = Tap(f"level-{stride}", i, stride)
    return tuple(by_stride.values()), False
