"""COCO's own photos and annotations through the command line, with trained backbones."""

import json
from pathlib import Path

import pytest

from fcache.cache_spec import StreamConfig, open_cache, open_source
from fcache.cli import main

MODELS = {
    "mobilenetv2_100": "mobilenetv2_100.tv_int8_dequant.safetensors",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
}


@pytest.mark.parametrize("model", MODELS)
def test_photos_of_coco_become_a_cache_that_holds_their_annotations(
    test_data: Path, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, cache = test_data / "coco", tmp_path / "coco.fcache"
    line = ["--model", model, "--weights", str(test_data / "weights" / MODELS[model]), "--dataset", "coco"]
    line += ["--data-root", str(root), "--cache", str(cache), "--view-recipe", "coco-small", "--views", "2"]
    line += ["--workers", "0", "--device", "cpu"] + (["--window", "7"] if "vit" in model else [])
    assert main(["extract", *line]) == 0
    capsys.readouterr()
    assert main(["plan", *line]) == 0
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
