"""Hostile input by seeded mutation: files and arguments that nobody means well with.

    python tests/hostile.py KIND... [--cases N] [--first K] [--seconds S]      KIND: one of KINDS, or all

Every case must end in success or in an error of thalweg's own (for the compiled core: any Python exception), within LIMIT
seconds, in bounded memory, without starting a program or unpickling. Case k of a kind is the same each time. Prints the
cases that do not and exits with 1; a crash of the process names its case by the last line of the standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from thalweg import _core, campaign
from thalweg.config import Configuration
from thalweg.errors import ThalwegError
from thalweg.report import page
from thalweg.store import _HEAD, _MAGIC, read

HERE = Path(__file__).parent
LIMIT = 20.0  # seconds of processor time for one case
MEMORY = 3 << 30

HUGE = [
    "0", "-1", "1", "2", "7", "1e9", "1000000000", "999999999999", "18446744073709551616", "-9223372036854775809", "1" * 400,
    "9" * 5000, "1e308", "-1e308", "1e-320", "nan", "inf", "-inf", "NaN", "Infinity", "0.1", "1e-9", "true", "null", "[]",
    "{}", "[[[[1]]]]", '""', '"' + "A" * 100_000 + '"', "[" * 3000, "'''", "0x7fffffff",
]  # fmt: skip
BYTES = [b"\x00", b"\xff", b"\xfe\xff", b"\xc3\x28", b"\n", b"\r\n", b'"', b"\\", b"]", b"{", b"\x1b[31m", b"</script>"]


def mutated(raw: bytes, rng: random.Random, *, text: bool = True) -> bytes:
    """One to four random changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        n = len(raw)
        at, end = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
        end = min(end, at + rng.choice([1, 4, 40, 4000]))
        how = rng.randrange(9 if text else 7)
        if how == 0 and n:
            k = rng.randrange(n)
            raw = raw[:k] + bytes([raw[k] ^ (1 << rng.randrange(8))]) + raw[k + 1 :]
        elif how == 1:
            raw = raw[:at]
        elif how == 2:
            raw = raw[:at] + raw[end:]
        elif how == 3:
            raw = raw[:end] + raw[at:end] * rng.choice([1, 2, 30]) + raw[end:]
        elif how == 4:
            raw = raw[:at] + rng.choice(BYTES) + raw[at:]
        elif how == 5:
            raw = raw[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + raw[end:]
        elif how == 6:
            width = rng.choice([1, 2, 4, 8])
            value = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]) % 256**width
            raw = raw[:at] + value.to_bytes(width, rng.choice(["little", "big"])) + raw[at + width :]
        else:  # a number or a word by something else
            words = list(re.finditer(rb"[-+.\w]+", raw))
            if words:
                word = rng.choice(words)
                other = rng.choice(HUGE).encode() if how == 7 else rng.choice(words).group()
                raw = raw[: word.start()] + other + raw[word.end() :]
    return raw


def mutated_tree(value, rng: random.Random):
    """A JSON value with one node changed."""
    paths: list[tuple] = []

    def walk(node, path):
        paths.append(path)
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, item in items:
            walk(item, (*path, key))

    walk(value, ())
    value = json.loads(json.dumps(value))
    path = rng.choice(paths[1:])
    node = value
    for key in path[:-1]:
        node = node[key]
    key = path[-1]
    how = rng.randrange(5)
    if how == 0:
        del node[key]
    elif how == 1:
        node[key] = rng.choice([None, True, -1, 0, 1, 2**31, 2**70, 1.5, float("nan"), float("inf"), "", "x", "A" * 50_000,
                                [], {}, [1, 2], {"#": 10**6}, {"#": -3}, {"#": "a"}, {"batch": [0, [], []]}, {"map": 3},
                                [[[[]]]], "f8", "O", "U1000000000", "V8", "(1000000,)f8",
                                [10**9, 10**9], [-1], [2**62]])  # fmt: skip
    elif how == 2 and isinstance(node, dict):
        node[rng.choice(["x", "map", "#", "batch", "kind", ""])] = node.pop(key)
    elif how == 3 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), node[key])
    else:
        other: object = value
        for step in rng.choice(paths[1:]):
            with contextlib.suppress(KeyError, IndexError, TypeError):
                other = other[step]  # type: ignore[index]
        node[key] = json.loads(json.dumps(other))
    return value


# ---- configuration files -------------------------------------------------------------------------------------

TOML = """
[problem]
symbols = "Au2Ni2"
cell = [12.0, 12.0, 12.0]
pbc = [true, false, false]
box = { corner = [1.0, 2.0, 3.0], vectors = [[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]] }
c1 = 0.75
[calculator]
name = "lj"
sigma = 2.3
rc = 6.0
[search]
method = "gofee"
iterations = 2
restarts = 2
seed = 3
max_evaluations = 3
kappa = { 0 = 2.0, 5 = 1.0 }
random = { 0 = 4, 5 = 3 }
rattle = 3
permute = 2
sample = 3
surrogate_steps = 5
polish = "periodic"
polish_every = 2
noise = 1e-5
target = { energy = 5.7, tolerance = 0.05, stop = true }
"""


def toml_base(folder: Path) -> None:
    (folder / "slab.extxyz").write_text(SLAB)


def toml_case(folder: Path, rng: random.Random) -> None:
    base = TOML
    if rng.random() < 0.3:
        base = base.replace("cell = [12.0, 12.0, 12.0]\npbc = [true, false, false]", 'template = "slab.extxyz"')
    if rng.random() < 0.3:
        base = base.replace('"lj"\nsigma = 2.3\nrc = 6.0', '"emt"')
    if rng.random() < 0.3:
        base = re.sub(r"random = .*\n(.*\n)*?noise = .*\n", "steps = 3\n", base.replace('"gofee"', '"basin_hopping"'))
        base = base.replace("kappa = { 0 = 2.0, 5 = 1.0 }\n", "")
    path = folder / "case.toml"
    path.write_bytes(mutated(base.encode(), rng))
    configuration = Configuration.load(path)
    numbers = [n for n in json.dumps(configuration.options).replace("}", ",").split() if n.strip(",").isdigit()]
    small = all(int(n.strip(",")) <= 50 for n in numbers)
    with configuration.make_search(seed=configuration.search.seed, store=None) as search:
        if small and len(search.problem.numbers) <= 40:
            search.run(1, evaluations=2)
    assert (
        Configuration.load(_written(folder / "again.toml", configuration.to_toml())).to_dict()
        == configuration.to_dict()
    )


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# ---- structures ----------------------------------------------------------------------------------------------

SLAB = """4
Lattice="5.0 0.0 0.0 0.0 5.0 0.0 0.0 0.0 14.0" Properties=species:S:1:pos:R:3:move_mask:L:1:forces:R:3 energy=-1.5
Au 0.0 0.0 3.0 F 0.0 0.0 0.1
Au 2.5 2.5 3.0 F 0.0 0.0 0.1
Au 2.5 0.0 5.0 T 0.0 0.0 0.1
Au 0.0 2.5 5.0 T 0.0 0.0 0.1
"""


def structures_base(folder: Path) -> None:
    import ase.io

    (folder / "base.extxyz").write_text(SLAB + SLAB)
    (folder / "base.xyz").write_text("2\n\nH 0 0 0\nH 0 0 0.7\n")
    atoms = ase.io.read(folder / "base.extxyz", index=":")
    for ending in ("traj", "cif", "vasp"):
        ase.io.write(folder / f"base.{ending}", atoms[0])
    ase.io.write(folder / "base.db", atoms)
    shutil.copy(HERE / "data" / "agox_au2ni2.db", folder / "agox.db")


def structures_case(folder: Path, rng: random.Random) -> None:
    from thalweg import importing

    name = rng.choice(
        ["base.extxyz", "base.extxyz", "base.xyz", "base.traj", "base.cif", "base.vasp", "base.db", "agox.db"]
    )
    raw = (folder / name).read_bytes()
    path = folder / f"case-{name}"
    path.write_bytes(mutated(raw, rng, text=not name.endswith((".db", ".traj")) or rng.random() < 0.3))
    # the process of its own takes a second to start: most cases do in this one what it does
    apart, importing._read_apart = importing._read_apart, importing._read_with_ase
    if rng.random() < 0.02:
        importing._read_apart = apart
    try:
        found, _ = importing.read_structures(path)
        out = folder / "out.extxyz"
        campaign.export(found, out)
        from thalweg import Problem

        Problem.from_atoms(found[0], "Au2", box=([0, 0, 6], [5, 5, 5]))
    finally:
        importing._read_apart = apart


# ---- stores and run folders ----------------------------------------------------------------------------------

RUN = """
[problem]
symbols = "Au2Ni2"
cell = 12.0
box = 5.0
[calculator]
name = "emt"
[search]
method = "gofee"
iterations = 3
restarts = 2
random = 3
rattle = 2
permute = 1
surrogate_steps = 5
polish_steps = 3
target = { energy = 5.7, tolerance = 0.5 }
"""


def store_base(folder: Path) -> None:
    configuration = Configuration.load(_written(folder / "run.toml", RUN))
    campaign.prepare(configuration, folder / "base")
    run = campaign.RunFolder(folder / "base")
    for index in range(2):
        with configuration.make_search(seed=index, store=run.store(index)) as search:
            search.run(2 + index)
        result = campaign.measure(configuration, run, index, read(run.store(index)))
        run.result(index).write_text(json.dumps(result))


def bodies_of(raw: bytes) -> list[bytes]:
    found, at = [], len(_MAGIC)
    while at + _HEAD.size <= len(raw):
        (length, *_) = _HEAD.unpack_from(raw, at)
        found.append(raw[at + _HEAD.size : at + _HEAD.size + length])
        at += _HEAD.size + length
    return found


def journal_of(bodies: list[bytes]) -> bytes:
    """A journal whose checksums are right, whatever is in it."""
    out = [_MAGIC]
    for body in bodies:
        head = struct.pack("<II", len(body), zlib.crc32(body))
        out += [head, struct.pack("<I", zlib.crc32(head)), body]
    return b"".join(out)


def mutated_journal(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.15:
        return mutated(raw, rng, text=False)
    bodies = bodies_of(raw)
    k = rng.randrange(len(bodies))
    how = rng.random()
    if how < 0.1:
        bodies.insert(rng.randrange(len(bodies) + 1), bodies[k])
    elif how < 0.2:
        del bodies[k]
    elif how < 0.3:
        other = rng.randrange(len(bodies))
        bodies[k], bodies[other] = bodies[other], bodies[k]
    else:
        (length,) = struct.unpack_from("<I", bodies[k])
        head, arrays = bodies[k][4 : 4 + length], bodies[k][4 + length :]
        if how < 0.75:
            head = json.dumps(mutated_tree(json.loads(head), rng)).encode()
        elif how < 0.85:
            head = mutated(head, rng)
        else:  # numbers in arrays
            values = bytearray(arrays)
            for _ in range(rng.choice([1, 3])):
                if len(values) >= 8:
                    at = 8 * rng.randrange(len(values) // 8)
                    values[at : at + 8] = rng.choice(
                        [struct.pack("<d", x) for x in (float("nan"), float("inf"), 1e300, -1e9, 0.0, 1e-300)]
                        + [struct.pack("<q", x) for x in (-1, 2**62, 200, 10**9)]
                    )
            arrays = bytes(values)
        bodies[k] = struct.pack("<I", len(head)) + head + arrays
    return journal_of(bodies)


def store_case(folder: Path, rng: random.Random) -> None:
    run = campaign.RunFolder(folder / "case")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(folder / "base", run.path)
    which = rng.random()
    if which < 0.7:
        run.store(0).write_bytes(mutated_journal(run.store(0).read_bytes(), rng))
        run.result(0).unlink()
    elif which < 0.85:
        text = run.result(1).read_text()
        changed = (
            json.dumps(mutated_tree(json.loads(text), rng)).encode()
            if rng.random() < 0.7
            else mutated(text.encode(), rng)
        )
        run.result(1).write_bytes(changed)
        if rng.random() < 0.5:
            run.store(1).unlink()
    else:
        run.config.write_bytes(mutated(run.config.read_bytes(), rng))
    errors = []
    for action in (_report, _export, _resume):
        try:
            action(run, rng)
        except ThalwegError as problem:
            errors.append(problem)
    if errors:
        raise errors[0]


def _report(run: campaign.RunFolder, rng: random.Random) -> None:
    results = campaign.summarise(run.path)
    if rng.random() < 0.3:  # the slow part
        page([results])


def _export(run: campaign.RunFolder, rng: random.Random) -> None:
    campaign.export(campaign.structures({0: read(run.store(0))}), run.path / "out.extxyz")


def _resume(run: campaign.RunFolder, rng: random.Random) -> None:
    configuration = run.configuration()
    if configuration.search.method == "gofee" and len(configuration.make_problem().numbers) <= 40:
        with configuration.make_search(seed=0, store=run.store(0)) as search:
            search.run(1, evaluations=search.evaluations + 2)


# ---- models --------------------------------------------------------------------------------------------------


def model_base(folder: Path) -> None:
    from thalweg import Problem
    from thalweg.local_model import LocalGPR
    from thalweg.randomness import Key

    rng = np.random.default_rng(1)
    problem = Problem("Au2Ni2", cell=12.0, box=6.0)
    grid = np.array([[0, 0, 0], [2.7, 0, 0], [0, 2.7, 0], [2.7, 2.7, 0.5]]) + 4
    positions = grid[None] + rng.normal(0, 0.2, (6, 4, 3))
    data = problem.batch(positions, energy=rng.normal(0, 1, 6)).with_atom_columns(forces=rng.normal(0, 1, (24, 3)))
    LocalGPR().fit(data, None, key=Key.of(0)).save(folder / "base.npz")


def model_case(folder: Path, rng: random.Random) -> None:
    from thalweg.local_model import FittedLocalGPR

    raw = (folder / "base.npz").read_bytes()
    path = folder / "case.npz"
    if rng.random() < 0.4:
        path.write_bytes(mutated(raw, rng, text=False))
    else:
        with zipfile.ZipFile(io.BytesIO(raw)) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        name = rng.choice(list(parts))
        how = rng.random()
        if how < 0.15:
            del parts[name]
        elif how < 0.3:
            parts[name] = parts[rng.choice(list(parts))]
        elif how < 0.45 or name == "settings.npy":
            settings = json.loads(str(np.load(io.BytesIO(parts["settings.npy"]))))
            parts["settings.npy"] = _npy(np.array(json.dumps(mutated_tree({"": settings}, rng).get("", 3))))
        elif how < 0.6:
            array = np.load(io.BytesIO(parts[name]))
            new = rng.choice([array[:-1] if array.ndim else array, array * 0 - 1, array.astype("f4"), array.reshape(-1),
                              np.zeros((0, 3)), np.array("x"), np.full(array.shape, np.nan),
                              array.astype("f8") * 1e300])  # fmt: skip
            parts[name] = _npy(new)
        elif how < 0.7:
            parts[name] = _npy(np.array([Bomb()], dtype=object), pickled=True)
        elif how < 0.8:  # claims more than there is
            parts[name] = re.sub(rb"\((\d+)", lambda m: b"(" + m.group(1) + b"0000000", parts[name], count=1)
        else:
            parts[name] = mutated(parts[name], rng, text=False)
        with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as file:
            for one, content in parts.items():
                file.writestr(one, content)
    fitted = FittedLocalGPR.load(path)
    if fitted.size:
        fitted.predict(fitted._learned.batch)


def _npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return open, (os.environ["THALWEG_TRACE"], "w")


# ---- the compiled core ---------------------------------------------------------------------------------------

ABSURD = [
    None, 0, -1, 1, 3, 2**31 - 1, 2**31, 2**63, -(2**63), 10**30, 1.5, -1e300, 1e300, 1e-300, float("nan"), float("inf"), "",
    "x", b"x", [], [1, 2, 3], (), {}, {1: 2}, True, np.zeros(0), np.zeros(3), np.zeros((3, 3)), np.full(4, np.nan),
    np.arange(4) - 2, np.array(["a"]), np.zeros((2, 2, 2)), np.array([2**40]), object(),
]  # fmt: skip


def _batch(rng: random.Random) -> SimpleNamespace:
    r = np.random.default_rng(rng.randrange(2**32))
    sizes = [rng.choice([0, 1, 2, 4, 4, 4, 6]) for _ in range(rng.choice([0, 1, 2, 3]))]
    m, n = sum(sizes), len(sizes)
    numbers = r.choice([28, 79], m)
    batch = {
        "positions": r.uniform(2, 8, (m, 3)), "numbers": numbers, "offsets": np.cumsum([0, *sizes]),
        "cells": np.tile(np.eye(3) * 10.0, (n, 1, 1)), "pbc": r.random((n, 3)) < 0.3, "fixed": r.random((m, 3)) < 0.2,
    }  # fmt: skip
    if rng.random() < 0.6:
        name = rng.choice(list(batch))
        array = np.array(batch[name], float)
        how = rng.randrange(6)
        if how == 0:
            batch[name] = rng.choice(ABSURD)
        elif how == 1 and array.size:
            array.reshape(-1)[rng.randrange(array.size)] = rng.choice(
                [np.nan, np.inf, -np.inf, 1e300, -1e9, 0.0, 1e18, -5, 300]
            )
            with np.errstate(all="ignore"):
                batch[name] = array if name in ("positions", "cells") else array.astype(int)
        elif how == 2:
            batch[name] = array[:-1]
        elif how == 3:
            batch[name] = np.concatenate([array, array])
        elif how == 4:
            batch[name] = array * rng.choice([0, 1e-9, 1e9, -1, 1e200])
        else:
            batch[name] = array.reshape(-1)[::-1]
    return SimpleNamespace(**batch)


def _objects(rng: random.Random) -> dict:
    """Good objects of the core by the name of the argument that takes them."""
    prior = _core.PairPrior("bonding")
    wells = _core.ManyBodyPrior({(28, 79): (0.5, 2.5, 4.0, 2.0)}, {28: 0.5, 79: 0.7})
    kernel = _core.Kernel(amplitude=10.0, length_long=5.0, length_short=1.0, noise=1e-4)
    r = np.random.default_rng(rng.randrange(2**32))
    fingerprint = _core.Fingerprint(np.array([28, 28, 79, 79], np.int32), False)
    gpr = _core.Gpr(fingerprint.size, kernel)
    if rng.random() < 0.7:
        gpr.fit(r.normal(size=(5, fingerprint.size)), r.normal(size=5))
    environments, density = _core.Environments([28, 79]), _core.LocalDensity([28, 79])
    local = _core.LocalGpr(environments)
    grid = np.array([[0, 0, 0], [2.7, 0, 0], [0, 2.7, 0], [2.7, 2.7, 0.5]]) + 4
    good = SimpleNamespace(
        positions=grid, numbers=np.array([28, 28, 79, 79]), offsets=np.array([0, 4]), cells=np.eye(3)[None] * 12,
        pbc=np.zeros((1, 3), bool), fixed=np.zeros((4, 3), bool),
    )  # fmt: skip
    if rng.random() < 0.7:
        local.fit(good, np.array([1.0]), np.zeros((4, 3)))
    return {
        "landscape": rng.choice([_core.Emt(), prior, _core.LennardJones(2.3, 0.5), wells]),
        "prior": rng.choice([None, prior]), "kernel": kernel, "gpr": rng.choice([gpr, local]), "fingerprint": fingerprint,
        "environments": environments, "batch": good, "density": density,
        "self": {"Fingerprint": fingerprint, "Gpr": gpr, "LocalGpr": local, "Environments": environments,
                 "ManyBodyPrior": wells, "Tilted": _core.Tilted(wells, np.zeros((4, 3))),
                 "ComplementaryEnergy": _core.ComplementaryEnergy(density, np.full((4, 3), np.nan)),
                 "Minimiser": _core.Minimiser(good.positions, good.fixed),
                 "Surrogate": _core.Surrogate(fingerprint, gpr), "LocalSurrogate": _core.LocalSurrogate(local)},
    }  # fmt: skip


def core_base(folder: Path) -> None:
    global CALLS
    CALLS = []
    for name in dir(_core):
        thing = getattr(_core, name)
        if name.startswith("_") or name == "ConfigurationError":
            continue
        if isinstance(thing, type):
            CALLS += [(name, "__init__")] + [
                (name, m) for m in dir(thing) if not m.startswith("_") and callable(getattr(thing, m))
            ]
        elif callable(thing):
            CALLS.append(("", name))


CALLS: list[tuple[str, str]] = []
SIZES = {
    "threads": [0, 1, 2, 3, -1, 10**6, 2**31 - 1],
    "steps": [0, 1, 5, -1, 10**9],
    "count": [0, 1, 3, -1, 10**10],
    "key": [(1, 2), (2**64, 0), (1,), "ab"],
    "first_row": [0, 2**63, -1],
    "max_evaluations": [0, 3, -1],
    "tries_per_atom": [0, 1, 100, -1, 2**31 - 1],
    "tries_per_structure": [0, 1, -1],
    "memory": [0, 1, 10, -1, 2**31 - 1],
    "cutoff": [0.0, 1.0, 6.0, -1.0, 1e9, float("nan")],
    "l_max": [0, 3, -1, 40, 10**9],
    "n_radial": [0, 1, 6, -1, 10**9],
    "n_angular": [0, 1, 3, -1, 10**9],
    "angular_bins": [0, 1, 30, -1, 2**31 - 1],
    "max_inducing": [0, 1, 10, 2**63],
    "row": [0, 1, 4, 5, 2**63, -1],
    "features": [0, 1, 2**40, 2**63, np.zeros((2, 3)), np.zeros((5, 0))],
    "bin_width": [0.0, 0.2, 1e-12, -1.0, float("nan")],
    "cutoff_radial": [0.0, 6.0, 1e9, float("inf")],
    "cutoff_angular": [0.0, 4.0, 1e9, float("nan")],
    "radial_cutoff": [0.0, 6.0, 1e9],
    "angular_cutoff": [0.0, 5.0, 1e9],
    "box": [
        None,
        ((0, 0, 0), np.eye(3) * 8, (False,) * 3),
        ((0, 0, 0), np.zeros((3, 3)), (True,) * 3),
        (1, 2, 3),
        ((0, 0, 0), np.eye(3) * 8, (False,) * 3, 10**9),
        ((np.nan,) * 3, np.eye(3) * 1e300, (False,) * 3),
    ],
    "form": ["bonding", "repulsive", "x"],
    "convention": ["smooth", "agox", "x"],
    "numbers": [np.array([28, 79]), np.array([0]), np.array([-5, 200]), np.arange(1, 119), np.zeros(0, int)],
    "species": [[28, 79], [], [0], [-1, 500], list(range(1, 119)), [28, 28]],
    "pairs": [
        {(28, 79): (0.5, 2.5, 4.0)},
        {},
        {(0, -1): (1, 1, 1)},
        {(28, 79): (np.nan, 0, -1)},
        {(28, 28): (1e300, 1e-300, 1e9)},
    ],
    "starts": [[], [_core.Kernel()], [_core.Kernel(amplitude=-1.0)]],
    "free": [[], ["noise"], ["x"]],
    "bounds": [{}, {"noise": (1.0, 0.0)}, {"amplitude": (np.nan, np.inf)}, {"x": 1}],
}


def core_case(folder: Path, rng: random.Random) -> None:
    owner, name = rng.choice(CALLS)
    objects = _objects(rng)
    target = getattr(_core, owner) if name == "__init__" else getattr(objects["self"].get(owner), name, None)
    if not owner:
        target = getattr(_core, name)
    if target is None:
        return
    text = (getattr(_core, owner).__init__.__doc__ if name == "__init__" else target.__doc__) or ""
    signature = text[: text.find(") ->") + 1]
    given = {}
    for argument in re.findall(r"(\w+): ", signature):
        if argument in ("self", "arg0"):
            continue
        if (
            f"{argument}: " in signature
            and "= " in signature.split(f"{argument}: ")[1].split(",")[0]
            and rng.random() < 0.5
        ):
            continue
        pool = SIZES.get(argument)
        chance = rng.random()
        if argument == "batch":
            given[argument] = _batch(rng) if chance < 0.8 else rng.choice([objects["batch"], *ABSURD])
        elif chance < 0.2:
            given[argument] = rng.choice(ABSURD)
        elif argument in objects:
            given[argument] = objects[argument]
        elif pool is not None:
            given[argument] = rng.choice(pool)
        elif argument == "cell":
            given[argument] = np.eye(3) * rng.choice([10.0, 0.0, 1e-9, np.nan])
        elif argument == "pbc":
            given[argument] = np.array([rng.random() < 0.5] * 3)
        elif argument in ("energies", "targets"):
            given[argument] = np.full(rng.choice([1, 1, 3, 5]), rng.choice([0.5, np.nan, 1e300]))
        elif argument == "forces" and owner != "":
            given[argument] = rng.choice([True, np.full((4, 3), rng.choice([0.5, np.nan, 1e300])), np.zeros((8, 3))])
        elif argument in ("positions", "template_positions"):
            given[argument] = np.full((2, 3), rng.choice([0.5, np.nan, 1e300])) * np.array([[1], [3]])
        elif argument == "template_numbers":
            given[argument] = np.array([79, 28])
        elif argument == "feature":
            given[argument] = np.full(objects["fingerprint"].size, rng.choice([0.5, np.nan, 1e300]))
        else:
            given[argument] = rng.choice([0.0, 0.5, 1.0, 1e300, -1.0, float("nan"), True])
    if "HOSTILE_SHOW" in os.environ:
        print(owner, name, given, file=sys.stderr)
    try:
        target(**given)
        if owner in ("Gpr", "LocalGpr") and name != "__init__":  # what is left must still be usable
            one = objects["self"][owner]
            one.copy()
            (one.predict(np.zeros((2, objects["fingerprint"].size))) if owner == "Gpr" and one.size else None)
    except Exception as problem:
        if type(problem) is RuntimeError and "unknown" in str(problem).lower():
            raise AssertionError(str(problem)) from problem


# ---- running -------------------------------------------------------------------------------------------------

KINDS = {
    "toml": (toml_base, toml_case),
    "structures": (structures_base, structures_case),
    "store": (store_base, store_case),
    "model": (model_base, model_case),
    "core": (core_base, core_case),
}


class TooSlow(Exception):
    pass


def _too_slow(number, frame):
    raise TooSlow(f"more than {LIMIT} s")


def _forbidden(*arguments, **options):
    raise AssertionError("a pickle was loaded")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9)
    settings = parser.parse_args()
    kinds = list(KINDS) if settings.kinds == ["all"] else settings.kinds
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _too_slow)
    signal.signal(signal.SIGPROF, _too_slow)
    wrong = 0
    for kind in kinds:
        base, case = KINDS[kind]
        begin, done, refused = time.monotonic(), 0, 0
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            os.environ["THALWEG_TRACE"] = str(folder / "trace")
            os.chdir(folder)
            base(folder)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
            real_load, real_loads = pickle.load, pickle.loads
            pickle.load = pickle.loads = _forbidden
            for k in range(settings.first, settings.first + settings.cases):
                if time.monotonic() - begin > settings.seconds:
                    break
                print(f"\r{kind} {k}", end="", file=sys.stderr, flush=True)
                signal.setitimer(signal.ITIMER_PROF, LIMIT)
                signal.setitimer(signal.ITIMER_REAL, 20 * LIMIT)  # where it waits; others may use the machine
                try:
                    with np.errstate(all="ignore"), contextlib.redirect_stdout(io.StringIO()):
                        case(folder, random.Random(f"{kind} {k}"))
                except ThalwegError as problem:
                    refused += 1
                    if len(str(problem).splitlines()) > 12 or len(str(problem)) > 4000:
                        wrong += 1
                        print(f"\n{kind} {k}: a long-winded error: {str(problem)[:300]}")
                except (Exception, RecursionError, MemoryError) as problem:
                    wrong += 1
                    print(f"\n{kind} {k}: {type(problem).__name__}: {str(problem)[:300]}")
                    traceback.print_tb(problem.__traceback__, limit=-6, file=sys.stdout)
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if (folder / "trace").exists():
                    wrong += 1
                    print(f"\n{kind} {k}: a pickle has run")
                    (folder / "trace").unlink()
                done += 1
            pickle.load, pickle.loads = real_load, real_loads
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            os.chdir(HERE)
        print(f"\n{kind}: {done} cases, {refused} refused, {time.monotonic() - begin:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
