"""Recipes: named training settings, shipped as TOML files in this folder or written by users.

A recipe holds `description`, the table `[train]` (fields of TrainConfig), tables `[heads.<name>]` (what differs for
one head, its options among it) and the table `[extract]` (the view recipe and the number of views the settings were
made for; the extraction side reads it).
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fcache.cache_spec import SpecError, unknown_name
from fcache.heads.config import TrainConfig, config_from

TABLES = frozenset({"description", "train", "heads", "extract"})


@dataclass(frozen=True)
class Recipe:
    """Training settings under a name; `extract` is plain data for the extraction, such as {"views": 4}."""

    name: str
    description: str
    train: TrainConfig
    extract: Mapping[str, Any]


def recipe_names() -> tuple[str, ...]:
    """The names of the shipped recipes."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


def load_recipe(name_or_file: str, *, settings: Iterable[str] = ()) -> Recipe:
    """A shipped recipe by name, or one in a TOML file, with settings "key=value" on top.

    A key is a field of TrainConfig ("lr=0.01"), or a head's name, a point and a field or option of that head
    ("upernet.lr=0.01", "upernet.width=64"). Raises SpecError for unknown names, keys and values of a wrong type.
    """
    tables = _read(name_or_file)
    if unknown := sorted(set(tables) - TABLES):
        raise unknown_name("table in a recipe", unknown[0], TABLES)
    train, heads = dict(tables.get("train", {})), {k: dict(v) for k, v in tables.get("heads", {}).items()}
    _apply(settings, train, heads)
    return Recipe(
        name=name_or_file if name_or_file in recipe_names() else Path(name_or_file).stem,
        description=str(tables.get("description", "")),
        train=config_from({**train, "heads": heads}),
        extract=dict(tables.get("extract", {})),
    )


def configure(settings: Iterable[str] = ()) -> TrainConfig:
    """The default TrainConfig with settings "key=value" on top, as `load_recipe` reads them."""
    train: dict[str, Any] = {}
    heads: dict[str, dict[str, Any]] = {}
    _apply(settings, train, heads)
    return config_from({**train, "heads": heads})


def _read(name_or_file: str) -> dict[str, Any]:
    if name_or_file in recipe_names():
        text = (resources.files(__name__) / f"{name_or_file}.toml").read_text(encoding="utf-8")
    elif name_or_file.endswith(".toml"):
        try:
            text = Path(name_or_file).read_text(encoding="utf-8")
        except OSError as error:
            raise SpecError(f"recipe file {name_or_file} cannot be read: {error.strerror}") from error
    else:
        raise unknown_name("recipe", name_or_file, recipe_names())
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"recipe {name_or_file} is not valid TOML: {error}") from error


def _apply(settings: Iterable[str], train: dict[str, Any], heads: dict[str, dict[str, Any]]) -> None:
    for setting in settings:
        key, found, value = setting.partition("=")
        if not found or not key:
            raise SpecError(f"a setting is key=value, for example lr=0.001 or upernet.width=64, got {setting!r}")
        head, _, name = key.strip().rpartition(".")
        (heads.setdefault(head, {}) if head else train)[name] = value.strip()
