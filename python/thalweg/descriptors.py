"""Descriptors: structures in, feature vectors and their derivatives out.

Everything here takes a batch: any object with the arrays of `thalweg.records.Batch`
(`positions`, `numbers`, `offsets`, `cells`, `pbc`, `fixed`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thalweg import _core
from thalweg.errors import ConfigurationError

__all__ = ["Fingerprint"]

Floats = NDArray[np.float64]


class BatchLike(Protocol):
    """The arrays of n structures with m atoms together."""

    @property
    def positions(self) -> Floats: ...  # (m, 3) angstrom
    @property
    def numbers(self) -> NDArray[Any]: ...  # (m,)
    @property
    def offsets(self) -> NDArray[Any]: ...  # (n + 1,)
    @property
    def cells(self) -> Floats: ...  # (n, 3, 3) angstrom
    @property
    def pbc(self) -> NDArray[np.bool_]: ...  # (n, 3)
    @property
    def fixed(self) -> NDArray[np.bool_]: ...  # (m, 3)


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of Oganov and Valle, weighted as in GOFEE.

    J. Chem. Phys. 130, 104504 (2009); thesis (2.20). A histogram of distances for each pair of species, then
    one of angles for each triplet (centre, pair), both smeared with Gaussians. Species are sorted by atomic
    number; blocks exist for the pairs and triplets that the composition can fill (periodic structures: all).

    `convention="smooth"` (default): the Gaussians are lowered so that they end with zero value and slope at
    `n_sigma`; the features then have two continuous derivatives (one where a neighbour crosses
    `cutoff_angular`), so the forces of a model are exact everywhere.
    `convention="agox"`: Gaussians cut off at `n_sigma`, values as those of AGOX's `Fingerprint`.

    The features depend on the volume of the cell, so clusters need a cell, too. For k copies of a crystal's
    cell the number of atoms N and the volume V grow together: the radial part, normalised by N^2/V, stays as
    it is; the angular part, normalised by N^3/V, falls as 1/k. Compare structures with as many atoms only.
    """

    cutoff_radial: float = 6.0  # angstrom
    cutoff_angular: float = 4.0  # angstrom
    bin_width: float = 0.2  # angstrom
    angular_bins: int = 30  # over 0..pi
    sigma_radial: float = 0.2  # angstrom
    sigma_angular: float = 0.2  # radian
    gamma: float = 2.0
    eta: float = 20.0  # weight of the angular part
    n_sigma: float = 4.0
    angular: bool = True
    convention: Literal["smooth", "agox"] = "smooth"

    def bind(self, numbers: ArrayLike, periodic: bool) -> _core.Fingerprint:
        """The compiled fingerprint for structures of one composition; cached.

        numbers: (atoms,) atomic numbers in any order. periodic: whether any direction is periodic.
        Raises ValueError if a setting makes no sense.
        """
        return _bind(self, tuple(sorted(int(number) for number in np.asarray(numbers).ravel())), bool(periodic))

    def values(self, batch: BatchLike, threads: int = 0) -> Floats:
        """Features (n, size) of structures that share composition and periodicity; else raises ValueError."""
        return self._bind_to(batch).values(batch, threads)

    def jacobian(self, batch: BatchLike, threads: int = 0) -> Floats:
        """Derivatives of the features with respect to the positions, (m, 3, size), 1/angstrom."""
        return self._bind_to(batch).jacobian(batch, threads)

    def contract(self, batch: BatchLike, weights: Floats, threads: int = 0) -> Floats:
        """d(weights . features)/dx, (m, 3), for weights (n, size): one backward pass, no Jacobian."""
        return self._bind_to(batch).contract(batch, weights, threads)

    def _bind_to(self, batch: BatchLike) -> _core.Fingerprint:
        offsets = np.asarray(batch.offsets)
        if len(offsets) < 2:
            raise ConfigurationError("a fingerprint needs a batch of at least one structure, but this one is empty")
        return self.bind(np.asarray(batch.numbers)[: offsets[1]], bool(np.any(np.asarray(batch.pbc)[0])))


@lru_cache(maxsize=64)
def _bind(settings: Fingerprint, numbers: tuple[int, ...], periodic: bool) -> _core.Fingerprint:
    return _core.Fingerprint(np.array(numbers, dtype=np.int32), periodic, **asdict(settings))
