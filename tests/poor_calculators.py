"""Calculators that misbehave, and factories that worker processes can import."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from ase.calculators.calculator import FileIOCalculator, all_changes
from toys import PairToy


def toy(**settings) -> PairToy:
    return PairToy(**settings)


class Poor(PairToy):
    """A PairToy that does `how` first, in its first `times` attempts (counted by files in `folder`; -1: always)."""

    def __init__(self, how: str, folder: str, times: int = -1):
        super().__init__()
        self.how, self.folder, self.times = how, Path(folder), times

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        attempt = self._claim()
        (self.folder / f"attempt-{attempt}-{os.getpid()}").touch()
        if self.times < 0 or attempt < self.times:
            getattr(self, self.how)()
        super().calculate(atoms, properties, system_changes)

    def _claim(self) -> int:
        """The number of this attempt: two workers that begin at once get different ones."""
        attempt = 0
        while True:
            try:
                os.close(os.open(self.folder / f"claimed-{attempt}", os.O_CREAT | os.O_EXCL))
                return attempt
            except FileExistsError:
                attempt += 1

    def hang(self):
        child = subprocess.Popen(["sleep", "1000"])
        (self.folder / "child").write_text(str(child.pid))
        time.sleep(1000)

    def segfault(self):
        os.kill(os.getpid(), signal.SIGSEGV)

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self):
        os._exit(3)

    def complain(self):
        print("it does not converge")
        Path("density.dat").write_text("0")
        raise RuntimeError("did not converge\nafter 100 steps")

    def write(self):
        Path("density.dat").write_text("0")
        (self.folder / "where").write_text(os.getcwd())


def poor(how: str, folder: str, times: int = -1) -> Poor:
    return Poor(how, folder, times)


def uneven() -> PairToy:
    """The later it is asked, the faster it answers, about: structures finish in another order than they begin."""

    class Uneven(PairToy):
        def calculate(self, atoms=None, *arguments, **options):
            time.sleep(0.001 + 0.1 * abs(np.sin(1e3 * atoms.positions[0, 0])))
            super().calculate(atoms, *arguments, **options)

    return Uneven()


def no_calculator():
    return 3


# A program with files: reads structure.txt, writes energy and forces of a harmonic well to result.txt.
PROGRAM = """
import os, sys, numpy as np
tasks = os.environ.get("FAKE_TASKS", "none")
x = np.loadtxt("structure.txt", ndmin=2)
np.savetxt("result.txt", np.vstack([np.full(3, 0.5 * (x**2).sum()), -x]), fmt="%.17g", header=tasks)
"""


class WithFiles(FileIOCalculator):
    """An ASE calculator around an external program, the old way (`command`)."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012
    discard_results_on_any_change = True

    def __init__(self, command: str):
        super().__init__(command=command)

    def write_input(self, atoms, properties=None, system_changes=None):
        super().write_input(atoms, properties, system_changes)
        np.savetxt(Path(self.directory) / "structure.txt", atoms.positions, fmt="%.17g")

    def read_results(self):
        path = Path(self.directory) / "result.txt"
        values = np.loadtxt(path)
        self.results = {"energy": float(values[0, 0]), "forces": values[1:]}


def with_files(program: str, launcher: str) -> WithFiles:
    return WithFiles(f"{launcher} {shlex.quote(sys.executable)} {shlex.quote(program)}".strip())
