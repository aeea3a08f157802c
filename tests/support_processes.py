"""Python in processes of their own: where kernels are compiled, what a fork leaves, what would end a process."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import steadynorm

PREAMBLE = """
    import sys
    import torch
    from steadynorm.ops.cpu import backend, kernel
    from support_kernels import Result, Step, check, expected, randn, run

    def step(shape, dtype=torch.float32):
        return Step(randn(*shape, mean=3).to(dtype), activation="relu", grad_y=randn(*shape, seed=3).to(dtype))

    def right(of, n=1):
        check(run(of, n), expected(of), of.x.dtype)

    def cache_hits():
        # A list that fills: for each kernel, whether it was loaded (1) or compiled.
        found, before = [], kernel.cfunc

        def counting(*args, **options):
            def build(function):
                built = before(*args, **options)(function)
                found.append(built.cache_hits)
                return built

            return build

        kernel.cfunc = counting
        return found
"""


def start(code: str, **environment: str) -> subprocess.Popen:
    """Python with these tests' folder to import from, and one OpenMP thread unless told; the code follows PREAMBLE."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(steadynorm.__file__).parents[1])])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen) -> str:
    """What it has printed."""
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("does not come to an end")
    assert process.returncode == 0, output
    return output
