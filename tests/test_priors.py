"""The fitted pair prior: against SciPy, what it recovers, its laws, and the model that carries it; calculators as
priors."""

import importlib.util

import numpy as np
import pytest
from scipy.optimize import minimize
from test_models import random_batch
from thalweg import GPR, CalculatorPrior, FittedPrior, LocalGPR, Problem, _core, recipes
from thalweg.calculators import EMT, LennardJones
from thalweg.config import Configuration
from thalweg.errors import ConfigurationError
from thalweg.evaluate import calculate
from thalweg.records import Batch
from toys import PairToy, same_rows


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


# ---- calculators ----------------------------------------------------------------------------------------------------


def test_a_builtin_calculator_is_its_landscape():
    data, other = random_batch(8, 40), random_batch(3, 41)
    ours, theirs = GPR(prior=EMT()).fit(data), GPR(prior=_core.Emt()).fit(data)
    assert isinstance(CalculatorPrior("emt").landscape, _core.Emt)
    for one, two in zip(ours.predict(other, forces=True), theirs.predict(other, forces=True), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(ours.predict(other)[0], other.columns["energy"], atol=1e-6)  # nothing is left to learn
    learned = LocalGPR(prior=LennardJones(sigma=2.2, epsilon=0.3)).fit(data)
    same = LocalGPR(prior=_core.LennardJones(2.2, 0.3)).fit(data)
    np.testing.assert_array_equal(learned.predict(other)[0], same.predict(other)[0])


def test_a_calculator_is_known_by_name_and_parameters():
    """Never by where it lies in memory: a store compares the texts."""
    texts = {repr(GPR(prior=PairToy(fails=fails))) for fails in (0.0, 0.0, 0.2)}
    assert len(texts) == 2 and not any(" at 0x" in text for text in texts)
    assert CalculatorPrior(PairToy()) == CalculatorPrior(PairToy()) != CalculatorPrior(PairToy(fails=0.1))
    assert GPR(prior=PairToy()) == GPR(prior=PairToy())
    assert GPR(prior={"calculator": "lj", "sigma": 2.0}) == GPR(prior=LennardJones(sigma=2.0))
    # calculators made of others
    from ase.calculators.mixing import SumCalculator

    assert CalculatorPrior(SumCalculator([PairToy()])) != CalculatorPrior(SumCalculator([PairToy(fails=0.1)]))


@pytest.mark.parametrize("model", [GPR, lambda **options: GPR(use_forces=True, **options), LocalGPR])
def test_a_calculator_in_python_is_a_prior(model):
    data, other = random_batch(14, 42), random_batch(9, 43)
    toy = PairToy()
    model = model(prior=toy)
    fitted = model.fit(data)
    landscape = model.prior.landscape
    energy, forces = _core.evaluate(landscape, other, threads=1)
    for i in range(len(other)):
        expected = calculate(PairToy(), other[i])
        assert energy[i] == expected[0]
        np.testing.assert_array_equal(forces[6 * i : 6 * i + 6], expected[1])
    for threads in (1, 2, 3):
        for one, two in zip(
            fitted.predict(other, forces=True, threads=threads), fitted.predict(other, forces=True), strict=True
        ):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(fitted.predict(other.take([5, 2]))[0], fitted.predict(other)[0][[5, 2]])
    before = toy.calls
    fitted.predict(other)
    assert toy.calls == before  # kept
    restored = model.restore(data, fitted.state)
    np.testing.assert_array_equal(restored.predict(other)[0], fitted.predict(other)[0])
    one, *_ = _core.relax(fitted.landscape(2.0), other, steps=5, threads=1)
    two, *_ = _core.relax(fitted.landscape(2.0), other, steps=5, threads=3)
    np.testing.assert_array_equal(one, two)
    # the landscape of model and prior together has forces that are its derivative
    direction = np.random.default_rng(44).normal(size=other.positions.shape)
    surface = fitted.landscape(1.0)
    _, slope = _core.evaluate(surface, other)

    def energies(step):
        return _core.evaluate(surface, other.with_positions(other.positions + step * direction))[0]

    h = 1e-4
    numeric = (8 * (energies(h) - energies(-h)) - (energies(2 * h) - energies(-2 * h))) / (12 * h)
    expected = -(slope * direction).reshape(len(other), -1).sum(1)
    np.testing.assert_allclose(numeric, expected, rtol=0, atol=1e-7 * np.abs(slope).max() * np.abs(direction).sum())


@pytest.mark.parametrize("raises", [True, False])
def test_a_structure_that_fails_in_the_prior_fails_alone(raises):
    data, other = random_batch(30, 45), random_batch(20, 46)
    model = GPR(prior=PairToy(fails=0.3, raises=raises))
    known = np.isfinite(_core.evaluate(model.prior.landscape, data)[0])
    assert 0 < known.sum() < 30
    fitted = model.fit(data)
    assert fitted.rows.tolist() == np.flatnonzero(known).tolist()
    energy, sigma, forces, _ = fitted.predict(other, forces=True, threads=2)
    there = np.isfinite(_core.evaluate(model.prior.landscape, other)[0])
    np.testing.assert_array_equal(np.isfinite(energy), there)
    np.testing.assert_array_equal(np.isfinite(forces).all(axis=1), np.repeat(there, 6))
    good = np.flatnonzero(there)
    np.testing.assert_array_equal(fitted.predict(other.take(good))[0], energy[good])
    assert LocalGPR(prior=PairToy(fails=0.3, raises=raises)).fit(data).size == known.sum()
    assert sigma[good].min() > 0


def test_what_ends_a_program_is_no_failed_structure():
    class Interrupted(PairToy):
        def calculate(self, *arguments, **named):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _core.evaluate(CalculatorPrior(Interrupted()).landscape, random_batch(3, 47), threads=2)


def test_a_search_with_a_calculator_as_prior_resumes(tmp_path):
    problem, path = Problem("Au3Ni3", cell=12.0, box=5.0), tmp_path / "a.journal"
    options = {"seed": 3, "candidates": 8, "surrogate_steps": 10, "polish_last": 0}

    def rows(steps, store=None, threads=1):
        with recipes.gofee(
            problem, EMT(), prior=PairToy(fails=0.05), store=store, threads=threads, **options
        ) as search:
            search.run(steps - search.iteration)
            return search.data

    straight = rows(7)
    rows(3, path)
    assert same_rows(rows(7, path), straight)
    assert same_rows(rows(7, threads=2), straight)


def test_calculators_by_name_and_mistakes(tmp_path):
    assert isinstance(GPR(prior={"calculator": "emt"}).prior.landscape, _core.Emt)
    for prior, words in {
        "bondng": "Did you mean 'bonding'",
        "gfn1-xtb": 'a calculator or {"calculator": name}',
    }.items():
        with pytest.raises(ConfigurationError, match=words):
            GPR(prior=prior)
    with pytest.raises(ConfigurationError, match="Did you mean 'gfn1-xtb'"):
        GPR(prior={"calculator": "gfn1-xtbb"})
    with pytest.raises(ConfigurationError, match=r"names a calculator.*Did you mean 'calculator'"):
        GPR(prior={"calculater": "emt"})
    with pytest.raises(ConfigurationError, match="Did you mean 'sigma'"):
        LocalGPR(prior={"calculator": "lj", "sigm": 2.0})
    with pytest.raises(ConfigurationError, match="made already"):
        CalculatorPrior(EMT(), {"sigma": 1.0})
    text = '[problem]\nsymbols = "Au2Ni2"\nbox = 5.0\n[calculator]\nname = "emt"\n[search]\n'
    text += 'prior = {calculator = "lj", sigma = 2.2}\n'
    (tmp_path / "case.toml").write_text(text)
    configuration = Configuration.load(tmp_path / "case.toml")
    (tmp_path / "again.toml").write_text(configuration.to_toml())
    assert Configuration.load(tmp_path / "again.toml") == configuration
    search = configuration.make_search(seed=1, store=None)
    assert search.models["gp"].prior == CalculatorPrior("lj", {"sigma": 2.2})


def test_gfn1_xtb_as_prior_of_gfn2_xtb(capsys):
    """Delta-learning: what GFN2 is beside GFN1 is easier to learn than GFN2."""
    if importlib.util.find_spec("tblite") is None:
        with capsys.disabled():
            print('\nskipped: tblite is not installed (pip install "thalweg[xtb]")')
        pytest.skip("tblite is not installed")
    from ase.build import molecule

    atoms = molecule("HCOOH")
    atoms.set_cell(np.eye(3) * 10.0)
    atoms.center()
    batch = Batch.from_ase([atoms] * 24)
    shaken = batch.positions + np.random.default_rng(48).normal(scale=0.08, size=batch.positions.shape)
    batch = batch.with_positions(shaken)
    true = CalculatorPrior("gfn2-xtb")
    energy, forces = _core.evaluate(true.landscape, batch, threads=1)
    again, _ = _core.evaluate(CalculatorPrior("gfn2-xtb").landscape, batch.take(np.arange(24)[::-1]), threads=2)
    np.testing.assert_allclose(again[::-1], energy, rtol=0, atol=1e-9)  # no memory of the structures before
    batch = batch.with_columns(energy=energy).with_atom_columns(forces=forces)
    train, test = batch[:14], batch[14:]
    errors = {}
    for name, prior in (("bonding", "bonding"), ("gfn1", {"calculator": "gfn1-xtb"})):
        found = GPR(prior=prior).fit(train).predict(test)[0]
        errors[name] = float(np.sqrt(np.mean((found - test.columns["energy"]) ** 2)))
    print(f"error of the energy of formic acid, eV: {errors}")
    assert errors["gfn1"] < 0.5 * errors["bonding"]
