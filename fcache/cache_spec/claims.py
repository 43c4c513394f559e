"""Claims: which process works on which shard, so that any number of processes share one cache.

A claim is an exclusively created file with host, pid and a heartbeat (its modification time). Claims only save work:
two processes on one shard would publish equal bytes.
"""

import json
import os
import socket
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fcache.cache_spec.files import explained, process_alive

STALE_SECONDS = 120.0


@dataclass
class Claims:
    """The claims of this process in one cache; `release_all` when done."""

    root: Path
    stale_seconds: float = STALE_SECONDS
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    held: set[Path] = field(default_factory=set)

    def acquire(self, group: str, shard: int) -> bool:
        """Claims a shard; False if a living process holds it. A stale claim is taken over."""
        path = self.root / "claims" / group.replace("/", "_") / f"{shard:06d}.json"
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                try:
                    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                except FileExistsError:
                    if not self._retire(path):
                        return False
                    continue
                with os.fdopen(fd, "w") as f:
                    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "token": self.token}, f)
                self.held.add(path)
                return True
        return False

    def beat(self) -> None:
        """Renews the heartbeat of all held claims; call it at least every quarter of `stale_seconds`."""
        for path in tuple(self.held):
            with suppress(FileNotFoundError):
                os.utime(path)

    def release(self, group: str, shard: int) -> None:
        """Gives a shard back."""
        path = self.root / "claims" / group.replace("/", "_") / f"{shard:06d}.json"
        if path in self.held:
            self.held.discard(path)
            path.unlink(missing_ok=True)

    def release_all(self) -> None:
        """Gives everything back."""
        for path in self.held:
            path.unlink(missing_ok=True)
        self.held.clear()

    def _retire(self, path: Path) -> bool:
        """Removes a claim whose holder is dead; the rename lets one process win."""
        try:
            age = time.time() - path.stat().st_mtime
            text = path.read_text()
        except FileNotFoundError:
            return True
        try:
            owner = json.loads(text)
        except ValueError:
            owner = {}
        dead = owner.get("host") == socket.gethostname() and not process_alive(owner["pid"])
        if not dead and age < self.stale_seconds:
            return False
        retired = path.with_suffix(f".{self.token}")
        try:
            path.rename(retired)
        except FileNotFoundError:
            return True
        retired.unlink(missing_ok=True)
        return True
