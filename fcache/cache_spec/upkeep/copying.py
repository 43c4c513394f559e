"""Copying a cache between folders and object stores: whole shards, each checked on its way, commits last."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from fcache.cache_spec.claims import Claims
from fcache.cache_spec.commits import commit_path, parse_commit
from fcache.cache_spec.errors import CorruptError, NoSpaceError
from fcache.cache_spec.layout import Manifest
from fcache.cache_spec.storage.pieces import pieces
from fcache.cache_spec.storage.protocol import NewFile, Storage
from fcache.cache_spec.store import write_manifest
from fcache.cache_spec.tables import COMMIT as TABLES
from fcache.cache_spec.tables import table_files
from fcache.cache_spec.upkeep.copy_plan import CopyPlan, Job, check_fits, check_tables, merged, opened, plan_shards
from fcache.cache_spec.upkeep.verify import Fault

WORKERS = 4
RESERVE_BYTES = 64 << 20


@dataclass(frozen=True)
class Copied:
    """What a copy did, in parts of shards: `busy` ones are being written at the target by another process; `faults`
    are damaged at the source and were left out."""

    copied: int
    bytes: int
    skipped: int
    missing: int
    busy: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class CopyProgress:
    """Parts of shards done and in all, bytes read and in all."""

    parts: int
    total_parts: int
    bytes: int
    total_bytes: int


def plan_copy(
    source: Path | str | Storage, target: Path | str | Storage, *, splits: Sequence[str] | None = None
) -> CopyPlan:
    """What `copy_cache` would do; writes nothing. Raises as that."""
    return plan_shards(*opened(source, target, splits))[1]


def copy_cache(
    source: Path | str | Storage,
    target: Path | str | Storage,
    *,
    splits: Sequence[str] | None = None,
    report: Callable[[CopyProgress], None] | None = None,
) -> Copied:
    """Copies what the source has committed and the target has not; the same call again continues.

    The manifest comes first, so that a copy that was interrupted is a cache with pending shards. Every file is compared
    with the digest in its commit on the way; a shard that is damaged is left out. `splits` names those to copy (None:
    all). Raises IncompatibleError if the target is a cache of another identity or layout, or has other fitted tables,
    NoSpaceError if it has no room, CorruptError if the source's manifest or tables are damaged.
    """
    here, there, manifest = opened(source, target, splits)
    jobs, plan = plan_shards(here, there, manifest)
    free = there.free_bytes()
    if free is not None and plan.bytes and plan.bytes + RESERVE_BYTES > free:
        raise NoSpaceError(
            f"{plan.bytes / 1e6:.0f} MB and a reserve of {RESERVE_BYTES / 1e6:.0f} MB are needed at {there.url}, "
            f"{free / 1e6:.0f} MB are free; free some space, or copy fewer splits (--split)"
        )
    claims = Claims(there)
    with claims.lock():
        write_manifest(there, merged(manifest, there), claims)
        _copy_tables(here, there, manifest)
    run = _Run(here, there, manifest, claims, plan, report)
    with claims.beating():
        try:
            run.do(jobs)
        finally:
            claims.release_all()
    there.sweep()
    return Copied(
        run.parts, run.bytes, plan.skip, plan.missing, run.busy,
        tuple(sorted((*plan.faults, *run.faults), key=lambda f: (f.group, f.part, f.shard))),
    )  # fmt: skip


def _copy_tables(here: Storage, there: Storage, manifest: Manifest) -> None:
    """Fitted tables come before any shard, as in an extraction. Raises CorruptError if the source's are damaged."""
    check_tables(here, there, manifest)
    files = table_files(here, manifest)
    if not files or TABLES.rpartition("/")[2] in there.names("commits"):
        return
    try:
        found = dict(zip(files, here.read_many(list(files)), strict=True))
    except FileNotFoundError as e:
        raise CorruptError(f"{e} is missing, {TABLES} names it; restore it from a copy") from None
    for name, data in found.items():
        if files[name] != (len(data), hashlib.sha256(data).hexdigest()):
            raise CorruptError(f"{here.url}/{name} does not hold what {TABLES} says; restore it from a copy")
        there.write(name, data)
    there.write(TABLES, here.read(TABLES))


class _Stop(Exception):
    """Another worker failed, or the user interrupted: what is open is dropped."""


@dataclass
class _Run:
    """One copy at work."""

    here: Storage
    there: Storage
    manifest: Manifest
    claims: Claims
    plan: CopyPlan
    report: Callable[[CopyProgress], None] | None
    parts: int = 0
    bytes: int = 0
    busy: int = 0
    faults: list[Fault] = field(default_factory=list)
    done: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def do(self, jobs: Sequence[Job]) -> None:
        """Copies shards, some at once; the first error of the target ends all."""
        with ThreadPoolExecutor(WORKERS, "fcache-copy") as pool:
            futures = [pool.submit(self._shard, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _shard(self, job: Job) -> None:
        group, index = job.group.path, job.shard.index
        if self.stop.is_set():
            return
        if not self.claims.acquire(group, index):
            self._tell(len(job.parts), 0, busy=len(job.parts))
            return
        try:
            for part in job.parts:
                try:
                    self._part(job, part)
                    self._tell(1, 0, parts=1)
                except (CorruptError, FileNotFoundError) as e:
                    with self.lock:
                        self.faults.append(Fault(group, part, index, "corrupt", str(e)))
                    self._tell(1, 0)
        except _Stop:
            return
        finally:
            self.claims.release(group, index)

    def _part(self, job: Job, part: str) -> None:
        """Copies the files of one part of one shard, then its commit. Raises CorruptError if the source is damaged."""
        name = commit_path(job.group.path, part, job.shard.index)
        data = self.here.read(name)
        commit = parse_commit(self.here, name, data)
        check_fits(job.group, part, job.shard, commit)
        files: list[NewFile] = []
        try:
            for file, (size, sha) in commit.files.items():
                files.append(self.there.new_file(file))
                self._file(file, size, sha, files[-1])
            # A commit of other content would vouch for the new files; without it, the shard is pending.
            self.there.remove(name)
            for file in files:
                file.publish()
        finally:
            for file in files:
                file.discard()
        self.there.write(name, data)

    def _file(self, name: str, size: int, sha: str, new: NewFile) -> None:
        found = self.here.size(name)
        if found != size:
            raise CorruptError(f"{name} has {found} bytes, its commit says {size}")
        digest = hashlib.sha256()
        for piece in pieces(self.here, name, size):
            if self.stop.is_set():
                raise _Stop
            digest.update(piece)
            new.write(piece)
            self._tell(0, len(piece))
        if digest.hexdigest() != sha:
            raise CorruptError(f"{name} does not hold what its commit says (SHA-256 differs)")
        new.close()

    def _tell(self, done: int, length: int, *, parts: int = 0, busy: int = 0) -> None:
        with self.lock:
            self.done, self.bytes = self.done + done, self.bytes + length
            self.parts, self.busy = self.parts + parts, self.busy + busy
            progress = CopyProgress(self.done, self.plan.copy, self.bytes, self.plan.bytes)
            if self.report is not None:
                self.report(progress)
