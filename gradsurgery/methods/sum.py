# SPDX-License-Identifier: MIT
"""The plain sum of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import check_gram
from ._base import Method
from ._state import nan_unless_finite


class Sum(Method):
    """w_t = 1: what ``sum(losses).backward()`` does, as a baseline. Scale: a sum over tasks. No state."""

    name = "sum"
    needs_gram = False
    weights_losses = True
    needs = "nothing"
    scale = "sum"
    linear = True

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return ones; NaN where G is not finite."""
        gram = check_gram(gram)
        return nan_unless_finite(torch.ones_like(gram[..., 0]), gram)
