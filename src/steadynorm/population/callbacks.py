"""Trainers that recalibrate before they evaluate: callbacks for Lightning and for the Hugging Face Trainer."""

import importlib
from typing import Any

from torch import nn

from steadynorm.errors import MissingDependencyError, ModelError
from steadynorm.population.recalibration import recalibrate_

__all__ = ["lightning_callback", "trainer_callback"]


def lightning_callback(loader: Any, **options: Any) -> Any:
    """A Lightning callback that recalibrates the module before each validation and test, and when training ends.

    Running statistics are then those of the population under the weights as they are, whatever the moving average of
    training has come to. The sanity check before training is left alone, and so is a `validate` or `test` of its own
    right: the statistics of a checkpoint stay as they were trained.

    Args:
        loader: As for `recalibrate_`; the training data as a rule. Its batches go to the module's own `forward`.
        **options: Of `recalibrate_`: `forward`, `batches`, `order`, `progress`, `process_group`.

    Returns:
        A `lightning.pytorch.Callback`, for `Trainer(callbacks=[...])`, with the last `report`.

    Raises:
        MissingDependencyError: Neither `lightning` nor `pytorch_lightning` is installed.
    """
    base = _imported(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback

    class Recalibrate(base):  # pyright: ignore[reportUntypedBaseClass]
        report: Any = None

        def _recalibrate(self, module: nn.Module) -> None:
            self.report = recalibrate_(module, loader, **options)

        def on_validation_start(self, trainer: Any, pl_module: nn.Module) -> None:
            if trainer.state.fn == "fit" and not trainer.sanity_checking:
                self._recalibrate(pl_module)

        def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
            self._recalibrate(pl_module)

    return Recalibrate()


def trainer_callback(loader: Any, **options: Any) -> Any:
    """A callback of the Hugging Face Trainer that recalibrates the model at the end of each epoch and of training.

    The Trainer evaluates by `eval_strategy="epoch"` right after the former, and `trainer.evaluate()` after the latter.

    Args:
        loader: As for `recalibrate_`; dicts are passed by name to the model, labels left out.
        **options: Of `recalibrate_`: `forward`, `batches`, `order`, `progress`, `process_group`.

    Returns:
        A `transformers.TrainerCallback`, for `Trainer(callbacks=[...])`, with the last `report`.

    Raises:
        MissingDependencyError: `transformers` is not installed.
    """
    base = _imported(("transformers",), "transformers").TrainerCallback

    class Recalibrate(base):  # pyright: ignore[reportUntypedBaseClass]
        report: Any = None

        def _recalibrate(self, model: object) -> None:
            if not isinstance(model, nn.Module):
                raise ModelError(f"the Trainer gave its callback no model, but {model!r}.")
            self.report = recalibrate_(model, loader, **options)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._recalibrate(kwargs.get("model"))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._recalibrate(kwargs.get("model"))

    return Recalibrate()


def _imported(names: tuple[str, ...], package: str) -> Any:
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise MissingDependencyError(f"this callback needs {names[0]}. Install it with: pip install {package}.")
