"""Activation checkpointing in all its kinds: one commit for each forward, and the gradients of no checkpoint at all.

The running statistics are compared with the definition's, computed layer by layer; gradients with those of the same
model without a checkpoint, to the last bit: the second forward must normalise by what the first one did.
"""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import ranks
import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning
from support import assert_close, batch_norm, stats, wide
from support_checkpoint import (
    MODES,
    OPTIONS,
    RENORM,
    UPSTREAM,
    X,
    _everything,
    _nothing,
    assert_as_without,
    assert_committed_once,
    block,
    train,
)

# torch says so of a checkpoint inside of a reentrant one, whose first forward builds no graph.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

MASK = torch.tensor([True, True, False, True, True, False, True, True])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
            # (None and zeros are the same derivative.)
            both = zip((*first, *second), inputs * 2, strict=True)
            found.append([torch.zeros_like(i) if t is None else t for t, i in both])
            assert model[1].num_batches_tracked.item() == 1
        # A selective checkpoint sees the step as one op, whose second derivative takes another way: equal to rounding.
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

    def test_backward_twice_through_one_forward(self):
        model, x = block(renorm=RENORM), X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=False)
        first = grad(y, x, UPSTREAM, retain_graph=True)[0]
        second = grad(y, x, UPSTREAM)[0]
        assert torch.equal(first, second)
        assert model[1].num_batches_tracked.item() == 1


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
