"""Surgery on a user's model: its batch norms held against ours, put in, made ours and back, fused, or folded away."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from steadynorm.surgery.check_report import CheckReport
    from steadynorm.surgery.checking import check
    from steadynorm.surgery.conversion_report import ConversionReport
    from steadynorm.surgery.converting import convert_
    from steadynorm.surgery.exporting import ExportReport, export
    from steadynorm.surgery.fold_report import FoldReport
    from steadynorm.surgery.folding import fold
    from steadynorm.surgery.fuse_report import FuseReport
    from steadynorm.surgery.fusing import fuse
    from steadynorm.surgery.inserting import insert
    from steadynorm.surgery.insertion_report import InsertionReport
    from steadynorm.surgery.reverting import revert_

__all__ = [
    "CheckReport",
    "ConversionReport",
    "ExportReport",
    "FoldReport",
    "FuseReport",
    "InsertionReport",
    "check",
    "convert_",
    "export",
    "fold",
    "fuse",
    "insert",
    "revert_",
]

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "check_report": ["CheckReport"],
        "checking": ["check"],
        "conversion_report": ["ConversionReport"],
        "converting": ["convert_"],
        "exporting": ["ExportReport", "export"],
        "fold_report": ["FoldReport"],
        "folding": ["fold"],
        "fuse_report": ["FuseReport"],
        "fusing": ["fuse"],
        "inserting": ["insert"],
        "insertion_report": ["InsertionReport"],
        "reverting": ["revert_"],
    },
)
