"""What the running Moments should be: `recalibrate_` measures them anew; `diagnose` says what is wrong with them."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.population.callbacks import lightning_callback, trainer_callback
    from steadynorm.population.changes import LayerChange, RecalibrateReport
    from steadynorm.population.checkpoint import diagnose_checkpoint
    from steadynorm.population.diagnosing import diagnose
    from steadynorm.population.findings import Diagnosis, Finding
    from steadynorm.population.recalibration import recalibrate_

__all__ = [
    "Diagnosis",
    "Finding",
    "LayerChange",
    "RecalibrateReport",
    "diagnose",
    "diagnose_checkpoint",
    "lightning_callback",
    "recalibrate_",
    "trainer_callback",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "callbacks": ["lightning_callback", "trainer_callback"],
        "recalibration": ["recalibrate_"],
        "changes": ["LayerChange", "RecalibrateReport"],
        "checkpoint": ["diagnose_checkpoint"],
        "diagnosing": ["diagnose"],
        "findings": ["Diagnosis", "Finding"],
    },
)
