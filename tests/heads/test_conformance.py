"""Laws that every head keeps; plug-ins are found by themselves."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from pycocotools.mask import area

from fcache.cache_spec.testing import MemorySource
from fcache.heads import (
    Batch,
    TrainConfig,
    choose_head,
    find_head,
    head_names,
    load_head,
    load_run,
    parse_head,
    to_batch,
    train,
)
from fcache.heads.detections import Detections
from fcache.heads.metrics import score, stack_states
from fcache.heads.runs import load_weights

CPU = torch.device("cpu")
MASK2FORMER = "semantic/mask2former:width=16,attention_heads=4,queries=8,points=64,pixel_blocks=1,decoder_blocks=2"
SMALL = "width=8,box_units=16,proposals=30,rois=32,anchor_scales=4,detections=10,mask_convs=1"
# Narrow forms of heads whose default width is a paper's, and of every other structure that options choose.
FORMS = {
    "detection/maskrcnn": (
        f"detection/maskrcnn:{SMALL},norm_inputs=true",
        f"detection/maskrcnn:{SMALL},neck=fpn-residual,layers=2,class_agnostic=true,extra_levels=0",
        f"detection/maskrcnn:{SMALL},neck=bifpn,layers=1,anchor_ratios=0.5,1",
        f"detection/maskrcnn:{SMALL},adaptors=simple,batch_norm=true,rpn_convs=2,box_convs=1,box_layers=1",
    ),
    "detection/cascade": (
        f"detection/cascade:{SMALL}",
        f"detection/cascade:{SMALL},mask_branches=1,neck=bifpn,layers=1",
    ),
    "detection/htc": (f"detection/htc:{SMALL}",),
    "detection/htc-without-semantic": (f"detection/htc-without-semantic:{SMALL},stage_ious=0.5,0.6,mask_branches=2",),
    "semantic/fcn": (
        "semantic/fcn:width=16",
        "semantic/fcn:width=16,level=8,num_convs=1,concat_input=false,norm_inputs=true",
    ),
    "semantic/mask2former": (
        f"{MASK2FORMER},norm_inputs=true",
        f"{MASK2FORMER},adaptors=simple,dropout=0.1",
    ),
    "semantic/upernet": (
        "semantic/upernet:width=16,aux=true,norm_inputs=true",
        "semantic/upernet:width=16,neck=bifpn,layers=2",
        "semantic/upernet:width=16,neck=bifpn,layers=1,separable=false,edge_convs=true,bn_momentum=0.2,aux=true",
        "semantic/upernet:width=16,adaptors=simple,norm_inputs=true,aux=true",
    ),
    "video/linear": ("video/linear", "video/linear:level=16,norm_inputs=true"),
    "video/temporal": (
        "video/temporal:blocks=2",
        "video/temporal:width=16,attention_heads=4,blocks=1,level=pooled,norm_inputs=true",
    ),
    "video/global": ("video/global:blocks=2,mlp_ratio=1.5", "video/global:blocks=2,window=2,3,3,level=16"),
}
ALL = [form for name in head_names() for form in FORMS.get(name, (name,))]


@pytest.fixture
def source_for(scenes, images, objects, clips) -> Callable[..., MemorySource]:
    """A small source with the targets that a head needs."""
    by_kinds = {
        frozenset({"semantic"}): scenes,
        frozenset({"class"}): images,
        frozenset({"clip"}): clips,
        frozenset({"instances"}): objects,
        frozenset({"instances", "semantic"}): partial(objects, semantic=True),
    }

    def make(form: str, role: str = "training", count: int = 8) -> MemorySource:
        plain_vit = {"blocks": 2} if "adaptors=simple" in form else {}
        return by_kinds[find_head(parse_head(form)[0]).needs](count, role=role, batch_size=4, **plain_vit)

    return make


def _built(form: str, source: MemorySource):
    choice = choose_head(form, source.info, TrainConfig(iterations=1))
    torch.manual_seed(0)
    return choice, choice.head.build(choice.inputs(source.info), choice.options)


@pytest.mark.parametrize("form", ALL)
def test_the_loss_sends_gradient_to_every_parameter_and_none_to_the_features(form: str, source_for):
    source = source_for(form)
    choice, module = _built(form, source)
    batch = to_batch(next(iter(source.blocks(0))), CPU)
    with torch.no_grad():
        for parameter in module.parameters():
            # Weights that begin at zero, as those of deformable attention, hold gradient back from what they weigh.
            parameter.add_(0.01 * torch.randn_like(parameter))
    terms = choice.head.loss(module.train(), batch, choice.options)
    sum(terms.values()).backward()
    assert all(t.ndim == 0 and float(t.detach()) > 0 for t in terms.values())
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(x.grad is None and not x.requires_grad for x in batch.features.values())


@pytest.mark.parametrize("form", ALL)
def test_a_permuted_batch_gives_permuted_predictions(form: str, source_for):
    source = source_for(form, "evaluation")
    choice, module = _built(form, source)
    batch = to_batch(next(iter(source.blocks(0))), CPU)
    order = [2, 0, 3, 1]
    permuted = Batch(
        ids=tuple(batch.ids[i] for i in order),
        views=tuple(batch.views[i] for i in order),
        features={n: x[order] for n, x in batch.features.items()},
        targets={},
    )
    module.eval()
    with torch.inference_mode():
        first = choice.head.predict(module, batch, choice.options)
        second = choice.head.predict(module, permuted, choice.options)
    assert len(first) == len(batch)
    for i, found in zip(order, second, strict=True):
        assert_same(found, first[i])


def assert_same(found: object, expected: object) -> None:
    """Predictions that differ by rounding at most; masks of single pixels may."""
    if not isinstance(expected, Detections):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        return
    assert isinstance(found, Detections)
    assert len(expected) > 0
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
    for one, other in zip(found.masks, expected.masks, strict=True):
        a, b = ({"size": list(expected.size), "counts": mask} for mask in (one, other))
        assert abs(int(area(a)) - int(area(b))) <= 2


@pytest.mark.parametrize("form", ALL)
def test_a_saved_head_predicts_as_before(form: str, source_for, tmp_path):
    source, held = source_for(form), source_for(form, "evaluation")
    config = TrainConfig(iterations=3, batch_size=4)
    run = train(source, [choose_head(form, source.info, config)], config, out=tmp_path, validation=held)[0]
    loaded = load_run(run.folder)
    assert loaded == run
    trained = load_head(loaded)
    metric = trained.metric
    states = []
    for block in held.blocks(0):
        batch = to_batch(block, CPU)
        with torch.inference_mode():
            found = trained.predict(batch)
        for i, p in enumerate(found):
            states.append(metric.observe(p, {path: v[i] for path, v in batch.targets.items()}))
    assert dict(score(metric, stack_states(states)).values) == dict(run.metrics)
    assert metric.primary in run.metrics


@pytest.mark.parametrize("form", ALL)
def test_a_head_reads_no_level_but_those_it_names(form: str, source_for):
    source = source_for(form)
    choice, module = _built(form, source)
    batch = to_batch(next(iter(source.blocks(0))), CPU, levels=choice.levels(source.info.levels))
    choice.head.loss(module, batch, choice.options)
    assert choice.head.predict(module.eval(), batch, choice.options)


@pytest.mark.parametrize("form", ALL)
def test_a_head_ends_with_the_same_weights_alone_and_after_another(form: str, source_for, tmp_path):
    source = source_for(form)
    config = TrainConfig(iterations=3, batch_size=4, lr=3e-3, checkpoint_every=0)
    # The same head under its short name takes every step first, on the same batch.
    both = [choose_head(text, source.info, config) for text in (form.partition("/")[2], form)]
    group = train(source, both, config, out=tmp_path / "group")
    alone = train(source, both[1:], config, out=tmp_path / "alone")
    first, second, single = (load_weights(run) for run in (*group, *alone))
    for name, expected in single.items():
        assert torch.equal(second[name], expected)
        assert torch.equal(first[name], expected)


@pytest.mark.parametrize("form", ALL)
def test_equal_views_of_an_image_score_as_one(form: str, source_for):
    source = source_for(form, "evaluation")
    choice, module = _built(form, source)
    batch = to_batch(next(iter(source.blocks(0))), CPU)
    metric = choice.head.metrics(choice.inputs(source.info), choice.options)
    with torch.inference_mode():
        outputs = choice.head.outputs(module.eval(), batch, choice.options)
        for i, (said, view) in enumerate(zip(outputs, batch.views, strict=True)):
            truth = {path: values[i] for path, values in batch.targets.items()}
            one, two = (choice.head.merge([said] * n, [view] * n, choice.options) for n in (1, 2))
            one, two = metric.observe(one, truth), metric.observe(two, truth)
            for state in one:
                # Counts of pixels: a mean of equal numbers may round at a border between two classes.
                np.testing.assert_allclose(one[state].astype(float), two[state].astype(float), atol=2)
