"""Kinds of target and the arrays that hold them.

Every kind is a function from (limits, canvas, role) to the arrays of one record. Ragged axes are padded to a maximum
in `limits`, which is fixed when a group is created. Evaluation groups also hold the ground truth at original size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fcache.cache_spec.arrays import ArraySpec
from fcache.cache_spec.errors import SpecError, unknown_name

IGNORE = 255
Limits = Mapping[str, int]


@dataclass(frozen=True)
class Kind:
    """One kind of target: `arrays(limits, canvas, role)` and the names of the limits that it needs."""

    arrays: Callable[[Limits, tuple[int, int], str], tuple[ArraySpec, ...]]
    limits: tuple[str, ...] = ()
    evaluation_limits: tuple[str, ...] = ()


def _ragged(path: str, dtype: str, shape: tuple[int, ...]) -> ArraySpec:
    return ArraySpec(path=path, dtype=dtype, shape=shape, compression="zstd", ragged=True)


def _bytes(path: str, limit: int) -> ArraySpec:
    return _ragged(path, "uint8", (limit,))


def _semantic(limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    arrays = (ArraySpec("semantic/map", "uint8", canvas, fill=IGNORE, compression="zstd"),)
    if role == "evaluation":
        arrays += (_bytes("semantic/truth", limits["semantic_truth_bytes"]),)
    return arrays


def _class(limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    return (ArraySpec("class/label", "int32", (), fill=-1, layout="table"),)


def _clip(limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    return (ArraySpec("clip/label", "int32", (), fill=-1, layout="table"),)


def _instances(limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    """One entry for every annotated object that the view shows, crowds included, in the order of the source.

    An object is left out if less than one pixel of its mask, or less than one pixel of its box's width or height, lies
    in the view. Boxes are (x0, y0, x1, y1) in pixels of the view: the annotated box mapped by `View.to_view`, or, where
    that exceeds the valid part, the box round what the view shows of the mask. Labels count from 0 in the order of
    `TargetSpec.class_names`; `area` is that of the mask in the view; ids are the source's. Masks are compressed run
    lengths of COCO at the canvas's size.

    The ground truth is UTF-8 JSON, {"image": {"id", "height", "width"}, "annotations": [{"id", "image_id",
    "category_id", "bbox", "area", "iscrowd", "segmentation": {"size", "counts"}}, …]}: all annotations of the image at
    its original size, those that the view does not show too; category ids are those of `TargetSpec.conversion`.
    """
    m = limits["instances"]
    arrays = (
        _ragged("instances/boxes", "float32", (m, 4)),
        _ragged("instances/labels", "int32", (m,)),
        _ragged("instances/crowd", "uint8", (m,)),
        _ragged("instances/area", "float32", (m,)),
        _ragged("instances/ids", "int64", (m,)),
        _bytes("instances/rle", limits["instances_rle_bytes"]),
        _ragged("instances/rle_ends", "int32", (m,)),
    )
    if role == "evaluation":
        arrays += (_bytes("instances/truth", limits["instances_truth_bytes"]),)
    return arrays


def _keypoints(limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    arrays = (
        _ragged("keypoints/points", "float32", (limits["people"], limits["keypoints"], 3)),
        _ragged("keypoints/boxes", "float32", (limits["people"], 4)),
        _ragged("keypoints/area", "float32", (limits["people"],)),
    )
    if role == "evaluation":
        arrays += (_bytes("keypoints/truth", limits["keypoints_truth_bytes"]),)
    return arrays


def _depth(limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    arrays = (ArraySpec("depth/map", "float32", canvas, compression="zstd"),)
    if role == "evaluation":
        arrays += (_bytes("depth/truth", limits["depth_truth_bytes"]),)
    return arrays


KINDS: Mapping[str, Kind] = {
    "class": Kind(_class),
    "clip": Kind(_clip),
    "semantic": Kind(_semantic, evaluation_limits=("semantic_truth_bytes",)),
    "instances": Kind(_instances, ("instances", "instances_rle_bytes"), ("instances_truth_bytes",)),
    "keypoints": Kind(_keypoints, ("people", "keypoints"), ("keypoints_truth_bytes",)),
    "depth": Kind(_depth, evaluation_limits=("depth_truth_bytes",)),
}


def target_arrays(kind: str, *, limits: Limits, canvas: tuple[int, int], role: str) -> tuple[ArraySpec, ...]:
    """The arrays of one kind (without their count arrays). Raises SpecError for an unknown kind or a missing limit."""
    if kind not in KINDS:
        raise unknown_name("target kind", kind, KINDS)
    needed = KINDS[kind].limits + (KINDS[kind].evaluation_limits if role == "evaluation" else ())
    if missing := [name for name in needed if name not in limits]:
        raise SpecError(f"target kind {kind!r} needs the limits {missing}; declare them in the plan")
    return KINDS[kind].arrays(limits, canvas, role)


def pack_masks(encoded: list[bytes]) -> dict[str, Any]:
    """Compressed COCO RLE strings of one record as the arrays `instances/rle` and `instances/rle_ends`."""
    return {
        "instances/rle": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "instances/rle_ends": np.cumsum([len(e) for e in encoded], dtype=np.int32),
    }


def unpack_masks(rle: np.ndarray, ends: np.ndarray) -> list[bytes]:
    """The inverse of `pack_masks`."""
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    return [rle[a:b].tobytes() for a, b in zip(starts, ends, strict=True)]
