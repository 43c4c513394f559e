"""What every test may rely on: one thread, a fixed seed, no network, and real data where it is present."""

import os
import random
from collections.abc import Mapping
from pathlib import Path

# Read by the hub client, by OpenMP and by MKL when first imported, hence before torch.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("dev", deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

# Files of few but long tests. They go first, so that no process is left alone with one at the end.
LONG = ("torture/", "test_detection_overfit", "test_processes", "test_engine", "test_object_stores", "test_copying")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which several processes (`make test`) take them up."""
    items.sort(key=lambda item: not any(name in item.path.as_posix() for name in LONG))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for every test, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real photos and weights that the environment variable FCACHE_TEST_DATA names."""
    folder = os.environ.get("FCACHE_TEST_DATA")
    required = os.environ.get("FCACHE_REQUIRE_TEST_DATA") == "1"
    reason = "FCACHE_TEST_DATA is not set: tests on real photos and weights need that folder"
    if folder and not Path(folder).is_dir():
        pytest.fail(f"FCACHE_TEST_DATA names {folder}, which is no folder")
    if folder:
        return Path(folder)
    if required:
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints what tests counted: properties of their reports, which come from workers too."""
    reports = [r for found in terminalreporter.stats.values() for r in found if isinstance(r, pytest.TestReport)]
    for name, counts in dict(pair for r in reports for pair in r.user_properties).items():
        if not isinstance(counts, Mapping):
            continue
        terminalreporter.write_sep("-", name.replace("_", " "))
        for what, count in counts.items():
            parts = count.items() if isinstance(count, Mapping) else [("", count)]
            for part, number in parts:
                terminalreporter.write_line(f"{number:>8}  {what}{': ' if part else ''}{part}")
