"""The command `thalweg`.

Exit codes: 0 done, or stopped in good order and ready to be resumed (--stopped-exit-code gives that case another); 1 a
restart failed; 2 an error in the input or on the disk; 70 a mistake of this program; 130 killed by a second Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from thalweg.campaign import Outcome, Results
    from thalweg.config import Configuration

# Heavy modules are imported inside the commands, so that --help answers at once.

app = typer.Typer(
    name="thalweg",
    help="Finds the lowest-energy arrangement of atoms in as few energy evaluations as can be.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEMO: dict[str, Any] = {
    "problem": {"symbols": "Au4Ni4", "cell": 12.0, "box": 6.0},
    "calculator": {"name": "emt"},
    "search": {
        "method": "gofee",
        "iterations": 100,
        "target": {"energy": 7.8049, "tolerance": 0.001, "stop": True},
    },
}

Restarts = Annotated[int | None, typer.Option("--restarts", min=1, help="Number of restarts.")]
Iterations = Annotated[int | None, typer.Option("--iterations", min=1, help="Iterations per restart.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Restarts at the same time. Default: one per core. Results do not depend on it.",
    ),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option("--max-seconds", min=0.0, help="Stop in good order after so many seconds; `thalweg resume` goes on."),
]


def _recipes(incomplete: str) -> list[str]:
    """For completion on the command line."""
    from thalweg.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error comes from (or THALWEG_DEBUG=1).")
    ] = False,
) -> None:
    if debug:
        os.environ["THALWEG_DEBUG"] = "1"


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option("--out", help="Run folder. Default: thalweg-demo.")] = None,
    restarts: Annotated[int, typer.Option("--restarts", min=1, help="Number of restarts.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the first restart.")] = 0,
    workers: Workers = None,
) -> None:
    """Find the best Au4Ni4 cluster (EMT) with GOFEE: no input needed, well under a minute."""
    from thalweg import campaign
    from thalweg.config import Configuration

    settings = {**DEMO, "search": {**DEMO["search"], "restarts": restarts, "seed": seed}}
    folder = out if out is not None else _unused(Path("thalweg-demo"))
    configuration = campaign.prepare(Configuration.from_dict(settings, source="demo"), folder)
    print("Looking for the best cluster of 4 gold and 4 nickel atoms (effective medium theory).")
    outcome, results = _search(configuration, folder, workers=workers)
    best, target = results.summary["best_energy"], configuration.search.target
    if best is not None and target is not None:
        if best <= target.threshold:
            print(f"Found the known minimum: {best:.4f} eV.")
        else:
            print(f"Did not find the known minimum of {target.energy:.4f} eV this time; best {best:.4f} eV.")
    _finish(outcome, results)


@app.command()
def new(
    recipe: Annotated[
        str, typer.Argument(metavar="[RECIPE]", help="A method; `thalweg info` lists them.", autocompletion=_recipes)
    ] = "gofee",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; - for the screen. Default: RECIPE.toml.")
    ] = None,
) -> None:
    """Write a commented TOML file with every option of a method; `thalweg run` takes it as it is."""
    from thalweg import campaign
    from thalweg.scaffold import commented_configuration

    path = out if out is not None else Path(f"{recipe}.toml")
    text = commented_configuration(recipe, file=f"{recipe}.toml" if str(path) == "-" else path.name)
    if str(path) == "-":
        print(text, end="")
        return
    if not campaign.create(path, text):
        raise _taken(path)
    print(f"{path}: edit it, then thalweg run {path}")


@app.command()
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="What to search and how.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. search.kappa=3.0. May be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the first restart.")] = None,
    restarts: Restarts = None,
    iterations: Iterations = None,
    workers: Workers = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Run folder. Default: named after FILE; a folder of the same configuration goes on."
        ),
    ] = None,
    restart_index: Annotated[
        int | None,
        typer.Option("--restart-index", min=0, help="Run this restart only (job arrays share one run folder)."),
    ] = None,
    max_seconds: MaxSeconds = None,
    stopped_exit_code: Annotated[
        int,
        typer.Option(
            "--stopped-exit-code",
            min=0,
            max=125,
            help="Exit code when stopped before the end; job scripts tell by it that there is more to do.",
        ),
    ] = 0,
) -> None:
    """Search as a TOML file says."""
    from thalweg import campaign
    from thalweg.config import Configuration
    from thalweg.errors import ConfigurationError

    flags = {"seed": seed, "restarts": restarts, "iterations": iterations, "workers": workers}
    overrides = list(settings or []) + [f"search.{key}={value}" for key, value in flags.items() if value is not None]
    configuration = Configuration.load(file, overrides=overrides)
    if restart_index is not None and restart_index >= configuration.search.restarts:
        raise ConfigurationError(
            f"--restart-index {restart_index}: the configuration has {configuration.search.restarts} restarts, "
            f"0 to {configuration.search.restarts - 1}"
        )
    if out is not None:
        folder, configuration = out, campaign.prepare(configuration, out)
    else:
        folder, configuration = _own_folder(Path(file.stem), configuration)
    indices = None if restart_index is None else [restart_index]
    outcome, results = _search(
        configuration,
        folder,
        indices=indices,
        workers=workers,
        max_seconds=max_seconds,
    )
    _finish(outcome, results, stopped_exit_code)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    restarts: Restarts = None,
    iterations: Iterations = None,
    workers: Workers = None,
    max_seconds: MaxSeconds = None,
) -> None:
    """Go on with every restart that is not finished; more restarts or iterations extend the run."""
    from thalweg import campaign
    from thalweg.errors import ConfigurationError

    configuration = campaign.RunFolder(folder).configuration()
    now = {"restarts": configuration.search.restarts, "iterations": configuration.search.iterations}
    for key, value in {"restarts": restarts, "iterations": iterations}.items():
        if value is not None and value < now[key]:
            raise ConfigurationError(f"--{key} {value}: the run has {now[key]} already; it can only be extended")
    if restarts is not None or iterations is not None:
        configuration = configuration.with_search(restarts=restarts, iterations=iterations)
        campaign.write_atomically(campaign.RunFolder(folder).config, configuration.to_toml())
    outcome, results = _search(configuration, folder, workers=workers, max_seconds=max_seconds)
    _finish(outcome, results)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders; several are compared.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page. Default: DIR/report.html, or report.html.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", metavar="FOLDER", help="Write every figure there as PNG and SVG too.")
    ] = None,
) -> None:
    """Write summary.json, best.extxyz and the HTML page of run folders, also while they are running."""
    from thalweg import campaign
    from thalweg.report import report as write_report
    from thalweg.report import write_figures

    for folder in folders:
        campaign.summarise(folder)
    if out is None:
        out = campaign.RunFolder(folders[0]).report if len(folders) == 1 else Path("report.html")
    print(f"report: {write_report(folders, out)}")
    if figures is not None:
        for path in write_figures(folders, figures):
            print(f"figure: {path}")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or a single *.journal file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File that ASE can write: .extxyz, .traj, .db, ...")],
    best: Annotated[bool, typer.Option("--best/--all", help="The best of each restart, or all.")] = False,
    within: Annotated[
        float | None,
        typer.Option("--within", metavar="EV", min=0.0, help="Only energies so far above the lowest of all (eV)."),
    ] = None,
) -> None:
    """Write evaluated structures with energy and forces to a file for ASE, restart by restart in order."""
    from thalweg import campaign
    from thalweg.errors import ConfigurationError

    histories = campaign.histories(source)
    structures = campaign.structures(histories, best=best, within=within)
    if not structures:
        raise ConfigurationError(f"'{source}' holds no evaluated structure yet")
    if out.exists():
        raise _taken(out)
    campaign.export(structures, out)
    print(f"{len(structures)} structures: {out}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A database of AGOX or ASE (.db), or .extxyz.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File that ASE can write: .extxyz, .traj, .db, ...")],
) -> None:
    """Read structures with energy and forces from other programs' files and write them to a file for ASE."""
    from thalweg import campaign
    from thalweg.importing import read_structures

    structures, left_out = read_structures(source)
    if out.exists():
        raise _taken(out)
    campaign.export(structures, out)
    print(f"{len(structures)} structures: {out}")
    if left_out:
        print(f"{left_out} without an energy were left out")


@app.command()
def info() -> None:
    """Show versions, instruction set, threads, calculators, methods and their options."""
    import inspect
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from thalweg import _core
    from thalweg.config import recipe_options
    from thalweg.recipes import RECIPES
    from thalweg.scaffold import toml_value

    print(f"thalweg {_core.__version__}, Python {platform.python_version()}, {platform.platform()}")
    packages = []
    for name in ("numpy", "scipy", "ase", "matplotlib", "chemiscope"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} missing")
    print(", ".join(packages))
    print(f"instruction set {_core.active_isa()}, {_core.default_threads()} threads")
    print(
        "calculators: emt, lj, tersoff (built in), gfn1-xtb, gfn2-xtb (extra xtb), any calculator of ASE by its name, your "
        'own by "module:factory"'
    )
    for name, recipe in RECIPES.items():
        first = (inspect.getdoc(recipe) or "").splitlines()[0]
        print(f"\nmethod {name}: {first}")
        defaults = recipe_options(name)
        for option, parameter in inspect.signature(recipe).parameters.items():
            if option in defaults:
                print(f"  {option} = {toml_value(defaults[option])}")
            elif parameter.kind is parameter.KEYWORD_ONLY and option not in ("store", "seed", "callbacks"):
                print(f"  {option} (default: chosen for the problem)")


bench = typer.Typer(
    help="Time this program, also beside AGOX in the same run.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")

Against = Annotated[str | None, typer.Option("--against", metavar="agox", help="A peer that does the same work.")]
AgainstKernels = Annotated[
    str | None,
    typer.Option(
        "--against", metavar="PEER", help="agox, torch, dscribe, featomic, qmllib or vesin: does the same work."
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here, too.")]
AgoxPython = Annotated[
    Path | None,
    typer.Option(
        "--agox-python",
        metavar="PATH",
        help="Interpreter that has AGOX. Default: an environment in ~/.cache/thalweg that is made when needed (1 GB).",
    ),
]


@bench.command("kernels")
def bench_kernels(
    against: AgainstKernels = None,
    filter: Annotated[str, typer.Option("--filter", help="Only rows whose name contains this.")] = "",
    json_file: JsonFile = None,
    long: Annotated[bool, typer.Option("--long", help="Larger training sets, too.")] = False,
    agox_python: AgoxPython = None,
) -> None:
    """What the parts of a search cost: one thread, processor time, medians."""
    from thalweg.bench import kernels

    raise typer.Exit(kernels(against=against, filter=filter, json_file=json_file, long=long, agox_python=agox_python))


@bench.command("search")
def bench_search(
    against: Against = None,
    restarts: Annotated[int, typer.Option("--restarts", min=1, help="Of each search.")] = 10,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Of AGOX, two evaluations each.")] = 100,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="One file per restart of AGOX; those that are there are kept.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", exists=True, dir_okay=False, help="Kept results of AGOX instead of running it."),
    ] = None,
    json_file: JsonFile = None,
    agox_python: AgoxPython = None,
) -> None:
    """How many true evaluations until the minimum of Au4Ni4; AGOX takes about seven minutes per restart."""
    from thalweg.bench import search

    raise typer.Exit(
        search(
            against=against, restarts=restarts, iterations=iterations, folder=folder, results=results,
            json_file=json_file, agox_python=agox_python,
        )
    )  # fmt: skip


# ---- shared parts --------------------------------------------------------------------------------------------


def _taken(path: Path) -> Exception:
    from thalweg.errors import ConfigurationError

    return ConfigurationError(f"'{path}' exists already; choose another name")


def _numbered(path: Path) -> Any:
    """path, path-2, path-3, ..."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def _unused(path: Path) -> Path:
    return next(candidate for candidate in _numbered(path) if not candidate.exists())


def _own_folder(path: Path, configuration: Configuration) -> tuple[Path, Configuration]:
    """The first numbered folder that is free or belongs to this very configuration."""
    from thalweg import campaign

    for candidate in _numbered(path):
        if candidate.exists() and not campaign.RunFolder(candidate).config.is_file():
            continue
        try:
            return candidate, campaign.prepare(configuration, candidate)
        except campaign.FolderTaken:
            continue
    raise AssertionError("unreachable")


def _search(
    configuration: Configuration,
    folder: Path,
    *,
    indices: list[int] | None = None,
    workers: int | None = None,
    max_seconds: float | None = None,
) -> tuple[Outcome, Results]:
    """Runs and shows how it gets on; unless only some restarts are asked for, writes summary, best structures and the
    report."""
    from thalweg import campaign
    from thalweg.progress import display

    restarts = configuration.search.restarts if indices is None else len(indices)
    print(f"run folder: {folder}", flush=True)
    try:
        with display(restarts, configuration.search.iterations) as watcher:
            outcome = campaign.run(folder, indices=indices, workers=workers, max_seconds=max_seconds, watcher=watcher)
    except KeyboardInterrupt:
        _complain(f"killed; what was evaluated is stored, and `thalweg resume {folder}` goes on")
        raise typer.Exit(130) from None
    if indices is not None:  # the other restarts and the summary are other tasks' business
        return outcome, campaign.load_results(folder, indices=indices)
    results = campaign.summarise(folder)
    from thalweg.report import page as make_page

    campaign.write_atomically(results.folder.report, make_page([results]))
    return outcome, results


def _finish(outcome: Outcome, results: Results, stopped_exit_code: int = 0) -> None:
    """What came out, in a few lines, and the exit code."""
    from thalweg.statistics import describe_median

    summary, folder = results.summary, results.folder
    best = summary["best_energy"]
    if best is not None:
        n = len(summary["restarts"])
        print(f"best energy {best:.4f} eV, {summary['evaluations']} evaluations in {n} restart{'s' if n > 1 else ''}")
    reasons = [reason for history in results.histories.values() for reason in history.reasons.values()]
    if reasons:
        print(f"{len(reasons)} of {summary['evaluations']} evaluations failed; the last reason: {reasons[-1]}")
    if results.configuration.search.target is not None:
        from thalweg.report import success_curves

        words = {
            "success": "success (relaxes to the target)",
            "delivered": "delivered (evaluated at the target)",
        }
        for name, curve in success_curves(results).items():
            print(f"{words[name]}: {describe_median(curve)}")
    if outcome.agreed is not None:
        print(f"{outcome.agreed}: no more restarts are needed")
    if folder.best.exists() and best is not None:
        print(f"best structures: {folder.best}")
    if folder.report.exists():
        print(f"report: {folder.report}")
    for index in outcome.failed:
        _complain(f"restart {index} {outcome.results[index]['reason']}")
    if outcome.stopped is not None:
        print(f"stopped ({outcome.stopped}); go on with: thalweg resume {folder.path}")
    if outcome.failed:
        raise typer.Exit(1)
    if reasons and best is None and outcome.stopped is None:
        _complain("not one evaluation has succeeded")
        raise typer.Exit(1)
    if not summary["evaluations"] and outcome.stopped is None:
        _complain(
            "nothing was evaluated: no candidate was a structure that the problem allows; look at its box, c1 and c2"
            f"{', and the spacing of the grid' if results.configuration.search.method == 'asla' else ''}"
        )
        raise typer.Exit(1)
    if outcome.stopped is not None and not all(entry.get("finished") for entry in outcome.results.values()):
        raise typer.Exit(stopped_exit_code)


def _complain(message: str) -> None:
    """Red lines on stderr."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    for line in message.splitlines():
        text = f"error: {line if len(line) <= 2000 else line[:2000] + '...'}"
        print(f"\x1b[31m{text}\x1b[0m" if colour else text, file=sys.stderr)


def main() -> NoReturn:
    """Entry point: errors of ours become one line each and exit code 2."""
    try:
        app()
    except Exception as problem:
        from thalweg.errors import ThalwegError

        if os.environ.get("THALWEG_DEBUG") not in (None, "", "0"):
            raise
        if isinstance(problem, ThalwegError):
            _complain(str(problem))
            sys.exit(2)
        text = " ".join(str(problem).split())[:300]
        _complain(f"unexpected {type(problem).__name__}: {text} (`thalweg --debug ...` shows where; please report it)")
        sys.exit(70)
    sys.exit(0)


if __name__ == "__main__":
    main()
