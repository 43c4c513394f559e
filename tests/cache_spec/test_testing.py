from dataclasses import replace

import numpy as np
import pytest

from fcache.cache_spec import SpecError, TargetSpec
from fcache.cache_spec.testing import memory_source, plain_view


def _source(count: int = 7, **more):
    x = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 4), np.float32)
    specs = (TargetSpec("class", "numbers", tuple(map(str, range(count)))),)
    labels = np.arange(count, dtype=np.int32)
    return memory_source(
        {"level-8": x}, {"class/label": labels}, strides={"level-8": 8}, specs=specs, batch_size=3, **more
    )


def _labels(source, epoch: int, start: int = 0, epochs: int = 1) -> list[int]:
    blocks = source.blocks(epoch, start=start, epochs=epochs)
    return [int(v) for block in blocks for v in block.targets["class/label"]]


def test_an_epoch_gives_every_record_once_in_an_order_of_its_own():
    source = _source()
    assert sorted(_labels(source, 0)) == list(range(7))
    assert _labels(source, 0) == _labels(source, 0)
    assert _labels(source, 0) != _labels(source, 1)
    assert source.num_blocks(0) == 3


def test_an_epoch_continues_where_it_is_asked_to():
    source = _source()
    assert _labels(source, 2, start=1) == _labels(source, 2)[3:]
    assert _labels(source, 2, start=1, epochs=2) == _labels(source, 2)[3:] + _labels(source, 3)


def test_features_targets_and_ids_of_a_block_belong_together():
    source = _source()
    for block in source.blocks(0):
        assert [int(i[-4:]) for i in block.ids] == list(block.targets["class/label"])
        np.testing.assert_array_equal(block.levels["level-8"].decode(np)[:, 0, 0, 0], block.targets["class/label"])


def test_a_shorter_last_block_can_be_left_out():
    source = _source(drop_last=True)
    assert source.num_blocks(0) == 2
    assert [len(b) for b in source.blocks(0)] == [3, 3]


def test_evaluation_sources_keep_the_order():
    assert _labels(_source(role="evaluation"), 0) == list(range(7))


def test_lengths_that_differ_are_refused():
    with pytest.raises(SpecError, match="7 ids"):
        replace(_source(), targets={"class/label": np.zeros(6, np.int32)})


def test_a_plain_view_maps_corners_of_the_image_to_those_of_its_valid_part():
    view = plain_view((64, 96), valid=(60, 90), image_size=(120, 45))
    x, y = 45, 120
    assert view.matrix @ np.array([x, y, 1]) == pytest.approx([90, 60])
