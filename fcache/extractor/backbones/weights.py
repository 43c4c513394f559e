"""Weights of a backbone: from a file, from timm's hub or drawn at random, always loaded strictly and digested."""

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import timm
import torch
from torch import Tensor, nn

from fcache.cache_spec import DataError, SpecError
from fcache.extractor.backbones import giant
from fcache.extractor.backbones.architecture import Architecture, build
from fcache.extractor.backbones.checkpoints import convert, drop_unused, unwrap
from fcache.extractor.backbones.draws import draw_weights
from fcache.extractor.backbones.tensorfile import read_tensors

State = Mapping[str, Tensor]

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# A counter of training steps: no feature depends on it and some files lack it.
_COUNTER = "num_batches_tracked"
_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """The parameters and persistent buffers of an architecture at its native size, on the CPU.

    Floats are float32, or bfloat16 where that was asked for and the source has it. `sha256` digests names, types,
    shapes and bytes in the order of the names, of floats as float32; `random` is the text "random:SEED" of weights that
    were never trained, else None.
    """

    state: dict[str, Tensor]
    sha256: str
    random: str | None


def load_weights(architecture: Architecture, source: str, *, halves: bool = False) -> Weights:
    """The weights that `source` names: a file, "pretrained" (timm's hub) or "random:SEED".

    With `halves` the parameters in `architecture.products` stay bfloat16 if they are: 6 GB of a giant model, not 12.

    Raises SpecError for a `source` of no such form, DataError if the file or the hub cannot be read or if the
    weights do not fit the architecture exactly.
    """
    kept: frozenset[str] = architecture.products if halves else frozenset()
    if source.startswith("random:"):
        seed = source.removeprefix("random:")
        if not seed.isdecimal():
            raise SpecError(f"random weights are named by a seed from 0, as random:0, got {source!r}")
        state = _complete(draw_weights(architecture, int(seed)), kept, copy=False)
        return Weights(state, weights_digest(state), f"random:{int(seed)}")
    if source == "pretrained":
        state = fit(_download(architecture), architecture, f"the public weights of {architecture.name}")
    else:
        state = fit(read_checkpoint(Path(source)), architecture, source)
    # What torch loads may be a map of a file that changes later.
    state = _complete(state, kept, copy=Path(source).suffix in _SUFFIXES[1:])
    return Weights(state, weights_digest(state), None)


def weights_digest(state: State) -> str:
    """SHA-256 (hex) over name, type, shape and bytes of every tensor (on the CPU), in the order of the names.

    Half precision counts as the float32 numbers that it holds.
    """
    return digest_in_order((name, state[name]) for name in sorted(state))


def digest_in_order(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """`weights_digest` of named tensors that come in the order of their names."""
    sha = hashlib.sha256()
    for name, tensor in tensors:
        array = _as_float32(tensor.detach()).contiguous().numpy()
        sha.update(f"{name} {array.dtype.str} {list(array.shape)}\n".encode())
        sha.update(array.reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def adapt(state: State, model: nn.Module, architecture: Architecture) -> State:
    """`state` for `model`, the architecture at another input size: tables of relative positions are resampled.

    Raises SpecError if a tensor depends on the input size in a way that timm cannot resample.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Equal shapes do not suffice for windows: tables of 7x9 and of 9x7 have the same.
    if not architecture.windowed and all(shapes.get(n) == tuple(t.shape) for n, t in state.items()):
        return state
    try:
        adapted = convert(state, model)
    except Exception as error:  # timm's converters fail in as many ways as there are families
        raise SpecError(f"the weights of {architecture.name} do not resample to this input size: {error}") from error
    wrong = [name for name, shape in shapes.items() if name not in adapted or tuple(adapted[name].shape) != shape]
    if wrong:
        raise SpecError(
            f"{wrong[0]} of {architecture.name} depends on the input size and cannot be resampled;"
            f" use {architecture.native_size[0]}x{architecture.native_size[1]}"
        )
    return {name: adapted[name] for name in shapes}


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """What a weights file holds: named tensors, or nested mappings of them.

    Raises SpecError for a name of another kind of file, DataError if there is no such file or it cannot be read.
    """
    if path.suffix not in _SUFFIXES:
        raise SpecError(
            f"weights are a file ({', '.join(_SUFFIXES)}), 'pretrained' or 'random:SEED'; got {str(path)!r}"
        )
    if not path.is_file():
        raise DataError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(read_tensors(path))
        # Official checkpoints keep their command line beside the weights; a Namespace runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than tensors and is not loaded, since that could run foreign code ({error}); save its"
            " state dict alone, best as .safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read as weights: {error}; fetch the file again") from error


def fit(checkpoint: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, Tensor]:
    """The tensors of `checkpoint` under the names of `architecture`, all of them and no others, in their own types.

    `where` says where they come from. Raises DataError if they do not fit.
    """
    with torch.device("meta"):
        model = build(architecture, None)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    flat = unwrap(checkpoint, expected)
    if flat is None:
        raise DataError(f"{where} holds no named tensors; it has the keys {list(checkpoint)[:8]}")
    cause: Exception | None = None
    try:
        found = convert(flat, model)
    except Exception as error:  # timm's converters fail in as many ways as there are families
        found, cause = flat, error
    found = drop_unused(found, expected, architecture.unused)
    missing = [n for n in expected if n not in found and not n.endswith(_COUNTER)]
    unexpected = [n for n in found if n not in expected]
    sizes = {tensor.numel() for tensor in flat.values() if isinstance(tensor, Tensor)}
    misshaped = [n for n in expected if n in found and not _fits(n, found[n], expected[n], sizes)]
    if missing or unexpected or misshaped:
        faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        raise DataError(
            f"{where} does not hold weights of {architecture.name}: {', '.join(_listed(*f) for f in faults)}."
            f" It looks like {_described(flat)}{f' ({cause!r})' if cause else ''}."
            " Give the weights of this architecture, or name the model that they belong to"
        ) from cause
    return {n: found[n] for n in expected if n in found} | dict(_counters(model))


def _fits(name: str, found: Any, expected: tuple[int, ...], source_sizes: set[int]) -> bool:
    if not isinstance(found, Tensor) or tuple(found.shape) != expected:
        return False
    # timm's converters also resample patch kernels, which would let weights of another patch size pass.
    return "pos" in name or found.ndim != 4 or found.numel() in source_sizes


def _counters(model: nn.Module) -> State:
    return {
        n: torch.zeros(t.shape, dtype=t.dtype, device="cpu")
        for n, t in model.state_dict().items()
        if n.endswith(_COUNTER)
    }


def _complete(state: dict[str, Tensor], kept: frozenset[str], *, copy: bool) -> dict[str, Tensor]:
    """The tensors in order, floats as float32 but for those `kept` as bfloat16: taken out of `state`, one by one."""
    found: dict[str, Tensor] = {}
    for name in sorted(state):
        given = state.pop(name).detach().to("cpu")
        tensor = given if name in kept and given.dtype == torch.bfloat16 else _as_float32(given)
        if copy and tensor is given:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        found[name] = tensor.contiguous()
    return found


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _listed(what: str, names: list[str]) -> str:
    shown = f" ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})" if names else ""
    return f"{len(names)} keys {what}{shown}"


def _described(flat: Mapping[str, Any]) -> str:
    first = [f"{n} {tuple(getattr(t, 'shape', ()))}" for n, t in list(flat.items())[:_SHOWN]]
    return f"{len(flat)} tensors, the first are {', '.join(first)}"


def _download(architecture: Architecture) -> State:
    if architecture.family == giant.NAME:
        raise SpecError(
            f"no weights of {giant.SHORT_NAME} are public; give a file of your own (--weights FILE; `fcache convert` "
            "makes one of a checkpoint), random:0 for trials and benchmarks, or take swinv2-l"
        )
    if not timm.models.is_model_pretrained(architecture.name):
        raise SpecError(f"timm knows no public weights of {architecture.name}; give a file, or random:0 for a trial")
    try:
        return timm.create_model(architecture.name, pretrained=True).state_dict()
    except Exception as error:  # the hub client, the network and the disk each fail in their own way
        raise DataError(
            f"the public weights of {architecture.name} could not be fetched from the hub "
            f"({type(error).__name__}: {error}); fetch them elsewhere and give the file"
        ) from error
