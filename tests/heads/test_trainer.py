import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fcache.cache_spec import IncompatibleError, SpecError
from fcache.heads import TrainConfig, choose_heads, events, find_head, load_run, to_batch, train
from fcache.heads.head import ParameterGroup
from fcache.heads.runs import load_weights
from fcache.heads.tasks import semantic

CONFIG = TrainConfig(iterations=12, batch_size=4, lr=3e-3, clip=1.0, warmup=2, checkpoint_every=5)
THREE = ["linear", "upernet:width=8,dropout=0.5", "upernet:width=8,aux=true,dropout=0.3"]


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _train(source, texts, out, config=CONFIG, **more):
    return train(source, choose_heads(texts, source.info, config), config, out=out, **more)


@pytest.mark.parametrize("text", THREE)
def test_a_head_ends_with_the_same_weights_alone_and_among_three(scenes, tmp_path, text: str):
    source = scenes(12, role="training")
    group = _train(source, THREE, tmp_path / "group", validation=scenes(4, role="evaluation"))
    torch.rand(17)  # What else draws random numbers does not matter either.
    alone = _train(source, [text], tmp_path / "alone")[0]
    assert _same(load_weights(group[THREE.index(text)]), load_weights(alone))


def test_training_leaves_the_global_random_state_alone(scenes, tmp_path):
    before = torch.get_rng_state()
    _train(scenes(8), THREE[1:2], tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_weights(scenes, tmp_path):
    one = _train(scenes(8), THREE[:1], tmp_path, CONFIG)[0]
    two = _train(scenes(8), THREE[:1], tmp_path, replace(CONFIG, seed=1))[0]
    assert one.folder != two.folder
    assert not _same(load_weights(one), load_weights(two))


def test_evaluating_on_the_way_changes_no_weight(scenes, tmp_path):
    held = scenes(4, role="evaluation")
    often = _train(scenes(8), THREE[1:2], tmp_path / "a", replace(CONFIG, evaluate_every=3), validation=held)[0]
    never = _train(scenes(8), THREE[1:2], tmp_path / "b")[0]
    assert [e.iteration for e in often.evaluations] == [3, 6, 9, 12]
    assert _same(load_weights(often), load_weights(never))


class _StopAfter:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("steps", [1, 5, 11])
def test_a_stopped_training_resumes_to_the_same_weights_and_scores(scenes, tmp_path, steps: int):
    source, held = scenes(12), scenes(4, role="evaluation")
    config = replace(CONFIG, evaluate_every=4)
    whole = _train(source, THREE, tmp_path / "whole", config, validation=held)
    stopped = _train(source, THREE, tmp_path / "parts", config, validation=held, should_stop=_StopAfter(steps))
    assert {run.status for run in stopped} == {"interrupted"}
    assert not list(tmp_path.glob("parts/*/run.json"))
    resumed = _train(source, THREE, tmp_path / "parts", config, validation=held, resume=True)
    for a, b in zip(whole, resumed, strict=True):
        assert _same(load_weights(a), load_weights(b))
        assert (a.evaluations, a.losses, a.loss_terms) == (b.evaluations, b.losses, b.loss_terms)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from fcache.cache_spec import TargetSpec
from fcache.cache_spec.testing import memory_source
from fcache.heads import TrainConfig, choose_heads, events, train
rng = np.random.default_rng(0)
source = memory_source(
    {"level-4": rng.normal(size=(8, 6, 8, 8)).astype(np.float32)},
    {"semantic/map": rng.integers(0, 3, (8, 32, 32)).astype(np.uint8)},
    strides={"level-4": 4}, specs=(TargetSpec("semantic", "noise", ("a", "b", "c")),), batch_size=4,
)
config = TrainConfig(iterations=10, batch_size=4, checkpoint_every=2)
heads = choose_heads(["linear", "upernet:width=8"], source.info, config)
def report(event):
    if isinstance(event, events.StepDone) and event.iteration == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
train(source, heads, config, out=Path(sys.argv[1]), report=report, resume=True)
"""


def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), "5"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -9
    # As if it was killed between two checkpoints: this head goes on from an earlier iteration than the other.
    (tmp_path / "killed" / "linear-seed0" / "checkpoint.pt").unlink()
    for out in ("killed", "whole"):
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / out), "0"])
        exec(KILLED, {})
    for head in ("linear-seed0", "upernet-width=8-seed0"):
        one, other = load_run(tmp_path / "killed" / head), load_run(tmp_path / "whole" / head)
        assert _same(load_weights(one), load_weights(other))
        assert one.losses == other.losses


def test_resuming_leaves_finished_runs_as_they_are_and_trains_added_heads(scenes, tmp_path):
    first = _train(scenes(8), THREE[:1], tmp_path)
    written = (first[0].folder / "run.json").read_bytes()
    both = _train(scenes(8), THREE[:2], tmp_path, resume=True)
    assert both[0] == load_run(first[0].folder)
    assert (first[0].folder / "run.json").read_bytes() == written
    assert both[1].status == "finished"


@pytest.mark.parametrize("finished", [True, False])
def test_what_is_there_is_never_overwritten_or_mixed(scenes, tmp_path, finished: bool):
    source = scenes(8)
    stop = _StopAfter(99 if finished else 3)
    _train(source, THREE[:1], tmp_path, should_stop=stop)
    with pytest.raises(SpecError, match="--resume"):
        _train(source, THREE[:1], tmp_path)
    with pytest.raises(IncompatibleError, match=r"train\.lr = 0\.003, now 0\.5"):
        _train(source, THREE[:1], tmp_path, replace(CONFIG, lr=0.5), resume=True)
    with pytest.raises(IncompatibleError, match=r"extent\.samples = 8, now 4"):
        _train(scenes(4), THREE[:1], tmp_path, resume=True)


def _poisoned(monkeypatch, at: int, value):
    """Makes the loss of heads with an auxiliary part go wrong at one call."""
    real, calls = semantic._loss, []

    def loss(module, batch, options):
        terms = real(module, batch, options)
        if options.get("aux"):
            calls.append(1)
            if len(calls) == at:
                terms["pixels"] = value(terms["pixels"])
        return terms

    head = find_head("semantic/upernet")
    monkeypatch.setitem(semantic.HEADS, "upernet", replace(head, loss=loss))


def _fail(x):
    raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda x: x * float("nan"), "loss is nan at iteration 4"),
        (lambda x: x + float("inf"), "loss is inf at iteration 4"),
        (lambda x: x * 0 + (x - x).sqrt(), "gradient's norm is nan at iteration 4"),
        (_fail, r"RuntimeError: out of luck \(test_trainer.py:\d+\)"),
    ],
)
def test_a_head_that_fails_stops_alone_and_is_recorded(scenes, tmp_path, monkeypatch, value, reason: str):
    source, held = scenes(12), scenes(4, role="evaluation")
    whole = _train(source, THREE[:2], tmp_path / "two", validation=held)
    _poisoned(monkeypatch, 4, value)
    seen: list[object] = []
    runs = _train(source, THREE, tmp_path / "three", validation=held, report=seen.append)
    assert [run.status for run in runs] == ["finished", "finished", "stopped"]
    for a, b in zip(whole, runs[:2], strict=True):
        assert _same(load_weights(a), load_weights(b))
        assert a.metrics == b.metrics
    stopped = load_run(runs[2].folder)
    assert stopped == runs[2]
    assert stopped.iterations == 3
    assert re.search(reason, stopped.reason)
    assert [e.label for e in seen if isinstance(e, events.HeadStopped)] == [THREE[2]]


@pytest.mark.parametrize(
    ("undecayed", "decay_norms", "shrunk"),
    [
        (None, False, {"classify.0.weight"}),
        (("classify.0.weight", "norms.0.weight"), False, {"classify.0.bias", "norms.0.bias"}),
        (("classify.0.weight",), True, {"classify.0.weight", "classify.0.bias", "norms.0.weight", "norms.0.bias"}),
    ],
)
def test_a_head_may_name_what_weight_decay_leaves_alone(
    scenes, tmp_path, monkeypatch, undecayed, decay_norms: bool, shrunk: set[str]
):
    head = find_head("semantic/linear")

    def build(inputs, options):
        module = head.build(inputs, options)
        for parameter in module.parameters():
            nn.init.ones_(parameter)
        return module

    def loss(module, batch, options):
        # Without gradient only the decay moves a weight.
        return {name: 0 * term for name, term in head.loss(module, batch, options).items()}

    def groups(module, options):
        named = dict(module.named_parameters())
        left = None if undecayed is None else tuple(named[name] for name in undecayed)
        return (ParameterGroup(tuple(named.values()), undecayed=left),)

    monkeypatch.setitem(semantic.HEADS, "linear", replace(head, build=build, loss=loss, groups=groups))
    config = TrainConfig(iterations=1, batch_size=4, lr=0.1, weight_decay=0.5, decay_norms=decay_norms)
    run = _train(scenes(4, strides=(4,)), ["linear"], tmp_path, config)[0]
    weights = {name: t for name, t in load_weights(run).items() if name.endswith(("weight", "bias"))}
    assert {name for name, t in weights.items() if torch.equal(t, torch.full_like(t, 1 - 0.1 * 0.5))} == shrunk
    assert all(torch.equal(t, torch.ones_like(t)) for name, t in weights.items() if name not in shrunk)


def test_a_head_that_cannot_be_scored_stops_alone(scenes, tmp_path, monkeypatch):
    def merge(outputs, views, options):
        raise RuntimeError("no prediction")

    monkeypatch.setitem(semantic.HEADS, "linear", replace(find_head("semantic/linear"), merge=merge))
    runs = _train(scenes(8), THREE[:2], tmp_path, validation=scenes(4, role="evaluation"))
    assert [run.status for run in runs] == ["stopped", "finished"]
    assert "no prediction" in runs[0].reason


def test_weights_that_are_not_finite_are_never_a_finished_run(scenes, tmp_path, monkeypatch):
    class Broken(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("scale", torch.tensor(float("nan")))

        def forward(self, features):
            return self.inner(features)

    head = find_head("semantic/linear")
    broken = replace(head, build=lambda inputs, options: Broken(head.build(inputs, options)))
    monkeypatch.setitem(semantic.HEADS, "linear", broken)
    run = _train(scenes(8), THREE[:1], tmp_path)[0]
    assert run.status == "stopped"
    assert "'scale' are not finite" in run.reason


def test_all_heads_failing_ends_the_training(scenes, tmp_path, monkeypatch):
    _poisoned(monkeypatch, 2, _fail)
    steps: list[object] = []
    run = _train(scenes(8), THREE[2:], tmp_path, report=steps.append)[0]
    assert run.status == "stopped"
    assert sum(isinstance(e, events.StepDone) for e in steps) == 1


def test_norms_and_biases_are_decayed_only_when_asked(scenes, tmp_path):
    source = scenes(8)
    base = replace(CONFIG, clip=0.0, weight_decay=0.0)
    runs = {
        name: load_weights(_train(source, ["linear"], tmp_path / name, config)[0])
        for name, config in {
            "none": replace(base, iterations=1),
            "weights": replace(base, iterations=1, weight_decay=0.5),
            "all": replace(base, iterations=1, weight_decay=0.5, decay_norms=True),
        }.items()
    }
    for name in runs["none"]:
        if name.startswith(("norms", "classify")) and name.endswith(("weight", "bias")):
            one_axis = runs["none"][name].ndim == 1
            assert torch.equal(runs["none"][name], runs["weights"][name]) == one_axis
    assert not torch.equal(runs["none"]["norms.0.weight"], runs["all"]["norms.0.weight"])


def test_one_step_is_torch_adamw_with_clipping_and_warmup(scenes, tmp_path):
    source = scenes(4)
    config = replace(CONFIG, iterations=1, clip=0.01, warmup=4, weight_decay=0.1)
    (choice,) = choose_heads(["linear"], source.info, config)
    run = train(source, [choice], config, out=tmp_path)[0]
    torch.manual_seed(config.seed)
    module = choice.head.build(choice.inputs(source.info), choice.options)
    decayed = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr / 4)
    batch = to_batch(next(iter(source.blocks(0))), torch.device("cpu"))
    sum(choice.head.loss(module, batch, choice.options).values()).backward()
    assert float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01)) > 0.01
    optimizer.step()
    assert _same(load_weights(run), module.state_dict())


def test_a_run_records_what_it_was(scenes, tmp_path):
    source, held = scenes(8), scenes(4, role="evaluation")
    seen: list[object] = []
    config = replace(CONFIG, evaluate_every=6)
    run = _train(
        source,
        ["upernet:width=8"],
        tmp_path,
        config,
        validation=held,
        recipe="mine",
        hints={"cache": "x.fcache"},
        report=seen.append,
    )[0]
    record = json.loads((run.folder / "run.json").read_text())
    assert record["head"] == "semantic/upernet"
    assert record["features_key"] == source.info.features.key
    assert record["recipe"] == "mine"
    assert record["hints"] == {"cache": "x.fcache"}
    assert record["extent"] == {"training": {"samples": 8, "views": 1}, "validation": {"samples": 4, "views": 1}}
    assert record["options"]["width"] == 8
    assert [e["iteration"] for e in record["evaluations"]] == [6, 12]
    assert len(record["evaluations"][-1]["per_class"]["iou"]) == 5
    assert record["cost"]["parameters"] == sum(p.numel() for p in _built(run).parameters())
    assert 0 <= record["cost"]["data_wait_share"] < 1
    assert record["cost"]["peak_memory"] > 1e7
    assert record["losses"][-1][0] == 12
    assert sorted(p.name for p in run.folder.iterdir()) == ["run.json", "states.npz", "weights.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == [run.folder.name]
    kinds = {type(e) for e in seen}
    assert kinds == {
        events.TrainingStarted,
        events.StepDone,
        events.EpochDone,
        events.CheckpointDone,
        events.EvaluationStep,
        events.EvaluationDone,
        events.RunDone,
    }
    assert all(dataclasses.is_dataclass(e) for e in seen)


def _built(run):
    return find_head(run.head).build(run.inputs, run.options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda scenes: (scenes(8, random_weights="random:0"), None), "--allow-random-backbone"),
        (lambda scenes: (scenes(8, role="evaluation"), None), "evaluation split"),
        (lambda scenes: (replace(scenes(3), drop_last=True), None), "less than one batch"),
        (lambda scenes: (scenes(8, batch_size=8), None), "batches of 8, the config says 4"),
        (lambda scenes: (scenes(8), scenes(8, encoding="int8", role="evaluation")), "different features"),
    ],
)
def test_bad_sources_are_refused_and_leave_nothing_behind(scenes, tmp_path, make, message: str):
    source, held = make(scenes)
    with pytest.raises((SpecError, IncompatibleError), match=message):
        _train(source, THREE[:1], tmp_path, validation=held)
    assert not list(tmp_path.iterdir())


def test_random_weights_train_when_allowed_and_are_recorded(scenes, tmp_path):
    source = scenes(8, random_weights="random:3")
    assert _train(source, THREE[:1], tmp_path, allow_random_backbone=True)[0].random_weights == "random:3"


def test_an_output_folder_that_cannot_be_written_is_found_before_the_first_step(scenes, tmp_path):
    (tmp_path / "file").write_text("")
    steps: list[object] = []
    with pytest.raises(Exception, match="cannot write"):
        _train(scenes(8), THREE[:1], tmp_path / "file", report=steps.append)
    assert steps == []
