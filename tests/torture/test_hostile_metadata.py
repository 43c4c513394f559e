"""Metadata, indices, frames and links made by an enemy who signs them: one error, little memory, no write outside."""

import contextlib
import io
import itertools
import os
import random
import shutil
import stat
import traceback
from collections import Counter

import numpy as np
from cachebuilder import LIMITS, group, manifest, records
from PIL import Image

from fcache.cache_spec import FcacheError, open_cache, open_writer, verify
from tests.torture.attacks import ATTACKS, DRAWN
from tests.torture.caches import numbers
from tests.torture.children import Hung, limit_memory, run_child, time_limit, watch_writes

KINDS = ("class", "semantic", "instances")
MEMORY = 1 << 30
SECONDS = 20


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
    limits = {**LIMITS, "semantic_truth_bytes": 200}
    groups = (group(samples=3, views=2), group("val/32x32", 2, compression="zstd", limits=limits))
    return manifest(*groups, kinds=KINDS)


def picture(labels):
    """A PNG of 40 by 48 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 48), labels[0, 0], np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_sound(writer):
    """Writes what is pending: small images, and labels that are classes, so that heads can be trained and scored."""
    for part in writer.manifest.parts():
        for shard in writer.pending(part):
            shard_writer, ids = writer.write(shard, part), writer.samples(shard)
            kept = [p for p, sample in enumerate(ids) if sample != "train#1"]
            arrays = records(writer.manifest.group(shard.group), shard, part, kept) if kept else {}
            if "semantic/map" in arrays:
                arrays["semantic/map"] = [m % 2 for m in arrays["semantic/map"]]
            if "semantic/truth" in arrays:
                arrays["semantic/truth"] = [np.frombuffer(picture(m), np.uint8) for m in arrays["semantic/map"]]
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


def call(*arguments):
    """The exit status of a command, which is one of those that it documents."""
    from fcache.cli import main

    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        status = main([str(a) for a in arguments])
    if status not in (0, 1, 2, 3, 4, 5) or "bug in fcache" in told.getvalue():
        raise AssertionError(f"fcache {' '.join(map(str, arguments))}: {status}\n{told.getvalue()}")
    return status


def use_commands(root, mode):
    """The commands that look, one after another, and repair."""
    for arguments in (["info"], ["info", "--json"], ["ls"], ["verify", "--deep"], ["gc"], ["repair"]):
        call(*arguments, root)
    return "told", None


def use_copy(root, mode):
    """A copy: of what can be read the numbers are the same."""
    copy = root.parent / "copy"
    status = call("copy", root, copy)
    same = status != 0 or readable(copy, mode) == readable(root, mode)
    shutil.rmtree(copy, ignore_errors=True)
    if not same:
        raise AssertionError("the copy differs")
    return "copied" if status == 0 else "refused", None


def use_gc(root, mode):
    """Collecting garbage: what could be read can be read."""
    before = readable(root, mode)
    call("gc", root, "--apply")
    call("gc", root.parent, "--apply", "--superseded")
    if readable(root, mode) != before:
        raise AssertionError("what was read is gone")
    return "collected", None


def readable(root, mode):
    with contextlib.suppress(FcacheError):
        return numbers(root, mode, KINDS)
    return None


def use_training(root, mode):
    """A head trained for two iterations from what is there, and scored."""
    out = root.parent / "run"
    arguments = ["--cache", root, "--head", "semantic/linear", "--iters", 2, "--out", out, "--set", "batch_size=2"]
    status = call("train-head", *arguments, "--allow-partial")
    shutil.rmtree(out, ignore_errors=True)
    return "trained" if status == 0 else "refused", None


def uses_of(rng, kind):
    """What is done with a case."""
    uses = [use_read, use_verify] + [use_partial] * (rng.random() < 0.3)
    uses += [use_copy] * (rng.random() < 0.05) + [use_training] * (rng.random() < (0.3 if kind == "truth" else 0.03))
    uses += [use_commands] * (rng.random() < 0.1) + [use_gc] * (rng.random() < 0.05)
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
        for use in uses_of(rng, kind):
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
