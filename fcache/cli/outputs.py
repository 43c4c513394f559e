"""Where predictions are written: a name for each photo, never the same for two, and files that are never half there."""

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
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
        taken = Counter(_key(name) for name in (*names.values(), *(form[i] for i in left)))
        names |= {i: form[i] for i in left if taken[_key(form[i])] == 1}
        left = [i for i in left if i not in names]
    used = {_key(name) for name in names.values()}
    for i in left:
        names[i] = _numbered(forms[-1][i], used)
        used.add(_key(names[i]))
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

    with _whole(path) as partial:
        Image.fromarray(pixels).save(partial, format="PNG")


def save_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8, as `save_png` does."""
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Generator[Path]:
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def open_folder(folder: Path) -> None:
    """Makes a folder if there is none, and tries it, before any work is done for it.

    Raises SpecError if nothing can be written there, OSError if there is no space.
    """
    from fcache.cache_spec import SpecError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SpecError(f"nothing can be written to the folder {folder} ({e.strerror}); choose another --out") from e


def check_apart(photos: "Sequence[FoundPhoto]", written: Sequence[Path]) -> None:
    """Raises SpecError if one of the files that are to be written is one of the photos."""
    from fcache.cache_spec import SpecError

    read = {os.path.realpath(photo.path) for photo in photos}
    if same := next((path for path in written if os.path.realpath(path) in read), None):
        raise SpecError(f"{same} is one of the photos, and a prediction would overwrite it; choose another --out")
