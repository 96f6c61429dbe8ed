"""Whole searches by name: each returns a `Search` whose elements can be read, and is one screen to copy from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from thalweg import _core
from thalweg.agent import Agent, Build, Policy, Rebuild, Snap
from thalweg.errors import ConfigurationError, check_whole, nearest
from thalweg.evaluate import AcceptLower, Duplicate, Evaluate, Metropolis
from thalweg.generators import AlongForces, ComplementaryEnergy, FirstOf, OneOf, Permute, Random, Rattle, Unchosen
from thalweg.grid import GridSettings
from thalweg.local_model import LocalGPR
from thalweg.model_choice import ChosenModel
from thalweg.models import GPR
from thalweg.priors import CalculatorPrior
from thalweg.records import Problem
from thalweg.refine import Centre, Connected, MinDistance, Relax, SurrogateHops, Wrap
from thalweg.search import Search
from thalweg.select import (
    LCB,
    ExpectedImprovement,
    KernelSimilarity,
    KMeans,
    LastAccepted,
    Novelty,
    Population,
    Remembering,
    Thompson,
)
from thalweg.stagnation import ResetOnStagnation
from thalweg.store import Store

__all__ = ["RECIPES", "asla", "basin_hopping", "complementary_energy", "gofee", "random_search"]


def gofee(
    problem: Problem,
    calculator: Any,
    *,
    store: str | Path | Store | None = None,
    seed: int = 0,
    prior: Any = "auto",
    model: str = "global",
    classic: bool = False,
    random: int | Mapping[int, int] | None = None,
    rattle: int | Mapping[int, int] | None = None,
    permute: int | Mapping[int, int] | None = None,
    candidates: int = 0,
    sample: int = 10,
    sampler: str = "kmeans",
    acquisition: str = "lcb",
    kappa: float | Mapping[int, float] = 2.0,
    surrogate_steps: int | Mapping[int, int] = 100,
    hops: int | Mapping[int, int] | None = None,
    walkers: int = 12,
    reset_after: int = 0,
    true_steps: int = 0,
    starts: int = 3,
    polish: str = "promising",
    polish_every: int = 5,
    polish_steps: int = 40,
    polish_last: int = 1,
    noise: float = 1e-5,
    use_forces: bool | None = None,
    threads: int = 0,
) -> Search:
    """Global optimisation with first-principles energy expressions (GOFEE; Bisbo, Hammer, PRL 124, 086102 (2020)).

    Random and rattled candidates are relaxed on the lower confidence bound of a Gaussian process; the lowest gets one
    true evaluation.

    Parameters
    ----------
    prior : "auto", "bonding", "fitted", "tight-binding", "repulsive", "none", {"calculator": name, ...} or what `GPR` takes
        Prior mean of the Gaussian process: Morse wells at covalent bond lengths; wells whose lengths, depths and shapes
        are fitted to the data (`FittedPrior`); a tight binding of the valence electrons; the published
        repulsion; or a calculator (each relaxation step on the surrogate calls it: see docs/elements.md). "auto": the
        fitted wells, or none and forces learned where these tell what was not seen better or nearly as well
        (`ChosenModel`): metals take the wells, covalent networks do without. For free molecules of main group elements
        with carbon or hydrogen it is the tight binding.
    model : "global", "local" or "auto"
        A Gaussian process on one fingerprint per structure, taught energies; a sparse one on the surroundings of each
        atom, taught energies and forces (`LocalGPR`; several times slower); or what `ChosenModel` makes of both.
    classic : bool
        The published settings: repulsive prior, 10 candidates (random only at first, then 3 random + 7 rattle), one true
        step after each evaluation, no duplicates refused, no polish.
    random, rattle, permute : int or {iteration: int}
        Candidates per iteration of each generator.
    candidates : int
        About so many in all per iteration: scales those of random, rattle, permute that are not given (rounded, at least
        one each where there is one); 0: as they are, 40 (classic: 10).
    sample : int
        Structures that the sampler gives at most.
    sampler : "kmeans", "similarity" or "novelty"
        `KMeans`, `KernelSimilarity`, `Novelty`.
    acquisition : "lcb", "ei" or "thompson"
        What chooses among the relaxed candidates: `LCB`, `ExpectedImprovement`, `Thompson`. They are relaxed on the lower
        confidence bound in any case.
    kappa : float or {iteration: float}
        Weight of the model's uncertainty in the lower confidence bound; larger explores more.
    surrogate_steps : int or {iteration: int}
        Relaxation steps on the LCB surface.
    hops : int or {iteration: int}, optional
        Basin hopping on the LCB surface from each relaxed candidate, see `SurrogateHops`: time between evaluations that
        saves evaluations. Default 10; 30 with tight binding, since molecules have so many isomers; 0 where each step
        would call a calculator that is not built in.
    walkers : int
        So many of them hop, the lowest; 0: all.
    reset_after : int
        Iterations without improvement after which the model forgets, see `ResetOnStagnation`; 0: never.
    true_steps : int
        Steps in the true potential after each evaluation, every point kept.
    starts : int
        Iterations with random candidates only.
    polish : "promising", "periodic" or "none"
        Relaxation in the true potential. Promising: of each candidate, along the model with its forces put right, while
        that promises an energy below the best (see `Evaluate`). Periodic: of the best structure not yet relaxed, every
        `polish_every` iterations, without the model.
    polish_every : int
        See `polish`.
    polish_steps : int
        Most steps of such a relaxation.
    polish_last : int
        Structures polished when a run ends.
    noise : float
        Variance [eV^2] on the diagonal of the global Gaussian process.
    use_forces : bool, optional
        Teach the forces to the global Gaussian process, too (see `GPR`); the local one always learns them. Default: where
        the prior knows little ("none", "repulsive"), which saves a third of the evaluations there and costs time.
    threads : int
        Threads of one search; 0: as many as there are cores. Results do not depend on it.
    """
    _expect(("global", "local", "auto"), model, "model")
    if classic and model != "global":
        raise ConfigurationError("classic=True means the published settings, which have a global model")
    _expect(("promising", "periodic", "none"), polish, "polish")
    several = len(problem.counts) > 1
    if classic:
        prior, true_steps, polish, polish_last, noise = "repulsive", 1, "none", 0, 1e-2
        surrogate_steps = {0: 0, 2: 200}
    default: dict[str, int | Mapping[int, int]] = {
        "random": {0: 12, starts: 12},
        "rattle": {0: 0, starts: 16 if several else 28},
        "permute": {0: 0, starts: 12 if several else 0},
    }
    if classic:
        default = {"random": {0: 10, 5: 3}, "rattle": {0: 0, 5: 7}, "permute": 0}
    if candidates < 0 or reset_after < 0:
        raise ConfigurationError(
            f"candidates and reset_after must not be negative (0: leave it), got {candidates} and {reset_after}"
        )
    if candidates:
        default = {name: _scaled(count, candidates / (10 if classic else 40)) for name, count in default.items()}
    random = default["random"] if random is None or classic else random
    rattle = default["rattle"] if rattle is None or classic else rattle
    permute = default["permute"] if permute is None or classic else permute
    lcb = LCB(kappa)
    samplers: dict[str, Any] = {"kmeans": KMeans, "similarity": KernelSimilarity, "novelty": Novelty}
    acquisitions: dict[str, Any] = {"lcb": lambda: lcb, "ei": ExpectedImprovement, "thompson": Thompson}
    means = _means(prior, problem)
    if hops is None:
        slow = any(isinstance(mean, CalculatorPrior) and mean.each_call_costs for mean in means)
        hops = 0 if classic or slow else 30 if means == ["tight-binding"] else 10
    learners = (
        {}
        if model == "local"
        else _global_models(means, noise, False if classic and use_forces is None else use_forces)
    )
    if model != "global":  # second: the one without a prior assumes least
        learners = {**dict([*learners.items()][:1]), "local": LocalGPR(prior=means[0]), **learners}
    learner = _one_of(learners)
    gauges = [Evaluate(
        calculator, true_steps,
        polish_on="gp" if polish == "promising" else None,
        polish_every=polish_every if polish == "periodic" else 0,
        polish_steps=polish_steps,
        polish_last=polish_last,
    )]  # fmt: skip
    return Search(
        problem,
        sample=_named(samplers, sampler, "sampler")(sample),
        propose=[Random(random), Rattle(rattle), *([Permute(permute)] if several else [])],
        refine=[
            Relax(lcb, surrogate_steps),
            *([SurrogateHops(lcb, hops, surrogate_steps, walkers=walkers)] if hops else []),
            MinDistance(0.6),
            *_tidy(problem),
        ],
        acquire=_named(acquisitions, acquisition, "acquisition")(),
        evaluate=gauges if classic else [Duplicate(), *gauges],
        models={"gp": ResetOnStagnation(learner, reset_after) if reset_after else learner},
        store=store,
        seed=seed,
        threads=threads,
    )


def asla(
    problem: Problem,
    calculator: Any,
    *,
    store: str | Path | Store | None = None,
    seed: int = 0,
    grid: float = 0.2,
    dimension: int = 2,
    heights: Mapping[str, float | Sequence[float]] | None = None,
    hydrogen_last: bool = False,
    postprocess: str = "none",
    evaluate_on_grid: bool = True,
    surrogate_after: int = 30,
    surrogate_steps: int = 60,
    true_steps: int = 50,
    acquisition: str = "none",
    candidates: int = 10,
    kappa: float | Mapping[int, float] = 1.0,
    rebuild: int = 0,
    rebuild_after: int = 50,
    unchosen: int = 0,
    displaced: int = 0,
    sample: int = 20,
    representation: str = "gaussian",
    representation_options: Mapping[str, Any] | None = None,
    network: str | None = None,
    policy: str = "epsilon-greedy",
    epsilon: float | None = None,
    temperature: float = 0.05,
    novel: bool = True,
    span: float | None = None,
    lr: float = 2e-3,
    warm_up: int = 100,
    train_steps: int = 3,
    replay: int = 3,
    favour: float = 0.0,
    patience: int = 100,
    lifetime: int = 300,
    symmetry: bool | None = None,
    transfer_from: str | None = None,
    prior: Any = "auto",
    backend: str = "auto",
    threads: int = 0,
) -> Search:
    """Atomistic structure learning (ASLA; thesis ch. 4 to 6): an agent places atom after atom on a grid and learns from
    every energy which placements pay. Needs `pip install 'thalweg[asla]'`. The defaults of the learning are those that
    did best on graphene and its likes; the published ones are lr=1e-3, warm_up=0, train_steps=1, patience=0, lifetime=0,
    novel=False.

    Parameters
    ----------
    grid : float
        Spacing of the grid [angstrom].
    dimension : 2 or 3
        Of the grid: one layer of points that the box's first two vectors span, or points all over the box.
    heights : mapping of symbol to angstrom or (lowest, highest), optional
        z of each species in two dimensions (layered pseudo-3D); default: the middle of the box. In three dimensions the
        layer of points that a species keeps to, or the lowest and highest z at which it is placed.
    hydrogen_last : bool
        Hydrogen is placed when all else is.
    postprocess : "none", "surrogate" or "true"
        Relaxation of what was built: not at all, on the mean of a Gaussian process (ASLA-P), or in the true potential,
        every point counted (the control for a perfect surrogate).
    evaluate_on_grid : bool
        After a surrogate relaxation atoms are moved back to the grid before the energy (ASLA-P as published); False: the
        relaxed structure is evaluated, and its snapped copy learned.
    surrogate_after : int
        Iterations without relaxation, in which the surrogate gathers data.
    surrogate_steps : int
        Of a relaxation on the surrogate.
    true_steps : int
        Of a relaxation in the true potential (`postprocess="true"`).
    acquisition : "none" or "lcb"
        "lcb": several builds per iteration, of which the one with the lowest confidence bound is evaluated (ASLA-PA).
    candidates : int
        How many builds that are.
    kappa : float or {iteration: float}
        Weight of the surrogate's uncertainty in the lower confidence bound.
    rebuild : int
        So many of the candidates are known structures with some atoms taken out and built anew.
    rebuild_after : int
        Iterations with complete builds only.
    unchosen : int
        So many more candidates are the best of the iteration before that were not evaluated (`Unchosen`); with rebuilds and
        `displaced` the full mixture of thesis ch. 6 is candidates=22, rebuild=20, unchosen=20, displaced=5.
    displaced : int
        So many more are known structures moved along their true forces (`AlongForces`).
    sample : int
        Parents of the rebuilds and displacements: so many of the lowest structures that a kernel tells apart.
    representation : "one-hot", "gaussian", "agr", "displaced" or "harmonics"
        How atoms become images, see `thalweg.networks`.
    representation_options : mapping, optional
        Numbers of the representation, such as {"bias": -0.1}.
    network : str, optional
        A preset of `thalweg.networks.PRESETS`; default: the published network of 15 x 15 kernels in two dimensions, the
        dilated one of 7 x 7 x 7 in three.
    policy : "epsilon-greedy", "softmax" or "uniform"
        How a placement is chosen, see `Policy`.
    epsilon : float, optional
        Share of random placements; default: 1 / atoms to place.
    temperature : float
        Of the softmax policy.
    novel : bool
        A build that equals one that the agent has learned is begun anew, up to five times.
    span : float, optional
        Energy above the best [eV] at which the reward is -1; default: from the energies seen.
    lr : float
        Learning rate of Adam.
    warm_up : int
        Training steps over which the learning rate rises to `lr`.
    train_steps : int
        Training steps per episode.
    replay : int
        Random episodes per training step, beside the best and the newest.
    favour : float
        How much more often low episodes are replayed, see `Agent`.
    patience : int
        Episodes without a new lowest energy after which the agent begins anew, see `Agent`; 0: never.
    lifetime : int
        It begins anew after this times 1, 1, 2, 1, 1, 2, 4, ... episodes in any case, see `Agent`; 0: never.
    symmetry : bool, optional
        Pairs are rotated and mirrored at random; default: unless a template has atoms beyond the grid.
    transfer_from : str, optional
        A snapshot (.npz) of an agent for the same species, representation and spacing, from whose weights learning
        starts, such as `restarts/000/agent.npz` of a run; in a TOML file relative to it.
    prior : "auto", "fitted", "tight-binding", "bonding", "repulsive", "none" or what `GPR` takes
        Of the surrogate, which learns energies alone; see `gofee`. "auto": tight binding for free molecules with hydrogen
        or carbon, else fitted wells.
    backend : "auto", "core" or "torch"
        What trains the network, see `thalweg.networks.Trainer`.
    threads : int
        Threads of one search; 0: as many as there are cores. Results do not depend on it.
    """
    _expect(("none", "surrogate", "true"), postprocess, "postprocess")
    _expect(("none", "lcb"), acquisition, "acquisition")
    if rebuild and acquisition == "none" and rebuild != 1:
        raise ConfigurationError(
            f"without an acquisition there is one candidate: rebuild must be 0 or 1, got {rebuild}"
        )
    grids = GridSettings(grid, dimension, heights=heights, hydrogen_last=hydrogen_last)
    asking: dict[str, Any] = {"grid": grids, "policy": Policy(policy, epsilon, temperature=temperature), "novel": novel}
    count = candidates if acquisition == "lcb" else 1
    for name, value, least in (
        ("candidates", candidates, 1), ("rebuild_after", rebuild_after, 0), ("unchosen", unchosen, 0),
        ("displaced", displaced, 0), ("surrogate_after", surrogate_after, 0), ("surrogate_steps", surrogate_steps, 1),
        ("true_steps", true_steps, 1), ("sample", sample, 1), ("train_steps", train_steps, 1), ("rebuild", rebuild, 0),
    ):  # fmt: skip
        check_whole(value, name, least)
    if rebuild > count:
        raise ConfigurationError(f"rebuild must be 0 to {count}, the candidates of an iteration, got {rebuild!r}")
    if rebuild == count and rebuild_after == 0:
        raise ConfigurationError(
            f"with rebuild={rebuild} of {count} candidates from the first iteration on (rebuild_after=0) there is nothing "
            "to rebuild; take a rebuild_after of 1 or more, or fewer rebuilds"
        )
    if (unchosen or displaced) and acquisition == "none":
        raise ConfigurationError("unchosen and displaced candidates need an acquisition: acquisition='lcb'")
    surrogate = postprocess == "surrogate" or acquisition == "lcb" or rebuild > 0
    lcb: Any = LCB(kappa)
    refine: list[Any] = []
    if postprocess == "surrogate":
        refine = [Relax("gp", {0: 0, surrogate_after: surrogate_steps})]
    if evaluate_on_grid and (refine or displaced):
        refine.append(Snap(grids))
    grids.of(problem)
    agent = Agent(
        grids, representation=representation, representation_options=dict(representation_options or {}),
        network=network, span=span, lr=lr, warm_up=warm_up, steps=train_steps,
        replay=replay, favour=favour, patience=patience, lifetime=lifetime, symmetry=symmetry, transfer_from=transfer_from,
        backend=backend, threads=threads, seed=seed,
    )  # fmt: skip
    models: dict[str, Any] = {} if policy == "uniform" else {"agent": agent}  # who asks for no Q need not learn it
    if surrogate:
        # One model and no forces: an episode must stay cheap.
        models["gp"] = _one_of(_global_models(_means(prior, problem)[:1], use_forces=False))
    build = Build({0: count, rebuild_after: count - rebuild} if rebuild else count, **asking)
    return Search(
        problem,
        sample=KernelSimilarity(sample) if rebuild or displaced else None,
        propose=[
            build,
            *([Rebuild({0: 0, rebuild_after: rebuild}, **asking)] if rebuild else []),
            *([Unchosen({0: 0, rebuild_after: unchosen})] if unchosen else []),
            *([AlongForces({0: 0, rebuild_after: displaced})] if displaced else []),
        ],
        refine=refine,
        acquire=None if acquisition == "none" else Remembering(lcb, unchosen) if unchosen else lcb,
        # What goes back to the grid, or a short way along its forces, may end where its parent was.
        evaluate=[
            *([Duplicate()] if displaced else []),
            Evaluate(calculator, true_steps if postprocess == "true" else 0),
        ],
        models=models,
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
    amplitude : float
        Largest move of an atom [angstrom].
    moved : float
        Expected number of atoms that a rattle moves.
    steps : int
        Of each relaxation in the true potential; every point is an evaluation.
    force_tolerance : float
        Largest force at which such a relaxation ends [eV/angstrom].
    threads : int
        Threads of one search; 0: as many as there are cores. Results do not depend on it.
    """
    rattle = Rattle(1, amplitude=amplitude, moved=moved)
    move = OneOf(rattle, Permute(1)) if len(problem.counts) > 1 else rattle
    return Search(
        problem,
        sample=LastAccepted(),
        propose=FirstOf(move, Random(1)),
        refine=_tidy(problem),
        evaluate=Evaluate(calculator, steps, force_tolerance),
        settle=Metropolis(temperature, c2=_pieces(problem)),
        store=store,
        seed=seed,
        threads=threads,
    )


def complementary_energy(
    problem: Problem,
    calculator: Any,
    *,
    store: str | Path | Store | None = None,
    seed: int = 0,
    population: int = 10,
    role_models: tuple[int, int] = (2, 4),
    few: bool = True,
    attractors: Literal["models", "clusters"] = "models",
    steps: int = 200,
    force_tolerance: float = 0.05,
    threads: int = 0,
) -> Search:
    """Search by complementary energy (Chiriki, Christiansen, Hammer, PRB 100, 235436 (2019)): atoms take over the
    surroundings of others, their role models; relax in the true potential; go on while the energy falls.

    Parameters
    ----------
    population : int
        Structures from which descents begin: at first random ones, relaxed; then the lowest that descents led to.
    role_models : (int, int)
        How many there are at least and at most; the published numbers are 2 and 4 for SiO2, 4 and 6 for TiO2.
    few : bool
        Only some atoms move, those farthest from their role model; false: all.
    attractors : "models" or "clusters"
        Role models, or centres of clusters of atoms (cluster regularization), see `ComplementaryEnergy`.
    steps : int
        Of each relaxation in the true potential; every point is an evaluation.
    force_tolerance : float
        Largest force at which such a relaxation ends [eV/angstrom].
    threads : int
        Threads of one search; 0: as many as there are cores. Results do not depend on it.
    """
    return Search(
        problem,
        sample=Population(),
        propose=FirstOf(ComplementaryEnergy(1, role_models, few=few, attractors=attractors), Random(1)),
        refine=_tidy(problem),
        evaluate=Evaluate(calculator, steps, force_tolerance),
        settle=AcceptLower(population, c2=_pieces(problem)),
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
        Largest force at which such a relaxation ends [eV/angstrom].
    threads : int
        Threads of one search; 0: as many as there are cores. Results do not depend on it.
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


def _means(prior: Any, problem: Problem) -> list[Any]:
    """Prior means to choose from; a calculator is made once, whichever models take it."""
    if isinstance(prior, str) and prior == "auto":
        return ["tight-binding"] if _is_molecule(problem) else ["fitted", None]
    return [None if isinstance(prior, str) and prior == "none" else CalculatorPrior.of(prior)]


def _is_molecule(problem: Problem) -> bool:
    """Whether it is a free one that tight binding knows, with hydrogen or carbon: not a cluster of silicon."""
    free = not problem.periodic and problem.template is None
    species = set(np.unique(problem.numbers).tolist())
    return free and species <= set(_core.TightBinding.elements()) and bool(species & {1, 6})


def _global_models(means: Sequence[Any], noise: float = 1e-5, use_forces: bool | None = None) -> dict[str, Any]:
    """A Gaussian process for each; it learns forces, if that is left open, where the prior knows little."""
    names = ["global", "global, no prior"]
    poor = [mean is None or (isinstance(mean, str) and mean == "repulsive") for mean in means]
    return {
        name: GPR(prior=mean, noise=noise, use_forces=little if use_forces is None else use_forces)
        for name, mean, little in zip(names, means, poor, strict=False)
    }


def _one_of(learners: Mapping[str, Any]) -> Any:
    return ChosenModel(learners) if len(learners) > 1 else next(iter(learners.values()))


def _tidy(problem: Problem) -> list[Any]:
    """Free clusters in one piece and in the middle of the cell, periodic structures inside it."""
    if problem.periodic:
        return [Wrap()]
    return [Connected(), Centre()] if problem.template is None else []


def _pieces(problem: Problem) -> float:
    """c2 within which atoms must hang together to be accepted: from pieces few moves lead to what `_tidy` lets pass."""
    return math.inf if problem.periodic or problem.template is not None else 1.5


def _named(options: Mapping[str, Any], name: str, what: str) -> Any:
    _expect(options, name, what)
    return options[name]


def _expect(options: Iterable[str], name: str, what: str) -> None:
    if name not in options:
        listed = ", ".join(f"'{option}'" for option in options)
        raise ConfigurationError(f"{what} must be one of {listed}, got {name!r}.{nearest(str(name), list(options))}")


def _scaled(count: int | Mapping[int, int], factor: float) -> int | Mapping[int, int]:
    """A number of candidates times a factor; what was there does not vanish."""
    if isinstance(count, Mapping):
        return {first: max(1, round(factor * number)) if number else 0 for first, number in count.items()}
    return max(1, round(factor * count)) if count else 0


RECIPES: dict[str, Callable[..., Search]] = {
    "gofee": gofee,
    "asla": asla,
    "basin_hopping": basin_hopping,
    "complementary_energy": complementary_energy,
    "random_search": random_search,
}
