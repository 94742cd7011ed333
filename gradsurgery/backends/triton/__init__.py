# SPDX-License-Identifier: MIT
"""The Triton backend: kernels compiled at first use, without a C++ or CUDA compiler, for NVIDIA's GPUs and AMD's.

In Triton's interpreter (``TRITON_INTERPRET=1`` before Triton is imported) it serves tensors in host memory, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..._compiling import cached, untraced
from ..._gradients import TaskGradients
from ..native import why_not_gpu
from ..reference import ReferenceBackend
from ..solvers import solve

MAX_TASKS = 128
_OLDEST = (3, 6)


class TritonBackend(ReferenceBackend):
    """Kernels in Triton; what has no kernel runs on the reference backend, on the tensors' device.

    The launches are not traced: that would lose options that the solvers need (weights._SOLVER).
    """

    name = "triton"

    def why_not(self, device: torch.device, num_tasks: int) -> str | None:
        """Return why Triton cannot serve the call; None if it can."""
        if num_tasks > MAX_TASKS:
            return f"it takes at most {MAX_TASKS} tasks, got {num_tasks}"
        return _why_not_device(device)

    def describe(self) -> str:
        """Return one line on Triton."""
        device = torch.device("cpu" if _interpreted() else "cuda")
        return _why_not_device(device) or f"available: Triton kernels{', interpreted' if _interpreted() else ''}"

    @untraced
    def gram(self, grads: TaskGradients, out: Tensor) -> None:
        """Write the Gram matrices."""
        _launch().gram(grads, out)

    @untraced
    def combine(self, grads: TaskGradients, weights: Tensor, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write the directions."""
        _launch().combine(grads, weights, out, accumulate)

    @untraced
    def task_order(self, seed: int, step: Tensor, out: Tensor) -> None:
        """Write the visiting orders."""
        _weights().task_order(seed, step, out)

    @untraced
    def pcgrad(
        self, gram: Tensor, order: Tensor | None, seed: int, step: Tensor, advance: bool, mean: bool, out: Tensor
    ) -> None:
        """Write PCGrad's weights."""
        _weights().pcgrad(gram, order, seed, step, advance, mean, out)

    @untraced
    def random(self, gram: Tensor, seed: int, step: Tensor, out: Tensor) -> None:
        """Write random weights, and add 1 to ``step``."""
        _weights().random(gram, seed, step, out)

    @untraced
    def simplex_steps(self, matrix: Tensor, lr: float, momentum: float, num_iter: int, weights: Tensor) -> None:
        """Move the weights."""
        _weights().simplex_steps(matrix, lr, momentum, num_iter, weights)

    @untraced
    def min_norm(self, gram: Tensor, exact: bool, max_iter: int, tol: float, out: Tensor) -> None:
        """Write the min-norm weights."""
        _weights().min_norm(gram, exact, max_iter, tol, out)

    @untraced
    def weights(
        self, gram: Tensor, solver: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor
    ) -> None:
        """Write the weights of one of ``solvers.SOLVERS``."""
        if _weights().serves(solver, gram.shape[-1], gram.device):
            _weights().weights(gram, solver, preference, parameter, limit, out)
        else:
            solve(gram, solver, preference, parameter, limit, out)  # on the GPU; the reference would move G to the host

    @untraced
    def gradnorm(self, inputs: Sequence[Tensor], alpha: float, lr: float, out: Tensor) -> None:
        """Write GradNorm's new weights."""
        _weights().gradnorm(inputs, alpha, lr, out)

    @untraced
    def gradnorm_step(
        self, gram: Tensor, losses: Tensor, alpha: float, lr: float, state: tuple[Tensor, Tensor], out: Tensor
    ) -> None:
        """Write the state's weights, and advance the state."""
        _weights().gradnorm_step(gram, losses, alpha, lr, state, out)


@cached
def _launch() -> ModuleType:
    # Importing Triton takes longer than the rest of the package together.
    from . import launch

    return launch


@cached
def _weights() -> ModuleType:
    from . import weights

    return weights


@cached
def _why_not_device(device: torch.device) -> str | None:
    if device.type != "cuda" and not _interpreted():
        return f"the tensors are on {device}"
    try:
        found = version()
    except ImportError as error:
        return f"Triton is not there ({error})"
    if found < _OLDEST:
        return f"Triton must be {_OLDEST[0]}.{_OLDEST[1]} or later, got {found[0]}.{found[1]}"
    if _interpreted():
        return None if device.type == "cpu" else f"Triton interprets on the CPU only, and the tensors are on {device}"
    return why_not_gpu(device.index)


def version() -> tuple[int, int]:
    """Return Triton's version; ImportError without it."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
