"""A whole, realistic `Results` made from a seed: what a full comparison on digits could have measured."""

import copy
import math
from typing import Any

import numpy as np
import pytest

from steadynorm.report.schema import Results

ARMS = {
    "plain": "Plain",
    "before": "Batch norm before the nonlinearity",
    "after": "Batch norm after the nonlinearity",
}
STEPS_TO_TARGET = {"plain": 350.0, "before": 105.0, "after": 130.0}
INITS = ("default", "corrected")
RATES = [round(10 ** (k / 2), 6) for k in range(-7, 4)]
TARGET = 0.952


def learning_curve(steps: np.ndarray, tau: float, best: float) -> np.ndarray:
    """Accuracy that rises from 0.1 to `best` with time constant `tau`."""
    return 0.1 + (best - 0.1) * (1 - np.exp(-((steps / tau) ** 0.8)))


# fmt: off
def make_results(seed: int = 0, seeds: int = 10) -> Results:
    rng = np.random.default_rng(seed)
    steps = np.unique(np.geomspace(5, 4000, 60).astype(int))
    best = {"plain": 0.962, "before": 0.975, "after": 0.972}
    best_rate = {"plain": 0.3162, "before": 1.0, "after": 1.0}

    def interval(centre: float, half: float) -> list[float]:
        return [round(centre - half, 5), round(centre + half, 5)]

    def choice(arm: str, purpose: str) -> dict[str, Any]:
        rate = best_rate[arm] * (1.0 if purpose == "accuracy" else 3.1623)
        return {"arm": arm, "purpose": purpose, "init": "corrected", "lr": round(rate, 4), "at_edge": arm == "after"}

    tuning: list[dict[str, Any]] = []
    for arm in ARMS:
        for init in INITS:
            for rate in RATES:
                distance = abs(math.log10(rate / best_rate[arm]))
                top = best[arm] - (0.03 if init == "default" and arm == "plain" else 0.0)
                spread = 0.9 if arm == "plain" else 1.8
                value = float(np.clip(top - 0.25 * max(0.0, distance - 0.5 * spread) ** 2, 0.1, 1))
                diverged = 3 if rate > best_rate[arm] * (2 if arm == "plain" else 12) else 0
                values = [0.1] * 3 if diverged else [float(v) for v in np.round(value + rng.normal(0, 0.004, 3), 4)]
                accuracy = float(np.median(values))
                tuning.append(
                    {
                        "arm": arm, "init": init, "lr": rate, "accuracies": values, "accuracy": accuracy,
                        "steps_to_target": [
                            int(STEPS_TO_TARGET[arm] * best_rate[arm] / rate) if v > TARGET else None for v in values
                        ],
                        "diverged": diverged, "trains": diverged == 0 and accuracy >= TARGET,
                    }
                )

    curves: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for arm in ARMS:
        for purpose in ("speed", "accuracy"):
            picked = choice(arm, purpose)
            tau = STEPS_TO_TARGET[arm] / (6.5 if purpose == "speed" else 4.5)
            sample = np.stack(
                [learning_curve(steps, tau * math.exp(rng.normal(0, 0.12)), best[arm]) for _ in range(40)]
            )
            sample = np.clip(sample + rng.normal(0, 0.006, sample.shape), 0, 1)
            low, middle, high = np.round(np.percentile(sample, [10, 50, 90], axis=0), 4)
            curves.append(
                {
                    "arm": arm, "purpose": purpose, "init": picked["init"], "lr": picked["lr"],
                    "steps": steps.tolist(), "p10": low.tolist(), "p50": middle.tolist(), "p90": high.tolist(),
                }
            )
            runs += [
                {
                    "arm": arm, "purpose": purpose, "init": picked["init"], "lr": picked["lr"], "seed": 1000 + s,
                    "steps_to_target": None
                    if arm == "plain" and s == 3
                    else int(STEPS_TO_TARGET[arm] * rng.uniform(0.8, 1.2)),
                    "final_accuracy": round(best[arm] + float(rng.normal(0, 0.004)), 4),
                    "best_accuracy": round(best[arm] + 0.006, 4),
                    "test_accuracy": round(best[arm] - 0.002, 4) if purpose == "accuracy" else None,
                    "train_accuracy": 0.999 if purpose == "accuracy" else None,
                    "diverged_at": 40 if arm == "plain" and s == 3 and purpose == "speed" else None,
                }
                for s in range(seeds)
            ]

    summaries = [
        {
            "arm": arm, "label": label, "choice_accuracy": choice(arm, "accuracy"),
            "choice_speed": choice(arm, "speed"), "steps_to_target": STEPS_TO_TARGET[arm],
            "steps_interval": interval(STEPS_TO_TARGET[arm], 0.15 * STEPS_TO_TARGET[arm]),
            "reached": seeds - (arm == "plain"), "seeds": seeds, "final_accuracy": best[arm],
            "final_interval": interval(best[arm], 0.004), "best_accuracy": best[arm] + 0.006,
            "test_accuracy": best[arm] - 0.002, "test_interval": interval(best[arm] - 0.002, 0.005),
            "lr_range": [0.0316, 0.3162] if arm == "plain" else [0.00316, 10.0],
            "seconds_per_step": 0.00041 if arm == "plain" else 0.00072,
            "seconds_to_target": STEPS_TO_TARGET[arm] * (0.00041 if arm == "plain" else 0.00072),
        }
        for arm, label in ARMS.items()
    ]

    def ratio(arm: str, init: str, target: float, value: float, spread: float = 0.17) -> dict[str, Any]:
        return {
            "arm": arm, "init": init, "target": target, "ratio": round(value, 3),
            "interval": [round(value * math.exp(-spread), 3), round(value * math.exp(spread), 3)],
            "method": "paired geometric mean, t-interval on logs", "reached_plain": seeds, "reached_arm": seeds,
            "seeds": seeds,
        }

    ratios = [
        ratio(arm, init, TARGET, value)
        for arm, values in {"before": (3.3, 12.8, 3.3), "after": (2.7, 10.1, 2.7)}.items()
        for init, value in zip(("tuned", "default", "corrected"), values, strict=True)
    ]
    targets = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96]
    ratio_curve = [
        ratio(arm, "tuned", t, (1.3 + 2.0 * t**4) * (1.0 if arm == "before" else 0.85), 0.12 + 0.1 * t)
        for arm in ("before", "after")
        for t in targets
    ]
    ratio_curve[-1] |= {"ratio": 4.1, "interval": [4.1, None], "method": "at least", "reached_plain": 2}

    layers = [f"layer {i + 1}" for i in range(20)]
    gradients = []
    for arm in ARMS:
        for phase, step, decades in (("start", 0, 1.9), ("middle", 2000, 1.4), ("end", 4000, 1.2)):
            slope = decades if arm == "plain" else 0.35 if arm == "before" else 0.5
            norms = 10 ** (-4.2 + np.linspace(-slope, 0, 20) + rng.normal(0, 0.05, 20))
            gradients.append(
                {
                    "arm": arm, "phase": phase, "step": step, "layers": layers,
                    "norms": [float(f"{v:.4g}") for v in norms], "spread_decades": slope,
                    "verdict": "vanishing" if slope > 1 else "steady",
                }
            )

    drift = []
    for arm in ARMS:
        time = steps / 4000
        centre = np.zeros_like(time) if arm != "plain" else -1.6 * (1 - np.exp(-6 * time)) + 0.3 * np.sin(9 * time)
        half = 1 + 0.9 * time if arm == "plain" else 1.02 + 0.05 * time
        drift.append(
            {
                "arm": arm, "steps": steps.tolist(), "p15": np.round(centre - half, 4).tolist(),
                "p50": np.round(centre, 4).tolist(), "p85": np.round(centre + half, 4).tolist(),
                "drift": 0.31 if arm == "plain" else 0.02,
            }
        )

    batch_sizes = [
        {
            "arm": arm, "batch_size": size, "lr": best_rate[arm],
            "final_accuracy": round(best[arm] - (0.09 / size if arm != "plain" else 0.002), 4),
            "interval": interval(best[arm] - (0.09 / size if arm != "plain" else 0.002), 0.004),
            "steps_to_target": None if size == 2 else STEPS_TO_TARGET[arm] * (60 / size) ** 0.3,
        }
        for arm in ARMS
        for size in (2, 4, 8, 16, 60, 256)
    ]
    regularization = [
        {
            "arm": arm, "dropout": dropout, "lr": best_rate[arm], "train_accuracy": 0.998 - 0.01 * dropout,
            "test_accuracy": best[arm] + (0.004 if dropout and arm == "plain" else -0.004 * bool(dropout)),
            "test_interval": interval(best[arm], 0.005), "gap": 0.998 - 0.01 * dropout - best[arm],
        }
        for arm in ARMS
        for dropout in (0.0, 0.2, 0.5)
    ]
    standardization = [
        {
            "condition": condition, "init": "corrected", "lr": 0.3162, "test_accuracy": value,
            "interval": interval(value, 0.01),
        }
        for condition, value in (
            ("plain, raw", 0.61),
            ("plain, standardised", 0.955),
            ("batch norm in the hidden layers, raw", 0.902),
            ("batch norm as first layer, raw", 0.968),
        )
    ]
    timing = [
        {
            "arm": arm, "seconds_per_step": 0.00041 * factor, "p20": 0.00039 * factor, "p80": 0.00046 * factor,
            "ratio_to_plain": factor, "ratio_interval": interval(factor, 0.06 * (factor > 1)),
        }
        for arm, factor in (("plain", 1.0), ("before", 1.76), ("after", 1.72))
    ]

    def claim(ident: str, text: str, statistic: str, unit: str, smallest: float, estimate: float | None, bounds: Any,
              verdict: str, explanation: str) -> dict[str, Any]:  # fmt: skip
        return {
            "id": ident, "claim": text, "statistic": statistic, "unit": unit, "smallest_effect": smallest,
            "estimate": estimate, "interval": bounds, "verdict": verdict, "explanation": explanation, "details": {},
        }

    claims = [
        claim("gradients", "Stabler gradients through depth",
              "Spread of gradient norms over the layers at the start, plain minus batch norm", "decades", 0.5, 1.55,
              [1.31, 1.79], "supported", "At the start the norms span 1.9 decades without and 0.35 with batch norm."),
        claim("steps", "The same accuracy in fewer steps",
              "Steps to the target, plain over batch norm, paired over seeds", "times", 1.25, 3.3, [2.7, 3.9],
              "supported", "3.3 times fewer steps to 95.2 % with batch norm before the nonlinearity."),
        claim("accuracy", "Better accuracy", "Test accuracy, batch norm minus plain, paired over seeds", "points", 0.5,
              0.9, [0.2, 1.6], "cannot tell", "The gain of 0.9 points may be smaller than what matters."),
        claim("standardisation", "No separate standardisation needed",
              "Test accuracy, batch norm as first layer on raw features minus plain on standardised ones", "points",
              1.0, 0.1, [-0.6, 0.8], "no material difference", "Within 1 point of standardising by hand."),
        claim("regularisation", "Less need for other regularisation",
              "Gain in test accuracy from dropout, plain minus batch norm", "points", 0.5, -1.4, [-2.1, -0.7],
              "contradicted", "Dropout helped the batch-normalised network more."),
        claim("time", "Slower per step but faster to learn", "Seconds to the target, plain over batch norm", "times",
              1.25, 1.9, [1.5, None], "supported", "1.76 times the seconds per step, 1.9 times fewer to the target."),
    ]  # fmt: skip

    return {  # pyright: ignore
        "schema": 1, "version": "0.1.0", "status": "complete",
        "settings": {"data": "digits", "model": "sigmoid-mlp", "seeds": seeds, "steps": 4000, "batch_size": 60,
                     "optimizer": "sgd", "target": "auto", "jobs": 2},
        "environment": {"python": "3.11.9", "torch": "2.13.0", "numpy": "2.2.1", "processor": "2 cores",
                        "threads": "1"},
        "data": {"name": "digits", "classes": 10, "features": 64, "train": 1077, "validation": 360, "test": 360},
        "model": {"name": "sigmoid-mlp", "description": "3 hidden layers of 100 sigmoid units.", "layers": 4},
        "arms": [{"id": arm, "label": label, "parameters": 27710 + 600 * (arm != "plain")}
                 for arm, label in ARMS.items()],
        "target": TARGET, "target_source": "99 % of the plain arm's median validation accuracy at its best setting",
        "tuning": tuning, "choices": [choice(arm, purpose) for arm in ARMS for purpose in ("accuracy", "speed")],
        "curves": curves, "runs": runs, "summaries": summaries, "ratios": ratios, "ratio_curve": ratio_curve,
        "gradients": gradients, "drift": drift, "batch_sizes": batch_sizes, "regularization": regularization,
        "standardization": standardization, "timing": timing, "claims": claims, "saved_model": "model.safetensors",
    }  # fmt: skip

# fmt: on


SECTIONS = (
    "tuning", "choices", "curves", "runs", "summaries", "ratios", "ratio_curve", "gradients", "drift", "batch_sizes",
    "regularization", "standardization", "timing", "claims",
)  # fmt: skip


@pytest.fixture(scope="session")
def _whole() -> Results:
    return make_results()


@pytest.fixture
def results(_whole: Results) -> Results:
    return copy.deepcopy(_whole)


@pytest.fixture
def interrupted(_whole: Results) -> Results:
    """Stopped by the user while the first settings were tried: nothing is known but the data and the arms."""
    results = copy.deepcopy(_whole)
    for name in SECTIONS:
        results[name] = []
    results["status"], results["target"], results["saved_model"] = "interrupted", None, None
    return results
