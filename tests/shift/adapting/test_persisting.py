"""Whether a shift persists is asked about what means and variances cannot set right, and about nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.errors import ArgumentError
from steadynorm.moments import Moments
from steadynorm.nn.watched import bn_layers
from steadynorm.shift.adapting.adaptation import adapt_
from steadynorm.shift.adapting.persisting import aligned
from steadynorm.shift.watching.monitor import Monitor
from support_adapting import changed, state
from support_monitor import images, network, points, small


def watched(model: nn.Module, clean: Tensor) -> Monitor:
    return Monitor(model, budget=None, on_alarm=lambda _: 1 / 0).calibrate(clean.split(100))


def stale(model: nn.Module) -> nn.Module:
    """Its buffers are not those of clean data any more: half a deviation beside, and half as wide."""
    for _, layer in bn_layers(model):
        layer.running_mean += 0.5 * layer.running_var.sqrt()
        layer.running_var /= 4
    return model


@pytest.mark.parametrize("n", [64, 100, 640])
@pytest.mark.parametrize("aged", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_moved_means_and_variances_do_not_persist_whatever_the_buffers_are(n: int, aged: bool, shift: float):
    """The calibration is what is compared with, not the buffers: those of a stale model say little."""
    model = network(nn.BatchNorm2d)
    model = stale(model) if aged else model
    monitor = watched(model, images(1000, 54321))
    report = adapt_(model, images(n, 7) * (1 + shift) + shift, classifier=False, monitor=monitor)
    assert (report.alarm, report.verdict) == (False, "adapted")


@pytest.mark.parametrize("n", [64, 640])
def test_another_kind_of_images_persists_with_a_single_pool_too(n: int):
    model = network(nn.BatchNorm2d)
    monitor = watched(model, images(1000, 54321))
    noise = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    report = adapt_(model, noise, classifier=False, monitor=monitor)
    assert (report.alarm, report.verdict, report.applied) == (True, "retrain", True)
    assert "means and variances set right" in report.reason


def test_the_monitor_and_the_model_are_left_as_they_were():
    model = small()
    monitor = watched(model, points(1000, 54321))
    monitor.update(points(64, 0))
    seen, twin = monitor.state(), copy.deepcopy(model)
    with monitor:
        adapt_(twin, points(640, 1) + 3, classifier=False)
        report = adapt_(model, points(640, 1) + 3, classifier=False, monitor=monitor)
    assert report.alarm is False
    assert changed(model, state(twin)) == set()
    now = monitor.state()
    assert (now.batches, now.tests, now.evidence, now.alarm) == (seen.batches, seen.tests, seen.evidence, False)


def test_a_model_in_training_mode_is_asked_as_well():
    model = small().train()
    monitor = watched(model.eval(), points(1000, 54321))
    report = adapt_(model.train(), points(640, 1), classifier=False, monitor=monitor)
    assert report.alarm is False
    assert all(m.training for m in model.modules())


def test_an_exception_while_asking_undoes_the_adaptation(monkeypatch):
    model = small()
    monitor = watched(model, points(1000, 54321))
    before = state(model)
    monkeypatch.setattr(monitor, "p_value", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapt_(model, points(640, 1) + 3, classifier=False, monitor=monitor)
    assert changed(model, before) == set()


def test_too_few_for_a_test_is_said():
    model = small()
    monitor = watched(model, points(1000, 54321))
    report = adapt_(model, points(63, 1), classifier=False, monitor=monitor, guard=False)
    assert (report.alarm, report.verdict) == (None, "adapted")
    assert "a test needs 64" in report.notes[-1]


def test_monitors_that_cannot_answer():
    model = small()
    for monitor, says in ((Monitor(model), "not calibrated"), (watched(small(), points(300, 0)), "another model")):
        with pytest.raises(ArgumentError, match=says):
            adapt_(model, points(64, 0), classifier=False, monitor=monitor)


def test_aligned_statistics_from_their_definition():
    """Under them the examples have the calibration's own mean and variance, in the layer's units."""
    model = stale(nn.Sequential(sn.BatchNorm2d(3)).eval())
    clean = images(400, 1)
    monitor = watched(model, clean)
    units = (clean.double() - model[0].running_mean.view(3, 1, 1)) / (model[0].running_var.view(3, 1, 1) + 1e-5).sqrt()
    seen = Moments.of(images(500, 2).double() * 3 + 7)
    found = aligned(monitor.calibration.layers, bn_layers(model))("0", seen, seen, 500)
    wide = (found.m2 + 1e-5).sqrt()
    torch.testing.assert_close((seen.mean - found.mean) / wide, units.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    var = (seen.variance(unbiased=True) + 1e-5) / wide.square()
    torch.testing.assert_close(var, units.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)
