"""Every mode of image file becomes RGB, and what cannot is told apart from what could not be read."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from fcache.cache_spec import DataError
from fcache.extractor import images
from fcache.extractor.images import image_size, load_image, load_mask

RANDOM = np.random.default_rng(0)


def picture(height: int = 6, width: int = 9) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(path: Path, samples: np.ndarray, *, depth: int, colour: int) -> Path:
    """Writes a PNG of any bit depth: `samples` [H, W, C] big-endian, or packed rows of bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    if depth == 16:
        rows = [b"\0" + row.astype(">u2").tobytes() for row in samples]
    else:
        bits = np.unpackbits(samples.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - depth :]
        rows = [b"\0" + np.packbits(row.reshape(-1)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def load(path: Path) -> np.ndarray:
    pixels = load_image(path, apply_orientation=False)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert image_size(path, apply_orientation=False) == pixels.shape[:2]
    return pixels


def test_rgb_and_grey_keep_their_values(tmp_path: Path) -> None:
    rgb = picture()
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png"), rgb)
    Image.fromarray(rgb[:, :, 0]).save(tmp_path / "b.png")
    np.testing.assert_array_equal(load(tmp_path / "b.png"), np.repeat(rgb[:, :, :1], 3, axis=2))


def test_alpha_composites_on_black(tmp_path: Path) -> None:
    rgb = picture()
    alpha = RANDOM.integers(0, 256, rgb.shape[:2], dtype=np.uint8)
    alpha[0, :2] = 0, 255
    expected = np.rint(rgb * (alpha[:, :, None] / 255.0)).astype(np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(load(tmp_path / "rgba.png"), expected)
    Image.fromarray(np.dstack([rgb[:, :, 0], alpha]), mode=None).save(tmp_path / "la.png")
    np.testing.assert_array_equal(load(tmp_path / "la.png"), np.repeat(expected[:, :, :1], 3, axis=2))


def test_palettes_convert_with_and_without_transparency(tmp_path: Path) -> None:
    indexed = Image.fromarray(np.array([[0, 1], [2, 1]], dtype=np.uint8), mode=None)
    indexed.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]], dtype=np.uint8)
    indexed.save(tmp_path / "p.png")
    np.testing.assert_array_equal(load(tmp_path / "p.png"), colours)
    indexed.save(tmp_path / "t.png", transparency=1)
    colours[[0, 1], 1] = 0
    np.testing.assert_array_equal(load(tmp_path / "t.png"), colours)


def test_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0]


def test_cmyk_without_ink_is_white_and_black_ink_is_black(tmp_path: Path) -> None:
    ink = np.zeros((8, 16, 4), dtype=np.uint8)
    ink[:, 8:, 3] = 255
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "a.jpg", quality=100)
    pixels = load(tmp_path / "a.jpg")
    assert pixels[:, :8].min() > 250
    assert pixels[:, 8:].max() < 5


WIDE = np.array([[0, 128, 129, 255], [385, 386, 32768, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_scale_linearly(tmp_path: Path, colour: int, channels: int) -> None:
    samples = np.repeat(WIDE[:, :, None], channels, axis=2)
    if channels in (2, 4):
        samples[:, :, -1] = 65535
    pixels = load(png(tmp_path / "a.png", samples, depth=16, colour=colour))
    np.testing.assert_array_equal(pixels, np.repeat(np.rint(WIDE / 257.0)[:, :, None], 3, axis=2))


def test_a_transparent_colour_is_black_at_any_depth(tmp_path: Path) -> None:
    rgb = picture()
    rgb[2, 3] = 9, 8, 7
    Image.fromarray(rgb).save(tmp_path / "a.png", transparency=(9, 8, 7))
    expected = np.where((rgb == (9, 8, 7)).all(-1, keepdims=True), 0, rgb)
    np.testing.assert_array_equal(load(tmp_path / "a.png"), expected)
    for colour, key in ((2, (385, 385, 385)), (0, (385,))):
        path = png(tmp_path / "b.png", np.repeat(WIDE[:, :, None], len(key), axis=2), depth=16, colour=colour)
        body = b"tRNS" + np.array(key, dtype=">u2").tobytes()
        data = path.read_bytes()
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        path.write_bytes(data[:33] + chunk + data[33:])
        assert load(path)[:, :, 0].tolist() == [[0, 0, 1, 1], [0, 2, 128, 255]]


def test_wide_integers_scale_within_sixteen_bits_only(tmp_path: Path) -> None:
    Image.fromarray(WIDE.astype(np.int32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(load(tmp_path / "a.tif")[:, :, 0], np.rint(WIDE / 257.0))
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(DataError, match="0 to 70000"):
        load(tmp_path / "b.tif")


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*float"):
        load_image(tmp_path / "a.tif", apply_orientation=False)


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((4, 4, 3), v, dtype=np.uint8)) for v in (200, 10))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    assert (load(tmp_path / "a.webp") == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_only_where_asked(tmp_path: Path, orientation: int) -> None:
    rgb = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        shown = np.array(ImageOps.exif_transpose(opened))
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", apply_orientation=True), shown)
    assert image_size(tmp_path / "a.png", apply_orientation=True) == shown.shape[:2]
    np.testing.assert_array_equal(load(tmp_path / "a.png"), rgb)


def test_a_broken_exif_block_counts_as_none(tmp_path: Path) -> None:
    Image.fromarray(picture(8, 16)).save(tmp_path / "a.jpg", exif=b"Exif\0\0broken")
    assert load_image(tmp_path / "a.jpg", apply_orientation=True).shape == (8, 16, 3)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "bmp", "tif"])
def test_a_truncated_file_is_bad_data_and_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(picture(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{ending}"):
        load_image(path, apply_orientation=True)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0" + bytes(40)])
def test_bytes_that_are_no_image_are_bad_data(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (
        lambda p: load_image(p, apply_orientation=True),
        load_mask,
        lambda p: image_size(p, apply_orientation=1),
    ):
        with pytest.raises(DataError, match=r"a\.jpg: expected an image, found .*; replace or remove") as error:
            read(tmp_path / "a.jpg")
        # No library's words about its own objects.
        assert "<" not in str(error.value)


def test_failed_reads_stay_os_errors(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, kind in (("absent.png", FileNotFoundError), ("folder.png", IsADirectoryError)):
        for read in (load_image, image_size):
            with pytest.raises(kind):
                read(tmp_path / name, apply_orientation=False)


def test_large_images_pass_and_gigantic_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((64, 64), dtype=np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "a.png").shape == (64, 64, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    with pytest.raises(DataError, match=r"64x64 pixels"):
        load_image(tmp_path / "a.png", apply_orientation=False)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("colour", [0, 3])
def test_masks_keep_their_integers_at_every_depth(tmp_path: Path, depth: int, colour: int) -> None:
    if colour == 3:
        mask = Image.fromarray(np.arange(min(2**depth, 16), dtype=np.uint8)[None], mode="P")
        mask.putpalette(list(RANDOM.integers(0, 256, 768)))
        mask.save(tmp_path / "a.png", bits=min(depth, 8))
        stored = np.arange(min(2**depth, 16))[None]
    else:
        stored = np.arange(min(2**depth, 200)).reshape(1, -1) * (300 if depth == 16 else 1)
        png(tmp_path / "a.png", stored[:, :, None] if depth == 16 else stored, depth=depth, colour=0)
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), stored)


def test_a_mask_of_colours_is_refused(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*mode RGB"):
        load_mask(tmp_path / "a.png")
