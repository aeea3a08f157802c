"""The GPU's benchmark says what it measures; without a GPU it measures nothing. A clock on the CPU stands in here."""

import copy
import json
import sys

import pytest
import torch

import gpu
import gpu_measuring
import gpu_peers
import gpu_step
from gpu_oracle import error_of, running_error
from gpu_rows import BATCHES, DTYPES, LAYOUTS, VARIANTS, Row, bytes_moved, in_turns, rows
from gpu_table import summary

ROW = Row("test", (4, 3, 6, 6), "float32", "channels_last", "add_relu")
STEP = {"batch": 2, "side": 32, "rounds": 1, "depths": (1, 1, 1, 1)}


class HostClock:
    """Microseconds that no clock has measured: one more for each call, which is run all the same."""

    device = "cpu"
    ahead_us = 0.0
    late = 0
    taken = 0.0

    def device_us(self, call):
        call()
        self.taken += 1
        return self.taken

    host_us = device_us

    def graphed(self, call):
        return call

    def settle(self):
        self.late = 0


@pytest.mark.parametrize(
    ("device", "triton", "refusal", "said"),
    [
        (False, True, None, "needs a CUDA device"),
        (True, False, None, "needs Triton"),
        (True, True, "They fail.", "They fail."),
    ],
)
def test_where_it_cannot_measure_it_says_so(monkeypatch, capsys, tmp_path, device, triton, refusal, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setattr(gpu, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(gpu, "refused", lambda: refusal)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Nothing was measured" in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--rows", "("], ["--rows", "no such row"], ["--rounds", "0"], ["--minutes", "nan"]])
def test_what_cannot_be_asked_for_is_refused(monkeypatch, capsys, given):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err


def test_the_rows_are_those_of_the_networks():
    found = rows()
    assert len({row.name for row in found}) == len(found)
    assert {row.network for row in found} == {"resnet50", "mobilenet_v2", "u_net"}
    assert {row.shape[0] for row in found} == set(BATCHES)
    kinds = {(row.dtype, row.layout, row.variant) for row in found}
    assert len(kinds) == len(DTYPES) * len(LAYOUTS) * len(VARIANTS)
    assert sum(row.x_bytes > 64e6 for row in found) > 100


def test_the_bytes_of_a_streaming_batch_norm():
    """Counted by hand: 4 x 3 x 6 x 6 numbers of 4 bytes, read and written as the docstring has it."""
    x = 4 * 3 * 6 * 6 * 4
    assert bytes_moved(ROW) == {"forward": (1 + 1 + 1 + 1) * x, "backward": (3 + 1 + 2 + 1) * x}
    relu = Row("test", (4, 3, 6, 6), "float16", "contiguous", "relu")
    assert bytes_moved(relu) == {"forward": 3 * x // 2, "backward": 5 * x // 2}


def test_every_beginning_is_spread():
    found = rows()
    ordered = in_turns(found)
    assert sorted(row.name for row in ordered) == sorted(row.name for row in found)
    first = ordered[:60]
    assert {row.network for row in first} == {"resnet50", "mobilenet_v2", "u_net"}
    assert len({(row.dtype, row.layout, row.variant) for row in first}) == 12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row(variant, layout):
    row = Row("test", (4, 3, 6, 6), "float32", layout, variant)
    found = gpu_measuring.measure(row, HostClock(), False, 3)
    assert 0 < found["errors"]["ours"] <= 1
    assert set(found["times_us"]) == {"forward", "backward", "both"}
    assert all(set(found["times_us"][which]) == {"ours", "eager"} for which in found["times_us"])
    assert set(found["graph_us"]) == {"ours", "eager"}
    assert found["copy_bytes"] == 2 * row.x_bytes
    assert not found["skipped"]


def planted(monkeypatch, who, change):
    """A contender whose output is changed."""
    right = gpu_peers.contenders

    def wrong(given, compiled):
        found = right(given, compiled)
        for peer in found[who]:
            layer = peer.layer
            peer.layer = lambda x, r, layer=layer: change(layer(x, r))
        return found

    monkeypatch.setattr(gpu_measuring, "contenders", wrong)
    return gpu_measuring.measure(ROW, HostClock(), False, 3)


def failing(y):
    raise RuntimeError("no kernel\nand more of it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 1.001, "times as far from the truth as allowed"),
        (lambda y: y * float("nan"), "no finite number"),
        (failing, "RuntimeError: no kernel"),
    ],
)
def test_what_is_wrong_is_not_timed(monkeypatch, change, reason):
    found = planted(monkeypatch, "ours", change)
    assert reason in found["wrong"]
    assert "times_us" not in found
    json.dumps(found, allow_nan=False)


def test_a_peer_that_fails_is_left_out(monkeypatch):
    found = planted(monkeypatch, "eager", failing)
    assert found["skipped"] == {"eager": "RuntimeError: no kernel"}
    assert set(found["times_us"]["both"]) == {"ours"}


def test_too_little_memory_leaves_a_row_out(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(gpu_measuring, "contenders", full)
    found = gpu_measuring.measure(ROW, HostClock(), False, 3)
    assert "memory" in found["not_timed"]
    assert ROW.name in summary({"machine": {"device": "a stand-in"}, "step": None, "rows": [found]})


class Crooked(torch.autograd.Function):
    """Passes on, and spoils the gradient."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize("spoiled", ["x", "weight", "bias", "residual", "running_mean", "running_var", "counter"])
def test_the_oracle_sees_each_quantity(spoiled):
    given = gpu_peers.problems(ROW, "cpu", 2)
    peer = gpu_peers.contenders(given, False)["eager"][0]
    assert error_of(given[0], peer) <= 1
    norm, layer = peer.norm, peer.layer
    spoil = Crooked.apply

    def crooked(x, r):
        if spoiled in ("weight", "bias"):
            parts = {"weight": norm.weight, "bias": norm.bias, spoiled: spoil(getattr(norm, spoiled))}
            y = torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, **parts, training=True)
            norm.num_batches_tracked += 1
            return torch.relu(y + r)
        y = layer(spoil(x) if spoiled == "x" else x, spoil(r) if spoiled == "residual" else r)
        if spoiled in ("running_mean", "running_var"):
            getattr(norm, spoiled).data += 1e-3
        if spoiled == "counter":
            norm.num_batches_tracked.add_(1)
        return y

    peer.layer = crooked
    assert error_of(given[0], peer) > 1


def test_running_statistics_by_hand():
    """Of 1, 2, 3, 6: the mean 3, the squares from it 4 + 1 + 0 + 9 = 14, over 3."""
    x = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(4, 1, 1, 1)
    steps, mean = torch.tensor(1), torch.tensor([0.3])
    assert running_error(x, mean, torch.tensor([0.9 + 1.4 / 3]), steps, 0.1) < 1
    assert running_error(x, mean, torch.tensor([0.9 + 1.4 / 4]), steps, 0.1) > 1  # biased
    assert running_error(x, mean * float("nan"), torch.tensor([0.9 + 1.4 / 3]), steps, 0.1) == float("inf")


def test_the_network_is_resnet_50():
    """53 batch norms, and the 25,557,032 parameters that torchvision counts."""
    with torch.device("meta"):
        model = gpu_step.resnet50()
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == 53
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_a_fused_network_that_computes_something_else_is_found():
    def slightly(model):
        changed = copy.deepcopy(model)
        changed[0].weight.data *= 1 + 1e-5  # which the batch norm behind it undoes, but for eps
        return changed

    with pytest.raises(ArithmeticError, match="allowed are"):
        gpu_step.exact_difference("cpu", (1, 1, 1, 1), slightly)


def test_a_whole_run(tmp_path, monkeypatch):
    """Written row by row, and as a table with what was wanted beside what was found."""
    out = tmp_path / "gpu.json"
    arguments = gpu.parsed(["--out", str(out), "--rounds", "2", "--no-compile"])
    arguments.step_options = STEP
    content = gpu.run(arguments, [ROW], HostClock(), {"device": "a stand-in"})
    written = json.loads(out.read_text())
    assert written["rows"][0]["name"] == ROW.name
    assert [verdict["word"] for verdict in written["verdicts"][:3]] == ["", "", ""]  # no row of BN + ReLU, none large
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert content["complete"]
    assert content["step"]["fused"] == 1 + 3 * 4  # the stem; three in each block, the sum fused into the last
    assert set(content["step"]["times_us"]) == {"before", "after"}
    shown = summary(content)
    assert "a stand-in: 1 rows" in shown
    assert "not measured" in shown

    def step(clock):
        return {"faster": 0.1}

    monkeypatch.setattr(gpu, "measure_step", step)
    arguments.step_options = {}
    for failure, sign in ((KeyboardInterrupt(), "complete"), (RuntimeError("illegal access\nmore"), "failed")):

        def ending(row, *_, failure=failure):
            if row is not ROW:
                raise failure
            return {"name": "done", "wrong": "so it is"}

        monkeypatch.setattr(gpu, "measure", ending)
        gpu.run(arguments, [ROW, Row("test", (4, 3, 6, 6), "float32", "contiguous", "relu")], HostClock(), {})
        ended = json.loads(out.read_text())
        assert [row["name"] for row in ended["rows"]] == ["done"]
        assert ended["step"] == {"faster": 0.1}
        assert ended[sign] in (False, "RuntimeError: illegal access")


def test_compilers_may_take_half_the_time(monkeypatch):
    """A clock that a row moves on by a minute: of four minutes, two rows are compiled, and a fifth is the last."""
    now = [0.0]
    asked = []

    def measure(row, clock, compiled, rounds):
        now[0] += 60
        asked.append(compiled)
        return {"name": row.name, "wrong": ""}

    monkeypatch.setattr(gpu, "measure", measure)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    arguments = gpu.parsed(["--rows", ".", "--minutes", "4", "--no-step"])
    assert not gpu.run(arguments, [ROW] * 9, HostClock(), {})["complete"]
    assert asked == [True, True, False, False, False]


def test_a_part_of_the_rows_does_not_replace_the_results():
    assert gpu.parsed([]).out == gpu.RESULTS
    for part in (["--rows", "x"], ["--dtypes", "float16"], ["--layouts", "contiguous"], ["--step-only"], ["--no-step"]):
        assert gpu.parsed(part).out is None
