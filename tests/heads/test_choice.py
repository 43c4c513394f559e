import pytest

from fcache.cache_spec import SpecError
from fcache.heads import TrainConfig, choose_head, choose_heads, needed_kinds, needed_levels, parse_head
from fcache.heads.tasks import resolve_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("upernet", ("upernet", {})),
        ("semantic/upernet:width=64,aux=true", ("semantic/upernet", {"width": "64", "aux": "true"})),
        ("linear:lrs=0.1,0.01,bn=true", ("linear", {"lrs": "0.1,0.01", "bn": "true"})),
    ],
)
def test_heads_are_parsed_from_text(text: str, expected):
    assert parse_head(text) == expected


@pytest.mark.parametrize("text", ["", ":width=3", "upernet:", "upernet:width", "upernet:=3", "upernet:,width=3"])
def test_text_of_another_form_is_refused(text: str):
    with pytest.raises(SpecError, match="name:option=value"):
        parse_head(text)


def test_a_short_name_means_the_head_that_fits_the_targets():
    assert resolve_name("linear", ["semantic"]) == "semantic/linear"
    assert resolve_name("linear", ["class"]) == "classification/linear"
    assert resolve_name("semantic/linear", ["class", "semantic"]) == "semantic/linear"


def test_a_short_name_that_fits_twice_is_ambiguous():
    with pytest.raises(SpecError, match=r"ambiguous.*classification/linear or semantic/linear"):
        resolve_name("linear", ["class", "semantic"])


def test_a_head_whose_targets_are_absent_says_what_it_needs():
    with pytest.raises(SpecError, match="'upernet' needs targets of kind semantic, this source has class"):
        resolve_name("upernet", ["class"])


def test_an_unknown_head_suggests_the_nearest():
    with pytest.raises(SpecError, match="did you mean upernet"):
        resolve_name("upernett", ["semantic"])


def test_options_are_typed_by_their_defaults(scenes, images):
    choice = choose_head("upernet:width=16,aux=true,dropout=0", scenes().info, TrainConfig())
    assert choice.options["width"] == 16
    assert choice.options["aux"] is True
    assert choice.options["dropout"] == 0.0
    assert choice.options["norm_inputs"] is False
    probe = choose_head("linear:lrs=0.1,1e-3", images().info, TrainConfig())
    assert probe.options["lrs"] == (0.1, 0.001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("upernet:widht=3", "widht.*did you mean width"),
        ("upernet:width=wide", "option 'width' of head 'semantic/upernet' is a whole number, got 'wide'"),
        ("upernet:aux=2", "is true or false"),
    ],
)
def test_wrong_options_are_refused_by_name(scenes, text: str, message: str):
    with pytest.raises(SpecError, match=message):
        choose_head(text, scenes().info, TrainConfig())


@pytest.mark.parametrize(
    "text",
    ["upernet:width=0", "upernet:neck=pan", "upernet:neck=bifpn", "upernet:layers=3", "fcn:width=0", "fcn:dropout=2"],
)
def test_what_a_head_refuses_is_said_when_it_is_chosen(scenes, text: str):
    with pytest.raises(SpecError):
        choose_head(text, scenes().info, TrainConfig())


def test_options_in_the_text_come_before_those_of_the_config(scenes):
    config = TrainConfig(heads={"upernet": {"width": 32, "dropout": 0.5, "lr": 0.5}})
    choice = choose_head("upernet:width=16", scenes().info, config)
    assert (choice.options["width"], choice.options["dropout"], choice.train.lr) == (16, 0.5, 0.5)


def test_a_head_says_in_its_text_how_it_is_trained(scenes):
    config = TrainConfig(lr=0.5, heads={"upernet": {"lr": 0.25, "warmup": 7}})
    choice = choose_head("upernet:lr=1e-3,width=16,weight_decay=0.1,milestones=10,20", scenes().info, config)
    train = choice.train
    assert (train.lr, train.weight_decay, train.milestones, train.warmup) == (0.001, 0.1, (10, 20), 7)
    assert (choice.options["width"], "lr" in choice.options) == (16, False)


def test_a_sweep_of_settings_is_as_many_heads_with_folders_of_their_own(scenes):
    texts = [f"upernet:lr={lr},weight_decay={wd}" for lr in ("1e-4", "2e-4") for wd in ("0.05", "0.1")]
    choices = choose_heads(texts, scenes().info, TrainConfig())
    assert [(c.train.lr, c.train.weight_decay) for c in choices] == [
        (1e-4, 0.05),
        (1e-4, 0.1),
        (2e-4, 0.05),
        (2e-4, 0.1),
    ]
    assert len({c.folder for c in choices}) == 4
    assert choices[0].folder == "upernet-lr=1e-4-weight_decay=0.05-seed0"


@pytest.mark.parametrize("setting", ["iterations", "batch_size", "seed", "amp", "evaluate_every"])
def test_what_all_heads_share_is_not_set_for_one(scenes, setting: str):
    with pytest.raises(SpecError, match=f"{setting} is the same for all heads .* give --set {setting}=8"):
        choose_head(f"upernet:{setting}=8", scenes().info, TrainConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("upernet:lr=fast", "lr is a number, got 'fast'"),
        ("upernet:lr=0", "lr and eps must be positive"),
        ("upernet:schedule=steep", "schedule"),
        ("upernet:weight_decy=0.1", "weight_decy.*did you mean weight_decay"),
    ],
)
def test_wrong_settings_of_a_head_are_refused_by_name(scenes, text: str, message: str):
    with pytest.raises(SpecError, match=message):
        choose_head(text, scenes().info, TrainConfig())


@pytest.mark.parametrize(
    "texts",
    [
        ["upernet:lr=1e-3", "upernet:lr=0.001"],
        ["upernet", "upernet:weight_decay=0.01"],
        ["upernet:width=512", "semantic/upernet"],
    ],
)
def test_heads_that_say_the_same_in_other_words_are_refused(scenes, texts: list[str]):
    with pytest.raises(SpecError, match=f"'{texts[0]}' and '{texts[1]}' are the same"):
        choose_heads(texts, scenes().info, TrainConfig())


def test_a_section_of_the_full_name_comes_before_one_of_the_short_name(scenes):
    config = TrainConfig(heads={"linear": {"lr": 0.1}, "semantic/linear": {"lr": 0.2}})
    assert choose_head("linear", scenes().info, config).train.lr == 0.2


def test_the_same_head_twice_is_refused(scenes):
    with pytest.raises(SpecError, match="given twice"):
        choose_heads(["linear", "linear"], scenes().info, TrainConfig())


def test_run_folders_have_plain_names(scenes):
    choice = choose_head("semantic/upernet:width=16,aux=true", scenes().info, TrainConfig(seed=3))
    assert choice.folder == "semantic-upernet-width=16-aux=true-seed3"


def test_heads_say_which_levels_and_targets_they_read(images, scenes):
    info = images().info
    last = choose_heads(["linear"], info, TrainConfig())
    assert needed_levels(last, info.levels) == ("level-32",)
    both = choose_heads(["linear", "linear:level=level-16"], info, TrainConfig())
    assert needed_levels(both, info.levels) == ("level-16", "level-32")
    assert needed_kinds(both) == ("class",)
    dense = choose_heads(["upernet"], scenes().info, TrainConfig())
    assert needed_levels(dense, scenes().info.levels) == ("level-4", "level-8", "level-16")
    with pytest.raises(SpecError, match="unknown level"):
        needed_levels(choose_heads(["linear:level=level-3"], info, TrainConfig()), info.levels)
