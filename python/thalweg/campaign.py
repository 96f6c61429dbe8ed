"""Many restarts of one configuration in parallel, in a run folder.

    OUT/config.toml            resolved configuration         OUT/summary.json   what came out, rewritten whole
    OUT/template.extxyz        if the problem has one         OUT/best.extxyz    best of each restart, lowest first
    OUT/restarts/000/store.journal  the log of restart 0       OUT/report.html    written by the command line
    OUT/restarts/000/result.json  its line of the summary     OUT/restarts/000/error.txt  traceback, if it failed
    OUT/restarts/000/agent.npz    its agent, to transfer from  OUT/restarts/000/portrait.npz  what the report draws of it
    OUT/transfer_from.npz         if it started from one

Restart i searches with seed + i, alone in a worker process, so that results do not depend on the number of workers.
Several processes (job arrays) may share one folder as long as each runs restarts of its own.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from thalweg.config import Configuration
from thalweg.descriptors import Fingerprint
from thalweg.errors import ConfigurationError, Stop, StoreError, ThalwegError
from thalweg.statistics import first_reaching
from thalweg.store import History, read

__all__ = ["Outcome", "RunFolder", "create", "histories", "load_results", "prepare", "run", "structures", "summarise"]

# Keys of [search] that change how long or how widely is searched, not what a restart does.
EXTENDABLE = ("workers",)

# Offline relaxation that decides about success: enough steps for any start, forces tight enough for 1 meV.
RELAX_STEPS, RELAX_FORCE = 500, 0.005
RELAX_AT_ONCE = 64

# Restarts agree whose best energies differ by less [eV] (unless a target has a tolerance of its own) and whose best
# structures have fingerprints that differ by less than this fraction of their length.
SAME_ENERGY, SAME_STRUCTURE = 0.001, 0.02

# After its parent has died a worker may finish the evaluation that it is in, for so long [s].
ORPHAN_GRACE = 10.0


class FolderTaken(ConfigurationError):
    """A run folder that belongs to another configuration."""


class Watcher(Protocol):
    """Told how the restarts get on (progress displays)."""

    def progress(self, index: int, iteration: int, evaluations: int, best_energy: float | None) -> None:
        """A step of restart `index` has ended."""

    def done(self, index: int, result: dict[str, Any]) -> None:
        """Restart `index` has ended; `result` is its entry in summary.json."""

    def tick(self) -> None:
        """Called a few times per second."""


# ---- the folder ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """Where things are in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def template(self) -> Path:
        return self.path / "template.extxyz"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def best(self) -> Path:
        return self.path / "best.extxyz"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def restart(self, index: int) -> Path:
        return self.path / "restarts" / f"{index:03d}"

    def store(self, index: int) -> Path:
        return self.restart(index) / "store.journal"

    def portrait(self, index: int) -> Path:
        """What a report draws of the restart's agent, if it has one."""
        return self.restart(index) / "portrait.npz"

    def snapshot(self, index: int) -> Path:
        """The restart's agent as it built last, for `transfer_from`."""
        return self.restart(index) / "agent.npz"

    def result(self, index: int) -> Path:
        return self.restart(index) / "result.json"

    def restarts(self) -> list[int]:
        """Indices of the restarts that have a store."""
        found = self.path.glob("restarts/*/store.journal")
        return sorted(int(store.parent.name) for store in found if store.parent.name.isdigit())

    def configuration(self) -> Configuration:
        """The resolved configuration. Raises ConfigurationError if this is no run folder."""
        if not self.config.is_file():
            what = "is not a run folder: it has no config.toml" if self.path.exists() else "does not exist"
            raise ConfigurationError(f"'{self.path}' {what}")
        return Configuration.load(self.config)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file in one step, so that readers and crashes see the old or the new content, never a part.

    Raises ThalwegError when the disk is full or cannot be written to; the old file is then untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as problem:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise _disk_error(path, problem) from problem


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _disk_error(path: Path, problem: OSError) -> ThalwegError:
    if problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return ThalwegError(
            f"cannot write {path}: the disk is full. Stored evaluations are safe; make room and run `thalweg resume`"
        )
    return ThalwegError(f"cannot write {path}: {problem.strerror or problem}")


def prepare(configuration: Configuration, folder: str | Path) -> Configuration:
    """Makes the run folder and writes its configuration; several processes may do so at once.

    Returns the configuration as the folder has it, which is what every restart uses. Raises ConfigurationError when the
    folder belongs to another configuration.
    """
    run_folder = RunFolder(Path(folder))
    with configuration.make_search(
        seed=configuration.search.seed, store=None
    ) as trial:  # finds mistakes before workers do
        problem = trial.problem
    copies = {}
    section, options = configuration.problem, dict(configuration.options)
    if problem.template is not None:
        copies["template"] = run_folder.template, _extxyz(problem.template.to_ase())
        section = section.model_copy(update={"template": run_folder.template.name})
    for name, path in configuration.files().items():
        copies[name] = run_folder.path / f"{name}{path.suffix}", path.read_bytes()
        options[name] = copies[name][0].name
    for name, (path, content) in copies.items():
        if path.is_file():
            if run_folder.config.is_file() and path.read_bytes() != content:
                raise FolderTaken(
                    f"'{folder}' belongs to another configuration: its {name} differs; choose another --out"
                )
        else:
            write_atomically(path, content)
    resolved = Configuration(section, configuration.calculator, configuration.search, options, run_folder.path)
    created = create(run_folder.config, resolved.to_toml())
    found = run_folder.configuration()
    if not created:
        changed = difference(found, resolved)
        if changed:
            raise FolderTaken(
                f"'{folder}' belongs to another configuration: {changed[0]}; choose another --out, or use "
                f"`thalweg resume {folder} --iterations ... --restarts ...` to go on"
            )
    return found


def difference(there: Configuration, here: Configuration) -> list[str]:
    """What keeps two configurations from sharing a folder, in words; empty if nothing."""
    out = []
    a, b = there.to_dict(), here.to_dict()
    for section in a:
        for key in {**a[section], **b[section]}:
            before, now = a[section].get(key), b[section].get(key)
            if before != now and not (section == "search" and key in EXTENDABLE):
                out.append(f"{section}.{key} is {before} there and {now} here")
    return out


def create(path: Path, text: str) -> bool:
    """Writes a file that must not exist yet, whole or not at all; False if it exists."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return False
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False, mode="w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o666 & ~_umask())
        try:
            os.link(file.name, path)
            return True
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            os.replace(file.name, path)
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.name)
    except OSError as problem:
        raise _disk_error(path, problem) from problem


def _extxyz(structures: Sequence[Any]) -> bytes:
    import io

    import ase.io

    buffer = io.StringIO()
    # without a structure ASE refuses; an empty file is a valid answer to "the best of no restart"
    if structures:
        ase.io.write(buffer, list(structures), format="extxyz")
    return buffer.getvalue().encode()


# ---- one restart ---------------------------------------------------------------------------------------------


def measure(
    configuration: Configuration, folder: RunFolder, index: int, history: History, *, trusted: bool = False
) -> dict[str, Any]:
    """The entry of one restart in summary.json, from its store; what an earlier call relaxed is not relaxed again.

    trusted: the calculator may be made to find out whether it has a batched landscape, and making it may run any program;
    otherwise only the built-in ones are. A report of somebody else's folder runs nothing.

    delivered_evaluation: first evaluation (1-based, failed ones count) whose own energy reaches the target.
    success_evaluation: first evaluated structure whose relaxation in the true potential reaches it; None where the
    calculator has no batched landscape.
    """
    previous = _load_result(folder.result(index))
    rows = history.rows
    energies = np.where(rows.ok, rows.columns["energy"], np.nan) if len(rows) else np.zeros(0)
    seconds = rows.columns["seconds"] if len(rows) else np.zeros(0)
    result: dict[str, Any] = {
        "index": index,
        "seed": configuration.search.seed + index,
        "best_energy": float(np.nanmin(energies)) if np.any(np.isfinite(energies)) else None,
        "iterations": int(history.iterations),
        "evaluations": len(rows),
        "seconds": round(float(seconds[-1]), 3) if len(rows) else 0.0,
        "success_evaluation": None,
        "delivered_evaluation": None,
        "finished": False,
        "reason": previous.get("reason", "") if previous else "",
    }
    target = configuration.search.target
    if target is not None:
        result["target"] = [target.energy, target.tolerance]
        result["delivered_evaluation"] = first_reaching(energies, target.threshold)
        same = previous is not None and previous.get("target") == result["target"]
        before = previous if same and previous is not None else {}
        result |= _success(
            configuration, history, energies, before, target.threshold, result["delivered_evaluation"], trusted
        )
    # the last ticket of a run is its finishing touch; without it the iterations alone are not the whole
    result["closed"] = bool(history.finished)
    ended = why_ended(configuration, result)
    if ended is not None:
        result["finished"], result["reason"] = True, ended
    return result


def why_ended(configuration: Configuration, result: dict[str, Any]) -> str | None:
    """Why the restart with this result has nothing left to do, or None."""
    search = configuration.search
    if search.target is not None and search.target.stop and result.get("delivered_evaluation") is not None:
        return "target reached"
    if search.max_evaluations is not None and result.get("evaluations", 0) >= search.max_evaluations:
        return f"{search.max_evaluations} evaluations spent"
    if result.get("closed") and result.get("iterations", 0) >= search.iterations:
        return f"{search.iterations} iterations done"
    return None


def _success(
    configuration: Configuration,
    history: History,
    energies: np.ndarray,
    before: dict[str, Any],
    threshold: float,
    delivered: int | None,
    trusted: bool,
) -> dict[str, Any]:
    if before.get("success_evaluation") is not None:
        return {"success_evaluation": before["success_evaluation"], "checked": before["success_evaluation"]}
    # what is delivered needs no relaxation, and nothing after it matters
    end = len(energies) if delivered is None else delivered - 1
    checked = int(before.get("checked", 0))
    if not trusted and (configuration.calculator.name not in ("emt", "lj") or configuration.calculator.guard):
        if "checked" not in before or checked < end:
            return {"success_evaluation": None}
        return {"success_evaluation": delivered, "checked": checked}
    from thalweg import _core
    from thalweg.calculators import landscape_of

    landscape = landscape_of(configuration.make_calculator())
    if landscape is None:
        return {"success_evaluation": None}
    while checked < end:
        stop = min(checked + RELAX_AT_ONCE, end)
        known = checked + np.flatnonzero(np.isfinite(energies[checked:stop]))
        if len(known):
            relaxed = _core.relax(landscape, history.rows.take(known), steps=RELAX_STEPS, force_tolerance=RELAX_FORCE)
            reached = np.flatnonzero(np.asarray(relaxed[1]) <= threshold)
            if len(reached):
                first = int(known[reached[0]]) + 1
                return {"success_evaluation": first, "checked": first}
        checked = stop
    return {"success_evaluation": delivered, "checked": end}


class Agreement:
    """How many restarts have found the same best structure (Paper III stops a campaign at five of ten).

    Only an unbroken beginning of the restarts counts, 0, 1, ..., as far as all of them have ended: what the verdict is,
    and after which restart it falls, then does not depend on the number of workers or on who is faster.
    """

    def __init__(self, configuration: Configuration):
        target = configuration.search.target
        self.wanted = configuration.search.stop_when_agree
        self._tolerance = SAME_ENERGY if target is None else target.tolerance
        self._best: dict[int, tuple[float, np.ndarray] | None] = {}

    def add(self, index: int, history: History | None) -> None:
        """Restart `index` has ended with this; None: it failed and left nothing."""
        self._best[index] = None
        if self.wanted is None or history is None or not np.any(history.rows.ok):
            return
        objective = history.problem.objective(history.rows)
        row = int(np.nanargmin(objective))
        self._best[index] = float(objective[row]), Fingerprint().values(history.rows[row])[0]

    @property
    def state(self) -> dict[str, Any]:
        """What summary.json says: `found` restarts (`restarts`) agree on `energy`; decided_after: how many restarts from
        the first it took until `wanted` did, None if they do not."""
        state: dict[str, Any] = {
            "wanted": self.wanted,
            "found": 0,
            "energy": None,
            "restarts": [],
            "decided_after": None,
        }
        found: list[tuple[int, float, np.ndarray]] = []
        index = 0
        while index in self._best and state["decided_after"] is None and self.wanted is not None:
            best = self._best[index]
            if best is not None:
                found.append((index, *best))
                _, energy, feature = min(found, key=lambda one: one[1])
                near = SAME_STRUCTURE * float(np.linalg.norm(feature))
                same = [k for k, e, f in found if e - energy <= self._tolerance and np.linalg.norm(f - feature) <= near]
                state |= {"found": len(same), "energy": energy, "restarts": same}
                if len(same) >= self.wanted:
                    state["decided_after"] = index + 1
            index += 1
        return state

    @property
    def verdict(self) -> str | None:
        """In words, once it has fallen."""
        state = self.state
        if state["decided_after"] is None:
            return None
        return f"{state['found']} of the first {state['decided_after']} restarts agree on {state['energy']:.4f} eV"


def _ended(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("finished")) or str(entry.get("reason", "")).startswith("failed")


def _load_result(path: Path) -> dict[str, Any] | None:
    """A result.json, or None if there is none or it is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and all(_is_of(found.get(key), kind) for key, kind in RESULT.items()):
            return found
    return None


# What result.json holds. Every key may be missing or null, but for index and evaluations.
RESULT: dict[str, type] = {
    "index": int, "seed": int, "best_energy": float, "iterations": int, "evaluations": int, "seconds": float,
    "success_evaluation": int, "delivered_evaluation": int, "checked": int, "finished": bool, "closed": bool, "reason": str,
    "target": list,
}  # fmt: skip


def _is_of(value: Any, kind: type) -> bool:
    if kind is float:
        return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300)
    if kind is int:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62)
    return value is None or isinstance(value, kind)


def _search(configuration: Configuration, folder: RunFolder, index: int, link: _Link) -> str:
    """Runs restart `index` from where its store ends; returns why it stopped."""
    search = configuration.make_search(seed=configuration.search.seed + index, store=folder.store(index))
    target, iterations = configuration.search.target, configuration.search.iterations

    def reached() -> bool:
        return target is not None and target.stop and search.best_energy <= target.threshold

    def observe(step: Any, search: Any) -> None:
        link.progress(index, search.iteration, search.evaluations, search.best_energy)
        if reached():
            search.request_stop("target reached")  # the finishing touch would only cost evaluations
            raise Stop("target reached")

    if reached():
        search.close()
        return "target reached"
    try:
        link.progress(index, search.iteration, search.evaluations, search.best_energy)
        link.attach(search)
        search.callbacks.append(observe)
        found = search.run(max(0, iterations - search.iteration), evaluations=configuration.search.max_evaluations)
        reason = str(found.reason)
        for fitted in search.fitted.values():
            if hasattr(fitted, "portrait"):
                portrait, snapshot = io.BytesIO(), io.BytesIO()
                np.savez_compressed(portrait, **fitted.portrait())
                fitted.save(snapshot)
                write_atomically(folder.portrait(index), portrait.getvalue())
                write_atomically(folder.snapshot(index), snapshot.getvalue())
    except BaseException:
        with contextlib.suppress(Exception):  # what closing says after a failure would hide the failure
            search.close()
        raise
    finally:
        link.attach(None)
    search.close()
    return reason


# ---- workers -------------------------------------------------------------------------------------------------


class _Link:
    """The worker's end of the pipe: a thread listens, so that a stop reaches a search that is computing."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()
        self._search: Any = None
        self._last = 0.0
        self.stop_reason: str | None = None
        self.orders: queue.Queue[tuple[Any, ...]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, *message: Any) -> None:
        # a parent that has died is noticed by the listener
        with contextlib.suppress(OSError, ValueError):
            self._connection.send(message)

    def progress(self, index: int, iteration: int, evaluations: int, best_energy: float | None) -> None:
        now = time.monotonic()
        if now - self._last >= 0.1:
            self._last = now
            finite = best_energy is not None and math.isfinite(best_energy)
            self.send("progress", index, iteration, evaluations, float(best_energy) if finite else None)  # type: ignore[arg-type]

    def attach(self, search: Any) -> None:
        with self._lock:
            self._search = search
            if search is not None and self.stop_reason is not None:
                search.request_stop(self.stop_reason)

    def stop(self, reason: str) -> None:
        with self._lock:
            self.stop_reason = self.stop_reason or reason
            if self._search is not None:
                self._search.request_stop(self.stop_reason)

    def _listen(self) -> None:
        while True:
            try:
                order = self._connection.recv()
            except (EOFError, OSError):
                self.stop("the process that started it died")
                self.orders.put(("exit",))
                time.sleep(ORPHAN_GRACE)
                os._exit(1)
            if order[0] == "stop":
                self.stop(order[1])
            else:
                self.orders.put(order)


def _worker(connection: Connection, path: str) -> None:
    """Runs restarts as the parent orders them, until it says exit or dies."""
    link = _Link(connection)

    # A handler runs in the main thread between two bytecodes and must not wait for a lock that this thread may hold.
    def terminate(number: int, frame: Any) -> None:
        threading.Thread(target=link.stop, args=(signal.Signals(number).name,), daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes it on
    signal.signal(signal.SIGTERM, terminate)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    folder = RunFolder(Path(path))
    configuration = folder.configuration()
    while True:
        order = link.orders.get()
        if order[0] == "exit":
            return
        index = order[1]
        try:
            with contextlib.suppress(FileNotFoundError):
                (folder.restart(index) / "error.txt").unlink()
            reason = _search(configuration, folder, index, link) if link.stop_reason is None else link.stop_reason
            if not folder.store(index).is_file():
                link.send("done", index, {"index": index, "finished": False, "reason": reason, "evaluations": 0})
                continue
            result = measure(configuration, folder, index, read(folder.store(index)), trusted=True)
            if not result["finished"]:
                result["reason"] = f"stopped: {reason}"
            write_atomically(folder.result(index), json.dumps(result, indent=1))
            link.send("done", index, result)
        except Exception as problem:
            full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or (isinstance(problem, ThalwegError) and "disk is full" in str(problem)):
                link.send("full", index, str(problem))
            else:
                if not isinstance(problem, ThalwegError):
                    with contextlib.suppress(ThalwegError):
                        write_atomically(folder.restart(index) / "error.txt", traceback.format_exc())
                name = "" if isinstance(problem, ThalwegError) else f"{type(problem).__name__}: "
                link.send("failed", index, f"{name}{problem}")


@dataclass
class _Worker:
    process: Any
    connection: Connection
    index: int | None = None


@contextlib.contextmanager
def _worker_environment(threads: int) -> Iterator[None]:
    """What workers inherit: few threads each unless the user has decided, and signals held back until they listen."""
    defaults = {"THALWEG_NUM_THREADS": str(threads), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    added = {key: value for key, value in defaults.items() if key not in os.environ}
    os.environ.update(added)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for key in added:
            os.environ.pop(key, None)


# ---- the campaign --------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a call of `run` ended: results by restart index, why it stopped early, if it did, and in words that restarts
    agree, so that the others were not needed."""

    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    stopped: str | None = None
    agreed: str | None = None
    failed: list[int] = field(default_factory=list)


class _Signals:
    """SIGINT and SIGTERM of the parent, as something to look at."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.kill = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.reason is not None and number == signal.SIGINT:
            self.kill = True
        self.reason = self.reason or ("Ctrl-C" if number == signal.SIGINT else "SIGTERM")


def run(
    folder: str | Path,
    *,
    indices: Sequence[int] | None = None,
    workers: int | None = None,
    max_seconds: float | None = None,
    watcher: Watcher | None = None,
) -> Outcome:
    """Runs (or continues) restarts of a prepared run folder in worker processes; finished ones are left alone.

    indices: which restarts; None means all that the configuration asks for. workers: processes at once; None means the
    configuration's, else as many as this process has cores. max_seconds: then all stop before their next evaluation.
    With `stop_when_agree`, and unless `indices` are given, no more restarts are begun and running ones stop as soon as
    that many restarts agree (`Agreement`).

    Raises ThalwegError when the disk is full, KeyboardInterrupt after a second Ctrl-C. A restart that fails, or whose
    worker dies, is in `failed`, its reason in `results`; the others go on.
    """
    from thalweg import _core

    began = time.monotonic()
    run_folder = RunFolder(Path(folder))
    configuration = run_folder.configuration()
    wanted = list(range(configuration.search.restarts)) if indices is None else list(indices)
    outcome = Outcome()
    pending: deque[int] = deque()
    for index in wanted:
        result = _load_result(run_folder.result(index))
        done = why_ended(configuration, result) if result is not None else None
        if result is not None and done is not None:
            outcome.results[index] = result | {"finished": True, "reason": done}
            if watcher is not None:
                watcher.done(index, outcome.results[index])
        else:
            pending.append(index)
    cores = int(_core.default_threads())
    count = max(1, min(workers or configuration.search.workers or cores, len(pending)))
    threads = max(1, cores // count)
    context = multiprocessing.get_context("spawn")
    active: list[_Worker] = []
    full: str | None = None
    agreement = Agreement(configuration)

    def has_ended(index: int) -> None:
        """Ends the campaign if this restart makes enough of them agree."""
        if agreement.wanted is None or indices is not None or outcome.agreed is not None:
            return
        if not _ended(outcome.results[index]):
            return
        store = run_folder.store(index)
        try:
            agreement.add(index, read(store) if store.is_file() else None)
        except StoreError:
            agreement.add(index, None)
        outcome.agreed = agreement.verdict
        if outcome.agreed is not None:
            pending.clear()
            for worker in active:
                with contextlib.suppress(OSError):
                    worker.connection.send(("stop", outcome.agreed))

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, str(run_folder.path)), daemon=False)
        with _worker_environment(threads):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def give(worker: _Worker) -> None:
        worker.index = pending.popleft() if pending and outcome.stopped is None else None
        with contextlib.suppress(OSError):
            worker.connection.send(("exit",) if worker.index is None else ("run", worker.index))

    def fail(index: int, reason: str) -> None:
        entry = _load_result(run_folder.result(index)) or {
            "index": index,
            "seed": configuration.search.seed + index,
            "evaluations": 0,
        }
        outcome.results[index] = entry | {"finished": False, "reason": f"failed: {reason}"}
        outcome.failed.append(index)
        write_atomically(run_folder.result(index), json.dumps(outcome.results[index], indent=1))
        if watcher is not None:
            watcher.done(index, outcome.results[index])
        has_ended(index)

    def stop(reason: str) -> None:
        outcome.stopped = reason
        pending.clear()
        for worker in active:
            with contextlib.suppress(OSError):
                worker.connection.send(("stop", reason))

    def receive(worker: _Worker) -> bool:
        """Handles what a worker says; False when it is gone."""
        nonlocal full
        while True:
            try:
                if not worker.connection.poll():
                    return True
                message = worker.connection.recv()
            except (EOFError, OSError):
                return False
            kind, index = message[0], message[1]
            if kind == "progress":
                if watcher is not None:
                    watcher.progress(*message[1:])
                continue
            worker.index = None
            if kind == "done":
                outcome.results[index] = message[2]
                if watcher is not None:
                    watcher.done(index, message[2])
                has_ended(index)
            elif kind == "failed":
                fail(index, message[2])
            elif kind == "full":
                full = message[2]
                stop("the disk is full")
            give(worker)

    for index in sorted(outcome.results):
        has_ended(index)
    try:
        with _Signals() as signals:
            while pending or active:
                while pending and len(active) < count:
                    worker = start()
                    active.append(worker)
                    give(worker)
                handles = [w.connection for w in active] + [w.process.sentinel for w in active]
                wait(handles, timeout=0.1)
                for worker in list(active):
                    alive = receive(worker)
                    if alive and worker.process.is_alive():
                        continue
                    worker.process.join(1.0)
                    if worker.process.is_alive():
                        continue
                    receive(worker)
                    active.remove(worker)
                    worker.connection.close()
                    if worker.index is not None:
                        code = worker.process.exitcode
                        why = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
                        fail(worker.index, f"its worker process died ({why})")
                if signals.kill:
                    raise KeyboardInterrupt
                if outcome.stopped is None:
                    if signals.reason is not None:
                        stop(signals.reason)
                    elif max_seconds is not None and time.monotonic() - began >= max_seconds:
                        stop(f"time limit of {max_seconds:g} s")
                if watcher is not None:
                    watcher.tick()
    finally:
        for worker in active:
            worker.connection.close()
            worker.process.kill()
            worker.process.join()
    if full is not None:
        raise ThalwegError(full)
    return outcome


# ---- summary -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """A run folder, read: its configuration, and per restart the history of its store and its summary entry."""

    folder: RunFolder
    configuration: Configuration
    histories: dict[int, History]
    restarts: list[dict[str, Any]]
    problems: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        energies = [entry["best_energy"] for entry in self.restarts if entry.get("best_energy") is not None]
        summary = {
            "best_energy": min(energies) if energies else None,
            "evaluations": sum(entry["evaluations"] or 0 for entry in self.restarts),
            "seconds": round(sum(entry.get("seconds") or 0.0 for entry in self.restarts), 3),
            "restarts": [{key: entry.get(key) for key in ENTRY} for entry in self.restarts],
        }
        if self.configuration.search.stop_when_agree is not None:
            agreement = Agreement(self.configuration)
            for entry in filter(_ended, self.restarts):
                agreement.add(entry["index"], self.histories.get(entry["index"]))
            summary["agreement"] = agreement.state
        return summary


ENTRY = (
    "index",
    "seed",
    "best_energy",
    "iterations",
    "evaluations",
    "seconds",
    "success_evaluation",
    "delivered_evaluation",
    "finished",
    "reason",
)


def load_results(folder: str | Path, *, indices: Sequence[int] | None = None) -> Results:
    """Reads the stores of a run folder (of restarts `indices` only, if given), also while restarts are running. A store
    that cannot be read is reported in `problems` and left out. Raises ConfigurationError if this is no run folder."""
    run_folder = RunFolder(Path(folder))
    configuration = run_folder.configuration()
    histories, entries, problems = {}, [], []
    for index in run_folder.restarts():
        if indices is not None and index not in indices:
            continue
        try:
            histories[index] = read(run_folder.store(index))
        except StoreError as problem:
            problems.append(f"restart {index}: {problem}")
            continue
        before = _load_result(run_folder.result(index))
        entry = measure(configuration, run_folder, index, histories[index])
        if entry != before:
            with contextlib.suppress(ThalwegError):  # a cache only: a folder that one may only read is fine
                write_atomically(run_folder.result(index), json.dumps(entry, indent=1))
        entries.append(entry)
    for path in sorted(run_folder.path.glob("restarts/*/result.json")):
        if path.parent.name.isdigit() and int(path.parent.name) not in histories:
            if indices is not None and int(path.parent.name) not in indices:
                continue
            lone = _load_result(path)
            if lone is not None and not (path.parent / "store.journal").exists():
                entries.append({"evaluations": 0, **lone, "index": int(path.parent.name)})
    entries.sort(key=lambda entry: entry["index"])
    return Results(run_folder, configuration, histories, entries, problems)


def summarise(folder: str | Path) -> Results:
    """Writes summary.json and best.extxyz from what the folder holds at this moment; returns what was read."""
    results = load_results(folder)
    write_atomically(results.folder.summary, json.dumps(results.summary, indent=2) + "\n")
    best = best_structures(results)
    write_atomically(results.folder.best, _extxyz(best))
    return results


def best_structures(results: Results) -> list[Any]:
    """ASE Atoms: the best evaluated structure of each restart, lowest first, with energy, forces and info."""
    return sorted(structures(results.histories, best=True), key=lambda atoms: atoms.get_potential_energy())


def histories(source: str | Path) -> dict[int, History]:
    """Histories by restart: of a run folder, or of one journal file (restart 0 then). Raises ThalwegError."""
    source = Path(source)
    if source.is_file():
        return {0: read(source)}
    return load_results(source).histories


def structures(histories: Mapping[int, History], *, best: bool = False, within: float | None = None) -> list[Any]:
    """ASE Atoms of the evaluations that did not fail, restart by restart in order, with energy, forces and info.

    best: only the lowest of each restart. within: only those at most so far above the lowest of all [eV].
    """
    rows = {index: np.flatnonzero(history.rows.ok) for index, history in histories.items() if len(history.rows)}
    energies = {index: histories[index].rows.columns["energy"][good] for index, good in rows.items() if len(good)}
    lowest = min((float(values.min()) for values in energies.values()), default=math.inf)
    out = []
    for index, values in energies.items():
        kept = np.array([np.argmin(values)]) if best else np.arange(len(values))
        if within is not None:
            kept = kept[values[kept] <= lowest + within]
        chosen = rows[index][kept]
        for row, atoms in zip(chosen, histories[index].rows.take(chosen).to_ase(), strict=True):
            atoms.info |= {"restart": index, "evaluation": int(row) + 1}
            out.append(atoms)
    return out


def export(structures: Sequence[Any], out: Path) -> None:
    """Writes ASE Atoms in the format that the name asks for, whole or not at all. Raises ThalwegError when that cannot
    be done."""
    import ase.db
    import ase.io

    if out.suffix in (".xyz", ".extxyz"):
        try:
            content = _extxyz(structures)
        except Exception as problem:
            raise ThalwegError(f"cannot write {out}: {type(problem).__name__}: {problem}") from problem
        write_atomically(out, content)
        return
    # ASE chooses the format by the ending, so the part that is not whole yet keeps it
    temporary = out.with_name(f".part-{os.getpid()}-{out.name}")
    try:
        if out.suffix == ".db":
            with ase.db.connect(temporary) as database:
                for atoms in structures:
                    database.write(atoms, key_value_pairs=_database_keys(atoms.info))
        else:
            ase.io.write(temporary, list(structures))
        os.replace(temporary, out)
    except OSError as problem:
        raise _disk_error(out, problem) from problem
    except ase.io.formats.UnknownFileTypeError:
        raise ThalwegError(f"cannot write {out}: ASE has no format '{out.suffix}'; use .extxyz, .db or .traj") from None
    except Exception as problem:
        raise ThalwegError(f"cannot write {out}: {problem}") from problem
    finally:
        for left in (temporary, temporary.with_name(temporary.name + ".lock")):
            with contextlib.suppress(OSError):
                left.unlink()


def _database_keys(info: Mapping[str, Any]) -> dict[str, Any]:
    """What ASE's databases take as key-value pairs: numbers and texts under names that they do not use themselves."""
    from ase.db.core import check

    kept = {}
    for key, value in info.items():
        with contextlib.suppress(ValueError, TypeError):
            check({key: value})
            kept[key] = value
    return kept
