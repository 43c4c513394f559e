"""Decoding processes keep a batch ready, and no more."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcache.cache_spec import DataError
from fcache.extractor.decoding import Decoded, Decoders, Request

BATCH, COUNT = 6, 2


@dataclass(frozen=True)
class Counted:
    """Makes records larger than a pipe holds, and leaves a file for each in a folder."""

    folder: Path

    def __getitem__(self, request: Request) -> Decoded:
        image = np.full((3, 400, 400), request.sample, np.uint8)
        (self.folder / f"{request.sample:03d}").touch()
        return Decoded(request, image)

    def made(self) -> int:
        return len(list(self.folder.iterdir()))


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path)


def _requests(drawn: list[int]) -> Iterator[Request]:
    for i in range(40):
        drawn.append(i)
        yield Request("training", i, 0, (400, 400))


def test_a_batch_is_ready_before_it_is_asked_for(counted: Any) -> None:
    drawn: list[int] = []
    with Decoders(counted, COUNT, batch=BATCH) as decoders:
        records = decoders.stream(_requests(drawn))
        seen = [next(records)]
        until = time.monotonic() + 60
        while counted.made() < BATCH + COUNT and time.monotonic() < until:
            time.sleep(0.01)
        assert counted.made() == BATCH + COUNT == len(drawn)
        seen += records
    assert [d.request.sample for d in seen] == list(range(40))
    assert all((d.image == d.request.sample).all() for d in seen if d.image is not None)
    assert counted.made() == len(drawn) == 40


def test_records_that_nobody_takes_go_with_their_processes(counted: Any) -> None:
    with Decoders(counted, COUNT, batch=BATCH) as decoders:
        records = decoders.stream(_requests([]))
        next(records)
        records.close()
        # Started anew.
        assert [d.request.sample for d in decoders.stream(_requests([]))] == list(range(40))


def test_a_process_that_dies_in_the_midst_of_a_batch_is_an_error(counted: Any) -> None:
    with Decoders(counted, COUNT, batch=BATCH) as decoders:
        records = decoders.stream(_requests([]))
        next(records)
        decoders._started[0][0].kill()
        with pytest.raises(DataError, match="decoding process died.*SIGKILL|decoding process died .exit status -9"):
            list(records)
