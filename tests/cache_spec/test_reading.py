"""How records leave the files: maps, positional reads, ranges of objects, hints, checks of sizes and digests."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cachebuilder import group, manifest, write_pending
from hypothesis import given
from hypothesis import strategies as st

from fcache.cache_spec import CorruptError, IncompleteError, SpecError, StreamConfig, open_source, open_writer
from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.committed import Files
from fcache.cache_spec.reader import CacheReader
from fcache.cache_spec.reading.access import ArrayAccess, OpenShards, read_arrays
from fcache.cache_spec.reading.arrayfiles import ArrayFiles
from fcache.cache_spec.reading.mapping import aligned_empty, map_file, on_disk, will_need
from fcache.cache_spec.reading.opened import open_local
from fcache.cache_spec.reading.options import ReadOptions
from fcache.cache_spec.shardfile import ABSENT, ZSTD, index_bytes, shard_key
from fcache.cache_spec.storage.protocol import open_storage

SLOTS = 4
LOCAL = [ReadOptions(mode, ahead) for mode in ("mmap", "pread") for ahead in ("auto", "willneed", "none")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


class Afar:
    """A local storage that has no paths, as an object store has none; it notes the ranges of every request."""

    def __init__(self, root):
        self._local, self.requests = open_storage(root), []

    def __getattr__(self, name):
        return getattr(self._local, name)

    def path(self, name=""):
        return None

    def read_ranges(self, ranges):
        self.requests.append([(name, offset, len(out)) for name, offset, out in ranges])
        self._local.read_ranges(ranges)


def number(record, spec):
    """What a record holds: every one is different."""
    rng = np.random.default_rng((record, len(spec.path)))
    return rng.integers(0, 100, spec.shape).astype(spec.dtype)


def write_array(root, spec, records, *, slots=SLOTS):
    """Shard files with these records, stored in this order; returns (bytes, SHA-256) by shard."""
    (root / spec.path).mkdir(parents=True, exist_ok=True)
    sizes = {}
    for shard in {r // slots for r in records}:
        index, body = np.full((slots, 2), ABSENT, dtype="<u8"), b""
        table = np.zeros((slots, *spec.shape), dtype=spec.dtype)
        for record in (r for r in records if r // slots == shard):
            raw = number(record, spec).tobytes()
            raw = raw if spec.compression == "none" else ZSTD.encode(raw)
            index[record % slots] = len(body), len(raw)
            body += raw
            table[record % slots] = number(record, spec)
        body = table.tobytes() if spec.layout == "table" else body + index_bytes(index)
        (root / spec.path / shard_key(spec, shard)).write_bytes(body)
        sizes[shard] = len(body), hashlib.sha256(body).digest()
    return sizes


def committed(files):
    found = Files(np.full(max(files) + 1, -1), np.zeros((max(files) + 1, 32), dtype=np.uint8))
    for shard, (size, digest) in files.items():
        found.sizes[shard], found.digests[shard] = size, np.frombuffer(digest, dtype=np.uint8)
    return found


def access_to(storage, spec, sizes, shards, *, slots=SLOTS):
    return ArrayAccess(ArrayFiles(storage, spec.path, spec, slots, committed(sizes)), shards)


def open_arrays(where, arrays, options, *, slots=SLOTS):
    storage = where if isinstance(where, Afar) else open_storage(where)
    shards = OpenShards(storage, options)
    return [access_to(storage, spec, sizes, shards, slots=slots) for spec, sizes in arrays]


def read(accesses, records):
    jobs = [(a, records, np.full((len(records), *a.spec.shape), 111, a.dtype)) for a in accesses]
    read_arrays(jobs)
    return [out for _, _, out in jobs]


def assert_read(accesses, records):
    for access, found in zip(accesses, read(accesses, records), strict=True):
        for row, record in zip(found, records, strict=True):
            np.testing.assert_array_equal(row, number(record, access.spec))


SPECS = [
    ArraySpec("even", "float16", (4, 2)),
    ArraySpec("odd", "uint8", (3, 5)),
    ArraySpec("packed", "int8", (2, 40), compression="zstd"),
    ArraySpec("wide-table", "float32", (100,), layout="table"),
    ArraySpec("small-table", "int32", (), layout="table"),
]


@given(data=st.data())
def test_any_records_in_any_order_are_what_was_written_in_whatever_way_they_are_read(folder_factory, data):
    root = folder_factory()
    stored = data.draw(st.lists(st.integers(0, 4 * SLOTS - 1), unique=True, min_size=1), label="order in the files")
    asked = data.draw(st.lists(st.sampled_from(stored), max_size=20), label="asked for")
    arrays = [(spec, write_array(root, spec, stored)) for spec in SPECS]
    for check in ("none", "digest"):
        for options in [*LOCAL, ReadOptions()]:
            accesses = open_arrays(root, arrays, ReadOptions(options.mode, options.ahead, check))
            assert_read(accesses, asked)
            assert_read(accesses, sorted(asked))
        accesses = open_arrays(Afar(root), arrays, ReadOptions(check=check))
        assert_read(accesses, asked)
        assert_read(accesses, sorted(asked))


@pytest.fixture
def arrays(folder):
    return folder, [(spec, write_array(folder, spec, range(3 * SLOTS))) for spec in SPECS]


def test_an_object_store_is_asked_once_for_a_batch_and_once_a_record_and_array(arrays):
    root, arrays = arrays
    storage = Afar(root)
    accesses = open_arrays(storage, arrays, ReadOptions())
    records = [7, 0, 9, 2]
    assert_read(accesses, records)
    tables, indices, first = storage.requests
    # Both tables of three shards, whole; three indices of each of the other arrays.
    assert len(tables) == 2 * 3
    assert len(indices) == 3 * 3
    assert len(first) == 3 * len(records)
    assert_read(accesses, [1, 8, 5])
    (second,) = storage.requests[3:]
    assert len(second) == 3 * 3
    # Neighbours are one range, of one shard each.
    assert_read(accesses, [2, 3, 4, 5, 6, 7])
    (third,) = storage.requests[4:]
    assert len(third) == 3 * 2


def test_tables_beyond_what_is_held_are_read_record_by_record(tmp_path):
    # 256 bytes a record: the largest that is held on this machine, up to 16 MB.
    spec = ArraySpec("table", "int64", (32,), layout="table")
    sizes = write_array(tmp_path, spec, range(64), slots=64)
    folder, n = tmp_path / spec.path, 1100
    for shard in range(1, n):
        os.link(folder / shard_key(spec, 0), folder / shard_key(spec, shard))
    (access,) = open_arrays(tmp_path, [(spec, dict.fromkeys(range(n), sizes[0]))], ReadOptions(), slots=64)
    rng = np.random.default_rng(0)
    for shards in np.array_split(rng.permutation(n), 50):
        slots = rng.integers(0, 64, len(shards))
        (found,) = read([access], shards * 64 + slots)
        np.testing.assert_array_equal(found, [number(int(s), spec) for s in slots])
    assert access.held is not None
    held = n - len(access.held.lacking(np.arange(n)))
    assert held == 2**24 // (64 * 256) < n


@pytest.mark.parametrize("options", LOCAL)
def test_a_record_without_a_commit_is_an_error_that_says_so(arrays, options):
    root, arrays = arrays
    partial = [(spec, {s: size for s, size in sizes.items() if s != 1}) for spec, sizes in arrays]
    for where in (root, Afar(root)):
        for access in open_arrays(where, partial, options):
            assert_read([access], [0, 11])
            for record in (-1, -12, SLOTS, 3 * SLOTS, 10**12):
                with pytest.raises(IncompleteError, match="is not committed; run the same `fcache extract`"):
                    access.read(record)


def test_a_file_cut_short_while_it_is_read_by_position_is_an_error(arrays):
    root, arrays = arrays
    accesses = open_arrays(root, arrays[:4], ReadOptions("pread"))
    assert_read(accesses, [0, 3])
    for access in accesses:
        os.truncate(root / access.spec.path / shard_key(access.spec, 0), 1)
        with pytest.raises(CorruptError, match="was cut short while it was read; run `fcache verify`"):
            access.read(3)
        assert_read([access], [5])


def test_an_object_that_was_replaced_by_a_shorter_one_is_an_error(arrays):
    root, arrays = arrays
    accesses = open_arrays(Afar(root), arrays[:3], ReadOptions())
    assert_read(accesses, [0, 3])
    for access in accesses:
        os.truncate(root / access.spec.path / shard_key(access.spec, 0), 1)
        with pytest.raises(CorruptError, match="ends before byte"):
            access.read(3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.path)
def test_an_object_that_is_missing_or_not_the_committed_one_is_named(folder, spec):
    sizes = write_array(folder, spec, range(SLOTS))
    path = folder / spec.path / shard_key(spec, 0)
    sound = path.read_bytes()
    path.unlink()
    (access,) = open_arrays(Afar(folder), [(spec, sizes)], ReadOptions())
    with pytest.raises(CorruptError, match=f"{path} is missing, its commit names it; run `fcache repair`"):
        access.read(0)
    path.write_bytes(bytes(len(sound)))
    with pytest.raises(CorruptError, match=f"{spec.path}/c.0.*run `fcache repair`"):
        access.read(0)
    path.write_bytes(sound)
    assert_read([access], [0])


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.path)
@pytest.mark.parametrize("where", ["mmap", "pread", "afar"])
def test_a_flipped_bit_is_found_when_digests_are_checked(folder, spec, where):
    sizes = write_array(folder, spec, range(SLOTS))
    path = folder / spec.path / shard_key(spec, 0)
    data = bytearray(path.read_bytes())
    data[9] ^= 1
    path.write_bytes(data)
    storage = Afar(folder) if where == "afar" else folder
    options = ReadOptions("auto" if where == "afar" else where, check="digest")
    (access,) = open_arrays(storage, [(spec, sizes)], options)
    for _ in range(2):
        with pytest.raises(CorruptError, match=f"{path}: its SHA-256 differs from its commit; run `fcache repair`"):
            access.read(0)


def test_a_digest_is_compared_when_a_file_is_first_opened_only(folder):
    spec = SPECS[0]
    sizes = write_array(folder, spec, range(SLOTS))
    path = folder / spec.path / shard_key(spec, 0)
    (access,) = open_arrays(folder, [(spec, sizes)], ReadOptions("pread", check="digest"))
    assert_read([access], [0])
    data = path.read_bytes()
    with path.open("r+b") as f:
        f.write(bytes([data[0] ^ 1]))
    assert_read([access], [1])
    (again,) = open_arrays(folder, [(spec, sizes)], ReadOptions("pread", check="digest"))
    with pytest.raises(CorruptError, match="SHA-256"):
        again.read(1)


@pytest.mark.parametrize("options", [*LOCAL, ReadOptions(check="digest")])
def test_many_threads_read_what_one_reads(arrays, options):
    root, arrays = arrays
    accesses = open_arrays(root, arrays, options)
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(10):
                assert_read(accesses, rng.integers(0, 3 * SLOTS, 8).tolist())
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.parametrize("shape", [(3,), (5, 7, 2), (2, 1 << 20)])
def test_aligned_buffers_begin_at_a_cache_line(shape):
    made = [aligned_empty(shape, np.dtype("float16")) for _ in range(5)]
    for x in made:
        assert (x.shape, x.dtype, x.ctypes.data % 64, x.flags.c_contiguous) == (shape, np.float16, 0, True)
        x[...] = 1


def drop(path):
    """Takes a file out of memory; skips the test where the file system keeps it there."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = map_file(f.fileno(), path.stat().st_size)
    if not on_disk(data.ctypes.data, len(data)):
        pytest.skip("this file system keeps the file in memory")
    return data


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux drops a file from memory on request")
def test_what_is_asked_for_ahead_comes_into_memory_without_being_touched(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    data = drop(path)
    will_need(data.ctypes.data + 5000, 500_000)
    deadline = time.monotonic() + 20
    while on_disk(data.ctypes.data + 5000, 500_000):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux drops a file from memory on request")
@pytest.mark.parametrize("mode", ["mmap", "pread"])
def test_a_file_tells_whether_a_record_is_in_memory(tmp_path, mode):
    spec = ArraySpec("a", "uint8", (1 << 18,))
    sizes = write_array(tmp_path, spec, range(SLOTS))
    files = ArrayFiles(open_storage(tmp_path), "a", spec, SLOTS, committed(sizes))
    file = open_local(files, 0, mode, fall_back=False, digested=None)
    # After it was opened: reading its index may bring neighbours into memory.
    drop(tmp_path / "a" / shard_key(spec, 0))
    assert file.sleeps(*file.place(0))
    file.wake(*file.place(0))
    deadline = time.monotonic() + 20
    while file.sleeps(*file.place(0)):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only Linux drops a file from memory on request")
@pytest.mark.parametrize("options", LOCAL)
def test_what_is_on_disk_reads_as_what_is_in_memory(tmp_path, options):
    spec = ArraySpec("a", "float32", (1 << 14,))
    sizes = write_array(tmp_path, spec, range(2 * SLOTS))
    for asked in ([6, 1, 2, 3, 0], [4, 5, 6, 7]):
        for shard in range(2):
            drop(tmp_path / "a" / shard_key(spec, shard))
        assert_read(open_arrays(tmp_path, [(spec, sizes)], options), asked)


@pytest.mark.parametrize("field", ["mode", "ahead", "check"])
def test_an_unknown_way_of_reading_is_refused_by_name(field):
    with pytest.raises(SpecError, match=r"is one of (auto|none), .*, got 'quick'"):
        ReadOptions(**{field: "quick"})


def test_streams_of_a_cache_are_equal_in_every_way_of_reading(folder):
    writer = open_writer(folder / "c", manifest(group(samples=7, shard_records=3, compression="zstd")))
    write_pending(writer, bad=["train#1"])
    config = StreamConfig(3, kinds=("semantic",))

    def blocks(storage, options):
        reader = CacheReader(storage, allow_partial=False, options=options)
        for block in open_source(reader, "train", config).blocks(0):
            parts = [part for level in block.levels.values() for part in level.parts.values()]
            yield block.ids, [np.array(part) for part in (*parts, *block.targets.values())]

    expected = list(blocks(open_storage(folder / "c"), ReadOptions()))
    assert sum(len(ids) for ids, _ in expected) == 6
    ways = [(open_storage(folder / "c"), o) for o in LOCAL] + [(Afar(folder / "c"), ReadOptions(check="digest"))]
    for storage, options in ways:
        for (ids, parts), (found_ids, found) in zip(expected, blocks(storage, options), strict=True):
            assert ids == found_ids
            for a, b in zip(parts, found, strict=True):
                np.testing.assert_array_equal(a, b)


# Files that cannot be mapped or kept open within the limits of the process.
LIMITED = """
import os, resource, sys
from pathlib import Path
import numpy as np
from test_reading import SPECS, ReadOptions, assert_read, number, open_arrays, write_array
from fcache.cache_spec import DataError
from fcache.cache_spec.arrays import ArraySpec
root = Path(sys.argv[1])
spec = ArraySpec("large", "uint8", (1 << 23,), layout="table")
sizes = write_array(root, spec, [0, 5])
(large,) = open_arrays(root, [(spec, sizes)], ReadOptions())
many = [(s, write_array(root, s, range(4 * 60))) for s in SPECS]
assert_read([large], [0])
expected = number(5, spec)
memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory + (1 << 24), resource.RLIM_INFINITY))
(mapped,) = open_arrays(root, [(spec, sizes)], ReadOptions("mmap"))
try:
    mapped.read(5)
except DataError as e:
    assert "cannot map" in str(e) and "read it by position" in str(e), e
else:
    raise AssertionError("it was mapped")
assert np.array_equal(large.read(5), expected)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert large.pool.find(large.files, 0).data is not None and large.pool.find(large.files, 1).data is None
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
for mode in ("auto", "pread"):
    accesses = open_arrays(root, many, ReadOptions(mode))
    for start in range(0, 240, 16):
        assert_read(accesses, list(range(start, start + 16)))
    assert len(os.listdir("/proc/self/fd")) < 50
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read from /proc")
def test_limits_of_memory_and_descriptors_make_reading_slower_not_wrong(folder):
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{Path(__file__).parent}"}
    command = [sys.executable, "-c", LIMITED, folder]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
