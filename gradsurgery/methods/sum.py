# SPDX-License-Identifier: MIT
"""The plain sum of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ._base import FixedMethod


class Sum(FixedMethod):
    """w_t = 1: what ``sum(losses).backward()`` does, as a baseline. Scale: a sum over tasks. No state."""

    name = "sum"
    scale = "sum"

    def _fixed(self, gram: Tensor) -> Tensor:
        return torch.ones_like(gram[..., 0])
