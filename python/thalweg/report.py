"""The report of one or several run folders: one HTML page that works from a file, without a network."""

from __future__ import annotations

import html
import importlib.util
import io
import json
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import thalweg
from thalweg.campaign import Results, load_results, write_atomically
from thalweg.errors import ThalwegError
from thalweg.statistics import SuccessCurve, describe_band, energy_curves, success_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["report", "success_curves", "write_figures"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#6b7280"

# The structures of the 3D section: the best of each restart and so many more, energies at least this far apart [eV].
MORE_STRUCTURES, DISTINCT = 100, 0.001

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#374151",
    "ytick.color": "#374151",
    "legend.frameon": False,
    "lines.solid_capstyle": "butt",
    "svg.fonttype": "path",
    "text.parse_math": False,  # a folder's name may have dollars
    "svg.hashsalt": "thalweg",
}


def report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Writes the report of run folders to `out`; several folders are compared. Folders may still be running.

    Raises ThalwegError when there is no folder, one is not a run folder, or `out` cannot be written.
    """
    if not folders:
        raise ThalwegError("a report needs at least one run folder")
    results = [load_results(folder) for folder in folders]
    out = Path(out)
    write_atomically(out, page(results))
    return out


# ---- numbers -------------------------------------------------------------------------------------------------


def success_curves(results: Results) -> dict[str, SuccessCurve]:
    """Curves by name: "delivered" (a counted evaluation reached the target) and, where it could be computed, "success"
    (an evaluated structure relaxes to the target). Empty without a target or without evaluations."""
    target = results.configuration.search.target
    entries = [entry for entry in results.restarts if entry.get("evaluations")]
    if target is None or not entries:
        return {}
    curves = {}
    for name in ("success", "delivered"):
        if name == "success" and not all("checked" in entry for entry in entries):
            continue
        counts = [entry.get(f"{name}_evaluation") for entry in entries]
        ends = [entry["evaluations"] if count is None else count for entry, count in zip(entries, counts, strict=True)]
        curves[name] = success_curve(ends, [count is not None for count in counts])
    return curves


def _energies(results: Results) -> dict[int, np.ndarray]:
    """Energies of each restart in order, NaN where an evaluation failed; restarts without a single one are left out."""
    found = {
        index: np.where(history.rows.ok, history.rows.columns["energy"], np.nan)
        for index, history in results.histories.items()
        if len(history.rows)
    }
    return {index: energies for index, energies in found.items() if np.any(np.isfinite(energies))}


def _count(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:.0f}"


def _median_text(curve: SuccessCurve | None) -> str:
    """The median with its band and the number of restarts behind it."""
    if curve is None:
        return "no target set"
    if math.isinf(curve.quantile(0.5)):
        return f"{curve.successes} of {curve.restarts} restarts so far"
    return f"95 % band {describe_band(curve)}; {curve.successes} of {curve.restarts} restarts"


def _energy(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f} eV"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


# ---- figures -------------------------------------------------------------------------------------------------


def _figure(width: float = 6.4, height: float = 3.6) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(axes: Any) -> None:
    """Above the axes, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=2 if len(labels) > 1 else 1,
            fontsize=9,
        )


def _labelled(figure: Figure, label: str) -> Figure:
    """The same figure with words for those who cannot see it."""
    figure.set_label(label)
    return figure


def _svg(figure: Figure | None) -> str:
    """Inline SVG, without the metadata that names addresses; nothing for no figure."""
    if figure is None:
        return ""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(str(figure.get_label()), quote=True)}"', 1)


def _draw_success(axes: Any, curve: SuccessCurve, colour: str, label: str, *, dashed: bool = False) -> None:
    axes.fill_between(curve.evaluations, curve.lower, curve.upper, step="post", color=colour, alpha=0.15, linewidth=0)
    style = "--" if dashed else "-"
    axes.step(curve.evaluations, curve.success, where="post", color=colour, lw=2, ls=style, label=label)


def _success_figure(named: Sequence[tuple[str, dict[str, SuccessCurve]]]) -> Figure:
    figure = _figure()
    axes = figure.add_subplot()
    words = {"success": "relaxes to the target", "delivered": "delivered: evaluated at the target"}
    for k, (name, curves) in enumerate(named):
        if len(named) == 1:
            for j, (kind, curve) in enumerate(curves.items()):
                _draw_success(axes, curve, COLOURS[j], words[kind], dashed=kind == "success")
        elif "delivered" in curves:
            _draw_success(axes, curves["delivered"], COLOURS[k % len(COLOURS)], name)
    axes.set(xlabel="true evaluations", ylabel="fraction of restarts", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    _legend(axes)
    return _labelled(figure, "fraction of restarts that reached the target, against true evaluations")


def _energy_limits(curves: Sequence[Any], target: float | None) -> tuple[float, float]:
    """Random starts can be thousands of eV high: the axis shows from the lowest up to where most restarts soon are."""
    lowest = min(float(np.nanmin(curve.best)) for curve in curves)
    lowest = lowest if target is None else min(lowest, target)
    heights = []
    for curve in curves:
        final = curve.best[:, -1]
        early = curve.best[:, min(curve.best.shape[1] - 1, max(3, curve.best.shape[1] // 20))]
        heights += [np.nanmax(final), np.nanpercentile(early, 75)]
    highest = float(np.nanmax(heights))
    margin = 0.06 * max(highest - lowest, 0.01)
    return lowest - margin, highest + margin


def _energy_figure(results: Results) -> Figure:
    curves = energy_curves(list(_energies(results).values()))
    target = results.configuration.search.target
    figure = _figure()
    axes = figure.add_subplot()
    for k, best in enumerate(curves.best):
        label = "each restart" if k == 0 else None
        axes.step(curves.evaluations, best, where="post", color=GREY, lw=0.7, alpha=0.45, label=label)
    if len(curves.best) > 1:
        low, high = curves.mean - curves.standard_error, curves.mean + curves.standard_error
        axes.fill_between(curves.evaluations, low, high, step="post", color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.step(
            curves.evaluations,
            curves.mean,
            where="post",
            color=COLOURS[0],
            lw=2.4,
            label="mean and its standard error",
        )
    if target is not None:
        axes.axhline(target.energy, color=COLOURS[2], lw=1.2, ls=":", label=f"target {target.energy:g} eV")
    axes.set(xlabel="true evaluations", ylabel="best energy so far (eV)")
    axes.set_xlim(0, max(2, len(curves.evaluations)))
    axes.set_ylim(*_energy_limits([curves], target.energy if target else None))
    _legend(axes)
    return _labelled(figure, "best energy so far against true evaluations")


def _comparison_figure(named: Sequence[tuple[str, Results]]) -> Figure:
    figure = _figure()
    axes = figure.add_subplot()
    drawn = []
    for k, (name, results) in enumerate(named):
        energies = list(_energies(results).values())
        if not energies:
            continue
        curves = energy_curves(energies)
        drawn.append(curves)
        colour = COLOURS[k % len(COLOURS)]
        low, high = curves.mean - curves.standard_error, curves.mean + curves.standard_error
        axes.fill_between(curves.evaluations, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
        axes.step(curves.evaluations, curves.mean, where="post", color=colour, lw=2, label=name)
    axes.set(xlabel="true evaluations", ylabel="mean best energy so far (eV)")
    axes.set_xlim(left=0)
    if drawn:
        axes.set_ylim(*_energy_limits(drawn, None))
        _legend(axes)
    return _labelled(figure, "mean best energy so far of each run folder, against true evaluations")


def _final_figure(results: Results) -> Figure | None:
    """Best energy of each restart, sorted: how often the lowest ones are found."""
    found = sorted(float(np.nanmin(e)) for e in _energies(results).values() if np.any(np.isfinite(e)))
    if len(found) < 2:
        return None
    from matplotlib.ticker import MaxNLocator

    target = results.configuration.search.target
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot(np.arange(1, len(found) + 1), found, "o", color=COLOURS[0], ms=5, label="each restart")
    if target is not None:
        axes.axhline(target.energy, color=COLOURS[2], lw=1.2, ls=":", label=f"target {target.energy:g} eV")
    axes.set(xlabel="restarts, sorted", ylabel="best energy (eV)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", useOffset=False)
    low, high = axes.get_ylim()
    if high - low < 0.01:  # differences below the accuracy of a relaxation should not look large
        axes.set_ylim((low + high) / 2 - 0.005, (low + high) / 2 + 0.005)
    _legend(axes)
    return _labelled(figure, "best energy of each restart, sorted")


def _stage_figure(results: Results) -> Figure | None:
    totals: dict[str, float] = {}
    for history in results.histories.values():
        for name, seconds in history.stage_seconds.items():
            totals[name] = totals.get(name, 0.0) + seconds
    whole = sum(totals.values())
    if whole <= 0:
        return None
    names = list(totals)[::-1]
    figure = _figure(6.4, 0.8 + 0.34 * len(names))
    axes = figure.add_subplot()
    bars = axes.barh(names, [totals[name] for name in names], color=COLOURS[0], height=0.62)
    axes.bar_label(
        bars,
        [f"{_seconds(totals[name])}  ({100 * totals[name] / whole:.0f} %)" for name in names],
        padding=4,
        fontsize=9,
    )
    axes.set_xlabel("seconds, all restarts")
    axes.margins(x=0.28)
    axes.grid(axis="y", visible=False)
    return _labelled(figure, "time by stage")


def _portraits(results: Results) -> dict[int, dict[str, np.ndarray]]:
    """What the agents of the restarts left to draw; a file that cannot be read is left out."""
    found = {}
    for index in results.histories:
        path = results.folder.portrait(index)
        try:
            if path.is_file() and path.stat().st_size < 64 << 20:
                with np.load(path, allow_pickle=False) as file:
                    found[index] = {name: file[name] for name in file.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            continue
    return found


def _training_figure(results: Results) -> Figure | None:
    """Loss of the agents against episodes, averaged over 25."""
    curves = {i: np.ravel(arrays["losses"]) for i, arrays in _portraits(results).items() if "losses" in arrays}
    curves = {i: curve for i, curve in curves.items() if len(curve) > 1 and np.isfinite(curve).all()}
    if not curves:
        return None
    figure = _figure()
    axes = figure.add_subplot()
    for k, curve in enumerate(curves.values()):
        width = min(25, len(curve))
        mean = np.convolve(curve, np.ones(width) / width, "valid")
        axes.plot(np.arange(width, len(curve) + 1), mean, color=COLOURS[k % len(COLOURS)], lw=1.2, alpha=0.8)
    axes.set(xlabel="episodes", ylabel="loss, mean of 25", ylim=(0, None))
    return _labelled(figure, "loss of the agents against episodes")


def _q_figure(results: Results) -> Figure | None:
    """Q of the next atom along the best build of the restart that found the lowest energy."""
    energies = {i: float(np.nanmin(e)) for i, e in _energies(results).items() if np.any(np.isfinite(e))}
    portraits = {i: arrays for i, arrays in _portraits(results).items() if "q" in arrays and i in energies}
    if not portraits:
        return None
    from ase.data import chemical_symbols
    from matplotlib.transforms import Affine2D

    arrays = portraits[min(portraits, key=lambda i: energies[i])]
    q, allowed, placed, template = (arrays[name] for name in ("q", "allowed", "placed", "template"))
    value = np.where(allowed, q, -np.inf).max(axis=1)
    value = np.where(allowed.any(axis=1), value, np.nan)
    columns = min(3, len(q))
    rows = -(-len(q) // columns)
    plane, counts = arrays["plane"], np.array(value.shape[1:])
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1]]) * counts @ plane
    (left, bottom), (right, top) = corners.min(axis=0), corners.max(axis=0)
    figure = _figure(2.2 * columns + 0.6, (2.0 * (top - bottom) / (right - left) + 0.35) * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    lattice = Affine2D(np.vstack([np.column_stack([plane.T, [0, 0]]), [0, 0, 1]]))  # of grid steps that may be skewed
    for panel, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if panel >= len(q):
            continue
        extent = (0, counts[0], 0, counts[1])
        image = axes.imshow(
            value[panel].T, origin="lower", extent=extent, vmin=-1, vmax=1, cmap="viridis", aspect="equal",
            transform=lattice + axes.transData,
        )  # fmt: skip
        axes.set(xlim=(left, right), ylim=(bottom, top))
        there = np.concatenate([template, placed[: arrays["steps"][panel]]])
        for s, x, y in there:
            axes.plot(
                *((x + 0.5, y + 0.5) @ plane), "o", ms=6, mec="black", mfc=COLOURS[int(s) % len(COLOURS)], mew=0.6,
                clip_on=False,
            )  # fmt: skip
        s, x, y = placed[arrays["steps"][panel]]
        axes.plot(*((x + 0.5, y + 0.5) @ plane), "o", ms=9, mec="#D55E00", mfc="none", mew=1.6, clip_on=False)
        symbol = chemical_symbols[int(arrays["species"][int(s)])]
        axes.set_title(f"{symbol}, atom {int(arrays['steps'][panel]) + 1}", fontsize=8.5)
    figure.colorbar(image, ax=grid, shrink=0.6, label="Q of the next atom")
    return _labelled(figure, "Q-maps along the best build; the ring is the atom that was placed next")


def figures(results: Sequence[Results]) -> dict[str, Figure]:
    """Every figure of the page by the name of its file; those of several folders begin with the folder's name.

    To be called and drawn under `matplotlib.rc_context(STYLE)`.
    """
    named = list(zip(_names([found.folder.path for found in results]), results, strict=True))
    found: dict[str, Figure | None] = {}
    if len(named) > 1:
        curves = [(name, success_curves(one)) for name, one in named]
        with_target = [(name, curve) for name, curve in curves if "delivered" in curve]
        if with_target:
            found["success"] = _success_figure(_padded(with_target))
        if len({_problem_text(one) for one in results}) == 1 and any(_energies(one) for one in results):
            found["energy"] = _comparison_figure(named)
    for name, one in named:
        before = f"{name.replace('/', '_')}_" if len(named) > 1 else ""
        own = success_curves(one)
        if own:
            found[f"{before}success"] = _success_figure([(name, own)])
        if _energies(one):
            found[f"{before}energy"] = _energy_figure(one)
            found[f"{before}restarts"] = _final_figure(one)
            found[f"{before}stages"] = _stage_figure(one)
            found[f"{before}training"] = _training_figure(one)
            found[f"{before}qmaps"] = _q_figure(one)
    return {name: figure for name, figure in found.items() if figure is not None}


def write_figures(folders: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Writes every figure of the report as PNG and SVG into the folder `out`, which is made; returns their paths.

    Raises ThalwegError when one is not a run folder, there is nothing to draw, or `out` cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    results = [load_results(folder) for folder in folders]
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in figures(results).items():
            picture, drawing = io.BytesIO(), io.StringIO()
            FigureCanvasAgg(figure)
            figure.savefig(picture, format="png", dpi=200, metadata={"Software": None})
            figure.savefig(drawing, format="svg", metadata={"Date": None})
            for ending, content in (("png", picture.getvalue()), ("svg", drawing.getvalue())):
                path = Path(out) / f"{name}.{ending}"
                write_atomically(path, content)
                paths.append(path)
    if not paths:
        raise ThalwegError(
            f"there is nothing to draw yet in {', '.join(map(str, folders))}: no evaluation has succeeded"
        )
    return paths


# ---- structures ----------------------------------------------------------------------------------------------


def chosen_structures(named: Sequence[tuple[str, Results]]) -> list[tuple[float, str, int, int, Any]]:
    """(energy, run, restart, evaluation, structure) by energy: best of each restart and the lowest distinct ones."""
    found = []
    for name, results in named:
        for index, energies in _energies(results).items():
            if np.any(np.isfinite(energies)):
                best = int(np.nanargmin(energies))
                found += [(float(energies[row]), name, index, int(row), row == best) for row in _finite(energies)]
    found.sort(key=lambda entry: entry[:4])
    chosen, more, last = [], 0, -math.inf
    for energy, name, index, row, is_best in found:
        distinct = energy - last >= DISTINCT and more < MORE_STRUCTURES
        if distinct or is_best:
            chosen.append((energy, name, index, row))
        if distinct:
            more, last = more + 1, energy
    by_name = dict(named)
    return [
        (energy, name, index, row + 1, by_name[name].histories[index].rows[row].to_ase()[0])
        for energy, name, index, row in chosen
    ]


def _finite(energies: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.isfinite(energies))


def _structures(named: Sequence[tuple[str, Results]]) -> str:
    """The 3D viewer with its map, chemiscope's JavaScript inlined; without chemiscope, how to get it."""
    chosen = chosen_structures(named)
    if not chosen:
        return "<p>No structure has been evaluated yet.</p>"
    specification = importlib.util.find_spec("chemiscope")
    if specification is None or specification.origin is None:
        return (
            "<p>The interactive view of the structures needs the Python package chemiscope: "
            "<code>pip install chemiscope</code>, then run <code>thalweg report</code> again. "
            "The structures themselves are in <code>best.extxyz</code>.</p>"
        )
    script = Path(specification.origin).parent / "sphinx" / "static" / "chemiscope.min.js"
    if not script.is_file():
        return (
            "<p>The installed chemiscope does not bring its JavaScript; <code>pip install 'chemiscope>=0.8'</code> "
            "does. The structures themselves are in <code>best.extxyz</code>.</p>"
        )
    from chemiscope import create_input

    energies, names, restarts, evaluations, structures = zip(*chosen, strict=True)
    properties = {
        "energy": {"target": "structure", "values": np.array(energies), "units": "eV"},
        "evaluation": {"target": "structure", "values": np.array(evaluations, float)},
        "restart": {"target": "structure", "values": np.array(restarts, float)},
    }
    if len(named) > 1:
        properties["run"] = {"target": "structure", "values": list(names)}
    periodic = any(structure.pbc.any() for structure in structures)
    data = create_input(
        structures=list(structures),
        metadata={"name": ", ".join(name for name, _ in named)},
        properties=properties,
        settings={
            "target": "structure",
            "map": {
                "x": {"property": "evaluation"},
                "y": {"property": "energy"},
                "color": {"property": "restart"},
            },
            "structure": [{"bonds": True, "spaceFilling": False, "unitCell": periodic, "axes": "off"}],
        },
    )
    # "</" could end the script element early and "<!--" keep it from ending; the escape is the same text to JSON
    dataset = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    library = script.read_text(encoding="utf-8").replace("</script", "<\\/script")
    return f"""
<p>Click a point to see its structure; drag to turn it. Structure 0 is the lowest found.</p>
<div class="viewer">
  <div class="half"><div id="viewer-map"></div></div>
  <div class="half"><div id="viewer-structure"></div><div id="viewer-info"></div></div>
</div>
<div id="viewer-meta" hidden></div>
<p id="viewer-error" class="error" hidden></p>
<script type="application/json" id="viewer-data">{dataset}</script>
<script>{library}</script>
<script>
(async () => {{
  const problem = (text) => {{
    const place = document.getElementById("viewer-error");
    place.hidden = false;
    place.textContent = "The 3D view could not start: " + text;
  }};
  try {{
    const data = JSON.parse(document.getElementById("viewer-data").textContent);
    const warnings = new Chemiscope.Warnings();
    warnings.addHandler((message) => console.warn(message));
    await Chemiscope.DefaultVisualizer.load(
      {{ map: "viewer-map", structure: "viewer-structure", info: "viewer-info", meta: "viewer-meta" }}, data, warnings);
    document.documentElement.dataset.viewer = "ready";
  }} catch (error) {{ problem(error.message || error); }}
}})();
</script>"""


# ---- the page ------------------------------------------------------------------------------------------------

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f3f4f6; color: #111827;
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 0 0 2px; } h2 { font-size: 19px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 0 0 6px; }
.quiet { color: #6b7280; } .error { color: #b91c1c; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px; margin: 16px 0; }
.card, .panel { background: #fff; border: 1px solid #e5e7eb; border-radius: 10px; padding: 12px 16px; }
.card .label { color: #6b7280; font-size: 12.5px; }
.card .value { font-size: 21px; font-weight: 600; overflow-wrap: anywhere; }
.card .note { color: #6b7280; font-size: 12.5px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 12px; }
.figures p { margin: 6px 0 0; font-size: 12.5px; }
.figures svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; max-height: 460px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid #f0f1f3; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; color: #6b7280; font-weight: 500; }
th.text, td.text { text-align: left; white-space: normal; } tr.best td { background: #ecfdf5; }
pre { margin: 0; overflow-x: auto; font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
.viewer { display: flex; flex-wrap: wrap; gap: 16px; }
.viewer .half { flex: 1 1 440px; min-width: 0; height: 560px; position: relative;
  display: flex; flex-direction: column; }
#viewer-map { flex: 1; min-height: 0; display: flex; flex-direction: column; }
#viewer-map > div:first-child { flex: 1; min-height: 0; height: auto !important; }
#viewer-structure { flex: 1; min-height: 0; width: 100%; } #viewer-info { flex-shrink: 0; }
"""

# No address may be loaded, whatever the page holds.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "font-src data:; worker-src blob:; connect-src data: blob:"
)


def _card(label: str, value: str, note: str = "") -> str:
    note = f'<div class="note">{html.escape(note)}</div>' if note else ""
    return (
        f'<div class="card"><div class="label">{html.escape(label)}</div>'
        f'<div class="value">{html.escape(value)}</div>{note}</div>'
    )


def _panel(title: str, content: str) -> str:
    return f'<section class="panel"><h3>{html.escape(title)}</h3>{content}</section>' if content else ""


def _table(headers: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Any]], best: int | None = None) -> str:
    """headers: (title, is text). Cells that are None are shown as a dash."""

    def cell(tag: str, value: Any, text: bool) -> str:
        shown = "–" if value is None else html.escape(str(value))
        return f'<{tag} class="text">{shown}</{tag}>' if text else f"<{tag}>{shown}</{tag}>"

    head = "".join(cell("th", title, text) for title, text in headers)
    lines = []
    for k, row in enumerate(rows):
        cells = "".join(cell("td", value, headers[j][1]) for j, value in enumerate(row))
        lines.append(f'<tr class="best">{cells}</tr>' if k == best else f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _problem_text(results: Results) -> str:
    problem = results.configuration.problem
    symbols = problem.symbols
    if not isinstance(symbols, str):
        symbols = "".join(f"{name}{count if count > 1 else ''}" for name, count in symbols.items())
    if problem.template is None:
        return str(symbols)
    for history in results.histories.values():
        if history.problem.template is not None:
            return f"{symbols} on {history.problem.template.to_ase()[0].get_chemical_formula()}"
    return f"{symbols} on {problem.template}"


def _cards(results: Results) -> str:
    summary, search = results.summary, results.configuration.search
    finished = sum(bool(entry.get("finished")) for entry in results.restarts)
    target = search.target
    best = summary["best_energy"]
    note = ""
    if target is not None and best is not None:
        reached = best <= target.threshold
        note = f"target {target.energy:g} eV {'reached' if reached else 'not reached'}"
    cards = [
        _card("Problem", _problem_text(results)),
        _card("Method", search.method, f"calculator {results.configuration.calculator.name}"),
        _card("Best energy", _energy(best), note),
        _card("True evaluations", str(summary["evaluations"]), f"{_seconds(summary['seconds'])} of searching"),
        _card("Restarts", f"{finished} of {search.restarts} finished", f"seeds from {search.seed}"),
    ]
    curves = success_curves(results)
    words = {"success": "Median evaluations to success", "delivered": "Median evaluations to delivery"}
    for name, curve in curves.items():
        cards.append(_card(words[name], _count(curve.quantile(0.5)), _median_text(curve)))
    return f'<div class="cards">{"".join(cards)}</div>'


def _restart_table(results: Results) -> str:
    headers = [
        ("restart", False), ("seed", False), ("best energy (eV)", False), ("iterations", False), ("evaluations", False),
        ("delivered at", False), ("success at", False), ("time", False), ("state", True),
    ]  # fmt: skip
    rows, energies = [], []
    for entry in results.restarts:
        energy = entry.get("best_energy")
        energies.append(math.inf if energy is None else energy)
        rows.append(
            (
                entry["index"], entry.get("seed"), None if energy is None else f"{energy:.4f}", entry.get("iterations"),
                entry.get("evaluations"), entry.get("delivered_evaluation"), entry.get("success_evaluation"),
                _seconds(entry.get("seconds") or 0.0), entry.get("reason") or "running or interrupted",
            )
        )  # fmt: skip
    best = int(np.argmin(energies)) if energies and math.isfinite(min(energies)) else None
    failed = [
        f"restart {index}, evaluation {row + 1}: {reason}"
        for index, history in results.histories.items()
        for row, reason in history.reasons.items()
    ]
    notes = [*results.problems]
    if failed:
        notes.append(f"{len(failed)} true evaluations failed; the first: {failed[0]}")
    text = "".join(f'<p class="error">{html.escape(note)}</p>' for note in notes)
    return f'{text}<div class="scroll">{_table(headers, rows, best)}</div>'


def _folder_section(name: str, results: Results, structures: str = "") -> str:
    curves = success_curves(results)
    figures = []
    if curves:
        note = (
            '<p class="quiet">Delivered: a counted evaluation has the target energy. Relaxes: an evaluated structure '
            "has it after a relaxation in the true potential that is not counted. Bands: 95 %.</p>"
        )
        figures.append(_panel("Restarts that have reached the target", _svg(_success_figure([(name, curves)])) + note))
    if _energies(results):
        figures.append(_panel("Best energy so far", _svg(_energy_figure(results))))
        figures.append(_panel("Best energy of each restart", _svg(_final_figure(results))))
        figures.append(_panel("Time by stage", _svg(_stage_figure(results))))
        figures.append(_panel("Training of the agents", _svg(_training_figure(results))))
        figures.append(_panel("Q-maps along the best build", _svg(_q_figure(results))))
    configuration = html.escape(results.configuration.to_toml())
    unfolded = " open" if structures else ""
    return f"""{_cards(results)}
<div class="figures">{"".join(figures)}</div>
{structures}
<h2>Restarts</h2><section class="panel">{_restart_table(results)}</section>
<h2>Configuration</h2><section class="panel"><details{unfolded}>
<summary class="quiet">config.toml, resolved</summary>
<pre>{configuration}</pre></details></section>"""


def _comparison(named: Sequence[tuple[str, Results]]) -> str:
    headers = [
        ("run", True), ("problem", True), ("method", True), ("calculator", True), ("restarts", False),
        ("best energy (eV)", False), ("evaluations", False), ("delivered", False), ("median to delivery", False),
        ("95 % band", False),
    ]  # fmt: skip
    rows, curves = [], []
    for name, results in named:
        found = success_curves(results)
        curve = found.get("delivered")
        if curve is not None:
            curves.append((name, found))
        summary, configuration = results.summary, results.configuration
        best = summary["best_energy"]
        band = None if curve is None else describe_band(curve)
        rows.append(
            (
                name, _problem_text(results), configuration.search.method, configuration.calculator.name,
                len(results.restarts), None if best is None else f"{best:.4f}", summary["evaluations"],
                None if curve is None else f"{curve.successes} of {curve.restarts}",
                None if curve is None else _count(curve.quantile(0.5)), band,
            )
        )  # fmt: skip
    figures = []
    if curves:
        figures.append(_panel("Restarts that have delivered the target", _svg(_success_figure(_padded(curves)))))
    if len({_problem_text(results) for _, results in named}) == 1 and any(_energies(results) for _, results in named):
        figures.append(_panel("Mean best energy so far", _svg(_comparison_figure(named))))
    return f"""<h2>Comparison</h2><section class="panel"><div class="scroll">{_table(headers, rows)}</div></section>
<div class="figures" style="margin-top:12px">{"".join(figures)}</div>"""


def _padded(curves: list[tuple[str, dict[str, SuccessCurve]]]) -> list[tuple[str, dict[str, SuccessCurve]]]:
    """At least two entries, so that a lone curve among several folders is still drawn as a comparison."""
    return curves if len(curves) > 1 else [*curves, ("", {})]


def page(results: Sequence[Results]) -> str:
    """The whole page as text."""
    import matplotlib

    names = _names([found.folder.path for found in results])
    named = list(zip(names, results, strict=True))
    structures = f'<h2>Structures</h2><section class="panel">{_structures(named)}</section>'
    with matplotlib.rc_context(STYLE):
        if len(named) == 1:
            body = _folder_section(*named[0], structures)
        else:
            parts = [_comparison(named), structures]
            parts += [f"<h2>{html.escape(name)}</h2>{_folder_section(name, found)}" for name, found in named]
            body = "".join(parts)
    title = html.escape(", ".join(names))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · thalweg</title>
<style>{_CSS}</style></head>
<body><main>
<h1>{title}</h1><div class="quiet">Search report, written by thalweg {thalweg.__version__}. Energies in eV,
lengths in angstrom.</div>
{body}
</main></body></html>
"""


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as much of their path as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise ThalwegError("the same run folder was given twice")
