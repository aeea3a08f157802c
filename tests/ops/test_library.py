"""The training step's operators: their schemas, and that compilers meet them in the step's place."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule
from torch.library import opcheck

import steadynorm as sn
from steadynorm.functional import batch_norm, batch_norm_with_moments
from steadynorm.ops.backends import reference_only
from support import LAYOUTS, assert_close, laid_out
from support_kernels import EPS, Result, Step, check, expected, randn

OPS = torch.ops.steadynorm
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.fixture
def compiler():
    """Without caches on disk: they know a graph by its operators' names, not by what is registered for them."""
    torch.compiler.reset()
    with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False):
        yield
    torch.compiler.reset()


def make(shape: tuple[int, ...], dtype: torch.dtype = F32, **options) -> Step:
    """A step with an affine map, a ReLU and gradients of the output and of the statistics."""
    channels = shape[1]
    given: dict[str, Any] = {
        "gamma": (1 + 0.5 * randn(channels, seed=1)).to(dtype),
        "beta": (0.5 * randn(channels, seed=2)).to(dtype),
        "activation": "relu",
        "grad_y": randn(*shape, seed=3).to(dtype),
        "grad_mean": randn(channels, seed=4),
        "grad_m2": 0.1 * randn(channels, seed=5),
    }
    return Step(randn(*shape, mean=3, std=2).to(dtype), **{**given, **options})


def run(step: Step, train: Callable[..., Any]) -> Result:
    """The step and its backward by `train`, which is `batch_norm_with_moments`, compiled."""
    x, gamma, beta, residual = tensors = [None if t is None else t.detach().requires_grad_() for t in step[:4]]
    y, moments = train(
        x, gamma, beta, EPS, activation=step.activation, residual=residual, mask=step.mask, sample_weight=step.weight
    )
    assert y.stride() == torch.empty_like(step.x).stride()
    outputs = [(y, step.grad_y), (moments.mean, step.grad_mean), (moments.m2, step.grad_m2)]
    outputs = [(out, g) for out, g in outputs if g is not None]
    wanted = [t for t in tensors if t is not None]
    found = iter(torch.autograd.grad([out for out, _ in outputs], wanted, [g for _, g in outputs]))
    grads = [None if t is None else next(found) for t in tensors]
    assert grads[0].stride() == y.stride()
    return Result(y, *moments, *grads)


class Graphs:
    """A backend that runs what autograd was traced to, and keeps it: `forward`, then `backward`."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self._keep, bw_compiler=self._keep)

    def _keep(self, graph: GraphModule, _inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    def ours(self) -> list[str]:
        """The operators of ours, in order; those that write are wrapped."""
        found = [[n.target, *n.args] for graph in self.graphs for n in graph.graph.nodes if n.op == "call_function"]
        return [str(t) for targets in found for t in targets if str(t).startswith("steadynorm.")]

    def wide(self, size: int) -> list[str]:
        """What holds at least `size` float64 values: the composite would, for any x of another dtype."""
        values = [(n, n.meta.get("val")) for graph in self.graphs for n in graph.graph.nodes]
        return [str(n) for n, v in values if isinstance(v, Tensor) and v.dtype == F64 and v.numel() >= size]


STEP = ["steadynorm.train.default", "steadynorm.commit_.default", "steadynorm.train_backward.default"]


def operands_of(step: Step, needing_gradients: bool = True) -> list[Tensor | None]:
    operands, _ = step.arguments()
    floating = [None if t is None else t.detach().requires_grad_(needing_gradients) for t in operands[:4]]
    return [*floating, *operands[4:]]


MASK, WEIGHT = randn(6, 4, seed=6) > -1, randn(6, seed=7).abs()
SAMPLES = {
    "plain": make((6, 3, 4), gamma=None, beta=None, activation=None),
    "residual added last": make((6, 3, 4), F64, residual=randn(6, 3, 4, seed=8), mask=MASK, activation=None),
    "every option": make((6, 3, 4), residual=randn(6, 3, 4, seed=8).float(), mask=MASK, weight=WEIGHT),
    "half precision, float32 affine": make((6, 3, 4), BF16, gamma=randn(3).float(), beta=randn(3).float()),
    "no memory order of its own": make((6, 3, 4))._replace(x=laid_out(randn(6, 3, 4).float(), "sliced")),
}


class TestOpcheck:
    """Schema (no result is an input), autograd registration, fake tensors, AOT dispatch with dynamic shapes."""

    @pytest.mark.parametrize("sample", SAMPLES)
    def test_train(self, sample):
        step = SAMPLES[sample]
        settings = (1, EPS, step.activation, [])
        opcheck(OPS.train.default, (*operands_of(step), None, *settings))
        y, statistics = OPS.train(*operands_of(step, False), None, *settings)
        opcheck(OPS.train.default, (*operands_of(step), statistics, *settings))
        for grads in ((step.grad_y, torch.randn_like(statistics)), (None, torch.randn_like(statistics))):
            opcheck(OPS.train_backward.default, (*grads, statistics, *operands_of(step, False), *settings))
        assert y.dtype == step.x.dtype

    @pytest.mark.parametrize("weight", [None, WEIGHT.view(6, 1, 1)])
    def test_measure(self, weight):
        opcheck(OPS.measure.default, (randn(6, 3, 4).float(), weight, 1))

    def test_an_empty_batch_and_parameters_of_an_activation(self):
        empty = (torch.empty(0, 3, requires_grad=True), None, None, None, None, None)
        opcheck(OPS.train.default, (*empty, None, 1, EPS, "leaky_relu", [0.2]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_no_kernel_runs_results_have_the_strides_that_were_promised(layout):
    shape = (6, 3, 4, 5)
    step = make(shape, F64, residual=laid_out(randn(*shape, seed=8), "permuted"), activation=None)
    step = step._replace(x=laid_out(step.x, layout), grad_y=laid_out(step.grad_y, "channels_last"))
    with reference_only():
        y, statistics = OPS.train(*operands_of(step, False), None, 1, EPS, None, [])
        grads = OPS.train_backward(step.grad_y, None, statistics, *operands_of(step, False), 1, EPS, None, [])
    for result in (y, grads[0], grads[3]):
        assert result.stride() == torch.empty_like(step.x).stride()
    assert_close(y, expected(step).y, "output")
    assert torch.equal(grads[3], step.grad_y)
    assert grads[3].untyped_storage().data_ptr() != step.grad_y.untyped_storage().data_ptr()


def test_second_and_third_derivatives_by_the_operator():
    step = make((4, 2), F64, residual=randn(4, 2, seed=8), activation="silu", mask=randn(4, seed=6) > -1)
    operands = operands_of(step)
    upstream = (step.grad_y, randn(3, 2, seed=9))

    def first_derivative(x, weight, bias, factor):
        outputs = OPS.train(x, weight, bias, factor * x, *operands[4:], None, 1, EPS, "silu", [])  # x by two ways
        return torch.autograd.grad(outputs, (x, weight, bias, factor), upstream, create_graph=True)

    assert torch.autograd.gradcheck(first_derivative, operands[:4], fast_mode=True)
    assert torch.autograd.gradgradcheck(first_derivative, operands[:4], fast_mode=True)


@pytest.mark.usefixtures("compiler")
class TestCompiled:
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    @pytest.mark.parametrize("sample", SAMPLES)
    def test_against_the_definition(self, sample, backend):
        step = SAMPLES[sample]
        found = run(step, torch.compile(batch_norm_with_moments, backend=backend, fullgraph=True))
        check(found, expected(step), step.x.dtype)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_in_every_layout(self, layout):
        """Where the compiler makes x itself, could order it as it likes, and reads y; `run` compares strides."""
        x = randn(6, 3, 4, 5, mean=3, std=2).float()
        step = make(x.shape)._replace(x=laid_out(x, layout))

        def amid_others(half, *others, **options):
            doubled = half + half.clone(memory_format=torch.contiguous_format)
            y, moments = batch_norm_with_moments(doubled, *others, **options)
            return y - 1, moments

        halved = step._replace(x=step.x / 2)
        assert halved.x.stride() == step.x.stride() or layout == "sliced"
        found = run(halved, torch.compile(amid_others, backend="inductor", fullgraph=True))
        check(found._replace(y=found.y + 1, grad_x=found.grad_x / 2), expected(step), F32)

    def test_a_channels_last_model_stays_one(self):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), sn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 4, 1), sn.BatchNorm2d(4)
        ).to(memory_format=torch.channels_last)
        x = randn(2, 3, 8, 8).float().contiguous(memory_format=torch.channels_last)
        upstream = randn(2, 4, 6, 6, seed=1).float()  # contiguous, as a flattening after it makes it
        found = {}
        for name, run_model in (("eager", model), ("compiled", torch.compile(model, fullgraph=True))):
            y = run_model(x)
            assert y.is_contiguous(memory_format=torch.channels_last)
            found[name] = [y, *torch.autograd.grad(y, model.parameters(), upstream)]
        for eager, compiled in zip(*found.values(), strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "operators"),
        [
            ({"activation": "silu"}, STEP),
            ({"ghost_batch_size": 4}, [STEP[0], STEP[0], STEP[1], STEP[2], STEP[2]]),
            (
                {"renorm": sn.Renorm(warmup=0)},
                ["steadynorm.measure.default", "steadynorm.corrections.default", *STEP],
            ),
        ],
        ids=["plain", "ghost batches", "renorm"],
    )
    def test_the_graph_holds_the_operators_and_no_composite(self, options, operators):
        graphs = Graphs()
        x = randn(8, 3, 4).float().requires_grad_()
        y = torch.compile(sn.BatchNorm1d(3, **options), backend=graphs.backend, fullgraph=True)(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
        assert graphs.ours() == operators
        assert graphs.wide(x.numel() // 2) == []

    def test_x_alone_is_kept_and_a_residual_where_an_activation_follows(self):
        x, residual = (randn(16, 3, 8, 8, seed=s).float().requires_grad_() for s in (0, 1))
        for options, kept in (
            ({"activation": "gelu"}, [x]),
            ({"residual": residual}, [x]),
            ({"residual": residual, "activation": "relu"}, [x, residual]),
        ):
            seen: list[Tensor] = []
            step = torch.compile(partial(batch_norm, training=True, **options), backend="aot_eager", fullgraph=True)
            with saved_tensors_hooks(lambda t, seen=seen: seen.append(t) or t, lambda t: t):
                step(x, None, None)
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in seen}
            assert {t.data_ptr() for t in kept} <= storages.keys()
            assert sum(storages.values()) <= sum(4 * t.numel() for t in kept) + 1000

    def test_one_graph_for_every_batch_size(self):
        counter = CompileCounter()
        train = torch.compile(batch_norm_with_moments, backend=counter, fullgraph=True)
        for n in (6, 2, 9, 30):
            x = randn(n, 3, 4, seed=n).float()
            torch._dynamo.mark_dynamic(x, 0)
            y, moments = train(x)
            wanted = expected(Step(x))
            assert_close(y, wanted.y, "output")
            assert_close(moments.m2, wanted.m2, "statistic", F32)
        assert counter.frame_count == 1

    def test_sizes_that_are_symbols_in_the_backward_too(self):
        train = torch.compile(batch_norm_with_moments, backend="inductor", fullgraph=True, dynamic=True)
        for n in (5, 7, 12):
            step = make((n, 3, n + 1))
            check(run(step, train), expected(step), F32)

    def test_autocast_no_grad_and_inference_mode(self):
        linear, layer = nn.Linear(4, 4), sn.BatchNorm1d(4)
        model = nn.Sequential(linear, layer)
        compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), randn(16, 4).float()
        with torch.autocast("cpu", BF16):
            y, wanted = compiled(x), expected(Step(linear(x).detach(), layer.weight, layer.bias)).y
        assert y.dtype == BF16
        assert y.requires_grad
        assert_close(y, wanted, "output")
        wanted = expected(Step(linear(x).detach(), layer.weight, layer.bias)).y
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                y = compiled(x)
                assert not y.requires_grad
                assert_close(y, wanted, "output")

    def test_what_transforms_see_through_is_the_composite(self):
        x = randn(6, 3).float()
        layer = sn.BatchNorm1d(3, track_running_stats=False)
        for transformed in (
            torch.func.grad(lambda x: (layer(x) ** 3).sum()),
            lambda x: torch.func.jvp(layer, (x,), (x,)),
            torch.vmap(lambda shift: layer(x + shift)),
        ):
            graphs = Graphs()
            torch.compile(transformed, backend=graphs.backend, fullgraph=True)(x if x.dim() == 2 else x[0])
            assert graphs.graphs
            assert graphs.ours() == []

    def test_an_exported_program_holds_the_composite(self):
        class Step(nn.Module):
            def forward(self, x):
                return batch_norm(x, None, None, training=True)

        for strict in (False, True):
            exported = torch.export.export(Step(), (randn(6, 3).float(),), strict=strict).graph
            assert not [n for n in exported.nodes if "steadynorm" in str(n.target)]
