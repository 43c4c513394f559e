"""Evaluation: trained heads scored on a source in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fcache.cache_spec import BlockSource, IncompatibleError, SourceInfo, SpecError, ViewSource, targets_key
from fcache.heads.batches import Batch, device_batches
from fcache.heads.events import EvaluationStep, Report, silent
from fcache.heads.head import Head, HeadInput, Options
from fcache.heads.metrics import Metric, Scores, States, score, stack_states
from fcache.heads.runs import Run, load_weights
from fcache.heads.tasks import find_head


@dataclass(frozen=True)
class TrainedHead:
    """A head with its module: what can predict and be scored."""

    label: str
    head: Head
    options: Options
    inputs: HeadInput
    module: nn.Module

    @property
    def metric(self) -> Metric:
        """The metric that scores it."""
        return self.head.metrics(self.inputs, self.options)

    def predict(self, batch: Batch) -> Sequence[Any]:
        """One prediction a sample, see `Head.predict`. The module must be in evaluation mode."""
        return self.head.predict(self.module, batch, self.options)


@dataclass(frozen=True)
class Scored:
    """Scores of a source, the per-sample states [N, …] they come from, and the samples' ids in the same order."""

    scores: Scores
    states: States
    ids: tuple[str, ...]


def load_head(run: Run, *, device: torch.device | str = "cpu") -> TrainedHead:
    """The trained head of a run on a device, in evaluation mode. Options younger than the run have their defaults.

    Raises IncompatibleError if its weights do not fit the head that the run describes.
    """
    head = find_head(run.head)
    options = {**head.options, **run.options}
    module = head.build(run.inputs, options)
    try:
        module.load_state_dict(load_weights(run))
    except RuntimeError as error:
        raise IncompatibleError(
            f"the weights in {run.folder} do not fit head {run.label!r} of this fcache; train it again: {error}"
        ) from error
    return TrainedHead(run.label, head, options, run.inputs, module.to(device).eval())


def evaluate(run: Run, source: BlockSource, *, device: torch.device | str = "cpu", report: Report = silent) -> Scored:
    """A run's head scored on an evaluation source.

    Raises IncompatibleError if the source's features or targets are not those it was trained on.
    """
    check_source(run, source)
    return evaluate_heads([load_head(run, device=device)], source, device=device, report=report)[0]


def check_source(run: Run, source: BlockSource | ViewSource) -> None:
    """Raises IncompatibleError if a source's features or targets are not those that a run was trained on."""
    found = targets_key(tuple(source.info.target(t.kind) for t in run.targets))
    for what, expected, got in (
        ("features", run.features_key, source.info.features.key),
        ("targets", run.targets_key, found),
    ):
        if expected != got:
            raise IncompatibleError(
                f"run {run.label!r} was trained on {what} {expected[:12]}, these are {got[:12]}; "
                "evaluate it on the cache (or with the backbone, weights and settings) it was trained on"
            )


def evaluate_heads(
    heads: Sequence[TrainedHead], source: BlockSource, *, device: torch.device | str = "cpu", report: Report = silent
) -> list[Scored]:
    """Heads scored in one pass over a source; modules must be in evaluation mode. Raises what a head raises."""
    return without_errors(try_evaluate_heads(heads, source, device=device, report=report))


def try_evaluate_heads(
    heads: Sequence[TrainedHead], source: BlockSource, *, device: torch.device | str = "cpu", report: Report = silent
) -> list[Scored | Exception]:
    """As `evaluate_heads`, but what a head raises takes the place of its result and leaves the others alone.

    Raises SpecError if the source is no evaluation split or is empty.
    """
    blocks = source.num_blocks(0)
    check_split(source.info, blocks)
    device = torch.device(device)
    read = _levels_read(heads, source.info)
    metrics = [h.metric for h in heads]
    states: list[list[States]] = [[] for _ in heads]
    failed: dict[int, Exception] = {}
    ids: list[str] = []
    with torch.inference_mode():
        for done, batch in enumerate(device_batches(source.blocks(0), device, levels=read), start=1):
            truth = [{path: values[i] for path, values in batch.targets.items()} for i in range(len(batch))]
            for k, head in enumerate(heads):
                if k in failed:
                    continue
                try:
                    predictions = head.predict(batch)
                    states[k] += [metrics[k].observe(p, t) for p, t in zip(predictions, truth, strict=True)]
                except Exception as error:
                    failed[k] = error
            ids += batch.ids
            report(EvaluationStep(done, blocks))
    return [failed[k] if k in failed else scored(metrics[k], states[k], tuple(ids)) for k in range(len(heads))]


def check_split(info: SourceInfo, count: int) -> None:
    """Raises SpecError if a source is no evaluation split, or has nothing (`count` is 0)."""
    if info.role != "evaluation":
        raise SpecError(f"heads are scored on an evaluation split, {info.split!r} is a training split")
    if count == 0:
        raise SpecError(f"split {info.split!r} of the source is empty; there is nothing to score")


def _levels_read(heads: Sequence[TrainedHead], info: SourceInfo) -> list[str]:
    """The names of the levels that any of the heads reads, in the source's order."""
    read = {level.name for head in heads for level in head.inputs.levels}
    return [level.name for level in info.levels if level.name in read]


def scored(metric: Metric, states: Sequence[States], ids: tuple[str, ...]) -> Scored | Exception:
    """The scores of single samples' states, or what the metric raises."""
    # By id, so that two evaluations in other batches or buckets give equal arrays.
    order = np.argsort(np.asarray(ids, dtype=np.str_), kind="stable")
    try:
        stacked = stack_states([states[i] for i in order])
        return Scored(score(metric, stacked), stacked, tuple(ids[i] for i in order))
    except Exception as error:
        return error


def without_errors(results: Sequence[Scored | Exception]) -> list[Scored]:
    """The results. Raises the first error among them."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return [result for result in results if isinstance(result, Scored)]
