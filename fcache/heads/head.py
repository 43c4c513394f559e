"""What a head is: the functions and options that a plug-in of `heads/tasks/` gives under a name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fcache.cache_spec import LevelSpec, SpecError, TargetSpec, View
from fcache.heads.batches import Batch
from fcache.heads.metrics import Metric

Option = bool | int | float | str | tuple[float, ...]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class HeadInput:
    """What a head is built from: the levels it gets, in the source's order, and the targets of the source.

    Spatial sizes of levels are free (0): a head takes any.
    """

    levels: tuple[LevelSpec, ...]
    targets: tuple[TargetSpec, ...]

    def target(self, kind: str) -> TargetSpec:
        """The spec of one kind of target. Raises SpecError if there is none."""
        for spec in self.targets:
            if spec.kind == kind:
                return spec
        raise SpecError(f"targets of kind {kind!r} are needed, found {[t.kind for t in self.targets]}")

    def num_classes(self, kind: str) -> int:
        """Number of classes of a kind of target. Raises SpecError if it has no class names."""
        if not self.target(kind).class_names:
            raise SpecError(f"targets of kind {kind!r} have no class names; a head that classifies needs them")
        return len(self.target(kind).class_names)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and are clipped together; `lr` None means the configured one.

    `undecayed` are those of them that weight decay leaves alone (unless all are to be decayed, `decay_norms`); None
    means those with one axis, norms and biases.
    """

    parameters: tuple[nn.Parameter, ...]
    lr: float | None = None
    undecayed: tuple[nn.Parameter, ...] | None = None


def all_levels(levels: Sequence[LevelSpec], options: Options) -> tuple[str, ...]:
    """The names of all levels: what a head reads unless it says otherwise."""
    return tuple(level.name for level in levels)


def one_group(module: nn.Module, options: Options) -> tuple[ParameterGroup, ...]:
    """All parameters as one group: what a head has unless it says otherwise."""
    return (ParameterGroup(tuple(module.parameters())),)


def no_check(inputs: HeadInput, options: Options) -> None:
    """Refuses nothing: what a head does unless it says otherwise."""


@dataclass(frozen=True)
class Head:
    """A kind of head. All its functions are pure in what they are given, apart from the module's own state.

    `needs` names the kinds of target without which it cannot train. `build(inputs, options)` makes the module with
    torch's global generator. `loss(module, batch, options)` gives scalar terms by name, already weighted; their sum
    is minimised. `outputs(module, batch, options)` gives what the head says about each record of a batch, on its
    device; `merge(outputs, views, options)` makes of what it says about one image, in one or several views, the
    prediction, on the CPU, at the size and in the units of the original image; `metrics(inputs, options)` gives the
    metric that scores predictions.
    `levels(available, options)` names the levels that it reads, `groups(module, options)` the parameter groups.
    `check(inputs, options)` raises SpecError if it cannot be trained so, or not here; it is called when the head is
    chosen, before any work.
    `absent` says what to do where a target that it needs is absent.
    `options` maps every option to its default: bool, int, float, str or a tuple of floats.
    """

    needs: frozenset[str]
    build: Callable[[HeadInput, Options], nn.Module]
    loss: Callable[[nn.Module, Batch, Options], Mapping[str, Tensor]]
    outputs: Callable[[nn.Module, Batch, Options], Sequence[Any]]
    merge: Callable[[Sequence[Any], Sequence[View], Options], Any]
    metrics: Callable[[HeadInput, Options], Metric]
    options: Mapping[str, Option] = field(default_factory=dict)
    levels: Callable[[Sequence[LevelSpec], Options], tuple[str, ...]] = all_levels
    groups: Callable[[nn.Module, Options], tuple[ParameterGroup, ...]] = one_group
    check: Callable[[HeadInput, Options], None] = no_check
    absent: str = "choose another head, or extract a dataset that has them"

    def predict(self, module: nn.Module, batch: Batch, options: Options) -> list[Any]:
        """One prediction a record, each of its single view."""
        outputs = self.outputs(module, batch, options)
        return [self.merge([x], [view], options) for x, view in zip(outputs, batch.views, strict=True)]
