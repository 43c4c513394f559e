"""Videos as arrays: chosen frames, decoded by decord from the first frame on.

decord finds a frame by seeking, and where groups of pictures are open, an edit list cuts the stream or AVI holds B
frames it lands on another one without a word. Read from the beginning, one frame after the other, it gives what FFmpeg
decodes, in order: so nothing here seeks, and `skip_frames`, which does, is not used either. Past the last frame decord
repeats frames to reach the number that it counted; asked to tolerate none, it says so, and that is the end.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcache.cache_spec.errors import DataError, SpecError
from fcache.extractor.containers import check_container

EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi"})
FrameChoice = Callable[[int], Sequence[int]]
# decord takes 0 for "any number".
_NO_REPEATS = 1e-9
# Time stamps that are missing lie far below zero.
_EARLIEST = -1e9
# What decord writes before a message: when, where in its source, and which check failed.
_PLACE = re.compile(r"(\[[\d:]+\] \S+\.cc:\d+: )+(Check failed: .* vs\. \S+\) )?(Thread worker: )?")
# How it reports a read that failed, with the system's number of the error.
_READ_FAILED = re.compile(r"av_read_frame failed with (\d{1,3})\b")


@dataclass(frozen=True)
class Frames:
    """Frames of a video of `count` frames: uint8 RGB `pixels` [N, H, W, 3], upright, and their `numbers` from 0."""

    pixels: np.ndarray
    numbers: tuple[int, ...]
    count: int


def check_decoder() -> None:
    """Raises SpecError if there is no decord here."""
    try:
        import decord
    except (ImportError, OSError) as e:
        raise SpecError(
            f"videos are decoded by decord, which cannot be imported ({e}); it is there for Linux and Windows on "
            "x86-64 only: extract there, a cache is read anywhere"
        ) from e
    # What FFmpeg prints about single files says nothing that an error does not say.
    decord.logging.set_level(decord.logging.QUIET)


def read_frames(path: Path, choose: FrameChoice) -> Frames:
    """The frames of a video that `choose(number of frames)` names, in its order; the same one may be named again.

    All of the video is decoded, only the frames that are named are kept, beside a few that decord decoded ahead. It is
    the whole that says how many frames there are, and whether any is damaged: for decord is ahead of its reader, one
    that stopped early would meet damage behind its last frame in one run and miss it in the next.
    Raises DataError for a file that is damaged, cut short, or of a kind that decord cannot read right, OSError if
    reading failed.
    """
    # Counted ahead from time stamps, which is nearly always right.
    reader, count = _open(path)
    found, end = _forward(reader, path, choose(count))
    if end != count:
        count, (reader, _) = end, _open(path)
        found, end = _forward(reader, path, choose(count) if count else [])
    if found is None or end != count:
        raise DataError(f"{path}: holds {count} frames that can be decoded, then {end}; replace or remove the file")
    return Frames(*found, count)


def video_size(path: Path) -> tuple[int, int]:
    """The (height, width) of a video's frames, upright. Raises as `read_frames`."""
    return tuple(read_frames(path, lambda count: [0]).pixels.shape[1:3])


def _open(path: Path) -> tuple[Any, int]:
    """A reader of a file at its first frame, and how many frames there should be."""
    check_container(path)
    check_decoder()
    import decord

    try:
        name = str(path).encode().decode()
        reader = decord.VideoReader(name, num_threads=1, fault_tol=_NO_REPEATS)  # pyright: ignore[reportArgumentType]
        starts = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    except UnicodeEncodeError as e:
        raise DataError(f"{path!r}: the name is no valid Unicode; rename the file") from e
    except (decord.DECORDError, RuntimeError, AssertionError) as e:
        raise _failure(path, "cannot be opened", e) from e
    cut = int(((starts < 0) & (starts > _EARLIEST)).sum())
    return reader, max(1, len(reader) - cut)


def _forward(reader: Any, path: Path, chosen: Sequence[int]) -> tuple[tuple[np.ndarray, tuple[int, ...]] | None, int]:
    """Pixels and numbers of the chosen frames (None if there is none of them), and how many the video has."""
    import decord

    numbers = tuple(int(n) for n in chosen)
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    pixels: np.ndarray | None = None
    number = 0
    while True:
        try:
            frame = reader.next()
        except (StopIteration, decord.DECORDLimitReachedError):
            return (None if pixels is None else (pixels, numbers)), number
        except decord.DECORDError as e:
            raise _failure(path, "damaged, not all of its frames can be decoded", e) from e
        if number in places:
            shown = _pixels(frame.asnumpy())
            if pixels is None:
                pixels = np.empty((len(numbers), *shown.shape), dtype=np.uint8)
            pixels[places[number]] = shown
        number += 1


def _pixels(frame: np.ndarray) -> np.ndarray:
    """A frame [H, W, 3]. Where padding makes a row of FFmpeg's 4 W bytes long, decord takes it for four channels."""
    height, width = frame.shape[:2]
    return frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def _failure(path: Path, what: str, error: Exception) -> DataError | OSError:
    """What went wrong, in a line; decord's own text has places in its source before it and a stack behind."""
    text = (str(error).strip().splitlines() or [""])[0]
    if failed := _READ_FAILED.search(text):
        return OSError(int(failed[1]), "a read failed while it was decoded", str(path))
    if "cannot find video stream" in text:
        return DataError(f"{path}: holds no video that decord can decode (it knows no AV1); encode it as H.264")
    return DataError(f"{path}: {what} ({_PLACE.sub('', text)[:200].rstrip('.')}); replace or remove the file")
