"""Prior means of models beyond fixed pair potentials: calculators, and wells that learn.

`CalculatorPrior` makes any calculator a prior: the model then learns only what it is off by (delta-learning;
Ramakrishnan et al., J. Chem. Theory Comput. 11, 2087 (2015)).

`FittedPrior` is a prior that learns: wells whose lengths, depths and shapes are fitted to evaluated energies and forces.

The form is `ManyBodyPrior` of the compiled core: pair wells at one end, metals' second-moment bonds at the other, and the
data say where between; or, for molecules, `TightBinding`, of which the second moment is an approximation. The fit is a
regularised least squares in the logarithms of its numbers, with Gaussian priors around the guess from covalent radii. The
sum of squares

    sum_i (E_i - V_i - mean)^2 / (s energy_error)^2
    + sum_i |F_i + dV_i/dx|^2 / ((s force_error)^2 + force_share^2 <F_i^2>) + sum_k (q_k - guess_k)^2 / width_k^2

is made smaller by damped Gauss-Newton steps (Levenberg, Marquardt), never larger than that of the guess. The scale s of the
errors, at most 1, is that of the residuals of the first of two rounds: a form that suits the data is held to them.
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
_SMALL = 1e-2
# Of the logarithm of a parameter, for derivatives by central differences.
_STEP = 1e-5
# The errors shrink to this part of what they are without data.
_LEAST_SCALE = 0.1
# Parameters stay within so many widths of the guess.
_RANGE = 4.0
_WIDTHS = ("depth", "stiffness", "ratio", "radius", "exponent", "hopping", "level", "coupling")
# Structures whose energies are closer [eV] count as one in a fit of tight binding.
_APART = 0.1
# Guess of tight binding: {pair: (coupling ss [eV], q, repulsion [eV], p / q)} at the sum of covalent radii, the other
# couplings (sp, pp sigma, pp pi) in units of ss, and levels (s, p) [eV]. From benchmarks/fit_tight_binding.py: a fit to
# random structures of C4H5NO, C5H6N2 and C5H8O in GFN1-xTB.
_BONDS = {
    (1, 1): (-9.62, 1.30, 13.83, 1.75), (1, 6): (-3.11, 1.79, 4.38, 2.23), (1, 7): (-3.54, 1.93, 5.16, 2.03),
    (1, 8): (-3.23, 2.26, 5.26, 1.80), (6, 6): (-1.13, 2.72, 2.59, 2.01), (6, 7): (-1.17, 2.34, 2.26, 2.22),
    (6, 8): (-1.18, 2.35, 2.32, 2.13), (7, 7): (-1.13, 2.96, 2.54, 1.92), (7, 8): (-1.36, 2.19, 2.74, 2.10),
    (8, 8): (-1.59, 2.80, 3.50, 2.00),
}  # fmt: skip
_COUPLINGS = np.array([1.0, -1.22, -1.58, 0.84])
_LEVELS = {1: (-16.57, 0.0), 6: (-17.10, -15.39), 7: (-18.98, -16.06), 8: (-21.49, -17.39)}
# Other pairs, first for bonds to hydrogen: coupling and repulsion in units of hbar^2 / (m r0^2) [eV angstrom^2], decays;
# factors of a free atom's levels. The same in round numbers.
_HBAR2_BY_MASS = 7.61996
_OTHER_BONDS = ((-0.52, 1.8, 0.75, 2.0), (-0.36, 2.5, 0.75, 2.0))
_OTHER_LEVELS = (0.75, 1.2)


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

        self._made_of = calculator, dict(arguments or {}), keep
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

    def __reduce__(self) -> Any:  # what is compiled does not travel; results that were kept need not
        return _calculator_prior, self._made_of

    @property
    def calls(self) -> int:
        """How many structures the calculator was asked for so far; 0 for a built-in one, whose calls cost nothing."""
        return self._measure.calls

    @property
    def each_call_costs(self) -> bool:
        """Whether the calculator is not a built-in one."""
        return isinstance(self.landscape, _core.PythonLandscape)

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


def _calculator_prior(calculator: Any, arguments: Mapping[str, Any], keep: int) -> CalculatorPrior:
    return CalculatorPrior(calculator, arguments, keep=keep)


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
    """Wells fitted to the data, as the prior mean of a `GPR` or `LocalGPR`.

    Parameters
    ----------
    depth : float
        Guess of every well [eV].
    stiffness, ratio : float
        Guess of how fast bonds fall off, in units of 1 / length, and how much faster the repulsion does.
    radius_scale : float
        Guess: wells at this multiple of the sum of covalent radii.
    exponent : float
        Guess of how bonds add up: 1 pair wells, 1/2 metals.
    depth_width, stiffness_width, ratio_width, radius_width, exponent_width : float
        Standard deviations of the logarithms (of ratio - 1) around the guess; parameters stay within four of them, and 0
        holds them. `exponent=1.0, exponent_width=0.0, ratio_width=0.0` makes Morse wells.
    form : "wells" or "tight-binding"
        Wells, or tight binding of the valence electrons (`_core.TightBinding`), for free molecules of main group elements:
        it knows valence, angles and conjugation. Of the guesses above it takes `radius_scale` alone, of the widths those
        of depth (its repulsions), stiffness and ratio; one evaluation costs 0.1 to 0.2 ms for 14 atoms.
    hopping_width, level_width, coupling_width : float
        Of tight binding: standard deviations of the logarithms of each pair's couplings, of each species' levels, and of
        the couplings sp, pp sigma and pp pi, each relative to ss, which all pairs share.
    energy_error : float
        How well the wells are expected to meet an energy [eV], before the data say better.
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
    ratio: float = 2.0
    exponent: float = 0.7
    depth_width: float = 0.8
    stiffness_width: float = 0.3
    ratio_width: float = 0.5
    radius_width: float = 0.1
    exponent_width: float = 0.4
    hopping_width: float = 0.3
    level_width: float = 0.1
    coupling_width: float = 0.2
    energy_error: float = 0.5
    force_error: float = 0.3
    force_share: float = 0.15
    form: str = "wells"
    most_rows: int = 40
    always_below: int = 8
    growth: float = 1.5

    def __post_init__(self) -> None:
        least = {"force_share": 0, "most_rows": 1, "always_below": 0, "growth": 1}
        least |= {f"{name}_width": 0 for name in _WIDTHS}
        for name in ("depth", "stiffness", "radius_scale", "exponent", "energy_error", "force_error"):
            if not (getattr(self, name) > 0 and np.isfinite(getattr(self, name))):
                raise ConfigurationError(f"{name} of a fitted prior must be above 0, got {getattr(self, name)}")
        if self.form not in ("wells", "tight-binding"):
            raise ConfigurationError(f"form of a fitted prior must be 'wells' or 'tight-binding', got {self.form!r}")
        if not (self.ratio > 1 and np.isfinite(self.ratio)):
            raise ConfigurationError(f"ratio of a fitted prior must be above 1, got {self.ratio}")
        for name, bound in least.items():
            value = getattr(self, name)
            if not value >= bound or (name.endswith("_width") and value == np.inf):  # widths make the fit well-posed
                raise ConfigurationError(f"{name} of a fitted prior must be at least {bound}, and finite, got {value}")

    def due(self, seen: int, seen_at_fit: int) -> bool:
        """Whether to fit again, after `seen` structures, the last fit being of `seen_at_fit`."""
        return seen > seen_at_fit and (seen < self.always_below or seen >= self.growth * seen_at_fit)

    def guess(self) -> _core.Landscape:
        """The prior before anything is known; needs no list of species."""
        if self.form == "tight-binding":
            elements = np.array(_core.TightBinding.elements())
            return self.landscape(elements, self._form(elements).guess)
        return _core.PairPrior("bonding", depth=self.depth, stiffness=self.stiffness, radius_scale=self.radius_scale)

    def count(self, numbers: Array) -> int:
        """How many parameters the species among these atomic numbers have."""
        return len(self._form(numbers).guess)

    def _form(self, numbers: Array) -> _Wells | _Bonds:
        return (_Bonds if self.form == "tight-binding" else _Wells)(self, numbers)

    def landscape(self, numbers: Array, parameters: Array) -> _core.Landscape:
        """The wells of these parameters, as `fit` gives them; numbers: atomic numbers, in any order and often."""
        return self._form(numbers).landscape(np.asarray(parameters, float))

    def fit(self, data: Batch, start: Array | None = None, *, numbers: Array | None = None) -> Array:
        """Logarithms of the parameters, pair by pair of species (rising atomic numbers): depths, radius scales,
        stiffnesses, ratios - 1; then the exponent of each species.

        data : at least one structure, all evaluated, with column energy and, if there is one, atom column forces
            (rows with NaN count by their energy alone; forces on fixed coordinates are left out).
        start : where to begin, unless the guess is better or the species are others.
        numbers : atomic numbers of all species that count; default: those of the data.
        """
        wells = self._form(data.numbers if numbers is None else numbers)
        order = np.argsort(data.columns["energy"], kind="stable")
        if self.form == "tight-binding":  # its fit is slow, and the points of one polish teach it the same
            order = order[_apart(np.asarray(data.columns["energy"], float)[order], _APART)]
        order = order[: self.most_rows]
        task = _LeastSquares(wells, data.take(np.sort(order)))
        parameters = wells.guess
        if start is not None and len(start) == len(parameters):
            start = np.clip(np.asarray(start, float), wells.low, wells.high)
            parameters = start if task.sum_of_squares(start) < task.sum_of_squares(parameters) else parameters
        parameters = self._descend(task, parameters)
        task.rescale(parameters)
        return self._descend(task, parameters)

    @staticmethod
    def _descend(task: _LeastSquares, parameters: Array) -> Array:
        wells = task.wells
        least = task.sum_of_squares(parameters)
        if not np.isfinite(least):  # atoms on one point
            return parameters
        damping = 1e-3
        matrix, slope = task.normal_equations(parameters)
        for _ in range(_MOST_STEPS):
            step = np.zeros(len(parameters))
            free = np.flatnonzero(wells.widths > 0)
            inner = matrix[np.ix_(free, free)]
            step[free] = np.linalg.solve(inner + damping * np.diag(np.diag(inner)), -slope[free])
            trial = np.clip(parameters + step, wells.low, wells.high)
            new = task.sum_of_squares(trial)
            if new < least:
                gain, parameters, least = least - new, trial, new
                damping = max(0.1 * damping, 1e-9)
                if gain < max(_SMALL, wells.enough * least):
                    break
                matrix, slope = task.normal_equations(parameters)
            else:
                damping *= 10.0
                if damping > 1e6:
                    break
        return parameters


def _apart(rising: Array, distance: float) -> Array:
    """Which of rising numbers are further than a distance from the last one taken."""
    taken: list[int] = []
    for k, value in enumerate(rising):
        if not taken or value > rising[taken[-1]] + distance:
            taken.append(k)
    return np.array(taken, np.int64)


class _Wells:
    """Parameters (logarithms) <-> wells of the species at hand."""

    one_sided, enough = False, 0.0

    def __init__(self, settings: FittedPrior, numbers: Array):
        self.settings = settings
        self.species = [int(z) for z in np.unique(numbers)]
        self.pairs = [(a, b) for k, a in enumerate(self.species) for b in self.species[k:]]
        self.radii = np.array([_core.covalent_radius(a) + _core.covalent_radius(b) for a, b in self.pairs])
        guess = (settings.depth, settings.radius_scale, settings.stiffness, settings.ratio - 1.0, settings.exponent)
        widths = (
            settings.depth_width, settings.radius_width, settings.stiffness_width, settings.ratio_width,
            settings.exponent_width,
        )  # fmt: skip
        counts = [len(self.pairs)] * 4 + [len(self.species)]
        self.guess = np.repeat(np.log(guess), counts)
        self.widths = np.repeat(np.array(widths, float), counts)
        self.low, self.high = self.guess - _RANGE * self.widths, self.guess + _RANGE * self.widths

    def landscape(self, parameters: Array) -> _core.ManyBodyPrior:
        values = np.exp(parameters)
        count = len(self.pairs)
        depth, scale, stiffness, excess = values[: 4 * count].reshape(4, count)
        rows = np.stack([depth, scale * self.radii, stiffness, 1.0 + excess], axis=1)
        return _core.ManyBodyPrior(
            {pair: tuple(row) for pair, row in zip(self.pairs, rows.tolist(), strict=True)},
            dict(zip(self.species, values[4 * count :].tolist(), strict=True)),
        )


class _Bonds:
    """Parameters (logarithms) <-> tight binding of the species at hand."""

    one_sided, enough = True, 1e-3  # its fit is slow: derivatives from one side, no step that gains a thousandth

    def __init__(self, settings: FittedPrior, numbers: Array):
        self.settings = settings
        self.species = [int(z) for z in np.unique(numbers)]
        self.pairs = [(a, b) for k, a in enumerate(self.species) for b in self.species[k:]]
        radii = [_core.covalent_radius(a) + _core.covalent_radius(b) for a, b in self.pairs]
        self.radii = settings.radius_scale * np.array(radii)
        pairs, n = len(self.pairs), len(self.species)
        bonds = np.array([self._bond(pair, r0) for pair, r0 in zip(self.pairs, self.radii, strict=True)])
        self.levels = np.array(
            [_LEVELS.get(z, np.array(_core.TightBinding.free_atom(z)) * _OTHER_LEVELS) for z in self.species]
        )
        logs, widths = [], []
        for guess, width, count in (
            (-bonds[:, 0], settings.hopping_width, pairs),
            (bonds[:, 2], settings.depth_width, pairs),
            (bonds[:, 1], settings.stiffness_width, pairs),
            (bonds[:, 3] - 1.0, settings.ratio_width, pairs),
            (1.0, settings.level_width, 2 * n),
            (1.0, settings.coupling_width, 3),
        ):
            logs.append(np.log(np.broadcast_to(guess, count)))
            widths.append(np.full(count, width, float))
        self.guess, self.widths = np.concatenate(logs), np.concatenate(widths)
        self.low, self.high = self.guess - _RANGE * self.widths, self.guess + _RANGE * self.widths

    @staticmethod
    def _bond(pair: tuple[int, int], r0: float) -> tuple[float, ...]:
        if pair in _BONDS:
            return _BONDS[pair]
        coupling, decay, repulsion, ratio = _OTHER_BONDS[pair[0] > 1]
        unit = _HBAR2_BY_MASS / r0**2
        return coupling * unit, decay, repulsion * unit, ratio

    def landscape(self, parameters: Array) -> _core.TightBinding:
        values, count = np.exp(parameters), len(self.pairs)
        hopping, repulsion, decay, excess = values[: 4 * count].reshape(4, count)
        levels = self.levels * values[4 * count : -3].reshape(-1, 2)
        couplings = -hopping[:, None] * _COUPLINGS * np.concatenate([[1.0], values[-3:]])
        rows = np.column_stack([couplings, self.radii, decay, repulsion, 1.0 + excess])
        return _core.TightBinding(
            {pair: tuple(row) for pair, row in zip(self.pairs, rows.tolist(), strict=True)},
            {z: tuple(level) for z, level in zip(self.species, levels.tolist(), strict=True)},
        )


class _LeastSquares:
    """The sum of squares and its normal equations; no BLAS, whose bits depend on its threads."""

    def __init__(self, wells: _Wells | _Bonds, data: Batch):
        self.wells, self.data = wells, data
        self.energies = np.asarray(data.columns["energy"], float)
        forces = np.asarray(data.atom_columns.get("forces", np.full((data.atoms, 3), np.nan)), float)
        owner = np.repeat(np.arange(len(data)), np.diff(data.offsets))
        known = np.ones(len(data), bool)
        known[owner[~np.isfinite(forces).all(axis=1)]] = False
        self.free = known[owner][:, None] & ~data.fixed
        self.forces = forces[self.free]
        row = np.broadcast_to(owner[:, None], data.fixed.shape)[self.free]
        squares = np.bincount(row, self.forces**2, len(data)) / np.maximum(np.bincount(row, minlength=len(data)), 1)
        self._squares = squares[row]
        self._set_scale(1.0)

    def _set_scale(self, scale: float) -> None:
        settings = self.wells.settings
        self.weights = np.concatenate(
            [
                np.full(len(self.energies), 1.0 / (scale * settings.energy_error)),
                1.0 / np.sqrt((scale * settings.force_error) ** 2 + settings.force_share**2 * self._squares),
            ]
        )

    def rescale(self, parameters: Array) -> None:
        """Errors as large as the residuals of these parameters."""
        residuals = self._residuals(parameters)
        if np.isfinite(residuals).all():
            self._set_scale(float(np.clip(np.sqrt(np.mean(residuals**2)), _LEAST_SCALE, 1.0)))

    def _residuals(self, parameters: Array) -> Array:
        energies, forces = _core.evaluate(self.wells.landscape(parameters), self.data, threads=1)
        off = energies - self.energies
        return np.concatenate([off - off.mean(), forces[self.free] - self.forces]) * self.weights

    def _from_guess(self, parameters: Array) -> Array:
        widths = self.wells.widths
        return np.where(widths > 0, parameters - self.wells.guess, 0.0) / np.where(widths > 0, widths, 1.0)

    def sum_of_squares(self, parameters: Array) -> float:
        total = np.square(self._residuals(parameters)).sum() + np.square(self._from_guess(parameters)).sum()
        return float(total) if np.isfinite(total) else np.inf

    def normal_equations(self, parameters: Array) -> tuple[Array, Array]:
        """J^T J (Q, Q) and J^T residual (Q,)."""
        residuals, widths = self._residuals(parameters), self.wells.widths
        jacobian = np.zeros((len(parameters), len(residuals)))
        for k in np.flatnonzero(widths > 0):  # the others are held
            step = np.zeros(len(parameters))
            step[k] = _STEP
            up = self._residuals(parameters + step)
            down = residuals if self.wells.one_sided else self._residuals(parameters - step)
            jacobian[k] = (up - down) / (_STEP if self.wells.one_sided else 2 * _STEP)
        precision = np.where(widths > 0, 1.0 / np.where(widths > 0, widths, 1.0), 0.0)
        matrix = np.einsum("qm,rm->qr", jacobian, jacobian) + np.diag(precision**2)
        slope = np.einsum("qm,m->q", jacobian, residuals) + precision * self._from_guess(parameters)
        return matrix, slope
