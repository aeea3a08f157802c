"""Results of an experiment, shown: as tables in the terminal, as one self-contained page, as a notebook fragment.

Everything here takes the plain data of `schema.Results` and never a model. Each name loads its module on first use,
because the page needs Plotly and Jinja2 and the terminal needs Rich.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steadynorm.report.html import write_html
    from steadynorm.report.notebook import notebook_html
    from steadynorm.report.serialize import to_json
    from steadynorm.report.terminal import print_report

__all__ = ["notebook_html", "print_report", "to_json", "write_html"]

_HOME = {"notebook_html": "notebook", "print_report": "terminal", "to_json": "serialize", "write_html": "html"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
