"""Object stores: what only they have, and what happens when the network or the store misbehaves."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from s3server import ENVIRONMENT, Proxy, ask, make_bucket, proxy, s3_environment, s3_server

from fcache.cache_spec import DataError, SpecError
from fcache.cache_spec.storage.protocol import open_storage

pytest.importorskip("obstore")

from fcache.cache_spec.storage import objects
from fcache.cache_spec.storage.objects import CONCURRENT, ObjectStorage, open_objects

DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as endpoint:
        make_bucket(endpoint, "bucket")
        yield endpoint


@pytest.fixture
def network(server: str) -> Iterator[Proxy]:
    """A proxy before the server; the environment names it."""
    with proxy(server) as state, s3_environment(state.endpoint):
        yield state


@pytest.fixture
def storage(network: Proxy) -> ObjectStorage:
    return open_objects(f"s3://bucket/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def many(server: str) -> tuple[str, set[tuple[str, int]]]:
    """The URL of more objects than a page lists (1000), and what they are."""
    with s3_environment(server), ThreadPoolExecutor(4) as pool:
        storage = open_objects("s3://bucket/many")
        list(pool.map(lambda i: storage.write(f"a/{i:04d}", b"1" * (i % 3)), range(1100)))
    return storage.url, {(f"a/{i:04d}", i % 3) for i in range(1100)}


def failing(*faults: str, method: str = "") -> Callable[[str, str], str]:
    """The first requests (of one method) fail in these ways, later ones work."""
    left = iter(faults)
    return lambda m, path: next(left, "") if m == method or not method else ""


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "ftp://a/b", "https://bucket/x", "file:///tmp/x", "s3://b/a/../c"])
def test_a_url_that_is_no_object_store_is_refused(url: str) -> None:
    with pytest.raises(SpecError, match=r"s3://|named"):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://me:hush@bucket/x", "s3://bucket/x?token=hush", "s3://bucket/x#hush"])
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SpecError, match=r"environment") as caught:
        open_storage(url)
    assert "hush" not in str(caught.value)


def test_a_url_is_what_the_user_calls_it_without_a_slash_at_the_end(network: Proxy) -> None:
    assert open_storage("s3://bucket/a b/c%20d/").url == "s3://bucket/a b/c%20d"
    assert open_storage("s3://bucket/").url == "s3://bucket"
    assert open_storage("s3://bucket/x").path() is open_storage("s3://bucket/x").path("zarr.json") is None
    assert open_storage("s3://bucket/x").free_bytes() is None
    assert network.requests == []


def test_a_prefix_is_taken_as_it_is_written(network: Proxy, server: str) -> None:
    open_storage("s3://bucket/as/c%20d ö").write("x", b"1")
    assert ask(server, "GET", "/bucket/as/c%2520d%20%C3%B6/x") == b"1"


def test_without_the_package_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['obstore'] = None\n"
        "from fcache.cache_spec import SpecError\nfrom fcache.cache_spec.storage.protocol import open_storage\n"
        "try: open_storage('s3://bucket/x')\nexcept SpecError as e: print(e)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "pip install 'fcache[s3]'" in result.stdout, result.stderr


def publish_one(storage: ObjectStorage) -> None:
    file = storage.new_file("x")
    try:
        file.publish()
    finally:
        file.discard()


CALLS: dict[str, Callable[[ObjectStorage], object]] = {
    "read": lambda s: s.read("x"),
    "read_ranges": lambda s: s.read_ranges([("x", 0, np.zeros(1, np.uint8))]),
    "size": lambda s: s.size("x"),
    "names": lambda s: s.names("a"),
    "walk": lambda s: list(s.walk()),
    "write": lambda s: s.write("x", b"1"),
    "create": lambda s: s.create("x", b"1"),
    "replace": lambda s: s.replace("x", b"1", b"2"),
    "touch": lambda s: s.touch("x"),
    "age": lambda s: s.age("x"),
    "remove": lambda s: s.remove("x"),
    "publish": publish_one,
}
# The answer to HEAD has no body: a missing bucket looks like a missing object.
WITHOUT_BODY = ("size", "age")


@pytest.mark.parametrize("call", [c for c in CALLS if c not in WITHOUT_BODY])
def test_a_missing_bucket_is_named_and_the_error_says_what_to_do(network: Proxy, call: str) -> None:
    with pytest.raises(DataError, match=r"s3://nowhere/x.* no such bucket; make it first"):
        CALLS[call](open_objects("s3://nowhere/x"))


@pytest.mark.parametrize("status", ["403", "401"])
@pytest.mark.parametrize("call", CALLS)
def test_denied_access_says_which_variables_to_check_and_shows_no_secret(
    network: Proxy, storage: ObjectStorage, call: str, status: str
) -> None:
    network.fault = lambda method, path: status
    with pytest.raises(DataError, match=r"denied.*AWS_ACCESS_KEY_ID") as caught:
        CALLS[call](storage)
    chain, error = [], caught.value
    while error is not None:
        chain.append(repr(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    assert ENVIRONMENT["AWS_SECRET_ACCESS_KEY"] not in "".join(chain)
    assert storage.url in str(caught.value)


def test_plain_http_must_be_allowed_in_so_many_words(network: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(DataError, match=r"AWS_ALLOW_HTTP=true"):
        open_objects("s3://bucket/x", retries=0).read("x")


def test_a_server_that_is_not_there_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, network: Proxy) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://bucket/y/x: the object store failed .*AWS_ENDPOINT_URL.*again"):
        open_objects("s3://bucket/y", retries=1).read("x")


@pytest.mark.parametrize("faults", [("503",), ("reset",), ("cut",), ("500", "lost", "cut")], ids="-".join)
def test_reads_survive_faults_and_never_give_fewer_or_other_bytes(
    network: Proxy, storage: ObjectStorage, faults: tuple[str, ...]
) -> None:
    storage.write("a/x", DATA)
    for read in (
        lambda: storage.read("a/x") == DATA,
        lambda: storage.size("a/x") == len(DATA),
        lambda: storage.names("a") == ["x"],
        lambda: list(storage.walk()) == [("a/x", len(DATA))],
    ):
        network.fault = failing(*faults)
        assert read()
    out = np.zeros(5000, np.uint8)
    network.fault = failing(*faults)
    storage.read_ranges([("a/x", 100, out)])
    assert out.tobytes() == DATA[100:5100]
    # The text of an error may be cut, too.
    network.fault = failing(*faults)
    with pytest.raises(FileNotFoundError):
        storage.read("missing")


@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_many_reads_together_survive_faults_of_every_third_request(
    network: Proxy, storage: ObjectStorage, fault: str
) -> None:
    storage.write("x", DATA)
    number = itertools.count()
    network.fault = lambda method, path: fault if next(number) % 3 == 0 else ""
    outs = [np.zeros(64, np.uint8) for _ in range(150)]
    storage.read_ranges([("x", 64 * i, out) for i, out in enumerate(outs)])
    assert b"".join(out.tobytes() for out in outs) == DATA[: 150 * 64]


@pytest.mark.parametrize("fault", ["", "503", "reset", "cut"])
def test_a_listing_of_several_pages_is_whole_whatever_happens_in_between(
    network: Proxy, many: tuple[str, set[tuple[str, int]]], fault: str
) -> None:
    url, expected = many
    number = itertools.count()
    # The third request is that of the second page, or its repetition.
    network.fault = lambda method, path: fault if next(number) in (1, 2) else ""
    assert sorted(open_objects(url).walk()) == sorted(expected)
    assert len(open_objects(url).names("a")) == len(expected)


@pytest.mark.parametrize("faults", [("500", "503"), ("reset",), ("lost",), ("lost 500",)], ids="-".join)
def test_writes_survive_faults(network: Proxy, storage: ObjectStorage, faults: tuple[str, ...]) -> None:
    network.fault = failing(*faults)
    storage.write("x", DATA)
    assert storage.read("x") == DATA
    network.fault = failing(*faults)
    storage.remove("x")
    assert list(storage.walk()) == []


@pytest.mark.parametrize("fault", ["503", "reset", "lost", "lost 500"])
def test_who_creates_knows_that_it_won_although_the_answer_was_lost(
    network: Proxy, storage: ObjectStorage, fault: str
) -> None:
    network.fault = failing(fault, method="PUT")
    assert storage.create("claim", b"mine")
    assert storage.read("claim") == b"mine"
    network.fault = failing(fault, method="PUT")
    assert not storage.create("claim", b"mine")
    network.fault = failing(fault, method="PUT")
    assert storage.replace("claim", b"mine", b"new")
    network.fault = failing(fault, method="PUT")
    assert not storage.replace("claim", b"mine", b"newer")
    assert storage.read("claim") == b"new"


def test_after_the_last_retry_the_error_says_what_failed_and_what_to_do(network: Proxy) -> None:
    network.fault = lambda method, path: "503"
    for name, call in CALLS.items():
        network.requests.clear()
        with pytest.raises(
            DataError, match=r"the object store failed \(503 Service Unavailable\).*run the same command"
        ):
            call(open_objects("s3://bucket/x", retries=1))
        tries = len(network.requests)
        # Whether a claim was made although the answer says that the server failed is asked, with retries of its own.
        assert tries == (4 if name == "create" else 2), name


def test_a_full_store_is_no_space(network: Proxy, storage: ObjectStorage) -> None:
    from fcache.cache_spec import NoSpaceError

    network.fault = lambda method, path: "507"
    with pytest.raises(NoSpaceError, match=r"no space left .*s3://bucket"):
        open_objects("s3://bucket/x", retries=1).write("x", b"1")


@pytest.mark.parametrize("fault", ["503", "reset", "lost", "lost 500", "cut"])
@pytest.mark.parametrize("method", ["PUT", "POST"])
def test_a_large_upload_survives_faults_whole(network: Proxy, storage: ObjectStorage, method: str, fault: str) -> None:
    number, data = itertools.count(), os.urandom(17_000_000)
    # Pieces are put, their beginning and end are posted.
    network.fault = lambda m, path: fault if m == method and next(number) in (1, 4) else ""
    file = storage.new_file("large")
    file.write(data)
    file.close()
    file.publish()
    assert storage.read("large") == data


def test_requests_are_counted_as_the_server_sees_them(network: Proxy, storage: ObjectStorage) -> None:
    storage.write("a/x", DATA)
    storage.create("a/y", b"1")
    storage.read_ranges([("a/x", i, np.zeros(10, np.uint8)) for i in range(50)])
    storage.read_many(["a/x", "a/y"])
    storage.size("a/x")
    storage.names("a")
    list(storage.walk())
    storage.remove("a/y")
    methods = [method for method, _ in network.requests]
    counts = storage.counts
    assert (counts.reads, counts.lists) == (52, 2)
    assert methods.count("GET") == counts.reads + counts.lists
    assert methods.count("PUT") == counts.writes == 2
    assert methods.count("HEAD") == counts.looks == 1
    assert methods.count("POST") + methods.count("DELETE") == counts.removals == 1
    assert (counts.read_bytes, counts.written_bytes) == (500 + len(DATA) + 1, len(DATA) + 1)


def test_many_reads_wait_together(network: Proxy, storage: ObjectStorage) -> None:
    storage.write("x", DATA)
    network.seconds = 0.1
    storage.read_ranges([("x", i, np.zeros(10, np.uint8)) for i in range(2 * CONCURRENT)])
    assert CONCURRENT // 2 < network.peak <= CONCURRENT


def test_an_error_of_one_read_ends_all_before_their_buffers_are_given_back(
    network: Proxy, storage: ObjectStorage
) -> None:
    storage.write("x", DATA)
    outs = np.zeros((100, 10), np.uint8)
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/.*/missing"):
        storage.read_ranges([("missing", 0, outs[0]), *(("x", 0, out) for out in outs[1:])])
    after = outs.copy()
    storage.read_many(["x"] * 3)
    np.testing.assert_array_equal(outs, after)
    assert network.open == 0


def test_ages_are_the_store_s_when_the_clock_here_is_wrong(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + timedelta(hours=5)

    monkeypatch.setattr(objects, "datetime", Late)
    storage.write("claim", b"1")
    assert storage.age("claim") < 60
    assert [name for name, _ in storage.walk()] == ["claim"]


def test_an_unfinished_file_leaves_nothing_when_its_process_is_killed(storage: ObjectStorage, tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom fcache.cache_spec.storage.protocol import open_storage\n"
        f"storage = open_storage({storage.url!r})\n"
        "file = storage.new_file('train/c.0'); file.write(bytes(20_000_000)); file.close()\n"
        "print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(storage.walk()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_temporary_files_that_cannot_be_used_is_named(
    storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"cannot write to .*missing.*TMPDIR"):
        storage.new_file("x")


def test_what_dead_processes_left_behind_is_swept_and_what_living_ones_use_stays(storage: ObjectStorage) -> None:
    import socket

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for owner in (f"{socket.gethostname()}~{dead.pid}", f"{socket.gethostname()}~{os.getpid()}", "elsewhere~1"):
        storage.write(f"partial/{owner}~1", b"")
    assert storage.sweep() == 1
    assert storage.names("partial") == sorted([f"{socket.gethostname()}~{os.getpid()}~1", "elsewhere~1~1"])


def test_zarr_reads_the_same_place(storage: ObjectStorage) -> None:
    import zarr

    array = zarr.create_array(storage.zarr.with_read_only(False), name="a", shape=(4,), chunks=(2,), dtype="int32")
    array[:] = [1, 2, 3, 4]
    assert "zarr.json" in storage.names("a")
    np.testing.assert_array_equal(zarr.open_array(storage.zarr, path="a", mode="r")[:], [1, 2, 3, 4])
    assert storage.zarr.read_only
