"""Clips for tests: every frame says which one it is, in containers that readers which seek get wrong."""

import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8
_X264 = {"preset": "veryfast", "crf": "12"}
# tkhd matrices of a picture shown turned clockwise.
TURNS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


def painted(number: int, size: tuple[int, int]) -> np.ndarray:
    """A frame uint8 [H, W, 3] with its number in white and black bars, highest bit at the right, and a moving edge."""
    height, width = size
    frame = np.full((height, width, 3), 60, dtype=np.uint8)
    for bit in range(BITS):
        frame[: height // 2, bit * width // BITS : (bit + 1) * width // BITS] = 255 * (number >> bit & 1)
    frame[height // 2 :, : 1 + number * 3 % width] = (40, 130, 220)
    return frame


def number_of(frame: np.ndarray) -> int:
    """The number that `painted` put into a frame."""
    height, width = frame.shape[:2]
    bars = (frame[height // 4, (2 * bit + 1) * width // (2 * BITS)].mean() > 127 for bit in range(BITS))
    return sum(on << bit for bit, on in enumerate(bars))


def write_video(
    path: Path,
    codec: str = "libx264",
    *,
    count: int = 40,
    size: tuple[int, int] = (48, 96),
    options: Mapping[str, str] = {},
    b_frames: int = 2,
    group: int = 12,
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    container: Mapping[str, str] = {},
) -> Path:
    """Writes `count` painted frames; `times` are milliseconds where they are not regular. Gives `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=dict(container)) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.options = (dict(_X264) if codec == "libx264" else {}) | dict(options)
        stream.codec_context.gop_size = group
        stream.codec_context.max_b_frames = b_frames
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(painted(number, size), format="rgb24")
            frame.pts = number if times is None else times[number]
            if times is not None:
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cut_in_front(source: Path, path: Path, seconds: float) -> Path:
    """Copies a video from `seconds` on without encoding it: an MP4 gets an edit list over what is before. `path`."""
    with av.open(str(source)) as file, av.open(str(path), "w") as out:
        stream = file.streams.video[0]
        copied = out.add_stream_from_template(stream)
        start = int(seconds / stream.time_base)
        file.seek(start, stream=stream, backward=True)
        for packet in file.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, copied
                out.mux(packet)
    return path


def with_matrix(source: Path, path: Path, rows: tuple[int, int, int, int]) -> Path:
    """Copies an MP4 or MOV with (a, b, c, d) as the matrix that it is shown by. Gives `path`."""
    data = bytearray(source.read_bytes())
    header = data.index(b"tkhd") - 4
    a, b, c, d = (65536 * n for n in rows)
    struct.pack_into(">9i", data, header + 48, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def reference_frames(path: Path) -> np.ndarray:
    """All frames of a video as PyAV decodes them, one thread, one after the other, upright: uint8 [N, H, W, 3]."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "NONE"
        return np.stack([np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in file.decode(stream)])
