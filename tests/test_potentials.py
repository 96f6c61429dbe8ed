"""Built-in potentials: values of ASE's calculators, derivatives, laws, bad input."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT as AseEMT
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.data import atomic_numbers
from ase.neighborlist import neighbor_list
from thalweg import Evaluate, Problem, Random, Search, _core
from thalweg.calculators import EMT, LennardJones, SmoothCarbon, landscape_of, make_calculator
from thalweg.errors import ConfigurationError, ThalwegError

METALS = ["Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt"]
EVERY = [*METALS, "H", "C", "N", "O"]


def pack(structures):
    sizes = [len(a) for a in structures]
    return SimpleNamespace(
        positions=np.concatenate([a.positions for a in structures]),
        numbers=np.concatenate([a.numbers for a in structures]),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        cells=np.array([np.asarray(a.cell) for a in structures]),
        pbc=np.array([a.pbc for a in structures]),
        fixed=np.zeros((sum(sizes), 3), dtype=bool),
    )


def evaluate(landscape, atoms):
    energies, forces = _core.evaluate(landscape, pack([atoms]), threads=1)
    return energies[0], forces


def cluster(symbols, seed, edge=6.0, closest=1.8):
    rng = np.random.default_rng(seed)
    positions = []
    while len(positions) < len(symbols):
        x = rng.uniform(0, edge, 3)
        if all(np.linalg.norm(x - y) > closest for y in positions):
            positions.append(x)
    return Atoms(symbols, positions, cell=[12, 12, 12])


def skewed(symbols, seed, pbc):
    """Atoms inside and outside a small skewed cell: an atom sees several images of others and of itself."""
    rng = np.random.default_rng(seed)
    cell = 4.5 * np.eye(3) + rng.uniform(-1.2, 1.2, (3, 3))
    for _ in range(10000):
        scaled = rng.uniform(-0.7, 1.7, (len(symbols), 3))
        atoms = Atoms(symbols, scaled @ cell, cell=cell, pbc=pbc)
        pairs = neighbor_list("d", atoms, 1.6)
        if len(pairs) == 0:
            return atoms
    raise AssertionError("no such structure")


def rattled(atoms, seed, amplitude=0.15):
    atoms = atoms.copy()
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, atoms.positions.shape)
    return atoms


def cases():
    yield "Au4Ni4", cluster(["Au"] * 4 + ["Ni"] * 4, 1)
    for k in range(6):
        symbols = np.random.default_rng(k).choice(EVERY, 9)
        yield f"mixture {k}", cluster(list(symbols), 10 + k)
    for symbol in EVERY:
        yield f"dimer and atom {symbol}", Atoms([symbol] * 3, [[0, 0, 0], [1.9, 0.3, 0], [30, 0, 0]])
    for symbol in METALS:
        yield f"bulk {symbol}", rattled(bulk(symbol, cubic=True), 3)
    yield "one atom cell", bulk("Cu")
    yield "slab", rattled(fcc111("Au", (2, 3, 3), vacuum=7.0, periodic=False), 4)
    corners = [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0, 0]]
    yield "ordered alloy", rattled(Atoms("Cu3Au", scaled_positions=corners, cell=[3.75] * 3, pbc=True), 5)
    for k in range(8):
        pbc = [bool(k & 1), bool(k & 2), bool(k & 4)]
        yield f"skewed {pbc}", skewed(["Au", "Ni", "Pt", "Al"], 20 + k, pbc)
    yield "molecule", molecule("CH3CH2OH")


CASES = dict(cases())
PERIODIC = ["bulk Au", "slab", "ordered alloy", *[name for name in CASES if name.startswith("skewed")]]


@pytest.mark.parametrize("name", CASES)
def test_emt_has_the_values_of_ase(name):
    atoms = CASES[name].copy()
    energy, forces = evaluate(_core.Emt(), atoms)
    atoms.calc = AseEMT()
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    np.testing.assert_allclose(forces, atoms.get_forces(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rc": 2.13},
        {"smooth": True},
        {"sigma": 0.8, "epsilon": 2.5, "rc": 2.4, "ro": 1.9, "smooth": True},
    ],
)
def test_lennard_jones_has_the_values_of_ase(settings):
    rng = np.random.default_rng(0)
    clusters = [cluster(["Ar"] * n, n, edge=1.2 * n ** (1 / 3), closest=0.75) for n in (2, 7, 8, 9, 38)]
    big = Atoms(["Ar"] * 125, 1.1 * np.indices((5, 5, 5)).reshape(3, -1).T + rng.normal(0, 0.05, (125, 3)))
    tiny = Atoms(["Ar"] * 2, [[0, 0, 0], [0.9, 0.5, 0.4]], cell=[[1.5, 0, 0], [0.4, 1.6, 0], [0.2, 0.5, 1.7]])
    periodic = []
    for k in range(8):
        periodic.append(tiny.copy())
        periodic[-1].pbc = [bool(k & 1), bool(k & 2), bool(k & 4)]
    for atoms in [*clusters, big, *periodic]:
        calculator = LennardJones(**settings)
        ours = atoms.copy()
        ours.calc = calculator
        atoms.calc = AseLennardJones(**settings)
        scale = max(1.0, np.abs(atoms.get_forces()).max())
        assert ours.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), rel=1e-11, abs=1e-9)
        np.testing.assert_allclose(ours.get_forces(), atoms.get_forces(), rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("name", PERIODIC)
def test_neighbor_pairs_are_those_of_ase(name):
    atoms = CASES[name]
    i, j, d, r = _core.neighbor_pairs(pack([atoms]), 8.0)
    reference = neighbor_list("ijD", atoms, 8.0)
    both = np.column_stack([np.concatenate([i, j]), np.concatenate([j, i]), np.concatenate([d, -d])])
    other = np.column_stack([reference[0], reference[1], reference[2]])
    key = lambda rows: rows[np.lexsort(np.round(rows, 6).T)]  # noqa: E731
    assert len(i) >= 3
    np.testing.assert_allclose(key(both), key(other), rtol=0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(d, axis=1), r, rtol=1e-14)


def test_a_followed_structure_has_the_pairs_of_a_new_one():
    atoms = CASES[PERIODIC[0]].copy()
    following = _core.NeighborList(6.0, skin=0.5)
    rng = np.random.default_rng(3)
    for step in range(12):
        atoms.positions += rng.normal(0, 0.05, atoms.positions.shape)
        for mine, new in zip(following.update(pack([atoms])), _core.neighbor_pairs(pack([atoms]), 6.0), strict=True):
            np.testing.assert_array_equal(mine, new)
        if step == 0:
            assert following.rebuilds == 1
    assert 1 < following.rebuilds < 12  # moved beyond half the skin at times, not at every step
    with pytest.raises(ValueError, match="holds 2"):
        following.update(pack([Atoms("Au"), Atoms("Au")]))


def numpy_prior(atoms, form, cutoff=0.0, depth=0.8, stiffness=4.0, scale=1.0, factor=0.7, sharp=False):
    """The formulas of potentials.hpp, pair by pair."""
    from ase.data import covalent_radii

    i, j, r = neighbor_list("ijd", atoms, cutoff or (3.0 if form == "repulsive" else 10.0))
    radius = scale * (covalent_radii[atoms.numbers[i]] + covalent_radii[atoms.numbers[j]])
    if form == "bonding":
        end = np.full(len(r), cutoff) if cutoff else 2.5 * radius
        start = np.minimum(1.6 * radius, 0.64 * end)
        a = stiffness / radius
        energy = depth * (np.exp(-2 * a * (r - radius)) - 2 * np.exp(-a * (r - radius)))
    else:
        end = np.full(len(r), cutoff or 3.0)
        start = 0.75 * end
        energy = 1 / (r + 1 - factor * radius) ** 12
    t = np.clip((r - start) / (end - start), 0, 1)
    return 0.5 * np.sum(energy if sharp else energy * (1 - 10 * t**3 + 15 * t**4 - 6 * t**5))


PRIORS = [
    ({"form": "bonding"}, {}),
    (
        {"form": "bonding", "depth": 0.5, "stiffness": 6.0, "radius_scale": 1.1, "cutoff": 4.0},
        {"depth": 0.5, "stiffness": 6.0, "scale": 1.1, "cutoff": 4.0},
    ),
    ({"form": "repulsive"}, {}),
    ({"form": "repulsive", "repulsive_factor": 0.8, "cutoff": 3.5}, {"factor": 0.8, "cutoff": 3.5}),
    ({"form": "repulsive", "sharp_cutoff": True}, {"sharp": True}),
]


@pytest.mark.parametrize(("settings", "reference"), PRIORS)
@pytest.mark.parametrize("name", ["Au4Ni4", "molecule", "bulk Au", "skewed [True, True, False]"])
def test_pair_prior_has_the_values_of_its_formula(name, settings, reference):
    energy, _ = evaluate(_core.PairPrior(**settings), CASES[name])
    expected = numpy_prior(CASES[name], settings["form"], **reference)
    assert abs(expected) > 1e-3
    assert energy == pytest.approx(expected, rel=1e-12)


def many_body(depth=0.7, stiffness=4.5, scale=0.97, exponent=0.7):
    """Wells of every pair of species in these tests, deeper for the heavier, whose exponents differ."""
    numbers = sorted(atomic_numbers[name] for name in EVERY)
    return _core.ManyBodyPrior(
        {
            (a, b): (
                depth + 0.001 * (a + b),
                scale * (_core.covalent_radius(a) + _core.covalent_radius(b)),
                stiffness,
                2.0 + 0.01 * (a % 9),
            )
            for a in numbers
            for b in numbers
            if a <= b
        },
        {z: exponent + 0.01 * (z % 20) for z in numbers},
    )


def landscapes():
    return {
        "emt": _core.Emt(),
        "lj": _core.LennardJones(2.3, 0.4, smooth=True),
        "bonding": _core.PairPrior(),
        "repulsive": _core.PairPrior("repulsive"),
        "many body": many_body(),
    }


@pytest.mark.parametrize("which", landscapes())
@pytest.mark.parametrize("name", ["Au4Ni4", "slab", "bulk Al", "skewed [True, False, True]"])
def test_forces_are_the_derivative(which, name):
    # within 1e-8 of the largest force; Richardson's extrapolation removes the step's error
    landscape, atoms = landscapes()[which], CASES[name]
    rng = np.random.default_rng(7)
    _, forces = evaluate(landscape, atoms)

    def energy(direction, step):
        moved = atoms.copy()
        moved.positions += step * direction
        return evaluate(landscape, moved)[0]

    for _ in range(3):
        u = rng.normal(size=forces.shape)
        u /= np.linalg.norm(u)
        slope = lambda h: (energy(u, h) - energy(u, -h)) / (2 * h)  # noqa: E731, B023
        numerical = (4 * slope(1e-3) - slope(2e-3)) / 3
        assert abs(numerical + np.sum(forces * u)) < 1e-8 * max(np.abs(forces).max(), 1.0)


def numpy_many_body(atoms, pairs, exponents):
    """The formula of potentials.hpp, atom by atom, with the smooth cutoff of potentials_kernels.hpp."""
    longest = max(r0 for _, r0, *_ in pairs.values())
    i, j, r = neighbor_list("ijd", atoms, 2.8 * longest)
    table = np.array(
        [pairs[tuple(sorted((int(a), int(b))))] for a, b in zip(atoms.numbers[i], atoms.numbers[j], strict=True)]
    )
    depth, r0, q, ratio = table.T
    p, g, x = ratio * q, np.array([exponents[int(z)] for z in atoms.numbers]), r / r0 - 1
    w = 1 / (1 + np.exp(11.5 * (r - 2.2 * longest) / (0.6 * longest)))
    repulsion = w * 0.5 * depth * q / (p - q) * np.exp(-p * x)
    bonds = w * (0.5 * depth * p / (p - q) * np.exp(-q * x)) ** (1 / g[i])
    return repulsion.sum() - np.sum(6.0 ** (1 - g) * np.bincount(i, bonds, len(atoms)) ** g)


@pytest.mark.parametrize("exponent", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("name", ["Au4Ni4", "molecule", "bulk Au", "slab", "skewed [True, True, False]"])
def test_many_body_prior_has_the_values_of_its_formula(name, exponent):
    # the list ends where 1e-5 of a bond is left: neighbours there may fall on either side of the rounded cutoff
    prior = many_body(exponent=exponent)
    expected = numpy_many_body(CASES[name], prior.pairs, prior.exponents)
    assert abs(expected) > 1e-3
    assert evaluate(prior, CASES[name])[0] == pytest.approx(expected, rel=1e-10)


def test_many_body_prior_with_exponent_one_and_ratio_two_is_the_bonding_prior():
    """Inside both cutoffs: compact clusters; of the switches 1e-6 is left there."""
    scale = 1.03
    radius = {z: scale * _core.covalent_radius(z) for z in (28, 79)}
    pairs = {(a, b): (0.6, radius[a] + radius[b], 5.0, 2.0) for a, b in ((79, 79), (79, 28), (28, 28))}
    prior = _core.ManyBodyPrior(pairs, {79: 1.0, 28: 1.0})
    triangles = [Atoms("AuNi2", [[0, 0, 0], [2.4 + x, 0, 0], [1.1, 2.3 + x, 0]]) for x in (0, 0.3, 0.6)]
    ours = _core.evaluate(prior, pack(triangles))
    theirs = _core.evaluate(_core.PairPrior(depth=0.6, stiffness=5.0, radius_scale=scale), pack(triangles))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_many_body_prior_tells_its_numbers():
    pairs = {(79, 79): (0.1 + 0.2, 2.7, 4.1, 2.0), (79, 28): (0.7, 2.5, 1 / 0.3, 1.9), (28, 28): (0.5, 2.3, 4.0, 2.2)}
    prior = _core.ManyBodyPrior(pairs=pairs, exponents={79: 0.5, 28: 2 / 3})
    assert list(prior.pairs) == [(28, 28), (28, 79), (79, 79)]
    assert prior.pairs[79, 79] == pairs[79, 79] and prior.pairs[28, 79] == pairs[79, 28]
    assert prior.exponents == {28: 2 / 3, 79: 0.5} and list(prior.exponents) == [28, 79]
    again = eval(repr(prior), {"ManyBodyPrior": _core.ManyBodyPrior})
    assert again.pairs == prior.pairs and again.exponents == prior.exponents  # to the last bit
    assert repr(again) == repr(prior)
    for one, two in zip(evaluate(again, CASES["Au4Ni4"]), evaluate(prior, CASES["Au4Ni4"]), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="no entry for the pair Cu-Cu"):
        evaluate(prior, CASES["bulk Cu"])
    with pytest.raises(ValueError, match="no exponent for Au"):
        _core.ManyBodyPrior({(28, 79): (0.7, 2.5, 4.0, 2.0)}, {28: 0.5})
    with pytest.raises(ValueError, match="comes twice"):
        _core.ManyBodyPrior({(28, 79): (0.7, 2.5, 4.0, 2.0), (79, 28): (0.7, 2.5, 4.0, 2.0)}, {28: 0.5, 79: 0.5})
    with pytest.raises(ValueError, match="ratio above 1"):
        _core.ManyBodyPrior({(28, 28): (0.7, 2.5, 4.0, 1.0)}, {28: 0.5})
    with pytest.raises((ValueError, TypeError)):
        _core.ManyBodyPrior({(28, 28): (0.7, 2.5, 4.0)}, {28: 0.5})


def test_a_tilted_landscape_has_the_forces_that_were_wanted():
    batch = pack([CASES["Au4Ni4"], rattled(CASES["Au4Ni4"], 1)])
    model, truth = many_body(), _core.Emt()
    energies, forces = _core.evaluate(model, batch)
    wanted = _core.evaluate(truth, batch)[1]
    tilted = _core.Tilted(model, forces - wanted)
    tilted_energies, tilted_forces = _core.evaluate(tilted, batch)
    np.testing.assert_allclose(tilted_forces, wanted, rtol=0, atol=1e-12 * np.abs(forces).max())
    linear = np.add.reduceat(((forces - wanted) * batch.positions).sum(axis=1), batch.offsets[:-1])
    np.testing.assert_allclose(tilted_energies, energies + linear, rtol=0, atol=1e-11 * np.abs(forces).max())
    positions, *_ = _core.relax(tilted, batch, steps=3, threads=1)
    np.testing.assert_array_equal(_core.relax(tilted, batch, steps=3, threads=2)[0], positions)
    assert not np.array_equal(positions, batch.positions)
    with pytest.raises(ValueError, match="batches of 16 atoms, but this one has 8"):
        evaluate(tilted, CASES["Au4Ni4"])
    with pytest.raises(ValueError, match="finite shift"):
        _core.Tilted(model, np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="shift"):
        _core.Tilted(model, np.zeros(6))


def test_priors_have_two_continuous_derivatives():
    for landscape, low, high in [
        (_core.PairPrior(), 0.8, 7.5),
        (_core.PairPrior("repulsive"), 0.2, 3.3),
        (many_body(), 0.8, 7.2),
    ]:
        r = np.arange(low, high, 1e-3)
        pairs = [Atoms("Au2", [[0, 0, 0], [x, 0, 0]]) for x in r]
        energies, forces = _core.evaluate(landscape, pack(pairs))
        force = forces[1::2, 0]
        curvature = np.diff(force) / 1e-3
        scale = np.abs(curvature)[:-1] + np.abs(curvature)[1:] + 1.0
        assert np.abs(np.diff(curvature) / scale).max() < 0.05  # a kink of the force would be a jump of order 1
        assert abs(energies[-1]) < 1e-5 and np.all(np.isfinite(energies))
        assert energies[-1] == 0 or isinstance(landscape, _core.ManyBodyPrior)


def test_repulsion_always_rises_inwards():
    r = np.arange(0.05, 2.9, 0.01)
    _, forces = _core.evaluate(_core.PairPrior("repulsive"), pack([Atoms("Au2", [[0, 0, 0], [x, 0, 0]]) for x in r]))
    assert np.all(forces[1::2, 0] > 0)


@pytest.mark.parametrize("which", landscapes())
def test_laws(which):
    landscape = landscapes()[which]
    for name in ["bulk Pt", "slab", "skewed [True, True, True]"]:
        atoms = CASES[name]
        energy, forces = evaluate(landscape, atoms)
        repeats = [2 if p else 1 for p in atoms.pbc]
        energies, copies = evaluate(landscape, atoms.repeat(repeats))
        assert energies == pytest.approx(np.prod(repeats) * energy, rel=1e-12)
        np.testing.assert_allclose(copies, np.tile(forces, (np.prod(repeats), 1)), rtol=0, atol=1e-9)
        np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-9)
        wrapped = atoms.copy()
        wrapped.positions += 0.3
        wrapped.wrap()
        assert evaluate(landscape, wrapped)[0] == pytest.approx(energy, rel=1e-12)
    atoms = CASES["Au4Ni4"]
    energy, forces = evaluate(landscape, atoms)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T + [3.0, -2.0, 7.0]
    e, f = evaluate(landscape, turned)
    assert e == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(f, forces @ rotation.T, rtol=0, atol=1e-10 * np.abs(forces).max())
    order = np.random.default_rng(3).permutation(len(atoms))
    e, f = evaluate(landscape, atoms[order])
    assert e == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(f, forces[order], rtol=0, atol=1e-10 * np.abs(forces).max())


@pytest.mark.parametrize("which", landscapes())
def test_the_same_bits_for_any_batch_and_number_of_threads(which):
    landscape = landscapes()[which]
    structures = [CASES[name] for name in ["Au4Ni4", "slab", "bulk Cu", "molecule", "skewed [True, True, True]"]] * 5
    batch = pack(structures)
    energies, forces = _core.evaluate(landscape, batch, threads=1)
    for threads in (2, 3, 8):
        e, f = _core.evaluate(landscape, batch, threads=threads)
        assert np.array_equal(e, energies) and np.array_equal(f, forces)
    for k, atoms in enumerate(structures[:5]):
        e, f = evaluate(landscape, atoms)
        assert e == energies[k]
        assert np.array_equal(f, forces[batch.offsets[k] : batch.offsets[k + 1]])


def test_every_instruction_set_gives_the_same_numbers():
    best = _core.active_isa()
    reference = {key: evaluate(value, CASES["slab"]) for key, value in landscapes().items()}
    try:
        for isa in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "portable"):
            if not _core.force_isa(isa):
                continue
            for key, landscape in landscapes().items():
                energy, forces = evaluate(landscape, CASES["slab"])
                assert energy == pytest.approx(reference[key][0], rel=1e-12)
                np.testing.assert_allclose(forces, reference[key][1], rtol=0, atol=1e-9)
    finally:
        _core.force_isa(best)


@pytest.mark.parametrize("which", landscapes())
@pytest.mark.parametrize("pbc", [False, True])
def test_senseless_positions_are_rows_without_energy(which, pbc):
    good = CASES["bulk Cu"].copy()
    good.pbc = pbc
    bad, far = good.copy(), good.copy()
    bad.positions[1, 2] = np.nan
    far.positions[0, 0] = np.inf
    energies, forces = _core.evaluate(landscapes()[which], pack([good, bad, far, good]))
    assert np.isfinite(energies[[0, 3]]).all() and energies[0] == energies[3]
    assert np.isnan(energies[1:3]).all()
    assert np.isnan(forces[4:12]).all() and np.isfinite(forces[:4]).all()


def test_atoms_on_top_of_each_other_do_not_crash():
    for pbc in (False, True):
        atoms = Atoms("Cu2", [[1, 1, 1], [1, 1, 1]], cell=[4, 4, 4], pbc=pbc)
        for which, landscape in landscapes().items():
            energy, forces = evaluate(landscape, atoms)
            assert not np.isfinite(forces).all()
            if which == "lj":
                assert not np.isfinite(energy)


def test_one_atom_and_no_atom():
    for landscape in landscapes().values():
        energies, forces = _core.evaluate(landscape, pack([Atoms("Cu", cell=[9] * 3), Atoms()]))
        assert energies[1] == 0 and forces.shape == (1, 3) and np.all(forces == 0)
    assert energies[0] == 0
    assert evaluate(_core.Emt(), Atoms("Cu"))[0] == 3.51


def test_bad_input():
    with pytest.raises(ValueError, match=r"no parameters for Fe .*it knows Al, Cu"):
        evaluate(_core.Emt(), Atoms("FeAu", [[0, 0, 0], [2, 0, 0]]))
    with pytest.raises(ValueError, match="direction 2 is periodic"):
        evaluate(_core.Emt(), Atoms("Au", cell=[4, 4, 0], pbc=True))
    with pytest.raises(ValueError, match="sigma"):
        _core.LennardJones(-1.0)
    with pytest.raises(ValueError, match="ro < rc"):
        _core.LennardJones(rc=2.0, ro=2.5, smooth=True)
    with pytest.raises(ValueError, match="'bonding' or 'repulsive'"):
        _core.PairPrior("attractive")
    with pytest.raises(ValueError, match="covalent radius"):
        evaluate(_core.PairPrior(), Atoms("X2", [[0, 0, 0], [2, 0, 0]]))
    with pytest.raises(ValueError, match="positions must hold"):
        batch = pack([Atoms("Au2", [[0, 0, 0], [2, 0, 0]])])
        batch.positions = batch.positions[:1]
        _core.evaluate(_core.Emt(), batch)
    with pytest.raises(ValueError, match="one structure"):
        _core.neighbor_pairs(pack([Atoms("Au"), Atoms("Au")]), 3.0)


def test_ase_calculators():
    atoms = CASES["Au4Ni4"].copy()
    atoms.calc = EMT()
    reference = atoms.copy()
    reference.calc = AseEMT()
    assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-8)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    atoms.positions[0] += 0.1
    reference.positions[0] += 0.1
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), rtol=0, atol=1e-6)
    with pytest.raises(ThalwegError, match="Fe"):
        Atoms("Fe", calculator=EMT()).get_potential_energy()
    lj = LennardJones(sigma=2.0)
    dimer = Atoms("Ar2", [[0, 0, 0], [2.2, 0, 0]], calculator=lj)
    before = dimer.get_potential_energy()
    lj.set(sigma=2.1)
    dimer.calc, again = None, Atoms("Ar2", [[0, 0, 0], [2.2, 0, 0]], calculator=AseLennardJones(sigma=2.1))
    dimer.calc = lj
    assert dimer.get_potential_energy() == pytest.approx(again.get_potential_energy(), rel=1e-12)
    assert dimer.get_potential_energy() != before


def test_landscape_of_recognises_equal_calculators():
    atoms = CASES["slab"]
    for calculator in [
        EMT(),
        AseEMT(),
        LennardJones(sigma=2.0, rc=5.0),
        AseLennardJones(sigma=2.0, smooth=True, rc=5.0),
    ]:
        landscape = landscape_of(calculator)
        copy = atoms.copy()
        copy.calc = calculator
        assert evaluate(landscape, atoms)[0] == pytest.approx(copy.get_potential_energy(), rel=1e-10)

    class Changed(AseEMT):
        pass

    assert landscape_of(AseEMT(asap_cutoff=True)) is None
    assert landscape_of(Changed()) is None
    assert landscape_of(AseLennardJones(sigma=-1.0)) is None
    assert landscape_of(object()) is None


def soft_pair(strength=1.0):
    return LennardJones(epsilon=strength)


def test_make_calculator():
    assert isinstance(make_calculator("emt"), EMT)
    assert make_calculator("lj", sigma=2.0, rc=5.0).parameters.sigma == 2.0
    assert type(make_calculator("morse", epsilon=2.0)).__name__ == "MorsePotential"
    assert make_calculator(f"{__name__}:soft_pair", strength=3.0).parameters.epsilon == 3.0
    for name, arguments, message in [
        ("emtt", {}, "Did you mean 'emt'"),
        ("vaps", {}, "Did you mean 'vasp'"),
        ("lj", {"sigmaa": 1.0}, "no argument named 'sigmaa'. Did you mean 'sigma'"),
        ("emt", {"cutoff": 1.0}, "It takes: none"),
        ("morse", {"epsilonn": 1.0}, "Did you mean 'epsilon'"),
        ("lj", {"sigma": -2.0}, "positive, finite sigma"),
        ("no_such_module:factory", {}, "cannot be imported"),
        (f"{__name__}:soft_pear", {}, "Did you mean 'soft_pair'"),
        (f"{__name__}:soft_pair", {"strenth": 1.0}, "Did you mean 'strength'"),
        (7, {}, "must be a string"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            make_calculator(name, **arguments)


def smooth_carbon_formula(positions, cell, pbc, *, depth, stiffness, r0, angle, inner, outer):
    """The energy of potentials.hpp in plain sums over atoms and images."""

    def switch(r):
        t = np.clip((r - inner) / (outer - inner), 0, 1)
        return 1 - t**3 * (10 - t * (15 - 6 * t))

    energy, images = 0.0, [(-1, 0, 1) if p else (0,) for p in pbc]
    for i, x in enumerate(positions):
        bonds = []
        for j, y in enumerate(positions):
            for image in itertools.product(*images):
                d = y + np.array(image) @ cell - x
                r = np.linalg.norm(d)
                if r < outer and not (i == j and image == (0, 0, 0)):
                    bonds.append((r, d / r))
        energy += sum(0.5 * depth * ((1 - np.exp(-stiffness * (r - r0))) ** 2 - 1) * switch(r) for r, _ in bonds)
        for (ra, a), (rb, b) in itertools.combinations(bonds, 2):
            energy += angle * (a @ b + 0.5) ** 2 * switch(ra) * switch(rb)
    return energy


@pytest.mark.parametrize("pbc", [(False, False, False), (True, True, False)])
def test_smooth_carbon_equals_its_formula(pbc):
    numbers = dict(depth=2.5, stiffness=1.9, r0=1.5, angle=1.7, inner=1.7, outer=2.6)
    rng = np.random.default_rng(4)
    atoms = Atoms("C7", rng.uniform(0, 4, (7, 3)), cell=[5.5, 5.2, 9.0], pbc=pbc)
    atoms.calc = SmoothCarbon(**numbers)
    expected = smooth_carbon_formula(atoms.positions, atoms.cell.array, pbc, **numbers)
    assert atoms.get_potential_energy() == pytest.approx(expected, rel=1e-12)
    forces = atoms.get_forces()
    for atom, axis in ((0, 0), (3, 1), (6, 2)):
        moved = []
        for step in (1e-5, -1e-5):
            shifted = atoms.copy()
            shifted.positions[atom, axis] += step
            moved.append(smooth_carbon_formula(shifted.positions, atoms.cell.array, pbc, **numbers))
        assert forces[atom, axis] == pytest.approx(-(moved[0] - moved[1]) / 2e-5, rel=1e-6, abs=1e-6)


def test_graphene_is_the_minimum_of_smooth_carbon():
    """Three bonds of depth 3 eV for every two atoms and no strain; nothing that random sheets relax to lies lower."""
    r = 1.45
    cell = np.array([2 * np.sqrt(3) * r, 3 * r, 10.0])
    basis = np.array([[0, 0, 5], [0, r, 5], [np.sqrt(3) / 2 * r, 1.5 * r, 5], [np.sqrt(3) / 2 * r, 2.5 * r, 5]])
    positions = np.concatenate([basis, basis + np.array([np.sqrt(3) * r, 0, 0])])
    sheet = Atoms("C8", positions, cell=cell, pbc=(True, True, False))
    sheet.calc = SmoothCarbon()
    assert sheet.get_potential_energy() == pytest.approx(-36.0, abs=1e-9)
    assert np.abs(sheet.get_forces()).max() < 1e-9
    box = ([0, 0, 4.5], [[cell[0], 0, 0], [0, cell[1], 0], [0, 0, 1]])
    problem = Problem("C8", cell=cell, pbc=(True, True, False), box=box)
    starts = Search(problem, propose=Random(60), evaluate=Evaluate(SmoothCarbon()), seed=1).ask().proposed
    flat = starts.positions * [1, 1, 0] + [0, 0, 5]
    starts = replace(starts.with_positions(flat), fixed=np.tile([False, False, True], (starts.atoms, 1)))
    relaxed = _core.relax(_core.SmoothCarbon(), starts, steps=400, force_tolerance=0.01)[1]
    assert relaxed.min() > -36.0 - 1e-6 and np.sum(relaxed < -35.99) >= 3


def test_smooth_carbon_is_for_carbon():
    atoms = Atoms("CO", [[0, 0, 0], [0, 0, 1.2]])
    atoms.calc = SmoothCarbon()
    with pytest.raises(ConfigurationError, match="carbon alone"):
        atoms.get_potential_energy()
    with pytest.raises(ConfigurationError, match="inner < outer"):
        SmoothCarbon(inner=3.0)
