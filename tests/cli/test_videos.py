"""Videos as a user runs them: extract, train, score in 4 x 3 views, predict. For tests/cli/test_videos.py, once the
branches video and videoheads are one."""

from pathlib import Path

import pytest
from PIL import Image

from fcache.cli import main
from fcache.extractor.scenes import write_moving_scenes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_moving_scenes(folder / "data", train=8, val=8, size=(64, 64))
    cache = ["--cache", str(folder / "c.fcache")]
    line = ["--model", "test_resnet", "--weights", "random:0", "--dataset", "kinetics400", "--workers", "0"]
    line += ["--data-root", str(folder / "data"), "--recipe", "k400-small", "--views", "1", "--input-size", "64", "64"]
    assert main(["extract", *line, *cache, "--device", "cpu"]) == 0
    options = ["--recipe", "k400-small", "--iters", "2", "--allow-random-backbone", "--device", "cpu"]
    assert main(["train-head", *cache, "--head", "linear", *options, "--out", str(folder / "runs")]) == 0
    return folder / "runs" / "linear-seed0"


def test_predict_prints_classes_and_writes_a_contact_sheet(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = next((run.parents[1] / "data" / "val").rglob("*.avi"))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(["predict", str(run), str(clip), str(tmp_path / "bad.mp4"), "--tta", "4x3", "--out", str(out)]) == 3
    found = capsys.readouterr()
    *lines, sheet = found.out.strip().splitlines()
    assert len(lines) == 5
    assert all(line.split("\t")[0] == str(clip) for line in lines)
    chances = [float(line.split("\t")[2]) for line in lines]
    assert chances == sorted(chances, reverse=True)
    assert 0 < sum(chances) <= 1
    assert sheet == str(out / f"{clip.stem}-{run.name}.png")
    # 8 frames of 64 x 64 pixels in three rows, and a legend.
    with Image.open(sheet) as picture:
        assert picture.size[1] >= 3 * 64
    assert "bad.mp4: expected an MP4, MOV, Matroska, WebM or AVI file" in found.err


def test_scores_of_12_views_carry_their_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--tta", "4x3", "--device", "cpu"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if str(run) in line]
    assert [(row[2], row[3]) for row in rows] == [("8", "4x3")]
