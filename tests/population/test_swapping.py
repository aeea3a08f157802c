"""Population statistics, layer after layer, against float64 from the definition; losses by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.nn.watched import bn_layers
from steadynorm.population.examples import read_batches
from steadynorm.population.gap import Difference
from steadynorm.population.swapping import Losses, Swapper, left_alone
from support_diagnosis import batches, digits, trained


def test_population_statistics_are_those_of_the_whole_data_in_float64():
    from support_diagnosis import mlp

    model, (x, y) = trained(mlp, 3), digits()
    layers = bn_layers(model)
    uneven = [(a, b) for a, b in zip(x[:500].split([64, 7, 200, 229]), y[:500].split([64, 7, 200, 229]), strict=True)]
    kept = read_batches(uneven, model, 4096).kept
    with left_alone(model):
        found = Swapper(model, layers, None, None).population(kept)
    net = [m.double() for m in trained(mlp, 3)]
    h = x[:500].double().flatten(1)
    for i in (1, 4):
        h = h @ net[i].weight.T
        mean, var = found[str(i + 1)]
        np.testing.assert_allclose(mean, h.mean(0).detach(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(var, h.var(0).detach(), rtol=1e-5)
        h = (h - h.mean(0)) / (h.var(0) + 1e-5).sqrt() * net[i + 1].weight + net[i + 1].bias
        h = h.relu()
    logits = h @ net[7].weight.T + net[7].bias
    by_hand = -torch.log_softmax(logits, 1)[torch.arange(500), y[:500]].detach().numpy()
    with left_alone(model):
        losses = Swapper(model, layers, None, None).losses(kept, found)
    np.testing.assert_allclose(losses.loss, by_hand, rtol=1e-3, atol=1e-5)
    assert losses.mean == pytest.approx(by_hand.mean(), rel=1e-4)
    assert losses.accuracy == pytest.approx((logits.argmax(1) == y[:500]).double().mean().item())


def test_a_paired_difference_in_standard_errors():
    rng = np.random.default_rng(0)
    better, ones = rng.random(400), np.ones(400)
    gap = rng.normal(0.1, 0.3, 400)
    found = Difference.between(Losses(better + gap, ones, None), Losses(better, ones, None))
    assert found.loss == pytest.approx(gap.mean())
    assert found.deviations == pytest.approx(gap.mean() / (gap.std(ddof=1) / 20), rel=1e-6)
    assert found.material
    noise = gap - gap.mean()
    assert not Difference.between(Losses(better + noise, ones, None), Losses(better, ones, None)).material
    broken = Difference.between(Losses(better * np.nan, ones, None), Losses(better, ones, None))
    assert broken.material
    assert broken.loss == float("inf")
    one = Difference.between(Losses(better[:1] + 1, ones[:1], None), Losses(better[:1], ones[:1], None))
    assert not one.material


def test_a_loss_that_is_a_mean_weighs_its_batch():
    model, (x, y) = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), digits()
    uneven = list(zip(x[:60].split([50, 10]), y[:60].split([50, 10]), strict=True))
    found = sn.diagnose(model, uneven, loss=nn.functional.cross_entropy)
    whole = nn.functional.cross_entropy(model.eval()(x[:60]), y[:60]).item()
    assert found.figures["loss_running"] == pytest.approx(whole, rel=1e-5)


def test_segmentation_losses_are_of_examples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    data = [(torch.randn(8, 1, 5, 5), torch.randint(0, 4, (8, 5, 5))) for _ in range(4)]
    found = sn.diagnose(model, data)
    assert found.figures["examples"] == 32
    assert 0 < found.figures["accuracy_running"] < 1


def test_everything_comes_back_after_an_interrupt():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)).train()
    before = [t.clone() for t in model.buffers()]

    def forward(batch: torch.Tensor) -> torch.Tensor:
        model[0].train()
        model(batch + torch.rand(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sn.diagnose(model, [torch.randn(4, 3)], forward=forward)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert all(module.training for module in model.modules())


def test_batches_of_several_forms_and_their_random_order():
    x, y = digits()
    model = nn.BatchNorm1d(2)
    pairs = read_batches(batches(x[:128], y[:128]), model, 4096)
    mixed = pairs.shuffled()
    assert [b.size for b in mixed] == [64, 64]
    found = torch.cat([b.x for b in mixed])
    assert not torch.equal(found, x[:128])
    where = [(x[:128] == row).flatten(1).all(1).nonzero()[0, 0] for row in found]
    assert torch.equal(torch.cat([b.y for b in mixed]), y[:128][torch.stack(where)])
    assert [b.y for b in read_batches([x[:8]], model, 100).shuffled()] == [None]
    assert read_batches([{"a": x[:8], "b": y[:8]}], model, 100).shuffled() is None
    assert len(read_batches(batches(x, y), model, 100).kept) == 2
    assert read_batches(x[:8], model, 100).examples == 8
