"""Requests to an object store: counted, repeated when their answer is lost, errors in fcache's words."""

import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from typing import Any, TypeVar

import obstore

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.storage.object_errors import explained, is_lost, is_past_the_end, is_refused, is_unknown
from fcache.cache_spec.storage.protocol import checked

# Pauses double from the first to the last, with jitter.
RETRIES = 10
FIRST_PAUSE = 0.1
LAST_PAUSE = 15.0
RETRY_SECONDS = 180.0
# Pieces of an upload, four at a time: 40 MB of memory a file. A store takes at most 10,000 of them.
PART_BYTES = 8 << 20
MAX_PARTS = 9_000
PARTS_IN_FLIGHT = 4
PAGE = 1000
MARK = "fcachewrite"
T = TypeVar("T")


@dataclass
class Counts:
    """What was asked of a store: gets, puts, lists, heads, deletes; retries and pieces of uploads are not apart."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0
    lists: int = 0
    looks: int = 0
    removals: int = 0


class Requests:
    """The requests that a storage makes to its store, an obstore store. Thread-safe.

    Every call raises FileNotFoundError, DataError or NoSpaceError, and SpecError for a name that leads elsewhere.
    """

    def __init__(self, url: str, store: Any, *, retries: int) -> None:
        self.url, self.store, self.counts = url, store, Counts()
        self._retries, self._lock = retries, threading.Lock()

    def get(self, name: str) -> tuple[bytes, Any]:
        """A whole object, and its version for `put_if`."""
        with explained(self.url, checked(name)):
            data, meta = self._again(lambda: _whole(obstore.get(self.store, name)))
        self._count(reads=1, read_bytes=len(data))
        return data, {key: meta[key] for key in ("e_tag", "version") if meta[key] is not None}

    def get_range(self, name: str, offset: int, length: int) -> memoryview:
        """Bytes from `offset` on, fewer than `length` if the object ends before."""
        with explained(self.url, checked(name)):
            try:
                found = self._again(lambda: obstore.get_range(self.store, name, start=offset, length=length))
                data = memoryview(found)
            except Exception as e:
                if not is_past_the_end(e):
                    raise
                data = memoryview(b"")
        self._count(reads=1, read_bytes=len(data))
        return data

    def head(self, name: str) -> Any:
        """Size, time and version of an object, as obstore names them."""
        self._count(looks=1)
        with explained(self.url, checked(name)):
            return self._again(lambda: obstore.head(self.store, name))

    def list_folder(self, folder: str) -> list[str]:
        """The paths of the objects right inside a folder."""
        self._count(lists=1)
        prefix = checked(folder) if folder else None
        with explained(self.url, folder):
            found = self._again(lambda: obstore.list_with_delimiter(self.store, prefix))
        return [o["path"] for o in found["objects"]]

    def list_all(self) -> Iterator[tuple[str, int]]:
        """Every object with its bytes, as pages come."""
        stream: Iterator[Any] | None = None
        last: str | None = None

        def page() -> Sequence[Any]:
            nonlocal stream
            stream = stream or iter(obstore.list(self.store, offset=last, chunk_size=PAGE))
            try:
                return next(stream, ())
            except Exception:
                # It goes on in a new listing, after the last object that came.
                stream = None
                raise

        while True:
            with explained(self.url):
                found = self._again(page)
            if found or last is None:
                self._count(lists=1)
            if not found:
                return
            last = found[-1]["path"]
            yield from ((o["path"], o["size"]) for o in found)

    def put(self, name: str, data: bytes) -> None:
        """Writes a small object, whole."""
        with explained(self.url, checked(name)):
            self._again(lambda: obstore.put(self.store, name, data, use_multipart=False))
        self._count(writes=1, written_bytes=len(data))

    def put_if(self, name: str, data: bytes, mode: Any) -> bool:
        """Writes a small object if there is none (mode "create") or the one there has a version (mode), else False.

        A mark beside the object tells our own write from another's when the answer to a request was lost.
        """
        mark = uuid.uuid4().hex
        self._count(writes=1, written_bytes=len(data))

        def put() -> None:
            attributes: Any = {MARK: mark}
            obstore.put(self.store, name, data, mode=mode, attributes=attributes, use_multipart=False)

        with explained(self.url, checked(name)):
            try:
                self._again(put)
                return True
            except Exception as e:
                if not (is_refused(e) or is_unknown(e)):
                    raise
                with suppress(FileNotFoundError):
                    found: Any = self._again(lambda: obstore.get(self.store, name).attributes)
                    if found.get(MARK) == mark:
                        return True
                if is_unknown(e):
                    raise
                return False

    def upload(self, name: str, file: FileIO) -> None:
        """Writes an object from a file, in pieces if it is large; nobody sees it before it is whole."""
        size = file.seek(0, 2)
        part = max(PART_BYTES, -(-size // MAX_PARTS))

        def put() -> None:
            file.seek(0)
            obstore.put(
                self.store, name, file, use_multipart=size > part, chunk_size=part, max_concurrency=PARTS_IN_FLIGHT
            )

        with explained(self.url, checked(name)):
            self._again(put)
        self._count(writes=1, written_bytes=size)
        found = self.head(name)["size"]
        if found != size:
            raise DataError(
                f"{self.url}/{name}: {size} bytes were uploaded, the store has {found}; run the same command again"
            )

    def delete(self, name: str) -> None:
        """Removes an object, if there is one."""
        self._count(removals=1)
        with suppress(FileNotFoundError), explained(self.url, checked(name)):
            self._again(lambda: obstore.delete(self.store, name))

    def _again(self, request: Callable[[], T]) -> T:
        """Repeats a request while its answer is lost where obstore does not: all of them may be done twice."""
        pause, until = FIRST_PAUSE, time.monotonic() + RETRY_SECONDS
        for _ in range(self._retries):
            try:
                return request()
            except Exception as e:
                if not is_lost(e) or time.monotonic() > until:
                    raise
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LAST_PAUSE)
        return request()

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, n in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + n)


def _whole(found: Any) -> tuple[bytes, Any]:
    return found.bytes().to_bytes(), found.meta
