"""Several processes for one test: `run` on a pool that all tests share, `launch` in fresh ones that may be killed.

A body is a module-level function of a test file, `body(rank, group, *args)`, called on every rank of a gloo group; its
results come back in the order of the ranks. The pool starts on first use and ends with the process that started it.
Where the tests' coverage is measured, so is that of the bodies.
"""

import atexit
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import torch
import torch.distributed as dist

__all__ = ["Outcome", "RankError", "launch", "run"]

SIZE = 4
PATIENCE = 180.0  # seconds for one body, which may have kernels to compile on a busy machine
GRACE = 3.0  # seconds for the other ranks once one has failed


class RankError(Exception):
    """A body failed on some rank; the message carries the rank and its traceback."""


class Outcome(NamedTuple):
    """How a process of `launch` ended: exit code (None: still running at the deadline), and what it raised."""

    exit_code: int | None
    error: str | None
    seconds: float


Where = tuple[str, str, str]  # module name, file, qualified name: enough to find a function in another process


def _where(body: Callable[..., Any]) -> Where:
    return body.__module__, inspect.getfile(body), body.__qualname__


def _found(where: Where) -> Callable[..., Any]:
    """The body, from its file: under pytest's importlib mode a test file's module name need not be importable."""
    name, file, qualname = where
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # what a body returns may be of a class of that file
        spec.loader.exec_module(module)
    found: Any = sys.modules[name]
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


class _Meeting(NamedTuple):
    """Where the ranks meet: a file, or where there is a port, a server within rank 0."""

    file: str
    world: int
    port: int | None = None

    def join(self, rank: int) -> None:
        """Makes this process a rank."""
        parent = multiprocessing.parent_process()
        assert parent is not None
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
        torch.set_num_threads(1)
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        if self.port is None:
            store = dist.FileStore(self.file, self.world)
        else:
            store = dist.TCPStore("127.0.0.1", self.port, self.world, is_master=rank == 0)
        timeout = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=self.world, timeout=timeout)
        # A rank that dies at once must not break up the meeting: all are connected first, and the host knows it.
        store.set(f"connected/{rank}", "")
        store.wait([f"connected/{other}" for other in range(self.world)], timeout)
        store.set(f"off/{rank}", "")
        if rank == 0:
            store.wait([f"off/{other}" for other in range(self.world)], timeout)


class _Measured(NamedTuple):
    """The settings of the coverage measurement that is under way in the parent."""

    data_file: str
    config_file: str | bool

    @classmethod
    def here(cls) -> "_Measured | None":
        current = coverage.Coverage.current()
        return current and cls(current.config.data_file, current.config.config_file or False)

    @contextmanager
    def around(self) -> Generator[None]:
        measuring = coverage.Coverage(self.data_file, data_suffix=True, config_file=self.config_file)
        measuring.start()
        try:
            yield
        finally:
            measuring.stop()
            measuring.save()


def _answer(body: Where, rank: int, group: Any, args: tuple[Any, ...], measured: _Measured | None) -> tuple[bool, Any]:
    """Whether the body came to its end, and what it returned or the traceback of what it raised."""
    try:
        with measured.around() if measured else nullcontext():
            return True, _found(body)(rank, group, *args)
    except BaseException:
        return False, traceback.format_exc()


def _serve(rank: int, meeting: _Meeting, calls: Connection) -> None:
    """A process of the pool: joins the groups of all sizes, then answers calls until the pipe closes."""
    meeting.join(rank)
    groups = {size: dist.new_group(range(size)) for size in range(1, SIZE + 1)}
    while True:
        try:
            body, world, args, measured = pickle.loads(calls.recv_bytes())
        except EOFError:
            os._exit(0)
        answer = _answer(body, rank, groups[world], args, measured)
        try:
            calls.send_bytes(pickle.dumps(answer))
        except Exception:  # the result cannot be pickled
            calls.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _start(target: Callable[..., None], *args: Any) -> BaseProcess:
    """A process forked from a server that has imported torch already: 0.1 s instead of 3 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "coverage", "torch.distributed", "steadynorm.nn"])
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    return process


class _Pool:
    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ranks-")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        meeting = _Meeting(str(Path(self.folder, "store")), SIZE)
        for rank in range(SIZE):
            ours, theirs = multiprocessing.Pipe()
            self.processes.append(_start(_serve, rank, meeting, theirs))
            theirs.close()
            self.pipes.append(ours)

    def call(self, body: Callable[..., Any], world: int, args: tuple[Any, ...]) -> list[Any]:
        call = pickle.dumps((_where(body), world, args, _Measured.here()))
        pending = {self.pipes[rank]: rank for rank in range(world)}
        for pipe in pending:
            pipe.send_bytes(call)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + PATIENCE
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    fine, result = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    fine, result = False, "its process died"
                if fine:
                    results[rank] = result
                else:
                    failures[rank] = result
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failures or pending:
            told = [f"rank {rank} of {world}: {text}" for rank, text in sorted(failures.items())]
            told += [f"rank {rank} of {world}: still running, stopped" for rank in sorted(pending.values())]
            raise RankError("\n".join(told))
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


_pool: _Pool | None = None


@atexit.register
def _close_pool() -> None:
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


def run(body: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Calls `body(rank, group, *args)` on ranks 0 to world - 1 at once, and returns what each of them returned.

    Raises:
        RankError: Some rank raised, died or took more than a minute. The pool is made anew for the next call.
    """
    global _pool
    if _pool is None:
        _pool = _Pool()
    try:
        return _pool.call(body, world, args)
    except BaseException:
        _close_pool()
        raise


def _live(rank: int, meeting: _Meeting, told: Connection, call: bytes) -> None:
    meeting.join(rank)
    body, args, measured = pickle.loads(call)
    fine, result = _answer(body, rank, dist.group.WORLD, args, measured)
    if not fine:
        told.send_bytes(result.encode())
        told.close()
    os._exit(0 if fine else 1)


def launch(
    body: Callable[..., Any], world: int, *args: Any, timeout: float = PATIENCE, store_in_rank_0: bool = False
) -> list[Outcome]:
    """Calls `body(rank, group, *args)` in fresh processes, which may kill themselves, and tells how each one ended.

    Args:
        body: As for `run`; what it returns is dropped.
        world: How many processes.
        args: The rest of the body's arguments.
        timeout: Seconds until those still running are killed.
        store_in_rank_0: Whether the ranks meet at a server within rank 0, which goes when it goes, or at a file.
    """
    start, until = time.monotonic(), time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        meeting = _Meeting(str(Path(folder, "store")), world, _free_port() if store_in_rank_0 else None)
        call = pickle.dumps((_where(body), args, _Measured.here()))  # tensors by value, not through shared memory
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        for rank in range(world):
            ours, theirs = multiprocessing.Pipe(duplex=False)
            processes.append(_start(_live, rank, meeting, theirs, call))
            theirs.close()
            pipes.append(ours)
        return [_outcome(process, pipe, start, until) for process, pipe in zip(processes, pipes, strict=True)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _outcome(process: BaseProcess, pipe: Connection, start: float, until: float) -> Outcome:
    process.join(max(0.0, until - time.monotonic()))
    exit_code, seconds = process.exitcode, time.monotonic() - start
    if exit_code is None:
        process.kill()
        process.join()
    try:
        error = pipe.recv_bytes().decode() if pipe.poll() else None
    except EOFError:
        error = None
    return Outcome(exit_code, error, seconds)
