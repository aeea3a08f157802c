"""Monitors on models that are served: by threads, with masks, in parts, by forwards that fail."""

import itertools
import os
import stat
import threading

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.shift.watching.monitor import Monitor
from steadynorm.shift.watching.observer import Look
from support_monitor import calibrated, points, small


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


class Masked(nn.Module):
    """Positions that are padding hold anything."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = sn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.norm(input=x, mask=mask)


def padded(n: int, seed: int, padding: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, 6, generator=generator) < torch.rand(n, 1, generator=generator)
    mask[:, 0] = True
    return torch.where(mask[:, None], torch.randn(n, 4, 6, generator=generator), padding), mask


@pytest.mark.parametrize("by_hand", [True, False])
def test_padding_is_no_shift(by_hand: bool):
    """Calibrated with one padding and served with another: neither counts, whichever way the batch comes."""
    model = Masked().eval()
    monitor = Monitor(model, budget=None)
    monitor.calibrate([padded(100, i, 0.0) for i in range(10)], forward=lambda batch: model(*batch))
    if by_hand:
        for seed in range(20, 30):
            monitor.update(padded(64, seed, 9.0), forward=lambda batch: model(*batch))
    else:
        with monitor:
            for seed in range(20, 30):
                model(*padded(64, seed, 9.0))
    state = monitor.state()
    assert (state.tests, state.alarm, state.failures) == (10, False, 0)
    assert state.layers[0].moved < 0.2


def test_forwards_that_examine_the_model_are_not_served():
    model = small()
    monitor = calibrated(model)
    with monitor:
        sn.shift.adapt_(model, points(640, 1), classifier=False).undo()
        monitor.update(points(64, 2))
        monitor.p_value([points(64, 2)])
        sn.recalibrate_(model, [points(640, 1)])
        sn.diagnose(model, [points(64, 2)] * 3)
        assert monitor.state().batches == 1
        model(points(64, 3))
        assert monitor.state().batches == 2


def test_a_forward_that_fails_in_a_thread_that_ends_leaves_nothing():
    model = small()
    monitor = calibrated(model)

    def serve() -> None:
        with pytest.raises(RuntimeError, match="running_mean"):
            model(torch.zeros(3, 9))

    with monitor:
        before = hooks(model)
        for _ in range(3):
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()
        model(points(64, 0))
        assert hooks(model) == before
        state = monitor.state()
        assert (state.failures, state.observed, state.examples) == (0, 1, 64)
    assert hooks(model) == 0


def test_an_interrupted_forward_leaves_nothing_after_detaching():
    model = small()
    monitor = calibrated(model)
    interrupt = model[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    def serve() -> None:
        with pytest.raises(KeyboardInterrupt):
            model(points(3, 0))

    with monitor:
        before = hooks(model)
        serve()
        interrupt.remove()
        model(points(64, 0))
        assert hooks(model) == before - 1  # the one that interrupted
        assert monitor.state().examples == 64
        interrupt = model[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        interrupt.remove()
    assert hooks(model) == 0


def test_what_a_failing_forward_left_goes_with_the_next_one_looked_at_or_not():
    model = small()
    monitor = calibrated(model)
    with monitor:
        before = hooks(model)
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 9))
        assert hooks(model) > before
        monitor._tally._budget.next_look = 10
        model(points(4, 0))
        assert hooks(model) == before


def test_a_forward_that_fails_is_no_time_of_serving():
    """Its look is over, and its time unknown: it is taken to have lasted as long as the next one."""
    now = [0.0]
    model = small()
    monitor = calibrated(model, clock=lambda: now[0])
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
    with monitor:
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 9))
        now[0] += 1000.0
        model(points(64, 0))
    assert monitor._tally._budget.served == pytest.approx(2.0)


def test_a_model_that_returns_nothing_is_watched():
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> None:
            self.norm(x)

    model = Silent().eval()
    with Monitor(model, budget=None) as monitor:
        model(points(64, 0))
    assert monitor.state().examples == 64


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (lambda m: torch.compile(m, backend="eager"), "'0' is compiled"),
        (lambda m: torch.jit.script(m), "'0' is TorchScript"),
        (nn.DataParallel, "'0' is DataParallel"),
    ],
    ids=["compiled", "scripted", "parallel"],
)
def test_parts_that_hooks_do_not_see_are_named(part, says: str):
    model = nn.Sequential(part(nn.Sequential(nn.BatchNorm1d(4))), nn.BatchNorm1d(4)).eval()
    with Monitor(model) as monitor:
        assert says in monitor.state().notes[0]


def test_seeing_nothing_is_said():
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            thread = threading.Thread(target=self.norm, args=(x,))
            thread.start()
            thread.join()
            return x

    model = Elsewhere().eval()
    with Monitor(model, budget=None) as monitor:
        for _ in range(20):
            assert monitor.state().notes == ()
            model(points(4, 0))
        assert "no batch norm ran" in monitor.state().notes[0]


def test_a_stream_that_is_mostly_not_finite_is_said():
    monitor = calibrated(small())
    state = monitor.update(torch.full((64, 4), torch.nan))
    assert (state.tests, state.alarm) == (0, False)
    assert "not finite" in state.notes[0]


def test_a_null_that_would_have_to_be_wider_than_it_may_be_is_said(monkeypatch):
    for module in ("calibration", "monitor"):
        monkeypatch.setattr(f"steadynorm.shift.watching.{module}.WIDEST", 1.01)
    assert "more false alarms" in calibrated(small()).state().notes[0]


def test_a_test_that_is_under_way_at_a_reset_counts_for_nothing(monkeypatch):
    model = small()
    monitor = calibrated(model)
    test = monitor._tally._e_value

    def reset_meanwhile(name: str, seen: object) -> float | None:
        monitor.reset()
        return test(name, seen)

    monkeypatch.setattr(monitor._tally, "_e_value", reset_meanwhile)
    state = monitor.update(points(64, 0) + 9)
    assert (state.tests, state.evidence, state.layers) == (0, 0.0, ())


def test_groups_of_layers_are_drawn_alike_whatever_came_before():
    """Only then is the mean e-value over a group, in expectation, that over all layers."""
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(6))).eval()
    tally = Monitor(model)._tally
    drawn = []
    for _ in range(3000):
        tally._next_group()
        drawn.append(tally._group)
    assert all(len(group) == 4 for group in drawn)
    for name in map(str, range(6)):
        here = [name in group for group in drawn]
        after = [b for a, b in itertools.pairwise(here) if a]
        assert sum(here) / len(here) == pytest.approx(4 / 6, abs=0.04)
        assert sum(after) / len(after) == pytest.approx(4 / 6, abs=0.04)


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_a_saved_calibration_is_as_readable_as_any_other_file(tmp_path):
    before = os.umask(0o022)
    try:
        calibrated(small()).save(tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o644


def test_a_look_takes_a_layer_once_and_only_those_asked_for():
    layer, look = nn.BatchNorm1d(4).eval(), Look(1, frozenset({"a"}))
    look.see("a", layer, points(3, 0))
    look.see("a", layer, points(5, 0))
    look.see("b", layer, points(5, 0))
    assert {name: len(seen.mean) for name, seen in look.taken.items()} == {"a": 3}


def test_a_forward_that_is_not_looked_at_does_not_even_ask_the_time():
    """A clock of CPU time is a call into the system, which costs a small network's forward some percent."""
    calls = []
    model = small()
    monitor = Monitor(model, clock=lambda: float(len(calls)))
    with monitor:
        monitor._tally._budget.next_look = 10
        monitor._observer._clock = lambda: float(calls.append(1) or len(calls))
        for _ in range(10):
            model(points(4, 0))
        assert calls == []
        model(points(4, 0))
        assert calls
