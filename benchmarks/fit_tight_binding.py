"""The numbers that `FittedPrior(form="tight-binding")` starts from: a fit to random structures in GFN1-xTB.

    pip install "thalweg[xtb]"
    python benchmarks/fit_tight_binding.py

Random searches of a few compositions (aniline is not among them), every structure within 12 eV of the lowest of its
composition, those of nearly equal energy left out; energies up to a constant per composition, and forces.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THALWEG_NUM_THREADS", "1")

import numpy as np

FORMULAS = ("C4H5NO", "C5H6N2", "C5H8O")
WINDOW, APART, MOST = 12.0, 0.1, 45  # eV, eV, structures of a composition


def main() -> None:
    from thalweg import Batch, FittedPrior, Problem, recipes
    from thalweg.calculators import make_calculator
    from thalweg.priors import _Bonds, _LeastSquares

    prior = FittedPrior(form="tight-binding")
    parts = []
    for formula in FORMULAS:
        found = []
        for seed in (0, 1):
            search = recipes.random_search(
                Problem(formula, cell=14.0, box=6.0), make_calculator("gfn1-xtb"), seed=seed, steps=60
            )
            search.run(400, evaluations=400)
            found.append(search.data)
        data = Batch.concat(found)
        energies = np.where(data.ok, data.columns["energy"], np.inf)
        lowest = np.quantile(energies, 0.02) - 2.0  # lower yet are states that GFN1-xTB has where atoms are too close
        chosen: list[int] = []
        for row in np.argsort(energies):
            if lowest < energies[row] < lowest + WINDOW and (
                not chosen or energies[row] > energies[chosen[-1]] + APART
            ):
                chosen.append(int(row))
        rows = np.random.default_rng(0).permutation(chosen)[:MOST]
        parts.append(data.take(np.sort(rows)))
        print(f"{formula}: {len(parts[-1])} of {len(data)} structures", flush=True)

    class Together(_LeastSquares):
        """All compositions, each with a constant of its own."""

        def __init__(self, bonds: _Bonds):
            self.wells, self.tasks = bonds, [_LeastSquares(bonds, part) for part in parts]

        def _residuals(self, parameters: np.ndarray) -> np.ndarray:
            return np.concatenate([task._residuals(parameters) for task in self.tasks])

    bonds = _Bonds(prior, np.array([1, 6, 7, 8]))
    task = Together(bonds)
    parameters = prior._descend(task, bonds.guess)
    print(f"sum of squares {task.sum_of_squares(bonds.guess):.0f} -> {task.sum_of_squares(parameters):.0f}")
    for (a, b), row in bonds.landscape(parameters).pairs.items():
        print(f"    ({a}, {b}): ({', '.join(f'{value:.2f}' for value in row)}),")
    for number, levels in bonds.landscape(parameters).levels.items():
        print(f"    {number}: ({', '.join(f'{value:.2f}' for value in levels)}),")


if __name__ == "__main__":
    main()
