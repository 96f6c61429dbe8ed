"""ASE calculators around the built-in potentials, and calculators by name.

This module and `pool` alone import ASE's calculators; the package loads them on first use.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from ase.calculators.calculator import (
    BaseCalculator,
    Calculator,
    FileIOCalculator,
    all_changes,
    get_calculator_class,
)
from ase.calculators.calculator import names as ase_names

from thalweg import _core
from thalweg.errors import ConfigurationError, nearest

__all__ = ["EMT", "LennardJones", "landscape_of", "make_calculator"]


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


def landscape_of(calculator: Any) -> _core.Landscape | None:
    """The landscape of the compiled core that gives the same numbers as an ASE calculator, or None.

    Known are the calculators of this module and ASE's own `EMT` (without `asap_cutoff`) and `LennardJones`.
    Subclasses are not: they may compute anything.
    """
    kind = type(calculator)
    if kind in (EMT, LennardJones):
        return calculator.landscape
    # ASE's own are only loaded if somebody uses them: they bring half of SciPy along
    if kind is _loaded("ase.calculators.emt", "EMT") and not calculator.parameters.asap_cutoff:
        return _core.Emt()
    if kind is _loaded("ase.calculators.lj", "LennardJones"):
        try:
            return _lennard_jones(calculator.parameters)
        except ConfigurationError:  # settings that ASE accepts and the core does not
            return None
    return None


def _loaded(module: str, name: str) -> Any:
    """A class of a module, or None if nobody has imported it yet."""
    return getattr(sys.modules.get(module), name, None)


_BUILTIN = {"emt": EMT, "lj": LennardJones}
_XTB = {"gfn1-xtb": "GFN1-xTB", "gfn2-xtb": "GFN2-xTB"}
_BASE_ARGUMENTS = ("restart", "ignore_bad_restart_file", "label", "atoms", "directory")


def make_calculator(name: str, **arguments: Any) -> Any:
    """A calculator by name: "emt", "lj", "gfn1-xtb", "gfn2-xtb", "tblite", any name that ASE knows, or "module:factory".

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
            f"there is no calculator named '{name}'.{nearest(name, options)} Valid are 'emt', 'lj', 'gfn1-xtb', "
            "'gfn2-xtb', 'tblite', the names of ASE's calculators, and 'module:factory'."
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
    settings = {"verbosity": 0, **arguments}
    if name in _XTB:
        if "method" in arguments:
            raise ConfigurationError(f"'{name}' is a method already; with the argument 'method' use the name 'tblite'")
        settings["method"] = _XTB[name]
    return _call(name, TBLite, settings)


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
