"""What every storage promises, on a folder, on an S3 server and in memory."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3server import make_bucket, s3_environment, s3_server

from fcache.cache_spec import CorruptError, SpecError
from fcache.cache_spec.storage.protocol import Storage, open_storage

KINDS = ("folder", "s3", "memory")
THREADS = 8
Make = Callable[[], Storage]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as endpoint, s3_environment(endpoint):
        yield make_bucket(endpoint, "laws")


@pytest.fixture(scope="module", params=KINDS)
def make(request: pytest.FixtureRequest, folder_factory: Callable[[], Path]) -> Make:
    """Gives a new, empty storage each time it is called."""
    if request.param == "folder":
        return lambda: open_storage(folder_factory())
    pytest.importorskip("obstore")
    place = request.getfixturevalue("bucket") if request.param == "s3" else "memory://laws"
    return lambda: open_storage(f"{place}/{uuid.uuid4().hex}")


def content(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name, _ in storage.walk()}


@pytest.mark.parametrize("data", [b"", b"a", os.urandom(100_000)], ids=len)
def test_what_is_written_is_read_and_replaced_whole(make: Make, data: bytes) -> None:
    storage = make()
    storage.write("a/b.json", b"something longer before" * 10_000)
    storage.write("a/b.json", data)
    assert storage.read("a/b.json") == data
    assert storage.size("a/b.json") == len(data)
    assert content(storage) == {"a/b.json": data}


def test_many_are_read_in_the_order_asked_for(make: Make) -> None:
    storage = make()
    names = [f"f/{i}" for i in range(100)]
    for name in names:
        storage.write(name, name.encode())
    asked = [names[i] for i in np.random.default_rng(0).integers(0, 100, 150)]
    assert storage.read_many(asked) == [name.encode() for name in asked]
    assert storage.read_many([]) == []


def test_what_is_not_there_is_a_file_not_found(make: Make) -> None:
    storage = make()
    storage.write("a/there", b"x")
    for name in ("nothing", "a/nothing", "b/c/nothing"):
        for call in (storage.read, storage.size, storage.age, lambda n: storage.read_many(["a/there", n])):
            with pytest.raises(FileNotFoundError):
                call(name)
        for ranges in ([name], ["a/there", name]):
            with pytest.raises(FileNotFoundError):
                storage.read_ranges([(n, 0, np.zeros(1, np.uint8)) for n in ranges])


@given(seed=st.integers(0, 2**32 - 1), files=st.integers(1, 3), count=st.integers(1, 20))
def test_ranges_fill_exactly_their_buffers(make: Make, seed: int, files: int, count: int) -> None:
    storage, rng = make(), np.random.default_rng(seed)
    data = [rng.integers(0, 256, int(rng.integers(1, 5000)), dtype=np.uint8) for _ in range(files)]
    for i, d in enumerate(data):
        storage.write(f"shard-{i}", d.tobytes())
    whole = np.full(100_000, 7, np.uint8)
    expected, ranges, end = whole.copy(), [], 0
    for _ in range(count):
        i = int(rng.integers(files))
        start, stop = sorted(int(n) for n in rng.integers(0, len(data[i]) + 1, 2))
        ranges.append((f"shard-{i}", start, whole[end : end + stop - start]))
        expected[end : end + stop - start] = data[i][start:stop]
        end += stop - start
    storage.read_ranges(ranges)
    np.testing.assert_array_equal(whole, expected)


@pytest.mark.parametrize(("offset", "length"), [(0, 11), (5, 6), (10, 1), (1000, 1)])
def test_a_file_that_ends_before_a_range_is_corrupt(make: Make, offset: int, length: int) -> None:
    storage = make()
    storage.write("short", b"0123456789")
    with pytest.raises(CorruptError, match=r"short ends before byte"):
        storage.read_ranges([("short", offset, np.zeros(length, np.uint8))])
    with pytest.raises(CorruptError):
        storage.read_ranges([("short", 0, np.zeros(10, np.uint8)), ("short", offset, np.zeros(length, np.uint8))])


def race(function: Callable[[int], bool]) -> list[int]:
    """Calls `function(i)` from THREADS threads at once; gives those that won."""
    barrier = threading.Barrier(THREADS)

    def run(i: int) -> bool:
        barrier.wait()
        return function(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return [i for i, won in enumerate(pool.map(run, range(THREADS))) if won]


@pytest.mark.parametrize("same", [False, True], ids=["different contents", "equal contents"])
def test_of_many_that_create_one_wins_and_its_bytes_stay(make: Make, same: bool) -> None:
    storage = make()
    for n in range(10):
        data = [b"equal" if same else b"from %d" % i for i in range(THREADS)]
        winners = race(lambda i, n=n, data=data: storage.create(f"claims/{n}", data[i]))
        assert len(winners) == 1
        assert storage.read(f"claims/{n}") == data[winners[0]]
        assert not storage.create(f"claims/{n}", b"late")


def test_of_many_that_replace_one_wins_and_its_bytes_stay(make: Make) -> None:
    storage = make()
    for n in range(10):
        storage.write(f"claims/{n}", b"old")
        winners = race(lambda i, n=n: storage.replace(f"claims/{n}", b"old", b"from %d" % i))
        assert len(winners) == 1
        assert storage.read(f"claims/{n}") == b"from %d" % winners[0]


def test_nothing_is_replaced_that_holds_something_else_or_is_not_there(make: Make) -> None:
    storage = make()
    storage.write("claim", b"theirs")
    assert not storage.replace("claim", b"mine", b"new")
    assert not storage.replace("nothing", b"", b"new")
    assert content(storage) == {"claim": b"theirs"}


def test_names_are_those_right_inside_a_folder_and_walk_gives_all(make: Make) -> None:
    storage = make()
    files = {"zarr.json": b"0", "a/2": b"11", "a/10": b"222", "a/b/c": b"3333", "ab/x": b"", "ü/ä ö~%20": b"4"}
    for name, data in files.items():
        storage.write(name, data)
    assert storage.names("a") == ["10", "2"]
    assert storage.names("") == ["zarr.json"]
    assert storage.names("a/b") == ["c"]
    assert storage.names("ü") == ["ä ö~%20"]
    assert storage.names("nothing") == storage.names("a/nothing") == []
    assert sorted(storage.walk()) == sorted((name, len(data)) for name, data in files.items())
    assert content(storage) == files


def test_an_empty_place_has_no_files(make: Make) -> None:
    storage = make()
    assert (list(storage.walk()), storage.names(""), storage.names("a"), storage.sweep()) == ([], [], [], 0)
    storage.remove("a")


def test_what_is_removed_is_gone_and_removing_again_does_nothing(make: Make) -> None:
    storage = make()
    storage.write("a/b", b"1")
    storage.write("a/c", b"2")
    storage.remove("a/b")
    storage.remove("a/b")
    assert content(storage) == {"a/c": b"2"}
    assert storage.create("a/b", b"3")


def test_a_new_file_is_seen_when_it_is_published_and_not_before(make: Make) -> None:
    storage = make()
    storage.write("train/c.0", b"of before")
    parts = [os.urandom(n) for n in (1, 0, 300_000, 5)]
    for name in ("train/c.0", "train/c.1"):
        file = storage.new_file(name)
        for part in parts:
            file.write(memoryview(part))
        # A digest is computed from what was written, before the file is closed.
        assert os.pread(file.descriptor, 10**6, 0) == b"".join(parts)
        file.close()
        assert "c.1" not in storage.names("train")
        assert storage.read("train/c.0") == b"of before"
        file.discard()
        assert content(storage) == {"train/c.0": b"of before"}
    for name in ("train/c.0", "train/c.1"):
        file = storage.new_file(name)
        for part in parts:
            file.write(part)
        file.close()
        file.publish()
        file.discard()
    assert content(storage) == {"train/c.0": b"".join(parts), "train/c.1": b"".join(parts)}


@pytest.mark.parametrize("size", [0, 8 << 20, (8 << 20) + 1, 20_000_000])
def test_a_large_file_and_an_empty_one_are_published_whole(make: Make, size: int) -> None:
    storage, data = make(), np.random.default_rng(size).bytes(size)
    # A folder that was removed is not made anew by who still writes to it.
    storage.write("zarr.json", b"{}")
    file = storage.new_file("large")
    file.write(data)
    file.close()
    file.publish()
    assert storage.size("large") == size
    assert storage.read("large") == data


def test_writing_and_touching_make_young_and_change_the_stamp_and_nothing_else_does(make: Make) -> None:
    storage = make()
    # A store knows whole seconds.
    tick = 1.1 if storage.url.startswith("s3") else 0.05
    storage.write("claim", b"mine")
    stamps, ages = [storage.stamp("claim")], list[float]()
    changes: list[Callable[[], object]] = [
        lambda: storage.touch("claim"),
        lambda: storage.write("claim", b"new"),
        lambda: storage.read("claim"),
    ]
    for change in changes:
        time.sleep(2 * tick)
        ages.append(storage.age("claim"))
        change()
        ages.append(storage.age("claim"))
        stamps.append(storage.stamp("claim"))
    assert ages[0] > ages[1] < ages[2] > ages[3] < ages[4] <= ages[5] < 60
    assert len(set(stamps)) == 3
    assert stamps[2] == stamps[3]
    assert storage.read("claim") == b"new"
    storage.touch("nothing")
    assert content(storage) == {"claim": b"new"}
    for call in (storage.stamp, storage.age):
        with pytest.raises(FileNotFoundError):
            call("nothing")


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/x", "a//b", "a/./b", "./a", "..", "a\\..\\b", "a\0b", "a\nb", "a/"]
)
def test_a_name_that_leads_elsewhere_is_refused_by_every_call(make: Make, name: str) -> None:
    storage = make()
    storage.write("a/b", b"1")
    calls: list[Callable[[], object]] = [
        lambda: storage.read(name),
        lambda: storage.read_many([name, name]),
        lambda: storage.read_ranges([(name, 0, np.zeros(1, np.uint8))]),
        lambda: storage.size(name),
        lambda: storage.names(name),
        lambda: storage.write(name, b"2"),
        lambda: storage.create(name, b"2"),
        lambda: storage.replace(name, b"1", b"2"),
        lambda: storage.touch(name),
        lambda: storage.stamp(name),
        lambda: storage.age(name),
        lambda: storage.remove(name),
        lambda: storage.new_file(name),
    ]
    for call in calls:
        with pytest.raises(SpecError, match=r"named"):
            call()
    assert content(storage) == {"a/b": b"1"}
