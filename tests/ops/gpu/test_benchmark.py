"""The GPU's benchmark says what it measures; without a GPU it measures nothing. A clock on the CPU stands in here."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu
import gpu_peers
import gpu_step
from gpu_rows import BATCHES, DTYPES, LAYOUTS, VARIANTS, Row, bytes_moved, in_turns, rows
from gpu_table import summary, verdicts
from gpu_timing import in_rounds, quartiles

ROOT = Path(__file__).resolve().parents[3]
ROW = Row("test", (4, 3, 6, 6), "float32", "channels_last", "add_relu")


class HostClock:
    """Microseconds on the host."""

    device = "cpu"

    def device_us(self, call):
        begun = time.perf_counter_ns()
        call()
        return max((time.perf_counter_ns() - begun) / 1e3, 0.1)

    host_us = device_us


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "needs a CUDA device" in ran.stderr
    assert "Nothing was measured" in ran.stderr
    assert not ran.stdout


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


def test_contenders_take_turns_on_their_buffers():
    called = []
    calls = {who: [lambda who=who, i=i: called.append((who, i)) for i in range(2)] for who in "ab"}
    found = in_rounds(lambda call: call() or 1.0, calls, 4)
    assert found == {"a": [1.0] * 4, "b": [1.0] * 4}
    assert set(called) == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row(variant, layout):
    row = Row("test", (4, 3, 6, 6), "float32", layout, variant)
    found = gpu.measure(row, HostClock(), False, 3)
    assert found["errors"]["ours"] <= 1
    assert set(found["times_us"]["both"]) == {"ours", "eager"}
    assert found["copy_bytes"] == 2 * row.x_bytes


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = gpu_peers.contenders

    def wrong(given, compiled):
        found = right(given, compiled)
        for peer in found["ours"]:
            layer = peer.layer
            peer.layer = lambda x, r, layer=layer: layer(x, r) * 1.001
        return found

    monkeypatch.setattr(gpu, "contenders", wrong)
    found = gpu.measure(ROW, HostClock(), False, 3)
    assert "times as far from the truth" in found["wrong"]
    assert "times_us" not in found


def test_a_training_step_before_and_after_fuse():
    found = gpu_step.measure_step(HostClock(), batch=4, side=32, rounds=2, depths=(1, 1, 1, 1))
    assert found["fused"] == 1 + 3 * 4  # the stem; three in each block, the sum fused into the last
    assert set(found["times_us"]) == {"before", "after"}
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in gpu_step.resnet50().modules()) == 53


def test_a_whole_run(tmp_path, monkeypatch):
    """Written row by row, and as a table with what was wanted beside what was found."""
    out = tmp_path / "gpu.json"
    arguments = gpu.parsed(["--out", str(out), "--rounds", "2", "--compiled", "0"])
    arguments.step_options = {"batch": 2, "side": 32, "rounds": 1, "depths": (1, 1, 1, 1)}
    content = gpu.run(arguments, [ROW], HostClock(), {"device": "a stand-in"})
    assert json.loads(out.read_text())["rows"][0]["name"] == ROW.name
    assert content["complete"]
    shown = summary(content)
    assert "a stand-in, 1 rows" in shown
    assert "not measured" in shown  # there is no row over 64 MB

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", interrupted)
    assert not gpu.run(arguments, [ROW], HostClock(), {"device": "a stand-in"})["complete"]
    assert json.loads(out.read_text())["step"] is not None


def made_up(ours, eager, compiled, x_bytes):
    times = {"ours": [0, ours, 0], "eager": [0, eager, 0], "compiled": [0, compiled, 0]}
    return {
        "name": "x", "variant": "relu", "dtype": "float32", "layout": "contiguous", "x_bytes": x_bytes,
        "bytes_moved": {"forward": 3 * x_bytes, "backward": 5 * x_bytes}, "copy_bytes": 2 * x_bytes,
        "copy_us": [0, 100.0, 0], "times_us": {"forward": times, "both": times}, "host_us": {"ours": [0, 9.0, 0]},
    }  # fmt: skip


def test_verdicts_by_hand():
    """400 us for eight times x, where a copy takes 100 us for two: 100 %; 500 us: 80 %."""
    content = {
        "rows": [made_up(400.0, 800.0, 360.0, 100e6), made_up(500.0, 500.0, 500.0, 1e6)],
        "step": {"faster": 0.05},
    }
    eager, compiled, bandwidth, step = verdicts(content)
    assert eager[1:] == ("1.41 x", "MISSED")  # the root of 2 x 1
    assert compiled[1:] == ("0.95 x", "MISSED")
    assert bandwidth[1:] == ("100 %", "met")
    assert step[1:] == ("5 %", "MISSED")
    assert [verdict[1] for verdict in verdicts({"rows": [], "step": None})] == ["not measured"] * 4
