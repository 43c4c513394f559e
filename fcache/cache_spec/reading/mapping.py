"""Mapped files: maps that hold no descriptor, what of them is in memory, and the fastest copy out of them."""

import ctypes
import math
import mmap
import os
import sys
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value
# The same number on Linux, macOS and the BSDs.
_WILLNEED = 3
_Byte = ctypes.c_char * 1
PAGE = mmap.PAGESIZE
LINE = 64


class _Map:
    """Mapped memory as numpy takes it; unmapped with the last array of it."""

    __slots__ = ("_address", "_size")

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": (self._size,), "typestr": "|u1", "data": (self._address, True)}

    def __del__(self) -> None:
        # At exit threads may still copy, and the process gives everything back anyway.
        if not sys.is_finalizing():
            _LIBC.munmap(self._address, self._size)


def map_file(fd: int, size: int) -> np.ndarray:
    """A file mapped for reading, uint8, unmapped when the last view of it is gone. Raises OSError.

    Python's own `mmap` keeps a descriptor for every map, so that a thousand shards exhaust the usual limit.
    """
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return np.asarray(_Map(address, size))


def copy_words(source: np.ndarray, out: np.ndarray) -> None:
    """Copies unsigned integers [...] to integers of the same type and shape.

    The identity of words is a vector loop. `np.copyto` calls memcpy, which takes `rep movsb` below the size of the
    second-level cache: half as fast into a buffer that begins 16 bytes after a page, as large ones of malloc do, and
    equal into an aligned one (AMD EPYC, glibc 2.36).
    """
    np.positive(source, out)


def copy_all(sources: Iterable[np.ndarray], outs: Iterable[np.ndarray]) -> None:
    """`copy_words` of each source to its `out`."""
    deque(map(np.positive, sources, outs), maxlen=0)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """As `np.empty`, but it begins at a cache line, which copies into it gain from (see `copy_words`)."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + LINE, dtype=np.uint8)
    start = -raw.ctypes.data % LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def on_disk(address: int, length: int) -> bool:
    """Whether `length` mapped bytes at `address` are not in memory, judged by the page in their middle.

    Linux tells this only to the owner of a file and to those who may write to it; to others all is in memory.
    """
    found = _Byte()
    page = (address + length // 2) // PAGE * PAGE
    return _LIBC.mincore(page, PAGE, found) == 0 and not found.raw[0] & 1


def will_need(address: int, length: int) -> None:
    """Asks for `length` mapped bytes at `address` to be read from disk, and does not wait."""
    page = address // PAGE * PAGE
    _LIBC.madvise(page, address + length - page, _WILLNEED)
