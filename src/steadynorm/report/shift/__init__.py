"""A shift report, shown: as text, as a fragment for notebooks, as one self-contained page without any script.

Takes the plain data of `ShiftReport.to_dict`.
"""

from steadynorm.report.shift.page import shift_fragment, write_shift_html
from steadynorm.report.shift.text import print_shift, shift_text

__all__ = ["print_shift", "shift_fragment", "shift_text", "write_shift_html"]
