"""Few file descriptors, little memory: success or one error that says which, and never a cache that is not whole."""

import os
import resource
import traceback
from collections import Counter
from dataclasses import replace

import pytest
import torch
from cachebuilder import group, manifest, write_pending

from fcache.cache_spec import CorruptError, FcacheError, LevelSpec, open_writer, verify
from fcache.extractor import Job, extract
from fcache.extractor.scenes import write_scenes
from tests.torture.caches import contents, numbers
from tests.torture.children import limit_memory, run_child

KINDS = ("class", "semantic")
LEVELS = (LevelSpec("level-4", "C H W", (32, 64, 64), 4), LevelSpec("level-8", "C", (4096,), 8))
MB = 1 << 20


def limit_files(more):
    """Lets this process open at most `more` descriptors beyond those it has."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(n) for n in os.listdir("/proc/self/fd")) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))


# glibc ends a process that starts a thread and has no memory for its data: "cannot allocate memory for thread-local
# data: ABORT".
NO_THREAD = 127
LIMITS = {"descriptors": limit_files, "bytes": limit_memory}


def outcome(work):
    """How a piece of work ends: what it returned, or the name of its error."""
    try:
        return work()
    except CorruptError as e:
        # Nothing is corrupt: who believes this deletes a sound shard.
        return f"wrong: {e}"
    except (FcacheError, MemoryError) as e:
        return type(e).__name__
    except Exception as e:
        # Python and torch say in their own words that memory is short.
        last = traceback.extract_tb(e.__traceback__)[-1].filename
        short = isinstance(e, RuntimeError) and ("start new thread" in str(e) or "/torch/" in last)
        # CPython 3.11 that has no memory for the frame of a call forgets to say MemoryError.
        short |= isinstance(e, SystemError) and str(e) == "error return without exception set"
        return f"{type(e).__name__} of Python or torch" if short else f"wrong: {type(e).__name__}: {e}"


def read_limited(root, truth, limit, more, mode):
    """Reads, verifies; returns how that ended."""
    if limit == "descriptors":
        # So that what is imported and opened once is there.
        numbers(root, mode, KINDS)
    LIMITS[limit](more)
    return (
        outcome(lambda: "read" if numbers(root, mode, KINDS) == truth else "wrong numbers"),
        outcome(lambda: "verified" if not verify(root, deep=True).faults else "wrong: faults"),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("limits") / "c"
    groups = (group(samples=24, levels=LEVELS, shard_records=1, encoding="fp16"), group("val/32x32", 2, levels=LEVELS))
    writer = open_writer(root, manifest(*groups, kinds=KINDS))
    write_pending(writer)
    writer.finish()
    return root


def test_reading_with_few_descriptors_or_little_memory_gives_numbers_or_says_so(cache, rounds, record):
    truth, counts, wrong = numbers(cache, "pread", KINDS), Counter(), []
    before = contents(cache)
    sweeps = {
        "descriptors": range(0, 60, rounds(12, 1)),
        "bytes": range(0, 120 * MB, rounds(24, 2) * MB),
    }
    for limit, amounts in sweeps.items():
        for more in amounts:
            for mode in ("mmap", "pread"):
                ended = run_child(read_limited, cache, truth, limit, more, mode, seconds=60)
                if limit == "bytes" and ended.status == NO_THREAD:
                    counts["bytes: ended by the C library, which said so"] += 1
                    continue
                assert ended.status == 0, f"{more} more {limit}, {mode}: {ended.error}"
                for found in ended.value:
                    counts[f"{limit}: {found.split(':')[0]}"] += 1
                    wrong += [f"{more} more {limit}, {mode}: {found}"] if found.startswith("wrong") else []
    assert wrong == []
    assert contents(cache) == before
    assert counts["descriptors: read"]
    assert counts["descriptors: DataError"]
    assert counts["bytes: read"]
    record("limits_reading", {"outcomes": dict(sorted(counts.items())), "wrong": 0})


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp("limits") / "data"
    write_scenes(root, train=6, val=2, size=(48, 64))
    return Job(
        model="mobilenetv2_050", dataset="ade20k", root=root, cache=root.parent / "whole", weights="random:0", views=1,
        view_recipe="ade20k-small", input_size=(32, 32), shard_records=1, batch_size=2, workers=0,
    )  # fmt: skip


def extract_limited(job, limit, more):
    """Extracts; returns how that ended."""
    torch.set_num_threads(1)
    # Everything is imported and the backbone's code is run once before little is left.
    warm = replace(job, cache=job.cache.parent / "warm", splits=("val",))
    extract(warm, report=lambda _: None)
    LIMITS[limit](more)
    return outcome(lambda: "finished" if extract(job, report=lambda _: None).pending == 0 else "wrong: pending")


def test_extracting_with_few_descriptors_or_little_memory_finishes_or_says_so_and_continues(
    job, folder, rounds, record
):
    extract(job, report=lambda _: None)
    whole, counts, wrong = contents(job.cache), Counter(), []
    sweeps = {"descriptors": range(0, 100, rounds(33, 6)), "bytes": range(24 * MB, 200 * MB, rounds(80, 8) * MB)}
    for limit, amounts in sweeps.items():
        for more in amounts:
            limited = replace(job, cache=folder / f"{limit}-{more}" / "c")
            ended = run_child(extract_limited, limited, limit, more, seconds=120)
            # Native code may end the process when memory is short; the cache survives that as any kill.
            found = ended.value if ended.status == 0 else "ended by a signal" if ended.status < 0 else ended.error
            counts[f"{limit}: {found.split(':')[0].splitlines()[0]}"] += 1
            wrong += [f"{more} more {limit}: {found}"] if found.startswith(("wrong", "Trace")) else []
            if (limited.cache / "zarr.json").exists():
                assert not verify(limited.cache, deep=True).corrupt
            extract(limited, report=lambda _: None)
            assert contents(limited.cache) == whole
    assert wrong == []
    assert counts["descriptors: finished"]
    assert counts["descriptors: DataError"]
    assert counts["bytes: finished"]
    record("limits_extracting", {"outcomes": dict(sorted(counts.items())), "differences": 0})
