"""Which layers are watched, and what one example looks like there."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError, ShapeError
from steadynorm.nn.watched import bn_layers, channel_axis, example_moments, observing, running_statistics


def test_layers_of_both_libraries_once_each_and_only_those_with_statistics():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict(
        {
            "a": nn.BatchNorm2d(3),
            "b": sn.BatchNorm2d(5, channel_dim=-1),
            "c": shared,
            "again": shared,
            "sync": nn.SyncBatchNorm(2),
            "none": nn.BatchNorm2d(3, track_running_stats=False),
            "group": nn.GroupNorm(1, 4),
        }
    )
    assert [name for name, _ in bn_layers(model)] == ["a", "b", "c", "sync"]
    assert [channel_axis(layer) for _, layer in bn_layers(model)] == [1, -1, 1, 1]


@pytest.mark.parametrize(
    ("model", "kind", "says"),
    [
        (nn.Linear(2, 2), ModelError, "it has no batch norm"),
        (nn.BatchNorm1d(2, track_running_stats=False), ModelError, "track_running_stats=False"),
        ("model", ArgumentError, "got str"),
    ],
)
def test_models_that_cannot_be_watched(model, kind, says):
    with pytest.raises(kind, match=says):
        bn_layers(model)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    n=st.integers(1, 4),
    c=st.integers(1, 3),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_moments_are_those_of_the_definition(shape, n, c, last, seed):
    x = np.random.default_rng(seed).normal(3, 2, size=(n, c, *shape))
    given_x = torch.tensor(np.moveaxis(x, 1, -1) if last else x)
    mean, var = example_moments(given_x, -1 if last else 1)
    flat = x.reshape(n, c, -1)
    np.testing.assert_allclose(mean.numpy(), flat.mean(2), rtol=1e-12)
    if flat.shape[2] == 1:
        assert var is None
    else:
        assert var is not None
        np.testing.assert_allclose(var.numpy(), ((flat - flat.mean(2, keepdims=True)) ** 2).mean(2), rtol=1e-9, atol=0)


def test_masked_positions_hold_anything():
    x = torch.randn(3, 2, 5)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
    spoiled = torch.where(mask[:, None], x, torch.nan)
    mean, var = example_moments(spoiled, mask=mask)
    assert var is not None
    for i in range(3):
        kept = x[i][:, mask[i]].double()
        torch.testing.assert_close(mean[i].double(), kept.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var[i].double(), kept.var(1, correction=0), rtol=1e-4, atol=1e-6)
    with pytest.raises(ShapeError):
        example_moments(x, mask=torch.ones(4, dtype=torch.bool))


def test_a_mask_of_single_positions_has_no_variance():
    mean, var = example_moments(torch.randn(3, 2), mask=torch.tensor([True, False, True]))
    assert var is None
    assert torch.isnan(mean[1]).all()
    assert torch.isfinite(mean[[0, 2]]).all()


def test_half_precision_is_read_in_float32_and_nothing_shares_memory():
    x = torch.full((2, 1, 4), 1000.0, dtype=torch.float16)
    x[:, :, 0] = 1001.0
    mean, var = example_moments(x)
    assert var is not None
    assert mean.dtype == var.dtype == torch.float32
    assert mean[0, 0].item() == 1000.25
    assert var[0, 0].item() == pytest.approx(3 / 16)
    flat = torch.zeros(2, 3)
    kept = example_moments(flat).mean
    flat += 1
    assert kept.sum() == 0


def test_running_statistics_of_the_domain_in_use():
    layer = sn.BatchNorm1d(2, domains=("photo", "sketch"))
    layer.running("sketch").mean.fill_(7.0)
    with sn.domain(layer, "sketch"):
        assert running_statistics(layer)[0].tolist() == [7.0, 7.0]
    assert running_statistics(layer)[0].tolist() == [0.0, 0.0]
    with pytest.raises(ModelError, match="keeps no running statistics"):
        running_statistics(nn.BatchNorm1d(2, track_running_stats=False))


def test_observing_takes_its_hooks_off_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    seen: list[str] = []

    def see(name, layer, x, mask):
        seen.append(name)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observing(bn_layers(model), see):
        model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))
    assert seen == ["0"]


def test_observing_is_given_the_mask_and_inputs_by_name():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = sn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(input=x, mask=x[:, 0] > 0)

    model, x = Masked().eval(), torch.randn(6, 2, 3)
    seen = []
    with observing(bn_layers(model), lambda name, layer, x, mask: seen.append((x, mask))):
        model(x)
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[0][1], x[:, 0] > 0)


def test_observing_is_none_of_other_threads_business():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    seen = []
    with observing(bn_layers(model), lambda name, layer, x, mask: seen.append(len(x))):
        other = threading.Thread(target=model, args=(torch.zeros(5, 2),))
        other.start()
        other.join()
        model(torch.zeros(3, 2))
    assert seen == [3]
