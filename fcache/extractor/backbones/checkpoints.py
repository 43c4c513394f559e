"""Key formats of published checkpoints, and what each holds beside an encoder.

Every dropped key is named by a rule here; what no rule names stays, and a strict load then refuses it.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
from torch import Tensor, nn

State = dict[str, Any]

# Tried in this order: EsViT holds a student and its teacher, and publishes the teacher's results.
_WRAPPERS = ("model", "state_dict", "module", "teacher", "student")
# Classifiers, projection heads and final norms by the first part of a key: no raw stage map depends on them.
_HEADS = frozenset(
    ("head", "head_dist", "head_dense", "fc", "classifier", "last_linear", "pre_logits", "norm", "fc_norm")
)
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_SHARED_INDEX = "rel_pos_bias.relative_position_index"


def unwrap(checkpoint: Mapping[str, Any], expected: Iterable[str]) -> State | None:
    """The encoder's named tensors in `checkpoint`, for a model with the keys `expected`; None if there are none.

    Knows plain timm and DeiT files, Microsoft's Swin and SwinV2 (`model`), SimMIM (`encoder.`), EsViT (`teacher`,
    `student`), MoCo v3 (`module.base_encoder.`), MAE (decoder beside the encoder), self-supervised BEiT (one table of
    relative positions for all blocks) and DeepSpeed (`module`).
    """
    inner: Any = checkpoint
    while isinstance(inner, Mapping):
        nested = [inner[key] for key in _WRAPPERS if isinstance(inner.get(key), Mapping)]
        if not nested:
            break
        inner = nested[0]
    if not isinstance(inner, Mapping) or not any(isinstance(value, Tensor) for value in inner.values()):
        return None
    state, expected = dict(inner), frozenset(expected)
    if _any(state, "module.base_encoder."):  # MoCo v3
        state = _strip(_drop(state, "module.momentum_encoder.", "module.predictor."), "module.base_encoder.")
    if state and all(key.startswith("module.") for key in state):  # saved from DistributedDataParallel
        state = _strip(state, "module.")
    if _any(state, "backbone.") and not _any(expected, "backbone."):  # EsViT
        state = _strip(_drop(state, "head.", "head_dense."), "backbone.")
    if _any(state, "encoder.") and not _any(expected, "encoder."):  # SimMIM
        state = _strip(_drop(state, "decoder.", "encoder.mask_token"), "encoder.")
    if _any(state, "decoder_"):  # MAE; its mask_token would pass for a DINOv2 file's
        state = _drop(state, "decoder_", "mask_token")
    if _any(state, "lm_head."):  # BEiT
        state = _drop(state, "lm_head.", "mask_token")
    if _SHARED_TABLE in state and _SHARED_TABLE not in expected:
        tables = [key for key in expected if re.fullmatch(r"blocks\.\d+\.attn\.relative_position_bias_table", key)]
        table = state.pop(_SHARED_TABLE)
        state.pop(_SHARED_INDEX, None)
        state |= dict.fromkeys(tables, table) if tables else {_SHARED_TABLE: table}
    return state


def convert(state: Mapping[str, Any], model: nn.Module) -> State:
    """`state` through timm's own converter for the family of `model`; unchanged for a family that has none.

    It renames what the original release named otherwise and resamples tables of positions to the size of `model`.
    """
    converter = _converter(model)
    if converter is None:
        return dict(state)
    # deit3 keeps its layer scales in modules; on other families the option finds nothing to rename.
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in inspect.signature(converter).parameters else {}
    arguments = (dict(state), model)[: len(inspect.signature(converter).parameters)]
    with warnings.catch_warnings():
        # torch warns about how timm's resampling of position tables indexes; a test guards its result.
        warnings.simplefilter("ignore", UserWarning)
        return dict(converter(*arguments, **options))


def drop_unused(state: Mapping[str, Any], expected: Iterable[str], unused: frozenset[str]) -> State:
    """`state` without heads and final norms: the keys in `unused` and those of heads, unless they are `expected`."""
    keep = frozenset(expected)
    return {k: v for k, v in state.items() if k in keep or not (k in unused or k.split(".")[0] in _HEADS)}


def _converter(model: nn.Module) -> Callable[..., Any] | None:
    network: Any = model
    name: str = network.pretrained_cfg["architecture"]
    for module in (timm.models.model_entrypoint(name).__module__, type(model).__module__):
        scope = vars(importlib.import_module(module))
        for function in ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained"):
            if function in scope:
                return scope[function]
    return None


def _any(keys: Iterable[str], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in keys)


def _drop(state: State, *prefixes: str) -> State:
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _strip(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items()}
