"""Attacks on a cache by an enemy who signs: metadata, text, shard indices, zstd frames, tables, links."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import struct
import zlib

import numpy as np

from fcache.cache_spec import FeatureSpec, TargetSpec, from_json, targets_key
from fcache.cache_spec.shardfile import ZSTD, index_bytes
from tests.torture.caches import read_metadata, text, write_metadata

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
    said = read_metadata(root)
    others = [p.relative_to(root).as_posix() for p in sorted((root / "manifest").iterdir())]
    path = root / rng.choice(["zarr.json", *others, *sorted(said.commits)])
    if rng.random() < 0.5 or path.suffix != ".json":
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


def attack_truth(rng, root):
    """A picture of the truth that says that it is of another size, thousands of times larger mostly, or is none."""
    name = rng.choice(sorted(n for n in sharded(root) if "semantic/truth/c." in n))
    slots, data = sharded(root)[name], (root / name).read_bytes()
    start, body = len(data) - 16 * slots - 4, b""
    index = np.frombuffer(data, "<u8", 2 * slots, start).reshape(slots, 2).copy()
    for slot in range(slots):
        if int(index[slot, 0]) < 2**64 - 1:
            offset, length = (int(x) for x in index[slot])
            record = bytearray(ZSTD.decode(data[offset : offset + length]))
            # The sizes in the header of a PNG, whose checksum then fits.
            for at in (16, 20):
                record[at : at + 4] = struct.pack(">I", rng.choice((0, 1, 48, 9_000, 13_000, 60_000, 2**31 - 1)))
            if rng.random() < 0.8:
                record[29:33] = struct.pack(">I", zlib.crc32(record[12:29]))
            stored = ZSTD.encode(bytes(record))
            index[slot] = len(body), len(stored)
            body += stored
    sign_file(root, name, body + index_bytes(index))


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
    "table": attack_table, "truth": attack_truth, "links": attack_links,
}  # fmt: skip
# Drawn as often as they are many.
DRAWN = ("metadata",) * 6 + ("text", "index", "frame", "table", "truth", "links")
