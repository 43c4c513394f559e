"""What the heads of one training share: their folders, checkpoints, evaluations and records."""

import platform
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fcache
from fcache.cache_spec import (
    BlockSource,
    CorruptError,
    FcacheError,
    IncompatibleError,
    SourceInfo,
    SpecError,
    first_difference,
    targets_key,
    to_json,
)
from fcache.heads import events
from fcache.heads.choice import HeadChoice, needed_targets
from fcache.heads.config import TrainConfig
from fcache.heads.evaluate import Scored, try_evaluate_heads
from fcache.heads.events import Report
from fcache.heads.learner import HeadFailure, Learner
from fcache.heads.runs import Cost, Run, evaluation, explain, load_run, write_durably, write_run

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Session:
    """What all heads of one training share, and their folders on disk.

    Methods move heads that end, for whatever reason, from `active` to `done`, which maps folder names to runs.
    """

    info: SourceInfo
    validation: BlockSource | None
    config: TrainConfig
    out: Path
    device: torch.device
    autocast: bool
    report: Report
    recipe: str
    hints: Mapping[str, str]

    def open(self, heads: Sequence[HeadChoice], *, resume: bool) -> tuple[dict[str, Run], list[Learner]]:
        """Runs that are finished already by folder name, and learners for the others: built, or continued."""
        done: dict[str, Run] = {}
        for choice in heads:
            folder = self.out / choice.folder
            if (folder / "run.json").exists():
                if not resume:
                    raise SpecError(f"{folder} holds a run already; choose another --out, or --resume to keep it")
                run = load_run(folder)
                self._same(folder, self._identity(choice), _identity_of(run))
                done[choice.folder] = run
            elif not resume and folder.is_dir() and any(folder.iterdir()):
                raise SpecError(f"{folder} holds an unfinished run; --resume continues it, or remove the folder")
        learners: list[Learner] = []
        for choice in heads:
            if choice.folder in done:
                continue
            learner = Learner(choice, self.info, self.device, autocast=self.autocast)
            checkpoint = self.out / choice.folder / CHECKPOINT
            if checkpoint.exists():
                saved = _load_checkpoint(checkpoint)
                self._same(checkpoint.parent, self._identity(choice), saved["identity"])
                learner.load_state(saved["learner"])
            learners.append(learner)
        # Last, so that a bad argument leaves nothing behind; and before the first step, so that a folder that cannot
        # be written is found now and not after hours of training.
        for choice in heads:
            try:
                (self.out / choice.folder).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise explain(error, self.out / choice.folder) from error
        return done, learners

    def _identity(self, choice: HeadChoice) -> dict[str, Any]:
        """What determines a head's weights, as JSON data."""
        return {
            "head": choice.name,
            "options": to_json(choice.options),
            "train": _train_identity(choice.train),
            "features": self.info.features.key,
            "targets": targets_key(needed_targets(choice.head, self.info)),
            "extent": to_json(self.info.extent),
        }

    def _same(self, folder: Path, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        if difference := first_difference(found, asked):
            name, was, now = difference
            raise IncompatibleError(
                f"{folder} was trained with {name} = {was}, now {now} is asked; use the same settings and data, "
                "or another --out"
            )

    def checkpoint(self, active: Sequence[Learner]) -> None:
        """Saves all active heads."""
        for learner in active:
            buffer = BytesIO()
            torch.save({"identity": self._identity(learner.choice), "learner": learner.state()}, buffer)
            write_durably(self.out / learner.choice.folder / CHECKPOINT, buffer.getvalue())
        if active:
            self.report(events.CheckpointDone(active[0].iteration))

    def after_step(
        self, iteration: int, stepped: Sequence[Learner], active: list[Learner], done: dict[str, Run]
    ) -> None:
        """Evaluates and saves, where it is due after an iteration."""
        if iteration == self.config.iterations:
            return
        if self.config.evaluate_every and iteration % self.config.evaluate_every == 0:
            self.score(stepped, active, done)
        if self.config.checkpoint_every and iteration % self.config.checkpoint_every == 0:
            self.checkpoint([x for x in stepped if x in active])

    def score(self, learners: Sequence[Learner], active: list[Learner], done: dict[str, Run]) -> dict[str, Scored]:
        """Scores learners on the validation source; one that fails is stopped. Results by folder name."""
        results: dict[str, Scored] = {}
        if self.validation is None or not learners:
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

    def complete(self, active: list[Learner], done: dict[str, Run]) -> None:
        """Scores and records the heads that reached the end."""
        for learner in list(active):
            try:
                learner.check_weights()
            except HeadFailure as error:
                self.stop(learner, error, active, done)
        if self.validation is not None:
            # A kill during a long evaluation then costs the evaluation only.
            self.checkpoint(active)
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
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
        done[learner.choice.folder] = run
        self.report(events.RunDone(learner.choice.label, str(run.folder), run.status))

    def record(self, learner: Learner, status: str, reason: str) -> Run:
        """The run of a learner as it stands."""
        choice, info = learner.choice, self.info
        targets = needed_targets(choice.head, info)
        on_gpu = self.device.type == "cuda"
        extent = {"training": info.extent, "validation": self.validation.info.extent if self.validation else {}}
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


def _train_identity(train: TrainConfig) -> Any:
    # How often a training is scored or saved changes no weight.
    return to_json(replace(train, evaluate_every=0, checkpoint_every=0))


def _identity_of(run: Run) -> dict[str, Any]:
    return {
        "head": run.head,
        "options": to_json(run.options),
        "train": _train_identity(run.train),
        "features": run.features_key,
        "targets": run.targets_key,
        "extent": run.extent["training"],
    }


def _load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptError(f"{path} cannot be read ({error}); remove its folder and train again") from error


def _reason(error: Exception) -> str:
    if isinstance(error, (FcacheError, HeadFailure)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"


def _peak_memory() -> int:
    """The largest resident size of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
