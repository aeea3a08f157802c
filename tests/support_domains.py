"""Layers with two domains, data for each, and what a layer should know of them: shared by the tests of domains."""

import numpy as np
import torch
from torch import Tensor

import steadynorm as sn
from support import assert_close

DOMAINS = ("photo", "sketch")
RECIPES = {"photo": (2.0, 1.0), "sketch": (-5.0, 0.25)}  # what the data of each domain look like: mean, deviation


def draw(domain: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    mean, deviation = RECIPES[domain]
    return (mean + deviation * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def noise(*shape: int, seed: int = 99) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(channels: int = 3, **options) -> sn.BatchNorm1d:
    return sn.BatchNorm1d(channels, domains=DOMAINS, **options)


def moved(mean, variance, batch, momentum):
    """The running mean and (unbiased) variance after a commit, from the definition."""
    return mean + momentum * (batch.mean - mean), variance + momentum * (batch.unbiased - variance)


def assert_running(layer: sn.BatchNorm1d, domain: str, mean, variance, batches: int):
    running = layer.running(domain)
    assert_close(running.mean, mean, "statistic")
    assert_close(running.var, variance, "variance")
    assert running.num_batches_tracked.item() == batches


def assert_untouched(layer: sn.BatchNorm1d, domain: str):
    assert_running(layer, domain, np.zeros(layer.num_features), np.ones(layer.num_features), 0)
