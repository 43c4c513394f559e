"""Checkpoints: what continues the training of one head exactly, and what must be equal for that."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from fcache.cache_spec import (
    BlockSource,
    CorruptError,
    FollowingSource,
    IncompatibleError,
    SourceInfo,
    first_difference,
    targets_key,
    to_json,
)
from fcache.heads.choice import HeadChoice, needed_targets
from fcache.heads.config import TrainConfig
from fcache.heads.runs import Run, write_durably

NAME = "checkpoint.pt"
# The next block as (epoch, block in it).
Position = tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A head in training: what determines its weights, its learner's state, and where the stream goes on.

    `extent` is what training read until then. Checkpoints of a release that did not save it have no `position`.
    """

    identity: Mapping[str, Any]
    learner: Mapping[str, Any]
    position: Position | None
    extent: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Saves a checkpoint durably in a run's folder. Raises NoSpaceError or DataError if it cannot be written."""
    buffer = BytesIO()
    position = None if checkpoint.position is None else list(checkpoint.position)
    stream = {"position": position, "extent": to_json(checkpoint.extent)}
    torch.save({"identity": checkpoint.identity, "learner": checkpoint.learner, **stream}, buffer)
    write_durably(folder / NAME, buffer.getvalue())


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in a run's folder, None if there is none. Raises CorruptError if it cannot be read."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        position = saved.get("position")
        place = None if position is None else (int(position[0]), int(position[1]))
        return Checkpoint(saved["identity"], saved["learner"], place, saved.get("extent", {}))
    except Exception as error:
        raise CorruptError(f"{path} cannot be read ({error}); remove its folder and train again") from error


def remove_checkpoint(folder: Path) -> None:
    """Removes the checkpoint of a run that is recorded."""
    (folder / NAME).unlink(missing_ok=True)


def identity_of(choice: HeadChoice, info: SourceInfo) -> dict[str, Any]:
    """What determines the weights of a head that is trained on a source, as JSON data."""
    return {
        "head": choice.name,
        "options": to_json(choice.options),
        "train": _train_identity(choice.train),
        "features": info.features.key,
        "targets": targets_key(needed_targets(choice.head, info)),
        "extent": to_json(info.extent),
    }


def identity_of_run(run: Run, source: BlockSource) -> dict[str, Any]:
    """`identity_of` of the head of a run, if `source` is what it was trained on."""
    extent = dict(run.extent["training"])
    if isinstance(source, FollowingSource):
        # Its committed sets are compared when they are restored.
        extent = {k: v for k, v in extent.items() if k in source.info.extent} | {"follow": True}
    return {
        "head": run.head,
        "options": to_json(run.options),
        "train": _train_identity(run.train),
        "features": run.features_key,
        "targets": run.targets_key,
        "extent": extent,
    }


def check_same(folder: Path, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises IncompatibleError that names the first field in which two identities differ."""
    if difference := first_difference(found, asked):
        name, was, now = difference
        raise IncompatibleError(
            f"{folder} was trained with {name} = {was}, now {now} is asked; use the same settings and data, "
            "or another --out"
        )


def _train_identity(train: TrainConfig) -> Any:
    # How often a training is scored or saved changes no weight.
    return to_json(replace(train, evaluate_every=0, checkpoint_every=0))
