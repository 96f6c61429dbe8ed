"""Structures with energies from other programs' files: AGOX databases, ASE databases, extxyz.

An AGOX database is an SQLite file with one row per structure; read are these columns of its table `structures`:

    positions  n x 3 float64     cell  3 x 3 float64     type              n float64, atomic numbers
    forces     n x 3 float64     pbc   3 float64         template_indices  float64 or empty: atoms that did not move
    energy     real              iteration  integer      (float64 are raw little-endian bytes; angstrom, eV)

Its table of other values holds pickles, which can run code when they are read: it is never touched.

Other files are read by ASE, and only in formats whose readers neither run code nor load pickles (`FORMATS`). All but extxyz
are read in a process of its own with bounded memory and time: their readers believe whatever sizes a file claims.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from ase import Atoms

__all__ = ["FORMATS", "read_file", "read_structures"]

# Endings -> ASE's name of the format; VASP's files have names instead.
FORMATS = {".extxyz": "extxyz", ".xyz": "extxyz", ".traj": "traj", ".db": "db", ".cif": "cif", ".vasp": "vasp"}
NAMES = ("POSCAR", "CONTCAR")

# What reading a file in a process of its own may take: memory beyond what the program itself needs, seconds.
MEMORY, MEMORY_PER_BYTE = 1 << 30, 100
SECONDS, SECONDS_PER_BYTE = 60.0, 1e-4
LONGEST_LINE = 1 << 20

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
        if path.suffix == ".db" and not tables:
            raise ConfigurationError(f"'{path}' is no SQLite database")
        found = read_file(path, all_of_them=True)
    kept = [atoms for atoms in found if np.isfinite(_energy(atoms))]
    if not kept:
        raise ConfigurationError(f"'{path}' holds {len(found)} structures, none with an energy")
    return kept, len(found) - len(kept)


def read_file(path: Path, *, all_of_them: bool = False) -> list[Atoms]:
    """What ASE reads from a file (the last structure unless `all_of_them`), checked: finite positions and cells, known
    elements. Energy and forces (eV, eV/angstrom) come along, and simple entries of `info`; constraints that cannot be
    expressed coordinate by coordinate are an error, or are dropped if `all_of_them`.

    Raises ConfigurationError, one line whatever goes wrong inside ASE, also for formats that are not in `FORMATS`.
    """
    kind = _format_of(path)
    try:
        if kind == "extxyz":
            _check_extxyz(path)
            structures = _read_with_ase(path, kind, all_of_them)
        else:
            structures = _read_apart(path, kind, all_of_them)
    except OSError as problem:
        raise ConfigurationError(f"cannot read '{path}': {problem.strerror or problem}") from problem
    if not structures:
        raise ConfigurationError(f"'{path}' holds no structure")
    return structures


def _format_of(path: Path) -> str:
    kind = FORMATS.get(path.suffix.lower())
    if kind is None and path.name.upper().startswith(tuple(NAMES)):  # POSCAR.relaxed
        kind = "vasp"
    if kind is None:
        raise ConfigurationError(
            f"'{path}' is in none of the formats that are read here ({', '.join(FORMATS)}, {', '.join(NAMES)}); convert it, "
            f"for example by `ase convert {path.name} {path.stem or 'structure'}.extxyz`"
        )
    return kind


def _read_with_ase(path: Path, kind: str, all_of_them: bool) -> list[Atoms]:
    import ase.io
    from ase import Atoms
    from ase.io.formats import ioformats

    index = ":" if all_of_them else -1
    found: Any
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            if kind == "db":
                found = _read_database(path, all_of_them)
            else:  # an open file: to ASE a name may mean more, such as patterns and addresses of databases
                with open(path, "rb") if ioformats[kind].isbinary else open(path, encoding="utf-8") as file:
                    found = ase.io.read(file, index=index, format=kind)
    except (Exception, RecursionError, MemoryError) as problem:
        raise ConfigurationError(f"ASE cannot read '{path}': {_one_line(problem)}") from problem
    structures = found if isinstance(found, list) else [found]
    for k, atoms in enumerate(structures):
        where = f"structure {k + 1} of '{path}'"
        if not isinstance(atoms, Atoms) or not len(atoms):
            raise ConfigurationError(f"{where} has no atoms")
        _check(atoms, where)
        structures[k] = _plain(atoms, where, strict=not all_of_them)
    return structures


def _read_database(path: Path, all_of_them: bool) -> list[Atoms]:
    import ase.db

    found = []
    database = ase.db.connect(str(path.absolute()), type="db", use_lock_file=False)
    for row in database.select() if all_of_them else database.select(sort="-id", limit=1):
        atoms = row.toatoms()
        atoms.info |= row.key_value_pairs
        found.append(atoms)
    return found


def _plain(atoms: Atoms, where: str, *, strict: bool) -> Atoms:
    """What is used here of a structure, and nothing else that a file may have put into it."""
    from ase import Atoms
    from ase.calculators.calculator import all_properties
    from ase.calculators.singlepoint import SinglePointCalculator

    from thalweg.records import Batch

    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)
    try:
        fixed = Batch.from_ase(Atoms(atoms.numbers, atoms.positions, constraint=atoms.constraints)).fixed
    except Exception as problem:  # indices out of range, masks of the wrong shape, ...
        if strict:
            text = str(problem) if isinstance(problem, ConfigurationError) else _one_line(problem)
            raise ConfigurationError(f"{where}: its constraints cannot be used here: {text}") from problem
        fixed = np.zeros((len(atoms), 3), bool)
    if fixed.any():
        plain.set_constraint(replace(Batch.from_ase(plain), fixed=fixed).to_ase()[0].constraints)
    elif atoms.constraints:
        _free(plain)
    energy = _energy(atoms)
    if math.isfinite(energy):
        results: dict[str, Any] = {"energy": energy}
        with contextlib.suppress(TypeError, ValueError):
            forces = np.array(atoms.calc.results.get("forces"), float)
            if forces.shape == (len(atoms), 3) and np.isfinite(forces).all():
                results["forces"] = forces
        plain.calc = SinglePointCalculator(plain, **results)
    simple = {name: value.item() if isinstance(value, np.generic) else value for name, value in atoms.info.items()}
    for name in (*all_properties, "Lattice", "Properties", "pbc"):  # in an extxyz file these mean something else
        simple.pop(name, None)
    plain.info = {
        name: value
        for name, value in simple.items()
        if isinstance(name, str)
        and (isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)))
    }
    return plain


def _free(atoms: Atoms) -> None:
    """A constraint that fixes nothing: a template without any constraint is fixed whole."""
    from ase.constraints import FixAtoms

    atoms.set_constraint(FixAtoms(indices=[]))


def _check_extxyz(path: Path) -> None:
    """Whether the numbers of atoms and columns that the file claims are there: ASE's reader believes them."""
    size = path.stat().st_size

    def line(file: Any) -> bytes:
        found = file.readline(LONGEST_LINE + 1)
        if len(found) > LONGEST_LINE:
            raise ConfigurationError(f"'{path}' has a line of more than {LONGEST_LINE} bytes; it is no extxyz file")
        return bytes(found)

    with open(path, "rb") as file:
        first = line(file)
        while first.strip():
            try:
                atoms = int(first)
            except ValueError:
                shown = first[:40].decode(errors="replace").strip()
                raise ConfigurationError(f"'{path}': expected a number of atoms, got '{shown}'") from None
            comment = line(file)
            if not 0 < atoms <= size - file.tell():
                raise ConfigurationError(f"'{path}' claims {atoms} atoms, which it does not hold")
            if any(len(count) > 2 for count in re.findall(rb":(\d+)", comment)):
                raise ConfigurationError(f"'{path}' claims more columns than can be read")
            for k in range(atoms):
                if not line(file).strip():
                    raise ConfigurationError(f"'{path}' claims {atoms} atoms, but only {k} follow")
            first = line(file)
            while first.startswith(b"VEC"):
                first = line(file)


# ---- in a process of its own ---------------------------------------------------------------------------------


def _read_apart(path: Path, kind: str, all_of_them: bool) -> list[Atoms]:
    """`_read_with_ase` in a process whose memory and time are bounded by the size of the file."""
    from thalweg.store import decode

    size = path.stat().st_size
    seconds = SECONDS + SECONDS_PER_BYTE * size
    code = f"import sys; sys.path[:] = {sys.path!r}; from thalweg.importing import _answer; _answer(*sys.argv[1:])"
    arguments = [str(path.absolute()), kind, str(int(all_of_them)), str(MEMORY + MEMORY_PER_BYTE * size)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=seconds,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"'{path}' could not be read within {seconds:.0f} s") from None
    if done.returncode != 0:
        raise ConfigurationError(f"ASE cannot read '{path}': its process ended with status {done.returncode}")
    answer = decode(done.stdout)
    if "error" in answer:
        raise ConfigurationError(answer["error"].replace(str(path.absolute()), str(path)))
    structures = answer["structures"].to_ase()
    for atoms, info, constrained in zip(structures, answer["infos"], answer["constrained"], strict=True):
        atoms.info = json.loads(info)
        if constrained and not atoms.constraints:
            _free(atoms)
    return structures


def _answer(path: str, kind: str, all_of_them: str, memory: str) -> None:
    """The process's own program: the structures on standard output, in the encoding of the store."""
    import resource

    from thalweg.records import Batch
    from thalweg.store import encode

    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # readers may print
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        if os.path.exists("/proc")
        else 0
    )
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (used + int(memory), used + int(memory)))
    answer: dict[str, Any]
    try:
        structures = _read_with_ase(Path(path), kind, bool(int(all_of_them)))
        answer = {
            "structures": Batch.from_ase(structures),
            "infos": [json.dumps(atoms.info) for atoms in structures],
            "constrained": [bool(atoms.constraints) for atoms in structures],
        }
    except ConfigurationError as problem:
        answer = {"error": str(problem)}
    except (Exception, RecursionError, MemoryError) as problem:
        answer = {"error": f"ASE cannot read '{path}': {_one_line(problem)}"}
    with os.fdopen(output, "wb") as file:
        file.write(encode(answer))


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
            database.execute("PRAGMA trusted_schema = OFF")
            yield database
    except (sqlite3.Error, UnicodeDecodeError, OverflowError, MemoryError) as problem:
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
