"""The vocabulary: what travels between the stages of a search.

`Batch` is n structures packed in plain arrays; the compiled kernels take exactly these arrays:

    positions  x0 y0 z0 | x1 y1 z1 | ...      (m, 3)  structure i owns atoms offsets[i]:offsets[i + 1]
    numbers    Z0       | Z1       | ...      (m,)
    offsets    0, n_0, n_0 + n_1, ..., m      (n + 1,)

`Problem` is what is asked, `Context` what a stage may read, `Asked` the ticket between the two halves of an iteration,
`Step` what an observer may read. All are immutable. Units: angstrom, eV; forces are -dE/dx.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError, nearest
from thalweg.randomness import Key

if TYPE_CHECKING:
    from ase import Atoms

__all__ = [
    "FAILED",
    "OK",
    "REJECTED",
    "Asked",
    "Batch",
    "Context",
    "Measured",
    "Problem",
    "Step",
    "parse_symbols",
]

Array = np.ndarray

# What a calculation gives: energy [eV], forces (n, 3), and why it failed ("" if it did not).
Measured = tuple[float, np.ndarray, str]

# Larger problems and cells than these are mistakes, and would only fill the memory.
MOST_ATOMS, LONGEST = 100_000, 1e5

# Values of the column `status`.
OK, FAILED, REJECTED = 0, 1, 2

_NOTHING: Mapping[str, Array] = MappingProxyType({})


def _frozen(values: Any, dtype: Any = None) -> Array:
    """A C-ordered array that nobody can write to; copies only what somebody else could still change."""
    array = np.asarray(values, dtype=dtype, order="C")
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def _fill(dtype: np.dtype, shape: tuple[int, ...]) -> Array:
    """What a column holds for rows that never had it: NaN, -1 (whole numbers), False or an empty string."""
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    if dtype.kind == "i":
        return np.full(shape, -1, dtype)
    return np.zeros(shape, dtype)


def _check_columns(columns: Mapping[str, Any], length: int, what: str) -> Mapping[str, Array]:
    checked = {}
    for name, values in columns.items():
        array = _frozen(values)
        if array.dtype.kind not in "fiubU":
            raise ConfigurationError(
                f"{what} '{name}' must hold numbers, booleans or short strings, but its type is {array.dtype}"
            )
        if array.shape[:1] != (length,):
            raise ConfigurationError(f"{what} '{name}' must have length {length}, but its shape is {array.shape}")
        checked[name] = array
    return MappingProxyType(checked)


@dataclass(frozen=True, eq=False)
class Batch:
    """n structures with m atoms in all.

    Parameters
    ----------
    positions : (m, 3) float
        In angstrom.
    numbers : (m,) int
        Atomic numbers.
    offsets : (n + 1,) int
        Structure i owns atoms offsets[i]:offsets[i + 1].
    cells : (n, 3, 3) float
        In angstrom; rows are lattice vectors, as in ASE.
    pbc : (n, 3) bool
    fixed : (m, 3) bool
        Coordinates that do not move.
    columns : mapping of (n, ...) arrays
        Per structure: energy [eV], sigma [eV], score, origin, parent, status (0 ok, 1 failed, 2 rejected), ...
    atom_columns : mapping of (m, ...) arrays
        Per atom: forces [eV/angstrom, -dE/dx; NaN where unknown], ...

    Raises
    ------
    ConfigurationError
        If shapes disagree, or a column holds Python objects.
    """

    positions: Array
    numbers: Array
    offsets: Array
    cells: Array
    pbc: Array
    fixed: Array
    columns: Mapping[str, Array] = field(default_factory=lambda: _NOTHING)
    atom_columns: Mapping[str, Array] = field(default_factory=lambda: _NOTHING)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "positions", _frozen(self.positions, np.float64))
        put(self, "numbers", _frozen(self.numbers, np.int32))
        put(self, "offsets", _frozen(self.offsets, np.int64))
        put(self, "cells", _frozen(self.cells, np.float64))
        put(self, "pbc", _frozen(self.pbc, np.bool_))
        put(self, "fixed", _frozen(self.fixed, np.bool_))
        if self.offsets.ndim != 1 or len(self.offsets) == 0 or self.offsets[0] != 0:
            raise ConfigurationError("offsets must be a 1-d array that starts with 0")
        n, m = len(self.offsets) - 1, int(self.offsets[-1])
        if n and np.any(np.diff(self.offsets) < 0):
            raise ConfigurationError("offsets must not fall")
        shapes = {"positions": (m, 3), "numbers": (m,), "cells": (n, 3, 3), "pbc": (n, 3), "fixed": (m, 3)}
        for name, shape in shapes.items():
            came = getattr(self, name).shape
            if came != shape:
                raise ConfigurationError(f"{name} of {n} structures, {m} atoms must have shape {shape}, got {came}")
        put(self, "columns", _check_columns(self.columns, n, "column"))
        put(self, "atom_columns", _check_columns(self.atom_columns, m, "atom column"))

    def _changed(self, **changes: Any) -> Batch:
        """A copy from parts that are known to fit: read-only arrays of the right shapes. No checks, for speed."""
        new = object.__new__(Batch)
        new.__dict__.update(self.__dict__)
        for name, value in changes.items():
            if name in ("columns", "atom_columns"):
                for array in value.values():
                    array.flags.writeable = False
                value = MappingProxyType(value)
            else:
                value.flags.writeable = False
            new.__dict__[name] = value
        return new

    # ---- size and access ---------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def atoms(self) -> int:
        """Number of atoms in all structures."""
        return len(self.numbers)

    def __getitem__(self, index: int | slice) -> Batch:
        """One structure (still a batch), or a slice of them."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"structure {index} of a batch of {len(self)}")
        return self.take([index % len(self)])

    def __repr__(self) -> str:
        return f"Batch({len(self)} structures, {self.atoms} atoms, columns={sorted(self.columns)})"

    def positions_of(self, index: int) -> Array:
        """(n_i, 3) positions of one structure."""
        return self.positions[self.offsets[index] : self.offsets[index + 1]]

    def uniform(self) -> bool:
        """True if every structure has as many atoms as the first."""
        sizes = np.diff(self.offsets)
        return bool(len(sizes) == 0 or np.all(sizes == sizes[0]))

    def take(self, indices: Iterable[int] | Array) -> Batch:
        """The structures at these indices, in this order; a boolean mask of length n works too."""
        idx = np.asarray(indices)
        idx = np.flatnonzero(idx) if idx.dtype == np.bool_ else idx.astype(np.int64).reshape(-1)
        sizes = np.diff(self.offsets)[idx]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        if len(idx) == 1:
            rows: Any = slice(self.offsets[idx[0]], self.offsets[idx[0] + 1])
        else:
            rows = np.repeat(self.offsets[:-1][idx] - offsets[:-1], sizes) + np.arange(offsets[-1])
        return self._changed(
            positions=self.positions[rows],
            numbers=self.numbers[rows],
            offsets=offsets,
            cells=self.cells[idx],
            pbc=self.pbc[idx],
            fixed=self.fixed[rows],
            columns={name: values[idx] for name, values in self.columns.items()},
            atom_columns={name: values[rows] for name, values in self.atom_columns.items()},
        )

    # ---- changed copies ----------------------------------------------------------------------------
    def with_columns(self, **columns: Any) -> Batch:
        """The same structures with columns added or replaced; a scalar fills the whole column."""
        n = len(self)
        new = {name: np.full(n, values) if np.ndim(values) == 0 else values for name, values in columns.items()}
        return self._changed(columns={**self.columns, **_check_columns(new, n, "column")})

    def with_atom_columns(self, **columns: Any) -> Batch:
        """The same structures with per-atom columns added or replaced."""
        return self._changed(atom_columns={**self.atom_columns, **_check_columns(columns, self.atoms, "atom column")})

    def with_positions(self, positions: Array) -> Batch:
        """The same structures somewhere else, (m, 3); forces no longer belong to them and are dropped, as is energy."""
        gone = ("energy", "sigma", "score")
        positions = _frozen(positions, np.float64)
        if positions.shape != self.positions.shape:
            raise ConfigurationError(f"positions must have shape {self.positions.shape}, got {positions.shape}")
        return self._changed(
            positions=positions,
            columns={name: values for name, values in self.columns.items() if name not in gone},
            atom_columns={name: values for name, values in self.atom_columns.items() if name != "forces"},
        )

    def bare(self) -> Batch:
        """The same structures without columns."""
        return self._changed(columns={}, atom_columns={})

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """All structures in order; a column that some lack is filled with NaN, -1, False or an empty string."""
        batches = [batch for batch in batches if len(batch)] or list(batches[:1])
        if not batches:
            return Batch.empty()
        if len(batches) == 1:
            return batches[0]
        starts = np.cumsum([0] + [batch.atoms for batch in batches])
        offsets = [np.zeros(1, np.int64)]
        offsets += [batch.offsets[1:] + start for batch, start in zip(batches, starts[:-1], strict=True)]

        def joined(kind: str, length: Callable[[Batch], int]) -> dict[str, Array]:
            names = dict.fromkeys(name for batch in batches for name in getattr(batch, kind))
            out = {}
            for name in names:
                model = next(getattr(b, kind)[name] for b in batches if name in getattr(b, kind))
                parts = []
                for batch in batches:
                    values = getattr(batch, kind).get(name)
                    parts.append(_fill(model.dtype, (length(batch), *model.shape[1:])) if values is None else values)
                out[name] = np.concatenate(parts)
            return out

        return Batch(
            np.concatenate([batch.positions for batch in batches]),
            np.concatenate([batch.numbers for batch in batches]),
            np.concatenate(offsets),
            np.concatenate([batch.cells for batch in batches]),
            np.concatenate([batch.pbc for batch in batches]),
            np.concatenate([batch.fixed for batch in batches]),
            joined("columns", len),
            joined("atom_columns", lambda batch: batch.atoms),
        )

    @staticmethod
    def empty() -> Batch:
        """No structures at all."""
        return Batch(
            np.zeros((0, 3)),
            np.zeros(0),
            np.zeros(1),
            np.zeros((0, 3, 3)),
            np.zeros((0, 3)),
            np.zeros((0, 3)),
        )

    @property
    def ok(self) -> Array:
        """(n,) bool: rows with a finite energy whose status is 0 (or that have no status)."""
        energy = self.columns.get("energy")
        good = np.ones(len(self), bool) if energy is None else np.isfinite(energy)
        status = self.columns.get("status")
        return good if status is None else good & (status == OK)

    # ---- ASE ---------------------------------------------------------------------------------------
    @staticmethod
    def from_ase(atoms: Atoms | Sequence[Atoms], *, constraints: bool = True) -> Batch:
        """Structures from ASE; FixAtoms, FixedPlane and FixedLine (along x, y or z) become `fixed`.

        constraints : False: they are left aside, of whatever kind, and nothing is fixed.

        Raises ConfigurationError for constraints that cannot be expressed coordinate by coordinate.
        """
        from ase import Atoms

        structures = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        if not structures:
            return Batch.empty()
        energies, forces = [], []
        for one in structures:
            results = getattr(one.calc, "results", {}) if one.calc is not None else {}
            energies.append(results.get("energy", np.nan))
            forces.append(results.get("forces", np.full((len(one), 3), np.nan)))
        known = {"energy": np.array(energies, float)} if np.any(np.isfinite(energies)) else {}
        with_forces = (
            {"forces": np.concatenate(forces)} if known and np.any(np.isfinite(np.concatenate(forces))) else {}
        )
        return Batch(
            np.concatenate([one.positions for one in structures]),
            np.concatenate([one.numbers for one in structures]),
            np.cumsum([0] + [len(one) for one in structures]),
            np.array([one.cell.array for one in structures]),
            np.array([one.pbc for one in structures]),
            np.concatenate([_fixed_of(one) if constraints else np.zeros((len(one), 3), bool) for one in structures]),
            known,
            with_forces,
        )

    def to_ase(self) -> list[Atoms]:
        """ASE Atoms, with energy and forces (where known) in a SinglePointCalculator and fixed atoms in FixAtoms."""
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms, FixCartesian

        energy, forces = self.columns.get("energy"), self.atom_columns.get("forces")
        out = []
        for i in range(len(self)):
            rows = slice(self.offsets[i], self.offsets[i + 1])
            atoms = Atoms(self.numbers[rows], self.positions[rows], cell=self.cells[i], pbc=self.pbc[i])
            fixed = self.fixed[rows]
            constraints: list[Any] = []
            if fixed.all(axis=1).any():
                constraints.append(FixAtoms(mask=fixed.all(axis=1)))
            for atom in np.flatnonzero(fixed.any(axis=1) & ~fixed.all(axis=1)):
                constraints.append(FixCartesian(int(atom), mask=fixed[atom].tolist()))
            atoms.set_constraint(constraints)
            results: dict[str, Any] = {}
            if energy is not None and np.isfinite(energy[i]):
                results["energy"] = float(energy[i])
            if forces is not None and np.all(np.isfinite(forces[rows])):
                results["forces"] = forces[rows].copy()
            if results:
                atoms.calc = SinglePointCalculator(atoms, **results)
            out.append(atoms)
        return out


def _fixed_of(atoms: Atoms) -> Array:
    """(n, 3) bool from ASE constraints."""
    from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane

    fixed = np.zeros((len(atoms), 3), bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
        elif isinstance(constraint, FixCartesian):
            fixed[constraint.index] |= np.asarray(constraint.mask, bool)
        elif isinstance(constraint, (FixedPlane, FixedLine)):
            along = np.abs(np.asarray(constraint.dir, float)) > 1e-8
            if along.sum() != 1:
                raise ConfigurationError(
                    f"{type(constraint).__name__} must lie along x, y or z, but its direction is "
                    f"{np.round(constraint.dir, 6).tolist()}; turn the structure, or use FixAtoms"
                )
            fixed[constraint.index] |= along if isinstance(constraint, FixedPlane) else ~along
        else:
            raise ConfigurationError(
                f"the constraint {type(constraint).__name__} is not known here; use FixAtoms, FixedPlane, FixedLine "
                "or FixCartesian"
            )
    return fixed


# ---- the problem -----------------------------------------------------------------------------------------


def parse_symbols(symbols: str | Mapping[str, int] | Sequence[str]) -> dict[str, int]:
    """`{"Au": 8, "Ni": 8}` from "Au8Ni8", a mapping or a list of symbols; order is kept.

    Raises ConfigurationError on anything that is not a chemical formula.
    """
    from thalweg.elements import NUMBERS

    if isinstance(symbols, str):
        if not symbols or not re.fullmatch(r"([A-Z][a-z]?\d*)+", symbols):
            raise ConfigurationError(f"symbols must be a chemical formula such as 'Au8Ni8', but it is '{symbols[:60]}'")
        if re.search(r"\d{10}", symbols):  # before numbers are made of digits, which takes long where there are many
            raise ConfigurationError(
                f"a problem may have at most {MOST_ATOMS} atoms to place, but it is '{symbols[:60]}'"
            )
        pairs = [(name, int(count or 1)) for name, count in re.findall(r"([A-Z][a-z]?)(\d*)", symbols)]
    elif isinstance(symbols, Mapping):
        pairs = [(str(name), int(count)) for name, count in symbols.items()]
    else:
        pairs = [(str(name), 1) for name in symbols]
    counts: dict[str, int] = {}
    for name, count in pairs:
        if name not in NUMBERS:
            raise ConfigurationError(f"'{name}' is not a chemical symbol.{nearest(name, NUMBERS)}")
        if count < 1:
            raise ConfigurationError(f"the number of {name} atoms must be at least 1, but it is {count}")
        counts[name] = counts.get(name, 0) + count
    if not counts:
        raise ConfigurationError("a problem needs at least one atom to place")
    if sum(counts.values()) > MOST_ATOMS:
        raise ConfigurationError(
            f"a problem may have at most {MOST_ATOMS} atoms to place, but it has {sum(counts.values())}"
        )
    return counts


def _as_cell(cell: Any) -> Array:
    try:
        values = np.asarray(cell, float)
    except (TypeError, ValueError, OverflowError):
        values = np.empty(0)
    if values.shape == ():
        values = np.eye(3) * values
    elif values.shape == (3,):
        values = np.diag(values)
    if values.shape != (3, 3) or not np.all(np.abs(values) <= LONGEST) or abs(np.linalg.det(values)) < 1e-6:
        raise ConfigurationError(
            "cell must be an edge length, three lengths or three lattice vectors that span a volume (angstrom, at most "
            f"{LONGEST:g}), got {str(cell)[:100]}"
        )
    return values


def _as_pbc(pbc: Any) -> Array:
    values = np.asarray(pbc)
    if values.shape not in ((), (3,)) or values.dtype.kind not in "biu":
        raise ConfigurationError(f"pbc must be true, false or three of them, got {pbc!r}")
    return np.broadcast_to(values.astype(bool), (3,)).copy()


@dataclass(frozen=True, eq=False)
class Problem:
    """What is asked: which atoms to place, where, next to what. Frozen; it never searches.

    Parameters
    ----------
    symbols : str or mapping
        The atoms to place: "Au8Ni8" or {"Au": 8, "Ni": 8}; the template's atoms are not among them.
    cell : float, (3,) or (3, 3)
        In angstrom.
    pbc : bool or (3,) bool
    box : float or (corner, vectors), optional
        Confinement of the placed atoms: the edge of a cube in the middle of the cell, or a corner (3,) and three
        spanning vectors (3, 3), (3,) or a number. Default: the whole cell if it is periodic in all directions, else a
        cube with about 27 cubic angstrom per gold-sized atom.
    template : Batch of one structure or ASE Atoms, optional
        Atoms that stay. Without constraints all of them are fixed; with ASE constraints exactly those are.
    c1, c2 : float
        Bond-length window in sums of covalent radii (Paper IV (21)).
    grid : float, optional
        Spacing [angstrom] of the grid on which agents build.
    chemical_potentials : mapping, optional
        Symbol -> eV. With it the objective is the free energy E - sum_i n_i mu_i instead of the energy.

    Raises
    ------
    ConfigurationError
        For unknown symbols, senseless cells or boxes, a template that overlaps itself, or a box too small for the atoms.
    """

    symbols: Any
    cell: Any = 12.0
    pbc: Any = False
    box: Any = None
    template: Any = None
    c1: float = 0.75
    c2: float = 1.25
    grid: float | None = None
    chemical_potentials: Mapping[str, float] | None = None

    # derived, all read-only
    counts: Mapping[str, int] = field(init=False, repr=False)
    box_corner: Array = field(init=False, repr=False)
    box_vectors: Array = field(init=False, repr=False)
    box_open: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "counts", MappingProxyType(parse_symbols(self.symbols)))
        put(self, "symbols", "".join(f"{name}{count}" for name, count in self.counts.items()))
        template = self.template
        if template is not None and not isinstance(template, Batch):
            constrained = bool(template.constraints)
            template = Batch.from_ase(template)
            template = replace(template, columns={}, atom_columns={})
            if not constrained:
                template = replace(template, fixed=np.ones_like(template.fixed))
        if template is not None and len(template) != 1:
            raise ConfigurationError(f"template must be one structure, but it holds {len(template)}")
        put(self, "template", template)
        put(self, "cell", _frozen(template.cells[0] if template is not None else _as_cell(self.cell)))
        put(self, "pbc", _frozen(template.pbc[0] if template is not None else _as_pbc(self.pbc)))
        if not 0 < self.c1 < self.c2:
            raise ConfigurationError(f"the bond-length window needs 0 < c1 < c2, got c1 = {self.c1}, c2 = {self.c2}")
        if self.chemical_potentials is not None:
            known = dict(self.chemical_potentials)
            missing = set(self.counts) - set(known)
            if missing:
                raise ConfigurationError(
                    f"chemical_potentials must name every placed species; missing: {sorted(missing)}"
                )
            put(self, "chemical_potentials", MappingProxyType(known))
        self._set_box(self.box)
        self._check_room()

    def _set_box(self, box: Any) -> None:
        put = object.__setattr__
        corner = np.zeros(3)
        if box is None and self.template is not None:
            raise ConfigurationError(
                "with a template the box must be given: box = (corner, vectors) of the region in which atoms are placed"
            )
        if box is None and self.pbc.all():
            vectors = self.cell.copy()
        elif box is None or isinstance(box, (int, float, np.number)):
            radii = np.array([_core.covalent_radius(int(z)) for z in self.placed_numbers])
            edge = float(box) if box is not None else float(np.cbrt(np.sum((2.3 * radii) ** 3)))
            if not 0 < edge <= LONGEST:
                raise ConfigurationError(
                    f"box must be a positive edge length in angstrom, at most {LONGEST:g}, got {box}"
                )
            vectors = np.eye(3) * edge
            corner = self.cell.sum(axis=0) / 2 - edge / 2
        else:
            try:
                first, second = box
                corner = np.asarray(first, float).reshape(3)
                vectors = _as_cell(second)
                if not np.all(np.abs(corner) <= LONGEST):
                    raise ValueError("too far away")
            except (TypeError, ValueError, OverflowError) as problem:
                raise ConfigurationError(
                    f"box must be an edge length or (corner, vectors), in angstrom, got {str(box)[:200]}"
                ) from problem
        # No walls along a periodic lattice vector that the box spans whole.
        opened = np.zeros(3, bool)
        for k in range(3):
            opened[k] = bool(self.pbc[k] and np.allclose(vectors[k], self.cell[k], atol=1e-6))
        put(self, "box_corner", _frozen(corner))
        put(self, "box_vectors", _frozen(vectors))
        put(self, "box_open", _frozen(opened))
        put(self, "box", (self.box_corner.tolist(), self.box_vectors.tolist()))

    def _check_room(self) -> None:
        radii = np.array([_core.covalent_radius(int(z)) for z in self.placed_numbers])
        needed = float(np.sum(4 / 3 * np.pi * (self.c1 * radii) ** 3))
        volume = float(abs(np.linalg.det(self.box_vectors)))
        if needed > volume:
            raise ConfigurationError(
                f"the box is too small for {self.symbols}: its volume is {volume:.1f} cubic angstrom, the atoms alone "
                f"(spheres of c1 times the covalent radius) need {needed:.1f}; make the box larger"
            )
        if self.template is not None and self.template.atoms > 1:
            closest = float(_core.closest_contacts(replace(self.template, fixed=np.zeros_like(self.template.fixed)))[0])
            if closest < 0.5:
                raise ConfigurationError(
                    f"the template overlaps itself: two of its atoms are at {closest:.2f} of the sum of their covalent "
                    "radii; check positions, cell and pbc"
                )

    @classmethod
    def from_atoms(cls, template: Atoms, symbols: str | Mapping[str, int], **options: Any) -> Problem:
        """A problem on a template: cell and pbc are the template's, its ASE constraints (FixAtoms, FixedPlane,
        FixedLine) say what stays; without constraints all of it stays."""
        return cls(symbols, template=template, **options)

    # ---- derived facts ---------------------------------------------------------------------------
    @property
    def placed_numbers(self) -> Array:
        """(placed,) atomic numbers of the atoms to place."""
        from thalweg.elements import NUMBERS

        return np.array([NUMBERS[name] for name, count in self.counts.items() for _ in range(count)], np.int32)

    @property
    def numbers(self) -> Array:
        """(n,) atomic numbers of a whole structure: template first, then placed atoms."""
        template = self.template.numbers if self.template is not None else np.zeros(0, np.int32)
        return np.concatenate([template, self.placed_numbers]).astype(np.int32)

    @property
    def periodic(self) -> bool:
        return bool(self.pbc.any())

    @property
    def box_arguments(self) -> tuple[Array, Array, Array]:
        """(corner, vectors, open) as the compiled kernels take them."""
        return self.box_corner, self.box_vectors, self.box_open

    def objective(self, batch: Batch) -> Array:
        """(n,) what is minimised: energy, or free energy if chemical potentials are set [eV]; NaN for failed rows."""
        energy = np.where(batch.ok, batch.columns.get("energy", np.full(len(batch), np.nan)), np.nan)
        if self.chemical_potentials is None:
            return energy
        from thalweg.elements import NUMBERS

        for name, mu in self.chemical_potentials.items():
            present = np.add.reduceat(batch.numbers == NUMBERS[name], batch.offsets[:-1]) if len(batch) else 0
            energy = energy - mu * present
        return energy

    def batch(self, positions: Array, **columns: Any) -> Batch:
        """Structures of this problem from positions (k, n, 3) of template and placed atoms."""
        positions = np.asarray(positions, float)
        k, n = positions.shape[0], len(self.numbers)
        fixed = np.zeros((n, 3), bool)
        if self.template is not None:
            fixed[: self.template.atoms] = self.template.fixed
        return Batch(
            positions.reshape(-1, 3),
            np.tile(self.numbers, k),
            np.arange(k + 1) * n,
            np.broadcast_to(self.cell, (k, 3, 3)),
            np.broadcast_to(self.pbc, (k, 3)),
            np.tile(fixed, (k, 1)),
            {name: np.full(k, value) if np.ndim(value) == 0 else value for name, value in columns.items()},
        )

    # ---- storing -----------------------------------------------------------------------------------
    def to_json(self) -> str:
        """Everything that defines the problem, as canonical JSON; numbers survive exactly."""
        template = None
        if self.template is not None:
            template = {
                "positions": self.template.positions.tolist(),
                "numbers": self.template.numbers.tolist(),
                "fixed": self.template.fixed.tolist(),
            }
        potentials = dict(self.chemical_potentials) if self.chemical_potentials is not None else None
        return json.dumps(
            {
                "symbols": self.symbols,
                "cell": self.cell.tolist(),
                "pbc": self.pbc.tolist(),
                "box": [self.box_corner.tolist(), self.box_vectors.tolist()],
                "template": template,
                "c1": self.c1,
                "c2": self.c2,
                "grid": self.grid,
                "chemical_potentials": potentials,
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Problem:
        """The inverse of `to_json`."""
        data = json.loads(text)
        if data["template"] is not None:
            parts = data["template"]
            n = len(parts["numbers"])
            data["template"] = Batch(
                np.reshape(parts["positions"], (n, 3)), np.array(parts["numbers"]), np.array([0, n]),
                np.array([data["cell"]]), np.array([data["pbc"]]), np.reshape(parts["fixed"], (n, 3)),
            )  # fmt: skip
        return cls(**data)


# ---- what stages and observers read ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Context:
    """All that a stage may read.

    `models` maps a name to what `fit` returned; `carry[name]` is what the stage of that name kept in the step before
    (`keep` sets it for the next); `data` holds every true evaluation told so far, failed ones included; `last` is the
    previous step as the store remembers it (no proposed and refined candidates, so that a resumed search sees the same).
    """

    problem: Problem
    data: Batch
    sample: Batch
    pending: Batch
    models: Mapping[str, Any]
    last: Step | None
    carry: Mapping[str, Mapping[str, Array]]
    iteration: int
    key: Key
    stage: str = ""
    _services: Any = None

    def keep(self, **arrays: Any) -> None:
        """Hands small named arrays to this stage's own next step; they are stored."""
        self._services.keep(self.iteration, self.stage, {name: _frozen(values) for name, values in arrays.items()})

    def measure(self, structure: Batch, calculate: Callable[[Batch], Measured], **columns: Any) -> Batch:
        """One true evaluation of one structure, journaled before it is returned; replayed when the search resumes.

        `calculate` gives (energy [eV], forces (n, 3) [eV/angstrom], reason of failure or ""); the row that comes back has
        the columns energy and status (0 ok, 1 failed), `columns`, and the atom column forces.
        """
        return self._services.measure(structure, calculate, columns)

    def measure_many(
        self,
        structures: Batch,
        calculate: Callable[[Iterator[Batch]], Iterable[tuple[int, Measured, float]]],
        columns: Sequence[Mapping[str, Any]],
    ) -> Batch:
        """True evaluations that do not wait for each other; each is journaled as it arrives.

        `calculate` takes the structures from an iterator, which ends early when the search must stop, and gives (how
        many it had taken before this one, what `measure` wants, seconds) in any order. Rows and their numbers are those
        of `measure` on one structure after the other, with `columns[i]` for row i.
        """
        return self._services.measure_many(structures, calculate, columns)

    def features(self, descriptor: Any) -> Array:
        """(n, D) features of `data`, computed once per row for each descriptor."""
        return self._services.features(descriptor, self.data)

    @property
    def threads(self) -> int:
        return self._services.threads


@dataclass(frozen=True, eq=False)
class Asked:
    """The ticket that `ask` gives and `tell` takes: `refined[order[0]]` is evaluated first, `wanted` must pass."""

    ticket: int
    context: Context
    proposed: Batch
    refined: Batch
    order: Array
    wanted: int
    kind: str = "search"

    @property
    def chosen(self) -> Batch:
        return self.refined.take(self.order[: self.wanted])


@dataclass(frozen=True, eq=False)
class Step:
    """One finished iteration: all that an observer may read. `kind` is "search", or "finish" for the last polish of a
    run; `seconds` is wall time by stage."""

    iteration: int
    proposed: Batch
    refined: Batch
    chosen: Batch
    evaluated: Batch
    carry: Mapping[str, Mapping[str, Array]]
    seconds: Mapping[str, float] = field(default_factory=dict)
    kind: str = "search"
