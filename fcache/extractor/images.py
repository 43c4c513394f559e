"""Image files as arrays: every mode becomes 8-bit RGB, every mask stays the integers that it holds.

Reading and decoding are kept apart. A failing read (missing file, no permission, I/O error) is an OSError that a caller
may retry; bytes that do not decode are a DataError that names the file and will not get better.
"""

import io
import threading
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from fcache.cache_spec.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})
MOST_PIXELS = 2**29
_ORIENTATION = 0x0112
_BITS = 258
_PNG = b"\x89PNG\r\n\x1a\n"
_limit = threading.Lock()


def load_image(path: Path, *, apply_orientation: bool) -> np.ndarray:
    """The picture in a file, uint8 RGB [H, W, 3].

    Grey, palette, 1-bit and CMYK convert; alpha composites on black; 16-bit samples scale linearly (65535 becomes 255);
    of several frames the first counts. With `apply_orientation` the EXIF orientation is applied, else the pixels
    stay as stored; an EXIF block that cannot be read counts as none.
    Raises OSError if the file cannot be read, DataError if it cannot be decoded or has a mode without a
    defined conversion (32-bit floats, integers above 16 bits).
    """
    data = _read(path)
    try:
        image = _open(io.BytesIO(data), path)
        pixels = _rgb16(data, path) if _is_png_rgb16(data) else _rgb(image, path)
        return np.ascontiguousarray(_turned(pixels, _orientation(image)) if apply_orientation else pixels)
    except (DataError, MemoryError):
        raise
    except Exception as e:
        # Decoders answer corrupt bytes with nearly any exception; there is no I/O left in here to confuse them with.
        raise DataError(f"{path}: cannot be decoded ({type(e).__name__}: {e}); replace or remove the file") from e


def image_size(path: Path, *, apply_orientation: bool) -> tuple[int, int]:
    """The (height, width) that `load_image` gives, from the file's header alone. Raises as `load_image` does."""
    with path.open("rb") as file:
        try:
            image = _open(file, path)
            width, height = image.size
            turned = apply_orientation and _orientation(image) >= 5
        except (DataError, MemoryError):
            raise
        except Exception as e:
            if isinstance(e, OSError) and e.errno is not None:
                raise
            raise DataError(f"{path}: not an image ({type(e).__name__}: {e}); replace or remove the file") from e
    return (width, height) if turned else (height, width)


def load_mask(path: Path) -> np.ndarray:
    """The integers of a single-channel mask as stored, [H, W]: grey levels or palette indices, uint8 or wider.

    Raises OSError if the file cannot be read, DataError if it cannot be decoded or has several channels.
    """
    data = _read(path)
    try:
        image = _open(io.BytesIO(data), path)
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise DataError(
                f"{path}: a mask has one channel of integers, this one has mode {image.mode}; "
                "store class indices, not colours"
            )
        mask = np.array(image)
        if mask.dtype == bool:
            mask = mask.astype(np.uint8)
        # Pillow stretches 2- and 4-bit grey to 0..255, which would turn class 3 into class 51.
        if image.format == "PNG" and image.mode == "L" and data[24] in (2, 4):
            mask = mask // (255 // (2 ** data[24] - 1))
        return mask
    except (DataError, MemoryError):
        raise
    except Exception as e:
        raise DataError(f"{path}: cannot be decoded ({type(e).__name__}: {e}); replace or remove the file") from e


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    if not data:
        raise DataError(f"{path}: expected an image, found an empty file; replace or remove it")
    return data


def _open(file: IO[bytes], path: Path) -> Image.Image:
    """The image with only its header read."""
    # Pillow's limit is a module global that warns at 89 million pixels, fewer than some survey photos have.
    with _limit:
        saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        except UnidentifiedImageError as e:
            raise DataError(
                f"{path}: expected an image, found bytes of no known format; replace or remove the file"
            ) from e
        finally:
            Image.MAX_IMAGE_PIXELS = saved
    if image.width * image.height > MOST_PIXELS:
        raise DataError(
            f"{path}: {image.width}x{image.height} pixels, the most that is decoded is {MOST_PIXELS}; tile the image"
        )
    return image


def _rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.array(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataError(
                f"{path}: grey values from {grey.min()} to {grey.max()}, expected 16 bits; convert the file to 8 bits"
            )
        if isinstance(image.info.get("transparency"), int):
            grey[grey == image.info["transparency"]] = 0
        return np.repeat(_to_8_bits(grey)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise DataError(f"{path}: 32-bit float pixels have no defined range; convert the file to 8 or 16 bits")
    if isinstance(image, TiffImageFile) and len(image.getbands()) > 1 and max(image.tag_v2.get(_BITS, (8,))) > 8:
        # Pillow would keep the high bytes only.
        raise DataError(f"{path}: TIFF colour with more than 8 bits a sample is not read; convert the file to PNG")
    # The first access to pixels: palette transparency may only be known after it.
    image.load()
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        return _on_black(np.array(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bits(wide: np.ndarray) -> np.ndarray:
    """16-bit samples to the nearest of 256 equal steps, so that 0 and 65535 map to 0 and 255."""
    return ((wide.astype(np.int64) + 128) // 257).astype(np.uint8)


def _on_black(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[:, :, :3].astype(np.uint16), rgba[:, :, 3:].astype(np.uint16)
    return ((colour * alpha + 127) // 255).astype(np.uint8)


def _is_png_rgb16(data: bytes) -> bool:
    # Bit depth and colour type of the header: Pillow keeps only the high byte of 16-bit grey+alpha, RGB and RGBA.
    return data[:8] == _PNG and data[24] == 16 and data[25] in (2, 4, 6)


def _rgb16(data: bytes, path: Path) -> np.ndarray:
    """Pixels of a PNG with 16-bit grey+alpha, RGB or RGBA samples."""
    if data[25] == 4:
        # Read as RGBA, the four bytes of a pixel are grey high, grey low, alpha high, alpha low.
        pairs = _unpacked(data, path, "RGBA").astype(np.int64)
        samples = pairs[:, :, [0, 0, 0, 2]] * 256 + pairs[:, :, [1, 1, 1, 3]]
    else:
        # Pillow keeps one byte of two: the high one if it takes them for big-endian, the low one for little-endian.
        mode = "RGB" if data[25] == 2 else "RGBA"
        high, low = (_unpacked(data, path, f"{mode};16{order}").astype(np.int64) for order in "BL")
        samples = high * 256 + low
        if clear := _open(io.BytesIO(data), path).info.get("transparency"):
            samples[(samples == clear).all(axis=-1)] = 0
    pixels = _to_8_bits(samples)
    return pixels if pixels.shape[2] == 3 else _on_black(pixels)


def _unpacked(data: bytes, path: Path, layout: str) -> np.ndarray:
    """The pixels of a PNG whose bytes Pillow takes for another `layout` of the same width."""
    image = _open(io.BytesIO(data), path)
    assert isinstance(image, PngImageFile)
    image.tile = [tile._replace(args=layout) for tile in image.tile]
    return np.array(image)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Cameras and editors write broken EXIF around sound pixels.
        return 1
    return value if value in range(1, 9) else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """`pixels` as the EXIF orientation (1 to 8) wants them shown."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
