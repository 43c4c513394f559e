"""Views are a pure function of (seed, sample, view); what was drawn is recorded and can be replayed."""

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fcache.cache_spec import SpecError, from_json, to_json
from fcache.extractor.datasets import RawSample
from fcache.extractor.views import (
    ColourJitter,
    Cut,
    Drawn,
    Erasing,
    Fit,
    PhotometricDistortion,
    RandAugment,
    ViewedSample,
    apply_view,
    canvas,
    cut_view,
    draw_view,
    find_view_recipe,
    truth_bytes_limit,
    view_recipe_names,
)
from fcache.extractor.views.draws import Step, uniforms
from fcache.extractor.views.looks import draw_steps
from fcache.extractor.views.steps import STEPS, apply_steps

PHOTO = np.random.default_rng(0).integers(0, 256, (90, 130, 3)).astype(np.uint8)
LABELS = (np.arange(90 * 130).reshape(90, 130) // 700).astype(np.uint8)


def take(name: str, *, seed: int = 0, sample: str = "a", view: int = 0, role: str = "training") -> ViewedSample:
    cut = find_view_recipe(name).cut(role)
    raw = RawSample(PHOTO, {"semantic": LABELS, "class": 3})
    return cut_view(cut, seed=seed, sample_id=sample, view=view, raw=raw, canvas=canvas(cut, (90, 130)), role=role)


def fingerprint() -> str:
    """A digest of the pixels, matrices and labels of some views of every recipe."""
    h = hashlib.sha256()
    for name in view_recipe_names():
        for view in range(3):
            viewed = take(name, view=view, sample="ünïcode/ä")
            h.update(viewed.image.numpy().tobytes() + repr(viewed.view).encode())
            h.update(viewed.targets["semantic/map"].tobytes())
    return h.hexdigest()


def test_views_are_equal_in_another_process() -> None:
    code = (
        f"import sys, importlib.util as u; s = u.spec_from_file_location('m', {__file__!r}); m = u.module_from_spec(s)"
    )
    code += "; s.loader.exec_module(m); import torch; torch.set_num_threads(1); sys.stdout.write(m.fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == fingerprint()


@pytest.mark.parametrize("name", ["ade20k-small", "imagenet", "mim-classification"])
def test_other_views_samples_and_seeds_give_other_pixels(name: str) -> None:
    views = [take(name), take(name, view=1), take(name, sample="b"), take(name, seed=1)]
    matrices = {v.view.to_view for v in views}
    assert len(matrices) == 4
    assert torch.equal(take(name).image, views[0].image)


def test_plain_and_evaluation_views_leave_nothing_to_chance() -> None:
    assert torch.equal(take("plain", view=0).image, take("plain", view=5, seed=9).image)
    for name in view_recipe_names():
        a, b = take(name, role="evaluation"), take(name, role="evaluation", view=1, seed=2)
        assert torch.equal(a.image, b.image)
        assert a.drawn.steps == ()


def test_what_was_drawn_is_plain_data_that_replays_the_view() -> None:
    for name in view_recipe_names():
        viewed = take(name, view=2)
        again = from_json(Drawn, to_json(viewed.drawn))
        assert again == viewed.drawn
        raw = RawSample(PHOTO, {"semantic": LABELS, "class": 3})
        replayed = apply_view(again, raw=raw, canvas=viewed.view.canvas, role="training")
        assert torch.equal(replayed.image, viewed.image)
        assert replayed.view == viewed.view


def test_the_random_numbers_are_fixed_for_ever() -> None:
    # Philox4x64 keyed by 128 bits of SHA-256: caches rest on these.
    numbers = uniforms(seed=0, sample_id="a", view=0, topic="place", count=3)
    assert numbers.tolist() == GOLDEN_UNIFORMS
    drawn = draw_view(find_view_recipe("ade20k").training, seed=0, sample_id="a", view=0, image_size=(360, 480))
    assert to_json(drawn) == GOLDEN_DRAWN


def test_uniforms_are_uniform_and_topics_independent() -> None:
    a, b = (uniforms(seed=1, sample_id="a", view=0, topic=t, count=20000) for t in ("x", "y"))
    assert abs(a.mean() - 0.5) < 0.01
    assert abs(a.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def draws(look, count: int = 3000) -> list[tuple[Step, ...]]:
    return [draw_steps(look, (64, 64), uniforms(seed=0, sample_id="a", view=v, topic=look.kind)) for v in range(count)]


def test_photometric_distortion_draws_as_defined() -> None:
    drawn = draws(PhotometricDistortion())
    bounds = {"add": (-32, 32), "multiply": (0.5, 1.5), "saturate": (0.5, 1.5), "turn-hue": (-18 / 180, 17 / 180)}
    for name, (low, high) in bounds.items():
        values = [s.values[0] for steps in drawn for s in steps if s.name == name]
        assert abs(len(values) / len(drawn) - 0.5) < 0.04
        assert min(values) >= low
        assert max(values) <= high
        assert max(values) - min(values) > 0.97 * (high - low)
        assert abs(np.mean(values) - (low + high) / 2) < 0.03 * (high - low)
    orders = [[s.name for s in steps] for steps in drawn]
    both = [o for o in orders if "multiply" in o and "turn-hue" in o]
    first = np.mean([o.index("multiply") < o.index("turn-hue") for o in both])
    assert abs(first - 0.5) < 0.06
    assert all(o.index("add") == 0 for o in orders if "add" in o)


def test_colour_jitter_draws_three_factors_in_every_order() -> None:
    drawn = draws(ColourJitter(0.4))
    assert {tuple(s.name for s in steps) for steps in drawn} == {
        (a, b, c)
        for a in ("brightness", "contrast", "colour")
        for b in ("brightness", "contrast", "colour")
        for c in ("brightness", "contrast", "colour")
        if len({a, b, c}) == 3
    }
    factors = [s.values[0] for steps in drawn for s in steps]
    assert 0.6 <= min(factors) < 0.61
    assert 1.39 < max(factors) <= 1.4


def test_rand_augment_reaches_every_operation_at_its_magnitude() -> None:
    drawn = draws(RandAugment())
    counts = [len(steps) for steps in drawn]
    assert abs(np.mean(counts) - 1.0) < 0.06
    assert max(counts) == 2
    names = {s.name for steps in drawn for s in steps}
    assert names == set(STEPS) - {"add", "multiply", "saturate", "turn-hue", "erase"}
    shears = [
        abs(s.values[1]) / 0.3
        for steps in drawn
        for s in steps
        if s.name == "warp" and s.values[0] == 1.0 and s.values[1]
    ]
    assert abs(np.mean(shears) - 0.9) < 0.02
    assert 0.02 < np.std(shears) < 0.06


def test_every_step_takes_and_gives_pixels() -> None:
    # Not the full range, so that contrast can be stretched.
    image = torch.from_numpy(PHOTO // 2 + 40).permute(2, 0, 1).contiguous()
    before = image.clone()
    steps = {
        s.name: s
        for look in (PhotometricDistortion(), ColourJitter(0.4), RandAugment())
        for d in draws(look, 300)
        for s in d
    }
    steps |= {s.name: s for d in draws(Erasing(1.0), 3) for s in d}
    assert set(steps) == set(STEPS)
    for step in steps.values():
        changed = apply_steps(image, (step,))
        assert (changed.dtype, changed.shape) == (torch.uint8, image.shape)
        assert torch.equal(image, before), f"{step.name} writes into its input"
        assert not torch.equal(changed, image), step.name


def test_saturation_and_hue_change_what_they_name() -> None:
    import colorsys

    image = torch.from_numpy(PHOTO).permute(2, 0, 1).contiguous()
    saturated = apply_steps(image, (Step("saturate", (1.4,)),)).permute(1, 2, 0).numpy()
    turned = apply_steps(image, (Step("turn-hue", (0.1,)),)).permute(1, 2, 0).numpy()
    for y, x in [(0, 0), (5, 7), (40, 90), (89, 129), (33, 3)]:
        h, s, v = colorsys.rgb_to_hsv(*(PHOTO[y, x] / 255.0))
        expected = np.array(colorsys.hsv_to_rgb(h, min(1.0, 1.4 * s), v)) * 255
        assert np.abs(saturated[y, x] - expected).max() <= 0.51
        expected = np.array(colorsys.hsv_to_rgb((h + 0.1) % 1, s, v)) * 255
        assert np.abs(turned[y, x] - expected).max() <= 1.01


def test_brightness_and_contrast_saturate_and_round() -> None:
    image = torch.tensor([0, 10, 100, 250], dtype=torch.uint8).view(1, 1, 4).repeat(3, 1, 1)
    assert apply_steps(image, (Step("add", (-10.4,)),))[0, 0].tolist() == [0, 0, 90, 240]
    assert apply_steps(image, (Step("multiply", (1.25,)),))[0, 0].tolist() == [0, 12, 125, 255]
    assert apply_steps(image, (Step("posterize", (1,)),))[0, 0].tolist() == [0, 0, 0, 128]
    assert apply_steps(image, (Step("posterize", (0,)),))[0, 0].tolist() == [0, 0, 0, 0]
    assert apply_steps(image, (Step("solarize-add", (99,)),))[0, 0].tolist() == [99, 109, 199, 250]


def test_erasing_turns_one_box_into_noise() -> None:
    drawn = draws(Erasing(0.25))
    assert abs(np.mean([len(d) for d in drawn]) - 0.25) < 0.03
    for step in [d[0] for d in drawn if d][:200]:
        height, width = step.values[2:4]
        assert 0.015 < height * width / 64**2 < 0.36
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    erased = apply_steps(image, (Step("erase", (20, 30, 100, 120, 5.0)),))
    box = erased[:, 20:120, 30:150].float()
    colours = ((123.7, 58.4), (116.3, 57.1), (103.5, 57.4))
    normal = [np.random.default_rng(0).normal(mean, std, 100000) for mean, std in colours]
    assert erased.sum() == box.sum()
    assert np.allclose(box.mean((1, 2)), [np.clip(n, 0, 255).mean() for n in normal], atol=1)
    assert np.allclose(box.std((1, 2)), [np.std(np.clip(n, 0, 255)) for n in normal], atol=1)


def test_targets_have_the_types_of_the_contract() -> None:
    viewed = take("ade20k-small", role="evaluation")
    assert viewed.targets["semantic/map"].dtype == np.uint8
    assert viewed.targets["class/label"].dtype == np.int32
    assert viewed.targets["class/label"].shape == ()
    truth = viewed.targets["semantic/truth"]
    with Image.open(io.BytesIO(truth.tobytes())) as opened:
        np.testing.assert_array_equal(np.array(opened), LABELS)
    assert "semantic/truth" not in take("ade20k-small").targets


@pytest.mark.parametrize("size", [(1, 1), (3, 4000), (300, 300)])
def test_the_limit_of_the_stored_truth_holds_for_noise(size: tuple[int, int]) -> None:
    raw = RawSample(
        np.zeros((*size, 3), np.uint8), {"semantic": np.random.default_rng(0).integers(0, 255, size).astype(np.uint8)}
    )
    cut = Cut(Fit(size=(8, 8)))
    viewed = cut_view(cut, seed=0, sample_id="a", view=0, raw=raw, canvas=(8, 8), role="evaluation")
    assert len(viewed.targets["semantic/truth"]) <= truth_bytes_limit(size)


def test_an_unknown_kind_of_target_is_an_error() -> None:
    with pytest.raises(SpecError, match="semantics"):
        cut_view(
            Cut(Fit(size=(8, 8))),
            seed=0,
            sample_id="a",
            view=0,
            raw=RawSample(PHOTO, {"semantics": LABELS}),
            canvas=(8, 8),
            role="training",
        )


GOLDEN_UNIFORMS = [0.3047850345402707, 0.7601802001913394, 0.3884849171712399]
GOLDEN_DRAWN = {
    "frame": {
        "source": [0, 0, 360, 480],
        "resized": [490, 653],
        "window": [0, 55, 490, 512],
        "flipped": True,
        "interpolation": "bilinear",
    },
    "steps": [{"name": "add", "values": [2.17506588545843]}],
}
