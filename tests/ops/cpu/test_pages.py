"""Memory for large results is lent, taken back when the tensor dies, and lent again."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import steadynorm as sn
from steadynorm.ops.cpu import pages
from steadynorm.ops.cpu.pages import LIMIT_NAME, Pool

PAGE = 4096


def floats(pool: Pool, n: int) -> torch.Tensor:
    return pool.empty(torch.Size([n]), (1,), torch.float32)


@pytest.fixture
def pool(monkeypatch) -> Pool:
    """The pool that results come from, while nothing else has used it."""
    fresh = Pool(limit=1 << 30)
    monkeypatch.setattr(pages, "_pool", lambda: fresh)
    return fresh


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(1 << 20),
        torch.empty(3, 5, 300, 310).contiguous(memory_format=torch.channels_last),
        torch.empty(1 << 21, dtype=torch.bfloat16),
        torch.empty((1 << 19) + 77, dtype=torch.float64),
    ],
    ids=["float32", "channels last", "bfloat16", "float64"],
)
def test_a_large_result_is_a_tensor_like_any_other(x, pool):
    fresh = pages.empty_like(x)
    assert (fresh.shape, fresh.stride(), fresh.dtype) == (x.shape, x.stride(), x.dtype)
    assert fresh.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert not fresh._is_view()  # or an in-place operation on a layer's output would be refused
    assert fresh.fill_(1).sum(dtype=torch.float64) == x.numel()
    wider = pages.empty_like(x, dtype=torch.float64)
    assert (wider.stride(), wider.dtype) == (x.stride(), torch.float64)
    del fresh, wider
    assert pool.kept() >= x.numel() * (8 + x.element_size())


def test_a_small_result_is_no_business_of_the_pool(monkeypatch):
    monkeypatch.setattr(pages, "_pool", lambda: pytest.fail("the pool was asked"))
    for x in (torch.empty((1 << 20) - 1), torch.empty(0), torch.empty(3, 4)):
        assert pages.empty_like(x, dtype=torch.float16).dtype == torch.float16


def test_memory_is_lent_again_once_its_tensor_and_all_views_of_it_are_gone(pool):
    x = floats(pool, 5000)
    address, part = x.data_ptr(), x[1000:]
    part.fill_(7)
    del x
    assert pool.kept() == 0
    other = floats(pool, 5000)
    assert other.data_ptr() != address
    assert (part == 7).all()
    del part
    assert pool.kept() == 5 * PAGE
    assert floats(pool, 5000).data_ptr() == address


def test_sizes_that_are_nearly_the_same_share_their_blocks(pool):
    for wanted in (1 << 22, (1 << 22) + 1, 12345, 9_999_999):
        assert wanted <= pages._rounded(wanted) <= max(wanted * 9 / 8, wanted + PAGE)
        assert pages._rounded(wanted) % PAGE == 0
    address = floats(pool, 9 << 17).data_ptr()
    assert floats(pool, (1 << 20) + 1).data_ptr() == address


def test_what_is_beyond_the_limit_goes_back_the_size_least_recently_used_first():
    pool = Pool(limit=10 * PAGE)
    two, four, five = (floats(pool, 1024 * n) for n in (2, 4, 5))
    places = {n: t.data_ptr() for n, t in ((2, two), (4, four), (5, five))}
    del two, four
    assert pool.kept() == 6 * PAGE
    del five  # 11 pages are free now: the two go
    assert pool.kept() == 9 * PAGE
    assert floats(pool, 1024 * 4).data_ptr() == places[4]
    assert floats(pool, 1024 * 5).data_ptr() == places[5]
    assert floats(Pool(limit=0), 1024).fill_(1).sum() == 1024


def test_many_threads_at_once_never_share_a_block(pool):
    barrier = threading.Barrier(4)

    def work(mark: int) -> None:
        barrier.wait(timeout=60)
        held: list[torch.Tensor] = []
        for k in range(200):
            held.append(floats(pool, 2048).fill_(mark))
            assert all((t == mark).all() for t in held)
            if k % 3 == 2:
                del held[k % len(held)], held[0]

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, mark) for mark in range(4)]:
            done.result()
    assert not pool._lent
    assert pool.kept() <= 4 * 80 * 2 * PAGE


def test_a_layer_s_outputs_and_gradients_come_from_there(pool):
    layer, x = sn.BatchNorm2d(4, activation="relu"), torch.randn(2, 4, 400, 400, requires_grad=True)
    for _ in range(3):
        layer(x).mul_(2).backward(torch.randn_like(x))  # the output may be changed in place
        x.grad = None
    size = x.numel() * x.element_size()
    assert 2 * size <= pool.kept() <= 3 * size
    y = layer(x)
    kept = y.detach().clone()
    layer(x + 1)
    assert torch.equal(y, kept)


@pytest.mark.parametrize(("named", "limit"), [("0", 0), ("5", 5 << 20), ("", None), ("much", None)])
def test_the_limit_is_the_environment_s_or_an_eighth_of_memory(named, limit, monkeypatch, tmp_path):
    monkeypatch.setenv(LIMIT_NAME, named)
    monkeypatch.setattr(pages, "_CGROUP", tmp_path / "memory.max")
    physical = pages.os.sysconf("SC_PHYS_PAGES") * pages.os.sysconf("SC_PAGE_SIZE")
    assert pages._limit() == (physical // 8 if limit is None else limit)
    (tmp_path / "memory.max").write_text("8000000\n")
    assert pages._limit() == (1_000_000 if limit is None else limit)
    (tmp_path / "memory.max").write_text("max\n")
    assert pages._limit() == (physical // 8 if limit is None else limit)


def test_without_a_limit_or_anonymous_memory_there_is_no_pool(monkeypatch):
    monkeypatch.setattr(pages, "_limit", lambda: 0)
    assert pages._pool.__wrapped__() is None
    monkeypatch.setattr(pages, "_limit", lambda: 1 << 20)
    assert pages._pool.__wrapped__() is not None
    monkeypatch.delattr(pages.mmap, "MAP_ANONYMOUS")
    assert pages._pool.__wrapped__() is None
    monkeypatch.setattr(pages, "_pool", lambda: None)
    assert pages.empty_like(torch.empty(1 << 21)).fill_(3)[-1] == 3


def test_huge_pages_are_merely_advice(pool, monkeypatch):
    asked = []

    class Refusing(pages.mmap.mmap):
        def madvise(self, *advice: int) -> None:
            asked.append(advice)
            raise OSError("built without")

    monkeypatch.setattr(pages.mmap, "mmap", Refusing)
    monkeypatch.setattr(pages.mmap, "MADV_HUGEPAGE", 14, raising=False)
    assert floats(pool, 5000).fill_(2).sum() == 10000
    assert asked == [(14,)]
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE")
    assert floats(pool, 50000).fill_(2).sum() == 100000
    assert len(asked) == 1
