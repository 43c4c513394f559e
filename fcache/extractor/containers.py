"""Video files before they are decoded: which kinds are read, and what their structure says of damage and turns.

A decoder gives the frames that it finds in a file cut short as if the rest had never been. What the file says of its
own size shows the cut. Sources: ISO/IEC 14496-12 (boxes, `tkhd`), RFC 8794 (EBML), Microsoft's RIFF.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fcache.cache_spec.errors import DataError

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
# What a file of ISO boxes may begin with.
_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot"})
# Those whose bytes are needed: behind them a file may hold anything.
_MEDIA_BOXES = frozenset({b"moov", b"mdat", b"moof"})
_MOST_MOOV = 1 << 28
# Rows of (a, b; c, d) of a picture shown turned by 0, 90, 180 and 270 degrees.
_TURNS = frozenset({(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)})


def check_container(path: Path) -> None:
    """Raises DataError unless a file is MP4, MOV, Matroska, WebM or AVI, is as long as it says and is shown upright or
    turned by quarters; OSError if it cannot be read.

    Other containers (MPEG-TS among them) are refused: decord begins to read some of them in their midst.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(16)
        if head.startswith(_EBML):
            _check_matroska(path, file, size)
        elif head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            _check_length(path, "the AVI file", 8 + int.from_bytes(head[4:8], "little"), size)
        elif head[4:8] in _FIRST_BOXES:
            _check_boxes(path, file, size)
        else:
            found = "an empty file" if not size else f"one that begins with {head[:8].hex(' ')}"
            raise DataError(
                f"{path}: expected an MP4, MOV, Matroska, WebM or AVI file, found {found}; convert other containers "
                "(ffmpeg -i IN -c copy OUT.mp4), or remove the file"
            )


def _check_length(path: Path, what: str, end: int, size: int) -> None:
    # Some writers leave out the last byte of padding.
    if end > size + 1:
        raise DataError(f"{path}: cut short: {what} ends at byte {end}, there are {size}; fetch the file again")


def _check_matroska(path: Path, file: BinaryIO, size: int) -> None:
    file.seek(4)
    file.seek(_ebml_size(file) or 0, os.SEEK_CUR)
    if file.read(4) == _SEGMENT and (length := _ebml_size(file)) is not None:
        _check_length(path, "the segment", file.tell() + length, size)


def _ebml_size(file: BinaryIO) -> int | None:
    """A size as EBML writes it, None if it is unknown: that of a stream which was written as it came."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(width - 1), "big") & ((1 << 7 * width) - 1)
    return None if value == (1 << 7 * width) - 1 else value


def _check_boxes(path: Path, file: BinaryIO, size: int) -> None:
    start, seen = 0, set[bytes]()
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:
            length = size - start
        if kind in _MEDIA_BOXES:
            _check_length(path, f"the box {kind.decode()!r}", start + length, size)
        if kind == b"moov" and length <= _MOST_MOOV:
            file.seek(start)
            _check_turns(path, file.read(length))
        seen.add(kind)
        if length < 8:
            break
        start += length
    if b"moov" not in seen:
        raise DataError(f"{path}: cut short or never finished: it has no box 'moov'; fetch the file again")


def _check_turns(path: Path, moov: bytes) -> None:
    """Raises DataError for a mirrored video, or one turned by anything but quarters."""
    for trak in _inside(moov, b"trak"):
        media = [handler for mdia in _inside(trak, b"mdia") for handler in _inside(mdia, b"hdlr")]
        if not any(handler[16:20] == b"vide" for handler in media):
            continue
        for header in _inside(trak, b"tkhd"):
            first = 8 + (52 if header[8] == 1 else 40)
            a, b, _, c, d = struct.unpack_from(">5i", header, first) if len(header) >= first + 20 else (1, 0, 0, 0, 1)
            turn = tuple((x > 0) - (x < 0) for x in (a, b, c, d))
            if any(turn) and turn not in _TURNS:
                raise DataError(
                    f"{path}: shown mirrored, or turned by no multiple of 90 degrees (matrix {a} {b} {c} {d}), which "
                    "is not read; encode it as it is to be seen"
                )


def _inside(box: bytes, kind: bytes) -> Iterator[bytes]:
    """The boxes of a kind directly inside a box, heads included."""
    start = 8
    while start + 8 <= len(box):
        length = int.from_bytes(box[start : start + 4], "big")
        if length < 8:
            return
        if box[start + 4 : start + 8] == kind:
            yield box[start : start + length]
        start += length
