"""functional_call: a training forward as a pure function of parameters and buffers, for torch.func."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.nn.remembering import aside
from steadynorm.nn.selection import layers_of

__all__ = ["functional_call"]


def functional_call(
    module: nn.Module,
    parameter_and_buffer_dicts: Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...],
    args: Any = None,
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """`torch.func.functional_call` that also returns the buffers as they are after the forward, and writes nothing.

        (parameters, buffers, input) -> (output, new buffers)

    A forward in train mode changes running statistics; a pure function must return them instead. Thread them through
    from one call to the next, and it works under `grad`, `vjp`, `jvp`, `jacrev`, `hessian` and `vmap` (also over
    stacked parameters and buffers, for an ensemble).

    Args:
        module: In train or eval mode. Its steadynorm batch norms are meant; other buffers are returned as the forward
            leaves them.
        parameter_and_buffer_dicts: As in torch: tensors by name, in one dictionary or several. Buffers that are missing
            are the module's own.
        args: Positional arguments of the module: a tuple, or the only one.
        kwargs: Keyword arguments of the module.

    Returns:
        The module's output, and all its buffers by name, those that are not saved in a state_dict included.

    Source:
        https://pytorch.org/docs/stable/generated/torch.func.functional_call.html

    Example:
        >>> import torch
        >>> from torch.func import grad
        >>> from steadynorm import BatchNorm1d
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), BatchNorm1d(4))
        >>> parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        >>> def loss(parameters, buffers, x):
        ...     y, buffers = functional_call(model, (parameters, buffers), x)
        ...     return y.pow(3).mean(), buffers
        >>> gradients, buffers = grad(loss, has_aux=True)(parameters, buffers, torch.randn(8, 3))
        >>> buffers["1.num_batches_tracked"], model[1].num_batches_tracked
        (tensor(1), tensor(0))
    """
    given = parameter_and_buffer_dicts
    tensors: dict[str, Tensor] = dict(module.named_buffers())
    names = list(tensors)
    for part in given if isinstance(given, tuple) else (given,):
        tensors.update(part)
    layers = [layer for _, layer in layers_of(module)]
    for layer in layers:
        layer.enter(aside)
    try:
        # torch writes tensors that the forward has put in a buffer's place back into this dictionary.
        output = torch.func.functional_call(module, tensors, args, kwargs)
    finally:
        for layer in layers:
            layer.leave(aside)
    return output, {name: tensors[name] for name in names}
