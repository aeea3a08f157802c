"""What a compiler sees of a step on a GPU: each kernel by itself. CPU tensors stand for a GPU's, and nothing is run."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from steadynorm.activations import Activation
from steadynorm.ops import accelerator, library
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Train

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def kernels(monkeypatch):
    """Kernels in Triton compute for the CPU, and would be compiled for an NVIDIA GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    nvidia = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(driver, "_active", nvidia)
    from steadynorm.ops.gpu import backend

    monkeypatch.setattr(accelerator, "GPUS", {"cpu"})
    monkeypatch.setattr(accelerator, "_found", {"cpu": backend})


def step(x, gamma, beta, grad_y):
    y, statistics = library.train(Operands(x, gamma, beta), Train(Layout.of(x), 1e-5, Activation("silu")))
    return (y, statistics.mean, *torch.autograd.grad(y, [x, gamma, beta], grad_y))


def traced(shape, layout=torch.contiguous_format, mode="fake") -> GraphModule:
    x = torch.empty(shape).to(memory_format=layout)
    gamma, beta = (torch.empty(shape[1]).requires_grad_() for _ in range(2))
    inputs = x.requires_grad_(), gamma, beta, torch.empty_like(x)
    return make_fx(dispatch_functionalize(step), tracing_mode=mode)(*inputs)


def launched(graph: GraphModule) -> list[str]:
    """The kernels in a graph, in their order."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    nodes = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    kernels = [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes]
    return [getattr(kernel, "fn", kernel).__name__ for kernel in kernels]  # within its one choice of warps


def opaque(graph: GraphModule) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if str(node.target).startswith("steadynorm")}


@needs_triton
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_graph_holds_each_kernel(kernels, layout):
    graph = traced((32, 64, 28, 28), layout)
    assert launched(graph) == ["measure", "statistics", "normalize", "reduce", "gradients", "gradient"]
    assert not opaque(graph)
    y, *_ = graph.graph.output_node().args[0]
    assert y.meta["val"].is_contiguous(memory_format=layout)


@needs_triton
def test_a_channel_that_fits_on_chip_takes_one_kernel_each_way(kernels):
    assert launched(traced((32, 64, 7, 7))) == ["forward", "backward"]


@needs_triton
def test_sizes_left_open_stay_open(kernels):
    """Blocks follow from the sizes: such a graph holds the operators, which look when they run."""
    graph = traced((32, 64, 28, 28), mode="symbolic")
    assert not launched(graph)
    assert opaque(graph) == {"steadynorm.train.default", "steadynorm.train_backward.default"}


def test_without_kernels_for_a_gpu_the_operators_stay():
    graph = traced((32, 64, 28, 28))
    assert opaque(graph) == {"steadynorm.train.default", "steadynorm.train_backward.default"}
