"""One bar on stderr while a loader is read, or nothing."""

import sys
from collections.abc import Generator, Iterable, Sized
from typing import TypeVar

__all__ = ["tracked"]

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int | None = None, *, show: bool) -> Generator[T]:
    """The items, with a bar on the standard error while they are taken, where that is a terminal.

    Args:
        items: What is taken.
        what: What is done with them, for the bar.
        total: How many there are; by default their length, where they have one.
        show: False shows nothing anywhere.

    Example:
        >>> list(tracked([1, 2], "batches", 2, show=False))
        [1, 2]
    """
    if not (show and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        known = len(items) if total is None and isinstance(items, Sized) else total
        task = bar.add_task(what, total=known)
        for item in items:
            yield item
            bar.advance(task)
