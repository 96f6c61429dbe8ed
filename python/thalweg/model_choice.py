"""One of several models, whichever tells better what it has not seen."""

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
    """Several models that learn the same data; the one with the smallest held-out error is used.

    Every time the usable data have grown by the factor `growth`, each model learns all but the last quarter of them and
    tells the energies of that quarter, in the order in which a search met them: the test is the one that a search sets. The
    smallest median of |error| wins; the present choice stays when it is within `margin` of that. Which model that is
    follows from the data alone, so a search that is killed and resumed makes the same choices.

    Parameters
    ----------
    models : mapping of name to model (`GPR`, `LocalGPR`, or anything with their `fit` and `restore`)
        The first is used until there are `least` structures.
    growth : float
        Above 1.
    least : int
    margin : float
        Part of the smallest error.
    """

    models: Mapping[str, Any]
    _: KW_ONLY
    growth: float = 1.5
    least: int = 8
    margin: float = 0.1
    name: str = field(default="ChosenModel", repr=False)

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ConfigurationError(f"ChosenModel needs at least two models, got {len(self.models)}")
        if not (self.growth > 1 and self.least >= 4 and self.margin >= 0):
            raise ConfigurationError(
                "ChosenModel needs growth above 1, least of at least 4 and a margin that is not negative, got "
                f"{self.growth}, {self.least} and {self.margin}"
            )

    def fit(self, data: Batch, previous: FittedChoice | None = None, *, key: Any = None) -> FittedChoice:
        """What the chosen model learns."""
        usable = _usable(data)
        choice, decided = (previous.choice, previous.decided) if previous is not None else (0, 0)
        if len(usable) >= self.least and len(usable) >= self.growth * decided:
            choice, decided = self._better(data, usable, choice), len(usable)
        before = previous.fitted if previous is not None and previous.choice == choice else None
        return FittedChoice(self, choice, decided, self._model(choice).fit(data, before, key=key))

    def restore(self, data: Batch, state: Mapping[str, Array]) -> FittedChoice:
        """The fitted model of this `.state`, bit for bit."""
        choice, decided = (int(x) for x in np.asarray(state["choice"]))
        inner = {name: values for name, values in state.items() if name != "choice"}
        return FittedChoice(self, choice, decided, self._model(choice).restore(data, inner))

    def errors(self, data: Batch) -> dict[str, float]:
        """Held-out error [eV] of each model on these data; infinity where it cannot tell."""
        usable = _usable(data)
        return {name: self._error(model, data, usable) for name, model in self.models.items()}

    def _better(self, data: Batch, usable: Array, choice: int) -> int:
        errors = np.array([self._error(model, data, usable) for model in self.models.values()])
        best = int(np.argmin(errors))
        return choice if errors[choice] <= (1 + self.margin) * errors[best] else best

    def _error(self, model: Any, data: Batch, usable: Array) -> float:
        held_out = usable[-max(2, len(usable) // 4) :]
        status = np.zeros(len(data), np.uint8) if "status" not in data.columns else np.array(data.columns["status"])
        status[held_out] = 1
        fitted = model.fit(data.with_columns(status=status))
        told = fitted.predict(data.take(held_out), threads=1)[0]
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
        """The chosen model's, and `choice`: its number and the usable rows at the last choice."""
        return {**self.fitted.state, "choice": np.array([self.choice, self.decided], np.int64)}


def _usable(data: Batch) -> Array:
    """(k,) rising rows that have an energy."""
    if "energy" not in data.columns:
        return np.zeros(0, np.int64)
    return np.flatnonzero(data.ok).astype(np.int64)
