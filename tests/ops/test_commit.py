"""commit: what is written, what is refused, and that both of its paths agree with the definition."""

import pytest
import torch

from steadynorm.errors import ArgumentError
from steadynorm.ops import commit as committing
from steadynorm.ops.commit import Running, commit
from steadynorm.ops.reference import Statistics


@pytest.fixture(params=["host", "device"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to commit: where the host may look at values, and where it may not (a device, a compiled graph)."""
    if request.param == "device":
        monkeypatch.setattr(committing, "_host_may_look", lambda statistics: False)
    return request.param


class State:
    def __init__(self, dtype: torch.dtype = torch.float32):
        self.mean, self.variance = torch.tensor([1.0, -2.0], dtype=dtype), torch.tensor([4.0, 0.5], dtype=dtype)
        self.tracked, self.rejected = torch.tensor(0), torch.tensor(0)

    def commit(self, count, mean, m2, momentum: float | None = 0.25) -> bool:
        statistics = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in ([count] * 2, mean, m2)))
        return bool(commit(Running(self.mean, self.variance, self.tracked, self.rejected), statistics, momentum))

    def values(self):
        return self.mean.tolist(), self.variance.tolist(), self.tracked.item(), self.rejected.item()


UNTOUCHED = ([1.0, -2.0], [4.0, 0.5], 0)


def test_moves_by_the_momentum_towards_mean_and_unbiased_variance():
    state = State()
    assert state.commit(5, [3.0, 2.0], [16.0, 8.0]) is False
    assert state.values() == ([1.5, -1.0], [4.0, 0.875], 1, 0)  # 3/4 old + 1/4 new; the variances are 16/4 and 8/4


def test_momentum_1_takes_the_batch_and_momentum_0_keeps_the_old():
    state = State()
    state.commit(3, [7.0, 8.0], [2.0, 4.0], momentum=0.0)
    assert state.values() == (*UNTOUCHED[:2], 1, 0)
    state.commit(3, [7.0, 8.0], [2.0, 4.0], momentum=1.0)
    assert state.values() == ([7.0, 8.0], [1.0, 2.0], 2, 0)


def test_no_momentum_is_the_average_of_all_batches():
    state = State(torch.float64)
    for mean, m2 in ((1.0, 3.0), (2.0, 6.0), (6.0, 0.0)):
        state.commit(4, [mean, -mean], [m2, 2 * m2], momentum=None)
    assert state.mean.tolist() == pytest.approx([3, -3])
    assert state.variance.tolist() == pytest.approx([1, 2])
    assert state.tracked.item() == 3


@pytest.mark.parametrize("count", [0, 1, 0.5])
def test_a_batch_without_a_variance_changes_nothing(count):
    state = State()
    assert state.commit(count, [9.0, 9.0], [1.0, 1.0]) is False
    assert state.values() == (*UNTOUCHED, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_one_bad_number_in_one_channel_rejects_the_whole_batch(bad):
    for mean, m2 in (([bad, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 4 * bad])):  # 1e39 does not fit float32
        state = State()
        assert state.commit(5, mean, m2) is True
        assert state.values() == (*UNTOUCHED, 1)


def test_opposite_infinities_do_not_cancel():
    state = State()
    assert state.commit(5, [float("inf"), float("-inf")], [1.0, 1.0]) is True
    assert state.values() == (*UNTOUCHED, 1)


def test_large_values_that_fit_are_committed():
    state = State()
    assert state.commit(5, [3e38, 3e38], [3e38, 3e38], momentum=1.0) is False
    assert state.rejected.item() == 0
    assert state.mean.tolist() == pytest.approx([3e38, 3e38])


def test_a_variance_too_wide_for_half_precision_buffers_is_rejected():
    state = State(torch.float16)
    assert state.commit(2, [0.0, 0.0], [1e5, 1.0]) is True
    assert state.values() == (*UNTOUCHED, 1)
    assert state.commit(2, [0.0, 0.0], [6e4, 1.0], momentum=1.0) is False


def test_counters_are_optional_but_the_average_needs_one():
    mean, variance = torch.zeros(2), torch.ones(2)
    statistics = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in ([5, 5], [2.0, 4.0], [4.0, 8.0])))
    commit(Running(mean, variance), statistics, 0.5)
    assert (mean.tolist(), variance.tolist()) == ([1, 2], [1, 1.5])
    with pytest.raises(ArgumentError, match=r"momentum=None.*num_batches_tracked"):
        commit(Running(mean, variance), statistics, None)


def test_builds_no_graph():
    mean, variance = torch.zeros(2), torch.ones(2)
    statistics = Statistics(
        *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([5.0] * 2, [2.0] * 2, [4.0] * 2))
    )
    commit(Running(mean, variance), statistics, 0.5)
    assert not mean.requires_grad
    assert not variance.requires_grad
