"""The fitted pair prior: against SciPy, what it recovers, its laws, and the model that carries it."""

import numpy as np
import pytest
from scipy.optimize import minimize
from test_models import random_batch
from thalweg import GPR, FittedPrior, _core
from thalweg.errors import ConfigurationError


def with_wells(batch, wells, shift=-12.0):
    energy, forces = _core.evaluate(wells, batch)
    return batch.with_columns(energy=energy + shift).with_atom_columns(forces=forces)


def numpy_objective(settings, batch, wells_of, guess, widths):
    """The formula at the top of priors.py."""

    def objective(parameters):
        energy, forces = _core.evaluate(wells_of(parameters), batch)
        off = energy - batch.columns["energy"]
        total = np.sum((off - off.mean()) ** 2) / settings.energy_error**2
        for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            true = batch.atom_columns["forces"][start:stop]
            error = settings.force_error**2 + settings.force_share**2 * np.mean(true**2)
            total += np.sum((forces[start:stop] - true) ** 2) / error
        return total + np.sum(((parameters - guess) / widths) ** 2)

    return objective


@pytest.mark.parametrize(("count", "seed"), [(1, 1), (3, 2), (12, 3), (40, 4)])
def test_the_minimum_is_that_of_scipy(count, seed):
    """No larger than the best that a simplex search finds from there; well below the guess."""
    settings, batch = FittedPrior(), random_batch(count, seed)
    guess, widths = np.log([4.0, 1, 1, 0.8, 0.8, 0.8]), np.array([0.3, 0.1, 0.1, 0.8, 0.8, 0.8])
    objective = numpy_objective(settings, batch, lambda q: settings.landscape([28, 79], q), guess, widths)
    found = settings.fit(batch)
    assert objective(found) < 0.8 * objective(guess)
    other = minimize(objective, found, method="Nelder-Mead", options={"maxfev": 600, "xatol": 1e-6, "fatol": 1e-6})
    assert objective(found) < other.fun + 1e-2  # a hundredth of what one standard deviation is worth


def test_recovers_the_wells_that_made_the_data():
    """Lengths to 0.2 %, stiffness to 1 %, depths to 2 %: the widths around the guess pull back a little."""
    settings = FittedPrior()
    truth = np.log([5.0, 0.93, 1.06, 0.5, 0.9, 0.3])
    batch = with_wells(random_batch(30, 5), settings.landscape([28, 79], truth))
    found = settings.fit(batch)
    assert np.abs(found - truth)[0] < 0.01
    assert np.abs(found - truth)[1:3].max() < 0.002
    assert np.abs(found - truth)[3:].max() < 0.02


def test_a_common_constant_and_the_order_of_species_do_not_matter():
    settings, batch = FittedPrior(), random_batch(8, 6)
    found = settings.fit(batch)
    shifted = batch.with_columns(energy=batch.columns["energy"] + 1000.0)
    np.testing.assert_allclose(settings.fit(shifted), found, rtol=0, atol=1e-6)
    swapped = random_batch(8, 6, numbers=(79, 79, 79, 28, 28, 28))
    assert repr(settings.landscape([79, 28, 79], found)) == repr(settings.landscape([28, 79], found))
    assert len(settings.fit(swapped)) == len(found)


def test_never_worse_than_the_guess_and_within_bounds():
    """Data that wells cannot meet: random energies and forces, huge ones too."""
    settings = FittedPrior()
    guess, widths = np.log([4.0, 1, 1, 0.8, 0.8, 0.8]), np.array([0.3, 0.1, 0.1, 0.8, 0.8, 0.8])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        batch = random_batch(6, seed)
        batch = batch.with_columns(energy=rng.normal(0, 10.0**seed, 6))
        batch = batch.with_atom_columns(forces=rng.normal(0, 10.0**seed, (36, 3)))
        objective = numpy_objective(settings, batch, lambda q: settings.landscape([28, 79], q), guess, widths)
        for start in (None, guess + rng.normal(0, 1, 6) * widths):
            found = settings.fit(batch, start)
            assert objective(found) <= objective(guess) * (1 + 1e-12)
            assert np.all(np.abs(found - guess) <= 4 * widths + 1e-12)


def test_without_forces_and_with_fixed_atoms():
    settings = FittedPrior()
    truth = np.log([4.0, 1.0, 1.0, 0.3, 0.3, 0.3])
    batch = with_wells(random_batch(20, 7), settings.landscape([28, 79], truth))
    forces = np.array(batch.atom_columns["forces"])
    nothing = settings.fit(batch.with_atom_columns(forces=np.full_like(forces, np.nan)))
    assert np.exp(nothing[3:]).max() < 0.6  # shallower than the guess, from energies alone
    assert np.array_equal(nothing, settings.fit(batch._changed(atom_columns={})))
    wrong = forces.copy()
    wrong[::6] += 100.0
    fixed = np.zeros(forces.shape, bool)
    fixed[::6] = True
    held = batch.with_atom_columns(forces=wrong)._changed(fixed=fixed)
    np.testing.assert_allclose(settings.fit(held), truth, rtol=0, atol=0.05)


def test_lowest_structures_count_and_when_it_is_due():
    settings = FittedPrior(most_rows=10)
    batch = random_batch(25, 8)
    lowest = np.sort(np.argsort(batch.columns["energy"], kind="stable")[:10])
    assert np.array_equal(settings.fit(batch), settings.fit(batch.take(lowest)))
    last, fitted = 0, []
    for seen in range(1, 60):
        if settings.due(seen, last):
            fitted.append(seen)
            last = seen
    assert fitted == [1, 2, 3, 4, 5, 6, 7, 11, 17, 26, 39, 59]


def test_the_model_carries_it():
    """Targets always belong to the prior in use; a fitted prior leaves less to learn."""
    data, other = random_batch(30, 9), random_batch(5, 10)
    model, fitted = GPR(prior="fitted"), None
    assert repr(model.fit(data[:0]).landscape()) == repr(_core.PairPrior("bonding"))
    for n in range(1, 31):
        fitted = model.fit(data[:n], fitted)
        left = data.columns["energy"][fitted.rows] - _core.evaluate(fitted.prior, data.take(fitted.rows))[0]
        np.testing.assert_array_equal(fitted._learned.targets, left)
    assert isinstance(fitted.prior, _core.MorsePrior)
    bonding = GPR(prior="bonding").fit(data)
    assert np.std(fitted._learned.targets) < 0.6 * np.std(bonding._learned.targets)
    restored = model.restore(data, fitted.state)
    assert repr(restored.prior) == repr(fitted.prior)
    for one, two in zip(restored.predict(other, forces=True), fitted.predict(other, forces=True), strict=True):
        np.testing.assert_array_equal(one, two)
    assert "prior" not in bonding.state


def test_bad_input():
    with pytest.raises(ConfigurationError, match="depth of a fitted prior must be above 0"):
        FittedPrior(depth=0.0)
    with pytest.raises(ConfigurationError, match="growth of a fitted prior must be at least 1"):
        FittedPrior(growth=0.5)
    with pytest.raises(ConfigurationError, match="'fitted'"):
        GPR(prior="fited")
