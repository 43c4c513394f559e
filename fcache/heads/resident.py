"""A split of a cache kept in memory: on a GPU, or in RAM if it fits and that saves work."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcache.cache_spec import Block, CacheSource, CodedLevel, SourceInfo, SpecError
from fcache.cache_spec.streams.holding import HeldGroup, Ragged, hold, read_group
from fcache.heads.batches import target_device
from fcache.heads.events import Report, SplitKept, silent

RESIDENCES = ("auto", "none", "ram", "device")
# torch gathers no unsigned integers wider than a byte: they are kept as signed ones of the same bits.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class ResidentSource:
    """A `BlockSource` that gives the coded blocks of a `CacheSource`, in its order, from tensors on a device.

    Everything is read when it is made.
    """

    def __init__(self, source: CacheSource, device: torch.device | str) -> None:
        self._source, self._device = source.coded(), torch.device(device)
        self._groups = [self._read(number) for number in range(len(source.records))]
        if self._device.type == "cuda":
            # From now on every stream may read them.
            torch.cuda.synchronize(self._device)

    @property
    def info(self) -> SourceInfo:
        """Identity, levels, targets and extent."""
        return self._source.info

    def num_blocks(self, epoch: int) -> int:
        """Blocks in an epoch."""
        return self._source.num_blocks(epoch)

    def blocks(self, epoch: int, *, start: int = 0, epochs: int | None = 1) -> Iterator[Block[Tensor]]:
        """The blocks of epochs in new tensors."""
        for number, rows in self._source.orders(epoch, start=start, epochs=epochs):
            yield self._block(number, rows)

    def _block(self, number: int, rows: np.ndarray) -> Block[Tensor]:
        group, here = self._groups[number], torch.from_numpy(rows)
        there = here.to(self._device)

        def gather(whole: Tensor) -> Tensor:
            signed = whole.view(SIGNED.get(whole.dtype, whole.dtype))
            return signed.index_select(0, there if whole.device == there.device else here).view(whole.dtype)

        levels = {
            name: replace(coded, parts={suffix: gather(part) for suffix, part in coded.parts.items()})
            for name, coded in group.levels.items()
        }
        targets: dict[str, Any] = {
            path: values.of(rows) if isinstance(values, Ragged) else gather(values)
            for path, values in group.targets.items()
        }
        ids, views, view_indices = self._source.frame(number, rows)
        return Block(ids, views, view_indices, levels, targets)

    def _read(self, number: int) -> HeldGroup[Tensor]:
        def put(whole: Tensor | None, name: str, part: np.ndarray, at: int, count: int) -> Tensor:
            found = torch.from_numpy(part)
            if whole is None:
                place = target_device(name, self._device)
                whole = torch.empty((count, *found.shape[1:]), dtype=found.dtype, device=place)
            whole[at : at + len(found)] = found.to(whole.device)
            return whole

        group = read_group(self._source, number, put)
        return replace(group, levels={name: self._with_tables(coded) for name, coded in group.levels.items()})

    def _with_tables(self, coded: CodedLevel[Tensor]) -> CodedLevel[Tensor]:
        # Copied, for they may be read-only.
        tables = {k: torch.from_numpy(np.array(table)).to(self._device) for k, table in coded.tables.items()}
        return replace(coded, tables=tables)


def make_resident(
    source: CacheSource, where: str, device: torch.device | str, *, report: Report = silent
) -> CacheSource | ResidentSource:
    """`source` itself, or all of it in memory, as `where` says: "none", "ram", "device" or "auto".

    "auto" keeps it on a GPU if it takes at most half of the memory that is free there; else in RAM if reading it again
    is costly (compressed, or on an object store) and it takes at most half of the free RAM; else it is streamed.
    Raises SpecError if it does not fit where it was asked to be, with both numbers.
    """
    device = torch.device(device)
    if where not in RESIDENCES:
        raise SpecError(f"a split is resident in one of {', '.join(RESIDENCES)}, got {where!r}")
    if where == "device" and device.type != "cuda":
        raise SpecError(f"a split is kept on a GPU, the device is {device.type}; use --resident ram, or --device cuda")
    ram = torch.device("cpu")
    if where == "auto":
        places = [device] if device.type == "cuda" else []
        places += [ram] if source.is_costly else []
        needed = source.num_bytes() if places else 0
        fitting = [place for place in places if needed <= free_memory(place) // 2]
        return _kept(source, fitting[0], needed, report) if fitting else source
    if where == "none":
        return source
    place = ram if where == "ram" else device
    needed, free = source.num_bytes(), free_memory(place)
    if needed > free:
        raise SpecError(
            f"split {source.info.split!r} takes {needed / 1e9:.2f} GB in memory, {free / 1e9:.2f} GB are free in "
            f"{_name(place)}; use --resident none, a subset, or fewer levels"
        )
    return _kept(source, place, needed, report)


def _kept(source: CacheSource, place: torch.device, size: int, report: Report) -> CacheSource | ResidentSource:
    # In RAM the reader's threads go on to gather and decode into buffers; a GPU does that itself.
    kept = ResidentSource(source, place) if place.type == "cuda" else hold(source)
    report(SplitKept(source.info.split, _name(place), size))
    return kept


def _name(place: torch.device) -> str:
    return "RAM" if place.type == "cpu" else str(place)


def free_memory(device: torch.device) -> int:
    """Bytes that may still be used on a device: a GPU's, or those of RAM that the system can give without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        # Pages of the file cache are given back when they are needed; what sysconf calls free leaves them out.
        found = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        free = next(int(words[1]) * 1024 for words in found if words[0] == "MemAvailable:")
    except (OSError, StopIteration):
        names = os.sysconf_names
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    try:
        limits = [int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current")]
    except (OSError, ValueError):
        return free
    return min(free, max(0, limits[0] - limits[1]))
