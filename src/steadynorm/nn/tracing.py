"""How a layer appears in a `torch.fx` trace: as one `call_module` node, keyword arguments included.

`torch.fx.symbolic_trace` treats modules of `torch.nn` as leaves and traces into all others; it would follow our layers
into their arithmetic. A layer that is handed a Proxy therefore emits the node itself.
"""

import sys
from typing import Any, cast

from torch import Tensor, nn

from steadynorm.errors import ArgumentError

__all__ = ["is_proxy", "leaf_call"]


def is_proxy(value: object) -> bool:
    """Whether `value` is a `torch.fx.Proxy`; false without importing torch.fx where nothing has imported it."""
    if isinstance(value, Tensor):
        return False
    proxy = sys.modules.get("torch.fx.proxy")
    return proxy is not None and isinstance(value, proxy.Proxy)


def leaf_call(module: nn.Module, input: Any, **options: Any) -> Tensor:
    """Emits `call_module` for this module on the tracer of what is traced, with those options that are not None."""
    tracer = next(value.tracer for value in (input, *options.values()) if is_proxy(value))
    path = tracer.path_of_module(module)
    if not path:
        raise ArgumentError("a layer cannot be the root of a torch.fx trace: trace nn.Sequential(layer) instead.")
    given = {name: value for name, value in options.items() if value is not None}
    return cast(Tensor, tracer.create_proxy("call_module", path, (input,), given))
