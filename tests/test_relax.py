"""Batched relaxation: minima of ASE, laws of walls and fixed atoms, independence of batch, errors."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.cluster import Icosahedron
from ase.optimize import BFGS
from thalweg import _core
from thalweg.errors import ConfigurationError

CUBE = (np.zeros(3), 7.0 * np.eye(3), np.zeros(3, dtype=bool))


def pack(positions, numbers, *, edge=40.0, fixed=None):
    """n structures of the same atoms; positions (n, atoms, 3)."""
    n, atoms = positions.shape[:2]
    fixed = np.zeros((atoms, 3), dtype=bool) if fixed is None else fixed
    return SimpleNamespace(
        positions=positions.reshape(-1, 3),
        numbers=np.tile(numbers, n),
        offsets=np.arange(n + 1) * atoms,
        cells=np.tile(edge * np.eye(3), (n, 1, 1)),
        pbc=np.zeros((n, 3), dtype=bool),
        fixed=np.tile(fixed, (n, 1)),
    )


def random_clusters(numbers, count, *, edge, scale=1.0, seed=1):
    none = np.zeros((0, 3)), np.zeros(0, dtype=np.int32)
    box = (np.zeros(3), edge / scale * np.eye(3), np.zeros(3, dtype=bool))
    positions, ok = _core.random_structures(
        numbers, 40 * np.eye(3), np.zeros(3, dtype=bool), *none, box=box, count=count, key=(seed, 2)
    )
    assert ok.all()
    return positions * scale


def au4ni4(count, seed=1):
    numbers = np.array([79] * 4 + [28] * 4)
    return random_clusters(numbers, count, edge=7.0, seed=seed), numbers


def largest_force(forces):
    return np.linalg.norm(forces.reshape(-1, 3), axis=1).max()


def test_lj13_reaches_the_published_minimum():
    argon = np.full(13, 18)
    starts = random_clusters(argon, 60, edge=6.0, scale=1.12 / 2.12)
    potential = _core.LennardJones(1.0, 1.0, rc=50.0)
    _, energies, forces, evaluations, converged = _core.relax(
        potential, pack(starts, argon), steps=1000, force_tolerance=1e-4
    )
    assert converged.all() and largest_force(forces) < 1e-4
    # Cambridge Cluster Database; ASE's shift of the energy at rc = 50 is 6e-8 in all
    assert abs(energies.min() - -44.326801) < 2e-6
    assert evaluations.mean() < 200  # 126 when written
    icosahedron = Icosahedron("Ar", 2)
    start = icosahedron.positions * (1.12 / icosahedron.get_all_distances()[0, 1:].min())
    _, energy, *_ = _core.relax(potential, pack(start[None], argon), steps=200, force_tolerance=1e-6)
    assert abs(energy[0] - -44.326801) < 2e-6


def test_emt_minima_are_those_of_ase():
    starts, numbers = au4ni4(30)
    positions, energies, forces, evaluations, converged = _core.relax(
        _core.Emt(), pack(starts, numbers), steps=500, force_tolerance=0.005
    )
    assert converged.all() and largest_force(forces) < 0.005
    assert evaluations.mean() < 110  # 60 when written
    for x, energy in list(zip(positions.reshape(30, 8, 3), energies, strict=True))[:4]:
        atoms = Atoms(numbers, x, cell=[40] * 3)
        atoms.calc = EMT()
        assert abs(atoms.get_potential_energy() - energy) < 1e-9
        BFGS(atoms, logfile=None).run(fmax=5e-4, steps=200)
        assert 0 <= energy - atoms.get_potential_energy() < 5e-4
        assert np.abs(atoms.positions - x).max() < 0.05


def test_needs_no_more_evaluations_than_ase():
    starts, numbers = au4ni4(8, seed=4)
    *_, evaluations, converged = _core.relax(_core.Emt(), pack(starts, numbers), steps=500)
    assert converged.all()
    theirs = []
    for x in starts:
        atoms = Atoms(numbers, x, cell=[40] * 3)
        atoms.calc = EMT()
        optimiser = BFGS(atoms, logfile=None, maxstep=0.2)
        optimiser.run(fmax=0.05, steps=500)
        theirs.append(optimiser.get_number_of_steps() + 1)
    assert evaluations.mean() < np.mean(theirs)  # 45 against 85 over 60 starts


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_for_any_batch_and_thread_count(threads):
    starts, numbers = au4ni4(20)
    options = {"steps": 40, "box": CUBE}
    alone = [_core.relax(_core.Emt(), pack(x[None], numbers), threads=1, **options) for x in starts]
    together = _core.relax(_core.Emt(), pack(starts, numbers), threads=threads, **options)
    for k, array in enumerate(together):
        assert np.array_equal(np.concatenate([one[k] for one in alone]), array)


def test_minimiser_walks_the_same_path():
    starts, numbers = au4ni4(3)
    fixed = np.zeros((8, 3), dtype=bool)
    fixed[0] = True
    fixed[1, 2] = True
    batch = pack(starts, numbers, fixed=fixed)
    positions, energies, forces, evaluations, converged = _core.relax(_core.Emt(), batch, steps=60, box=CUBE)
    for row, start in enumerate(starts):
        minimiser = _core.Minimiser(start, fixed, steps=60, box=CUBE)
        calls = 0
        while not minimiser.done:
            one = pack(minimiser.positions[None], numbers)
            energy, force = _core.evaluate(_core.Emt(), one)
            minimiser.tell(energy[0], force)
            calls += 1
        assert calls == minimiser.evaluations == evaluations[row]
        assert minimiser.converged == converged[row]
        assert minimiser.best_energy == energies[row]
        assert np.array_equal(minimiser.best_positions, positions.reshape(3, 8, 3)[row])
        moving = ~fixed.all(axis=1)
        assert np.array_equal(minimiser.best_forces[moving], forces.reshape(3, 8, 3)[row][moving])


def test_fixed_coordinates_stay_and_do_not_count():
    starts, numbers = au4ni4(10)
    fixed = np.zeros((8, 3), dtype=bool)
    fixed[2] = True
    fixed[5, :2] = True
    positions, _, forces, _, converged = _core.relax(
        _core.Emt(), pack(starts, numbers, fixed=fixed), steps=300, force_tolerance=0.02
    )
    assert converged.all()
    moved = positions.reshape(10, 8, 3)
    assert np.array_equal(moved[:, fixed], starts[:, fixed])
    assert not np.allclose(moved[:, ~fixed], starts[:, ~fixed])
    assert largest_force(np.where(fixed, 0, forces.reshape(10, 8, 3))) < 0.02
    assert largest_force(forces) > 0.02


def test_box_is_kept_and_its_push_does_not_count():
    starts, numbers = au4ni4(12)
    vectors = np.array([[2.0, 0.0, 0.0], [0.8, 2.2, 0.0], [-0.5, 0.6, 7.0]])
    fractions = (starts - starts.mean(axis=(1, 2), keepdims=True)) / 14 + 0.5
    batch = pack(fractions @ vectors + 1.0, numbers)
    positions, _, forces, _, converged = _core.relax(
        _core.Emt(),
        batch,
        steps=600,
        force_tolerance=0.05,
        box=(np.ones(3), vectors, np.zeros(3, dtype=bool)),
    )
    coordinates = (positions - 1.0) @ np.linalg.inv(vectors)
    assert coordinates.min() > -1e-9 and coordinates.max() < 1 + 1e-9
    assert converged.all()
    assert largest_force(forces) > 0.5  # squeezed: walls carry true forces
    free = np.all((coordinates > 1e-9) & (coordinates < 1 - 1e-9), axis=1) & np.repeat(converged, 8)
    assert np.linalg.norm(forces[free], axis=1).max(initial=0) < 0.05
    assert free.any() and not free.all()


def test_energies_that_are_not_finite_are_survived():
    def bowl(x):
        return (np.nan if np.abs(x).max() > 1 else 50 * (x**2).sum() - 60 * x.sum()), 60 - 100 * x

    minimiser = _core.Minimiser(
        np.zeros((2, 3)), np.zeros((2, 3), dtype=bool), first_curvature=10, max_step=5, force_tolerance=1e-6
    )
    while not minimiser.done:
        minimiser.tell(*bowl(minimiser.positions))
    assert minimiser.converged and np.abs(minimiser.best_positions - 0.6).max() < 1e-7


def test_bad_input_is_named():
    starts, numbers = au4ni4(1)
    batch = pack(starts, numbers)
    with pytest.raises(ConfigurationError, match="force_tolerance above 0"):
        _core.relax(_core.Emt(), batch, force_tolerance=0)
    with pytest.raises(ConfigurationError, match="span a volume"):
        _core.relax(_core.Emt(), batch, box=(np.zeros(3), np.ones((3, 3)), np.zeros(3)))
    with pytest.raises(ConfigurationError, match=r"box must be None or \(corner"):
        _core.relax(_core.Emt(), batch, box=5.0)
    with pytest.raises(ConfigurationError, match=r"vectors of box must have shape \(3, 3\)"):
        _core.relax(_core.Emt(), batch, box=(np.zeros(3), np.ones(3), np.zeros(3)))
    with pytest.raises(ConfigurationError, match=r"fixed must have shape \(8, 3\)"):
        _core.Minimiser(starts[0], np.zeros((7, 3), dtype=bool))
    with pytest.raises(ConfigurationError, match=r"forces must have shape \(8, 3\)"):
        _core.Minimiser(starts[0], np.zeros((8, 3), dtype=bool)).tell(0.0, np.zeros((2, 3)))
