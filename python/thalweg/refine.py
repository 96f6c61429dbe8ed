"""Postprocessing of candidates before any true energy: (Batch, Context) -> Batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError
from thalweg.randomness import Key
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled
from thalweg.select import model_of

__all__ = ["Centre", "Connected", "MinDistance", "Relax", "SurrogateHops", "Wrap"]


@dataclass(frozen=True)
class Relax:
    """Local relaxation, all candidates in one call of the compiled relaxer; costs no true evaluation. Placed atoms stay
    in the box; atoms of a template that are not fixed move freely.

    Parameters
    ----------
    on : LCB, name of a model, built-in landscape, or calculator
        What to go down on. A calculator's energies are *not* counted here: use one that is cheap beside the true one.
    steps : int or {iteration: int}
        At most; 0 leaves the candidates alone.
    force_tolerance : float
        eV/angstrom, largest force on one atom.
    c1, c2 : float
        A candidate whose atoms come closer than c1 covalent sums, or which falls into more pieces than it had (atoms
        within c2 covalent sums hang together), goes back to where it was (Paper IV): a surface that knows little may
        send atoms anywhere. 0 and infinity: never.
    """

    on: Any
    steps: Schedule[int] = 100
    force_tolerance: float = 0.05
    max_step: float = 0.2
    c1: float = 0.6
    c2: float = 1.5
    name: str = "Relax"

    def __post_init__(self) -> None:
        check_schedule(self.steps, f"the steps of {self.name}")

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        steps = scheduled(self.steps, ctx.iteration)
        if not len(batch) or not steps:
            return batch
        landscape = self._landscape(ctx)
        settings: dict[str, Any] = {
            "steps": steps,
            "force_tolerance": self.force_tolerance,
            "max_step": self.max_step,
        }
        template = ctx.problem.template
        box = (*ctx.problem.box_arguments, template.atoms if template is not None else 0)
        if landscape is None:
            relaxed = batch.with_positions(self._with_calculator(batch, settings, box))
        else:
            positions, *_ = _core.relax(landscape, batch, **settings, box=box, threads=ctx.threads)
            relaxed = batch.with_positions(positions)
        good = _core.closest_contacts(relaxed) >= self.c1
        if np.isfinite(self.c2):
            good &= _core.fragments(relaxed, self.c2) <= _core.fragments(batch, self.c2)
        atoms = np.repeat(good, np.diff(batch.offsets))
        return batch.with_positions(np.where(atoms[:, None], relaxed.positions, batch.positions))

    def _landscape(self, ctx: Context) -> _core.Landscape | None:
        if isinstance(self.on, str):
            return model_of(ctx, self.on).landscape(0.0)
        if isinstance(self.on, _core.Landscape):
            return self.on
        if callable(getattr(self.on, "landscape", None)):
            return self.on.landscape(ctx)
        from thalweg.calculators import landscape_of

        if not hasattr(self.on, "calculate"):
            raise ConfigurationError(
                f"Relax(on=...) takes LCB, a model's name, a landscape or a calculator, got {self.on!r}"
            )
        return landscape_of(self.on)

    def _with_calculator(self, batch: Batch, settings: dict[str, Any], box: Any) -> np.ndarray:
        from thalweg.evaluate import calculate

        parts = []
        for i in range(len(batch)):
            one = batch[i]
            minimiser = _core.Minimiser(one.positions, one.fixed, **settings, box=box)
            while not minimiser.done:
                energy, forces, failure = calculate(self.on, one.with_positions(np.array(minimiser.positions)))
                if failure:
                    break
                minimiser.tell(energy, forces)
            parts.append(np.array(minimiser.best_positions if minimiser.evaluations else one.positions))
        return np.concatenate(parts)


@dataclass(frozen=True)
class SurrogateHops:
    """Basin hopping on a surrogate (Wales, Doye, J. Phys. Chem. A 101, 5111 (1997)), from every candidate by itself: a
    move (a rattle or, with several species, a swap), a relaxation, Metropolis on the surrogate's energy. All candidates
    hop in step, one call of the compiled relaxer per hop; costs no true evaluation.

    A hop is refused where the relaxed structure has atoms closer than c1 covalent sums or is in more pieces than before,
    besides what `Relax` takes back: far from its data a surrogate promises anything.

    Parameters
    ----------
    on : LCB, name of a model, built-in landscape, or built-in calculator
    hops : int or {iteration: int}
        0 leaves the candidates alone.
    steps, force_tolerance, max_step, c1, c2 : see `Relax`
    temperature : float
        kT [eV] of the acceptance rule.
    amplitude, moved : float
        Of the rattles, see `Rattle`.
    swap : float
        Probability that a hop is a swap, where there is a pair of free atoms of different species.
    keep : "best" or "all"
        "best": the lowest structure seen from each candidate, which may be the candidate; "all": the candidates, then
        every accepted structure, hop by hop.
    walkers : int
        So many candidates hop, the lowest on the surface; the others stay as they are. 0: all.
    """

    on: Any
    hops: Schedule[int] = 3
    steps: Schedule[int] = 100
    temperature: float = 0.1
    amplitude: float = 3.0
    moved: float = 3.0
    swap: float = 0.5
    force_tolerance: float = 0.05
    max_step: float = 0.2
    c1: float = 0.6
    c2: float = 1.5
    keep: Literal["best", "all"] = "best"
    walkers: int = 0
    name: str = "SurrogateHops"

    def __post_init__(self) -> None:
        check_schedule(self.hops, f"the hops of {self.name}")
        check_schedule(self.steps, f"the steps of {self.name}")
        if not (self.temperature > 0 and 0 <= self.swap <= 1):
            raise ConfigurationError(
                f"{self.name} needs a temperature above 0 (kT in eV) and a probability swap of 0 to 1, got "
                f"{self.temperature!r} and {self.swap!r}"
            )
        if self.walkers < 0:
            raise ConfigurationError(f"walkers of {self.name} must not be negative (0: all), got {self.walkers!r}")
        if self.keep not in ("best", "all"):
            raise ConfigurationError(f"keep of {self.name} must be 'best' or 'all', got {self.keep!r}")

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        hops = scheduled(self.hops, ctx.iteration)
        if not len(batch) or not hops:
            return batch
        relax = Relax(self.on, self.steps, self.force_tolerance, self.max_step, self.c1, self.c2, self.name)
        landscape = relax._landscape(ctx)
        if landscape is None:
            raise ConfigurationError(
                f"{self.name} hops on a surface that costs nothing: a model, LCB, or a built-in landscape or calculator, "
                f"got {self.on!r}"
            )
        energy = _core.evaluate(landscape, batch, threads=ctx.threads)[0]
        walk = np.zeros(len(batch), bool)
        walk[np.argsort(energy, kind="stable")[: self.walkers or None]] = True
        stay, energy = batch.take(~walk), energy[walk]
        here = start = batch.take(walk)
        counts = np.diff(here.offsets)
        best, lowest, visited = here.positions, energy, [batch]
        for hop in range(hops):
            key = ctx.key.fold("hop", hop)
            trial, possible = self._moved(here, ctx, key)
            trial = relax(trial, ctx)
            after = _core.evaluate(landscape, trial, threads=ctx.threads)[0]
            whole = _core.closest_contacts(trial) >= self.c1
            if np.isfinite(self.c2):
                whole &= _core.fragments(trial, self.c2) <= _core.fragments(here, self.c2)
            draw = np.array([key.fold("accept", row).rng().random() for row in range(len(here))])
            with np.errstate(over="ignore", invalid="ignore"):
                # `not finite`: a candidate whose own energy makes no sense is left for anything that does
                downhill = (after <= energy) | ~np.isfinite(energy)
                accepted = downhill | (draw < np.exp(-(after - energy) / self.temperature))
            accepted &= possible & whole & np.isfinite(after)
            here = here.with_positions(_chosen(accepted, trial.positions, here.positions, counts))
            energy = np.where(accepted, after, energy)
            lower = accepted & ~(energy >= lowest)
            best, lowest = _chosen(lower, here.positions, best, counts), np.where(lower, energy, lowest)
            visited.append(here.take(accepted))
        if self.keep == "all":
            return Batch.concat(visited)
        return Batch.concat([start.with_positions(best), stay]) if len(stay) else start.with_positions(best)

    def _moved(self, batch: Batch, ctx: Context, key: Key) -> tuple[Batch, np.ndarray]:
        """Every structure rattled or with atoms swapped, and (n,) whether that could be done."""
        problem = ctx.problem
        movable = batch
        if problem.template is not None:  # only placed atoms are moved; a template's free atoms follow the relaxation
            fixed = batch.fixed.reshape(len(batch), -1, 3).copy()
            fixed[:, : problem.template.atoms] = True
            movable = replace(batch, fixed=fixed.reshape(-1, 3))
        positions, possible = _core.rattle(
            movable,
            box=problem.box_arguments,
            amplitude=self.amplitude,
            moved=self.moved,
            key=key.fold("rattle").words,
            c1=problem.c1,
            c2=problem.c2,
            threads=ctx.threads,
        )
        possible = np.asarray(possible, bool)
        if self.swap > 0:
            swapped, ok = _core.permute(movable, key=key.fold("swap").words, threads=ctx.threads)
            draw = np.array([key.fold("move", row).rng().random() for row in range(len(batch))])
            swap = np.asarray(ok, bool) & (draw < self.swap)
            positions = _chosen(swap, swapped, positions, np.diff(batch.offsets))
            possible = possible | swap
        return batch.with_positions(positions), possible


def _chosen(mask: np.ndarray, these: np.ndarray, others: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(m, 3) positions: of structures where `mask` (n,) from `these`, else from `others`."""
    return np.where(np.repeat(mask, counts)[:, None], np.reshape(these, (-1, 3)), np.reshape(others, (-1, 3)))


@dataclass(frozen=True)
class MinDistance:
    """Drops candidates in which two atoms (images included) are closer than c1 covalent sums."""

    c1: float = 0.7
    name: str = "MinDistance"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        return batch.take(_core.closest_contacts(batch) >= self.c1) if len(batch) else batch


@dataclass(frozen=True)
class Connected:
    """Drops candidates that are not in one piece: neighbours are atoms within c2 covalent sums."""

    c2: float = 1.5
    name: str = "Connected"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        return batch.take(_core.fragments(batch, self.c2) == 1) if len(batch) else batch


@dataclass(frozen=True)
class Centre:
    """Moves each structure so that its mean position is the middle of the cell, along open directions only.

    Structures with fixed coordinates stay where they are.
    """

    name: str = "Centre"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        if not len(batch) or batch.fixed.any():
            return batch
        counts = np.diff(batch.offsets)
        mean = np.add.reduceat(batch.positions, batch.offsets[:-1]) / counts[:, None]
        shift = batch.cells.sum(axis=1) / 2 - mean
        # Only the components along open lattice directions.
        fractional = np.linalg.solve(batch.cells.transpose(0, 2, 1), shift[..., None])[..., 0] * ~batch.pbc
        shift = np.einsum("nk,nkx->nx", fractional, batch.cells)
        return batch.with_positions(batch.positions + np.repeat(shift, counts, axis=0))


@dataclass(frozen=True)
class Wrap:
    """Moves free atoms back into the cell along periodic directions."""

    name: str = "Wrap"

    def __call__(self, batch: Batch, ctx: Context) -> Batch:
        if not len(batch) or not batch.pbc.any():
            return batch
        counts = np.diff(batch.offsets)
        cells = np.repeat(batch.cells, counts, axis=0)
        fractional = np.linalg.solve(cells.transpose(0, 2, 1), batch.positions[..., None])[..., 0]
        images = np.floor(fractional) * np.repeat(batch.pbc, counts, axis=0)
        images[batch.fixed.any(axis=1)] = 0
        return batch.with_positions(batch.positions - np.einsum("mk,mkx->mx", images, cells))
