"""How many true evaluations until the minimum: the table of search quality.

    python benchmarks/search.py                              # the rows of the README
    python benchmarks/search.py --problem Au8Ni8 --arm gofee --restarts 20 --cap 400
    python benchmarks/search.py --problem Au4Ni4 --arm gofee --set kappa=1.0 --seed 1000
    python benchmarks/search.py --set 'prior={"form": "fitted", "radius_scale": 0.92}'    # or just prior=fitted
    python benchmarks/search.py --kept benchmarks/data/search.json     # the README's, as they were measured
    python benchmarks/search.py --table --problem Au4Ni4 --problem Cu4Ni4 --problem Au6Ni6 --restarts 16 --cap 300

One restart = one seed; every true evaluation is counted (first structures, surrogate choices, polishing, failures).
delivered = the first counted evaluation within 1 meV of the known minimum (clusters; other problems: TARGETS).
Restarts that reach the cap are censored.
Each row prints n, successes, the Kaplan-Meier median, the mean cost per success (all evaluations of all restarts over
successes), how many were done by 50, 100, 150, 400, and the seconds per iteration beside the true energy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("THALWEG_NUM_THREADS", "1")

import numpy as np

# Clusters in EMT: minima in eV, putative, from long basin hopping; 12 angstrom cells, 15 for Au8Ni8.
CLUSTERS = {
    "Au4Ni4": 7.8049,
    "Au6Ni6": 9.4854,
    "Au8Ni8": 11.2439,
    "Cu4Ni4": 9.0015,
    "Ni8": 10.8052,
    "Au5Ni": 4.8150,
    "Au6": 4.0253,
    "Cu13": 9.3614,
}
# The others: (how to make the problem and its calculator, energy of the minimum and tolerance in eV).
OTHERS: dict[str, tuple[str, float, float]] = {
    "Ni6/Au111": ("slab", 15.2832, 0.002),  # EMT, six nickel atoms on 60 fixed gold atoms
    "B4N4": ("hBN 2", -53.52, 0.02),  # Tersoff "BN", a flat periodic cell: the sheet of hexagonal boron nitride
    "B6N6": ("hBN 3", -80.28, 0.02),
    "aniline": ("aniline", -534.7847, 0.05),  # C6H7N in GFN1-xTB; needs tblite
}
TARGETS = {name: (energy, 0.001) for name, energy in CLUSTERS.items()} | {
    name: (energy, tolerance) for name, (_, energy, tolerance) in OTHERS.items()
}


def problem_of(name: str):
    """(Problem, calculator) of a row of the table."""
    from pathlib import Path

    from thalweg import Problem
    from thalweg.calculators import EMT, Tersoff, make_calculator

    if name in CLUSTERS:
        return Problem(name, cell=15.0 if name == "Au8Ni8" else 12.0), EMT()
    kind = OTHERS[name][0]
    if kind == "slab":
        from ase.io import read

        template = read(Path(__file__).parents[1] / "examples" / "au111.extxyz")
        vectors = [[11.53998267, 0, 0], [7.21248917, 12.49239769, 0], [0, 0, 4.5]]
        return Problem("Ni6", template=template, box=([0, 0, 7.2], vectors)), EMT()
    if kind == "aniline":
        return Problem("C6H7N", cell=14.0, box=7.0), make_calculator("gfn1-xtb")
    long = {"hBN 2": 5.0081, "hBN 3": 7.5121}[kind]
    box = ([0, 0, 6.5], [long, 4.3371, 1.0])
    return Problem(name, cell=[long, 4.3371, 14.0], pbc=(True, True, False), box=box), Tersoff(parameters="BN")


ARMS = {
    "gofee": {"method": "gofee"},
    "gofee, local model": {"method": "gofee", "model": "local"},
    "gofee, automatic choice of model": {"method": "gofee", "model": "auto"},
    "gofee, no hops": {"method": "gofee", "hops": 0},
    "gofee, fitted prior only": {"method": "gofee", "prior": "fitted"},
    "gofee, fixed bonding prior": {"method": "gofee", "prior": "bonding"},
    "gofee, prior 8 % too short": {"method": "gofee", "prior": {"form": "fitted", "radius_scale": 0.92}},
    "gofee, forces in the global model": {"method": "gofee", "use_forces": True},
    "gofee, periodic polish": {"method": "gofee", "polish": "periodic"},
    "gofee without a Gaussian process": {"method": "gofee", "without_gp": True},  # the fitted prior alone
    "gofee, repulsive prior": {"method": "gofee", "prior": "repulsive"},
    "gofee, no prior": {"method": "gofee", "prior": "none"},
    "gofee, classic": {"method": "gofee", "classic": True},
    "basin hopping": {"method": "basin_hopping"},
    "complementary energy": {"method": "complementary_energy"},
    "complementary energy, all atoms": {"method": "complementary_energy", "few": False},
    "cluster regularization": {"method": "complementary_energy", "few": False, "attractors": "clusters"},
    "random search": {"method": "random_search"},
}

# What gofee's options change, each alone against the default on the same seeds (--table).
CHOICES: dict[str, dict] = {
    "default": {},
    'model="local"': {"model": "local"},
    'model="auto"': {"model": "auto"},
    'prior="fitted"': {"prior": "fitted"},
    'prior="bonding"': {"prior": "bonding"},
    'prior="none"': {"prior": "none"},
    "fitted prior, 8 % too short": {"prior": {"form": "fitted", "radius_scale": 0.92}},
    "use_forces": {"use_forces": True},
    'polish="periodic"': {"polish": "periodic"},
    "starts=1": {"starts": 1},
    "starts=5": {"starts": 5},
    'acquisition="ei"': {"acquisition": "ei"},
    'acquisition="thompson"': {"acquisition": "thompson"},
    "kappa=1": {"kappa": 1.0},
    "kappa 4, 2, 1, 0.5": {"kappa": {0: 4.0, 10: 2.0, 25: 1.0, 50: 0.5}},
    'sampler="similarity"': {"sampler": "similarity"},
    'sampler="novelty"': {"sampler": "novelty"},
    "hops=0": {"hops": 0},
    "hops=3": {"hops": 3},
    "hops=30": {"hops": 30},
    "walkers=4": {"walkers": 4},
    "walkers=0 (all)": {"walkers": 0},
    "candidates=10": {"candidates": 10},
    "candidates=80": {"candidates": 80},
    "reset_after=10": {"reset_after": 10},
    "reset_after=20": {"reset_after": 20},
}


def is_aniline(structure) -> bool:
    """By its bonds, atoms within 1.25 covalent sums: six carbons with two carbons each are a ring."""
    from thalweg import _core

    x, z = structure.positions, np.asarray(structure.numbers)
    radii = np.array([_core.covalent_radius(int(number)) for number in z])
    apart = np.linalg.norm(x[:, None] - x[None], axis=-1)
    bonded = (apart < 1.25 * (radii[:, None] + radii[None])) & (apart > 0)
    around = sorted((int(z[i]), *sorted(z[bonded[i]].tolist())) for i in range(len(z)))
    ring = [(6, 1, 6, 6)] * 5 + [(6, 6, 6, 7)]
    return around == sorted([(1, 6)] * 5 + [(1, 7)] * 2 + ring + [(7, 1, 1, 6)])


def one(task: tuple[str, dict, int, int]) -> dict:
    """One restart."""
    from thalweg import GPR, FittedPrior, Stop, StopAt, _core, recipes

    formula, options, seed, cap = task
    options = dict(options)
    method = options.pop("method")
    if isinstance(options.get("prior"), dict):
        numbers = dict(options["prior"])
        form = numbers.pop("form")
        options["prior"] = FittedPrior(**numbers) if form == "fitted" else _core.PairPrior(form, **numbers)
    problem, calculator = problem_of(formula)
    target, tolerance = TARGETS[formula]
    without_gp = options.pop("without_gp", False)
    seconds: dict[str, float] = {}

    def count(step, search):
        for name, value in step.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value

    begin = time.perf_counter()
    search = recipes.RECIPES[method](problem, calculator, seed=seed, **options)
    if without_gp:  # a kernel of next to nothing: what is left is the prior
        kernel = _core.Kernel(amplitude=1e-8, length_long=1.0, length_short=1.0, noise=1.0)
        search.models = {"gp": GPR(prior="fitted", kernel=kernel, optimise=False)}

    def enough(step, search):  # an energy that is too low is no reason to stop
        for row in range(len(step.evaluated)):
            energy = step.evaluated.columns["energy"][row]
            if target - 1.0 < energy <= target + tolerance and is_aniline(step.evaluated[row]):
                raise Stop

    search.callbacks += [count, enough if formula == "aniline" else StopAt(target, tolerance)]
    found = search.run(cap, evaluations=cap)
    energies = search.data.columns["energy"] if len(search.data) else np.zeros(0)
    reached = np.flatnonzero((energies <= target + tolerance) & (energies > target - 1.0))  # lower yet: no energy
    if formula == "aniline":
        reached = [row for row in reached if is_aniline(search.data[int(row)])]
    return {
        "seed": seed,
        "delivered": int(reached[0]) + 1 if len(reached) else None,
        "evaluations": found.evaluations,
        "iterations": found.iterations,
        "best": found.energy,
        "seconds": time.perf_counter() - begin,
    }


def row(formula: str, arm: str, options: dict, restarts: int, cap: int, seed: int, workers: int) -> dict:
    """All restarts of one arm."""
    tasks = [(formula, options, seed + i, cap) for i in range(restarts)]
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = pool.map(one, tasks, chunksize=1)
    else:
        results = [one(task) for task in tasks]
    return summary(formula, arm, results)


def summary(formula: str, arm: str, results: list[dict]) -> dict:
    """The row of these restarts."""
    from thalweg.statistics import success_curve

    times = np.array([r["delivered"] or r["evaluations"] for r in results])
    success = np.array([r["delivered"] is not None for r in results])
    total = sum(int(t) for t in times)
    return {
        "problem": formula, "arm": arm, "n": len(results), "ok": int(success.sum()),
        "median": success_curve(times, success).quantile(0.5),
        "mean_per_success": total / success.sum() if success.any() else float("nan"),
        "done_by": {str(by): int(np.sum(success & (times <= by))) for by in (50, 100, 150, 400)},
        "ms_per_iteration": 1e3 * sum(r["seconds"] for r in results) / max(1, sum(r["iterations"] for r in results)),
        "restarts": results,
    }  # fmt: skip


def costs(result: dict, cap: int) -> np.ndarray:
    """(n,) evaluations until the minimum, restart by restart; the cap where it was not found."""
    return np.array([r["delivered"] or cap for r in result["restarts"]], float)


def ratio_with_band(these: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of the cost ratio seed by seed, and its 95 % band (percentiles of 4000 resamplings of the seeds)."""
    logs = np.log(these / others)
    means = np.random.default_rng(0).choice(logs, (4000, len(logs))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))


def table(problems: list[str], chosen: list[str], restarts: int, cap: int, seed: int, workers: int) -> list[dict]:
    """Choices of CHOICES against the default, same seeds; the last lines pool all problems."""
    choices = {name: CHOICES[name] for name in CHOICES if name == "default" or name in chosen or not chosen}
    print(
        f"gofee, seeds {seed} to {seed + restarts - 1}, at most {cap} evaluations, n = {restarts}. ratio: evaluations"
    )
    print(
        "against the default, geometric mean over seeds (cap where not found) and its 95 % bootstrap band. A median of"
    )
    print(
        "so few restarts is noisy, and of many bands one in twenty misses 1 by chance: verdicts are hints, not proof."
    )
    print(
        f"{'problem':9s} {'choice':28s} {'ok/n':>7s} {'median':>7s} {'mean':>6s} {'ratio':>6s} {'band':>13s} {'ms/it':>6s}"
    )
    rows: list[dict] = []
    spent: dict[str, list[np.ndarray]] = {choice: [] for choice in choices}

    def line(problem: str, choice: str, numbers: str, these: np.ndarray, speed: str) -> None:
        others = np.concatenate(spent["default"][-len(problems) :]) if problem == "all" else spent["default"][-1]
        ratio, low, high = ratio_with_band(these, others)
        verdict = "helps" if high < 1 else "hurts" if low > 1 else "no difference shown"
        text = "" if choice == "default" else f"{ratio:6.2f} {f'{low:.2f}-{high:.2f}':>13s}"
        print(
            f"{problem:9s} {choice:28s} {numbers} {text:20s} {speed:>6s}  {verdict if text else ''}".rstrip(),
            flush=True,
        )

    for formula in problems:
        for choice, options in choices.items():
            result = row(formula, choice, {"method": "gofee", **options}, restarts, cap, seed, workers)
            rows.append(result)
            spent[choice].append(costs(result, cap))
            median = result["median"]
            shown = "-" if median is None or not np.isfinite(median) else f"{median:.0f}"
            numbers = f"{result['ok']:3d}/{result['n']:<3d} {shown:>7s} {result['mean_per_success']:6.0f}"
            line(formula, choice, numbers, spent[choice][-1], f"{result['ms_per_iteration']:.0f}")
    if len(problems) > 1:
        for choice, parts in spent.items():
            every = np.concatenate(parts)
            found = sum(r["ok"] for r in rows if r["arm"] == choice)
            line("all", choice, f"{found:3d}/{len(every):<3d} {'':7s} {'':6s}", every, "")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", action="append", choices=sorted(TARGETS))
    parser.add_argument("--arm", action="append", choices=sorted(ARMS))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="options of the recipe, as JSON"
    )
    parser.add_argument("--table", action="store_true", help="every choice of gofee's options against the default")
    parser.add_argument(
        "--choice", action="append", default=[], choices=list(CHOICES), help="with --table: these only; all if left out"
    )
    parser.add_argument("--restarts", type=int, default=40)
    parser.add_argument("--cap", type=int, default=400, help="true evaluations per restart")
    parser.add_argument("--seed", type=int, default=0, help="of the first restart")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="write every restart here")
    parser.add_argument("--kept", help="print the rows of such a file, run nothing")
    arguments = parser.parse_args()
    extra = {}
    for item in arguments.set:
        name, _, value = item.partition("=")
        try:
            extra[name] = json.loads(value)
        except ValueError:
            extra[name] = value
        if isinstance(extra[name], dict) and name != "prior":
            extra[name] = {int(first): number for first, number in extra[name].items()}
    if arguments.table:
        if arguments.arm or extra:
            parser.error("--table has arms and settings of its own: leave out --arm and --set")
        problems = arguments.problem or ["Au4Ni4"]
        rows = table(problems, arguments.choice, arguments.restarts, arguments.cap, arguments.seed, arguments.workers)
        write(arguments.json, rows)
        return
    print(
        f"{'problem':9s} {'arm':36s} {'ok/n':>7s} {'median':>7s} {'mean':>8s} {'by 50/100/150/400':>18s} {'ms/it':>6s}"
    )
    if arguments.kept:
        with open(arguments.kept) as file:
            for kept in json.load(file):
                show(summary(kept["problem"], kept["arm"], kept["restarts"]), kept["arm"])
        return
    rows = []
    for formula in arguments.problem or ["Au4Ni4"]:
        for arm in arguments.arm or ["gofee"]:
            options = {**ARMS[arm], **extra}
            result = row(formula, arm, options, arguments.restarts, arguments.cap, arguments.seed, arguments.workers)
            rows.append(result)
            show(result, arm + "".join(f" {item}" for item in arguments.set))
    write(arguments.json, rows)


def show(result: dict, label: str) -> None:
    median = "-" if result["median"] is None or not np.isfinite(result["median"]) else f"{result['median']:.0f}"
    by = "/".join(str(number) for number in result["done_by"].values())
    print(
        f"{result['problem']:9s} {label:36s} {result['ok']:3d}/{result['n']:<3d} {median:>7s} "
        f"{result['mean_per_success']:8.0f} {by:>18s} {result['ms_per_iteration']:6.1f}",
        flush=True,
    )


def write(path: str | None, rows: list[dict]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
