# SPDX-License-Identifier: MIT
"""The mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import FixedMethod


class Mean(FixedMethod):
    """w_t = 1 / T: what ``mean(losses).backward()`` does, the heads included. Scale: sums to 1. No state."""

    name = "mean"
    scale = "mean"

    def _fixed(self, gram: Tensor) -> Tensor:
        return torch.full_like(gram[..., 0], 1 / gram.shape[-1])
