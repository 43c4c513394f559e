"""Every kind of file of a cache, damaged in every way: correct numbers or one error, never anything else."""

import json
import random
import shutil
from collections import Counter
from contextlib import suppress

import pytest
from cachebuilder import group, manifest, write_pending

from fcache.cache_spec import FcacheError, open_writer, verify
from fcache.cache_spec.targets import KINDS
from tests.torture.caches import numbers

GARBAGE = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b"\xff\xfe",
    b"0",
    b'"x"',
    b"[" * 5000,
    b'{"a": NaN}',
    b"1e999",
    b"\x00" * 64,
)


def damage(rng, path, others):
    """Does one thing to a file; returns its name."""
    data = path.read_bytes()
    ways = ["flip", "truncate", "extend", "delete", "garbage", "swap", "zero", "folder"]
    if path.suffix == ".json":
        ways += ["value", "key"] * 2
    way = rng.choice(ways)
    if way == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif way == "truncate":
        path.write_bytes(data[: rng.randrange(len(data))])
    elif way == "extend":
        path.write_bytes(data + rng.randbytes(rng.randrange(1, 40)))
    elif way == "delete":
        path.unlink()
    elif way == "garbage":
        path.write_bytes(rng.choice(GARBAGE))
    elif way == "swap":
        path.write_bytes(rng.choice(others).read_bytes())
    elif way == "zero":
        start = rng.randrange(len(data))
        path.write_bytes(data[:start] + b"\0" * (len(data) - start))
    elif way == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(json.dumps(edited(rng, json.loads(data), way)))
    return way


def edited(rng, node, way):
    """JSON with one value replaced, or one key removed or renamed, somewhere inside."""
    if isinstance(node, dict) and node:
        key = rng.choice(sorted(node))
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            return {**node, key: edited(rng, node[key], way)}
        if way == "key":
            rest = {k: v for k, v in node.items() if k != key}
            return rest if rng.random() < 0.5 else {**rest, f"{key}_": node[key]}
        return {**node, key: rng.choice((None, -1, 2**70, 1.5, "x", [], {}, True, "../../x"))}
    if isinstance(node, list) and node:
        i = rng.randrange(len(node))
        return [*node[:i], edited(rng, node[i], way), *node[i + 1 :]]
    return rng.choice((None, -1, 2**70, "x", [], {}))


def says(path):
    """What a file holds: JSON without its formatting, other bytes as they are; None if nothing can be read."""
    with suppress(OSError, ValueError, RecursionError):
        data = path.read_bytes()
        if path.suffix != ".json":
            return data
        node = json.loads(data)
        if isinstance(node, dict) and isinstance(node.get("shape"), list):
            # An array may be longer than the manifest says: a growth that was interrupted leaves it so.
            node["shape"] = node["shape"][1:]
        return json.dumps(node)
    return None


@pytest.fixture
def targets(rounds):
    """Kinds of target: table, map and ragged ones, or all."""
    return rounds(("class", "semantic", "instances"), tuple(KINDS))


@pytest.fixture
def sound(folder, targets):
    root = folder / "sound"
    groups = (group(samples=3, views=2), group("val/32x32", 3, compression="zstd"))
    writer = open_writer(root, manifest(*groups, kinds=targets))
    write_pending(writer, bad=["train#1"])
    writer.finish()
    return root


def test_a_damaged_cache_gives_correct_numbers_or_one_error(sound, folder, targets, rounds, record):
    rng = random.Random(1)
    truth = numbers(sound, "pread", targets)
    files = sorted(p.relative_to(sound) for p in sound.rglob("*") if p.is_file())
    # Shard files are most; each kind gets its turn.
    kinds = {
        "root": [f for f in files if str(f) == "zarr.json"],
        "manifest": [f for f in files if f.parts[0] == "manifest"],
        "commit": [f for f in files if f.parts[0] == "commits"],
        "metadata": [f for f in files if f.name == "zarr.json" and len(f.parts) > 1],
        "shard": [f for f in files if f.name.startswith("c.")],
    }
    count, seen = rounds(250, 10_000), Counter()
    root = folder / "damaged"
    shutil.copytree(sound, root)
    for case in range(count):
        kind = rng.choice(("root", "manifest", "commit", "commit", "metadata", "shard", "shard", "shard", "shard"))
        name = rng.choice(kinds[kind])
        before, said = (root / name).read_bytes(), says(root / name)
        way = damage(rng, root / name, [root / n for n in kinds[kind]])
        told = f"case {case}: {way} of {name}"
        # A map of a file of the right size never faults: sizes are checked when it is opened.
        mode = rng.choice(("mmap", "pread"))
        outcome = "error"
        try:
            outcome = "correct" if numbers(root, mode, targets) == truth else "wrong"
        except FcacheError:
            pass
        except Exception as e:
            pytest.fail(f"{told}: {type(e).__name__}: {e}")
        try:
            faults = bool(verify(root, deep=True).faults)
        except FcacheError:
            faults = True
        except Exception as e:
            pytest.fail(f"{told}: verify: {type(e).__name__}: {e}")
        same = says(root / name) == said
        assert faults or outcome == "correct", f"{told}: {outcome}, and the deep check found nothing"
        assert faults or same or kind in ("root", "commit"), f"{told}: the deep check found nothing"
        seen[f"{kind}: {outcome}" + (", found by verify --deep" if faults else "")] += 1
        if (root / name).is_dir():
            (root / name).rmdir()
        (root / name).write_bytes(before)
    assert numbers(root, "mmap", targets) == truth
    assert not verify(root, deep=True).faults
    assert {k.split(":")[0] for k in seen} == set(kinds)
    record("hostile_files", {"cases": count, "outcomes": dict(sorted(seen.items())), "wrong and not found": 0})


def test_a_damaged_cache_can_be_written_to_or_says_why(sound, folder, targets, rounds):
    """Writers, too, end in order or in one error, and never make damage look sound."""
    rng = random.Random(2)
    groups = (group(samples=3, views=2), group("val/32x32", 3, compression="zstd"))
    small = [p.relative_to(sound) for p in sorted(sound.rglob("*")) if p.is_file() and p.suffix == ".json"]
    outcomes = Counter()
    for case in range(rounds(20, 1000)):
        root = folder / "damaged"
        shutil.copytree(sound, root)
        name = rng.choice(small)
        way = damage(rng, root / name, [root / n for n in small])
        told = f"case {case}: {way} of {name}"
        try:
            write_pending(open_writer(root, manifest(*groups, kinds=targets)), bad=["train#1"])
            outcomes["done"] += 1
        except FcacheError:
            outcomes["refused"] += 1
        except Exception as e:
            pytest.fail(f"{told}: {type(e).__name__}: {e}")
        else:
            faults = verify(root, deep=True)
            assert not faults.missing, told
            if not faults.faults:
                assert numbers(root, "pread", targets) == numbers(sound, "pread", targets), told
        shutil.rmtree(root)
    assert set(outcomes) == {"done", "refused"}
