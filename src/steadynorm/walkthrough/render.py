"""A walkthrough as text, HTML and plain data."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import TYPE_CHECKING, Any, Final

from steadynorm.walkthrough.exact import Exact

if TYPE_CHECKING:
    from steadynorm.walkthrough.steps import Feature

__all__ = ["as_dict", "as_html", "as_text"]

_SPELLED_OUT: Final = 8  # terms of a sum; a longer one shows the first three and the last
_ROWS: Final = 40  # of the table; a longer one shows the first and the last
_COLUMNS: Final = (
    ("values", "x"),
    ("differences", "x - mean"),
    ("squares", "(x - mean)^2"),
    ("x_hat", "x_hat"),
    ("y", "y"),
    ("inference", "y at inference"),
)


@dataclass(frozen=True)
class _Writer:
    digits: int

    def number(self, x: Exact) -> str:
        return x.text(self.digits)

    def operand(self, x: Exact) -> str:
        """A number inside a formula: in brackets if it is negative."""
        return f"({self.number(x)})" if x.sign < 0 else self.number(x)

    def equals(self, *shown: Exact) -> str:
        """ "=" where every number of an equation is shown exactly, "~" where one is rounded."""
        return "=" if all(x.shown_exactly(self.digits) for x in shown) else "~"

    def sum(self, terms: Sequence[Exact]) -> str:
        written = [self.operand(x) for x in terms]
        return " + ".join(written if len(terms) <= _SPELLED_OUT else [*written[:3], "...", written[-1]])


def _training(f: "Feature", w: _Writer) -> Iterator[tuple[str, str]]:
    """Name and formula, filled with the numbers, of the steps in training."""
    n = len(f.values)
    noisy = Exact.of(f.variance.a + f.eps.a)
    divisor = f"sqrt({w.number(f.variance)} + {w.number(f.eps)})"
    yield "mean", f"({w.sum(f.values)}) / {n} {w.equals(*f.values, f.mean)} {w.number(f.mean)}"
    yield (
        "variance",
        f"({w.sum(f.squares)}) / {n} {w.equals(*f.squares, f.variance)} {w.number(f.variance)}"
        f"   (biased: divided by n = {n})",
    )
    yield "deviation", f"sqrt({w.number(f.variance)}) {w.equals(f.variance, f.deviation)} {w.number(f.deviation)}"
    yield (
        "divisor",
        f"{divisor} {w.equals(f.variance, f.eps, noisy)} sqrt({w.number(noisy)}) "
        f"{w.equals(noisy, f.divisor)} {w.number(f.divisor)}",
    )
    yield (
        "x_hat",
        f"{w.equals(f.mean, f.divisor)} (x - {w.operand(f.mean)}) / {w.number(f.divisor)}   ({_spread(f, w)})",
    )
    yield "y", f"gamma x_hat + beta = {w.operand(f.gamma)} x_hat + {w.operand(f.beta)}"


def _spread(f: "Feature", w: _Writer) -> str:
    if f.variance.sign == 0:
        return "all values are equal: x_hat is 0 and y is beta"
    if f.eps.sign == 0:
        return "mean 0, deviation 1"
    return f"mean 0, deviation 1 - {w.number(f.x_hat_shortfall)}, on account of eps"


def _commit(f: "Feature", w: _Writer) -> Iterator[tuple[str, str]]:
    """The steps at the commit, and the inference that follows from it."""
    n = len(f.values)
    keep = Exact.of(1 - f.momentum.a)
    yield (
        "unbiased variance",
        f"{w.number(f.total_square)} / ({n} - 1) {w.equals(f.total_square, f.unbiased_variance)} "
        f"{w.number(f.unbiased_variance)}",
    )
    yield (
        "running mean",
        f"{w.number(keep)} * 0 + {w.number(f.momentum)} * {w.operand(f.mean)} "
        f"{w.equals(keep, f.momentum, f.mean, f.running_mean)} {w.number(f.running_mean)}",
    )
    yield (
        "running variance",
        f"{w.number(keep)} * 1 + {w.number(f.momentum)} * {w.number(f.unbiased_variance)} "
        f"{w.equals(keep, f.momentum, f.unbiased_variance, f.running_variance)} {w.number(f.running_variance)}",
    )
    yield (
        "y at inference",
        f"{w.equals(f.running_mean, f.running_variance, f.eps)} gamma (x - {w.operand(f.running_mean)}) / "
        f"sqrt({w.number(f.running_variance)} + {w.number(f.eps)}) + beta",
    )


def _table(f: "Feature", w: _Writer) -> list[tuple[str, ...]]:
    """The steps that give one number per value: heading, then rows."""
    columns = [[w.number(x) for x in getattr(f, attribute)] for attribute, _ in _COLUMNS]
    rows = list(zip(*columns, strict=True))
    if len(rows) > _ROWS:
        rows = [*rows[: _ROWS // 2], ("...",) * len(_COLUMNS), *rows[-_ROWS // 2 :]]
    return [tuple(heading for _, heading in _COLUMNS), *rows]


def _title(f: "Feature", w: _Writer) -> str:
    start = f"{f.name}: " if f.name else ""
    return (
        f"{start}{len(f.values)} values, gamma = {w.number(f.gamma)}, beta = {w.number(f.beta)}, "
        f"eps = {w.number(f.eps)} (~: rounded)"
    )


_TRAINING: Final = "Training: the batch is normalised by its own mean and variance."
_COMMITTED: Final = "Commit with momentum {}, from running mean 0 and running variance 1:"
_ALONE: Final = (
    "At inference each value is normalised by the running statistics: its y is the same alone or in any batch."
)


def as_text(features: "Sequence[Feature]", digits: int) -> str:
    """The steps as a plain table, "~" marking what is rounded."""
    w = _Writer(digits)
    return "\n\n\n".join(_feature_text(f, w) for f in features)


def _feature_text(f: "Feature", w: _Writer) -> str:
    def aligned(steps: list[tuple[str, str]]) -> list[str]:
        width = max(len(name) for name, _ in steps)
        return [f"  {name.ljust(width)}  {'' if formula[0] in '=~' else '= '}{formula}" for name, formula in steps]

    table = _table(f, w)
    widths = [max(len(row[i]) for row in table) for i in range(len(_COLUMNS))]
    lines = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join(
        [
            _title(f, w),
            "",
            _TRAINING,
            *aligned(list(_training(f, w))),
            "",
            *lines,
            "",
            _COMMITTED.format(w.number(f.momentum)),
            *aligned(list(_commit(f, w))),
            _ALONE,
        ]
    )


def as_html(features: "Sequence[Feature]", digits: int) -> str:
    """The steps as HTML tables without styles of their own, for a notebook."""
    w = _Writer(digits)
    return "".join(_feature_html(f, w) for f in features)


def _feature_html(f: "Feature", w: _Writer) -> str:
    def steps(rows: Iterator[tuple[str, str]]) -> str:
        cells = (f"<tr><th>{escape(name)}</th><td>{escape(formula)}</td></tr>" for name, formula in rows)
        return f"<table>{''.join(cells)}</table>"

    head, *rows = _table(f, w)
    headings = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<h4>{escape(_title(f, w))}</h4><p>{_TRAINING}</p>{steps(_training(f, w))}"
        f"<table><thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{_COMMITTED.format(w.number(f.momentum))}</p>{steps(_commit(f, w))}<p>{_ALONE}</p>"
    )


def as_dict(features: "Sequence[Feature]", digits: int) -> dict[str, Any]:
    """The steps as plain data: doubles, and the same as shown."""
    return {"digits": digits, "features": [_feature_dict(f, digits) for f in features]}


def _feature_dict(f: "Feature", digits: int) -> dict[str, Any]:
    steps = {field.name: getattr(f, field.name) for field in fields(f) if field.name != "name"}
    as_doubles = {k: [_double(x) for x in v] if isinstance(v, tuple) else _double(v) for k, v in steps.items()}
    as_shown = {k: [x.text(digits) for x in v] if isinstance(v, tuple) else v.text(digits) for k, v in steps.items()}
    return {"name": f.name, **as_doubles, "shown": as_shown}


def _double(x: Exact) -> float | None:
    nearest = float(x)
    return nearest if math.isfinite(nearest) else None
