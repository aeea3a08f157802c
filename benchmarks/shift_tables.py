"""How often `steadynorm.shift.compare` calls alike tables shifted, and how small a shift it finds.

    python benchmarks/shift_tables.py [--tables 300] [--jobs 2] [--out docs/measured/shift-tables.json]
    python benchmarks/shift_tables.py --quick

Null: both sides are drawn independently from one pool, 50 columns: 15 normal, 10 log-normal (half of them of σ = 2),
10 of categories (2 to 100, shares after Zipf) and 15 of a real table (scikit-learn's breast cancer measurements, whole
rows drawn with replacement). Whatever comes out as shifted is a false alarm. Power: the same, and one normal column's
mean moves by d standard deviations. Beside it, what p-values make of the same tables: scipy's Kolmogorov-Smirnov or
chi-square test on each column, Benjamini and Hochberg at 5 %; and, where it is installed, evidently's drift preset at
its defaults.

Everything is at `compare`'s default settings, the domain classifier included in the null tables and left out of the
power tables (where it could only help). The file is rewritten after each size; the same call goes on where an
interrupted one stopped.
"""

import argparse
import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from scipy import stats
from sklearn.datasets import load_breast_cancer

import steadynorm as sn
from steadynorm.shift.comparing.distances import benjamini_hochberg

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    100: 1,
    1_000: 1,
    10_000: 1,
    100_000: 1,
    1_000_000: 1 / 15,
    10_000_000: 1 / 100,
}  # rows a side: share of tables
SHIFTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
POWER_SIZES = {500: 1 / 3, 2_000: 1, 10_000: 1 / 3, 100_000: 1 / 15}
MOVED = "normal_3"


def table(rng: np.random.Generator, n: int, real: np.ndarray) -> dict[str, np.ndarray]:
    """One side: 50 columns of n rows."""
    columns = {f"normal_{j}": rng.normal(size=n) for j in range(15)}
    columns |= {f"lognormal_{j}": rng.lognormal(sigma=1 + j % 2, size=n) for j in range(10)}
    for j in range(10):
        k = (2, 3, 5, 10, 100)[j % 5]
        shares = 1 / np.arange(1, k + 1)
        names = np.array([f"c{i}" for i in range(k)])
        columns[f"category_{j}"] = names[rng.choice(k, size=n, p=shares / shares.sum())]
    rows = real[rng.integers(len(real), size=n)]
    return columns | {f"real_{j}": rows[:, j] for j in range(15)}


def naive(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> bool:
    """Whether any column drifts by p-values alone, corrected over the columns."""
    p = []
    for name, x in before.items():
        if x.dtype.kind == "U":
            names = sorted({*x.tolist(), *after[name].tolist()})
            counts = [[int((side == one).sum()) for one in names] for side in (x, after[name])]
            p.append(float(stats.chi2_contingency(counts, correction=False).pvalue))
        else:
            p.append(float(stats.ks_2samp(x, after[name], method="asymp").pvalue))
    return min(benjamini_hochberg(p)) < 0.05


def evidently(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """What evidently's preset says at its defaults: drifted columns, and whether the data set counts as drifted."""
    try:
        import pandas as pd
        from evidently import Report
        from evidently.presets import DataDriftPreset
    except ImportError:
        return None
    found = Report([DataDriftPreset()]).run(pd.DataFrame(after), pd.DataFrame(before)).dict()
    value = found["metrics"][0]["value"]
    return {"any": value["count"] > 0, "dataset": value["share"] >= 0.5}


def one_null(seed: int, n: int, real: np.ndarray, peers: bool) -> dict[str, Any]:
    """One pair of alike tables; evidently, which takes seconds a table, on the first 30."""
    rng = np.random.default_rng([seed, n])
    before, after = table(rng, n, real), table(rng, n, real)
    begun = time.perf_counter()
    report = sn.shift.compare(before, after)
    seconds = time.perf_counter() - begun
    return {
        "verdict": report.verdict,
        "kinds": Counter((feature.name.split("_")[0], feature.verdict) for feature in report.features),
        "p": None if report.domain is None else report.domain.p,
        "seconds": seconds,
        "naive": naive(before, after) if peers else None,
        "evidently": evidently(before, after) if peers and n <= 100_000 and seed < 30 else None,
    }


def one_power(seed: int, n: int, real: np.ndarray, peers: bool) -> dict[str, Any]:
    """One pair of tables in which one column moves, by each of the shifts in turn."""
    rng = np.random.default_rng([seed, n, 1])
    before, after = table(rng, n, real), table(rng, n, real)
    found = {}
    for d in SHIFTS:
        moved = after | {MOVED: after[MOVED] + d}
        report = sn.shift.compare(before, moved, classifier_rows=0)
        names = [feature.name for feature in report.features]
        found[d] = (MOVED in report.shifted, names[0] == MOVED, naive(before, moved) if peers else None)
    return found


def bounds(k: int, n: int) -> list[float]:
    """The exact 95 % interval of a share (Clopper & Pearson)."""
    interval = stats.binomtest(k, n).proportion_ci(0.95, "exact")
    return [float(interval.low), float(interval.high)]


def summarised_null(n: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What comes of alike tables of n rows a side."""
    shifted = sum(one["verdict"] == "shifted" for one in results)
    p = [one["p"] for one in results if one["p"] is not None]
    peers = {}
    for name, flags in {
        "scipy with Benjamini-Hochberg, any column": [one["naive"] for one in results if one["naive"] is not None],
        "evidently, any column": [one["evidently"]["any"] for one in results if one["evidently"]],
        "evidently, data set": [one["evidently"]["dataset"] for one in results if one["evidently"]],
    }.items():
        if flags:
            peers[name] = {"flagged": int(sum(flags)), "tables": len(flags), "interval": bounds(sum(flags), len(flags))}
    kinds: Counter[tuple[str, str]] = sum((one["kinds"] for one in results), Counter())
    return {
        "rows": n,
        "tables": len(results),
        "verdicts": dict(Counter(one["verdict"] for one in results)),
        "shifted": shifted,
        "upper": float(stats.beta.ppf(0.95, shifted + 1, len(results) - shifted)),  # one-sided 95 %
        "features": {f"{kind}: {verdict}": count for (kind, verdict), count in sorted(kinds.items())},
        "classifier_p_below_0.05": float(np.mean(np.array(p) <= 0.05)) if p else None,
        "seconds": float(np.median([one["seconds"] for one in results])),
        "peers": peers,
    }


def summarised_power(n: int, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What comes of one moved column, a row for each shift."""
    rows = []
    for d in SHIFTS:
        found, first = (sum(one[d][i] for one in results) for i in (0, 1))
        naives = [one[d][2] for one in results if one[d][2] is not None]
        rows.append(
            {
                "rows": n,
                "shift": d,
                "tables": len(results),
                "found": found,
                "first": first,
                "both": sum(one[d][0] and one[d][1] for one in results),
                "interval": bounds(found, len(results)),
                "naive_any": int(sum(naives)) if naives else None,
            }
        )
    return rows


def main() -> int:
    """Runs what has not been run; 1 if a promise did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=300, help="pairs of tables a size (fewer above 10^5 rows)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--largest", type=int, default=10_000_000, help="leave out sizes above this")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a few small tables, to see that it runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measured" / "shift-tables.json")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.tables, chosen.largest = 6, 1_000
    real = load_breast_cancer().data[:, :15]
    results: dict[str, Any] = json.loads(chosen.out.read_text()) if chosen.out.exists() and not chosen.quick else {}
    results.setdefault("null", [])
    results.setdefault("power", [])
    results["settings"] = {"tables": chosen.tables, "columns": 50, "version": sn.__version__}
    results["environment"] = {"python": platform.python_version(), "numpy": np.__version__, "cores": os.cpu_count()}
    plan = [("power", one_power, n, share) for n, share in POWER_SIZES.items()]
    plan += [("null", one_null, n, share) for n, share in SIZES.items()]
    for part, work, n, share in plan:
        if n > chosen.largest or any(row["rows"] == n for row in results[part]):
            continue
        count = max(round(chosen.tables * share), 1)
        jobs = chosen.jobs if n <= 100_000 else 1
        found = joblib.Parallel(n_jobs=jobs)(
            joblib.delayed(work)(seed, n, real, not chosen.no_peers) for seed in range(count)
        )
        results[part] += summarised_power(n, found) if part == "power" else [summarised_null(n, found)]
        print(json.dumps(results[part][-len(SHIFTS) :] if part == "power" else results[part][-1]), flush=True)
        if not chosen.quick:
            aside = chosen.out.with_suffix(".partial")
            aside.write_text(json.dumps(results, indent=1) + "\n")
            aside.replace(chosen.out)
    at = [row for row in results["power"] if row["shift"] == 0.3 and row["rows"] == 2_000]
    held = all(row["shifted"] <= 0.01 * row["tables"] for row in results["null"])
    held &= all(row["both"] >= 0.99 * row["tables"] for row in at)
    held &= all(row["found"] == 0 for row in results["power"] if row["shift"] == 0.05)
    print("held" if held else "NOT held")
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
