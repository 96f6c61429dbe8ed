"""Benchmarks: our own figures, and the same work done by AGOX in the same run.

`thalweg bench kernels` and `thalweg bench search` print them. One thread, processor time, medians; with a peer the two
sides take turns, on the same structures and settings, and values are compared before anything is timed. AGOX lives in
an environment of its own and is spoken to through `benchmarks/against_agox.py`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from thalweg import _core
from thalweg.errors import ConfigurationError, ThalwegError

__all__ = ["Peer", "kernels", "prepare_agox", "search"]

Array = np.ndarray

# AGOX 3.11.1 fails at import or in training with newer ones of these.
AGOX_REQUIREMENTS = ("agox==3.11.1", "ase==3.27.0", "numpy<2.4")
ONE_THREAD = {
    name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "THALWEG_NUM_THREADS")
}
# Au4Ni4, ASE's EMT(), 12 angstrom cell; putative, from long basin hopping. A second homotop lies 4 meV higher.
MINIMUM, TOLERANCE = 7.8049, 0.001
# (long, short) lengths and noise of AGOX's defaults; amplitude and lengths as a fit to EMT clusters gives them
KERNEL = {"amplitude": 5000.0, "length_long": 20.0, "length_short": 5.0, "noise": 0.01}
ROUNDS = 5
PYPI_PEERS = ("dscribe", "featomic", "qmllib", "vesin")  # each installed beside thalweg by its own name


# ---- AGOX ------------------------------------------------------------------------------------------------------


def _script() -> Path:
    """AGOX's side, in an installed package or beside the sources."""
    here = Path(__file__).resolve()
    for path in (here.parent / "benchmarks" / "against_agox.py", here.parents[2] / "benchmarks" / "against_agox.py"):
        if path.is_file():
            return path
    raise ThalwegError("benchmarks/against_agox.py is not there; install thalweg again, or run from its sources")


def prepare_agox(python: str | Path | None = None) -> Path:
    """The interpreter of AGOX's environment, which is made (pip, about 1 GB) when it is not there.

    python : interpreter that has AGOX already; default: ~/.cache/thalweg/agox-venv.
    Raises ThalwegError if it cannot be made, ConfigurationError if `python` is no interpreter.
    """
    if python is not None:
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise ConfigurationError(f"--agox-python '{python}': no interpreter is there; give the path of a python")
        return Path(python)
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "thalweg" / "agox-venv"
    interpreter, ready = folder / "bin" / "python", folder / "thalweg-ready"
    if ready.is_file():
        return interpreter
    print(f"making AGOX's environment in {folder} (once; about 1 GB and a few minutes)", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for title, command in (
        ("python -m venv", [sys.executable, "-m", "venv", "--clear", str(folder)]),
        (
            f"pip install {' '.join(AGOX_REQUIREMENTS)}",
            [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", *AGOX_REQUIREMENTS],
        ),
    ):
        print(f"  {title} ...", file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr or done.stdout).strip().splitlines()[-8:]
            raise ThalwegError(
                f"'{title}' failed in {folder}; AGOX needs a C compiler and the network. Its last lines:\n"
                + "\n".join(last)
                + "\nOr give --agox-python PATH, an interpreter that has AGOX."
            )
    ready.write_text(" ".join(AGOX_REQUIREMENTS) + "\n")
    return interpreter


class Peer:
    """AGOX in a process of its own: one JSON line asked, one answered."""

    def __init__(self, python: Path, *, nice: int = 0):
        self._log = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 closed by close()
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ONE_THREAD
        command = [*(["nice", "-n", str(nice)] if nice else []), str(python), str(_script())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.versions = self.ask("hello")

    def ask(self, work: str, **request: Any) -> dict[str, Any]:
        """The answer of AGOX's side. Raises ThalwegError with its last words if there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"work": work, **request}, default=_plain) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            self._log.seek(0)
            last = "\n".join(self._log.read().strip().splitlines()[-12:])
            raise ThalwegError(f"AGOX's side failed at '{work}': {answer['error']}. Its last lines:\n{last}")
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))


# ---- rows ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table; ratio: how many times faster than the peer."""

    name: str
    ours: float
    unit: str
    theirs: float | None = None
    ratio: float | None = None
    target: float | None = None
    verdict: str = ""
    note: str = ""


@dataclass
class Table:
    """Rows are printed as they come."""

    peer: str = ""
    filter: str = ""
    rows: list[Row] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)

    def wants(self, name: str) -> bool:
        return self.filter.lower() in name.lower()

    def header(self) -> None:
        theirs = f"{self.peer:>12s} {'ratio':>8s}" if self.peer else ""
        print(f"{'':60s} {'thalweg':>12s} {theirs} {'':14s}", flush=True)

    def check(self, name: str, difference: float, tolerance: float) -> None:
        """Values of both sides, before they are timed."""
        agrees = bool(difference <= tolerance)
        self.checks.append({"name": name, "difference": difference, "tolerance": tolerance, "agrees": agrees})
        verdict = "agree" if agrees else "DIFFER"
        print(f"  values {verdict}: {name}: {difference:.1e} (tolerance {tolerance:.0e})", flush=True)

    def add(
        self, name: str, ours: float, unit: str, theirs: float | None = None, *, more: bool = False,
        target: float | None = None, note: str = "",
    ) -> None:  # fmt: skip
        """more: a rate. target: with a peer the least ratio, without one the limit of our own figure."""
        row = Row(name, ours, unit, theirs, target=target, note=note)
        if theirs is not None:
            row.ratio = ours / theirs if more else theirs / ours
            if target is not None:
                met = row.ratio >= target
                row.verdict = f"at least {target:.0f} x: {'met' if met else 'MISSED'}"
        elif target is not None:
            met = ours >= target if more else ours <= target
            row.verdict = f"{'at least' if more else 'at most'} {target:,.0f}: {'met' if met else 'MISSED'}"
        self.rows.append(row)
        middle = ""
        if self.peer:
            middle = f"{theirs:12,.3f} {row.ratio:8,.0f}" if theirs is not None else f"{'':12s} {'':8s}"
        print(f"{name:60s} {ours:12,.3f} {middle} {unit:14s} {row.verdict:24s} {note}".rstrip(), flush=True)

    def as_json(self, **more: Any) -> dict[str, Any]:
        return {**more, "rows": [vars(row) for row in self.rows], "checks": self.checks}


def cpu_seconds(call: Callable[[], Any], least: float = 0.05) -> float:
    """Processor seconds per call, of as many calls as fit into `least` seconds."""
    calls, begin = 0, time.process_time()
    while calls == 0 or time.process_time() - begin < least:
        call()
        calls += 1
    return (time.process_time() - begin) / calls


def _turns(ours: Callable[[], float], theirs: Callable[[], float] | None, rounds: int) -> tuple[float, float | None]:
    """Medians of both sides, which take turns."""
    if theirs is None:
        return statistics.median(ours() for _ in range(rounds)), None
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


# ---- structures that both sides get ----------------------------------------------------------------------------


def _cluster_problem() -> Any:
    from thalweg.records import Problem

    return Problem("Au4Ni4", cell=12.0, box=6.0)


def _large_cluster_problem() -> Any:
    from thalweg.records import Problem

    return Problem("Au12Ni12", cell=14.0, box=8.0)


def _slab_problem() -> Any:
    """Six nickel atoms on Au(111), 5 x 4 x 3 atoms, orthogonal cell (in a skewed one AGOX misses periodic images)."""
    from ase.build import fcc111

    from thalweg.records import Problem

    slab = fcc111("Au", (5, 4, 3), a=4.08, orthogonal=True)
    slab.positions[:, 2] += 5.0 - slab.positions[:, 2].min()
    slab.cell[2] = [0.0, 0.0, 25.0]
    slab.pbc = [True, True, False]
    vectors = np.array(slab.cell)
    vectors[2] = [0.0, 0.0, 5.0]
    corner = [0.0, 0.0, slab.positions[:, 2].max() + 1.0]
    return Problem("Ni6", template=slab, box=(corner, vectors))


def _aniline() -> Any:
    """C6H7N: benzene with one hydrogen replaced by an amine."""
    from ase import Atoms
    from ase.build import molecule

    from thalweg.records import Batch

    atoms = molecule("C6H6")
    direction = atoms.positions[6] / np.linalg.norm(atoms.positions[6])
    side = np.cross(direction, [0.0, 0.0, 1.0])
    atoms.numbers[6], atoms.positions[6] = 7, 2.8 * direction
    atoms += Atoms("H2", [atoms.positions[6] + 0.5 * direction + sign * 0.85 * side for sign in (-1, 1)])
    atoms.positions += np.random.default_rng(1).normal(0.0, 0.05, atoms.positions.shape)
    atoms.cell = [14.0, 13.0, 10.0]
    atoms.center()
    return Batch.from_ase(atoms)


def _random(problem: Any, count: int, seed: int = 1) -> Any:
    """Random structures of a problem."""
    template = problem.template
    found = _core.random_structures(
        problem.placed_numbers, problem.cell, problem.pbc,
        np.zeros((0, 3)) if template is None else template.positions,
        np.zeros(0, np.int32) if template is None else template.numbers,
        box=problem.box_arguments, count=count + 20, key=(seed, 2), threads=1,
    )  # fmt: skip
    return problem.batch(found[0][found[1]][:count])


def _as_request(batch: Any, energies: Array | None = None) -> dict[str, Any]:
    n = len(batch)
    request = {
        "numbers": batch.numbers[: batch.offsets[1]],
        "positions": batch.positions.reshape(n, -1, 3),
        "cell": batch.cells[0],
        "pbc": batch.pbc[0],
    }
    return request | ({} if energies is None else {"energies": energies})


def _problem_request(problem: Any) -> dict[str, Any]:
    template = problem.template
    return {
        "symbols": problem.symbols,
        "cell": problem.cell,
        "pbc": problem.pbc,
        "template_numbers": [] if template is None else template.numbers,
        "template_positions": [] if template is None else template.positions,
        "box_corner": problem.box_corner,
        "box_vectors": problem.box_vectors,
        "box_open": problem.box_open,
    }


class _Shifting:
    """Copies of a batch moved by less than 1e-6 angstrom, in turn: nothing is answered from a cache."""

    def __init__(self, batch: Any):
        rng = np.random.default_rng(3)
        self._copies = [
            batch.bare().with_positions(batch.positions + rng.uniform(-1e-6, 1e-6, batch.positions.shape))
            for _ in range(8)
        ]
        self._turn = 0

    def __call__(self) -> Any:
        self._turn += 1
        return self._copies[self._turn % len(self._copies)]


# ---- what is timed ---------------------------------------------------------------------------------------------


def _fingerprints(table: Table, peer: Peer | None) -> None:
    from thalweg.descriptors import Fingerprint

    descriptor = Fingerprint(convention="agox")
    for label, batch in (("C6H7N", _aniline()), ("66-atom slab", _random(_slab_problem(), 1))):
        bound = descriptor._bind_to(batch)
        shifted = _Shifting(batch)
        structures = _as_request(batch)
        weights = np.random.default_rng(0).normal(size=(1, bound.size))
        names = [f"fingerprint values, {label}", f"fingerprint Jacobian, {label}"]
        name = f"fingerprint contracted forces, {label} (AGOX: its Jacobian)"
        calls: list[Callable[[], Any]] = [
            lambda: bound.values(shifted(), 1),  # noqa: B023 used within the loop
            lambda: bound.jacobian(shifted(), 1),  # noqa: B023
        ]
        for gradient in (0, 1):
            if not (table.wants(names[gradient]) or (gradient and table.wants(name))):
                continue
            theirs = None
            if peer is not None:
                request = {"structures": structures, "gradient": bool(gradient), "name": label}
                answer = np.array(peer.ask("fingerprint", seconds=0.0, **request)["values"])
                ours = (bound.jacobian(batch, 1) if gradient else bound.values(batch, 1)).ravel()
                difference = float(np.abs(answer - ours).max() / np.abs(ours).max())
                # AGOX's gradient is not the derivative of its values; ours is (tests/test_descriptors.py).
                tolerance = 2e-3 if gradient else 1e-10
                table.check(f"{names[gradient]}, of the largest", difference, tolerance)

                def theirs(request=request):
                    return peer.ask("fingerprint", seconds=0.1, **request)["seconds"]

            ours_median, theirs_median = _turns(partial(cpu_seconds, calls[gradient]), theirs, ROUNDS)
            _milli(table, names[gradient], ours_median, theirs_median)
            if gradient:
                contracted = _turns(
                    lambda: cpu_seconds(lambda: bound.contract(shifted(), weights, 1)),  # noqa: B023
                    None,
                    ROUNDS,
                )[0]
                _milli(table, name, contracted, theirs_median)


def _crystals() -> list[tuple[str, Any]]:
    """(label, ASE Atoms): C6H7N, rutile, an oxidised Ag(111) slab and B2 NiAl, rattled."""
    from ase import Atoms
    from ase.build import bulk, fcc111
    from ase.spacegroup import crystal

    rutile = crystal(
        ["Ti", "O"], [(0, 0, 0), (0.305, 0.305, 0)], spacegroup=136, cellpar=[4.594, 4.594, 2.959, 90, 90, 90]
    )
    slab = fcc111("Ag", (4, 4, 3), a=4.09, vacuum=8.0)
    top = slab.positions[-16:]
    for symbol, places, shift in (("Ag", top[:12:2], [0, 0, 4.4]), ("O", top[:12], [0.8, 0.6, 2.0])):
        slab += Atoms(symbol * len(places), places + shift)
    slab.pbc = [True, True, False]
    found = [
        ("C6H7N", _aniline().to_ase()[0]),
        ("Ti8O16", rutile * (2, 1, 2)),
        ("66-atom slab", slab),
        ("200-atom NiAl", bulk("NiAl", "cesiumchloride", a=2.88) * (5, 5, 4)),
    ]
    for _, atoms in found:
        atoms.positions += np.random.default_rng(1).normal(0.0, 0.03, atoms.positions.shape)
    return found


def _descriptor_calls(bound: Any, batch: Any) -> list[Callable[[], Any]]:
    """Values, contraction and Jacobian of a compiled descriptor, of a structure that moves a little each time."""
    shifted, weights = _Shifting(batch), np.random.default_rng(0).normal(size=(len(batch.numbers), bound.size))
    return [
        lambda: bound.values(shifted(), 1),
        lambda: bound.contract(shifted(), weights, 1),
        lambda: bound.jacobian(shifted(), 1),
    ]


def _soaps(table: Table, against: str | None) -> None:
    """r_cut 7 angstrom, n_max 3, l_max 2, sigma 0.5 angstrom. dscribe's derivatives: analytic for molecules, for periodic
    structures numerical, all it has. featomic has another radial basis, so its values are not compared, and no slabs."""
    from thalweg.descriptors import SOAP
    from thalweg.records import Batch

    for label, atoms in _crystals():
        names = [f"SOAP {what}, {label}" for what in ("values", "values and forces", "Jacobian")]
        if not any(table.wants(name) for name in names):
            continue
        batch = Batch.from_ase(atoms)
        bound = SOAP(7.0, 3, 2, 0.5, cutoff="hard").bind(batch.numbers)
        values, calls = bound.values(batch, 1), _descriptor_calls(bound, batch)
        theirs: list[Callable[[], float] | None] = [None] * 3
        if against == "featomic":
            if len(set(atoms.pbc)) > 1:
                continue
            compute = _featomic().compute
            slopes = partial(cpu_seconds, partial(compute, atoms, gradients=["positions"]))
            theirs = [partial(cpu_seconds, partial(compute, atoms)), slopes, slopes]
        if against == "dscribe":
            from dscribe.descriptors import SOAP as Theirs

            periodic = bool(atoms.pbc.any())
            peer = Theirs(species=sorted(set(atoms.numbers)), r_cut=7.0, n_max=3, l_max=2, sigma=0.5, periodic=periodic)
            method = "numerical" if periodic else "analytical"
            difference = float(np.abs(peer.create(atoms) - values).max() / np.abs(values).max())
            table.check(f"{names[0]}, of the largest", difference, 1e-8)
            derivative = [lambda: peer.derivatives(atoms, method=method, attach=True)] * 2  # noqa: B023
            theirs = [partial(cpu_seconds, call) for call in (lambda: peer.create(atoms), *derivative)]  # noqa: B023
        for k, name in enumerate(names):
            if not table.wants(name):
                continue
            # A numerical derivative of 200 atoms takes most of a minute.
            rounds = 1 if against == "dscribe" and k and len(atoms) > 24 else ROUNDS
            ours, peers = _turns(partial(cpu_seconds, calls[k]), theirs[k], rounds)
            target = {
                "dscribe": (1, 40 if atoms.pbc.any() else None, None), "featomic": (None, 5, None)
            }.get(against or "", (None,) * 3)[k]  # fmt: skip
            _milli(table, name, ours, peers, target=target)


def _featomic() -> Any:
    from featomic import SoapPowerSpectrum

    return SoapPowerSpectrum(
        cutoff={"radius": 7.0, "smoothing": {"type": "ShiftedCosine", "width": 0.5}},
        density={"type": "Gaussian", "width": 0.5},
        basis={"type": "TensorProduct", "max_angular": 2, "radial": {"type": "Gto", "max_radial": 2}},  # n = 0, 1, 2
    )


def _fchls(table: Table, against: str | None) -> None:
    """FCHL19 as published. qmllib knows molecules only; all it has for forces is the Jacobian."""
    from thalweg.descriptors import FCHL19
    from thalweg.records import Batch

    for label, atoms in _crystals():
        names = [f"FCHL19 {what}, {label}" for what in ("values", "values and forces", "Jacobian")]
        if not any(table.wants(name) for name in names) or (against == "qmllib" and atoms.pbc.any()):
            continue
        batch = Batch.from_ase(atoms)
        bound = FCHL19().bind(batch.numbers)
        values, calls = bound.values(batch, 1), _descriptor_calls(bound, batch)
        theirs: list[Callable[[], float] | None] = [None] * 3
        if against == "qmllib":
            from qmllib.representations import generate_fchl19

            elements = sorted({int(number) for number in atoms.numbers})
            peer = partial(generate_fchl19, atoms.numbers, atoms.positions, elements=elements)
            for what, ours, other in (
                (names[0], values, peer()),
                (names[2], bound.jacobian(batch, 1)[0], peer(gradients=True)[1].transpose(0, 2, 3, 1)),
            ):
                table.check(f"{what}, of the largest", float(np.abs(ours - other).max() / np.abs(other).max()), 1e-10)
            slopes = partial(cpu_seconds, partial(peer, gradients=True))
            theirs = [partial(cpu_seconds, peer), slopes, slopes]
        for k, name in enumerate(names):
            # What is large has a Jacobian of a gigabyte.
            if table.wants(name) and (k < 2 or len(atoms) <= 24):
                ours, peers = _turns(partial(cpu_seconds, calls[k]), theirs[k], ROUNDS)
                _milli(table, name, ours, peers)


def _neighbors(table: Table, against: str | None) -> None:
    """Pairs within 6.8 angstrom: all anew, and of a structure that moves a little; vesin knows only the first."""
    from thalweg.records import Batch

    for label, atoms in _crystals():
        names = [f"{what}, {label}" for what in ("neighbour pairs", "neighbour pairs of a moving structure")]
        if not any(table.wants(name) for name in names):
            continue
        batch = Batch.from_ase(atoms)
        shifted, following = _Shifting(batch), _core.NeighborList(6.8)
        theirs: Callable[[], float] | None = None
        if against == "vesin":
            import vesin

            peer, cell, periodic = vesin.NeighborList(cutoff=6.8, full_list=False), np.array(atoms.cell), atoms.pbc

            def ask(peer=peer, cell=cell, periodic=periodic, shifted=shifted):
                return peer.compute(points=shifted().positions, box=cell, periodic=periodic, quantities="ijDd")

            table.check(
                f"pairs, {label}", float(abs(len(peer.compute(atoms.positions, cell, periodic, "i")[0])
                - len(_core.neighbor_pairs(batch, 6.8)[0]))), 0.5,
            )  # fmt: skip
            theirs = partial(cpu_seconds, ask)
        calls = (
            lambda: _core.neighbor_pairs(shifted(), 6.8),  # noqa: B023
            lambda: following.update(shifted()),  # noqa: B023
        )
        for name, call, target in zip(names, calls, (None, 10), strict=True):
            if table.wants(name):
                ours, peers = _turns(partial(cpu_seconds, call), theirs, ROUNDS)
                _milli(table, name, ours, peers, target=target if against else None)


def _milli(table: Table, name: str, ours: float, theirs: float | None, **options: Any) -> None:
    table.add(name, 1e3 * ours, "ms", None if theirs is None else 1e3 * theirs, **options)


def _training(problem: Any, count: int) -> tuple[Any, Array]:
    """Random clusters and their EMT energies."""
    batch = _random(problem, count, seed=5)
    return batch, _core.evaluate(_core.Emt(), batch, threads=1)[0]


def _kernel() -> _core.Kernel:
    return _core.Kernel(weight_long=0.99, weight_short=0.01, **KERNEL)


def _theta() -> list[float]:
    """The same for AGOX."""
    return [KERNEL[key] for key in ("amplitude", "length_short", "length_long", "noise")]


def _surrogate(problem: Any, batch: Any, energies: Array) -> tuple[_core.Surrogate, _core.Surrogate, _core.Gpr]:
    """(E, E - 2 sigma, GP) in AGOX's convention."""
    from thalweg.descriptors import Fingerprint

    fingerprint = Fingerprint(convention="agox")._bind_to(batch)
    prior = _core.PairPrior("repulsive", sharp_cutoff=True)
    gpr = _core.Gpr(fingerprint.size, _kernel())
    gpr.fit(fingerprint.values(batch, 1), energies - _core.evaluate(prior, batch, threads=1)[0])
    return (
        _core.Surrogate(fingerprint, gpr, prior=prior),
        _core.Surrogate(fingerprint, gpr, prior=prior, kappa=2.0),
        gpr,
    )


def _lcb(table: Table, peer: Peer | None, sizes: Sequence[int]) -> None:
    problem = _cluster_problem()
    candidates = _random(problem, 10, seed=9)
    request, start = _problem_request(problem), _as_request(candidates)
    for n in sizes:
        together = f"LCB energy + forces, Ni4Au4, n = {n}: candidates relaxed together"
        single = f"LCB energy + forces, Ni4Au4, n = {n}: one structure a call"
        steps = f"LCB relaxation steps per second, n = {n}"
        if not any(table.wants(name) for name in (together, single, steps)):
            continue
        batch, energies = _training(problem, n)
        plain, lcb, _ = _surrogate(problem, batch, energies)
        ask = None
        if peer is not None:
            name = f"model {n}"
            peer.ask("model", name=name, problem=request, structures=_as_request(batch, energies), theta=_theta())
            answer = peer.ask("predict", name=name, structures=start)
            energy, sigma = plain.predict(candidates, threads=1)
            forces = _core.evaluate(lcb, candidates, threads=1)[1]
            theirs = np.array(answer["forces"]).reshape(-1, 3)
            table.check(f"GP energy, n = {n}, eV", float(np.abs(energy - answer["energy"]).max()), 1e-8)
            table.check(f"GP sigma, n = {n}, eV", float(np.abs(sigma - answer["sigma"]).max()), 1e-7)
            table.check(
                f"LCB forces, n = {n}, of the largest",
                float(np.abs(forces - theirs).max() / np.abs(forces).max()),
                1e-3,
            )

            def ask(name=name):
                return peer.ask("lcb", name=name, structures=start, seconds=0.2)["seconds"]

        if table.wants(together) or table.wants(single):
            shifted, shifted_one = _Shifting(candidates), _Shifting(candidates[:1])
            count = len(candidates)
            a, b = _turns(
                lambda: cpu_seconds(lambda: _core.evaluate(lcb, shifted(), threads=1)) / count,  # noqa: B023
                ask,
                ROUNDS,
            )
            _milli(table, together, a, b, target=80 if peer and n == 500 else None)
            one = _turns(
                lambda: cpu_seconds(lambda: _core.evaluate(lcb, shifted_one(), threads=1)),  # noqa: B023
                None,
                ROUNDS,
            )[0]
            _milli(table, single, one, b)
        if table.wants(steps):
            limit = 30 if n >= 1000 else 100
            ask_steps = None
            if peer is not None:

                def ask_steps(name=name, limit=limit):
                    few = {**start, "positions": start["positions"][:4]}
                    answer = peer.ask("relax", name=name, problem=request, structures=few, steps=limit)
                    return answer["seconds"] / max(answer["steps"], 1)

            def our_steps(limit=limit):
                begin = time.process_time()
                found = _core.relax(lcb, candidates, steps=limit, box=problem.box_arguments, threads=1)  # noqa: B023
                return (time.process_time() - begin) / (int(found[3].sum()) - len(candidates))

            a, b = _turns(our_steps, ask_steps, 3)
            table.add(steps, 1 / a, "/s", None if b is None else 1 / b, more=True)


def _fits(table: Table, peer: Peer | None, sizes: Sequence[int]) -> None:
    from thalweg.descriptors import Fingerprint
    from thalweg.models import GPR

    problem = _cluster_problem()
    request = _problem_request(problem)
    for n in sizes:
        fit, likelihood = f"fit with hyperparameters, n = {n}", f"one likelihood gradient, n = {n}"
        if not (table.wants(fit) or table.wants(likelihood)):
            continue
        batch, energies = _training(problem, n)
        structures = _as_request(batch, energies)
        _, _, gpr = _surrogate(problem, batch, energies)
        prior = _core.PairPrior("repulsive", sharp_cutoff=True)
        targets = energies - _core.evaluate(prior, batch, threads=1)[0]
        features = gpr.training
        if table.wants(likelihood):
            ours = gpr.likelihood(gpr.kernel)
            ask = None
            if peer is not None:
                peer.ask("model", name="likelihood", problem=request, structures=structures, theta=_theta())
                answer = peer.ask("likelihood", name="likelihood", seconds=0.0)
                gradient = np.array([ours[key] for key in ("amplitude", "length_short", "length_long")])
                theirs = np.array(answer["gradient"])[[0, 2, 4]]
                table.check(f"log likelihood, n = {n}, relative", abs(ours["value"] / answer["value"] - 1), 1e-9)
                difference = float(np.abs(gradient - theirs).max() / np.abs(gradient).max())
                table.check(f"its gradient, n = {n}, of the largest", difference, 1e-8)

                def ask():
                    return peer.ask("likelihood", name="likelihood", seconds=0.2)["seconds"]

            a, b = _turns(
                lambda: cpu_seconds(lambda: gpr.likelihood(gpr.kernel)),  # noqa: B023
                ask,
                3,
            )
            _milli(table, likelihood, a, b)
        if table.wants(fit):
            bounds = {"amplitude": (1.0, 1e5), "length_long": (0.1, 1e3), "length_short": (0.1, 1e3)}
            reached: dict[str, float] = {}

            def same_start():
                begin = time.process_time()
                model = _core.Gpr(features.shape[1], _kernel())  # noqa: B023
                model.fit(features, targets, threads=1)  # noqa: B023
                reached["ours"] = model.optimise(bounds=bounds, max_evaluations=200)  # noqa: B023
                return time.process_time() - begin

            def own_start():
                begin = time.process_time()
                learner = GPR(Fingerprint(convention="agox"), prior=prior, noise=KERNEL["noise"], max_rows=n, threads=1)  # noqa: B023
                fitted = learner.fit(batch.with_columns(energy=energies, status=np.zeros(n, int)))  # noqa: B023
                reached["ours"] = fitted.log_likelihood  # noqa: B023
                return time.process_time() - begin

            for name, ours_call, theta in (
                (fit, same_start, _theta()),
                (f"{fit}: each program's own start", own_start, None),
            ):

                def ask_fit(theta=theta):
                    assert peer is not None
                    answer = peer.ask("fit", problem=request, structures=structures, theta=theta)  # noqa: B023
                    reached["theirs"] = answer["log_likelihood"]  # noqa: B023
                    return answer["seconds"]

                a, b = _turns(ours_call, ask_fit if peer else None, 3)
                note = f"log likelihood {reached['ours']:.2f}"
                if peer is not None:
                    note += f", AGOX {reached['theirs']:.2f}"
                    if theta:  # ours may find a better optimum, not a worse one
                        table.check(f"log likelihood reached, n = {n}", reached["theirs"] - reached["ours"], 0.05)
                _milli(table, name, a, b, note=note)


def _generators(table: Table, peer: Peer | None) -> None:
    for label, problem, kinds in (
        ("Ni4Au4", _cluster_problem(), ("random", "rattle", "permutation", "complementary")),
        ("Ni12Au12", _large_cluster_problem(), ("random", "rattle", "permutation", "complementary")),
        ("Ni6 on a 60-atom slab", _slab_problem(), ("random", "rattle", "complementary")),
    ):
        template = problem.template
        request = _problem_request(problem)
        parents = _random(problem, 10, seed=21)
        for kind in kinds:
            name = f"{kind} structures per second, {label}"
            if not table.wants(name):
                continue
            count = 1000 if template is None else 200
            fixed = parents.fixed.reshape(len(parents), -1, 3).copy()
            if template is not None:
                fixed[:, : template.atoms] = True
            several = replace(parents, fixed=fixed.reshape(-1, 3)).take(np.arange(count) % len(parents))
            turn = iter(range(10**9))

            def ours(
                kind=kind, problem=problem, template=template, parents=parents, several=several, turn=turn, count=count
            ):
                key, begin = (next(turn), 3), time.process_time()
                if kind == "random":
                    ok = _core.random_structures(
                        problem.placed_numbers, problem.cell, problem.pbc,
                        np.zeros((0, 3)) if template is None else template.positions,
                        np.zeros(0, np.int32) if template is None else template.numbers,
                        box=problem.box_arguments, count=count, key=key, threads=1,
                    )[1]  # fmt: skip
                elif kind == "rattle":
                    ok = _core.rattle(several, box=problem.box_arguments, key=key, threads=1)[1]
                elif kind == "complementary":
                    ok = np.ones(len(_complementary(problem, parents, count, key[0])))
                else:
                    ok = _core.permute(several, key=key, threads=1)[1]
                return (time.process_time() - begin) / max(int(np.sum(ok)), 1)

            notes: list[str] = []

            def theirs(kind=kind, request=request, parents=parents, notes=notes):
                assert peer is not None
                answer = peer.ask(
                    "generate", kind=kind, problem=request, structures=_as_request(parents), seconds=1.0, seed=1
                )
                if answer["made"] == 0:
                    raise ThalwegError(f"AGOX made no structure by '{kind}' in {answer['tried']} tries")
                notes[:] = [f"AGOX: {answer['made']} of {answer['tried']} tries"]
                return answer["seconds"] / answer["made"]

            a, b = _turns(ours, theirs if peer else None, 3)
            target = (200 if peer else 50_000) if (kind, template) == ("random", None) else None
            table.add(
                name, 1 / a, "/s", None if b is None else 1 / b, more=True, target=target, note="".join(notes)
            )  # fmt: skip


def _complementary(problem: Any, parents: Any, count: int, turn: int) -> Any:
    """Structures by complementary energy as AGOX makes them: all placed atoms move, 3 to 5 attractors from the parent, 75
    steps, one decay length of 1 angstrom, cutoff 10."""
    from types import SimpleNamespace

    from thalweg.descriptors import LocalDensity
    from thalweg.generators import ComplementaryEnergy
    from thalweg.randomness import Key
    from thalweg.records import Batch, Context

    element = ComplementaryEnergy(count, role_models=(3, 5), few=False, steps=75, descriptor=LocalDensity(cutoff=10.0))
    nothing = Batch.empty()
    context = Context(
        problem, nothing, parents, nothing, {}, None, {}, 0, Key.of(turn), _services=SimpleNamespace(threads=1)
    )
    return element(context)


def _iteration(table: Table, peer: Peer | None) -> None:
    """A whole GOFEE iteration: n = 40 points, 10 candidates, up to 100 surrogate steps."""
    from thalweg import recipes
    from thalweg.calculators import EMT

    problem = _cluster_problem()
    for prior, noise in (("repulsive", 1e-2), ("bonding", 1e-5)):
        name = f"whole GOFEE iteration, Ni4Au4, n = 40, {prior} prior"
        if not table.wants(name):
            continue
        against = peer if prior == "repulsive" else None
        times: list[float] = []
        asked: list[float] = []
        steps: list[float] = []
        for seed in range(5):
            # as AGOX: two evaluations per iteration, n = 36 to 44; no polish, no permutations, energies alone learned
            search = recipes.gofee(
                problem, EMT(), seed=seed, prior=prior, noise=noise, threads=1, permute=0, polish="none",
                polish_last=0, true_steps=1, random={0: 10, 5: 3}, rattle={0: 0, 5: 7}, surrogate_steps={0: 0, 2: 100},
                hops=0, use_forces=False,
            )  # fmt: skip
            own: list[float] = []
            data = None
            begin = time.process_time()
            for _ in search.steps(30):
                end = time.process_time()
                if 36 < len(search.data) <= 44:  # our compiled EMT, a few microseconds, stays in our figure
                    own.append(end - begin)
                if len(search.data) >= 40 and data is None:
                    data = search.data.take(np.arange(40))
                begin = time.process_time()
            search.close()
            times.append(statistics.median(own))
            if against is not None and data is not None:
                structures = _as_request(data, data.columns["energy"])
                answer = against.ask("iteration", problem=_problem_request(problem), structures=structures, seed=seed)
                asked.append(answer["seconds"])
                steps.append(answer["relax"] / answer["seconds"])
        b = statistics.median(asked) if asked else None
        target = (100 if asked else 40) if prior == "repulsive" or not peer else None
        note = f"AGOX: {100 * statistics.median(steps):.0f} % of it relaxation" if steps else ""
        _milli(table, name, statistics.median(times), b, target=target, note=note)


# name, preset, grid, periodic, species, atoms per episode, episodes, edge of the box that holds the atoms, least ratio to
# PyTorch's convolutions of patches, limit of our own figure in ms
TRAINING = (
    ("graphene, 41 x 36 periodic, 15 x 15, 115 pairs", "thesis-2d", (41, 36), True, 1, 23, 5, 36, 30, 20),
    ("aniline, 50 x 50 open, 15 x 15, 70 pairs", "thesis-2d", (50, 50), False, 3, 14, 5, 25, 30, 14),
    ("cluster, 40^3 open, 7^3 dilation 2, 40 pairs", "thesis-3d-dilated-2", (40, 40, 40), False, 2, 10, 4, 20, 18, 40),
)


def episodes(grid: Sequence[int], species: int, atoms: int, count: int, edge: int) -> tuple[Array, Array, Array, Array]:
    """State-action pairs of `count` random builds within a box of `edge` voxels: placed, offsets, actions, targets."""
    rng = np.random.default_rng(7)
    placed: list[tuple[int, int]] = []
    actions, offsets = [], [0]
    for _ in range(count):
        places = (np.array(grid) - edge) // 2 + rng.integers(0, edge, (atoms, len(grid)))
        voxels = np.ravel_multi_index(tuple((places % np.array(grid)).T), tuple(grid))
        build = list(zip(rng.integers(0, species, atoms).tolist(), voxels.tolist(), strict=True))
        for i, action in enumerate(build):
            placed += build[:i]
            offsets.append(len(placed))
            actions.append(action)
    targets = rng.uniform(-1, 1, len(actions)).astype(np.float32)
    return np.array(placed, np.int32).reshape(-1, 2), np.array(offsets), np.array(actions, np.int32), targets


def _steps(table: Table, *, against_torch: bool) -> None:
    """A training step of a Q-network: forward, backward, Adam. PyTorch's side: its fastest convolutions of the patches
    that the actions see, one phase of a dilated lattice, channels last, and Adam; in the note the same by torch.fft."""
    import torch

    from thalweg.networks import Gaussian, QNetwork, Trainer

    torch.set_num_threads(1)
    for label, preset, grid, wraps, species, atoms, count, edge, ratio, limit in TRAINING:
        name = f"training step, {label}"
        if not table.wants(name):
            continue
        data = episodes(grid, species, atoms, count, edge)
        periodic = (wraps,) * len(grid)
        # biases that are not zero: in empty space every z would be 0, where a leaky ReLU has no derivative to compare
        options: dict[str, Any] = {"initial": "uniform", "seed": 1}
        nets = [QNetwork.preset(preset, Gaussian(species, len(grid)), **options) for _ in range(3)]
        trainer = Trainer(nets[0], grid, periodic, threads=1)
        theirs_net = nets[1].on(grid, periodic)
        optimiser = torch.optim.Adam(theirs_net.parameters(), lr=1e-3)

        def torch_step(fft=False, theirs_net=theirs_net, optimiser=optimiser, data=data):
            begin = time.process_time()
            optimiser.zero_grad()
            q = theirs_net.q_of(*data[:3], fft=fft)
            torch.nn.functional.mse_loss(q, torch.from_numpy(data[3])).backward()
            optimiser.step()
            return time.process_time() - begin

        note = ""
        if against_torch:
            _, q, gradient = trainer.gradient(*data)
            double = nets[2].double().on(grid, periodic)
            exact = double.q_of(*data[:3], fft=True)
            error = torch.nn.functional.mse_loss(exact, torch.from_numpy(data[3]).double())
            named = dict(double.named_parameters())
            exact_gradient = torch.autograd.grad(error, [named[n] for n in trainer._names])
            table.check(f"{name}: Q", float(np.abs(q - exact.detach().numpy()).max()), 1e-5)
            difference, start = 0.0, 0
            for wanted in (g.numpy().ravel() for g in exact_gradient):
                came = gradient[start : start + wanted.size]
                difference = max(difference, float(np.abs(came - wanted).max() / np.abs(wanted).max()))
                start += wanted.size
            table.check(f"{name}: gradient against float64, of each array's largest", difference, 1e-5)
            note = f"torch.fft {1e3 * min(torch_step(fft=True) for _ in range(2)):,.0f} ms"
            torch_step()

        def steps(trainer=trainer, data=data):  # several in a row, as they come in a search
            return cpu_seconds(lambda: trainer.step(*data), least=0.2)

        a, b = _turns(steps, torch_step if against_torch else None, 3)
        _milli(table, name, a, b, target=ratio if against_torch else limit, note=note)


# Label, preset, grid, periodic, target ratio.
QMAPS: list[tuple[str, str, tuple[int, ...], bool, float]] = [
    ("graphene 41 x 36, 15 x 15", "thesis-2d", (41, 36), True, 2.5),
    ("60^3, 7^3 dilation 2", "thesis-3d-dilated-2", (60, 60, 60), False, 50.0),
    ("100^3, 7^3 dilation 2", "thesis-3d-dilated-2", (100, 100, 100), False, 200.0),
]


def _core_network(network: Any, grid: Sequence[int], periodic: Sequence[bool]) -> tuple[_core.QNetwork, Any, Any]:
    """The network in the compiled core, its weights and its biases."""
    from thalweg.networks import Trainer

    arrays = Trainer(network, grid, periodic, threads=1).weights()
    kernels = arrays["kernels"]
    images = np.zeros((len(kernels), len(kernels), *kernels.shape[1:]), np.float32)
    images[np.arange(len(kernels)), np.arange(len(kernels))] = kernels
    weights, biases = ([arrays[f"{kind}{k}"] for k in (1, 2, 3, 4)] for kind in "wb")
    compiled = _core.QNetwork(
        weights, biases, dilations=list(network.dilations), representation=images, representation_bias=arrays["shift"]
    )
    return compiled, weights, biases


def _build_maps(table: Table) -> None:
    """The Q-maps of ten builds on the grid of aniline in step, no two alike: two of 14 atoms and eight of whose last five
    were taken out; the network's tables are made anew, as after training."""
    from thalweg.networks import Gaussian, QNetwork

    name, grid, atoms = "Q-maps of ten builds, aniline 46 x 46", (46, 46), 14
    if not table.wants(name):
        return
    network = QNetwork.preset("thesis-2d", Gaussian(3, 2), initial="uniform", seed=1)
    compiled = _core_network(network, grid, (False, False))[0]
    rng = np.random.default_rng(0)
    builds = []
    for i in range(10):
        sites = np.clip(rng.normal(23, 7.5, (atoms, 2)).astype(int), 0, 45) @ [46, 1]
        builds.append((rng.integers(0, 3, atoms), sites, 0 if i < 2 else atoms - 5))
    steps = [
        [(species[: begin + k], sites[: begin + k]) for species, sites, begin in builds if begin + k < atoms]
        for k in range(atoms)
    ]

    def ours():
        begin = time.process_time()
        q_map = _core.QMap(compiled, grid, (False, False))
        for states in steps:
            offsets = np.cumsum([0] + [len(species) for species, _ in states])
            q_map.batch(offsets, *(np.concatenate(part) for part in zip(*states, strict=True)), threads=1)
        return time.process_time() - begin

    a, _ = _turns(ours, None, 7)
    _milli(table, name, a, None, note=f"{sum(map(len, steps))} maps")


def _episode(table: Table) -> None:
    """A whole ASLA-PA episode of aniline beside its energy (GFN1-xTB): ten builds of 14 atoms, their relaxations on the
    surrogate and what is learned from one of them. The median of those after 60, when the surrogate relaxes every build."""
    from thalweg import recipes
    from thalweg.calculators import make_calculator
    from thalweg.records import Problem

    name, first, count = "ASLA-PA episode beside the energy, aniline 46 x 46", 60, 40
    if not table.wants(name):
        return
    if importlib.util.find_spec("tblite") is None:
        print(f"{name}: needs tblite: pip install 'thalweg[xtb]'")
        return
    problem = Problem("C6NH7", cell=[11.0, 11.0, 14.0], box=([1, 1, 6.5], [[9.0, 0, 0], [0, 9.0, 0], [0, 0, 1.0]]))
    calculator = make_calculator("gfn1-xtb")
    energy, spent = calculator.calculate, [0.0]

    def timed(*arguments: Any, **named: Any) -> None:
        begin = time.process_time()
        energy(*arguments, **named)
        spent.append(spent[-1] + time.process_time() - begin)

    calculator.calculate = timed
    search = recipes.asla(
        problem, calculator, grid=0.2, hydrogen_last=True, postprocess="surrogate", acquisition="lcb", threads=1
    )
    marks: list[float] = []
    search.callbacks.append(lambda step, search: marks.append(time.process_time() - spent[-1]))
    search.run(first + count)
    _milli(table, name, statistics.median(np.diff(marks[first - 1 :])), None, target=200.0)


def _q_maps(table: Table, *, against_torch: bool) -> None:
    """The Q-map after one more atom: in two dimensions everywhere, in three on the shell of 22,000 voxels around nine
    atoms. PyTorch's side: the whole pass over the images, channels last; dilated nets as the phases of their lattice, side
    by side in one batch without dilation, which is its fastest way. Several passes in a row, as they come in a search;
    what the first of ours takes after one of PyTorch's is told beside."""
    import torch

    from thalweg.networks import Gaussian, QNetwork

    torch.set_num_threads(1)
    for label, preset, grid, wraps, ratio in QMAPS:
        name = f"Q-map after one more atom, {label}"
        if not table.wants(name):
            continue
        dimension, species = len(grid), 1 if len(grid) == 2 else 2
        periodic = (wraps,) * dimension
        network = QNetwork.preset(preset, Gaussian(species, dimension), initial="uniform", seed=1)
        compiled, weights, biases = _core_network(network, grid, periodic)
        state = _core.QState(_core.QMap(compiled, list(grid), list(periodic)))
        rng = np.random.default_rng(1)
        middle = np.array(grid) // 2
        sites = np.unique(np.clip(rng.normal(middle, 4.0, (60, dimension)).astype(int), 0, np.array(grid) - 1), axis=0)
        atoms = rng.permutation(sites)[:9]
        for k, site in enumerate(atoms[:-1]):
            state.place(k % species, int(np.ravel_multi_index(tuple(site), grid)))
        shell = None
        if dimension == 3:
            points = np.indices(grid).reshape(3, -1).T
            nearest = np.min([np.square(points - site).sum(axis=1) for site in atoms], axis=0)
            shell = np.sort(np.argsort(nearest, kind="stable")[:22_000])
        last = (len(atoms) - 1) % species, int(np.ravel_multi_index(tuple(atoms[-1]), grid))

        def ours(state=state, last=last, shell=shell):
            begin = time.process_time()
            state.place(*last)
            q = state.q(shell)
            seconds = time.process_time() - begin
            state.undo()
            return seconds, q

        dilation = network.dilations[0]
        layout = torch.channels_last if dimension == 2 else torch.channels_last_3d
        convolve = torch.nn.functional.conv2d if dimension == 2 else torch.nn.functional.conv3d
        tensors = [torch.from_numpy(w).contiguous(memory_format=layout) for w in weights]
        reach = weights[0].shape[-1] // 2
        phases = torch.randn(dilation**dimension, species, *[n // dilation for n in grid]).contiguous(
            memory_format=layout
        )

        def theirs(phases=phases, tensors=tensors, convolve=convolve, biases=biases, reach=reach, wraps=wraps):
            begin = time.process_time()
            with torch.no_grad():
                x = phases
                for k, (w, b) in enumerate(zip(tensors, biases, strict=True)):
                    if wraps:
                        x = torch.nn.functional.pad(x, (reach,) * (2 * (x.dim() - 2)), mode="circular")
                    x = convolve(x, w, torch.from_numpy(b), padding=0 if wraps else reach)
                    x = torch.nn.functional.leaky_relu(x, 0.01) if k < len(tensors) - 1 else torch.tanh(x)
            return time.process_time() - begin

        def again(theirs=theirs):  # the first finds the caches of the other side here, too
            theirs()
            return theirs()

        if against_torch and dimension == 2:
            network.on(grid, periodic)
            placed = [[k % species, np.ravel_multi_index(tuple(site), grid)] for k, site in enumerate(atoms)]
            exact = network.q_map(np.array(placed))
            table.check(f"{name}: Q", float(np.abs(ours()[1] - exact).max()), 3e-6)
        ours()
        first: list[float] = []

        def several(ours=ours, first=first):
            # In a search steps follow on one another; the first one here finds the caches of the other side.
            times = [ours()[0] for _ in range(6)]
            first.append(times[0])
            return statistics.median(times[1:])

        a, b = _turns(several, again if against_torch else None, 7 if dimension == 2 else 3)
        note = f"{1e3 * statistics.median(first):.1f} ms after PyTorch's pass" if against_torch else ""
        _milli(table, name, a, b, target=ratio if against_torch else None, note=note)


def _own(table: Table) -> None:
    """Figures without a counterpart: EMT against ASE's, the store, import time."""
    import ase.calculators.emt
    from ase import Atoms

    from thalweg.calculators import EMT
    from thalweg.store import Store
    from thalweg.testing import example_search

    problem = _cluster_problem()
    if table.wants("EMT Au4Ni4"):
        batch = _random(problem, 1)
        atoms = batch.to_ase()[0]
        shift = [0.0]

        def call(calculator):
            shift[0] += 1e-9  # new positions, or ASE returns what it has
            moved = Atoms(atoms.numbers, atoms.positions + shift[0], cell=atoms.cell)
            moved.calc = calculator
            moved.get_forces()

        ours, theirs = EMT(), ase.calculators.emt.EMT()
        a, b = _turns(lambda: cpu_seconds(lambda: call(ours)), lambda: cpu_seconds(lambda: call(theirs)), ROUNDS)
        assert b is not None
        c = _turns(lambda: cpu_seconds(lambda: _core.evaluate(_core.Emt(), batch, threads=1)), None, ROUNDS)[0]
        table.add("EMT Au4Ni4, as ASE calculator", a * 1e6, "us", note=f"ASE {b * 1e6:.0f} us, {b / a:.0f} x")
        table.add("EMT Au4Ni4, compiled call from Python", c * 1e6, "us", target=20, note=f"{b / c:.0f} x ASE")
    if table.wants("store"):
        example = example_search(steps=1)
        row, meta = example.data[0], example._meta()
        with tempfile.TemporaryDirectory(dir=os.environ.get("THALWEG_BENCH_DIR")) as folder:
            for sync, n, target in (("each", 300, 300), ("grouped", 10_000, 10_000)):
                with Store(Path(folder) / f"{sync}.db", meta, sync=sync) as journal:
                    begin = time.perf_counter()  # the disk counts, too
                    for _ in range(n):
                        journal.append("evaluation", 0, {"row": row, "reason": ""}, cost=1.0)
                    journal.commit()
                    rate = n / (time.perf_counter() - begin)
                name = f"store, {'forced to disk each' if sync == 'each' else sync}, evaluations per second"
                table.add(name, rate, "/s", more=True, target=target, note=f"disk of {folder}")
    if table.wants("import thalweg"):
        code = "import time, numpy; t = time.perf_counter(); import thalweg; print(time.perf_counter() - t)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(9)]
        table.add(
            "import thalweg, over import numpy", 1e3 * statistics.median(float(r.stdout) for r in runs), "ms", target=50
        )


# ---- the two commands ------------------------------------------------------------------------------------------


def _one_thread_again(arguments: Sequence[str]) -> int | None:
    """BLAS reads its number of threads when NumPy is loaded, so the command may have to be run anew: its exit code."""
    if all(os.environ.get(name) == value for name, value in ONE_THREAD.items()):
        return None
    command = [sys.executable, "-m", "thalweg.cli", "bench", *arguments]
    return subprocess.run(command, env={**os.environ, **ONE_THREAD}).returncode


def _write(path: Path | None, contents: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(contents, indent=1, default=_plain) + "\n")


def _check_against(against: str | None, peers: Sequence[str] = ("agox",)) -> None:
    if against is not None and against not in peers:
        raise ConfigurationError(f"--against must be {' or '.join(map(repr, peers))}, got '{against}'")


def kernels(
    *,
    against: str | None = None,
    filter: str = "",
    json_file: Path | None = None,
    long: bool = False,
    agox_python: Path | None = None,
) -> int:
    """Prints what the parts of a search cost, one row per figure, and writes them to `json_file`.

    against : None, "agox", "torch", "dscribe", "featomic", "qmllib" or "vesin": the same work by a peer, in turns, with
        the ratio; by PyTorch only the training steps and maps of Q-networks, which need the extra `asla` (beside them a
        whole episode of ours, where tblite is there), by dscribe and featomic only SOAP, by qmllib only FCHL19 of a
        molecule, by vesin only neighbours. How AGOX is called: its compiled (Cython) fingerprint and prior, one
        `calculate` for LCB energy and forces, features kept in its candidates' caches before a fit, `remote_relax` and
        generators in one process without Ray.
    long : n = 2000, too
    Returns 0, or 1 if values differ. Raises ThalwegError if AGOX cannot be asked.
    """
    _check_against(against, ("agox", "torch", *PYPI_PEERS))
    arguments = ["kernels", "--filter", filter, *(["--long"] if long else [])]
    arguments += ["--against", against] if against else []
    arguments += ["--json", str(json_file)] if json_file else []
    arguments += ["--agox-python", str(agox_python)] if agox_python else []
    code = _one_thread_again(arguments)
    if code is not None:
        return code
    peer = Peer(prepare_agox(agox_python)) if against == "agox" else None
    versions = {"thalweg": _core.__version__, "isa": _core.active_isa(), **(peer.versions if peer else {})}
    has_torch = importlib.util.find_spec("torch") is not None
    if against == "torch" and not has_torch:
        raise ConfigurationError("--against torch needs PyTorch: pip install 'thalweg[asla]'")
    if against in PYPI_PEERS:
        if importlib.util.find_spec(against) is None:
            raise ConfigurationError(f"--against {against} needs {against}: pip install {against}")
        versions[against] = importlib.metadata.version(against)
    if has_torch and against in (None, "torch"):
        versions["torch"] = importlib.metadata.version("torch")
    print(", ".join(f"{name} {value}" for name, value in versions.items()) + "; one thread, processor time, medians")
    table = Table({None: "", "agox": "AGOX"}.get(against, against or ""), filter)
    table.header()
    sizes = [100, 500, 1000, *([2000] if long else [])]
    try:
        if against in (None, "dscribe", "featomic"):
            _soaps(table, against)
        if against in (None, "qmllib"):
            _fchls(table, against)
        if against in (None, "vesin"):
            _neighbors(table, against)
        if against in (None, "agox"):
            _fingerprints(table, peer)
            _lcb(table, peer, sizes)
            _fits(table, peer, [100, 500, *([1000] if long else [])])
            _generators(table, peer)
            _iteration(table, peer)
        if peer is None:
            if has_torch and against in (None, "torch"):
                _steps(table, against_torch=against == "torch")
                _q_maps(table, against_torch=against == "torch")
                _build_maps(table)
                _episode(table)
            if against is None:
                _own(table)
    finally:
        if peer is not None:
            peer.close()
    _write(json_file, table.as_json(versions=versions))
    differing = [check["name"] for check in table.checks if not check["agrees"]]
    if differing:
        print(f"values differ: {', '.join(differing)}")
    return 1 if differing else 0


def search(
    *,
    against: str | None = None,
    restarts: int = 10,
    iterations: int = 100,
    folder: Path | None = None,
    results: Path | None = None,
    json_file: Path | None = None,
    agox_python: Path | None = None,
) -> int:
    """Evaluations until the minimum of Au4Ni4 (EMT) is delivered, and the best energy after k evaluations.

    against : None or "agox": AGOX's GOFEE with its own settings (two evaluations per iteration, both kept), one restart
        after the other; each leaves a file in `folder`, and restarts that have one are not run again.
    restarts, iterations : of each search; ours get as many evaluations
    results : kept results of AGOX (the file that `json_file` wrote) instead of running it
    Returns 0. Raises ThalwegError if AGOX cannot be asked, ConfigurationError for a file without results.
    """
    _check_against(against)
    arguments = ["search", "--restarts", str(restarts), "--iterations", str(iterations)]
    for option, value in (
        ("--against", against), ("--folder", folder), ("--results", results), ("--json", json_file),
        ("--agox-python", agox_python),
    ):  # fmt: skip
        arguments += [option, str(value)] if value else []
    code = _one_thread_again(arguments)
    if code is not None:
        return code
    theirs: dict[str, Any] | None = None
    if results is not None:
        theirs = json.loads(results.read_text())
        if "restarts" not in theirs:
            raise ConfigurationError(f"'{results}' holds no kept results; it was written by bench search --json")
    elif against:
        theirs = _agox_restarts(folder or Path("agox-gofee-au4ni4"), restarts, iterations, agox_python)
    evaluations = 2 * iterations
    print(f"Au4Ni4, EMT; delivered = first counted evaluation within {1e3 * TOLERANCE:.0f} meV of {MINIMUM} eV")
    checkpoints = [k for k in (20, 50, 100, 150, 200) if k <= evaluations]
    heading = "".join(f"{f'after {k}':>18s}" for k in checkpoints)
    print(
        f"{'':24s} {'found':>7s} {'median':>7s}  best energy, median (lowest), eV{'':2s}\n{'':40s}{heading} CPU s each"
    )
    kept: dict[str, Any] = {}
    if theirs is not None:
        histories = [restart["energies"][:evaluations] for restart in theirs["restarts"]]
        seconds = [restart["cpu_seconds"] for restart in theirs["restarts"]]
        _search_row(f"AGOX {theirs['versions']['agox']} GOFEE", histories, seconds, checkpoints)
    for label, options in (("gofee", {}), ("gofee, classic=True", {"classic": True})):
        histories, seconds = [], []
        for seed in range(restarts):
            begin = time.process_time()
            histories.append(_our_restart(options, seed, evaluations))
            seconds.append(time.process_time() - begin)
        _search_row(f"thalweg {label}", histories, seconds, checkpoints)
        kept[label] = histories
    if json_file is not None:
        _write(json_file, {**(theirs or {}), "thalweg": kept})
    return 0


def _our_restart(options: dict[str, Any], seed: int, evaluations: int) -> list[float]:
    from thalweg import recipes
    from thalweg.calculators import EMT

    with recipes.gofee(_cluster_problem(), EMT(), seed=seed, threads=1, **options) as run:
        for _ in run.steps(evaluations):  # whole steps: those of a step that a budget cuts are not in the data
            if len(run.data) >= evaluations:
                break
        return [float(energy) for energy in run.data.columns["energy"][:evaluations]]


def _search_row(
    label: str, histories: Sequence[Sequence[float]], seconds: Sequence[float], points: Sequence[int]
) -> None:
    from thalweg.statistics import best_so_far, first_reaching, success_curve

    delivered = [first_reaching(history, MINIMUM + TOLERANCE) for history in histories]
    times = np.array([found or len(history) for found, history in zip(delivered, histories, strict=True)])
    curve = success_curve(times, np.array([found is not None for found in delivered]))
    median = curve.quantile(0.5)
    cells = ""
    for k in points:
        best = [best_so_far(history)[min(k, len(history)) - 1] for history in histories]
        cells += f"{f'{np.median(best):.3f} ({np.min(best):.3f})':>18s}"
    found = sum(value is not None for value in delivered)
    print(
        f"{label:24s} {f'{found}/{len(histories)}':>7s} {f'{median:.0f}' if np.isfinite(median) else '-':>7s}{cells}"
        f" {statistics.median(seconds):10.1f}",
        flush=True,
    )


def _agox_restarts(folder: Path, restarts: int, iterations: int, python: Path | None) -> dict[str, Any]:
    """Runs the restarts of AGOX that have no file yet, and joins all."""
    folder.mkdir(parents=True, exist_ok=True)
    interpreter = prepare_agox(python)
    problem = {"symbols": "Au4Ni4", "cell": 12.0, "box": 6.0}
    done, versions = [], None
    for seed in range(restarts):
        path = folder / f"agox-{seed:04d}.json"
        answer = json.loads(path.read_text()) if path.is_file() else None
        if answer is None or answer["iterations"] < iterations:
            begin = time.monotonic()
            with Peer(interpreter) as peer:  # a fresh process each: AGOX keeps global state
                versions = peer.versions
                answer = {**peer.ask("search", seed=seed, iterations=iterations, **problem), "versions": versions}
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(answer) + "\n")
            temporary.replace(path)
            print(
                f"AGOX restart {seed + 1} of {restarts}: best {min(answer['energies']):.4f} eV after "
                f"{len(answer['energies'])} evaluations, {time.monotonic() - begin:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        done.append(answer)
    return collect_agox(done, problem)


def collect_agox(restarts: Sequence[dict[str, Any]], problem: dict[str, Any]) -> dict[str, Any]:
    """Restarts as they are kept: energies [eV] of every counted evaluation, in order."""
    command = "thalweg bench search --against agox"
    return {
        "command": f"{command} --restarts {len(restarts)} --iterations {restarts[0]['iterations']} --json FILE",
        "calculator": "ase.calculators.emt.EMT()",
        "problem": problem,
        "minimum": MINIMUM,
        "versions": restarts[0].get("versions", {}),
        "settings": restarts[0]["settings"],
        "restarts": [
            {
                "seed": restart["seed"],
                "iterations": restart["iterations"],
                "cpu_seconds": round(restart["cpu_seconds"], 1),
                "energies": [round(energy, 6) for energy in restart["energies"]],
            }
            for restart in restarts
        ],
    }
