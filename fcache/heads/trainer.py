"""Training of one or many heads on one stream of blocks, each isolated from the others."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from fcache.cache_spec import Block, BlockSource, IncompatibleError, SpecError
from fcache.heads import events
from fcache.heads.batches import to_batch
from fcache.heads.choice import HeadChoice, needed_levels, needed_targets
from fcache.heads.config import TrainConfig
from fcache.heads.events import Report, silent
from fcache.heads.learner import Learner
from fcache.heads.runs import Run
from fcache.heads.session import Session


def train(
    source: BlockSource,
    heads: Sequence[HeadChoice],
    config: TrainConfig,
    *,
    out: Path,
    validation: BlockSource | None = None,
    device: torch.device | str = "cpu",
    report: Report = silent,
    should_stop: Callable[[], bool] = lambda: False,
    resume: bool = False,
    recipe: str = "",
    hints: Mapping[str, str] | None = None,
    allow_random_backbone: bool = False,
) -> list[Run]:
    """Trains heads for `config.iterations` on epochs of `source`; returns their runs in the order of `heads`.

    Every block is read and copied once; then each head goes forward, backward and one step in turn. A head ends with
    the same weights alone and in any group, bit for bit on a CPU. A head that fails (an exception, or a number that
    is not finite) is stopped and recorded, the others go on. Each head is scored on `validation`, if given, after
    every `config.evaluate_every` iterations and at the end, and recorded in `out/<folder of the head>`.
    When `should_stop` says so, all heads are saved and their runs are "interrupted"; the same call with `resume`
    continues to the weights that an uninterrupted training has. Finished runs are then left as they are.
    Open `source` with the config's batch size and without a shorter last batch.

    Raises SpecError if a run exists already (without `resume`), if the source is empty, of another batch size, or of
    random weights without `allow_random_backbone`; IncompatibleError if what is there was trained otherwise.
    """
    device = torch.device(device)
    _check(source, validation, heads, allow_random_backbone)
    session = Session(
        info=source.info,
        validation=validation,
        config=config,
        out=Path(out),
        device=device,
        autocast=config.amp and device.type == "cuda" and torch.cuda.is_bf16_supported(),
        report=report,
        recipe=recipe,
        hints=dict(hints or {}),
    )
    try:
        done, learners = session.open(heads, resume=resume)
        if learners:
            active = _run(session, source, learners, done, should_stop)
            session.complete(active, done)
    finally:
        for choice in heads:
            # An empty folder stays of a training that failed before it saved anything.
            with suppress(OSError):
                (Path(out) / choice.folder).rmdir()
    return [done[choice.folder] for choice in heads]


def _check(
    source: BlockSource, validation: BlockSource | None, heads: Sequence[HeadChoice], allow_random_backbone: bool
) -> None:
    info = source.info
    if info.role != "training":
        raise SpecError(f"heads are trained on a training split, {info.split!r} is an evaluation split")
    if info.random_weights is not None and not allow_random_backbone:
        raise SpecError(
            f"these features come from a backbone with random weights ({info.random_weights}); extract with real "
            "ones, or pass --allow-random-backbone"
        )
    if validation is not None:
        if validation.info.features.key != info.features.key:
            raise IncompatibleError("training and validation have different features; use one cache for both")
        for choice in heads:
            if needed_targets(choice.head, validation.info) != needed_targets(choice.head, info):
                raise IncompatibleError(
                    f"head {choice.label!r}: training and validation have different targets (classes or conversion); "
                    "use one cache for both"
                )
    if source.num_blocks(0) == 0:
        raise SpecError(f"split {info.split!r} has less than one batch of samples; lower batch_size, or use more of it")


def _run(
    session: Session,
    source: BlockSource,
    learners: Sequence[Learner],
    done: dict[str, Run],
    should_stop: Callable[[], bool],
) -> list[Learner]:
    """Steps all learners to the end of the config; returns those that are still active."""
    config, report = session.config, session.report
    active = list(learners)
    first = min(learner.iteration for learner in active)
    report(events.TrainingStarted({x.choice.label: x.parameters for x in active}, first, config.iterations))
    levels = needed_levels([x.choice for x in active], source.info.levels)
    with closing(_endless(source, first)) as stream:
        for iteration in range(first, config.iterations):
            if should_stop():
                session.checkpoint(active)
                for learner in active:
                    done[learner.choice.folder] = session.record(learner, "interrupted", "stopped on request")
                return []
            start = time.perf_counter()
            epoch, ends, block = next(stream)
            waited = time.perf_counter() - start
            if len(block) > config.batch_size:
                raise SpecError(f"the source gives batches of {len(block)}, the config says {config.batch_size}")
            batch = to_batch(block, session.device, levels=levels)
            losses: dict[str, float] = {}
            # After a kill between two checkpoints heads continue from different iterations: each waits for its own.
            stepping = [x for x in active if x.iteration == iteration]
            for learner in stepping:
                try:
                    losses[learner.choice.label] = learner.step(batch)
                except Exception as error:
                    session.stop(learner, error, active, done)
            if not active:
                return []
            seconds = time.perf_counter() - start
            for learner in stepping:
                learner.seconds += seconds
                learner.waited += waited
            report(events.StepDone(iteration + 1, config.iterations, losses, seconds, waited))
            if ends:
                report(events.EpochDone(epoch, iteration + 1))
            session.after_step(iteration + 1, [x for x in stepping if x in active], active, done)
            if not active:
                return []
    return active


def _endless(source: BlockSource, first: int) -> Generator[tuple[int, bool, Block[Any]]]:
    """Blocks of epoch after epoch from the `first` block of all on, as (epoch, whether it ends it, block)."""
    epoch, start = 0, first
    while start >= source.num_blocks(epoch):
        start -= source.num_blocks(epoch)
        epoch += 1
    while True:
        count = source.num_blocks(epoch)
        for index, block in enumerate(source.blocks(epoch, start=start), start=start):
            yield epoch, index + 1 == count, block
        epoch, start = epoch + 1, 0
