"""no_commit, and what it has in common with accumulate: what is remembered, when, and what of forwards that went wrong.

The expectation is always the definition's: the statistics of the micro-batches laid end to end, or none at all.
"""

import copy
import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError, RejectedBatchWarning
from support import assert_close, batch_norm, central_differences, normalized, stats
from support_contexts import NAN, assert_remembers, buffers, layer_of, parts_of, rand, unchanged

CONTEXTS = [sn.no_commit, sn.accumulate]


class TestNoCommit:
    def test_normalises_by_the_batch_and_writes_nothing(self):
        layer, x, upstream = layer_of(), rand(5, 3).requires_grad_(), rand(5, 3, seed=1)
        before = buffers(layer)
        with sn.no_commit(layer):
            y = layer(x)
        y.backward(upstream)
        assert_close(y, batch_norm(x), "output")
        up = upstream.numpy()
        assert_close(x.grad, central_differences(lambda v: (batch_norm(v) * up).sum(), x.detach()), "gradient")
        assert unchanged(layer, before)
        layer(x)
        assert_remembers(layer, stats(x))

    def test_a_bad_batch_leaves_no_trace(self):
        layer = layer_of(1)
        with sn.no_commit(layer), warnings.catch_warnings():
            warnings.simplefilter("error")
            layer(torch.tensor([[1.0], [NAN]], dtype=torch.float64))
        assert (layer.rejected_batches, layer.running_mean.item()) == (0, 0)

    def test_ends_with_an_exception_too(self):
        layer, x = layer_of(), rand(5, 3)
        with pytest.raises(KeyError), sn.no_commit(layer):
            raise KeyError
        layer(x)
        assert_remembers(layer, stats(x))

    def test_nests(self):
        layer, x = layer_of(), rand(5, 3)
        with sn.no_commit(layer):
            with sn.no_commit(layer):
                layer(x)
            layer(x)
        assert layer.num_batches_tracked.item() == 0
        layer(x)
        assert_remembers(layer, stats(x))

    def test_in_evaluation_there_is_nothing_to_keep_from_being_written(self):
        layer, x = layer_of().eval(), rand(5, 3)
        with sn.no_commit(layer):
            assert torch.equal(layer(x), layer(x))
        assert_close(layer(x), normalized(x, np.zeros(3), np.ones(3)), "output")

    def test_of_a_part_of_a_model(self):
        model, x = nn.Sequential(layer_of(), layer_of()), rand(5, 3)
        with sn.no_commit(model[0]):
            model(x)
        assert [layer.num_batches_tracked.item() for layer in model] == [0, 1]

    def test_with_a_mask(self):
        layer, mask = layer_of(), torch.tensor([True, False, True, True, False])
        x = torch.where(mask[:, None], rand(5, 3), NAN)
        before = buffers(layer)
        with sn.no_commit(layer):
            y = layer(x, mask=mask)
        assert_close(y, batch_norm(x, mask=mask), "output")
        assert unchanged(layer, before)

    def test_a_copy_made_inside_commits(self):
        layer, x = layer_of(), rand(5, 3)
        for context in CONTEXTS:
            with context(layer):
                copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
            for one in copies:
                one(x)
                assert_remembers(one, stats(x))


@pytest.mark.parametrize("context", [*CONTEXTS, nullcontext])
@pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 2}, {"activation": "silu"}], ids=str)
def test_what_the_buffers_hold_never_shows_in_training(context, options):
    """Uninitialised memory, say after `to_empty()`: outputs, gradients and what is held are those of the batch."""
    layers, parts, upstream = [layer_of(**options) for _ in range(2)], parts_of(4, 6), rand(10, 3, seed=9)
    nn.init.constant_(layers[0].running_mean, NAN)
    nn.init.constant_(layers[0].running_var, NAN)
    found = []
    for layer in layers:
        x = torch.cat(parts).requires_grad_()
        with context(layer):
            y = torch.cat([layer(part) for part in x.split([4, 6])])
            if context is sn.accumulate:
                (held,) = layer.remember.parts.values()
                assert_close(held.m2, stats(torch.cat(parts)).m2, "statistic")
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)])
    assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_model_without_such_layers_is_told_so(context):
    with (
        pytest.raises(ModelError, match=rf"{context.__name__} needs steadynorm's.*1 of torch.nn"),
        context(nn.BatchNorm1d(2)),
    ):
        pass
    with pytest.raises(ModelError, match=r"none of torch\.nn"), context(nn.Linear(2, 2)):
        pass


class TestGradScaler:
    """Mixed precision: a step may be skipped after its forward has been seen."""

    def train(self, layer: nn.Module, batches: list[Tensor], factors: list[float]) -> list[bool]:
        """One scaled step a batch; whether each was taken."""
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        taken = []
        for x, factor in zip(batches, factors, strict=True):
            optimizer.zero_grad()
            before = layer.weight.detach().clone()
            loss = (layer(x) * rand(*x.shape, seed=7)).mean() * factor
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            taken.append(not torch.equal(layer.weight, before))
        return taken

    def test_a_skipped_step_keeps_the_finite_moments_of_its_forward(self):
        layer, batches = layer_of(momentum=None), parts_of(4, 6, 5)
        assert self.train(layer, batches, [1.0, float("inf"), 1.0]) == [True, False, True]
        assert_close(layer.running_mean, sum(stats(x).mean for x in batches) / 3, "statistic")
        assert_close(layer.running_var, sum(stats(x).unbiased for x in batches) / 3, "variance")
        assert (layer.num_batches_tracked.item(), layer.rejected_batches) == (3, 0)

    def test_a_forward_that_overflowed_leaves_no_trace(self):
        layer, batches = layer_of(momentum=None), parts_of(4, 6, 5)
        batches[1][3, 1] = float("inf")
        with pytest.warns(RejectedBatchWarning):
            assert self.train(layer, batches, [1.0, 1.0, 1.0]) == [True, False, True]
        good = [stats(batches[0]), stats(batches[2])]
        assert_close(layer.running_mean, sum(s.mean for s in good) / 2, "statistic")
        assert_close(layer.running_var, sum(s.unbiased for s in good) / 2, "variance")
        assert (layer.num_batches_tracked.item(), layer.rejected_batches) == (2, 1)
        assert torch.isfinite(layer.weight).all()


class TestOverlapping:
    """Contexts that do not end in the order they began in, as those of several threads."""

    def test_each_takes_out_its_own(self):
        layer = sn.BatchNorm1d(2)
        first, second = sn.no_commit(layer), sn.accumulate(layer)
        first.__enter__()
        second.__enter__()
        layer(torch.randn(8, 2))
        first.__exit__(None, None, None)
        layer(torch.randn(8, 2))
        assert layer.num_batches_tracked.item() == 0
        second.__exit__(None, None, None)
        assert layer.num_batches_tracked.item() == 1
        layer(torch.randn(8, 2))
        assert layer.num_batches_tracked.item() == 2
        assert "remember" not in layer.__dict__

    def test_domains_too(self):
        layer = sn.BatchNorm1d(2, domains=("a", "b"))
        first, second = sn.domain(layer, "a"), sn.domain(layer, "b")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert layer.active_domain == "b"
        second.__exit__(None, None, None)
        assert layer.active_domain is None


def test_a_block_entered_in_inference_mode_serves_forwards_outside_of_it():
    layer = sn.BatchNorm1d(2)
    with torch.inference_mode():
        block = sn.accumulate(layer)
        block.__enter__()
    layer(torch.randn(8, 2))
    block.__exit__(None, None, None)
    assert layer.num_batches_tracked.item() == 1


def test_a_model_is_asked_for():
    with pytest.raises(ArgumentError, match=r"needs a torch\.nn\.Module, got list"), sn.no_commit([sn.BatchNorm1d(2)]):
        pass


def test_a_rejected_batch_is_reported_where_the_layer_was_called():
    with pytest.warns(RejectedBatchWarning) as seen:
        sn.BatchNorm1d(2)(torch.full((4, 2), float("nan")))
    assert seen[0].filename == __file__
