"""Monitor: does what a model is served still look like what its batch norms remember?"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.nn.examining import examining
from steadynorm.nn.watched import bn_layers, observing
from steadynorm.shift.watching.budget import Budget
from steadynorm.shift.watching.calibration import WIDEST, Calibration, fit_calibration
from steadynorm.shift.watching.calibration_file import read_calibration, write_calibration
from steadynorm.shift.watching.collecting import checked_batch, clean_features, collect, is_watchable
from steadynorm.shift.watching.drift import LayerShift
from steadynorm.shift.watching.observer import Look, Observer
from steadynorm.shift.watching.sequential import combined_p
from steadynorm.shift.watching.state import MonitorState
from steadynorm.shift.watching.tally import POOL, Tally

__all__ = ["Monitor"]


class Monitor:
    """Watches the inputs of a model's batch norms for a covariate shift, in production.

    Uncalibrated, it says how far each layer and channel is from its running statistics. After `calibrate` it raises
    an alarm, at a stated rate of false ones: per test of 64 examples and layer, T² against its null gives p;
    e = ½ p^(-½) is averaged over the layers; M <- (M + batches) e; alarm where M reaches `mean_run`.

    Attach it to a served model (`with monitor:`): hooks sample batches, examples and layers so that the mean cost
    stays under the budget. They are thread-safe, watch evaluation mode only, see nothing under `torch.compile` or in
    traces, and never raise: what goes wrong is in `state().errors`. Detach before `torch.jit.script`, which compiles
    hooks. Or feed batches by hand with `update`.

    The running statistics are read anew at each test: after adapting or recalibrating the model, `reset()` and see
    whether the alarm persists.

    Args:
        model: With batch norm layers (torch.nn's or steadynorm's) that keep running statistics.
        mean_run: Served clean batches until a false alarm: at least so many on average, and within a tenth of them an
            alarm in at most 10 % of streams.
        budget: Mean cost of the hooks, as a share of the forward's time; None looks at everything.
        on_alarm: Called with the state at the first alarm after construction or `reset`, in the thread that served.
        seed: Of the sampling and the bootstrap.
        clock: Seconds, monotonic.

    Raises:
        ArgumentError: `mean_run` below 1, or `budget` outside (0, 1).
        ModelError: No such layer.

    Source:
        Running statistics as a reference: Schneider et al., "Improving robustness against common corruptions by
        covariate shift adaptation" (2020). The alarm: see `steadynorm.shift.watching.sequential` and `calibration`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
        >>> monitor = Monitor(model, budget=None).calibrate(torch.randn(1000, 4).split(100))
        >>> with monitor:
        ...     for batch in torch.randn(640, 4).split(64):
        ...         _ = model(batch)
        >>> monitor.state().alarm
        False
        >>> with monitor:
        ...     for batch in (torch.randn(640, 4) + torch.tensor([0.0, 0.0, 1.0, 0.0])).split(64):
        ...         _ = model(batch)
        >>> monitor.state().alarm, monitor.state().alarm_batch, monitor.distance()[0].channels[0].channel
        (True, 12, 2)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mean_run: float = 1000.0,
        budget: float | None = 0.03,
        on_alarm: Callable[[MonitorState], object] | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 1 <= mean_run < float("inf"):
            raise ArgumentError(f"mean_run must be a number of batches, finite and >= 1, got {mean_run!r}.")
        self._model, self._seed = model, seed
        self._layers = dict(bn_layers(model))
        rng = np.random.default_rng(seed)
        tally = Tally(self._layers, mean_run, Budget(budget, rng), on_alarm, rng, clock)
        self._tally = tally
        self._observer = Observer(model, list(self._layers.items()), tally.begin, tally.end, tally.fail, clock)

    @property
    def model(self) -> nn.Module:
        """The model that is watched."""
        return self._model

    @property
    def calibration(self) -> Calibration | None:
        """What clean batches look like; None before `calibrate`."""
        return self._tally.calibration

    def calibrate(
        self,
        loader: Iterable[Any],
        *,
        examples: int = 1000,
        pool: int = POOL,
        block: int | None = None,
        forward: Callable[[Any], object] | None = None,
    ) -> Self:
        """Learns what clean examples look like, and forgets what was seen before. Keeps summaries, no examples.

        Args:
            loader: Batches of unlabelled in-distribution examples, not those the model was trained on: tensors, or
                tuples and lists with the inputs first. A random sample, or a stretch of the stream in its order.
            examples: How many to use, at most.
            pool: Examples per test.
            block: How many neighbouring examples of the stream belong together; 1 for independent ones. None
                estimates it from the order that the loader has.
            forward: Runs the model on one batch; needed where a batch is anything else.

        Raises:
            ArgumentError: Too few examples, or neighbours too alike.
            DataError: The loader yields nothing, or what is no batch.
            ModelError: The model is in training mode, or none of its layers was used.
        """
        if pool < 8 or examples < pool or (block is not None and block < 1):
            raise ArgumentError(
                f"calibrate needs pool >= 8, examples >= pool and block >= 1 or None, got pool={pool}, "
                f"examples={examples}, block={block}."
            )
        with examining():
            seen, notes = collect(self._model, self._layers, loader, examples, forward)
        values, lost = clean_features(seen, self._layers)
        channels = {name: moments.mean.shape[1] for name, moments in seen.items()}
        fitted = fit_calibration(values, channels, pool=pool, block=block, seed=self._seed)
        if lost:
            notes.append(f"{lost} of the calibration's examples were not finite at some layer and were left out")
        if fitted.widening >= WIDEST:
            notes.append("the calibration is too small for its spread: there may be more false alarms than stated")
        self._tally.adopt(fitted, notes)
        return self

    def update(self, batch: Any, *, forward: Callable[[Any], object] | None = None) -> MonitorState:
        """Feeds one batch by hand: runs the model on it without gradients and looks at every example and layer at once.

        Args:
            batch: As one of `calibrate`'s.
            forward: As there.

        Raises:
            DataError: `batch` is none.
            ModelError: The model is in training mode.
        """
        run = checked_batch(self._model, self._layers, batch, forward)
        look = Look(0, frozenset(self._tally.watched))
        with examining(), torch.no_grad(), observing(list(self._layers.items()), look.see):
            run()
        self._tally.fed(look.taken)
        return self.state()

    def p_value(self, batches: Iterable[Any], *, forward: Callable[[Any], object] | None = None) -> float:
        """How often clean examples would look as unlike the calibration as these: one test, apart from the stream.

        Each layer and pool of examples gives a p-value, and all of them together one, however they depend on each
        other (`combined_p`): small where a quarter of them are. What was seen, and the evidence, stay as they are.

        Args:
            batches: As `calibrate`'s loader; all of it is used.
            forward: As there.

        Raises:
            ArgumentError: Not calibrated yet.
            DataError: Fewer finite examples than one pool, or batches that are none.
            ModelError: The model is in training mode, or none of its layers was used.

        Example:
            >>> model = nn.Sequential(nn.BatchNorm1d(4)).eval()
            >>> monitor = Monitor(model).calibrate(torch.randn(1000, 4).split(100))
            >>> monitor.p_value([torch.randn(64, 4) + 1]) < 0.01
            True
        """
        calibration = self.calibration
        if calibration is None:
            raise ArgumentError("p_value needs a calibration; call monitor.calibrate(loader) first.")
        with examining():
            seen, _ = collect(self._model, self._layers, batches, sys.maxsize, forward)
        seen = {name: moments for name, moments in seen.items() if name in calibration.layers}
        values, _ = clean_features(seen, self._layers)
        pool = calibration.pool
        tests = [
            calibration.layers[name].p_value(features[start : start + pool])
            for name, features in values.items()
            if features.shape[1] == len(calibration.layers[name].projection.centre)
            for start in range(0, len(features) - pool + 1, pool)
        ]
        if not tests:
            raise DataError(f"a test needs {pool} finite examples at a calibrated layer; give more of them.")
        return combined_p(tests)

    def attach(self) -> Self:
        """Puts the hooks on the model; until `detach`, its forwards in evaluation mode are watched."""
        self._tally.note(is_watchable(self._model))
        self._tally.idles(self._observer.idle_cost())
        self._observer.attach()
        return self

    def detach(self) -> None:
        """Takes the hooks off. What was seen stays."""
        self._observer.detach()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Forgets what was seen and any alarm; the calibration, and the account of time, stay."""
        self._tally.reset()

    def distance(self) -> tuple[LayerShift, ...]:
        """How far each layer and channel is from what it remembers, over the recent 1,000 examples or so.

        Ranked by `moved` where calibrated, else by the symmetric divergence `kl`. Empty before anything was seen.
        """
        return self._tally.distance()

    def state(self) -> MonitorState:
        """A snapshot, for logs and metrics."""
        return self._tally.state()

    def save(self, path: str | Path) -> None:
        """Writes the calibration as one safetensors file, its settings as JSON in the header.

        Raises:
            ModelError: Not calibrated yet.
            DataError: The file cannot be written.
        """
        if self.calibration is None:
            raise ModelError("there is no calibration to save; call monitor.calibrate(loader) first.")
        write_calibration(Path(path), self.calibration, self._channels())

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, **options: Any) -> Self:
        """A monitor with a saved calibration.

        Args:
            path: What `save` wrote.
            model: The model that was calibrated: its layers' names and channels must be those.
            **options: As for `Monitor`.

        Raises:
            DataError: No such file, or none that this version can read.
            ModelError: It is of another model.
        """
        monitor = cls(model, **options)
        monitor._tally.adopt(read_calibration(Path(path), monitor._channels()), [])
        return monitor

    def _channels(self) -> Mapping[str, int]:
        return {name: layer.num_features for name, layer in self._layers.items()}
