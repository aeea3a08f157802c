"""The networks that `steadynorm compare` trains by name, and how a user's own model becomes one of them."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Final, TypeAlias

import torch
from torch import nn

from steadynorm.errors import ModelError
from steadynorm.files import user_code

__all__ = ["NAMES", "ModelLike", "ModelSource", "resolve"]

ModelLike: TypeAlias = "str | nn.Module | Callable[..., nn.Module]"

_ASKED_BY_NAME: Final = ("norm", "where", "input_shape", "classes")


def _mlp(input_shape: tuple[int, ...], classes: int, layers: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    modules: list[nn.Module] = [nn.Flatten()]
    width = prod(input_shape)
    for _ in range(layers):
        modules += [nn.Linear(width, 100), activation()]
        width = 100
    return nn.Sequential(*modules, nn.Linear(width, classes))


def sigmoid_mlp(input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Three fully connected hidden layers of 100 sigmoid units: the small experiment of Ioffe & Szegedy (2015)."""
    return _mlp(input_shape, classes, 3, nn.Sigmoid)


def elu_mlp_20(input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Twenty fully connected hidden layers of 100 ELU units: deep enough for gradients to come apart."""
    return _mlp(input_shape, classes, 20, nn.ELU)


def relu_mlp(input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Ten fully connected hidden layers of 100 ReLU units."""
    return _mlp(input_shape, classes, 10, nn.ReLU)


def small_cnn(input_shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """Two 3x3 convolutions (16 and 32 channels, ReLU, the map halved after each), then a linear head."""
    if len(input_shape) != 3:
        raise ModelError(
            f"small-cnn needs images of shape (channels, height, width), got examples of shape {input_shape}. "
            "Take one of the fully connected models for a table."
        )
    channels, height, width = input_shape
    modules: list[nn.Module] = []
    for out in (16, 32):
        modules += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
        if min(height, width) >= 2:
            modules.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        channels = out
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(channels * height * width, classes))


_BUILDERS: Final[dict[str, Callable[[tuple[int, ...], int], nn.Sequential]]] = {
    "sigmoid-mlp": sigmoid_mlp,
    "elu-mlp-20": elu_mlp_20,
    "relu-mlp": relu_mlp,
    "small-cnn": small_cnn,
}

NAMES: Final = tuple(_BUILDERS)
"""The models that `steadynorm compare --model` knows by name."""


_STEPS: Final = 2000
_OWN_STEPS: Final = {"elu-mlp-20": 400}
"""Twenty layers take many times as long per step as three, and are where they are going after fewer of them."""


@dataclass(frozen=True)
class ModelSource:
    """Where fresh, untrained copies of one network come from.

    Attributes:
        name: What the report calls it.
        description: One line on what it is.
        make: The factory, called with those of `norm`, `where`, `input_shape` and `classes` that are in `asks`.
        asks: The parameters that `make` wants, by name.
    """

    name: str
    description: str
    make: Callable[..., object] = field(repr=False)
    asks: frozenset[str] = frozenset()

    @property
    def default_steps(self) -> int:
        """How many steps a run of it takes where nobody says otherwise."""
        return _OWN_STEPS.get(self.name, _STEPS)

    @property
    def places_norm(self) -> bool:
        """Whether the factory puts batch norm where it wants it, rather than having it put in."""
        return "norm" in self.asks

    def build(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        norm: Callable[..., nn.Module] | None = None,
        where: str | None = None,
    ) -> nn.Module:
        """A fresh network under torch's global random state.

        Args:
            input_shape: The shape of one example.
            classes: How many classes the network tells apart.
            norm: Handed to a factory that places batch norm itself; None means none.
            where: "before" or "after" the nonlinearity, handed to a factory that asks for it.

        Raises:
            ModelError: The factory fails or returns something other than a module.
        """
        offered = {"norm": norm, "where": where, "input_shape": input_shape, "classes": classes}
        asked = {name: offered[name] for name in _ASKED_BY_NAME if name in self.asks}
        model: object = user_code.call(partial(self.make, **asked), name=self.name, error=ModelError)
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"the factory {self.name} must return a torch.nn.Module, got {type(model).__name__}. "
                "Return the network itself."
            )
        return model


@dataclass(frozen=True)
class _Copies:
    """Makes re-initialised copies of one module, which itself stays as it is."""

    module: nn.Module

    def __call__(self) -> nn.Module:
        model = copy.deepcopy(self.module)
        for part in model.modules():
            reset: Any = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        return model


def _first_line(text: str | None, otherwise: str) -> str:
    return (text or "").strip().partition("\n")[0] or otherwise


def _own_parameters_without_reset(module: nn.Module) -> list[str]:
    return [
        name or type(part).__name__
        for name, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False)) and not callable(getattr(part, "reset_parameters", None))
    ]


def _from_module(module: nn.Module) -> ModelSource:
    stuck = _own_parameters_without_reset(module)
    if stuck:
        raise ModelError(
            f"a model given as a module is re-initialised for each seed by reset_parameters(), which {stuck[0]} lacks. "
            "Give it that method, or pass a factory that returns a fresh model."
        )
    return ModelSource(type(module).__name__, f"the module {type(module).__name__}", _Copies(module))


@dataclass(frozen=True)
class _Named:
    """The user's factory by its name, so that a worker process imports it rather than unpickling it."""

    path: str

    def __call__(self, **arguments: object) -> object:
        return user_code.import_named(self.path, ModelError)(**arguments)


def _from_factory(make: Callable[..., object], factory: Callable[..., object], name: str) -> ModelSource:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise ModelError(f"cannot tell which arguments {name} takes ({error}). Wrap it in a plain function.") from error
    asks: set[str] = set()
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in _ASKED_BY_NAME and parameter.kind is not parameter.POSITIONAL_ONLY:
            asks.add(parameter.name)
        elif parameter.default is parameter.empty:
            raise ModelError(
                f"the factory {name} asks for {parameter.name!r}, which compare cannot fill in. It may take "
                f"{', '.join(_ASKED_BY_NAME)} by name; give every other argument a default."
            )
    return ModelSource(name, _first_line(factory.__doc__, f"built by {name}"), make, frozenset(asks))


def resolve(model: ModelLike) -> ModelSource:
    """Turns what a user wrote for `model` into a source of fresh networks.

    Args:
        model: A name from `NAMES`; "pkg.mod:factory"; a factory; or a `torch.nn.Module`, which is copied and
            re-initialised for each run. A factory may take, by name: `norm` (None, or called as
            `norm(num_features, dims=1)` with dims 1, 2 or 3 for the layer that it wants), `where` ("before" or
            "after"), `input_shape` and `classes`.

    Raises:
        ModelError: The name is unknown, the import fails, or the factory asks for something else.

    Example:
        >>> resolve("sigmoid-mlp").build((1, 8, 8), 10)
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Linear(in_features=64, out_features=100, bias=True)
          (2): Sigmoid()
          ...
    """
    if isinstance(model, nn.Module):
        return _from_module(model)
    if not isinstance(model, str):
        if not callable(model):
            raise ModelError(
                f"model must be a name, pkg.mod:factory, a factory or a torch.nn.Module, got {type(model).__name__}."
            )
        return _from_factory(model, model, str(getattr(model, "__qualname__", type(model).__name__)))
    if model in _BUILDERS:
        builder = _BUILDERS[model]
        description = _first_line(builder.__doc__, model)
        return ModelSource(model, description, builder, frozenset({"input_shape", "classes"}))
    if ":" not in model:
        raise ModelError(f"model must be one of {', '.join(NAMES)}, or pkg.mod:factory; got {model!r}.")
    found = user_code.import_named(model, ModelError)
    return _from_factory(_Named(model), found, model)


def check_output(model: nn.Module, input_shape: tuple[int, ...], classes: int, name: str) -> None:
    """Makes sure that the network turns examples of this shape into one score per class.

    Raises:
        ModelError: It fails on such a batch, or its output has another shape.
    """
    with torch.no_grad():
        call = f"the model {name} on a batch of shape {(2, *input_shape)}"
        output: object = user_code.call(model, torch.zeros(2, *input_shape), name=call, error=ModelError)
    if not isinstance(output, torch.Tensor) or output.shape != (2, classes):
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(f"the model {name} must return scores of shape (N, {classes}), got {got} for N = 2.")
