"""Half precision by shifts of bits against numpy's and torch's conversions; scratch; who takes which task."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from numba import carray, cfunc, njit, types

from steadynorm.ops.cpu.call import Call, Kinds, record
from steadynorm.ops.cpu.compiling import FAST
from steadynorm.ops.cpu.memory import PHASES, load, room, store, take

NAN, INF = float("nan"), float("inf")
KINDS = {torch.bfloat16: np.uint16, torch.float16: np.int16}


@njit(**FAST)
def widened(halves, out):
    for i in range(out.size):
        out[i] = load(halves, i)


@njit(**FAST)
def narrowed(values, out):
    for i in range(out.size):
        store(out, i, values[i])


def every_pattern(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """All 65,536 halves as kernels see them, and their values by torch."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    return patterns.view(KINDS[dtype]), torch.from_numpy(patterns.view(np.int16)).view(dtype).double().numpy()


def to_nearest(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The bits of the nearest halves, ties to even, by torch for bfloat16 and by numpy for float16."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    out = np.full(values.size, 0x5A5A, np.uint16)
    narrowed(values, out.view(KINDS[dtype]))
    return out


@pytest.mark.parametrize("dtype", KINDS)
def test_every_pattern_is_read_as_what_it_is(dtype):
    halves, wanted = every_pattern(dtype)
    found = np.empty(halves.size, np.float32)
    widened(halves, found)
    np.testing.assert_array_equal(found, wanted)  # NaN equals NaN
    assert (np.signbit(found) == np.signbit(wanted))[~np.isnan(wanted)].all()
    if dtype == torch.float16:  # numpy's own conversion, too
        np.testing.assert_array_equal(found, halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("dtype", KINDS)
def test_what_fits_is_written_back_as_it_was(dtype):
    halves, values = every_pattern(dtype)
    found, kept = rounded(values.astype(np.float32), dtype), halves.view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], kept[number])
    _, again = every_pattern(dtype)
    assert np.isnan(again[found[~number]]).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_rounding_to_nearest_with_ties_to_even(dtype):
    """Midway between any two neighbours, subnormal ones and the last before infinity too, and next to it."""
    _, values = every_pattern(dtype)
    ends = np.sort(values[np.isfinite(values)])
    ends = np.append(ends, 2 * ends[-1] - ends[-2])  # where infinity begins, were there no end
    middle = ((ends[:-1] + ends[1:]) / 2).astype(np.float32)  # exact: one more bit of the significand
    for tried in (middle, np.nextafter(middle, np.float32(INF)), np.nextafter(middle, np.float32(-INF)), -middle):
        np.testing.assert_array_equal(rounded(tried, dtype), to_nearest(tried, dtype))


@pytest.mark.parametrize("dtype", KINDS)
def test_rounding_of_numbers_of_any_size(dtype):
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    tried = bits.view(np.float32)
    tried = tried[~np.isnan(tried)]
    np.testing.assert_array_equal(rounded(tried, dtype), to_nearest(tried, dtype))


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_no_number_stays_none_and_what_overflows_is_infinite(dtype):
    nans = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    _, values = every_pattern(dtype)
    assert np.isnan(values[rounded(nans, dtype)]).all()
    assert values[rounded(np.array([INF, -INF, 3.4e38, -3.4e38], np.float32), dtype)].tolist() == [
        *(INF, -INF),
        *((INF, -INF) if dtype == torch.float16 else to_bfloat16([3.4e38, -3.4e38])),
    ]
    signs = rounded(np.array([0.0, -0.0, 1e-45, -1e-45], np.float32), dtype)
    assert (signs >> 15).tolist() == [0, 1, 0, 1]


def to_bfloat16(values: list[float]) -> list[float]:
    return torch.tensor(values).bfloat16().double().tolist()


@njit
def scratch(kind, size):
    numbers = room(kind, size)
    numbers[:] = 1
    return numbers, numbers.ctypes.data


@pytest.mark.parametrize(
    ("kind", "computes"), [(np.float32, np.float32), (np.float64, np.float64), (np.uint16, np.float32)]
)
def test_scratch_begins_with_a_line_of_the_cache(kind, computes):
    for size in (0, 1, 17, 1024):
        numbers, address = scratch(kind(0), size)
        assert numbers.size == size
        assert address % 64 == 0
        assert numbers.dtype == computes


@cache
def taker():
    """`take` for callers in Python: writes the tasks of a phase that a thread is given to `out`; returns how many."""
    # A cfunc, which lets go of the GIL when ctypes calls it.
    struct = types.CPointer(record(Kinds("float32")))

    @cfunc(types.int64(struct, types.int64, types.int64, types.CPointer(types.int64)))
    def take_all(pointer, me, phase, out):
        a = carray(pointer, 1)[0]
        found = carray(out, a.tasks)
        n = 0
        while True:
            task = take(a, me, phase, a.tasks)
            if task >= a.tasks:
                return n
            found[n] = task
            n += 1

    kinds = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    return ctypes.CFUNCTYPE(ctypes.c_int64, *kinds)(take_all.address), take_all


def taken(call: Call, me: int, phase: int) -> np.ndarray:
    out = np.full(call.tasks, -1, np.int64)
    function, _ = taker()
    return out[: function(ctypes.addressof(call), me, phase, out.ctypes.data)]


@pytest.mark.parametrize(("threads", "tasks"), [(1, 5), (2, 7), (3, 2), (4, 40_000), (64, 1000)])
@pytest.mark.parametrize(
    "present", [slice(None), slice(1), slice(None, None, -1)], ids=["all", "one alone", "reversed"]
)
def test_every_task_is_taken_once_by_whichever_threads_come(threads, tasks, present):
    call = Call(threads=threads, tasks=tasks)
    with ThreadPoolExecutor(threads) as pool:
        for phase in range(PHASES):  # each from the beginning
            shares = list(pool.map(lambda me, phase=phase: taken(call, me, phase), list(range(threads))[present]))
            np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(tasks))
    assert (call.threads, call.tasks) == (threads, tasks)


def test_each_thread_begins_with_a_share_of_its_own():
    """The same one each time; the last phase begins with what the first has ended with."""
    for me, share in ((0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6, 7, 8, 9])):
        call = Call(threads=3, tasks=10)
        assert taken(call, me, 0)[: len(share)].tolist() == share
        assert taken(call, me, 2)[: len(share)].tolist() == share[::-1]
