"""Weights files: read and written a tensor at a time, whole or not at all, and as the safetensors library has them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fcache.cache_spec import DataError, SpecError
from fcache.extractor.backbones import convert_weights
from fcache.extractor.backbones.architecture import find_architecture
from fcache.extractor.backbones.tensorfile import read_tensors, write_tensors
from fcache.extractor.backbones.weights import load_weights

StateOf = Callable[[str], dict[str, Tensor]]
TENSORS = {
    "z": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "index": torch.arange(6).view(2, 3),
    "flags": torch.tensor([True, False, True]),
    "turned": torch.randn(4, 3).T,
}


def test_what_is_written_is_read_by_the_library_and_what_the_library_writes_is_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "ours.safetensors", TENSORS)
    safetensors.torch.save_file({k: v.contiguous() for k, v in TENSORS.items()}, tmp_path / "theirs.safetensors")
    found = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    for other in (found, *(dict(read_tensors(tmp_path / f"{name}.safetensors")) for name in ("ours", "theirs"))):
        assert other.keys() == TENSORS.keys()
        for name, expected in TENSORS.items():
            assert torch.equal(other[name], expected)
            assert other[name].dtype == expected.dtype
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ours.safetensors", "theirs.safetensors"]


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    before = (tmp_path / "w.safetensors").read_bytes()
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(2), "b": torch.ones(2, device="meta")})
    with pytest.raises(DataError, match=r"'c' has the type torch\.complex64"):
        write_tensors(tmp_path / "w.safetensors", {"c": torch.ones(2, dtype=torch.complex64)})
    assert (tmp_path / "w.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", TENSORS)
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-1])
    with pytest.raises(safetensors.SafetensorError):
        dict(read_tensors(tmp_path / "w.safetensors"))


def test_with_a_model_a_checkpoint_becomes_that_model_s_weights(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_vit_64")
    extra = {"mask_token": torch.zeros(1, 1, 16), "decoder_pred.bias": torch.zeros(8), "norm.weight": torch.ones(32)}
    torch.save({"model": {k: v.half() for k, v in state.items()} | extra, "epoch": 3}, tmp_path / "mae.pth")
    found = convert_weights(tmp_path / "mae.pth", tmp_path / "vit.safetensors", model="tiny_vit_64")
    written = safetensors.torch.load_file(tmp_path / "vit.safetensors")
    assert written.keys() == state.keys()
    assert {x.dtype for x in written.values()} == {torch.float16}
    assert (found.tensors, found.bytes) == (len(state), 2 * sum(x.numel() for x in state.values()))
    assert found.left_out == ("epoch",)
    architecture = find_architecture("tiny_vit_64")
    loaded = [load_weights(architecture, str(tmp_path / name)).sha256 for name in ("mae.pth", "vit.safetensors")]
    assert [found.sha256] * 2 == loaded


def test_without_a_model_the_known_wrappers_go_and_names_stay(state_of: StateOf, tmp_path: Path) -> None:
    state = state_of("tiny_vit_64")
    torch.save({"module": {f"encoder.{k}": v for k, v in state.items()}, "steps": 4}, tmp_path / "deepspeed.pt")
    convert_weights(tmp_path / "deepspeed.pt", tmp_path / "w.safetensors")
    assert safetensors.torch.load_file(tmp_path / "w.safetensors").keys() == state.keys()
    torch.save({"steps": 4}, tmp_path / "none.pt")
    with pytest.raises(DataError, match=r"holds no named tensors; it has the keys \['steps'\]"):
        convert_weights(tmp_path / "none.pt", tmp_path / "none.safetensors")


def test_nothing_is_overwritten_unasked_and_nothing_is_written_that_does_not_fit(
    state_of: StateOf, tmp_path: Path
) -> None:
    torch.save(state_of("tiny_vit_64"), tmp_path / "vit.pth")
    target = tmp_path / "w.safetensors"
    with pytest.raises(DataError, match="does not hold weights of test_resnet"):
        convert_weights(tmp_path / "vit.pth", target, model="test_resnet")
    assert not target.exists()
    with pytest.raises(SpecError, match=r"the target is a \.safetensors file"):
        convert_weights(tmp_path / "vit.pth", tmp_path / "w.pth")
    convert_weights(tmp_path / "vit.pth", target)
    before = target.stat().st_mtime_ns
    with pytest.raises(SpecError, match="exists; give another name, or --force"):
        convert_weights(tmp_path / "vit.pth", target)
    with pytest.raises(SpecError, match="is the target too"):
        convert_weights(target, target, overwrite=True)
    assert target.stat().st_mtime_ns == before
    convert_weights(tmp_path / "vit.pth", target, overwrite=True)
    assert target.stat().st_mtime_ns > before
