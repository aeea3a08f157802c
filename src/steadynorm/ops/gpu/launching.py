"""Launching a kernel: on the tensors' device, with numbers that survive the way; or writing it into a graph."""

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from steadynorm.ops.accelerator import writing_a_graph

__all__ = ["launch", "on_its_device", "two_parts"]


def two_parts(number: float) -> tuple[float, float]:
    """Two numbers of float32 that sum up to it, to float64's accuracy: a kernel is given no other."""
    high = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high if math.isfinite(high) else 0.0


def launch(kernel: Any, programs: int, *arguments: object, **constants: object) -> None:
    """Runs a kernel; within `accelerator.into_a_graph`, the graph that is being traced holds it instead.

    Args:
        kernel: Of Triton.
        programs: How many, on one axis.
        arguments: Those that tensors and numbers are given for, in their order.
        constants: What the kernel is compiled for, and how: num_warps.
    """
    if writing_a_graph():
        kernel = wrap_triton(kernel)
    kernel[(programs,)](*arguments, **constants)


def on_its_device(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors are on."""
    if t.device.type == "cpu" or writing_a_graph():  # in Triton's interpreter; a compiled graph sees to it itself
        return nullcontext()
    return torch.get_device_module(t.device).device(t.device)
