"""Activation checkpointing in all its kinds: one commit for each forward, and the gradients of no checkpoint at all.

The running statistics are compared with the definition's, computed layer by layer; gradients with those of the same
model without a checkpoint, to the last bit: the second forward must normalise by what the first one did.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import grad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import ranks
import steadynorm as sn
from steadynorm.errors import RecomputationError, RejectedBatchWarning, SteadynormWarning
from steadynorm.nn import correcting
from support import Array, Stats, assert_close, batch_norm, central_differences, stats, wide

# torch says so of a checkpoint inside of a reentrant one, whose first forward builds no graph.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

X, UPSTREAM = (torch.randn(8, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) + s for s in (1, 2))
MASK = torch.tensor([True, True, False, True, True, False, True, True])
RENORM = sn.Renorm(r_max=2.0, d_max=1.0, warmup=0, ramp=0)
Run = Callable[[nn.Module, Tensor], Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def block(**options) -> nn.Sequential:
    """Linear, BN, tanh, Linear, BN, with the same numbers at every call."""
    norms = [sn.BatchNorm1d(3, dtype=torch.float64, **options) for _ in range(2)]
    linears = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]
    model = nn.Sequential(linears[0], norms[0], nn.Tanh(), linears[1], norms[1])
    for seed, parameter in enumerate(model.parameters()):
        nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return model


def measured(model: nn.Sequential, x: Tensor) -> list[Stats]:
    """What the two layers of `block` measure, from the definition."""

    def linear(layer: nn.Linear, value: Array) -> Array:
        return value @ wide(layer.weight).T + wide(layer.bias)

    first = linear(model[0], wide(x))
    hidden = np.tanh(batch_norm(first, model[1].weight, model[1].bias))
    return [stats(first), stats(linear(model[3], hidden))]


def assert_committed_once(model: nn.Sequential, *batches: Tensor) -> None:
    """Both layers remember each of the batches once, in this order, and nothing else."""
    seen = [measured(model, x) for x in batches]
    for layer, each in zip((model[1], model[4]), zip(*seen, strict=True), strict=True):
        mean, variance = np.zeros(3), np.ones(3)
        for one in each:
            mean, variance = 0.9 * mean + 0.1 * one.mean, 0.9 * variance + 0.1 * one.unbiased
        assert_close(layer.running_mean, mean, "statistic")
        assert_close(layer.running_var, variance, "variance")
        assert layer.num_batches_tracked.item() == len(batches)


def assert_as_without(model: nn.Module, plain: nn.Module) -> None:
    """Buffers and gradients are to the last bit those of the model that ran without a checkpoint."""
    for (name, found), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, wanted), name
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None), name
        assert wanted.grad is None or torch.equal(found.grad, wanted.grad), name


def _everything(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def _matmuls(context, op, *args, **kwargs) -> CheckpointPolicy:
    wanted = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def _nothing(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: nn.Module, x: Tensor, policy: Callable) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


def nested(model: nn.Module, x: Tensor, outer: bool, inner: bool) -> Tensor:
    """A checkpoint of checkpoints: the innermost part runs three times."""

    def deepest(x: Tensor) -> Tensor:
        return checkpoint(model[1], x, use_reentrant=inner)

    def middle(x: Tensor) -> Tensor:
        return model[4](model[3](checkpoint(lambda x: model[2](deepest(model[0](x))), x, use_reentrant=inner)))

    return checkpoint(middle, x, use_reentrant=outer)


MODES: dict[str, Run] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "nested": partial(nested, outer=False, inner=False),
    "nested reentrant": partial(nested, outer=True, inner=True),
    "nested mixed": partial(nested, outer=False, inner=True),
    "selective, all saved": partial(selective, policy=_everything),
    "selective, matmuls saved": partial(selective, policy=_matmuls),
    "selective, none saved": partial(selective, policy=_nothing),
    "sequential": lambda model, x: checkpoint_sequential(model, 3, x, use_reentrant=False),
}
OPTIONS = {
    "plain": {},
    "ghost": {"ghost_batch_size": 3},  # chunks of 3, 3 and 2
    "renorm": {"renorm": RENORM},
    "cumulative": {"momentum": None},
    "renorm of ghosts": {"renorm": RENORM, "ghost_batch_size": 4, "activation": "relu"},
}


def train(model: nn.Module, run: Run, steps: int = 3) -> list[Tensor]:
    """The gradients of x in a few steps, from the second on with running statistics that have been moved."""
    found = []
    for step in range(steps):
        x = (X * (step + 1)).requires_grad_()
        run(model, x).backward(UPSTREAM)
        found.append(x.grad)
    return found


class TestEveryKind:
    @pytest.mark.parametrize("mode", MODES)
    def test_each_forward_is_committed_once(self, mode):
        model = block()
        train(model, MODES[mode])
        assert_committed_once(model, X, 2 * X, 3 * X)

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize("mode", MODES)
    def test_is_to_the_last_bit_what_no_checkpoint_is(self, mode, options):
        model, plain = block(**OPTIONS[options]), block(**OPTIONS[options])
        found, wanted = train(model, MODES[mode]), train(plain, lambda model, x: model(x))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert_as_without(model, plain)

    @pytest.mark.parametrize("mode", MODES)
    def test_each_domain_remembers_its_own(self, mode):
        model, plain = (block(domains=("photo", "sketch"), domain_affine=True) for _ in range(2))
        for one, run in ((model, MODES[mode]), (plain, lambda model, x: model(x))):
            for name, scale in (("sketch", 1), ("photo", 2), ("sketch", 3)):
                with sn.domain(one, name):
                    run(one, (X * scale).requires_grad_()).backward(UPSTREAM)
        assert_as_without(model, plain)
        assert [model[1].running(name).num_batches_tracked.item() for name in ("photo", "sketch")] == [1, 2]

    @pytest.mark.parametrize("mode", MODES)
    def test_several_forwards_before_any_backward(self, mode):
        model, plain = block(renorm=RENORM), block(renorm=RENORM)
        for one, run in ((model, MODES[mode]), (plain, lambda model, x: model(x))):
            outputs = [run(one, (X * scale).requires_grad_()) for scale in (1, 2, 3)]
            for y in reversed(outputs):
                y.backward(UPSTREAM)
        assert_as_without(model, plain)
        assert model[1].num_batches_tracked.item() == 3

    @pytest.mark.parametrize("mode", MODES)
    def test_a_bad_batch_is_counted_once(self, mode):
        model, x = block(), X.clone()
        x[2, 1] = float("inf")
        with pytest.warns(RejectedBatchWarning):  # noqa: PT031 (a selective one warns when the count is read)
            MODES[mode](model, x.requires_grad_()).backward(UPSTREAM)
            assert [model[i].rejected_batches for i in (1, 4)] == [1, 1]
        train(model, MODES[mode], steps=1)
        assert_committed_once(model, X)


class Masked(nn.Module):
    """A model whose layer is handed a mask and weights from outside of the checkpoint."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.norm = sn.BatchNorm1d(3, dtype=torch.float64, **options)

    def forward(self, x: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        return self.norm(x, mask=mask, sample_weight=weight)


@pytest.mark.parametrize(
    ("use_reentrant", "policy"), [(True, None), (False, None), (False, _everything), (False, _nothing)]
)
def test_with_a_mask_and_weights(use_reentrant, policy):
    extra = {"context_fn": partial(create_selective_checkpoint_contexts, policy)} if policy else {}
    model, weight = Masked(), torch.arange(1.0, 9.0, dtype=torch.float64)
    x = torch.where(MASK[:, None], X, torch.nan).requires_grad_()
    y = checkpoint(model, x, MASK, weight, use_reentrant=use_reentrant, **extra)
    y.backward(UPSTREAM)
    assert_close(y, batch_norm(x, mask=MASK, sample_weight=weight), "output")
    expected = stats(x, weight=MASK * weight)
    assert_close(model.norm.running_mean, 0.1 * expected.mean, "statistic")
    assert_close(model.norm.running_var, 0.9 + 0.1 * expected.unbiased, "variance")
    assert model.norm.num_batches_tracked.item() == 1
    assert not x.grad[~MASK].any()


class TestSharedLayer:
    """One layer several times in one model: each of its forwards is one commit."""

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("whole", [True, False], ids=["one checkpoint", "a checkpoint each"])
    def test_in_order(self, use_reentrant, whole):
        norm = sn.BatchNorm1d(3, dtype=torch.float64)
        model, x = nn.Sequential(norm, nn.Tanh(), norm, nn.Softplus(), norm), X.clone().requires_grad_()
        if whole:
            y = checkpoint(model, x, use_reentrant=use_reentrant)
        else:
            y = x
            for part in model:
                y = checkpoint(part, y, use_reentrant=use_reentrant)
        y.backward(UPSTREAM)
        mean, variance, value = np.zeros(3), np.ones(3), wide(X)
        for activation in (np.tanh, lambda z: np.log1p(np.exp(z)), None):
            one, value = stats(value), batch_norm(value)
            mean, variance = 0.9 * mean + 0.1 * one.mean, 0.9 * variance + 0.1 * one.unbiased
            value = value if activation is None else activation(value)
        assert_close(y, value, "output")
        assert_close(norm.running_mean, mean, "statistic")
        assert_close(norm.running_var, variance, "variance")
        assert norm.num_batches_tracked.item() == 3

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_only_some_forwards_are_checkpointed(self, use_reentrant):
        model, x = block(), X.clone().requires_grad_()
        first = model(x)
        second = checkpoint(model, 2 * x, use_reentrant=use_reentrant)
        with torch.no_grad():
            model(3 * x)  # no backward ever: a commit all the same
        (first + second).backward(UPSTREAM)
        assert_committed_once(model, X, 2 * X, 3 * X)


class TestContexts:
    """no_commit and accumulate around a checkpoint, with the backward inside of the block or after it, and within."""

    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_no_commit_around(self, mode, backward_inside):
        model, plain = block(renorm=RENORM), block(renorm=RENORM)
        x, same = X.clone().requires_grad_(), X.clone().requires_grad_()
        with sn.no_commit(model):
            y = MODES[mode](model, x)
            if backward_inside:
                y.backward(UPSTREAM)
        if not backward_inside:
            y.backward(UPSTREAM)
        with sn.no_commit(plain):
            plain(same).backward(UPSTREAM)
        assert_as_without(model, plain)
        assert torch.equal(x.grad, same.grad)
        assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [0, 0]

    @pytest.mark.parametrize("backward_inside", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_accumulate_around(self, mode, backward_inside):
        model = block()
        with sn.accumulate(model):
            outputs = []
            for scale in (1, 2):
                outputs.append(MODES[mode](model, (X * scale).requires_grad_()))
                if backward_inside:
                    outputs[-1].backward(UPSTREAM)
        if not backward_inside:
            sum(outputs).backward(UPSTREAM)
        each = [measured(model, X), measured(model, 2 * X)]
        for layer, parts in zip((model[1], model[4]), zip(*each, strict=True), strict=True):
            count = sum(part.count for part in parts)
            mean = sum(part.count * part.mean for part in parts) / count
            m2 = sum(part.m2 + part.count * (part.mean - mean) ** 2 for part in parts)  # the law of total variance
            assert_close(layer.running_mean, 0.1 * mean, "statistic")
            assert_close(layer.running_var, 0.9 + 0.1 * m2 / (count - 1), "variance")
            assert layer.num_batches_tracked.item() == 1

    @pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "selective, none saved"])
    @pytest.mark.parametrize("early_stop", [True, False])
    @pytest.mark.parametrize("context", [sn.no_commit, sn.accumulate, nullcontext])
    def test_within_even_where_the_second_forward_is_cut_short(self, mode, early_stop, context):
        model = block()

        class Inside(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                with context(model):
                    return model(x)  # non-reentrant: left by an exception once all that backward needs is there

        with set_checkpoint_early_stop(early_stop):
            MODES[mode](Inside(), X.clone().requires_grad_()).backward(UPSTREAM)
        if context is sn.no_commit:
            assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [0, 0]
        else:
            assert_committed_once(model, X)
        model(2 * X)  # and the layers commit again
        assert [model[i].num_batches_tracked.item() for i in (1, 4)] == [1 if context is sn.no_commit else 2] * 2


class TestDerivatives:
    # torch: neither a reentrant checkpoint nor a selective one that saved something can be differentiated twice
    @pytest.mark.parametrize("mode", ["non-reentrant", "nested", "selective, none saved", "sequential"])
    @pytest.mark.parametrize("options", ["plain", "renorm", "ghost"])
    def test_double_backward(self, mode, options):
        found = []
        for run in (MODES[mode], lambda model, x: model(x)):
            model, x = block(**OPTIONS[options]), X.clone().requires_grad_()
            inputs = (x, *model.parameters())
            first = grad(run(model, x), inputs, UPSTREAM, create_graph=True)
            second = grad([first[0], first[1]], inputs, [rand(8, 3, seed=5), rand(3, 3, seed=6)], allow_unused=True)
            found.append([t for t in (*first, *second) if t is not None])
            assert model[1].num_batches_tracked.item() == 1
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_backward_twice_through_one_forward(self):
        model, x = block(renorm=RENORM), X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False)
        first = grad(y, x, UPSTREAM, retain_graph=True)[0]
        second = grad(y, x, UPSTREAM)[0]
        assert torch.equal(first, second)
        assert model[1].num_batches_tracked.item() == 1


class TestCompiled:
    """Both orders of torch.compile and checkpoint; the compiler may change the order of a sum, so no bits here."""

    @pytest.mark.parametrize("order", ["compiled(checkpoint)", "checkpoint(compiled)"])
    @pytest.mark.parametrize("options", ["plain", "renorm", "ghost"])
    def test_commits_once(self, options, order):
        torch._dynamo.reset()
        model, plain = block(**OPTIONS[options]), block(**OPTIONS[options])
        compile_ = partial(torch.compile, backend="aot_eager", fullgraph=True)
        if order == "compiled(checkpoint)":
            run = compile_(partial(checkpoint, model, use_reentrant=False))
        else:
            run = partial(checkpoint, compile_(model), use_reentrant=False)
        found, wanted = train(model, lambda _, x: run(x)), train(plain, lambda model, x: model(x))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)
        for layer, other in zip((model[1], model[4]), (plain[1], plain[4]), strict=True):
            assert layer.num_batches_tracked.item() == 3
            torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-10, atol=1e-10)
        if options == "plain":
            assert_committed_once(model, X, 2 * X, 3 * X)

    @pytest.mark.slow
    def test_inductor(self):
        torch._dynamo.reset()
        layer, x = sn.BatchNorm1d(3, dtype=torch.float64), X.clone().requires_grad_()
        y = torch.compile(partial(checkpoint, layer, use_reentrant=False), fullgraph=True)(x)
        y.backward(UPSTREAM)
        assert_close(y, batch_norm(X), "output")
        up = UPSTREAM.numpy()
        assert_close(x.grad, central_differences(lambda v: (batch_norm(v) * up).sum(), X), "gradient")
        assert_close(layer.running_mean, 0.1 * stats(X).mean, "statistic")
        assert_close(layer.running_var, 0.9 + 0.1 * stats(X).unbiased, "variance")
        assert layer.num_batches_tracked.item() == 1

    def test_a_selective_one(self):
        torch._dynamo.reset()
        model = block()
        compiled = torch.compile(partial(selective, model, policy=_matmuls), backend="aot_eager", fullgraph=True)
        train(model, lambda _, x: compiled(x))
        assert_committed_once(model, X, 2 * X, 3 * X)


def _synced(rank: int, group, parts: list[Tensor], masks: list[Tensor], use_reentrant: bool | None) -> list[Tensor]:
    """One step with a mask on every rank; use_reentrant None is without a checkpoint."""
    model = sn.sync_(Masked(), group)
    x = parts[rank].clone().requires_grad_()
    weight = torch.ones(len(x), dtype=torch.float64)
    if use_reentrant is None:
        y = model(x, masks[rank], weight)
    else:
        y = checkpoint(model, x, masks[rank], weight, use_reentrant=use_reentrant)
    y.backward(UPSTREAM[: len(x)] + rank)
    norm = model.norm
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked, x.grad, norm.weight.grad]


@pytest.mark.xdist_group("ranks")
def test_over_ranks():
    parts, masks = [X[:5], X[5:] + 10], [MASK[:5], MASK[5:]]
    parts = [torch.where(mask[:, None], part, torch.nan) for part, mask in zip(parts, masks, strict=True)]
    whole = stats(torch.cat(parts), weight=MASK)
    without = ranks.run(_synced, 2, parts, masks, None)
    for use_reentrant in (True, False):
        for found, wanted in zip(ranks.run(_synced, 2, parts, masks, use_reentrant), without, strict=True):
            assert_close(found[0], 0.1 * whole.mean, "statistic")
            assert_close(found[1], 0.9 + 0.1 * whole.unbiased, "variance")
            assert found[2].item() == 1
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, sn.BatchNorm2d], ids=["torch.nn", "steadynorm"])
def test_training_on_digits(kind):
    """20 steps of a small network in float64: with torch.nn alone a checkpoint changes where it ends."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images / 16).reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    ends: dict[str, dict[str, Tensor]] = {}
    for mode in ("without", "reentrant", "non-reentrant"):
        torch.manual_seed(0)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), kind(b), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1), kind(b))
            for a, b in ((1, 6), (6, 8))
        ]
        model = nn.Sequential(*stages, nn.Flatten(), nn.Linear(32, 10)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(20):
            rows = torch.arange(32) + 32 * step
            y = images[rows].requires_grad_()
            for stage in stages:
                y = stage(y) if mode == "without" else checkpoint(stage, y, use_reentrant=mode == "reentrant")
            optimizer.zero_grad()
            nn.functional.cross_entropy(model[3](model[2](y)), labels[rows]).backward()
            optimizer.step()
        ends[mode] = {name: t.clone() for name, t in model.state_dict().items()}
    for mode in ("reentrant", "non-reentrant"):
        differing = {name.split(".")[-1] for name, t in ends[mode].items() if not torch.equal(t, ends["without"][name])}
        ours = kind is sn.BatchNorm2d
        assert differing == (set() if ours else {"running_mean", "running_var", "num_batches_tracked"}), mode


class TestRenormsMemory:
    """The corrections of a forward are found again for the one that is run again, whatever came between."""

    RENORM = sn.Renorm(1.5, 0.5, warmup=0, ramp=0)

    def layer(self, **options) -> sn.BatchNorm1d:
        layer = sn.BatchNorm1d(3, dtype=torch.float64, renorm=self.RENORM, momentum=0.5, **options)
        for name, buffer in layer.named_buffers():
            if name.startswith("num_batches"):
                buffer.fill_(1)
        return layer

    def check(self, step, **options) -> None:
        """`step(forward, layer, x)` returns a loss; its gradient is that of the same step without a checkpoint."""
        found = []
        for again in (False, True):
            layer = self.layer(**options)
            x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

            def forward(value, layer=layer, again=again):
                return checkpoint(layer, value, use_reentrant=False) if again else layer(value)

            loss = step(forward, layer, x)
            if loss is not None:
                loss.backward()
            found.append([x.grad, *(p.grad for p in layer.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)

    def test_the_same_batch_twice(self):
        self.check(lambda forward, layer, x: (forward(x).pow(3) + 2 * forward(x).pow(3)).sum())

    def test_more_chunks_and_forwards_than_one_would_think(self):
        self.check(lambda forward, layer, x: sum(forward(x + i).pow(3).sum() for i in range(70)))
        self.check(
            lambda forward, layer, x: forward(torch.cat([x + i for i in range(30)])).pow(3).sum(), ghost_batch_size=4
        )

    def test_a_look_in_between_that_commits_nothing(self):
        def step(forward, layer, x):
            y = forward(x)
            with sn.no_commit(layer):
                layer(x)
            return y.pow(3).sum()

        self.check(step)

    def test_the_same_batch_in_two_domains(self):
        def step(forward, layer, x):
            with sn.domain(layer, "a"):
                y = forward(x)
            with sn.domain(layer, "b"):
                forward(x)
            with sn.domain(layer, "a"):
                y.pow(3).sum().backward()

        self.check(step, domains=("a", "b"))

    def test_a_graph_that_is_kept_is_run_again_once_more(self):
        layer = self.layer()
        x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False).pow(3).sum()
        first = torch.autograd.grad(y, x, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(y, x)[0], first)

    def test_nothing_is_kept_where_there_is_no_checkpoint(self):
        layer = self.layer()
        for _ in range(3):
            layer(torch.randn(5, 3, dtype=torch.float64).requires_grad_()).sum().backward()
        assert layer._corrector._made == []

    def test_what_was_forgotten_is_an_error_not_a_wrong_number(self, monkeypatch):
        monkeypatch.setattr(correcting, "capacity", lambda channels: 2)
        layer = self.layer()
        x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
        losses = [checkpoint(layer, x + i, use_reentrant=False).pow(3).sum() for i in range(4)]
        with pytest.raises(RecomputationError, match="Run backward earlier"):
            sum(losses).backward()

    @pytest.mark.parametrize("outer", [True, False])
    @pytest.mark.parametrize("inner", [True, False])
    def test_nested_with_the_same_batch_twice(self, outer, inner):
        found = []
        for again in (False, True):
            layer = self.layer()
            x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()

            def block(value, layer=layer, again=again):
                return checkpoint(layer, value, use_reentrant=inner) if again else layer(value)

            y = sum(checkpoint(block, x, use_reentrant=outer) if again else block(x) for _ in range(2))
            y.pow(3).sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)

    def test_a_layer_built_on_meta(self):
        torch._dynamo.reset()
        with torch.device("meta"):
            layer = sn.BatchNorm1d(3, renorm=self.RENORM)
        layer.to_empty(device="cpu").reset_parameters()
        same, x = sn.BatchNorm1d(3, renorm=self.RENORM), torch.randn(6, 3)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert torch.equal(compiled(x), same(x))

    def test_a_reset_forgets_and_so_do_forwards_that_cannot_run_again(self):
        layer = self.layer()
        with torch.no_grad():
            layer(torch.randn(5, 3, dtype=torch.float64))
        assert len(layer._corrector._made) == 1
        layer.reset_running_stats()
        with torch.inference_mode():
            layer(torch.randn(5, 3, dtype=torch.float64))
        assert layer._corrector._made == []

    def test_a_second_forward_that_is_another_is_warned_about(self):
        layer, noise = self.layer(), iter(range(10))
        x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
        y = checkpoint(lambda v: layer(v + next(noise)), x, use_reentrant=False)
        with pytest.warns(SteadynormWarning, match="does not repeat the first one's arithmetic"):
            y.pow(3).sum().backward()

    def test_one_graph_serves_all_layers(self):
        torch._dynamo.reset()
        counter = CompileCounter()
        for _ in range(3):
            torch.compile(self.layer(), backend=counter, fullgraph=True)(torch.randn(5, 3, dtype=torch.float64))
        assert counter.frame_count == 1
