"""One mini-batch through a batch norm, step by step, right in every digit shown."""

from steadynorm.walkthrough.exact import Exact
from steadynorm.walkthrough.steps import Feature, Walkthrough, explain
from steadynorm.walkthrough.table import from_csv

__all__ = ["Exact", "Feature", "Walkthrough", "explain", "from_csv"]
