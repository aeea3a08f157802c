"""What autograd keeps of a training step, and that it stays right when the caller writes into the output."""

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from steadynorm.functional import batch_norm


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept_of_size_of_x(x: Tensor, **options) -> list[Tensor]:
    """The tensors with as many elements as x (or a quarter of them) that the graph holds, each storage once."""
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if 4 * t.numel() >= x.numel():
            seen[t.untyped_storage().data_ptr()] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = batch_norm(x, None, None, training=True, **options)
    assert y.requires_grad
    return list(seen.values())


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "mish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_x_alone_is_kept(activation, dtype):
    x = rand(8, 4, 6, 6).to(dtype).requires_grad_()
    gamma = torch.ones(4, dtype=dtype, requires_grad=True)
    mask = torch.ones(8, dtype=torch.bool)
    for options in ({}, {"mask": mask}, {"sample_weight": mask.float()}):
        kept = kept_of_size_of_x(x, weight=gamma, activation=activation, **options)
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_a_residual_is_kept_only_where_an_activation_follows():
    x, residual = rand(8, 4, 6).requires_grad_(), rand(8, 4, 6, seed=1).requires_grad_()
    assert [t.data_ptr() for t in kept_of_size_of_x(x, residual=residual)] == [x.data_ptr()]
    kept = kept_of_size_of_x(x, residual=residual, activation="relu")
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), residual.data_ptr()}


@pytest.mark.parametrize("activation", [None, "sigmoid", "elu"])
def test_the_output_may_be_modified_in_place(activation):
    x, upstream = rand(5, 3, 4).requires_grad_(), rand(5, 3, 4, seed=1)
    y = batch_norm(x, None, None, training=True, activation=activation)
    expected = torch.autograd.grad(torch.relu(y), x, upstream)[0]
    found = torch.autograd.grad(batch_norm(x, None, None, training=True, activation=activation).relu_(), x, upstream)[0]
    assert expected.abs().max() > 0.1
    assert torch.equal(found, expected)


def test_a_change_of_x_after_the_forward_is_noticed_not_used():
    x = rand(5, 3).requires_grad_()
    inside = x * 1
    y = batch_norm(inside, None, None, training=True)
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x, torch.ones_like(y))


def test_inference_mode_and_no_grad_build_no_graph():
    x = rand(5, 3).requires_grad_()
    with torch.no_grad():
        assert not batch_norm(x, None, None, training=True).requires_grad
    with torch.inference_mode():
        y = batch_norm(x, torch.zeros(3).double(), torch.ones(3).double(), training=True)
    torch.testing.assert_close(y.clone(), batch_norm(x.detach(), None, None, training=True))
