"""Learning rate schedules: the factor on the base learning rate at an iteration, in closed form."""

import math
from dataclasses import dataclass

from fcache.cache_spec import SpecError, unknown_name

SCHEDULES = ("constant", "cosine", "linear", "multi-step", "poly")


@dataclass(frozen=True)
class Schedule:
    """A schedule over `iterations`, with linear warm-up over the first `warmup` ones.

    With x = t / iterations the factor at iteration t (from 0) is: "poly" (1 - x)^power; "linear" 1 - x; "cosine"
    (1 + cos(pi x)) / 2; "multi-step" gamma to the number of `milestones` (iterations) at or before t; "constant" 1.
    `floor` is the factor it ends at: floor + (1 - floor) * factor. Warm-up multiplies by (t + 1) / warmup.
    Raises SpecError for an unknown name or values out of range.
    """

    name: str
    iterations: int
    warmup: int = 0
    power: float = 0.9
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise unknown_name("schedule", self.name, SCHEDULES)
        if self.warmup < 0 or self.power <= 0 or not 0 <= self.floor <= 1 or not 0 < self.gamma <= 1:
            raise SpecError(
                "a schedule needs warmup >= 0, power > 0, floor in [0, 1] and gamma in (0, 1], got "
                f"{self.warmup}, {self.power}, {self.floor}, {self.gamma}"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise SpecError(f"milestones are iterations in rising order, got {self.milestones}")
        if self.name == "multi-step" and not self.milestones:
            raise SpecError("schedule 'multi-step' needs milestones, for example --set milestones=800,1100")

    def factor(self, iteration: int) -> float:
        """The factor on the base learning rate at an iteration, counted from 0."""
        x = iteration / self.iterations
        main = {
            "constant": lambda: 1.0,
            "cosine": lambda: 0.5 * (1.0 + math.cos(math.pi * x)),
            "linear": lambda: 1.0 - x,
            "multi-step": lambda: self.gamma ** sum(m <= iteration for m in self.milestones),
            "poly": lambda: (1.0 - x) ** self.power,
        }[self.name]()
        warm = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        return warm * (self.floor + (1.0 - self.floor) * main)
