"""The Gaussian process: against scikit-learn, its laws, and the model that a search uses."""

from dataclasses import replace

import numpy as np
import pytest
from thalweg import _core
from thalweg.descriptors import Fingerprint
from thalweg.errors import ConfigurationError
from thalweg.models import GPR
from thalweg.records import Batch

CELL = np.eye(3) * 12.0


def random_batch(count, seed, *, numbers=(28, 28, 28, 79, 79, 79), periodic=False):
    """Clusters (or cells of 7 angstrom) with atoms at least 2 angstrom apart, and their EMT energies."""
    rng = np.random.default_rng(seed)
    cell = np.eye(3) * 7.0 if periodic else CELL
    images = np.array([[a, b, c] for a in (-1, 0, 1) for b in (-1, 0, 1) for c in (-1, 0, 1)]) @ cell
    structures = []
    for _ in range(count):
        x = np.zeros((0, 3))
        while len(x) < len(numbers):
            new = rng.random(3) * (7.0 if periodic else 5.0) + (0 if periodic else 3.5)
            shifted = x[None] + (images[:, None] if periodic else 0)
            if len(x) == 0 or np.min(np.linalg.norm(shifted - new, axis=-1)) > 2.0:
                x = np.vstack([x, new])
        structures.append(x)
    n = len(numbers)
    batch = Batch(
        np.concatenate(structures),
        np.tile(numbers, count),
        np.arange(count + 1) * n,
        np.broadcast_to(cell, (count, 3, 3)),
        np.broadcast_to([periodic] * 3, (count, 3)),
        np.zeros((count * n, 3), bool),
    )
    energy, forces = _core.evaluate(_core.Emt(), batch)
    return batch.with_columns(energy=energy, status=np.zeros(count, np.uint8)).with_atom_columns(forces=forces)


def test_gp_matches_scikit_learn():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    rng = np.random.default_rng(1)
    x, other = rng.random((60, 7)), rng.random((9, 7))
    y = np.sin(4 * x[:, 0]) + x[:, 1] ** 2 - 3
    kernel = _core.Kernel(
        amplitude=5.0, length_long=1.3, length_short=0.4, weight_long=0.7, weight_short=0.3, noise=1e-3
    )
    gpr = _core.Gpr(7, kernel)
    gpr.fit(x, y)
    theirs = GaussianProcessRegressor(
        ConstantKernel(5.0 * 0.7) * RBF(1.3) + ConstantKernel(5.0 * 0.3) * RBF(0.4) + WhiteKernel(1e-3),
        alpha=0.0,
        optimizer=None,
    ).fit(x, y - y.mean())
    mean, sigma = gpr.predict(other)
    expected, deviation = theirs.predict(other, return_std=True)
    np.testing.assert_allclose(mean, expected + y.mean(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(sigma**2, deviation**2 - 1e-3, rtol=0, atol=1e-9)  # ours leaves the noise out

    ours = gpr.likelihood(kernel)
    value, gradient = theirs.log_marginal_likelihood(theirs.kernel_.theta, eval_gradient=True)
    assert ours["value"] == pytest.approx(value, rel=1e-10)
    assert gpr.log_likelihood == pytest.approx(value, rel=1e-10)
    a_long, l_long, a_short, l_short, noise = gradient  # order of their theta
    scale = np.abs(gradient).max()
    assert ours["length_long"] == pytest.approx(l_long, abs=1e-9 * scale)
    assert ours["length_short"] == pytest.approx(l_short, abs=1e-9 * scale)
    assert ours["noise"] == pytest.approx(noise, abs=1e-9 * scale)
    assert ours["amplitude"] == pytest.approx(a_long + a_short, abs=1e-9 * scale)
    assert ours["weight"] == pytest.approx(0.7 * a_short - 0.3 * a_long, abs=1e-9 * scale)


def test_optimise_is_no_worse_than_scikit_learn():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    rng = np.random.default_rng(2)
    x = rng.random((50, 3))
    y = np.sin(5 * x[:, 0]) * np.cos(3 * x[:, 1])
    bounds = (1e-2, 1e2)
    theirs = GaussianProcessRegressor(
        ConstantKernel(1.0, (1e-2, 1e4)) * RBF(1.0, bounds) + WhiteKernel(1e-4, "fixed"), alpha=0.0
    ).fit(x, y - y.mean())
    gpr = _core.Gpr(
        3,
        _core.Kernel(amplitude=1, length_long=1, length_short=0.01, weight_long=1, weight_short=0, noise=1e-4),
    )
    gpr.fit(x, y)
    best = gpr.optimise(
        bounds={"amplitude": (1e-2, 1e4), "length_long": bounds, "length_short": (1e-3, 1e2)},
        free=["amplitude", "length_long"],
    )
    assert best >= theirs.log_marginal_likelihood_value_ - 1e-3
    assert best == pytest.approx(gpr.log_likelihood, rel=1e-8)


def same_bits(a, b, batch):
    assert a.rows.tolist() == b.rows.tolist()
    assert repr(a.kernel) == repr(b.kernel)
    for one, two in zip(a.predict(batch, forces=True), b.predict(batch, forces=True), strict=True):
        np.testing.assert_array_equal(one, two)
    for name, values in a.state.items():
        np.testing.assert_array_equal(values, b.state[name])


@pytest.mark.parametrize(
    ("max_rows", "prior", "forces"),
    [
        (500, "bonding", {}),
        (22, "bonding", {}),
        (500, "fitted", {}),
        (22, "fitted", {}),
        (500, "bonding", {"use_forces": True}),
        (22, "fitted", {"use_forces": True, "max_force_rows": 150}),
    ],
)
def test_restore_gives_the_same_bits(max_rows, prior, forces):
    data, other = random_batch(40, 3), random_batch(7, 4)
    status = np.zeros(40, np.uint8)
    status[[3, 17]] = 1
    energy = data.columns["energy"].copy()
    energy[17] = np.nan
    data = data.with_columns(status=status, energy=energy)
    model, fitted, sizes = GPR(max_rows=max_rows, prior=prior, **forces), None, []
    for n in [1, 2, 3, 5, 8, 12, 13, 15, 16, 17, 19, 21, 24, 26, 28, 29, 31, 32, 33, 34, 36, 37, 38, 40]:
        fitted = model.fit(data[:n], fitted)
        sizes.append(len(fitted.state["operations"]))
        same_bits(model.restore(data[: n + 2], fitted.state), fitted, other)
        assert 3 not in fitted.rows and 17 not in fitted.rows
        assert fitted.size == min(np.sum(data[:n].ok), max_rows)
    assert max(sizes) > 2 or forces.get("max_force_rows")  # some were appended, not refitted
    if max_rows == 22 and not forces:
        assert np.any(fitted.state["operations"] < 0) or max(sizes) > 3
        assert data.columns["energy"][fitted.rows].max() <= np.sort(energy[np.isfinite(energy) & (status == 0)])[21]
    # A fit from the start of the restored model goes on as the straight one does.
    again = model.restore(data, fitted.state)
    longer = Batch.concat([data, random_batch(1, 5)])
    same_bits(model.fit(longer, again), model.fit(longer, fitted), other)
    assert model.fit(data, fitted) is fitted


def test_appended_model_equals_a_fresh_one():
    data, other = random_batch(30, 6), random_batch(6, 7)
    kernel = _core.Kernel(amplitude=50.0, length_long=40.0, length_short=8.0, noise=1e-3)
    model = GPR(kernel=kernel, optimise=False)
    grown = model.fit(data[:20])
    for n in range(21, 31):
        grown = model.fit(data[:n], grown)
    assert grown.state["operations"].tolist() == list(range(20, 30))
    fresh = model.fit(data)
    for one, two in zip(grown.predict(other, forces=True), fresh.predict(other, forces=True), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-10 * np.abs(two).max())
    # Other data at the same rows: nothing is taken over.
    moved = data.with_positions(data.positions + 0.01).with_columns(energy=data.columns["energy"] + 1)
    np.testing.assert_array_equal(model.fit(moved, grown).predict(other)[0], model.fit(moved).predict(other)[0])


def test_learns_and_its_landscapes_agree():
    data, other = random_batch(150, 8), random_batch(9, 9)
    model = GPR(atom_energies={"Ni": -2.0, "Au": 0.5})
    fitted = model.fit(data)
    energy, sigma = fitted.predict(data)
    assert np.abs(energy - data.columns["energy"]).max() < 0.1
    energy, sigma, forces, sigma_forces = fitted.predict(other, forces=True)
    truth = other.columns["energy"]
    assert np.abs(energy - truth).mean() < 0.6 * np.abs(truth - truth.mean()).mean()
    assert 0.3 < np.sqrt(np.mean(((energy - truth) / sigma) ** 2)) < 3  # sigma is the size of the errors
    lcb, lcb_forces = _core.evaluate(fitted.landscape(2.0), other)
    np.testing.assert_allclose(lcb, energy - 2 * sigma, rtol=1e-12)
    np.testing.assert_allclose(lcb_forces, forces - 2 * sigma_forces, rtol=0, atol=1e-9 * np.abs(forces).max())
    assert fitted.landscape(2.0) is fitted.landscape(2.0)
    for threads in (1, 2):
        np.testing.assert_array_equal(fitted.predict(other, threads=threads)[0], energy)
    np.testing.assert_array_equal(fitted.predict(other.take([4, 2]))[0], energy[[4, 2]])
    np.testing.assert_array_equal(fitted.features(other), Fingerprint().values(other))
    # Atom energies that come with the data leave nothing for the model to learn about.
    shifted = GPR(atom_energies={"Ni": -2.0 + 1.0, "Au": 0.5}).fit(
        data.with_columns(energy=data.columns["energy"] + 3.0)
    )
    np.testing.assert_allclose(shifted.predict(other)[0], energy + 3.0, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prior", ["bonding", "repulsive", None, _core.LennardJones(2.2, 0.3)])
def test_forces_are_the_derivative_for_every_prior(prior):
    data, other = (
        random_batch(12, 10, periodic=True, numbers=(28, 28, 79, 79)),
        random_batch(2, 11, periodic=True, numbers=(28, 28, 79, 79)),
    )
    landscape = GPR(prior=prior).fit(data).landscape(1.0)
    _, forces = _core.evaluate(landscape, other)
    rng = np.random.default_rng(12)
    direction = rng.normal(size=other.positions.shape)

    def energies(step):
        return _core.evaluate(landscape, other.with_positions(other.positions + step * direction))[0]

    h = 1e-4
    slope = (8 * (energies(h) - energies(-h)) - (energies(2 * h) - energies(-2 * h))) / (12 * h)
    expected = -(forces * direction).reshape(2, -1).sum(1)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-8 * np.abs(forces).max() * np.abs(direction).sum())


def test_without_data_the_model_is_its_prior():
    other = random_batch(3, 13)
    empty = GPR().fit(Batch.empty())
    assert empty.size == 0 and np.isnan(empty.log_likelihood)
    prior = _core.evaluate(_core.PairPrior("bonding"), other)
    energy, sigma, forces, sigma_forces = empty.predict(other, forces=True)
    np.testing.assert_array_equal(energy, prior[0])
    np.testing.assert_array_equal(forces, prior[1])
    assert np.all(sigma == sigma[0]) and sigma[0] > 0 and not sigma_forces.any()
    np.testing.assert_array_equal(_core.evaluate(empty.landscape(2.0), other)[0], prior[0])
    nothing = GPR(prior=None).fit(other.with_columns(status=np.ones(3, np.uint8)))
    assert nothing.size == 0
    assert not _core.evaluate(nothing.landscape(), other)[1].any()
    assert GPR().restore(Batch.empty(), empty.state).size == 0
    one = GPR().fit(other[:1], empty)
    assert one.size == 1
    np.testing.assert_allclose(one.predict(other[:1])[0], other.columns["energy"][:1], rtol=0, atol=1e-6)


def test_hyperparameters_never_collapse_to_a_constant():
    data, other = random_batch(30, 14), random_batch(10, 15)
    rng = np.random.default_rng(16)
    noise = data.with_columns(energy=rng.normal(size=30))  # nothing to learn
    energy, _ = GPR(prior=None).fit(noise).predict(other)
    assert np.ptp(energy) > 1e-3
    same = data.with_columns(energy=np.full(30, -7.0))
    energy, sigma = GPR(prior=None).fit(same).predict(other)
    np.testing.assert_allclose(energy, -7.0, atol=1e-6)
    assert np.all(np.isfinite(sigma))


# ---- forces -------------------------------------------------------------------------------------------------------


def partly_known(count, seed):
    """Clusters in which an atom and a coordinate are fixed, one force of structure 1 and all of structure 2 unknown."""
    batch = random_batch(count, seed)
    fixed = np.zeros_like(batch.fixed)
    fixed[4::6] = True
    fixed[1::6, 2] = True
    forces = np.array(batch.atom_columns["forces"])
    forces[7, 1] = np.nan
    forces[12:18] = np.nan
    return replace(batch, fixed=fixed).with_atom_columns(forces=forces)


def test_forces_match_the_dense_formula():
    data, other = partly_known(5, 21), random_batch(3, 22)
    kernel = _core.Kernel(
        amplitude=30.0, length_long=40.0, length_short=9.0, weight_long=0.8, weight_short=0.2, noise=1e-3
    )
    model = GPR(kernel=kernel, optimise=False, use_forces=True, noise_force=0.2, prior="repulsive")
    fitted = model.fit(data)
    assert fitted.state["forces"].tolist() == [0, 1, 3, 4]
    descriptor = Fingerprint()
    x, jacobian = descriptor.values(data), descriptor.jacobian(data)
    prior, prior_forces = _core.evaluate(_core.PairPrior("repulsive"), data)
    points, directions, targets = [], [], []  # direction 0: an energy
    energies = data.columns["energy"] - prior
    for i in range(5):
        points.append(x[i])
        directions.append(np.zeros(x.shape[1]))
        targets.append(energies[i] - energies.mean())
        for atom in range(6 * i, 6 * i + 6):
            for axis in range(3):
                force = data.atom_columns["forces"][atom, axis]
                if data.fixed[atom, axis] or np.isnan(force):
                    continue
                points.append(x[i])
                directions.append(-jacobian[atom, axis])
                targets.append(force - prior_forces[atom, axis])
    points, directions = np.array(points), np.array(directions)
    assert len(points) == 5 + 3 * 14 + 13  # 14 free coordinates in each structure

    def covariance(a, s, b, t):
        r = a - b
        value, slope, bend = 0.0, 0.0, 0.0
        for weight, length in ((0.8, 40.0), (0.2, 9.0)):
            e = 30.0 * weight * np.exp(-0.5 * (r @ r) / length**2)
            value, slope, bend = value + e, slope + e / length**2, bend + e / length**4
        s_value, t_value = not s.any(), not t.any()
        if s_value and t_value:
            return value
        if s_value or t_value:
            return slope * (t @ r) if s_value else -slope * (s @ r)
        return slope * (s @ t) - bend * (s @ r) * (t @ r)

    n = len(points)
    k = np.array([[covariance(points[i], directions[i], points[j], directions[j]) for j in range(n)] for i in range(n)])
    k += np.diag([0.2**2 if d.any() else 1e-3 for d in directions])
    alpha = np.linalg.solve(k, targets)
    energy, sigma, forces, sigma_forces = fitted.predict(other, forces=True)
    none = np.zeros(x.shape[1])
    at = [np.array([covariance(f, none, points[j], directions[j]) for j in range(n)]) for f in descriptor.values(other)]
    base, base_forces = _core.evaluate(_core.PairPrior("repulsive"), other)
    np.testing.assert_allclose(energy, base + energies.mean() + np.array(at) @ alpha, rtol=1e-9)
    np.testing.assert_allclose(sigma, [np.sqrt(30.0 - row @ np.linalg.solve(k, row)) for row in at], rtol=1e-9)
    # The covariance of a force is that of the slope along minus the Jacobian.
    directions_there = -descriptor.jacobian(other).reshape(3, 18, -1)
    for i, f in enumerate(descriptor.values(other)):
        rows = np.array([[covariance(f, d, points[j], directions[j]) for j in range(n)] for d in directions_there[i]])
        expected = rows @ alpha + base_forces.reshape(3, 18)[i]
        scale = np.abs(expected).max()
        np.testing.assert_allclose(forces.reshape(3, 18)[i], expected, rtol=0, atol=1e-9 * scale)
        expected = -rows @ np.linalg.solve(k, at[i]) / sigma[i]
        np.testing.assert_allclose(sigma_forces.reshape(3, 18)[i], expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    residual = np.array(targets) @ alpha
    likelihood = -0.5 * residual - 0.5 * np.linalg.slogdet(k)[1] - 0.5 * n * np.log(2 * np.pi)
    assert fitted.log_likelihood == pytest.approx(likelihood, rel=1e-9)


def test_forces_of_a_model_with_forces_are_its_derivative():
    data = random_batch(14, 23, periodic=True, numbers=(28, 28, 79, 79))
    other = random_batch(2, 24, periodic=True, numbers=(28, 28, 79, 79))
    landscape = GPR(use_forces=True).fit(data).landscape(1.5)
    _, forces = _core.evaluate(landscape, other)
    direction = np.random.default_rng(25).normal(size=other.positions.shape)

    def energies(step):
        return _core.evaluate(landscape, other.with_positions(other.positions + step * direction))[0]

    h = 1e-4
    slope = (8 * (energies(h) - energies(-h)) - (energies(2 * h) - energies(-2 * h))) / (12 * h)
    expected = -(forces * direction).reshape(2, -1).sum(1)
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-8 * np.abs(forces).max() * np.abs(direction).sum())


def test_appended_forces_equal_a_fresh_fit():
    data, other = partly_known(20, 26), random_batch(6, 27)
    kernel = _core.Kernel(amplitude=50.0, length_long=40.0, length_short=8.0, noise=1e-3)
    model = GPR(kernel=kernel, optimise=False, use_forces=True)
    grown = model.fit(data[:12])
    for n in range(13, 21):
        grown = model.fit(data[:n], grown)
    assert grown.state["operations"].tolist() == list(range(12, 20))
    fresh = model.fit(data)
    for one, two in zip(grown.predict(other, forces=True), fresh.predict(other, forces=True), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-9 * np.abs(two).max())
    assert grown.log_likelihood == pytest.approx(fresh.log_likelihood, rel=1e-9)
    for threads in (1, 2):
        np.testing.assert_array_equal(fresh.predict(other, threads=threads)[1], fresh.predict(other)[1])
    np.testing.assert_array_equal(fresh.predict(other.take([4, 2]))[0], fresh.predict(other)[0][[4, 2]])
    # A draw from the posterior has its mean and its spread.
    draws = np.array([fresh.joint_draw(other, np.random.default_rng(k).normal(size=6)) for k in range(300)])
    energy, sigma = fresh.predict(other)
    assert np.all(np.abs(draws.mean(axis=0) - energy) < 4 * sigma / np.sqrt(300))
    np.testing.assert_allclose(draws.std(axis=0), sigma, rtol=0.25)


def test_only_the_lowest_teach_forces_when_there_are_too_many():
    data = random_batch(30, 28)
    model, fitted = GPR(use_forces=True, max_force_rows=100), None
    for n in range(1, 31):
        fitted = model.fit(data[:n], fitted)
        lowest = np.argsort(data.columns["energy"][:n], kind="stable")[:5]  # 18 components each
        assert fitted.state["forces"].tolist() == sorted(lowest)
        assert fitted._gpr.rows == n + 18 * len(lowest)
    assert model.fit(data.with_atom_columns(forces=np.full((180, 3), np.nan))).state["forces"].size == 0
    near = data.take([0, 1, 2, 0, 1, 2])
    near = near.with_positions(near.positions + np.repeat([0.0, 1e-3], 18)[:, None])
    near = near.with_columns(energy=np.array([-1.0, 3.0, 2.0, 1.0, -2.0, 2.5]))
    near = near.with_atom_columns(forces=_core.evaluate(_core.Emt(), near)[1])
    assert GPR(use_forces=True).fit(near).state["forces"].tolist() == [0, 2, 4]  # the lower of two near copies
    one = GPR(use_forces=True, max_force_rows=1).fit(data)
    assert one._gpr.rows == 30 + 18  # never none at all


def test_forces_lower_the_error_where_nothing_was_learned():
    """Of energies and forces, on clusters around local minima, as a search sees them."""
    start = random_batch(12, 29)
    rng = np.random.default_rng(30)
    positions, *_ = _core.relax(_core.Emt(), start, steps=60, force_tolerance=0.05)
    near = start.take(np.repeat(np.arange(12), 3)).with_positions(
        np.repeat(positions.reshape(12, 6, 3), 3, axis=0).reshape(-1, 3) + rng.normal(scale=0.15, size=(12 * 18, 3))
    )
    energy, forces = _core.evaluate(_core.Emt(), near)
    near = near.with_columns(energy=energy).with_atom_columns(forces=forces)
    train, test = near.take(np.flatnonzero(np.arange(36) % 3 > 0)), near.take(np.arange(0, 36, 3))
    errors = {}
    for use in (False, True):
        found, _, slopes, _ = GPR(use_forces=use).fit(train).predict(test, forces=True)
        errors[use] = [
            np.sqrt(np.mean((found - test.columns["energy"]) ** 2)),
            np.sqrt(np.mean((slopes - test.atom_columns["forces"]) ** 2)),
        ]
    print(f"energy and force errors: without forces {errors[False]}, with {errors[True]}")
    assert errors[True][0] < 0.7 * errors[False][0] and errors[True][1] < 0.7 * errors[False][1]


def crushed(batch, row, factor=0.3):
    """That structure with its atoms pushed together: thousands of eV."""
    positions = batch.positions.copy()
    here = slice(batch.offsets[row], batch.offsets[row + 1])
    positions[here] = (positions[here] - positions[here].mean(axis=0)) * factor + positions[here].mean(axis=0)
    batch = batch.with_positions(positions)
    energy, forces = _core.evaluate(_core.Emt(), batch)
    return batch.with_columns(energy=energy).with_atom_columns(forces=forces)


@pytest.mark.parametrize("prior", ["bonding", "fitted", "repulsive", None])
def test_a_structure_far_above_counts_as_the_ceiling(prior):
    data, other = random_batch(30, 80), random_batch(5, 81)
    model, energy = GPR(prior=prior), data.columns["energy"].copy()
    ceiling = energy.min() + 2.0 * 6
    assert model.fit(data).state["ceiling"][0] == energy.min() + 2.0 * 6
    energy[11] = ceiling + 3.0
    high = model.fit(data.with_columns(energy=energy))
    for far in (ceiling + 9.0, 1e4, 1e9):
        energy[11] = far
        same_bits(model.fit(data.with_columns(energy=energy)), high, other)  # how far does not matter
    below = energy < ceiling
    prior_energy = 0.0 if prior is None else _core.evaluate(high.prior, data)[0]
    learned = high._learned.targets + prior_energy
    np.testing.assert_allclose(learned[below], energy[below], rtol=0, atol=1e-9)
    if prior is None:
        assert learned[11] == pytest.approx(ceiling, abs=1e-9)
    # a window so wide that nothing is above it is no window; fixed atoms do not widen it
    wide = GPR(prior=prior, energy_window=1e6).fit(data)
    np.testing.assert_array_equal(wide.predict(other)[0], model.fit(data).predict(other)[0])
    fixed = np.zeros((180, 3), bool)
    fixed[::6] = True
    assert model.fit(data._changed(fixed=fixed)).state["ceiling"][0] == data.columns["energy"].min() + 2.0 * 5


@pytest.mark.parametrize("seed", [82, 83, 84])
@pytest.mark.parametrize("prior", ["bonding", "fitted"])
@pytest.mark.parametrize("forces", [False, True])
def test_a_crushed_structure_does_not_set_the_hyperparameters(prior, forces, seed):
    data = crushed(random_batch(31, seed), 17)
    assert data.columns["energy"][17] > 1e3
    rest, other = data.take(np.delete(np.arange(31), 17)), random_batch(40, 90)
    model = GPR(prior=prior, use_forces=forces)
    one, two = model.fit(data), model.fit(rest)
    assert one.size == 31 and 17 not in one._taught
    # energies of bonding wells alone say little about the lengths
    for name in ("amplitude",) if prior == "bonding" and not forces else ("amplitude", "length_long", "length_short"):
        ratio = getattr(one.kernel, name) / getattr(two.kernel, name)
        assert 0.5 < ratio < 2.0, f"{name}: {ratio}"
    (energy, sigma), (expected, sigma_without) = one.predict(other), two.predict(other)
    error, error_without = (np.sqrt(np.mean((e - other.columns["energy"]) ** 2)) for e in (energy, expected))
    assert error < 1.1 * error_without
    assert 0.9 < sigma.mean() / sigma_without.mean() < 1.1
    if prior == "fitted":  # nor the prior
        assert repr(one.prior) == repr(two.prior)
        # too high is what the prior says already: as little is left to learn of it as of the others
        left = one._learned.targets
        assert abs(left[17] - np.delete(left, 17).mean()) < 4 * np.delete(left, 17).std()


@pytest.mark.parametrize(
    "options", [{}, {"prior": "fitted"}, {"prior": "fitted", "use_forces": True}, {"max_rows": 20}]
)
def test_restore_gives_the_same_bits_with_rows_above_the_ceiling(options):
    """The lowest energy falls on the way, and the ceiling with it."""
    data, other = random_batch(36, 84), random_batch(6, 85)
    for row in (0, 4, 15, 22):
        data = crushed(data, row, 0.4 + 0.005 * row)
    order = np.argsort(-data.columns["energy"], kind="stable")
    data = data.take(np.concatenate([order[8:16], order[:4], order[16:], order[4:8]]))
    model, fitted, ceilings = GPR(energy_window=1.0, **options), None, set()
    above = []
    for n in [1, 2, 3, 6, 8, 9, 10, 12, 14, 15, 17, 20, 21, 23, 24, 27, 28, 31, 33, 34, 35, 36]:
        fitted = model.fit(data[:n], fitted)
        same_bits(model.restore(data[:n], fitted.state), fitted, other)
        ceilings.add(float(fitted.state["ceiling"][0]))
        above.append(int(np.sum(data.columns["energy"][fitted.rows] > fitted.state["ceiling"][0])))
    assert len(ceilings) > 3 and max(above) >= 3
    assert "max_rows" in options or above[-1] >= 4
    again = model.restore(data, fitted.state)
    longer = Batch.concat([data, crushed(random_batch(2, 86), 0)])
    same_bits(model.fit(longer, again), model.fit(longer, fitted), other)


def test_bad_input():
    data = random_batch(3, 17)
    with pytest.raises(ConfigurationError, match="noise is a variance"):
        GPR(noise=0.0)
    with pytest.raises(ConfigurationError, match="noise_force is a standard deviation"):
        GPR(noise_force=0.0)
    with pytest.raises(ConfigurationError, match="max_force_rows must be at least 1"):
        GPR(max_force_rows=0)
    with pytest.raises(ValueError, match="belong together"):
        _core.Gpr(3, _core.Kernel()).fit(np.zeros((1, 3)), np.zeros(1), counts=np.array([1]))
    with pytest.raises(ConfigurationError, match="prior must be"):
        GPR(prior="morse")
    with pytest.raises(ConfigurationError, match="chemical symbols"):
        GPR(atom_energies={"Xx": 1.0})
    with pytest.raises(ConfigurationError, match="one composition"):
        GPR().fit(Batch.concat([data, random_batch(1, 18, numbers=(28, 79))]))
    with pytest.raises(ConfigurationError, match="only 2 rows"):
        GPR().restore(data[:2], GPR().fit(data).state)
    with pytest.raises(ValueError, match="shape"):
        _core.Gpr(3, _core.Kernel()).fit(np.zeros((4, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="free may name"):
        GPR().fit(data)._gpr.optimise(free=["lengths"])
