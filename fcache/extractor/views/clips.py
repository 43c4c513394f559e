"""Which frames of a video make a clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fcache.cache_spec.errors import SpecError
from fcache.extractor.views.draws import below, stream

STARTS = ("random", "middle")


@dataclass(frozen=True)
class Clip:
    """`frames` frames of a video, `interval` apart, that begin at a `start`: "random", or so that the clip lies in the
    "middle". A video that is shorter than the clip is repeated. Raises SpecError for numbers without sense.
    """

    frames: int
    interval: int
    start: str

    def __post_init__(self) -> None:
        if self.frames < 1 or self.interval < 1 or self.start not in STARTS:
            raise SpecError(
                f"a clip has frames and an interval from 1 and starts {' or '.join(STARTS)}; got {self.frames}, "
                f"{self.interval}, {self.start!r}"
            )

    @property
    def span(self) -> int:
        """Frames of the video from the first of a clip to its last."""
        return (self.frames - 1) * self.interval + 1


def draw_clip(clip: Clip, count: int, numbers: np.ndarray) -> tuple[int, ...]:
    """The frames of the clip that `numbers` (uniform in [0, 1)) pick in a video of `count` frames."""
    room = max(0, count - clip.span)
    start = below(next(stream(numbers)), room + 1) if clip.start == "random" else room // 2
    return _from(start, clip, count)


def spread_clips(clip: Clip, count: int, clips: int) -> tuple[tuple[int, ...], ...]:
    """The frames of `clips` clips that begin evenly spread, the first with the video and the last so that it ends
    with it; a single one lies in the middle.
    """
    room = max(0, count - clip.span)
    starts = [room // 2] if clips == 1 else [(2 * i * room + clips - 1) // (2 * (clips - 1)) for i in range(clips)]
    return tuple(_from(start, clip, count) for start in starts)


def flat(clips: Sequence[Sequence[int]]) -> list[int]:
    """The frames of clips one after the other."""
    return [number for clip in clips for number in clip]


def _from(start: int, clip: Clip, count: int) -> tuple[int, ...]:
    return tuple((start + i * clip.interval) % count for i in range(clip.frames))
