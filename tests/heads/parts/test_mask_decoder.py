import pytest
import torch

from fcache.heads.parts.attention import Attention
from fcache.heads.parts.deformable import DeformableBlock, places_of
from fcache.heads.parts.mask_decoder import QueryBlock, covered

# All but one unit in ten million.
NEARLY_ALL = 1 - 1e-7


def _spread(module: torch.nn.Module) -> torch.nn.Module:
    """Biases begin at zero; here they are not."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def test_what_masks_cover_is_the_same_under_autocast_and_all_if_they_cover_nothing():
    embeddings, features = torch.randn(2, 9, 64), torch.randn(2, 64, 3000)
    embeddings[1, 4], features[1, 0] = 0.0, 1.0
    embeddings[1, 4, 0] = -1.0
    expected = torch.einsum("bqc,bcn->bqn", embeddings.double(), features.double()) >= 0
    assert not expected[1, 4].any()
    expected[1, 4] = True
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            # In float32 no more than a product or two lies on the other side of zero.
            assert (covered(embeddings, features) != expected).sum() <= 2


def test_attention_looks_at_visible_keys_only():
    attention = _spread(Attention(8, heads=2, dropout=0.0))
    queries, keys, values = torch.randn(1, 2, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    visible = torch.tensor([[[True, False, True], [False, True, False]]])
    found = attention(queries, keys, values, visible)
    torch.testing.assert_close(found[:, :1], attention(queries[:, :1], keys[:, ::2], values[:, ::2]))
    torch.testing.assert_close(found[:, 1:], attention.out(attention.value(values[:, 1:2])))


def test_in_training_attention_weights_are_dropped():
    attention = _spread(Attention(8, heads=2, dropout=NEARLY_ALL))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(attention(x, x, x), attention.out.bias.expand(2, 5, 8))
    attention.eval()
    assert not torch.allclose(attention(x, x, x), attention.out.bias.expand(2, 5, 8))


@pytest.mark.parametrize("training", [True, False])
def test_what_a_block_adds_is_dropped_in_training(training: bool):
    block = _spread(QueryBlock(8, heads=2, hidden=16, dropout=NEARLY_ALL)).train(training)
    x, names, level, positions = torch.randn(2, 3, 8), torch.randn(3, 8), torch.randn(2, 5, 8), torch.randn(5, 8)
    found = block(x, names, level, positions, torch.ones(2, 3, 5, dtype=torch.bool))
    alone = block.norm(block.talk_norm(block.look_norm(x)))
    assert torch.allclose(found, alone, atol=1e-6) == training

    deformable = _spread(DeformableBlock(8, heads=2, levels=1, hidden=16, dropout=NEARLY_ALL)).train(training)
    x = torch.randn(2, 6, 8)
    found = deformable(x, torch.randn(6, 8), places_of([(2, 3)], device=x.device, dtype=x.dtype))
    assert torch.allclose(found, deformable.norm(deformable.attention_norm(x)), atol=1e-6) == training
