"""Each layer uses only those above it (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import thalweg

PACKAGE = Path(thalweg.__file__).parent
SOURCE = Path(__file__).parents[1]

# Python: what a module may import from the package at its top level, layer by layer.
PYTHON = [
    {"_core"},
    {"errors", "elements"},
    {"files", "randomness", "schedule", "descriptors", "calculators", "pool", "statistics", "priors", "torch_ops"},
    {"records", "kernels"},
    {"grid"},
    {
        "agent",
        "generators",
        "select",
        "refine",
        "evaluate",
        "models",
        "local_model",
        "model_choice",
        "callbacks",
        "stagnation",
    },
    {"search", "store", "networks", "agox_adapter"},
    {"recipes", "testing"},
    {"config", "campaign", "report", "progress", "bench", "scaffold", "importing"},
    {"cli"},
]
# refine and evaluate use the model lookup of select, the local model the priors of models; nothing else looks sideways
# among the elements
SIDEWAYS = {("refine", "select"), ("evaluate", "select"), ("local_model", "models"),
            ("search", "store"), ("campaign", "config"), ("report", "campaign"), ("report", "config"),
            ("progress", "campaign"), ("scaffold", "config"), ("progress", "config"), ("campaign", "progress")}  # fmt: skip

# C++: header -> headers of the project it may include.
CPP = {
    "core.hpp": set(),
    "random.hpp": set(),
    "landscape.hpp": {"core.hpp"},
    "neighbors.hpp": {"core.hpp"},
    "fingerprint.hpp": {"core.hpp"},
    "soap.hpp": {"core.hpp"},
    "fchl.hpp": {"core.hpp"},
    "density.hpp": {"core.hpp", "neighbors.hpp"},
    "complementary.hpp": {"core.hpp", "density.hpp", "landscape.hpp"},
    "gpr.hpp": {"core.hpp"},
    "potentials.hpp": {"core.hpp", "landscape.hpp"},
    "surrogate.hpp": {"core.hpp", "landscape.hpp", "fingerprint.hpp", "gpr.hpp"},
    "environments.hpp": {"core.hpp", "neighbors.hpp"},
    "local_gpr.hpp": {"core.hpp", "landscape.hpp", "environments.hpp"},
    "relax.hpp": {"core.hpp", "landscape.hpp"},
    "build.hpp": {"core.hpp", "random.hpp", "relax.hpp"},
    "cuda.hpp": {
        "core.hpp",
        "landscape.hpp",
        "potentials.hpp",
        "qmap.hpp",
        "fingerprint.hpp",
        "density.hpp",
        "soap.hpp",
        "gpr.hpp",
        "relax.hpp",
        "build.hpp",
    },
    "training.hpp": {"core.hpp"},
    "qmap.hpp": {"core.hpp"},
}


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "thalweg":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_python_layers(path):
    layer = {name: k for k, names in enumerate(PYTHON) for name in names}
    assert path.stem in layer, f"{path.name} has no layer: add it to the table"
    for name in top_level_imports(path):
        below = layer[name] < layer[path.stem]
        assert below or (path.stem, name) in SIDEWAYS, f"{path.name} must not import {name}"


@pytest.mark.skipif(not (SOURCE / "cpp").is_dir(), reason="the C++ sources are not beside the tests")
def test_cpp_layers():
    headers = sorted((SOURCE / "cpp/include/thalweg").glob("*.hpp"))
    assert {header.name for header in headers} == set(CPP)
    for header in headers:
        text = header.read_text()
        assert set(re.findall(r'#include "thalweg/([\w.]+)"', text)) <= CPP[header.name], header.name
        assert "Eigen" not in re.sub(r"//.*", "", text), f"{header.name} must not need Eigen"
    for unit in (SOURCE / "cpp/src").glob("*_isa.cpp"):
        assert not re.search(r"#include <(vector|string|algorithm|memory|Eigen)", unit.read_text()), unit.name
    for unit in (SOURCE / "cpp").rglob("*.[ch]pp"):
        assert "pybind11" not in unit.read_text(), unit


def test_importing_thalweg_loads_no_heavy_package():
    code = (
        "import sys, thalweg\n"
        "thalweg.Problem, thalweg.Search, thalweg.GPR, thalweg.KMeans, thalweg.Relax, thalweg.Evaluate\n"
        "print([name for name in ('torch', 'cupy', 'ase', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(("module", "stub"), [("_core", "__init__.pyi"), ("_core.cuda", "cuda.pyi")])
def test_the_stub_names_what_the_core_has(module, stub):
    from thalweg import _core

    compiled = _core.cuda if module == "_core.cuda" else _core
    text = (PACKAGE / "_core" / stub).read_text()
    named = {n.name for n in ast.parse(text).body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
    there = {
        name for name in dir(compiled) if not name.startswith("_") and not inspect.ismodule(getattr(compiled, name))
    }
    assert named == there, f"bring python/thalweg/_core/{stub} up to date (pybind11-stubgen thalweg._core)"
