"""Moving scenes: short clips of one figure, whose class is how it moves, as a data set in Kinetics' layout.

No frame tells the class, and no set of frames without their order tells a motion from its opposite. The figure's place
is drawn evenly in a disc about the middle of the picture, its size evenly between two; a motion takes the place along
its chord of the disc or round the middle, or the size from one end to the other, at an even speed, and begins anew at
the end. All of them keep what is even as it is: each frame of a clip is as likely under one class as under any other,
and a clip seen backwards is one of the opposite class.
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
    "left": ("across", -1),
    "right": ("across", 1),
    "up": ("down", -1),
    "down": ("down", 1),
    "clockwise": ("round", 1),
    "counter-clockwise": ("round", -1),
    "growing": ("size", 1),
    "shrinking": ("size", -1),
}
# Frames of a whole round, from the fastest clips to the slowest; frames a second.
_ROUND, _RATE = (20.0, 28.0), 10
# The radii of the disc of places, and of the smallest and the largest figure, in shares of the picture's shorter side.
_PLACES, _RADIUS = 0.34, (0.1, 0.26)


@dataclass(frozen=True)
class MovingScene:
    """A figure before a ground: its `place` (across, down) in the unit disc, its `scale` in 0..1; `velocity` is the
    share of a round that `motion` does in a frame, negative the other way.
    """

    size: tuple[int, int]
    ground: Surface
    figure: Surface
    place: tuple[float, float]
    scale: float
    motion: str
    velocity: float

    def after(self, frames: float) -> "MovingScene":
        """The scene so many frames later."""
        (x, y), way = self.place, self.velocity * frames
        if self.motion == "across":
            return replace(self, place=(_along(x, y, way), y))
        if self.motion == "down":
            return replace(self, place=(x, _along(y, x, way)))
        if self.motion == "round":
            c, s = math.cos(2 * math.pi * way), math.sin(2 * math.pi * way)
            return replace(self, place=(c * x - s * y, s * x + c * y))
        return replace(self, scale=(self.scale + way) % 1)


def _along(at: float, beside: float, way: float) -> float:
    """A coordinate after a way along its chord of the unit disc, which begins anew at the end."""
    half = math.sqrt(max(1e-9, 1 - beside * beside))
    return half * (2 * (((at / half + 1) / 2 + way) % 1) - 1)


def make_moving_scene(seed: int, index: int, motion: str, *, size: tuple[int, int]) -> MovingScene:
    """Scene number `index` of `seed` for frames of (height, width); a pure function, any integers are allowed."""
    random = generator(seed, index, 2)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(random.random())

    # Any hues: a bright figure before a dark ground, so that what is learnt is where it goes and not what it is.
    ground, figure = (_toned(random_surface(between), *tones) for tones in ((0.1, 0.4), (0.7, 1.0)))
    distance, direction = math.sqrt(between(0, 1)), between(0, 2 * math.pi)
    place, scale = (distance * math.cos(direction), distance * math.sin(direction)), between(0, 1)
    changed, way = MOTIONS[motion]
    return MovingScene(size, ground, figure, place, scale, changed, way / between(*_ROUND))


def _toned(surface: Surface, low: float, high: float) -> Surface:
    """A surface whose colours, of 0..1, are brought between two tones."""

    def toned(colour: Colour) -> Colour:
        red, green, blue = (low + (high - low) * c for c in colour)
        return red, green, blue

    first, second = map(toned, surface.colours)
    return replace(surface, colours=(first, second))


def render_frames(scene: MovingScene, count: int) -> Iterator[np.ndarray]:
    """The first `count` frames of a scene, uint8 RGB [H, W, 3] each."""
    height, width = scene.size
    rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None] + 0.5
    ground = mix(scene.ground, noise(scene.ground.texture, columns * (7 / width) + 0 * rows, rows * (7 / height)))
    for number in range(count):
        now, side = scene.after(number), min(scene.size)
        radius = side * _RADIUS[0] * (_RADIUS[1] / _RADIUS[0]) ** now.scale
        p = (columns - width / 2 - side * _PLACES * now.place[0]) / radius
        q = (rows - height / 2 - side * _PLACES * now.place[1]) / radius
        cover = np.clip(0.5 - (np.sqrt(p * p + q * q) - 1) * radius, 0, 1)[..., None]
        disc = mix(scene.figure, noise(scene.figure.texture, p * 3 + 16, q * 3 + 16))
        image = ground * (1 - cover) + disc * cover
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
