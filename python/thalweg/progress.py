"""How a campaign gets on, on a terminal (live bars) or in a log (a line now and then)."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

__all__ = ["LiveDisplay", "PlainDisplay", "display"]


class _Tally:
    """What both displays count: iterations done of all restarts, the best energy, restarts that have ended."""

    def __init__(self, restarts: int, iterations: int, known: dict[int, int] | None = None):
        self.restarts = restarts
        self.iterations = iterations
        self.done_iterations: dict[int, int] = dict(known or {})
        self.evaluations: dict[int, int] = {}
        self.best: dict[int, float] = {}
        self.ended: dict[int, dict[str, Any]] = {}
        self.began = time.monotonic()
        self._first_done: int | None = None

    def step(self, index: int, iteration: int, evaluations: int, best_energy: float | None) -> None:
        self.done_iterations[index] = iteration
        self.evaluations[index] = evaluations
        if best_energy is not None:
            self.best[index] = best_energy

    def end(self, index: int, result: dict[str, Any]) -> None:
        # one that was only stopped will go on when it is resumed
        if result.get("finished") or str(result.get("reason", "")).startswith("failed"):
            self.ended[index] = result
        self.evaluations[index] = int(result.get("evaluations") or 0)
        if result.get("best_energy") is not None:
            self.best[index] = float(result["best_energy"])

    @property
    def total(self) -> int:
        return self.restarts * self.iterations

    @property
    def done(self) -> int:
        running = {index: count for index, count in self.done_iterations.items() if index not in self.ended}
        return len(self.ended) * self.iterations + sum(min(count, self.iterations) for count in running.values())

    def seconds_left(self) -> float | None:
        """Estimated from what this sitting has done; None while there is too little to go by."""
        done, elapsed = self.done, time.monotonic() - self.began
        if self._first_done is None:
            self._first_done = done
        gained = done - self._first_done
        if gained <= 0 or elapsed < 1.0:
            return None
        return (self.total - done) * elapsed / gained

    def headline(self) -> str:
        parts = [
            f"{len(self.ended)}/{self.restarts} restarts",
            f"{sum(self.evaluations.values())} evaluations",
        ]
        if self.best:
            parts.append(f"best {min(self.best.values()):.4f} eV")
        return ", ".join(parts)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _ending(index: int, result: dict[str, Any]) -> str:
    best, reason = result.get("best_energy"), str(result.get("reason", ""))
    if reason.startswith("failed"):
        return f"restart {index:3d}: {reason}"
    energy = f"{best:.4f} eV after " if best is not None else ""
    return f"restart {index:3d}: {energy}{result.get('evaluations', 0)} evaluations ({reason})"


class PlainDisplay:
    """One line when a restart ends, and one every `every` seconds in between."""

    def __init__(self, restarts: int, iterations: int, *, file: TextIO | None = None, every: float = 10.0):
        self._tally = _Tally(restarts, iterations)
        self._file = file if file is not None else sys.stdout
        self._every = every
        self._last = time.monotonic()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *unused: object) -> None:
        pass

    def _print(self, text: str) -> None:
        print(text, file=self._file, flush=True)
        self._last = time.monotonic()

    def progress(self, index: int, iteration: int, evaluations: int, best_energy: float | None) -> None:
        self._tally.step(index, iteration, evaluations, best_energy)

    def done(self, index: int, result: dict[str, Any]) -> None:
        self._tally.end(index, result)
        self._print(f"[{len(self._tally.ended)}/{self._tally.restarts}] {_ending(index, result)}")

    def tick(self) -> None:
        left = self._tally.seconds_left()
        if time.monotonic() - self._last >= self._every:
            share = 100 * self._tally.done / max(1, self._tally.total)
            self._print(f"{share:3.0f} %, {self._tally.headline()}, about {_clock(left)} left")


class LiveDisplay:
    """A bar for the campaign and a line for each restart that is running, redrawn in place."""

    def __init__(self, restarts: int, iterations: int, *, console: Any = None):
        from rich.console import Console
        from rich.live import Live

        self._tally = _Tally(restarts, iterations)
        self._live = Live(console=console or Console(), refresh_per_second=8, get_renderable=self._render)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._live.stop()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        tally = self._tally
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=max(1, tally.total), completed=tally.done, width=44),
            Text(f"{100 * tally.done / max(1, tally.total):3.0f} %"),
            Text(f"{_clock(tally.seconds_left())} left" if len(tally.ended) < tally.restarts else ""),
        )
        lines = Table.grid(padding=(0, 1))
        for index, iteration in sorted(tally.done_iterations.items()):
            if index in tally.ended:
                continue
            best = tally.best.get(index)
            lines.add_row(
                Text(f"  restart {index}", style="dim"),
                ProgressBar(total=tally.iterations, completed=iteration, width=18),
                Text(f"iteration {iteration}/{tally.iterations}", style="dim"),
                Text(f"{best:.4f} eV" if best is not None else "", style="dim"),
            )
        return Group(head, Text(tally.headline(), style="bold", no_wrap=True), lines)

    def progress(self, index: int, iteration: int, evaluations: int, best_energy: float | None) -> None:
        self._tally.step(index, iteration, evaluations, best_energy)

    def done(self, index: int, result: dict[str, Any]) -> None:
        self._tally.end(index, result)
        if str(result.get("reason", "")).startswith("failed"):
            self._live.console.print(_ending(index, result), style="red", highlight=False)

    def tick(self) -> None:
        self._tally.seconds_left()


def display(restarts: int, iterations: int) -> LiveDisplay | PlainDisplay:
    """The display that fits where the output goes."""
    if sys.stdout.isatty():
        return LiveDisplay(restarts, iterations)
    return PlainDisplay(restarts, iterations)
