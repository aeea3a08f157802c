"""One training run: deterministic in its `RunSpec`, on one thread, whatever runs beside it."""

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steadynorm.errors import RejectedBatchWarning
from steadynorm.experiment import probes
from steadynorm.experiment.arms import Arm, Init, build
from steadynorm.experiment.problem import Problem, Scaling, derived_seed
from steadynorm.experiment.split import Split
from steadynorm.experiment.stats import steps_to_target

__all__ = ["Batches", "Optimizer", "Run", "RunSpec", "Step", "single_thread", "train", "train_model"]

Optimizer: TypeAlias = Literal["sgd", "adam"]

EVALUATIONS: Final = 400
"""How often a run is evaluated on the validation part, at most."""

DIVERGED_FACTOR: Final = 10.0
"""A loss this many times a blind guess's (or the untrained network's, if that is worse) counts as diverging..."""

DIVERGED_STEPS: Final = 20
"""...once it has stayed there for so many steps in a row. A loss that is not finite counts at once."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that a run's result depends on, besides the problem.

    Attributes:
        arm: Which network.
        init: Which initialisation; see `arms.build`.
        lr: Learning rate.
        seed: Decides split, data order and initialisation; the same for all arms.
        steps: Optimiser updates.
        batch_size: Examples per step.
        optimizer: "sgd" (no momentum, no weight decay) or "adam" (torch's defaults).
        dropout: Probability after each hidden activation.
        scaling: How the features are presented.
        test: Whether the test part is read, once, after the last step.
        probes: Whether gradients and layer inputs are recorded.
    """

    arm: Arm
    init: Init
    lr: float
    seed: int
    steps: int
    batch_size: int
    optimizer: Optimizer = "sgd"
    dropout: float = 0.0
    scaling: Scaling = "as split"
    test: bool = False
    probes: bool = False

    @property
    def eval_every(self) -> int:
        """Steps between evaluations."""
        return math.ceil(self.steps / EVALUATIONS)


@dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
        curve: Validation accuracy at each multiple of `eval_every`, up to the divergence if there was one.
        final_accuracy: Validation, mean over the last tenth of the evaluations; at divergence if the run diverged.
        best_accuracy: Validation, the best single evaluation.
        train_accuracy: Over the whole training part, after the last step.
        test_accuracy: After the last step; None unless asked for.
        diverged_at: The step at which training was given up.
        gradients: {phase: {"step", "layers", "norms"}}, if asked for.
        drift: Percentiles of the last hidden nonlinearity's input, if asked for.
    """

    curve: tuple[float, ...]
    final_accuracy: float
    best_accuracy: float
    train_accuracy: float
    test_accuracy: float | None = None
    diverged_at: int | None = None
    gradients: dict[str, probes.GradientRecord] | None = None
    drift: probes.DriftRecord | None = None

    def steps_to(self, target: float, eval_every: int) -> int | None:
        """The first step at which the mean of three successive evaluations is at least the target."""
        steps = range(eval_every, eval_every * len(self.curve) + 1, eval_every)
        return steps_to_target(steps, self.curve, target)

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the log of finished runs."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Run":
        """The inverse of `as_json`."""
        changed: dict[str, Any] = {**fields, "curve": tuple(fields["curve"])}
        return Run(**changed)


@contextmanager
def single_thread() -> Generator[None]:
    """Runs the body on one torch thread: sums then round the same way beside any number of other workers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Batches:
    """Endless full batches of row numbers: one random permutation after another, batches straddling their ends."""

    def __init__(self, n: int, batch_size: int, generator: torch.Generator) -> None:
        self._n, self._size, self._generator = n, min(batch_size, n), generator
        self._queue = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        if len(self._queue) < self._size:
            self._queue = torch.cat([self._queue, torch.randperm(self._n, generator=self._generator)])
        rows, self._queue = self._queue[: self._size], self._queue[self._size :]
        return rows


class Step:
    """One optimiser update on one batch."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, lr: float) -> None:
        parameters = list(model.parameters())
        self._model = model
        # The fused variants cost the least per step for the small tensors at hand.
        self._optimizer = (
            torch.optim.SGD(parameters, lr, fused=True)
            if optimizer == "sgd"
            else torch.optim.Adam(parameters, lr, fused=True)
        )

    def __call__(self, x: Tensor, y: Tensor) -> float:
        """Updates the model; returns the loss before the update."""
        self._optimizer.zero_grad()
        loss = F.cross_entropy(self._model(x), y)
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        self._optimizer.step()
        return loss.item()


class _Divergence:
    """Watches the training loss; see `DIVERGED_FACTOR` and `DIVERGED_STEPS`."""

    def __init__(self, classes: int) -> None:
        self._limit = DIVERGED_FACTOR * math.log(classes)
        self._first: float | None = None
        self._above = 0

    def __call__(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self._first is None:
            self._first = loss
            self._limit = max(self._limit, DIVERGED_FACTOR * loss)
        self._above = self._above + 1 if loss > self._limit else 0
        return self._above >= DIVERGED_STEPS


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, chunk: int = 4096) -> float:
    """The share of examples that the model, in evaluation mode, classifies right; its mode is restored."""
    training = model.training
    model.eval()
    right = sum(
        int((model(part).argmax(1) == labels).sum())
        for part, labels in zip(x.split(chunk), y.split(chunk), strict=True)
    )
    model.train(training)
    return right / len(y)


def _seeded_model(spec: RunSpec, problem: Problem) -> nn.Module:
    torch.manual_seed(derived_seed(spec.seed, spec.arm.salt, "initialisation"))
    model = build(problem.source, spec.arm, problem.input_shape, problem.classes, init=spec.init, dropout=spec.dropout)
    # Dropout draws from the global state too; reseeded, it does not depend on how many numbers initialisation took.
    torch.manual_seed(derived_seed(spec.seed, spec.arm.salt, "dropout"))
    return model.train()


def train_model(spec: RunSpec, problem: Problem) -> tuple[Run, nn.Module]:
    """Trains one network as `train` does and also returns it."""
    with single_thread(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # A run that diverges hands its batch norms batches that are not finite; `diverged_at` says so already.
        warnings.simplefilter("ignore", RejectedBatchWarning)
        model = _seeded_model(spec, problem)
        parts = problem.split(spec.seed, spec.scaling)
        return _train(spec, model, parts, problem.classes), model


def train(spec: RunSpec, problem: Problem) -> Run:
    """Trains one network from scratch.

    The split depends on the seed alone; data order, initialisation and dropout on seed and `arm.salt`. All arms of one
    seed thus see the same batches and start from the same weights. Batches are always full: one that reaches the end
    of an epoch is filled up from the next.

    Args:
        spec: What to train, and how.
        problem: The data and the network.

    Returns:
        What was measured; the same numbers for the same arguments on the same machine.
    """
    return train_model(spec, problem)[0]


def _train(spec: RunSpec, model: nn.Module, parts: Split, classes: int) -> Run:
    order = torch.Generator().manual_seed(derived_seed(spec.seed, spec.arm.salt, "order"))
    batches = Batches(len(parts.y_train), spec.batch_size, order)
    step, diverges = Step(model, spec.optimizer, spec.lr), _Divergence(classes)
    recorder = probes.Recorder(model, parts, spec.steps) if spec.probes else None
    curve: list[float] = []
    diverged_at = None
    for number in range(1, spec.steps + 1):
        rows = next(batches)
        if diverges(step(parts.x_train[rows], parts.y_train[rows])):
            diverged_at = number
            break
        if number % spec.eval_every == 0:
            curve.append(accuracy(model, parts.x_val, parts.y_val))
        if recorder:
            recorder.after(number)
    if diverged_at is None:
        tail = curve[-max(1, len(curve) // 10) :]
        final = math.fsum(tail) / len(tail)
    else:
        final = accuracy(model, parts.x_val, parts.y_val)
    return Run(
        curve=tuple(curve),
        final_accuracy=final,
        best_accuracy=max([*curve, final]),
        train_accuracy=accuracy(model, parts.x_train, parts.y_train),
        test_accuracy=accuracy(model, parts.x_test, parts.y_test) if spec.test else None,
        diverged_at=diverged_at,
        gradients=recorder.gradients if recorder else None,
        drift=recorder.drift() if recorder else None,
    )
