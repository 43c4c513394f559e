"""Decoding: requests in, views with targets out, in worker processes or in this one."""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fcache.cache_spec import DataError, View
from fcache.cache_spec.storage.files import process_alive
from fcache.extractor.datasets import DatasetSplit, RawSample, Sample
from fcache.extractor.videos import FrameChoice
from fcache.extractor.views import cut_view, draw_frames

ATTEMPTS = 3


@dataclass(frozen=True)
class Request:
    """One record to make: which sample of a split, which view, on which canvas (height, width)."""

    split: str
    sample: int
    view: int
    canvas: tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """A record before the backbone: uint8 image [3, h, w] (the valid area) or clip [T, 3, h, w], its view, its targets
    by array path.

    `failure` is the reason if the sample cannot be used, then the rest is None; `unreadable` says that reading failed
    even after retries, which is no fault of the sample.
    """

    request: Request
    image: np.ndarray | None = None
    view: View | None = None
    targets: Mapping[str, Any] | None = None
    failure: str | None = None
    unreadable: bool = False


@dataclass(frozen=True)
class Decoder:
    """Makes records of opened splits; `cuts` maps a split to its view recipe. Picklable, for worker processes."""

    splits: Mapping[str, DatasetSplit]
    cuts: Mapping[str, Any]
    seed: int

    def __getitem__(self, request: Request) -> Decoded:
        split = self.splits[request.split]
        sample, cut = split.samples[request.sample], self.cuts[request.split]

        def frames(count: int) -> tuple[int, ...]:
            return draw_frames(cut, seed=self.seed, sample_id=sample.id, view=request.view, count=count)

        try:
            raw = load_sample(split, sample, frames)
            viewed = cut_view(
                cut,
                seed=self.seed,
                sample_id=sample.id,
                view=request.view,
                raw=raw,
                canvas=request.canvas,
                role=split.role,
            )
        except DataError as e:
            return Decoded(request, failure=str(e))
        except OSError as e:
            return Decoded(request, failure=f"{sample.path}: {e}", unreadable=True)
        return Decoded(request, viewed.image.numpy(), viewed.view, viewed.targets)


def load_sample(split: DatasetSplit, sample: Sample, frames: FrameChoice) -> RawSample:
    """A sample decoded, of a video the frames that are chosen; a read that fails is tried again a few times.

    Raises DataError if the sample cannot be decoded, OSError if it could not be read.
    """

    def load() -> RawSample:
        return split.load_frames(split.root, sample, frames) if split.load_frames else split.load(split.root, sample)

    for attempt in range(ATTEMPTS - 1):
        try:
            return load()
        except OSError:
            time.sleep(0.2 * 4**attempt)
    return load()


def decode(decoder: Decoder, requests: Iterable[Request], *, workers: int) -> Iterator[Decoded]:
    """The records of `requests` in order; `requests` is drawn from lazily, a few records ahead.

    With `workers` above 0 that many processes decode. Results travel as plain arrays through pipes: shared memory is
    often small where extractions run.
    """
    if workers == 0:
        yield from (decoder[r] for r in requests)
        return
    loader: DataLoader[Decoded] = DataLoader(
        decoder,  # type: ignore[arg-type]
        sampler=requests,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="forkserver",
        worker_init_fn=partial(_begin, os.getpid()),
        collate_fn=_as_is,  # type: ignore[arg-type]
        prefetch_factor=4,
    )
    try:
        yield from loader
    except RuntimeError as e:
        if "exited unexpectedly" not in str(e):
            raise
        raise DataError(
            f"a decoding process died ({e}), perhaps for lack of memory; use fewer --workers and run the same command "
            "again, it continues"
        ) from e


def _as_is(decoded: Decoded) -> Decoded:
    return decoded


def _begin(extractor: int, worker: int) -> None:
    """Starts a decoding process: it has one thread, and ends when the extraction was killed.

    Its parent is the fork server, which lives as long as a decoding process does: neither would ever end.
    """
    torch.set_num_threads(1)

    def watch() -> None:
        while process_alive(extractor):
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, name="fcache-watch", daemon=True).start()
