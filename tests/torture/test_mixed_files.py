"""Files cut short, missing, exchanged, copied elsewhere or taken from another cache: found, or without effect."""

import json
import random
import shutil
from collections import Counter

import pytest
from cachebuilder import group, manifest, records, snapshot, write_pending

from fcache.cache_spec import (
    CorruptError,
    FcacheError,
    FeatureSpec,
    IncompatibleError,
    SpecError,
    make_pending,
    open_writer,
    verify,
)
from fcache.cache_spec.layout import FEATURES, Manifest
from tests.torture.caches import contents, numbers

KINDS = ("class", "semantic", "instances")


def wanted(seed=0):
    groups = (group(samples=7, views=2), group("val/32x32", 5, compression="zstd"))
    found = manifest(*groups, kinds=KINDS)
    return Manifest(FeatureSpec(**{**found.features.__dict__, "seed": seed}), found.targets, found.groups)


def write_other(writer):
    """All shards, each with the numbers of another sample, as after a run whose numbers came out differently."""
    for part in writer.manifest.parts():
        for shard in writer.pending(part):
            g, count = writer.manifest.group(shard.group), shard.count
            arrays = records(g, shard, part, list(range(count)))
            index = {k: v for k, v in arrays.items() if k.startswith("index/")}
            other = {k: v[::-1] if count > 1 else [x + 1 for x in v] for k, v in arrays.items()}
            shard_writer = writer.write(shard, part)
            shard_writer.append(range(count), {**other, **index})
            shard_writer.commit(facts={}, fingerprint={"made": "by another run"})


@pytest.fixture
def caches(folder):
    """A cache; one of the same identity with other numbers; one of another identity with equal numbers."""
    write_pending(open_writer(folder / "sound", wanted()))
    write_other(open_writer(folder / "rerun", wanted()))
    write_pending(open_writer(folder / "foreign", wanted(seed=1)))
    for name in ("sound", "rerun", "foreign"):
        open_writer(folder / name, wanted(seed=int(name == "foreign"))).finish()
    return folder


def commits(root):
    """Commits by name, as data."""
    return {p.relative_to(root).as_posix(): json.loads(p.read_bytes()) for p in sorted(root.glob("commits/**/*.json"))}


def two_shards(rng, root):
    """Two commits of one part of one group."""
    found = commits(root)
    one = rng.choice(sorted(found))
    same = [n for n in found if n.rpartition("/")[0] == one.rpartition("/")[0] and n != one]
    two = rng.choice(same)
    return (one, found[one]), (two, found[two])


def exchange(root, one, two):
    a, b = (root / one).read_bytes(), (root / two).read_bytes()
    (root / one).write_bytes(b)
    (root / two).write_bytes(a)


def cut(rng, root, folder):
    name = rng.choice(sorted(n for n in snapshot(root)))
    size = (root / name).stat().st_size
    length = rng.choice((0, 1, size // 2, size - 1, size - 4, size - 5, rng.randrange(size)))
    (root / name).write_bytes((root / name).read_bytes()[: max(0, length)])


def lengthen(rng, root, folder):
    name = rng.choice(sorted(n for n in snapshot(root)))
    data = (root / name).read_bytes()
    (root / name).write_bytes(data + rng.choice((b"\0", b"\n\n", data, bytes(4096))))


def remove(rng, root, folder):
    (root / rng.choice(sorted(snapshot(root)))).unlink()


def exchange_files(rng, root, folder):
    (_, one), (_, two) = two_shards(rng, root)
    pairs = list(zip(sorted(one["files"]), sorted(two["files"]), strict=True))
    for a, b in rng.sample(pairs, rng.choice((1, len(pairs)))):
        exchange(root, a, b)


def exchange_files_and_commits(rng, root, folder):
    (a, one), (b, two) = two_shards(rng, root)
    for x, y in zip(sorted(one["files"]), sorted(two["files"]), strict=True):
        exchange(root, x, y)
    exchange(root, a, b)


def exchange_arrays(rng, root, folder):
    """Two arrays of equal size of one shard."""
    name = rng.choice(sorted(commits(root)))
    files = sorted(commits(root)[name]["files"])
    pairs = [(a, b) for a in files for b in files if a < b]
    sized = [(a, b) for a, b in pairs if (root / a).stat().st_size == (root / b).stat().st_size]
    exchange(root, *rng.choice(sized or pairs or [(name, name)]))


def copy_commit(rng, root, folder):
    """A commit under another number, of another part or of another group."""
    found = sorted(commits(root))
    one, two = rng.sample(found, 2)
    target = rng.choice((two, f"{one.rpartition('/')[0]}/000099.json", f"{one.rpartition('/')[0]}/000001.json"))
    if target != one:
        shutil.copy(root / one, root / target)


def stale_commit(rng, root, folder):
    """The commit of before over the files of a later run."""
    for name in commits(root)[rng.choice(sorted(commits(root)))]["files"]:
        shutil.copy(folder / "rerun" / name, root / name)


def commit_of_another(rng, root, folder):
    name = rng.choice(sorted(commits(root)))
    shutil.copy(folder / rng.choice(("rerun", "foreign")) / name, root / name)


def file_of_another(rng, root, folder):
    name = rng.choice(sorted(n for n in snapshot(root) if n.rpartition("/")[2].startswith("c.")))
    shutil.copy(folder / "rerun" / name, root / name)


def shard_of_another(rng, root, folder):
    """Files and commit of a cache of another identity."""
    name = rng.choice(sorted(n for n in commits(root) if n.count("/") == 2 + ("val" in n)))
    for file in (name, *commits(root)[name]["files"]):
        shutil.copy(folder / "foreign" / file, root / file)


def root_of_another(rng, root, folder):
    shutil.copy(folder / "foreign/zarr.json", root / "zarr.json")


WAYS = (
    cut, lengthen, remove, exchange_files, exchange_files_and_commits, exchange_arrays, copy_commit, stale_commit,
    commit_of_another, file_of_another, shard_of_another, root_of_another,
)  # fmt: skip


def test_mixed_up_files_are_found_or_have_no_effect_and_are_repaired(caches, rounds, record):
    rng, outcomes, silent = random.Random(6), Counter(), []
    root, whole = caches / "c", contents(caches / "sound")
    truth = numbers(caches / "sound", "pread", KINDS)
    shutil.copytree(caches / "sound", root)
    before = snapshot(root)
    for number in range(rounds(8, 250) * len(WAYS)):
        way = WAYS[number % len(WAYS)]
        way(rng, root, caches)
        told = f"{number}: {way.__name__}"
        try:
            plain = "right" if numbers(root, rng.choice(("mmap", "pread")), KINDS) == truth else "wrong"
        except FcacheError:
            plain = "refused"
        try:
            faults = verify(root, deep=True).faults
            # What reading refuses, too: else nothing tells what to repair.
            silent += [f"{told}: {plain}"] if plain != "right" and not faults else []
            make_pending(root, faults)
            writer = open_writer(root, wanted())
            write_pending(writer)
            writer.finish()
            # What is no part of the cache does not count: a commit of a shard that it does not have.
            found = {n: d for n, d in contents(root).items() if not n.endswith("000099.json")}
            assert found == whole, told
            assert not verify(root, deep=True).faults, told
            outcome = "found and repaired" if faults else "without effect"
        except (CorruptError, IncompatibleError, SpecError) as e:
            outcome, dead_end = "refused", f"{told}: {plain}, {e}"
            # The root and the manifests cannot be made anew.
            silent += [] if plain == outcome and way in (cut, lengthen, remove, root_of_another) else [dead_end]
        outcomes[f"{way.__name__.replace('_', ' ')}: {plain} when read, {outcome}"] += 1
        restore(root, before)
    assert silent == []
    record("mixed_files", {"cases": sum(outcomes.values()), "outcomes": dict(sorted(outcomes.items())), "silent": 0})


def restore(root, files):
    """Puts back what differs."""
    now = snapshot(root)
    for name in set(now) - set(files):
        (root / name).unlink()
    for name, (data, _) in files.items():
        if name not in now or now[name][0] != data:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)


def test_a_shard_of_another_run_with_its_commit_counts_as_a_whole_shard(caches):
    """The identity says that the numbers are the same: whoever changes them breaks the identity, not the cache."""
    root = caches / "sound"
    name = "commits/train/000001.json"
    for file in (name, *commits(root)[name]["files"]):
        shutil.copy(caches / "rerun" / file, root / file)
    assert not verify(root, deep=True).faults
    assert FEATURES in commits(root)[name]["part"]
