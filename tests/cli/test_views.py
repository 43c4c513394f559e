"""evaluate --tta and predict on folders as a user runs them."""

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcache.cli import main
from fcache.extractor import write_scenes
from fcache.heads import load_run

JOB = ["--model", "test_resnet", "--weights", "random:0", "--precision", "fp32", "--workers", "0", "--device", "cpu"]
TRAIN = ["--allow-random-backbone", "--device", "cpu", "--set", "batch_size=2", "--iters", "3"]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=4, val=3, size=(64, 80))
    return root


@pytest.fixture(scope="module")
def runs(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("trained")
    train_on(scenes, folder, 64, "--head", "linear", "--head", "upernet:width=8")
    return [str(folder / "runs" / name) for name in ("linear-seed0", "upernet-width=8-seed0")]


def train_on(scenes: Path, folder: Path, side: int, *heads: str) -> None:
    """Heads on a cache of the scenes in views of `side`, in `folder`."""
    line = ["--view-recipe", "ade20k-small", "--input-size", *[str(side)] * 2, "--dataset", "ade20k", "--views", "1"]
    cache = ["--cache", str(folder / "c.fcache")]
    assert main(["extract", *JOB, *line, "--data-root", str(scenes), *cache, "--encoding", "fp32"]) == 0
    assert main(["train-head", *cache, *heads, *TRAIN, "--out", str(folder / "runs")]) == 0


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of two learning rates on class folders, and one of its photos."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for k, name in enumerate(("ant", "bee")):
            (folder / "data" / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = (rng.integers(0, 120, (40, 50, 3)) + 130 * k).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i}.png")
    cache = ["--cache", str(folder / "c.fcache")]
    line = ["--dataset", "imagefolder", "--data-root", str(folder / "data"), "--views", "1", "--input-size", "64", "64"]
    assert main(["extract", *JOB, *line, *cache]) == 0
    head = ["--head", "linear:lrs=0.01,0.1"]
    assert main(["train-head", *cache, *head, *TRAIN, "--out", str(folder / "runs")]) == 0
    (run,) = (folder / "runs").iterdir()
    return str(run), folder / "data" / "val" / "bee" / "0.png"


def evaluated(capsys, *line: str) -> list[dict]:
    capsys.readouterr()
    assert main(["evaluate", *line, *CPU, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_say_which_views_they_are_of(runs: list[str], capsys) -> None:
    recorded = [load_run(run).metrics for run in runs]
    plain = evaluated(capsys, *runs)
    assert [r["metrics"] for r in plain] == recorded
    assert {(r["views"], r["tta"]) for r in plain} == {("plain", None)}
    found = evaluated(capsys, *runs, "--tta", "ms-flip:scales=0.5,1")
    assert [r["views"] for r in found] == ["ms-flip:scales=0.5,1"] * 2
    assert found[0]["tta"] == {
        "scales": [0.5, 1.0], "flip": True, "window": None, "stride": None, "clips": 1, "crops": 1
    }  # fmt: skip
    assert [r["samples"] for r in found] == [3, 3]
    assert all(a["metrics"] != b["metrics"] for a, b in zip(plain, found, strict=True))
    assert all(a["per_class"].keys() == b["per_class"].keys() for a, b in zip(plain, found, strict=True))
    # Alone as in one pass.
    assert evaluated(capsys, runs[1], "--tta", "ms-flip:scales=0.5,1")[0] == found[1]
    assert main(["evaluate", *runs, *CPU, "--tta", "flip"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["run", "head", "samples", "views", "miou"]
    assert [row.split()[2:4] for row in rows] == [["3", "flip"]] * 2


def test_the_plain_view_live_scores_as_recorded(runs: list[str], capsys) -> None:
    recorded = [load_run(run).metrics for run in runs]
    for more in (
        ["--live", "--batch-size", "2"],
        ["--tta", "plain"],
        ["--live", "--tta", "plain", "--batch-size", "2"],
    ):
        assert [r["metrics"] for r in evaluated(capsys, *runs, *more)] == recorded


def test_windows_take_the_size_of_training_views_unless_told(runs: list[str], capsys) -> None:
    (found,) = evaluated(capsys, runs[0], "--tta", "slide", "--limit", "1")
    assert (found["samples"], found["tta"]["window"], found["tta"]["stride"]) == (1, [64, 64], [42, 42])
    assert found["views"] == "slide:window=64,stride=42"


def test_runs_of_two_caches_say_each_which_views_were_theirs(
    runs: list[str], scenes: Path, tmp_path: Path, capsys
) -> None:
    train_on(scenes, tmp_path, 96, "--head", "linear")
    both = [runs[0], str(tmp_path / "runs" / "linear-seed0")]
    line = ["--tta", "slide", "--limit", "1"]
    found = evaluated(capsys, *both, *line)
    assert [r["tta"]["window"] for r in found] == [[64, 64], [96, 96]]
    assert [r["views"] for r in found] == ["slide:window=64,stride=42", "slide:window=96,stride=64"]
    assert main(["evaluate", *both, *CPU, *line]) == 0
    assert [row.split()[3] for row in capsys.readouterr().out.splitlines()[1:]] == [r["views"] for r in found]


def test_scores_of_classes_come_with_their_names(runs: list[str], capsys) -> None:
    (found,) = evaluated(capsys, runs[0], "--tta", "flip", "--limit", "1")
    assert found["classes"] == list(load_run(runs[0]).targets[0].class_names)
    assert {name: len(values) for name, values in found["per_class"].items()} == {"iou": 10, "accuracy": 10}
    assert len(found["classes"]) == 10


def test_evaluations_leave_runs_and_comparisons_alone(runs: list[str], capsys) -> None:
    before = [(Path(run) / "run.json").read_bytes() for run in runs]
    evaluated(capsys, *runs, "--tta", "flip")
    assert [(Path(run) / "run.json").read_bytes() for run in runs] == before


def test_probes_average_probabilities_over_flips(probe: tuple[str, Path], capsys) -> None:
    run, photo = probe
    (found,) = evaluated(capsys, run, "--tta", "flip")
    assert found["views"] == "flip"
    assert set(found["metrics"]) >= {"top1", "top1/lr=0.1"}
    assert main(["evaluate", run, "--tta", "slide", *CPU]) == 2
    assert "whole image" in capsys.readouterr().err
    lines: list[list[str]] = []
    for more in ([], ["--tta", "flip"]):
        assert main(["predict", run, str(photo), *CPU, *more]) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert [row[0] for row in rows] == [str(photo)] * 2
        assert {row[1] for row in rows} == {"ant", "bee"}
        assert sum(float(row[2]) for row in rows) == pytest.approx(1, abs=1e-3)
        lines.append(rows[0])
    assert lines[0][2] != lines[1][2]
    assert main(["predict", run, str(photo), *CPU, "--save", "labels"]) == 2
    assert "label maps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tta", "ms-flop"], "did you mean flip"),
        (["--tta", "slide:window=4,stride=9"], "gaps"),
        (["--tta", ""], "test-time view ''"),
        (["--limit", "3"], "--live or --tta"),
        (["--batch-size", "3"], "--live or --tta"),
        (["--weights", "w.pth"], "--live or --tta"),
        (["--tta", "flip", "--limit", "0"], "--limit"),
    ],
)
def test_wrong_views_are_a_usage_error(runs: list[str], capsys, more: list[str], message: str) -> None:
    assert main(["evaluate", runs[0], *CPU, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def photos(scenes: Path, tmp_path: Path) -> Path:
    """Photos of two sizes, two of one name in different folders, two that differ in their ending, one broken."""
    first, second, third = sorted((scenes / "images" / "validation").iterdir())
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, source in (("x.jpg", first), ("sub/x.jpg", second), ("y.jpg", third)):
        (folder / name).write_bytes(source.read_bytes())
    Image.open(first).resize((50, 70)).save(folder / "y.png")
    (folder / "z.jpg").write_bytes(first.read_bytes()[:300])
    return folder


def test_a_folder_gives_a_folder_and_a_bad_photo_stops_no_other(
    runs: list[str], photos: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    save = ["--save", "overlay,labels,probabilities", "--out", str(out)]
    assert main(["predict", runs[0], str(photos), *save, *CPU]) == 3
    printed, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("fcache: error: ")]
    assert len(errors) == 1
    assert "z.jpg" in errors[0]
    assert "1 of 5 files could not be read" in err
    written = [Path(line) for line in printed.splitlines()]
    stems = ["x", "y.jpg", "y.png", "sub/x"]
    endings = [".png", ".labels.png", ".probabilities.npy"]
    assert written == [out / f"{stem}-linear-seed0{ending}" for stem in stems for ending in endings]
    found = {p for p in out.rglob("*") if p.is_file()}
    assert found == {*written, out / "linear-seed0.classes.json"}
    names = json.loads((out / "linear-seed0.classes.json").read_text())
    assert names == list(load_run(runs[0]).targets[0].class_names)
    for stem, size in zip(stems, ((64, 80), (64, 80), (70, 50), (64, 80)), strict=True):
        with Image.open(out / f"{stem}-linear-seed0.labels.png") as image:
            assert image.mode == "L"
            labels = np.asarray(image)
        probabilities = np.load(out / f"{stem}-linear-seed0.probabilities.npy")
        assert labels.shape == size
        assert probabilities.dtype == np.float16
        assert probabilities.shape == (len(names), *size)
        np.testing.assert_allclose(probabilities.sum(0, dtype=np.float64), 1, atol=2e-3)
        top = np.sort(probabilities.astype(np.float32), axis=0)
        clear = top[-1] - top[-2] > 1e-3
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(labels[clear], probabilities.argmax(0)[clear])


def test_batches_and_test_time_views_predict_the_same_files(
    runs: list[str], photos: Path, tmp_path: Path, capsys
) -> None:
    def labels(name: str, *more: str) -> dict[str, np.ndarray]:
        out = tmp_path / name
        line = ["predict", runs[1], str(photos), "--save", "labels", "--out", str(out), *CPU, *more]
        assert main(line) == 3
        capsys.readouterr()
        return {str(p.relative_to(out)): np.asarray(Image.open(p)) for p in out.rglob("*.png")}

    single, batched, views = labels("a"), labels("b", "--batch-size", "3"), labels("c", "--tta", "ms-flip")
    assert single.keys() == batched.keys() == views.keys()
    for name, found in single.items():
        assert (found != batched[name]).mean() < 0.001
        assert found.shape == views[name].shape
    assert any((found != views[name]).any() for name, found in single.items())


def test_overlays_are_no_photos_the_next_time(runs: list[str], photos: Path, capsys) -> None:
    out = str(photos / "predictions")
    line = ["predict", runs[0], str(photos), *CPU, "--out"]
    assert main([*line, out]) == 3
    first = capsys.readouterr().out
    assert main([*line, out]) == 3
    assert capsys.readouterr().out == first
    assert main([*line, str(photos)]) == 2
    assert "another --out" in capsys.readouterr().err


def test_a_folder_of_overlays_named_through_a_link_holds_no_photos(
    runs: list[str], photos: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "link").symlink_to(photos)
    printed = []
    for _ in range(2):
        assert main(["predict", runs[0], str(photos), *CPU, "--out", str(tmp_path / "link" / "predictions")]) == 3
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_photo_is_never_overwritten(runs: list[str], photos: Path, capsys) -> None:
    photo = photos / "x-linear-seed0.png"
    Image.open(photos / "y.png").save(photo)
    before = photo.read_bytes()
    assert main(["predict", runs[0], str(photos / "x.jpg"), str(photo), *CPU, "--out", str(photos)]) == 2
    assert "x-linear-seed0.png is one of the photos" in capsys.readouterr().err
    assert photo.read_bytes() == before


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    runs: list[str], photos: Path, tmp_path: Path, capsys, monkeypatch, out: str
) -> None:
    monkeypatch.setattr("fcache.cli.predict.open_reader", lambda *_: pytest.fail("the backbone was loaded"))
    (tmp_path / "file").touch()
    assert main(["predict", runs[0], str(photos), *CPU, "--out", str(tmp_path / out)]) == 2
    err = capsys.readouterr().err
    assert f"nothing can be written to the folder {tmp_path / out}" in err
    assert "another --out" in err


def test_files_are_named_after_the_run_wherever_it_is_called_from(
    runs: list[str], photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(runs[0])
    assert main(["predict", ".", str(photos / "x.jpg"), *CPU, "--out", str(tmp_path), "--save", "labels"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/x-linear-seed0.labels.png\n"
    assert (tmp_path / "linear-seed0.classes.json").is_file()


def test_a_prediction_that_is_stopped_leaves_whole_files_and_the_names_of_their_classes(
    runs: list[str], photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    from fcache.cli import outputs

    real, saved = outputs.save_png, []

    def stopped(path: Path, pixels: np.ndarray) -> None:
        if saved:
            # As much of the second file as an encoder has written when the signal comes.
            monkeypatch.setattr(Image.Image, "save", lambda self, to, **_: to.write_bytes(b"half") and interrupt())
        saved.append(path)
        real(path, pixels)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "save_png", stopped)
    out = tmp_path / "out"
    assert main(["predict", runs[0], str(photos), *CPU, "--out", str(out), "--save", "labels"]) == 130
    assert sorted(p.name for p in out.iterdir()) == ["linear-seed0.classes.json", "x-linear-seed0.labels.png"]
    monkeypatch.undo()
    assert main(["predict", runs[0], str(photos), *CPU, "--out", str(out), "--save", "labels"]) == 3
    assert len(list(out.rglob("*.png"))) == 4


def test_a_name_that_is_no_text_is_printed_as_it_is(runs: list[str], photos: Path, tmp_path: Path, monkeypatch) -> None:
    photo = os.fsencode(photos) + b"/caf\xe9.jpg"
    try:
        os.rename(photos / "x.jpg", photo)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict"))
    assert main(["predict", runs[0], os.fsdecode(photo), *CPU, "--out", str(tmp_path)]) == 0
    printed = sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]
    assert printed == os.fsencode(tmp_path) + b"/caf\xe9-linear-seed0.png\n"
    assert os.path.isfile(printed[:-1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_paths_have_lines_of_their_own_on_a_terminal(
    runs: list[str], photos: Path, tmp_path: Path, monkeypatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["predict", runs[0], str(photos), *CPU, "--out", str(tmp_path)]) == 3
    # What a terminal leaves of a line is what comes after the last carriage return.
    lines = [line.rpartition("\r")[2] for line in screen.getvalue().splitlines()]
    paths = [str(tmp_path / f"{stem}-linear-seed0.png") for stem in ("x", "y.jpg", "y.png", "sub/x")]
    assert [line for line in lines if ".png" in line] == paths
    assert "predict  4/4 photos" in screen.getvalue()


def test_heads_that_print_classes_write_nothing(probe: tuple[str, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    run, photo = probe
    # A folder of photos that happens to be called as --out is by default.
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "a.png").write_bytes(photo.read_bytes())
    monkeypatch.chdir(tmp_path)
    for images in ("predictions", "."):
        assert main(["predict", run, images, *CPU]) == 0
        assert {row.split("\t")[0] for row in capsys.readouterr().out.splitlines()} == {"predictions/a.png"}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.png"]


def test_unknown_products_are_a_usage_error(runs: list[str], photos: Path, capsys) -> None:
    assert main(["predict", runs[0], str(photos), "--save", "overlays", *CPU]) == 2
    assert "did you mean overlay" in capsys.readouterr().err
