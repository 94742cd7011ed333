# SPDX-License-Identifier: MIT
"""Loss weights that stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._base import FixedMethod
from ._state import PerTask


class Constant(FixedMethod):
    """w_t as given: linear scalarisation, ``sum(w_t * loss_t).backward()``, the heads included. No state.

    Args:
        task_weights: T finite numbers, of any sign. None: 1 for each task.
    """

    name = "constant"
    scale = "as given"

    def __init__(self, task_weights: Sequence[float] | Tensor | None = None) -> None:
        self.task_weights = None if task_weights is None else PerTask("task_weights", task_weights)

    def _fixed(self, gram: Tensor) -> Tensor:
        given = self.task_weights
        return torch.ones_like(gram[..., 0]) if given is None else given.on(gram.device, gram.shape[-1], self.name)
