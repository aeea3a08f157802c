"""The kernels over planes: which tasks there are, in which order. What they compute is in planes.py."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false
# (Numba types its functions itself)

import numpy as np
from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from steadynorm.ops.cpu.channel import (
    around,
    gather_gradients,
    gather_statistics,
    keep_gradients,
    keep_statistics,
    settled,
)
from steadynorm.ops.cpu.compiling import compiled
from steadynorm.ops.cpu.kernel import MEASURING, NORMALIZING, Kernel
from steadynorm.ops.cpu.memory import array_at, narrow, take, thread_number, wait_for_all, widest_vectors
from steadynorm.ops.cpu.planes import part_of, pulls, rooms, spread, sums, write

__all__ = [
    "backward",
    "backward_in_parts",
    "forward",
    "forward_in_parts",
    "gathered_gradients",
    "gathered_statistics",
    "gradient",
    "measure",
    "normalize",
    "reduce",
]


@compiled
def _measure_all(a, me):  # pragma: no cover
    partial = array_at(a.partial, (2 * a.parts + 1) * a.channels, np.float64(0))
    while True:
        task = take(a, me, 0, a.tasks)
        if task >= a.tasks:
            break
        c, part, start, stop = part_of(a, task)
        near = narrow(a.memory, around(a, c))
        first, second = sums(a, c, start, stop, near)
        partial[2 * a.parts * a.channels + c] = near  # the same whichever part writes it
        partial[part * a.channels + c] = first
        partial[(a.parts + part) * a.channels + c] = second


@compiled
def _normalize_all(a, me, phase, scratch, numbers):  # pragma: no cover
    while True:
        task = take(a, me, phase, a.tasks)
        if task >= a.tasks:
            break
        c, _, start, stop = part_of(a, task)
        write(a, c, start, stop, scratch, numbers)


@compiled
def _reduce_all(a, me, scratch, numbers):  # pragma: no cover
    partial = array_at(a.partial, (2 * a.parts + 1) * a.channels, np.float64(0))
    while True:
        task = take(a, me, 0, a.tasks)
        if task >= a.tasks:
            break
        c, part, start, stop = part_of(a, task)
        first, second = pulls(a, c, start, stop, scratch, numbers)
        partial[part * a.channels + c] = first
        partial[(a.parts + part) * a.channels + c] = second


@compiled
def _spread_all(a, me, phase, scratch, numbers):  # pragma: no cover
    while True:
        task = take(a, me, phase, a.tasks)
        if task >= a.tasks:
            break
        c, _, start, stop = part_of(a, task)
        spread(a, c, start, stop, scratch, numbers)


def _forward(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    scratch, numbers = rooms(a)
    me, values = thread_number(a), a.outer * a.inner
    while True:
        c = take(a, me, 0, a.tasks)
        if c >= a.tasks:
            break
        near = narrow(a.memory, around(a, c))
        first, second = sums(a, c, 0, values, near)
        mean, m2 = settled(a, c, np.float64(near), first, second)
        keep_statistics(a, c, mean, m2)
        write(a, c, 0, values, scratch, numbers)


def _backward(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    scratch, numbers = rooms(a)
    me, values = thread_number(a), a.outer * a.inner
    while True:
        c = take(a, me, 0, a.tasks)
        if c >= a.tasks:
            break
        first, second = pulls(a, c, 0, values, scratch, numbers)
        keep_gradients(a, c, first, second)
        spread(a, c, 0, values, scratch, numbers)


def _forward_in_parts(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    me = thread_number(a)
    _measure_all(a, me)
    wait_for_all(a)
    gather_statistics(a, me, 1)
    wait_for_all(a)
    scratch, numbers = rooms(a)
    _normalize_all(a, me, 2, scratch, numbers)


def _backward_in_parts(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    scratch, numbers = rooms(a)
    me = thread_number(a)
    _reduce_all(a, me, scratch, numbers)
    wait_for_all(a)
    gather_gradients(a, me, 1)
    wait_for_all(a)
    _spread_all(a, me, 2, scratch, numbers)


def _measure(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    _measure_all(a, thread_number(a))


def _normalize(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    scratch, numbers = rooms(a)
    _normalize_all(a, thread_number(a), 0, scratch, numbers)


def _reduce(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    scratch, numbers = rooms(a)
    _reduce_all(a, thread_number(a), scratch, numbers)


def _gradient(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    scratch, numbers = rooms(a)
    _spread_all(a, thread_number(a), 0, scratch, numbers)


def _gather_statistics(pointer):  # pragma: no cover
    a = carray(pointer, 1)[0]
    gather_statistics(a, thread_number(a), 0)


def _gather_gradients(pointer):  # pragma: no cover
    a = carray(pointer, 1)[0]
    gather_gradients(a, thread_number(a), 0)


forward, backward = Kernel(_forward), Kernel(_backward)
forward_in_parts, backward_in_parts = Kernel(_forward_in_parts), Kernel(_backward_in_parts)
measure, normalize = Kernel(_measure, reads=MEASURING), Kernel(_normalize, reads=NORMALIZING)
reduce, gradient = Kernel(_reduce, reads=NORMALIZING), Kernel(_gradient)
gathered_statistics = Kernel(_gather_statistics, reads=MEASURING)
gathered_gradients = Kernel(_gather_gradients, reads=("memory",))
