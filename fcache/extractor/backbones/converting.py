"""A checkpoint made into a weights file: the encoder's tensors alone, in a form that loads fast and runs no code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fcache.cache_spec import DataError, SpecError
from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.checkpoints import unwrap
from fcache.extractor.backbones.tensorfile import read_tensors, write_tensors
from fcache.extractor.backbones.weights import digest_in_order, fit, read_checkpoint

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Converted:
    """What a weights file holds now: tensors, their bytes and their digest, which is that of a cache's identity if a
    model was named; `left_out` are the names at the top of the checkpoint that hold no weights.
    """

    tensors: int
    bytes: int
    sha256: str
    left_out: tuple[str, ...]


def convert_weights(source: Path, target: Path, *, model: str | None = None, overwrite: bool = False) -> Converted:
    """Writes the encoder's tensors of the checkpoint `source` to `target` in their own types, and reads them back.

    With `model` they are that model's, under its names, all of them and no others; without, they keep their names and
    the prefixes of known formats go. The file appears whole or not at all. A zip-based checkpoint is mapped into
    memory, not read into it.

    Raises SpecError for names of files that do not fit or a target that exists, DataError if the checkpoint cannot be
    read, holds no tensors or does not fit the model.
    """
    if target.suffix != SUFFIX:
        raise SpecError(f"the target is a {SUFFIX} file, got {str(target)!r}")
    if target.exists() and source.exists() and target.samefile(source):
        raise SpecError(f"{source} is the target too; give another name")
    if target.exists() and not overwrite:
        raise SpecError(f"{target} exists; give another name, or --force to replace it")
    architecture = None if model is None else find_architecture(model)
    checkpoint = read_checkpoint(source)
    if architecture is None:
        found = {name: x for name, x in (unwrap(checkpoint, ()) or {}).items() if isinstance(x, Tensor)}
        if not found:
            raise DataError(f"{source} holds no named tensors; it has the keys {list(checkpoint)[:8]}")
    else:
        found = fit(checkpoint, architecture, str(source))
    state = {name: found[name].detach() for name in sorted(found)}
    digest = digest_in_order(state.items())
    write_tensors(target, state)
    if digest_in_order(read_tensors(target)) != digest:
        raise DataError(f"{target} does not hold what was written to it; check the disk and convert again")
    size = sum(x.nbytes for x in state.values())
    return Converted(len(state), size, digest, _left_out(checkpoint))


def _left_out(checkpoint: Mapping[str, object]) -> tuple[str, ...]:
    """The entries at the top of a checkpoint that are neither tensors nor mappings that hold some."""
    return tuple(
        name
        for name, value in checkpoint.items()
        if not isinstance(value, Tensor)
        and not (isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values()))
    )
