"""How many episodes until an agent builds the minimum: arms of ASLA side by side, one potential for all of them.

    python benchmarks/asla.py --problem toy                      # every arm of the smooth-carbon toy, 10 restarts each
    python benchmarks/asla.py --problem toy --arm gaussian --arm uniform --restarts 40
    python benchmarks/asla.py --problem aniline --arm asla-p --arm asla-pa
    python benchmarks/asla.py --table                            # what is there already, nothing is run

Each finished restart is a line of FOLDER/PROBLEM.jsonl; a run that was cut off goes on, and more restarts add to what is
there. One episode is one true evaluation, but for the control that relaxes in the true potential: there, too, episodes are
counted, as if the surrogate were perfect. Success is the first evaluated structure with the bond graph of the known
minimum: atoms closer than 1.25 covalent sums are bonded, and the two graphs are isomorphic, species included. In the cell
of the toy, where bonds meet their own images, and for Ni4Au4 it is the first at an energy: that of the known minimum laid
on the grid as well as the grid allows, or that of the minimum itself for arms that evaluate off the grid. Printed:
restarts, successes, the median (Kaplan-Meier, restarts that reach the cap are censored), successes by a quarter, half and
all of the cap, the median of the lowest energies above the lowest of all arms, processor time per episode, energies
included, and the p-value of a log-rank test against the problem's first arm, or the one that --against names.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THALWEG_NUM_THREADS", "1")

import numpy as np

# Rectangular cells of graphene: (potential, bond length, cells along x, along y, grid points); one atom is there.
SHEETS = {
    "toy": ("smooth-carbon", 1.45, 2, 1, (16, 14)),
    "sheet": ("smooth-carbon", 1.45, 3, 2, (36, 41)),
    "small sheet": ("smooth-carbon", 1.45, 2, 1, (24, 20)),
    "graphene": ("gfn1-xtb", 1.42, 3, 2, (36, 41)),
}
# Where the arm "transfer" learned first, and for how many episodes, which its figures leave out.
SMALLER = {"sheet": ("small sheet", 400)}
MOLECULES = {"aniline": "C6NH7", "benzene": "C6H6"}
# Energy [eV] of the known minimum where bonds do not tell it: anywhere, and on the grid (`--supported` finds both).
ENERGIES: dict[str, tuple[float, float]] = {"Ni4Au4": (7.9109, 8.0427)}
TOLERANCE = 0.02  # eV

# The training of Papers II and III; everything else has the defaults of the recipe.
PUBLISHED = {"lr": 1e-3, "warm_up": 0, "train_steps": 1, "patience": 0, "lifetime": 0, "novel": False}
REBUILD = {"postprocess": "surrogate", "acquisition": "lcb", "rebuild": 8}

ARMS: dict[str, dict] = {
    "gaussian": {},
    "gaussian, bias -0.1": {"representation_options": {"bias": -0.1}},
    "one-hot": {"representation": "one-hot"},
    "agr": {"representation": "agr"},
    "displaced": {"representation": "displaced"},
    "uniform": {"policy": "uniform"},
    "softmax": {"policy": "softmax"},
    "epsilon 2/N": {"epsilon": "2/N"},
    "published training": PUBLISHED,
    "published training, one-hot": {**PUBLISHED, "representation": "one-hot"},
    "never anew": {"patience": 0, "lifetime": 0},
    "not novel": {"novel": False},
    "no copies": {"symmetry": False},
    "1 step": {"train_steps": 1},
    "lr 1e-3": {"lr": 1e-3},
    "lr 4e-3": {"lr": 4e-3},
    "span 10 eV": {"span": 10.0},
    "span 20 eV": {"span": 20.0},
    "span 40 eV": {"span": 40.0},
    "replay 8": {"replay": 8},
    "low episodes replayed more": {"favour": 0.5},
    "asla-p": {"postprocess": "surrogate"},
    "asla-p, uniform policy": {"postprocess": "surrogate", "policy": "uniform"},
    "asla-p, continuous": {"postprocess": "surrogate", "evaluate_on_grid": False},
    "asla-pa": {"postprocess": "surrogate", "acquisition": "lcb"},
    "asla-pa, continuous": {"postprocess": "surrogate", "acquisition": "lcb", "evaluate_on_grid": False},
    "rebuild": REBUILD,
    "rebuild, continuous": {**REBUILD, "evaluate_on_grid": False},
    "rebuild, continuous, one life": {**REBUILD, "evaluate_on_grid": False, "lifetime": 0},
    "rebuild, continuous, uniform policy": {**REBUILD, "evaluate_on_grid": False, "policy": "uniform"},
    "rebuild, continuous, full kernels": {**REBUILD, "evaluate_on_grid": False, "network": "thesis-3d-full"},
    "rebuild, prior of wells": {**REBUILD, "prior": "fitted"},
    "relaxed in the true potential": {"postprocess": "true"},
    "transfer": {"transfer_from": "smaller"},
    "full kernels": {"network": "thesis-3d-full"},
    "mixture": {
        "postprocess": "surrogate",
        "acquisition": "lcb",
        "candidates": 22,
        "rebuild": 20,
        "unchosen": 20,
        "displaced": 5,
    },
}


def sheet(name: str):
    """(Problem, calculator, options of the recipe, how to tell the minimum) of a sheet of carbon."""
    from ase import Atoms
    from ase.constraints import FixAtoms
    from thalweg import Problem
    from thalweg.calculators import make_calculator

    potential, r, along, across, (nx, ny) = SHEETS[name]
    a, b = np.sqrt(3) * r, 3 * r
    basis = np.array([[0, 0, 0], [0, r, 0], [a / 2, 1.5 * r, 0], [a / 2, 2.5 * r, 0]])
    cell = np.array([along * a, across * b, 10.0])
    positions = np.concatenate(
        [basis + np.array([i * a, j * b, 5.0]) for i, j in itertools.product(range(along), range(across))]
    )
    minimum = Atoms(f"C{len(positions)}", positions, cell=cell, pbc=(True, True, False))
    first = minimum[:1]
    first.set_constraint(FixAtoms([0]))
    box = ([0, 0, 4.5], [[cell[0], 0, 0], [0, cell[1], 0], [0, 0, 1.0]])
    problem = Problem(f"C{len(positions) - 1}", template=first, box=box)
    calculator, options = make_calculator(potential), {"grid": 0.5 * (cell[0] / nx + cell[1] / ny)}
    if name == "toy":
        return problem, calculator, options, (supported(problem, calculator, options["grid"], positions), 1e-6)
    return problem, calculator, options, bond_graph(minimum)


def supported(problem, calculator, spacing: float, positions: np.ndarray) -> float:
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
            voxels = grid.nearest(np.delete(moved, atom, axis=0))
            if len(np.unique(voxels)) == len(voxels):
                rows = np.stack([np.zeros_like(voxels), voxels], axis=1)
                found.append(np.concatenate([problem.template.positions, grid.place(rows)]))
    structures = problem.batch(np.unique(np.round(np.array(found), 9), axis=0))
    return float(_core.evaluate(landscape_of(calculator), structures)[0].min())


def molecule(name: str):
    """The same of a flat molecule in GFN1-xTB, with the bond graph of the minimum: a ring of six carbon atoms with a
    hydrogen each, or NH2 in place of one of them."""
    import networkx
    from thalweg import Problem
    from thalweg.calculators import make_calculator

    box = ([1, 1, 6.5], [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 1.0]])
    problem = Problem(MOLECULES[name], cell=[11.0, 11.0, 14.0], box=box)
    graph = networkx.cycle_graph(6)
    graph.add_edges_from((i, i + 6) for i in range(6))
    species = dict.fromkeys(range(6), 6) | dict.fromkeys(range(6, 12), 1)
    if name == "aniline":
        graph.add_edges_from([(6, 12), (6, 13)])
        species |= {6: 7, 12: 1, 13: 1}
    networkx.set_node_attributes(graph, species, "species")
    return problem, make_calculator("gfn1-xtb"), {"grid": 0.2, "hydrogen_last": True}, graph


def bond_graph(atoms):
    """Which atoms are closer than 1.25 covalent sums, as a networkx graph with the species at its nodes."""
    import networkx
    from ase.neighborlist import natural_cutoffs, neighbor_list

    graph = networkx.Graph()
    graph.add_nodes_from((i, {"species": int(z)}) for i, z in enumerate(atoms.numbers))
    graph.add_edges_from(zip(*neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=1.25)), strict=True))
    return graph


def same_bonds(one, other) -> bool:
    """Whether two bond graphs are one, whatever the order of the atoms."""
    import networkx

    return networkx.faster_could_be_isomorphic(one, other) and networkx.is_isomorphic(
        one, other, node_match=lambda a, b: a["species"] == b["species"]
    )


def boundary(name: str):
    """The same of 20 carbon atoms between two tilted sheets of graphene; the last 20 of the file are the minimum."""
    from ase.io import read
    from thalweg import Problem
    from thalweg.calculators import make_calculator

    minimum = read(Path(__file__).with_name("grain_boundary.extxyz"))
    box = ([6.4, 0, 4.5], [[5.3, 0, 0], minimum.cell[1], [0, 0, 1.0]])
    problem = Problem("C20", template=minimum[:-20], box=box)
    return problem, make_calculator("gfn1-xtb"), {"grid": 0.2}, bond_graph(minimum)


def cluster(name: str):
    """The same of nickel and gold in EMT, three-dimensional, on one gold atom; told by energy."""
    from ase import Atoms
    from ase.constraints import FixAtoms
    from thalweg import Problem
    from thalweg.calculators import EMT

    first = Atoms("Au", [[6.0, 6.0, 6.0]], cell=[12.0] * 3, constraint=FixAtoms([0]))
    problem = Problem(name, template=first, box=([2.0] * 3, [8.0] * 3))
    return problem, EMT(), {"grid": 0.4, "dimension": 3, "evaluate_on_grid": False}, ENERGIES[name]


def supported_cluster(name: str, starts: int = 2000) -> tuple[float, float]:
    """What ENERGIES says: the lowest energy, and the lowest on the grid. The minimum is turned at random about any of its
    atoms of the template's species, which lies where the template does, its atoms go to their nearest points, and then one
    moves to a neighbouring point or two change places as long as that leads down."""
    from scipy.spatial.transform import Rotation
    from thalweg import GridSettings, _core, recipes
    from thalweg.calculators import landscape_of

    problem, calculator, options, _ = cluster(name)
    found = recipes.gofee(problem, calculator, seed=3).run(60)
    minimum = found.best.to_ase()[0]
    grid, landscape = GridSettings(options["grid"], dimension=3).of(problem), landscape_of(calculator)
    numbers, there = problem.placed_numbers, problem.template
    near = np.stack(np.meshgrid(*[(-1, 0, 1)] * 3, indexing="ij"), -1).reshape(-1, 3) @ grid.steps

    def energies(sites: np.ndarray) -> np.ndarray:
        positions = np.concatenate([np.broadcast_to(there.positions, (len(sites), 1, 3)), grid.points[sites]], axis=1)
        return _core.evaluate(landscape, problem.batch(positions))[0]

    def neighbours(sites: np.ndarray) -> np.ndarray:
        around = []
        for a, site in enumerate(sites):
            points = grid.nearest(grid.points[site] + near)
            around.append(np.where(np.arange(len(sites)) == a, points[:, None], sites))
        pairs = [(a, b) for a, b in itertools.combinations(range(len(sites)), 2) if numbers[a] != numbers[b]]
        changed = np.repeat(sites[None], len(pairs), axis=0)
        for row, (a, b) in zip(changed, pairs, strict=True):
            row[[a, b]] = row[[b, a]]
        every = np.concatenate([*around, changed])
        return every[[len(set(row)) == len(row) for row in every.tolist()]]

    rng, lowest = np.random.default_rng(0), np.inf
    centres = np.flatnonzero(minimum.numbers == there.numbers[0])
    for k in range(starts):
        centre = centres[k % len(centres)]
        rest = np.delete(np.arange(len(minimum)), centre)
        slots = np.empty(len(rest), int)  # which placed atom each of the others becomes
        for z in np.unique(numbers):
            slots[minimum.numbers[rest] == z] = np.flatnonzero(numbers == z)
        turned = Rotation.random(random_state=rng).apply(minimum.positions[rest] - minimum.positions[centre])
        sites = np.empty(len(rest), int)
        sites[slots] = grid.nearest(turned + there.positions[0])
        if len(set(sites.tolist())) < len(sites):
            continue
        energy = energies(sites[None])[0]
        while True:
            others = neighbours(sites)
            values = energies(others)
            best = int(np.nanargmin(values))
            if not values[best] < energy - 1e-9:
                break
            sites, energy = others[best], values[best]
        lowest = min(lowest, float(energy))
    return float(found.energy), lowest


def make(name: str):
    """(Problem, calculator, options of the recipe, bond graph of the minimum, or its (energy, tolerance), or its row of
    ENERGIES) of a problem."""
    kinds = {**dict.fromkeys(SHEETS, sheet), **dict.fromkeys(MOLECULES, molecule), "grain boundary": boundary}
    return kinds.get(name, cluster)(name)


def smaller(name: str, seed: int, path: Path) -> str:
    """Where an agent that learned in a smaller cell is kept."""
    from thalweg import recipes

    problem, calculator, options, _ = make(SMALLER[name][0])
    search = recipes.asla(problem, calculator, seed=seed, threads=1, **options)
    search.run(SMALLER[name][1])
    search.ask()  # learns the last episode
    search.fitted["agent"].save(str(path))
    return str(path)


def fits(name: str, arm: str) -> bool:
    """Whether an arm can run on a problem: transfer needs a smaller one, full kernels a grid of three dimensions."""
    if "transfer_from" in ARMS[arm]:
        return name in SMALLER
    return ARMS[arm].get("network") != "thesis-3d-full" or name in ENERGIES


def one(task: tuple[str, str, int, int]) -> dict:
    """One restart."""
    from thalweg import Stop, recipes

    name, arm, seed, cap = task
    problem, calculator, own, minimum = make(name)
    options = {**own, **ARMS[arm]}
    if name in ENERGIES:
        on_grid = options.get("postprocess", "none") == "none" or options["evaluate_on_grid"]
        minimum = (minimum[on_grid], TOLERANCE)
    if options.get("epsilon") == "2/N":
        options["epsilon"] = 2 / len(problem.placed_numbers)
    if "transfer_from" in options:
        options["transfer_from"] = smaller(name, seed, Path(tempfile.mkdtemp()) / "agent.npz")
    energies: list[float] = []
    delivered: list[int] = []
    relaxed = options.get("postprocess") == "true"

    def judge(step, search) -> None:
        """Looks at what this episode evaluated; the first success ends the restart."""
        if not len(step.evaluated):  # no build was complete
            return
        measured = zip(step.evaluated.to_ase(), step.evaluated.columns["energy"], step.evaluated.ok, strict=True)
        for atoms, energy, ok in measured:
            energies.append(float(energy) if ok else np.inf)
            if not np.isfinite(energies[-1]):
                continue
            if isinstance(minimum, tuple):
                found = energies[-1] <= sum(minimum)
            else:
                found = same_bonds(bond_graph(atoms), minimum)
            if found:
                delivered.append(search.iteration if relaxed else len(energies))
                raise Stop("found")

    begin = time.process_time()
    search = recipes.asla(problem, calculator, seed=seed, threads=1, **options)
    search.callbacks.append(judge)
    search.run(cap, evaluations=None if relaxed else cap)
    return {
        "problem": name, "arm": arm, "seed": seed, "cap": cap, "evaluations": delivered[0] if delivered else cap,
        "success": bool(delivered), "lowest": float(min(energies)), "episodes": search.iteration,
        "seconds": time.process_time() - begin,
    }  # fmt: skip


def kept(path: Path) -> list[dict]:
    """The restarts in a file: of one that was repeated that with the largest cap; a line that was cut off is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        before = found.setdefault((row["arm"], row["seed"]), row)
        if row["success"] or row["cap"] >= before["cap"]:
            found[row["arm"], row["seed"]] = row
    return list(found.values())


def table(folder: Path, problems: list[str], against: str | None = None) -> None:
    """Everything that is there."""
    from scipy.stats import CensoredData, logrank
    from thalweg.statistics import success_curve

    print(
        f"{'problem':14s} {'arm':36s} {'ok/n':>7s} {'median':>7s} {'by 1/4, 1/2, all of the cap':>28s} {'above':>7s} "
        f"{'s/episode':>9s} {'p':>7s}"
    )
    for name in problems:
        lines = kept(folder / f"{name}.jsonl")
        lowest = min(line["lowest"] for line in lines)
        arms = {arm: [line for line in lines if line["arm"] == arm] for arm in ARMS}
        arms = {arm: rows for arm, rows in arms.items() if rows}
        times = {arm: np.array([r["evaluations"] for r in rows]) for arm, rows in arms.items()}
        found = {arm: np.array([r["success"] for r in rows]) for arm, rows in arms.items()}
        first = against if against in arms else next(iter(arms))
        data = {arm: CensoredData(uncensored=t[found[arm]], right=t[~found[arm]]) for arm, t in times.items()}
        for arm, rows in arms.items():
            success = found[arm]
            cap = max(r["cap"] for r in rows)
            median = success_curve(times[arm], success).quantile(0.5)
            shown = "-" if median is None or not np.isfinite(median) else f"{median:.0f}"
            by = "  ".join(str(int(np.sum(success & (times[arm] <= part * cap)))) for part in (0.25, 0.5, 1))
            speed = sum(r["seconds"] for r in rows) / sum(r["episodes"] for r in rows)
            above = np.median([r["lowest"] for r in rows]) - lowest
            with np.errstate(invalid="ignore"):  # none has succeeded on either side
                p = np.nan if arm == first else logrank(data[first], data[arm]).pvalue
            print(
                f"{name:14s} {arm:36s} {success.sum():3d}/{len(rows):<3d} {shown:>7s} {f'{by} of {cap}':>28s} {above:7.2f} "
                f"{speed:9.3f} {'' if np.isnan(p) else f'{p:7.2g}'}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", action="append", choices=[*SHEETS, *MOLECULES, "grain boundary", *ENERGIES])
    parser.add_argument("--arm", action="append", choices=list(ARMS))
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--cap", type=int, default=1500, help="true evaluations per restart")
    parser.add_argument("--seed", type=int, default=0, help="of the first restart")
    parser.add_argument("--folder", default="asla-runs")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--against", choices=list(ARMS), help="the arm that log-rank tests compare the others with")
    parser.add_argument(
        "--supported", choices=list(ENERGIES), help="find the energies of ENERGIES anew, run nothing else"
    )
    arguments = parser.parse_args()
    if arguments.supported:
        print("lowest energy {:.4f} eV, on the grid {:.4f} eV".format(*supported_cluster(arguments.supported)))
        return
    folder, problems = Path(arguments.folder), arguments.problem or ["toy"]
    folder.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        tasks = []
        for name in problems:
            path = folder / f"{name}.jsonl"
            lines = kept(path)
            done = {(line["arm"], line["seed"]) for line in lines if line["success"] or line["cap"] >= arguments.cap}
            arms = arguments.arm or [arm for arm in ARMS if fits(name, arm)]
            for seed, arm in itertools.product(range(arguments.seed, arguments.seed + arguments.restarts), arms):
                if not fits(name, arm):
                    parser.error(f"the arm '{arm}' cannot run on {name}")
                if (arm, seed) not in done:
                    tasks.append((name, arm, seed, arguments.cap))
        with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
            for result in pool.imap_unordered(one, tasks):
                path = folder / f"{result['problem']}.jsonl"
                torn = path.exists() and not path.read_text().endswith("\n")  # a line that was cut off
                with open(path, "a") as file:
                    file.write("\n" * torn + json.dumps(result) + "\n")
    table(folder, [name for name in problems if kept(folder / f"{name}.jsonl")], arguments.against)


if __name__ == "__main__":
    main()
