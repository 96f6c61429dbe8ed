"""The examples run, in a short form, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ase.io
import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"au4ni4", "ni6_au111"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if 'name = "gfn1-xtb"' in path.read_text():
        pytest.importorskip("tblite", reason='tblite is not installed: pip install "thalweg[xtb]"')
    if 'method = "asla"' in path.read_text():
        pytest.importorskip("torch", reason='PyTorch is not installed: pip install "thalweg[asla]"')
    out = tmp_path / "run"
    command = [sys.executable, "-m", "thalweg.cli", "run", str(path), "--restarts", "2", "--iterations", "4"]
    result = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert all(entry["iterations"] == 4 or entry["delivered_evaluation"] for entry in summary["restarts"])
    assert all(entry["finished"] for entry in summary["restarts"])
    best = ase.io.read(out / "best.extxyz", ":")
    assert len(best) == 2
    assert best[0].get_potential_energy() == pytest.approx(summary["best_energy"], abs=1e-6)
    assert (out / "report.html").stat().st_size > 1_000_000
