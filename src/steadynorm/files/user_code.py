"""The user's own functions, named "pkg.mod:name": whatever fails in importing or calling them is one clear error."""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from steadynorm.errors import SteadynormError

__all__ = ["call", "import_named", "is_name"]

_NAME: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_name(text: str) -> bool:
    """Whether `text` reads as "pkg.mod:name" (which "C:\\data" and "http://host" do not)."""
    return _NAME.fullmatch(text) is not None


def import_named(name: str, error: type[SteadynormError]) -> Callable[..., Any]:
    """Imports "pkg.mod:name", from the current folder too, and returns the callable of that name.

    Args:
        name: The module's dotted name, a colon, and a (dotted) name inside it.
        error: What to raise: `DataError` for a factory of data, `ModelError` for one of models.

    Raises:
        error: The module cannot be imported, has no such name, or what is there cannot be called.

    Example:
        >>> from steadynorm.errors import DataError
        >>> import_named("math:sqrt", DataError)(9.0)
        3.0
    """
    if not is_name(name):
        raise error(f'a factory is named "pkg.mod:function", got {name!r}.')
    module_name, _, path = name.partition(":")
    with _current_folder_importable(), _as_one(error, f"importing {module_name!r} for {name!r}"):
        module = importlib.import_module(module_name)
    found: Any = module
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise error(f"module {module_name!r} has no {path!r}. Check the name after the colon in {name!r}.")
        found = getattr(found, attribute)
    if not callable(found):
        raise error(f"{name!r} must name a function or a class, got a {type(found).__name__}.")
    return found


def call(function: Callable[..., Any], *args: object, name: str, error: type[SteadynormError]) -> Any:
    """Calls `function(*args)`; anything that it raises becomes `error`, with the place where it was raised.

    Args:
        function: The user's function.
        *args: What it is called with.
        name: What to call it in the message.
        error: What to raise. An error of this package's own passes through as it is.

    Raises:
        error: The function raised, or tried to exit.
    """
    with _current_folder_importable(), _as_one(error, f"calling {name}"):
        return function(*args)


@contextmanager
def _current_folder_importable() -> Generator[None]:
    """The current folder first on the path, as under `python -m`: a console script does not have it there."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _as_one(error: type[SteadynormError], doing: str) -> Generator[None]:
    try:
        yield
    except SteadynormError:
        raise
    except (Exception, SystemExit) as raised:
        frames = traceback.extract_tb(raised.__traceback__)
        here = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise error(f"{doing} failed{here}: {type(raised).__name__}: {raised}. Fix it there and run again.") from raised
