"""Any ASE calculator in worker processes of its own: timeouts, retries, scratch folders, several evaluations at once.

    search process                        worker process (a session and process group of its own)
    Guarded ── task: folder, structure ──► makes the calculator, works in the folder ──► pw.x, mpirun, srun ...
            ◄── energy, forces or reason ──
            ── lifeline (a pipe) ────────► watchdog: when the pipe closes, ends the whole group

A worker is a new Python interpreter, never a fork of the search. Whatever happens in it (a crash, `os._exit`, the
out-of-memory killer, a calculation that hangs) ends as a failed evaluation with a reason; the next one gets a new worker.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import spawn
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes

from thalweg.errors import CalculationFailed, ConfigurationError, ThalwegError

if TYPE_CHECKING:
    from thalweg.records import Measured

__all__ = ["Guarded"]

# Seconds that a new interpreter may take until it has imported what it needs (network file systems are slow).
STARTUP = 300.0
# Seconds between SIGTERM, which mpirun and srun pass on to their tasks, and SIGKILL.
GRACE = 3.0
LOG = "calculation.log"

_importing_main = False


class Guarded(Calculator):
    """An ASE calculator that runs another one in worker processes.

    Each evaluation has a new calculator and a new, empty working folder, so that its numbers do not depend on what the
    worker did before. A factory that is slow to make its calculator may keep it in its module (`functools.cache`).

    Parameters
    ----------
    make : str or callable
        A name for `thalweg.calculators.make_calculator` ("espresso", "module:factory"), or a picklable callable that
        returns an ASE calculator.
    arguments : mapping, optional
        Keyword arguments for it.
    workers : int
        Evaluations at once, in `calculate_many`.
    timeout : float, optional
        Seconds for one attempt. Then the worker's whole process group gets SIGTERM and, three seconds later, SIGKILL.
    retries : int
        Further attempts after a failed one, each in a new process.
    scratch : path, optional
        Where the working folders are made; made itself if it is not there. Default: the system's temporary folder.
    environment : mapping of str to str, optional
        Added to the environment of the workers, for example {"OMP_NUM_THREADS": "1"}.
    keep_failed : bool
        Whether the working folder of a failed attempt stays; the reason then names it. `calculation.log` in it has what
        the calculation printed.

    Raises
    ------
    ConfigurationError
        For settings that make no sense, a factory that cannot be pickled, or (in `check`) a calculator that cannot be
        made.
    """

    implemented_properties = ["energy", "forces", "free_energy"]  # noqa: RUF012
    nolabel = True

    def __init__(
        self,
        make: str | Callable[..., Any],
        arguments: Mapping[str, Any] | None = None,
        *,
        workers: int = 1,
        timeout: float | None = None,
        retries: int = 0,
        scratch: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
        keep_failed: bool = False,
    ):
        super().__init__()
        if not hasattr(os, "killpg"):
            raise ConfigurationError("Guarded needs process groups (Linux, macOS); use the calculator without it")
        if not isinstance(make, str) and not callable(make):
            raise ConfigurationError(
                f"make must be a calculator's name, 'module:factory' or a callable that returns one, but it is {make!r}"
                + ("; pass its class and arguments instead" if hasattr(make, "implemented_properties") else "")
            )
        _check_whole("workers", workers, 1)
        _check_whole("retries", retries, 0)
        if timeout is not None and not (_is_number(timeout) and timeout > 0):
            raise ConfigurationError(f"timeout must be a positive number of seconds or None, but it is {timeout!r}")
        for name, value in (environment or {}).items():
            if not isinstance(name, str) or not isinstance(value, str):
                raise ConfigurationError(f"environment must map text to text, but it has {name!r}: {value!r}")
        self.make, self.arguments = make, dict(arguments or {})
        self.workers, self.timeout, self.retries = int(workers), timeout, int(retries)
        self.scratch = None if scratch is None else Path(scratch).absolute()
        self.environment, self.keep_failed = dict(environment or {}), bool(keep_failed)
        try:
            self._payload = pickle.dumps((self.make, self.arguments))
        except Exception as problem:
            raise ConfigurationError(
                "the factory and its arguments go to other processes and must be picklable; define the factory in a "
                f"module, not as a lambda or inside a function ({problem})"
            ) from problem
        self._open()

    def _open(self) -> None:
        self._owner = os.getpid()
        self._pool: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _close, self._pool, self._owner)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_pool", "_finalizer", "_owner")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def describe(self) -> Any:
        """What decides its numbers, as plain text: not how many workers there are, nor how long they may take."""
        from thalweg.search import describe

        name = self.make if isinstance(self.make, str) else describe(self.make)
        return {"Guarded": {"make": name, "arguments": describe(self.arguments)}}

    # ---- an ASE calculator -------------------------------------------------------------------------
    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        """One evaluation. Raises CalculationFailed with the reason."""
        super().calculate(atoms, properties, system_changes)
        for _, (energy, forces, reason), _ in self.as_completed([self.atoms]):
            if reason:
                raise CalculationFailed(reason)
            self.results = {"energy": energy, "free_energy": energy, "forces": forces}

    # ---- several at once ---------------------------------------------------------------------------
    def calculate_many(self, batch: Any) -> list[Measured]:
        """Energy [eV], forces (n, 3) [eV/angstrom] and reason of failure ("" if none) of each structure of a Batch (or
        list of Atoms), in its order, `workers` at a time; never raises for a calculation that fails."""
        structures = [batch[i] for i in range(len(batch))]
        found: dict[int, Measured] = {index: measured for index, measured, _ in self.as_completed(structures)}
        return [found[index] for index in range(len(structures))]

    def as_completed(self, structures: Iterable[Any]) -> Iterator[tuple[int, Measured, float]]:
        """(index, what `calculate_many` gives for it, seconds) as they finish.

        A structure is taken from `structures` only when a worker is free for it; a caller that takes no more from here
        ends what is still running.
        """
        source = enumerate(structures)
        again: deque[_Task] = deque()
        running: dict[_Worker, _Task] = {}
        more = True
        try:
            while True:
                while len(running) < self.workers and (more or again):
                    task = again.popleft() if again else _next_task(source)
                    if task is None:
                        more = False
                        break
                    worker = self._idle(running)
                    running[worker] = task
                    self._begin(worker, task)
                if not running:
                    return
                for worker, outcome in self._finished(running):
                    task = running.pop(worker)
                    reason = outcome if isinstance(outcome, str) else ""
                    folder = self._tidy(task, failed=bool(reason))
                    if reason:
                        self._end(worker)
                        task.attempts += 1
                        if task.attempts <= self.retries:
                            again.append(task)
                            continue
                        reason += f" ({task.attempts} attempts)" if self.retries else ""
                        reason += f" (files in {folder})" if folder else ""
                    energy, forces = (
                        (math.nan, np.full((len(task.atoms), 3), math.nan)) if isinstance(outcome, str) else outcome
                    )
                    yield task.index, (energy, forces, reason), time.perf_counter() - task.begin
        finally:
            for worker, task in running.items():
                self._end(worker)
                self._tidy(task, failed=False)

    def check(self) -> None:
        """Makes the calculator once, in a worker. Raises ConfigurationError if that fails."""
        task = _Task(-1, None)
        worker = self._idle({})
        self._begin(worker, task)
        ready = list(self._finished({worker: task}))
        self._tidy(task, failed=False)
        if isinstance(ready[0][1], str):
            self._end(worker)
            raise ConfigurationError(ready[0][1].removeprefix("ConfigurationError: "))

    def close(self) -> None:
        """Ends the workers; the next evaluation starts new ones."""
        _close(self._pool, self._owner)

    # ------------------------------------------------------------------------------------------------
    def _idle(self, running: Mapping[_Worker, _Task]) -> _Worker:
        """A worker with nothing to do, started if there is none."""
        if self._owner != os.getpid():  # a fork of the process that made it: its workers are not ours
            self._open()
        for worker in [worker for worker in self._pool if worker not in running]:
            if worker.process.poll() is None:
                return worker
            self._end(worker)
        worker = _Worker.start(self._payload, self.environment)
        self._pool.append(worker)
        return worker

    def _begin(self, worker: _Worker, task: _Task) -> None:
        try:
            if self.scratch is not None:
                self.scratch.mkdir(parents=True, exist_ok=True)
            task.folder = Path(tempfile.mkdtemp(prefix="thalweg-", dir=self.scratch))
        except OSError as problem:
            raise ThalwegError(f"cannot make a scratch folder in {self.scratch}: {problem.strerror}") from problem
        task.begin = time.perf_counter()
        worker.overdue = time.monotonic() + (self._limit if worker.ready else STARTUP)
        # a broken pipe shows again as the end of the connection, with the worker's exit status
        with contextlib.suppress(OSError):
            worker.connection.send((str(task.folder), task.atoms))

    @property
    def _limit(self) -> float:
        return math.inf if self.timeout is None else float(self.timeout)

    def _finished(self, running: Mapping[_Worker, _Task]) -> Iterator[tuple[_Worker, Any]]:
        """Waits until at least one task has ended: (worker, (energy, forces) or the reason of its failure)."""
        ended = False
        while not ended:
            left = min(worker.overdue for worker in running) - time.monotonic()
            connections = {worker.connection: worker for worker in running}
            ready = wait(list(connections), None if left == math.inf else max(0.0, left))
            for connection in ready:
                worker = connections[connection]  # type: ignore[index]
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    ended = True
                    yield worker, worker.why_it_died()
                    continue
                if message == "ready":
                    worker.ready, worker.overdue = True, time.monotonic() + self._limit
                    continue
                ended = True
                yield worker, message
            for worker in list(running):
                if worker.connection not in ready and time.monotonic() >= worker.overdue:
                    ended = True
                    yield (
                        worker,
                        f"it took longer than the timeout of {self.timeout:g} s and was ended"
                        if worker.ready
                        else f"the worker process was not ready after {STARTUP:g} s",
                    )

    def _end(self, worker: _Worker) -> None:
        worker.end(GRACE)
        with contextlib.suppress(ValueError):
            self._pool.remove(worker)

    def _tidy(self, task: _Task, *, failed: bool) -> Path | None:
        """Removes the working folder, or returns it if it stays."""
        folder, task.folder = task.folder, None
        if folder is None or (failed and self.keep_failed):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        return None


# ---- the search's side of a worker ---------------------------------------------------------------------------


@dataclass(eq=False)
class _Task:
    """One evaluation; `atoms` None: only make the calculator."""

    index: int
    atoms: Any
    attempts: int = 0
    folder: Path | None = None
    begin: float = 0.0


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    lifeline: int
    ready: bool = False
    overdue: float = field(default=math.inf)

    @classmethod
    def start(cls, payload: bytes, environment: Mapping[str, str]) -> _Worker:
        if _importing_main:
            raise ThalwegError(
                "a worker process imports the script to find the factory in it, and the script starts to search: put "
                "what it does under `if __name__ == '__main__':`, or the factory into a module"
            )
        # multiprocessing knows how another interpreter finds what is defined in the main script
        main = spawn.get_preparation_data("thalweg worker") if b"__main__" in payload else {}
        main = {name: value for name, value in main.items() if name.startswith("init_main")}
        paths = [os.path.abspath(path) for path in sys.path]
        ours, theirs = Pipe()
        theirs_lifeline, lifeline = os.pipe()
        command = (
            f"import sys; sys.path[:] = {paths!r}; from thalweg.pool import _serve; "
            f"_serve({theirs.fileno()}, {theirs_lifeline})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", command],
            pass_fds=(theirs.fileno(), theirs_lifeline),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        os.close(theirs_lifeline)
        worker = cls(process, ours, lifeline)
        with contextlib.suppress(OSError):
            ours.send((main, payload))
        return worker

    def why_it_died(self) -> str:
        try:
            status = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "the worker process closed its connection"
        if status >= 0:
            return f"the worker process ended with exit status {status}"
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = "unknown"
        hint = "; out of memory?" if -status == signal.SIGKILL else ""
        return f"the worker process was ended by signal {-status} ({name}{hint})"

    def end(self, grace: float) -> None:
        """Ends it and everything it has started; returns when that is so."""
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, GRACE)):
            if seconds <= 0 or not _group_lives(self.process.pid):
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            last = time.monotonic() + seconds
            while time.monotonic() < last and (self.process.poll() is None or _group_lives(self.process.pid)):
                time.sleep(0.01)
        self.connection.close()
        with contextlib.suppress(OSError):
            os.close(self.lifeline)
        self.lifeline = -1


def _group_lives(group: int) -> bool:
    """Whether a process group has members, not counting dead ones that nobody has waited for (containers without an init
    process keep those)."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    processes = [entry for entry in Path("/proc").glob("[0-9]*/stat")] if Path("/proc/self/stat").exists() else []
    if not processes:
        return True
    for entry in processes:
        with contextlib.suppress(OSError, ValueError):
            # pid (name, which may hold anything) state parent group ...
            state, _, its_group = entry.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


def _close(pool: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return
    while pool:
        pool.pop().end(0.0)  # idle: nothing runs that could need a warning


def _next_task(source: Iterator[tuple[int, Any]]) -> _Task | None:
    for index, structure in source:
        atoms = structure.to_ase()[0] if hasattr(structure, "to_ase") else structure.copy()
        atoms.calc = None
        atoms.set_constraint()
        return _Task(index, atoms)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, but it is {value!r}")


# ---- the worker ----------------------------------------------------------------------------------------------


def _serve(connection_number: int, lifeline: int) -> None:
    """The main program of a worker."""
    for number in (connection_number, lifeline):
        os.set_inheritable(number, False)  # or an orphan of a calculation would keep them open
    _start_watchdog(connection_number, lifeline)
    connection = Connection(connection_number)
    try:
        main, payload = connection.recv()
    except EOFError:
        return
    factory = _factory(main, payload)
    connection.send("ready")
    while True:
        try:
            folder, atoms = connection.recv()
        except EOFError:
            return
        os.chdir(folder)
        _print_to(os.path.join(folder, LOG))
        answer = _calculate(factory, atoms)
        os.chdir("/")
        _print_to(os.devnull)
        connection.send(answer)


def _start_watchdog(connection: int, lifeline: int) -> None:
    """A small process that sees the search die even while the worker is busy or hangs, and ends the whole group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads: the child only makes system calls
        if os.fork():
            os.close(lifeline)
            return
    try:
        os.close(connection)
        os.read(lifeline, 1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)
    finally:
        os._exit(0)


def _factory(main: dict[str, Any], payload: bytes) -> Callable[[], Any]:
    """Makes the calculator; whatever is wrong with it is raised then, when there is somebody to tell."""
    global _importing_main
    try:
        if main:
            _importing_main = True
            spawn.prepare(main)
        make, arguments = pickle.loads(payload)
    except Exception as problem:
        trouble = problem

        def fail() -> Any:
            raise ConfigurationError(f"a worker process cannot load the calculator's factory: {trouble}")

        return fail
    finally:
        _importing_main = False

    def build() -> Any:
        from thalweg.calculators import make_calculator

        calculator = make_calculator(make, **arguments) if isinstance(make, str) else make(**arguments)
        if inspect.isclass(calculator) or not hasattr(calculator, "get_potential_energy"):
            raise ConfigurationError(f"{make!r} must return an ASE calculator, but it returned {calculator!r}")
        return calculator

    return build


def _calculate(factory: Callable[[], Any], atoms: Any) -> tuple[float, np.ndarray] | str:
    try:
        calculator = factory()
        if atoms is None:
            return 0.0, np.zeros((0, 3))
        atoms.calc = calculator
        energy = float(atoms.get_potential_energy())
        forces = np.array(atoms.get_forces(), float)
        if not math.isfinite(energy):
            raise CalculationFailed(f"the energy is {energy}")
        if forces.shape != (len(atoms), 3) or not np.isfinite(forces).all():
            raise CalculationFailed("the forces are not finite")
    except BaseException as problem:  # sys.exit() of a calculator too
        import traceback

        traceback.print_exc()
        return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
    return energy, forces


def _print_to(path: str) -> None:
    """Standard output and error of this process and those it starts go to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)
