"""Models that learn the energy from what was evaluated: `fit(data)` gives a fitted model, which predicts and
is a landscape to relax on.

A fitted model never changes; `fit(data, previous)` makes the next one, cheaply where it can, and
`restore(data, state)` makes the same one again, bit for bit, from the few numbers in `state` and the
evaluated structures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg import _core
from thalweg.descriptors import Fingerprint
from thalweg.errors import ConfigurationError, nearest
from thalweg.priors import CalculatorPrior, FittedPrior

if TYPE_CHECKING:
    from thalweg.records import Batch

__all__ = ["GPR", "FittedGPR"]

Array = np.ndarray

# The likelihood of fewer points says nothing about lengths.
_FEWEST_FOR_OPTIMISATION = 4
# Lengths may lie between these multiples of the mean distance between training structures.
_LENGTH_RANGE = (0.02, 30.0)
# (long, short) lengths to start from, in the same unit; the first is the initial guess.
_STARTS = ((1.0, 0.2), (3.0, 0.3), (0.4, 0.1), (10.0, 1.0), (1.0, 0.05), (0.2, 0.2))
# Structures whose features differ by less than this part of their length have nearly the same forces to teach.
_SAME = 0.02
# So many structures are done before threads have woken up.
_FEW = 100
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class GPR:
    """Gaussian process on a descriptor, with a pair potential as its prior mean (thesis 2.3, GOFEE).

    E(x) = prior(x) + sum of atom energies + mean + GP(descriptor(x)). The hyperparameters amplitude,
    length_long and length_short are optimised by marginal likelihood whenever the data have grown by `growth`
    (always below `always_below` structures); in between, structures are appended to and removed from the factor in O(n^2).

    Parameters
    ----------
    descriptor : Fingerprint
    prior : "bonding", "fitted", "tight-binding", "repulsive", None, a FittedPrior, a landscape of the core or a calculator
        Mean function. "bonding": Morse wells at the sum of covalent radii (finds minima far sooner);
        "fitted": the same, their lengths and depths fitted to the data now and then (`FittedPrior`);
        "tight-binding": one of the valence electrons of free molecules, where `FittedPrior(form="tight-binding")` starts;
        "repulsive": GOFEE's short-range repulsion. An ASE calculator, or {"calculator": name, argument: value, ...}:
        the model learns what it is off by (`CalculatorPrior`).
    noise : float
        Variance [eV^2]; 1e-5 is Paper III's (3.2e-3 eV)^2, AGOX uses 1e-2.
    kernel : Kernel or None
        Where to start (and stay, with optimise=False); None: lengths from the mean distance between
        structures, amplitude from the spread of the energies.
    weight_long, weight_short : float
        Weights of the two length scales in (2.17); ignored if `kernel` is given, as is `noise`.
    optimise : bool
    starts : int
        Starting points of the optimisation, the current kernel included.
    max_rows : int
        Only that many structures of lowest energy are learned (Paper III: 500).
    energy_window : float
        In eV per free atom. A structure further above the lowest counts as that far above it, and the prior is not fitted
        to it: that it is high is all a search needs to know, and a few crushed ones would set the hyperparameters.
    atom_energies : mapping of symbol to eV, optional
    growth, always_below : float, int
        When hyperparameters are optimised: after the data have grown by this fraction, and always below that
        many.
    use_forces : bool
        Learn the forces, too: derivatives of the Gaussian process at the data, exactly, through the Jacobian of the
        descriptor. Forces on fixed coordinates and NaN are left out.
    noise_force : float
        Standard deviation of a force component [eV/angstrom]. Well above a calculator's own: it also stands for what a
        kernel of two lengths cannot follow. Smaller values made searches on EMT clusters slower.
    max_force_rows : int
        Forces are learned of the structures of lowest energy, whole structures and none that is nearly a copy of one
        before, until they are that many components (but of one structure always); the others give their energy only. A
        fit costs O(rows^3), a candidate's sigma O(rows^2), with rows = structures + force components.
    """

    descriptor: Fingerprint = field(default_factory=Fingerprint)
    _: KW_ONLY
    prior: Any = "bonding"
    noise: float = 1e-5
    kernel: _core.Kernel | None = None
    weight_long: float = 0.99
    weight_short: float = 0.01
    optimise: bool = True
    starts: int = 3
    max_rows: int = 500
    energy_window: float = 2.0
    atom_energies: Mapping[str, float] | None = None
    growth: float = 0.2
    always_below: int = 10
    use_forces: bool = False
    noise_force: float = 0.3
    max_force_rows: int = 1000
    threads: int = field(default=0, repr=False)
    name: str = "gp"

    def __post_init__(self) -> None:
        if not (self.noise > 0 and np.isfinite(self.noise)):
            raise ConfigurationError(f"noise is a variance in eV^2 and must be above 0, got {self.noise}")
        if self.weight_long < 0 or self.weight_short < 0 or not self.weight_long + self.weight_short > 0:
            raise ConfigurationError(
                "weight_long and weight_short must not be negative and not both 0, "
                f"got {self.weight_long} and {self.weight_short}"
            )
        if not (self.noise_force > 0 and np.isfinite(self.noise_force)):
            raise ConfigurationError(
                f"noise_force is a standard deviation in eV/angstrom and must be above 0, got {self.noise_force}"
            )
        for name, least in {
            "starts": 1, "max_rows": 1, "energy_window": 0, "growth": 0, "always_below": 0, "threads": 0,
            "max_force_rows": 1,
        }.items():  # fmt: skip
            if not getattr(self, name) >= least:
                raise ConfigurationError(f"{name} must be at least {least}, got {getattr(self, name)}")
        object.__setattr__(self, "prior", CalculatorPrior.of(self.prior))
        _prior(self.prior)
        _atom_energies(self.atom_energies)

    # ---- learning ------------------------------------------------------------------------------------
    def fit(self, data: Batch, previous: FittedGPR | None = None, *, key: Any = None) -> FittedGPR:
        """Learns evaluated structures.

        data : batch with columns energy (n,) [eV] and status (n,), 0 = ok; other rows are left out. With use_forces also
            the atom column forces (m, 3) [eV/angstrom], where they are known.
        previous : what `fit` or `restore` gave for a beginning of the same data; makes this call cheap.
        key : not used, nothing here is random.

        Without any usable row the fitted model is the prior with a constant sigma. Raises ConfigurationError
        if the structures differ in composition.
        """
        rows = self._rows_to_learn(data)
        if previous is None or not previous._began(self, data):
            return self._refit(data, rows, None)
        gone = np.setdiff1d(previous.rows, rows)
        new = np.setdiff1d(rows, previous.rows)
        if len(new) == 0 and len(gone) == 0:
            return previous
        seen = previous._seen + len(new)
        due = self.optimise and (
            len(rows) < self.always_below or seen - previous._seen_at_optimisation >= self.growth * len(rows)
        )
        fitted_prior = _fitted_prior(self.prior)
        due |= fitted_prior is not None and fitted_prior.due(seen, previous._mean.seen)
        if due or len(previous.rows) == 0 or len(new) > max(8, len(rows) // 10):
            return self._refit(data, rows, previous)
        taught = self._taught_forces(data, rows)
        if not np.array_equal(np.setdiff1d(taught, new), previous._taught):  # a factor cannot lose a structure's forces
            return self._refit(data, rows, previous)
        # Appending comes first: a model is never left without points.
        order = list(previous.rows)
        operations = [int(row) for row in new]
        order += operations
        for row in gone:
            operations.append(-1 - order.index(row))
            order.remove(row)
        return self._changed(
            data, previous, operations, np.concatenate([previous._operations, operations]), seen, taught
        )

    def restore(self, data: Batch, state: Mapping[str, Array]) -> FittedGPR:
        """The fitted model of this `.state`, bit for bit; data: the rows it had learned, in order."""
        factored = np.asarray(state["factored"], np.int64)
        bookkeeping = [int(x) for x in np.asarray(state["seen"])]
        if len(factored) == 0:
            return self._untaught()
        amplitude, length_long, length_short, weight_long, weight_short, noise = map(float, state["kernel"])
        kernel = _core.Kernel(
            amplitude=amplitude,
            length_long=length_long,
            length_short=length_short,
            weight_long=weight_long,
            weight_short=weight_short,
            noise=noise,
        )
        if factored.max() >= len(data.offsets) - 1:
            raise ConfigurationError(
                f"a fitted model learned row {factored.max()}, but there are only {len(data.offsets) - 1} rows of data"
            )
        mean = _Mean.restored(self.prior, data.take(factored).numbers, state)
        taught = np.asarray(state["forces"], np.int64) if self.use_forces else _NO_ROWS
        learned = self._learned(data, factored, mean, taught)
        fingerprint = self._bound(data, factored)
        gpr = self._fitted(fingerprint, kernel, learned)
        at_fit = np.intersect1d(taught, factored)
        start = FittedGPR(self, fingerprint, gpr, factored, factored, _NO_ROWS, at_fit, learned, mean, *bookkeeping)
        operations = np.asarray(state["operations"], np.int64)
        if len(operations) == 0:
            return start
        return self._changed(data, start, [int(x) for x in operations], operations, bookkeeping[0], taught)

    def _refit(self, data: Batch, rows: Array, previous: FittedGPR | None) -> FittedGPR:
        """All at once, and better hyperparameters if they are due."""
        if len(rows) == 0:
            return self._untaught()
        fingerprint = self._bound(data, rows)
        seen = len(rows) if previous is None else previous._seen + len(np.setdiff1d(rows, previous.rows))
        mean = _mean_of(self, data, rows, seen, previous._mean if previous is not None and previous.size else None)
        taught = self._taught_forces(data, rows)
        learned = self._learned(data, rows, mean, taught, previous)
        # one crushed structure is as far from all others as nothing that a search is about
        scale = _mean_distance(learned.features[learned.energies <= mean.ceiling])
        spread = max(float(np.var(learned.targets)), 1e-3)
        kernel = self._initial_kernel(scale, spread)
        known = False
        if previous is not None and len(previous.rows) >= _FEWEST_FOR_OPTIMISATION:
            kernel, known = previous.kernel, True
        seen_at_optimisation = 0 if previous is None else previous._seen_at_optimisation
        due = (
            self.optimise
            and len(rows) >= _FEWEST_FOR_OPTIMISATION
            and (
                len(rows) < self.always_below
                or seen - seen_at_optimisation >= self.growth * len(rows)
                or (previous is not None and mean is not previous._mean)
            )
        )
        gpr = self._fitted(fingerprint, kernel, learned)
        if due:
            low, high = (factor * scale for factor in _LENGTH_RANGE)
            others = [self._initial_kernel(scale, spread, start) for start in _STARTS[(0 if known else 1) :]]
            if known and len(taught):  # so many observations that the last kernel is a good start, and O(rows^3) a step
                others = []
            gpr.optimise(
                bounds={
                    "amplitude": (0.1 * spread, 1e5 * spread),
                    "length_long": (low, high),
                    "length_short": (low, high),
                },
                starts=others[: self.starts - 1],
            )
            seen_at_optimisation = seen
        return FittedGPR(
            self, fingerprint, gpr, rows, rows, _NO_ROWS, taught, learned, mean, seen, seen_at_optimisation
        )

    def _untaught(self) -> FittedGPR:
        return FittedGPR(
            self, None, None, _NO_ROWS, _NO_ROWS, _NO_ROWS, _NO_ROWS, _Learned.empty(), _Mean(_prior(self.prior)), 0, 0
        )

    def _fitted(self, fingerprint: _core.Fingerprint, kernel: _core.Kernel, learned: _Learned) -> _core.Gpr:
        gpr = _core.Gpr(fingerprint.size, kernel, noise_slope=self.noise_force)
        slopes: dict[str, Array] = {}
        if any(len(forces) for forces in learned.forces):
            slopes = {
                "counts": np.array([len(forces) for forces in learned.forces], np.int64),
                "directions": np.concatenate(learned.directions),
                "slopes": np.concatenate(learned.forces),
            }
        gpr.fit(learned.features, learned.targets, **slopes, threads=self._threads())
        return gpr

    def _changed(
        self, data: Batch, start: FittedGPR, steps: list[int], operations: Array, seen: int, taught: Array
    ) -> FittedGPR:
        """`start` with points appended (row >= 0) and removed (-1 - position), one by one."""
        rows = np.array([step for step in steps if step >= 0], np.int64)
        new = self._learned(data, rows, start._mean, taught)
        assert start._gpr is not None  # `fit` refits what has learned nothing
        gpr = start._gpr.copy()
        order, learned = list(start.rows), start._learned
        place = 0
        for step in steps:
            if step >= 0:
                slopes = {"directions": new.directions[place], "slopes": new.forces[place]} if taught.size else {}
                gpr.append(new.features[place], float(new.targets[place]), **slopes)
                order.append(step)
                learned = learned.joined(new.take([place]))
                place += 1
            else:
                gpr.remove(-1 - step)
                del order[-1 - step]
                learned = learned.take(np.delete(np.arange(len(learned.targets)), -1 - step))
        return FittedGPR(
            self,
            start._fingerprint,
            gpr,
            np.array(order, np.int64),
            start._factored,
            np.asarray(operations, np.int64),
            taught,
            learned,
            start._mean,
            seen,
            start._seen_at_optimisation,
        )

    # ---- pieces --------------------------------------------------------------------------------------
    def _rows_to_learn(self, data: Batch) -> Array:
        """(k,) rising indices of the usable rows of lowest energy."""
        return _lowest(data, _usable(self.prior, data), self.max_rows)

    def _taught_forces(self, data: Batch, rows: Array) -> Array:
        """(k,) rising: those of these rows whose forces are learned."""
        if not self.use_forces or "forces" not in data.atom_columns or len(rows) == 0:
            return _NO_ROWS
        known = _known_forces(data)
        energies = np.asarray(data.columns["energy"], float)
        # above the ceiling even the energy is not learned as it is
        rows = rows[energies[rows] <= _ceiling(data, rows, self.energy_window)]
        counts = np.add.reduceat(known.sum(axis=1), data.offsets[:-1])[rows]
        order = np.argsort(energies[rows], kind="stable")
        features = self._bound(data, rows).values(data.take(rows), 1)
        chosen: list[int] = []
        left = self.max_force_rows
        for k in order[counts[order] > 0]:
            if counts[k] > left and chosen:
                break
            apart = np.square(features[chosen] - features[k]).sum(axis=1)
            if np.any(apart < _SAME**2 * np.square(features[k]).sum()):
                continue
            chosen.append(int(k))
            left -= counts[k]
        return np.sort(rows[chosen])

    def _bound(self, data: Batch, rows: Array) -> _core.Fingerprint:
        first = data.offsets[rows[0]], data.offsets[rows[0] + 1]
        return self.descriptor.bind(data.numbers[first[0] : first[1]], bool(np.any(data.pbc[rows[0]])))

    def _learned(
        self, data: Batch, rows: Array, mean: _Mean, taught: Array, previous: FittedGPR | None = None
    ) -> _Learned:
        """Features and targets of these rows, forces of those in `taught`; what `previous` has is taken from it."""
        if previous is not None and len(previous.rows) and not self.use_forces:
            place = {int(row): k for k, row in enumerate(previous.rows)}
            new = np.array([row for row in rows if int(row) not in place], np.int64)
            both = previous._learned.joined(self._learned(data, new, mean, taught)) if len(new) else previous._learned
            place.update({int(row): len(previous.rows) + k for k, row in enumerate(new)})
            learned = both.take([place[int(row)] for row in rows])
            if mean is previous._mean:
                return learned
            return replace(learned, targets=self._targets(data.take(rows), mean)[0])
        batch = data.take(rows)
        if len(rows) == 0:
            return _Learned.empty()
        threads = self.threads if len(rows) > _FEW else 1
        try:
            features = self._bound(data, rows).values(batch, threads)
        except ConfigurationError as problem:
            raise ConfigurationError(f"the GP learns structures of one composition: {problem}") from problem
        energies = np.asarray(batch.columns["energy"], float)
        sizes = np.diff(batch.offsets)
        targets, prior_forces = self._targets(batch, mean)
        directions, forces = [np.zeros((0, features.shape[1]))] * len(rows), [np.zeros(0)] * len(rows)
        for k in np.flatnonzero(np.isin(rows, taught)):
            one, known = batch[int(k)], _known_forces(batch[int(k)])
            # A force is the slope of the energy along minus the change of the features with its coordinate.
            directions[k] = -self._bound(data, rows).jacobian(one, 1)[known]
            forces[k] = (one.atom_columns["forces"] - prior_forces[batch.offsets[k] : batch.offsets[k + 1]])[known]
        return _Learned(
            features,
            targets,
            energies,
            batch.positions.reshape(len(rows), 3 * int(sizes[0])),
            tuple(directions),
            tuple(forces),
        )

    def _targets(self, batch: Batch, mean: _Mean) -> tuple[Array, Array]:
        """(n,) what the Gaussian process learns [eV]: energy - atom energies - prior; and the prior's forces (m, 3)."""
        expected, forces = mean.of(batch, self.atom_energies, threads=self.threads if len(batch) > _FEW else 1)
        return mean.targets(np.asarray(batch.columns["energy"], float), expected), forces

    def _initial_kernel(self, scale: float, spread: float, start: tuple[float, float] = _STARTS[0]) -> _core.Kernel:
        given = self.kernel
        if given is not None and start is _STARTS[0]:
            return given
        return _core.Kernel(
            amplitude=100 * spread if given is None else given.amplitude,
            length_long=start[0] * scale,
            length_short=start[1] * scale,
            weight_long=self.weight_long if given is None else given.weight_long,
            weight_short=self.weight_short if given is None else given.weight_short,
            noise=self.noise if given is None else given.noise,
        )

    def _threads(self) -> int:
        return self.threads or _core.default_threads()


@dataclass(frozen=True, eq=False)
class _Learned:
    """What a GP was taught, row by row; energies and positions say later whether data are still the same."""

    features: Array  # (k, D)
    targets: Array  # (k,) energy - prior - atom energies
    energies: Array  # (k,)
    positions: Array  # (k, 3 atoms)
    directions: tuple[Array, ...] = ()  # k of (m_i, D): -d features / dx of the coordinates whose forces are learned
    forces: tuple[Array, ...] = ()  # k of (m_i,): their forces without the prior's

    @staticmethod
    def empty() -> _Learned:
        return _Learned(np.zeros((0, 0)), np.zeros(0), np.zeros(0), np.zeros((0, 0)))

    def take(self, indices: Any) -> _Learned:
        return _Learned(
            self.features[indices],
            self.targets[indices],
            self.energies[indices],
            self.positions[indices],
            tuple(self.directions[int(k)] for k in indices),
            tuple(self.forces[int(k)] for k in indices),
        )

    def joined(self, other: _Learned) -> _Learned:
        return _Learned(
            np.concatenate([self.features, other.features]),
            np.concatenate([self.targets, other.targets]),
            np.concatenate([self.energies, other.energies]),
            np.concatenate([self.positions, other.positions]),
            self.directions + other.directions,
            self.forces + other.forces,
        )


@dataclass(frozen=True, eq=False)
class _Mean:
    """The prior in use, and what it was fitted to."""

    landscape: _core.Landscape | None
    parameters: Array = field(default_factory=lambda: np.zeros(0))  # (Q,) logarithms; none if it is not fitted
    seen: int = 0  # structures that had been learned at the last fit
    ceiling: float = np.inf  # higher energies count as this [eV]
    prior_ceiling: float = np.inf  # and higher ones of the prior as this: as far above that of the lowest structure

    def of(self, batch: Batch, atom_energies: Mapping[str, float] | None, *, threads: int = 1) -> tuple[Array, Array]:
        """(n,) prior and atom energies [eV], and the prior's forces (m, 3) [eV/angstrom]."""
        energies, forces = np.zeros(len(batch)), np.zeros((len(batch.numbers), 3))
        if self.landscape is not None:
            energies, forces = _core.evaluate(self.landscape, batch, threads=threads)
        return energies + _sum_of_atom_energies(batch, _atom_energies(atom_energies)), forces

    def targets(self, energies: Array, expected: Array) -> Array:
        """(n,) what is to be learned where this was expected [eV]; where both are too high no more than of the lowest."""
        capped = self.ceiling - np.minimum(expected, self.prior_ceiling)
        return np.where(energies <= self.ceiling, energies - expected, capped)

    @property
    def state(self) -> dict[str, Array]:
        """Small arrays from which `restored` makes this again."""
        fitted = {"prior": self.parameters.copy(), "prior_seen": np.array(self.seen, np.int64)}
        return {"ceiling": np.array([self.ceiling, self.prior_ceiling]), **(fitted if len(self.parameters) else {})}

    @staticmethod
    def restored(prior: Any, numbers: Array, state: Mapping[str, Array]) -> _Mean:
        """numbers: atomic numbers of all that was learned."""
        fitted_prior, (ceiling, prior_ceiling) = _fitted_prior(prior), map(float, np.asarray(state["ceiling"]))
        if fitted_prior is None:
            return _Mean(_prior(prior), ceiling=ceiling, prior_ceiling=prior_ceiling)
        parameters = np.asarray(state["prior"], float)
        landscape = fitted_prior.landscape(numbers, parameters)
        return _Mean(landscape, parameters, int(state["prior_seen"]), ceiling, prior_ceiling)


def _ceiling(data: Batch, rows: Array, energy_window: float) -> float:
    """Above which energies of these rows count as this [eV]."""
    energies = np.asarray(data.columns["energy"], float)[rows]
    lowest = data[int(rows[np.argmin(energies)])]
    return float(energies.min()) + energy_window * int((~lowest.fixed).any(axis=1).sum())


def _mean_of(model: Any, data: Batch, rows: Array, seen: int, known: _Mean | None) -> _Mean:
    """The prior of a model for these rows, fitted anew when that is due, and the ceilings of their energies; `known`, the
    same object, where nothing changes: nothing then needs to be computed anew."""
    fitted_prior = _fitted_prior(model.prior)
    energies = np.asarray(data.columns["energy"], float)[rows]
    ceiling, lowest = _ceiling(data, rows, model.energy_window), data[int(rows[np.argmin(energies)])]

    def capped(mean: _Mean) -> _Mean:
        own = float(mean.of(lowest, model.atom_energies)[0][0])
        return replace(mean, ceiling=ceiling, prior_ceiling=own + ceiling - float(energies.min()))

    numbers = data.take(rows).numbers
    due = fitted_prior is not None and (
        known is None or fitted_prior.due(seen, known.seen) or len(known.parameters) != fitted_prior.count(numbers)
    )
    if known is not None and not due:
        same = ceiling == known.ceiling or energies.max() <= min(ceiling, known.ceiling)
        return known if same else capped(known)
    if fitted_prior is None:
        return capped(_Mean(_prior(model.prior)))
    batch = data.take(rows[energies <= ceiling])
    parameters = fitted_prior.fit(batch, known.parameters if known is not None else None, numbers=numbers)
    return capped(_Mean(fitted_prior.landscape(numbers, parameters), parameters, seen))


class FittedGPR:
    """A Gaussian process that has learned its data; made by `GPR.fit`, never changes."""

    def __init__(
        self,
        model: GPR,
        fingerprint: _core.Fingerprint | None,
        gpr: _core.Gpr | None,
        rows: Array,
        factored: Array,
        operations: Array,
        taught: Array,
        learned: _Learned,
        mean: _Mean,
        seen: int,
        seen_at_optimisation: int,
    ):
        self.model = model
        self.rows = rows  # (size,) row of `data` of each training point, in the order of the factor
        self._fingerprint, self._gpr, self._factored, self._operations = (
            fingerprint,
            gpr,
            factored,
            operations,
        )
        self._taught = taught  # (k,) rising: rows whose forces were learned
        self._learned, self._seen, self._seen_at_optimisation = learned, seen, seen_at_optimisation
        self._mean = mean
        self._atom_energies = _atom_energies(model.atom_energies)
        self._landscapes: dict[float, _core.Surrogate] = {}

    def __repr__(self) -> str:
        forces = f", forces of {len(self._taught)}" if self.model.use_forces else ""
        return f"FittedGPR({self.size} structures{forces}, {self.kernel!r})"

    @property
    def size(self) -> int:
        """Number of structures learned."""
        return len(self.rows)

    @property
    def kernel(self) -> _core.Kernel:
        """The hyperparameters in use."""
        return self.model._initial_kernel(1.0, 1.0) if self._gpr is None else self._gpr.kernel

    @property
    def descriptor(self) -> Any:
        """The model's."""
        return self.model.descriptor

    @property
    def prior(self) -> _core.Landscape | None:
        """The mean function in use [eV], with the numbers that were fitted, if they are."""
        return self._mean.landscape

    @property
    def log_likelihood(self) -> float:
        """Log marginal likelihood of the data; NaN without data."""
        return float("nan") if self._gpr is None else self._gpr.log_likelihood

    @property
    def state(self) -> dict[str, Array]:
        """Small arrays from which `GPR.restore` makes this model again.

        kernel : amplitude, length_long, length_short, weight_long, weight_short, noise
        factored : rows in the last full factorisation, in order
        operations : what came after, one by one: a row appended, or -1 - position of a point removed
        seen : rows learned so far, and how many they were at the last optimisation
        ceiling : higher energies counted as this, and for them higher ones of the prior as that [eV]
        prior, prior_seen : of a fitted prior: its parameters, and how many rows there were at its last fit
        forces : with use_forces: rows whose forces were learned
        """
        k = self.kernel
        return {
            "kernel": np.array([k.amplitude, k.length_long, k.length_short, k.weight_long, k.weight_short, k.noise]),
            "factored": self._factored.copy(),
            "operations": self._operations.copy(),
            "seen": np.array([self._seen, self._seen_at_optimisation], np.int64),
            **self._mean.state,
            **({"forces": self._taught.copy()} if self.model.use_forces else {}),
        }

    def features(self, batch: Batch) -> Array:
        """(n, D) features of structures."""
        return self.model.descriptor.values(batch, self.model.threads)

    def predict(self, batch: Batch, *, forces: bool = False, threads: int = 0) -> tuple[Array, ...]:
        """Energy (n,) and sigma (n,) [eV]; with forces also -dE/dx and -d sigma/dx (m, 3) [eV/angstrom].

        NaN where a structure has no energy (atoms on one point). Raises ConfigurationError for another composition.
        """
        if self._gpr is not None:
            return self._surrogate(0.0).predict(batch, forces=forces, threads=threads)
        n, m = len(batch.offsets) - 1, len(batch.numbers)
        energy, slope = np.zeros(n), np.zeros((m, 3))
        if self.prior is not None and n:
            energy, slope = _core.evaluate(self.prior, batch, threads=threads)
        energy = energy + _sum_of_atom_energies(batch, self._atom_energies)
        k = self.kernel
        sigma = np.full(n, np.sqrt(k.amplitude * (k.weight_long + k.weight_short)))
        return (energy, sigma, slope, np.zeros((m, 3))) if forces else (energy, sigma)

    def similarity(self, feature: Array, others: Array) -> Array:
        """(k,) kernel k(x, x') / k(x, x) of a feature vector (D,) with others (k, D); 1 for copies."""
        kernel = self.kernel
        return _covariance(kernel, feature, others) / (kernel.amplitude * (kernel.weight_long + kernel.weight_short))

    def sigma_after(self, batch: Batch, known: Batch, *, threads: int = 0) -> Array:
        """(n,) sigma [eV] of structures as it will be when those of `known` have been learned, too; no energy is needed
        for that. Hyperparameters stay."""
        if self._gpr is None or self._fingerprint is None or not len(known) or not len(batch):
            return self.predict(batch, threads=threads)[1]
        gpr = self._gpr.copy()
        for feature in self._fingerprint.values(known, threads):
            gpr.append(feature, 0.0)
        return gpr.predict(self._fingerprint.values(batch, threads))[1]

    def joint_draw(self, batch: Batch, normal: Array, *, threads: int = 0) -> Array:
        """(n,) energies [eV] of structures under one function drawn from the posterior, E + L z with L L^T = their
        posterior covariance and z = `normal` (n,) standard normal numbers; the constant mean counts as known.

        The first k energies do not depend on the structures after them. Costs O(n (rows^2 + n^2)), rows = energies and
        forces learned. Without data every structure is drawn by itself.
        """
        energy, sigma = self.predict(batch, threads=threads)
        if self._gpr is None or self._fingerprint is None or not len(batch):
            return energy + sigma * normal
        features = self._fingerprint.values(batch, threads)
        solved = self._gpr.whitened(features)
        factor = np.zeros((len(features), len(features)))
        total = self.kernel.amplitude * (self.kernel.weight_long + self.kernel.weight_short)
        # One column after the other, each row by itself and without BLAS: the bits of a row depend neither on the rows
        # below it nor on the number of threads.
        for j in range(len(features)):
            column = _covariance(self.kernel, features[j], features[j:]) - (solved[j:] * solved[j]).sum(axis=1)
            column -= (factor[j:, :j] * factor[j, :j]).sum(axis=1)
            if column[0] > 1e-12 * total:  # else: known from the others, a copy for instance
                factor[j:, j] = column / np.sqrt(column[0])
        draw = np.array(energy)
        for k in range(len(draw)):
            draw += factor[:, k] * normal[k]
        return draw

    def landscape(self, kappa: float = 0.0) -> _core.Landscape:
        """The surface E - kappa sigma to relax on (thesis (2.18)); without data, the prior."""
        if self._gpr is not None:
            return self._surrogate(float(kappa))
        return self.prior if self.prior is not None else _core.PairPrior("bonding", depth=0.0)

    def _surrogate(self, kappa: float) -> _core.Surrogate:
        assert self._fingerprint is not None and self._gpr is not None, "only a model with data is a surrogate"
        if kappa not in self._landscapes:
            self._landscapes[kappa] = _core.Surrogate(
                self._fingerprint,
                self._gpr,
                prior=self.prior,
                atom_energies=self._atom_energies,
                kappa=kappa,
            )
        return self._landscapes[kappa]

    def _began(self, model: GPR, data: Batch) -> bool:
        """Whether this model learned, with the same settings, rows that are still where they were."""
        if self.model is not model and repr(self.model) != repr(model):
            return False
        if self.size == 0:
            return True
        if self.rows.max() >= len(data.offsets) - 1:
            return False
        starts, atoms = data.offsets[self.rows], self._learned.positions.shape[1] // 3
        if np.any(data.offsets[self.rows + 1] - starts != atoms):
            return False
        positions = data.positions[starts[:, None] + np.arange(atoms)].reshape(self.size, -1)
        return np.array_equal(data.columns["energy"][self.rows], self._learned.energies) and np.array_equal(
            positions, self._learned.positions
        )


def _usable(prior: Any, data: Batch) -> Array:
    """(k,) rising rows that have an energy, and a prior where that may fail."""
    if "energy" not in data.columns:
        return _NO_ROWS
    return _with_prior(prior, data, np.flatnonzero(data.ok).astype(np.int64))


def _lowest(data: Batch, rows: Array, most: int) -> Array:
    """At most so many of these rows, those of lowest energy, rising."""
    if len(rows) <= most:
        return rows
    energy = np.asarray(data.columns["energy"], float)[rows]
    return np.sort(rows[np.argsort(energy, kind="stable")[:most]])


def _fitted_prior(prior: Any) -> FittedPrior | None:
    """How a prior is fitted; None if it is not."""
    if isinstance(prior, FittedPrior):
        return prior
    return FittedPrior() if isinstance(prior, str) and prior == "fitted" else None


def _known_forces(batch: Batch) -> Array:
    """(m, 3) whether a component of the forces can be learned."""
    return np.isfinite(batch.atom_columns["forces"]) & ~np.asarray(batch.fixed)


def _covariance(kernel: _core.Kernel, feature: Array, others: Array) -> Array:
    """(k,) kernel (2.17) of a feature vector (D,) with others (k, D) [eV^2]."""
    square = np.square(others - feature).sum(axis=1)
    long = kernel.weight_long * np.exp(-0.5 * square / kernel.length_long**2)
    return kernel.amplitude * (long + kernel.weight_short * np.exp(-0.5 * square / kernel.length_short**2))


def _prior(prior: Any) -> _core.Landscape | None:
    """The mean function before there are data."""
    if (fitted_prior := _fitted_prior(prior)) is not None:
        return fitted_prior.guess()
    if isinstance(prior, str) and prior == "tight-binding":
        return FittedPrior(form="tight-binding").guess()
    if prior is None or isinstance(prior, _core.Landscape):
        return prior
    if isinstance(prior, CalculatorPrior):
        return prior.landscape
    if isinstance(prior, str) and prior in ("bonding", "repulsive"):
        return _core.PairPrior(prior)
    raise ConfigurationError(
        "prior must be 'bonding', 'fitted', 'tight-binding', 'repulsive', None, a FittedPrior, a landscape, a calculator or "
        f'{{"calculator": name}}, got {prior!r}.{nearest(str(prior), ("bonding", "fitted", "tight-binding", "repulsive"))}'
    )


def _with_prior(prior: Any, data: Batch, rows: Array) -> Array:
    """Those of these rows for which the prior has an energy; only a calculator may have none."""
    if not isinstance(prior, CalculatorPrior) or len(rows) == 0:
        return rows
    energy, _ = _core.evaluate(prior.landscape, data.take(rows), threads=1)
    return rows[np.isfinite(energy)]


def _atom_energies(energies: Mapping[str, float] | None) -> dict[int, float]:
    """Atomic number -> eV."""
    from thalweg.elements import NUMBERS

    unknown = [name for name in energies or {} if name not in NUMBERS]
    if unknown:
        raise ConfigurationError(f"atom_energies must be named by chemical symbols, got {unknown}")
    return {NUMBERS[name]: float(energy) for name, energy in (energies or {}).items()}


def _sum_of_atom_energies(batch: Batch, energies: Mapping[int, float]) -> Array:
    """(n,) eV."""
    total = np.zeros(len(batch.offsets) - 1)
    for number, energy in energies.items():
        up_to = np.concatenate([[0], np.cumsum(np.asarray(batch.numbers) == number)])
        total += energy * (up_to[batch.offsets[1:]] - up_to[batch.offsets[:-1]])
    return total


def _mean_distance(features: Array) -> float:
    """Root mean square distance between feature vectors. No BLAS: its bits depend on its threads."""
    n = len(features)
    mean_square = 2.0 * float(np.var(features, axis=0).sum()) * n / max(n - 1, 1)
    norm_square = float(np.square(features).sum(axis=1).max())
    # One structure, or copies of one: a tenth of the size of its feature vector.
    return float(np.sqrt(max(mean_square if mean_square > 1e-6 * norm_square else 0.01 * norm_square, 1e-12)))
