"""Samplers (Context -> Batch of known structures) and acquisition functions ((Batch, Context) -> scores, low first)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from thalweg.descriptors import Fingerprint
from thalweg.errors import ConfigurationError
from thalweg.records import Batch, Context
from thalweg.schedule import Schedule, check_schedule, scheduled

__all__ = ["LCB", "Best", "KMeans", "LastAccepted"]


def _members(ctx: Context, rows: np.ndarray) -> Batch:
    """Rows of the data as sample members; the column `row` says which."""
    return ctx.data.take(rows).with_columns(row=np.asarray(rows, np.int64))


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
        from scipy.cluster.vq import vq

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
        clusters = 1 + min(self.count - 1, len(inside) // 5)
        features = ctx.features(self.descriptor)[inside]
        # Farthest-first from the lowest structure: needs no random numbers and never starts with an empty cluster.
        centres = features[:1]
        for _ in range(clusters - 1):
            _, distance = vq(features, centres, check_finite=False)
            centres = np.vstack([centres, features[int(np.argmax(distance))]])
        for _ in range(20):
            member, _ = vq(features, centres, check_finite=False)
            moved = np.array(
                [features[member == k].mean(0) if np.any(member == k) else c for k, c in enumerate(centres)]
            )
            if np.array_equal(moved, centres):
                break
            centres = moved
        _, first = np.unique(
            member, return_index=True
        )  # `inside` rises in energy: the first of a cluster is its lowest
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
        if kept is None:
            return Batch.empty()
        columns = ctx.data.columns
        rows = np.flatnonzero((columns["ticket"] == kept["ticket"]) & (columns["point"] == kept["point"]))
        return _members(ctx, rows)


@dataclass(frozen=True)
class LCB:
    """Lower confidence bound E - kappa sigma of a model (thesis (2.18)); also a landscape to relax on.

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
        fitted = model_of(ctx, self.model)
        energy, sigma = fitted.predict(batch, threads=ctx.threads)
        return energy - scheduled(self.kappa, ctx.iteration) * sigma

    def landscape(self, ctx: Context):
        """The surface E - kappa sigma at this iteration."""
        return model_of(ctx, self.model).landscape(scheduled(self.kappa, ctx.iteration))


def model_of(ctx: Context, name: str):
    """The fitted model of that name.

    Raises ConfigurationError if the search has none.
    """
    if name not in ctx.models:
        raise ConfigurationError(f"this search has no model named '{name}'; it has {sorted(ctx.models) or 'none'}")
    return ctx.models[name]
