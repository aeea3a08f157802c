"""Copies of a layer with domains, its other dtypes, and its resets."""

import contextlib
import copy
import pickle

import pytest
import torch

import steadynorm as sn
from steadynorm.errors import ArgumentError
from support import assert_close, normalized, wide
from support_domains import DOMAINS, assert_untouched, draw, layer_of


def trained(**options) -> sn.BatchNorm1d:
    """A layer whose domains differ in everything they have."""
    layer = layer_of(momentum=0.5, **options)
    for seed, name in enumerate(("photo", "sketch", "sketch")):
        with sn.domain(layer, name):
            layer(draw(name, 5, 3, seed=seed))
    with torch.no_grad():
        for value, parameter in enumerate(layer.parameters(), start=2):
            parameter.fill_(value)
    return layer


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    @pytest.mark.parametrize("inside", [True, False])
    def test_a_copy_has_all_domains_and_is_in_none_of_them(self, copied, inside):
        layer = trained(domain_affine=True)
        with sn.domain(layer, "sketch") if inside else contextlib.nullcontext():
            twin = copied(layer)
        assert layer.active_domain is None
        with pytest.raises(ArgumentError, match="Say which one"):
            twin(draw("photo", 4, 3))
        x = draw("photo", 4, 3)
        for name in DOMAINS:
            mean, variance = layer.running(name)[:2]
            gamma, beta = (t.detach() for t in layer.affine_of(name))
            with sn.domain(twin.eval(), name):
                assert_close(twin(x), normalized(x, wide(mean), wide(variance), gamma, beta), "output")
        with sn.domain(twin.train(), "sketch"):
            twin(x)
        assert layer.running("sketch").num_batches_tracked.item() == 2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_buffers_of_all_domains_stay_float32_in_half_precision(self, dtype):
        layer = trained(domain_affine=True)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        layer.to(dtype)
        for name, t in layer.state_dict().items():
            if "running" in name:
                assert t.dtype == torch.float32
                assert torch.equal(t, before[name]), f"{name} went through {dtype}"
            elif t.is_floating_point():
                assert t.dtype == dtype

    def test_reset_reaches_all_domains(self):
        layer = trained(domain_affine=True)
        layer.reset_running_stats()
        for name in DOMAINS:
            assert_untouched(layer, name)
        assert layer.weight_sketch.tolist() == [4, 4, 4], "statistics alone were asked for"
        layer = trained(domain_affine=True)
        layer.reset_parameters()
        for name in DOMAINS:
            assert_untouched(layer, name)
            assert [t.tolist() for t in layer.affine_of(name)] == [[1] * 3, [0] * 3]

    def test_built_on_meta_and_brought_to_life(self):
        layer = layer_of(domain_affine=True, device="meta")
        assert all(t.is_meta for t in layer.state_dict().values())
        layer.to_empty(device="cpu").reset_parameters()
        for name in DOMAINS:
            assert_untouched(layer, name)
            assert [t.tolist() for t in layer.affine_of(name)] == [[1] * 3, [0] * 3]
        assert layer.rejected_batches == 0
