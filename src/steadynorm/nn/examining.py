"""Telling a forward that examines a model from one that serves: monitors count the second kind only."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["examining", "is_examining"]


class _Here(threading.local):
    depth: int = 0


_here = _Here()


@contextmanager
def examining() -> Generator[None]:
    """Within it, forwards of this thread are part of a calibration, a check or an adaptation: no monitor counts them.

    Example:
        >>> with examining():
        ...     is_examining()
        True
        >>> is_examining()
        False
    """
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1


def is_examining() -> bool:
    """Whether this thread is within `examining`."""
    return _here.depth > 0
