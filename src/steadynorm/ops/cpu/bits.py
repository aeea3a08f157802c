"""A bit per value: which side of an activation's kink it was on, kept for a backward that could not tell.

After a residual add the mask of a ReLU follows from x and the residual, or from these bits: a thirty-second of either.
They lie in words of 64, run by run of the values that a kernel treats at a time, each run from a new word on: no two
tasks share one. What order that is follows from the geometry, which backward must share.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
# (Numba types its functions itself)

import numpy as np
import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from steadynorm.ops.cpu.compiling import compiled, intrinsic
from steadynorm.ops.cpu.geometry import Geometry
from steadynorm.ops.cpu.memory import array_at

__all__ = ["WORD", "flags", "pack", "unpack", "words_for"]

WORD = 64


@intrinsic
def _bits_within(typingctx, numbers, i, cap):  # pragma: no cover
    """Of 64 numbers from the i-th on, a bit each: 0 < z and not z >= cap. (A comparison in a loop is not packed.)"""

    def generate(context, builder, signature, arguments):
        array, index, highest = arguments
        scalar = context.get_data_type(numbers.dtype)
        vector = ir.VectorType(scalar, WORD)
        z = _pointer(context, builder, numbers, array, index, vector)
        z = builder.load(z, align=numbers.dtype.bitwidth // 8)
        above = builder.fcmp_ordered(">", z, ir.Constant(vector, [0.0] * WORD))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), WORD), [0] * WORD)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), highest, ir.IntType(32)(0))
        below = builder.fcmp_unordered("<", z, builder.shuffle_vector(one, one, lanes))
        return builder.bitcast(builder.and_(above, below), ir.IntType(WORD))

    return types.uint64(numbers, types.intp, numbers.dtype), generate


@intrinsic
def _put_flags(typingctx, bits, numbers, i):  # pragma: no cover
    """numbers[i + k] = 1 where the k-th of 64 bits is set, else 0."""

    def generate(context, builder, signature, arguments):
        word, array, index = arguments
        scalar = context.get_data_type(numbers.dtype)
        vector = ir.VectorType(scalar, WORD)
        chosen = builder.bitcast(word, ir.VectorType(ir.IntType(1), WORD))
        ones, zeros = (ir.Constant(vector, [value] * WORD) for value in (1.0, 0.0))
        target = _pointer(context, builder, numbers, array, index, vector)
        builder.store(builder.select(chosen, ones, zeros), target, align=numbers.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(types.uint64, numbers, types.intp), generate


def _pointer(context, builder, kind, array, index, vector):
    held = context.make_array(kind)(context, builder, array)
    return builder.bitcast(builder.gep(held.data, [index]), vector.as_pointer())


@compiled
def pack(z, n, cap, bits, word):  # pragma: no cover
    """Keeps 0 < z < cap of n numbers, whose array is a whole number of words long, from a word on."""
    count = (n + WORD - 1) // WORD
    kept = array_at(bits + 8 * word, count, np.uint64(0))
    for k in range(count):
        kept[k] = _bits_within(z, WORD * k, cap)


@compiled
def unpack(bits, word, out, n):  # pragma: no cover
    """1 or 0 for each of n bits from a word on."""
    count = (n + WORD - 1) // WORD
    kept = array_at(bits + 8 * word, count, np.uint64(0))
    for k in range(count):
        _put_flags(kept[k], out, WORD * k)


def _per(values: int) -> int:
    return -(-values // WORD)


def words_for(read: Geometry, channels: int) -> int:
    """How many words the values of a tensor take that is read like this."""
    if read.columns:
        rows = -(-read.outer * channels * read.inner // read.width)
        return rows * read.chunks * _per(read.chunk)
    return read.outer * channels * _per(read.inner)


def flags(bits: Tensor, read: Geometry, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The bits as booleans, one for each element of a dense tensor of that shape behind those strides."""
    places = torch.arange(WORD, device=bits.device)
    flat = (bits[:, None] >> places & 1).to(torch.bool)
    if read.columns:
        chunks = flat.view(-1, read.chunks, _per(read.chunk) * WORD)[..., : read.chunk]
        flat = chunks.reshape(len(chunks), -1)[:, : read.width]
    else:
        flat = flat.view(-1, _per(read.inner) * WORD)[:, : read.inner]
    return flat.reshape(-1)[: shape.numel()].as_strided(shape, strides)
