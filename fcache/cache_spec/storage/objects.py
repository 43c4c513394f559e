"""Caches in object stores (s3://bucket/prefix, gs://, az://), over obstore, the store that zarr-python uses, too.

Credentials and the endpoint come from the environment; no value, file or message holds them.
"""

import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from fcache.cache_spec.errors import CorruptError, DataError, SpecError
from fcache.cache_spec.storage.files import ORPHAN_SECONDS, process_alive
from fcache.cache_spec.storage.protocol import Range, checked

try:
    from obstore.store import MemoryStore, from_url
except ModuleNotFoundError:
    raise SpecError("object stores need the package obstore: pip install 'fcache[s3]'") from None

from fcache.cache_spec.storage.object_errors import explained
from fcache.cache_spec.storage.object_files import ObjectFile
from fcache.cache_spec.storage.object_requests import FIRST_PAUSE, LAST_PAUSE, RETRIES, RETRY_SECONDS, Counts, Requests

SCHEMES = ("s3", "gs", "az", "memory")
# Requests in flight of one storage: 20 ms of latency cost 0.3 ms a request.
CONCURRENT = 64
# A request that receives nothing for so long is tried again; a whole one may take long on a slow line.
STALL_SECONDS = 60.0
REQUEST_SECONDS = 600.0
# How long a comparison of clocks is trusted.
CLOCK_SECONDS = 600.0


def open_objects(url: str, *, retries: int = RETRIES) -> "ObjectStorage":
    """The storage at an object-store URL; nothing is asked of the store yet. `memory://name` lives in this process.

    Raises SpecError for another kind of URL.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        # Not repeated: it may hold a password.
        raise SpecError(
            f"a URL of an object store is {parts.scheme}://bucket/prefix, without user, '?' and '#'; credentials come "
            "from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, …)"
        )
    prefix = parts.path.strip("/")
    if parts.scheme not in SCHEMES or not parts.netloc:
        raise SpecError(
            f"an object store is written s3://bucket/prefix (or gs://, az://), got {url}; a path needs no ://"
        )
    where = f"{parts.scheme}://{parts.netloc}" + (f"/{checked(prefix)}" if prefix else "")
    if parts.scheme == "memory":
        return ObjectStorage(Requests(where, _memory(where), retries=retries))
    client: Any = {
        "read_timeout": timedelta(seconds=STALL_SECONDS),
        "timeout": timedelta(seconds=REQUEST_SECONDS),
        # With options of its own, a client does not look for this one in the environment.
        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on"),
    }
    retry: Any = {
        "max_retries": retries,
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_PAUSE),
            "max_backoff": timedelta(seconds=LAST_PAUSE),
            "base": 2,
        },
    }
    with explained(where):
        quoted = f"{parts.scheme}://{parts.netloc}/{quote(prefix)}"
        store = from_url(quoted, client_options=client, retry_config=retry)
    return ObjectStorage(Requests(where, store, retries=retries))


@functools.cache
def _memory(where: str) -> MemoryStore:
    return MemoryStore()


class ObjectStorage:
    """The files of one cache as objects below a prefix; see `Storage`. Thread-safe."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._lock = threading.Lock()
        self._clock: tuple[datetime, float] | None = None

    @property
    def counts(self) -> Counts:
        """The requests so far."""
        return self._requests.counts

    @functools.cached_property
    def zarr(self) -> Any:
        """The same place as a read-only store of zarr-python, `zarr.storage.ObjectStore`."""
        from zarr.storage import ObjectStore

        return ObjectStore(self._requests.store, read_only=True)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(CONCURRENT, "fcache-objects")

    @property
    def url(self) -> str:
        """What a user calls it: s3://bucket/prefix."""
        return self._requests.url

    def path(self, name: str = "") -> Path | None:
        """None: no file of this machine."""
        return None

    def read(self, name: str) -> bytes:
        """A whole object. Raises FileNotFoundError."""
        return self._requests.get(name)[0]

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Whole objects, together. Raises FileNotFoundError."""
        return self._together(self.read, [(name,) for name in names])

    def read_ranges(self, ranges: Sequence[Range]) -> None:
        """Fills each (name, offset, out uint8 [n]), together; one request each.

        Raises FileNotFoundError, and CorruptError if an object ends before.
        """
        self._together(self._read_range, [r for r in ranges if len(r[2])])

    def _read_range(self, name: str, offset: int, out: np.ndarray) -> None:
        data = self._requests.get_range(name, offset, len(out))
        if len(data) != len(out):
            raise CorruptError(
                f"{self.url}/{name} ends before byte {offset + len(out)}, it should hold more; run `fcache repair`"
            )
        out[:] = np.frombuffer(data, np.uint8)

    def _together(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        if len(arguments) < 2:
            return [function(*a) for a in arguments]
        futures: list[Future[Any]] = [self._pool.submit(function, *a) for a in arguments]
        try:
            return [f.result() for f in futures]
        finally:
            for f in futures:
                f.cancel()
            # The caller may use its buffers again as soon as this returns or raises.
            wait(futures)

    def size(self, name: str) -> int:
        """Bytes of an object. Raises FileNotFoundError."""
        return self._requests.head(name)["size"]

    def names(self, folder: str) -> list[str]:
        """The names of the objects right inside a folder, sorted."""
        return sorted(path.rpartition("/")[2] for path in self._requests.list_folder(folder))

    def walk(self) -> Iterator[tuple[str, int]]:
        """Every object with its bytes."""
        return self._requests.list_all()

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object, whole."""
        self._requests.put(name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes a small object if there is none of that name, else returns False; of several callers one succeeds."""
        return self._requests.put_if(name, data, "create")

    def replace(self, name: str, old: bytes, new: bytes) -> bool:
        """Writes a small object if it still holds `old`, else returns False; of several callers one succeeds."""
        try:
            data, version = self._requests.get(name)
        except FileNotFoundError:
            return False
        return data == old and self._requests.put_if(name, new, version)

    def touch(self, name: str) -> None:
        """Renews the age of an object that this process wrote, if it is still there."""
        try:
            data, version = self._requests.get(name)
        except FileNotFoundError:
            return
        # If another wrote it in between, it is no longer ours, and young.
        self._requests.put_if(name, data, version)

    def stamp(self, name: str) -> str:
        """The version and time of its last write; stores know whole seconds. Raises FileNotFoundError."""
        found = self._requests.head(name)
        return f"{found['e_tag']} {found['last_modified'].isoformat()}"

    def age(self, name: str) -> float:
        """Seconds since an object was written or touched, by the store's clock. Raises FileNotFoundError."""
        written = self._requests.head(name)["last_modified"]
        return max(0.0, (self._now() - written).total_seconds())

    def _now(self) -> datetime:
        """The store's time: this machine's clock may be wrong, only its speed is trusted."""
        with self._lock:
            clock = self._clock
        if clock is None or time.monotonic() - clock[1] > CLOCK_SECONDS:
            name = f"partial/{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}"
            started = time.monotonic()
            try:
                self.write(name, b"")
                clock = self._requests.head(name)["last_modified"], started
                self.remove(name)
            except DataError:
                # Who may only read removes nothing because of an age.
                clock = datetime.now(UTC), started
            with self._lock:
                self._clock = clock
        return clock[0] + timedelta(seconds=time.monotonic() - clock[1])

    def remove(self, name: str) -> None:
        """Removes an object; nothing happens if there is none."""
        self._requests.delete(name)

    def new_file(self, name: str) -> ObjectFile:
        """An object to be published under that name; until then its bytes are in this machine's TMPDIR."""
        return ObjectFile(self._requests, checked(name))

    def sweep(self) -> int:
        """Removes what dead processes left in `partial`; returns how many. Uploads leave nothing there."""
        removed = 0
        for name in self.names("partial"):
            host, _, rest = name.partition("~")
            pid = rest.partition("~")[0]
            if host == socket.gethostname() and pid.isdecimal():
                orphaned = not process_alive(int(pid))
            else:
                orphaned = self.age(f"partial/{name}") > ORPHAN_SECONDS
            if orphaned:
                self.remove(f"partial/{name}")
                removed += 1
        return removed

    def free_bytes(self) -> int | None:
        """None: no store tells."""
        return None
