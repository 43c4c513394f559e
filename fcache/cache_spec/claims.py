"""Claims: which process works on which shard, so that any number of processes share one cache.

A claim is an exclusively created file with host, pid, a token and a heartbeat (its time). Claims only save work: two
processes on one shard would publish equal bytes. The lock for creating and growing a cache is one, too.

Clocks jump, and those of hosts differ: the age of a claim alone never takes it from its holder. It must also be seen to
rest for a while, measured by this process's own monotonic clock.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.storage.files import process_alive
from fcache.cache_spec.storage.protocol import Storage

STALE_SECONDS = 120.0
LOCK_WAIT_SECONDS = 600.0
LOCK = "lock"


@dataclass
class Claims:
    """The claims of this process in one cache; `release_all` when done."""

    storage: Storage
    stale_seconds: float = STALE_SECONDS
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    held: set[str] = field(default_factory=set)
    _seen: dict[str, "_Seen"] = field(default_factory=dict)

    def acquire(self, group: str, shard: int) -> bool:
        """Claims a shard; False if a living process holds it. A stale claim is taken over."""
        return self._take(claim_name(group, shard))

    def holds(self, group: str, shard: int) -> bool:
        """Whether the shard is still ours: a process that was stopped for long finds its claim taken over."""
        return self._ours(claim_name(group, shard))

    def beat(self) -> None:
        """Renews the heartbeat of all held claims; call it at least every quarter of `stale_seconds`."""
        for name in tuple(self.held):
            if self._ours(name):
                self.storage.touch(name)

    def release(self, group: str, shard: int) -> None:
        """Gives a shard back."""
        self._give_back(claim_name(group, shard))

    def release_all(self) -> None:
        """Gives everything back."""
        for name in tuple(self.held):
            self._give_back(name)

    @contextmanager
    def beating(self) -> Generator[None]:
        """Keeps the claims alive from a thread: a batch, a shard or loading weights may take longer than they last."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(self.stale_seconds / 6):
                # A store that does not answer now is met by the work itself.
                with suppress(DataError):
                    self.beat()

        thread = threading.Thread(target=beat, name="fcache-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    @contextmanager
    def lock(self, *, wait_seconds: float = LOCK_WAIT_SECONDS) -> Generator[None]:
        """Holds the cache's only lock; waits for a living holder. Raises DataError after `wait_seconds`."""
        started = time.monotonic()
        while not self._take(LOCK):
            if time.monotonic() - started > wait_seconds:
                raise DataError(
                    f"{self.storage.url}/{LOCK} is held by another process ({self._owner(LOCK)}) that creates or grows "
                    "this cache; stop it, or remove the file if it is gone"
                )
            time.sleep(0.05)
        try:
            yield
        finally:
            self._give_back(LOCK)

    def clear(self, groups: Iterable[str]) -> None:
        """Removes every claim, of dead processes too: all shards are committed, claims mean nothing any more."""
        self.release_all()
        for group in groups:
            folder = claim_folder(group)
            for name in self.storage.names(folder):
                self.storage.remove(f"{folder}/{name}")

    def _take(self, name: str) -> bool:
        mine = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": self.token}).encode()
        for _ in range(8):
            if self.storage.create(name, mine):
                self.held.add(name)
                return True
            try:
                found, stamp, age = self.storage.read(name), self.storage.stamp(name), self.storage.age(name)
            except FileNotFoundError:
                continue
            if not (holder_died(found) or self._rests(name, (found, stamp), age)):
                return False
            if self.storage.replace(name, found, mine):
                self.held.add(name)
                return True
        return False

    def _rests(self, name: str, state: tuple[bytes, str], age: float) -> bool:
        """Whether a claim that others hold was not renewed for so long that its holder must be gone."""
        now, seen = time.monotonic(), self._seen.get(name)
        if seen is None or seen.state != state:
            self._seen[name] = seen = _Seen(state, now)
        watched = now - seen.since
        return watched >= self.stale_seconds or (age >= self.stale_seconds and watched >= self.stale_seconds / 3)

    def _ours(self, name: str) -> bool:
        return name in self.held and self._owner(name).get("token") == self.token

    def _give_back(self, name: str) -> None:
        if self._ours(name):
            self.storage.remove(name)
        self.held.discard(name)

    def _owner(self, name: str) -> dict[str, str]:
        try:
            return parse_owner(self.storage.read(name))
        except FileNotFoundError:
            return {}


@dataclass(frozen=True)
class _Seen:
    """A claim as this process first saw it: its content and stamp, and since when it is watched."""

    state: tuple[bytes, str]
    since: float


def claim_folder(group: str) -> str:
    """Where the claims of a group lie below the cache."""
    return f"claims/{group.replace('/', '_')}"


def claim_name(group: str, shard: int) -> str:
    """The claim of a shard: claims/val_512x704/000012.json."""
    return f"{claim_folder(group)}/{shard:06d}.json"


def holder_died(content: bytes) -> bool:
    """Whether the holder in a claim was a process of this host that is gone."""
    owner = parse_owner(content)
    return owner.get("host") == socket.gethostname() and not process_alive(int(owner["pid"]))


def parse_owner(content: bytes) -> dict[str, str]:
    """Host, pid and token in a claim; empty while it is being written, or if it is damaged."""
    try:
        found = json.loads(content)
        return {"host": str(found["host"]), "pid": str(int(found["pid"])), "token": str(found["token"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
