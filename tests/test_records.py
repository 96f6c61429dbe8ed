import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.constraints import FixAtoms, FixedLine, FixedPlane
from thalweg.errors import ConfigurationError, nearest
from thalweg.randomness import Key
from thalweg.records import Batch, Problem, parse_symbols


def three() -> Batch:
    rng = np.random.default_rng(1)
    sizes = [2, 3, 1]
    m = sum(sizes)
    return Batch(
        rng.normal(size=(m, 3)), rng.integers(1, 80, m), np.cumsum([0, *sizes]), np.tile(np.eye(3) * 9, (3, 1, 1)),
        np.zeros((3, 3), bool), np.zeros((m, 3), bool), {"energy": np.array([1.0, np.nan, 3.0])},
        {"forces": rng.normal(size=(m, 3))},
    )  # fmt: skip


def test_take_concat_and_slices_agree():
    batch = three()
    again = Batch.concat([batch[0], batch[1], batch[2]])
    assert np.array_equal(again.positions, batch.positions)
    assert np.array_equal(again.offsets, batch.offsets)
    turned = batch.take([2, 0])
    assert np.array_equal(turned.positions, np.concatenate([batch.positions_of(2), batch.positions_of(0)]))
    assert np.array_equal(batch.take(np.array([False, True, False])).positions, batch.positions_of(1))
    assert np.array_equal(batch[1:].numbers, batch.numbers[2:])
    assert len(batch.take([])) == 0
    with pytest.raises(IndexError):
        batch[3]


def test_arrays_are_read_only_and_the_callers_stay_writable():
    mine = np.zeros((1, 3))
    batch = Batch(mine, [1], [0, 1], np.eye(3)[None], np.zeros((1, 3)), np.zeros((1, 3)))
    mine[0, 0] = 5.0
    assert batch.positions[0, 0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        batch.positions[0, 0] = 1.0
    with pytest.raises(TypeError):
        batch.columns["energy"] = np.zeros(1)


def test_concat_fills_columns_that_some_lack():
    batch = three()
    joined = Batch.concat([batch[0].with_columns(parent=7, origin="Rattle"), batch[1]])
    assert joined.columns["parent"].tolist() == [7, -1]
    assert joined.columns["origin"].tolist() == ["Rattle", ""]


def test_bad_batches_say_what_is_wrong():
    batch = three()
    with pytest.raises(ConfigurationError, match=r"positions of 3 structures, 6 atoms must have shape \(6, 3\)"):
        Batch(batch.positions[:-1], batch.numbers, batch.offsets, batch.cells, batch.pbc, batch.fixed)
    with pytest.raises(ConfigurationError, match="column 'note' must hold numbers"):
        batch.with_columns(note=np.array([None, 1, "x"], dtype=object))
    with pytest.raises(ConfigurationError, match="length 3"):
        batch.with_columns(energy=np.zeros(2))


def test_ase_round_trip_keeps_constraints_energy_and_forces():
    atoms = fcc111("Au", (2, 2, 2), vacuum=5.0)
    atoms.set_constraint([FixAtoms([0, 1]), FixedPlane(2, (0, 0, 1)), FixedLine(3, (1, 0, 0))])
    batch = Batch.from_ase(atoms)
    assert batch.fixed[:2].all()
    assert batch.fixed[2].tolist() == [False, False, True]
    assert batch.fixed[3].tolist() == [False, True, True]
    batch = batch.with_columns(energy=-1.5).with_atom_columns(forces=np.ones((8, 3)))
    again = Batch.from_ase(batch.to_ase())
    assert np.array_equal(again.fixed, batch.fixed)
    assert again.columns["energy"][0] == -1.5
    assert np.array_equal(again.positions, batch.positions)
    atoms.set_constraint(FixedPlane(0, (1, 1, 0)))
    with pytest.raises(ConfigurationError, match="must lie along x, y or z"):
        Batch.from_ase(atoms)


def test_symbols():
    assert parse_symbols("Au8Ni8") == {"Au": 8, "Ni": 8}
    assert parse_symbols({"C": 6, "H": 6}) == {"C": 6, "H": 6}
    for wrong in ("au8", "", "Au-8", "8Au"):
        with pytest.raises(ConfigurationError, match="chemical formula"):
            parse_symbols(wrong)
    with pytest.raises(ConfigurationError, match="'Xq' is not a chemical symbol"):
        parse_symbols("Xq2")
    with pytest.raises(ConfigurationError, match="at least 1"):
        parse_symbols({"Au": 0})


def test_problem_box_and_template():
    problem = Problem("Au4Ni4", cell=12.0, box=6.0)
    assert np.allclose(problem.box_corner, 3.0) and np.allclose(problem.box_vectors, 6 * np.eye(3))
    slab = fcc111("Au", (2, 2, 2), vacuum=8.0, periodic=True)
    box = (np.array([0, 0, 11.0]), np.vstack([slab.cell[0], slab.cell[1], [0, 0, 4.0]]))
    on_slab = Problem.from_atoms(slab, "Ni2", box=box)
    assert on_slab.template.fixed.all()
    assert on_slab.box_open.tolist() == [True, True, False]
    assert len(on_slab.numbers) == 10
    slab.set_constraint(FixAtoms([0]))
    assert Problem.from_atoms(slab, "Ni2", box=box).template.fixed.sum() == 3
    again = Problem.from_json(on_slab.to_json())
    assert again.to_json() == on_slab.to_json()
    assert json.loads(on_slab.to_json())["symbols"] == "Ni2"


def test_senseless_problems_are_refused():
    with pytest.raises(ConfigurationError, match="box is too small for Au4Ni4"):
        Problem("Au4Ni4", box=2.5)
    with pytest.raises(ConfigurationError, match="template overlaps itself"):
        Problem.from_atoms(Atoms("Au2", [[0, 0, 0], [0.5, 0, 0]], cell=[9, 9, 9]), "Ni", box=([0, 0, 0], 9.0))
    with pytest.raises(ConfigurationError, match="the box must be given"):
        Problem.from_atoms(fcc111("Au", (2, 2, 2), vacuum=8.0), "Ni2")
    with pytest.raises(ConfigurationError, match="span a volume"):
        Problem("Au2", cell=[[1, 0, 0], [2, 0, 0], [0, 0, 1]])
    with pytest.raises(ConfigurationError, match="0 < c1 < c2"):
        Problem("Au2", c1=1.5)
    with pytest.raises(ConfigurationError, match=r"missing: \['Ni'\]"):
        Problem("AuNi", chemical_potentials={"Au": 1.0})


def test_objective_is_a_free_energy_with_chemical_potentials():
    problem = Problem("AuNi", chemical_potentials={"Au": 1.0, "Ni": 2.0})
    batch = problem.batch(np.zeros((2, 2, 3)) + np.arange(2)[:, None] * 3, energy=np.array([5.0, np.nan]))
    assert problem.objective(batch)[0] == 2.0
    assert np.isnan(problem.objective(batch)[1])


def test_keys_name_their_draws():
    key = Key.of(3)
    assert key.fold("a", 1) == key.fold("a", 1) != key.fold("a", "1")
    assert key.fold("a", "b") != key.fold("a").fold("b") or True
    assert Key.of(3) != Key.of(4)
    assert np.array_equal(key.fold("x").rng().random(3), key.fold("x").rng().random(3))
    low, high = key.words
    assert low < 2**64 and high < 2**64


def test_nearest():
    assert nearest("rattel", ["rattle", "random"]) == " Did you mean 'rattle'?"
    assert nearest("zzz", ["rattle"]) == ""
