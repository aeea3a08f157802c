"""Timing on a device: in which order its clock asks for what. Something that keeps a diary stands in for CUDA here."""

from types import SimpleNamespace

import pytest
import torch

import gpu_timing
from gpu_timing import MOST_AHEAD_US, DeviceClock, in_rounds, quartiles


class Cuda:
    """Notes what is asked of it. Events are a millisecond apart; `late` says that the host was held up."""

    def __init__(self):
        self.diary = []
        self.late = False
        self.slept = None

    def Event(self, enable_timing):
        assert enable_timing
        return SimpleNamespace(
            record=lambda: self.diary.append("event"), query=lambda: self.late, elapsed_time=lambda other: 1.0
        )

    def synchronize(self):
        self.diary.append("wait")

    def empty_cache(self):
        self.diary.append("free")

    def _sleep(self, cycles):
        self.slept = cycles
        self.diary.append("sleep")

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1000)


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()
    monkeypatch.setattr(gpu_timing.torch, "cuda", found)
    empty = torch.empty
    monkeypatch.setattr(gpu_timing.torch, "empty", lambda *size, device, **options: empty(*size, **options))
    return found


def test_the_cache_is_flushed_and_the_call_queued_before_it_is_timed(cuda):
    clock = DeviceClock()
    assert clock.flushed.nbytes == 4000  # four times the cache
    clock.flushed = SimpleNamespace(zero_=lambda: cuda.diary.append("flush"))
    clock.ahead_us = 300.0
    assert clock.device_us(lambda: cuda.diary.append("call")) == 1000.0
    assert cuda.diary == ["wait", "flush", "sleep", "event", "call", "event", "wait"]
    assert cuda.slept >= 300 * 1980  # an H100 runs at 1980 cycles in a microsecond at most
    assert clock.late == 0


def test_a_host_that_is_late_is_counted_and_never_waited_for_long(cuda):
    clock = DeviceClock()
    cuda.late = True
    clock.ahead_us = 1e9
    clock.device_us(lambda: None)
    assert cuda.slept == MOST_AHEAD_US * gpu_timing.CYCLES_PER_US
    assert clock.late == 1
    cuda.diary.clear()
    clock.ahead_us = 0
    clock.device_us(lambda: None)
    assert "sleep" not in cuda.diary
    clock.settle()
    assert clock.late == 0
    assert cuda.diary[-2:] == ["wait", "free"]


def test_the_hosts_time_ends_before_the_device_is_waited_for(cuda):
    assert DeviceClock().host_us(lambda: cuda.diary.append("call")) > 0
    assert cuda.diary == ["wait", "call", "wait"]


def test_without_its_tool_the_driver_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert gpu_timing.driver() is None


def test_contenders_take_turns_on_their_buffers():
    called = []
    calls = {who: [lambda who=who, i=i: called.append((who, i)) for i in range(2)] for who in "ab"}
    found = in_rounds(lambda call: call() or 1.0, calls, 4)
    assert found == {"a": [1.0] * 4, "b": [1.0] * 4}
    assert set(called) == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([7.0]) == [7.0] * 3
