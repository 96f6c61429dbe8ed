"""thalweg finds the lowest-energy arrangement of atoms in as few energy evaluations as can be.

    from thalweg import Problem, recipes
    from thalweg.calculators import EMT

    search = recipes.gofee(Problem("Au4Ni4", cell=12.0, box=6.0), EMT(), store="au4ni4.journal", seed=1)
    found = search.run(60)

Importing thalweg loads NumPy and the compiled core; ASE and SciPy follow when something needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thalweg._core import __version__

if TYPE_CHECKING:
    from thalweg import recipes
    from thalweg.agent import Agent, Build, Policy, Rebuild, Snap
    from thalweg.callbacks import Print, StopAfter, StopAt
    from thalweg.descriptors import FCHL19, SOAP, Fingerprint, LocalDensity
    from thalweg.errors import BackendUnavailable, ConfigurationError, Stop, StoreError, ThalwegError
    from thalweg.evaluate import AcceptLower, Duplicate, Evaluate, Metropolis
    from thalweg.generators import AlongForces, ComplementaryEnergy, FirstOf, OneOf, Permute, Random, Rattle, Unchosen
    from thalweg.grid import Grid, GridSettings
    from thalweg.local_model import LocalGPR
    from thalweg.model_choice import ChosenModel
    from thalweg.models import GPR
    from thalweg.pool import Guarded
    from thalweg.priors import CalculatorPrior, FittedPrior
    from thalweg.records import Asked, Batch, Context, Problem, Step
    from thalweg.refine import Centre, Connected, MinDistance, Relax, SurrogateHops, Wrap
    from thalweg.search import Found, Search
    from thalweg.select import (
        LCB,
        Best,
        ExpectedImprovement,
        KernelSimilarity,
        KMeans,
        LastAccepted,
        Novelty,
        Population,
        Remembering,
        Thompson,
    )
    from thalweg.stagnation import ResetOnStagnation
    from thalweg.store import History, Store, open_runs

# name -> module that holds it; the module is loaded when the name is first used (PEP 562)
_WHERE = {
    name: module
    for module, names in {
        "agent": "Agent Build Policy Rebuild Snap",
        "callbacks": "Print StopAfter StopAt",
        "descriptors": "FCHL19 SOAP Fingerprint LocalDensity",
        "errors": "BackendUnavailable ConfigurationError Stop StoreError ThalwegError",
        "evaluate": "AcceptLower Duplicate Evaluate Metropolis",
        "grid": "Grid GridSettings",
        "generators": "AlongForces ComplementaryEnergy FirstOf OneOf Permute Random Rattle Unchosen",
        "local_model": "LocalGPR",
        "models": "GPR",
        "priors": "CalculatorPrior FittedPrior",
        "pool": "Guarded",
        "records": "Asked Batch Context Problem Step",
        "refine": "Centre Connected MinDistance Relax SurrogateHops Wrap",
        "search": "Found Search",
        "select": "LCB Best ExpectedImprovement KMeans KernelSimilarity LastAccepted Novelty Population Remembering "
        "Thompson",
        "stagnation": "ResetOnStagnation",
        "model_choice": "ChosenModel",
        "store": "History Store open_runs",
    }.items()
    for name in names.split()
}
_MODULES = ("calculators", "descriptors", "kernels", "networks", "pool", "recipes", "testing")

__all__ = ["__version__", *_WHERE, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"thalweg.{name}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"thalweg.{_WHERE[name]}"), name)
    from thalweg.errors import nearest

    raise AttributeError(f"thalweg has no '{name}'.{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
