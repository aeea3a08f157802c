"""How kernels see memory: arrays over plain addresses, read and written in the dtype that computes.

Numba has no half precision on the CPU. bfloat16 and float16 are read as the 16-bit integers that hold them, and turned
into float32 by shifts of their bits, which vectorises and needs no instruction that a CPU may lack. What an array holds
is told apart by a *kind*, a Numba type: float32 and float64 for themselves, uint16 for bfloat16, int16 for float16, and
boolean for an array that is not there: loops then read a constant in its place, which the compiler folds away.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUnknownLambdaType=false
# (Numba types its functions itself)

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import make_array, populate_array

from steadynorm.ops.cpu.compiling import compiled, intrinsic, overload

__all__ = [
    "ABSENT",
    "PHASES",
    "THREADS",
    "array_at",
    "fill",
    "load",
    "narrow",
    "of_column",
    "present",
    "room",
    "store",
    "take",
    "thread_number",
    "wait_for_all",
    "widest_vectors",
]

ABSENT = types.boolean
THREADS = 64  # at most
PHASES = 3  # of a kernel, each with tasks of its own
_LINE = 64  # bytes: a vector that lies across two lines of the cache takes twice as long
_BFLOAT16, _FLOAT16 = types.uint16, types.int16


@intrinsic
def _count_up(typingctx, call, k):  # pragma: no cover
    """The k-th of the counters that the struct starts with, before it goes up by one; no other thread gets the same."""

    def generate(context, builder, signature, arguments):
        whole = ir.IntType(64)
        counters = builder.bitcast(arguments[0], whole.as_pointer())
        return builder.atomic_rmw("add", builder.gep(counters, [arguments[1]]), whole(1), "monotonic")

    return types.int64(call, types.int64), generate


@intrinsic
def _ask(typingctx, address):  # pragma: no cover
    """The int that the C function at an address returns."""

    def generate(context, builder, signature, arguments):
        number = ir.IntType(32)
        function = builder.inttoptr(arguments[0], ir.FunctionType(number, []).as_pointer())
        return builder.call(function, [])

    return types.int32(types.int64), generate


@intrinsic
def _call(typingctx, address):  # pragma: no cover
    """Calls the C function at an address, which takes and returns nothing."""

    def generate(context, builder, signature, arguments):
        function = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), []).as_pointer())
        builder.call(function, [])
        return context.get_dummy_value()

    return types.none(types.int64), generate


@compiled
def thread_number(a):  # pragma: no cover
    """Which of the threads this is, the same one from call to call where the runtime numbers them."""
    return np.int64(_ask(a.thread_number)) if a.thread_number != 0 else _count_up(a, np.int64(PHASES * THREADS))


@compiled
def take(a, me, phase, tasks):  # pragma: no cover
    """The next of the tasks of a phase for thread `me`; `tasks` if there is none left.

    Each thread has a share of its own, always the same, whose data its cache may still hold; the last phase starts with
    what the first has ended with. One that has finished early helps the next.
    """
    for k in range(a.threads):
        whose = (me + k) % a.threads
        begin, end = whose * tasks // a.threads, (whose + 1) * tasks // a.threads
        taken = _count_up(a, np.int64(phase * THREADS + whose))
        if taken < end - begin:
            return begin + taken if phase < 2 else end - 1 - taken
    return tasks


@compiled
def wait_for_all(a):  # pragma: no cover
    """Until every thread has come this far."""
    if a.barrier != 0:
        _call(a.barrier)


@intrinsic
def array_at(typingctx, address, size, kind):  # pragma: no cover
    """The one-dimensional array of `size` values of `kind` at an address."""
    array_type = types.Array(kind, 1, "C")

    def generate(context, builder, signature, arguments):
        held = context.get_data_type(kind)
        item = context.get_constant(types.intp, context.get_abi_sizeof(held))
        array = make_array(array_type)(context, builder)
        populate_array(
            array,
            data=builder.inttoptr(arguments[0], held.as_pointer()),
            shape=cgutils.pack_array(builder, [arguments[1]]),
            strides=cgutils.pack_array(builder, [item]),
            itemsize=item,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(types.int64, types.intp, kind), generate


@intrinsic
def widest_vectors(typingctx):  # pragma: no cover
    """Lets the compiler use the widest vectors there are in the function that calls this.

    LLVM halves them by default where early processors lowered their clock for 512 bits, which none does for long now.
    """

    def generate(context, builder, signature, arguments):
        # llvmlite's own `add` knows a fixed list of attributes, which this one is not on.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


def _bitcast(to):
    @intrinsic
    def bits(typingctx, value):  # pragma: no cover
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(to))

        return to(value), generate

    return bits


_as_float32, _as_uint32 = _bitcast(types.float32), _bitcast(types.uint32)


@intrinsic
def _from_bfloat16(typingctx, bits):  # pragma: no cover
    """The float32 whose upper half these 16 bits are."""

    def generate(context, builder, signature, arguments):
        whole = ir.IntType(32)
        wide = builder.shl(builder.zext(arguments[0], whole), whole(16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _to_bfloat16(typingctx, value):  # pragma: no cover
    """The upper half of a float32, rounded to nearest, ties to even. (Numba's own integers would widen to 64 bits.)"""

    def generate(context, builder, signature, arguments):
        whole = ir.IntType(32)
        bits = builder.bitcast(arguments[0], whole)
        upper = builder.lshr(bits, whole(16))
        tie = builder.add(builder.and_(upper, whole(1)), whole(0x7FFF))
        rounded = builder.lshr(builder.add(bits, tie), whole(16))
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        return builder.trunc(builder.select(nan, builder.or_(upper, whole(0x40)), rounded), ir.IntType(16))

    return types.uint16(types.float32), generate


@compiled
def _from_float16(half):  # pragma: no cover
    bits = np.uint32(np.uint16(half))
    # The exponents' biases differ by 112, which a multiplication puts right for subnormal numbers, too.
    finite = _as_uint32(_as_float32(np.uint32((bits & 0x7FFF) << 13)) * np.float32(2.0**112))
    special = np.uint32(((bits & 0x3FF) << 13) | 0x7F800000)
    magnitude = special if (bits & 0x7C00) == 0x7C00 else finite
    return _as_float32(np.uint32(magnitude | ((bits & 0x8000) << 16)))


@compiled
def _to_float16(value):  # pragma: no cover
    signed = _as_uint32(np.float32(value))
    bits = np.uint32(signed & 0x7FFFFFFF)
    # Below 2^-14 half precision is fixed-point: adding 1/2 puts its last bit at float32's own, where rounding happens.
    small = np.uint32(_as_uint32(np.float32(_as_float32(bits) + np.float32(0.5))) - 0x3F000000)
    normal = np.uint32((bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13)
    special = np.uint32(0x7E00) if bits > np.uint32(0x7F800000) else np.uint32(0x7C00)
    finite = small if bits < np.uint32(0x38800000) else normal
    magnitude = special if bits >= np.uint32(0x47800000) else finite
    return np.int16(np.uint16(magnitude | ((signed >> 16) & 0x8000)))


def present(kind):
    """Whether there is an array of this kind, known when compiled."""
    raise NotImplementedError


def load(array, i):
    """array[i] in the dtype that computes: float32, or float64 for float64. Of an absent array: 0."""
    raise NotImplementedError


def store(array, i, value):
    """array[i] = value, rounded to nearest, ties to even."""
    raise NotImplementedError


def narrow(kind, value):
    """A number in the dtype that computes on memory of this kind."""
    raise NotImplementedError


def room(kind, size):
    """Scratch for so many numbers, in the dtype that computes on memory of this kind."""
    raise NotImplementedError


@overload(room)
def _room(kind, size):
    dtype = np.dtype(np.float64 if kind == types.float64 else np.float32)
    item = dtype.itemsize
    extra = _LINE // item

    def aligned(kind, size):
        wider = np.empty(size + extra, dtype)
        skipped = (-wider.ctypes.data % _LINE) // item
        return wider[skipped : skipped + size]

    return aligned


def of_column(numbers, j):
    """The j-th of the numbers, or the number that holds for all."""
    raise NotImplementedError


@overload(of_column)
def _of_column(numbers, j):
    if isinstance(numbers, types.Array):
        return lambda numbers, j: numbers[j]
    return lambda numbers, j: numbers


@compiled
def fill(array, value):  # pragma: no cover
    """array[:] = value, which takes Numba longer to compile."""
    for j in range(array.size):
        array[j] = value


@overload(present)
def _present(kind):
    if kind == ABSENT:
        return lambda kind: False
    return lambda kind: True


@overload(narrow)
def _narrow(kind, value):
    if kind == types.float64:
        return lambda kind, value: np.float64(value)
    return lambda kind, value: np.float32(value)


@overload(load)
def _load(array, i):
    if array.dtype == ABSENT:
        return lambda array, i: np.float32(0)
    if array.dtype == _BFLOAT16:
        return lambda array, i: _from_bfloat16(array[i])
    if array.dtype == _FLOAT16:
        return lambda array, i: _from_float16(array[i])
    return lambda array, i: array[i]


@overload(store)
def _store(array, i, value):
    if array.dtype == _BFLOAT16:

        def to_bfloat16(array, i, value):
            array[i] = _to_bfloat16(np.float32(value))

        return to_bfloat16
    if array.dtype == _FLOAT16:

        def to_float16(array, i, value):
            array[i] = _to_float16(value)

        return to_float16

    def plain(array, i, value):
        array[i] = value

    return plain
