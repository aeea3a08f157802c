"""Covariate shift: data against data (`compare`), a model against data (`Monitor`), and adapting to it (`adapt_`)."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.shift.adapt import adapt_
    from steadynorm.shift.adapt_report import AdaptReport
    from steadynorm.shift.comparing import compare
    from steadynorm.shift.monitor import Monitor
    from steadynorm.shift.report import ShiftReport

__all__ = ["AdaptReport", "Monitor", "ShiftReport", "adapt_", "compare"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapt": ["adapt_"],
        "adapt_report": ["AdaptReport"],
        "comparing": ["compare"],
        "monitor": ["Monitor"],
        "report": ["ShiftReport"],
    },
)
