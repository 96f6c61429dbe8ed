"""Settings that change over the iterations: a number, or {first iteration: value, ...}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, TypeVar, Union

from thalweg.errors import ConfigurationError

__all__ = ["Schedule", "check_schedule", "scheduled"]

Number = TypeVar("Number", int, float)
Schedule: TypeAlias = Union[Number, Mapping[int, Number]]  # noqa: UP007 (an alias over a type variable)


def scheduled(value: Schedule[Number], iteration: int) -> Number:
    """The value in force at an iteration: `{0: 10, 5: 3}` is 10 before iteration 5 and 3 from there on."""
    if not isinstance(value, Mapping):
        return value
    return value[max(first for first in value if int(first) <= iteration)]


def check_schedule(value: Schedule[Number], what: str, *, least: float = 0, most: float = 1e6) -> None:
    """Raises ConfigurationError unless it is a number from `least` to `most`, or a mapping that begins at iteration 0."""
    values = list(value.values()) if isinstance(value, Mapping) else [value]
    firsts: list[int] = list(value) if isinstance(value, Mapping) else [0]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and least <= v <= most for v in values)
    if not numbers or not all(isinstance(first, int) for first in firsts) or min(firsts, default=1) != 0:
        raise ConfigurationError(
            f"{what} must be a number of at least {least} (at most {most:g}), or {{first iteration: number}} beginning at "
            f"0, got {str(value)[:100]}"
        )
