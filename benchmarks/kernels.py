"""What the Python side costs: one row per figure, with its target. The compiled core alone: `thalweg_bench` (cpp/bench).

    python benchmarks/kernels.py [--filter text]

One thread, medians. Ratios to ASE are measured in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("THALWEG_NUM_THREADS", "1")

import numpy as np


def median(function, *, budget: float = 1.0, least: int = 5) -> float:
    """Median seconds per call."""
    function()
    times, begin = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def emt() -> None:
    """EMT energy + forces through the ASE calculator, against ASE's own."""
    import ase.calculators.emt
    from ase import Atoms
    from thalweg import Problem, _core
    from thalweg.calculators import EMT

    problem = Problem("Au4Ni4", cell=12.0, box=6.0)
    from thalweg.testing import example_search

    batch = example_search(problem, steps=1).data[0]
    atoms = batch.to_ase()[0]
    shift = [0.0]

    def call(calculator):
        shift[0] += 1e-9  # new positions, or ASE returns what it has
        moved = Atoms(atoms.numbers, atoms.positions + shift[0], cell=atoms.cell)
        moved.calc = calculator
        moved.get_forces()

    ours, theirs = EMT(), ase.calculators.emt.EMT()
    a, b = median(lambda: call(ours)), median(lambda: call(theirs))
    landscape = ours.landscape
    c = median(lambda: _core.evaluate(landscape, batch, threads=1))
    report("EMT Au4Ni4, as ASE calculator", a * 1e6, "us", note=f"ASE {b * 1e6:.0f} us, {b / a:.0f} x")
    report("EMT Au4Ni4, compiled call from Python", c * 1e6, "us", 20, note=f"{b / c:.0f} x ASE")


def random_structures() -> None:
    """Random structures per second through Python."""
    from thalweg import Problem, _core

    problem = Problem("Au4Ni4", cell=12.0, box=6.0)
    count = 2000

    def call():
        _core.random_structures(
            problem.placed_numbers, problem.cell, problem.pbc, np.zeros((0, 3)), np.zeros(0, np.int32),
            box=problem.box_arguments, count=count, key=(1, 2), threads=1,
        )  # fmt: skip

    report("random structures, Au4Ni4", count / median(call), "/s", 50_000, more=True)


def iteration() -> None:
    """A whole GOFEE iteration without the true energy: n = 40 points, 10 candidates, up to 100 surrogate steps."""
    from thalweg import Problem, recipes
    from thalweg.calculators import EMT

    problem = Problem("Au4Ni4", cell=12.0, box=6.0)
    for prior in ("bonding", "repulsive"):
        times = []
        for seed in range(5):
            search = recipes.gofee(
                problem,
                EMT(),
                seed=seed,
                prior=prior,
                random={0: 10, 5: 3},
                rattle={0: 0, 5: 7},
                permute=0,
                polish_every=0,
            )
            for step in search.steps(60):
                if 36 <= step.iteration < 56:  # stages before and after the evaluation, not the evaluation itself
                    times.append(sum(step.seconds.values()) - step.seconds["evaluate"])
            search.close()
        report(f"GOFEE iteration, Au4Ni4, n = 40, {prior} prior", 1e3 * statistics.median(times), "ms", 40)


def store() -> None:
    """Evaluations per second that a store takes in, written one by one and in groups."""
    from thalweg.store import Store
    from thalweg.testing import example_search

    search = example_search(steps=1)
    row, meta = search.data[0], search._meta()
    with tempfile.TemporaryDirectory(dir=os.environ.get("THALWEG_BENCH_DIR")) as folder:
        for sync, n, target in (("each", 300, 300), ("grouped", 10_000, 10_000)):
            with Store(Path(folder) / f"{sync}.db", meta, sync=sync) as journal:
                begin = time.perf_counter()
                for _ in range(n):
                    journal.append("evaluation", 0, {"row": row, "reason": ""}, cost=1.0)
                journal.commit()
                rate = n / (time.perf_counter() - begin)
            name = "synchronous" if sync == "each" else "grouped"
            report(f"store, {name} (disk of {folder})", rate, "evaluations/s", target, more=True)


def import_time() -> None:
    """`import thalweg` over `import numpy`, fresh processes."""
    code = "import time; import numpy; t = time.perf_counter(); import thalweg; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) for _ in range(9)
    ]
    report("import thalweg, over import numpy", 1e3 * statistics.median(times), "ms", 50)


def report(
    name: str, value: float, unit: str, target: float | None = None, *, more: bool = False, note: str = ""
) -> None:
    """One line."""
    verdict = ""
    if target is not None:
        good = value >= target if more else value <= target
        verdict = f"{'at least' if more else 'at most'} {target:,.0f}: {'ok' if good else 'MISSED'}"
    print(f"{name:58s} {value:12,.2f} {unit:14s} {verdict:28s} {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only benchmarks whose name contains this")
    wanted = parser.parse_args().filter
    from thalweg import _core

    print(f"thalweg {_core.__version__}, {_core.active_isa()}, 1 thread")
    for function in (emt, random_structures, iteration, store, import_time):
        if wanted in function.__name__:
            function()


if __name__ == "__main__":
    main()
