"""What a cache is: the frozen values whose digests name it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.identity import digest

SPATIAL = frozenset("HW")
ROLES = ("training", "evaluation")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class LevelSpec:
    """One level of a feature pyramid.

    `dims` names the axes of one record, for example "C H W", "T C H W" for clips, "C" for a pooled vector;
    `shape` has one size an axis, 0 where it depends on the input size; `stride` is in input pixels.
    Decoded features are float32.
    """

    name: str
    dims: str
    shape: tuple[int, ...]
    stride: int

    def __post_init__(self) -> None:
        if len(self.dims.split()) != len(self.shape) or "C" not in self.dims.split():
            raise SpecError(f"level {self.name!r}: dims {self.dims!r} do not fit the shape {self.shape}")

    @property
    def channels(self) -> int:
        """Size of the axis C."""
        return self.shape[self.dims.split().index("C")]

    def free(self) -> "LevelSpec":
        """The same level with 0 for the axes H and W: what does not depend on the input size; clips keep their T."""
        sizes = zip(self.dims.split(), self.shape, strict=True)
        return replace(self, shape=tuple(0 if d in SPATIAL else n for d, n in sizes))


@dataclass(frozen=True)
class BackboneSpec:
    """A frozen backbone: everything about it that changes a number.

    `arguments` holds the construction arguments and what is really in use (windows, shifts, pretrained windows,
    pad mode, norm, prefix tokens); `weights_sha256` digests the loaded tensors, not the file; `mean` and `std`
    are per RGB channel for pixels in 0..1; `levels` carry free spatial sizes.
    """

    name: str
    arguments: Mapping[str, Any]
    weights_sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    levels: tuple[LevelSpec, ...]

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise SpecError(f"precision is one of {', '.join(PRECISIONS)}, got {self.precision!r}")


@dataclass(frozen=True)
class SplitRecipe:
    """How the samples of one role (training or evaluation) become records.

    `views` is the view recipe as data: its kind and every parameter, input size and padding among them.
    """

    views: Mapping[str, Any]
    encoding: str


@dataclass(frozen=True)
class FeatureSpec:
    """All that determines the numbers of one record; its digest is the identity of the features.

    `annotations` is the digest of the target specs if a view recipe reads annotations, else None.
    """

    backbone: BackboneSpec
    training: SplitRecipe
    evaluation: SplitRecipe
    seed: int
    annotations: str | None = None

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON."""
        return digest(self)

    def recipe(self, role: str) -> SplitRecipe:
        """The recipe of a role."""
        return self.training if role == "training" else self.evaluation


@dataclass(frozen=True)
class TargetSpec:
    """One kind of target and how annotations become it.

    `kind` is one of `targets.KINDS`; `ignore` is the label that counts for nothing; `conversion` says how source
    values were mapped.
    """

    kind: str
    dataset: str
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore: int | None = None
    conversion: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON."""
        return digest(self)


def targets_key(targets: tuple[TargetSpec, ...]) -> str:
    """The digest of a set of targets, independent of their order."""
    return digest({t.kind: t for t in targets})
