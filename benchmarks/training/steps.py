"""Steps of heads on batches as `fcache.heads.train` does them, one at a time, so that trainings can take turns."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fcache.cache_spec import BlockSource
from fcache.heads import Batch, HeadChoice, device_batches, needed_levels
from fcache.heads.learner import Learner

# Seconds of a step, those of them that it waited for its batch, and the loss of every head.
Step = tuple[float, float, list[float]]
# Steps after a pause that are not counted, if there are more: what was read ahead in it says nothing about waiting.
SETTLING = 2


def steps(source: BlockSource, learners: Sequence[Learner], device: torch.device) -> Iterator[Step]:
    """Steps of learners on epoch after epoch of a source; `tests/benchmarks` compares them with `train`'s.

    The first batch is drawn here and left out: nothing could be read ahead of it.
    """
    levels = needed_levels([x.choice for x in learners], source.info.levels)
    stream: Any = device_batches(source.blocks(0, epochs=None), device, levels=levels)
    next(stream)
    return _steps(stream, learners)


def _steps(stream: Any, learners: Sequence[Learner]) -> Iterator[Step]:
    with closing(stream):
        while True:
            start = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - start
            losses = [learner.step(batch) for learner in learners]
            yield time.perf_counter() - start, waited, losses


def turn(stream: Iterator[Step], count: int, device: torch.device) -> tuple[float, float]:
    """Some steps in a row: seconds a step, and the share of them that was waited for data."""
    settling = min(SETTLING, count - 1)
    for _ in range(settling):
        next(stream)
    synchronise(device)
    start = time.perf_counter()
    waited = sum(next(stream)[1] for _ in range(count - settling))
    synchronise(device)
    taken = time.perf_counter() - start
    return taken / (count - settling), waited / taken


def warm_up(stream: Iterator[Step], seconds: float, device: torch.device) -> float:
    """Steps until some seconds have passed, one at least; seconds of the last of them."""
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        next(stream)
        synchronise(device)
        now = time.perf_counter()
        if now - start >= seconds:
            return now - before


def learner(choice: HeadChoice, source: BlockSource, device: torch.device) -> Learner:
    """A head to train, with autocast as `train` decides it."""
    autocast = choice.train.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Learner(choice, source.info, device, autocast=autocast)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def giga_macs(work: Any, *arguments: Any) -> float:
    """Multiply-adds of products and convolutions, in 10⁹, as torch counts them; grid samples and the like are none."""
    with FlopCounterMode(display=False) as counter:
        work(*arguments)
    return counter.get_total_flops() / 2e9


def head_macs(module: nn.Module, batch: Batch) -> float:
    """10⁹ multiply-adds of a head's forward pass on one sample of a batch."""
    features: Mapping[str, torch.Tensor] = {name: x[:1] for name, x in batch.features.items()}
    # One sample has no batch statistics where its map is one pixel; what is counted is the same. With gradients, for
    # torch's counter asks for the graph of views of parameters, which have none without.
    module.eval()
    try:
        return giga_macs(module, features)
    finally:
        module.train()
