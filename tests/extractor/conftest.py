"""A small synthetic data set and jobs on it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from videobuilder import write_video

from fcache.extractor import Job
from fcache.extractor.scenes import write_coco_scenes, write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 training and 4 validation scenes of 64x80 pixels; nothing may be written there."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, train=10, val=4, size=(64, 80))
    return root


@pytest.fixture(scope="session")
def coco_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 training and 5 validation scenes of 64x80 pixels in COCO's layout; nothing may be written there."""
    root = tmp_path_factory.mktemp("scenes") / "coco"
    write_coco_scenes(root, train=8, val=5, size=(64, 80))
    return root


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 training and 3 validation clips of 30 frames of 48x64 pixels in two classes; nothing may be written there."""
    root = tmp_path_factory.mktemp("clips") / "data"
    names = ["train/run/a.mp4", "train/run/b.mkv", "train/run/c.avi", "train/sit/d.mp4", "train/sit/e.mp4"]
    for name in [*names, "train/sit/f.mp4", "val/run/g.mp4", "val/sit/h.mkv", "val/sit/i.mp4"]:
        codec = "mpeg4" if name.endswith(".avi") else "libx264"
        write_video(root / name, codec, count=30, size=(48, 64))
    return root


@pytest.fixture
def make_clip_job(clips: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job on the clips: a small random backbone in fp32, 8 frames of 64 pixels, two views, shards of three."""
    job = Job(
        model="test_resnet", dataset="kinetics400", root=clips, cache=tmp_path / "cache", weights="random:0",
        views=2, view_recipe="kinetics400-small", input_size=(64, 64), precision="fp32", shard_records=3, batch_size=2,
        workers=0,
    )  # fmt: skip
    return lambda **changes: replace(job, **changes)


@pytest.fixture
def make_job(scenes: Path, tmp_path: Path) -> Callable[..., Job]:
    """A job on the scenes: a small random backbone in fp32, 64-pixel crops, two views, shards of three."""
    job = Job(
        model="mobilenetv2_050", dataset="ade20k", root=scenes, cache=tmp_path / "cache", weights="random:0", views=2,
        view_recipe="ade20k-small", input_size=(64, 64), precision="fp32", shard_records=3, batch_size=2, workers=0,
    )  # fmt: skip
    return lambda **changes: replace(job, **changes)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a cache by name; of commits everything but times and hosts, and the digest over these."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        data = path.read_bytes()
        if name.startswith("commits/"):
            commit: dict[str, Any] = json.loads(data)
            del commit["run"], commit["digest"]
            data = json.dumps(commit, sort_keys=True).encode()
        found[name] = data
    return found
