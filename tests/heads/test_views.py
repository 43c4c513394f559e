"""Heads asked about images in several views: who is asked when, and what becomes of it."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fcache.cache_spec import Block, ImageViews, SourceInfo, SpecError, View
from fcache.cache_spec.testing import MemorySource, plain_view
from fcache.heads import TrainConfig, choose_head, evaluate_heads, evaluate_views, events, find_head, see, view_batches
from fcache.heads.evaluate import TrainedHead

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Views:
    """A `ViewSource` of the blocks of in-memory sources: one source a view, equal samples."""

    sources: Sequence[MemorySource]
    log: list[str]

    @property
    def info(self) -> SourceInfo:
        return self.sources[0].info

    @property
    def num_groups(self) -> int:
        return self.sources[0].num_blocks(0)

    def groups(self) -> Iterator[ImageViews[np.ndarray]]:
        for found in zip(*(s.blocks(0) for s in self.sources), strict=True):
            yield ImageViews(found[0].ids, len(found), lambda found=found: self._logged(found), found[0].targets)

    def _logged(self, found: Sequence[Block[np.ndarray]]) -> Iterator[Block[np.ndarray]]:
        for number, block in enumerate(found):
            self.log.append(f"view {number}")
            yield replace(block, targets={})


def mirrored(source: MemorySource) -> MemorySource:
    """The same pictures mirrored, as a backbone that looks at single points would see them."""
    width = source.info.canvas[1]
    view = View((-1.0, 0.0, float(width), 0.0, 1.0, 0.0), source.info.canvas, source.info.canvas, source.info.canvas)
    features = {name: np.ascontiguousarray(x[..., ::-1]) for name, x in source.features.items()}
    return replace(source, features=features, views=(view,) * len(source.ids))


def built(text: str, source: MemorySource, seed: int = 0) -> TrainedHead:
    choice = choose_head(text, source.info, TrainConfig(iterations=1))
    torch.manual_seed(seed)
    inputs = choice.inputs(source.info)
    return TrainedHead(text, choice.head, choice.options, inputs, choice.head.build(inputs, choice.options).eval())


def test_views_of_one_score_as_single_views_do(scenes) -> None:
    source = scenes(5, role="evaluation", batch_size=2)
    heads = [built("linear", source), built("upernet:width=8", source, 1)]
    reports: list[events.Event] = []
    plain = evaluate_heads(heads, source)
    for one, other in zip(plain, evaluate_views(heads, Views([source], []), report=reports.append), strict=True):
        assert one.scores.values == other.scores.values
        assert one.ids == other.ids
        for name, states in one.states.items():
            np.testing.assert_array_equal(states, other.states[name])
    assert reports == [events.EvaluationStep(done, 3) for done in (1, 2, 3)]


def test_the_mirrored_views_of_pointwise_features_change_nothing(scenes) -> None:
    source = scenes(4, role="evaluation", strides=(8,))
    # A linear head on one level looks at single points: it says of mirrored features what it says of the others.
    head = built("linear", source)
    one = evaluate_heads([head], source)[0]
    two = evaluate_views([head], Views([source, mirrored(source)], []))[0]
    # Resizing rounds differently from the right than from the left: a pixel between two classes may turn.
    for name in one.states:
        assert np.abs(one.states[name] - two.states[name]).sum() <= 4


def test_heads_in_one_pass_score_as_each_alone_and_views_are_made_once(scenes) -> None:
    source = scenes(4, role="evaluation", batch_size=2)
    log: list[str] = []
    views = Views([source, mirrored(source), source], log)
    heads = [built(text, source, i) for i, text in enumerate(("linear", "upernet:width=8", "linear"))]
    together = evaluate_views(heads, views)
    assert log == ["view 0", "view 1", "view 2"] * 2
    for head, found in zip(heads, together, strict=True):
        del log[:]
        alone = evaluate_views([head], views)[0]
        assert log == ["view 0", "view 1", "view 2"] * 2
        assert alone.scores.values == found.scores.values
        for name, states in alone.states.items():
            np.testing.assert_array_equal(states, found.states[name])


def test_classes_are_the_mean_softmax_of_the_views(images) -> None:
    sources = [images(6, role="evaluation", batch_size=3, seed=seed) for seed in (0, 1)]
    head = built("classification/linear:lrs=0.1,0.01", sources[0])

    def said(*views: MemorySource) -> list[torch.Tensor]:
        groups = Views(views, []).groups()
        return [seen.merged() for group in groups for seen in see(head, view_batches([head], group))]

    for merged, one, other in zip(said(*sources), said(sources[0]), said(sources[1]), strict=True):
        assert merged.shape == (2, 5)
        torch.testing.assert_close(merged.softmax(-1), (one.softmax(-1) + other.softmax(-1)) / 2)


class Kept:
    """An output that can be watched."""


def test_what_a_head_said_is_gone_before_the_next_one_is_asked(scenes) -> None:
    source = scenes(2, role="evaluation", batch_size=2)
    alive: list[weakref.ref[Kept]] = []
    most = 0

    def outputs(module: Any, batch: Any, options: Any) -> list[Kept]:
        nonlocal most
        # Those of this head's earlier views may live, and no other's, without waiting for a garbage collection.
        said = [Kept() for _ in range(len(batch))]
        alive.extend(weakref.ref(x) for x in said)
        most = max(most, sum(ref() is not None for ref in alive))
        return said

    labels = torch.zeros(64, 64, dtype=torch.uint8)
    watched = replace(find_head("semantic/linear"), outputs=outputs, merge=lambda said, views, options: labels)
    head = replace(built("linear", source), head=watched)
    evaluate_views([head] * 4, Views([source] * 3, []))
    assert most == 2 * 3


def test_a_single_head_holds_the_features_of_one_view(scenes) -> None:
    source = scenes(2, role="evaluation", batch_size=2)
    log: list[str] = []
    plain = find_head("semantic/linear")

    def outputs(module: Any, batch: Any, options: Any) -> Any:
        log.append("asked")
        return plain.outputs(module, batch, options)

    head = replace(built("linear", source), head=replace(plain, outputs=outputs))
    evaluate_views([head], Views([source, mirrored(source)], log))
    assert log == ["view 0", "asked", "view 1", "asked"]


def test_only_evaluation_views_with_images_are_scored(scenes) -> None:
    held = scenes(2, role="evaluation")
    head = built("linear", held)
    with pytest.raises(SpecError, match="training split"):
        evaluate_views([head], Views([scenes(2)], []))
    with pytest.raises(SpecError, match="empty"):
        evaluate_views([head], Views([replace(held, drop_last=True)], []))


def test_views_that_show_a_part_are_refused(scenes) -> None:
    source = scenes(1, role="evaluation")
    part = replace(plain_view((64, 64), image_size=(64, 64)), image_size=(64, 128))
    with pytest.raises(SpecError, match="of the image only"):
        evaluate_heads([built("linear", source)], replace(source, views=(part,)))
