"""Building structures: windows, walls, statistics, streams, and distances against ASE."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.data import covalent_radii
from ase.geometry import get_distances
from scipy.sparse.csgraph import connected_components
from thalweg import _core
from thalweg.errors import ConfigurationError

AU4NI4 = np.array([79] * 4 + [28] * 4)
NO_TEMPLATE = np.zeros((0, 3)), np.zeros(0, dtype=np.int32)
NO_PBC = np.zeros(3, dtype=bool)
KEY = (3, 4)


def cube(edge):
    return np.zeros(3), edge * np.eye(3), NO_PBC


def pack(structures, fixed=None):
    sizes = [len(a) for a in structures]
    return SimpleNamespace(
        positions=np.concatenate([a.positions for a in structures]),
        numbers=np.concatenate([a.numbers for a in structures]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        cells=np.array([np.asarray(a.cell) for a in structures]),
        pbc=np.array([a.pbc for a in structures]),
        fixed=np.zeros((sum(sizes), 3), dtype=bool) if fixed is None else fixed,
    )


def ratios(atoms):
    """Closest distances over sums of covalent radii (n, n) by ASE, infinite on the diagonal."""
    _, distances = get_distances(atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    radii = covalent_radii[atoms.numbers]
    return distances / (radii[:, None] + radii) + np.diag(np.full(len(atoms), np.inf))


@pytest.fixture(scope="module")
def slab():
    return fcc111("Au", (3, 3, 2), a=4.08, vacuum=8.0)  # hexagonal cell, 18 atoms


def on_slab(slab, count=60, **options):
    top = slab.positions[:, 2].max()
    box = (
        np.array([0, 0, top + 1.0]),
        np.array([slab.cell[0], slab.cell[1], [0, 0, 5.0]]),
        np.array([True, True, False]),
    )
    positions, ok = _core.random_structures(
        np.full(5, 28), np.asarray(slab.cell), [True, True, False], slab.positions, slab.numbers,
        box=box, count=count, key=KEY, **options,
    )  # fmt: skip
    numbers = np.concatenate([slab.numbers, np.full(5, 28)])
    return positions, ok, numbers, box


def test_random_clusters_respect_window_and_walls():
    positions, ok = _core.random_structures(
        AU4NI4, 12 * np.eye(3), NO_PBC, *NO_TEMPLATE, box=cube(6), count=100, key=KEY
    )
    assert ok.all() and positions.shape == (100, 8, 3)
    assert positions.min() > -1e-9 and positions.max() < 6 + 1e-9
    for x in positions:
        nearest = ratios(Atoms(AU4NI4, x)).min(axis=1)
        assert nearest.min() >= 0.75 - 1e-12 and nearest.max() <= 1.25 + 1e-12


def test_random_atoms_on_a_slab(slab):
    positions, ok, numbers, box = on_slab(slab)
    assert ok.all()
    assert np.array_equal(positions[:, :18], np.broadcast_to(slab.positions, (60, 18, 3)))
    heights = positions[:, 18:, 2]
    assert heights.min() > box[0][2] - 1e-9 and heights.max() < box[0][2] + 5 + 1e-9
    for x in positions:
        nearest = ratios(Atoms(numbers, x, cell=slab.cell, pbc=[True, True, False]))[18:].min(axis=1)
        assert nearest.min() >= 0.75 - 1e-9 and nearest.max() <= 1.25 + 1e-9
    # Every part of the surface is used: the first nickel atoms lie in all four quarters of the cell.
    coordinates = positions[:, 18, :2] @ np.linalg.inv(np.asarray(slab.cell)[:2, :2]) % 1
    quarters = np.bincount((coordinates > 0.5) @ [1, 2], minlength=4)
    assert quarters.min() >= 5


def test_statistics_of_dimers():
    n = 20000
    wide = (-500 * np.ones(3), 1000 * np.eye(3), NO_PBC)
    positions, _ = _core.random_structures([79, 28], 12 * np.eye(3), NO_PBC, *NO_TEMPLATE, box=wide, count=n, key=KEY)
    d = positions[:, 1] - positions[:, 0]
    r = np.linalg.norm(d, axis=1)
    direction = d / r[:, None]
    assert np.abs((direction**2).mean(axis=0) - 1 / 3).max() < 0.012  # five standard deviations
    assert np.abs(direction.mean(axis=0)).max() < 0.022
    low, high = (np.array([0.75, 1.25]) * (covalent_radii[79] + covalent_radii[28])) ** 3
    u = (r**3 - low) / (high - low)
    assert u.min() > -1e-9 and u.max() < 1 + 1e-9
    assert abs(u.mean() - 0.5) < 0.011 and abs(u.var() - 1 / 12) < 0.004


def test_rows_are_streams_of_their_own(slab):
    whole = on_slab(slab, count=60, threads=1)[0]
    assert np.array_equal(whole, on_slab(slab, count=60, threads=3)[0])
    assert np.array_equal(whole[:7], on_slab(slab, count=7)[0])
    assert np.array_equal(whole[25:40], on_slab(slab, count=15, first_row=25)[0])
    _, _, numbers, box = on_slab(slab, count=1)
    parents = [Atoms(numbers, x, cell=slab.cell, pbc=[True, True, False]) for x in whole]
    for move in (
        lambda some, **o: _core.rattle(pack(some), box=box, key=KEY, **o)[0],
        lambda some, **o: _core.permute(pack(some), key=KEY, **o)[0],
    ):
        moved = move(parents, threads=1)
        assert not np.array_equal(moved, whole.reshape(-1, 3))
        assert np.array_equal(moved, move(parents, threads=2))
        assert np.array_equal(moved[-10 * 23 :], move(parents[-10:], first_row=50))


def test_rattle_leaves_fixed_atoms_and_keeps_the_window(slab):
    positions, _, numbers, box = on_slab(slab)
    parents = [Atoms(numbers, x, cell=slab.cell, pbc=[True, True, False]) for x in positions]
    fixed = np.tile(np.repeat([True, False], [18, 5])[:, None], (60, 3))
    moved, ok = _core.rattle(pack(parents, fixed), box=box, amplitude=2.5, moved=2.0, key=KEY)
    assert ok.all()
    moved = moved.reshape(60, 23, 3)
    assert np.array_equal(moved[:, :18], positions[:, :18])
    for x, before in zip(moved, positions, strict=True):
        changed = np.any(x != before, axis=1)
        assert changed.any()
        nearest = ratios(Atoms(numbers, x, cell=slab.cell, pbc=[True, True, False])).min(axis=1)[changed]
        assert nearest.min() >= 0.75 - 1e-9 and nearest.max() <= 1.25 + 1e-9
        assert (x[changed, 2] > box[0][2] - 1e-9).all() and (x[changed, 2] < box[0][2] + 5 + 1e-9).all()


def test_permute_keeps_the_set_of_sites():
    positions, _ = _core.random_structures(
        AU4NI4, 12 * np.eye(3), NO_PBC, *NO_TEMPLATE, box=cube(6), count=200, key=KEY
    )
    parents = [Atoms(AU4NI4, x, cell=[12] * 3) for x in positions]
    swapped, ok = _core.permute(pack(parents), again=0.3, key=KEY)
    assert ok.all()
    for x, before in zip(swapped.reshape(200, 8, 3), positions, strict=True):
        assert {tuple(p) for p in x} == {tuple(p) for p in before}
        assert {tuple(p) for p in x[:4]} != {tuple(p) for p in before[:4]}
    _, ok = _core.permute(pack([Atoms("Au3", positions[0][:3])]), key=KEY)
    assert not ok[0]


def test_contacts_and_fragments_match_ase_in_skewed_cells():
    rng = np.random.default_rng(7)
    structures = []
    for pbc in ([True] * 3, [True, True, False], [False, True, False], [False] * 3) * 6:
        cell = 6 * np.eye(3) + rng.uniform(-4, 4, (3, 3))
        if abs(np.linalg.det(cell)) < 60:
            cell = 6 * np.eye(3)
        cell[1] += rng.integers(-2, 3) * cell[0] * (pbc[0] and pbc[1])
        structures.append(Atoms(rng.choice([6, 28, 79], 7), rng.uniform(-3, 9, (7, 3)), cell=cell, pbc=pbc))
    contacts, pieces = _core.closest_contacts(pack(structures)), _core.fragments(pack(structures), 1.1)
    for atoms, contact, piece in zip(structures, contacts, pieces, strict=True):
        ratio = ratios(atoms)
        grid = np.array(np.meshgrid(*[range(-8, 9) if p else [0] for p in atoms.pbc])).reshape(3, -1).T
        shifts = np.linalg.norm(grid @ np.asarray(atoms.cell), axis=1)
        own = min(shifts[shifts > 0], default=np.inf) / (2 * covalent_radii[atoms.numbers].max())
        assert contact == pytest.approx(min(ratio.min(), own), rel=1e-10)
        assert piece == connected_components(ratio <= 1.1)[0]
    assert len(set(pieces)) > 2


def test_bad_input_is_named(slab):
    place = _core.random_structures
    large = 12 * np.eye(3)
    with pytest.raises(ConfigurationError, match="needs a box"):
        place(AU4NI4, large, NO_PBC, *NO_TEMPLATE, box=None, count=1, key=KEY)
    with pytest.raises(ConfigurationError, match="box is too small: 8 atoms"):
        place(AU4NI4, large, NO_PBC, *NO_TEMPLATE, box=cube(0.5), count=1, key=KEY)
    with pytest.raises(ConfigurationError, match=r"atoms 0 \(Au\) and 1 \(Ni\) are 0.500 angstrom apart"):
        place(AU4NI4, large, NO_PBC, [[0, 0, 0], [0.5, 0, 0]], [79, 28], box=cube(6), count=1, key=KEY)
    with pytest.raises(ConfigurationError, match=r"atoms 0 \(Au\) and 1 \(Ni\) are 0.500 angstrom apart"):
        place(AU4NI4, large, [1, 0, 0], [[0, 0, 0], [11.5, 0, 0]], [79, 28], box=cube(6), count=1, key=KEY)
    with pytest.raises(ConfigurationError, match="key must be two"):
        place(AU4NI4, large, NO_PBC, *NO_TEMPLATE, box=cube(6), count=1, key=5)
    with pytest.raises(ConfigurationError, match=r"template_positions must have shape \(18, 3\)"):
        place(AU4NI4, large, NO_PBC, slab.positions[:4], slab.numbers, box=cube(6), count=1, key=KEY)
    with pytest.raises(ConfigurationError, match="atomic number 0"):
        place([0], large, NO_PBC, *NO_TEMPLATE, box=cube(6), count=1, key=KEY)
    crowded, ok = place(np.full(8, 79), large, NO_PBC, *NO_TEMPLATE, box=cube(2.6), count=5, key=KEY, tries_per_atom=3)
    assert not ok.any() and np.isfinite(crowded).all()  # rows that fail are rows
