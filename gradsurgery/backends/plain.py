# SPDX-License-Identifier: MIT
"""What backends without kernels of their own for it do in plain PyTorch, on the tensors' device."""

from __future__ import annotations

from torch import Tensor

from .._extension import Rule
from .._gradients import TaskGradients
from . import coordinate, solvers


class PlainStages:
    """Part of a backend."""

    def min_norm(self, gram: Tensor, exact: bool, max_iter: int, tol: float, out: Tensor) -> None:
        """Write the min-norm weights: the backend's own, which CAGrad takes many of."""
        raise NotImplementedError

    def weights(
        self, gram: Tensor, method: str, preference: Tensor | None, parameter: float, limit: float, out: Tensor
    ) -> None:
        """Write the weights of one of the methods of ``solvers.WEIGHTINGS``."""
        solvers.solve(gram, method, preference, parameter, limit, self.min_norm, out)

    def gradvac(self, gram: Tensor, order: Tensor, beta: float, targets: Tensor, out: Tensor) -> None:
        """Write Gradient Vaccine's weights, and move its targets."""
        solvers.gradvac(gram, order, beta, targets, out)

    def combine_rows(self, grads: TaskGradients, rule: Rule, out: Tensor | list[Tensor], accumulate: bool) -> None:
        """Write (or add) the direction of a rule that works coordinate by coordinate."""
        coordinate.combine_rows(grads, rule, out, accumulate)
