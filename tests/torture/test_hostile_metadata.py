"""Metadata, indices, frames and links made by an enemy who signs them: one error, little memory, no write outside."""

import contextlib
import io
import itertools
import json
import math
import os
import random
import shutil
import stat
import struct
import traceback
from collections import Counter

import numpy as np
from cachebuilder import group, manifest, records

from fcache.cache_spec import FcacheError, open_cache, open_writer, verify
from fcache.cache_spec.shardfile import index_bytes
from tests.torture.caches import numbers, read_metadata, text, write_metadata
from tests.torture.children import Hung, limit_memory, run_child, time_limit, watch_writes

KINDS = ("class", "semantic", "instances")
MEMORY = 1 << 30
SECONDS = 20
VALUES = (
    None, True, False, 0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63),
    10**300, 0.5, -0.0, 1.0, 1e308, math.nan, math.inf, -math.inf, "", "x", "train", "../../outside", "/etc/passwd",
    "a/../../b", ".", "..", "\0", "a\0b", "\ud800", "\u202e", "x" * 100_000, "C H W", "T C H W", "NaN", "fp32", "int8",
    "val/32x32", [], {}, [[]], [None], [0] * 1000, [-1, -1], [2**40, 2**40], {"": {}},
    json.loads("[" * 300 + "]" * 300), json.loads('{"a":' * 450 + "0" + "}" * 450),
)  # fmt: skip
# Text that is no value: what a parser takes apart.
TEXTS = (
    b"", b"{", b"null", b"[]", b"0", b'"x"', b"NaN", b"-Infinity", b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"{}{}",
    b"[" * 200_000, b'{"a":' * 50_000, b"1" * 5000, b'{"attributes": {"fcache": ' + b"[" * 2000, b"\x00" * 4096,
    b'{"attributes": {"fcache": {"format": 1e400}}}', b'{"attributes": {"fcache": {"format": NaN, "digest": 0}}}',
    b'{"attributes": {"fcache": {"format": ' + b"9" * 4000 + b"}}}", b'{"digest": "x", "digest": {}}',
)  # fmt: skip
NUMBERS = (0, 1, 15, 16, 100, 2**15, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1)


def nodes(body, path=()):
    """The paths of all values inside JSON."""
    yield path
    children = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in children:
        yield from nodes(value, (*path, key))


def again(body):
    """A copy of JSON."""
    return json.loads(json.dumps(body))


def changed(rng, body):
    """JSON with one value anywhere inside replaced, removed, repeated, renamed or moved."""
    body = again(body)
    *path, last = rng.choice([p for p in nodes(body) if p])
    parent = body
    for key in path:
        parent = parent[key]
    way = rng.choice(("value", "value", "value", "value", "near", "remove", "repeat", "rename", "swap"))
    if way == "near" and isinstance(parent[last], (int, float)):
        parent[last] += rng.choice((-1, 1, 1000, 2**40, 0.5))
    elif way == "remove":
        del parent[last]
    elif way == "repeat" and isinstance(parent, list):
        parent *= rng.choice((2, 3, 1000))
    elif way == "rename" and isinstance(parent, dict):
        parent[rng.choice(("x", "../x", "/x", "", "val"))] = parent.pop(last)
    elif way == "swap":
        other = rng.choice(sorted(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[last], parent[other] = parent[other], parent[last]
    else:
        parent[last] = again(rng.choice(VALUES))
    return body


def attack_metadata(rng, root):
    """One to three changes of the root, a manifest or a commit, all signed."""
    said = read_metadata(root)
    names: set[str] = set()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.choice(("root", "manifest", "manifest", "manifest", "commit", "commit"))
        if kind == "root" or not said.commits:
            said.root = changed(rng, said.root)
        else:
            bodies = said.manifests if kind == "manifest" else said.commits
            name = rng.choice(sorted(bodies))
            bodies[name] = changed(rng, bodies[name])
            names.add(name)
        if not isinstance(said.root, dict) or not isinstance(said.root.get("groups"), dict):
            break
    if rng.random() < 0.5:
        follow(said, names)
    with contextlib.suppress(AttributeError, TypeError, KeyError):
        write_metadata(root, said, names=names)


def follow(said, names):
    """Makes the identities fit what the specs say now, and the commits fit these."""
    from fcache.cache_spec import FeatureSpec, TargetSpec, from_json, targets_key

    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        features = from_json(FeatureSpec, said.root["feature_spec"]).key
        targets = tuple(from_json(TargetSpec, t) for t in said.root["target_specs"])
        said.root |= {"features": features, "targets": targets_key(targets)}
        keys = {"features": features} | {t.kind: t.key for t in targets}
        for name, body in said.commits.items():
            if body["part"] in keys and body["key"] != keys[body["part"]]:
                body["key"] = keys[body["part"]]
                names.add(name)


def attack_text(rng, root):
    """Bytes that are no JSON, or JSON that no writer makes; sometimes with a second field of the same name."""
    names = ["zarr.json", *sorted(read_metadata(root).manifests), *sorted(read_metadata(root).commits)]
    path = root / rng.choice(names)
    if rng.random() < 0.5:
        path.write_bytes(rng.choice(TEXTS))
        return
    data, value = path.read_bytes(), text(rng.choice(VALUES))
    keys = sorted({k for p in nodes(json.loads(data)) for k in p if isinstance(k, str)})
    at = rng.choice([i for i, c in enumerate(data) if c == ord("{")]) + 1
    path.write_bytes(data[:at] + json.dumps(rng.choice(keys)).encode() + b": " + value + b", " + data[at:])


def sign_file(root, name, data):
    """Puts a file in place and lets its commit say so."""
    (root / name).write_bytes(data)
    said = read_metadata(root)
    import hashlib

    for commit, body in said.commits.items():
        if name in body["files"]:
            body["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
            write_metadata(root, said, names={commit})


def sharded(root):
    """Shard files with an index, by name: their slots."""
    found = {}
    for path in sorted(root.rglob("zarr.json")):
        node = json.loads(path.read_bytes())
        if node["node_type"] == "array" and node["codecs"][0]["name"] == "sharding_indexed":
            for file in sorted(path.parent.glob("c.*")):
                found[file.relative_to(root).as_posix()] = node["chunk_grid"]["configuration"]["chunk_shape"][0]
    return found


def attack_index(rng, root):
    """A shard index with numbers that lead anywhere, its crc and the commit's digest right."""
    name, slots = rng.choice(sorted(sharded(root).items()))
    data = (root / name).read_bytes()
    start = len(data) - 16 * slots - 4
    index = np.frombuffer(data, "<u8", 2 * slots, start).reshape(slots, 2).copy()
    for _ in range(rng.choice((1, 1, 2, 4))):
        near = rng.choice([int(x) for x in index.ravel()])
        value = rng.choice((*NUMBERS, near, near + 1, near - 1, len(data), start, start + 1))
        index[rng.randrange(slots), rng.randrange(2)] = value % 2**64
    sign_file(root, name, data[:start] + index_bytes(index))


def frame(rng, size):
    """A zstd frame that says and holds strange things: `size` is what a reader expects."""
    said = rng.choice((size, size, size, 0, 1, size + 1, 2**20, 2**30, 2**40, 2**63))
    header = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", said)
    if rng.random() < 0.3:
        # A window instead of a stated size.
        header = b"\x28\xb5\x2f\xfd" + bytes([0x00, rng.randrange(256)])
    # Blocks that repeat one byte up to 128 KiB times: a few bytes that want gigabytes.
    blocks = rng.choice((1, 2, 100, 20_000))
    block = struct.pack("<I", (131072 << 3) | 0b010)[:3] + b"x"
    last = struct.pack("<I", (rng.choice((size, 131072)) << 3 & 0xFFFFFF) | 0b011)[:3] + b"x"
    bomb = header + block * blocks + last
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", rng.choice((0, 4, 2**32 - 1))) + b"abcd"
    return rng.choice(
        (bomb, bomb, skippable, skippable + bomb, header, header + last, rng.randbytes(40), header + b"\7")
    )


def attack_frame(rng, root):
    """A compressed record that is a bomb, or no record."""
    found = {n: s for n, s in sharded(root).items() if n.startswith("val/") or "semantic" in n or "instances" in n}
    name, slots = rng.choice(sorted(found.items()))
    data = (root / name).read_bytes()
    start = len(data) - 16 * slots - 4
    index = np.frombuffer(data, "<u8", 2 * slots, start).reshape(slots, 2).copy()
    kept, body = index.copy(), b""
    for slot in range(slots):
        if int(index[slot, 0]) < 2**64 - 1:
            old = data[int(index[slot, 0]) :][: int(index[slot, 1])]
            size = int.from_bytes(old[5:6], "little") if len(old) > 5 else 0
            stored = frame(rng, rng.choice((size, 1024, 192, 80))) if rng.random() < 0.7 else old
            kept[slot] = len(body), len(stored)
            body += stored
    sign_file(root, name, body + index_bytes(kept))


def attack_table(rng, root):
    """Numbers in tables that lead anywhere: counts, samples, views; or a table of another length."""
    tables = sorted({p.relative_to(root).as_posix() for p in root.rglob("c.*")} - set(sharded(root)))
    name = rng.choice(tables)
    data = bytearray((root / name).read_bytes())
    for _ in range(rng.choice((1, 2))):
        value = struct.pack("<q", rng.choice((-1, 0, 1, 5, 2**31 - 1, -(2**31), 2**62)))
        at = rng.randrange(0, len(data), 4)
        data[at : at + 4] = value[:4]
    sign_file(root, name, bytes(data) + rng.choice((b"", b"", b"", b"1234", bytes(10_000))))


def attack_links(rng, root):
    """A file or a folder that leads elsewhere, or nowhere, or is none."""
    outside = root.parent.parent / "outside"
    folders = [
        root / n for n in ("partial", "claims", "manifest", "commits", "commits/train", "train", "train/level-4")
    ]
    files = [p for p in sorted(root.rglob("*")) if p.is_file()]
    path = rng.choice((rng.choice(files), rng.choice(files), rng.choice(folders), root / "lock"))
    if path.is_dir():
        # Elsewhere there are the same files, and some that are nobody's business.
        shutil.copytree(path, outside / path.name, dirs_exist_ok=True)
        shutil.rmtree(path)
    elif path.exists():
        shutil.copy(path, outside / path.name)
        path.unlink()
    way = rng.choice(("same", "same", "any", "dangling", "loop", "zero", "pipe", "folder"))
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    else:
        ends = {"same": outside / path.name, "any": outside, "dangling": outside / "new", "loop": path}
        path.symlink_to(ends.get(way, "/dev/zero"))


ATTACKS = {
    "metadata": attack_metadata, "text": attack_text, "index": attack_index, "frame": attack_frame,
    "table": attack_table, "links": attack_links,
}  # fmt: skip
# Drawn as often as they are many.
DRAWN = ("metadata",) * 6 + ("text", "index", "frame", "table", "links")


def outside_files(outside):
    """A folder whose files nobody may touch."""
    shutil.rmtree(outside, ignore_errors=True)
    for name in ("precious", "deep/precious", "deep/er/precious", "empty/folder/x"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text("mine")
    (outside / "empty/folder/x").unlink()


def tree(folder):
    """All entries of a folder with their content."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() and not p.is_symlink() else b""
        for p in sorted(folder.rglob("*"))
    }


def wanted():
    groups = (group(samples=3, views=2), group("val/32x32", 2, compression="zstd"))
    return manifest(*groups, kinds=KINDS)


def write_sound(writer):
    """Writes what is pending: small images, and labels that are classes, so that heads can be trained and scored."""
    for part in writer.manifest.parts():
        for shard in writer.pending(part):
            shard_writer, ids = writer.write(shard, part), writer.samples(shard)
            kept = [p for p, sample in enumerate(ids) if sample != "train#1"]
            arrays = records(writer.manifest.group(shard.group), shard, part, kept) if kept else {}
            if "semantic/map" in arrays:
                arrays["semantic/map"] = [m % 2 for m in arrays["semantic/map"]]
            if "index/image_size" in arrays:
                arrays["index/image_size"] = [np.asarray((40, 48), np.int32) for _ in kept]
            for position in set(range(len(ids))) - set(kept):
                shard_writer.skip(position, "made to fail")
            if kept:
                shard_writer.append(kept, arrays)
            shard_writer.commit(facts={}, fingerprint={"made": "by a test"})
    writer.finish()


def make_sound(root):
    """The cache that is attacked."""
    write_sound(open_writer(root, wanted()))


def stamps(root):
    """What tells whether an entry was changed, by path."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            state = os.lstat(os.path.join(folder, name))
            changed = (state.st_mtime_ns, state.st_size) if stat.S_ISREG(state.st_mode) else ()
            found[os.path.join(folder, name)] = (state.st_mode, state.st_ino, *changed)
    return found


def restore(root, files, before):
    """Makes a cache what it was, of the bytes of its files and its stamps by path; returns the new stamps."""
    now = stamps(root)
    for path, state in now.items():
        if before.get(path) != state and os.path.lexists(path):
            if stat.S_ISDIR(state[0]):
                shutil.rmtree(path)
            else:
                os.unlink(path)
    for name, data in files.items():
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    return stamps(root)


def use_read(root, mode):
    """Everything that reads."""
    return "read", numbers(root, mode, KINDS)


def use_partial(root, mode):
    """Records one by one, from whatever is there."""
    reader = open_cache(root, allow_partial=True, mode=mode)
    for split in reader.splits:
        reader.missing(split=split)
        for found in reader.records(split):
            for record in found.records[:3]:
                reader.read(found.group.path, found.group.levels[0].name, int(record))
    return "partial", None


def use_verify(root, mode):
    """The deep check."""
    return "verify", bool(verify(root, deep=True).faults)


def use_writer(root, mode):
    """What an extraction does: grow, claim, write, finish."""
    writer = open_writer(root, wanted())
    for shard in writer.pending():
        if writer.claims.acquire(shard.group, shard.index):
            writer.claims.beat()
    write_sound(writer)
    return "written", None


def use_cli(root, mode):
    """The commands that look, one after another; repair last."""
    from fcache.cli import main

    for arguments in (["info"], ["info", "--json"], ["ls"], ["verify", "--deep"], ["repair"]):
        said, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
            status = main([*arguments, str(root)])
        if status not in (0, 1, 2, 3, 4, 5) or "bug in fcache" in told.getvalue():
            raise AssertionError(f"fcache {' '.join(arguments)}: {status}\n{told.getvalue()}")
    return "told", None


def use_training(root, mode):
    """A head trained for two iterations from what is there."""
    from fcache.cli import main

    out = root.parent / "run"
    arguments = ["train-head", "--cache", str(root), "--head", "semantic/linear", "--iters", "2", "--out", str(out)]
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        status = main([*arguments, "--allow-partial", "--set", "batch_size=2"])
    shutil.rmtree(out, ignore_errors=True)
    if status not in (0, 1, 2, 3, 4, 5) or "bug in fcache" in told.getvalue():
        raise AssertionError(f"fcache train-head: {status}\n{told.getvalue()}")
    return "trained" if status == 0 else "refused", None


def uses_of(rng):
    """What is done with a case."""
    uses = [use_read, use_verify] + [use_partial] * (rng.random() < 0.3)
    uses += [use_cli] * (rng.random() < 0.1) + [use_training] * (rng.random() < 0.02)
    return uses + [use_writer] * (rng.random() < 0.2)


def play(folder, cases):
    """Plays cases of the fuzz; returns counts and what went wrong."""
    root, outside = folder / "inside/cache", folder / "outside"
    files = {n: data for n, data in tree(root).items() if (root / n).is_file()}
    truth, sound = numbers(root, "pread", KINDS), stamps(root)
    outside_files(outside)
    counts, wrong = Counter(), []
    told = watch_writes(root.parent)
    limit_memory(MEMORY)
    for case in cases:
        rng = random.Random(case)
        kind = rng.choice(DRAWN)
        ATTACKS[kind](rng, root)
        before = tree(outside)
        told.clear()
        for use in uses_of(rng):
            try:
                with time_limit(SECONDS):
                    outcome, value = use(root, rng.choice(("mmap", "pread")))
                if use is use_read:
                    outcome = "correct" if value == truth else "read"
            except FcacheError:
                outcome = "refused"
            except Hung:
                outcome, problem = "hung", traceback.format_exc(limit=-8)
                wrong.append((case, kind, use.__name__, problem))
            except Exception as e:
                outcome, problem = type(e).__name__, traceback.format_exc(limit=-8)
                wrong.append((case, kind, use.__name__, problem))
            counts[f"{kind}: {use.__name__[4:]} {outcome}"] += 1
        if told:
            wrong.append((case, kind, "outside", "\n".join(itertools.islice(told, 5))))
        if tree(outside) != before:
            wrong.append(
                (case, kind, "outside", f"changed: {sorted(set(tree(outside).items()) ^ set(before.items()))}")
            )
        if kind == "links" or told:
            outside_files(outside)
        sound = restore(root, files, sound)
    return counts, wrong


def test_metadata_that_an_enemy_signed_is_refused_or_read_in_little_memory_and_nothing_outside_is_touched(
    folder, rounds, record
):
    make_sound(folder / "inside/cache")
    cases, counts, wrong = rounds(150, 10_000), Counter(), []
    # In batches: if one ends a process, that is told, and the others go on.
    for first in range(0, cases, 500):
        ended = run_child(play, folder, range(first, min(first + 500, cases)), seconds=1200)
        if ended.status:
            wrong.append((first, "batch", f"exit status {ended.status}", ended.error))
            continue
        counts.update(ended.value[0])
        wrong += ended.value[1]
    told = [f"case {case} ({kind}), {use}: {problem.strip()[-1500:]}" for case, kind, use, problem in wrong]
    assert told == [], "\n\n".join(told[:10])
    assert counts["metadata: read refused"] > cases / 10
    record("hostile_metadata", {"inputs": cases, "uses": dict(sorted(counts.items())), "crashes": 0, "outside": 0})
