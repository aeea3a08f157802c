import json
import math

import pytest

from steadynorm.errors import DataError
from steadynorm.report import to_json
from steadynorm.report.schema import Results
from steadynorm.report.serialize import check_schema


def test_json_comes_back_as_it_went_in(results: Results) -> None:
    text = to_json(results)
    assert json.loads(text) == results
    assert text.endswith("}\n")
    assert to_json(json.loads(text)) == text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_named_by_its_place(results: Results, value: float) -> None:
    results["gradients"][2]["norms"][4] = value
    with pytest.raises(DataError, match=r"gradients\[2\]\.norms\[4\] = -?(nan|inf)"):
        to_json(results)


def test_one_of_another_schema_is_refused(results: Results) -> None:
    results["schema"] = 2
    results["version"] = "9.9"
    with pytest.raises(DataError, match=r"schema 1 are required, but these are of schema 2.*9\.9"):
        check_schema(results)
    with pytest.raises(DataError, match="schema None"):
        check_schema({})
