"""Where predictions are written."""

import errno
import time
from pathlib import Path

import pytest

from fcache.cache_spec import SpecError
from fcache.cli.outputs import check_apart, open_folder, output_names
from fcache.extractor import FoundPhoto


def names_of(*photos: tuple[str, str]) -> list[str]:
    return [str(name) for name in output_names([FoundPhoto(Path(p), Path(r)) for p, r in photos])]


def test_no_two_photos_share_an_output() -> None:
    assert names_of(("a/x.jpg", "x.jpg"), ("b/y.jpg", "y.jpg")) == ["x", "y"]
    assert names_of(("a/x.jpg", "x.jpg"), ("b/x.jpg", "x.jpg"), ("b/y.jpg", "y.jpg")) == ["a/x", "b/x", "y"]
    assert names_of(("a/x.jpg", "x.jpg"), ("a/x.png", "x.png")) == ["x.jpg", "x.png"]
    # Where upper and lower case are one.
    assert names_of(("a/X.jpg", "X.jpg"), ("a/x.JPEG", "x.JPEG")) == ["X.jpg", "x.JPEG"]
    assert names_of(("a/x.jpg", "x.jpg"), ("a/x.png", "x.png"), ("b/x.jpg", "x.jpg")) == ["a/x", "x.png", "b/x"]
    assert names_of(("p/a/x.jpg", "a/x.jpg"), ("q/a/x.jpg", "a/x.jpg")) == ["p/a/x", "q/a/x"]
    hard = [("r/X.jpg", "X.jpg"), ("r/x.jpg", "x.jpg"), ("r/x.JPG", "x.JPG"), ("s/x.jpg", "x.jpg")]
    found = names_of(*hard)
    assert len({name.casefold() for name in found}) == 4
    assert names_of() == []


def test_names_of_many_photos_take_a_moment() -> None:
    photos = [FoundPhoto(Path(f"d/{i % 7}/{i}.jpg"), Path(f"{i % 7}/{i}.jpg")) for i in range(20_000)]
    started = time.process_time()
    assert len(set(output_names(photos))) == 20_000
    assert time.process_time() - started < 5


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    for _ in range(2):
        open_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch) -> None:
    # Whoever runs the tests may have the right to write everywhere.
    def denied(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(SpecError, match=r"nothing can be written to the folder .*Permission denied.*another --out"):
        open_folder(tmp_path)


def test_a_full_disk_is_no_wrong_folder(tmp_path: Path, monkeypatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OSError, match="No space"):
        open_folder(tmp_path)


def test_a_photo_behind_a_link_is_still_the_photo(tmp_path: Path) -> None:
    photo = tmp_path / "x.png"
    photo.touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = [FoundPhoto(tmp_path / "link" / "x.png", Path("x.png"))]
    with pytest.raises(SpecError, match="is one of the photos"):
        check_apart(found, [tmp_path / "y.png", photo])
    check_apart(found, [tmp_path / "y.png"])
