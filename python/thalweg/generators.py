"""Generators: Context -> Batch of candidates. Each row draws from a stream of its own (random.hpp)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from thalweg import _core
from thalweg.descriptors import LocalDensity, clusters
from thalweg.errors import ConfigurationError
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled

__all__ = ["AlongForces", "ComplementaryEnergy", "FirstOf", "OneOf", "Permute", "Random", "Rattle", "Unchosen"]


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


@dataclass(frozen=True)
class ComplementaryEnergy:
    """Members of the sample relaxed on a complementary energy (Chiriki, Christiansen, Hammer, PRB 100, 235436 (2019);
    thesis (3.2), (3.3)): atoms go where their surroundings become those of a role model. Role models are atoms of the
    same parent, drawn from those whose local densities differ; each atom takes over the nearest one of its own species
    and keeps to it. Atoms of a species without a role model do not count. Costs no evaluation.

    Only atoms that are placed and may move count; all atoms of their species, the template's too, can be role models.
    A structure in which nothing moved, or atoms came too close, is begun anew with another parent.

    Parameters
    ----------
    count : int or {iteration: int}
    role_models : (int, int)
        How many there are at least and at most.
    few : bool
        Only some of the atoms move and count, those farthest from their role model: from one to all of them, drawn anew
        for each structure. False: all atoms.
    attractors : "models" or "clusters"
        "clusters": so many centres of k-means clusters of the atoms of three members of the sample instead of role
        models, at least one a species (cluster regularization: Sorensen, Jorgensen, Bruix, Hammer, J. Chem. Phys. 148,
        241734 (2018)).
    distinct : float
        Of atoms whose features are closer than this only one can be a role model.
    steps : int
        Of the relaxation, at most.
    softening : float
        Distance in features below which the energy is a parabola (see `_core.ComplementaryEnergy`).
    c1 : float
        Atoms closer than c1 covalent sums are too close; 0: never.
    tries : int
        Per structure.
    descriptor : LocalDensity
    """

    count: Schedule[int] = 10
    role_models: tuple[int, int] = (2, 4)
    few: bool = True
    attractors: Literal["models", "clusters"] = "models"
    distinct: float = 0.01
    steps: int = 100
    softening: float = 0.01
    c1: float = 0.6
    tries: int = 5
    descriptor: LocalDensity = field(default_factory=LocalDensity)
    name: str = "ComplementaryEnergy"

    def __post_init__(self) -> None:
        check_schedule(self.count, f"the count of {self.name}")
        bounds = self.role_models if isinstance(self.role_models, (tuple, list)) else ()
        whole = all(isinstance(bound, (int, np.integer)) and not isinstance(bound, bool) for bound in bounds)
        if len(bounds) != 2 or not whole or not 1 <= bounds[0] <= bounds[1]:
            raise ConfigurationError(
                f"role_models of {self.name} must be (low, high), 1 <= low <= high, got {self.role_models!r}"
            )
        if self.attractors not in ("models", "clusters"):
            raise ConfigurationError(
                f"attractors of {self.name} must be 'models' or 'clusters', got {self.attractors!r}"
            )
        if not (self.tries >= 1 and self.steps >= 1 and self.c1 >= 0):
            raise ConfigurationError(
                f"{self.name} needs tries and steps of at least 1 and c1 >= 0, got {self.tries!r}, {self.steps!r} and "
                f"{self.c1!r}"
            )
        if not (self.distinct >= 0 and self.softening > 0):
            raise ConfigurationError(
                f"{self.name} needs distinct >= 0 and softening > 0, got {self.distinct!r} and {self.softening!r}"
            )

    def __call__(self, ctx: Context) -> Batch:
        count = scheduled(self.count, ctx.iteration)
        missing = np.arange(count)
        rows, found = np.zeros(0, int), []
        for attempt in range(self.tries):
            if not len(missing) or not len(ctx.sample):
                break
            # All rows are drawn, whichever are missing: what a row gets depends on its place and the attempt alone.
            tried = replace(ctx, key=ctx.key.fold("attempt", attempt))
            parents = _parents(tried, count)
            positions, good = self._relaxed(tried, parents, missing)
            found.append(_children(ctx, parents.take(missing), positions, good))
            rows, missing = np.concatenate([rows, missing[good]]), missing[~good]
        return Batch.concat(found).take(np.argsort(rows))

    def _relaxed(self, ctx: Context, parents: Batch, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (k N, 3) of the children of these rows (k,) of the parents, and (k,) whether they are any good."""
        density = self.descriptor.bind(ctx.problem.numbers)
        wanted, moving = self._attractors(ctx, density, parents, rows)
        parents = parents.take(rows)
        fixed = parents.fixed | ~moving.reshape(-1, 1)
        template = ctx.problem.template
        positions, *_ = _core.relax(
            _core.ComplementaryEnergy(density, wanted.reshape(-1, density.size), softening=self.softening),
            replace(parents, fixed=fixed),
            steps=self.steps,
            force_tolerance=1e-3,
            first_curvature=2.0,  # of densities one bond length away; that of energies would make tiny first steps
            box=(*ctx.problem.box_arguments, template.atoms if template is not None else 0),
            threads=ctx.threads,
        )
        moved = np.abs(positions - parents.positions).reshape(len(rows), -1).max(axis=1)
        return positions, (moved > 1e-2) & (_core.closest_contacts(parents.with_positions(positions)) >= self.c1)

    def _attractors(
        self, ctx: Context, density: _core.LocalDensity, parents: Batch, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Attractors (k, N, D) of the atoms of these rows, NaN where an atom does not count, and who moves (k, N)."""
        low, high = self.role_models
        features = density.values(parents.take(rows), ctx.threads).reshape(len(rows), -1, density.size)
        movable = ~parents.fixed.all(axis=1).reshape(len(parents), -1)[rows]
        many = ctx.key.fold("how many").rng().integers(low, high + 1, size=len(parents))[rows]
        if self.attractors == "models":
            pool = features[:, np.isin(ctx.problem.numbers, ctx.problem.placed_numbers)]
            draw = ctx.key.fold("role models").rng().random((len(parents), pool.shape[1]))[rows]
            pool = _drawn(pool, draw, many, self.distinct)
        else:
            others = _parents(replace(ctx, key=ctx.key.fold("others")), 2 * len(parents))
            pool = self._clusters(ctx, density, features, others, rows, many)
        nearest, distance = _nearest(features, pool)
        if not self.few:
            nearest[~movable] = np.nan
            return nearest, movable
        part = ctx.key.fold("how few").rng().random(len(parents))[rows]
        few = 1 + (part * movable.sum(axis=1)).astype(int)
        order = np.argsort(np.where(movable & np.isfinite(distance), -distance, np.inf), axis=1, kind="stable")
        rank = np.argsort(order, axis=1, kind="stable")
        moving = movable & np.isfinite(distance) & (rank < few[:, None])
        nearest[~moving] = np.nan
        return nearest, moving

    def _clusters(
        self,
        ctx: Context,
        density: _core.LocalDensity,
        features: np.ndarray,
        others: Batch,
        rows: np.ndarray,
        many: np.ndarray,
    ) -> np.ndarray:
        """Centres (k, P, D) of the atoms of each parent and two others; NaN where there are fewer than P."""
        members = np.isin(ctx.problem.numbers, ctx.problem.placed_numbers)
        species = len(np.unique(ctx.problem.placed_numbers))
        elsewhere = density.values(others, ctx.threads).reshape(-1, 2, *features.shape[1:])[rows]
        pool = np.full((len(rows), max(self.role_models[1], species), density.size), np.nan)
        scale = np.append(np.ones(density.size - 1), 1e3)  # no cluster of two species, whichever their numbers
        for row, (own, two, number) in enumerate(zip(features, elsewhere, many, strict=True)):
            atoms = np.concatenate([own[members], *two[:, members]])
            centres = clusters(atoms * scale, max(number, species))[0] / scale
            pool[row, : len(centres)] = centres
        return pool


def _drawn(features: np.ndarray, draw: np.ndarray, many: np.ndarray, distinct: float) -> np.ndarray:
    """Of each row of features (k, P, D) `many` (k,) with the least `draw` (k, P); NaN elsewhere. Of features closer
    than `distinct` the first counts only."""
    near = np.linalg.norm(features[:, :, None] - features[:, None], axis=3) < distinct
    kept = np.ones(draw.shape, bool)
    for p in range(1, draw.shape[1]):
        kept[:, p] = ~np.any(near[:, p, :p] & kept[:, :p], axis=1)
    rank = np.argsort(np.argsort(np.where(kept, draw, np.inf), axis=1, kind="stable"), axis=1, kind="stable")
    return np.where((kept & (rank < many[:, None]))[:, :, None], features, np.nan)


def _nearest(features: np.ndarray, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each atom (k, N, D) the nearest member (k, N, D) of its row's pool (k, P, D) of its own species, the last
    feature, and how far it is (k, N): NaN and infinity where there is none."""
    apart = np.linalg.norm(features[:, :, None] - pool[:, None], axis=3)
    apart = np.where(features[:, :, None, -1] == pool[:, None, :, -1], apart, np.inf)
    which = apart.argmin(axis=2)
    distance = np.take_along_axis(apart, which[:, :, None], axis=2)[:, :, 0]
    nearest = np.take_along_axis(pool, which[:, :, None], axis=1)
    return np.where(np.isfinite(distance)[:, :, None], nearest, np.nan), distance


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
