"""Kernels in Triton, and the scripts that run them, are collected only where Triton is."""

import importlib.util

collect_ignore_glob = (
    []
    if importlib.util.find_spec("triton")
    else ["src/steadynorm/ops/gpu/*.py", "tests/ops/gpu/table.py", "tests/ops/gpu/compiled.py"]
)
