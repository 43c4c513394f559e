"""`fcache predict`: a backbone and a trained head on photos."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fcache.extractor import Photo, PhotoReader
    from fcache.heads import Prediction, Run


@click.command(
    epilog="""\b
Examples:
  fcache predict runs/upernet-seed0 photo.jpg
  fcache predict runs/linear-seed0 photos/*.jpg --weights mobilenet.safetensors --out overlays

\b
Label maps become overlay pictures, whose paths are printed; classes are printed with their
probabilities, best first.
"""
)
@click.argument("run", metavar="RUN")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--weights", help="The backbone's weights, if they have moved since extraction.", metavar="FILE")
@click.option("--out", default="predictions", show_default=True, help="Folder for overlay pictures.", metavar="DIR")
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
def command(run: str, images: tuple[str, ...], weights: str | None, out: str, device: str | None) -> None:
    """Run the backbone and the head of RUN on photos."""
    from fcache.cache_spec import DataError
    from fcache.cli.job import best_device
    from fcache.heads import load_head, load_run, predict

    trained_on = load_run(run)
    device = device or best_device()
    if missing := [image for image in images if not Path(image).is_file()]:
        raise DataError(f"no photo at {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    head = load_head(trained_on, device=device)
    reader = open_reader(trained_on, weights, device)
    for image in images:
        photo = reader(Path(image))
        show(trained_on, photo, predict(head, photo.block, device=device)[0], Path(out))


def open_reader(run: "Run", weights: str | None, device: str) -> "PhotoReader":
    """The photo reader whose features are those that a run was trained on.

    Raises IncompatibleError naming the first field in which backbone or test view differ.
    """
    from fcache.cache_spec import IncompatibleError, first_difference
    from fcache.cli.job import job_of_run
    from fcache.extractor import open_photos

    reader = open_photos(job_of_run(run, weights=weights, root=None, device=device))
    difference = first_difference(run.features.backbone, reader.backbone.spec, "backbone") or first_difference(
        run.features.evaluation.views, reader.recipe.evaluation, "views"
    )
    if difference:
        name, trained, now = difference
        raise IncompatibleError(
            f"{run.folder} was trained on features of {name} = {str(trained)[:60]}, this is {str(now)[:60]}; "
            "name the same backbone's --weights"
        )
    return reader


def show(run: "Run", photo: "Photo", prediction: "Prediction", out: Path) -> None:
    """Write an overlay and print its path, or print the best classes."""
    import numpy as np
    from PIL import Image

    from fcache.heads import best_classes, overlay

    target = run.targets[0]
    if run.task != "semantic":
        variants = [name.partition("/")[2] for name in run.metrics if name.startswith("top1/")]
        chosen = run.evaluations[-1].chosen if run.evaluations else ""
        variant = variants.index(chosen) if chosen in variants else 0
        for name, probability in best_classes(prediction, target.class_names, variant=variant):
            click.echo(f"{photo.path}\t{name}\t{probability:.4f}")
        return
    picture = overlay(photo.image, np.asarray(prediction.value), target.palette, target.class_names)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{photo.path.stem}-{run.folder.name}.png"
    Image.fromarray(picture).save(path)
    click.echo(str(path))
