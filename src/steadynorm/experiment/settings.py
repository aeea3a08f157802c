"""The arguments of a comparison, checked."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, cast, get_args

from steadynorm.errors import ArgumentError
from steadynorm.experiment.studies import STUDIES
from steadynorm.experiment.train import Optimizer

__all__ = ["Settings"]

_LEAST: Final = {"seeds": 2, "tuning_seeds": 1, "steps": 10, "batch_size": 2, "jobs": 1, "first_seed": 0}


@dataclass(frozen=True)
class Settings:
    """How a comparison is carried out.

    Attributes:
        seeds: Fresh seeds that everything reported is measured on, at least 2.
        tuning_seeds: Other seeds that settings are chosen on.
        steps: Optimiser updates per run.
        batch_size: Examples per step.
        target: Validation accuracy that counts as arriving, in (0, 1], or "auto".
        optimizer: "sgd" or "adam".
        studies: Which of `STUDIES` to carry out.
        jobs: Worker processes.
        first_seed: The first of the tuning seeds; the fresh ones follow 1000 later.

    Raises:
        ArgumentError: One of them is out of range.
    """

    seeds: int
    tuning_seeds: int
    steps: int
    batch_size: int
    target: float | Literal["auto"]
    optimizer: Optimizer
    studies: tuple[str, ...]
    jobs: int
    first_seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value: object = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.optimizer not in get_args(Optimizer):
            raise ArgumentError(f"optimizer must be one of {', '.join(get_args(Optimizer))}, got {self.optimizer!r}.")
        unknown = [name for name in self.studies if name not in STUDIES]
        if unknown:
            raise ArgumentError(f"studies must be some of {', '.join(STUDIES)}, got {unknown[0]!r}.")
        target = cast("object", self.target)
        if target != "auto" and not (
            isinstance(target, int | float) and math.isfinite(target) and 0 < target <= 1 and target is not True
        ):
            raise ArgumentError(f'target must be "auto" or an accuracy as a fraction in (0, 1], got {target!r}.')

    def as_json(self) -> dict[str, Any]:
        """Plain data for the results; without `jobs`, which changes no number."""
        fields = asdict(self)
        del fields["jobs"]
        return {**fields, "studies": list(self.studies)}
