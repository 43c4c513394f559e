"""Folders for caches of many small, durably written files: in memory where there is such a file system."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="session")
def folder_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """A function that gives a new path of a cache, for tests that hypothesis runs many times."""
    parent = MEMORY if os.access(MEMORY, os.W_OK) else tmp_path_factory.getbasetemp()
    made = Path(tempfile.mkdtemp(prefix="fcache-test-", dir=parent))
    yield lambda: Path(tempfile.mkdtemp(dir=made)) / "a.fcache"
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in which fsync costs nothing."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="fcache-test-", dir=MEMORY))
    yield made
    shutil.rmtree(made, ignore_errors=True)
