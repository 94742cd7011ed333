# SPDX-License-Identifier: MIT
"""The one registry of backends, and the choice among them.

``backend=`` per call takes precedence over the environment variable ``GRADSURGERY_BACKEND``, and that over the
automatic choice: the first backend of the list that serves the call's device and number of tasks. A named backend that
cannot serve the call raises an error.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .._compiling import cached
from .._extension import NativeSolver, Rule
from .._gradients import TaskGradients
from . import native, reference
from .triton import TritonBackend

_VARIABLE = "GRADSURGERY_BACKEND"


class Aggregate(Protocol):
    """Writes (or adds) the directions of a solver's weights.

    For the list form, which must come as ``lists``, it returns G [S, T, T] and the weights [S, T]; for the flat form,
    None.
    """

    def __call__(
        self, grads: TaskGradients, solver: NativeSolver, out: Tensor | list[Tensor], accumulate: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """Run all stages in one call."""


class Backend(Protocol):
    """The stages that touch gradients or G, each writing into an output that the caller allocated.

    Gram matrices [..., T, T] and weights [..., T] are float64 and contiguous. For ``gram`` and ``combine`` the leading
    dimension is that of the segments; a single segment needs none. The solvers take any leading dimensions.
    """

    name: str

    def why_not(self, device: torch.device, num_tasks: int) -> str | None:
        """Return why this backend cannot serve the call; None if it can."""

    def describe(self) -> str:
        """Return one line on whether the backend can be used here."""

    def gram(self, grads: TaskGradients, out: Tensor) -> None:
        """Write the Gram matrices [S, T, T] or [T, T]."""

    def combine(self, grads: TaskGradients, weights: Tensor, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write (or add) the directions under weights [S, T] or [T]; every parameter of the list form has one."""

    def combine_by_rule(self, grads: TaskGradients, rule: Rule, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write (or add) the direction of a rule; every parameter of the list form has one. Segments do not matter."""

    def task_order(self, seed: int, step: Tensor, out: Tensor) -> None:
        """Write the visiting orders [T, T]."""

    def random(self, gram: Tensor, seed: int, step: Tensor, out: Tensor) -> None:
        """Write random weights, the same for all problems but NaN where G is not finite, and add 1 to ``step``."""

    def pcgrad(
        self, gram: Tensor, order: Tensor | None, seed: int, step: Tensor, advance: bool, mean: bool, out: Tensor
    ) -> None:
        """Write PCGrad's weights; with ``advance`` add 1 to ``step``."""

    def min_norm(self, gram: Tensor, exact: bool, max_iter: int, tol: float, out: Tensor) -> None:
        """Write the min-norm weights."""

    def weights(
        self, gram: Tensor, solver: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor
    ) -> None:
        """Write the weights of one of ``solvers.SOLVERS``; ``preference`` is float64 [T]."""

    def simplex_steps(self, matrix: Tensor, lr: float, momentum: float, num_iter: int, weights: Tensor) -> None:
        """Move weights on the simplex by ``num_iter`` steps; NaN where a matrix is not finite."""

    def gradvac(self, gram: Tensor, order: Tensor, beta: float, targets: Tensor, out: Tensor) -> None:
        """Write Gradient Vaccine's weights, and move its targets [..., T, T]."""

    def gradnorm(self, inputs: Sequence[Tensor], alpha: float, lr: float, out: Tensor) -> None:
        """Write GradNorm's new weights from (weights, norms, losses, initial losses)."""

    def gradnorm_step(
        self, gram: Tensor, losses: Tensor, alpha: float, lr: float, state: tuple[Tensor, Tensor], out: Tensor
    ) -> None:
        """Write the weights of the state (weights, initial losses), and update the state."""

    @property
    def aggregate(self) -> Aggregate | None:
        """All stages in one call; None where a backend has no such call."""


_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (native.CudaBackend(), native.CpuBackend(), TritonBackend(), reference.ReferenceBackend())
}


def choose(name: str | None, device: torch.device, num_tasks: int) -> Backend:
    """Return the backend for a call; RuntimeError if the named one or none can serve it, ValueError for other names."""
    origin, name = ("backend", name) if name is not None else (_VARIABLE, os.environ.get(_VARIABLE) or None)
    if name is not None:
        check_name(name, origin)
        why = _BACKENDS[name].why_not(device, num_tasks)
        if why:
            raise RuntimeError(f"backend {name!r} cannot serve this call: {why}")
        return _BACKENDS[name]
    return _automatic(device, num_tasks)


def check_name(name: str | None, origin: str = "backend") -> str | None:
    """Return the name, or None for the automatic choice; ValueError if there is no backend of that name."""
    if name is not None and name not in _BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(_BACKENDS)}, got {name!r}")
    return name


@cached
def _automatic(device: torch.device, num_tasks: int) -> Backend:
    why: str | None = None
    for backend in _BACKENDS.values():
        why = backend.why_not(device, num_tasks)
        if why is None:
            return backend
    raise RuntimeError(f"no backend can serve tensors on {device}: {why}")


def backends() -> dict[str, str]:
    """Return every backend's name with why it can or cannot be used here, in the automatic choice's order."""
    return {name: backend.describe() for name, backend in _BACKENDS.items()}
