"""Gauges, (Batch, Context) -> Batch: what a candidate must pass, the true energy above all. Also what settles a step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.descriptors import Fingerprint
from thalweg.errors import CalculationFailed, ConfigurationError
from thalweg.records import OK, REJECTED, Batch, Context, Measured, Problem
from thalweg.select import model_of

__all__ = ["AcceptLower", "Duplicate", "Evaluate", "Metropolis", "calculate"]

# An energy so far below every known one [eV per atom] is the calculator's mistake, not a structure: self-consistent
# calculators are known to end in such states where atoms are too close. Only if the lowest known point has no force
# above this [eV/angstrom]: below a crushed structure anything may be.
_TOO_LOW, _SANE_FORCE = 12.0, 50.0
# Polishing on a model: how far an atom may move at first [angstrom], and the gain that is worth an evaluation [eV].
_TRUST = 0.4
_LEAST_GAIN = 2e-4
# A candidate's polish ends when so many steps together change the energy by less than that [eV].
_STALLED = (3, 0.02)
# Steps of a relaxation on the tilted model; the fewer where the more end too far away.
_MODEL_STEPS = (60, 8, 2)


def calculate(calculator: Any, structure: Batch) -> Measured:
    """Energy and forces of one structure by an ASE calculator, and why it failed; whatever goes wrong is told in the
    third place, never raised."""
    from thalweg.calculators import landscape_of

    try:
        landscape = landscape_of(calculator)
        if landscape is not None:
            energies, forces = _core.evaluate(landscape, structure, threads=1)
            energy = float(energies[0])
        else:
            atoms = structure.to_ase()[0]
            atoms.set_constraint()
            atoms.calc = calculator
            energy = float(atoms.get_potential_energy())
            forces = np.array(atoms.get_forces(), float)
        if not math.isfinite(energy):
            raise CalculationFailed(f"the energy is {energy}")
        if forces.shape != structure.positions.shape or not np.isfinite(forces).all():
            raise CalculationFailed("the forces are not finite")
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
        return math.nan, np.full_like(structure.positions, np.nan), reason
    return energy, forces, ""


@dataclass(frozen=True)
class Evaluate:
    """The true energy of each candidate; every point is counted, journaled and kept.

    Parameters
    ----------
    calculator : ASE calculator
        Built-in ones (`thalweg.calculators`, ASE's EMT, LennardJones and Tersoff) run in the compiled core. One that has
        `calculate_many` (`thalweg.pool.Guarded`) gets all candidates of an iteration at once when `steps` is 0.
    steps : int
        Relaxation steps in the true potential after the first point; 0 is a single point, a large number the full
        relaxation of basin hopping.
    force_tolerance : float
        eV/angstrom, where a relaxation ends.
    polish_every, polish_steps : int
        In every so many iterations, after the candidate, the lowest structure that is not yet relaxed nor a near copy of
        a relaxed one is relaxed further in the true potential; 0 never.
    polish_on : str, optional
        Name of a model. Relaxations in the true potential then follow that model, tilted so that its forces are right
        where the last true point is: a step to its minimum takes one evaluation where a minimiser without a model takes
        several. What a step should gain is known before it is made, so each candidate is polished at once if, and only
        while, that promises an energy below the best so far plus `promising`.
    promising : float
        In eV; minus infinity: candidates are not polished at once.
    polish_last : int
        How many of the best are relaxed when a run ends.
    same : float
        Fingerprints closer than this fraction of their length (or of four times the spread of the known ones) count as
        copies when choosing what to polish.

    Raises
    ------
    ConfigurationError
        At once, if a built-in calculator does not know a species of the problem, or a guarded one cannot be made; in a
        search without the model `polish_on`.
    """

    calculator: Any
    steps: int = 0
    force_tolerance: float = 0.05
    max_step: float = 0.2
    polish_every: int = 0
    polish_steps: int = 40
    polish_tolerance: float = 0.02
    polish_on: str | None = None
    promising: float = 0.0
    polish_last: int = 0
    same: float = 0.02
    descriptor: Fingerprint = field(default_factory=Fingerprint)
    name: str = "Evaluate"

    def check(self, problem: Problem) -> None:
        """Raises ConfigurationError if a built-in calculator cannot treat the problem or a guarded one cannot be made."""
        from thalweg.calculators import landscape_of

        if hasattr(self.calculator, "calculate_many") and hasattr(self.calculator, "check"):
            self.calculator.check()
        landscape = landscape_of(self.calculator)
        if landscape is not None:
            n = len(problem.numbers)
            apart = np.arange(n)[None, :, None] * np.array([7.0, 11.0, 13.0])
            _core.evaluate(landscape, problem.batch(apart))

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        if self.steps == 0 and len(batch) and hasattr(self.calculator, "calculate_many"):
            rows = [
                ctx.measure_many(
                    batch, partial(self._calculate_many, ctx), [_descent(batch[i]) for i in range(len(batch))]
                )
            ]
        else:
            rows = [self._relax(batch[i], ctx, self.steps, self.force_tolerance) for i in range(len(batch))]
        if self._guide(ctx) is not None and self.promising > -np.inf:
            best = _lowest(ctx.problem, ctx.data, *rows)
            for points in list(rows):
                if not points.ok.all():
                    continue
                # only a relaxation of the recipe's own has several points
                lowest = points[int(np.argmin(points.columns["energy"]))]
                columns = {**_descent(points), "origin": "polish", "candidate": -1}
                # `best` is an objective, which may be a free energy
                beyond = float(lowest.columns["energy"][0] - ctx.problem.objective(lowest)[0])
                followed = self._follow(lowest, ctx, columns, best + self.promising + beyond)
                rows.extend(followed)
        if self.polish_every and ctx.iteration % self.polish_every == self.polish_every - 1:
            for row in self._worth_polishing(ctx, 1):
                rows.append(self._polish(ctx.data[row], row, ctx))
        return Batch.concat(rows)

    # ---- the finishing touch of a run (Search calls these) -----------------------------------------
    def finish_with(self, ctx: Context) -> Batch:
        """The structures to polish when a run ends; the column `row` says where they stand in the data."""
        rows = self._worth_polishing(ctx, self.polish_last) if self.polish_last else []
        return ctx.data.take(rows).with_columns(row=np.array(rows, np.int64)) if rows else Batch.empty()

    def finish(self, batch: Batch, ctx: Context) -> Batch:
        """Polishes them."""
        return Batch.concat([self._polish(batch[i], int(batch.columns["row"][i]), ctx) for i in range(len(batch))])

    # ------------------------------------------------------------------------------------------------
    def _relax(self, structure: Batch, ctx: Context, steps: int, tolerance: float, **columns: Any) -> Batch:
        """One point, then up to `steps` more; ends early at a failed point."""
        first = ctx.measure(structure, partial(self._calculate, ctx), **{**_descent(structure), **columns})
        if steps == 0 or first.columns["status"][0] != OK:
            return first
        minimiser = self._minimiser(first, steps, tolerance)
        return Batch.concat([first, *self._descend(minimiser, structure, ctx, {**_descent(structure), **columns})])

    def _polish(self, known: Batch, row: int, ctx: Context) -> Batch:
        """Goes on from a structure whose energy and forces are known: its first point costs nothing."""
        columns = {"origin": "polish", "parent": row, "candidate": -1}
        if self._guide(ctx) is not None:
            rows = self._follow(known, ctx, columns, np.inf)
        else:
            minimiser = self._minimiser(known, self.polish_steps, self.polish_tolerance)
            rows = self._descend(minimiser, known, ctx, columns)
        return Batch.concat(rows) if rows else Batch.empty()

    def _guide(self, ctx: Context) -> Any:
        """The surface that polishes follow: the mean of a model that has learned something, or None."""
        fitted: Any = model_of(ctx, self.polish_on) if self.polish_on is not None else None
        return fitted.landscape(0.0) if getattr(fitted, "size", 0) else None

    def _follow(self, known: Batch, ctx: Context, columns: dict[str, Any], limit: float) -> list[Batch]:
        """True points on the way down from one whose energy and forces are known, each the minimum of the tilted model
        within a trusted distance; ends when nothing below `limit` [eV] is to be had. Where the model has misled three
        times, it ends, too, or a minimiser without the model goes on if there is no limit."""
        rows: list[Batch] = []
        guide, here = self._guide(ctx), known
        radius, misled, gains = _TRUST, 0, [np.inf] * _STALLED[0]
        while len(rows) < self.polish_steps:
            if _largest_force(here)[0] < self.polish_tolerance:
                break
            wrong_by = _core.evaluate(guide, here, threads=1)[1] - here.atom_columns["forces"]
            surface = _core.Tilted(guide, np.where(here.fixed, 0.0, wrong_by))
            there, longest, promised = self._step(surface, here, radius)
            energy = float(here.columns["energy"][0])
            if not promised > _LEAST_GAIN or energy - promised > limit:
                break
            row = ctx.measure(there.bare(), partial(self._calculate, ctx), **columns)
            rows.append(row)
            if row.columns["status"][0] != OK:
                break
            gained = energy - float(row.columns["energy"][0])
            gains = [*gains[1:], gained]
            if np.isfinite(limit) and sum(map(abs, gains)) < _STALLED[1]:
                break
            if gained > 0:
                radius, here = (2 * radius if gained > 0.5 * promised else radius), row
            else:
                radius, misled = 0.25 * min(radius, longest), misled + 1
                if misled == 3:
                    if np.isfinite(limit):  # what the model promises is worth nothing
                        break
                    minimiser = self._minimiser(here, self.polish_steps - len(rows), self.polish_tolerance)
                    return rows + self._descend(minimiser, here, ctx, columns)
        return rows

    def _step(self, surface: _core.Landscape, here: Batch, radius: float) -> tuple[Batch, float, float]:
        """Where the tilted model is lowest, or as far towards it as is trusted; how far the longest move of an atom went
        before that limit [angstrom], and what the model promises [eV]."""
        start = _core.evaluate(surface, here, threads=1)[0][0]
        for steps in _MODEL_STEPS:  # a tilt may leave the model without a minimum: then not so far
            relaxed = _core.relax(surface, here, steps=steps, force_tolerance=0.2 * self.polish_tolerance, threads=1)[0]
            move = relaxed - here.positions
            longest = float(np.sqrt(np.square(move).sum(axis=1).max()))
            there = here.with_positions(here.positions + move * min(1.0, radius / max(longest, 1e-12)))
            promised = float(start - _core.evaluate(surface, there, threads=1)[0][0])
            if promised > _LEAST_GAIN:
                break
        return there, longest, promised

    def _minimiser(self, first: Batch, steps: int, tolerance: float) -> _core.Minimiser:
        minimiser = _core.Minimiser(
            first.positions, first.fixed, steps=steps, force_tolerance=tolerance, max_step=self.max_step
        )
        minimiser.tell(float(first.columns["energy"][0]), first.atom_columns["forces"])
        return minimiser

    def _descend(self, minimiser: Any, structure: Batch, ctx: Context, columns: dict[str, Any]) -> list[Batch]:
        rows: list[Batch] = []
        while not minimiser.done:
            here = structure.with_positions(np.array(minimiser.positions))
            row = ctx.measure(here, partial(self._calculate, ctx), **columns)
            rows.append(row)
            if row.columns["status"][0] != OK:
                break
            minimiser.tell(float(row.columns["energy"][0]), row.atom_columns["forces"])
        return rows

    def _calculate(self, ctx: Context, structure: Batch) -> Measured:
        return _judged(calculate(self.calculator, structure), ctx)

    def _calculate_many(self, ctx: Context, structures: Iterator[Batch]) -> Iterable[tuple[int, Measured, float]]:
        """For `Context.measure_many`: as they finish if the calculator can tell, else all together."""
        if hasattr(self.calculator, "as_completed"):
            for i, measured, seconds in self.calculator.as_completed(structures):
                yield i, _judged(measured, ctx), seconds
            return
        together = Batch.concat(list(structures))
        begin = time.perf_counter()
        found = self.calculator.calculate_many(together) if len(together) else []
        each = (time.perf_counter() - begin) / max(1, len(together))
        yield from ((i, _judged(measured, ctx), each) for i, measured in enumerate(found))

    def _worth_polishing(self, ctx: Context, count: int) -> list[int]:
        """Lowest rows first; not those that a polish started from or went through, are relaxed, or resemble a relaxed
        structure."""
        data = ctx.data
        objective = ctx.problem.objective(data)
        usable = np.isfinite(objective)
        if not usable.any():
            return []
        largest, n = _largest_force(data), len(data)
        polished = data.columns.get("origin", np.zeros(n, "U1")) == "polish"
        sources = data.columns.get("parent", np.full(n, -1))[polished]
        done = polished | np.isin(np.arange(n), sources) | (largest < self.force_tolerance)
        relaxed = usable & (largest < self.force_tolerance)
        features = ctx.features(self.descriptor)
        lengths = _lengths(features, features)
        chosen: list[int] = []
        for row in np.argsort(np.where(usable & ~done, objective, np.inf), kind="stable"):
            if len(chosen) == count or done[row] or not usable[row]:
                break
            others = np.flatnonzero(relaxed).tolist() + chosen
            distance = np.linalg.norm(features[others] - features[row], axis=1)
            if not np.any(distance < self.same * lengths[row]):
                chosen.append(int(row))
        return chosen


def _judged(measured: Measured, ctx: Context) -> Measured:
    """A measurement, made a failed one if its energy cannot be."""
    energy, forces, failure = measured
    known = ctx.data.columns.get("energy", np.zeros(0))
    if failure or not np.isfinite(known).any():
        return measured
    lowest = ctx.data[int(np.nanargmin(known))]
    floor = float(lowest.columns["energy"][0]) - _TOO_LOW * len(forces)
    if energy >= floor or not _largest_force(lowest)[0] <= _SANE_FORCE:
        return measured
    reason = f"CalculationFailed: {energy:.6g} eV is more than {_TOO_LOW:.0f} eV per atom below the lowest so far"
    return math.nan, np.full_like(forces, np.nan), reason


def _largest_force(data: Batch) -> np.ndarray:
    """(n,) largest force on a free coordinate's atom [eV/angstrom]; NaN where it is not known."""
    forces = np.where(data.fixed, 0.0, data.atom_columns["forces"])
    return np.sqrt(np.maximum.reduceat((forces**2).sum(axis=1), data.offsets[:-1]))


def _lengths(features: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(n,) what distances from these (n, D) features are measured in: the length of each, or the spread of the known
    (k, D) ones if that is smaller, as where a slab makes most of every fingerprint."""
    lengths = np.linalg.norm(features, axis=1)
    if len(known) > 1:
        lengths = np.minimum(lengths, 4 * np.linalg.norm(known - known.mean(axis=0), axis=1).max())
    return lengths


def _lowest(problem: Problem, *batches: Batch) -> float:
    """The lowest objective of some evaluated structures [eV]; infinity if there is none."""
    found = [problem.objective(batch) for batch in batches if len(batch)]
    objective = np.concatenate(found) if found else np.zeros(0)
    objective = objective[np.isfinite(objective)]
    return float(objective.min()) if len(objective) else np.inf


def _descent(structure: Batch) -> dict[str, Any]:
    """Where the structure came from, to be stored with its energy."""
    names = ("origin", "parent", "candidate", "score")
    known = {name: structure.columns[name][0] for name in names if name in structure.columns}
    return {**known, "order": structure.columns["order"]} if "order" in structure.columns else known  # (1, placed)


@dataclass(frozen=True)
class Duplicate:
    """Rejects a candidate whose fingerprint is closer than `tolerance` times its length (or four times the spread of the
    known ones, if that is less) to that of an evaluated one, so that the next candidate is evaluated instead.

    Parameters
    ----------
    tolerance : float
    near_relaxed : float
        The same for evaluated structures whose largest force is below `force_tolerance`: a candidate in the basin of a
        known minimum will tell nothing that is lower.
    force_tolerance : float
        eV/angstrom.
    descriptor : object with `values(batch, threads=...) -> (n, D)`
    """

    tolerance: float = 1e-3
    near_relaxed: float = 0.01
    force_tolerance: float = 0.05
    descriptor: Fingerprint = field(default_factory=Fingerprint)
    name: str = "Duplicate"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        known = ctx.features(self.descriptor)
        if not len(known) or not len(batch):
            return batch
        features = self.descriptor.values(batch, threads=ctx.threads)
        relaxed = _largest_force(ctx.data) < self.force_tolerance
        radius = np.where(relaxed, max(self.tolerance, self.near_relaxed), self.tolerance)
        lengths = _lengths(features, known)
        near = np.array(
            [np.any(np.linalg.norm(known - f, axis=1) < radius * x) for f, x in zip(features, lengths, strict=True)]
        )
        return batch.with_columns(status=np.where(near, REJECTED, OK).astype(np.uint8))


@dataclass(frozen=True)
class Metropolis:
    """Accepts the last point of an evaluated candidate if its objective fell, or with probability exp(-dE / kT).

    Parameters
    ----------
    temperature : float
        kT in eV.
    c2 : float
        Never accepted: a structure in several pieces, atoms within c2 covalent sums hanging together. Infinity: pieces do
        not matter.
    """

    temperature: float = 0.1
    c2: float = math.inf
    name: str = "Metropolis"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        accepted = np.zeros(len(batch), bool)
        before = ctx.carry.get(self.name)
        row, energy = _lowest_point(batch, ctx, self.c2)
        if row >= 0:
            rise = energy - float(before["energy"]) if before is not None else -np.inf
            if rise <= 0 or ctx.key.rng().random() < np.exp(-rise / self.temperature):
                accepted[row] = True
                ctx.keep(
                    ticket=batch.columns["ticket"][row],
                    point=batch.columns["point"][row],
                    energy=np.array(energy),
                )
        return batch.with_columns(accepted=accepted)


@dataclass(frozen=True)
class AcceptLower:
    """The population of the complementary energy search (Chiriki, Christiansen, Hammer, PRB 100, 235436 (2019), Fig. 2).

    A candidate whose lowest point lies below its parent is accepted, and the search goes on from it (`Population`). One
    that does not ends this descent: what was accepted last joins the population, whose highest member leaves. Candidates
    without a parent join it at once; when `size` of them have come it is complete, with fewer members where some are
    copies.

    Parameters
    ----------
    size : int
        Of the population.
    same : float
        Energies closer than this [eV] are one: not a fall, and no new member. Keeps copies of one minimum from
        filling the population, of which the paper says nothing.
    c2 : float
        Never accepted: a structure in several pieces, see `Metropolis`.
    """

    size: int = 10
    same: float = 2e-3
    c2: float = math.inf
    name: str = "AcceptLower"

    def __post_init__(self) -> None:
        if not (self.size >= 1 and self.same >= 0):
            raise ConfigurationError(
                f"{self.name} needs a size of at least 1 and same >= 0 eV, got {self.size!r} and {self.same!r}"
            )

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        accepted = np.zeros(len(batch), bool)
        row, energy = _lowest_point(batch, ctx, self.c2)
        kept = ctx.carry.get(self.name)
        begun = 0 if kept is None else int(kept["begun"])
        # ticket, point, energy; while a descent lasts, its lowest structure stands behind the members
        members = [] if kept is None else list(zip(kept["ticket"], kept["point"], kept["energy"], strict=True))
        descended = [members.pop()] if kept is not None and kept["descending"] else []
        parent = int(batch.columns["parent"][row]) if row >= 0 and "parent" in batch.columns else -1
        candidate = [] if row < 0 else [(batch.columns["ticket"][row], batch.columns["point"][row], energy)]
        descending = parent >= 0 and energy < ctx.problem.objective(ctx.data[parent])[0] - self.same
        # With several tickets in flight another descent may end, or go on, while this one's lowest stands last.
        goes_on = descending and bool(descended) and int(ctx.data.columns["ticket"][parent]) == int(descended[0][0])
        for one in ([] if goes_on else descended) + (candidate if parent < 0 else []):
            if all(abs(one[2] - member[2]) > self.same for member in members):
                members = sorted([*members, one], key=lambda member: member[2])[: self.size]
        if descending:
            members = [*members, *candidate]
        if row >= 0:
            begun += parent < 0
            accepted[row] = candidate[0] in members
        ticket, point, energies = np.array(members, float).reshape(-1, 3).T
        ctx.keep(
            ticket=ticket.astype(int), point=point.astype(int), energy=energies, descending=np.array(descending),
            begun=np.array(begun), complete=np.array(bool(members) and begun >= self.size),
        )  # fmt: skip
        return batch.with_columns(accepted=accepted)


def _lowest_point(batch: Batch, ctx: Context, c2: float) -> tuple[int, float]:
    """The row with the lowest objective and that [eV]; -1 and infinity if there is none, or it is in several pieces."""
    objective = ctx.problem.objective(batch) if len(batch) else np.zeros(0)
    if not np.any(np.isfinite(objective)):
        return -1, np.inf
    row = int(np.nanargmin(objective))
    if math.isfinite(c2) and _core.fragments(batch[row], c2)[0] > 1:
        return -1, np.inf
    return row, float(objective[row])
