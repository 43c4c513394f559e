"""The options of an extraction, shared by `extract` and `plan`, and the job that they make."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fcache.extractor import Job
    from fcache.heads import Run

OPTIONS = (
    click.option(
        "--model",
        required=True,
        help="swinv2-t, -s, -b, -l, vit-b-det, vit-l-det, or any timm name.",
        metavar="NAME",
    ),
    click.option(
        "--dataset", required=True, help="How the data are laid out: ade20k, coco, imagefolder.", metavar="NAME"
    ),
    click.option("--data-root", help="The data. By default $FCACHE_DATA/<dataset>.", metavar="DIR"),
    click.option(
        "--weights",
        help="A file, 'pretrained' (the default; from timm's hub) or 'random:SEED'.",
        metavar="FILE|pretrained|random:SEED",
    ),
    click.option("--cache", help="The cache. By default <dataset>-<model>.fcache.", metavar="PATH|URL"),
    click.option("--recipe", help="Take the settings of a recipe's [extract] table first.", metavar="NAME|FILE"),
    click.option("--views", type=int, help="Views of each training sample [1].", metavar="K"),
    click.option(
        "--view-recipe",
        help="ade20k, ade20k-small, coco-lsj, coco-small, vit-det, imagenet, mim-classification or plain; by default "
        "the dataset's usual one.",
        metavar="NAME",
    ),
    click.option("--input-size", type=int, nargs=2, help="Input height and width of views.", metavar="H W"),
    click.option(
        "--window",
        type=int,
        help="Another attention window (Swin) than the model's own; for a plain ViT, windows in all but four blocks.",
        metavar="N",
    ),
    click.option("--levels", help="Strides or names, '4,8,16,32'; by default all usual ones.", metavar="LIST"),
    click.option(
        "--encoding",
        help="int8 [default], int4, rot:STEP, fp16, bf16, fp32; `fcache plan` shows their bytes.",
        metavar="NAME",
    ),
    click.option("--compression", help="none [default] or zstd.", metavar="NAME"),
    click.option("--precision", help="Of the backbone: bf16 [default] or fp32.", metavar="NAME"),
    click.option("--split", help="Which splits [train,val].", metavar="LIST"),
    click.option(
        "--subset",
        help="A fixed share of the samples of each split, '1%' or '10%': always the same ones.",
        metavar="SHARE",
    ),
    click.option("--limit", type=int, help="Only the first samples of each split.", metavar="N"),
    click.option("--shard-records", type=int, help="Records of a shard, for a new cache.", metavar="N"),
    click.option(
        "--batch-size",
        type=int,
        help="Images in one forward pass, for a new cache; by default measured on a GPU, by their bytes on the CPU.",
        metavar="N",
    ),
    click.option("--seed", type=int, help="Seed of the views [0].", metavar="N"),
    click.option(
        "--devices",
        "--device",
        "devices",
        help="One process each: '0,1,2,3' are GPUs; cpu, cuda:1, mps; by default the first GPU, else the CPU.",
        metavar="LIST",
    ),
    click.option("--workers", type=int, help="Decoding processes of each; 0 decodes in the same one.", metavar="N"),
    click.option("--part", help="Take every n-th shard from the i-th on (0 <= i < n).", metavar="i/n"),
    click.option("--on-error", help="A sample that cannot be decoded: quarantine [default] or fail.", metavar="WHAT"),
)


# Test-time views, for the commands that run the backbone on them.
tta_option = click.option(
    "--tta",
    help="Test-time views, words joined by '-': ms (six scales), flip, slide (windows), as in 'ms-flip', "
    "'ms-flip:scales=0.5,1,1.5' or 'slide:window=512,stride=341'.",
    metavar="VIEWS",
)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of an extraction to a click command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def parse_job(options: Mapping[str, Any]) -> "Job":
    """The job that the values of `OPTIONS` ask for; a recipe's values stand below those of the command line.

    Raises SpecError for values of a wrong form and unknown settings in the recipe.
    """
    from fcache.cache_spec import SpecError, parse_fraction
    from fcache.extractor import Job, parse_devices

    given = recipe_settings(options["recipe"]) if options["recipe"] else {}
    given |= {name: value for name, value in options.items() if value is not None and name != "recipe"}
    dataset, model = given["dataset"], given["model"]
    root = data_root(dataset, given.pop("data_root", None))
    cache = given.pop("cache", None) or f"{dataset}-{model.replace('/', '_')}.fcache"
    parsed: dict[str, Any] = {"root": root, "cache": cache, "weights": given.pop("weights", "pretrained")}
    devices = given.pop("devices", None)
    parsed["device"] = parse_devices(devices)[0] if devices else best_device()
    if (split := given.pop("split", None)) is not None:
        parsed["splits"] = words(split)
    if (levels := given.pop("levels", None)) is not None:
        parsed["levels"] = words(levels)
    if (size := given.pop("input_size", None)) is not None:
        height, width = size
        parsed["input_size"] = (int(height), int(width))
    if (subset := given.pop("subset", None)) is not None:
        parsed["subset"] = parse_fraction(subset)
    if (part := given.pop("part", None)) is not None:
        i, slash, n = part.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal()):
            raise SpecError(f"--part is i/n with 0 <= i < n, got {part!r}")
        parsed["part"] = (int(i), int(n))
    return Job(**parsed, **given)


def job_of_run(run: "Run", *, weights: str | None, root: str | None, device: str | None) -> "Job":
    """The extraction whose features a run was trained on, to run its backbone again; what is given replaces hints.

    Raises SpecError if the run does not say how its features were made.
    """
    from fcache.cache_spec import SpecError
    from fcache.extractor import Job

    if "extraction" not in run.hints:
        raise SpecError(f"{run.folder} does not say how its features were made; only train-head records that")
    made: dict[str, Any] = json.loads(run.hints["extraction"])
    size, levels = made["input_size"], made["levels"]
    return Job(
        model=made["model"],
        dataset=made["dataset"],
        root=Path(root or made["root"]),
        cache=run.hints["cache"],
        weights=weights or made["weights"],
        view_recipe=made["view_recipe"],
        input_size=(size[0], size[1]) if size else None,
        window=made["window"],
        levels=tuple(levels) if levels else None,
        encoding=run.features.training.encoding,
        precision=run.features.backbone.precision,
        seed=run.features.seed,
        device=device or best_device(),
    )


def recipe_settings(recipe: str) -> dict[str, Any]:
    """The [extract] table of a recipe, by option name. Raises SpecError for a setting that extraction lacks."""
    from fcache.cache_spec import SpecError, unknown_name
    from fcache.heads import load_recipe

    known = {"views", "view_recipe", "input_size", "window", "levels", "encoding", "precision", "seed"}
    table = dict(load_recipe(recipe).extract)
    for name, value in table.items():
        if name not in known:
            raise unknown_name(f"setting in [extract] of recipe {recipe}:", name, known)
        wanted: Any = (list, tuple) if name in ("input_size", "levels") else str
        if not isinstance(value, int if name in ("views", "window", "seed") else wanted):
            raise SpecError(f"recipe {recipe}: [extract] {name} cannot be {value!r}")
    return table


def data_root(dataset: str, named: str | None) -> Path:
    """The folder of a dataset: the one named, else $FCACHE_DATA/<dataset>. Raises SpecError if neither is given."""
    from fcache.cache_spec import SpecError

    if named:
        return Path(named)
    if folder := os.environ.get("FCACHE_DATA"):
        return Path(folder) / dataset
    raise SpecError(f"where is {dataset}? Name its folder with --data-root, or export FCACHE_DATA (one folder each)")


def best_device() -> str:
    """ "cuda" where torch can use one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def words(value: Any) -> tuple[str, ...]:
    """ "4,8" as ("4", "8"); a list gives its items as text."""
    items = value.split(",") if isinstance(value, str) else value
    return tuple(str(item).strip() for item in items if str(item).strip())
