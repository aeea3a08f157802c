"""Huge pages are asked for where a result is large; the advice may fail, the memory is usable all the same."""

import sys

import pytest
import torch

from steadynorm.ops.cpu import pages

LARGE = 1 << 22
PAGE = 1 << 21


@pytest.fixture
def advised(monkeypatch):
    """What the system is advised of, which it refuses."""
    calls: list[tuple[int, int, int]] = []

    def refusing(*arguments: int) -> int:
        calls.append(arguments)
        return -1

    monkeypatch.setattr(pages, "_madvise", lambda: refusing)
    return calls


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(LARGE // 4),
        torch.empty(3, 5, 300, 310).contiguous(memory_format=torch.channels_last),
        torch.empty(LARGE // 2, dtype=torch.bfloat16),
        torch.empty(LARGE // 8 + 77, dtype=torch.float64),
    ],
    ids=["float32", "channels last", "bfloat16", "float64"],
)
def test_advice_is_given_for_whole_pages_within_a_large_result(x, advised):
    fresh = pages.empty_like(x)
    ((start, size, advice),) = advised
    begin, end = fresh.data_ptr(), fresh.data_ptr() + fresh.numel() * fresh.element_size()
    assert begin <= start < start + size <= end
    assert start % PAGE == size % PAGE == 0
    assert start - begin < PAGE
    assert end - (start + size) < PAGE
    assert advice == 14  # MADV_HUGEPAGE of Linux
    assert (fresh.shape, fresh.stride(), fresh.dtype) == (x.shape, x.stride(), x.dtype)
    assert fresh.fill_(1).sum(dtype=torch.float64) == x.numel()


def test_no_advice_for_a_small_result(advised):
    for x in (torch.empty(LARGE // 4 - 1), torch.empty(0), torch.empty(LARGE // 4, 8, dtype=torch.bool)[:, 0]):
        assert pages.empty_like(x).shape == x.shape
    assert advised == []


def test_the_system_s_own_advice_leaves_memory_usable():
    fresh = pages.empty_like(torch.empty(1 << 20, 3))
    fresh.fill_(2)
    assert fresh.sum() == 6 << 20


def test_where_there_is_no_such_advice(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert pages._madvise.__wrapped__() is None
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert pages.empty_like(torch.empty(LARGE)).fill_(3)[-1] == 3
