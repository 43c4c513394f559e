"""What training and evaluation report while they run: frozen values, given to a callable."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingStarted:
    """Heads are built; `parameters` by head label. `first` is the iteration that training continues from."""

    parameters: Mapping[str, int]
    first: int
    iterations: int


@dataclass(frozen=True)
class SplitKept:
    """A split is in memory from now on: `place` is "RAM" or a device, `bytes` what it takes there."""

    split: str
    place: str
    bytes: int


@dataclass(frozen=True)
class Waiting:
    """Nothing to read of a split that is followed yet; it is looked at again from time to time."""

    split: str


@dataclass(frozen=True)
class StepDone:
    """An iteration is done (`iteration` counts from 1): total loss by head label, seconds, and seconds of waiting."""

    iteration: int
    iterations: int
    losses: Mapping[str, float]
    seconds: float
    data_wait: float


@dataclass(frozen=True)
class EpochDone:
    """All blocks of an epoch (from 0) were used."""

    epoch: int
    iteration: int


@dataclass(frozen=True)
class CheckpointDone:
    """All heads are saved at an iteration."""

    iteration: int


@dataclass(frozen=True)
class HeadStopped:
    """A head failed and trains no more; the others go on."""

    label: str
    iteration: int
    reason: str


@dataclass(frozen=True)
class EvaluationStep:
    """A block of `blocks` was scored (`block` counts from 1)."""

    block: int
    blocks: int


@dataclass(frozen=True)
class EvaluationDone:
    """A head was scored after an iteration: scores by name, fractions."""

    label: str
    iteration: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunDone:
    """A run is recorded; `status` is "finished" or "stopped"."""

    label: str
    folder: str
    status: str


Event = (
    TrainingStarted
    | SplitKept
    | Waiting
    | StepDone
    | EpochDone
    | CheckpointDone
    | HeadStopped
    | EvaluationStep
    | EvaluationDone
    | RunDone
)
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A report that tells nobody."""
