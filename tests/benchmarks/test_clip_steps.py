"""The benchmark of training steps on clips runs, keeps rows, and live batches are the cached ones."""

from itertools import islice

import pytest
import torch

from fcache.heads import TrainConfig, choose_head

BACKBONE = "test_resnet"


def test_every_head_is_measured_once_on_equal_clips(tmp_path, monkeypatch, capsys):
    import clip_steps
    from training.clips import ClipData
    from training.steps import learner, steps

    heads = ("linear", "global")
    settings = clip_steps.Settings(
        "cpu", batch=2, records=4, rounds=2, seconds=0.0, steps=1, threads=1, precision="fp32",
        input_size=(32, 32), heads=heads,
    )  # fmt: skip
    result = clip_steps.measure(tmp_path, settings, (BACKBONE,), [])
    rows = result["rows"][BACKBONE]
    assert list(rows) == ["linear", "global"]
    for row in rows.values():
        assert row["bound"] == pytest.approx(1 + row["b"] / (3 * row["h"]))
        assert 0 < row["low"] <= row["ratio"] <= row["high"]
        assert 0 <= row["int8_wait"] <= 1
    assert rows["linear"]["b"] == rows["global"]["b"]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()}
    assert clip_steps.measure(tmp_path, settings, (BACKBONE,), []) == result
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "rows").iterdir()} == files
    # What was measured stays in the table, also if only another row is asked for.
    assert (
        clip_steps.measure(tmp_path, settings, (BACKBONE, "not a model"), [f"{BACKBONE}/x*"])["rows"] == result["rows"]
    )

    (folder,) = tmp_path.glob("clips-cpu-*")
    data = ClipData(folder, BACKBONE, records=4, batch=2, device="cpu", precision="fp32", input_size=(32, 32))
    sources = data.cached("fp32"), data.live()
    assert len(sources[0].info.target("clip").class_names) == 400
    choice = choose_head("linear", sources[0].info, TrainConfig(iterations=3, batch_size=2))
    losses = []
    for source in sources:
        stream = steps(source, [learner(choice, source, torch.device("cpu"))], torch.device("cpu"))
        losses.append([loss for _, _, (loss,) in islice(stream, 3)])
        stream.close()
    assert losses[0] == losses[1]

    monkeypatch.setattr(clip_steps, "BACKBONES", (BACKBONE,))
    monkeypatch.setattr(clip_steps, "default_settings", lambda device: settings)
    monkeypatch.setattr(
        "sys.argv", ["benchmarks/clip_steps.py", "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    clip_steps.main()
    (markdown,) = (tmp_path / "out").glob("clip_steps_*.md")
    assert markdown.read_text() in capsys.readouterr().out
    assert markdown.read_text().count("\n| ") == 1 + len(rows)
