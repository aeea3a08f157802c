"""The buffers that `functional_call` takes and returns: from step to step, of other modules, over ranks."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, stack_module_state, vmap

import ranks
import steadynorm as sn
from support import Stats, assert_close, batch_norm, stats, wide
from support_stateless import X, assert_buffers, assert_untouched, layer_of, network, rand, snapshot, state_of


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
