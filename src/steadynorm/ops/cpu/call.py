"""The one struct that every kernel is called with: addresses, sizes, numbers, and the kinds of memory behind them."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# (Numba's types are not typed)

import ctypes
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from numba import types

from steadynorm.ops.cpu.memory import PHASES, THREADS

__all__ = ["BENT", "DIGEST", "KEPT", "KINDS", "RELU", "SMOOTH", "Call", "Kinds", "record"]

_INTEGERS = (
    *(f"taken_{i}" for i in range(PHASES * THREADS + 1)),  # how many tasks each thread has taken; how many threads came
    "threads",
    "thread_number",  # the address of a C function that says which thread asks, or 0
    "barrier",  # the address of one that waits for the others, or 0
    "tasks",
    "outer",  # A: x is read as (A, C, S)
    "channels",  # C
    "inner",  # S
    "parts",  # into how many parts, each a task, the values of a channel are split
    "width",  # of a row of columns, see columns.py
    "chunk",  # how many of them a task takes
    # The addresses of arrays, 0 for those that a kernel is not given.
    "x",
    "y",
    "statistics",  # float64 (3, C): count, mean, m2
    "weight",
    "bias",
    "residual",
    "grad_y",
    "grad_x",
    "grad_residual",
    "grad_weight",
    "grad_bias",
    "position_weight",  # (A, S), in the dtype that computes
    "valid",  # bool (A, S)
    "sums",  # float64 (2, C): Σ g and Σ g (x - μ)
    "running_mean",  # (C,); from here to refused for committing.py alone
    "running_var",
    "tracked",  # int64 ()
    "rejected",
    "weighted",  # whether the count is a sum of sample weights
    "refused",  # is set to whether the batch was rejected
    "bits",  # uint64: a bit per value, whether its activation rises; see bits.py
    "partial",  # float64 (2 parts + 1, C): the two sums of each part, and what values were taken relative to
)
_NUMBERS = (
    "count",  # n, the sum of the weights
    "eps",
    "momentum",  # negative for the average of all batches
    "greatest",  # number that the running statistics can hold
    "slope",  # of the activation below 0
    "cap",  # its greatest value
    "code",  # a smooth activation's number and parameters, see smooth.py
    "p",
    "q",
)
_KINDS = ("memory", "added", "weights", "mask", "activation")


class Kinds(NamedTuple):
    """What a kernel is compiled for: the kind (see `memory`) of each array that may be of several, "" if absent.

    Attributes:
        memory: x, y, their gradients.
        added: The residual and its gradient.
        weights: position_weight.
        mask: valid.
        activation: Which way it is computed, see bending.py: "" for none, or `RELU`, `BENT`, `KEPT` or `SMOOTH`.
    """

    memory: str
    added: str = ""
    weights: str = ""
    mask: str = ""
    activation: str = ""


KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16", torch.float16: "int16"}
"""The kind of memory that holds each dtype."""

RELU, BENT, KEPT, SMOOTH = "uint8", "uint16", "int8", "uint32"
"""Ways to compute an activation: as types, which is what a kernel is compiled for."""


class Call(ctypes.Structure):
    """The struct as Python fills it in; what is not given is 0. (The kinds are types: they take room, not values.)"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_int64) for name in (*_KINDS, "affine")),
    ]


_IN_PYTHON = {"__init__", "backend", "kernel", "pages", "shortcut", "turns"}  # nothing of these is compiled


def _digest_of_sources() -> str:
    """Of all that kernels are made of: Numba itself looks at a function's own file alone."""
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem not in _IN_PYTHON]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


DIGEST = _digest_of_sources()
"""Which sources kernels are made of."""


def record(kinds: Kinds) -> types.Record:
    """The struct as a kernel for these kinds sees it. Its type is what Numba tells specialisations apart by.

    One more kind follows from them: `affine`, of γ, β and their gradients, which are in the dtype that computes.
    """
    affine = types.float64 if kinds.memory == "float64" else types.float32
    slots = [
        *((name, types.int64) for name in _INTEGERS),
        *((name, types.float64) for name in _NUMBERS),
        *((name, getattr(types, kind or "boolean")) for name, kind in zip(_KINDS, kinds, strict=True)),
        ("affine", affine),
    ]
    fields = [(name, {"type": kind, "offset": 8 * i}) for i, (name, kind) in enumerate(slots)]
    return types.Record(fields, 8 * len(slots), aligned=True)
