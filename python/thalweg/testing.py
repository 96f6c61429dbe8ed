"""Conformance: what every element must keep to, shipped or your own.

from thalweg.testing import check_element, example_context
check_element(MyGenerator(5), "propose")
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np

from thalweg.errors import ConfigurationError
from thalweg.evaluate import Evaluate
from thalweg.generators import Random
from thalweg.records import Batch, Problem
from thalweg.search import Search, describe

__all__ = ["check_element", "example_search"]

_KINDS = ("sample", "propose", "refine", "acquire", "evaluate", "settle")


def example_search(problem: Problem | None = None, *, steps: int = 6, seed: int = 0, models: Any = None) -> Search:
    """A small search on EMT with some data, whose contexts elements can be tried in."""
    from thalweg.calculators import EMT

    problem = problem or Problem("Au3Ni3", cell=12.0, box=6.0)
    search = Search(problem, propose=Random(4), evaluate=Evaluate(EMT(), 1), seed=seed, models=models)
    search.run(steps)
    return search


def check_element(element: Any, kind: str, *, search: Search | None = None) -> None:
    """Runs an element in the contexts of a small search.

    Checks that it is callable, describes itself the same way each time, returns what its kind must return, gives the
    same answer for the same key, leaves its inputs and NumPy's global generator alone, and copes with empty input.

    Parameters
    ----------
    element : callable
    kind : "sample", "propose", "refine", "acquire", "evaluate" or "settle"
    search : Search, optional
        Where to try it, e.g. one with the models that the element asks for. Default: `example_search()`.

    Raises
    ------
    AssertionError
        Says which law is broken.
    """
    if kind not in _KINDS:
        raise ConfigurationError(f"kind must be one of {', '.join(_KINDS)}, but it is '{kind}'")
    assert callable(element), f"{element!r} must be callable"
    text = repr(describe(element))
    assert text == repr(describe(element)) and " at 0x" not in text, "it must describe itself the same way each time"
    pickle.loads(pickle.dumps(element))  # restarts run in processes
    search = search or example_search()
    asked = search.ask()
    context = replace(search._at(asked.context, kind, element), sample=_with_rows(search.data))
    global_state = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002

    if kind in ("sample", "propose"):
        first, second = element(context), element(context)
        _check_batch(first, context.problem)
        assert _equal(first, second), "the same key must give the same structures"
        empty = replace(context, sample=Batch.empty(), data=Batch.empty())
        assert isinstance(element(empty), Batch), "it must cope with no sample and no data"
    elif kind == "acquire":
        scores = np.asarray(element(asked.refined, context))
        assert scores.shape == (len(asked.refined),), (
            f"scores must have shape ({len(asked.refined)},), got {scores.shape}"
        )
        assert np.array_equal(scores, np.asarray(element(asked.refined, context))), (
            "the same input must give the same scores"
        )
        part = np.asarray(element(asked.refined[:2], context))
        assert np.array_equal(part, scores[:2]), "a score must not depend on the other candidates of the batch"
    elif kind == "refine":
        first, second = element(asked.refined, context), element(asked.refined, context)
        _check_batch(first, context.problem)
        assert _equal(first, second), "the same input must give the same structures"
        assert isinstance(element(Batch.empty(), context), Batch), "it must cope with no candidates"
    else:
        search._measuring = asked
        candidates = asked.chosen.with_columns(candidate=0)
        if kind == "settle":
            gauge: Any = search.gauges[0]
            candidates = Evaluate(gauge.calculator)(candidates, context)
        result = element(candidates, context)
        search._measuring = None
        assert isinstance(result, Batch), f"it must return a Batch, got {type(result).__name__}"
        if kind == "evaluate" and "status" in result.columns:
            assert set(np.unique(result.columns["status"])) <= {0, 1, 2}, "status is 0 (ok), 1 (failed) or 2 (rejected)"
    same = np.array_equal(global_state, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    assert same, "it must draw from context.key, not from NumPy's global generator"


def _with_rows(data: Batch) -> Batch:
    return data.take(data.ok).with_columns(row=np.flatnonzero(data.ok))


def _check_batch(batch: Any, problem: Problem) -> None:
    assert isinstance(batch, Batch), f"it must return a Batch, got {type(batch).__name__}"
    for i in range(len(batch)):
        rows = slice(batch.offsets[i], batch.offsets[i + 1])
        assert np.array_equal(np.sort(batch.numbers[rows]), np.sort(problem.numbers)), (
            "the stoichiometry must be the problem's"
        )
    assert np.all(np.isfinite(batch.positions)), "positions must be finite"


def _equal(a: Batch, b: Batch) -> bool:
    return np.array_equal(a.positions, b.positions) and np.array_equal(a.numbers, b.numbers)
