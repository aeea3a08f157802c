"""Which backend computes, and that a step on the CPU's kernels is as good a citizen of autograd as the reference."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.functional import batch_norm
from steadynorm.ops import reference
from steadynorm.ops.backends import backend_for, reference_only
from steadynorm.ops.reference import Operands
from support import assert_close, laid_out
from support_kernels import Step, expected, randn


class Subclass(Tensor):
    """May hold its values anywhere."""


def test_plain_tensors_on_the_cpu_go_to_the_kernels():
    x = torch.randn(4, 3)
    cpu = backend_for(Operands(x))
    assert cpu is not reference
    assert cpu.__name__ == "steadynorm.ops.cpu.backend"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert backend_for(Operands(x.to(dtype), nn.Parameter(torch.ones(3)), residual=x)) is cpu


@pytest.mark.parametrize(
    "operands",
    [
        Operands(torch.empty(4, 3, device="meta")),
        Operands(torch.randn(4, 3).as_subclass(Subclass)),
        Operands(torch.randn(4, 3), weight=torch.ones(3).as_subclass(Subclass)),
        Operands(torch.randn(4, 3), residual=torch.randn(4, 3).as_subclass(Subclass)),
        Operands(torch.randn(4, 3), residual=torch.ones(4, 3, dtype=torch.int64)),
        Operands(torch.randn(4, 3).to_sparse()),
        Operands(torch.randn(4, 3), residual=torch.randn(4, 3).to_sparse()),
        Operands(torch.empty(0, 3)),
        Operands(torch.empty(4, 0)),
        Operands(torch.randn(4, 3).to(torch.complex64)),
    ],
    ids=[
        *("meta", "subclass", "weight of a subclass", "residual of a subclass", "integer residual", "sparse"),
        *("sparse residual", "empty batch", "no channels", "complex"),
    ],
)
def test_what_kernels_cannot_read_falls_to_the_reference(operands):
    assert backend_for(operands) is reference


def test_a_fake_tensor_falls_to_the_reference():
    with FakeTensorMode():
        assert backend_for(Operands(torch.randn(4, 3))) is reference


def test_reference_only_holds_in_all_threads_and_ends_with_its_block():
    operands, seen = Operands(torch.randn(4, 3)), []

    def fail_within() -> None:
        with reference_only():
            with reference_only():
                pass
            thread = threading.Thread(target=lambda: seen.append(backend_for(operands)))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    assert seen == [reference]
    assert backend_for(operands) is not reference


def test_a_layer_that_has_taken_the_kernels_takes_the_reference_within_reference_only():
    layer, x, used = sn.BatchNorm1d(3), torch.randn(8, 3), []
    layer(x)
    layer(x)
    train = reference.train
    with pytest.MonkeyPatch.context() as patched, reference_only():
        patched.setattr(reference, "train", lambda *a: (used.append(1), train(*a))[1])
        layer(x)
    assert used == [1]


def bytes_kept(compute) -> tuple[Tensor, int]:
    """What `compute` returns, and how many bytes of distinct memory its graph holds."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = compute()
    return y, sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_layer_with_relu_keeps_half_of_what_torch_keeps(dtype, layout):
    """x and a few numbers per channel; torch keeps its output as well. The first step and those like it."""
    channels = 4
    x = laid_out(randn(4, channels, 16, 16).to(dtype), layout).requires_grad_()
    size = x.numel() * x.element_size()
    layer = sn.BatchNorm2d(channels, activation="relu")
    for _ in range(3):
        y, kept = bytes_kept(lambda: layer(x))
        assert y.requires_grad
        assert size <= kept <= size + 64 * channels
    torchs = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    _, twice = bytes_kept(lambda: torchs(x))
    assert kept < 0.55 * twice


def layers_and_batch() -> tuple[sn.BatchNorm2d, Step]:
    """A layer, and a batch with what its training step is by the definition."""
    step = Step(
        randn(4, 3, 9, 10, mean=2).float(), (1 + randn(3, seed=1) / 2).float(), randn(3, seed=2).float(),
        activation="relu", grad_y=randn(4, 3, 9, 10, seed=3).float(),
    )  # fmt: skip
    layer = sn.BatchNorm2d(3, activation="relu")
    with torch.no_grad():
        layer.weight.copy_(step.gamma)
        layer.bias.copy_(step.beta)
    return layer, step


def check_layer(layer: nn.Module, x: Tensor, y: Tensor, step: Step) -> None:
    wanted = expected(step)
    assert_close(y, wanted.y, "output")
    assert_close(x.grad, wanted.grad_x, "gradient")
    for found, right in ((layer.weight.grad, wanted.grad_gamma), (layer.bias.grad, wanted.grad_beta)):
        assert_close(found / 20, right / 20, "gradient")  # sums over 360 values, of which 20 is the root


@pytest.mark.parametrize("way", ["plain", "in place", "reentrant", "not reentrant", "hooks", "transposed gradient"])
def test_first_and_later_steps_of_a_layer(way):
    """The first goes through every check, the others the shortest way; each is right, whatever surrounds it."""
    layer, step = layers_and_batch()
    for _ in range(3):
        layer.zero_grad()
        x = step.x.clone().requires_grad_()
        upstream = step.grad_y
        match way:
            case "in place":
                y = layer(x)
                y.mul_(2)
                upstream = upstream / 2
            case "reentrant" | "not reentrant":
                y = checkpoint(layer, x, use_reentrant=way == "reentrant")
            case "hooks":
                with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                    y = layer(x)
            case _:
                y = layer(x)
        if way == "transposed gradient":
            upstream = laid_out(upstream, "channels_last")
        y.backward(upstream)
        check_layer(layer, x, y / 2 if way == "in place" else y, step)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(mode):
    layer, step = layers_and_batch()
    for _ in range(2):
        with mode():
            y, kept = bytes_kept(lambda: layer(step.x))
        assert not y.requires_grad
        assert kept == 0
        assert_close(y.clone(), expected(step).y, "output")
    assert layer.num_batches_tracked.item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """A batch norm takes what it gets: a half-precision input stays one, its weight stays float32."""
    layer, step = layers_and_batch()
    narrow = step._replace(x=step.x.to(dtype), grad_y=step.grad_y.to(dtype))
    wanted = expected(narrow)
    for _ in range(2):
        layer.zero_grad()
        x = narrow.x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
        y.backward(narrow.grad_y)
        assert y.dtype == dtype
        assert_close(y, wanted.y, "output")
        assert_close(x.grad, wanted.grad_x, "gradient")
        assert layer.weight.grad.dtype == torch.float32
        assert_close(layer.weight.grad / 20, wanted.grad_gamma / 20, "gradient")


@pytest.mark.parametrize("affine", [True, False])
def test_many_gradients_at_once(affine):
    """`is_grads_batched` runs backward over a vmap, whose tensors have no memory for a kernel to read."""
    layer, step = layers_and_batch()
    layer = sn.BatchNorm2d(3, affine=affine, activation="relu")
    upstream = torch.stack([randn(*step.x.shape, seed=seed).float() for seed in (4, 5)])
    for _ in range(2):
        x = step.x.clone().requires_grad_()
        for y in (layer(x), batch_norm(x, None, None, training=True, activation="relu")):
            (found,) = torch.autograd.grad(y, x, upstream, is_grads_batched=True)
            for one, g in zip(found, upstream, strict=True):
                assert_close(one, expected(Step(step.x, activation="relu", grad_y=g)).grad_x, "gradient")


def test_a_gradient_that_is_the_symbol_of_zeros():
    """Complex autograd hands on zeros that have no memory."""
    layer, step = layers_and_batch()
    for _ in range(2):
        x = step.x.clone().requires_grad_()
        layer(x).backward(torch._efficientzerotensor(tuple(x.shape)))
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_step_that_is_unlike_the_last_one_is_not_taken_for_it():
    """Whatever changes between two steps of one layer: shape, strides, dtype, threads, settings, parameters."""
    layer, step = layers_and_batch()

    def right(x: Tensor, layer: nn.Module = layer, activation: str | None = "relu", **options) -> None:
        operands = Step(x, layer.weight, layer.bias, activation=activation, **options)
        y = layer(x, **{name: t for name, t in options.items() if name == "residual"})
        assert_close(y, expected(operands).y, "output", x.dtype)

    right(step.x)
    right(step.x[:3])
    right(step.x[..., ::2])
    right(laid_out(step.x, "channels_last"))
    right(step.x.bfloat16())
    right(step.x, residual=step.grad_y)
    right(step.x, residual=step.grad_y.bfloat16())
    right(step.x, residual=laid_out(step.grad_y, "channels_last"))
    right(step.x)
    layer.activation = sn.activations.resolve("silu")
    right(step.x, activation="silu")
    layer.activation = None
    right(step.x, activation=None)
    with torch.no_grad():
        layer.weight.mul_(3)
    right(step.x, activation=None)
    layer.weight = nn.Parameter(torch.full((6,), 2.0)[::2])
    right(step.x, activation=None)
    layer.bias = None
    right(step.x, activation=None)
    right(step.x, copy.deepcopy(layer), activation=None)
    layer.eps = 0.5
    before = layer(step.x)
    layer.eps = 1e-5
    assert not torch.allclose(before, layer(step.x))
