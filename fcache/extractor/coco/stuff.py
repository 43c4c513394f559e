"""COCO-Stuff's maps: a class for every pixel, things and stuff, beside the photos of COCO 2017.

    stuffthingmaps/{train,val}2017/NAME.png    (or stuffthingmaps/{train,val}): 0 … 181, and 255 where there is none

These are the maps of `stuffthingmaps_trainval2017.zip` (Caesar et al., "COCO-Stuff: Thing and Stuff Classes in
Context"), from which Hybrid Task Cascade learns: COCO's 91 category ids less one, the eleven without objects among
them, then 91 kinds of stuff.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from fcache.cache_spec.errors import DataError
from fcache.cache_spec.targets import IGNORE
from fcache.extractor.images import load_mask

FOLDER = "stuffthingmaps"
_LIST = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign,
stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat,
backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, mirror, dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair
drier, toothbrush, hair brush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other,
fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss,
mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing,
railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other,
stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick,
wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind,
window-other, wood
"""
STUFF_NAMES: tuple[str, ...] = tuple(_LIST.strip().replace("\n", " ").split(", "))


def stuff_maps(root: Path, split: str, photos: Sequence[str]) -> Mapping[str, tuple[str, int]] | None:
    """The map of every photo (named within its folder): its path below `root` and its bytes. None without maps.

    Raises DataError if there are maps, but not of this split or not of all photos.
    """
    if not (root / FOLDER).is_dir():
        return None
    folders = [f"{FOLDER}/{split}2017", f"{FOLDER}/{split}"]
    folder = next((name for name in folders if (root / name).is_dir()), None)
    otherwise = f"add them, or move {FOLDER} away: only the head htc needs such maps"
    if folder is None:
        raise DataError(f"{root}: expected maps in {' or '.join(folders)}, found neither folder; {otherwise}")
    with os.scandir(root / folder) as entries:
        sizes = {e.name: e.stat().st_size for e in entries if e.is_file()}
    names = {photo: PurePosixPath(photo).with_suffix(".png").name for photo in photos}
    if missing := sorted(n for n in names.values() if n not in sizes):
        raise DataError(
            f"{root / folder}: {len(missing)} of {len(names)} maps are missing, {missing[0]} first; {otherwise}"
        )
    return {photo: (f"{folder}/{name}", sizes[name]) for photo, name in names.items()}


def load_stuff(path: Path, size: tuple[int, int], *, classes: int) -> np.ndarray:
    """The labels uint8 [H, W] of a map for a photo of `size` (height, width), `IGNORE` where there is no class.

    Raises OSError if it cannot be read, DataError for another size or a value that is no class.
    """
    labels = load_mask(path)
    if labels.shape != size:
        raise DataError(
            f"{path}: the map has {labels.shape[1]}x{labels.shape[0]} pixels, its photo {size[1]}x{size[0]}; "
            "a photo and its map must have one size"
        )
    if wrong := np.unique(labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]).tolist():
        raise DataError(
            f"{path}: the value {wrong[0]} is no class, expected 0 to {classes - 1}, or {IGNORE} for none; "
            "correct the map, or name its classes in dataset.toml (stuff_names)"
        )
    return labels.astype(np.uint8)
