"""A model that learns energies and forces of atomic environments: `LocalGPR`, usable wherever `GPR` is.

E = prior + sum of atom energies + sum over atoms of f(surroundings of the atom), with f a sparse Gaussian process. One
calculation teaches it 3 N forces beside one energy, and what it learned of one composition or cell size holds in others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError
from thalweg.files import read_arrays, senseless_is_an_error
from thalweg.models import (
    _atom_energies,
    _fitted_prior,
    _lowest,
    _Mean,
    _mean_of,
    _prior,
    _sum_of_atom_energies,
    _usable,
)
from thalweg.priors import CalculatorPrior

if TYPE_CHECKING:
    from thalweg.records import Batch

__all__ = ["FittedLocalGPR", "LocalGPR"]

Array = np.ndarray

_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class LocalGPR:
    """Sparse Gaussian process over atomic environments, taught energies and forces.

    The kernel between two atoms of one species is amplitude exp(-|q - q'|^2 / 2 length^2) of their scaled two- and
    three-body symmetry functions q (Behler, Parrinello, PRL 98, 146401 (2007)); inducing environments are picked from
    the data, and the rest is the deterministic training conditional (Quinonero-Candela, Rasmussen, JMLR 6, 1939
    (2005)). Length, amplitude and a common factor on both noise variances are chosen by marginal likelihood whenever
    the data have grown by `growth`; in between structures are appended.

    Parameters
    ----------
    prior : "bonding", "fitted", "tight-binding", "repulsive", None, a landscape of the compiled core or a calculator
        Mean function, as in `GPR`.
    n_radial, n_angular, l_max : int
        Radial functions per neighbour species; radial functions and highest Legendre order of the angular part.
    radial_cutoff, angular_cutoff : float
        Angstrom.
    noise_energy, noise_force : float
        Standard deviations, eV per structure and eV/angstrom per component, times the square root of the noise scale.
    tolerance, max_inducing : float, int
        An environment becomes an inducing one when its variance given the others is above this fraction of the prior's;
        at most so many (the tolerance rises to cover all data when it would be more).
    optimise : bool
    length, amplitude, noise_scale : float
        Where to start (and stay, with optimise=False): length in units of sqrt(number of features), amplitude in eV^2 of
        one atom.
    max_rows : int
        Only that many structures of lowest energy are learned whenever all is refitted.
    atom_energies : mapping of symbol to eV, optional
    energy_window : float
        In eV per free atom, as in `GPR`; the forces of a structure above it are not learned.
    growth : float
        Hyperparameters are optimised after the data have grown by this fraction.
    use_forces : bool
        False: energies only.
    """

    _: KW_ONLY
    prior: Any = "bonding"
    n_radial: int = 6
    n_angular: int = 3
    l_max: int = 3
    radial_cutoff: float = 6.0
    angular_cutoff: float = 5.0
    noise_energy: float = 0.1
    noise_force: float = 0.1
    tolerance: float = 1e-3
    max_inducing: int = 400
    optimise: bool = True
    length: float = 1.5
    amplitude: float = 1.0
    noise_scale: float = 1.0
    max_rows: int = 500
    atom_energies: Mapping[str, float] | None = None
    energy_window: float = 2.0
    growth: float = 0.5
    use_forces: bool = True
    name: str = "gp"

    def __post_init__(self) -> None:
        for name in ("noise_energy", "noise_force", "tolerance", "length", "amplitude", "noise_scale", "growth"):
            value = getattr(self, name)
            if not (value > 0 and np.isfinite(value)):
                raise ConfigurationError(f"{name} must be above 0, got {value}")
        for name in ("max_rows", "max_inducing"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._environments(np.array([1]))
        object.__setattr__(self, "prior", CalculatorPrior.of(self.prior))
        _prior(self.prior)
        _atom_energies(self.atom_energies)

    # ---- learning ------------------------------------------------------------------------------------
    def fit(self, data: Batch, previous: FittedLocalGPR | None = None, *, key: Any = None) -> FittedLocalGPR:
        """Learns evaluated structures.

        data : batch with columns energy (n,) [eV] and status (n,), 0 = ok (other rows are left out), and where known the
            atom column forces (m, 3) [eV/angstrom]; forces on fixed coordinates are left out.
        previous : what `fit` or `restore` gave for a beginning of the same data; makes this call cheap.
        key : not used, nothing here is random.

        Without any usable row the fitted model is the prior with a constant sigma.
        """
        usable = _usable(self.prior, data)
        if len(usable) == 0:
            return FittedLocalGPR(self, None, _NO_ROWS, _NO_ROWS, 0, _Learned.empty(), _Mean(_prior(self.prior)))
        if previous is None or not previous._began(self, data) or previous._gpr is None:
            return self._refit(data, _lowest(data, usable, self.max_rows), None, len(usable))
        seen = previous._rows_seen(usable)
        new = usable[~np.isin(usable, previous.rows) & (usable >= seen)]
        if len(new) == 0:
            return previous
        new_species = not np.isin(data.take(new).numbers, previous._species).all()
        due = self.optimise and len(usable) >= (1 + self.growth) * previous._seen_at_optimisation
        fitted_prior = _fitted_prior(self.prior)
        due |= fitted_prior is not None and fitted_prior.due(len(usable), previous._mean.seen)
        # no more inducing environments to be had: chosen anew, they cover all data again
        due |= previous.inducing >= self.max_inducing and len(previous.appended) >= 0.1 * len(previous.factored)
        if due or new_species:
            return self._refit(data, _lowest(data, usable, self.max_rows), previous, len(usable))
        gpr = previous._gpr.copy()
        learned = self._learned(data, new, previous._mean)
        gpr.append(learned.batch, learned.energies - learned.offsets, learned.forces)
        return FittedLocalGPR(
            self,
            gpr,
            previous.factored,
            np.concatenate([previous.appended, new]),
            previous._seen_at_optimisation,
            previous._learned.joined(learned),
            previous._mean,
        )

    def restore(self, data: Batch, state: Mapping[str, Array]) -> FittedLocalGPR:
        """The fitted model of this `.state`, bit for bit; data: the rows it had learned, in their places."""
        factored, appended = (np.asarray(state[name], np.int64) for name in ("factored", "appended"))
        if len(factored) == 0:
            return FittedLocalGPR(self, None, _NO_ROWS, _NO_ROWS, 0, _Learned.empty(), _Mean(_prior(self.prior)))
        rows = np.concatenate([factored, appended])
        if rows.max() >= len(data.offsets) - 1:
            raise ConfigurationError(
                f"a fitted model learned row {rows.max()}, but there are only {len(data.offsets) - 1} rows of data"
            )
        length, amplitude, noise_scale = map(float, state["kernel"])
        mean = _Mean.restored(self.prior, data.take(factored).numbers, state)
        learned = self._learned(data, factored, mean)
        gpr = self._bare(learned.batch.numbers)
        gpr.fit(
            learned.batch,
            learned.energies - learned.offsets,
            learned.forces,
            length=length,
            amplitude=amplitude,
            noise_scale=noise_scale,
        )
        if len(appended):
            more = self._learned(data, appended, mean)
            gpr.append(more.batch, more.energies - more.offsets, more.forces)
            learned = learned.joined(more)
        return FittedLocalGPR(self, gpr, factored, appended, int(np.asarray(state["seen"])), learned, mean)

    def _refit(self, data: Batch, rows: Array, previous: FittedLocalGPR | None, seen: int) -> FittedLocalGPR:
        mean = _mean_of(self, data, rows, seen, previous._mean if previous is not None else None)
        learned = self._learned(data, rows, mean)
        gpr = self._bare(learned.batch.numbers)
        known = previous._gpr if previous is not None else None
        start = (self.length, self.amplitude, self.noise_scale)
        if known is not None:
            start = (known.length, known.amplitude, known.noise_scale)
        gpr.fit(
            learned.batch,
            learned.energies - learned.offsets,
            learned.forces,
            length=start[0],
            amplitude=start[1],
            noise_scale=start[2],
        )
        at_optimisation = previous._seen_at_optimisation if previous is not None else 0
        if self.optimise and seen >= (1 + self.growth) * at_optimisation:
            gpr.optimise()
            at_optimisation = seen
        return FittedLocalGPR(self, gpr, rows, _NO_ROWS, at_optimisation or seen, learned, mean)

    # ---- pieces --------------------------------------------------------------------------------------
    def _environments(self, numbers: Array) -> _core.Environments:
        return _core.Environments(
            [int(number) for number in np.unique(numbers)],
            n_radial=self.n_radial,
            n_angular=self.n_angular,
            l_max=self.l_max,
            radial_cutoff=self.radial_cutoff,
            angular_cutoff=self.angular_cutoff,
        )

    def _bare(self, numbers: Array) -> _core.LocalGpr:
        return _core.LocalGpr(
            self._environments(numbers),
            noise_energy=self.noise_energy,
            noise_force=self.noise_force,
            tolerance=self.tolerance,
            max_inducing=self.max_inducing,
        )

    def _learned(self, data: Batch, rows: Array, mean: _Mean) -> _Learned:
        """These rows and what the model is taught of them."""
        batch = data.take(rows)
        forces = batch.atom_columns.get("forces") if self.use_forces else None
        forces = np.full((len(batch.numbers), 3), np.nan) if forces is None else np.array(forces, float)
        offsets, slopes = mean.of(batch, self.atom_energies)
        forces = forces - slopes
        energies = np.asarray(batch.columns["energy"], float)
        forces[np.repeat(energies > mean.ceiling, np.diff(batch.offsets))] = np.nan
        return _Learned(batch, energies, energies - mean.targets(energies, offsets), forces)


@dataclass(frozen=True, eq=False)
class _Learned:
    """What a model was taught: structures and energies say later whether data are still the same."""

    batch: Any  # Batch or None
    energies: Array = field(default_factory=lambda: np.zeros(0))  # (k,)
    offsets: Array = field(default_factory=lambda: np.zeros(0))  # (k,) prior + atom energies
    forces: Array = field(default_factory=lambda: np.zeros((0, 3)))  # (m, 3) without the prior's; NaN: not known

    @staticmethod
    def empty() -> _Learned:
        return _Learned(None)

    def joined(self, other: _Learned) -> _Learned:
        from thalweg.records import Batch

        return _Learned(
            Batch.concat([self.batch, other.batch]),
            np.concatenate([self.energies, other.energies]),
            np.concatenate([self.offsets, other.offsets]),
            np.concatenate([self.forces, other.forces]),
        )


class FittedLocalGPR:
    """A local Gaussian process that has learned its data; made by `LocalGPR.fit`, never changes."""

    def __init__(
        self,
        model: LocalGPR,
        gpr: _core.LocalGpr | None,
        factored: Array,
        appended: Array,
        seen_at_optimisation: int,
        learned: _Learned,
        mean: _Mean,
    ):
        self.model = model
        self.factored, self.appended = factored, appended  # rows of the last full fit, and those that came after
        self._gpr, self._seen_at_optimisation, self._learned = gpr, seen_at_optimisation, learned
        self._species = np.unique(learned.batch.numbers) if learned.batch is not None else _NO_ROWS
        self._mean, self._prior = mean, mean.landscape
        self._atom_energies = _atom_energies(model.atom_energies)
        self._landscapes: dict[float, _core.LocalSurrogate] = {}

    def __repr__(self) -> str:
        if self._gpr is None:
            return "FittedLocalGPR(no structures)"
        g = self._gpr
        return (
            f"FittedLocalGPR({self.size} structures, {g.inducing} inducing environments, length={g.length:.3g}, "
            f"amplitude={g.amplitude:.3g}, noise_scale={g.noise_scale:.3g})"
        )

    @property
    def rows(self) -> Array:
        """(size,) row of `data` of each structure that was learned, in that order."""
        return np.concatenate([self.factored, self.appended])

    @property
    def size(self) -> int:
        """Number of structures learned."""
        return len(self.factored) + len(self.appended)

    @property
    def inducing(self) -> int:
        """Number of inducing environments."""
        return 0 if self._gpr is None else self._gpr.inducing

    @property
    def log_likelihood(self) -> float:
        """Log marginal likelihood of the data; NaN without data."""
        return float("nan") if self._gpr is None else self._gpr.log_likelihood

    @property
    def state(self) -> dict[str, Array]:
        """Small arrays from which `LocalGPR.restore` makes this model again.

        kernel : length, amplitude, noise_scale
        factored, appended : rows of the last full fit and those appended since, in order
        seen : usable rows at the last optimisation
        ceiling, prior, prior_seen : as in `GPR`
        """
        g = self._gpr
        return {
            "kernel": np.array([g.length, g.amplitude, g.noise_scale] if g is not None else [0.0, 0.0, 0.0]),
            "factored": self.factored.copy(),
            "appended": self.appended.copy(),
            "seen": np.array(self._seen_at_optimisation, np.int64),
            **self._mean.state,
        }

    def predict(
        self, batch: Batch, *, forces: bool = False, atoms: bool = False, threads: int = 0
    ) -> tuple[Array, ...]:
        """Energy (n,) and sigma (n,) [eV]; with forces also -dE/dx and -d sigma/dx (m, 3) [eV/angstrom]; with atoms last
        sigma of each atom's energy (m,) [eV].

        NaN where a structure has no energy (atoms on one point). Raises ConfigurationError for a species that was not
        learned.
        """
        if self._gpr is not None:
            return self._surrogate(0.0).predict(batch, forces=forces, atoms=atoms, threads=threads)
        n, m = len(batch.offsets) - 1, len(batch.numbers)
        energy, slope = np.zeros(n), np.zeros((m, 3))
        if self._prior is not None and n:
            energy, slope = _core.evaluate(self._prior, batch, threads=threads)
        energy = energy + _sum_of_atom_energies(batch, self._atom_energies)
        deviation = np.sqrt(self.model.amplitude)
        out = [energy, deviation * np.sqrt(np.diff(batch.offsets))]
        if forces:
            out += [slope, np.zeros((m, 3))]
        return (*out, np.full(m, deviation)) if atoms else tuple(out)

    def landscape(self, kappa: float = 0.0) -> _core.Landscape:
        """The surface E - kappa sigma to relax on (thesis (2.18)); without data, the prior."""
        if self._gpr is not None:
            return self._surrogate(float(kappa))
        return self._prior if self._prior is not None else _core.PairPrior("bonding", depth=0.0)

    def save(self, path: str | Path) -> None:
        """Settings, learned structures and state as one .npz file, without pickles; `load` makes the model again.

        Raises ConfigurationError for a prior that has no name.
        """
        if not (self.model.prior is None or isinstance(self.model.prior, str)):
            raise ConfigurationError(f"only models with a prior of a name can be saved, this one has {self._prior!r}")
        settings = {f.name: getattr(self.model, f.name) for f in fields(self.model) if f.name != "_"}
        if settings["atom_energies"] is not None:
            settings["atom_energies"] = dict(settings["atom_energies"])
        arrays: dict[str, Array] = {"settings": np.array(json.dumps(settings)), **self.state}
        # The structures of the file are numbered in the order in which they were learned.
        arrays["factored"] = np.arange(len(self.factored))
        arrays["appended"] = len(self.factored) + np.arange(len(self.appended))
        batch = self._learned.batch
        if batch is not None:
            for name in ("positions", "numbers", "offsets", "cells", "pbc", "fixed"):
                arrays[f"batch_{name}"] = np.asarray(getattr(batch, name))
            arrays["batch_energy"] = self._learned.energies
            if "forces" in batch.atom_columns:
                arrays["batch_forces"] = np.asarray(batch.atom_columns["forces"])
        with open(path, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | Path) -> FittedLocalGPR:
        """What `save` wrote, the same model bit for bit (within one build on one instruction set).

        Raises ConfigurationError for any other file.
        """
        from thalweg.records import Batch

        arrays = read_arrays(path)
        if "settings" not in arrays:
            raise ConfigurationError(f"{path} holds no local model: it has no settings")
        with senseless_is_an_error(path):
            model = LocalGPR(**json.loads(str(arrays["settings"])))
            if "batch_positions" not in arrays:
                return model.restore(Batch.empty(), arrays)
            names = ("positions", "numbers", "offsets", "cells", "pbc", "fixed")
            parts: dict[str, Any] = {name: arrays[f"batch_{name}"] for name in names}
            batch = Batch(**parts).with_columns(energy=arrays["batch_energy"])
            if "batch_forces" in arrays:
                batch = batch.with_atom_columns(forces=arrays["batch_forces"])
            return model.restore(batch, arrays)

    def _surrogate(self, kappa: float) -> _core.LocalSurrogate:
        assert self._gpr is not None, "only a model with data is a surrogate"
        if kappa not in self._landscapes:
            self._landscapes[kappa] = _core.LocalSurrogate(
                self._gpr, prior=self._prior, atom_energies=self._atom_energies, kappa=kappa
            )
        return self._landscapes[kappa]

    def _rows_seen(self, usable: Array) -> int:
        """The first row that this model has not looked at; rows before it were learned or left out on purpose."""
        return int(max(self.rows.max() + 1, usable[min(self._seen_at_optimisation, len(usable)) - 1] + 1))

    def _began(self, model: LocalGPR, data: Batch) -> bool:
        """Whether this model learned, with the same settings, rows that are still where they were."""
        if self.model is not model and repr(self.model) != repr(model):
            return False
        if self.size == 0:
            return True
        rows, mine = self.rows, self._learned.batch
        if rows.max() >= len(data.offsets) - 1:
            return False
        now = data.take(rows)
        return (
            np.array_equal(now.offsets, mine.offsets)
            and np.array_equal(now.numbers, mine.numbers)
            and np.array_equal(now.positions, mine.positions)
            and np.array_equal(np.asarray(now.columns["energy"]), self._learned.energies)
        )
