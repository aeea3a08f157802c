"""How often `steadynorm.shift.compare` calls rare categories shifted where both sides come from one pool.

    python benchmarks/shift_rare.py                      # some minutes on one core
    python benchmarks/shift_rare.py --tables 20          # a first impression, printed only
    python benchmarks/shift_pages.py                     # then the guide's table

Postcodes, product numbers and names: thousands of categories, most of which occur once. Both sides are drawn
independently from the same shares, so whatever comes out as shifted is a false alarm. At `compare`'s defaults, without
the classifier, one column a table.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

import steadynorm as sn

ROOT: Final = Path(__file__).resolve().parent.parent
MEASURED: Final = ROOT / "docs" / "measured" / "shift-rare.json"
SIZES: Final = ((500, 500), (300, 3_000), (2_000, 20_000), (200_000, 1_000))
Draw = Callable[[np.random.Generator, int], NDArray[np.int64]]
POOLS: Final[Mapping[str, Draw]] = {
    "100,000 alike": lambda rng, n: rng.integers(100_000, size=n),
    "30,000 of log-normal shares": lambda rng, n: rng.choice(30_000, n, p=_shares(30_000)),
    "40,000 after Zipf": lambda rng, n: rng.zipf(1.1, n) % 40_000,
}


def _shares(categories: int) -> NDArray[np.float64]:
    weights = np.random.default_rng(0).lognormal(size=categories)
    return weights / weights.sum()


def false_alarms(draw: Draw, sizes: tuple[int, int], tables: int) -> int:
    """In how many of the tables the column is called shifted."""
    found = 0
    for seed in range(tables):
        rng = np.random.default_rng(seed)
        sides = [{"category": draw(rng, size).astype(str)} for size in sizes]
        report = sn.shift.compare(*sides, types={"category": "categorical"}, classifier_rows=0)
        found += report.verdict == "shifted"
    return found


def main() -> None:
    """Measures, and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=100)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for pool, draw in POOLS.items():
        for sizes in SIZES:
            shifted = false_alarms(draw, sizes, options.tables)
            rows.append({"pool": pool, "sizes": sizes, "tables": options.tables, "shifted": shifted})
            print(rows[-1], flush=True)
    if options.tables >= 100:
        MEASURED.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
