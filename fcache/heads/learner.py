"""One head in training: its module, optimizer, random state and position, apart from all other heads."""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fcache.cache_spec import SourceInfo
from fcache.heads.batches import Batch
from fcache.heads.choice import HeadChoice
from fcache.heads.evaluate import TrainedHead
from fcache.heads.head import ParameterGroup
from fcache.heads.runs import Evaluation

POINTS = 100


class HeadFailure(Exception):
    """A head cannot go on: its loss, gradient or weights are not finite."""


class Learner:
    """Owns what one head trains with. `iteration` counts the steps it has done.

    Every step runs under the head's own random state, so that it is the same alone and in a group.
    """

    def __init__(self, choice: HeadChoice, info: SourceInfo, device: torch.device, *, autocast: bool) -> None:
        self.choice = choice
        self.device = device
        self.autocast = autocast
        self.iteration = 0
        self.evaluations: list[Evaluation] = []
        self.losses: list[tuple[int, float]] = []
        self.terms: dict[str, float] = {}
        self.step_seconds = self.seconds = self.waited = 0.0
        self._window: list[float] = []
        self._schedule = choice.train.lr_schedule()
        with torch.random.fork_rng(devices=self._forked):
            # The default generator alone: torch.manual_seed would also seed devices that fork_rng does not restore.
            torch.default_generator.manual_seed(choice.train.seed)
            module = choice.head.build(choice.inputs(info), choice.options)
            self._random = torch.get_rng_state()
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(choice.train.seed)
                self._device_random = torch.cuda.get_rng_state(device)
        self.trained = TrainedHead(
            choice.label, choice.head, choice.options, choice.inputs(info), module.to(device).train()
        )
        self._groups = choice.head.groups(self.trained.module, choice.options)
        self._optimizer = self._adamw()

    @property
    def _forked(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.trained.module.parameters() if p.requires_grad)

    def _adamw(self) -> torch.optim.AdamW:
        config = self.choice.train
        groups = [
            {"params": parameters, "lr": group.lr or config.lr, "base_lr": group.lr or config.lr, "weight_decay": decay}
            for group in self._groups
            for parameters, decay in _by_decay(group, config.weight_decay, everything=config.decay_norms)
            if parameters
        ]
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)

    @contextmanager
    def _own_random(self) -> Generator[None]:
        with torch.random.fork_rng(devices=self._forked):
            torch.set_rng_state(self._random)
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._device_random, self.device)
            yield
            self._random = torch.get_rng_state()
            if self.device.type == "cuda":
                self._device_random = torch.cuda.get_rng_state(self.device)

    def step(self, batch: Batch) -> float:
        """One forward, backward and optimizer step; returns the total loss before it.

        Raises HeadFailure if the loss or the gradient is not finite; the weights are then those before the step.
        """
        start = time.perf_counter()
        factor = self._schedule.factor(self.iteration)
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self._optimizer.zero_grad(set_to_none=True)
        with self._own_random():
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
                terms = self.choice.head.loss(self.trained.module, batch, self.choice.options)
            values = torch.stack([t.float() for t in terms.values()])
            found = [float(v) for v in values.detach().cpu()]
            self.terms = dict(zip(terms, found, strict=True))
            # Summed as they are printed: every term counts once.
            loss = sum(found)
            if not abs(loss) < float("inf"):
                raise HeadFailure(f"the loss is {loss} at iteration {self.iteration + 1}: lower lr, or set clip")
            values.sum().backward()
        self._clip()
        self._optimizer.step()
        self.iteration += 1
        self._record(loss)
        self.step_seconds += time.perf_counter() - start
        return loss

    def _clip(self) -> None:
        if not self.choice.train.clip:
            return
        for group in self._groups:
            norm = torch.nn.utils.clip_grad_norm_(group.parameters, self.choice.train.clip)
            if not torch.isfinite(norm):
                raise HeadFailure(f"the gradient's norm is {norm} at iteration {self.iteration + 1}: lower lr")

    def _record(self, loss: float) -> None:
        self._window.append(loss)
        total = self.choice.train.iterations
        if len(self._window) >= max(1, total // POINTS) or self.iteration == total:
            self.losses.append((self.iteration, sum(self._window) / len(self._window)))
            self._window = []

    def check_weights(self) -> None:
        """Raises HeadFailure if a parameter or buffer is not finite."""
        for name, tensor in self.trained.module.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise HeadFailure(f"weights {name!r} are not finite after iteration {self.iteration}: lower lr")

    def release(self) -> None:
        """Drops gradients and the optimizer's state: a head that stopped keeps no memory from the others."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer.state.clear()

    def state(self) -> dict[str, Any]:
        """All that continues the training exactly: tensors and plain data."""
        return {
            "iteration": self.iteration,
            "module": self.trained.module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._random,
            "device_random": self._device_random if self.device.type == "cuda" else None,
            "losses": [list(point) for point in self.losses],
            "window": list(self._window),
            "terms": dict(self.terms),
            "evaluations": [
                {
                    "iteration": e.iteration,
                    "metrics": dict(e.metrics),
                    "per_class": {k: list(v) for k, v in e.per_class.items()},
                    "chosen": e.chosen,
                }
                for e in self.evaluations
            ],
            "seconds": [self.step_seconds, self.seconds, self.waited],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state` gave."""
        self.iteration = state["iteration"]
        self.trained.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._random = state["random"]
        if self.device.type == "cuda" and state["device_random"] is not None:
            self._device_random = state["device_random"]
        self.losses = [(int(i), float(x)) for i, x in state["losses"]]
        self._window = list(state["window"])
        self.terms = dict(state["terms"])
        self.evaluations = [
            Evaluation(e["iteration"], e["metrics"], {k: tuple(v) for k, v in e["per_class"].items()}, e["chosen"])
            for e in state["evaluations"]
        ]
        self.step_seconds, self.seconds, self.waited = state["seconds"]


def _by_decay(
    group: ParameterGroup, decay: float, *, everything: bool
) -> Iterator[tuple[list[torch.nn.Parameter], float]]:
    """The parameters of a group in two: those that are decayed, and those that are not."""
    undecayed = [p for p in group.parameters if p.ndim <= 1] if group.undecayed is None else group.undecayed
    left = set() if everything else {id(p) for p in undecayed}
    yield [p for p in group.parameters if id(p) not in left], decay
    yield [p for p in group.parameters if id(p) in left], 0.0
