"""Scenes as data: what stands where, how it moves, and where the camera and the light are.

Metres, x to the right, y up from the ground, z away from the camera; angles in radians, counter-clockwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CLASSES = ("sky", "ground", "wall", "disc", "box", "triangle", "star", "ring", "post", "blob")
# A thing of no class: drawn, but labelled as nothing.
CLUTTER = "clutter"
_FLYING = ("star",)
_ROLLING = ("disc", "ring")
_COUNTS = (4, 8)

Colour = tuple[float, float, float]
Between = Callable[[float, float], float]


@dataclass(frozen=True)
class Camera:
    """A level pinhole camera `height` metres above the ground: focal length and horizon row in pixels."""

    focal: float
    horizon: float
    centre: float
    height: float


@dataclass(frozen=True)
class Surface:
    """Two RGB colours in 0..1 that a class's texture mixes, and the texture's seed."""

    colours: tuple[Colour, Colour]
    texture: int


@dataclass(frozen=True)
class Wall:
    """An upright wall facing the camera: from `left` to `right`, `top` high, at `depth`."""

    left: float
    right: float
    top: float
    depth: float
    surface: Surface


@dataclass(frozen=True)
class Thing:
    """A figure facing the camera: centre, size (half the height of most), turn, and how they change a second."""

    name: str
    position: tuple[float, float, float]
    velocity: tuple[float, float, float]
    radius: float
    angle: float
    spin: float
    surface: Surface

    def at(self, time: float) -> "Thing":
        """The thing `time` seconds later; nothing comes nearer than a metre."""
        x, y, z = (p + time * v for p, v in zip(self.position, self.velocity, strict=True))
        moved = (x, y, max(z, 1.0))
        return Thing(
            self.name, moved, self.velocity, self.radius, self.angle + time * self.spin, self.spin, self.surface
        )


@dataclass(frozen=True)
class Scene:
    """A whole scene at time 0; `light` points to the light in the picture plane (x right, y up), unit length."""

    key: tuple[int, int]
    size: tuple[int, int]
    camera: Camera
    light: tuple[float, float]
    sky: Surface
    ground: Surface
    wall: Wall | None
    things: tuple[Thing, ...]


def make_scene(seed: int, index: int, *, size: tuple[int, int]) -> Scene:
    """Scene number `index` of `seed` for pictures of (height, width); a pure function, any integers are allowed."""
    random = generator(seed, index, 0)
    height, width = size

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(random.random())

    camera = Camera(
        focal=0.9 * min(size), horizon=height * between(0.35, 0.5), centre=width / 2, height=between(1.4, 1.8)
    )
    bearing = between(0.15, 0.85) * math.pi
    sky, ground = random_surface(between), random_surface(between)
    wall = None
    if between(0, 1) < 0.8:
        depth = between(13, 20)
        middle, half = between(-6, 6), between(3, 8)
        wall = Wall(middle - half, middle + half, between(2.5, 5.5), depth, random_surface(between))
    count = int(between(_COUNTS[0], _COUNTS[1] + 1))
    things = tuple(_thing(between, random_surface(between), camera, width) for _ in range(count))
    return Scene((seed, index), size, camera, (math.cos(bearing), math.sin(bearing)), sky, ground, wall, things)


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for a key of integers."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([k % 2**64 for k in key])))


def random_surface(between: Between) -> Surface:
    """Two colours of any hue that can be told apart, and a texture."""
    first, second = _colour(between), _colour(between)
    while max(abs(a - b) for a, b in zip(first, second, strict=True)) < 0.35:
        second = _colour(between)
    return Surface((first, second), int(between(0, 1) * 2**31))


def _colour(between: Between) -> Colour:
    # Any hue for any class: colour alone must not tell the class.
    return between(0.08, 0.92), between(0.08, 0.92), between(0.08, 0.92)


def _thing(between: Between, surface: Surface, camera: Camera, width: int) -> Thing:
    names = CLASSES[3:]
    pick = between(0, len(names) + 0.5)
    name = names[int(pick)] if pick < len(names) else CLUTTER
    z = between(2.5, 10.0)
    radius = between(0.45, 0.9)
    if name == "post":
        radius = between(0.9, 1.5)
    # Centres lie within the picture, whatever the depth.
    x = between(-0.45, 0.45) * width * z / camera.focal
    y = between(1.9, 3.2) if name in _FLYING else radius * (0.75 if name == "box" else 1.0)
    vx = between(-1.2, 1.2)
    vz = between(-0.5, 0.5)
    tilt = between(-0.25, 0.25)
    turn = between(-math.pi, math.pi)
    if name in _ROLLING:
        return Thing(name, (x, y, z), (vx, 0.0, vz), radius, turn, -vx / radius, surface)
    if name in _FLYING or name == CLUTTER:
        return Thing(name, (x, y, z), (vx, 0.0, vz), radius, turn, between(-1.5, 1.5), surface)
    if name == "post":
        return Thing(name, (x, y, z), (0.0, 0.0, 0.0), radius, tilt / 3, 0.0, surface)
    return Thing(name, (x, y, z), (vx, 0.0, vz), radius, tilt, 0.0, surface)
