# SPDX-License-Identifier: MIT
"""The mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import check_gram
from ._base import Method
from ._state import nan_unless_finite


class Mean(Method):
    """w_t = 1 / T: what ``mean(losses).backward()`` does, the heads included. Scale: sums to 1. No state."""

    name = "mean"
    needs_gram = False
    weights_losses = True
    needs = "nothing"
    scale = "mean"
    linear = True

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return 1 / T for each task; NaN where G is not finite."""
        gram = check_gram(gram)
        return nan_unless_finite(torch.full_like(gram[..., 0], 1 / gram.shape[-1]), gram)
