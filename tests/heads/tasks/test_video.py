import numpy as np
import pytest
import torch

from fcache.cache_spec import LevelSpec, SpecError, TargetSpec
from fcache.heads import TrainConfig, choose_head, choose_heads, find_head, to_batch, train
from fcache.heads.batches import Batch
from fcache.heads.head import HeadInput
from fcache.heads.metrics import score, stack_states
from fcache.heads.parts.clip_heads import default_heads

KINETICS = TargetSpec("clip", "kinetics400", tuple(f"class {i}" for i in range(400)))
BLOCKS = ("temporal:blocks=2", "global:blocks=2", "global:blocks=2,window=2,2,2")


def built(name: str, level: LevelSpec, **options: object) -> torch.nn.Module:
    head = find_head(name)
    torch.manual_seed(0)
    return head.build(HeadInput((level.free(),), (KINETICS,)), {**head.options, **options})


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("video/linear", {}, 0.41),
        ("video/temporal", {}, 50.81),
        ("video/global", {}, 50.81),
        # 15 x 13 x 13 offsets in 32 heads of 4 blocks.
        ("video/global", {"window": (8, 7, 7)}, 50.81 + 4 * 32 * 15 * 13 * 13 / 1e6),
    ],
)
def test_the_paper_s_heads_on_swinv2_b_have_these_parameters(name, options, millions):
    with torch.device("meta"):
        module = built(name, LevelSpec("level-32", "T C H W", (16, 1024, 7, 7), 32), **options)
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    if name != "video/linear":
        assert [block.look.attention.heads for block in module.blocks] == [32] * 4
        assert [block.drop.p for block in module.blocks] == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])


def test_attention_heads_have_32_channels_or_more():
    assert [default_heads(width) for width in (1024, 192, 320, 512, 96, 24, 1000)] == [32, 6, 10, 16, 3, 1, 25]


def test_windows_are_shifted_in_every_other_block():
    module = built("video/global", LevelSpec("x", "T C H W", (16, 8, 7, 7), 32), window=(8, 7, 7))
    assert [block.look.shifted for block in module.blocks] == [False, True, False, True]


def test_blocks_learn_by_heart_clips_that_differ_in_the_order_of_frames_and_a_linear_head_cannot(clips, tmp_path):
    source, held = clips(8, batch_size=8), clips(8, role="evaluation", batch_size=8)
    config = TrainConfig(iterations=50, batch_size=8, lr=2e-2, warmup=5, checkpoint_every=0)
    forms = [
        f"{form},width=16,dropout=0"
        for form in ("temporal:blocks=1", "global:blocks=1", "global:blocks=1,window=5,2,2")
    ]
    choices = choose_heads(["linear", *forms], source.info, config)
    linear, *others = train(source, choices, config, out=tmp_path, validation=held)
    # The mean over frames is the same for all clips: one of four classes is said of each.
    assert linear.metrics["top1"] == 0.25
    assert {run.label: run.metrics["top1"] for run in others} == dict.fromkeys(forms, 1.0)
    assert all(run.losses[-1][1] < 0.2 for run in others)


def test_a_linear_head_learns_clips_by_heart_whose_frames_differ(clips, tmp_path):
    source, held = (clips(8, role=role, batch_size=8, noise=1.0) for role in ("training", "evaluation"))
    config = TrainConfig(iterations=200, batch_size=8, lr=0.3, checkpoint_every=0)
    choice = choose_head("linear:level=16,dropout=0", source.info, config)
    run = train(source, [choice], config, out=tmp_path, validation=held)[0]
    assert run.metrics["top1"] == 1.0


@pytest.mark.parametrize(
    ("form", "golden"),
    [
        ("linear", [1.389791, 1.411834, 1.390985, 1.392565]),
        ("temporal:blocks=2", [1.38248, 1.384802, 1.369532, 1.374889]),
        ("global:blocks=2", [1.381469, 1.389178, 1.366065, 1.383373]),
        ("global:blocks=2,window=2,2,2", [1.383969, 1.406392, 1.39766, 1.378951]),
    ],
)
def test_golden_losses(clips, tmp_path, form: str, golden: list[float]):
    source = clips(8, noise=0.5)
    config = TrainConfig(iterations=4, batch_size=4, lr=0.01, checkpoint_every=0)
    run = train(source, [choose_head(form, source.info, config)], config, out=tmp_path)[0]
    np.testing.assert_allclose([x for _, x in run.losses], golden, rtol=1e-5)


@pytest.mark.parametrize("form", ["linear", *BLOCKS])
def test_of_several_views_the_softmax_is_averaged_whatever_their_order(clips, form: str):
    source = clips(12, role="evaluation", batch_size=12, noise=1.0)
    choice = choose_head(form, source.info, TrainConfig())
    torch.manual_seed(1)
    module = choice.head.build(choice.inputs(source.info), choice.options).eval()
    batch = to_batch(next(iter(source.blocks(0))), torch.device("cpu"))
    with torch.inference_mode():
        # 4 clips x 3 crops of one video.
        outputs = [200 * x for x in choice.head.outputs(module, batch, choice.options)]
    found = choice.head.merge(outputs, batch.views, choice.options)
    by_hand = np.mean([np.exp(x.double().numpy()) / np.exp(x.double().numpy()).sum() for x in outputs], axis=0)
    assert found.shape == (13, 4)
    np.testing.assert_allclose(found[0].softmax(-1).numpy(), by_hand, rtol=1e-5)
    assert torch.equal(found[1:], torch.stack(outputs))
    # Another result than the mean of the logits, for views disagree.
    assert not np.allclose(torch.stack(outputs).mean(0).softmax(-1).numpy(), by_hand, atol=0.01)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(12)
        again = choice.head.merge([outputs[i] for i in order], [batch.views[i] for i in order], choice.options)
        torch.testing.assert_close(again[0], found[0], rtol=1e-6, atol=1e-6)
        metric = choice.head.metrics(choice.inputs(source.info), choice.options)
        truth = {"clip/label": torch.tensor(2)}
        one, other = (score(metric, stack_states([metric.observe(x, truth)])) for x in (found, again))
        assert dict(one.values) == pytest.approx(dict(other.values))


def test_the_vector_of_a_frame_tells_frames_apart(clips):
    source = clips(4)
    choice = choose_head("temporal:blocks=1", source.info, TrainConfig())
    module = choice.head.build(choice.inputs(source.info), choice.options).eval()
    batch = to_batch(next(iter(source.blocks(0))), torch.device("cpu"))
    backwards = Batch(batch.ids, batch.views, {n: x.flip(1) for n, x in batch.features.items()}, batch.targets)
    with torch.inference_mode():
        # At the start they are zero, and nothing does.
        torch.testing.assert_close(module(batch.features), module(backwards.features))
        module.times.normal_()
        assert not torch.allclose(module(batch.features), module(backwards.features), atol=1e-3)


def test_vectors_of_frames_may_begin_as_waves(clips):
    source = clips(4)
    choice = choose_head("temporal:blocks=1,times=sine,width=6", source.info, TrainConfig())
    times = choice.head.build(choice.inputs(source.info), choice.options).times
    # Five frames; wave lengths grow by the cube root of 100.
    lengths = np.array([1, 100 ** (1 / 3), 100 ** (2 / 3)])
    angles = np.arange(5)[:, None] / lengths
    expected = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(5, 6)
    np.testing.assert_allclose(times.detach().numpy(), expected, atol=1e-6)


def test_weight_decay_leaves_alone_what_says_where_something_is(clips):
    source = clips(4)
    choice = choose_head("global:blocks=1,window=2,2,2", source.info, TrainConfig())
    module = choice.head.build(choice.inputs(source.info), choice.options)
    (group,) = choice.head.groups(module, choice.options)
    left = {id(p) for p in group.undecayed}
    decayed = {name for name, p in module.named_parameters() if id(p) not in left}
    attention = {f"blocks.0.look.attention.{name}.weight" for name in ("query", "key", "value", "out")}
    assert decayed == attention | {"blocks.0.expand.weight", "blocks.0.contract.weight", "classify.linear.weight"}


def test_blocks_read_the_last_map_with_frames_and_a_linear_head_the_last_level(clips):
    info = clips(4).info
    levels = {name: choose_head(name, info, TrainConfig()).levels(info.levels) for name in ("linear", *BLOCKS)}
    assert levels == {"linear": ("pooled",), **dict.fromkeys(BLOCKS, ("level-32",))}
    assert choose_head("temporal:level=pooled", info, TrainConfig()).levels(info.levels) == ("pooled",)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("temporal:blocks=0", "blocks and mlp_ratio are positive"),
        ("temporal:width=-1", "not negative"),
        ("temporal:attention_heads=3", "divide the width, 8; got 3"),
        ("temporal:drop_path=1", r"drop_path is in \[0, 1\)"),
        ("linear:dropout=1.5", r"dropout is in \[0, 1\)"),
        ("temporal:times=cosine", "times is one of zero, sine, got 'cosine'"),
        ("global:window=8,7", "frames, rows and columns"),
        ("global:window=8,7,0", "frames, rows and columns"),
        ("global:level=31", "level '31'"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_head_is_chosen(clips, form: str, message: str):
    with pytest.raises(SpecError, match=message):
        choose_head(form, clips(4).info, TrainConfig())


def test_blocks_need_frames():
    head = find_head("video/temporal")
    with pytest.raises(SpecError, match="looks along time, level 'pooled' has the axes 'C'"):
        head.check(HeadInput((LevelSpec("pooled", "C", (8,), 32),), (KINETICS,)), head.options)
