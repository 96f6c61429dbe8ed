"""The local Gaussian process: against dense formulas, derivatives, laws, restarts, and a search."""

import numpy as np
import pytest
from test_models import random_batch
from thalweg import _core
from thalweg.calculators import EMT
from thalweg.errors import ConfigurationError
from thalweg.local_model import FittedLocalGPR, LocalGPR
from thalweg.models import _Mean, _prior
from thalweg.records import Batch, Problem

KERNEL = {"length": 1.2, "amplitude": 2.0, "noise_scale": 0.5}


def dense_model(model, fitted, data, test):
    """Energy and sigma by the textbook formulas, features and their differences from the core, no whitening."""
    gpr = fitted._gpr
    environments = model._environments(data.numbers)
    scale, length = gpr.scale, gpr.length * np.sqrt(environments.size)

    def features(batch):
        return environments.values(batch) * scale

    def covariance(q, kinds, z, kinds_z):
        d2 = ((q[:, None] - z[None]) ** 2).sum(-1)
        return np.exp(-d2 / (2 * length**2)) * (kinds[:, None] == kinds_z[None])

    q, kinds = features(data), np.asarray(data.numbers)
    chosen: list[int] = []
    for k in range(len(q)):  # every environment that the ones before do not explain
        cross = covariance(q[k : k + 1], kinds[k : k + 1], q[chosen], kinds[chosen])[0]
        inside = covariance(q[chosen], kinds[chosen], q[chosen], kinds[chosen]) + 1e-6 * np.eye(len(chosen))
        variance = 1 + 1e-6 - (cross @ np.linalg.solve(inside, cross) if chosen else 0.0)
        if variance > model.tolerance:
            chosen.append(k)
    assert len(chosen) == gpr.inducing
    z, kinds_z = q[chosen], kinds[chosen]

    def of_structures(batch):
        rows = covariance(features(batch), np.asarray(batch.numbers), z, kinds_z)
        return np.add.reduceat(rows, batch.offsets[:-1])

    h = 1e-4
    rows, targets, weights = [], [], []
    prior = _core.PairPrior("bonding")
    energies, slopes = _core.evaluate(prior, data)
    left_over = np.asarray(data.columns["energy"]) - energies
    atoms = np.diff(data.offsets)
    mean = (left_over @ atoms) / (atoms @ atoms)
    for i in range(len(data)):
        one = data.take([i])
        rows.append(of_structures(one)[0])
        targets.append(left_over[i] - mean * atoms[i])
        weights.append(1 / model.noise_energy)
        forces = (data.atom_columns["forces"] - slopes)[data.offsets[i] : data.offsets[i + 1]]
        for a in range(atoms[i]):
            for x in range(3):
                value = []
                for step in (-2, -1, 1, 2):
                    positions = one.positions.copy()
                    positions[a, x] += step * h
                    value.append(of_structures(one.with_positions(positions))[0])
                rows.append(-(8 * (value[2] - value[1]) - (value[3] - value[0])) / (12 * h))
                targets.append(forces[a, x])
                weights.append(1 / model.noise_force)
    design, y, w = np.array(rows), np.array(targets), np.array(weights) / np.sqrt(gpr.noise_scale)
    inside = covariance(z, kinds_z, z, kinds_z) + 1e-6 * np.eye(len(z))
    a = inside / gpr.amplitude + (design * w[:, None]).T @ (design * w[:, None])
    coefficients = np.linalg.solve(a, design.T @ (w**2 * y))
    k = of_structures(test)
    energy = _core.evaluate(prior, test)[0] + mean * np.diff(test.offsets) + k @ coefficients
    all_pairs = covariance(features(test), np.asarray(test.numbers), features(test), np.asarray(test.numbers))
    own = np.array([all_pairs[b:e, b:e].sum() for b, e in zip(test.offsets[:-1], test.offsets[1:], strict=True)])
    variance = gpr.amplitude * (own - np.einsum("nk,nk->n", k, np.linalg.solve(inside, k.T).T))
    variance += np.einsum("nk,nk->n", k, np.linalg.solve(a, k.T).T)
    # log likelihood of the DTC: targets ~ N(0, amplitude K_nz K_zz^-1 K_zn + noise)
    full = gpr.amplitude * design @ np.linalg.solve(inside, design.T) + np.diag(1 / w**2)
    likelihood = -0.5 * (y @ np.linalg.solve(full, y) + np.linalg.slogdet(2 * np.pi * full)[1])
    return energy, np.sqrt(variance), likelihood


@pytest.mark.parametrize("periodic", [False, True])
def test_matches_the_dense_formulas(periodic):
    data = random_batch(5, 3, numbers=(28, 28, 79, 79), periodic=periodic)
    test = random_batch(4, 4, numbers=(28, 28, 79, 79), periodic=periodic)
    model = LocalGPR(optimise=False, tolerance=1e-2, **KERNEL)
    fitted = model.fit(data)
    energy, sigma, likelihood = dense_model(model, fitted, data, test)
    ours = fitted.predict(test)
    np.testing.assert_allclose(ours[0], energy, rtol=0, atol=1e-6)  # their forces come from differences
    np.testing.assert_allclose(ours[1], sigma, rtol=0, atol=1e-6)
    assert fitted.log_likelihood == pytest.approx(likelihood, abs=1e-4)


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 2.0])
def test_forces_are_the_derivative(periodic, kappa):
    fitted = LocalGPR(**KERNEL).fit(random_batch(12, 5, periodic=periodic))
    test = random_batch(3, 6, periodic=periodic)
    landscape = fitted.landscape(kappa)
    energy, forces = _core.evaluate(landscape, test)
    mean, sigma, mean_forces, sigma_forces = fitted.predict(test, forces=True)
    np.testing.assert_allclose(energy, mean - kappa * sigma, rtol=0, atol=1e-10)
    np.testing.assert_allclose(forces, mean_forces - kappa * sigma_forces, rtol=0, atol=1e-8)
    rng, h = np.random.default_rng(1), 1e-3
    for _ in range(4):
        direction = rng.normal(size=forces.shape)
        direction /= np.linalg.norm(direction)
        values = [_core.evaluate(landscape, test.with_positions(test.positions + s * h * direction))[0]
                  for s in (-2, -1, 1, 2)]  # fmt: skip
        slope = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * h)
        expected = -np.add.reduceat((forces * direction).sum(1), test.offsets[:-1])
        # sigma is the root of a difference of large numbers: its differences are good to 1e-6 only
        np.testing.assert_allclose(slope, expected, rtol=0, atol=(1e-8 if kappa == 0 else 1e-6) * np.abs(forces).max())


def test_laws():
    fitted = LocalGPR(**KERNEL).fit(random_batch(10, 7))
    one = random_batch(1, 8)
    energy, sigma = fitted.predict(one)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    order = [2, 0, 1, 5, 3, 4]
    turned = one.with_positions((one.positions - 6.0)[order] @ rotation.T + 5.0)
    for ours, theirs in zip(fitted.predict(turned), (energy, sigma), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8)

    cell = random_batch(1, 9, periodic=True)
    a = cell.cells[0]
    twice = Batch(
        np.concatenate([cell.positions, cell.positions + a[0]]),
        np.concatenate([cell.numbers, cell.numbers]),
        np.array([0, 12]),
        (a * np.array([2.0, 1, 1])[:, None])[None],
        cell.pbc,
        np.zeros((12, 3), bool),
    )
    single, double = fitted.predict(cell, forces=True), fitted.predict(twice, forces=True)
    assert double[0][0] == pytest.approx(2 * single[0][0], abs=1e-9)
    np.testing.assert_allclose(double[2], np.tile(single[2], (2, 1)), rtol=0, atol=1e-9)
    assert double[1][0] == pytest.approx(2 * single[1][0], rel=1e-6)  # copies of one environment err together


def test_bits_do_not_depend_on_batch_or_threads():
    fitted = LocalGPR(**KERNEL).fit(random_batch(10, 7))
    test = random_batch(9, 11)
    together = fitted.predict(test, forces=True, atoms=True, threads=1)
    for ours, theirs in zip(fitted.predict(test, forces=True, atoms=True, threads=3), together, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(fitted.predict(test.take([4]), forces=True, threads=1), together, strict=False):
        np.testing.assert_array_equal(ours, theirs[4:5] if len(theirs) == 9 else theirs[24:30])
    landscape = fitted.landscape(1.5)
    energy, forces = _core.evaluate(landscape, test, threads=1)
    for i in (0, 8):
        alone = _core.evaluate(landscape, test.take([i]), threads=2)
        np.testing.assert_array_equal(alone[0], energy[i : i + 1])
        np.testing.assert_array_equal(alone[1], forces[6 * i : 6 * i + 6])


def test_atom_sigmas_are_those_of_lone_atoms_and_never_negative():
    fitted = LocalGPR(**KERNEL).fit(random_batch(10, 7))
    test = random_batch(5, 12)
    _, sigma, atoms = fitted.predict(test, atoms=True)
    assert np.all(atoms > 0) and np.all(atoms <= np.sqrt(fitted._gpr.amplitude) * (1 + 1e-9))
    # By the triangle inequality of a covariance: a sum errs by no more than its parts together.
    assert np.all(sigma <= np.add.reduceat(atoms, test.offsets[:-1]) * (1 + 1e-6))
    lone = Batch(np.full((1, 3), 6.0), np.array([28]), np.array([0, 1]), test.cells[:1], test.pbc[:1],
                 np.zeros((1, 3), bool))  # fmt: skip
    _, one, own = fitted.predict(lone, atoms=True)
    assert one[0] == pytest.approx(own[0], rel=1e-9)


def test_appending_equals_refitting():
    data, test = random_batch(16, 13), random_batch(5, 14)
    model = LocalGPR(**KERNEL)
    gpr = model._bare(data.numbers)
    learned = model._learned(data, np.arange(16), _Mean(_prior(model.prior)))
    targets = learned.energies - learned.offsets
    gpr.fit(data, targets, learned.forces, **KERNEL)
    expected = _core.LocalSurrogate(gpr).predict(test, forces=True)
    # The scale of the features comes from what `fit` sees: copies of all data first, then the same rows once more.
    grown = model._bare(data.numbers)
    twice = Batch.concat([data, data])
    grown.fit(data, targets, learned.forces, **KERNEL)
    grown.append(data, targets, learned.forces)
    full = model._bare(data.numbers)
    full.fit(twice, np.tile(targets, 2), np.tile(learned.forces, (2, 1)), **KERNEL)
    for ours, theirs in zip(
        _core.LocalSurrogate(grown).predict(test, forces=True),
        _core.LocalSurrogate(full).predict(test, forces=True),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)
    assert grown.inducing == full.inducing == gpr.inducing
    assert not np.allclose(expected[1], _core.LocalSurrogate(full).predict(test)[1], rtol=1e-3)

    # New inducing points by appending: half of the data whose features have the spread of all of them.
    first = np.r_[0:8]
    part = model._bare(data.numbers)
    part.fit(data.take(first), targets[:8], learned.forces[:48], **KERNEL)
    before, scale = part.inducing, part.scale
    part.append(data.take(np.r_[8:16]), targets[8:], learned.forces[48:])
    assert part.inducing > before
    np.testing.assert_array_equal(part.scale, scale)
    one_by_one = model._bare(data.numbers)
    one_by_one.fit(data.take(first), targets[:8], learned.forces[:48], **KERNEL)
    for i in range(8, 16):
        one_by_one.append(data.take([i]), targets[i : i + 1], learned.forces[6 * i : 6 * i + 6])
    for ours, theirs in zip(
        _core.LocalSurrogate(one_by_one).predict(test), _core.LocalSurrogate(part).predict(test), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_restore_and_load_give_the_same_bits(tmp_path):
    data, test = random_batch(20, 15), random_batch(5, 16)
    status = np.zeros(20, np.uint8)
    status[3] = 1
    data = data.with_columns(status=status)
    model, fitted, appended = LocalGPR(), None, []
    for n in (1, 2, 4, 5, 8, 12, 13, 14, 20):
        fitted = model.fit(data[:n], fitted)
        appended.append(len(fitted.appended))
        again = model.restore(data[:n], fitted.state)
        fitted.save(tmp_path / "model.npz")
        loaded = FittedLocalGPR.load(tmp_path / "model.npz")
        for other in (again, loaded):
            for ours, theirs in zip(other.predict(test, forces=True), fitted.predict(test, forces=True), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert again.rows.tolist() == fitted.rows.tolist()
        assert 3 not in fitted.rows
    assert max(appended) > 0
    assert model.fit(data, fitted) is fitted


def test_optimise_raises_the_likelihood():
    data = random_batch(15, 17)
    plain, best = LocalGPR(optimise=False).fit(data), LocalGPR().fit(data)
    assert best.log_likelihood > plain.log_likelihood + 1


def test_learns_and_is_sure_where_it_was_taught():
    data, test = random_batch(60, 18), random_batch(20, 19)
    forceless = data.with_atom_columns(forces=np.full_like(data.positions, np.nan))
    prior = np.std(_core.evaluate(_core.PairPrior("bonding"), test)[0] - test.columns["energy"])
    errors = {}
    for name, batch in {"forces": data, "energies": forceless}.items():
        fitted = LocalGPR().fit(batch)
        energy, sigma = fitted.predict(test)
        errors[name] = np.sqrt(np.mean((energy - test.columns["energy"]) ** 2))
        assert np.all(fitted.predict(batch)[1] < np.median(sigma))
    assert errors["forces"] < 0.5 * prior
    assert errors["forces"] < errors["energies"]


def test_another_composition_and_bad_input():
    fitted = LocalGPR(**KERNEL).fit(random_batch(5, 20))
    assert np.isfinite(fitted.predict(random_batch(2, 21, numbers=(28, 79, 79)))[0]).all()
    with pytest.raises(ConfigurationError, match="an atom is Cu"):
        fitted.predict(random_batch(1, 22, numbers=(29, 28)))
    broken = random_batch(2, 23)
    positions = broken.positions.copy()
    positions[1] = positions[0]
    energy, sigma, forces, _ = fitted.predict(broken.with_positions(positions), forces=True)
    assert np.isnan(energy).tolist() == [True, False] and np.isnan(sigma).tolist() == [True, False]
    assert np.isnan(forces[:6]).all() and np.isfinite(forces[6:]).all()
    empty = LocalGPR().fit(random_batch(2, 24).with_columns(status=np.ones(2, np.uint8)))
    assert empty.size == 0 and np.all(empty.predict(broken)[1] > 0)
    for settings in ({"tolerance": 0.0}, {"max_rows": 0}, {"l_max": 9}, {"prior": "none"}, {"noise_force": -1.0}):
        with pytest.raises(ConfigurationError):
            LocalGPR(**settings)
    with pytest.raises(ConfigurationError, match="prior of a name"):
        LocalGPR(prior=_core.PairPrior("bonding")).fit(random_batch(2, 25)).save("nowhere.npz")


def test_a_search_with_it_resumes_to_the_same_rows(tmp_path):
    from thalweg import recipes

    def search(path):
        return recipes.gofee(
            Problem("Au2Ni2", cell=12.0, box=5.0), EMT(), store=path, seed=3, model="local", random=3, rattle=3, permute=2,
            polish_last=0,
        )  # fmt: skip

    with search(tmp_path / "whole") as whole:
        whole.run(9)
    for steps in (5, 1):
        with search(tmp_path / "parts") as parts:
            parts.run(steps)
    with search(tmp_path / "parts") as parts:
        parts.run(3)
        np.testing.assert_array_equal(parts.data.positions, whole.data.positions)
        np.testing.assert_array_equal(parts.data.columns["energy"], whole.data.columns["energy"])
    with pytest.raises(ConfigurationError, match="model must be"):
        recipes.gofee(Problem("Au2Ni2", cell=12.0), EMT(), model="both")
