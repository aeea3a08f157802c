"""Covariate shift: data against data (`compare`), a model against data (`Monitor`), and adapting to it (`adapt_`)."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.shift.adapting.adaptation import adapt_
    from steadynorm.shift.adapting.report import AdaptReport
    from steadynorm.shift.comparing.comparison import compare
    from steadynorm.shift.comparing.report import ShiftReport
    from steadynorm.shift.watching.monitor import Monitor

__all__ = ["AdaptReport", "Monitor", "ShiftReport", "adapt_", "compare"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "adapting.adaptation": ["adapt_"],
        "adapting.report": ["AdaptReport"],
        "comparing.comparison": ["compare"],
        "watching.monitor": ["Monitor"],
        "comparing.report": ["ShiftReport"],
    },
)
