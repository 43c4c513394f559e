import numpy as np
import pytest
import torch

from fcache.cache_spec import Block, CodedLevel, encoding_names, find_encoding
from fcache.heads import batch_buffers, device_batches, to_batch
from fcache.heads.batches import one_ahead

CPU = torch.device("cpu")


@pytest.mark.parametrize("encoding", [n for n in encoding_names() if find_encoding(n).fit is None])
def test_features_decode_in_torch_to_what_they_decode_to_in_numpy(scenes, encoding: str):
    source = scenes(4, encoding=encoding)
    block = next(iter(source.blocks(0)))
    batch = to_batch(block, CPU)
    for name, coded in block.levels.items():
        assert batch.features[name].dtype == torch.float32
        np.testing.assert_array_equal(batch.features[name].numpy(), coded.decode(np))


def test_only_the_levels_asked_for_are_taken(scenes):
    block = next(iter(scenes(4).blocks(0)))
    assert set(to_batch(block, CPU, levels=["level-8"]).features) == {"level-8"}


def test_byte_streams_and_ragged_targets_become_one_tensor_a_sample(scenes):
    block = next(iter(scenes(3, role="evaluation").blocks(0)))
    batch = to_batch(block, CPU)
    truth = batch.targets["semantic/truth"]
    assert isinstance(truth, tuple)
    assert [t.dtype for t in truth] == [torch.uint8] * 3
    assert isinstance(batch.targets["semantic/map"], torch.Tensor)


def test_read_only_buffers_are_taken_without_a_warning_and_stay_unchanged(scenes):
    block = next(iter(scenes(4).blocks(0)))
    for array in [p for coded in block.levels.values() for p in coded.parts.values()]:
        array.setflags(write=False)
    batch = to_batch(block, CPU)
    batch.features["level-4"].zero_()
    assert block.levels["level-4"].parts[""].any()


def test_a_live_block_of_tensors_is_taken_as_it_is(scenes):
    source = scenes(4)
    level = source.info.levels[0]
    features = torch.from_numpy(source.features[level.name])
    parts = find_encoding("fp32").encode(features, level, {}, torch)
    coded = CodedLevel(level=level, encoding="fp32", parts=parts, tables={})
    block = Block(source.ids, source.views, (0,) * 4, {level.name: coded}, {})
    found = to_batch(block, CPU).features[level.name]
    assert found.data_ptr() == features.data_ptr()
    assert not found.requires_grad


def test_buffers_for_the_cpu_are_plain_arrays():
    buffer = batch_buffers("cpu")((2, 3), np.dtype("int8"))
    assert (buffer.shape, buffer.dtype) == ((2, 3), np.int8)


def test_the_batches_of_a_source_come_in_its_order_and_as_alone(scenes):
    source = scenes(10, encoding="int8")
    alone = [to_batch(b, CPU, levels=["level-8"]) for b in source.blocks(1)]
    for one, other in zip(device_batches(source.blocks(1), CPU, levels=["level-8"]), alone, strict=True):
        assert one.ids == other.ids
        assert set(one.features) == {"level-8"}
        assert torch.equal(one.features["level-8"], other.features["level-8"])
        assert torch.equal(one.targets["semantic/map"], other.targets["semantic/map"])


class Log:
    """Items that say when they are asked for, begun, given and used no more."""

    def __init__(self, count: int, fails_at: int = -1) -> None:
        self.count, self.fails_at, self.seen = count, fails_at, []

    def items(self):
        for i in range(self.count):
            self.seen.append(("asked", i))
            if i == self.fails_at:
                raise OSError("the disk is gone")
            yield i

    def begin(self, i):
        def note(what):
            self.seen.append((what, i))
            return i

        note("begun")
        return lambda: note("given"), lambda: note("free")

    def in_use(self) -> list[int]:
        """How many items were begun and not free yet, after each event."""
        found, now = [], 0
        for what, _ in self.seen:
            now += {"begun": 1, "free": -1}.get(what, 0)
            found.append(now)
        return found


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_work_is_one_item_ahead_and_an_item_is_asked_for_when_the_last_but_one_is_free(count):
    log = Log(count)
    for expected, given in enumerate(one_ahead(log.items(), log.begin)):
        assert given == expected
        assert ("begun", min(given + 1, count - 1)) in log.seen
        log.seen.append(("worked", given))
    place = {event: at for at, event in enumerate(log.seen)}
    assert len(place) == len(log.seen) == 5 * count
    for i in range(count):
        assert place["asked", i] < place["begun", i] < place["given", i] < place["worked", i]
        assert place["given", i] < place["free", i]
        if i + 2 < count:
            assert place["worked", i] < place["free", i] < place["asked", i + 2]
        if i + 1 < count:
            assert place["begun", i + 1] < place["given", i]
    assert max(log.in_use(), default=0) == min(count, 2)
    assert log.in_use()[-1:] == [0] * min(count, 1)


def test_work_that_was_begun_is_waited_for_when_the_caller_leaves_or_an_item_fails():
    log = Log(9)
    batches = one_ahead(log.items(), log.begin)
    assert [next(batches), next(batches)] == [0, 1]
    batches.close()
    assert log.in_use()[-1] == 0
    failing = Log(9, fails_at=3)
    with pytest.raises(OSError, match="the disk is gone"):
        list(one_ahead(failing.items(), failing.begin))
    assert failing.in_use()[-1] == 0
