"""Hostile files and arguments end in one clear error: never a crash, a traceback from the depths, or code that runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import ase.io
import hostile
import numpy as np
import pytest
from ase.build import fcc111, molecule
from ase.constraints import FixAtoms, FixBondLength
from test_cli import call
from thalweg.config import Configuration
from thalweg.errors import ConfigurationError, StoreError
from thalweg.importing import FORMATS, read_file, read_structures
from thalweg.local_model import FittedLocalGPR
from thalweg.store import _MAGIC, Store, read

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("kind", "cases"), [("toml", 250), ("structures", 250), ("store", 15), ("model", 250), ("core", 1500)]
)
def test_mutations(kind, cases):
    """In a process of its own, with bounded memory: a crash is a failure of this test, not the end of all tests."""
    done = subprocess.run(
        [sys.executable, str(HERE / "hostile.py"), kind, "--cases", str(cases)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-200:]
    assert f"{kind}: {cases} cases" in done.stdout


# ---- nothing that a file holds runs ----------------------------------------------------------------------------


class Trace:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_never_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Trace(trace))
    for name in (
        "a.traj",
        "a.db",
        "a.extxyz",
        "a.cif",
        "a.vasp",
        "a.json",
        "a.pckl",
        "a.bundle",
        "POSCAR",
        "a.journal",
        "a.npz",
    ):
        Path(name).write_bytes(bomb)
        assert call(capsys, "import", name, "-o", "b.extxyz")[0] == 2
        assert call(capsys, "export", name, "-o", "b.extxyz")[0] == 2
        with pytest.raises(ConfigurationError):
            FittedLocalGPR.load(name)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trace(trace)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile("model.npz", "w") as archive:
        archive.writestr("settings.npy", buffer.getvalue())
    with pytest.raises(ConfigurationError, match="an array of object"):
        FittedLocalGPR.load("model.npz")
    assert not trace.exists()


def test_python_files_and_other_formats_are_no_templates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = '[problem]\nsymbols = "Au2"\ntemplate = "{}"\nbox = {{ corner = [0, 0, 9], vectors = [5, 5, 5] }}\n'
    text += '[calculator]\nname = "emt"\n'
    for name in ("template.py", "template.json", "template.gui", "template", "template.gpw", "template.nc"):
        Path(name).write_text("open('trace', 'w')\n")
        Path("case.toml").write_text(text.format(name))
        code, _, err = call(capsys, "run", "case.toml")
        assert code == 2 and "none of the formats" in err and "ase convert" in err and len(err.splitlines()) == 1
    assert not Path("trace").exists()


def test_a_report_runs_nothing_that_the_folder_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)  # of another test
    Path("case.toml").write_text(hostile.RUN.replace("iterations = 3", "iterations = 1"))
    assert call(capsys, "run", "case.toml", "--out", "run", "--restarts", "1")[0] == 0
    Path("own.py").write_text("open('trace', 'w')\nfrom thalweg.calculators import EMT as make\n")
    config = Path("run/config.toml")
    for settings in (
        'name = "own:make"',
        'name = "os:system"\ncommand = "touch trace"',
        'name = "emt"\nscratch = "trace"',
    ):
        config.write_text(config.read_text().replace('name = "emt"', settings))
        Path("run/restarts/000/result.json").unlink(missing_ok=True)
        assert call(capsys, "report", "run")[0] == 0
        assert call(capsys, "export", "run", "-o", f"{len(settings)}.extxyz")[0] == 0
        assert not Path("trace").exists() and "own" not in sys.modules
        config.write_text(config.read_text().replace(settings, 'name = "emt"'))


# ---- sizes that a file only claims -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbols", "words"),
    [
        ('"Au1000000000"', "at most 100000"),
        ("{ Au = 999999999999 }", "at most 100000"),
        ('"Au' + "9" * 5000 + '"', "at most"),
    ],
)
def test_a_billion_atoms_are_refused(tmp_path, symbols, words):
    (tmp_path / "a.toml").write_text(f'[problem]\nsymbols = {symbols}\n[calculator]\nname = "emt"\n')
    with pytest.raises(ConfigurationError, match=words):
        Configuration.load(tmp_path / "a.toml").make_search(seed=0, store=None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1000000000000\n\nH 0 0 0\n", "claims 1000000000000 atoms"),
        ("9\n\nH 0 0 0\n\n", "only 1 follow"),
        ("1\nProperties=species:S:1:pos:R:3:x:R:1000000000\nH 0 0 0\n", "more columns"),
        ("x" * 3_000_000, "a line of more than"),
        ("-1\n\n", "claims -1 atoms"),
        ("", "no structure|no atoms|ASE cannot read"),
    ],
)
def test_xyz_files_that_claim_more_than_they_hold(tmp_path, content, words):
    (tmp_path / "a.xyz").write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        read_file(tmp_path / "a.xyz")


def test_formats_that_claim_more_are_read_in_bounded_memory(tmp_path):
    begin = time.monotonic()
    (tmp_path / "POSCAR").write_text("H\n1.0\n5 0 0\n0 5 0\n0 0 5\nH\n2000000000\nDirect\n0 0 0\n")
    with pytest.raises(ConfigurationError) as caught:
        read_file(tmp_path / "POSCAR")
    assert "\n" not in str(caught.value) and time.monotonic() - begin < 60
    ase.io.write(tmp_path / "a.db", molecule("H2O"))
    with sqlite3.connect(tmp_path / "a.db") as database:  # one number, to be repeated 10 billion times
        text = '{"__ndarray__": [[10000000000], "float64", [1]]}'
        database.execute(
            "UPDATE systems SET constraints = ?", (f'[{{"name": "FixAtoms", "kwargs": {{"indices": {text}}}}}]',)
        )
    with pytest.raises(ConfigurationError):
        read_file(tmp_path / "a.db")


def test_a_journal_that_claims_a_large_record_is_read_as_cut_off(tmp_path):
    import struct
    import zlib

    head = struct.pack("<II", 2**32 - 1, 7)
    path = tmp_path / "store.journal"
    path.write_bytes(_MAGIC + head + struct.pack("<I", zlib.crc32(head)) + b"x" * 100)
    with pytest.raises(StoreError, match="does not begin with"):
        read(path)
    body = json.dumps({"arrays": [["<f8", [10**9, 10]]], "values": {"kind": "meta", "meta": {"#": 0}}}).encode()
    path.write_bytes(hostile.journal_of([struct.pack("<I", len(body)) + body]))
    with pytest.raises(StoreError, match="malformed"):
        read(path)


@pytest.mark.parametrize(
    "content", [b"", b"host " + b"9" * 5000, b"\xff\xfe\x00 x y", b"host -3 1", b"host 1 " + b"x" * 10**6]
)
def test_a_lock_that_nobody_has_written(tmp_path, content):
    lock = tmp_path / "store.journal.lock"
    lock.write_bytes(content)
    os.utime(lock, (1, 1))  # no heartbeat
    with Store(tmp_path / "store.journal", {"problem": "x"}) as store:
        assert lock.read_text() != content
        store.append("asked", 0, {})
    assert not lock.exists()


def test_a_small_archive_does_not_become_a_large_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("settings.npy", bytes(50_000_000))
    assert os.path.getsize(tmp_path / "a.npz") < 100_000
    with pytest.raises(ConfigurationError, match=r"not what np\.savez writes"):
        FittedLocalGPR.load(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * 100_000, "not valid TOML"),
        ("a = " + "1" * 5000, "not valid TOML"),
        (b"a = '\xff'", "not valid TOML"),
        ("#" * 11_000_000, "larger than"),
        ("[search]\nrestarts = 1000000000000", "restarts: must be at most"),
        ("[search]\niterations = " + "1" * 300, "iterations: must be at most"),
        ("[search]\nrandom = 1000000000", "random: whole numbers may be at most"),
        ("[search]\nkappa = inf", "kappa: whole numbers may be at most"),
        ("cell = nan", "cell: expected an edge length"),
        ("cell = " + "9" * 400, "cell: expected an edge length"),
        ("[search]\n" + "A" * 100_000 + " = 1", "AAA: unknown key|AAA"),
    ],
)
def test_configuration_files_out_of_bounds(tmp_path, text, words):
    before = b"[calculator]\nname = 'emt'\n[problem]\nsymbols = 'Au'\n"
    (tmp_path / "a.toml").write_bytes(before + (text if isinstance(text, bytes) else text.encode()))
    with pytest.raises(ConfigurationError, match=words) as caught:
        Configuration.load(tmp_path / "a.toml")
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


# ---- and what is meant well still works ------------------------------------------------------------------------


def test_templates_of_every_format_arrive_with_what_is_fixed(tmp_path):
    slab = fcc111("Au", (2, 2, 2), vacuum=5.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() == 2))
    endings = sorted(set(FORMATS) - {".cif"})
    for ending in endings:
        path = tmp_path / f"slab{ending}"
        ase.io.write(path, slab, format=FORMATS[ending], **({"direct": True} if ending == ".vasp" else {}))
        found = read_file(path)[-1]
        np.testing.assert_allclose(found.positions, slab.positions, atol=1e-7)
        assert sorted(found.constraints[0].index) == sorted(slab.constraints[0].index), ending
    slab.set_constraint(FixAtoms(indices=[]))  # "nothing is fixed" is something else than "nothing is said"
    slab.write(tmp_path / "free.traj")
    assert read_file(tmp_path / "free.traj")[-1].constraints
    slab.set_constraint(FixBondLength(0, 1))
    slab.write(tmp_path / "bond.traj")
    with pytest.raises(ConfigurationError, match="FixBondLengths is not known here"):
        read_file(tmp_path / "bond.traj")


def test_energies_forces_and_simple_entries_of_info_arrive(tmp_path):
    from thalweg.calculators import EMT

    atoms = molecule("CH3OH")
    atoms.calc = EMT()
    atoms.get_forces()
    atoms.info = {"name": "first", "number": 3}
    for ending in ("extxyz", "traj"):
        ase.io.write(tmp_path / f"a.{ending}", [atoms, atoms])
        found, _ = read_structures(tmp_path / f"a.{ending}")
        assert len(found) == 2 and found[1].info["name"] == "first" and found[1].info["number"] == 3
        assert found[1].get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(found[1].get_forces(), atoms.get_forces(), atol=1e-7)


def test_a_name_with_markup_is_only_text_in_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("case.toml").write_text(hostile.RUN.replace("iterations = 3", "iterations = 1"))
    names = ["<script>alert(1)<", "$\\frac{$"]
    assert call(capsys, "run", "case.toml", "--out", names[0], "--restarts", "1")[0] == 0
    shutil.copytree(names[0], names[1])
    assert call(capsys, "report", *names, "--out", "both.html", "--figures", "figures")[0] == 0
    assert "<script>alert" not in Path("both.html").read_text()
