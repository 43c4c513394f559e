"""`fcache demo`: the whole path on synthetic scenes, in a minute or two."""

import time
from pathlib import Path

import click

RECIPE = "demo-small"
HEADS = ("linear", "upernet", "upernet:norm_inputs=true")
TRAIN, VAL, SIZE = 96, 24, (128, 160)


@click.command(
    epilog="""\b
Examples:
  fcache demo
  fcache demo --out /tmp/demo --weights mobilenet.safetensors
"""
)
@click.option("--out", default="demo-out", show_default=True, help="Folder for scenes, cache and runs.", metavar="DIR")
@click.option("--model", default="mobilenetv2_100", show_default=True, help="Any model of `extract`.", metavar="NAME")
@click.option(
    "--weights",
    default="random:0",
    show_default=True,
    help="The backbone's weights. Random ones need no download, and show that the path works, no more.",
    metavar="FILE|pretrained|random:SEED",
)
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
def command(out: str, model: str, weights: str, device: str | None) -> None:
    """Run the whole path on synthetic scenes: draw them, extract, train three heads in one pass, compare, predict.

    The same command again continues where it stopped.
    """
    started = time.monotonic()
    from fcache.cache_spec import open_cache
    from fcache.cli.compare import text
    from fcache.cli.extract import progress_of
    from fcache.cli.interrupts import stop_on_signals
    from fcache.cli.job import best_device, job_of_run
    from fcache.cli.predict import files, open_reader, written
    from fcache.cli.progress import Progress, duration
    from fcache.cli.train_head import train_from
    from fcache.extractor import Job, SeenPhotos, Stopped, extract, write_scenes
    from fcache.heads import compare, load_head, load_recipe, see, view_batches

    folder, device = Path(out), device or best_device()
    scenes, cache, runs = folder / "scenes", folder / "demo.fcache", folder / "runs"
    recipe = load_recipe(RECIPE)
    height, width = recipe.extract["input_size"]
    job = Job(
        model=model,
        dataset="ade20k",
        root=scenes,
        cache=cache,
        weights=weights,
        views=recipe.extract["views"],
        view_recipe=recipe.extract["view_recipe"],
        input_size=(height, width),
        device=device,
        precision=recipe.extract["precision"],
    )
    with Progress() as progress, stop_on_signals() as should_stop:
        if not scenes.is_dir():
            progress.note(f"scenes   {TRAIN} to train on and {VAL} to test on -> {scenes}")
            write_scenes(scenes, train=TRAIN, val=VAL, size=SIZE)
        progress.note(f"weights  {model} with {weights} on {device} -> {cache}")
        try:
            extract(job, report=progress_of(progress), should_stop=should_stop)
        except Stopped:
            raise KeyboardInterrupt from None
    trained = train_from(
        open_cache(cache),
        HEADS,
        recipe.train,
        out=runs,
        device=device,
        recipe=recipe.name,
        resume=True,
        allow_random_backbone=True,
    )
    comparison = compare(trained)
    best = comparison.rows[0].runs[0]
    path = min(scenes.glob("images/validation/*.jpg"))
    head = load_head(best, device=device)
    reader = open_reader(best, job_of_run(best, weights=weights, root=None, device=device))
    click.echo(text(comparison))
    click.echo()
    click.echo(f"backbone  {model}, weights {weights}" + (" (RANDOM)" if best.random_weights else ""))
    for found in reader.read([path]):
        assert isinstance(found, SeenPhotos), "the demo draws photos that can be read"
        (seen,) = see(head, view_batches([head], found.views, device=device))
        (overlay,) = written(best, found.photos[0], seen, files(best, folder / path.stem, frozenset({"overlay"})))
        click.echo(f"overlay   {overlay}")
    click.echo(f"took      {duration(time.monotonic() - started)}")
