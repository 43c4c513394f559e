"""`fcache predict`: a backbone and a trained head on photos and videos."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fcache.cli.job import tta_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fcache.extractor import Job, Photo, PhotoReader
    from fcache.heads import Run, Seen

# What can be written, by task, and how the names of the files end; the first is written unless another is named.
PRODUCTS = {
    "semantic": {"overlay": ".png", "labels": ".labels.png", "probabilities": ".probabilities.npy"},
    "detection": {"overlay": ".png", "instances": ".instances.json"},
    "video": {"sheet": ".png"},
}
UNREADABLE = 3


@click.command(
    epilog="""\b
Examples:
  fcache predict runs/upernet-seed0 photo.jpg
  fcache predict runs/linear-seed0 photos --out overlays --batch-size 8
  fcache predict runs/upernet-seed0 photos --save labels,probabilities
  fcache predict runs/upernet-seed0 photo.jpg --tta ms-flip --weights mobilenet.safetensors
  fcache predict runs/maskrcnn-seed0 photos --save overlay,instances --min-score 0.3
  fcache predict runs/global-seed0 clip.mp4 --tta 4x3

\b
Of label maps, detections and videos, files are written and their paths printed, one a line:
  overlay        PHOTO-RUN.png                 the photo with classes, or boxes and masks; a legend
  labels         PHOTO-RUN.labels.png          8-bit class indices, 255 classes at most
  probabilities  PHOTO-RUN.probabilities.npy   float16 [class, row, column]
  instances      PHOTO-RUN.instances.json      all detections as COCO's results have them
  sheet          VIDEO-RUN.png                 the frames that were seen, and the best classes
RUN.classes.json names the classes. Sizes are the photo's, its orientation applied. Below a folder
all photos are taken, in folders of --out like their own. Classes of whole photos and videos are
printed with their probabilities, best first. A photo that cannot be read is named, the others go on, and
the exit status is 3.
"""
)
@click.argument("run", metavar="RUN")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|FOLDER...")
@click.option("--weights", help="The backbone's weights, if they have moved since extraction.", metavar="FILE")
@click.option("--out", default="predictions", show_default=True, help="Folder for what is written.", metavar="DIR")
@click.option(
    "--save", help="What is written: overlay [default], labels, probabilities; instances; sheet.", metavar="LIST"
)
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Detections of a lower score are not drawn.",
    metavar="X",
)
@tta_option
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Photos in one forward pass, of those that are equally large on the backbone's input.",
    metavar="N",
)
@click.option("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else the CPU.", metavar="NAME")
def command(
    run: str,
    images: tuple[str, ...],
    weights: str | None,
    out: str,
    save: str | None,
    min_score: float,
    tta: str | None,
    batch_size: int,
    device: str | None,
) -> int:
    """Run the backbone and the head of RUN on photos or videos, and on all of them below folders."""
    from fcache.cache_spec import SpecError
    from fcache.cli.job import best_device, job_of_run
    from fcache.cli.outputs import check_apart, open_folder, output_names, save_text
    from fcache.cli.progress import Progress, rate
    from fcache.extractor import Unreadable, endings_of, find_photos, find_tta
    from fcache.heads import load_head, load_run, see, view_batches

    trained_on = load_run(run)
    products = parse_products(save, trained_on)
    device = device or best_device()
    job = job_of_run(trained_on, weights=weights, root=None, device=device)
    views = find_tta(tta, job) if tta is not None else None
    folder = Path(out) if products else None
    if folder and (same := [i for i in images if Path(i).is_dir() and Path(i).resolve() == folder.resolve()]):
        raise SpecError(f"overlays in {same[0]} would be photos the next time; choose another --out")
    photos = find_photos([Path(image) for image in images], leave_out=folder, endings=endings_of(job))
    stems = {p.path: Path(out) / name for p, name in zip(photos, output_names(photos), strict=True)}
    classes = Path(out) / f"{run_name(trained_on)}.classes.json"
    if folder:
        check_apart(photos, [path for stem in stems.values() for path in files(trained_on, stem, products).values()])
        open_folder(folder)
    head, reader = load_head(trained_on, device=device), open_reader(trained_on, job)
    done, failed, started = 0, 0, time.monotonic()
    with Progress() as progress:
        for item in reader.read(list(stems), tta=views, batch_size=batch_size):
            if isinstance(item, Unreadable):
                progress.note(f"fcache: error: {item.reason}")
                failed += 1
                continue
            if not done and products & {"labels", "probabilities"}:
                # Before the maps that it names the classes of, which may be read while others are made.
                save_text(classes, json.dumps(list(trained_on.targets[0].class_names), indent=1) + "\n")
            for photo, seen in zip(
                item.photos, see(head, view_batches([head], item.views, device=device)), strict=True
            ):
                paths = files(trained_on, stems[photo.path], products)
                lines = written(trained_on, photo, seen, paths, min_score=min_score)
                progress.clear()
                click.echo("\n".join(lines))
            done += len(item.photos)
            progress.show(f"predict  {rate(done, len(stems) - failed, time.monotonic() - started, 'photos')}")
    if failed:
        click.echo(f"predict  {failed} of {len(stems)} files could not be read", err=True)
    return UNREADABLE if failed else 0


def parse_products(text: str | None, run: "Run") -> frozenset[str]:
    """What is to be written, from "labels,probabilities": nothing for tasks that print classes only.

    Raises SpecError for unknown names, and if other tasks are asked for files.
    """
    from fcache.cache_spec import SpecError, unknown_name
    from fcache.cli.job import words

    if text is not None and run.task not in PRODUCTS:
        raise SpecError(f"--save is for label maps, detections and videos; heads of task {run.task!r} print classes")
    known = tuple(PRODUCTS.get(run.task, ()))
    chosen = words(text) if text is not None else known[:1]
    for name in chosen:
        if name not in known:
            raise unknown_name(f"product of task {run.task!r}:", name, known)
    if known and not chosen:
        raise SpecError(f"--save names one or more of {', '.join(known)}")
    return frozenset(chosen)


def run_name(run: "Run") -> str:
    """What a run's files are named after: its folder, also where that is named "."."""
    return Path(os.path.abspath(run.folder)).name


def files(run: "Run", stem: Path, products: frozenset[str]) -> dict[str, Path]:
    """The files to be written of one photo, by product. `stem` is a path without ending."""
    endings = PRODUCTS.get(run.task, {})
    return {p: stem.with_name(f"{stem.name}-{run_name(run)}{endings[p]}") for p in endings if p in products}


def open_reader(run: "Run", job: "Job") -> "PhotoReader":
    """The photo reader of a run's job, whose features are those that the run was trained on.

    Raises IncompatibleError naming the first field in which backbone or test view differ.
    """
    from fcache.cache_spec import IncompatibleError, first_difference
    from fcache.extractor import open_photos

    reader = open_photos(job)
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


def written(
    run: "Run", photo: "Photo", seen: "Seen", paths: "Mapping[str, Path]", *, min_score: float = 0.5
) -> list[str]:
    """Write files of a photo, by product, and give their paths, after the best classes of heads of whole images."""
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if run.task == "detection":
        save_detections(run, photo, seen, paths, min_score=min_score)
    elif run.task == "semantic":
        save_labels(run, photo, seen, paths)
    else:
        found = best(run, seen)
        if "sheet" in paths:
            save_sheet(photo, seen, paths["sheet"], found)
        lines = [f"{photo.path}\t{name}\t{probability:.4f}" for name, probability in found]
        return [*lines, *(str(path) for path in paths.values())]
    return [str(path) for path in paths.values()]


def save_labels(run: "Run", photo: "Photo", seen: "Seen", paths: "Mapping[str, Path]") -> None:
    """Write what a semantic head says about a photo."""
    from fcache.cli.outputs import save_png
    from fcache.heads import overlay, save_probabilities

    target = run.targets[0]
    if paths.keys() & {"overlay", "labels"}:
        labels = seen.merged().numpy()
        if "overlay" in paths:
            save_png(paths["overlay"], overlay(photo.image, labels, target.palette, target.class_names))
        if "labels" in paths:
            save_png(paths["labels"], labels)
    if "probabilities" in paths:
        save_probabilities(paths["probabilities"], seen)


def save_detections(run: "Run", photo: "Photo", seen: "Seen", paths: "Mapping[str, Path]", *, min_score: float) -> None:
    """Write what a detector finds in a photo."""
    from fcache.cli.outputs import save_png, save_text
    from fcache.heads import detections_json, draw_detections

    target = run.inputs.target("instances")
    found = seen.merged()
    if "overlay" in paths:
        save_png(paths["overlay"], draw_detections(photo.image, found, target, min_score=min_score))
    if "instances" in paths:
        save_text(paths["instances"], json.dumps(detections_json(found, target), indent=1) + "\n")


def save_sheet(photo: "Photo", seen: "Seen", path: Path, found: list[tuple[str, float]]) -> None:
    """Write the frames of the first view of a video with its best classes."""
    from fcache.cli.outputs import save_png
    from fcache.heads import contact_sheet

    numbers = seen.views[0].frames
    save_png(path, contact_sheet(photo.image[: len(numbers)], numbers, found))


def best(run: "Run", seen: "Seen") -> list[tuple[str, float]]:
    """The best classes of a photo or video and their probabilities."""
    from fcache.heads import Prediction, best_classes

    variants = [name.partition("/")[2] for name in run.metrics if name.startswith("top1/")]
    chosen = run.evaluations[-1].chosen if run.evaluations else ""
    variant = variants.index(chosen) if chosen in variants else 0
    prediction = Prediction(seen.id, seen.merged())
    return best_classes(prediction, run.targets[0].class_names, variant=variant)
