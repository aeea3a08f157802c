"""A diagnosis, shown: as text, as a Rich table, as a fragment for notebooks, as one page without any script.

Takes the plain data of `Diagnosis.to_dict`.
"""

from steadynorm.report.diagnosis.page import diagnosis_fragment, write_diagnosis_html
from steadynorm.report.diagnosis.text import diagnosis_table, diagnosis_text, print_diagnosis

__all__ = ["diagnosis_fragment", "diagnosis_table", "diagnosis_text", "print_diagnosis", "write_diagnosis_html"]
