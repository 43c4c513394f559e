"""Motion JPEG in AVI: a container that needs no encoder of its own, and in which every frame is a key frame.

RIFF as Microsoft's "AVI RIFF File Reference" has it: headers, the frames, and an index of them.
"""

import struct
from collections.abc import Sequence

from fcache.cache_spec.errors import SpecError

_HAS_INDEX, _KEY_FRAME = 0x10, 0x10
# Sizes are signed 32-bit numbers for some readers.
_MOST_BYTES = 2**31 - 1


def avi_bytes(frames: Sequence[bytes], *, size: tuple[int, int], rate: int) -> bytes:
    """An AVI file of JPEG frames of (height, width), `rate` of them a second.

    Raises SpecError if there is no frame, or if the file would pass 2 GiB.
    """
    if not frames:
        raise SpecError("a video has at least one frame, got none")
    largest = max(len(frame) for frame in frames)
    movie, index = [b"movi"], []
    offset = 4
    for frame in frames:
        movie.append(_chunk(b"00dc", frame))
        index.append(struct.pack("<4sIII", b"00dc", _KEY_FRAME, offset, len(frame)))
        offset += len(movie[-1])
    body = b"AVI " + _headers(len(frames), size, rate, largest)
    body += _chunk(b"LIST", b"".join(movie)) + _chunk(b"idx1", b"".join(index))
    if len(body) > _MOST_BYTES:
        raise SpecError(f"an AVI file holds at most 2 GiB, these frames are {len(body)} bytes; write shorter videos")
    return _chunk(b"RIFF", body)


def _headers(count: int, size: tuple[int, int], rate: int, largest: int) -> bytes:
    height, width = size
    main = struct.pack(
        "<14I", 1_000_000 // rate, largest * rate, 0, _HAS_INDEX, count, 0, 1, largest, width, height, 0, 0, 0, 0
    )
    stream = struct.pack("<4s4sIHHIIIII", b"vids", b"MJPG", 0, 0, 0, 0, 1, rate, 0, count)
    stream += struct.pack("<III4h", largest, 2**32 - 1, 0, 0, 0, width, height)
    picture = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", 3 * width * height, 0, 0, 0, 0)
    streams = _chunk(b"LIST", b"strl" + _chunk(b"strh", stream) + _chunk(b"strf", picture))
    return _chunk(b"LIST", b"hdrl" + _chunk(b"avih", main) + streams)


def _chunk(name: bytes, content: bytes) -> bytes:
    """A RIFF chunk, padded to an even number of bytes, which its size does not count."""
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) % 2)
