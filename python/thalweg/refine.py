"""Postprocessing of candidates before any true energy: (Batch, Context) -> Batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled
from thalweg.select import model_of

__all__ = ["Centre", "Connected", "MinDistance", "Relax", "Wrap"]


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
