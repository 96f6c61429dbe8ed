"""Evaluations of GFN2-xTB until the lowest isomer of CH3NO (formamide), with and without GFN1-xTB as the prior.

    pip install "thalweg[xtb]"
    python benchmarks/delta_learning.py                         # 5 seeds, three arms, minutes
    python benchmarks/delta_learning.py --seeds 10 --cap 200 --candidates 12 --steps 40

delivered = the first counted evaluation within 20 meV of the relaxed minimum; seeds that reach the cap without it are
counted with the cap, and said to be. Calls of the prior are counted, too: they are the price (here GFN1 costs as much
as GFN2, so this shows evaluations saved, not time).
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THALWEG_NUM_THREADS", "1")

import numpy as np

SYMBOLS = "NCOHHH"
FORMAMIDE = np.array(
    [[0, 0, 0], [1.35, 0, 0], [1.96, 1.05, 0], [1.9, -0.95, 0], [-0.5, 0.87, 0], [-0.5, -0.87, 0]], float
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cap", type=int, default=100, help="true evaluations per seed")
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="relaxation steps on the surrogate")
    parser.add_argument("--tolerance", type=float, default=0.02, help="eV")
    arguments = parser.parse_args()

    from ase import Atoms
    from ase.optimize import BFGS
    from thalweg import CalculatorPrior, Problem, StopAt, recipes
    from thalweg.calculators import make_calculator

    def true():
        # without cache_api=False a result depends on the structure before it
        return make_calculator("gfn2-xtb", cache_api=False)

    atoms = Atoms(SYMBOLS, FORMAMIDE + 4.0, cell=[10.0] * 3, calculator=true())
    BFGS(atoms, logfile=None).run(fmax=0.005, steps=200)
    target = float(atoms.get_potential_energy())
    print(
        f"formamide in GFN2-xTB: {target:.4f} eV; at most {arguments.cap} evaluations, seeds 0 to {arguments.seeds - 1}"
    )
    same = {"candidates": arguments.candidates, "surrogate_steps": arguments.steps}
    arms = {
        "bonding prior, 40 candidates, 100 steps": {},
        f"bonding prior, {arguments.candidates} candidates, {arguments.steps} steps": same,
        f"GFN1-xTB prior, {arguments.candidates} candidates, {arguments.steps} steps": {"prior": "gfn1", **same},
    }
    for arm, options in arms.items():
        delivered, found, calls, begin = [], 0, 0, time.perf_counter()
        for seed in range(arguments.seeds):
            options = dict(options)
            if "prior" in options:
                options["prior"] = CalculatorPrior("gfn1-xtb")
            search = recipes.gofee(Problem("CH3NO", cell=10.0, box=4.0), true(), seed=seed, **options)
            search.callbacks.append(StopAt(target, arguments.tolerance))
            search.run(arguments.cap, evaluations=arguments.cap)
            reached = np.flatnonzero(search.data.columns["energy"] <= target + arguments.tolerance)
            found += len(reached) > 0
            delivered.append(int(reached[0]) + 1 if len(reached) else arguments.cap)
            if "prior" in options:
                calls += options["prior"].calls
            best = np.nanmin(search.data.columns["energy"])
            assert best > target - arguments.tolerance, f"lower than formamide: {best}"
        print(
            f"{arm:44s} found {found}/{arguments.seeds}, evaluations {delivered}, geometric mean "
            f"{np.exp(np.mean(np.log(delivered))):.0f}, calls of the prior {calls}, "
            f"{time.perf_counter() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
