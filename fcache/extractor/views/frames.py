"""Placements: which part of an image a view shows, at which size. Resize, crop and flip, all in one frame."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fcache.cache_spec.errors import SpecError
from fcache.extractor.views.draws import below, between, stream

Size = tuple[int, int]
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Frame:
    """A placement with all numbers drawn.

    The box `source` (top, left, height, width) of the image is resized to `resized` (height, width); of that the box
    `window` is kept, then mirrored left to right if `flipped`. Pixels of images are resized with antialiasing.
    """

    source: tuple[int, int, int, int]
    resized: Size
    window: tuple[int, int, int, int]
    flipped: bool
    interpolation: str

    @property
    def valid(self) -> Size:
        """(height, width) of what the frame shows."""
        return self.window[2], self.window[3]

    @property
    def matrix(self) -> np.ndarray:
        """The map from image points (x, y) to points of the frame, float64 [2, 3], pixel centres at half-integers."""
        top, left, height, width = self.source
        sx, sy = self.resized[1] / width, self.resized[0] / height
        x, y = -left * sx - self.window[1], -top * sy - self.window[0]
        if self.flipped:
            sx, x = -sx, self.window[3] - x
        return np.array([[sx, 0.0, x], [0.0, sy, y]])


@dataclass(frozen=True)
class ScaleCrop:
    """Training views of segmentation: keep-ratio rescale by a random factor, random crop, random flip.

    The image is scaled to fit `long` and `short` sides, both times a factor from `scale`: the largest size whose longer
    side is at most `long` and whose shorter side is at most `short` (mmcv's keep-ratio rescale). A picture smaller than
    `size` is padded to it. The crop does not look at the labels.
    """

    size: Size
    long: int
    short: int
    scale: tuple[float, float]
    flip: float
    interpolation: str = "bilinear"
    kind: str = "scale-crop"


@dataclass(frozen=True)
class KeepRatio:
    """Test views of segmentation: keep-ratio rescale to fit `long` and `short` sides, all of the image.

    The canvas is the result rounded up to a multiple: the size bucket.
    """

    long: int
    short: int
    interpolation: str = "bilinear"
    kind: str = "keep-ratio"


@dataclass(frozen=True)
class ResizedCrop:
    """Training views of classification: a random box with `scale` of the image's area and a `ratio` width / height,
    resized to `size`, random flip. After ten boxes that do not fit, the largest central one with an allowed ratio.
    """

    size: Size
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: str = "bicubic"
    kind: str = "resized-crop"


@dataclass(frozen=True)
class CentreCrop:
    """Test views of classification: the shorter side resized to `short`, then the centre of `size`."""

    size: Size
    short: int
    interpolation: str = "bicubic"
    kind: str = "centre-crop"


@dataclass(frozen=True)
class Fit:
    """The whole image as large as fits into `size` with its ratio kept, padded to `size`."""

    size: Size
    interpolation: str = "bilinear"
    kind: str = "fit"


Placement = ScaleCrop | KeepRatio | ResizedCrop | CentreCrop | Fit


def draw_frame(place: Placement, image_size: Size, numbers: np.ndarray) -> Frame:
    """The frame that `numbers` (uniform in [0, 1)) pick for an image of (height, width)."""
    return _KINDS[place.kind].draw(place, image_size, numbers)


def frame_canvas(place: Placement, image_size: Size, *, multiple: int) -> Size:
    """The padded (height, width) of a view: `place.size`, or for KeepRatio the resized image rounded up."""
    if isinstance(place, KeepRatio):
        height, width = rescaled(image_size, long=place.long, short=place.short)
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple
    return place.size


def resized_placement(place: Placement, size: Size) -> Placement:
    """The same placement for another input (height, width).

    Sides to fit grow with the shorter side of `size` and keep their ratio (512 with 2048, so 640 with 2560); CentreCrop
    keeps the share that it crops (224 of 256).
    """
    side = min(size)
    if isinstance(place, ScaleCrop):
        return replace(place, size=size, short=side, long=round(place.long * side / place.short))
    if isinstance(place, KeepRatio):
        return replace(place, short=side, long=round(place.long * side / place.short))
    if isinstance(place, CentreCrop):
        return replace(place, size=size, short=round(place.short * side / min(place.size)))
    return replace(place, size=size)


def scaled_placement(place: Placement, factor: float) -> Placement:
    """A test placement at `factor` times its size: sides to fit, and the crop of a CentreCrop, rounded down.

    This is mmsegmentation's rule for ratios of a test size: (2048, 512) times 0.75 is (1536, 384).
    Raises SpecError for a placement that is drawn at random.
    """
    if isinstance(place, (ScaleCrop, ResizedCrop)):
        raise SpecError(f"{type(place).__name__} is drawn at random; test-time views need KeepRatio, Fit or CentreCrop")

    def times(side: int) -> int:
        return max(1, int(side * factor))

    if isinstance(place, KeepRatio):
        return replace(place, long=times(place.long), short=times(place.short))
    size = (times(place.size[0]), times(place.size[1]))
    return (
        replace(place, size=size, short=times(place.short))
        if isinstance(place, CentreCrop)
        else replace(place, size=size)
    )


def largest_scale(place: Placement, image_size: Size) -> float:
    """At most how many columns of a view a column of an image of (height, width) becomes, on average."""
    if isinstance(place, ResizedCrop):
        return float(place.size[1])
    if isinstance(place, ScaleCrop):
        place = KeepRatio(long=math.ceil(place.long * place.scale[1]), short=math.ceil(place.short * place.scale[1]))
    return draw_frame(place, image_size, np.zeros(1)).resized[1] / image_size[1]


def check_placement(place: Placement) -> None:
    """Raises SpecError if a number of the placement makes no sense."""
    name = type(place).__name__
    sizes = [*getattr(place, "size", ()), *(getattr(place, k) for k in ("long", "short") if hasattr(place, k))]
    if any(not isinstance(n, int) or n < 1 for n in sizes):
        raise SpecError(f"{name}: sizes are positive whole numbers of pixels, got {sizes}")
    for key in ("scale", "ratio"):
        bounds = getattr(place, key, (1.0, 1.0))
        if not 0 < bounds[0] <= bounds[1]:
            raise SpecError(f"{name}: {key} is a range of positive numbers, got {bounds}")
    if not 0 <= getattr(place, "flip", 0.0) <= 1:
        raise SpecError(f"{name}: flip is a probability, got {place.flip}")  # type: ignore[union-attr]
    if place.interpolation not in INTERPOLATIONS:
        raise SpecError(f"{name}: interpolation is {' or '.join(INTERPOLATIONS)}, got {place.interpolation!r}")


def rescaled(image_size: Size, *, long: int, short: int) -> Size:
    """(height, width) scaled by one factor to the largest size within `long` and `short` sides."""
    factor = min(long / max(image_size), short / min(image_size))
    height, width = (max(1, int(n * factor + 0.5)) for n in image_size)
    return height, width


def _whole(image_size: Size) -> tuple[int, int, int, int]:
    return 0, 0, image_size[0], image_size[1]


def _scale_crop(place: ScaleCrop, image_size: Size, numbers: np.ndarray) -> Frame:
    u = stream(numbers)
    factor = between(next(u), place.scale)
    # A factor of a half of an odd side rounds down, as in mmcv.
    long, short = max(1, int(place.long * factor)), max(1, int(place.short * factor))
    resized = rescaled(image_size, long=long, short=short)
    height, width = min(place.size[0], resized[0]), min(place.size[1], resized[1])
    top, left = below(next(u), resized[0] - height + 1), below(next(u), resized[1] - width + 1)
    return Frame(_whole(image_size), resized, (top, left, height, width), next(u) < place.flip, place.interpolation)


def _keep_ratio(place: KeepRatio, image_size: Size, numbers: np.ndarray) -> Frame:
    resized = rescaled(image_size, long=place.long, short=place.short)
    return Frame(_whole(image_size), resized, _whole(resized), False, place.interpolation)


def _resized_crop(place: ResizedCrop, image_size: Size, numbers: np.ndarray) -> Frame:
    u = stream(numbers)
    flipped = next(u) < place.flip
    source = _random_box(place, image_size, u)
    return Frame(source, place.size, _whole(place.size), flipped, place.interpolation)


def _random_box(place: ResizedCrop, image_size: Size, u: Iterator[float]) -> tuple[int, int, int, int]:
    rows, columns = image_size
    logs = (math.log(place.ratio[0]), math.log(place.ratio[1]))
    for _ in range(10):
        area = rows * columns * between(next(u), place.scale)
        ratio = math.exp(between(next(u), logs))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = next(u), next(u)
        if 0 < width <= columns and 0 < height <= rows:
            return below(top, rows - height + 1), below(left, columns - width + 1), height, width
    ratio = min(max(columns / rows, place.ratio[0]), place.ratio[1])
    width = min(columns, max(1, round(rows * ratio)))
    height = min(rows, max(1, round(columns / ratio)))
    return (rows - height) // 2, (columns - width) // 2, height, width


def _centre_crop(place: CentreCrop, image_size: Size, numbers: np.ndarray) -> Frame:
    short = min(image_size)
    height, width = (max(1, int(place.short * n / short)) for n in image_size)
    kept = min(place.size[0], height), min(place.size[1], width)
    window = (round((height - kept[0]) / 2), round((width - kept[1]) / 2), *kept)
    return Frame(_whole(image_size), (height, width), window, False, place.interpolation)


def _fit(place: Fit, image_size: Size, numbers: np.ndarray) -> Frame:
    factor = min(place.size[0] / image_size[0], place.size[1] / image_size[1])
    height = min(place.size[0], max(1, int(image_size[0] * factor + 0.5)))
    width = min(place.size[1], max(1, int(image_size[1] * factor + 0.5)))
    return Frame(_whole(image_size), (height, width), (0, 0, height, width), False, place.interpolation)


@dataclass(frozen=True)
class _Kind:
    options: type
    draw: Callable[..., Frame]


_KINDS = {
    "scale-crop": _Kind(ScaleCrop, _scale_crop),
    "keep-ratio": _Kind(KeepRatio, _keep_ratio),
    "resized-crop": _Kind(ResizedCrop, _resized_crop),
    "centre-crop": _Kind(CentreCrop, _centre_crop),
    "fit": _Kind(Fit, _fit),
}
PLACEMENTS: dict[str, type] = {name: kind.options for name, kind in _KINDS.items()}
