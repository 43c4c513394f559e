"""Heads asked about images in several views each: test-time augmentation, and photos."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fcache.cache_spec import ImageViews, View, ViewSource
from fcache.heads.batches import Batch, to_batch, to_targets
from fcache.heads.evaluate import Scored, TrainedHead, check_split, scored, without_errors
from fcache.heads.events import EvaluationStep, Report, silent
from fcache.heads.metrics import Metric, States


@dataclass(frozen=True)
class Seen:
    """What a head says about one image: `Head.outputs` of its views, and where these lie."""

    head: TrainedHead
    id: str
    outputs: tuple[Any, ...]
    views: tuple[View, ...]

    def merged(self) -> Any:
        """The prediction for the image, see `Head.merge`."""
        return self.head.head.merge(self.outputs, self.views, self.head.options)


def evaluate_views(
    heads: Sequence[TrainedHead], source: ViewSource, *, device: torch.device | str = "cpu", report: Report = silent
) -> list[Scored]:
    """Heads scored on images seen in several views each: the source's backbone runs once a view, for all heads.

    Raises SpecError if the source is no evaluation split or is empty, and what a head raises.
    """
    check_split(source.info, source.num_groups)
    metrics = [h.metric for h in heads]
    states: list[list[States]] = [[] for _ in heads]
    ids: list[str] = []
    with torch.inference_mode():
        for done, group in enumerate(source.groups(), start=1):
            targets = to_targets(group.targets, torch.device("cpu"))
            truth = [{path: values[i] for path, values in targets.items()} for i in range(len(group))]
            batches = view_batches(heads, group, device=device)
            for k, head in enumerate(heads):
                states[k] += _observed(head, metrics[k], batches, truth)
            ids += group.ids
            report(EvaluationStep(done, source.num_groups))
    return without_errors([scored(metrics[k], states[k], tuple(ids)) for k in range(len(heads))])


def _observed(
    head: TrainedHead, metric: Metric, batches: Iterable[Batch], truth: Sequence[Mapping[str, Any]]
) -> list[States]:
    return [metric.observe(s.merged(), t) for s, t in zip(see(head, batches), truth, strict=True)]


def view_batches(
    heads: Sequence[TrainedHead], group: ImageViews[Any], *, device: torch.device | str = "cpu"
) -> Iterable[Batch]:
    """The views of some images as batches, one a view, for heads that are asked about them one after the other.

    For several heads the features of all views are kept, so that the backbone runs once, and memory does not grow with
    the number of heads; for a single one those of one view at a time.
    """
    levels = dict.fromkeys(level.name for head in heads for level in head.inputs.levels)
    batches = (to_batch(block, torch.device(device), levels=levels) for block in group.blocks())
    return batches if len(heads) == 1 else list(batches)


def see(head: TrainedHead, batches: Iterable[Batch]) -> list[Seen]:
    """What a head says about some images, all of which are in each of the batches, one a view."""
    ids: tuple[str, ...] = ()
    outputs: list[Sequence[Any]] = []
    views: list[tuple[View, ...]] = []
    with torch.inference_mode():
        for batch in batches:
            ids = batch.ids
            outputs.append(head.head.outputs(head.module, batch, head.options))
            views.append(batch.views)
    return [Seen(head, name, tuple(x[i] for x in outputs), tuple(v[i] for v in views)) for i, name in enumerate(ids)]
