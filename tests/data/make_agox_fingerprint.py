"""Writes agox_fingerprint.npz: structures and AGOX's fingerprint of them.

Needs AGOX (3.11.1 was used) in an environment of its own:
    pip install agox "ase==3.27.0" "numpy<2.4"
    python tests/data/make_agox_fingerprint.py
"""

from pathlib import Path

import numpy as np
from agox.environments import Environment
from agox.models.descriptors import Fingerprint
from ase import Atoms
from ase.build import fcc111, molecule


def cluster(rng):
    """Au4Ni4 in a cube of 12 angstrom: a distorted pair of tetrahedra, no two atoms closer than 1.9."""
    while True:
        positions = rng.uniform(3.5, 8.5, (8, 3))
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)[np.triu_indices(8, 1)]
        if distances.min() > 1.9:
            return Atoms("Au4Ni4", positions=positions, cell=[12.0] * 3, pbc=False)


def aniline(rng):
    """C6H7N: benzene with one hydrogen replaced by an amine, rattled."""
    atoms = molecule("C6H6")
    hydrogen = 6
    direction = atoms.positions[hydrogen] / np.linalg.norm(atoms.positions[hydrogen])
    atoms.numbers[hydrogen] = 7
    atoms.positions[hydrogen] = 2.8 * direction
    side = np.cross(direction, [0.0, 0.0, 1.0])
    for sign in (-1, 1):
        atoms += Atoms("H", [atoms.positions[hydrogen] + 0.5 * direction + sign * 0.85 * side])
    atoms.positions += rng.normal(0.0, 0.05, atoms.positions.shape)
    atoms.cell = [14.0, 13.0, 10.0]
    atoms.center()
    return atoms


def crystal(rng):
    """Ti8O16 in an orthogonal periodic cell, far from any ideal structure."""
    grid = np.array([(x, y, z) for x in range(2) for y in range(3) for z in range(4)])
    cell = np.array([4.6, 6.1, 8.4])
    positions = (grid + 0.5) / [2, 3, 4] * cell + rng.normal(0.0, 0.15, (24, 3))
    numbers = np.array([22] * 8 + [8] * 16)[rng.permutation(24)]
    return Atoms(numbers, positions=positions, cell=cell, pbc=True)


def slab(rng):
    """Au60 in three layers with Ni6 on top, orthogonal cell, periodic in the plane."""
    atoms = fcc111("Au", (5, 4, 3), a=2.88 * np.sqrt(2), orthogonal=True)
    width = atoms.cell.lengths()
    top = atoms.positions[:, 2].max() + 2.2
    for x, y in ((0.1, 0.1), (0.45, 0.15), (0.8, 0.1), (0.2, 0.6), (0.55, 0.65), (0.85, 0.55)):
        atoms += Atoms("Ni", [[x * width[0], y * width[1], top]])
    atoms.positions += rng.normal(0.0, 0.08, atoms.positions.shape)
    atoms.positions[:, 2] += 2.0 - atoms.positions[:, 2].min()
    atoms.cell[2] = [0.0, 0.0, 20.0]
    atoms.pbc = [True, True, False]
    return atoms


def main():
    rng = np.random.default_rng(7)
    arrays = {}
    for make in (cluster, aniline, crystal, slab):
        atoms = make(rng)
        template = Atoms(cell=atoms.cell, pbc=atoms.pbc)
        environment = Environment(
            template=template,
            symbols=atoms.get_chemical_formula(),
            print_report=False,
            confinement_cell=atoms.cell,
        )
        features = Fingerprint(environment=environment).create_features(atoms)[0]
        name = make.__name__
        arrays |= {
            f"{name}_positions": atoms.positions,
            f"{name}_numbers": atoms.numbers.astype(np.int32),
            f"{name}_cell": np.asarray(atoms.cell),
            f"{name}_pbc": atoms.pbc,
            f"{name}_features": features,
        }
        print(name, len(atoms), atoms.get_chemical_formula(), features.shape, features.max())
    np.savez_compressed(Path(__file__).with_name("agox_fingerprint.npz"), **arrays)


if __name__ == "__main__":
    main()
