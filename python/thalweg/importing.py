"""Structures with energies from other programs' files: AGOX databases, ASE databases, extxyz.

An AGOX database is an SQLite file with one row per structure; read are these columns of its table `structures`:

    positions  n x 3 float64     cell  3 x 3 float64     type              n float64, atomic numbers
    forces     n x 3 float64     pbc   3 float64         template_indices  float64 or empty: atoms that did not move
    energy     real              iteration  integer      (float64 are raw little-endian bytes; angstrom, eV)

Its table of other values holds pickles, which can run code when they are read: it is never touched.
"""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["read_file", "read_structures"]

NEEDED = ("positions", "energy", "type", "cell")
WELCOME = ("forces", "pbc", "template_indices", "iteration")
HIGHEST_NUMBER = 118


def read_structures(path: str | Path) -> tuple[list[Atoms], int]:
    """ASE Atoms with energy and forces (eV, eV/angstrom), and how many were left out because they have no finite energy.

    Raises ConfigurationError when the file is not there, is none of the known kinds, is damaged, or holds no structure
    with an energy.
    """
    path = Path(path)
    if not path.is_file():
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigurationError(f"there is no file '{path}'.{nearest(path.name, others)}")
    tables = _tables(path)
    if "structures" in tables:
        found = _read_agox(path)
    elif tables and "systems" not in tables:
        raise ConfigurationError(
            f"'{path}' is an SQLite file, but neither a database of AGOX (table structures) nor of ASE (table systems); "
            f"its tables are {', '.join(sorted(tables)) or 'none'}"
        )
    else:
        found = read_file(path, all_of_them=True)
    kept = [atoms for atoms in found if np.isfinite(_energy(atoms))]
    if not kept:
        raise ConfigurationError(f"'{path}' holds {len(found)} structures, none with an energy")
    return kept, len(found) - len(kept)


def read_file(path: Path, *, all_of_them: bool = False) -> list[Atoms]:
    """What ASE reads from a file (the last structure unless `all_of_them`), checked: finite positions and cells, known
    elements. Whatever goes wrong inside ASE is one ConfigurationError."""
    import ase.io
    from ase import Atoms

    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = ase.io.read(path, index=":" if all_of_them else -1)
    except (Exception, RecursionError, MemoryError) as problem:
        raise ConfigurationError(f"ASE cannot read '{path}': {_one_line(problem)}") from problem
    structures = found if isinstance(found, list) else [found]
    for k, atoms in enumerate(structures):
        if not isinstance(atoms, Atoms) or not len(atoms):
            raise ConfigurationError(f"structure {k + 1} of '{path}' has no atoms")
        _check(atoms, f"structure {k + 1} of '{path}'")
    if not structures:
        raise ConfigurationError(f"'{path}' holds no structure")
    return structures


# ---- AGOX ----------------------------------------------------------------------------------------------------


def _tables(path: Path) -> set[str]:
    """Names of the tables of an SQLite file; empty for any other file."""
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\x00":
            return set()
    with _opened(path) as database:
        return {str(name) for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    """The database, for reading only; one clear error for what SQLite says."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            yield database
    except sqlite3.Error as problem:
        raise ConfigurationError(f"'{path}' cannot be read as a database: {problem}") from problem


def _read_agox(path: Path) -> list[Atoms]:
    structures = []
    with _opened(path) as database:
        there = {str(row[1]) for row in database.execute("PRAGMA table_info(structures)")}
        missing = [name for name in NEEDED if name not in there]
        if missing:
            raise ConfigurationError(
                f"'{path}' is no database of AGOX that is known here: it lacks {', '.join(missing)}"
            )
        names = [*NEEDED, *(name for name in WELCOME if name in there)]
        order = " ORDER BY id" if "id" in there else ""
        for k, row in enumerate(database.execute(f"SELECT {', '.join(names)} FROM structures{order}")):
            structures.append(_agox_structure(dict(zip(names, row, strict=True)), f"structure {k + 1} of '{path}'"))
    return structures


def _agox_structure(row: Mapping[str, Any], where: str) -> Atoms:
    from ase import Atoms
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.constraints import FixAtoms

    numbers = _whole(_floats(row, "type", where), where, 1, HIGHEST_NUMBER)
    n = len(numbers)
    if not n:
        raise ConfigurationError(f"{where} has no atoms")
    pbc = _floats(row, "pbc", where, count=3) if row.get("pbc") else np.zeros(3)
    atoms = Atoms(
        numbers,
        _floats(row, "positions", where, count=3 * n).reshape(n, 3),
        cell=_floats(row, "cell", where, count=9).reshape(3, 3),
        pbc=pbc != 0,
    )
    _check(atoms, where)
    if row.get("template_indices"):
        atoms.set_constraint(FixAtoms(indices=_whole(_floats(row, "template_indices", where), where, 0, n - 1)))
    results: dict[str, Any] = {}
    if isinstance(row["energy"], (int, float)):
        results["energy"] = float(row["energy"])
        forces = _floats(row, "forces", where, count=3 * n) if row.get("forces") else np.full(3 * n, np.nan)
        if np.isfinite(forces).all():
            results["forces"] = forces.reshape(n, 3)
        atoms.calc = SinglePointCalculator(atoms, **results)
    if isinstance(row.get("iteration"), int):
        atoms.info["iteration"] = row["iteration"]
    return atoms


def _floats(row: Mapping[str, Any], name: str, where: str, *, count: int | None = None) -> np.ndarray:
    """The raw little-endian float64 of a column."""
    raw = row[name]
    if not isinstance(raw, bytes) or len(raw) % 8 or (count is not None and len(raw) != 8 * count):
        came = f"{len(raw)} bytes" if isinstance(raw, bytes) else f"a {type(raw).__name__}"
        wanted = "whole float64 numbers" if count is None else f"{8 * count} bytes"
        raise ConfigurationError(f"{where}: {name} must be {wanted}, but it is {came}")
    return np.frombuffer(raw, "<f8").astype(float)


def _whole(values: np.ndarray, where: str, lowest: int, highest: int) -> np.ndarray:
    if not (np.isfinite(values).all() and np.all((values >= lowest) & (values <= highest) & (values % 1 == 0))):
        raise ConfigurationError(
            f"{where}: expected whole numbers from {lowest} to {highest}, got {values[:4].tolist()}"
        )
    return values.astype(int)


# ---- checks --------------------------------------------------------------------------------------------------


def _check(atoms: Atoms, where: str) -> None:
    for what, values in (("positions", atoms.positions), ("cell", atoms.cell.array)):
        if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > 1e6:
            raise ConfigurationError(f"{where}: its {what} must be finite and below 1e6 angstrom")
    if np.any((atoms.numbers < 1) | (atoms.numbers > HIGHEST_NUMBER)):
        raise ConfigurationError(f"{where} holds something that is not an element")


def _energy(atoms: Atoms) -> float:
    results = getattr(atoms.calc, "results", {}) if atoms.calc is not None else {}
    try:
        return float(results.get("energy", np.nan))
    except (TypeError, ValueError):
        return np.nan


def _one_line(problem: BaseException) -> str:
    """The name of the error and the first line of what it says."""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:200]}" if text else type(problem).__name__
