"""The benchmarks of SwinV2: what they compare is equal, and what they count is counted."""

import pytest
import torch


@pytest.fixture
def settings():
    from swin_inference import Settings

    return Settings(torch.device("cpu"), "fp32", batch=1, rounds=2)


def test_a_block_and_its_attention_are_compared_with_timms(settings, monkeypatch):
    import swin_inference

    monkeypatch.setattr(swin_inference, "BLOCK_CHANNELS", 32)
    monkeypatch.setattr(swin_inference, "BLOCK_HEADS", 4)
    rows = dict(swin_inference.block_rows((40, 20), 20, True, settings))
    assert set(rows) == {"block", "its attention"}
    for row in rows.values():
        assert 0 < row["apart"] < 1e-5
        assert row["low"] <= row["ratio"] <= row["high"]
        assert len(row["seconds"]["ours"]) == len(row["seconds"]["timm"]) == 2


def test_a_backbone_is_compared_with_timms_on_the_same_weights(settings, monkeypatch):
    import swin_inference

    monkeypatch.setattr(swin_inference, "ON_CPU", (("swinv2-t", 64, None),))
    rows = swin_inference.measure(settings, "swinv2-t*", lambda name, row: None)
    assert rows["swinv2-t, 64 x 64"]["apart"] == 0
    assert swin_inference.measure(settings, "resnet*", lambda name, row: None) == {}


def test_patches_are_the_same_in_every_layout(settings):
    import swin_inference

    assert set(swin_inference.patch_row(8, settings)) == {"first_ms", "last_ms", "linear_ms"}


def test_a_command_is_run_and_its_memory_counted():
    import swin_giant

    found = swin_giant.run(["--version"])
    assert found["status"] == 0
    assert 0 < found["gib"] < 1
    assert found["cpu"] > 0
    assert swin_giant.run(["extract"])["status"] == 2
