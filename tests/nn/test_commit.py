"""When a layer writes its running statistics, what it refuses, and how it says so."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning, SingleValueError, WeightError
from steadynorm.ops import commit as committing
from steadynorm.ops.commit import Running, commit
from steadynorm.ops.reference import Statistics
from support import assert_close, stats


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


BAD = torch.tensor([[1.0, 2.0], [float("inf"), 3.0], [0.0, 1.0]])


class TestMomentum:
    def test_a_sequence_of_batches_by_hand(self):
        layer, mean, variance = sn.BatchNorm1d(3, momentum=0.2), 0.0, 1.0
        for seed in range(4):
            x = rand(5, 3, 2, seed=seed)
            layer(x)
            batch = stats(x)
            mean, variance = 0.8 * mean + 0.2 * batch.mean, 0.8 * variance + 0.2 * batch.unbiased
        assert_close(layer.running_mean, mean, "statistic")
        assert_close(layer.running_var, variance, "variance")
        assert layer.num_batches_tracked.item() == 4

    def test_none_is_the_cumulative_average(self):
        layer, batches = sn.BatchNorm1d(3, momentum=None), [rand(4 + seed, 3, seed=seed) for seed in range(5)]
        for x in batches:
            layer(x)
        assert_close(layer.running_mean, sum(stats(x).mean for x in batches) / 5, "statistic")
        assert_close(layer.running_var, sum(stats(x).unbiased for x in batches) / 5, "variance")

    def test_0_keeps_and_1_replaces(self):
        x = rand(6, 3)
        kept, replaced = sn.BatchNorm1d(3, momentum=0), sn.BatchNorm1d(3, momentum=1)
        kept(x)
        replaced(x)
        assert kept.running_mean.tolist() == [0] * 3
        assert kept.running_var.tolist() == [1] * 3
        assert kept.num_batches_tracked.item() == 1
        assert_close(replaced.running_mean, stats(x).mean, "statistic")
        assert_close(replaced.running_var, stats(x).unbiased, "variance")

    def test_evaluation_writes_nothing(self):
        layer = sn.BatchNorm1d(3).eval()
        before = copy.deepcopy(layer.state_dict())
        layer(rand(6, 3))
        assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())

    def test_masks_and_weights_are_committed_as_measured(self):
        x, mask, weight = rand(6, 3, 4), torch.arange(24).reshape(6, 4) % 5 > 0, torch.arange(1.0, 7.0)
        layer = sn.BatchNorm1d(3, momentum=1.0)
        layer(x, mask=mask, sample_weight=weight)
        batch = stats(x, weight=mask * weight.unsqueeze(1))
        assert_close(layer.running_mean, batch.mean, "statistic")
        assert_close(layer.running_var, batch.unbiased, "variance")

    def test_a_forward_that_fails_writes_nothing(self):
        layer = sn.BatchNorm1d(2)
        with pytest.raises(WeightError):
            layer(rand(3, 2), sample_weight=torch.tensor([1.0, -1.0, 1.0]))
        assert layer.num_batches_tracked.item() == 0
        assert layer.running_mean.tolist() == [0, 0]


class TestRejection:
    def test_warns_at_once_on_the_cpu_and_counts(self):
        layer = sn.BatchNorm1d(2)
        for expected in (1, 2):
            with pytest.warns(RejectedBatchWarning, match=r"BatchNorm1d\(2.*non-finite.*stay as they were.*inf or NaN"):
                y = layer(BAD)
            assert layer.rejected_batches == expected
        assert not torch.isfinite(y).all(), "the output must show what the input was"
        assert layer.num_batches_tracked.item() == 0

    def test_a_variance_that_the_buffer_cannot_hold(self):
        layer = sn.BatchNorm1d(1)
        with pytest.warns(RejectedBatchWarning, match="too large for the buffer"):
            layer(torch.tensor([[-2e19], [2e19]]))  # a variance of 8e38
        layer(torch.tensor([[-1e19], [1e19]]))  # 2e38 still fits
        assert (layer.rejected_batches, layer.num_batches_tracked.item()) == (1, 1)

    def test_a_bad_batch_of_the_cumulative_average_does_not_count(self):
        layer, x = sn.BatchNorm1d(2, momentum=None), rand(5, 2)
        with pytest.warns(RejectedBatchWarning):
            layer(BAD)
        layer(x)
        assert_close(layer.running_mean, stats(x).mean, "statistic")

    def test_the_count_is_no_part_of_the_state_dict_but_of_copies(self):
        layer = sn.BatchNorm1d(2)
        with pytest.warns(RejectedBatchWarning):
            layer(BAD)
        assert list(layer.state_dict()) == list(nn.BatchNorm1d(2).state_dict())
        assert copy.deepcopy(layer).rejected_batches == 1
        assert pickle.loads(pickle.dumps(layer)).rejected_batches == 1

    def test_reset_running_stats_forgets_it(self):
        layer = sn.BatchNorm1d(2, momentum=1.0)
        with pytest.warns(RejectedBatchWarning):
            layer(BAD)
        layer(rand(4, 2))
        layer.reset_running_stats()
        assert layer.rejected_batches == layer.num_batches_tracked.item() == 0
        assert layer.running_mean.tolist() == [0, 0]
        assert layer.running_var.tolist() == [1, 1]

    def test_away_from_the_cpu_reading_the_count_warns_once(self, monkeypatch):
        class Elsewhere:
            """A counter on a device, as far as `rejected_batches` looks."""

            device = torch.device("cuda")

            def __init__(self, value: int):
                self.value = value

            def __int__(self) -> int:
                return self.value

        layer = sn.BatchNorm1d(2)
        layer._buffers["_rejected"] = Elsewhere(3)
        with pytest.warns(RejectedBatchWarning, match="3 batches"):
            assert layer.rejected_batches == 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert layer.rejected_batches == 3
        layer._buffers["_rejected"] = Elsewhere(5)
        with pytest.warns(RejectedBatchWarning, match="2 batches"):
            assert layer.rejected_batches == 5

    def test_without_running_statistics_there_is_nothing_to_reject(self):
        layer = sn.BatchNorm1d(2, track_running_stats=False)
        layer(BAD)
        assert layer.rejected_batches == 0


class TestSingleValue:
    @pytest.mark.parametrize(
        ("layer", "shape"),
        [(sn.BatchNorm1d(2), (1, 2)), (sn.BatchNorm1d(2), (1, 2, 1)), (sn.BatchNorm2d(2), (1, 2, 1, 1)),
         (sn.BatchNorm3d(2), (1, 2, 1, 1, 1)), (sn.BatchNorm1d(2, track_running_stats=False).eval(), (1, 2))],
        ids=str,
    )  # fmt: skip
    def test_error_names_the_layer_the_shape_and_the_ways_out(self, layer, shape):
        with pytest.raises(SingleValueError) as caught:
            layer(torch.ones(shape))
        message = str(caught.value)
        tracks = layer.track_running_stats
        ways_out = ("eval()", '"running"', '"beta"') if tracks else ('"beta"', "track_running_stats=True")
        for part in (repr(layer), str(tuple(shape)), "drop_last=True", *ways_out):
            assert part in message
        assert layer.num_batches_tracked is None or layer.num_batches_tracked.item() == 0

    def test_running_normalises_by_what_is_remembered(self):
        layer = sn.BatchNorm1d(2, single_value="running", eps=0.0)
        layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
        layer.running_var.copy_(torch.tensor([4.0, 9.0]))
        assert layer(torch.tensor([[5.0, 5.0]])).tolist() == [[2.0, 1.0]]
        assert layer.num_batches_tracked.item() == 0
        layer(rand(4, 2))  # a larger batch trains as ever
        assert layer.num_batches_tracked.item() == 1

    def test_beta_takes_the_variance_for_0(self):
        layer = sn.BatchNorm1d(2, single_value="beta", activation="relu")
        with torch.no_grad():
            layer.bias.copy_(torch.tensor([-1.0, 2.0]))
        x, residual = torch.tensor([[5.0, 5.0]], requires_grad=True), torch.tensor([[3.0, 0.5]])
        y = layer(x, residual=residual)
        assert y.tolist() == [[2.0, 2.5]]
        y.backward(torch.tensor([[1.0, -2.0]]))
        assert x.grad.tolist() == [[0, 0]]
        assert layer.num_batches_tracked.item() == 0
        assert layer.running_var.tolist() == [1, 1]

    def test_evaluation_of_one_example_is_nothing_special(self):
        assert sn.BatchNorm1d(2).eval()(torch.ones(1, 2)).shape == (1, 2)

    def test_where_the_mask_alone_leaves_one_value_it_gets_beta(self):
        layer = sn.BatchNorm1d(2)
        nn.init.constant_(layer.bias, 0.25)
        y = layer(rand(1, 2, 3), mask=torch.tensor([[False, True, False]]))
        assert y[0, :, 1].tolist() == [0.25, 0.25]

    def test_options_are_checked(self):
        with pytest.raises(ArgumentError, match=r"single_value must be one of .*'error', 'running', 'beta'.*'no'"):
            sn.BatchNorm1d(2, single_value="no")
        with pytest.raises(ArgumentError, match=r"needs track_running_stats=True"):
            sn.BatchNorm1d(2, single_value="running", track_running_stats=False)


class TestSampleWeights:
    @pytest.mark.parametrize("total", [0.5, 1.0, 1 + 1e-7, 1.9])
    def test_weights_that_sum_to_less_than_two_are_not_committed_and_said(self, total):
        # softmax weights sum to 1 up to rounding: m2 / (n - 1) would then be anything up to infinity
        layer = sn.BatchNorm1d(2)
        weight = torch.full((4,), total / 4, dtype=torch.float64)
        with pytest.warns(RejectedBatchWarning, match="mean of 1"):
            layer(torch.randn(4, 2), sample_weight=weight)
        assert layer.rejected_batches == 1
        assert layer.running_var.tolist() == [1, 1]
        assert layer.num_batches_tracked.item() == 0

    def test_they_are_refused_on_a_device_too(self, monkeypatch):
        monkeypatch.setattr(committing, "_host_may_look", lambda statistics: False)
        statistics = Statistics(*(torch.full((2,), v, dtype=torch.float64) for v in (1 + 1e-7, 0.0, 3.0)))
        mean, variance, rejected = torch.zeros(2), torch.ones(2), torch.tensor(0)
        running = Running(mean, variance, rejected=rejected)
        assert commit(running, statistics, 0.1, weighted=True).item()
        assert (variance.tolist(), rejected.item()) == ([1, 1], 1)
        assert not commit(running, statistics, 0.1).item()  # a batch of one is no mistake

    def test_they_are_checked_in_evaluation_too(self):
        with pytest.raises(WeightError):
            sn.BatchNorm1d(2).eval()(torch.randn(3, 2), sample_weight=torch.tensor([1.0, -1.0, 1.0]))


@pytest.mark.parametrize("single_value", ["error", "running"])
def test_a_mask_does_not_hide_a_batch_of_one(single_value):
    layer, x = sn.BatchNorm1d(2, single_value=single_value), torch.tensor([[3.0, -2.0]])
    if single_value == "error":
        with pytest.raises(SingleValueError):
            layer(x, mask=torch.tensor([True]))
    else:  # running statistics 0 and 1
        assert_close(layer(x, mask=torch.tensor([True])), x.numpy() / math.sqrt(1 + 1e-5), "output")


@pytest.mark.parametrize("momentum", [-0.1, 1.5, float("nan")])
def test_a_momentum_that_is_no_share_is_refused(momentum):
    with pytest.raises(ArgumentError, match="momentum"):
        sn.BatchNorm1d(2, momentum=momentum)
