"""The Triton kernels in Triton's interpreter, on the CPU, against the definition. No speed follows from any of this.

The interpreter is chosen when Triton is imported, hence one process of its own for the whole table.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, for its interpreter")
HERE = Path(__file__).parent


def in_a_process(*command: str, **variables: str) -> None:
    paths = [str(HERE.parents[1]), *(p for p in sys.path if p)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), **variables}
    ran = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[2]
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]


def test_all_kernels_in_the_interpreter():
    table = str(HERE / "table.py")
    in_a_process("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", table, TRITON_INTERPRET="1")


def test_all_kernels_compile_for_a_gpu(tmp_path):
    """Down to machine code, which Triton can do where there is no GPU; whether it runs is another question."""
    in_a_process(str(HERE / "compiled.py"), TRITON_CACHE_DIR=str(tmp_path))
