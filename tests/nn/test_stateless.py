"""Layers in train mode under torch.func, forward-mode AD and compiled transforms: values, derivatives, and the buffers.

Values come from the definition, derivatives from central differences of it, and running statistics from the
definition's statistics at every step.
"""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import ranks
import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning, TransformError
from support import ACTIVATIONS, Array, Stats, Wide, assert_close, batch_norm, central_differences, stats, wide

NAN = float("nan")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


X, UPSTREAM = rand(4, 2), rand(4, 2, seed=1)


def layer_of(channels: int = 2, **options) -> sn.BatchNorm1d:
    layer = sn.BatchNorm1d(channels, dtype=torch.float64, **options)
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.trunc_normal_(parameter, mean=1.0, generator=torch.Generator().manual_seed(seed))
    return layer


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), sn.BatchNorm1d(2, activation="tanh"), nn.Linear(2, 1)).double()


def state_of(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers; the latter are not copied: what is written to them shows."""
    return {name: p.detach() for name, p in module.named_parameters()}, dict(module.named_buffers())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*module.named_parameters(), *module.named_buffers()]}


def assert_untouched(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        assert type(t) in (Tensor, nn.Parameter), f"{name} is a {type(t)}"
        assert torch.equal(t, before[name]), name


def remembered(*batches: Stats, before: tuple[Array, Array] | None = None, share: float = 0.1) -> tuple[Array, Array]:
    """Running mean and variance after these batches."""
    mean, variance = before or (np.zeros_like(batches[0].mean), np.ones_like(batches[0].mean))
    for one in batches:
        mean, variance = (1 - share) * mean + share * one.mean, (1 - share) * variance + share * one.unbiased
    return mean, variance


def assert_buffers(buffers: dict[str, Tensor], *batches: Stats, prefix: str = "") -> None:
    """The buffers of a layer that began at mean 0 and variance 1 and has seen these batches."""
    mean, variance = remembered(*batches)
    assert_close(buffers[prefix + "running_mean"], mean, "statistic")
    assert_close(buffers[prefix + "running_var"], variance, "variance")
    assert buffers[prefix + "num_batches_tracked"].item() == len(batches)


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


class TestThreading:
    """Buffers handed from one step to the next."""

    batches = tuple(rand(6, 3, seed=seed) + seed for seed in range(3))

    def train_eagerly(self) -> tuple[nn.Sequential, list[Stats]]:
        """Three steps of SGD on a module, and what its batch norm was shown, from the definition."""
        model, seen = network(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in self.batches:
            seen.append(stats(wide(x) @ wide(model[0].weight).T + wide(model[0].bias)))
            optimizer.zero_grad()
            (model(x) - x[:, :1]).square().mean().backward()
            optimizer.step()
        return model, seen

    @staticmethod
    def loss(model: nn.Module, parameters, buffers, x: Tensor):
        y, buffers = sn.functional_call(model, (parameters, buffers), (x,))
        return (y - x[:, :1]).square().mean(), buffers

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_three_steps_equal_three_steps_of_the_module(self, compiled):
        eager, seen = self.train_eagerly()
        model = network()
        before = snapshot(model)
        parameters, buffers = state_of(model)
        step = grad(partial(self.loss, model), has_aux=True)
        if compiled:
            torch._dynamo.reset()
            step = torch.compile(step, backend="aot_eager", fullgraph=True)
        for i, x in enumerate(self.batches):
            shown = stats(wide(x) @ wide(parameters["0.weight"]).T + wide(parameters["0.bias"]))
            np.testing.assert_allclose(shown.mean.astype("f8"), seen[i].mean.astype("f8"), rtol=1e-11)
            gradients, buffers = step(parameters, buffers, x)
            parameters = {name: p - 0.1 * gradients[name] for name, p in parameters.items()}
        assert_buffers(buffers, *seen, prefix="1.")
        assert_buffers(dict(eager.named_buffers()), *seen, prefix="1.")
        for name, p in eager.named_parameters():
            torch.testing.assert_close(parameters[name], p.detach(), rtol=1e-11, atol=1e-11)
        assert_untouched(model, before)

    def test_what_comes_out_can_be_loaded_into_the_module(self):
        model = network()
        _, buffers = sn.functional_call(model, dict(model.named_parameters()), self.batches[0])
        saved = model.state_dict()
        model.load_state_dict({**saved, **{name: t for name, t in buffers.items() if name in saved}})
        first = wide(self.batches[0]) @ wide(model[0].weight).T + wide(model[0].bias)
        assert_buffers(dict(model.named_buffers()), stats(first), prefix="1.")

    def test_an_ensemble_of_stacked_models(self):
        models = [network() for _ in range(3)]
        for i, model in enumerate(models):
            nn.init.trunc_normal_(model[0].weight, generator=torch.Generator().manual_seed(i))
        parameters, buffers = stack_module_state(models)
        shared = models[0]
        before = snapshot(shared)
        step = vmap(grad(partial(self.loss, shared), has_aux=True), in_dims=(0, 0, None))
        seen: list[list[Stats]] = [[] for _ in models]
        for x in self.batches:
            for i, each in enumerate(seen):
                each.append(stats(wide(x) @ wide(parameters["0.weight"][i]).T + wide(parameters["0.bias"][i])))
            gradients, buffers = step(parameters, buffers, x)
            parameters = {name: p - 0.1 * gradients[name] for name, p in parameters.items()}
        for i, each in enumerate(seen):
            assert_buffers({name: t[i] for name, t in buffers.items()}, *each, prefix="1.")
        assert_untouched(shared, before)


class Moving(nn.Module):
    """Buffers that are no batch norm's: one that a forward replaces, one that it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = layer_of()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        self.calls = self.calls + 1
        for _ in range(times):
            x = self.norm(x) * self.scale
        return x


class TestBuffers:
    def test_those_of_other_modules_are_returned_as_the_forward_leaves_them(self):
        model = Moving()
        before = snapshot(model)
        parameters, buffers = state_of(model)
        for _ in range(2):
            y, buffers = sn.functional_call(model, (parameters, buffers), X)
        assert_close(y, 2 * batch_norm(X, model.norm.weight, model.norm.bias), "output")
        assert (buffers["calls"].item(), buffers["scale"].item()) == (2, 2.0)
        assert_buffers(buffers, stats(X), stats(X), prefix="norm.")
        assert_untouched(model, before)

    def test_several_forwards_of_one_layer_in_one_call(self):
        model = Moving()
        before = snapshot(model)
        parameters, buffers = state_of(model)
        y, buffers = sn.functional_call(model, (parameters, buffers), (X,), {"times": 3})
        value, seen = wide(X), []
        for _ in range(3):
            seen.append(stats(value))
            value = 2 * batch_norm(value, model.norm.weight, model.norm.bias)
        assert_close(y, value, "output")
        assert_buffers(buffers, *seen, prefix="norm.")
        assert_untouched(model, before)

    def test_those_that_are_missing_are_the_modules_own(self):
        layer = layer_of()
        layer(3 * X)
        before = snapshot(layer)
        _, buffers = sn.functional_call(layer, state_of(layer)[0], X)
        assert_buffers(buffers, stats(3 * X), stats(X))
        _, buffers = sn.functional_call(layer, {"running_mean": torch.full((2,), 10.0).double()}, X)
        assert_close(buffers["running_mean"], 9 + 0.1 * stats(X).mean, "statistic")
        assert_untouched(layer, before)

    def test_in_evaluation_they_come_back_as_they_were(self):
        layer = layer_of().eval()
        parameters, buffers = state_of(layer)
        _, found = sn.functional_call(layer, (parameters, buffers), X)
        assert all(found[name] is t for name, t in buffers.items())

    def test_each_domain_has_its_own(self):
        layer = layer_of(domains=("photo", "sketch"))
        before = snapshot(layer)
        parameters, buffers = state_of(layer)
        with sn.domain(layer, "sketch"):
            _, buffers = sn.functional_call(layer, (parameters, buffers), X)
        assert_close(buffers["running_mean_sketch"], 0.1 * stats(X).mean, "statistic")
        assert buffers["running_mean"].tolist() == [0, 0]
        assert_untouched(layer, before)

    def test_a_forward_that_fails_leaves_the_module_as_it_was(self):
        layer = layer_of()
        before = snapshot(layer)
        with pytest.raises(ValueError, match="channels"):
            sn.functional_call(layer, state_of(layer), rand(4, 3))
        assert_untouched(layer, before)
        layer(X)
        assert_buffers(dict(layer.named_buffers()), stats(X))

    @pytest.mark.parametrize("context", [sn.no_commit, sn.accumulate])
    def test_a_context_around_changes_nothing_in_what_is_returned(self, context):
        layer = layer_of()
        before = snapshot(layer)
        with context(layer):
            _, buffers = sn.functional_call(layer, state_of(layer), X)
        assert_buffers(buffers, stats(X))
        assert_untouched(layer, before)

    def test_a_model_without_batch_norm_is_torchs(self):
        model = nn.Linear(2, 1)
        y, buffers = sn.functional_call(model, dict(model.named_parameters()), X.float())
        assert torch.equal(y, model(X.float()))
        assert buffers == {}


class TestTorchsOwnCall:
    """A layer under plain torch.func: its own buffers are written once; those that are arguments, as arguments."""

    @pytest.mark.parametrize(
        "transform",
        [grad, lambda f: jacrev(f), lambda f: jacfwd(f), lambda f: vjp(f, X)[1](torch.ones(()).double()),
         lambda f: jvp(f, (X,), (UPSTREAM,)), hessian],
        ids=["grad", "jacrev", "jacfwd", "vjp", "jvp", "hessian"],
    )  # fmt: skip
    def test_a_closure_commits_to_the_module_once(self, transform):
        layer = layer_of()
        made = transform(lambda x: (layer(x) * UPSTREAM).sum())
        if callable(made):
            made(X)
        assert type(layer.running_mean) is Tensor
        assert_buffers(dict(layer.named_buffers()), stats(X))

    def test_buffers_that_are_arguments_of_the_transform(self):
        layer = layer_of()
        before = snapshot(layer)
        parameters, buffers = state_of(layer)
        buffers = {name: t.clone() for name, t in buffers.items()}

        def loss(parameters, buffers):
            return (torch.func.functional_call(layer, (parameters, buffers), X) * UPSTREAM).sum()

        found = grad(loss)(parameters, buffers)
        up = wide(UPSTREAM)
        expected = central_differences(lambda g: (batch_norm(X, g, layer.bias) * up).sum(), layer.weight)
        assert_close(found["weight"], expected, "gradient")
        assert_buffers(buffers, stats(X))  # written in place, as torch's call does
        assert_untouched(layer, before)

    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_a_batched_buffer_is_written_in_each_of_its_slices(self, momentum):
        layer = layer_of(momentum=momentum)
        parameters, buffers = state_of(layer)
        stacked = {name: torch.stack([t, t]) for name, t in buffers.items()}

        def forward(buffers, x: Tensor) -> Tensor:
            return torch.func.functional_call(layer, (parameters, buffers), x)

        xs = torch.stack([X, 3 * X])
        vmap(forward)(stacked, xs)
        vmap(forward, in_dims=(0, None))(stacked, X)  # the same data for all
        for i, x in enumerate(xs):
            found = {name: t[i] for name, t in stacked.items()}
            if momentum is None:
                assert_close(found["running_mean"], (stats(x).mean + stats(X).mean) / 2, "statistic")
            else:
                assert_buffers(found, stats(x), stats(X))

    def test_an_ensemble_by_torchs_call(self):
        models = [network() for _ in range(2)]
        nn.init.trunc_normal_(models[1][0].weight, generator=torch.Generator().manual_seed(1))
        parameters, buffers = stack_module_state(models)
        x = rand(6, 3)

        def loss(parameters, buffers) -> Tensor:
            return torch.func.functional_call(models[0], (parameters, buffers), (x,)).square().mean()

        found = vmap(grad(loss))(parameters, buffers)
        for i, model in enumerate(models):
            shown = stats(wide(x) @ wide(model[0].weight).T + wide(model[0].bias))
            assert_buffers({name: t[i] for name, t in buffers.items()}, shown, prefix="1.")
            model(x).square().mean().backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(found[name][i], p.grad, rtol=1e-10, atol=1e-10)

    def test_vmap_over_a_layer_says_what_to_do_and_no_commit_does_it(self):
        layer = layer_of()
        before = snapshot(layer)
        xs = torch.stack([X, 3 * X])
        with pytest.raises(TransformError, match=r"BatchNorm1d.*vmap.*functional_call.*no_commit"):
            vmap(layer)(xs)
        with pytest.raises(TransformError), sn.accumulate(layer):
            vmap(layer)(xs)
        with sn.no_commit(layer):
            y = vmap(layer)(xs)
        for one, x in zip(y, xs, strict=True):
            assert_close(one, batch_norm(x, layer.weight, layer.bias), "output")
        assert_untouched(layer, before)

    def test_accumulate_under_grad(self):
        layer, parts = layer_of(), (X, 3 * X + 1)
        with sn.accumulate(layer):
            for part in parts:
                grad(lambda x: (layer(x) * UPSTREAM).sum())(part)
        assert_buffers(dict(layer.named_buffers()), stats(torch.cat(parts)))

    def test_a_bad_batch_is_rejected_under_grad(self):
        layer, x = layer_of(), X.clone()
        x[0, 0] = NAN
        with pytest.warns(RejectedBatchWarning):
            grad(lambda x: layer(x).sum())(x)
        assert layer.rejected_batches == 1
        assert layer.running_var.tolist() == [1, 1]

    def test_compiled(self):
        layer, up = layer_of(), wide(UPSTREAM)
        torch._dynamo.reset()
        step = torch.compile(grad(lambda x: (layer(x) * UPSTREAM).sum()), backend="aot_eager", fullgraph=True)
        for _ in range(2):
            expected = central_differences(lambda v: (batch_norm(v, layer.weight, layer.bias) * up).sum(), X)
            assert_close(step(X), expected, "gradient")
        assert_buffers(dict(layer.named_buffers()), stats(X), stats(X))


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


def call_on_a_rank(rank, group, parts, masks):
    layer = sn.BatchNorm1d(3, process_group=group, dtype=torch.float64)
    tensors = (dict(layer.named_parameters()), dict(layer.named_buffers()))
    y, buffers = sn.functional_call(layer, tensors, parts[rank], {"mask": None if masks is None else masks[rank]})
    return y.detach(), buffers["running_mean"], buffers["running_var"], layer.num_batches_tracked.item()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("masked", [False, True])
def test_over_ranks_the_buffers_returned_are_those_of_the_whole_batch(masked):
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False, True]) if masked else None
    masks = mask.split([5, 2]) if masked else None
    results = ranks.run(call_on_a_rank, 2, x.split([5, 2]), masks)
    whole = stats(x, weight=mask)
    assert_close(torch.cat([y for y, *_ in results]), batch_norm(x, mask=mask), "output")
    for _, mean, variance, written in results:
        assert_close(mean, 0.1 * whole.mean, "statistic")
        assert_close(variance, 0.9 + 0.1 * whole.unbiased, "variance")
        assert written == 0
