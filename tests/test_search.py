"""The loop, with elements in Python alone."""

from __future__ import annotations

import numpy as np
import pytest
from thalweg.errors import ConfigurationError, Stop, ThalwegError
from thalweg.evaluate import Evaluate, Metropolis
from thalweg.records import FAILED, OK, REJECTED, Batch, Problem
from thalweg.search import Search
from thalweg.select import Best, LastAccepted
from toys import Nudge, PairToy, Scatter, closeness, same_rows

PROBLEM = Problem("Cu4", cell=12.0, box=6.0)


def make(store=None, *, seed=1, calculator=None, **changes) -> Search:
    settings = {
        "sample": Best(3),
        "propose": [Scatter(3), Nudge(2)],
        "acquire": closeness,
        "evaluate": Evaluate(calculator or PairToy(), steps=2),
        "settle": Metropolis(0.2),
        "store": store,
        "seed": seed,
    }
    return Search(PROBLEM, **{**settings, **changes})


def test_steps_hold_what_happened():
    steps = []
    search = make(callbacks=[lambda step, search: steps.append(step)])
    found = search.run(4)
    assert [step.iteration for step in steps] == [0, 1, 2, 3]
    assert len(steps[0].proposed) == 3 and len(steps[1].proposed) == 5
    assert len(steps[0].chosen) == 1
    assert len(steps[0].evaluated) == 3  # one point and two steps, every point kept
    assert set(steps[1].chosen.columns["origin"]) <= {"Scatter", "Nudge"}
    assert found.evaluations == len(search.data) == sum(len(step.evaluated) for step in steps)
    assert found.energy == np.nanmin(search.data.columns["energy"])
    assert "Metropolis" in steps[-1].carry


def test_ask_and_tell_are_the_halves_of_run():
    whole, halves = make(), make()
    whole.run(3)
    for _ in range(3):
        asked = halves.ask()
        halves.tell(asked, halves.evaluate(asked))
    assert same_rows(whole.data, halves.data)


def test_the_caller_may_own_the_evaluation():
    search = make()
    asked = search.ask()
    chosen = asked.chosen
    search.tell(asked, chosen.with_columns(energy=-1.0))
    assert search.data.columns["status"].tolist() == [OK]
    assert search.best_energy == -1.0
    with pytest.raises(ThalwegError, match="a ticket is told once"):
        search.tell(asked, chosen.with_columns(energy=-1.0))


def test_several_tickets_in_flight_see_each_other_as_pending():
    search = make()
    first, second = search.ask(), search.ask()
    assert len(first.context.pending) == 0
    assert np.array_equal(second.context.pending.positions, first.chosen.positions)
    search.tell(second, search.evaluate(second))
    search.tell(first, search.evaluate(first))
    assert search.iteration == 2
    assert set(search.data.columns["iteration"]) == {0, 1}


def test_run_again_continues():
    once, twice = make(), make()
    once.run(6)
    for step in [step for _ in range(2) for step in twice.steps(3)]:
        assert step.iteration < 6
    assert same_rows(once.data, twice.data)


def test_draws_do_not_depend_on_other_stages_observers_or_counts():
    plain, watched = make(), make(callbacks=[lambda step, search: np.random.default_rng().random()])
    assert np.array_equal(plain.ask().proposed.positions, watched.ask().proposed.positions)
    more = make(propose=[Scatter(4, name="Extra"), Scatter(6), Nudge(2)]).ask().proposed
    few = plain.problem and make().ask().proposed
    rows = more.columns["origin"] == "Scatter"
    assert np.array_equal(more.take(rows)[:3].positions, few.positions)


def test_a_failed_gauge_lets_the_next_candidate_pass():
    def picky(batch: Batch, ctx) -> Batch:
        return batch.with_columns(
            status=np.where(batch.columns["candidate"] == asked_first[0], REJECTED, OK).astype(np.uint8)
        )

    asked_first = [-1]
    search = make(evaluate=[picky, Evaluate(PairToy())], propose=Scatter(4))
    asked = search.ask()
    asked_first[0] = int(asked.order[0])
    step = search.tell(asked, search.evaluate(asked))
    measured = step.evaluated.take(step.evaluated.columns["status"] == OK)
    assert measured.columns["candidate"].tolist() == [asked.order[1]]
    assert np.sum(step.evaluated.columns["status"] == REJECTED) == 1
    assert len(search.data) == 1  # what was never measured is not data


@pytest.mark.parametrize("raises", [True, False])
def test_failures_are_rows_and_the_search_goes_on(raises):
    search = make(calculator=PairToy(fails=0.2, raises=raises))
    search.run(30)
    status = search.data.columns["status"]
    assert search.iteration == 30
    assert 0 < np.sum(status == FAILED) < len(status) / 2
    assert np.all(np.isnan(search.data.columns["energy"][status == FAILED]))
    assert np.isfinite(search.best_energy)


def test_a_calculator_that_always_fails_ends_with_its_reason():
    search = make(calculator=PairToy(fails=1.0))
    with pytest.raises(ThalwegError, match=r"20 steps in a row.*did not converge"):
        search.run(100)


def test_choose_many_and_all():
    assert len(make(choose=3).ask().chosen) == 3
    assert len(make(choose="all").ask().chosen) == 3
    with pytest.raises(ConfigurationError, match="choose must be"):
        make(choose=0)


def test_observers_stop_a_run_and_budgets_hold():
    def enough(step, search):
        if step.iteration == 2:
            raise Stop("enough")

    found = make(callbacks=[enough]).run(50)
    assert (found.reason, found.iterations) == ("enough", 3)
    budget = make().run(50, evaluations=10)
    assert (budget.reason, budget.evaluations) == ("evaluations", 10)
    search = make()
    search.request_stop("signal 15")
    assert search.run(5).evaluations == 0
    search._stop_reason = None
    search.run(5)
    assert same_rows(search.data, straight(5))


def straight(n: int, **settings) -> Batch:
    search = make(**settings)
    search.run(n)
    return search.data


def test_observers_cannot_change_what_they_see():
    def meddle(step, search):
        step.evaluated.positions[0, 0] = 99.0

    with pytest.raises(ValueError, match="read-only"):
        make(callbacks=[meddle]).run(1)


def test_stages_need_names_of_their_own():
    with pytest.raises(ConfigurationError, match="two stages of propose are named 'Scatter'"):
        make(propose=[Scatter(), Scatter()])
    with pytest.raises(ConfigurationError, match="at least one stage to propose"):
        make(propose=[])
    with pytest.raises(ConfigurationError, match="must be callable"):
        make(refine=[3])


def test_last_accepted_follows_metropolis():
    search = make(sample=LastAccepted(), propose=[Scatter(1), Nudge(1)])
    search.run(5)
    kept = search.ask().context
    sample = kept.sample
    assert len(sample) == 1
    assert bool(search.data.columns["accepted"][int(sample.columns["row"][0])])


def test_polish_is_counted_and_happens_once():
    search = make(evaluate=Evaluate(PairToy(), polish_every=2, polish_last=2, polish_steps=5, same=0.0))
    found = search.run(4)
    origins = search.data.columns["origin"]
    assert np.sum(origins == "polish") > 0
    assert found.evaluations == len(search.data)
    before = found.evaluations
    assert search.run(0).evaluations == before


def test_no_global_random_state():
    """Nobody may draw from NumPy's or Python's global generators."""
    import re
    from pathlib import Path

    import thalweg

    pattern = re.compile(
        r"np\.random\.(?!Generator|Philox|default_rng|SeedSequence|get_state)\w+|^\s*(import random|from random)",
        re.M,
    )
    for path in Path(thalweg.__file__).parent.glob("*.py"):
        assert not pattern.search(path.read_text()), path
    source = Path(__file__).parents[1]
    for path in [
        *source.glob("cpp/src/*"),
        *source.glob("cpp/include/thalweg/*"),
        *source.glob("python/bindings/*"),
    ]:
        assert not re.search(r"\b(s?rand\(|random_device|mt19937)", path.read_text()), path


def test_what_stages_keep_reaches_their_next_step_from_every_place_and_after_resuming(tmp_path):
    def counting(kind):
        def stage(batch, ctx):
            before = ctx.carry.get(ctx.stage)
            ctx.keep(count=np.array(1 if before is None else int(before["count"]) + 1))
            return batch

        stage.name = f"count_{kind}"
        return stage

    def build(**options):
        return make(
            tmp_path / "a.journal", refine=counting("refine"), settle=counting("settle"),
            evaluate=[counting("evaluate"), Evaluate(PairToy())], **options,
        )  # fmt: skip

    with build() as search:
        search.run(2, evaluations=1)
    with build() as search:
        search.run(3 - search.iteration)
        carry = search.ask().context.carry
    assert {name: int(kept["count"]) for name, kept in carry.items()} == {
        "count_refine": 3,
        "count_evaluate": 3,
        "count_settle": 3,
    }


def test_an_interruption_in_the_same_process_loses_nothing():
    class Impatient(PairToy):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            if self.calls == 5:
                raise KeyboardInterrupt

    search = make(calculator=Impatient())
    with pytest.raises(KeyboardInterrupt):
        search.run(4)
    search.run(4 - search.iteration)
    assert same_rows(search.data, straight(4))

    def fails_once(batch, ctx):
        if ctx.iteration == 1 and not failed:
            failed.append(True)
            raise RuntimeError("a bug in a settling stage")
        return batch

    failed: list = []
    calculator = PairToy()
    search = make(settle=[fails_once, Metropolis(0.2)], calculator=calculator)
    with pytest.raises(RuntimeError):
        search.run(4)
    search.run(4 - search.iteration)
    assert same_rows(search.data, straight(4))
    assert calculator.calls == len(search.data)


def test_a_step_whose_candidates_are_all_refused_is_a_step():
    def refuse(batch, ctx):
        return batch.with_columns(status=np.full(len(batch), REJECTED, np.uint8))

    search = make(evaluate=[refuse, Evaluate(PairToy())])
    found = search.run(30)  # more than the steps after which a search that only fails gives up
    assert (found.iterations, found.evaluations, found.best) == (30, 0, None)
