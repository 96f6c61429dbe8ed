"""Generators: Context -> Batch of candidates. Each row draws from a stream of its own (random.hpp)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled

__all__ = ["AlongForces", "FirstOf", "OneOf", "Permute", "Random", "Rattle", "Unchosen"]


@dataclass(frozen=True)
class Random:
    """Random structures: the first atom anywhere in the box (on a template: next to it), each next one on a uniform
    direction at c1..c2 covalent sums from an atom that is there (thesis ch. 3; AGOX's random generator, but isotropic).

    Parameters
    ----------
    count : int or {iteration: int}
        Candidates per iteration.
    tries : int
        Per atom, before a structure is begun anew.
    """

    count: Schedule[int] = 10
    tries: int = 100
    name: str = "Random"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")

    def __call__(self, ctx: Context) -> Batch:
        problem, count = ctx.problem, scheduled(self.count, ctx.iteration)
        template = problem.template if problem.template is not None else Batch.empty()
        positions, ok = _core.random_structures(
            problem.placed_numbers,
            problem.cell,
            problem.pbc,
            template.positions,
            template.numbers,
            box=problem.box_arguments,
            count=count,
            key=ctx.key.words,
            c1=problem.c1,
            c2=problem.c2,
            tries_per_atom=self.tries,
            threads=ctx.threads,
        )
        return problem.batch(positions[ok], parent=-1)


def _parents(ctx: Context, count: int) -> Batch:
    """Members of the sample, drawn with replacement."""
    if not len(ctx.sample) or not count:
        return Batch.empty()
    parents = ctx.sample.take(ctx.key.fold("parents").rng().integers(len(ctx.sample), size=count))
    if ctx.problem.template is None:
        return parents
    # Only placed atoms are moved or swapped; a template's free atoms follow when the candidate is relaxed.
    fixed = parents.fixed.reshape(count, -1, 3).copy()
    fixed[:, : ctx.problem.template.atoms] = True
    return replace(parents, fixed=fixed.reshape(-1, 3))


def _children(ctx: Context, parents: Batch, positions: np.ndarray, ok: np.ndarray) -> Batch:
    rows = parents.columns.get("row", np.full(len(parents), -1))
    children = ctx.problem.batch(np.reshape(positions, (len(parents), -1, 3)), parent=rows)
    return children.take(np.asarray(ok, bool))


def _placed_as(ctx: Context, children: Batch, parents: Batch) -> Batch:
    """Children whose placed atoms move as their parents' may, in the same order of placement (`thalweg.agent`)."""
    before = 0 if ctx.problem.template is None else ctx.problem.template.atoms
    fixed = children.fixed.reshape(len(children), -1, 3).copy()
    fixed[:, before:] |= parents.fixed.reshape(fixed.shape)[:, before:]
    children = replace(children, fixed=fixed.reshape(-1, 3))
    return children.with_columns(order=parents.columns["order"]) if "order" in parents.columns else children


@dataclass(frozen=True)
class Rattle:
    """Members of the sample with some atoms moved: each with probability `moved` / n, at least one, by a vector uniform
    in a ball of `amplitude` angstrom, until it has a neighbour within c2 and none closer than c1.

    Parameters
    ----------
    count : int or {iteration: int}
    amplitude : float
        In angstrom.
    moved : float
        Expected number of moved atoms.
    """

    count: Schedule[int] = 10
    amplitude: float = 3.0
    moved: float = 3.0
    name: str = "Rattle"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")

    def __call__(self, ctx: Context) -> Batch:
        parents = _parents(ctx, scheduled(self.count, ctx.iteration))
        if not len(parents):
            return Batch.empty()
        problem = ctx.problem
        positions, ok = _core.rattle(
            parents,
            box=problem.box_arguments,
            amplitude=self.amplitude,
            moved=self.moved,
            key=ctx.key.words,
            c1=problem.c1,
            c2=problem.c2,
            threads=ctx.threads,
        )
        return _children(ctx, parents, positions, ok)


@dataclass(frozen=True)
class AlongForces:
    """Members of the sample with all free atoms moved along their true forces; costs no evaluation (thesis ch. 6).

    Parameters
    ----------
    count : int or {iteration: int}
    step : float
        How far the atom with the largest force goes [angstrom]; the others in proportion.
    """

    count: Schedule[int] = 5
    step: float = 0.2
    name: str = "AlongForces"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")
        if not self.step > 0:
            raise ConfigurationError(f"the step of {self.name} must be above 0 angstrom, got {self.step!r}")

    def __call__(self, ctx: Context) -> Batch:
        parents = _parents(ctx, scheduled(self.count, ctx.iteration))
        if not len(parents):
            return Batch.empty()
        forces = np.where(parents.fixed, 0.0, parents.atom_columns["forces"]).reshape(len(parents), -1, 3)
        largest = np.linalg.norm(forces, axis=2).max(axis=1)
        moves = self.step * forces / np.maximum(largest, 1e-12)[:, None, None]
        children = _children(ctx, parents, parents.positions + moves.reshape(-1, 3), largest > 1e-3)
        return _placed_as(ctx, children, parents.take(largest > 1e-3)) if len(children) else children


@dataclass(frozen=True)
class Unchosen:
    """The best candidates of the iteration before that were not evaluated, again (thesis ch. 6): what a search found and
    did not pay for. The acquisition must be `Remembering`.

    Parameters
    ----------
    count : int or {iteration: int}
        At most so many.
    acquisition : str
        Name of the `Remembering` acquisition.
    """

    count: Schedule[int] = 20
    acquisition: str = "Remembering"
    name: str = "Unchosen"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")

    def __call__(self, ctx: Context) -> Batch:
        kept, count = ctx.carry.get(self.acquisition), scheduled(self.count, ctx.iteration)
        if not kept or not len(kept["positions"]) or not count:
            return Batch.empty()
        positions = kept["positions"]
        # What was kept holds the chosen ones too, which are known by now, or are in flight.
        known = Batch.concat([ctx.data[max(0, len(ctx.data) - 100) :], ctx.pending])
        known = known.take(np.diff(known.offsets) == positions.shape[1])
        seen = known.positions.reshape(len(known), -1)
        fresh = [
            i
            for i, one in enumerate(positions.reshape(len(positions), -1))
            if not np.any(np.abs(seen - one).max(axis=1, initial=0.0) < 1e-6)
        ][:count]
        if not fresh:
            return Batch.empty()
        batch = ctx.problem.batch(positions[fresh], parent=-1)
        batch = replace(batch, fixed=kept["fixed"][fresh].reshape(-1, 3))
        return batch.with_columns(order=kept["order"][fresh]) if "order" in kept else batch


@dataclass(frozen=True)
class Permute:
    """Members of the sample with the positions of free atoms of different species swapped; one swap, and each further
    one with probability `again`.

    Parameters
    ----------
    count : int or {iteration: int}
    again : float
    """

    count: Schedule[int] = 10
    again: float = 0.3
    name: str = "Permute"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")

    def __call__(self, ctx: Context) -> Batch:
        parents = _parents(ctx, scheduled(self.count, ctx.iteration))
        if not len(parents):
            return Batch.empty()
        positions, ok = _core.permute(parents, again=self.again, key=ctx.key.words, threads=ctx.threads)
        return _children(ctx, parents, positions, ok)


class _Joint:
    """Several generators as one, each with a key of its own."""

    def __init__(self, *generators: Callable[[Context], Batch], name: str = ""):
        self.generators, self.name = generators, name or type(self).__name__

    def describe(self) -> Any:
        """For the configuration that the store remembers."""
        from thalweg.search import describe

        return {type(self).__name__: [describe(generator) for generator in self.generators]}

    def _call(self, k: int, ctx: Context) -> Batch:
        return self.generators[k](replace(ctx, key=ctx.key.fold(k)))


class FirstOf(_Joint):
    """The candidates of the first generator that has any: `FirstOf(Rattle(1), Random(1))` begins where no sample is."""

    def __call__(self, ctx: Context) -> Batch:
        batch = Batch.empty()
        for k in range(len(self.generators)):
            batch = self._call(k, ctx)
            if len(batch):
                break
        return batch


class OneOf(_Joint):
    """The candidates of one of the generators, drawn anew in each iteration with equal probability."""

    def __call__(self, ctx: Context) -> Batch:
        return self._call(int(ctx.key.rng().integers(len(self.generators))), ctx)
