"""Writes agox_au2ni2.db: a short random search by AGOX 3.11 (EMT), as AGOX itself stores it.

    pip install agox==3.11.1 && python make_agox_database.py

The file also holds pickles (AGOX's table other_key_values), which thalweg never reads.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from agox import AGOX
from agox.databases import Database
from agox.environments import Environment
from agox.evaluators import LocalOptimizationEvaluator
from agox.generators import RandomGenerator
from ase import Atoms
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms

out = Path(__file__).resolve().parent / "agox_au2ni2.db"
out.unlink(missing_ok=True)
os.chdir(tempfile.mkdtemp())  # AGOX also draws pictures into the working folder

template = Atoms("Au2", [[2.0, 2.0, 2.0], [2.0, 2.0, 4.7]], cell=np.diag([12.0, 13.0, 14.0]), pbc=[True, True, False])
template.set_constraint(FixAtoms([0, 1]))
environment = Environment(
    template=template,
    symbols="Ni2",
    confinement_cell=np.eye(3) * 4.0,
    confinement_corner=np.full(3, 3.0),
)
database = Database(filename=str(out), order=3)
generator = RandomGenerator(environment=environment, **environment.get_confinement(), c1=0.7, order=1)
evaluator = LocalOptimizationEvaluator(
    EMT(),
    gets={"get_key": "candidates"},
    optimizer_run_kwargs={"fmax": 0.1, "steps": 3},
    store_trajectory=True,
    order=2,
)
AGOX(generator, database, evaluator, seed=1).run(N_iterations=4)
