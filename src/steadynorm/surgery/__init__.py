"""Surgery on a user's model: its batch norms put in, made ours and back, fused, or folded away."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.surgery.conversion_report import ConversionReport
    from steadynorm.surgery.converting import convert_
    from steadynorm.surgery.fold_report import FoldReport
    from steadynorm.surgery.folding import fold
    from steadynorm.surgery.fuse_report import FuseReport
    from steadynorm.surgery.fusing import fuse
    from steadynorm.surgery.inserting import insert
    from steadynorm.surgery.insertion_report import InsertionReport
    from steadynorm.surgery.reverting import revert_

__all__ = [
    "ConversionReport",
    "FoldReport",
    "FuseReport",
    "InsertionReport",
    "convert_",
    "fold",
    "fuse",
    "insert",
    "revert_",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conversion_report": ["ConversionReport"],
        "converting": ["convert_"],
        "fold_report": ["FoldReport"],
        "folding": ["fold"],
        "fuse_report": ["FuseReport"],
        "fusing": ["fuse"],
        "inserting": ["insert"],
        "insertion_report": ["InsertionReport"],
        "reverting": ["revert_"],
    },
)
