"""How a layer appears in a `torch.fx` trace: as one `call_module` node, keyword arguments included.

`torch.fx.symbolic_trace` treats modules of `torch.nn` as leaves and traces into all others; it would follow our layers
into their arithmetic. A layer that is handed a Proxy therefore emits the node itself.
"""

import sys
from typing import Any, cast

from torch import Tensor, nn

__all__ = ["is_proxy", "leaf_call"]


def is_proxy(value: object) -> bool:
    """Whether `value` is a `torch.fx.Proxy`; false without importing torch.fx where nothing has imported it."""
    if isinstance(value, Tensor):
        return False
    proxy = sys.modules.get("torch.fx.proxy")
    return proxy is not None and isinstance(value, proxy.Proxy)


def leaf_call(module: nn.Module, input: Any, **options: Any) -> Tensor:
    """Emits `call_module` for this module on the tracer of `input`, with those options that are not None."""
    tracer = input.tracer
    given = {name: value for name, value in options.items() if value is not None}
    return cast(Tensor, tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), given))
