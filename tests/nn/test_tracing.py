"""The layers under torch.compile and torch.fx."""

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, RejectedBatchWarning
from support import ACTIVATIONS, assert_close, batch_norm, normalized, stats


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(layer: nn.Module):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


class TestCompile:
    def test_training_step_without_a_graph_break(self):
        x, upstream = rand(8, 3, 4).requires_grad_(), rand(8, 3, 4, seed=1)
        layers = [sn.BatchNorm1d(3, activation="silu") for _ in range(2)]
        y = compiled(layers[0])(x)
        assert_close(y, batch_norm(x, activation=ACTIVATIONS["silu"]), "output")
        found = torch.autograd.grad(y, [x, *layers[0].parameters()], upstream)
        eager = torch.autograd.grad(layers[1](x), [x, *layers[1].parameters()], upstream)
        for a, b in zip(found, eager, strict=True):
            torch.testing.assert_close(a, b)
        assert_close(layers[0].running_mean, 0.1 * stats(x).mean, "statistic")
        assert_close(layers[0].running_var, 0.9 + 0.1 * stats(x).unbiased, "variance")
        assert layers[0].num_batches_tracked.item() == 1

    def test_every_option_and_the_cumulative_average(self):
        x, residual, weight = rand(6, 3, 4), rand(6, 3, 4, seed=1), rand(6, seed=2).abs()
        mask = rand(6, 4, seed=3) > -0.5
        layer = sn.BatchNorm1d(3, momentum=None, activation="relu")
        step = compiled(layer)
        y = step(x, residual=residual, mask=mask, sample_weight=weight)
        expected = batch_norm(x, residual=residual, mask=mask, sample_weight=weight)
        assert_close(y, expected.clip(0), "output")
        step(x, residual=residual, mask=mask, sample_weight=weight)
        both = stats(x, weight=mask.float() * weight.unsqueeze(1))
        assert_close(layer.running_mean, both.mean, "statistic")
        assert layer.num_batches_tracked.item() == 2

    def test_evaluation(self):
        x, layer = rand(4, 3, 4, 5), sn.BatchNorm2d(3, activation="relu").eval()
        layer.running_mean.copy_(rand(3, seed=4))
        y = compiled(layer)(x)
        assert_close(y, normalized(x, layer.running_mean.numpy(), layer.running_var.numpy()).clip(0), "output")
        assert torch.equal(y, layer(x))

    def test_a_bad_batch_is_counted_in_the_graph_and_not_committed(self):
        layer = sn.BatchNorm1d(2)
        step = compiled(layer)
        bad = rand(4, 2)
        bad[1, 0] = float("inf")
        step(bad)
        with pytest.warns(RejectedBatchWarning, match="1 batches"):  # the graph cannot; the next to read the count does
            assert layer.rejected_batches == 1
        assert layer.num_batches_tracked.item() == 0
        assert layer.running_mean.tolist() == [0, 0]
        step(rand(4, 2))
        assert (layer.rejected_batches, layer.num_batches_tracked.item()) == (1, 1)

    @pytest.mark.parametrize("single_value", ["running", "beta"])
    def test_a_batch_of_one(self, single_value):
        layer = sn.BatchNorm1d(2, single_value=single_value)
        y = compiled(layer)(torch.tensor([[3.0, -2.0]]))
        expected = {"running": [3 / (1 + 1e-5) ** 0.5, -2 / (1 + 1e-5) ** 0.5], "beta": [0.0, 0.0]}
        assert y[0].tolist() == pytest.approx(expected[single_value])
        assert layer.num_batches_tracked.item() == 0


class Block(nn.Module):
    """A residual block with a mask, as a model author would write it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.first = sn.BatchNorm1d(3, activation="relu")
        self.inner = nn.Sequential(sn.BatchNorm1d(3), nn.Tanh())
        self.last = sn.BatchNorm1d(3, activation="gelu")

    def forward(self, x, mask):
        y = self.inner(self.first(self.conv(x), mask=mask))
        return self.last(y, residual=x, mask=mask, sample_weight=mask.float().sum(1))


class TestFx:
    def test_a_layer_is_one_node_options_included(self):
        graph = torch.fx.symbolic_trace(Block()).graph
        calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
        assert list(calls) == ["conv", "first", "inner.0", "inner.1", "last"]
        assert set(calls["first"].kwargs) == {"mask"}
        assert calls["inner.0"].kwargs == {}
        assert set(calls["last"].kwargs) == {"residual", "mask", "sample_weight"}
        assert [node.target for node in graph.nodes if node.op == "placeholder"] == ["x", "mask"]

    @pytest.mark.parametrize("training", [True, False])
    def test_the_traced_model_computes_the_same(self, training):
        block = Block().train(training)
        x, mask = rand(5, 3, 4), rand(5, 4, seed=1) > -1
        mask[:, 0] = True
        for layer in block.modules():
            if isinstance(layer, sn.BatchNorm1d):
                layer.momentum = 0.0
        traced = torch.fx.symbolic_trace(block)
        assert torch.equal(traced(x, mask), block(x, mask))

    def test_the_root_itself_can_be_a_sequence(self):
        traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), sn.BatchNorm1d(3), nn.ReLU()))
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]


def test_a_layer_at_the_root_of_a_trace_says_what_to_do():
    with pytest.raises(ArgumentError, match=r"nn.Sequential\(layer\)"):
        torch.fx.symbolic_trace(sn.BatchNorm1d(2))


def test_a_training_step_can_be_rehearsed_on_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = sn.BatchNorm1d(3)
        assert layer(torch.randn(4, 3)).shape == (4, 3)
