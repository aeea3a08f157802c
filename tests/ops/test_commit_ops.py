"""commit_, hold_ and corrections as operators of torch.library: their schemas, and that they write what is theirs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from steadynorm.nn.correcting import Corrector
from steadynorm.nn.renorm import Renorm
from steadynorm.ops import commit as committing
from steadynorm.ops.commit import Running, commit, hold
from steadynorm.ops.reference import Statistics
from support import assert_close, stats

OPS = torch.ops.steadynorm


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def measured(x: Tensor) -> Statistics:
    return Statistics(*(torch.from_numpy(part.astype("f8")) for part in stats(x)))


def fresh(dtype: torch.dtype = torch.float32) -> Running:
    return Running(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(0), torch.tensor(0))


def nothing_held() -> Statistics:
    return Statistics(*(torch.zeros(3, dtype=torch.float64) for _ in range(3)))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory holds NaN (or the largest integer) until it is written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


class Counted(TorchDispatchMode):
    """A dispatch mode, as selective checkpointing is one, that notes which operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class TestOpcheck:
    """Schema (what is mutated, nothing else), autograd registration, fake tensors, AOT dispatch with dynamic shapes."""

    @pytest.mark.parametrize(("counters", "momentum"), [(2, 0.1), (2, None), (1, None), (0, 0.1)], ids=str)
    def test_commit(self, counters, momentum):
        mean, var, *counted = fresh()
        counted[counters:] = [None] * (2 - counters)
        opcheck(OPS.commit_.default, (mean, var, *counted, *measured(rand(5, 3)), momentum, False))

    def test_commit_of_a_bad_batch_and_of_a_weighted_one(self):
        bad, light = measured(rand(5, 3)), measured(rand(5, 3))
        bad.mean[1] = torch.nan
        light.count.fill_(0.5)
        for statistics in (bad, light):
            opcheck(OPS.commit_.default, (*fresh(), *statistics, 0.1, True))

    @pytest.mark.parametrize("counted", [True, False])
    def test_hold(self, counted):
        rejected = torch.tensor(0) if counted else None
        opcheck(OPS.hold_.default, (*nothing_held(), rejected, *measured(rand(5, 3))))

    @pytest.mark.parametrize("counted", [True, False])
    def test_corrections(self, counted):
        corrector = Corrector(Renorm(warmup=0, ramp=0))
        tracked = torch.tensor(3) if counted else None
        arguments = (*measured(rand(5, 3)), torch.zeros(3), torch.ones(3), tracked, 1e-5, corrector._number)
        opcheck(OPS.corrections.default, arguments)


@pytest.mark.usefixtures("poisoned_memory")
class TestValues:
    """The operators compute what the definition says, into memory of which nothing shows."""

    @pytest.mark.parametrize("look", [True, False], ids=["host", "device"])
    def test_commit(self, look, monkeypatch):
        monkeypatch.setattr(committing, "_host_may_look", lambda statistics: look)
        running, x = fresh(torch.float64), rand(5, 3)
        OPS.commit_(*running, *measured(x), 0.25, False)
        assert_close(running.mean, 0.25 * stats(x).mean, "statistic")
        assert_close(running.var, 0.75 + 0.25 * stats(x).unbiased, "variance")
        assert (running.num_batches_tracked.item(), running.rejected.item()) == (1, 0)

    @pytest.mark.parametrize("look", [True, False], ids=["host", "device"])
    def test_hold_merges_and_leaves_out_what_is_not_finite(self, look, monkeypatch):
        monkeypatch.setattr(committing, "_host_may_look", lambda statistics: look)
        held, rejected, parts = nothing_held(), torch.tensor(0), [rand(4, 3), rand(2, 3, seed=1) + 9]
        for field in ("count", "mean", "m2"):
            bad = measured(parts[0])
            getattr(bad, field)[0] = torch.nan if field == "mean" else torch.inf
            OPS.hold_(*held, rejected, *bad)
        assert all(not t.any() for t in held)
        for part in parts:
            OPS.hold_(*held, rejected, *measured(part))
        expected = stats(torch.cat(parts))
        for found, wanted in zip(held, expected, strict=True):
            assert_close(found, wanted, "statistic")
        assert rejected.item() == 3

    def test_corrections_are_new_tensors_within_the_limits(self):
        corrector, x = Corrector(Renorm(r_max=1.5, d_max=0.5, warmup=0, ramp=0)), rand(50, 3)
        mean, variance = torch.tensor([0.9, 0.9, 3.0]).double(), torch.tensor([4.0, 0.25, 4.0]).double()
        r, d = OPS.corrections(*measured(x), mean, variance, torch.tensor(1), 1e-5, corrector._number)
        whole = stats(x)
        sigma = (variance.numpy() + 1e-5) ** 0.5
        ratio, distance = (whole.biased + 1e-5) ** 0.5 / sigma, (whole.mean - mean.numpy()) / sigma
        assert_close(r, ratio.clip(1 / 1.5, 1.5), "statistic")
        assert_close(d, distance.clip(-0.5, 0.5), "statistic")
        assert r[1].item() == 1.5
        assert d[2].item() == -0.5

    @pytest.mark.parametrize("what", ["mean", "var"])
    def test_a_buffer_that_already_holds_nan_stays_apart_from_the_other(self, what):
        running, x = fresh(torch.float64), rand(5, 3)
        getattr(running, what).fill_(torch.nan)
        OPS.commit_(*running, *measured(x), 0.25, False)
        if what == "mean":
            assert_close(running.var, 0.75 + 0.25 * stats(x).unbiased, "variance")
        else:
            assert_close(running.mean, 0.25 * stats(x).mean, "statistic")


class TestWhereTheyStandIn:
    """Under a dispatch mode one operator stands for a commit; a recomputation calls none."""

    def test_under_a_dispatch_mode(self):
        running, held, statistics = fresh(), nothing_held(), measured(rand(5, 3))
        with Counted() as mode:
            commit(running, statistics, 0.1)
            hold(held, statistics)
        work = [name for name in mode.seen if "detach" not in name]
        assert work == ["steadynorm::commit_", "steadynorm::hold_"]
        assert running.num_batches_tracked.item() == 1
        assert held.count.tolist() == [5, 5, 5]

    def test_within_a_backward_nothing_is_written_and_no_operator_called(self):
        running, held, statistics = fresh(), nothing_held(), measured(rand(5, 3))
        seen: list[str] = []

        class Backward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                with Counted() as mode:
                    assert commit(running, statistics, 0.1) is False
                    assert hold(held, statistics) is False
                seen.extend(mode.seen)
                OPS.commit_(*running, *statistics, 0.1, False)  # as a compiled graph calls it
                OPS.hold_(*held, running.rejected, *statistics)
                return grad

        Backward.apply(torch.ones(1, requires_grad=True)).backward()
        assert seen == []
        assert running.num_batches_tracked.item() == 0
        assert held.count.tolist() == [0, 0, 0]
        commit(running, statistics, 0.1)  # and afterwards as ever
        assert running.num_batches_tracked.item() == 1
