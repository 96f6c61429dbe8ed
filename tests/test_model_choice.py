"""`ChosenModel`: the model that held-out errors choose, the same after a resume."""

from __future__ import annotations

import numpy as np
import pytest
from thalweg import GPR, ChosenModel, LocalGPR, Problem, _core, recipes
from thalweg.calculators import EMT
from thalweg.errors import ConfigurationError
from thalweg.testing import example_search
from toys import same_rows

PROBLEM = Problem("Au3Ni3", cell=12.0, box=6.0)


class Fixed:
    """A model that tells the same energy for everything."""

    def __init__(self, energy):
        self.energy, self.size = energy, 1

    def fit(self, data, previous=None, *, key=None):
        return self

    def restore(self, data, state):
        return self

    def predict(self, batch, *, threads=0):
        return np.full(len(batch), self.energy), np.ones(len(batch))

    @property
    def state(self):
        return {}


def data_of(count, steps=0):
    with recipes.random_search(PROBLEM, EMT(), seed=4, steps=steps) as search:
        search.run(count, evaluations=count)
        return search.data


def test_the_smaller_held_out_error_wins():
    data = data_of(24)
    right = float(np.median(data.columns["energy"][-6:]))
    model = ChosenModel({"wrong": Fixed(right + 50.0), "right": Fixed(right)})
    assert model.fit(data[:3]).chosen == "wrong"  # too few to tell
    fitted = model.fit(data)
    assert fitted.chosen == "right" and model.errors(data)["right"] < model.errors(data)["wrong"]
    assert ChosenModel(dict(reversed(model.models.items()))).fit(data).chosen == "right"


def test_of_nearly_equal_models_the_last_is_taken_unless_the_first_does_well_enough():
    data = data_of(24)
    right = float(np.median(data.columns["energy"][-6:]))
    models = {"most": Fixed(right), "least": Fixed(right + 50.0)}
    errors = ChosenModel(models).errors(data)
    ratio = errors["least"] / errors["most"]
    assert ratio > 2
    assert ChosenModel(models, enough=0.0, margin=1.01 * ratio - 1).fit(data).chosen == "least"
    assert ChosenModel(models, enough=0.0, margin=0.99 * ratio - 1).fit(data).chosen == "most"
    backwards = dict(reversed(models.items()))
    assert ChosenModel(backwards, enough=1.01 * errors["least"] / 6).fit(data).chosen == "least"  # six atoms
    assert ChosenModel(backwards, enough=0.99 * errors["least"] / 6).fit(data).chosen == "most"


def test_what_was_known_before_is_learned_and_neither_failed_rows_nor_a_polish_count():
    data = data_of(20)
    status = np.zeros(20, np.uint8)
    status[-3:] = 1
    origin = np.full(20, "Random")
    origin[14:16] = "polish"
    seen = []

    class Spy(Fixed):
        def fit(self, data, previous=None, *, key=None):
            seen.append(len(data))
            return self

        def predict(self, batch, *, threads=0):
            seen.append(batch.columns["energy"])
            return super().predict(batch)

    ChosenModel({"spy": Spy(0.0), "other": Fixed(0.0)}).errors(data.with_columns(status=status, origin=origin))
    learned, told = seen
    assert learned == 12  # 15 candidates, three of which are held out
    np.testing.assert_array_equal(told, data.columns["energy"][[12, 13, 16]])


def test_a_search_resumes_to_the_same_rows_and_chooses(tmp_path):
    def search(**options):
        return recipes.gofee(
            PROBLEM, EMT(), seed=2, threads=1, model="auto", candidates=8, surrogate_steps=20, **options
        )

    with search() as straight:
        straight.run(10)
        rows, chosen = straight.data, straight._fitted["gp"].chosen
    path = tmp_path / "a.journal"
    for cut in (5, 11):
        with search(store=path) as stopped:
            stopped.run(10 - stopped.iteration, evaluations=cut)
    with search(store=path) as resumed:
        resumed.run(10 - resumed.iteration)
        assert same_rows(resumed.data, rows) and resumed._fitted["gp"].chosen == chosen


def test_senseless_settings():
    with pytest.raises(ConfigurationError, match="at least two models"):
        ChosenModel({"gp": GPR()})
    with pytest.raises(ConfigurationError, match="growth above 1"):
        ChosenModel({"gp": GPR(), "local": LocalGPR()}, growth=1.0)


def test_points_of_a_relaxation_are_no_candidates_and_no_candidates_no_error():
    data = data_of(20, steps=3)  # four points of each structure
    starts = np.flatnonzero(np.append(True, np.diff(data.columns["ticket"]) > 0))
    assert 5 <= len(starts) < 10
    model = ChosenModel({"one": Fixed(0.0), "other": Fixed(0.0)}, enough=0.0)
    told = data.columns["energy"][starts[-2:]]
    assert model.errors(data) == dict.fromkeys(("one", "other"), pytest.approx(np.median(np.abs(told))))
    failed = data.with_columns(status=np.ones(20, np.uint8))
    assert model.errors(failed) == dict.fromkeys(("one", "other"), np.inf)
    assert model.fit(failed).chosen == "one"


def test_real_models_are_compared_by_the_rule():
    data = example_search(PROBLEM, steps=1).data
    batch = data_of(16)
    model = ChosenModel({"global": GPR(prior=None), "local": LocalGPR(prior=None)}, enough=0.0)
    errors = model.errors(batch)
    assert set(errors) == {"global", "local"} and all(np.isfinite(list(errors.values())))
    fitted = model.fit(batch)
    assert (fitted.chosen == "local") == (errors["local"] <= 1.5 * min(errors.values()))
    energy, sigma = fitted.predict(data)
    assert np.isfinite(energy).all() and np.all(sigma > 0)
    assert isinstance(fitted.landscape(1.0), _core.Landscape)
