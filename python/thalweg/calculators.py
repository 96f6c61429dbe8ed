"""ASE calculators around the built-in potentials, and calculators by name.

This module and `pool` alone import ASE's calculators; the package loads them on first use.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from ase.calculators.calculator import (
    BaseCalculator,
    CalculationFailed,
    Calculator,
    FileIOCalculator,
    all_changes,
    get_calculator_class,
)
from ase.calculators.calculator import names as ase_names
from ase.data import atomic_numbers, chemical_symbols

from thalweg import _core
from thalweg.errors import ConfigurationError, nearest

__all__ = ["EMT", "LennardJones", "SmoothCarbon", "Tersoff", "landscape_of", "make_calculator", "read_tersoff"]


class _Builtin(Calculator):
    """An ASE calculator whose numbers come from a landscape of the compiled core."""

    implemented_properties = ["energy", "forces", "free_energy"]  # noqa: RUF012
    nolabel = True

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.landscape = self._make_landscape()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "landscape"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.landscape = self._make_landscape()

    def _make_landscape(self) -> _core.Landscape:
        raise NotImplementedError

    def set(self, **parameters: Any) -> dict[str, Any]:
        _check_arguments(type(self).__name__, parameters, self.default_parameters)
        changed = super().set(**parameters)
        if changed and hasattr(self, "landscape"):
            self.landscape = self._make_landscape()
            self.reset()
        return changed

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        n = len(self.atoms)
        batch = SimpleNamespace(
            positions=self.atoms.positions,
            numbers=self.atoms.numbers,
            offsets=np.array([0, n]),
            cells=np.asarray(self.atoms.cell)[None],
            pbc=self.atoms.pbc[None],
            fixed=np.zeros((n, 3), dtype=bool),
        )
        energies, forces = _core.evaluate(self.landscape, batch, threads=1)
        energy = float(energies[0])
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


class EMT(_Builtin):
    """Effective medium theory with the values of ASE's `EMT()`: Al, Cu, Ag, Au, Ni, Pd, Pt, H, C, N, O.

    `landscape` is the `_core.Landscape` behind it. Raises ConfigurationError for other species.
    Jacobsen, Stoltze, Norskov, Surf. Sci. 366, 394 (1996).
    """

    default_parameters = {}  # noqa: RUF012, an instance variable of the base

    def _make_landscape(self) -> _core.Landscape:
        return _core.Emt()


class LennardJones(_Builtin):
    """Lennard-Jones with the parameters and values of ASE's `LennardJones`, all species alike.

    sigma, rc, ro in angstrom, epsilon in eV. rc = None: 3 sigma; ro = None: 0.66 rc; smooth = False: the pair
    energy is shifted to zero at rc, True: switched to zero between ro and rc. `landscape` is the
    `_core.Landscape` behind it. Raises ConfigurationError for parameters that make no sense.
    """

    default_parameters = {  # noqa: RUF012
        "sigma": 1.0,
        "epsilon": 1.0,
        "rc": None,
        "ro": None,
        "smooth": False,
    }

    def _make_landscape(self) -> _core.Landscape:
        return _lennard_jones(self.parameters)


def _lennard_jones(parameters: Mapping[str, Any]) -> _core.Landscape:
    return _core.LennardJones(
        float(parameters["sigma"]),
        float(parameters["epsilon"]),
        rc=float(parameters["rc"] or 0.0),
        ro=float(parameters["ro"] or 0.0),
        smooth=bool(parameters["smooth"]),
    )


class SmoothCarbon(_Builtin):
    """A smooth model of carbon: Morse wells (depth in eV, stiffness in 1/angstrom, r0 in angstrom) and
    angle (cos theta + 1/2)^2 [eV] for two neighbours of an atom, both switched to zero from inner to outer [angstrom].

    For statistics and tests of agents, which need a surface that slopes everywhere; graphene is its lowest sheet. Raises
    ConfigurationError for parameters that make no sense and for atoms other than carbon.
    """

    default_parameters = {  # noqa: RUF012
        "depth": 3.0,
        "stiffness": 2.0,
        "r0": 1.45,
        "angle": 2.0,
        "inner": 1.8,
        "outer": 2.5,
    }

    def _make_landscape(self) -> _core.Landscape:
        return _core.SmoothCarbon(**{name: float(value) for name, value in self.parameters.items()})


class Tersoff(_Builtin):
    """Tersoff's bond-order potential, for carbon, boron nitride and whatever a LAMMPS file describes.

    parameters names a published set, or a file in the format of LAMMPS' `pair_style tersoff`, or is what `read_tersoff`
    returns:

    - "C": carbon (Tersoff, PRL 61, 2879 (1988))
    - "C-2010": carbon, refitted to graphene's phonons (Lindsay, Broido, PRB 81, 205441 (2010))
    - "BN": boron and nitrogen (Los et al., PRB 96, 184108 (2017)) without its corrections for coordination, which are
      zero in hBN and cBN
    - "BNC": boron, nitrogen and carbon (Kinaci et al., PRB 86, 115410 (2012)), the numbers of LAMMPS' BNC.tersoff. For
      sheets that stay sheets: in this set B-B and N-N attract each other down to zero distance, so a search falls there.

    The values of ASE's `Tersoff` (which fails where a bond has no third atom near and n < 1), and of LAMMPS (see
    `thalweg::Tersoff` for where the two differ). `landscape` is the `_core.Landscape` behind it. Raises
    ConfigurationError for an unknown set, a file that cannot be read and, when it first computes, for species that the
    parameters do not cover.
    """

    default_parameters = {"parameters": "C"}  # noqa: RUF012

    def set(self, **parameters: Any) -> dict[str, Any]:
        # ASE's own set() takes "parameters" for the name of a file of settings
        _check_arguments(type(self).__name__, parameters, self.default_parameters)
        changed = {name: value for name, value in parameters.items() if value != self.parameters.get(name)}
        before = dict(self.parameters)
        self.parameters.update(changed)
        if changed and hasattr(self, "landscape"):
            try:
                self.landscape = self._make_landscape()
            except ConfigurationError:
                self.parameters.update(before)
                raise
            self.reset()
        return changed

    def describe(self) -> dict[str, Any]:
        """What a store compares: the name of a published set, or the numbers of a file."""
        given = self.parameters["parameters"]
        known = isinstance(given, str) and given in _core.Tersoff.names()
        return {"Tersoff": {"parameters": given if known else repr(self.landscape)}}

    def __getstate__(self) -> dict[str, Any]:
        # with the numbers: the file may be out of reach where this arrives
        assert isinstance(self.landscape, _core.Tersoff)
        return {**super().__getstate__(), "_entries": self.landscape.entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        entries = state.pop("_entries")
        self.__dict__.update(state)
        self.landscape = _core.Tersoff(entries)

    def _make_landscape(self) -> _core.Tersoff:
        given = self.parameters["parameters"]
        if isinstance(given, Mapping):
            return _tersoff(given)
        if not isinstance(given, (str, os.PathLike)):
            raise ConfigurationError(f"Tersoff's parameters must be a name, a file or a table, but they are {given!r}")
        if isinstance(given, str) and given in _core.Tersoff.names():
            return _core.Tersoff(given)
        if not Path(given).exists():
            names = _core.Tersoff.names()
            listed = ", ".join(f"'{name}'" for name in names)
            raise ConfigurationError(
                f"Tersoff has no parameters named '{given}', and there is no such file here.{nearest(str(given), names)} "
                f"Published sets are {listed}."
            )
        return _tersoff(read_tersoff(given))


_TERSOFF_NUMBERS = ("m", "gamma", "lambda3", "c", "d", "h", "n", "beta", "lambda2", "B", "R", "D", "lambda1", "A")
_LARGEST_TERSOFF_FILE = 10_000_000  # bytes; the largest that LAMMPS brings has 60 kB


def read_tersoff(path: str | os.PathLike[str]) -> dict[tuple[str, str, str], tuple[float, ...]]:
    """The entries of a LAMMPS file of `pair_style tersoff`: {("B", "N", "B"): (m, gamma, lambda3, c, d, h, n, beta,
    lambda2, B, R, D, lambda1, A), ...} in eV and angstrom.

    `#` starts a comment; an entry has 17 words over as many lines as it likes. Raises ConfigurationError, with the line,
    for what is no such file: units other than metal, a label that is no chemical symbol, a word that is no finite number,
    an entry that comes twice or is not complete.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigurationError(f"'{path}' is not a file of Tersoff parameters")
        if path.stat().st_size > _LARGEST_TERSOFF_FILE:
            raise ConfigurationError(
                f"{path}: {path.stat().st_size} bytes are too many for a file of Tersoff parameters"
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read '{path}': {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not a text file") from None
    lines = text.splitlines()
    header = lines[0].split() if lines else []
    if header[:1] == ["#"] and "UNITS:" in header[:-1] and header[header.index("UNITS:") + 1] != "metal":
        raise ConfigurationError(
            f"{path}, line 1: units are '{header[header.index('UNITS:') + 1]}', only metal (eV, angstrom) is read"
        )
    words = [(word, number) for number, line in enumerate(lines, 1) for word in line.split("#")[0].split()]
    entries: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for first in range(0, len(words), 17):
        block = words[first : first + 17]
        where = f"{path}, line {block[0][1]}"
        for word, number in block[:3]:
            if word not in atomic_numbers or word == "X":
                raise ConfigurationError(
                    f"{path}, line {number}: an entry starts with three chemical symbols, but '{word}' is none (labels "
                    "such as Si(D) must be renamed)"
                )
        if len(block) < 17:
            raise ConfigurationError(f"{where}: an entry has three symbols and 14 numbers, this has {len(block)} words")
        values = tuple(_tersoff_number(word, f"{path}, line {number}") for word, number in block[3:])
        species = (block[0][0], block[1][0], block[2][0])
        if species in entries:
            raise ConfigurationError(f"{where}: the entry {' '.join(species)} comes twice")
        entries[species] = values
    if not entries:
        raise ConfigurationError(f"{path}: no Tersoff parameters in this file")
    try:
        _tersoff(entries)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    return entries


def _tersoff_number(word: str, where: str) -> float:
    try:
        value = float(word.replace("d", "e").replace("D", "e"))  # LAMMPS' own files have Fortran's 0.2d0
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigurationError(f"{where}: expected a number, got '{word}'")
    return value


def _tersoff(entries: Mapping[Any, Any]) -> _core.Tersoff:
    """From {(symbol, symbol, symbol): 14 numbers}. Raises ConfigurationError."""
    table: dict[tuple[int, int, int], tuple[float, ...]] = {}
    for species, values in entries.items():
        try:
            first, second, third = (atomic_numbers[symbol] for symbol in species)
            numbers = tuple(float(value) for value in values)
        except (KeyError, TypeError, ValueError):
            numbers = ()
        if len(numbers) != len(_TERSOFF_NUMBERS):
            raise ConfigurationError(
                f"an entry of Tersoff is three symbols and the numbers {', '.join(_TERSOFF_NUMBERS)}, but one is "
                f"{species!r}: {values!r}"
            )
        table[first, second, third] = numbers
    return _core.Tersoff(table)


def landscape_of(calculator: Any) -> _core.Landscape | None:
    """The landscape of the compiled core that gives the same numbers as an ASE calculator, or None.

    Known are the calculators of this module and ASE's own `EMT` (without `asap_cutoff`), `LennardJones` and `Tersoff`.
    Subclasses are not: they may compute anything.
    """
    kind = type(calculator)
    if kind in (EMT, LennardJones, SmoothCarbon, Tersoff):
        return calculator.landscape
    # ASE's own are only loaded if somebody uses them: they bring half of SciPy along
    if kind is _loaded("ase.calculators.emt", "EMT") and not calculator.parameters.asap_cutoff:
        return _core.Emt()
    if kind is _loaded("ase.calculators.lj", "LennardJones"):
        try:
            return _lennard_jones(calculator.parameters)
        except ConfigurationError:  # settings that ASE accepts and the core does not
            return None
    if kind is _loaded("ase.calculators.tersoff", "Tersoff"):
        try:
            return _tersoff(
                {
                    species: [getattr(values, name) for name in _TERSOFF_NUMBERS]
                    for species, values in calculator.parameters.items()
                }
            )
        except ConfigurationError:
            return None
    return None


def _loaded(module: str, name: str) -> Any:
    """A class of a module, or None if nobody has imported it yet."""
    return getattr(sys.modules.get(module), name, None)


_BUILTIN = {"emt": EMT, "lj": LennardJones, "smooth-carbon": SmoothCarbon, "tersoff": Tersoff}
_XTB = {"gfn1-xtb": "GFN1-xTB", "gfn2-xtb": "GFN2-xTB"}
_BASE_ARGUMENTS = ("restart", "ignore_bad_restart_file", "label", "atoms", "directory")


def make_calculator(name: str, **arguments: Any) -> Any:
    """A calculator by name: "emt", "lj", "tersoff", "gfn1-xtb", "gfn2-xtb", "tblite", any name that ASE knows, or
    "module:factory".

    arguments go to the calculator or the factory. Raises ConfigurationError, with the nearest valid name, for
    an unknown name or argument, a module or factory that is not there, or a calculator that cannot be set up.
    """
    if not isinstance(name, str):
        raise ConfigurationError(f"the name of a calculator must be a string, but it is {name!r}")
    if ":" in name:
        factory = _factory(name)
        return _call(name, factory, arguments)
    if name in _BUILTIN:
        _check_arguments(_BUILTIN[name].__name__, arguments, _BUILTIN[name].default_parameters)
        return _call(name, _BUILTIN[name], arguments)
    if name == "tblite" or name in _XTB:
        return _tblite(name, arguments)
    if name not in ase_names:
        options = sorted({*_BUILTIN, "tblite", *_XTB, *ase_names})
        raise ConfigurationError(
            f"there is no calculator named '{name}'.{nearest(name, options)} Valid are 'emt', 'lj', 'tersoff', "
            "'gfn1-xtb', 'gfn2-xtb', 'tblite', the names of ASE's calculators, and 'module:factory'."
        )
    try:
        factory = get_calculator_class(name)
    except ImportError as error:
        raise ConfigurationError(f"ASE's calculator '{name}' needs a package that is not here: {error}") from error
    return _call(name, factory, arguments)


def _tblite(name: str, arguments: dict[str, Any]) -> Any:
    """Extended tight binding (Grimme, Bannwarth, Shushkov, J. Chem. Theory Comput. 13, 1989 (2017)) by tblite."""
    try:
        from tblite.ase import TBLite
    except ImportError as error:
        raise ConfigurationError(
            f"the calculator '{name}' needs the package tblite: pip install \"thalweg[xtb]\" ({error})"
        ) from error

    class Afresh(TBLite):
        """Starts every calculation from free atoms. TBLite starts from the one before: its energies depend on what was
        asked earlier, and are eV off where the charges of another structure lead to another solution.

        Fails where charges ran away: between atoms that are much too near, more electrons than their shells hold can gather
        on one, tens of eV below any true energy."""

        def calculate(self, *positional: Any, **named: Any) -> None:
            self._xtb = self._res = None
            super().calculate(*positional, **named)
            if self.atoms is not None and "charges" in self.results:
                self._check_charges(self.atoms.numbers, self.results["charges"])

        @staticmethod
        def _check_charges(numbers: np.ndarray, charges: np.ndarray) -> None:
            light = numbers <= 18
            core = np.select([numbers <= 2, numbers <= 10], [0, 2], 10)
            most = np.where(numbers <= 2, 2, 8)
            electrons = numbers - core - charges
            out = np.flatnonzero(light & ((electrons < -0.5) | (electrons > most + 0.5)))
            if len(out):
                k = int(out[0])
                raise CalculationFailed(
                    f"the charges ran away: {electrons[k]:.1f} valence electrons on atom {k} "
                    f"({chemical_symbols[numbers[k]]}), which has room for {most[k]}"
                )

    Afresh.__name__ = TBLite.__name__
    settings = {"verbosity": 0, **arguments}
    if name in _XTB:
        if "method" in arguments:
            raise ConfigurationError(f"'{name}' is a method already; with the argument 'method' use the name 'tblite'")
        settings["method"] = _XTB[name]
    return _call(name, Afresh, settings)


def _factory(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"the calculator '{name}' names the module '{module_name}', which cannot be imported: {error}"
        ) from error
    factory = getattr(module, attribute, None) if attribute else None
    if not callable(factory):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigurationError(
            f"the module '{module_name}' has nothing to call that is named '{attribute}'."
            f"{nearest(attribute, callables)}"
        )
    return factory


def _call(name: str, factory: Any, arguments: dict[str, Any]) -> Any:
    known = _argument_names(factory)
    if known is not None:
        _check_arguments(name, arguments, known)
    try:
        return factory(**arguments)
    except ConfigurationError:
        raise
    except Exception as error:  # anything may be wrong in an external program's set-up
        raise ConfigurationError(f"the calculator '{name}' cannot be made: {error}") from error


def _argument_names(factory: Any) -> list[str] | None:
    """Names that a factory accepts, or None if it takes anything (programs with input files of their own)."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return named
    defaults = getattr(factory, "default_parameters", None)
    closed = inspect.isclass(factory) and issubclass(factory, BaseCalculator)
    if closed and defaults and not issubclass(factory, FileIOCalculator):
        return [*named, *defaults, *_BASE_ARGUMENTS]
    return None


def _check_arguments(owner: str, arguments: Mapping[str, Any], known: Any) -> None:
    for argument in arguments:
        if argument not in known:
            takes = ", ".join(sorted(known)) or "none"
            raise ConfigurationError(
                f"'{owner}' takes no argument named '{argument[:60]}'.{nearest(argument, known)} It takes: {takes}."
            )
