# SPDX-License-Identifier: MIT
"""The worst loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ._losses import LossMethod


class Minimax(LossMethod):
    """f = max_t L_t: weight 1 for the largest loss, 0 for the others; of equal losses the first one counts.

    Losses of any sign. Scale: sums to 1. No state.
    """

    name = "minimax"
    scale = "sums to 1"

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        return torch.zeros_like(losses).scatter_(-1, losses.argmax(-1, keepdim=True), 1)
