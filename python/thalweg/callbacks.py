"""Observers: (step, search) -> None. They read; they may end the run by raising Stop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from thalweg.errors import Stop

if TYPE_CHECKING:
    from thalweg.records import Step
    from thalweg.search import Search

__all__ = ["Print", "StopAfter", "StopAt"]


@dataclass(frozen=True)
class StopAt:
    """Ends the run when an evaluated objective reaches energy + tolerance [eV]."""

    energy: float
    tolerance: float = 0.001

    def __call__(self, step: Step, search: Search) -> None:
        if search.best_energy <= self.energy + self.tolerance:
            raise Stop(f"reached {search.best_energy:.4f} eV")


@dataclass
class StopAfter:
    """Ends the run after so many seconds of wall time, at the end of a step."""

    seconds: float
    _begin: float = field(default_factory=time.monotonic, repr=False)

    def __call__(self, step: Step, search: Search) -> None:
        if time.monotonic() - self._begin > self.seconds:
            raise Stop(f"{self.seconds:g} seconds are over")


@dataclass(frozen=True)
class Print:
    """One line per `every` steps."""

    every: int = 1

    def __call__(self, step: Step, search: Search) -> None:
        if step.iteration % self.every == 0:
            print(
                f"{step.iteration:6d}  evaluations {search.evaluations:6d}  best {search.best_energy:12.4f} eV",
                flush=True,
            )
