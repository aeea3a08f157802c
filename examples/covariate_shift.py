"""Four answers to covariate shift, where the truth is known: do nothing, adapt, retrain with weights, with new labels.

    python examples/covariate_shift.py

The population moves: other people come, and what holds for each of them stays as it was. A small network has spent its
capacity where the old population was; drawing the old rows by their weights spends it anew, without one new label.
Adapting the batch norms would take the new people for the old ones: the guards abstain.

The sensor drifts: the same people, measured with another gain and offset. Adapting undoes just that, for those who know
and turn the guards off. Weights cannot: hardly any old measurement looks like a new one, as the rows they leave say.

Which of the two it is, P(x) alone does not tell. Labels do: a hundred are enough to see whether accuracy is lost.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

import steadynorm as sn

N, SEEDS = 3000, 3


def drawn(rng: np.random.Generator, mean: float, deviation: float) -> tuple[Tensor, Tensor]:
    x = rng.normal(size=(N, 4))
    x[:, 0] = mean + deviation * x[:, 0]
    p = 1 / (1 + np.exp(-4 * np.sin(2.5 * x[:, 0])))  # the same rule for everybody
    return torch.tensor(x, dtype=torch.float32), torch.tensor(rng.random(N) < p).long()


def trained(x: Tensor, y: Tensor, weights: Tensor | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), sn.BatchNorm1d(4, activation="relu"), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(400):
        chosen = torch.randint(len(x), (256,)) if weights is None else weights.multinomial(256, replacement=True)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def answers(seed: int, scenario: str) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    x, y = drawn(rng, -0.5, 0.8)
    moved = scenario == "the population moves"
    now, later = (drawn(rng, 0.7, 0.5) if moved else drawn(rng, -0.5, 0.8) for _ in range(2))
    for side in () if moved else (now, later):
        side[0][:, 0] = 1.6 * side[0][:, 0] + 2.0
    model = trained(x, y)
    report = sn.shift.compare(x.numpy(), now[0].numpy())
    asked, insisted = copy.deepcopy(model), copy.deepcopy(model)
    sn.shift.adapt_(asked, now[0])  # abstains: the predicted classes are skewed, which is all that it can see
    sn.shift.adapt_(insisted, now[0], guard=False)
    weights = torch.tensor(report.weights.values, dtype=torch.float32)
    return {
        "before the shift": accuracy(model, *drawn(np.random.default_rng(seed + 100), -0.5, 0.8)),
        "do nothing": accuracy(model, *later),
        "adapt_": accuracy(asked, *later),
        "adapt_, guards off": accuracy(insisted, *later),
        "retrain with weights": accuracy(trained(x, y, weights), *later),
        "retrain on new labels": accuracy(trained(*now), *later),
        "rows that weights leave": report.weights.effective,
    }


for scenario in ("the population moves", "the sensor drifts"):
    runs = [answers(seed, scenario) for seed in range(SEEDS)]
    print(f"{scenario}: {SEEDS} seeds, {N:,} rows")
    for name in runs[0]:
        low, middle, high = sorted(run[name] for run in runs)
        unit = ",.0f" if name == "rows that weights leave" else ".1%"
        print(f"  {name:23} {middle:{unit}} ({low:{unit}} to {high:{unit}})")
