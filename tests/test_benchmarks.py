"""The benchmarks measure what they say: the bytes of the floor, the oracle, the memory, the models and the tables."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cpu
import cpu_table
import folding
import training_steps
from cpu_oracle import EPS, Outcome, Problem, worst_error
from cpu_peers import contenders, floor, kept_for_backward, problem_of
from cpu_rows import BATCHES, MLPS, Row, band, floor_transfers, full_suite, quantiles, select
from cpu_timing import interleaved, percentiles
from folding_models import OURS
from models import MODELS, norm_shapes, torch_norm

ROOT = Path(__file__).resolve().parent.parent
SMALL = Row("test", (8, 6, 4, 4), "float32", "contiguous", "relu")


# --- the rows -------------------------------------------------------------------------------------------------------


def test_the_suite_covers_what_it_is_for():
    rows = full_suite()
    assert len({row.name for row in rows}) == len(rows)
    assert {row.network for row in rows} == {"resnet50", "mobilenet_v2", "u_net", "mlp"}
    assert {row.shape[0] for row in rows if len(row.shape) == 4} == set(BATCHES)
    assert {row.shape for row in rows if row.network == "mlp"} == set(MLPS)
    kinds = {(row.dtype, row.layout, row.variant, band(row.x_bytes)) for row in rows}
    assert len(kinds) == 2 * 2 * 3 * 3
    sizes = [row.x_bytes for row in rows if (row.dtype, row.variant) == ("float32", "relu")]
    assert min(sizes) <= 33e3
    assert max(sizes) >= 200e6
    names = [row.name for row in select("small", None)]
    assert 20 <= len(names) <= 50
    assert set(names) < {row.name for row in rows}
    assert [row.shape for row in select("full", r"^mlp 128x64 float32 .* relu$")] == [(128, 64)]


def test_every_batch_norm_of_the_networks_is_in_the_suite():
    channels = {network: {row.shape[1:] for row in full_suite() if row.network == network} for network in MODELS}
    assert set(norm_shapes("resnet50")) == channels["resnet50"]
    # Two networks may share an input: it is measured once.
    assert set(norm_shapes("mobilenet_v2")) <= channels["mobilenet_v2"] | channels["resnet50"]


@pytest.mark.parametrize(("size", "name"), [(999_999, "small"), (1e6, "medium"), (32e6, "medium"), (32e6 + 1, "large")])
def test_bands(size: float, name: str):
    assert band(size) == name


def test_quantiles_spread_over_the_sizes():
    rows = full_suite()
    found = quantiles(rows, 5)
    able = [row.x_bytes for row in rows if row.x_bytes > 1e6 and (row.dtype, row.variant) == ("float32", "relu")]
    assert [found[0].x_bytes, found[-1].x_bytes] == [min(able), max(able)]
    assert len(set(found)) == 5
    assert quantiles(rows, 0) == []
    assert quantiles(rows[:1], 3) == []


# --- the floor ------------------------------------------------------------------------------------------------------


class Moved(TorchDispatchMode):
    """Counts the bytes that copies and sums read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, sources = args[0], args[1:]
        elif func is torch.ops.aten.add.out:
            target, sources = kwargs["out"], args[:2]
        else:
            raise AssertionError(f"the floor should only copy and add, not {func}")
        self.read += sum(source.nbytes for source in sources)
        self.written += target.nbytes
        return func(*args, **(kwargs or {}))


# (read, written) in whole activations: forward, then backward.
FLOORS = {"plain": ((1, 1), (2, 1)), "relu": ((1, 1), (2, 1)), "add_relu": ((2, 1), (3, 2))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", FLOORS)
def test_the_floor_moves_the_bytes_that_must_move_and_no_more(variant: str, dtype: str):
    row = replace(SMALL, variant=variant, dtype=dtype)
    forward, backward = FLOORS[variant]
    assert (floor_transfers(variant, "forward"), floor_transfers(variant, "backward")) == (forward, backward)
    copies = floor(row)
    for which, wanted in {"forward": forward, "both": tuple(map(sum, zip(forward, backward, strict=True)))}.items():
        with Moved() as moved:
            copies[which]()
        assert (moved.read, moved.written) == tuple(n * row.x_bytes for n in wanted)


# --- the oracle and the contenders -----------------------------------------------------------------------------------


def by_autograd(problem: Problem) -> Outcome:
    """From the definition of the forward alone."""
    inputs = [problem.x, problem.weight, problem.bias, *([] if problem.residual is None else [problem.residual])]
    x, weight, bias, *residual = (t.detach().double().requires_grad_() for t in inputs)
    channels = (1, -1, *(1,) * (x.dim() - 2))
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = weight.view(channels) * (x - mean) / (variance + EPS).sqrt() + bias.view(channels) + sum(residual)
    y = y.clamp_min(0) if problem.rectify else y
    grads = torch.autograd.grad(y, [x, weight, bias, *residual], problem.gradient.double())
    return Outcome(y.detach(), grads[0], grads[1], grads[2], grads[3] if residual else None)


@pytest.mark.parametrize("variant", FLOORS)
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4, 2)], ids=["columns", "planes"])
def test_the_oracle_accepts_the_truth_and_nothing_else(shape: tuple[int, ...], variant: str):
    problem = problem_of(replace(SMALL, shape=shape, variant=variant))
    problem = Problem(*(t.double() if isinstance(t, torch.Tensor) else t for t in vars(problem).values()))
    truth = by_autograd(problem)
    assert worst_error(problem, truth) < 1e-3
    for name, tensor in vars(truth).items():
        if tensor is not None:
            off = tensor.clone()
            off[-1] = off[-1] * (1 + 1e-6) + 1e-6
            assert worst_error(problem, replace(truth, **{name: off})) > 1, name
            off[0] = float("nan")
            assert worst_error(problem, replace(truth, **{name: off})) == float("inf"), name


def test_the_oracle_looks_at_every_part_of_a_large_input(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cpu_oracle.CHUNK", 40)
    problem = problem_of(SMALL)
    truth = by_autograd(problem)
    assert worst_error(problem, truth) < 1
    for channel in range(6):
        off = truth.dx.clone()
        off[0, channel, 0, 0] += 0.1
        assert worst_error(problem, replace(truth, dx=off)) > 1, channel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", FLOORS)
def test_every_contender_computes_the_row(variant: str, layout: str, dtype: str):
    row = replace(SMALL, variant=variant, layout=layout, dtype=dtype)
    problem = problem_of(row)
    assert problem.x.is_contiguous(memory_format=getattr(torch, f"{layout}_format".replace("last_format", "last")))
    peers, skipped = contenders(row, problem, compiled=False)
    assert {"ours", "eager"} <= set(peers)
    assert ("in_place" in peers) == (variant != "plain")
    assert ("onednn" in peers) != ("onednn" in skipped)
    for name, peer in peers.items():
        assert worst_error(problem, peer.outcome()) <= (1 if name == "ours" else cpu.LENIENCE), name
        peer.both()
        assert all(leaf.grad is None for leaf in peer.leaves)


def test_memory_kept_for_backward_counts_each_storage_once():
    x, scale = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    assert kept_for_backward(lambda: (x * scale).relu(), []) == 3 * 400
    assert kept_for_backward(lambda: (x * scale).relu(), [scale]) == 2 * 400
    assert kept_for_backward(lambda: x[:50] * x[50:], []) == 400
    peers, _ = contenders(SMALL, problem_of(SMALL), compiled=False)
    per_channel = 2 * 4 * 6
    assert cpu.weigh(peers["eager"]) == 2 * SMALL.x_bytes + per_channel  # what it normalised, and the ReLU's output
    assert cpu.weigh(peers["ours"]) - SMALL.x_bytes <= 8 * per_channel


def test_contenders_are_timed_in_turns_and_in_changing_order():
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    samples = interleaved(calls, seconds=0.0)
    assert {len(found) for found in samples.values()} == {5}
    order = "".join(name for name, before in zip(called[1:], called, strict=False) if name != before)
    assert len({order[i : i + 3] for i in range(3, len(order) - 2, 3)}) > 1
    assert percentiles([float(i) for i in range(101)]) == [20.0, 50.0, 80.0]


# --- the models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032), ("mobilenet_v2", 3_504_872)]
)
def test_models_have_the_published_number_of_parameters(name: str, parameters: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in MODELS[name](torch_norm).parameters()) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_both_norms_make_the_same_network(name: str):
    # Images of 32 x 32 would leave two values a channel at the end, where gradients are all cancellation.
    pair = training_steps.trainings(name, (2, 3, 64, 64), "contiguous", torch.float64)
    loss, gradient = training_steps.checked_difference(pair)
    assert 0 <= loss < 1e-12
    assert 0 <= gradient < 1e-9


def test_networks_that_differ_are_refused():
    pair = training_steps.trainings("resnet18", (2, 3, 64, 64), "contiguous", torch.float64)
    with torch.no_grad():
        pair["ours"].model[1].weight[0] += 1e-6
    with pytest.raises(ArithmeticError, match="differ by"):
        training_steps.checked_difference(pair)


# --- the tables -----------------------------------------------------------------------------------------------------


def test_geometric_mean():
    assert cpu_table.geometric_mean([1.0, 4.0]) == pytest.approx(2.0, rel=1e-15)
    assert cpu_table.geometric_mean([8.0, 1.0, 1.0]) == pytest.approx(2.0, rel=1e-15)
    with pytest.raises(ValueError, match="one value at least"):
        cpu_table.geometric_mean([])


def timed(x_bytes: float, variant: str = "relu", **medians: float) -> dict:
    times = {peer: [0.5 * median, median, 2 * median] for peer, median in medians.items()}
    over_floor = {peer: median / medians["floor"] for peer, median in medians.items()}
    of_pass = {"rounds": 5, "times_us": times, "over_floor": over_floor}
    return {
        "name": f"row {x_bytes} {variant}", "network": "test", "shape": [4, 2], "dtype": "float32",
        "layout": "contiguous", "variant": variant, "x_bytes": x_bytes, "passes": {"forward": of_pass, "both": of_pass},
        "kept_bytes": {"ours": x_bytes, "eager": 2 * x_bytes}, "errors": {}, "skipped": {},
    }  # fmt: skip


def test_tables_say_what_was_timed():
    rows = [
        timed(2e6, ours=10, eager=40, floor=5),
        timed(3e6, ours=10, eager=90, compiled=200, floor=5),
        timed(64e6, ours=30, eager=60, floor=20),
        timed(2e6, variant="plain", ours=20, eager=10, floor=10),
    ]
    assert cpu_table.readme_table(rows).splitlines()[2:] == [
        "| 1 to 32 MB | 2 | 2.00 | 12.00 | 6.00 × | 20.00 × (1) |",
        "| over 32 MB | 1 | 1.50 | 3.00 | 2.00 × | – |",
    ]
    assert cpu_table.full_table(rows, "both", "float32").splitlines()[2:] == [
        "| BN + ReLU, contiguous, 1 to 32 MB | 2 | 2.00 | 12.00 | 6.00 × | – | – | 20.00 × (1) | 4.00 × |",
        "| BN + ReLU, contiguous, over 32 MB | 1 | 1.50 | 3.00 | 2.00 × | – | – | – | 2.00 × |",
        "| BN, contiguous, 1 to 32 MB | 1 | 2.00 | 1.00 | 0.50 × | – | – | – | 0.50 × |",
    ]
    assert cpu_table.memory_table(rows).splitlines()[2:] == [
        "| BN | 1 | 1.00 | 2.00 |",
        "| BN + ReLU | 3 | 1.00 | 2.00 |",
    ]
    again = [timed(64e6, ours=20, eager=50, floor=20)]
    assert cpu_table.huge_pages_table(rows, again).splitlines()[2:] == [
        "| 4×2, contiguous | 0.03 | 0.06 | 0.02 | 0.02 | 0.05 | 0.02 |"
    ]
    step = {
        "model": "resnet18", "shape": [16, 3, 128, 128], "layout": "channels_last",
        "times_ms": {"eager": [190, 200, 210], "ours": [140, 150, 160]}, "kept_bytes": {"eager": 9e6, "ours": 6e6},
    }  # fmt: skip
    assert cpu_table.training_table({"rows": [step]}).splitlines()[2:] == [
        "| ResNet-18, 16×3×128×128, channels last | 200 | 150 | 25 % | 9 | 6 |"
    ]


def test_a_run_becomes_pages_and_a_picture(tmp_path: Path):
    results = tmp_path / "results"
    row = cpu.measure(SMALL, compiled=False, seconds=0.0)
    assert row["passes"]["both"]["over_floor"]["floor"] == 1.0
    assert row["errors"]["ours"] <= 1
    content = {"machine": cpu.machine(), "rows": [row], "huge_pages": [row]}
    cpu.write(results / "cpu.json", content)
    assert json.loads((results / "cpu.json").read_text())["rows"] == json.loads(json.dumps([row]))
    for page in cpu_table.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    pytest.importorskip("matplotlib")
    cpu_table.write_pages(tmp_path, results)
    for page in cpu_table.PAGES:
        text = (tmp_path / page).read_text()
        assert text.startswith("before\n<!-- speed -->\n")
        assert text.endswith("|\n<!-- /speed -->\nafter\n")
        assert "old" not in text
    assert (tmp_path / "docs/assets/speed.svg").read_text().count("steadynorm") == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(("path", "page"), cpu_table.PAGES.items())
def test_the_speed_tables_say_what_the_measurements_do(path: str, page: str):
    written = re.search(r"<!-- speed -->\n(.*?)<!-- /speed -->", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)
    assert written[1] == cpu_table.block(page), "run python benchmarks/cpu_table.py"


def test_the_folding_table_says_what_was_measured():
    page = folding.GUIDE.read_text(encoding="utf-8")
    assert folding.written(page) == page, "run python benchmarks/folding.py --tables"
    rows = {row["network"]: row for row in json.loads(folding.MEASURED.read_text())["networks"]}
    assert set(OURS) <= set(rows)
    assert all(row["fx"] <= row["folded"] <= row["batch_norms"] and row["error"] <= 1e-4 for row in rows.values())


def test_a_row_of_the_folding_table():
    row = folding.measured("RepVGG", 0.0)
    # The stem; four blocks of two convolutions and a batch norm alone; two that stride, without the last.
    assert row["batch_norms"] == row["folded"] == 1 + 4 * 3 + 2 * 2
    assert row["left"] == []
    assert row["error"] <= 1e-5
    assert folding.line(row).count("|") == 12
