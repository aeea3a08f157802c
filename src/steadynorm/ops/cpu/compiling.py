"""Numba's decorators as the kernels use them, typed as what they make."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# (Numba's own are typed in part)

from typing import Any, Final, TypeVar

from numba import extending as numba_extending
from numba import njit

__all__ = ["FAST", "compiled", "intrinsic", "overload"]

Function = TypeVar("Function")

# What sums need to be vectorised, and nothing that would assume NaN and inf away. Numba's default error model checks
# divisions, which stops loops from being vectorised.
FAST: Final[dict[str, Any]] = {"fastmath": {"reassoc", "nsz", "contract"}, "error_model": "numpy"}
# Without the wrappers by which Python or C would call it, a function compiles in half the time. It is always inlined:
# one that stayed a function of its own would be shared by the kernels of a process, in the code of whichever was
# compiled or loaded first, and the last bits of a result could depend on that.
_PART: Final[dict[str, Any]] = {**FAST, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}


def compiled(function: Function) -> Function:
    """A part of a kernel, which nothing else calls."""
    return njit(**_PART)(function)  # pyright: ignore


def intrinsic(function) -> Any:
    """A function whose code is written by `function`; it is called without the typing context."""
    return numba_extending.intrinsic(function)


def overload(function) -> Any:
    """Registers what `function` is compiled to, by the types of its arguments."""
    return numba_extending.overload(function, jit_options=_PART)  # pyright: ignore[reportArgumentType]
