"""Windows: padding before the roll, and the windows that are really in use."""

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import nn

from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.windows import correct_windows, pretrained_windows, windows_in_use


def _block(kind: str, size: tuple[int, int], window: int) -> nn.Module:
    """A shifted block over a map of `size` tokens with random norms (timm starts Swin V2 as the identity)."""
    common = {"dim": 8, "num_heads": 2}
    shift = window // 2
    if kind == "v1":
        block: nn.Module = SwinTransformerBlock(input_resolution=size, window_size=window, shift_size=shift, **common)
    elif kind == "v2":
        block = SwinTransformerV2Block(input_resolution=size, window_size=window, shift_size=shift, **common)
    else:
        block = SwinTransformerV2CrBlock(
            feat_size=size, window_size=(window, window), shift_size=(shift, shift), **common
        )
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if name.startswith("norm"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return block.eval()


def _changed_rows(block: nn.Module, size: tuple[int, int]) -> list[int]:
    """The rows of the output that change with row 0 of the input."""
    x = torch.randn(1, *size, 8)
    y = x.clone()
    y[:, 0] += torch.randn(size[1], 8)
    with torch.no_grad():
        change = (block(x) - block(y)).abs().amax(dim=(0, 2, 3))
    return torch.nonzero(change).flatten().tolist()


@pytest.mark.parametrize("kind", ["v1", "v2", "cr"])
@pytest.mark.parametrize(
    ("size", "timm_rows"),
    [((16, 16), [0, 1, 2, 3]), ((15, 20), [0, 12, 13, 14]), ((30, 40), [0, 1, 28, 29])],
    ids=str,
)
def test_a_change_of_row_0_stays_in_its_window_where_timm_leaks_to_the_other_end(
    kind: str, size: tuple[int, int], timm_rows: list[int]
) -> None:
    block = _block(kind, size, 8)
    assert _changed_rows(block, size) == timm_rows
    assert correct_windows(block)
    assert _changed_rows(block, size) == [0, 1, 2, 3]


@pytest.mark.parametrize(("size", "rows"), [((14, 14), [0, 1, 2]), ((16, 16), [0, 1, 2])], ids=str)
def test_swin_v1_with_its_window_of_7_keeps_a_change_inside_too(size: tuple[int, int], rows: list[int]) -> None:
    block = _block("v1", size, 7)
    correct_windows(block)
    assert _changed_rows(block, size) == rows


@pytest.mark.parametrize("kind", ["v1", "v2", "cr"])
@pytest.mark.parametrize("size", [(64, 64), (16, 40), (8, 16)], ids=str)
def test_where_the_window_divides_the_map_every_bit_is_timms(kind: str, size: tuple[int, int]) -> None:
    block = _block(kind, size, 8)
    x = torch.randn(2, *size, 8)
    with torch.no_grad():
        before = block(x)
        correct_windows(block)
        after = block(x)
    assert torch.equal(before, after)
    assert not torch.allclose(after, x, atol=0.1), "the block does something"


@pytest.mark.parametrize("kind", ["v1", "v2", "cr"])
def test_where_it_does_not_divide_the_map_the_result_differs_from_timms(kind: str) -> None:
    block = _block(kind, (15, 20), 8)
    x = torch.randn(1, 15, 20, 8)
    with torch.no_grad():
        before = block(x)
        correct_windows(block)
        after = block(x)
    assert (after - before).norm() / before.norm() > 1e-3


def test_a_model_without_windows_has_none_to_correct() -> None:
    assert not correct_windows(timm.create_model("test_resnet", pretrained=False))


@pytest.mark.parametrize(
    ("model", "windows"),
    [
        ("swinv2_tiny_window8_256", (8, 8, 8, 8)),
        ("swinv2_tiny_window16_256", (16, 16, 16, 8)),
        ("swinv2_base_window12_192", (12, 12, 12, 6)),
        ("swinv2_base_window12to16_192to256", (12, 12, 12, 6)),
        ("swinv2_base_window12to24_192to384", (12, 12, 12, 6)),
    ],
)
def test_pretrained_windows_are_those_that_each_stage_had_in_pre_training(model: str, windows: tuple[int, ...]) -> None:
    with torch.device("meta"):
        full = timm.create_model(model, pretrained=False)
    assert pretrained_windows(full) == tuple((n, n) for n in windows)


def test_windows_stay_at_a_larger_input_and_open_where_a_map_clamped_them() -> None:
    def at(size: int) -> list[list[list[int]]]:
        architecture = find_architecture("swinv2_tiny_window16_256")
        with torch.device("meta"):
            model = timm.create_model(architecture.name, img_size=size, **architecture.creation)
        return [[stage["window"], stage["shift"]] for stage in windows_in_use(model)]

    assert at(256) == [[[16, 16], [8, 8]], [[16, 16], [8, 8]], [[16, 16], [0, 0]], [[8, 8], [0, 0]]]
    assert at(512) == [[[16, 16], [8, 8]], [[16, 16], [8, 8]], [[16, 16], [8, 8]], [[16, 16], [0, 0]]]
