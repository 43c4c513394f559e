import numpy as np
import pytest
import torch

from fcache.cache_spec import LevelSpec, SpecError, TargetSpec
from fcache.cache_spec.testing import memory_source
from fcache.heads import TrainConfig, choose_head, choose_heads, find_head, train
from fcache.heads.head import HeadInput
from fcache.heads.runs import load_weights

LRS = (1e-3, 1e-2, 1e-1)


@pytest.mark.parametrize("extra", ["", ",bn=true"])
def test_stacked_learning_rates_end_as_if_trained_one_by_one(images, tmp_path, extra: str):
    source = images(32)
    config = TrainConfig(iterations=20, batch_size=8, clip=0.5, weight_decay=0.05)
    texts = [f"linear:lrs={','.join(map(str, LRS))}{extra}", *(f"linear:lrs={lr}{extra}" for lr in LRS)]
    stacked, *single = train(source, choose_heads(texts, source.info, config), config, out=tmp_path)
    together = load_weights(stacked)
    for k, run in enumerate(single):
        alone = load_weights(run)
        torch.testing.assert_close(together[f"weights.{k}"], alone["weights.0"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(together[f"biases.{k}"], alone["biases.0"], rtol=1e-6, atol=1e-6)
        assert stacked.loss_terms[f"lr={LRS[k]:g}"] == pytest.approx(run.loss_terms[f"lr={LRS[k]:g}"], rel=1e-5)


def test_a_probe_without_lrs_has_the_configured_one(images, tmp_path):
    source = images(32)
    config = TrainConfig(iterations=5, batch_size=8, lr=0.01)
    plain, listed = train(
        source, choose_heads(["linear", "linear:lrs=0.01"], source.info, config), config, out=tmp_path
    )
    assert torch.equal(load_weights(plain)["weights.0"], load_weights(listed)["weights.0"])


def test_the_probe_learns_and_reports_the_best_learning_rate_and_each(images, tmp_path):
    source, held = images(64), images(40, role="evaluation", seed=5)
    config = TrainConfig(iterations=60, batch_size=8, weight_decay=0.0)
    choice = choose_head("linear:lrs=1e-9,0.03", source.info, config)
    run = train(source, [choice], config, out=tmp_path, validation=held)[0]
    assert run.evaluations[-1].chosen == "lr=0.03"
    assert run.metrics["top1"] == run.metrics["top1/lr=0.03"] > 0.9
    assert run.metrics["top1/lr=1e-09"] < 0.7
    assert run.metrics["top5"] == 1.0


def test_the_last_level_is_averaged_unless_another_is_named(images):
    source = images(4, batch_size=4)
    features = {name: torch.from_numpy(x) for name, x in source.features.items()}
    head = find_head("classification/linear")
    for level in ("", "level-16"):
        options = {**head.options, "level": level}
        choice = choose_head(f"linear:level={level}" if level else "linear", source.info, TrainConfig())
        module = head.build(choice.inputs(source.info), options)
        expected = features[level or "level-32"].mean((2, 3)) @ module.weights[0].T
        torch.testing.assert_close(module(features)[0], expected)


def test_vectors_and_clips_are_read_as_they_come():
    head = find_head("classification/linear")
    target = (TargetSpec("class", "test", ("a", "b", "c")),)
    for dims, shape in (("C", (6,)), ("T C H W", (3, 6, 2, 2))):
        module = head.build(HeadInput((LevelSpec("x", dims, shape, 32),), target), head.options)
        assert module({"x": torch.randn(4, *shape)}).shape == (1, 4, 3)


def test_features_of_pooled_vectors_train(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(24, dtype=np.int32) % 3
    x = (np.eye(3)[labels] @ rng.normal(size=(3, 5)) + 0.01 * rng.normal(size=(24, 5))).astype(np.float32)
    specs = (TargetSpec("class", "test", ("a", "b", "c")),)
    both = [
        memory_source({"pooled": x}, {"class/label": labels}, strides={"pooled": 32}, specs=specs, batch_size=8, role=r)
        for r in ("training", "evaluation")
    ]
    config = TrainConfig(iterations=60, batch_size=8, lr=0.1)
    run = train(both[0], [choose_head("linear", both[0].info, config)], config, out=tmp_path, validation=both[1])[0]
    assert run.metrics["top1"] == 1.0


@pytest.mark.parametrize("lrs", ["0.1,0.1", "0.1,-1"])
def test_learning_rates_are_positive_and_different(images, lrs: str):
    with pytest.raises(SpecError, match="different positive"):
        choose_head(f"linear:lrs={lrs}", images(8).info, TrainConfig())


def test_golden_losses_of_the_probe(images, tmp_path):
    source = images(32)
    config = TrainConfig(iterations=4, batch_size=8, lr=0.1, checkpoint_every=0)
    run = train(source, [choose_head("linear:bn=true", source.info, config)], config, out=tmp_path)[0]
    golden = [1.6125574111938477, 1.174057126045227, 0.9142495393753052, 0.853069007396698]
    np.testing.assert_allclose([x for _, x in run.losses], golden, rtol=1e-5)
