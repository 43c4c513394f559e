"""extract, train-head, evaluate, compare, predict and demo as a user runs them, on scenes drawn for the test."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cli import demo, main
from fcache.extractor import write_scenes

# A ResNet of 0.5 M parameters that timm keeps for tests; random weights need no download.
MODEL = ["--model", "test_resnet", "--weights", "random:0", "--dataset", "ade20k", "--precision", "fp32"]
SMALL = ["--view-recipe", "ade20k-small", "--input-size", "64", "64", "--workers", "0", "--device", "cpu"]
TRAIN = ["--allow-random-backbone", "--device", "cpu", "--set", "batch_size=2", "--iters", "4"]
HEADS = ["--head", "linear", "--head", "upernet:width=16"]


def extract(root: Path, cache: Path, *more: str) -> int:
    return main(["extract", *MODEL, *SMALL, "--data-root", str(root), "--cache", str(cache), *more])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=6, val=3, size=(64, 80))
    return root


@pytest.fixture(scope="module")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `c.fcache` (stored as fp32) and `runs` of two heads."""
    folder = tmp_path_factory.mktemp("trained")
    assert extract(scenes, folder / "c.fcache", "--encoding", "fp32", "--views", "2") == 0
    assert main(["train-head", "--cache", str(folder / "c.fcache"), *HEADS, *TRAIN, "--out", str(folder / "runs")]) == 0
    return folder


def broken(scenes: Path, root: Path) -> Path:
    """A copy of the scenes whose first training photo is cut short."""
    for path in scenes.rglob("*.*"):
        target = root / path.relative_to(scenes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    photo = min((root / "images" / "training").iterdir())
    photo.write_bytes(photo.read_bytes()[:-400])
    return root


def test_the_same_extraction_again_does_nothing(scenes: Path, trained: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in (trained / "c.fcache").rglob("*") if p.is_file()}
    assert extract(scenes, trained / "c.fcache", "--encoding", "fp32", "--views", "2") == 0
    assert "0 records in" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (trained / "c.fcache").rglob("*") if p.is_file()} == before


def test_a_recipe_gives_settings_that_the_command_line_overrides(scenes: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[extract]\nviews = 3\nview_recipe = "ade20k-small"\nencoding = "fp16"\n')
    line = ["plan", *MODEL, "--data-root", str(scenes), "--recipe", str(recipe), "--input-size", "64", "64"]
    line += ["--device", "cpu", "--json", "--no-time"]
    assert main(line) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(s["name"], s["views"], s["records"]) for s in plan["splits"]] == [("train", 3, 18), ("val", 1, 3)]
    train = plan["splits"][0]
    assert plan["view_bytes"] == {str(k): k * train["bytes"] // 3 for k in (1, 2, 3, 4, 8)}
    assert main([*line, "--views", "1", "--encoding", "fp32"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["splits"][0]["records"] == 6
    assert sum(other["level_bytes"].values()) == 2 * sum(plan["level_bytes"].values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[extract]\nview = 3\n", "did you mean views"),
        ('[extract]\nviews = "many"\n', "views cannot be 'many'"),
    ],
)
def test_a_wrong_recipe_setting_is_named(scenes: Path, tmp_path: Path, capsys, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    assert extract(scenes, tmp_path / "c", "--recipe", str(tmp_path / "mine.toml")) == 2
    assert message in capsys.readouterr().err


def test_a_plan_shows_what_other_numbers_of_views_take_where_views_differ(scenes: Path, capsys) -> None:
    line = ["plan", *MODEL, "--data-root", str(scenes), "--input-size", "64", "64", "--device", "cpu", "--no-time"]
    assert main([*line, "--view-recipe", "ade20k-small", "--views", "2"]) == 0
    assert "2 (planned)" in capsys.readouterr().out
    assert main([*line, "--view-recipe", "plain"]) == 0
    assert "training views" not in capsys.readouterr().out


def test_a_dry_run_says_what_it_costs_and_writes_nothing(scenes: Path, tmp_path: Path, capsys) -> None:
    assert extract(scenes, tmp_path / "c.fcache", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "records/s on this device" in out
    assert "are free" in out
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_photo_is_quarantined_with_exit_status_3(scenes: Path, tmp_path: Path, capsys) -> None:
    root, cache = broken(scenes, tmp_path / "data"), tmp_path / "c.fcache"
    assert extract(root, cache) == 3
    out, err = capsys.readouterr()
    assert "1 samples are quarantined" in out
    assert "left out scene_training_000000" in err
    assert main(["info", str(cache)]) == 0
    assert "quarantined in train: scene_training_000000" in capsys.readouterr().out


def test_on_error_fail_stops_at_a_truncated_photo(scenes: Path, tmp_path: Path, capsys) -> None:
    assert extract(broken(scenes, tmp_path / "data"), tmp_path / "c.fcache", "--on-error", "fail") == 1
    assert "scene_training_000000" in capsys.readouterr().err


def test_other_weights_for_a_cache_end_with_5_and_name_the_field(scenes: Path, trained: Path, capsys) -> None:
    line = ["--encoding", "fp32", "--views", "2", "--weights", "random:1"]
    assert extract(scenes, trained / "c.fcache", *line) == 5
    assert "weights_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--model", "mobilenetv2_10"], 2, "mobilenetv2_100"),
        (["--encoding", "int9"], 2, "int8"),
        (["--view-recipe", "ade20"], 2, "did you mean"),
        (["--dataset", "ade20"], 2, "did you mean ade20k"),
        (["--subset", "200%"], 2, "200%"),
        (["--part", "3"], 2, "--part is i/n"),
        (["--part", "4/4"], 2, "4/4"),
        (["--split", "test"], 2, "test"),
        (["--levels", "5"], 2, "level"),
        (["--weights", "/nowhere/w.pth"], 1, "/nowhere/w.pth"),
        (["--data-root", "/nowhere"], 1, "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(
    scenes: Path, tmp_path: Path, capsys, more: Sequence[str], status: int, message: str
) -> None:
    assert extract(scenes, tmp_path / "c.fcache", *more) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fcache: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "c.fcache").exists()


def test_without_a_data_root_the_environment_says_where_data_are(scenes: Path, tmp_path: Path, capsys, monkeypatch):
    line = ["plan", *MODEL, *SMALL, "--no-time"]
    monkeypatch.delenv("FCACHE_DATA", raising=False)
    assert main(line) == 2
    assert "--data-root" in capsys.readouterr().err
    (tmp_path / "ade20k").symlink_to(scenes)
    monkeypatch.setenv("FCACHE_DATA", str(tmp_path))
    assert main(line) == 0


def test_a_cache_below_a_file_is_refused_on_one_line(scenes: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert extract(scenes, tmp_path / "file" / "c.fcache") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("fcache: error: ")


def test_train_head_reports_scores_and_writes_one_folder_a_head(trained: Path) -> None:
    runs = trained / "runs"
    assert sorted(p.name for p in runs.iterdir()) == ["linear-seed0", "upernet-width=16-seed0"]
    assert all((p / "run.json").is_file() for p in runs.iterdir())


def test_a_random_backbone_needs_to_be_allowed(trained: Path, tmp_path: Path, capsys) -> None:
    line = ["train-head", "--cache", str(trained / "c.fcache"), "--head", "linear", "--out", str(tmp_path / "runs")]
    assert main([*line, "--set", "batch_size=2"]) == 2
    assert "--allow-random-backbone" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--head", "upnet"], "upernet"),
        (["--head", "upernet:widht=16"], "width"),
        (["--head", "linear", "--set", "batchsize=2"], "batch_size"),
        (["--head", "linear", "--recipe", "camvid"], "camvid-small"),
        (["--head", "classification/linear"], "class"),
        ([], "which heads?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_head_or_setting_is_a_usage_error(trained: Path, tmp_path: Path, capsys, more, message) -> None:
    line = ["train-head", "--cache", str(trained / "c.fcache"), *TRAIN, "--out", str(tmp_path / "runs"), *more]
    assert main(line) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_finished_runs_are_refused_and_resume_leaves_them(trained: Path, capsys) -> None:
    line = ["train-head", "--cache", str(trained / "c.fcache"), *HEADS, *TRAIN, "--out", str(trained / "runs")]
    before = (trained / "runs" / "linear-seed0" / "run.json").stat().st_mtime_ns
    assert main(line) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*line, "--resume"]) == 0
    assert (trained / "runs" / "linear-seed0" / "run.json").stat().st_mtime_ns == before


def test_an_incomplete_cache_is_refused_and_partial_training_ends_with_3(make_cache, tmp_path: Path, capsys) -> None:
    cache = make_cache(tmp_path / "c.fcache", shards=2)
    line = ["train-head", "--cache", str(cache), "--head", "linear", "--set", "batch_size=2", "--iters", "2"]
    line += ["--out", str(tmp_path / "runs"), "--device", "cpu"]
    assert main(line) == 1
    assert "--allow-partial" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main([*line, "--allow-partial"]) == 3
    out, err = capsys.readouterr()
    assert "nothing of split val is committed" in err
    assert out.splitlines()[1].startswith("linear")


def test_compare_prints_a_row_a_head(trained: Path, capsys) -> None:
    assert main(["compare", "--cache", str(trained / "c.fcache"), str(trained / "runs")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:4] == ["semantic", "miou", "pixel_accuracy", "mean_accuracy"]
    assert {line.split()[0] for line in out.splitlines()[1:3]} == {"linear", "upernet:width=16"}
    assert "RANDOM (random:0)" in out


def test_compare_as_json_has_the_promised_form(trained: Path, capsys) -> None:
    cache = str(trained / "c.fcache")
    assert main(["compare", "--cache", cache, *map(str, (trained / "runs").iterdir()), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"] == cache
    assert {(run["head"], run["seed"]) for run in found["runs"]} == {("linear", 0), ("upernet", 0)}
    assert all(0 <= run["metrics"]["miou"] <= 1 for run in found["runs"])


def test_compare_looks_below_runs_and_refuses_other_caches(
    make_cache, trained: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(trained)
    assert main(["compare", "--cache", "c.fcache"]) == 0
    assert "linear" in capsys.readouterr().out
    other = str(make_cache(tmp_path / "other.fcache"))
    assert main(["compare", "--cache", other]) == 2
    assert "2 runs below runs are of other caches" in capsys.readouterr().err
    assert main(["compare", "--cache", other, "runs"]) == 5
    assert main(["compare", "--cache", other, "runs", "--mixed"]) == 0
    assert "MIXED" in capsys.readouterr().out


def test_evaluate_gives_the_recorded_scores_from_the_cache_and_live(trained: Path, capsys) -> None:
    runs = [str(trained / "runs" / name) for name in ("linear-seed0", "upernet-width=16-seed0")]
    recorded = [json.loads((Path(r) / "run.json").read_text())["evaluations"][-1]["metrics"] for r in runs]
    assert main(["evaluate", *runs, "--device", "cpu", "--json"]) == 0
    assert [r["metrics"] for r in json.loads(capsys.readouterr().out)] == recorded
    assert main(["evaluate", *runs, "--device", "cpu", "--live", "--json"]) == 0
    assert [r["metrics"] for r in json.loads(capsys.readouterr().out)] == recorded
    assert main(["evaluate", *runs, "--device", "cpu"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["samples", "3", "3"]


def test_evaluate_refuses_a_cache_of_other_features(make_cache, trained: Path, tmp_path: Path, capsys) -> None:
    other = make_cache(tmp_path / "other.fcache")
    assert main(["evaluate", str(trained / "runs" / "linear-seed0"), "--cache", str(other), "--device", "cpu"]) in (
        2,
        5,
    )
    assert "fcache: error:" in capsys.readouterr().err


def test_predict_writes_an_overlay_of_the_photo(scenes: Path, trained: Path, tmp_path: Path, capsys) -> None:
    photo = min((scenes / "images" / "validation").iterdir())
    line = ["predict", str(trained / "runs" / "linear-seed0"), str(photo), "--device", "cpu", "--out", str(tmp_path)]
    assert main(line) == 0
    printed = Path(capsys.readouterr().out.strip())
    assert printed == tmp_path / f"{photo.stem}-linear-seed0.png"
    picture = np.asarray(Image.open(printed))
    assert picture.shape[0] >= 64
    assert picture.shape[1] > 80


def test_predict_refuses_other_weights_and_absent_photos(scenes: Path, trained: Path, capsys) -> None:
    photo = min((scenes / "images" / "validation").iterdir())
    run = str(trained / "runs" / "linear-seed0")
    assert main(["predict", run, str(photo), "--weights", "random:7", "--device", "cpu"]) == 5
    assert "backbone.weights_sha256" in capsys.readouterr().err
    assert main(["predict", run, "nowhere.jpg", "--device", "cpu"]) == 1
    assert "nowhere.jpg" in capsys.readouterr().err


def test_info_and_ls_show_runs(trained: Path, capsys) -> None:
    assert main(["info", str(trained / "runs" / "linear-seed0")]) == 0
    out = capsys.readouterr().out
    assert "semantic/linear" in out
    assert "RANDOM (random:0)" in out
    assert main(["ls", str(trained), "--json"]) == 0
    assert [e["kind"] for e in json.loads(capsys.readouterr().out)] == ["cache", "run", "run"]


def interrupted(line: Sequence[str], ready: str, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run a command until `ready` shows on stderr, then send it a signal."""
    process = subprocess.Popen([sys.executable, "-m", "fcache.cli", *line], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    try:
        while ready not in "".join(lines[-1:]):
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        process.send_signal(number)
        rest = process.communicate(timeout=120)[1]
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(list(line), process.returncode, "", "".join(lines) + rest)


def test_an_extraction_that_is_told_to_stop_ends_with_130_and_continues(scenes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.fcache"
    line = ["extract", *MODEL, *SMALL, "--data-root", str(scenes), "--cache", str(cache), "--views", "400"]
    stopped = interrupted(line, "records to do", signal.SIGTERM)
    assert stopped.returncode == 130
    assert "Traceback" not in stopped.stderr
    assert "the same command continues" in stopped.stderr
    assert not list(cache.rglob("*.partial*"))
    assert main(["verify", str(cache)]) == 3


def test_a_training_that_is_told_to_stop_ends_with_130_and_resumes(trained: Path, tmp_path: Path, capsys) -> None:
    line = ["train-head", "--cache", str(trained / "c.fcache"), "--head", "linear", *TRAIN, "--out", str(tmp_path)]
    many = [*line, "--iters", "3000"]
    stopped = interrupted(many, "iterations 1 to 3000", signal.SIGINT)
    assert stopped.returncode == 130
    assert "--resume continues" in stopped.stderr
    assert (tmp_path / "linear-seed0" / "checkpoint.pt").is_file()
    assert main(["compare", "--cache", str(trained / "c.fcache"), str(tmp_path)]) == 1
    assert "unfinished" in capsys.readouterr().err


def test_the_demo_trains_three_heads_and_names_its_weights(tmp_path: Path, capsys, monkeypatch) -> None:
    recipe = tmp_path / "short.toml"
    recipe.write_text(
        "[train]\niterations = 3\nbatch_size = 2\n[heads.upernet]\nwidth = 8\n"
        '[extract]\nprecision = "fp32"\nview_recipe = "ade20k-small"\nviews = 1\ninput_size = [64, 64]\n'
    )
    for name, value in (("RECIPE", str(recipe)), ("TRAIN", 4), ("VAL", 2), ("SIZE", (64, 80))):
        monkeypatch.setattr(demo, name, value)
    line = ["demo", "--out", str(tmp_path / "out"), "--model", "test_resnet", "--device", "cpu"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert {"linear", "upernet", "upernet:norm_inputs=true"} <= {text.split()[0] for text in out.splitlines() if text}
    assert "weights random:0 (RANDOM)" in out
    overlay = next(text.split(maxsplit=1)[1] for text in out.splitlines() if text.startswith("overlay"))
    assert Path(overlay).is_file()
    assert main(line) == 0
    assert capsys.readouterr().out.splitlines()[:4] == out.splitlines()[:4]
