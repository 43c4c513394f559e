"""How long to torture: a little by default, in full with FCACHE_TORTURE=full, whose counts are kept."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TypeVar

import pytest

from fcache.extractor import Job, extract
from fcache.extractor.scenes import write_scenes
from tests.torture.caches import contents

T = TypeVar("T")
FULL = os.environ.get("FCACHE_TORTURE") == "full"
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture
def rounds() -> Callable[[T, T], T]:
    """A function that picks how much: the little, or the full."""
    return lambda little, full: full if FULL else little


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, Mapping[str, object]], None]:
    """A function that shows the counts of a test at the end of the run, and keeps those of a full one."""

    def keep(name: str, counts: Mapping[str, object]) -> None:
        request.node.user_properties.append((f"torture: {name}", counts))
        if FULL:
            RESULTS.mkdir(parents=True, exist_ok=True)
            about = {"test": name, "date": f"{date.today():%Y-%m}", "python": platform.python_version()}
            (RESULTS / f"torture_{name}.json").write_text(json.dumps({**about, **counts}, indent=1) + "\n")

    return keep


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in memory where there is such a file system, else on disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="fcache-torture-", dir=memory))
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A small extraction that was not run: 44 records in shards of two."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(root, train=20, val=4, size=(48, 64))
    return Job(
        model="mobilenetv2_050", dataset="ade20k", root=root, cache=root.parent / "whole", weights="random:0", views=2,
        view_recipe="ade20k-small", input_size=(32, 32), shard_records=2, batch_size=1, workers=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(job: Job) -> dict[str, bytes]:
    """The files of its cache after an uninterrupted run."""
    extract(job, report=lambda _: None)
    return contents(job.cache)
