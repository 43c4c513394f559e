"""Really pretrained weights: strict loading and timm's own features."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

from fcache.extractor.backbones import load_backbone

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
MOBILENET = "mobilenetv2_100.tv_int8_dequant.safetensors"


def _photos(folder: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, list[str]]:
    """Centre crops of 224 after a resize of the short side to 256, and the WordNet ids that name their folders."""
    images, ids = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpeg", ".jpg", ".png")):
        with Image.open(path) as image:
            scale = 256 / min(image.size)
            width, height = (round(n * scale) for n in image.size)
            left, top = (width - 224) // 2, (height - 224) // 2
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            crop = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float32) / 255
        images.append(torch.from_numpy((crop - np.float32(mean)) / np.float32(std)).permute(2, 0, 1))
        ids.append(path.parent.name)
    return torch.stack(images), ids


@pytest.mark.parametrize(
    ("model", "file", "indices"),
    [("vit_tiny_patch16_224", VIT, [2, 5, 8, 11]), ("mobilenetv2_100", MOBILENET, [1, 2, 3, 4])],
)
def test_pretrained_features_are_timms_bit_for_bit(model: str, file: str, indices: list[int], test_data: Path) -> None:
    path = test_data / "weights" / file
    backbone = load_backbone(model, weights=str(path), input_size=(224, 224), precision="fp32")
    images = _photos(test_data / "imagenet_wnid", backbone.spec.mean, backbone.spec.std)[0][:2]
    full = timm.create_model(model, pretrained=False).eval()
    full.load_state_dict(safetensors.torch.load_file(path), strict=True)
    with torch.inference_mode():
        expected = full.forward_intermediates(images, indices=indices, norm=False, intermediates_only=True)
    found = backbone.forward(images)
    assert all(torch.equal(x, y) for x, y in zip(found.values(), expected, strict=True))
    assert backbone.random_weights is None
    random = load_backbone(model, weights="random:0", input_size=(224, 224), precision="fp32")
    assert random.spec.weights_sha256 != backbone.spec.weights_sha256
    near = load_backbone(model, weights=str(path), input_size=(224, 224)).forward(images)
    for name, x in found.items():
        assert (near[name] - x).norm() / x.norm() < 0.06
        other = random.forward(images)[name]
        cosine = torch.nn.functional.cosine_similarity(other.flatten(), x.flatten(), dim=0)
        assert abs(float(cosine)) < 0.5


def test_a_plain_vit_resamples_its_positions_as_timm_does(test_data: Path) -> None:
    path = test_data / "weights" / VIT
    backbone = load_backbone("vit_tiny_patch16_224", weights=str(path), input_size=(96, 160), precision="fp32")
    images = torch.randn(1, 3, 96, 160)
    plain = timm.create_model("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True).eval()
    plain.load_state_dict(safetensors.torch.load_file(path), strict=True)
    with torch.inference_mode():
        expected = plain.forward_intermediates(images, indices=[11], norm=False, intermediates_only=True)[0]
    assert torch.equal(backbone.forward(images)["block-11"], expected)
    assert backbone.levels_at((96, 160))[3].shape == (192, 6, 10)


def test_timms_classifier_on_stored_levels_names_all_17_photos(test_data: Path) -> None:
    path = test_data / "weights" / MOBILENET
    backbone = load_backbone("mobilenetv2_100", weights=str(path), input_size=(224, 224), levels=("32",))
    images, ids = _photos(test_data / "imagenet_wnid", backbone.spec.mean, backbone.spec.std)
    full = timm.create_model("mobilenetv2_100", pretrained=False).eval()
    full.load_state_dict(safetensors.torch.load_file(path), strict=True)
    features = torch.cat([backbone.forward(batch)["level-32"] for batch in images.split(4)])
    with torch.inference_mode():
        best = full.forward_head(full.bn2(full.conv_head(features))).argmax(dim=1)
    names = ImageNetInfo()
    assert len(ids) == 17
    assert [names.index_to_label_name(int(i)) for i in best] == ids
