"""Prior means of models beyond fixed pair potentials: calculators, and pair wells that learn.

`CalculatorPrior` makes any calculator a prior: the model then learns only what it is off by (delta-learning;
Ramakrishnan et al., J. Chem. Theory Comput. 11, 2087 (2015)).

`FittedPrior` is a pair prior that learns: Morse wells whose lengths and depths are fitted to evaluated energies and forces.

The fit is a regularised least squares in the logarithms of one stiffness, one radius scale per species and one
depth per pair of species, with Gaussian priors around the guess from covalent radii. The sum of squares

    sum_i (E_i - V_i - mean)^2 / energy_error^2  +  sum_i |F_i + dV_i/dx|^2 / (force_error^2 + force_share^2 <F_i^2>)
    + sum_k (q_k - guess_k)^2 / width_k^2

is made smaller by damped Gauss-Newton steps (Levenberg, Marquardt), never larger than that of the guess.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from thalweg.records import Batch

__all__ = ["CalculatorPrior", "FittedPrior"]

Array = np.ndarray

_MOST_STEPS = 40
# A step that lowers the sum of squares by less than this is the last; 1 is one standard deviation.
_SMALL = 1e-4


class CalculatorPrior:
    """A calculator as the prior mean of a model.

    Parameters
    ----------
    calculator : ASE calculator, or the name of one as `thalweg.calculators.make_calculator` takes it
        Built-in ones run in the compiled core. Others are called for one structure at a time, reset before each call, so
        that a result does not depend on the calls before it; one that fails for a structure gives NaN for that one, and
        evaluated structures without a prior are not learned.
    arguments : mapping, optional
        Of a calculator given by name.
    keep : int
        So many results are kept, those used last.

    Raises ConfigurationError for an unknown name or arguments. Two priors are equal if name and parameters are; a
    calculator that has neither `parameters` nor a method `describe()` is known by its class alone.
    """

    def __init__(self, calculator: Any, arguments: Mapping[str, Any] | None = None, *, keep: int = 20_000):
        from thalweg.calculators import landscape_of, make_calculator

        if isinstance(calculator, str):
            try:
                calculator = make_calculator(calculator, **(arguments or {}))
            except ConfigurationError as problem:
                raise ConfigurationError(f"prior: {problem}") from problem
        elif arguments:
            raise ConfigurationError("arguments go to a calculator given by name, but this one is made already")
        calculator = _without_memory(calculator)
        self._text = _described(calculator)
        self._measure = _Measure(calculator, keep)
        found = landscape_of(calculator)
        self.landscape: _core.Landscape = found or _core.PythonLandscape(self._measure, repr(self))

    def __repr__(self) -> str:
        return f"CalculatorPrior({self._text})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalculatorPrior) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    @property
    def calls(self) -> int:
        """How many structures the calculator was asked for so far; 0 for a built-in one, whose calls cost nothing."""
        return self._measure.calls

    @staticmethod
    def of(prior: Any) -> Any:
        """What a model's `prior` means: a calculator, or {"calculator": name, argument: value, ...}, becomes a
        CalculatorPrior; all else is given back."""
        if isinstance(prior, Mapping):
            arguments = dict(prior)
            name = arguments.pop("calculator", None)
            if not isinstance(name, str):
                raise ConfigurationError(
                    'a prior that is a table names a calculator, as {calculator = "gfn1-xtb"}, but this one has '
                    f"{', '.join(map(repr, prior)) or 'no key'}.{nearest(next(map(str, prior), ''), ['calculator'])}"
                )
            return CalculatorPrior(name, arguments)
        known = prior is None or isinstance(prior, (str, _core.Landscape, CalculatorPrior, FittedPrior))
        if not known and hasattr(prior, "get_potential_energy"):
            return CalculatorPrior(prior)
        return prior


class _Measure:
    """Energy and forces of one structure by an ASE calculator, for the compiled core; results are kept."""

    def __init__(self, calculator: Any, keep: int):
        self._calculator, self._keep, self.calls = calculator, keep, 0
        self._known: OrderedDict[bytes, tuple[float, Array]] = OrderedDict()

    def __call__(self, numbers: Array, positions: Array, cell: Array, pbc: Array) -> tuple[float, Array]:
        key = b"".join(part.tobytes() for part in (numbers, positions, cell, pbc))
        result = self._known.get(key)
        if result is None:
            result = self._known[key] = self._measured(numbers, positions, cell, pbc)
            if len(self._known) > self._keep:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return result

    def _measured(self, numbers: Array, positions: Array, cell: Array, pbc: Array) -> tuple[float, Array]:
        from ase import Atoms

        unknown = np.nan, np.full(positions.shape, np.nan)
        if not np.isfinite(positions).all():
            return unknown
        self.calls += 1
        try:
            if hasattr(self._calculator, "reset"):
                self._calculator.reset()
            atoms = Atoms(numbers, positions, cell=cell if cell.any() else None, pbc=pbc)
            atoms.calc = self._calculator
            energy, forces = float(atoms.get_potential_energy()), np.array(atoms.get_forces(), float)
        except Exception:  # whatever goes wrong in another program
            return unknown
        return (energy, forces) if np.isfinite(energy) and np.isfinite(forces).all() else unknown


def _without_memory(calculator: Any) -> Any:
    """TBLite starts from the wave function of its last structure unless it is told not to."""
    parameters = getattr(calculator, "parameters", None)
    if type(calculator).__name__ == "TBLite" and parameters and parameters.get("cache_api"):
        return type(calculator)(**{**parameters, "cache_api": False})
    return calculator


def _described(calculator: Any) -> str:
    """Class and parameters of a calculator, the same text in every process."""
    if callable(getattr(calculator, "describe", None)):
        return f"{type(calculator).__name__}, {calculator.describe()!r}"
    parameters = dict(getattr(calculator, "parameters", None) or {})
    # calculators made of others (ase.calculators.mixing)
    parts = getattr(getattr(calculator, "mixer", None), "calcs", ())
    texts = [_described(part) for part in parts]
    texts += [f"{name}={_plain(value)}" for name, value in sorted(parameters.items())]
    return f"{type(calculator).__name__}({', '.join(texts)})"


def _plain(value: Any) -> str:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_plain(item)}" for name, item in sorted(value.items(), key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@dataclass(frozen=True)
class FittedPrior:
    """Morse wells fitted to the data, as the prior mean of a `GPR`.

    Parameters
    ----------
    depth : float
        Guess of every well [eV].
    stiffness : float
        Guess of a r0.
    radius_scale : float
        Guess: wells at this multiple of the sum of covalent radii.
    depth_width, stiffness_width, radius_width : float
        Standard deviations of the logarithms around the guess; parameters stay within four of them.
    energy_error : float
        How well pair wells are expected to meet an energy [eV].
    force_error, force_share : float
        And a force: this much [eV/angstrom], and this part of the structure's root mean square force.
    most_rows : int
        Only that many structures of lowest energy are fitted.
    always_below, growth : int, float
        Fitted at every change below that many structures, then whenever they have grown by this factor.
    """

    depth: float = 0.8
    stiffness: float = 4.0
    radius_scale: float = 1.0
    _: KW_ONLY
    depth_width: float = 0.8
    stiffness_width: float = 0.3
    radius_width: float = 0.1
    energy_error: float = 0.5
    force_error: float = 0.3
    force_share: float = 0.15
    most_rows: int = 40
    always_below: int = 8
    growth: float = 1.5

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "stiffness",
            "radius_scale",
            "depth_width",
            "stiffness_width",
            "radius_width",
            "energy_error",
            "force_error",
        ):
            if not (getattr(self, name) > 0 and np.isfinite(getattr(self, name))):
                raise ConfigurationError(f"{name} of a fitted prior must be above 0, got {getattr(self, name)}")
        for name, least in {"force_share": 0, "most_rows": 1, "always_below": 0, "growth": 1}.items():
            if not getattr(self, name) >= least:
                raise ConfigurationError(
                    f"{name} of a fitted prior must be at least {least}, got {getattr(self, name)}"
                )

    def due(self, seen: int, seen_at_fit: int) -> bool:
        """Whether to fit again, after `seen` structures, the last fit being of `seen_at_fit`."""
        return seen > seen_at_fit and (seen < self.always_below or seen >= self.growth * seen_at_fit)

    def guess(self) -> _core.Landscape:
        """The prior before anything is known."""
        return _core.PairPrior("bonding", depth=self.depth, stiffness=self.stiffness, radius_scale=self.radius_scale)

    def landscape(self, numbers: Array, parameters: Array) -> _core.MorsePrior:
        """The wells of these parameters, as `fit` gives them; numbers: atomic numbers, in any order and often."""
        return _Wells(self, numbers).landscape(np.asarray(parameters, float))

    def fit(self, data: Batch, start: Array | None = None) -> Array:
        """Logarithms of the parameters: stiffness, radius scale of each species (rising atomic number), depth of
        each pair of species.

        data : at least one structure, all evaluated, with column energy and, if there is one, atom column forces
            (rows with NaN count by their energy alone; forces on fixed coordinates are left out).
        start : where to begin, unless the guess is better.
        """
        wells = _Wells(self, data.numbers)
        order = np.argsort(data.columns["energy"], kind="stable")[: self.most_rows]
        task = _LeastSquares(wells, data.take(np.sort(order)))
        parameters = wells.guess
        least, *normal = task.normal_equations(parameters)
        if not np.isfinite(least):  # atoms on one point
            return parameters
        if start is not None and task.sum_of_squares(start) < least:
            parameters = np.asarray(start, float)
            least, *normal = task.normal_equations(parameters)
        damping = 1e-3
        for _ in range(_MOST_STEPS):
            matrix, slope = normal
            step = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), -slope)
            trial = np.clip(parameters + step, wells.low, wells.high)
            new, *new_normal = task.normal_equations(trial)
            if new < least:
                gain, parameters, least, normal = least - new, trial, new, new_normal
                damping = max(0.1 * damping, 1e-9)
                if gain < _SMALL:
                    break
            else:
                damping *= 10.0
                if damping > 1e6:
                    break
        return parameters


class _Wells:
    """Parameters (logarithms) <-> wells of the species at hand."""

    def __init__(self, settings: FittedPrior, numbers: Array):
        self.settings = settings
        self.species = [int(z) for z in np.unique(numbers)]
        self.pairs = [(a, b) for k, a in enumerate(self.species) for b in self.species[k:]]
        self.radii = np.array([_core.covalent_radius(z) for z in self.species])
        count = len(self.species)
        self.guess = np.log([settings.stiffness, *[settings.radius_scale] * count, *[settings.depth] * len(self.pairs)])
        self.widths = np.array(
            [
                settings.stiffness_width,
                *[settings.radius_width] * count,
                *[settings.depth_width] * len(self.pairs),
            ]
        )
        self.low, self.high = self.guess - 4 * self.widths, self.guess + 4 * self.widths

    def landscape(self, parameters: Array) -> _core.MorsePrior:
        stiffness, scales, depths = self._split(parameters)
        radius = dict(zip(self.species, scales * self.radii, strict=True))
        return _core.MorsePrior(
            {
                (a, b): (float(depth), float(radius[a] + radius[b]), stiffness)
                for (a, b), depth in zip(self.pairs, depths, strict=True)
            }
        )

    def chain(self, parameters: Array) -> Array:
        """(Q, P, 3): change of depth, r0 and stiffness of each pair with each parameter."""
        stiffness, scales, depths = self._split(parameters)
        count = len(self.species)
        out = np.zeros((len(parameters), len(self.pairs), 3))
        out[0, :, 2] = stiffness
        for k, pair in enumerate(self.pairs):
            for z in pair:  # twice for a pair of like atoms
                at = self.species.index(z)
                out[1 + at, k, 1] += scales[at] * self.radii[at]
            out[1 + count + k, k, 0] = depths[k]
        return out

    def _split(self, parameters: Array) -> tuple[float, Array, Array]:
        values = np.exp(parameters)
        count = len(self.species)
        return float(values[0]), values[1 : 1 + count], values[1 + count :]


class _LeastSquares:
    """The sum of squares and its normal equations; no BLAS, whose bits depend on its threads."""

    def __init__(self, wells: _Wells, data: Batch):
        self.wells, self.data = wells, data
        settings = wells.settings
        self.energies = np.asarray(data.columns["energy"], float)
        self.energy_weight = 1.0 / settings.energy_error**2
        forces = np.asarray(data.atom_columns.get("forces", np.full((data.atoms, 3), np.nan)), float)
        owner = np.repeat(np.arange(len(data)), np.diff(data.offsets))
        known = np.ones(len(data), bool)
        known[owner[~np.isfinite(forces).all(axis=1)]] = False
        self.free = known[owner][:, None] & ~data.fixed
        self.forces = forces[self.free]
        row = np.broadcast_to(owner[:, None], data.fixed.shape)[self.free]
        squares = np.bincount(row, self.forces**2, len(data)) / np.maximum(np.bincount(row, minlength=len(data)), 1)
        self.force_weight = 1.0 / (settings.force_error**2 + settings.force_share**2 * squares)[row]

    def sum_of_squares(self, parameters: Array) -> float:
        return self.normal_equations(parameters)[0]

    def normal_equations(self, parameters: Array) -> tuple[float, Array, Array]:
        """Sum of squares, J^T J (Q, Q) and J^T residual (Q,)."""
        wells = self.wells
        energies, forces, d_energies, d_forces = wells.landscape(parameters).derivatives(self.data)
        chain = wells.chain(parameters)
        off = energies - self.energies
        off -= off.mean()
        force_off = forces[self.free] - self.forces
        by_energy = np.einsum("qpk,pkn->qn", chain, d_energies)
        by_energy -= by_energy.mean(axis=1, keepdims=True)
        by_force = np.einsum("qpk,pkm->qm", chain, d_forces[:, :, self.free])
        from_guess, inverse = parameters - wells.guess, wells.widths**-2
        total = (
            self.energy_weight * np.square(off).sum()
            + (self.force_weight * np.square(force_off)).sum()
            + (inverse * np.square(from_guess)).sum()
        )
        weighted = by_force * self.force_weight
        matrix = (
            self.energy_weight * np.einsum("qn,rn->qr", by_energy, by_energy)
            + np.einsum("qm,rm->qr", weighted, by_force)
            + np.diag(inverse)
        )
        slope = (
            self.energy_weight * np.einsum("qn,n->q", by_energy, off)
            + np.einsum("qm,m->q", weighted, force_off)
            + inverse * from_guess
        )
        return float(total) if np.isfinite(total) else np.inf, matrix, slope
