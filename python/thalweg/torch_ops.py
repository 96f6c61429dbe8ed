"""The compiled training step as an operator of PyTorch: `torch.ops.thalweg.q_values`, differentiable.

It is there when the package was built with it (`THALWEG_TORCH=1 pip install .`); `available()` tells. `Trainer` does not
need it: it calls the core directly. Use the operator inside losses and modules of one's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thalweg import _core
from thalweg.errors import ConfigurationError

__all__ = ["available", "q_values"]

# beside the compiled module: editable installs keep binaries and sources apart
_LIBRARY = Path(_core.__file__).parent / "_torch_ops.so"


def available() -> bool:
    """Whether the operators were built."""
    return _LIBRARY.is_file()


def q_values(
    parameters: Tensor, kernels: Tensor, shift: Tensor, placed: Tensor, offsets: Tensor, actions: Tensor,
    grid: list[int], periodic: list[bool], kernel: int, dilation: int = 1, *, slope: float = 0.01, threads: int = 1,
) -> Tensor:  # fmt: skip
    """Q (n,) of state-action pairs, with gradients for parameters, kernels and shift.

    parameters : (P,) float32, w_1 b_1 ... w_4 b_4 flat, as `Trainer.parameters` starts
    kernels, shift : (species, *window), (species,) float32, as `Trainer.weights()` has them
    placed, offsets, actions : as for `Trainer.step`; int32, int64, int32
    Raises ConfigurationError where the operators were not built, RuntimeError for arrays that do not fit.
    """
    if not available():
        raise ConfigurationError("the torch operators were not built; install with THALWEG_TORCH=1 pip install .")
    return torch.ops.thalweg.q_values(
        parameters, kernels, shift, placed, offsets, actions, list(grid), [int(p) for p in periodic], kernel, dilation,
        slope, threads,
    )  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _backward(ctx: Any, pull: Tensor) -> tuple[Tensor | None, ...]:
    image = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    found = torch.ops.thalweg.q_values_backward(pull, *ctx.saved_tensors, *ctx.rest, image)
    return (*found, *[None] * (3 + len(ctx.rest)))


def _register() -> None:
    torch.ops.load_library(str(_LIBRARY))

    @torch.library.register_fake("thalweg::q_values")
    def _(parameters: Tensor, kernels: Tensor, shift: Tensor, placed: Tensor, offsets: Tensor, actions: Tensor,
          *rest: Any) -> Tensor:  # fmt: skip
        return parameters.new_empty((actions.shape[0],))

    @torch.library.register_fake("thalweg::q_values_backward")
    def _(pull: Tensor, parameters: Tensor, kernels: Tensor, shift: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(parameters), torch.empty_like(kernels), torch.empty_like(shift)

    torch.library.register_autograd("thalweg::q_values", _backward, setup_context=_setup)


if available():
    _register()
