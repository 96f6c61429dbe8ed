"""The agent's world: grids, masks, snapping, policies, targets, and that a killed search learns what it would have."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc100
from thalweg import Batch, GridSettings, Policy, Problem, StopAt, _core, recipes
from thalweg.agent import FittedAgent, _canonical, _pairs, build
from thalweg.calculators import EMT, SmoothCarbon
from thalweg.errors import ConfigurationError
from thalweg.randomness import Key

FLAT = Problem(
    "C4", cell=[5.0, 4.4, 10.0], pbc=(True, True, False), box=([0, 0, 4.5], [[5.0, 0, 0], [0, 4.4, 0], [0, 0, 1]])
)
MIXED = Problem("C2H2", cell=12.0, box=([3, 3, 5.5], [[5.0, 0, 0], [0, 4.0, 0], [0, 0, 1.0]]))
SETTINGS = GridSettings(0.31)


def no_q(states, allowed):
    raise AssertionError("a uniform policy asks for no Q")


def uniform_builds(grid, n, seed=0):
    starts = [np.zeros((0, 2), np.int32)] * n
    return build(grid, no_q, Policy("uniform"), starts, [Key.of(seed).fold(i) for i in range(n)])


# ---- grid --------------------------------------------------------------------------------------------------


def test_periodic_directions_are_divided_evenly_and_open_ones_end_at_the_box():
    periodic, opened = SETTINGS.of(FLAT), SETTINGS.of(MIXED)
    assert periodic.shape == (16, 14) and periodic.periodic == (True, True)
    assert np.allclose(periodic.steps, [[5.0 / 16, 0, 0], [0, 4.4 / 14, 0]])
    assert np.allclose(periodic.points[:, 2], 5.0)
    assert opened.shape == (17, 13) and opened.periodic == (False, False)
    low, high = opened.points.min(axis=0), opened.points.max(axis=0)
    assert np.all(low[:2] >= 3) and high[0] <= 8 and high[1] <= 7
    assert np.allclose(low[0] - 3, 8 - high[0])  # in the middle


def test_three_dimensions():
    grid = GridSettings(0.5, 3).of(Problem("Ni2", cell=10.0, box=4.0))
    assert grid.shape == (9, 9, 9)
    assert grid.nearest(grid.points[123] + 0.2) == 123


def test_heights_are_those_of_the_species():
    grid = GridSettings(0.3, heights={"H": 6.4}).of(MIXED)
    z = grid.place(np.array([[0, 5], [1, 5]]))[:, 2]
    assert grid.species.tolist() == [1, 6]
    assert np.allclose(z, [6.4, 6.0])


def test_in_three_dimensions_species_keep_to_their_heights():
    problem = Problem("C3H3", cell=12.0, box=([3, 3, 5.0], [[5.0, 0, 0], [0, 4.0, 0], [0, 0, 3.0]]))
    grid = GridSettings(0.4, 3, heights={"H": 6.4, "C": (5.5, 6.5)}).of(problem)
    assert grid.flat.tolist() == [True, False]
    layers = np.unique(grid.points[:, 2])
    plane = layers[np.argmin(np.abs(layers - 6.4))]
    for rows in uniform_builds(grid, 20):
        z, hydrogen = grid.place(rows)[:, 2], grid.species[rows[:, 0]] == 1
        assert np.allclose(z[hydrogen], plane)
        assert np.all((z[~hydrogen] >= 5.5 - 1e-6) & (z[~hydrogen] <= 6.5 + 1e-6))
        # relaxed atoms that left come back
        away = grid.place(rows) + np.array([0.0, 0.0, 1.5])
        z = grid.place(grid.snap(away, grid.species[rows[:, 0]]))[:, 2]
        assert np.allclose(z[hydrogen], plane) and np.all(z[~hydrogen] <= 6.5 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (lambda: GridSettings(0.0), "spacing"),
        (lambda: GridSettings(0.2, 4), "2 or 3"),
        (lambda: GridSettings(0.2, 3, heights={"C": (2.0, 1.0)}), "height of C"),
        (lambda: GridSettings(0.2, 3, heights={"C": [1.0, 2.0, 3.0]}), "height of C"),
        (lambda: GridSettings(0.2, heights={"C": (1.0, 2.0)}), "dimension 3 has ranges"),
        (lambda: GridSettings(0.2, heights={"Au": 1.0}).of(MIXED), "Au"),
        (lambda: GridSettings(0.5, 3, heights={"C": (20.0, 21.0)}).of(MIXED), "no point of the grid"),
        (lambda: GridSettings(0.0005).of(FLAT), "too fine"),
        (lambda: Policy("greedy"), "epsilon-greedy"),
        (lambda: Policy(epsilon=1.5), "epsilon"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        settings()


def ratio_by_hand(grid, voxel, species, atoms):
    """Smallest distance to any image, in covalent sums."""
    at = grid.place(np.array([[species, voxel]]))[0]
    least = np.inf
    shifts = itertools.product(*[(-2, -1, 0, 1, 2) if wraps else (0,) for wraps in grid.problem.pbc])
    for shift, (position, number) in itertools.product(list(shifts), atoms):
        radius = grid.radii[species] + _core.covalent_radius(int(number))
        least = min(least, float(np.linalg.norm(position + np.array(shift) @ grid.problem.cell - at)) / radius)
    return least


@pytest.mark.parametrize("problem", [FLAT, MIXED])
def test_ratios_are_the_nearest_distances_in_covalent_sums(problem):
    grid = SETTINGS.of(problem)
    rows = next(rows for rows in uniform_builds(grid, 5) if rows is not None)
    ratio = grid.empty.copy()
    for row, position in zip(rows, grid.place(rows), strict=True):
        grid.narrow(ratio, position, grid.radii[row[0]])
    atoms = [(p, grid.species[r[0]]) for r, p in zip(rows, grid.place(rows), strict=True)]
    rng = np.random.default_rng(0)
    for _ in range(40):
        s, v = int(rng.integers(len(grid.species))), int(rng.integers(grid.voxels))
        assert np.isclose(ratio[s, v], ratio_by_hand(grid, v, s, atoms), rtol=1e-12, atol=1e-12)


def test_a_skewed_cell_has_its_nearest_images():
    cell = np.array([[4.0, 0, 0], [3.1, 2.6, 0], [0, 0, 9.0]])
    problem = Problem("C2", cell=cell, pbc=(True, True, False), box=([0, 0, 4.0], [cell[0], cell[1], [0, 0, 1.0]]))
    grid = GridSettings(0.5).of(problem)
    ratio = grid.empty.copy()
    position = grid.place(np.array([[0, 3]]))[0]
    grid.narrow(ratio, position, grid.radii[0])
    for voxel in range(grid.voxels):
        assert np.isclose(ratio[0, voxel], ratio_by_hand(grid, voxel, 0, [(position, 6)]), atol=1e-12)


@pytest.mark.parametrize("problem", [FLAT, MIXED])
def test_builds_keep_bond_lengths_and_use_up_their_atoms(problem):
    grid = SETTINGS.of(problem)
    for rows in uniform_builds(grid, 20):
        assert rows is not None
        assert np.bincount(rows[:, 0], minlength=len(grid.species)).tolist() == grid.counts.tolist()
        structure = problem.batch(grid.place(rows[np.argsort(-rows[:, 0], kind="stable")])[None])
        closest = _core.closest_contacts(structure)[0]
        assert closest >= problem.c1 - 1e-9


def test_hydrogen_last():
    grid = GridSettings(0.31, hydrogen_last=True).of(MIXED)
    for rows in uniform_builds(grid, 10):
        assert grid.species[rows[:, 0]].tolist() == [6, 6, 1, 1]


def test_the_first_atom_of_an_open_grid_goes_to_its_middle():
    grid = SETTINGS.of(MIXED)
    assert {int(rows[0, 1]) for rows in uniform_builds(grid, 10)} == {8 * 13 + 6}


def test_snapping_a_build_gives_the_build():
    grid = SETTINGS.of(FLAT)
    for rows in uniform_builds(grid, 10):
        assert np.array_equal(grid.snap(grid.place(rows), grid.species[rows[:, 0]]), rows)


def test_snapping_crowded_atoms_keeps_them_apart():
    grid = SETTINGS.of(FLAT)
    rng = np.random.default_rng(1)
    for _ in range(20):
        positions = grid.points[0] + np.array([1.5, 1.5, 0]) + 0.4 * rng.normal(size=(4, 3)) * [1, 1, 0]
        rows = grid.snap(positions, [6] * 4)
        assert len(set(rows[:, 1].tolist())) == 4
        assert _core.closest_contacts(FLAT.batch(grid.place(rows)[None]))[0] >= FLAT.c1


@pytest.mark.parametrize("heights", [None, {"C": 6.0, "H": 6.4}])
def test_snapping_all_at_once_is_snapping_one_by_one(heights, monkeypatch):
    first = Atoms("C", [[5.0, 5.0, 6.0]], cell=[12.0] * 3)
    around = Problem("C2H2", template=first, box=MIXED.box)
    for problem in (MIXED, around) if heights else (FLAT, MIXED, around):
        grid = GridSettings(0.31, heights=heights).of(problem)
        rng = np.random.default_rng(2)
        builds = [rows for rows in uniform_builds(grid, 40) if rows is not None]
        positions = [
            grid.place(rows) + rng.normal(scale=k % 4 / 8, size=(len(rows), 3)) for k, rows in enumerate(builds)
        ]
        orders = [rng.permutation(len(rows)) for rows in builds]
        crowded, snapped = [], []
        for slowly in (False, True):
            with monkeypatch.context() as patch:
                if slowly:
                    patch.setattr(type(grid), "_crowded", lambda self, rows: True)
                for x, rows, order in zip(positions, builds, orders, strict=True):
                    numbers = grid.species[rows[:, 0]]
                    snapped.append((grid.snap(x, numbers), grid.snap(x, numbers, order.tolist())))
                    crowded.append(grid._crowded(np.stack([rows[:, 0], grid.nearest(x)], axis=1)))
        half = len(builds)
        assert 5 < sum(crowded[:half]) < half - 5
        assert all(np.array_equal(a, b) for a, b in zip(snapped[:half], snapped[half:], strict=True))


def test_builds_that_have_not_parted_share_a_map():
    grid, policy = SETTINGS.of(FLAT), Policy(epsilon=0.2)
    asked = []

    def q_maps(states, allowed):
        assert len({state.tobytes() for state in states}) == len(states)
        asked.append(len(states))
        seeds = [int(np.abs(np.ascontiguousarray(state, np.int64)).sum()) for state in states]
        return np.array([np.random.default_rng(s).random((len(grid.species), grid.voxels)) for s in seeds])

    starts = [np.zeros((0, 2), np.int32)] * 6 + [np.array([[0, 40]], np.int32)] * 2
    keys = [Key.of(3).fold(i) for i in range(len(starts))]
    together = build(grid, q_maps, policy, starts, keys)
    shared = sum(asked)
    asked.clear()
    alone = [build(grid, q_maps, policy, [start], [key])[0] for start, key in zip(starts, keys, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))
    assert shared < sum(asked) and len({rows.tobytes() for rows in together}) > 1


def test_a_template_is_on_the_grid_and_kept_free():
    first = Atoms("C", [[1.25, 1.0, 5.0]], cell=FLAT.cell, pbc=FLAT.pbc)
    problem = Problem("C3", template=first, box=FLAT.box)
    grid = SETTINGS.of(problem)
    assert grid.template.tolist() == [[0, grid.nearest(first.positions[0])]]
    assert grid.empty.min() < 0.2
    assert grid.allowed(grid.empty, np.zeros(1, int), first=True).any()


def test_copies_keep_every_distance():
    first = Atoms("C", [[4.5, 4.5, 4.5]], cell=[9.0] * 3)
    cubic, solid = Problem("C3", cell=9.0, box=4.0), GridSettings(0.5, dimension=3)
    around = Problem("C3", template=first, box=([2.5] * 3, np.diag([4.0] * 3)))
    beside = Problem("C3", template=first, box=([2.5, 2.5, 5.5], np.diag([4.0, 4.0, 2.0])))
    grids = {SETTINGS.of(FLAT): 4, SETTINGS.of(MIXED): 4, GridSettings(0.5).of(cubic): 8}
    grids |= {solid.of(cubic): 48, solid.of(around): 48, solid.of(beside): 8}
    # A cube that is closed in a periodic cell: what is left is what keeps the lattice.
    for cell, count in (([6.0, 6.0, 8.0], 16), ([[6.0, 0, 0], [-3.0, 27**0.5, 0], [0, 0, 6.0]], 8)):
        grids[solid.of(Problem("C3", cell=cell, pbc=True, box=([0] * 3, np.diag([4.0] * 3))))] = count
    # z is the first direction, and hydrogen keeps to a layer of it.
    upright = Problem("C2H", cell=9.0, box=([2.5] * 3, [[0, 0, 4.0], [4.0, 0, 0], [0, 4.0, 0]]))
    grids[GridSettings(0.5, dimension=3, heights={"H": 3.5}).of(upright)] = 8
    # Skewed planes: half a turn, and two mirrors where the directions are alike.
    for cell, count in (
        ([[6.0, 0, 0], [3.0, 27**0.5, 0], [0, 0, 9.0]], 4),
        ([[6.0, 0, 0], [2.0, 5.0, 0], [0, 0, 9.0]], 2),
    ):
        box = ([0, 0, 4.0], [*cell[:2], [0, 0, 1.0]])
        grids[GridSettings(0.5).of(Problem("C3", cell=cell, pbc=(True, True, False), box=box))] = count
    for grid, count in grids.items():
        voxels = np.arange(grid.voxels)
        copies = [grid.turned(voxels, np.full(len(voxels), way)) for way in range(len(grid.symmetries))]
        assert np.array_equal(copies[0], voxels)
        assert len(copies) == count == len({copy.tobytes() for copy in copies})
        rows = np.concatenate([grid.template, next(r for r in uniform_builds(grid, 3) if r is not None)])
        numbers = grid.species[rows[:, 0]]
        distances = Atoms(numbers, grid.place(rows), cell=grid.problem.cell, pbc=grid.problem.pbc).get_all_distances(
            mic=True
        )
        for copy in copies:
            moved = rows.copy()
            moved[:, 1] = copy[rows[:, 1]]
            atoms = Atoms(numbers, grid.place(moved), cell=grid.problem.cell, pbc=grid.problem.pbc)
            assert np.allclose(atoms.get_all_distances(mic=True), distances, atol=1e-9)
            assert grid.room.shape[1] == 1 or grid.room[rows[:, 0], moved[:, 1]].all()


# ---- policy and targets ------------------------------------------------------------------------------------


def test_policies_choose_as_often_as_they_say():
    q, allowed = np.linspace(-1, 1, 200), np.ones(200, bool)
    allowed[150:] = False
    rng = np.random.default_rng(0)
    draws = 4000
    greedy = [Policy(epsilon=0.2, top=0.1).choose(q, allowed, 10, rng) for _ in range(draws)]
    best = np.mean(np.array(greedy) == 149)
    assert abs(best - (0.8 + 0.1 / 15 + 0.1 / 150)) < 4 * np.sqrt(0.16 / draws)
    assert max(greedy) == 149
    among_top = np.mean((np.array(greedy) >= 135) & (np.array(greedy) < 149))
    assert abs(among_top - (0.1 * 14 / 15 + 0.1 * 14 / 150)) < 4 * np.sqrt(0.1 / draws)
    soft = np.array([Policy("softmax", temperature=0.5).choose(q, allowed, 10, rng) for _ in range(draws)])
    weights = np.exp(q[:150] / 0.5)
    assert abs(np.mean(soft >= 100) - weights[100:].sum() / weights.sum()) < 4 * np.sqrt(0.25 / draws)
    plain = np.array([Policy("uniform").choose(np.zeros(0), allowed, 10, rng) for _ in range(draws)])
    assert abs(np.mean(plain < 75) - 0.5) < 4 * np.sqrt(0.25 / draws) and plain.max() < 150


def test_pairs_know_no_order_of_placement():
    rows = np.array([[0, 5], [1, 7], [0, 9]], np.int32)
    other = rows[[1, 0, 2]]
    assert _pairs(rows)[2] == _pairs(other)[2]  # the same state, the same action
    assert _pairs(rows)[1] != _pairs(other)[1]
    assert _canonical(rows) == _canonical(other[::-1])


# ---- learning ------------------------------------------------------------------------------------------------

torch = pytest.importorskip("torch", reason="the agent learns with PyTorch: pip install 'thalweg[asla]'")


def toy(**options):
    first = Atoms("C", [[0, 0, 5.0]], cell=[5.0, 4.4, 10.0], pbc=(True, True, False))
    problem = Problem("C3", template=first, box=FLAT.box)
    return recipes.asla(problem, SmoothCarbon(), **{"grid": 0.4, "threads": 1, **options})


def rows_of(search):
    return search.data.positions, search.data.columns["energy"]


def test_an_agent_learns_and_its_targets_are_those_of_the_best_episode():
    with toy(seed=1) as search:
        search.run(12)
        agent = search.models["agent"].fit(search.data, None)
        assert agent.size == 12 and len(agent.losses) == 12
        for rows, energy in zip(agent.builds, agent.energies, strict=True):
            for step in range(len(rows)):
                containing = [
                    e
                    for other, e in zip(agent.builds, agent.energies, strict=True)
                    for k in range(len(other))
                    if _canonical(other[:k]) == _canonical(rows[:step]) and np.array_equal(other[k], rows[step])
                ]
                assert agent._best[_pairs(rows)[step]] == min(containing) <= energy
        assert agent.reward(min(agent.energies)) == 1.0
        assert agent.reward(np.inf) == -1.0
        steps = [agent.reward(min(agent.energies) + x) for x in (0.1, 0.2, 50.0)]
        assert 1 > steps[0] > steps[1] > steps[2] == -1


@pytest.mark.parametrize(
    "options",
    [
        {}, {"postprocess": "surrogate", "surrogate_after": 3}, {"representation": "agr"},
        {"train_steps": 2, "warm_up": 6, "favour": 1.0, "patience": 3, "lifetime": 4},
        {"acquisition": "lcb", "candidates": 4, "rebuild": 2, "rebuild_after": 3},
        {"acquisition": "lcb", "candidates": 2, "rebuild": 1, "unchosen": 3, "displaced": 2, "rebuild_after": 3,
         "postprocess": "surrogate", "surrogate_after": 3},
        {"postprocess": "true", "true_steps": 3},
    ],
)  # fmt: skip
def test_a_resumed_agent_goes_on_as_if_nothing_had_happened(tmp_path, options):
    with toy(seed=2, **options) as straight:
        straight.run(9)
        expected = rows_of(straight)
    for part in (3, 2, 4):
        with toy(seed=2, store=tmp_path / "run.journal", **options) as search:
            search.run(part)
    with toy(seed=2, store=tmp_path / "run.journal", **options) as search:
        assert all(np.array_equal(a, b) for a, b in zip(rows_of(search), expected, strict=True))


@pytest.mark.parametrize("representation", ["one-hot", "gaussian", "agr", "displaced", "harmonics"])
def test_compiled_maps_are_those_of_pytorch(representation):
    with toy(seed=6, representation=representation, lr=1e-3, warm_up=0, train_steps=1) as search:
        search.run(3)
        agent = search.models["agent"].fit(search.data)
    states = [np.concatenate([agent.grid.template, rows[:k]]) for k, rows in enumerate(agent.builds)]
    expected = np.stack([agent.trainer.q_map(state).reshape(1, -1) for state in states])
    assert np.abs(agent.q_maps(states) - expected).max() < 3e-6


def test_maps_in_space_are_those_of_pytorch_atom_by_atom_and_whole(monkeypatch):
    """Two species around an atom that is there."""
    first = Atoms("Au", [[8.0] * 3], cell=[16.0] * 3)
    problem = Problem("Ni2Au", template=first, box=([4.0] * 3, np.eye(3) * 8.0))
    builds = []
    for one_by_one in (True, False):
        monkeypatch.setattr(FittedAgent, "one_by_one", one_by_one)
        with recipes.asla(
            problem, EMT(), grid=0.2, dimension=3, seed=4, threads=1, train_steps=1, acquisition="lcb", candidates=3,
            epsilon=0.3,
        ) as search:  # fmt: skip
            search.run(3)
            agent = search.fitted["agent"]
            builds.append(search.data.positions.copy())
        rows = agent.builds[-1]
        states = [np.concatenate([agent.grid.template, rows[:k]]) for k in (0, 1, 2, 1, 0, 2)]
        masks = [np.random.default_rng(k).random((2, agent.grid.voxels)) < 0.02 for k in range(len(states))]
        maps = agent.q_maps(states, masks)
        for state, mask, q in list(zip(states, masks, maps, strict=True))[2:4]:
            expected = agent.trainer.q_map(state).reshape(2, -1)
            assert np.abs((q - expected)[mask]).max() < 3e-6 and np.ptp(expected) > 1e-3
    assert np.array_equal(*builds)


def test_only_large_grids_in_space_with_few_atoms_there_are_built_one_by_one():
    def chosen(**options):
        with recipes.asla(threads=1, calculator=EMT(), **options) as search:
            return search.models["agent"].fit(Batch.empty()).one_by_one

    cluster = Problem("Ni2Au2", cell=30.0, box=12.0)
    assert chosen(problem=cluster, dimension=3, grid=0.2)  # 61^3
    assert not chosen(problem=cluster, dimension=3, grid=1.2)
    assert not chosen(problem=cluster, grid=0.1)  # in the plane
    crowd = Atoms("Au5", [[10.0 + 2.5 * k, 15, 15] for k in range(5)], cell=[30.0] * 3)
    assert not chosen(problem=Problem("Ni2Au2", template=crowd, box=([9.0] * 3, np.eye(3) * 12)), dimension=3, grid=0.2)


@pytest.mark.parametrize("patience", [0, 2])
def test_snapshots_are_kept_and_training_since_is_repeated(tmp_path, patience):
    from dataclasses import replace

    def search(store=None):
        found = toy(seed=3, store=store, patience=patience)
        found.models["agent"] = replace(found.models["agent"], snapshot_every=4)
        return found

    with search() as straight:
        straight.run(11)
        expected = straight.models["agent"].fit(straight.data).trainer.parameters
    for part in (6, 5):
        with search(tmp_path / "run.journal") as resumed:
            resumed.run(part)
            resumed.ask()
            found = resumed._fitted["agent"].trainer.parameters.copy()
    assert np.array_equal(found, expected)


def test_relaxed_structures_are_snapped_before_their_energy(tmp_path):
    with toy(seed=4, postprocess="surrogate", surrogate_after=2) as search:
        search.run(6)
        grid = search.models["agent"].built_on
        for structure in search.data.to_ase():
            fractional = structure.positions[1:, :2] / np.diag(grid.steps[:, :2])
            assert np.allclose(fractional, np.rint(fractional), atol=1e-9)
    with toy(seed=4, postprocess="surrogate", surrogate_after=2, evaluate_on_grid=False) as search:
        search.run(6)
        positions = search.data.positions.reshape(-1, 4, 3)[4:, 1:, :2] / np.diag(grid.steps[:, :2])
        assert not np.allclose(positions, np.rint(positions), atol=1e-3)
        assert np.allclose(search.data.positions[:, 2], 5.0)  # in the plane


def test_transfer_starts_from_the_other_agents_weights(tmp_path):
    with toy(seed=5) as small:
        small.run(4)
        agent = small.models["agent"].fit(small.data)
        agent.save(tmp_path / "small.npz")
    first = Atoms("C", [[0, 0, 5.0]], cell=[5.0, 8.8, 10.0], pbc=(True, True, False))
    large = Problem("C7", template=first, box=([0, 0, 4.5], [[5.0, 0, 0], [0, 8.8, 0], [0, 0, 1.0]]))
    with recipes.asla(large, SmoothCarbon(), grid=0.4, transfer_from=str(tmp_path / "small.npz"), seed=9) as search:
        begun = search.models["agent"].fit(Batch.empty())
        assert np.array_equal(begun.trainer.parameters, agent.trainer.parameters)
        search.run(2)
    with pytest.raises(ConfigurationError, match="no snapshot"):
        recipes.asla(large, SmoothCarbon(), transfer_from=str(tmp_path / "none.npz")).run(1)


def test_transfer_takes_weights_for_the_same_images_only(tmp_path):
    path = str(tmp_path / "agent.npz")
    with toy(seed=5) as small:
        small.run(2)
        small.models["agent"].fit(small.data).save(path)
    for options, words in (
        ({"representation": "one-hot"}, "representation is gaussian, this one's is one-hot"),
        ({"representation_options": {"width": 4.0}}, "whose options is"),
        ({"grid": 0.8}, "whose spacing is 0.4"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            toy(transfer_from=path, **options)
    with pytest.raises(ConfigurationError, match="whose species is"):
        recipes.asla(MIXED, SmoothCarbon(), grid=0.4, transfer_from=path)
    np.savez(tmp_path / "other.npz", losses=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    whole = (tmp_path / "agent.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("other.npz", "array.npy", "nothing.npz", "cut.npz", "empty.npz"):
        with pytest.raises(ConfigurationError, match="is no snapshot of an agent"):
            toy(transfer_from=str(tmp_path / name))


def test_every_life_and_every_seed_draws_its_own_representation():
    agents = [toy(seed=seed, representation="agr").models["agent"] for seed in (0, 1)]
    drawn = [agent.trainer(life).network.representation.coefficients for agent in agents for life in (0, 1)]
    assert len({array.detach().numpy().tobytes() for array in drawn}) == 4


def test_harmonics_know_the_spacing_of_their_grid():
    """A ring at 1.4 angstrom is 3.5 voxels away on a grid of 0.4."""
    agent = toy(grid=0.4, representation="harmonics", representation_options={"radius": 1.4}).models["agent"]
    ring = agent.trainer().network.representation.kernels()[0, 1].numpy()  # |m| = 0, behind the Gaussian
    middle = ring.shape[0] // 2
    spacing = np.linalg.norm(agent.built_on.steps, axis=1).mean()
    assert abs(int(np.argmax(ring[middle, middle:])) - 1.4 / spacing) <= 0.5


@pytest.mark.parametrize("representation", ["gaussian", "agr", "displaced", "harmonics"])
def test_images_are_round_in_skewed_cells(representation):
    cell = [[6.0, 0, 0], [3.0, 27**0.5, 0], [0, 0, 9.0]]
    box = ([0, 0, 4.0], [*cell[:2], [0, 0, 1.0]])
    problem = Problem("C3", cell=cell, pbc=(True, True, False), box=box)
    agent = recipes.asla(problem, SmoothCarbon(), grid=0.3, representation=representation).models["agent"]
    kernel = agent.trainer().network.representation.kernels()[0, 0].detach().numpy()
    steps, middle = agent.built_on.steps[:, :2], len(kernel) // 2
    offsets = np.stack(np.meshgrid(*[np.arange(-middle, middle + 1)] * 2, indexing="ij"), -1) @ steps
    r, values = np.linalg.norm(offsets, axis=-1).round(6).ravel(), kernel.ravel()
    for one in np.unique(r)[:12]:
        assert np.ptp(values[r == one]) < 1e-6
    assert np.ptp(kernel) > 0.1


@pytest.mark.parametrize("degrees", [60, 30])
@pytest.mark.parametrize("kind", ["Gaussian", "CircularHarmonics"])
def test_windows_of_skewed_cells_hold_the_image(kind, degrees):
    networks = pytest.importorskip("thalweg.networks")
    angle = np.deg2rad(degrees)
    lattice = np.array([[1.0, 0], [np.cos(angle), np.sin(angle)]])
    kernels = getattr(networks, kind)(1, 2, lattice=lattice).kernels()[0].abs().numpy()
    faces = np.concatenate([kernels[:, 0], kernels[:, -1], kernels[:, :, 0], kernels[:, :, -1]], axis=1)
    assert faces.max() < 1e-3 < kernels.max()


def test_deep_layers_of_a_slab_are_no_neighbours_in_the_plane():
    slab = fcc100("Au", (2, 2, 3), vacuum=6.0)
    slab.pbc = (True, True, False)
    z = np.unique(slab.positions[:, 2].round(6))
    plane = z[-1] + 1.5
    box = ([0, 0, plane - 0.5], [slab.cell[0], slab.cell[1], [0, 0, 1.0]])
    grid = GridSettings(0.4).of(Problem("Au2", template=slab, box=box))
    assert not grid.alone and len(grid.template) == 4  # the uppermost layer
    assert sorted(grid.template[:, 1]) == sorted(grid.nearest(slab.positions[slab.positions[:, 2] > z[-1] - 0.1]))


def test_a_neighbour_through_the_cells_top_is_one():
    below = Atoms("Au", [[2.0, 2.0, 5.0]], cell=[6.0] * 3, pbc=True)
    problem = Problem("Au", template=below, box=([0, 0, 0.0], [[6.0, 0, 0], [0, 6.0, 0], [0, 0, 1.0]]))
    assert len(GridSettings(0.4).of(problem).template) == 1  # 1.5 angstrom away
    open_top = Atoms("Au", [[2.0, 2.0, 5.0]], cell=[6.0] * 3, pbc=(True, True, False))
    problem = Problem("Au", template=open_top, box=([0, 0, 0.0], [[6.0, 0, 0], [0, 6.0, 0], [0, 0, 1.0]]))
    assert len(GridSettings(0.4).of(problem).template) == 0


def test_more_threads_learn_and_build_the_same():
    one, two = (toy(seed=3, acquisition="lcb", candidates=4, threads=n) for n in (1, 2))
    with one, two:
        one.run(6)
        two.run(6)
        assert two.models["agent"].threads == two.fitted["agent"].trainer.threads == 2
        assert np.array_equal(one.data.positions, two.data.positions)
        assert np.array_equal(one.fitted["agent"].trainer.parameters, two.fitted["agent"].trainer.parameters)


def test_displaced_candidates_go_to_the_grid_as_well():
    with toy(seed=2, grid=0.2, acquisition="lcb", candidates=2, displaced=8, rebuild_after=3) as search:
        search.run(14)
        assert "AlongForces" in search.data.columns["origin"].tolist()
        fractional = search.data.positions[:, :2] / np.diag(search.models["agent"].built_on.steps[:, :2])
        assert np.allclose(fractional, np.rint(fractional), atol=1e-9)
        # none of them back where its parent was
        where = np.rint(fractional.reshape(14, 4, 2)).astype(int)
        assert len({np.sort(one, axis=0).tobytes() for one in where}) == 14


def test_a_plane_that_is_not_xy_is_refused():
    upright = Problem("C3", cell=9.0, box=([2.0] * 3, [[5.0, 0, 0], [0, 0, 5.0], [0, 1.0, 0]]))
    with pytest.raises(ConfigurationError, match="lies in the plane of x and y"):
        GridSettings(0.5).of(upright)


def test_a_store_goes_on_with_another_number_of_threads(tmp_path):
    with toy(seed=3, store=tmp_path / "run.journal", threads=1) as search:
        search.run(2)
    with toy(seed=3, store=tmp_path / "run.journal", threads=2) as search:
        search.run(2)
        assert search.evaluations == 4


def test_later_lives_draw_their_own_weights_and_need_no_file(tmp_path):
    path = tmp_path / "agent.npz"
    with toy(seed=5) as small:
        small.run(2)
        small.models["agent"].fit(small.data).save(path)
    options = {"seed": 6, "lifetime": 2, "transfer_from": str(path)}
    with toy(**options) as straight:
        straight.run(5)
    with toy(store=tmp_path / "run.journal", **options) as search:
        search.run(1)
        agent = search.models["agent"]
        assert not np.array_equal(agent.trainer(0).parameters, agent.trainer(1).parameters)
        path.unlink()
        search.run(4)
        assert np.array_equal(search.data.positions, straight.data.positions)


def test_three_dimensions_and_several_species():
    problem = Problem("Ni2Au2", cell=12.0, box=4.0)
    with recipes.asla(problem, EMT(), grid=0.8, dimension=3, seed=1, network="light-3d", threads=1) as search:
        search.run(3)
        assert search.evaluations == 3 and np.isfinite(search.best_energy)


def test_an_agent_finds_a_small_minimum_sooner_than_chance():
    """Four carbons on a coarse grid: the best energy of 150 episodes, agent against uniform, 3 seeds each."""
    best = {}
    for policy in ("epsilon-greedy", "uniform"):
        runs = []
        for seed in range(3):
            with toy(seed=seed, policy=policy) as search:
                search.run(150)
                runs.append(np.mean(search.data.columns["energy"][-50:]))
        best[policy] = np.mean(runs)
    assert best["epsilon-greedy"] < best["uniform"] - 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"postprocess": "relax"}, "postprocess must be one of"),
        ({"acquisition": "ei"}, "acquisition must be one of"),
        ({"rebuild": 3}, "rebuild"),
        ({"unchosen": 3}, "acquisition"),
        ({"representation": "gausian"}, "Did you mean 'gaussian'"),
        ({"policy": "greedy"}, "policy"),
        ({"span": -1.0}, "span"),
        ({"favour": -1.0}, "favour"),
        ({"patience": -1}, "patience"),
        ({"lifetime": -1}, "lifetime"),
        ({"train_steps": 0}, "steps"),
        ({"lr": 0.0}, "learning rate"),
        ({"candidates": 0, "acquisition": "lcb"}, "candidates must be a whole number of at least 1"),
        ({"rebuild": 2.5, "acquisition": "lcb"}, "rebuild must be a whole number"),
        ({"rebuild": 10, "rebuild_after": 0, "acquisition": "lcb"}, "nothing to rebuild"),
        ({"replay": 2.5}, "replay"),
        ({"patience": float("inf")}, "patience of an agent must be a whole number"),
        ({"backend": "foo"}, "backend must be"),
        ({"policy": "uniform", "heights": {"C": 50.0}}, "must lie in the box"),
        ({"lr": float("inf")}, "learning rate"),
        ({"heights": {"C": 50.0}}, "must lie in the box"),
        ({"heights": [5.0]}, "which species"),
        ({"heights": {"C": "low"}}, "must be a number of angstrom"),
        ({"grid": "fine"}, "spacing of a grid"),
        ({"dimension": 2.0}, "must be 2 or 3"),
        ({"grid": 30.0}, "no room for"),
        ({"network": "thesis-3d-full"}, "on a grid of dimension 2"),
        ({"representation_options": {"widht": 1.0}}, "Did you mean 'width'"),
        ({"representation_options": {"width": "a"}}, "cannot be made of"),
        ({"representation_options": {"width": [1.0, 2.0]}}, "one per species"),
        ({"representation": "displaced", "representation_options": {"width": 0.0}}, "width must be above 0"),
        ({"representation": "harmonics", "representation_options": {"spacing": 0.0}}, "spacing of circular harmonics"),
        ({"representation": "harmonics", "representation_options": {"orders": 2}}, "cannot be made of"),
        ({"representation": "agr", "representation_options": {"l1": -1.0}}, "l1 must be at least 0"),
        ({"network": "thesis"}, "Did you mean .thesis-2d"),
    ],
)
def test_bad_options_of_the_recipe_are_named(options, words):
    with pytest.raises(ConfigurationError, match=words):
        toy(**options)  # before anything is evaluated


def test_the_recipe_can_be_asked_for_in_a_file(tmp_path):
    from thalweg.config import Configuration

    text = """
[problem]
symbols = "C4"
cell = [5.0, 4.4, 10.0]
pbc = [true, true, false]
box = { corner = [0, 0, 4.5], vectors = [[5.0, 0, 0], [0, 4.4, 0], [0, 0, 1.0]] }
[calculator]
name = "smooth-carbon"
[search]
method = "asla"
grid = 0.4
postprocess = "surrogate"
heights = { C = 5.0 }
"""
    path = tmp_path / "asla.toml"
    path.write_text(text)
    configuration = Configuration.load(path)
    with configuration.make_search(seed=1, store=None) as search:
        search.callbacks.append(StopAt(-1e9))
        search.run(3)
        assert search.evaluations == 3
    assert json.loads(json.dumps(search._meta()))


def test_low_episodes_are_replayed_more_and_the_learning_rate_warms_up(monkeypatch):
    from thalweg import agent as module

    drawn = []
    with toy(seed=1, favour=2.0, warm_up=20, train_steps=3) as search:
        train_on = module.FittedAgent._train_on
        monkeypatch.setattr(
            module.FittedAgent,
            "_train_on",
            lambda self, chosen, rng: drawn.append(chosen) or train_on(self, chosen, rng),
        )
        search.run(30)
        agent = search.models["agent"].fit(search.data)
    late = drawn[45:]  # episodes 15 and later, three steps each
    replayed = []
    for _, newest, *others in late:
        ranks = np.argsort(np.argsort(agent.energies[: newest + 1]))
        replayed += [ranks[episode] / newest for episode in others]
    assert np.mean(replayed) < 0.4  # evenly drawn: 0.5
    assert agent.trainer.updates == 90 and agent.trainer.lr == agent.model.lr


def test_lives_last_as_long_as_luby_says():
    from thalweg.agent import _luby

    assert [_luby(k) for k in range(1, 16)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]


@pytest.mark.parametrize(("patience", "lifetime"), [(4, 0), (0, 5), (4, 7)])
def test_an_agent_without_success_begins_anew(monkeypatch, patience, lifetime):
    from thalweg import agent as module

    drawn, weights = [], []
    train_on = module.FittedAgent._train_on

    def noting(self, chosen, rng):
        drawn.append((len(self.builds) - 1, list(chosen)))
        weights.append(self.trainer.parameters.copy())
        return train_on(self, chosen, rng)

    monkeypatch.setattr(module.FittedAgent, "_train_on", noting)
    with toy(seed=1, patience=patience, lifetime=lifetime, train_steps=1) as search:
        search.run(40)
        search.ask()  # learns the last
    agent = search.fitted["agent"]
    # by hand: where lives begin, from the energies alone
    begins, best, last = [0], np.inf, 0
    for episode, energy in enumerate(agent.energies):
        length = lifetime * [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8][len(begins) - 1]
        if episode - last > patience > 0 or episode - begins[-1] >= length > 0:
            begins.append(episode)
            best, last = np.inf, episode
        if energy < best:
            best, last = energy, episode
    assert len(begins) > 2 and agent._lives == len(begins) - 1
    for (episode, chosen), before in zip(drawn, weights, strict=True):
        life = np.searchsorted(begins, episode, side="right") - 1
        assert min(chosen) >= begins[life]
        assert chosen[0] == begins[life] + np.argmin(agent.energies[begins[life] : episode + 1])
        if episode == begins[life]:  # other initial weights in every life
            assert np.array_equal(before, agent.model.trainer(int(life)).parameters)
    firsts = [agent.model.trainer(life).parameters for life in range(len(begins))]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(firsts, 2))
