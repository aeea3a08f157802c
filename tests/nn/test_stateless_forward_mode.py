"""Forward-mode AD of a training forward: its tangent, and buffers that carry none."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import steadynorm as sn
from support import assert_close, batch_norm, central_differences, stats, wide
from support_stateless import UPSTREAM, X, assert_buffers, layer_of, rand, state_of


class TestForwardMode:
    @pytest.mark.parametrize("options", [{}, {"ghost_batch_size": 2}], ids=["plain", "ghost"])
    def test_buffers_stay_plain(self, options):
        layer, direction = layer_of(**options), rand(4, 2, seed=5)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(X, direction))).tangent
            for name, t in layer.named_buffers():
                assert forward_ad.unpack_dual(t).tangent is None, name
        gamma, beta, chunks = layer.weight, layer.bias, (wide(X).reshape(2, 2, 2) if options else wide(X)[None])
        ways = wide(direction).reshape(chunks.shape)
        along = central_differences(
            lambda t: sum(
                (batch_norm(c + t * v, gamma, beta) * u).sum()
                for c, v, u in zip(chunks, ways, wide(UPSTREAM).reshape(chunks.shape), strict=True)
            ),
            np.zeros(()),
        )
        assert_close((tangent * UPSTREAM).sum(), along, "gradient")
        assert_buffers(dict(layer.named_buffers()), stats(X))
        assert not any(t.requires_grad for t in layer.buffers())

    def test_those_of_functional_call_are_plain(self):
        layer = layer_of()
        with forward_ad.dual_level():
            _, buffers = sn.functional_call(layer, state_of(layer), forward_ad.make_dual(X, UPSTREAM))
            assert all(forward_ad.unpack_dual(t).tangent is None for t in buffers.values())
        assert_buffers(buffers, stats(X))

    def test_those_of_the_function(self):
        mean, variance = torch.zeros(2).double(), torch.ones(2).double()
        with forward_ad.dual_level():
            sn.functional.batch_norm(forward_ad.make_dual(X, UPSTREAM), mean, variance, training=True)
            assert forward_ad.unpack_dual(mean).tangent is None
            assert forward_ad.unpack_dual(variance).tangent is None
        assert_close(variance, 0.9 + 0.1 * stats(X).unbiased, "variance")

    def test_what_is_held_stays_plain_too(self):
        layer = layer_of()
        with forward_ad.dual_level(), sn.accumulate(layer):
            for scale in (1, 3):
                layer(forward_ad.make_dual(scale * X, UPSTREAM))
            assert all(forward_ad.unpack_dual(t).tangent is None for t in layer.remember.parts[None])
        assert_buffers(dict(layer.named_buffers()), stats(torch.cat([X, 3 * X])))
