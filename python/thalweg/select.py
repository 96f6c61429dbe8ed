"""Samplers (Context -> Batch of known structures) and acquisition functions ((Batch, Context) -> scores, low first)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from thalweg.descriptors import Fingerprint, clusters
from thalweg.errors import ConfigurationError, check_whole
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled

__all__ = [
    "LCB",
    "Best",
    "ExpectedImprovement",
    "KMeans",
    "KernelSimilarity",
    "LastAccepted",
    "Novelty",
    "Population",
    "Remembering",
    "Thompson",
]

# A candidate of which evaluating the pending ones would take this part of the variance is one of them.
_SAME_AS_PENDING = 0.95


def _members(ctx: Context, rows: np.ndarray) -> Batch:
    """Rows of the data as sample members; the column `row` says which."""
    return ctx.data.take(rows).with_columns(row=np.asarray(rows, np.int64))


def _by_energy(ctx: Context) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the data that have an objective, lowest first, and the objective of every row."""
    objective = ctx.problem.objective(ctx.data) if len(ctx.data) else np.zeros(0)
    usable = np.flatnonzero(np.isfinite(objective))
    return usable[np.argsort(objective[usable], kind="stable")], objective


def _check_fraction(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{what} must lie between 0 and 1, got {value!r}")


@dataclass(frozen=True)
class KMeans:
    """The lowest structure of each of up to `count` clusters of fingerprints (GOFEE's sampler).

    Structures within `energy_window` of the lowest take part (the window doubles until there are `count` of them, or
    all); there are 1 + min(count - 1, n // 5) clusters.

    Parameters
    ----------
    count : int
    energy_window : float
        In eV.
    descriptor : object with `values(batch, threads=...) -> (n, D)`
    """

    count: int = 10
    energy_window: float = 5.0
    descriptor: Fingerprint = field(default_factory=Fingerprint)
    name: str = "KMeans"

    def __call__(self, ctx: Context) -> Batch:
        objective = ctx.problem.objective(ctx.data)
        usable = np.flatnonzero(np.isfinite(objective))
        if not len(usable):
            return Batch.empty()
        usable = usable[np.argsort(objective[usable], kind="stable")]
        window = self.energy_window
        while True:
            inside = usable[objective[usable] <= objective[usable[0]] + window]
            if len(inside) >= min(self.count, len(usable)):
                break
            window *= 2
        count = 1 + min(self.count - 1, len(inside) // 5)
        features = ctx.features(self.descriptor)[inside]
        # Starts from the lowest structure; `inside` rises in energy, so the first of a cluster is its lowest.
        _, first = np.unique(clusters(features, count)[1], return_index=True)
        return _members(ctx, inside[np.sort(first)])


@dataclass(frozen=True)
class Best:
    """The `count` lowest structures."""

    count: int = 1
    name: str = "Best"

    def __call__(self, ctx: Context) -> Batch:
        objective = ctx.problem.objective(ctx.data)
        order = np.argsort(np.where(np.isnan(objective), np.inf, objective), kind="stable")
        return _members(ctx, order[: min(self.count, int(np.isfinite(objective).sum()))])


@dataclass(frozen=True)
class KernelSimilarity:
    """Up to `count` of the lowest structures that the model tells apart: from the lowest energy up, a structure whose
    kernel k(x, x') / k(x, x) with a chosen one exceeds the threshold is skipped (Paper III; AGOX's sampler of that name).
    As long as the model has learned nothing: the lowest.

    Parameters
    ----------
    count : int
    threshold : float
        Between 0 and 1; 1 takes all but exact copies.
    model : str
        Name of a model in `Search(models={...})` that has a descriptor and a kernel (`GPR`).
    """

    count: int = 10
    threshold: float = 0.95
    model: str = "gp"
    name: str = "KernelSimilarity"

    def __post_init__(self) -> None:
        check_whole(self.count, f"the count of {self.name}", 1)
        _check_fraction(self.threshold, f"the threshold of {self.name}")

    def __call__(self, ctx: Context) -> Batch:
        order, _ = _by_energy(ctx)
        if not len(order):
            return Batch.empty()
        fitted = model_of(ctx, self.model)
        if not hasattr(fitted, "similarity"):
            raise ConfigurationError(
                f"{self.name} compares structures by a model's kernel, but '{self.model}' ({type(fitted).__name__}) has "
                "no similarity(); use Novelty or KMeans"
            )
        if fitted.size == 0:
            return _members(ctx, order[: self.count])
        features = ctx.features(fitted.descriptor)
        chosen: list[int] = []
        for row in order.tolist():
            if not chosen or np.max(fitted.similarity(features[row], features[chosen])) <= self.threshold:
                chosen.append(row)
            if len(chosen) == self.count:
                break
        return _members(ctx, np.array(chosen, np.int64))


@dataclass(frozen=True)
class Novelty:
    """Low structures that differ most: the lowest, then again and again the structure within `energy_window` of it whose
    nearest chosen one is farthest away in fingerprint (farthest first), until there are `count` or the rest resemble a
    chosen one.

    Parameters
    ----------
    count : int
    energy_window : float
        In eV above the lowest.
    distance : float
        A structure resembles another if their fingerprints differ by less than this fraction of the lowest one's length.
    descriptor : object with `values(batch, threads=...) -> (n, D)`
    """

    count: int = 10
    energy_window: float = 2.0
    distance: float = 0.02
    descriptor: Fingerprint = field(default_factory=Fingerprint)
    name: str = "Novelty"

    def __post_init__(self) -> None:
        check_whole(self.count, f"the count of {self.name}", 1)
        if not (self.energy_window >= 0 and self.distance >= 0):
            raise ConfigurationError(
                f"energy_window and distance of {self.name} must not be negative, got {self.energy_window!r} and "
                f"{self.distance!r}"
            )

    def __call__(self, ctx: Context) -> Batch:
        order, objective = _by_energy(ctx)
        if not len(order):
            return Batch.empty()
        low = order[objective[order] <= objective[order[0]] + self.energy_window]
        features = ctx.features(self.descriptor)[low]
        least = self.distance * np.sqrt(np.square(features[0]).sum())
        chosen = [0]
        nearest_chosen = np.sqrt(np.square(features - features[0]).sum(axis=1))
        while len(chosen) < self.count:
            farthest = int(np.argmax(nearest_chosen))
            if nearest_chosen[farthest] <= least:
                break
            chosen.append(farthest)
            distance = np.sqrt(np.square(features - features[farthest]).sum(axis=1))
            nearest_chosen = np.minimum(nearest_chosen, distance)
        return _members(ctx, low[np.sort(chosen)])


@dataclass(frozen=True)
class LastAccepted:
    """The structure that a settling stage accepted last (basin hopping); empty before the first.

    Parameters
    ----------
    of : str
        Name of the settling stage.
    """

    of: str = "Metropolis"
    name: str = "LastAccepted"

    def __call__(self, ctx: Context) -> Batch:
        kept = ctx.carry.get(self.of)
        return Batch.empty() if kept is None else _measured(ctx, kept["ticket"], kept["point"])


@dataclass(frozen=True)
class Population:
    """What `AcceptLower` keeps: the structure that it accepted last as long as that leads on, else its population; empty
    before that is complete.

    Parameters
    ----------
    of : str
        Name of the settling stage.
    """

    of: str = "AcceptLower"
    name: str = "Population"

    def __call__(self, ctx: Context) -> Batch:
        kept = ctx.carry.get(self.of)
        if kept is None or not kept["complete"]:
            return Batch.empty()
        last = slice(-1, None) if kept["descending"] else slice(None)
        return _measured(ctx, kept["ticket"][last], kept["point"][last])


def _measured(ctx: Context, tickets: np.ndarray, points: np.ndarray) -> Batch:
    """The evaluations with these numbers (k,), in order."""
    columns = ctx.data.columns
    wanted = zip(np.atleast_1d(tickets), np.atleast_1d(points), strict=True)
    rows = [np.flatnonzero((columns["ticket"] == ticket) & (columns["point"] == point)) for ticket, point in wanted]
    return _members(ctx, np.concatenate(rows))


@dataclass(frozen=True)
class LCB:
    """Lower confidence bound E - kappa sigma of a model (thesis (2.18)); also a landscape to relax on.

    With candidates in flight (`ctx.pending`) sigma is what it will be once they are known, whatever their energies turn
    out to be (GP-BUCB: Desautels, Krause, Burdick, JMLR 15, 4053 (2014)), and copies of them come last; the landscape
    does not see them.

    Parameters
    ----------
    kappa : float or {iteration: float}
    model : str
        Name of the model in `Search(models={...})`.
    """

    kappa: Schedule[float] = 2.0
    model: str = "gp"
    name: str = "LCB"

    def __post_init__(self) -> None:
        check_schedule(self.kappa, "kappa")

    def __call__(self, batch: Batch, ctx: Context) -> np.ndarray:
        energy, sigma, copies = _predicted(batch, ctx, self.model)
        return _last(energy - scheduled(self.kappa, ctx.iteration) * sigma, copies)

    def landscape(self, ctx: Context):
        """The surface E - kappa sigma at this iteration."""
        return model_of(ctx, self.model).landscape(scheduled(self.kappa, ctx.iteration))


@dataclass(frozen=True)
class Remembering:
    """An acquisition that also hands its best candidates to the next iteration, where `Unchosen` proposes those again
    that were not evaluated.

    Parameters
    ----------
    acquire : the acquisition
    count : int
        So many beside the best.
    """

    acquire: Any
    count: int = 20
    name: str = "Remembering"

    def __call__(self, batch: Batch, ctx: Context) -> np.ndarray:
        scores = np.asarray(self.acquire(batch, ctx), float)
        ordered = np.argsort(np.where(np.isnan(scores), np.inf, scores), kind="stable")
        best = batch.take(ordered[np.isfinite(scores[ordered])][: self.count + 1])
        shape = (len(best), len(ctx.problem.numbers), 3)
        order = {"order": best.columns["order"]} if "order" in best.columns else {}
        ctx.keep(positions=best.positions.reshape(shape), fixed=best.fixed.reshape(shape), **order)
        return scores


@dataclass(frozen=True)
class ExpectedImprovement:
    """Minus the logarithm of the expected improvement on the lowest evaluated energy, sigma (phi(z) + z Phi(z)) with
    z = (E_best - xi - E) / sigma (Jones, Schonlau, Welch, J. Global Optim. 13, 455 (1998)), in the form that neither
    underflows nor cancels (Ament et al., NeurIPS 2023): also candidates without a chance are put in order. Candidates in
    flight count as in `LCB`. As long as nothing is evaluated: the model's energy.

    Parameters
    ----------
    model : str
        Name of the model in `Search(models={...})`.
    xi : float
        Improvement [eV] that does not count.
    """

    model: str = "gp"
    xi: float = 0.0
    name: str = "ExpectedImprovement"

    def __post_init__(self) -> None:
        if not np.isfinite(self.xi):
            raise ConfigurationError(f"xi is an energy in eV and must be finite, got {self.xi!r}")

    def __call__(self, batch: Batch, ctx: Context) -> np.ndarray:
        energy, sigma, copies = _predicted(batch, ctx, self.model)
        known = ctx.data.columns["energy"][ctx.data.ok] if len(ctx.data) else np.zeros(0)
        if not np.any(np.isfinite(known)):
            return _last(energy, copies)
        return _last(-log_expected_improvement(float(np.nanmin(known)) - self.xi - energy, sigma), copies)


def log_expected_improvement(gain: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """(n,) log of E[max(0, g)] for g normal with mean `gain` (n,) and deviation `sigma` (n,), both in eV.

    sigma = 0: log(max(0, gain)).
    """
    from scipy.special import erfcx, ndtr

    with np.errstate(all="ignore"):
        z = gain / sigma
        near = np.log(np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi) + z * ndtr(z))
        # For z << 0 phi + z Phi = phi (1 + z Phi / phi), and the bracket tends to 1 / z^2.
        bracket = np.where(
            z < -1e3, np.log1p(-3 / z**2) - 2 * np.log(-z), np.log1p(z * np.sqrt(np.pi / 2) * erfcx(-z / np.sqrt(2)))
        )
        far = -0.5 * z * z - 0.5 * np.log(2 * np.pi) + bracket
        certain = np.log(np.maximum(gain, 0.0))
        value = np.where(np.isinf(z), np.where(z > 0, certain, -np.inf), np.log(sigma) + np.where(z > -1, near, far))
        value = np.where(sigma > 0, value, certain)
    return np.where(np.isnan(gain) | np.isnan(sigma), np.nan, value)


@dataclass(frozen=True)
class Thompson:
    """The energies of one function drawn from the posterior of a model, at all candidates together: similar candidates
    rise and fall together (Thompson, Biometrika 25, 285 (1933)).

    A model without `joint_draw` (`GPR` has it) gives independent draws E + sigma z instead: an approximation that picks
    among many similar candidates too often.

    Parameters
    ----------
    model : str
        Name of the model in `Search(models={...})`.
    """

    model: str = "gp"
    name: str = "Thompson"

    def __call__(self, batch: Batch, ctx: Context) -> np.ndarray:
        fitted = model_of(ctx, self.model)
        normal = ctx.key.rng().standard_normal(len(batch))
        if hasattr(fitted, "joint_draw"):
            return fitted.joint_draw(batch, normal, threads=ctx.threads)
        energy, sigma = fitted.predict(batch, threads=ctx.threads)
        return energy + sigma * normal


def _predicted(batch: Batch, ctx: Context, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Energy and sigma [eV] of candidates, sigma as if what is pending were known; and which are copies of it."""
    fitted: Any = model_of(ctx, model)
    energy, sigma = fitted.predict(batch, threads=ctx.threads)
    if not len(ctx.pending) or not hasattr(fitted, "sigma_after"):
        return energy, sigma, None
    after = fitted.sigma_after(batch, ctx.pending, threads=ctx.threads)
    return energy, after, sigma**2 - after**2 > _SAME_AS_PENDING * sigma**2


def _last(scores: np.ndarray, copies: np.ndarray | None) -> np.ndarray:
    """Copies of what is pending come after all others."""
    return scores if copies is None else np.where(copies, np.inf, scores)


def model_of(ctx: Context, name: str):
    """The fitted model of that name.

    Raises ConfigurationError if the search has none.
    """
    if name not in ctx.models:
        raise ConfigurationError(f"this search has no model named '{name}'; it has {sorted(ctx.models) or 'none'}")
    return ctx.models[name]
