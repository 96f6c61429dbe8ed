"""
Twins of the kernels for CUDA devices. Arrays with __cuda_array_interface__ (CuPy, PyTorch, DeviceArray) are read where they lie, others are copied to the device; results are DeviceArray. Work is on the default stream. Without CUDA every call raises BackendUnavailable.
"""

from __future__ import annotations

import typing

import numpy
import numpy.typing
import thalweg._core

__all__: list[str] = [
    "Batch",
    "DeviceArray",
    "Gpr",
    "available",
    "backend",
    "contract",
    "evaluate",
    "gram",
    "relax",
    "require",
    "to_device",
    "to_host",
    "values",
]

class DeviceArray:
    def to_host(self) -> numpy.typing.NDArray[typing.Any]:
        """
        A NumPy copy; waits for the device.
        """
    @property
    def __cuda_array_interface__(self) -> dict: ...
    @property
    def shape(self) -> tuple: ...

class Batch:
    """
    A Batch copied to the device.
    """
    def __init__(self, batch: typing.Any) -> None: ...

class Gpr:
    """
    Twin of Gpr for values (no slopes); feature vectors are on the device.
    """
    def __init__(self, features: int, kernel: thalweg._core.Kernel) -> None: ...
    def append(self, feature: typing.Any, target: float) -> None: ...
    def fit(self, features: typing.Any, targets: typing.Annotated[numpy.typing.ArrayLike, numpy.float64]) -> None: ...
    def predict(self, features: typing.Any, kappa: float = 0.0, gradient: bool = False) -> tuple[DeviceArray, ...]:
        """
        mean (n,), sigma (n,); with gradient also d(mean - kappa sigma)/d features and d sigma/d features (n, D).
        """
    @property
    def mean(self) -> float: ...
    @property
    def size(self) -> int: ...

_Descriptor = thalweg._core.Fingerprint | thalweg._core.LocalDensity | thalweg._core.Soap

def available() -> bool:
    """
    Whether a call would run here.
    """

def backend() -> str:
    """
    "cuda", "emulated" (kernels run on the CPU: for tests) or "none".
    """

def contract(descriptor: _Descriptor, batch: typing.Any, weights: typing.Any) -> DeviceArray:
    """
    d(weights . features)/dx (m, 3) for weights (rows, size).
    """

def evaluate(landscape: thalweg._core.Landscape, batch: typing.Any) -> tuple[DeviceArray, DeviceArray]:
    """
    Energies (n,) [eV] and forces (m, 3) [eV/angstrom] of a built-in potential or prior. batch: cuda.Batch, or an object with the attributes of Batch, each on the device or not.
    """

def gram(kernel: thalweg._core.Kernel, features: typing.Any, jitter: float = 0.0) -> DeviceArray:
    """
    Lower triangle of the Gram matrix (n, n).
    """

def relax(
    landscape: thalweg._core.Landscape,
    batch: typing.Any,
    *,
    steps: int = 100,
    force_tolerance: float = 0.05,
    max_step: float = 0.2,
    memory: int = 10,
    first_curvature: float = 70.0,
    box: typing.Any = None,
) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
    """
    Twin of relax(): positions, energies, forces, evaluations, converged.
    """

def require() -> None:
    """
    Raises BackendUnavailable, with the way to get it, unless available().
    """

def to_device(array: numpy.typing.NDArray[typing.Any]) -> DeviceArray:
    """
    Copies a NumPy array to the device.
    """

def to_host(array: typing.Any) -> numpy.typing.NDArray[typing.Any]:
    """
    A NumPy copy of an array on the device; waits for it.
    """

def values(descriptor: _Descriptor, batch: typing.Any) -> DeviceArray:
    """
    Features (rows, size) as those of descriptor.values; NaN for a structure without features, such as one with a coordinate that is not finite.
    """
