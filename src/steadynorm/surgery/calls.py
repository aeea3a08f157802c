"""Which layers a model calls on an example, how often, in which order, and with how many axes."""

from collections import defaultdict
from functools import partial
from typing import Any

from torch import Tensor, nn

from steadynorm.nn.keeping import Buffers, evaluating
from steadynorm.surgery.layers import is_foldable
from steadynorm.surgery.outputs import called

__all__ = ["Calls"]


class Calls:
    """One run of a model in evaluation.

    Attributes:
        count: How often it called a layer, by the layer's name.
        ranks: The numbers of axes of what the layer gave.
        last: When it was called last: its place among all calls.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        """Runs the model.

        Args:
            model: Its buffers and modes come back in the end.
            example: A tensor, a tuple of arguments or a dict of named ones.

        Raises:
            ModelError: It does not take the example.
        """
        self.count: dict[str, int] = defaultdict(int)
        self.ranks: dict[str, set[int]] = defaultdict(set)
        self.last: dict[str, int] = {}
        layers = {n: m for n, m in model.named_modules() if is_foldable(m) or not any(True for _ in m.children())}
        handles = [layer.register_forward_hook(partial(self._note, name)) for name, layer in layers.items()]
        buffers = Buffers(model)
        try:
            with evaluating(model):
                called(model, example)
        finally:
            buffers.restore()
            for handle in handles:
                handle.remove()

    def _note(self, name: str, _: nn.Module, __: object, output: object) -> None:
        self.count[name] += 1
        self.last[name] = sum(self.count.values())
        if isinstance(output, Tensor):
            self.ranks[name].add(output.dim())
