"""Success curves against lifelines, energy curves against short formulas."""

import math

import numpy as np
import pytest
from thalweg.errors import ThalwegError
from thalweg.statistics import best_so_far, energy_curves, first_reaching, success_curve


def sample(seed, n, censored_share):
    rng = np.random.default_rng(seed)
    times = rng.geometric(0.02, n)
    return times, rng.random(n) >= censored_share


@pytest.mark.parametrize("confidence", [0.95, 0.68])
@pytest.mark.parametrize(("seed", "n", "censored_share"), [(0, 40, 0.0), (1, 40, 0.3), (2, 7, 0.5), (3, 300, 0.2)])
def test_success_curve_agrees_with_lifelines(seed, n, censored_share, confidence):
    from lifelines import KaplanMeierFitter

    times, succeeded = sample(seed, n, censored_share)
    curve = success_curve(times, succeeded, confidence=confidence)
    peer = KaplanMeierFitter(alpha=1 - confidence).fit(times, succeeded)
    survival = peer.survival_function_.iloc[:, 0]
    bounds = peer.confidence_interval_
    np.testing.assert_array_equal(curve.evaluations, survival.index)
    np.testing.assert_allclose(curve.success, 1 - survival.to_numpy(), atol=1e-13)
    # at S = 1 and S = 0 the formula is undefined, and lifelines fills in numbers of its own
    inside = (survival.to_numpy() > 1e-12) & (survival.to_numpy() < 1)
    assert inside.sum() >= 2
    np.testing.assert_allclose(curve.lower[inside], 1 - bounds.iloc[inside, 1], atol=1e-12)
    np.testing.assert_allclose(curve.upper[inside], 1 - bounds.iloc[inside, 0], atol=1e-12)
    assert curve.quantile(0.5) == peer.median_survival_time_
    np.testing.assert_array_equal(curve.at_risk[1:], peer.event_table["at_risk"].iloc[1:])


def test_band_holds_the_curve_and_widens_with_confidence():
    times, succeeded = sample(4, 30, 0.25)
    narrow, wide = (success_curve(times, succeeded, confidence=c) for c in (0.5, 0.95))
    assert np.all(narrow.lower <= narrow.success + 1e-15) and np.all(narrow.success <= narrow.upper + 1e-15)
    assert np.all(wide.lower <= narrow.lower + 1e-15) and np.all(narrow.upper <= wide.upper + 1e-15)


def test_quartiles_by_hand():
    curve = success_curve([10, 20, 30, 40], [True, True, True, True])
    assert [curve.quantile(q) for q in (0.25, 0.5, 0.75, 1.0)] == [10, 20, 30, 40]
    assert curve.at(19) == 0.25 and curve.at(20) == 0.5 and curve.at(0) == 0.0
    low, high = curve.quantile_band(0.5)
    assert low <= 20 <= high


def test_all_censored_never_succeeds():
    curve = success_curve([100, 100, 100], [False, False, False])
    assert curve.successes == 0 and curve.restarts == 3
    assert math.isinf(curve.quantile(0.5)) and curve.quantile_band(0.5) == (math.inf, math.inf)
    np.testing.assert_array_equal(curve.success, 0.0)


def test_where_everything_succeeded_the_band_stays_honest():
    curve = success_curve([5, 9], [True, True])
    assert curve.success[-1] == 1.0 and curve.upper[-1] == 1.0
    assert 0.0 < curve.lower[-1] < 0.5  # two successes do not prove certainty
    assert success_curve([5], [True]).lower[-1] == 0.0


def test_coverage_of_the_median_band():
    """The 95 % band of the median covers the true median in 93 +- 5 % of repeated experiments (fixed seeds)."""
    true_median = math.ceil(math.log(0.5) / math.log(1 - 0.02))
    covered = 0
    for seed in range(200):
        times, _ = sample(1000 + seed, 40, 0.0)
        low, high = success_curve(np.minimum(times, 60), times <= 60).quantile_band(0.5)
        covered += low <= true_median <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_bad_input_says_what_is_wrong():
    for arguments in [([], []), ([1, 2], [True]), ([1, -2], [True, True]), ([1, np.nan], [True, True])]:
        with pytest.raises(ThalwegError):
            success_curve(*arguments)
    with pytest.raises(ThalwegError, match="confidence"):
        success_curve([1], [True], confidence=95)
    with pytest.raises(ThalwegError, match="quantile"):
        success_curve([1], [True]).quantile(0)
    with pytest.raises(ThalwegError, match="at least one"):
        energy_curves([[], []])


def test_energy_curves():
    energies = [[np.nan, 3.0, 4.0, 1.0], [5.0, 2.0], [6.0, np.nan, 2.5]]
    curves = energy_curves(energies)
    np.testing.assert_array_equal(curves.best[0], [np.nan, 3, 3, 1])
    np.testing.assert_array_equal(curves.best[1], [5, 2, 2, 2])  # an ended restart keeps its best
    np.testing.assert_allclose(curves.mean, [5.5, 11 / 3, 2.5, 5.5 / 3])
    column = [3.0, 2.0, 6.0]
    np.testing.assert_allclose(curves.standard_error[1], np.std(column, ddof=1) / math.sqrt(3))
    np.testing.assert_array_equal(curves.lowest, [5, 2, 2, 1])
    np.testing.assert_array_equal(curves.highest, [6, 6, 3, 2.5])
    np.testing.assert_array_equal(curves.running, [3, 3, 2, 1])
    alone = energy_curves([[1.0, 0.5]])
    assert np.all(np.isnan(alone.standard_error))
    assert np.all(np.isnan(best_so_far([np.nan, np.nan])))


def test_first_reaching_counts_failed_evaluations():
    assert first_reaching([np.nan, 8.0, 7.8055, 7.0], 7.8059) == 3
    assert first_reaching([np.nan, 8.0], 7.8) is None
    assert first_reaching([], 7.8) is None
