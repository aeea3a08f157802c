"""One progress bar for all that takes long here."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["tracked"]

T = TypeVar("T")


def tracked(items: Sequence[T], what: str, *, show: bool) -> Iterable[T]:
    """The items, with a bar on the standard error while they are taken.

    Args:
        items: What is worked through.
        what: What they are, for the bar.
        show: Whether to show it at all.

    Returns:
        The same items.

    Example:
        >>> list(tracked([1, 2], "features", show=False))
        [1, 2]
    """
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description=what, console=Console(stderr=True), transient=True)
