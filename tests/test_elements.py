"""Every shipped element keeps the laws of `thalweg.testing.check_element`, and does what it says."""

from __future__ import annotations

import numpy as np
import pytest
from thalweg import (
    GPR,
    LCB,
    Batch,
    Best,
    Centre,
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
    Problem,
    Random,
    Rattle,
    Relax,
    SurrogateHops,
    Thompson,
    Wrap,
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
        (FirstOf(Rattle(2), Random(2)), "propose"),
        (OneOf(Rattle(2), Permute(2)), "propose"),
        (KMeans(4), "sample"),
        (Best(3), "sample"),
        (Novelty(3), "sample"),
        (LastAccepted(), "sample"),
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
    from thalweg import _core
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


def test_species_that_the_calculator_does_not_know_are_named_at_once():
    with pytest.raises(ConfigurationError, match="Ti"):
        example_search(Problem("Ti2Au2", cell=12.0, box=6.0))


def test_a_model_that_is_not_there():
    from thalweg.search import Search

    search = Search(Problem("Au2", box=5.0), propose=Random(1), acquire=LCB(), evaluate=Evaluate(EMT()))
    with pytest.raises(ConfigurationError, match="no model named 'gp'"):
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
    from thalweg import _core

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
