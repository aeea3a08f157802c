"""Where `insert` put batch norms, and at which nonlinearities it did not, and why."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Insertion", "InsertionReport"]


@dataclass(frozen=True)
class Insertion:
    """One batch norm, or one nonlinearity that has none.

    Attributes:
        nonlinearity: Its name, or that of the function and of the module that calls it.
        norm: The name of the batch norm in the returned model; None where none was put.
        kind: Its class and what is not usual about it.
        num_features: C.
        dims: 1, 2 or 3 places, as in BatchNorm1d, 2d, 3d; None where there is none.
        layer: The layer whose results it normalises, by its name in the returned model.
        bias_dropped: Whether that layer had a bias, which the batch norm made dead.
        zero_gamma: Whether it starts with γ = 0.
        why: Why there is none.
    """

    nonlinearity: str
    norm: str | None = None
    kind: str = ""
    num_features: int | None = None
    dims: int | None = None
    layer: str | None = None
    bias_dropped: bool = False
    zero_gamma: bool = False
    why: str = ""


@dataclass(frozen=True)
class InsertionReport:
    """What `insert` did.

    Attributes:
        where: "before" or "after" the nonlinearities.
        rows: One for each batch norm, and one for each nonlinearity that was left, in the order of the forward.
        renamed: Modules with tensors that have another name than in the model given: what an nn.Sequential numbers.
        untraced: Parts of the model whose forward could not be read, with the reason.
        initialized: What `sn.init.initialize_` said, as text; "" where it was not asked for.
    """

    where: str
    rows: tuple[Insertion, ...]
    renamed: tuple[tuple[str, str], ...] = ()
    untraced: tuple[tuple[str, str], ...] = ()
    initialized: str = ""

    @property
    def inserted(self) -> tuple[Insertion, ...]:
        """The rows of batch norms."""
        return tuple(row for row in self.rows if row.norm is not None)

    @property
    def left(self) -> tuple[Insertion, ...]:
        """The rows of nonlinearities without one; each `why` says the reason."""
        return tuple(row for row in self.rows if row.norm is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "where": self.where,
            "inserted": len(self.inserted),
            "left": len(self.left),
            "rows": [asdict(row) for row in self.rows],
            "renamed": dict(self.renamed),
            "untraced": [{"name": name, "why": why} for name, why in self.untraced],
            "initialized": self.initialized,
        }

    def __str__(self) -> str:
        dropped = sum(row.bias_dropped for row in self.rows)
        lines = [
            f"{len(self.inserted)} batch norms inserted {self.where} nonlinearities, {dropped} dead biases dropped"
        ]
        for row in self.rows:
            if row.norm is None:
                lines.append(f"  none at {row.nonlinearity}: {row.why}")
                continue
            more = [*(["bias dropped"] if row.bias_dropped else []), *(["gamma 0"] if row.zero_gamma else [])]
            lines.append(
                f"  {row.norm}: {row.kind}, {row.layer} -> {row.nonlinearity}" + "".join(f", {one}" for one in more)
            )
        if self.renamed:
            names = ", ".join(f"{old} -> {new}" for old, new in self.renamed)
            lines.append(f"  renumbered in nn.Sequential: {names}")
        lines += [f"  could not be traced: {name or 'the model'} ({why})" for name, why in self.untraced]
        return "\n".join(lines)
