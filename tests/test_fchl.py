"""FCHL19 beyond what test_soap.py asks of every descriptor of atoms: qmllib's values, periodicity, lines, bad input."""

from __future__ import annotations

import re
from itertools import product
from math import pi
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from test_descriptors import batch_of, close, cluster, skewed, slab
from test_soap import numpy_fchl19
from thalweg import kernels
from thalweg.descriptors import FCHL19
from thalweg.errors import ConfigurationError

# Values of qmllib 1.2.0, made by data/make_fchl19_qmllib.py.
QMLLIB = Path(__file__).with_name("data") / "fchl19_qmllib.npz"
SETTINGS = {
    "published": FCHL19(),
    "other": FCHL19(6.0, 4.0, 10, 7, eta_pairs=0.5, eta_triplets=1.3, zeta=1.1, decay_pairs=2.5, decay_triplets=1.2,
                    weight_triplets=5.0),
    "fourier": FCHL19(5.0, 6.0, 6, 15, 3, zeta=0.3, eta_triplets=40.0),
}  # fmt: skip
# ours: theirs, as the table of docs/backend.md says
NAMES = {
    "cutoff_pairs": "rcut", "cutoff_triplets": "acut", "n_pairs": "nRs2", "n_triplets": "nRs3", "n_fourier": "nFourier",
    "eta_pairs": "eta2", "eta_triplets": "eta3", "zeta": "zeta", "decay_pairs": "two_body_decay",
    "decay_triplets": "three_body_decay", "weight_triplets": "three_body_weight",
}  # fmt: skip
SMALL = FCHL19(5.0, 4.0, 8, 8, 2, zeta=0.5)
pytestmark = pytest.mark.filterwarnings("error")


def qmllib_call(atoms: Atoms, settings: FCHL19, **more):
    from qmllib.representations import generate_fchl19

    elements = sorted({int(number) for number in atoms.numbers})
    theirs = {name: getattr(settings, ours) for ours, name in NAMES.items()}
    return generate_fchl19(atoms.numbers, atoms.positions, elements=elements, **theirs, **more)


def qmllib_values(atoms: Atoms, settings: FCHL19) -> np.ndarray:
    return qmllib_call(atoms, settings)


def qmllib_gradient(atoms: Atoms, settings: FCHL19) -> np.ndarray:
    """In our order: centre, atom, axis, feature."""
    return qmllib_call(atoms, settings, gradients=True)[1].transpose(0, 2, 3, 1)


@pytest.mark.parametrize("label", SETTINGS)
@pytest.mark.parametrize("name", ["H2O", "CH3CH2OH", "C2H2"])
def test_kept_values_of_qmllib(name, label):
    kept = np.load(QMLLIB)
    atoms = Atoms(kept[f"{name}_numbers"], kept[f"{name}_positions"])
    close(SETTINGS[label].values(batch_of(atoms)), kept[f"{name}_{label}"], 1e-12)


def test_kept_gradient_of_qmllib():
    kept = np.load(QMLLIB)
    atoms = Atoms(kept["H2O_numbers"], kept["H2O_positions"])
    close(FCHL19().jacobian(batch_of(atoms))[0], kept["H2O_gradient"], 1e-12)


def test_peer_qmllib():
    """The same numbers for the same settings, gradients too."""
    pytest.importorskip("qmllib", reason="qmllib is not installed: pip install qmllib")
    rng = np.random.default_rng(7)
    for name in ("H2O", "CH3CH2OH", "C6H6", "CH3NO2", "CO2", "SiH4"):
        atoms = molecule(name)
        atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
        for settings in SETTINGS.values():
            close(settings.values(batch_of(atoms)), qmllib_values(atoms, settings), 1e-12)
            if settings.n_fourier == 1:  # all that qmllib's gradient knows
                close(settings.jacobian(batch_of(atoms))[0], qmllib_gradient(atoms, settings), 1e-10)


# ---- periodicity -------------------------------------------------------------------------------------------------


def wire() -> Atoms:
    """Periodic along a slanted direction only."""
    atoms = Atoms("OTiO", [[0, 0, 0], [1.4, 0.9, 0.2], [0.5, -1.3, 1.1]], cell=[[2.6, 0.4, 0.5], [0, 9, 0], [0, 0, 9]])
    atoms.pbc = [True, False, False]
    return atoms


PERIODIC = {"slab": slab, "skewed": skewed, "wire": wire}


def cut_out(atoms: Atoms, reach: float) -> Atoms:
    """A cluster: the atoms of the cell first, then all images within reach of one of them."""
    cell = np.array(atoms.cell)
    ranges = [range(-8, 9) if periodic else (0,) for periodic in atoms.pbc]
    images = [shift for shift in product(*ranges) if any(shift)]
    positions = np.concatenate([atoms.positions + np.array(shift) @ cell for shift in images])
    numbers = np.tile(atoms.numbers, len(images))
    near = np.linalg.norm(positions[:, None] - atoms.positions, axis=-1).min(1) < reach
    return Atoms(np.concatenate([atoms.numbers, numbers[near]]), np.concatenate([atoms.positions, positions[near]]))


@pytest.mark.parametrize("name", PERIODIC)
def test_an_atom_of_a_crystal_sees_what_one_in_a_cut_out_cluster_sees(name):
    atoms = PERIODIC[name]()
    large = cut_out(atoms, 5.5)
    assert len(large) > 4 * len(atoms)
    close(SMALL.values(batch_of(large))[: len(atoms)], SMALL.values(batch_of(atoms)), 1e-12)
    # A moving atom takes its images along: each cluster atom's pull goes to the one that it is an image of.
    weights = np.zeros((len(large), SMALL.bind(atoms.numbers).size))
    weights[: len(atoms)] = np.random.default_rng(3).normal(size=(len(atoms), weights.shape[1]))
    shifts = (large.positions[:, None] - atoms.positions) @ np.linalg.inv(np.array(atoms.cell))
    image_of = np.argmin(np.abs(shifts - np.rint(shifts)).max(-1), axis=1)
    folded = np.zeros((len(atoms), 3))
    np.add.at(folded, image_of, SMALL.contract(batch_of(large), weights))
    close(SMALL.contract(batch_of(atoms), weights[: len(atoms)]), folded, 1e-11)


@pytest.mark.parametrize("name", ["slab", "wire"])
def test_strain_of_partly_periodic_cells(name):
    atoms = PERIODIC[name]()
    reference = SMALL.values(batch_of(atoms))
    open_directions = [k for k in range(3) if not atoms.pbc[k]]
    for k in open_directions:  # lattice vectors of open directions mean nothing, whatever they are
        for vector in ([0.1, 0.2, 0.3], np.zeros(3)):
            other = atoms.copy()
            other.cell[k] = vector
            close(SMALL.values(batch_of(other)), reference, 1e-13)
    strained = atoms.copy()
    strain = np.eye(3) + np.array([[0.04, 0.01, 0.0], [0.03, -0.02, 0.02], [0.0, 0.01, 0.05]])
    strained.set_cell(np.array(atoms.cell) @ strain, scale_atoms=False)
    strained.positions = atoms.positions @ strain
    values = SMALL.values(batch_of(strained))
    assert np.abs(values - reference).max() > 1e-3 * np.abs(reference).max()
    close(values, numpy_fchl19(strained, SMALL), 1e-12)
    close(values, SMALL.values(batch_of(cut_out(strained, 5.5)))[: len(atoms)], 1e-12)


def test_like_atoms_may_change_places():
    atoms = cluster()
    order = np.arange(len(atoms))
    order[[2, 3]] = 3, 2  # both Cu
    changed = atoms[order]
    assert np.array_equal(changed.numbers, atoms.numbers)
    close(SMALL.values(batch_of(changed)), SMALL.values(batch_of(atoms))[order], 1e-13)


# ---- lines, cutoffs, lonely atoms --------------------------------------------------------------------------------


def test_an_isolated_atom_has_no_features():
    for atoms in (Atoms("O"), Atoms("O2", [[0, 0, 0], [0, 0, 8.5]]), Atoms("O", cell=[9, 9, 9], pbc=True)):
        batch = batch_of(atoms)
        assert np.array_equal(FCHL19().values(batch), np.zeros((len(atoms), 64)))
        assert np.array_equal(FCHL19().contract(batch, np.ones((len(atoms), 64))), np.zeros((len(atoms), 3)))
        assert not np.any(FCHL19().jacobian(batch)[0])
    alone = Atoms("O", cell=[2.5, 9, 9], pbc=True)  # its own images are neighbours, and do not pull
    assert np.abs(FCHL19().values(batch_of(alone))).max() > 0.1
    assert not np.any(FCHL19().contract(batch_of(alone), np.ones((1, 64))))
    assert not np.any(FCHL19().jacobian(batch_of(alone))[0])


def test_atoms_on_a_line_pull_as_the_mean_over_all_sides_says():
    """The sine has a cone there: from any side the central difference vanishes, and so does the derivative."""
    atoms = molecule("CO2")
    batch = batch_of(atoms)
    jacobian, step = SMALL.jacobian(batch)[0], 1e-4
    assert np.isfinite(jacobian).all()
    weights = np.random.default_rng(1).normal(size=SMALL.values(batch).shape)
    close(SMALL.contract(batch, weights), np.einsum("iakf,if->ak", jacobian, weights), 1e-13)
    largest = np.abs(jacobian).max()
    across = [axis for axis in range(3) if np.ptp(atoms.positions[:, axis]) < 1e-12]
    for atom, axis in product(range(3), range(3)):
        ahead, behind = atoms.copy(), atoms.copy()
        ahead.positions[atom, axis] += step
        behind.positions[atom, axis] -= step
        ahead, behind = SMALL.values(batch_of(ahead)), SMALL.values(batch_of(behind))
        assert np.abs((ahead - behind) / (2 * step) - jacobian[:, atom, axis]).max() < 1e-5 * largest
        if axis in across:
            assert np.abs((ahead - SMALL.values(batch)) / step).max() > 1e-3 * largest  # the cone
            assert np.abs(jacobian[:, atom, axis]).max() < 1e-9 * largest


def test_an_ideal_crystal_has_no_forces():
    """Every atom is a centre of inversion: lines everywhere."""
    crystal = bulk("NiAl", "cesiumchloride", a=2.9)
    weights = np.random.default_rng(1).normal(size=(2, SMALL.bind([13, 28]).size))
    several = crystal * (2, 1, 1)
    scale = np.abs(SMALL.contract(batch_of(skewed()), np.ones((3, weights.shape[1])))).max()
    assert np.abs(SMALL.contract(batch_of(crystal), weights)).max() < 1e-9 * scale
    close(SMALL.values(batch_of(several)), np.tile(SMALL.values(batch_of(crystal)), (2, 1)), 1e-12)
    assert np.abs(SMALL.contract(batch_of(several), np.tile(weights, (2, 1)))).max() < 1e-9 * scale


def test_forces_have_no_jump_at_the_cutoffs():
    """A third atom leaves both cutoffs of an Au2, 4 and 5 angstrom."""
    path = [Atoms("Au3", [[0, 0, 0], [0.2, 0.1, 2.4], [0.3, 0.4, z]]) for z in np.arange(3.5, 8.0, 1e-3)]
    batch = batch_of(*path)
    weights = np.ones((len(batch.numbers), SMALL.bind(batch.numbers).size))
    values = SMALL.values(batch).reshape(len(path), 3, -1)
    pulls = SMALL.contract(batch, weights).reshape(len(path), 3, 3)
    assert np.abs(np.diff(values, axis=0)).max() < 1e-2 * np.abs(values).max()
    assert np.abs(np.diff(pulls, axis=0)).max() < 1e-2 * np.abs(pulls).max()
    assert np.ptp(values[:, 2]) > 0.1


# ---- interface ---------------------------------------------------------------------------------------------------


def test_species_fix_the_features():
    assert FCHL19(species=["O", 22]) == FCHL19(species=(22, 8))
    assert FCHL19(species=("Ti", "O")).bind() is FCHL19(species=("O", "Ti")).bind([6])
    assert FCHL19(species=("Ti", "O")).get_number_of_features() == 2 * 24 + 3 * 40
    # those of a species that is not there are zero, the others as they are without it
    atoms = molecule("H2O")
    two, three = FCHL19(), FCHL19(species=["H", "C", "O"])
    kept = [*range(24), *range(48, 72)]
    kept += [72 + 40 * block + f for block in (0, 2, 5) for f in range(40)]  # HH, HO, OO of HH HC HO CC CO OO
    values = three.values(batch_of(atoms))
    assert np.array_equal(values[:, kept], two.values(batch_of(atoms)))
    assert not np.any(np.delete(values, kept, axis=1))


def test_create_and_derivatives_take_atoms():
    fchl, atoms = FCHL19(4.0, 3.5, species=["Cu", "Ag"]), cluster()
    values = fchl.create(atoms)
    derivatives, again = fchl.derivatives(atoms)
    m, size = len(atoms), fchl.get_number_of_features()
    assert values.shape == (m, size) and derivatives.shape == (m, m, 3, size)
    assert np.array_equal(values, again) and np.array_equal(values, fchl.values(batch_of(atoms)))
    assert np.array_equal(derivatives, fchl.jacobian(batch_of(atoms))[0])
    assert fchl.create([atoms, atoms]).shape == (2, m, size)
    assert isinstance(fchl.derivatives([atoms, atoms[:3]], return_descriptor=False), list)
    with pytest.raises(ConfigurationError, match="give species"):
        FCHL19().get_number_of_features()
    with pytest.raises(ConfigurationError, match="list of at least one"):
        FCHL19().create("Au")


@pytest.mark.parametrize("settings, words", [
    ({"cutoff_pairs": 0.0}, "cutoff_pairs must be above 0"), ({"cutoff_triplets": np.nan}, "cutoff_triplets"),
    ({"cutoff_triplets": 100.0}, "below 100 angstrom"),
    ({"n_pairs": 0}, "n_pairs must be 1 to 128"), ({"n_triplets": 129}, "n_triplets"), ({"n_fourier": 9}, "n_fourier"),
    ({"eta_pairs": 0.0}, "eta_pairs"), ({"eta_triplets": -1.0}, "eta_triplets"), ({"zeta": -1.0}, "zeta"),
    ({"decay_pairs": -0.1}, "decay_pairs"), ({"decay_triplets": 30.0}, "decay_triplets"),
    ({"weight_triplets": np.inf}, "weight_triplets"),
])  # fmt: skip
def test_senseless_settings(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        FCHL19(**settings).values(batch_of(cluster()))


def test_bad_input():
    atoms, other = cluster(), cluster()
    with pytest.raises(ConfigurationError, match=r"made for Ag.*atomic number 29"):
        FCHL19(species=["Ag"]).values(batch_of(atoms))
    with pytest.raises(ConfigurationError, match="Did you mean 'Ag'"):
        FCHL19(species=["ag"])
    with pytest.raises(ConfigurationError, match="weights must have shape"):
        FCHL19().contract(batch_of(atoms), np.zeros((2, 5)))
    with pytest.raises(ConfigurationError, match="threads"):
        FCHL19().values(batch_of(atoms), threads=-1)
    with pytest.raises(ConfigurationError, match="device must be 'cpu' or 'cuda'"):
        FCHL19().values(batch_of(atoms), device="tpu")
    with pytest.raises(ConfigurationError, match=re.escape("FCHL19 has no ['rcut']; its settings are ['cutoff_pairs'")):
        kernels.fchl19(atoms.positions, atoms.numbers, np.array(atoms.cell), False, rcut=6.0)
    for bad, words in ((np.nan, "finite"), (np.inf, "finite")):
        other.positions[1, 2] = bad
        with pytest.raises(ConfigurationError, match=rf"structure 1 of the batch.*{words}"):
            FCHL19().values(batch_of(atoms, other))
    other.positions[1] = other.positions[0]
    for ask in (FCHL19().values, FCHL19().jacobian, lambda b: FCHL19().contract(b, np.zeros((4, 168)))):
        with pytest.raises(ConfigurationError, match="atoms 0 and 1 lie on one point"):
            ask(batch_of(other))
    other = cluster()
    other.pbc, other.cell = True, np.zeros((3, 3))
    with pytest.raises(ConfigurationError, match="lattice vector"):
        FCHL19().values(batch_of(other))
    assert FCHL19().zeta == pi
