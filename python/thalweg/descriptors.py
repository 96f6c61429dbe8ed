"""Descriptors: structures in, feature vectors and their derivatives out.

Everything here takes a batch: any object with the arrays of `thalweg.records.Batch`
(`positions`, `numbers`, `offsets`, `cells`, `pbc`, `fixed`). `Fingerprint`, `SOAP` and `FCHL19` also have dscribe's `create`
and `derivatives`, which take ASE's Atoms, the last two `get_number_of_features`, too.

`values` and `contract` take `device="cuda"` (docs/cuda.md): the arrays of the batch, and weights, may then lie on the
device (CuPy, PyTorch, anything with `__cuda_array_interface__`), read there without a copy, or be NumPy's, which are
copied there. The result stays there: a `_core.cuda.DeviceArray`, which CuPy and PyTorch take without a copy and whose
`to_host()` is a NumPy array. There, a structure that the CPU refuses for its positions (not finite, atoms on one point)
has NaN. Raises BackendUnavailable where this installation has no kernels for devices, or no device answers. `FCHL19` has
no twin there and raises ConfigurationError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thalweg import _core
from thalweg.elements import NUMBERS
from thalweg.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from thalweg.records import Batch

__all__ = ["FCHL19", "SOAP", "Fingerprint", "LocalDensity"]

Floats = NDArray[np.float64]
DLPACK_CPU = 1  # kDLCPU
Result = Any  # Floats, or a _core.cuda.DeviceArray if device="cuda"


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

    def values(self, batch: BatchLike, threads: int = 0, device: str = "cpu") -> Result:
        """Features (n, size) of structures that share composition and periodicity; else raises ValueError."""
        return _values(self._bind_to, batch, threads, device)

    def jacobian(self, batch: BatchLike, threads: int = 0) -> Floats:
        """Derivatives of the features with respect to the positions, (m, 3, size), 1/angstrom."""
        return self._bind_to(batch).jacobian(batch, threads)

    def contract(self, batch: BatchLike, weights: Floats, threads: int = 0, device: str = "cpu") -> Result:
        """d(weights . features)/dx, (m, 3), for weights (n, size): one backward pass, no Jacobian."""
        return _contract(self._bind_to, batch, weights, threads, device)

    def create(self, system: Any, *, threads: int = 0) -> Floats | list[Floats]:
        """Features of ASE's Atoms (D,); of a list of them (n, D), or a list where compositions differ in D."""
        return _of_systems(system, lambda batch: self.values(batch, threads)[0])

    def derivatives(
        self, system: Any, *, return_descriptor: bool = True, threads: int = 0
    ) -> Floats | list[Floats] | tuple[Any, Any]:
        """Derivatives (atoms, 3, D) [1/angstrom] of ASE's Atoms; with return_descriptor also what `create` gives.

        Of a list of structures (n, atoms, 3, D), or a list where shapes differ.
        """
        found = _of_systems(system, lambda batch: self.jacobian(batch, threads))
        return (found, self.create(system, threads=threads)) if return_descriptor else found

    def _bind_to(self, batch: BatchLike) -> _core.Fingerprint:
        offsets = on_host(batch.offsets)
        if len(offsets) < 2:
            raise ConfigurationError("a fingerprint needs a batch of at least one structure, but this one is empty")
        return self.bind(on_host(batch.numbers)[: offsets[1]], bool(np.any(on_host(batch.pbc)[0])))


@lru_cache(maxsize=64)
def _bind(settings: Fingerprint, numbers: tuple[int, ...], periodic: bool) -> _core.Fingerprint:
    return _core.Fingerprint(np.array(numbers, dtype=np.int32), periodic, **asdict(settings))


@dataclass(frozen=True)
class SOAP:
    """SOAP power spectrum of every atom, or of a structure: what surrounds an atom, whichever way it is turned.

    Bartok, Kondor, Csanyi, PRB 87, 184115 (2013). Densities of Gaussians around each atom, one for each species, are
    expanded in n_max radial functions (the Gaussian-type orbitals of dscribe, `rbf="gto"`) and spherical harmonics up to
    l_max; features are the products of coefficients that do not change under rotation, for every pair of species. Any
    mixture of periodic and open directions. With `cutoff="hard"` the values are those of `dscribe.descriptors.SOAP` with
    the same r_cut, n_max, l_max and sigma (docs/backend.md has a table of all settings).

    Order of features: for each pair of species (rising atomic numbers, s <= s'), for l, for n, for n' (n' >= n if
    s = s').

    Parameters
    ----------
    r_cut : float
        Radial functions fade here [angstrom]; above 1. Neighbours count up to `reach` = r_cut + 3.72 sigma.
    n_max, l_max : int
        1 to 16, 0 to 12.
    sigma : float
        Width of the Gaussians [angstrom].
    species : sequence of symbols or atomic numbers, or None
        Species that may occur; they fix what the features are. None: those of the batch at hand.
    cutoff : "smooth" or "hard"
        Neighbours between r_cut and reach: faded out, so that values have two continuous derivatives; or counted fully
        and dropped with a jump at reach, as in dscribe.
    average : "off", "mean" or "sum"
        Features of every atom (m, D); or their mean or sum over the atoms of each structure (n, D).
    """

    r_cut: float = 6.0
    n_max: int = 6
    l_max: int = 4
    sigma: float = 0.5
    _: KW_ONLY
    species: Sequence[str | int] | None = None
    cutoff: Literal["smooth", "hard"] = "smooth"
    average: Literal["off", "mean", "sum"] = "off"

    def __post_init__(self) -> None:
        _check_whole(self)
        object.__setattr__(self, "species", _numbers_of(self.species))

    def bind(self, numbers: ArrayLike = ()) -> _core.Soap:
        """The compiled descriptor; cached. numbers: (k,) atomic numbers that may occur, used where `species` is None.

        Raises ConfigurationError if a setting makes no sense.
        """
        settings = {name: value for name, value in vars(self).items() if name != "species"}
        return _bind_soap(_species(self.species, numbers), tuple(settings.items()))

    def values(self, batch: BatchLike, threads: int = 0, device: str = "cpu") -> Result:
        """Features (m, D), or (n, D) averaged. Raises ConfigurationError for a species that is not covered."""
        return _values(self._bind_to, batch, threads, device)

    def contract(self, batch: BatchLike, weights: Floats, threads: int = 0, device: str = "cpu") -> Result:
        """d(weights . features)/dx, (m, 3), for weights of the shape of `values`: no Jacobian is made.

        For an energy that is a function of the features, weights = dE/dfeatures gives minus the forces.
        """
        return _contract(self._bind_to, batch, weights, threads, device)

    def jacobian(self, batch: BatchLike, threads: int = 0) -> list[Floats]:
        """Of each structure (n_i, n_i, 3, D): d(features of an atom)/d(position of an atom), 1/angstrom.

        `average` does not matter; it is large, n_i^2 3 D numbers.
        """
        return self.bind(batch.numbers).jacobian(batch, threads)

    def get_number_of_features(self) -> int:
        """D. Raises ConfigurationError if `species` is None: then it depends on the batch."""
        return _size(self)

    def create(self, system: Any, *, threads: int = 0) -> Floats | list[Floats]:
        """As dscribe's: features (atoms, D), or (D,) averaged, of ASE's Atoms.

        Of a list of structures (n, atoms, D), or a list where shapes differ.
        """
        return _of_systems(system, lambda batch: self._squeezed(self.values(batch, threads)))

    def derivatives(
        self, system: Any, *, attach: bool = False, return_descriptor: bool = True, threads: int = 0
    ) -> Floats | list[Floats] | tuple[Any, Any]:
        """As dscribe's: derivatives (centres, atoms, 3, D) [1/angstrom]; with return_descriptor also what `create` gives.

        One centre if averaged. Of a list of structures (n, centres, atoms, 3, D), or a list where shapes differ.
        attach : must be True: here a centre moves with its atom, as it does in forces. (dscribe's default is False.)
        """
        if not attach:
            raise ConfigurationError("centres move with their atoms here, those of dscribe only then: give attach=True")

        def derivative(batch: BatchLike) -> Floats:
            full = self.jacobian(batch, threads)[0]
            if self.average == "off":
                return full
            return (full.mean if self.average == "mean" else full.sum)(axis=0, keepdims=True)

        found = _of_systems(system, derivative)
        return (found, self.create(system, threads=threads)) if return_descriptor else found

    def _bind_to(self, batch: BatchLike) -> _core.Soap:
        return self.bind(on_host(batch.numbers) if self.species is None else ())

    def _squeezed(self, features: Floats) -> Floats:
        return features if self.average == "off" else features[0]


@dataclass(frozen=True)
class FCHL19:
    """FCHL19 of every atom: how many neighbours there are at which distance, and which triangles they make with it.

    Christensen, Bratholm, Faber, von Lilienfeld, J. Chem. Phys. 152, 044107 (2020). For each species log-normal functions
    of the distance; for each pair of species Gaussians of the mean distance times cosine and sine of the angle, with the
    weight of Axilrod, Teller and Muto; `thalweg/fchl.hpp` has the formulas. Any mixture of periodic and open directions,
    images of the atom itself are neighbours. For molecules the values are those of qmllib's `generate_fchl19`
    (docs/backend.md has a table of all settings).

    Order of features: for each species (rising atomic numbers), for k = 1 .. n_pairs; then for each pair of species
    s <= t, for l = 1 .. n_triplets, for each order, cosine and sine.

    The sine has no derivative where three atoms are on a line (a molecule such as CO2, an ideal crystal): there, within
    1e-6 of the line, the mean over all directions is taken, zero.

    Parameters
    ----------
    cutoff_pairs, cutoff_triplets : float
        Where neighbours have faded [angstrom]. The cost grows with the sixth power of the second one.
    n_pairs, n_triplets : int
        Functions of distances, evenly spaced up to the cutoff: 1 to 128.
    n_fourier : int
        Angular functions of orders 1, 3, ..., 2 n_fourier - 1: 1 to 8.
    eta_pairs, eta_triplets : float
        Widths: of log-normal functions [angstrom^2], of Gaussians [1/angstrom^2].
    zeta : float
        Order o counts with exp(-(zeta o)^2 / 2): with pi, as published, orders beyond the first are next to nothing.
    decay_pairs, decay_triplets, weight_triplets : float
        Exponents of the distances, and the weight of triplets.
    species : sequence of symbols or atomic numbers, or None
        Species that may occur; they fix what the features are. None: those of the batch at hand.
    """

    cutoff_pairs: float = 8.0
    cutoff_triplets: float = 8.0
    n_pairs: int = 24
    n_triplets: int = 20
    n_fourier: int = 1
    _: KW_ONLY
    eta_pairs: float = 0.32
    eta_triplets: float = 2.7
    zeta: float = math.pi
    decay_pairs: float = 1.8
    decay_triplets: float = 0.57
    weight_triplets: float = 13.4
    species: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        _check_whole(self)
        object.__setattr__(self, "species", _numbers_of(self.species))

    def bind(self, numbers: ArrayLike = ()) -> _core.Fchl19:
        """The compiled descriptor; cached. numbers: (k,) atomic numbers that may occur, used where `species` is None.

        Raises ConfigurationError if a setting makes no sense.
        """
        settings = {name: value for name, value in vars(self).items() if name != "species"}
        return _bind_fchl19(_species(self.species, numbers), tuple(settings.items()))

    def values(self, batch: BatchLike, threads: int = 0, device: str = "cpu") -> Floats:
        """Features (m, D). Raises ConfigurationError for a species that is not covered, and for atoms on one point."""
        no_twin("FCHL19", device)
        return _values(self._bind_to, batch, threads, device)

    def contract(self, batch: BatchLike, weights: Floats, threads: int = 0, device: str = "cpu") -> Floats:
        """d(weights . features)/dx, (m, 3), for weights (m, D): no Jacobian is made."""
        no_twin("FCHL19", device)
        return _contract(self._bind_to, batch, weights, threads, device)

    def jacobian(self, batch: BatchLike, threads: int = 0) -> list[Floats]:
        """Of each structure (n_i, n_i, 3, D): d(features of an atom)/d(position of an atom), 1/angstrom."""
        return self._bind_to(batch).jacobian(batch, threads)

    def get_number_of_features(self) -> int:
        """D. Raises ConfigurationError if `species` is None: then it depends on the batch."""
        return _size(self)

    def create(self, system: Any, *, threads: int = 0) -> Floats | list[Floats]:
        """Features (atoms, D) of ASE's Atoms; of a list of structures (n, atoms, D), or a list where shapes differ."""
        return _of_systems(system, lambda batch: self.values(batch, threads))

    def derivatives(
        self, system: Any, *, return_descriptor: bool = True, threads: int = 0
    ) -> Floats | list[Floats] | tuple[Any, Any]:
        """Derivatives (centres, atoms, 3, D) [1/angstrom]; with return_descriptor also what `create` gives.

        Centres move with their atoms. Of a list of structures (n, centres, atoms, 3, D), or a list where shapes differ.
        """
        found = _of_systems(system, lambda batch: self.jacobian(batch, threads)[0])
        return (found, self.create(system, threads=threads)) if return_descriptor else found

    def _bind_to(self, batch: BatchLike) -> _core.Fchl19:
        return self.bind(on_host(batch.numbers) if self.species is None else ())


@dataclass(frozen=True)
class LocalDensity:
    """How many neighbours of each species an atom has, near ones counting more; then its atomic number.

    Meldgaard, Kolsbjerg, Hammer, J. Chem. Phys. 149, 134104 (2018); thesis (2.19):
    f_i = [rho_i^A, rho_i^B, ..., Z_i], rho_i^s = sum over neighbours of s of exp(-r / decay) (cos(pi r / cutoff) + 1) / 2.
    Any mixture of periodic and open directions; images of an atom are neighbours, it itself is not.

    Parameters
    ----------
    decay, cutoff : float
        lambda and r_c [angstrom].
    species : sequence of symbols or atomic numbers, or None
        Columns, in order of rising atomic numbers. None: those of the batch at hand.
    """

    decay: float = 1.0
    cutoff: float = 11.9
    _: KW_ONLY
    species: Sequence[str | int] | None = None

    def __post_init__(self) -> None:
        _check_whole(self)
        object.__setattr__(self, "species", _numbers_of(self.species))

    def bind(self, numbers: ArrayLike = ()) -> _core.LocalDensity:
        """The compiled descriptor. numbers: (k,) atomic numbers that may occur, used where `species` is None."""
        species = np.array(_species(self.species, numbers), np.int32)
        return _core.LocalDensity(species, decay=self.decay, cutoff=self.cutoff)

    def values(self, batch: BatchLike, threads: int = 0, device: str = "cpu") -> Result:
        """Features (m, species + 1). Raises ConfigurationError for a species that is not covered."""
        return _values(self._bind_to, batch, threads, device)

    def contract(self, batch: BatchLike, weights: Floats, threads: int = 0, device: str = "cpu") -> Result:
        """d(weights . features)/dx, (m, 3), for weights (m, species + 1)."""
        return _contract(self._bind_to, batch, weights, threads, device)

    def jacobian(self, batch: BatchLike, threads: int = 0) -> list[Floats]:
        """Of each structure (n_i, n_i, 3, species + 1): d(features of an atom)/d(position of an atom), 1/angstrom."""
        return self.bind(batch.numbers).jacobian(batch, threads)

    def _bind_to(self, batch: BatchLike) -> _core.LocalDensity:
        return self.bind(on_host(batch.numbers) if self.species is None else ())


def wants_device(device: str) -> bool:
    """Whether the twins for devices are meant; raises BackendUnavailable where they are not to be had."""
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(f"device must be 'cpu' or 'cuda', got '{device}'")
    if device == "cuda":
        _core.cuda.require()
    return device == "cuda"


def no_twin(what: str, device: str) -> None:
    """Raises ConfigurationError for device="cuda"."""
    if device == "cuda":
        raise ConfigurationError(f"{what} has no twin on a device: leave device='cpu' (docs/cuda.md says what has)")


def device_face(array: Any) -> dict[str, Any] | None:
    """What an array on a device says of itself (`__cuda_array_interface__`); None for any other."""
    try:
        return getattr(array, "__cuda_array_interface__", None)
    except RuntimeError as problem:  # a tensor that needs gradients; JAX before 2024, on the CPU too
        if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == DLPACK_CPU:
            return None
        raise ConfigurationError(f"an array on a device cannot be read: {problem}") from problem


def on_host(array: Any) -> NDArray[Any]:
    """A small array to decide by, copied where it lies on a device."""
    return np.asarray(array) if device_face(array) is None else _core.cuda.to_host(array)


def _values(bind_to: Callable[[BatchLike], Any], batch: BatchLike, threads: int, device: str) -> Result:
    if wants_device(device):
        return _core.cuda.values(bind_to(batch), batch)
    _check_host(batch)
    return bind_to(batch).values(batch, threads)


def _check_host(batch: BatchLike) -> None:
    if device_face(batch.positions) is not None:
        raise ConfigurationError("the batch lies on a device: give device='cuda', or copy it")


def _contract(bind_to: Callable[[BatchLike], Any], batch: BatchLike, weights: Any, threads: int, device: str) -> Result:
    if wants_device(device):
        return _core.cuda.contract(bind_to(batch), batch, weights)
    _check_host(batch)
    return bind_to(batch).contract(batch, weights, threads)


def clusters(features: Floats, count: int) -> tuple[Floats, NDArray[np.int32]]:
    """Centres (count, D) of k-means clusters of features (n, D), n >= 1, and the cluster (n,) that each row belongs to.

    Begins with the first row and, again and again, the row farthest from what is there: needs no random numbers and
    never starts with an empty cluster.
    """
    from scipy.cluster.vq import vq

    centres = features[:1]
    for _ in range(count - 1):
        _, distance = vq(features, centres, check_finite=False)
        centres = np.vstack([centres, features[int(np.argmax(distance))]])
    for _ in range(20):
        member, _ = vq(features, centres, check_finite=False)
        moved = np.array([features[member == k].mean(0) if np.any(member == k) else c for k, c in enumerate(centres)])
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres, member


def _of_systems(system: Any, one: Callable[[Batch], Floats]) -> Floats | list[Floats]:
    """`one` of an Atoms object, or of each in a list: then one array if shapes agree, as dscribe gives it."""
    from ase import Atoms

    from thalweg.records import Batch

    if isinstance(system, Atoms):
        return one(Batch.from_ase(system, constraints=False))
    if not isinstance(system, Sequence) or not system or not all(isinstance(atoms, Atoms) for atoms in system):
        raise ConfigurationError(f"ASE's Atoms or a list of at least one were expected, got {type(system).__name__}")
    found = [one(Batch.from_ase(atoms, constraints=False)) for atoms in system]
    return np.stack(found) if len({array.shape for array in found}) == 1 else found


def _numbers_of(species: Sequence[str | int] | None) -> tuple[int, ...] | None:
    """Rising atomic numbers of symbols and numbers."""
    if species is None:
        return None
    if isinstance(species, str):
        raise ConfigurationError(f"species must be a sequence such as ('Ti', 'O'), got the text '{species}'")
    for name in species:
        if isinstance(name, str) and name not in NUMBERS:
            raise ConfigurationError(f"'{name}' is no chemical symbol.{nearest(name, NUMBERS)}")
    return tuple(sorted({NUMBERS[name] if isinstance(name, str) else int(name) for name in species}))


def _check_whole(descriptor: SOAP | FCHL19 | LocalDensity) -> None:
    """Raises ConfigurationError for a count that is no whole number."""
    for field in fields(descriptor):
        value = getattr(descriptor, field.name)
        if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
            raise ConfigurationError(f"{field.name} must be a whole number, but {value!r} came")


def _size(descriptor: SOAP | FCHL19) -> int:
    if descriptor.species is None:
        raise ConfigurationError("without species the number of features depends on the structures; give species=...")
    return descriptor.bind().size


def _species(species: Any, numbers: ArrayLike) -> tuple[int, ...]:
    found = species if species is not None else np.unique(np.asarray(numbers))
    if len(found) == 0:
        raise ConfigurationError("a descriptor of atoms needs at least one atom, or species, but the batch is empty")
    return tuple(int(number) for number in found)


@lru_cache(maxsize=64)
def _bind_soap(species: tuple[int, ...], settings: tuple[tuple[str, Any], ...]) -> _core.Soap:
    return _core.Soap(np.array(species, np.int32), **dict(settings))


@lru_cache(maxsize=64)
def _bind_fchl19(species: tuple[int, ...], settings: tuple[tuple[str, Any], ...]) -> _core.Fchl19:
    return _core.Fchl19(np.array(species, np.int32), **dict(settings))
