"""Layers in train mode by `functional_call` under torch.func's transforms: values, derivatives, and the buffers.

Values come from the definition, derivatives from central differences of it, and running statistics from the
definition's statistics at every step.
"""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import steadynorm as sn
from support import ACTIVATIONS, Array, Wide, assert_close, batch_norm, central_differences, stats, wide
from support_stateless import NAN, UPSTREAM, X, assert_buffers, assert_untouched, layer_of, rand, snapshot, state_of


def jacobian(f, at: Tensor) -> Array:
    """df_i/dx_j by central differences, each output on its own."""
    shape = f(wide(at)).shape
    rows = [central_differences(lambda v, i=i: f(v)[i], at) for i in np.ndindex(shape)]
    return np.stack(rows).reshape(*shape, *at.shape)


class Pure:
    """A layer as a function of its input, by way of `steadynorm.functional_call`; and the same from the definition."""

    def __init__(self, **options) -> None:
        self.layer = layer_of(activation="tanh", **options)
        self.parameters, self.buffers = state_of(self.layer)

    def __call__(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return sn.functional_call(self.layer, (self.parameters, self.buffers), x)

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y, buffers = self(x)
        return (y * UPSTREAM).sum(), buffers

    def definition(self, x: Array) -> Array:
        return batch_norm(x, self.layer.weight, self.layer.bias, activation=ACTIVATIONS["tanh"])

    def defined_loss(self, x: Array) -> Wide:
        return (self.definition(x) * wide(UPSTREAM)).sum()


class TestTransforms:
    """Each transform of a training forward, its buffers among what it returns, and nothing written to the module."""

    @pytest.fixture
    def pure(self):
        pure = Pure()
        before = snapshot(pure.layer)
        yield pure
        assert_untouched(pure.layer, before)

    def test_no_transform(self, pure):
        y, buffers = pure(X)
        assert_close(y, pure.definition(wide(X)), "output")
        assert_buffers(buffers, stats(X))
        assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked", "_rejected"]

    def test_grad(self, pure):
        found, buffers = grad(pure.loss, has_aux=True)(X)
        assert_close(found, central_differences(pure.defined_loss, X), "gradient")
        assert_buffers(buffers, stats(X))

    def test_grad_of_parameters_and_input(self, pure):
        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor):
            y, buffers = sn.functional_call(pure.layer, (parameters, buffers), x)
            return (y * UPSTREAM).sum(), buffers

        arguments = (pure.parameters, pure.buffers, X)
        (found, of_x), (value, buffers) = grad_and_value(loss, argnums=(0, 2), has_aux=True)(*arguments)

        def defined(gamma: Array, beta: Array) -> Wide:
            return (batch_norm(X, gamma, beta, activation=ACTIVATIONS["tanh"]) * wide(UPSTREAM)).sum()

        gamma, beta = wide(pure.layer.weight), wide(pure.layer.bias)
        assert_close(value, np.asarray(defined(gamma, beta)), "output")
        assert_close(found["weight"], central_differences(lambda g: defined(g, beta), gamma), "gradient")
        assert_close(found["bias"], central_differences(lambda b: defined(gamma, b), beta), "gradient")
        assert_close(of_x, central_differences(pure.defined_loss, X), "gradient")
        assert_buffers(buffers, stats(X))
        assert not any(t.requires_grad for t in buffers.values())

    def test_vjp(self, pure):
        y, pull, buffers = vjp(pure, X, has_aux=True)
        assert_close(y, pure.definition(wide(X)), "output")
        assert_close(pull(UPSTREAM)[0], central_differences(pure.defined_loss, X), "gradient")
        assert_buffers(buffers, stats(X))

    def test_jvp(self, pure):
        direction = rand(4, 2, seed=5)
        y, tangent, buffers = jvp(pure, (X,), (direction,), has_aux=True)
        along = central_differences(
            lambda t: (pure.definition(wide(X) + t * wide(direction)) * wide(UPSTREAM)).sum(), np.zeros(())
        )
        assert_close((tangent * UPSTREAM).sum(), along, "gradient")
        assert_close(y, pure.definition(wide(X)), "output")
        assert_buffers(buffers, stats(X))

    @pytest.mark.parametrize("transform", [jacrev, jacfwd])
    def test_jacobians(self, pure, transform):
        found, buffers = transform(pure, has_aux=True)(X)
        assert_close(found, jacobian(pure.definition, X), "gradient")
        assert_buffers(buffers, stats(X))

    def test_hessian(self, pure):
        found = hessian(lambda x: pure.loss(x)[0])(X)
        # second derivatives along pairs of directions, by the second difference of the definition's loss
        h = np.finfo(Wide).eps ** (Wide(1) / 6)
        for seed in range(3):
            a, b = wide(rand(4, 2, seed=seed + 10)), wide(rand(4, 2, seed=seed + 20))

            def second_difference(s: Wide, a=a, b=b) -> Wide:
                f = lambda v: pure.defined_loss(wide(X) + s * v)  # noqa: E731
                return (f(a + b) - f(a - b) - f(b - a) + f(-a - b)) / (4 * s * s)

            wanted = (4 * second_difference(h / 2) - second_difference(h)) / 3  # Richardson: few digits to spare
            got = np.einsum("ij,ijkl,kl->", a, wide(found), b)
            assert got == pytest.approx(float(wanted), rel=1e-7)

    def test_vmap_over_data_gives_every_element_its_own_batch_and_buffers(self, pure):
        xs = torch.stack([X, 3 * X, rand(4, 2, seed=7)])
        y, buffers = vmap(pure)(xs)
        for i, x in enumerate(xs):
            assert_close(y[i], pure.definition(wide(x)), "output")
            assert_buffers({name: t[i] for name, t in buffers.items()}, stats(x))

    def test_vmap_of_grad_with_masks_and_weights(self, pure):
        xs, masks = torch.stack([X, 3 * X]), torch.tensor([[True, True, False, True], [False, True, True, True]])
        weights = torch.tensor([[1.0, 2.0, 1.0, 0.5], [1.0, 0.25, 2.0, 3.0]]).double()
        holey = torch.where(masks[..., None], xs, NAN)

        def loss(x: Tensor, mask: Tensor, weight: Tensor):
            y, buffers = sn.functional_call(
                pure.layer, (pure.parameters, pure.buffers), x, {"mask": mask, "sample_weight": weight}
            )
            return (y * UPSTREAM).sum(), buffers

        found, buffers = vmap(grad(loss, has_aux=True))(holey, masks, weights)
        for i, (x, mask, weight) in enumerate(zip(xs, masks, weights, strict=True)):

            def defined(value: Array, mask=mask, weight=weight) -> Wide:
                y = batch_norm(
                    value, pure.layer.weight, pure.layer.bias,
                    activation=ACTIVATIONS["tanh"], mask=mask, sample_weight=weight,
                )  # fmt: skip
                return (y * wide(UPSTREAM)).sum()

            assert_close(found[i], central_differences(defined, x), "gradient")
            assert_buffers({name: t[i] for name, t in buffers.items()}, stats(x, weight=mask * weight))

    def test_bad_batches_are_counted_in_what_is_returned(self, pure):
        xs = torch.stack([X, X])
        xs[1, 2, 0] = float("inf")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, buffers = vmap(pure)(xs)
        assert buffers["_rejected"].tolist() == [0, 1]
        assert buffers["num_batches_tracked"].tolist() == [1, 0]
        assert buffers["running_var"][1].tolist() == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None}, {"ghost_batch_size": 2}, {"renorm": sn.Renorm(warmup=1, ramp=0)},
        {"channel_dim": -1}, {"single_value": "beta"},
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_any_layer_is_as_pure_as_it_is_right_in_eager_mode(options):
    """Threading equals the eager module, whose options have their own tests against the definition."""
    layer, eager = layer_of(**options), layer_of(**options)
    parameters, buffers = state_of(layer)
    before = snapshot(layer)

    def loss(parameters, buffers, x: Tensor):
        y, buffers = sn.functional_call(layer, (parameters, buffers), x)
        return (y * UPSTREAM).sum(), (y, buffers)

    for step in range(3):
        x = X * (step + 1)
        found, (y, buffers) = grad(loss, has_aux=True)(parameters, buffers, x)
        eager.zero_grad()
        wanted = eager(x)
        wanted.backward(UPSTREAM)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["weight"], eager.weight.grad, rtol=1e-10, atol=1e-10)
    for name, t in eager.named_buffers():
        torch.testing.assert_close(buffers[name], t, rtol=1e-12, atol=1e-12)
    assert_untouched(layer, before)
