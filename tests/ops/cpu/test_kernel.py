"""How kernels run: on how many threads, from several at once, after a fork, and where code cannot be kept."""

import ctypes
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from numba.core.caching import CacheImpl

import steadynorm
from steadynorm.ops.cpu import backend, kernel, plane_kernels
from steadynorm.ops.cpu.call import Kinds
from support import threads
from support_kernels import Result, Step, check, expected, randn, run
from support_processes import finished, start

# In parts, so that several threads share each channel; fused, one task a channel or a chunk.
SHAPES = {
    "planes in parts": (5, 1, 101, 103),
    "planes of two channels in parts": (3, 2, 109, 111),
    "columns in parts": (4099, 16),
    "planes": (2, 33, 25, 25),
    "columns": (140, 500),
}


@cache
def step_of(shape: tuple[int, ...], seed: int = 0) -> Step:
    channels = shape[1]
    return Step(
        randn(*shape, seed=seed, mean=3, std=2).float(), (1 + randn(channels, seed=1) / 2).float(),
        randn(channels, seed=2).float(), activation="relu", grad_y=randn(*shape, seed=3).float(),
    )  # fmt: skip


def bits_of(found: Result) -> list[torch.Tensor]:
    return [t for t in found if t is not None]


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_threads_give_the_same_bits(shape, n):
    step = step_of(shape)
    first = run(step, n)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(bits_of(run(step, n)), bits_of(first), strict=True))


@pytest.mark.parametrize("n", [2, 4])
def test_no_thread_normalises_before_all_statistics_are_there(n):
    """One channel's sums overflow, so that it is measured again while the threads of the other have nothing to do."""
    step = step_of(SHAPES["planes of two channels in parts"])
    step.x[0, 0, 0, 0] = 1e25
    for _ in range(5):
        assert run(step, n).y.isfinite().all()  # what is not there yet is NaN


def test_as_many_threads_as_torch_has_at_each_call(monkeypatch):
    """And one for small inputs, where waking another takes as long as the work."""
    asked = []
    together = kernel._run_together
    monkeypatch.setattr(kernel, "_run_together", lambda *a: (asked.append(a[-1].threads), together(*a)))
    step = step_of(SHAPES["planes in parts"])
    for n in (3, 1, 2):
        run(step, n)
    run(Step(randn(30, 7).float()), 4)
    assert set(asked) == {3, 2}
    with threads(3):
        assert kernel.threads_for(kernel.FEWEST_VALUES) == 3
        assert kernel.threads_for(kernel.FEWEST_VALUES - 1) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_several_python_threads_at_once(n):
    """Each with its own batch; that kernels let go of the GIL makes them overlap."""
    shapes = [SHAPES[name] for name in ("planes in parts", "columns in parts", "planes", "columns")]
    wanted = [expected(step_of(shape, seed=10 + i)) for i, shape in enumerate(shapes)]
    barrier = threading.Barrier(len(shapes))

    def work(i: int) -> list[Result]:
        operands, spec = step_of(shapes[i], seed=10 + i).arguments()
        upstream = step_of(shapes[i]).grad_y
        barrier.wait(timeout=60)
        found = []
        for _ in range(5):
            y, statistics = backend.train(operands, spec)
            found.append(Result(y, *statistics, *backend.backward(upstream, None, None, operands, statistics, spec)))
        return found

    with threads(n), ThreadPoolExecutor(len(shapes)) as pool:
        for i, results in enumerate(pool.map(work, range(len(shapes)))):
            for found in results:
                check(found, wanted[i], torch.float32)


def test_a_kernel_is_compiled_once_however_many_threads_ask_for_it(monkeypatch):
    compiled = []

    def counting(function, kinds):
        compiled.append(kinds)
        return 1

    monkeypatch.setattr(kernel, "_compiled", counting)
    fresh, barrier = kernel.Kernel(lambda pointer: None), threading.Barrier(4)
    kinds = Kinds("float32")

    def ask(_):
        barrier.wait(timeout=60)
        return fresh.compile(kinds)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(ask, range(4)))) == 1
    assert compiled == [kinds]


def test_kinds_that_a_kernel_does_not_read_are_no_reason_to_compile_it(monkeypatch):
    """They are compiled for, and cached, as absent: whichever were asked for first."""
    compiled = []
    monkeypatch.setattr(kernel, "_compiled", lambda function, kinds: compiled.append(kinds) or len(compiled))
    monkeypatch.setattr(kernel, "_runner", lambda address: address)
    fresh = kernel.Kernel(lambda pointer: None, reads=("memory", "weights"))
    assert fresh.compile(Kinds("float32", added="float64", mask="uint8", activation="uint16")) == 1
    assert fresh.compile(Kinds("float32")) == fresh.compile(Kinds("float32", added="float32")) == 1
    assert fresh.compile(Kinds("float32", weights="float32", mask="uint8")) == 2
    assert fresh.compile(Kinds("float64", activation="uint32")) == 3
    assert compiled == [Kinds("float32"), Kinds("float32", weights="float32"), Kinds("float64")]
    every = kernel.Kernel(lambda pointer: None)
    for i, name in enumerate(Kinds._fields):
        assert every.compile(Kinds("float32")._replace(**{name: "float16"})) == 4 + i


def test_a_bound_kernel_is_compiled_when_it_first_runs_and_looked_up_no_more(monkeypatch):
    compiled, ran = [], []
    monkeypatch.setattr(kernel, "_compiled", lambda function, kinds: compiled.append(kinds))
    monkeypatch.setattr(kernel, "_runner", lambda address: lambda call, threads: ran.append((call, threads)))
    fresh, kinds = kernel.Kernel(lambda pointer: None), Kinds("float32")
    early = fresh.bind(kinds)
    assert not compiled
    early("a call", 2)
    early("another", 1)
    late = fresh.bind(kinds)
    late("a third", 3)
    assert late is fresh.compile(kinds)
    assert (compiled, ran) == ([kinds], [("a call", 2), ("another", 1), ("a third", 3)])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_an_openmp_runtime_threads_of_python_do_the_work(shape, monkeypatch):
    monkeypatch.setattr(kernel, "openmp", lambda: None)
    monkeypatch.setattr(backend, "openmp", lambda: None)
    backend._plan.cache_clear()
    used = []
    pool = kernel._pool
    monkeypatch.setattr(kernel, "_pool", lambda n: (used.append(n), pool(n))[1])
    step = step_of(shape)
    for n in (2, 4):
        check(run(step, n), expected(step), torch.float32)
    backend._plan.cache_clear()
    assert {1} < set(used) <= {1, 2, 3}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's wheels for Linux bring libgomp")
def test_the_openmp_runtime_is_the_one_that_torch_has_loaded():
    runtime = kernel.openmp()
    assert runtime is not None
    assert runtime.thread_number
    assert runtime.barrier
    own = Path(torch.__file__).parent / "lib"  # other libraries may have brought runtimes of theirs
    place = ctypes.cast(runtime.parallel, ctypes.c_void_p).value
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= place < end:
            assert Path(line.split()[-1]).parent == own
            return
    raise AssertionError("the function is nowhere")


def test_where_torch_has_no_such_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert kernel.openmp.__wrapped__() is None
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libgomp.so.1").write_bytes(b"no library")
    assert kernel.openmp.__wrapped__() is None


def test_where_no_cache_folder_can_be_written_kernels_are_compiled_all_the_same(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    run_alone = kernel._runner(kernel._compiled(plane_kernels.measure.function, Kinds("float64")))
    assert callable(run_alone)


def test_other_errors_of_compiling_are_seen(monkeypatch):
    def failing(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernel, "cfunc", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        kernel._compiled(plane_kernels.measure.function, Kinds("float64"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform does not fork")
def test_after_a_fork_the_child_is_serial_and_right():
    """The threads of the parent's runtime do not come along; one that waits for them waits forever."""
    code = """
    import multiprocessing
    from torch.utils.data import DataLoader, Dataset

    BATCH = step((5, 1, 101, 103))
    WANTED = expected(BATCH)
    right(BATCH, 2)  # the parent's threads are up

    def child(results):
        operands, spec = BATCH.arguments()
        torch.set_num_threads(2)  # with which torch's own operations would hang
        threads = kernel.threads_for(1 << 30)
        y, statistics = backend.train(operands, spec)
        gradients = backend.backward(BATCH.grad_y, None, None, operands, statistics, spec)
        torch.set_num_threads(1)
        check(Result(y, *statistics, *gradients), WANTED, torch.float32)
        results.put(threads)

    class Normalised(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            found = run(BATCH)
            return found.y, torch.tensor(kernel.threads_for(1 << 30))

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        results = context.Queue()
        process = context.Process(target=child, args=(results,))
        process.start()
        print(results.get(timeout=60))
        process.join(60)
        (y, threads), = DataLoader(Normalised(), num_workers=1, batch_size=None, multiprocessing_context="fork")
        print(threads.item(), abs(y.double().numpy() - WANTED.y).max() < 1e-5)
        right(BATCH, 2)  # the parent goes on as before
        print(kernel.threads_for(1 << 30))
    """
    assert finished(start(code)).split() == ["1", "1", "True", "1"]


def test_two_processes_that_fill_one_cache_at_once(tmp_path):
    """Each compiles a specialisation of its own of the same functions; a third then loads both."""
    run_one = "right(step((8, 5, 4), getattr(torch, sys.argv[-1] if len(sys.argv) > 1 else {!r})))"
    both = [start(run_one.format(dtype), NUMBA_CACHE_DIR=str(tmp_path)) for dtype in ("float32", "float64")]
    for process in both:
        finished(process)
    count = """
    compiled = cache_hits()
    for dtype in (torch.float32, torch.float64):
        right(step((8, 5, 4), dtype))
    print(compiled)
    """
    assert finished(start(count, NUMBA_CACHE_DIR=str(tmp_path))).strip() == "[1, 1, 1, 1]"


def test_a_package_that_lies_where_nothing_can_be_written(tmp_path):
    """No folder for compiled code beside the sources, none in the home: files stand in their places."""
    copy = tmp_path / "steadynorm"
    source = Path(steadynorm.__file__).parent
    for file in [*source.rglob("*.py"), *source.rglob("*.pyi")]:
        target = copy / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (copy / "ops" / "cpu" / "__pycache__").touch()
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    code = """
    import steadynorm
    from steadynorm.ops.cpu import backend
    operands, spec = step((8, 5)).arguments()
    y, _ = backend.train(operands, spec)
    print(steadynorm.__file__, abs(y.double().numpy() - expected(step((8, 5))).y).max() < 1e-5)
    """
    process = start(
        code,
        PYTHONPATH=path,
        HOME=os.devnull,
        XDG_CACHE_HOME=os.devnull,
        NUMBA_CACHE_DIR="",
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert finished(process).split() == [str(copy / "__init__.py"), "True"]
