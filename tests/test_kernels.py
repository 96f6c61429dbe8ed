"""thalweg.kernels: the same numbers as the descriptors and landscapes, arrays of other libraries, clear errors."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from test_descriptors import batch_of, close, slab
from thalweg import _core, kernels
from thalweg.descriptors import FCHL19, SOAP, Fingerprint, LocalDensity
from thalweg.errors import ConfigurationError

SMALL = {"r_cut": 3.5, "n_max": 4, "l_max": 3}
FAMILIES = {
    "fingerprint": (Fingerprint(), {}),
    "soap": (SOAP(**SMALL), SMALL),
    "fchl19": (FCHL19(cutoff_triplets=4.0), {"cutoff_triplets": 4.0}),
    "local_density": (LocalDensity(decay=1.5), {"decay": 1.5}),
}


def two_slabs():
    other = slab()
    other.positions += np.random.default_rng(1).normal(0, 0.05, other.positions.shape)
    return batch_of(slab(), other)


@pytest.mark.parametrize("name", FAMILIES)
def test_descriptors(name):
    descriptor, settings = FAMILIES[name]
    batch = two_slabs()
    arrays = (batch.positions, batch.numbers, batch.cells, batch.pbc)
    values = getattr(kernels, name)(*arrays, batch.offsets, **settings)
    assert np.array_equal(values, descriptor.values(batch))
    weights = np.random.default_rng(2).normal(size=values.shape)
    gradient = getattr(kernels, f"{name}_gradient")(*arrays, weights, batch.offsets, threads=2, **settings)
    assert np.array_equal(gradient, descriptor.contract(batch, weights))
    jacobian = getattr(kernels, f"{name}_jacobian")(*arrays, batch.offsets, **settings)
    for ours, theirs in zip(jacobian, descriptor.jacobian(batch), strict=True):
        assert np.array_equal(ours, theirs)


def test_one_structure_and_shared_cells():
    a = slab()
    batch = two_slabs()
    one = kernels.soap(a.positions, a.numbers, np.array(a.cell), a.pbc, **SMALL)
    assert np.array_equal(one, SOAP(**SMALL).values(batch_of(a)))
    shared = kernels.soap(batch.positions, batch.numbers, np.array(a.cell), a.pbc, batch.offsets, **SMALL)
    assert np.array_equal(shared, SOAP(**SMALL).values(batch))


def test_torch_tensors_are_read_where_they_lie():
    torch = pytest.importorskip("torch")
    batch = two_slabs()
    wanted = SOAP(**SMALL).values(batch)
    tensors = [
        torch.from_numpy(np.ascontiguousarray(x)) for x in (batch.positions, batch.numbers, batch.cells, batch.pbc)
    ]
    assert np.array_equal(kernels.soap(*tensors, torch.from_numpy(batch.offsets), **SMALL), wanted)
    read = kernels._array("positions", tensors[0], np.float64, 2)
    assert read.ctypes.data == tensors[0].data_ptr()
    assert kernels._array("positions", batch.positions, np.float64, 2) is batch.positions
    single = kernels.soap(tensors[0].float(), *tensors[1:], torch.from_numpy(batch.offsets), **SMALL)
    close(single, wanted, 1e-5)
    with pytest.raises(ConfigurationError, match="positions cannot be read"):
        kernels.soap(tensors[0].clone().requires_grad_(), *tensors[1:], **SMALL)
    with pytest.raises(ConfigurationError, match="positions must lie in the memory of the CPU"):
        kernels.soap(_OnDevice(), *tensors[1:], **SMALL)


class _OnDevice:
    def __dlpack_device__(self):
        return (2, 0)


def test_a_gaussian_process_gives_forces():
    """mean(features(x)) by gpr_predict, its slope by gpr_predict and soap_gradient."""
    rng = np.random.default_rng(3)
    structures = [Atoms("Au3Ni", rng.uniform(0, 4, (4, 3))) for _ in range(8)]
    batch = batch_of(*structures)
    settings = {**SMALL, "average": "sum"}
    arrays = (batch.numbers, batch.cells, batch.pbc)
    features = kernels.soap(batch.positions, *arrays, batch.offsets, **settings)
    gpr = kernels.gpr_fit(features, rng.normal(size=8), length_long=50.0, length_short=10.0)
    mean, sigma, slope, _ = kernels.gpr_predict(gpr, features, gradient=True)
    assert mean.shape == sigma.shape == (8,)
    gradient = kernels.soap_gradient(batch.positions, *arrays, slope, batch.offsets, **settings)
    direction, h = rng.normal(size=batch.positions.shape), 1e-4
    at = [
        kernels.gpr_predict(
            gpr, kernels.soap(batch.positions + step * direction, *arrays, batch.offsets, **settings)
        )[0].sum()
        for step in (-h, h)
    ]  # fmt: skip
    assert (at[1] - at[0]) / (2 * h) == pytest.approx((gradient * direction).sum(), rel=1e-5)


def test_landscapes_and_pairs():
    a = Atoms("Au2", [[0, 0, 0], [0, 0, 3.1]])
    arrays = (a.positions, a.numbers, np.zeros((3, 3)), False)
    energy, forces = kernels.evaluate("emt", *arrays)
    assert energy.shape == (1,) and forces.shape == (2, 3)
    positions, lower, _, evaluations, converged = kernels.relax("emt", *arrays, force_tolerance=1e-3)
    assert converged[0] and lower[0] < energy[0] and evaluations[0] > 1
    held = np.ones((2, 3), bool)
    held[1, 2] = False
    assert kernels.relax(_core.Emt(), *arrays, fixed=held)[0][1, 2] == pytest.approx(
        positions[1, 2] - positions[0, 2], abs=0.05
    )
    i, j, d, r = kernels.neighbor_pairs(a.positions, np.zeros((3, 3)), [False] * 3, 4.0)
    assert (i, j) == (0, 1) and np.array_equal(d, [[0, 0, 3.1]]) and r == pytest.approx(3.1)

    following = kernels.NeighborList(4.0, skin=1.0)
    for lift in (0.0, 0.2, 0.4, 1.2):
        moved = a.positions + lift * np.eye(3)[[2, 2]] * [[0], [1]]
        for mine, new in zip(
            following.update(moved, np.zeros((3, 3)), False),
            kernels.neighbor_pairs(moved, np.zeros((3, 3)), False, 4.0),
            strict=True,
        ):
            assert np.array_equal(mine, new)
    assert following.rebuilds == 2
    with pytest.raises(ConfigurationError, match="cutoff of a neighbour list must be positive"):
        kernels.NeighborList(0.0)


def test_errors_say_what_came():
    a = slab()
    good = {"positions": a.positions, "numbers": a.numbers, "cells": np.array(a.cell), "pbc": a.pbc}
    for change, words in [
        ({"positions": a.positions[:, :2]}, r"positions must have shape \(\d, 3\), got \(\d, 2\)"),
        ({"positions": a.positions.ravel()}, r"positions must have 2 dimension\(s\)"),
        ({"positions": [["x"] * 3]}, "positions must hold float64"),
        ({"numbers": a.numbers[:-1]}, "numbers must have shape"),
        ({"numbers": a.numbers + 0.5}, "numbers must hold int32, got float64"),
        ({"cells": np.zeros((4, 3, 3))}, r"cells must have shape \(1, 3, 3\), got \(4, 3, 3\)"),
        ({"pbc": [True, False]}, "pbc must have shape"),
        ({"offsets": [0, 1]}, "offsets must rise from 0 to"),
        ({"colour": "red"}, r"SOAP has no \['colour'\]"),
        ({"device": "tpu"}, "device must be 'cpu' or 'cuda'"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            kernels.soap(**{**good, **change})
    with pytest.raises(ConfigurationError, match="weights must have"):
        kernels.soap_gradient(**good, weights=np.zeros((3, 3)))
    with pytest.raises(ConfigurationError, match="one of"):
        kernels.evaluate("vasp", **good)
    with pytest.raises(ConfigurationError, match="targets"):
        kernels.gpr_fit(np.zeros((3, 2)), np.zeros(4))
