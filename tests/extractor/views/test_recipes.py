"""View recipes are data: the papers' numbers, their JSON, and other input sizes."""

import json

import pytest

from fcache.cache_spec import SpecError, digest, to_json
from fcache.extractor.datasets import dataset_names, find_dataset
from fcache.extractor.views import (
    CentreCrop,
    Cut,
    Fit,
    KeepRatio,
    ScaleCrop,
    canvas,
    cut_from_json,
    default_recipe,
    find_view_recipe,
    view_recipe_names,
    with_input_size,
)


def test_the_ade20k_recipe_is_table_12_of_the_frozen_paper() -> None:
    recipe = find_view_recipe("ade20k")
    assert to_json(recipe.training) == {
        "place": {
            "kind": "scale-crop",
            "size": [512, 512],
            "long": 2048,
            "short": 512,
            "scale": [0.5, 2.0],
            "flip": 0.5,
            "interpolation": "bilinear",
        },
        "looks": [
            {
                "kind": "photometric-distortion",
                "brightness": 32,
                "contrast": [0.5, 1.5],
                "saturation": [0.5, 1.5],
                "hue": 18,
            }
        ],
        "revision": 1,
    }
    assert recipe.evaluation == Cut(KeepRatio(long=2048, short=512))


def test_the_classification_recipe_is_table_7_of_the_mim_paper() -> None:
    training = to_json(find_view_recipe("mim-classification").training)
    assert (training["place"]["scale"], training["place"]["ratio"]) == ([0.08, 1.0], [3 / 4, 4 / 3])
    looks = {look["kind"]: look for look in training["looks"]}
    assert (looks["rand-augment"]["magnitude"], looks["rand-augment"]["deviation"]) == (9.0, 0.5)
    assert looks["colour-jitter"]["strength"] == 0.4
    assert looks["erasing"]["probability"] == 0.25


def test_the_detection_recipes_are_those_of_the_papers() -> None:
    recipe = find_view_recipe("coco-lsj")
    jitter = Cut(ScaleCrop(size=(1024, 1024), long=1024, short=1024, scale=(0.1, 2.0), flip=0.5))
    assert recipe.training == jitter
    assert recipe.evaluation == Cut(KeepRatio(long=1333, short=800))
    assert canvas(recipe.evaluation, (480, 640)) == (800, 1088)
    assert canvas(recipe.evaluation, (640, 427)) == (1216, 800)
    # "Benchmarking Detection Transfer Learning with Vision Transformers" pads in tests too.
    assert find_view_recipe("vit-det").training == jitter
    assert canvas(find_view_recipe("vit-det").evaluation, (480, 640)) == (1024, 1024)
    small = find_view_recipe("coco-small")
    assert canvas(small.training, (480, 640)) == (256, 256)
    assert max(canvas(small.evaluation, (480, 640))) == 256
    assert with_input_size(small, (64, 64)).training.place == ScaleCrop(
        size=(64, 64), long=64, short=64, scale=(0.5, 2.0), flip=0.5
    )


@pytest.mark.parametrize("name", view_recipe_names())
def test_every_cut_survives_json_with_its_digest(name: str) -> None:
    recipe = find_view_recipe(name)
    for role in ("training", "evaluation"):
        data = json.loads(json.dumps(to_json(recipe.cut(role))))
        assert cut_from_json(data) == recipe.cut(role)
        assert digest(cut_from_json(data)) == digest(recipe.cut(role))


def test_every_dataset_has_a_recipe() -> None:
    for name in dataset_names():
        assert default_recipe(name).name == find_dataset(name).view_recipe


def test_unknown_recipes_and_parts_are_errors() -> None:
    with pytest.raises(SpecError, match="did you mean ade20k"):
        find_view_recipe("ade20")
    data = to_json(find_view_recipe("plain").training)
    with pytest.raises(SpecError, match="unknown placement 'fitt'; did you mean fit"):
        cut_from_json(data | {"place": data["place"] | {"kind": "fitt"}})
    with pytest.raises(SpecError, match="Fit has the fields"):
        cut_from_json(data | {"place": data["place"] | {"colour": 1}})
    with pytest.raises(SpecError, match="place, looks and revision"):
        cut_from_json({"place": data["place"]})


def test_canvases_are_the_crop_or_the_bucket() -> None:
    recipe = find_view_recipe("ade20k")
    assert canvas(recipe.training, (100, 900)) == (512, 512)
    assert canvas(recipe.evaluation, (360, 480)) == (512, 704)
    assert canvas(recipe.evaluation, (360, 480), multiple=14) == (518, 686)
    assert canvas(find_view_recipe("imagenet").evaluation, (360, 480)) == (224, 224)
    assert canvas(find_view_recipe("ade20k-small").evaluation, (360, 480)) == (256, 352)


def test_another_input_size_keeps_the_proportions() -> None:
    larger = with_input_size(find_view_recipe("ade20k"), (640, 640))
    # The MIM paper tests its 640 crops at 2560 x 640.
    assert larger.evaluation.place == KeepRatio(long=2560, short=640)
    assert larger.training.place == ScaleCrop(size=(640, 640), long=2560, short=640, scale=(0.5, 2.0), flip=0.5)
    wide = with_input_size(find_view_recipe("ade20k"), (352, 480))
    assert wide.training.place.size == (352, 480)
    assert wide.training.place.short == 352
    assert with_input_size(find_view_recipe("imagenet"), (448, 448)).evaluation.place == CentreCrop(
        size=(448, 448), short=512
    )
    assert with_input_size(find_view_recipe("plain"), (96, 128)).training.place == Fit(size=(96, 128))


@pytest.mark.parametrize("size", [(0, 64), (64, -1), (64.0, 64)])
def test_sizes_that_make_no_sense_are_errors(size) -> None:
    for name in view_recipe_names():
        with pytest.raises(SpecError, match="positive whole numbers"):
            with_input_size(find_view_recipe(name), size)


def test_numbers_without_sense_are_errors() -> None:
    with pytest.raises(SpecError, match="flip"):
        Cut(ScaleCrop(size=(8, 8), long=8, short=8, scale=(0.5, 2.0), flip=1.5))
    with pytest.raises(SpecError, match="scale"):
        Cut(ScaleCrop(size=(8, 8), long=8, short=8, scale=(2.0, 0.5), flip=0.5))
    with pytest.raises(SpecError, match="interpolation"):
        Cut(Fit(size=(8, 8), interpolation="lanczos"))
