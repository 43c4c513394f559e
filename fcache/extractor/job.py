"""An extraction as a value: everything a worker needs to know, nothing that is open."""

import os
from dataclasses import dataclass
from pathlib import Path

from fcache.cache_spec.encodings import find_encoding
from fcache.cache_spec.errors import SpecError
from fcache.cache_spec.spec import PRECISIONS

ON_ERROR = ("quarantine", "fail")
COMPRESSION = ("none", "zstd")


@dataclass(frozen=True)
class Job:
    """What to extract, from where, to where.

    `cache` is a path or an object-store URL; `model` is a short or timm name; `weights` a file, "pretrained" or
    "random:SEED"; `views` the number of views a training sample (None: the view recipe's; evaluation splits have
    one); `input_size` (height, width) overrides the view recipe's; `levels` names what is stored (None: the
    backbone's usual ones); `subset` keeps a fixed fraction and `limit` the first samples of every split; `part` (i,
    n) takes every n-th shard from the i-th on; `on_error` says whether a sample that cannot be decoded is left out
    ("quarantine") or ends the run ("fail"). `device` is a torch device; `workers` are decoding processes (None: by
    the number of processors). `batch_size` and `shard_records` are used when a group is created and then stay.
    Without `grow` an existing cache gets no samples, views or kinds of target beyond those in its manifest.
    """

    model: str
    dataset: str
    root: Path
    cache: Path | str
    weights: str
    splits: tuple[str, ...] = ("train", "val")
    views: int | None = None
    view_recipe: str | None = None
    input_size: tuple[int, int] | None = None
    window: int | None = None
    levels: tuple[str, ...] | None = None
    encoding: str = "int8"
    compression: str = "none"
    precision: str = "bf16"
    seed: int = 0
    subset: float | None = None
    limit: int | None = None
    shard_records: int | None = None
    batch_size: int | None = None
    device: str = "cpu"
    workers: int | None = None
    part: tuple[int, int] | None = None
    on_error: str = "quarantine"
    grow: bool = True

    def __post_init__(self) -> None:
        find_encoding(self.encoding)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("compression", self.compression, COMPRESSION)
        _one_of("on_error", self.on_error, ON_ERROR)
        for name in ("views", "limit", "shard_records", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name} must be at least 1, got {value}")
        if not self.splits or len(set(self.splits)) != len(self.splits):
            raise SpecError(f"one or more different splits are needed, got {self.splits}")
        if self.part is not None and not 0 <= self.part[0] < self.part[1]:
            raise SpecError(f"part i/n needs 0 <= i < n, got {self.part[0]}/{self.part[1]}")

    @property
    def evaluation_encoding(self) -> str:
        """The more exact of int8 and the training encoding: coded test features understate a head."""
        return self.encoding if self.encoding in ("fp32", "bf16", "fp16", "int8") else "int8"

    def decoders(self, devices: int = 1) -> int:
        """Decoding processes of each of so many devices of this machine; 0 decodes in the device's own process."""
        if self.workers is not None:
            return self.workers
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        each = max(1, processors // devices)
        # On the CPU the backbone needs the processors more than the decoders do.
        return min(16, each) if self.device.startswith("cuda") else max(0, min(4, each - 2))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SpecError(f"{name} is one of {', '.join(known)}, got {value!r}")
