"""The other output of a masked position: its input."""

import numpy as np
import pytest
import torch
from torch.autograd import grad

import steadynorm as sn
from steadynorm.errors import ArgumentError
from support import assert_close, batch_norm, normalized, stats
from support_masks import NAN, RENORM, at_positions, buffers, layer_of, lengths, rand, sizes


class TestPass:
    """masked="pass": a masked position keeps its input, bit for bit, and its gradient."""

    @pytest.mark.parametrize(
        ("options", "mode"),
        [({}, "train"), ({"activation": "sigmoid"}, "train"), ({"activation": "sigmoid"}, "eval"), ({}, "frozen"),
         ({"ghost_batch_size": 2}, "train"), ({"renorm": RENORM}, "train"),
         ({"ghost_batch_size": 2, "renorm": RENORM, "activation": "relu"}, "train")],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("with_residual", [False, True])
    def test_in_every_regime(self, options, mode, with_residual):
        mask, upstream = lengths(4, 2, 3, 0, 1, longest=4), rand(5, 3, 4, seed=2)
        inside = at_positions(mask, upstream)
        found = {}
        for masked in ("zero", "pass"):
            x, residual = (torch.where(inside, rand(5, 3, 4, seed=seed), NAN).requires_grad_() for seed in (0, 1))
            with torch.no_grad():
                x[3, 1, 2] = float("inf")
            layer = layer_of(x, masked=masked, **options).train(mode != "eval")
            if mode == "frozen":
                sn.freeze_(layer)
            y = layer(x, mask=mask, residual=residual if with_residual else None)
            derivatives = grad(y, [x, residual] if with_residual else [x], upstream)
            found[masked] = [x.detach(), y.detach(), *derivatives, *buffers(layer).values()]
        (_, zero, d_zero, *rest), (x, y, dx, *same) = found["zero"], found["pass"]
        torch.testing.assert_close(y[~inside], x[~inside], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(y[inside], zero[inside])
        assert torch.equal(dx[~inside], upstream[~inside])
        assert torch.equal(dx[inside], d_zero[inside])
        for other, wanted in zip(same, rest, strict=True):  # the residual's gradient, the running statistics
            assert torch.equal(other, wanted)
        if with_residual:
            assert (same[0][~inside] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_keeps_the_dtype_and_the_memory_format(self, dtype):
        x = rand(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
        mask = sizes((4, 2), (3, 5), within=(4, 5))
        y = layer_of(x, masked="pass")(x, mask=mask)
        inside = at_positions(mask, x)
        assert (y.dtype, y.stride()) == (dtype, x.stride())
        assert torch.equal(y[~inside], x[~inside])

    def test_by_the_functions(self):
        x, mask = rand(4, 3, 5), lengths(5, 3, 1, 0, longest=5)
        inside = at_positions(mask, x)
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        for y in (
            sn.functional.batch_norm(x, None, None, training=True, mask=mask, masked="pass"),
            sn.functional.batch_norm_with_moments(x, mask=mask, masked="pass")[0],
        ):
            assert_close(y, np.where(inside, batch_norm(x, mask=mask), x.numpy()), "output")
        y = sn.functional.batch_norm(x, mean, var, mask=mask, masked="pass")
        assert_close(y, np.where(inside, normalized(x, mean.numpy(), var.numpy()), x.numpy()), "output")

    def test_compiled(self):
        torch._dynamo.reset()
        x, mask, upstream = rand(4, 3, 5), lengths(5, 3, 1, 0, longest=5), rand(4, 3, 5, seed=1)
        inside = at_positions(mask, x)
        x = torch.where(inside, x, NAN).requires_grad_()
        layer = layer_of(x, masked="pass", momentum=1.0)
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, mask=mask)
        expected = batch_norm(x.detach().nan_to_num(), layer.weight, layer.bias, mask=mask)
        assert_close(y, np.where(inside, expected, np.nan), "output")
        dx = grad(y, x, upstream)[0]
        assert torch.equal(dx[~inside], upstream[~inside])
        assert torch.isfinite(dx).all()
        assert_close(layer.running_mean, stats(x, weight=mask).mean, "statistic")

    def test_compiled_where_sequences_are_of_any_length(self):
        """The compiler takes the length for a symbol before it has seen the first mask."""
        torch._dynamo.reset()
        layer = layer_of(rand(4, 3, 5), masked="pass")
        step = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for longest in (4, 6):
            step(rand(4, 3, longest))
        for longest in (5, 3, 7):
            x, mask = rand(4, 3, longest), lengths(3, 2, 1, 3, longest=longest)
            expected = batch_norm(x, layer.weight, layer.bias, mask=mask)
            assert_close(step(x, mask=mask), np.where(at_positions(mask, x), expected, x.numpy()), "output")

    def test_nothing_else_is_an_option(self):
        x = rand(4, 3)
        with pytest.raises(ArgumentError, match=r"masked must be one of \('zero', 'pass'\), got 'skip'"):
            sn.BatchNorm1d(3, masked="skip")
        with pytest.raises(ArgumentError, match=r"masked must be one of \('zero', 'pass'\), got 'skip'"):
            sn.functional.batch_norm(x, None, None, training=True, masked="skip")
