"""SOAP, FCHL19 and the local density: against plain NumPy, against dscribe, derivatives, laws, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import gamma, log, pi, sqrt

import numpy as np
import pytest
from ase import Atoms
from ase.build import make_supercell
from ase.constraints import FixScaled
from scipy.special import sph_harm_y
from test_descriptors import batch_of, close, cluster, skewed, slab
from thalweg import _core
from thalweg.descriptors import FCHL19, SOAP, LocalDensity
from thalweg.errors import ConfigurationError

# Widest first: long range, several shells of images; high degrees; n_max = 1 and l_max = 0 are corners of their own.
SETTINGS = [SOAP(4.0, 3, 2, 1.0), SOAP(3.5, 5, 4, 0.4), SOAP(3.0, 4, 7, 0.5), SOAP(2.5, 1, 0, 0.9)]
DENSITY = LocalDensity(decay=1.3, cutoff=5.0)
# As published but for the cutoffs; narrow Gaussians, one at a time from an exponential; triplets reach farther than pairs.
FCHL = {
    "published": FCHL19(6.0, 4.5),
    "narrow": FCHL19(4.0, 4.0, 5, 11, 3, eta_pairs=1.1, eta_triplets=300.0, zeta=0.4, weight_triplets=-2.0),
    "wide": FCHL19(3.0, 5.0, 9, 1, 2, eta_triplets=0.05, zeta=0.7, decay_pairs=0.0, decay_triplets=3.0),
}


def environments(atoms: Atoms, reach: float):
    """Of each atom: species and vectors of everything within reach, images and itself included."""
    cell = np.array(atoms.cell)
    ranges = [(0,)] * 3
    if atoms.pbc.any():
        heights = atoms.get_volume() / np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
        most = [int(reach / h) + 2 if p else 0 for h, p in zip(heights, atoms.pbc, strict=True)]
        ranges = [range(-n, n + 1) for n in most]
    shifts = np.array(list(product(*ranges))) @ cell
    for x in atoms.positions:
        d = (atoms.positions[:, None] + shifts - x).reshape(-1, 3)
        near = np.linalg.norm(d, axis=1) < reach
        yield np.repeat(atoms.numbers, len(shifts))[near], d[near]


def numpy_soap(atoms: Atoms, s: SOAP) -> np.ndarray:
    """With complex harmonics and S^-1/2 from an eigendecomposition."""
    eta, reach = 0.5 / s.sigma**2, s.r_cut + s.sigma * sqrt(2 * log(1000))
    species = sorted(set(atoms.numbers))
    out = []
    for numbers, d in environments(atoms, reach):
        r = np.linalg.norm(d, axis=1)
        u = np.clip((r - s.r_cut) / (reach - s.r_cut), 0, 1)
        w = 1 - u**3 * (10 - 15 * u + 6 * u**2) if s.cutoff == "smooth" else np.ones_like(r)
        polar, azimuth = np.arccos(np.clip(d[:, 2] / np.maximum(r, 1e-300), -1, 1)), np.arctan2(d[:, 1], d[:, 0])
        row, c = [], {}
        for l in range(s.l_max + 1):  # noqa: E741
            a = np.linspace(1, s.r_cut, s.n_max)
            alpha = (log(1000) + l * np.log(a)) / a**2
            values, vectors = np.linalg.eigh(0.5 * gamma(l + 1.5) * (alpha[:, None] + alpha) ** (-l - 1.5))
            smeared = (pi / (eta + alpha)) ** 1.5 * (eta / (eta + alpha)) ** l
            radial = (vectors / np.sqrt(values)) @ vectors.T @ (
                smeared[:, None] * np.exp(-np.outer(eta * alpha / (eta + alpha), r**2))
            )  # fmt: skip
            angular = np.array([sph_harm_y(l, m, polar, azimuth) for m in range(-l, l + 1)]) * r**l * w
            for z in species:
                c[z, l] = radial[:, numbers == z] @ angular[:, numbers == z].T
        for k, z in enumerate(species):
            for y in species[k:]:
                for l in range(s.l_max + 1):  # noqa: E741
                    p = pi * sqrt(8 / (2 * l + 1)) * (c[z, l] @ c[y, l].conj().T).real
                    row.extend(p[np.triu_indices(s.n_max)] if z == y else p.ravel())
        out.append(row)
    return np.array(out)


def numpy_density(atoms: Atoms, s: LocalDensity) -> np.ndarray:
    species = sorted(set(atoms.numbers))
    rows = []
    for (numbers, d), number in zip(environments(atoms, s.cutoff), atoms.numbers, strict=True):
        r = np.linalg.norm(d, axis=1)
        part = np.where(r > 1e-9, np.exp(-r / s.decay) * (np.cos(pi * r / s.cutoff) + 1) / 2, 0.0)
        rows.append([*(part[numbers == z].sum() for z in species), number])
    return np.array(rows)


def numpy_fchl19(atoms: Atoms, s: FCHL19) -> np.ndarray:
    """The formulas of fchl.hpp, angles and logarithms as they stand there."""
    species, rows = sorted(set(atoms.numbers)), []

    def cut(r, cutoff):
        return np.where(r < cutoff, (np.cos(pi * r / cutoff) + 1) / 2, 0.0)

    for numbers, d in environments(atoms, max(s.cutoff_pairs, s.cutoff_triplets)):
        r = np.linalg.norm(d, axis=1)
        numbers, d, r = numbers[r > 1e-9], d[r > 1e-9], r[r > 1e-9]
        grid = np.linspace(0, s.cutoff_pairs, s.n_pairs + 1)[1:, None]
        variance = np.log(1 + s.eta_pairs / r**2)
        mu = np.log(r / np.sqrt(1 + s.eta_pairs / r**2))
        pairs = np.exp(-((np.log(grid) - mu) ** 2) / (2 * variance)) / (grid * np.sqrt(2 * pi * variance))
        pairs *= cut(r, s.cutoff_pairs) / r**s.decay_pairs
        row = [pairs[:, numbers == z].sum(1) for z in species]

        a, b = np.triu_indices(len(r), 1)
        a, b = a[near := (r[a] < s.cutoff_triplets) & (r[b] < s.cutoff_triplets)], b[near]
        c = np.linalg.norm(d[b] - d[a], axis=1)
        at_center = np.sum(d[a] * d[b], 1) / (r[a] * r[b])
        at_a, at_b = ((sign * np.sum(d[at] * (d[a] - d[b]), 1)) / (r[at] * c) for at, sign in ((a, 1), (b, -1)))
        theta = np.arctan2(np.linalg.norm(np.cross(d[a], d[b]), axis=1), np.sum(d[a] * d[b], 1))
        grid = np.linspace(0, s.cutoff_triplets, s.n_triplets + 1)[1:, None]
        radial = sqrt(s.eta_triplets / pi) * np.exp(-s.eta_triplets * ((r[a] + r[b]) / 2 - grid) ** 2)
        radial *= s.weight_triplets * (1 + 3 * at_center * at_a * at_b) / (r[a] * r[b] * c) ** s.decay_triplets
        radial *= cut(r[a], s.cutoff_triplets) * cut(r[b], s.cutoff_triplets)
        angular = [2 * np.exp(-((s.zeta * o) ** 2) / 2) * wave(o * theta)
                   for o in range(1, 2 * s.n_fourier, 2) for wave in (np.cos, np.sin)]  # fmt: skip
        for k, z in enumerate(species):
            for y in species[k:]:
                here = ((numbers[a] == z) & (numbers[b] == y)) | ((numbers[a] == y) & (numbers[b] == z))
                row.append((radial[:, here] @ np.array(angular)[:, here].T).ravel())
        rows.append(np.concatenate(row))
    return np.array(rows)


@dataclass(frozen=True)
class Case:
    """One descriptor in one setting, with its oracle and how well each is known."""

    descriptor: SOAP | FCHL19 | LocalDensity
    oracle: Callable
    tolerance: float  # of values, relative to the largest; the oracle's double precision S^-1/2 loses digits
    slope: float = 1e-8  # of derivatives, relative to the largest


CASES = {
    **{
        f"soap-{s.n_max}-{s.l_max}-{cutoff}": Case(replace(s, cutoff=cutoff), numpy_soap, 1e-11)
        for s in SETTINGS
        for cutoff in ("smooth", "hard")
    },
    **{f"fchl19-{name}": Case(s, numpy_fchl19, 1e-12) for name, s in FCHL.items()},
    "density": Case(DENSITY, numpy_density, 1e-13),
}
STRUCTURES = {"cluster": cluster, "slab": slab, "skewed": skewed}
pytestmark = pytest.mark.filterwarnings("error")


def moved(atoms: Atoms, change: np.ndarray) -> Atoms:
    out = atoms.copy()
    out.positions += change
    return out


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("name", STRUCTURES)
def test_values_are_those_of_the_formula(case, name):
    atoms = STRUCTURES[name]()
    close(case.descriptor.values(batch_of(atoms)), case.oracle(atoms, case.descriptor), case.tolerance)


@pytest.mark.parametrize("name", STRUCTURES)
def test_jacobian_and_contraction_are_the_derivative(case, name):
    atoms = STRUCTURES[name]()
    batch, rng = batch_of(atoms), np.random.default_rng(2)
    jacobian = case.descriptor.jacobian(batch)[0]  # centre, atom, axis, feature
    weights = rng.normal(size=case.descriptor.values(batch).shape)
    close(case.descriptor.contract(batch, weights), np.einsum("iakf,if->ak", jacobian, weights), 1e-12)
    for _ in range(2):
        direction, h = rng.normal(size=(len(atoms), 3)), 3e-4
        direction /= np.linalg.norm(direction)
        at = {k: case.descriptor.values(batch_of(moved(atoms, k * h * direction))) for k in (-2, -1, 1, 2)}
        numeric = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
        analytic = np.einsum("ak,iakf->if", direction, jacobian)
        assert np.abs(numeric - analytic).max() < case.slope * np.abs(jacobian).max()
        assert np.abs(numeric + analytic).max() > case.slope * np.abs(jacobian).max()  # a wrong sign would be seen


def test_turning_moving_wrapping_and_renumbering_change_nothing(case):
    atoms = cluster()
    reference = case.descriptor.values(batch_of(atoms))
    turned = atoms.copy()
    turned.rotate(57.0, (1.0, 2.0, -0.5))
    close(case.descriptor.values(batch_of(moved(turned, np.array([30.0, -20.0, 7.0])))), reference, 1e-11)
    for periodic in (slab(), skewed()):
        reference = case.descriptor.values(batch_of(periodic))
        wrapped = moved(periodic, np.array([3.3, -1.9, 0.7]))
        wrapped.wrap()
        close(case.descriptor.values(batch_of(wrapped)), reference, 1e-11)
        order = np.random.default_rng(0).permutation(len(periodic))
        close(case.descriptor.values(batch_of(periodic[order])), reference[order], 1e-11)


def test_an_atom_of_a_supercell_sees_the_same(case):
    atoms = skewed()
    double = make_supercell(atoms, [[1, 1, 0], [-1, 1, 0], [0, 0, 1]])
    single, several = case.descriptor.values(batch_of(atoms)), case.descriptor.values(batch_of(double))
    close(several, np.concatenate([single] * 2)[np.argsort(np.tile([0, 1, 2], 2), kind="stable")]
          if list(double.numbers) != [*atoms.numbers] * 2 else np.concatenate([single] * 2), 1e-11)  # fmt: skip


@pytest.mark.parametrize("average", ["mean", "sum"])
def test_averages(average):
    settings = SOAP(3.5, 4, 3, average=average)
    one, two = skewed(), moved(skewed(), np.random.default_rng(1).normal(0, 0.1, (3, 3)))
    batch = batch_of(one, two)
    each = replace(settings, average="off").values(batch).reshape(2, 3, -1)
    close(settings.values(batch), getattr(each, average)(axis=1), 1e-13)
    weights = np.random.default_rng(3).normal(size=(2, each.shape[-1]))
    share = 3 if average == "mean" else 1
    wanted = replace(settings, average="off").contract(batch, np.repeat(weights, 3, axis=0) / share)
    close(settings.contract(batch, weights), wanted, 1e-13)
    doubled = make_supercell(one, np.diag([2, 1, 1]))  # N copies: N times the sum, the same mean
    copies = 1 if average == "mean" else 2
    close(settings.values(batch_of(doubled))[0], copies * settings.values(batch_of(one))[0], 1e-12)


def test_batches_and_threads_do_not_change_a_bit(case):
    rng = np.random.default_rng(5)
    structures = [moved(skewed(), rng.normal(0, 0.1, (3, 3))) for _ in range(5)]
    structures[2] = slab()  # another composition and periodicity
    settings = replace(case.descriptor, species=(8, 13, 22, 28))
    batch = batch_of(*structures)
    values = settings.values(batch, threads=1)
    weights = rng.normal(size=values.shape)
    gradient = settings.contract(batch, weights, threads=1)
    for threads in (2, 3, 8):
        assert np.array_equal(settings.values(batch, threads), values)
        assert np.array_equal(settings.contract(batch, weights, threads), gradient)
    three = int(batch.offsets[3])
    assert np.array_equal(settings.values(batch_of(*structures[:3])), values[:three])
    assert np.array_equal(settings.contract(batch_of(*structures[:3]), weights[:three]), gradient[:three])
    for k, atoms in enumerate(structures):
        rows = slice(batch.offsets[k], batch.offsets[k + 1])
        assert np.array_equal(settings.values(batch_of(atoms), threads=2), values[rows])
        assert np.array_equal(settings.contract(batch_of(atoms), weights[rows], threads=2), gradient[rows])
        assert np.array_equal(settings.jacobian(batch_of(atoms))[0], settings.jacobian(batch)[k])


def test_smooth_forces_have_no_jump_at_the_cutoffs():
    """Along a path out of reach; hard ones jump there."""
    roughest = {}
    for cutoff in ("smooth", "hard"):
        settings = SOAP(3.0, 3, 2, 0.4, cutoff=cutoff)
        step = 1e-3
        path = [Atoms("Au2", [[0, 0, 0], [0.3, 0.4, 2.5 + step * k]]) for k in range(2500)]
        batch = batch_of(*path)
        weights = np.ones((len(batch.numbers), settings.bind(batch.numbers).size))
        pull = settings.contract(batch, weights).reshape(-1, 2, 3)[:, 1, 2]
        roughest[cutoff] = np.abs(np.diff(pull, 2)).max() / np.abs(pull).max()
    assert roughest["smooth"] < 1e-4
    assert roughest["hard"] > 10 * roughest["smooth"]


def test_peer_dscribe():
    """The same numbers for the same settings, as the table of docs/backend.md says."""
    pytest.importorskip("dscribe", reason="dscribe is not installed")
    from dscribe.descriptors import SOAP as Theirs

    for atoms in (cluster(), skewed()):
        for s in [*SETTINGS, SOAP(5.0, 8, 6, 0.5)]:
            for average, named in (("off", "off"), ("mean", "outer")):
                theirs = Theirs(
                    species=sorted(set(atoms.numbers)), r_cut=s.r_cut, n_max=s.n_max, l_max=s.l_max, sigma=s.sigma,
                    periodic=bool(atoms.pbc.any()), average=named,
                ).create(atoms)  # fmt: skip
                ours = replace(s, cutoff="hard", average=average).values(batch_of(atoms))
                close(np.squeeze(ours), np.squeeze(theirs), 1e-8)
    flat = slab()  # dscribe honours pbc of the structure
    theirs = Theirs(species=[8, 13, 28], r_cut=4.0, n_max=3, l_max=2, sigma=1.0, periodic=True).create(flat)
    close(SOAP(4.0, 3, 2, 1.0, cutoff="hard").values(batch_of(flat)), theirs, 1e-8)


def test_species_are_symbols_or_numbers():
    assert SOAP(species=["O", 22]) == SOAP(species=(22, 8))
    assert SOAP(species=("Ti", "O")).bind() is SOAP(species=("O", "Ti")).bind([6])
    assert SOAP(4.0, 3, 2, species=("Ti", "O")).bind().size == 3 * 6 * 7 // 2
    assert LocalDensity(species=("Ti", "O")).bind().size == 3
    alone = SOAP(4.0, 3, 2).values(batch_of(Atoms("O", cell=[9, 9, 9])))
    assert alone.shape == (1, 18) and np.isfinite(alone).all()
    assert np.array_equal(LocalDensity().values(batch_of(Atoms("O"))), [[0.0, 8.0]])


@pytest.mark.parametrize("settings, words", [
    ({"r_cut": 0.9}, "r_cut"), ({"n_max": 0}, "n_max"), ({"n_max": 16, "r_cut": 1.5}, "too alike"),
    ({"l_max": 13}, "l_max"), ({"sigma": 0.0}, "sigma"), ({"cutoff": "soft"}, "cutoff"), ({"average": "inner"}, "average"),
])  # fmt: skip
def test_senseless_settings(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        SOAP(**settings).values(batch_of(cluster()))


def test_bad_input():
    atoms, other = cluster(), cluster()
    with pytest.raises(ConfigurationError, match="atomic number 29"):
        SOAP(species=["Ag"]).values(batch_of(atoms))
    with pytest.raises(ConfigurationError, match="atomic number 29"):
        LocalDensity(species=["Ag"]).values(batch_of(atoms))
    with pytest.raises(ConfigurationError, match="Did you mean"):
        SOAP(species=["ag"])
    with pytest.raises(ConfigurationError, match="sequence"):
        SOAP(species="Ag")
    with pytest.raises(ConfigurationError, match="weights must have shape"):
        SOAP().contract(batch_of(atoms), np.zeros((2, 5)))
    with pytest.raises(ConfigurationError, match="threads"):
        SOAP().values(batch_of(atoms), threads=-1)
    with pytest.raises(ConfigurationError, match="decay"):
        LocalDensity(decay=0.0).values(batch_of(atoms))
    other.positions[1, 2] = np.nan
    with pytest.raises(ConfigurationError, match=r"structure 1 of the batch.*finite"):
        SOAP().values(batch_of(atoms, other))
    other.positions[1] = other.positions[0]
    with pytest.raises(ConfigurationError, match="one point"):
        LocalDensity().values(batch_of(other))
    other.pbc, other.cell = True, np.zeros((3, 3))
    with pytest.raises(ConfigurationError, match="lattice vector"):
        SOAP().values(batch_of(other))
    empty = batch_of(atoms)
    empty.positions, empty.numbers, empty.offsets = empty.positions[:0], empty.numbers[:0], np.array([0])
    empty.cells, empty.pbc, empty.fixed = empty.cells[:0], empty.pbc[:0], empty.fixed[:0]
    with pytest.raises(ConfigurationError, match="empty"):
        SOAP().values(empty)
    assert SOAP(species=["Ag"]).values(empty).shape[0] == 0
    assert _core.Soap(np.array([1], np.int32)).reach == pytest.approx(6.0 + 0.5 * sqrt(2 * log(1000)))


# ---- as dscribe's objects ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["off", "mean", "sum"])
def test_create_and_derivatives_have_the_shapes_of_dscribe(average):
    soap = SOAP(4.0, 3, 2, 1.0, species=["Cu", "Ag"], average=average)
    atoms = cluster()
    atoms.set_constraint(FixScaled(0))  # not one of ours: features have nothing to do with constraints
    m, features = len(atoms), soap.get_number_of_features()
    values, batch = soap.create(atoms), batch_of(atoms)
    assert np.array_equal(values, soap.values(batch) if average == "off" else soap.values(batch)[0])
    derivatives, again = soap.derivatives(atoms, attach=True)
    assert np.array_equal(values, again)
    assert derivatives.shape == (m if average == "off" else 1, m, 3, features)
    weights = np.random.default_rng(1).normal(size=soap.values(batch).shape)
    assert np.allclose(np.einsum("if,iaxf->ax", weights, derivatives), soap.contract(batch, weights))
    assert soap.create([atoms, atoms]).shape == (2, *values.shape)
    assert isinstance(soap.derivatives([atoms, atoms[:3]], attach=True, return_descriptor=False), list)


def test_what_dscribe_would_do_otherwise_is_an_error():
    with pytest.raises(ConfigurationError, match="attach=True"):
        SOAP().derivatives(cluster())
    with pytest.raises(ConfigurationError, match="give species"):
        SOAP().get_number_of_features()
    for senseless in ([], [1], "Au"):
        with pytest.raises(ConfigurationError, match="list of at least one"):
            SOAP().create(senseless)
