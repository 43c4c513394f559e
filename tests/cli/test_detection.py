"""Detectors as a user runs them: extract, train-head, evaluate, compare and predict on scenes in COCO's layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cli import main
from fcache.extractor import write_coco_scenes
from fcache.heads import load_run

MODEL = ["--model", "test_resnet", "--weights", "random:0", "--dataset", "coco", "--precision", "fp32"]
SMALL = ["--view-recipe", "coco-small", "--input-size", "64", "64", "--workers", "0", "--device", "cpu"]
TINY = "width=8,box_units=16,rois=16,proposals=20,mask_convs=1,score_threshold=0,detections=20"
HEADS = [f"maskrcnn:{TINY}", f"cascade:{TINY},neck=bifpn,layers=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scenes`, `c.fcache` and `runs` of two detectors."""
    folder = tmp_path_factory.mktemp("detection")
    write_coco_scenes(folder / "scenes", train=4, val=3, size=(64, 80))
    cache = str(folder / "c.fcache")
    data = ["--data-root", str(folder / "scenes"), "--cache", cache, "--views", "1", "--encoding", "fp32"]
    assert main(["extract", *MODEL, *SMALL, *data]) == 0
    heads = [word for head in HEADS for word in ("--head", head)]
    train = ["--allow-random-backbone", "--device", "cpu", "--set", "batch_size=2", "--iters", "3"]
    assert main(["train-head", "--cache", cache, *heads, *train, "--out", str(folder / "runs")]) == 0
    return folder


def runs(folder: Path) -> list[str]:
    return sorted(str(path) for path in (folder / "runs").iterdir())


def test_the_recorded_scores_come_back_from_the_cache_and_live(trained: Path, capsys) -> None:
    for more in ([], ["--live"]):
        assert main(["evaluate", *runs(trained), "--json", "--device", "cpu", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        for entry, path in zip(found, runs(trained), strict=True):
            run = load_run(path)
            assert set(entry["metrics"]) >= {"box_ap", "box_ap50", "box_ar/100", "mask_ap", "mask_ar/100"}
            assert entry["metrics"] == pytest.approx(dict(run.metrics), abs=1e-6)
            assert len(entry["per_class"]["mask_ap"]) == 7


def test_detectors_are_compared_by_box_ap(trained: Path, capsys) -> None:
    assert main(["compare", "--cache", str(trained / "c.fcache"), *runs(trained), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["primary"] for row in rows] == ["box_ap"] * 2
    assert rows[1]["difference"] is not None


def test_boxes_and_masks_are_drawn_and_listed(trained: Path, tmp_path: Path, capsys) -> None:
    photo = min((trained / "scenes" / "val2017").iterdir())
    more = ["--save", "overlay,instances", "--min-score", "0", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["predict", runs(trained)[0], str(photo), *more]) == 0
    picture, listed = (Path(line) for line in capsys.readouterr().out.splitlines())
    found = json.loads(listed.read_text())
    assert 0 < len(found) <= 20
    assert {f["category_id"] for f in found} <= set(load_run(runs(trained)[0]).targets[0].conversion["category_ids"])
    assert all(f["segmentation"]["size"] == [64, 80] for f in found)
    with Image.open(picture) as image, Image.open(photo) as original:
        assert (np.asarray(image)[:64, :80] != np.asarray(original)).any()


def test_products_of_label_maps_are_not_those_of_detectors(trained: Path, capsys) -> None:
    assert main(["predict", runs(trained)[0], "x.jpg", "--save", "labels", "--device", "cpu"]) == 2
    assert "task 'detection'" in capsys.readouterr().err
