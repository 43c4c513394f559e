"""Heads that train while their cache is written: shards are committed between and within epochs."""

import io
import json
from dataclasses import replace

import cachebuilder
import numpy as np
import pytest
import torch
from cachebuilder import group, manifest
from PIL import Image

from fcache.cache_spec import IncompatibleError, StreamConfig, follow_source, open_cache, open_source, open_writer
from fcache.cache_spec.testing import plain_view
from fcache.heads import TrainConfig, choose_heads, compare, events, load_run, train, trainer
from fcache.heads.runs import load_weights
from fcache.heads.tasks import semantic

LIMITS = {"semantic_truth_bytes": 2000}
GROUPS = (group(samples=12, shard_records=2, limits=LIMITS), group("val", 3, limits=LIMITS))
CONFIG = TrainConfig(iterations=16, batch_size=2, lr=1e-3, checkpoint_every=0)
STREAM = StreamConfig(2, kinds=("semantic",), drop_last=True)
HEADS = ["linear", "upernet:width=8,dropout=0.5"]


class Extraction:
    """A cache that is written shard by shard."""

    def __init__(self, root) -> None:
        self.root, self.writer = root, open_writer(root, manifest(*GROUPS))

    def commit(self, count: int, split: str = "train") -> None:
        for part in ("features", "semantic"):
            for shard in [s for s in self.writer.pending(part) if s.group == split][:count]:
                writer = self.writer.write(shard, part)
                g = self.writer.manifest.group(split)
                arrays = cachebuilder.records(g, shard, part, list(range(shard.count)))
                if part == "semantic":
                    arrays["semantic/map"] = [m % 2 for m in arrays["semantic/map"]]
                    if split == "val":
                        arrays["semantic/truth"] = [png(m) for m in arrays["semantic/map"]]
                writer.append(list(range(shard.count)), arrays)
                writer.commit(facts={}, fingerprint={})

    def train(self, out, config=CONFIG, *, heads=HEADS, scored=False, **more):
        reader = open_cache(self.root, allow_partial=True)
        source = follow_source(reader, "train", STREAM)
        held = follow_source(reader, "val", replace(STREAM, order="sequential", drop_last=False)) if scored else None
        return train(source, choose_heads(heads, source.info, config), config, out=out, validation=held, **more)


def png(labels: np.ndarray) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(labels).save(stream, "PNG")
    return np.frombuffer(stream.getvalue(), np.uint8)


@pytest.fixture
def extraction(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(cachebuilder, "features", calm)
    monkeypatch.setattr(cachebuilder, "view_of", lambda g, sample, view: plain_view(g.canvas, image_size=g.canvas))
    return Extraction(tmp_path / "c")


def calm(level, sample, view):
    """Features of ordinary size: those of the builder are made to be hard to store, not to be learned from."""
    return cachebuilder.generator("calm", level.name, sample, view).standard_normal(level.shape).astype(np.float32)


def same(a, b):
    one, other = load_weights(a), load_weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def commit_at_the_end_of_epochs(extraction, counts, seen):
    """A report that commits `counts[e]` shards when epoch e ends, and keeps what it is told."""

    def report(event):
        seen.append(event)
        if isinstance(event, events.EpochDone):
            extraction.commit(counts.get(event.epoch, 0))

    return report


def test_training_begins_with_what_is_committed_and_takes_in_what_comes(extraction, tmp_path):
    extraction.commit(1)
    seen = []
    # One batch a shard: epochs of 1, 1, 3 and 6 blocks.
    report = commit_at_the_end_of_epochs(extraction, {1: 2, 2: 3}, seen)
    run = extraction.train(tmp_path / "runs", report=report)[0]
    assert [e.iteration for e in seen if isinstance(e, events.EpochDone)] == [1, 2, 5, 11]
    recorded = json.loads((run.folder / "run.json").read_text())["extent"]["training"]
    assert [(e["epoch"], e["samples"], e["shards"]) for e in recorded["epochs"]] == [
        (0, 2, {"train": [[0, 1]]}),
        (2, 6, {"train": [[0, 3]]}),
        (3, 12, {"train": [[0, 6]]}),
    ]
    whole = open_source(open_cache(extraction.root, allow_partial=True), "train", STREAM).info.extent
    assert recorded["epochs"][-1]["committed"] == whole["committed"]
    assert run.extent["training"] == recorded


def test_shards_committed_within_an_epoch_wait_for_the_next(extraction, tmp_path):
    extraction.commit(2)
    seen = []

    def report(event):
        seen.append(event)
        if isinstance(event, events.StepDone) and event.iteration == 1:
            extraction.commit(2)

    extraction.train(tmp_path / "runs", report=report)
    assert [e.iteration for e in seen if isinstance(e, events.EpochDone)] == [2, 6, 10, 14]


@pytest.mark.parametrize("stop", [1, 2, 4, 7, 9])
def test_a_resumed_training_goes_on_with_the_set_of_its_epoch(extraction, tmp_path, stop):
    grown = {0: 1, 1: 1, 2: 2}
    extraction.commit(2)
    runs = extraction.train(tmp_path / "whole", report=commit_at_the_end_of_epochs(extraction, grown, []))
    # The same extraction again: this training stops, and if that is within an epoch, what would be committed at the
    # end of it comes before it goes on.
    other = Extraction(tmp_path / "again")
    other.commit(2)
    steps = []

    def should_stop():
        return sum(isinstance(e, events.StepDone) for e in steps) == stop

    stopped = other.train(
        tmp_path / "parts", report=commit_at_the_end_of_epochs(other, grown, steps), should_stop=should_stop
    )
    assert {run.status for run in stopped} == {"interrupted"}
    ended = [e for e in steps if isinstance(e, events.EpochDone)]
    if not ended or ended[-1].iteration < stop:
        other.commit(grown.pop(len(ended), 0))
    resumed = other.train(tmp_path / "parts", report=commit_at_the_end_of_epochs(other, grown, []), resume=True)
    for a, b in zip(runs, resumed, strict=True):
        assert same(a, b)
        assert a.losses == b.losses
        assert a.extent == b.extent


def test_training_waits_for_the_first_shard_and_the_last_score_for_the_evaluation_split(extraction, tmp_path):
    waited = []

    def report(event):
        if isinstance(event, events.Waiting):
            waited.append(event.split)
            if len(waited) in (3, 6):
                extraction.commit(99, event.split)

    config = replace(CONFIG, evaluate_every=4)
    runs = extraction.train(tmp_path / "runs", config, scored=True, report=report)
    assert waited == ["train"] * 3 + ["val"] * 3
    for run in runs:
        # Nothing was scored on the way, for there was no whole split to score on.
        assert [e.iteration for e in run.evaluations] == [config.iterations]
        assert run.extent["validation"]["shards"] == {"val": 2}
    plain = open_cache(extraction.root)
    assert runs[0].extent["training"] == open_source(plain, "train", STREAM).info.extent


def test_a_whole_cache_trains_to_the_same_weights_followed_or_not(extraction, tmp_path):
    extraction.commit(99)
    followed = extraction.train(tmp_path / "followed")
    source = open_source(open_cache(extraction.root, allow_partial=True), "train", STREAM)
    plain = train(source, choose_heads(HEADS, source.info, CONFIG), CONFIG, out=tmp_path / "plain")
    for a, b in zip(followed, plain, strict=True):
        assert same(a, b)
        assert a.extent == b.extent


@pytest.mark.parametrize("trained", [False, True])
def test_who_waits_can_be_stopped_and_resumed(extraction, tmp_path, trained):
    if trained:
        extraction.commit(99)
    waiting = []
    runs = extraction.train(
        tmp_path / "runs", scored=True,
        report=lambda e: waiting.append(e) if isinstance(e, events.Waiting) else None,
        should_stop=lambda: len(waiting) > 1,
    )  # fmt: skip
    assert [run.status for run in runs] == ["interrupted"] * 2
    assert [run.iterations for run in runs] == [CONFIG.iterations if trained else 0] * 2
    extraction.commit(99)
    extraction.commit(99, "val")
    assert {r.status for r in extraction.train(tmp_path / "runs", scored=True, resume=True)} == {"finished"}


def test_runs_on_other_committed_sets_are_not_compared(extraction, tmp_path):
    extraction.commit(99, "val")
    extraction.commit(3)
    grown = extraction.train(
        tmp_path / "grown", scored=True, report=commit_at_the_end_of_epochs(extraction, {1: 3}, [])
    )
    whole = extraction.train(tmp_path / "whole", scored=True)
    assert compare(grown, resamples=10).rows
    with pytest.raises(IncompatibleError, match=r"not comparable: extent\.training\.(epochs|committed)"):
        compare([*grown, *whole], resamples=10)


def test_a_head_that_stops_while_a_cache_grows_does_not_keep_the_others_from_being_compared(
    extraction, tmp_path, monkeypatch
):
    extraction.commit(99, "val")
    extraction.commit(2)
    calls = []

    def loss(module, batch, options):
        calls.append(1)
        terms = semantic._loss(module, batch, options)
        return {k: v * float("nan") for k, v in terms.items()} if len(calls) == 3 else terms

    monkeypatch.setitem(semantic.HEADS, "linear", replace(semantic.HEADS["linear"], loss=loss))
    report = commit_at_the_end_of_epochs(extraction, {1: 2}, [])
    runs = extraction.train(tmp_path / "runs", scored=True, report=report)
    assert [run.status for run in runs] == ["stopped", "finished"]
    assert runs[0].extent["training"] != runs[1].extent["training"]
    found = compare(runs, resamples=10)
    assert [row.label for row in found.rows] == HEADS[1:]
    assert found.stopped == (runs[0],)


def test_a_head_added_to_trained_ones_reads_what_they_read(extraction, tmp_path):
    extraction.commit(99, "val")
    extraction.commit(2)
    report = commit_at_the_end_of_epochs(extraction, {1: 2}, [])
    first = extraction.train(tmp_path / "runs", heads=HEADS[:1], scored=True, report=report)
    extraction.commit(99)
    both = extraction.train(tmp_path / "runs", scored=True, resume=True)
    assert both[0] == load_run(first[0].folder)
    assert both[1].extent == first[0].extent
    assert compare(both, resamples=10).rows


def test_a_followed_training_is_not_resumed_as_another_one(extraction, tmp_path):
    extraction.commit(99)
    extraction.train(tmp_path / "runs", should_stop=lambda: True)
    source = open_source(open_cache(extraction.root, allow_partial=True), "train", STREAM)
    with pytest.raises(IncompatibleError, match=r"extent\.(follow|committed)"):
        train(source, choose_heads(HEADS, source.info, CONFIG), CONFIG, out=tmp_path / "runs", resume=True)
