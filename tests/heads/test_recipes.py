from pathlib import Path

import pytest

from fcache.cache_spec import SpecError
from fcache.heads import Recipe, choose_head, configure, find_head, head_names, load_recipe, recipe_names
from fcache.heads.config import HEAD_FIELDS, TrainConfig


def test_the_shipped_recipes_are_these():
    assert recipe_names() == (
        "ade20k-mask2former-frozen",
        "ade20k-mask2former-mim",
        "ade20k-small",
        "ade20k-swinv2-g",
        "ade20k-upernet-frozen",
        "ade20k-upernet-mim",
        "camvid-small",
        "coco-maskrcnn-frozen",
        "coco-maskrcnn-frozen-10pct",
        "coco-maskrcnn-frozen-1pct",
        "coco-small",
        "coco-swinv2-g",
        "coco-vit-det",
        "demo-small",
        "imagefolder-small",
        "imagenet-linear",
        "k400-frozen",
        "k400-small",
        "k400-swinv2-g",
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_fits_the_heads_it_names(name: str, scenes, images, objects, clips):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.extract["views"] >= 1
    assert recipe.extract["view_recipe"]
    for head in recipe.train.heads:
        tasks = {name.partition("/")[0] for name in head_names() if head in (name, name.partition("/")[2])}
        sources = {"semantic": scenes, "detection": objects, "classification": images, "video": clips}
        info = next(source for task, source in sources.items() if task in tasks)().info
        choice = choose_head(head, info, recipe.train)
        given = {k: v for k, v in recipe.train.heads[head].items() if k not in HEAD_FIELDS}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in choice.options.items() if k in given} == given


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.endswith("-small")])
def test_small_recipes_are_for_a_cpu(name: str):
    recipe = load_recipe(name)
    # Clips of eight small maps are cheap.
    assert recipe.train.batch_size == (16 if name == "k400-small" else 4)
    assert recipe.train.heads.get("upernet", {}).get("width", 64) <= 64


def test_the_frozen_recipes_of_ade20k_are_table_12_of_the_paper():
    train = load_recipe("ade20k-upernet-frozen").train
    assert (train.lr, train.weight_decay, train.warmup, train.schedule) == (2e-3, 0.05, 1500, "linear")
    assert (train.iterations, train.batch_size, train.betas) == (160_000, 16, (0.9, 0.999))
    assert train.heads["upernet"]["width"] == 512
    train = load_recipe("ade20k-mask2former-frozen").train
    assert (train.lr, train.weight_decay, train.warmup) == (3e-4, 0.02, 0)
    assert (train.schedule, train.power) == ("poly", 0.9)
    assert (train.iterations, train.batch_size, train.betas) == (160_000, 16, (0.9, 0.999))


@pytest.mark.parametrize(
    ("name", "lr", "decay", "images", "epochs", "steps"),
    [
        ("coco-maskrcnn-frozen", 3e-4, 0.05, 117_266, 72, (63, 69)),
        ("coco-maskrcnn-frozen-10pct", 3e-4, 0.1, 11_727, 12, (8, 11)),
        ("coco-maskrcnn-frozen-1pct", 1e-3, 0.5, 1_173, 12, (8, 11)),
        ("coco-swinv2-g", 6e-4, 0.05, 117_266, 72, (63, 69)),
    ],
)
def test_the_frozen_recipes_of_coco_are_table_11_of_the_paper(name, lr, decay, images, epochs, steps):
    train = load_recipe(name).train
    epoch = round(images / train.batch_size)
    assert train.batch_size == (32 if name == "coco-swinv2-g" else 16)
    assert (train.lr, train.weight_decay, train.warmup, train.gamma) == (lr, decay, 500, 0.1)
    assert train.iterations == pytest.approx(epochs * epoch, rel=2e-3)
    assert [m / train.iterations for m in train.milestones] == pytest.approx([s / epochs for s in steps])
    assert train.schedule == "multi-step"


def test_the_recipe_of_vit_detection_is_the_paper_s_formula():
    train = load_recipe("coco-vit-det").train
    assert (train.lr, train.weight_decay, train.batch_size, train.schedule) == (1.6e-4, 0.1, 64, "cosine")
    assert train.iterations == 50 * 1832
    assert train.warmup == 1832 // 4


@pytest.mark.parametrize(
    ("name", "lr", "batch", "drop_path"), [("k400-frozen", 3e-4, 64, 0.2), ("k400-swinv2-g", 2e-4, 128, 0.1)]
)
def test_the_recipes_of_kinetics_are_table_13_of_the_paper(clips, name: str, lr: float, batch: int, drop_path: float):
    recipe = load_recipe(name)
    train, epoch = recipe.train, 240_000 / batch
    assert (train.lr, train.batch_size, train.weight_decay, train.schedule) == (lr, batch, 0.05, "cosine")
    assert (train.iterations, train.betas) == (30 * epoch, (0.9, 0.999))
    assert train.warmup == pytest.approx(2.5 * epoch, abs=0.5)
    assert recipe.extract["view_recipe"] == "kinetics400"
    assert recipe.extract.get("window") == (16 if name == "k400-swinv2-g" else None)
    for head in ("temporal", "global"):
        options = choose_head(head, clips().info, train).options
        assert (options["blocks"], options["mlp_ratio"], options["drop_path"]) == (4, 4, drop_path)


def test_the_recipe_of_swinv2_g_is_what_the_paper_states():
    recipe = load_recipe("ade20k-swinv2-g")
    assert (recipe.train.lr, recipe.train.batch_size, recipe.train.weight_decay) == (3e-4, 16, 0.02)
    assert (recipe.extract["input_size"], recipe.extract["window"]) == ([640, 640], 40)


@pytest.mark.parametrize(
    ("name", "lr", "batch", "iterations", "size", "window"),
    [
        ("ade20k-upernet-mim", 1e-4, 32, 80_000, [640, 640], 20),
        ("ade20k-mask2former-mim", 3e-4, 16, 160_000, None, 8),
    ],
)
def test_the_recipes_of_the_paper_on_masked_image_modeling(name, lr, batch, iterations, size, window):
    recipe = load_recipe(name)
    assert (recipe.train.lr, recipe.train.batch_size, recipe.train.iterations) == (lr, batch, iterations)
    assert recipe.train.weight_decay == 0.05
    assert (recipe.extract.get("input_size"), recipe.extract["window"]) == (size, window)


def test_settings_override_a_recipe_with_the_type_of_the_field(scenes):
    recipe = load_recipe("camvid-small", settings=["iterations=12", "upernet.lr=5e-3", "upernet.width=32", "amp=true"])
    assert recipe.train.iterations == 12
    assert recipe.train.amp is True
    choice = choose_head("upernet", scenes().info, recipe.train)
    assert choice.train.lr == 5e-3
    assert choice.options["width"] == 32
    assert choose_head("linear", scenes().info, recipe.train).train.lr == recipe.train.lr


def test_a_recipe_file_loads_like_a_shipped_one(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nlr = 1\nschedule = "multi-step"\nmilestones = [3, 5]\n[heads.linear]\nclip = 2\n')
    assert load_recipe(str(path)) == Recipe(
        name="mine",
        description="",
        train=TrainConfig(lr=1.0, schedule="multi-step", milestones=(3, 5), heads={"linear": {"clip": 2}}),
        extract={},
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["iteratons=3"], "iteratons.*did you mean iterations"),
        (["iterations=many"], "iterations is a whole number, got 'many'"),
        (["iterations=0"], "iterations must be positive"),
        (["amp=maybe"], "amp is true or false"),
        (["uppernet.lr=3"], "uppernet.*did you mean upernet"),
        (["upernet.lr=-1"], "lr and eps must be positive"),
        (["lr"], "key=value"),
        (["betas=0.9,2"], "betas"),
        (["schedule=cosin"], "did you mean cosine"),
        (["lr=nan"], "lr is a number"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: list[str], message: str):
    with pytest.raises(SpecError, match=message):
        configure(settings)


def test_unknown_and_broken_recipes_are_refused(tmp_path: Path):
    with pytest.raises(SpecError, match="did you mean camvid-small"):
        load_recipe("camvid-smal")
    with pytest.raises(SpecError, match="cannot be read"):
        load_recipe(str(tmp_path / "absent.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(SpecError, match="not valid TOML"):
        load_recipe(str(broken))
    broken.write_text("[trian]\nlr = 1\n")
    with pytest.raises(SpecError, match=r"table in a recipe 'trian'; did you mean.*train"):
        load_recipe(str(broken))


@pytest.mark.parametrize("name", head_names())
def test_no_option_of_a_head_has_the_name_of_a_training_setting(name: str):
    fields = set(TrainConfig.__dataclass_fields__)
    assert not fields & set(find_head(name).options)
