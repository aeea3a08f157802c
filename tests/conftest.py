"""Fixtures for every test folder."""

import os
import sys
from pathlib import Path

import pytest

from steadynorm.ops.cpu.kernel import Kernel


@pytest.fixture(scope="session", autouse=True)
def compiler_untraced():
    """Lets Numba compile without coverage looking on, which would take half as long again and learn nothing."""
    compile_it = Kernel.compile

    def untraced(kernel, kinds):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return compile_it(kernel, kinds)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "compile", untraced)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with larger data sets, where there is one: $STEADYNORM_DATA, or shared/data beside the repository."""
    named = os.environ.get("STEADYNORM_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of larger data sets (set STEADYNORM_DATA to one)")
    return folder
