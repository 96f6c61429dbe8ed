"""What a model does when the search stands still: it forgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigurationError

if TYPE_CHECKING:
    from thalweg.records import Batch

__all__ = ["ResetOnStagnation"]


@dataclass(frozen=True)
class ResetOnStagnation:
    """A model that starts anew, hyperparameters and data, when the search has not improved for `after` iterations: it
    then learns only from what is evaluated later (Paper III: a search that keeps finding one best structure resets its
    surrogate). Improvement counts from the last reset on, so that a new landscape gets as many iterations to show itself.

    When the model was reset follows from the evaluated rows alone; a search that is killed and resumed resets at the same
    iterations. Samplers, duplicates and the best structure know everything as before.

    Parameters
    ----------
    model : GPR or any other model
    after : int
        Iterations without a lower energy.
    tolerance : float
        In eV; a best energy lowered by less than this is not an improvement.
    """

    model: Any
    after: int = 20
    tolerance: float = 1e-3
    name: str = field(default="ResetOnStagnation", repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.after, bool) or not isinstance(self.after, int) or self.after < 1:
            raise ConfigurationError(f"after must be a whole number of iterations, at least 1, got {self.after!r}")
        if not self.tolerance >= 0:
            raise ConfigurationError(f"tolerance is an energy in eV and must not be negative, got {self.tolerance!r}")

    def fit(self, data: Batch, previous: Any = None, *, key: Any = None) -> Any:
        """What the model learns from the rows since the last reset; its rows keep their numbers in `data`."""
        forgotten = self.forgotten(data)
        if previous is not None and forgotten:
            rows = getattr(previous, "rows", None)
            if rows is None or np.any(np.asarray(rows) < forgotten):
                previous = None
        return self.model.fit(_without(data, forgotten), previous, key=key)

    def restore(self, data: Batch, state: Any) -> Any:
        """The fitted model of this state, bit for bit."""
        return self.model.restore(_without(data, self.forgotten(data)), state)

    def forgotten(self, data: Batch) -> int:
        """How many rows, from the first, lie before the last reset."""
        if not len(data):
            return 0
        energy = np.where(data.ok, data.columns["energy"], np.inf)
        energy = np.where(np.isfinite(energy), energy, np.inf)
        tickets = data.columns.get("ticket", np.arange(len(data)))
        iterations = data.columns.get("iteration", tickets)
        begins = np.concatenate([[0], np.flatnonzero(np.diff(tickets)) + 1])
        ends = np.append(begins[1:], len(data))
        lowest = np.minimum.reduceat(energy, begins)
        best, since, forgotten = np.inf, int(iterations[0]), 0
        for k, begin in enumerate(begins):
            if lowest[k] < best - self.tolerance or not np.isfinite(best):
                best, since = lowest[k], int(iterations[begin])
            elif iterations[begin] - since >= self.after:
                best, since, forgotten = np.inf, int(iterations[begin]), int(ends[k])
        return forgotten


def _without(data: Batch, forgotten: int) -> Batch:
    """The same rows, the first so many marked as unusable."""
    if not forgotten:
        return data
    status = np.array(data.columns["status"])
    status[:forgotten] = 1
    return data.with_columns(status=status)
