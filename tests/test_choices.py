"""Samplers, acquisition functions, surrogate basin hopping and resets: that each does what it says, against oracles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from thalweg import (
    GPR,
    LCB,
    Batch,
    Best,
    Centre,
    ChosenModel,
    Connected,
    Duplicate,
    Evaluate,
    ExpectedImprovement,
    KernelSimilarity,
    KMeans,
    MinDistance,
    Novelty,
    Permute,
    Problem,
    Random,
    Rattle,
    Relax,
    ResetOnStagnation,
    Search,
    SurrogateHops,
    Thompson,
    _core,
    recipes,
)
from thalweg.calculators import EMT, landscape_of
from thalweg.errors import ConfigurationError
from thalweg.select import log_expected_improvement
from thalweg.testing import example_search
from toys import PairToy, same_rows

PROBLEM = Problem("Au4Ni4", cell=12.0, box=6.0)


@pytest.fixture(scope="module")
def asked():
    """A ticket of a search with a model and some thirty evaluations."""
    return example_search(steps=16, models={"gp": GPR()}).ask()


def kernel_matrix(kernel, a, b):
    square = ((a[:, None] - b[None]) ** 2).sum(-1)
    return kernel.amplitude * (
        kernel.weight_long * np.exp(-0.5 * square / kernel.length_long**2)
        + kernel.weight_short * np.exp(-0.5 * square / kernel.length_short**2)
    )


def posterior(context, batch):
    """(n, n) covariance of the posterior at a batch, thesis (2.15) in one line."""
    fitted = context.models["gp"]
    known, new = fitted.features(context.data.take(fitted.rows)), fitted.features(batch)
    k = kernel_matrix(fitted.kernel, known, known) + fitted.kernel.noise * np.eye(len(known))
    cross = kernel_matrix(fitted.kernel, known, new)
    return kernel_matrix(fitted.kernel, new, new) - cross.T @ np.linalg.solve(k, cross)


def pairwise(x):
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    return distance[np.triu_indices(len(x), 1)]


# ---- samplers ------------------------------------------------------------------------------------------------


def test_kernel_similarity_is_the_greedy_walk(asked):
    context = asked.context
    fitted, energies = context.models["gp"], context.data.columns["energy"]
    features = fitted.features(context.data)
    k = kernel_matrix(fitted.kernel, features, features) / kernel_matrix(fitted.kernel, features[:1], features[:1])
    for threshold in (0.5, 0.95):
        expected: list[int] = []
        for row in np.argsort(energies, kind="stable"):
            if all(k[row, other] <= threshold for other in expected):
                expected.append(row)
        assert KernelSimilarity(5, threshold)(context).columns["row"].tolist() == expected[:5]
    assert len(KernelSimilarity(100, 0.0)(context)) == 1
    assert len(KernelSimilarity(100, 0.95)(context)) < len(context.data)


def test_kernel_similarity_takes_the_lowest_before_the_model_has_data(asked):
    fresh = replace(asked.context, models={"gp": GPR().fit(Batch.empty())})
    assert np.array_equal(KernelSimilarity(4)(fresh).columns["row"], Best(4)(fresh).columns["row"])
    with pytest.raises(ConfigurationError, match="no model named"):
        KernelSimilarity(4)(replace(asked.context, models={}))
    with pytest.raises(ConfigurationError, match="threshold"):
        KernelSimilarity(4, 1.5)


def test_novelty_spreads_out_among_the_low(asked):
    context = asked.context
    energies = context.data.columns["energy"]
    features = context.features(Novelty().descriptor)
    rows = Novelty(4, energy_window=2.0)(context).columns["row"]
    lowest = int(np.nanargmin(energies))
    low = np.flatnonzero(energies <= energies[lowest] + 2.0)
    assert len(low) > 4  # else there was nothing to choose
    assert lowest in rows and len(set(rows.tolist())) == 4 and set(rows) <= set(low)
    assert low[np.argmax(np.linalg.norm(features[low] - features[lowest], axis=1))] in rows
    expected = [lowest]
    while len(expected) < 4:
        gap = [min(np.linalg.norm(features[row] - features[other]) for other in expected) for row in low]
        expected.append(int(low[np.argmax(gap)]))
    assert set(rows.tolist()) == set(expected)
    assert len(Novelty(100, energy_window=2.0, distance=10.0)(context)) == 1
    assert Novelty(100, energy_window=0.0)(context).columns["row"].tolist() == [lowest]
    with pytest.raises(ConfigurationError, match="count"):
        Novelty(0)


# ---- acquisition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "sigma"), [(0.3, 0.2), (-0.3, 0.2), (-1.0, 0.15), (0.0, 1.0), (2.0, 0.01)])
def test_expected_improvement_is_the_integral(gain, sigma):
    def density(g):
        return g * np.exp(-0.5 * ((g - gain) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))

    low, high = max(0.0, gain - 12 * sigma), max(gain, 0.0) + 12 * sigma
    integral = sum(quad(density, a, a + (high - low) / 40, epsabs=0, epsrel=1e-12)[0]
                   for a in np.linspace(low, high, 41)[:-1])  # fmt: skip
    assert log_expected_improvement(np.array([gain]), np.array([sigma]))[0] == pytest.approx(np.log(integral), abs=1e-8)


def test_expected_improvement_far_from_any_chance():
    sigma = np.full(5, 1e-3)
    gain = np.array([-1e-2, -0.1, -1.0 + 1e-6, -1.0 - 1e-6, -50.0])
    value = log_expected_improvement(gain, sigma)
    assert np.all(np.isfinite(value)) and np.all(np.diff(value) < 0)
    z = gain[2:] / sigma[2:]
    asymptote = np.log(sigma[2:]) - 0.5 * z**2 - 0.5 * np.log(2 * np.pi) - 2 * np.log(-z)
    assert value[2:] == pytest.approx(asymptote, rel=1e-10)
    for z in (-1.0, -1e3):  # no jump where one form takes over from the other
        both = log_expected_improvement(np.array([z * (1 - 1e-12), z * (1 + 1e-12)]), np.ones(2))
        assert abs(both[0] - both[1]) < 1e-11 * z * z
    certain = log_expected_improvement(np.array([0.5, 0.0, -0.5, 0.5, -0.5]), np.array([0.0, 0.0, 0.0, 1e-300, 1e-300]))
    assert certain == pytest.approx(np.array([np.log(0.5), -np.inf, -np.inf, np.log(0.5), -np.inf]), rel=1e-12)
    assert np.isnan(log_expected_improvement(np.array([np.nan]), np.ones(1)))[0]


def test_expected_improvement_orders_candidates(asked):
    context = asked.context
    energy, sigma = context.models["gp"].predict(asked.refined)
    best = context.data.columns["energy"].min()
    scores = ExpectedImprovement(xi=0.1)(asked.refined, context)
    assert np.array_equal(scores, -log_expected_improvement(best - 0.1 - energy, sigma))
    nothing = replace(context, data=Batch.empty())
    assert np.array_equal(ExpectedImprovement()(asked.refined, nothing), energy)


def test_thompson_draws_from_the_joint_posterior(asked):
    context = asked.context
    fitted, n_refined = context.models["gp"], len(asked.refined)
    batch = Batch.concat(
        [asked.refined.bare(), asked.refined[:1].bare(), context.data[:1].bare()]
    )  # a copy; a known one
    energy, sigma = fitted.predict(batch)
    n = len(batch)
    factor = np.array([fitted.joint_draw(batch, one) - energy for one in np.eye(n)]).T
    expected = posterior(context, batch)
    scale = expected.diagonal().max()
    # 1e-8 of the kernel's total is what the difference of two numbers of that size leaves
    total = fitted.kernel.amplitude
    assert np.abs(factor @ factor.T - expected).max() < 1e-8 * total
    assert np.abs((factor**2).sum(1) - sigma**2).max() < 1e-8 * total
    off = expected - np.diag(expected.diagonal())
    assert np.abs(off[:n_refined, :n_refined]).max() > 0.01 * scale  # independent draws are another distribution
    draw = fitted.joint_draw(batch, np.arange(n) / n)
    assert abs(draw[0] - draw[n_refined]) < 1e-4 * np.sqrt(total)  # copies rise and fall together
    assert np.array_equal(fitted.joint_draw(batch[:3], np.arange(3) / n), draw[:3])
    one, other = (Thompson()(asked.refined, replace(context, key=context.key.fold(k))) for k in (0, 1))
    assert not np.array_equal(one, other)
    fresh = replace(context, models={"gp": GPR().fit(Batch.empty())})
    assert np.all(np.isfinite(Thompson()(asked.refined, fresh)))


@pytest.mark.parametrize("acquire", [LCB(2.0), ExpectedImprovement()], ids=lambda one: one.name)
def test_candidates_in_flight_are_taken_into_account(asked, acquire):
    context, refined = asked.context, asked.refined
    fitted = context.models["gp"]
    alone = acquire(refined, context)
    assert np.array_equal(acquire(refined, replace(context, pending=Batch.empty())), alone)
    first = int(np.argmin(alone))
    pending = refined[first].bare()
    beside = acquire(refined, replace(context, pending=pending))
    assert beside[first] == np.inf and int(np.argmin(beside)) != first and np.isfinite(beside).any()
    # one more conditioning of the covariance
    both = posterior(context, Batch.concat([refined.bare(), pending]))
    expected = both.diagonal()[:-1] - both[:-1, -1] ** 2 / (both[-1, -1] + fitted.kernel.noise)
    assert np.abs(fitted.sigma_after(refined, pending) ** 2 - expected).max() < 1e-8 * fitted.kernel.amplitude
    assert np.all(fitted.sigma_after(refined, pending) <= fitted.predict(refined)[1] + 1e-6)


def test_several_tickets_in_flight_ask_for_different_structures(tmp_path):
    path = tmp_path / "a.journal"
    with recipes.gofee(PROBLEM, EMT(), seed=1, threads=1, store=path) as search:
        search.run(8)
        before = [search.ask() for _ in range(4)]
    with recipes.gofee(PROBLEM, EMT(), seed=1, threads=1, store=path) as search:
        tickets = [search.ask() for _ in range(4)]
        for one, other in zip(before, tickets, strict=True):  # each sees again what was pending when it was issued
            assert len(one.context.pending) == len(other.context.pending) == before.index(one)
            assert np.array_equal(one.order, other.order)
            assert np.array_equal(one.refined.columns["score"], other.refined.columns["score"])
        features = Novelty().descriptor.values(Batch.concat([ticket.chosen.bare() for ticket in tickets]))
        assert pairwise(features).min() > 1e-3 * np.linalg.norm(features[0])
        for ticket in reversed(tickets):
            search.tell(ticket, search.evaluate(ticket))


# ---- surrogate basin hopping ---------------------------------------------------------------------------------


def test_hops_find_lower_structures_and_cost_no_evaluation(asked):
    emt, context = landscape_of(EMT()), asked.context
    relaxed = Relax(EMT(), 200)(asked.refined, context)
    before = _core.evaluate(emt, relaxed)[0]
    hopped = SurrogateHops(EMT(), 6, 200)(relaxed, context)
    after = _core.evaluate(emt, hopped)[0]
    assert np.all(after <= before) and np.sum(after < before - 0.01) >= len(before) // 2
    assert np.all(_core.fragments(hopped, 1.5) <= _core.fragments(relaxed, 1.5))
    every = SurrogateHops(EMT(), 6, 200, keep="all")(relaxed, context)
    assert len(every) > len(relaxed) and np.array_equal(every[: len(relaxed)].positions, relaxed.positions)
    assert _core.evaluate(emt, every)[0].min() == after.min()
    assert np.array_equal(SurrogateHops(EMT(), 0)(relaxed, context).positions, relaxed.positions)
    # what one candidate does depends on its row alone
    assert np.array_equal(SurrogateHops(EMT(), 6, 200)(relaxed[:2], context).positions, hopped[:2].positions)


def test_only_the_lowest_walk(asked):
    emt = landscape_of(EMT())
    relaxed = Relax(EMT(), 60)(asked.refined, asked.context)
    hopped = SurrogateHops(EMT(), 5, 100, walkers=2)(relaxed, asked.context)
    before, after = _core.evaluate(emt, relaxed)[0], _core.evaluate(emt, hopped)[0]
    assert len(hopped) == len(relaxed)
    stayed = np.sort(before)[2:]
    assert np.isin(stayed, after).all() and after[:2].min() < before.min()
    with pytest.raises(ConfigurationError, match="walkers"):
        SurrogateHops("gp", 2, walkers=-1)


def test_temperature_decides_about_hops_uphill(asked):
    relaxed = Relax(EMT(), 200)(asked.refined, asked.context)
    cold, hot = (SurrogateHops(EMT(), 4, 100, temperature=kt, keep="all")(relaxed, asked.context) for kt in (1e-9, 1e9))
    assert len(hot) > len(cold)
    emt = landscape_of(EMT())
    lowest = _core.evaluate(emt, SurrogateHops(EMT(), 4, 100, temperature=1e-9)(relaxed, asked.context))[0]
    energies = _core.evaluate(emt, cold)[0]
    assert set(lowest) <= set(energies)  # downhill alone: the last accepted is the best


def test_hops_on_a_surface_that_breaks_structures_stay_at_home(asked):
    together = _core.PairPrior("bonding", radius_scale=0.5)
    assert np.all(_core.closest_contacts(SurrogateHops(together, 3, 50)(asked.refined, asked.context)) >= 0.6)
    loose = SurrogateHops(together, 3, 50, c1=0.0)(asked.refined, asked.context)
    assert np.any(_core.closest_contacts(loose) < 0.6)
    with pytest.raises(ConfigurationError, match="costs nothing"):
        SurrogateHops(PairToy(), 2)(asked.refined, asked.context)
    with pytest.raises(ConfigurationError, match="keep"):
        SurrogateHops("gp", 2, keep="most")


def test_hops_leave_the_template_where_it_is():
    from ase.build import fcc111

    slab = fcc111("Au", (2, 2, 2), vacuum=8.0, orthogonal=True, periodic=True)
    top = slab.positions[:, 2].max()
    box = (np.array([0, 0, top + 0.5]), np.vstack([slab.cell[0], slab.cell[1], [0, 0, 4.0]]))
    asked = example_search(Problem.from_atoms(slab, "Ni2", box=box), steps=1).ask()
    hopped = SurrogateHops(EMT(), 3, 30)(asked.refined, asked.context).positions.reshape(-1, 10, 3)
    assert np.array_equal(hopped[:, :8], np.broadcast_to(slab.positions, (len(hopped), 8, 3)))
    assert not np.array_equal(hopped, asked.refined.positions.reshape(-1, 10, 3))


# ---- resets --------------------------------------------------------------------------------------------------


def history(energies, iterations=None):
    iterations = np.arange(len(energies)) if iterations is None else np.array(iterations)
    batch = PROBLEM.batch(np.random.default_rng(0).uniform(0, 6, (len(energies), 8, 3)))
    energies = np.array(energies, float)
    return batch.with_columns(
        energy=energies, status=np.isnan(energies).astype(np.uint8), iteration=iterations, ticket=iterations
    )


def test_when_a_model_forgets():
    reset = ResetOnStagnation(GPR(), after=3)
    assert reset.forgotten(Batch.empty()) == 0
    assert reset.forgotten(history([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])) == 0
    assert reset.forgotten(history([5.0, 6.0, 6.0])) == 0
    assert reset.forgotten(history([5.0, 6.0, 6.0, 6.0])) == 4
    assert reset.forgotten(history([5.0, 6.0, 6.0, 4.9995])) == 4  # half a meV is no improvement
    assert reset.forgotten(history([5.0, 6.0, 6.0, 4.9])) == 0
    # after a reset the count and the best begin anew: 7.0 is first, then 6.5 improves
    assert reset.forgotten(history([5.0, 6.0, 6.0, 6.0, 7.0, 7.1, 6.5, 6.6, 6.6])) == 4
    assert reset.forgotten(history([5.0, 6.0, 6.0, 6.0, 7.0, 7.1, 7.1, 7.1])) == 8
    # a ticket of several rows is forgotten whole; failures do not improve
    assert reset.forgotten(history([5.0, 6.0, 6.0, 6.0, 6.0], [0, 1, 2, 3, 3])) == 5
    assert reset.forgotten(history([np.nan, 5.0, np.nan, 6.0, 6.0])) == 5
    with pytest.raises(ConfigurationError, match="whole number"):
        ResetOnStagnation(GPR(), after=0)


def test_after_a_reset_only_later_rows_are_learned():
    data = example_search(steps=16).data
    # the lowest first: nothing ever improves
    data = data.take(np.argsort(data.columns["energy"], kind="stable"))
    data = data.with_columns(iteration=np.arange(len(data)), ticket=np.arange(len(data)))
    model = ResetOnStagnation(GPR(), after=6)
    fitted = None
    for n in range(1, 12):
        fitted = model.fit(data[:n], fitted)
        assert fitted.rows.tolist() == list(range(0 if n < 7 else 7, n))
        again = model.restore(data[:n], fitted.state)
        assert np.array_equal(again.predict(data)[0], fitted.predict(data)[0])
    alone = None  # as if it had never known the others
    for n in range(8, 12):
        alone = GPR().fit(data[7:n], alone)
    assert np.array_equal(alone.predict(data)[0], fitted.predict(data)[0])
    assert np.array_equal(model.fit(data[:3]).predict(data)[0], GPR().fit(data[:3]).predict(data)[0])


def test_resets_survive_a_resume(tmp_path):
    options = {"seed": 3, "threads": 1, "surrogate_steps": 20, "reset_after": 4, "polish_last": 0}
    with recipes.gofee(PROBLEM, EMT(), **options) as search:
        search.run(16)
        straight = search.data
        assert search.models["gp"].forgotten(straight) > 0
    path = tmp_path / "a.journal"
    for _ in range(8):
        with recipes.gofee(PROBLEM, EMT(), store=path, **options) as search:
            search.run(2)
    with recipes.gofee(PROBLEM, EMT(), store=path, **options) as search:
        assert same_rows(search.data, straight)
    with recipes.gofee(PROBLEM, EMT(), **{**options, "reset_after": 0}) as search:
        search.run(16)
        assert not same_rows(search.data, straight)


# ---- the recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "starts", "polish", "model", "hops"),
    [
        (
            {},
            3,
            {"polish_on": "gp"},
            ChosenModel({"global": GPR(prior="fitted"), "global, no prior": GPR(prior=None, use_forces=True)}),
            [SurrogateHops(LCB(2.0), 10, 100, walkers=12)],
        ),
        # that of the first version
        (
            {"prior": "bonding", "starts": 5, "polish": "periodic", "hops": 0},
            5,
            {"polish_every": 5},
            GPR(prior="bonding"),
            [],
        ),
        (
            {"prior": "fitted", "polish": "none"},
            3,
            {},
            GPR(prior="fitted"),
            [SurrogateHops(LCB(2.0), 10, 100, walkers=12)],
        ),
    ],
)
def test_the_recipe_is_the_search_written_out_by_hand(options, starts, polish, model, hops):
    """Bit for bit."""
    lcb = LCB(2.0)
    by_hand = Search(
        PROBLEM,
        sample=KMeans(10),
        propose=[Random({0: 12, starts: 12}), Rattle({0: 0, starts: 16}), Permute({0: 0, starts: 12})],
        refine=[Relax(lcb, 100), *hops, MinDistance(0.6), Connected(), Centre()],
        acquire=lcb,
        evaluate=[Duplicate(), Evaluate(EMT(), 0, **polish, polish_steps=40, polish_last=1)],
        models={"gp": model},
        seed=7,
        threads=1,
    )
    recipe = recipes.gofee(PROBLEM, EMT(), seed=7, threads=1, **options)
    assert recipe._meta() == by_hand._meta()  # stores of either go on with the other
    by_hand.run(9)
    recipe.run(9)
    assert same_rows(recipe.data, by_hand.data)
    assert recipes.gofee(PROBLEM, EMT(), seed=7, threads=1, candidates=40, **options)._meta() == by_hand._meta()


def test_the_classic_recipe_is_as_before():
    classic = recipes.gofee(PROBLEM, EMT(), classic=True)
    assert [stage.count for stage in classic.propose] == [{0: 10, 5: 3}, {0: 0, 5: 7}, 0]
    assert classic.models["gp"] == GPR(prior="repulsive", noise=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"acquisition": "ei"},
        {"acquisition": "thompson"},
        {"sampler": "similarity"},
        {"sampler": "novelty"},
        {"hops": 2},
        {"candidates": 10},
    ],
    ids=str,
)
def test_every_choice_runs_resumes_and_changes_something(options, tmp_path):
    plain = {"seed": 3, "threads": 1, "surrogate_steps": 20}
    with recipes.gofee(PROBLEM, EMT(), **plain, **options) as search:
        search.run(12)
        straight = search.data
    with recipes.gofee(PROBLEM, EMT(), store=tmp_path / "a.journal", **plain, **options) as search:
        search.run(12, evaluations=9)
    with recipes.gofee(PROBLEM, EMT(), store=tmp_path / "a.journal", **{**plain, "threads": 2}, **options) as search:
        search.run(12 - search.iteration)
        assert same_rows(search.data, straight)
    with recipes.gofee(PROBLEM, EMT(), **plain) as search:
        search.run(12)
        assert not same_rows(search.data, straight)


def test_candidates_scale_the_counts_that_are_not_given():
    search = recipes.gofee(PROBLEM, EMT(), candidates=20, rattle=3)
    assert [stage.count for stage in search.propose] == [{0: 6, 3: 6}, 3, {0: 0, 3: 6}]
    few = recipes.gofee(PROBLEM, EMT(), candidates=1)
    assert [stage.count for stage in few.propose] == [{0: 1, 3: 1}, {0: 0, 3: 1}, {0: 0, 3: 1}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"acquisition": "tompson"}, "acquisition must be one of 'lcb', 'ei', 'thompson'.*Did you mean 'thompson'"),
        ({"sampler": "similarty"}, "sampler must be one of.*Did you mean 'similarity'"),
        ({"hops": -1}, "hops of SurrogateHops"),
        ({"candidates": -4}, "must not be negative"),
        ({"reset_after": -1}, "must not be negative"),
    ],
)
def test_choices_that_do_not_exist(options, message):
    with pytest.raises(ConfigurationError, match=message):
        recipes.gofee(PROBLEM, EMT(), **options)
