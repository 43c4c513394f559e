"""Decoding: requests in, views with targets out, in worker processes or in this one."""

import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fcache.cache_spec import DataError, View
from fcache.extractor.children import child_context, pipe_of
from fcache.extractor.datasets import DatasetSplit, RawSample, Sample
from fcache.extractor.videos import FrameChoice
from fcache.extractor.views import cut_view, draw_frames

ATTEMPTS = 3
# Records that each decoding process is ahead at least: enough to even out large and small photos.
RECORDS_AHEAD = 4


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


class Decoders:
    """Decoding processes: started when records are first asked for, kept until `close`. Use as a context manager.

    With a `count` of 0 records are made in the calling thread. Otherwise as many as a `batch` are ready when it is
    drawn, if the processes keep up: a thread takes them from the processes, which would wait in the midst of a record
    else. Each process has its own pipe, so that the death of one is seen at once, in the midst of a record too. Records
    travel as plain arrays through these pipes: shared memory is often small where extractions run.
    """

    def __init__(self, decoder: Decoder, count: int, *, batch: int = 1) -> None:
        self._decoder, self._count, self._ahead = decoder, count, max(RECORDS_AHEAD * count, batch + count)
        self._started: list[tuple[Any, Connection]] = []
        self._receive = ThreadPoolExecutor(1, "fcache-receive")

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def stream(self, requests: Iterable[Request]) -> Generator[Decoded]:
        """The records of `requests` in order; `requests` is drawn from lazily, a batch or a few records ahead.

        One stream at a time. Close one that is not exhausted: its records are dropped with the processes. Raises
        DataError if a process dies.
        """
        if self._count == 0:
            yield from (self._decoder[r] for r in requests)
            return
        if not self._started:
            self._started = [self._start() for _ in range(self._count)]
        waiting: deque[Future[Decoded]] = deque()
        try:
            for one, request in zip(cycle(self._started), requests, strict=False):
                _send(one, request)
                waiting.append(self._receive.submit(_receive, one))
                if len(waiting) >= self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            if waiting:
                self.close()

    def close(self) -> None:
        """Ends the processes; they hold nothing that could be lost."""
        for process, _ in self._started:
            process.kill()
        # What is being received ends with its process.
        self._receive.shutdown(cancel_futures=True)
        self._receive = ThreadPoolExecutor(1, "fcache-receive")
        for process, pipe in self._started:
            pipe.close()
            process.join()
        self._started = []

    def _start(self) -> tuple[Any, Connection]:
        context = child_context()
        ours, theirs = pipe_of(context)
        process = context.Process(target=_serve, args=(self._decoder, theirs), name="fcache-decoder", daemon=True)
        try:
            process.start()
        except AssertionError as e:
            raise DataError(
                "decoding processes cannot be started from a daemon process; say --workers 0, or start dask's workers "
                "with DASK_DISTRIBUTED__WORKER__DAEMON=False"
            ) from e
        theirs.close()
        return process, ours


def _send(one: tuple[Any, Connection], request: Request) -> None:
    try:
        one[1].send(request)
    except OSError as e:
        raise _died(one) from e


def _receive(one: tuple[Any, Connection]) -> Decoded:
    try:
        return one[1].recv()
    except (EOFError, OSError) as e:
        raise _died(one) from e


def _died(one: tuple[Any, Connection]) -> DataError:
    one[0].join(5.0)
    return DataError(
        f"a decoding process died (exit status {one[0].exitcode}), perhaps for lack of memory; use fewer --workers and "
        "run the same command again, it continues"
    )


def _serve(decoder: Decoder, pipe: Connection) -> None:
    """Makes records until nobody asks any more: the pipe ends with the extraction, however that ended."""
    # Ctrl-C reaches every process of a terminal: the extraction decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(decoder[pipe.recv()])
