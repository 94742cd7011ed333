# SPDX-License-Identifier: MIT
"""Loss weights that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import Method, check_not_capturing, nan_unless_finite


class Constant(Method):
    """w_t as given: linear scalarisation, ``sum(w_t * loss_t).backward()``, the heads included. No state.

    Args:
        task_weights: T finite numbers, of any sign. None: 1 for each task.
    """

    name = "constant"
    weights_losses = True

    def __init__(self, task_weights: Sequence[float] | Tensor | None = None) -> None:
        self._weights: Tensor | None = None
        if task_weights is not None:
            self._weights = torch.as_tensor(task_weights, dtype=torch.float64).detach().clone()
            if self._weights.dim() != 1 or not self._weights.isfinite().all():
                raise ValueError(f"task_weights must be T finite numbers, got {task_weights!r}")

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the given weights for each problem, NaN where G is not finite."""
        if self._weights is None:
            return nan_unless_finite(torch.ones_like(gram[..., 0]), gram)
        if len(self._weights) != gram.shape[-1]:
            raise ValueError(
                f"task_weights must hold one number for each of {gram.shape[-1]} tasks, got {len(self._weights)}"
            )
        if self._weights.device != gram.device:
            check_not_capturing(self.name, gram.device)
            self._weights = self._weights.to(gram.device)  # once: a copy from the host waits
        return nan_unless_finite(self._weights, gram)
