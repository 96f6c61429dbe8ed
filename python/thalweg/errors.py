"""The one family of exceptions: each says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

__all__ = [
    "BackendUnavailable",
    "CalculationFailed",
    "ConfigurationError",
    "Stop",
    "StoreError",
    "ThalwegError",
    "check_whole",
    "nearest",
]


class ThalwegError(ValueError):
    """Base of every error that thalweg raises on purpose."""


class ConfigurationError(ThalwegError):
    """A problem, an element or a configuration file that makes no sense."""


class BackendUnavailable(ThalwegError):
    """A device or library that this installation of thalweg was not built for; the message says how to get it."""


class StoreError(ThalwegError):
    """A store that cannot be read, written or continued."""


class CalculationFailed(ThalwegError):
    """A true evaluation that gave no usable energy; becomes a row with status 1, never ends a search."""


class Stop(Exception):
    """Raised by an observer (or by the search itself) to end a run cleanly; the argument says why."""


def check_whole(value: Any, what: str, least: int) -> None:
    """Raises ConfigurationError unless the value is a whole number, at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigurationError(f"{what} must be a whole number of at least {least}, got {value!r}")


def nearest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the option closest to a misspelt name, or an empty string."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""
