"""What an extraction costs in hours, and from when on a cache is cheaper than running the backbone again.

Everything is counted from four measured rates. Decoding, backbone and disk work beside each other, so the slowest sets
the pace. What the heads themselves take is the same with and without a cache, and left out.
"""

import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# What the disk is measured with: enough for a steady rate, a second or so of a slow disk.
PROBE_BYTES = 64 << 20


@dataclass(frozen=True)
class Rates:
    """Measured rates of one machine.

    `decoding` are the seconds that one process takes to decode a record, `computing` those that one device takes for
    the backbone and the encoding; `writing` and `reading` are bytes a second of the disk, written durably and read with
    nothing in memory (None: not measured, as for object stores).
    """

    decoding: float
    computing: float
    writing: float | None
    reading: float | None


@dataclass(frozen=True)
class Work:
    """What is to be done: records and bytes still to extract, and what one pass over the training split reads.

    `decoders` are the decoding processes of each of `devices`; 0: a device's own process decodes, between batches.
    """

    records: int
    bytes: int
    pass_records: int
    pass_bytes: int
    decoders: int
    devices: int


@dataclass(frozen=True)
class Costs:
    """What comes of rates and work: seconds, and what limits the extraction.

    `live_pass` is one pass over the training samples with the backbone, `cached_pass` the same read from the cache
    (None: not measured). `passes` says from how many passes on (heads trained one by one, times epochs) extracting and
    reading is faster than running the backbone each time; None: never, or not measured. Heads that are trained
    together share their passes in both cases.
    """

    extraction: float
    limit: str
    live_pass: float
    cached_pass: float | None
    passes: int | None


def costs(rates: Rates, work: Work) -> Costs:
    """The costs of some work at measured rates."""
    decoding, computing = rates.decoding / max(1, work.decoders), rates.computing
    if work.decoders == 0:
        steps = {"decoding and the backbone in one process": decoding + computing}
    else:
        steps = {"decoding": decoding, "the backbone": computing}
    each = {name: seconds / work.devices for name, seconds in steps.items()}
    whole = {name: seconds * work.records for name, seconds in each.items()}
    if rates.writing:
        whole["writing"] = work.bytes / rates.writing
    limit = max(whole, key=whole.__getitem__)
    live = max(each.values()) * work.pass_records
    cached = work.pass_bytes / rates.reading if rates.reading else None
    passes = None
    if cached is not None and cached < live:
        # One pass at least: a cache that is never read saves nothing.
        passes = max(1, math.ceil(whole[limit] / (live - cached)))
    return Costs(whole[limit], limit, live, cached, passes)


def disk_rates(folder: Path, *, size: int = PROBE_BYTES) -> tuple[float, float] | None:
    """Bytes a second that a disk writes durably and reads: measured with a file that is gone afterwards.

    `folder` may not exist yet: what counts is the disk that it will be on. None if nothing may be written there, or if
    there is no room for four such files.
    """
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < 4 * size:
        return None
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        wrote = time.perf_counter() - started
        if hasattr(os, "posix_fadvise"):
            # Else what is read lies in memory still; elsewhere than on Linux it does.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(len(block))
        started = time.perf_counter()
        while file.readinto(buffer):
            pass
        read = time.perf_counter() - started
    return size / wrote, size / read
