"""CUDA twins: parity with the CPU where kernels can run (a device with CuPy, or an emulated build), refusal elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from thalweg import Batch, _core, kernels
from thalweg.descriptors import FCHL19, SOAP, Fingerprint, LocalDensity
from thalweg.errors import BackendUnavailable, ConfigurationError

cuda = _core.cuda


def batch() -> Batch:
    rng = np.random.default_rng(5)
    sizes = [4, 7, 5]
    m = sum(sizes)
    grid = np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    return Batch(
        positions=np.concatenate([2.6 * grid[:n] + 0.3 * rng.random((n, 3)) for n in sizes]),
        numbers=np.array([79, 28] * m)[:m],
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        cells=np.broadcast_to(9.0 * np.eye(3), (3, 3, 3)),
        pbc=np.array([[False] * 3, [True, True, False], [False] * 3]),
        fixed=np.zeros((m, 3), dtype=bool),
        columns={},
        atom_columns={},
    )


needs_device = pytest.mark.skipif(
    not cuda.available(), reason=f"no CUDA device answers here (backend of this build: {cuda.backend()})"
)


@pytest.mark.skipif(cuda.backend() != "none", reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_how_to_get_it():
    assert not cuda.available()
    b = batch()
    arrays = (b.positions, b.numbers, b.cells, b.pbc)
    for call in (
        lambda: cuda.to_device(np.zeros(3)),
        lambda: cuda.Batch(b),
        lambda: cuda.Gpr(3, _core.Kernel()),
        lambda: kernels.soap(*arrays, b.offsets, device="cuda"),
        lambda: kernels.gpr_fit(np.zeros((3, 2)), np.zeros(3), device="cuda"),
        lambda: kernels.evaluate("emt", *arrays, b.offsets, device="cuda"),
        lambda: LocalDensity().values(b, device="cuda"),
    ):
        with pytest.raises(BackendUnavailable, match="THALWEG_CUDA=ON"):
            call()


def test_what_has_no_twin_says_so():
    b = batch()
    arrays = (b.positions, b.numbers, b.cells, b.pbc)
    for name in ("fingerprint_jacobian", "soap_jacobian", "local_density_jacobian", "fchl19", "fchl19_jacobian"):
        with pytest.raises(ConfigurationError, match=f"{name} has no twin on a device"):
            getattr(kernels, name)(*arrays, b.offsets, device="cuda")
    for call in (
        lambda: FCHL19().values(b, device="cuda"),
        lambda: FCHL19().contract(b, np.zeros((16, 168)), device="cuda"),
        lambda: kernels.fchl19_gradient(*arrays, np.zeros((16, 168)), b.offsets, device="cuda"),
    ):
        with pytest.raises(ConfigurationError, match=r"(?i)fchl19\w* has no twin on a device"):
            call()
    with pytest.raises(ConfigurationError, match="neighbor_pairs has no twin"):
        kernels.neighbor_pairs(b.positions, b.cells[0], False, 4.0, device="cuda")


@needs_device
def test_evaluate_and_relax_agree():
    b = batch()
    on_device = cuda.Batch(b)
    energies, forces = cuda.evaluate(_core.Emt(), on_device)
    expected = _core.evaluate(_core.Emt(), b)
    np.testing.assert_allclose(energies.to_host(), expected[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(forces.to_host(), expected[1], rtol=0, atol=1e-9)
    relaxed = [x.to_host() for x in cuda.relax(_core.Emt(), on_device, steps=15)]
    for came, wanted in zip(relaxed, _core.relax(_core.Emt(), b, steps=15), strict=True):
        np.testing.assert_allclose(came, wanted, rtol=0, atol=1e-6)


@needs_device
def test_gpr_agrees():
    rng = np.random.default_rng(1)
    x, y, new = rng.normal(size=(20, 6)), rng.normal(size=20), rng.normal(size=(5, 6))
    host, device = _core.Gpr(6, _core.Kernel()), cuda.Gpr(6, _core.Kernel())
    host.fit(x, y)
    device.fit(cuda.to_device(x), y)
    for came, wanted in zip(
        device.predict(new, kappa=0.7, gradient=True), host.predict(new, kappa=0.7, gradient=True), strict=True
    ):
        np.testing.assert_allclose(came.to_host(), wanted, rtol=0, atol=1e-6)
    assert len(device.predict(new)) == 2
    with pytest.raises(ValueError, match="features must be of type <f8, but it is <i4"):
        device.predict(cuda.to_device(np.zeros((5, 6), np.int32)))


SETTINGS = {
    "soap": (SOAP, {"r_cut": 3.0, "n_max": 3, "l_max": 2}),
    "local_density": (LocalDensity, {"decay": 1.5, "cutoff": 5.0}),
    "fingerprint": (Fingerprint, {"cutoff_radial": 5.0}),
}


def alike() -> Batch:
    """Structures of one composition, as fingerprints need them."""
    rng = np.random.default_rng(3)
    first = batch()[0]
    return Batch.concat([first.with_positions(first.positions + rng.normal(0, 0.1, (4, 3))) for _ in range(3)])


def arrays_of(b: Batch, convert) -> dict:
    """Arrays of a batch in the types that kernels take on a device."""
    types = {"positions": float, "numbers": np.int32, "cells": float, "pbc": bool, "offsets": np.int64}
    return {name: convert(np.ascontiguousarray(getattr(b, name), dtype)) for name, dtype in types.items()}


def agrees_with_the_cpu(name: str, convert, fetch) -> None:
    """Values and forces of one descriptor, arrays converted to the device's, results fetched from there."""
    kind, settings = SETTINGS[name]
    b = alike()
    values = kind(**settings).values(b)
    weights = np.random.default_rng(4).normal(size=values.shape)
    arrays = arrays_of(b, convert)
    found = getattr(kernels, name)(**arrays, device="cuda", **settings)
    assert found.shape == values.shape
    np.testing.assert_allclose(fetch(found), values, rtol=0, atol=1e-10 * np.abs(values).max())
    gradient = kind(**settings).contract(b, weights)
    found = getattr(kernels, f"{name}_gradient")(**arrays, weights=convert(weights), device="cuda", **settings)
    np.testing.assert_allclose(fetch(found), gradient, rtol=0, atol=1e-9 * np.abs(gradient).max())


@needs_device
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("on_device", [False, True])
def test_descriptors_agree(name, on_device):
    agrees_with_the_cpu(name, cuda.to_device if on_device else np.asarray, cuda.to_host)


@needs_device
def test_descriptors_take_batches_and_averages():
    b = batch()
    soap = SOAP(3.0, 3, 2, average="mean")
    weights = np.random.default_rng(4).normal(size=soap.values(b).shape)
    np.testing.assert_allclose(soap.values(b, device="cuda").to_host(), soap.values(b), rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        soap.contract(b, weights, device="cuda").to_host(), soap.contract(b, weights), rtol=0, atol=1e-8
    )
    lost = b.with_positions(np.where(np.arange(len(b.positions))[:, None] == 1, np.nan, b.positions))
    found = LocalDensity().values(lost, device="cuda").to_host()
    assert np.isnan(found[:4]).all() and np.isfinite(found[4:]).all()
    with pytest.raises(ConfigurationError, match="SOAP was made for H"):
        SOAP(species=["H"]).values(b, device="cuda")


@needs_device
def test_landscapes_and_processes_agree_by_kernels():
    b = batch()
    arrays = (b.positions, b.numbers, b.cells, b.pbc, b.offsets)
    for call, settings in [(kernels.evaluate, {}), (kernels.relax, {"steps": 8})]:
        for came, wanted in zip(
            call("emt", *arrays, **settings, device="cuda"), call("emt", *arrays, **settings), strict=True
        ):
            np.testing.assert_allclose(came.to_host(), wanted, rtol=0, atol=1e-6)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=20)
    host, device = (kernels.gpr_fit(x, y, noise=0.01, device=where) for where in ("cpu", "cuda"))
    for came, wanted in zip(
        kernels.gpr_predict(device, cuda.to_device(x), gradient=True, device="cuda"),
        kernels.gpr_predict(host, x, gradient=True),
        strict=True,
    ):
        np.testing.assert_allclose(came.to_host(), wanted, rtol=0, atol=1e-6)
    with pytest.raises(ConfigurationError, match="not fitted with device='cuda'"):
        kernels.gpr_predict(host, x, device="cuda")
    with pytest.raises(ConfigurationError, match="optimise=True has no twin"):
        kernels.gpr_fit(x, y, optimise=True, device="cuda")


@needs_device
def test_arrays_on_the_device_are_checked():
    b = alike()
    good = arrays_of(b, cuda.to_device)
    for change, words in [
        ({"numbers": cuda.to_device(b.numbers.astype(np.int64))}, "numbers must be of type <i4, but it is <i8"),
        ({"cells": cuda.to_device(np.eye(3))}, r"cells must have shape \(3, 3, 3\), got \(3, 3\)"),
        ({"offsets": cuda.to_device(np.array([0, 4, 2, 12]))}, "offsets"),
        ({"device": "cpu"}, "positions must lie in the memory of the CPU, got DeviceArray on a device"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            kernels.soap(**{"device": "cuda", **good, **change})
    with pytest.raises(ConfigurationError, match="only an array on the device"):
        cuda.to_host(np.zeros(3))


def test_cupy_arrays_go_in_and_out_without_copies():
    if cuda.backend() != "cuda" or not cuda.available():
        pytest.skip(f"CuPy needs a CUDA device that answers (backend of this build: {cuda.backend()})")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    for name in SETTINGS:
        agrees_with_the_cpu(name, cupy.asarray, lambda found: cupy.asnumpy(cupy.asarray(found)))
    b = batch()
    energies, _ = kernels.evaluate("emt", **arrays_of(b, cupy.asarray), device="cuda")
    np.testing.assert_allclose(cupy.asnumpy(cupy.asarray(energies)), _core.evaluate(_core.Emt(), b)[0], atol=1e-10)
    assert cupy.asarray(energies).data.ptr == energies.__cuda_array_interface__["data"][0]


def test_tensors_of_pytorch_go_in_and_out_without_copies():
    if cuda.backend() != "cuda" or not cuda.available():
        pytest.skip(f"PyTorch needs a CUDA device that answers (backend of this build: {cuda.backend()})")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch is built without CUDA")
    for name in SETTINGS:
        agrees_with_the_cpu(
            name,
            lambda array: torch.from_numpy(array.copy()).cuda(),
            lambda found: torch.as_tensor(found, device="cuda").cpu().numpy(),
        )
