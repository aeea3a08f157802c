"""The warning about averaged weights beside statistics left behind: when it comes, and when it must not."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from steadynorm.errors import StaleStatisticsWarning
from steadynorm.nn import BatchNorm1d
from steadynorm.nn.averaging import average_
from steadynorm.nn.freezing import freeze_
from steadynorm.nn.staleness import CHANGES, Staleness

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), BatchNorm1d(4), nn.Linear(4, 2))


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def lerp(ema: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for average, live in zip(ema.parameters(), model.parameters(), strict=True):
            average.lerp_(live, 0.1)


def foreach(ema: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 0.1)


def multiply_and_add(ema: nn.Module, model: nn.Module) -> None:
    for average, live in zip(ema.parameters(), model.parameters(), strict=True):
        average.detach().mul_(0.9).add_(live.data, alpha=0.1)


def copy_in(ema: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for average, live in zip(ema.parameters(), model.parameters(), strict=True):
            average.copy_(0.9 * average + 0.1 * live)


def averaged(update, times: int = CHANGES, **options) -> nn.Module:
    """An average kept beside some training."""
    model = network()
    ema = copy.deepcopy(model).eval()
    for _ in range(times):
        step(model)
        update(ema, model, **options)
    return ema


def evaluate(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(X)


@pytest.mark.parametrize("update", [lerp, foreach, multiply_and_add, copy_in])
def test_an_average_of_parameters_alone_is_warned_about_once(update):
    ema = averaged(update)
    with pytest.warns(StaleStatisticsWarning, match="average_"):
        evaluate(ema)
    evaluate(ema)  # the suite turns a second warning into an error


def test_a_layer_that_was_used_before_and_one_in_inference_mode():
    model = network()
    ema = copy.deepcopy(model).eval()
    evaluate(ema)
    for _ in range(CHANGES):
        step(model)
        lerp(ema, model)
    with torch.inference_mode(), pytest.warns(StaleStatisticsWarning):
        ema(X)


def test_fewer_changes_are_no_average():
    evaluate(averaged(lerp, CHANGES - 1))


def test_statistics_that_moved_along_are_not_stale():
    def with_buffers(ema: nn.Module, model: nn.Module) -> None:
        lerp(ema, model)
        for average, live in zip(ema.buffers(), model.buffers(), strict=True):
            average.copy_(live)

    evaluate(averaged(with_buffers))
    evaluate(averaged(average_, decay=0.9))
    evaluate(averaged(average_, decay=0.9, statistics="copied"))
    for use_buffers in (False, True):
        model = network()
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        for _ in range(2 * CHANGES):
            step(model)
            ema.update_parameters(model)
        evaluate(ema)


def test_statistics_measured_anew_are_not_stale_until_the_weights_move_on():
    model = network()
    ema = copy.deepcopy(model)

    def keep() -> None:
        for _ in range(CHANGES):
            step(model)
            lerp(ema, model)

    keep()
    torch.optim.swa_utils.update_bn([X], ema)
    evaluate(ema)
    keep()
    with pytest.warns(StaleStatisticsWarning):
        evaluate(ema)


def test_a_teacher_in_training_mode_measures_for_itself():
    model = network()
    ema = copy.deepcopy(model).train()
    for _ in range(2 * CHANGES):
        step(model)
        lerp(ema, model)
        with torch.no_grad():
            ema(X)
    evaluate(ema)


def test_ordinary_training():
    model = network()
    for _ in range(2):
        model.train()
        for _ in range(2 * CHANGES):
            step(model)
        evaluate(model)


def test_fine_tuning_with_statistics_held():
    model = network()
    evaluate(model)
    for _ in range(2 * CHANGES):
        model.train()
        model[1].eval()
        step(model)
    evaluate(model)


def test_frozen_layers():
    model = network()
    model[1].eval().requires_grad_(False)
    for _ in range(2 * CHANGES):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
        model(X).square().mean().backward()
        optimizer.step()
    evaluate(model)


def test_an_average_of_a_model_frozen_by_freeze_():
    model = freeze_(network(), affine=False)
    ema = copy.deepcopy(model)
    for _ in range(CHANGES):
        step(model)
        lerp(ema, model)
    evaluate(ema)


def test_training_in_a_compiled_graph(fresh_compiler):
    model = network()
    model[1].eval()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(CHANGES):
        optimizer.zero_grad()
        compiled(X).square().mean().backward()
        optimizer.step()
    evaluate(model)


def test_a_compiled_evaluation_has_no_break_and_does_not_warn(fresh_compiler):
    ema = averaged(lerp)
    with torch.no_grad():
        y = torch.compile(ema, backend="eager", fullgraph=True)(X)
    with pytest.warns(StaleStatisticsWarning):
        torch.testing.assert_close(y, evaluate(ema))


def test_torch_func_and_fx():
    ema = averaged(lerp)
    with torch.no_grad():
        torch.func.vmap(lambda x: ema(x[None]))(X)
        with pytest.warns(StaleStatisticsWarning):
            ema(X)
    ema = averaged(lerp)
    weights = {name: tensor.detach() for name, tensor in ema.named_parameters()}
    torch.fx.symbolic_trace(ema)
    torch.func.functional_call(ema, weights, (X,))
    torch.func.grad(lambda w: torch.func.functional_call(ema, w, (X,)).sum())(weights)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_starts_anew(how):
    ema = averaged(lerp)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(ema, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(ema) if how == "deepcopy" else pickle.loads(pickle.dumps(ema))
    evaluate(twin)
    model = network()
    for _ in range(CHANGES):
        lerp(twin, model)
    with pytest.warns(StaleStatisticsWarning):
        evaluate(twin)
    with pytest.warns(StaleStatisticsWarning):
        evaluate(ema)


def test_copies_write_nothing_of_it_down():
    assert "staleness" not in BatchNorm1d(2).__getstate__()


@pytest.mark.parametrize("start", ["another dtype", "a checkpoint", "a checkpoint, assigned"])
def test_an_average_that_does_not_start_as_a_mere_copy(start):
    model = network().double() if start == "another dtype" else network()
    if start == "another dtype":
        ema = copy.deepcopy(model).float()
    else:
        ema = network()
        ema.load_state_dict(copy.deepcopy(model.state_dict()), assign=start.endswith("assigned"))
    for _ in range(CHANGES):
        lerp(ema, copy.deepcopy(model).float())
    with pytest.warns(StaleStatisticsWarning):
        evaluate(ema)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_starts_anew(assign):
    ema, other = averaged(lerp), network()
    ema.load_state_dict(other.state_dict(), assign=assign)
    evaluate(ema)


def test_a_conversion_starts_anew():
    ema = averaged(lerp).double().float()
    evaluate(ema)
    for _ in range(CHANGES):
        lerp(ema, network())
    with pytest.warns(StaleStatisticsWarning):
        evaluate(ema)


def test_layers_with_nothing_to_look_at():
    for options in ({"affine": False}, {"track_running_stats": False}):
        assert Staleness(BatchNorm1d(2, **options).weight, BatchNorm1d(2, **options).running_mean).settled
        evaluate(nn.Sequential(BatchNorm1d(3, **options)))
    with torch.inference_mode():
        layer = BatchNorm1d(3)  # its tensors count no changes
    evaluate(nn.Sequential(layer))
    layer = BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softplus())
    evaluate(nn.Sequential(layer))


def test_the_record_by_itself():
    weight, mean = nn.Parameter(torch.ones(2)), torch.zeros(2)
    record = Staleness(weight, mean)
    with torch.no_grad():
        for _ in range(CHANGES):
            weight.mul_(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            record.look(weight, mean, evaluating=False)
        assert not record.settled
        with pytest.warns(StaleStatisticsWarning):
            record.look(weight, mean, evaluating=True)
    assert record.settled
    assert Staleness(weight.detach(), mean).settled, "no parameter: somebody else's"
    for other_weight, other_mean in ((nn.Parameter(weight.detach()), mean), (weight, mean.detach())):
        replaced = Staleness(other_weight, other_mean)  # both share memory and count with those that are looked at
        with torch.no_grad():
            for _ in range(CHANGES):
                weight.mul_(2)
            replaced.look(weight, mean, evaluating=True)
        assert not replaced.settled
    trained = Staleness(weight, mean)
    trained.look(weight, mean, evaluating=False)
    assert trained.settled, "a gradient of the weight was wanted"


def test_what_it_cannot_see():
    """Changes through `.data` are not counted by torch: documented as missed."""
    model = network()
    ema = copy.deepcopy(model).eval()
    for _ in range(2 * CHANGES):
        for average, live in zip(ema.parameters(), model.parameters(), strict=True):
            average.data.mul_(0.9).add_(live.data, alpha=0.1)
    evaluate(ema)
