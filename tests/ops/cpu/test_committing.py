"""The CPU's commit against the definition: what is written and what is refused, and which tensors it can be done to."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from steadynorm.ops.cpu.committing import commit
from steadynorm.ops.writable import committable
from support import Stats, stats, wide
from support_kernels import randn

DTYPES = (torch.float32, torch.float64)
# Rounded once, from float64: half a unit in the last place, and in float64 the few roundings of the sum itself.
ROUNDING = {torch.float32: 6.1e-8, torch.float64: 1e-15}
PAD, GUARD = 16, -12345


class Buffers(NamedTuple):
    """What is committed to, in the middle of memory that is not to be touched.

    Attributes:
        mean, var, tracked, rejected: As `commit` takes them.
        around: The tensors that they are views of.
    """

    mean: Tensor
    var: Tensor
    tracked: Tensor | None
    rejected: Tensor | None
    around: list[Tensor]

    def given(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self[:4]

    def copy(self) -> list[Tensor]:
        return [t.clone() for t in self.around]

    def check_guards(self) -> None:
        for whole in self.around:
            assert (whole[:PAD] == GUARD).all()
            assert (whole[-PAD:] == GUARD).all()


def buffers(channels: int, dtype: torch.dtype = torch.float32, tracked: int = 3) -> Buffers:
    """Running statistics of 0.5, 1.5, ... and 2, 3, ..., of so many batches and one rejected."""
    around = [torch.full((channels + 2 * PAD,), GUARD, dtype=dtype) for _ in range(2)]
    around += [torch.full((1 + 2 * PAD,), GUARD) for _ in range(2)]
    mean, var = (whole[PAD : PAD + channels] for whole in around[:2])
    counters = [whole[PAD] for whole in around[2:]]
    mean.copy_(torch.arange(channels) + 0.5)
    var.copy_(torch.arange(channels) + 2)
    counters[0].fill_(tracked)
    counters[1].fill_(1)
    return Buffers(mean, var, *counters, around)


def batch(channels: int, seed: int = 0, values: int = 7) -> Stats:
    """The statistics of a batch with values of mean 3, from the definition."""
    return stats(randn(values, channels, seed=seed, mean=3))


def table_of(batch: Stats) -> Tensor:
    return torch.from_numpy(np.stack(batch).astype(np.float64))


def assert_moved(found: Tensor, before: Tensor, towards: np.ndarray, share: float) -> None:
    wanted = (1 - np.longdouble(share)) * wide(before) + np.longdouble(share) * towards
    np.testing.assert_allclose(wide(found), wanted, rtol=ROUNDING[found.dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 67])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.25, 1.0])
def test_moves_towards_the_mean_and_the_unbiased_variance(momentum, channels, dtype):
    into, of = buffers(channels, dtype), batch(channels)
    mean, var = into.mean.clone(), into.var.clone()
    assert commit(*into.given(), table_of(of), momentum, False) is False
    assert_moved(into.mean, mean, of.mean, momentum)
    assert_moved(into.var, var, of.unbiased, momentum)
    assert (into.tracked.item(), into.rejected.item()) == (4, 1)
    into.check_guards()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_momentum_the_average_of_all_batches(dtype):
    into, batches = buffers(5, dtype, tracked=0), [batch(5, seed) for seed in range(6)]
    for of in batches:
        assert commit(*into.given(), table_of(of), None, False) is False
    rounding = len(batches) * ROUNDING[dtype]
    np.testing.assert_allclose(wide(into.mean), np.mean([of.mean for of in batches], 0), rtol=rounding)
    np.testing.assert_allclose(wide(into.var), np.mean([of.unbiased for of in batches], 0), rtol=rounding)
    assert (into.tracked.item(), into.rejected.item()) == (6, 1)
    into.check_guards()


def test_without_momentum_what_is_tracked_already_keeps_its_share():
    into, of = buffers(5), batch(5)
    mean, var = into.mean.clone(), into.var.clone()
    commit(*into.given(), table_of(of), None, False)
    assert_moved(into.mean, mean, of.mean, 1 / 4)
    assert_moved(into.var, var, of.unbiased, 1 / 4)


@pytest.mark.parametrize(
    ("count", "weighted", "refused"),
    [
        (0, False, False), (1, False, False), (0, True, False),
        (0.5, True, True), (1, True, True), (np.nextafter(2, 0), True, True),
    ],
)  # fmt: skip
def test_fewer_than_two_values_have_no_variance(count, weighted, refused):
    """Weights are repetitions: those that sum to less than 2, and not to nothing, are a mistake."""
    into = buffers(5)
    before = into.copy()
    table = table_of(batch(5)._replace(count=np.full(5, count)))
    assert commit(*into.given(), table, 0.1, weighted) is refused
    before[3][PAD] += refused
    for found, wanted in zip(into.around, before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("weighted", [False, True])
def test_two_values_have_one(weighted):
    into = buffers(5)
    of = batch(5, values=2)
    var = into.var.clone()
    assert commit(*into.given(), table_of(of), 0.1, weighted) is False
    assert_moved(into.var, var, of.unbiased, 0.1)


FLOAT32, FLOAT64 = (float(torch.finfo(dtype).max) for dtype in DTYPES)
INFINITE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
REFUSED = {
    **{f"{name} as the {what}": (torch.float64, what, v) for name, v in INFINITE.items() for what in Stats._fields[1:]},
    "no count": (torch.float32, "count", np.nan),
    "a mean beyond float32": (torch.float32, "mean", np.nextafter(FLOAT32, np.inf)),
    "a negative mean beyond float32": (torch.float32, "mean", -1e39),
    "a variance beyond float32": (torch.float32, "m2", 6 * np.nextafter(FLOAT32, np.inf)),
}


@pytest.mark.parametrize("channel", [0, 17, 66])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_finite_in_the_buffers_is_refused_whole(case, channel):
    """Wherever it is, nothing is written, and `rejected` counts it."""
    dtype, what, value = REFUSED[case]
    into, of = buffers(67, dtype), batch(67)
    getattr(of, what)[slice(None) if what == "count" else channel] = value
    before = into.copy()
    assert commit(*into.given(), table_of(of), 0.1, False) is True
    before[3][PAD] += 1
    for found, wanted in zip(into.around, before, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("dtype", "what", "value"),
    [
        (torch.float32, "mean", FLOAT32), (torch.float32, "mean", -FLOAT32), (torch.float32, "m2", 6 * FLOAT32),
        (torch.float64, "mean", -1e39), (torch.float64, "m2", 6e39),
        (torch.float64, "mean", FLOAT64), (torch.float64, "m2", FLOAT64),
    ],
)  # fmt: skip
def test_what_just_fits_is_committed(dtype, what, value):
    into, of = buffers(5, dtype), batch(5)
    getattr(of, what)[3] = value
    assert commit(*into.given(), table_of(of), 1.0, False) is False
    found, wanted = (into.mean, of.mean) if what == "mean" else (into.var, of.unbiased)
    np.testing.assert_allclose(wide(found), wanted, rtol=ROUNDING[dtype])
    into.check_guards()


def test_no_channels():
    into = buffers(0)
    assert commit(*into.given(), torch.empty(3, 0, dtype=torch.float64), 0.1, False) is False
    into.check_guards()


@pytest.mark.parametrize("counters", [("tracked",), ("rejected",), ("tracked", "rejected")], ids=str)
def test_counters_that_are_not_there(counters):
    into = buffers(5)._replace(**dict.fromkeys(counters))
    of, mean = batch(5), into.mean.clone()
    assert commit(*into.given(), table_of(of), 0.1, False) is False
    assert_moved(into.mean, mean, of.mean, 0.1)
    assert commit(*into.given(), table_of(of._replace(mean=of.mean * np.nan)), 0.1, False) is True
    assert into.around[2][PAD] == (3 if into.tracked is None else 4)
    assert into.around[3][PAD] == (1 if into.rejected is None else 2)
    into.check_guards()


def test_statistics_are_only_read():
    table = table_of(batch(5))
    before = table.clone()
    commit(*buffers(5).given(), table, 0.1, False)
    assert torch.equal(table, before)


def test_autograd_learns_that_the_buffers_have_changed():
    """As it does of any operation in place: a graph that has saved them is not differentiated with other values."""
    into = buffers(5)
    factor = torch.ones(5, requires_grad=True)
    product = factor * into.mean, factor * into.var
    versions = [t._version for t in (into.mean, into.var)]
    commit(*into.given(), table_of(batch(5)._replace(mean=np.full(5, np.nan))), 0.1, False)
    assert [t._version for t in (into.mean, into.var)] == versions  # refused, unchanged
    commit(*into.given(), table_of(batch(5)), 0.1, False)
    assert all(t._version > before for t, before in zip((into.mean, into.var), versions, strict=True))
    for y in product:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, factor, torch.ones(5))


def test_tensors_of_inference_mode_count_no_changes():
    of = batch(5)
    with torch.inference_mode():
        into = buffers(5)
        mean = into.mean.clone()
        assert commit(*into.given(), table_of(of), 0.1, False) is False
    assert_moved(into.mean, mean, of.mean, 0.1)


class Changed(Tensor):
    """Somebody's own kind of tensor."""


def at_intervals(values: Tensor) -> Tensor:
    return torch.stack([values, values], 1)[:, 0]


CHANNELS = 5
PLAIN = {
    "mean": torch.zeros(CHANNELS),
    "var": torch.ones(CHANNELS),
    "tracked": torch.tensor(3),
    "rejected": torch.tensor(0),
    "table": torch.zeros(3, CHANNELS, dtype=torch.float64),
    "momentum": 0.1,
}
PLAIN_64 = {**PLAIN, "mean": PLAIN["mean"].double(), "var": PLAIN["var"].double()}


@pytest.mark.parametrize(
    "given",
    [
        PLAIN, PLAIN_64, {**PLAIN, "momentum": None}, {**PLAIN, "rejected": None}, {**PLAIN, "tracked": None},
        {**PLAIN, "tracked": torch.tensor([3])}, {**PLAIN, "table": PLAIN["table"][1]},
    ],
    ids=["plain", "float64", "no momentum", "no rejected", "no tracked", "tracked of shape (1,)", "a mean for a table"],
)  # fmt: skip
def test_what_can_be_committed_to(given):
    assert committable(**given) is True


UNSUITABLE = {
    "var of another dtype": {"var": PLAIN["var"].double()},
    "mean of another dtype": {"mean": PLAIN["mean"].double()},
    "half precision": {"mean": PLAIN["mean"].half(), "var": PLAIN["var"].half()},
    "bfloat16": {"mean": PLAIN["mean"].bfloat16(), "var": PLAIN["var"].bfloat16()},
    "mean of a subclass": {"mean": PLAIN["mean"].as_subclass(Changed)},
    "var of a subclass": {"var": PLAIN["var"].as_subclass(Changed)},
    "mean a parameter": {"mean": torch.nn.Parameter(PLAIN["mean"])},
    "mean elsewhere": {"mean": PLAIN["mean"].to("meta")},
    "var elsewhere": {"var": PLAIN["var"].to("meta")},
    "both elsewhere": {"mean": PLAIN["mean"].to("meta"), "var": PLAIN["var"].to("meta")},
    "counters elsewhere": {"tracked": PLAIN["tracked"].to("meta"), "rejected": PLAIN["rejected"].to("meta")},
    "table elsewhere": {"table": PLAIN["table"].to("meta")},
    "mean of another size": {"mean": torch.zeros(CHANNELS - 1)},
    "var of another size": {"var": torch.ones(CHANNELS + 1)},
    "both of another size": {"mean": torch.zeros(1), "var": torch.ones(1)},
    "table of another size": {"table": torch.zeros(3, CHANNELS - 1, dtype=torch.float64)},
    "mean at intervals": {"mean": at_intervals(PLAIN["mean"])},
    "var at intervals": {"var": at_intervals(PLAIN["var"])},
    "mean one number for all": {"mean": torch.zeros(1).expand(CHANNELS)},
    "tracked int32": {"tracked": torch.tensor(3, dtype=torch.int32)},
    "tracked of two": {"tracked": torch.tensor([3, 3])},
    "tracked of none": {"tracked": torch.empty(0, dtype=torch.int64)},
    "tracked elsewhere": {"tracked": PLAIN["tracked"].to("meta")},
    "tracked of a subclass": {"tracked": PLAIN["tracked"].as_subclass(Changed)},
    "rejected float": {"rejected": torch.tensor(0.0, dtype=torch.float64)},
    "rejected of two": {"rejected": torch.tensor([0, 0])},
    "rejected elsewhere": {"rejected": PLAIN["rejected"].to("meta")},
    "rejected of a subclass": {"rejected": PLAIN["rejected"].as_subclass(Changed)},
    "the average of untold batches": {"tracked": None, "momentum": None},
}


@pytest.mark.parametrize("case", UNSUITABLE)
def test_what_can_not_be(case):
    assert committable(**{**PLAIN, **UNSUITABLE[case]}) is False
