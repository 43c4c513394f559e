"""The benchmark of training steps runs, keeps rows, and does the product's steps on equal batches."""

import json
from dataclasses import replace
from itertools import chain, islice
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fcache.heads import TrainConfig, choose_head, train

BACKBONE, HEADS = "test_resnet", ("linear", "upernet:width=8")
CPU = torch.device("cpu")


@pytest.fixture
def script():
    import head_steps

    return head_steps


@pytest.fixture
def settings(script):
    return script.Settings(
        "cpu", batch=2, records=4, rounds=2, seconds=0.0, steps=3, threads=1, precision="bf16",
        input_size=(64, 64), photo=(64, 85), heads=HEADS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
def data(settings, stores):
    return settings.data(BACKBONE, stores)


@pytest.fixture
def work(data, tmp_path):
    """A folder with the scenes and caches of all tests, and no rows."""
    data.work.mkdir(exist_ok=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / data.work.name).symlink_to(data.work)
    return tmp_path / "work"


def test_every_row_is_measured_once_and_says_what_it_is_made_of(script, settings, work):
    result = script.measure(work, settings, (BACKBONE,), [])
    rows = result["rows"][BACKBONE]
    assert list(rows) == [script.BACKBONE, *HEADS, script.ALL]
    assert all(rows[script.BACKBONE][f"{name}_ms"] > 0 for name in ("bf16", "fp32", "decoding"))
    b = rows[script.BACKBONE]["b"]
    assert b > 0
    for head, row in list(rows.items())[1:]:
        assert row["b"] == b
        assert row["bound"] == pytest.approx(1 + b / (3 * row["h"]))
        assert set(row["seconds"]) == ({"int8", "fp16", "live"} if head == "linear" else {"int8", "live"})
        assert {len(found) for found in row["seconds"].values()} == {1 if head == script.ALL else 2}
        assert 0 <= row["int8_wait"] <= 1
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
    for name in ("parameters", "h"):
        assert rows[script.ALL][name] == pytest.approx(sum(rows[head][name] for head in HEADS))

    files = {p: p.stat().st_mtime_ns for p in (work / "rows").iterdir()}
    assert len(files) == 4
    again = script.measure(work, settings, (BACKBONE,), [])
    assert again == result
    assert {p: p.stat().st_mtime_ns for p in (work / "rows").iterdir()} == files
    # Rows of other settings are no rows of these.
    assert script.measure(work, replace(settings, seconds=0.1), (BACKBONE,), ["nothing"])["rows"] == {}
    text = script.tables(result)
    assert text.count("\n| ") == 2 + 1 + len(HEADS) + 1
    assert f"| {script.ALL} |" in text


TINY = "maskrcnn:width=8,box_units=16,rois=16,candidates=50,50,proposals=20,mask_convs=1"


def test_detectors_are_measured_on_scenes_of_coco(script, settings, tmp_path):
    settings = replace(settings, task="coco", heads=(TINY,), steps=1, rounds=1)
    result = script.measure(tmp_path, settings, (BACKBONE,), ["*maskrcnn*"])
    (row,) = result["rows"][BACKBONE].values()
    assert set(row["seconds"]) == {"int8", "fp16", "live"}
    assert "bound" not in row
    assert min(row["int8_peak"], row["live_peak"]) > 0.1
    assert row["parameters"] > 0.01
    info = settings.data(BACKBONE, tmp_path).cached("int8").info
    assert (info.target("instances").kind, len(info.target("instances").class_names)) == ("instances", 80)
    assert "9.74G" in result["what"]
    assert "80 classes" in result["what"]


def test_peaks_are_those_of_a_stretch_of_work():
    from training.memory import forget_peak, peak_memory

    forget_peak(CPU)
    before = peak_memory(CPU)
    large = torch.ones(50_000_000)
    assert peak_memory(CPU) - before > 150_000_000
    del large
    forget_peak(CPU)
    assert peak_memory(CPU) - before < 50_000_000


def test_one_row_can_be_run_alone(script, settings, work):
    def names(*only):
        rows = script.measure(work, settings, (BACKBONE, "not a model"), list(only))["rows"]
        return {name: list(found) for name, found in rows.items()}

    assert names(f"{BACKBONE}/lin*") == {BACKBONE: ["linear"]}
    # Rows that were measured stay in the table.
    assert names("nothing") == {BACKBONE: ["linear"]}
    assert names(f"{BACKBONE}/{HEADS[1]}") == {BACKBONE: list(HEADS)}
    assert names("lin*", f"{BACKBONE}/l") == {BACKBONE: list(HEADS)}


def twice(source):
    """A source with its first block before all others: `steps` leaves the first one out."""

    def blocks(epoch, *, epochs):
        return chain(islice(source.blocks(epoch), 1), source.blocks(epoch, epochs=epochs))

    return SimpleNamespace(info=source.info, blocks=blocks)


def test_its_steps_are_those_of_train_and_live_batches_are_the_cached_ones(data, tmp_path):
    from training.sources import decoded_once, one_batch
    from training.steps import learner, steps

    config = TrainConfig(iterations=6, batch_size=2, seed=3, checkpoint_every=0)
    cached, live = data.cached("fp32"), data.live()
    choice = choose_head(HEADS[1], cached.info, config)
    (run,) = train(cached, [choice], config, out=tmp_path / "runs", allow_random_backbone=True)
    expected = [loss for _, loss in run.losses]
    assert len(set(expected)) == 6
    sources = {"cached": cached, "live": live, "decoded": decoded_once(live)}
    for name, source in sources.items():
        stream = steps(twice(source), [learner(choice, source, CPU)], CPU)
        assert [losses[0] for _, _, losses in islice(stream, 6)] == expected, name
        stream.close()
    stays = one_batch(cached, CPU)
    stream = steps(stays, [learner(choice, stays, CPU)], CPU)
    first, second = (losses[0] for _, _, losses in islice(stream, 2))
    stream.close()
    assert first == expected[0]
    assert second < first


def test_views_that_lie_in_memory_are_not_decoded_again(data, monkeypatch):
    from training.sources import decoded_once

    from fcache.extractor import decoding

    live = decoded_once(data.live())
    monkeypatch.setattr(decoding, "load_sample", None)
    assert sum(len(block.ids) for block in live.blocks(0)) == 4


@pytest.mark.parametrize(("count", "counted"), [(1, [5.0]), (2, [3.0]), (5, [3.0, 3.0, 1.0])])
def test_a_turn_leaves_out_what_was_read_ahead_in_its_pause(monkeypatch, count, counted):
    from training import steps

    now = 0.0

    def stream():
        nonlocal now
        for seconds in [5.0] if count == 1 else [5.0, 3.0] if count == 2 else [5.0, 4.0, 3.0, 3.0, 1.0]:
            now += seconds
            yield seconds, 0.5, []

    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: now))
    seconds, waited = steps.turn(stream(), count, CPU)
    assert seconds == sum(counted) / len(counted)
    assert waited == pytest.approx(0.5 * len(counted) / sum(counted))


def test_ratios_are_of_steps_in_one_round(script):
    # The machine is three times slower in the second round.
    seconds = {"int8": [1.0, 3.0, 1.0], "fp16": [2.0, 6.0, 2.0], "one batch": [0.5, 1.5, 0.5], "live": [2.0, 6.0, 4.0]}
    waits = {name: [0.1, 0.2, 0.3] for name in seconds}
    row = script.summary(seconds, waits, 7)
    assert (row["ratio"], row["low"], row["high"]) == (2.0, 2.0, 4.0)
    assert (row["int8_ms"], row["live_ms"], row["rounds"], row["steps"]) == (1000.0, 4000.0, 3, 7)
    assert (row["int8_beyond"], row["fp16_beyond"]) == (0.5, 0.75)
    assert (row["int8_wait"], row["fp16_wait"]) == (0.2, 0.2)


def test_multiply_adds_are_of_one_sample_and_of_the_forward_pass():
    from training.steps import head_macs

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(5, 7, 3, padding=1), nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1))

        def forward(self, features):
            return self.body(features["level-4"])

    module = Module()
    batch = SimpleNamespace(features={"level-4": torch.ones(3, 5, 10, 20)})
    assert head_macs(module, batch) == pytest.approx(200 * (5 * 7 * 9 + 7 * 2) / 1e9)
    assert module.training


def test_results_are_two_files_named_by_the_machine(script, settings, work, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "BACKBONES", (BACKBONE,))
    monkeypatch.setattr(script, "default_settings", lambda device, task: settings)
    arguments = ["--work", str(work), "--device", "cpu", "--out", str(tmp_path / "results"), "--only"]
    monkeypatch.setattr("sys.argv", ["benchmarks/head_steps.py", *arguments, "*/linear"])
    script.main()
    (markdown,) = (tmp_path / "results").glob("head_steps_*cpu_*.md")
    assert "`python benchmarks/head_steps.py --device cpu --only */linear`" in markdown.read_text()
    assert markdown.read_text() in capsys.readouterr().out
    assert list(json.loads(markdown.with_suffix(".json").read_text())["rows"][BACKBONE]) == ["linear"]
    # A batch of another size: what was measured is no row of it.
    monkeypatch.setattr("sys.argv", ["benchmarks/head_steps.py", *arguments, "nothing", "--batch", "1"])
    with pytest.raises(SystemExit):
        script.main()
    assert "there is no row nothing" in capsys.readouterr().err
