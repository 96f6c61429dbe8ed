"""The one family of exceptions: each says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendUnavailable",
    "CalculationFailed",
    "ConfigurationError",
    "Stop",
    "StoreError",
    "ThalwegError",
    "nearest",
]


class ThalwegError(ValueError):
    """Base of every error that thalweg raises on purpose."""


class ConfigurationError(ThalwegError):
    """A problem, an element or a configuration file that makes no sense."""


class BackendUnavailable(ThalwegError):
    """CUDA kernels were asked for where there are none; the message says how to get them."""


class StoreError(ThalwegError):
    """A store that cannot be read, written or continued."""


class CalculationFailed(ThalwegError):
    """A true evaluation that gave no usable energy; becomes a row with status 1, never ends a search."""


class Stop(Exception):
    """Raised by an observer (or by the search itself) to end a run cleanly; the argument says why."""


def nearest(name: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the option closest to a misspelt name, or an empty string."""
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""
