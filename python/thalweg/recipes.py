"""Whole searches by name: each returns a `Search` whose elements can be read, and is one screen to copy from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from thalweg.evaluate import Duplicate, Evaluate, Metropolis
from thalweg.generators import FirstOf, OneOf, Permute, Random, Rattle
from thalweg.models import GPR
from thalweg.records import Problem
from thalweg.refine import Centre, Connected, MinDistance, Relax, Wrap
from thalweg.search import Search
from thalweg.select import LCB, KMeans, LastAccepted
from thalweg.store import Store

__all__ = ["RECIPES", "basin_hopping", "gofee", "random_search"]


def gofee(
    problem: Problem,
    calculator: Any,
    *,
    store: str | Path | Store | None = None,
    seed: int = 0,
    prior: str = "bonding",
    classic: bool = False,
    random: int | Mapping[int, int] | None = None,
    rattle: int | Mapping[int, int] | None = None,
    permute: int | Mapping[int, int] | None = None,
    sample: int = 10,
    kappa: float | Mapping[int, float] = 2.0,
    surrogate_steps: int | Mapping[int, int] = 100,
    true_steps: int = 0,
    polish_every: int = 5,
    polish_steps: int = 40,
    polish_last: int = 1,
    noise: float = 1e-5,
    threads: int = 0,
) -> Search:
    """Global optimisation with first-principles energy expressions (GOFEE; Bisbo, Hammer, PRL 124, 086102 (2020)).

    Random and rattled candidates are relaxed on the lower confidence bound of a Gaussian process; the lowest gets one
    true evaluation.

    Parameters
    ----------
    prior : "bonding", "repulsive" or "none"
        Prior mean of the Gaussian process: Morse wells at covalent bond lengths, or the published repulsion.
    classic : bool
        The published settings: repulsive prior, 10 candidates (random only at first, then 3 random + 7 rattle), one true
        step after each evaluation, no duplicates refused, no polish.
    random, rattle, permute : int or {iteration: int}
        Candidates per iteration of each generator.
    sample : int
        Clusters of the k-means sampler.
    kappa : float or {iteration: float}
    surrogate_steps : int or {iteration: int}
        Relaxation steps on the LCB surface.
    true_steps : int
        Steps in the true potential after each evaluation, every point kept.
    polish_every, polish_steps, polish_last : int
        See `Evaluate`.
    noise : float
        Variance [eV^2] on the diagonal of the Gaussian process.
    """
    several = len(problem.counts) > 1
    if classic:
        prior, true_steps, polish_every, polish_last, noise = "repulsive", 1, 0, 0, 1e-2
        random, rattle, permute = {0: 10, 5: 3}, {0: 0, 5: 7}, 0
        surrogate_steps = {0: 0, 2: 200}
    random = {0: 12, 5: 12} if random is None else random
    rattle = {0: 0, 5: 16 if several else 28} if rattle is None else rattle
    permute = {0: 0, 5: 12 if several else 0} if permute is None else permute
    lcb = LCB(kappa)
    gauges = [Evaluate(
        calculator, true_steps, polish_every=polish_every, polish_steps=polish_steps, polish_last=polish_last
    )]  # fmt: skip
    return Search(
        problem,
        sample=KMeans(sample),
        propose=[Random(random), Rattle(rattle), *([Permute(permute)] if several else [])],
        refine=[Relax(lcb, surrogate_steps), MinDistance(0.6), *_tidy(problem)],
        acquire=lcb,
        evaluate=gauges if classic else [Duplicate(), *gauges],
        models={"gp": GPR(prior=None if prior == "none" else prior, noise=noise)},
        store=store,
        seed=seed,
        threads=threads,
    )


def basin_hopping(
    problem: Problem,
    calculator: Any,
    *,
    store: str | Path | Store | None = None,
    seed: int = 0,
    temperature: float = 0.1,
    amplitude: float = 3.0,
    moved: float = 1.0,
    steps: int = 200,
    force_tolerance: float = 0.05,
    threads: int = 0,
) -> Search:
    """Basin hopping (Wales, Doye, J. Phys. Chem. A 101, 5111 (1997)): rattle or, with several species, swap; relax in the
    true potential; Metropolis.

    Parameters
    ----------
    temperature : float
        kT of the acceptance rule [eV].
    amplitude, moved : float
        See `Rattle`.
    steps : int
        Of each relaxation in the true potential; every point is an evaluation.
    force_tolerance : float
        eV/angstrom.
    """
    rattle = Rattle(1, amplitude=amplitude, moved=moved)
    move = OneOf(rattle, Permute(1)) if len(problem.counts) > 1 else rattle
    return Search(
        problem,
        sample=LastAccepted(),
        propose=FirstOf(move, Random(1)),
        refine=_tidy(problem),
        evaluate=Evaluate(calculator, steps, force_tolerance),
        settle=Metropolis(temperature),
        store=store,
        seed=seed,
        threads=threads,
    )


def random_search(
    problem: Problem,
    calculator: Any,
    *,
    store: str | Path | Store | None = None,
    seed: int = 0,
    steps: int = 200,
    force_tolerance: float = 0.05,
    threads: int = 0,
) -> Search:
    """Random structures, each relaxed in the true potential (AIRSS; Pickard, Needs, PRL 97, 045504 (2006)).

    Parameters
    ----------
    steps : int
        Of each relaxation; every point is an evaluation.
    force_tolerance : float
        eV/angstrom.
    """
    return Search(
        problem,
        propose=Random(1),
        refine=_tidy(problem),
        evaluate=Evaluate(calculator, steps, force_tolerance),
        store=store,
        seed=seed,
        threads=threads,
    )


def _tidy(problem: Problem) -> list[Any]:
    """Free clusters in one piece and in the middle of the cell, periodic structures inside it."""
    if problem.periodic:
        return [Wrap()]
    return [Connected(), Centre()] if problem.template is None else []


RECIPES: dict[str, Callable[..., Search]] = {
    "gofee": gofee,
    "basin_hopping": basin_hopping,
    "random_search": random_search,
}
