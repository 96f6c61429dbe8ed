"""Tight binding: against a formula in NumPy, its laws, its fit, and the searches that take it."""

import numpy as np
import pytest
from scipy.optimize import brentq
from thalweg import GPR, FittedPrior, Problem, _core, recipes
from thalweg.calculators import EMT
from thalweg.errors import ConfigurationError
from toys import same_rows

PROBLEM = Problem("C2H5NO", cell=12.0, box=4.5)
SPECIES = [1, 6, 7, 8]
CUTOFF, WALL, WALL_HEIGHT, TEMPERATURE = (1.3, 2.1), 0.75, 1250.0, 0.2
ELECTRONS = {1: 1, 6: 4, 7: 5, 8: 6}


def bonds():
    """Every pair with numbers of its own."""
    pairs = {}
    for k, a in enumerate(SPECIES):
        for b in SPECIES[k:]:
            r0 = _core.covalent_radius(a) + _core.covalent_radius(b)
            pairs[a, b] = (
                -3.0 - 0.1 * a, 3.5 + 0.1 * b, 5.0, -1.5 - 0.05 * b, r0, 2.0 + 0.1 * a, 5.0 + 0.2 * b, 1.8 + 0.02 * b
            )  # fmt: skip
    levels = {z: tuple(np.array(_core.TightBinding.free_atom(z)) * 0.9) for z in SPECIES}
    return _core.TightBinding(pairs, levels)


def structures(count=6, seed=3):
    positions, ok = _core.random_structures(
        PROBLEM.placed_numbers, PROBLEM.cell, PROBLEM.pbc, np.zeros((0, 3)), np.zeros(0, np.int32),
        box=PROBLEM.box_arguments, count=count, key=(seed, 0), c1=0.8, c2=1.3, tries_per_atom=100, threads=1,
    )  # fmt: skip
    return PROBLEM.batch(positions[ok])


def formula(prior, batch):
    """(n,) energies, orbital by orbital."""
    out = []
    for k in range(len(batch)):
        one = batch[k]
        x, z = np.reshape(one.positions, (-1, 3)), [int(n) for n in one.numbers]
        orbitals = [(i, a) for i in range(len(z)) for a in range(1 if z[i] == 1 else 4)]
        h = np.zeros((len(orbitals), len(orbitals)))
        energy = 0.0
        for i in range(len(z)):
            for j in range(i + 1, len(z)):
                ss, sp, sigma, pi, r0, q, push, ratio = prior.pairs[min(z[i], z[j]), max(z[i], z[j])]
                d = x[j] - x[i]
                r = np.linalg.norm(d)
                u = d / r
                t = np.clip((r / r0 - CUTOFF[0]) / (CUTOFF[1] - CUTOFF[0]), 0, 1)
                window = 1 - t**3 * (10 - 15 * t + 6 * t**2)
                energy += push * np.exp(-q * ratio * (r / r0 - 1)) * window
                wall = WALL * (_core.covalent_radius(z[i]) + _core.covalent_radius(z[j]))
                energy += WALL_HEIGHT * max(0.0, 1 - r / wall) ** 3
                decay = np.exp(-q * (r / r0 - 1)) * window
                for row, (atom, a) in enumerate(orbitals):
                    for column, (other, b) in enumerate(orbitals):
                        if (atom, other) != (i, j):
                            continue
                        if a == 0 and b == 0:
                            value = ss
                        elif a == 0:
                            value = sp * u[b - 1]
                        elif b == 0:
                            value = -sp * u[a - 1]
                        else:
                            value = (sigma - pi) * u[a - 1] * u[b - 1] + pi * (a == b)
                        h[row, column] = h[column, row] = value * decay
        for row, (atom, a) in enumerate(orbitals):
            h[row, row] = prior.levels[z[atom]][min(a, 1)]
        e = np.linalg.eigvalsh(h)
        pairs = 0.5 * sum(ELECTRONS[n] for n in z)

        def filled(mu, e=e):
            return 1 / (1 + np.exp(np.clip((e - mu) / TEMPERATURE, -500, 500)))

        mu = brentq(lambda mu, e=e, pairs=pairs: filled(mu, e).sum() - pairs, e[0] - 20, e[-1] + 20, xtol=1e-13)
        f = filled(mu)
        inside = f[(f > 1e-15) & (f < 1 - 1e-15)]
        entropy = -2 * (inside * np.log(inside) + (1 - inside) * np.log(1 - inside)).sum()
        out.append(energy + 2 * (f * e).sum() - TEMPERATURE * entropy)
    return np.array(out)


def test_energies_are_those_of_the_formula():
    batch = structures()
    assert np.allclose(_core.evaluate(bonds(), batch)[0], formula(bonds(), batch), rtol=0, atol=1e-8)


def test_forces_are_the_derivative():
    batch, prior = structures(), bonds()
    along = np.random.default_rng(1).normal(size=batch.positions.shape)
    along /= np.linalg.norm(along)
    step = 1e-4
    up, down = (_core.evaluate(prior, batch.with_positions(batch.positions + s * along))[0] for s in (step, -step))
    slopes = -(_core.evaluate(prior, batch)[1] * along).reshape(len(batch), -1).sum(axis=1)
    assert np.allclose((up - down) / (2 * step), slopes, rtol=0, atol=2e-6 * np.abs(slopes).max())


def test_laws():
    batch, prior = structures(), bonds()
    energy, forces = _core.evaluate(prior, batch, threads=2)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = _core.evaluate(prior, batch.with_positions(batch.positions @ rotation.T + 0.3))
    assert np.allclose(turned[0], energy, atol=1e-8) and np.allclose(turned[1], forces @ rotation.T, atol=1e-6)
    assert np.allclose(forces.reshape(len(batch), -1, 3).sum(axis=1), 0, atol=1e-8)
    alone = _core.evaluate(prior, batch[2], threads=1)
    assert alone[0][0] == energy[2] and np.array_equal(alone[1], forces[batch.offsets[2] : batch.offsets[3]])


@pytest.mark.parametrize("pieces", [1, 2])
def test_a_molecule_may_be_flat_or_in_pieces(pieces):
    """H falls into blocks then: the p orbitals that stand on the plane, and what is out of reach."""
    batch, prior = structures(), bonds()
    shape = np.array(batch.positions).reshape(len(batch), -1, 3)
    shape[:, :, 2] = 0.0
    shape *= 1.4  # what was above one another
    if pieces == 2:
        shape[:, len(shape[0]) // 2 :, 0] += 50.0
    flat = batch.with_positions(shape.reshape(-1, 3))
    energy, forces = _core.evaluate(prior, flat)
    known = np.isfinite(energy)
    assert known.sum() >= 4 and np.allclose(energy[known], formula(prior, flat)[known], rtol=0, atol=1e-8)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = _core.evaluate(prior, batch.with_positions(flat.positions @ rotation.T))
    assert np.allclose(turned[0], energy, atol=1e-8, equal_nan=True)
    assert np.allclose(turned[1], forces @ rotation.T, rtol=1e-8, atol=1e-6, equal_nan=True)
    assert not forces[:, 2].any()


@pytest.mark.parametrize("symbols", ["C", "H", "N", "H2", "H7", "N2", "CH3", "O2"])
def test_few_atoms_and_odd_electrons(symbols):
    problem, prior = Problem(symbols, cell=12.0, box=8.0), bonds()
    steps = np.array([[1.1, 0, 0], [0.2, 1.3, 0], [0, 0.3, 1.2], [1.2, 1.0, 0.4], [2.1, 0.4, 1.0], [0.9, 2.2, 0.7]])
    batch = problem.batch(np.concatenate([np.zeros((1, 3)), steps])[None, : len(problem.numbers)] + 4.0)
    assert np.allclose(_core.evaluate(prior, batch)[0], formula(prior, batch), rtol=0, atol=1e-8)


def test_atoms_on_one_point_have_no_energy():
    batch = structures(2)
    positions = batch.positions.copy()
    positions[1] = positions[0]
    energy, forces = _core.evaluate(bonds(), batch.with_positions(positions))
    assert np.isnan(energy[0]) and np.isfinite(energy[1]) and np.isnan(forces[: batch.offsets[1]]).all()


def test_the_guess_knows_valence():
    """Carbon takes four hydrogens, at the angles of a tetrahedron."""
    problem = Problem("CH4", cell=10.0, box=4.0)
    guess = FittedPrior(form="tight-binding").guess()
    start = np.array([[5, 5, 5], [6, 5, 5], [5, 6, 5], [4.4, 4.4, 5.3], [5, 5, 4]], float)
    order = np.argsort(problem.numbers != 6, kind="stable")
    positions = np.empty((5, 3))
    positions[order] = start
    batch = problem.batch(positions[None])
    relaxed = _core.relax(guess, batch, steps=300, force_tolerance=1e-3)[0].reshape(5, 3)[order]
    legs = relaxed[1:] - relaxed[0]
    lengths = np.linalg.norm(legs, axis=1)
    cosines = (legs @ legs.T / np.outer(lengths, lengths))[np.triu_indices(4, 1)]
    assert np.allclose(cosines, -1 / 3, atol=0.02) and np.ptp(lengths) < 0.02 and 0.9 < lengths.mean() < 1.3


def test_a_fit_meets_its_data_better_than_the_guess_and_the_same_every_time():
    batch = structures(12)
    energy, forces = _core.evaluate(bonds(), batch)
    data = batch.with_columns(energy=energy, status=np.zeros(len(batch), np.uint8)).with_atom_columns(forces=forces)
    settings = FittedPrior(form="tight-binding")
    parameters = settings.fit(data)
    assert len(parameters) == settings.count(data.numbers) and np.array_equal(parameters, settings.fit(data))

    def off(landscape):
        return np.std(_core.evaluate(landscape, batch)[0] - energy)

    assert off(settings.landscape(data.numbers, parameters)) < 0.5 * off(settings.guess())


def test_it_says_what_it_does_not_know():
    prior = bonds()
    assert 79 not in _core.TightBinding.elements() and 6 in _core.TightBinding.elements()
    with pytest.raises(ConfigurationError, match="knows H, B, C"):
        _core.TightBinding.free_atom(79)
    with pytest.raises(ConfigurationError, match="periodic"):
        _core.evaluate(prior, Problem("CO", cell=5.0, pbc=True).batch(np.array([[[0, 0, 0], [1.2, 0, 0]]])))
    with pytest.raises(ConfigurationError, match="no levels for F"):
        _core.evaluate(prior, Problem("HF", cell=5.0).batch(np.array([[[0, 0, 0], [1.2, 0, 0]]])))
    with pytest.raises(ConfigurationError, match="no entry for the pair H-H"):
        _core.evaluate(
            _core.TightBinding({}, {1: (-13.0, 0.0), 6: (-19.0, -11.0)}),
            Problem("CH", cell=5.0).batch(np.array([[[0, 0, 0], [1.2, 0, 0]]])),
        )
    with pytest.raises(ConfigurationError, match="positive"):
        _core.TightBinding({(6, 6): (-1, 1, 1, -1, 0.0, 2, 5, 2)}, {6: (-19.0, -11.0)})
    with pytest.raises(ConfigurationError, match="form"):
        FittedPrior(form="tight binding")
    assert repr(prior) == repr(bonds()) and repr(prior).startswith("TightBinding({(1, 1): (")


def test_auto_takes_it_for_molecules_alone():
    def model(formula, **options):
        return recipes.gofee(Problem(formula, **(options or {"cell": 12.0})), EMT()).models["gp"]

    assert model("C2H4O").prior == "tight-binding"
    for others in (model("Au2Cu2"), model("CO", cell=6.0, pbc=True), model("N4")):
        assert [inner.prior for inner in others.models.values()] == ["fitted", None]


def test_a_search_with_it_resumes(tmp_path):
    def search(store=None):
        return recipes.gofee(
            Problem("C2H4", cell=10.0, box=4.0), EMT(), prior="tight-binding", candidates=8, surrogate_steps=20,
            hops=2, walkers=2, seed=4, threads=1, store=store, polish_steps=4,
        )  # fmt: skip

    with search() as straight:
        straight.run(6)
        rows = straight.data
    with search(tmp_path / "a.journal") as first:
        first.run(3)
    with search(tmp_path / "a.journal") as again:
        again.run(3)
        same_rows(again.data, rows)
    assert isinstance(GPR(prior="tight-binding").fit(rows).prior, _core.TightBinding)
