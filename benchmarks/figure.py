"""Success curves with confidence bands from what benchmarks/search.py or asla.py wrote, one panel a problem.

kept=benchmarks/data
python benchmarks/figure.py $kept/search.json $kept/agox_gofee_au4ni4.json --problem Au4Ni4 -o docs/success.png
python benchmarks/figure.py $kept/search.json --problem Ni6/Au111 --problem B4N4 --problem aniline -o docs/others.png
python benchmarks/figure.py $kept/asla/{graphene,aniline,benzene,Ni4Au4}.jsonl --without "lr 1e-3" \
    --without "relaxed in the true potential" -o docs/asla.png      # the latter counts episodes, not evaluations
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from asla import kept
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from thalweg.bench import TOLERANCE
from thalweg.statistics import first_reaching, success_curve

# Okabe and Ito: told apart by colour-blind readers too; then dashed
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def rows_of(path: str) -> list[dict[str, Any]]:
    """The rows of a file of benchmarks/search.py, of one of benchmarks/asla.py (.jsonl), or AGOX's kept restarts as one."""
    if path.endswith(".jsonl"):
        return rows_of_arms(kept(Path(path)))
    with open(path) as file:
        found = json.load(file)
    if isinstance(found, list):
        return found
    restarts = [
        {
            "delivered": first_reaching(one["energies"], found["minimum"] + TOLERANCE),
            "evaluations": len(one["energies"]),
        }
        for one in found["restarts"]
    ]
    return [row_of(found["problem"]["symbols"], f"AGOX {found['versions']['agox']} GOFEE", restarts)]


def rows_of_arms(restarts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for one in restarts:
        delivered = one["evaluations"] if one["success"] else None
        arms.setdefault(one["arm"], []).append({"delivered": delivered, "evaluations": one["evaluations"]})
    return [row_of(restarts[0]["problem"], arm, runs) for arm, runs in arms.items()]


def row_of(problem: str, arm: str, restarts: list[dict[str, Any]]) -> dict[str, Any]:
    """A row as benchmarks/search.py writes it."""
    ok = sum(one["delivered"] is not None for one in restarts)
    return {"problem": problem, "arm": arm, "n": len(restarts), "ok": ok, "restarts": restarts}


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One panel."""
    longest = max(r["delivered"] or r["evaluations"] for row in rows for r in row["restarts"])
    for k, row in enumerate(rows):
        times = [r["delivered"] or r["evaluations"] for r in row["restarts"]]
        curve = success_curve(times, [r["delivered"] is not None for r in row["restarts"]])
        # A curve that has reached the top ends there, the others at their longest restart.
        last = max(times)
        x, success, lower, upper = (
            np.append(values, end)
            for values, end in (
                (curve.evaluations, last),
                (curve.success, curve.success[-1]),
                (curve.lower, curve.lower[-1]),
                (curve.upper, curve.upper[-1]),
            )
        )
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)]}
        axes.fill_between(x, lower, upper, alpha=0.13, lw=0, step="post", **style)
        median = curve.quantile(0.5)
        label = f"{row['arm']}: {row['ok']}/{row['n']}" + (f", median {median:.0f}" if np.isfinite(median) else "")
        line = "-" if k < len(COLOURS) else "--"
        axes.plot(x, success, line, drawstyle="steps-post", label=label, **style)
    axes.set_xscale("log")
    axes.set_xlim(2, max(longest, 100))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if longest <= 500 else (1.0,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("true energy evaluations (all counted)")
    axes.set_title(rows[0]["problem"], fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("-o", "--out", required=True, help=".png or .svg")
    parser.add_argument("--problem", action="append", help="only these")
    parser.add_argument("--without", action="append", default=[], metavar="ARM", help="not these")
    arguments = parser.parse_args()
    problems: dict[str, list[dict[str, Any]]] = {}
    for path in arguments.results:
        for row in rows_of(path):
            wanted = not arguments.problem or row["problem"] in arguments.problem
            if wanted and row["arm"] not in arguments.without:
                problems.setdefault(row["problem"], []).append(row)
    if not problems:
        parser.error(f"no restarts of {arguments.problem} in {arguments.results}")
    wide = len(problems)
    most = max(len(rows) for rows in problems.values())
    figure = Figure(figsize=(max(7.2, 3.4 * wide), 3.2 + 0.16 * most), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, rows in zip(np.atleast_1d(figure.subplots(1, wide, sharey=True)), problems.values(), strict=True):
        draw(axes, rows)
    figure.axes[0].set_ylabel("restarts at the minimum, 95 % band")
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
