"""Training of one or many heads on one stream of blocks, each isolated from the others."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

import torch

from fcache.cache_spec import BlockSource, FollowingSource, IncompatibleError, SpecError
from fcache.heads import events
from fcache.heads.batches import Batch, device_batches
from fcache.heads.checkpoints import Position
from fcache.heads.choice import HeadChoice, needed_levels, needed_targets
from fcache.heads.config import TrainConfig
from fcache.heads.events import Report, silent
from fcache.heads.learner import Learner
from fcache.heads.runs import Run
from fcache.heads.session import Session

# How often a split that is followed is looked at while there is nothing to read.
POLL_SECONDS = 1.0


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
        source=source,
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
        done, learners, position = session.open(heads, resume=resume)
        if learners:
            _run(session, learners, done, position, should_stop)
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
    if not isinstance(source, FollowingSource) and source.num_blocks(0) == 0:
        raise SpecError(f"split {info.split!r} has less than one batch of samples; lower batch_size, or use more of it")


def _run(
    session: Session,
    learners: Sequence[Learner],
    done: dict[str, Run],
    position: Position | None,
    should_stop: Callable[[], bool],
) -> None:
    """Steps all learners to the end of the config, then scores and records them."""
    config, report = session.config, session.report
    active = list(learners)
    first = min(learner.iteration for learner in active)
    report(events.TrainingStarted({x.choice.label: x.parameters for x in active}, first, config.iterations))
    position = _position(session.source, first) if position is None else position
    levels = needed_levels([x.choice for x in active], session.info.levels)
    with closing(_endless(session, position, levels, should_stop)) as stream:
        for iteration in range(first, config.iterations):
            if should_stop():
                return session.interrupt(active, done, position)
            start = time.perf_counter()
            found = next(stream, None)
            if found is None:
                return session.interrupt(active, done, position)
            position, ended, batch = found
            waited = time.perf_counter() - start
            if len(batch) > config.batch_size:
                raise SpecError(f"the source gives batches of {len(batch)}, the config says {config.batch_size}")
            losses: dict[str, float] = {}
            # After a kill between two checkpoints heads continue from different iterations: each waits for its own.
            stepping = [x for x in active if x.iteration == iteration]
            for learner in stepping:
                try:
                    losses[learner.choice.label] = learner.step(batch)
                except Exception as error:
                    session.stop(learner, error, active, done)
            if not active:
                return None
            seconds = time.perf_counter() - start
            for learner in stepping:
                learner.seconds += seconds
                learner.waited += waited
            report(events.StepDone(iteration + 1, config.iterations, losses, seconds, waited))
            if ended is not None:
                report(events.EpochDone(ended, iteration + 1))
            session.after_step(iteration + 1, position, [x for x in stepping if x in active], active, done)
            if not active:
                return None
    active = session.finish(active, done, position)
    if active and not _taken(session.validation, 0, report, should_stop):
        return session.interrupt(active, done, position)
    return session.complete(active, done)


def _endless(
    session: Session, position: Position, levels: Sequence[str], should_stop: Callable[[], bool]
) -> Generator[tuple[Position, int | None, Batch]]:
    """Batches of epoch after epoch from `position` on, as (position of the next, the epoch if it ends it, batch).

    Ends when it was asked to stop while it waited for a source that grows.
    """
    source, (epoch, index) = session.source, position
    while _taken(source, epoch, session.report, should_stop):
        # Read ahead over the ends of epochs, unless the next one may find more than this one.
        epochs = source.steady(epoch) if isinstance(source, FollowingSource) else None
        blocks, count = source.blocks(epoch, start=index, epochs=epochs), source.num_blocks(epoch)
        for batch in device_batches(blocks, session.device, levels=levels):
            while index >= count:
                epoch, index = epoch + 1, 0
                count = source.num_blocks(epoch)
            index += 1
            ends = index == count
            yield (epoch + 1, 0) if ends else (epoch, index), epoch if ends else None, batch
        epoch, index = epoch + 1, 0


def _taken(source: BlockSource | None, epoch: int, report: Report, should_stop: Callable[[], bool]) -> bool:
    """Fixes what an epoch of a source that grows reads, and waits while there is nothing; False if asked to stop."""
    while isinstance(source, FollowingSource) and not source.take(epoch):
        report(events.Waiting(source.info.split))
        time.sleep(POLL_SECONDS)
        if should_stop():
            return False
    return True


def _position(source: BlockSource, blocks: int) -> Position:
    """Where an earlier release that did not save it had come after that many blocks."""
    epoch = 0
    while blocks >= source.num_blocks(epoch):
        blocks -= source.num_blocks(epoch)
        epoch += 1
    return epoch, blocks
