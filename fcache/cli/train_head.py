"""`fcache train-head`: train one or many heads from a cache."""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fcache.cache_spec import BlockSource, CacheReader, CacheSource, StreamConfig
    from fcache.cli.progress import Progress
    from fcache.heads import Report, Run, TrainConfig

FAILED, PARTIAL = 1, 3


@click.command(
    epilog="""\b
Examples:
  fcache train-head --cache ade.fcache --head linear --head upernet --recipe ade20k-small
  fcache train-head --cache ade.fcache --head 'upernet:width=64,aux=true' --set lr=0.0002 --iters 4000
  fcache train-head --cache ade.fcache --head upernet --head 'upernet:neck=bifpn,layers=5'
  fcache train-head --cache ade.fcache --head mask2former:pixel_blocks=1,decoder_blocks=3
  fcache train-head --cache coco.fcache --head maskrcnn:neck=bifpn,layers=5 --recipe coco-maskrcnn-frozen
  fcache train-head --cache coco.fcache --head=maskrcnn:lr={1e-4,2e-4},weight_decay={0.05,0.1}
                                        a sweep in one pass: the shell makes four heads of it
  fcache train-head --cache k400.fcache --head temporal --head global --recipe k400-frozen
  fcache train-head --cache ade.fcache --head upernet --seed 1 --subset 10% --out runs/tenth
  fcache train-head … --resume          continue after a kill, to the same weights
  fcache train-head … --follow          train while `fcache extract` still writes the cache

\b
Heads: classification/linear, detection/cascade, detection/htc, detection/htc-without-semantic,
detection/maskrcnn, semantic/fcn, semantic/linear, semantic/mask2former, semantic/upernet,
video/global, video/linear, video/temporal; the short name is enough where the cache's targets
leave one choice.
Recipes: ade20k-mask2former-frozen, ade20k-mask2former-mim, ade20k-small, ade20k-swinv2-g,
ade20k-upernet-frozen, ade20k-upernet-mim, camvid-small, coco-maskrcnn-frozen,
coco-maskrcnn-frozen-10pct, coco-maskrcnn-frozen-1pct, coco-small, coco-swinv2-g, coco-vit-det,
demo-small, imagefolder-small, imagenet-linear, k400-frozen, k400-small, k400-swinv2-g.

\b
Exit status: 1 if a head stopped (the others are trained), 3 if the cache was partial.
"""
)
@click.option("--cache", "path", required=True, help="The cache to train from.", metavar="PATH|URL")
@click.option(
    "--head",
    "heads",
    multiple=True,
    help="A head, with options and training settings (lr=1e-4) or not; may be repeated. By default the recipe's.",
    metavar="NAME[:OPTION=VALUE,…]",
)
@click.option("--recipe", help="Training settings, shipped or in a TOML file.", metavar="NAME|FILE")
@click.option(
    "--set", "settings", multiple=True, help="Change one setting, of all heads or one.", metavar="[HEAD.]KEY=VALUE"
)
@click.option("--iters", type=int, help="Iterations: the same as --set iterations=N.", metavar="N")
@click.option("--subset", help="Train on a fixed share of the samples, '1%'.", metavar="SHARE")
@click.option("--views", type=click.IntRange(1), help="Train on the first K views only.", metavar="K")
@click.option("--seed", type=int, help="Seed of weights, dropout and order: the same as --set seed=N.", metavar="N")
@click.option("--out", default="runs", show_default=True, help="Where each head's run gets a folder.", metavar="DIR")
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
@click.option("--resume", is_flag=True, help="Continue unfinished runs in --out.")
@click.option("--allow-partial", is_flag=True, help="Train on what is committed of an unfinished cache.")
@click.option(
    "--follow",
    is_flag=True,
    help="Train while the cache is written: each epoch on what is committed when it begins. Scores once the "
    "evaluation split is whole.",
)
@click.option(
    "--resident",
    type=click.Choice(["auto", "none", "ram", "device"]),
    default="auto",
    show_default=True,
    help="Keep the training split in memory. auto: on a GPU if it fits in half of what is free there; in RAM if it "
    "is compressed or on an object store, and fits.",
)
@click.option(
    "--read",
    "mode",
    type=click.Choice(["auto", "mmap", "pread"]),
    default="auto",
    show_default=True,
    help="How files are read: mapped, or by position (the default on network file systems).",
)
@click.option(
    "--check",
    type=click.Choice(["none", "digest"]),
    default="none",
    show_default=True,
    help="Compare the SHA-256 of each shard file when it is first opened, about half a second a GB.",
)
@click.option("--allow-random-backbone", is_flag=True, help="Train on the features of a backbone with random weights.")
def command(
    path: str,
    heads: tuple[str, ...],
    recipe: str | None,
    settings: tuple[str, ...],
    iters: int | None,
    subset: str | None,
    views: int | None,
    seed: int | None,
    out: str,
    device: str | None,
    resume: bool,
    allow_partial: bool,
    follow: bool,
    resident: str,
    mode: str,
    check: str,
    allow_random_backbone: bool,
) -> int:
    """Train one or many heads in one pass over a cache, score each on the evaluation split and record its run."""
    from fcache.cache_spec import SpecError, open_cache, parse_fraction
    from fcache.cli.job import best_device
    from fcache.heads import configure, load_recipe

    changes = [*settings]
    changes += [f"{key}={value}" for key, value in (("iterations", iters), ("seed", seed)) if value is not None]
    loaded = load_recipe(recipe, settings=changes) if recipe else None
    config = loaded.train if loaded else configure(changes)
    if not (names := heads or tuple(config.heads)):
        raise SpecError("which heads? Name them with --head (--help lists them), or name a --recipe that lists some")
    reader = open_cache(path, allow_partial=allow_partial or follow, mode=mode, check=check)
    runs = train_from(
        reader,
        names,
        config,
        out=Path(out),
        device=device or best_device(),
        recipe=loaded.name if loaded else "",
        subset=parse_fraction(subset) if subset else 1.0,
        views=views,
        resume=resume,
        follow=follow,
        resident=resident,
        allow_random_backbone=allow_random_backbone,
    )
    click.echo(results(runs))
    if any(run.status == "stopped" for run in runs):
        return FAILED
    return PARTIAL if any(reader.missing(part) for part in reader.manifest.parts()) else 0


def train_from(
    reader: "CacheReader",
    heads: Sequence[str],
    config: "TrainConfig",
    *,
    out: Path,
    device: str,
    recipe: str = "",
    subset: float = 1.0,
    views: int | None = None,
    resume: bool = False,
    follow: bool = False,
    resident: str = "auto",
    allow_random_backbone: bool = False,
) -> "list[Run]":
    """Train heads on a cache's training split, score them on its evaluation split; progress goes to stderr.

    With `follow` the cache may still be written; `resident` says where the training split is kept.
    Raises KeyboardInterrupt after a signal, when all heads are saved.
    """
    from fcache.cache_spec import IncompleteError, SpecError, StreamConfig, follow_source
    from fcache.cli.interrupts import stop_on_signals
    from fcache.cli.progress import Progress
    from fcache.heads import batch_buffers, choose_heads, needed_kinds, needed_levels, train

    training, evaluation = split_of(reader, "training"), split_of(reader, "evaluation")
    if training is None:
        raise SpecError(f"{reader.url} has no training split; extract it with --split train")
    info = reader.info(training)
    choices = choose_heads(heads, info, config)
    stream = StreamConfig(
        batch_size=config.batch_size,
        levels=needed_levels(choices, info.levels),
        kinds=needed_kinds(choices),
        seed=config.seed,
        subset=subset,
        views=views,
        drop_last=True,
        decode=decoded_for(device),
        allocate=batch_buffers(device),
    )
    with Progress() as progress, stop_on_signals() as should_stop:
        report = progress_of(progress)
        if info.random_weights:
            progress.note(f"train  the backbone's weights are RANDOM ({info.random_weights})")
        validation: BlockSource | None = None
        if evaluation and follow:
            validation = follow_source(reader, evaluation, evaluation_stream(stream))
        elif evaluation:
            try:
                validation = evaluation_source(reader, evaluation, stream)
            except IncompleteError:
                if not reader.allow_partial:
                    raise
                progress.note(f"train  nothing of split {evaluation} is committed yet: heads are not scored")
        runs = train(
            training_source(reader, training, stream, follow=follow, resident=resident, device=device, report=report),
            choices,
            config,
            out=out,
            validation=validation,
            device=device,
            report=report,
            should_stop=should_stop,
            resume=resume,
            recipe=recipe,
            hints={"cache": _located(reader), "extraction": json.dumps(dict(reader.manifest.hints))},
            allow_random_backbone=allow_random_backbone,
        )
        if any(run.status == "interrupted" for run in runs):
            progress.note("train  stopped; the same command with --resume continues")
            raise KeyboardInterrupt
    return runs


def split_of(reader: "CacheReader", role: str) -> str | None:
    """The name of the first split of a role, None if the cache has none."""
    return next((group.split for group in reader.manifest.groups if group.role == role), None)


def training_source(
    reader: "CacheReader",
    split: str,
    stream: "StreamConfig",
    *,
    follow: bool,
    resident: str,
    device: str,
    report: "Report",
) -> "BlockSource":
    """The training split: streamed, followed while it is written, or kept in memory as `resident` says.

    Raises SpecError for a split that grows and is to be kept in memory, or does not fit there.
    """
    from fcache.cache_spec import SpecError, follow_source, open_source
    from fcache.heads import make_resident

    if not follow:
        return make_resident(open_source(reader, split, stream), resident, device, report=report)
    if resident in ("ram", "device"):
        raise SpecError(f"a split that grows is not kept in memory; drop --follow or --resident {resident}")
    return follow_source(reader, split, stream)


def evaluation_source(reader: "CacheReader", split: str, like: "StreamConfig") -> "CacheSource":
    """The evaluation split as a source that reads what `like` reads, once and in order."""
    from fcache.cache_spec import open_source

    return open_source(reader, split, evaluation_stream(like))


def evaluation_stream(like: "StreamConfig") -> "StreamConfig":
    """How an evaluation split is streamed: all of it in order, otherwise as `like`."""
    return replace(like, order="sequential", subset=1.0, views=None, drop_last=False)


def decoded_for(device: str) -> str | None:
    """What a reader's threads decode to for heads on this device: codes are decoded on a GPU itself."""
    return "fp32" if device == "cpu" else None


def progress_of(progress: "Progress") -> "Report":
    """What renders the events of training and evaluation."""
    from fcache.cli.progress import rate, size
    from fcache.heads import events

    first, started, waited = 0, time.monotonic(), set[str]()

    def report(event: "events.Event") -> None:
        nonlocal first, started
        match event:
            case events.TrainingStarted():
                first, started = event.first, time.monotonic()
                heads = ", ".join(f"{label} ({n / 1e6:.3g} M)" for label, n in event.parameters.items())
                progress.note(f"train  {heads}; iterations {event.first + 1} to {event.iterations}")
            case events.StepDone():
                seconds = time.monotonic() - started
                done = rate(event.iteration - first, event.iterations - first, seconds, "iterations")
                losses = "  ".join(f"{label} {loss:.4g}" for label, loss in event.losses.items())
                progress.show(f"train  {done}  loss {losses}")
            case events.SplitKept():
                progress.note(f"train  split {event.split} is kept in {event.place}: {size(event.bytes)}")
            case events.Waiting():
                say = progress.show if event.split in waited else progress.note
                say(f"train  split {event.split}: waiting for what is not committed yet")
                waited.add(event.split)
            case events.EvaluationStep():
                progress.show(f"score  {event.block}/{event.blocks} batches")
            case events.EvaluationDone():
                progress.note(f"score  {event.label} after {event.iteration}: {scores(event.metrics)}")
            case events.HeadStopped():
                progress.note(f"train  {event.label} STOPPED at {event.iteration}: {event.reason}")
            case _:
                pass

    return report


def scores(metrics: Any) -> str:
    """Scores on one line, fractions."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if "/" not in name)


def results(runs: "list[Run]") -> str:
    """One line a run: its folder, scores and cost."""
    from fcache.cli.tables import table

    names = [name for run in runs for name in run.metrics if "/" not in name]
    columns = list(dict.fromkeys(names))
    rows = [
        [
            run.label,
            *(f"{run.metrics[name]:.4f}" if name in run.metrics else "-" for name in columns),
            f"{run.cost.parameters:,}",
            f"{run.cost.seconds_per_iteration:.4f}",
            f"{run.cost.data_wait_share:.1%}",
            run.status if run.status != "finished" else str(run.folder),
        ]
        for run in runs
    ]
    return table(["head", *columns, "parameters", "s/iter", "waiting", "run"], rows)


def _located(reader: "CacheReader") -> str:
    """Where a cache lies, for other folders and later days: the whole path, or the URL."""
    path = reader.storage.path()
    return str(path.resolve()) if path else reader.url
