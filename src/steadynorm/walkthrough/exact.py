"""Numbers of the form a + b sqrt(r), exactly: every step of a batch norm on decimal input is one."""

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

__all__ = ["Exact"]

_TOO_LONG_FOR_PLAIN = 16  # digits before the point


def _rational_root(r: Fraction) -> Fraction | None:
    root = Fraction(isqrt(r.numerator), isqrt(r.denominator))
    return root if root * root == r else None


@dataclass(frozen=True)
class Exact:
    """a + b sqrt(r), for rational a, b and r >= 0.

    Rounding is done in integers, with as many digits as it takes to be sure of the result, so what is shown is right
    in every digit whatever cancels.

    Attributes:
        a: The rational part.
        b: The factor of the root; 0 where the number is rational.
        r: What stands under the root.

    Example:
        >>> deviation = Exact.of(0, 1, 46)
        >>> deviation.text(6), deviation.text(30), float(deviation)
        ('6.782330', '6.782329983125268139064556326626', 6.782329983125268)
        >>> Exact.of(0, 1, 49).text(6)
        '7'
    """

    a: Fraction
    b: Fraction
    r: Fraction

    @classmethod
    def of(cls, a: Fraction | int, b: Fraction | int = 0, r: Fraction | int = 0) -> "Exact":
        """a + b sqrt(r), as a plain rational where it is one."""
        a, b, r = Fraction(a), Fraction(b), Fraction(r)
        root = _rational_root(r)
        return cls(a, b, r) if root is None and b != 0 else cls(a + b * (root or 0), Fraction(0), Fraction(0))

    @property
    def is_rational(self) -> bool:
        """Whether no root is left."""
        return self.b == 0

    @property
    def sign(self) -> int:
        """-1, 0 or 1."""
        if self.is_rational:
            return (self.a > 0) - (self.a < 0)
        root_wins = self.b * self.b * self.r > self.a * self.a
        leading = self.b if root_wins else self.a
        return 1 if leading > 0 else -1

    def _scaled(self, power: int) -> int:
        """self * 10^power, rounded to an integer, half to even."""
        scale = Fraction(10) ** power
        a = self.a * scale
        if self.is_rational:
            return round(a)
        square, sign, guard = (self.b * scale) ** 2 * self.r, 1 if self.b > 0 else -1, 8
        while True:  # ends: an irrational number is never halfway between two integers
            unit = 10**guard
            low = isqrt(int(square * unit * unit))
            ends = {round(a + sign * Fraction(root, unit)) for root in (low, low + 1)}
            if len(ends) == 1:
                return ends.pop()
            guard *= 2

    def _leading(self, digits: int) -> tuple[int, int]:
        """(m, e) with self = m 10^(e - digits + 1), rounded to `digits` significant digits; self is not 0."""
        power = digits
        while abs(self._scaled(power)) < 1000:
            power += max(16, abs(power))
        exponent = len(str(abs(self._scaled(power)))) - 1 - power
        mantissa = self._scaled(digits - 1 - exponent)
        if abs(mantissa) < 10 ** (digits - 1):  # the estimate had been rounded up to the next power of ten
            exponent -= 1
            mantissa = self._scaled(digits - 1 - exponent)
        if abs(mantissa) == 10**digits:
            return mantissa // 10, exponent + 1
        return mantissa, exponent

    def shown_exactly(self, digits: int) -> bool:
        """Whether `text(digits)` is the number itself rather than a rounding of it."""
        return Fraction(self.text(digits)) == self.a and self.is_rational

    def text(self, digits: int) -> str:
        """The number in decimal, rounded half to even.

        With `digits` digits after the point, so that columns line up; in scientific notation with `digits`
        significant digits where fewer than half of those would be significant, or from 10^16 on. Zeros at the end are
        dropped from a number that is shown exactly. There is no negative zero.
        """
        if self.sign == 0:
            return "0"
        _, exponent = self._leading(2 * _TOO_LONG_FOR_PLAIN)  # not yet rounded up to a power of ten
        if -(digits // 2) - 1 <= exponent < _TOO_LONG_FOR_PLAIN:
            return self._plain(digits)
        mantissa, exponent = self._leading(digits)
        exact = self.is_rational and Fraction(mantissa) * Fraction(10) ** (exponent - digits + 1) == self.a
        figures = str(abs(mantissa))
        head, tail = figures[0], figures[1:].rstrip("0") if exact else figures[1:]
        return f"{'-' if mantissa < 0 else ''}{head}{'.' if tail else ''}{tail}e{exponent}"

    def _plain(self, digits: int) -> str:
        scaled = self._scaled(digits)
        figures = str(abs(scaled)).rjust(digits + 1, "0")
        whole, decimals = figures[:-digits], figures[-digits:]
        if self.is_rational and Fraction(scaled) == self.a * 10**digits:
            decimals = decimals.rstrip("0")
        return f"{'-' if scaled < 0 else ''}{whole}{'.' if decimals else ''}{decimals}"

    def __float__(self) -> float:
        """The nearest double; infinite beyond their range."""
        if self.sign == 0:
            return 0.0
        mantissa, exponent = self._leading(40)
        return float(f"{mantissa}e{exponent - 39}")
