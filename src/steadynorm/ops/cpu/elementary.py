"""Elementary functions for loops that vectorise: arithmetic alone, no branch, no table and no call of libm.

Each is good to a few units in the last place of float32 or float64, whichever its argument is, keeps NaN as NaN, and
takes any argument of the sign it is meant for, infinity included. The polynomials are near-minimax fits, which
`benchmarks/coefficients.py` derives again.

Source: the reductions are those of W. J. Cody and W. Waite, Software Manual for the Elementary Functions, 1980.
"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false, reportUntypedFunctionDecorator=false
# pyright: reportUnknownLambdaType=false
# (Numba types its functions itself)

from typing import Any, Final

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["INLINE", "PRECISE", "exponential", "exponential_less_1", "logarithm_of_1_plus", "normal_tail", "number"]

# Without "reassoc", which would cancel the roundings that the reductions are made of.
PRECISE: Final[dict[str, Any]] = {"fastmath": {"nsz", "contract"}, "error_model": "numpy"}
# For the parts of a loop: a call left in it keeps it from being vectorised. Python cannot call these.
INLINE: Final[dict[str, Any]] = {**PRECISE, "forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _intrinsic(function) -> Any:
    """Numba's decorator, typed as what it makes: a function that is called without the typing context."""
    return intrinsic(function)


def _polynomial(single, double) -> Any:
    """x -> Σ c_i x^i by Horner's scheme, with the coefficients of x's dtype."""

    @_intrinsic
    def horner(typingctx, x):  # pragma: no cover
        coefficients = double if x == types.float64 else single

        def generate(context, builder, signature, arguments):
            kind, flags = context.get_value_type(x), ("nsz", "contract")
            value = ir.Constant(kind, coefficients[-1])
            for c in reversed(coefficients[:-1]):
                product = builder.fmul(value, arguments[0], flags=flags)
                value = builder.fadd(product, ir.Constant(kind, c), flags=flags)
            return value

        return x(x), generate

    return horner


_exponential_tail = _polynomial(  # (e^x - 1 - x) / x² for |x| <= ln(2) / 2
    single=(
        0.5,
        0.16666576666119928,
        0.04166655421298415,
        0.008363232883682618,
        0.0013926250831497611,
    ),
    double=(
        0.5000000000000001,
        0.16666666666666669,
        0.041666666666623824,
        0.008333333333330039,
        0.0013888888917367081,
        0.00019841269863171557,
        2.4801521057868204e-05,
        2.7557268276905696e-06,
        2.7620201591031547e-07,
        2.5100472505694996e-08,
    ),
)
_artanh_tail = _polynomial(  # (artanh(s) / s - 1) / s² of s² <= 1/9
    single=(
        0.33333320168349617,
        0.20003780322455603,
        0.1411830990265524,
        0.13425749011418575,
    ),
    double=(
        0.3333333333333333,
        0.20000000000007292,
        0.1428571428355438,
        0.11111111358713932,
        0.09090894718066429,
        0.07692785032479312,
        0.06657072104827468,
        0.06000536404795356,
        0.04400369243072337,
        0.08082022805971766,
    ),
)
_normal_tail = _polynomial(  # e^(z²/2) erfc(z / sqrt(2)) / 2h of 1 - 2h, h = 5 / (z + 5), for 0 <= z <= 14.5 or 39
    single=(
        0.15383860808633948,
        -0.13307648883723586,
        0.09906131096444808,
        -0.0627070049819057,
        0.033000868384798356,
        -0.01382177838270977,
        0.004178315570879788,
        -0.0005942102877458229,
        -0.0002007322150538277,
        7.785631647524364e-05,
    ),
    double=(
        0.15383860995001258,
        -0.13307650057801063,
        0.0990611231939994,
        -0.0627066313343282,
        0.033004073233874685,
        -0.0138237277394246,
        0.004159013364018867,
        -0.0005986753767226666,
        -0.0001595739222641709,
        0.0001089799621645418,
        -1.1874881235511392e-05,
        -9.953130083749553e-06,
        3.3352258996832137e-06,
        7.97433024595508e-07,
        -5.514058166459128e-07,
        -6.880651601883769e-08,
        8.303879510264542e-08,
        9.071911372608122e-09,
        -1.024352670407384e-08,
        -1.4778409200282386e-09,
        4.704164811331591e-10,
    ),
)


def _constant(single, double) -> Any:
    """x -> a number that is another one in each dtype."""
    return _polynomial((single,), (double,))


_per_ln2 = _constant(1.4426950408889634, 1.4426950408889634)
_ln2 = _constant(0.693359375, 6.93147180369123816490e-01)  # so few digits that k ln 2 is exact,
_rest_of_ln2 = _constant(-2.12194440054690583e-4, 1.90821492927058770002e-10)  # and the others
# Adding 1.5 · 2^(bits of the significand) rounds to an integer, which then stands in the lowest bits. What is added to
# it makes these the exponent of 2^k / unit, which is a normal number even where 2^k is none.
_shift = _constant(1.5 * 2.0**23 + 127 + 64, 1.5 * 2.0**52 + 1023 + 512)
_unit = _constant(2.0**-64, 2.0**-512)
_least = _constant(-104.0, -746.0)  # where e^x has become 0,
_farthest = _constant(14.5, 39.0)  # and the normal density


@_intrinsic
def number(typingctx, x, value):  # pragma: no cover
    """The value in x's dtype."""

    def generate(context, builder, signature, arguments):
        return context.cast(builder, arguments[1], value, x)

    return x(x, value), generate


def _integers(kind):
    """The LLVM type of the integers as wide as floats of a kind, and the width of these floats' significand."""
    return (ir.IntType(64), 52) if kind == types.float64 else (ir.IntType(32), 23)


@_intrinsic
def _power_of_2(typingctx, x):  # pragma: no cover
    """The float whose sign and exponent are the lowest bits of x's significand."""

    def generate(context, builder, signature, arguments):
        integer, width = _integers(x)
        bits = builder.shl(builder.bitcast(arguments[0], integer), integer(width))
        return builder.bitcast(bits, context.get_value_type(x))

    return x(x), generate


@_intrinsic
def _head(typingctx, x):  # pragma: no cover
    """x with the lower half of its significand cleared: its square is exact."""

    def generate(context, builder, signature, arguments):
        integer, width = _integers(x)
        bits = builder.and_(builder.bitcast(arguments[0], integer), integer(-(1 << (width + 2) // 2)))
        return builder.bitcast(bits, context.get_value_type(x))

    return x(x), generate


@njit(**INLINE)
def _reduced(x, rest):  # pragma: no cover
    """2^k / unit and e^r - 1, where x + rest = k ln 2 + r, |r| <= ln(2) / 2; the rest is what x lost to rounding."""
    t = (x + rest) * _per_ln2(x) + _shift(x)
    k = t - _shift(x)
    r = (x - k * _ln2(x)) - k * _rest_of_ln2(x) + rest
    return _power_of_2(t), r + r * r * _exponential_tail(r)


@njit(**INLINE)
def exponential(x):  # pragma: no cover
    """e^x for x <= 0."""
    least = _least(x)
    power, change = _reduced(least if x < least else x, number(x, 0.0))
    return (power + power * change) * _unit(x)


@njit(**INLINE)
def exponential_less_1(x):  # pragma: no cover
    """e^x - 1 for x <= 0, as good near 0 as anywhere."""
    least = number(x, -40.0)  # where it has become -1
    power, change = _reduced(least if x < least else x, number(x, 0.0))
    power *= _unit(x)
    return power * change + (power - number(x, 1.0))


@njit(**INLINE)
def logarithm_of_1_plus(x):  # pragma: no cover
    """ln(1 + x) for 0 <= x <= 1, as good near 0 as anywhere: 2 artanh(x / (2 + x))."""
    s = x / (number(x, 2.0) + x)
    square = s * s
    twice = s + s
    return twice + twice * (square * _artanh_tail(square))


@njit(**INLINE)
def normal_tail(z):  # pragma: no cover
    """1 - Φ(|z|) and |z| φ(z) of the standard normal distribution, good to the end of the dtype's range."""
    far = _farthest(z)
    m = abs(z)
    m = far if m > far else m
    half, split = number(z, 0.5), number(z, 5.0)
    head = _head(m)
    power, change = _reduced(-half * head * head, half * (head - m) * (head + m))
    bell = (power + power * change) * _unit(z)
    h = split / (m + split)
    return bell * (h * _normal_tail(number(z, 1.0) - (h + h))), bell * (m * number(z, 0.3989422804014327))
