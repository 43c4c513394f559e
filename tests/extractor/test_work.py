"""What is left to do of a shard when it is claimed."""

from cachebuilder import group, manifest, write_shard

from fcache.cache_spec import open_writer
from fcache.extractor.work import Task, claimed


def test_a_part_that_a_process_committed_before_it_died_is_not_written_again(tmp_path):
    writer = open_writer(tmp_path / "c", manifest(group(samples=4, shard_records=2), kinds=("semantic",)))
    tasks = [Task(shard, ("semantic", "features"), ()) for shard in writer.pending("features")]
    other = open_writer(tmp_path / "c", writer.manifest)
    write_shard(other, tasks[0].shard, "semantic")
    for part in ("semantic", "features"):
        write_shard(other, tasks[1].shard, part)
    assert [(task.shard.index, task.parts) for task in claimed(writer, tasks)] == [(0, ("features",))]
    # What is done is given back.
    assert other.claims.acquire("train", 1)
    assert not other.claims.acquire("train", 0)


def test_many_shards_of_others_are_passed_over_by_one_look(tmp_path, monkeypatch):
    writer = open_writer(tmp_path / "c", manifest(group(samples=60, shard_records=2)))
    other = open_writer(tmp_path / "c", writer.manifest)
    tasks = [Task(shard, ("features",), ()) for shard in writer.pending("features")]
    for task in tasks[:10]:
        write_shard(other, task.shard, "features")
    for task in tasks[10:20]:
        assert other.claims.acquire("train", task.shard.index)
    asked = []
    acquire = writer.claims.acquire
    monkeypatch.setattr(writer.claims, "acquire", lambda g, i: asked.append(i) or acquire(g, i))
    assert sorted(task.shard.index for task in claimed(writer, tasks)) == list(range(20, 30))
    # The first one, those that were free, and at the end what others held: they may be dead.
    assert (asked[0], sorted(asked[1:11]), asked[11:]) == (0, list(range(20, 30)), list(range(10, 20)))


def test_shards_are_claimed_in_order_by_a_process_that_meets_no_other(tmp_path):
    writer = open_writer(tmp_path / "c", manifest(group(samples=60, shard_records=2)))
    tasks = [Task(shard, ("features",), ()) for shard in writer.pending("features")]
    assert list(claimed(writer, tasks)) == tasks


def test_what_a_process_held_that_died_meanwhile_is_claimed_in_the_same_round(tmp_path):
    writer = open_writer(tmp_path / "c", manifest(group(samples=8, shard_records=2)))
    other = open_writer(tmp_path / "c", writer.manifest)
    tasks = [Task(shard, ("features",), ()) for shard in writer.pending("features")]
    for i in (0, 1):
        assert other.claims.acquire("train", i)
    round_ = claimed(writer, tasks)
    assert sorted([next(round_).shard.index, next(round_).shard.index]) == [2, 3]
    other.claims.release_all()
    assert [task.shard.index for task in round_] == [0, 1]
