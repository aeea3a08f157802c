"""How far a comparison is: one bar with the stage and the time left, or nothing."""

from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """A progress bar over training runs, on stderr.

    Later stages depend on what earlier ones find, so their runs are foreseen as estimates and replaced by the true
    number once a stage asks for it.

    Args:
        show: False makes every method do nothing but count.
    """

    def __init__(self, show: bool) -> None:
        self._show = show
        self._foreseen: dict[str, int] = {}
        self._stage = ""
        self._planned = 0
        self._done = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._show:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total} runs,"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=Console(stderr=True),
                speed_estimate_period=300,  # seconds: a single run may take longer than the usual 30
            )
            self._bar.start()
            self._task = self._bar.add_task("preparing", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def foresee(self, runs: dict[str, int]) -> None:
        """States how many runs each coming stage will take, as far as one can tell."""
        self._foreseen = dict(runs)
        self._update()

    def stage(self, name: str) -> None:
        """Starts a stage; what was foreseen for it gives way to what it asks for."""
        self._stage = name
        self._foreseen.pop(name, None)
        self._update()

    def expect(self, runs: int) -> None:
        """So many more runs are about to start."""
        self._planned += runs
        self._update()

    def done(self) -> None:
        """One run has finished."""
        self._done += 1
        self._update()

    @property
    def counts(self) -> tuple[int, int]:
        """Runs done, and runs expected in all."""
        return self._done, max(self._planned + sum(self._foreseen.values()), self._done)

    def _update(self) -> None:
        if self._bar is not None:
            done, total = self.counts
            self._bar.update(self._task, description=self._stage or "preparing", completed=done, total=total)
