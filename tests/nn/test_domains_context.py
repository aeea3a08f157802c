"""The names of domains, and the block that says which one is meant."""

import contextlib

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from support import stats
from support_domains import assert_running, assert_untouched, draw, layer_of


class TestNames:
    @pytest.mark.parametrize(
        "names",
        [(), "photo", ("photo", "photo"), ("a.b",), ("a b",), ("a-b",), ("",), (1, 2), (None,),
         {"photo"}],  # a set's order changes from process to process, and the first domain is special
        ids=repr,
    )  # fmt: skip
    def test_those_that_cannot_be_part_of_a_buffers_name_are_refused(self, names):
        with pytest.raises(ArgumentError, match=r"domains must be a tuple or list of different names.*got"):
            sn.BatchNorm1d(3, domains=names)

    def test_a_list_and_names_with_digits_will_do(self):
        assert sn.BatchNorm1d(3, domains=["2019", "site_b"]).domains == ("2019", "site_b")

    def test_they_need_running_statistics(self):
        with pytest.raises(ArgumentError, match="domains needs track_running_stats=True"):
            layer_of(track_running_stats=False)

    def test_the_layer_shows_them(self):
        assert "domains=('photo', 'sketch'), domain_affine=True" in repr(layer_of(domain_affine=True))


class TestContext:
    def test_an_unknown_domain_lists_the_known_ones_and_changes_nothing(self):
        model = nn.Sequential(layer_of(), sn.BatchNorm1d(3, domains=("photo", "clipart")))
        unknown = pytest.raises(ArgumentError, match=r"unknown domain 'sketch'.*knows 'photo', 'clipart'")
        with unknown, sn.domain(model, "sketch"):
            pytest.fail("not entered")
        assert [layer.active_domain for layer in model] == [None, None]

    @pytest.mark.parametrize("training", [True, False])
    def test_outside_the_layer_lists_them_too(self, training):
        with pytest.raises(ArgumentError, match=r"for the domains 'photo', 'sketch'. Say which one.*with steadynorm"):
            layer_of().train(training)(draw("photo", 4, 3))

    def test_outside_a_compiled_layer_refuses_too(self):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Say which one"):
            torch.compile(layer_of(), fullgraph=True, backend="eager")(draw("photo", 4, 3))

    def test_blocks_nest_and_an_exception_leaves_them_as_they_were(self):
        layer, seen = layer_of(), []
        with sn.domain(layer, "photo"):
            with contextlib.suppress(RuntimeError), sn.domain(layer, "sketch"):
                seen.append(layer.active_domain)
                raise RuntimeError
            seen.append(layer.active_domain)
        assert seen == ["sketch", "photo"]
        assert layer.active_domain is None

    def test_layers_with_different_domains_are_named_part_by_part(self):
        stem = sn.BatchNorm1d(3, momentum=1.0, domains=("day", "night"))
        plain, head = sn.BatchNorm1d(3, momentum=1.0), layer_of(momentum=1.0)
        model, x = nn.Sequential(stem, plain, head), draw("photo", 5, 3)
        with sn.domain(model[0], "night"), sn.domain(head, "photo"):
            model(x)
        assert_running(stem, "night", stats(x).mean, stats(x).unbiased, 1)
        assert plain.num_batches_tracked.item() == head.num_batches_tracked.item() == 1
        assert_untouched(stem, "day")
        assert_untouched(head, "sketch")

    @pytest.mark.parametrize(
        ("model", "message"),
        [(sn.BatchNorm1d(3), "no batch norm of this model has domains"), (nn.BatchNorm1d(3), "1 of torch.nn")],
    )
    def test_a_model_without_domains_is_told_so(self, model, message):
        with pytest.raises(ModelError, match=message), sn.domain(model, "photo"):
            pytest.fail("not entered")
