"""The three tools together: an alarm, an adaptation, and whether the alarm is gone."""

import pytest
import torch
from torch import nn

import steadynorm as sn


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = sn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), sn.BatchNorm2d(4, activation="relu"), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 1))
    with torch.no_grad():
        for _ in range(100):
            model(images(64))
    return model.eval()


def images(n: int) -> torch.Tensor:
    """Of random texture, each with a brightness of its own."""
    return torch.randn(n, 1, 8, 8) + 0.5 * torch.randn(n, 1, 1, 1)


def darkened(n: int) -> torch.Tensor:
    return 0.5 * images(n) - 1


def of_two_kinds(n: int) -> torch.Tensor:
    """Half of them nearly blank: no mean and variance per channel makes these what they were."""
    return images(n) * torch.tensor([0.1, 1.4]).repeat(n // 2).view(n, 1, 1, 1)


@pytest.mark.parametrize(
    ("shifted", "verdict"),
    [(darkened, "adapted"), (of_two_kinds, "retrain")],
    ids=["mean and variance", "more than that"],
)
def test_the_alarm_says_whether_adapting_was_enough(model, shifted, verdict):
    monitor = sn.shift.Monitor(model, budget=None).calibrate(images(1000).split(100))
    for batch in images(640).split(64):
        assert not monitor.update(batch).alarm
    served = shifted(640)
    for batch in served.split(64):
        state = monitor.update(batch)
    assert state.alarm
    report = sn.shift.adapt_(model, served, monitor=monitor)
    assert (report.verdict, report.alarm) == (verdict, verdict == "retrain")


def test_watched_in_serving_and_undone(model):
    monitor = sn.shift.Monitor(model, budget=None).calibrate(images(1000).split(100))
    report = sn.shift.adapt_(model, darkened(640), method="adabn")
    with monitor, torch.no_grad():
        for batch in darkened(640).split(64):
            model(batch)
        assert not monitor.state().alarm
        report.undo()
        monitor.reset()
        for batch in darkened(640).split(64):
            model(batch)
        assert monitor.state().alarm
