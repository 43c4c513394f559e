"""Mapped files: maps that hold no descriptor, what of them is in memory, and the fastest copy out of them."""

import ctypes
import mmap
import os
import weakref

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED = ctypes.c_void_p(-1).value
PAGE = mmap.PAGESIZE


def map_file(fd: int, size: int) -> np.ndarray:
    """A file mapped for reading, uint8, unmapped when the last view of it is gone.

    Python's own `mmap` keeps a descriptor for every map, so that a thousand shards exhaust the usual limit.
    """
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    buffer = (ctypes.c_uint8 * size).from_address(address)
    # Not at exit: threads may still copy, and the process gives everything back anyway.
    weakref.finalize(buffer, _LIBC.munmap, address, size).atexit = False
    mapped = np.ctypeslib.as_array(buffer)
    mapped.flags.writeable = False
    return mapped


def copy_words(source: np.ndarray, out: np.ndarray) -> None:
    """Copies uint64 [n] to uint64 [n].

    The identity of words is a vector loop. `np.copyto` calls memcpy, which below the size of the second-level cache
    takes `rep movsb`: from page-cache pages that is 1.8 times slower (AMD EPYC, glibc 2.36).
    """
    np.positive(source, out=out)


def on_disk(address: int, length: int) -> bool:
    """Whether `length` mapped bytes at `address` are not in memory, judged by the page in their middle."""
    found = ctypes.create_string_buffer(1)
    page = (address + length // 2) // PAGE * PAGE
    return _LIBC.mincore(page, PAGE, found) == 0 and not found.raw[0] & 1
