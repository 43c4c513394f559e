"""The benchmarks of encodings run, keep what is done, and compare like with like."""

import json

import numpy as np
import pytest

from fcache.cache_spec import LevelSpec, find_encoding

LEVELS = [("level-4", [3, 8, 12], 4), ("level-8", [5, 4, 6], 8)]


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The module on made-up features of one backbone, with heads that are hardly trained; and its work folder."""
    import encoding_quality as module

    settings = {
        "BACKBONES": {"made-up": ""},
        "ENCODINGS": ("fp32", "rot:0.5", "pool+int4"),
        "SEEDS": range(2),
        "CANVAS": (32, 48),
        "ITERATIONS": {"linear": 3, "fpn": 2},
        "RESULTS": tmp_path / "results",
    }
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    folder, rng = tmp_path / "work/made-up", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("training", 6), ("validation", 4)):
        labels = rng.integers(0, 12, (count, 4, 6)).repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
        np.save(folder / f"{split}.npy", labels)
        for name, shape, stride in LEVELS:
            clean = np.eye(12)[labels[:, ::stride, ::stride]].transpose(0, 3, 1, 2)[:, : shape[0]]
            np.save(folder / f"{split}-{name}.npy", (clean + 0.1 * rng.standard_normal(clean.shape)).astype(np.float32))
    (folder / "levels.json").write_text(json.dumps(LEVELS))
    (folder / "done").touch()
    return module, tmp_path / "work"


def test_every_head_is_trained_once_and_its_difference_is_to_float32_of_its_seed(study, tmp_path):
    module, work = study
    module.run(tmp_path, work)
    rows = {p: p.stat().st_mtime_ns for p in (work / "rows").iterdir()}
    assert len(rows) == 3 * 2 * 2
    module.run(tmp_path, work)
    assert {p: p.stat().st_mtime_ns for p in (work / "rows").iterdir()} == rows
    result = json.loads((tmp_path / "results/encoding_quality.json").read_text())
    by = {(r["encoding"], r["head"], r["seed"]): r for r in result["rows"]}
    for seed in range(2):
        assert by["fp32", "linear", seed]["error"] == 0
        assert by["fp32", "linear", seed]["live all"] == by["fp32", "linear", seed]["coded all"]
        assert 0 < by["rot:0.5", "fpn", seed]["error"] < 0.4
        assert by["pool+int4", "fpn", seed]["ratio"] > by["rot:0.5", "fpn", seed]["ratio"] / 3 > 0
    read = [json.loads(p.read_text()) for p in rows]
    assert module.differences(read, "fp32", "linear", "live all") == [0.0, 0.0]
    table = (tmp_path / "results/encoding_quality.md").read_text()
    assert "| encoding | x smaller than fp16 |" in table
    assert "| rot:0.5 |" in table


def test_scores_are_means_over_the_classes_that_are_there(study):
    module, _ = study
    photo = np.zeros((11, 11), int)
    photo[0, 0], photo[0, 1], photo[1, 1] = 6, 2, 4
    assert module.miou([photo.reshape(-1).tolist()]) == pytest.approx(100 * (6 / 8 + 4 / 6) / 2)
    assert module.miou([photo.reshape(-1).tolist()] * 3) == pytest.approx(100 * (6 / 8 + 4 / 6) / 2)


@pytest.mark.parametrize("name", ["fp16", "int8", "int4", "rot:1"])
def test_rates_are_taken_of_codes_that_were_checked(name):
    import encoding_rates as module

    level = LevelSpec("tiny", "C H W", (6, 8, 10), 16)
    x = module.made_up(level, 2)
    assert x.shape == (2, 6, 8, 10)
    assert x.flags.c_contiguous
    row = module.measure(find_encoding(name), level, x, 0.0)
    assert row["channels"] == 6
    assert min(v for v in row.values() if isinstance(v, float)) > 0
    assert name in module.table({"machine": "here", "rows": [row]})
