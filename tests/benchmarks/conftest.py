"""The benchmarks are scripts beside each other: they are imported from their folder, and a workload that is tiny."""

import sys
from pathlib import Path

import pytest

from fcache.cache_spec import LevelSpec

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
LEVELS = (LevelSpec("level-4", "C H W", (3, 8, 8), 4), LevelSpec("level-8", "C H W", (5, 4, 4), 8))


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


@pytest.fixture
def workload():
    from storage.workload import Workload

    return Workload(6, levels=LEVELS, batch=2, shard_records=4)


@pytest.fixture
def stored(workload, tmp_path):
    """A cache and a flat file with the same records."""
    workload.write_flat(tmp_path / "flat.bin")
    workload.write_cache(tmp_path / "cache", workload.flat(tmp_path / "flat.bin"))
    return tmp_path
