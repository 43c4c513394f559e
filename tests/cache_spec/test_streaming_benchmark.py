"""The streaming benchmark runs, and compares bit for bit before it times."""

import importlib.util
from pathlib import Path

import pytest

from fcache.cache_spec import LevelSpec

SCRIPT = Path(__file__).parents[2] / "benchmarks/streaming.py"


@pytest.fixture
def streaming(monkeypatch):
    spec = importlib.util.spec_from_file_location("streaming", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(module, "LEVELS", (LevelSpec("level-4", "C H W", (3, 8, 8), 4), LevelSpec("p", "C", (5,), 8)))
    return module


def test_it_measures_every_variant(streaming, folder):
    result = streaming.measure(folder, 6, 2)
    assert len(result["rows"]) == 5
    assert all(row["mb_per_s"] > 0 for row in result["rows"].values())
    assert streaming.table(result).count("\n|") == 7


def test_it_refuses_to_time_wrong_numbers(streaming, folder):
    streaming.make_stores(folder, 6)
    path = folder / "flat.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit, match="fcache reads other numbers"):
        streaming.check(streaming.cache_batches(folder, 1, "mmap"), folder, 6, "fcache")
