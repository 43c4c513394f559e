"""What the heads of one training share: their folders, checkpoints, evaluations and records."""

import platform
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fcache
from fcache.cache_spec import (
    BlockSource,
    FcacheError,
    FollowingSource,
    SourceInfo,
    SpecError,
    targets_key,
    to_json,
)
from fcache.heads import events
from fcache.heads.checkpoints import (
    Checkpoint,
    Position,
    check_same,
    identity_of,
    identity_of_run,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from fcache.heads.choice import HeadChoice, needed_targets
from fcache.heads.config import TrainConfig
from fcache.heads.evaluate import Scored, try_evaluate_heads
from fcache.heads.events import Report
from fcache.heads.learner import HeadFailure, Learner
from fcache.heads.runs import Cost, Run, evaluation, explain, load_run, write_run


@dataclass(frozen=True)
class Session:
    """What all heads of one training share, and their folders on disk.

    Methods move heads that end, for whatever reason, from `active` to `done`, which maps folder names to runs.
    """

    source: BlockSource
    validation: BlockSource | None
    config: TrainConfig
    out: Path
    device: torch.device
    autocast: bool
    report: Report
    recipe: str
    hints: Mapping[str, str]

    @property
    def info(self) -> SourceInfo:
        """What the source's blocks hold."""
        return self.source.info

    def open(
        self, heads: Sequence[HeadChoice], *, resume: bool
    ) -> tuple[dict[str, Run], list[Learner], Position | None]:
        """Runs that are finished already by folder name, learners for the others (built, or continued), and where the
        learner that is furthest behind goes on (None: its checkpoint does not say).

        A source that grows then gives the epochs that were begun the committed sets that they had.
        """
        done: dict[str, Run] = {}
        for choice in heads:
            folder = self.out / choice.folder
            if (folder / "run.json").exists():
                if not resume:
                    raise SpecError(f"{folder} holds a run already; choose another --out, or --resume to keep it")
                run = load_run(folder)
                check_same(folder, identity_of(choice, self.info), identity_of_run(run, self.source))
                done[choice.folder] = run
            elif not resume and folder.is_dir() and any(folder.iterdir()):
                raise SpecError(f"{folder} holds an unfinished run; --resume continues it, or remove the folder")
        learners: list[Learner] = []
        positions: list[tuple[int, Position | None]] = []
        for choice in heads:
            if choice.folder in done:
                continue
            learner = Learner(choice, self.info, self.device, autocast=self.autocast)
            position: Position | None = (0, 0)
            if saved := load_checkpoint(self.out / choice.folder):
                check_same(self.out / choice.folder, identity_of(choice, self.info), saved.identity)
                learner.load_state(saved.learner)
                position = saved.position
                if position is not None and isinstance(self.source, FollowingSource):
                    # An epoch that was begun keeps its set.
                    self.source.restore(saved.extent, epochs=position[0] + (position[1] > 0))
            learners.append(learner)
            positions.append((learner.iteration, position))
        for run in done.values():
            # A head that is added to trained ones reads what they read.
            if run.status == "finished" and learners and isinstance(self.source, FollowingSource):
                self.source.restore(run.extent["training"], epochs=None)
        # Last, so that a bad argument leaves nothing behind; and before the first step, so that a folder that cannot
        # be written is found now and not after hours of training.
        for choice in heads:
            try:
                (self.out / choice.folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explain(error, self.out / choice.folder) from error
        return done, learners, min(positions, key=lambda found: found[0])[1] if positions else (0, 0)

    def checkpoint(self, active: Sequence[Learner], position: Position) -> None:
        """Saves all active heads, and where they go on."""
        for learner in active:
            identity = identity_of(learner.choice, self.info)
            checkpoint = Checkpoint(identity, learner.state(), position, self.extent)
            save_checkpoint(self.out / learner.choice.folder, checkpoint)
        if active:
            self.report(events.CheckpointDone(active[0].iteration))

    @property
    def extent(self) -> Mapping[str, Any]:
        """What training read until now: of a source that grows the committed set of each epoch."""
        return self.source.extent if isinstance(self.source, FollowingSource) else self.info.extent

    def after_step(
        self,
        iteration: int,
        position: Position,
        stepped: Sequence[Learner],
        active: list[Learner],
        done: dict[str, Run],
    ) -> None:
        """Evaluates and saves, where it is due after an iteration; `position` is where the next one is."""
        if iteration == self.config.iterations:
            return
        if self.config.evaluate_every and iteration % self.config.evaluate_every == 0:
            self.score(stepped, active, done)
        if self.config.checkpoint_every and iteration % self.config.checkpoint_every == 0:
            self.checkpoint([x for x in stepped if x in active], position)

    def score(self, learners: Sequence[Learner], active: list[Learner], done: dict[str, Run]) -> dict[str, Scored]:
        """Scores learners on the validation source; one that fails is stopped. Results by folder name.

        None is scored while a validation source that grows is not complete.
        """
        results: dict[str, Scored] = {}
        if self.validation is None or not learners:
            return results
        if isinstance(self.validation, FollowingSource) and not self.validation.take(0):
            return results
        for learner in learners:
            learner.trained.module.eval()
        found = try_evaluate_heads(
            [x.trained for x in learners], self.validation, device=self.device, report=self.report
        )
        for learner, result in zip(learners, found, strict=True):
            learner.trained.module.train()
            if isinstance(result, Exception):
                self.stop(learner, result, active, done)
                continue
            results[learner.choice.folder] = result
            learner.evaluations.append(evaluation(result.scores, learner.iteration))
            self.report(events.EvaluationDone(learner.choice.label, learner.iteration, result.scores.values))
        return results

    def interrupt(self, active: Sequence[Learner], done: dict[str, Run], position: Position) -> None:
        """Saves all active heads, and records them as interrupted."""
        self.checkpoint(active, position)
        for learner in active:
            done[learner.choice.folder] = self.record(learner, "interrupted", "stopped on request")

    def finish(self, active: list[Learner], done: dict[str, Run], position: Position) -> list[Learner]:
        """Saves the heads that reached the end, before they are scored; returns those whose weights are finite."""
        for learner in list(active):
            try:
                learner.check_weights()
            except HeadFailure as error:
                self.stop(learner, error, active, done)
        if self.validation is not None:
            # A kill during a long evaluation then costs the evaluation only.
            self.checkpoint(active, position)
        return active

    def complete(self, active: list[Learner], done: dict[str, Run]) -> None:
        """Scores and records the heads that reached the end."""
        results = self.score(list(active), active, done)
        for learner in active:
            run = self.record(learner, "finished", "")
            scored = results.get(learner.choice.folder)
            write_run(
                run,
                weights=learner.trained.module.state_dict(),
                states=scored.states if scored else {},
                ids=scored.ids if scored else (),
            )
            self._close(learner, run, done)

    def stop(self, learner: Learner, error: Exception, active: list[Learner], done: dict[str, Run]) -> None:
        """Takes a head that failed out of `active` and records why."""
        reason = _reason(error)
        active.remove(learner)
        learner.release()
        self.report(events.HeadStopped(learner.choice.label, learner.iteration, reason))
        run = self.record(learner, "stopped", reason)
        write_run(run, weights={}, states={}, ids=())
        self._close(learner, run, done)

    def _close(self, learner: Learner, run: Run, done: dict[str, Run]) -> None:
        remove_checkpoint(run.folder)
        done[learner.choice.folder] = run
        self.report(events.RunDone(learner.choice.label, str(run.folder), run.status))

    def record(self, learner: Learner, status: str, reason: str) -> Run:
        """The run of a learner as it stands."""
        choice, info = learner.choice, self.info
        targets = needed_targets(choice.head, info)
        on_gpu = self.device.type == "cuda"
        validation = self.validation.info.extent if self.validation else {}
        if isinstance(self.validation, FollowingSource):
            validation = self.validation.extent
        extent = {"training": self.extent, "validation": validation}
        return Run(
            folder=self.out / choice.folder,
            status=status,
            reason=reason,
            head=choice.name,
            label=choice.label,
            options=choice.options,
            recipe=self.recipe,
            train=choice.train,
            features_key=info.features.key,
            targets_key=targets_key(targets),
            features=info.features,
            targets=targets,
            levels=choice.inputs(info).levels,
            random_weights=info.random_weights,
            extent=to_json(extent),
            iterations=learner.iteration,
            evaluations=tuple(learner.evaluations),
            losses=tuple(learner.losses),
            loss_terms={k: v for k, v in learner.terms.items() if abs(v) < float("inf")},
            cost=Cost(
                parameters=learner.parameters,
                seconds_per_iteration=learner.step_seconds / max(1, learner.iteration),
                seconds=learner.seconds,
                data_wait_share=learner.waited / learner.seconds if learner.seconds else 0.0,
                peak_memory=_peak_memory(),
                peak_device_memory=torch.cuda.max_memory_allocated(self.device) if on_gpu else 0,
            ),
            device=torch.cuda.get_device_name(self.device) if on_gpu else f"{self.device.type} {platform.machine()}",
            precision="bf16" if self.autocast else "fp32",
            versions={"fcache": fcache.__version__, "torch": str(torch.__version__), "numpy": np.__version__},
            hints=self.hints,
        )


def _reason(error: Exception) -> str:
    if isinstance(error, (FcacheError, HeadFailure)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _peak_memory() -> int:
    """The largest resident size of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
