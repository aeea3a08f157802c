"""Surgery on a user's model: its batch norms to ours and back (`convert_`, `revert_`)."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.surgery.conversion_report import ConversionReport
    from steadynorm.surgery.converting import convert_
    from steadynorm.surgery.reverting import revert_

__all__ = ["ConversionReport", "convert_", "revert_"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion_report": ["ConversionReport"],
        "converting": ["convert_"],
        "reverting": ["revert_"],
    },
)
