"""A small problem that trains in milliseconds."""

import numpy as np
import pytest
import torch

from steadynorm.experiment import models
from steadynorm.experiment.data import LabelledData
from steadynorm.experiment.problem import Problem


def blobs_of(kind: str, per_class: int = 30) -> LabelledData:
    """Three overlapping Gaussian clouds of five features."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(3, 5)) * 1.5
    x = np.concatenate([centre + rng.normal(size=(per_class, 5)) for centre in centres])
    y = np.repeat(np.arange(3), per_class)
    tensor = torch.tensor(x, dtype=torch.float32)
    return LabelledData(
        "blobs",
        tensor if kind == "table" else tensor[:, None, None, :],
        torch.tensor(y),
        ("a", "b", "c"),
        "table" if kind == "table" else "image",
    )


def tiny(input_shape: tuple[int, ...], classes: int) -> torch.nn.Module:
    """Two hidden layers of six tanh units."""
    nn = torch.nn
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(int(np.prod(input_shape)), 6),
        nn.Tanh(),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, classes),
    )


@pytest.fixture(scope="session")
def blobs() -> LabelledData:
    return blobs_of("image")


@pytest.fixture(scope="session")
def table() -> LabelledData:
    return blobs_of("table")


@pytest.fixture(scope="session")
def tiny_model():
    return tiny


@pytest.fixture(scope="session")
def problem(blobs: LabelledData) -> Problem:
    return Problem.of(blobs, models.resolve(tiny))
