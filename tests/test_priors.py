"""The fitted prior: against SciPy, what it recovers, its laws, and the model that carries it; calculators as
priors."""

import importlib.util

import numpy as np
import pytest
from scipy.optimize import least_squares
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


def guess_of(settings, pairs=3, species=2):
    """Guess and widths of the logarithms, as documented: depths, radius scales, stiffnesses, ratios - 1; exponents."""
    counts = [pairs] * 4 + [species]
    guess = [settings.depth, settings.radius_scale, settings.stiffness, settings.ratio - 1, settings.exponent]
    widths = [
        settings.depth_width, settings.radius_width, settings.stiffness_width, settings.ratio_width,
        settings.exponent_width,
    ]  # fmt: skip
    return np.repeat(np.log(guess), counts), np.repeat(widths, counts)


def numpy_residuals(settings, batch, wells_of, guess, widths, scale=1.0):
    """The formula at the top of priors.py, as the numbers whose squares it adds; widths above 0."""

    def residuals(parameters):
        energy, forces = _core.evaluate(wells_of(parameters), batch)
        off = energy - batch.columns["energy"]
        parts = [(off - off.mean()) / (scale * settings.energy_error)]
        for start, stop in zip(batch.offsets[:-1], batch.offsets[1:], strict=True):
            true = batch.atom_columns["forces"][start:stop]
            error = (scale * settings.force_error) ** 2 + settings.force_share**2 * np.mean(true**2)
            parts.append((forces[start:stop] - true).ravel() / np.sqrt(error))
        return np.concatenate([*parts, (parameters - guess) / widths])

    return residuals


def force_error(landscape, batch):
    """Root mean square of what is wrong about a force component [eV/angstrom]."""
    return np.sqrt(np.mean((_core.evaluate(landscape, batch)[1] - batch.atom_columns["forces"]) ** 2))


# Morse wells and nothing else.
PAIRS_ALONE = {"exponent": 1.0, "exponent_width": 0.0, "ratio_width": 0.0}
TRUTH = np.concatenate(
    [
        np.log([0.5, 0.7, 0.9]),
        np.log([0.94, 1.0, 1.05]),
        np.log([4.6, 3.7, 3.4]),
        np.log([1.3, 0.8, 1.6]),
        np.log([0.5, 0.8]),
    ]
)


@pytest.mark.parametrize(("count", "seed"), [(6, 2), (12, 3), (40, 4)])
def test_the_minimum_is_that_of_scipy(count, seed):
    """No larger than what SciPy's least squares find from there or from the guess; well below the guess. Errors so small
    that the data do not shrink them."""
    settings, batch = FittedPrior(energy_error=0.02, force_error=0.01, force_share=0.01), random_batch(count, seed)
    guess, widths = guess_of(settings)
    residuals = numpy_residuals(settings, batch, lambda q: settings.landscape([28, 79], q), guess, widths)
    found = settings.fit(batch)
    least = np.sum(residuals(found) ** 2)
    assert np.mean(residuals(found)[:-14] ** 2) > 1  # the errors are what they were
    assert least < 0.8 * np.sum(residuals(guess) ** 2)
    bounds = guess - 4 * widths - 1e-9, guess + 4 * widths + 1e-9
    for start in (found, guess):
        other = least_squares(residuals, start, bounds=bounds, x_scale=widths, max_nfev=60)
        assert least < 1.001 * 2 * other.cost + 1e-2  # a hundredth of what one standard deviation is worth


def test_recovers_the_wells_that_made_the_data():
    """Forces to a thousandth or so: the widths around the guess pull back a little. Lengths of bonds to 1 %."""
    settings, other = FittedPrior(), random_batch(10, 50)
    truth = settings.landscape([28, 79], TRUTH)
    batch, other = with_wells(random_batch(30, 5), truth), with_wells(other, truth)
    found = settings.fit(batch)
    size = np.sqrt(np.mean(other.atom_columns["forces"] ** 2))
    assert force_error(settings.landscape([28, 79], found), other) < 0.005 * size
    assert force_error(settings.landscape([28, 79], guess_of(settings)[0]), other) > 0.2 * size
    assert np.abs(found - TRUTH)[3:6].max() < 0.01
    assert list(settings.landscape([28, 79], found).pairs) == [(28, 28), (28, 79), (79, 79)]


def test_parameters_are_in_the_order_of_their_description():
    prior = FittedPrior().landscape([79, 28, 28], TRUTH)
    values = np.exp(TRUTH)
    for k, (a, b) in enumerate(((28, 28), (28, 79), (79, 79))):
        depth, r0, stiffness, ratio = prior.pairs[a, b]
        radius = _core.covalent_radius(a) + _core.covalent_radius(b)
        assert (depth, stiffness) == (values[k], values[6 + k])
        assert (r0, ratio) == pytest.approx((values[3 + k] * radius, 1 + values[9 + k]), rel=1e-15)
    assert prior.exponents == {28: values[12], 79: values[13]}


def test_morse_wells_stay_morse_wells():
    settings = FittedPrior(**PAIRS_ALONE)
    found = settings.fit(random_batch(12, 3))
    assert np.all(found[9:] == 0.0)  # ratio - 1 = 1, exponents 1
    prior = settings.landscape([28, 79], found)
    assert set(prior.exponents.values()) == {1.0} and {pair[3] for pair in prior.pairs.values()} == {2.0}
    assert np.all(found[:9] != guess_of(settings)[0][:9])
    for name in ("depth", "radius", "stiffness"):
        held = FittedPrior(**{f"{name}_width": 0.0})
        moved = held.fit(random_batch(12, 3)) != guess_of(held)[0]
        place = {"depth": 0, "radius": 3, "stiffness": 6}[name]
        assert not moved[place : place + 3].any() and np.delete(moved, range(place, place + 3)).all()
    rigid = FittedPrior(**{f"{name}_width": 0.0 for name in ("depth", "radius", "stiffness", "ratio", "exponent")})
    assert np.array_equal(rigid.fit(random_batch(12, 3)), guess_of(rigid)[0])


def test_meets_a_metal_better_than_pairs_do():
    """The reason for the exponents: EMT's forces, near minima above all, are not those of pair wells."""
    numbers = (28, 28, 28, 28, 79, 79, 79, 79)
    data = random_batch(30, 60, numbers=numbers)
    relaxed, *_ = _core.relax(_core.Emt(), data, steps=30, threads=1)
    rng = np.random.default_rng(61)
    near = data.with_positions(relaxed + rng.normal(0, 0.08, relaxed.shape))
    energy, forces = _core.evaluate(_core.Emt(), near)
    near = near.with_columns(energy=energy).with_atom_columns(forces=forces)
    train, test = near[:20], near[20:]
    errors = {}
    for name, settings in {"wells": FittedPrior(), "pairs": FittedPrior(**PAIRS_ALONE)}.items():
        errors[name] = force_error(settings.landscape(numbers, settings.fit(train)), test)
    print(f"error of a force component, eV/angstrom: {errors}, of {np.std(test.atom_columns['forces'])}")
    assert errors["wells"] < 0.4 * errors["pairs"]


def test_the_same_bits_every_time():
    settings, batch = FittedPrior(), random_batch(15, 13)
    found = settings.fit(batch)
    assert np.array_equal(settings.fit(batch), found)
    assert np.array_equal(FittedPrior().fit(Batch.concat([batch[:7], batch[7:]])), found)
    start = found + 0.1
    assert np.array_equal(settings.fit(batch, start), settings.fit(batch, start.copy()))
    assert np.array_equal(settings.fit(batch, np.zeros(5)), found)  # of other species: not used


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
    guess, widths = guess_of(settings)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        batch = random_batch(6, seed)
        batch = batch.with_columns(energy=rng.normal(0, 10.0**seed, 6))
        batch = batch.with_atom_columns(forces=rng.normal(0, 10.0**seed, (36, 3)))
        residuals = numpy_residuals(settings, batch, lambda q: settings.landscape([28, 79], q), guess, widths)
        for start in (None, guess + rng.normal(0, 1, 14) * widths):
            found = settings.fit(batch, start)
            assert np.mean(residuals(found)[:-14] ** 2) > 1  # nothing shrinks the errors
            assert np.sum(residuals(found) ** 2) <= np.sum(residuals(guess) ** 2) * (1 + 1e-12)
            assert np.all(np.abs(found - guess) <= 4 * widths + 1e-12)
    # atoms on one point: nothing to fit
    positions = batch.positions.copy()
    positions[1] = positions[0]
    on_top = batch.with_positions(positions).with_columns(energy=batch.columns["energy"])
    assert np.array_equal(settings.fit(on_top.with_atom_columns(forces=batch.atom_columns["forces"])), guess)


def test_without_forces_and_with_fixed_atoms():
    settings = FittedPrior()
    shallow = guess_of(settings)[0] + np.repeat([np.log(0.3 / 0.8), 0.0], [3, 11])
    truth = settings.landscape([28, 79], shallow)
    batch = with_wells(random_batch(20, 7), truth)
    forces = np.array(batch.atom_columns["forces"])
    nothing = settings.fit(batch.with_atom_columns(forces=np.full_like(forces, np.nan)))
    assert np.exp(nothing[:3]).max() < 0.6  # shallower than the guess, from energies alone
    assert np.array_equal(nothing, settings.fit(batch._changed(atom_columns={})))
    wrong = forces.copy()
    wrong[::6] += 100.0
    fixed = np.zeros(forces.shape, bool)
    fixed[::6] = True
    held = batch.with_atom_columns(forces=wrong)._changed(fixed=fixed)
    found = settings.landscape([28, 79], settings.fit(held))
    assert force_error(found, batch) < 0.02 * np.std(forces)


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
    assert isinstance(fitted.prior, _core.ManyBodyPrior)
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
    for settings, message in [
        ({"ratio": 1.0}, "ratio of a fitted prior must be above 1, got 1.0"),
        ({"ratio": np.inf}, "ratio of a fitted prior must be above 1"),
        ({"exponent": np.nan}, "exponent of a fitted prior must be above 0"),
        ({"stiffness": -4.0}, "stiffness of a fitted prior must be above 0"),
        ({"exponent_width": -0.1}, "exponent_width of a fitted prior must be at least 0"),
        ({"ratio_width": np.nan}, "ratio_width of a fitted prior must be at least 0"),
        ({"depth_width": np.inf}, "depth_width of a fitted prior must be at least 0, and finite"),
        ({"force_share": -1.0}, "force_share of a fitted prior must be at least 0"),
        ({"most_rows": 0}, "most_rows of a fitted prior must be at least 1"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            FittedPrior(**settings)
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
