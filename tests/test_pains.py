"""What users of batch norm suffer from, one test for each: it fails with torch.nn's layer and passes with ours.

The failure is asserted as well (a strict xfail with the exception it must be), so that the day torch.nn is cured shows.
The expectations are computed in float64 from the definition.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ranks
import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning, StaleStatisticsWarning
from support import assert_close, batch_norm, stats

pytestmark = pytest.mark.xdist_group("ranks")

LAYERS = {"steadynorm": sn.BatchNorm1d, "torch.nn": nn.BatchNorm1d}


def pain(failure: type[BaseException], why: str):
    """Runs a test with both layers; with torch.nn's it must fail, and with this exception."""
    cannot = pytest.mark.xfail(raises=failure, strict=True, reason=f"torch.nn: {why}")
    return pytest.mark.parametrize("library", ["steadynorm", pytest.param("torch.nn", marks=cannot)])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 + 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both(layer: nn.BatchNorm1d) -> list[Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return [layer.running_mean.clone(), layer.running_var.clone()]


@pain(AssertionError, "eval() is undone by the next train() of the model around it")
def test_pain_02_freezing_is_undone_by_train(library):
    model = nn.Sequential(nn.Linear(3, 4), LAYERS[library](4))
    before = both(model[1])
    if library == "steadynorm":
        sn.freeze_(model)
    else:
        model[1].eval().requires_grad_(False)
    for epoch in range(2):
        model.train().requires_grad_(True)
        model(draw(8, 3, seed=epoch)).square().mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, both(model[1]), strict=True))
    assert model[1].weight.grad is None


@pain(ValueError, "a batch of one is refused, whatever one would rather have")
def test_pain_03_the_last_batch_of_one_crashes(library):
    layer = sn.BatchNorm1d(3, single_value="running") if library == "steadynorm" else nn.BatchNorm1d(3)
    data = draw(5, 3)
    for batch in data.split(4):
        y = layer(batch)
    remembered = both(layer)
    expected = (data[4:].double() - remembered[0].double()) / (remembered[1].double() + 1e-5).sqrt()
    assert_close(y, expected, "output")


@pain(AssertionError, "there is no mask, and padding counts like data")
def test_pain_04_padding_pollutes_the_statistics(library):
    lengths = torch.tensor([5, 2, 3])
    valid = torch.arange(5) < lengths[:, None]
    x = torch.where(valid[:, None], draw(3, 4, 5), 0.0)
    layer = LAYERS[library](4, momentum=1.0)
    y = layer(x, mask=valid) if library == "steadynorm" else layer(x)
    assert_close(layer.running_mean, stats(x, weight=valid).mean, "statistic")
    assert_close(layer.running_var, stats(x, weight=valid).unbiased, "variance")
    assert_close(torch.where(valid[:, None], y, 0), batch_norm(x, mask=valid), "output")


@pain(AssertionError, "the recomputation commits as well")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_pain_05_activation_checkpointing_commits_twice(library, use_reentrant):
    x = draw(6, 3).requires_grad_()
    layer = LAYERS[library](3)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().mean().backward()
    assert layer.num_batches_tracked.item() == 1
    assert_close(layer.running_mean, 0.1 * stats(x).mean, "statistic")
    assert_close(layer.running_var, 0.9 + 0.1 * stats(x).unbiased, "variance")


@pain(AssertionError, "one infinite value stays in the running statistics for good")
@pytest.mark.filterwarnings("ignore::steadynorm.errors.RejectedBatchWarning")
def test_pain_06_one_bad_batch_poisons_the_running_statistics(library):
    layer, good, bad = LAYERS[library](3), draw(6, 3), draw(6, 3)
    bad[0, 0] = float("inf")
    for batch in (good, bad, *[good] * 200):
        layer(batch)
    share = 1 - 0.9**201
    assert_close(layer.running_mean, share * stats(good).mean, "statistic")
    assert_close(layer.running_var, (1 - share) + share * stats(good).unbiased, "statistic")


def _train_on_ranks(rank: int, group, library: str) -> list[Tensor]:
    x = draw(6, 3)[[slice(0, 4), slice(4, 6)][rank]]
    layer = LAYERS[library](3, momentum=1.0)
    if library == "steadynorm":
        sn.sync_(layer, group)
    layer(x)
    return both(layer)


@pain(AssertionError, "each rank remembers its own batches")
def test_pain_07_ranks_disagree_about_their_buffers(library):
    whole = stats(draw(6, 3))
    for mean, variance in ranks.run(_train_on_ranks, 2, library):
        assert_close(mean, whole.mean, "statistic")
        assert_close(variance, whole.unbiased, "variance")


def _sync_on_the_cpu(rank: int, group, library: str) -> Tensor | str:
    torch._dynamo.reset()
    model = nn.Sequential(LAYERS[library](3))
    if library == "steadynorm":
        sn.sync_(model, group)
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        return compiled(draw(6, 3)[[slice(0, 4), slice(4, 6)][rank]]).detach()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pain(AssertionError, "SyncBatchNorm wants CUDA, and a graph break")
def test_pain_08_sync_refuses_gloo_and_the_compiler(library):
    found = ranks.run(_sync_on_the_cpu, 2, library)
    assert all(isinstance(y, Tensor) for y in found), found
    assert_close(torch.cat(found), batch_norm(draw(6, 3)), "output")


class Mine(nn.BatchNorm1d):
    """A subclass of torch.nn's layer, as users write them."""


class MineToo(sn.BatchNorm1d):
    """A subclass of ours."""


@pain(AssertionError, "convert_sync_batchnorm builds layers of its own")
def test_pain_08_sync_drops_the_subclass_and_has_no_way_back(library):
    kind = MineToo if library == "steadynorm" else Mine
    model = nn.Sequential(kind(3))
    if library == "steadynorm":
        sn.sync_(model)
        assert model[0].process_group == "world"
        sn.sync_(model, None)
        assert model[0].process_group is None
    else:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0]) is kind


@pain(AssertionError, "every micro-batch is committed, and its variance lacks what lies between them")
def test_pain_09_gradient_accumulation_is_not_a_large_batch(library):
    layer, x = LAYERS[library](3), torch.cat([draw(2, 3), draw(4, 3, seed=1) + 10])
    if library == "steadynorm":
        with sn.accumulate(layer):
            for part in x.split([2, 4]):
                layer(part)
    else:
        for part in x.split([2, 4]):
            layer(part)
    assert layer.num_batches_tracked.item() == 1
    assert_close(layer.running_mean, 0.1 * stats(x).mean, "statistic")
    assert_close(layer.running_var, 0.9 + 0.1 * stats(x).unbiased, "variance")


@pain(RuntimeError, "vmap would write one buffer for all")
def test_pain_10_torch_func_fails_in_train_mode(library):
    layer, x = LAYERS[library](3), draw(4, 6, 3)
    buffers = dict(layer.named_buffers())
    if library == "steadynorm":
        y, new = torch.func.vmap(lambda x: sn.functional_call(layer, buffers, x))(x)
        for one, mean in zip(x, new["running_mean"], strict=True):
            assert_close(mean, 0.1 * stats(one).mean, "statistic")
    else:
        y = torch.func.vmap(lambda x: torch.func.functional_call(layer, buffers, x))(x)
    for one, normalised in zip(x, y, strict=True):
        assert_close(normalised, batch_norm(one), "output")


@pain(pytest.fail.Exception, "nothing is said")
def test_pain_11_averaged_weights_meet_stale_buffers(library):
    model = nn.Sequential(nn.Linear(3, 4), LAYERS[library](4))
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for step in range(10):
            model(draw(8, 3, seed=step))
            for p in model.parameters():
                p.add_(0.1)
            for average, p in zip(ema.parameters(), model.parameters(), strict=True):
                average.lerp_(p, 0.1)
    with pytest.warns(StaleStatisticsWarning, match="average_"), torch.no_grad():
        ema.eval()(draw(8, 3))


@pain(TypeError, "none of them is there")
@pytest.mark.parametrize("what", ["ghost", "renorm", "domains", "weights"])
def test_pain_14_no_ghost_no_renorm_no_domains_no_weights(library, what):
    x = draw(6, 3)
    options = {
        "ghost": {"ghost_batch_size": 3},
        "renorm": {"renorm": sn.Renorm(warmup=0, ramp=0)},
        "domains": {"domains": ("photo", "sketch")},
        "weights": {},
    }[what]
    layer = LAYERS[library](3, momentum=1.0, **options)
    match what:
        case "ghost":
            y = layer(x)
            for part, normalised in zip(x.split(3), y.split(3), strict=True):
                assert_close(normalised, batch_norm(part), "output")
            assert_close(layer.running_var, stats(x).unbiased, "variance")
        case "renorm":  # within the limits, what training computes is what evaluation does
            layer.num_batches_tracked += 1
            y = layer(x / 4)
            assert_close(y, x.double() / 4 / (1 + 1e-5) ** 0.5, "output")
        case "domains":
            with sn.domain(layer, "sketch"):
                layer(x)
            assert_close(layer.running("sketch").mean, stats(x).mean, "statistic")
            assert layer.running("photo").mean.tolist() == [0, 0, 0]
        case "weights":
            weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0])
            y = layer(x, sample_weight=weight)
            assert_close(y, batch_norm(x, sample_weight=weight), "output")
            assert_close(layer.running_var, stats(x, weight=weight).unbiased, "variance")


def test_the_warning_of_pain_06_is_there():
    with pytest.warns(RejectedBatchWarning):
        sn.BatchNorm1d(1)(torch.tensor([[1.0], [float("nan")]]))
