"""Batches: blocks as torch tensors, decoded on the device where heads run."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import Block, CodedLevel, View
from fcache.cache_spec.reading.mapping import aligned_empty

Item = TypeVar("Item")
Result = TypeVar("Result")
# Fitted tables on the device by the identity of the source's arrays, which are kept so that it stays theirs.
Tables = dict[int, tuple[Any, Tensor]]


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
    """A block on a device: codes cross as they are and are decoded there.

    `levels` limits which levels are taken. On the CPU tensors may share memory with the block's buffers, and hold as
    long as these do.
    """
    return _batch(block, device, levels, {})


def device_batches(
    blocks: Iterable[Block[Any]], device: torch.device, *, levels: Iterable[str] | None = None
) -> Iterator[Batch]:
    """The batches of blocks in order; each holds until the next one is asked for.

    On CUDA the next block is copied and decoded on a stream of its own while the caller works on the batch before.
    A source of blocks may fill its buffers again as `Block` says: no block is asked for before the last but one of
    those asked for is copied.
    """
    tables: Tables = {}
    if device.type != "cuda":
        for block in blocks:
            yield _batch(block, device, levels, tables)
        return
    side = torch.cuda.Stream(device)
    # What the blocks or tables are made of may be on its way there.
    side.wait_stream(torch.cuda.current_stream(device))

    def begin(block: Block[Any]) -> tuple[Callable[[], Batch], Callable[[], None]]:
        with torch.cuda.stream(side):
            batch = _batch(block, device, levels, tables)
        copied = side.record_event()

        def hand_over() -> Batch:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            for tensor in _tensors(batch):
                # Made on the side stream: its memory must not be used again there before the caller's work is done.
                tensor.record_stream(current)
            return batch

        return hand_over, copied.synchronize

    yield from one_ahead(_on_stream(blocks, side), begin)


def one_ahead(
    items: Iterable[Item], begin: Callable[[Item], tuple[Callable[[], Result], Callable[[], None]]]
) -> Generator[Result]:
    """What `begin` makes of items, begun one item ahead of the one that the caller has.

    `begin(item)` starts work and returns (give the result, wait until the item is used no more). An item is asked for
    only when the last but one is used no more, so that two are in use at most; in the end none is.
    """
    begun: deque[tuple[Callable[[], Result], Callable[[], None]]] = deque()
    used: deque[Callable[[], None]] = deque()
    iterator = iter(items)
    try:
        while True:
            if len(used) == 2:
                used.popleft()()
            try:
                begun.append(begin(next(iterator)))
            except StopIteration:
                break
            used.append(begun[-1][1])
            if len(begun) == 2:
                yield begun.popleft()[0]()
        while begun:
            yield begun.popleft()[0]()
    finally:
        while used:
            used.popleft()()


def target_device(path: str, device: torch.device) -> torch.device:
    """Where a target of a batch lies: on `device`, compressed streams on the CPU, where the metrics decode them."""
    return torch.device("cpu") if path.endswith(("/truth", "/rle", "/rle_ends")) else device


def batch_buffers(device: torch.device | str) -> Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]:
    """What allocates a reader's buffers for a device: pinned memory for a GPU, so that copies to it overlap."""
    if torch.device(device).type != "cuda":
        return aligned_empty

    def pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        # The array keeps the tensor, and with it the memory, alive.
        return torch.empty(shape, dtype=kind, pin_memory=True).numpy()

    return pinned


def _batch(block: Block[Any], device: torch.device, levels: Iterable[str] | None, tables: Tables) -> Batch:
    names = tuple(block.levels) if levels is None else tuple(levels)
    return Batch(
        ids=block.ids,
        views=block.views,
        features={name: _decoded(block.levels[name], device, tables) for name in names},
        targets=to_targets(block.targets, device),
    )


def _decoded(coded: CodedLevel[Any], device: torch.device, tables: Tables) -> Tensor:
    for table in coded.tables.values():
        if id(table) not in tables:
            tables[id(table)] = table, _tensor(table, device)
    there: CodedLevel[Tensor] = CodedLevel(
        level=coded.level,
        encoding=coded.encoding,
        parts={suffix: _tensor(part, device) for suffix, part in coded.parts.items()},
        tables={name: tables[id(table)][1] for name, table in coded.tables.items()},
    )
    return there.decode(torch).detach()


def to_targets(targets: Mapping[str, Any], device: torch.device) -> dict[str, Tensor | tuple[Tensor, ...]]:
    """The targets of a block as `Batch.targets` has them."""
    return {path: _target(path, values, device) for path, values in targets.items()}


def _target(path: str, values: Any, device: torch.device) -> Tensor | tuple[Tensor, ...]:
    place = target_device(path, device)
    if isinstance(values, (np.ndarray, Tensor)):
        return _tensor(values, place)
    ragged: Sequence[Any] = values
    return tuple(_tensor(v, place) for v in ragged)


def _tensor(array: Any, device: torch.device) -> Tensor:
    # From pinned buffers the copy overlaps with the host; `device_batches` waits for it before they are filled again.
    asynchronous = device.type == "cuda"
    if isinstance(array, Tensor):
        return array.to(device, non_blocking=asynchronous)
    if not array.flags.writeable:
        # torch has no read-only tensors and warns; a shared map of a file must not become writable.
        array = array.copy()
    return torch.from_numpy(array).to(device, non_blocking=asynchronous)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch that lie on a GPU."""
    for value in (*batch.features.values(), *batch.targets.values()):
        yield from (t for t in (value if isinstance(value, tuple) else (value,)) if t.is_cuda)


def _on_stream(blocks: Iterable[Block[Any]], stream: torch.cuda.Stream) -> Iterator[Block[Any]]:
    """The blocks; a source that makes them on the GPU does so on that stream."""
    iterator = iter(blocks)
    while True:
        with torch.cuda.stream(stream):
            block = next(iterator, None)
        if block is None:
            return
        yield block
