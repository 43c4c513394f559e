"""A new object: spooled to a temporary file of this machine, uploaded whole when it is published."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress

from fcache.cache_spec.errors import DataError, NoSpaceError
from fcache.cache_spec.storage.files import FULL, write_all
from fcache.cache_spec.storage.object_requests import Requests


class ObjectFile:
    """An object while it is written. Its temporary file has no name: it goes with the process."""

    def __init__(self, requests: Requests, name: str) -> None:
        self._requests, self._name = requests, name
        with _spooling():
            # Without a buffer: what was written can be read through the descriptor at once.
            self._file = tempfile.TemporaryFile(buffering=0, prefix="fcache-")  # noqa: SIM115

    @property
    def descriptor(self) -> int:
        """Of the temporary file."""
        return self._file.fileno()

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes. Raises NoSpaceError if TMPDIR is full."""
        with _spooling():
            write_all(self._file, data)

    def close(self) -> None:
        """Nothing: an object is durable once it is published."""

    def publish(self) -> None:
        """Uploads the file; nobody sees the object before it is whole, and one that was there is replaced."""
        self._requests.upload(self._name, self._file)
        self._file.close()

    def discard(self) -> None:
        """Drops what was written, if it was not published."""
        with suppress(OSError):
            self._file.close()


@contextmanager
def _spooling() -> Generator[None]:
    try:
        yield
    except OSError as e:
        folder = tempfile.gettempdir()
        if e.errno in FULL:
            raise NoSpaceError(
                f"no space left in {folder}, where shards wait for their upload: free some, or set TMPDIR to a larger "
                "folder, and run the same command again, it continues"
            ) from e
        raise DataError(f"cannot write to {folder}: {e.strerror}; set TMPDIR to a writable folder") from e
