"""Where predictions are written: a name for each photo, never the same for two."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from fcache.extractor import FoundPhoto


def output_names(photos: "Sequence[FoundPhoto]") -> list[Path]:
    """A relative path without ending for each photo, all different, also where upper and lower case are one.

    It is the photo's path below the folder that was named, or its name. Photos that would share it keep their endings;
    if that is not enough, their path below the deepest folder that holds all photos.
    """
    paths = [os.path.abspath(photo.path) for photo in photos]
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    forms = [
        [photo.relative.with_suffix("") for photo in photos],
        [photo.relative for photo in photos],
        [Path(os.path.relpath(path, root)).with_suffix("") for path in paths],
        [Path(os.path.relpath(path, root)) for path in paths],
    ]
    names: dict[int, Path] = {}
    left = list(range(len(photos)))
    for form in forms:
        taken = [_key(name) for name in names.values()] + [_key(form[i]) for i in left]
        names |= {i: form[i] for i in left if taken.count(_key(form[i])) == 1}
        left = [i for i in left if i not in names]
    for i in left:
        names[i] = _numbered(forms[-1][i], {_key(name) for name in names.values()})
    return [names[i] for i in range(len(photos))]


def _numbered(name: Path, taken: set[str]) -> Path:
    number = 2
    while _key(found := name.with_name(f"{name.name}-{number}")) in taken:
        number += 1
    return found


def _key(name: Path) -> str:
    return str(name).casefold()


def save_png(path: Path, pixels: "np.ndarray") -> None:
    """Writes uint8 pixels [H, W] or [H, W, 3] as a PNG, into a file of another name that takes its place when whole."""
    from PIL import Image

    _save(path, lambda partial: Image.fromarray(pixels).save(partial, format="PNG"))


def save_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, into a file of another name that takes its place when whole."""
    _save(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _save(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
