"""A commented configuration file for a recipe: a problem that runs as it is, and every option with its default."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import tomli_w

from thalweg.config import DEFAULT_ITERATIONS, FALLBACK_ITERATIONS, RESERVED, described, recipe_options
from thalweg.recipes import RECIPES

__all__ = ["commented_configuration", "documented_options", "toml_value"]

WIDTH = 112

_HEAD = """\
# {summary}
#
#     thalweg run {file}                      search: report.html, best.extxyz, summary.json
#     thalweg run {file} --restarts 4         a quick look
#     thalweg run {file} --set search.seed=7  another value of any key
#
# Everything below may be changed; keys that begin with "# " are not set. Lengths are in angstrom, energies in eV.

[problem]
# The atoms to place: a formula, or a table such as {{ Au = 4, Ni = 4 }}.
symbols = "Au4Ni4"

# The simulation cell: an edge length, [a, b, c] or three lattice vectors [[...], [...], [...]].
cell = 12.0

# Periodic or not: true, false, or one for each lattice vector such as [true, true, false].
pbc = false

# Where atoms are placed: the edge of a cube in the middle of the cell, or a corner and three edges such as
# {{ corner = [0, 0, 7.2], vectors = [[11.5, 0, 0], [0, 12.5, 0], [0, 0, 4.5]] }}.
box = 6.0

# Atoms that are there already (a slab, a support): an extxyz, .traj, .cif, .db or POSCAR file, relative to this one. It
# brings its own cell and pbc (remove the keys above) and needs a box of the second form. Without constraints in the
# file all of it stays; with FixAtoms, FixedPlane or FixedLine exactly what they say.
# template = "slab.extxyz"

# Allowed bond lengths when atoms are placed, in units of the sum of two covalent radii: none shorter than c1, each atom
# with a neighbour nearer than c2.
c1 = 0.75
c2 = 1.25

[calculator]
# The true potential: "emt", "lj" or "tersoff" (built in), a calculator of ASE by its name ("vasp", "gpaw", "orca",
# ...), or your own as "module:factory". Further keys of this section are its arguments, such as xc = "PBE".
name = "emt"

[search]
# What searches: {methods}.
method = "{method}"

# Iterations of each restart.
iterations = {iterations}

# Independent searches; restart i uses seed + i, so that the results do not depend on which run at the same time.
restarts = 4
seed = 0

# Restarts at the same time; not set: one per core.
# workers = 2

# A restart ends after so many true evaluations; not set: after its iterations.
# max_evaluations = 500

# What counts as success, for the success curve of the report: an energy known to be the lowest. With stop = true a
# restart ends once it has evaluated such a structure. The energy must be the problem's own.
# target = {{ energy = 7.8049, tolerance = 0.001, stop = true }}
"""


def commented_configuration(method: str, *, file: str = "FILE.toml") -> str:
    """TOML text that `thalweg run` accepts as it is. `file` is the name that its head mentions.

    Raises ConfigurationError for an unknown method.
    """
    defaults = recipe_options(method)
    recipe = RECIPES[method]
    hints = get_type_hints(recipe, include_extras=True)
    documented = documented_options(recipe)
    lines = [
        _HEAD.format(
            summary=_summary(recipe),
            file=file,
            methods=", ".join(f'"{name}"' for name in RECIPES),
            method=method,
            iterations=DEFAULT_ITERATIONS.get(method, FALLBACK_ITERATIONS),
        ),
        f'# ---- options of "{method}"',
    ]
    for name, parameter in inspect.signature(recipe).parameters.items():
        if name in RESERVED or parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        kind, explanation = documented.get(name, ("", ""))
        kind = kind or described(hints.get(name, Any))
        text = f"{explanation or name.replace('_', ' ').capitalize() + '.'} [{kind}]"
        lines += ["", *textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")]
        if name in defaults:
            lines.append(f"{name} = {toml_value(defaults[name])}")
        else:
            lines.append(f"# {name} =   (not set: the method chooses)")
    return "\n".join(lines) + "\n"


def documented_options(recipe: Callable[..., Any]) -> dict[str, tuple[str, str]]:
    """Option -> (type, explanation) as the Parameters section of the docstring has them, each on one line."""
    text = inspect.getdoc(recipe) or ""
    found = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return {}
    out: dict[str, tuple[str, str]] = {}
    for entry in re.split(r"\n(?=\S)", found.group(1).strip()):
        head, _, explanation = entry.partition("\n")
        names, _, kind = head.partition(" : ")
        for name in re.split(r",\s*", names.strip()):
            out[name] = (kind.strip(), " ".join(explanation.split()))
    return out


def toml_value(value: Any) -> str:
    """A value as it stands on the right of `key =`, tables and lists on that one line."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{toml_key(str(key))} = {toml_value(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").strip()


def toml_key(name: str) -> str:
    """A key, quoted where TOML wants it."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _summary(recipe: Callable[..., Any]) -> str:
    """The first paragraph of the docstring as comment lines."""
    paragraph = " ".join((inspect.getdoc(recipe) or recipe.__name__).split("\n\n")[0].split())
    return "\n# ".join(textwrap.wrap(paragraph, WIDTH))
