"""Derives the polynomials of `steadynorm.ops.cpu.elementary`: near-minimax fits in 60-digit arithmetic (needs mpmath).

Prints, for float32 and float64, each polynomial's coefficients from the constant up, as they stand in that module, and
the greatest error of the fit: run `python benchmarks/coefficients.py`.
"""

import mpmath as mp

SPLIT = 5  # K of h = K / (z + K), which takes z >= 0 to (0, 1]: near it the fits are best for both dtypes


def exponential(r):
    """(e^r - 1 - r) / r²."""
    return (mp.expm1(r) - r) / r**2 if abs(r) > mp.mpf("1e-20") else mp.mpf(1) / 2 + r / 6


def logarithm(square):
    """(artanh(s) / s - 1) / s², a function of s²."""
    s = mp.sqrt(square)
    return (mp.atanh(s) / s - 1) / square if s > mp.mpf("1e-15") else mp.mpf(1) / 3


def tail(t):
    """e^(z²/2) erfc(z / √2) / (2 h), with h = (1 - t) / 2 and z = K (1 - h) / h."""
    h = (1 - t) / 2
    z = SPLIT * (1 - h) / h
    return mp.erfc(z / mp.sqrt(2)) * mp.exp(z * z / 2) / (2 * h)


def main() -> None:
    """Prints the tables."""
    half = mp.log(2) / 2 * mp.mpf("1.001")  # r is rounded, too
    for bits, farthest, sizes in ((32, 14.5, (5, 4, 10)), (64, 39, (10, 10, 21))):
        nearest = 1 - 2 * mp.mpf(SPLIT) / (SPLIT + mp.mpf(farthest))
        ranges = ([-half, half], [0, mp.mpf(1) / 9], [-1, nearest])
        for f, interval, size in zip((exponential, logarithm, tail), ranges, sizes, strict=True):
            coefficients, error = mp.chebyfit(f, interval, size, error=True)
            print(f"float{bits} {f.__name__}: greatest error {mp.nstr(error, 2)}")
            print("".join(f"    {float(c)!r},\n" for c in reversed(coefficients)))


if __name__ == "__main__":
    mp.mp.dps = 60
    main()
