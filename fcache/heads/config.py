"""How heads are trained: a checked configuration, and typed values from text."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fcache.cache_spec import SpecError, unknown_name
from fcache.heads.schedules import Schedule
from fcache.heads.tasks import head_names

# What a recipe may set for one head alone; the rest belongs to the stream that all heads share.
HEAD_FIELDS = frozenset(
    {"lr", "weight_decay", "decay_norms", "betas", "eps", "clip"}
    | {"schedule", "warmup", "power", "milestones", "gamma", "floor"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything about training apart from data and heads; equal configs on equal data give equal weights.

    `iterations` and `batch_size` are those of the shared stream. `lr`, `weight_decay`, `betas`, `eps`: AdamW;
    parameters with one axis (norms and biases), or those that a head names instead, are decayed only if `decay_norms`.
    `clip` is the largest gradient norm of a parameter group, 0 for none. `schedule`, `warmup` (iterations), `power`,
    `milestones` (iterations), `gamma`, `floor`: see `Schedule`. `seed` sets initial weights and dropout. `amp` trains
    under bf16 autocast on GPUs that have it, in float32 elsewhere. `evaluate_every` and `checkpoint_every` count
    iterations, 0 for only at the end, or when stopped. `heads` maps a head's name (full, or short) to what differs for
    it: fields of HEAD_FIELDS and the head's own options. Raises SpecError for values out of range.
    """

    iterations: int = 1000
    batch_size: int = 16
    seed: int = 0
    lr: float = 1e-3
    weight_decay: float = 0.01
    decay_norms: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.0
    schedule: str = "poly"
    warmup: int = 0
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    floor: float = 0.0
    amp: bool = False
    evaluate_every: int = 0
    checkpoint_every: int = 500
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.name != "heads":
                object.__setattr__(self, f.name, typed(f.name, getattr(self, f.name), like=f.default))
        for name in ("iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("seed", "weight_decay", "clip", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.lr <= 0 or self.eps <= 0:
            raise SpecError(f"lr and eps must be positive, got {self.lr} and {self.eps}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise SpecError(f"betas are two numbers in [0, 1), got {self.betas}")
        # The schedule checks its own values: here, before any work.
        self.lr_schedule()
        for values in self.heads.values():
            self._replaced(values)

    def lr_schedule(self) -> Schedule:
        """The learning rate schedule."""
        return Schedule(
            name=self.schedule,
            iterations=self.iterations,
            warmup=self.warmup,
            power=self.power,
            milestones=self.milestones,
            gamma=self.gamma,
            floor=self.floor,
        )

    def for_head(self, name: str, own: Mapping[str, Any]) -> tuple["TrainConfig", dict[str, Any]]:
        """The config of one head of full name `task/head`, without the section `heads`, and its options.

        `own` are settings and options of this one head; they come before those of its section, and a section under the
        full name before one under the short name.
        """
        values = {**self.heads.get(name, self.heads.get(name.rpartition("/")[2], {})), **own}
        return self._replaced(values), {k: v for k, v in values.items() if k not in HEAD_FIELDS}

    def _replaced(self, values: Mapping[str, Any]) -> "TrainConfig":
        own = {k: v for k, v in values.items() if k in HEAD_FIELDS}
        return dataclasses.replace(self, heads={}, **own)


def config_from(values: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig of values by field name. Raises SpecError for unknown settings and heads, and for wrong types."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    for name in values:
        if name not in known:
            raise unknown_name("training setting", name, known)
    heads = {*head_names(), *(name.partition("/")[2] for name in head_names())}
    for name in values.get("heads", {}):
        if name not in heads:
            raise unknown_name("head in the settings", name, heads)
    return TrainConfig(**values)


def typed(name: str, value: Any, *, like: Any) -> Any:
    """`value`, possibly text ("0.1", "true", "800,1100"), as the type of `like`.

    A tuple takes a list or text with commas; its items are as the first of `like`, and floats if that is empty, or
    integers where all of them are and `like` is empty. Raises SpecError if the value is of another type.
    """
    if isinstance(like, tuple):
        items = _items(value)
        if like:
            return tuple(typed(name, v, like=like[0]) for v in items)
        numbers = [typed(name, v, like=0.0) for v in items]
        return tuple(int(n) for n in numbers) if all(n == int(n) for n in numbers) else tuple(numbers)
    if isinstance(like, str):
        if isinstance(value, str):
            return value
    elif isinstance(like, bool):
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if isinstance(like, float) and abs(number) < float("inf"):
            return number
        if isinstance(like, int) and number == number // 1:
            return int(number)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[type(like)]
    raise SpecError(f"{name} is {kind}, got {value!r}")


def _items(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [v.strip() for v in value.strip("[]()").split(",") if v.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]
