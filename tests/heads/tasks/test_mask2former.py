import math
import re
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from fcache.cache_spec import LevelSpec, SpecError, TargetSpec
from fcache.cache_spec.testing import plain_view
from fcache.heads import Batch, TrainConfig, choose_head, find_head, to_batch, train
from fcache.heads.head import HeadInput
from fcache.heads.parts.mask_loss import Masks, masks_of

NAME = "semantic/mask2former"
HEAD = find_head(NAME)
SMALL = {"width": 32, "attention_heads": 4, "queries": 12, "points": 64, "pixel_blocks": 1, "decoder_blocks": 3}
SWIN_B = (128, 256, 512, 1024)


def _inputs(channels: tuple[int, ...], num_classes: int, strides: tuple[int, ...] = (4, 8, 16, 32)) -> HeadInput:
    names = tuple(str(k) for k in range(num_classes))
    levels = tuple(
        LevelSpec(f"l{i}", "C H W", (c, 0, 0), s) for i, (c, s) in enumerate(zip(channels, strides, strict=True))
    )
    return HeadInput(levels, (TargetSpec("semantic", "test", names, ignore=255),))


def _build(inputs: HeadInput, **options) -> torch.nn.Module:
    return HEAD.build(inputs, {**HEAD.options, **options})


# What transformers calls our parameters, in the order in which names are rewritten.
RENAMED = (
    (r"^model\.pixel_level_module\.decoder\.", "pixels."),
    (r"^model\.transformer_module\.decoder\.", "decoder."),
    (r"^model\.transformer_module\.", "decoder."),
    (r"^class_predictor\.", "decoder.classify."),
    (r"^pixels\.level_embed$", "pixels.level_positions"),
    (r"input_projections\.", "project."),
    (r"encoder\.layers\.", "blocks."),
    (r"^decoder\.layers\.", "decoder.blocks."),
    (r"self_attn\.sampling_offsets\.", "attention.offsets."),
    (r"self_attn\.attention_weights\.", "attention.weights."),
    (r"self_attn\.value_proj\.", "attention.value."),
    (r"self_attn\.output_proj\.", "attention.out."),
    (r"^pixels(.*)self_attn_layer_norm\.", r"pixels\1attention_norm."),
    (r"mask_projection\.", "mask_features."),
    (r"adapter_1\.", "lateral.0."),
    (r"layer_1\.", "smooth.0."),
    (r"self_attn\.q_proj\.", "talk.query."),
    (r"self_attn\.k_proj\.", "talk.key."),
    (r"self_attn\.v_proj\.", "talk.value."),
    (r"self_attn\.out_proj\.", "talk.out."),
    (r"cross_attn\.out_proj\.", "look.out."),
    (r"cross_attn_layer_norm\.", "look_norm."),
    (r"self_attn_layer_norm\.", "talk_norm."),
    (r"final_layer_norm\.", "norm."),
    (r"fc1\.", "expand."),
    (r"fc2\.", "contract."),
    (r"queries_embedder\.", "query_names."),
    (r"queries_features\.", "queries."),
    (r"^decoder\.level_embed\.", "decoder.level_names."),
    (r"^decoder\.layernorm\.", "decoder.norm."),
    (r"mask_predictor\.mask_embedder\.(\d)\.0\.", lambda m: f"embed.{2 * int(m[1])}."),
)


def _ours(theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the whole library model under our names; its backbone's and the loss's are left out."""
    found: dict[str, torch.Tensor] = {}
    for full, tensor in theirs.items():
        name = full
        if name.startswith(("model.pixel_level_module.encoder.", "criterion.")):
            continue
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        if "cross_attn.in_proj_" in name:
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[name.replace("cross_attn.in_proj_", f"look.{part}.")] = chunk
        else:
            found[name] = tensor
    return found


def _library(*, pixel_blocks: int, decoder_blocks: int, num_classes: int, points: int = 100):
    """The whole model of transformers with a small Swin of its own."""
    swin = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        encoder_layers=pixel_blocks,
        decoder_layers=decoder_blocks + 1,
        num_labels=num_classes,
        train_num_points=points,
    )
    return Mask2FormerForUniversalSegmentation(config)


def _spread(module: torch.nn.Module) -> None:
    """Weights that make every part matter: offsets and attention weights begin at zero, masks nearly so."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.fixture
def same_points(monkeypatch):
    """Random points that depend on their number only: both implementations get equal ones in whatever order."""

    def rand(count: int, points: int, axes: int, *, device=None, dtype=None) -> torch.Tensor:
        return torch.from_numpy(np.random.default_rng(points).random((points, axes))).repeat(count, 1, 1)

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_outputs_loss_and_gradient_equal_those_of_the_whole_library_model(size: tuple[int, int], same_points):
    torch.manual_seed(0)
    other = _library(pixel_blocks=2, decoder_blocks=4, num_classes=7).double()
    # Its weight of "no object" is a float32 0.1.
    other.criterion.empty_weight[-1] = 0.1
    _spread(other)
    ours = _build(_inputs((16, 32, 64, 128), 7), pixel_blocks=2, decoder_blocks=4, points=100).double()
    ours.load_state_dict(_ours(other.state_dict()), strict=True)
    options = {**HEAD.options, "points": 100}
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 7, (2, 4, 4))).repeat_interleave(size[0] // 4, 1)
    labels = labels.repeat_interleave(size[1] // 4, 2).to(torch.uint8)
    labels[0, :, :20], labels[1, 5:30] = 255, 3
    masks = masks_of(labels, 7)

    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    per_image = masks.classes.split(masks.counts)
    found = other(
        pixels,
        mask_labels=[(labels[i] == k[:, None, None]).double() for i, k in enumerate(per_image)],
        class_labels=list(per_image),
        output_auxiliary_logits=True,
    )
    with torch.no_grad():
        maps = other.model.pixel_level_module.encoder(pixels).feature_maps
    features = {f"l{i}": x for i, x in enumerate(maps)}

    classes, embeddings, mask_features = ours(features)
    theirs = [*found.auxiliary_logits, {n: found[n] for n in ("class_queries_logits", "masks_queries_logits")}]
    assert len(classes) == len(theirs) == 5
    for mine, embedding, output in zip(classes, embeddings, theirs, strict=True):
        torch.testing.assert_close(mine, output["class_queries_logits"], rtol=1e-11, atol=1e-11)
        products = torch.einsum("bqc,bchw->bqhw", embedding, mask_features)
        torch.testing.assert_close(products, output["masks_queries_logits"], rtol=1e-11, atol=1e-11)

    terms = HEAD.loss(ours, Batch(("a", "b"), (), features, {"semantic/map": labels}), options)
    torch.testing.assert_close(sum(terms.values()), found.loss, rtol=1e-11, atol=1e-11)
    sum(terms.values()).backward()
    found.loss.backward()
    expected = _ours({name: p.grad for name, p in other.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize(
    ("pixel_blocks", "decoder_blocks", "millions"), [(1, 3, 6.91), (6, 3, 10.57), (1, 9, 16.38), (6, 9, 20.04)]
)
def test_parameter_counts_are_those_of_the_paper_s_heads(pixel_blocks: int, decoder_blocks: int, millions: float):
    with torch.device("meta"):
        module = _build(_inputs(SWIN_B, 150), pixel_blocks=pixel_blocks, decoder_blocks=decoder_blocks)
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 2) == millions
    assert (HEAD.options["pixel_blocks"], HEAD.options["decoder_blocks"]) == (6, 9)


def _xavier(inputs: int, outputs: int) -> float:
    return math.sqrt(2 / (inputs + outputs))


# Where transformers begins otherwise than the original: the spread of the original's weights.
ORIGINAL = {
    r"pixels\.project\.(\d)\.0\.weight": lambda p: _xavier(p.shape[1], 256),
    r"pixels\.blocks\.\d\.(expand|contract)\.weight": lambda p: _xavier(256, 1024),
    r"pixels\.(lateral|smooth)\.0\.0\.weight": lambda p: p[0].numel() ** -0.5,
    r"pixels\.mask_features\.weight": lambda p: 256**-0.5,
    r"decoder\.blocks\.\d\.talk\.(query|key|value)\.weight": lambda p: _xavier(256, 768),
    # torch's own start of a linear layer: uniform within 1 / sqrt(inputs).
    r"pixels\.blocks\.\d\.expand\.bias": lambda p: (3 * 256) ** -0.5,
    r"pixels\.blocks\.\d\.contract\.bias": lambda p: (3 * 1024) ** -0.5,
    r"decoder\.blocks\.\d\.expand\.bias": lambda p: (3 * 256) ** -0.5,
    r"decoder\.blocks\.\d\.contract\.bias": lambda p: (3 * 2048) ** -0.5,
    r"decoder\.classify\.(weight|bias)": lambda p: (3 * 256) ** -0.5,
}


def test_weights_begin_as_in_the_original_and_as_in_the_library_where_that_does():
    torch.manual_seed(0)
    other = _ours(_library(pixel_blocks=2, decoder_blocks=3, num_classes=150).state_dict())
    ours = _build(_inputs((16, 32, 64, 128), 150), pixel_blocks=2, decoder_blocks=3)
    assert float(ours.pixels.blocks[0].attention.offsets.bias.detach().std()) > 1
    used = set()
    for name, parameter in ours.named_parameters():
        theirs, count = other[name], parameter.numel()
        spread = float(parameter.detach().std())
        patterns = [p for p in ORIGINAL if re.fullmatch(p, name)]
        if patterns:
            used.update(patterns)
            expected = ORIGINAL[patterns[0]](parameter)
            # And it is a difference, of spread or of kind: uniform numbers end at sqrt(3) of their spread.
            end = expected * math.sqrt(3)
            assert float(parameter.detach().abs().max()) <= end * 1.001, name
            assert abs(float(theirs.std()) / expected - 1) > 0.15 or float(theirs.abs().max()) > 1.5 * end, name
        else:
            expected = float(theirs.std())
            assert abs(float((parameter.mean() - theirs.mean()).detach())) < 6 * (expected + 1e-9) / math.sqrt(
                count / 2
            ), name
        # The spread of a sample of n normal numbers is known to 1 / sqrt(2 n).
        assert spread == pytest.approx(expected, rel=6 / math.sqrt(count), abs=1e-7), name
    assert used == set(ORIGINAL)


@pytest.mark.parametrize(
    ("strides", "adaptors", "read", "encoded", "finest"),
    [
        ((4, 8, 16, 32), "auto", 4, 3, 1),
        ((2, 4, 8, 16, 32), "auto", 4, 3, 1),
        ((8, 16, 32), "auto", 3, 3, 1),
        ((4, 8, 16, 32, 64), "auto", 5, 3, 1),
        ((16, 16, 16, 16), "none", 4, 3, 1),
        ((16, 16, 16, 16), "auto", 4, 3, 4),
        ((16,) * 12, "auto", 4, 3, 4),
        ((14,), "auto", 1, 3, 4),
        ((16,), "none", 1, 1, 1),
        ((4, 32), "auto", 2, 1, 1),
        ((4,), "auto", 1, 1, 1),
        ((2,), "auto", 1, 1, 1),
        ((1, 2), "auto", 1, 1, 1),
    ],
)
def test_any_levels_of_any_size_will_do(strides: tuple[int, ...], adaptors: str, read: int, encoded: int, finest: int):
    inputs = _inputs(tuple(6 + i for i in range(len(strides))), 5, strides)
    options = {**HEAD.options, **SMALL, "adaptors": adaptors}
    names = HEAD.levels(inputs.levels, options)
    assert len(names) == read
    levels = tuple(level for level in inputs.levels if level.name in names)
    module = HEAD.build(HeadInput(levels, inputs.targets), options)
    assert len(module.pixels.project) == encoded
    for height, width in ((96, 64), (97, 33)):
        features = {
            level.name: torch.randn(2, level.channels, -(-height // level.stride), -(-width // level.stride))
            for level in levels
        }
        classes, embeddings, mask_features = module(features)
        assert len(classes) == len(embeddings) == 4
        assert classes[0].shape == (2, 12, 6)
        sides = (finest * side for side in features[levels[0].name].shape[2:])
        assert mask_features.shape == (2, 32, *sides)
        labels = torch.randint(0, 5, (2, height, width), dtype=torch.uint8)
        terms = HEAD.loss(module, Batch(("a", "b"), (), features, {"semantic/map": labels}), options)
        assert all(torch.isfinite(t) for t in terms.values())


def test_levels_are_read_from_fine_to_coarse_in_whatever_order_they_come():
    inputs = _inputs((4, 6, 8), 5, (4, 8, 16))
    features = {f"l{i}": torch.randn(1, 4 + 2 * i, 16 >> i, 16 >> i) for i in range(3)}
    found = []
    for levels in (inputs.levels, inputs.levels[::-1]):
        torch.manual_seed(0)
        found.append(_build(HeadInput(levels, inputs.targets), **SMALL)(features)[0][-1])
    assert torch.equal(*found)


def test_a_mask_stride_that_no_level_has_takes_all_of_the_coarsest():
    def read(strides: tuple[int, ...], mask_stride: int) -> tuple[str, ...]:
        inputs = _inputs((8,) * len(strides), 5, strides)
        return HEAD.levels(inputs.levels, {**HEAD.options, "mask_stride": mask_stride})

    assert read((4, 8, 16, 32), 64) == ("l3",)
    assert read((8, 8, 8), 16) == ("l0", "l1", "l2")
    # Taps at the end of each quarter, as of a plain ViT with any other mask_stride.
    assert read((16,) * 8, 32) == read((16,) * 8, 4) == ("l1", "l3", "l5", "l7")


def test_norms_of_the_inputs_add_two_parameters_a_channel():
    def count(**options) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in _build(_inputs(SWIN_B, 150), pixel_blocks=1, **options).parameters())

    assert count(norm_inputs=True) - count() == 2 * sum(SWIN_B)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width=30", "a width that 4 and attention_heads divide, got 30 and 8"),
        ("width=20,attention_heads=8", "got 20 and 8"),
        ("decoder_blocks=0", "decoder_blocks of at least 1, got 0"),
        ("pixel_blocks=0", "pixel_blocks of at least 1"),
        ("points=0", "points of at least 1"),
        ("dropout=1", "dropout in"),
        ("importance=1.5", "importance in"),
        ("oversampling=0.5", "oversampling of at least 1"),
        ("dice_weight=-1", "dice_weight of at least 0"),
        ("no_object_weight=0", "no_object_weight above 0, got 0"),
        ("pixel_mlp_ratio=0", "pixel_mlp_ratio of at least one unit"),
    ],
)
def test_options_out_of_range_are_refused_when_the_head_is_chosen(scenes, text: str, message: str):
    with pytest.raises(SpecError, match=message):
        choose_head(f"mask2former:{text}", scenes().info, TrainConfig())


def test_norms_and_embeddings_are_not_decayed_and_biases_are():
    module = _build(_inputs((8, 8, 8, 8), 5), **SMALL, norm_inputs=True)
    (group,) = HEAD.groups(module, HEAD.options)
    assert len(group.parameters) == len(list(module.parameters()))
    left = {id(p) for p in group.undecayed}
    names = {name for name, p in module.named_parameters() if id(p) in left}
    embeddings = {"decoder.queries.weight", "decoder.query_names.weight", "decoder.level_names.weight"}
    assert embeddings < names
    decayed = {name for name, p in module.named_parameters() if id(p) not in left}
    # The second part of a projection is its GroupNorm.
    second = re.compile(r"pixels\.(project|lateral|smooth)\.\d\.1\.(weight|bias)")
    assert all("norm" in n or second.fullmatch(n) for n in names - embeddings)
    assert not any(second.fullmatch(n) for n in decayed)
    assert sum(bool(second.fullmatch(n)) for n in names) == 10
    assert {"decoder.classify.bias", "pixels.level_positions", "pixels.mask_features.bias"} < decayed
    assert not any("norm" in n for n in decayed)


def test_dropout_drops_in_training_and_leaves_no_output_out():
    module = _build(_inputs((8, 8, 8), 5, (4, 8, 16)), **SMALL, dropout=0.5)
    features = {f"l{i}": torch.randn(1, 8, 16 // 2**i, 16 // 2**i) for i in range(3)}
    first, second = module(features)[0], module(features)[0]
    assert len(first) == 4
    # Nothing is dropped before the first block's output but in the pixel decoder, which it does not see.
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    module.eval()
    assert torch.equal(module(features)[0][3], module(features)[0][3])


def test_classes_are_read_from_masks_resized_to_the_canvas(monkeypatch):
    torch.manual_seed(0)
    classes, embeddings, mask_features = 9 * torch.randn(2, 12, 41), torch.randn(2, 12, 8), torch.randn(2, 8, 16, 24)
    views = (
        plain_view((64, 96), valid=(64, 80), image_size=(50, 61)),
        plain_view((64, 96), valid=(40, 96), image_size=(80, 99)),
    )
    masks = torch.einsum("bqc,bchw->bqhw", embeddings, mask_features)
    inside = F.interpolate(masks, size=(64, 96), mode="bilinear").sigmoid()
    scores = torch.einsum("bqk,bqhw->bkhw", classes.softmax(-1)[..., :-1], inside)
    said = ([torch.zeros_like(classes), classes], [torch.zeros_like(embeddings), embeddings], mask_features)
    for strip in (1, 1 << 16, 1 << 24):
        monkeypatch.setattr("fcache.heads.parts.classmaps.STRIP", strip)
        found = HEAD.predict(lambda features: said, Batch(("a", "b"), views, {}, {}), HEAD.options)
        for labels, score, view in zip(found, scores, views, strict=True):
            valid = score[None, :, : view.valid[0], : view.valid[1]]
            expected = F.interpolate(valid, size=view.image_size, mode="bilinear")[0].argmax(0)
            assert len(expected.unique()) > 5
            # Sums in another order may tie otherwise.
            assert (labels.long() == expected).double().mean() > 0.999


def test_mask2former_overfits_four_samples_whose_features_carry_the_label(scenes, tmp_path):
    source = scenes(4, strides=(4, 8, 16, 32))
    held = scenes(4, strides=(4, 8, 16, 32), role="evaluation")
    config = TrainConfig(iterations=100, batch_size=4, lr=3e-3, weight_decay=0.0, clip=0.01)
    text = "mask2former:width=32,attention_heads=4,queries=10,points=256,pixel_blocks=1,decoder_blocks=3"
    run = train(source, [choose_head(text, source.info, config)], config, out=tmp_path, validation=held)[0]
    assert run.metrics["miou"] > 0.97


def test_golden_losses_of_mask2former(scenes, tmp_path):
    source = scenes(8)
    config = TrainConfig(iterations=4, batch_size=4, lr=1e-3, checkpoint_every=0)
    text = "mask2former:width=16,attention_heads=4,queries=8,points=64,pixel_blocks=1,decoder_blocks=2"
    run = train(source, [choose_head(text, source.info, config)], config, out=tmp_path)[0]
    golden = [30.251437187194824, 29.488183975219727, 28.70788860321045, 28.74129295349121]
    np.testing.assert_allclose([x for _, x in run.losses], golden, rtol=1e-5)


def test_the_head_imports_neither_scipy_nor_transformers_before_it_trains():
    program = (
        "import sys; from fcache.heads import find_head; find_head('semantic/mask2former'); "
        "print([m for m in ('scipy', 'transformers', 'accelerate') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_apart_from_matching_a_step_never_waits_for_the_device(monkeypatch):
    # Each of these stops the host until the device is done with all that it was given before.
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            before = args[0].device if args and isinstance(args[0], torch.Tensor) else None
            moved = before is not None and isinstance(out, torch.Tensor) and out.device != before
            if moved or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(str(func))
            return out

    inputs = _inputs((8, 8, 8, 8), 5)
    options = {**HEAD.options, **SMALL, "pixel_blocks": 2, "decoder_blocks": 1}
    waits: list[str] = []
    with FakeTensorMode():
        # Tensors that say they are on a GPU; there is none to be had.
        with torch.device("cuda"):
            module = HEAD.build(inputs, options)
            features = {f"l{i}": torch.randn(2, 8, 64 >> (i + 2), 64 >> (i + 2)) for i in range(4)}
            labels = torch.zeros(2, 64, 64, dtype=torch.uint8)
            truth = Masks(torch.arange(3) // 2, torch.arange(3), (2, 1))
            pairs = [(torch.arange(3), torch.arange(3))] * 2
        monkeypatch.setattr("fcache.heads.parts.mask_loss.masks_of", lambda labels, num_classes: truth)
        monkeypatch.setattr("fcache.heads.parts.mask_loss.matching_costs", lambda *args: None)
        monkeypatch.setattr("fcache.heads.parts.mask_loss.assign", lambda *args: pairs)
        with Waits():
            terms = HEAD.loss(module, Batch(("a", "b"), (), features, {"semantic/map": labels}), options)
            torch.zeros(2).to("cuda")
    assert {t.device.type for t in terms.values()} == {"cuda"}
    # The last one is the test's own.
    assert len(waits) == 1


def test_autocast_leaves_places_and_the_loss_in_float32(scenes):
    source = scenes(4, size=64, strides=(4, 8, 16, 32))
    choice = choose_head("mask2former:width=32,points=256,queries=8", source.info, TrainConfig())
    torch.manual_seed(0)
    module = choice.head.build(choice.inputs(source.info), choice.options)
    batch = to_batch(next(iter(source.blocks(0))), torch.device("cpu"))
    found = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            classes, _, mask_features = module(batch.features)
            terms = choice.head.loss(module, batch, choice.options)
        found.append((classes[0].dtype, mask_features, terms))
    (_, exact, first), (dtype, features, second) = found
    assert dtype == torch.bfloat16
    assert torch.equal(exact, features)
    assert all(term.dtype == torch.float32 for term in second.values())
    torch.testing.assert_close(sum(second.values()), sum(first.values()), rtol=0.02, atol=0)
    sum(second.values()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_adaptors_in_half_precision_feed_a_pixel_decoder_in_float32(scenes):
    source = scenes(4, blocks=2)
    choice = choose_head("mask2former:width=32,points=256,queries=8", source.info, TrainConfig())
    module = choice.head.build(choice.inputs(source.info), choice.options)
    batch = to_batch(next(iter(source.blocks(0))), torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.adaptors(list(batch.features.values()))[0].dtype == torch.bfloat16
        assert module(batch.features)[2].dtype == torch.float32
        sum(choice.head.loss(module, batch, choice.options).values()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
