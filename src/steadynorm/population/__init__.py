"""What the running Moments should be: `recalibrate_` measures them anew over a whole data set."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.population.callbacks import lightning_callback, trainer_callback
    from steadynorm.population.changes import LayerChange, RecalibrateReport
    from steadynorm.population.recalibration import recalibrate_

__all__ = ["LayerChange", "RecalibrateReport", "lightning_callback", "recalibrate_", "trainer_callback"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "callbacks": ["lightning_callback", "trainer_callback"],
        "recalibration": ["recalibrate_"],
        "changes": ["LayerChange", "RecalibrateReport"],
    },
)
