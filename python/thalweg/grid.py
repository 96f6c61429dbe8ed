"""The grid on which an agent builds: which voxel holds which atom, where the next may go, and the way back from relaxed
atoms to voxels (thesis ch. 4 and 6; Meldgaard, Mortensen, Jorgensen, Hammer, J. Phys.: Condens. Matter 32, 404005 (2020);
Paper IV (21)).

    state    placed (k, 2) int32: index of the species, voxel (flat index into the grid, C order), in order of placement
    action   the next such row
    ratio    (species, voxels): distance from a voxel to the nearest atom present, in sums of covalent radii of the two.
             An action is allowed where c1 <= ratio < c2: no atom closer, and at least one within reach.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from numbers import Integral, Real

import numpy as np

from thalweg import _core
from thalweg.elements import NUMBERS
from thalweg.errors import ConfigurationError, nearest
from thalweg.records import Problem

__all__ = ["Grid", "GridSettings"]

Array = np.ndarray

# Where no voxel is allowed, the reach c2 grows by this factor, so many times, before a build is given up.
_WIDER, _TRIES = 1.25, 6


@dataclass(frozen=True)
class GridSettings:
    """How to lay a grid over a problem's box.

    Parameters
    ----------
    spacing : float
        In angstrom, of neighbouring points; the nearest that divides the box is taken.
    dimension : 2 or 3
        2: one layer of points that the box's first two vectors span, which lie in the plane of x and y.
    heights : mapping of symbol to angstrom or (lowest, highest), optional
        With dimension 2: the z coordinate of each species' atoms (layered pseudo-3D); default: the middle of the box.
        With dimension 3: a species keeps to the layer of points nearest to that z, or to the points between two heights;
        default: the whole box. Atoms with one height keep it when they are relaxed; a range says where atoms are placed.
    hydrogen_last : bool
        Hydrogen is placed when all else is.
    """

    spacing: float = 0.2
    dimension: int = 2
    _: KW_ONLY
    heights: Mapping[str, float | Sequence[float]] | None = None
    hydrogen_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.spacing, Real) or not 0 < self.spacing < np.inf:
            raise ConfigurationError(f"the spacing of a grid must be above 0 angstrom, got {self.spacing!r}")
        if not isinstance(self.dimension, Integral) or self.dimension not in (2, 3):
            raise ConfigurationError(f"the dimension of a grid must be 2 or 3, got {self.dimension!r}")
        if not isinstance(self.heights or {}, Mapping):
            raise ConfigurationError(
                f'heights must say which species, such as {{"C": 5.0}} or {{"O": (4.0, 6.0)}}, got {self.heights!r}'
            )
        for name, height in (self.heights or {}).items():
            try:
                ends = np.atleast_1d(np.asarray(height, float))
            except (TypeError, ValueError):
                ends = np.zeros(0)
            if ends.shape not in ((1,), (2,)) or not np.all(np.isfinite(ends)) or ends[0] > ends[-1]:
                raise ConfigurationError(
                    f"the height of {name} must be a number of angstrom, or the lowest and the highest, got {height!r}"
                )
            if self.dimension == 2 and len(ends) == 2:
                raise ConfigurationError(
                    f"a grid of dimension 2 has one height per species, got {height!r} for {name}; dimension 3 has ranges"
                )

    def of(self, problem: Problem) -> Grid:
        """The grid over that problem's box; the same object as long as the problem is the same."""
        grid: Grid | None = self.__dict__.get("_grid")
        if grid is None or grid.problem is not problem:
            grid = Grid(problem, self)
            object.__setattr__(self, "_grid", grid)  # every stage of a search asks, in every iteration
        return grid


class Grid:
    """The points of a grid over a problem's box, and the rules for placing atoms on them.

    Directions that the box leaves open along a periodic lattice vector are periodic; the others end at the box.

    Attributes
    ----------
    shape : points along each of the `dimension` directions
    periodic : whether each of them is
    species : (S,) atomic numbers on the grid, rising: those of the placed atoms and of a template's atoms on it
    template : (t, 2) int32, a template's atoms that lie on the grid, as rows. With two dimensions: whose projections do
        and which are no farther above or below it than c2 lets bonds be; deeper layers of a slab do not bond to the grid
    room : (S, V) or (S, 1) bool, the points that each species may take
    flat : (S,) whether a species' atoms keep their height when relaxed
    alone : whether no template atom lies beyond it (in two dimensions: too far above or below, either), so that rotated and
        mirrored states are as good

    Raises ConfigurationError if the grid would have more than 2e7 points, in two dimensions lies in another plane than
    that of x and y, or if heights lie outside the box or name no species of the problem.
    """

    def __init__(self, problem: Problem, settings: GridSettings):
        self.problem, self.settings = problem, settings
        d = self.dimension = settings.dimension
        corner, vectors, opened = problem.box_arguments
        if d == 2 and np.abs(vectors[:2, 2]).max() > 1e-9 * np.abs(vectors).max():
            raise ConfigurationError(
                "a grid of dimension 2 lies in the plane of x and y, but the first two vectors of the box are "
                f"{vectors[0].round(3).tolist()} and {vectors[1].round(3).tolist()}; turn the structure, or take dimension 3"
            )
        lengths = np.linalg.norm(vectors[:d], axis=1)
        self.periodic = tuple(bool(x) for x in opened[:d])
        counts = [
            max(1, round(length / settings.spacing)) if wraps else int(length / settings.spacing + 1e-9) + 1
            for length, wraps in zip(lengths, self.periodic, strict=True)
        ]
        self.shape = tuple(int(n) for n in counts)
        if np.prod(self.shape, dtype=float) > 2e7:
            raise ConfigurationError(
                f"a grid of {' x '.join(map(str, self.shape))} points is too fine; take a wider spacing or a smaller box"
            )
        if np.prod(self.shape) < len(problem.placed_numbers):
            raise ConfigurationError(
                f"a grid of {' x '.join(map(str, self.shape))} points has no room for {len(problem.placed_numbers)} atoms; "
                "take a narrower spacing or a larger box"
            )
        steps = [
            v / n if wraps else v / length * settings.spacing
            for v, n, wraps, length in zip(vectors[:d], self.shape, self.periodic, lengths, strict=True)
        ]
        self.steps = np.array(steps)  # (d, 3) from point to point
        used = sum(
            ((n - 1) * s for n, s, w in zip(self.shape, steps, self.periodic, strict=True) if not w), np.zeros(3)
        )
        spare = sum((v for v, w in zip(vectors[:d], self.periodic, strict=True) if not w), np.zeros(3)) - used
        self.corner = corner + spare / 2 + (vectors[2] / 2 if d == 2 else 0.0)
        template = problem.template
        on_grid = np.zeros(0, np.int64)
        if template is not None:
            near = self._on_grid(template.positions)
            if d == 2:
                near &= self._bonds(template.positions[:, 2], template.numbers)
            on_grid = np.flatnonzero(near)
        self.alone = template is None or len(on_grid) == template.atoms
        numbers = [] if template is None else template.numbers[on_grid].tolist()
        self.species = np.unique(np.concatenate([problem.placed_numbers, numbers]).astype(np.int32))
        self.radii = np.array([_core.covalent_radius(int(z)) for z in self.species])
        self.counts = np.array([int(np.sum(problem.placed_numbers == z)) for z in self.species])
        self.heights, self.room, self.flat = self._heights()
        self.template = np.zeros((0, 2), np.int32)
        if template is not None and len(on_grid):
            kinds = np.searchsorted(self.species, template.numbers[on_grid])
            self.template = np.stack([kinds, self.nearest(template.positions[on_grid])], axis=1).astype(np.int32)

    # ---- places ------------------------------------------------------------------------------------
    @property
    def voxels(self) -> int:
        return int(np.prod(self.shape))

    @property
    def spacing(self) -> float:
        """Mean length of its steps [angstrom]."""
        return float(np.linalg.norm(self.steps, axis=1).mean())

    @cached_property
    def lattice(self) -> Array | None:
        """(d, d) the steps in spacings, in axes of their own: the first along x, the second in the plane of x and y. None
        where all directions are at right angles."""
        product = self.steps @ self.steps.T
        if np.abs(product - np.diag(np.diag(product))).max() < 1e-6 * product.max():
            return None
        return np.linalg.cholesky(product) / self.spacing

    @cached_property
    def points(self) -> Array:
        """(V, 3) where the points are [angstrom]; with heights, z is that of a species, see `place`."""
        index = np.indices(self.shape).reshape(self.dimension, -1).T
        return self.corner + index @ self.steps

    def place(self, rows: Array) -> Array:
        """(k, 3) positions [angstrom] of the rows of a state."""
        rows = np.asarray(rows).reshape(-1, 2)
        positions = self.points[rows[:, 1]].copy()
        if self.heights is not None:
            positions[:, 2] = self.heights[rows[:, 0]]
        return positions

    def nearest(self, positions: Array) -> Array:
        """(...) the voxels nearest to positions (..., 3) (their projections, where the grid has two dimensions)."""
        index = np.rint(self._exact(positions)).astype(int)
        for k, (n, wraps) in enumerate(zip(self.shape, self.periodic, strict=True)):
            index[..., k] = index[..., k] % n if wraps else np.clip(index[..., k], 0, n - 1)
        return np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), self.shape)

    def _exact(self, positions: Array) -> Array:
        """(..., d) where positions (..., 3) lie, in steps from the first point."""
        return (np.asarray(positions) - self.corner) @ self._per_step

    @cached_property
    def _per_step(self) -> Array:
        return np.linalg.pinv(self.steps)

    def _on_grid(self, positions: Array) -> Array:
        """(n,) whether an atom is so near to the grid that it belongs on it."""
        exact = self._exact(positions)
        inside = np.ones(len(positions), bool)
        for k, (n, wraps) in enumerate(zip(self.shape, self.periodic, strict=True)):
            if not wraps:
                inside &= (exact[:, k] > -0.5) & (exact[:, k] < n - 0.5)
        return inside

    def _level(self, name: str) -> float:
        """z of a species on a grid of two dimensions."""
        height = (self.settings.heights or {}).get(name, float(self.corner[2]))
        return float(np.atleast_1d(np.asarray(height, float))[0])

    def _bonds(self, z: Array, numbers: Array) -> Array:
        """(n,) whether atoms at these heights can have a bond to one that is placed on this grid of two dimensions."""
        radii = np.array([_core.covalent_radius(int(number)) for number in numbers])
        near, period = np.zeros(len(z), bool), abs(float(self.problem.cell[2, 2]))
        for name in self.problem.counts:
            away = np.abs(z - self._level(name))
            if self.problem.pbc[2] and period > 0:
                away = np.abs(away - np.rint(away / period) * period)
            near |= away < self.problem.c2 * (radii + _core.covalent_radius(NUMBERS[name]))
        return near

    def _heights(self) -> tuple[Array | None, Array, Array]:
        """(S,) z of each species on a grid of two dimensions with heights, else None; (S, V) or (S, 1) bool, the points a
        species may take; (S,) bool, whether its atoms keep their height."""
        given, flat = self.settings.heights or {}, np.full(len(self.species), self.dimension == 2)
        names = {NUMBERS[name]: name for name in self.problem.counts}
        unknown = set(given) - set(names.values())
        if unknown:
            raise ConfigurationError(
                f"heights name {', '.join(sorted(unknown))}, which the problem does not place."
                f"{nearest(min(unknown), names.values())}"
            )
        anywhere = np.ones((len(self.species), 1), bool)
        if not given:
            return None, anywhere, flat
        corner, vectors, _ = self.problem.box_arguments
        bottom, top = corner[2] + np.minimum(vectors[:, 2], 0).sum(), corner[2] + np.maximum(vectors[:, 2], 0).sum()
        for name, asked in given.items():
            ends = np.atleast_1d(np.asarray(asked, float))
            if len(ends) == 1 and not bottom - 1e-6 <= ends[0] <= top + 1e-6:
                raise ConfigurationError(
                    f"the height of {name} must lie in the box, {bottom:g} to {top:g} angstrom, got {ends[0]:g}"
                )
        if self.dimension == 2:
            return np.array([self._level(names.get(int(z), "")) for z in self.species]), anywhere, flat
        heights = [given.get(names.get(int(z), "")) for z in self.species]
        z, room = self.points[:, 2], np.ones((len(self.species), self.voxels), bool)
        for s, height in enumerate(heights):
            if height is None:
                continue
            ends = np.atleast_1d(np.asarray(height, float))
            flat[s] = len(ends) == 1
            if flat[s]:
                ends = np.repeat(z[np.argmin(np.abs(z - ends[0]))], 2)  # the nearest layer
            room[s] = (z > ends[0] - 1e-6) & (z < ends[-1] + 1e-6)
            if not room[s].any():
                raise ConfigurationError(
                    f"no point of the grid lies between the heights {ends[0]:g} and {ends[-1]:g} of "
                    f"{names[int(self.species[s])]}; the points reach from {z.min():g} to {z.max():g} angstrom"
                )
        return None, room, flat

    # ---- where the next atom may go ------------------------------------------------------------------
    @cached_property
    def empty(self) -> Array:
        """(S, V) the ratio with the template alone; infinity without one."""
        ratio = np.full((len(self.species), self.voxels), np.inf)
        template = self.problem.template
        if template is not None:
            for position, number in zip(template.positions, template.numbers, strict=True):
                self.narrow(ratio, position, _core.covalent_radius(int(number)))
        return ratio

    def narrow(self, ratio: Array, position: Array, radius: float) -> None:
        """Takes one more atom into account, in place."""
        for s in range(len(self.species)) if self.heights is not None else [0]:
            distance = self._distances(position, s)
            for kind in [s] if self.heights is not None else range(len(self.species)):
                np.minimum(ratio[kind], distance / (radius + self.radii[kind]), out=ratio[kind])

    def _distances(self, position: Array, species: int) -> Array:
        """(V,) from a position to all points at that species' height, periodic images included."""
        points = self.points
        if self.heights is not None:
            points = points.copy()
            points[:, 2] = self.heights[species]
        return self.distances(points, position)

    def distances(self, points: Array, position: Array) -> Array:
        """(n,) from a position (3,) to points (n, 3), the nearest of their periodic images."""
        away, pbc = points - position, self.problem.pbc
        if not pbc.any():
            return np.sqrt(np.einsum("ij,ij->i", away, away))
        cell = self.problem.cell
        fractional = away @ np.linalg.inv(cell)
        fractional -= np.rint(fractional) * pbc
        away = fractional @ cell
        square = np.einsum("ij,ij->i", away, away)
        if np.abs(cell @ cell.T - np.diag(np.diag(cell @ cell.T))).max() > 1e-9:  # skewed: a next image may be nearer
            for image in itertools.product(*[(-1, 0, 1) if wraps else (0,) for wraps in pbc]):
                other = away + np.array(image) @ cell
                square = np.minimum(square, np.einsum("ij,ij->i", other, other))
        return np.sqrt(square)

    def allowed(self, ratio: Array, used: Array, first: bool = False) -> Array:
        """(S, V) bool: the actions that may be taken. used (S,): atoms of each species placed so far.

        The first atom where there is no template goes to the middle of a grid without periodic directions (Paper IV),
        or as near to it as its heights allow; anywhere in one with. Where nothing is within reach, the reach grows.
        """
        kinds = used < self.counts
        if self.settings.hydrogen_last and np.any(kinds & (self.species != 1)):
            kinds &= self.species != 1
        free = kinds[:, None] & self.room & (ratio >= self.problem.c1)
        if first and not np.isfinite(ratio).any():
            if any(self.periodic):
                return free
            middle = np.ravel_multi_index(tuple(n // 2 for n in self.shape), self.shape)
            away = np.linalg.norm(self.points - self.points[middle], axis=1)
            only = np.zeros_like(free)
            for s in np.flatnonzero(kinds):  # a species that is kept away from there: as near as it may be
                only[s, int(np.argmin(np.where(np.broadcast_to(self.room[s], self.voxels), away, np.inf)))] = True
            return only
        reach = self.problem.c2
        for _ in range(_TRIES):
            near = free & (ratio < reach)
            if near.any():
                return near
            reach *= _WIDER
        return free

    # ---- from relaxed atoms back to voxels ------------------------------------------------------------
    def snap(self, positions: Array, numbers: Array, order: Sequence[int] | None = None) -> Array:
        """(k, 2) int32 rows of the atoms, in `order` (default: as they come): each goes to the nearest voxel where it is
        no closer than c1 to those before it, or, if there is none, to the nearest free one (thesis 5.2)."""
        positions, numbers = np.asarray(positions, float), np.asarray(numbers)
        kinds = np.searchsorted(self.species, numbers)
        turns = np.arange(len(numbers)) if order is None else np.asarray(order, int)
        voxels = self.nearest(positions)
        kept = np.stack([kinds, voxels], axis=1).astype(np.int32)[turns]
        if not self._crowded(kept):
            return kept
        rows: list[tuple[int, int]] = []
        placed, radii = np.zeros((0, 3)), np.zeros(0)
        ratio, narrowed = self.empty.copy(), 0  # made only as far as an atom finds its voxel taken
        for atom in turns.tolist():
            s, voxel = int(kinds[atom]), int(voxels[atom])
            room = np.broadcast_to(self.room[s], self.voxels)
            away = self.distances(placed, self.place(np.array([(s, voxel)]))[0]) / (radii + self.radii[s])
            if min(self.empty[s, voxel], away.min(initial=np.inf)) < self.problem.c1 or not room[voxel]:
                for k in range(narrowed, len(rows)):
                    self.narrow(ratio, placed[k], float(radii[k]))
                narrowed = len(rows)
                distance = self._distances(positions[atom], s)
                free = room & (ratio[s] >= self.problem.c1)
                if not free.any():
                    free = room & (ratio[s] > 0)
                voxel = int(np.argmin(np.where(free, distance, np.inf)))
            rows.append((s, voxel))
            placed = np.concatenate([placed, self.place(np.array([rows[-1]]))])
            radii = np.append(radii, self.radii[s])
        return np.array(rows, np.int32).reshape(-1, 2)

    def _crowded(self, rows: Array) -> bool:
        """Whether an atom of a state lies where it may not be, or closer than c1 to another."""
        kinds, voxels = rows.T
        room = np.broadcast_to(self.room, (len(self.species), self.voxels))
        if not room[kinds, voxels].all() or (self.empty[kinds, voxels] < self.problem.c1).any():
            return True
        one, other = np.triu_indices(len(rows), 1)
        at, radii = self.place(rows), self.radii[kinds]
        away = self.distances(at[one] - at[other], np.zeros(3)) / (radii[one] + radii[other])
        return bool((away < self.problem.c1).any())

    # ---- rotated and mirrored copies -----------------------------------------------------------------
    @cached_property
    def symmetries(self) -> Array:
        """(m, 2, d): which direction each direction becomes, and whether it is mirrored before; the identity comes first.
        Of the ways to exchange and mirror the directions those that keep all lengths and angles, the periodic lattice and
        the room of each species: 8 in a square, 4 in a rectangle or a rhombus, 2 in any other plane, 48 in a
        cube. The third direction is left alone if a template atom lies beyond the grid; the copies are of whole states,
        template included."""
        d = self.dimension
        product = self.steps @ self.steps.T
        found = []
        for swap in itertools.permutations(range(d)):
            same = all(
                self.shape[a] == self.shape[b] and self.periodic[a] == self.periodic[b] for a, b in enumerate(swap)
            )
            if not same:
                continue
            for flips in itertools.product((False, True), repeat=d):
                signs = np.where(flips, -1.0, 1.0)
                turned = signs[:, None] * product[np.ix_(swap, swap)] * signs
                third = d == 2 or self.alone or (swap[2] == 2 and not flips[2])
                alike = np.abs(turned - product).max() < 1e-6 * product.max()
                if third and alike and self._keeps(swap, flips):
                    found.append((swap, flips))
        return np.array(found, int)

    def _keeps(self, swap: Sequence[int], flips: Sequence[bool]) -> bool:
        """Whether the periodic lattice and the room of each species are the same after this."""
        pbc = self.problem.pbc
        if pbc.any():
            signs = np.where(flips, -1.0, 1.0)[:, None]
            before = np.vstack([self.steps, *([np.cross(*self.steps)] if self.dimension == 2 else [])])
            after = np.vstack([signs * self.steps[list(swap)], *before[self.dimension :]])
            images = self.problem.cell[pbc] @ np.linalg.inv(before) @ after @ np.linalg.inv(self.problem.cell)
            if np.abs(images - np.rint(images) * pbc).max() > 1e-6:
                return False
        if self.room.shape[1] == 1:
            return True
        moved = self._moved(np.arange(self.voxels), np.array(swap), np.array(flips))
        return bool(np.array_equal(self.room[:, moved], self.room))

    def turned(self, voxels: Array, which: Array) -> Array:
        """(n,) where the voxels (n,) go by the ways `which` (n,) of `symmetries`."""
        return self._moved(voxels, *np.moveaxis(self.symmetries[which], 1, 0))

    def _moved(self, voxels: Array, swap: Array, flips: Array) -> Array:
        at = np.stack(np.unravel_index(voxels, self.shape), axis=1)
        at = np.where(flips, np.array(self.shape) - 1 - at, at)
        out = np.empty_like(at)
        np.put_along_axis(out, np.broadcast_to(swap, at.shape), at, axis=1)
        return np.ravel_multi_index(tuple(out.T), self.shape)
