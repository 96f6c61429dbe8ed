"""Success curves with confidence bands from what benchmarks/search.py wrote.

python benchmarks/search.py --arm gofee --arm "basin hopping" --cap 3000 --json arms.json
python benchmarks/figure.py arms.json docs/success.png
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from thalweg.statistics import success_curve

# Okabe and Ito: told apart by colour-blind readers too
COLOURS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("out", help=".png or .svg")
    arguments = parser.parse_args()
    with open(arguments.results) as file:
        rows = json.load(file)
    figure = Figure(figsize=(7.2, 3.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(r["delivered"] or r["evaluations"] for row in rows for r in row["restarts"])
    for row, colour in zip(rows, COLOURS, strict=False):
        times = [r["delivered"] or r["evaluations"] for r in row["restarts"]]
        curve = success_curve(times, [r["delivered"] is not None for r in row["restarts"]])
        # A curve that has reached the top ends there; the others hold until the longest restart.
        ended = curve.success[-1] == 1.0
        x, success, lower, upper = (
            values if ended else np.append(values, last)
            for values, last in (
                (curve.evaluations, longest),
                (curve.success, curve.success[-1]),
                (curve.lower, curve.lower[-1]),
                (curve.upper, curve.upper[-1]),
            )
        )
        axes.fill_between(x, lower, upper, alpha=0.18, lw=0, step="post", color=colour)
        median = curve.quantile(0.5)
        label = f"{row['arm']}: {row['ok']}/{row['n']}" + (f", median {median:.0f}" if np.isfinite(median) else "")
        axes.plot(x, success, drawstyle="steps-post", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlim(5, longest)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("true energy evaluations (all counted)")
    axes.set_ylabel("restarts at the minimum")
    axes.set_title(f"{rows[0]['problem']}, EMT: {rows[0]['n']} restarts, 95 % band", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(rows))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(arguments.out)


if __name__ == "__main__":
    main()
