"""Surgery on a user's model: its batch norms to ours and back, fused with what follows, or folded into weights."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.surgery.conversion_report import ConversionReport
    from steadynorm.surgery.converting import convert_
    from steadynorm.surgery.fold_report import FoldReport
    from steadynorm.surgery.folding import fold
    from steadynorm.surgery.fuse_report import FuseReport
    from steadynorm.surgery.fusing import fuse
    from steadynorm.surgery.reverting import revert_

__all__ = ["ConversionReport", "FoldReport", "FuseReport", "convert_", "fold", "fuse", "revert_"]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion_report": ["ConversionReport"],
        "converting": ["convert_"],
        "fold_report": ["FoldReport"],
        "folding": ["fold"],
        "fuse_report": ["FuseReport"],
        "fusing": ["fuse"],
        "reverting": ["revert_"],
    },
)
