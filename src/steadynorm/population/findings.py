"""What a diagnosis is made of: findings with their figures, ranked, and how they are shown."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from steadynorm.errors import ArgumentError, DataError

__all__ = ["Diagnosis", "Finding", "Severity", "Value"]

Severity: TypeAlias = Literal["error", "warning", "note"]
Value: TypeAlias = int | float | str | bool | None
_RANK = {name: rank for rank, name in enumerate(get_args(Severity))}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing, with the figures that say so.

    Attributes:
        kind: Which of the kinds in the guide, such as "zero variance".
        severity: "error": evaluation cannot be trusted. "warning": it probably costs something. "note": worth knowing.
        layer: The layer's name in the model; "" where the finding is about the model or the data as a whole.
        summary: One sentence: what was found.
        evidence: The figures behind it, by name.
        remedy: What to do.
        weight: Its rank among the findings of its severity; larger comes first.

    Raises:
        ArgumentError: The severity is none of the three.
    """

    kind: str
    severity: Severity
    layer: str
    summary: str
    evidence: Mapping[str, Value]
    remedy: str
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.severity not in _RANK:
            raise ArgumentError(f"severity must be one of {get_args(Severity)}, got {self.severity!r}.")

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; a figure that is not finite becomes its name ("nan", "inf")."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "layer": self.layer,
            "summary": self.summary,
            "evidence": {name: _plain(value) for name, value in self.evidence.items()},
            "remedy": self.remedy,
        }


@dataclass(frozen=True)
class Diagnosis:
    """The findings about one model or checkpoint, the worst first.

    Attributes:
        subject: What was looked at.
        layers: How many batch norms it has.
        findings: Sorted by severity, then by weight, then in the order in which they were made.
        figures: Losses and accuracies measured with data; empty without.

    Example:
        >>> found = [Finding("b", "note", "1", "", {}, ""), Finding("a", "error", "4", "", {}, "")]
        >>> diagnosis = Diagnosis.ranked("model", 2, found)
        >>> [finding.kind for finding in diagnosis.findings], diagnosis.worst
        (['a', 'b'], 'error')
    """

    subject: str
    layers: int
    findings: tuple[Finding, ...]
    figures: Mapping[str, Value] = field(default_factory=dict[str, Value])

    @classmethod
    def ranked(
        cls, subject: str, layers: int, findings: Iterable[Finding], figures: Mapping[str, Value] | None = None
    ) -> "Diagnosis":
        """A diagnosis of these findings, sorted."""
        order = sorted(findings, key=lambda finding: (_RANK[finding.severity], -finding.weight))
        return cls(subject, layers, tuple(order), {} if figures is None else dict(figures))

    @property
    def worst(self) -> Severity | None:
        """The severity of the first finding; None where there is none."""
        return self.findings[0].severity if self.findings else None

    def at_least(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings as severe as this or more so.

        Raises:
            ArgumentError: There is no such severity.
        """
        if severity not in _RANK:
            raise ArgumentError(f"severity must be one of {get_args(Severity)}, got {severity!r}.")
        return tuple(finding for finding in self.findings if _RANK[finding.severity] <= _RANK[severity])

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return {
            "subject": self.subject,
            "layers": self.layers,
            "worst": self.worst,
            "findings": [finding.to_dict() for finding in self.findings],
            "figures": {name: _plain(value) for name, value in self.figures.items()},
        }

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes it as one HTML page without any script; returns the path.

        Raises:
            DataError: The file cannot be written.
        """
        from steadynorm.report.diagnosis import write_diagnosis_html

        try:
            return write_diagnosis_html(self.to_dict(), path)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}. Choose another place.") from error

    def __str__(self) -> str:
        from steadynorm.report.diagnosis import diagnosis_text

        return diagnosis_text(self.to_dict())

    def __rich__(self) -> Any:
        from steadynorm.report.diagnosis import diagnosis_table

        return diagnosis_table(self.to_dict())

    def _repr_html_(self) -> str:
        from steadynorm.report.diagnosis import diagnosis_fragment

        return diagnosis_fragment(self.to_dict())


def _plain(value: Value) -> Value:
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if finite else str(value)
