"""Writes fchl19_qmllib.npz: qmllib's FCHL19 of rattled molecules and its gradient, for test_fchl.py.

    pip install qmllib && python tests/data/make_fchl19_qmllib.py

qmllib 1.2.0 was used. Its gradient knows n_fourier = 1 only. Names in the file: MOLECULE_positions (atoms, 3) [angstrom],
MOLECULE_numbers, MOLECULE_SETTINGS (atoms, D) for the settings of test_fchl.py, MOLECULE_gradient (atoms, atoms, 3, D) for
the published ones.
"""

import sys
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from test_fchl import QMLLIB, SETTINGS, qmllib_gradient, qmllib_values

    rng, out = np.random.default_rng(19), {}
    for name in ("H2O", "CH3CH2OH", "C2H2"):
        atoms = molecule(name)
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        out |= {f"{name}_positions": atoms.positions, f"{name}_numbers": atoms.numbers}
        for label, settings in SETTINGS.items():
            out[f"{name}_{label}"] = qmllib_values(atoms, settings)
    water = Atoms(out["H2O_numbers"], out["H2O_positions"])
    out["H2O_gradient"] = qmllib_gradient(water, SETTINGS["published"])
    np.savez_compressed(QMLLIB, **out)


if __name__ == "__main__":
    main()
