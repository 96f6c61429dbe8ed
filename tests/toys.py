"""Small elements written in Python alone: the loop must work with any callable."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from thalweg.records import Batch, Context


class PairToy(Calculator):
    """Morse pairs in NumPy; can fail at random (by position, so that it fails again when asked again) and count calls."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, *, fails: float = 0.0, raises: bool = True, delay: float = 0.0):
        super().__init__()
        self.fails, self.raises, self.delay, self.calls = fails, raises, delay, 0
        self.parameters = {"fails": fails, "raises": raises}

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls += 1
        if self.delay:
            import time

            time.sleep(self.delay)
        x = atoms.positions
        if self.fails and zlib.crc32(x.tobytes()) < self.fails * 2**32:
            if self.raises:
                raise RuntimeError("did not converge")
            self.results = {"energy": np.nan, "forces": np.zeros_like(x)}
            return
        d = x[:, None] - x[None]
        r = np.sqrt((d**2).sum(-1) + np.eye(len(x)))
        e = np.exp(-1.5 * (r - 2.5)) * (1 - np.eye(len(x)))
        slope = 1.5 * 2 * (e - e * e)
        self.results = {
            "energy": 0.5 * (e * e - 2 * e).sum(),
            "forces": -(slope / r)[..., None].__mul__(d).sum(1),
        }


@dataclass(frozen=True)
class Scatter:
    """Atoms anywhere in the box."""

    count: int = 3
    name: str = "Scatter"

    def __call__(self, ctx: Context) -> Batch:
        problem = ctx.problem
        n = len(problem.placed_numbers)
        fractional = np.array([ctx.key.fold(row).rng().random((n, 3)) for row in range(self.count)]).reshape(-1, n, 3)
        return problem.batch(problem.box_corner + fractional @ problem.box_vectors)


@dataclass(frozen=True)
class Nudge:
    """Members of the sample, moved a little."""

    count: int = 2
    name: str = "Nudge"

    def __call__(self, ctx: Context) -> Batch:
        if not len(ctx.sample):
            return Batch.empty()
        rows = ctx.key.rng().integers(len(ctx.sample), size=self.count)
        parents = ctx.sample.take(rows)
        noise = np.concatenate(
            [ctx.key.fold(k).rng().normal(0, 0.2, (n, 3)) for k, n in enumerate(np.diff(parents.offsets))]
        )
        return parents.with_positions(parents.positions + noise).with_columns(parent=parents.columns["row"])


def closeness(batch: Batch, ctx: Context) -> np.ndarray:
    """An acquisition: compact structures first."""
    return np.array([np.ptp(batch.positions_of(i), axis=0).sum() for i in range(len(batch))])


def same_rows(a: Batch, b: Batch) -> bool:
    """Equal logical content, bit for bit, NaN equal to NaN; wall times apart."""
    if len(a) != len(b) or set(a.columns) != set(b.columns):
        return False
    pairs = [(getattr(a, f), getattr(b, f)) for f in ("positions", "numbers", "offsets", "cells", "pbc", "fixed")]
    pairs += [(a.columns[name], b.columns[name]) for name in a.columns if name != "seconds"]
    pairs += [(a.atom_columns[name], b.atom_columns[name]) for name in a.atom_columns]
    return all(x.shape == y.shape and np.array_equal(x, y, equal_nan=x.dtype.kind == "f") for x, y in pairs)
