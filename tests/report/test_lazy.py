import subprocess
import sys

import pytest

import steadynorm.report


def test_importing_the_package_loads_none_of_its_libraries() -> None:
    code = (
        "import sys, steadynorm.report as report; report.to_json;"
        "print(sorted({'plotly', 'jinja2', 'rich', 'markupsafe'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_names_are_these() -> None:
    assert steadynorm.report.__all__ == ["notebook_html", "print_report", "to_json", "write_html"]
    for name in steadynorm.report.__all__:
        assert callable(getattr(steadynorm.report, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = steadynorm.report.nonsense
