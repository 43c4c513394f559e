import numpy as np
import pytest
import torch

from fcache.cache_spec import Block, CodedLevel, encoding_names, find_encoding
from fcache.heads import batch_buffers, to_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("encoding", encoding_names())
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
