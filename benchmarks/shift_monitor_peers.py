"""frouros on what `shift_monitor.py` measures: two-sample tests of every batch, on the monitor's own scores."""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from steadynorm.shift.watching.embedding import fit_projection

Floats = npt.NDArray[np.float64]
Features = dict[str, Floats]

BATCH = 64


def peers(
    population: Features, shifted: Mapping[str, Features], examples: int, mean_run: int, streams: int = 10
) -> Any:
    """KS (Bonferroni over the columns) and MMD (permutations) on the same scores, at p <= 1 / mean_run a batch."""
    from frouros.callbacks import PermutationTestDistanceBased  # pyright: ignore
    from frouros.detectors.data_drift import MMD, KSTest  # pyright: ignore

    rng = np.random.default_rng(0)
    chosen = rng.integers(len(next(iter(population.values()))), size=examples)
    projections = {k: fit_projection(v[chosen]) for k, v in population.items()}

    def scores(values: Features) -> Floats:
        return np.concatenate([projections[k].scores(v) for k, v in values.items()], axis=1)

    reference = scores({k: v[chosen] for k, v in population.items()})
    tests: list[Any] = []
    for column in reference.T:
        test = cast(Any, KSTest)()
        test.fit(X=column)
        tests.append(test)
    mmd = cast(Any, MMD)(
        callbacks=[cast(Any, PermutationTestDistanceBased)(num_permutations=999, random_state=0, name="permutation")]
    )
    mmd.fit(X=reference[:250])

    def ks_alarms(batch: Floats) -> bool:
        least = min(t.compare(X=c)[0].p_value for t, c in zip(tests, batch.T, strict=True))
        return least * len(tests) <= 1 / mean_run

    def mmd_alarms(batch: Floats) -> bool:
        return mmd.compare(X=batch)[1]["permutation"]["p_value"] <= 1 / mean_run

    rows = []
    for name, values in shifted.items():
        current, row = scores(values), {"stream": name}
        for label, alarmed, horizon in (("ks", ks_alarms, 50), ("mmd", mmd_alarms, 5)):
            found = []
            for _ in range(streams if label == "ks" else 3):
                batches = (current[rng.integers(len(current), size=BATCH)] for _ in range(horizon))
                found.append(next((i + 1 for i, b in enumerate(batches) if alarmed(b)), np.inf))
            middle = float(np.median(found))
            row[label] = {"median": None if np.isinf(middle) else middle, "alarmed": float(np.mean(np.isfinite(found)))}
            row[label]["horizon"] = horizon
        rows.append(row)
        print(row, flush=True)
    return rows
