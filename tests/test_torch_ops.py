"""The operators of libtorch's stable ABI, where they were built."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from thalweg import torch_ops  # noqa: E402
from thalweg.errors import ConfigurationError  # noqa: E402
from thalweg.networks import AGR, QNetwork, Trainer  # noqa: E402

built = pytest.mark.skipif(
    not torch_ops.available(), reason="the torch operators were not built (THALWEG_TORCH=1 pip install .)"
)
SHAPE, PERIODIC, KERNEL = (7, 8), [True, False], 3


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    trainer = Trainer(QNetwork(AGR(2, seed=1), kernel=KERNEL, initial="uniform", seed=1), SHAPE, PERIODIC)
    offsets = np.array([0, 2, 2, 5, 9])
    placed = np.stack([rng.integers(0, 2, 9), rng.integers(0, 56, 9)], 1).astype(np.int32)
    actions = np.stack([rng.integers(0, 2, 4), rng.integers(0, 56, 4)], 1).astype(np.int32)
    trainer.network.update_statistics(placed, offsets)
    weights = trainer.weights()
    parameters = trainer.parameters[: trainer.network.convolution_weights]
    arrays = [parameters, weights["kernels"], weights["shift"], placed, offsets, actions]
    return trainer, [torch.from_numpy(a.copy()) for a in arrays]


@built
def test_operator_is_the_network(arguments):
    trainer, tensors = arguments
    q = torch_ops.q_values(*tensors, SHAPE, PERIODIC, KERNEL)
    expected = trainer.network.q_of(*[t.numpy() for t in tensors[3:]])
    assert (q - expected).abs().max() < 1e-5


@built
def test_gradcheck(arguments):
    """In float32, so differences are coarse, and with a slope that makes the kinks of the ReLU mild; the core's own tests
    compare with float64 to 1e-5."""
    _, tensors = arguments

    def call(scale, kernels, shift):  # one scale per parameter would be 1500 evaluations
        parameters = tensors[0] * scale.float().repeat_interleave(-(-len(tensors[0]) // len(scale)))[: len(tensors[0])]
        return torch_ops.q_values(
            parameters, kernels.float(), shift.float(), *tensors[3:], SHAPE, PERIODIC, KERNEL, slope=0.8
        ).double()  # fmt: skip

    inputs = [torch.ones(20), tensors[1][:, 8:17, 8:17], tensors[2]]
    inputs = [t.double().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(call, inputs, eps=1e-3, atol=1e-3, rtol=1e-2)


@built
def test_opcheck(arguments):
    _, tensors = arguments
    for t in tensors[:3]:
        t.requires_grad_()
    rest = (list(SHAPE), [int(p) for p in PERIODIC], KERNEL, 1, 0.01, 1)
    torch.library.opcheck(torch.ops.thalweg.q_values.default, (*tensors, *rest))


@built
def test_wrong_input_is_told(arguments):
    _, tensors = arguments
    with pytest.raises(RuntimeError, match="placed must be int32"):
        torch_ops.q_values(*tensors[:3], tensors[3].long(), *tensors[4:], SHAPE, PERIODIC, KERNEL)
    with pytest.raises(RuntimeError, match="parameters must hold"):
        torch_ops.q_values(tensors[0][:-1], *tensors[1:], SHAPE, PERIODIC, KERNEL)


@pytest.mark.skipif(torch_ops.available(), reason="the torch operators were built")
def test_without_operators_the_build_is_named():
    with pytest.raises(ConfigurationError, match="THALWEG_TORCH=1"):
        torch_ops.q_values(*[None] * 6, SHAPE, PERIODIC, KERNEL)
