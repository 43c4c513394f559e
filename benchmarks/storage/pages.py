"""The page cache: emptying it of some files, checking that it is, and reading files past it."""

import ctypes
import gc
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
BLOCK = 4 << 20


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def evict(paths: Sequence[Path]) -> None:
    """Drops files out of memory. Raises SystemExit if more than a thousandth of their pages stay there."""
    # A reader that is not collected yet still maps its files, and mapped pages stay.
    gc.collect()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    there, pages = resident(paths)
    if there > pages / 1000:
        raise SystemExit(f"{there} of {pages} pages of {paths[0].parent} stay in memory: cold reads cannot be measured")


def resident(paths: Sequence[Path]) -> tuple[int, int]:
    """How many pages of files are in memory, and how many there are."""
    there = pages = 0
    for path in paths:
        if size := path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
                count = -(-size // mmap.PAGESIZE)
                found = ctypes.create_string_buffer(count)
                data = np.frombuffer(mapped, np.uint8)
                if _LIBC.mincore(data.ctypes.data, size, found):
                    raise OSError(ctypes.get_errno(), "mincore")
                del data
                there += int((np.frombuffer(found.raw, np.uint8) & 1).sum())
                pages += count
    return there, pages


def read_past_cache(paths: Sequence[Path], threads: int = 1) -> int:
    """Reads files one after another with O_DIRECT, 4 MiB at a time; returns the bytes read.

    With more threads each reads its own share of the files.
    """
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(_read_share, [paths[t::threads] for t in range(threads)]))


def _read_share(paths: Sequence[Path]) -> int:
    # O_DIRECT needs an aligned buffer: a page-aligned anonymous map is one.
    done, buffer = 0, mmap.mmap(-1, BLOCK)
    for path in paths:
        fd, offset = os.open(path, os.O_RDONLY | os.O_DIRECT), 0
        try:
            while n := os.preadv(fd, [buffer], offset):
                offset += n
                done += n
                if n % mmap.PAGESIZE:
                    break
        finally:
            os.close(fd)
    return done
