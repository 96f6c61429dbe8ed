"""The built-in Tersoff potential: values of ASE's calculator and of LAMMPS, derivatives, files, bad input."""

import copy
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene
from test_potentials import cluster, evaluate, pack, rattled
from thalweg import _core
from thalweg.calculators import Tersoff, landscape_of, make_calculator, read_tersoff
from thalweg.errors import ConfigurationError
from thalweg.search import describe

ase_tersoff = pytest.importorskip("ase.calculators.tersoff", reason="ASE has Tersoff since 3.25")
NAMES = ("m", "gamma", "lambda3", "c", "d", "h", "n", "beta", "lambda2", "B", "R", "D", "lambda1", "A")
SYMBOLS = {5: "B", 6: "C", 7: "N", 14: "Si"}

# J. Tersoff, Phys. Rev. B 37, 6991 (1988), silicon: lambda3 and a large n at work.
SILICON = {
    ("Si", "Si", "Si"): (
        3.0, 1.0, 1.3258, 4.8381, 2.0417, 0.0, 22.956, 0.33675, 1.3258, 95.373, 3.0, 0.2, 3.2394, 3264.7,
    )
}  # fmt: skip
# Two species with numbers of their own for every triplet: which entry is used where.
UNEQUAL = {
    (a, b, c): (
        3.0 if c == "Si" else 1.0, 0.9 + 0.1 * (b == "Si"), 0.3 * (a == "Si"), 50.0 + 20 * (c == "C"), 5.0,
        -0.5 + 0.1 * (c == "C"), 0.8 + 0.3 * (a == "C"), 0.01, 1.6, 120.0 + 9 * (a == b), 2.3 + 0.3 * (b == "Si"),
        0.2 + 0.1 * (c == "Si"), 2.6, 900.0 + 50 * (a == b),
    )
    for a in ("C", "Si")
    for b in ("C", "Si")
    for c in ("C", "Si")
}  # fmt: skip


def parameters(name):
    """{(symbol, symbol, symbol): numbers} of a published set or one of those above."""
    if name in ("silicon", "unequal"):
        return {"silicon": SILICON, "unequal": UNEQUAL}[name]
    return {tuple(SYMBOLS[z] for z in key): values for key, values in _core.Tersoff(name).entries.items()}


class WithoutThird(ase_tersoff.Tersoff):
    """ASE's calculator fails where a bond has no third atom near and n < 1: it divides 0 by 0 in db/dzeta, which goes
    with dzeta = 0 in the forces."""

    def _calc_bij_d(self, zeta, beta, n):
        return 0.0 if zeta == 0 else super()._calc_bij_d(zeta, beta, n)


def ase_calculator(name, kind=ase_tersoff.Tersoff):
    return kind({key: ase_tersoff.TersoffParameters(*v) for key, v in parameters(name).items()})


def sheet(symbols, bond, repeats=(2, 2), pbc=(True, True, False)):
    one, other = symbols
    atoms = graphene(formula=f"{one}2", a=np.sqrt(3) * bond, size=(*repeats, 1), vacuum=6.0)
    atoms.symbols[1::2] = other
    atoms.pbc = pbc
    return atoms


def skewed(symbols, seed, pbc):
    """Few atoms in a small cell: images of others and of the atom itself are neighbours."""
    rng = np.random.default_rng(seed)
    while True:
        cell = 2.6 * np.eye(3) + rng.uniform(-0.5, 0.5, (3, 3))
        atoms = Atoms(symbols, rng.uniform(-0.7, 1.7, (len(symbols), 3)) @ cell, cell=cell, pbc=pbc)
        images = atoms.copy()
        images.pbc = True
        distances = images.repeat(3).get_all_distances()
        if distances[np.triu_indices(len(distances), 1)].min() > 1.1:
            return atoms


def cases():
    carbon = {
        "cluster": cluster(["C"] * 12, 1, edge=3.6, closest=1.2),
        "diamond": bulk("C", cubic=True),
        "rattled diamond": rattled(bulk("C", cubic=True), 2, 0.1),
        "two atom diamond": bulk("C"),
        "graphene": sheet("CC", 1.46),
        "rattled graphene": rattled(sheet("CC", 1.44, (3, 2)), 3, 0.1),
        "ribbon": rattled(sheet("CC", 1.44, (3, 2), (False, True, False)), 4, 0.05),
        "flake": rattled(sheet("CC", 1.44, (3, 3), (False, False, False)), 5, 0.05),
        **{f"skewed {k}": skewed("CC", k, [bool(k & 1), bool(k & 2), bool(k & 4)]) for k in range(8)},
    }
    nitride = {
        "cluster": cluster(list("BNBNBNBBNN"), 6, edge=3.4, closest=1.2),
        "sheet": sheet("BN", 1.45),
        "rattled sheet": rattled(sheet("BN", 1.45, (3, 2)), 7, 0.1),
        "zincblende": rattled(bulk("BN", "zincblende", a=3.62, cubic=True), 8, 0.1),
        "ribbon": rattled(sheet("BN", 1.45, (3, 2), (True, False, False)), 9, 0.05),
        **{f"skewed {k}": skewed("BN", 50 + k, [bool(k & 1), bool(k & 2), bool(k & 4)]) for k in range(1, 8)},
    }
    mixed = rattled(sheet("BN", 1.45, (3, 2)), 10, 0.1)
    mixed.symbols[:5] = "C"
    for name in ("C", "C-2010", "BNC"):
        yield from ((f"{name}: {what}", (name, atoms)) for what, atoms in carbon.items())
    for name in ("BN", "BNC"):
        yield from ((f"{name}: {what}", (name, atoms)) for what, atoms in nitride.items())
    yield "BNC: mixed sheet", ("BNC", mixed)
    yield "BNC: mixed cluster", ("BNC", cluster(list("BNCCBNBNC"), 11, edge=3.2, closest=1.2))
    yield "silicon: bulk", ("silicon", rattled(bulk("Si", cubic=True), 12))
    yield "silicon: cluster", ("silicon", cluster(["Si"] * 9, 13, edge=4.5))
    yield "unequal: cluster", ("unequal", cluster(["C", "Si"] * 5, 14, edge=4.0, closest=1.5))
    yield "unequal: bulk", ("unequal", rattled(bulk("SiC", "zincblende", a=4.35, cubic=True), 15))


CASES = dict(cases())


@pytest.mark.parametrize("case", CASES)
def test_values_of_ase(case):
    name, atoms = CASES[case]
    atoms = atoms.copy()
    atoms.calc = ase_calculator(name, WithoutThird)
    ours = Tersoff(parameters=parameters(name) if name in ("silicon", "unequal") else name)
    copied = atoms.copy()
    copied.calc = ours
    forces = atoms.get_forces()
    scale = max(1.0, np.abs(forces).max() / 100)
    assert np.abs(forces).max() > 1e-3 or "rattled" not in case
    assert copied.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-8 * scale)
    np.testing.assert_allclose(copied.get_forces(), forces, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("case", [case for case in CASES if "skewed" not in case])
def test_forces_are_the_derivative(case):
    # within 1e-8 of the largest force; Richardson's extrapolation removes the step's error
    name, atoms = CASES[case]
    if case == "BNC: mixed cluster" or case == "BNC: cluster":
        step = 2e-6  # g of B-B has a width of 0.0016 in the cosine
    else:
        step = 1e-4
    landscape = Tersoff(parameters=parameters(name)).landscape
    rng = np.random.default_rng(7)
    _, forces = evaluate(landscape, atoms)

    def energy(direction, by):
        moved = atoms.copy()
        moved.positions += by * direction
        return evaluate(landscape, moved)[0]

    for _ in range(3):
        u = rng.normal(size=forces.shape)
        u /= np.linalg.norm(u)
        slope = lambda h: (energy(u, h) - energy(u, -h)) / (2 * h)  # noqa: E731, B023
        numerical = (4 * slope(step) - slope(2 * step)) / 3
        tolerance = 1e-8 if step == 1e-4 else 1e-7
        assert abs(numerical + np.sum(forces * u)) < tolerance * max(np.abs(forces).max(), 10.0)


def test_laws():
    for name, what in [("C", "rattled graphene"), ("BN", "zincblende"), ("BNC", "mixed sheet")]:
        landscape = Tersoff(parameters=name).landscape
        atoms = CASES[f"{name}: {what}"][1]
        energy, forces = evaluate(landscape, atoms)
        repeats = [2 if periodic else 1 for periodic in atoms.pbc]
        many, copies = evaluate(landscape, atoms.repeat(repeats))
        assert many == pytest.approx(np.prod(repeats) * energy, rel=1e-12)
        np.testing.assert_allclose(copies, np.tile(forces, (np.prod(repeats), 1)), rtol=0, atol=1e-9)
        np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-9)
        order = np.random.default_rng(3).permutation(len(atoms))
        again, moved = evaluate(landscape, atoms[order])
        assert again == pytest.approx(energy, rel=1e-12)
        np.testing.assert_allclose(moved, forces[order], rtol=0, atol=1e-10 * np.abs(forces).max())
        turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
        turned = Atoms(atoms.symbols, atoms.positions @ turn.T, cell=np.asarray(atoms.cell) @ turn.T, pbc=atoms.pbc)
        again, moved = evaluate(landscape, turned)
        assert again == pytest.approx(energy, rel=1e-12)
        np.testing.assert_allclose(moved, forces @ turn.T, rtol=0, atol=1e-9 * np.abs(forces).max())


def test_the_same_bits_for_any_batch_and_number_of_threads():
    landscape = _core.Tersoff("BNC")
    structures = [atoms for name, atoms in CASES.values() if name == "BNC"] * 3
    batch = pack(structures)
    energies, forces = _core.evaluate(landscape, batch, threads=1)
    for threads in (2, 3, 8):
        e, f = _core.evaluate(landscape, batch, threads=threads)
        assert np.array_equal(e, energies) and np.array_equal(f, forces)
    for k, atoms in enumerate(structures):
        e, f = evaluate(landscape, atoms)
        assert e == energies[k] and np.array_equal(f, forces[batch.offsets[k] : batch.offsets[k + 1]])


def test_senseless_positions_and_coinciding_atoms_are_rows_without_energy():
    good = CASES["C: rattled diamond"][1]
    nan, far, same = good.copy(), good.copy(), good.copy()
    nan.positions[1, 2] = np.nan
    far.positions[0, 0] = np.inf
    same.positions[3] = same.positions[0]
    n = len(good)
    energies, forces = _core.evaluate(_core.Tersoff("C"), pack([good, nan, far, same, good]))
    assert np.isfinite(energies[[0, 4]]).all() and energies[0] == energies[4]
    assert np.isnan(energies[1:4]).all() and np.isnan(forces[n : 4 * n]).all()
    assert np.isfinite(forces[:n]).all() and np.isfinite(forces[4 * n :]).all()


def test_one_pair_and_one_atom():
    # where a bond has no third atom b = 1, whatever n
    A, lambda1, B, lambda2 = 1393.6, 3.4879, 346.74, 2.2119
    energy, forces = evaluate(_core.Tersoff("C"), Atoms("C2", [[0, 0, 0], [1.4, 0, 0]]))
    assert energy == pytest.approx(A * np.exp(-lambda1 * 1.4) - B * np.exp(-lambda2 * 1.4), rel=1e-13)
    assert forces[0, 0] == -forces[1, 0] and forces[0, 1] == 0
    energy, forces = evaluate(_core.Tersoff("C"), Atoms("C", [[0, 0, 0]]))
    assert energy == 0 and np.all(forces == 0)


REFERENCE = Path(__file__).parent / "data" / "tersoff_lammps.json"


def test_values_of_lammps():
    # numbers of LAMMPS itself: tests/data/tersoff_lammps.py made them
    reference = json.loads(REFERENCE.read_text())
    assert len(reference["cases"]) >= 8
    for case in reference["cases"]:
        atoms = Atoms(case["symbols"], case["positions"], cell=case["cell"], pbc=case["pbc"])
        energy, forces = evaluate(Tersoff(parameters=parameters(case["parameters"])).landscape, atoms)
        assert energy == pytest.approx(case["energy"], rel=1e-11, abs=1e-9), case["name"]
        np.testing.assert_allclose(forces, case["forces"], rtol=0, atol=1e-7, err_msg=case["name"])


def test_published_sets_are_symmetric_where_lammps_needs_it():
    for name in _core.Tersoff.names():
        entries = parameters(name)
        for (a, b, c), values in entries.items():
            if b == c:
                here, there = (dict(zip(NAMES, v, strict=True)) for v in (values, entries[b, a, a]))
                assert all(here[key] == there[key] for key in ("A", "lambda1", "R", "D")), (name, a, b)


def test_sheets_have_their_known_energies():
    # lowest energy per atom [eV] and bond [angstrom] of flat sheets; Los et al. give -6.690 and 1.4457 for hBN
    for name, symbols, energy, bond in [
        ("C", "CC", -7.3955, 1.4606),
        ("C-2010", "CC", -7.9777, 1.4388),
        ("BN", "BN", -6.69, 1.4457),
        ("BNC", "BN", -7.5069, 1.4421),
    ]:
        bonds = np.arange(1.38, 1.52, 1e-4)
        energies = _core.evaluate(_core.Tersoff(name), pack([sheet(symbols, b, (1, 1)) for b in bonds]))[0] / 2
        print(f"{name}: {energies.min():.4f} eV/atom at {bonds[energies.argmin()]:.4f} angstrom")
        assert energies.min() == pytest.approx(energy, abs=1e-3)
        assert bonds[energies.argmin()] == pytest.approx(bond, abs=1e-3)


def test_like_pairs_of_bnc_have_no_core():
    # what the documentation warns of: as published, N-N and B-B of BNC only attract
    for pair in ("N2", "B2"):
        near, bond = (Atoms(pair, [[0, 0, 0], [r, 0, 0]]) for r in (0.2, 1.3))
        assert evaluate(_core.Tersoff("BNC"), near)[0] < evaluate(_core.Tersoff("BNC"), bond)[0] < 0
        assert evaluate(_core.Tersoff("BN"), near)[0] > 100 > 0 > evaluate(_core.Tersoff("BN"), bond)[0]


# ---- the calculator ------------------------------------------------------------------------------------------

LAMMPS_FILE = """# DATE: 2026-01-01 UNITS: metal CITATION: none
# a comment
C   C    C   3.0 1.0 0.0 38049  4.3484   -.57058 .72751   # and another
             0.00000015724 2.2119  346.74   1.95   0.15   3.4879  1393.6

Si  C   C   3.0 1.0 0.0 100390 16.217 -.59825 .787340 0.0000011 1.97205 395.126 2.36 0.15 2.9839 1597.3111
Si  C   Si  3.0 1.0 0.0 100390 16.217 -.59825 0.0 0.0 0.0 0.0 2.85 1.5d-1 0.0 0.0
"""


def test_files(tmp_path):
    path = tmp_path / "some.tersoff"
    path.write_text(LAMMPS_FILE)
    entries = read_tersoff(path)
    assert list(entries) == [("C", "C", "C"), ("Si", "C", "C"), ("Si", "C", "Si")]
    assert entries["C", "C", "C"] == parameters("C")["C", "C", "C"]
    assert entries["Si", "C", "Si"][10:12] == (2.85, 0.15)
    atoms = CASES["C: rattled diamond"][1]
    for given in (str(path), path, entries):
        assert evaluate(Tersoff(parameters=given).landscape, atoms)[0] == evaluate(_core.Tersoff("C"), atoms)[0]
    for text, message in [
        ("", "no Tersoff parameters"),
        ("# UNITS: real\n" + LAMMPS_FILE, "line 1: units are 'real', only metal"),
        (LAMMPS_FILE.replace("346.74", "many"), "line 4: expected a number, got 'many'"),
        (LAMMPS_FILE.replace("346.74", "nan"), "line 4: expected a number, got 'nan'"),
        (LAMMPS_FILE.replace("346.74", ""), "line 6: an entry starts with three|expected a number, got 'Si'"),
        (LAMMPS_FILE.replace("Si  C   C ", "Si(D) C C"), "line 6: .*'Si\\(D\\)' is none"),
        (LAMMPS_FILE.replace("Si  C   C ", "C C C"), "line 6: the entry C C C comes twice"),
        (LAMMPS_FILE.rsplit(" ", 3)[0], "line 7: an entry has three symbols and 14 numbers, this has 14 words"),
        (LAMMPS_FILE.replace("346.74", "-346.74"), "Tersoff C-C-C needs a finite B of at least 0"),
        (LAMMPS_FILE.replace("C   C    C   3.0", "C C C 2.5"), "m = 1 or m = 3"),
    ]:
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=message):
            read_tersoff(path)
    path.write_bytes(b"\xff\xfe\x00C")
    with pytest.raises(ConfigurationError, match="not a text file"):
        read_tersoff(path)
    with pytest.raises(ConfigurationError, match="is not a file"):
        read_tersoff(tmp_path)
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_tersoff(tmp_path / "none")


def test_calculator(tmp_path):
    atoms = CASES["C: graphene"][1].copy()
    atoms.calc = Tersoff()
    assert atoms.calc.parameters == {"parameters": "C"}
    first = atoms.get_potential_energy()
    assert atoms.get_potential_energy(force_consistent=True) == first
    assert atoms.calc.set(parameters="C") == {}
    atoms.calc.set(parameters="C-2010")
    second = atoms.get_potential_energy()
    assert second < first - 0.1
    with pytest.raises(ConfigurationError, match=r"no parameters named 'C-2011'.*Did you mean 'C-2010'"):
        atoms.calc.set(parameters="C-2011")
    assert atoms.get_potential_energy() == second
    assert isinstance(make_calculator("tersoff", parameters="BN"), Tersoff)
    for arguments, message in [
        ({"parameter": "C"}, "no argument named 'parameter'. Did you mean 'parameters'"),
        ({"parameters": 3}, "a name, a file or a table"),
        ({"parameters": {("C", "C", "C"): (1.0, 2.0)}}, "three symbols and the numbers m, gamma"),
        ({"parameters": {("C", "C"): (1.0,) * 14}}, "three symbols and the numbers m, gamma"),
        ({"parameters": {}}, "there is no entry"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            make_calculator("tersoff", **arguments)
    with pytest.raises(ConfigurationError, match="no entry for"):
        Atoms("CO", [[0, 0, 0], [1.2, 0, 0]], calculator=Tersoff()).get_potential_energy()

    # a copy needs no file, and a store sees what is in it
    path = tmp_path / "some.tersoff"
    path.write_text(LAMMPS_FILE)
    calculator = Tersoff(parameters=path)
    text = describe(calculator)
    path.write_text(LAMMPS_FILE.replace("346.74", "346.75"))
    assert describe(Tersoff(parameters=path)) != text and describe(Tersoff()) == {"Tersoff": {"parameters": "C"}}
    path.unlink()
    for copied in (pickle.loads(pickle.dumps(calculator)), copy.deepcopy(calculator)):
        assert evaluate(copied.landscape, atoms)[0] == first and describe(copied) == text
    repeated = eval(repr(calculator.landscape), {"Tersoff": _core.Tersoff})
    assert repeated.entries == calculator.landscape.entries


def test_landscape_of_recognises_ases_calculator():
    atoms = CASES["BN: rattled sheet"][1]
    assert evaluate(landscape_of(ase_calculator("BN")), atoms)[0] == evaluate(_core.Tersoff("BN"), atoms)[0]
    assert isinstance(landscape_of(Tersoff(parameters="BN")), _core.Tersoff)
    assert landscape_of(ase_tersoff.Tersoff({})) is None

    class Changed(ase_tersoff.Tersoff):
        pass

    assert landscape_of(Changed(ase_calculator("BN").parameters)) is None


def seconds_per_call(calculator, atoms, calls):
    atoms = atoms.copy()
    atoms.calc = calculator
    times = []
    for k in range(calls):
        atoms.positions[0, 0] += 1e-4 * (-1) ** k
        begin = time.process_time()
        atoms.get_forces()
        times.append(time.process_time() - begin)
    return float(np.median(times))


def test_speed_beside_ase():
    # printed with pytest -s; nothing is asserted about time
    for name, symbols, repeats in [("C", "CC", (3, 4)), ("BN", "BN", (4, 4))]:
        atoms = rattled(sheet(symbols, 1.45, repeats), 1, 0.05)
        landscape, batch = _core.Tersoff(name), pack([atoms] * 100)
        begin = time.process_time()
        _core.evaluate(landscape, batch, threads=1)
        core = (time.process_time() - begin) / 100
        ours = seconds_per_call(Tersoff(parameters=name), atoms, 200)
        theirs = seconds_per_call(ase_calculator(name), atoms, 5)
        print(
            f"Tersoff {name}, sheet of {len(atoms)} atoms, energy and forces: core {1e6 * core:.0f} us (lists included), "
            f"calculator {1e6 * ours:.0f} us, ASE's {1e3 * theirs:.1f} ms ({theirs / core:.0f} x, {theirs / ours:.0f} x)"
        )
