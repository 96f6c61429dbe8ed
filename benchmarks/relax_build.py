"""Relaxation and building: evaluations against ASE's optimisers, cost per step, structures per second.

    python benchmarks/relax_build.py [--quick]

One thread; rates are the best of five. The potentials are thalweg's own, so both sides see the same surface.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import numpy as np
from ase import Atoms
from ase.build import fcc111
from ase.calculators.calculator import Calculator, all_changes
from ase.optimize import BFGS, LBFGS, BFGSLineSearch
from thalweg import _core

NONE = np.zeros(3, dtype=bool)
NO_TEMPLATE = np.zeros((0, 3)), np.zeros(0, dtype=np.int32)
AU4NI4 = np.array([79] * 4 + [28] * 4)
KEY = (5, 6)


class Counted(Calculator):
    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, landscape):
        super().__init__()
        self.landscape, self.calls = landscape, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        energies, forces = _core.evaluate(self.landscape, pack(atoms.positions[None], atoms.numbers), threads=1)
        self.results = {"energy": energies[0], "forces": forces}


def pack(positions, numbers, *, cell=None, pbc=NONE, fixed=None):
    n, atoms = positions.shape[:2]
    return SimpleNamespace(
        positions=np.ascontiguousarray(positions).reshape(-1, 3),
        numbers=np.tile(numbers, n),
        offsets=np.arange(n + 1) * atoms,
        cells=np.tile(40 * np.eye(3) if cell is None else cell, (n, 1, 1)),
        pbc=np.tile(pbc, (n, 1)),
        fixed=np.tile(np.zeros((atoms, 3), dtype=bool) if fixed is None else fixed, (n, 1)),
    )


def cube(edge):
    return np.zeros(3), edge * np.eye(3), NONE


def clusters(numbers, count, edge):
    box = cube(edge)
    return _core.random_structures(
        numbers, 40 * np.eye(3), NONE, *NO_TEMPLATE, box=box, count=count, key=KEY, threads=1
    )


def best_seconds(call):
    seconds = []
    for _ in range(5):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def evaluations(quick):
    lennard_jones = _core.LennardJones(1.0, 1.0, rc=20.0)
    argon = 1.12 / 2.12  # scales bonds of argon's covalent radius to the minimum of the pair potential
    for name, numbers, scale, landscape, edge, tolerance, count in (
        ("LJ13", np.full(13, 18), argon, lennard_jones, 6 / argon, 0.01, 60),
        ("LJ38", np.full(38, 18), argon, lennard_jones, 9 / argon, 0.01, 16),
        ("Au4Ni4, EMT", AU4NI4, 1.0, _core.Emt(), 7, 0.05, 60),
    ):
        starts = clusters(numbers, count // 4 if quick else count, edge)[0] * scale
        options = {"steps": 1000, "force_tolerance": tolerance, "threads": 1}
        _, energies, _, calls, converged = _core.relax(landscape, pack(starts, numbers), **options)
        rows = [("thalweg", calls, energies, converged)]
        for optimiser in (LBFGS, BFGS, BFGSLineSearch):
            results = []
            for start in starts:
                atoms = Atoms(numbers, start, cell=[40] * 3)
                atoms.calc = Counted(landscape)
                done = optimiser(atoms, logfile=None, maxstep=0.2).run(fmax=tolerance, steps=1000)
                results.append((atoms.calc.calls, atoms.get_potential_energy(), done))
            rows.append((f"ase {optimiser.__name__}", *np.array(results, dtype=float).T))
        for who, calls, energies, converged in rows:
            print(
                f"{name:12s} fmax {tolerance}  {who:18s} evaluations mean {np.mean(calls):6.1f} median "
                f"{np.median(calls):5.0f}  converged {np.mean(converged):.2f}  energy {np.mean(energies):.3f}"
            )


def overhead():
    """A step on a cheap landscape with its evaluation: an upper bound of what the optimiser costs."""
    landscape = _core.PairPrior("bonding")
    batch = pack(clusters(AU4NI4, 1000, 7)[0], AU4NI4)
    _, _, _, calls, _ = _core.relax(landscape, batch, steps=40, force_tolerance=1e-12, threads=1)
    whole = best_seconds(lambda: _core.relax(landscape, batch, steps=40, force_tolerance=1e-12, threads=1))
    print(f"relax, 8 atoms, pair prior: {1e6 * whole / calls.sum():.2f} us a step with its evaluation")


def building():
    slab = fcc111("Au", (5, 3, 4), a=4.08, vacuum=8.0)
    periodic = np.array([True, True, False])
    top = slab.positions[:, 2].max() + 1.0
    on_top = (np.array([0, 0, top]), np.array([slab.cell[0], slab.cell[1], [0, 0, 5.0]]), periodic)
    nickel = np.full(6, 28)
    frames = {
        "Au4Ni4, 6 A": (AU4NI4, 12 * np.eye(3), NONE, *NO_TEMPLATE, cube(6)),
        "Au12Ni12, 9 A": (np.repeat([79, 28], 12), 18 * np.eye(3), NONE, *NO_TEMPLATE, cube(9)),
        "Ni6 on Au60": (nickel, np.asarray(slab.cell), periodic, slab.positions, slab.numbers, on_top),
    }
    for name, (placed, cell, pbc, template, template_numbers, box) in frames.items():
        n = 5000

        def rate(what, call, name=name, n=n):
            print(f"{what:17s} {name:14s} {n / best_seconds(call):10,.0f} structures/s, one thread")

        def place(placed=placed, cell=cell, pbc=pbc, on=(template, template_numbers), box=box, n=n):
            return _core.random_structures(placed, cell, pbc, *on, box=box, count=n, key=KEY, threads=1)

        positions, ok = place()
        assert ok.all()
        fixed = np.zeros((positions.shape[1], 3), dtype=bool)
        fixed[: len(template)] = True
        parents = pack(positions, np.concatenate([template_numbers, placed]), cell=cell, pbc=pbc, fixed=fixed)
        rate("random_structures", place)
        rate("rattle", lambda p=parents, b=box: _core.rattle(p, box=b, key=KEY, threads=1))
        rate("permute", lambda p=parents: _core.permute(p, key=KEY, threads=1))
        rate("closest_contacts", lambda p=parents: _core.closest_contacts(p, threads=1))
        rate("fragments", lambda p=parents: _core.fragments(p, threads=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the starts")
    quick = parser.parse_args().quick
    building()
    overhead()
    evaluations(quick)
