"""What computes on a GPU: kernels in Triton, once a trial on the device has found that they compute right there.

The environment variable STEADYNORM_GPU decides otherwise: `reference` for torch's own operations, `triton` for the
kernels or an error. Without Triton, and on other devices, torch's operations compute; that is said once, at debug
level.
"""

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

from steadynorm.errors import ArgumentError, BackendError, BackendWarning, MissingDependencyError

if TYPE_CHECKING:
    from steadynorm.ops.backends import Backend

__all__ = ["GPUS", "has_kernels", "into_a_graph", "kernels", "writing_a_graph"]

GPUS = {"cuda", "xpu"}
NAME = "STEADYNORM_GPU"
_found: "dict[str, Backend | None]" = {}
_into_a_graph: ContextVar[bool] = ContextVar("_into_a_graph", default=False)
_log = logging.getLogger(__name__)


def kernels(device: str) -> "Backend | None":
    """The backend in Triton for a kind of device, or None where torch's operations compute; decided once.

    Args:
        device: As `torch.device.type` has it.

    Raises:
        ArgumentError: The environment variable asks for something else.
        MissingDependencyError: It asks for Triton, which is not installed.
        BackendError: It asks for Triton, which fails on this device.
    """
    if device not in _found:
        if device in GPUS and not _may_try(device):
            return None
        _found[device] = _decided(device)
    return _found[device]


def has_kernels(device: str) -> bool:
    """Whether there are such kernels."""
    return kernels(device) is not None


# To a compiler this is a constant. (The attribute is what `torch.compiler.assume_constant_result` sets; importing that
# takes more than a second.)
has_kernels._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _may_try(device: str) -> bool:
    """Not while others look on at what runs, or the device only writes it down."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return False
    return device != "cuda" or not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing()


def _decided(device: str) -> "Backend | None":
    if device not in GPUS:
        _log.debug("There are no kernels for %s: torch's own operations compute there.", device)
        return None
    asked = os.environ.get(NAME, "auto")
    if asked not in ("auto", "reference", "triton"):
        raise ArgumentError(f"{NAME} must be auto, reference or triton, got {asked!r}.")
    if asked == "reference":
        return None
    try:
        from steadynorm.ops.gpu import backend, trial
    except ImportError as error:
        if asked == "triton":
            raise MissingDependencyError(
                f"{NAME}=triton needs Triton, which cannot be imported ({error}). torch's build for GPUs brings it: "
                "install that, or unset the variable."
            ) from error
        _log.debug("Triton cannot be imported (%s): torch's own operations compute on %s.", error, device)
        return None
    failure = trial.failure(torch.device(device))
    if failure is None:
        _log.debug("Kernels in Triton compute on %s.", device)
        return backend
    if asked == "triton":
        raise BackendError(f"{NAME}=triton was asked for, and the kernels fail on {device}: {failure}. Unset it.")
    warnings.warn(
        f"The kernels in Triton were tried on {device} and are not used: {failure}. torch's own operations compute "
        f"instead, more slowly. {NAME}=reference says so beforehand, without this warning.",
        BackendWarning,
        stacklevel=2,
    )
    return None


@contextmanager
def into_a_graph() -> Generator[None]:
    """Within this block the GPU's kernels are not run: a graph that is being traced holds each of them by itself."""
    before = _into_a_graph.set(True)
    try:
        yield
    finally:
        _into_a_graph.reset(before)


def writing_a_graph() -> bool:
    """Whether an `into_a_graph` block is around."""
    return _into_a_graph.get()
