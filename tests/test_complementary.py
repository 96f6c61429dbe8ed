"""Complementary energy (thesis 3.2; Chiriki, Christiansen, Hammer, PRB 100, 235436 (2019)): landscape and generator."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from test_soap import numpy_density
from thalweg import (
    AcceptLower,
    Batch,
    ComplementaryEnergy,
    Evaluate,
    LocalDensity,
    Problem,
    Random,
    Rattle,
    Search,
    _core,
    recipes,
)
from thalweg.calculators import EMT
from thalweg.errors import ConfigurationError
from thalweg.generators import _drawn, _nearest
from toys import PairToy

TERSOFF = _core.Tersoff("BN")
RELAXING = {"steps": 1000, "force_tolerance": 0.01}
SOFTENING = 0.01


def cluster(seed: int = 0) -> Atoms:
    rng = np.random.default_rng(seed)
    grid = np.array(list(np.ndindex(2, 2, 2))) * 2.5 + 4.0
    return Atoms("AuNi" * 4, positions=grid + rng.normal(0, 0.2, (8, 3)), cell=np.eye(3) * 12, pbc=False)


def slab(seed: int = 0) -> Atoms:
    atoms = fcc111("Au", (2, 2, 2), a=4.08, vacuum=6.0)
    atoms += Atoms("Ni2", positions=atoms.positions[-2:] + np.array([0.5, 0.9, 2.1]))
    atoms.pbc = [True, True, False]
    atoms.positions += np.random.default_rng(seed).normal(0, 0.1, atoms.positions.shape)
    return atoms


def batch_of(*several: Atoms) -> Batch:
    return Batch.concat([Batch.from_ase(atoms, constraints=False) for atoms in several])


def with_attractors(batch: Batch, seed: int = 0) -> tuple[_core.LocalDensity, np.ndarray]:
    """Attractors a step away from where atoms are; every third atom has none."""
    density = LocalDensity().bind(batch.numbers)
    wanted = density.values(batch)
    wanted[:, :-1] += np.random.default_rng(seed).uniform(-0.2, 0.2, wanted[:, :-1].shape)
    wanted[::3] = np.nan
    return density, wanted


@pytest.mark.parametrize("atoms", [cluster(), slab()], ids=["cluster", "slab"])
def test_energy_is_the_formula_and_forces_its_derivative(atoms):
    batch = batch_of(atoms)
    density, wanted = with_attractors(batch)
    landscape = _core.ComplementaryEnergy(density, wanted, softening=SOFTENING)
    energies, forces = _core.evaluate(landscape, batch)
    features = numpy_density(atoms, LocalDensity())
    distance = np.linalg.norm(features - wanted, axis=1)
    oracle = np.nansum(np.sqrt(distance**2 + SOFTENING**2) - SOFTENING)
    assert energies[0] == pytest.approx(oracle, rel=1e-12)
    rng = np.random.default_rng(5)
    for _ in range(10):
        along = rng.normal(size=batch.positions.shape)
        along /= np.linalg.norm(along)

        def at(step, along=along):
            return _core.evaluate(landscape, batch.with_positions(batch.positions + step * along))[0][0]

        h = 5e-4
        slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
        assert abs(slope + np.sum(forces * along)) < 1e-8 * np.abs(forces).max()


def test_laws():
    batch = batch_of(cluster())
    density, wanted = with_attractors(batch)
    energy, forces = _core.evaluate(_core.ComplementaryEnergy(density, wanted), batch)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turned = batch.with_positions(batch.positions @ rotation.T + [0.3, -0.2, 1.0])
    again = _core.evaluate(_core.ComplementaryEnergy(density, wanted), turned)
    assert again[0] == pytest.approx(energy, rel=1e-13) and np.allclose(again[1], forces @ rotation.T, atol=1e-13)
    order = np.random.default_rng(2).permutation(8)
    other = replace(batch, positions=batch.positions[order], numbers=batch.numbers[order])
    again = _core.evaluate(_core.ComplementaryEnergy(density, wanted[order]), other)
    assert again[0] == pytest.approx(energy, rel=1e-13) and np.allclose(again[1], forces[order], atol=1e-13)
    # images count: a doubled cell is two structures
    flat = batch_of(slab())
    density, wanted = with_attractors(flat)
    single = _core.evaluate(_core.ComplementaryEnergy(density, wanted), flat)[0]
    doubled = batch_of(slab().repeat((2, 1, 1)))
    twice = _core.evaluate(_core.ComplementaryEnergy(density, np.tile(wanted, (2, 1))), doubled)[0]
    assert twice == pytest.approx(2 * single, rel=1e-12)


def test_attractors_are_each_structure_s_own_and_threads_do_not_matter():
    batch = batch_of(*(cluster(seed) for seed in range(5)))
    density, wanted = with_attractors(batch)
    wanted = np.concatenate([with_attractors(batch, seed)[1][8 * seed : 8 * seed + 8] for seed in range(5)])
    settings = {"steps": 60, "first_curvature": 2.0, "force_tolerance": 1e-3}
    together = _core.relax(_core.ComplementaryEnergy(density, wanted), batch, threads=2, **settings)
    three = _core.relax(_core.ComplementaryEnergy(density, wanted[:24]), batch[:3], threads=1, **settings)
    assert np.array_equal(together[0][:24], three[0]) and np.array_equal(together[1][:3], three[1])
    before = _core.evaluate(_core.ComplementaryEnergy(density, wanted), batch)[0]
    assert np.all(together[1] < 0.5 * before)


MISPLACED, ROLE_MODEL = 17, 21  # boron atoms of the outermost row in which all have three bonds


@pytest.fixture(scope="module")
def ribbon():
    """PRB 100, 235436 (2019), Fig. 1: a ribbon of boron nitride, relaxed; its energy; the same with an atom beside it."""
    bond = 1.4457
    a = np.sqrt(3) * bond
    atoms = Atoms(cell=[6 * a, 22, 12], pbc=[True, False, False])
    for symbol, base in (("B", [(0, 0), (a / 2, 1.5 * bond)]), ("N", [(a / 2, 0.5 * bond), (0, 2 * bond)])):
        for row, column, (x, y) in itertools.product(range(2), range(6), base):
            atoms += Atoms(symbol, positions=[[x + column * a, 6 + y + row * 3 * bond, 6]])
    problem = Problem("B24N24", cell=np.array(atoms.cell), pbc=atoms.pbc)
    assert np.array_equal(problem.numbers, atoms.numbers)
    perfect = problem.batch(atoms.positions[None], parent=-1)
    positions, energies, _, _, converged = _core.relax(TERSOFF, perfect, **RELAXING)
    assert converged.all()
    start = positions.copy()
    start[MISPLACED] = [positions[MISPLACED, 0] + 0.4, positions[:, 1].max() + 1.2, 6]
    return problem, positions, energies[0], perfect.with_positions(start)


def test_one_misplaced_boron_atom_finds_its_vacancy(ribbon):
    """It cannot get there downhill in energy, but it can downhill in complementary energy."""
    _, positions, lowest, start = ribbon
    hole = positions[MISPLACED]
    fixed = np.ones_like(start.fixed)
    fixed[MISPLACED] = False
    alone = replace(start, fixed=fixed)
    for free in (start, alone):
        stuck, trapped, _, _, converged = _core.relax(TERSOFF, free, **RELAXING)
        assert converged.all()
        assert np.linalg.norm(stuck[MISPLACED] - hole) > 1.0 and trapped[0] > lowest + 2.0

    density = LocalDensity().bind(start.numbers)
    wanted = np.full((start.atoms, density.size), np.nan)
    wanted[MISPLACED] = density.values(start)[ROLE_MODEL]
    landscape = _core.ComplementaryEnergy(density, wanted)
    moved, *_ = _core.relax(landscape, alone, steps=300, force_tolerance=1e-4, first_curvature=2.0)
    assert np.linalg.norm(moved[MISPLACED] - hole) < 0.1
    final = _core.relax(TERSOFF, start.with_positions(moved), **RELAXING)[1]
    assert final[0] == pytest.approx(lowest, abs=1e-3)


def test_the_generator_finds_it_without_being_told(ribbon):
    problem, _, lowest, start = ribbon
    hits = {}
    for element in (ComplementaryEnergy(100), ComplementaryEnergy(100, few=False), Rattle(100)):
        ctx = context(element, problem, start)
        energies = _core.relax(TERSOFF, element(ctx), **RELAXING)[1]
        hits[getattr(element, "few", "rattle")] = int(np.sum(energies < lowest + 0.01))
    assert hits[True] >= 3, hits  # few atoms, Paper I's point: moving all of them, or at random, does not lead there
    assert hits[False] == hits["rattle"] == 0, hits


def context(element, problem, sample, threads=2):
    """The context of a search that has not begun, but has a sample."""
    search = Search(problem, propose=element, evaluate=Evaluate(PairToy()), seed=3, threads=threads)
    sample = sample.with_columns(row=np.arange(len(sample)))
    return replace(search._at(search.ask().context, "propose", element), sample=sample)


CLUSTER = Problem("Au4Ni4", cell=12.0, box=6.0)


def parents(problem=CLUSTER, count=6):
    return Random(count)(context(Random(count), problem, Batch.empty()))


OPTIONS = [{}, {"few": False}, {"attractors": "clusters"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["few", "all", "clusters"])
def test_candidates_do_not_depend_on_threads_or_their_number(options):
    seven, three = ComplementaryEnergy(7, **options), ComplementaryEnergy(3, **options)
    first = seven(context(seven, CLUSTER, parents(), threads=1))
    second = seven(context(seven, CLUSTER, parents(), threads=2))
    assert len(first) >= 5 and np.array_equal(first.positions, second.positions)
    fewer = three(context(three, CLUSTER, parents()))
    assert len(fewer) >= 2 and np.array_equal(fewer.positions, first[: len(fewer)].positions)
    ctx = context(seven, CLUSTER, parents())
    other = seven(replace(ctx, key=ctx.key.fold("other")))
    assert not np.array_equal(other[:2].positions, first[:2].positions)


@pytest.mark.parametrize("options", OPTIONS, ids=["few", "all", "clusters"])
def test_only_placed_atoms_move_and_nothing_comes_too_close(options):
    template = fcc111("Au", (3, 2, 2), a=4.08, vacuum=6.0, orthogonal=True)
    template.pbc = [True, True, False]
    vectors = np.array(template.cell)
    vectors[2] = [0, 0, 4.0]
    problem = Problem("Ni3", template=template, box=([0, 0, template.positions[:, 2].max() + 0.5], vectors))
    sample = parents(problem, 4)
    element = ComplementaryEnergy(8, **options)
    found = element(context(element, problem, sample))
    assert len(found) >= 4
    x = found.positions.reshape(len(found), -1, 3)
    old = sample.take(found.columns["parent"]).positions.reshape(x.shape)
    assert np.array_equal(x[:, :12], old[:, :12]), "the template stays"
    moved = np.abs(x - old).max(axis=2) > 0
    assert np.all(moved.any(axis=1)) and np.all(_core.closest_contacts(found) >= 0.6)
    if options == {"few": False}:
        assert np.all(moved[:, 12:])
    elif options == {}:
        assert not np.all(moved[:, 12:]), "some structures move only some of the atoms"
    assert len(ComplementaryEnergy(8, c1=3.0)(context(element, problem, sample))) == 0


def test_every_species_has_a_cluster():
    """Copper and nickel are neighbours in the periodic table, and the densities differ by more than their numbers."""
    problem = Problem("Cu4Ni4", cell=14.0)
    rng = np.random.default_rng(4)
    apart = np.concatenate([rng.uniform(4, 6, (7, 3)), [[9.5, 9.5, 9.5]]])  # one nickel atom far from the rest
    sample = problem.batch(np.stack([apart, apart + rng.normal(0, 0.1, apart.shape)]))
    element = ComplementaryEnergy(4, role_models=(2, 2), attractors="clusters", few=False)
    density = element.descriptor.bind(problem.numbers)
    wanted, moving = element._attractors(context(element, problem, sample), density, sample, np.arange(2))
    assert np.isfinite(wanted).all() and moving.all()
    np.testing.assert_array_equal(wanted[..., -1], np.broadcast_to(problem.numbers, (2, 8)))


def test_role_models_differ_and_are_of_the_atom_s_own_species():
    features = np.array([[[0.0, 1.0, 7], [0.005, 1.0, 7], [0.5, 1.0, 7], [0.0, 1.0, 8]]])
    draw = np.array([[0.9, 0.1, 0.2, 0.3]])  # the second has the least, but is a copy of the first
    kept = _drawn(features, draw, np.array([2]), 0.01)[0]
    assert np.array_equal(np.isfinite(kept[:, 0]), [False, False, True, True])
    assert np.array_equal(np.isfinite(_drawn(features, draw, np.array([9]), 0.01)[0, :, 0]), [True, False, True, True])
    assert np.array_equal(np.isfinite(_drawn(features, draw, np.array([9]), 0.0)[0, :, 0]), [True] * 4)
    nearest, distance = _nearest(features, kept[None, :3])
    assert np.array_equal(nearest[0, :3], np.tile(features[0, 2], (3, 1)))
    assert np.isnan(nearest[0, 3]).all() and np.isinf(distance[0, 3]), "no role model of this species"
    assert distance[0, 0] == pytest.approx(0.5)


def test_settings_that_make_no_sense_are_refused():
    for options in (
        {"role_models": (3, 2)},
        {"role_models": (0, 2)},
        {"role_models": 3},
        {"role_models": (2, "4")},
        {"role_models": (1.5, 2.5)},
        {"tries": 0},
        {"steps": 0},
        {"c1": float("nan")},
        {"attractors": "magic"},
        {"softening": 0.0},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            ComplementaryEnergy(5, **options)
    density = LocalDensity(species=["Au", "Ni"]).bind()
    with pytest.raises(ConfigurationError, match=r"attractors must have shape \(n, 3\)"):
        _core.ComplementaryEnergy(density, np.zeros((4, 2)))


# ---- the search of Paper I, Fig. 2 -----------------------------------------------------------------------------


def settled(element, carry, energies, parent, data):
    """What `element` makes of candidates evaluated at these points: the column accepted, and what it keeps."""
    search = Search(CLUSTER, propose=Random(1), evaluate=Evaluate(PairToy()), seed=0)
    at = search._at(search.ask().context, "settle", element)
    kept = {}
    services = SimpleNamespace(keep=lambda iteration, stage, arrays: kept.update(arrays))
    ctx = replace(at, carry={element.name: carry} if carry else {}, data=data, _services=services)
    points = np.arange(len(energies))
    batch = CLUSTER.batch(np.zeros((len(energies), 8, 3)), parent=parent).with_columns(
        energy=np.array(energies, float), ticket=len(data), point=points, status=np.zeros(len(energies), np.uint8)
    )
    return element(batch, ctx).columns["accepted"].tolist(), kept


def test_the_population_follows_a_descent_to_its_end():
    element = AcceptLower(size=2, same=1e-3)
    data = CLUSTER.batch(np.zeros((4, 8, 3)), parent=-1).with_columns(
        energy=np.array([5.0, 4.0, 3.0, 1.0]), status=np.zeros(4, np.uint8), ticket=np.arange(4), point=np.zeros(4, int)
    )
    accepted, carry = settled(element, {}, [6.0, 5.0], -1, data[:0])
    assert accepted == [False, True] and not carry["complete"] and carry["energy"].tolist() == [5.0]
    accepted, few = settled(element, carry, [5.0005], -1, data[:1])
    assert accepted == [False] and few["complete"] and few["energy"].tolist() == [5.0], (
        "a copy, but there may be no other"
    )
    accepted, carry = settled(element, carry, [4.0], -1, data[:1])
    assert carry["complete"] and carry["energy"].tolist() == [4.0, 5.0] and not carry["descending"]
    accepted, carry = settled(element, carry, [3.5, 3.0], 0, data[:2])  # below its parent, whose energy is 5
    assert accepted == [False, True] and carry["descending"] and carry["energy"].tolist() == [4.0, 5.0, 3.0]
    accepted, carry = settled(element, carry, [1.0], 2, data[:3])
    assert accepted == [True] and carry["energy"].tolist() == [4.0, 5.0, 1.0], "the last one takes its place"
    accepted, both = settled(element, carry, [2.0], 1, data[:3])  # another ticket's descent, from a parent at 4
    assert accepted == [True] and both["energy"].tolist() == [1.0, 4.0, 2.0], "the first one's lowest is kept"
    there = carry
    for energies in ([1.5], [1.0 - 5e-4], [np.nan], []):  # higher, no lower by what counts, failed, no candidate
        accepted, carry = settled(element, there, energies, 3, data)
        assert not any(accepted) and not carry["descending"] and carry["energy"].tolist() == [1.0, 4.0]
    accepted, again = settled(element, carry, [4.5], -1, data)
    assert accepted == [False] and again["energy"].tolist() == [1.0, 4.0], "random and too high"
    with pytest.raises(ConfigurationError, match="size"):
        AcceptLower(size=0)


def test_the_search_follows_the_published_flow_chart():
    with recipes.complementary_energy(CLUSTER, EMT(), seed=5, population=3, steps=60) as search:
        last, population = None, []
        for step in search.steps(25):
            rows = step.evaluated
            parent = int(rows.columns["parent"][0]) if len(rows) else -1  # none: it fell into pieces
            if not len(rows):
                pass
            elif not population:
                assert parent == -1
            elif last is not None:
                assert parent == last, "a descent goes on from what it accepted last"
            else:
                assert parent == -1 or parent in population
            kept = step.carry["AcceptLower"]
            numbers = list(zip(search.data.columns["ticket"], search.data.columns["point"], strict=True))
            members = [numbers.index(place) for place in zip(kept["ticket"], kept["point"], strict=True)]
            if kept["complete"]:
                last, population = (members[-1], members[:-1]) if kept["descending"] else (None, members)
        assert len(population) == 3 and search.data.columns["accepted"].sum() >= 4
        assert search.best_energy < 8.5


@pytest.mark.parametrize("cut", [2, 9])
def test_a_resumed_search_equals_one_that_ran_straight(tmp_path, cut):
    options = {"seed": 2, "population": 3, "steps": 40}
    with recipes.complementary_energy(CLUSTER, EMT(), threads=2, **options) as search:
        search.run(14)
        straight = search.data
    path = tmp_path / "run.journal"
    with recipes.complementary_energy(CLUSTER, EMT(), store=path, threads=1, **options) as search:
        search.run(cut)
        search.ask()  # left open
    with recipes.complementary_energy(CLUSTER, EMT(), store=path, threads=1, **options) as search:
        search.run(14 - cut)
        assert np.array_equal(search.data.positions, straight.positions)
        assert np.array_equal(search.data.columns["energy"], straight.columns["energy"])
        assert np.array_equal(search.data.columns["accepted"], straight.columns["accepted"])
