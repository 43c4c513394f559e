"""`fcache convert`, and what a giant model without weights says."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from fcache.cli.app import main
from fcache.extractor.backbones import giant
from fcache.extractor.scenes import write_scenes


def test_convert_says_what_it_wrote_and_what_it_left_out(tmp_path: Path, capsys) -> None:
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save({"state_dict": state, "epoch": 1, "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    line = ["convert", str(tmp_path / "c.pth"), str(tmp_path / "w.safetensors"), "--model", "test_resnet"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'w.safetensors'}: ")
    assert "left out: epoch, optimizer" in out
    assert set(safetensors.torch.load_file(tmp_path / "w.safetensors")) < set(state)
    assert main(line) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*line, "--force"]) == 0
    assert main([*line[:-1], "test_vit", "--force"]) == 1
    assert "does not hold weights of test_vit" in capsys.readouterr().err


def test_the_giant_without_weights_is_a_usage_error_that_names_the_ways_out(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A small one: its name is what is looked at.
    monkeypatch.setattr(giant, "_SHAPE", {**giant._SHAPE, "embed_dim": 16, "num_heads": (1, 2, 4, 8)})
    write_scenes(tmp_path / "data", train=1, val=1, size=(32, 32))
    line = ["extract", "--model", "swinv2-g", "--dataset", "ade20k", "--data-root", str(tmp_path / "data")]
    assert main([*line, "--cache", str(tmp_path / "g.fcache")]) == 2
    error = capsys.readouterr().err
    assert "no weights of swinv2-g are public" in error
    for way in ("--weights FILE", "fcache convert", "random:0", "swinv2-l"):
        assert way in error
    assert not (tmp_path / "g.fcache").exists()
