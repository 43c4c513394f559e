"""Looks: random changes of a view's pixels, drawn as steps before any is applied."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fcache.extractor.views.draws import Step, below, between, normal, stream

Size = tuple[int, int]


@dataclass(frozen=True)
class PhotometricDistortion:
    """Brightness, contrast, saturation and hue, each with probability one half, as in mmseg.

    `brightness` is added (of 255), `contrast` and `saturation` (of HSV) multiply, `hue` turns the hue by up to so many
    of 180 steps. Contrast comes before or after saturation and hue with equal probability.
    """

    brightness: int = 32
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    kind: str = "photometric-distortion"


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation, each blended by a factor from 1 - `strength` to 1 + `strength`, in random
    order.
    """

    strength: float
    kind: str = "colour-jitter"


@dataclass(frozen=True)
class RandAugment:
    """`operations` random ones of fifteen, each applied with `probability` at a magnitude (of 10) drawn from a normal
    distribution around `magnitude` with `deviation`; the magnitudes of all operations grow in strength.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    operations: int = 2
    probability: float = 0.5
    kind: str = "rand-augment"


@dataclass(frozen=True)
class Erasing:
    """With `probability` one box with a share `area` of the view and a `ratio` height / width becomes noise."""

    probability: float
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 10 / 3)
    kind: str = "erasing"


Look = PhotometricDistortion | ColourJitter | RandAugment | Erasing


def draw_steps(look: Look, size: Size, numbers: np.ndarray) -> tuple[Step, ...]:
    """The steps that `numbers` (uniform in [0, 1)) pick for a view of (height, width)."""
    return _DRAWS[look.kind](look, size, numbers)


def _photometric_distortion(look: PhotometricDistortion, size: Size, numbers: np.ndarray) -> tuple[Step, ...]:
    u = stream(numbers)
    contrast_first = next(u) < 0.5
    brightness = _half(u, "add", lambda v: between(v, (-look.brightness, look.brightness)))
    contrast = _half(u, "multiply", lambda v: between(v, look.contrast))
    saturation = _half(u, "saturate", lambda v: between(v, look.saturation))
    # Whole steps from -hue to hue - 1, as numpy's randint draws them.
    hue = _half(u, "turn-hue", lambda v: (below(v, 2 * look.hue) - look.hue) / 180)
    return brightness + (contrast if contrast_first else ()) + saturation + hue + (() if contrast_first else contrast)


def _half(u: Iterator[float], name: str, value: Callable[[float], float]) -> tuple[Step, ...]:
    # Both numbers are always taken, so that one step's presence never changes another's value.
    chosen, v = next(u), next(u)
    return (Step(name, (value(v),)),) if chosen < 0.5 else ()


def _colour_jitter(look: ColourJitter, size: Size, numbers: np.ndarray) -> tuple[Step, ...]:
    u = stream(numbers)
    bounds = (max(0.0, 1 - look.strength), 1 + look.strength)
    steps = [Step(name, (between(next(u), bounds),)) for name in ("brightness", "contrast", "colour")]
    return tuple(step for _, step in sorted(((next(u), i), step) for i, step in enumerate(steps)))


def _rand_augment(look: RandAugment, size: Size, numbers: np.ndarray) -> tuple[Step, ...]:
    u = stream(numbers)
    steps: tuple[Step, ...] = ()
    for _ in range(look.operations):
        operation, chosen, spread, sign = below(next(u), len(_OPERATIONS)), next(u), next(u), next(u)
        level = min(max(look.magnitude + look.deviation * normal(spread), 0.0), 10.0) / 10
        if chosen < look.probability:
            steps += (_OPERATIONS[operation](level, -1.0 if sign < 0.5 else 1.0, size),)
    return steps


def _blend(name: str) -> Callable[[float, float, Size], Step]:
    return lambda level, sign, size: Step(name, (max(0.1, 1 + sign * 0.9 * level),))


def _rotate(level: float, sign: float, size: Size) -> Step:
    c, s = math.cos(math.radians(30 * level)), sign * math.sin(math.radians(30 * level))
    x, y = size[1] / 2, size[0] / 2
    return Step("warp", (c, -s, x - c * x + s * y, s, c, y - s * x - c * y))


_OPERATIONS: tuple[Callable[[float, float, Size], Step], ...] = (
    lambda level, sign, size: Step("auto-contrast"),
    lambda level, sign, size: Step("equalize"),
    lambda level, sign, size: Step("invert"),
    _rotate,
    lambda level, sign, size: Step("posterize", (4 - int(4 * level),)),
    lambda level, sign, size: Step("solarize", (256 - min(256, int(256 * level)),)),
    lambda level, sign, size: Step("solarize-add", (min(128, int(110 * level)),)),
    _blend("colour"),
    _blend("contrast"),
    _blend("brightness"),
    _blend("sharpness"),
    lambda level, sign, size: Step("warp", (1.0, sign * 0.3 * level, 0.0, 0.0, 1.0, 0.0)),
    lambda level, sign, size: Step("warp", (1.0, 0.0, 0.0, sign * 0.3 * level, 1.0, 0.0)),
    lambda level, sign, size: Step("warp", (1.0, 0.0, sign * 0.45 * level * size[1], 0.0, 1.0, 0.0)),
    lambda level, sign, size: Step("warp", (1.0, 0.0, 0.0, 0.0, 1.0, sign * 0.45 * level * size[0])),
)


def _erasing(look: Erasing, size: Size, numbers: np.ndarray) -> tuple[Step, ...]:
    u = stream(numbers)
    # The noise has its own key, which a float holds exactly.
    chosen, key = next(u), below(next(u), 2**53)
    if chosen >= look.probability:
        return ()
    for _ in range(10):
        area = size[0] * size[1] * between(next(u), look.area)
        ratio = math.exp(between(next(u), (math.log(look.ratio[0]), math.log(look.ratio[1]))))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        top, left = next(u), next(u)
        if 0 < height < size[0] and 0 < width < size[1]:
            box = (below(top, size[0] - height + 1), below(left, size[1] - width + 1), height, width)
            return (Step("erase", (*map(float, box), float(key))),)
    return ()


_DRAWS: dict[str, Callable[..., tuple[Step, ...]]] = {
    "photometric-distortion": _photometric_distortion,
    "colour-jitter": _colour_jitter,
    "rand-augment": _rand_augment,
    "erasing": _erasing,
}
LOOKS: dict[str, type] = {
    "photometric-distortion": PhotometricDistortion,
    "colour-jitter": ColourJitter,
    "rand-augment": RandAugment,
    "erasing": Erasing,
}
