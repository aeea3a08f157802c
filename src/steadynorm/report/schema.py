"""The shape of `results.json`, version 1: plain data, which the experiment writes and the report reads.

Accuracies are fractions in [0, 1]; steps count optimiser updates; a missing figure is None, never NaN, so that the
file is strict JSON. An interval is `[low, high]` at 95 %. An arm's id is "plain", "before" or "after" (batch norm
before or after the nonlinearity), or what a user's own list of arms calls it; `init` is one of `INITS`.
"""

from typing import Any, Literal, TypeAlias, TypedDict

SCHEMA_VERSION = 1

INITS = ("default", "corrected", "critical")
"""Initialisations that are tuned over: torch's own; with the gain that keeps the signal's second moment; with the gain
that keeps the gradient's (`steadynorm.init.gain`, preserve="signal" and "gradient")."""

Interval: TypeAlias = list[float | None]  # a bound is None where too few seeds leave it undefined, or it is open
Verdict: TypeAlias = Literal["supported", "contradicted", "no material difference", "cannot tell"]


class ArmInfo(TypedDict):
    """One arm of the comparison."""

    id: str
    label: str
    parameters: int


class TuningRow(TypedDict):
    """One setting of one arm, over the tuning seeds."""

    arm: str
    init: str
    lr: float
    accuracies: list[float]  # validation, mean over the last tenth of the steps, one per seed; diverged: at divergence
    accuracy: float  # their median
    steps_to_target: list[int | None]  # None: not reached
    diverged: int  # how many of the seeds
    trains: bool  # no seed diverged and the median accuracy is at least the target


class Choice(TypedDict):
    """The setting that tuning chose for an arm, and for what."""

    arm: str
    purpose: Literal["accuracy", "speed"]
    init: str
    lr: float
    at_edge: bool  # the search stopped at its widest with the winner still at an edge


class Curve(TypedDict):
    """Validation accuracy against steps over the fresh seeds of one choice: percentiles, pointwise."""

    arm: str
    purpose: str
    init: str
    lr: float
    steps: list[int]
    p10: list[float]
    p50: list[float]
    p90: list[float]


class FreshRun(TypedDict):
    """One measured run on a fresh seed."""

    arm: str
    purpose: str  # "accuracy", "speed"
    init: str
    lr: float
    seed: int
    steps_to_target: int | None
    final_accuracy: float  # validation, mean over the last tenth
    best_accuracy: float  # validation
    test_accuracy: float | None  # read once, at the last step; only for purpose "accuracy"
    train_accuracy: float | None
    diverged_at: int | None


class Summary(TypedDict):
    """One arm, in the figures a reader asks for first."""

    arm: str
    label: str
    choice_accuracy: Choice
    choice_speed: Choice
    steps_to_target: float | None  # Kaplan-Meier median over the fresh seeds at the speed setting
    steps_interval: list[float | None]
    reached: int  # of `seeds`
    seeds: int
    final_accuracy: float
    final_interval: Interval
    best_accuracy: float
    test_accuracy: float
    test_interval: Interval
    lr_range: list[float] | None  # lowest and highest learning rate that trains, at the arm's better initialisation
    seconds_per_step: float | None
    seconds_to_target: float | None


class Ratio(TypedDict):
    """Steps of the plain arm over steps of another, on paired seeds: above 1 means fewer steps with batch norm."""

    arm: str
    init: str  # "tuned" (each arm's best one), or one of INITS (both arms the same)
    target: float
    ratio: float | None
    interval: list[float | None]
    method: str  # one of the methods named in `steadynorm.experiment.stats`: "at least" and "at most" are bounds
    reached_plain: int
    reached_arm: int
    seeds: int


class GradientRow(TypedDict):
    """Gradient norms per layer at one phase of training: medians over seeds."""

    arm: str
    phase: Literal["start", "middle", "end"]
    step: int
    layers: list[str]
    norms: list[float]  # RMS of dL/d(pre-activation output of the layer) over the batch, input side first
    spread_decades: float  # log10(largest / smallest), median over seeds
    verdict: Literal["steady", "vanishing", "exploding"]


class DriftRow(TypedDict):
    """Percentiles of what enters the last hidden nonlinearity, over training."""

    arm: str
    steps: list[int]
    p15: list[float]
    p50: list[float]
    p85: list[float]
    drift: float  # mean |p50(t) - p50(end)| over training, in units of the final p85 - p15


class BatchSizeRow(TypedDict):
    """One batch size, one arm."""

    arm: str
    batch_size: int
    lr: float
    final_accuracy: float
    interval: Interval
    steps_to_target: float | None


class RegularizationRow(TypedDict):
    """Train and test accuracy with and without dropout."""

    arm: str
    dropout: float
    lr: float
    train_accuracy: float
    test_accuracy: float
    test_interval: Interval
    gap: float


class StandardizationRow(TypedDict):
    """Features multiplied by 10^U(-3, 3): what each remedy makes of them."""

    condition: Literal[
        "plain, raw", "plain, standardised", "batch norm in the hidden layers, raw", "batch norm as first layer, raw"
    ]
    init: str
    lr: float
    test_accuracy: float
    interval: Interval


class TimingRow(TypedDict):
    """Seconds per training step, from a serial pass with the arms interleaved."""

    arm: str
    seconds_per_step: float  # median over rounds
    p20: float
    p80: float
    ratio_to_plain: float  # median of the paired ratios
    ratio_interval: Interval


class Claim(TypedDict):
    """One claim made for batch norm, its statistic stated beforehand, and what was measured."""

    id: str  # gradients, steps, accuracy, standardisation, regularisation, time
    claim: str
    statistic: str
    unit: str  # "decades", "times", "points", ...
    smallest_effect: float
    estimate: float | None
    interval: list[float | None] | None
    verdict: Verdict
    explanation: str  # one sentence with the figures
    details: dict[str, Any]


class Results(TypedDict):
    """The whole file. A section that was not reached before an interruption is empty."""

    schema: int
    version: str
    status: Literal["complete", "interrupted"]
    settings: dict[str, Any]  # the arguments of `compare`, as used
    environment: dict[str, str]  # python, torch, numpy, processor, threads
    data: dict[str, Any]  # name, classes, features, train, validation, test
    model: dict[str, Any]  # name, description, layers
    arms: list[ArmInfo]
    target: float | None
    target_source: str
    tuning: list[TuningRow]
    choices: list[Choice]
    curves: list[Curve]
    runs: list[FreshRun]
    summaries: list[Summary]
    ratios: list[Ratio]  # at `target`, for init tuned and each of INITS
    ratio_curve: list[Ratio]  # init tuned, over a grid of targets
    gradients: list[GradientRow]
    drift: list[DriftRow]
    batch_sizes: list[BatchSizeRow]
    regularization: list[RegularizationRow]
    standardization: list[StandardizationRow]
    timing: list[TimingRow]
    claims: list[Claim]
    saved_model: str | None
