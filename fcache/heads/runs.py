"""Runs: a trained head as a folder with `weights.safetensors`, `states.npz`, and `run.json`, which is written last."""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fcache.cache_spec import (
    CorruptError,
    DataError,
    FeatureSpec,
    IncompatibleError,
    IncompleteError,
    LevelSpec,
    NoSpaceError,
    SpecError,
    TargetSpec,
    from_json,
    to_json,
)
from fcache.heads.config import TrainConfig
from fcache.heads.head import HeadInput
from fcache.heads.metrics import Scores, States

FORMAT = 1
STATUSES = ("finished", "stopped", "interrupted")


@dataclass(frozen=True)
class Evaluation:
    """Scores after `iteration` iterations: fractions by name, and one a class by name (None where undefined)."""

    iteration: int
    metrics: Mapping[str, float]
    per_class: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    chosen: str = ""


@dataclass(frozen=True)
class Cost:
    """What training took: seconds an iteration of this head (forward, backward, step), seconds of all iterations
    with the data and the other heads, the share of these spent waiting for data, peak memory of the process and of
    the device in bytes (0 without one), parameters.
    """

    parameters: int
    seconds_per_iteration: float
    seconds: float
    data_wait_share: float
    peak_memory: int
    peak_device_memory: int


@dataclass(frozen=True)
class Run:
    """The record of one trained head.

    `head` is the full name, `label` the text it was chosen by, `train` its own settings, `recipe` where they came
    from. `features` and `targets` identify the data, `levels` (free sizes) and `targets` rebuild the head;
    `random_weights` is the seed of a random backbone, else None. `extent` has "training" and "validation".
    `status` is "finished", "stopped" (it failed: `reason`), or "interrupted" (not on disk: it can be resumed).
    `losses` are (iteration, mean total loss since the one before), `loss_terms` those of the last iteration.
    `evaluations` are in order, the final one last. `hints` are paths and names for later commands, no identity.
    """

    folder: Path
    status: str
    reason: str
    head: str
    label: str
    options: Mapping[str, Any]
    recipe: str
    train: TrainConfig
    features_key: str
    targets_key: str
    features: FeatureSpec
    targets: tuple[TargetSpec, ...]
    levels: tuple[LevelSpec, ...]
    random_weights: str | None
    extent: Mapping[str, Any]
    iterations: int
    evaluations: tuple[Evaluation, ...]
    losses: tuple[tuple[int, float], ...]
    loss_terms: Mapping[str, float]
    cost: Cost
    device: str
    precision: str
    versions: Mapping[str, str]
    hints: Mapping[str, str]

    @property
    def task(self) -> str:
        """The task: the first half of the head's full name."""
        return self.head.partition("/")[0]

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.train.seed

    @property
    def inputs(self) -> HeadInput:
        """What the head is built from."""
        return HeadInput(self.levels, self.targets)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The final scores, empty if it was never evaluated."""
        return self.evaluations[-1].metrics if self.evaluations else {}


def evaluation(scores: Scores, iteration: int) -> Evaluation:
    """Scores as a run keeps them."""
    per_class = {k: tuple(None if np.isnan(x) else float(x) for x in v) for k, v in scores.per_class.items()}
    return Evaluation(iteration, dict(scores.values), per_class, scores.chosen)


def write_run(run: Run, *, weights: Mapping[str, Tensor], states: States, ids: Sequence[str]) -> None:
    """Writes a run into its folder, `run.json` last. `states` are per-sample states of the final evaluation.

    Raises NoSpaceError if the disk is full, DataError if the folder cannot be written.
    """
    if weights:
        tensors = {name: t.detach().cpu().contiguous() for name, t in weights.items()}
        write_durably(run.folder / "weights.safetensors", save_tensors(tensors))
    if states:
        buffer = BytesIO()
        # Keys are parameters of savez: a prefix keeps any state's name apart from them.
        arrays = {f"state/{name}": array for name, array in states.items()}
        np.savez_compressed(buffer, ids=np.asarray(ids, dtype=np.str_), **arrays)  # type: ignore[arg-type]
        write_durably(run.folder / "states.npz", buffer.getvalue())
    # A run says nothing about where it lies: its folder may be moved.
    record = {f.name: to_json(getattr(run, f.name)) for f in fields(run) if f.name != "folder"}
    record = {"format": FORMAT, **record}
    write_durably(run.folder / "run.json", (json.dumps(record, indent=1) + "\n").encode())


def load_run(folder: Path | str) -> Run:
    """The run in a folder.

    Raises SpecError if there is no such folder, IncompleteError if it holds no `run.json` (an unfinished run),
    IncompatibleError if a newer fcache wrote it, CorruptError if it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SpecError(f"no run at {folder}: a run is a folder that train-head wrote below --out")
    path = folder / "run.json"
    if not path.is_file():
        raise IncompleteError(
            f"{folder} holds no run.json: not a run, or one that is unfinished; train-head --resume goes on with it"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is no run record: {error}; remove the folder and train again") from error
    if version != FORMAT:
        raise IncompatibleError(f"{path} has format {version}, this fcache reads {FORMAT}; use the fcache it is from")
    try:
        run = from_json(Run, {**record, "folder": str(folder)})
    except (SpecError, TypeError) as error:
        raise CorruptError(f"{path} is no run record: {error}; remove the folder and train again") from error
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in run.options.items()}
    return replace(run, folder=folder, options=options)


def find_runs(folder: Path | str) -> tuple[Path, ...]:
    """The run folders at or directly below a folder, sorted: those that hold a `run.json`."""
    folder = Path(folder)
    if (folder / "run.json").is_file():
        return (folder,)
    return tuple(sorted(p.parent for p in folder.glob("*/run.json")))


def load_weights(run: Run) -> dict[str, Tensor]:
    """The head's parameters and buffers by name. Raises CorruptError if the file is absent or damaged."""
    path = run.folder / "weights.safetensors"
    try:
        return load_tensors(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); the run is {run.status}, train it again") from error


def load_states(run: Run) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Sample ids and per-sample states [N, …] of the final evaluation. Raises CorruptError if they cannot be read."""
    path = run.folder / "states.npz"
    try:
        # From bytes: numpy leaves a file open that it opened itself and found damaged.
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as file:
            states = {k.removeprefix("state/"): file[k] for k in file.files if k != "ids"}
            return tuple(str(i) for i in file["ids"]), states
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CorruptError(f"{path} cannot be read ({error}); train the run again") from error


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file of a run so that after a crash it is absent, old or complete, never part.

    Raises NoSpaceError if the disk is full, DataError if the folder cannot be written.
    """
    # One process writes a run: a fixed name leaves at most one stray file, which the next write takes over.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise explain(error, path) from error


def explain(error: OSError, path: Path) -> Exception:
    """The error that a user can act on, for a failure to write `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(f"no space left (or quota exceeded) for {path}: free some, then train-head --resume")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        return DataError(f"cannot write {path}: {error.strerror}; choose a writable --out")
    return error
