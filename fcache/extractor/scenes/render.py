"""Rendering a scene at a moment: the photo, and every annotation that it could have."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fcache.cache_spec.targets import IGNORE
from fcache.extractor.scenes.scene import CLASSES, CLUTTER, Scene, Thing, generator
from fcache.extractor.scenes.texture import mix, noise

# In the frame of a thing, whose half height is 1: its centre and its ends, (right, up).
_KEYPOINTS = np.array([(0.0, 0.0), (0.0, 0.85), (0.85, 0.0), (0.0, -0.85), (-0.85, 0.0)])
_REACH = 1.15


@dataclass(frozen=True)
class Rendered:
    """A picture and its annotations; N things in the scene's order.

    `image` uint8 RGB [H, W, 3]; `semantic` uint8 [H, W], indices of CLASSES, 255 on clutter; `instances` int32 [H, W],
    0 or number of the thing + 1; `depth` float32 [H, W] in metres, 0 for the sky; `labels` int32 [N], -1 for clutter;
    `boxes` float32 [N, 4] of the visible pixels as (left, top, right, bottom), zeros if there are none; `visible` int64
    [N] counts them; `keypoints` float32 [N, 5, 3]: x, y and 2 seen, 1 hidden, 0 outside the picture.
    """

    image: np.ndarray
    semantic: np.ndarray
    instances: np.ndarray
    depth: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    visible: np.ndarray
    keypoints: np.ndarray


def render(scene: Scene, *, time: float = 0.0) -> Rendered:
    """The scene `time` seconds after its start; a pure function."""
    height, width = scene.size
    rows = np.arange(height, dtype=np.float32)[:, None] + 0.5
    columns = np.arange(width, dtype=np.float32)[None] + 0.5
    image, semantic, depth = _stuff(scene, rows, columns)
    instances = np.zeros((height, width), dtype=np.int32)
    things = [thing.at(time) for thing in scene.things]
    for thing in things:
        _shadow(scene, thing, image, semantic, rows, columns)
    for number in sorted(range(len(things)), key=lambda i: -things[i].position[2]):
        _draw(scene, things[number], number + 1, image, semantic, instances, depth)
    grain = generator(*scene.key, 1, round(time * 1000)).standard_normal(image.shape, dtype=np.float32)
    pixels = np.clip(np.rint((image + 0.012 * grain) * 255), 0, 255).astype(np.uint8)
    labels = np.array([_label(t.name) for t in things], dtype=np.int32)
    boxes, visible = _boxes(instances, len(things))
    keypoints = np.stack([_keypoints(scene, t, i + 1, instances) for i, t in enumerate(things)])
    return Rendered(pixels, semantic, instances, depth, labels, boxes, visible, keypoints)


def _label(name: str) -> int:
    return -1 if name == CLUTTER else CLASSES.index(name)


def _stuff(scene: Scene, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sky, ground and wall: image float32 [H, W, 3], semantic and depth."""
    camera, (height, width) = scene.camera, scene.size
    image = np.empty((height, width, 3), dtype=np.float32)
    semantic = np.zeros((height, width), dtype=np.uint8)
    depth = np.zeros((height, width), dtype=np.float32)
    horizon = round(camera.horizon)
    above, below = rows[:horizon], rows[horizon:]
    clouds = noise(scene.sky.texture, columns * (5 / width) + 0 * above, above * (9 / height) + 0 * columns)
    image[:horizon] = mix(scene.sky, 0.75 * clouds + 0.25 * above / height)
    # The nearest rows to the horizon would be infinitely far.
    z = np.minimum(camera.focal * camera.height / np.maximum(below - camera.horizon, 0.5), 60.0)
    x = (columns - camera.centre) * z / camera.focal
    gravel = 0.6 * noise(scene.ground.texture, x * 6, z * 6 + 0 * x) + 0.4 * noise(
        scene.ground.texture + 1, x * 1.5, z * 1.5 + 0 * x
    )
    image[horizon:] = mix(scene.ground, gravel)
    semantic[horizon:] = CLASSES.index("ground")
    depth[horizon:] = z
    if wall := scene.wall:
        scale = camera.focal / wall.depth
        left, right = (round(camera.centre + v * scale) for v in (wall.left, wall.right))
        top = round(camera.horizon + (camera.height - wall.top) * scale)
        bottom = round(camera.horizon + camera.height * scale)
        box = np.s_[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        y = camera.height - (rows[box[0]] - camera.horizon) / scale
        x = (columns[:, box[1]] - camera.centre) / scale
        course = np.floor(y / 0.5)
        joint = np.minimum(_edge(y / 0.5), _edge(x / 1.1 + 0.5 * (course % 2)) * 2.2)
        bricks = np.clip(joint * 6, 0, 1) * (0.75 + 0.25 * noise(wall.surface.texture, x * 3, y * 3 + 0 * x))
        image[box] = mix(wall.surface, bricks) * (0.8 + 0.2 * scene.light[1])
        semantic[box] = CLASSES.index("wall")
        depth[box] = wall.depth
    return image, semantic, depth


def _edge(x: np.ndarray) -> np.ndarray:
    """Distance to the nearest whole number."""
    return np.abs(x - np.rint(x))


def _place(scene: Scene, thing: Thing) -> tuple[float, float, float]:
    """Centre column and row, and pixels a unit of the thing's frame."""
    x, y, z = thing.position
    scale = scene.camera.focal / z
    return (
        scene.camera.centre + x * scale,
        scene.camera.horizon + (scene.camera.height - y) * scale,
        thing.radius * scale,
    )


def _box_around(
    column: float, row: float, reach_x: float, reach_y: float, size: tuple[int, int]
) -> tuple[slice, slice]:
    top, bottom = max(0, int(row - reach_y)), min(size[0], int(row + reach_y) + 2)
    left, right = max(0, int(column - reach_x)), min(size[1], int(column + reach_x) + 2)
    return np.s_[top : max(top, bottom), left : max(left, right)]


def _shadow(
    scene: Scene, thing: Thing, image: np.ndarray, semantic: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> None:
    """Darkens the ground under a thing, away from the light."""
    _, _, z = thing.position
    scale = scene.camera.focal / z
    column, _, radius = _place(scene, thing)
    row = scene.camera.horizon + scene.camera.height * scale
    wide = radius * (0.3 if thing.name == "post" else 0.9)
    column -= scene.light[0] * wide * 0.5
    box = _box_around(column, row, wide * 1.2, wide * 0.4, scene.size)
    distance = ((columns[:, box[1]] - column) / wide) ** 2 + ((rows[box[0]] - row) / (0.25 * wide)) ** 2
    dark = 1 - 0.5 * np.clip(1.2 - distance, 0, 1)
    ground = semantic[box] == CLASSES.index("ground")
    image[box] *= np.where(ground, dark, 1.0)[..., None].astype(np.float32)


def _draw(
    scene: Scene,
    thing: Thing,
    number: int,
    image: np.ndarray,
    semantic: np.ndarray,
    instances: np.ndarray,
    depth: np.ndarray,
) -> None:
    column, row, scale = _place(scene, thing)
    box = _box_around(column, row, scale * _REACH, scale * _REACH, scene.size)
    down, right = np.mgrid[box].astype(np.float32) + 0.5
    right, up = (right - column) / scale, (row - down) / scale
    c, s = math.cos(thing.angle), math.sin(thing.angle)
    p, q = c * right + s * up, c * up - s * right
    figure = _FIGURES[thing.name]
    distance = figure.outline(p, q, thing.surface.texture)
    share = figure.texture(p, q, thing.surface.texture)
    colour = mix(thing.surface, np.clip(share, 0, 1)) * _shade(scene, right, up, round_=figure.round)[..., None]
    # The photo is antialiased over one pixel; its labels are not.
    cover = np.clip(0.5 - distance * scale, 0, 1)[..., None]
    image[box] = image[box] * (1 - cover) + np.clip(colour, 0, 1) * cover
    inside = distance < 0
    label = _label(thing.name)
    semantic[box][inside] = IGNORE if label < 0 else label
    instances[box][inside] = number
    depth[box][inside] = thing.position[2]


def _shade(scene: Scene, right: np.ndarray, up: np.ndarray, *, round_: bool) -> np.ndarray:
    towards = right * scene.light[0] + up * scene.light[1]
    if not round_:
        return 0.85 + 0.15 * towards
    facing = np.sqrt(np.clip(1 - right**2 - up**2, 0, 1))
    return 0.45 + 0.45 * np.clip(0.7 * towards + 0.7 * facing, 0, 1)


def _boxes(instances: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    boxes = np.zeros((count, 4), dtype=np.float32)
    visible = np.bincount(instances.ravel(), minlength=count + 1)[1:]
    for i in np.flatnonzero(visible):
        mask = instances == i + 1
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes, visible


def _keypoints(scene: Scene, thing: Thing, number: int, instances: np.ndarray) -> np.ndarray:
    column, row, scale = _place(scene, thing)
    c, s = math.cos(thing.angle), math.sin(thing.angle)
    right = c * _KEYPOINTS[:, 0] - s * _KEYPOINTS[:, 1]
    up = s * _KEYPOINTS[:, 0] + c * _KEYPOINTS[:, 1]
    x, y = column + right * scale, row - up * scale
    height, width = scene.size
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    at = instances[np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)]
    return np.stack([x, y, np.where(inside, np.where(at == number, 2, 1), 0)], axis=-1).astype(np.float32)


@dataclass(frozen=True)
class _Figure:
    """Signed distance to the outline (below 0 inside) and texture in 0..1, over the thing's own (right, up)."""

    outline: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    texture: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    round: bool = False


def _radius(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.sqrt(p * p + q * q)


def _bands(x: np.ndarray) -> np.ndarray:
    """Soft-edged stripes with one dark and one light stripe a unit."""
    return np.clip(0.5 + 1.5 * np.sin(2 * np.pi * x), 0, 1)


def _star(p: np.ndarray, q: np.ndarray, texture: int) -> np.ndarray:
    # Folded into one of the ten like halves of the five tips, whose edge is one straight line.
    sector, inner = math.pi / 5, 0.45
    turn = np.abs((np.arctan2(p, q) + sector) % (2 * sector) - sector)
    radius = _radius(p, q)
    x, y = inner * math.cos(sector) - 1.0, inner * math.sin(sector)
    return ((radius * np.cos(turn) - 1.0) * y - radius * np.sin(turn) * x) / math.hypot(x, y)


def _lobes(p: np.ndarray, q: np.ndarray, texture: int) -> np.ndarray:
    a, b = texture % 97 / 15.0, texture % 89 / 14.0
    turn = np.arctan2(q, p)
    return _radius(p, q) - (0.8 + 0.09 * np.sin(3 * turn + a) + 0.09 * np.sin(7 * turn + b))


_FIGURES: dict[str, _Figure] = {
    "disc": _Figure(lambda p, q, t: _radius(p, q) - 1.0, lambda p, q, t: _bands(_radius(p, q) * 2.5), round=True),
    "box": _Figure(
        lambda p, q, t: np.maximum(np.abs(p) - 0.95, np.abs(q) - 0.75),
        lambda p, q, t: np.clip(np.minimum(_edge(p * 2), _edge(q * 2)) * 8 - 0.6, 0, 1),
    ),
    "triangle": _Figure(
        lambda p, q, t: np.maximum(-0.95 - q, (2 * np.abs(p) + q - 0.95) / math.sqrt(5)),
        lambda p, q, t: _bands((p + q) * 2.2),
    ),
    "star": _Figure(_star, lambda p, q, t: np.clip(3 * noise(t, p * 9, q * 9) - 1, 0, 1)),
    "ring": _Figure(
        lambda p, q, t: np.abs(_radius(p, q) - 0.76) - 0.23, lambda p, q, t: _bands(np.arctan2(q, p) * (9 / 2 / np.pi))
    ),
    "post": _Figure(lambda p, q, t: np.maximum(np.abs(p) - 0.13, np.abs(q) - 1.0), lambda p, q, t: _bands(q * 3.5)),
    "blob": _Figure(_lobes, lambda p, q, t: noise(t, p * 5, q * 5), round=True),
    CLUTTER: _Figure(
        lambda p, q, t: np.minimum(
            np.maximum(np.abs(p) - 0.2, np.abs(q) - 0.9), np.maximum(np.abs(q) - 0.2, np.abs(p) - 0.9)
        ),
        lambda p, q, t: np.zeros_like(p),
    ),
}
