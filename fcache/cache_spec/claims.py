"""Claims: which process works on which shard, so that any number of processes share one cache.

A claim is an exclusively created file with host, pid, a token and a heartbeat (its modification time). Claims only save
work: two processes on one shard would publish equal bytes. The lock for creating and growing a cache is one, too.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.files import explained, partial_path, process_alive

STALE_SECONDS = 120.0
LOCK_WAIT_SECONDS = 600.0


@dataclass
class Claims:
    """The claims of this process in one cache; `release_all` when done."""

    root: Path
    stale_seconds: float = STALE_SECONDS
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    held: set[Path] = field(default_factory=set)

    def acquire(self, group: str, shard: int) -> bool:
        """Claims a shard; False if a living process holds it. A stale claim is taken over."""
        return self._take(self._path(group, shard))

    def holds(self, group: str, shard: int) -> bool:
        """Whether the shard is still ours: a process that was stopped for long finds its claim taken over."""
        return self._ours(self._path(group, shard))

    def beat(self) -> None:
        """Renews the heartbeat of all held claims; call it at least every quarter of `stale_seconds`."""
        for path in tuple(self.held):
            if self._ours(path):
                with suppress(FileNotFoundError):
                    os.utime(path)

    def release(self, group: str, shard: int) -> None:
        """Gives a shard back."""
        self._give_back(self._path(group, shard))

    def release_all(self) -> None:
        """Gives everything back."""
        for path in tuple(self.held):
            self._give_back(path)

    @contextmanager
    def lock(self, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> Generator[None]:
        """Holds the cache's only lock; waits for a living holder. Raises DataError after `wait_seconds`."""
        path, started = self.root / "lock", time.monotonic()
        while not self._take(path):
            if time.monotonic() - started > wait_seconds:
                raise DataError(
                    f"{path} is held by another process ({_owner(path)}) that creates or grows this cache; stop it, or "
                    "remove the file if it is gone"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            self._give_back(path)

    def _path(self, group: str, shard: int) -> Path:
        return self.root / "claims" / group.replace("/", "_") / f"{shard:06d}.json"

    def _take(self, path: Path) -> bool:
        with explained(path):
            for _ in range(8):
                try:
                    if path.parent != self.root:
                        path.parent.mkdir(parents=True, exist_ok=True)
                    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                except FileExistsError:
                    if not self._retire(path):
                        return False
                    continue
                except FileNotFoundError:
                    # Another process that finished removed the empty folder.
                    continue
                try:
                    with os.fdopen(fd, "w") as f:
                        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "token": self.token}, f)
                except BaseException:
                    # Without an owner inside, others would wait until it is stale.
                    path.unlink(missing_ok=True)
                    raise
                self.held.add(path)
                return True
        return False

    def _ours(self, path: Path) -> bool:
        return path in self.held and _owner(path).get("token") == self.token

    def _give_back(self, path: Path) -> None:
        if self._ours(path):
            path.unlink(missing_ok=True)
        self.held.discard(path)

    def clear(self) -> None:
        """Removes every claim, of dead processes too: all shards are committed, claims mean nothing any more."""
        self.release_all()
        # Another process that finishes removes the folders, too.
        with suppress(FileNotFoundError):
            for path in (self.root / "claims").glob("*/*"):
                path.unlink(missing_ok=True)

    def _retire(self, path: Path) -> bool:
        """Removes a claim whose holder is dead."""
        owner = _owner(path)
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return True
        dead = owner.get("host") == socket.gethostname() and not process_alive(int(owner["pid"]))
        if not dead and age < self.stale_seconds:
            return False
        # A temporary file, so that it is cleaned up after if this process is killed right now.
        retired = partial_path(self.root)
        try:
            retired.parent.mkdir(exist_ok=True)
            path.rename(retired)
        except FileNotFoundError:
            return True
        try:
            # Of several processes that saw the same dead holder, a slow one may have renamed the winner's new claim.
            if _owner(retired) != owner:
                with suppress(OSError):
                    os.link(retired, path)
                return False
        finally:
            retired.unlink(missing_ok=True)
        return True


def _owner(path: Path) -> dict[str, str]:
    """Host, pid and token in a claim; empty while it is being written, or if it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        return {"host": str(found["host"]), "pid": str(int(found["pid"])), "token": str(found["token"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
