"""Fingerprint: against a plain NumPy formula, against AGOX's values, derivatives, laws, bad input."""

from itertools import combinations, product
from math import erf, exp, pi, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell, molecule
from thalweg import _core
from thalweg.descriptors import Fingerprint

CONVENTIONS = ("smooth", "agox")
AGOX = np.load(Path(__file__).with_name("data") / "agox_fingerprint.npz")


def batch_of(*structures: Atoms) -> SimpleNamespace:
    """The arrays of a batch."""
    return SimpleNamespace(
        positions=np.concatenate([a.positions for a in structures]),
        numbers=np.concatenate([a.numbers for a in structures]),
        offsets=np.cumsum([0, *(len(a) for a in structures)]),
        cells=np.array([np.asarray(a.cell) for a in structures]),
        pbc=np.array([a.pbc for a in structures]),
        fixed=np.zeros((sum(len(a) for a in structures), 3), bool),
    )


def agox_structure(name: str) -> Atoms:
    return Atoms(*(AGOX[f"{name}_{part}"] for part in ("numbers", "positions")),
                 cell=AGOX[f"{name}_cell"], pbc=AGOX[f"{name}_pbc"])  # fmt: skip


def cluster() -> Atoms:
    rng = np.random.default_rng(3)
    atoms = bulk("Cu", "fcc", a=3.9, cubic=True)
    atoms.numbers[:2] = 47
    atoms.positions += rng.normal(0, 0.15, atoms.positions.shape)
    atoms.pbc = False
    atoms.cell = [11.0, 12.0, 13.0]
    return atoms


def slab() -> Atoms:
    """Two layers, periodic in the plane only, oblique in it, with a third species on top."""
    atoms = make_supercell(bulk("NiAl", "cesiumchloride", a=2.9), np.diag([1, 2, 1]))
    atoms.numbers[0] = 8
    atoms.set_cell([[2.9, 0.4, 0.0], [-0.3, 5.6, 0.0], [0.0, 0.0, 15.0]])
    atoms.positions += np.random.default_rng(4).normal(0, 0.1, atoms.positions.shape)
    atoms.pbc = [True, True, False]
    return atoms


def skewed() -> Atoms:
    cell = [[3.6, 0.2, -0.1], [2.3, 3.9, 0.3], [-1.6, 1.8, 4.4]]
    scaled = [[0.05, 0.1, 0.0], [0.55, 0.4, 0.6], [0.1, 0.6, 0.45]]
    return Atoms("TiO2", scaled_positions=scaled, cell=cell, pbc=True)


STRUCTURES = {"cluster": cluster, "slab": slab, "skewed": skewed}


def window(edges, center, sigma, n_sigma, convention):
    """Integrals between the edges of the normalised smearing kernel around the center."""

    def integral(x):
        if convention == "agox":
            return erf(x / sqrt(2))
        tail = exp(-(n_sigma**2) / 2)
        return sqrt(pi / 2) * erf(x / sqrt(2)) - tail * (x * (1 + n_sigma**2 / 2) - x**3 / 6)

    inside = np.clip((np.asarray(edges) - center) / sigma, -n_sigma, n_sigma)
    return np.diff([integral(x) for x in inside]) / (2 * integral(n_sigma))


def numpy_fingerprint(atoms: Atoms, settings: Fingerprint) -> np.ndarray:
    s = settings
    n, volume, numbers = len(atoms), atoms.get_volume(), atoms.numbers
    species = sorted(set(numbers))
    bins = round(s.cutoff_radial / s.bin_width)
    reach = s.cutoff_radial + s.n_sigma * s.sigma_radial
    heights = volume / np.linalg.norm(np.cross(atoms.cell[[1, 2, 0]], atoms.cell[[2, 0, 1]]), axis=1)
    images = [
        range(-int(reach / h) - 2, int(reach / h) + 3) if p else (0,) for p, h in zip(atoms.pbc, heights, strict=True)
    ]
    neighbors = [
        [
            (numbers[j], d)
            for shift in product(*images)
            for j in range(n)
            if 1e-6
            < np.linalg.norm(d := atoms.positions[j] + np.array(shift) @ atoms.cell - atoms.positions[i])
            < reach
        ]
        for i in range(n)
    ]
    radial, angular = {}, {}
    edges = s.bin_width * np.arange(bins + 1)
    turn = pi / s.angular_bins
    wide = turn * np.arange(-s.angular_bins, 2 * s.angular_bins + 1)

    def cutoff(r):
        return 1 + s.gamma * (r / s.cutoff_angular) ** (s.gamma + 1) - (s.gamma + 1) * (r / s.cutoff_angular) ** s.gamma

    for i in range(n):
        for number, d in neighbors[i]:
            r = np.linalg.norm(d)
            block = radial.setdefault(tuple(sorted((numbers[i], number))), np.zeros(bins))
            part = window(edges, r, s.sigma_radial, s.n_sigma, s.convention)
            block += part / (4 * pi * r**2 * s.bin_width * n**2 / volume)
        near = [(z, d) for z, d in neighbors[i] if np.linalg.norm(d) < s.cutoff_angular]
        for (za, a), (zb, b) in combinations(near, 2):
            ra, rb = np.linalg.norm(a), np.linalg.norm(b)
            angle = np.arctan2(np.linalg.norm(np.cross(a, b)), a @ b)
            part = window(wide, angle, s.sigma_angular, s.n_sigma, s.convention)
            folded = part[s.angular_bins : 2 * s.angular_bins].copy()
            folded[::-1] += part[2 * s.angular_bins :]
            below = part[: s.angular_bins][::-1]  # bins -1, -2, ...
            if s.convention == "agox":
                folded[1:] += below[:-1]
            else:
                folded += below
            block = angular.setdefault((numbers[i], *sorted((za, zb))), np.zeros(s.angular_bins))
            block += s.eta * cutoff(ra) * cutoff(rb) / (n**3 / volume) * folded
    counts = {z: list(numbers).count(z) for z in species}
    pairs = [(a, b) for a in species for b in species if a <= b]
    triplets = [(c, a, b) for c in species for a, b in pairs]

    def can_fill(key):
        return atoms.pbc.any() or all(key.count(z) <= counts[z] for z in key)

    blocks = [radial.get(key, np.zeros(bins)) for key in pairs if can_fill(key)]
    blocks += [angular.get(key, np.zeros(s.angular_bins)) for key in triplets if can_fill(key) and s.angular]
    return np.concatenate(blocks)


def close(values, wanted, tolerance):
    """Tolerance relative to the largest feature."""
    np.testing.assert_allclose(values, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_values_are_those_of_the_formula(name, convention):
    atoms = STRUCTURES[name]()
    settings = Fingerprint(convention=convention)
    # The bin integrals are interpolated to about 1e-12.
    close(settings.values(batch_of(atoms))[0], numpy_fingerprint(atoms, settings), 5e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_values_with_other_settings(convention):
    settings = Fingerprint(
        cutoff_radial=4.5, cutoff_angular=3.2, bin_width=0.15, angular_bins=17, sigma_radial=0.11,
        sigma_angular=0.27, gamma=3.0, eta=2.0, n_sigma=3.5, convention=convention,
    )  # fmt: skip
    atoms = slab()
    close(settings.values(batch_of(atoms))[0], numpy_fingerprint(atoms, settings), 5e-12)


@pytest.mark.parametrize("name", ["cluster", "aniline", "crystal", "slab"])
def test_values_are_those_of_agox(name):
    values = Fingerprint(convention="agox").values(batch_of(agox_structure(name)))[0]
    close(values, AGOX[f"{name}_features"], 1e-10)


def test_smooth_values_stay_near_agox():
    """The lowered kernel differs from the cut Gaussian by its tail, exp(-8)."""
    atoms = agox_structure("slab")
    values = Fingerprint().values(batch_of(atoms))[0]
    close(values, AGOX["slab_features"], 1e-2)
    assert np.abs(values - AGOX["slab_features"]).max() > 1e-5


def test_lengths():
    sizes = {"Au": 60, "Au4Ni4": 270, "C6H7N": 540}
    assert Fingerprint().bind([79] * 3, False).size == sizes["Au"]
    assert Fingerprint().bind(agox_structure("cluster").numbers, False).size == sizes["Au4Ni4"]
    assert Fingerprint().bind(agox_structure("aniline").numbers, False).size == sizes["C6H7N"]
    assert Fingerprint(angular=False).bind([79] * 3, False).size == 30


@pytest.mark.parametrize("name", STRUCTURES)
def test_jacobian_is_the_derivative(name):
    atoms = STRUCTURES[name]()
    settings = Fingerprint()
    batch = batch_of(atoms)
    jacobian = settings.jacobian(batch)
    weights = np.random.default_rng(1).normal(size=(1, jacobian.shape[-1]))
    contracted = settings.contract(batch, weights)
    close(contracted, jacobian @ weights[0], 1e-13)

    def moved(direction, length):
        shifted = atoms.copy()
        shifted.positions += length * direction
        return settings.values(batch_of(shifted))[0]

    rng = np.random.default_rng(2)
    for _ in range(3):
        direction = rng.normal(size=(len(atoms), 3))
        direction /= np.linalg.norm(direction)
        h = 3e-4
        numeric = (
            8 * (moved(direction, h) - moved(direction, -h)) - (moved(direction, 2 * h) - moved(direction, -2 * h))
        ) / (12 * h)
        analytic = np.einsum("mk,mkd->d", direction, jacobian)
        assert np.abs(numeric - analytic).max() < 1e-8 * np.abs(jacobian).max()


def test_rotation_and_translation():
    atoms = cluster()
    reference = Fingerprint().values(batch_of(atoms))[0]
    turned = atoms.copy()
    turned.rotate(57.0, (1.0, 2.0, -0.5))
    turned.positions += [30.0, -20.0, 7.0]
    close(Fingerprint().values(batch_of(turned))[0], reference, 1e-12)


@pytest.mark.parametrize("name", ["slab", "skewed"])
def test_translation_and_wrapping_of_periodic_structures(name):
    atoms = STRUCTURES[name]()
    reference = Fingerprint().values(batch_of(atoms))[0]
    moved = atoms.copy()
    moved.positions += [3.3, -1.9, 0.7]
    moved.wrap()
    close(Fingerprint().values(batch_of(moved))[0], reference, 1e-12)


def test_permutation():
    atoms = slab()
    order = np.random.default_rng(0).permutation(len(atoms))
    close(Fingerprint().values(batch_of(atoms[order]))[0], Fingerprint().values(batch_of(atoms))[0], 1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_supercell(convention):
    """For k cells pairs and N^2/V grow as k: no change. Triplets as k, N^3/V as k^2: the rest falls so."""
    atoms = skewed()
    settings = Fingerprint(convention=convention)
    single = settings.values(batch_of(atoms))[0]
    double = settings.values(batch_of(make_supercell(atoms, [[1, 1, 0], [-1, 1, 0], [0, 0, 1]])))[0]
    radial = 3 * 30
    close(double[:radial], single[:radial], 1e-12)
    close(2 * double[radial:], single[radial:], 1e-12)


def test_batches_and_threads_do_not_change_a_bit():
    rng = np.random.default_rng(5)
    structures = []
    for _ in range(9):
        structures.append(skewed())
        structures[-1].positions += rng.normal(0, 0.1, (3, 3))
    batch = batch_of(*structures)
    settings = Fingerprint()
    values, jacobian = settings.values(batch, threads=1), settings.jacobian(batch)
    weights = rng.normal(size=values.shape)
    gradient = settings.contract(batch, weights, threads=1)
    assert np.array_equal(settings.values(batch, threads=3), values)
    assert np.array_equal(settings.contract(batch, weights, threads=2), gradient)
    for k, atoms in enumerate(structures):
        alone = batch_of(atoms)
        assert np.array_equal(settings.values(alone)[0], values[k])
        assert np.array_equal(settings.contract(alone, weights[k : k + 1]), gradient[3 * k : 3 * k + 3])
        assert np.array_equal(settings.jacobian(alone), jacobian[3 * k : 3 * k + 3])


def test_binding_is_cached():
    assert Fingerprint().bind([28, 79], True) is Fingerprint().bind([79, 28], True)
    assert Fingerprint().bind([28, 79], True) is not Fingerprint(eta=1.0).bind([28, 79], True)


def test_bad_input():
    atoms = cluster()
    other = atoms.copy()
    other.numbers[0] = 29
    with pytest.raises(ValueError, match=r"structure 1 of the batch.*another composition"):
        Fingerprint().values(batch_of(atoms, other))
    other = atoms.copy()
    other.pbc = True
    with pytest.raises(ValueError, match="non-periodic"):
        Fingerprint().jacobian(batch_of(atoms, other))
    with pytest.raises(ValueError, match="convention"):
        Fingerprint(convention="other").bind([29, 29], False)
    with pytest.raises(ValueError, match="sigma_radial"):
        Fingerprint(sigma_radial=0.0).bind([29, 29], False)
    with pytest.raises(ValueError, match="two atoms"):
        Fingerprint().values(batch_of(Atoms("C", cell=[9, 9, 9])))
    with pytest.raises(ValueError, match="volume"):
        Fingerprint().values(batch_of(molecule("H2O")))
    with pytest.raises(ValueError, match="weights must have shape"):
        Fingerprint().contract(batch_of(atoms), np.zeros((2, 5)))
    with pytest.raises(ValueError, match="threads"):
        Fingerprint().values(batch_of(atoms), threads=-1)
    with pytest.raises(ValueError, match="empty"):
        empty = batch_of(atoms)
        empty.offsets = np.array([0])
        Fingerprint().values(empty)
    assert _core.Fingerprint([29, 29], False).size == 30


def test_create_and_derivatives_take_atoms():
    fingerprint, atoms = Fingerprint(), cluster()
    derivatives, values = fingerprint.derivatives(atoms)
    assert np.array_equal(values, fingerprint.values(batch_of(atoms))[0])
    assert np.array_equal(derivatives, fingerprint.jacobian(batch_of(atoms)))
    assert np.array_equal(fingerprint.create([atoms, atoms]), [values, values])
