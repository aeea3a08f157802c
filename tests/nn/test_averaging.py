"""average_: weights and statistics against the formulas in extended precision; structure; wrappers; domains."""

import copy
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ranks
import steadynorm as sn
import support
from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn import BatchNorm1d, BatchNorm2d
from steadynorm.nn.averaging import average_
from support import Wide, assert_close, stats, wide

LAYERS = [BatchNorm1d, nn.BatchNorm1d]


def network(layer=BatchNorm1d, **options) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), layer(4, **options), nn.Tanh(), nn.Linear(4, 2))


def disturb(model: nn.Module, seed: int) -> nn.Module:
    """Other values everywhere, as a training step would leave."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 3 + 0.1)
            else:
                tensor.fill_(7 + seed)
    return model


def state(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: wide(tensor) for name, tensor in model.state_dict().items()}


def close(got: torch.Tensor, wanted: np.ndarray) -> None:
    support.assert_close(got, wanted, "statistic")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 0.999, 1.0])
def test_weights_means_and_deviations_are_averaged_and_counts_copied(layer, decay):
    model, ema = disturb(network(layer), 1), disturb(network(layer), 2)
    live, before = state(model), state(ema)
    assert average_(ema, model, decay) is ema
    d = Wide(decay)
    for name, tensor in ema.state_dict().items():
        old, new = before[name], live[name]
        if name.endswith("running_var"):
            close(tensor, (d * np.sqrt(old) + (1 - d) * np.sqrt(new)) ** 2)
        elif name.endswith("num_batches_tracked"):
            assert tensor.item() == 8
        else:
            close(tensor, d * old + (1 - d) * new)
    assert all(np.array_equal(state(model)[name], value) for name, value in live.items()), "the model is only read"


def test_copied_takes_the_models_statistics_as_they_are():
    model, ema = disturb(network(), 1), disturb(network(), 2)
    before = state(ema)
    average_(ema, model, 0.75, statistics="copied")
    assert torch.equal(ema[1].running_mean, model[1].running_mean)
    assert torch.equal(ema[1].running_var, model[1].running_var)
    close(ema[1].weight, 0.75 * before["1.weight"] + 0.25 * wide(model[1].weight))


def test_deviations_of_averaged_weights_are_met_where_units_keep_their_direction():
    """Weights a w and b w of one unit: the average's deviation is the average deviation, its variance is less."""
    x = torch.randn(4096, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(3, 2, bias=False), BatchNorm1d(2, momentum=1.0, dtype=torch.float64)).double()
    ema = copy.deepcopy(net)
    ema(x)
    with torch.no_grad():
        net[0].weight.mul_(5)
    net(x)
    average_(ema, net, 0.5)
    h = support.stats(wide(x) @ wide(ema[0].weight).T)
    support.assert_close(ema[1].running_var, h.unbiased, "variance")
    support.assert_close(ema[1].running_mean, h.mean, "statistic")


def test_an_equally_weighted_average():
    models = [disturb(network(), seed) for seed in range(5)]
    swa = copy.deepcopy(models[0])
    for n, model in enumerate(models[1:], 1):
        average_(swa, model, n / (n + 1))
    close(swa[0].weight, np.mean([wide(m[0].weight) for m in models], axis=0))
    close(swa[1].running_var, np.mean([np.sqrt(wide(m[1].running_var)) for m in models], axis=0) ** 2)


def test_every_domain_is_treated_alike():
    def layered() -> nn.Module:
        model = network(nn.BatchNorm1d)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            model[1].register_buffer(f"{name}_sketch", getattr(model[1], name).clone())
        return model

    model, ema = disturb(layered(), 1), disturb(layered(), 2)
    before, live = state(ema), state(model)
    average_(ema, model, 0.5)
    close(ema[1].running_mean_sketch, (before["1.running_mean_sketch"] + live["1.running_mean_sketch"]) / 2)
    roots = np.sqrt(before["1.running_var_sketch"]) + np.sqrt(live["1.running_var_sketch"])
    close(ema[1].running_var_sketch, (roots / 2) ** 2)
    assert int(ema[1].num_batches_tracked_sketch) == 8


def test_the_layers_own_domains():
    def layered() -> nn.Module:
        return nn.Sequential(BatchNorm2d(3, domains=("photo", "sketch")))

    model, ema = disturb(layered(), 1), disturb(layered(), 2)
    before, live = state(ema), state(model)
    average_(ema, model, 0.5)
    for domain in ("", "_sketch"):
        name = f"0.running_var{domain}"
        close(ema.state_dict()[name], ((np.sqrt(before[name]) + np.sqrt(live[name])) / 2) ** 2)


def test_other_buffers_and_whole_numbers_are_copied():
    class Odd(nn.Module):
        def __init__(self, start: int):
            super().__init__()
            self.register_buffer("scale", torch.tensor([1.0 + start]))
            self.register_buffer("running_var", torch.tensor([4.0 + start]))  # without a mean: somebody else's
            self.register_buffer("my_running_mean", torch.tensor([1.0 + start]))
            self.register_buffer("my_running_var", torch.tensor([4.0 + start]))
            self.register_buffer("cache", torch.zeros(start), persistent=False)
            self.table = nn.Parameter(torch.tensor([3 + start]), requires_grad=False)

    ema, model = Odd(0), Odd(5)
    average_(ema, model, 0.5)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert ema.cache.shape == (0,), "caches are not part of the state, and may differ in size"


def test_layers_that_do_not_track_and_layers_without_affine():
    for options in ({"track_running_stats": False}, {"affine": False}):
        model, ema = disturb(network(**options), 1), disturb(network(**options), 2)
        before = state(ema)
        average_(ema, model, 0.5)
        close(ema[0].weight, (before["0.weight"] + wide(model[0].weight)) / 2)


def test_rejected_batches_stay_the_models_own():
    model, ema = network(), network()
    with pytest.warns(UserWarning, match="non-finite"):
        model[1](torch.full((2, 4), math.inf))
    average_(ema, model, 0.9)
    assert ema[1].rejected_batches == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_average_of_a_half_precision_model_does_not_stall(dtype):
    model = network().to(dtype)
    ema = copy.deepcopy(model).float()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        ema[0].weight.fill_(1.25)
    for _ in range(2000):
        average_(ema, model, 0.999)
    wanted = 1 + 0.25 * Wide(0.999) ** 2000
    np.testing.assert_allclose(wide(ema[0].weight), np.full((4, 3), wanted), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_averages_are_rounded_once(dtype):
    """Each step's result is the nearest of the dtype to the exact one, statistics of torch.nn in half included."""
    model, ema = (disturb(network(nn.BatchNorm1d).to(dtype), seed) for seed in (1, 2))
    before, live = state(ema), state(model)
    average_(ema, model, 0.75)
    exact = {name: 0.75 * before[name] + 0.25 * live[name] for name in before}
    name = "1.running_var"
    exact[name] = (0.75 * np.sqrt(before[name]) + 0.25 * np.sqrt(live[name])) ** 2
    for name, tensor in ema.state_dict().items():
        if tensor.is_floating_point():
            off = np.abs(wide(tensor) - exact[name])
            assert (off <= np.abs(exact[name]) * torch.finfo(dtype).eps / 2 * 1.001).all(), name


def test_a_wider_model_is_not_rounded_before_it_is_averaged():
    model, ema = network().double(), network().half()
    with torch.no_grad():
        model[0].weight.fill_(1 + 2.0**-10 + 2.0**-14)  # in half precision 1 + 2^-10
        ema[0].weight.fill_(1.0)
    average_(ema, model, 0.5)  # 1 + 2^-11 + 2^-15: just above half way to the next of half precision
    assert torch.equal(ema[0].weight, torch.full((4, 3), 1 + 2.0**-10, dtype=torch.half))


def test_wrapped_models():
    model, reference = disturb(network(), 1), network()
    average_(reference, model, 0.9)
    wrapped = AveragedModel(network())
    wrapped.module.load_state_dict(network().state_dict())
    start = copy.deepcopy(wrapped.module)
    average_(wrapped, nn.DataParallel(model), 0.9)
    average_(start, torch.compile(nn.DataParallel(model)), 0.9)
    assert wrapped.n_averaged.item() == 1
    for name, tensor in wrapped.module.state_dict().items():
        assert torch.equal(tensor, start.state_dict()[name]), name


def test_a_model_compiled_in_part():
    model, ema = disturb(network(), 1), disturb(network(), 2)
    wanted = (wide(ema[0].weight) + wide(model[0].weight)) / 2
    model[0] = torch.compile(model[0])
    average_(ema, model, 0.5)
    close(ema[0].weight, wanted)


class Ema(AveragedModel):
    def update_parameters(self, model: nn.Module) -> None:
        average_(self, model, 0.9)


def test_a_subclass_of_averaged_model_serves_loops_that_call_update_parameters():
    model = network()
    ema = Ema(model)
    disturb(model, 1)
    wanted = average_(copy.deepcopy(ema.module), model, 0.9)
    ema.update_parameters(model)
    assert ema.n_averaged.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(ema.module.buffers(), wanted.buffers(), strict=True))


@pytest.mark.parametrize(("use_buffers", "tracked"), [(False, 12), (True, 3)])
def test_what_the_guide_says_of_averaged_model(use_buffers, tracked):
    """By default it copies the buffers; with use_buffers it averages variances, and truncates the count."""
    model = network(nn.BatchNorm1d)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    variance = 1.0
    for step in range(12):
        with torch.no_grad():
            model[1].running_var.fill_(1.0 + step)
            model[1].num_batches_tracked.add_(1)
        ema.update_parameters(model)
        variance = 0.9 * variance + 0.1 * (1.0 + step) if use_buffers else 1.0 + step
    close(ema.module[1].running_var, np.full(4, variance))
    assert ema.module[1].num_batches_tracked.item() == tracked


def test_parameters_on_two_names_are_averaged_once():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3, bias=False), BatchNorm1d(3), nn.Linear(3, 3, bias=False))
        model[2].weight = model[0].weight
        return model

    model, ema = disturb(tied(), 1), disturb(tied(), 2)
    wanted = 0.75 * wide(ema[0].weight) + 0.25 * wide(model[0].weight)
    average_(ema, model, 0.75)
    close(ema[2].weight, wanted)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ArgumentError, match=r"decay must lie in \[0, 1\]"):
        average_(network(), network(), decay)


def test_other_mistakes_name_what_to_do():
    with pytest.raises(ArgumentError, match="'averaged', 'copied'"):
        average_(network(), network(), 0.9, statistics="pooled")
    model = network()
    with pytest.raises(ArgumentError, match="deepcopy"):
        average_(AveragedModel(model).module, model, 0.9) and average_(nn.DataParallel(model), model, 0.9)


def test_a_difference_in_structure_is_named_and_changes_nothing():
    cases = [
        (network(), network()[:3], "averaged model has a parameter '3.weight', the model in training has none"),
        (network()[:3], network(), "model in training has a parameter '3.weight', the averaged model has none"),
        (network(), network(track_running_stats=False), "averaged model has a buffer '1.running_mean'"),
        (network(), nn.Sequential(nn.Linear(5, 4), *network()[1:]), r"'0.weight' has shape \(4, 3\) .* \(4, 5\)"),
    ]
    for ema, model, said in cases:
        before = state(ema)
        with pytest.raises(ModelError, match=said):
            average_(ema, disturb(model, 1), 0.5)
        assert all(np.array_equal(value, before[name]) for name, value in state(ema).items())


def test_the_guides_tables_say_what_was_measured():
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("averaging_benchmark", root / "benchmarks" / "averaging.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    page = benchmark.GUIDE.read_text(encoding="utf-8")
    written = benchmark.BLOCK.search(page)[0]
    wanted = benchmark.tables(json.loads(benchmark.MEASURED.read_text(encoding="utf-8")))
    assert wanted in written, "run python benchmarks/averaging.py --tables"


def average_on_a_rank(rank, group, parts, masks):
    model = sn.BatchNorm1d(3, process_group=group, dtype=torch.float64, momentum=1.0)
    ema = copy.deepcopy(model)
    model(parts[rank], mask=masks[rank])
    sn.average_(ema, model, 0.5)
    return ema.running_mean, ema.running_var


@pytest.mark.xdist_group("ranks")
def test_over_ranks_with_a_mask_every_rank_has_the_average_of_the_whole_batch():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, False, True])
    whole = stats(x, weight=mask)
    for mean, variance in ranks.run(average_on_a_rank, 2, x.split([5, 2]), mask.split([5, 2])):
        assert_close(mean, whole.mean / 2, "statistic")
        assert_close(variance, ((1 + whole.unbiased**0.5) / 2) ** 2, "variance")  # means of deviations
