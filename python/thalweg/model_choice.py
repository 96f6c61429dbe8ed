"""One of several models: which one, held-out errors decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.errors import ConfigurationError

if TYPE_CHECKING:
    from thalweg.records import Batch

__all__ = ["ChosenModel"]

Array = np.ndarray


@dataclass(frozen=True)
class ChosenModel:
    """Several models that learn the same data; which one is used, held-out errors decide.

    Every time the candidates evaluated so far have grown by the factor `growth`, each model learns all that was known before
    the last quarter of them and tells the energies of that quarter: the test is the one that a search sets. Points of a
    relaxation or polish are no test: they lie so close to what is known that any model can tell them. Which model is used
    follows from the data alone, so a search that is killed and resumed makes the same choices.

    Parameters
    ----------
    models : mapping of name to model (`GPR`, `LocalGPR`, or anything with their `fit` and `restore`)
        From the one that assumes most to the one that assumes least. The first is used until there are `least` candidates,
        and whenever its median |error| is at most `enough`. Otherwise it is the last one whose error is within `margin` of
        the smallest: where no model knows much, assumptions mislead.
    growth : float
        Above 1.
    least : int
    margin : float
        Part of the smallest error.
    enough : float
        In eV per free atom.
    """

    models: Mapping[str, Any]
    _: KW_ONLY
    growth: float = 1.5
    least: int = 4
    margin: float = 0.5
    enough: float = 0.02
    name: str = field(default="ChosenModel", repr=False)

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ConfigurationError(f"ChosenModel needs at least two models, got {len(self.models)}")
        if not (self.growth > 1 and self.least >= 3 and self.margin >= 0 and self.enough >= 0):
            raise ConfigurationError(
                "ChosenModel needs growth above 1, least of at least 3, and margin and enough that are not negative, got "
                f"{self.growth}, {self.least}, {self.margin} and {self.enough}"
            )

    def fit(self, data: Batch, previous: FittedChoice | None = None, *, key: Any = None) -> FittedChoice:
        """What the chosen model learns."""
        candidates = _candidates(data)
        choice, decided = (previous.choice, previous.decided) if previous is not None else (0, 0)
        if len(candidates) >= self.least and len(candidates) >= self.growth * decided:
            choice, decided = self._better(data, candidates), len(candidates)
        before = previous.fitted if previous is not None and previous.choice == choice else None
        return FittedChoice(self, choice, decided, self._model(choice).fit(data, before, key=key))

    def restore(self, data: Batch, state: Mapping[str, Array]) -> FittedChoice:
        """The fitted model of this `.state`, bit for bit."""
        choice, decided = (int(x) for x in np.asarray(state["choice"]))
        inner = {name: values for name, values in state.items() if name != "choice"}
        return FittedChoice(self, choice, decided, self._model(choice).restore(data, inner))

    def errors(self, data: Batch) -> dict[str, float]:
        """Held-out error [eV] of each model on these data; infinity where it cannot tell."""
        candidates = _candidates(data)
        return {name: self._error(model, data, candidates) for name, model in self.models.items()}

    def _better(self, data: Batch, candidates: Array) -> int:
        first, *others = self.models.values()
        error = self._error(first, data, candidates)
        free = np.count_nonzero(~data[int(candidates[0])].fixed.all(axis=1))
        if error <= self.enough * free:  # the others need not be fitted
            return 0
        errors = np.array([error, *(self._error(model, data, candidates) for model in others)])
        return int(np.flatnonzero(errors <= (1 + self.margin) * errors.min())[-1])

    def _error(self, model: Any, data: Batch, candidates: Array) -> float:
        if not len(candidates):
            return np.inf
        held_out = candidates[-max(2, len(candidates) // 4) :]
        before = data[: int(held_out[0])]
        told = model.fit(before).predict(data.take(held_out), threads=1)[0]
        error = float(np.median(np.abs(told - np.asarray(data.columns["energy"], float)[held_out])))
        return error if np.isfinite(error) else np.inf

    def _model(self, choice: int) -> Any:
        return list(self.models.values())[choice]


class FittedChoice:
    """The chosen model, fitted; has all that the fitted model itself has."""

    def __init__(self, model: ChosenModel, choice: int, decided: int, fitted: Any):
        self.model, self.choice, self.decided, self.fitted = model, choice, decided, fitted

    def __getattr__(self, name: str) -> Any:
        if name in ("fitted", "model"):  # not there yet: while copied or unpickled
            raise AttributeError(name)
        return getattr(self.fitted, name)

    def __repr__(self) -> str:
        return f"FittedChoice({list(self.model.models)[self.choice]!r}: {self.fitted!r})"

    @property
    def chosen(self) -> str:
        """Name of the model in use."""
        return list(self.model.models)[self.choice]

    @property
    def state(self) -> dict[str, Array]:
        """The chosen model's, and `choice`: its number and how many candidates there were at the last choice."""
        return {**self.fitted.state, "choice": np.array([self.choice, self.decided], np.int64)}


def _candidates(data: Batch) -> Array:
    """(k,) rising rows that have an energy: the first point of each candidate, nothing of a relaxation or a polish."""
    if "energy" not in data.columns:
        return np.zeros(0, np.int64)
    first = np.asarray(data.columns.get("origin", np.zeros(len(data), "U1"))) != "polish"
    if len(data) and {"ticket", "candidate"} <= set(data.columns):
        which = np.stack([data.columns["ticket"], data.columns["candidate"]])
        first[1:] &= np.any(which[:, 1:] != which[:, :-1], axis=0)
    return np.flatnonzero(data.ok & first).astype(np.int64)
