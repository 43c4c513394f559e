import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fcache.cache_spec import CorruptError, DataError, IncompatibleError, IncompleteError, NoSpaceError, SpecError
from fcache.heads import TrainConfig, choose_heads, evaluate, find_runs, load_head, load_run, train
from fcache.heads.runs import load_states, write_durably

CONFIG = TrainConfig(iterations=6, batch_size=4, lr=3e-3)


@pytest.fixture
def run(scenes, tmp_path):
    source, held = scenes(8), scenes(6, role="evaluation")
    return train(source, choose_heads(["linear"], source.info, CONFIG), CONFIG, out=tmp_path, validation=held)[0]


def test_a_run_reads_back_as_it_was_written_also_from_another_place(run, tmp_path):
    assert load_run(run.folder) == run
    moved = run.folder.rename(tmp_path / "elsewhere")
    assert load_run(moved) == replace(run, folder=moved)


def test_runs_are_found_below_a_folder_and_by_themselves(run, tmp_path):
    (tmp_path / "unfinished").mkdir()
    assert find_runs(tmp_path) == (run.folder,)
    assert find_runs(run.folder) == (run.folder,)


def test_an_evaluation_of_the_run_equals_the_recorded_one(run, scenes):
    scored = evaluate(load_run(run.folder), scenes(6, role="evaluation"))
    assert dict(scored.scores.values) == dict(run.metrics)
    ids, states = load_states(run)
    assert ids == scored.ids
    for name, array in states.items():
        np.testing.assert_array_equal(array, scored.states[name])


def test_an_option_that_a_run_does_not_know_yet_has_its_default(run):
    assert load_head(replace(run, options={})).options == load_head(run).options


def test_scores_do_not_depend_on_how_samples_are_split_into_batches(run, scenes):
    sources = [scenes(6, role="evaluation", batch_size=n) for n in (1, 4, 6)]
    found = [dict(evaluate(run, source).scores.values) for source in sources]
    assert found[0] == found[1] == found[2]


def test_a_run_is_not_evaluated_on_other_features_or_targets(run, scenes):
    with pytest.raises(IncompatibleError, match="was trained on features"):
        evaluate(run, scenes(4, role="evaluation", encoding="int8"))
    held = scenes(4, role="evaluation")
    other = replace(held.info.targets[0], class_names=("v", "w", "x", "y", "z"))
    with pytest.raises(IncompatibleError, match="was trained on targets"):
        evaluate(run, replace(held, info=replace(held.info, targets=(other,))))


def test_only_evaluation_splits_with_samples_are_scored(run, scenes):
    with pytest.raises(SpecError, match="evaluation split"):
        evaluate(run, scenes(4))
    with pytest.raises(SpecError, match="empty"):
        evaluate(run, replace(scenes(3, role="evaluation"), drop_last=True))


def test_a_folder_without_a_record_is_an_unfinished_run(run, tmp_path):
    (run.folder / "run.json").unlink()
    with pytest.raises(IncompleteError, match="--resume"):
        load_run(run.folder)
    with pytest.raises(SpecError, match="no run at"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda text: text[:100], CorruptError),
        (lambda text: "[]", CorruptError),
        (lambda text: text.replace('"seed": 0', '"sede": 0'), CorruptError),
        (lambda text: text.replace('"format": 1', '"format": 2'), IncompatibleError),
    ],
)
def test_damaged_and_newer_records_are_refused(run, change, error):
    path = run.folder / "run.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(error):
        load_run(run.folder)


def test_damaged_weights_and_states_are_refused(run):
    for name, load in (("weights.safetensors", load_head), ("states.npz", load_states)):
        path = run.folder / name
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(CorruptError, match=name):
            load(run)


def test_weights_of_another_head_are_refused(run):
    with pytest.raises(IncompatibleError, match="do not fit head 'linear'"):
        load_head(replace(run, levels=run.levels[:2]))


def test_a_record_holds_no_number_that_json_lacks(run):
    def refuse(text: str):
        raise AssertionError(text)

    json.loads((run.folder / "run.json").read_text(), parse_constant=refuse)


def test_a_write_that_fails_leaves_the_old_file_and_says_why(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_durably(path, b"old")
    for number, error in ((errno.ENOSPC, NoSpaceError), (errno.EACCES, DataError)):

        def fail(fd: int, number: int = number) -> None:
            raise OSError(number, "refused")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(error, match=r"run\.json"):
            write_durably(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in Path(tmp_path).iterdir()] == ["run.json"]
