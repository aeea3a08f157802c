"""torch.compile around a checkpoint, and a checkpoint around what is compiled."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from support import assert_close, batch_norm, central_differences, stats
from support_checkpoint import OPTIONS, UPSTREAM, X, _matmuls, assert_committed_once, block, selective, train


class TestCompiled:
    """Both orders of torch.compile and checkpoint; the compiler may change the order of a sum, so no bits here."""

    @pytest.mark.parametrize("order", ["compiled(checkpoint)", "checkpoint(compiled)"])
    @pytest.mark.parametrize("options", ["plain", "renorm", "ghost"])
    def test_commits_once(self, options, order):
        torch._dynamo.reset()
        model, plain = block(**OPTIONS[options]), block(**OPTIONS[options])
        compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True)
        if order == "compiled(checkpoint)":
            run = compile_(partial(checkpoint, model, use_reentrant=False))
        else:
            run = partial(checkpoint, compile_(model), use_reentrant=False)
        found, wanted = train(model, lambda _, x: run(x)), train(plain, lambda model, x: model(x))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)
        for layer, other in zip((model[1], model[4]), (plain[1], plain[4]), strict=True):
            assert layer.num_batches_tracked.item() == 3
            torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-10, atol=1e-10)
        if options == "plain":
            assert_committed_once(model, X, 2 * X, 3 * X)

    @pytest.mark.slow
    def test_inductor(self):
        torch._dynamo.reset()
        layer, x = sn.BatchNorm1d(3, dtype=torch.float64), X.clone().requires_grad_()
        y = torch.compile(partial(checkpoint, layer, use_reentrant=False), fullgraph=True)(x)
        y.backward(UPSTREAM)
        assert_close(y, batch_norm(X), "output")
        up = UPSTREAM.numpy()
        assert_close(x.grad, central_differences(lambda v: (batch_norm(v) * up).sum(), X), "gradient")
        assert_close(layer.running_mean, 0.1 * stats(X).mean, "statistic")
        assert_close(layer.running_var, 0.9 + 0.1 * stats(X).unbiased, "variance")
        assert layer.num_batches_tracked.item() == 1

    def test_a_selective_one(self):
        torch._dynamo.reset()
        model = block()
        compiled = torch.compile(partial(selective, model, policy=_matmuls), backend="aot_eager", fullgraph=True)
        train(model, lambda _, x: compiled(x))
        assert_committed_once(model, X, 2 * X, 3 * X)
