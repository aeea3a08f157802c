"""no_commit and accumulate around a checkpoint, inside of one, and left before its second forward."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import steadynorm as sn
from support import assert_close
from support_checkpoint import MODES, RENORM, UPSTREAM, X, assert_as_without, assert_committed_once, block, measured

# torch says so of a checkpoint inside of a reentrant one, whose first forward builds no graph.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class TestContexts:
    """no_commit and accumulate around a checkpoint, with the backward inside of the block or after it, and within."""

    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_no_commit_around(self, mode, backward_inside):
        model, plain = block(renorm=RENORM), block(renorm=RENORM)
        x, same = X.clone().requires_grad_(), X.clone().requires_grad_()
        with sn.no_commit(model):
            y = MODES[mode](model, x)
            if backward_inside:
                y.backward(UPSTREAM)
        if not backward_inside:
            y.backward(UPSTREAM)
        with sn.no_commit(plain):
            plain(same).backward(UPSTREAM)
        assert_as_without(model, plain)
        assert torch.equal(x.grad, same.grad)
        assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [0, 0]

    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_accumulate_around(self, mode, backward_inside):
        model = block()
        with sn.accumulate(model):
            outputs = []
            for scale in (1, 2):
                outputs.append(MODES[mode](model, (X * scale).requires_grad_()))
                if backward_inside:
                    outputs[-1].backward(UPSTREAM)
        if not backward_inside:
            sum(outputs).backward(UPSTREAM)
        each = [measured(model, X), measured(model, 2 * X)]
        for layer, parts in zip((model[1], model[4]), zip(*each, strict=True), strict=True):
            count = sum(part.count for part in parts)
            mean = sum(part.count * part.mean for part in parts) / count
            m2 = sum(part.m2 + part.count * (part.mean - mean) ** 2 for part in parts)  # the law of total variance
            assert_close(layer.running_mean, 0.1 * mean, "statistic")
            assert_close(layer.running_var, 0.9 + 0.1 * m2 / (count - 1), "variance")
            assert layer.num_batches_tracked.item() == 1

    @pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "selective, none saved"])
    @pytest.mark.parametrize("early_stop", [True, False])
    @pytest.mark.parametrize("context", [sn.no_commit, sn.accumulate, nullcontext])
    def test_within_even_where_the_second_forward_is_cut_short(self, mode, early_stop, context):
        model = block()

        class Inside(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with context(model):
                    return model(x)  # non-reentrant: left by an exception once all that backward needs is there

        with set_checkpoint_early_stop(early_stop):
            MODES[mode](Inside(), X.clone().requires_grad_()).backward(UPSTREAM)
        if context is sn.no_commit:
            assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [0, 0]
        else:
            assert_committed_once(model, X)
        model(2 * X)  # and the layers commit again
        assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [1 if context is sn.no_commit else 2] * 2
