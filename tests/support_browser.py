"""A headless Chromium for the tests of pages."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    """A script from benchmarks/, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@contextmanager
def chromium() -> Iterator[Any]:
    """Skips where there is no Chromium; fails where CI has none."""
    module = load("chromium")
    executable = module.find_chromium()
    if executable is None:
        if os.environ.get("CI"):
            pytest.fail("CI has to open the report in a Chromium, and there is none on the PATH: install one there")
        pytest.skip(f"no Chromium on the PATH (looked for {', '.join(module.NAMES)})")
    with module.Chromium(executable) as process:
        yield process
