"""The alarm: evidence that is gathered test after test, with a stated mean run until it cries wolf."""

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["combined_p", "e_value", "p_value", "shiryaev_roberts"]

Floats: TypeAlias = npt.NDArray[np.float64]

CEILING: Final = 1e12
"""Evidence beyond this says no more, and must not overflow."""


def p_value(statistic: npt.ArrayLike, null: Floats) -> Floats:
    """The share of the null that is at least as large, with the +1 that keeps it valid.

        p = (1 + #{null >= statistic}) / (J + 1)

    Args:
        statistic: One or more values of the statistic.
        null: (J,) draws of it under no shift, in ascending order.

    Source:
        Phipson & Smyth, "Permutation p-values should never be zero" (2010).

    Example:
        >>> p_value([0.0, 2.5, 9.0], np.array([1.0, 2.0, 3.0])).tolist()
        [1.0, 0.5, 0.25]
    """
    at_least = len(null) - np.searchsorted(null, statistic, side="left")
    return np.asarray((1.0 + at_least) / (len(null) + 1.0), dtype=np.float64)


def combined_p(p: npt.ArrayLike, share: float = 0.25) -> float:
    """One p-value from K that may depend on each other in any way: a share of them must be small, not only one.

        p = min(1, K/k p₍ₖ₎),    k = ⌈share K⌉,    p₍ₖ₎ the k-th smallest

    Source:
        Rüger, "Das maximale Signifikanzniveau des Tests: Lehne H0 ab, wenn k unter n gegebenen Tests zur Ablehnung
        führen", Metrika 25 (1978).

    Example:
        >>> combined_p([0.001, 0.9, 0.002, 0.8, 0.7])
        0.005
    """
    values = np.sort(np.asarray(p, dtype=np.float64).ravel())
    k = max(1, int(np.ceil(share * len(values))))
    return min(1.0, float(values[k - 1]) * len(values) / k)


def e_value(p: npt.ArrayLike) -> Floats:
    """Turns p-values into e-values, whose mean is at most 1 where there is no shift.

        e = ½ p^(-½)

    Source:
        Vovk & Wang, "E-values: calibration, combination and applications", Annals of Statistics 49 (2021).

    Example:
        >>> e_value([1.0, 0.25, 0.0001]).tolist()
        [0.5, 1.0, 50.0]
    """
    return 0.5 / np.sqrt(np.asarray(p, dtype=np.float64))


def shiryaev_roberts(evidence: npt.ArrayLike, e: npt.ArrayLike, batches: npt.ArrayLike = 1.0) -> Floats:
    """One step of the Shiryaev-Roberts procedure, in which a test may stand for more or less than one batch.

        M <- (M + w) e

    Where e has a mean of at most 1 given the past, M - Σ w is a supermartingale. So an alarm at M >= A comes after A
    batches on average or later, and within A / 10 batches with a probability of at most 10 % (Doob's inequality).

    Args:
        evidence: M, 0 to begin with.
        e: The e-value of this test.
        batches: w, how many batches were served since the test before.

    Source:
        Shin, Ramdas & Rinaldo, "E-detectors: a nonparametric framework for sequential change detection" (2023).

    Example:
        >>> m = shiryaev_roberts(0.0, 0.5)
        >>> float(shiryaev_roberts(m, 50.0))
        75.0
    """
    m, factor, served = (np.asarray(value, dtype=np.float64) for value in (evidence, e, batches))
    return np.minimum((m + served) * factor, CEILING)
