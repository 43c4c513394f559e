"""Datasets: one file each; a file's name is the dataset's name.

A plug-in defines `SPLITS` (split name -> role), `VIEW_RECIPE` (the name of its usual view recipe) and
`open_split(root, split) -> DatasetSplit`.
"""

import importlib
import itertools
import pkgutil
from dataclasses import replace
from functools import cache
from pathlib import Path

from fcache.cache_spec.errors import DataError, unknown_name
from fcache.extractor.datasets.dataset import Dataset as Dataset
from fcache.extractor.datasets.dataset import DatasetSplit as DatasetSplit
from fcache.extractor.datasets.dataset import Instances as Instances
from fcache.extractor.datasets.dataset import RawSample as RawSample
from fcache.extractor.datasets.dataset import Sample as Sample
from fcache.extractor.datasets.dataset import check_folder, some


def dataset_names() -> tuple[str, ...]:
    """The names of all datasets."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if m.name != "dataset")


@cache
def find_dataset(name: str) -> Dataset:
    """The dataset of that name. Raises SpecError with the nearest names if there is none."""
    if name not in dataset_names():
        raise unknown_name("dataset", name, dataset_names())
    plugin = importlib.import_module(f"{__name__}.{name}")
    return Dataset(name, plugin.SPLITS, plugin.VIEW_RECIPE, plugin.open_split)


def open_split(dataset: str, root: Path, split: str) -> DatasetSplit:
    """A split of the dataset that lies at `root`, its samples sorted by id.

    Raises SpecError for an unknown dataset or split; DataError if folders or annotations are missing, do not fit
    together or hold no sample.
    """
    found = find_dataset(dataset)
    if split not in found.splits:
        raise unknown_name(f"split of {dataset}", split, found.splits)
    opened = found.open_split(check_folder(Path(root), role=f"the data root of {dataset}"), split)
    if not opened.samples:
        what = "image" if opened.load_frames is None else "video"
        raise DataError(f"{root}: split {split!r} of {dataset} holds no {what}; check the data root")
    samples = tuple(sorted(opened.samples, key=lambda s: s.id))
    if same := {a.id for a, b in itertools.pairwise(samples) if a.id == b.id}:
        raise DataError(f"{root}: sample ids must be unique, these are not: {some(list(same))}; rename the files")
    return replace(opened, samples=samples)
