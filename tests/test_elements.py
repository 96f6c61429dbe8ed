"""Every shipped element keeps the laws of `thalweg.testing.check_element`, and does what it says."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import fcc111
from test_models import random_batch
from thalweg import (
    GPR,
    LCB,
    AcceptLower,
    AlongForces,
    Batch,
    Best,
    Centre,
    ComplementaryEnergy,
    Connected,
    Duplicate,
    Evaluate,
    ExpectedImprovement,
    FirstOf,
    KernelSimilarity,
    KMeans,
    LastAccepted,
    Metropolis,
    MinDistance,
    Novelty,
    OneOf,
    Permute,
    Population,
    Problem,
    Random,
    Rattle,
    Relax,
    Remembering,
    Search,
    SurrogateHops,
    Thompson,
    Unchosen,
    Wrap,
    _core,
)  # fmt: skip
from thalweg.calculators import EMT
from thalweg.errors import ConfigurationError
from thalweg.schedule import scheduled
from thalweg.testing import check_element, example_search
from toys import PairToy


@pytest.fixture(scope="module")
def with_model():
    return lambda: example_search(models={"gp": GPR()})


@pytest.mark.parametrize(
    ("element", "kind"),
    [
        (Random(5), "propose"),
        (Rattle(5), "propose"),
        (Permute(5), "propose"),
        (AlongForces(5), "propose"),
        (ComplementaryEnergy(5), "propose"),
        (ComplementaryEnergy(5, few=False, attractors="clusters"), "propose"),
        (Unchosen(5), "propose"),
        (FirstOf(Rattle(2), Random(2)), "propose"),
        (OneOf(Rattle(2), Permute(2)), "propose"),
        (KMeans(4), "sample"),
        (Best(3), "sample"),
        (Novelty(3), "sample"),
        (LastAccepted(), "sample"),
        (Population(), "sample"),
        (MinDistance(0.7), "refine"),
        (Connected(), "refine"),
        (Centre(), "refine"),
        (Wrap(), "refine"),
        (Relax(EMT(), 5), "refine"),
        (Relax(PairToy(), 5), "refine"),
        (SurrogateHops(EMT(), 2, 10), "refine"),
        (SurrogateHops(EMT(), 2, 10, keep="all"), "refine"),
        (Evaluate(EMT()), "evaluate"),
        (Evaluate(EMT(), 3), "evaluate"),
        (Duplicate(), "evaluate"),
        (Metropolis(), "settle"),
        (Metropolis(c2=1.5), "settle"),
        (AcceptLower(), "settle"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_shipped_elements_conform(element, kind):
    check_element(element, kind)


@pytest.mark.parametrize(
    ("element", "kind"),
    [
        (LCB(2.0), "acquire"),
        (ExpectedImprovement(), "acquire"),
        (Thompson(), "acquire"),
        (KernelSimilarity(4), "sample"),
        (Relax(LCB(2.0), 10), "refine"),
        (Relax("gp", 10), "refine"),
        (SurrogateHops(LCB(2.0), 2, 10), "refine"),
    ],
)
def test_elements_on_models_conform(element, kind, with_model):
    check_element(element, kind, search=with_model())


def test_metropolis_does_not_accept_pieces():
    """From pieces no rattle leads to a structure in one piece, so a basin hopping would be stuck."""
    problem = Problem("Au2", cell=12.0)
    for apart, c2, accepted in [(2.7, 1.5, True), (5.0, 1.5, False), (5.0, np.inf, True)]:
        batch = problem.batch(np.array([[[3.0, 6, 6], [3.0 + apart, 6, 6]]]))
        batch = batch.with_columns(energy=np.ones(1), ticket=np.zeros(1, int), point=np.zeros(1, int))
        key = SimpleNamespace(rng=np.random.default_rng)
        ctx = SimpleNamespace(problem=problem, carry={}, key=key, keep=lambda **values: None)
        assert Metropolis(c2=c2)(batch, ctx).columns["accepted"].tolist() == [accepted]


def test_the_checker_finds_what_is_wrong():
    def global_random(ctx):
        np.random.seed(1)  # noqa: NPY002
        return Random(1)(ctx)

    class Forgets:
        name = "Forgets"
        calls = 0

        def __call__(self, ctx):
            Forgets.calls += 1
            return Random(1 + Forgets.calls % 2)(ctx)

    with pytest.raises((AssertionError, AttributeError)):
        check_element(global_random, "propose")
    with pytest.raises((AssertionError, AttributeError), match=r"same key|pickle"):
        check_element(Forgets(), "propose")
    with pytest.raises(AssertionError, match="shape"):
        check_element(_bad_scores, "acquire")


def _bad_scores(batch, ctx):
    return np.zeros(1)


def test_schedules():
    assert [scheduled({0: 10, 5: 3}, k) for k in (0, 4, 5, 99)] == [10, 10, 3, 3]
    assert len(example_search().problem.counts) == 2
    with pytest.raises(ConfigurationError, match="beginning at 0"):
        Random({5: 3})
    with pytest.raises(ConfigurationError, match="kappa must be a number"):
        LCB(-1.0)


def test_kmeans_takes_the_lowest_of_each_cluster():
    search = example_search(steps=12)
    context = search.ask().context
    sample = KMeans(3)(context)
    energies = context.data.columns["energy"]
    rows = sample.columns["row"]
    assert 1 <= len(rows) <= 3
    assert int(np.nanargmin(energies)) in rows
    assert np.array_equal(sample.positions, context.data.take(rows).positions)
    assert len(set(rows.tolist())) == len(rows)


def test_duplicates_are_rejected_also_when_turned_and_shuffled():
    search = example_search()
    context = search.ask().context
    known = context.data[0]
    angle = 0.7
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turned = known.with_positions((known.positions - 6.0) @ turn.T + 6.0)
    shifted = known.with_positions(known.positions + np.random.default_rng(0).normal(0, 0.1, known.positions.shape))
    status = Duplicate()(Batch.concat([turned.bare(), shifted.bare()]), context).columns["status"]
    assert status.tolist() == [2, 0]


def test_centre_and_wrap():
    problem = Problem("Au3", cell=10.0, box=6.0)
    batch = problem.batch(np.random.default_rng(1).uniform(0, 4, (2, 3, 3)))
    context = example_search().ask().context
    centred = Centre()(batch, context)
    assert np.allclose(centred.positions.reshape(2, 3, 3).mean(1), 5.0)
    periodic = Problem("Au3", cell=[[4, 0, 0], [1, 4, 0], [0, 0, 9]], pbc=[True, True, False])
    outside = periodic.batch(np.random.default_rng(2).uniform(-9, 9, (2, 3, 3)))
    wrapped = Wrap()(outside, context)
    fractional = wrapped.positions @ np.linalg.inv(periodic.cell)
    assert np.all(fractional[:, :2] >= -1e-12) and np.all(fractional[:, :2] < 1 + 1e-12)
    assert np.allclose(wrapped.positions[:, 2], outside.positions[:, 2])
    images = (wrapped.positions - outside.positions) @ np.linalg.inv(periodic.cell)
    assert np.allclose(images, np.round(images))


def test_relax_goes_down_and_evaluate_counts_every_point():
    from thalweg.calculators import landscape_of

    search = example_search()
    asked = search.ask()
    emt = landscape_of(EMT())
    before, _ = _core.evaluate(emt, asked.refined)
    relaxed = Relax(EMT(), 50)(asked.refined, asked.context)
    after, _ = _core.evaluate(emt, relaxed)
    assert np.all(after < before)
    slow = Relax(PairToy(), 20)(asked.refined[:1], asked.context)
    assert not np.array_equal(slow.positions, asked.refined[:1].positions)


# ---- polishing on a model -------------------------------------------------------------------------------------


class Guide:
    """A fitted model whose surface is given; 0 structures: it has learned nothing."""

    def __init__(self, surface, size=1):
        self.surface, self.size = surface, size

    def landscape(self, kappa):
        assert kappa == 0.0
        return self.surface


def follow(evaluate, candidates, surface, *, known=None, size=1, objective=None):
    """Rows of one gauge in a context made by hand, and how many true evaluations they took."""
    count = 0

    def measure(structure, calculate, **columns):
        nonlocal count
        count += 1
        energy, forces, reason = calculate(structure)
        row = structure.bare().with_columns(energy=energy, status=np.uint8(1 if reason else 0), **columns)
        return row.with_atom_columns(forces=forces)

    problem = Problem("Au4Ni4", cell=12.0, box=6.0)
    context = SimpleNamespace(
        problem=problem if objective is None else SimpleNamespace(objective=objective), iteration=0,
        data=Batch.empty() if known is None else known, models={"gp": Guide(surface, size)}, measure=measure,
    )  # fmt: skip
    return evaluate(candidates, context), count


def candidate_of(seed=1, steps=0):
    """Au4Ni4, near a minimum of EMT after so many steps."""
    batch = random_batch(1, seed, numbers=(28, 28, 28, 28, 79, 79, 79, 79))
    relaxed = _core.relax(_core.Emt(), batch, steps=steps, threads=1)[0] if steps else batch.positions
    moved = relaxed + np.random.default_rng(seed).normal(0, 0.1 if steps else 0.0, relaxed.shape)
    return batch.with_positions(moved).bare().with_columns(origin="Random", parent=-1, candidate=0, score=0.0)


def largest(rows):
    forces = rows.atom_columns["forces"]
    return np.sqrt(np.maximum.reduceat((forces**2).sum(axis=1), rows.offsets[:-1]))


def learned(count=25, **options):
    numbers = (28, 28, 28, 28, 79, 79, 79, 79)
    return GPR(prior="fitted", **options).fit(random_batch(count, 70, numbers=numbers)).landscape(0.0)


def test_a_promising_candidate_is_followed_to_its_minimum():
    """In fewer evaluations than the minimiser takes, which knows nothing: both counted, ten candidates."""
    surface, gauge = learned(), Evaluate(EMT(), polish_on="gp", polish_tolerance=0.05, promising=np.inf)
    alone = Evaluate(EMT(), steps=200, force_tolerance=0.05)
    guided, blind = [], []
    for seed in range(10):
        candidate = candidate_of(seed, steps=200)
        rows, count = follow(gauge, candidate, surface)
        assert len(rows) == count  # each step costs one evaluation
        assert rows.columns["origin"].tolist() == ["Random"] + ["polish"] * (count - 1)
        assert rows.columns["candidate"].tolist() == [0] + [-1] * (count - 1)
        assert np.array_equal(rows[:1].positions, candidate.positions)
        for i in range(count):
            energy, forces = _core.evaluate(_core.Emt(), rows[i])
            assert rows.columns["energy"][i] == energy[0]
            assert np.array_equal(rows[i].atom_columns["forces"], forces)
        low = int(np.argmin(rows.columns["energy"]))
        below, steps = follow(alone, candidate, surface)
        # a step that gains less than 0.2 meV is not made, however large the forces
        assert rows.columns["energy"][low] < below.columns["energy"].min() + 1e-3
        assert largest(rows)[low] < 0.1
        guided.append(count)
        blind.append(steps)
    print(f"evaluations to the minimum: {np.mean(guided)} on the model, {np.mean(blind)} without")
    assert np.mean(guided) < 0.6 * np.mean(blind)


def test_a_perfect_model_needs_one_step():
    candidate = candidate_of(3, steps=200)
    gauge = Evaluate(EMT(), polish_on="gp", promising=np.inf)
    rows, count = follow(gauge, candidate, _core.Emt())
    assert count == 2 and largest(rows)[1] < gauge.polish_tolerance
    # a trusted distance: the first step is no longer than 0.4 angstrom
    far = candidate_of(4)
    rows, count = follow(gauge, far, _core.Emt())
    steps = np.linalg.norm(np.diff(rows.positions.reshape(count, 8, 3), axis=0), axis=2).max(axis=1)
    assert count > 2 and steps[0] == pytest.approx(0.4, abs=1e-9) and steps[1] <= 0.8 + 1e-9
    assert largest(rows)[count - 1] < gauge.polish_tolerance and np.all(np.diff(rows.columns["energy"]) < 0)


def test_an_unpromising_candidate_is_left_alone():
    candidate, known = candidate_of(3, steps=200), candidate_of(5, steps=400)
    lowest = float(_core.evaluate(_core.Emt(), candidate)[0][0])
    bottom = float(follow(Evaluate(EMT(), 200, 1e-4), candidate, None)[0].columns["energy"].min())

    def gauged(best, **options):
        done = known.with_columns(energy=best, status=np.uint8(0)).with_atom_columns(forces=np.zeros((8, 3)))
        return follow(Evaluate(EMT(), polish_on="gp", **options), candidate, _core.Emt(), known=done, **context)[1]

    context = {}
    assert gauged(bottom - 0.01) == 1
    assert gauged(bottom + 0.01) == 2
    assert gauged(bottom - 0.01, promising=0.02) == 2
    assert gauged(bottom + 0.01, promising=-0.02) == 1
    assert gauged(lowest + 9.0, promising=-np.inf) == 1  # never
    context = {"size": 0}  # a model that knows nothing guides nobody
    assert gauged(bottom + 0.01) == 1
    # what is minimised may be a free energy, which differs from the energy by a constant
    context = {"objective": lambda batch: batch.columns["energy"] - 50.0}
    assert gauged(bottom + 0.01) == 2
    assert gauged(bottom - 0.01) == 1


@pytest.mark.parametrize("surface", ["soft", "none"])
def test_where_the_model_misleads_the_minimiser_goes_on(surface):
    """Three steps uphill, in a row or not, then down without the model, within the steps allowed."""

    def soft(numbers, positions, cell, pbc):
        return 0.02 * float(np.square(positions - 6.0).sum()), -0.04 * (positions - 6.0)

    candidate = candidate_of(6, steps=200)
    gauge = Evaluate(EMT(), polish_on="gp", polish_steps=60, polish_tolerance=0.05, promising=np.inf)
    misleading = {
        "soft": _core.PythonLandscape(soft, "soft"),
        "none": _core.PairPrior("bonding", depth=0.0),
    }[surface]
    rows, count = follow(gauge, candidate, misleading)
    energies = rows.columns["energy"]
    assert rows.ok.all() and largest(rows)[int(np.argmin(energies))] < 0.05
    best = np.minimum.accumulate(energies)
    uphill = energies[1:] >= best[:-1]
    assert uphill.sum() >= 3 and count < 50
    for steps in range(1, 7):  # no more steps than were given, and no error, wherever it is among them
        short = Evaluate(EMT(), polish_on="gp", polish_steps=steps, polish_tolerance=0.05, promising=np.inf)
        some, made = follow(short, candidate, misleading)
        assert made == 1 + steps and np.array_equal(some.positions, rows[: 1 + steps].positions)
    # a candidate is followed only while the model promises something: it has nothing more to say after the third
    limited = Evaluate(EMT(), polish_on="gp", polish_steps=60, polish_tolerance=0.05, promising=1e3)
    ended, made = follow(limited, candidate, misleading)
    third = 1 + int(np.flatnonzero(uphill)[2])
    assert made == 1 + third and np.array_equal(ended.positions, rows[: 1 + third].positions)


@pytest.mark.parametrize("when", [0, 1, 2, 3])
def test_a_failed_evaluation_ends_the_polish(when):
    class Fails(PairToy):
        def calculate(self, *arguments, **named):
            if self.calls == when:
                self.calls += 1
                raise RuntimeError("did not converge")
            super().calculate(*arguments, **named)

    bonding = _core.PairPrior("bonding", depth=0.9)
    gauge = Evaluate(Fails(), polish_on="gp", polish_steps=9, promising=np.inf)
    both = Batch.concat([candidate_of(7), candidate_of(8)])
    rows, count = follow(gauge, both, bonding)
    assert len(rows) == count and np.sum(~rows.ok) == 1
    assert count > 4  # the other candidate is polished all the same
    if when > 1:
        bad = int(np.flatnonzero(~rows.ok)[0])
        assert rows.columns["origin"][bad] == "polish"
    assert np.isfinite(rows.columns["energy"][rows.ok]).all()


def test_a_candidate_with_true_steps_is_polished_from_its_lowest_point():
    candidate = candidate_of(9)
    gauge = Evaluate(EMT(), steps=1, polish_on="gp", polish_steps=1, promising=np.inf, max_step=0.001)
    rows, count = follow(gauge, candidate, _core.Emt())
    assert count == 3 and rows.columns["origin"].tolist() == ["Random", "Random", "polish"]
    low = int(np.argmin(rows.columns["energy"][:2]))
    moves = np.linalg.norm((rows[2].positions - rows[low].positions), axis=1)
    assert moves.max() == pytest.approx(0.4, abs=1e-9)


def test_fixed_atoms_stay_where_they_are_in_a_polish():
    candidate = candidate_of(3, steps=200)
    fixed = np.zeros((8, 3), bool)
    fixed[:2] = True
    held = candidate._changed(fixed=fixed)
    rows, count = follow(Evaluate(EMT(), polish_on="gp", promising=np.inf), held, _core.Emt())
    assert count == 2
    places = rows.positions.reshape(count, 8, 3)
    assert np.all(places[:, :2] == places[0, :2]) and np.all(places[1, 2:] != places[0, 2:])
    forces = rows[1].atom_columns["forces"]
    assert np.linalg.norm(forces[2:], axis=1).max() < 0.02


def test_polish_when_a_run_ends_follows_the_model(tmp_path):
    def searched(polish_on):
        search = Search(
            Problem("Au4Ni4", cell=12.0, box=6.0), propose=Random(4), acquire=LCB(2.0), models={"gp": GPR()}, seed=2,
            evaluate=Evaluate(EMT(), polish_on=polish_on, polish_last=2, promising=-np.inf),
        )  # fmt: skip
        search.run(12)
        return search.data.take(search.data.columns["origin"] == "polish")

    guided, blind = searched("gp"), searched(None)
    assert len(guided) and len(blind)
    assert guided.columns["parent"][0] == blind.columns["parent"][0]  # the lowest; then each goes its own way
    assert guided.columns["energy"].min() < blind.columns["energy"].min() + 0.3
    assert len(guided) < 0.8 * len(blind)


# ----------------------------------------------------------------------------------------------------------------


def test_duplicates_near_a_relaxed_structure():
    """A wider radius around structures without forces: who is in the basin of a known minimum is refused."""
    relaxed, rough = candidate_of(3, steps=400), candidate_of(4)
    bottom = _core.relax(_core.Emt(), relaxed, steps=400, force_tolerance=1e-3, threads=1)[0]
    relaxed = relaxed.with_positions(bottom)
    both = Batch.concat([relaxed, rough]).bare()
    energy, forces = _core.evaluate(_core.Emt(), both)
    data = both.with_columns(energy=energy, status=np.zeros(2, np.uint8)).with_atom_columns(forces=forces)
    shift = np.random.default_rng(1).normal(0, 0.003, (8, 3))
    candidates = Batch.concat([row.with_positions(row.positions + shift) for row in (relaxed, rough)]).bare()
    descriptor = Duplicate().descriptor
    known, new = descriptor.values(data), descriptor.values(candidates)
    distance = np.linalg.norm(known - new, axis=1) / np.linalg.norm(new, axis=1)
    assert np.all((distance > 1e-3) & (distance < 0.005))

    def refused(data, **options):
        context = SimpleNamespace(data=data, threads=1, features=lambda descriptor: descriptor.values(data))
        return Duplicate(**options)(candidates, context).columns["status"].tolist()

    assert refused(data) == [2, 0]
    assert refused(data, near_relaxed=0.0) == [0, 0]
    assert refused(data, near_relaxed=float(1.01 * distance[0])) == [2, 0]
    assert refused(data, near_relaxed=float(0.99 * distance[0])) == [0, 0]
    assert refused(data, force_tolerance=1e-6) == [0, 0]
    assert refused(data, tolerance=0.02) == [2, 2]  # the wider of the two counts
    # forces that are not known are not small; those of fixed atoms do not count
    assert refused(data.with_atom_columns(forces=np.full((16, 3), np.nan))) == [0, 0]
    pulled = forces.copy()
    pulled[0] = 5.0
    assert refused(data.with_atom_columns(forces=pulled)) == [0, 0]
    fixed = np.zeros((16, 3), bool)
    fixed[0] = True
    assert refused(data.with_atom_columns(forces=pulled)._changed(fixed=fixed)) == [2, 0]


def test_other_islands_on_a_slab_are_no_copies():
    """Most of a slab's fingerprint is the slab: two structures are then close on the scale of its length, and are copies
    only if they are on the scale of what differs between structures."""
    slab = fcc111("Au", (3, 3, 3), vacuum=5.0, orthogonal=False)
    problem = Problem(
        "Ni2", template=slab, box=([0, 0, slab.positions[:, 2].max() + 1.0], [*slab.cell[:2], [0, 0, 4.0]])
    )
    builds = Random(6)(example_search(problem).ask().context)
    relaxed = builds.with_positions(_core.relax(_core.Emt(), builds, steps=400, force_tolerance=0.01)[0]).bare()
    energy, forces = _core.evaluate(_core.Emt(), relaxed)
    order = np.argsort(energy)
    relaxed, energy = relaxed.take(order), energy[order]
    forces = forces.reshape(len(relaxed), -1, 3)[order].reshape(-1, 3)
    data = relaxed.with_columns(energy=energy, status=np.zeros(len(energy), np.uint8)).with_atom_columns(forces=forces)
    other = int(np.flatnonzero(energy > energy[0] + 0.01)[0])  # the others are known, the lowest minimum is not
    known = data.take(np.arange(other, len(data)))
    context = SimpleNamespace(data=known, threads=1, features=lambda descriptor: descriptor.values(known))
    feature, features = Duplicate().descriptor.values(data[:1])[0], Duplicate().descriptor.values(known)
    nearest = float(np.linalg.norm(features - feature, axis=1).min() / np.linalg.norm(feature))
    assert Duplicate(near_relaxed=1.2 * nearest)(data[:1].bare(), context).columns["status"].tolist() == [0]
    nudged = known[0].with_positions(known[0].positions + 1e-5 * ~known[0].fixed)
    assert Duplicate()(nudged.bare(), context).columns["status"].tolist() == [2]


def test_an_energy_that_cannot_be_is_a_failed_calculation():
    class Collapses(PairToy):
        def calculate(self, *arguments, **named):
            super().calculate(*arguments, **named)
            if self.calls > 4 and self.calls % 2:
                self.results["energy"] -= 1e5

    problem = Problem("Au4", cell=12.0, box=6.0)
    search = Search(problem, propose=Random(1), evaluate=Evaluate(Collapses()), seed=1)
    search.run(10)
    energies, ok = search.data.columns["energy"], search.data.ok
    assert ok.tolist() == [True] * 4 + [False, True] * 3
    assert np.isnan(energies[~ok]).all() and search.best_energy > -100
    assert "below the lowest so far" in search._last_reason


def test_a_polish_that_crawls_is_left():
    """A surface with a slope of a thousandth: steps gain next to nothing, and a candidate is not worth forty of them."""

    def flat(numbers, positions, cell, pbc):
        away = positions - 6.0
        return float(2e-4 * np.sqrt(1 + np.square(away)).sum()), -2e-4 * away / np.sqrt(1 + np.square(away))

    candidate = candidate_of(6, steps=0)
    shallow = _core.PythonLandscape(
        lambda n, x, c, p: (0.9 * flat(n, x, c, p)[0], 0.9 * flat(n, x, c, p)[1]), "shallow"
    )

    class Flat(PairToy):
        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            energy, forces = flat(atoms.numbers, atoms.positions, None, None)
            self.results = {"energy": energy, "forces": forces}

    gauge = Evaluate(Flat(), polish_on="gp", polish_steps=40, polish_tolerance=1e-6, promising=1.0)
    assert follow(gauge, candidate, shallow)[1] <= 5


def test_species_that_the_calculator_does_not_know_are_named_at_once():
    with pytest.raises(ConfigurationError, match="Ti"):
        example_search(Problem("Ti2Au2", cell=12.0, box=6.0))


def test_a_model_that_is_not_there():
    search = Search(Problem("Au2", box=5.0), propose=Random(1), acquire=LCB(), evaluate=Evaluate(EMT()))
    with pytest.raises(ConfigurationError, match="no model named 'gp'"):
        search.run(1)
    search = Search(Problem("Au2", box=5.0), propose=Random(1), evaluate=Evaluate(EMT(), polish_on="pg"))
    with pytest.raises(ConfigurationError, match="no model named 'pg'"):
        search.run(1)


def test_the_box_is_for_placed_atoms_free_template_atoms_know_no_walls():
    from ase.build import fcc111
    from ase.constraints import FixAtoms

    slab = fcc111("Au", (2, 2, 2), vacuum=8.0, orthogonal=True, periodic=True)
    slab.positions[4:, 2] += 0.5  # the upper layer is too high and free
    slab.set_constraint(FixAtoms(range(4)))
    top = slab.positions[:, 2].max()
    box = (np.array([0, 0, top + 1.0]), np.vstack([slab.cell[0], slab.cell[1], [0, 0, 3.0]]))
    problem = Problem.from_atoms(slab, "Ni2", box=box)
    search = example_search(problem, steps=1)
    asked = search.ask()
    relaxed = Relax(EMT(), 30)(asked.refined, asked.context)
    moved = (relaxed.positions - asked.refined.positions).reshape(len(relaxed), -1, 3)
    assert np.all(moved[:, :4] == 0)
    assert np.all(np.abs(moved[:, 4:8, 2]).max(axis=1) > 0.05)
    heights = relaxed.positions.reshape(len(relaxed), -1, 3)[:, 8:, 2]
    assert np.all(heights > top + 1.0 - 1e-9)
    rattled = Rattle(4)(search._at(asked.context, "propose", Rattle(4)).__class__(**{
        **asked.context.__dict__, "sample": search.data.with_columns(row=np.arange(len(search.data)))
    }))  # fmt: skip
    template = rattled.positions.reshape(len(rattled), -1, 3)[:, :8]
    parents = search.data.positions.reshape(len(search.data), -1, 3)[:, :8]
    assert all(any(np.array_equal(t, p) for p in parents) for t in template)


def test_relaxations_that_break_a_structure_are_taken_back():
    """On a surface that pulls all atoms together, or apart, the candidate stays as it was."""
    search = example_search()
    asked = search.ask()
    before = asked.refined
    together = _core.PairPrior("bonding", radius_scale=0.5)
    assert np.array_equal(Relax(together, 100)(before, asked.context).positions, before.positions)
    free = Relax(together, 100, c1=0.0)(before, asked.context)
    assert np.all(_core.closest_contacts(free) < 0.6)
    apart = _core.PairPrior("repulsive", repulsive_factor=2.0, cutoff=5.5)
    free = Relax(apart, 300, c2=np.inf)(before, asked.context)
    broken = _core.fragments(free, 1.2) > _core.fragments(before, 1.2)
    assert broken.any()
    kept = Relax(apart, 300, c2=1.2)(before, asked.context)
    atoms = np.repeat(broken, 6)
    assert np.array_equal(kept.positions[atoms], before.positions[atoms])
    assert np.array_equal(kept.positions[~atoms], free.positions[~atoms])


# ---- what was known, again -----------------------------------------------------------------------------------


def remembering_search(displaced=2, **options):
    """A search whose generators look back: what was not evaluated, and what moves along its forces."""
    return Search(
        Problem("Ni3Au2", cell=12.0, box=6.0), sample=Best(3),
        propose=[Random({0: 4, 3: 1}), Unchosen({0: 0, 3: 3}), AlongForces({0: 0, 3: displaced}, step=0.1)],
        models={"gp": GPR()}, acquire=Remembering(LCB(), 3), evaluate=Evaluate(EMT()), seed=3, **options,
    )  # fmt: skip


def test_unchosen_candidates_come_again_and_evaluated_ones_do_not():
    steps = []
    search = remembering_search(displaced=0)
    search.callbacks.append(lambda step, _: steps.append(step))
    search.run(8)
    for before, step in itertools.pairwise(steps[3:]):
        again = step.refined.take(step.refined.columns["origin"] == "Unchosen").positions.reshape(-1, 5, 3)
        order = np.argsort(before.refined.columns["score"], kind="stable")
        expected = before.refined.positions.reshape(-1, 5, 3)[order[1:4]]
        assert np.array_equal(again, expected)


def test_displaced_structures_follow_their_true_forces():
    steps = []
    search = remembering_search()
    search.callbacks.append(lambda step, found: steps.append((step, found.data)))
    search.run(5)
    step, data = steps[3]
    moved = step.refined.take(step.refined.columns["origin"] == "AlongForces")
    assert len(moved) == 2
    for i in range(len(moved)):
        parent = data[int(moved.columns["parent"][i])]
        away, forces = moved[i].positions - parent.positions, parent.atom_columns["forces"]
        assert np.isclose(np.linalg.norm(away, axis=1).max(), 0.1)
        assert np.allclose(away / 0.1, forces / np.linalg.norm(forces, axis=1).max())
    with pytest.raises(ConfigurationError, match="step"):
        AlongForces(1, step=0.0)


def test_a_search_that_looks_back_resumes_as_it_was(tmp_path):
    with remembering_search() as straight:
        straight.run(8)
    for part in (4, 1, 3):
        with remembering_search(store=tmp_path / "run.journal") as search:
            search.run(part)
            found = search.data
    assert np.array_equal(found.positions, straight.data.positions)
