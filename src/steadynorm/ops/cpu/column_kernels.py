"""The kernels over columns: which tasks there are, in which order. What they compute is in columns.py."""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# pyright: reportUnknownVariableType=false
# (Numba types its functions itself)

from numba import carray  # pyright: ignore[reportPrivateImportUsage]

from steadynorm.ops.cpu.channel import gather_gradients, gather_statistics, keep_gradients, keep_statistics, settled
from steadynorm.ops.cpu.columns import (
    channels_of,
    chunk_of,
    expand_coefficients,
    expand_constants,
    keep_partial,
    measure_chunk,
    reduce_chunk,
    rooms,
    spread,
    write,
)
from steadynorm.ops.cpu.compiling import compiled
from steadynorm.ops.cpu.geometry import LONGEST
from steadynorm.ops.cpu.kernel import MEASURING, NORMALIZING, Kernel
from steadynorm.ops.cpu.memory import take, thread_number, wait_for_all, widest_vectors

__all__ = ["backward", "backward_in_parts", "forward", "forward_in_parts", "gradient", "measure", "normalize", "reduce"]


@compiled
def _measure_all(a, me, room):  # pragma: no cover
    per_channel, per_column, totals, _ = room
    while True:
        task = take(a, me, 0, a.tasks)
        if task >= a.tasks:
            break
        part, first, last, begin, end = chunk_of(a, task)
        measure_chunk(a, first, last, begin, end, per_channel, per_column, totals)
        keep_partial(a, part, begin, end, per_channel)


@compiled
def _normalize_all(a, me, phase, room):  # pragma: no cover
    per_channel, per_column, _, scratch = room
    while True:
        task = take(a, me, phase, a.tasks)
        if task >= a.tasks:
            break
        _, first, last, begin, end = chunk_of(a, task)
        expand_constants(a, begin, end, per_channel, per_column)
        write(a, first, last, begin, end, per_column, scratch)


@compiled
def _reduce_all(a, me, room):  # pragma: no cover
    per_channel, per_column, totals, scratch = room
    while True:
        task = take(a, me, 0, a.tasks)
        if task >= a.tasks:
            break
        part, first, last, begin, end = chunk_of(a, task)
        reduce_chunk(a, first, last, begin, end, per_channel, per_column, totals, scratch)
        keep_partial(a, part, begin, end, per_channel)


@compiled
def _spread_all(a, me, phase, room):  # pragma: no cover
    per_channel, per_column, _, scratch = room
    while True:
        task = take(a, me, phase, a.tasks)
        if task >= a.tasks:
            break
        _, first, last, begin, end = chunk_of(a, task)
        expand_constants(a, begin, end, per_channel, per_column)
        expand_coefficients(a, begin, end, per_channel, per_column)
        spread(a, first, last, begin, end, per_column, scratch)


def _forward(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    per_channel, per_column, totals, scratch = rooms(a)
    me = thread_number(a)
    while True:
        task = take(a, me, 0, a.tasks)
        if task >= a.tasks:
            break
        _, first, last, begin, end = chunk_of(a, task)
        measure_chunk(a, first, last, begin, end, per_channel, per_column, totals)
        c = begin // a.inner
        for k in range(channels_of(a, begin, end)):
            mean, m2 = settled(a, c + k, per_channel[2 * LONGEST + k], per_channel[k], per_channel[LONGEST + k])
            keep_statistics(a, c + k, mean, m2)
        expand_constants(a, begin, end, per_channel, per_column)
        write(a, first, last, begin, end, per_column, scratch)


def _backward(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    per_channel, per_column, totals, scratch = rooms(a)
    me = thread_number(a)
    while True:
        task = take(a, me, 0, a.tasks)
        if task >= a.tasks:
            break
        _, first, last, begin, end = chunk_of(a, task)
        reduce_chunk(a, first, last, begin, end, per_channel, per_column, totals, scratch)
        c = begin // a.inner
        for k in range(channels_of(a, begin, end)):
            keep_gradients(a, c + k, per_channel[k], per_channel[LONGEST + k])
        expand_coefficients(a, begin, end, per_channel, per_column)
        spread(a, first, last, begin, end, per_column, scratch)


def _forward_in_parts(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    room, me = rooms(a), thread_number(a)
    _measure_all(a, me, room)
    wait_for_all(a)
    gather_statistics(a, me, 1)
    wait_for_all(a)
    _normalize_all(a, me, 2, room)


def _backward_in_parts(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    room, me = rooms(a), thread_number(a)
    _reduce_all(a, me, room)
    wait_for_all(a)
    gather_gradients(a, me, 1)
    wait_for_all(a)
    _spread_all(a, me, 2, room)


def _measure(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    _measure_all(a, thread_number(a), rooms(a))


def _normalize(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    _normalize_all(a, thread_number(a), 0, rooms(a))


def _reduce(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    _reduce_all(a, thread_number(a), rooms(a))


def _gradient(pointer):  # pragma: no cover
    widest_vectors()
    a = carray(pointer, 1)[0]
    _spread_all(a, thread_number(a), 0, rooms(a))


forward, backward = Kernel(_forward), Kernel(_backward)
forward_in_parts, backward_in_parts = Kernel(_forward_in_parts), Kernel(_backward_in_parts)
measure, normalize = Kernel(_measure, reads=MEASURING), Kernel(_normalize, reads=NORMALIZING)
reduce, gradient = Kernel(_reduce, reads=NORMALIZING), Kernel(_gradient)
