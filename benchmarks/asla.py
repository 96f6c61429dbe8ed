"""How many episodes until an agent builds the minimum: arms of ASLA side by side, one potential for all of them.

    python benchmarks/asla.py --problem toy                      # every arm of the smooth-carbon toy, 10 restarts each
    python benchmarks/asla.py --problem toy --arm gaussian --arm uniform --restarts 40
    python benchmarks/asla.py --problem aniline --arm asla-p --arm asla-pa
    python benchmarks/asla.py --table                            # what is there already, nothing is run

Each finished restart is a line of FOLDER/PROBLEM.jsonl; a run that was cut off goes on, and more restarts add to what is
there. One episode is one true evaluation, but for the control that relaxes in the true potential, where every point of an
episode counts. Success is told by energy: the lowest that the grid supports, which the script finds by laying the known
minimum on the grid in every way (problems whose structures are evaluated on the grid), or that of the known minimum
itself, within a tolerance that tells it from the next (GRIDLESS). Printed: restarts, successes, the median (Kaplan-Meier,
restarts that reach the cap are censored) with its 95 % band, and successes by a quarter, half and all of the cap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THALWEG_NUM_THREADS", "1")

import numpy as np

# Rectangular cells of graphene, a = sqrt(3) x 1.45 angstrom: (cells along x, along y, grid points); one atom is there.
SHEETS = {"toy": (2, 1, (16, 14)), "graphene": (3, 2, (36, 41))}
# Energy and tolerance [eV] of the known minimum.
GRIDLESS: dict[str, tuple[float, float]] = {
    "aniline": (-534.7847, 0.3),
    "benzene": (-452.1, 0.3),
    "Ni4Au4": (np.nan, 0.05),
}

ARMS: dict[str, dict] = {
    "one-hot": {"representation": "one-hot"},
    "gaussian": {},
    "gaussian, bias -0.1": {"representation_options": {"bias": -0.1}},
    "agr": {"representation": "agr"},
    "displaced": {"representation": "displaced"},
    "uniform": {"policy": "uniform"},
    "softmax": {"policy": "softmax"},
    "epsilon 2/N": {"epsilon": "2/N"},
    "novel": {"novel": True},
    "no copies": {"symmetry": False},
    "span 5 eV": {"span": 5.0},
    "span 10 eV": {"span": 10.0},
    "span 20 eV": {"span": 20.0},
    "span 40 eV": {"span": 40.0},
    "replay 8": {"replay": 8},
    "asla-p": {"postprocess": "surrogate"},
    "asla-p, continuous": {"postprocess": "surrogate", "evaluate_on_grid": False},
    "asla-pa": {"postprocess": "surrogate", "acquisition": "lcb"},
    "asla-pa, continuous": {"postprocess": "surrogate", "acquisition": "lcb", "evaluate_on_grid": False},
    "rebuild": {"postprocess": "surrogate", "acquisition": "lcb", "rebuild": 8},
    "relaxed in the true potential": {"postprocess": "true"},
}


def sheet(name: str):
    """(Problem, calculator, spacing, positions of the minimum) of a sheet of smooth carbon."""
    from ase import Atoms
    from ase.constraints import FixAtoms
    from thalweg import Problem
    from thalweg.calculators import SmoothCarbon

    along, across, (nx, ny) = SHEETS[name]
    r = 1.45
    a, b = np.sqrt(3) * r, 3 * r
    basis = np.array([[0, 0, 0], [0, r, 0], [a / 2, 1.5 * r, 0], [a / 2, 2.5 * r, 0]])
    cell = np.array([along * a, across * b, 10.0])
    positions = np.concatenate(
        [basis + np.array([i * a, j * b, 5.0]) for i, j in itertools.product(range(along), range(across))]
    )
    first = Atoms("C", [[0, 0, 5.0]], cell=cell, pbc=(True, True, False))
    first.set_constraint(FixAtoms([0]))
    box = ([0, 0, 4.5], [[cell[0], 0, 0], [0, cell[1], 0], [0, 0, 1.0]])
    problem = Problem(f"C{len(positions) - 1}", template=first, box=box)
    return problem, SmoothCarbon(), 0.5 * (cell[0] / nx + cell[1] / ny), positions


def make(name: str):
    """(Problem, calculator, options of the recipe, target energy, tolerance)."""
    if name in SHEETS:
        problem, calculator, spacing, positions = sheet(name)
        target, _ = supported(problem, calculator, spacing, positions)
        return problem, calculator, {"grid": spacing}, target, 1e-6
    from thalweg import Problem
    from thalweg.calculators import make_calculator

    symbols = {"aniline": "C6NH7", "benzene": "C6H6"}[name]
    box = ([1, 1, 6.5], [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 1.0]])
    problem = Problem(symbols, cell=[11.0, 11.0, 14.0], box=box)
    return problem, make_calculator("gfn1-xtb"), {"grid": 0.2, "hydrogen_last": True}, *GRIDLESS[name]


def supported(problem, calculator, spacing: float, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """The lowest energy of the known minimum laid on the grid: shifted so that any of its atoms is the one that is there,
    turned by 180 degrees or not, and shifted by up to half a spacing before its atoms go to their nearest points."""
    from thalweg import GridSettings, _core
    from thalweg.calculators import landscape_of

    grid = GridSettings(spacing).of(problem)
    found = []
    middle = problem.template.positions[0]
    for sign, atom in itertools.product((1, -1), range(len(positions))):
        turned = sign * (positions - positions[atom])
        for dx, dy in itertools.product(np.linspace(-0.5, 0.5, 9), repeat=2):
            moved = turned + middle + dx * grid.steps[0] + dy * grid.steps[1]
            rows = np.array([[0, grid.nearest(p)] for p in np.delete(moved, atom, axis=0)])
            if len(np.unique(rows[:, 1])) == len(rows):
                found.append(np.concatenate([problem.template.positions, grid.place(rows)]))
    structures = problem.batch(np.unique(np.round(np.array(found), 9), axis=0))
    energies = _core.evaluate(landscape_of(calculator), structures)[0]
    return float(energies.min()), structures.positions.reshape(len(structures), -1, 3)[int(np.argmin(energies))]


def one(task: tuple[str, str, int, int]) -> dict:
    """One restart."""
    from thalweg import StopAt, recipes

    name, arm, seed, cap = task
    problem, calculator, own, target, tolerance = make(name)
    options = {**own, **ARMS[arm]}
    if options.get("epsilon") == "2/N":
        options["epsilon"] = 2 / len(problem.placed_numbers)
    begin = time.perf_counter()
    search = recipes.asla(problem, calculator, seed=seed, threads=1, **options)
    search.callbacks.append(StopAt(target, tolerance))
    search.run(cap, evaluations=cap)
    energies = np.where(search.data.ok, search.data.columns["energy"], np.inf)
    hit = np.flatnonzero((energies <= target + tolerance) & (energies > target - 1.0))  # lower yet: no energy
    return {
        "problem": name, "arm": arm, "seed": seed, "cap": cap, "evaluations": int(hit[0]) + 1 if len(hit) else cap,
        "success": bool(len(hit)), "best_above": float(energies.min() - target), "episodes": search.iteration,
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def table(folder: Path, problems: list[str]) -> None:
    """Everything that is there."""
    from thalweg.statistics import success_curve

    print(
        f"{'problem':9s} {'arm':30s} {'ok/n':>7s} {'median':>7s} {'by 1/4, 1/2, all of the cap':>28s} {'s/episode':>9s}"
    )
    for name in problems:
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for arm in ARMS:
            rows = [line for line in lines if line["arm"] == arm]
            if not rows:
                continue
            times, success = np.array([r["evaluations"] for r in rows]), np.array([r["success"] for r in rows])
            cap = max(r["cap"] for r in rows)
            median = success_curve(times, success).quantile(0.5)
            shown = "-" if median is None or not np.isfinite(median) else f"{median:.0f}"
            by = "  ".join(str(int(np.sum(success & (times <= part * cap)))) for part in (0.25, 0.5, 1))
            speed = sum(r["seconds"] for r in rows) / sum(r["episodes"] for r in rows)
            print(
                f"{name:9s} {arm:30s} {success.sum():3d}/{len(rows):<3d} {shown:>7s} {f'{by} of {cap}':>28s} {speed:9.3f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", action="append", choices=[*SHEETS, "aniline", "benzene"])
    parser.add_argument("--arm", action="append", choices=list(ARMS))
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--cap", type=int, default=1500, help="true evaluations per restart")
    parser.add_argument("--seed", type=int, default=0, help="of the first restart")
    parser.add_argument("--folder", default="asla-runs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    arguments = parser.parse_args()
    folder, problems = Path(arguments.folder), arguments.problem or ["toy"]
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        tasks = []
        for name in problems:
            path = folder / f"{name}.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            done = {(line["arm"], line["seed"]) for line in lines if line["success"] or line["cap"] >= arguments.cap}
            for seed, arm in itertools.product(range(arguments.restarts), arguments.arm or ARMS):
                if (arm, arguments.seed + seed) not in done:
                    tasks.append((name, arm, arguments.seed + seed, arguments.cap))
        with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
            for result in pool.imap_unordered(one, tasks):
                with open(folder / f"{result['problem']}.jsonl", "a") as file:
                    file.write(json.dumps(result) + "\n")
    table(folder, [name for name in problems if (folder / f"{name}.jsonl").exists()])


if __name__ == "__main__":
    main()
