# SPDX-License-Identifier: MIT
"""Loss weights that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional import check_gram
from ._base import Method
from ._state import PerTask, nan_unless_finite


class Constant(Method):
    """w_t as given: linear scalarisation, ``sum(w_t * loss_t).backward()``, the heads included. No state.

    Args:
        task_weights: T finite numbers, of any sign. None: 1 for each task.
    """

    name = "constant"
    needs_gram = False
    weights_losses = True
    needs = "nothing"
    scale = "as given"
    linear = True

    def __init__(self, task_weights: Sequence[float] | Tensor | None = None) -> None:
        self.task_weights = None if task_weights is None else PerTask("task_weights", task_weights)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the given weights for each problem, NaN where G is not finite."""
        gram = check_gram(gram)
        given = self.task_weights
        weights = torch.ones_like(gram[..., 0]) if given is None else given.on(gram.device, gram.shape[-1], self.name)
        return nan_unless_finite(weights, gram)
