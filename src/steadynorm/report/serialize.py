"""Results as strict JSON: no NaN, no infinity, nothing that another language's parser would refuse."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from steadynorm.errors import DataError
from steadynorm.report.schema import SCHEMA_VERSION, Results

__all__ = ["check_schema", "strict_json", "to_json"]


def _non_finite(value: object, path: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path} = {value}"
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[object, object]", value).items():
            yield from _non_finite(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for i, item in enumerate(cast("Sequence[object]", value)):
            yield from _non_finite(item, f"{path}[{i}]")


def to_json(results: Results) -> str:
    """Write results as strict JSON, the content of `results.json`.

    Args:
        results: what `sn.compare` measured, as plain data.

    Returns:
        The JSON text, with one space of indentation and a newline at its end. The same results give the same text.

    Raises:
        DataError: a figure is NaN or infinite; a missing figure must be None.

    Example:
        >>> import json
        >>> json.loads(to_json({"schema": 1, "target": 0.95}))
        {'schema': 1, 'target': 0.95}
    """
    return strict_json(results)


def strict_json(data: Mapping[str, object]) -> str:
    """Plain data as strict JSON.

    Args:
        data: nested mappings, sequences, texts, numbers and None.

    Returns:
        The text, with one space of indentation and a newline at its end.

    Raises:
        DataError: a figure is NaN or infinite; a missing figure must be None.

    Example:
        >>> strict_json({"a": None})
        '{\\n "a": null\\n}\\n'
    """
    bad = next(_non_finite(data, ""), None)
    if bad is not None:
        raise DataError(f"results must hold finite figures only, and None for a missing one, but {bad}.")
    return json.dumps(data, allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def check_schema(results: Results) -> None:
    """Refuse results of another schema than the one that this version writes and reads.

    Args:
        results: plain data, perhaps read from a file.

    Raises:
        DataError: the `schema` number is missing or another one.

    Example:
        >>> check_schema({"schema": 1})
    """
    found = results.get("schema")
    if found != SCHEMA_VERSION:
        raise DataError(
            f"results of schema {SCHEMA_VERSION} are required, but these are of schema {found!r}: "
            "run the comparison again, or read them with the version of steadynorm that wrote them "
            f"({results.get('version', 'unknown')})."
        )
