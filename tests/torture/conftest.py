"""How long to torture: a little by default, in full with FCACHE_TORTURE=full, whose counts are kept."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path

import pytest

FULL = os.environ.get("FCACHE_TORTURE") == "full"
RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture
def rounds() -> Callable[[int, int], int]:
    """A function that picks the count: the small one, or the full one."""
    return lambda few, all_of_them: all_of_them if FULL else few


@pytest.fixture
def record() -> Callable[[str, Mapping[str, object]], None]:
    """A function that keeps the counts of a full run."""

    def keep(name: str, counts: Mapping[str, object]) -> None:
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
