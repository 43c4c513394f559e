"""Test-time views and predictions on street scenes with a trained backbone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cli import main


@pytest.fixture(scope="module")
def run(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear head on MobileNetV2, trained for a moment on eight scenes."""
    folder = tmp_path_factory.mktemp("camvid")
    cache = ["--cache", str(folder / "c.fcache")]
    weights = test_data / "weights" / "mobilenetv2_100.tv_int8_dequant.safetensors"
    line = ["extract", "--model", "mobilenetv2_100", "--weights", str(weights), "--dataset", "ade20k", *cache]
    line += ["--data-root", str(test_data / "camvid"), "--view-recipe", "ade20k-small", "--views", "1"]
    assert main([*line, "--limit", "8", "--workers", "0", "--device", "cpu", "--precision", "fp32"]) == 0
    line = ["train-head", *cache, "--head", "linear", "--set", "batch_size=4", "--set", "lr=5e-3", "--iters", "40"]
    assert main([*line, "--device", "cpu", "--out", str(folder / "runs")]) == 0
    return folder / "runs" / "linear-seed0"


def test_test_time_views_of_street_scenes_score_as_well_as_single_ones(run: Path, capsys) -> None:
    scores = []
    for views in ("plain", "ms-flip"):
        capsys.readouterr()
        line = ["evaluate", str(run), "--live", "--tta", views, "--limit", "2", "--device", "cpu", "--json"]
        assert main(line) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["views"], found["samples"]) == (views, 2)
        scores.append(found["metrics"])
    plain, many = scores
    assert plain != many
    # A wrong flip or place would cost tens of points.
    assert many["pixel_accuracy"] > plain["pixel_accuracy"] - 0.02
    assert plain["pixel_accuracy"] > 0.6


def test_predictions_of_a_street_scene_agree_with_its_labels(
    run: Path, test_data: Path, tmp_path: Path, capsys
) -> None:
    photo = min((test_data / "camvid" / "images" / "validation").iterdir())
    line = ["predict", str(run), str(photo), "--save", "labels,probabilities", "--tta", "flip", "--device", "cpu"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    labels, probabilities = capsys.readouterr().out.splitlines()
    found = np.asarray(Image.open(labels))
    # Masks count from 1; 0 is void.
    truth = np.asarray(Image.open(test_data / "camvid" / "annotations" / "validation" / f"{photo.stem}.png"))
    assert found.shape == truth.shape
    assert (found + 1 == truth)[truth > 0].mean() > 0.6
    assert np.load(probabilities, mmap_mode="r").shape == (11, *truth.shape)
