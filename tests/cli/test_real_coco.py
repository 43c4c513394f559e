"""COCO's own photos and annotations through the command line, with trained backbones."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import StreamConfig, open_cache, open_source
from fcache.cli import main
from fcache.heads import load_run

MODELS = {
    "mobilenetv2_100": "mobilenetv2_100.tv_int8_dequant.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
}


# Narrow, and all that it says is a detection: a few steps make nothing likely.
TINY = "width=16,box_units=32,rois=16,candidates=100,100,proposals=40,mask_convs=1,anchor_scales=4"
TINY += ",score_threshold=0,detections=9"


def line(test_data: Path, model: str, cache: Path) -> list[str]:
    """The options of an extraction of COCO's photos with trained weights."""
    window = ["--window", "7"] if "vit" in model else []
    return [
        "--model", model, "--weights", str(test_data / "weights" / MODELS[model]), "--dataset", "coco",
        "--data-root", str(test_data / "coco"), "--cache", str(cache), "--view-recipe", "coco-small", "--views", "2",
        "--workers", "0", "--device", "cpu", *window,
    ]  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_detectors_learn_from_photos_of_coco_and_draw_what_they_find(
    test_data: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, photos = tmp_path / "coco.fcache", test_data / "coco" / "val2017"
    assert main(["extract", *line(test_data, model, cache), "--input-size", "128", "128", "--precision", "fp32"]) == 0
    train = ["--cache", str(cache), "--head", f"maskrcnn:{TINY}", "--recipe", "coco-small", "--iters", "12"]
    assert main(["train-head", *train, "--device", "cpu", "--out", str(tmp_path / "runs")]) == 0
    (path,) = (tmp_path / "runs").iterdir()
    run = load_run(path)
    # Twelve steps teach next to nothing but that there is something: the loss falls, scores are there.
    assert run.losses[-1][1] < run.losses[0][1]
    assert {"box_ap", "mask_ap", "box_ar/100"} <= set(run.metrics)
    capsys.readouterr()
    assert main(["evaluate", str(path), "--live", "--json", "--device", "cpu"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["metrics"]["box_ap"] == pytest.approx(run.metrics["box_ap"], abs=0.01)
    photo = photos / "000000000139.jpg"
    out = ["--save", "overlay,instances", "--min-score", "0", "--out", str(tmp_path), "--device", "cpu"]
    assert main(["predict", str(path), str(photo), *out]) == 0
    picture, listed = (Path(name) for name in capsys.readouterr().out.splitlines())
    found = json.loads(listed.read_text())
    with Image.open(photo) as image, Image.open(picture) as drawn:
        plain, shown = np.asarray(image.convert("RGB")), np.asarray(drawn)
    assert len(found) == 9
    for entry in found:
        assert entry["segmentation"]["size"] == list(plain.shape[:2])
        x, y, width, height = entry["bbox"]
        assert 0 <= x <= x + width <= plain.shape[1]
        assert 0 <= y <= y + height <= plain.shape[0]
    # Boxes and masks are drawn on the photo: most of it is as it was, but for the tints of masks.
    same = (shown[: plain.shape[0], : plain.shape[1]] == plain).all(axis=-1)
    assert 0.2 < same.mean() < 1


@pytest.mark.parametrize("model", MODELS)
def test_photos_of_coco_become_a_cache_that_holds_their_annotations(
    test_data: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, cache = test_data / "coco", tmp_path / "coco.fcache"
    words = line(test_data, model, cache)
    assert main(["extract", *words]) == 0
    capsys.readouterr()
    assert main(["plan", *words]) == 0
    assert "to write  0 B of" in capsys.readouterr().out
    assert main(["verify", str(cache), "--deep"]) == 0
    assert main(["info", str(cache)]) == 0
    assert "instances of coco, 80 classes" in capsys.readouterr().out
    official = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    source = open_source(open_cache(cache), "val", StreamConfig(batch_size=1, kinds=("instances",)))
    truths = [json.loads(t.tobytes()) for b in source.blocks(0) for t in b.targets["instances/truth"]]
    found = {a["id"]: a for t in truths for a in t["annotations"]}
    assert len(truths) == len(official["images"])
    assert set(found) == {a["id"] for a in official["annotations"]}
    for annotation in official["annotations"]:
        for name in ("image_id", "category_id", "area", "iscrowd"):
            assert found[annotation["id"]][name] == annotation[name]
    shown = [len(n) for b in source.blocks(0) for n in b.targets["instances/labels"]]
    assert 30 < sum(shown) <= len(found)
