"""Lets the site read the docstrings' "Example:" sections: griffe knows the plural alone as a section of examples."""

import re
from typing import Any

import griffe


class SingularExample(griffe.Extension):
    """Turns a docstring's heading "Example:" into "Examples:" before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
