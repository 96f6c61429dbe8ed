"""The kernels for other programs: plain arrays in, plain arrays out, no objects of thalweg needed.

    from thalweg import kernels

    features = kernels.soap(positions, numbers, cells, pbc, offsets, r_cut=6.0, n_max=6, l_max=4)
    gradient = kernels.soap_gradient(positions, numbers, cells, pbc, weights, offsets, r_cut=6.0, n_max=6, l_max=4)

n structures of m atoms together are given as everywhere in thalweg:

    positions (m, 3)     angstrom
    numbers   (m,)       atomic numbers
    cells     (n, 3, 3)  angstrom, rows are lattice vectors; (3, 3): the same for all
    pbc       (n, 3)     bool; (3,) or one bool: the same for all
    offsets   (n + 1,)   structure i owns atoms offsets[i] : offsets[i + 1]; None: all atoms are one structure

Arrays may be NumPy's or anything with DLPack on the CPU (tensors of PyTorch, JAX, ...); float64 positions, int32 numbers
and int64 offsets in C order are used where they lie, others are copied. Results are new NumPy arrays, which
`torch.from_numpy` takes without a copy. `threads=0` takes what affinity and cgroups leave, and results do not depend on
it. What is wrong raises ConfigurationError (a ValueError): what was expected, what came.

`device="cuda"` (docs/cuda.md): each array may also lie on the device (CuPy, PyTorch, anything with
`__cuda_array_interface__`; float64 positions, int32 numbers, int64 offsets, bool pbc, full shapes), where it is read without
a copy. Results are `_core.cuda.DeviceArray`s: CuPy and PyTorch take them without a copy, `to_host()` makes NumPy's.
Jacobians, pairs, `optimise` and FCHL19 have no twin there and raise ConfigurationError. Raises BackendUnavailable where this
installation has no kernels for devices (with the way to get them), or where no device answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thalweg import _core
from thalweg.descriptors import (
    DLPACK_CPU,
    FCHL19,
    SOAP,
    Fingerprint,
    LocalDensity,
    Result,
    device_face,
    no_twin,
    on_host,
    wants_device,
)
from thalweg.errors import ConfigurationError

__all__ = [
    "NeighborList",
    "evaluate",
    "fchl19",
    "fchl19_gradient",
    "fchl19_jacobian",
    "fingerprint",
    "fingerprint_gradient",
    "fingerprint_jacobian",
    "gpr_fit",
    "gpr_predict",
    "local_density",
    "local_density_gradient",
    "local_density_jacobian",
    "neighbor_pairs",
    "relax",
    "soap",
    "soap_gradient",
    "soap_jacobian",
]

Floats = NDArray[np.float64]
_LANDSCAPES = {"emt": _core.Emt, "lj": _core.LennardJones}


# ---- descriptors -------------------------------------------------------------------------------------------------


def fingerprint(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Result:  # fmt: skip
    """Fingerprints (n, D) of structures of one composition; settings: those of `descriptors.Fingerprint`."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(Fingerprint, settings).values(batch, threads, device)


def fingerprint_gradient(
    positions: Any, numbers: Any, cells: Any, pbc: Any, weights: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Result:  # fmt: skip
    """d(weights . fingerprint)/dx (m, 3) [1/angstrom] for weights (n, D), without the Jacobian."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(Fingerprint, settings).contract(
        batch, _array("weights", weights, np.float64, 2, device), threads, device
    )


def fingerprint_jacobian(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Floats:  # fmt: skip
    """d fingerprint/dx (m, 3, D) [1/angstrom]."""
    no_twin("fingerprint_jacobian", device)
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(Fingerprint, settings).jacobian(batch, threads)


def soap(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Result:  # fmt: skip
    """SOAP of every atom (m, D), or (n, D) with average="mean" or "sum"; settings: those of `descriptors.SOAP`."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(SOAP, settings).values(batch, threads, device)


def soap_gradient(
    positions: Any, numbers: Any, cells: Any, pbc: Any, weights: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Result:  # fmt: skip
    """d(weights . SOAP)/dx (m, 3) [1/angstrom] for weights of the shape of `soap`, without the Jacobian."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(SOAP, settings).contract(batch, _array("weights", weights, np.float64, 2, device), threads, device)


def soap_jacobian(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> list[Floats]:  # fmt: skip
    """Of each structure d(SOAP of an atom)/d(position of an atom) (n_i, n_i, 3, D) [1/angstrom]."""
    no_twin("soap_jacobian", device)
    return _settings(SOAP, settings).jacobian(_structures(positions, numbers, cells, pbc, offsets, device), threads)


def fchl19(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Floats:  # fmt: skip
    """FCHL19 of every atom (m, D); settings: those of `descriptors.FCHL19`."""
    no_twin("fchl19", device)
    return _settings(FCHL19, settings).values(_structures(positions, numbers, cells, pbc, offsets, device), threads)


def fchl19_gradient(
    positions: Any, numbers: Any, cells: Any, pbc: Any, weights: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Floats:  # fmt: skip
    """d(weights . FCHL19)/dx (m, 3) [1/angstrom] for weights (m, D), without the Jacobian."""
    no_twin("fchl19_gradient", device)
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(FCHL19, settings).contract(batch, _array("weights", weights, np.float64, 2), threads)


def fchl19_jacobian(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> list[Floats]:  # fmt: skip
    """Of each structure d(FCHL19 of an atom)/d(position of an atom) (n_i, n_i, 3, D) [1/angstrom]."""
    no_twin("fchl19_jacobian", device)
    return _settings(FCHL19, settings).jacobian(_structures(positions, numbers, cells, pbc, offsets, device), threads)


def local_density(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Result:  # fmt: skip
    """Local density of every atom (m, species + 1); settings: those of `descriptors.LocalDensity`."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(LocalDensity, settings).values(batch, threads, device)


def local_density_gradient(
    positions: Any, numbers: Any, cells: Any, pbc: Any, weights: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> Result:  # fmt: skip
    """d(weights . local density)/dx (m, 3) [1/angstrom] for weights (m, species + 1)."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(LocalDensity, settings).contract(
        batch, _array("weights", weights, np.float64, 2, device), threads, device
    )


def local_density_jacobian(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu", **settings: Any,
) -> list[Floats]:  # fmt: skip
    """Of each structure d(local density of an atom)/d(position of an atom) (n_i, n_i, 3, D) [1/angstrom]."""
    no_twin("local_density_jacobian", device)
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    return _settings(LocalDensity, settings).jacobian(batch, threads)


def neighbor_pairs(
    positions: Any, cell: Any, pbc: Any, cutoff: float, *, device: str = "cpu"
) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats, Floats]:
    """Every pair (i, j, image) of one structure within cutoff [angstrom], once.

    i (p,), j (p,), d (p, 3) = r_j + image - r_i and its length r (p,), in angstrom.
    """
    no_twin("neighbor_pairs", device)
    positions = _array("positions", positions, np.float64, 2)
    batch = _structures(positions, np.ones(len(positions), np.int32), cell, pbc, None, device)
    return _core.neighbor_pairs(batch, cutoff)


class NeighborList:
    """`neighbor_pairs` of a structure that moves: pairs are looked for anew only when an atom has moved by more than
    skin / 2 [angstrom] since the last time, or cell, pbc or the number of atoms have changed; else only distances are.
    """

    def __init__(self, cutoff: float, *, skin: float = 0.5):
        self._list = _core.NeighborList(cutoff, skin)

    def update(
        self, positions: Any, cell: Any, pbc: Any
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], Floats, Floats]:
        """i, j, d, r as of `neighbor_pairs`, in new arrays."""
        positions = _array("positions", positions, np.float64, 2)
        batch = _structures(positions, np.ones(len(positions), np.int32), cell, pbc, None, "cpu")
        return self._list.update(batch)

    @property
    def rebuilds(self) -> int:
        """How often pairs were looked for anew."""
        return self._list.rebuilds


# ---- Gaussian process --------------------------------------------------------------------------------------------


def gpr_fit(
    features: Any, targets: Any, *, amplitude: float = 100.0, length_long: float = 10.0, length_short: float = 2.0,
    weight_long: float = 0.99, weight_short: float = 0.01, noise: float = 1e-5, optimise: bool = False,
    threads: int = 0, device: str = "cpu",
) -> _core.Gpr | _core.cuda.Gpr:  # fmt: skip
    """A Gaussian process that has learned targets (n,) [eV] at features (n, D), for `gpr_predict`.

    Kernel: amplitude (weight_long exp(-d^2 / 2 length_long^2) + weight_short exp(-d^2 / 2 length_short^2)) [eV^2]; noise:
    a variance [eV^2]. optimise: maximise the marginal likelihood from there.
    """
    if optimise:
        no_twin("optimise=True", device)
    on_device = wants_device(device)
    features = _array("features", features, np.float64, 2, device)
    targets = on_host(_array("targets", targets, np.float64, 1, device))
    rows, length = _shape(features)
    if rows != len(targets):
        raise ConfigurationError(f"targets must have shape ({rows},), one for each row of features, got "
                                 f"{targets.shape}")  # fmt: skip
    kernel = _core.Kernel(
        amplitude=amplitude, length_long=length_long, length_short=length_short,
        weight_long=weight_long, weight_short=weight_short, noise=noise,
    )  # fmt: skip
    if on_device:
        on_gpu = _core.cuda.Gpr(length, kernel)
        on_gpu.fit(features, targets)
        return on_gpu
    gpr = _core.Gpr(length, kernel)
    gpr.fit(features, targets, threads=threads or _core.default_threads())
    if optimise:
        gpr.optimise()
    return gpr


def gpr_predict(
    gpr: _core.Gpr | _core.cuda.Gpr, features: Any, *, kappa: float = 0.0, gradient: bool = False, device: str = "cpu"
) -> tuple[Result, ...]:
    """Mean (k,) and sigma (k,) [eV] at features (k, D).

    gradient: also d(mean - kappa sigma)/dfeatures and d sigma/dfeatures (k, D), which `soap_gradient` or
    `fingerprint_gradient` turn into minus the forces.
    """
    if isinstance(gpr, _core.cuda.Gpr) != wants_device(device):
        raise ConfigurationError(
            f"this Gaussian process was not fitted with device='{device}'; predict where it was fitted"
        )
    return gpr.predict(_array("features", features, np.float64, 2, device), kappa=kappa, gradient=gradient)


# ---- landscapes --------------------------------------------------------------------------------------------------


def evaluate(
    landscape: Any, positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *,
    threads: int = 0, device: str = "cpu",
) -> tuple[Result, Result]:  # fmt: skip
    """Energies (n,) [eV] and forces (m, 3) [eV/angstrom] on "emt", "lj" or any landscape of the compiled core."""
    batch = _structures(positions, numbers, cells, pbc, offsets, device)
    if wants_device(device):
        return _core.cuda.evaluate(_landscape(landscape), batch)
    return _core.evaluate(_landscape(landscape), batch, threads=threads)


def relax(
    landscape: Any, positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any = None, *, fixed: Any = None,
    steps: int = 100, force_tolerance: float = 0.05, max_step: float = 0.2, threads: int = 0, device: str = "cpu",
) -> tuple[Result, Result, Result, Result, Result]:  # fmt: skip
    """Relaxes every structure with L-BFGS, each on its own: the result depends neither on the batch nor on threads.

    fixed: (m, 3) bool, coordinates that do not move. steps: evaluations of each structure beyond the first;
    force_tolerance [eV/angstrom]: largest force on a free atom; max_step [angstrom].
    Returns positions (m, 3), energies (n,), forces (m, 3), evaluations (n,) int32 and converged (n,) bool.
    """
    batch = _structures(positions, numbers, cells, pbc, offsets, device, fixed)
    settings: dict[str, Any] = {"steps": steps, "force_tolerance": force_tolerance, "max_step": max_step}
    if wants_device(device):
        return _core.cuda.relax(_landscape(landscape), batch, **settings)
    return _core.relax(_landscape(landscape), batch, **settings, threads=threads)


# ---- arrays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Structures:
    """The arrays of `records.Batch`, checked; with device="cuda" each NumPy's or on the device."""

    positions: Any
    numbers: Any
    offsets: Any
    cells: Any
    pbc: Any
    fixed: Any


def _structures(
    positions: Any, numbers: Any, cells: Any, pbc: Any, offsets: Any, device: str, fixed: Any = None
) -> _Structures:
    wants_device(device)
    positions = _array("positions", positions, np.float64, 2, device)
    m = _shape(positions)[0]
    _expect("positions", positions, (m, 3))
    numbers = _array("numbers", numbers, np.int32, 1, device)
    _expect("numbers", numbers, (m,))
    offsets = np.array([0, m], np.int64) if offsets is None else _array("offsets", offsets, np.int64, 1, device)
    if _shape(offsets)[0] < 1 or (
        isinstance(offsets, np.ndarray) and (offsets[0] != 0 or offsets[-1] != m or np.any(np.diff(offsets) < 0))
    ):
        raise ConfigurationError(f"offsets must rise from 0 to {m}, the number of atoms, got {offsets}")
    n = _shape(offsets)[0] - 1
    cells = _array("cells", cells, np.float64, None, device)
    pbc = _array("pbc", pbc, np.bool_, None, device)
    if isinstance(cells, np.ndarray) and cells.shape == (3, 3):
        cells = np.ascontiguousarray(np.broadcast_to(cells, (n, 3, 3)))
    if isinstance(pbc, np.ndarray) and pbc.shape in ((), (3,)):
        pbc = np.ascontiguousarray(np.broadcast_to(pbc, (n, 3)))
    _expect("cells", cells, (n, 3, 3))
    _expect("pbc", pbc, (n, 3))
    fixed = np.zeros((m, 3), np.bool_) if fixed is None else _array("fixed", fixed, np.bool_, 2, device)
    _expect("fixed", fixed, (m, 3))
    return _Structures(positions, numbers, offsets, cells, pbc, fixed)


def _array(name: str, value: Any, dtype: Any, dimensions: int | None, device: str = "cpu") -> Any:
    """A NumPy array in C order, without a copy where dtype and order are right already; or what lies on the device."""
    face = device_face(value)
    if face is not None:
        if device == "cpu":
            raise ConfigurationError(f"{name} must lie in the memory of the CPU, got {type(value).__name__} on a device; "
                                     "copy it, or give device='cuda'")  # fmt: skip
        if dimensions is not None and len(face["shape"]) != dimensions:
            raise ConfigurationError(f"{name} must have {dimensions} dimension(s), got shape {tuple(face['shape'])}")
        return value  # the core checks its type
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack_device__"):
        if value.__dlpack_device__()[0] != DLPACK_CPU:
            raise ConfigurationError(f"{name} must lie in the memory of the CPU, got {type(value).__name__} on device "
                                     f"{value.__dlpack_device__()}")  # fmt: skip
        try:
            value = np.from_dlpack(value)
        except (TypeError, ValueError, RuntimeError, BufferError) as problem:
            raise ConfigurationError(f"{name} cannot be read as an array: {problem}") from problem
    try:
        found = np.asarray(value)
    except ValueError as problem:
        raise ConfigurationError(f"{name} must be an array of numbers: {problem}") from problem
    if not np.can_cast(found.dtype, dtype, "same_kind") and not (dtype == np.bool_ and found.dtype.kind in "iu"):
        raise ConfigurationError(f"{name} must hold {np.dtype(dtype).name}, got {found.dtype.name}")
    if dimensions is not None and found.ndim != dimensions:
        raise ConfigurationError(f"{name} must have {dimensions} dimension(s), got shape {found.shape}")
    return np.ascontiguousarray(found, dtype=dtype) if found.ndim else np.asarray(found, dtype=dtype)


def _expect(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if _shape(array) != shape:
        raise ConfigurationError(f"{name} must have shape {shape}, got {_shape(array)}")


def _shape(array: Any) -> tuple[int, ...]:
    face = device_face(array)
    return tuple(array.shape if face is None else face["shape"])


def _settings(kind: Any, settings: dict[str, Any]) -> Any:
    try:
        return kind(**settings)
    except TypeError:
        unknown = sorted(set(settings) - set(kind.__dataclass_fields__))
        known = [name for name in kind.__dataclass_fields__ if name != "_"]
        raise ConfigurationError(f"{kind.__name__} has no {unknown}; its settings are {known}") from None


def _landscape(landscape: Any) -> _core.Landscape:
    if isinstance(landscape, str):
        if landscape not in _LANDSCAPES:
            raise ConfigurationError(f"landscape must be one of {sorted(_LANDSCAPES)} or an object, got '{landscape}'")
        return _LANDSCAPES[landscape]()
    if not isinstance(landscape, _core.Landscape):
        raise ConfigurationError(f"a landscape of the compiled core was expected, got {type(landscape).__name__}")
    return landscape
