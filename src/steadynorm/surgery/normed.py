"""A Linear or convolution with a batch norm inside it, for layers in a forward of any kind."""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn

__all__ = ["INPUT", "OUTPUT", "Normed", "norm_inside_"]

OUTPUT = "batchnorm"
"""The child that a layer's result goes through."""
INPUT = "input_batchnorm"
"""The child that a layer's input goes through."""


class Normed(nn.Module):
    """What a layer's class gets in front: y = batchnorm(layer(x)), or y = layer(input_batchnorm(x)).

    The layer stays the object that it is, of a subclass of its class: its parameters keep their names, and the forward
    of the model, which calls it, stays as it is written, loops and conditions included. It can be copied and pickled
    wherever its class can; `torch.fx` traces into it.

    Attributes:
        plain: The class that it had.
    """

    plain: ClassVar[type[nn.Module]]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer and its batch norm."""
        before, after = self._modules.get(INPUT), self._modules.get(OUTPUT)
        y = self.plain.forward(self, input if before is None else before(input), *args, **kwargs)
        return y if after is None else after(y)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object, but for its class, which has no name to be found by."""
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return _new, (self.plain,), *state


@cache
def _normed(plain: type[nn.Module]) -> type[Normed]:
    make = cast("Callable[..., type[Normed]]", type)
    return make(f"Normed{plain.__name__}", (Normed, plain), {"plain": plain, "__module__": __name__})


def _new(plain: type[nn.Module]) -> Normed:
    kind = _normed(plain)
    return kind.__new__(kind)


def norm_inside_(layer: nn.Module, norm: nn.Module, name: str) -> None:
    """Puts a batch norm into a layer.

    Args:
        layer: Changes its class, and gets a child.
        norm: The batch norm.
        name: `INPUT` or `OUTPUT`.
    """
    if not isinstance(layer, Normed):
        object.__setattr__(layer, "__class__", _normed(type(layer)))
    layer.add_module(name, norm)
