"""Moving scenes: short clips of one figure, whose class is how it moves, as a data set in Kinetics' layout.

No frame tells the class, and no set of frames without their order does: where the figure is, how it is turned and how
large it is are drawn evenly for every clip, and a motion takes one of them round a closed way at an even speed. So each
frame of a clip is as likely under one class as under any other, and a clip seen backwards is one of the opposite class.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fcache.cache_spec.errors import SpecError
from fcache.extractor.scenes.avi import avi_bytes
from fcache.extractor.scenes.files import new_scenes
from fcache.extractor.scenes.scene import Colour, Surface, generator, random_surface
from fcache.extractor.scenes.texture import mix, noise

# What of the figure a motion changes, and which way.
MOTIONS = {
    "left": ("x", -1),
    "right": ("x", 1),
    "up": ("y", -1),
    "down": ("y", 1),
    "clockwise": ("angle", 1),
    "counter-clockwise": ("angle", -1),
    "growing": ("size", 1),
    "shrinking": ("size", -1),
}
# Frames of one way round, from the fastest clips to the slowest; frames a second.
_ROUND, _RATE = (13.0, 18.0), 10
# The figure's radius in shares of the picture's shorter side; growing past the end it begins anew.
_RADIUS = (0.15, 0.38)


@dataclass(frozen=True)
class MovingScene:
    """A figure before a ground: `x`, `y`, `angle` and `size` are phases in 0..1, `velocity` their change a frame."""

    size: tuple[int, int]
    ground: Surface
    figure: Surface
    phases: dict[str, float]
    velocity: dict[str, float]


def make_moving_scene(seed: int, index: int, motion: str, *, size: tuple[int, int]) -> MovingScene:
    """Scene number `index` of `seed` for frames of (height, width); a pure function, any integers are allowed."""
    random = generator(seed, index, 2)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(random.random())

    # Any hues: the ground is of middle brightness, of the figure one half is dark and the other one bright.
    ground = _toned(random_surface(between), (0.3, 0.7), (0.3, 0.7))
    figure = _toned(random_surface(between), (0.0, 0.4), (0.6, 1.0))
    phases = {name: between(0, 1) for name in ("x", "y", "angle", "size")}
    changed, way = MOTIONS[motion]
    return MovingScene(size, ground, figure, phases, {changed: way / between(*_ROUND)})


def _toned(surface: Surface, *ranges: tuple[float, float]) -> Surface:
    """A surface whose colours, of 0..1, are brought into a range each."""

    def toned(colour: Colour, low: float, high: float) -> Colour:
        red, green, blue = (low + (high - low) * c for c in colour)
        return red, green, blue

    first, second = (toned(c, *r) for c, r in zip(surface.colours, ranges, strict=True))
    return replace(surface, colours=(first, second))


def render_frames(scene: MovingScene, count: int) -> Iterator[np.ndarray]:
    """The first `count` frames of a scene, uint8 RGB [H, W, 3] each."""
    height, width = scene.size
    rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None] + 0.5
    ground = mix(scene.ground, noise(scene.ground.texture, columns * (7 / width) + 0 * rows, rows * (7 / height)))
    for number in range(count):
        at = {name: (phase + number * scene.velocity.get(name, 0.0)) % 1 for name, phase in scene.phases.items()}
        radius = min(scene.size) * _RADIUS[0] * (_RADIUS[1] / _RADIUS[0]) ** at["size"]
        # The picture has no edges: what leaves it on one side comes in on the other.
        right = ((columns - at["x"] * width + width / 2) % width - width / 2) / radius
        down = ((rows - at["y"] * height + height / 2) % height - height / 2) / radius
        c, s = math.cos(2 * math.pi * at["angle"]), math.sin(2 * math.pi * at["angle"])
        p, q = c * right + s * down, c * down - s * right
        # A disc of two halves: never the same when turned.
        halves = np.clip(0.5 + p * radius, 0, 1) * 0.8 + 0.2 * noise(scene.figure.texture, p * 3 + 16, q * 3 + 16)
        cover = np.clip(0.5 - (np.sqrt(p * p + q * q) - 1) * radius, 0, 1)[..., None]
        image = ground * (1 - cover) + mix(scene.figure, halves) * cover
        yield np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def write_moving_scenes(
    root: Path, *, train: int, val: int, size: tuple[int, int] = (128, 128), frames: int = 24, seed: int = 0
) -> None:
    """Writes `train` and `val` clips (AVI, motion JPEG) of (height, width) to `root`, in folders of eight classes.

    Beside them are `classes.txt`, and `train.csv` and `val.csv` with a path and a class number a line. Classes take
    turns, so that eight clips have one each. Equal arguments give equal bytes; a clip does not depend on how many
    others there are. Nothing is at `root` until all is written. Raises SpecError if `root` holds something already or a
    number makes no sense.
    """
    if frames < 1:
        raise SpecError(f"a clip has at least one frame, got {frames}")
    with new_scenes(root, train=train, val=val, size=size) as partial:
        for split, count in (("train", train), ("val", val)):
            lines: list[str] = []
            for i in range(count):
                label = i % len(MOTIONS)
                motion = list(MOTIONS)[label]
                # Negative numbers for validation: more training clips never shift them.
                scene = make_moving_scene(seed, i if split == "train" else -1 - i, motion, size=size)
                path = Path(split) / motion / f"{i:06d}.avi"
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                jpegs = [_jpeg(frame) for frame in render_frames(scene, frames)]
                (partial / path).write_bytes(avi_bytes(jpegs, size=size, rate=_RATE))
                lines.append(f"{path.as_posix()} {label}")
            (partial / f"{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (partial / "classes.txt").write_text("\n".join(MOTIONS) + "\n", encoding="utf-8")


def _jpeg(frame: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, "JPEG", quality=92)
    return stream.getvalue()
