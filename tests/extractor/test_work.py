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
