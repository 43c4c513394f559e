"""Batches: blocks as torch tensors, decoded on the device where heads run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import Block, CodedLevel, View


@dataclass(frozen=True)
class Batch:
    """Some records on one device, without gradient.

    `features` maps a level's name to float32 [B, *level.shape] ([B, C, H, W] for a map). `targets` maps an array path
    to a tensor [B, …], or to a tuple of B tensors for a ragged one. Byte streams ("semantic/truth") stay on the CPU.
    """

    ids: tuple[str, ...]
    views: tuple[View, ...]
    features: Mapping[str, Tensor]
    targets: Mapping[str, Tensor | tuple[Tensor, ...]]

    def __len__(self) -> int:
        return len(self.ids)


def to_batch(block: Block[Any], device: torch.device, *, levels: Iterable[str] | None = None) -> Batch:
    """A block on a device: codes cross as they are stored and are decoded there.

    `levels` limits which levels are taken. On the CPU tensors may share memory with the block's buffers, and hold as
    long as these do.
    """
    names = tuple(block.levels) if levels is None else tuple(levels)
    return Batch(
        ids=block.ids,
        views=block.views,
        features={name: _decoded(block.levels[name], device) for name in names},
        targets={path: _target(path, values, device) for path, values in block.targets.items()},
    )


def batch_buffers(device: torch.device | str) -> Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]:
    """What allocates a reader's buffers for a device: pinned memory for a GPU, so that copies to it overlap."""
    if torch.device(device).type != "cuda":
        return np.empty

    def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        # The array keeps the tensor, and with it the memory, alive.
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    return pinned


def _decoded(coded: CodedLevel[Any], device: torch.device) -> Tensor:
    there: CodedLevel[Tensor] = CodedLevel(
        level=coded.level,
        encoding=coded.encoding,
        parts={suffix: _tensor(part, device) for suffix, part in coded.parts.items()},
        tables={name: _tensor(table, device) for name, table in coded.tables.items()},
    )
    return there.decode(torch).detach()


def _target(path: str, values: Any, device: torch.device) -> Tensor | tuple[Tensor, ...]:
    # Compressed streams are decoded on the CPU, by the metrics.
    place = torch.device("cpu") if path.endswith(("/truth", "/rle")) else device
    if isinstance(values, (np.ndarray, Tensor)):
        return _tensor(values, place)
    ragged: Sequence[Any] = values
    return tuple(_tensor(v, place) for v in ragged)


def _tensor(array: Any, device: torch.device) -> Tensor:
    if isinstance(array, Tensor):
        return array.to(device)
    if not array.flags.writeable:
        # torch has no read-only tensors and warns; a shared map of a file must not become writable.
        array = array.copy()
    # From pinned buffers the copy overlaps with the host; the step's own synchronisation ends before they are reused.
    return torch.from_numpy(array).to(device, non_blocking=device.type == "cuda")
