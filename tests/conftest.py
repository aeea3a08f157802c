"""Fixtures for every test folder."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with larger data sets, where there is one: $STEADYNORM_DATA, or shared/data beside the repository."""
    named = os.environ.get("STEADYNORM_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of larger data sets (set STEADYNORM_DATA to one)")
    return folder
