"""The monitor on served models: what it finds, what it costs, what it survives, what it keeps."""

import copy
import json
import math
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, DataError, ModelError, SteadynormWarning
from steadynorm.shift.watching.budget import BESIDE, Budget
from steadynorm.shift.watching.monitor import Monitor
from support_monitor import calibrated, images, network, points, small


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def test_a_shift_is_found_in_the_right_layer_and_channel_and_clean_data_is_let_pass():
    model = small()
    monitor = calibrated(model)
    with monitor:
        for seed in range(30):
            model(points(64, seed))
        clean = monitor.state()
        assert not clean.alarm
        assert clean.tests == clean.observed == clean.batches == 30
        monitor.reset()
        for seed in range(6):
            model(points(64, seed) + torch.tensor([0.0, 0.0, 0.0, 1.0]))
    state = monitor.state()
    assert state.alarm
    assert state.alarm_batch is not None
    assert state.alarm_batch <= 3
    first = next(layer for layer in state.layers if layer.name == "0")
    assert first.channels[0].channel == 3
    # Per-example means of a layer with one position are the values: one standard deviation, of 384 examples.
    assert first.channels[0].moved == pytest.approx(1.0, abs=0.2)
    assert max(abs(c.moved or 0) for c in first.channels[1:]) < 0.2
    assert first.examples == 384
    assert first.channels[0].standard_error == pytest.approx(1 / math.sqrt(384), rel=0.15)
    assert state.layers[0].moved == max(layer.moved or 0 for layer in state.layers)


@pytest.mark.parametrize("make", [nn.BatchNorm2d, sn.BatchNorm2d])
def test_images_on_layers_of_both_libraries(make):
    model = network(make)
    monitor = Monitor(model, budget=None).calibrate([(images(100, seed), "label") for seed in range(8)])
    with monitor:
        for seed in range(10):
            model(images(40, 100 + seed))
        assert not monitor.state().alarm
        for seed in range(10):
            model(images(40, 200 + seed) + 0.3 * torch.randn(40, 3, 8, 8))
    state = monitor.state()
    assert state.alarm
    assert {layer.name for layer in state.layers} == {"1", "4"}
    assert state.failures == 0


def test_uncalibrated_distance_is_the_closed_form_per_example():
    model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    model[0].running_mean.copy_(torch.tensor([1.0, -1.0]))
    model[0].running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.randn(200, 2, 3, 3, dtype=torch.float64) * 3 + 2
    monitor = Monitor(model.double(), budget=None)
    state = monitor.update(x)
    assert not state.calibrated
    assert state.tests == 0
    eps = model[0].eps
    values = x.permute(1, 0, 2, 3).reshape(2, -1).numpy()
    for channel in state.layers[0].channels:
        c = channel.channel
        v0 = float(model[0].running_var[c]) + eps
        m, v = values[c].mean() - float(model[0].running_mean[c]), values[c].var() + eps
        kl = 0.5 * (v0 / v + v / v0 - 2 + m**2 * (1 / v0 + 1 / v))
        assert channel.kl == pytest.approx(kl, rel=1e-9)
        assert channel.mean == pytest.approx(m / math.sqrt(v0), rel=1e-9)
        assert channel.spread == pytest.approx(math.sqrt(v / v0), rel=1e-9)
        per_example = x[:, c].flatten(1).mean(1).numpy()
        assert channel.standard_error == pytest.approx(per_example.std() / math.sqrt(200 * v0), rel=1e-9)
        assert channel.moved is None
    assert state.layers[0].examples == 200
    assert "not calibrated" in str(state)


def test_single_examples_are_pooled_and_say_what_one_batch_says():
    model = small()
    one, all_at_once = calibrated(model), calibrated(model)
    x = points(192, 7) + 0.4
    for example in x:
        one.update(example[None])
    for batch in x.split(64):
        all_at_once.update(batch)
    alone, together = one.state(), all_at_once.state()
    assert alone.tests == together.tests == 3
    assert alone.batches == 192
    # M <- (M + w) e with w = 64 batches per test, where the others have 1: the evidence is 64 times as much.
    assert alone.evidence == pytest.approx(64 * together.evidence, rel=1e-9)


def test_one_large_batch_is_several_tests():
    monitor = calibrated(small())
    state = monitor.update(points(150, 1))
    assert (state.tests, state.batches, state.examples) == (2, 1, 150)
    assert monitor.update(points(42, 2)).tests == 3


def test_training_mode_is_not_watched_by_hooks_and_refused_by_hand():
    model = small()
    monitor = calibrated(model)
    with monitor:
        model.train()
        model(points(64, 0))
        assert monitor.state().batches == 0
        for act in (lambda: monitor.update(points(4, 0)), lambda: monitor.calibrate([points(4, 0)])):
            with pytest.raises(ModelError, match=r"model\.eval\(\)"):
                act()
        model.eval()
        model(points(64, 0))
    assert monitor.state().batches == 1
    model(points(64, 0))
    assert monitor.state().batches == 1


def test_serving_is_bit_for_bit_what_it_was_and_hooks_go():
    model, x = network(nn.BatchNorm2d), images(20, 0)
    before = model(x)
    monitor = Monitor(model, budget=None)
    with monitor.attach():
        assert torch.equal(model(x), before)
        assert monitor.state().observed == 1
        assert [hooked(m) for m in model.modules()] == [True] + [False] * (len(list(model.modules())) - 1)
    assert not any(hooked(m) for m in model.modules())


def test_what_goes_wrong_inside_never_reaches_serving(monkeypatch):
    model = small()
    monitor = calibrated(model, on_alarm=lambda state: 1 / 0)
    x = points(64, 0) + 3
    with monitor:
        with pytest.warns(SteadynormWarning, match="serving goes on"):
            model(torch.cat([x, x, x]))
        state = monitor.state()
        assert state.alarm
        assert state.failures == 1
        assert "ZeroDivisionError" in state.errors[0]
        monkeypatch.setattr("steadynorm.shift.watching.observer.example_moments", lambda *_: 1 / 0)
        for _ in range(8):
            model(x)
    assert monitor.state().failures > 5
    assert len(monitor.state().errors) == 5
    monkeypatch.undo()
    monitor = calibrated(model)
    monkeypatch.setattr(monitor._tally, "_absorb", lambda taken: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monitor:
            model(x)
    assert monitor.state().failures > 0


def test_a_failing_forward_and_a_failing_begin_leave_no_trace(monkeypatch):
    model = small()
    monitor = calibrated(model)
    with monitor:
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 9))
        model(points(64, 0))
        assert monitor.state().tests == 1
        assert not hooked(model[0])
        with pytest.raises(RuntimeError):
            model(torch.zeros(3, 9))
    assert not any(hooked(m) for m in model.modules())
    monkeypatch.setattr(monitor._tally._budget, "wants", lambda number: 1 / 0)
    with pytest.warns(SteadynormWarning), monitor:
        model(points(64, 0))
    assert monitor.state().failures == 1


def test_several_threads_serve_one_model():
    model = small()
    alarms: list[int] = []
    monitor = calibrated(model, on_alarm=lambda state: alarms.append(state.batches))
    wrong: list[Exception] = []

    def serve(number: int) -> None:
        try:
            with torch.no_grad():
                for i in range(60):
                    model(points(16, 1000 * number + i) + 1.0)
        except Exception as error:
            wrong.append(error)

    with monitor:
        threads = [threading.Thread(target=serve, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    state = monitor.state()
    assert not wrong
    assert state.failures == 0
    assert (state.batches, state.examples, state.tests) == (240, 3840, 60)
    assert len(alarms) == 1


@pytest.mark.parametrize(("idle", "share_looked"), [(0.0, 0.05), (0.01, 0.0333), (0.5, 0.0)])
def test_budget_spends_its_share_and_no_more(idle, share_looked):
    """A forward of 1 s, a look of 0.6 s in all: 3 % pay for one at every 20th, for fewer where idle hooks cost."""
    budget, looks = Budget(0.03, np.random.default_rng(0)), 0
    budget.idle = idle
    for number in range(20_000):
        if budget.wants(number):
            looked = not budget.only_timing
            budget.looked(number, 1.0, 0.6 / BESIDE if looked else 0.0)
            looks += looked
    assert looks / 20_000 == pytest.approx(share_looked, abs=0.0005)
    assert budget.too_small == (idle > 0.03)
    assert budget.cost <= (0.03 if idle < 0.03 else idle + 0.001)


def test_budget_looks_at_few_batches_and_a_few_layers_drawn_anew():
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-5
        return now[0]

    layers = [m for _ in range(6) for m in (nn.BatchNorm1d(4), nn.Identity())]
    model = nn.Sequential(*layers).eval()
    model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1e-3))  # a forward takes a millisecond
    monitor = Monitor(model, clock=clock).calibrate([points(500, 0)])
    model._forward_hooks.clear()
    model[-1].register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1e-3))
    served = [points(200, seed) for seed in range(20)]
    with monitor, torch.no_grad():
        for seed in range(400):
            model(served[seed % 20])
    state = monitor.state()
    assert state.batches == 400
    assert 20 < state.observed < 200
    assert state.cost <= 0.03
    assert state.examples == 64 * state.observed  # a slice of each batch
    assert {layer.name for layer in state.layers} == {str(i) for i in range(0, 12, 2)}
    assert not state.alarm


def test_compiled_traced_transformed_and_copied_models():
    model, x = network(nn.BatchNorm2d), images(8, 0)
    expected = model(x)
    monitor = Monitor(model, budget=None)
    with monitor:
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(x), expected)
        torch.testing.assert_close(torch.func.vmap(model)(x[None])[0], expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        assert monitor.state().observed == 0
        copy.deepcopy(model)(x)
        pickle.loads(pickle.dumps(model))(x)
        assert monitor.state().observed == 0
        with torch.inference_mode():
            model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
    assert monitor.state().observed == 2
    assert monitor.state().failures == 0
    compiled = Monitor(torch.compile(model, backend="eager"))
    with compiled:
        assert "compiled" in compiled.state().notes[0]
    scripted = nn.Sequential(nn.BatchNorm1d(2)).eval()
    assert Monitor(scripted).attach().state().notes == ()


def test_values_that_are_not_finite_are_counted_and_left_out():
    model = small()
    monitor = calibrated(model)
    x = points(64, 0)
    x[:5] = torch.nan
    state = monitor.update(x)
    assert (state.tests, state.not_finite, state.layers[0].examples) == (1, 5, 59)
    state = monitor.update(torch.full((64, 4), torch.inf))
    assert (state.tests, state.not_finite, state.failures) == (1, 69, 0)
    json.dumps(state.to_dict(), allow_nan=False)
    spoiled = [x, *(points(100, i) for i in range(5))]
    assert "5 of the calibration's examples" in monitor.calibrate(spoiled).state().notes[0]


def test_layers_that_do_not_see_the_examples_are_not_watched():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.boxes, self.unused = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.boxes(x.repeat(3, 1)) if x.shape[0] != 13 else x

    model = Heads().eval()
    monitor = Monitor(model, budget=None).calibrate([points(100, i) for i in range(5)])
    assert list(monitor.calibration.layers) == ["stem"]
    assert any(note.startswith("boxes") for note in monitor.state().notes)
    with Monitor(model, budget=None) as plain:
        model(points(20, 0))
        model(points(13, 0))
        assert plain.state().observed == 2


def test_the_buffers_are_read_anew_so_that_adapting_is_seen():
    model = small()
    monitor = calibrated(model)
    shifted = [points(64, seed) * 2 + 1 for seed in range(6)]
    for x in shifted:
        monitor.update(x)
    assert monitor.state().alarm
    together = torch.cat(shifted)
    model[0].running_mean.copy_(together.mean(0))
    model[0].running_var.copy_(together.var(0))
    monitor.reset()
    for seed in range(6):
        monitor.update(points(64, 50 + seed) * 2 + 1)
    state = monitor.state()
    assert not state.alarm
    assert state.layers[0].channels[0].kl < 0.05


def test_save_and_load_bit_for_bit(tmp_path):
    model = small()
    monitor = calibrated(model)
    path = tmp_path / "monitor.safetensors"
    monitor.save(path)
    again = Monitor.load(path, model, budget=None, mean_run=1000)
    for seed in range(4):
        x = points(64, seed) + 0.2
        assert monitor.update(x) == again.update(x)
    monitor.save(tmp_path / "again")  # header included: a single key, for a header of several has no fixed order
    again.save(path)
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "monitor.safetensors"]
    # Summaries only: nothing in the file grows with the examples.
    assert all(len(v) in (4999, 4, 5) for v in load_file(path).values())


def test_files_that_are_refused(tmp_path):
    model = small()
    path = tmp_path / "m.safetensors"
    with pytest.raises(ModelError, match="no calibration to save"):
        Monitor(model).save(path)
    calibrated(model).save(path)
    others = [
        (nn.Sequential(nn.BatchNorm1d(5)), "has 4 channels, this model's 5"),
        (nn.Sequential(nn.Identity(), nn.BatchNorm1d(4)), "which this model lacks"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5)), "layer '3'"),
    ]
    for other, says in others:
        with pytest.raises(ModelError, match=says):
            Monitor.load(path, other.eval())
    with pytest.raises(DataError, match="no readable safetensors"):
        Monitor.load(tmp_path / "missing", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="no readable safetensors"):
        Monitor.load(tmp_path / "text", model)
    arrays, key = load_file(path), "steadynorm.shift.Monitor"
    about = {"schema": 1, "model": {"0": 4, "2": 5}, "layers": ["0", "2"]}
    about |= {"pool": 64, "block": 1, "examples": 1000, "widening": 1.0}
    nan = {**arrays, "0.null": np.full(9, np.nan)}
    damaged = [
        (arrays, {}, "holds no calibration"),
        (arrays, {key: "{}"}, "damaged"),
        (arrays, {key: json.dumps(about | {"schema": 2})}, "schema 2"),
        (arrays, {key: json.dumps(about | {"layers": 3})}, "damaged"),
        (nan, {key: json.dumps(about)}, "damaged"),
        ({}, {key: json.dumps(about)}, "damaged"),
    ]
    for content, metadata, says in damaged:
        save_file(content or {"x": np.zeros(1)}, tmp_path / "bad", metadata=metadata)
        with pytest.raises(DataError, match=says):
            Monitor.load(tmp_path / "bad", model)
    with pytest.raises(DataError, match="cannot be written"):
        calibrated(model).save(tmp_path / "no" / "folder")


@pytest.mark.parametrize(
    ("loader", "options", "kind", "says"),
    [
        ([], {}, DataError, "yields no batches"),
        ([{"image": 1}], {}, DataError, "forward=lambda batch"),
        ([torch.randn(100, 4)], {}, ArgumentError, "at least 256"),
        ([torch.randn(100, 4)], {"pool": 2}, ArgumentError, "pool >= 8"),
        ([torch.randn(100, 4)], {"forward": lambda x: x}, ModelError, "no batch norm layer ran"),
    ],
)
def test_calibrations_that_are_refused(loader, options, kind, says):
    with pytest.raises(kind, match=says):
        Monitor(small()).calibrate(loader, **options)


def test_arguments_and_batches_of_any_kind():
    for options in ({"mean_run": 0.5}, {"mean_run": math.inf}, {"budget": 0.0}, {"budget": 1.5}):
        with pytest.raises(ArgumentError):
            Monitor(small(), **options)
    model = small()
    monitor = Monitor(model, budget=None).calibrate(
        ({"x": points(100, i)} for i in range(99)), examples=450, forward=lambda batch: model(batch["x"])
    )
    assert monitor.calibration.examples == 450
    assert monitor.update([points(3, 0), "label"]).examples == 3
    assert json.loads(json.dumps(monitor.state().to_dict()))["calibrated"] is True
    assert "no alarm" in str(monitor.state())
