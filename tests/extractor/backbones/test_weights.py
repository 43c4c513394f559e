"""Weights: every published key format, strictness, digests, random draws and the hub."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from fcache.cache_spec import DataError, SpecError
from fcache.extractor.backbones import load_backbone
from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.weights import load_weights, weights_digest

State = dict[str, Any]
StateOf = Callable[[str], dict[str, Tensor]]


def _renamed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def _microsoft(state: State) -> State:
    """The layout of the original releases: a stage ends with its downsampling, buffers and a classifier are stored."""
    out: State = {}
    for key, value in state.items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        out[".".join(parts)] = value
    out |= {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "norm.weight": torch.ones(128),
        "norm.bias": torch.zeros(128),
        "head.weight": torch.zeros(10, 128),
        "head.bias": torch.zeros(10),
    }
    return out


def _swinv2(state: State) -> State:
    return {"model": _microsoft(state) | {"layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2)}}


def _simmim(state: State) -> State:
    decoder = {"encoder.mask_token": torch.zeros(1, 1, 16), "decoder.0.weight": torch.zeros(3072, 128, 1, 1)}
    return {"model": _renamed(_microsoft(state), "encoder.") | decoder, "epoch": 3, "lr_scheduler": {}}


def _esvit(state: State) -> State:
    teacher = _renamed(_microsoft(state), "backbone.") | {
        "head.mlp.0.weight": torch.zeros(8, 128),
        "head_dense.last_layer.weight_g": torch.zeros(8, 1),
    }
    student = {key: torch.full_like(value, 7) for key, value in teacher.items()}
    return {"student": _renamed(student, "module."), "teacher": _renamed(teacher, "module."), "epoch": 1}


def _esvit_student(state: State) -> State:
    """A student alone, whose heads are parts of the network itself."""
    heads = {"head.mlp.0.weight": torch.zeros(8, 128), "head_dense.last_layer.weight_g": torch.zeros(8, 1)}
    return {"student": _renamed(_microsoft(state) | heads, "module."), "epoch": 1}


def _moco(state: State) -> State:
    head = {"head.0.weight": torch.zeros(8, 32), "head.1.running_mean": torch.zeros(8)}
    both = state | head | {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    flat = (
        _renamed(both, "module.base_encoder.")
        | _renamed({k: torch.full_like(v, 7) for k, v in both.items()}, "module.momentum_encoder.")
        | {"module.predictor.0.weight": torch.zeros(8, 8)}
    )
    return {"epoch": 300, "arch": "vit_base", "state_dict": flat, "optimizer": {"state": {}}}


def _mae(state: State) -> State:
    decoder = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_embed.weight": torch.zeros(16, 32),
        "decoder_blocks.0.norm1.weight": torch.zeros(16),
        "decoder_pred.bias": torch.zeros(768),
    }
    return {"model": state | decoder | {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}}


def _deit(state: State) -> State:
    return {"model": state | {"head.weight": torch.zeros(1000, 32), "head.bias": torch.zeros(1000)}}


def _command_line(state: State) -> State:
    return {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 2}


def _deepspeed(state: State) -> State:
    return {"module": state, "global_steps": 4, "optimizer": None}


def _distributed(state: State) -> State:
    return {"state_dict": _renamed(state, "module.")}


def _half(state: State) -> State:
    return {k: v.to(torch.bfloat16) for k, v in state.items()}


@pytest.mark.parametrize(
    ("model", "convert"),
    [
        ("tiny_swinv2_window4_64", _swinv2),
        ("tiny_swin_window4_64", lambda state: {"model": _microsoft(state)}),
        ("tiny_swinv2_window4_64", _simmim),
        ("tiny_swin_window4_64", _simmim),
        ("tiny_swin_window4_64", _esvit),
        ("tiny_swin_window4_64", _esvit_student),
        ("tiny_vit_64", _moco),
        ("tiny_vit_64", _mae),
        ("tiny_vit_64", _deit),
        ("tiny_vit_64", _command_line),
        ("tiny_vit_64", _deepspeed),
        ("tiny_vit_64", _distributed),
        ("tiny_vit_64", dict),
    ],
    ids=[
        "microsoft swinv2",
        "microsoft swin",
        "simmim swinv2",
        "simmim swin",
        "esvit",
        "esvit, a student alone",
        "moco v3",
        "mae",
        "deit",
        "with a command line",
        "deepspeed",
        "distributed",
        "plain timm",
    ],
)
def test_every_published_format_loads_all_tensors(
    model: str, convert: Callable[[State], State], state_of: StateOf, tmp_path: Path
) -> None:
    state = state_of(model)
    torch.save(convert(state), tmp_path / "weights.pth")
    loaded = load_weights(find_architecture(model), str(tmp_path / "weights.pth"))
    assert loaded.random is None
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[k], state[k]) for k in state)
    assert loaded.sha256 == weights_digest(state)


def test_self_supervised_beit_shares_one_table_among_its_blocks(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_beit_64")
    tables = [k for k in state if k.endswith("relative_position_bias_table")]
    assert len(tables) == 4
    shared = state[tables[0]]
    expected = state | dict.fromkeys(tables, shared)
    file = {k: v for k, v in state.items() if k not in tables} | {
        "rel_pos_bias.relative_position_bias_table": shared,
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
        "mask_token": torch.zeros(1, 1, 32),
        "lm_head.weight": torch.zeros(8192, 32),
        "lm_head.bias": torch.zeros(8192),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    torch.save({"model": file}, tmp_path / "beit.pth")
    # SimMIM's plain ViT is this one, behind a prefix and beside a decoder.
    simmim = _renamed({k: v for k, v in file.items() if not k.startswith("lm_head")}, "encoder.")
    torch.save({"model": simmim | {"decoder.0.weight": torch.zeros(8, 32, 1, 1)}}, tmp_path / "simmim.pth")
    for name in ("beit.pth", "simmim.pth"):
        loaded = load_weights(find_architecture("tiny_beit_64"), str(tmp_path / name))
        assert loaded.state.keys() == expected.keys()
        assert all(torch.equal(loaded.state[k], expected[k]) for k in expected)


def test_simmim_swin_tables_of_another_window_are_resampled(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_swin_window4_64")
    torch.save(_simmim(state), tmp_path / "simmim.pth")
    loaded = load_weights(find_architecture("tiny_swin_window4_64", 6), str(tmp_path / "simmim.pth"))
    key = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert state[key].shape == (7 * 7, 1)
    assert loaded.state[key].shape == (11 * 11, 1)
    # Resampling keeps the value at offset 0, the middle of the table.
    assert torch.allclose(loaded.state[key][60], state[key][24], atol=1e-5)


def test_the_digest_depends_on_the_tensors_and_not_on_the_file(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_vit_64")
    torch.save({"model": state}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    files = [tmp_path / name for name in ("a.pth", "b.pt", "c.safetensors")]
    architecture = find_architecture("tiny_vit_64")
    digests = {load_weights(architecture, str(f)).sha256 for f in files} | {
        load_weights(architecture, "random:0").sha256
    }
    assert len(digests) == 1
    changed = {k: v.clone() for k, v in state.items()}
    changed["blocks.3.mlp.fc2.bias"][0] += 1e-6
    assert weights_digest(changed) not in digests
    swapped = state | {
        "blocks.0.norm1.weight": state["blocks.0.norm2.weight"],
        "blocks.0.norm2.weight": state["blocks.0.norm1.weight"],
    }
    assert weights_digest(swapped) not in digests


def test_half_precision_files_load_as_float32(state_of: StateOf, tmp_path: Path) -> None:
    state = _half(state_of("tiny_vit_64"))
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    loaded = load_weights(find_architecture("tiny_vit_64"), str(tmp_path / "half.safetensors"))
    assert all(loaded.state[k].dtype == torch.float32 for k in state)
    assert all(torch.equal(loaded.state[k], v.float()) for k, v in state.items())


def test_loaded_weights_do_not_hang_on_their_file(state_of: StateOf, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state_of("tiny_vit_64"), path)
    loaded = load_weights(find_architecture("tiny_vit_64"), str(path))
    path.write_bytes(bytes(path.stat().st_size))
    assert weights_digest(loaded.state) == loaded.sha256


def test_batch_norm_counters_are_no_weights(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", pretrained=False)
    state = model.state_dict()
    counter = next(k for k in state if k.endswith("num_batches_tracked"))
    state[counter] += 5
    torch.save(state, tmp_path / "with.pth")
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "without.pth")
    architecture = find_architecture("test_resnet")
    digests = {load_weights(architecture, str(tmp_path / n)).sha256 for n in ("with.pth", "without.pth")}
    assert len(digests) == 1


def test_weights_of_another_architecture_are_one_clear_error(state_of: StateOf, tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"model": state_of("tiny_vit_64")}, path)
    with pytest.raises(DataError) as caught:
        load_backbone("test_resnet", weights=str(path), input_size=(64, 64))
    message = str(caught.value)
    for part in (
        str(path),
        "weights of test_resnet",
        "keys missing",
        "keys unexpected",
        "blocks.0",
        "the first are blocks.0.attn.proj.bias (32,)",
    ):
        assert part in message
    for model in ("tiny_swin_window4_64", "tiny_swinv2_window4_64", "tiny_beit_64", "test_convnext"):
        with pytest.raises(DataError, match=f"does not hold weights of {model}"):
            load_weights(find_architecture(model), str(path))


def test_one_missing_extra_or_misshaped_tensor_is_an_error(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_vit_64")
    key = "blocks.1.attn.qkv.weight"
    faults = {
        "1 keys missing": {k: v for k, v in state.items() if k != key},
        "1 keys unexpected": state | {"blocks.9.attn.qkv.weight": state[key]},
        "1 keys of another shape": state | {key: torch.zeros(96, 31)},
    }
    for words, fault in faults.items():
        torch.save(fault, tmp_path / "fault.pth")
        with pytest.raises(DataError, match=words):
            load_weights(find_architecture("tiny_vit_64"), str(tmp_path / "fault.pth"))


def test_weights_of_another_patch_size_are_not_resampled_in_silence(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_vit_64") | {"patch_embed.proj.weight": torch.randn(32, 3, 8, 8)}
    torch.save(state, tmp_path / "patch8.pth")
    with pytest.raises(DataError, match="1 keys of another shape"):
        load_weights(find_architecture("tiny_vit_64"), str(tmp_path / "patch8.pth"))


def test_files_that_are_no_weights_say_what_is_wrong(tmp_path: Path) -> None:
    architecture = find_architecture("tiny_vit_64")
    with pytest.raises(DataError, match="no weights file"):
        load_weights(architecture, str(tmp_path / "absent.pth"))
    with pytest.raises(SpecError, match=r"weights are a file \(\.safetensors.*'random:SEED'; got 'imagenet'"):
        load_weights(architecture, "imagenet")
    with pytest.raises(SpecError, match="as random:0, got 'random:x'"):
        load_weights(architecture, "random:x")
    for name in ("cut.safetensors", "cut.pth"):
        (tmp_path / name).write_bytes(b"\x80\x02not weights")
        with pytest.raises(DataError, match=r"cannot be read|is not loaded"):
            load_weights(architecture, str(tmp_path / name))
    torch.save({"epoch": 3, "history": [1.0]}, tmp_path / "empty.pth")
    with pytest.raises(DataError, match="holds no named tensors; it has the keys"):
        load_weights(architecture, str(tmp_path / "empty.pth"))
    torch.save({"model": {}, "hook": Path}, tmp_path / "code.pth")
    with pytest.raises(DataError, match="could run foreign code"):
        load_weights(architecture, str(tmp_path / "code.pth"))


def test_a_seed_draws_the_same_weights_and_leaves_the_generator_alone() -> None:
    architecture = find_architecture("tiny_swinv2_window4_64")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_weights(architecture, "random:1")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert load_weights(architecture, "random:1").sha256 == first.sha256
    assert load_weights(architecture, "random:2").sha256 != first.sha256
    assert first.random == "random:1"


@pytest.mark.parametrize("model", ["tiny_swinv2_window4_64", "tiny_swinv2_cr_64", "test_convnext", "test_vit"])
def test_no_block_of_a_random_backbone_is_the_identity(model: str) -> None:
    backbone = load_backbone(model, weights="random:0", input_size=(64, 64), precision="fp32")
    assert backbone.random_weights == "random:0"
    architecture = find_architecture(model)
    state = load_weights(architecture, "random:0").state
    gains = [v for k, v in state.items() if ("norm" in k and k.endswith("weight")) or k.endswith(("gamma", ".g"))]
    assert gains
    assert all(float(g.min()) >= 0.5 and float(g.max()) <= 1.5 and len(g.unique()) > 1 for g in gains)
    assert all(bool(torch.isfinite(x).all()) for x in backbone.forward(torch.randn(1, 3, 64, 64)).values())


def test_swinv2_draws_biases_and_position_networks_too() -> None:
    state = load_weights(find_architecture("tiny_swinv2_window4_64"), "random:0").state
    biases = torch.cat([v for k, v in state.items() if k.endswith("_bias")])
    networks = torch.cat([v.flatten() for k, v in state.items() if "cpb_mlp" in k])
    assert float(biases.std()) == pytest.approx(0.05, rel=0.1)
    assert float(networks.std()) == pytest.approx(0.3, rel=0.1)


def test_public_weights_come_without_their_classifier(public_model: str, tmp_path: Path) -> None:
    loaded = load_weights(find_architecture(public_model), "pretrained")
    from_file = load_weights(find_architecture(public_model), str(tmp_path / "public.pth"))
    assert loaded.sha256 == from_file.sha256
    assert loaded.random is None
    assert not [k for k in loaded.state if k.startswith(("head", "norm"))]


def test_without_the_hub_a_file_is_asked_for() -> None:
    with pytest.raises(DataError, match=r"resnet18\.a1_in1k could not be fetched from the hub .* give the file"):
        load_weights(find_architecture("resnet18.a1_in1k"), "pretrained")
    with pytest.raises(SpecError, match="no public weights of swinv2_cr_base_224; give a file"):
        load_weights(find_architecture("swinv2_cr_base_224"), "pretrained")
