"""Photos from files and folders: which are found, which are read, and that one bad photo stops no other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcache.cache_spec import DataError, SpecError
from fcache.extractor import TTA, PhotoReader, SeenPhotos, Unreadable, find_photos, open_photos


def photo(path: Path, size: tuple[int, int] = (40, 30), colour: int = 90) -> Path:
    """A photo of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(colour).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> PhotoReader:
    from fcache.extractor import Job

    job = Job(
        model="test_resnet", dataset="ade20k", root=Path("nowhere"), cache="nowhere", weights="random:0",
        view_recipe="ade20k-small", input_size=(64, 64), precision="fp32",
    )  # fmt: skip
    return open_photos(job)


def test_folders_are_searched_with_all_below_and_each_photo_comes_once(tmp_path: Path) -> None:
    names = ["b.jpg", "a.PNG", "sub/c.jpeg", "sub/deep/d.webp", ".hidden.jpg", ".git/e.jpg", "note.txt", "out/a.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_photos([tmp_path / "sub" / "c.jpeg", tmp_path, tmp_path / "sub"], leave_out=tmp_path / "out")
    assert [str(f.relative) for f in found] == ["c.jpeg", "a.PNG", "b.jpg", "sub/deep/d.webp"]
    assert all(f.path.is_file() for f in found)
    # A file that is named is taken whatever it is called.
    assert [f.path.name for f in find_photos([tmp_path / "note.txt"])] == ["note.txt"]


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no photo at .*nowhere\.jpg"):
        find_photos([tmp_path / "nowhere.jpg"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no photo"):
        find_photos([tmp_path / "empty"])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_photos_that_cannot_be_read_are_named_and_the_others_are_seen(
    reader: PhotoReader, tmp_path: Path, batch_size: int
) -> None:
    good = [photo(tmp_path / f"{i}.png", colour=i) for i in range(3)]
    cut = photo(tmp_path / "cut.png")
    cut.write_bytes(cut.read_bytes()[:-900])
    text, gone = tmp_path / "text.jpg", tmp_path / "gone.jpg"
    text.write_text("no picture")
    found = list(reader.read([good[0], cut, text, good[1], gone, good[2]], batch_size=batch_size))
    bad = {item.path: item.reason for item in found if isinstance(item, Unreadable)}
    assert bad.keys() == {cut, text, gone}
    assert all(str(path) in reason and "\n" not in reason for path, reason in bad.items())
    seen = [item for item in found if isinstance(item, SeenPhotos)]
    assert sorted(p.path for item in seen for p in item.photos) == good
    assert all(len(item.photos) <= batch_size for item in seen)


def test_photos_go_together_by_canvas_and_say_what_they_say_alone(reader: PhotoReader, tmp_path: Path) -> None:
    sizes = [(40, 30), (30, 40), (39, 30), (40, 30)]
    paths = [photo(tmp_path / f"{i}.png", size, i) for i, size in enumerate(sizes)]
    tta = TTA((1.0, 1.5), flip=True)
    alone = {item.photos[0].path: item for item in reader.read(paths, tta=tta) if isinstance(item, SeenPhotos)}
    assert list(alone) == paths
    groups = [item for item in reader.read(paths, tta=tta, batch_size=4) if isinstance(item, SeenPhotos)]
    assert [[p.path for p in item.photos] for item in groups] == [[paths[0], paths[2], paths[3]], [paths[1]]]
    for item in groups:
        assert item.views.num_views == 4
        singles = [list(alone[p.path].views.blocks()) for p in item.photos]
        for number, block in enumerate(item.views.blocks()):
            assert block.views == tuple(s[number].views[0] for s in singles)
            for name, level in block.levels.items():
                one = torch.cat([s[number].levels[name].decode(torch) for s in singles])
                torch.testing.assert_close(level.decode(torch), one, rtol=1e-4, atol=1e-5)


def test_orientation_is_applied(reader: PhotoReader, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    (found,) = reader.read([tmp_path / "turned.jpg"], batch_size=2)
    assert isinstance(found, SeenPhotos)
    assert found.photos[0].image.shape == (40, 30, 3)
    assert next(found.views.blocks()).views[0].image_size == (40, 30)


def test_a_batch_has_at_least_one_photo(reader: PhotoReader) -> None:
    with pytest.raises(SpecError, match="batch_size"):
        list(reader.read([], batch_size=0))
    assert list(reader.read([])) == []
