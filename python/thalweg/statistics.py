"""Statistics over restarts: success curves with confidence bands, quartiles, mean best energies.

A restart is one search with its own seed. Its *time to success* is a count of true evaluations (1-based); a restart
that ended without success is censored at the number of evaluations it spent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from thalweg.errors import ThalwegError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SuccessCurve:
    """Fraction of restarts that have succeeded after so many evaluations: steps that hold from `evaluations[k]` on."""

    evaluations: IntArray  # (k,) rising, starts with 0; every count at which a restart succeeded or was censored
    success: FloatArray  # (k,) 1 - Kaplan-Meier survival
    lower: FloatArray  # (k,) lower bound of the confidence band
    upper: FloatArray  # (k,) upper bound
    at_risk: IntArray  # (k,) restarts still searching just before this count
    restarts: int
    successes: int
    confidence: float

    def quantile(self, fraction: float) -> float:
        """Evaluations after which `fraction` of the restarts have succeeded; inf when the curve never gets there."""
        return _first_at_or_above(self.evaluations, self.success, fraction)

    def quantile_band(self, fraction: float) -> tuple[float, float]:
        """Confidence bounds of `quantile(fraction)`: where the band's edges cross (Brookmeyer and Crowley 1982)."""
        return (
            _first_at_or_above(self.evaluations, self.upper, fraction),
            _first_at_or_above(self.evaluations, self.lower, fraction),
        )

    def at(self, evaluations: int) -> float:
        """The fraction that has succeeded after `evaluations` evaluations."""
        return float(self.success[np.searchsorted(self.evaluations, evaluations, side="right") - 1])


def success_curve(evaluations: npt.ArrayLike, succeeded: npt.ArrayLike, *, confidence: float = 0.95) -> SuccessCurve:
    """1 - Kaplan-Meier survival with an exponential Greenwood band (thesis A.1-A.4; Kalbfleisch and Prentice).

    evaluations: (n,) count at which each restart succeeded, or at which it ended without success (censored).
    succeeded:   (n,) whether it succeeded.

    With S the survival, V = sum d / (n (n - d)) over the events so far, and c = log(-log S) -+ z sqrt(V) / log S, the
    bounds of S are exp(-exp(c)). Where S = 0 this is undefined (the last restarts all succeeded): the success curve
    then keeps the lower bound it had before and its upper bound is 1.

    Raises ThalwegError when there is no restart, lengths differ, or a count is negative or not finite.
    """
    times = np.asarray(evaluations, dtype=np.float64)
    events = np.asarray(succeeded, dtype=bool)
    if times.ndim != 1 or times.shape != events.shape or len(times) == 0:
        raise ThalwegError(
            f"a success curve needs one count and one flag per restart; got shapes {times.shape} and {events.shape}"
        )
    if not np.all(np.isfinite(times)) or np.any(times < 0):
        raise ThalwegError("a success curve needs counts of evaluations that are finite and not negative")
    if not 0 < confidence < 1:
        raise ThalwegError(f"confidence is a probability between 0 and 1; got {confidence}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    steps = np.unique(np.concatenate([[0.0], times]))
    success = np.zeros(len(steps))
    lower = np.zeros(len(steps))
    upper = np.zeros(len(steps))
    at_risk = np.empty(len(steps), dtype=np.int64)
    survival, variance = 1.0, 0.0
    for k, step in enumerate(steps):
        n = int(np.count_nonzero(times >= step))
        d = int(np.count_nonzero(events & (times == step)))
        at_risk[k] = n
        if d:
            survival *= (n - d) / n
            variance += d / (n * (n - d)) if d < n else 0.0
        success[k] = 1.0 - survival
        if survival == 1.0:
            continue
        if survival == 0.0:
            lower[k], upper[k] = (lower[k - 1] if k else 0.0), 1.0
            continue
        log_survival = math.log(survival)
        center, spread = math.log(-log_survival), z * math.sqrt(variance) / -log_survival
        lower[k] = 1.0 - math.exp(-math.exp(center - spread))
        upper[k] = 1.0 - math.exp(-math.exp(center + spread))
    return SuccessCurve(
        evaluations=steps.astype(np.int64),
        success=success,
        lower=lower,
        upper=upper,
        at_risk=at_risk,
        restarts=len(times),
        successes=int(events.sum()),
        confidence=confidence,
    )


@dataclass(frozen=True)
class EnergyCurves:
    """Best energy so far [eV] against the number of true evaluations, over restarts.

    A restart that has ended keeps its best energy; `running` says how many had not ended. Before a restart has its
    first successful evaluation its best is NaN, and it is left out of mean, minimum and maximum.
    """

    evaluations: IntArray  # (k,) 1, 2, ...
    best: FloatArray  # (restarts, k)
    mean: FloatArray  # (k,)
    standard_error: FloatArray  # (k,) of the mean; NaN with fewer than two restarts
    lowest: FloatArray  # (k,)
    highest: FloatArray  # (k,)
    running: IntArray  # (k,)


def best_so_far(energies: npt.ArrayLike) -> FloatArray:
    """Running minimum (n,) of energies (n,) [eV]; failed evaluations (NaN) are skipped, leading ones stay NaN."""
    values = np.asarray(energies, dtype=np.float64)
    lowest = np.minimum.accumulate(np.where(np.isfinite(values), values, np.inf))
    return np.where(np.isfinite(lowest), lowest, np.nan)


def energy_curves(energies: Sequence[npt.ArrayLike]) -> EnergyCurves:
    """Mean, standard error, minimum and maximum over restarts of the best energy so far.

    energies: per restart the energies (n_i,) [eV] of its true evaluations in order, NaN where one failed.
    Raises ThalwegError when no restart has an evaluation.
    """
    histories = [best_so_far(values) for values in energies]
    histories = [history for history in histories if len(history)]
    if not histories:
        raise ThalwegError("an energy curve needs at least one restart with at least one evaluation")
    length = max(len(history) for history in histories)
    best = np.stack([np.pad(history, (0, length - len(history)), mode="edge") for history in histories])
    known = np.isfinite(best)
    count = known.sum(axis=0)
    some = count > 0
    filled = np.where(known, best, 0.0)
    mean = np.full(length, np.nan)
    mean[some] = filled.sum(axis=0)[some] / count[some]
    standard_error = np.full(length, np.nan)
    several = count > 1
    squares = np.where(known, (best - mean) ** 2, 0.0).sum(axis=0)
    standard_error[several] = np.sqrt(squares[several] / (count[several] - 1) / count[several])
    lowest = np.where(some, np.where(known, best, np.inf).min(axis=0), np.nan)
    highest = np.where(some, np.where(known, best, -np.inf).max(axis=0), np.nan)
    ends = np.array([len(history) for history in histories])
    counts = np.arange(1, length + 1, dtype=np.int64)
    return EnergyCurves(
        evaluations=counts,
        best=best,
        mean=mean,
        standard_error=standard_error,
        lowest=lowest,
        highest=highest,
        running=(ends[:, None] >= counts).sum(axis=0).astype(np.int64),
    )


def first_reaching(energies: npt.ArrayLike, threshold: float) -> int | None:
    """1-based count of the first evaluation with energy <= threshold [eV]; failed ones (NaN) count; None if none."""
    reached = np.flatnonzero(np.asarray(energies, dtype=np.float64) <= threshold)
    return int(reached[0]) + 1 if len(reached) else None


def describe_band(curve: SuccessCurve, fraction: float = 0.5) -> str:
    """The band of a quantile in words: "30 to 77", "30 or more", "unknown"."""
    low, high = curve.quantile_band(fraction)
    if math.isinf(low):
        return "unknown"
    return f"{low:.0f} or more" if math.isinf(high) else f"{low:.0f} to {high:.0f}"


def describe_median(curve: SuccessCurve) -> str:
    """ "5 of 8 restarts, median 41 evaluations (95 % band 30 to 77)"."""
    median, share = curve.quantile(0.5), f"{curve.successes} of {curve.restarts} restarts"
    if math.isinf(median):
        return f"{share}, median not reached"
    return f"{share}, median {median:.0f} evaluations ({100 * curve.confidence:.0f} % band {describe_band(curve)})"


def _first_at_or_above(evaluations: IntArray, values: FloatArray, fraction: float) -> float:
    if not 0 < fraction <= 1:
        raise ThalwegError(f"a quantile is a fraction above 0 and at most 1; got {fraction}")
    # 1 - (1 - 1/4) (1 - 1/3) ... is often half only up to rounding
    reached = np.flatnonzero(values >= fraction - 1e-12)
    return float(evaluations[reached[0]]) if len(reached) else math.inf
