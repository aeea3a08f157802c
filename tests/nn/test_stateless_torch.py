"""Layers under torch.func without steadynorm's call: what is written to them, and what is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning, TransformError
from support import assert_close, batch_norm, central_differences, stats, wide
from support_stateless import (
    NAN,
    UPSTREAM,
    X,
    assert_buffers,
    assert_untouched,
    layer_of,
    network,
    rand,
    snapshot,
    state_of,
)


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
