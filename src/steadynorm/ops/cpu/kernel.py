"""Kernels: compiled on first use for the kinds of memory they meet, and run on as many threads as torch has.

A kernel is a serial function that takes tasks until none is left. Any number of threads may run it at once, one is
enough, and which of them does a task changes nothing in its result. The threads are those of the OpenMP runtime that
torch itself runs on: none are added to them, and neither Numba's nor torch's own count of threads is touched.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from numba import cfunc, types  # pyright: ignore[reportUnknownVariableType]

from steadynorm.ops.cpu.call import DIGEST, Call, Kinds, record
from steadynorm.ops.cpu.compiling import FAST
from steadynorm.ops.cpu.memory import THREADS
from steadynorm.ops.cpu.turns import turn

__all__ = ["FEWEST_VALUES", "MEASURING", "NORMALIZING", "Kernel", "openmp", "threads_for"]

MEASURING = ("memory", "weights")
NORMALIZING = ("memory", "added", "mask", "activation")
"""What kernels read that do no more than measure, or no more than normalize (or go back through it)."""

FEWEST_VALUES = 32768
"""Below so many values one thread is used: waking another takes as long as the work."""

_compiling = threading.Lock()
_forked = False


def _note_fork() -> None:
    # The threads of the runtime did not come along, and it would wait for them forever.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def threads_for(values: int) -> int:
    """How many threads a kernel over so many values runs on."""
    return 1 if values < FEWEST_VALUES or _forked else torch.get_num_threads()


class Kernel:
    """A function of a `Call` that does a task at a time, compiled for each `Kinds` it is called with.

    Args:
        function: Given a C pointer to the struct, does tasks until none is left.
        reads: The kinds that make a difference to it; it is not compiled anew for the others.
    """

    def __init__(self, function: Callable[[Any], None], reads: tuple[str, ...] = Kinds._fields) -> None:
        self.function = function
        self._ignored = {name: "" for name in Kinds._fields if name not in reads}
        self._compiled: dict[Kinds, Compiled] = {}

    def __call__(self, call: Call, kinds: Kinds, threads: int) -> None:
        """Runs the tasks of `call` on up to so many threads, this one among them."""
        try:
            run = self._compiled[kinds]
        except KeyError:
            run = self.compile(kinds)
        run(call, threads)

    def bind(self, kinds: Kinds) -> "Compiled":
        """What `__call__` would run, looked up once; compiled when it is first run."""
        return self._compiled.get(kinds) or (lambda call, threads: self(call, kinds, threads))

    def compile(self, kinds: Kinds) -> "Compiled":
        """Compiles for these kinds, or loads what an earlier process has compiled."""
        with _compiling:
            if kinds not in self._compiled:
                read = kinds._replace(**self._ignored)
                if read not in self._compiled:
                    self._compiled[read] = _runner(_compiled(self.function, read))
                self._compiled[kinds] = self._compiled[read]
            return self._compiled[kinds]


Compiled = Callable[[Call, int], None]


def _runner(address: int) -> Compiled:
    alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(call: Call, threads: int) -> None:
        if threads > 1 and call.tasks > 1:
            call.threads = min(threads, call.tasks, THREADS)
            _run_together(address, alone, call)
        else:
            call.threads = 1
            alone(ctypes.addressof(call))

    return run


def _compiled(function: Callable[[Any], None], kinds: Kinds) -> int:
    signature = types.void(types.CPointer(record(kinds)))
    # Under a name of its own, so that each has its own file in Numba's cache: processes that save two specialisations
    # of one function at once can end up with either one's code under the other's key.
    name = "_".join([function.__name__, *(kind or "no" for kind in kinds), DIGEST])
    named = FunctionType(function.__code__, function.__globals__, name)
    named.__qualname__, named.__module__ = name, function.__module__
    try:
        with turn(name):
            built: Any = cfunc(signature, cache=True, **FAST)(named)
    except RuntimeError as error:  # neither __pycache__ nor the user's cache can be written
        if "cache" not in str(error):
            raise
        built = cfunc(signature, **FAST)(named)
    _alive.append(built)
    return built.address


_alive: list[Any] = []  # compiled code lives as long as the object that holds it


class OpenMP(NamedTuple):
    """The functions of the OpenMP runtime that torch has loaded: run together, and where two others are."""

    parallel: Any
    thread_number: int
    barrier: int


@cache
def openmp() -> OpenMP | None:
    """None where torch runs on something else than GNU's."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            runtime = ctypes.CDLL(str(path))
            parallel, *others = runtime.GOMP_parallel, runtime.omp_get_thread_num, runtime.GOMP_barrier
        except (OSError, AttributeError):
            continue
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        return OpenMP(parallel, *(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in others))
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="steadynorm")


def _run_together(address: int, alone: Callable[[int], None], call: Call) -> None:
    runtime = openmp()
    if runtime is not None:
        parallel, call.thread_number, call.barrier = runtime
        parallel(address, ctypes.addressof(call), call.threads, 0)
        return
    others = [_pool(call.threads - 1).submit(alone, ctypes.addressof(call)) for _ in range(call.threads - 1)]
    alone(ctypes.addressof(call))  # ctypes lets go of the GIL
    for other in others:
        other.result()
