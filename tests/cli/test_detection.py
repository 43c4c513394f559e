"""Detectors as a user runs them: extract, train-head, evaluate, compare and predict on scenes in COCO's layout."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cache_spec import StreamConfig, open_cache, open_source
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


def test_htc_learns_from_maps_of_stuff_where_coco_has_them(tmp_path: Path, trained: Path, capsys) -> None:
    """Extracted, trained, and scored again from the cache and live; without maps it says what to do."""
    write_coco_scenes(tmp_path / "scenes", train=4, val=2, size=(64, 80), stuff=True)
    cache, out = str(tmp_path / "c.fcache"), str(tmp_path / "runs")
    data = ["--data-root", str(tmp_path / "scenes"), "--cache", cache, "--views", "1", "--encoding", "fp32"]
    assert main(["extract", *MODEL, *SMALL, *data]) == 0
    train = ["--head", f"htc:{TINY}", "--allow-random-backbone", "--device", "cpu", "--set", "batch_size=2"]
    assert main(["train-head", "--cache", cache, *train, "--iters", "2", "--out", out]) == 0
    run = load_run(next(Path(out).iterdir()))
    assert run.loss_terms["semantic"] > 0
    assert {t.kind: len(t.class_names) for t in run.targets} == {"instances": 7, "semantic": 10}
    capsys.readouterr()
    for more in ([], ["--live"]):
        assert main(["evaluate", str(run.folder), "--json", "--device", "cpu", *more]) == 0
        (entry,) = json.loads(capsys.readouterr().out)
        assert entry["metrics"] == pytest.approx(dict(run.metrics), abs=1e-6)
    assert main(["train-head", "--cache", str(trained / "c.fcache"), *train, "--out", out]) == 2
    said = capsys.readouterr().err
    assert "needs targets of kind instances+semantic, this source has instances" in said
    assert "stuffthingmaps" in said
    assert "htc-without-semantic" in said


def test_a_sweep_is_one_call_whose_runs_are_told_apart(trained: Path, tmp_path: Path, capsys) -> None:
    grid = [(lr, wd) for lr in ("1e-3", "2e-3") for wd in ("0.05", "0.1")]
    heads = [f"--head=maskrcnn:{TINY},lr={lr},weight_decay={wd}" for lr, wd in grid]
    train = ["--allow-random-backbone", "--device", "cpu", "--set", "batch_size=2", "--iters", "1"]
    cache = str(trained / "c.fcache")
    assert main(["train-head", "--cache", cache, *heads, *train, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    found = sorted(tmp_path.iterdir())
    assert [load_run(f).train.lr for f in found] == [1e-3, 1e-3, 2e-3, 2e-3]
    assert [load_run(f).train.weight_decay for f in found] == [0.05, 0.1, 0.05, 0.1]
    assert main(["compare", "--cache", cache, *map(str, found), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {run["label"] for run in said["runs"]} == {head.removeprefix("--head=") for head in heads}
    assert len(said["rows"]) == 4


def put_at_the_edge(root: Path) -> None:
    """Gives the first five images of each split: no object, 500, a crowd, one of a pixel, one cut by every crop."""
    rng = np.random.default_rng(0)
    (root / "dataset.toml").write_text("keep_empty = true\n")
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}2017.json"
        data = json.loads(file.read_text())
        names = [image["id"] for image in data["images"]]
        boxes = {
            names[1]: [(int(x), int(y), 3, 2) for x, y in rng.integers(0, (70, 60), (500, 2))],
            names[2]: [(5, 5, 60, 40), (20, 10, 12, 14)],
            names[3]: [(41, 30, 1, 1)],
            names[4]: [(0, 0, 80, 64)],
        }
        kept = [a for a in data["annotations"] if a["image_id"] not in (names[0], *boxes)]
        for image, found in boxes.items():
            for i, (x, y, w, h) in enumerate(found):
                kept.append(
                    {
                        "id": 1000 * image + i, "image_id": image, "category_id": 4 + i % 7, "bbox": [x, y, w, h],
                        "area": w * h, "iscrowd": int(image == names[2] and i == 0),
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    }
                )  # fmt: skip
        file.write_text(json.dumps(data | {"annotations": kept}))


def test_images_at_the_edge_go_through_the_whole_path(tmp_path: Path, capsys) -> None:
    """No object, 500 objects, a crowd, one pixel, one beyond every crop: trained on, and scored with finite numbers."""
    write_coco_scenes(tmp_path / "scenes", train=6, val=6, size=(64, 80))
    put_at_the_edge(tmp_path / "scenes")
    cache = str(tmp_path / "c.fcache")
    data = ["--data-root", str(tmp_path / "scenes"), "--cache", cache, "--views", "2"]
    assert main(["extract", *MODEL, *SMALL, *data]) == 0
    heads = [f"--head={name}:{TINY}" for name in ("maskrcnn", "htc-without-semantic")]
    train = ["--allow-random-backbone", "--device", "cpu", "--set", "batch_size=4", "--iters", "3"]
    assert main(["train-head", "--cache", cache, *heads, *train, "--out", str(tmp_path / "runs")]) == 0
    for folder in (tmp_path / "runs").iterdir():
        run = load_run(folder)
        assert run.status == "finished"
        assert set(run.metrics) >= {"box_ap", "box_ap/small", "box_ar/100", "mask_ap", "mask_ap/small", "mask_ar/100"}
        assert all(0 <= score <= 1 for score in run.metrics.values())
        assert all(np.isfinite(loss) for _, loss in run.losses)
        assert all(np.isfinite(term) for term in run.loss_terms.values())
        # 500 objects of the others' sizes are to be found; at most 20 are, and what is missed is counted.
        assert run.metrics["box_ar/100"] < 0.5
    stream = StreamConfig(batch_size=1, kinds=("instances",), order="sequential")
    source = open_source(open_cache(cache), "val", stream)
    counts = [len(n) for b in source.blocks(0) for n in b.targets["instances/labels"]]
    # Test views have 0.8 of the size: one pixel is less than one there.
    assert counts[:5] == [0, 500, 2, 0, 1]


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
