"""CUDA twins: parity with the CPU where kernels can run (a device with CuPy, or an emulated build), refusal elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from thalweg import Batch, _core
from thalweg.errors import BackendUnavailable

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
    for call in (lambda: cuda.to_device(np.zeros(3)), lambda: cuda.Batch(batch()), lambda: cuda.Gpr(3, _core.Kernel())):
        with pytest.raises(BackendUnavailable, match="THALWEG_CUDA=ON"):
            call()


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
    mean, sigma, _ = device.predict(cuda.to_device(new))
    wanted = host.predict(new)
    np.testing.assert_allclose(mean.to_host(), wanted[0], rtol=0, atol=1e-7)
    np.testing.assert_allclose(sigma.to_host(), wanted[1], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="to_device"):
        device.predict(new)


@needs_device
def test_cupy_arrays_are_taken_without_copies():
    if cuda.backend() != "cuda":
        pytest.skip("an emulated build has no device memory that CuPy could hold")
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    b = batch()

    class OnDevice:
        positions, numbers = cupy.asarray(b.positions), cupy.asarray(b.numbers, dtype=np.int32)
        offsets, cells = cupy.asarray(b.offsets, dtype=np.int64), cupy.asarray(np.ascontiguousarray(b.cells))
        pbc, fixed = cupy.asarray(b.pbc), cupy.asarray(b.fixed)

    energies, _ = cuda.evaluate(_core.Emt(), OnDevice)
    np.testing.assert_allclose(cupy.asnumpy(cupy.asarray(energies)), _core.evaluate(_core.Emt(), b)[0], atol=1e-10)
